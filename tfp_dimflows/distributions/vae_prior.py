"""The learned low-dimensional prior of Flow-VAE."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.types.experimental import TensorLike
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import keras_bridge
from tfp_dimflows.distributions import variational
from tfp_dimflows.distributions.variational import VariationalDistribution
from tfp_dimflows.upstream import prefer_static as ps
from tfp_dimflows.upstream import samplers

_LOG_SCALE_BOUND = 3.0


class VAEPrior(VariationalDistribution):
    """Distribution over z that a variational autoencoder learns, with latent values e of only `latent_dims` dimensions.

        p(z) = integral of N(e; 0, I) p(z | e) over e in R^d,   log-weight: log N(e; 0, I) + log p(z | e) - log q(e | z)

    As `distribution` of a `TransformedDistribution` whose bijector is a flow x -> z it makes a Flow-VAE, and the `log_prob` of
    the whole is the bound

        E_q[log N(e; 0, I) + log p(z | e) - log q(e | z)] + log |det dz/dx|  <=  log p(x)

    Flow, encoder and decoder are trained together. `num_samples` and `seed` reach this distribution through TFP's
    `distribution_kwargs`.

    Scaling z and the standard deviation s of a Gaussian likelihood by the same factor leaves the bound as it is: with an
    unbounded s, training could drift along this direction for ever. Here s is between exp(-3) and exp(3); where the flow can
    scale its values, that restricts no density.

    Args:
      encoder: network from z to the parameters h of the posterior; for the default posterior `[2 d]`, means and log-scales.
      decoder: network from e, `[d]`, to the parameters of the likelihood, for the default likelihood means of z's shape.
      latent_dims: number d of dimensions of e.
      posterior: q(e | z): None, a diagonal Gaussian; a bijector from standard normal noise to e, given h as its condition (an
        inverse autoregressive flow, a chain of conditional couplings); or a function from h to a `tfd.Distribution` over e.
      likelihood: p(z | e): a Gaussian with a learned standard deviation for each dimension (`"per_dimension"`) or for all
        (`"global"`), or a function from the decoder's output to a `tfd.Distribution` over z.
      num_samples: default number of noise samples of `log_prob`.
      dtype: float type of z.
      name: the name of the operations.

    Raises:
      ValueError: if `latent_dims` is not positive, the likelihood is unknown, or encoder or decoder do not fit it.

    References: Das, Abbeel, Spanos, "Dimensionality reduction flows", 2019; Kingma, Welling, "Auto-encoding variational Bayes",
    2014.

    #### Example

    >>> encoder, decoder = keras.layers.Dense(2 * 2), keras.layers.Dense(8)
    >>> prior = dfd.VAEPrior(encoder, decoder, latent_dims=2)
    >>> flow_vae = tfd.TransformedDistribution(prior, tfb.Exp())
    >>> flow_vae.log_prob(tf.ones([5, 8]), distribution_kwargs={"num_samples": 10}).shape
    TensorShape([5])
    >>> flow_vae.sample(3, seed=[0, 0]).shape
    TensorShape([3, 8])
    """

    LIKELIHOODS = ("per_dimension", "global")
    terms = ("kl", "reconstruction")

    def __init__(
        self,
        encoder: Callable,
        decoder: Callable,
        latent_dims: int,
        posterior: tfb.Bijector | Callable | None = None,
        likelihood: str | Callable = "per_dimension",
        num_samples: int = 1,
        dtype: tf.DType = tf.float32,
        name: str = "VAEPrior",
    ):
        parameters = dict(locals())
        if not isinstance(latent_dims, int) or latent_dims < 1:
            raise ValueError(f"VAEPrior: got latent_dims={latent_dims!r}, needs a positive integer")
        if likelihood not in self.LIKELIHOODS and not callable(likelihood):
            raise ValueError(f"VAEPrior: got likelihood={likelihood!r}, needs one of {self.LIKELIHOODS} or a function")
        self._encoder, self._decoder = keras_bridge.Network(encoder), keras_bridge.Network(decoder)
        self._latent_dims = latent_dims
        self._posterior = posterior
        dtype = tf.as_dtype(dtype)
        with tf.init_scope():
            output = tf.cast(self._decoder(tf.zeros([1, latent_dims], dtype), event_ndims=1), dtype)
            self._likelihood = likelihood if callable(likelihood) else _Gaussian(likelihood, output.shape[1:], dtype)
            event_shape = self._likelihood(output).event_shape
            self._event_rank = event_shape.rank
            h = self._encoder(tf.zeros([1, *event_shape], dtype), event_ndims=self._event_rank)
        if posterior is None and h.shape[1:] != [2 * latent_dims]:
            raise ValueError(
                f"VAEPrior: the encoder's output has shape {h.shape[1:]}, the Gaussian posterior needs [{2 * latent_dims}], "
                f"{latent_dims} means and log-scales"
            )
        super().__init__(event_shape=event_shape, dtype=dtype, num_samples=num_samples, parameters=parameters, name=name)

    @property
    def latent_dims(self) -> int:
        """The number of dimensions of the latent values."""
        return self._latent_dims

    def encode(self, z: TensorLike) -> tf.Tensor:
        """Latent values e, `batch + [d]`: the posterior's mean; with a flow as posterior, the image of its noise's mean."""
        h = self._encode(tf.cast(z, self.dtype))
        if isinstance(self._posterior, tfb.Bijector):
            e = tf.zeros(ps.concat([ps.shape(h)[:-1], [self._latent_dims]], axis=0), self.dtype)
            return variational.push_noise(self._posterior, e, h, event_ndims=1)[0]
        return self._given(h).mean()

    def decode(self, e: TensorLike) -> tf.Tensor:
        """The likelihood's mean for latent values e, `batch + [d]`."""
        return self._decode(tf.convert_to_tensor(e, dtype=self.dtype)).mean()

    def _encode(self, z: tf.Tensor) -> tf.Tensor:
        return tf.cast(self._encoder(z, event_ndims=self._event_rank), self.dtype)

    def _decode(self, e: tf.Tensor) -> tfd.Distribution:
        return self._likelihood(tf.cast(self._decoder(e, event_ndims=1), self.dtype))

    def _given(self, h: tf.Tensor) -> tfd.Distribution:
        """The posterior, but for a flow."""
        if self._posterior is not None:
            return self._posterior(h)
        mean, log_scale = tf.split(h, 2, axis=-1)
        return tfd.MultivariateNormalDiag(mean, tf.exp(log_scale))

    def _draw(self, h: tf.Tensor, num_samples: int, seed: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Latent values from the posterior, `[num_samples] + batch + [d]`, and log q of them."""
        if not isinstance(self._posterior, tfb.Bijector):
            return self._given(h).experimental_sample_and_log_prob([num_samples], seed=seed)
        shape = ps.concat([[num_samples], ps.shape(h)[:-1], [self._latent_dims]], axis=0)
        noise = samplers.normal(shape, dtype=self.dtype, seed=seed)
        return variational.push_noise(self._posterior, noise, h[tf.newaxis], event_ndims=1)

    def _log_weights(self, z: tf.Tensor, num_samples: int, seed: Any) -> tf.Tensor:  # type: ignore[override]
        z = tf.cast(z, self.dtype)
        e, log_q = self._draw(self._encode(z), num_samples, seed)
        kl, reconstruction = log_q - variational.noise_log_prob(e, event_ndims=1), self._decode(e).log_prob(z)
        variational.report(kl=kl, reconstruction=reconstruction)
        return reconstruction - kl

    def _sample_n(self, n: int, seed: Any = None, temperature: TensorLike | None = None) -> tf.Tensor:
        seed, seed_below = samplers.split_seed(seed, n=2, salt="vae_prior")
        e = samplers.normal([n, self._latent_dims], dtype=self.dtype, seed=seed)
        e = e if temperature is None else tf.cast(temperature, e.dtype) * e
        return variational.sample(self._decode(e), [], seed_below, temperature)


class _Gaussian(tf.Module):
    """Independent Gaussians of given means and a learned standard deviation s, log s = B tanh(raw / B)."""

    def __init__(self, kind: str, event_shape: tf.TensorShape, dtype: tf.DType):
        super().__init__()
        self._rank = event_shape.rank
        self.raw = tf.Variable(tf.zeros(event_shape if kind == "per_dimension" else [], dtype), name="log_scale")

    def __call__(self, mean: tf.Tensor) -> tfd.Distribution:
        log_scale = _LOG_SCALE_BOUND * tf.tanh(self.raw / _LOG_SCALE_BOUND)
        return tfd.Independent(tfd.Normal(mean, tf.exp(log_scale)), self._rank)
