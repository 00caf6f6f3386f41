"""PReLU as a bijector."""

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfp_dimflows.bijectors import base
from tfp_dimflows.bijectors.log_dets import log_det_dtype
from tfp_dimflows.bijectors.parametric import positive


class PReLU(base.FlowBijector):
    """Parametric rectifier with a trainable slope a = softplus(raw), at least 1e-6, of negative values.

        forward:  y = x where x >= 0, a x elsewhere
        inverse:  x = y where y >= 0, y / a elsewhere
        inverse log-det of a dimension:  0 where y >= 0, -log(a) elsewhere

    Args:
      shape: `[]`: one slope for all entries; or the shape of events with a slope for every entry, of their last axis or axes.
      initial_slope: initial a.
      dtype: dtype of the variable.
      name: the name of the operations.

    Raises:
      ValueError: if `initial_slope` is not positive, or events do not end with `shape`.

    References: He, Zhang, Ren, Sun, "Delving deep into rectifiers", 2015.

    #### Example

    >>> dfb.PReLU(initial_slope=0.5).forward([2.0, -2.0]).numpy()
    array([ 2., -1.], dtype=float32)
    """

    def __init__(
        self, shape: Sequence[int] = (), initial_slope: float = 0.25, dtype: tf.DType = tf.float32, name: str = "prelu"
    ):
        parameters = dict(locals())
        if not initial_slope > 0.0:
            raise ValueError(f"PReLU: got initial_slope={initial_slope!r}, needs a positive number")
        raw = initial_slope + math.log(-math.expm1(-initial_slope))
        self._raw = tf.Variable(tf.fill(list(shape), tf.constant(raw, dtype)), name="slope")
        super().__init__(forward_min_event_ndims=len(shape), parameters=parameters, name=name)

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return self._scaled(x, 1.0)

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return self._scaled(y, -1.0)

    def _scaled(self, value: tf.Tensor, power: float) -> tuple[tf.Tensor, tf.Tensor]:
        shape = self._raw.shape
        if value.shape[value.shape.rank - shape.rank :] != shape:
            raise ValueError(f"{self.name}: got values of shape {value.shape}, has slopes of shape {shape}")
        raw = tf.cast(self._raw, log_det_dtype(value.dtype))
        log_slope = power * tf.math.log(positive(raw))
        negative = value < 0
        result = tf.where(negative, value * tf.cast(tf.exp(log_slope), value.dtype), value)
        return result, tf.where(negative, log_slope, 0.0)
