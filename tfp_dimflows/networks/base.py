"""What all conditioner networks share: their configuration, their sizes, their condition and their seeds."""

import itertools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from tfp_dimflows import representation


class Configured(representation.Described, keras.layers.Layer):
    """A layer whose configuration is its constructor's arguments, which it holds as attributes of the same names."""

    def get_config(self) -> dict:
        """The constructor's arguments."""
        own = {name: _plain(getattr(self, name)) for name in representation.signature_of(type(self)) if hasattr(self, name)}
        return {**super().get_config(), **own}


@representation.arguments.register
def _arguments(layer: Configured) -> dict[str, Any]:
    return {**representation.arguments.dispatch(object)(layer), "name": layer.name}


class Conditioner(Configured):
    """Base of the networks `(x, condition) -> parameters`.

    Channels are the last axis. A subclass creates and builds all its sublayers in its constructor, with
    `dtype=self.dtype_policy`, then sets `built`; so its variables exist before the first call.

    Args:
      inputs: number of channels of `x`.
      outputs: number of channels of the result.
      condition_channels: number of channels of the condition; 0: the network takes none.
      seed: integer for reproducible initial weights.
      **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.
    """

    def __init__(self, inputs: int, outputs: int, *, condition_channels: int = 0, seed: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.inputs = inputs
        self.outputs = outputs
        self.condition_channels = condition_channels
        self.seed = seed

    def _with_condition(self, x: tf.Tensor, condition: tf.Tensor | None) -> tf.Tensor:
        """Appends the condition's channels to those of `x`."""
        condition = self._condition_like(x, condition)
        return x if condition is None else ops.concatenate([x, condition], axis=-1)

    def _condition_like(self, x: tf.Tensor, condition: tf.Tensor | None) -> tf.Tensor | None:
        """The condition at the positions of `x`, or None if the network takes none.

        A vector is repeated at every position; an image of f times the height and width is squeezed, f x f positions to
        channels.
        """
        if condition is None:
            if self.condition_channels:
                raise ValueError(f"{self.name}: got no condition, needs one with {self.condition_channels} channels")
            return None
        if not self.condition_channels:
            raise ValueError(
                f"{self.name}: got a condition of shape {tuple(condition.shape)}, takes none (condition_channels=0)"
            )
        vector = (None, self.condition_channels)
        full = (None, *x.shape[1:-1], self.condition_channels)
        if not _matches(condition, full):
            if factor := self._squeeze_factor(condition, x):
                condition = tf.nn.space_to_depth(condition, factor)
            elif _matches(condition, vector):
                condition = ops.expand_dims(condition, tuple(range(1, len(full) - 1)))
                condition = ops.broadcast_to(condition, (*ops.shape(x)[:-1], self.condition_channels))
            else:
                needs = f"{full}" if full == vector else f"{vector} or {full}"
                raise ValueError(f"{self.name}: got a condition of shape {tuple(condition.shape)}, needs {needs}")
        return condition

    def _squeeze_factor(self, condition: tf.Tensor, x: tf.Tensor) -> int | None:
        """By how much a condition is larger than `x`, if it is an image that then has the right number of channels."""
        sizes = [*condition.shape[1:], *x.shape[1:-1]]
        if len(condition.shape) != 4 or len(x.shape) != 4 or None in sizes:
            return None
        height, width, channels, x_height, x_width = sizes
        factor = height // x_height
        fits = (height, width, channels * factor**2) == (factor * x_height, factor * x_width, self.condition_channels)
        return factor if fits else None


def _plain(value: Any) -> Any:
    """An argument as Keras's configurations have it."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, keras.initializers.Initializer):
        return keras.initializers.serialize(value)
    return keras.activations.serialize(value) if callable(value) else value


def _matches(tensor: tf.Tensor, shape: tuple[int | None, ...]) -> bool:
    return len(tensor.shape) == len(shape) and all(a == b or a is None or b is None for a, b in zip(tensor.shape, shape))


def seed_stream(seed: int | None) -> Iterator[int | None]:
    """Endless seeds derived from one, for one initialiser each; `None` stays `None`."""
    if seed is None:
        return itertools.repeat(None)
    generator = np.random.default_rng(seed)
    return (int(generator.integers(2**31)) for _ in itertools.count())
