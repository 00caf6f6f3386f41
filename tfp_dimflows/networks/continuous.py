"""`ConcatSquashNet`: the time-dependent network of continuous flows."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tfp_dimflows.networks.base import Conditioner, seed_stream


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class ConcatSquashNet(Conditioner):
    """Velocity field f(y, t) of a continuous flow, whose layers are gated and shifted by the time.

        layer: h -> (W h + b) sigmoid(g(t)) + c(t),   g affine and c linear in t

    with an activation between the layers. W is a matrix for vectors, a 3x3 convolution for images.

    Called as `net(y, condition)`: `y` is `[N] + event`, `condition` the times `[N, 1]`; the result has the shape of `y`.

    Args:
      event_shape: `[D]` or `[H, W, C]`.
      hidden: widths of the hidden layers.
      activation: name of a smooth Keras activation.
      seed: integer for reproducible initial weights.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    References: Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD", 2019.

    #### Example

    >>> net = dimflows.networks.ConcatSquashNet([3], hidden=[8])
    >>> net(tf.ones([2, 3]), condition=tf.ones([2, 1])).shape
    TensorShape([2, 3])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        hidden: Sequence[int] = (64, 64, 64),
        activation: str = "tanh",
        seed: int | None = None,
        **kwargs: Any,
    ):
        channels = event_shape[-1]
        super().__init__(channels, channels, condition_channels=1, seed=seed, **kwargs)
        self.event_shape, self.hidden = tuple(event_shape), tuple(hidden)
        self.activation = keras.activations.get(activation)
        initializers = (keras.initializers.GlorotUniform(seed=s) for s in seed_stream(seed))
        options = {"dtype": self.dtype_policy}
        self.linear, self.gates, self.shifts = [], [], []
        for inputs, outputs in zip((channels, *hidden), (*hidden, channels)):
            initializer = next(initializers)
            if len(self.event_shape) == 1:
                linear = keras.layers.Dense(outputs, kernel_initializer=initializer, **options)
            else:
                linear = keras.layers.Conv2D(outputs, 3, padding="same", kernel_initializer=initializer, **options)
            linear.build((None, *self.event_shape[:-1], inputs))
            gate, shift = (
                keras.layers.Dense(outputs, use_bias=bias, kernel_initializer=next(initializers), **options)
                for bias in (True, False)
            )
            gate.build((None, 1))
            shift.build((None, 1))
            self.linear.append(linear)
            self.gates.append(gate)
            self.shifts.append(shift)
        self.built = True

    def call(self, y: tf.Tensor, condition: tf.Tensor | None = None) -> tf.Tensor:
        """The velocity at `y` and the times `condition`."""
        broadcast = (-1, *[1] * (len(self.event_shape) - 1))
        h = y
        for k, (linear, gate, shift) in enumerate(zip(self.linear, self.gates, self.shifts)):
            h = self.activation(h) if k else h
            gates, shifts = (ops.reshape(layer(condition), (*broadcast, layer.units)) for layer in (gate, shift))
            h = linear(h) * ops.sigmoid(gates) + shifts
        return h

    def get_config(self) -> dict:
        """The constructor's arguments."""
        config = super().get_config()
        del config["condition_channels"]  # always 1: the time
        return config
