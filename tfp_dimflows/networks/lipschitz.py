"""Layers and networks with a bounded Lipschitz constant: branches of invertible residual blocks."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tfp_dimflows.networks.base import Configured, seed_stream


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class LipSwish(keras.layers.Layer):
    """Swish with a trainable slope b, scaled to be 1-Lipschitz: x sigmoid(softplus(b) x) / 1.1.

    Unlike ReLU and ELU it has second derivatives everywhere, which the gradient of a residual block's log-det needs.

    Args:
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    References: Chen, Behrmann, Duvenaud, Jacobsen, "Residual flows for invertible generative modeling", 2019.

    #### Example

    >>> dimflows.networks.LipSwish()(tf.constant([0.0, 10.0])).numpy().round(2).tolist()
    [0.0, 9.09000015258789]
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.slope = self.add_weight(shape=(), initializer=keras.initializers.Constant(0.5), name="slope")
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The activations."""
        return x * ops.sigmoid(ops.softplus(self.slope) * x) / 1.1


class _Spectral(Configured):
    """Base of linear layers x -> A x + b whose operator A has a spectral norm of at most `coeff`.

    A = W / max(1, s / coeff) with s = u^T W v, u and v the leading singular vectors of the operator W: it is only ever shrunk.
    Power iteration keeps u and v up to date, `num_iterations` steps in every training call and until convergence in
    `converge`, which `FlowModel` calls before it evaluates; gradients pass s, but not the iteration.
    """

    def __init__(
        self,
        kernel_shape: tuple[int, ...],
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        coeff: float,
        num_iterations: int,
        seed: int | None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not 0.0 < coeff:
            raise ValueError(f"{self.name}: got coeff={coeff!r}, needs a positive bound")
        self.coeff, self.num_iterations, self.seed = coeff, num_iterations, seed
        seeds = seed_stream(seed)
        options = {"autocast": False, "trainable": False}
        self.kernel = self.add_weight(
            shape=kernel_shape, initializer=keras.initializers.GlorotUniform(next(seeds)), autocast=False, name="kernel"
        )
        self.bias = self.add_weight(shape=kernel_shape[-1:], initializer="zeros", name="bias")
        normal = keras.initializers.RandomNormal(stddev=1.0, seed=next(seeds))
        self.right = self.add_weight(shape=(1, *input_shape), initializer="zeros", name="right_singular_vector", **options)
        self.left = self.add_weight(shape=(1, *output_shape), initializer=normal, name="left_singular_vector", **options)
        self.built = True
        self.converge(max_iterations=50)

    def _apply(self, kernel: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError

    def _apply_transposed(self, kernel: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError

    def converge(self, tolerance: float = 1e-4, max_iterations: int = 1000) -> None:
        """Iterates until no entry of the singular vectors changes by more than `tolerance` times the largest."""

        def unfinished(step: tf.Tensor, right: tf.Tensor, left: tf.Tensor, change: tf.Tensor) -> tf.Tensor:
            return (step < max_iterations) & (change > tolerance)

        def iterate(
            step: tf.Tensor, right: tf.Tensor, left: tf.Tensor, change: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
            new_right, new_left = self._iterate(right, left)
            change = tf.reduce_max(tf.abs(new_right - right)) / tf.reduce_max(tf.abs(new_right))
            return step + 1, new_right, new_left, change

        start = [0, self.right.value, self.left.value, tf.ones([], self.right.dtype)]
        _, right, left, _ = tf.while_loop(unfinished, iterate, start)
        self.right.assign(right)
        self.left.assign(left)

    def _iterate(self, right: tf.Tensor, left: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        kernel = tf.stop_gradient(self.kernel.value)
        right = _normalized(self._apply_transposed(kernel, left), right)
        return right, _normalized(self._apply(kernel, right), left)

    def spectral_norm(self) -> tf.Tensor:
        """The present estimate s of the norm of W, from below."""
        return ops.sum(self.left * self._apply(ops.convert_to_tensor(self.kernel), self.right.value))

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """A x + b."""
        if training:
            right, left = self.right.value, self.left.value
            for _ in range(self.num_iterations):
                right, left = self._iterate(right, left)
            self.right.assign(right)
            self.left.assign(left)
        kernel = self.kernel / ops.maximum(1.0, self.spectral_norm() / self.coeff)
        y = self._apply(ops.cast(kernel, x.dtype), x)
        return y + self.bias


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class SpectralDense(_Spectral):
    """Dense layer whose matrix has a spectral norm of at most `coeff`.

    Maps `[N, inputs]` to `[N, outputs]`.

    Args:
      inputs: number of features of the input.
      outputs: number of features of the result.
      coeff: bound of the norm.
      num_iterations: steps of power iteration per training call.
      seed: integer for reproducible initial weights.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    References: Miyato, Kataoka, Koyama, Yoshida, "Spectral normalization for generative adversarial networks", 2018.

    #### Example

    >>> layer = dimflows.networks.SpectralDense(3, 4, coeff=0.9)
    >>> _ = layer.kernel.assign(10.0 * layer.kernel)
    >>> layer.converge()
    >>> operator = layer(tf.eye(3)) - layer(tf.zeros([3, 3]))
    >>> round(float(tf.linalg.svd(operator, compute_uv=False)[0]), 3)
    0.9
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        coeff: float = 0.9,
        num_iterations: int = 5,
        seed: int | None = None,
        **kwargs: Any,
    ):
        self.inputs, self.outputs = inputs, outputs
        super().__init__((inputs, outputs), (inputs,), (outputs,), coeff, num_iterations, seed, **kwargs)
        self.input_spec = keras.layers.InputSpec(ndim=2, axes={-1: inputs})

    def _apply(self, kernel: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        return x @ kernel

    def _apply_transposed(self, kernel: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return tf.matmul(y, kernel, transpose_b=True)


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class SpectralConv2D(_Spectral):
    """Convolution (stride 1, zeros around the image) whose operator on images has a spectral norm of at most `coeff`.

    The norm is that of the linear map between whole images, not of the kernel as a matrix.

    Maps `[N, H, W, inputs]` to `[N, H, W, outputs]`.

    Args:
      inputs: number of input channels.
      outputs: number of output channels.
      kernel_size: height and width of the kernel, odd.
      image_size: `(H, W)`.
      coeff: bound of the norm.
      num_iterations: steps of power iteration per training call.
      seed: integer for reproducible initial weights.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    References: Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible residual networks", 2019.

    #### Example

    >>> dimflows.networks.SpectralConv2D(3, 8, 3, (4, 4))(tf.ones([2, 4, 4, 3])).shape
    TensorShape([2, 4, 4, 8])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        image_size: Sequence[int],
        *,
        coeff: float = 0.9,
        num_iterations: int = 5,
        seed: int | None = None,
        **kwargs: Any,
    ):
        if kernel_size % 2 == 0:
            raise ValueError(f"SpectralConv2D: got kernel_size={kernel_size}, needs an odd size")
        self.inputs, self.outputs, self.kernel_size, self.image_size = inputs, outputs, kernel_size, tuple(image_size)
        kernel_shape = (kernel_size, kernel_size, inputs, outputs)
        operated_on = (1, 1) if kernel_size == 1 else self.image_size  # one pixel is as good as all
        shapes = (*operated_on, inputs), (*operated_on, outputs)
        super().__init__(kernel_shape, *shapes, coeff, num_iterations, seed, **kwargs)
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={1: image_size[0], 2: image_size[1], 3: inputs})

    def _apply(self, kernel: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        return tf.nn.conv2d(x, kernel, 1, "SAME")

    def _apply_transposed(self, kernel: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return tf.nn.conv2d(y, tf.transpose(kernel[::-1, ::-1], [0, 1, 3, 2]), 1, "SAME")


def lipschitz_mlp(
    dims: int,
    hidden: Sequence[int],
    *,
    activation: str = "lipswish",
    first_activation: bool = False,
    coeff: float = 0.9,
    num_iterations: int = 5,
    seed: int | None = None,
) -> keras.Sequential:
    """Contractive network of vectors: `SpectralDense` layers with 1-Lipschitz activations between them.

    Its Lipschitz constant is at most `coeff` to the power of the number of layers.

    Args:
      dims: size of the vectors.
      hidden: widths of the hidden layers.
      activation: `"lipswish"`, or a Keras activation that is 1-Lipschitz, such as `"elu"`.
      first_activation: whether an activation stands before the first layer.
      coeff: bound of each layer.
      num_iterations: as in `SpectralDense`.
      seed: integer for reproducible initial weights.

    #### Example

    >>> dimflows.networks.lipschitz_mlp(2, [16, 16])(tf.ones([5, 2])).shape
    TensorShape([5, 2])
    """
    seeds, sizes = seed_stream(seed), [dims, *hidden, dims]
    options: dict[str, Any] = {"coeff": coeff, "num_iterations": num_iterations}
    linear = [SpectralDense(a, b, seed=next(seeds), **options) for a, b in zip(sizes, sizes[1:])]
    return _alternating([dims], linear, activation, first_activation)


def lipschitz_conv(
    image_shape: Sequence[int],
    width: int,
    *,
    activation: str = "lipswish",
    first_activation: bool = True,
    coeff: float = 0.9,
    num_iterations: int = 5,
    seed: int | None = None,
) -> keras.Sequential:
    """Contractive network of images: 3x3, 1x1 and 3x3 `SpectralConv2D` with 1-Lipschitz activations before each.

    Its Lipschitz constant is at most `coeff^3`.

    Args:
      image_shape: `[H, W, C]`.
      width: channels of the hidden layers.
      activation: as in `lipschitz_mlp`.
      first_activation: whether an activation stands before the first layer.
      coeff: bound of each layer.
      num_iterations: as in `SpectralConv2D`.
      seed: integer for reproducible initial weights.

    #### Example

    >>> dimflows.networks.lipschitz_conv([4, 4, 3], width=8)(tf.ones([2, 4, 4, 3])).shape
    TensorShape([2, 4, 4, 3])
    """
    *image_size, channels = image_shape
    seeds = seed_stream(seed)
    options: dict[str, Any] = {"coeff": coeff, "num_iterations": num_iterations}
    sizes = ((channels, width, 3), (width, width, 1), (width, channels, 3))
    linear = [SpectralConv2D(*size, image_size, seed=next(seeds), **options) for size in sizes]
    return _alternating(image_shape, linear, activation, first_activation)


def _alternating(
    shape: Sequence[int], linear: Sequence[keras.Layer], activation: str, first_activation: bool
) -> keras.Sequential:
    layers = [keras.Input(shape)]
    for k, layer in enumerate(linear):
        if k or first_activation:
            layers.append(LipSwish() if activation == "lipswish" else keras.layers.Activation(activation))
        layers.append(layer)
    return keras.Sequential(layers)


def _normalized(x: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """Scales `x` to unit length; if it is zero, as for a kernel of zeros, `old`, from which iteration can recover."""
    norm = tf.norm(x)
    return tf.where(norm > 0.0, x / tf.where(norm > 0.0, norm, tf.ones_like(norm)), old)
