"""`WaveNet`: the autoregressive conditioner of signals, of dilated causal convolutions."""

import itertools
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tfp_dimflows.networks.base import Conditioner, seed_stream
from tfp_dimflows.networks.masked import parameters_per_entry, tanh_gate


class DilatedBlock(keras.layers.Layer):
    """One layer of a `WaveNet`. Nothing follows on the last one but its skip connection, so it does not change `h`."""

    def __init__(
        self,
        width: int,
        kernel_size: int,
        dilation: int,
        *,
        last: bool,
        condition_channels: int,
        seed: int | None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        initializers = (keras.initializers.GlorotUniform(seed=s) for s in seed_stream(seed))
        options = {"dtype": self.dtype_policy}

        def project(inputs: int, outputs: int, use_bias: bool = True) -> keras.layers.Dense:
            layer = keras.layers.Dense(outputs, use_bias=use_bias, kernel_initializer=next(initializers), **options)
            layer.build((None, inputs))
            return layer

        self.conv = keras.layers.Conv1D(
            2 * width,
            kernel_size,
            dilation_rate=dilation,
            padding="causal",
            data_format="channels_last",
            kernel_initializer=next(initializers),
            **options,
        )
        self.conv.build((None, None, width))
        self.condition = project(condition_channels, 2 * width, use_bias=False) if condition_channels else None
        self.skip = project(width, width)
        self.residual = None if last else project(width, width)
        self.built = True

    def call(self, h: tf.Tensor, condition: tf.Tensor | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        """The next `h`, and the skip connection."""
        a = self.conv(h)
        if self.condition is not None:
            a = a + ops.expand_dims(self.condition(condition), 1)
        g = tanh_gate(a)
        return h if self.residual is None else h + self.residual(g), self.skip(g)


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class WaveNet(Conditioner):
    """WaveNet for signals: the parameters of an entry depend only on the entries before it.

    With `gate([a, b]) = tanh(a) sigmoid(b)` and 1x1 convolutions `E`, `C`, `R`, `S`, `U`, `V`:

        h_0 = E (x, one entry later)
        g_k = gate(conv_k(h_{k-1}) + C_k condition),  conv_k causal with dilation 2^(k-1)
        h_k = h_{k-1} + R_k g_k,  k = 1 .. num_blocks
        y   = V relu(U relu(sum_k S_k g_k))

    An entry depends on the 1 + (kernel_size - 1) (2^num_blocks - 1) entries before it.

    Called as `net(x, condition)`: `x` is `[N, inputs]`, `condition` is `[N, condition_channels]` or None, the result is
    `[N, outputs]`, where the P = outputs / inputs parameters of an entry are next to each other.
    Cost: O(N inputs num_blocks kernel_size width^2).

    Args:
      inputs: length T of the signals.
      outputs: number of parameters, T P.
      width: number of channels of the hidden layers.
      num_blocks: number of dilated convolutions; None: as many as the last entry needs to depend on all others.
      kernel_size: number of entries that a convolution sees, at least 2.
      reverse: whether the order is from the end of the signal to its start.
      condition_channels: number of features of the condition; 0: the network takes none.
      zero_init: whether the last layer starts at zero, and with it the result, so that a flow starts as the identity.
      seed: integer for reproducible initial weights.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: if outputs is not a multiple of inputs, num_blocks is less than 1 or kernel_size less than 2; when called
        with an input or a condition of other sizes, or with a condition where it takes none, or with none where it needs
        one.

    van den Oord, Dieleman, Zen, Simonyan, Vinyals, Graves, Kalchbrenner, Senior, Kavukcuoglu 2016, arXiv:1609.03499.

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import WaveNet
    >>> net = WaveNet(inputs=16, outputs=32, width=8)
    >>> net(tf.ones([5, 16])).shape
    TensorShape([5, 32])
    >>> net.num_blocks
    4
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int = 32,
        num_blocks: int | None = None,
        kernel_size: int = 2,
        reverse: bool = False,
        condition_channels: int = 0,
        zero_init: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(inputs, outputs, condition_channels=condition_channels, seed=seed, **kwargs)
        if kernel_size < 2:
            raise ValueError(f"{self.name}: got kernel_size={kernel_size}, needs at least 2")
        if num_blocks is None:
            num_blocks = next(n for n in itertools.count(1) if 1 + (kernel_size - 1) * (2**n - 1) >= inputs - 1)
        if num_blocks < 1:
            raise ValueError(f"{self.name}: got num_blocks={num_blocks}, needs at least 1")
        self.width = width
        self.num_blocks = num_blocks
        self.kernel_size = kernel_size
        self.reverse = reverse
        self.zero_init = zero_init
        self.input_spec = keras.layers.InputSpec(ndim=2, axes={-1: inputs})
        seeds = seed_stream(seed)
        options = {"dtype": self.dtype_policy}

        def project(channels: int, outputs: int, kernel_initializer: str | None = None) -> keras.layers.Dense:
            initializer = kernel_initializer or keras.initializers.GlorotUniform(seed=next(seeds))
            layer = keras.layers.Dense(outputs, kernel_initializer=initializer, **options)
            layer.build((None, channels))
            return layer

        self.embed = project(1, width)
        self.blocks = [
            DilatedBlock(
                width,
                kernel_size,
                2**k,
                last=k == num_blocks - 1,
                condition_channels=condition_channels,
                seed=next(seeds),
                **options,
            )
            for k in range(num_blocks)
        ]
        self.mix = project(width, width)
        self.last = project(width, parameters_per_entry(self), "zeros" if zero_init else None)
        self.built = True

    def call(self, x: tf.Tensor, condition: tf.Tensor | None = None) -> tf.Tensor:
        """The parameters `[N, outputs]` for `x` and `condition`."""
        condition = self._condition_like(x, condition)
        if self.reverse:
            x = ops.flip(x, axis=1)
        h = self.embed(ops.pad(x[:, :-1, None], [[0, 0], [1, 0], [0, 0]]))
        skips = []
        for block in self.blocks:
            h, skip = block(h, condition)
            skips.append(skip)
        y = self.last(ops.relu(self.mix(ops.relu(sum(skips)))))
        if self.reverse:
            y = ops.flip(y, axis=1)
        return ops.reshape(y, (-1, self.outputs))
