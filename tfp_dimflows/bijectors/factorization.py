"""`DimensionFactorization`: which dimensions leave a multi-scale flow at each level, and which stay."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from tfp_dimflows import representation

# Position of pixel (row, column) of a 2x2 block, in the order TL, TR, BL, BR.
_TL, _TR, _BL, _BR = range(4)

# Of images, and of vectors; the first is the default.
IMAGE_GRANULARITIES = ("channel", "block", "squeezed")
VECTOR_GRANULARITIES = ("free",)


class DimensionFactorization:
    """A fixed partition of an event's dimensions into those that leave after each level and those that stay.

    `kept[k]` and `left[k]` are integer arrays of *flat indices of the event* for the k-th factor-out: an event of
    `num_levels` levels has `num_levels - 1` of them. For an image the grid that is kept after a `[H, W, C]` grid has the
    shape `[H/2, W/2, 2C]`, and what leaves has the same; a vector of D dimensions keeps `ceil(D / 2)`.

    Args:
      event_shape: `[H, W, C]` or `[D]`.
      kept: for each factor-out, the flat event indices that stay, in the shape of the grid they form.
      left: for each factor-out, those that leave.

    Raises:
      ValueError: if the arrays are no partition, or have no such shapes.

    #### Example

    >>> factorization = dfb.DimensionFactorization.channels([2, 2, 1], num_levels=2)
    >>> factorization.kept[0].ravel().tolist(), factorization.left[0].ravel().tolist()
    ([0, 1], [2, 3])
    """

    def __init__(self, event_shape: Sequence[int], kept: Sequence[ArrayLike], left: Sequence[ArrayLike]):
        self.event_shape = _event_shape(event_shape)
        self.kept = [_index_array(indices) for indices in kept]
        self.left = [_index_array(indices) for indices in left]
        if len(self.kept) != len(self.left):
            raise ValueError(
                f"DimensionFactorization: got {len(self.kept)} kept and {len(self.left)} left parts, needs as many"
            )
        grid = np.arange(np.prod(self.event_shape)).reshape(self.event_shape)
        for k, (stay, leave) in enumerate(zip(self.kept, self.left)):
            both = np.sort(np.concatenate([stay.ravel(), leave.ravel()]))
            if stay.ndim != len(self.event_shape) or not np.array_equal(both, np.sort(grid.ravel())):
                raise ValueError(
                    f"DimensionFactorization: factor-out {k} with {stay.shape} kept and {leave.shape} left dimensions is no "
                    f"partition of the {grid.size} dimensions still in the flow"
                )
            grid = stay

    @property
    def num_levels(self) -> int:
        """Number of levels: one more than factor-outs."""
        return len(self.kept) + 1

    @classmethod
    def channels(cls, event_shape: Sequence[int], num_levels: int) -> "DimensionFactorization":
        """The first half of the channels of the squeezed grid stays (Glow, i-ResNet); of a vector, the first half.

        Args:
          event_shape: `[H, W, C]` or `[D]`.
          num_levels: number of levels.
        """

        def split(grid: np.ndarray) -> tuple[np.ndarray, ...]:
            if grid.ndim == 1:
                return _halves(grid)
            blocks = _blocks(grid)
            return _halves(blocks.reshape(*blocks.shape[:2], -1))

        return cls._build(event_shape, num_levels, split)

    @classmethod
    def checkerboard(cls, event_shape: Sequence[int], num_levels: int) -> "DimensionFactorization":
        """The top left and bottom right pixel of every 2x2 block of every channel stay (RealNVP). Images only."""
        if len(_event_shape(event_shape)) != 3:
            raise ValueError(
                f"DimensionFactorization.checkerboard: got event shape {tuple(event_shape)}, needs an image [H, W, C]"
            )
        return cls._build(event_shape, num_levels, _checkerboard_split)

    @classmethod
    def random(cls, event_shape: Sequence[int], num_levels: int, seed: int) -> "DimensionFactorization":
        """A random half of all dimensions still in the flow stays, without regard to space.

        Args:
          event_shape: `[H, W, C]` or `[D]`.
          num_levels: number of levels.
          seed: integer seed.
        """
        generator = np.random.default_rng(seed)

        def split(grid: np.ndarray) -> tuple[np.ndarray, ...]:
            shuffled = generator.permutation(grid.ravel())
            if grid.ndim == 1:
                return tuple(np.sort(half) for half in _halves(shuffled))
            return _halves(shuffled.reshape(_blocks(grid).shape[:2] + (-1,)))

        return cls._build(event_shape, num_levels, split)

    @classmethod
    def from_contributions(
        cls, contributions: Sequence[ArrayLike], keep: str | Sequence[str] = "high", granularity: str | None = None
    ) -> "DimensionFactorization":
        """LCMA: the dimensions with high (or low) likelihood contribution stay in the flow.

        Args:
          contributions: for each factor-out the cumulative contribution of every dimension, an array of the event shape in the
            data's frame, as `dimflows.likelihood_contributions` returns them.
          keep: `"high"` (LCMA) or `"low"`: which half stays; a list gives one for each factor-out.
          granularity: of images, for every channel by itself,

            * `"channel"` (default): of the four positions in a 2x2 block two stay, the same in every block, by their
              averages: a lattice, which convolutions can use,
            * `"block"` (the paper's): two of the four entries of every block stay, whichever they are there;

            of all channels together `"squeezed"`: any half of the squeezed channels by their averages, as it suits channels
            that have been rotated; of vectors `"free"`: any half.

        Returns:
          The factorization. The kept channels are ordered by rank: the highest entry of every channel's block, then the
          second. Ties go by position; where a whole statistic is
          constant (an additive flow contributes 0 everywhere) the split is the static checkerboard, or the first half of
          squeezed channels or a vector.

        Raises:
          ValueError: if contributions differ in shape or are not finite, or an option does not fit.

        References: Das, Abbeel, Spanos, "Likelihood Contribution based Multi-scale Architecture for Generative Flows", 2020.
        """
        name = "DimensionFactorization.from_contributions"
        if not len(contributions):
            raise ValueError(f"{name}: got no contributions, needs one array per factor-out")
        event_shape = _event_shape(np.shape(contributions[0]))
        statistics = [_checked_statistic(c, event_shape, f"{name}: contribution {k}") for k, c in enumerate(contributions)]
        keeps, granularity = _checked_rule(keep, granularity, event_shape, len(statistics), name)
        rules = iter(zip(statistics, keeps))
        return cls._build(event_shape, len(statistics) + 1, lambda grid: _split_by_rank(grid, *next(rules), granularity))

    @classmethod
    def _build(
        cls, event_shape: Sequence[int], num_levels: int, split: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    ) -> "DimensionFactorization":
        event_shape = _event_shape(event_shape)
        if num_levels < 2:
            raise ValueError(f"DimensionFactorization: got num_levels={num_levels}, needs at least 2 for one factor-out")
        _check_levels(event_shape, num_levels)
        grid = np.arange(np.prod(event_shape)).reshape(event_shape)
        kept, left = [], []
        for _ in range(num_levels - 1):
            grid, leave = split(grid)
            kept.append(grid)
            left.append(leave)
        return cls(event_shape, kept, left)

    def levels_reached(self) -> np.ndarray:
        """For every dimension of the event, the number of levels it passes through: from 1 to `num_levels`."""
        reached = np.ones(np.prod(self.event_shape), dtype=np.int64)
        for stay in self.kept:
            reached[stay.ravel()] += 1
        return reached.reshape(self.event_shape)

    def get_config(self) -> dict:
        """Plain values (JSON) from which `from_config` makes the same factorization."""
        return {
            "event_shape": list(self.event_shape),
            "kept": [indices.tolist() for indices in self.kept],
            "left": [indices.tolist() for indices in self.left],
        }

    @classmethod
    def from_config(cls, config: dict) -> "DimensionFactorization":
        """The factorization that `get_config` described."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DimensionFactorization) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash((self.event_shape, *(a.tobytes() for a in self.kept), *(a.tobytes() for a in self.left)))

    def __repr__(self) -> str:
        return f"DimensionFactorization(event_shape={self.event_shape}, num_levels={self.num_levels})"


class OnlineFactorization(representation.Described):
    """A factorization that is decided in the course of a training, by likelihood contributions: LCMA without a first phase.

    A `dfb.Multiscale` starts with `initial`; every call of its `decide` decides one factor-out, the finest first, by the
    contributions of the flow as it is then. `dimflows.training.DecideFactorization` does so within `FlowModel.fit`.

    Args:
      initial: the `DimensionFactorization` to start with.
      keep: as in `DimensionFactorization.from_contributions`.
      granularity: as there.

    Raises:
      ValueError: if an option does not fit.

    #### Example

    >>> online = dfb.OnlineFactorization(dfb.DimensionFactorization.channels([4], num_levels=2), keep="high")
    >>> flow = dfb.Multiscale([dfb.ElementwiseAffine(0.0, [1.0, 2.0, 3.0, 4.0]), tfb.Identity()], online)
    >>> flow.decide(flow.likelihood_contributions(tf.zeros([4]))[0])
    >>> flow.factorization.kept[0].tolist(), flow.num_decided
    ([2, 3], 1)
    """

    def __init__(self, initial: DimensionFactorization, keep: str | Sequence[str] = "high", granularity: str | None = None):
        if not isinstance(initial, DimensionFactorization):
            raise ValueError(f"OnlineFactorization: got initial={initial!r}, needs a DimensionFactorization")
        self.initial, factor_outs = initial, initial.num_levels - 1
        self._keep, self._granularity = _checked_rule(
            keep, granularity, initial.event_shape, factor_outs, "OnlineFactorization"
        )

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The event's shape."""
        return self.initial.event_shape

    @property
    def num_levels(self) -> int:
        """Number of levels: one more than factor-outs."""
        return self.initial.num_levels

    def decide(self, current: DimensionFactorization, num_decided: int, contributions: ArrayLike) -> DimensionFactorization:
        """The factorization whose first factor-outs are the current ones, and the later ones follow a statistic.

        Args:
          current: the present factorization.
          num_decided: how many of its factor-outs are final.
          contributions: of every dimension, an array of the event's shape.

        Raises:
          ValueError: if the contributions have another shape, or are not finite.
        """
        statistic = _checked_statistic(contributions, self.event_shape, "OnlineFactorization: contributions")
        factor_outs = iter(range(self.num_levels - 1))

        def split(grid: np.ndarray) -> tuple[np.ndarray, ...]:
            k = next(factor_outs)
            if k < num_decided:
                return current.kept[k], current.left[k]
            return _split_by_rank(grid, statistic, self._keep[k], self._granularity)

        return DimensionFactorization._build(self.event_shape, self.num_levels, split)

    def get_config(self) -> dict:
        """Plain values (JSON) from which `from_config` makes the same."""
        return {"initial": self.initial.get_config(), "keep": self._keep, "granularity": self._granularity}

    @classmethod
    def from_config(cls, config: dict) -> "OnlineFactorization":
        """What `get_config` described."""
        return cls(**config | {"initial": DimensionFactorization.from_config(config["initial"])})


def _checked_statistic(statistic: ArrayLike, event_shape: tuple[int, ...], name: str) -> np.ndarray:
    statistic = np.asarray(statistic, dtype=np.float64)
    if statistic.shape != event_shape:
        raise ValueError(f"{name} has shape {statistic.shape}, needs the event shape {event_shape}")
    if not np.isfinite(statistic).all():
        raise ValueError(f"{name} has values that are not finite")
    return statistic


def _checked_rule(
    keep: str | Sequence[str], granularity: str | None, event_shape: tuple[int, ...], factor_outs: int, name: str
) -> tuple[list[str], str]:
    """Which half stays at each factor-out, and the granularity."""
    keeps = [keep] * factor_outs if isinstance(keep, str) else list(keep)
    if len(keeps) != factor_outs or not set(keeps) <= {"high", "low"}:
        raise ValueError(f'{name}: got keep={keep!r}, needs "high" or "low", or a list of {factor_outs} of them')
    allowed = VECTOR_GRANULARITIES if len(event_shape) == 1 else IMAGE_GRANULARITIES
    granularity = granularity or allowed[0]
    if granularity not in allowed:
        raise ValueError(
            f"{name}: got granularity={granularity!r} for events of shape {event_shape}, needs one of {', '.join(allowed)}"
        )
    return keeps, granularity


def _event_shape(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(size) for size in shape)
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ValueError(f"DimensionFactorization: got event shape {shape}, needs an image [H, W, C] or a vector [D]")
    return shape


def _check_levels(event_shape: tuple[int, ...], num_levels: int) -> None:
    """Raises a ValueError unless the sides of an image can be halved, or a vector has two dimensions, at each factor-out."""
    got = f"DimensionFactorization: got event shape {list(event_shape)} and num_levels={num_levels}"
    if any(side % 2 ** (num_levels - 1) for side in event_shape[:-1]):
        raise ValueError(f"{got}, needs height and width divisible by {2 ** (num_levels - 1)}")
    if len(event_shape) == 1 and event_shape[0] <= 2 ** (num_levels - 2):
        raise ValueError(f"{got}, needs more than {2 ** (num_levels - 2)} dimensions")


def _index_array(indices: ArrayLike) -> np.ndarray:
    array = np.array(indices, dtype=np.int64)
    array.flags.writeable = False
    return array


def _blocks(grid: np.ndarray) -> np.ndarray:
    """`[H, W, C]` to `[H/2, W/2, C, 4]`, positions in the order TL, TR, BL, BR."""
    height, width, channels = grid.shape
    blocks = grid.reshape(height // 2, 2, width // 2, 2, channels)
    return blocks.transpose(0, 2, 4, 1, 3).reshape(height // 2, width // 2, channels, 4)


def _halves(grid: np.ndarray) -> tuple[np.ndarray, ...]:
    middle = (grid.shape[-1] + 1) // 2
    return grid[..., :middle], grid[..., middle:]


def _checkerboard_split(grid: np.ndarray) -> tuple[np.ndarray, ...]:
    blocks = _blocks(grid)

    def channels(*positions: int) -> np.ndarray:
        return np.concatenate([blocks[..., p] for p in positions], axis=-1)

    return channels(_TL, _BR), channels(_TR, _BL)


def _split_by_rank(grid: np.ndarray, statistic: np.ndarray, keep: str, granularity: str) -> tuple[np.ndarray, ...]:
    scores = statistic.ravel()[grid] if keep == "high" else -statistic.ravel()[grid]
    if granularity == "squeezed":
        channels, scores = (_blocks(a).reshape(*_blocks(a).shape[:2], -1) for a in (grid, scores))
        return _halves(channels[..., np.argsort(-scores.mean(axis=(0, 1)), kind="stable")])
    if np.ptp(scores) == 0:
        return _halves(grid) if grid.ndim == 1 else _checkerboard_split(grid)
    if granularity == "free":
        return tuple(np.sort(half) for half in _halves(grid[np.argsort(-scores, kind="stable")]))
    blocks, scores = _blocks(grid), _blocks(scores)
    if granularity == "channel":
        scores = np.broadcast_to(scores.mean(axis=(0, 1)), scores.shape)
    ranked = np.take_along_axis(blocks, np.argsort(-scores, axis=-1, kind="stable"), axis=-1)
    ranked = np.swapaxes(ranked, -1, -2)  # ranks outermost: [rank 1 of all channels, rank 2 of all channels, ...]
    return _halves(ranked.reshape(*ranked.shape[:2], -1))
