"""`Parametric`: what planar, radial and Sylvester flows share: raw parameters in one tensor."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.types.experimental import TensorLike

from tfp_dimflows.bijectors import base
from tfp_dimflows.bijectors.log_dets import log_det_dtype
from tfp_dimflows.upstream import dtype_util, parameter_properties, tensor_util
from tfp_dimflows.upstream import prefer_static as ps


class Parametric(base.FlowBijector):
    """Base of bijectors of vectors whose unconstrained parameters are one tensor.

    A family writes `_parts`, the shapes of its parameters in the order in which `params` holds them, and the two methods
    `_forward_pass(x, parts)` and `_inverse_pass(y, parts)`. Both return the value, the *forward* log-det of the event, and a
    function that returns the forward log-det of every dimension.

    Args:
      dims: number of dimensions of an event.
      params: as in the families.
      initial: function of a NumPy random generator that returns initial values of trainable parameters.
      seed: integer seed of `initial`.
      dtype: dtype of trainable parameters.
      parameters: the constructor's arguments.
      name: the name of the operations.
    """

    def __init__(
        self,
        dims: int,
        params: TensorLike | None,
        initial: Callable[[np.random.Generator], Sequence[Any]],
        seed: int | None,
        dtype: tf.DType,
        parameters: dict,
        name: str,
    ):
        self._dims = dims
        if params is None:
            generator = np.random.default_rng(np.random.randint(2**31) if seed is None else seed)
            values = [np.reshape(part, [-1]) for part in initial(generator)]
            params = tf.Variable(tf.constant(np.concatenate(values), dtype), name="params")
        dtype = dtype_util.common_dtype([params], dtype)
        self._params = tensor_util.convert_nonref_to_tensor(params, dtype=dtype)
        parameters["params"] = self._params  # shared by copies, and by the slices that TFP makes of distributions
        size = sum(math.prod(shape) for shape in self._parts)
        if self._params.shape[-1:] != [size]:
            raise ValueError(f"{name}: got params of shape {self._params.shape}, {dims} dimensions need a last axis of {size}")
        super().__init__(forward_min_event_ndims=1, parameters=parameters, name=name)

    @classmethod
    def _parameter_properties(cls, dtype: tf.DType, num_classes: int | None = None) -> dict[str, Any]:
        return {"params": parameter_properties.ParameterProperties(event_ndims=1)}

    def _split(self, value: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The value and the parameters, in the precision of log-dets."""
        if value.shape[-1] != self._dims:
            raise ValueError(f"{self.name}: got events of shape {value.shape[-1:]}, needs {self._dims} dimensions")
        dtype = log_det_dtype(value.dtype)
        params = tf.cast(tf.convert_to_tensor(self._params), dtype)
        parts = tf.split(params, [math.prod(shape) for shape in self._parts], axis=-1)
        batch = ps.shape(params)[:-1]
        return tf.cast(value, dtype), [tf.reshape(p, ps.concat([batch, s], axis=0)) for p, s in zip(parts, self._parts)]

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        y, _, per_dim = self._forward_pass(*self._split(x))
        return tf.cast(y, x.dtype), per_dim()

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        x, _, per_dim = self._inverse_pass(*self._split(y))
        return tf.cast(x, y.dtype), -per_dim()

    def _forward_and_log_det(self, x: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        y, fldj, _ = self._forward_pass(*self._split(x))
        return tf.cast(y, x.dtype), tf.reduce_sum(fldj, axis=list(range(1 - event_ndims, 0)))

    def _inverse_and_log_det(self, y: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        x, fldj, _ = self._inverse_pass(*self._split(y))
        return tf.cast(x, y.dtype), -tf.reduce_sum(fldj, axis=list(range(1 - event_ndims, 0)))


def positive(raw: tf.Tensor) -> tf.Tensor:
    """softplus(raw), but at least 1e-6, so that rounding never makes it 0."""
    return tf.maximum(tf.nn.softplus(raw), 1e-6)


def log_tanh_sum_slope(p: tf.Tensor, slope_at_0: tf.Tensor) -> tf.Tensor:
    """log(1 + m (1 - tanh(p)^2)) with slope_at_0 = 1 + m > 0, as the logarithm of a sum of positive numbers."""
    return tf.math.log(tf.square(tf.tanh(p)) + tanh_slope(p) * slope_at_0)


def tanh_slope(a: tf.Tensor) -> tf.Tensor:
    """1 - tanh(a)^2, without cancellation."""
    e = tf.exp(-2.0 * tf.abs(a))
    return 4.0 * e / tf.square(1.0 + e)
