"""Invertible residual blocks and their estimators against exact determinants, Lipschitz layers, i-ResNet and Residual Flows."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import ConditionalContraction, Contraction, assert_close, fresh, normal, numerical_jacobian, slow

import tfp_dimflows as dimflows
from tfp_dimflows import recipes
from tfp_dimflows.bijectors import probes
from tfp_dimflows.networks.lipschitz import _Spectral

dfb, networks = dimflows.bijectors, dimflows.networks
residual = dfb.residual
tfb, tfd = tfp.bijectors, tfp.distributions

D, COPIES, CALLS = 4, 250, 120
Y = normal([3, D], 1)
WEIGHTS = tf.constant([1.0, -2.0, 3.0], tf.float64)  # unequal ones of the examples


@pytest.fixture(scope="module")
def branch():
    return Contraction((D,), (D,), 2)


def jacobian(branch, y=Y):
    """`[B, D, D]` of the branch."""
    with tf.GradientTape() as tape:
        tape.watch(y)
        g = branch(y)
    return tape.batch_jacobian(g, y).numpy()


def variables(branch):
    return [v.value for v in branch.trainable_variables]


def exact(branch):
    """Log-dets of the examples, the diagonals of log(I + J), and the gradient of the weighted log-dets."""
    block = dfb.InvertibleResidual(branch, residual.ExactLogDet())
    with tf.GradientTape() as tape:
        log_det = block.inverse_log_det_jacobian(fresh(Y), event_ndims=1)
        total = tf.reduce_sum(WEIGHTS * log_det)
    gradient = tape.gradient(total, variables(branch), unconnected_gradients="zero")
    return log_det.numpy(), block.inverse_log_det_per_dim(fresh(Y)).numpy(), _flat(gradient)


def _flat(gradients):
    return np.concatenate([np.ravel(g) for g in gradients])


ESTIMATORS = {
    "poisson": lambda: residual.RussianRoulette(num_exact_evaluation=1),
    "poisson_from_the_first": lambda: residual.RussianRoulette(rate=3.0, num_exact_evaluation=0),
    "geometric": lambda: residual.RussianRoulette("geometric", num_exact_evaluation=0),
    "two_probes": lambda: residual.RussianRoulette(num_exact_evaluation=1, num_probes=2),
    "series": lambda: residual.PowerSeries(60),
}


def test_exact_log_det_gradient_is_that_of_slogdet(branch):
    with tf.GradientTape() as tape:
        with tf.GradientTape() as inner:
            inner.watch(Y)
            x = Y + branch(Y)
        expected = tf.reduce_sum(WEIGHTS * tf.linalg.slogdet(inner.batch_jacobian(x, Y))[1])
    assert_close(exact(branch)[2], _flat(tape.gradient(expected, variables(branch), unconnected_gradients="zero")), 1e-8)


@pytest.mark.parametrize("name", [name if name in ("geometric", "two_probes") else slow(name) for name in ESTIMATORS])
def test_estimates_are_unbiased(name, branch):
    """Values, contributions and gradients, with unequal weights of the examples, within 4 standard errors."""
    block = dfb.InvertibleResidual(branch, ESTIMATORS[name]())
    copies = tf.repeat(Y, COPIES, axis=0)

    @tf.function
    def draw():
        with tf.GradientTape() as tape:
            per_dim = block.inverse_log_det_per_dim(copies)
            per_dim = tf.reduce_mean(tf.reshape(per_dim, [3, COPIES, D]), axis=1)
            total = tf.reduce_sum(WEIGHTS * tf.reduce_sum(per_dim, axis=-1))
        return per_dim, tape.gradient(total, variables(branch), unconnected_gradients="zero")

    draws = [draw() for _ in range(CALLS)]
    per_dim = np.array([d[0] for d in draws])
    gradients = np.array([_flat(d[1]) for d in draws])
    log_det, diagonal, gradient = exact(branch)
    for samples, expected in ((per_dim.sum(-1), log_det), (per_dim, diagonal), (gradients, gradient)):
        error = samples.std(axis=0, ddof=1) / np.sqrt(CALLS)
        # The largest of many: 4.5 standard errors for the hundred entries of a gradient.
        assert (np.abs(samples.mean(axis=0) - expected) <= 4.5 * error + 1e-9).all()
    assert np.abs(gradient).max() > 0.1


def test_the_value_is_the_series_and_not_the_surrogate(branch):
    """With a fixed seed the estimate is that of powers of the Jacobian, and its weights those of the roulette."""
    roulette = residual.RussianRoulette(num_exact_evaluation=2, seed=(3, 4))
    estimate = dfb.InvertibleResidual(branch, roulette).inverse_log_det_per_dim(fresh(Y)).numpy()
    v_seed, n_seed = tf.unstack(tfp.random.split_seed((3, 4), n=2, salt="russian_roulette"))
    v = tf.random.stateless_normal(Y.shape, v_seed, dtype=tf.float64).numpy()
    u = float(tf.random.stateless_uniform([], n_seed, dtype=tf.float64))
    poisson, j = tfd.Poisson(tf.constant(2.0, tf.float64)), jacobian(branch)
    total, w, k = np.zeros_like(v), v, 1
    while k <= 2 or u < 1.0 - poisson.cdf(float(k - 3)).numpy():
        w = np.einsum("bi,bij->bj", w, j)
        weight = 1.0 if k <= 2 else 1.0 / (1.0 - poisson.cdf(float(k - 3)).numpy())
        total += (-1.0) ** (k + 1) / k * weight * w * v
        k += 1
    assert_close(estimate, total)


@pytest.mark.parametrize(("distribution", "rate"), [("poisson", 2.0), ("geometric", 0.3)])
def test_survival(distribution, rate):
    m = np.arange(1.0, 12.0)
    survival = residual.RussianRoulette(distribution, rate).survival(tf.constant(m)).numpy()
    if distribution == "poisson":
        expected = 1.0 - tfd.Poisson(np.float64(rate)).cdf(m - 1.0).numpy()
    else:
        expected = 1.0 - tfd.Geometric(probs=np.float64(rate)).cdf(m - 2.0).numpy()
    assert_close(survival, expected, 1e-10)


@pytest.mark.parametrize("jit_compile", [False, slow(True)], ids=["graph", "xla"])
def test_probes_and_terms_are_drawn_anew_at_every_call(jit_compile, branch):
    def compiled(seed):
        block = dfb.InvertibleResidual(branch, residual.RussianRoulette(seed=seed))
        return tf.function(lambda y: block.inverse_log_det_jacobian(y, event_ndims=1), jit_compile=jit_compile)

    free, fixed = compiled(None), compiled((0, 1))
    draws = np.array([free(Y) for _ in range(8)])
    assert len(np.unique(draws[:, 0])) == 8
    np.testing.assert_array_equal(fixed(Y), fixed(Y))


def test_training_draws_fewer_exact_terms(branch):
    """Keras's training flag decides on the number of terms."""
    counts = []

    class Counting(residual.RussianRoulette):
        def per_dim(self, vjp, y, event_ndims):
            calls = []
            super().per_dim(lambda w: calls.append(1) or vjp(w), y, event_ndims)
            counts.append(len(calls))
            return tf.zeros_like(y)

    block = dfb.InvertibleResidual(branch, Counting(num_exact=3, num_exact_evaluation=15))

    class Call(keras.Model):
        def call(self, y, training=False):
            return block.inverse(y)

    model = Call(dtype="float64")
    for training in (True, False):
        model(fresh(Y), training=training)
    assert 3 < counts[0] < 15 < counts[1]


def test_truncation_error_is_within_its_bound(branch):
    exact_log_det = exact(branch)[0]
    j = jacobian(branch)
    lipschitz = np.linalg.norm(j, 2, axis=(1, 2)).max()
    for n in (1, 3, 6):
        powers = [np.linalg.matrix_power(j, k).trace(axis1=1, axis2=2) for k in range(1, n + 1)]
        series = sum((-1.0) ** (k + 1) / k * trace for k, trace in enumerate(powers, 1))
        bound = -np.log(1.0 - lipschitz) - sum(lipschitz**k / k for k in range(1, n + 1))
        assert (np.abs(series - exact_log_det) <= D * bound).all()


@pytest.mark.parametrize("mode", ["eager", "graph", slow("xla")])
@pytest.mark.parametrize("conditional", [slow(False), True])
def test_saving_memory_changes_no_gradient(mode, conditional):
    """With unequal weights of the examples, and a gradient of the values as well."""
    net = ConditionalContraction((D,), (D,), (2,), 3) if conditional else Contraction((D,), (D,), 2)
    kwargs = {"condition": normal([3, 2], 8)} if conditional else {}

    def gradients(memory):
        roulette = residual.RussianRoulette(num_exact_evaluation=3, seed=(1, 2))
        block = dfb.InvertibleResidual(net, roulette, memory=memory)

        def compute(y, kwargs):
            with tf.GradientTape() as tape:
                tape.watch([y, kwargs])
                log_det = block.inverse_log_det_per_dim(y, **kwargs)
                loss = tf.reduce_sum(WEIGHTS[:, tf.newaxis] * log_det) + tf.reduce_sum(block.inverse(y, **kwargs) ** 3)
            return log_det, tape.gradient(loss, [y, kwargs, variables(net)], unconnected_gradients="zero")

        return (compute if mode == "eager" else tf.function(compute, jit_compile=mode == "xla"))(fresh(Y), kwargs)

    (plain, expected), (saving, actual) = gradients("keep"), gradients("recompute")
    assert_close(saving, plain)
    for a, b in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        assert_close(a, b)
    assert np.abs(expected[0]).max() > 0.1


def test_saving_memory_with_a_branch_without_variables():
    block = dfb.InvertibleResidual(lambda y: 0.5 * tf.sin(y), residual.RussianRoulette(seed=(1, 2)), memory="recompute")
    plain = dfb.InvertibleResidual(lambda y: 0.5 * tf.sin(y), residual.RussianRoulette(seed=(1, 2)))
    gradients = []
    for b in (block, plain):
        y = fresh(Y)
        with tf.GradientTape() as tape:
            tape.watch(y)
            log_det = b.inverse_log_det_jacobian(y, event_ndims=1)
        gradients.append(tape.gradient(log_det, y))
    assert_close(*gradients)


# The other direction.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_round_trip(dtype):
    net = Contraction((D,), (D,), 2, dtype)
    block = dfb.InvertibleResidual(net, residual.ExactLogDet())
    x = 3.0 * normal([20, D], 4, dtype)
    y = block.forward(x)
    assert_close(block.inverse(fresh(y)), x, 1e-10 if dtype == "float64" else 1e-5)


def test_gradients_through_the_fixed_point_are_the_implicit_ones(branch):
    block = dfb.InvertibleResidual(branch, residual.ExactLogDet())
    x = normal([2, D], 5)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = block.forward(x)
    assert_close(tape.batch_jacobian(y, x, experimental_use_pfor=False), numerical_jacobian(block.forward, x), 1e-6)
    kernel = branch.hidden.kernel
    upstream = normal([2, D], 6)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(upstream * block.forward(fresh(x)))
    gradient = tape.gradient(loss, kernel.value).numpy()
    before = kernel.numpy()
    for index in ((0, 0), (2, 3)):
        losses = []
        for sign in (1.0, -1.0):
            changed = before.copy()
            changed[index] += sign * 1e-6
            kernel.assign(changed)
            losses.append(float(tf.reduce_sum(upstream * block.forward(fresh(x)))))
        kernel.assign(before)
        assert gradient[index] == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)


def test_small_gradients_through_the_fixed_point_are_as_exact_as_large_ones():
    block = dfb.InvertibleResidual(lambda y: 0.8 * tf.sin(y), residual.PowerSeries(1))
    x = normal([2, D], 5)
    gradients = []
    for scale in (1.0, 1e-12):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = scale * tf.reduce_sum(block.forward(x))
        gradients.append(tape.gradient(loss, x) / scale)
    assert_close(gradients[1], gradients[0], 1e-6)


@pytest.mark.parametrize(("low", "high"), [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float64")])
def test_a_branch_of_lower_precision_than_the_values_reaches_its_fixed_point(low, high):
    block = dfb.InvertibleResidual(lambda y: 0.5 * tf.tanh(tf.cast(y, low)), residual.PowerSeries(1))
    x = normal([5, D], 4, high)
    assert_close(block.inverse(fresh(block.forward(x))), x, 1e-5 if low == "float32" else 0.1)


def test_a_kernel_of_zeros_does_not_lose_the_bound():
    layer = networks.SpectralDense(4, 4, coeff=0.9, seed=0)
    kernel = layer.kernel.numpy()
    layer.kernel.assign(0.0 * kernel)
    layer.converge()
    layer.kernel.assign(10.0 * kernel)
    layer.converge()
    assert np.linalg.norm(layer(tf.eye(4)) - layer(tf.zeros([4, 4])), 2) == pytest.approx(0.9, rel=1e-3)


def test_a_branch_that_is_no_contraction_is_detected():
    block = dfb.InvertibleResidual(lambda y: 3.0 * tf.sin(2.0 * y), residual.ExactLogDet(), max_iterations=50, name="wild")
    x = normal([5, D], 7)
    with pytest.raises(tf.errors.InvalidArgumentError, match="wild: the fixed point was not reached in 50 steps"):
        block.forward(x)
    with pytest.raises(tf.errors.InvalidArgumentError, match="wild: the fixed point was not reached"):
        tf.function(block.forward)(x)
    assert np.isnan(tf.function(block.forward, jit_compile=True)(x)).any()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_exact_log_det_detects_a_branch_that_folds(dims):
    """Also where an even number of eigenvalues lies below -1, so that the determinant is positive."""
    block = dfb.InvertibleResidual(lambda y: -1.5 * tf.tanh(y), residual.ExactLogDet())
    outside, folded = tf.fill([1, dims], 2.0), tf.fill([1, dims], 0.1)

    def log_det(y):
        return block.inverse_log_det_jacobian(y, event_ndims=1)

    expected = dims * np.log1p(-1.5 / np.cosh(2.0) ** 2)
    assert_close(log_det(fresh(outside)), [expected], 1e-5)
    for function in (log_det, tf.function(log_det)):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"ExactLogDet: log\(I \+ J\) does not exist"):
            function(tf.concat([outside, folded], axis=0))
    compiled = tf.function(log_det, jit_compile=True)(tf.concat([outside, folded], axis=0)).numpy()
    assert compiled[0] == pytest.approx(expected, rel=1e-5) and np.isnan(compiled[1])


@pytest.mark.parametrize("slope", [-1.0, -2.0, -3.0])
def test_exact_log_det_detects_slopes_that_nodes_or_symmetry_could_hide(slope):
    block = dfb.InvertibleResidual(lambda y: slope * tf.nn.relu(y), residual.ExactLogDet())
    with pytest.raises(tf.errors.InvalidArgumentError):
        block.inverse_log_det_jacobian(tf.ones([1, D], tf.float64), event_ndims=1)
    compiled = tf.function(lambda y: block.inverse_log_det_jacobian(y, event_ndims=1), jit_compile=True)
    assert not np.isfinite(compiled(tf.ones([1, D], tf.float64))).any()


def test_exact_log_det_at_the_bound_and_where_a_block_is_invertible_without_it():
    for factor in (-0.98, 0.98, 3.0):
        block = dfb.InvertibleResidual(lambda y, factor=factor: factor * y, residual.ExactLogDet())
        log_det = block.inverse_log_det_jacobian(normal([2, D], 1), event_ndims=1)
        assert_close(log_det, np.full(2, D * np.log1p(factor)))


@pytest.mark.parametrize(
    ("make", "memory"),
    [
        (residual.ExactLogDet, "keep"),
        (residual.PowerSeries, "keep"),
        (residual.RussianRoulette, "keep"),
        (residual.RussianRoulette, "recompute"),
    ],
)
def test_validate_args_checks_the_products_with_the_jacobian(make, memory):
    """A spectrally normalised layer whose weights were forced beyond its bound, until it converges again."""
    layer = networks.SpectralDense(D, D, coeff=0.9, seed=1, dtype="float64")
    block = dfb.InvertibleResidual(layer, make(), memory=memory, validate_args=True, name="forced")
    layer.kernel.assign(100.0 * layer.kernel[::-1, ::-1])
    for function in (block.inverse, tf.function(block.inverse)):
        with pytest.raises(tf.errors.InvalidArgumentError, match="forced: a product with the Jacobian of the branch is longer"):
            function(fresh(Y))
    layer.converge()
    with tf.GradientTape() as tape:
        log_det = block.inverse_log_det_jacobian(fresh(Y), event_ndims=1)
    assert np.isfinite(log_det).all()
    assert np.abs(tape.gradient(log_det, layer.kernel.value)).max() > 0.0


def test_values_that_are_reached_are_given_under_xla():
    block = dfb.InvertibleResidual(lambda y: tf.where(y > 10.0, -3.0 * y, 0.5 * tf.tanh(y)), residual.PowerSeries(2))
    x = tf.constant([[1.0, -1.0], [50.0, 1.0]])
    y = tf.function(block.forward, jit_compile=True)(x).numpy()
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).any()
    assert_close(y[0] + 0.5 * np.tanh(y[0]), x[0], 1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: residual.RussianRoulette("uniform"),
            r"RussianRoulette: got distribution='uniform', needs poisson or geometric",
        ),
        (lambda: residual.RussianRoulette(rate=0.0), r"RussianRoulette: got rate=0.0, needs a positive number"),
        (lambda: residual.RussianRoulette("geometric", 1.0), r"got rate=1.0"),
        (
            lambda: dfb.InvertibleResidual(lambda y: y[..., :1], residual.ExactLogDet()).inverse(tf.zeros([2, 3])),
            r"the branch maps values of shape \(2, 3\) to \(2, 1\), must keep the shape",
        ),
        (
            lambda: dfb.InvertibleResidual(tf.tanh, residual.ExactLogDet(), event_ndims=2),
            r"InvertibleResidual: got event_ndims=2",
        ),
        (
            lambda: dfb.InvertibleResidual(tf.tanh, residual.ExactLogDet(), memory="recompute"),
            r"InvertibleResidual: got memory='recompute' with ExactLogDet, needs a RussianRoulette",
        ),
        (lambda: residual.PowerSeries(num_probes=0), r"PowerSeries: got num_probes=0, needs a positive integer"),
        (lambda: residual.RussianRoulette(num_probes=0), r"RussianRoulette: got num_probes=0"),
        (lambda: recipes.residual_flow([4], coeff=1.5), r"residual-flow: got coeff=1.5, needs a bound between 0 and 1"),
        (lambda: recipes.residual_flow([4], num_dense_blocks=-1), r"residual-flow: got num_dense_blocks=-1, needs 0 or more"),
        (lambda: networks.SpectralConv2D(1, 1, 2, (4, 4)), r"SpectralConv2D: got kernel_size=2, needs an odd size"),
        (lambda: networks.SpectralDense(1, 1, coeff=0.0), r"got coeff=0.0, needs a positive bound"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Layers.


SHAPES = {"dense": (5,), "conv3": (4, 5, 2), "conv1": (3, 3, 4)}


def spectral(name, **options):
    if name == "dense":
        return networks.SpectralDense(5, 7, seed=1, dtype="float64", **options)
    kernel_size = int(name[-1])
    return networks.SpectralConv2D(SHAPES[name][-1], 3, kernel_size, SHAPES[name][:2], seed=1, dtype="float64", **options)


def operator(layer, shape):
    """The matrix of a linear layer."""
    size = int(np.prod(shape))
    basis = tf.reshape(tf.eye(size, dtype=tf.float64), [size, *shape])
    return tf.reshape(layer(basis) - layer(tf.zeros_like(basis)), [size, -1])


@pytest.mark.parametrize("coeff", [0.5, 0.98])
@pytest.mark.parametrize("name", list(SHAPES))
def test_the_norm_of_the_operator_is_bounded(name, coeff):
    layer = spectral(name, coeff=coeff)
    layer.kernel.assign(4.0 * layer.kernel)
    layer.bias.assign(tf.ones_like(layer.bias))
    layer.converge(tolerance=1e-9, max_iterations=20_000)
    assert np.linalg.norm(operator(layer, SHAPES[name]), 2) == pytest.approx(coeff, rel=1e-5)


@pytest.mark.parametrize("name", list(SHAPES))
def test_small_operators_are_left_as_they_are(name):
    layer = spectral(name)
    layer.kernel.assign(0.01 * layer.kernel)
    layer.converge()
    x = normal([2, *SHAPES[name]], 3)
    plain = x @ layer.kernel.value if name == "dense" else tf.nn.conv2d(x, layer.kernel.value, 1, "SAME")
    assert_close(layer(x), plain)


@pytest.mark.parametrize("name", list(SHAPES))
def test_gradients_pass_the_norm(name):
    """The gradient of the normalised operator, at converged singular vectors, is that of W / |W|."""
    layer = spectral(name)
    layer.kernel.assign(4.0 * layer.kernel)
    layer.converge(tolerance=1e-10, max_iterations=50_000)
    x = normal([2, *SHAPES[name]], 3)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x) ** 2)
    gradient = tape.gradient(loss, layer.kernel.value)
    # Along the kernel itself the normalised operator does not change.
    assert abs(float(tf.reduce_sum(gradient * layer.kernel.value))) < 1e-8 * float(
        tf.norm(gradient) * tf.norm(layer.kernel.value)
    )
    direction = normal(layer.kernel.shape, 4)
    losses, before = [], layer.kernel.numpy()
    for sign in (1.0, -1.0):
        layer.kernel.assign(before + sign * 1e-5 * direction)
        layer.converge(tolerance=1e-10, max_iterations=50_000)
        losses.append(float(tf.reduce_sum(layer(x) ** 2)))
    assert float(tf.reduce_sum(gradient * direction)) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4)


def test_only_training_calls_iterate():
    layer = spectral("dense", num_iterations=2)
    layer.kernel.assign(normal(layer.kernel.shape, 5))
    x, before = normal([2, 5], 3), layer.left.numpy()
    layer(x, training=False)
    np.testing.assert_array_equal(layer.left, before)
    estimate = float(layer.spectral_norm())
    tf.function(lambda: layer(x, training=True))()
    assert np.abs(layer.left.numpy() - before).max() > 1e-6
    assert estimate < float(layer.spectral_norm()) <= np.linalg.norm(layer.kernel, 2) + 1e-12


def test_lipswish_is_a_contraction_with_second_derivatives():
    layer, x = networks.LipSwish(dtype="float64"), tf.linspace(tf.constant(-8.0, tf.float64), 8.0, 1001)
    for slope in (-3.0, 0.5, 4.0):
        layer.slope.assign(slope)
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x)
            first = tape.gradient(y, x)
        assert np.abs(first).max() <= 1.0
        assert np.abs(outer.gradient(first, x)).max() > 0.01


@pytest.mark.parametrize("activation", ["lipswish", "elu"])
def test_networks_are_contractions(activation):
    dense = networks.lipschitz_mlp(4, [8, 8], activation=activation, coeff=0.9, seed=0)
    conv = networks.lipschitz_conv([4, 4, 2], 6, activation=activation, coeff=0.9, seed=0)
    for network, shape in ((dense, [4]), (conv, [4, 4, 2])):
        for layer in network.layers:
            if hasattr(layer, "converge"):
                layer.kernel.assign(6.0 * layer.kernel)
                layer.converge()
        a, b = normal([200, *shape], 1, "float32"), normal([200, *shape], 2, "float32")
        change = tf.norm(tf.reshape(network(a) - network(b), [200, -1]), axis=1) / tf.norm(tf.reshape(a - b, [200, -1]), axis=1)
        assert 0.01 < float(tf.reduce_max(change)) <= 0.9**3 * 1.001


@pytest.mark.parametrize("name", list(SHAPES))
def test_layers_are_their_configuration(name):
    layer = spectral(name, coeff=0.7)
    again = type(layer).from_config(json.loads(json.dumps(layer.get_config())))
    assert_close(again(normal([2, *SHAPES[name]], 3)), layer(normal([2, *SHAPES[name]], 3)))


# Recipes.


SMALL = {"width": 4, "depth": 1}
BOTH = pytest.mark.parametrize("name", ["iresnet", "residual-flow"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [("iresnet", {}, 25_022_400 + 2 * 3072), ("residual-flow", {"factorization": None}, 25_173_968 + 6 + 155)],
)
def test_reference_parameter_counts(name, options, parameters, monkeypatch):
    """The release's, and those of the prior (i-ResNet), of the first ActNorm and of the LipSwishes' slopes (Residual Flow)."""
    monkeypatch.setattr(_Spectral, "converge", lambda self, **kwargs: None)
    flow = recipes.get(name)([32, 32, 3], config="cifar10", **options)
    variables = dimflows.keras_bridge.collect(flow)
    trainable = [v for layer in variables.layers for v in layer.trainable_variables]
    trainable += [v for v in variables.variables if v.trainable]
    assert sum(int(np.prod(v.shape)) for v in trainable) == parameters


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("event_shape", [slow([4, 4, 2], id="image"), pytest.param([6], id="vector")])
@pytest.mark.parametrize("factorization", ["conventional", slow(None)])
def test_recipes_are_exact_but_for_their_estimates(name, event_shape, factorization):
    options = {"num_dense_blocks": 1} if name == "residual-flow" else {"num_terms": 60}
    flow = recipes.get(name)(event_shape, factorization=factorization, **SMALL, **options)
    x = normal([4, *event_shape], 1, "float32")
    z = flow.bijector.inverse(x)
    assert z.shape == [4, np.prod(event_shape)]
    assert_close(flow.bijector.forward(fresh(z)), x, 1e-4)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        z = tf.function(flow.bijector.inverse)(x)
    log_det = tf.linalg.slogdet(tf.reshape(tape.batch_jacobian(z, x, experimental_use_pfor=False), [4, z.shape[1], -1]))[1]
    log_prob = tf.function(flow.log_prob)
    estimates = np.array([log_prob(x) for _ in range(60)])
    expected = flow.distribution.log_prob(z) + log_det
    error = estimates.std(axis=0) / np.sqrt(60)
    assert (np.abs(estimates.mean(axis=0) - expected) < 4.5 * error + 1e-3).all()


@pytest.mark.slow
@BOTH
def test_lcma_follows_contributions(name):
    first = recipes.get(f"lcma-{name}")([4, 4, 1], **SMALL)
    assert first.bijector.factorization is None
    contributions = dimflows.likelihood_contributions(first.bijector, [normal([64, 4, 4, 1], 1, "float32")])
    assert contributions[0].shape == (4, 4, 1)
    third = recipes.get(f"lcma-{name}")([4, 4, 1], contributions=contributions, **SMALL)
    expected = dfb.DimensionFactorization.from_contributions(contributions)
    assert third.bijector.factorization == expected
    x = normal([2, 4, 4, 1], 2, "float32")
    assert_close(third.bijector.forward(fresh(third.bijector.inverse(x))), x, 1e-4)
    with pytest.raises(ValueError, match=f"lcma-{name}: got num_levels=1, needs at least 2"):
        recipes.get(f"lcma-{name}")([4, 4, 1], num_levels=1)


@pytest.mark.slow
def test_standard_errors_of_stochastic_contributions():
    flow = recipes.iresnet([4, 4, 1], factorization=None, num_terms=3, **SMALL).bijector
    data = [normal([200, 4, 4, 1], seed, "float32") for seed in range(3)]
    repeats = np.array([dimflows.likelihood_contributions(flow, data, seed=seed) for seed in range(12)])
    np.testing.assert_array_equal(dimflows.likelihood_contributions(flow, data, seed=3), repeats[3])
    means, errors = dimflows.likelihood_contributions(flow, data, standard_errors=True)
    assert means[0].shape == errors[0].shape == (4, 4, 1)
    assert (np.abs(means[0] - repeats[:, 0].mean(axis=0)) < 6.0 * errors[0]).all()
    # The data are the same in each repeat, so that these vary no more than the errors say.
    assert 0.2 < (repeats[:, 0].std(axis=0, ddof=1) / errors[0]).mean() < 1.2


@pytest.fixture(scope="module")
def trained():
    digits = dimflows.data.load("digits", "train[:256]", batch_size=64)
    model = dimflows.FlowModel(recipes.residual_flow([8, 8, 1], grey_levels=17, **SMALL), seed=0)
    model.adapt(digits)
    model.compile(keras.optimizers.Adam(5e-3, global_clipnorm=1.0))
    return model, digits, model.fit(digits, epochs=3, validation_data=digits.take(1), verbose=0).history


def _spectral(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, _Spectral)]


@pytest.mark.slow
def test_training_lowers_the_bits_and_keeps_the_bound(trained):
    model, _, history = trained
    assert np.isfinite(history["loss"]).all() and history["bits_per_dim"][-1] < history["bits_per_dim"][0] - 0.02
    layers = _spectral(model)
    assert len(layers) == 6
    for layer in layers:
        before = float(layer.spectral_norm())
        layer.converge(max_iterations=20_000, tolerance=1e-7)
        assert float(layer.spectral_norm()) == pytest.approx(before, rel=1e-2)


@pytest.mark.slow
def test_trained_flows_are_invertible(trained):
    model, digits, _ = trained
    x = next(iter(digits))[:4]
    np.testing.assert_array_equal(model.interpolate(x, x[::-1], num_steps=2)[0], x)
    samples = model.sample(8, seed=0).numpy()
    assert samples.min() >= 0 and samples.max() < 17


@pytest.mark.slow
def test_singular_vectors_are_saved(trained, tmp_path):
    model, _, _ = trained
    model.save(tmp_path / "model.keras")
    loaded = dimflows.load(str(tmp_path / "model.keras"))
    mine, theirs = ([layer.left.numpy() for layer in _spectral(m)] for m in (model, loaded))
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_log_det_within_one_context_has_a_seed_of_its_own():
    with probes.probes_from([1, 2]):
        seeds = [tuple(np.asarray(probes.probe_seed())) for _ in range(4)]
    with probes.probes_from([1, 2]):
        assert [tuple(np.asarray(probes.probe_seed())) for _ in range(4)] == seeds
    assert len(set(seeds)) == 4


def test_the_neumann_series_of_the_gradient_is_the_inverse(branch):
    """After many exact terms: v^T (I + J)^-1, which times dJ and v is the gradient of log det (I + J)."""
    j, roulette = 2.0 * jacobian(branch), residual.RussianRoulette(num_exact_evaluation=400, seed=(3, 4))
    j *= 0.9 / np.linalg.norm(j, 2, axis=(1, 2)).max()
    _, [(neumann, v)] = roulette.estimate(lambda w: tf.einsum("bi,bij->bj", w, j), fresh(Y))
    assert_close(neumann, np.linalg.solve(np.eye(D) + np.swapaxes(j, 1, 2), v.numpy()[..., np.newaxis])[..., 0])
