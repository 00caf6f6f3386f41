"""`GlowConvNet`: Glow's three-layer conditioner, and `ZeroConv2D`, the network of its split priors."""

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tfp_dimflows.keras_bridge import adapting
from tfp_dimflows.networks.base import Conditioner, Configured, seed_stream


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class EdgeConv2D(Configured):
    """3x3 convolution that sees where the image ends ("edge bias").

        y = conv([pad(x), edge], kernel)

    where `pad` puts one row and column of zeros on every side, and the channel `edge` is 1 there and 0 inside. The part
    of `edge` is the same for the whole batch and is computed once per call.

    Maps `[N, H, W, inputs]` to `[N, H, W, outputs]`. The kernel is `[3, 3, inputs + 1, outputs]`; its last input
    channel is that of `edge`.

    Args:
      inputs: number of input channels.
      outputs: number of output channels.
      kernel_initializer: name of a Keras initializer, or an initializer.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: when called with another number of channels.

    From the release of Glow (Kingma, Dhariwal 2018, arXiv:1807.03039).

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import EdgeConv2D
    >>> EdgeConv2D(1, 1, kernel_initializer="ones")(tf.zeros([1, 3, 3, 1]))[0, :, :, 0].numpy()
    array([[5., 3., 5.],
           [3., 0., 3.],
           [5., 3., 5.]], dtype=float32)
    """

    def __init__(
        self, inputs: int, outputs: int, *, kernel_initializer: str | keras.Initializer = "glorot_uniform", **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.inputs = inputs
        self.outputs = outputs
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={-1: inputs})
        self.kernel = self.add_weight(shape=(3, 3, inputs + 1, outputs), initializer=self.kernel_initializer, name="kernel")
        self.built = True

    def call(self, x: tf.Tensor, affine: "ChannelAffine | None" = None) -> tf.Tensor:
        """The convolution of `x`; with a `ChannelAffine`, `affine(convolution)`."""
        kernel, shift = ops.convert_to_tensor(self.kernel), 0.0
        if affine is not None:
            kernel, shift = affine.folded(kernel)
        of_x, of_edge = tf.split(kernel, [self.inputs, 1], axis=2)
        inside = ops.zeros((1, *ops.shape(x)[1:-1], 1), dtype=x.dtype)
        edge = ops.pad(inside, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=1.0)
        edge = ops.conv(edge, of_edge, padding="valid", data_format="channels_last") + shift
        return ops.conv(x, of_x, padding="same", data_format="channels_last") + edge


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class ChannelAffine(Configured):
    """Learned shift and scale of every channel: `y = (x + b) exp(3 s)`, at the start the identity.

    The 3 makes the scale learn three times as fast as the rest. The exponential is computed in the variables'
    precision. After a convolution the scale acts on the kernel (`folded`), which costs nothing per pixel.

    Args:
      channels: size of the last axis.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: when called with another number of channels.
    """

    def __init__(self, channels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.channels = channels
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: channels})
        self.bias = self.add_weight(shape=(channels,), initializer="zeros", name="bias")
        self.log_scale = self.add_weight(shape=(channels,), initializer="zeros", autocast=False, name="log_scale")
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The shifted and scaled `x`."""
        scale, shift = self.folded(ops.ones((), dtype=x.dtype))
        return x * scale + shift

    def folded(self, kernel: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The kernel of a convolution followed by this layer, and the shift of its result."""
        scale = ops.cast(ops.exp(3.0 * self.log_scale), kernel.dtype)
        return kernel * scale, self.bias * scale


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class ActNormLayer(ChannelAffine):
    """Activation normalisation inside a network: `y = (x + b) exp(3 s)` per channel.

    In a data-dependent initialisation pass (`adapting()`), a call first sets, from the moments over all axes but the
    last,

        b = -mean(x),  s = -log(std(x) + 1e-6) / 3

    and so returns zero mean and unit variance; a channel that is constant in the batch keeps its scale. Before that
    pass it is the identity.

    Args:
      channels: size of the last axis.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: when called with another number of channels.

    Kingma, Dhariwal 2018, arXiv:1807.03039. The bijector of that name is `bijectors.ActNorm`.

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.keras_bridge import adaptation
    >>> from tfp_dimflows.networks import ActNormLayer
    >>> layer = ActNormLayer(1)
    >>> with adaptation():
    ...     y = layer(tf.constant([[1.0], [3.0]]))
    >>> layer(tf.constant([[1.0], [2.0], [3.0]])).numpy().round(3).tolist()
    [[-1.0], [0.0], [1.0]]
    """

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The normalised `x`."""
        if adapting():
            self.adapt(x)
        return super().call(x)

    def adapt(self, x: tf.Tensor) -> None:
        """Sets shift and scale from the moments of `x`."""
        x = ops.cast(x, self.variable_dtype)
        # Relative to one of the values, the moments of a constant channel are exact, however large the batch.
        some = ops.reshape(x, (-1, x.shape[-1]))[0]
        mean, variance = ops.moments(x - some, axes=tuple(range(x.ndim - 1)))
        mean, std = some + mean, ops.sqrt(variance)
        constant = std <= 1e-6 * (1.0 + ops.abs(mean))
        self.bias.assign(-mean)
        self.log_scale.assign(ops.where(constant, self.log_scale, -ops.log(std + 1e-6) / 3.0))


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class ZeroConv2D(Configured):
    """3x3 convolution with edge bias that starts at zero.

        y = (conv([pad(x), edge], kernel) + b) exp(3 s)

    with `kernel`, `b` and `s` all zero at the start. Maps `[N, H, W, inputs]` to `[N, H, W, outputs]`.

    Args:
      inputs: number of input channels.
      outputs: number of output channels.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: when called with another number of channels.

    Kingma, Dhariwal 2018, arXiv:1807.03039.

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import ZeroConv2D
    >>> float(tf.reduce_max(tf.abs(ZeroConv2D(3, 6)(tf.ones([2, 4, 4, 3])))))
    0.0
    """

    def __init__(self, inputs: int, outputs: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.inputs = inputs
        self.outputs = outputs
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={-1: inputs})
        self.conv = EdgeConv2D(inputs, outputs, kernel_initializer="zeros", dtype=self.dtype_policy)
        self.affine = ChannelAffine(outputs, dtype=self.dtype_policy)
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The convolution of `x`, shifted and scaled."""
        return self.conv(x, affine=self.affine)


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class GlowConvNet(Conditioner):
    """Glow's conditioner.

    With `h = [x, condition]`:

        h_1 = relu(actnorm(conv3x3(h)))
        h_2 = relu(actnorm(conv1x1(h_1)))
        y   = (conv3x3(h_2) + b) exp(3 s)

    The 3x3 convolutions have edge bias (`EdgeConv2D`). The first two kernels start at N(0, 0.05^2); the last layer
    (`ZeroConv2D`), and with it the result, starts at zero. The normalisations (`ActNormLayer`) take their first values
    from data in a data-dependent initialisation pass.

    Called as `net(x, condition)`: `x` is `[N, H, W, inputs]`; `condition` is None, a vector `[N, condition_channels]`,
    repeated at every position, or an image `[N, f H, f W, condition_channels / f^2]`, squeezed to the size of `x`; the result
    is `[N, H, W, outputs]`. Cost: O(N H W width (inputs + width + outputs)).

    Args:
      inputs: number of channels of `x`.
      outputs: number of channels of the result.
      width: number of channels of the hidden layers; 512 in the paper.
      condition_channels: number of channels of the condition; 0: the network takes none.
      seed: integer for reproducible initial weights.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: when called with an input or a condition of other sizes, or with a condition where it takes none, or
        with none where it needs one.

    Kingma, Dhariwal 2018, arXiv:1807.03039.

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import GlowConvNet
    >>> net = GlowConvNet(inputs=2, outputs=4, width=8, condition_channels=3)
    >>> net(tf.ones([5, 4, 4, 2]), condition=tf.ones([5, 3])).shape
    TensorShape([5, 4, 4, 4])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int = 64,
        condition_channels: int = 0,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(inputs, outputs, condition_channels=condition_channels, seed=seed, **kwargs)
        self.width = width
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={-1: inputs})
        initializers = (keras.initializers.RandomNormal(stddev=0.05, seed=s) for s in seed_stream(seed))
        options = {"dtype": self.dtype_policy}
        self.conv_1 = EdgeConv2D(inputs + condition_channels, width, kernel_initializer=next(initializers), **options)
        self.norm_1 = ActNormLayer(width, **options)
        self.conv_2 = keras.layers.Conv2D(
            width,
            1,
            use_bias=False,
            data_format="channels_last",
            kernel_initializer=next(initializers),
            **options,
        )
        self.conv_2.build((None, None, None, width))
        self.norm_2 = ActNormLayer(width, **options)
        self.conv_out = ZeroConv2D(width, outputs, **options)
        self.built = True

    def call(self, x: tf.Tensor, condition: tf.Tensor | None = None) -> tf.Tensor:
        """The parameters `[N, H, W, outputs]` for `x` and `condition`."""
        h = self._with_condition(x, condition)
        if adapting():
            self.norm_1.adapt(self.conv_1(h))
        h = ops.relu(self.conv_1(h, affine=self.norm_1))
        if adapting():
            self.norm_2.adapt(self.conv_2(h))
        kernel, shift = self.norm_2.folded(ops.convert_to_tensor(self.conv_2.kernel))
        h = ops.relu(self.conv_2.convolution_op(h, kernel) + shift)
        return self.conv_out(h)
