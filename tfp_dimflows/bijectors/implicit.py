"""Solutions of equations, with the derivatives of implicit functions (first derivatives only)."""

from collections.abc import Callable

import tensorflow as tf
from tensorflow.python.eager import record


def bisect(function: Callable, target: tf.Tensor, low: tf.Tensor, high: tf.Tensor) -> tf.Tensor:
    """The x in [low, high] with function(x) = target, elementwise, for an increasing function; without derivatives.

    The number of steps is fixed: the bracket shrinks by 2^40 for 32 bits, by 2^70 for 64 bits.
    """

    def halve(low, high):
        middle = 0.5 * (low + high)
        is_low = function(middle) < target
        return tf.where(is_low, middle, low), tf.where(is_low, high, middle)

    steps = 40 if target.dtype == tf.float32 else 70
    with record.stop_recording():
        low, high = tf.while_loop(lambda *_: True, halve, (low, high), maximum_iterations=steps)
        return tf.stop_gradient(0.5 * (low + high))


def increasing_root(function: Callable, target: tf.Tensor, low: tf.Tensor, high: tf.Tensor) -> tf.Tensor:
    """The x of `bisect`, with its derivatives with respect to the target and to what the function depends on.

    `function` returns its value and the logarithm of its slope.
    """
    x = bisect(lambda x: function(x)[0], target, low, high)
    value, log_slope = function(x)
    residual = target - value
    return x + (residual - tf.stop_gradient(residual)) * tf.exp(-tf.maximum(log_slope, -80.0))


def with_vjp(function: Callable, y: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """The value of a function, and its vector-Jacobian product, which can be differentiated."""
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(y)
        value = tf.cast(function(y), y.dtype)

    def vjp(w):
        return tape.gradient(value, y, output_gradients=w, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    return value, vjp


def with_adjoint(y: tf.Tensor, value: tf.Tensor, adjoint: Callable) -> tf.Tensor:
    """The fixed point y of y = f(y, ...), with derivatives: dy = (I - df/dy)^-1 df at fixed y.

    Args:
      y: the fixed point, without derivatives.
      value: f at it, with the derivatives at fixed y.
      adjoint: the map u -> w that solves w = u + w^T df/dy.
    """

    @tf.custom_gradient
    def solution(value):
        return tf.identity(y) + tf.zeros_like(value), adjoint

    return solution(value)
