"""Planar flows."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorflow.types.experimental import TensorLike

from tfp_dimflows.bijectors import implicit
from tfp_dimflows.bijectors.parametric import Parametric, log_tanh_sum_slope, positive, tanh_slope


class Planar(Parametric):
    r"""Planar flow: a shift along one direction that depends on the position across one hyperplane.

        forward:  y = x + u' h,   h = tanh(w^T x + b),   u' = u + (m - w^T u) w / (w^T w)
        where     m = softplus(w^T u) - 1 > -1, so that w^T u' = m
        log |det dy/dx| = log(1 + m (1 - h^2)),   that of dimension i: u'_i w_i / m of it
        inverse:  x = y - u' tanh(p),   p + m tanh(p) = w^T y + b

    It is invertible for any w, u and b, and the identity where w^T u = log(e - 1) and u is parallel to w. The scalar p is found
    by bisection, in a fixed number of steps down to float precision, with implicit derivatives (first derivatives only). 1 + m
    is kept above 1e-6. At w = 0, where u' is not continuous, this is the shift by u tanh(b); a network that predicts parameters
    should not start there. Cost: O(D) in both directions.

    Parameters are trainable, or a tensor with batch axes, or predicted from a condition:
    `dfb.ConditionalTransform(network, functools.partial(dfb.Planar, dims), event_ndims=1)`, where the network has
    `dfb.Planar.num_params(dims)` outputs.

    Args:
      dims: number D of dimensions.
      params: w, u and b, `[..., 2 D + 1]`, a tensor or variable whose other axes broadcast to the batch; None: trainable ones.
      seed: integer seed of the initial values of trainable parameters; None: one from NumPy's global generator.
      dtype: dtype of trainable parameters.
      name: the name of the operations.

    Raises:
      ValueError: if `params` or a value has another last axis.

    References: Rezende, Mohamed, "Variational inference with normalizing flows", 2015; its appendix
    has the constraint on m.

    #### Example

    >>> planar = dfb.Planar(2, params=[1.0, 0.0, 3.0, 0.0, 0.0])
    >>> y = planar.forward([[1.0, 5.0]])
    >>> planar.inverse(tf.identity(y)).numpy().round(3)
    array([[1., 5.]], dtype=float32)
    """

    def __init__(
        self,
        dims: int,
        params: TensorLike | None = None,
        seed: int | None = None,
        dtype: tf.DType = tf.float32,
        name: str = "planar",
    ):
        parameters = dict(locals())
        self._parts = [(dims,), (dims,), ()]

        def initial(generator: np.random.Generator) -> tuple:
            w = generator.uniform(-1.0, 1.0, dims) * np.sqrt(2.0 / dims)
            return w, generator.uniform(-1.0, 1.0, dims) * np.sqrt(2.0), 0.0

        super().__init__(dims, params, initial, seed, dtype, parameters, name)

    @staticmethod
    def num_params(dims: int) -> int:
        """The size of `params`' last axis."""
        return 2 * dims + 1

    def _forward_pass(self, x: tf.Tensor, parts: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, Callable]:
        w, u, m, slope_at_0 = _constrained(*parts[:2])
        p = tf.reduce_sum(w * x, axis=-1) + parts[2]
        return x + u * tf.tanh(p)[..., tf.newaxis], *_log_dets(p, w, u, m, slope_at_0)

    def _inverse_pass(self, y: tf.Tensor, parts: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, Callable]:
        w, u, m, slope_at_0 = _constrained(*parts[:2])
        target = tf.reduce_sum(w * y, axis=-1) + parts[2]

        def function(p: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return p + m * tf.tanh(p), log_tanh_sum_slope(p, slope_at_0)

        p = implicit.increasing_root(function, target, target - tf.abs(m), target + tf.abs(m))
        return y - u * tf.tanh(p)[..., tf.newaxis], *_log_dets(p, w, u, m, slope_at_0)


def _constrained(w: tf.Tensor, u: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """w, u', m = w^T u' and 1 + m."""
    product, square = _dot(w, u), _dot(w, w)
    slope_at_0 = tf.where(square > 0.0, positive(product), 1.0)
    m = slope_at_0 - 1.0
    along_w = w / tf.where(square > 0.0, square, 1.0)[..., tf.newaxis]
    for _ in range(2):  # twice, since after a cancellation the rest is not orthogonal to w
        u -= _dot(w, u)[..., tf.newaxis] * along_w
    return w, u + m[..., tf.newaxis] * along_w, m, slope_at_0


def _dot(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(a * b, axis=-1)


def _log_dets(p: tf.Tensor, w: tf.Tensor, u: tf.Tensor, m: tf.Tensor, slope_at_0: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """The forward log-det, and a function that returns that of every dimension."""

    def per_dim() -> tf.Tensor:
        return w * u * (tanh_slope(p) * _log1p_quotient(m * tanh_slope(p), log_det))[..., tf.newaxis]

    log_det = log_tanh_sum_slope(p, slope_at_0)
    return log_det, per_dim


def _log1p_quotient(c: tf.Tensor, log1p: tf.Tensor) -> tf.Tensor:
    """log(1 + c) / c, near 0 its series 1 - c / 2 + c^2 / 3 - ..."""
    close = tf.abs(c) < 1e-2
    series = tf.zeros_like(c)
    for k in range(9, 0, -1):
        series = 1.0 / k - c * series
    return tf.where(close, series, log1p / tf.where(close, tf.ones_like(c), c))
