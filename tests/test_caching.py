"""A network is evaluated once, and no result is stale."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import (
    ENTRIES,
    Mixer,
    assert_close,
    build,
    conditional_coupling,
    dfb,
    dimflows,
    distribution,
    fresh,
    normal,
    randomize,
    slow,
)

tfb = tfp.bijectors


class Counted(Mixer):
    """A network that counts its evaluations."""

    calls = 0

    def call(self, x):
        """The parameters."""
        self.calls += 1
        return super().call(x)


def counted_coupling(seed=0):
    network = Counted([2], [4], seed)
    return dfb.AffineCoupling(network, dfb.masks.Channel(event_ndims=1), "exp"), network


def counted_flow(kind):
    """A flow of four dimensions, and the networks in it."""
    first, second = counted_coupling(0), counted_coupling(1)
    small = Counted([1], [2], 2)
    flow = {
        "alone": lambda: first[0],
        "dfb.Chain": lambda: dfb.Chain([first[0], dfb.ActNorm(4, dtype="float64"), second[0]]),
        "tfb.Chain": lambda: tfb.Chain([first[0], tfb.Permute([2, 3, 0, 1]), second[0]]),
        "nested": lambda: tfb.Chain([dfb.Chain([tfb.Chain([first[0]]), tfb.Permute([2, 3, 0, 1])]), second[0]]),
        "tfb.Invert": lambda: tfb.Invert(first[0]),
        "dfb.Multiscale": lambda: dfb.Multiscale(
            [dfb.Chain([first[0], second[0]]), dfb.AffineCoupling(small, dfb.masks.Channel(event_ndims=1), "exp")],
            dfb.DimensionFactorization.channels([4], 2),
        ),
    }[kind]()
    networks = {"alone": [first[1]], "tfb.Invert": [first[1]], "dfb.Multiscale": [first[1], second[1], small]}
    return flow, networks.get(kind, [first[1], second[1]])


KINDS = ["alone", "dfb.Chain", "tfb.Chain", "nested", "tfb.Invert", "dfb.Multiscale"]

OPERATIONS = {
    "log_prob": lambda flow, b, v: flow.log_prob(v),
    "sample": lambda flow, b, v: flow.sample(3, seed=[1, 2]),
    "sample_and_log_prob": lambda flow, b, v: flow.experimental_sample_and_log_prob(3, seed=[1, 2]),
    "log_prob_of_a_sample": lambda flow, b, v: flow.log_prob(flow.sample(3, seed=[1, 2])),
    "inverse_pair": lambda flow, b, v: (b.inverse(v), b.inverse_log_det_jacobian(v, 1)),
    "forward_pair": lambda flow, b, v: (b.forward(v), b.forward_log_det_jacobian(v, 1)),
    "inverse_log_det": lambda flow, b, v: b.inverse_log_det_jacobian(v, 1),
    "gradient": lambda flow, b, v: _gradient_step(flow, b, v),
}


def _gradient_step(flow, bijector, v):
    with tf.GradientTape() as tape:
        loss = -tf.reduce_mean(flow.log_prob(v))
    return tape.gradient(loss, bijector.trainable_variables)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_network_is_evaluated_once(kind, operation):
    flow, networks = counted_flow(kind)
    full = distribution(flow, [4])
    results = []
    for mode in ("eager", "traced"):
        function = lambda v: OPERATIONS[operation](full, flow, v)  # noqa: E731
        function = tf.function(function, autograph=False) if mode == "traced" else function
        for network in networks:
            network.calls = 0
        results.append(tf.nest.flatten(function(normal([3, 4], 1))))
        assert [network.calls for network in networks] == [1] * len(networks), mode
    for eager, traced in zip(*results):
        assert_close(traced, eager)


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("tfb") and k != "nested"])
def test_the_hook_evaluates_a_network_once(kind):
    flow, networks = counted_flow(kind)
    for hook, value in ((flow.inverse_log_det_per_dim, normal([3, 4], 1)), (flow.forward_log_det_per_dim, normal([3, 4], 2))):
        for network in networks:
            network.calls = 0
        assert np.isfinite(hook(value)).all()
        assert [network.calls for network in networks] == [1] * len(networks)


def stale_cases():
    """Orders of calls around an update: `(before, after)`, both of (bijector, y, x)."""
    calls = {
        "inverse": lambda b, y, x: b.inverse(y),
        "ildj": lambda b, y, x: b.inverse_log_det_jacobian(y, 1),
        "forward": lambda b, y, x: b.forward(x),
        "fldj": lambda b, y, x: b.forward_log_det_jacobian(x, 1),
        "hook": lambda b, y, x: b.inverse_log_det_per_dim(y),
    }
    pairs = [(a, c) for a in calls for c in calls if (a in ("forward", "fldj")) == (c in ("forward", "fldj"))]
    return [pytest.param(calls[a], calls[c], id=f"{a}-{c}") for a, c in pairs]


def updatable(kind):
    entry = {"coupling": "affine_coupling_sequential", "chain": "chain_vector", "multiscale": "multiscale_vector"}[kind]
    bijector, created = build(ENTRIES[entry], "initial")
    return bijector, created, ENTRIES[entry].data(), ENTRIES[entry].latent()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("coupling", "traced"), ("multiscale", "eager")]
    + [
        slow(kind, mode)
        for kind, mode in (("coupling", "eager"), ("chain", "eager"), ("chain", "traced"), ("multiscale", "traced"))
    ],
)
@pytest.mark.parametrize("before, after", stale_cases())
def test_an_update_is_never_missed(kind, before, after, mode):
    bijector, created, y, x = updatable(kind)
    values = [tf.constant(2.0 * v.numpy() + 0.3) for v in created]

    def function(y, x):
        first = before(bijector, y, x)
        unchanged = after(bijector, y, x)
        for v, value in zip(created, values):
            v.assign(value)
        return first, unchanged, after(bijector, y, x)

    function = tf.function(function, autograph=False) if mode == "traced" else function
    _, unchanged, updated = function(y, x)
    expected = after(bijector, fresh(y), fresh(x))
    assert_close(updated, expected)
    assert np.abs(unchanged - expected).max() > 1e-3


def test_an_update_is_not_missed_on_the_other_side_of_a_pass():
    for kind in ("coupling", "chain", "multiscale"):
        bijector, created, y, _ = updatable(kind)
        x = bijector.inverse(y)
        bijector.inverse_log_det_jacobian(y, 1)
        randomize(created)
        assert_close(bijector.forward_log_det_jacobian(x, 1), bijector.forward_log_det_jacobian(fresh(x), 1))
        assert_close(bijector.forward(x), bijector.forward(fresh(x)))
        assert np.abs(bijector.forward(x) - y).max() > 1e-3


@pytest.mark.parametrize("way", ["assign_add", "optimizer", "cond", "switch_case", "while", "function"])
def test_an_update_by_any_means_inside_a_function_is_not_missed(way):
    bijector = dfb.ActNorm(3, dtype="float64")
    (v,) = [v for v in bijector.variables if "scale" in v.name]
    v.assign([0.5, 1.0, 1.5])
    adopted = dimflows.keras_bridge.adopt(v)
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([adopted])

    def double():
        return v.assign(2.0 * v)

    updates = {
        "assign_add": lambda: v.assign_add(v),
        "optimizer": lambda: optimizer.apply([-v.read_value()], [adopted]),
        "cond": lambda: tf.cond(tf.reduce_sum(v) > 0.0, double, v.read_value),
        "switch_case": lambda: tf.switch_case(tf.cast(v[1], tf.int32), [v.read_value, double]),
        "while": lambda: tf.while_loop(lambda i: i < 1, lambda i: [tf.cast(double()[0], tf.int32) + 1], [0]),
        "function": tf.function(double),
    }

    @tf.function(autograph=False)
    def function(y):
        bijector.inverse(y)
        before = bijector.inverse_log_det_jacobian(y, 1)
        updates[way]()
        return before, bijector.inverse_log_det_jacobian(y, 1)

    before, after = function(normal([2, 3], 1))
    assert_close(tf.broadcast_to(before, [2]), [3.0, 3.0])
    assert_close(tf.broadcast_to(after, [2]), [6.0, 6.0])


def test_full_batch_eager_training_descends_on_the_right_gradients():
    # The same tensor at every step: a stale log-det would freeze part of the gradient.
    bijector, created, y, _ = updatable("chain")
    flow = distribution(bijector, [4])
    for _ in range(3):
        gradients = []
        for batch in (y, fresh(y)):
            with tf.GradientTape() as tape:
                loss = -tf.reduce_mean(flow.log_prob(batch))
            gradients.append(tape.gradient(loss, created))
        for repeated, recomputed in zip(*gradients):
            assert_close(repeated, recomputed)
        for v, gradient in zip(created, gradients[1]):
            v.assign_sub(0.05 * gradient)


@pytest.mark.parametrize("kind", ["coupling", "chain", "multiscale"])
@pytest.mark.parametrize("mode", ["eager", "traced"])
def test_samples_drawn_outside_a_tape_have_gradients_inside(kind, mode):
    bijector, created, _, x = updatable(kind)
    flow = distribution(bijector, x.shape[1:])

    def function():
        sample = flow.sample(3, seed=[1, 2])
        gradients = []
        for y in (sample, tf.identity(sample)):
            with tf.GradientTape() as tape:
                tape.watch(y)
                log_prob = tf.reduce_sum(flow.log_prob(y))
            gradients.append(tape.gradient(log_prob, [*created, y]))
        return gradients

    cached, recomputed = (tf.function(function, autograph=False) if mode == "traced" else function)()
    for actual, expected in zip(cached, recomputed):
        assert actual is not None
        assert_close(actual, expected)


def test_instances_with_equal_arguments_share_nothing():
    y = normal([2, 3], 1)
    first, second = dfb.ActNorm(3, dtype="float64"), dfb.ActNorm(3, dtype="float64")
    randomize(first.variables, 1)
    randomize(second.variables, 2)
    x, ildj = first.inverse(y), first.inverse_log_det_jacobian(y, 1)
    assert np.abs(second.inverse(y) - x).max() > 1e-3
    assert np.abs(second.inverse_log_det_jacobian(y, 1) - ildj).max() > 1e-3
    assert first != second and len({first, second}) == 2


def test_the_cache_tells_conditions_apart():
    coupling = conditional_coupling()
    y, one, other = normal([2, 4], 1), normal([2, 3], 2), normal([2, 3], 3)
    for condition in (one, other, one):
        x, ildj = coupling.inverse(y, condition=condition), coupling.inverse_log_det_jacobian(y, condition=condition)
        assert_close(x, coupling.inverse(fresh(y), condition=condition))
        assert_close(ildj, coupling.inverse_log_det_jacobian(fresh(y), condition=condition))
    assert np.abs(coupling.inverse(y, condition=one) - coupling.inverse(y, condition=other)).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_does_not_grow(kind):
    flow, _ = counted_flow(kind)
    full = distribution(flow, [4])
    sizes = []
    for step in range(6):
        full.log_prob(normal([3, 4], step))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(full.log_prob(full.sample(2)))
        tape.gradient(loss, flow.trainable_variables)
        del tape, loss
        sizes.append(len(dfb.FlowBijector._cache.storage))
    assert sizes[-1] <= sizes[1]
