"""Nested dropout: a training loss by which the first latent values tell as much of an event as they can."""

from typing import Any

import tensorflow as tf
from tensorflow_probability import distributions as tfd

from tfp_dimflows.bijectors.chain import Chain
from tfp_dimflows.bijectors.walk import Summed
from tfp_dimflows.distributions import structure_of
from tfp_dimflows.upstream import prefer_static as ps
from tfp_dimflows.upstream import samplers


class NestedDropout:
    """Squared error of events from codes of random sizes, `|x - decode(encode(x)[:k])|^2`, in which gradients go both ways.

    For every event k is one of the sizes of codes but the whole, each with the same probability. The latent values that are
    left out are 0. Integer events count as the middle of their cell, in units of the range of grey levels.

    Args:
      distribution: a flow of noise with a `dfb.Multiscale` or a `dfb.PNF` next to it.

    Raises:
      ValueError: for another one.
    """

    def __init__(self, distribution: tfd.Distribution):
        structure = structure_of(distribution)
        self._sizes = structure.code_sizes[:-1]
        if structure.ordering is None or structure.augmented is not None or not self._sizes:
            raise ValueError(
                f"FlowModel: got nested_dropout for {distribution.name}, needs a flow whose latent values are ordered by a "
                "Multiscale that dimensions leave, or by a PNF"
            )
        self._flow = Chain(structure.bijectors)
        self._grey_levels = None if structure.dequantized is None else structure.dequantized.grey_levels
        self._dtype = structure.noise.dtype

    def __call__(self, x: tf.Tensor, condition: Any, event_ndims: int, seed: tf.Tensor) -> tf.Tensor:
        """The mean error of a batch of events, with the sizes of their codes from a seed."""
        if self._grey_levels is not None:
            x = tf.cast(x, self._dtype) + 0.5
        code = Summed(x, event_ndims).inverse(self._flow, condition).value
        batch = ps.shape(code)[:-1]
        choice = samplers.uniform(batch, 0, len(self._sizes), dtype=tf.int32, seed=seed)
        is_in_code = tf.range(code.shape[-1]) < tf.gather(self._sizes, choice)[..., tf.newaxis]
        restored = Summed(tf.where(is_in_code, code, tf.zeros([], code.dtype)), 1).forward(self._flow, condition).value
        errors = tf.square((restored - x) / (self._grey_levels or 1))
        # The last batch may leave a replica without events.
        return tf.math.divide_no_nan(tf.reduce_sum(errors), tf.cast(tf.reduce_prod(batch), errors.dtype))
