"""`MixtureLogisticCDF` and `Spline` against formulas in numpy, in their tails and gaps, and their implicit derivatives."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import (
    BINS,
    BOUND,
    assert_close,
    distribution,
    fresh,
    normal,
    randomize,
    spline_inverse_and_log_det,
)

import tfp_dimflows as dimflows
from tfp_dimflows.bijectors import implicit

dfb = dimflows.bijectors
tfb, tfd = tfp.bijectors, tfp.distributions

NAMES = ("logits", "means", "log_scales", "shift", "log_scale")
both_kinds = pytest.mark.parametrize("smooth", [False, True], ids=["exact", "smooth"])


def parameters(shape=(6,), components=4, scale=2.0, seed=0):
    """Large random parameters, in numpy."""
    generator = np.random.default_rng(seed)
    shapes = [(*shape, components)] * 3 + [shape] * 2
    logits, means, log_scales, shift, log_scale = (scale * generator.normal(size=s) for s in shapes)
    return dict(zip(NAMES, (logits, 3.0 * means, log_scales, shift, np.tanh(log_scale))))


def bijector(p, dtype="float64", **options):
    return dfb.MixtureLogisticCDF(**{k: tf.constant(v, dtype) for k, v in p.items()}, **options)


def log_sigmoid(u):
    return -np.logaddexp(0.0, -u)


def formula(x, p, smooth=False):
    """(z, inverse log-det) at x, everything in logarithms."""
    u = (x[..., np.newaxis] - p["means"]) * np.exp(-p["log_scales"])
    log_weights = p["logits"] - np.logaddexp.reduce(p["logits"], axis=-1, keepdims=True)
    log_cdf = np.logaddexp.reduce(log_weights + log_sigmoid(u), axis=-1)
    log_survival = np.logaddexp.reduce(log_weights + log_sigmoid(-u), axis=-1)
    log_density = np.logaddexp.reduce(log_weights + log_sigmoid(u) + log_sigmoid(-u) - p["log_scales"], axis=-1)
    if smooth:
        log_cdf, log_survival = (np.log(0.9 * np.exp(log) + 0.05) for log in (log_cdf, log_survival))
        log_density = log_density + np.log(0.9)
    z = np.exp(p["log_scale"]) * (log_cdf - log_survival) + p["shift"]
    return z, p["log_scale"] + log_density - log_cdf - log_survival


# Values and log-dets.


@both_kinds
@pytest.mark.parametrize("seed", range(3))
def test_inverse_is_the_formula(smooth, seed):
    p = parameters(seed=seed)
    x = 8.0 * np.random.default_rng(seed + 10).normal(size=[50, 6])
    z, log_det = formula(x, p, smooth)
    b = bijector(p, smooth=smooth)
    assert_close(b.inverse(tf.constant(x)), z, 1e-12)
    assert_close(b.inverse_log_det_per_dim(tf.constant(x)), log_det, 1e-11)
    assert_close(b.inverse_log_det_jacobian(tf.constant(x), event_ndims=0), log_det, 1e-11)
    assert_close(b.inverse_log_det_jacobian(tf.constant(x), event_ndims=1), log_det.sum(-1), 1e-11)


def test_the_inverse_of_one_component_without_shift_and_scale_by_hand():
    b = dfb.MixtureLogisticCDF(logits=[5.0], means=[2.0], log_scales=[float(np.log(4.0))])
    np.testing.assert_allclose(b.inverse([-6.0, 2.0, 4.0]), [-2.0, 0.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(b.inverse_log_det_per_dim([-6.0, 2.0, 4.0]), 3 * [-np.log(4.0)], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_round_trip_from_the_latent(seed):
    b = bijector(parameters(seed=seed))
    z = 8.0 * normal([200, 6], seed + 20)
    x = b.forward(z)
    assert_close(b.inverse(fresh(x)), z, 1e-10)
    _, log_det = formula(x.numpy(), parameters(seed=seed))
    assert_close(b.forward_log_det_per_dim(z), -log_det, 1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_round_trip_from_the_data(seed):
    p = parameters(scale=1.0, seed=seed)
    x = 4.0 * normal([200, 6], seed + 30)
    b = bijector(p)
    assert_close(b.forward(b.inverse(x)), x, 1e-9)
    single = bijector(p, "float32")
    x = tf.cast(x, "float32")
    z, log_det = formula(x.numpy().astype("float64"), p)
    # An error of the latent in float32 is one of the data times the slope.
    error = 1e-6 * (1.0 + np.abs(x)) + 3e-6 * (1.0 + np.abs(z)) * np.exp(-log_det)
    assert (np.abs(single.forward(single.inverse(x)) - x) < error).all()


@both_kinds
def test_forward_is_increasing(smooth):
    b = bijector(parameters([1]), smooth=smooth)
    z = tf.constant(np.linspace(-30.0, 30.0, 2001)[:, np.newaxis])
    x = b.forward(z).numpy()
    assert (np.diff(x[:, 0]) >= 0.0).all() and np.isfinite(x).all()
    assert smooth or (np.diff(x[:, 0]) > 0.0).all()


@pytest.mark.parametrize("components", [1, 5])
@pytest.mark.parametrize("equal", ["equal", "one"])
def test_one_logistic_is_an_affine_map(components, equal):
    """One component, or many that are all the same: logit(F(x)) = (x - mu) / scale."""
    p = parameters([3], 1, seed=4)
    p |= {k: np.repeat(p[k], components, axis=-1) for k in ("means", "log_scales")}
    p["logits"] = np.random.default_rng(0).normal(size=[3, components]) if equal == "equal" else np.zeros([3, components])
    b = bijector(p)
    x, z = 50.0 * normal([20, 3], 1), 50.0 * normal([20, 3], 2)
    mu, ls = p["means"][:, 0], p["log_scales"][:, 0]
    assert_close(b.inverse(x), np.exp(p["log_scale"]) * (x - mu) * np.exp(-ls) + p["shift"], 1e-12)
    assert_close(b.forward(z), mu + np.exp(ls - p["log_scale"]) * (z - p["shift"]), 1e-12)
    for log_det in (b.inverse_log_det_per_dim(x), -b.forward_log_det_per_dim(z)):
        assert_close(log_det, np.broadcast_to(p["log_scale"] - ls, x.shape), 1e-11)


# Tails and gaps.


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("size", [1e3, 1e5])
def test_both_tails(dtype, tolerance, size):
    p = parameters(components=3, scale=1.0, seed=5)
    x = np.concatenate([np.full([1, 6], -size), np.full([1, 6], size)])
    z, log_det = formula(x, p)
    b = bijector(p, dtype)
    values = tf.constant(x, dtype)
    np.testing.assert_allclose(b.inverse(values), z, rtol=10 * tolerance)
    np.testing.assert_allclose(b.inverse_log_det_per_dim(values), log_det, atol=10 * tolerance)
    np.testing.assert_allclose(b.forward(fresh(b.inverse(values))), x, rtol=10 * tolerance)
    latent = tf.constant(x, dtype)
    np.testing.assert_allclose(b.inverse(fresh(b.forward(latent))), x, rtol=10 * tolerance)
    assert np.isfinite(b.forward_log_det_per_dim(latent)).all()


def test_the_far_tail_is_that_of_the_widest_component():
    p = {"logits": [[0.0, 0.0]], "means": [[0.0, 0.0]], "log_scales": [[0.0, 1.0]], "shift": [0.0], "log_scale": [0.0]}
    b = bijector(p)
    slopes = b.inverse_log_det_per_dim(tf.constant([[-1e4], [1e4]], tf.float64))
    assert_close(slopes, [[-1.0], [-1.0]], 1e-7)


@both_kinds
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_gap_without_density_gives_no_nan(smooth, dtype):
    """Between components that are 2e5 scales apart, the density underflows, and the distribution function is flat."""
    p = {
        "logits": np.array([[0.0, 1.0]]),
        "means": np.array([[-100.0, 100.0]]),
        "log_scales": np.array([[-7.0, -7.0]]),
        "shift": np.zeros([1]),
        "log_scale": np.zeros([1]),
    }
    variables = {k: tf.Variable(tf.constant(v, dtype)) for k, v in p.items()}
    x = tf.constant([[-100.0], [-99.0], [0.0], [10.0], [99.9], [101.0]], dtype)
    z = tf.constant([[-8.0], [-1.0001], [-1.0], [-0.9999], [0.0], [1.0], [8.0]], dtype)
    for direction, value in (("inverse", x), ("forward", z)):
        with tf.GradientTape() as tape:
            tape.watch(value)
            b = dfb.MixtureLogisticCDF(**variables, smooth=smooth)
            result, log_det = getattr(b, direction)(value), getattr(b, f"{direction}_log_det_per_dim")(value)
            total = tf.reduce_sum(result) + tf.reduce_sum(log_det)
        assert np.isfinite(result).all() and np.isfinite(log_det).all()
        for gradient in tape.gradient(total, [value, *variables.values()]):
            assert not np.isnan(gradient).any()
    if not smooth:
        assert_close(b.inverse(x[2:4]), [[-1.0], [-1.0]], 1e-6)  # the logit of the left component's weight
        y = b.forward(z)
        assert (np.abs(y) < 101.0).all() and (np.diff(y[:, 0]) >= 0.0).all()
        # Around -100, float32 resolves the data to 8e-6, at a slope of exp(7).
        assert_close(b.inverse(fresh(y)), z, 2e-2 if dtype == "float32" else 1e-10)


def test_narrow_components_that_the_transformer_clips():
    params = np.array([[0.5, 0.2, 0.3, -0.4, 1.0, -1.0, -50.0, -7.5]])
    clipped = params.copy()
    clipped[:, 6:] = -7.0
    transformer = dfb.transformers.MixtureLogistic(num_components=2)
    x = tf.constant([-1.0, 0.3, 1.0001], tf.float64)
    b, c = (transformer(tf.constant(np.repeat(v, 3, axis=0))) for v in (params, clipped))
    assert_close(b.inverse(x), c.inverse(x), 0.0)
    assert_close(b.inverse_log_det_per_dim(x), c.inverse_log_det_per_dim(x), 0.0)
    assert_close(b.forward(x), c.forward(x), 0.0)
    above = transformer(tf.constant(np.repeat(np.where(params < -7.0, -6.9, params), 3, axis=0)))
    assert np.abs(above.inverse(x) - b.inverse(x)).max() > 1e-2


def test_order_of_the_transformers_parameters():
    """a, t, K logits, K means, K log-scales; the scale is exp(tanh(a))."""
    p = parameters([5], 3, scale=1.0, seed=6)
    raw = np.random.default_rng(1).normal(size=[5])
    params = np.concatenate([raw[:, np.newaxis], p["shift"][:, np.newaxis], p["logits"], p["means"], p["log_scales"]], axis=-1)
    transformer = dfb.transformers.MixtureLogistic(num_components=3)
    assert transformer.params_per_dim == params.shape[-1] == 11
    x = normal([4, 5], 2)
    z, log_det = formula(x.numpy(), p | {"log_scale": np.tanh(raw)})
    assert_close(transformer(tf.constant(params)).inverse(x), z, 1e-12)
    assert_close(transformer(tf.constant(params)).inverse_log_det_per_dim(x), log_det, 1e-12)


# Derivatives.


@both_kinds
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("what", ["value", "log_det"])
def test_gradients_are_those_of_finite_differences(smooth, direction, what):
    p = parameters([3], 3, scale=0.7, seed=7)
    p["log_scale"] = np.full([3], 0.3)
    value = np.array([[-1.5, 0.4, 1.2], [0.3, -0.8, 0.1]])
    weights = normal(value.shape, 3)
    arguments = {"value": value, **p}

    def function(**arguments):
        value = arguments.pop("value")
        b = dfb.MixtureLogisticCDF(**arguments, smooth=smooth)
        method = direction if what == "value" else f"{direction}_log_det_per_dim"
        return tf.reduce_sum(weights * getattr(b, method)(value))

    traced = tf.function(function, autograph=False)
    tensors = {k: tf.constant(v) for k, v in arguments.items()}
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        result = function(**tensors)
    gradients = tape.gradient(result, tensors, unconnected_gradients="zero")
    for name, v in arguments.items():
        numerical = np.empty_like(v)
        for index in np.ndindex(v.shape):
            step = np.zeros_like(v)
            step[index] = 1e-5
            higher, lower = (traced(**(tensors | {name: tf.constant(v + sign * step)})) for sign in (1.0, -1.0))
            numerical[index] = (higher - lower) / 2e-5
        np.testing.assert_allclose(gradients[name], numerical, rtol=2e-5, atol=2e-6, err_msg=name)
        assert np.abs(numerical).max() > 1e-3 or (name in ("shift", "log_scale") and what == "log_det"), name


def test_gradients_of_log_prob_and_sample_of_a_coupling_agree():
    """d/dw of f(f^-1(x; w); w) is zero: the implicit derivatives cancel those of the formula."""
    network = [tf.Variable(0.5 * normal([2, 22], 1)), tf.Variable(0.5 * normal([22], 2))]
    coupling = dfb.MixtureLogisticCoupling(
        lambda x: x @ network[0] + network[1], dfb.masks.Channel(event_ndims=1), num_components=3
    )
    x, weights = normal([5, 4], 3), normal([5, 4], 4)
    with tf.GradientTape() as tape:
        z = tf.identity(coupling.inverse(x))
        total = tf.reduce_sum(weights * coupling.forward(z))
    for gradient in tape.gradient(total, network):
        assert_close(gradient, np.zeros(gradient.shape), 1e-8)
    with tf.GradientTape() as tape:
        z = tf.identity(coupling.inverse(x))
        total = tf.reduce_sum(coupling.inverse_log_det_jacobian(x, 1) + coupling.forward_log_det_jacobian(z, 1))
    for gradient in tape.gradient(total, network):
        assert_close(gradient, np.zeros(gradient.shape), 1e-7)


@pytest.mark.parametrize("size", [1e3, 1e5])
def test_gradients_in_the_tails_are_those_of_the_widest_component(size):
    log_scales = tf.constant([[0.0, 0.5]], tf.float32)
    for direction, slope in (("inverse", np.exp(-0.5)), ("forward", np.exp(0.5))):
        value = tf.constant([[-size], [size]], tf.float32)
        with tf.GradientTape() as tape:
            tape.watch([value, log_scales])
            b = dfb.MixtureLogisticCDF(tf.zeros([1, 2]), tf.zeros([1, 2]), log_scales)
            result = getattr(b, direction)(value)
        gradient, of_scales = tape.gradient(result, [value, log_scales])
        np.testing.assert_allclose(gradient, [[slope], [slope]], rtol=0.1)
        assert np.isfinite(of_scales).all()


# The smooth map.


def test_smooth_is_the_logit_of_a_shrunk_distribution_function():
    p = parameters(scale=1.0, seed=8)
    x = 3.0 * normal([20, 6], 1).numpy()
    u = (x[..., np.newaxis] - p["means"]) * np.exp(-p["log_scales"])
    weights = np.exp(p["logits"]) / np.exp(p["logits"]).sum(-1, keepdims=True)
    shrunk = 0.9 * (weights / (1.0 + np.exp(-u))).sum(-1) + 0.05
    expected = np.exp(p["log_scale"]) * np.log(shrunk / (1.0 - shrunk)) + p["shift"]
    assert_close(bijector(p, smooth=True).inverse(tf.constant(x)), expected, 1e-11)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_image_of_the_smooth_map_is_bounded(dtype):
    p = parameters(scale=1.0, seed=9)
    b = bijector(p, dtype, smooth=True)
    x = tf.constant(np.linspace(-1e4, 1e4, 400)[:, np.newaxis] * np.ones([6]), dtype)
    z, log_det = b.inverse(x).numpy(), b.inverse_log_det_per_dim(x).numpy()
    end = np.exp(p["log_scale"]) * np.log(19.0)
    np.testing.assert_allclose(z[0], p["shift"] - end, rtol=1e-5)
    np.testing.assert_allclose(z[-1], p["shift"] + end, rtol=1e-5)
    assert (np.diff(z, axis=0) >= 0.0).all() and np.isfinite(log_det).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_beyond_the_image_forward_stays_at_its_ends(dtype):
    p = parameters(scale=1.0, seed=9)
    b = bijector(p, dtype, smooth=True)
    end = np.exp(p["log_scale"]) * np.log(19.0)
    z = np.array([[-1e6], [-50.0], [-1.0001], [1.0001], [50.0], [1e6]]) * end + p["shift"]
    value = tf.constant(z, dtype)
    with tf.GradientTape() as tape:
        tape.watch(value)
        x = b.forward(value)
    log_det = b.forward_log_det_per_dim(value)
    assert np.isfinite(x).all() and np.isfinite(log_det).all()
    np.testing.assert_array_equal(tape.gradient(x, value), np.zeros([6, 6]))
    np.testing.assert_allclose(x[:3], np.broadcast_to(x[0], [3, 6]), rtol=1e-5)
    np.testing.assert_allclose(x[3:], np.broadcast_to(x[-1], [3, 6]), rtol=1e-5)
    np.testing.assert_allclose(b.inverse(fresh(x)).numpy()[[0, -1]], [p["shift"] - end, p["shift"] + end], rtol=1e-4)


def test_round_trip_of_the_smooth_map_within_its_image():
    p = parameters(scale=1.0, seed=9)
    b = bijector(p, smooth=True)
    end = np.exp(p["log_scale"]) * np.log(19.0)
    z = tf.constant(np.linspace(-0.99, 0.99, 41)[:, np.newaxis] * end + p["shift"])
    x = b.forward(z)
    assert_close(b.inverse(fresh(x)), z, 1e-10)
    assert_close(b.forward_log_det_per_dim(z), -formula(x.numpy(), p, smooth=True)[1], 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_total_probability(seed):
    """1 for the exact map; for the smooth one what the base has within the image."""
    p = parameters([1], 3, scale=0.7, seed=seed)
    grid = np.linspace(-400.0, 400.0, 800_001)
    total = {}
    for smooth in (False, True):
        flow = distribution(bijector(p, smooth=smooth), [1])
        total[smooth] = np.exp(flow.log_prob(grid[:, np.newaxis]).numpy()).sum() * (grid[1] - grid[0])
    ends = p["shift"][0] + np.exp(p["log_scale"][0]) * np.log(19.0) * np.array([-1.0, 1.0])
    image = np.diff(tfd.Normal(np.float64(0.0), 1.0).cdf(ends).numpy())[0]
    assert abs(total[False] - 1.0) < 1e-5
    assert abs(total[True] - image) < 1e-5 and total[True] < total[False] - 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixture", "spline"])
def test_couplings_integrate_to_one_on_the_plane(kind):
    mask, parts = dfb.masks.Index([0], size=2), []
    for seed in range(2):
        transformer = dfb.transformers.MixtureLogistic(3) if kind == "mixture" else dfb.transformers.Spline(BINS, BOUND)
        options = {"hidden": [8], "activation": "tanh", "zero_init": False, "seed": seed, "dtype": "float64"}
        network = dimflows.networks.MLP(1, transformer.params_per_dim, **options)
        parts.append(
            dfb.MixtureLogisticCoupling(network, mask, 3)
            if kind == "mixture"
            else dfb.SplineCoupling(network, mask, BINS, BOUND)
        )
        mask = mask.complement()
    side = np.linspace(-30.0, 30.0, 1201)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    total = np.exp(distribution(dfb.Chain(parts), [2]).log_prob(grid).numpy()).sum() * (side[1] - side[0]) ** 2
    assert abs(total - 1.0) < 1e-3


def test_samples_of_the_exact_map_have_its_distribution():
    p = parameters([1], 3, scale=0.7, seed=1)
    flow = distribution(bijector(p), [1])
    x = np.sort(flow.sample(4000, seed=[1, 2]).numpy()[:, 0])
    cdf = tfd.Normal(np.float64(0.0), 1.0).cdf(bijector(p).inverse(tf.constant(x[:, np.newaxis]))[:, 0]).numpy()
    assert np.abs(cdf - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / np.sqrt(4000)  # Kolmogorov-Smirnov, 0.1 percent


# Modes of execution.


@pytest.mark.slow
@pytest.mark.parametrize("smooth, dtype, tolerance", [(False, "float64", 1e-11), (True, "float32", 2e-5)])
def test_eager_traced_and_compiled_agree(smooth, dtype, tolerance):
    p = parameters(scale=0.7, seed=2)
    values = {"y": tf.cast(2.0 * normal([7, 6], 1), dtype), "x": tf.cast(0.5 * normal([7, 6], 2), dtype)}
    variables = [tf.Variable(tf.constant(v, dtype)) for v in p.values()]

    def function(y, x):
        with tf.GradientTape() as tape:
            tape.watch([y, x])
            b = dfb.MixtureLogisticCDF(*variables, smooth=smooth)
            results = [b.inverse(y), b.inverse_log_det_per_dim(y), b.forward(x), b.forward_log_det_per_dim(x)]
            total = sum(tf.reduce_sum(tf.sin(r)) for r in results)
        return results, tape.gradient(total, [y, x, *variables])

    eager = tf.nest.flatten(function(**values))
    for compiled in (False, True):
        traced = tf.function(function, autograph=False, jit_compile=compiled)
        for actual, expected in zip(tf.nest.flatten(traced(**values)), eager, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_bisection_finds_every_number(dtype):
    largest = np.finfo(dtype).max
    x = np.array([0.0, 6e-5, -6e-5, 1.0, -1.0, -3.7, 1000.5, largest, -largest, np.nextafter(2.0, 3.0, dtype=dtype)], dtype)
    root = implicit.bisect(tf.identity, tf.constant(x), tf.fill(x.shape, -largest), tf.fill(x.shape, largest))
    np.testing.assert_allclose(root, x, rtol=0.0, atol=np.finfo(dtype).tiny)  # below that, numbers may count as zero


def test_a_wide_component_does_not_cost_a_narrow_one_its_digits():
    b = dfb.MixtureLogisticCDF([0.0, 0.0], [0.3, 0.0], tf.constant([-7.0, 20.0]))
    z = tf.constant([-0.9, 0.0, 0.9])
    np.testing.assert_allclose(b.inverse(fresh(b.forward(z))), z, atol=1e-4)


def test_variables_as_parameters_are_followed():
    p = parameters(components=2, scale=0.7)
    variables = {name: tf.Variable(value) for name, value in p.items()}
    b, x = dfb.MixtureLogisticCDF(**variables), normal([5, 6], 1)
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(b.inverse(x) ** 2)
    assert all(np.abs(g).max() > 0.0 for g in tape.gradient(total, list(variables.values())))
    assert_close(b.inverse(fresh(x)), formula(x.numpy(), p)[0])
    changed = parameters(components=2, scale=0.7, seed=1)
    for name, variable in variables.items():
        variable.assign(changed[name])
    assert_close(b.inverse(fresh(x)), formula(x.numpy(), changed)[0])
    assert_close(b.forward(b.inverse(fresh(x)) + 0.0), x)


def test_the_number_of_steps_does_not_depend_on_the_data():
    """XLA can only compile a loop with its gradient if the number of iterations is fixed."""
    graph = tf.function(lambda z: bijector(parameters()).forward(z)).get_concrete_function(normal([2, 6])).graph
    (loop,) = [op for op in graph.get_operations() if "While" in op.type]
    cond = graph._get_function(loop.get_attr("cond").name).graph
    assert {op.type for op in cond.get_operations()} <= {"Placeholder", "Const", "Less", "LogicalAnd", "Identity"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_values_are_solved_in_the_parameters_precision(dtype):
    p = parameters(scale=0.7, seed=2)
    b = bijector(p, "float32")
    for direction, value in (("inverse", 2.0 * normal([7, 6], 1)), ("forward", normal([7, 6], 2))):
        value = tf.cast(value, dtype)
        result, log_det = getattr(b, direction)(value), getattr(b, f"{direction}_log_det_per_dim")(value)
        precise = getattr(b, direction)(tf.cast(value, "float32"))
        assert result.dtype == value.dtype and log_det.dtype == tf.float32
        np.testing.assert_allclose(tf.cast(result, "float32"), precise, rtol=0.01)
        np.testing.assert_allclose(log_det, getattr(b, f"{direction}_log_det_per_dim")(tf.cast(value, "float32")), rtol=1e-5)


# Couplings.


def test_a_mixture_coupling_trains_in_float32_from_extreme_parameters():
    """Gradients stay finite for every output of a network, however large."""
    params = tf.Variable(20.0 * normal([1, 2 * 11], 1, "float32"))
    coupling = dfb.MixtureLogisticCoupling(
        lambda x: tf.repeat(params, tf.shape(x)[0], axis=0), dfb.masks.Channel(event_ndims=1), num_components=3
    )
    flow = distribution(coupling, [4], "float32")
    for value in (normal([50, 4], 2, "float32"), 100.0 * normal([50, 4], 3, "float32")):
        with tf.GradientTape() as tape:
            log_prob = flow.log_prob(value)
        assert np.isfinite(log_prob).all()
        assert np.isfinite(tape.gradient(log_prob, params)).all()
    with tf.GradientTape() as tape:
        sample = coupling.forward(normal([50, 4], 4, "float32"))
    assert np.isfinite(sample).all()
    assert not np.isnan(tape.gradient(sample, params)).any()


def test_a_smooth_coupling_passes_its_setting_on():
    network = lambda x: tf.zeros([x.shape[0], 2 * 8], x.dtype)  # noqa: E731
    options = {"mask": dfb.masks.Channel(event_ndims=1), "num_components": 2}
    x = tf.constant([[0.0, 0.0, 1e3, -1e3]])
    smooth = dfb.MixtureLogisticCoupling(network, smooth=True, **options).inverse(x)
    exact = dfb.MixtureLogisticCoupling(network, **options).inverse(x)
    np.testing.assert_allclose(smooth, [[0.0, 0.0, np.log(19.0), -np.log(19.0)]], rtol=1e-5)
    np.testing.assert_allclose(exact, x, rtol=1e-5)


def test_a_coupling_of_another_number_of_parameters():
    for coupling, needed in (
        (dfb.MixtureLogisticCoupling(lambda x: x, dfb.masks.Channel(event_ndims=1), num_components=2), 8),
        (dfb.SplineCoupling(lambda x: x, dfb.masks.Channel(event_ndims=1), num_bins=3), 8),
    ):
        with pytest.raises(ValueError, match=f"{coupling.name}: the network .* needs {needed} per entry: a last axis of 16"):
            coupling.inverse(tf.ones([1, 4]))


def test_transformers_need_components():
    with pytest.raises(ValueError, match="MixtureLogistic: got num_components=0, needs at least 1"):
        dfb.transformers.MixtureLogistic(num_components=0)
    with pytest.raises(ValueError, match="Spline: got num_bins=0, needs at least 1"):
        dfb.transformers.Spline(num_bins=0)


# Splines.


def spline(params, num_bins=BINS, bound=BOUND):
    return dfb.transformers.Spline(num_bins, bound)(tf.convert_to_tensor(params))


def test_a_spline_is_that_of_the_paper():
    params = 2.0 * normal([60, 3 * BINS - 1], 1)
    y = tf.constant(np.random.default_rng(2).uniform(-1.3 * BOUND, 1.3 * BOUND, size=[60]))
    expected = [spline_inverse_and_log_det(v, p, BINS, BOUND) for v, p in zip(y.numpy(), params.numpy())]
    x, log_det = np.transpose(expected)
    b = spline(params)
    assert_close(b.inverse(y), x, 1e-9)
    assert_close(b.inverse_log_det_jacobian(y, event_ndims=0), log_det, 1e-8)
    assert_close(b.forward(tf.constant(x)), y, 1e-9)


@pytest.mark.parametrize("num_bins, bound", [(1, 1.0), (2, 5.0), (8, 3.0)])
def test_a_spline_of_zero_parameters_is_the_identity(num_bins, bound):
    values = tf.constant(np.linspace(-2.0 * bound, 2.0 * bound, 41))
    b = spline(tf.zeros([41, 3 * num_bins - 1], tf.float64), num_bins, bound)
    assert_close(b.forward(values), values, 1e-12)
    assert_close(b.inverse(values), values, 1e-12)
    assert_close(b.inverse_log_det_jacobian(values, event_ndims=0), np.zeros(41), 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-3)])
def test_a_spline_is_the_identity_outside_and_increasing_inside(dtype, tolerance):
    params = tf.cast(tf.repeat(3.0 * normal([1, 3 * BINS - 1], 4), 401, axis=0), dtype)
    values = np.linspace(-1.5 * BOUND, 1.5 * BOUND, 401)
    outside = np.abs(values) >= BOUND
    b, values = spline(params), tf.constant(values, dtype)
    for direction in ("forward", "inverse"):
        result = getattr(b, direction)(values).numpy()
        log_det = getattr(b, f"{direction}_log_det_jacobian")(values, event_ndims=0).numpy()
        assert_close(result[outside], values[outside], 1e-6)
        assert (np.diff(result) > 0.0).all() and (np.abs(result[~outside]) <= BOUND).all()
        assert np.isfinite(log_det).all() and not log_det[np.abs(values) > BOUND].any()
    assert_close(b.forward(fresh(b.inverse(values))), values, tolerance)


def test_a_spline_of_extreme_parameters_stays_finite():
    params = tf.Variable(30.0 * normal([200, 3 * 8 - 1], 5, "float32"))
    y = tf.constant(np.linspace(-6.0, 6.0, 200), tf.float32)
    with tf.GradientTape() as tape:
        b = dfb.transformers.Spline()(params)
        x, log_det = b.inverse(y), b.inverse_log_det_jacobian(y, event_ndims=0)
    assert np.isfinite(x).all() and np.isfinite(log_det).all()
    assert not np.isnan(tape.gradient([x, log_det], params)).any()
    assert np.isfinite(b.forward(y)).all()


def test_a_spline_coupling_learns_every_variable():
    network = tf.Variable(normal([2, 2 * 11], 1))
    coupling = dfb.SplineCoupling(lambda x: x @ network, dfb.masks.Channel(event_ndims=1), num_bins=4)
    randomize([network])
    with tf.GradientTape() as tape:
        loss = distribution(coupling, [4]).log_prob(normal([50, 4], 2))
    gradient = tape.gradient(loss, network).numpy()
    assert np.isfinite(gradient).all() and (np.abs(gradient) > 0.0).mean() > 0.9
