"""Solutions of equations, with the derivatives of implicit functions (first derivatives only)."""

from collections.abc import Callable

import tensorflow as tf

from tfp_dimflows.upstream import record


def bisect(function: Callable, target: tf.Tensor, low: tf.Tensor, high: tf.Tensor) -> tf.Tensor:
    """The x in [low, high] with function(x) = target, elementwise, for an increasing function; without derivatives.

    What is halved is the number of floating-point numbers in the bracket, so that as many steps as the numbers have bits leave
    two neighbours of any bracket.
    """
    bits = 8 * target.dtype.size
    integers = {16: tf.int16, 32: tf.int32, 64: tf.int64}[bits]

    def flip(k: tf.Tensor) -> tf.Tensor:  # the bits of negative numbers, read as integers, are in descending order
        return tf.where(k < 0, tf.bitwise.bitwise_xor(k, integers.max), k)

    def halve(low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        half_of_difference = tf.bitwise.right_shift(tf.bitwise.bitwise_xor(low, high), tf.ones_like(low))
        middle = tf.bitwise.bitwise_and(low, high) + half_of_difference  # (low + high) // 2 without overflow
        is_low = function(tf.bitcast(flip(middle), target.dtype)) < target
        return tf.where(is_low, middle, low), tf.where(is_low, high, middle)

    with record.stop_recording():
        bracket = tuple(flip(tf.bitcast(end, integers)) for end in (low, high))
        _, high = tf.while_loop(lambda *_: True, halve, bracket, maximum_iterations=bits)
        return tf.stop_gradient(tf.bitcast(flip(high), target.dtype))


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

    def vjp(w: tf.Tensor) -> tf.Tensor:
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
    def solution(value: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        return tf.identity(y) + tf.zeros_like(value), adjoint

    return solution(value)
