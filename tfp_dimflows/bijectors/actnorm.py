"""Activation normalisation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfp_dimflows.bijectors import base
from tfp_dimflows.bijectors.log_dets import log_det_dtype
from tfp_dimflows.keras_bridge import adapting


class ActNorm(base.FlowBijector):
    """Shift and scale of every channel, with a data-dependent initialisation (Glow).

        inverse (data to latent):  x = (y + b) * exp(f * s)
        forward:                   y = x * exp(-f * s) - b
        inverse log-det of a dimension: f * s of its channel

    with trainable b and s per entry of the last axis (or per pixel and channel, as in Flow++), and a constant
    f = `log_scale_factor`, which only changes the effective learning rate of s. It starts as the identity. A pass inside
    `dimflows.adaptation()` (as `FlowModel.adapt` makes) sets b and s so that every channel of the result has zero mean and unit
    variance; nothing else ever initialises it.

    Args:
      channels: size of the last axis; or the shape `[H, W, C]` of events with a b and s for every entry.
      log_scale_factor: f.
      dtype: dtype of the variables.
      name: the name of the operations.

    References: Kingma, Dhariwal, "Glow", 2018.

    #### Example

    >>> actnorm = dfb.ActNorm(1)
    >>> with dimflows.adaptation():
    ...     actnorm.inverse(tf.constant([[1.0], [5.0]])).numpy().ravel()
    array([-1.,  1.], dtype=float32)
    """

    def __init__(
        self, channels: int | Sequence[int], log_scale_factor: float = 1.0, dtype: tf.DType = tf.float32, name: str = "actnorm"
    ):
        parameters = dict(locals())
        shape = [channels] if isinstance(channels, (int, np.integer)) else list(channels)
        self._shift = tf.Variable(tf.zeros(shape, dtype), name="shift")
        self._raw_log_scale = tf.Variable(tf.zeros(shape, dtype), name="log_scale")
        self._factor = log_scale_factor
        super().__init__(forward_min_event_ndims=len(shape), is_constant_jacobian=True, parameters=parameters, name=name)

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        self._check(y)
        if adapting():
            mean, log_std = self._moments(y)
            self._assign(shift=-mean, log_scale=-log_std)
        shift, log_scale = self._parameters_as(y.dtype)
        return (y + tf.cast(shift, y.dtype)) * tf.cast(tf.exp(log_scale), y.dtype), log_scale

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        self._check(x)
        if adapting():
            mean, log_std = self._moments(x)
            self._assign(shift=mean * tf.exp(-log_std), log_scale=log_std)
        shift, log_scale = self._parameters_as(x.dtype)
        return x * tf.cast(tf.exp(-log_scale), x.dtype) - tf.cast(shift, x.dtype), -log_scale

    def _parameters_as(self, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
        dtype = log_det_dtype(dtype)
        return tf.cast(self._shift, dtype), self._factor * tf.cast(self._raw_log_scale, dtype)

    def _assign(self, shift: tf.Tensor, log_scale: tf.Tensor) -> None:
        self._shift.assign(tf.cast(shift, self._shift.dtype))
        self._raw_log_scale.assign(tf.cast(log_scale / self._factor, self._shift.dtype))

    def _check(self, value: tf.Tensor) -> None:
        shape = self._shift.shape
        if value.shape[-shape.rank :] != shape:
            got, has = (value.shape[-1], shape[0]) if shape.rank == 1 else (value.shape[-shape.rank :], shape)
            raise ValueError(f"{self.name}: got {got} channels, has parameters for {has}")

    def _moments(self, value: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        value = tf.cast(value, log_det_dtype(value.dtype))
        shape = self._shift.shape
        axes = list(range(value.shape.rank - shape.rank))
        # Relative to one of the values, and to the largest deviation from it, moments are as good at every scale; those of a
        # constant channel are exact, however large the batch.
        some = tf.reshape(value, [-1, *shape])[0]
        size = tf.reduce_max(tf.abs(value - some), axis=axes)
        mean, variance = tf.nn.moments(tf.math.divide_no_nan(value - some, size), axes=axes)
        mean, std = some + size * mean, size * tf.sqrt(variance)
        # A constant channel, but for rounding, keeps its scale: normalising it would blow up the first value that differs.
        rounding = 4.0 * np.finfo(value.dtype.as_numpy_dtype).eps * tf.reduce_max(tf.abs(value), axis=axes)
        return mean, tf.where(std > rounding, tf.math.log(tf.where(std > rounding, std, 1.0)), 0.0)
