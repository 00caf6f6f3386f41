"""Distributions of which only a bound of the density is known."""

import math
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

tfd = tfp.distributions


class VariationalDistribution(tfd.Distribution):
    r"""A distribution over x known through log-weights: w = log p(x, e) - log q(e | x) for noise e drawn from q.

        elbo(x)     = E[w]                                  <= log p(x)
        log_prob(x) = log (1/S) sum_s exp(w_s),  S samples  <= log p(x) on average, and closer the larger S

    A subclass writes `_log_weights(x, num_samples, seed, **kwargs)` of shape `[num_samples] + batch`, and `_sample_n`.

    Args:
      event_shape: static shape of x.
      dtype: dtype of samples.
      num_samples: default number S of noise samples.
      validate_args: as in `tfd.Distribution`.
      allow_nan_stats: as in `tfd.Distribution`.
      parameters: the constructor's arguments, for `copy`.
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

    def __init__(
        self,
        event_shape: Any,
        dtype: tf.DType,
        num_samples: int = 1,
        validate_args: bool = False,
        allow_nan_stats: bool = True,
        parameters: dict | None = None,
        name: str = "VariationalDistribution",
    ):
        self._static_event_shape = tf.TensorShape(event_shape)
        self._num_samples = _checked_num_samples(num_samples, name)
        super().__init__(
            dtype=dtype,
            reparameterization_type=tfd.NOT_REPARAMETERIZED,
            validate_args=validate_args,
            allow_nan_stats=allow_nan_stats,
            parameters=parameters,
            name=name,
        )

    def log_weights(self, x, num_samples: int | None = None, seed: Any = None, **kwargs) -> tf.Tensor:
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
        return self._log_weights(x, num_samples, seed, **kwargs)

    def elbo(self, x, num_samples: int | None = None, seed: Any = None, **kwargs) -> tf.Tensor:
        """Evidence lower bound, the mean of the log-weights; arguments as in `log_weights`. Shape: batch."""
        return tf.reduce_mean(self.log_weights(x, num_samples, seed, **kwargs), axis=0)

    def bits_per_dim(self, x, num_samples: int | None = None, seed: Any = None, **kwargs) -> tf.Tensor:
        """`-log_prob(x) / (D ln 2)` for D event dimensions; arguments as in `log_weights`. Shape: batch."""
        dims = self.event_shape.num_elements()
        return -self.log_prob(x, num_samples=num_samples, seed=seed, **kwargs) / (dims * math.log(2.0))

    def _log_weights(self, x, num_samples, seed, **kwargs):
        raise NotImplementedError(f"{self.name}: `_log_weights` is not implemented")

    def _log_prob(self, x, num_samples=None, seed=None, **kwargs):
        log_weights = self.log_weights(x, num_samples, seed, **kwargs)
        samples = log_weights.shape[0]
        if samples == 1:
            return log_weights[0]
        total = tf.reduce_logsumexp(tf.cast(log_weights, tf.float64), axis=0)
        return tf.cast(total - np.log(samples), log_weights.dtype)

    def _event_shape(self):
        return self._static_event_shape

    def _event_shape_tensor(self):
        return tf.constant(self._static_event_shape.as_list(), tf.int32)

    def _batch_shape(self):
        return tf.TensorShape([])

    def _batch_shape_tensor(self):
        return tf.constant([], tf.int32)

    @classmethod
    def _parameter_properties(cls, dtype, num_classes=None):
        return {}


def _checked_num_samples(num_samples, name):
    if num_samples < 1:
        raise ValueError(f"{name}: got num_samples={num_samples}, needs at least 1")
    return num_samples
