"""Bounds that are distributions: `VariationalDistribution` and `Dequantized` against densities known in closed form."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import Recorder

import tfp_dimflows as dimflows
from tfp_dimflows.upstream import samplers

dfb, dfd = dimflows.bijectors, dimflows.distributions
tfb, tfd = tfp.bijectors, tfp.distributions

SEED = (0, 1)
LOC, SCALE = np.float32([1.2, 3.9, 2.5]), np.float32([0.8, 1.1, 2.0])
X = np.int32([[1, 4, 2], [0, 3, 7], [2, 5, 0]])


def normal(dtype=np.float32):
    """A distribution of triples whose probability of a cell is a product of differences of its distribution function."""
    return tfd.Independent(tfd.Normal(LOC.astype(dtype), SCALE.astype(dtype)), 1)


def dequantized(**options):
    return dfd.Dequantized(normal(), **({"grey_levels": 8} | options))


def exact_log_prob(x):
    """log P(x) of `dequantized()`, the integral over the cell."""
    return np.log(cell_probabilities(x)).sum(axis=-1)


def cell_probabilities(x):
    cdf = tfd.Normal(LOC.astype(np.float64), SCALE.astype(np.float64)).cdf
    return cdf(x + 1.0).numpy() - cdf(x + 0.0).numpy()


def exact_elbo(x):
    """E log p(x + u) of `dequantized()` over uniform noise u."""
    a = (x - LOC).astype(np.float64)
    square = a**2 + a + 1.0 / 3.0
    return (-0.5 * square / SCALE**2 - np.log(SCALE) - 0.5 * np.log(2.0 * np.pi)).sum(axis=-1)


def assert_mean(samples, expected, axis=0):
    """The mean over an axis is within 4 standard errors of what is expected."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(axis=axis) / np.sqrt(samples.shape[axis])
    assert (np.abs(samples.mean(axis=axis) - expected) <= 4.0 * error).all()


class Latent(dfd.VariationalDistribution):
    """x = z + e with z, e standard normal, and the prior of z as noise: log-weight log N(x; z, 1), marginal N(0, 2)."""

    def __init__(self, num_samples=1, name="Latent"):
        super().__init__([1], tf.float32, num_samples, parameters={"num_samples": num_samples, "name": name}, name=name)

    def _log_weights(self, x, num_samples, seed):
        z = tfd.Normal(0.0, 1.0).sample([num_samples, *x.shape], seed=seed)
        return tfd.Normal(z, 1.0).log_prob(x)[..., 0]


class Fixed(dfd.VariationalDistribution):
    """Log-weights that are given."""

    def __init__(self, log_weights):
        super().__init__([1], tf.float32, num_samples=len(log_weights), name="Fixed")
        self._given = tf.constant(log_weights, tf.float32)

    def _log_weights(self, x, num_samples, seed):
        return tf.broadcast_to(self._given[:num_samples, tf.newaxis], [num_samples, x.shape[0]])


# Bounds.


@pytest.mark.parametrize("case", ["dequantized", "latent"])
def test_weights_average_to_the_probability(case):
    if case == "dequantized":
        distribution, x, exact = dequantized(), X, exact_log_prob(X)
    else:
        distribution, x = Latent(), np.float32([[0.0], [1.0], [-2.0]])
        exact = tfd.Normal(0.0, np.sqrt(2.0)).log_prob(x[:, 0]).numpy()
    weights = np.exp(distribution.log_weights(x, num_samples=20_000, seed=SEED).numpy().astype(np.float64))
    assert_mean(weights, np.exp(exact))


def test_elbo():
    distribution = dequantized()
    assert_mean(distribution.log_weights(X, num_samples=20_000, seed=SEED), exact_elbo(X))
    many = distribution.elbo(X, num_samples=20_000, seed=SEED)
    np.testing.assert_allclose(many, exact_elbo(X), atol=0.05)
    assert (exact_elbo(X) < exact_log_prob(X)).all()


def test_elbo_of_a_latent_variable():
    x = np.float32([[0.0], [1.0], [-2.0]])
    expected = -0.5 * np.log(2.0 * np.pi) - 0.5 * (x[:, 0] ** 2 + 1.0)
    assert_mean(Latent().log_weights(x, num_samples=20_000, seed=SEED), expected)


@pytest.mark.parametrize("case", ["dequantized", "latent"])
def test_importance_weighted_bounds_rise_to_the_exact_value(case):
    if case == "dequantized":
        distribution, x = dequantized(), np.tile(X[:1], [4000, 1])
        exact, elbo = exact_log_prob(X[0]), exact_elbo(X[0])
    else:
        distribution, x = Latent(), np.tile(np.float32([[-2.0]]), [4000, 1])
        exact, elbo = tfd.Normal(0.0, np.sqrt(2.0)).log_prob(-2.0).numpy(), -0.5 * np.log(2.0 * np.pi) - 2.5
    bounds = {s: distribution.log_prob(x, num_samples=s, seed=(s, 1)).numpy() for s in (1, 4, 16, 64)}
    means = [bounds[s].mean() for s in bounds]
    errors = [bounds[s].std() / np.sqrt(len(x)) for s in bounds]
    assert abs(means[0] - elbo) < 4.0 * errors[0]
    for lower, higher, e, f in zip(means, means[1:], errors, errors[1:]):
        assert lower < higher + 4.0 * np.hypot(e, f)
    assert means[0] < means[1] < exact + 4.0 * errors[1]
    assert abs(means[-1] - exact) < 4.0 * errors[-1] + 0.05
    converged = distribution.log_prob(x[:1], num_samples=100_000, seed=SEED)
    np.testing.assert_allclose(converged, [exact], atol=0.03)


def test_log_prob_from_given_log_weights():
    log_weights = np.float32([-10_000.0, -10_001.0, -9_999.5, -10_050.0])
    distribution, x = Fixed(log_weights), np.zeros([2, 1], np.float32)
    expected = np.logaddexp.reduce(log_weights.astype(np.float64)) - np.log(4)
    np.testing.assert_array_equal(distribution.log_prob(x), np.float32([expected, expected]))
    np.testing.assert_allclose(distribution.elbo(x), log_weights.astype(np.float64).mean(), rtol=1e-7)
    np.testing.assert_array_equal(distribution.log_prob(x, num_samples=1), log_weights[[0, 0]])
    np.testing.assert_allclose(distribution.bits_per_dim(x), -expected / np.log(2.0), rtol=1e-6)


def test_impossible_values_have_no_probability():
    x = np.zeros([1, 1], np.float32)
    assert Fixed([-np.inf, -np.inf]).log_prob(x).numpy() == -np.inf
    np.testing.assert_allclose(Fixed([-np.inf, 0.0]).log_prob(x), -np.log(2.0), rtol=1e-6)


def test_the_sum_over_samples_is_in_float64():
    graph = tf.function(lambda x: dequantized().log_prob(x, num_samples=4, seed=SEED)).get_concrete_function(X).graph
    exponentials = [op.outputs[0].dtype for op in graph.get_operations() if op.type == "Exp"]
    assert exponentials == [tf.float64]
    assert dequantized().log_prob(X, num_samples=4).dtype == tf.float32


def test_a_subclass_must_write_log_weights():
    distribution = dfd.VariationalDistribution([1], tf.float32, name="Unfinished")
    with pytest.raises(NotImplementedError, match="Unfinished"):
        distribution.log_prob([[0.0]])


# Bits per dimension.


@pytest.mark.parametrize("levels", [256, 17, 2])
def test_a_uniform_distribution_costs_all_bits(levels):
    uniform = tfd.Independent(tfd.Uniform(tf.zeros([2, 2, 3]), float(levels)), 3)
    x = np.random.default_rng(0).integers(0, levels, size=[5, 2, 2, 3])
    bits = dfd.Dequantized(uniform, grey_levels=levels).bits_per_dim(x)
    np.testing.assert_allclose(bits, np.full([5], np.log2(levels)), rtol=1e-6)


@pytest.mark.parametrize("levels", [256, 17])
def test_a_logistic_on_logits_without_margin_costs_all_bits(levels):
    logistic = tfd.Sample(tfd.Logistic(0.0, 1.0), [4, 4, 3])
    flow = tfd.TransformedDistribution(logistic, dfb.LogitPreprocess(levels, alpha=0.0))
    x = np.random.default_rng(0).integers(0, levels, size=[6, 4, 4, 3])
    x[0], x[1] = 0, levels - 1
    bits = dfd.Dequantized(flow, grey_levels=levels).bits_per_dim(x, seed=SEED)
    np.testing.assert_allclose(bits, np.full([6], np.log2(levels)), rtol=1e-5)


def test_bits_of_a_model_of_the_unit_interval():
    """The model of y = (x + u) / n in [0, 1) costs log2 n more bits than its own density says."""
    n, dims = 256, 5
    unit = tfd.Independent(tfd.Beta(tf.fill([dims], 2.0), 3.0), 1)
    ours = Recorder(tfd.TransformedDistribution(unit, tfb.Scale(float(n))))
    x = np.random.default_rng(0).integers(0, n, size=[7, dims])
    bits = dfd.Dequantized(ours, grey_levels=n).bits_per_dim(x, seed=SEED)
    y = ours.seen[0].numpy() / n
    expected = -unit.log_prob(y).numpy() / (dims * np.log(2.0)) + np.log2(n)
    np.testing.assert_allclose(bits, expected, rtol=1e-5)


def test_bits_with_the_logit_correction():
    """Preprocessing inside the distribution is the correction that reference code adds by hand."""
    n, alpha, shape = 256, 0.05, [2, 2, 3]
    base = tfd.Sample(tfd.Normal(0.3, 1.7), shape)
    ours = Recorder(tfd.TransformedDistribution(base, dfb.LogitPreprocess(n, alpha)))
    x = np.random.default_rng(0).integers(0, n, size=[7, *shape])
    bits = dfd.Dequantized(ours, grey_levels=n).bits_per_dim(x, seed=SEED)
    y = ours.seen[0].numpy().astype(np.float64) / n
    p = alpha + (1.0 - 2.0 * alpha) * y
    logits = np.log(p) - np.log1p(-p)
    correction = (np.logaddexp(0, logits) + np.logaddexp(0, -logits) + np.log(1.0 - 2.0 * alpha)).sum(axis=(1, 2, 3))
    log_prob = base.log_prob(logits.astype(np.float32)).numpy() + correction
    np.testing.assert_allclose(bits, -log_prob / (12 * np.log(2.0)) + 8.0, rtol=1e-5)


# Noise.


def test_noise_fills_the_cells():
    recorder = Recorder(normal())
    distribution = dfd.Dequantized(recorder, grey_levels=8)
    distribution.log_weights(X, num_samples=500, seed=SEED)
    noise = recorder.seen[0].numpy() - X
    assert noise.shape == (500, 3, 3)
    assert noise.min() >= 0.0 and noise.max() < 1.0
    assert_mean(noise, 0.5)
    assert np.unique(noise).size > 0.99 * noise.size  # every value has its own
    distribution.log_prob(X, seed=SEED)
    assert recorder.seen[1].shape == [3, 3]  # one sample needs no axis of its own


def test_noise_never_leaves_the_range():
    """255 + u rounds to 256 for a u just below 1, where [0, 256) has ended."""
    recorder = Recorder(tfd.Sample(tfd.Normal(0.0, 1.0), [1000]))
    dfd.Dequantized(recorder, grey_levels=256).log_weights(np.full([1000], 255), num_samples=2000, seed=SEED)
    assert recorder.seen[0].numpy().max() < 256.0


def test_dequantize():
    distribution = dequantized()
    many = np.tile(X, [4000, 1, 1])
    y = distribution.dequantize(many, seed=SEED)
    assert y.shape == many.shape and y.dtype == tf.float32
    noise = y.numpy() - many
    assert noise.min() >= 0.0 and noise.max() < 1.0
    assert_mean(noise, 0.5)
    assert_mean(noise**2, 1.0 / 3.0)
    assert np.unique(noise).size > 0.9 * noise.size  # every value has its own


def test_seeds_of_dequantize():
    distribution = dequantized()
    once = distribution.dequantize(X, seed=SEED)
    np.testing.assert_array_equal(once, distribution.dequantize(X, seed=SEED))
    assert np.abs(once - distribution.dequantize(X, seed=(0, 2))).min() > 0.0
    assert np.abs(distribution.dequantize(X) - distribution.dequantize(X)).min() > 0.0
    traced = tf.function(lambda x: distribution.dequantize(x))
    assert np.abs(traced(X) - traced(X)).min() > 0.0
    seeded = tf.function(lambda x, seed: distribution.dequantize(x, seed))
    np.testing.assert_array_equal(seeded(X, tf.constant(SEED)), once)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantize_never_reaches_the_end_of_the_range(dtype, levels):
    """A u just below 1 rounds n - 1 + u to n, in low precision a u above 1/2."""
    base = tfd.Sample(tfd.Normal(tf.zeros([], dtype), tf.ones([], dtype)), [1000])
    distribution = dfd.Dequantized(base, grey_levels=levels)
    y = distribution.dequantize(np.full([2000, 1000], levels - 1), seed=SEED)
    assert y.dtype == dtype and y.shape == [2000, 1000]
    largest, smallest = float(tf.reduce_max(y)), float(tf.reduce_min(y))
    assert levels - 1 <= smallest <= largest < levels
    assert dtype == "bfloat16" or largest > levels - 0.2
    below = distribution.dequantize(np.zeros([10, 1000], np.uint8), seed=SEED)
    assert 0.0 <= float(tf.reduce_min(below)) < 0.1 < 0.9 < float(tf.reduce_max(below)) < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_saturated_noise_stays_in_its_cell(mode):
    """In float32 a sigmoid is 1 from 17 on, and any u near 1 is rounded up beside a large x."""
    x = np.arange(256)[:, np.newaxis]
    for shift in (-200.0, -17.0, 12.0, 17.0, 200.0):
        noise = dfb.Chain([tfb.Sigmoid(), tfb.Shift(shift)])
        distribution = dfd.Dequantized(tfd.Sample(tfd.Normal(0.0, 1.0), [1]), grey_levels=256, noise=noise)
        dequantize = tf.function(lambda d=distribution: d.dequantize(x, seed=SEED), jit_compile=mode == "compiled")
        np.testing.assert_array_equal(np.floor(dequantize()), x)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float32, np.float64])
def test_dequantize_takes_numbers_of_any_type(dtype):
    distribution = dequantized()
    expected = distribution.dequantize(X, seed=SEED)
    np.testing.assert_array_equal(distribution.dequantize(X.astype(dtype), seed=SEED), expected)
    np.testing.assert_array_equal(distribution.dequantize(X.tolist(), seed=SEED), expected)
    stacked = distribution.dequantize(np.stack([X, X]), seed=SEED)
    assert stacked.shape == [2, 3, 3] and np.abs(stacked[0] - stacked[1]).min() > 0.0


def test_seeds():
    distribution = dequantized(num_samples=2)
    once = distribution.log_prob(X, seed=SEED)
    np.testing.assert_array_equal(once, distribution.log_prob(X, seed=SEED))
    assert (once != distribution.log_prob(X, seed=(0, 2))).numpy().all()
    assert (distribution.log_prob(X) != distribution.log_prob(X)).numpy().all()
    for method in (distribution.elbo, distribution.bits_per_dim, distribution.log_weights):
        np.testing.assert_array_equal(method(X, seed=SEED), method(X, seed=SEED))
        assert (method(X) != method(X)).numpy().all()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_traced_function_draws_anew_at_every_call(jit_compile):
    distribution = dequantized()
    traced = tf.function(lambda x: distribution.log_prob(x), jit_compile=jit_compile)
    first, second = traced(X), traced(X)
    assert (first != second).numpy().all()
    twice = tf.function(lambda x: (distribution.log_prob(x), distribution.log_prob(x)), jit_compile=jit_compile)
    first, second = twice(X)
    assert (first != second).numpy().all()


def test_traced_functions_give_the_eager_values():
    distribution = dequantized(num_samples=3)

    def evaluate(x):
        return distribution.log_prob(x, seed=SEED), distribution.elbo(x, seed=SEED)

    for eager, traced in zip(evaluate(X), tf.function(evaluate)(X)):
        np.testing.assert_allclose(traced, eager, rtol=1e-6)


@pytest.mark.slow
def test_xla():
    """XLA has random numbers of its own, so only what does not depend on them is the same."""
    compiled = tf.function(lambda x: dequantized().log_prob(x, num_samples=50_000, seed=SEED), jit_compile=True)
    np.testing.assert_allclose(compiled(X), exact_log_prob(X), atol=0.03)
    np.testing.assert_array_equal(compiled(X), compiled(X))


def test_unknown_batch_size():
    distribution = dequantized(num_samples=3)
    signature = [tf.TensorSpec([None, 3], tf.uint8)]
    traced = tf.function(lambda x: distribution.log_prob(x, seed=SEED), input_signature=signature)
    np.testing.assert_allclose(traced(X.astype(np.uint8)), distribution.log_prob(X, seed=SEED), rtol=1e-6)


# Values.


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float32, np.float64])
def test_numbers_of_any_type(dtype):
    distribution = dequantized()
    expected = distribution.log_prob(X, seed=SEED)
    log_prob = distribution.log_prob(X.astype(dtype), seed=SEED)
    assert log_prob.dtype == tf.float32
    np.testing.assert_array_equal(log_prob, expected)
    np.testing.assert_array_equal(distribution.log_prob(X.tolist(), seed=SEED), expected)


def test_float64():
    distribution = dfd.Dequantized(normal(np.float64), grey_levels=8)
    assert distribution.log_prob(X).dtype == distribution.elbo(X).dtype == tf.float64
    log_prob = distribution.log_prob(X, num_samples=100_000, seed=SEED)
    np.testing.assert_allclose(log_prob, exact_log_prob(X), atol=0.03)


def test_batch_axes():
    distribution = dequantized(num_samples=4)
    x = np.stack([X, X[::-1]])
    assert distribution.log_weights(x).shape == [4, 2, 3]
    assert distribution.log_weights(x, num_samples=1).shape == [1, 2, 3]
    for method in (distribution.log_prob, distribution.elbo, distribution.bits_per_dim):
        assert method(x).shape == [2, 3]
        assert method(x, num_samples=1).shape == [2, 3]
        assert method(X[0]).shape == []
    many = distribution.log_prob(x, num_samples=20_000, seed=SEED)
    np.testing.assert_allclose(many, exact_log_prob(x), atol=0.05)


BAD = {
    "too large": np.int32([[0, 8, 0]]),
    "negative": np.int32([[0, -1, 0]]),
    "nan": np.float32([[0.0, np.nan, 0.0]]),
    "infinite": np.float32([[0.0, np.inf, 0.0]]),
    "between levels": np.float32([[0.0, 2.5, 0.0]]),
}


@pytest.mark.parametrize("case", BAD)
def test_values_that_are_no_levels(case):
    distribution = dequantized(name="grey_images")
    methods = [distribution.log_prob, distribution.elbo, distribution.log_weights, distribution.bits_per_dim]
    for method in [*methods, distribution.dequantize]:
        with pytest.raises(ValueError, match="grey_images.*needs.* 0 to 7"):
            method(BAD[case])
        with pytest.raises(tf.errors.InvalidArgumentError, match="grey_images.* 0 to 7"):
            tf.function(method)(BAD[case])
    with pytest.raises(ValueError, match="grey_images"):
        distribution.check_values(tf.constant(BAD[case]))


def test_values_that_are_no_numbers():
    with pytest.raises(ValueError, match="Dequantized: got values of dtype bool"):
        dequantized().log_prob(np.zeros([1, 3], bool))


@pytest.mark.parametrize("shape", [[5], [2, 4], [3, 1], []])
def test_events_of_another_shape(shape):
    with pytest.raises(ValueError, match="Dequantized.*shape"):
        dequantized().log_prob(np.zeros(shape, np.int32))


def test_arguments():
    with pytest.raises(ValueError, match="grey_levels=1, needs at least 2"):
        dequantized(grey_levels=1)
    base = tfd.Sample(tfd.Normal(0.0, 1.0), tf.Variable([2], shape=[None], trainable=False))
    assert not base.event_shape.is_fully_defined()
    with pytest.raises(ValueError, match="needs a static one"):
        dfd.Dequantized(base)
    with pytest.raises(ValueError, match="num_samples=0"):
        dequantized(num_samples=0)
    with pytest.raises(ValueError, match="num_samples=0"):
        dequantized().log_prob(X, num_samples=0)
    with pytest.raises(ValueError, match=r"batch shape \(4,\)|batch shape \[4\]"):
        dfd.Dequantized(tfd.Independent(tfd.Normal(tf.zeros([4, 3]), 1.0), 1))


# Samples, latent values, copies.


def test_samples():
    distribution = dequantized()
    assert distribution.dtype == tf.int32 and distribution.event_shape == [3] and distribution.batch_shape == []
    assert distribution.sample().shape == [3]
    samples = distribution.sample([2, 20_000], seed=SEED)
    assert samples.shape == [2, 20_000, 3] and samples.dtype == tf.int32
    np.testing.assert_array_equal(samples, distribution.sample([2, 20_000], seed=SEED))
    assert samples.numpy().min() == 0 and samples.numpy().max() == 7  # what falls outside goes to the nearest level
    for level in range(1, 7):
        expected = cell_probabilities(np.full([3], level))
        error = np.sqrt(expected * (1.0 - expected) / 20_000)
        np.testing.assert_array_less(np.abs((samples[0].numpy() == level).mean(axis=0) - expected), 5.0 * error)


def test_encode_and_decode():
    flow = tfd.TransformedDistribution(
        tfd.Sample(tfd.Normal(0.0, 1.0), [2, 2, 1]), dfb.LogitPreprocess(grey_levels=256), name="flow"
    )
    distribution = dfd.Dequantized(flow, grey_levels=256)
    x = np.random.default_rng(0).integers(0, 256, size=[9, 2, 2, 1], dtype=np.uint8)
    z = distribution.encode(x)
    np.testing.assert_allclose(z, flow.bijector.inverse(x.astype(np.float32) + 0.5), rtol=1e-6)
    decoded = distribution.decode(z)
    assert decoded.dtype == tf.int32
    np.testing.assert_array_equal(decoded, x)
    far = distribution.decode(tf.constant([-100.0, 100.0], shape=[2, 1, 1, 1]) * tf.ones([2, 2, 2, 1]))
    assert far.numpy().min() == 0 and far.numpy().max() == 255
    with pytest.raises(ValueError, match="needs"):
        distribution.encode(np.full([1, 2, 2, 1], 300))


def test_copy():
    distribution = dequantized(num_samples=3, name="original")
    copied = distribution.copy(num_samples=5)
    assert isinstance(copied, dfd.Dequantized)
    assert copied.distribution is distribution.distribution and copied.grey_levels == 8
    assert copied.log_weights(X).shape == [5, 3] and distribution.log_weights(X).shape == [3, 3]
    np.testing.assert_array_equal(
        copied.log_prob(X, num_samples=2, seed=SEED), distribution.log_prob(X, num_samples=2, seed=SEED)
    )
    assert distribution.copy(name="other").name == "other"
    assert Latent(num_samples=2).copy().log_weights(np.zeros([1, 1], np.float32)).shape == [2, 1]


def test_variables_and_gradients():
    loc = tf.Variable(LOC)
    distribution = dfd.Dequantized(tfd.Independent(tfd.Normal(loc, SCALE), 1), grey_levels=8, num_samples=20_000)
    assert [v is loc for v in distribution.trainable_variables] == [True]
    with tf.GradientTape() as tape:
        log_prob = tf.reduce_sum(distribution.log_prob(X, seed=SEED))
    step = 1e-4  # of the exact log-probability, by central differences
    shifted = [exact_log_prob(X - step * e) - exact_log_prob(X + step * e) for e in np.eye(3)]
    np.testing.assert_allclose(tape.gradient(log_prob, loc), np.sum(shifted, axis=1) / (2 * step), atol=0.1)


# Conditional distributions.


@pytest.mark.parametrize("batch", [[], [4], [2, 4]])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_conditions(batch, num_samples):
    """p(x | c) is normal around c; the condition goes with the events, whatever the number of noise samples."""

    def shift_and_log_scale(condition):
        return tf.reshape(tf.stack([-condition, tf.zeros_like(condition)], axis=-1), [-1, 6])

    flow = dfb.ConditionalTransform(shift_and_log_scale, dfb.transformers.Affine("exp"), event_ndims=1)
    base = tfd.Sample(tfd.Normal(0.0, 1.0), [3])
    distribution = dfd.Dequantized(tfd.TransformedDistribution(base, flow), grey_levels=8)
    generator = np.random.default_rng(0)
    x = generator.integers(0, 8, size=[*batch, 3])
    condition = generator.uniform(0.0, 8.0, size=[*batch, 3]).astype(np.float32)
    weights = distribution.log_weights(x, num_samples, SEED, bijector_kwargs={"condition": condition})
    assert weights.shape == [num_samples, *batch]
    recorder = Recorder(base)
    dfd.Dequantized(recorder, grey_levels=8).log_weights(x, num_samples, SEED)
    y = recorder.seen[0].numpy().reshape([num_samples, *batch, 3])
    np.testing.assert_allclose(weights, base.log_prob(y - condition), rtol=1e-5)
    if batch == [4]:
        samples = distribution.sample(4, seed=SEED, bijector_kwargs={"condition": condition})
        assert samples.shape == [4, 3] and np.abs(samples - condition).max() < 6.0
        z = distribution.encode(x, condition=condition)
        np.testing.assert_allclose(z, x + 0.5 - condition, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(distribution.decode(z, condition=condition), x)


def test_importance_samples_of_a_conditional_coupling():
    coupling = dfb.AffineCoupling(
        lambda x, condition: 0.1 * tf.tile(x * condition, [1, 4]), dfb.masks.Index([1], 3), scale="exp"
    )
    base = tfd.Sample(tfd.Normal(0.0, 1.0), [3])
    flow = tfd.TransformedDistribution(base, coupling)
    condition = {"condition": np.float32([[1.0], [-1.0], [0.5]])}
    weights = dfd.Dequantized(flow, grey_levels=8).log_weights(X, 4, SEED, bijector_kwargs=condition)
    recorder = Recorder(base)
    dfd.Dequantized(recorder, grey_levels=8).log_weights(X, 4, SEED)
    one_by_one = [flow.log_prob(y, bijector_kwargs=condition) for y in recorder.seen[0]]
    np.testing.assert_allclose(weights, one_by_one, rtol=1e-5)


def test_the_noise_below_dequantisation_has_another_seed():
    class Bound(dfd.VariationalDistribution):
        """A bound that remembers what it is given."""

        def _log_weights(self, x, num_samples, seed, **kwargs):
            self.seen = x, seed
            return tf.zeros([num_samples, *x.shape[:-1]])

    below = Bound(dtype=tf.float32, event_shape=[3])
    x = tf.constant([[1, 2, 3]])
    dfd.Dequantized(below, grey_levels=8).log_weights(x, 1, seed=[4, 5])
    value, seed = below.seen
    noise = value - tf.cast(x, tf.float32)
    assert np.abs(noise - samplers.uniform([1, 3], dtype=tf.float32, seed=seed)).min() > 1e-3
