"""Scales from data: activation normalisation, and standardisation of columns."""

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
            mean, log_std = _moments(y, self._shift.shape)
            self._assign(shift=-mean, log_scale=-log_std)
        shift, log_scale = self._parameters_as(y.dtype)
        return (y + tf.cast(shift, y.dtype)) * tf.cast(tf.exp(log_scale), y.dtype), log_scale

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        self._check(x)
        if adapting():
            mean, log_std = _moments(x, self._shift.shape)
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


class Standardize(base.FlowBijector):
    r"""Columns of mean 0 and standard deviation 1, as the data has them; columns with bounds become unbounded before that.

        u = y                       for a column without bounds
        u = log(y - l)              for y > l
        u = -log(h - y)             for y < h
        u = log((y - l) / (h - y))  for l < y < h
        inverse (data to latent):  x = (u - m) exp(-s)
        forward:                   y = u^-1(x exp(s) + m)
        inverse log-det of a dimension: log |du/dy| - s

    m and s, of each column, are saved with the weights and not trained. They are 0 until a pass inside `dimflows.adaptation()`
    (as `FlowModel.adapt` makes) takes them from its data; s stays 0 for a column that is constant. Outside of the bounds
    there is no density: the result is no number.

    Args:
      channels: size of the last axis.
      bounds: one entry for each column: None, or a pair of numbers (l, h), one of which may be None; None: there are none.
      dtype: dtype of the variables.
      name: the name of the operations.

    Raises:
      ValueError: for another number of bounds, or any without an order.
      tf.errors.InvalidArgumentError: in `dimflows.adaptation()`, for data that is not inside the bounds.

    #### Example

    >>> standardize = dfb.Standardize(2, bounds=[None, (0.0, None)])
    >>> with dimflows.adaptation():
    ...     standardize.inverse(tf.constant([[1.0, 1.0], [5.0, 100.0]])).numpy().round(3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    """

    def __init__(
        self,
        channels: int,
        bounds: Sequence[Sequence[float | None] | None] | None = None,
        dtype: tf.DType = tf.float32,
        name: str = "standardize",
    ):
        parameters = dict(locals())
        pairs = [(None, None)] * channels if bounds is None else [_pair(bounds, pair, channels) for pair in bounds]
        if len(pairs) != channels:
            raise ValueError(
                f"Standardize: got bounds={bounds!r}, needs None or a pair of numbers for each of {channels} columns"
            )
        self._bounds = f"bounds={bounds!r}"
        self._mean = tf.Variable(tf.zeros([channels], dtype), trainable=False, name="mean")
        self._log_scale = tf.Variable(tf.zeros([channels], dtype), trainable=False, name="log_scale")
        self._is_bounded = np.array([[end is not None for end in pair] for pair in pairs]).T
        self._ends = np.array([[0.0 if end is None else end for end in pair] for pair in pairs], np.float64).T
        super().__init__(
            forward_min_event_ndims=1,
            is_constant_jacobian=not self._is_bounded.any(),
            parameters=parameters,
            name=name,
        )

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        self._check(y)
        has_low, has_high = self._is_bounded
        low, high = tf.unstack(tf.cast(self._ends, y.dtype))
        above, below = tf.where(has_low, y - low, tf.ones_like(y)), tf.where(has_high, high - y, tf.ones_like(y))
        u = tf.where(has_low | has_high, tf.math.log(above) - tf.math.log(below), y)
        if adapting():
            u = tf.debugging.assert_all_finite(u, f"{self.name}: got data that is not finite, or not inside {self._bounds}")
            mean, log_scale = _moments(u, self._mean.shape)
            self._mean.assign(tf.cast(mean, self._mean.dtype))
            self._log_scale.assign(tf.cast(log_scale, self._mean.dtype))
        mean, log_scale = self._parameters_as(y.dtype)
        x = (u - tf.cast(mean, y.dtype)) * tf.cast(tf.exp(-log_scale), y.dtype)
        return x, self._log_slope(tf.cast(u, log_scale.dtype)) - log_scale

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        self._check(x)
        has_low, has_high = self._is_bounded
        low, high = tf.unstack(tf.cast(self._ends, x.dtype))
        mean, log_scale = self._parameters_as(x.dtype)
        u = x * tf.cast(tf.exp(log_scale), x.dtype) + tf.cast(mean, x.dtype)
        y = tf.where(has_low & ~has_high, low + tf.exp(tf.where(has_low & ~has_high, u, 0.0)), u)
        y = tf.where(has_high & ~has_low, high - tf.exp(tf.where(has_high & ~has_low, -u, 0.0)), y)
        y = tf.where(has_low & has_high, low + (high - low) * tf.sigmoid(u), y)
        return y, log_scale - self._log_slope(tf.cast(u, log_scale.dtype))

    def _log_slope(self, u: tf.Tensor) -> tf.Tensor:
        """The logarithm of |du/dy|."""
        has_low, has_high = self._is_bounded
        low, high = self._ends
        span = tf.constant(np.log(np.where(has_low & has_high, high - low, 1.0)), u.dtype)
        of_both = tf.math.softplus(u) + tf.math.softplus(-u) - span
        of_one = (tf.cast(has_high, u.dtype) - tf.cast(has_low, u.dtype)) * u
        return tf.where(has_low & has_high, of_both, of_one)

    def _parameters_as(self, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
        dtype = log_det_dtype(dtype)
        return tf.cast(self._mean, dtype), tf.cast(self._log_scale, dtype)

    def _check(self, value: tf.Tensor) -> None:
        if value.shape[-1:] != self._mean.shape:
            raise ValueError(f"{self.name}: got {value.shape[-1]} columns, has parameters for {self._mean.shape[0]}")


def _pair(bounds: Any, pair: Any, channels: int) -> tuple[float | None, float | None]:
    """Two ends of an interval, of which None means that there is none."""
    ends = (None, None) if pair is None else tuple(pair) if isinstance(pair, Sequence | np.ndarray) else ()
    if len(ends) != 2 or not all(end is None or np.isfinite(end) for end in ends):
        raise ValueError(f"Standardize: got bounds={bounds!r}, needs None or a pair of numbers for each of {channels} columns")
    low, high = ends
    if low is not None and high is not None and not low < high:
        raise ValueError(f"Standardize: got the bounds {low!r} and {high!r}, needs the lower one first")
    return low, high


def _moments(value: tf.Tensor, shape: tf.TensorShape) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and log of the standard deviation over all but the last axes, which have this shape."""
    value = tf.cast(value, log_det_dtype(value.dtype))
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
