"""Recipes: what they build, from plain values, reproducibly, in the reference sizes."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

import tfp_dimflows as dimflows
from tfp_dimflows import keras_bridge, recipes

dfb, dfd = dimflows.bijectors, dimflows.distributions
tfd = tfp.distributions

LEVELS = 17
SMALL = {  # arguments of a small model of 8x8x1 images
    "realnvp": {"num_scales": 2, "num_couplings": 1, "width": 4, "num_blocks": 1},
    "glow": {"num_scales": 2, "depth": 1, "width": 4},
}
SMALL |= {f"lcma-{name}": options for name, options in SMALL.items()}
IMAGE, VECTOR = [8, 8, 1], [7]


def small(name, event_shape=IMAGE, **options):
    return recipes.get(name)(event_shape, **(SMALL[name] | options))


def contributions(event_shape=IMAGE, factor_outs=1, seed=0):
    return np.random.default_rng(seed).normal(size=[factor_outs, *event_shape])


def multiscale(distribution):
    """The `Multiscale` of a recipe's distribution."""
    if isinstance(distribution, dfd.Dequantized):
        return distribution.distribution.bijector.bijectors[-1]
    return distribution.bijector


def events(event_shape, num=3, levels=None):
    generator = np.random.default_rng(0)
    if levels is None:
        return generator.normal(size=[num, *event_shape]).astype(np.float32)
    return generator.integers(0, levels, size=[num, *event_shape]).astype(np.int32)


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
    assert recipes.names() == ["glow", "lcma-glow", "lcma-realnvp", "realnvp"]
    assert [recipes.base_of(name) for name in recipes.names()] == [None, "glow", "realnvp", None]
    assert recipes.get("lcma-glow") is recipes.lcma_glow


CASES = [(name, IMAGE) for name in SMALL] + [("realnvp", VECTOR), ("lcma-realnvp", VECTOR)]


@pytest.mark.parametrize("levels", [None, LEVELS])
@pytest.mark.parametrize(("name", "event_shape"), CASES, ids=lambda v: v if isinstance(v, str) else f"{len(v)}d")
def test_every_recipe_samples_and_scores(name, event_shape, levels):
    distribution = small(name, event_shape, levels=levels)
    assert distribution.event_shape == event_shape and distribution.batch_shape == []
    samples = distribution.sample(4, seed=0)
    assert samples.shape == [4, *event_shape]
    x = events(event_shape, levels=levels)
    kwargs = {} if levels is None else {"seed": (0, 1)}
    log_prob = distribution.log_prob(x, **kwargs)
    assert log_prob.shape == [3] and log_prob.dtype == tf.float32
    assert np.isfinite(log_prob).all() and np.isfinite(distribution.log_prob(samples, **kwargs)).all()
    if levels is None:
        assert samples.dtype == tf.float32
        assert distribution.distribution.event_shape == [np.prod(event_shape)]
        assert distribution.bijector.inverse_event_shape(event_shape) == [np.prod(event_shape)]
    else:
        assert isinstance(distribution, dfd.Dequantized) and distribution.levels == levels
        assert samples.dtype == tf.int32 and 0 <= samples.numpy().min() <= samples.numpy().max() < levels


@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_levels_add_only_the_preprocessing(name):
    continuous, integer = perturb(small(name)), perturb(small(name, levels=LEVELS))
    x = events(IMAGE, levels=LEVELS)
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
    for option in [*options, {"num_scales": 1}]:
        distribution = small(name, levels=LEVELS, **option)
        assert np.isfinite(distribution.log_prob(events(IMAGE, levels=LEVELS))).all()


def test_additive_glow_has_a_constant_log_det():
    # Without exits and couplings that scale, only actnorms and convolutions remain.
    flow = perturb(small("glow", num_scales=1, coupling="additive", depth=2))
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


@pytest.mark.parametrize(
    ("name", "event_shape"), [("realnvp", IMAGE), ("realnvp", VECTOR), ("glow", IMAGE)], ids=["realnvp", "vector", "glow"]
)
def test_float64(float64, name, event_shape):
    distribution = perturb(small(name, event_shape, levels=LEVELS))
    assert {v.dtype for v in distribution.trainable_variables} == {tf.float64}
    x = events(event_shape, levels=LEVELS)
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


def assert_round_trip(distribution):
    x = events(distribution.event_shape)
    z = distribution.bijector.inverse(x)
    assert z.shape == [3, np.prod(x.shape[1:])]
    np.testing.assert_allclose(distribution.bijector.forward(tf.identity(z)), x, atol=1e-4)
    assert np.isfinite(distribution.log_prob(x)).all()


@pytest.mark.parametrize(
    ("name", "channels", "channels_if_nothing_leaves"),
    # Channels that the conditioners of each level see: checkerboard all of them, channel couplings half of the squeezed ones.
    [("realnvp", [{1, 2}, {2, 4}, {4}], [{1, 2}, {4, 8}, {16}]), ("glow", [{2}, {4}, {8}], [{2}, {8}, {32}])],
)
def test_channels_grow_as_nothing_leaves(name, channels, channels_if_nothing_leaves):
    for factorization, expected in (("conventional", channels), (None, channels_if_nothing_leaves)):
        distribution = small(name, num_scales=3, factorization=factorization)
        levels = multiscale(distribution).levels
        seen = [{layer.inputs for layer in keras_bridge.collect(level).layers} for level in levels]
        assert seen == expected


def test_dimensions_of_vectors_halve():
    for factorization, expected in (("conventional", [7, 4, 2]), (None, [7, 7, 7])):
        distribution = small("realnvp", VECTOR, num_scales=3, factorization=factorization)
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
    distribution = small("lcma-realnvp", VECTOR, num_scales=3, contributions=given, keep=["high", "low"])
    expected = dfb.DimensionFactorization.from_contributions(given, keep=["high", "low"])
    assert multiscale(distribution).factorization == expected
    assert count(distribution) == count(small("realnvp", VECTOR, num_scales=3))


def test_contributions_of_the_first_phase_fit_the_third():
    first = perturb(small("lcma-glow", num_scales=3))
    given = dimflows.likelihood_contributions(first.bijector, [events(IMAGE)])
    third = small("lcma-glow", num_scales=3, contributions=given)
    assert multiscale(third).factorization.num_levels == 3
    assert_round_trip(third)


# Configuration.


@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize("levels", [None, LEVELS])
def test_the_configuration_rebuilds_the_model(name, levels):
    options = {"contributions": contributions()} if name.startswith("lcma") else {}
    if name == "glow":
        options = {"factorization": dfb.DimensionFactorization.from_contributions(contributions())}
    original = perturb(small(name, levels=levels, **options))
    config = json.loads(json.dumps(recipes.config_of(original)))
    assert config["recipe"] == name
    rebuilt = recipes.get(config["recipe"])(**config["arguments"])
    assert recipes.config_of(rebuilt) == config
    assert count(rebuilt) == count(original)
    copy_weights(original, rebuilt)
    x, kwargs = events(IMAGE, levels=levels), {} if levels is None else {"seed": (0, 2)}
    np.testing.assert_array_equal(rebuilt.log_prob(x, **kwargs), original.log_prob(x, **kwargs))


def test_the_configuration_holds_all_arguments():
    config = recipes.config_of(small("realnvp", width=3))
    assert config["arguments"]["width"] == 3 and config["arguments"]["seed"] == 0
    assert {"batch_norm", "l2", "alpha", "factorization", "levels", "event_shape"} <= set(config["arguments"])
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
    distribution = small("realnvp", num_couplings=2)
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


def realnvp_parameters(channels, num_scales, width, blocks):
    """(parameters of the published model, those of the actnorms that stand in for its batch norms between couplings)."""
    total = actnorm = 0
    for k in range(num_scales):
        is_last = k == num_scales - 1
        for _ in range(3 + is_last):  # checkerboard couplings; 1 is the gain of the scale
            total += resnet_parameters(channels, 2 * channels, width, blocks, True) + 1
            actnorm += 2 * channels
        for _ in range(0 if is_last else 3):  # channel couplings, on the squeezed grid
            total += resnet_parameters(2 * channels, 4 * channels, 2 * width, blocks, False) + 1
            actnorm += 2 * 4 * channels
        channels, width = 2 * channels, 2 * width
    return total, actnorm


@pytest.mark.parametrize(
    ("options", "millions"),
    [({"num_scales": 2, "width": 64, "num_blocks": 8}, 19.61), ({"num_scales": 4, "width": 32, "num_blocks": 4}, 46.22)],
    ids=["cifar10", "imagenet32"],
)
def test_realnvp_reference_sizes(options, millions):
    published, actnorm = realnvp_parameters(3, options["num_scales"], options["width"], options["num_blocks"])
    assert round(published / 1e6, 2) == millions
    assert count(recipes.realnvp([32, 32, 3], batch_norm=True, **options)) == published + actnorm


def glow_parameters(channels, num_scales, depth, width):
    """(parameters of the published model, those of its top prior's kernel that only ever meet zeros and are not ours)."""

    def zero_convolution(inputs, outputs):  # with edge channel, bias and log-scales
        return 9 * (inputs + 1) * outputs + 2 * outputs

    total = 0
    for k in range(num_scales):
        squeezed = 4 * channels
        network = 9 * (squeezed // 2 + 1) * width + 2 * width + width**2 + 2 * width + zero_convolution(width, squeezed)
        total += depth * (2 * squeezed + squeezed**2 + network)
        if k < num_scales - 1:
            total += zero_convolution(squeezed // 2, squeezed)
        channels = 2 * channels
    # The published top prior convolves zeros of twice as many channels as the latent has, ours of as many.
    return total + zero_convolution(2 * squeezed, 2 * squeezed), 9 * squeezed * 2 * squeezed


def test_glow_reference_size():
    published, inert = glow_parameters(3, num_scales=3, depth=32, width=512)
    assert round(published / 1e6, 2) == 44.60
    assert count(recipes.glow([32, 32, 3], num_scales=3, depth=32, width=512)) == published - inert


# Errors.


FACTORIZATION = dfb.DimensionFactorization.checkerboard([8, 8, 1], 2)


@pytest.mark.parametrize(
    ("name", "event_shape", "options", "message"),
    [
        ("realnvp", [8, 8], {}, r"realnvp: got event shape \[8, 8\], needs a vector \[D\] or an image \[H, W, C\]"),
        ("realnvp", [8, 0, 1], {}, r"realnvp: got event shape \[8, 0, 1\]"),
        ("glow", [8], {}, r"glow: got event shape \[8\], needs an image"),
        ("realnvp", [7, 8, 1], {}, "7 x 8.*not divisible"),
        ("realnvp", [8, 8, 1], {"num_scales": 5}, "not divisible"),
        ("realnvp", [8, 8, 1], {"num_scales": 5, "factorization": None}, "not divisible by 2"),
        ("glow", [8, 8, 1], {"num_scales": 4}, "not divisible"),
        ("glow", [6, 8, 1], {"num_scales": 2}, "3 x 4.*not divisible"),
        ("realnvp", [3], {"num_scales": 3}, "nothing to condition on|too few"),
        ("realnvp", [1], {"num_scales": 1}, "nothing to condition on"),
        ("realnvp", [8, 8, 1], {"depth": 3}, "realnvp: .*'depth'.*arguments are event_shape, .*width"),
        ("lcma-glow", [8, 8, 1], {"factorization": "random"}, "lcma-glow: .*'factorization'.*keep, granularity"),
        ("realnvp", [8, 8, 1], {"width": 0}, "realnvp: got width=0, needs a positive integer"),
        ("realnvp", [8, 8, 1], {"width": "wide"}, "realnvp: got width='wide', needs a positive integer"),
        ("realnvp", [8, 8, 1], {"num_couplings": 0}, "num_couplings=0"),
        ("realnvp", [8, 8, 1], {"num_scales": 0}, "num_scales=0"),
        ("realnvp", [8, 8, 1], {"num_blocks": -1}, "num_blocks=-1"),
        ("glow", [8, 8, 1], {"depth": 0}, "glow: got depth=0, needs a positive integer"),
        ("glow", [8, 8, 1], {"num_scales": 0}, "num_scales=0"),
        ("glow", [8, 8, 1], {"coupling": "spline"}, "glow: got coupling='spline', needs one of"),
        ("realnvp", [8, 8, 1], {"levels": 1}, "levels=1"),
        ("realnvp", [8, 8, 1], {"levels": 16, "alpha": 0.5}, "alpha=0.5"),
        ("realnvp", [8, 8, 1], {"factorization": "halves"}, "factorization: got 'halves', needs conventional"),
        ("realnvp", [8], {"factorization": "checkerboard"}, r"needs an image"),
        ("realnvp", [4, 4, 1], {"factorization": FACTORIZATION}, r"shape \[8, 8, 1\].*needs \[4, 4, 1\]"),
        ("glow", [8, 8, 1], {"num_scales": 3, "factorization": FACTORIZATION}, r"2 levels, needs \[8, 8, 1\] and 3"),
        ("lcma-realnvp", [8, 8, 1], {"num_scales": 1}, "num_scales=1"),
        ("lcma-realnvp", [8, 8, 1], {"granularity": "free"}, "granularity='free'"),
        ("lcma-realnvp", [8, 8, 1], {"keep": ["high", "low"]}, "keep="),
        ("lcma-realnvp", [4, 4, 1], {"contributions": contributions()}, r"\[8, 8, 1\].*needs \[4, 4, 1\]"),
        ("lcma-glow", [8, 8, 1], {"contributions": contributions(factor_outs=2)}, "3 levels, needs .* and 2"),
        ("lcma-glow", [8, 8, 1], {"contributions": contributions() * np.nan}, "not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value and "*" not in value else "",
)
def test_errors(name, event_shape, options, message):
    with pytest.raises(ValueError, match=message):
        recipes.get(name)(event_shape, **options)


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match="got 'nice', needs one of glow, lcma-glow, lcma-realnvp, realnvp"):
        recipes.get("nice")
