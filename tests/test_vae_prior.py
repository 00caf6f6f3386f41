"""`VAEPrior` against linear-Gaussian models known in closed form, its place below a flow, the recipe `flow-vae`."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import assert_close, fresh, slow

import tfp_dimflows as dimflows
from tfp_dimflows.distributions import variational
from tfp_dimflows.upstream import samplers

dfb, dfd = dimflows.bijectors, dimflows.distributions
tfb, tfd = tfp.bijectors, tfp.distributions

D, K = 5, 2
S = 7


def random(shape, seed, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


WEIGHTS, OFFSET, NOISE = random([D, K], 0), random([D], 1), np.exp(random([D], 2, 0.3))
Z = tf.constant(random([4, D], 3, 2.0))
# p(z) and p(e | z) of z = W e + b + s n.
MARGINAL = tfd.MultivariateNormalFullCovariance(OFFSET, WEIGHTS @ WEIGHTS.T + np.diag(NOISE**2))
PRECISION = np.eye(K) + WEIGHTS.T @ np.diag(NOISE**-2) @ WEIGHTS
GAIN = np.linalg.solve(PRECISION, WEIGHTS.T @ np.diag(NOISE**-2))


def decoder(e):
    return tf.linalg.matvec(WEIGHTS, e) + OFFSET


def posterior_mean(z):
    return tf.linalg.matvec(GAIN, z - OFFSET)


def likelihood(mean):
    return tfd.MultivariateNormalDiag(mean, NOISE)


def exact_posterior(h):
    return tfd.MultivariateNormalTriL(h, np.linalg.cholesky(np.linalg.inv(PRECISION)))


def linear(**options):
    """The linear-Gaussian model; without options its posterior is a diagonal Gaussian that is not exact."""
    encoder = posterior_mean
    if "posterior" not in options:

        def encoder(z):
            mean = posterior_mean(z)
            return tf.concat([mean, tf.zeros_like(mean) - 0.5], axis=-1)

    return dfd.VAEPrior(encoder, decoder, K, likelihood=likelihood, dtype=tf.float64, **options)


def networks(seed=0, dtype="float64"):
    initializer = {"kernel_initializer": keras.initializers.RandomNormal(stddev=0.5, seed=seed), "dtype": dtype}
    encoder = keras.Sequential([keras.layers.Dense(6, "tanh", **initializer), keras.layers.Dense(2 * K, **initializer)])
    return encoder, keras.Sequential([keras.layers.Dense(D, **initializer)])


def learned(**options):
    return dfd.VAEPrior(*networks(), K, dtype=tf.float64, **options)


# The bound.


def test_with_the_exact_posterior_every_log_weight_is_the_density():
    log_weights = linear(posterior=exact_posterior).log_weights(Z, num_samples=S, seed=(0, 1))
    assert_close(log_weights, np.broadcast_to(MARGINAL.log_prob(Z), [S, 4]))


def test_a_flow_as_exact_posterior():
    scale = np.linalg.cholesky(np.linalg.inv(PRECISION))

    class Posterior(dfb.FlowBijector):
        uses_condition = True

        def __init__(self):
            super().__init__(forward_min_event_ndims=1, parameters={}, name="posterior")

        def _forward_and_log_det_per_dim(self, x, condition):
            return tf.linalg.matvec(scale, x) + condition, tf.constant(np.log(np.diag(scale)))

    prior = linear(posterior=Posterior())
    for num_samples in (1, S):
        log_weights = prior.log_weights(Z, num_samples=num_samples, seed=(0, 1))
        assert_close(log_weights, np.broadcast_to(MARGINAL.log_prob(Z), [num_samples, 4]))
    assert_close(prior.encode(Z), posterior_mean(Z))


def test_any_flow_as_posterior_is_normalized():
    mask = dfb.masks.Channel(event_ndims=1)
    shift_and_scale = dimflows.networks.MLP(1, 2, hidden=[4], condition_channels=K, zero_init=False, seed=3, dtype="float64")
    flow = dfb.Chain([dfb.AffineCoupling(shift_and_scale, mask, dtype=tf.float64), dfb.InvertibleConv1x1(K, dtype=tf.float64)])
    weights = linear(posterior=flow).log_weights(Z[:1], num_samples=20_000, seed=(0, 1))[:, 0].numpy()
    ratios = np.exp(weights - MARGINAL.log_prob(Z[0]))
    assert ratios.std() > 0.05
    assert abs(ratios.mean() - 1.0) < 4.0 * ratios.std() / np.sqrt(len(ratios))


def test_bound_importance_weighted_estimate_and_density():
    prior = linear()
    elbo = prior.elbo(Z, num_samples=2000, seed=(0, 1))
    estimates = [tf.reduce_mean(prior.log_prob(tf.repeat(Z, 500, 0), num_samples=n, seed=(0, n))) for n in (1, 5, 50)]
    exact = MARGINAL.log_prob(Z)
    assert (elbo < exact - 0.01).numpy().all()
    assert estimates[0] < estimates[1] < estimates[2] < tf.reduce_mean(exact)
    assert_close(prior.log_prob(Z, num_samples=20_000, seed=(0, 2)), exact, 0.03)


def test_the_log_weight_is_reconstruction_less_kl():
    prior = learned()
    with variational.reports() as terms:
        log_weights = prior.log_weights(Z, num_samples=S, seed=(0, 1))
    assert terms["kl"].shape == terms["reconstruction"].shape == [S, 4]
    assert_close(log_weights, terms["reconstruction"] - terms["kl"])


def test_the_reported_kl_has_the_right_mean(monkeypatch):
    monkeypatch.setattr(variational, "_VALUES_AT_ONCE", 2**20)  # all samples in one chunk, the first being what reports
    prior = linear()
    with variational.reports() as terms:
        prior.log_weights(Z, num_samples=20_000, seed=(0, 1))
    q = tfd.MultivariateNormalDiag(posterior_mean(Z), np.full(K, np.exp(-0.5)))
    expected = q.kl_divergence(tfd.MultivariateNormalDiag(np.zeros(K)))
    error = terms["kl"].numpy().std(0) / np.sqrt(20_000)
    assert (np.abs(terms["kl"].numpy().mean(0) - expected) < 4.0 * error).all()


@pytest.mark.parametrize("kind", ["per_dimension", "global"])
def test_gaussian_likelihood(kind):
    prior = learned(likelihood=kind)
    (raw,) = [v for v in prior.trainable_variables if "log_scale" in v.name]
    assert raw.shape == ([D] if kind == "per_dimension" else [])
    raw.assign(random(raw.shape, 5, 4.0))
    scale = np.exp(3.0 * np.tanh(raw / 3.0))
    with variational.reports() as terms:
        prior.log_weights(Z, num_samples=1, seed=(0, 1))
    h = prior._encode(Z)
    e = prior._draw(h, 1, (0, 1))[0][0]
    expected = tfd.MultivariateNormalDiag(prior.decode(e), scale * np.ones(D)).log_prob(Z)
    assert_close(terms["reconstruction"][0], expected)


def test_samples_have_the_marginal_moments():
    samples = linear().sample(40_000, seed=(0, 1)).numpy()
    covariance = np.cov(samples.T)
    assert samples.shape == (40_000, D)
    np.testing.assert_allclose(samples.mean(0), OFFSET, atol=4.0 * np.sqrt(covariance.diagonal().max() / 40_000))
    np.testing.assert_allclose(covariance, MARGINAL.covariance(), atol=0.15)


def test_encode_and_decode():
    prior = learned()
    mean, _ = np.split(prior._encode(Z), 2, -1)
    assert_close(prior.encode(Z), mean)
    assert_close(prior.decode(prior.encode(Z)), prior._decoder(tf.constant(mean), event_ndims=1))
    assert_close(linear().decode(np.zeros([3, K])), np.broadcast_to(OFFSET, [3, D]))


@pytest.mark.parametrize("num_samples", [1, S])
def test_eager_graph_and_xla_agree(num_samples):
    prior = learned()

    def log_prob(z):
        return prior.log_prob(z, num_samples=num_samples, seed=tf.constant([0, 1]))

    eager = log_prob(Z)
    assert_close(tf.function(log_prob)(Z), eager)
    xla = tf.function(log_prob, jit_compile=True)(Z)
    assert xla.shape == eager.shape
    assert np.isfinite(xla).all()


def test_exact_weights_under_xla():
    prior = linear(posterior=exact_posterior)
    log_prob = tf.function(lambda z: prior.log_prob(z, num_samples=S, seed=tf.constant([0, 1])), jit_compile=True)
    assert_close(log_prob(Z), MARGINAL.log_prob(Z))


def test_thousands_of_samples_run_in_chunks(monkeypatch):
    monkeypatch.setattr(variational, "_VALUES_AT_ONCE", 200)
    prior = linear(posterior=exact_posterior)
    log_prob = tf.function(lambda z: prior.log_prob(z, num_samples=1003, seed=(0, 1)))
    with variational.reports() as terms:
        assert_close(log_prob(Z), MARGINAL.log_prob(Z))
    assert set(terms) == {"kl", "reconstruction"}


@pytest.mark.parametrize("batch", [[], [3], [2, 3]])
def test_any_batch_axes(batch):
    z = random([*batch, D], 8)
    assert linear().log_weights(z, num_samples=S, seed=(0, 1)).shape == [S, *batch]
    assert_close(linear(posterior=exact_posterior).log_prob(z, num_samples=S), MARGINAL.log_prob(z))


def test_half_precision_networks_give_full_precision_densities():
    prior = dfd.VAEPrior(*networks(dtype="mixed_bfloat16"), K)
    assert prior.log_prob(tf.ones([3, D])).dtype == tf.float32
    assert prior.sample(2, seed=(0, 1)).dtype == tf.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_dims": 0}, r"VAEPrior: got latent_dims=0, needs a positive integer"),
        ({"latent_dims": 3}, r"VAEPrior: the encoder's output has shape \(4,\), the Gaussian posterior needs \[6\]"),
        ({"likelihood": "laplace"}, r"VAEPrior: got likelihood='laplace', needs one of \('per_dimension', 'global'\)"),
        ({"num_samples": 0}, r"VAEPrior: got num_samples=0, needs a positive integer"),
    ],
)
def test_bad_arguments(change, message):
    encoder, decoder = networks(dtype="float32")
    with pytest.raises(ValueError, match=message):
        dfd.VAEPrior(encoder, decoder, **({"latent_dims": K} | change))


def test_events_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"VAEPrior: got values of shape \(4, 6\), needs events of shape \(5,\)"):
        learned().log_prob(np.zeros([4, 6]))


def test_copy():
    prior = learned()
    copy = prior.copy(num_samples=3)
    assert copy.log_weights(Z).shape == [3, 4]
    assert copy.trainable_variables


# Below a flow.


def flow_vae(prior):
    return tfd.TransformedDistribution(prior, tfb.Chain([tfb.Exp(), tfb.Scale(tf.Variable(random([D], 9), dtype=tf.float64))]))


def test_log_prob_of_the_flow_is_the_bound():
    model = flow_vae(linear())
    x = tf.exp(Z)
    z = model.bijector.inverse(x)
    for kwargs in ({"num_samples": 1}, {"num_samples": S}):
        kwargs |= {"seed": (0, 1)}
        expected = linear().log_prob(z, **kwargs) + model.bijector.inverse_log_det_jacobian(fresh(x), event_ndims=1)
        assert_close(model.log_prob(x, distribution_kwargs=kwargs), expected)


def test_sampling_goes_from_noise_to_latent_values_to_data():
    prior = linear()
    model = flow_vae(prior)
    samples, latents = model.sample(6, seed=(0, 1)), variational.encode(model, model.sample(6, seed=(0, 1)))
    assert samples.shape == [6, D]
    assert latents.shape == [6, K]
    assert_close(variational.decode(model, latents), model.bijector.forward(prior.decode(latents)))


def test_gradients_reach_flow_encoder_and_decoder():
    prior = learned()
    model = flow_vae(prior)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model.log_prob(tf.exp(Z), distribution_kwargs={"num_samples": 3, "seed": (0, 1)}))
    variables = dimflows.FlowModel(model).trainable_variables
    gradients = tape.gradient(loss, [v.value for v in variables])
    assert len(gradients) == 2 + 2 + 2 + 1 + 1
    assert all(np.abs(g).max() > 0.0 for g in gradients)


def test_scaling_flow_and_likelihood_alike_leaves_the_bound():
    """The direction along which training could drift, were the likelihood's scale not bounded."""
    factor = 1.3
    encoder, decoder = networks()

    def model(k, raw):
        prior = dfd.VAEPrior(lambda z: encoder(z / k), lambda e: k * decoder(e), K, likelihood="global", dtype=tf.float64)
        prior._likelihood.raw.assign(raw)
        return tfd.TransformedDistribution(prior, tfb.Scale(tf.constant(1.0 / k, tf.float64)))

    kwargs = {"distribution_kwargs": {"seed": (0, 1)}}
    log_scale = np.log(factor)
    scaled = model(factor, 3.0 * np.arctanh(log_scale / 3.0))
    assert_close(scaled.log_prob(Z, **kwargs), model(1.0, 0.0).log_prob(Z, **kwargs))


@pytest.mark.slow
def test_the_likelihoods_scale_stays_bounded():
    """On values that decoder and flow can make as certain as they like, the scale stops at exp(-3)."""
    prior = dfd.VAEPrior(*networks(dtype="float32"), K)
    model = dimflows.FlowModel(prior, seed=0)
    model.compile(keras.optimizers.Adam(0.05))
    history = model.fit(np.zeros([64, D], "float32"), batch_size=1, epochs=6, verbose=0)
    scale = prior._likelihood(tf.zeros([D])).stddev().numpy()
    assert np.isfinite(history.history["loss"]).all()
    assert (scale >= np.exp(-3.0)).all()
    assert (scale < 0.5).all()


# Trained with `fit`.


@pytest.fixture(scope="module")
def digits():
    return dimflows.data.load("digits", "train[:320]", batch_size=64)


@pytest.fixture(scope="module")
def trained(digits):
    model = dimflows.FlowModel(
        dimflows.recipes.flow_vae([8, 8, 1], latent_dims=4, width=4, num_blocks=1, grey_levels=17), seed=0
    )
    model.adapt(digits)
    model.compile(keras.optimizers.Adam(2e-3))
    history = model.fit(digits, epochs=4, verbose=0)
    return model, history.history


@pytest.mark.slow
def test_training_from_a_fresh_start_lowers_the_bound(trained):
    _, history = trained
    assert set(history) == {"loss", "nll", "bits_per_dim", "kl", "reconstruction"}
    assert all(np.isfinite(values).all() for values in history.values())
    assert history["nll"][-1] < history["nll"][0] - 10.0
    assert min(history["kl"]) > 0.0


def test_evaluate_reports_the_terms(digits):
    vae = dimflows.recipes.flow_vae([8, 8, 1], flow=None, latent_dims=4, vae_width=4, grey_levels=17)
    model = dimflows.FlowModel(vae, seed=0)
    model.compile()
    metrics = model.evaluate(digits, return_dict=True, verbose=0)
    assert metrics["nll"] > metrics["kl"] > 0.0
    assert metrics["loss"] == pytest.approx(metrics["nll"], abs=1.0)


@pytest.mark.slow
def test_importance_weighting_tightens_the_bound(trained, digits):
    model, _ = trained
    x = next(iter(digits))
    bounds = [float(tf.reduce_mean(model.log_prob(x, num_samples=n, seed=0))) for n in (1, 50)]
    assert bounds[0] < bounds[1]


@pytest.mark.slow
def test_saving(trained, tmp_path):
    model, _ = trained
    model.save(tmp_path / "model.keras")
    x = np.zeros([2, 8, 8, 1], "int32")
    assert_close(dimflows.load(str(tmp_path / "model.keras")).log_prob(x, seed=0), model.log_prob(x, seed=0), 1e-5)


@pytest.mark.slow
def test_interpolation_walks_between_codes(trained, digits):
    model, _ = trained
    x = next(iter(digits))
    assert model.encode(x).shape == [64, 4]
    walk = model.interpolate(x[0], x[1], num_steps=5)
    assert walk.shape == [5, 8, 8, 1]
    np.testing.assert_array_equal(walk[0], model.decode(model.encode(x[0])))
    np.testing.assert_array_equal(walk[-1], model.decode(model.encode(x[1])))


# KL warm-up.


def small_model():
    model = dimflows.FlowModel(dfd.VAEPrior(*networks(dtype="float32"), K), seed=0)
    model.compile(keras.optimizers.SGD(0.0))
    return model


def test_warmup_weights_the_kl_in_the_loss_only():
    model = small_model()
    x = np.float32(random([4, D], 3))
    weights = []
    record = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: weights.append(float(model.kl_weight)))
    history = model.fit(x, batch_size=4, epochs=4, verbose=0, callbacks=[dimflows.training.KLWarmup(2), record]).history
    assert weights == [0.0, 0.5, 1.0, 1.0]
    nll, kl, reconstruction = (np.array(history[name]) for name in ("nll", "kl", "reconstruction"))
    np.testing.assert_allclose(nll, kl - reconstruction, rtol=1e-4)
    np.testing.assert_allclose(history["loss"], np.array(weights) * kl - reconstruction, rtol=1e-4)
    assert (kl > 0.01).all()


def test_warmup_with_sample_weights():
    """The KL term has the weights of the bound that it is part of."""
    model, x, w = small_model(), np.float32(random([4, D], 3)), np.float32([0.0, 0.5, 1.0, 2.0])
    seen = []
    original = model.compute_loss

    def compute_loss(x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = original(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        seen.append((float(loss), float(-tf.reduce_mean(sample_weight * (y_pred + model._kl)))))
        return loss

    model.compute_loss = compute_loss
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    model.fit(x, sample_weight=w, batch_size=4, verbose=0, callbacks=[dimflows.training.KLWarmup(10)])
    assert seen[0][0] == pytest.approx(seen[0][1], rel=1e-5)


@pytest.mark.slow
def test_validation_during_warmup_is_of_the_bound():
    model = small_model()
    x = np.float32(random([4, D], 3))
    history = model.fit(x, validation_data=(x,), verbose=0, callbacks=[dimflows.training.KLWarmup(100)]).history
    assert history["val_loss"] == pytest.approx(history["val_nll"])
    assert history["loss"] != pytest.approx(history["nll"], abs=1e-3)
    assert float(model.kl_weight) == 1.0


def test_warmup_goes_on_where_the_optimizer_is():
    model = small_model()
    x = np.float32(random([4, D], 3))
    model.fit(x, batch_size=1, verbose=0, callbacks=[dimflows.training.KLWarmup(10)])
    weights = []
    record = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: weights.append(float(model.kl_weight)))
    model.fit(x, batch_size=1, verbose=0, callbacks=[dimflows.training.KLWarmup(10), record])
    np.testing.assert_allclose(weights, [0.4, 0.5, 0.6, 0.7], rtol=1e-6)


def test_warmup_needs_a_kl_term():
    model = dimflows.FlowModel(tfd.Sample(tfd.Normal(tf.Variable(0.0), 1.0), [D]))
    model.compile()
    with pytest.raises(ValueError, match="KLWarmup: .* has no KL term"):
        model.fit(np.zeros([4, D], "float32"), verbose=0, callbacks=[dimflows.training.KLWarmup(10)])
    with pytest.raises(ValueError, match="KLWarmup: got steps=0"):
        dimflows.training.KLWarmup(0)


# The recipe.


@pytest.mark.parametrize(
    "options",
    [slow({}), {"flow": "glow", "depth": 1}, slow({"factorization": None, "likelihood": "global"}), {"flow": None}],
)
def test_recipe(options):
    build = {"latent_dims": 3, "width": 4, "num_blocks": 1, "vae_width": 4, **options}
    flow = dimflows.recipes.flow_vae([8, 8, 2], **build)
    x = tf.constant(random([2, 8, 8, 2], 11), tf.float32)
    assert isinstance(flow.distribution, dfd.VAEPrior)
    assert flow.log_prob(x, distribution_kwargs={"num_samples": 3, "seed": (0, 1)}).shape == [2]
    latents = flow.bijector.inverse(x)
    assert latents.shape == x.shape
    assert_close(flow.bijector.forward(fresh(latents)), x, 1e-4)
    assert flow.sample(2, seed=(0, 1)).shape == [2, 8, 8, 2]
    images = dimflows.recipes.flow_vae([8, 8, 2], grey_levels=17, **build)
    assert np.isfinite(images.log_prob(np.zeros([2, 8, 8, 2], "int32"), num_samples=4)).all()


def test_recipe_defaults_to_a_quarter_of_the_dimensions():
    assert dimflows.recipes.flow_vae([4, 8, 1], width=4, num_blocks=1).distribution.latent_dims == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"event_shape": [6, 6, 1]},
            r"conv_encoder: got event shape \[6, 6, 1\], needs an image with height and width",
        ),
        ({"event_shape": [8]}, r"flow-vae: got event shape \[8\], needs an image"),
        ({"flow": "flowpp"}, r"flow-vae: got flow='flowpp', needs realnvp, glow or None"),
        ({"likelihood": "none"}, r"flow-vae: got likelihood='none'"),
        ({"latent_dims": 0}, r"flow-vae: got latent_dims=0"),
    ],
)
def test_recipe_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dimflows.recipes.flow_vae(**({"event_shape": [8, 8, 1]} | change))


def test_latent_values_in_the_layout_of_the_event():
    flow = dimflows.recipes.glow([8, 8, 1], num_levels=2, depth=1, width=4, factorization="random").bijector
    latent = np.float32(np.arange(64))
    image = flow.event_layout().inverse(latent)
    assert image.shape == [8, 8, 1]
    np.testing.assert_array_equal(image, dfb.walk.transport(flow, tf.constant(latent), "forward"))
    np.testing.assert_array_equal(flow.event_layout().forward(fresh(image)), latent)


@pytest.mark.slow
def test_recipe_is_its_configuration():
    flow = dimflows.recipes.flow_vae([4, 4, 1], latent_dims=2, width=4, num_blocks=1)
    config = json.loads(json.dumps(dimflows.recipes.config_of(flow)))
    again = dimflows.recipes.get(config["recipe"])(**config["arguments"])
    kwargs = {"distribution_kwargs": {"seed": (0, 1)}}
    assert_close(again.log_prob(tf.zeros([2, 4, 4, 1]), **kwargs), flow.log_prob(tf.zeros([2, 4, 4, 1]), **kwargs))


def test_the_noise_of_the_likelihood_has_another_seed():
    seen = []

    class Likelihood(tfd.MultivariateNormalDiag):
        """A likelihood that remembers its means and what seed it is given."""

        def sample(self, sample_shape=(), seed=None, **kwargs):
            seen.append((self.mean(), seed))
            return super().sample(sample_shape, seed=seed, **kwargs)

    prior = dfd.VAEPrior(lambda z: tf.tile(z, [1, 2]), lambda e: e, 3, likelihood=lambda e: Likelihood(e, tf.ones([3])))
    prior.sample(4, seed=[1, 2])
    ((latent, seed),) = seen
    assert np.abs(latent - samplers.normal([4, 3], dtype=tf.float32, seed=seed)).min() > 1e-4
