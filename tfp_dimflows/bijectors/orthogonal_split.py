"""`OrthogonalSplit`: an orthogonal transform of blocks, the leading channels of which are kept apart from the others."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors import base
from tfp_dimflows.bijectors.factor_out import flat_latents
from tfp_dimflows.bijectors.reorder import Squeeze
from tfp_dimflows.bijectors.rotation import Rotation
from tfp_dimflows.bijectors.walk import Parts, Walk, transport


class OrthogonalSplit(base.Composite):
    r"""Orthogonal transform of the blocks of an image, or of a vector: from data to latent, the kept part h and the rest Delta.

        inverse (data to latent):  x = Q (squeeze(y) - b) = [h, Delta],    forward:  y = unsqueeze(Q^T x + b),    log-det: 0

    where squeeze makes f x f blocks of pixels the channels, f = `factor`, and the first `kept` of the rotated channels are h.
    With `matrix="principal"`, after `FlowModel.adapt`, h holds the projection of every block onto as many principal components,
    of all linear maps to so many numbers the one from which blocks are reconstructed with the least mean squared error. A
    factor as large as an image makes it one block.

    With `whole` the kept part is a code of whole images that keeps the layout of blocks: all D dimensions, those of h before
    those of Delta, are rotated by a `Rotation` whose first rows span the leading principal components of the images, and are
    as near as possible to the dimensions of h. Images are reconstructed from it as well as from their principal components,
    and convolutions still find neighbours side by side. That costs O(D^2) per image, and O(D^3) in `adapt`.

    Args:
      channels: channels of an event, or the dimensions of a vector.
      kept: how many of the rotated channels h has.
      factor: side f of the blocks of images; None: vectors.
      matrix: as in `dfb.Rotation`.
      trainable: as there, of the blocks' rotation.
      seed: as there.
      dtype: as there.
      whole: height and width of the images if they are to be rotated as a whole after their blocks; None: they are not.
      name: the name of the operations.

    Raises:
      ValueError: for other channels, a part without any, or as `dfb.Squeeze` and `dfb.Rotation`.

    #### Example

    >>> split = dfb.OrthogonalSplit(channels=1, kept=1, factor=2, matrix="haar")
    >>> h, detail = split.split([[[1.0], [2.0]], [[3.0], [4.0]]])
    >>> h.numpy().ravel(), detail.numpy().ravel()
    (array([5.], dtype=float32), array([-1., -2.,  0.], dtype=float32))
    """

    def __init__(
        self,
        channels: int,
        kept: int,
        factor: int | None = 2,
        matrix: str | ArrayLike = "principal",
        trainable: bool = False,
        seed: int = 0,
        dtype: tf.DType = tf.float32,
        whole: Sequence[int] | None = None,
        name: str = "orthogonal_split",
    ):
        parameters = dict(locals())
        size = channels if factor is None else channels * factor**2
        if not isinstance(kept, (int, np.integer)) or not 0 < kept < size:
            raise ValueError(f"OrthogonalSplit: got kept={kept} of {size} rotated channels, needs 1 to {size - 1}")
        if factor is None and whole is not None:
            raise ValueError(f"OrthogonalSplit: got whole={whole!r} for vectors, which are rotated as a whole anyway")
        self._kept, self._size = kept, size
        self._rotation = Rotation(size, matrix, trainable, seed, dtype)
        self._squeeze = tfb.Identity() if factor in (None, 1) else Squeeze(factor)
        self._shapes = self._squeeze
        self._whole, self._flat_shapes = None, None
        if whole is not None:
            self._flat_shapes = self.part_shapes([*whole, channels])
            self._whole = Rotation(math.prod(whole) * channels, dtype=dtype, leading=math.prod(self._flat_shapes[0]))
        event_ndims = 1 if factor is None else 3
        super().__init__(forward_min_event_ndims=event_ndims, is_constant_jacobian=True, parameters=parameters, name=name)

    @property
    def rotation(self) -> Rotation:
        """The rotation of the squeezed channels."""
        return self._rotation

    @property
    def parts(self) -> Parts:
        """How an event falls into h and Delta, and how they are put together again."""
        return Parts(self.split, self.merge, self._split_numbers, self._merge_numbers)

    def part_shapes(self, event_shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of h and Delta of events of a shape.

        Raises:
          ValueError: if the events do not fit.
        """
        *space, size = self._shapes.inverse_event_shape(list(event_shape))
        if size != self._size:
            raise ValueError(f"{self.name}: got events of shape {list(event_shape)}, is for {self._size} rotated channels")
        return (*space, self._kept), (*space, size - self._kept)

    def split(self, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The parts h and Delta of events."""
        return self._halves(self.inverse(y))

    def merge(self, h: tf.Tensor, detail: tf.Tensor) -> tf.Tensor:
        """What `split` took apart."""
        return self.forward(tf.concat([h, detail], axis=-1))

    def _split_numbers(self, numbers: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return self._halves(transport(self, numbers, "inverse"))

    def _merge_numbers(self, h: tf.Tensor, detail: tf.Tensor) -> tf.Tensor:
        return transport(self, tf.concat([h, detail], axis=-1), "forward")

    def _halves(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return x[..., : self._kept], x[..., self._kept :]

    def _walk_inverse(self, y: Walk, condition: None) -> Walk:
        return self._along(y.inverse(self._squeeze).inverse(self._rotation), "inverse")

    def _walk_forward(self, x: Walk, condition: None) -> Walk:
        return self._along(x, "forward").forward(self._rotation).forward(self._squeeze)

    def _along(self, blocks: Walk, direction: str) -> Walk:
        """On through the rotation of whole images."""
        if self._whole is None or self._flat_shapes is None:
            return blocks
        self._check_event(blocks.shape, [*self._flat_shapes[0][:-1], self._size])
        channels = Parts(self._halves, lambda h, rest: tf.concat([h, rest], axis=-1))
        flat = flat_latents(self._flat_shapes)
        h, rest = blocks.split(channels)
        h, rest = h.join(rest, by=flat).through(self._whole, direction, {}).split(flat)
        return h.join(rest, by=channels)
