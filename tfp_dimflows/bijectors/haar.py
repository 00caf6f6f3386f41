"""`HaarSplit`: pairs of neighbours as their average and half their difference."""

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfp_dimflows.bijectors import base
from tfp_dimflows.bijectors.log_dets import log_det_dtype
from tfp_dimflows.bijectors.walk import Parts
from tfp_dimflows.upstream import prefer_static as ps


class HaarSplit(base.FlowBijector):
    """Haar transform along one axis: from data to latent, averages S and half differences Delta of neighbouring pairs.

        inverse (data to latent):  x = [S, Delta],  S_i = (y_2i + y_2i+1) / 2,  Delta_i = (y_2i - y_2i+1) / 2
        forward:                   y_2i = S_i + Delta_i,   y_2i+1 = S_i - Delta_i
        inverse log-det: -ln 2 per pair, -ln(2) / 2 for each of its two dimensions

    S and Delta are the first and second half of the latent value along the axis. With `orthonormal=True` the divisor is
    sqrt(2) in both directions and the log-det is 0. Per-dimension numbers of S_i move with y_2i, those of Delta_i with y_2i+1.
    Cost: O(D), no copy but the result.

    Args:
      axis: the axis of the pairs, negative, counted from the end: -3 is the height and -2 the width of images
        `[..., H, W, C]`, -1 the only axis of signals `[..., D]`.
      orthonormal: whether the transform is the orthonormal one.
      name: the name of the operations.

    Raises:
      ValueError: unless the axis is a negative integer; when the size along it is odd.

    References: Haar, "Zur Theorie der orthogonalen Funktionensysteme", 1910; "PNF: Progressive normalizing flows" (the
    form with averages).

    #### Example

    >>> haar = dfb.HaarSplit(axis=-1)
    >>> haar.inverse([5.0, 3.0, 2.0, 8.0]).numpy()
    array([ 4.,  5.,  1., -3.], dtype=float32)
    >>> haar.inverse_log_det_per_dim([5.0, 3.0]).numpy().round(4)
    array([-0.3466, -0.3466], dtype=float32)
    """

    def __init__(self, axis: int, orthonormal: bool = False, name: str = "haar_split"):
        parameters = dict(locals())
        if not isinstance(axis, int) or axis >= 0:
            raise ValueError(f"HaarSplit: got axis={axis!r}, needs a negative integer, counted from the end")
        self._axis = axis
        self._orthonormal = orthonormal
        super().__init__(forward_min_event_ndims=-axis, is_constant_jacobian=True, parameters=parameters, name=name)

    @property
    def axis(self) -> int:
        """The axis of the pairs."""
        return self._axis

    @property
    def log_det_per_dim(self) -> float:
        """The inverse log-det of every dimension: -ln(2) / 2, or 0 if orthonormal."""
        return 0.0 if self._orthonormal else -0.5 * math.log(2.0)

    @property
    def parts(self) -> Parts:
        """How a value falls into averages and half differences, and how they are put together again."""
        return Parts(self.split, self.merge, self.deinterleave, self.interleave, self.log_det_per_dim)

    def part_shapes(self, event_shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of S and Delta of events of a shape, which are the same.

        Raises:
          ValueError: if the size along the axis is odd.
        """
        shape = list(event_shape)
        shape[self._axis] = self._num_pairs(tf.TensorShape(shape))
        return tuple(shape), tuple(shape)

    def split(self, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The averages S and half differences Delta of `y`, each half its size along the axis."""
        first, second = self.deinterleave(y)
        scale = math.sqrt(0.5) if self._orthonormal else 0.5
        return scale * (first + second), scale * (first - second)

    def merge(self, average: tf.Tensor, difference: tf.Tensor) -> tf.Tensor:
        """What `split` took apart."""
        y = self.interleave(average + difference, average - difference)
        return math.sqrt(0.5) * y if self._orthonormal else y

    def deinterleave(self, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The first and the second elements of all pairs along the axis."""
        num_pairs = self._num_pairs(y.shape)
        shape = ps.shape(y)
        place = y.shape.rank + self._axis
        pairs = tf.reshape(y, ps.concat([shape[:place], [num_pairs, 2], shape[place + 1 :]], axis=0))
        return tuple(tf.unstack(pairs, axis=place + 1))

    def interleave(self, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
        """What `deinterleave` took apart."""
        shape = ps.shape(first)
        place = first.shape.rank + self._axis
        pairs = tf.stack([first, second], axis=place + 1)
        return tf.reshape(pairs, ps.concat([shape[:place], [2 * first.shape[place]], shape[place + 1 :]], axis=0))

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.concat(self.split(y), axis=self._axis), self._constant(y)

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return self.merge(*self._halves(x)), -self._constant(x)

    def _constant(self, value: tf.Tensor) -> tf.Tensor:
        return tf.constant(self.log_det_per_dim, log_det_dtype(value.dtype))

    def _halves(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.split(x, [self._num_pairs(x.shape)] * 2, axis=self._axis)

    def _num_pairs(self, shape: tf.TensorShape) -> int:
        size = shape[self._axis] if shape.rank >= -self._axis else None
        if size is None or size % 2:
            raise ValueError(f"{self.name}: got shape {shape}, needs an even size along axis {self._axis}")
        return size // 2

    def _transport_inverse(self, per_dim: tf.Tensor) -> tf.Tensor:
        return tf.concat(self.deinterleave(per_dim), axis=self._axis)

    def _transport_forward(self, per_dim: tf.Tensor) -> tf.Tensor:
        return self.interleave(*self._halves(per_dim))
