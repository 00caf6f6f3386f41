"""`ResNet`: RealNVP's convolutional conditioner, with weight normalisation."""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from numpy.typing import ArrayLike

from tfp_dimflows.networks.base import Conditioner, Configured, seed_stream


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class WeightNormConv2D(Configured):
    """Convolution whose kernel has a separate direction and length.

        y_o = conv(x, g_o v_o / |v_o|) + b_o  for every output channel o

    with the L2 norm over height, width and input channels, at stride 1 and with zeros around the image. The normalised
    kernel is computed in the variables' precision, whatever the precision of the convolution. At the start, with
    `s = sqrt(2 / inputs)`: `v ~ U(-s, s)`, `g = gain s sqrt(inputs kernel_size^2 / 12)` and `b = 0`.

    Maps `[N, H, W, inputs]` to `[N, H, W, outputs]`.

    Args:
      inputs: number of input channels.
      outputs: number of output channels.
      kernel_size: height and width of the kernel.
      gain: factor on the initial magnitudes `g`; 0: the layer starts at zero; None: no magnitudes, `g = 1`.
      use_bias: whether there is a `b`.
      l2: coefficient of the penalty on `sum g^2`, reported by `losses`.
      seed: integer for reproducible initial weights.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: when called with another number of channels.

    Salimans and Kingma 2016, arXiv:1602.07868; initial values of the RealNVP release.

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import WeightNormConv2D
    >>> WeightNormConv2D(3, 8, 3, gain=1.0)(tf.ones([2, 4, 4, 3])).shape
    TensorShape([2, 4, 4, 8])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        *,
        gain: float | None = None,
        use_bias: bool = True,
        l2: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.inputs = inputs
        self.outputs = outputs
        self.kernel_size = kernel_size
        self.gain = gain
        self.use_bias = use_bias
        self.l2 = l2
        self.seed = seed
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={-1: inputs})
        s = math.sqrt(2.0 / inputs)
        self.direction = self.add_weight(
            shape=(kernel_size, kernel_size, inputs, outputs),
            initializer=keras.initializers.RandomUniform(-s, s, seed=seed),
            autocast=False,
            name="direction",
        )
        self.magnitude = self.bias = None
        if gain is not None:
            self.magnitude = self.add_weight(
                shape=(outputs,),
                initializer=keras.initializers.Constant(gain * s * math.sqrt(inputs * kernel_size**2 / 12.0)),
                regularizer=keras.regularizers.L2(l2) if l2 else None,
                autocast=False,
                name="magnitude",
            )
        if use_bias:
            self.bias = self.add_weight(shape=(outputs,), initializer="zeros", name="bias")
        self.built = True

    @property
    def kernel(self) -> tf.Tensor:
        """`g v / |v|`, `[kernel_size, kernel_size, inputs, outputs]`."""
        kernel = self.direction / ops.sqrt(ops.sum(ops.square(self.direction), axis=(0, 1, 2)))
        return kernel if self.magnitude is None else self.magnitude * kernel

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The convolution of `x`."""
        y = ops.conv(x, ops.cast(self.kernel, x.dtype), padding="same", data_format="channels_last")
        return y if self.bias is None else y + self.bias


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class ResNet(Conditioner):
    """RealNVP's conditioner: pre-activation residual blocks, each with a 1x1 skip connection to the output.

    With `h = [x, condition]` and all convolutions weight-normalised (`WeightNormConv2D`):

        h_0 = conv3x3(relu([h, -h, mask]))
        h_k = h_{k-1} + conv3x3(relu(conv3x3(relu(h_{k-1})))),  k = 1 .. num_blocks
        y   = conv1x1(relu(sum_k conv1x1_k(h_k)))

    The second convolution of every block, the skips and the last convolution have magnitudes. `batch_norm` puts batch
    normalisation (bias, no gain) on `h`, doubled where there is a mask, and before every later ReLU; the first
    convolution of a block then has no bias.

    Called as `resnet(x, condition)`: `x` is `[N, H, W, inputs]`; `condition` is None, a vector
    `[N, condition_channels]`, repeated at every position, or an image `[N, f H, f W, condition_channels / f^2]`, squeezed to
    the size of `x`; the result is `[N, H, W, outputs]`. Cost: O(N H W num_blocks width^2).

    Args:
      inputs: number of channels of `x`.
      outputs: number of channels of the result.
      width: number of channels of the hidden layers.
      num_blocks: number of residual blocks.
      condition_channels: number of channels of the condition; 0: the network takes none.
      mask: array `[H, W, 1]`, a constant channel beside `x`: which positions a checkerboard left visible.
      batch_norm: whether to normalise over the batch.
      zero_init: whether the last convolution's magnitudes start at zero, and with them the result, so that a flow
        starts as the identity. Gradients reach these magnitudes first and, once they have moved, all other weights.
        False: they start at the release's values, and the result is not zero.
      l2: coefficient of the penalty on the squared magnitudes, reported by `losses`; 5e-5 in the release.
      seed: integer for reproducible initial weights.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: if the mask is not `[H, W, 1]`; when called with an input or a condition of other sizes, or with a
        condition where it takes none, or with none where it needs one.

    Dinh, Sohl-Dickstein, Bengio 2017, arXiv:1605.08803, with the details of its release.

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import ResNet
    >>> resnet = ResNet(inputs=3, outputs=6, width=8, mask=[[[0], [1]], [[1], [0]]])
    >>> resnet(tf.ones([5, 2, 2, 3])).shape
    TensorShape([5, 2, 2, 6])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int = 32,
        num_blocks: int = 2,
        condition_channels: int = 0,
        mask: ArrayLike | None = None,
        batch_norm: bool = False,
        zero_init: bool = True,
        l2: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(inputs, outputs, condition_channels=condition_channels, seed=seed, **kwargs)
        self.width = width
        self.num_blocks = num_blocks
        self.mask = None if mask is None else np.asarray(mask, dtype="float32")
        self.batch_norm = batch_norm
        self.zero_init = zero_init
        self.l2 = l2
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={-1: inputs})
        if self.mask is not None:
            if self.mask.ndim != 3 or self.mask.shape[-1] != 1:
                raise ValueError(f"{self.name}: got a mask of shape {self.mask.shape}, needs [height, width, 1]")
            self.input_spec = keras.layers.InputSpec(shape=(None, *self.mask.shape[:2], inputs))
        seeds = seed_stream(seed)

        def conv(inputs: int, outputs: int, kernel_size: int, **options: Any) -> WeightNormConv2D:
            options |= {"l2": l2, "seed": next(seeds), "dtype": self.dtype_policy}
            return WeightNormConv2D(inputs, outputs, kernel_size, **options)

        def norm(channels: int) -> keras.Layer:
            if not batch_norm:
                return keras.layers.Identity(dtype=self.dtype_policy)
            layer = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-4, scale=False, dtype=self.dtype_policy)
            layer.build((None, None, None, channels))
            return layer

        channels = inputs + condition_channels
        self.norm_in = norm(channels)
        self.conv_in = conv(2 * channels + (mask is not None), width, 3)
        self.norms = [[norm(width), norm(width)] for _ in range(num_blocks)]
        self.convs = [
            [conv(width, width, 3, use_bias=not batch_norm), conv(width, width, 3, gain=1.0)] for _ in range(num_blocks)
        ]
        self.skips = [conv(width, width, 1, gain=1.0) for _ in range(num_blocks + 1)]
        self.norm_out = norm(width)
        self.conv_out = conv(width, outputs, 1, gain=0.0 if zero_init else 1.0)
        self.built = True

    def call(self, x: tf.Tensor, condition: tf.Tensor | None = None) -> tf.Tensor:
        """The parameters `[N, H, W, outputs]` for `x` and `condition`."""
        h = self.norm_in(self._with_condition(x, condition))
        if self.batch_norm and self.mask is not None:
            h = 2.0 * h
        parts = [h, -h]
        if self.mask is not None:
            mask = ops.convert_to_tensor(self.mask, dtype=h.dtype)
            parts.append(ops.broadcast_to(mask, (*ops.shape(h)[:-1], 1)))
        h = self.conv_in(ops.relu(ops.concatenate(parts, axis=-1)))
        total = self.skips[0](h)
        for (norm_1, norm_2), (conv_1, conv_2), skip in zip(self.norms, self.convs, self.skips[1:]):
            h = h + conv_2(ops.relu(norm_2(conv_1(ops.relu(norm_1(h))))))
            total = total + skip(h)
        return self.conv_out(ops.relu(self.norm_out(total)))
