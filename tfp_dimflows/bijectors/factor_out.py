"""Factor-outs: what stays and what leaves of a level's output, by the cheapest means."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfp_dimflows.bijectors.reorder import flatten, inverse_permutation, permute_last, unflatten
from tfp_dimflows.bijectors.walk import Parts


class NoFactorOut:
    """A factor-out of no dimension."""

    @property
    def parts(self) -> Parts:
        """As of the other factor-outs."""
        return Parts(lambda h: (h, h[..., :0]), lambda kept, left: kept)


class FactorOut:
    """A factor-out as a constant permutation of a level's output, by the cheapest means: a slice, a gather of channels, or one
    of all dimensions.
    """

    def __init__(self, ids: np.ndarray, kept_ids: np.ndarray, left_ids: np.ndarray):
        self._shape, self._kept_shape, self._left_shape = ids.shape, kept_ids.shape, left_ids.shape
        self.order = _positions(ids, kept_ids, left_ids)
        self._by_channel = len(self._shape) == 1 or self._same_channels_everywhere()
        self._in_order = np.array_equal(self.order, np.arange(len(self.order)))

    def _same_channels_everywhere(self) -> bool:
        """Whether the split takes the same channels at every pixel; if so, the order becomes that of the channels."""
        if not self._shape[:-1] == self._kept_shape[:-1] == self._left_shape[:-1]:
            return False
        kept, left = np.split(self.order, [np.prod(self._kept_shape)])
        channels = np.concatenate([kept.reshape(self._kept_shape), left.reshape(self._left_shape)], axis=-1)
        channels = channels - np.arange(np.prod(self._shape)).reshape(self._shape)[..., :1]
        if (channels != channels[:1, :1]).any():
            return False
        self.order = channels[0, 0]
        return True

    @property
    def parts(self) -> Parts:
        """What stays and what leaves of a level's output."""
        return Parts(self.split, self.join)

    def split(self, h: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(kept, left)."""
        if self._by_channel:
            h = h if self._in_order else permute_last(h, self.order)
            return h[..., : self._kept_shape[-1]], h[..., self._kept_shape[-1] :]
        flat, size = permute_last(flatten(h, len(self._shape)), self.order), math.prod(self._kept_shape)
        return unflatten(flat[..., :size], self._kept_shape), unflatten(flat[..., size:], self._left_shape)

    def join(self, kept: tf.Tensor, left: tf.Tensor) -> tf.Tensor:
        """What `split` took apart."""
        if self._by_channel:
            h = tf.concat([kept, left], axis=-1)
            return h if self._in_order else permute_last(h, inverse_permutation(self.order))
        flat = tf.concat([flatten(part, len(self._shape)) for part in (kept, left)], axis=-1)
        return unflatten(permute_last(flat, inverse_permutation(self.order)), self._shape)


class OnlineFactorOut(FactorOut):
    """A factor-out whose permutation is a variable."""

    order: tf.Variable

    def __init__(self, ids: np.ndarray, kept_ids: np.ndarray, left_ids: np.ndarray):
        self._shape, self._kept_shape, self._left_shape = ids.shape, kept_ids.shape, left_ids.shape
        order = _positions(ids, kept_ids, left_ids)
        self.order = tf.Variable(order, dtype=tf.int32, trainable=False, name="split_order")
        self._by_channel, self._in_order = len(self._shape) == 1, False

    def assign(self, ids: np.ndarray, kept_ids: np.ndarray, left_ids: np.ndarray) -> None:
        """Makes it another split of the same shapes."""
        self.order.assign(_positions(ids, kept_ids, left_ids))

    def divide(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What stays and what leaves of the flat indices."""
        kept, left = np.split(ids.ravel()[self.order.numpy()], [np.prod(self._kept_shape)])
        return kept.reshape(self._kept_shape), left.reshape(self._left_shape)


def flat_latents(shapes: Sequence[tuple[int, ...]]) -> Parts:
    """Flat latent values made of parts of these shapes, one after the other."""

    def split(x: tf.Tensor) -> list[tf.Tensor]:
        return [unflatten(*part) for part in zip(tf.split(x, [math.prod(shape) for shape in shapes], axis=-1), shapes)]

    def join(*parts: tf.Tensor) -> tf.Tensor:
        return tf.concat([flatten(part, len(shape)) for part, shape in zip(parts, shapes)], axis=-1)

    return Parts(split, join)


def _positions(ids: np.ndarray, kept_ids: np.ndarray, left_ids: np.ndarray) -> np.ndarray:
    """Where in the flat grid of `ids` those that stay are, then those that leave."""
    position = {index: place for place, index in enumerate(ids.ravel().tolist())}
    return np.array([position[index] for part in (kept_ids, left_ids) for index in part.ravel().tolist()])
