"""Bijectors that only move dimensions: `Squeeze`, and constant permutations."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfp_dimflows.bijectors import base
from tfp_dimflows.bijectors.log_dets import log_det_dtype
from tfp_dimflows.upstream import prefer_static as ps

ORDERS = ("channel_major", "position_major")


class Squeeze(base.FlowBijector):
    """Trades space for channels: data `[H, W, C]` to latent `[H/f, W/f, f*f*C]`, f = `factor`.

    The latent channel that holds channel c of the pixel at (fy, fx) inside its f x f block is

    * `"channel_major"`: `c * f*f + fy * f + fx` (RealNVP, Glow),
    * `"position_major"`: `(fy * f + fx) * C + c` (`tf.nn.space_to_depth`).

    `inverse` squeezes (data to latent), `forward` restores the image. The log-det is zero; per-dimension numbers move with
    their dimensions. Cost: one transposition.

    Args:
      factor: side of the block.
      order: `"channel_major"` or `"position_major"`.
      name: the name of the operations.

    Raises:
      ValueError: for an unknown order, or when a size is not divisible.

    #### Example

    >>> dfb.Squeeze().inverse(tf.reshape(tf.range(4.0), [2, 2, 1])).numpy()
    array([[[0., 1., 2., 3.]]], dtype=float32)
    """

    def __init__(self, factor: int = 2, order: str = "channel_major", name: str = "squeeze"):
        parameters = dict(locals())
        if order not in ORDERS:
            raise ValueError(f"Squeeze: got order={order!r}, needs one of {ORDERS}")
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"Squeeze: got factor={factor!r}, needs a positive integer")
        self._factor = factor
        self._order = order
        super().__init__(forward_min_event_ndims=3, is_constant_jacobian=True, parameters=parameters, name=name)

    @property
    def _is_permutation(self) -> bool:
        return True

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return self._transport_inverse(y), tf.zeros([], log_det_dtype(y.dtype))

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return self._transport_forward(x), tf.zeros([], log_det_dtype(x.dtype))

    def _transport_inverse(self, y: tf.Tensor) -> tf.Tensor:
        f = self._factor
        shape = ps.shape(y)
        height, width, channels = self._checked(y.shape[-3:], ("height", "width"))
        batch = shape[:-3]
        y = tf.reshape(y, ps.concat([batch, [height // f, f, width // f, f, channels]], axis=0))
        y = _transpose_event(y, [0, 2, 4, 1, 3] if self._order == "channel_major" else [0, 2, 1, 3, 4])
        return tf.reshape(y, ps.concat([batch, [height // f, width // f, f * f * channels]], axis=0))

    def _transport_forward(self, x: tf.Tensor) -> tf.Tensor:
        f = self._factor
        shape = ps.shape(x)
        height, width, channels = self._checked(x.shape[-3:], ())
        batch = shape[:-3]
        channels //= f * f
        if self._order == "channel_major":
            x = tf.reshape(x, ps.concat([batch, [height, width, channels, f, f]], axis=0))
            x = _transpose_event(x, [0, 3, 1, 4, 2])
        else:
            x = tf.reshape(x, ps.concat([batch, [height, width, f, f, channels]], axis=0))
            x = _transpose_event(x, [0, 2, 1, 3, 4])
        return tf.reshape(x, ps.concat([batch, [height * f, width * f, channels]], axis=0))

    def _checked(self, event_shape: tf.TensorShape, divisible: tuple[str, ...]) -> tuple[int, int, int]:
        if event_shape.rank != 3 or not event_shape.is_fully_defined():
            raise ValueError(f"Squeeze: got an event of shape {event_shape}, needs a static [height, width, channels]")
        height, width, channels = event_shape
        for side, size in zip(("height", "width"), (height, width)):
            if side in divisible and size % self._factor:
                raise ValueError(f"Squeeze: {side} {size} is not divisible by factor {self._factor}")
        if not divisible and channels % self._factor**2:
            raise ValueError(f"Squeeze: {channels} channels are not divisible by factor**2 = {self._factor**2}")
        return height, width, channels

    def _inverse_event_shape(self, shape: tf.TensorShape) -> tf.TensorShape:
        height, width, channels = self._checked(tf.TensorShape(shape[-3:]), ("height", "width"))
        f = self._factor
        return tf.TensorShape([height // f, width // f, channels * f * f])

    def _forward_event_shape(self, shape: tf.TensorShape) -> tf.TensorShape:
        height, width, channels = self._checked(tf.TensorShape(shape[-3:]), ())
        f = self._factor
        return tf.TensorShape([height * f, width * f, channels // f**2])

    def _inverse_event_shape_tensor(self, shape: tf.Tensor) -> tf.Tensor:
        f = self._factor
        return shape // [f, f, 1] * [1, 1, f * f]

    def _forward_event_shape_tensor(self, shape: tf.Tensor) -> tf.Tensor:
        f = self._factor
        return shape * [f, f, 1] // [1, 1, f * f]


def _transpose_event(x: tf.Tensor, order: Sequence[int]) -> tf.Tensor:
    batch_rank = x.shape.rank - len(order)
    return tf.transpose(x, [*range(batch_rank), *(batch_rank + i for i in order)])


def flatten(value: tf.Tensor, event_ndims: int) -> tf.Tensor:
    """Events of a static shape as vectors."""
    if event_ndims == 1:
        return value
    size = value.shape[value.shape.rank - event_ndims :].num_elements()
    return tf.reshape(value, ps.concat([ps.shape(value)[: value.shape.rank - event_ndims], [size]], axis=0))


def unflatten(value: tf.Tensor, event_shape: Sequence[int]) -> tf.Tensor:
    """Vectors as events of a shape."""
    if len(event_shape) == 1:
        return value
    return tf.reshape(value, ps.concat([ps.shape(value)[:-1], event_shape], axis=0))


def permute_last(x: tf.Tensor, permutation: np.ndarray | tf.Tensor) -> tf.Tensor:
    """`x[..., permutation]` for a permutation of the last axis.

    The gradient gathers with the inverse permutation, where TensorFlow's own would scatter.
    """
    return _gather(x, permutation, inverse_permutation(permutation))


def inverse_permutation(permutation: np.ndarray | tf.Tensor) -> np.ndarray | tf.Tensor:
    """The inverse, a constant of a constant one."""
    if isinstance(permutation, np.ndarray):
        return np.argsort(permutation)
    return tf.argsort(permutation)


def _gather(x: tf.Tensor, permutation: np.ndarray | tf.Tensor, inverse: np.ndarray | tf.Tensor) -> tf.Tensor:
    @tf.custom_gradient
    def gather(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        # Rows are copied faster than single entries, transpositions included.
        shape = ps.shape(x)
        rows = tf.gather(tf.transpose(tf.reshape(x, [-1, shape[-1]])), permutation)
        return tf.reshape(tf.transpose(rows), shape), lambda dy: _gather(dy, inverse, permutation)

    return gather(x)
