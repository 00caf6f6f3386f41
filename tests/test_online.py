"""LCMA in one training: `OnlineFactorization`, `Multiscale.decide`, `DecideFactorization` and what trains with them."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import CHANNELS, GRID, assert_close, contributions_of, dfb, dimflows, normal

tfb, tfd = tfp.bijectors, tfp.distributions
Factorization, Online = dfb.DimensionFactorization, dfb.OnlineFactorization

IMAGE = (4, 8, 3)
INITIAL = Factorization.checkerboard(IMAGE, 3)
STATISTICS = contributions_of(IMAGE, 2)


class Scaling(dfb.FlowBijector):
    """Data to latent: times exp(log_scale), a number for every dimension."""

    def __init__(self, log_scale):
        super().__init__(forward_min_event_ndims=np.ndim(log_scale), parameters={"log_scale": log_scale}, name="scaling")
        self._log_scale = tf.constant(log_scale)

    def _inverse_and_log_det_per_dim(self, y, condition):
        return y * tf.exp(tf.cast(self._log_scale, y.dtype)), tf.cast(self._log_scale, y.dtype)

    def _forward_and_log_det_per_dim(self, x, condition):
        return x * tf.exp(-tf.cast(self._log_scale, x.dtype)), -tf.cast(self._log_scale, x.dtype)


def flow(initial=INITIAL, **options):
    """Levels that do nothing."""
    identities = [tfb.Identity() for _ in range(initial.num_levels)]
    return dfb.Multiscale(identities, Online(initial, **options))


# The factorization.


def test_before_any_decision_it_is_the_initial_one():
    multiscale = flow()
    assert multiscale.is_online and multiscale.num_decided == 0
    assert multiscale.factorization == INITIAL
    static = dfb.Multiscale([tfb.Identity()] * 3, INITIAL)
    assert not static.is_online and static.num_decided == 2
    y = normal([2, *IMAGE])
    assert_close(multiscale.inverse(y), static.inverse(y))


@pytest.mark.parametrize("granularity", ["block", "channel"])
@pytest.mark.parametrize("keep", ["high", "low", ["low", "high"]])
def test_decisions_are_those_of_the_contributions(granularity, keep):
    multiscale = flow(keep=keep, granularity=granularity)
    expected = [Factorization.from_contributions([STATISTICS[0], STATISTICS[k]], keep, granularity) for k in range(2)]
    y = normal([2, *IMAGE])
    for k, statistic in enumerate(STATISTICS):
        multiscale.decide(statistic)
        assert multiscale.num_decided == k + 1
        assert multiscale.factorization == expected[k]
        assert_close(multiscale.inverse(y), dfb.Multiscale([tfb.Identity()] * 3, expected[k]).inverse(y))
    assert INITIAL not in expected


def test_the_configuration_is_json_and_gives_the_same():
    online = Online(INITIAL, ["low", "high"], "block")
    restored = Online.from_config(json.loads(json.dumps(online.get_config())))
    assert restored.initial == INITIAL and (restored.event_shape, restored.num_levels) == (IMAGE, 3)
    for k, statistic in enumerate(STATISTICS):
        assert restored.decide(INITIAL, k, statistic) == online.decide(INITIAL, k, statistic)
    assert online.decide(INITIAL, 1, STATISTICS[1]).kept[0].tolist() == INITIAL.kept[0].tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Online("checkerboard"), "OnlineFactorization: got initial='checkerboard', needs a DimensionFactorization"),
        (lambda: Online(INITIAL, "highest"), 'OnlineFactorization: got keep=\'highest\', needs "high" or "low"'),
        (lambda: Online(INITIAL, ["low"]), "or a list of 2 of them"),
        (
            lambda: Online(INITIAL, granularity="free"),
            "granularity=.free. for events of shape .*needs one of channel, block",
        ),
        (lambda: Online(Factorization.channels([5], 2), granularity="block"), r"events of shape \(5,\), needs one of free"),
        (
            lambda: flow().decide(STATISTICS[0][..., :2]),
            r"contributions has shape \(4, 8, 2\), needs the event shape \(4, 8, 3\)",
        ),
        (lambda: flow().decide(np.full(IMAGE, np.nan)), "OnlineFactorization: contributions has values that are not finite"),
        (lambda: dfb.Multiscale([tfb.Identity()] * 3, CHANNELS).decide(np.zeros(GRID)), "decide needs an OnlineFactorization"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_there_are_no_more_decisions_than_factor_outs():
    multiscale = flow()
    for statistic in STATISTICS:
        multiscale.decide(statistic)
    before = [v.numpy() for v in multiscale.variables]
    with pytest.raises(ValueError, match="multiscale: all 2 factor-outs are decided already"):
        multiscale.decide(STATISTICS[0])
    with pytest.raises(ValueError, match="needs the event shape"):
        flow().decide([1.0])
    assert all((v.numpy() == b).all() for v, b in zip(multiscale.variables, before))


def test_a_decision_reaches_functions_that_are_traced_already():
    log_scales = normal(IMAGE, 3)
    multiscale = dfb.Multiscale([Scaling(log_scales), tfb.Identity(), tfb.Identity()], Online(INITIAL))
    noise = tfd.Sample(tfd.Normal(tf.constant(0.0, "float64"), 1.0), [int(np.prod(IMAGE))])
    distribution = tfd.TransformedDistribution(noise, multiscale)
    traces = []

    @tf.function(autograph=False)
    def latent_and_log_prob(y):
        traces.append(1)
        return multiscale.inverse(y), distribution.log_prob(y)

    y = normal([2, *IMAGE], 4)
    for _ in range(2):
        z, log_prob = latent_and_log_prob(y)
        static = dfb.Multiscale([Scaling(log_scales), tfb.Identity(), tfb.Identity()], multiscale.factorization)
        assert_close(z, static.inverse(y))
        assert_close(log_prob, tfd.TransformedDistribution(noise, static).log_prob(y))
        assert_close(multiscale.forward(tf.identity(z)), y)
        assert_close(
            multiscale.event_layout().forward(tf.reshape(tf.constant(y), [2, *IMAGE])), static.event_layout().forward(y)
        )
        multiscale.decide(multiscale.likelihood_contributions(y)[0].numpy().mean(axis=0))
    assert len(traces) == 1


# Training.

SHAPE = (4, 4, 1)
LCMA = {"width": 4, "num_blocks": 1, "num_levels": 3, "depth": 1, "grey_levels": 4, "contributions": "online"}


def images(num=64, seed=0):
    """Images whose left half is nearly constant."""
    x = np.random.default_rng(seed).integers(0, 4, [num, *SHAPE])
    x[:, :, :2] = 1
    return x


def model(seed=0, **options):
    keras.utils.set_random_seed(seed)
    result = dimflows.FlowModel(dimflows.recipes.lcma_realnvp(SHAPE, seed=seed, **LCMA | options), seed=seed)
    result.compile(keras.optimizers.Adam(0.01))
    return result


def multiscale_of(flow_model):
    return flow_model.bijector.bijectors[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that decided both factor-outs within one fit, and what was seen at the beginning of every step."""
    flow_model, seen = model(), []

    def look(batch, logs):
        multiscale = multiscale_of(flow_model)
        seen.append((int(flow_model.optimizer.iterations), multiscale.num_decided, multiscale.factorization))

    decide = dimflows.training.DecideFactorization(images(), steps=3)
    callbacks = [decide, keras.callbacks.LambdaCallback(on_train_batch_begin=look)]
    flow_model.fit(images(), batch_size=8, epochs=1, verbose=0, callbacks=callbacks)
    path = tmp_path_factory.mktemp("online") / "model.keras"
    flow_model.save(path)
    return flow_model, seen, path


@pytest.mark.slow
def test_factor_outs_are_decided_one_after_the_other(trained):
    _, seen, _ = trained
    assert [(step, decided) for step, decided, _ in seen] == [(k, min(k // 3, 2)) for k in range(8)]
    assert seen[0][2] == Factorization.checkerboard(SHAPE, 3)
    first, second = seen[3][2], seen[6][2]
    assert seen[5][2] == first and seen[7][2] == second
    assert (first.kept[0] == second.kept[0]).all()
    assert first != seen[0][2] != second


@pytest.mark.slow
def test_a_decision_follows_the_contributions_of_that_moment():
    flow_model = model()
    weights = []

    class Keep(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 2:
                weights.append(flow_model.get_weights())

    decide = dimflows.training.DecideFactorization(images(), steps=2, seed=5)
    flow_model.fit(images(24), batch_size=8, verbose=0, callbacks=[Keep(), decide])
    decided = multiscale_of(flow_model).factorization
    flow_model.set_weights(weights[0])
    contributions = dimflows.likelihood_contributions(flow_model.bijector, [images()], seed=5)
    expected = multiscale_of(flow_model)._online.decide(multiscale_of(flow_model).factorization, 0, contributions[0])
    assert decided == expected


@pytest.mark.slow
def test_all_variables_stay(trained):
    flow_model, _, _ = trained
    fresh = model()
    assert [v.shape for v in flow_model.variables] == [v.shape for v in fresh.variables]
    assert len(flow_model.optimizer.variables) == len(fresh.optimizer.variables)


@pytest.mark.slow
def test_a_saved_model_has_the_decided_factorization(trained):
    flow_model, _, path = trained
    loaded = dimflows.load(path)
    assert multiscale_of(loaded).factorization == multiscale_of(flow_model).factorization
    assert multiscale_of(loaded).num_decided == 2
    np.testing.assert_array_equal(loaded.log_prob(images(5), seed=1), flow_model.log_prob(images(5), seed=1))
    np.testing.assert_array_equal(loaded.sample(3, seed=2), flow_model.sample(3, seed=2))


@pytest.mark.slow
def test_the_trained_density_is_that_of_the_factorization_without_online(trained):
    flow_model, _, _ = trained
    options = {key: value for key, value in LCMA.items() if key != "contributions"}
    factorization = multiscale_of(flow_model).factorization
    static = dimflows.FlowModel(dimflows.recipes.realnvp(SHAPE, seed=0, factorization=factorization, **options), seed=0)
    online = [v for v in flow_model.variables if not any(n in v.name for n in ("order", "num_decided", "seed"))]
    plain = [v for v in static.variables if not any(n in v.name for n in ("order", "seed"))]
    assert [v.name for v in online] == [v.name for v in plain]
    for ours, theirs in zip(plain, online):
        ours.assign(theirs)
    np.testing.assert_allclose(static.log_prob(images(5), seed=1), flow_model.log_prob(images(5), seed=1), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lcma-glow", "lcma-iresnet", "lcma-residual-flow"])
def test_other_families(name):
    flow_model = dimflows.FlowModel(
        dimflows.recipes.get(name)([4, 4, 1], num_levels=2, width=4, contributions="online", grey_levels=4, depth=1), seed=0
    )
    flow_model.compile("sgd")
    decide = dimflows.training.DecideFactorization(images(16), steps=1)
    flow_model.fit(images(16), batch_size=8, verbose=0, callbacks=[decide])
    assert multiscale_of(flow_model).num_decided == 1


@pytest.mark.slow
def test_vectors():
    flow_model = dimflows.FlowModel(
        dimflows.recipes.lcma_realnvp([6], num_levels=2, width=8, contributions="online", keep="low"), seed=0
    )
    flow_model.compile(keras.optimizers.Adam(0.01))
    x = tf.data.Dataset.from_tensor_slices(normal([64, 6], dtype="float32")).batch(16)
    flow_model.fit(x, epochs=2, verbose=0, callbacks=[dimflows.training.DecideFactorization(x, steps=4)])
    multiscale = dimflows.distributions.structure_of(flow_model.distribution).multiscale
    assert multiscale.num_decided == 1 and multiscale.factorization.kept[0].shape == (3,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dimflows.training.DecideFactorization(images(), steps=0), "got steps=0, needs a positive number"),
        (lambda: dimflows.recipes.lcma_realnvp(SHAPE, contributions="offline"), "got contributions='offline', needs arrays"),
    ],
)
def test_errors_of_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_models_and_data_that_do_not_fit_are_refused_before_training(trained):
    flow_model, _, _ = trained
    plain = dimflows.FlowModel(dimflows.recipes.glow([4, 4, 1], num_levels=1, depth=1, width=4, grey_levels=4))
    plain.compile()
    weights = plain.get_weights()
    with pytest.raises(ValueError, match="DecideFactorization: .*no Multiscale with an OnlineFactorization"):
        plain.fit(images(8), verbose=0, callbacks=[dimflows.training.DecideFactorization(images(8), 1)])
    with pytest.raises(ValueError, match="needs events of shape"):
        flow_model.fit(images(8), verbose=0, callbacks=[dimflows.training.DecideFactorization(images(8)[:, :2], 1)])
    assert all((a == b).all() for a, b in zip(plain.get_weights(), weights))


@pytest.mark.slow
def test_runs(tmp_path):
    data = tf.data.Dataset.from_tensor_slices(images()).batch(8)
    options = {"event_shape": SHAPE, "grey_levels": 4, "epochs": 2, "steps_per_epoch": 3, "baseline": False}
    sizes = {key: value for key, value in LCMA.items() if key not in ("grey_levels", "contributions")}

    def run(directory, **more):
        return dimflows.training.train("lcma-realnvp", directory, data, data, arguments=sizes, **options | more)

    finished = run(tmp_path / "run", online_steps=2)
    assert multiscale_of(finished).num_decided == 2
    config = dimflows.training.read_config(tmp_path / "run")
    assert config["online_steps"] == 2 and "pretrain_epochs" not in config
    assert not (tmp_path / "run" / "pretraining").exists() and (tmp_path / "run" / "factorization.png").is_file()
    with np.load(tmp_path / "run" / "contributions.npz") as stored:
        expected = dimflows.likelihood_contributions(finished.bijector, data.take(3))
        np.testing.assert_allclose(stored["factor_out_1"], expected[1], rtol=1e-5)
    with pytest.raises(ValueError, match="online_steps for lcma-realnvp, needs an lcma recipe and no pretrain_epochs"):
        run(tmp_path / "other", online_steps=2, pretrain_epochs=1)
    with pytest.raises(ValueError, match="online_steps for realnvp"):
        dimflows.training.train("realnvp", tmp_path / "other", data, data, arguments=sizes, online_steps=2, **options)
    with pytest.raises(ValueError, match="got online_steps=3 for 2 factor-outs in 6 steps, needs at most 2"):
        run(tmp_path / "other", online_steps=3)
    assert not (tmp_path / "other").exists()


def test_a_copy_knows_how_many_factor_outs_are_decided():
    flow = dfb.Multiscale([dfb.ActNorm(3), dfb.ActNorm(3), dfb.ActNorm(6)], Online(INITIAL))
    flow.decide(STATISTICS[0])
    copy = flow.copy()
    assert flow.num_decided == copy.num_decided == 1
    assert copy.factorization == flow.factorization
    copy.decide(STATISTICS[1])
    assert (flow.num_decided, copy.num_decided) == (1, 2)


def test_a_recipe_hands_on_which_half_stays():
    options = {"num_levels": 2, "depth": 1, "width": 4, "num_blocks": 1}
    flow = dimflows.recipes.lcma_realnvp([4, 4, 1], contributions="online", keep="low", **options).bijector
    (statistics,) = contributions_of([4, 4, 1], 1)
    flow.decide(statistics)
    assert flow.factorization == Factorization.from_contributions([statistics], "low")
    assert flow.factorization != Factorization.from_contributions([statistics], "high")


def test_every_factor_out_is_decided_by_its_own_contributions(monkeypatch):
    flow = dfb.Multiscale([dfb.ActNorm(3), dfb.ActNorm(3), dfb.ActNorm(6)], Online(INITIAL))
    flow_model = dimflows.FlowModel(tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [96]), flow))
    flow_model.compile("sgd")
    flow_model.optimizer.iterations.assign(10)
    monkeypatch.setattr(dimflows.training.callbacks, "likelihood_contributions", lambda *args, **kwargs: STATISTICS)
    decide = dimflows.training.DecideFactorization(tf.zeros([2, *IMAGE]), steps=5)
    decide.set_model(flow_model)
    decide.on_train_begin()
    decide.on_train_batch_begin(0)
    assert flow.num_decided == 1
    decide.on_train_batch_begin(1)
    assert flow.factorization == Factorization.from_contributions(STATISTICS)
    assert flow.factorization != Factorization.from_contributions(STATISTICS[::-1])
