"""Invertible 1x1 convolution."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from tfp_dimflows.bijectors import base, dense
from tfp_dimflows.bijectors.log_dets import log_det_dtype, sum_event

ATTRIBUTIONS = ("polar", "svd_sorted", "lu", "uniform")


class InvertibleConv1x1(base.FlowBijector):
    r"""The same invertible linear map W of the channels at every pixel, in PLU form (Glow).

        inverse (data to latent):  x = W y,    forward:  y = W^-1 x
        W = P L (U + diag(sign * exp(log_s)))

    with a fixed permutation P and fixed signs, a unit lower triangular L, a strictly upper triangular U and log_s trained, all
    from the decomposition of a random orthogonal matrix, or of one that is given. Inverse log-det per pixel: sum(log_s), in
    O(C).

    The map is dense, so how the log-det is shared among the channels is a convention, `attribution`. With J the Jacobian of the
    direction asked for and sigma its singular values, in the frame of the argument:

    * `"polar"`: the diagonal of `log(J^T J) / 2`: log sigma, shared out by the squared entries of the singular vectors,
    * `"svd_sorted"`: the i-th largest log sigma to channel i,
    * `"lu"`: plus or minus log_s,
    * `"uniform"`: the same for every channel.

    All sum to the same log-det. Cost per pixel O(C^2); `"polar"` and `"svd_sorted"` need one O(C^3) decomposition per call of
    the per-dimension hook, none for `log_prob`.

    Args:
      channels: number of channels C.
      attribution: one of the four conventions.
      seed: integer seed of the initial matrix.
      matrix: the initial matrix: `"random"`, an orthogonal one, or an invertible array `[C, C]`.
      dtype: dtype of the variables.
      name: the name of the operations.

    Raises:
      ValueError: for an unknown attribution, another or a singular matrix, or an event with another number of channels.

    References: Kingma, Dhariwal, "Glow", 2018.

    #### Example

    >>> conv = dfb.InvertibleConv1x1(3, seed=0)
    >>> image = tf.ones([4, 4, 3])
    >>> bool(tf.reduce_max(tf.abs(conv.forward(conv.inverse(image) * 1.0) - image)) < 1e-5)
    True
    """

    def __init__(
        self,
        channels: int,
        attribution: str = "polar",
        seed: int = 0,
        dtype: tf.DType = tf.float32,
        matrix: str | ArrayLike = "random",
        name: str = "invertible_conv1x1",
    ):
        parameters = dict(locals())
        if attribution not in ATTRIBUTIONS:
            raise ValueError(f"InvertibleConv1x1: got attribution={attribution!r}, needs one of {ATTRIBUTIONS}")
        with tf.init_scope():
            packed, order = (t.numpy() for t in tf.linalg.lu(_initial(matrix, channels, seed)))
        self._attribution = attribution
        self._channels = channels
        self._permutation = np.eye(channels)[np.argsort(order)]
        self._sign = np.sign(np.diag(packed))
        # C * C numbers: below the diagonal those of L, above it those of U, on it log_s.
        np.fill_diagonal(packed, np.log(np.abs(np.diag(packed))))
        self._packed = tf.Variable(packed, dtype=dtype, name="lower_log_scale_upper")
        super().__init__(forward_min_event_ndims=1, is_constant_jacobian=True, parameters=parameters, name=name)

    def _factors(self, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """P, L and U (with its diagonal) of W = P L U."""
        packed, eye = tf.cast(self._packed, dtype), np.eye(self._channels)
        below = np.tri(self._channels, k=-1)
        lower = packed * tf.constant(below, dtype) + tf.constant(eye, dtype)
        diagonal = tf.constant(eye, dtype) * (tf.cast(self._sign, dtype) * tf.exp(self._log_scale(dtype)))
        upper = packed * tf.constant(1.0 - eye - below, dtype) + diagonal
        return tf.cast(self._permutation, dtype), lower, upper

    def _log_scale(self, dtype: tf.DType) -> tf.Tensor:
        # Unlike tf.linalg.diag_part's, this gradient exists for one channel inside a tf.function.
        eye = tf.constant(np.eye(self._channels), self._packed.dtype)
        return tf.cast(tf.reduce_sum(self._packed * eye, axis=-1), dtype)

    def _matrix(self, dtype: tf.DType) -> tf.Tensor:
        permutation, lower, upper = self._factors(dtype)
        return permutation @ lower @ upper

    def _inverse_matrix(self, dtype: tf.DType) -> tf.Tensor:
        permutation, lower, upper = self._factors(tf.float64)
        inverse = tf.linalg.triangular_solve(lower, tf.transpose(permutation))
        return tf.cast(tf.linalg.triangular_solve(upper, inverse, lower=False), dtype)

    def _inverse_and_log_det(self, y: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        return self._apply(self._matrix, y), self._total(y, event_ndims)

    def _forward_and_log_det(self, x: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        return self._apply(self._inverse_matrix, x), -self._total(x, event_ndims)

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        dtype = log_det_dtype(y.dtype)
        return self._apply(self._matrix, y), self._attribute(self._matrix(dtype), 1.0)

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        dtype = log_det_dtype(x.dtype)
        return self._apply(self._inverse_matrix, x), self._attribute(self._inverse_matrix(dtype), -1.0)

    def _apply(self, matrix: Callable[[tf.DType], tf.Tensor], value: tf.Tensor) -> tf.Tensor:
        if value.shape[-1] != self._channels:
            raise ValueError(f"{self.name}: got {value.shape[-1]} channels, is for {self._channels}")
        result = tf.tensordot(value, matrix(value.dtype), [[-1], [1]])
        result.set_shape(value.shape)
        return result

    def _total(self, value: tf.Tensor, event_ndims: int) -> tf.Tensor:
        log_scale = self._log_scale(log_det_dtype(value.dtype))
        return sum_event(tf.reduce_mean(log_scale), value, event_ndims)

    def _attribute(self, jacobian: tf.Tensor, direction_sign: float) -> tf.Tensor:
        log_scale = direction_sign * self._log_scale(jacobian.dtype)
        if self._attribution == "polar":
            return dense.polar(jacobian)
        if self._attribution == "svd_sorted":
            return tf.math.log(tf.linalg.svd(jacobian, compute_uv=False))
        if self._attribution == "lu":
            return log_scale if direction_sign > 0 else tf.linalg.matvec(tf.cast(self._permutation, jacobian.dtype), log_scale)
        return tf.fill(tf.shape(log_scale), tf.reduce_mean(log_scale))


def _initial(matrix: str | ArrayLike, channels: int, seed: int) -> np.ndarray:
    if isinstance(matrix, str) and matrix == "random":
        return np.linalg.qr(np.random.default_rng(seed).normal(size=[channels, channels]))[0]
    given = np.asarray(np.nan if isinstance(matrix, str) else matrix, np.float64)
    if given.shape != (channels, channels) or not np.linalg.matrix_rank(given) == channels:
        raise ValueError(
            f'InvertibleConv1x1: got matrix={matrix!r}, needs "random" or an invertible array [{channels}, {channels}]'
        )
    return given
