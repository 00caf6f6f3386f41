"""The recipes of Flow++ and VFlow: the reference sizes, what they are made of, and the small ones at work."""

import numpy as np
import pytest
import tensorflow as tf
from registry import randomize

import tfp_dimflows as dimflows

dfb, dfd, recipes = dimflows.bijectors, dimflows.distributions, dimflows.recipes

LEVELS = 17
SMALL = {
    "flowpp": {"width": 4, "num_components": 2, "layout": ["1 column", "squeeze", "1 channel"], "noise_depth": 1},
    "vflow": {
        "width": 4,
        "num_components": 2,
        "layout": ["1 column", "1 channel"],
        "noise_depth": 1,
        "posterior_depth": 1,
    },
    "vflow-glow": {"num_extra": 1, "depth": 1, "width": 4},
}


def count(distribution):
    return sum(int(np.prod(v.shape)) for v in distribution.trainable_variables)


def small(name, event_shape=(4, 4, 1), **options):
    return recipes.get(name)(event_shape, **(SMALL[name] | options))


def images(num=6):
    return np.random.default_rng(0).integers(0, LEVELS, size=[num, 4, 4, 1]).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "total"), [("flowpp", 31_443_440), ("vflow", 39_700_096)])
def test_the_reference_sizes_of_cifar10(name, total):
    distribution = recipes.get(name)([32, 32, 3], config="cifar10", grey_levels=256)
    assert count(distribution) == total
    parts = {"flowpp": (3_466_976,), "vflow": (3_466_976, 4_491_872, 31_741_248)}[name]
    assert count(distribution.noise) == parts[0]
    if name == "vflow":
        flow = distribution.distribution.distribution.distribution.bijector
        assert (count(flow.posterior), count(flow.flow)) == parts[1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "total"),
    [
        ("flowpp", {"config": "cifar10-width32"}, 5_989_680),
        ("vflow", {"config": "cifar10-width56"}, 16_718_696),
        ("vflow", {"config": "cifar10-width32", "num_extra": 1, "num_blocks": 11}, 6_487_272),
    ],
)
def test_the_sizes_of_the_smaller_models_of_cifar10(name, options, total):
    assert count(recipes.get(name)([32, 32, 3], grey_levels=256, **options)) == total


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flowpp", "vflow"])
@pytest.mark.parametrize(("config", "layers"), [("imagenet32", "noise and flow"), ("imagenet64", "flow")])
def test_where_the_imagenet_configurations_have_attention(name, config, layers):
    """Narrow networks of one block on 16x16 images: the rest is the configuration's."""
    options = {"width": 4, "num_components": 1, "num_blocks": 1, "noise_blocks": 1, "context_blocks": 1}
    options |= {"noise_depth": 1} | ({"posterior_blocks": 1, "posterior_depth": 1} if name == "vflow" else {})
    with_it, without = (
        recipes.get(name)([16, 16, 1], config=config, grey_levels=256, attention=attention, **options)
        for attention in (True, False)
    )
    assert (count(with_it.noise) > count(without.noise)) == (layers == "noise and flow")
    flows = [d.distribution.distribution for d in (with_it, without)]
    if name == "vflow":
        flows = [flow.distribution.bijector for flow in flows]
        has_attention = count(flows[0].posterior) > count(flows[1].posterior)
        assert has_attention == (layers == "noise and flow")
        flows = [flow.flow for flow in flows]
    assert count(flows[0]) > count(flows[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_models_train_sample_and_score_integer_images(name):
    model = dimflows.FlowModel(small(name, grey_levels=LEVELS), seed=0)
    x = images()
    model.adapt(x)
    model.compile("adam")
    before = [v.numpy() for v in model.trainable_variables]
    history = model.fit(x, epochs=2, batch_size=3, verbose=0).history
    assert np.isfinite(history["bits_per_dim"]).all()
    assert np.isclose(history["bits_per_dim"][0], history["nll"][0] / (16 * np.log(2.0)))
    assert all((v.numpy() != old).any() for v, old in zip(model.trainable_variables, before))
    samples = model.sample(5, seed=1)
    assert samples.shape == (5, 4, 4, 1) and samples.dtype == tf.int32
    assert 0 <= samples.numpy().min() and samples.numpy().max() < LEVELS
    assert model.log_prob(x, num_samples=3, seed=0).shape == (6,)
    walk = model.interpolate(x[:1], x[1:2], 3).numpy()
    np.testing.assert_array_equal(walk[[0, -1]], x[:2, np.newaxis])


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_saving_keeps_the_model(name, tmp_path):
    model = dimflows.FlowModel(small(name, grey_levels=LEVELS), seed=0)
    model.save(tmp_path / "model.keras")
    loaded = dimflows.load(str(tmp_path / "model.keras"))
    np.testing.assert_allclose(loaded.log_prob(images(), seed=4), model.log_prob(images(), seed=4), rtol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_continuous_events(name):
    distribution = small(name)
    x = tf.constant(np.random.default_rng(0).normal(size=[3, 4, 4, 1]), tf.float32)
    assert distribution.event_shape == (4, 4, 1)
    assert np.isfinite(distribution.log_prob(x)).all()
    assert isinstance(distribution, dfd.Augmented) == name.startswith("vflow")


def test_samples_of_a_vflow_have_gradients():
    """The posterior of `vflow` ends in (0, 1), where the extra channels of a sample need not be."""
    distribution = small("vflow")
    randomize(distribution.trainable_variables)
    of_flow = distribution.distribution.bijector.flow.trainable_variables
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(distribution.sample(4, seed=1) ** 2)
    gradients = tape.gradient(total, of_flow)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0.0 for g in gradients)


def test_networks_without_blocks():
    blocks = {"noise_blocks": 0, "context_blocks": 0, "posterior_blocks": 0}
    without, with_them = (small("vflow", grey_levels=LEVELS, **options) for options in (blocks, {}))
    assert 0 < count(without.noise) < count(with_them.noise)
    assert np.isfinite(without.log_prob(images(2), seed=0)).all()


def test_equal_seeds_give_equal_weights():
    one, same, other = (small("vflow", grey_levels=LEVELS, seed=seed) for seed in (1, 1, 2))
    for a, b in zip(one.trainable_variables, same.trainable_variables):
        np.testing.assert_array_equal(a, b)
    assert any((a.numpy() != b.numpy()).any() for a, b in zip(one.trainable_variables, other.trainable_variables))


def test_uniform_dequantisation_and_standard_normal_extras():
    plain = small("vflow", grey_levels=LEVELS, noise_depth=0, posterior_depth=0)
    assert plain.noise is None
    assert plain.distribution.distribution.distribution.bijector.posterior is None


@pytest.mark.parametrize("num_extra", [1, 2, 5])
def test_vectors(num_extra):
    distribution = recipes.vflow_glow([2], num_extra=num_extra, width=5)
    x = np.random.default_rng(0).normal(size=[4, 2]).astype(np.float32)
    assert distribution.log_prob(x, num_samples=7).shape == (4,)
    assert distribution.sample(3, seed=0).shape == (3, 2)
    joint = distribution.distribution
    y = joint.sample(3, seed=1)
    z = joint.bijector.inverse(tf.identity(y))
    np.testing.assert_allclose(joint.bijector.forward(z), y, atol=1e-4)


def test_glow_of_vectors_counts_as_by_hand():
    # A step of 2 dimensions: actnorm 4, matrix 4, the scale's gain 1, network 1 -> 50 -> 50 -> 2.
    step = 4 + 4 + 1 + (50 + 50) + (50 * 50 + 50) + (50 * 2 + 2)
    assert count(recipes.glow([2], num_levels=1, depth=3, width=50)) == 3 * step


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flowpp", {"config": "huge"}, "flowpp: got config='huge', needs one of small, cifar10, imagenet32, imagenet64"),
        ("flowpp", {"layout": ["2 rows"]}, "got '2 rows' in a layout, needs 'squeeze', 'N column' or 'N channel'"),
        ("flowpp", {"width": 0}, "flowpp: got width=0, needs a positive integer"),
        ("flowpp", {"noise_depth": -1}, "flowpp: got noise_depth=-1, needs a nonnegative integer"),
        ("vflow", {"posterior_depth": -1}, "vflow: got posterior_depth=-1, needs a nonnegative integer"),
        ("vflow", {"posterior_blocks": -1}, "vflow: got posterior_blocks=-1, needs a nonnegative integer"),
        ("vflow", {"context_blocks": -1}, "vflow: got context_blocks=-1, needs a nonnegative integer"),
        ("vflow", {"num_extra": 0}, "vflow: got num_extra=0, needs a positive integer"),
        ("vflow-glow", {"num_extra": -1}, "vflow-glow: got num_extra=-1, needs a positive integer"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        small(name, **options)
