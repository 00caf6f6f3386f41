"""Convolutional encoder and decoder of a variational autoencoder."""

import math
from collections.abc import Sequence

import keras

from tfp_dimflows.networks.base import seed_stream


def conv_encoder(event_shape: Sequence[int], outputs: int, *, width: int = 32, seed: int | None = None) -> keras.Sequential:
    """Network from images to vectors: three 3x3 convolutions with ReLU and a dense layer.

    The convolutions have C, `width` and `width` filters and strides 1, 2 and 2.

    Args:
      event_shape: `[H, W, C]` with H and W divisible by 4.
      outputs: size of the vector, for a Gaussian posterior twice the latent dimensions.
      width: filters.
      seed: integer for reproducible initial weights.

    Raises:
      ValueError: for another event shape.

    References: Das, Abbeel, Spanos, "Dimensionality reduction flows", 2019.

    #### Example

    >>> dimflows.networks.conv_encoder([8, 8, 1], outputs=6)(tf.ones([2, 8, 8, 1])).shape
    TensorShape([2, 6])
    """
    _quarter(event_shape, "conv_encoder")
    initializers = (keras.initializers.GlorotUniform(s) for s in seed_stream(seed))
    convolutions = [
        keras.layers.Conv2D(filters, 3, strides, "same", activation="relu", kernel_initializer=next(initializers))
        for filters, strides in ((event_shape[-1], 1), (width, 2), (width, 2))
    ]
    last = keras.layers.Dense(outputs, kernel_initializer=next(initializers))
    return keras.Sequential([keras.Input(event_shape), *convolutions, keras.layers.Flatten(), last], name="encoder")


def conv_decoder(event_shape: Sequence[int], inputs: int, *, width: int = 32, seed: int | None = None) -> keras.Sequential:
    """Network from vectors to images: dense to a quarter of height and width, two 3x3 transposed convolutions, a convolution.

    The transposed convolutions have `width` filters, stride 2 and ReLU.

    Args:
      event_shape: `[H, W, C]` with H and W divisible by 4.
      inputs: size of the vector.
      width: filters.
      seed: integer for reproducible initial weights.

    Raises:
      ValueError: for another event shape.

    References: Das, Abbeel, Spanos, "Dimensionality reduction flows", 2019.

    #### Example

    >>> dimflows.networks.conv_decoder([8, 8, 1], inputs=3)(tf.ones([2, 3])).shape
    TensorShape([2, 8, 8, 1])
    """
    small = (*_quarter(event_shape, "conv_decoder"), width)
    initializers = (keras.initializers.GlorotUniform(s) for s in seed_stream(seed))
    options = {"padding": "same", "activation": "relu"}
    return keras.Sequential(
        [
            keras.Input([inputs]),
            keras.layers.Dense(math.prod(small), activation="relu", kernel_initializer=next(initializers)),
            keras.layers.Reshape(small),
            keras.layers.Conv2DTranspose(width, 3, 2, kernel_initializer=next(initializers), **options),
            keras.layers.Conv2DTranspose(width, 3, 2, kernel_initializer=next(initializers), **options),
            keras.layers.Conv2D(event_shape[-1], 3, padding="same", kernel_initializer=next(initializers)),
        ],
        name="decoder",
    )


def _quarter(event_shape: Sequence[int], name: str) -> tuple[int, int]:
    if len(event_shape) != 3 or event_shape[0] % 4 or event_shape[1] % 4:
        raise ValueError(f"{name}: got event shape {list(event_shape)}, needs an image with height and width divisible by 4")
    return event_shape[0] // 4, event_shape[1] // 4
