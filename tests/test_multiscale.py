"""Which dimensions leave a multi-scale flow, where they go, and how much each contributes."""

import itertools
import json

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import (
    CHANNELS,
    ENTRIES,
    GRID,
    Mixer,
    assert_close,
    build,
    composed,
    contributions_of,
    dfb,
    dimflows,
    distribution,
    exit_for,
    fresh,
    multiscale_move,
    multiscale_walk,
    normal,
    parameters,
    shuffled,
    squeezed,
    stay,
)

tfb, tfd = tfp.bijectors, tfp.distributions
Factorization = dfb.DimensionFactorization

IMAGE = (4, 8, 3)
STATISTICS = contributions_of(IMAGE, 2)


def flat_indices(shape, dtype="float64"):
    """Data that is its own flat index: `[1, *shape]`."""
    return tf.reshape(tf.range(int(np.prod(shape)), dtype=dtype), [1, *shape])


def factorizations():
    """One of every kind."""
    yield "channels", Factorization.channels(IMAGE, 3)
    yield "checkerboard", Factorization.checkerboard(IMAGE, 3)
    yield "random", Factorization.random(IMAGE, 3, seed=1)
    for granularity in ("channel", "block", "squeezed"):
        yield granularity, Factorization.from_contributions(STATISTICS, granularity=granularity)
    yield "vector_channels", Factorization.channels([11], 4)
    yield "vector_random", Factorization.random([11], 4, seed=1)
    yield "vector_free", Factorization.from_contributions(contributions_of([11], 3))


every_factorization = pytest.mark.parametrize("factorization", [pytest.param(f, id=n) for n, f in factorizations()])


def blocks(shape):
    """The 2x2 blocks of every channel of a grid: rows of four positions (TL, TR, BL, BR) as flat indices."""
    ids = np.arange(np.prod(shape)).reshape(shape)
    return [
        [ids[i, j, c], ids[i, j + 1, c], ids[i + 1, j, c], ids[i + 1, j + 1, c]]
        for i in range(0, shape[0], 2)
        for j in range(0, shape[1], 2)
        for c in range(shape[2])
    ]


# Factorizations.


@every_factorization
def test_every_split_is_a_partition_into_halves(factorization):
    alive = set(range(int(np.prod(factorization.event_shape))))
    grid = factorization.event_shape
    for kept, left in zip(factorization.kept, factorization.left):
        assert set(kept.ravel()) | set(left.ravel()) == alive
        assert kept.size + left.size == len(alive) and kept.size - left.size in (0, 1)
        if len(grid) == 3:
            grid = (grid[0] // 2, grid[1] // 2, 2 * grid[2])
            assert kept.shape == left.shape == grid
        else:
            assert kept.shape == ((len(alive) + 1) // 2,)
        alive = set(kept.ravel())


@every_factorization
def test_levels_reached_counts_the_levels_that_a_dimension_passes(factorization):
    reached = factorization.levels_reached()
    assert reached.shape == factorization.event_shape
    expected = np.full(reached.size, factorization.num_levels)
    for k, left in enumerate(factorization.left):
        expected[left.ravel()] = k + 1
    assert (reached.ravel() == expected).all()


@every_factorization
def test_the_configuration_is_json_and_gives_an_equal_factorization(factorization):
    config = json.loads(json.dumps(factorization.get_config()))
    restored = Factorization.from_config(config)
    assert restored == factorization and hash(restored) == hash(factorization)
    for a, b in zip(restored.kept + restored.left, factorization.kept + factorization.left):
        assert a.shape == b.shape and (a == b).all()
    assert (Factorization.random(IMAGE, 3, seed=99) == factorization) is False


def test_the_index_arrays_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        CHANNELS.kept[0][0] = 1


def test_channels_are_the_first_half_of_the_squeezed_channels():
    factorization = Factorization.channels(IMAGE, 3)
    ids = np.arange(np.prod(IMAGE)).reshape(IMAGE)
    for kept, left in zip(factorization.kept, factorization.left):
        ids = squeezed(ids)
        half = ids.shape[-1] // 2
        assert (kept == ids[..., :half]).all() and (left == ids[..., half:]).all()
        ids = kept


def test_checkerboard_keeps_the_top_left_and_bottom_right_pixels_of_every_channel():
    factorization = Factorization.checkerboard(IMAGE, 2)
    rows, columns, _ = np.unravel_index(factorization.kept[0], IMAGE)
    assert ((rows + columns) % 2 == 0).all()
    assert (rows[..., :3] % 2 == 0).all() and (rows[..., 3:] % 2 == 1).all()
    channels = np.unravel_index(factorization.kept[0], IMAGE)[2]
    assert (channels == [0, 1, 2, 0, 1, 2]).all()


def test_random_halves_depend_on_the_seed_only():
    first, again, other = (Factorization.random(IMAGE, 3, seed=s) for s in (1, 1, 2))
    assert first == again and first != other
    assert first != Factorization.checkerboard(IMAGE, 3)
    kept = Factorization.random([12], 2, seed=3).kept[0]
    assert (np.diff(kept) > 0).all()


@pytest.mark.parametrize("keep", ["high", "low"])
def test_block_keeps_the_two_best_of_every_block_of_every_channel(keep):
    factorization = Factorization.from_contributions(STATISTICS, keep=keep, granularity="block")
    sign = 1.0 if keep == "high" else -1.0
    shape, ids = IMAGE, np.arange(np.prod(IMAGE))
    for statistic, kept in zip(STATISTICS, factorization.kept):
        chosen = set(kept.ravel())
        scores = sign * statistic.ravel()
        for block in blocks(shape):
            ranked = sorted(ids[block], key=lambda i: -scores[i])
            assert set(ranked[:2]) <= chosen and not set(ranked[2:]) & chosen
        shape, ids = kept.shape, kept.ravel()


def test_whole_channels_are_the_default_of_images():
    assert Factorization.from_contributions(STATISTICS) == Factorization.from_contributions(STATISTICS, granularity="channel")


def test_the_highest_half_of_a_block_is_kept_by_a_written_out_example():
    statistic = np.array([[5.0, 1.0, 0.0, 1.0], [3.0, 4.0, 3.0, 2.0]])[..., np.newaxis]
    kept = Factorization.from_contributions([statistic], granularity="block").kept[0]
    # Flat indices of a 2x4 image: the first block holds 0, 1, 4, 5, the second one 2, 3, 6, 7.
    assert kept.tolist() == [[[0, 5], [6, 7]]]
    left = Factorization.from_contributions([statistic], granularity="block").left[0]
    assert left.tolist() == [[[4, 1], [3, 2]]]


def test_kept_channels_are_rank_one_of_all_channels_then_rank_two():
    factorization = Factorization.from_contributions(STATISTICS[:1], granularity="block")
    for grid, ranks in ((factorization.kept[0], (0, 1)), (factorization.left[0], (2, 3))):
        for i, j, c in itertools.product(range(2), range(4), range(3)):
            block = [((2 * i + di) * IMAGE[1] + 2 * j + dj) * IMAGE[2] + c for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1))]
            ranked = sorted(block, key=lambda index: -STATISTICS[0].ravel()[index])
            assert [grid[i, j, c], grid[i, j, 3 + c]] == [ranked[r] for r in ranks]


def test_reversing_the_sign_of_the_statistic_swaps_the_halves():
    for granularity in ("block", "channel", "squeezed"):
        one = Factorization.from_contributions(STATISTICS[:1], granularity=granularity)
        negated = Factorization.from_contributions([-STATISTICS[0]], granularity=granularity)
        low = Factorization.from_contributions(STATISTICS[:1], keep="low", granularity=granularity)
        assert set(negated.kept[0].ravel()) == set(one.left[0].ravel())
        assert set(negated.left[0].ravel()) == set(one.kept[0].ravel())
        assert low == negated
    vector = contributions_of([10], 1)
    assert (
        Factorization.from_contributions(vector).kept[0].tolist()
        == Factorization.from_contributions([-vector[0]]).left[0].tolist()
    )


def test_ties_go_by_position():
    statistic = np.zeros([4, 4, 2])
    statistic[0, 1, 0] = 1.0
    kept = Factorization.from_contributions([statistic], granularity="block").kept[0]
    rows, columns, channels = np.unravel_index(kept, statistic.shape)
    assert (rows[0, 0, 0], columns[0, 0, 0]) == (0, 1) and (rows[0, 0, 2], columns[0, 0, 2]) == (0, 0)
    tied = [(i, j, c) for i, j, c in np.ndindex(2, 2, 2) if (i, j, c) != (0, 0, 0)]
    for i, j, c in tied:
        for rank in range(2):
            place = i, j, c + 2 * rank
            assert (rows[place], columns[place], channels[place]) == (2 * i, 2 * j + rank, c)
    vector = Factorization.from_contributions([[1.0, 2.0, 1.0, 1.0, 1.0]]).kept[0]
    assert vector.tolist() == [0, 1, 2]


@pytest.mark.parametrize("constant", [0.0, 0.7])
def test_a_constant_statistic_falls_back_to_the_static_split(constant):
    image = np.full(IMAGE, constant)
    for granularity in ("block", "channel"):
        fallback = Factorization.from_contributions([image, image], granularity=granularity)
        assert fallback == Factorization.checkerboard(IMAGE, 3)
    squeezed = Factorization.from_contributions([image, image], granularity="squeezed")
    assert squeezed == Factorization.channels(IMAGE, 3)
    assert Factorization.from_contributions([np.full([7], constant)]) == Factorization.channels([7], 2)
    mixed = Factorization.from_contributions([STATISTICS[0], image])
    assert (mixed.kept[0] == Factorization.from_contributions(STATISTICS).kept[0]).all()
    grid = mixed.kept[0]
    expected = [grid[0::2, 0::2], grid[1::2, 1::2]]
    assert (mixed.kept[1] == np.concatenate(expected, axis=-1)).all()


@pytest.mark.parametrize("keeps", list(itertools.product(["high", "low"], repeat=3)))
def test_every_combination_of_kept_halves_over_three_factor_outs(keeps):
    shape = (8, 8, 1)
    statistics = contributions_of(shape, 3)
    factorization = Factorization.from_contributions(statistics, keep=list(keeps))
    for statistic, keep, kept, left in zip(statistics, keeps, factorization.kept, factorization.left):
        halves = statistic.ravel()[kept].mean(), statistic.ravel()[left].mean()
        assert (halves[0] > halves[1]) == (keep == "high")
    if len(set(keeps)) == 1:
        assert factorization == Factorization.from_contributions(statistics, keep=keeps[0])


def test_channel_granularity_takes_the_same_positions_in_every_block():
    factorization = Factorization.from_contributions(STATISTICS, granularity="channel")
    grid = np.arange(np.prod(IMAGE)).reshape(IMAGE)
    for statistic, kept in zip(STATISTICS, factorization.kept):
        height, width, channels = grid.shape
        scores = statistic.ravel()[grid]
        means = [scores[di::2, dj::2].mean(axis=(0, 1)) for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1))]
        for c in range(channels):
            order = np.argsort([-m[c] for m in means])
            for rank in range(2):
                di, dj = divmod(order[rank], 2)
                assert (kept[..., c + channels * rank] == grid[di::2, dj::2, c]).all()
        grid = kept


def test_squeezed_granularity_takes_any_half_of_the_squeezed_channels():
    factorization = Factorization.from_contributions(STATISTICS, granularity="squeezed")
    grid = np.arange(np.prod(IMAGE)).reshape(IMAGE)
    for statistic, kept, left in zip(STATISTICS, factorization.kept, factorization.left):
        channels = dfb.Squeeze().inverse(grid).numpy()
        means = statistic.ravel()[channels].mean(axis=(0, 1))
        ranked = channels[..., np.argsort(-means)]
        np.testing.assert_array_equal(np.concatenate([kept, left], axis=-1), ranked)
        grid = kept


def test_free_granularity_takes_any_half_of_a_vector():
    statistics = contributions_of([11], 3)
    factorization = Factorization.from_contributions(statistics)
    alive = np.arange(11)
    for statistic, kept, size in zip(statistics, factorization.kept, (6, 3, 2)):
        best = alive[np.argsort(-statistic[alive])][:size]
        assert kept.tolist() == sorted(best)
        alive = kept


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Factorization.channels([3, 4, 1], 2), r"got event shape \[3, 4, 1\] and num_levels=2, .* divisible by 2$"),
        (lambda: Factorization.random([4, 4, 1], 4, seed=0), r"\[4, 4, 1\] and num_levels=4, .* divisible by 8$"),
        (lambda: Factorization.channels([2], 3), r"got event shape \[2\] and num_levels=3, needs more than 2 dimensions"),
        (lambda: Factorization.channels([4], 1), "got num_levels=1, needs at least 2"),
        (lambda: Factorization.channels([4, 4], 2), r"got event shape \(4, 4\), needs an image"),
        (lambda: Factorization.checkerboard([4], 2), r"got event shape \(4,\), needs an image"),
        (lambda: Factorization.from_contributions([]), "got no contributions"),
        (lambda: Factorization.from_contributions([np.zeros(4), np.zeros(5)]), r"contribution 1 has shape \(5,\)"),
        (lambda: Factorization.from_contributions([[1.0, np.nan]]), "contribution 0 has values that are not finite"),
        (lambda: Factorization.from_contributions([[1.0, np.inf]]), "contribution 0 has values that are not finite"),
        (lambda: Factorization.from_contributions([[1.0, 2.0]], keep="best"), "got keep='best'"),
        (lambda: Factorization.from_contributions([[1.0, 2.0]], keep=["high", "low"]), "or a list of 1 of them"),
        (lambda: Factorization.from_contributions([[1.0, 2.0]], granularity="block"), "got granularity='block'"),
        (lambda: Factorization.from_contributions(STATISTICS, granularity="free"), "got granularity='free'"),
        (lambda: Factorization([4], [[0, 1]], [[2, 2]]), "factor-out 0 .* is no partition of the 4 dimensions"),
        (lambda: Factorization([4], [[0, 1], [2]], [[2, 3], [3]]), "factor-out 1 .* is no partition of the 2"),
        (lambda: Factorization([4], [[0, 1]], []), "got 1 kept and 0 left parts"),
    ],
)
def test_errors_of_factorizations(make, message):
    with pytest.raises(ValueError, match=f"DimensionFactorization.*{message}"):
        make()


# The latent.


class Scaling(dfb.ElementwiseAffine):
    """Multiplies by exp(log_scale) from data to latent; the log-det is known without computing."""

    def __init__(self, log_scale):
        super().__init__(tf.zeros([], "float64"), tf.constant(log_scale, "float64"))


def identities(number):
    return [tfb.Identity() for _ in range(number)]


def test_the_latent_is_ordered_deepest_level_first():
    flow = dfb.Multiscale(identities(3), CHANNELS)
    latent = flow.inverse(flat_indices(GRID))
    expected = [CHANNELS.kept[1], CHANNELS.left[1], CHANNELS.left[0]]
    assert_close(latent[0], np.concatenate([part.ravel() for part in expected]))
    assert (CHANNELS.levels_reached().ravel()[latent.numpy()[0].astype(int)] == [3] * 4 + [2] * 4 + [1] * 8).all()
    assert_close(flow.forward(fresh(latent)), flat_indices(GRID))


def test_split_latent_and_join_latent():
    flow = dfb.Multiscale(identities(3), CHANNELS)
    latent = normal([2, 5, 16], 1)
    parts = flow.split_latent(latent)
    assert [part.shape for part in parts] == [(2, 5, 4), (2, 5, 4), (2, 5, 8)]
    assert_close(parts[0], latent[..., :4])
    assert_close(parts[2], latent[..., 8:])
    assert_close(flow.join_latent(parts), latent)
    vector = dfb.Multiscale(identities(3), Factorization.channels([5], 3))
    assert [part.shape[-1] for part in vector.split_latent(normal([2, 5]))] == [2, 1, 2]
    undivided = dfb.Multiscale(identities(2))
    assert [part.shape[-1] for part in undivided.split_latent(normal([2, 5]))] == [5]


MULTISCALES = [name for name in ENTRIES if name.startswith(("multiscale", "lcma"))]


@pytest.mark.parametrize(
    "name", [parameters(ENTRIES[n], n) for n in MULTISCALES if n not in ("multiscale_conditional", "multiscale_elementwise")]
)
def test_the_latent_parts_are_those_of_a_walk_by_flat_indices(name):
    entry = ENTRIES[name]
    flow, _ = build(entry, "large")
    y = entry.data()
    moves = [squeezed if "squeeze" in n else stay for n in level_names(flow)]
    parts, _, _ = multiscale_walk(flow, y, moves)
    latent = flow.inverse(y)
    assert_close(latent, np.concatenate(parts, axis=-1))
    for part, expected in zip(flow.split_latent(latent), parts):
        assert_close(part, expected)


def level_names(flow):
    """The names of the parts of every level, joined."""
    return ["/".join(b.name for b in getattr(level, "bijectors", [level])) for level in flow.levels]


def test_the_deepest_part_alone_drives_the_deepest_level():
    flow, _ = build(ENTRIES["multiscale_channels_squeezed"], "large")
    latent = normal([1, 16], 1)
    changed = tf.concat([latent[:, :12], 3.0 + latent[:, 12:]], axis=-1)
    kept = []

    class Spy(dfb.FlowBijector):
        def __init__(self):
            super().__init__(forward_min_event_ndims=3, parameters={}, name="spy")

        def _forward_and_log_det_per_dim(self, x, condition):
            kept.append(x.numpy())
            return x, tf.zeros([], x.dtype)

    spied = dfb.Multiscale([*flow.levels[:2], dfb.Chain([Spy(), flow.levels[2]])], CHANNELS)
    spied.forward(latent)
    spied.forward(changed)
    assert_close(kept[0], kept[1])
    assert kept[0].shape == (1, 1, 1, 4)


# Index tracking.


def moving_levels(order, between):
    """Levels that move dimensions, some without and some with a squeeze, and their movements."""
    permutation = list(np.random.default_rng(4).permutation(12))
    squeeze = dfb.Squeeze(order=order)
    move = lambda y: squeezed(y, order)  # noqa: E731
    levels = [squeeze, dfb.Chain([dfb.Squeeze(order=order)]), tfb.Identity()]
    moves = [move, move, stay]
    if between:
        levels[0] = tfb.Chain([squeeze, tfb.Permute(permutation)])
        moves[0] = composed(move, shuffled(permutation))
    return levels, moves


@every_factorization
@pytest.mark.parametrize("order", ["channel_major", "position_major"])
@pytest.mark.parametrize("between", [False, True])
def test_the_same_dimensions_leave_with_and_without_squeezes(factorization, order, between):
    if len(factorization.event_shape) == 1:
        permutation = list(np.random.default_rng(4).permutation(11))
        levels = [tfb.Permute(permutation), *identities(3)]
    else:
        levels, _ = moving_levels(order, between)
    moving = dfb.Multiscale(levels, factorization)
    still = dfb.Multiscale(identities(factorization.num_levels), factorization)
    y = flat_indices(factorization.event_shape)
    for deep, (a, b) in enumerate(zip(moving.split_latent(moving.inverse(y)), still.split_latent(still.inverse(y)))):
        assert set(a.numpy().ravel()) == set(b.numpy().ravel())
        if deep:
            # What leaves has the order of the factorization, whatever the levels do.
            assert_close(a, b)
    assert_close(moving.forward(fresh(moving.inverse(y))), y)


@every_factorization
def test_transport_agrees_with_the_movement_of_values(factorization):
    y = flat_indices(factorization.event_shape)
    if len(factorization.event_shape) == 1:
        levels, moves = identities(4), [stay] * 4
    else:
        levels, moves = moving_levels("channel_major", True)
    flow = dfb.Multiscale(levels, factorization)
    expected = multiscale_move(factorization, *moves)(y.numpy())
    assert_close(flow.inverse(y), expected)
    assert_close(dfb.walk.transport(flow, y, "inverse"), expected)
    assert_close(dfb.walk.transport(flow, tf.constant(expected), "forward"), y)
    chain = dfb.Chain([Scaling(1.0), flow, Scaling(np.arange(expected.size))])
    # In the frame of the data, what the last part contributes is the place of a dimension in the latent.
    places = chain.inverse_log_det_per_dim(y).numpy().ravel() - 1.0
    assert_close(expected.ravel()[places.astype(int)], np.arange(expected.size))
    assert_close(chain.forward_log_det_per_dim(tf.constant(expected)), [-1.0 - np.arange(expected.size)])


class Recorder(dfb.FlowBijector):
    """Keeps the values that it sees."""

    def __init__(self, seen, event_ndims):
        super().__init__(forward_min_event_ndims=event_ndims, parameters=None, name="recorder")
        self.seen = self._no_dependency(seen)

    def _inverse_and_log_det_per_dim(self, y, condition):
        self.seen.append(y.numpy())
        return y, tf.zeros([], y.dtype)

    def _forward_and_log_det_per_dim(self, x, condition):
        self.seen.append(x.numpy())
        return x, tf.zeros([], x.dtype)


@every_factorization
def test_no_level_sees_a_dimension_that_left(factorization):
    shape = factorization.event_shape
    seen = [[] for _ in range(factorization.num_levels)]
    flow = dfb.Multiscale([Recorder(s, len(shape)) for s in seen], factorization)
    y = flat_indices(shape)
    reached = factorization.levels_reached().ravel()
    latent = flow.inverse(y)
    flow.forward(fresh(latent))
    flow.inverse_log_det_per_dim(y)
    flow.forward_log_det_per_dim(latent)
    for k, values in enumerate(seen):
        expected = np.flatnonzero(reached > k)
        assert len(values) == 4
        for value in values:
            assert sorted(value.ravel().astype(int)) == expected.tolist()
            assert value.shape[1:] == (shape if k == 0 else factorization.kept[k - 1].shape)


def operations(flow, event_shape):
    """The types of the operations of a traced inverse pass."""

    @tf.function(autograph=False)
    def inverse(y):
        return flow.inverse(y), flow.inverse_log_det_jacobian(y, len(event_shape))

    concrete = inverse.get_concrete_function(tf.TensorSpec([None, *event_shape], tf.float32))
    return [operation.type for operation in concrete.graph.get_operations()]


def test_the_channel_split_of_a_squeezed_grid_is_a_slice():
    flow = dfb.Multiscale([dfb.Squeeze(), dfb.Squeeze(), tfb.Identity()], Factorization.channels((8, 8, 3), 3))
    kinds = operations(flow, (8, 8, 3))
    assert not [kind for kind in kinds if kind.startswith("Gather")]
    assert "StridedSlice" in kinds


@pytest.mark.parametrize("granularity", ["block", "channel"])
def test_an_lcma_split_is_one_gather(granularity):
    shape = (8, 8, 3)
    flow = dfb.LCMA([dfb.Squeeze(), tfb.Identity()], contributions_of(shape, 1), granularity=granularity)
    assert [kind for kind in operations(flow, shape) if kind.startswith("Gather")] == ["GatherV2"]
    twice = dfb.LCMA(identities(3), contributions_of(shape, 2), granularity=granularity)
    assert [kind for kind in operations(twice, shape) if kind.startswith("Gather")] == ["GatherV2"] * 2


def test_nothing_that_left_is_moved_again():
    # The tensors of later levels have the sizes of what is still in the flow.
    shape = (8, 8, 1)
    flow = dfb.Multiscale([dfb.ActNorm(c) for c in (1, 2, 4)], Factorization.random(shape, 3, seed=0))

    @tf.function(autograph=False)
    def inverse(y):
        return flow.inverse(y)

    concrete = inverse.get_concrete_function(tf.TensorSpec([1, *shape], tf.float32))
    gathered = [op.outputs[0].shape.num_elements() for op in concrete.graph.get_operations() if op.type == "GatherV2"]
    assert gathered == [64, 32]


# Contributions.


def known_flow(event_shape=None):
    """A model that nothing leaves, of elementwise levels with known log-scales that squeeze and permute, and those log-scales.

    Returns:
      The flow, and per level the contribution of every dimension in the frame of the data.
    """
    first, second, third = (normal(GRID, seed).numpy() for seed in (1, 2, 3))
    permutation = [2, 0, 3, 1]
    to_second = composed(lambda y: squeezed(y), shuffled(permutation))
    to_third = composed(to_second, lambda y: squeezed(y, "position_major"))
    flow = dfb.Multiscale(
        [
            dfb.Chain([Scaling(first), dfb.Squeeze(), tfb.Permute(permutation)]),
            dfb.Chain([Scaling(to_second(second)), dfb.Squeeze(order="position_major")]),
            dfb.Chain([tfb.Scale(tf.constant(np.exp(-to_third(third)))), tfb.Reshape([1, 1, 16], [1, 1, 16])]),
        ],
        event_shape=GRID,
    )
    return flow, (first, second, third)


def test_contributions_are_cumulative_and_in_the_frame_of_the_data():
    flow, (first, second, third) = known_flow()
    y = normal([5, *GRID], 1)
    contributions = flow.likelihood_contributions(y)
    assert len(contributions) == 2
    assert_close(contributions[0], np.broadcast_to(first, [5, *GRID]))
    assert_close(contributions[1], np.broadcast_to(first + second, [5, *GRID]))
    assert_close(flow.inverse_log_det_per_dim(y), np.broadcast_to(first + second + third, [5, *GRID]))
    averaged = dimflows.likelihood_contributions(flow, [y[:2], y[2:]])
    assert [a.shape for a in averaged] == [GRID, GRID] and averaged[0].dtype == np.float64
    assert_close(averaged[0], first)
    assert_close(averaged[1], first + second)


def test_contributions_are_averages_over_examples_not_over_batches():
    # tfb.Exp contributes -log y at a dimension.
    flow = dfb.Multiscale([tfb.Exp(), tfb.Identity()])
    data = np.exp(np.random.default_rng(0).normal(size=[7, 3]))
    (contribution,) = dimflows.likelihood_contributions(flow, [data[:1], data[1:3], data[3:]])
    assert_close(contribution, -np.log(data).mean(axis=0))


def test_contributions_have_the_sign_of_the_data_to_latent_direction():
    stretch = np.array([3.0, -1.0, 2.0, -2.0])
    contributions = dimflows.likelihood_contributions(dfb.Multiscale([Scaling(stretch), tfb.Identity()]), [normal([6, 4])])
    assert_close(contributions[0], stretch)
    kept = dfb.LCMA(identities(2), contributions).inverse(flat_indices([4]))
    # The dimensions that are stretched from data to latent stay.
    assert_close(kept[0, :2], [0, 2])


def test_contributions_of_a_flow_that_dimensions_leave_stop_there():
    factorization = Factorization.from_contributions(contributions_of(GRID, 2))
    scales = [normal(shape, seed).numpy() for seed, shape in enumerate([GRID, (2, 2, 2), (1, 1, 4)])]
    flow = dfb.Multiscale([Scaling(s) for s in scales], factorization)
    contributions = dimflows.likelihood_contributions(flow, [normal([3, *GRID], 1)])
    expected = scales[0].copy()
    assert_close(contributions[0], expected)
    for stays, scale in zip(factorization.kept, scales[1:]):
        expected.ravel()[stays.ravel()] += scale.ravel()
        if stays is factorization.kept[0]:
            assert_close(contributions[1], expected)
    assert_close(flow.inverse_log_det_per_dim(normal([1, *GRID]))[0], expected)


@pytest.mark.parametrize(
    "name", ["multiscale_nms_image", "multiscale_channels_squeezed", "lcma_block", "multiscale_vector_random"]
)
def test_contributions_equal_a_walk_by_flat_indices(name):
    entry = ENTRIES[name]
    flow, _ = build(entry, "large")
    y = entry.data()
    moves = [squeezed if "squeeze" in n else stay for n in level_names(flow)]
    _, totals, _ = multiscale_walk(flow, y, moves)
    contributions = flow.likelihood_contributions(y)
    assert len(contributions) == len(flow.levels) - 1
    for actual, expected in zip(contributions, totals):
        assert_close(actual, expected)


@pytest.mark.parametrize("chain", [dfb.Chain, tfb.Chain])
def test_preprocessing_is_not_counted(chain):
    flow, (first, second, _) = known_flow()
    pixels = [tf.constant(np.random.default_rng(s).uniform(0.1, 7.9, size=[2, *GRID])) for s in range(2)]
    alone = dimflows.likelihood_contributions(flow, pixels)
    for bijector in (
        chain([dfb.LogitPreprocess(8), flow]),
        chain([chain([dfb.LogitPreprocess(8)]), chain([flow, tfb.Scale(tf.constant(2.0, tf.float64))])]),
    ):
        contributions = dimflows.likelihood_contributions(bijector, pixels)
        assert_close(contributions[0], first)
        assert_close(contributions[1], first + second)
        assert_close(contributions[0], alone[0])
    # Preprocessing does transform the data that the flow sees.
    exp = dfb.Multiscale([tfb.Exp(), tfb.Identity()])
    data = tf.constant([[1.0, 2.0, 3.0]], tf.float64)
    (counted,) = dimflows.likelihood_contributions(chain([tfb.Scale(tf.constant(0.5, tf.float64)), exp]), [data])
    assert_close(counted, -np.log([2.0, 4.0, 6.0]))


def test_contributions_are_in_the_frame_of_the_data_also_outside_the_flow():
    permutation = [1, 2, 0]
    scale = np.array([0.1, 0.2, 0.4])
    flow = dfb.Chain([tfb.Permute(permutation), dfb.Multiscale([Scaling(scale), tfb.Identity()])])
    (contribution,) = dimflows.likelihood_contributions(flow, [normal([2, 3])])
    assert_close(contribution, flow.inverse_log_det_per_dim(normal([1, 3]))[0])
    # `Permute.forward` gathers, so data dimension j is latent dimension permutation[j].
    assert_close(contribution, scale[permutation])


def test_integer_data_gets_uniform_noise_that_the_seed_determines():
    # tfb.Exp contributes -log y, so that the average tells the noise; its mean over u ~ U[0, 1) is known.
    flow = dfb.Multiscale([tfb.Exp(), tfb.Identity()])
    ones = [tf.ones([4000, 2], tf.int32), tf.ones([4000, 2], tf.uint8)]
    first, again, other = (dimflows.likelihood_contributions(flow, ones, seed=s)[0] for s in (1, 1, 2))
    assert (first == again).all() and (first != other).all()
    mean, second_moment = 2 * np.log(2) - 1, 2 * np.log(2) ** 2 - 4 * np.log(2) + 2
    error = np.sqrt((second_moment - mean**2) / 8000)
    assert (np.abs(first + mean) < 4 * error).all() and (np.abs(other + mean) < 4 * error).all()
    assert first[0] != first[1]
    # Two equal batches get different noise.
    one_batch = dimflows.likelihood_contributions(flow, ones[:1], seed=1)[0]
    assert (one_batch != first).all()
    # Real-valued data gets none.
    assert_close(dimflows.likelihood_contributions(flow, [tf.ones([3, 2])])[0], np.zeros(2))


@pytest.mark.parametrize("name", [parameters(ENTRIES[n], n) for n in MULTISCALES])
def test_the_terms_of_the_levels_sum_to_the_log_density(name):
    entry = ENTRIES[name]
    flow, _ = build(entry, "large")
    kwargs, y = entry.kwargs(), entry.data()
    terms = flow.level_log_prob(y, **kwargs)
    assert terms.shape == [len(y), len(flow.levels)]
    whole = distribution(flow, entry.latent_shape or entry.data_shape)
    assert_close(tf.reduce_sum(terms, axis=-1), whole.log_prob(fresh(y), bijector_kwargs=kwargs))


def test_the_term_of_a_level_is_its_log_det_and_the_density_of_what_leaves():
    flow = dfb.Multiscale([Scaling(0.1), Scaling(0.2), Scaling(0.4)], CHANNELS)
    y = normal([2, *GRID], 1)
    parts = flow.split_latent(flow.inverse(y))[::-1]
    normals = [-0.5 * (z.numpy() ** 2).sum(axis=-1) - 0.5 * z.shape[-1] * np.log(2.0 * np.pi) for z in parts]
    log_dets = [0.1 * 16, 0.2 * 8, 0.4 * 4]
    assert_close(flow.level_log_prob(y), np.stack([n + d for n, d in zip(normals, log_dets)], axis=-1))
    undivided = dfb.Multiscale([Scaling(0.1), Scaling(0.2)], event_shape=GRID)
    assert_close(undivided.level_log_prob(y)[:, 0], [0.1 * 16] * 2)


def test_the_exit_of_a_dimension_counts_for_its_level():
    factorization = Factorization.channels([4], 2)
    flow = dfb.Multiscale([Scaling(0.1), Scaling(0.2)], factorization, exits=[Scaling(0.3), Scaling(0.5)])
    terms = flow.level_log_prob(tf.zeros([4], "float64")) + 2 * 0.5 * np.log(2.0 * np.pi)
    assert_close(terms, [4 * 0.1 + 2 * 0.3, 2 * 0.2 + 2 * 0.5])


def test_the_noise_of_the_levels_may_be_any_of_independent_dimensions():
    flow, _ = build(ENTRIES["multiscale_vector"], "large")
    y = ENTRIES["multiscale_vector"].data()
    dims = int(np.prod(y.shape[1:]))
    for noise in (
        tfd.Sample(tfd.Laplace(tf.constant(0.3, "float64"), 2.0), [dims]),
        tfd.Independent(tfd.Normal(normal([dims], 3), tf.exp(normal([dims], 4))), 1),
    ):
        terms = flow.level_log_prob(y, noise=noise)
        assert_close(tf.reduce_sum(terms, axis=-1), tfd.TransformedDistribution(noise, flow).log_prob(fresh(y)))
    for noise in (
        tfd.MultivariateNormalDiag(tf.zeros([dims], "float64")),
        tfd.Sample(tfd.Normal(tf.constant(0.0, "float64"), 1.0), [dims + 1]),
        tfd.Independent(tfd.MultivariateNormalDiag(tf.zeros([dims, 1], "float64")), 1),
    ):
        with pytest.raises(ValueError, match="multiscale: got the noise .*needs a tfd.Sample or tfd.Independent of scalar"):
            flow.level_log_prob(y, noise=noise)


def test_contributions_do_not_change_the_variables():
    flow, created = build(ENTRIES["multiscale_nms_image"], "large")
    before = [v.numpy() for v in flow.variables]
    dimflows.likelihood_contributions(flow, [normal([3, *GRID])])
    assert created and all((v.numpy() == b).all() for v, b in zip(flow.variables, before))


@pytest.mark.parametrize(
    "bijector, data, message",
    [
        (lambda: tfb.Chain([tfb.Exp()]), [tf.ones([1, 2])], "got chain_of_exp, needs a Multiscale or a chain"),
        (lambda: dfb.Multiscale([tfb.Exp()]), [tf.ones([1, 2])], "multiscale has one level"),
        (lambda: dfb.Multiscale(identities(2)), [], "the dataset is empty"),
    ],
)
def test_errors_of_likelihood_contributions(bijector, data, message):
    with pytest.raises(ValueError, match=f"likelihood_contributions: {message}"):
        dimflows.likelihood_contributions(bijector(), data)


def test_the_three_phases_together():
    # A level that stretches the odd dimensions: they stay, in both granularities.
    stretch = np.zeros(GRID)
    stretch[:, 1::2] = 1.0
    pretrained = dfb.Multiscale([Scaling(stretch), Scaling(0.0)], event_shape=GRID)
    contributions = dimflows.likelihood_contributions(pretrained, [normal([4, *GRID])])
    for granularity in ("block", "channel"):
        flow = dfb.LCMA(identities(2), contributions, granularity=granularity)
        assert flow.factorization == Factorization.from_contributions(contributions, granularity=granularity)
        columns = flow.inverse(flat_indices(GRID)).numpy().ravel() % 4
        assert (columns[:8] % 2 == 1).all() and (columns[8:] % 2 == 0).all()
        reverse = dfb.LCMA(identities(2), contributions, keep="low", granularity=granularity)
        assert (reverse.inverse(flat_indices(GRID)).numpy().ravel()[:8] % 2 == 0).all()


# Exits.


def test_a_gaussian_exit_is_the_conditional_prior_of_glow():
    networks = [Mixer((2, 2, 2), (2, 2, 4), 1), Mixer((1, 1, 4), (1, 1, 8), 2), Mixer((1, 1, 4), (1, 1, 8), 3)]
    exits = [dfb.ConditionalTransform(n, dfb.transformers.Affine("exp")) for n in networks]
    scale = 0.3
    flow = dfb.Multiscale([dfb.Squeeze(), dfb.Squeeze(), Scaling(scale)], CHANNELS, exits=exits)
    y = normal([3, *GRID], 1)

    def gaussian(value, network, given):
        params = network(given).numpy().reshape(*value.shape, 2)
        mean, log_std = -params[..., 0], -params[..., 1]
        log_density = -0.5 * np.square((value - mean) / np.exp(log_std)) - log_std - 0.5 * np.log(2 * np.pi)
        return log_density.sum(axis=(1, 2, 3))

    first = squeezed(y.numpy())
    kept, left = first[..., :2], first[..., 2:]
    expected = gaussian(left, networks[0], tf.constant(kept))
    second = squeezed(kept)
    kept, left = second[..., :4], second[..., 4:]
    expected += gaussian(left, networks[1], tf.constant(kept))
    expected += gaussian(kept * np.exp(scale), networks[2], tf.zeros([3, 1, 1, 4], tf.float64)) + 4 * scale
    assert_close(distribution(flow, [16]).log_prob(y), expected)


def test_exits_may_be_none_unconditional_or_of_tfp():
    flow, y = None, normal([2, 5], 1)
    halves = Factorization.channels([5], 3)
    gaussian = exit_for((3,), (2,), 0, "float64")
    scale = tfb.Scale(tf.constant(2.0, tf.float64))
    plain = dfb.Multiscale(identities(3), halves).inverse(y)
    for exits in ([gaussian, None], [gaussian, None, None], [tfb.Chain([gaussian]), None], [dfb.Chain([gaussian]), None]):
        flow = dfb.Multiscale(identities(3), halves, exits=exits)
        assert_close(flow.inverse(y)[:, :3], plain[:, :3])
        assert_close(flow.inverse(y)[:, 3:], gaussian.inverse(plain[:, 3:], condition=y[:, :3]))
    flow = dfb.Multiscale(identities(3), halves, exits=[None, scale, tfb.Chain([scale])])
    assert_close(flow.inverse(y), plain / [2.0, 2.0, 2.0, 1.0, 1.0])
    assert_close(flow.inverse_log_det_jacobian(y, 1), tf.broadcast_to(-3.0 * tf.math.log(tf.constant(2.0, tf.float64)), [2]))


def test_an_exit_that_moves_dimensions_is_transported():
    halves = Factorization.channels([6], 2)
    permutation = [2, 0, 1]
    network = Mixer([3], [6], 1)
    gaussian = dfb.ConditionalTransform(network, dfb.transformers.Affine("exp"), event_ndims=1)
    exits = [dfb.Chain([gaussian, tfb.Permute(permutation)]), tfb.Permute([1, 2, 0])]
    flow = dfb.Multiscale([Scaling(np.arange(6.0)), tfb.Identity()], halves, exits=exits)
    y, x = normal([2, 6], 1), normal([2, 6], 2)
    plain = dfb.Multiscale([tfb.Identity(), tfb.Identity()], halves, exits=[tfb.Permute(permutation), tfb.Permute([1, 2, 0])])
    move = plain.inverse(flat_indices([6])).numpy()[0].astype(int)
    assert_close(dfb.walk.transport(flow, y, "inverse"), y.numpy()[:, move])
    assert_close(dfb.walk.transport(flow, tf.constant(y.numpy()[:, move]), "forward"), y)
    data = fresh(flow.forward(x))
    assert_close(flow.forward_log_det_per_dim(x), -flow.inverse_log_det_per_dim(data).numpy()[:, move])
    kept = data[:, :3] * tf.exp(tf.range(3.0, dtype=tf.float64))
    expected = np.concatenate([np.zeros([2, 3]), network(kept).numpy()[:, 1::2]], axis=-1) + np.arange(6.0)
    assert_close(flow.inverse_log_det_per_dim(data), expected)


def test_an_exit_may_change_the_shape():
    factorization = Factorization.checkerboard(GRID, 2)
    left, kept = dfb.Chain([dfb.Squeeze(), Scaling(np.arange(8.0))]), dfb.Squeeze(order="position_major")
    flow = dfb.Multiscale(identities(2), factorization, exits=[left, kept])
    y = flat_indices(GRID)
    latent = flow.inverse(y)
    expected = squeezed(factorization.kept[0], "position_major"), squeezed(factorization.left[0]) * np.exp(np.arange(8.0))
    assert_close(latent[0], np.concatenate([part.ravel() for part in expected]))
    assert_close(flow.forward(fresh(latent)), y)
    assert_close(flow.forward_log_det_per_dim(latent)[0], [*np.zeros(8), *-np.arange(8.0)])
    contributions = np.zeros(16)
    contributions[squeezed(factorization.left[0]).ravel()] = np.arange(8.0)
    assert_close(flow.inverse_log_det_per_dim(y).numpy().ravel(), contributions)


def test_an_exit_of_the_deepest_part_works_without_a_factorization():
    scale = tfb.Scale(tf.constant(2.0, tf.float64))
    for flow in (
        dfb.Multiscale([tfb.Permute([1, 0, 3, 2]), tfb.Identity()], exits=[None, scale]),
        dfb.Multiscale([tfb.Permute([1, 0, 3, 2]), tfb.Identity()], exits=[None, scale], event_shape=[4]),
    ):
        y = normal([2, 4], 1)
        assert_close(flow.inverse(y), y.numpy()[:, [1, 0, 3, 2]] / 2.0)
        assert_close(flow.inverse_log_det_per_dim(y), np.full([2, 4], -np.log(2.0)))
        assert_close(flow.forward_log_det_per_dim(y), np.full([2, 4], np.log(2.0)))
        assert_close(flow.forward(fresh(flow.inverse(y))), y)


# Errors.


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: dfb.Multiscale([]), ValueError, "got no levels"),
        (lambda: dfb.Multiscale(identities(2), CHANNELS), ValueError, "got 2 levels, but the factorization is for 3"),
        (lambda: dfb.Multiscale(identities(3), "channels"), TypeError, "got factorization 'channels', needs"),
        (
            lambda: dfb.Multiscale(identities(3), CHANNELS, event_shape=(8, 8, 1)),
            ValueError,
            r"got event shape \(8, 8, 1\), but the factorization is for \(4, 4, 1\)",
        ),
        (lambda: dfb.Multiscale(identities(3), CHANNELS, exits=[None]), ValueError, "got 1 exits for 3 levels, needs 2 or 3"),
        (lambda: dfb.Multiscale(identities(2), exits=[tfb.Exp()]), ValueError, "got exits but no factorization"),
        (lambda: dfb.Multiscale([dfb.Squeeze(), tfb.Exp()]), ValueError, "got neither a factorization nor an event_shape"),
        (lambda: dfb.Multiscale([dfb.Squeeze()] * 3, event_shape=GRID), ValueError, "height 1 is not divisible"),
        (
            lambda: dfb.LCMA(identities(3), [np.zeros(GRID)]),
            ValueError,
            "got 3 levels, but the factorization is for 2",
        ),
        (
            lambda: dfb.Multiscale(identities(3), CHANNELS).inverse(tf.ones([1, 4, 2, 1])),
            ValueError,
            r"multiscale: got values of shape \(1, 4, 2, 1\), needs events of shape \[4, 4, 1\]",
        ),
        (
            lambda: dfb.Multiscale(identities(3), CHANNELS).likelihood_contributions(tf.ones([1, 2, 4, 1])),
            ValueError,
            "multiscale: got values of shape",
        ),
        (
            lambda: dfb.Multiscale(identities(3), CHANNELS).forward(tf.ones([1, 15])),
            ValueError,
            r"multiscale: got values of shape \(1, 15\), needs events of shape \[16\]",
        ),
    ],
)
def test_errors_of_multiscale(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_level_that_loses_dimensions_is_an_error():
    class Half(dfb.FlowBijector):
        def __init__(self):
            super().__init__(forward_min_event_ndims=1, parameters=None, name="half")

        def _transport_inverse(self, per_dim):
            return per_dim[..., :2]

    with pytest.raises(ValueError, match="level 0"):
        dfb.Multiscale([Half(), tfb.Identity()], Factorization.channels([4], 2))


# Bookkeeping.


def test_the_order_of_dimensions_is_saved_with_the_weights():
    first, second = (dfb.Multiscale(identities(2), Factorization.random(GRID, 2, seed=s)) for s in (0, 1))
    (saved,) = [v for v in first.variables if v.dtype.is_integer]
    (other,) = [v for v in second.variables if v.dtype.is_integer]
    assert_close(saved, first.inverse(flat_indices(GRID))[0])
    assert not saved.trainable and (saved.numpy() != other.numpy()).any()


def test_the_parts_of_a_multiscale_are_public():
    levels = identities(3)
    flow = dfb.Multiscale(levels, CHANNELS)
    assert flow.levels == levels and flow.factorization is CHANNELS
    assert dfb.Multiscale(levels).factorization is None
    assert isinstance(dfb.LCMA(levels, contributions_of(GRID, 2)), dfb.Multiscale)


def test_a_factorization_serialised_as_json_gives_the_same_flow():
    entry = ENTRIES["lcma_block"]
    flow, _ = build(entry, "large")
    restored = Factorization.from_config(json.loads(json.dumps(flow.factorization.get_config())))
    y = entry.data()
    assert_close(dfb.Multiscale(flow.levels, restored).inverse(y), flow.inverse(y), 0.0)


def test_contributions_are_carried_through_outer_bijectors_one_after_the_other():
    outer = dfb.Chain([tfb.Permute([1, 2, 3, 0]), tfb.Permute([1, 0, 2, 3])])
    statistics = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    flow = dfb.Chain([*outer.bijectors, dfb.Multiscale([dfb.ElementwiseAffine(0.0, statistics), tfb.Identity()])])
    (contributions,) = dimflows.likelihood_contributions(flow, [tf.zeros([3, 4])])
    assert_close(contributions, outer.forward(statistics))
    other = dfb.Chain(outer.bijectors[::-1])
    assert np.abs(contributions - other.forward(statistics)).max() > 0.5


def test_numbers_pass_the_exit_of_the_deepest_part():
    flow = dfb.Multiscale([dfb.ActNorm(4), dfb.ActNorm(4)], exits=[None, tfb.Permute([1, 2, 3, 0])])
    numbers = tf.constant([1.0, 2.0, 3.0, 4.0])
    moved = dfb.walk.transport(flow, numbers, "inverse")
    assert_close(moved, flow.inverse(numbers), 0.0)
    assert_close(dfb.walk.transport(flow, moved, "forward"), numbers, 0.0)


def test_standard_errors_are_deviations_over_the_root_of_the_number():
    data = np.random.default_rng(0).uniform(0.5, 2.0, [3, 20, 4])
    flow = dfb.Multiscale([tfb.Exp(), tfb.Identity()])
    means, errors = dimflows.likelihood_contributions(flow, [tf.constant(batch) for batch in data], standard_errors=True)
    contributions = -np.log(data.reshape(60, 4))
    assert_close(means[0], contributions.mean(axis=0))
    assert_close(errors[0], contributions.std(axis=0) / np.sqrt(60))
