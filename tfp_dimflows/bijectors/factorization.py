"""`DimensionFactorization`: which dimensions leave a multi-scale flow at each level, and which stay."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Position of pixel (row, column) of a 2x2 block, in the order TL, TR, BL, BR.
_TL, _TR, _BL, _BR = range(4)

GRANULARITIES = ("block", "channel", "free")


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

    def __init__(self, event_shape: Sequence[int], kept: Sequence[Any], left: Sequence[Any]):
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
    def channels(cls, event_shape: Sequence[int], num_levels: int, order: str = "channel_major") -> "DimensionFactorization":
        """The first half of the channels of the squeezed grid stays (Glow, i-ResNet); of a vector, the first half.

        Args:
          event_shape: `[H, W, C]` or `[D]`.
          num_levels: number of levels.
          order: channel order of the squeeze, as in `dfb.Squeeze`.
        """
        if order not in ("channel_major", "position_major"):
            raise ValueError(f"DimensionFactorization.channels: got order={order!r}, needs channel_major or position_major")

        def split(grid):
            if grid.ndim == 1:
                return _halves(grid)
            blocks = _blocks(grid)
            squeezed = blocks if order == "channel_major" else np.swapaxes(blocks, -1, -2)
            return _halves(squeezed.reshape(*blocks.shape[:2], -1))

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

        def split(grid):
            shuffled = generator.permutation(grid.ravel())
            if grid.ndim == 1:
                return tuple(np.sort(half) for half in _halves(shuffled))
            return _halves(shuffled.reshape(_blocks(grid).shape[:2] + (-1,)))

        return cls._build(event_shape, num_levels, split)

    @classmethod
    def from_contributions(
        cls, contributions: Sequence[Any], keep: str | Sequence[str] = "high", granularity: str | None = None
    ) -> "DimensionFactorization":
        """LCMA: the dimensions with high (or low) likelihood contribution stay in the flow.

        Args:
          contributions: for each factor-out the cumulative contribution of every dimension, an array of the event shape in the
            data's frame, as `dimflows.likelihood_contributions` returns them.
          keep: `"high"` (LCMA) or `"low"`: which half stays; a list gives one for each factor-out.
          granularity: `"block"` (images, default): of the four entries of every 2x2 block of every channel two stay;
            `"channel"` (images): the statistic is averaged over the blocks of a channel first, so that the same two
            positions stay everywhere; `"free"` (vectors, default): any half.

        Returns:
          The factorization. The kept channels are ordered by rank: the highest entry of every channel's block, then the
          second. Ties go by position; where a whole statistic is constant (an additive flow contributes 0 everywhere)
          the split is the static checkerboard, or the first half of a vector.

        Raises:
          ValueError: if contributions differ in shape or are not finite, or an option does not fit.

        References: Das, Abbeel, Spanos, "Likelihood Contribution based Multi-scale Architecture for Generative Flows", 2020.
        """
        statistics = [np.asarray(c, dtype=np.float64) for c in contributions]
        if not statistics:
            raise ValueError("DimensionFactorization.from_contributions: got no contributions, needs one array per factor-out")
        event_shape = _event_shape(statistics[0].shape)
        for k, statistic in enumerate(statistics):
            if statistic.shape != event_shape:
                raise ValueError(
                    f"DimensionFactorization.from_contributions: contribution {k} has shape {statistic.shape}, needs the event "
                    f"shape {event_shape}"
                )
            if not np.isfinite(statistic).all():
                raise ValueError(f"DimensionFactorization.from_contributions: contribution {k} has values that are not finite")
        keeps = [keep] * len(statistics) if isinstance(keep, str) else list(keep)
        if len(keeps) != len(statistics) or not set(keeps) <= {"high", "low"}:
            raise ValueError(
                f'DimensionFactorization.from_contributions: got keep={keep!r}, needs "high" or "low", or a list of '
                f"{len(statistics)} of them"
            )
        granularity = granularity or ("free" if len(event_shape) == 1 else "block")
        allowed = ("free",) if len(event_shape) == 1 else ("block", "channel")
        if granularity not in allowed:
            raise ValueError(
                f"DimensionFactorization.from_contributions: got granularity={granularity!r} for events of shape "
                f"{event_shape}, needs one of {allowed}"
            )
        ranked = iter([s.ravel() if which == "high" else -s.ravel() for s, which in zip(statistics, keeps)])

        def split(grid):
            statistic = next(ranked)[grid]
            return _split_by_rank(grid, statistic, granularity)

        return cls._build(event_shape, len(statistics) + 1, split)

    @classmethod
    def _build(cls, event_shape, num_levels, split):
        event_shape = _event_shape(event_shape)
        if num_levels < 2:
            raise ValueError(f"DimensionFactorization: got {num_levels} levels, needs at least 2 for one factor-out")
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

    def __eq__(self, other):
        return isinstance(other, DimensionFactorization) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash((self.event_shape, *(a.tobytes() for a in self.kept), *(a.tobytes() for a in self.left)))

    def __repr__(self):
        return f"DimensionFactorization(event_shape={self.event_shape}, num_levels={self.num_levels})"


def _event_shape(shape):
    shape = tuple(int(size) for size in shape)
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ValueError(f"DimensionFactorization: got event shape {shape}, needs an image [H, W, C] or a vector [D]")
    return shape


def _index_array(indices):
    array = np.array(indices, dtype=np.int64)
    array.flags.writeable = False
    return array


def _blocks(grid):
    """`[H, W, C]` to `[H/2, W/2, C, 4]`, positions in the order TL, TR, BL, BR."""
    height, width, channels = grid.shape
    if height % 2 or width % 2:
        raise ValueError(f"DimensionFactorization: a grid of {height} x {width} is not divisible into 2x2 blocks")
    blocks = grid.reshape(height // 2, 2, width // 2, 2, channels)
    return blocks.transpose(0, 2, 4, 1, 3).reshape(height // 2, width // 2, channels, 4)


def _halves(grid):
    size = grid.shape[-1]
    if size < 2:
        raise ValueError("DimensionFactorization: one dimension is left, too few for another factor-out")
    middle = (size + 1) // 2
    return grid[..., :middle], grid[..., middle:]


def _checkerboard_split(grid):
    blocks = _blocks(grid)

    def channels(*positions):
        return np.concatenate([blocks[..., p] for p in positions], axis=-1)

    return channels(_TL, _BR), channels(_TR, _BL)


def _split_by_rank(grid, statistic, granularity):
    if np.ptp(statistic) == 0:
        return _halves(grid) if grid.ndim == 1 else _checkerboard_split(grid)
    if granularity == "free":
        return tuple(np.sort(half) for half in _halves(grid[np.argsort(-statistic, kind="stable")]))
    blocks, scores = _blocks(grid), _blocks(statistic)
    if granularity == "channel":
        scores = np.broadcast_to(scores.mean(axis=(0, 1)), scores.shape)
    ranked = np.take_along_axis(blocks, np.argsort(-scores, axis=-1, kind="stable"), axis=-1)
    ranked = np.swapaxes(ranked, -1, -2)  # ranks outermost: [rank 1 of all channels, rank 2 of all channels, ...]
    return _halves(ranked.reshape(*ranked.shape[:2], -1))
