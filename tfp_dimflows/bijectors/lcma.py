"""LCMA: the likelihood-contribution based multi-scale architecture."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike
from tensorflow_probability import bijectors as tfb

from tfp_dimflows import representation
from tfp_dimflows.bijectors.chain import Chain, flattened
from tfp_dimflows.bijectors.factorization import DimensionFactorization
from tfp_dimflows.bijectors.multiscale import Multiscale
from tfp_dimflows.bijectors.probes import probes_from
from tfp_dimflows.bijectors.walk import transport


class LCMA(Multiscale):
    """Multi-scale flow whose factor-outs follow each dimension's likelihood contribution.

    The dimensions whose accumulated inverse log-det is low leave early, those with a high one go through more levels. It is the
    `Multiscale` with the factorization `DimensionFactorization.from_contributions(contributions, keep, granularity)`, fixed at
    construction, so the density is exact.

    The three phases of the method: train a `Multiscale(levels, factorization=None)` for a while; take its
    `dimflows.likelihood_contributions`; train this. `dimflows.training.train` does all three.

    Args:
      levels: as in `Multiscale`.
      contributions: one array of the event's shape per factor-out.
      keep: `"high"` (LCMA), `"low"`, or a list of them.
      granularity: `"channel"`, `"block"`, `"squeezed"` or `"free"`, as in `DimensionFactorization.from_contributions`.
      exits: as in `Multiscale`.
      name: the name of the operations.

    Raises:
      ValueError: as `DimensionFactorization.from_contributions` and `Multiscale`.

    References: Das, Abbeel, Spanos, "Likelihood Contribution based Multi-scale Architecture for Generative Flows", 2020.

    #### Example

    >>> flow = dfb.LCMA([tfb.Identity(), tfb.Identity()], contributions=[[0.1, 0.4, 0.2, 0.3]])
    >>> flow.inverse([1.0, 2.0, 3.0, 4.0]).numpy()
    array([2., 4., 1., 3.], dtype=float32)
    """

    def __init__(
        self,
        levels: Sequence[tfb.Bijector],
        contributions: Sequence[ArrayLike],
        keep: str | Sequence[str] = "high",
        granularity: str | None = None,
        exits: Sequence[tfb.Bijector | None] | None = None,
        name: str = "lcma",
    ):
        parameters = dict(locals())
        factorization = DimensionFactorization.from_contributions(contributions, keep, granularity)
        super().__init__(levels, factorization, exits=exits, parameters=parameters, name=name)


@representation.arguments.register
def _arguments(lcma: LCMA) -> dict[str, Any]:
    others = {name: value for name, value in lcma.parameters.items() if name not in ("levels", "contributions")}
    return {"levels": lcma.levels, "factorization": lcma.factorization, **others}


@overload
def likelihood_contributions(
    bijector: tfb.Bijector, dataset: Iterable[Any], seed: int = 0, standard_errors: Literal[False] = False
) -> list[np.ndarray]: ...
@overload
def likelihood_contributions(
    bijector: tfb.Bijector, dataset: Iterable[Any], seed: int = 0, *, standard_errors: Literal[True]
) -> tuple[list[np.ndarray], list[np.ndarray]]: ...
def likelihood_contributions(
    bijector: tfb.Bijector, dataset: Iterable[Any], seed: int = 0, standard_errors: bool = False
) -> list[np.ndarray] | tuple[list[np.ndarray], list[np.ndarray]]:
    """Each dimension's cumulative likelihood contribution at each factor-out, averaged over a dataset.

    With L_k the per-dimension inverse log-det (data to latent) summed over levels 0 to k, in the data's frame, the result is
    the mean of L_k over the data, for k = 0 ... num_levels - 2. Bijectors between the data and the `Multiscale` (preprocessing)
    transform the data but are not counted.

    Args:
      bijector: a `Multiscale`, or a chain (this package's or TFP's) with one in it; usually one with `factorization=None`. For
        a `VFlow` give its `flow`, and events [x, z] as the data.
      dataset: batches of events. Integer images get uniform noise in [0, 1).
      seed: integer seed of that noise, and of the probes of stochastic log-dets.
      standard_errors: whether to return the standard errors of the means too. They tell how far a ranking of stochastic
        contributions (those of residual blocks) can be trusted. They take examples as independent; the number of terms that
        `dfb.residual.RussianRoulette` draws for a whole batch matters little with its 20 exact terms.

    Returns:
      A list of float64 arrays of the event's shape, one per factor-out; with `standard_errors` a pair of such lists.

    Raises:
      ValueError: if there is no `Multiscale` in the chain, it has a single level, or the dataset is empty.

    References: Das, Abbeel, Spanos, "Likelihood Contribution based Multi-scale Architecture for Generative Flows", 2020.

    #### Example

    >>> flow = dfb.Multiscale([dfb.ElementwiseAffine(0.0, [1.0, 2.0]), tfb.Identity()])
    >>> [c.tolist() for c in dimflows.likelihood_contributions(flow, [tf.zeros([5, 2])])]
    [[1.0, 2.0]]
    """
    parts = flattened(bijector)
    outer = list(itertools.takewhile(lambda part: not isinstance(part, Multiscale), parts))
    if len(outer) == len(parts):
        raise ValueError(f"likelihood_contributions: got {bijector.name}, needs a Multiscale or a chain with one in it")
    multiscale = parts[len(outer)]
    if len(multiscale.levels) < 2:
        raise ValueError(f"likelihood_contributions: {multiscale.name} has one level, so nothing is factored out")

    @tf.function(autograph=False, reduce_retracing=True)
    def batch_sums(y: tf.Tensor, probe_seed: tf.Tensor) -> list[tf.Tensor]:
        with probes_from(probe_seed):
            y = Chain(outer).inverse(y) if outer else y
            contributions = [tf.cast(c, tf.float64) for c in multiscale.likelihood_contributions(y)]
        sums = [tf.reduce_sum(power, axis=0) for c in contributions for power in (c, c**2)]
        for b in reversed(outer):
            sums = [transport(b, s, "forward") for s in sums]
        return sums

    totals, count = np.zeros([]), 0
    for step, batch in enumerate(dataset):
        y = tf.convert_to_tensor(batch)
        if y.dtype.is_integer:
            noise = tf.random.stateless_uniform(tf.shape(y), seed=[seed, step], dtype=keras.config.floatx())
            y = tf.cast(y, noise.dtype) + noise
        totals = totals + np.stack(batch_sums(y, tf.constant([seed, step], tf.int32)))
        count += int(y.shape[0])
    if not count:
        raise ValueError("likelihood_contributions: the dataset is empty")
    means, squares = totals[::2] / count, totals[1::2] / count
    if not standard_errors:
        return list(means)
    return list(means), list(np.sqrt(np.maximum(squares - means**2, 0.0) / count))
