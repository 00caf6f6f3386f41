"""`Multiscale`: a flow that dimensions leave level by level."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows.bijectors import base
from tfp_dimflows.bijectors.chain import Chain
from tfp_dimflows.bijectors.conditions import uses_condition
from tfp_dimflows.bijectors.factor_out import FactorOut, NoFactorOut, OnlineFactorOut, flat_latents
from tfp_dimflows.bijectors.factorization import DimensionFactorization, OnlineFactorization
from tfp_dimflows.bijectors.log_dets import log_det_dtype, sum_event
from tfp_dimflows.bijectors.walk import AnyWalk, Parts, PerDimension, Summed, Transported, Walk, transport
from tfp_dimflows.upstream import prefer_static as ps


class Multiscale(base.Composite):
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
        self._part_shapes: Sequence[tuple[int, ...]] | None = None
        self._splits = self._no_dependency([NoFactorOut()] * (len(self._levels) - 1))
        if self._event_shape is not None:
            self._lay_out(self._event_shape)
            self._shapes = tfb.Reshape(self._event_shape, [math.prod(self._event_shape)])
        super().__init__(
            forward_min_event_ndims=1,
            inverse_min_event_ndims=1 if self._event_shape is None else len(self._event_shape),
            parameters=parameters,
            name=name,
        )

    def _lay_out(self, event_shape: tuple[int, ...]) -> None:
        """Follows the flat indices of the event's dimensions through the levels."""
        grids, order = self._follow(self._factorization, event_shape)
        self._deepest_shape = tuple(grids[-1].shape)
        if self._online is None:
            splits = [FactorOut(*parts) for parts in self._partitions(grids, self._factorization)] or self._splits
            # Saved with the weights, so that weights trained with another factorization are noticed.
            self._dimension_order = tf.Variable(order, dtype=tf.int32, trainable=False, name="dimension_order")
            self._latent_order = self._no_dependency(order)
        else:
            self._num_decided = tf.Variable(0, dtype=tf.int32, trainable=False, name="num_decided")
            splits = [OnlineFactorOut(*parts) for parts in self._partitions(grids, self._factorization)]
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
            if k < len(self._levels) - 1:
                parts.append(_transport_ids(self._exits[k], ids[..., :0] if factorization is None else factorization.left[k]))
                ids = ids if factorization is None else factorization.kept[k]
        parts.append(_transport_ids(self._exits[-1], ids))
        parts.reverse()
        self._part_shapes = self._no_dependency([part.shape for part in parts])
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
            stay, leave = split.divide(_transport_ids(level, ids))
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

    @property
    def latent_sizes(self) -> list[int]:
        """Sizes of the parts of the latent values, the deepest first, without empty ones; `[]` if they are unknown."""
        return [size for shape in self._part_shapes or () if (size := math.prod(shape))]

    def split_latent(self, x: tf.Tensor) -> list[tf.Tensor]:
        """Splits flat latent values `[..., D]` into the parts that left at each level, the deepest first."""
        return tf.split(x, self.latent_sizes, axis=-1) if self.latent_sizes else [x]

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
        h = PerDimension(tf.convert_to_tensor(y))
        self._check_event(h.shape, self._event_shape)
        condition = self._route(condition, {})
        gone: list[Walk] = []
        cumulative = []
        for level, split in zip(self._levels, self._splits):
            h = h.inverse(level, condition)
            cumulative.append(self._to_data(Transported(h.numbers), gone))
            h, left = h.split(split.parts)
            gone.append(Transported(left.numbers))
        return cumulative

    def _to_data(self, h: Walk, gone: list[Walk]) -> tf.Tensor:
        """Numbers of the dimensions after a level, and of those that left before it, in the frame of the data."""
        h = h.forward(self._levels[len(gone)])
        for level, split, left in reversed(list(zip(self._levels, self._splits, gone))):
            h = h.join(left, by=split.parts).forward(level)
        return h.numbers

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
        y = base.to_tensor(y, self.forward_dtype())
        self._check_event(y.shape, self._event_shape)
        parts = self._walk_levels(Summed(y, self.inverse_min_event_ndims), self._route(condition, {}))
        x = self._latent.join(*(part.value for part in parts[::-1]))
        of_parts = self._latent.split(_log_prob_per_dim(noise, x, self.name))[::-1]
        return tf.stack([part.log_det + sum_event(p, p, part.event_ndims) for part, p in zip(parts, of_parts)], axis=-1)

    @property
    def uses_condition(self) -> bool:
        """Whether some level can use a condition."""
        return any(uses_condition(level) for level in self._levels)

    # Data to latent.

    def _walk_inverse(self, y: Walk, condition: Any) -> Walk:
        self._check_event(y.shape, self._event_shape)
        *others, deepest = self._walk_levels(y, condition)
        return deepest.join(*others[::-1], by=self._latent)

    def _walk_levels(self, h: AnyWalk, condition: Any) -> list[AnyWalk]:
        """The latent values of what leaves after each level, the finest first."""
        parts = []
        for level, split, out in zip(self._levels, self._splits, self._exits):
            h, left = h.inverse(level, condition).split(split.parts)
            parts.append(left if out is None else left.inverse(out, h.value))
        h, out = h.inverse(self._levels[-1], condition), self._exits[-1]
        return [*parts, h if out is None else h.inverse(out, _zeros(h.value))]

    # Latent to data.

    def _walk_forward(self, x: Walk, condition: Any) -> Walk:
        self._check_event(x.shape, self._event_shape and [math.prod(self._event_shape)])
        h, *parts = x.split(self._latent)
        if self._exits[-1] is not None:
            h = h.forward(self._exits[-1], _zeros(h.value, self._deepest_shape))
        h = h.forward(self._levels[-1], condition)
        for level, split, out, left in zip(self._levels[-2::-1], self._splits[::-1], self._exits[-2::-1], parts):
            left = left if out is None else left.forward(out, h.value)
            h = h.join(left, by=split.parts).forward(level, condition)
        return h

    @property
    def _latent(self) -> Parts:
        """Flat latent values from those of each part in its own shape, the deepest first."""
        if self._part_shapes is None:
            return Parts(lambda x: [x, *(x[..., :0] for _ in self._splits)], lambda deepest, *_: deepest)
        return flat_latents(self._part_shapes)


def _zeros(value: tf.Tensor | None, event_shape: tuple[int, ...] | None = None) -> tf.Tensor | None:
    """What the deepest exit is given: zeros of the shape of its value, or of another event shape."""
    if value is None or event_shape is None:
        return None if value is None else tf.zeros_like(value)
    return tf.zeros(ps.concat([ps.shape(value)[: -len(event_shape)], event_shape], axis=0), value.dtype)


def _log_prob_per_dim(noise: tfd.Distribution | None, x: tf.Tensor, name: str) -> tf.Tensor:
    """The log-density of every dimension of flat latent values."""
    if noise is None:
        dtype = log_det_dtype(x.dtype)
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
        return transport(bijector, tf.constant(ids, tf.int64), "inverse").numpy()


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
