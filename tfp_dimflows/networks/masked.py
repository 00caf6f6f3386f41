"""`MADE` and `PixelCNN`: autoregressive conditioners of vectors and images, whose masks are all in `MaskedDense`."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from tfp_dimflows.networks.base import Conditioner, Configured, seed_stream


def parameters_per_entry(network: Conditioner) -> int:
    """The P of a network with P parameters for each of its inputs."""
    parameters, rest = divmod(network.outputs, network.inputs)
    if rest or parameters < 1:
        raise ValueError(f"{network.name}: got outputs={network.outputs}, needs a multiple of inputs={network.inputs}")
    return parameters


def tanh_gate(h: tf.Tensor) -> tf.Tensor:
    """`tanh(a) sigmoid(b)` for the halves a and b of the channels."""
    a, b = ops.split(h, 2, axis=-1)
    return ops.tanh(a) * ops.sigmoid(b)


def _spread(degrees: Sequence[int], width: int) -> list[int]:
    """`width` of the degrees in their order, each as often as the others."""
    return [degrees[unit * len(degrees) // width] for unit in range(width)]


def _pad(image: tf.Tensor, top: int = 0, left: int = 0, right: int = 0) -> tf.Tensor:
    return ops.pad(image, [[0, 0], [top, 0], [left, right], [0, 0]])


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class MaskedDense(Configured):
    """Fully connected layer in which an output sees only the inputs that come before it.

        y = x (kernel * mask) + b
        mask[i, o] = 1 if degree of input i <= degree of output o else 0

    with `<` in place of `<=` if strict. Maps `[..., inputs]` to `[..., outputs]`, every position for itself.

    Args:
      input_degrees: one integer for each input.
      output_degrees: one integer for each output.
      strict: whether an output sees only lower degrees than its own.
      kernel_initializer: name of a Keras initializer, or an initializer.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: when called with another number of inputs.

    Germain, Gregor, Murray, Larochelle 2015, arXiv:1502.03509.

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import MaskedDense
    >>> layer = MaskedDense([1, 2, 3], [1, 2, 3], strict=True, kernel_initializer="ones")
    >>> layer(tf.constant([[1.0, 10.0, 100.0]])).numpy()
    array([[ 0.,  1., 11.]], dtype=float32)
    """

    def __init__(
        self,
        input_degrees: Sequence[int],
        output_degrees: Sequence[int],
        *,
        strict: bool = False,
        kernel_initializer: str | keras.Initializer = "glorot_uniform",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.input_degrees = tuple(int(degree) for degree in input_degrees)
        self.output_degrees = tuple(int(degree) for degree in output_degrees)
        self.strict = strict
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: len(self.input_degrees)})
        sees = np.less if strict else np.less_equal
        self.mask = sees.outer(self.input_degrees, self.output_degrees)
        self.kernel = self.add_weight(shape=self.mask.shape, initializer=self.kernel_initializer, name="kernel")
        self.bias = self.add_weight(shape=self.mask.shape[1:], initializer="zeros", name="bias")
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The masked product."""
        return ops.matmul(x, self.kernel * ops.cast(self.mask, x.dtype)) + self.bias


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class MADE(Conditioner):
    """Masked fully connected network for vectors: the parameters of a dimension depend only on the dimensions before it.

    With `h_0 = [x, condition]`:

        h_k = activation(h_{k-1} (W_k * M_k) + b_k),  k = 1 .. K
        y   = h_K (W_{K+1} * M_{K+1}) + b_{K+1}

    The masks M (`MaskedDense`) follow from degrees. A dimension and its parameters have as degree their place in the order,
    from 1 to D; the condition has 0. Hidden units share the degrees 1 .. D - 1 evenly, with a condition 0 .. D - 1. A hidden
    unit sees what has its own degree or a lower one, a parameter only what has a lower one. So every parameter depends on
    the condition, those of the first dimension on nothing else.

    Called as `made(x, condition)`: `x` is `[N, inputs]`, `condition` is `[N, condition_channels]` or None, the result is
    `[N, outputs]`, where the P = outputs / inputs parameters of a dimension are next to each other.
    Cost: O(N sum_k width_{k-1} width_k).

    Args:
      inputs: number of dimensions D of `x`.
      outputs: number of parameters, D P.
      hidden: widths of the hidden layers, any number of them. A layer has units of all degrees if it is at least D wide. In
        a narrower one some are missing, and with them the dependence of some dimensions on those shortly before them.
      ordering: `"natural"`, `"reversed"`, `"random"` (drawn from `seed`), or the place of every dimension in the order, each
        of 0 .. D - 1 once. The attribute and the configuration hold the places.
      activation: name of a Keras activation, or a function.
      condition_channels: number of features of the condition; 0: the network takes none.
      zero_init: whether the last layer starts at zero, and with it the result, so that a flow starts as the identity.
      seed: integer for a reproducible random order and reproducible initial weights.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: if outputs is not a multiple of inputs, or the ordering is no permutation; when called with an input or a
        condition of other sizes, or with a condition where it takes none, or with none where it needs one.

    Germain, Gregor, Murray, Larochelle 2015, arXiv:1502.03509.

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import MADE
    >>> made = MADE(inputs=3, outputs=6, hidden=(16, 16), ordering="reversed", condition_channels=2)
    >>> made(tf.ones([5, 3]), condition=tf.ones([5, 2])).shape
    TensorShape([5, 6])
    >>> made.ordering
    (2, 1, 0)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: Sequence[int] = (64, 64),
        ordering: str | Sequence[int] = "natural",
        activation: str | Callable = "relu",
        condition_channels: int = 0,
        zero_init: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(inputs, outputs, condition_channels=condition_channels, seed=seed, **kwargs)
        self.hidden = tuple(hidden)
        self.ordering = self._places(ordering)
        self.activation = keras.activations.get(activation)
        self.zero_init = zero_init
        self.input_spec = keras.layers.InputSpec(ndim=2, axes={-1: inputs})
        initializers = (keras.initializers.GlorotUniform(seed=s) for s in seed_stream(seed))
        options = {"dtype": self.dtype_policy}
        degrees = [place + 1 for place in self.ordering]
        hidden_degrees = range(0 if condition_channels else min(1, inputs - 1), inputs)
        self.dense, below = [], [*degrees, *[0] * condition_channels]
        for width in self.hidden:
            units = _spread(hidden_degrees, width)
            self.dense.append(MaskedDense(below, units, kernel_initializer=next(initializers), **options))
            below = units
        above = np.repeat(degrees, parameters_per_entry(self)).tolist()
        last = "zeros" if zero_init else next(initializers)
        self.dense.append(MaskedDense(below, above, strict=True, kernel_initializer=last, **options))
        self.built = True

    def _places(self, ordering: str | Sequence[int]) -> tuple[int, ...]:
        given: Any = ordering
        if isinstance(ordering, str):
            natural = range(self.inputs)
            random = np.random.default_rng(self.seed).permutation(self.inputs)
            given = {"natural": natural, "reversed": natural[::-1], "random": random}.get(ordering)
        places = np.asarray(given)
        if places.shape != (self.inputs,) or set(places.tolist()) != set(range(self.inputs)):
            needs = f"'natural', 'reversed', 'random' or each of 0 .. {self.inputs - 1} once"
            raise ValueError(f"{self.name}: got ordering={ordering!r}, needs {needs}")
        return tuple(int(place) for place in places)

    def call(self, x: tf.Tensor, condition: tf.Tensor | None = None) -> tf.Tensor:
        """The parameters `[N, outputs]` for `x` and `condition`."""
        *hidden, last = self.dense
        h = self._with_condition(x, condition)
        for layer in hidden:
            h = self.activation(layer(h))
        return last(h)


class GatedBlock(keras.layers.Layer):
    """One layer of the vertical and of the horizontal stack of a `PixelCNN`.

    The first block gets the image itself. So it is strict at the own pixel, and does not add its result to what it got.
    """

    def __init__(
        self,
        input_degrees: Sequence[int],
        degrees: Sequence[int],
        kernel_size: int,
        *,
        first: bool,
        condition_channels: int,
        seed: int | None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.reach = kernel_size // 2
        self.first = first
        inputs, width = len(input_degrees), len(degrees)
        initializers = (keras.initializers.GlorotUniform(seed=s) for s in seed_stream(seed))
        options = {"dtype": self.dtype_policy}

        def conv(height: int, columns: int, use_bias: bool) -> keras.layers.Conv2D:
            kernel = {"use_bias": use_bias, "kernel_initializer": next(initializers)}
            layer = keras.layers.Conv2D(2 * width, (height, columns), data_format="channels_last", **kernel, **options)
            layer.build((None, None, None, inputs))
            return layer

        def project(channels: int) -> keras.layers.Dense:
            layer = keras.layers.Dense(2 * width, use_bias=False, kernel_initializer=next(initializers), **options)
            layer.build((None, channels))
            return layer

        self.above = conv(self.reach + 1, kernel_size, use_bias=True)
        self.left = conv(1, self.reach, use_bias=False)
        # Both halves of a gate have the degrees of its result.
        halves = [*degrees, *degrees]
        self.here = MaskedDense(input_degrees, halves, strict=first, kernel_initializer=next(initializers), **options)
        self.link = project(2 * width)
        self.conditions = [project(condition_channels), project(condition_channels)] if condition_channels else []
        self.out = MaskedDense(degrees, degrees, kernel_initializer=next(initializers), **options)
        self.built = True

    def call(self, v: tf.Tensor, h: tf.Tensor, condition: tf.Tensor | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Both stacks one layer further."""
        reach = self.reach
        a = self.above(_pad(v, top=reach, left=reach, right=reach))
        b = self.left(_pad(h[:, :, :-1], left=reach)) + self.here(h)
        if condition is not None:
            to_a, to_b = self.conditions
            a, b = a + to_a(condition), b + to_b(condition)
        b = b + self.link(_pad(a[:, :-1], top=1))
        update = self.out(tanh_gate(b))
        return tanh_gate(a), update if self.first else h + update


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class PixelCNN(Conditioner):
    """Gated PixelCNN for images: the parameters of an entry depend only on the entries before it.

    The order is that of the rows, in a row that of the columns, in a pixel that of the channels. With `v_0 = h_0 = x` and
    `gate([a, b]) = tanh(a) sigmoid(b)`:

        a_k = above_k(v_{k-1}) + A_k condition
        v_k = gate(a_k)
        b_k = left_k(h_{k-1}) + here_k(h_{k-1}) + down(L_k a_k) + B_k condition
        h_k = h_{k-1} + out_k(gate(b_k)),  k = 1 .. num_blocks, without h_{k-1} for k = 1
        y   = last(relu(h_{num_blocks}))

    The vertical stack v sees the rows above and, by `above` ((kernel_size // 2 + 1) x kernel_size), the whole of its own; it
    enters the horizontal stack h one row further down, so there is no blind spot. `left` (1 x kernel_size // 2) sees the pixels
    to the left. `here`, `out` and `last` see the pixel itself through masks (`MaskedDense`), with the hidden channels divided
    into one group for each channel of `x`; `here` is strict for k = 1. `A`, `B` and `L` are 1x1 convolutions.

    An entry depends on every entry before it if num_blocks (kernel_size // 2) is at least the height and the width of the
    image minus 1. Of an image as the condition it sees its own pixel, and one block later those before it.

    Called as `net(x, condition)`: `x` is `[N, H, W, inputs]`; `condition` is None, a vector `[N, condition_channels]`,
    repeated at every position, or an image `[N, f H, f W, condition_channels / f^2]`, squeezed to the size of `x`; the result
    is `[N, H, W, outputs]`, where the P = outputs / inputs parameters of a channel are next to each other.
    Cost: O(N H W num_blocks width^2 kernel_size^2).

    Args:
      inputs: number of channels C of `x`.
      outputs: number of channels of the result, C P.
      width: number of channels of the hidden layers, at least C.
      num_blocks: number of layers of the two stacks.
      kernel_size: height and width of what a layer would see without the order; odd, at least 3.
      reverse: whether rows, columns and channels are in the opposite order.
      condition_channels: number of channels of the condition; 0: the network takes none.
      zero_init: whether the last layer starts at zero, and with it the result, so that a flow starts as the identity.
      seed: integer for reproducible initial weights.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Raises:
      ValueError: if outputs is not a multiple of inputs, or width, num_blocks or kernel_size is not as above; when called
        with an input or a condition of other sizes, or with a condition where it takes none, or with none where it needs
        one.

    van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves, Kavukcuoglu 2016, arXiv:1606.05328.

    #### Example

    >>> import tensorflow as tf
    >>> from tfp_dimflows.networks import PixelCNN
    >>> net = PixelCNN(inputs=3, outputs=6, width=12, num_blocks=2, condition_channels=5)
    >>> net(tf.ones([7, 4, 4, 3]), condition=tf.ones([7, 5])).shape
    TensorShape([7, 4, 4, 6])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int = 32,
        num_blocks: int = 3,
        kernel_size: int = 3,
        reverse: bool = False,
        condition_channels: int = 0,
        zero_init: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(inputs, outputs, condition_channels=condition_channels, seed=seed, **kwargs)
        self.width = width
        self.num_blocks = num_blocks
        self.kernel_size = kernel_size
        self.reverse = reverse
        self.zero_init = zero_init
        if width < inputs:
            raise ValueError(f"{self.name}: got width={width}, needs at least the number of channels, {inputs}")
        if num_blocks < 1:
            raise ValueError(f"{self.name}: got num_blocks={num_blocks}, needs at least 1")
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"{self.name}: got kernel_size={kernel_size}, needs an odd number of at least 3")
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={-1: inputs})
        seeds = seed_stream(seed)
        options = {"dtype": self.dtype_policy}
        channels = range(inputs)[::-1] if reverse else range(inputs)
        features = _spread(range(inputs), width)
        self.blocks = [
            GatedBlock(
                channels if first else features,
                features,
                kernel_size,
                first=first,
                condition_channels=condition_channels,
                seed=next(seeds),
                **options,
            )
            for first in [True] + [False] * (num_blocks - 1)
        ]
        last = "zeros" if zero_init else keras.initializers.GlorotUniform(seed=next(seeds))
        parameters = np.repeat(channels, parameters_per_entry(self)).tolist()
        self.last = MaskedDense(features, parameters, kernel_initializer=last, **options)
        self.built = True

    def call(self, x: tf.Tensor, condition: tf.Tensor | None = None) -> tf.Tensor:
        """The parameters `[N, H, W, outputs]` for `x` and `condition`."""
        condition = self._condition_like(x, condition)
        if self.reverse:
            x, condition = (None if image is None else ops.flip(image, axis=(1, 2)) for image in (x, condition))
        v = h = x
        for block in self.blocks:
            v, h = block(v, h, condition)
        y = self.last(ops.relu(h))
        return ops.flip(y, axis=(1, 2)) if self.reverse else y
