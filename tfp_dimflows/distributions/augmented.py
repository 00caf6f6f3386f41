"""The marginal of a distribution over noise-augmented data."""

from typing import Any

import tensorflow as tf
from tensorflow.types.experimental import TensorLike
from tensorflow_probability import distributions as tfd

from tfp_dimflows.bijectors import Chain, VFlow
from tfp_dimflows.distributions import variational
from tfp_dimflows.distributions.variational import VariationalDistribution
from tfp_dimflows.upstream import TFPTransformedDistribution, samplers
from tfp_dimflows.upstream import prefer_static as ps


class Augmented(VariationalDistribution):
    """Distribution over x given by one over x joined with extra dimensions e, which are standard normal noise for the data.

        p(x) = integral of p(x, e) over e,   log-weight: log p(x, e) - log N(e; 0, I)

    With the flow `dfb.VFlow` over (x, e) the log-weight is log p(x, z) - log q(z | x), the bound of variational data
    augmentation. Any other distribution over the joined events will do. Samples drop the extra dimensions; latent values keep
    them.

    Args:
      distribution: distribution over the joined events, vectors `[D + num_extra]` or images `[H, W, C + num_extra]`; a
        `TransformedDistribution` for `encode` and `decode`.
      num_extra: number of extra dimensions (vectors) or channels (images).
      num_samples: default number of noise samples of `log_prob`.
      name: the name of the operations.

    Raises:
      ValueError: if the distribution has a batch shape, no static event shape, or no more dimensions than the extra ones.

    References: Chen, Lu, Chenli, Zhu, Tian, "VFlow: More expressive generative flows with variational data augmentation", 2020.

    #### Example

    >>> flow = dfb.VFlow(tfb.Scale(2.0), posterior=None, num_extra=2, event_ndims=1)
    >>> joint = tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [3]), flow)
    >>> marginal = dfd.Augmented(joint, num_extra=2, num_samples=1000)
    >>> gap = marginal.log_prob([1.0], seed=[0, 0]) - tfd.Normal(0.0, 2.0).log_prob(1.0)
    >>> marginal.event_shape, bool(abs(gap) < 0.2)
    (TensorShape([1]), True)
    """

    def __init__(self, distribution: tfd.Distribution, num_extra: int, num_samples: int = 1, name: str = "Augmented"):
        parameters = dict(locals())
        shape = distribution.event_shape
        if not isinstance(num_extra, int) or num_extra < 1:
            raise ValueError(f"Augmented: got num_extra={num_extra!r}, needs a positive integer")
        if not shape.is_fully_defined() or shape.rank < 1 or num_extra >= shape[-1]:
            raise ValueError(f"Augmented: got events of shape {shape}, needs static ones of more than {num_extra} dimensions")
        if distribution.batch_shape.rank != 0:
            raise ValueError(f"Augmented: got a distribution with batch shape {distribution.batch_shape}, needs a single one")
        self._distribution = distribution
        self._num_extra = num_extra
        super().__init__(
            event_shape=[*shape[:-1], shape[-1] - num_extra],
            dtype=distribution.dtype,
            num_samples=num_samples,
            parameters=parameters,
            name=name,
        )

    @property
    def distribution(self) -> tfd.Distribution:
        """The distribution over the joined events."""
        return self._distribution

    @property
    def num_extra(self) -> int:
        """The number of extra dimensions or channels."""
        return self._num_extra

    def encode(self, x: TensorLike, condition: Any = None) -> tf.Tensor:
        """Latent values of events joined with e = 0, the median of the noise."""
        x = tf.convert_to_tensor(x, dtype=self.dtype)
        e = tf.zeros(self._noise_shape(x), x.dtype)
        return variational.encode(self._distribution, tf.concat([x, e], axis=-1), condition)

    def decode(self, z: TensorLike, condition: Any = None) -> tf.Tensor:
        """Events of latent values, without the extra dimensions."""
        return self._drop(variational.decode(self._joint(), z, condition))

    def _log_weights(self, x: tf.Tensor, num_samples: int, seed: Any, **kwargs: Any) -> tf.Tensor:
        x = tf.cast(x, self.dtype)
        if num_samples == 1:  # spares the networks the folding of a second batch axis
            return self._log_weight(x, seed, **kwargs)[tf.newaxis]
        x = tf.broadcast_to(x, ps.concat([[num_samples], ps.shape(x)], axis=0))
        return self._log_weight(x, seed, **variational.with_sample_axis(kwargs))

    def _log_weight(self, x: tf.Tensor, seed: Any, **kwargs: Any) -> tf.Tensor:
        e = samplers.normal(self._noise_shape(x), dtype=x.dtype, seed=seed)
        log_noise = variational.noise_log_prob(e, self.event_shape.rank)
        return self._distribution.log_prob(tf.concat([x, e], axis=-1), **kwargs) - log_noise

    def _noise_shape(self, x: tf.Tensor) -> tf.Tensor:
        return ps.concat([ps.shape(x)[:-1], [self._num_extra]], axis=0)

    def _call_sample_n(
        self, sample_shape: TensorLike, seed: Any, temperature: TensorLike | None = None, **kwargs: Any
    ) -> tf.Tensor:
        # `_sample_n` would be given a flat sample shape, to which the batch axes of conditions do not broadcast.
        return self._drop(variational.sample(self._joint(), sample_shape, seed, temperature, **kwargs))

    def _joint(self) -> tfd.Distribution:
        """What x is drawn from, with extra dimensions to drop: of a `VFlow` z, which spares its posterior the way to e."""
        joint = self._distribution
        if isinstance(joint, TFPTransformedDistribution) and isinstance(joint.bijector, VFlow):
            return joint.copy(bijector=Chain([joint.bijector.flow]))
        return joint

    def _drop(self, joint: tf.Tensor) -> tf.Tensor:
        return joint[..., : self.event_shape[-1]]
