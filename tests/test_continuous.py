"""Continuous flows: log-dets against autodiff and matrix exponentials, solvers, the recipe `ffjord`."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import assert_close, fresh, normal, randomize

import tfp_dimflows as dimflows
from tfp_dimflows.bijectors import probes

dfb = dimflows.bijectors
D = 3
Y = normal([2, D], 1)
SOLVERS = {
    "rk4": lambda: dfb.continuous.RungeKutta4(24),
    "dopri5": lambda: tfp.math.ode.DormandPrince(rtol=1e-9, atol=1e-9),
}


@pytest.fixture(scope="module")
def net():
    network = dimflows.networks.ConcatSquashNet([D], hidden=[6], seed=0, dtype="float64")
    randomize([v.value for v in network.trainable_variables])
    return network


def inverse_and_log_det(flow, y):
    @tf.function
    def compute(y):
        with tf.GradientTape() as tape:
            tape.watch(y)
            x = flow.inverse(y)
            flat = tf.reshape(x, [len(y), -1])
        jacobian = tf.reshape(tape.batch_jacobian(flat, y, experimental_use_pfor=False), [*flat.shape, -1])
        return x, tf.linalg.slogdet(jacobian)[1]

    return compute(y)


@pytest.mark.slow
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_exact_trace(solver, net):
    flow = dfb.ffjord(net, trace="exact", solver=SOLVERS[solver](), dtype=tf.float64)
    x, log_det = inverse_and_log_det(flow, fresh(Y))
    assert np.abs(log_det).max() > 0.1
    assert_close(flow.inverse_log_det_jacobian(fresh(Y), event_ndims=1), log_det, 1e-6)
    assert_close(flow.forward(fresh(x)), Y, 1e-6)
    assert_close(flow.forward_log_det_jacobian(fresh(x), event_ndims=1), -log_det, 1e-6)
    per_dim = dimflows.inverse_log_det_per_dim(flow, fresh(Y))
    assert per_dim.shape == Y.shape
    assert_close(tf.reduce_sum(per_dim, axis=-1), log_det, 1e-6)


@pytest.mark.slow
def test_a_linear_field_is_the_matrix_exponential():
    matrix = normal([D, D], 2)
    flow = dfb.ffjord(lambda y: y @ matrix, end_time=0.7, trace="exact", solver=SOLVERS["dopri5"](), dtype=tf.float64)
    assert_close(flow.forward(fresh(Y)), Y @ tf.linalg.expm(0.7 * matrix), 1e-6)
    per_dim = dimflows.inverse_log_det_per_dim(flow, fresh(Y))
    assert_close(per_dim, np.broadcast_to(-0.7 * np.diag(matrix), Y.shape), 1e-6)


def test_hutchinson_is_unbiased_and_drawn_anew(net):
    flow = dfb.ffjord(net, solver=dfb.continuous.RungeKutta4(3), dtype=tf.float64)
    exact = dfb.ffjord(net, trace="exact", solver=dfb.continuous.RungeKutta4(3), dtype=tf.float64)
    expected = dimflows.inverse_log_det_per_dim(exact, fresh(Y))
    copies = tf.repeat(Y, 2000, axis=0)
    estimate = tf.function(lambda: dimflows.inverse_log_det_per_dim(flow, tf.identity(copies)))
    first, second = estimate(), estimate()
    assert np.abs(first - second).max() > 1e-3
    samples = tf.reshape(tf.concat([tf.reshape(s, [2, 2000, D]) for s in (first, second)], axis=1), [2, 4000, D]).numpy()
    error = samples.std(axis=1) / np.sqrt(4000)
    assert (np.abs(samples.mean(axis=1) - expected) < 4.0 * error + 1e-9).all()


@pytest.mark.slow
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_gradients_of_the_solvers_agree(solver, net):
    def gradient(flow):
        @tf.function
        def compute(y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(flow.inverse(y) ** 2) + tf.reduce_mean(flow.inverse_log_det_jacobian(y, event_ndims=1))
            return tape.gradient(loss, [v.value for v in net.trainable_variables])

        return compute(fresh(Y))

    fine = gradient(dfb.ffjord(net, trace="exact", solver=dfb.continuous.RungeKutta4(40), dtype=tf.float64))
    for a, b in zip(gradient(dfb.ffjord(net, trace="exact", solver=SOLVERS[solver](), dtype=tf.float64)), fine, strict=True):
        assert np.abs(b).max() > 0.0
        assert_close(a, b, 1e-5)


@pytest.mark.slow
def test_order_of_the_solver(net):
    """Halving the step divides the error of the classic Runge-Kutta method by about 16."""
    exact = dfb.ffjord(net, solver=SOLVERS["dopri5"](), dtype=tf.float64).inverse(fresh(Y))
    errors = [
        np.abs(dfb.ffjord(net, solver=dfb.continuous.RungeKutta4(n), dtype=tf.float64).inverse(fresh(Y)) - exact).max()
        for n in (4, 8)
    ]
    assert 8.0 < errors[0] / errors[1] < 32.0


@pytest.mark.slow
def test_xla_equals_eager(net):
    flow = dfb.ffjord(net, trace="exact", solver=dfb.continuous.RungeKutta4(6), dtype=tf.float64)
    assert_close(tf.function(flow.inverse, jit_compile=True)(fresh(Y)), flow.inverse(fresh(Y)))


def test_layer_formula():
    net = dimflows.networks.ConcatSquashNet([2], hidden=[], seed=0, dtype="float64")
    randomize([v.value for v in net.trainable_variables])
    kernel, bias, gate, gate_bias, shift = (v.numpy() for v in net.trainable_variables)
    y, t = normal([3, 2], 4), np.array([[0.1], [0.5], [2.0]])
    expected = (y @ kernel + bias) / (1.0 + np.exp(-(t @ gate + gate_bias))) + t @ shift
    assert_close(net(y, condition=t), expected)


def test_the_network_is_its_configuration():
    net = dimflows.networks.ConcatSquashNet([4, 4, 1], hidden=[3], activation="softplus", seed=2)
    again = dimflows.networks.ConcatSquashNet.from_config(json.loads(json.dumps(net.get_config())))
    x, t = normal([2, 4, 4, 1], 1, "float32"), tf.ones([2, 1])
    np.testing.assert_array_equal(net(x, condition=t), again(x, condition=t))


@pytest.mark.slow
@pytest.mark.parametrize("event_shape", [[3], [4, 4, 1]], ids=["vector", "image"])
def test_recipe(event_shape):
    options = {"hidden": [6], "num_steps": 8, "num_levels": 1 if len(event_shape) == 1 else 2}
    flow = dimflows.recipes.ffjord(event_shape, trace="exact", **options)
    x = normal([2, *event_shape], 1, "float32")
    z, log_det = inverse_and_log_det(flow.bijector, x)
    assert_close(flow.bijector.forward(fresh(z)), x, 1e-3)
    assert_close(flow.log_prob(fresh(x)), flow.distribution.log_prob(z) + log_det, 1e-3)
    if len(event_shape) == 3:
        contributions = dimflows.likelihood_contributions(flow.bijector, [x])
        assert contributions[0].shape == tuple(event_shape) and np.ptp(contributions[0]) > 0.0


@pytest.mark.slow
def test_training():
    flow = dimflows.recipes.ffjord([2], hidden=[8], num_steps=4)
    model = dimflows.FlowModel(flow, seed=0)
    model.compile(keras.optimizers.Adam(1e-2))
    data = 0.3 * normal([256, 2], 3, "float32") + 1.0
    history = model.fit(data, epochs=6, batch_size=64, verbose=0).history
    assert history["nll"][-1] < history["nll"][0] - 0.3


def test_errors():
    with pytest.raises(ValueError, match=r"ffjord: got trace='none', needs one of \('hutchinson', 'exact'\)"):
        dfb.ffjord(tf.tanh, trace="none")
    with pytest.raises(ValueError, match=r"ffjord: got event_ndims=2"):
        dfb.ffjord(tf.tanh, event_ndims=2)


@pytest.mark.slow
def test_probes_come_from_the_seed_that_is_given(net):
    flow = dfb.ffjord(net, solver=dfb.continuous.RungeKutta4(3), dtype=tf.float64)

    def log_det(seed):
        with probes.probes_from(seed):
            return flow.inverse_log_det_jacobian(fresh(Y), event_ndims=1).numpy()

    assert_close(log_det([1, 2]), log_det([1, 2]), 0.0)
    assert any(np.abs(log_det([1, 2]) - log_det([3, seed])).max() > 1e-3 for seed in range(4))
