"""`FlowModel`: training, data-dependent initialisation, use, checks and saving with Keras 3."""

import os
import subprocess
import sys
import textwrap

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras
from registry import slow
from sklearn.datasets import load_sample_images

import tfp_dimflows as dimflows
from tfp_dimflows import keras_bridge

dfb, dfd = dimflows.bijectors, dimflows.distributions
tfb, tfd = tfp.bijectors, tfp.distributions

FIRST = dfb.masks.Channel(event_ndims=1)
SECOND = FIRST.complement()
LEVELS = 17


# Distributions over pairs, one for each way to hold variables.


def transformed(bijector, event_shape=(2,)):
    return tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), event_shape), bijector)


def mlp(inputs=1, outputs=2, **options):
    return dimflows.networks.MLP(inputs, outputs, **({"hidden": (8,), "activation": "tanh", "seed": 0} | options))


def keras_networks(**options):
    couplings = [dfb.AffineCoupling(mlp(**options), FIRST), dfb.AffineCoupling(mlp(**options), SECOND)]
    return transformed(dfb.Chain([couplings[0], dfb.ActNorm(2), couplings[1], dfb.ActNorm(2)]))


def unbuilt_keras_networks():
    def network():
        return keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)])

    return transformed(tfb.Chain([dfb.AffineCoupling(network(), FIRST), dfb.AffineCoupling(network(), SECOND)]))


def raw_variables():
    shift, scale = tf.Variable([0.0, 0.0], name="shift"), tf.Variable([1.0, 1.0], name="scale")
    return transformed(tfb.Chain([tfb.Shift(shift), tfb.ScaleMatvecDiag(scale)]))


def transformed_variables():
    scale = tfp.util.TransformedVariable(tf.eye(2), tfb.FillScaleTriL())
    return tfd.MultivariateNormalTriL(loc=tf.Variable([0.0, 0.0]), scale_tril=scale)


def tfp_autoregressive(**options):
    options = {"params": 2, "event_shape": [2], "hidden_units": [8], "activation": "tanh"} | options
    return transformed(tfb.MaskedAutoregressiveFlow(tfb.AutoregressiveNetwork(**options)))


def tfp_realnvp():
    def coupling(network):
        return tfb.RealNVP(num_masked=1, shift_and_log_scale_fn=lambda x, output_units, **_: tf.split(network(x), 2, axis=-1))

    return transformed(tfb.Chain([coupling(mlp()), tfb.Permute([1, 0]), coupling(mlp(seed=1))]))


def variables_in_functions():
    weight, bias = tf.Variable([[0.1, 0.1]]), tf.Variable([0.0, 0.0])
    coupling = dfb.AffineCoupling(lambda x: x @ weight + bias, FIRST, scale="exp")
    return transformed(dfb.Chain([coupling, tfb.Shift(tf.Variable([0.0, 0.0]))]))


KINDS = {  # and the number of trainable tensors
    "keras_networks": (keras_networks, 4 + 1 + 2 + 4 + 1 + 2),
    "unbuilt_keras_networks": (unbuilt_keras_networks, 4 + 1 + 4 + 1),
    "raw_variables": (raw_variables, 2),
    "transformed_variables": (transformed_variables, 2),
    "tfp_autoregressive": (tfp_autoregressive, 4),
    "tfp_realnvp": (tfp_realnvp, 4 + 4),
    "variables_in_functions": (variables_in_functions, 3),
}


def pairs(num=256, seed=0):
    """Correlated pairs, far from a standard normal."""
    e = np.random.default_rng(seed).normal(size=[num, 2]).astype(np.float32)
    return np.stack([2.0 + 0.5 * e[:, 0], -1.0 + e[:, 0] ** 2 + 0.3 * e[:, 1]], axis=1)


def blobs(num, shape=(8, 8, 1), grey_levels=LEVELS, seed=0):
    """Integer images of one bright blob each."""
    generator = np.random.default_rng(seed)
    height, width, channels = shape
    centre = generator.uniform(0.25, 0.75, [num, 1, 1, 1, 2])
    rows = np.linspace(0, 1, height)[None, :, None, None]
    columns = np.linspace(0, 1, width)[None, None, :, None]
    distance = (rows - centre[..., 0]) ** 2 + (columns - centre[..., 1]) ** 2
    values = np.exp(-10.0 * distance) + generator.normal(0.0, 0.05, [num, height, width, channels])
    return np.clip(np.round(values * (grey_levels - 1)), 0, grey_levels - 1).astype(np.uint8)


def image_recipe(**options):
    options = {"num_levels": 2, "depth": 1, "width": 4, "num_blocks": 1, "grey_levels": LEVELS} | options
    return dimflows.recipes.realnvp([8, 8, 1], **options)


def batches(x, size=32):
    return tf.data.Dataset.from_tensor_slices(x).batch(size)


def values(variables):
    return [np.array(tf.convert_to_tensor(v)) for v in variables]


def assert_equal(actual, expected):
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected):
        np.testing.assert_array_equal(a, b)


def assert_close(actual, expected, tolerance=1e-5):
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def mean_nll(model, x):
    return -float(tf.reduce_mean(model.distribution.log_prob(tf.constant(x))))


# Every kind of distribution trains.


@pytest.fixture(scope="module", params=[slow(kind) if kind in ("raw_variables", "tfp_realnvp") else kind for kind in KINDS])
def trained(request):
    """(kind, model, values of its trainable variables before, mean negative log-probability before, history)."""
    build, _ = KINDS[request.param]
    keras.utils.set_random_seed(0)
    model = dimflows.FlowModel(build(), seed=0)
    before, nll_before = values(model.trainable_variables), mean_nll(model, pairs())
    model.compile(keras.optimizers.Adam(0.02))
    history = model.fit(pairs(), batch_size=64, epochs=8, shuffle=False, verbose=0)
    return request.param, model, before, nll_before, history.history


def test_every_trainable_variable_is_trained(trained):
    kind, model, before, _, _ = trained
    assert len(before) == KINDS[kind][1]
    after = values(model.trainable_variables)
    assert [v.name for v, a, b in zip(model.trainable_variables, after, before) if np.array_equal(a, b)] == []


def test_the_loss_falls(trained):
    _, model, _, nll_before, history = trained
    assert history["loss"][-1] < history["loss"][0] < nll_before
    assert mean_nll(model, pairs()) < nll_before - 0.5
    assert history["nll"] == pytest.approx(history["loss"])


def test_metrics_are_means_of_log_prob(trained):
    _, model, _, _, _ = trained
    x = pairs(100, seed=1)  # the last batch is smaller
    metrics = model.evaluate(x, batch_size=32, return_dict=True, verbose=0)
    log_prob = model.log_prob(x).numpy()
    assert set(metrics) == {"loss", "nll"}
    assert metrics["nll"] == pytest.approx(-log_prob.mean(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(-log_prob.mean(), rel=1e-5)
    np.testing.assert_allclose(model.predict(x, batch_size=32, verbose=0), log_prob, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.distribution.log_prob(x), log_prob, rtol=1e-5, atol=1e-5)


def test_weights_of_any_distribution_are_saved(trained, tmp_path):
    kind, model, _, _, _ = trained
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    other = dimflows.FlowModel(KINDS[kind][0]())
    other.load_weights(path)
    assert_equal(values(other.variables), values(model.variables))
    x = pairs(8, seed=2)
    np.testing.assert_array_equal(other.distribution.log_prob(x), model.distribution.log_prob(x))


def test_samples_follow_the_training(trained):
    _, model, _, _, _ = trained
    samples = model.sample(5, seed=1)
    assert samples.shape == [5, 2] and samples.dtype == tf.float32
    np.testing.assert_array_equal(samples, model.sample(5, seed=1))
    assert np.abs(samples - model.sample(5, seed=2)).max() > 0.0
    assert np.abs(model.sample(4) - model.sample(4)).max() > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{"jit_compile": True}, {"run_eagerly": True}], ids=["jit_compile", "run_eagerly"])
def test_training_is_the_same_in_every_mode(mode):
    def train(**mode):
        model = dimflows.FlowModel(keras_networks())
        model.compile(keras.optimizers.SGD(0.05), **mode)
        model.fit(pairs(64), batch_size=16, shuffle=False, verbose=0)
        return values(model.trainable_variables)

    assert_close(train(**mode), train(jit_compile=False), 1e-4)


def test_a_distribution_without_trainable_variables_is_refused():
    with pytest.raises(ValueError, match="StandardNormal has no trainable variables"):
        dimflows.FlowModel(tfd.Sample(tfd.Normal(0.0, 1.0), [2], name="StandardNormal"))
    frozen = tfd.Sample(tfd.Normal(tf.Variable(0.0, trainable=False), 1.0), [2], name="Frozen")
    with pytest.raises(ValueError, match="Frozen has no trainable variables"):
        dimflows.FlowModel(frozen)


def test_a_batch_of_distributions_is_refused():
    with pytest.raises(ValueError, match=r"TwoNormals has batch shape \(2,\)"):
        dimflows.FlowModel(tfd.Normal(tf.Variable([0.0, 1.0]), 1.0, name="TwoNormals"))


def test_a_loss_is_refused():
    with pytest.raises(ValueError, match="negative log-probability"):
        dimflows.FlowModel(raw_variables()).compile("adam", loss="mse")


def test_an_unbuilt_network_needs_a_static_event_shape():
    coupling = dfb.AffineCoupling(keras.Sequential([keras.layers.Dense(2)]), FIRST)
    base = tfd.Sample(tfd.Normal(0.0, 1.0), tf.Variable([2], trainable=False, shape=[1]))
    assert not base.event_shape.is_fully_defined()
    with pytest.raises(ValueError, match="unbuilt"):
        dimflows.FlowModel(tfd.TransformedDistribution(base, coupling))


def test_variables_that_are_not_trainable_stay():
    fixed = tf.Variable([3.0, 3.0], trainable=False)
    model = dimflows.FlowModel(transformed(tfb.Chain([tfb.Shift(fixed), tfb.Shift(tf.Variable([0.0, 0.0]))])))
    model.compile("sgd")
    model.fit(pairs(32), verbose=0)
    np.testing.assert_array_equal(fixed, [3.0, 3.0])
    assert any(v.value is fixed for v in model.non_trainable_variables)


def test_summary_counts_every_variable():
    lines = []
    model = dimflows.FlowModel(tfp_autoregressive())
    model.summary(print_fn=lambda line, **_: lines.append(line))
    expected = sum(int(np.prod(v.shape)) for v in model.distribution.trainable_variables)
    assert model.count_params() >= expected > 0
    assert f"Trainable params: {expected} " in "\n".join(lines)


# The loss.


@pytest.mark.parametrize("kind", ["keras", "tf_keras"])
def test_regularisation_losses_are_in_the_loss(kind):
    if kind == "keras":
        dense = keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.5), kernel_initializer="ones")
        dense.build([None, 1])
        model = dimflows.FlowModel(transformed(dfb.AffineCoupling(dense, FIRST)))
        kernels = [dense.kernel]
    else:
        regularizer = tf_keras.regularizers.L2(0.5)
        model = dimflows.FlowModel(tfp_autoregressive(kernel_regularizer=regularizer))
        kernels = [v for v in model.distribution.trainable_variables if "kernel" in v.name]
        assert len(kernels) == 2
    penalty = 0.5 * sum((k**2).sum() for k in values(kernels))
    nll, before = mean_nll(model, pairs(16)), values(kernels)
    model.compile(keras.optimizers.SGD(0.1))
    history = model.fit(pairs(16), batch_size=16, verbose=0).history
    assert penalty > 0.1
    assert history["loss"][0] == pytest.approx(nll + penalty, rel=1e-5)
    assert history["nll"][0] == pytest.approx(nll, rel=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(values(kernels), before)) > 0.0
    evaluated = model.evaluate(pairs(16), verbose=0, return_dict=True)
    penalty = 0.5 * sum((k**2).sum() for k in values(kernels))
    assert evaluated["loss"] == pytest.approx(mean_nll(model, pairs(16)) + penalty, rel=1e-5)


def test_recipes_penalise_weight_norm_magnitudes():
    model = dimflows.FlowModel(image_recipe(l2=0.25))
    magnitudes = [v for v in model.trainable_variables if v.name == "magnitude"]
    expected = 0.25 * sum((m**2).sum() for m in values(magnitudes))
    assert len(magnitudes) > 0
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_no_events_is_zero():
    """A replica may have none of the last batch."""
    prior = dfd.VAEPrior(mlp(2, 2), mlp(1, 2), latent_dims=1)
    for distribution in (keras_networks(), tfd.TransformedDistribution(prior, dfb.ActNorm(2))):
        model = dimflows.FlowModel(distribution, seed=0)
        log_prob = model(pairs(0), training=True)
        assert float(model.compute_loss(y_pred=log_prob)) == 0.0


def test_sample_weights():
    model = dimflows.FlowModel(raw_variables())
    model.compile(keras.optimizers.SGD(0.1))
    x, weights = pairs(16), np.linspace(0.0, 2.5, 16)
    nll = -model.distribution.log_prob(x).numpy()
    evaluated = model.evaluate(x, sample_weight=weights, batch_size=16, verbose=0, return_dict=True)
    assert evaluated["loss"] == pytest.approx((weights * nll).mean(), rel=1e-5)
    assert evaluated["nll"] == pytest.approx(np.average(nll, weights=weights), rel=1e-5)
    history = model.fit(x, sample_weight=weights, batch_size=16, verbose=0).history
    assert history["loss"][0] == pytest.approx((weights * nll).mean(), rel=1e-5)
    nll = -model.distribution.log_prob(x).numpy()
    history = model.fit(batches((x, np.zeros(16), weights), 16), verbose=0).history
    assert history["loss"][0] == pytest.approx((weights * nll).mean(), rel=1e-5)


def test_bits_per_dim_of_images():
    base = tfd.Sample(tfd.Normal(tf.Variable(0.5), 1.0), [2, 2, 3])
    model = dimflows.FlowModel(base)
    model.compile(keras.optimizers.SGD(0.0))
    x = np.random.default_rng(0).normal(size=[20, 2, 2, 3]).astype(np.float32)
    metrics = model.evaluate(x, batch_size=16, verbose=0, return_dict=True)
    nll = -base.log_prob(x).numpy().mean()
    assert metrics["nll"] == pytest.approx(nll, rel=1e-5)
    assert metrics["bits_per_dim"] == pytest.approx(nll / (12 * np.log(2.0)), rel=1e-5)


# Conditional distributions.


@pytest.fixture(scope="module")
def conditional():
    """A flow of x ~ N((3c, -c), 0.5^2) given c = -1 or 1."""
    generator = np.random.default_rng(0)
    condition = generator.choice([-1.0, 1.0], [512, 1]).astype(np.float32)
    x = condition * [3.0, -1.0] + 0.5 * generator.normal(size=[512, 2])
    predictor = dimflows.networks.MLP(1, 4, hidden=(), seed=0)
    coupling = dfb.AffineCoupling(mlp(condition_channels=1), FIRST)
    flow = dfb.Chain([coupling, dfb.ConditionalTransform(predictor, dfb.transformers.Affine("exp"), event_ndims=1)])
    model = dimflows.FlowModel(transformed(flow), seed=0)
    model.compile(keras.optimizers.Adam(0.05))
    data = batches({"x": x.astype(np.float32), "condition": condition}, 128).repeat(40)
    model.fit(data, epochs=1, verbose=0)
    return model


@pytest.mark.slow
def test_a_conditional_distribution_learns_its_condition(conditional):
    for c in (-1.0, 1.0):
        condition = tf.fill([2000, 1], c)
        samples = conditional.sample(seed=0, condition=condition).numpy()
        np.testing.assert_allclose(samples.mean(axis=0), [3.0 * c, -c], atol=0.3)
        right = conditional.log_prob({"x": [[3.0 * c, -c]], "condition": [[c]]})
        wrong = conditional.log_prob({"x": [[3.0 * c, -c]], "condition": [[-c]]})
        assert right > wrong + 5.0


def test_conditional_batches_as_arrays(conditional):
    x, condition = pairs(16), np.ones([16, 1], np.float32)
    nll = conditional.evaluate({"x": x, "condition": condition}, verbose=0, return_dict=True)["nll"]
    log_prob = conditional.distribution.log_prob(x, bijector_kwargs={"condition": condition})
    assert nll == pytest.approx(-log_prob.numpy().mean(), rel=1e-5)
    np.testing.assert_allclose(conditional.log_prob({"x": x, "condition": condition}), log_prob, rtol=1e-5)


# Data-dependent initialisation.


def moments(h):
    h = h.numpy()
    axes = tuple(range(h.ndim - 1))
    return h.mean(axis=axes), h.std(axis=axes)


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_adapt_normalises_the_output_of_every_actnorm(kind):
    if kind == "vectors":
        x = pairs()
        model = dimflows.FlowModel(keras_networks())
    else:
        x = blobs(32, (4, 4, 2)).astype(np.float32)
        model = dimflows.FlowModel(dimflows.recipes.glow([4, 4, 2], num_levels=1, depth=2, width=4))
    model.adapt(batches(x, 8), steps=len(x) // 8)
    if kind == "vectors":
        parts = model.distribution.bijector.bijectors
    else:
        squeeze, steps = model.distribution.bijector.levels[0].bijectors
        parts = [squeeze, *(part for step in steps.bijectors for part in step.bijectors)]
    h, seen = tf.constant(x), 0
    for part in parts:
        h = part.inverse(h)
        if isinstance(part, dfb.ActNorm):
            mean, std = moments(h)
            np.testing.assert_allclose(mean, 0.0, atol=1e-4)
            np.testing.assert_allclose(std, 1.0, atol=1e-3)
            seen += 1
    assert seen == 2


def test_adapt_takes_a_batch_in_every_form():
    x = pairs(32)
    results = []
    for data in (x, tf.constant(x), (x, np.zeros(32)), batches(x, 32), batches((x, np.zeros(32)), 8)):
        model = dimflows.FlowModel(keras_networks())
        model.adapt(data, steps=4)
        results.append(values(model.trainable_variables))
    for result in results[1:]:
        assert_close(result, results[0])


@pytest.mark.slow
def test_fit_never_adapts():
    model = dimflows.FlowModel(image_recipe())
    model.adapt(blobs(32))
    before = values(model.trainable_variables)
    model.compile(keras.optimizers.SGD(0.0))
    model.fit(blobs(32, seed=1), verbose=0)
    model.log_prob(blobs(32, seed=1))
    assert_equal(values(model.trainable_variables), before)


def test_adapt_needs_data():
    with pytest.raises(ValueError, match="empty"):
        dimflows.FlowModel(keras_networks()).adapt(batches(pairs()).take(0))


# Bad batches.


def with_value(x, value, index=0):
    x = np.array(x, dtype=np.result_type(x, np.array(value).dtype) if np.isfinite(value) else np.float32)
    x[index].flat[0] = value
    return x


BAD_VECTORS = {
    "wrong_size": (np.zeros([8, 3], np.float32), r"\(8, 3\)|\(1, 3\)"),
    "too_few_axes": (np.zeros([8], np.float32), r"shape \([18],\)"),
    "nan": (with_value(pairs(8), np.nan), "not finite"),
    "infinity": (with_value(pairs(8), np.inf), "not finite"),
    "late_nan": (with_value(pairs(8), np.nan, index=5), "not finite"),
}
BAD_IMAGES = {
    "wrong_size": (np.zeros([8, 8, 9, 1], np.uint8), r"8, 9, 1\).*needs events of shape \(8, 8, 1\)"),
    "no_channels": (np.zeros([4, 8, 8], np.uint8), r"needs events of shape \(8, 8, 1\)"),
    "nan": (with_value(blobs(8), np.nan), "not finite|nan"),
    "too_bright": (with_value(blobs(8), LEVELS), "17.*needs numbers 0 to 16"),
    "negative": (with_value(blobs(8).astype(np.int32), -1), "-1.*needs numbers 0 to 16"),
    "late_too_bright": (with_value(blobs(8), 200, index=5), "200.*needs numbers 0 to 16"),
    "between_levels": (np.minimum(blobs(8), 15) + np.float32(0.5), "needs numbers 0 to 16"),
}


@pytest.fixture(scope="module")
def checked_models():
    """A model of vectors and one of images, which no test changes."""
    models = {"vectors": dimflows.FlowModel(keras_networks()), "images": dimflows.FlowModel(image_recipe(), seed=0)}
    for model in models.values():
        model.compile("adam")
    return models


@pytest.mark.parametrize("method", ["fit", "fit_dataset", "adapt", "log_prob"])
@pytest.mark.parametrize(
    ("kind", "case"), [("vectors", case) for case in BAD_VECTORS] + [("images", case) for case in BAD_IMAGES]
)
def test_bad_batches_are_refused_and_change_nothing(checked_models, kind, case, method):
    model = checked_models[kind]
    bad, message = (BAD_VECTORS if kind == "vectors" else BAD_IMAGES)[case]
    if method == "fit_dataset":
        bad, method = tf.data.Dataset.from_tensors(bad), "fit"
    before = values(model.variables + model.optimizer.variables)
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(bad)
    assert_equal(values(model.variables + model.optimizer.variables), before)


@pytest.mark.slow
def test_a_late_batch_outside_the_levels_stops_fit(checked_models):
    data = batches(with_value(blobs(8), 200, index=5), 4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="needs|not numbers 0 to 16"):
        checked_models["images"].evaluate(data, verbose=0)


@pytest.mark.parametrize("method", ["fit", "adapt", "log_prob"])
@pytest.mark.parametrize("case", ["nan_condition", "wrong_condition", "nan_x", "no_condition"])
def test_bad_conditional_batches_are_refused_and_change_nothing(method, case):
    coupling = dfb.AffineCoupling(mlp(condition_channels=3), FIRST)
    model = dimflows.FlowModel(transformed(dfb.Chain([dfb.ActNorm(2), coupling, dfb.ActNorm(2)])))
    model.compile("adam")
    batch = {"x": pairs(8), "condition": np.zeros([8, 3], np.float32)}
    if case == "nan_condition":
        batch["condition"] = with_value(batch["condition"], np.nan, index=3)
    elif case == "wrong_condition":
        batch["condition"] = np.zeros([8, 5], np.float32)
    elif case == "nan_x":
        batch["x"] = with_value(batch["x"], np.nan, index=3)
    else:
        del batch["condition"]
    before = values(model.trainable_variables + model.optimizer.variables)
    with pytest.raises(ValueError, match="finite|condition"):
        getattr(model, method)(batch)
    assert_equal(values(model.trainable_variables + model.optimizer.variables), before)


def test_num_samples_of_an_exact_density_is_refused(checked_models):
    with pytest.raises(ValueError, match="exact"):
        checked_models["vectors"].log_prob(pairs(4), num_samples=3)


def test_data_of_any_float_type_and_nested_lists(checked_models):
    model, x = checked_models["vectors"], pairs(4)
    expected = model.log_prob(x).numpy()
    np.testing.assert_allclose(model.log_prob(x.astype(np.float64)), expected, rtol=1e-6)
    np.testing.assert_allclose(model.log_prob(x.tolist()), expected, rtol=1e-6)
    other = dimflows.FlowModel(keras_networks())
    other.adapt(x.astype(np.float64))
    other.compile("sgd")
    assert np.isfinite(other.fit(x.astype(np.float64), verbose=0).history["loss"][0])


# An image model.


@pytest.fixture(scope="module")
def image_model():
    """An LCMA model of integer images with a factorization from contributions, after a step along random gradients."""
    contributions = np.random.default_rng(0).normal(size=[1, 8, 8, 1])
    factorization = dfb.DimensionFactorization.from_contributions(contributions)
    model = dimflows.FlowModel(image_recipe(factorization=factorization), seed=1)
    model.adapt(blobs(64))
    model.compile(keras.optimizers.Adam(5e-3, global_clipnorm=10.0))
    generator = np.random.default_rng(1)
    gradients = [tf.constant(generator.normal(size=v.shape), v.dtype) for v in model.trainable_variables]
    model.optimizer.apply(gradients, model.trainable_variables)
    return model


def normalised_pixels():
    preprocess = dfb.Chain([dfb.LogitPreprocess(LEVELS), dfb.ActNorm(1)])
    return dfd.Dequantized(transformed(preprocess, [8, 8, 1]), LEVELS)


@pytest.mark.parametrize("make", [normalised_pixels, slow(image_recipe)])
def test_image_metrics(make):
    model = dimflows.FlowModel(make(), seed=0)
    model.compile(keras.optimizers.Adam(5e-3, global_clipnorm=10.0))
    history = model.fit(batches(blobs(128)), epochs=3, verbose=0).history
    assert history["bits_per_dim"][-1] < history["bits_per_dim"][0]
    np.testing.assert_allclose(np.array(history["nll"]) / (64 * np.log(2.0)), history["bits_per_dim"], rtol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, slow(True)], ids=["graph", "xla"])
def test_log_prob_is_the_same_in_every_mode(image_model, jit_compile):
    continuous = image_model.distribution.distribution
    x = tf.constant(blobs(5, seed=2), tf.float32) + 0.25
    compiled = tf.function(continuous.log_prob, jit_compile=jit_compile)
    np.testing.assert_allclose(compiled(x), continuous.log_prob(x), rtol=2e-6)


def test_log_prob_seeds(image_model):
    x = blobs(4)
    once = image_model.log_prob(x, seed=3)
    assert once.shape == [4] and once.dtype == tf.float32
    np.testing.assert_array_equal(once, image_model.log_prob(x, seed=3))
    assert np.abs(once - image_model.log_prob(x, seed=4)).max() > 0.0
    assert np.abs(image_model.log_prob(x) - image_model.log_prob(x)).max() > 0.0
    bound = image_model.log_prob(x, num_samples=16, seed=3)
    assert bound.shape == [4] and np.mean(bound) > np.mean([image_model.log_prob(x, seed=k) for k in range(20)])


@pytest.mark.slow
def test_log_prob_of_batches_of_any_shape(image_model):
    x = blobs(6)
    expected = image_model.log_prob(x, num_samples=64, seed=0).numpy()
    for batch in ([6], [2, 3], [1, 6], [3, 2, 1]):
        log_prob = image_model.log_prob(x.reshape([*batch, 8, 8, 1]), num_samples=64, seed=1)
        np.testing.assert_allclose(log_prob, expected.reshape(batch), rtol=0.05)  # other noise
    assert image_model.log_prob(x[0]).shape == []


def test_sampling(image_model):
    samples = image_model.sample(6, seed=0)
    assert samples.shape == [6, 8, 8, 1] and samples.dtype.is_integer
    assert samples.numpy().min() >= 0 and samples.numpy().max() < LEVELS
    np.testing.assert_array_equal(samples, image_model.sample(6, seed=0))
    assert np.abs(samples - image_model.sample(6, seed=1)).max() > 0
    assert image_model.sample(seed=0).shape == [8, 8, 1]


def test_another_number_of_samples_is_not_traced_again(image_model):
    for num in range(2, 7):
        assert image_model.sample(num, seed=0).shape == [num, 8, 8, 1]
    traced = image_model._compiled_sample.experimental_get_tracing_count()
    for sample_shape in (1, np.int64(9), tf.constant([7]), tf.constant(8, tf.int64)):
        image_model.sample(sample_shape, seed=0)
    assert image_model._compiled_sample.experimental_get_tracing_count() == traced
    samples = image_model.sample(6, seed=0)
    np.testing.assert_array_equal(image_model.sample((2, 3), seed=0), tf.reshape(samples, [2, 3, 8, 8, 1]))


def test_seeds_of_any_size():
    model = dimflows.FlowModel(keras_networks(), seed=np.int64(3))
    seeds = [0, 1, -1, 2**32 - 1, 2**32, 2**40, 3**80]
    samples = [float(model.sample(seed=seed)[0]) for seed in seeds]
    assert len(set(samples)) == len(seeds)
    assert samples[1] == float(model.sample(seed=np.uint8(1))[0]) == float(model.sample(seed=tf.constant(1))[0])
    np.testing.assert_array_equal(dimflows.FlowModel(keras_networks(), seed=3).sample(2), model.sample(2))


@pytest.mark.slow
def test_interpolation(image_model):
    start, end = blobs(3, seed=5), blobs(3, seed=6)
    walk = image_model.interpolate(start, end, num_steps=5).numpy()
    assert walk.shape == (5, 3, 8, 8, 1)
    assert walk.min() >= 0 and walk.max() < LEVELS
    np.testing.assert_array_equal(walk[0], start)
    np.testing.assert_array_equal(walk[-1], end)
    np.testing.assert_array_equal(image_model.interpolate(start[0], end[0], num_steps=5).numpy(), walk[:, 0])
    z = [image_model.distribution.encode(x) for x in (start, end)]
    middle = image_model.distribution.decode(0.5 * (z[0] + z[1]))
    assert np.abs(walk[2] - middle.numpy()).max() <= 1  # one level of rounding


def test_interpolation_of_continuous_events():
    model = dimflows.FlowModel(keras_networks())
    start, end = pairs(3, seed=1), pairs(3, seed=2)
    walk = model.interpolate(start, end, num_steps=4)
    np.testing.assert_allclose(walk[0], start, rtol=1e-5)
    np.testing.assert_allclose(walk[-1], end, rtol=1e-5)


def test_interpolation_errors(image_model):
    x = blobs(2)
    with pytest.raises(ValueError, match="num_steps=1"):
        image_model.interpolate(x, x, num_steps=1)
    with pytest.raises(ValueError, match="needs events of shape"):
        image_model.interpolate(x, x[:, :4])
    with pytest.raises(ValueError, match="needs numbers 0 to 16"):
        image_model.interpolate(with_value(x, 40), x)
    with pytest.raises(ValueError, match="shape"):
        image_model.interpolate(x, blobs(3))


# Saving.


def test_save_and_load(image_model, tmp_path):
    path = tmp_path / "model.keras"
    image_model.save(path)
    loaded = dimflows.load(path)
    assert_equal(values(loaded.variables), values(image_model.variables))
    assert_equal(values(loaded.optimizer.variables), values(image_model.optimizer.variables))
    flows = [m.bijector.bijectors[-1] for m in (loaded, image_model)]
    assert flows[0].factorization == flows[1].factorization
    assert loaded.name == image_model.name
    x = blobs(4)
    np.testing.assert_array_equal(loaded.log_prob(x, seed=0), image_model.log_prob(x, seed=0))
    np.testing.assert_array_equal(loaded.sample(2, seed=0), image_model.sample(2, seed=0))


@pytest.mark.slow
def test_training_goes_on_after_loading_as_if_never_saved(image_model, tmp_path):
    path = tmp_path / "model.keras"
    image_model.save(path)
    loaded = dimflows.load(path)
    histories = [m.fit(batches(blobs(64)), verbose=0).history for m in (image_model, loaded)]
    assert histories[0]["loss"] == pytest.approx(histories[1]["loss"], rel=1e-5)
    assert_close(values(loaded.variables), values(image_model.variables))
    assert_close(values(loaded.optimizer.variables), values(image_model.optimizer.variables))


def dropout_model(seed=0):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dropout(0.5), keras.layers.Dense(2)]
    model = dimflows.FlowModel(transformed(dfb.AffineCoupling(keras.Sequential(layers), FIRST)), seed=seed)
    model.compile(keras.optimizers.Adam(0.01))
    return model


@pytest.mark.slow
def test_dropout_goes_on_after_loading_as_if_never_saved(tmp_path):
    """The seeds of layers are part of the weights."""
    whole, resumed = dropout_model(), dropout_model()
    whole.fit(pairs(64), epochs=1, shuffle=False, verbose=0)
    whole.save_weights(tmp_path / "a.weights.h5")
    resumed.load_weights(tmp_path / "a.weights.h5")
    losses = [m.fit(pairs(64), epochs=1, shuffle=False, verbose=0).history["loss"] for m in (whole, resumed)]
    assert losses[0] == losses[1]
    assert_equal(values(resumed.variables), values(whole.variables))


def test_weights_without_seeds_of_layers_are_loaded(tmp_path):
    model, other = dropout_model(0), dropout_model(1)
    model.save_weights(tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5", "a") as file:
        seeds = [name for name in file["vars"] if name.startswith("seed_")]
        for name in seeds:
            del file["vars"][name]
    assert len(seeds) == 1
    other.load_weights(tmp_path / "a.weights.h5")
    assert_equal(values(other.trainable_variables), values(model.trainable_variables))


def test_the_bijector_of_a_model(image_model):
    assert image_model.bijector is image_model.distribution.distribution.bijector
    preprocess, flow = dfb.LogitPreprocess(LEVELS), keras_networks()
    model = dimflows.FlowModel(dfd.Dequantized(tfd.TransformedDistribution(flow, preprocess), LEVELS))
    x = tf.constant([[3.5, 8.25]])
    assert_close(model.bijector.inverse(x), flow.bijector.inverse(preprocess.inverse(x)))
    augmented = dimflows.recipes.vflow_glow([2], num_extra=2)
    with pytest.raises(ValueError, match="FlowModel: Augmented has no bijector from latent values to data"):
        _ = dimflows.FlowModel(augmented).bijector
    with pytest.raises(ValueError, match="FlowModel: Normal has no bijector"):
        _ = dimflows.FlowModel(tfd.Normal(tf.Variable(0.0), 1.0)).bijector


def test_a_distribution_that_no_recipe_made_is_not_saved(trained, tmp_path):
    path = tmp_path / "model.keras"
    with pytest.raises(ValueError, match="not made by a recipe.*save_weights"):
        trained[1].save(path)
    assert not path.exists()


def test_weights_of_another_factorization_are_refused_and_change_nothing(image_model, tmp_path):
    path = tmp_path / "model.weights.h5"
    image_model.save_weights(path)
    other = dimflows.FlowModel(image_recipe(factorization="checkerboard"))
    before = values(other.variables)
    with pytest.raises(ValueError, match="another dimension factorization"):
        other.load_weights(path)
    assert_equal(values(other.variables), before)


@pytest.mark.filterwarnings("ignore:Skipping nested container")
@pytest.mark.parametrize("options", [{"width": 6}, {"depth": 2}, {"num_levels": 1}])
def test_weights_of_another_architecture_are_refused(image_model, tmp_path, options):
    path = tmp_path / "model.weights.h5"
    image_model.save_weights(path)
    other = dimflows.FlowModel(image_recipe(**options))
    with pytest.raises(ValueError):
        other.load_weights(path)


def test_loading_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="nowhere.keras"):
        dimflows.load(tmp_path / "nowhere.keras")
    path = tmp_path / "sequential.keras"
    keras.Sequential([keras.layers.Input([1]), keras.layers.Dense(1)]).save(path)
    with pytest.raises(ValueError, match="Sequential, needs a saved FlowModel"):
        dimflows.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["keras_networks", "tfp_autoregressive"])
def test_export(kind, tmp_path):
    model = dimflows.FlowModel(KINDS[kind][0]())
    model.export(tmp_path / "exported")
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(exported.log_prob(pairs(8), [0, 0]), model.log_prob(pairs(8)), rtol=1e-5)


class Interrupt(keras.callbacks.Callback):
    """Ends training like a kill, at the beginning of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_backup_and_restore(tmp_path):
    def model():
        model = dimflows.FlowModel(keras_networks())
        model.compile(keras.optimizers.Adam(0.01))
        return model

    options = {"batch_size": 32, "epochs": 3, "shuffle": False, "verbose": 0}
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        model().fit(pairs(64), callbacks=[backup, Interrupt(epoch=2)], **options)
    resumed, whole = model(), model()
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    assert resumed.fit(pairs(64), callbacks=[backup], **options).epoch == [2]
    whole.fit(pairs(64), **options)
    assert_close(values(resumed.trainable_variables), values(whole.trainable_variables))


def test_a_backup_follows_the_worker_that_is_behind(tmp_path, monkeypatch):
    """By one epoch; more than that is an error that removes nothing."""
    model = dimflows.FlowModel(keras_networks(), seed=0)
    model.compile(keras.optimizers.Adam(0.01))
    backup, weights = dimflows.training.backup.Backup(tmp_path / "backup"), []
    record = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: weights.append(values(model.variables)))
    model.fit(pairs(64), epochs=3, callbacks=[backup, record], verbose=0)
    assert backup.epochs() == [2, 3]
    monkeypatch.setattr(dimflows.training.backup, "least_of_workers", lambda value: value - 2)
    with pytest.raises(ValueError, match="another worker has a backup of 1 epochs, .*backup one of 3"):
        backup.restore(model)
    assert backup.epochs() == [2, 3]
    monkeypatch.setattr(dimflows.training.backup, "least_of_workers", lambda value: value - 1)
    assert backup.restore(model) == 2 and backup.epochs() == [2]
    assert_equal(values(model.variables), weights[1])


# Precision.


@pytest.fixture(scope="module")
def trained_colour_model():
    """A float32 model of 32x32x3 images, trained for a few steps on patches of photographs, and such patches."""
    generator = np.random.default_rng(0)
    photos = load_sample_images().images
    corners = zip(generator.integers(2, size=96), generator.integers(390, size=96), generator.integers(600, size=96))
    patches = np.stack([photos[i][top : top + 32, left : left + 32] for i, top, left in corners])
    recipe = dimflows.recipes.realnvp([32, 32, 3], num_levels=2, depth=2, width=4, num_blocks=1, grey_levels=256)
    model = dimflows.FlowModel(recipe, seed=0)
    model.adapt(patches)
    model.compile(keras.optimizers.Adam(5e-3))
    model.fit(patches, batch_size=16, epochs=4, verbose=0)
    return model, patches


@pytest.mark.slow
def test_round_trips_of_a_trained_colour_model(trained_colour_model):
    model, patches = trained_colour_model
    preprocess, flow = model.bijector.bijectors
    logits = preprocess.inverse(tf.constant(patches, tf.float32) + 0.5)
    z = flow.inverse(logits)
    assert np.abs(flow.forward(tf.identity(z)) - logits).max() < 1e-4
    z = tf.random.stateless_normal([32, 32 * 32 * 3], seed=[0, 1])
    assert np.abs(flow.inverse(tf.identity(flow.forward(z))) - z).max() < 1e-4
    np.testing.assert_array_equal(model.distribution.decode(model.distribution.encode(patches)), patches)
    np.testing.assert_array_equal(model.interpolate(patches[:4], patches[4:8], num_steps=2)[1], patches[4:8])


@pytest.fixture
def bfloat16_policy():
    policy = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    yield
    keras.mixed_precision.set_global_policy(policy)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["realnvp", "glow"])
def test_mixed_precision(bfloat16_policy, recipe):
    options = {"num_blocks": 1, "depth": 1} if recipe == "realnvp" else {"depth": 1}
    distribution = dimflows.recipes.get(recipe)([4, 4, 2], width=4, grey_levels=256, **options)
    networks = keras_bridge.collect(distribution).layers
    assert networks and all(network.compute_dtype == "bfloat16" for network in networks)
    model = dimflows.FlowModel(distribution, seed=0)
    x = blobs(32, (4, 4, 2), grey_levels=256)
    model.adapt(x)
    model.compile(keras.optimizers.Adam(1e-3))
    history = model.fit(x, batch_size=16, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    log_prob = model.log_prob(x)
    assert log_prob.dtype == tf.float32 and np.isfinite(log_prob).all()
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    np.testing.assert_array_equal(model.distribution.decode(model.distribution.encode(x)), x)


@pytest.mark.slow
def test_batch_normalisation_runs_in_training_mode_under_fit():
    model = dimflows.FlowModel(image_recipe(num_levels=1, batch_norm=True), seed=0)
    model.compile(keras.optimizers.Adam(1e-3))
    moving = [v for v in model.non_trainable_variables if "moving" in v.name]
    before = values(moving)
    model.evaluate(blobs(32), verbose=0)
    model.log_prob(blobs(32))
    assert_equal(values(moving), before)
    model.fit(blobs(32), verbose=0)
    assert all(np.abs(a - b).max() > 0.0 for a, b in zip(values(moving), before))


# Without Keras `fit`.


def test_gradient_tape():
    distribution = keras_networks()
    with tf.GradientTape() as tape:
        loss = -tf.reduce_mean(distribution.log_prob(pairs(16)))
    gradients = tape.gradient(loss, distribution.trainable_variables)
    assert len(gradients) == KINDS["keras_networks"][1]
    assert all(g is not None for g in gradients)


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_training_loop_of_ones_own(jit_compile):
    model, x = dimflows.FlowModel(keras_networks(), seed=0), tf.constant(pairs(64))
    optimizer = keras.optimizers.Adam(0.02)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=jit_compile)
    def step(x):
        with tf.GradientTape() as tape:
            loss = -tf.reduce_mean(model.log_prob(x))
        optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables))
        return loss

    before = mean_nll(model, pairs(64))
    losses = [float(step(x)) for _ in range(5)]
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert losses[-1] < losses[0]


def test_a_model_within_a_function(conditional):
    x, condition = tf.constant([[0.5, 1.0], [2.0, 3.0]]), tf.constant([[1.0], [-1.0]])

    def use(num, x, condition):
        z = conditional.encode(x, condition=condition)
        samples = conditional.sample(num, seed=1, condition=condition)
        return conditional.log_prob(x, condition=condition), z, conditional.decode(z, condition=condition), samples

    for in_function, eager in zip(tf.function(use)(tf.constant(3), x, condition), use(3, x, condition)):
        np.testing.assert_allclose(in_function, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_tfp_minimize():
    distribution = keras_networks()
    before, x = values(distribution.trainable_variables), tf.constant(pairs(64))
    losses = tfp.math.minimize(
        lambda: -tf.reduce_mean(distribution.log_prob(x)),
        num_steps=30,
        optimizer=tf_keras.optimizers.Adam(0.02),
        trainable_variables=distribution.trainable_variables,
    )
    assert losses[-1] < losses[0] - 0.5
    after = values(distribution.trainable_variables)
    assert all(np.abs(a - b).max() > 0.0 for a, b in zip(after, before))


# Several devices.

_TWO_DEVICES = """
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    import keras
    import numpy as np
    import tensorflow_probability as tfp
    import tfp_dimflows as dimflows

    dfb, tfb, tfd = dimflows.bijectors, tfp.bijectors, tfp.distributions

    def train(strategy):
        with strategy.scope():
            dense = keras.layers.Dense(
                2, kernel_regularizer=keras.regularizers.L2(0.5), kernel_initializer=keras.initializers.Constant(0.3)
            )
            dense.build([None, 1])
            network = tfb.AutoregressiveNetwork(2, [2], hidden_units=[4], kernel_initializer="ones")
            parts = [dfb.AffineCoupling(dense, dfb.masks.Channel(event_ndims=1)), dfb.ActNorm(2)]
            parts += [tfb.Shift(tf.Variable([0.0, 0.0])), tfb.MaskedAutoregressiveFlow(network)]
            base = tfd.Sample(tfd.Normal(0.0, 1.0), [2])
            model = dimflows.FlowModel(tfd.TransformedDistribution(base, tfb.Chain(parts)))
            model.compile(keras.optimizers.SGD(0.01))
        x = np.random.default_rng(0).normal(0.2, 0.5, size=[32, 2]).astype(np.float32)
        loss = model.fit(x, batch_size=16, shuffle=False, verbose=0).history["loss"][0]
        return [loss, *(v.numpy() for v in model.trainable_variables)]

    two, one = train(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])), train(tf.distribute.get_strategy())
    assert len(one) == 1 + 3 + 2 + 1 + 4
    for a, b in zip(two, one):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_two_devices_train_like_one():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", textwrap.dedent(_TWO_DEVICES)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


def test_backups_are_in_the_order_of_their_epochs(tmp_path):
    backup = dimflows.training.backup.Backup(tmp_path / "backup")
    backup.set_model(keras.Sequential([keras.Input([1]), keras.layers.Dense(1)]))
    for epoch in range(11):
        backup.on_epoch_end(epoch)
    assert backup.epochs() == [10, 11]
