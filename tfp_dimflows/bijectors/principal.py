"""`PrincipalMultiscale`: a multi-scale flow that principal components leave, not coordinates."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors.chain import Chain
from tfp_dimflows.bijectors.factorization import DimensionFactorization
from tfp_dimflows.bijectors.multiscale import Multiscale
from tfp_dimflows.bijectors.reorder import Squeeze
from tfp_dimflows.bijectors.rotation import Rotation


class PrincipalMultiscale(Multiscale):
    r"""Multi-scale flow whose levels see rotated channels, the leading half of which stays.

    It is the `Multiscale` of the levels

        image:   squeeze 2x2 blocks into channels, rotate the 4C channels (`Rotation`), level k
        vector:  rotate all dimensions, level k

    with `DimensionFactorization.channels`. After `FlowModel.adapt` the rotations are the principal components of what each
    level is given (Karhunen-Loeve transform), so that the levels start with uncorrelated channels, and what leaves is the
    subspace with the least variance: which dimensions leave depends on the data, as in `LCMA`, but they are no coordinates.
    Rotations are constant unless `trainable`; they add nothing to the log-det.

    Args:
      levels: bijectors, the finest first; level k of an image `[H, W, C]`, from 0, works on events of the shape
        `[H / 2^(k+1), W / 2^(k+1), 2^(k+2) C]`.
      event_shape: `[H, W, C]` or `[D]`.
      matrix: as in `Rotation`; or a list with one for each level.
      trainable: as in `Rotation`.
      exits: as in `Multiscale`.
      seed: as in `Rotation`; each level gets its own.
      dtype: as in `Rotation`.
      name: the name of the operations.

    Raises:
      ValueError: as `Multiscale`, `DimensionFactorization.channels` and `Rotation`.

    #### Example

    >>> flow = dfb.PrincipalMultiscale([tfb.Identity(), tfb.Identity()], event_shape=[4])
    >>> with dimflows.adaptation():
    ...     flow.inverse([[1.0, 1, 1, 1], [2.0, 2, 2, 2], [3.0, 3, 3, 3], [4.0, 4, 4, 4]]).numpy().round(3)[:, 0]
    array([-3., -1.,  1.,  3.], dtype=float32)
    """

    def __init__(
        self,
        levels: Sequence[tfb.Bijector],
        event_shape: Sequence[int],
        matrix: str | Sequence[str | ArrayLike] = "principal",
        trainable: bool = False,
        exits: Sequence[tfb.Bijector | None] | None = None,
        seed: int = 0,
        dtype: tf.DType = tf.float32,
        name: str = "principal_multiscale",
    ):
        parameters = dict(locals())
        matrices = [matrix] * len(levels) if isinstance(matrix, str) else list(matrix)
        if len(matrices) != len(levels):
            raise ValueError(f"PrincipalMultiscale: got {len(matrices)} matrices for {len(levels)} levels, needs one for each")
        factorization = None
        grids = [tuple(int(size) for size in event_shape)]
        if len(levels) > 1:
            factorization = DimensionFactorization.channels(event_shape, len(levels))
            grids += [grid.shape for grid in factorization.kept]
        squeeze = [Squeeze()] if len(grids[0]) == 3 else []
        seeds = np.random.SeedSequence(seed).generate_state(len(levels)).tolist()
        rotated = []
        for level, grid, own, own_seed in zip(levels, grids, matrices, seeds):
            channels = grid[-1] * 4 ** len(squeeze)
            rotated.append(Chain([*squeeze, Rotation(channels, own, trainable, own_seed, dtype), level]))
        super().__init__(rotated, factorization, exits, event_shape=grids[0], parameters=parameters, name=name)
