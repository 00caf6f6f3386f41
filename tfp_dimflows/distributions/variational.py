"""Distributions of which only a bound of the density is known."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.types.experimental import TensorLike
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import representation
from tfp_dimflows.bijectors import conditions
from tfp_dimflows.bijectors.probes import probe_seed, probes_from
from tfp_dimflows.bijectors.walk import Summed
from tfp_dimflows.upstream import TFPTransformedDistribution, samplers
from tfp_dimflows.upstream import prefer_static as ps

_VALUES_AT_ONCE = 2**17
_REPORTS: contextvars.ContextVar[dict[str, tf.Tensor] | None] = contextvars.ContextVar("reports", default=None)


class VariationalDistribution(representation.DescribedByTFP, tfd.Distribution):
    r"""A distribution over x known through log-weights: w = log p(x, e) - log q(e | x) for noise e drawn from q.

        elbo(x)     = E[w]                                  <= log p(x)
        log_prob(x) = log (1/S) sum_s exp(w_s),  S samples  <= log p(x) on average, and closer the larger S

    A subclass writes `_log_weights(x, num_samples, seed, **kwargs)` of shape `[num_samples] + batch`, and `_sample_n(n, seed)`;
    for samples at other temperatures this has an argument `temperature=None`, by which it multiplies its noise.

    Samples are taken in chunks of about 130,000 values, such as 42 images of 32x32x3 (16 samples where the batch size is
    unknown), one after the other, so that the memory of an evaluation does not grow with their number; that of a gradient does.

    Args:
      event_shape: static shape of x.
      dtype: dtype of samples.
      num_samples: default number S of noise samples.
      parameters: the constructor's arguments, for `copy` and for what is printed.
      name: the name of the operations.

    References: Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", 2016.

    #### Example

    >>> class Latent(dfd.VariationalDistribution):  # x = z + noise, both standard normal
    ...     def __init__(self):
    ...         super().__init__(event_shape=[], dtype=tf.float32, num_samples=1000, name="latent")
    ...
    ...     def _log_weights(self, x, num_samples, seed):
    ...         z = tfd.Normal(0.0, 1.0).sample([num_samples, *x.shape], seed=seed)
    ...         return tfd.Normal(z, 1.0).log_prob(x)
    >>> gap = Latent().log_prob(1.0, seed=0) - tfd.Normal(0.0, 2.0**0.5).log_prob(1.0)
    >>> bool(abs(gap) < 0.1)
    True
    """

    terms: tuple[str, ...] = ()
    """Names of the terms of the bound that `_log_weights` reports (see `report`)."""

    def __init__(
        self,
        event_shape: Sequence[int] | tf.TensorShape,
        dtype: tf.DType,
        num_samples: int = 1,
        parameters: dict | None = None,
        name: str = "VariationalDistribution",
    ):
        self._static_event_shape = tf.TensorShape(event_shape)
        self._num_samples = _checked_num_samples(num_samples, name)
        if parameters is not None:
            parameters = {k: v for k, v in parameters.items() if k not in ("self", "__class__")}
        super().__init__(
            dtype=dtype,
            reparameterization_type=tfd.NOT_REPARAMETERIZED,
            validate_args=False,
            allow_nan_stats=True,
            parameters=parameters,
            name=name,
        )

    def log_weights(
        self, x: TensorLike, num_samples: int | None = None, seed: TensorLike | None = None, **kwargs: Any
    ) -> tf.Tensor:
        """Log-weights log p(x, e) - log q(e | x) of noise samples e.

        Args:
          x: values, `batch + event`.
          num_samples: number of noise samples, default: the distribution's.
          seed: as in `tfd.Distribution.sample`; None draws anew at every call.
          **kwargs: passed on to the parts, for example `bijector_kwargs`.

        Returns:
          `[num_samples] + batch`.
        """
        num_samples = self._num_samples if num_samples is None else _checked_num_samples(num_samples, self.name)
        x = tf.convert_to_tensor(x)
        rank = self.event_shape.rank
        if x.shape.rank is not None and not (
            x.shape.rank >= rank and self.event_shape.is_compatible_with(x.shape[x.shape.rank - rank :])
        ):
            raise ValueError(f"{self.name}: got values of shape {x.shape}, needs events of shape {self.event_shape}")
        size = x.shape.num_elements()
        at_once = 16 if size is None else max(1, _VALUES_AT_ONCE // max(1, size))
        if num_samples <= at_once:
            return self._log_weights(x, num_samples, seed, **kwargs)
        chunks, rest = divmod(num_samples - 1, at_once)
        first_seed, *seeds = tf.unstack(samplers.split_seed(seed, n=chunks + 1, salt="log_weights"))
        first = self._log_weights(x, rest + 1, first_seed, **kwargs)
        probes = probe_seed()

        def chunk(seeds: Sequence[tf.Tensor]) -> tf.Tensor:
            # Inside the loop a seed of probes from outside would be the same in every pass.
            with contextlib.nullcontext() if probes is None else probes_from(seeds[-1]):
                return self._log_weights(x, at_once, seeds[0], **kwargs)

        of_parts = [] if probes is None else [tf.convert_to_tensor(samplers.split_seed(probes, n=chunks))]
        with reports():  # what is reported inside the loop cannot leave it
            others = tf.map_fn(
                tf.autograph.experimental.do_not_convert(chunk),
                [tf.stack(seeds), *of_parts],
                parallel_iterations=1,
                fn_output_signature=first.dtype,
            )
        others = tf.reshape(others, ps.concat([[chunks * at_once], ps.shape(first)[1:]], axis=0))
        return tf.concat([first, others], axis=0)

    def elbo(self, x: TensorLike, num_samples: int | None = None, seed: TensorLike | None = None, **kwargs: Any) -> tf.Tensor:
        """Evidence lower bound, the mean of the log-weights; arguments as in `log_weights`. Shape: batch."""
        return tf.reduce_mean(self.log_weights(x, num_samples, seed, **kwargs), axis=0)

    def bits_per_dim(
        self, x: TensorLike, num_samples: int | None = None, seed: TensorLike | None = None, **kwargs: Any
    ) -> tf.Tensor:
        """`-log_prob(x) / (D ln 2)` for D event dimensions; arguments as in `log_weights`. Shape: batch."""
        dims = self.event_shape.num_elements()
        return -self.log_prob(x, num_samples=num_samples, seed=seed, **kwargs) / (dims * math.log(2.0))

    def _log_weights(self, x: tf.Tensor, num_samples: int, seed: Any, **kwargs: Any) -> tf.Tensor:
        raise NotImplementedError(f"{self.name}: `_log_weights` is not implemented")

    def _log_prob(self, x: tf.Tensor, num_samples: int | None = None, seed: Any = None, **kwargs: Any) -> tf.Tensor:
        log_weights = self.log_weights(x, num_samples, seed, **kwargs)
        if log_weights.shape[0] == 1:
            return log_weights[0]
        total = tf.reduce_logsumexp(tf.cast(log_weights, tf.float64), axis=0)
        samples = tf.cast(ps.shape(log_weights)[0], tf.float64)
        return tf.cast(total - tf.math.log(samples), log_weights.dtype)

    def _event_shape(self) -> tf.TensorShape:
        return self._static_event_shape

    def _event_shape_tensor(self) -> tf.Tensor:
        return tf.constant(self._static_event_shape.as_list(), tf.int32)

    def _batch_shape(self) -> tf.TensorShape:
        return tf.TensorShape([])

    def _batch_shape_tensor(self) -> tf.Tensor:
        return tf.constant([], tf.int32)

    @classmethod
    def _parameter_properties(cls, dtype: Any, num_classes: int | None = None) -> dict[str, Any]:
        return {}


@contextlib.contextmanager
def reports() -> Iterator[dict[str, tf.Tensor]]:
    """Context whose dict receives what distributions `report` while their bounds are evaluated in it."""
    received: dict[str, tf.Tensor] = {}
    token = _REPORTS.set(received)
    try:
        yield received
    finally:
        _REPORTS.reset(token)


def report(**terms: tf.Tensor) -> None:
    """Hands named terms of a bound to the innermost `reports`, if there is one."""
    if (received := _REPORTS.get()) is not None:
        received.update(terms)


def terms_of(distribution: tfd.Distribution) -> tuple[str, ...]:
    """Names of the terms that a distribution, and those below it, report."""
    own = getattr(distribution, "terms", ())
    below = getattr(distribution, "distribution", None)
    return own if below is None else (*own, *terms_of(below))


def push_noise(flow: tfb.Bijector, noise: tf.Tensor, condition: tf.Tensor, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The image u of standard normal noise under a flow given a condition, and the log-density of u."""
    u = Summed(noise, event_ndims).forward(flow, condition)
    return u.value, noise_log_prob(noise, event_ndims) - u.log_det


def noise_log_prob(noise: tf.Tensor, event_ndims: int) -> tf.Tensor:
    """The standard normal log-density of events."""
    return tfd.Independent(tfd.Normal(tf.zeros_like(noise), tf.ones([], noise.dtype)), event_ndims).log_prob(noise)


def is_bound(distribution: tfd.Distribution) -> bool:
    """Whether the log-prob of a distribution is a bound: its own, or that of one below its bijectors."""
    if isinstance(distribution, TFPTransformedDistribution):
        return is_bound(distribution.distribution)
    return isinstance(distribution, VariationalDistribution)


def with_noise(distribution: tfd.Distribution, kwargs: dict, **noise: Any) -> dict:
    """Keyword arguments of `log_prob` with `seed` and `num_samples` for a bound, `kwargs` as they are for an exact density."""
    if not is_bound(distribution):
        return kwargs
    if isinstance(distribution, VariationalDistribution):
        return kwargs | noise
    below = with_noise(distribution.distribution, kwargs.get("distribution_kwargs") or {}, **noise)
    return kwargs | {"distribution_kwargs": below}


def uses_condition(distribution: tfd.Distribution) -> bool:
    """Whether some bijector of nested distributions can use a condition."""
    below = getattr(distribution, "distribution", None)
    own = isinstance(distribution, TFPTransformedDistribution) and conditions.uses_condition(distribution.bijector)
    return own or (below is not None and uses_condition(below))


def with_condition(distribution: tfd.Distribution, condition: Any) -> dict:
    """Keyword arguments of `log_prob` and `sample` by which a condition reaches all bijectors that can use it.

    Raises:
      ValueError: if none can.
    """
    if not uses_condition(distribution):
        raise ValueError(f"{distribution.name}: got a condition, but no part of it can use one")
    if not isinstance(distribution, TFPTransformedDistribution):
        return with_condition(distribution.distribution, condition)
    kwargs = {}
    if own := conditions.condition_kwargs(distribution.bijector, condition):
        kwargs["bijector_kwargs"] = own
    if uses_condition(distribution.distribution):
        kwargs["distribution_kwargs"] = with_condition(distribution.distribution, condition)
    return kwargs


def encode(distribution: tfd.Distribution, x: tf.Tensor, condition: Any = None) -> tf.Tensor:
    """Latent values of events: through the bijector of a `TransformedDistribution`, and of those below it."""
    if isinstance(distribution, VariationalDistribution):
        return distribution.encode(x, **_given(distribution, condition))
    x = distribution.bijector.inverse(x, **conditions.condition_kwargs(distribution.bijector, condition))
    below = distribution.distribution
    return encode(below, x, condition) if isinstance(below, (VariationalDistribution, TFPTransformedDistribution)) else x


def decode(distribution: tfd.Distribution, z: tf.Tensor, condition: Any = None) -> tf.Tensor:
    """Events of latent values; see `encode`."""
    if isinstance(distribution, VariationalDistribution):
        return distribution.decode(z, **_given(distribution, condition))
    below = distribution.distribution
    if isinstance(below, (VariationalDistribution, TFPTransformedDistribution)):
        z = decode(below, z, condition)
    return distribution.bijector.forward(z, **conditions.condition_kwargs(distribution.bijector, condition))


def sample(
    distribution: tfd.Distribution, sample_shape: TensorLike, seed: Any, temperature: TensorLike | None = None, **kwargs: Any
) -> tf.Tensor:
    """Samples made of noise u of another temperature t: `t u + (1 - t) mean of u`; None: those of `distribution.sample`.

    Raises:
      ValueError: if t is given, but the noise has no mean.
    """
    if temperature is None:
        return distribution.sample(sample_shape, seed=seed, **kwargs)
    if isinstance(distribution, VariationalDistribution):
        return distribution.sample(sample_shape, seed=seed, temperature=temperature, **kwargs)
    if isinstance(distribution, TFPTransformedDistribution):
        u = sample(distribution.distribution, sample_shape, seed, temperature, **kwargs.get("distribution_kwargs", {}))
        return distribution.bijector.forward(u, **kwargs.get("bijector_kwargs", {}))
    u, mean = distribution.sample(sample_shape, seed=seed, **kwargs), mean_of_noise(distribution)
    temperature = tf.cast(temperature, u.dtype)
    return temperature * u + (1.0 - temperature) * mean


def mean_of_noise(noise: tfd.Distribution) -> tf.Tensor:
    """The mean of what latent values are drawn from.

    Raises:
      ValueError: if it has none, or it is not one tensor of real numbers.
    """
    if isinstance(noise.dtype, tf.DType) and noise.dtype.is_floating:
        with contextlib.suppress(NotImplementedError):
            return noise.mean()
    raise ValueError(f"{noise.name}: got another temperature than 1, needs a mean around which its values are scaled")


def _given(distribution: tfd.Distribution, condition: Any) -> dict:
    return {} if condition is None or not uses_condition(distribution) else {"condition": condition}


def with_sample_axis(kwargs: dict) -> dict:
    """Keyword arguments of `log_prob` whose conditions have an axis for the noise samples in front."""

    def change(key: str, value: Any) -> Any:
        if key == "condition":
            return tf.nest.map_structure(lambda c: tf.convert_to_tensor(c)[tf.newaxis], value)
        return with_sample_axis(value) if isinstance(value, dict) else value

    return {key: change(key, value) for key, value in kwargs.items()}


def _checked_num_samples(num_samples: int, name: str) -> int:
    if int(num_samples) != num_samples or num_samples < 1:
        raise ValueError(f"{name}: got num_samples={num_samples}, needs a positive integer")
    return int(num_samples)
