"""Which part of an event a coupling conditions on, and which part it transforms.

A mask has `event_ndims` and four methods: `split(x) -> (conditioning, transformed)`, `join(conditioning, transformed) -> x`,
`select(parameters)`, which silences the network's outputs for dimensions that are not transformed, and `complement()`, the
mask with the two roles swapped. `sizes(channels)` gives the size of the last axis of both parts.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tensorflow as tf

from tfp_dimflows import representation
from tfp_dimflows.bijectors import base, reorder


class Mask(Protocol):
    """What a coupling needs of its mask: those of this module have it, and any other class may.

    #### Example

    >>> class First:  # conditions on the first entry of a vector
    ...     event_ndims = 1
    ...
    ...     def split(self, x):
    ...         return x[..., :1], x[..., 1:]
    ...
    ...     def join(self, conditioning, transformed):
    ...         return tf.concat([conditioning, transformed], axis=-1)
    ...
    ...     def select(self, parameters):
    ...         return parameters
    >>> dfb.AdditiveCoupling(lambda x: tf.repeat(x, 2, axis=-1), First()).inverse([1.0, 2.0, 3.0]).numpy()
    array([1., 3., 4.], dtype=float32)
    """

    @property
    def event_ndims(self) -> int:
        """Number of event axes: 1 for vectors, 3 for images."""

    def split(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The conditioning and the transformed part of events."""

    def join(self, conditioning: tf.Tensor, transformed: tf.Tensor) -> tf.Tensor:
        """The events with these parts."""

    def select(self, parameters: tf.Tensor) -> tf.Tensor:
        """Silences parameters `transformed part + [params_per_dim]` of dimensions that are not transformed."""


class Checkerboard(representation.Described):
    """Conditions on the pixels of an image with (row + column) even (`parity=0`) or odd (`parity=1`), in every channel.

    Both parts keep the full resolution, with zeros where the other part's pixels are.

    #### Example

    >>> dfb.masks.Checkerboard().split(tf.ones([2, 2, 1]))[0].numpy()[..., 0]
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    """

    event_ndims = 3

    def __init__(self, parity: int = 0):
        if parity not in (0, 1):
            raise ValueError(f"Checkerboard: got parity={parity!r}, needs 0 or 1")
        self.parity = parity

    def complement(self) -> "Checkerboard":
        """The other colour."""
        return Checkerboard(1 - self.parity)

    def sizes(self, channels: int) -> tuple[int, int]:
        """Size of the last axis of the conditioning and of the transformed part."""
        return channels, channels

    def array(self, height: int, width: int) -> np.ndarray:
        """`[H, W, 1]` booleans: True where the mask conditions."""
        return (np.add.outer(np.arange(height), np.arange(width)) % 2 == self.parity)[..., np.newaxis]

    def split(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The two colours, each in the full shape, zero elsewhere."""
        conditions, zeros = self._conditions(x.shape[-3:]), tf.zeros([], x.dtype)
        return tf.where(conditions, x, zeros), tf.where(conditions, zeros, x)

    def join(self, conditioning: tf.Tensor, transformed: tf.Tensor) -> tf.Tensor:
        """Puts the two colours together."""
        return tf.where(self._conditions(conditioning.shape[-3:]), conditioning, transformed)

    def select(self, parameters: tf.Tensor) -> tf.Tensor:
        """Zeros for the pixels that are not transformed, so that no gradient flows there."""
        conditions = self._conditions(parameters.shape[-4:-1])[..., tf.newaxis]
        return tf.where(conditions, tf.zeros([], parameters.dtype), parameters)

    def _conditions(self, event_shape: tf.TensorShape) -> tf.Tensor:
        height, width, _ = _static(event_shape, 3, "Checkerboard")
        return tf.constant(self.array(height, width))


class Channel(representation.Described):
    """Conditions on the first half of the last axis (`flip=True`: the second half) and transforms the other half.

    Args:
      flip: whether to condition on the second half.
      event_ndims: 3 for images, 1 for vectors.
      num_conditioning: size of the conditioning part, default: exactly half.

    #### Example

    >>> [part.numpy().tolist() for part in dfb.masks.Channel(event_ndims=1).split(tf.range(4.0))]
    [[0.0, 1.0], [2.0, 3.0]]
    """

    def __init__(self, flip: bool = False, event_ndims: int = 3, num_conditioning: int | None = None):
        self.flip = flip
        self.event_ndims = base.event_ndims_static(event_ndims, "Channel")
        self.num_conditioning = num_conditioning

    def complement(self) -> "Channel":
        """The other half; the part sizes stay those of the positions."""
        if self.num_conditioning is not None:
            raise ValueError("Channel: the complement of a mask with num_conditioning is not unique; construct it")
        return Channel(not self.flip, self.event_ndims)

    def sizes(self, channels: int) -> tuple[int, int]:
        """Size of the last axis of the conditioning and of the transformed part."""
        conditioning = channels // 2 if self.num_conditioning is None else self.num_conditioning
        if self.num_conditioning is None and channels % 2:
            raise ValueError(f"Channel: {channels} channels are not divisible into halves; pass num_conditioning")
        if not 0 < conditioning < channels:
            raise ValueError(f"Channel: got num_conditioning={conditioning} of {channels} channels, needs both parts non-empty")
        return conditioning, channels - conditioning

    def split(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The two halves."""
        sizes = self.sizes(_static(x.shape[-1:], 1, "Channel")[0])
        order = -1 if self.flip else 1
        return tuple(tf.split(x, sizes[::order], axis=-1)[::order])

    def join(self, conditioning: tf.Tensor, transformed: tf.Tensor) -> tf.Tensor:
        """Concatenates the halves."""
        return tf.concat([transformed, conditioning] if self.flip else [conditioning, transformed], axis=-1)

    def select(self, parameters: tf.Tensor) -> tf.Tensor:
        """The parameters as they are."""
        return parameters


class Columns(representation.Described):
    """Conditions on the even columns of an image (`parity=1`: the odd ones) and transforms the others (Flow++).

    Both parts are `[H, W/2, C]`.

    #### Example

    >>> dfb.masks.Columns().split(tf.reshape(tf.range(4.0), [1, 4, 1]))[0].numpy().ravel()
    array([0., 2.], dtype=float32)
    """

    event_ndims = 3

    def __init__(self, parity: int = 0):
        if parity not in (0, 1):
            raise ValueError(f"Columns: got parity={parity!r}, needs 0 or 1")
        self.parity = parity

    def complement(self) -> "Columns":
        """The other columns."""
        return Columns(1 - self.parity)

    def sizes(self, channels: int) -> tuple[int, int]:
        """Size of the last axis of the conditioning and of the transformed part."""
        return channels, channels

    def split(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Even and odd columns."""
        _, width, _ = _static(x.shape[-3:], 3, "Columns")
        if width % 2:
            raise ValueError(f"Columns: width {width} is not divisible by 2")
        return x[..., self.parity :: 2, :], x[..., 1 - self.parity :: 2, :]

    def join(self, conditioning: tf.Tensor, transformed: tf.Tensor) -> tf.Tensor:
        """Interleaves the columns."""
        pair = [transformed, conditioning] if self.parity else [conditioning, transformed]
        stacked = tf.stack(pair, axis=-2)
        shape = tf.concat([tf.shape(conditioning)[:-2], [2 * conditioning.shape[-2], conditioning.shape[-1]]], axis=0)
        joined = tf.reshape(stacked, shape)
        joined.set_shape(conditioning.shape[:-2].concatenate([2 * conditioning.shape[-2], conditioning.shape[-1]]))
        return joined

    def select(self, parameters: tf.Tensor) -> tf.Tensor:
        """The parameters as they are."""
        return parameters


class Index(representation.Described):
    """Conditions on the listed entries of a vector and transforms the others.

    Args:
      indices: the conditioning entries, each once.
      size: length of the vector.

    Raises:
      ValueError: if indices repeat, are out of range, or leave a part empty.

    #### Example

    >>> [part.numpy().tolist() for part in dfb.masks.Index([2, 0], 3).split(tf.constant([5.0, 6.0, 7.0]))]
    [[5.0, 7.0], [6.0]]
    """

    event_ndims = 1

    def __init__(self, indices: Sequence[int], size: int):
        chosen = np.unique(np.asarray(indices, dtype=np.int64))
        if len(chosen) != len(indices) or not 0 < len(chosen) < size or chosen[0] < 0 or chosen[-1] >= size:
            raise ValueError(f"Index: got indices {list(indices)}, needs distinct numbers below {size}, some but not all")
        self.size = size
        self._indices = chosen
        self._order = np.concatenate([chosen, np.setdiff1d(np.arange(size), chosen)])

    def complement(self) -> "Index":
        """Conditions on the entries that this mask transforms."""
        return Index(self._order[len(self._indices) :], self.size)

    def sizes(self, channels: int) -> tuple[int, int]:
        """Size of the conditioning and of the transformed part."""
        if channels != self.size:
            raise ValueError(f"Index: got a vector of {channels} dimensions, this mask is for {self.size}")
        return len(self._indices), self.size - len(self._indices)

    def split(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The listed entries and the others, each in ascending order."""
        sizes = self.sizes(_static(x.shape[-1:], 1, "Index")[0])
        return tuple(tf.split(reorder.permute_last(x, self._order), sizes, axis=-1))

    def join(self, conditioning: tf.Tensor, transformed: tf.Tensor) -> tf.Tensor:
        """Puts every entry back in its place."""
        return reorder.permute_last(tf.concat([conditioning, transformed], axis=-1), np.argsort(self._order))

    def select(self, parameters: tf.Tensor) -> tf.Tensor:
        """The parameters as they are."""
        return parameters


def _static(event_shape: tf.TensorShape, rank: int, name: str) -> tf.TensorShape:
    if event_shape.rank != rank or not event_shape.is_fully_defined():
        raise ValueError(f"{name}: got an event of shape {event_shape}, needs {rank} static axes")
    return event_shape
