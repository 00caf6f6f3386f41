"""Recipes: what they build, from plain values, reproducibly, in the reference sizes."""

import json
import re
import warnings
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import slow

import tfp_dimflows as dimflows
from tfp_dimflows import keras_bridge, networks, recipes

dfb, dfd = dimflows.bijectors, dimflows.distributions
tfd = tfp.distributions

LEVELS = 17
SMALL = {  # arguments of a small model of 8x8x1 images
    "realnvp": {"num_levels": 2, "depth": 1, "width": 4, "num_blocks": 1},
    "glow": {"num_levels": 2, "depth": 1, "width": 4},
}
SMALL |= {f"lcma-{name}": options for name, options in SMALL.items()}
SMALL["pnf"] = SMALL["realnvp"] | {"num_halvings": 1}
SMALL["principal-pnf"] = {"num_halvings": 2, "depth": 1, "width": 4}
IMAGE, VECTOR = [8, 8, 1], [7]


def small(name, event_shape=IMAGE, **options):
    return recipes.get(name)(event_shape, **(SMALL[name] | options))


def contributions(event_shape=IMAGE, factor_outs=1, seed=0):
    return np.random.default_rng(seed).normal(size=[factor_outs, *event_shape])


def multiscale(distribution):
    """The `Multiscale` of a recipe's distribution."""
    return dfd.structure_of(distribution).multiscale


def events(event_shape, num=3, grey_levels=None):
    generator = np.random.default_rng(0)
    if grey_levels is None:
        return generator.normal(size=[num, *event_shape]).astype(np.float32)
    return generator.integers(0, grey_levels, size=[num, *event_shape]).astype(np.int32)


def count(distribution):
    return sum(int(np.prod(v.shape)) for v in distribution.trainable_variables)


def copy_weights(source, target):
    assert len(source.variables) == len(target.variables)
    for mine, theirs in zip(target.variables, source.variables):
        mine.assign(theirs)


def perturb(distribution, scale=0.1, seed=0):
    """Moves every trainable variable away from its initial value, where most flows are nearly the identity."""
    generator = np.random.default_rng(seed)
    for v in distribution.trainable_variables:
        v.assign_add(tf.constant(scale * generator.normal(size=v.shape), v.dtype))
    return distribution


# Building.


def test_names():
    lcma = [f"lcma-{base}" for base in ("glow", "iresnet", "realnvp", "residual-flow")]
    others = ["ffjord", "flow-vae", "flowpp", "glow", "iaf", "iresnet", "maf", "nice", "nsf", "pixelcnn-flow", "pnf"]
    others += ["principal-pnf", "realnvp", "residual-flow", "vae-flow", "vflow", "vflow-glow", "wavenet-flow"]
    assert recipes.names() == sorted([*others, *lcma])
    assert {name: recipes.base_of(name) for name in recipes.names() if recipes.base_of(name)} == {
        f"lcma-{base}": base for base in ("glow", "iresnet", "realnvp", "residual-flow")
    }
    assert recipes.get("lcma-glow") is recipes.lcma_glow


CASES = [(name, IMAGE) for name in SMALL]
CASES += [("realnvp", VECTOR), ("lcma-realnvp", VECTOR), ("pnf", [8]), ("principal-pnf", VECTOR)]


@pytest.mark.parametrize(
    ("levels", "name", "event_shape"),
    [
        *((LEVELS, *case) for case in CASES),
        *((slow if name.startswith("lcma") or name == "pnf" else pytest.param)(None, name, shape) for name, shape in CASES),
    ],
    ids=lambda v: f"{len(v)}d" if isinstance(v, list) else v,
)
def test_every_recipe_samples_and_scores(name, event_shape, levels):
    distribution = small(name, event_shape, grey_levels=levels)
    assert distribution.event_shape == event_shape and distribution.batch_shape == []
    samples = distribution.sample(4, seed=0)
    assert samples.shape == [4, *event_shape]
    x = events(event_shape, grey_levels=levels)
    kwargs = {} if levels is None else {"seed": (0, 1)}
    log_prob = distribution.log_prob(x, **kwargs)
    assert log_prob.shape == [3] and log_prob.dtype == tf.float32
    assert np.isfinite(log_prob).all() and np.isfinite(distribution.log_prob(samples, **kwargs)).all()
    if levels is None:
        assert samples.dtype == tf.float32
        assert distribution.distribution.event_shape == [np.prod(event_shape)]
        assert distribution.bijector.inverse_event_shape(event_shape) == [np.prod(event_shape)]
    else:
        assert isinstance(distribution, dfd.Dequantized) and distribution.grey_levels == levels
        assert samples.dtype == tf.int32 and 0 <= samples.numpy().min() <= samples.numpy().max() < levels


@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_levels_add_only_the_preprocessing(name):
    continuous, integer = perturb(small(name)), perturb(small(name, grey_levels=LEVELS))
    x = events(IMAGE, grey_levels=LEVELS)
    y = tf.constant(x, tf.float32) + 0.3
    preprocess = integer.distribution.bijector.bijectors[0]
    by_hand = continuous.log_prob(preprocess.inverse(y)) + preprocess.inverse_log_det_jacobian(y, event_ndims=3)
    np.testing.assert_allclose(integer.distribution.log_prob(y), by_hand, rtol=1e-5)
    if name == "realnvp":
        p = 0.05 + 0.9 * y.numpy() / LEVELS
        np.testing.assert_allclose(preprocess.inverse(y), np.log(p / (1.0 - p)), rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_allclose(preprocess.inverse(y), y.numpy() / LEVELS - 0.5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_options(name):
    options = [{"batch_norm": True}, {"alpha": 0.01}] if name == "realnvp" else [{"coupling": "additive"}]
    for option in [*options, {"num_levels": 1}]:
        distribution = small(name, grey_levels=LEVELS, **option)
        assert np.isfinite(distribution.log_prob(events(IMAGE, grey_levels=LEVELS))).all()


def test_additive_glow_has_a_constant_log_det():
    # Without exits and couplings that scale, only actnorms and convolutions remain.
    flow = perturb(small("glow", num_levels=1, coupling="additive", depth=2))
    steps = flow.bijector.levels[0]
    log_dets = steps.inverse_log_det_jacobian(events(IMAGE), event_ndims=3)
    np.testing.assert_allclose(log_dets, np.full([3], log_dets[0]), rtol=1e-6)
    assert abs(log_dets[0]) > 0.1


@pytest.fixture
def float64():
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "event_shape"),
    [("realnvp", IMAGE), ("realnvp", VECTOR), ("glow", IMAGE), ("pnf", IMAGE), ("pnf", [8])],
    ids=["realnvp", "vector", "glow", "pnf", "pnf-vector"],
)
def test_float64(float64, name, event_shape):
    distribution = perturb(small(name, event_shape, grey_levels=LEVELS))
    assert {v.dtype for v in distribution.trainable_variables} == {tf.float64}
    x = events(event_shape, grey_levels=LEVELS)
    assert distribution.log_prob(x).dtype == tf.float64
    bijector = distribution.distribution.bijector
    y = tf.constant(x, tf.float64) + 0.25
    np.testing.assert_allclose(bijector.forward(tf.identity(bijector.inverse(y))), y, rtol=1e-9, atol=1e-9)
    z = tf.random.stateless_normal([3, np.prod(event_shape)], seed=[0, 1], dtype=tf.float64)
    np.testing.assert_allclose(bijector.inverse(tf.identity(bijector.forward(z))), z, rtol=1e-9, atol=1e-9)


# Factorizations.


def factorization_options(event_shape):
    shape = tuple(event_shape)
    images = len(shape) == 3
    other = dfb.DimensionFactorization.from_contributions(contributions(shape))
    reverse = dfb.DimensionFactorization.from_contributions(contributions(shape), keep="low")
    build = dfb.DimensionFactorization
    options = {
        "conventional": ("conventional", build.checkerboard(shape, 2) if images else build.channels(shape, 2)),
        "channels": ("channels", build.channels(shape, 2)),
        "principal": ("principal", build.channels(shape, 2)),
        "random": ("random", build.random(shape, 2, seed=0)),
        "object": (other, other),
        "config": (json.loads(json.dumps(reverse.get_config())), reverse),
        "nothing": (None, None),
    }
    return options | ({"checkerboard": ("checkerboard", build.checkerboard(shape, 2))} if images else {})


@pytest.mark.parametrize("option", factorization_options(IMAGE))
@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_factorizations_of_images(name, option):
    argument, expected = factorization_options(IMAGE)[option]
    if name == "glow" and option == "conventional":
        expected = dfb.DimensionFactorization.channels(IMAGE, 2)
    distribution = small(name, factorization=argument)
    assert multiscale(distribution).factorization == expected
    assert_round_trip(perturb(distribution))


@pytest.mark.parametrize("option", factorization_options(VECTOR))
def test_factorizations_of_vectors(option):
    argument, expected = factorization_options(VECTOR)[option]
    distribution = small("realnvp", VECTOR, factorization=argument)
    assert multiscale(distribution).factorization == expected
    assert_round_trip(perturb(distribution))


ROTATED = {  # the level of which the rotation is the last part before the couplings that are the identity at first
    "realnvp": ({"depth": 2}, IMAGE, 1),
    "glow-even": ({"depth": 2}, IMAGE, 2),
    "glow-odd": ({"depth": 3}, IMAGE, 2),
    "iresnet": ({"depth": 1, "width": 4}, IMAGE, 2),
    "residual-flow": ({"depth": 1, "width": 4}, IMAGE, 1),
    "realnvp-vector": ({"depth": 2}, VECTOR, 2),
    "glow-vector": ({"depth": 3}, VECTOR, 2),
    "iresnet-vector": ({"depth": 1, "width": 4}, VECTOR, 2),
    "ffjord": ({"num_levels": 2, "hidden": [4], "num_steps": 2}, IMAGE, 1),
    "ffjord-vector": ({"num_levels": 2, "hidden": [4], "num_steps": 2}, VECTOR, 2),
    "residual-flow-vector": ({"depth": 1, "width": 4}, VECTOR, 2),
}
QUICK = ("realnvp", "glow-odd", "residual-flow-vector")


@pytest.mark.parametrize("case", [case if case in QUICK else slow(case) for case in ROTATED])
def test_principal_components_are_what_stays(case):
    options, shape, num_rotations = ROTATED[case]
    name = next(name for name in ("realnvp", "glow", "iresnet", "ffjord", "residual-flow") if case.startswith(name))
    distribution = recipes.get(name)(shape, **SMALL.get(name, {}) | options, factorization="principal")
    rotations = [
        part for level in multiscale(distribution).levels for part in level.bijectors if isinstance(part, dfb.Rotation)
    ]
    assert len(rotations) == num_rotations
    generator = np.random.default_rng(0)
    x = generator.normal(size=[400, *shape]).cumsum(axis=1)[..., :1] + 0.1 * generator.normal(size=[400, *shape])
    x = (x if len(shape) == 3 else x @ generator.normal(size=[7, 7])).astype(np.float32)
    with dimflows.adaptation():
        distribution.log_prob(x)
    level = multiscale(distribution).levels[0]
    place = next(k for k, part in enumerate(level.bijectors) if isinstance(part, dfb.Rotation))
    rotated = dfb.Chain(level.bijectors[: place + 1])
    for part in distribution.bijector.bijectors[:-1] if isinstance(distribution.bijector, dfb.Chain) else []:
        x = part.inverse(x)
    before, after = (b.inverse(x).numpy() for b in (rotated, level))
    before, after = (value.reshape(-1, value.shape[-1]) for value in (before, after))
    deviations = before.std(axis=0)
    assert (np.diff(deviations) < 1e-3).all() and deviations[0] > 2.0 * deviations[-1]
    if name in ("realnvp", "glow"):  # whose couplings start as constant scales
        same = np.abs(np.diag(np.corrcoef(before, after, rowvar=False)[: before.shape[-1], before.shape[-1] :]))
        np.testing.assert_allclose(same, np.ones_like(same), atol=1e-3)


@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_rotations_by_name(name):
    for rotation, changes in (("haar", False), ("random", True)):
        first, again, other = (small(name, rotation=rotation, factorization=None, seed=seed) for seed in (0, 0, 1))
        assert multiscale(first).factorization is None
        matrices = [
            next(v.numpy() for v in distribution.variables if v.name.startswith("matrix"))
            for distribution in (first, again, other)
        ]
        np.testing.assert_array_equal(*matrices[:2])
        assert np.array_equal(matrices[0], matrices[2]) != changes
    with pytest.raises(ValueError, match=f"{name} of events .*: rotation: got 'haar' with factorization='principal'"):
        small(name, rotation="haar", factorization="principal")
    with pytest.raises(ValueError, match=f"{name} of events .*: Rotation: got matrix='fourier'"):
        small(name, rotation="fourier")


@pytest.mark.slow
def test_lcma_in_a_rotated_frame():
    given = contributions()
    first = small("lcma-realnvp", rotation="principal")
    second = small("lcma-realnvp", rotation="principal", granularity="squeezed", contributions=given)
    expected = dfb.DimensionFactorization.from_contributions(given, granularity="squeezed")
    assert multiscale(first).factorization is None and multiscale(second).factorization == expected
    for distribution in (first, second):
        assert any(isinstance(part, dfb.Rotation) for part in multiscale(distribution).levels[0].bijectors)
        assert_round_trip(perturb(distribution))


@pytest.mark.parametrize(
    ("shape", "options", "stage_shapes"),
    [
        ([8, 16, 2], {}, [(2, 4, 8), (4, 8, 4), (8, 16, 2)]),
        ([4, 4, 1], {"whole": True, "code_dims": 3}, [(1, 1, 3), (1, 1, 4), (2, 2, 2), (4, 4, 1)]),
        ([4, 4, 1], {"network": "dense"}, [(4,), (8,), (16,)]),
        ([7], {"num_halvings": 1, "code_dims": 2}, [(2,), (4,), (7,)]),
        ([8, 8, 1], {"trainable": True}, [(2, 2, 4), (4, 4, 2), (8, 8, 1)]),
        ([7], {"num_halvings": 1, "trainable": True}, [(4,), (7,)]),
    ],
    ids=["blocks", "whole", "dense", "vector", "trained blocks", "trained vector"],
)
def test_codes_of_principal_components_are_linear(shape, options, stage_shapes):
    distribution = small("principal-pnf", shape, **options)
    y = events(shape, 80)
    with dimflows.adaptation():
        distribution.log_prob(y)
    perturb(distribution, 0.03)
    *outer, flow = distribution.bijector.bijectors if isinstance(distribution.bijector, dfb.Chain) else [distribution.bijector]
    assert flow.stage_shapes == stage_shapes
    assert all(bool(split.rotation.trainable_variables) == options.get("trainable", False) for split in flow.splits)
    x = dfb.Chain(outer).inverse(y) if outer else tf.constant(y)
    code = flow.encode(x)
    np.testing.assert_allclose(flow.encode(0.25 * x[:40] + 0.75 * x[40:]), 0.25 * code[:40] + 0.75 * code[40:], atol=1e-3)
    np.testing.assert_allclose(flow.encode(flow.decode(code)), code, atol=1e-3)
    assert_round_trip(distribution)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ([8, 8, 1], {"num_halvings": 4}),
            r"got event shape .* and num_halvings=4, needs height and width divisible by 16",
        ),
        (([8, 8, 1], {"code_dims": 8, "num_halvings": 3}), "got code_dims=8 of the 8 dimensions of images of 1x1 pixels"),
        (([7], {"num_halvings": 1, "code_dims": 2.0}), "got code_dims=2.0, needs a positive integer"),
        (([7], {"num_halvings": 3}), "got code_dims=None and as many halvings as leave 1 dimensions, needs two or more"),
        (([8, 8, 1], {"code_dims": 6, "num_halvings": 2}), "got code_dims=6 of .* needs fewer, and a multiple of 4"),
        (([7], {"whole": True}), "got whole=True for vectors"),
        (([8, 8, 1], {"depth": 0}), "got depth=0, needs a positive integer"),
    ],
)
def test_principal_codes_that_do_not_fit(arguments, message):
    shape, options = arguments
    with pytest.raises(ValueError, match=f"principal-pnf: {message}"):
        recipes.principal_pnf(shape, **options)


def assert_round_trip(distribution):
    x = events(distribution.event_shape)
    z = distribution.bijector.inverse(x)
    assert z.shape == [3, np.prod(x.shape[1:])]
    np.testing.assert_allclose(distribution.bijector.forward(tf.identity(z)), x, atol=1e-4)
    assert np.isfinite(distribution.log_prob(x)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "channels", "channels_if_nothing_leaves"),
    # Channels that the conditioners of each level see: checkerboard all of them, channel couplings half of the squeezed ones.
    [("realnvp", [{1, 2}, {2, 4}, {4}], [{1, 2}, {4, 8}, {16}]), ("glow", [{2}, {4}, {8}], [{2}, {8}, {32}])],
)
def test_channels_grow_as_nothing_leaves(name, channels, channels_if_nothing_leaves):
    for factorization, expected in (("conventional", channels), (None, channels_if_nothing_leaves)):
        distribution = small(name, num_levels=3, factorization=factorization)
        levels = multiscale(distribution).levels
        # The networks of Glow's steps are in a loop, where only the variables are found.
        halves = [{v.shape[-1] // 2 for v in level.trainable_variables if v.name == "shift:0"} for level in levels]
        if name == "realnvp":
            halves = [{layer.inputs for layer in keras_bridge.collect(level).layers} for level in levels]
        assert halves == expected


@pytest.mark.parametrize("event_shape", [IMAGE, VECTOR])
def test_the_attribution_of_glow_shares_the_same_log_det_otherwise(event_shape):
    x, shares = events(event_shape), []
    for attribution in ("polar", "lu"):
        flow = perturb(small("glow", event_shape, num_levels=1, attribution=attribution))
        shares.append(multiscale(flow).inverse_log_det_per_dim(x).numpy().reshape(len(x), -1))
    np.testing.assert_allclose(shares[0].sum(axis=-1), shares[1].sum(axis=-1), rtol=1e-4)
    assert np.abs(shares[0] - shares[1]).max() > 1e-2


@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_pairs_have_one_level_by_default(name):
    assert [len(multiscale(recipes.get(name)(shape)).levels) for shape in ([2], [3], [8, 8, 1])] == [1, 2, 2]


def test_dimensions_of_vectors_halve():
    for factorization, expected in (("conventional", [7, 4, 2]), (None, [7, 7, 7])):
        distribution = small("realnvp", VECTOR, num_levels=3, factorization=factorization)
        levels = multiscale(distribution).levels
        sizes = [keras_bridge.collect(level).layers[0] for level in levels]
        assert [layer.inputs + layer.outputs // 2 for layer in sizes] == expected


@pytest.mark.parametrize("name", ["lcma-realnvp", "lcma-glow"])
def test_lcma_follows_contributions(name):
    assert multiscale(small(name)).factorization is None
    for options in ({}, {"keep": "low"}, {"granularity": "channel"}, {"keep": ["low"]}):
        given = contributions()
        factorization = multiscale(small(name, contributions=given, **options)).factorization
        assert factorization == dfb.DimensionFactorization.from_contributions(given, **options)
    assert multiscale(small(name, contributions=given.tolist(), **options)).factorization == factorization
    base = recipes.get(recipes.base_of(name))
    conventional = base(IMAGE, **SMALL[name])
    assert count(small(name, contributions=contributions())) == count(conventional) < count(small(name))


def test_lcma_of_vectors():
    given = contributions(VECTOR, factor_outs=2)
    distribution = small("lcma-realnvp", VECTOR, num_levels=3, contributions=given, keep=["high", "low"])
    expected = dfb.DimensionFactorization.from_contributions(given, keep=["high", "low"])
    assert multiscale(distribution).factorization == expected
    assert count(distribution) == count(small("realnvp", VECTOR, num_levels=3))


def test_contributions_of_the_first_phase_fit_the_third():
    first = perturb(small("lcma-glow", num_levels=3))
    given = dimflows.likelihood_contributions(first.bijector, [events(IMAGE)])
    third = small("lcma-glow", num_levels=3, contributions=given)
    assert multiscale(third).factorization.num_levels == 3
    assert_round_trip(third)


# Dense networks on images.


def test_a_dense_image_model_is_that_of_flat_events():
    image = small("realnvp", [4, 4, 1], network="dense", seed=3, grey_levels=LEVELS)
    vector = small("realnvp", [16], seed=3, grey_levels=LEVELS)
    copy_weights(perturb(multiscale(vector)), multiscale(image))
    assert count(image) == count(vector) - 2 * 16  # an ActNorm next to vectors
    x = events([4, 4, 1], grey_levels=LEVELS)
    np.testing.assert_array_equal(image.log_prob(x, seed=(0, 1)), vector.log_prob(x.reshape([3, 16]), seed=(0, 1)))
    samples = vector.sample(2, seed=(0, 1))
    np.testing.assert_array_equal(image.sample(2, seed=(0, 1)), tf.reshape(samples, [2, 4, 4, 1]))


def dense_parameters(dims, num_levels, depth, width, blocks, condition=0):
    """MLPs, one gain of the log-scale for each coupling, and ActNorms."""
    total = 0
    for _ in range(num_levels):
        for i in range(depth + 1):
            inputs, outputs = (dims - dims // 2, dims // 2)[:: 1 if i % 2 else -1]
            first, last = (inputs + condition + 1) * width, (width + 1) * 2 * outputs
            total += first + (blocks - 1) * (width + 1) * width + last + 1 + 2 * dims
        dims = (dims + 1) // 2
    return total


@pytest.mark.parametrize("condition", [0, 5])
@pytest.mark.parametrize("event_shape", [[4, 4, 1], [3, 5, 1], [21]], ids=str)
def test_parameters_of_dense_models(event_shape, condition):
    sizes = {"num_levels": 3, "depth": 2, "width": 6, "num_blocks": 2}
    condition_shape = [condition] if condition else None
    distribution = recipes.realnvp(event_shape, network="dense", condition_shape=condition_shape, **sizes)
    expected = dense_parameters(np.prod(event_shape), *sizes.values(), condition)
    expected += 2 * 21 if event_shape == [21] else 0  # the ActNorm next to vectors
    assert count(distribution) == expected


def test_dense_is_the_only_network_of_vectors():
    default, dense = small("realnvp", VECTOR), small("realnvp", VECTOR, network="dense")
    for a, b in zip(default.variables, dense.variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_convolutions_are_the_default_of_images():
    kinds = {"conv": networks.ResNet, None: networks.ResNet, "dense": networks.MLP}
    for network, kind in kinds.items():
        layers = keras_bridge.collect(small("realnvp", network=network)).layers
        assert layers and all(isinstance(layer, kind) for layer in layers)


LOG_DETS = {
    "realnvp-dense": lambda: small("realnvp", [4, 4, 1], network="dense", depth=2),
    "realnvp-dense-conditional": lambda: small("realnvp", [4, 4, 1], network="dense", condition_shape=[3]),
    "realnvp-vector-condition": lambda: small("realnvp", [4, 4, 1], condition_shape=[3]),
    "realnvp-image-condition": lambda: small("realnvp", [4, 4, 1], condition_shape=[4, 4, 2]),
    "glow-image-condition": lambda: small("glow", [4, 4, 1], condition_shape=[4, 4, 2]),
    "pnf-one-pixel": lambda: small("pnf", [2, 2, 2]),
    "pnf-dense": lambda: small("pnf", [4, 4, 1], network="dense"),
    "pnf-integers": lambda: small("pnf", [4, 4, 1], grey_levels=LEVELS).distribution,
    "pnf-vector": lambda: small("pnf", [12], num_halvings=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LOG_DETS)
def test_log_dets_are_those_of_the_jacobian(float64, case):
    distribution = perturb(LOG_DETS[case]())
    bijector, shape = distribution.bijector, distribution.event_shape
    generator = np.random.default_rng(1)
    x = tf.constant(generator.uniform(0.5, 3.0, size=[1, *shape]))
    kwargs = {}
    if "condition" in case:
        kwargs = {"condition": generator.normal(size=[1, 4, 4, 2] if "image" in case else [1, 3])}
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        z = bijector.inverse(x, **kwargs)
    dims = shape.num_elements()
    jacobian = tf.reshape(tape.jacobian(z, x, experimental_use_pfor=False), [dims, dims])
    _, expected = np.linalg.slogdet(jacobian)
    log_det = bijector.inverse_log_det_jacobian(tf.identity(x), event_ndims=shape.rank, **kwargs)
    np.testing.assert_allclose(log_det, [expected], rtol=1e-9)
    per_dim = bijector.inverse_log_det_per_dim(x, **kwargs)
    np.testing.assert_allclose(tf.reduce_sum(per_dim), expected, rtol=1e-9)
    np.testing.assert_allclose(bijector.forward(tf.identity(z), **kwargs), x, rtol=1e-9)


# Conditional flows.


CONDITIONAL = {
    "realnvp-vector": ("realnvp", IMAGE, [2], {}),
    "realnvp-image": ("realnvp", IMAGE, [8, 8, 2], {"num_levels": 3}),
    "realnvp-image-random": ("realnvp", IMAGE, [8, 8, 2], {"factorization": "random"}),
    "realnvp-dense": ("realnvp", IMAGE, [2], {"network": "dense"}),
    "realnvp-of-vectors": ("realnvp", VECTOR, [2], {}),
    "glow-vector": ("glow", IMAGE, [2], {}),
    "glow-image": ("glow", IMAGE, [8, 8, 2], {"num_levels": 3}),
    "lcma-realnvp": ("lcma-realnvp", IMAGE, [8, 8, 2], {}),
    "lcma-glow": ("lcma-glow", IMAGE, [2], {"contributions": contributions()}),
    "lcma-realnvp-of-vectors": ("lcma-realnvp", VECTOR, [2], {}),
}


def conditional(case, **further):
    name, event_shape, condition_shape, options = CONDITIONAL[case]
    distribution = perturb(small(name, event_shape, condition_shape=condition_shape, **options, **further), scale=0.05)
    condition = np.random.default_rng(1).normal(size=[3, *condition_shape]).astype(np.float32)
    return distribution, condition


@pytest.mark.slow
@pytest.mark.parametrize("case", CONDITIONAL)
def test_the_density_depends_on_all_of_the_condition(case):
    distribution, condition = conditional(case)
    condition = tf.constant(condition)
    with tf.GradientTape() as tape:
        tape.watch(condition)
        log_prob = distribution.log_prob(events(distribution.event_shape), bijector_kwargs={"condition": condition})
    gradient = tape.gradient(log_prob, condition).numpy()
    assert np.isfinite(gradient).all() and (gradient != 0.0).all()


def coupling_networks(distribution):
    kinds = (networks.ResNet, networks.GlowConvNet, networks.MLP)
    scans = [part for part in distribution.submodules if isinstance(part, dfb.Scan)]
    holders = [distribution, *(scan.bijectors for scan in scans)]
    return [layer for layer in keras_bridge.collect(holders).layers if isinstance(layer, kinds)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CONDITIONAL)
def test_every_coupling_network_takes_the_condition(case):
    distribution, condition = conditional(case)
    name, event_shape, _, options = CONDITIONAL[case]
    channels = [layer.condition_channels for layer in coupling_networks(distribution)]
    assert channels and set(channels) <= {condition.shape[-1] * 4**k for k in range(4 if "image" in case else 2)}
    assert min(channels) >= condition.shape[-1]
    plain = small(name, event_shape, **options)
    assert [layer.condition_channels for layer in coupling_networks(plain)] == [0] * len(channels)


@pytest.mark.slow
@pytest.mark.parametrize("case", CONDITIONAL)
def test_conditional_flows_are_inverted(case):
    distribution, condition = conditional(case, grey_levels=LEVELS)
    event_shape = distribution.event_shape
    samples = distribution.sample(3, seed=0, bijector_kwargs={"condition": condition})
    assert samples.shape == [3, *event_shape]
    assert 0 <= samples.numpy().min() <= samples.numpy().max() < LEVELS
    x = events(event_shape, grey_levels=LEVELS)
    z = distribution.encode(x, condition=condition)
    np.testing.assert_array_equal(distribution.decode(z, condition=condition), x)
    assert np.abs(distribution.encode(x, condition=-condition) - z).max() > 1e-3


def test_the_configuration_holds_the_condition():
    original, condition = conditional("realnvp-image")
    config = json.loads(json.dumps(recipes.config_of(original)))
    assert config["arguments"]["condition_shape"] == [8, 8, 2]
    rebuilt = recipes.get(config["recipe"])(**config["arguments"])
    copy_weights(original, rebuilt)
    x, kwargs = events(IMAGE), {"bijector_kwargs": {"condition": condition}}
    np.testing.assert_array_equal(rebuilt.log_prob(x, **kwargs), original.log_prob(x, **kwargs))


def test_conditions_of_another_shape():
    distribution, condition = conditional("realnvp-image")
    for shape in ([3, 2], [3, 4, 4, 2], [3, 16, 16, 2], [3, 8, 8, 1], [3, 8, 8, 8], [3, 8, 8], [2, 8, 8, 2]):
        with pytest.raises(ValueError, match="condition"):
            distribution.log_prob(events(IMAGE), bijector_kwargs={"condition": np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match="got no condition"):
        distribution.log_prob(events(IMAGE))
    with pytest.raises(ValueError, match="condition"):
        small("realnvp").log_prob(events(IMAGE), bijector_kwargs={"condition": condition})


# Progressive flows.


def multiscale_of(stage):
    """The multi-scale flow of a stage."""
    while not isinstance(stage, dfb.Multiscale):
        stage = stage.bijector if isinstance(stage, dfb.EmbedCondition) else stage.bijectors[-1]
    return stage


def progressive(distribution):
    return (distribution.distribution if isinstance(distribution, dfd.Dequantized) else distribution).bijector


def test_stages_grow_the_width_first():
    flow = progressive(small("pnf", [8, 8, 3], num_halvings=2, grey_levels=LEVELS))
    assert isinstance(flow, dfb.PNF) and len(flow.stages) == 5
    assert flow.stage_shapes == [(2, 2, 3), (2, 4, 3), (4, 4, 3), (4, 8, 3), (8, 8, 3)]
    signal = progressive(small("pnf", [8], num_halvings=2))
    assert signal.stage_shapes == [(2,), (4,), (8,)]


def test_every_stage_has_sizes_of_its_own():
    widths, blocks = [4, 6, 5], [1, 3, 2]
    flow = progressive(small("pnf", width=widths, num_blocks=blocks))
    for stage, width, depth in zip(flow.stages, widths, blocks, strict=True):
        layers = keras_bridge.collect(stage).layers
        # Channel couplings, on squeezed images, are twice as wide.
        assert {layer.get_config()["width"] for layer in layers} == {width, 2 * width}
        assert {layer.get_config()["num_blocks"] for layer in layers} == {depth}
    flow = progressive(small("pnf", [8], width=(4, 6), num_blocks=(1, 3)))
    for stage, width, depth in zip(flow.stages, (4, 6), (1, 3), strict=True):
        assert {tuple(layer.get_config()["hidden"]) for layer in keras_bridge.collect(stage).layers} == {(width,) * depth}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event_shape", "options", "scales"),
    [
        ([28, 28, 1], {"num_halvings": 2, "num_levels": 3}, [1, 1, 1, 2, 2]),  # on 7x7, 7x7, 7x14, 14x14, 14x28
        ([16, 16, 1], {"num_halvings": 1, "num_levels": 5}, [3, 3, 3]),  # on 8x8, 8x8, 8x16
        ([16, 4, 1], {"num_halvings": 1, "num_levels": 2}, [1, 1, 2]),  # on 8x2, 8x2, 8x4
        ([4, 4, 1], {"num_halvings": 2, "num_levels": 2}, [1, 1, 1, 1, 1]),  # on 1x1, 1x1, 1x2, 2x2, 2x4
        ([24], {"num_halvings": 2, "num_levels": 5}, [2, 2, 3]),  # 6 -> 3 and 12 -> 6 -> 3
        ([4, 4, 1], {"num_halvings": 1, "num_levels": 3, "network": "dense"}, [2, 2, 3]),
    ],
    ids=["odd", "square", "narrow", "one-pixel", "vector", "dense"],
)
def test_levels_of_small_stages(event_shape, options, scales):
    distribution = small("pnf", event_shape, **options)
    assert [len(multiscale_of(stage).levels) for stage in distribution.bijector.stages] == scales
    assert_round_trip(perturb(distribution, scale=0.05))


@pytest.fixture
def seen(monkeypatch):
    """What every network was called with: (network, condition)."""
    calls, original = [], networks.base.Conditioner._with_condition

    def record(self, x, condition):
        calls.append((self, condition))
        return original(self, x, condition)

    monkeypatch.setattr(networks.base.Conditioner, "_with_condition", record)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("network", ["conv", "dense"])
def test_every_network_of_a_detail_sees_the_image_below(seen, network):
    flow, x = progressive(small("pnf", network=network)), events(IMAGE)
    flow.inverse(x)
    conditions = {id(layer): condition for layer, condition in seen}
    layers = [keras_bridge.collect(stage).layers for stage in flow.stages]
    assert len(seen) == len(conditions) == sum(map(len, layers)) and all(layers)
    assert all(conditions[id(layer)] is None for layer in layers[0])
    for k in range(1, 3):
        low = flow.encode(x, stage=k - 1).numpy()
        expected = low if network == "conv" else low.reshape([3, -1])
        for layer in layers[k]:
            np.testing.assert_allclose(conditions[id(layer)], expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["conv", "dense"])
def test_adaptation_normalises_what_the_networks_see(seen, network):
    model = dimflows.FlowModel(small("pnf", network=network, grey_levels=256))
    x = np.random.default_rng(0).integers(100, 200, size=[64, *IMAGE]).astype(np.uint8)
    model.adapt(x)
    seen.clear()
    model.distribution.encode(x)
    conditions = [condition.numpy() for _, condition in seen if condition is not None]
    assert len(conditions) == sum(len(keras_bridge.collect(s).layers) for s in progressive(model.distribution).stages[1:])
    for condition in conditions:
        axes = (0, 1, 2) if network == "conv" else 0
        np.testing.assert_allclose(condition.mean(axis=axes), 0.0, atol=0.05)
        np.testing.assert_allclose(condition.std(axis=axes), 1.0, atol=0.05)


@pytest.mark.parametrize("network", ["conv", "dense"])
def test_every_network_of_a_detail_depends_on_the_image_below(network):
    flow = progressive(perturb(small("pnf", network=network)))
    for k in range(1, 3):
        shape = flow.stage_shapes[k - 1]
        for layer in keras_bridge.collect(flow.stages[k]).layers:
            sides = [] if network == "dense" else [side // (2 if layer.mask is None else 1) for side in shape[:2]]
            if network == "conv" and layer.mask is not None:
                sides = list(np.shape(layer.mask)[:2])
            x = tf.zeros([3, *sides, layer.inputs])
            first, second = (layer(x, condition=events([*sides, layer.condition_channels]) + shift) for shift in (0.0, 0.5))
            assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("network", ["conv", "dense"])
def test_the_density_of_details_depends_on_all_of_the_image_below(network):
    flow = progressive(perturb(small("pnf", network=network)))
    for k in range(1, 3):
        shape = flow.stage_shapes[k - 1]
        detail, low = tf.constant(events(shape)), tf.constant(events(shape)) + 0.5
        with tf.GradientTape() as tape:
            tape.watch(low)
            z = flow.stages[k].inverse(detail, condition=low)
            log_det = flow.stages[k].inverse_log_det_jacobian(detail, event_ndims=3, condition=low)
            log_prob = log_det - 0.5 * tf.reduce_sum(z**2, axis=-1)
        assert (tape.gradient(log_prob, low).numpy() != 0.0).all()


@pytest.mark.slow
@pytest.mark.parametrize("adaptive_range", [True, False])
@pytest.mark.parametrize("event_shape", [IMAGE, [8]], ids=["image", "vector"])
def test_preprocessing_of_every_stage(event_shape, adaptive_range):
    """Logits of averages s in [0, n], and of half differences as a share of their range, 2 min(s, n - s) or n wide."""
    options = {"grey_levels": LEVELS, "alpha": 0.02, "adaptive_range": adaptive_range}
    distribution = perturb(small("pnf", event_shape, **options)).distribution
    flow = distribution.bijector
    y = events(event_shape, grey_levels=LEVELS).astype(np.float32) + 0.3
    total = 0.0
    for k, stage in enumerate(flow.stages):
        value, low = (None if v is None else v.numpy().astype(np.float64) for v in flow.stage_data(y, k))
        if k == 0:
            share, span = value / LEVELS, LEVELS
        else:
            span = 2.0 * np.minimum(low, LEVELS - low) if adaptive_range else LEVELS
            share = value / span + 0.5
            total = total - np.log(2.0) * value[0].size
        p = 0.02 + 0.96 * share
        log_det = np.log(0.96 / span / p / (1.0 - p)).reshape([3, -1]).sum(axis=1)
        base = tfd.Sample(tfd.Normal(0.0, 1.0), stage.inverse_event_shape(value.shape[1:]))
        inner = tfd.TransformedDistribution(base, stage.bijectors[-1])
        kwargs = {"condition": low.astype(np.float32)} if k else {}
        logits = (np.log(p) - np.log1p(-p)).astype(np.float32)
        total = total + inner.log_prob(logits, bijector_kwargs=kwargs).numpy() + log_det
    np.testing.assert_allclose(distribution.log_prob(y), total, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["conv", "dense"])
def test_extreme_images(network):
    distribution = perturb(small("pnf", grey_levels=256, network=network), scale=0.02)
    board = np.indices([8, 8]).sum(axis=0)[..., None] % 2
    x = np.stack([np.zeros(IMAGE), np.full(IMAGE, 255), 255 * board, 255 - 255 * board]).astype(np.uint8)
    log_prob = distribution.log_prob(np.repeat(x, 8, axis=0))
    assert np.isfinite(log_prob).all()
    np.testing.assert_array_equal(distribution.decode(distribution.encode(x)), x)


def test_values_at_the_ends_of_the_range():
    distribution = perturb(small("pnf", grey_levels=256), scale=0.02).distribution
    end = np.nextafter(np.float32(256), np.float32(0))
    board = (np.indices([8, 8]).sum(axis=0)[..., None] % 2).astype(np.float32)
    near = np.random.default_rng(0).uniform(0.0, 1e-3, size=[32, *IMAGE]).astype(np.float32)
    y = np.concatenate([np.stack([0.0 * board, 0.0 * board + end, end * board]), near, np.minimum(256 - near, end)])
    assert np.isfinite(distribution.log_prob(y)).all()


@pytest.fixture(scope="module", params=[True, False], ids=["adaptive", "fixed"])
def wild(request):
    """A model of random weights, far from those of a trained one, and whether its details keep to the range of pixels."""
    options = {"num_halvings": 2, "num_levels": 1, "grey_levels": LEVELS, "adaptive_range": request.param}
    return perturb(small("pnf", **options), scale=0.3), request.param


@pytest.mark.slow
def test_samples_of_random_weights_are_levels(wild):
    samples = wild[0].sample(64, seed=0).numpy()
    assert samples.shape == (64, *IMAGE) and samples.dtype == np.int32
    assert 0 <= samples.min() < samples.max() < LEVELS
    assert np.isfinite(wild[0].log_prob(samples)).all()


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0, 10.0])
def test_upscaling_with_random_weights(wild, temperature):
    flow = progressive(wild[0])
    low = np.random.default_rng(0).uniform(0.0, LEVELS, size=[32, 2, 2, 1]).astype(np.float32)
    images = flow.upscale(low, temperature=temperature, seed=0)
    assert images.shape == [32, *IMAGE] and np.isfinite(images).all()
    np.testing.assert_allclose(flow.encode(images), low, rtol=1e-4, atol=1e-4)
    steps = [flow.encode(images, stage=k).numpy() for k in range(1, 5)]
    overshoot = max(max(-step.min(), step.max() - LEVELS) for step in steps)
    margin = 0.05 * LEVELS / (1.0 - 2.0 * 0.05)
    if wild[1]:
        assert overshoot <= margin + 1e-4
    elif temperature > 0.0:
        assert overshoot > margin
    if temperature == 0.0:
        np.testing.assert_allclose(images, flow.decode(low), rtol=1e-5, atol=1e-5)


def test_upscaling_of_images_out_of_range(wild):
    low = np.float32([-50.0, -1.0, LEVELS + 1.0, 1000.0]).reshape([4, 1, 1, 1]) * np.ones([4, 2, 2, 1], np.float32)
    images = progressive(wild[0]).upscale(low, seed=0)
    assert np.isfinite(images).all()
    np.testing.assert_allclose(progressive(wild[0]).encode(images), low, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("event_shape", [IMAGE, [8]], ids=["image", "vector"])
def test_without_a_margin_no_image_leaves_the_range(event_shape):
    flow = progressive(perturb(small("pnf", event_shape, grey_levels=LEVELS, alpha=0.0), scale=0.3))
    images = flow.forward(3.0 * tf.random.stateless_normal([64, np.prod(event_shape)], seed=[0, 1])).numpy()
    assert -1e-4 <= images.min() < 1.0 and LEVELS - 1.0 < images.max() <= LEVELS + 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("factorization", ["channels", "principal", "checkerboard", "random", None])
def test_factorizations_of_stages(factorization):
    distribution = small("pnf", factorization=factorization)
    flow = distribution.bijector
    build = dfb.DimensionFactorization
    for stage, shape in zip(flow.stages, [(4, 4, 1), (4, 4, 1), (4, 8, 1)], strict=True):
        split = multiscale_of(stage).factorization
        if factorization in ("channels", "checkerboard"):
            assert split == getattr(build, factorization)(shape, 2)
        elif factorization == "principal":
            assert split == build.channels(shape, 2)
            assert sum(isinstance(part, dfb.Rotation) for part in multiscale_of(stage).levels[0].bijectors) == 1
        else:
            assert (split is None) == (factorization is None)
    if factorization in ("principal", "random", None):
        assert_round_trip(perturb(distribution, scale=0.05))


def test_conventional_factorizations_of_stages():
    for network, name, shape in (("conv", "checkerboard", (4, 4, 1)), ("dense", "channels", (16,))):
        base = small("pnf", network=network).bijector.stages[0]
        assert multiscale_of(base).factorization == getattr(dfb.DimensionFactorization, name)(shape, 2)


@pytest.mark.slow
@pytest.mark.parametrize("event_shape", [IMAGE, [8]], ids=["image", "vector"])
def test_seeds_of_stages(event_shape):
    def drawn(seed):
        """The weights of every stage that were drawn."""
        flow = progressive(small("pnf", event_shape, seed=seed))
        weights = [[v.numpy() for v in keras_bridge.variables_of(stage)] for stage in flow.stages]
        return [[w for w in stage if w.dtype.kind == "f" and np.ptp(w) > 0.0] for stage in weights]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(first)
    for stages in zip(first, again, other, strict=True):
        for mine, same, another in zip(*stages, strict=True):
            np.testing.assert_array_equal(mine, same)
            assert (mine != another).any()
    entries = [{float(entry) for weights in stage for entry in weights.flat} for stage in first]
    for k, mine in enumerate(entries):
        assert not any(len(mine & others) > 0.1 * len(mine) for others in entries[:k])


def test_stages_have_different_masks():
    flow = progressive(small("pnf", [32]))
    masks = [multiscale_of(stage).levels[0].bijectors[0].mask for stage in flow.stages]
    first, second = (mask.split(tf.range(16.0))[0].numpy() for mask in masks)
    assert (first != second).any()


def test_the_configuration_of_a_progressive_model():
    original = perturb(small("pnf", [8], width=(4, 6), num_blocks=[1, 2], adaptive_range=False, grey_levels=LEVELS), scale=0.05)
    config = json.loads(json.dumps(recipes.config_of(original)))
    assert config["arguments"]["width"] == [4, 6] and config["arguments"]["num_halvings"] == 1
    rebuilt = recipes.get(config["recipe"])(**config["arguments"])
    assert recipes.config_of(rebuilt) == config
    copy_weights(original, rebuilt)
    x = events([8], grey_levels=LEVELS)
    np.testing.assert_array_equal(rebuilt.log_prob(x, seed=(0, 2)), original.log_prob(x, seed=(0, 2)))


# Configuration.


@pytest.mark.parametrize(
    ("levels", "name"),
    [
        *((slow if name in ("pnf", "lcma-glow") else pytest.param)(LEVELS, name) for name in SMALL),
        *((pytest.param if name == "glow" else slow)(None, name) for name in SMALL),
    ],
)
def test_the_configuration_rebuilds_the_model(name, levels):
    options = {"contributions": contributions()} if name.startswith("lcma") else {}
    if name == "glow":
        options = {"factorization": dfb.DimensionFactorization.from_contributions(contributions())}
    original = perturb(small(name, grey_levels=levels, **options))
    config = json.loads(json.dumps(recipes.config_of(original)))
    assert config["recipe"] == name
    rebuilt = recipes.get(config["recipe"])(**config["arguments"])
    assert recipes.config_of(rebuilt) == config
    assert count(rebuilt) == count(original)
    copy_weights(original, rebuilt)
    x, kwargs = events(IMAGE, grey_levels=levels), {} if levels is None else {"seed": (0, 2)}
    np.testing.assert_array_equal(rebuilt.log_prob(x, **kwargs), original.log_prob(x, **kwargs))


def test_the_configuration_holds_all_arguments():
    config = recipes.config_of(small("realnvp", width=3))
    assert config["arguments"]["width"] == 3 and config["arguments"]["seed"] == 0
    assert {"batch_norm", "l2", "alpha", "factorization", "grey_levels", "event_shape"} <= set(config["arguments"])
    assert recipes.config_of(tfd.Normal(0.0, 1.0)) is None


def test_the_configuration_is_a_copy():
    distribution = small("realnvp")
    recipes.config_of(distribution)["arguments"]["width"] = 100
    assert recipes.config_of(distribution)["arguments"]["width"] == SMALL["realnvp"]["width"]


@pytest.mark.parametrize(("name", "event_shape"), [("realnvp", IMAGE), ("realnvp", VECTOR), ("glow", IMAGE)])
def test_seeds(name, event_shape):
    def weights(seed):
        distribution = small(name, event_shape, seed=seed, factorization="random")
        return [v.numpy() for v in distribution.variables], multiscale(distribution).factorization

    keras.utils.set_random_seed(1)
    first, first_factorization = weights(seed=5)
    keras.utils.set_random_seed(2)
    again, again_factorization = weights(seed=5)
    other, other_factorization = weights(seed=6)
    assert len(first) == len(again) == len(other)
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)
    assert first_factorization == again_factorization != other_factorization
    drawn = [(a, b) for a, b in zip(first, other) if a.dtype.kind == "f" and np.ptp(a) > 0.0]
    assert drawn and all((a != b).any() for a, b in drawn)


def test_layers_of_a_model_have_different_weights():
    distribution = small("realnvp", depth=2)
    kernels = [v.numpy() for v in distribution.trainable_variables if "direction" in v.name]
    assert len(kernels) == len({k.tobytes() for k in kernels})


def test_a_registered_recipe_of_a_user():
    def shifted_normal(event_shape, *, shift: float = 0.0):
        """A normal distribution."""
        return tfd.Sample(tfd.Normal(tf.Variable(shift), 1.0), event_shape)

    try:
        build = recipes.recipe(shifted_normal)
        assert recipes.get("shifted-normal") is build
        distribution = build([3], shift=2.0)
        assert recipes.config_of(distribution) == {
            "recipe": "shifted-normal",
            "arguments": {"event_shape": [3], "shift": 2.0},
            "precision": {"floatx": "float32", "dtype_policy": "float32"},
        }
        with pytest.raises(TypeError, match="shifted-normal.*needs plain values"):
            build([3], shift=object())
    finally:
        recipes.registry._RECIPES.pop("shifted-normal", None)


# Reference sizes: the formulas count the parameters of the published code.


def resnet_parameters(inputs, outputs, width, blocks, has_mask):
    """Biases of the batch normalisations, weight-norm directions, magnitudes and biases of the convolutions."""
    first = inputs + 9 * (2 * inputs + has_mask) * width + width
    block = (width + 9 * width**2) + (width + 9 * width**2 + 2 * width)
    skip = width**2 + 2 * width
    last = width + width * outputs + 2 * outputs
    return first + blocks * block + (blocks + 1) * skip + last


def realnvp_parameters(channels, num_levels, width, blocks):
    """(parameters of the published model, those of the actnorms that stand in for its batch norms between couplings)."""
    total = actnorm = 0
    for k in range(num_levels):
        is_last = k == num_levels - 1
        for _ in range(3 + is_last):  # checkerboard couplings; 1 is the gain of the scale
            total += resnet_parameters(channels, 2 * channels, width, blocks, True) + 1
            actnorm += 2 * channels
        for _ in range(0 if is_last else 3):  # channel couplings, on the squeezed grid
            total += resnet_parameters(2 * channels, 4 * channels, 2 * width, blocks, False) + 1
            actnorm += 2 * 4 * channels
        channels, width = 2 * channels, 2 * width
    return total, actnorm


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "millions"),
    [({"num_levels": 2, "width": 64, "num_blocks": 8}, 19.61), ({"num_levels": 4, "width": 32, "num_blocks": 4}, 46.22)],
    ids=["cifar10", "imagenet32"],
)
def test_realnvp_reference_sizes(options, millions):
    published, actnorm = realnvp_parameters(3, options["num_levels"], options["width"], options["num_blocks"])
    assert round(published / 1e6, 2) == millions
    assert count(recipes.realnvp([32, 32, 3], batch_norm=True, **options)) == published + actnorm


def glow_parameters(channels, num_levels, depth, width):
    """(parameters of the published model, those of its top prior's kernel that only ever meet zeros and are not ours)."""

    def zero_convolution(inputs, outputs):  # with edge channel, bias and log-scales
        return 9 * (inputs + 1) * outputs + 2 * outputs

    total = 0
    for k in range(num_levels):
        squeezed = 4 * channels
        network = 9 * (squeezed // 2 + 1) * width + 2 * width + width**2 + 2 * width + zero_convolution(width, squeezed)
        total += depth * (2 * squeezed + squeezed**2 + network)
        if k < num_levels - 1:
            total += zero_convolution(squeezed // 2, squeezed)
        channels = 2 * channels
    # The published top prior convolves zeros of twice as many channels as the latent has, ours of as many.
    return total + zero_convolution(2 * squeezed, 2 * squeezed), 9 * squeezed * 2 * squeezed


@pytest.mark.slow
def test_glow_reference_size():
    published, inert = glow_parameters(3, num_levels=3, depth=32, width=512)
    assert round(published / 1e6, 2) == 44.60
    assert count(recipes.glow([32, 32, 3], num_levels=3, depth=32, width=512)) == published - inert


# Errors.


FACTORIZATION = dfb.DimensionFactorization.checkerboard([8, 8, 1], 2)


@pytest.mark.parametrize(
    ("name", "event_shape", "options", "message"),
    [
        ("realnvp", [8, 8], {}, r"realnvp: got event shape \[8, 8\], needs a vector \[D\] or an image \[H, W, C\]"),
        ("realnvp", [8, 0, 1], {}, r"realnvp: got event shape \[8, 0, 1\]"),
        ("glow", [8, 8], {}, r"glow: got event shape \[8, 8\], needs"),
        ("realnvp", [7, 8, 1], {}, r"^realnvp: got event shape \[7, 8, 1\] and num_levels=2, .* divisible by 2$"),
        ("realnvp", [8, 8, 1], {"num_levels": 5}, r"got event shape \[8, 8, 1\] and num_levels=5, .* divisible by 16$"),
        ("realnvp", [8, 8, 1], {"num_levels": 5, "factorization": None}, "num_levels=5, .* divisible by 16$"),
        ("glow", [8, 8, 1], {"num_levels": 4}, r"^glow: got event shape \[8, 8, 1\] and num_levels=4, .* divisible by 16$"),
        ("glow", [6, 8, 1], {"num_levels": 2}, r"\[6, 8, 1\] and num_levels=2, .* divisible by 4$"),
        ("lcma-glow", [2, 2, 1], {"num_levels": 3}, r"^lcma-glow: got event shape \[2, 2, 1\] .* divisible by 8$"),
        ("vflow-glow", [7, 7, 1], {}, r"^vflow-glow: got event shape \[7, 7, 1\] and num_levels=1, .* divisible by 2$"),
        ("flowpp", [7, 7, 1], {}, r"^flowpp of events \[7, 7, 1\]: Columns: width 7"),
        ("iresnet", [3], {"num_levels": 4}, "^iresnet: got 3-dimensional events and num_levels=4, but level 3 has one"),
        ("realnvp", [3], {"num_levels": 3}, "^realnvp: got 3-dimensional events and num_levels=3, but level 3 has one"),
        ("lcma-realnvp", [3], {"num_levels": 3}, "^lcma-realnvp: got 3-dimensional events and num_levels=3, but level 3"),
        ("glow", [3], {"num_levels": 3}, "^glow: got 3-dimensional events and num_levels=3, but level 3 has one dimension"),
        ("realnvp", [1], {"num_levels": 1}, "but level 1 has one dimension, needs two or more"),
        ("realnvp", [8, 8, 1], {"blocks": 3}, "realnvp: .*'blocks'.*arguments are event_shape, .*width"),
        ("glow", [8, 8, 1], {"widht": 3}, "^glow: .*'widht'; did you mean 'width'\\?; the recipe's arguments are"),
        ("lcma-glow", [8, 8, 1], {"factorization": "random"}, "lcma-glow: .*'factorization'.*keep, granularity"),
        ("realnvp", [8, 8, 1], {"width": 0}, "realnvp: got width=0, needs a positive integer"),
        ("realnvp", [8, 8, 1], {"width": "wide"}, "realnvp: got width='wide', needs a positive integer"),
        ("realnvp", [8, 8, 1], {"depth": 0}, "depth=0"),
        ("realnvp", [8, 8, 1], {"num_levels": 0}, "num_levels=0"),
        ("realnvp", [8, 8, 1], {"num_blocks": -1}, "num_blocks=-1"),
        ("glow", [8, 8, 1], {"depth": 0}, "glow: got depth=0, needs a positive integer"),
        ("glow", [8, 8, 1], {"num_levels": 0}, "num_levels=0"),
        ("glow", [8, 8, 1], {"coupling": "spline"}, "glow: got coupling='spline', needs one of"),
        ("realnvp", [8, 8, 1], {"grey_levels": 1}, "grey_levels=1"),
        ("realnvp", [8, 8, 1], {"grey_levels": 16, "alpha": 0.5}, "alpha=0.5"),
        ("realnvp", [8, 8, 1], {"factorization": "halves"}, "factorization: got 'halves', needs conventional"),
        ("realnvp", [8], {"factorization": "checkerboard"}, r"needs an image"),
        ("realnvp", [4, 4, 1], {"factorization": FACTORIZATION}, r"shape \[8, 8, 1\].*needs \[4, 4, 1\]"),
        ("glow", [8, 8, 1], {"num_levels": 3, "factorization": FACTORIZATION}, r"2 levels, needs \[8, 8, 1\] and 3"),
        ("lcma-realnvp", [8, 8, 1], {"num_levels": 1}, "num_levels=1"),
        ("lcma-realnvp", [8, 8, 1], {"granularity": "free"}, "granularity='free'"),
        ("lcma-realnvp", [8, 8, 1], {"keep": ["high", "low"]}, "keep="),
        ("lcma-realnvp", [4, 4, 1], {"contributions": contributions()}, r"\[8, 8, 1\].*needs \[4, 4, 1\]"),
        ("lcma-glow", [8, 8, 1], {"contributions": contributions(factor_outs=2)}, "3 levels, needs .* and 2"),
        ("lcma-glow", [8, 8, 1], {"contributions": contributions() * np.nan}, "not finite"),
        ("realnvp", [8], {"network": "conv"}, "realnvp: got network='conv', needs dense or None for vectors"),
        ("realnvp", [8, 8, 1], {"network": "resnet"}, "realnvp: got network='resnet', needs conv, dense or None"),
        (
            "realnvp",
            [8, 8, 1],
            {"network": "dense", "num_levels": 8},
            "got 64-dimensional events and num_levels=8, but level 7",
        ),
        ("realnvp", [8, 8, 1], {"network": "dense", "factorization": "checkerboard"}, "needs an image"),
        ("lcma-realnvp", [8, 8, 1], {"network": "dense"}, "lcma-realnvp: .*'network'"),
        ("lcma-realnvp", [7], {"network": None}, "lcma-realnvp: .*'network'"),
        ("glow", [8, 8, 1], {"network": "conv"}, "glow: .*'network'"),
        ("realnvp", [8, 8, 1], {"condition_shape": [4, 4, 1]}, r"condition_shape=\[4, 4, 1\], needs .*\[8, 8, 1\]"),
        ("glow", [8, 8, 1], {"condition_shape": [8, 4, 1]}, r"glow: .*condition_shape=\[8, 4, 1\], needs"),
        ("realnvp", [8, 8, 1], {"condition_shape": [8, 8]}, r"realnvp: got condition_shape=\[8, 8\], needs"),
        ("realnvp", [8, 8, 1], {"condition_shape": []}, r"realnvp: got condition_shape=\[\], needs"),
        ("glow", [8, 8, 1], {"condition_shape": [0]}, r"glow: got condition_shape=\[0\], needs"),
        ("realnvp", [7], {"condition_shape": [7, 7, 1]}, r"condition_shape=\[7, 7, 1\], needs a vector"),
        ("realnvp", [7], {"condition_shape": 3}, "condition_shape=3, needs a vector"),
        ("maf", [7], {"hidden": 8}, "^maf: got hidden=8: "),
        ("maf", [7], {"seed": -1}, "^maf: got seed=-1, needs a nonnegative integer"),
        (
            "realnvp",
            [8, 8, 1],
            {"condition_shape": [8, 8, 1], "network": "dense"},
            r"condition_shape=\[8, 8, 1\], needs a vector",
        ),
        ("lcma-glow", [8, 8, 1], {"condition_shape": [4, 4, 1]}, r"condition_shape=\[4, 4, 1\], needs"),
        ("pnf", [8, 8], {}, r"pnf: got event shape \[8, 8\], needs a vector \[D\] or an image"),
        ("pnf", [6, 8, 1], {}, r"^pnf: got event shape \[6, 8, 1\] and num_halvings=2, .* height and width divisible by 4$"),
        ("pnf", [8, 6, 1], {}, r"\[8, 6, 1\] and num_halvings=2, .* divisible by 4$"),
        ("pnf", [28, 28, 1], {"num_halvings": 3}, r"\[28, 28, 1\] and num_halvings=3, .* divisible by 8$"),
        ("pnf", [10], {}, r"\[10\] and num_halvings=2, needs a size divisible by 4$"),
        ("pnf", [4], {}, "num_halvings"),
        ("pnf", [4, 4, 1], {"network": "dense"}, "num_halvings"),
        ("pnf", [8, 8, 1], {"num_halvings": 0}, "pnf: got num_halvings=0, needs a positive integer"),
        ("pnf", [8, 8, 1], {"num_levels": 0}, "pnf: got num_levels=0, needs a positive integer"),
        ("pnf", [8, 8, 1], {"depth": 0}, "depth=0, needs a positive integer"),
        ("pnf", [8, 8, 1], {"width": [4, 4, 4, 4, 0]}, "width=0, needs a positive integer"),
        ("pnf", [8, 8, 1], {"width": [4, 4]}, "pnf: got 2 values of width, needs one, or one for each of the 5 stages"),
        ("pnf", [8, 8, 1], {"num_blocks": [1] * 6}, "pnf: got 6 values of num_blocks.* 5 stages"),
        ("pnf", [8], {"num_blocks": []}, "pnf: got 0 values of num_blocks.* 3 stages"),
        ("pnf", [8], {"network": "conv"}, "pnf: got network='conv', needs dense or None for vectors"),
        ("pnf", [8, 8, 1], {"network": "mlp"}, "pnf: got network='mlp', needs conv, dense or None"),
        ("pnf", [8, 8, 1], {"grey_levels": 1}, "grey_levels=1"),
        ("pnf", [8, 8, 1], {"grey_levels": 16, "alpha": -0.1}, "alpha=-0.1"),
        ("pnf", [8, 8, 1], {"factorization": "halves"}, "factorization: got 'halves', needs conventional"),
        ("pnf", [8], {"factorization": "checkerboard"}, "needs an image"),
        ("pnf", [8, 8, 1], {"factorization": FACTORIZATION}, "factorization"),
        ("pnf", [8, 8, 1], {"condition_shape": [2]}, "pnf: .*'condition_shape'"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value and "*" not in value else "",
)
def test_errors(name, event_shape, options, message):
    with pytest.raises(ValueError, match=message):
        recipes.get(name)(event_shape, **options)


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match=f"got 'unheard-of', needs one of {', '.join(recipes.names())}$"):
        recipes.get("unheard-of")
    for name, nearest in (("lcma_realnpv", "lcma-realnvp"), ("Glow", "glow")):
        with pytest.raises(ValueError, match=f"got '{name}', needs one of .*; did you mean '{nearest}'\\?$"):
            recipes.get(name)


NO_SHAPES = [4, "4", [4.0], [None, 4], [], [4, -4], tf.TensorShape(None), tf.TensorShape([None, 4]), None]


@pytest.mark.parametrize("name", recipes.names())
def test_event_shapes_that_are_none(name):
    for event_shape in NO_SHAPES:
        got = re.escape(repr(event_shape))
        with pytest.raises(ValueError, match=rf"^{name}: got event shape {got}, needs (a vector|an image) \["):
            recipes.get(name)(event_shape)


@pytest.mark.parametrize("name", ["maf", "lcma-glow", "nice"])
def test_event_shapes_may_be_of_any_integers(name):
    expected = recipes.config_of(recipes.get(name)([4]))
    for event_shape in ((4,), [np.int64(4)], np.array([4]), tf.TensorShape([4])):
        assert recipes.config_of(recipes.get(name)(event_shape)) == expected


def test_arguments_may_be_scalars_of_numpy():
    numpy = recipes.maf(np.array([3]), depth=np.int64(1), hidden=[np.int32(4)], alpha=np.float32(0.5), seed=np.uint8(2))
    python = recipes.maf([3], depth=1, hidden=[4], alpha=0.5, seed=2)
    assert recipes.config_of(numpy) == recipes.config_of(python)
    x = events([3])
    np.testing.assert_array_equal(numpy.log_prob(x), python.log_prob(x))
    with pytest.raises(ValueError, match="maf: got depth=True, needs a positive integer"):
        recipes.maf([3], depth=np.True_)


def test_errors_name_what_was_given_by_an_old_name():
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(ValueError, match=r"num_levels=5, .* \(num_scales is now num_levels\)$"),
    ):
        recipes.glow([8, 8, 1], num_scales=5)
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="width=0, needs a positive integer$"):
        recipes.glow([8, 8, 1], num_scales=2, width=0)
    with pytest.raises(ValueError, match="realnvp: got num_scales and num_levels, the old and the new name"):
        recipes.realnvp([4], num_scales=2, num_levels=2)


# Old names of arguments.


@pytest.mark.parametrize(
    ("name", "event_shape", "old", "new"),
    [
        (
            "realnvp",
            [4, 4, 1],
            {"num_scales": 1, "num_couplings": 2, "levels": 4},
            {"num_levels": 1, "depth": 2, "grey_levels": 4},
        ),
        ("lcma-realnvp", [4], {"num_couplings": 1, "num_scales": 2}, {"depth": 1, "num_levels": 2}),
        ("nice", [4], {"num_couplings": 2}, {"depth": 2}),
        ("maf", [3], {"num_layers": 2}, {"depth": 2}),
        ("wavenet-flow", [4], {"num_layers": 1, "depth": 2}, {"depth": 1, "num_blocks": 2}),
        ("residual-flow", [2], {"num_blocks": 1, "num_scales": 1}, {"depth": 1, "num_levels": 1}),
        ("vae-flow", [4, 4, 1], {"num_flows": 1, "width": 4}, {"depth": 1, "width": 4}),
        ("flowpp", [4, 4, 1], {"noise_couplings": 0, "layout": ["1 column"]}, {"noise_depth": 0, "layout": ["1 column"]}),
    ],
)
def test_old_names_of_arguments_still_work(name, event_shape, old, new):
    with pytest.warns(DeprecationWarning, match=f"{name}: .* is now .*; the next version will not take the old name"):
        before = recipes.get(name)(event_shape, **old)
    assert recipes.config_of(before) == recipes.config_of(recipes.get(name)(event_shape, **new))


def test_warnings_of_recipes_are_shown_where_they_are_called():
    with pytest.warns(DeprecationWarning) as caught:
        recipes.nice([4], num_couplings=2)
    assert [warning.filename for warning in caught] == [__file__]


def test_the_depth_of_wavenet_flow_is_the_old_one_beside_num_layers_only():
    with pytest.warns(DeprecationWarning, match="wavenet-flow: levels is now grey_levels;"):
        config = recipes.config_of(recipes.get("wavenet-flow")([4], depth=1, levels=4))
    assert (config["arguments"]["depth"], config["arguments"]["num_blocks"]) == (1, None)


def test_the_new_names_of_arguments_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        config = recipes.config_of(recipes.get("wavenet-flow")([4], depth=1, num_blocks=2))
    assert (config["arguments"]["depth"], config["arguments"]["num_blocks"]) == (1, 2)


def test_saved_models_with_old_names_load_without_a_warning(tmp_path):
    model = dimflows.FlowModel(recipes.realnvp([4], depth=1, width=4, num_levels=1))
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as new, zipfile.ZipFile(tmp_path / "old.keras", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            if name == "config.json":
                content = content.replace(b'"depth"', b'"num_couplings"').replace(b'"num_levels"', b'"num_scales"')
                assert b"num_couplings" in content and b"num_scales" in content
            old.writestr(name, content)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        loaded = dimflows.load(str(tmp_path / "old.keras"))
    x = tf.ones([2, 4])
    np.testing.assert_array_equal(loaded.log_prob(x), model.log_prob(x))


OTHERS = {
    "Dequantized": (
        lambda **k: dfd.Dequantized(tfd.Sample(tfd.Normal(0.0, 1.0), [2]), **k).grey_levels,
        "levels",
        "grey_levels",
        8,
    ),
    "LogitPreprocess": (lambda **k: dfb.LogitPreprocess(**k).parameters["grey_levels"], "levels", "grey_levels", 8),
    "AffineCoupling": (
        lambda **k: dfb.AffineCoupling(tf.identity, dfb.masks.Channel(event_ndims=1), **k).parameters["scale"],
        "log_scale",
        "scale",
        "exp",
    ),
    "info": (lambda **k: dimflows.data.info("digits", **k).grey_levels, "levels", "grey_levels", 17),
}


@pytest.mark.parametrize("name", OTHERS)
def test_old_names_of_other_arguments(name):
    make, old, new, value = OTHERS[name]
    with pytest.warns(DeprecationWarning, match=f"{name}: {old} is now {new}") as caught:
        assert make(**{old: value}) == value
    assert [warning.filename for warning in caught] == [__file__]  # where it is shown by default
    assert make(**{new: value}) == value
    if name != "Dequantized":
        with pytest.raises(TypeError, match=f"{name}: got {old} and {new}, the old and the new name of the same"):
            make(**{old: value, new: value})


# Runs.


def test_the_configuration_of_a_run_of_before_has_the_present_names(tmp_path):
    data = {"name": "digits", "batch_size": 64, "test_split": "test", "image_size": None}
    old = {"recipe": "realnvp", "levels": 17, "arguments": {"seed": 0, "num_scales": 2}, "data": data | {"levels": None}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        config = dimflows.training.read_config(tmp_path)
    assert config == {
        "recipe": "realnvp",
        "grey_levels": 17,
        "arguments": {"seed": 0, "num_levels": 2},
        "data": data | {"grey_levels": None},
    }


def test_the_configuration_that_is_read_is_the_one_that_was_written(tmp_path):
    config = dimflows.training.RunConfig(recipe="glow", event_shape=[8, 8, 1], grey_levels=17, epochs=1).to_json()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert dimflows.training.read_config(tmp_path) == config


def test_what_the_data_decide_is_no_argument_by_its_old_name_either():
    sizes = {"recipe": "glow", "event_shape": [8, 8, 1], "grey_levels": 17, "epochs": 1}
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(ValueError, match=r"\['grey_levels'\], which the data"),
    ):
        dimflows.training.RunConfig(arguments={"levels": 8}, **sizes)


def test_phases_are_in_the_configuration_of_lcma_recipes_only():
    sizes = {"event_shape": [8, 8, 1], "grey_levels": 17, "epochs": 3}
    plain = dimflows.training.RunConfig(recipe="glow", pretrain_epochs=1, **sizes).to_json()
    assert not {"pretrain_epochs", "online_steps", "baseline"} & plain.keys()
    phases = dimflows.training.RunConfig(recipe="lcma-glow", **sizes).to_json()
    assert (phases["pretrain_epochs"], phases["baseline"]) == (2, True) and "online_steps" not in phases
    online = dimflows.training.RunConfig(recipe="lcma-glow", online_steps=4, **sizes).to_json()
    assert online["online_steps"] == 4 and "pretrain_epochs" not in online
