"""`fit_progressively`: training stage by stage, against training all stages together and against exact optima."""

import gc
import pathlib
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import slow

import tfp_dimflows as dimflows
from tfp_dimflows import keras_bridge

dfb, dfd = dimflows.bijectors, dimflows.distributions
tfb, tfd = tfp.bijectors, tfp.distributions

DIMS, LEVELS, STAGES = 8, 16, 3
VALUE_SIZES = [2, 2, 4]  # of what each stage models: h_0, Delta_1, Delta_2


# Models.


def triangular(size):
    return tfb.ScaleMatvecTriL(tfp.util.TransformedVariable(tf.eye(size), tfb.FillScaleTriL()))


def gaussian_flow():
    """All Gaussian densities: a Gaussian base, and details that are linear-Gaussian given the image below."""

    def detail(size):
        mean = dimflows.networks.MLP(size, size, hidden=())
        return dfb.Chain([dfb.ConditionalTransform(mean, dfb.transformers.Additive(), event_ndims=1), triangular(size)])

    base = tfb.Chain([tfb.Shift(tf.Variable(tf.zeros([2]))), triangular(2)])
    return dfb.PNF(base, [detail(2), detail(4)], [DIMS])


def small_flow(condition_size=0, regularizer=None):
    """Three stages of one conditional transform and one ActNorm; the base has an ActNorm only, if it has no condition."""

    def stage(k, inputs):
        network = keras.layers.Dense(
            2 * VALUE_SIZES[k],
            activation="tanh",
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.3, seed=k),
            kernel_regularizer=regularizer,
        )
        network.build([None, inputs])
        conditional = dfb.ConditionalTransform(network, dfb.transformers.Affine("exp"), event_ndims=1)
        return dfb.Chain([conditional, dfb.ActNorm(VALUE_SIZES[k])])

    base = stage(0, condition_size) if condition_size else dfb.ActNorm(2)
    return dfb.PNF(base, [stage(k, VALUE_SIZES[k] + condition_size) for k in (1, 2)], [DIMS])


def plain_flow():
    """Three stages of ActNorms."""
    return dfb.PNF(dfb.ActNorm(2), [dfb.ActNorm(2), dfb.ActNorm(4)], [DIMS])


def plain_flow_of(split):
    """Two stages of ActNorms, three dimensions and the others."""
    return dfb.PNF(dfb.ActNorm(3), [dfb.ActNorm(DIMS - 3)], [DIMS], splits=[split])


def tiny_flow():
    return dfb.PNF(dfb.ActNorm(4), [dfb.ActNorm(4)], [DIMS])


def normal(dims=DIMS):
    return tfd.Sample(tfd.Normal(0.0, 1.0), [dims])


def model_of(flow, grey_levels=None, noise=None):
    distribution = tfd.TransformedDistribution(normal() if noise is None else noise, flow, name="Flow")
    if grey_levels is not None:
        distribution = dfd.Dequantized(distribution, grey_levels=grey_levels)
    return dimflows.FlowModel(distribution, seed=0)


def integer_model(flow, chain=dfb.Chain):
    return model_of(chain([dfb.LogitPreprocess(LEVELS), flow]), LEVELS)


# Data.


def signals(num=64, seed=0):
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(1).normal(size=[DIMS, DIMS])
    return (generator.normal(size=[num, DIMS]) @ mixing + 0.5).astype(np.float32)


def integers(num=64, seed=0):
    return np.random.default_rng(seed).integers(0, LEVELS, size=[num, DIMS]).astype(np.uint8)


def conditions(num=64):
    return np.random.default_rng(2).normal(size=[num, 3]).astype(np.float32)


def batches(data, size=32):
    return tf.data.Dataset.from_tensor_slices(data).batch(size)


def sgd():
    return keras.optimizers.SGD(0.01)


def standing():
    """An optimizer that changes nothing, so that metrics of several epochs have the same weights."""
    return keras.optimizers.SGD(0.0)


def fit_jointly(model, data, optimizer, epochs=1):
    model.compile(optimizer)
    return model.fit(data, epochs=epochs, verbose=0)


def fit(model, data, epochs=1, **options):
    return dimflows.fit_progressively(model, data, epochs, **({"optimizer": sgd(), "verbose": 0} | options))


def values(variables):
    return [np.array(tf.convert_to_tensor(v)) for v in variables]


def flow_of(model):
    distribution = model.distribution
    if isinstance(distribution, dfd.Dequantized):
        distribution = distribution.distribution
    bijector = distribution.bijector
    return bijector if isinstance(bijector, dfb.PNF) else bijector.bijectors[-1]


def stage_values(model):
    """The values of every stage's variables."""
    return [values(keras_bridge.variables_of(stage)) for stage in flow_of(model).stages]


def assert_equal(actual, expected):
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected):
        np.testing.assert_array_equal(a, b)


def assert_close(actual, expected, tolerance=1e-5):
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


class Watch(keras.callbacks.Callback):
    """Calls functions of its model when training begins and ends."""

    def __init__(self, begin=lambda model: None, end=lambda model: None):
        super().__init__()
        self.begin, self.end = begin, end

    def on_train_begin(self, logs=None):
        self.begin(self.model)

    def on_train_end(self, logs=None):
        self.end(self.model)


class Crash(keras.callbacks.Callback):
    """Ends training like a kill, at the beginning of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


def crash_in(stage, epoch):
    return lambda k: [Crash(epoch)] if k == stage else []


# The same optimum.


def gaussian_nll(x):
    """Mean negative log-density of a sample under the Gaussian of its own mean and covariance."""
    covariance = np.atleast_2d(np.cov(x.T, bias=True))
    return 0.5 * (x.shape[1] * (np.log(2.0 * np.pi) + 1.0) + np.linalg.slogdet(covariance)[1])


def halvings(x):
    """h_0, Delta_1 and Delta_2 of signals, and what each is conditioned on."""
    x = x.astype(np.float64)
    h_1, delta_2 = 0.5 * (x[:, ::2] + x[:, 1::2]), 0.5 * (x[:, ::2] - x[:, 1::2])
    h_0, delta_1 = 0.5 * (h_1[:, ::2] + h_1[:, 1::2]), 0.5 * (h_1[:, ::2] - h_1[:, 1::2])
    return [(h_0, None), (delta_1, h_0), (delta_2, h_1)]


def residuals(value, given):
    """What linear regression on what is given leaves of a stage's values."""
    if given is None:
        return value
    design = np.concatenate([given, np.ones([len(given), 1])], axis=1)
    return value - design @ np.linalg.lstsq(design, value, rcond=None)[0]


@pytest.fixture(scope="module")
def optima():
    """(training sample, model trained jointly, model trained progressively)."""
    x, steps = signals(512), 600
    models = [model_of(gaussian_flow()) for _ in range(2)]
    data = tf.data.Dataset.from_tensors(x).repeat(steps)
    optimizers = [keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, steps)) for _ in range(2)]
    fit_jointly(models[0], data, optimizers[0])
    fit(models[1], data, optimizer=optimizers[1])
    return x, *models


@pytest.mark.slow
@pytest.mark.parametrize("way", ["joint", "progressive"])
def test_both_ways_reach_the_exact_optimum(optima, way):
    x, joint, progressive = optima
    model = joint if way == "joint" else progressive
    start = -np.mean(model_of(gaussian_flow()).log_prob(x))
    optimum = gaussian_nll(x)
    assert start > optimum + 1.0
    assert -np.mean(model.log_prob(x)) == pytest.approx(optimum, abs=1e-3)


@pytest.mark.slow
def test_every_stage_reaches_its_exact_optimum(optima):
    x, _, progressive = optima
    stages = [(residuals(*stage), stage[0].shape[1]) for stage in halvings(x)]
    expected = [-gaussian_nll(rest) - 0.5 * size * np.log(2.0) * (k > 0) * 2 for k, (rest, size) in enumerate(stages)]
    terms = np.mean(flow_of(progressive).stage_log_prob(x), axis=0)
    np.testing.assert_allclose(terms, expected, atol=1e-3)
    assert -sum(expected) == pytest.approx(gaussian_nll(x), abs=1e-5)


@pytest.mark.slow
def test_the_optimum_is_the_gaussian(optima):
    x, _, progressive = optima
    gaussian = tfd.MultivariateNormalTriL(x.mean(axis=0), np.linalg.cholesky(np.cov(x.T, bias=True)).astype(np.float32))
    elsewhere = signals(32, seed=5)
    np.testing.assert_allclose(progressive.log_prob(elsewhere), gaussian.log_prob(elsewhere), atol=0.05)


@pytest.mark.slow
def test_every_step_is_that_of_joint_training():
    joint, progressive = model_of(small_flow()), model_of(small_flow())
    data = batches(signals())
    fit_jointly(joint, data, keras.optimizers.Adam(0.01), epochs=3)
    fit(progressive, data, 3, optimizer=keras.optimizers.Adam(0.01))
    start = values(model_of(small_flow()).trainable_variables)
    after = values(progressive.trainable_variables)
    assert min(np.abs(a - b).max() for a, b in zip(after, start)) > 1e-3
    assert_close(after, values(joint.trainable_variables))


def test_gradients_are_those_of_the_joint_density():
    model, x = model_of(small_flow()), tf.constant(signals())
    stages = []
    fit(model, batches(x), epochs=0, callbacks=lambda k: [Watch(stages.append)])
    assert len(stages) == STAGES
    flow = flow_of(model)
    for k, stage in enumerate(stages):
        variables = keras_bridge.variables_of(flow.stages[k])
        value, given = flow.stage_data(x, k)
        with tf.GradientTape() as tape:
            joint = -tf.reduce_mean(model.distribution.log_prob(tf.identity(x)))
        expected = tape.gradient(joint, variables)
        with tf.GradientTape() as tape:
            loss = -tf.reduce_mean(stage(value if given is None else {"x": value, "condition": given}))
        actual = tape.gradient(loss, variables)
        assert all(g is not None and np.abs(g).max() > 0.0 for g in actual)
        assert_close(actual, expected)


def test_losses_of_the_stages_add_up_to_the_joint_loss():
    model, x = model_of(small_flow(regularizer=keras.regularizers.L2(0.1))), signals()
    histories = fit(model, batches(x, 64), optimizer=standing())
    model.compile(standing())
    joint = model.evaluate(x, batch_size=64, verbose=0, return_dict=True)
    constant = (DIMS - 2) * np.log(2.0)
    stages = {name: sum(history.history[name][0] for history in histories) for name in ("loss", "nll")}
    assert joint["nll"] == pytest.approx(stages["nll"] + constant, rel=1e-5)
    assert joint["loss"] == pytest.approx(stages["loss"] + constant, rel=1e-5)
    assert joint["loss"] - joint["nll"] > 0.01


@pytest.mark.slow
def test_orthonormal_halvings_have_no_constant():
    flow = dfb.PNF(dfb.ActNorm(4), [dfb.ActNorm(4)], [DIMS], orthonormal=True)
    model, x = model_of(flow), signals()
    histories = fit(model, batches(x, 64), optimizer=standing())
    assert sum(h.history["nll"][0] for h in histories) == pytest.approx(-np.mean(model.log_prob(x)), rel=1e-5)


# One stage at a time.


@pytest.mark.parametrize("k", [0, *(slow(k) for k in range(1, STAGES - 1)), STAGES - 1])
def test_a_stage_trains_its_own_variables_only(k):
    model = model_of(small_flow())
    before = stage_values(model)
    histories = fit(model, batches(signals()), [int(k == j) for j in range(STAGES)])
    assert [history.epoch for history in histories] == [[0] if k == j else [] for j in range(STAGES)]
    for j, (old, new) in enumerate(zip(before, stage_values(model))):
        if j == k:
            assert all((a != b).any() for a, b in zip(old, new))
        else:
            assert_equal(new, old)


@pytest.mark.slow
def test_one_stage_at_a_time_has_optimizer_slots():
    model, seen, optimizers = model_of(small_flow()), [], []

    def watch(stage):
        gc.collect()
        assert [optimizer() for optimizer in optimizers] == [None] * len(seen)
        optimizers.append(weakref.ref(stage.optimizer))
        assert int(stage.optimizer.iterations) == 0
        seen.append(([id(v.value) for v in stage.trainable_variables], [tuple(v.shape) for v in stage.optimizer.variables]))

    fit(model, batches(signals()), optimizer=keras.optimizers.Adam(0.01), callbacks=lambda k: [Watch(watch)])
    assert len(seen) == STAGES
    for (trained, slots), stage in zip(seen, flow_of(model).stages):
        own = keras_bridge.variables_of(stage)
        assert set(trained) == {id(v) for v in own}
        assert sorted(slot for slot in slots if slot) == sorted(2 * [tuple(v.shape) for v in own])


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [2, [1, 0, 2], np.int64(1)], ids=["int", "list", "numpy"])
def test_epochs_of_every_stage(epochs):
    histories = fit(model_of(plain_flow()), batches(signals()), epochs)
    expected = [int(epochs)] * STAGES if np.ndim(epochs) == 0 else list(epochs)
    assert [len(history.epoch) for history in histories] == expected
    assert [len(history.history.get("nll", [])) for history in histories] == expected


@pytest.mark.parametrize("epochs", [[1, 1], [1, 1, 1, 1], []], ids=len)
def test_a_wrong_number_of_epochs(epochs):
    model = model_of(small_flow())
    before = values(model.variables)
    with pytest.raises(ValueError, match=f"got {len(epochs)} numbers of epochs.* 3 stages"):
        fit(model, batches(signals()), epochs)
    assert_equal(values(model.variables), before)


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [0, 2])
def test_a_stage_without_variables_is_passed_over(fixed):
    stages = [dfb.ActNorm(size) for size in VALUE_SIZES]
    stages[fixed] = tfb.Scale(2.0)
    model = model_of(dfb.PNF(stages[0], stages[1:], [DIMS]))
    before = stage_values(model)
    histories = fit(model, batches(signals()))
    assert [len(history.epoch) for history in histories] == [int(k != fixed) for k in range(STAGES)]
    for k, (old, new) in enumerate(zip(before, stage_values(model))):
        assert k == fixed or all((a != b).any() for a, b in zip(old, new))


def frozen_coupling(size=DIMS):
    network = dimflows.networks.MLP(size // 2, size // 2, zero_init=False, seed=0)
    network.trainable = False
    return dfb.AdditiveCoupling(network, dfb.masks.Channel(event_ndims=1))


@pytest.mark.slow
def test_a_frozen_network_around_the_flow():
    joint, progressive = (model_of(dfb.Chain([frozen_coupling(), small_flow()])) for _ in range(2))
    fit_jointly(joint, batches(signals()), sgd())
    fit(progressive, batches(signals()))
    assert_close(values(progressive.distribution.variables), values(joint.distribution.variables))
    assert_equal(*(values(keras_bridge.variables_of(m.distribution.bijector.bijectors[0])) for m in (joint, progressive)))


def test_a_stage_of_frozen_networks_is_passed_over():
    model = model_of(dfb.PNF(dfb.ActNorm(4), [frozen_coupling(4)], [DIMS]))
    before = stage_values(model)
    histories = fit(model, batches(signals()))
    assert [len(history.epoch) for history in histories] == [1, 0]
    assert_equal(stage_values(model)[1], before[1])


@pytest.mark.slow
def test_the_optimizer_is_a_configuration():
    model = model_of(tiny_flow())
    optimizer = keras.optimizers.SGD(0.1, momentum=0.5)
    rates, optimizers = [], []
    fit(
        model,
        batches(signals()),
        optimizer=optimizer,
        callbacks=lambda k: [Watch(lambda stage: (rates.append(stage.optimizer.momentum), optimizers.append(stage.optimizer)))],
    )
    assert rates == [0.5, 0.5] and optimizers[0] is not optimizers[1]
    assert not optimizer.built and int(optimizer.iterations) == 0


@pytest.mark.slow
def test_training_compiled_by_xla_is_the_same():
    results = []
    for jit_compile in (False, True):
        model = model_of(small_flow())
        fit(model, batches(signals()), jit_compile=jit_compile)
        results.append(values(model.trainable_variables))
    assert_close(*results, tolerance=1e-4)


# Batches.


def data_forms():
    x, given = signals(), {"x": signals(), "condition": conditions()}
    labels, weights = np.arange(64), np.linspace(0.0, 2.0, 64).astype(np.float32)
    return {
        "events": x,
        "labels": (x, labels),
        "weights": (x, labels, weights),
        "conditions": given,
        "conditions_weights": (given, labels, weights),
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", [form if form == "conditions_weights" else slow(form) for form in data_forms()])
def test_batches_of_every_form_train_as_jointly(form):
    data, condition_size = batches(data_forms()[form], 24), 3 * form.startswith("conditions")
    joint, progressive = model_of(small_flow(condition_size)), model_of(small_flow(condition_size))
    before = values(progressive.trainable_variables)
    history = fit_jointly(joint, data, sgd()).history
    histories = fit(progressive, data)
    after = values(progressive.trainable_variables)
    assert all((a != b).any() for a, b in zip(after, before))
    assert_close(after, values(joint.trainable_variables), 2e-5)
    nll = sum(h.history["nll"][0] for h in histories) + (DIMS - 2) * np.log(2.0)
    assert nll == pytest.approx(history["nll"][0], rel=1e-4)


@pytest.mark.slow
def test_events_in_double_precision():
    results = []
    for x in (signals(), (signals().astype(np.float64),)):
        model = model_of(small_flow())
        fit(model, batches(x))
        results.append(values(model.trainable_variables))
    assert_close(*results)


@pytest.mark.slow
def test_examples_of_weight_zero_have_no_influence():
    weights = np.tile([1.0, 0.0], 32).astype(np.float32)
    results = []
    for seed in (0, 1):
        x = integers()
        x[1::2] = integers(seed=seed + 5)[1::2]
        model = integer_model(tiny_flow())
        fit(model, batches((x, np.zeros(64), weights)))
        results.append(values(model.trainable_variables))
    assert_equal(*results)


@pytest.mark.slow
def test_integer_events_with_conditions():
    """The condition tells the level of a signal."""
    generator = np.random.default_rng(0)
    condition = generator.choice([-1.0, 1.0], [512, 1]).astype(np.float32)
    x = (7.5 + 4.0 * condition + generator.normal(size=[512, DIMS])).round().astype(np.uint8)
    data = ({"x": x, "condition": condition}, np.zeros(512), np.ones(512, np.float32))
    model = integer_model(small_flow(condition_size=1))
    fit(model, batches(data, 128).repeat(20), optimizer=keras.optimizers.Adam(0.03))
    right = model.log_prob({"x": x, "condition": condition}, seed=0)
    wrong = model.log_prob({"x": x, "condition": -condition}, seed=0)
    assert np.mean(right) > np.mean(wrong) + 5.0


@pytest.mark.slow
def test_every_detail_is_given_the_condition():
    model = model_of(small_flow(condition_size=3))
    kernels = [keras_bridge.collect(stage).layers[0].kernel for stage in flow_of(model).stages]
    before = values(kernels)
    fit(model, batches({"x": signals(), "condition": conditions()}))
    assert [k.shape[0] for k in before] == [3, 2 + 3, 4 + 3]
    assert all((np.abs(a - b) > 0.0).all() for a, b in zip(before, values(kernels)))


@pytest.mark.slow
def test_a_base_that_takes_no_condition():
    """The condition of the flow goes to the details, which take it as further channels."""
    details = small_flow(condition_size=3).stages[1:]
    model = model_of(dfb.PNF(dfb.ActNorm(2), details, [DIMS]))
    before = values(model.trainable_variables)
    fit(model, batches({"x": signals(), "condition": conditions()}))
    assert all((a != b).any() for a, b in zip(values(model.trainable_variables), before))


@pytest.mark.slow
def test_images():
    flow = dfb.PNF(dfb.ActNorm(2), [dfb.ActNorm(2), dfb.ActNorm(2)], [4, 4, 2])
    distribution = tfd.TransformedDistribution(normal(32), flow)
    x = np.random.default_rng(0).normal(2.0, size=[32, 4, 4, 2]).astype(np.float32)
    joint, progressive = dimflows.FlowModel(distribution), dimflows.FlowModel(distribution)
    start = values(joint.trainable_variables)
    histories = fit(progressive, batches(x))
    after = values(progressive.trainable_variables)
    for variable, value in zip(joint.trainable_variables, start):
        variable.assign(value)
    fit_jointly(joint, batches(x), sgd())
    assert_close(values(joint.trainable_variables), after)
    for history, size in zip(histories, (8, 8, 16)):
        np.testing.assert_allclose(history.history["bits_per_dim"], np.array(history.history["nll"]) / (size * np.log(2.0)))


# Dequantisation.


@pytest.fixture(scope="module")
def noisy_histories():
    """Histories of standing weights, by the seed: 0, 0 again and 1."""
    model, data = integer_model(tiny_flow()), batches(integers(), 64)
    return [
        [h.history for h in fit(model, data, 3, optimizer=standing(), validation_data=data, seed=seed)] for seed in (0, 0, 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["nll", "val_nll"])
@pytest.mark.parametrize("k", [0, 1])
def test_every_epoch_has_noise_of_its_own(noisy_histories, metric, k):
    first, again, other = (histories[k][metric] for histories in noisy_histories)
    assert len(set(first)) == 3
    assert again == first
    assert not set(other) & set(first)


@pytest.mark.slow
def test_every_batch_has_noise_of_its_own():
    seen = []

    class Batches(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(logs["nll"])

    data = tf.data.Dataset.from_tensors(integers()).repeat(3)
    fit(integer_model(tiny_flow()), data, [1, 0], optimizer=standing(), callbacks=lambda k: [Batches()])
    assert len(seen) == 3 and len({round(nll, 5) for nll in seen}) == 3


@pytest.mark.slow
def test_continuous_events_get_no_noise():
    histories = fit(model_of(tiny_flow()), batches(signals()), 2, optimizer=standing())
    assert all(h.history["nll"][0] == h.history["nll"][1] for h in histories)


def test_noise_is_uniform_within_the_cells():
    """Black signals: the stages model the mean and half the difference of two uniform numbers."""
    model = model_of(tiny_flow(), grey_levels=LEVELS)
    histories = fit(model, batches(np.zeros([8192, DIMS], np.uint8), 8192), optimizer=standing())
    for history, second_moment in zip(histories, (0.25 + 1 / 24, 1 / 24)):
        expected = 4 * (0.5 * np.log(2.0 * np.pi) + 0.5 * second_moment)
        assert history.history["nll"][0] == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_integers_of_any_type(dtype):
    model = integer_model(tiny_flow())
    histories = fit(model, batches(integers().astype(dtype), 64), optimizer=standing())
    nll = sum(h.history["nll"][0] for h in histories)
    assert np.isfinite(nll)
    by_hand = model.distribution.dequantize(integers().astype(dtype), seed=0)
    log_prob = model.distribution.distribution.log_prob(by_hand)
    y = model.distribution.distribution.bijector.bijectors[0].inverse_log_det_jacobian(by_hand, event_ndims=1)
    assert nll + 4.0 * np.log(2.0) == pytest.approx(np.mean(y - log_prob), abs=1.0)


PREPROCESSING = {
    "package": lambda scale, logit, flow: dfb.Chain([scale, logit, flow]),
    "tfp": lambda scale, logit, flow: tfb.Chain([scale, logit, flow]),
    "nested": lambda scale, logit, flow: tfb.Chain([scale, dfb.Chain([logit, dfb.Chain([flow])])]),
}


@pytest.fixture(scope="module")
def preprocessed():
    """(signals in (0, 16), a function that builds a model of them, variables after joint training)."""
    x = (0.5 + 15.0 * np.random.default_rng(0).uniform(size=[64, DIMS])).astype(np.float32)

    def build(chain):
        return model_of(PREPROCESSING[chain](tfb.Scale(2.0), dfb.LogitPreprocess(LEVELS // 2), small_flow()))

    joint = build("package")
    fit_jointly(joint, batches(x), sgd())
    return x, build, values(joint.trainable_variables)


@pytest.mark.slow
@pytest.mark.parametrize("chain", PREPROCESSING)
def test_preprocessing_around_the_flow(preprocessed, chain):
    x, build, expected = preprocessed
    model = build(chain)
    before = values(model.trainable_variables)
    fit(model, batches(x))
    after = values(model.trainable_variables)
    assert all((a != b).any() for a, b in zip(after, before))
    assert_close(after, expected)


# Further arguments of `fit`.


@pytest.mark.slow
def test_validation_data():
    model, unseen = model_of(small_flow()), signals(48, seed=3)
    histories = fit(model, batches(signals()), optimizer=standing(), validation_data=batches(unseen, 16))
    terms = -np.mean(flow_of(model).stage_log_prob(unseen), axis=0)
    terms[1:] -= np.array(VALUE_SIZES[1:]) * np.log(2.0)
    np.testing.assert_allclose([h.history["val_nll"][0] for h in histories], terms, rtol=1e-5)


@pytest.mark.slow
def test_steps_of_endless_data():
    iterations, data = [], batches(signals()).repeat()
    histories = fit(
        model_of(tiny_flow()),
        data,
        2,
        steps_per_epoch=3,
        validation_data=data,
        validation_steps=2,
        callbacks=lambda k: [Watch(end=lambda stage: iterations.append(int(stage.optimizer.iterations)))],
    )
    assert iterations == [6, 6]
    assert [len(h.history["val_nll"]) for h in histories] == [2, 2]


@pytest.mark.slow
def test_callbacks_are_made_for_every_stage():
    asked, trained = [], []

    def callbacks(k):
        asked.append(k)
        return [Watch(end=lambda stage: trained.append((k, stage.event_shape)))]

    fit(model_of(plain_flow()), batches(signals()), callbacks=callbacks)
    assert asked == [0, 1, 2]
    assert trained == [(k, [size]) for k, size in enumerate(VALUE_SIZES)]


@pytest.mark.slow
def test_early_stopping_of_every_stage():
    histories = fit(
        model_of(tiny_flow()),
        batches(signals()),
        6,
        optimizer=standing(),
        callbacks=lambda k: [keras.callbacks.EarlyStopping("loss", patience=k + 1)],
    )
    assert [len(h.epoch) for h in histories] == [2, 3]


# Going on after a crash.


@pytest.fixture(scope="module")
def uninterrupted():
    """The variables of every stage after a run that nothing interrupted."""
    model = model_of(plain_flow())
    fit(model, batches(signals()), 2, optimizer=keras.optimizers.Adam(0.01))
    return stage_values(model)


def run(backup_dir, **options):
    """A run as in a new process, of two epochs per stage."""
    model = model_of(plain_flow())
    try:
        histories = fit(model, batches(signals()), 2, optimizer=keras.optimizers.Adam(0.01), backup_dir=backup_dir, **options)
    except KeyboardInterrupt:
        histories = None
    return model, histories


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "epoch", "as_type"), [(0, 0, str), (1, 1, pathlib.Path), (2, 0, str)])
def test_a_killed_run_goes_on(tmp_path, uninterrupted, stage, epoch, as_type):
    backup = as_type(tmp_path / "runs" / "backup")
    killed, histories = run(backup, callbacks=crash_in(stage, epoch))
    assert histories is None
    at_the_kill = stage_values(killed)
    resumed, histories = run(backup)
    expected = [[] if k < stage else ([1] if (k, epoch) == (stage, 1) else [0, 1]) for k in range(STAGES)]
    assert [history.epoch for history in histories] == expected
    for k in range(stage):
        assert_equal(stage_values(resumed)[k], at_the_kill[k])
    for actual, whole in zip(stage_values(resumed), uninterrupted):
        assert_close(actual, whole)
    assert not (tmp_path / "runs" / "backup").exists()


@pytest.mark.slow
def test_a_run_killed_twice(tmp_path, uninterrupted):
    assert run(tmp_path / "backup", callbacks=crash_in(0, 1))[1] is None
    assert run(tmp_path / "backup", callbacks=crash_in(1, 1))[1] is None
    model, histories = run(tmp_path / "backup")
    assert [history.epoch for history in histories] == [[], [1], [0, 1]]
    for actual, whole in zip(stage_values(model), uninterrupted):
        assert_close(actual, whole)


@pytest.mark.slow
def test_a_finished_run_leaves_other_files_and_is_not_resumed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events").write_text("mine too")
    for _ in range(2):
        _, histories = run(tmp_path)
        assert [history.epoch for history in histories] == [[0, 1]] * STAGES
        assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["logs", "logs/events", "notes.txt"]


@pytest.mark.slow
def test_a_stage_that_stopped_early_is_not_trained_again(tmp_path):
    """It has fewer epochs than it could have had, and may have taken back the last of them."""

    def stopping(k):
        return [keras.callbacks.EarlyStopping("loss", patience=0, restore_best_weights=True)]

    def train(callbacks):
        model = model_of(tiny_flow())
        histories = None
        try:
            options = {"optimizer": keras.optimizers.SGD(10.0), "backup_dir": tmp_path / "backup"}
            histories = fit(model, batches(signals(), 64), 5, callbacks=callbacks, **options)
        except KeyboardInterrupt:
            pass
        return stage_values(model)[0], histories

    at_the_kill, histories = train(lambda k: [*stopping(k), *crash_in(1, 0)(k)])
    assert histories is None
    resumed, histories = train(stopping)
    assert histories[0].epoch == [] and len(histories[1].epoch) > 0
    assert_equal(resumed, at_the_kill)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, [0, 1, 0]], ids=["none", "some"])
def test_backups_of_stages_without_epochs(tmp_path, epochs):
    model = model_of(plain_flow())
    histories = fit(model, batches(signals()), epochs, backup_dir=tmp_path / "backup")
    assert sum(len(history.epoch) for history in histories) == np.sum(epochs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_a_backup_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(model_of(tiny_flow()), batches(signals()))
    assert list(tmp_path.iterdir()) == []


# Errors, before anything has changed.


def with_value(x, value, index=0):
    x = np.array(x, dtype=np.result_type(x, np.array(value).dtype))
    x[index].flat[0] = value
    return x


def no_flow():
    return tfd.Sample(tfd.Normal(tf.Variable(0.0), 1.0), [DIMS], name="Flow")


WRONG_MODELS = {
    "no_bijector": (lambda: dimflows.FlowModel(no_flow()), "Flow .*needs a PNF"),
    "no_bijector_of_integers": (
        lambda: dimflows.FlowModel(dfd.Dequantized(no_flow(), grey_levels=LEVELS, name="Integers")),
        "Integers .*needs a PNF",
    ),
    "another_bijector": (lambda: model_of(dfb.ActNorm(DIMS)), "Flow .*needs a PNF"),
    "outermost_of_a_chain": (lambda: model_of(dfb.Chain([small_flow(), tfb.Scale(2.0)])), "needs a PNF next to its latent"),
    "outermost_of_tfp_chain": (lambda: model_of(tfb.Chain([small_flow(), tfb.Scale(2.0)])), "needs a PNF next to its latent"),
    "dependent_noise": (
        lambda: model_of(small_flow(), noise=tfd.MultivariateNormalTriL(tf.zeros([DIMS]), tf.eye(DIMS), name="Dependent")),
        "needs a PNF next to its latent",
    ),
    "independent_noise": (
        lambda: model_of(small_flow(), noise=tfd.MultivariateNormalDiag(tf.zeros([DIMS]), tf.range(1.0, 9.0), name="Various")),
        "needs a PNF next to its latent",
    ),
    "pairs_of_noise": (
        lambda: model_of(
            tfb.Chain([small_flow(), tfb.Reshape([DIMS], [4, 2])]),
            noise=tfd.Sample(tfd.MultivariateNormalDiag(tf.zeros([2])), [4]),
        ),
        "needs a PNF next to its latent",
    ),
    "learned_noise": (
        lambda: model_of(small_flow(), noise=tfd.Sample(tfd.Normal(tf.Variable(0.0, name="centre"), 1.0), [DIMS])),
        r"centre.*outside of the PNF",
    ),
    "learned_preprocessing": (
        lambda: model_of(dfb.Chain([tfb.Shift(tf.Variable(tf.zeros([DIMS]), name="offset")), small_flow()])),
        r"offset.*outside of the PNF",
    ),
    "learned_network_outside": (
        lambda: model_of(
            dfb.Chain([dfb.AffineCoupling(dimflows.networks.MLP(4, 8), dfb.masks.Channel(event_ndims=1)), small_flow()])
        ),
        "outside of the PNF",
    ),
    "trained_splits": (
        lambda: model_of(plain_flow_of(dfb.OrthogonalSplit(DIMS, 3, factor=None, trainable=True))),
        "below.*outside of the PNF or in its splits",
    ),
}


def test_parts_of_unequal_sizes():
    model, data = model_of(plain_flow_of(dfb.OrthogonalSplit(DIMS, 3, factor=None))), batches(signals())
    model.adapt(data)
    before = values(model.trainable_variables)
    fit(model, data)
    assert all(np.abs(now - then).max() > 0.0 for now, then in zip(values(model.trainable_variables), before))


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_models_that_have_no_such_flow(case):
    build, message = WRONG_MODELS[case]
    model = build()
    model.compile("adam")
    before = values(model.variables + model.optimizer.variables)
    with pytest.raises(ValueError, match=f"fit_progressively: .*{message}"):
        fit(model, batches(signals()))
    assert_equal(values(model.variables + model.optimizer.variables), before)


def bad_data():
    x, given = signals(), {"x": signals(), "condition": conditions()}
    return {
        "array": ("plain", x, "got data of type ndarray, needs a tf.data.Dataset"),
        "tensor": ("plain", tf.constant(x), "needs a tf.data.Dataset"),
        "wrong_size": ("plain", batches(x[:, :6]), r"needs events of shape \(8,\)"),
        "images": ("plain", batches(x.reshape([-1, 8, 1])), r"needs events of shape \(8,\)"),
        "nan": ("plain", batches(with_value(x, np.float32(np.nan))), "not finite"),
        "unexpected_condition": ("plain", batches(given), "condition|shape"),
        "no_condition": ("conditional", batches(x), "condition"),
        "no_condition_for_details": ("half_conditional", batches(x), "condition|shape"),
        "wrong_condition": ("conditional", batches(given | {"condition": conditions()[:, :2]}), "condition|shape"),
        "image_condition": ("conditional", batches(given | {"condition": conditions()[:, None]}), "condition"),
        "nan_condition": ("conditional", batches(given | {"condition": conditions() * np.float32(np.nan)}), "not finite"),
        "other_keys": ("conditional", batches({"x": x, "y": conditions()}), "a dict of 'x' and 'condition'"),
        "too_large": ("integer", batches(with_value(integers(), 16)), "needs numbers 0 to 15"),
        "negative": ("integer", batches(with_value(integers().astype(np.int32), -1)), "needs numbers 0 to 15"),
        "between_levels": ("integer", batches(integers() + np.float32(0.25)), "needs numbers 0 to 15"),
    }


@pytest.fixture(scope="module")
def checked_models():
    """Models that no test changes."""
    details = small_flow(condition_size=3).stages[1:]
    models = {
        "plain": model_of(small_flow()),
        "conditional": model_of(small_flow(condition_size=3)),
        "half_conditional": model_of(dfb.PNF(dfb.ActNorm(2), details, [DIMS])),
        "integer": integer_model(small_flow()),
    }
    for model in models.values():
        model.compile("adam")
    return models


@pytest.mark.parametrize("case", bad_data())
def test_bad_data_is_refused_and_changes_nothing(checked_models, tmp_path, case):
    kind, data, message = bad_data()[case]
    model = checked_models[kind]
    before = values(model.variables + model.optimizer.variables)
    with pytest.raises(ValueError, match=message):
        fit(model, data, backup_dir=tmp_path / "backup")
    assert_equal(values(model.variables + model.optimizer.variables), before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["wrong_size", "nan", "too_large", "array"])
def test_bad_validation_data_is_refused_and_changes_nothing(checked_models, case):
    kind, data, message = bad_data()[case]
    model = checked_models[kind]
    good = batches(integers() if kind == "integer" else signals())
    before = values(model.variables)
    with pytest.raises(ValueError, match=message):
        fit(model, good, validation_data=data)
    assert_equal(values(model.variables), before)


def test_a_late_batch_outside_the_levels_stops_training(checked_models):
    data = batches(with_value(integers(), 16, index=50))
    with pytest.raises(tf.errors.InvalidArgumentError, match="not numbers 0 to 15"):
        fit(checked_models["integer"], data, optimizer=standing())


# What comes after.


@pytest.fixture(scope="module")
def recipe_model():
    """A progressive model of integer signals, trained progressively for a moment, and its log-probabilities before."""
    options = {"num_halvings": 1, "num_levels": 1, "depth": 1, "width": 4, "num_blocks": 1, "grey_levels": LEVELS}
    model = dimflows.FlowModel(dimflows.recipes.pnf([DIMS], **options), seed=0)
    x = np.clip(np.cumsum(integers(256) // 6, axis=1), 0, LEVELS - 1).astype(np.uint8)
    model.adapt(x)
    before = model.log_prob(x, seed=0).numpy()
    histories = fit(model, batches(x), 4, optimizer=keras.optimizers.Adam(0.01))
    return model, x, before, histories


@pytest.mark.slow
def test_progressive_training_improves_the_model(recipe_model):
    model, x, before, histories = recipe_model
    assert [h.history["loss"][-1] < h.history["loss"][0] for h in histories] == [True, True]
    after = model.log_prob(x, seed=0).numpy()
    assert after.mean() > before.mean() + 0.5
    np.testing.assert_allclose(after, model.distribution.log_prob(x, seed=(0, 0)), rtol=1e-4)


@pytest.mark.slow
def test_a_trained_model_is_evaluated_and_sampled(recipe_model):
    model, x, _, _ = recipe_model
    model.compile("adam")
    nll = model.evaluate(x, batch_size=64, verbose=0, return_dict=True)["nll"]
    assert nll == pytest.approx(-np.mean(model.log_prob(x, seed=1)), rel=0.05)
    samples = model.sample(100, seed=0).numpy()
    assert samples.shape == (100, DIMS) and 0 <= samples.min() <= samples.max() < LEVELS


@pytest.mark.slow
def test_a_trained_model_is_saved(recipe_model, tmp_path):
    model, x, _, _ = recipe_model
    model.save(tmp_path / "model.keras")
    loaded = dimflows.load(tmp_path / "model.keras")
    assert_equal(values(loaded.variables), values(model.variables))
    np.testing.assert_array_equal(loaded.log_prob(x, seed=0), model.log_prob(x, seed=0))


@pytest.mark.slow
def test_a_trained_model_is_trained_on_jointly(recipe_model, tmp_path):
    model, x, _, _ = recipe_model
    model.save(tmp_path / "model.keras")
    loaded = dimflows.load(tmp_path / "model.keras")
    before, nll = values(loaded.trainable_variables), -np.mean(loaded.log_prob(x, seed=0))
    history = fit_jointly(loaded, batches(x), keras.optimizers.Adam(0.005), epochs=4).history
    assert -np.mean(loaded.log_prob(x, seed=0)) < nll
    assert history["nll"][0] == pytest.approx(nll, abs=1.0)
    assert all((a != b).any() for a, b in zip(values(loaded.trainable_variables), before))


@pytest.mark.slow
def test_a_convolutional_recipe():
    options = {"num_halvings": 1, "num_levels": 1, "depth": 1, "width": 4, "num_blocks": 1, "grey_levels": LEVELS}
    model = dimflows.FlowModel(dimflows.recipes.pnf([4, 4, 1], **options), seed=0)
    generator = np.random.default_rng(0)
    x = generator.uniform(3.0, 12.0, [128, 1, 1, 1]) + generator.normal(size=[128, 4, 4, 1])
    x = np.clip(x, 0, LEVELS - 1).astype(np.uint8)
    before = -np.mean(model.log_prob(x, seed=0))
    histories = fit(model, batches(x), 4, optimizer=keras.optimizers.Adam(0.02))
    assert all(h.history["loss"][-1] < h.history["loss"][0] - 0.1 for h in histories)
    assert all(h.history["loss"][0] > h.history["nll"][0] for h in histories)
    assert -np.mean(model.log_prob(x, seed=0)) < before - 1.0
