"""What each part of a model's latent values is worth: `explained`."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from tfp_dimflows.bijectors import PNF, Chain, Multiscale
from tfp_dimflows.bijectors.conditions import condition_kwargs
from tfp_dimflows.bijectors.probes import probes_from
from tfp_dimflows.bijectors.walk import Summed
from tfp_dimflows.codes import Reconstruction, psnr
from tfp_dimflows.distributions import structure_of
from tfp_dimflows.training import batches
from tfp_dimflows.training.model import FlowModel


class LogProbTerms:
    """The log-density of a model as one term for each level of its `dfb.Multiscale`, or stage of its `dfb.PNF`.

    The terms are those of `Multiscale.level_log_prob` (the finest level first) or `PNF.stage_log_prob` (the coarsest stage
    first), then, if there is any, that of preprocessing: the inverse log-det of what is between data and flow - log r(u | x),
    with r the density of the dequantisation noise.

    Args:
      model: a `FlowModel`.
      kind: `Multiscale`, `PNF`, or both.
      owner: the beginning of messages.

    Attributes:
      flow: the `Multiscale` or `PNF`.
      has_preprocessing: whether there is a term of preprocessing.

    Raises:
      ValueError: unless the distribution is a flow of independent noise with such a part next to the latent values; of a `PNF`
        the noise must be standard normal.
    """

    def __init__(self, model: FlowModel, kind: type | tuple[type, ...], owner: str):
        structure = structure_of(model.distribution)
        self._outer, self.flow = structure.innermost(kind, owner)
        self._dequantized, self._noise = structure.dequantized, structure.noise
        if isinstance(self.flow, PNF) and not _is_standard_normal(self._noise):
            raise ValueError(f"{owner} has the noise {self._noise.name}, the stages of a PNF need a standard normal one")
        self.has_preprocessing = self._dequantized is not None or bool(self._outer)
        self._event_shape = model.event_shape
        self._compiled = tf.function(self._terms, autograph=False, reduce_retracing=True)

    def __call__(self, batch: Any, seed: int) -> tf.Tensor:
        """The terms of a batch, `[batch, number of terms]`, with noise and probes from an integer seed."""
        return self._terms(batch, tf.constant([0, seed], tf.int32))

    def mean_bits(self, data: Iterable[Any], seed: int) -> np.ndarray:
        """`-term / (D ln 2)` on average over batches, of which number s has the noise of `seed + s`."""
        total, count = 0.0, 0
        for step, batch in enumerate(data):
            terms = self._compiled(batch, tf.constant([0, seed + step], tf.int32)).numpy().astype(np.float64)
            total, count = total + terms.sum(axis=0), count + len(terms)
        return -total / (count * self._event_shape.num_elements() * math.log(2.0))

    def _terms(self, batch: Any, seed: tf.Tensor) -> tf.Tensor:
        x, condition = (batch["x"], batch["condition"]) if isinstance(batch, dict) else (batch, None)
        with probes_from(seed):
            preprocessing = 0.0
            if self._dequantized is not None:
                x, log_r, _ = self._dequantized.noisy(x, 1, seed)
                preprocessing = -log_r
            if self._outer:
                outer = Summed(x, len(self._event_shape)).inverse(Chain(self._outer), condition)
                x, preprocessing = outer.value, outer.log_det + preprocessing
            given = condition_kwargs(self.flow, condition)
            if isinstance(self.flow, PNF):
                terms = self.flow.stage_log_prob(x, **given)
            else:
                terms = self.flow.level_log_prob(x, noise=self._noise, **given)
        if self.has_preprocessing:
            preprocessing = tf.broadcast_to(tf.cast(preprocessing, terms.dtype), tf.shape(terms)[:-1])
            terms = tf.concat([terms, preprocessing[..., tf.newaxis]], axis=-1)
        return terms


def _is_standard_normal(noise: tfd.Distribution) -> bool:
    normal = noise.distribution if isinstance(noise, (tfd.Sample, tfd.Independent)) else noise
    return isinstance(normal, tfd.Normal) and bool(np.all(normal.loc == 0.0) and np.all(normal.scale == 1.0))


def bits_of_parts(model: FlowModel, data: Any, seed: int = 0, batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """The bits and the entropy of every part of the latent values; arguments, formulas and errors as those of `explained`."""
    terms = LogProbTerms(model, (Multiscale, PNF), f"explained: {model.distribution.name}")
    if batches.checked_first(data, model.distribution)[0] is None:
        raise ValueError("explained: the dataset is empty")
    bits = terms.mean_bits(_batches(model, data, batch_size), seed)
    *of_terms, preprocessing = bits if terms.has_preprocessing else [*bits, 0.0]
    shares = np.diff(model.code_sizes, prepend=0) / model.code_sizes[-1]
    of_parts = np.zeros(len(shares))
    np.add.at(of_parts, _parts_of_terms(terms.flow, len(shares)), of_terms)
    return of_parts + preprocessing * shares, of_parts / shares * math.log(2.0)


def _parts_of_terms(flow: Multiscale | PNF, num_parts: int) -> np.ndarray:
    """To which part each term belongs; that of a level which nothing leaves to the part that leaves next."""
    if isinstance(flow, PNF):
        return np.arange(num_parts)
    leaving = [0] * (len(flow.levels) - 1) if flow.factorization is None else [left.size for left in flow.factorization.left]
    return num_parts - 1 - np.cumsum([0, *(size > 0 for size in leaving)])


def explained(model: FlowModel, data: Any, seed: int = 0, batch_size: int = 64) -> dict[str, np.ndarray]:
    """What each part of a model's latent values is worth: its bits, its entropy, and the error without it and what is finer.

    Of part k of the latent values, of d_k numbers, with D the number of dimensions of an event and term k the log-density
    of `Multiscale.level_log_prob` or `PNF.stage_log_prob`, each on average over the data,

        entropy_k = -term_k / d_k
        bits_k    = d_k / D * (entropy_k / ln 2 + bits/dim of preprocessing)
        error_k   = sqrt of the mean of (x - decode(the parts before k))^2
        psnr_k    = 20 log10(grey_levels - 1) - 20 log10(error_k)

    So the bits sum to the model's bits per dimension: those of preprocessing (of what is between data and flow, and of
    dequantisation, with one noise sample) are shared out by size. The entropy is an estimate of the differential entropy of a
    part given the coarser ones, in nats per dimension, in the units of the flow's own values, which are those after
    preprocessing: of a `dfb.PNF` that of the image h_k given h_{k-1}, of a `dfb.Multiscale` the entropy of a level's input less
    that of what stays after it. Levels that nothing leaves count with the next that something leaves.

    Args:
      model: a `FlowModel` with a `dfb.Multiscale` or a `dfb.PNF` next to the latent values.
      data: as in `FlowModel.score`, with a condition for each event if the model is conditional.
      seed: integer seed of the noise.
      batch_size: as in `FlowModel.score`.

    Returns:
      Columns with a row for each part, the coarsest first: `size`, `bits`, `entropy`, `error`, and `psnr` of integer images.
      `pandas.DataFrame` takes them.

    Raises:
      ValueError: if the model has no such part, or the data does not fit it.

    #### Example

    >>> model = dimflows.FlowModel(dimflows.recipes.glow([4, 4, 1], num_levels=2, depth=1, width=4, grey_levels=4))
    >>> columns = dimflows.explained(model, tf.zeros([8, 4, 4, 1], tf.int32))
    >>> columns["size"], list(columns)
    (array([8, 8]), ['size', 'bits', 'entropy', 'error', 'psnr'])
    """
    bits, entropy = bits_of_parts(model, data, seed, batch_size)
    squared_errors, count = 0.0, 0
    reconstruct = Reconstruction(model)
    for batch in _batches(model, data, batch_size):
        x = np.asarray(batch["x"] if isinstance(batch, dict) else batch, np.float64)
        errors = reconstruct(batch, [0, *model.code_sizes[:-1]]) - x
        squared_errors, count = squared_errors + np.square(errors).reshape(len(errors), -1).sum(axis=1), count + x.size
    mean_squared_errors = squared_errors / count
    structure = structure_of(model.distribution)
    columns = {
        "size": np.diff(model.code_sizes, prepend=0),
        "bits": bits,
        "entropy": entropy,
        "error": np.sqrt(mean_squared_errors),
    }
    if structure.dequantized is not None and len(model.event_shape) == 3:
        columns["psnr"] = psnr(mean_squared_errors, structure.dequantized.grey_levels)
    return columns


def _batches(model: FlowModel, data: Any, batch_size: int) -> Iterator[Any]:
    if not isinstance(data, tf.data.Dataset):
        events = batches.checked(data, model.distribution, batch_axes=1)
        data = tf.data.Dataset.from_tensor_slices(events).batch(batch_size)
    for batch in data:
        yield batches.checked(batches.events(batch), model.distribution, batch_axes=1)
