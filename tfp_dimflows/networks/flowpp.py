"""`FlowPPNet`: Flow++'s conditioner of gated convolutions and attention, and `FlowPPContext`, which embeds its condition."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tfp_dimflows.keras_bridge import adapting
from tfp_dimflows.networks.base import Conditioner, Configured, seed_stream


def _concat_elu(x: tf.Tensor) -> tf.Tensor:
    return ops.elu(ops.concatenate([x, -x], axis=-1))


def _add_gated(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    a, b = ops.split(y, 2, axis=-1)
    return x + a * ops.sigmoid(b)


def _layer_norm(channels: int, dtype: keras.DTypePolicy) -> keras.layers.LayerNormalization:
    norm = keras.layers.LayerNormalization(epsilon=1e-5, dtype=dtype)
    norm.build((None, None, None, channels))
    return norm


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class DataDependentConv2D(Configured):
    """Convolution whose results get their mean and scale from data.

        y = conv(x, kernel) + b

    with zeros around the image. In a data-dependent initialisation pass (`adapting()`), a call first takes the mean m and
    the standard deviation s of every channel of y over batch and space, and sets

        kernel <- kernel init_scale / s,  b <- (b - m) init_scale / s

    and so returns mean 0 and standard deviation `init_scale`; a channel that is constant in the batch keeps its scale.
    Before that pass, `kernel ~ N(0, (0.05 init_scale)^2)` and `b = 0`. (The release starts all kernels at N(0, 0.05^2);
    the pass leaves no difference.)

    Maps `[N, H, W, inputs]` to `[N, H, W, outputs]`.

    Args:
      inputs: number of input channels.
      outputs: number of output channels.
      kernel_size: height and width of the kernel.
      init_scale: standard deviation of the result after the initialisation pass.
      seed: integer for reproducible initial weights.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: when called with another number of channels.

    From the release of Flow++ (Ho, Chen, Srinivas, Duan, Abbeel 2019, arXiv:1902.00275), after Salimans and Kingma 2016.

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.keras_bridge import adaptation
    >>> from tfp_dimflows.networks import DataDependentConv2D
    >>> layer = DataDependentConv2D(3, 8, 3, init_scale=0.1)
    >>> with adaptation():
    ...     y = layer(tf.random.normal([16, 4, 4, 3]))
    >>> tf.math.reduce_std(y, [0, 1, 2]).numpy().round(3)
    array([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=float32)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        *,
        init_scale: float = 1.0,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.inputs = inputs
        self.outputs = outputs
        self.kernel_size = kernel_size
        self.init_scale = init_scale
        self.seed = seed
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={-1: inputs})
        # Without autocasting the initialisation pass reads and writes all digits.
        self.kernel = self.add_weight(
            shape=(kernel_size, kernel_size, inputs, outputs),
            initializer=keras.initializers.RandomNormal(stddev=0.05 * init_scale, seed=seed),
            autocast=False,
            name="kernel",
        )
        self.bias = self.add_weight(shape=(outputs,), initializer="zeros", autocast=False, name="bias")
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The convolution of `x`."""
        if adapting():
            self._adapt(ops.cast(self._conv(x), self.variable_dtype))
        return self._conv(x)

    def _conv(self, x: tf.Tensor) -> tf.Tensor:
        y = ops.conv(x, ops.cast(self.kernel, x.dtype), padding="same", data_format="channels_last")
        return y + ops.cast(self.bias, y.dtype)

    def _adapt(self, y: tf.Tensor) -> None:
        # Relative to one of the values, the moments of a constant channel are exact, however large the batch.
        some = y[0, 0, 0]
        mean, variance = ops.moments(y - some, axes=(0, 1, 2))
        mean, std = some + mean, ops.sqrt(variance)
        constant = std <= 1e-6 * (1.0 + ops.abs(mean))
        factor = ops.where(constant, 1.0, self.init_scale / ops.where(constant, 1.0, std))
        self.kernel.assign(self.kernel * factor)
        self.bias.assign((self.bias - mean) * factor)


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class GatedConv2D(Configured):
    """Residual block of two convolutions, the second one gated.

        c    = conv3x3(concat_elu(x)) + conv1x1(concat_elu(context))
        a, b = conv(dropout(concat_elu(c)))
        y    = x + a sigmoid(b)

    where `concat_elu(x) = elu([x, -x])`, and without a context there is no second term. All convolutions are
    `DataDependentConv2D`, the last one with scale 0.1. Dropout acts only in training, as Keras has it.

    Called as `block(x, context)`: `x` is `[N, H, W, width]`, `context` is `[N, H, W, context_channels]` or None, the result is
    `[N, H, W, width]`. Cost: O(N H W width (width + context_channels)).

    Args:
      width: number of channels.
      context_channels: number of channels of the context; 0: the block takes none.
      gate_kernel_size: height and width of the kernel of the last convolution: 1 in a `FlowPPNet`, 3 in a `FlowPPContext`.
      dropout: fraction of `concat_elu(c)` that is dropped in training.
      seed: integer for reproducible initial weights and dropout.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: when called with another number of channels, or with a context where it takes none, or with none where it
        needs one.

    Ho, Chen, Srinivas, Duan, Abbeel 2019, arXiv:1902.00275.

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import GatedConv2D
    >>> GatedConv2D(8, context_channels=3)(tf.ones([2, 4, 4, 8]), tf.ones([2, 4, 4, 3])).shape
    TensorShape([2, 4, 4, 8])
    """

    def __init__(
        self,
        width: int,
        *,
        context_channels: int = 0,
        gate_kernel_size: int = 1,
        dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.width = width
        self.context_channels = context_channels
        self.gate_kernel_size = gate_kernel_size
        self.dropout = dropout
        self.seed = seed
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={-1: width})
        seeds = seed_stream(seed)
        options = {"dtype": self.dtype_policy}
        self.conv = DataDependentConv2D(2 * width, width, 3, seed=next(seeds), **options)
        self.conv_context = None
        if context_channels:
            self.conv_context = DataDependentConv2D(2 * context_channels, width, 1, seed=next(seeds), **options)
        self.drop = keras.layers.Dropout(dropout, seed=next(seeds), **options)
        self.conv_gate = DataDependentConv2D(
            2 * width, 2 * width, gate_kernel_size, init_scale=0.1, seed=next(seeds), **options
        )
        self.built = True

    def call(self, x: tf.Tensor, context: tf.Tensor | None = None) -> tf.Tensor:
        """The block's result for `x` and `context`."""
        channels = 0 if context is None else context.shape[-1]
        if channels != self.context_channels:
            raise ValueError(f"{self.name}: got a context with {channels} channels, needs {self.context_channels}")
        c = self.conv(_concat_elu(x))
        if self.conv_context is not None:
            c = c + self.conv_context(_concat_elu(context))
        return _add_gated(x, self.conv_gate(self.drop(_concat_elu(c))))


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class GatedSelfAttention(Configured):
    """Residual block of multi-head attention among all pixels of an image, gated.

        q, k, v = conv1x1(x + position)
        c       = softmax(q k^T / sqrt(width / num_heads)) v  for every head, on its own width / num_heads channels
        a, b    = conv1x1(dropout(c))
        y       = x + a sigmoid(b)

    The convolutions are `DataDependentConv2D`, the last one with scale 0.1. Dropout acts only in training, as Keras has it.
    The softmax is computed in float32 at least.

    Called as `block(x, position)`: `x` is `[N, H, W, width]`, `position` is `[H, W, width]`, the result is `[N, H, W, width]`.
    Cost: time O(N H W width (width + H W)), memory O(N num_heads (H W)^2).

    Args:
      width: number of channels.
      num_heads: number of heads.
      dropout: fraction of `c` that is dropped in training.
      seed: integer for reproducible initial weights and dropout.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: if num_heads does not divide width; when called with another number of channels.

    Ho, Chen, Srinivas, Duan, Abbeel 2019, arXiv:1902.00275.

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import GatedSelfAttention
    >>> GatedSelfAttention(8, num_heads=2)(tf.ones([2, 4, 4, 8]), tf.zeros([4, 4, 8])).shape
    TensorShape([2, 4, 4, 8])
    """

    def __init__(self, width: int, *, num_heads: int = 4, dropout: float = 0.0, seed: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        if width % num_heads:
            raise ValueError(f"{self.name}: width {width} is not divisible into {num_heads} heads")
        self.width = width
        self.num_heads = num_heads
        self.dropout = dropout
        self.seed = seed
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={-1: width})
        seeds = seed_stream(seed)
        options = {"dtype": self.dtype_policy}
        self.conv = DataDependentConv2D(width, 3 * width, 1, seed=next(seeds), **options)
        self.drop = keras.layers.Dropout(dropout, seed=next(seeds), **options)
        self.conv_gate = DataDependentConv2D(width, 2 * width, 1, init_scale=0.1, seed=next(seeds), **options)
        self.built = True

    def call(self, x: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
        """The block's result for `x`, whose pixels are told apart by `position`."""
        _, height, columns, _ = ops.shape(x)
        heads = (-1, height * columns, self.num_heads, self.width // self.num_heads)
        q, k, v = (ops.reshape(part, heads) for part in ops.split(self.conv(x + position), 3, axis=-1))
        # Keras would round its scale to float32, and multiply by it after the sum, which is large for float16.
        q = q * (self.width // self.num_heads) ** -0.5
        c = ops.reshape(ops.dot_product_attention(q, k, v, scale=1.0), (-1, height, columns, self.width))
        return _add_gated(x, self.conv_gate(self.drop(c)))


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class FlowPPNet(Conditioner):
    """Flow++'s conditioner.

        h = conv3x3(x)
        num_blocks times:  h = norm(gated_conv(h, condition)),  h = norm(attention(h, position))
        y = conv3x3(h)

    with `GatedConv2D`, `GatedSelfAttention` and layer normalisation over the channels (epsilon 1e-5, with gain and bias).
    `position` is `[*image_size, width]`, trained, one for all blocks, and starts at N(0, 0.01^2). The condition reaches the
    network as the context of the gated convolutions.

    All convolutions are `DataDependentConv2D`, the last one with scale 0.1: after a data-dependent initialisation pass every
    channel of the result has mean 0 and standard deviation 0.1 over batch and space. Without that pass the result starts
    small as well: about 0.015 sqrt(width), 0.15 for a width of 96. Dropout acts only in Keras's training (`fit`,
    `train_on_batch` or `training=True`).

    Called as `net(x, condition)`: `x` is `[N, H, W, inputs]`; `condition` is None, a vector `[N, condition_channels]`,
    repeated at every position, or an image `[N, f H, f W, condition_channels / f^2]`, squeezed to the size of `x`; the result
    is `[N, H, W, outputs]`. Cost: time O(N H W num_blocks width (width + H W)), memory O(N num_blocks num_heads (H W)^2) in
    training; without attention O(N H W num_blocks width^2) and O(N H W num_blocks width).

    Args:
      inputs: number of channels of `x`.
      outputs: number of channels of the result.
      image_size: height and width of `x`, needed for attention. The two parts of a column coupling have half the image's
        width.
      width: number of channels of the hidden layers.
      num_blocks: number of pairs of a gated convolution and an attention.
      num_heads: number of heads of the attention.
      dropout: fraction of the values before every gate that is dropped in training.
      condition_channels: number of channels of the condition; 0: the network takes none.
      attention: whether there is attention; without it the blocks are `h = norm(gated_conv(h, condition))`.
      seed: integer for reproducible initial weights and dropout.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: if there is attention and no image_size, or num_heads does not divide width; when called with an input or a
        condition of other sizes, or with a condition where it takes none, or with none where it needs one.

    Ho, Chen, Srinivas, Duan, Abbeel 2019, arXiv:1902.00275.

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import FlowPPNet
    >>> net = FlowPPNet(inputs=3, outputs=6, image_size=(4, 2), width=8, num_blocks=1, condition_channels=5)
    >>> net(tf.ones([7, 4, 2, 3]), condition=tf.ones([7, 4, 2, 5])).shape
    TensorShape([7, 4, 2, 6])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        image_size: Sequence[int] | None = None,
        width: int = 96,
        num_blocks: int = 10,
        num_heads: int = 4,
        dropout: float = 0.2,
        condition_channels: int = 0,
        attention: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(inputs, outputs, condition_channels=condition_channels, seed=seed, **kwargs)
        self.image_size = None if image_size is None else tuple(image_size)
        self.width = width
        self.num_blocks = num_blocks
        self.num_heads = num_heads
        self.dropout = dropout
        self.attention = attention
        if attention and image_size is None:
            raise ValueError(f"{self.name}: got no image_size, which attention needs")
        self.input_spec = keras.layers.InputSpec(shape=(None, *(self.image_size or (None, None)), inputs))
        seeds = seed_stream(seed)
        options = {"dtype": self.dtype_policy}
        self.conv_in = DataDependentConv2D(inputs, width, 3, seed=next(seeds), **options)
        self.position = None
        if attention and self.image_size is not None:
            self.position = self.add_weight(
                shape=(*self.image_size, width),
                initializer=keras.initializers.RandomNormal(stddev=0.01, seed=next(seeds)),
                name="position",
            )
        self.blocks = []
        for _ in range(num_blocks):
            conv = GatedConv2D(width, context_channels=condition_channels, dropout=dropout, seed=next(seeds), **options)
            block = [conv, _layer_norm(width, self.dtype_policy)]
            if attention:
                attend = GatedSelfAttention(width, num_heads=num_heads, dropout=dropout, seed=next(seeds), **options)
                block += [attend, _layer_norm(width, self.dtype_policy)]
            self.blocks.append(block)
        self.conv_out = DataDependentConv2D(width, outputs, 3, init_scale=0.1, seed=next(seeds), **options)
        self.built = True

    def call(self, x: tf.Tensor, condition: tf.Tensor | None = None) -> tf.Tensor:
        """The parameters `[N, H, W, outputs]` for `x` and `condition`."""
        context = self._condition_like(x, condition)
        position = ops.convert_to_tensor(self.position) if self.attention else None
        h = self.conv_in(x)
        for conv, norm, *attention in self.blocks:
            h = norm(conv(h, context))
            if attention:
                attend, norm = attention
                h = norm(attend(h, position))
        return self.conv_out(h)


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class FlowPPContext(Configured):
    """Embeds an image as the context of couplings on its column halves: of Flow++'s dequantiser and of VFlow's posterior.

        h = conv3x3([even columns of x, odd columns of x])
        num_blocks times:  h = gated_conv(h)

    The convolutions are `DataDependentConv2D`; the gated ones (`GatedConv2D`) have 3x3 kernels throughout. Dropout acts only
    in Keras's training. `dfb.EmbedCondition` computes it once for all couplings.

    Called as `context(x)`: `x` is `[N, H, W, inputs]`, the result is `[N, H, W/2, width]`. Flow++'s dequantiser gives it the
    integer image as `x / 256 - 0.5`. Cost: O(N H W num_blocks width^2).

    Args:
      inputs: number of channels of `x`.
      width: number of channels of the result.
      num_blocks: number of gated convolutions.
      dropout: fraction of the values before every gate that is dropped in training.
      seed: integer for reproducible initial weights and dropout.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: when called with another number of channels, or with an odd number of columns.

    Ho, Chen, Srinivas, Duan, Abbeel 2019, arXiv:1902.00275; Chen, Lu, Chenli, Zhu, Tian 2020, arXiv:2002.09741 (VFlow).

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import FlowPPContext
    >>> FlowPPContext(inputs=3, width=8, num_blocks=1)(tf.ones([2, 4, 6, 3])).shape
    TensorShape([2, 4, 3, 8])
    """

    def __init__(
        self,
        inputs: int,
        *,
        width: int = 32,
        num_blocks: int = 3,
        dropout: float = 0.2,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.inputs = inputs
        self.width = width
        self.num_blocks = num_blocks
        self.dropout = dropout
        self.seed = seed
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={-1: inputs})
        seeds = seed_stream(seed)
        options = {"dtype": self.dtype_policy}
        self.conv_in = DataDependentConv2D(2 * inputs, width, 3, seed=next(seeds), **options)
        self.blocks = [
            GatedConv2D(width, gate_kernel_size=3, dropout=dropout, seed=next(seeds), **options) for _ in range(num_blocks)
        ]
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The context `[N, H, W/2, width]` of `x`."""
        _, height, columns, _ = ops.shape(x)
        if isinstance(columns, int) and columns % 2:
            raise ValueError(f"{self.name}: got {columns} columns, needs an even number")
        h = self.conv_in(ops.reshape(x, (-1, height, columns // 2, 2 * self.inputs)))
        for block in self.blocks:
            h = block(h)
        return h
