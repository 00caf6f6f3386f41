"""`MLP`: the fully connected conditioner."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfp_dimflows.networks.base import Conditioner, seed_stream


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class MLP(Conditioner):
    """Fully connected network for vectors.

    With `h_0 = [x, condition]`:

        h_k = activation(W_k h_{k-1} + b_k),  k = 1 .. K
        y   = W_{K+1} h_K + b_{K+1}

    Called as `mlp(x, condition)`: `x` is `[N, inputs]`, `condition` is `[N, condition_channels]` or None, the result is
    `[N, outputs]`. Cost: O(N sum_k width_{k-1} width_k).

    Args:
      inputs: number of features of `x`.
      outputs: number of features of the result.
      hidden: widths of the hidden layers, any number of them.
      activation: name of a Keras activation, or a function.
      condition_channels: number of features of the condition; 0: the network takes none.
      zero_init: whether the last layer starts at zero, and with it the result, so that a flow starts as the identity.
      seed: integer for reproducible initial weights.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: when called with an input or a condition of other sizes, or with a condition where it takes none, or
        with none where it needs one.

    The conditioner of NICE (Dinh, Krueger, Bengio 2015, arXiv:1410.8516).

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import MLP
    >>> mlp = MLP(inputs=2, outputs=6, hidden=(16, 16), condition_channels=3)
    >>> mlp(tf.ones([5, 2]), condition=tf.ones([5, 3])).shape
    TensorShape([5, 6])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str | Callable = "relu",
        condition_channels: int = 0,
        zero_init: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(inputs, outputs, condition_channels=condition_channels, seed=seed, **kwargs)
        self.hidden = tuple(hidden)
        self.activation = keras.activations.get(activation)
        self.zero_init = zero_init
        self.input_spec = keras.layers.InputSpec(ndim=2, axes={-1: inputs})
        initializers = (keras.initializers.GlorotUniform(seed=s) for s in seed_stream(seed))
        options = {"dtype": self.dtype_policy}
        self.dense = [
            keras.layers.Dense(width, activation=self.activation, kernel_initializer=next(initializers), **options)
            for width in self.hidden
        ]
        last = "zeros" if zero_init else next(initializers)
        self.dense.append(keras.layers.Dense(outputs, kernel_initializer=last, **options))
        for layer, width in zip(self.dense, (inputs + condition_channels, *self.hidden)):
            layer.build((None, width))
        self.built = True

    def call(self, x: tf.Tensor, condition: tf.Tensor | None = None) -> tf.Tensor:
        """The parameters `[N, outputs]` for `x` and `condition`."""
        h = self._with_condition(x, condition)
        for layer in self.dense:
            h = layer(h)
        return h
