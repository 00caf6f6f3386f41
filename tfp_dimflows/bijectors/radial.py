"""Radial flows."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorflow.types.experimental import TensorLike

from tfp_dimflows.bijectors.parametric import Parametric, positive


class Radial(Parametric):
    r"""Radial flow: pulls space towards one point, or pushes it away.

        forward:  y = x + beta (x - c) / (alpha + r),   r = |x - c|
        log |det dy/dx| = (D - 1) log A + log B,   A = 1 + beta / (alpha + r),   B = 1 + alpha beta / (alpha + r)^2
        that of dimension i:  log A + n_i^2 (log B - log A),   n = (x - c) / r
        inverse:  x = c + (y - c) / A,   where r solves r^2 + (alpha + beta - rho) r - alpha rho = 0 with rho = |y - c|

    with alpha = softplus(a) > 0 and beta = softplus(b) - alpha > -alpha, so that it is invertible for any a, b and c, and the
    identity where a = b. Both softplus are kept above 1e-6. Both directions are formulas. Cost: O(D).

    Parameters are trainable, or a tensor with batch axes, or predicted from a condition:
    `dfb.ConditionalTransform(network, functools.partial(dfb.Radial, dims), event_ndims=1)`, where the network has
    `dfb.Radial.num_params(dims)` outputs.

    Args:
      dims: number D of dimensions.
      params: c, a and b, `[..., D + 2]`, a tensor or variable whose other axes broadcast to the batch; None: trainable ones,
        of a flow that starts as the identity.
      seed: integer seed of the initial values of trainable parameters; None: one from NumPy's global generator.
      dtype: dtype of trainable parameters.
      name: the name of the operations.

    Raises:
      ValueError: if `params` or a value has another last axis.

    References: Rezende, Mohamed, "Variational inference with normalizing flows", 2015.

    #### Example

    >>> radial = dfb.Radial(2, params=[0.0, 0.0, 1.0, 3.0])
    >>> y = radial.forward([[1.0, 5.0]])
    >>> radial.inverse(tf.identity(y)).numpy().round(3)
    array([[1., 5.]], dtype=float32)
    """

    def __init__(
        self,
        dims: int,
        params: TensorLike | None = None,
        seed: int | None = None,
        dtype: tf.DType = tf.float32,
        name: str = "radial",
    ):
        parameters = dict(locals())
        self._parts = [(dims,), (), ()]
        super().__init__(dims, params, lambda generator: (generator.normal(size=dims), 0.0, 0.0), seed, dtype, parameters, name)

    @staticmethod
    def num_params(dims: int) -> int:
        """The size of `params`' last axis."""
        return dims + 2

    def _forward_pass(self, x: tf.Tensor, parts: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, Callable]:
        center, alpha, sum_ = _constrained(*parts)
        offset = x - center
        r = _norm(offset)
        a = (r + sum_) / (alpha + r)
        return center + a * offset, *self._log_dets(offset, r, alpha, sum_)

    def _inverse_pass(self, y: tf.Tensor, parts: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, Callable]:
        center, alpha, sum_ = _constrained(*parts)
        offset = y - center
        rho = _norm(offset)
        # The positive root of r^2 + q r - alpha rho, in the form that does not cancel.
        q = sum_ - rho
        root = tf.sqrt(tf.square(q) + 4.0 * alpha * rho)
        positive = q > 0.0
        r = tf.where(positive, 2.0 * alpha * rho / (tf.abs(q) + root), 0.5 * (root - q))
        offset *= (alpha + r) / (r + sum_)
        return center + offset, *self._log_dets(offset, r, alpha, sum_)

    def _log_dets(self, offset: tf.Tensor, r: tf.Tensor, alpha: tf.Tensor, sum_: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        """The forward log-det, and a function that returns that of every dimension."""
        # alpha beta = alpha (sum - alpha): B's numerator is a sum of positive numbers.
        log_a = tf.math.log(r + sum_) - tf.math.log(alpha + r)
        log_b = tf.math.log(r * (r + 2.0 * alpha) + alpha * sum_) - 2.0 * tf.math.log(alpha + r)

        def per_dim() -> tf.Tensor:
            tiny = np.finfo(r.dtype.as_numpy_dtype).tiny
            return log_a + tf.square(offset / tf.maximum(r, tiny**0.5)) * (log_b - log_a)

        return ((self._dims - 1.0) * log_a + log_b)[..., 0], per_dim


def _constrained(center: tf.Tensor, a: tf.Tensor, b: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """c, alpha and alpha + beta, the latter two with an axis for the dimensions."""
    return center, positive(a)[..., tf.newaxis], positive(b)[..., tf.newaxis]


def _norm(offset: tf.Tensor) -> tf.Tensor:
    """The norm, with an axis for the dimensions; its gradient at zero is zero."""
    square = tf.reduce_sum(tf.square(offset), axis=-1, keepdims=True)
    positive = square > 0.0
    return tf.where(positive, tf.sqrt(tf.where(positive, square, 1.0)), 0.0)
