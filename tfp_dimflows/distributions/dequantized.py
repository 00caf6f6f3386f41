"""Integer images under a continuous distribution."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.types.experimental import TensorLike
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows.distributions import variational
from tfp_dimflows.distributions.variational import VariationalDistribution
from tfp_dimflows.renamed import new_names
from tfp_dimflows.upstream import prefer_static as ps
from tfp_dimflows.upstream import samplers


class Dequantized(VariationalDistribution):
    """Distribution of integer values 0, ..., n - 1 given by a continuous one of x + u, with noise u in [0, 1).

        P(x) = integral of p(x + u) over u in [0, 1)^D,   log-weight: log p(x + u) - log r(u | x)

    The noise is uniform, r = 1 (uniform dequantisation), or that of a conditional flow (variational dequantisation):
    u = noise.forward(e; condition=x), e ~ N(0, I), log r(u | x) = log N(e) - forward log-det of the noise flow.

    The continuous distribution scores values in [0, n), so pixel preprocessing is a bijector inside it, and
    `-log_prob / (D ln 2)` is the number of bits per dimension without further correction.

    Args:
      distribution: continuous distribution over events in [0, n)^D.
      grey_levels: number n of grey levels.
      noise: bijector from standard normal noise of the event's shape to u in (0, 1), given the integer event (as floats) as
        condition; None: uniform noise.
      num_samples: default number of noise samples of `log_prob`.
      name: the name of the operations.
      levels: the old name of `grey_levels`.

    Raises:
      ValueError: (eagerly; `InvalidArgumentError` in a graph, not checked under XLA) if values are not numbers 0 ... n - 1.

    #### Example

    >>> uniform = tfd.Independent(tfd.Uniform(tf.zeros([4]), 8.0), 1)
    >>> dfd.Dequantized(uniform, grey_levels=8).bits_per_dim([[0, 7, 3, 2]]).numpy()
    array([3.], dtype=float32)
    """

    def __init__(
        self,
        distribution: tfd.Distribution,
        grey_levels: int = 256,
        noise: tfb.Bijector | None = None,
        num_samples: int = 1,
        name: str = "Dequantized",
        levels: int | None = None,
    ):
        if levels is not None:
            grey_levels = new_names("Dequantized", {"levels": levels}, {"levels": "grey_levels"})["grey_levels"]
            levels = None
        parameters = dict(locals())
        if not distribution.event_shape.is_fully_defined():
            raise ValueError(f"Dequantized: got a distribution with event shape {distribution.event_shape}, needs a static one")
        if distribution.batch_shape.rank != 0:
            raise ValueError(f"Dequantized: got a distribution with batch shape {distribution.batch_shape}, needs a single one")
        if grey_levels < 2:
            raise ValueError(f"Dequantized: got grey_levels={grey_levels}, needs at least 2")
        self._distribution = distribution
        self._grey_levels = grey_levels
        self._noise = noise
        super().__init__(
            event_shape=distribution.event_shape, dtype=tf.int32, num_samples=num_samples, parameters=parameters, name=name
        )

    @property
    def distribution(self) -> tfd.Distribution:
        """The continuous distribution."""
        return self._distribution

    @property
    def grey_levels(self) -> int:
        """The number of grey levels."""
        return self._grey_levels

    @property
    def noise(self) -> tfb.Bijector | None:
        """The flow of the noise; None: uniform noise."""
        return self._noise

    def encode(self, x: TensorLike, condition: Any = None) -> tf.Tensor:
        """Latent values of integer events: the bijector's inverse at the middle, x + 1/2, of their cells."""
        x = tf.cast(self._checked(tf.convert_to_tensor(x)), self._distribution.dtype) + 0.5
        return variational.encode(self._distribution, x, condition)

    def decode(self, z: TensorLike, condition: Any = None) -> tf.Tensor:
        """Integer events of latent values: the bijector's forward, rounded down to a level."""
        return self._quantize(variational.decode(self._distribution, z, condition))

    def dequantize(self, x: TensorLike, seed: TensorLike | None = None) -> tf.Tensor:
        """Continuous events x + u of integer ones; `seed` as in `sample`."""
        return self._dequantize(tf.convert_to_tensor(x), [], seed)[0]

    def _dequantize(self, x: tf.Tensor, sample_shape: Sequence[int], seed: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Continuous events, and log r(u | x) of their noise."""
        x = tf.cast(self._checked(x), self._distribution.dtype)
        shape = ps.concat([sample_shape, ps.shape(x)], axis=0)
        if self._noise is None:
            u, log_r = samplers.uniform(shape, dtype=x.dtype, seed=seed), 0.0
        else:
            e = samplers.normal(shape, dtype=x.dtype, seed=seed)
            u, log_r = variational.push_noise(self._noise, e, tf.broadcast_to(x, shape), self.event_shape.rank)
        # Rounding, of u to 1 or of the sum, must not carry x + u into the next cell.
        below_one = np.nextafter(*np.array([1, 0], x.dtype.as_numpy_dtype))
        return tf.minimum(x + u, (x + 1.0) * below_one), log_r

    def noisy(self, x: tf.Tensor, num_samples: int, seed: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Continuous events with the noise that `log_weights` takes for a seed, log r(u | x); the seed for what is below."""
        seed, seed_below = samplers.split_seed(seed, n=2, salt="dequantized")
        # Spares the networks the folding of a second batch axis.
        sample_shape = [] if num_samples == 1 else [num_samples]
        return *self._dequantize(x, sample_shape, seed), seed_below

    def _log_weights(self, x: tf.Tensor, num_samples: int, seed: Any, **kwargs: Any) -> tf.Tensor:
        y, log_r, seed_below = self.noisy(x, num_samples, seed)
        kwargs = variational.with_noise(self._distribution, kwargs, seed=seed_below)
        if num_samples == 1:
            return (self._distribution.log_prob(y, **kwargs) - log_r)[tf.newaxis]
        return self._distribution.log_prob(y, **variational.with_sample_axis(kwargs)) - log_r

    def _call_log_prob(self, value: TensorLike, name: str, **kwargs: Any) -> tf.Tensor:
        # TFP would silently round floats, and take booleans, to the integer dtype of the samples.
        return super()._call_log_prob(tf.convert_to_tensor(value), name, **kwargs)

    def _call_sample_n(
        self, sample_shape: TensorLike, seed: Any, temperature: TensorLike | None = None, **kwargs: Any
    ) -> tf.Tensor:
        # `_sample_n` would be given a flat sample shape, to which the batch axes of conditions do not broadcast.
        return self._quantize(variational.sample(self._distribution, sample_shape, seed, temperature, **kwargs))

    def _quantize(self, y: tf.Tensor) -> tf.Tensor:
        # A barely trained flow can overflow on its way to the data, and there is no NaN among integers.
        y = tf.where(tf.math.is_nan(y), tf.zeros_like(y), tf.floor(y))
        return tf.cast(tf.clip_by_value(y, 0.0, self._grey_levels - 1.0), self.dtype)

    def check_values(self, x: tf.Tensor) -> None:
        """Raises a ValueError unless all values of an eager tensor are numbers 0 ... n - 1."""
        if tf.size(x) and not bool(self._inside(x)):
            low, high = tf.reduce_min(x).numpy(), tf.reduce_max(x).numpy()
            raise ValueError(f"{self.name}: got values from {low} to {high}, needs numbers 0 to {self._grey_levels - 1}")

    def _inside(self, x: tf.Tensor) -> tf.Tensor:
        if not (x.dtype.is_integer or x.dtype.is_floating):
            raise ValueError(f"{self.name}: got values of dtype {x.dtype.name}, needs numbers 0 to {self._grey_levels - 1}")
        values = tf.cast(x, tf.float32)
        return tf.reduce_all((values >= 0.0) & (values <= self._grey_levels - 1.0) & (values == tf.floor(values)))

    def _checked(self, x: tf.Tensor) -> tf.Tensor:
        if tf.executing_eagerly():
            self.check_values(x)
            return x
        message = f"{self.name}: got values that are not numbers 0 to {self._grey_levels - 1}"
        with tf.control_dependencies([tf.debugging.Assert(self._inside(x), [message])]):
            return tf.identity(x)
