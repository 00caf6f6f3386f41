"""Codes: the first latent values of a model, events of them, what each part of them is worth; samples of other temperatures."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import slow

import tfp_dimflows as dimflows
from tfp_dimflows import codes

dfb, dfd, recipes = dimflows.bijectors, dimflows.distributions, dimflows.recipes
tfb, tfd = tfp.bijectors, tfp.distributions


def assert_close(actual, expected, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def images(num=6, shape=(4, 4, 1), grey_levels=4, seed=0):
    return np.random.default_rng(seed).integers(0, grey_levels, [num, *shape])


def on_noise(flow, size, noise=None):
    return tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0) if noise is None else noise, [size]), flow)


def multiscale(event_shape=(4, 4, 1), num_levels=3, **options):
    """A flow that is fast to make: an ActNorm at each level."""
    factorization = dfb.DimensionFactorization.checkerboard(event_shape, num_levels)
    shapes = [event_shape, *(kept.shape for kept in factorization.kept)]
    return dfb.Multiscale([dfb.ActNorm(shape[-1]) for shape in shapes], factorization, **options)


def integers(**options):
    return dfd.Dequantized(on_noise(dfb.Chain([tfb.Scale(4.0), multiscale()]), 16, **options), grey_levels=4)


def progressive():
    return dfb.PNF(dfb.ActNorm(1), [dfb.ActNorm(1)] * 2, [4, 4, 1])


def vectors():
    """A flow of vectors, two of four dimensions of which leave."""
    return dfb.Multiscale([dfb.ActNorm(4), dfb.ActNorm(2)], dfb.DimensionFactorization([4], [[1, 3]], [[0, 2]]))


def conditional(grey_levels=None):
    """A distribution of vectors of four, shifted by a condition of as many numbers."""
    given = dfb.ConditionalTransform(lambda condition: condition, dfb.transformers.Additive(), event_ndims=1)
    distribution = on_noise(dfb.Chain([given, vectors()]), 4)
    return distribution if grey_levels is None else dfd.Dequantized(distribution, grey_levels)


def augmented():
    """Vectors of three, and of one extra number that depends on them."""
    posterior = dfb.ConditionalTransform(lambda x: x[..., :1], dfb.transformers.Additive(), event_ndims=1)
    return dfd.Augmented(on_noise(dfb.VFlow(vectors(), posterior, num_extra=1, event_ndims=1), 4), num_extra=1)


def vae(size=4):
    """Vectors of a prior with one latent number."""
    prior = dfd.VAEPrior(lambda z: tf.zeros([*z.shape[:-1], 2]), lambda e: tf.repeat(e, size, axis=-1), latent_dims=1)
    return tfd.TransformedDistribution(prior, dfb.ActNorm(size))


def moved(distribution, seed=0, **options):
    """A model with random parameters."""
    model = dimflows.FlowModel(distribution, seed=seed, **options)
    for k, variable in enumerate(model.trainable_variables):
        variable.assign_add(0.1 * normal(variable.shape, seed=k))
    return model


VFLOW = {"num_extra": 1, "num_levels": 2, "depth": 1, "width": 4, "posterior_depth": 1}
GLOW = {"num_levels": 2, "depth": 1, "width": 4}
MODELS = {
    "integers": (integers, images(), [4, 8, 16]),
    "pnf": (lambda: on_noise(progressive(), 16), normal([6, 4, 4, 1]), [4, 8, 16]),
    "vectors": (lambda: on_noise(vectors(), 4), normal([6, 4]), [2, 4]),
    "augmented": (augmented, normal([6, 3]), [2, 4]),
    "realnvp": (lambda: recipes.realnvp([6], num_levels=2, depth=1, width=4, num_blocks=1), normal([6, 6]), [3, 6]),
    "vflow-glow": (lambda: recipes.vflow_glow([4, 4, 1], **VFLOW), normal([6, 4, 4, 1]), [16, 32]),
}
BY_NAME = [slow(name) if name in ("realnvp", "vflow-glow") else name for name in MODELS]


@pytest.fixture(scope="module")
def of_integers():
    """A model whose compiled functions several tests use."""
    return moved(integers())


# The parts.


def test_sizes_of_the_parts_of_latent_values():
    assert multiscale().latent_sizes == [4, 4, 8]
    assert progressive().latent_sizes == [4, 4, 8]
    levels = [dfb.ActNorm(4), dfb.ActNorm(4)]
    assert dfb.Multiscale(levels, event_shape=[4]).latent_sizes == [4]  # nothing leaves
    assert dfb.Multiscale(levels).latent_sizes == []
    with_exit = dfb.DimensionFactorization([4], [[1, 3]], [[0, 2]])
    assert dfb.Multiscale(levels, with_exit).latent_sizes == [2, 2]


def test_code_sizes_of_latent_values_without_parts():
    for distribution, sizes in (
        (vae(), [1]),
        (on_noise(dfb.Multiscale([dfb.ActNorm(4), dfb.ActNorm(4)]), 4), [4]),
        (on_noise(dfb.Chain([dfb.Multiscale([dfb.ActNorm(1)] * 2, event_shape=[4, 4, 1]), tfb.Identity()]), 16), [16]),
        (tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [4, 4, 1]), dfb.ActNorm(1)), []),
    ):
        assert moved(distribution).code_sizes == sizes


@pytest.mark.parametrize("name", BY_NAME)
def test_a_code_is_the_first_latent_values_and_its_events_those_with_zeros_behind(name):
    distribution, x, sizes = MODELS[name]
    model = moved(distribution())
    assert model.code_sizes == sizes
    z = model.encode(x).numpy()
    for size in sizes:
        code = model.encode(x, dims=size)
        np.testing.assert_array_equal(code, z[:, :size])
        filled = np.pad(z[:, :size], [(0, 0), (0, z.shape[1] - size)])
        is_bound = isinstance(model.distribution, dfd.VariationalDistribution)
        expected = model.distribution.decode(filled) if is_bound else model.bijector.forward(filled)
        assert_close(model.decode(code), expected)
        assert_close(model.decode(code[0]), model.decode(code)[0])
    compiled = tf.function(lambda x: model.decode(model.encode(x, dims=sizes[0])), autograph=False)
    assert_close(compiled(tf.constant(x)), model.decode(z[:, : sizes[0]]))


def test_codes_of_progressive_flows_are_their_projections():
    model, x = moved(on_noise(progressive(), 16)), normal([3, 4, 4, 1])
    assert_close(model.decode(model.encode(x, dims=4)), model.bijector.project(x))
    assert_close(model.decode(model.encode(x, dims=8)), model.bijector.decode(model.bijector.encode(x, stage=1)))


def test_codes_of_conditional_models():
    model = moved(conditional(), condition_shape=[4])
    x, condition = normal([3, 4]), normal([3, 4], seed=1)
    z = model.encode(x, condition)
    code = model.encode({"x": x, "condition": condition}, dims=2)
    np.testing.assert_array_equal(code, z[:, :2])
    filled = np.pad(code, [(0, 0), (0, 2)])
    np.testing.assert_array_equal(model.decode(code, condition), model.decode(filled, condition))
    # One code for several conditions: the noise is different for each.
    many = model.decode(code[0], condition, temperature=1.0, seed=0)
    assert many.shape == [3, 4]
    again = model.encode(many, condition).numpy()
    assert_close(again[:, :2], np.broadcast_to(code[0], [3, 2]))
    assert np.abs(again[0, 2:] - again[1, 2:]).max() > 0.1


def test_what_a_code_lacks_is_noise_of_a_temperature():
    model, x = moved(on_noise(multiscale(), 16)), normal([500, 4, 4, 1])
    code = model.encode(x, dims=4)

    def rest(temperature, seed=1):
        z = model.encode(model.decode(code, temperature=temperature, seed=seed)).numpy()
        assert_close(z[:, :4], code)
        return z[:, 4:]

    assert abs(rest(1.0).std() - 1.0) < 0.05
    assert_close(rest(0.5), 0.5 * rest(1.0))
    assert_close(rest(0.0), np.zeros([500, 12]))
    assert np.abs(rest(1.0) - rest(1.0, seed=2)).max() > 0.1
    np.testing.assert_array_equal(model.decode(model.encode(x), temperature=1.0), model.decode(model.encode(x)))


def test_by_default_decoding_draws_nothing():
    model = moved(on_noise(vectors(), 4))
    state, code = model.get_weights(), normal([2, 2])  # that of the stream of seeds among them
    model.decode(code)
    assert all(np.array_equal(*pair) for pair in zip(model.get_weights(), state))
    model.decode(code, temperature=1.0)
    assert not all(np.array_equal(*pair) for pair in zip(model.get_weights(), state))


def test_what_a_code_lacks_is_the_mean_of_other_noise():
    model = moved(on_noise(multiscale(), 16, tfd.Logistic(0.5, 1.0)))
    code = normal([2, 4])
    np.testing.assert_array_equal(
        model.decode(code), model.bijector.forward(np.pad(code, [(0, 0), (0, 12)], constant_values=0.5))
    )


def test_errors_of_codes(of_integers):
    model = of_integers
    for size in (0, 5, 17, -4, 4.5, 8.0):
        with pytest.raises(
            ValueError, match=f"encode: got a code of {size} latent values, .* needs 4, 8, 16, where its parts end"
        ):
            model.encode(images(), dims=size)
    with pytest.raises(ValueError, match="decode: got a code of 5 latent values, .* needs 4, 8, 16, where its parts end"):
        model.decode(normal([2, 5]))
    unordered = moved(on_noise(dfb.ActNorm(4), 4))
    for use in (lambda: unordered.encode(normal([2, 4]), dims=2), lambda: unordered.decode(normal([2, 2]))):
        with pytest.raises(ValueError, match="needs 4, since no Multiscale or PNF next to them orders them"):
            use()
    for temperature in (-1.0, math.nan, math.inf, None, "warm", [1.0]):
        for use in (lambda t: model.decode(normal([2, 4]), temperature=t), lambda t: model.sample(2, temperature=t)):
            with pytest.raises(ValueError, match="got temperature=.*, needs a finite number >= 0"):
                use(temperature)


def test_codes_of_a_flow_vae():
    model = moved(recipes.flow_vae([4, 4, 1], flow=None, latent_dims=3, vae_width=4))
    x = normal([2, 4, 4, 1])
    np.testing.assert_array_equal(model.encode(x, dims=3), model.encode(x))
    with pytest.raises(ValueError, match="got a code of 2 latent values, .* needs 3"):
        model.encode(x, dims=2)
    with pytest.raises(ValueError, match="got a code of 16 latent values, .* needs 3"):
        model.decode(normal([2, 16]))


# Temperature.


def test_samples_of_a_temperature_are_events_of_scaled_noise():
    model = moved(on_noise(vectors(), 4))
    noise = model.encode(model.sample([2, 3], seed=4))
    for temperature in (0.0, 0.7, 2.0):
        assert_close(model.encode(model.sample([2, 3], seed=4, temperature=temperature)), temperature * noise)
    np.testing.assert_array_equal(model.sample(3, seed=4, temperature=1.0), model.sample(3, seed=4))
    assert_close(model.sample(3, seed=4, temperature=np.float32(1.0 - 1e-7)), model.sample(3, seed=4))


def test_another_temperature_is_not_traced_again(of_integers):
    model = of_integers
    model.sample(2, temperature=0.9)
    traced = model._compiled_sample.experimental_get_tracing_count()
    for temperature in (0.5, 0, np.float64(0.3), tf.constant(0.2)):
        model.sample(2, temperature=temperature)
    assert model._compiled_sample.experimental_get_tracing_count() == traced


def test_samples_of_integers_stay_integers_in_range(of_integers):
    model = of_integers
    for temperature in (0.0, 0.5, 100.0):
        samples = model.sample(50, seed=0, temperature=temperature)
        assert samples.dtype == tf.int32 and 0 <= samples.numpy().min() and samples.numpy().max() <= 3
    assert np.ptp(model.sample(5, temperature=0.0), axis=0).max() == 0
    np.testing.assert_array_equal(model.sample(5, seed=1, temperature=1), model.distribution.sample(5, seed=model._seed(1)))


@pytest.mark.parametrize("grey_levels", [None, 4])
def test_the_temperature_of_conditional_models(grey_levels):
    model = moved(conditional(grey_levels), condition_shape=[4])
    condition = 3.0 * normal([3, 4])
    assert model.sample(2, seed=0, condition=condition, temperature=0.5).shape == [2, 3, 4]
    cold = model.sample(2, condition=condition, temperature=0.0)
    assert_close(cold[0], model.decode(np.zeros([3, 4]), condition))
    np.testing.assert_array_equal(cold[0], cold[1])


FLOW_VAE = {"flow": "glow", "latent_dims": 3, "vae_width": 4, "depth": 1, "width": 4}


@pytest.mark.parametrize(
    ("distribution", "size"),
    [
        (augmented, 4),
        slow(lambda: recipes.vflow_glow([4, 4, 1], **VFLOW), 32, id="vflow-glow"),
        (vae, 1),
        slow(lambda: recipes.flow_vae([4, 4, 1], **FLOW_VAE), 3, id="flow-vae"),
    ],
)
def test_the_temperature_of_bounds_is_that_of_all_their_noise(distribution, size):
    model = moved(distribution())
    assert_close(model.sample(2, temperature=0.0)[0], model.decode(np.zeros([size])))
    assert_close(model.sample(2, seed=3, temperature=1.0), model.distribution.sample(2, seed=model._seed(3)))


def test_both_noises_of_a_vae_have_a_temperature():
    z = vae().distribution.sample(4000, seed=0, temperature=0.5).numpy()  # variance of e and of the likelihood: 1/4 each
    assert_close(np.cov(z.T), 0.25 * (np.ones([4, 4]) + np.eye(4)), atol=0.04)


def test_noise_is_scaled_around_its_mean():
    model = moved(on_noise(tfb.Shift(tf.Variable([1.0, 2.0])), 2, tfd.Logistic(5.0, 1.0)))
    z = model.encode(model.sample(3, seed=0))
    assert_close(model.encode(model.sample(3, seed=0, temperature=0.5)), 5.0 + 0.5 * (z - 5.0))
    own = moved(tfd.Sample(tfd.Normal(tf.Variable(3.0), 1.0), [2]))  # which is its own noise
    assert_close(own.sample(4, temperature=0.0), np.broadcast_to(own.distribution.mean(), [4, 2]))


def test_noise_without_a_mean_has_one_temperature():
    class Meanless(tfd.Normal):
        def _mean(self):
            raise NotImplementedError("no mean")

    model = moved(on_noise(tfb.Shift(tf.Variable([1.0, 2.0])), 2, Meanless(0.0, 1.0)))
    assert model.sample(3, temperature=1.0).shape == [3, 2]
    with pytest.raises(ValueError, match="Sample.*: got another temperature than 1, needs a mean"):
        model.sample(3, temperature=0.5)


# What is explained.


def with_an_empty_level():
    """Three levels, after the first of which nothing leaves."""
    event = np.arange(4)
    factorization = dfb.DimensionFactorization([4], [event, event[:2]], [event[:0], event[2:]])
    return on_noise(dfb.Multiscale([dfb.ActNorm(4), dfb.ActNorm(4), dfb.ActNorm(2)], factorization), 4)


EXPLAINED = {
    "integers": (integers, images(8), [4, 4, 8]),
    "pnf": (lambda: dfd.Dequantized(on_noise(dfb.Chain([tfb.Scale(4.0), progressive()]), 16), 4), images(8), [4, 4, 8]),
    "nothing_leaves": (lambda: on_noise(dfb.Multiscale([dfb.ActNorm(4), dfb.ActNorm(4)]), 4), normal([6, 4]), [4]),
    "an_empty_level": (with_an_empty_level, normal([6, 4]), [2, 2]),
    "conditional": (
        lambda: recipes.glow([4, 4, 1], condition_shape=[2], grey_levels=4, **GLOW),
        {"x": images(), "condition": normal([6, 2])},
        [8, 8],
    ),
}


@pytest.mark.parametrize("name", [slow(name) if name == "conditional" else name for name in EXPLAINED])
def test_what_is_explained_sums_to_the_bits_per_dim_of_the_model(name):
    distribution, data, sizes = EXPLAINED[name]
    model = moved(distribution())
    columns = dimflows.explained(model, data, seed=5, batch_size=4)
    np.testing.assert_array_equal(columns["size"], sizes)
    num_samples = 1 if isinstance(model.distribution, dfd.Dequantized) else None
    log_prob = model.score(data, num_samples, seed=5, batch_size=4)["log_prob"]
    bits = -log_prob.mean() / (model.event_shape.num_elements() * math.log(2.0))
    assert columns["bits"].sum() == pytest.approx(bits, rel=1e-5)
    x, condition = (data["x"], data["condition"]) if isinstance(data, dict) else (data, None)
    for error, size in zip(columns["error"], [0, *model.code_sizes[:-1]]):
        code = model.encode(data).numpy()[:, :size]
        filled = np.pad(code, [(0, 0), (0, sum(sizes) - size)])
        expected = np.sqrt(np.mean(np.square(model.decode(filled, condition) - x.astype(np.float64))))
        assert error == pytest.approx(expected, rel=1e-5)
    if "psnr" in columns:
        assert_close(columns["psnr"], 20 * np.log10(3 / columns["error"]))
    assert ("psnr" in columns) == isinstance(model.distribution, dfd.Dequantized)


def test_datasets_are_explained_as_arrays_are():
    model, x = moved(with_an_empty_level()), normal([6, 4])
    dataset = tf.data.Dataset.from_tensor_slices((x, np.zeros(6))).batch(4)
    columns = dimflows.explained(model, dataset)
    for key, column in dimflows.explained(model, x, batch_size=4).items():
        np.testing.assert_array_equal(column, columns[key])


def test_each_part_that_is_explained():
    """A flow without noise or networks, by hand: D = 4 dimensions, two leave after the first level."""
    factorization = dfb.DimensionFactorization([4], [[1, 3]], [[0, 2]])
    flow = dfb.Multiscale([tfb.Scale(2.0), tfb.Scale(16.0)], factorization)
    chain = dfb.Chain([tfb.Scale(8.0), tfb.Shift(tf.Variable(0.0)), flow])
    model = dimflows.FlowModel(on_noise(chain, 4))
    x = np.float32([[16.0, 256.0, 0.0, 512.0], [0.0, 0.0, 32.0, 0.0]])  # the latent values: [1, 2, 1, 0], [0, 0, 0, 2]

    def nats(z):
        return 0.5 * np.square(z).sum(axis=1).mean() + math.log(2.0 * math.pi)

    coarse, fine = nats([[1, 2], [0, 0]]) + 2 * math.log(16.0), nats([[1, 0], [0, 2]]) + 4 * math.log(2.0)
    columns = dimflows.explained(model, x)
    assert_close(columns["entropy"], [coarse / 2, fine / 2])
    assert_close(columns["bits"], [coarse / math.log(2.0) / 4 + 1.5, fine / math.log(2.0) / 4 + 1.5])
    assert_close(columns["error"], np.sqrt([np.mean(x**2), (16.0**2 + 32.0**2) / 8]))
    assert list(columns) == ["size", "bits", "entropy", "error"]


@pytest.mark.parametrize(
    ("distribution", "data", "message"),
    [
        (lambda: on_noise(dfb.ActNorm(4), 4), normal([2, 4]), "explained: .* needs a Multiscale or PNF next to"),
        (augmented, normal([2, 3]), "needs a Multiscale or PNF next to"),
        (lambda: on_noise(progressive(), 16, tfd.Normal(0.0, 2.0)), normal([2, 4, 4, 1]), "need a standard normal one"),
        (integers, images(grey_levels=9), "needs numbers 0 to 3"),
        (integers, tf.data.Dataset.from_tensor_slices(images(0)).batch(2), "explained: the dataset is empty"),
    ],
)
def test_errors_of_explained(distribution, data, message):
    with pytest.raises(ValueError, match=message):
        dimflows.explained(moved(distribution()), data)


# Beside principal components.


def test_psnr_is_that_of_the_mean_over_all_images():
    assert_close(codes.psnr(1.0, 256), 20.0 * math.log10(255.0))
    assert_close(codes.psnr([4.0, 100.0], 17), 20.0 * np.log10(16.0 / np.array([2.0, 10.0])))
    assert codes.psnr([0.0], 4).tolist() == [math.inf]


def test_principal_components_are_those_of_the_singular_values():
    events, others = normal([40, 2, 3], seed=1) @ normal([3, 3], seed=2) + 5.0, normal([7, 2, 3], seed=3)
    pca = codes.PCA(events)
    mean = events.reshape(40, 6).mean(axis=0)
    directions = np.linalg.svd(events.reshape(40, 6) - mean)[2]
    for size in (0, 1, 3, 6):
        expected = mean + (others.reshape(7, 6) - mean) @ directions[:size].T @ directions[:size]
        assert_close(pca.reconstruct(others, size), expected.reshape(7, 2, 3), atol=1e-4)


def test_a_comparison_with_principal_components(of_integers):
    model, test, train = of_integers, images(7, seed=1), images(50, seed=2)
    comparison = codes.compare_with_pca(model, test, train, num_images=5, batch_size=3)
    assert comparison.sizes == [4, 8, 16] and comparison.grey_levels == 4
    assert comparison.images.shape == (4, 5, 4, 4, 1)
    np.testing.assert_array_equal(comparison.images[0], test[:5])
    pca = codes.PCA(train)
    for k, size in enumerate(comparison.sizes):
        decoded = model.decode(model.encode(test, dims=size))
        np.testing.assert_array_equal(comparison.images[1 + k], decoded[:5])
        of_pca = np.clip(np.round(pca.reconstruct(test, size)), 0, 3)
        for psnr, reconstructed in ((comparison.psnr[k], decoded), (comparison.pca_psnr[k], of_pca)):
            assert psnr == pytest.approx(codes.psnr(np.mean(np.square(reconstructed - test)), 4))


@pytest.mark.parametrize(
    ("distribution", "test", "message"),
    [
        (lambda: on_noise(dfb.ActNorm(4), 4), normal([3, 4]), "has no events that are integer images"),
        (lambda: on_noise(multiscale(), 16), normal([3, 4, 4, 1]), "has no events that are integer images"),
        (
            lambda: dfd.Dequantized(
                tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [4, 4, 1]), dfb.ActNorm(1)), 4
            ),
            images(),
            r"has the parts \['actnorm'\], needs a Multiscale that dimensions leave, or a PNF, next to its latent",
        ),
        (integers, images(shape=(2, 2, 1)), r"got images of shape \[6, 2, 2, 1\], needs \[N, 4, 4, 1\]"),
        (integers, images(0), r"got images of shape \[0, 4, 4, 1\]"),
    ],
)
def test_errors_of_comparisons(distribution, test, message):
    with pytest.raises(ValueError, match=f"codes: .*{message}"):
        codes.compare_with_pca(moved(distribution()), test, images())


# Nested dropout.


def entangled():
    """Vectors of four in which what leaves depends on what stays, and the other way round."""
    couplings = [
        dfb.AdditiveCoupling(
            lambda x, gain=gain: gain * tf.concat([x, x**2], -1)[..., :2], dfb.masks.Channel(flip, event_ndims=1)
        )
        for gain, flip in ((0.5, False), (0.3, True))
    ]
    factorization = dfb.DimensionFactorization([4], [[0, 1]], [[2, 3]])
    return dfb.Multiscale([dfb.Chain([dfb.ActNorm(4), *couplings]), dfb.ActNorm(2)], factorization)


@pytest.mark.parametrize("grey_levels", [None, 4])
def test_nested_dropout_adds_the_squared_error_of_codes(grey_levels):
    distribution = on_noise(entangled(), 4)
    x = images(8, (4,)) if grey_levels else normal([8, 4])
    distribution = dfd.Dequantized(distribution, grey_levels) if grey_levels else distribution
    model, plain = dimflows.FlowModel(distribution, nested_dropout=3.0), dimflows.FlowModel(distribution)
    log_prob = plain.log_prob(x, seed=0)
    y = (x[:2] + 0.5 if grey_levels else x[:2]).astype(np.float32)  # of a quarter of the batch
    code = entangled().inverse(y).numpy()
    restored = entangled().forward(np.concatenate([code[:, :2], np.zeros([2, 2], np.float32)], axis=1))
    error = np.sum((restored - y) ** 2, axis=-1).mean() / (grey_levels or 1) ** 2
    assert error > 0.1
    for training, expected in ((True, 3.0 * error), (False, 0.0)):
        difference = model.compute_loss(x, None, log_prob, training=training) - plain.compute_loss(x, None, log_prob)
        assert_close(difference, expected)


def test_nested_dropout_draws_every_size_but_the_whole():
    flow = dfb.Multiscale([tfb.Identity()] * 3, dfb.DimensionFactorization.channels([4], 3))
    model = dimflows.FlowModel(on_noise(dfb.Chain([dfb.ActNorm(4), flow]), 4), nested_dropout=1.0, seed=0)
    x = np.ones([400, 4], np.float32) * [1.0, 10.0, 100.0, 1000.0]
    # The sizes are 1 and 2: the second number is missing in half of the codes, the last two in all.
    loss = model.compute_loss(x, None, tf.zeros([400])).numpy()
    assert abs((loss - 100.0**2 - 1000.0**2) / 10.0**2 - 0.5) < 0.2


@pytest.mark.slow
def test_codes_are_better_with_nested_dropout():
    x = (normal([600, 2]) @ normal([2, 4], 1) + 0.1 * normal([600, 4], 2)).astype(np.float32)
    errors = []
    for weight in (0.0, 30.0):
        keras.utils.set_random_seed(0)
        model = dimflows.FlowModel(recipes.realnvp([4], depth=1, width=16), nested_dropout=weight, seed=0)
        model.adapt(x)
        model.compile(keras.optimizers.Adam(1e-2))
        model.fit(x, batch_size=60, epochs=4, verbose=0)
        errors.append(np.mean((model.decode(model.encode(x, dims=2)) - x) ** 2))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("distribution", "weight", "message"),
    [
        (lambda: on_noise(dfb.ActNorm(4), 4), 1.0, "got nested_dropout for .* needs a flow whose latent values are ordered"),
        (lambda: on_noise(dfb.Multiscale([dfb.ActNorm(4)]), 4), 1.0, "needs a flow whose latent values are ordered"),
        (augmented, 1.0, "needs a flow whose latent values are ordered"),
        (lambda: on_noise(vectors(), 4), -1.0, "FlowModel: got nested_dropout=-1.0, needs a number >= 0"),
        (lambda: on_noise(vectors(), 4), float("nan"), "FlowModel: got nested_dropout=nan, needs a number >= 0"),
    ],
)
def test_errors_of_nested_dropout(distribution, weight, message):
    with pytest.raises(ValueError, match=message):
        dimflows.FlowModel(distribution(), nested_dropout=weight)


def test_a_saved_model_keeps_its_nested_dropout(tmp_path):
    model = dimflows.FlowModel(recipes.nice([4], width=4), nested_dropout=0.0)
    assert model.get_config()["nested_dropout"] == 0.0
    model = dimflows.FlowModel(recipes.principal_pnf([4], num_halvings=1, depth=1, width=4), nested_dropout=2.0)
    assert dimflows.FlowModel.from_config(model.get_config()).get_config()["nested_dropout"] == 2.0
