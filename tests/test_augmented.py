"""`VFlow`, `Augmented` and noise flows of `Dequantized` against densities known in closed form."""

import functools
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import Recorder, assert_close, fresh, normal, randomize

import tfp_dimflows as dimflows
from tfp_dimflows.distributions import variational

dfb, dfd = dimflows.bijectors, dimflows.distributions
tfb, tfd = tfp.bijectors, tfp.distributions

SEED = (3, 4)
LEVELS = 8
IMAGE = (2, 2, 1)


def assert_mean(samples, expected, axis=0):
    """The mean over an axis is within 4 standard errors of what is expected."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(axis=axis) / np.sqrt(samples.shape[axis])
    assert (np.abs(samples.mean(axis=axis) - expected) <= 4.0 * error + 1e-12).all()


def flow_of(bijector, shape, dtype="float64"):
    """The flow with a standard normal base."""
    return tfd.TransformedDistribution(tfd.Sample(tfd.Normal(tf.zeros([], dtype), 1.0), list(shape)), bijector)


class OnFirst(dfb.FlowBijector):
    """A bijector of the first dimensions that leaves the others as they are."""

    def __init__(self, inner, size, event_ndims=1, name="on_first"):
        self.inner, self._size = inner, size
        super().__init__(forward_min_event_ndims=event_ndims, parameters={}, name=name)

    @property
    def uses_condition(self):
        return self.inner.uses_condition

    def _both(self, value, condition, direction):
        first, rest = value[..., : self._size], value[..., self._size :]
        kwargs = {} if condition is None else {"condition": condition}
        first, log_det = dfb.walk.value_and_log_det_per_dim(self.inner, first, direction, kwargs)
        log_det = tf.broadcast_to(log_det, tf.shape(first))
        return tf.concat([first, rest], -1), tf.concat([log_det, tf.zeros_like(rest)], -1)

    def _forward_and_log_det_per_dim(self, x, condition):
        return self._both(x, condition, "forward")

    def _inverse_and_log_det_per_dim(self, y, condition):
        return self._both(y, condition, "inverse")


class LinearPosterior(dfb.FlowBijector):
    """z = scale e + slope x + offset, with a lower triangular scale."""

    uses_condition = True

    def __init__(self, scale, slope, offset, name="linear_posterior"):
        self._scale, self._slope, self._offset = (tf.convert_to_tensor(v) for v in (scale, slope, offset))
        super().__init__(forward_min_event_ndims=1, parameters={}, name=name)

    def _log_det(self):
        return tf.math.log(tf.abs(tf.linalg.diag_part(self._scale)))

    def _forward_and_log_det_per_dim(self, x, condition):
        z = tf.linalg.matvec(self._scale, x) + tf.linalg.matvec(self._slope, condition) + self._offset
        return z, self._log_det()

    def _inverse_and_log_det_per_dim(self, y, condition):
        centred = y - tf.linalg.matvec(self._slope, condition) - self._offset
        inverse = tf.linalg.inv(self._scale)
        return tf.linalg.matvec(inverse, centred), -self._log_det()


class Net(tf.Module):
    """A layer with a tanh and one without, on the last axis, with large random weights; may take a condition."""

    def __init__(self, inputs, outputs, seed, dtype="float64", scale=1.0):
        super().__init__()
        shapes = {"first": [inputs, 6], "bias": [6], "second": [6, outputs]}
        for k, (name, shape) in enumerate(shapes.items()):
            setattr(self, name, tf.Variable(scale * normal(shape, 10 * seed + k, dtype), name=name))

    def __call__(self, x):
        return tf.tanh(x @ self.first + self.bias) @ self.second


class ConditionalNet(Net):
    """The same with a vector for each event as condition, which may be absent."""

    def __call__(self, x, condition=None):
        h = x @ self.first + self.bias
        if condition is not None:
            h += tf.reshape(condition, [-1, *[1] * (len(x.shape) - 2), condition.shape[-1]])
        return tf.tanh(h) @ self.second


# The linear case: x and z jointly normal.

TRIL = np.array([[1.3, 0, 0, 0], [0.6, 0.8, 0, 0], [-0.9, 0.7, 0.5, 0], [0.4, -1.1, 0.3, 0.9]])
LOC = np.array([0.5, -1.0, 2.0, 0.3])
COVARIANCE = TRIL[:2, :2] @ TRIL[:2, :2].T
SLOPE = TRIL[2:, :2] @ np.linalg.inv(TRIL[:2, :2])
OFFSET = LOC[2:] - SLOPE @ LOC[:2]
MARGINAL = tfd.MultivariateNormalTriL(LOC[:2], TRIL[:2, :2])


def exact_posterior():
    return LinearPosterior(TRIL[2:, 2:], SLOPE, OFFSET)


def wide_posterior():
    """Wider than the exact one, so that the weights are bounded, and in the wrong place."""
    return LinearPosterior(np.array([[0.8, 0.0], [-0.2, 1.3]]), 0.8 * SLOPE, OFFSET + 0.3)


def linear(posterior, **options):
    """`Augmented` of the joint normal."""
    flow = tfb.Chain([tfb.Shift(LOC), tfb.ScaleMatvecTriL(TRIL)])
    return dfd.Augmented(flow_of(dfb.VFlow(flow, posterior, num_extra=2, event_ndims=1), [4]), num_extra=2, **options)


def divergence(x):
    """KL(q || p(z | x)) of the wide posterior."""
    true = tfd.MultivariateNormalTriL(x @ SLOPE.T + OFFSET, TRIL[2:, 2:])
    wide = wide_posterior()
    wrong = tfd.MultivariateNormalTriL(x @ (0.8 * SLOPE).T + OFFSET + 0.3, wide._scale)
    return tfd.kl_divergence(wrong, true).numpy()


POINTS = MARGINAL.sample(5, seed=[1, 2]).numpy()


def test_with_the_exact_posterior_every_log_weight_is_the_marginal():
    log_weights = linear(exact_posterior()).log_weights(POINTS, num_samples=7, seed=SEED)
    assert_close(log_weights, np.tile(MARGINAL.log_prob(POINTS), [7, 1]), 1e-10)
    assert_close(linear(exact_posterior()).log_prob(POINTS), MARGINAL.log_prob(POINTS), 1e-10)


def test_the_elbo_lacks_the_divergence_of_the_posteriors():
    log_weights = linear(wide_posterior()).log_weights(POINTS, num_samples=20_000, seed=SEED)
    exact = MARGINAL.log_prob(POINTS).numpy()
    assert (divergence(POINTS) > 0.05).all()
    assert_mean(log_weights, exact - divergence(POINTS))
    assert_mean(np.exp(log_weights - exact), 1.0)


def test_the_elbo_without_a_posterior_lacks_more():
    log_weights = linear(None).log_weights(POINTS, num_samples=20_000, seed=SEED)
    true = tfd.MultivariateNormalTriL(POINTS @ SLOPE.T + OFFSET, TRIL[2:, 2:])
    prior = tfd.MultivariateNormalDiag(tf.zeros([2], tf.float64))
    assert_mean(log_weights, MARGINAL.log_prob(POINTS) - tfd.kl_divergence(prior, true))


def test_importance_weighted_bounds_rise_to_the_marginal():
    x = MARGINAL.sample(2000, seed=[5, 6]).numpy()
    exact = MARGINAL.log_prob(x).numpy()
    distribution = linear(wide_posterior())
    gaps = [exact - distribution.log_prob(x, num_samples=s, seed=(s, 1)).numpy() for s in (1, 4, 16, 64)]
    assert_mean(gaps[0] - divergence(x), 0.0)
    for wider, closer in zip(gaps, gaps[1:]):
        rise = wider - closer
        assert rise.mean() > 4.0 * rise.std() / np.sqrt(len(x))
    assert 0.0 < gaps[-1].mean() + 4.0 * gaps[-1].std() / np.sqrt(len(x)) < 0.05
    converged = distribution.log_prob(POINTS, num_samples=50_000, seed=SEED)
    np.testing.assert_allclose(converged, MARGINAL.log_prob(POINTS), atol=0.03)


@pytest.mark.parametrize("posterior", [None, wide_posterior()], ids=["none", "wide"])
def test_samples_drop_the_extra_dimensions(posterior):
    sample = linear(posterior).sample(20_000, seed=SEED)
    assert sample.shape == [20_000, 2] and sample.dtype == tf.float64
    centred = sample.numpy() - LOC[:2]
    assert_mean(centred, 0.0)
    assert_mean(centred[:, :, np.newaxis] * centred[:, np.newaxis], COVARIANCE)
    assert linear(posterior).sample(seed=SEED).shape == [2]
    assert linear(posterior).sample([2, 3], seed=SEED).shape == [2, 3, 2]
    np.testing.assert_array_equal(linear(posterior).sample(3, seed=SEED), linear(posterior).sample(3, seed=SEED))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_latent_values_keep_the_extra_dimensions(shape):
    distribution = linear(wide_posterior())
    x = normal([*shape, 2], 1)
    z = distribution.encode(x)
    assert z.shape == [*shape, 4]
    joint = tf.concat([x, tf.zeros_like(x)], axis=-1)
    assert_close(z, distribution.distribution.bijector.inverse(joint))
    assert_close(distribution.decode(z), x)
    assert distribution.log_prob(x, seed=SEED).shape == shape
    assert distribution.log_weights(x, num_samples=3, seed=SEED).shape == [3, *shape]
    assert distribution.elbo(x, num_samples=3, seed=SEED).shape == shape


def test_bits_count_the_dimensions_of_the_data_only():
    bits = linear(exact_posterior()).bits_per_dim(POINTS, seed=SEED)
    assert_close(bits, -MARGINAL.log_prob(POINTS) / (2 * np.log(2.0)))


def test_any_distribution_over_joined_events_will_do():
    joint = tfd.MultivariateNormalTriL(LOC, TRIL)
    distribution = dfd.Augmented(joint, num_extra=2, name="bare")
    assert distribution.event_shape == [2] and distribution.num_extra == 2 and distribution.distribution is joint
    weights = np.exp(distribution.log_weights(LOC[np.newaxis, :2], num_samples=50_000, seed=SEED))
    # z has the scale of the noise or less, so that the weights' variance is finite.
    assert_mean(weights, np.exp(MARGINAL.log_prob(LOC[:2])))
    assert distribution.sample(3, seed=SEED).shape == [3, 2]


def test_a_copy_has_the_same_density():
    distribution = linear(wide_posterior(), num_samples=3)
    copy = distribution.copy(name="another")
    assert copy.name == "another"
    assert_close(copy.log_prob(POINTS, seed=SEED), distribution.log_prob(POINTS, seed=SEED))
    more = distribution.copy(num_samples=5)
    assert more.log_weights(POINTS).shape == [5, 5] and distribution.log_weights(POINTS).shape == [3, 5]


# The identity on the extra dimensions.


def base_flow(conditional=False, event_ndims=1):
    net = (ConditionalNet if conditional else Net)(1, 4, 1)
    mask = dfb.masks.Channel(event_ndims=event_ndims, num_conditioning=1)
    return dfb.Chain([dfb.AffineCoupling(net, mask, dtype=tf.float64), dfb.ElementwiseAffine(normal([3], 2), normal([3], 3))])


@pytest.mark.parametrize("num_extra", [1, 3])
@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)])
def test_a_flow_that_ignores_the_extra_dimensions_is_the_flow_without_them(shape, num_extra):
    rank, joint = len(shape), [*shape[:-1], 3 + num_extra]
    plain = flow_of(base_flow(event_ndims=rank), shape)
    vflow = dfb.VFlow(OnFirst(base_flow(event_ndims=rank), 3, rank), None, num_extra, event_ndims=rank)
    augmented = dfd.Augmented(flow_of(vflow, joint), num_extra)
    x = 2.0 * normal([6, *shape], 5)
    expected = plain.log_prob(x)
    assert_close(augmented.log_weights(x, num_samples=9), np.tile(expected, [9, 1]), 1e-10)
    for s in (1, 9):
        assert_close(augmented.log_prob(fresh(x), num_samples=s), expected, 1e-10)
        assert_close(augmented.elbo(fresh(x), num_samples=s), expected, 1e-10)


def test_a_bounded_posterior_leaves_out_the_z_beyond():
    """z uniform on (0, 1): what is left is the probability of x with such a z."""
    vflow = dfb.VFlow(tfb.Scale(tf.constant(2.0, tf.float64)), tfb.NormalCDF(), 1, event_ndims=1)
    augmented = dfd.Augmented(flow_of(vflow, [3]), 1)
    x = normal([5, 2], 1)
    weights = np.exp(augmented.log_weights(x, num_samples=20_000, seed=SEED))
    within = tfd.Normal(tf.zeros([], tf.float64), 2.0).cdf(1.0) - 0.5
    assert_mean(weights, np.exp(tf.reduce_sum(tfd.Normal(tf.zeros([], tf.float64), 2.0).log_prob(x), -1)) * within)
    assert np.isfinite(augmented.sample(50, seed=SEED)).all()


@pytest.mark.slow
def test_lcma_ranks_and_factors_out_augmented_dimensions():
    """VFlow wraps a multi-scale flow whose factor-out follows the contributions of data and extra dimensions alike."""
    shape, posterior = (4, 4, 2), tfb.Scale(tf.constant(0.5))

    def augmented(contributions):
        flow = dimflows.recipes.lcma_realnvp(shape, contributions=contributions, width=4, num_blocks=1, depth=1)
        distribution = flow_of(dfb.VFlow(flow.bijector, posterior, 1, event_ndims=3), [32], "float32")
        dimflows.FlowModel(distribution)
        randomize(distribution.trainable_variables)
        return flow.bijector, dfd.Augmented(distribution, 1)

    x = normal([6, 4, 4, 1], 5, "float32")
    e = normal([6, 4, 4, 1], 6, "float32")
    joint = tf.concat([x, posterior.forward(e)], axis=-1)
    pretrained, _ = augmented(None)
    contributions = dimflows.likelihood_contributions(pretrained, [joint])
    flow, marginal = augmented(contributions)
    expected = dfb.DimensionFactorization.from_contributions(contributions)
    np.testing.assert_array_equal(flow.factorization.kept[0], expected.kept[0])
    log_joint = flow_of(flow, [32], "float32").log_prob(joint)
    log_q = tfd.Independent(tfd.Normal(tf.zeros(shape[:2] + (1,)), 0.5), 3).log_prob(joint[..., 1:])
    log_e = tfd.Independent(tfd.Normal(tf.zeros(shape[:2] + (1,)), 1.0), 3).log_prob(e)
    weight = marginal.distribution.log_prob(tf.concat([x, e], axis=-1)) - log_e
    assert_close(weight, log_joint - log_q, 1e-4)
    assert marginal.sample(3, seed=SEED).shape == [3, 4, 4, 1]
    assert_close(marginal.decode(marginal.encode(x)), x, 1e-3)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_a_condition_reaches_the_flow(num_samples):
    vflow = dfb.VFlow(OnFirst(base_flow(conditional=True), 3), None, 2, event_ndims=1)
    augmented, plain = dfd.Augmented(flow_of(vflow, [5]), 2), flow_of(base_flow(conditional=True), [3])
    x, one, other = normal([7, 3], 5), normal([7, 6], 6), normal([7, 6], 7)
    for condition in (one, other):
        kwargs = {"bijector_kwargs": {"condition": condition}}
        expected = plain.log_prob(x, **kwargs)
        assert_close(augmented.log_prob(x, num_samples=num_samples, **kwargs), expected, 1e-10)
        z = augmented.encode(x, condition=condition)
        assert_close(augmented.decode(z, condition=condition), x)
    sample = augmented.sample(7, seed=SEED, bijector_kwargs={"condition": one})
    assert sample.shape == [7, 3] and np.isfinite(sample).all()


class PicturedNet(Net):
    """The network with an image of 6 channels as condition, or with a dict of it."""

    def __call__(self, x, condition=None):
        condition = condition["image"] if isinstance(condition, dict) else condition
        return tf.tanh(x @ self.first + condition) @ self.second


@pytest.mark.parametrize("structure", [False, True])
def test_a_posterior_without_condition_leaves_the_flow_any(structure):
    mask = dfb.masks.Channel(event_ndims=3, num_conditioning=1)
    flow = dfb.Chain([dfb.AffineCoupling(PicturedNet(1, 4, 1), mask, dtype=tf.float64)])
    vflow = dfb.VFlow(OnFirst(flow, 3, 3), tfb.Scale(tf.constant(2.0, tf.float64)), 1, event_ndims=3)
    x, e, condition = normal([5, 2, 2, 3], 1), normal([5, 2, 2, 1], 2), normal([5, 2, 2, 6], 3)
    given = {"image": condition} if structure else condition
    joint = tf.concat([x, e], axis=-1)
    expected = tf.concat([flow.inverse(x, condition=condition), 2.0 * e], axis=-1)
    latent = vflow.inverse(joint, condition=given)
    assert_close(latent, expected)
    assert_close(vflow.forward(fresh(latent), condition=given), joint)
    ildj = flow.inverse_log_det_jacobian(x, event_ndims=3, condition=condition) + 4.0 * np.log(2.0)
    assert_close(vflow.inverse_log_det_jacobian(joint, event_ndims=3, condition=given), ildj)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_a_condition_of_one_event_is_shared(num_samples):
    vflow = dfb.VFlow(OnFirst(base_flow(conditional=True), 3), None, 2, event_ndims=1)
    augmented, plain = dfd.Augmented(flow_of(vflow, [5]), 2), flow_of(base_flow(conditional=True), [3])
    x, condition = normal([7, 3], 5), normal([1, 6], 6)
    kwargs = {"bijector_kwargs": {"condition": condition}}
    expected = plain.log_prob(x, bijector_kwargs={"condition": tf.repeat(condition, 7, axis=0)})
    assert_close(augmented.log_prob(x, num_samples=num_samples, **kwargs), expected, 1e-10)


@pytest.mark.parametrize("num_samples", [None, 4])
def test_a_condition_passes_preprocessing_and_dequantisation(num_samples):
    """What a user gives in `distribution_kwargs` must not give way to the seed that goes the same way."""
    vflow = dfb.VFlow(OnFirst(base_flow(conditional=True), 3), None, 2, event_ndims=1)
    preprocess = dfb.LogitPreprocess(LEVELS)
    deep, plain = (
        dfd.Dequantized(tfd.TransformedDistribution(d, preprocess), LEVELS)
        for d in (dfd.Augmented(flow_of(vflow, [5]), 2), flow_of(base_flow(conditional=True), [3]))
    )
    x = np.random.default_rng(0).integers(0, LEVELS, size=[7, 3])
    for seed in (6, 7):
        kwargs = {"distribution_kwargs": {"bijector_kwargs": {"condition": normal([7, 6], seed)}}}
        expected = plain.log_prob(x, num_samples=num_samples, seed=SEED, **kwargs)
        assert_close(deep.log_prob(x, num_samples=num_samples, seed=SEED, **kwargs), expected, 1e-9)


# A nonlinear flow.


def nonlinear(dtype="float64"):
    """Two dimensions with two extra ones, mixed by couplings, and a posterior that depends on x."""
    couplings = [
        dfb.AffineCoupling(
            Net(2, 4, k, dtype, 0.6), dfb.masks.Channel(event_ndims=1, flip=bool(k % 2)), dtype=tf.as_dtype(dtype)
        )
        for k in range(3)
    ]
    net = Net(2, 2, 7, dtype, 0.4)

    def params(x):
        shift = net(x)
        return tf.reshape(tf.stack([shift, -1.2 * tf.ones_like(shift)], axis=-1), [-1, 4])

    posterior = dfb.ConditionalTransform(params, dfb.transformers.Affine("exp"), event_ndims=1)
    return dfd.Augmented(flow_of(dfb.VFlow(dfb.Chain(couplings), posterior, 2, event_ndims=1), [4], dtype), 2)


def test_the_density_of_a_nonlinear_flow_integrates_to_one():
    distribution = nonlinear()
    sample = distribution.sample(20_000, seed=SEED).numpy()
    reach, points, samples = 1.2 * np.abs(sample).max(), 160, 32
    line = (np.arange(points) + 0.5) / points * 2.0 * reach - reach
    grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    evaluate = tf.function(lambda x: distribution.log_weights(x, num_samples=samples, seed=SEED), autograph=False)
    weights = np.exp(evaluate(tf.constant(grid)).numpy()) * (2.0 * reach / points) ** 2
    total, error = weights.mean(axis=0).sum(), np.sqrt((weights.var(axis=0) / (samples - 1)).sum())
    assert error < 0.03
    assert abs(total - 1.0) < 4.0 * error
    elbo = evaluate(tf.constant(grid)).numpy().mean(axis=0)
    assert np.exp(elbo).sum() * (2.0 * reach / points) ** 2 < total


# Under preprocessing and dequantisation.


def nested(conditional=False, dtype="float32", num_samples=1, noise=None, seed=0, **options):
    """Integer images of one channel with one extra channel."""
    net = (ConditionalNet if conditional else Net)(1, 2, seed, dtype)
    flow = dfb.Chain(
        [
            dfb.ActNorm(2, dtype=tf.as_dtype(dtype)),
            dfb.AffineCoupling(net, dfb.masks.Channel(), dtype=tf.as_dtype(dtype)),
            dfb.AffineCoupling(Net(1, 2, seed + 1, dtype), dfb.masks.Channel(flip=True), dtype=tf.as_dtype(dtype)),
        ]
    )
    posterior = dfb.ConditionalTransform(Net(1, 2, seed + 2, dtype), dfb.transformers.Affine("exp"))
    vflow = dfb.VFlow(flow, posterior, num_extra=1)
    augmented = dfd.Augmented(flow_of(vflow, [2, 2, 2], dtype), num_extra=1, num_samples=num_samples)
    return dfd.Dequantized(tfd.TransformedDistribution(augmented, dfb.LogitPreprocess(LEVELS)), LEVELS, noise, **options)


def images(batch=5, seed=0):
    return np.random.default_rng(seed).integers(0, LEVELS, size=[batch, *IMAGE])


@pytest.mark.parametrize("num_samples", [1, 6])
def test_both_noises_are_drawn_jointly(num_samples):
    joint = Recorder(tfd.MultivariateNormalDiag(tf.zeros([5], tf.float64), 2.0 * tf.ones([5], tf.float64)))
    preprocess = dfb.LogitPreprocess(LEVELS)
    distribution = dfd.Dequantized(tfd.TransformedDistribution(dfd.Augmented(joint, num_extra=3), preprocess), LEVELS)
    x = np.random.default_rng(0).integers(0, LEVELS, size=[4, 2])
    log_weights = distribution.log_weights(x, num_samples=num_samples, seed=SEED)
    assert log_weights.shape == [num_samples, 4]
    (seen,) = joint.seen
    seen = tf.reshape(seen, [num_samples, 4, 5])
    assert np.unique(seen.numpy()).size == seen.numpy().size
    y, e = preprocess.forward(seen[..., :2]), seen[..., 2:]
    assert (np.floor(y) == x).all()
    expected = (
        joint.inner.log_prob(seen)
        - tfd.MultivariateNormalDiag(tf.zeros([3], tf.float64)).log_prob(e)
        + preprocess.inverse_log_det_jacobian(fresh(y), event_ndims=1)
    )
    assert_close(log_weights, expected, 1e-8)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_seed_reproduces_both_noises(num_samples):
    distribution, x = nested(dtype="float64"), images()
    kwargs = {"num_samples": num_samples}
    once = distribution.log_weights(x, seed=SEED, **kwargs)
    assert_close(distribution.log_weights(x, seed=SEED, **kwargs), once, 0.0)
    traced = tf.function(lambda x, seed: distribution.log_weights(x, seed=seed, **kwargs), autograph=False)
    assert_close(traced(x, tf.constant(SEED)), once, 1e-10)
    assert np.abs(traced(x, tf.constant((3, 5))) - once).min() > 1e-6
    assert np.abs(distribution.log_weights(x, **kwargs) - distribution.log_weights(x, **kwargs)).min() > 1e-6
    unseeded = tf.function(lambda x: distribution.log_weights(x, **kwargs), autograph=False)
    assert np.abs(unseeded(x) - unseeded(x)).min() > 1e-6


def test_noise_of_both_levels_depends_on_the_seed():
    """With a base that ignores x, what changes is the noise of the augmentation; with one that ignores e, of the cells."""
    x = np.random.default_rng(0).integers(0, LEVELS, size=[4, 2])
    for scale in ([1e6, 1e6, 2.0], [2.0, 2.0, 1.0]):
        joint = tfd.MultivariateNormalDiag(tf.zeros([3], tf.float64), tf.constant(scale, tf.float64))
        distribution = dfd.Dequantized(tfd.TransformedDistribution(dfd.Augmented(joint, 1), tfb.Identity()), LEVELS)
        spread = np.std([distribution.log_prob(x, seed=(0, s)) for s in range(5)], axis=0)
        assert (spread > 1e-3).all()


def test_an_inner_number_of_samples_tightens_each_outer_one():
    loose, tight = (nested(dtype="float64", num_samples=s) for s in (1, 200))
    x = np.tile(images(1), [100, 1, 1, 1])
    loose, tight = (d.log_weights(x, seed=SEED).numpy()[0] for d in (loose, tight))
    assert tight.std() < loose.std()
    assert tight.mean() > loose.mean()


def test_latent_values_of_integer_images_keep_the_extra_channel():
    distribution, x = nested(), images()
    z = distribution.encode(x)
    assert z.shape == [5, 2, 2, 2]
    np.testing.assert_array_equal(distribution.decode(z), x)
    assert distribution.sample(6, seed=SEED).shape == [6, *IMAGE]
    assert distribution.sample(6, seed=SEED).dtype == tf.int32


@pytest.mark.slow
def test_a_model_of_integer_images_trains_every_variable():
    noise = dfb.Chain([tfb.Sigmoid(), dfb.ConditionalTransform(Net(1, 2, 9, "float32"), dfb.transformers.Affine("exp"))])
    distribution = nested(noise=noise)
    variables = distribution.trainable_variables
    assert {id(v) for v in variables} >= {id(v) for v in noise.trainable_variables} and len(variables) == 3 + 3 + 3 + 2 + 2 + 3
    model, x = dimflows.FlowModel(distribution, seed=0), images(8)
    model.compile("sgd")
    before = [v.numpy() for v in variables]
    history = model.fit(x, batch_size=4, epochs=1, verbose=0).history
    for v, old in zip(variables, before):
        assert np.isfinite(v.numpy()).all() and np.abs(v.numpy() - old).max() > 0.0, v.name
    np.testing.assert_allclose(history["bits_per_dim"], np.array(history["nll"]) / (4 * np.log(2.0)), rtol=1e-5)

    once = model.log_prob(x, seed=5)
    np.testing.assert_array_equal(model.log_prob(x, seed=5), once)
    assert np.abs(model.log_prob(x, seed=6) - once).min() > 0.0
    many = model.log_prob(x, num_samples=40, seed=5)
    assert many.shape == [8] and np.mean(many) > np.mean(once)
    assert model.sample([3], seed=1).shape == [3, *IMAGE]

    path = model.interpolate(x[:2], x[2:4], num_steps=3)
    assert path.shape == [3, 2, *IMAGE]
    np.testing.assert_array_equal(path[0], x[:2])
    np.testing.assert_array_equal(path[-1], x[2:4])


def test_a_model_of_vectors_without_dequantisation():
    distribution = nonlinear("float32")
    model = dimflows.FlowModel(distribution, seed=0)
    x = normal([6, 2], 1, "float32")
    many, one = model.log_prob(x, num_samples=500, seed=1), model.log_prob(x, seed=1)
    assert many.shape == [6] and np.mean(many) > np.mean(one)
    path = model.interpolate(x[:2], x[2:4], num_steps=4)
    assert path.shape == [4, 2, 2]
    np.testing.assert_allclose(path[0], x[:2], atol=1e-4)
    np.testing.assert_allclose(path[-1], x[2:4], atol=1e-4)


def test_a_model_of_augmented_data_under_a_bijector_takes_samples():
    """The noise is below the top distribution's bijector."""
    distribution = tfd.TransformedDistribution(nonlinear("float32"), tfb.Scale(tf.Variable([2.0, 3.0])))
    model = dimflows.FlowModel(distribution, seed=0)
    x = normal([4, 2], 1, "float32")
    inner = nonlinear("float32").log_prob(x / [2.0, 3.0], num_samples=20, seed=tf.constant([0, 7]))
    np.testing.assert_allclose(model.log_prob(x, num_samples=20, seed=7), inner - np.log(6.0), rtol=1e-4, atol=1e-4)
    path = model.interpolate(x[:1], x[1:2], num_steps=2)
    np.testing.assert_allclose(path[:, 0], x[:2], atol=1e-4)


def test_a_conditional_model_of_augmented_vectors():
    vflow = dfb.VFlow(OnFirst(base_flow(conditional=True), 3), None, 2, event_ndims=1)
    model = dimflows.FlowModel(dfd.Augmented(flow_of(vflow, [5]), 2), seed=0)
    x, condition = normal([7, 3], 5), normal([7, 6], 6)
    expected = flow_of(base_flow(conditional=True), [3]).log_prob(x, bijector_kwargs={"condition": condition})
    for num_samples in (None, 3):
        log_prob = model.log_prob({"x": x, "condition": condition}, num_samples=num_samples)
        np.testing.assert_allclose(log_prob, expected, rtol=1e-6)
    assert model.sample(condition=condition).shape == [7, 3]


# Chunks of samples.


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(variational, "_VALUES_AT_ONCE", 70)


@pytest.mark.parametrize(
    "num_samples, mode",
    [(7, "eager"), (8, "eager"), (14, "eager"), (36, "eager"), (8, "traced"), (15, "traced"), (15, "compiled")],
)
def test_chunks_have_the_same_shape_and_values(num_samples, mode, small_chunks):
    """Ten values: seven samples at once. With the exact posterior every log-weight is known."""
    distribution = linear(exact_posterior())
    shapes = []

    def function(x, seed):
        log_weights = distribution.log_weights(x, num_samples=num_samples, seed=seed)
        shapes.append(log_weights.shape)
        return log_weights

    if mode != "eager":
        function = tf.function(function, autograph=False, jit_compile=mode == "compiled")
    log_weights = function(tf.constant(POINTS), tf.constant(SEED))
    assert shapes[0] == log_weights.shape == [num_samples, 5]
    assert_close(log_weights, np.tile(MARGINAL.log_prob(POINTS), [num_samples, 1]), 1e-10)


def test_chunks_run_what_is_written(small_chunks):
    """`tf.map_fn` would rewrite the networks by AutoGraph, eagerly even, from whatever source is on disk at the time."""
    names = []

    class Written(dfd.VariationalDistribution):
        def __init__(self):
            super().__init__([2], tf.float64, name="Written")

        def _log_weights(self, x, num_samples, seed):
            names.append(sys._getframe().f_code.co_name)
            return tf.zeros([num_samples, *x.shape[:-1]], x.dtype)

    assert Written().log_weights(POINTS, num_samples=20).shape == [20, 5]
    assert len(names) >= 2 and set(names) == {"_log_weights"}


@pytest.mark.slow
def test_samples_in_chunks_are_distinct_and_have_the_right_mean(small_chunks):
    distribution = linear(wide_posterior())
    log_weights = distribution.log_weights(POINTS, num_samples=600, seed=SEED).numpy()
    assert np.unique(log_weights).size == log_weights.size
    assert_mean(log_weights, MARGINAL.log_prob(POINTS).numpy() - divergence(POINTS))
    assert_close(distribution.log_weights(POINTS, num_samples=600, seed=SEED), log_weights, 0.0)
    assert np.abs(distribution.log_weights(POINTS, num_samples=30) - distribution.log_weights(POINTS, num_samples=30)).min() > 0


def test_probes_of_chunks_are_distinct(small_chunks):
    """In a graph the chunks are passes of one loop, whose body is traced once."""

    class Probed(dfd.VariationalDistribution):
        def __init__(self):
            super().__init__([2], tf.float64, name="Probed")

        def _log_weights(self, x, num_samples, seed):
            probe = tf.random.stateless_normal([], dfb.probes.probe_seed(), dtype=x.dtype)
            return tf.zeros([num_samples, *x.shape[:-1]], x.dtype) + probe

    def function(seed):
        with dfb.probes.probes_from(seed):
            return Probed().log_weights(POINTS, num_samples=70, seed=SEED)

    eager, other = function(tf.constant([1, 2])), function(tf.constant([1, 3]))
    assert np.unique(eager).size == np.unique(np.stack([eager, other])).size - np.unique(other).size == 10
    assert_close(tf.function(function, autograph=False)(tf.constant([1, 2])), eager)


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [3, 16, 17, 50])
def test_an_unknown_batch_size(num_samples):
    distribution = linear(exact_posterior())
    seen = []

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, 2], tf.float64)])
    def function(x):
        log_weights = distribution.log_weights(x, num_samples=num_samples)
        seen.append(log_weights.shape)
        return log_weights, distribution.log_prob(x, num_samples=num_samples), distribution.elbo(x, num_samples=num_samples)

    for batch in (1, 5):
        log_weights, log_prob, elbo = function(POINTS[:batch])
        expected = MARGINAL.log_prob(POINTS[:batch])
        assert_close(log_weights, np.tile(expected, [num_samples, 1]), 1e-10)
        assert_close(log_prob, expected, 1e-10)
        assert_close(elbo, expected, 1e-10)
    assert len(seen) == 1 and seen[0][0] == num_samples


def test_chunks_of_dequantisation_draw_the_same_cells(small_chunks):
    uniform = tfd.Independent(tfd.Uniform(tf.zeros([4]), float(LEVELS)), 1)
    x = np.random.default_rng(0).integers(0, LEVELS, size=[6, 4])
    distribution = dfd.Dequantized(uniform, LEVELS)
    log_weights = distribution.log_weights(x, num_samples=20)
    np.testing.assert_allclose(log_weights, np.full([20, 6], -4 * np.log(LEVELS)), rtol=1e-5)
    triangle = tfd.Independent(tfd.Triangular(tf.zeros([4]), float(LEVELS), 3.0), 1)
    log_weights = dfd.Dequantized(triangle, LEVELS).log_weights(x, num_samples=20)
    assert np.unique(log_weights).size == 120


@pytest.mark.parametrize("mode", ["eager", "traced"])
def test_gradients_pass_chunks(mode, small_chunks):
    scale = tf.Variable(tf.constant(0.5, tf.float64))
    joint = flow_of(dfb.VFlow(tfb.Scale(scale), None, 2, event_ndims=1), [4])
    distribution = dfd.Augmented(joint, 2)

    def function():
        with tf.GradientTape() as tape:
            elbo = tf.reduce_sum(distribution.elbo(POINTS, num_samples=40, seed=SEED))
        return elbo, tape.gradient(elbo, scale)

    elbo, gradient = (tf.function(function, autograph=False) if mode == "traced" else function)()
    step = 1e-6
    values = []
    for sign in (1.0, -1.0):
        scale.assign(0.5 + sign * step)
        values.append(distribution.elbo(POINTS, num_samples=40, seed=SEED).numpy().sum())
    assert np.isfinite(elbo)
    np.testing.assert_allclose(gradient, (values[0] - values[1]) / (2 * step), rtol=1e-6)


def test_conditions_pass_chunks(small_chunks):
    vflow = dfb.VFlow(OnFirst(base_flow(conditional=True), 3), None, 2, event_ndims=1)
    augmented, plain = dfd.Augmented(flow_of(vflow, [5]), 2), flow_of(base_flow(conditional=True), [3])
    x, kwargs = normal([7, 3], 5), {"bijector_kwargs": {"condition": normal([7, 6], 6)}}
    expected = np.tile(plain.log_prob(x, **kwargs), [23, 1])
    assert_close(augmented.log_weights(x, num_samples=23, **kwargs), expected, 1e-10)


# Noise flows.


def noise_flow(dtype="float64", seed=3):
    """Conditional couplings and a sigmoid; the condition is scaled so that its values differ."""

    def scaled(x, condition):
        return net(tf.concat([x, tf.cast(condition, x.dtype) / LEVELS], axis=-1))

    net = Net(2 + 3, 2, seed, dtype)
    coupling = dfb.AffineCoupling(
        scaled, dfb.masks.Channel(event_ndims=1, flip=True, num_conditioning=2), dtype=tf.as_dtype(dtype)
    )
    diagonal = dfb.ConditionalTransform(
        Net(3, 6, seed + 1, dtype, 0.3), dfb.transformers.Affine("tanh", dtype=tf.as_dtype(dtype)), 1
    )
    return dfb.Chain([tfb.Sigmoid(), diagonal, coupling])


def gaussian(dtype="float64"):
    return tfd.MultivariateNormalDiag(tf.constant([1.2, 3.9, 2.5], dtype), tf.constant([0.8, 1.1, 2.0], dtype))


TRIPLES = np.int32([[1, 4, 2], [0, 3, 7], [2, 5, 0]])


def test_dequantize_takes_noise_from_the_flow():
    noise = noise_flow()
    distribution = dfd.Dequantized(gaussian(), LEVELS, noise)
    assert distribution.noise is noise and dfd.Dequantized(gaussian(), LEVELS).noise is None
    every = np.stack(np.meshgrid(*[np.arange(LEVELS)] * 3), axis=-1).reshape(-1, 3)
    y = distribution.dequantize(every, seed=SEED)
    u = y.numpy() - every
    assert ((u > 0.0) & (u < 1.0)).all()
    assert_close(distribution.dequantize(every, seed=SEED), y, 0.0)
    # The noise depends on the event, for the same e.
    e = noise.inverse(tf.constant(u), condition=tf.constant(every, tf.float64))
    assert_mean(e, 0.0)
    assert_mean(np.square(e), 1.0)
    alone = dfd.Dequantized(gaussian(), LEVELS, tfb.Sigmoid()).dequantize(every, seed=SEED) - every
    assert np.abs(alone - u).max() > 0.1


def test_log_weights_take_off_the_density_of_the_noise():
    """By the change of variables, differentiated automatically."""
    recorder, noise = Recorder(gaussian()), noise_flow()
    log_weights = dfd.Dequantized(recorder, LEVELS, noise).log_weights(TRIPLES, num_samples=4, seed=SEED)
    x = np.broadcast_to(TRIPLES, [4, 3, 3]).astype(np.float64).reshape(12, 3)
    (y,) = recorder.seen
    u = tf.reshape(y, [12, 3]) - x
    with tf.GradientTape() as tape:
        tape.watch(u)
        e = noise.inverse(u, condition=tf.constant(x))
    log_det = np.linalg.slogdet(tape.batch_jacobian(e, u).numpy())[1]
    log_r = tfd.MultivariateNormalDiag(tf.zeros([3], tf.float64)).log_prob(e).numpy() + log_det
    expected = recorder.inner.log_prob(y) - log_r.reshape(4, 3)
    assert_close(log_weights, expected, 1e-7)


@pytest.mark.parametrize("noise", [tfb.NormalCDF(), tfb.Chain([tfb.NormalCDF()])], ids=["alone", "chain"])
def test_uniform_noise_from_a_flow(noise):
    uniform = tfd.Independent(tfd.Uniform(tf.zeros([3], tf.float64), np.float64(LEVELS)), 1)
    log_weights = dfd.Dequantized(uniform, LEVELS, noise).log_weights(TRIPLES, num_samples=50, seed=SEED)
    assert_close(log_weights, np.full([50, 3], -3 * np.log(LEVELS)), 1e-9)
    distribution = dfd.Dequantized(gaussian(), LEVELS, noise)
    a = TRIPLES - gaussian().mean().numpy()
    scale = gaussian().stddev().numpy()
    elbo = (-0.5 * (a**2 + a + 1.0 / 3.0) / scale**2 - np.log(scale) - 0.5 * np.log(2.0 * np.pi)).sum(axis=-1)
    assert_mean(distribution.log_weights(TRIPLES, num_samples=20_000, seed=SEED), elbo)


def wide_noise_flow():
    """Logits wide enough for weights of moderate variance, and a shift that depends on the event."""
    net = Net(3, 3, 5, scale=0.3)

    def params(condition):
        shift = net(condition / LEVELS)
        return tf.reshape(tf.stack([shift, -0.5 * tf.ones_like(shift)], axis=-1), [-1, 6])

    return dfb.Chain([tfb.Sigmoid(), dfb.ConditionalTransform(params, dfb.transformers.Affine("exp"), event_ndims=1)])


def unconditional_noise_flow():
    return tfb.Chain([tfb.Sigmoid(), tfb.Scale(np.float64(1.5))])


@pytest.mark.parametrize("make", [wide_noise_flow, unconditional_noise_flow])
def test_weights_average_to_the_probability_of_the_cell(make):
    distribution = dfd.Dequantized(gaussian(), LEVELS, make())
    cdf = tfd.Normal(gaussian().mean(), gaussian().stddev()).cdf
    exact = np.prod(cdf(TRIPLES + 1.0).numpy() - cdf(TRIPLES + 0.0).numpy(), axis=-1)
    assert_mean(np.exp(distribution.log_weights(TRIPLES, num_samples=40_000, seed=SEED)), exact)


def test_the_noise_flow_is_given_the_integer_event_as_floats():
    given = []

    def network(condition):
        given.append(condition)
        return tf.zeros([*condition.shape[:-1], 6], condition.dtype)

    noise = dfb.Chain([tfb.Sigmoid(), dfb.ConditionalTransform(network, dfb.transformers.Affine("exp"), event_ndims=1)])
    distribution = dfd.Dequantized(gaussian("float32"), LEVELS, noise)
    distribution.log_prob(TRIPLES, seed=SEED)
    assert given[-1].dtype == tf.float32
    np.testing.assert_array_equal(given[-1], TRIPLES)
    distribution.log_prob(TRIPLES, num_samples=2, seed=SEED)
    np.testing.assert_array_equal(tf.reshape(given[-1], [2, 3, 3]), np.stack([TRIPLES, TRIPLES]))
    distribution.dequantize(TRIPLES[0], seed=SEED)
    np.testing.assert_array_equal(tf.reshape(given[-1], [3]), TRIPLES[0])


@pytest.mark.parametrize("num_samples, mode", [(1, "eager"), (3, "eager"), (1, "traced"), (3, "compiled")])
def test_gradients_reach_the_noise_flow(num_samples, mode):
    distribution = dfd.Dequantized(gaussian(), LEVELS, noise_flow())
    variables = distribution.noise.trainable_variables
    assert len(variables) == 8 and {id(v) for v in variables} <= {id(v) for v in distribution.trainable_variables}

    def function(x):
        with tf.GradientTape() as tape:
            elbo = tf.reduce_sum(distribution.elbo(x, num_samples=num_samples, seed=tf.constant(SEED)))
        return elbo, tape.gradient(elbo, variables)

    if mode != "eager":
        function = tf.function(function, autograph=False, jit_compile=mode == "compiled")
    elbo, gradients = function(tf.constant(TRIPLES))
    assert np.isfinite(elbo)
    for v, gradient in zip(variables, gradients):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0.0, v.name


def test_a_learnt_noise_flow_tightens_the_bound():
    """With r(u | x) the conditional density of the cell, here that of x + u itself, the bound is exact."""
    truncated = [tfd.TruncatedNormal(m, s, 0.0, 1.0) for m, s in zip([-0.3, 0.2, 1.4], [0.5, 0.7, 1.1])]
    loc, scale = (np.array([getattr(t, name).numpy() for t in truncated], np.float64) for name in ("loc", "scale"))
    density = tfd.MultivariateNormalDiag(loc, scale)
    base = tfd.Normal(loc, scale)
    low, high = base.cdf(np.zeros(3)), base.cdf(np.ones(3))
    noise = tfb.Chain(
        [tfb.Shift(loc), tfb.Scale(scale), tfb.Invert(tfb.NormalCDF()), tfb.Shift(low), tfb.Scale(high - low), tfb.NormalCDF()]
    )
    x = np.zeros([2, 3], np.int32)
    log_weights = dfd.Dequantized(density, LEVELS, noise).log_weights(x, num_samples=30, seed=SEED)
    assert_close(log_weights, np.full([30, 2], np.log((high - low).numpy()).sum()), 1e-8)


def test_a_copy_keeps_the_noise_flow():
    distribution = dfd.Dequantized(gaussian(), LEVELS, noise_flow())
    copy = distribution.copy(num_samples=2)
    assert copy.noise is distribution.noise and copy.log_weights(TRIPLES).shape == [2, 3]


# Errors.


def small_vflow(**options):
    return dfb.VFlow(tfb.Scale(2.0), **({"posterior": None, "num_extra": 2, "event_ndims": 1} | options))


def conditional_vflow(**options):
    mask = dfb.masks.Channel(event_ndims=1, num_conditioning=1)
    coupling = dfb.AffineCoupling(lambda x, condition: condition, mask)
    return dfb.VFlow(coupling, None, 2, event_ndims=1, **options)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: small_vflow(num_extra=0), "VFlow: got num_extra=0, needs a positive integer"),
        (lambda: small_vflow(num_extra=-1), "VFlow: got num_extra=-1, needs a positive integer"),
        (lambda: small_vflow(num_extra=1.5), "VFlow: got num_extra=1.5, needs a positive integer"),
        (lambda: small_vflow(event_ndims=2), "VFlow: got event_ndims=2, needs 1 .vectors. or 3 .images."),
        (lambda: small_vflow().inverse(tf.ones([3, 2])), r"vflow: got events of shape \(3, 2\), needs more than 2 on the last"),
        (lambda: small_vflow(name="mine").inverse(tf.ones([1])), r"mine: got events of shape \(1,\), needs more than 2"),
        (lambda: small_vflow().inverse_log_det_per_dim(tf.ones([3, 1])), r"vflow: got events of shape \(3, 1\)"),
        (lambda: small_vflow().inverse(tf.ones([3, 4]), condition=tf.ones([3, 1])), "vflow: got a condition, but no part"),
        (
            lambda: small_vflow(posterior=exact_posterior()).inverse(tf.ones([3, 4]), condition={"c": tf.ones([3, 1])}),
            "vflow: got a dict as condition, needs a tensor with one vector for each event",
        ),
        (
            lambda: small_vflow(posterior=exact_posterior(), name="mine").inverse(tf.ones([3, 4]), condition=tf.ones([1])),
            r"mine: got a condition of shape \(1,\), needs one vector for each event: 2 axes",
        ),
        (lambda: dfd.Augmented(gaussian(), 3), r"Augmented: got events of shape \(3,\), needs .* more than 3 dimensions"),
        (lambda: dfd.Augmented(gaussian(), 0), r"Augmented: got num_extra=0"),
        (lambda: dfd.Augmented(gaussian(), -1), r"Augmented: got num_extra=-1"),
        (lambda: dfd.Augmented(tfd.Normal(0.0, 1.0), 1), r"Augmented: got events of shape \(\), needs"),
        (
            lambda: dfd.Augmented(tfd.MultivariateNormalDiag(tf.zeros([4, 3])), 1),
            r"Augmented: got a distribution with batch shape \(4,\), needs a single one",
        ),
        (lambda: dfd.Augmented(gaussian(), 1, num_samples=0), "Augmented: got num_samples=0, needs a positive integer"),
        (
            lambda: dfd.Augmented(gaussian(), 1).log_prob(tf.ones([5, 3])),
            r"Augmented: got values of shape \(5, 3\), needs .*\(2,\)",
        ),
        (
            lambda: dfd.Augmented(gaussian(), 1, name="mine").elbo(tf.ones([])),
            r"mine: got values of shape \(\), needs .*\(2,\)",
        ),
        (lambda: dfd.Augmented(gaussian(), 1).log_weights(tf.ones([2]), num_samples=0), "Augmented: got num_samples=0, needs"),
        (lambda: dfd.Augmented(gaussian(), 1, num_samples=1.5), "Augmented: got num_samples=1.5, needs a positive integer"),
    ],
)
def test_errors_name_the_object_what_it_got_and_what_it_needs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_augmented_needs_a_static_event_shape():
    shapes = tf.function(
        lambda n: dfd.Augmented(tfd.Sample(tfd.Normal(0.0, 1.0), n), 1).log_prob(tf.ones([2])), autograph=False
    )
    with pytest.raises(ValueError, match="Augmented: got events of shape .*, needs static ones"):
        shapes.get_concrete_function(tf.TensorSpec([1], tf.int32))


def test_a_posterior_that_needs_a_condition_gets_x_in_both_directions():
    given = []

    def network(x):
        given.append(x.numpy())
        return tf.repeat(x, 2, axis=-1)

    posterior = dfb.ConditionalTransform(network, dfb.transformers.Affine("exp"), event_ndims=1)
    vflow = dfb.VFlow(tfb.Scale(np.float64(2.0)), posterior, 1, event_ndims=1)
    y = normal([3, 2], 1)
    vflow.forward(fresh(vflow.inverse(y)))
    for x in given:
        assert_close(x, y[:, :1])
    assert len(given) == 2 and vflow.posterior is posterior and vflow.num_extra == 1 and isinstance(vflow.flow, tfb.Scale)


def test_log_prob_runs_each_network_once():
    calls = []

    def counted(name, function):
        def network(x):
            calls.append(name)
            return function(x)

        return network

    mask = dfb.masks.Channel(event_ndims=1)
    coupling = dfb.AffineCoupling(counted("flow", functools.partial(tf.repeat, repeats=2, axis=-1)), mask, "exp")
    posterior = dfb.ConditionalTransform(
        counted("posterior", functools.partial(tf.repeat, repeats=2, axis=-1)), dfb.transformers.Affine("exp"), event_ndims=1
    )
    joint = flow_of(dfb.VFlow(coupling, posterior, 2, event_ndims=1), [4])
    for num_samples in (1, 5):
        calls.clear()
        dfd.Augmented(joint, 2).log_prob(POINTS, num_samples=num_samples)
        assert sorted(calls) == ["flow", "posterior"]
    calls.clear()
    tf.function(lambda: dfd.Augmented(joint, 2).sample(3), autograph=False)()
    assert calls == ["flow"]
    calls.clear()
    dfd.Augmented(joint, 2).decode(normal([3, 4], 1))
    assert calls == ["flow"]
