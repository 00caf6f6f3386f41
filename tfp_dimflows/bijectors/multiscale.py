"""`Multiscale`: a flow that dimensions leave level by level."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows.bijectors import base, per_dimension, reorder
from tfp_dimflows.bijectors.chain import Chain
from tfp_dimflows.bijectors.factorization import DimensionFactorization, OnlineFactorization
from tfp_dimflows.upstream import prefer_static as ps


class Multiscale(base.FlowBijector):
    """Multi-scale flow between a flat latent vector `[D]` and an event, an image `[H, W, C]` or a vector `[D]`.

    From data to latent, level k transforms the dimensions still in the flow; then those that `factorization` names leave, and
    level k + 1 sees only the others:

        h_0 = y,   g_k = level_k.inverse(h_k),   g_k = (kept h_{k+1}, left z_k),   x = [h_last, ..., z_1, z_0]

    The latent is ordered deepest level first, so `x[..., :k]` is a low-dimensional code. Dimensions that left are in no later
    tensor. The inverse log-det of a dimension sums what every level it passes contributes, carried back to the data's frame.

    Args:
      levels: bijectors, the finest (nearest to the data) first. A level may change the shape (by a squeeze, say), but must
        keep every dimension: what it moves, it must transport (see `dfb.FlowBijector`).
      factorization: a `DimensionFactorization` for the event and the number of levels; an `OnlineFactorization`, which is
        decided in training and saved with the weights; or None: nothing leaves (the non-multi-scale model of LCMA's
        pre-training).
      exits: optional conditional bijectors, one per factor-out: from data to latent the dimensions that leave pass through it
        with those that stay as `condition` (Glow's learned split prior). One more may be given for the deepest part, with zeros
        of its shape as the condition. Bijectors, or None for no exit.
      event_shape: the event's shape; needed for images if `factorization` is None.
      validate_args: as in `tfb.Bijector`.
      parameters: the arguments of a subclass's constructor.
      name: the name of the operations.

    Raises:
      ValueError: if levels, exits, factorization and event shape do not fit each other, or the data does not fit them.

    References: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017; Kingma, Dhariwal, "Glow", 2018.

    #### Example

    >>> factorization = dfb.DimensionFactorization.checkerboard([4, 4, 1], num_levels=2)
    >>> flow = dfb.Multiscale([tfb.Scale(2.0), tfb.Scale(3.0)], factorization)
    >>> image = tf.ones([4, 4, 1])
    >>> flow.inverse(image).shape, flow.inverse(image).numpy()[[0, -1]].round(3).tolist()
    (TensorShape([16]), [0.16699999570846558, 0.5])
    """

    def __init__(
        self,
        levels: Sequence[tfb.Bijector],
        factorization: DimensionFactorization | OnlineFactorization | None = None,
        exits: Sequence[tfb.Bijector | None] | None = None,
        event_shape: Sequence[int] | None = None,
        validate_args: bool = False,
        parameters: dict | None = None,
        name: str = "multiscale",
    ):
        parameters = dict(locals()) if parameters is None else parameters
        if not levels:
            raise ValueError("Multiscale: got no levels, needs at least one")
        self._levels = list(levels)
        self._online = factorization if isinstance(factorization, OnlineFactorization) else None
        self._factorization = factorization.initial if isinstance(factorization, OnlineFactorization) else factorization
        self._event_shape = _static_event_shape(self._levels, self._factorization, event_shape)
        self._exits = _checked_exits(exits, len(self._levels), self._factorization)
        self._deepest_shape: tuple[int, ...] | None = None
        self._part_shapes: tuple[tuple[int, ...], ...] | None = None
        if self._event_shape is not None:
            self._lay_out(self._event_shape)
        super().__init__(
            forward_min_event_ndims=1,
            inverse_min_event_ndims=1 if self._event_shape is None else len(self._event_shape),
            validate_args=validate_args,
            parameters=parameters,
            name=name,
        )

    def _lay_out(self, event_shape: tuple[int, ...]) -> None:
        """Follows the flat indices of the event's dimensions through the levels."""
        grids, order = self._follow(self._factorization, event_shape)
        self._deepest_shape = tuple(grids[-1].shape)
        if self._online is None:
            splits = [_Split(*parts) for parts in self._partitions(grids, self._factorization)]
            # Saved with the weights, so that weights trained with another factorization are noticed.
            self._dimension_order = tf.Variable(order, dtype=tf.int32, trainable=False, name="dimension_order")
            self._latent_order = self._no_dependency(order)
        else:
            self._num_decided = tf.Variable(0, dtype=tf.int32, trainable=False, name="num_decided")
            splits = [_OnlineSplit(*parts) for parts in self._partitions(grids, self._factorization)]
            self._split_orders = [split.order for split in splits]
            self._latent_order = tf.Variable(order, dtype=tf.int32, trainable=False, name="latent_order")
        self._splits = self._no_dependency(splits)

    def _follow(
        self, factorization: DimensionFactorization | None, event_shape: tuple[int, ...]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The flat indices of the event's dimensions at the end of every level, and in the order of the latent values."""
        grids, parts = [], []
        ids = np.arange(np.prod(event_shape)).reshape(event_shape)
        for k, level in enumerate(self._levels):
            moved = _transport_ids(level, ids)
            if not np.array_equal(np.sort(moved.ravel()), np.sort(ids.ravel())):
                raise ValueError(
                    f"Multiscale: level {k} ({level.name}) moves {ids.size} dimensions to {moved.shape}, must keep all"
                )
            if moved.ndim != len(event_shape):
                grid = (1,) * (len(event_shape) - 1) + (moved.size,)
                self._levels[k] = Chain([level, tfb.Reshape(event_shape_out=moved.shape, event_shape_in=grid)])
                moved = moved.reshape(grid)
            ids = moved
            grids.append(ids)
            if factorization is not None and k < len(self._levels) - 1:
                parts.append(_transport_ids(self._exits[k], factorization.left[k]))
                ids = factorization.kept[k]
        parts.append(_transport_ids(self._exits[-1], ids))
        parts.reverse()
        self._part_shapes = tuple(part.shape for part in parts)
        return grids, np.concatenate([part.ravel() for part in parts])

    def _partitions(
        self, grids: list[np.ndarray], factorization: DimensionFactorization | None
    ) -> list[tuple[np.ndarray, ...]]:
        return [] if factorization is None else list(zip(grids, factorization.kept, factorization.left))

    @property
    def levels(self) -> list[tfb.Bijector]:
        """The levels, finest first."""
        return list(self._levels)

    @property
    def factorization(self) -> DimensionFactorization | None:
        """Which dimensions leave after each level; if it is decided in training, the present one."""
        return self._factorization if self._online is None else self._present(self._online)

    def _present(self, online: OnlineFactorization) -> DimensionFactorization:
        """The present state of a factorization that is decided in training."""
        kept, left, ids = [], [], np.arange(np.prod(online.event_shape)).reshape(online.event_shape)
        for level, split in zip(self._levels, self._splits):
            stay, leave = split.parts(_transport_ids(level, ids))
            kept.append(stay)
            left.append(leave)
            ids = stay
        return DimensionFactorization(online.event_shape, kept, left)

    @property
    def is_online(self) -> bool:
        """Whether the factorization is an `OnlineFactorization`."""
        return self._online is not None

    @property
    def num_decided(self) -> int:
        """How many factor-outs are final: all, but with an `OnlineFactorization` those that `decide` has been called for."""
        return int(self._num_decided) if self.is_online else len(self._levels) - 1

    def decide(self, contributions: ArrayLike) -> None:
        """Decides the next factor-out of an `OnlineFactorization`.

        It becomes final. The later ones follow the same statistic until they are decided themselves. Levels keep their
        variables: those up to this factor-out see what they saw, later ones see other dimensions. Densities before and after
        are different ones, each exact.

        Args:
          contributions: of every dimension, an array of the event's shape, as one of `dimflows.likelihood_contributions`.

        Raises:
          ValueError: if there is no `OnlineFactorization`, all factor-outs are decided, or as
            `DimensionFactorization.from_contributions`; then nothing has changed.
        """
        if self._online is None:
            raise ValueError(f"{self.name}: got the factorization {self._factorization!r}, decide needs an OnlineFactorization")
        decided = self.num_decided
        if decided == len(self._splits):
            raise ValueError(f"{self.name}: all {decided} factor-outs are decided already")
        self._assign(self._online.decide(self._present(self._online), decided, contributions), decided + 1)

    def _assign(self, factorization: DimensionFactorization, num_decided: int) -> None:
        grids, order = self._follow(factorization, factorization.event_shape)
        for split, parts in zip(self._splits, self._partitions(grids, factorization)):
            split.assign(*parts)
        self._latent_order.assign(order)
        self._num_decided.assign(num_decided)

    def copy(self, **override_parameters_kwargs: Any) -> "Multiscale":
        """As `tfb.Bijector.copy`, with the present factorization."""
        copy = super().copy(**override_parameters_kwargs)
        if self.is_online and copy._online is self._online:
            copy._assign(self.factorization, self.num_decided)
        return copy

    def split_latent(self, x: tf.Tensor) -> list[tf.Tensor]:
        """Splits flat latent values `[..., D]` into the parts that left at each level, the deepest first."""
        return tf.split(x, self._part_sizes(x), axis=-1)

    def join_latent(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        """Joins the parts of `split_latent` to flat latent values `[..., D]`."""
        return tf.concat(list(parts), axis=-1)

    def event_layout(self) -> tfb.Bijector:
        """Bijector to flat latent values from those laid out as the event, each in its dimension's place.

        Raises:
          ValueError: if the event's shape is not known.
        """
        if self._event_shape is None:
            raise ValueError(f"{self.name}: the layout of the event needs event_shape")
        flatten = tfb.Reshape(event_shape_out=[int(np.prod(self._event_shape))], event_shape_in=self._event_shape)
        return tfb.Chain([tfb.Permute(self._latent_order), flatten])

    def likelihood_contributions(self, y: tf.Tensor, condition: Any = None) -> list[tf.Tensor]:
        """Cumulative inverse log-det of every dimension at each factor-out: `num_levels - 1` tensors of the shape of `y`.

        The k-th sums what levels 0 to k contribute to a dimension (fewer if it left before), in the data's frame; exits do not
        count.
        """
        y = self._checked_event(tf.convert_to_tensor(y))
        _, steps = self._walk_inverse(y, self._route(condition, {}), len(self._levels) - 1)
        steps = [(log_det, kept, None if left is None else tf.zeros_like(left)) for log_det, kept, left in steps]
        return [self._carry_to_data([*steps[:k], (log_det, None, None)]) for k, (log_det, _, _) in enumerate(steps)]

    def level_log_prob(self, y: tf.Tensor, condition: Any = None, noise: tfd.Distribution | None = None) -> tf.Tensor:
        """Log-density of events as one term for each level; their sum is the log-density of `noise` after this flow.

            term k = log p(z_k) + inverse log-det of level k + that of its exit

        with z_k the latent values of the dimensions that leave after level k; for a level that none leaves, the log-det alone.

        Args:
          y: events, `batch + event`.
          condition: as in `inverse`.
          noise: distribution of the flat latent values, with independent dimensions: a `tfd.Sample` or a `tfd.Independent` of
            scalar ones; None: standard normal.

        Returns:
          `batch + [number of levels]`, the finest first.

        Raises:
          ValueError: for another noise, or another event shape.

        #### Example

        >>> flow = dfb.Multiscale([tfb.Scale(2.0), tfb.Identity()], dfb.DimensionFactorization.channels([4], num_levels=2))
        >>> flow.level_log_prob(tf.ones([4])).numpy().round(3)
        array([-4.86 , -2.088], dtype=float32)
        """
        y = self._checked_event(base.to_tensor(y, self.forward_dtype()))
        parts, log_dets = self._walk_levels(y, self._route(condition, {}), self.inverse_min_event_ndims)
        x = self.join_latent([part for part in parts[::-1] if part is not None])
        by_part = iter(self.split_latent(_log_prob_per_dim(noise, x, self.name))[::-1])
        terms = [d if part is None else d + tf.reduce_sum(next(by_part), axis=-1) for part, d in zip(parts, log_dets)]
        return tf.stack(terms, axis=-1)

    @property
    def _uses_condition(self) -> bool:
        return any(per_dimension.condition_kwargs(level, True) for level in self._levels)

    # Data to latent.

    def _inverse_and_log_det(self, y: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        parts, log_dets = self._walk_levels(self._checked_event(y), condition, event_ndims)
        return self.join_latent([part for part in parts[::-1] if part is not None]), sum(log_dets)

    def _walk_levels(self, h: tf.Tensor, condition: Any, event_ndims: int) -> tuple[list, list]:
        """For each level, the flat latent values of what leaves after it (or None), and its summed log-det with its exit's."""
        parts, log_dets = [], []
        for k, level in enumerate(self._levels):
            kwargs = per_dimension.condition_kwargs(level, condition)
            h, log_det = per_dimension.inverse_and_log_det(level, h, event_ndims, **kwargs)
            h, left, given = self._release(k, h)
            if left is not None and self._exits[k] is not None:
                left, exit_log_det = self._exit(per_dimension.inverse_and_log_det, k, given, left, event_ndims)
                log_det = log_det + exit_log_det
            parts.append(None if left is None else self._to_vector(left))
            log_dets.append(log_det)
        return parts, log_dets

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        x, steps = self._walk_inverse(self._checked_event(y), condition, len(self._levels))
        return x, self._carry_to_data(steps)

    def _walk_inverse(self, h: tf.Tensor, condition: Any, num_levels: int) -> tuple[tf.Tensor, list[tuple]]:
        """Latent values, and per level: its log-det, the kept tensor, and the log-det of what left."""
        parts, steps = [], []
        for k, level in enumerate(self._levels[:num_levels]):
            argument = h
            kwargs = per_dimension.condition_kwargs(level, condition)
            h, log_det = per_dimension.inverse_and_log_det_per_dim(level, h, **kwargs)
            log_det, left_log_det = base._fill(log_det, argument), None
            h, left, given = self._release(k, h)
            if left is not None:
                left_log_det = tf.zeros_like(left, log_det.dtype)
                if self._exits[k] is not None:
                    argument = left
                    left, left_log_det = self._exit(per_dimension.inverse_and_log_det_per_dim, k, given, left)
                    left_log_det = base._fill(left_log_det, argument)
                parts.append(self._to_vector(left))
            steps.append((log_det, h, left_log_det))
        return self.join_latent(parts[::-1]) if parts else None, steps

    def _carry_to_data(self, steps: list[tuple]) -> tf.Tensor:
        """Sums the log-dets of `_walk_inverse` in the frame of the data."""
        total = None
        for k, (log_det, kept, left_log_det) in reversed(list(enumerate(steps))):
            if left_log_det is not None and kept is None:
                total = left_log_det
            elif left_log_det is not None:
                total = tf.zeros_like(kept, log_det.dtype) if total is None else total
                total = self._splits[k].join(total, left_log_det)
            total = log_det if total is None else log_det + per_dimension.transport_forward(self._levels[k], total)
        return total

    # Latent to data.

    def _forward_and_log_det(self, x: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        parts, h, log_dets = self.split_latent(self._checked_latent(x)), None, []
        event_ndims = event_ndims - 1 + self.inverse_min_event_ndims
        for k in reversed(range(len(self._levels))):
            left, given = self._recall(k, h, parts)
            if left is not None and self._exits[k] is not None:
                left, log_det = self._exit(per_dimension.forward_and_log_det, k, given, left, event_ndims)
                log_dets.append(log_det)
            h = self._rejoin(k, h, left)
            kwargs = per_dimension.condition_kwargs(self._levels[k], condition)
            h, log_det = per_dimension.forward_and_log_det(self._levels[k], h, event_ndims, **kwargs)
            log_dets.append(log_det)
        return h, sum(log_dets)

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        parts, h, steps = self.split_latent(self._checked_latent(x)), None, []
        for k in reversed(range(len(self._levels))):
            left, given = self._recall(k, h, parts)
            exit_log_det = None
            if left is not None and self._exits[k] is not None:
                argument = left
                left, exit_log_det = self._exit(per_dimension.forward_and_log_det_per_dim, k, given, left)
                exit_log_det = base._fill(exit_log_det, argument)
            h = argument = self._rejoin(k, h, left)
            kwargs = per_dimension.condition_kwargs(self._levels[k], condition)
            h, log_det = per_dimension.forward_and_log_det_per_dim(self._levels[k], h, **kwargs)
            steps.append((k, base._fill(log_det, argument), exit_log_det))
        return h, self._carry_to_latent(steps[::-1])

    def _carry_to_latent(self, steps: list[tuple]) -> tf.Tensor:
        total, parts = None, []
        for k, log_det, exit_log_det in steps:
            if total is not None:
                log_det = log_det + per_dimension.transport_inverse(self._levels[k], total)
            total, left, _ = self._release(k, log_det)
            if left is not None:
                if exit_log_det is not None:
                    left = per_dimension.transport_inverse(self._exits[k], left) + exit_log_det
                parts.append(self._to_vector(left))
        return self.join_latent(parts[::-1])

    # What leaves, and what comes back.

    def _exit(self, fused: Callable, k: int, given: Any, left: tf.Tensor, *event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        return fused(self._exits[k], left, *event_ndims, **per_dimension.condition_kwargs(self._exits[k], given))

    def _release(self, k: int, h: tf.Tensor) -> tuple:
        """(what stays or None, what leaves or None, what the exit of the leaving part is given)."""
        if k == len(self._levels) - 1:
            return None, h, tf.zeros_like(h)
        if self._factorization is None:
            return h, None, None
        kept, left = self._splits[k].split(h)
        return kept, left, kept

    def _recall(self, k: int, h: Any, parts: list[tf.Tensor]) -> tuple:
        """(what left at level k in its own shape or None, what its exit was given)."""
        if h is not None and self._factorization is None:
            return None, None
        index = len(self._levels) - 1 - k
        part = parts[index] if self._part_shapes is None else self._to_grid(parts[index], self._part_shapes[index])
        return part, tf.zeros_like(self._to_grid(parts[0], self._deepest_shape)) if h is None else h

    def _rejoin(self, k: int, h: Any, left: Any) -> tf.Tensor:
        if h is None:
            return left
        return h if left is None else self._splits[k].join(h, left)

    def _to_vector(self, h: tf.Tensor) -> tf.Tensor:
        if self.inverse_min_event_ndims == 1:
            return h
        return tf.reshape(h, ps.concat([ps.shape(h)[:-3], [np.prod(h.shape[-3:])]], axis=0))

    def _to_grid(self, part: tf.Tensor, shape: tuple[int, ...] | None) -> tf.Tensor:
        if self.inverse_min_event_ndims == 1:
            return part
        return tf.reshape(part, ps.concat([ps.shape(part)[:-1], shape], axis=0))

    def _transport_inverse(self, per_dim: tf.Tensor) -> tf.Tensor:
        if self._event_shape is None:
            for part in self._undivided():
                per_dim = per_dimension.transport_inverse(part, per_dim)
            return per_dim
        return tf.gather(self._to_vector(per_dim), self._latent_order, axis=-1)

    def _transport_forward(self, per_dim: tf.Tensor) -> tf.Tensor:
        if self._event_shape is None:
            for part in reversed(self._undivided()):
                per_dim = per_dimension.transport_forward(part, per_dim)
            return per_dim
        return self._to_grid(tf.gather(per_dim, reorder.inverse_permutation(self._latent_order), axis=-1), self._event_shape)

    def _undivided(self) -> list[tfb.Bijector]:
        """All parts of a model that nothing leaves, from data to latent."""
        return self._levels if self._exits[-1] is None else [*self._levels, self._exits[-1]]

    # Shapes.

    def _part_sizes(self, x: tf.Tensor) -> list[int]:
        return [x.shape[-1]] if self._part_shapes is None else [int(np.prod(shape)) for shape in self._part_shapes]

    def _checked_event(self, y: tf.Tensor) -> tf.Tensor:
        if self._event_shape is not None and tuple(y.shape[-len(self._event_shape) :]) != self._event_shape:
            raise ValueError(f"{self.name}: got data of shape {y.shape}, needs events of shape {list(self._event_shape)}")
        return y

    def _checked_latent(self, x: tf.Tensor) -> tf.Tensor:
        if self._event_shape is not None and x.shape[-1] != np.prod(self._event_shape):
            raise ValueError(
                f"{self.name}: got latent values of shape {x.shape}, needs {np.prod(self._event_shape)} dimensions"
            )
        return x

    def _forward_event_shape(self, shape: tf.TensorShape) -> tf.TensorShape:
        return tf.TensorShape(shape if self._event_shape is None else self._event_shape)

    def _inverse_event_shape(self, shape: tf.TensorShape) -> tf.TensorShape:
        return tf.TensorShape(shape if self._event_shape is None else [np.prod(self._event_shape)])

    def _forward_event_shape_tensor(self, shape: tf.Tensor) -> tf.Tensor:
        return shape if self._event_shape is None else tf.constant(self._event_shape, tf.int32)

    def _inverse_event_shape_tensor(self, shape: tf.Tensor) -> tf.Tensor:
        return shape if self._event_shape is None else tf.constant([np.prod(self._event_shape)], tf.int32)


def _log_prob_per_dim(noise: tfd.Distribution | None, x: tf.Tensor, name: str) -> tf.Tensor:
    """The log-density of every dimension of flat latent values."""
    if noise is None:
        dtype = base.log_det_dtype(x.dtype)
        return tfd.Normal(tf.zeros([], dtype), tf.ones([], dtype)).log_prob(tf.cast(x, dtype))
    is_known = isinstance(noise, (tfd.Sample, tfd.Independent)) and noise.distribution.event_shape.rank == 0
    if not (is_known and noise.event_shape == x.shape[-1:]):
        raise ValueError(
            f"{name}: got the noise {noise!r}, needs a tfd.Sample or tfd.Independent of scalar distributions with event shape "
            f"{x.shape[-1:]}, whose log-density is a sum over dimensions"
        )
    return noise.distribution.log_prob(tf.cast(x, noise.dtype))


def _transport_ids(bijector: tfb.Bijector | None, ids: np.ndarray) -> np.ndarray:
    if bijector is None:
        return ids
    with tf.init_scope():
        return per_dimension.transport_inverse(bijector, tf.constant(ids, tf.int64)).numpy()


class _Split:
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

    def split(self, h: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(kept, left)."""
        if self._by_channel:
            h = h if self._in_order else reorder.permute_last(h, self.order)
            return h[..., : self._kept_shape[-1]], h[..., self._kept_shape[-1] :]
        batch = ps.shape(h)[: -len(self._shape)]
        flat = reorder.permute_last(tf.reshape(h, ps.concat([batch, [-1]], axis=0)), self.order)
        size = int(np.prod(self._kept_shape))
        kept = tf.reshape(flat[..., :size], ps.concat([batch, self._kept_shape], axis=0))
        return kept, tf.reshape(flat[..., size:], ps.concat([batch, self._left_shape], axis=0))

    def join(self, kept: tf.Tensor, left: tf.Tensor) -> tf.Tensor:
        """What `split` took apart."""
        if self._by_channel:
            h = tf.concat([kept, left], axis=-1)
            return h if self._in_order else reorder.permute_last(h, reorder.inverse_permutation(self.order))
        batch = ps.shape(kept)[: -len(self._shape)]
        flat = [tf.reshape(part, ps.concat([batch, [-1]], axis=0)) for part in (kept, left)]
        flat = reorder.permute_last(tf.concat(flat, axis=-1), reorder.inverse_permutation(self.order))
        return tf.reshape(flat, ps.concat([batch, self._shape], axis=0))


class _OnlineSplit(_Split):
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

    def parts(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What stays and what leaves of the flat indices."""
        kept, left = np.split(ids.ravel()[self.order.numpy()], [np.prod(self._kept_shape)])
        return kept.reshape(self._kept_shape), left.reshape(self._left_shape)


def _positions(ids: np.ndarray, kept_ids: np.ndarray, left_ids: np.ndarray) -> np.ndarray:
    """Where in the flat grid of `ids` those that stay are, then those that leave."""
    position = {index: place for place, index in enumerate(ids.ravel().tolist())}
    return np.array([position[index] for part in (kept_ids, left_ids) for index in part.ravel().tolist()])


def _static_event_shape(
    levels: Sequence[tfb.Bijector], factorization: DimensionFactorization | None, event_shape: Sequence[int] | None
) -> tuple[int, ...] | None:
    if factorization is not None:
        if not isinstance(factorization, DimensionFactorization):
            raise TypeError(f"Multiscale: got factorization {factorization!r}, needs a DimensionFactorization or None")
        if event_shape is not None and tuple(event_shape) != factorization.event_shape:
            raise ValueError(
                f"Multiscale: got event shape {tuple(event_shape)}, but the factorization is for {factorization.event_shape}"
            )
        if factorization.num_levels != len(levels):
            raise ValueError(f"Multiscale: got {len(levels)} levels, but the factorization is for {factorization.num_levels}")
        return factorization.event_shape
    if event_shape is not None:
        return tuple(int(size) for size in event_shape)
    if any(level.inverse_min_event_ndims == 3 for level in levels):
        raise ValueError("Multiscale: got neither a factorization nor an event_shape, needs one of them for images")
    return None


def _checked_exits(
    exits: Sequence[tfb.Bijector | None] | None, num_levels: int, factorization: DimensionFactorization | None
) -> list[tfb.Bijector | None]:
    exits = list(exits or [])
    if exits and factorization is None and any(e is not None for e in exits[: num_levels - 1]):
        raise ValueError("Multiscale: got exits but no factorization: nothing leaves")
    if exits and len(exits) not in (num_levels - 1, num_levels):
        raise ValueError(f"Multiscale: got {len(exits)} exits for {num_levels} levels, needs {num_levels - 1} or {num_levels}")
    return exits + [None] * (num_levels - len(exits))
