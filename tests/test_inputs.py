"""What `FlowModel` takes, data of every dtype and container and conditions of every shape, and what it refuses."""

import json
import warnings

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import slow

import tfp_dimflows as dimflows

dfb, dfd = dimflows.bijectors, dimflows.distributions
tfb, tfd = tfp.bijectors, tfp.distributions

X = np.random.default_rng(0).normal(size=(256, 4))
C = np.random.default_rng(1).normal(size=(256, 3)).astype(np.float32)


def new(seed=0, optimizer="adam", **options):
    model = dimflows.FlowModel(dimflows.recipes.maf([4], depth=1, hidden=[8], **options), seed=seed)
    model.compile(optimizer)
    return model


def fitted(model, *args, **options):
    model.fit(*args, epochs=1, verbose=0, **options)
    return model


class Batches(keras.utils.PyDataset):
    """A PyDataset of batches of 32."""

    def __init__(self, x):
        super().__init__()
        self._x = x

    def __len__(self):
        return len(self._x) // 32

    def __getitem__(self, k):
        return (self._x[32 * k : 32 * (k + 1)],)


def as_dataset(x):
    return tf.data.Dataset.from_tensor_slices(x).batch(32)


CONTAINERS = {
    "array": lambda x: x,
    "tensor": tf.constant,
    "frame": pd.DataFrame,
    "tuple": lambda x: (x,),
    "dataset": as_dataset,
    "py_dataset": Batches,
    "generator": lambda x: ((x[k : k + 32],) for k in range(0, len(x), 32)),
}


@pytest.fixture(scope="module")
def model():
    return new()


@pytest.fixture(scope="module")
def conditional():
    model = new(condition_shape=[3])
    model.fit({"x": X, "condition": C}, epochs=1, verbose=0)
    return model


# Data.


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_and_dtype_trains(container, model):
    before, steps = [w.copy() for w in model.get_weights()], int(model.optimizer.iterations)
    options = {} if container in ("dataset", "py_dataset", "generator") else {"batch_size": 32}
    history = model.fit(CONTAINERS[container](X), epochs=1, verbose=0, validation_data=as_dataset(X[:64]), **options)
    assert np.isfinite(history.history["loss"]).all() and np.isfinite(history.history["val_loss"]).all()
    assert model.optimizer.iterations - steps in (8, 9)  # of a generator Keras counts one more
    assert any((w != b).any() for w, b in zip(model.get_weights(), before))


def test_a_generator_trains_from_its_first_batch():
    sizes = []
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: sizes.append(batch))
    new().fit(CONTAINERS["generator"](X), epochs=1, verbose=0, callbacks=[callback])
    assert len(sizes) == 8


@pytest.mark.parametrize("dtype", ["float16", "float64", "int64", "uint8"])
def test_every_dtype_is_cast(model, dtype):
    x = np.abs(3 * X).astype(dtype)
    expected = model.log_prob(x.astype(np.float32))
    for given in (x, tf.constant(x), x.tolist()):
        np.testing.assert_allclose(model.log_prob(given), expected, rtol=1e-5)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5)
    np.testing.assert_allclose(model.predict(as_dataset(x), verbose=0), expected, rtol=1e-4)
    assert model.evaluate(as_dataset(x), verbose=0, return_dict=True)["nll"] == pytest.approx(-np.mean(expected), rel=1e-4)
    np.testing.assert_allclose(model.encode(x), model.encode(x.astype(np.float32)), rtol=1e-5)
    np.testing.assert_allclose(model.interpolate(x[:2].tolist(), x[2:4])[0], x[:2], atol=1e-2)


@pytest.mark.slow
def test_a_float64_model_takes_float32(monkeypatch):
    with pytest.MonkeyPatch.context():
        keras.config.set_floatx("float64")
        try:
            model = new()
        finally:
            keras.config.set_floatx("float32")
    assert model.log_prob(X.astype(np.float32)).dtype == tf.float64
    np.testing.assert_array_equal(model.log_prob(X.tolist()), model.log_prob(X))
    fitted(model, as_dataset(X.astype(np.float32)))
    fitted(model, as_dataset(X.astype(int)))


def test_dicts_are_cast(conditional):
    data = as_dataset({"x": X, "condition": C.astype(np.float64)})
    fitted(conditional, data)
    expected = conditional.log_prob({"x": X, "condition": C})
    np.testing.assert_allclose(conditional.predict(data, verbose=0), expected, rtol=1e-4, atol=1e-5)


def bad(kind):
    if kind == "nan":
        return np.where(np.arange(4) == 1, np.nan, X)
    return X[:, :3]


@pytest.mark.parametrize("kind", ["nan", "width"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_bad_data_changes_nothing(container, kind, model):
    before = model.get_weights()
    message = (
        "FlowModel: .*not finite" if kind == "nan" else r"FlowModel: got data of shape \(\d+, 3\), .* events of shape \(4,\)"
    )
    with pytest.raises(ValueError, match=message):
        fitted(model, CONTAINERS[container](bad(kind)))
    with pytest.raises(ValueError, match=message):
        fitted(model, X, validation_data=CONTAINERS[container](bad(kind)))
    for weight, value in zip(model.get_weights(), before):
        np.testing.assert_array_equal(weight, value)


def test_a_wrong_width_of_a_later_batch_gets_our_message(model):
    with pytest.raises(
        (ValueError, tf.errors.InvalidArgumentError), match=r"\[2,3\] is not compatible with expected shape \[\?,4\]"
    ):
        fitted(model, ((x,) for x in (X[:2], X[:2, :3])))


@pytest.mark.parametrize(
    "mode",
    [{}, slow({"run_eagerly": True}), slow({"jit_compile": True})],
    ids=["graph", "eager", "xla"],
)
def test_weights_survive_a_later_batch_that_is_not_finite(mode):
    late = np.concatenate([X[:96], np.full([32, 4], np.nan), X[96:160]])
    model = new()
    model.compile("adam", **mode)
    history = model.fit(as_dataset(late), epochs=1, verbose=0)
    assert np.isnan(history.history["loss"][0])
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert np.isfinite(model.fit(as_dataset(X), epochs=1, verbose=0).history["loss"][0])
    model.fit(as_dataset(late), epochs=2, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()])
    assert model.optimizer.iterations == 6 + 8 + 4


def test_a_batch_that_is_not_finite_moves_nothing():
    model = new(optimizer=keras.optimizers.SGD(0.1))
    data = tf.data.Dataset.from_tensors(X[:32])
    reference = fitted(new(optimizer=keras.optimizers.SGD(0.1)), data)
    fitted(model, data.concatenate(tf.data.Dataset.from_tensors(np.full([32, 4], np.inf))))
    for weight, value in zip(model.trainable_variables, reference.trainable_variables):
        np.testing.assert_array_equal(weight, value)


def test_statistics_survive_a_batch_that_is_not_finite():
    network = keras.Sequential([keras.Input([1]), keras.layers.BatchNormalization(), keras.layers.Dense(2)])
    flow = dfb.AffineCoupling(network, dfb.masks.Channel(event_ndims=1))
    model = dimflows.FlowModel(tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [2]), flow))
    model.compile("sgd")
    x = X[:64, :2]
    fitted(model, as_dataset(np.concatenate([x[:32], np.full([32, 2], np.nan)])))
    mean = network.layers[0].moving_mean.numpy()
    np.testing.assert_allclose(mean, 0.01 * x[:32, :1].mean(axis=0), rtol=1e-4)
    assert np.isfinite(model.evaluate(x, verbose=0, return_dict=True)["nll"])


def test_unbatched_data_is_refused(model):
    for data in (tf.data.Dataset.from_tensor_slices(X), X[0], ((x,) for x in X)):
        with pytest.raises(ValueError, match=r"got one event of shape \(4,\), needs batches .*batch"):
            fitted(model, data)


@pytest.mark.parametrize(
    "given", [{"metrics": [keras.metrics.MeanSquaredError()]}, {"weighted_metrics": ["mse"]}, {"loss_weights": [1.0]}], ids=str
)
def test_metrics_are_refused_at_compile(given):
    with pytest.raises(ValueError, match=f"FlowModel.compile: got {next(iter(given))}; .* nll"):
        new().compile("adam", **given)


def test_other_dicts_are_refused(model):
    data = tf.data.Dataset.from_tensors({"image": X, "label": np.zeros(256)})
    with pytest.raises(ValueError, match=r"keys \['image', 'label'\], needs events, or a dict of 'x' and 'condition'"):
        fitted(model, data)


def test_text_is_refused(model):
    with pytest.raises(ValueError, match="needs numbers"):
        model.log_prob([["a", "b", "c", "d"]])


# Precision and scale.


def test_the_loss_of_half_precision_networks_is_scaled():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = new()
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        model.compile("adam", auto_scale_loss=False)
        assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()))
        assert isinstance(model.optimizer.inner_optimizer, keras.optimizers.Adam)
        fitted(model, X.astype(np.float32))
    finally:
        keras.config.set_dtype_policy("float32")
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert not isinstance(new().optimizer, keras.optimizers.LossScaleOptimizer)


SMALL = {"maf": {"hidden": [8]}, "iaf": {"hidden": [8]}, "ffjord": {"hidden": [8], "num_steps": 2}}
SMALL |= {name: {"width": 8, "depth": 1} for name in ("iresnet", "residual-flow")}
SLOWER = ["realnvp", "iaf", "glow", "ffjord", "wavenet-flow", "iresnet", "residual-flow", "lcma-realnvp", "vflow-glow"]


@pytest.mark.parametrize("name", ["maf", "nice", *(slow(name) for name in SLOWER)])
def test_columns_of_any_scale_start_like_standardised_ones(name):
    scales = np.float32([1e-8, 1e-3, 1.0, 1e9])
    z = np.random.default_rng(0).normal(size=(512, 4)).astype(np.float32)
    log_probs = []
    for x in (z, z * scales):
        model = dimflows.FlowModel(dimflows.recipes.get(name)([4], **SMALL.get(name, {"width": 8})), seed=0)
        model.adapt(x)
        log_probs.append(np.mean(model.log_prob(x, seed=1)))
    assert log_probs[1] == pytest.approx(log_probs[0] - np.sum(np.log(scales)), abs=0.1)


def test_adapt_says_when_nothing_adapts():
    shift = tfb.Shift(tf.Variable([0.0, 0.0, 0.0, 0.0]))
    model = dimflows.FlowModel(tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [4]), shift))
    with pytest.warns(UserWarning, match="nothing in .* was initialised") as warned:
        model.adapt(X)
    assert len(warned) == 1 and not np.any(shift.shift)


def test_adapt_warns_of_a_trained_model(tmp_path):
    model = new()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.adapt(X)
        model.adapt(X + 1.0)
    fitted(model, X)
    model.save(tmp_path / "model.keras")
    for trained in (model, dimflows.load(tmp_path / "model.keras")):
        with pytest.warns(UserWarning, match="trained before") as warned:
            trained.adapt(X)
        assert sum("trained before" in str(warning.message) for warning in warned) == 1


@pytest.mark.slow
def test_fit_warns_once_of_data_far_from_unit_scale():
    with pytest.warns(UserWarning, match="far from unit scale.*adapt") as warned:
        model = fitted(new(), 1000.0 * X)
    assert sum("far from unit scale" in str(warning.message) for warning in warned) == 1
    adapted = new()
    adapted.adapt(1000.0 * X)
    scaled = dfb.Chain([tfb.Scale(1000.0), dfb.ActNorm(4)])
    of_scale = dimflows.FlowModel(tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [4]), scaled))
    of_scale.compile()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(model, 1000.0 * X)
        fitted(adapted, 1000.0 * X)
        fitted(of_scale, 1000.0 * X)
        fitted(new(), X)


# What a saved model remembers.


def test_frozen_layers_and_the_optimizer_are_kept(tmp_path):
    model = new()
    model.layers[0].trainable = False
    model.compile("adam")
    fitted(model, X)
    model.save(tmp_path / "model.keras")
    loaded = dimflows.load(tmp_path / "model.keras")
    assert not loaded.layers[0].trainable
    assert len(loaded.trainable_variables) == len(model.trainable_variables) < len(new().trainable_variables)
    for ours, theirs in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    frozen = [v.numpy() for v in loaded.layers[0].variables]
    fitted(loaded, X)
    for variable, value in zip(loaded.layers[0].variables, frozen):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.parametrize(("floatx", "policy"), [("float64", "float64"), ("float32", "mixed_bfloat16")])
def test_a_model_is_loaded_in_its_own_precision(tmp_path, floatx, policy):
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)
    try:
        model = new()
        model.save(tmp_path / "model.keras")
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
    loaded = dimflows.load(tmp_path / "model.keras")
    assert keras.config.floatx() == "float32" and keras.config.dtype_policy().name == "float32"
    assert [layer.dtype_policy.name for layer in loaded.layers] == [policy]
    np.testing.assert_array_equal(loaded.log_prob(X), model.log_prob(X))
    assert loaded.log_prob(X).dtype == floatx


def test_the_shape_of_a_condition_is_kept(tmp_path):
    model = dimflows.FlowModel(dimflows.recipes.maf([4], depth=1, hidden=[8], condition_shape=[3]), condition_shape=[None])
    model.save(tmp_path / "model.keras")
    assert dimflows.load(tmp_path / "model.keras").get_config()["condition_shape"] == [None]


# Conditions.


def test_a_condition_is_given_by_keyword_or_in_a_dict(conditional):
    expected = conditional.log_prob({"x": X, "condition": C})
    for condition in (C, tf.constant(C), C.astype(np.float64), C.tolist()):
        np.testing.assert_allclose(conditional.log_prob(X, condition=condition), expected, rtol=1e-5)
    z = conditional.encode(X, condition=C)
    np.testing.assert_array_equal(z, conditional.encode({"x": X, "condition": C}))
    np.testing.assert_allclose(conditional.decode(z, condition=C), X, atol=1e-4)
    assert np.abs(z - conditional.encode(X, condition=C + 1.0)).max() > 1e-3
    path = conditional.interpolate(X[:2], X[2:4], num_steps=3, condition=C[:2])
    np.testing.assert_allclose(path[0], X[:2], atol=1e-4)
    np.testing.assert_allclose(path[2], X[2:4], atol=1e-4)


def test_a_list_is_a_condition_of_a_bijector():
    shift = dfb.ConditionalTransform(lambda c: c, dfb.transformers.Additive(), event_ndims=1)
    np.testing.assert_allclose(shift.inverse([[1.0, 1.0]], condition=[[2.0, 3.0]]), [[3.0, 4.0]])
    np.testing.assert_allclose(shift.inverse([[1.0, 1.0]], condition=np.float64([[2.0, 3.0]])), [[3.0, 4.0]])


def test_batch_axes_broadcast_from_the_right(conditional):
    def log_prob(x, c):
        return conditional.log_prob(x.astype(np.float32), condition=c).numpy()

    rows = log_prob(np.tile(X[0], [256, 1]), C)
    np.testing.assert_allclose(log_prob(X[0], C), rows, rtol=1e-5)
    np.testing.assert_allclose(log_prob(X, C[0]), log_prob(X, np.tile(C[0], [256, 1])), rtol=1e-5)
    grid = log_prob(X[:5, np.newaxis], C[np.newaxis, :7])
    assert grid.shape == (5, 7)
    np.testing.assert_allclose(grid[0], rows[:7], rtol=1e-5)
    np.testing.assert_allclose(log_prob(X[:5, np.newaxis], C[:7]), grid, rtol=1e-5)
    assert log_prob(X[0], C[0]).shape == ()
    z = conditional.encode(X[0], condition=C)
    np.testing.assert_allclose(conditional.decode(z, condition=C), np.tile(X[0], [256, 1]), atol=1e-4)
    np.testing.assert_allclose(conditional.decode(z[0], condition=C)[0], X[0], atol=1e-4)


@pytest.mark.parametrize(
    ("sample_shape", "of", "shape"),
    [((), 256, [256]), (5, None, [5]), ([10], 7, [10, 7]), ([2, 3], 1, [2, 3, 1]), ((), None, [])],
)
def test_samples_have_the_shape_of_the_samples_and_the_conditions(conditional, sample_shape, of, shape):
    samples = conditional.sample(sample_shape, condition=C[0] if of is None else C[:of], seed=0)
    assert samples.shape == [*shape, 4]


def test_samples_in_a_function_have_a_static_shape(conditional):
    shapes = []

    @tf.function
    def sample(c, n):
        shapes.append(conditional.sample([2, 3], condition=c).shape)
        samples = conditional.sample(n, condition=c)
        shapes.append(samples.shape)
        return samples

    assert sample(tf.constant(C[:5]), tf.constant(4)).shape == [4, 5, 4]
    assert shapes[0] == [2, 3, 5, 4] and shapes[1][-1] == 4


def test_samples_of_each_condition_follow_it():
    network = keras.layers.Dense(4, kernel_initializer="ones")
    shift = dfb.ConditionalTransform(network, dfb.transformers.Additive(), event_ndims=1)
    base = tfd.Sample(tfd.Normal(0.0, 1.0), [4])
    model = dimflows.FlowModel(tfd.TransformedDistribution(base, shift), condition_shape=[2])
    c = np.array([[0.0, 0.0], [2.0, 3.0], [-4.0, -3.0]], np.float32)
    expected = shift.forward(tf.zeros([3, 4]), condition=c)
    np.testing.assert_allclose(tf.reduce_mean(model.sample(1000, condition=c, seed=0), axis=0), expected, atol=0.2)


def test_the_rank_of_a_condition_does_not_depend_on_calls_before():
    model = new(condition_shape=[3])
    assert model.sample(5, condition=C[:1]).shape == [5, 1, 4]
    assert model.sample(5, condition=C[0]).shape == [5, 4]
    assert model.sample((), condition=C[:2]).shape == [2, 4]


def test_wrong_conditions_are_refused(conditional):
    with pytest.raises(ValueError, match=r"condition of shape \(256, 2\), needs conditions of shape \[3\]"):
        conditional.log_prob(X, condition=C[:, :2])
    with pytest.raises(ValueError, match=r"condition of shape \(2,\), needs"):
        conditional.sample(3, condition=C[0, :2])
    with pytest.raises(ValueError, match=r"events of shape \(256, 4\) and a condition of shape \(7, 3\), needs .* broadcast"):
        conditional.log_prob(X, condition=C[:7])
    with pytest.raises(ValueError, match="not finite"):
        conditional.sample(3, condition=[0.0, 1.0, float("nan")])
    for lacking in (conditional.log_prob, conditional.encode, conditional.adapt, conditional.decode, conditional.fit):
        with pytest.raises(ValueError, match=r"needs conditions of shape \[3\], by `condition=`"):
            lacking(X)
    with pytest.raises(ValueError, match=r"needs conditions of shape \[3\]"):
        conditional.sample(3)
    plain = new()
    for refused in (
        lambda: plain.log_prob(X, condition=C),
        lambda: plain.sample(2, condition=C),
        lambda: plain.encode(X, condition=C),
        lambda: plain.decode(X, condition=C),
    ):
        with pytest.raises(ValueError, match="got a condition, but no part of .* can use one"):
            refused()
    # The details of a progressive flow have a condition, the flow has none.
    progressive = dimflows.recipes.pnf([4], num_halvings=1, num_levels=1, depth=1, width=4, num_blocks=1)
    with pytest.raises(ValueError, match="got a condition, but no part of .* can use one"):
        dimflows.FlowModel(progressive).log_prob(X, condition=C)


def test_labels_are_conditions():
    embedding = keras.Sequential([keras.layers.Embedding(10, 3)])
    flow = dfb.EmbedCondition(dimflows.recipes.maf([4], depth=1, hidden=[8], condition_shape=[3]).bijector, embedding, 0)
    base = tfd.Sample(tfd.Normal(0.0, 1.0), [4])
    model = dimflows.FlowModel(tfd.TransformedDistribution(base, flow), condition_shape=[])
    labels = np.arange(256) % 10
    model.compile("adam")
    fitted(model, {"x": X, "condition": labels})
    assert model.log_prob(X, condition=labels).shape == [256]
    assert model.log_prob(X, condition=3).shape == [256]
    assert model.sample(5, condition=labels[:10]).shape == [5, 10, 4]


def summarised(**options):
    summary = keras.Sequential(
        [keras.layers.Dense(8, activation="relu"), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(3)]
    )
    flow = dimflows.recipes.maf([4], depth=1, hidden=[8], condition_shape=[3]).bijector
    flow = dfb.EmbedCondition(flow, summary, condition_ndims=2)
    return dimflows.FlowModel(tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [4]), flow), **options)


@pytest.mark.slow
def test_an_unbuilt_summary_network_is_built():
    model = summarised(condition_shape=[10, 2])
    model.compile("adam")
    observations = np.random.default_rng(0).normal(size=(256, 10, 2))
    fitted(model, {"x": X, "condition": observations})
    assert model.sample(3, condition=observations[:5]).shape == [3, 5, 4]
    assert len(model.trainable_variables) == 4 + len(new(condition_shape=[3]).trainable_variables)
    with pytest.raises(ValueError, match="unbuilt networks and a condition.*condition_shape"):
        summarised()


def test_a_condition_reaches_inner_distributions(conditional):
    outer = tfd.TransformedDistribution(conditional.distribution, tfb.Scale(2.0))
    model = dimflows.FlowModel(outer)
    expected = conditional.log_prob(X, condition=C) - 4 * np.log(2.0)
    np.testing.assert_allclose(model.log_prob(2.0 * X, condition=C), expected, rtol=1e-4)
    np.testing.assert_allclose(
        model.sample(3, condition=C, seed=1), 2.0 * conditional.sample(3, condition=C, seed=1), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(model.encode(2.0 * X, condition=C), conditional.encode(X, condition=C), atol=1e-4)


@pytest.mark.slow
def test_export_of_a_conditional_model(conditional, tmp_path):
    conditional.export(tmp_path / "exported")
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    x = tf.constant(X, tf.float32)
    np.testing.assert_allclose(exported.log_prob(x, [0, 0], C), conditional.log_prob(X, condition=C), rtol=1e-4)
    np.testing.assert_allclose(exported.decode(exported.encode(x, C), C), X, atol=1e-4)
    shape = dfb.ConditionalTransform(lambda c: c, dfb.transformers.Affine("exp"), event_ndims=1)
    flow = dfb.Chain([dfb.ActNorm(4), shape])
    model = dimflows.FlowModel(tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [4]), flow))
    with pytest.raises(ValueError, match="pass its condition_shape"):
        model.export(tmp_path / "another")


# Scores.


def test_scores_are_log_probabilities(model):
    data = tf.data.Dataset.from_tensor_slices((X, np.arange(256))).batch(100)
    expected = model.log_prob(X)
    for scores in (model.score(X), model.score(data), model.score(as_dataset(X))):
        np.testing.assert_allclose(scores["log_prob"], expected, rtol=1e-5)
    np.testing.assert_array_equal(model.score(data)["y"], np.arange(256))
    assert set(model.score(X)) == {"log_prob"}


def test_scores_of_one_condition(conditional):
    expected = conditional.log_prob(X, condition=C[0])
    np.testing.assert_allclose(conditional.score({"x": X, "condition": C[0]})["log_prob"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="got one event"):
        conditional.score({"x": X[0], "condition": C[0]})


def test_scores_of_images_are_the_same_each_time():
    flow = dimflows.recipes.realnvp([4, 4, 1], num_levels=1, depth=1, width=4, num_blocks=1, grey_levels=4)
    model = dimflows.FlowModel(flow)
    images = np.random.default_rng(0).integers(0, 4, [10, 4, 4, 1])
    scores = model.score(images, seed=3)
    np.testing.assert_array_equal(scores["log_prob"], model.score(images, seed=3)["log_prob"])
    np.testing.assert_allclose(scores["bits_per_dim"], -scores["log_prob"] / (16 * np.log(2.0)), rtol=1e-6)
    assert np.abs(scores["log_prob"] - model.score(images, seed=4)["log_prob"]).max() > 0.0
    assert len(json.dumps(scores["log_prob"].tolist())) > 10
    with pytest.raises(ValueError, match="empty"):
        model.score(tf.data.Dataset.from_tensors(images).take(0))
