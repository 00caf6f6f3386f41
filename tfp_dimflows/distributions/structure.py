"""What a distribution is made of: its flow, its multi-scale architecture, its noise."""

import itertools
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.types.experimental import TensorLike
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows.bijectors import PNF, Multiscale, VFlow
from tfp_dimflows.bijectors.chain import flattened
from tfp_dimflows.distributions import variational
from tfp_dimflows.distributions.augmented import Augmented
from tfp_dimflows.distributions.dequantized import Dequantized
from tfp_dimflows.distributions.vae_prior import VAEPrior
from tfp_dimflows.upstream import prefer_static as ps


class Structure(NamedTuple):
    """What `structure_of` finds, from the data to the latent values.

    Attributes:
      dequantized: the distribution of integer values, None for continuous ones.
      augmented: the distribution whose data has extra dimensions below it, None if there is none.
      bijectors: the bijectors of nested `TransformedDistribution`s, the outermost first.
      noise: the distribution of the latent values; a distribution without bijectors itself.

    #### Example

    >>> dfd.structure_of(tfd.TransformedDistribution(tfd.Normal(0.0, 1.0), tfb.Exp())).bijectors[0].name
    'exp'
    """

    dequantized: Dequantized | None
    augmented: Augmented | None
    bijectors: list[tfb.Bijector]
    noise: tfd.Distribution

    @property
    def parts(self) -> list[tfb.Bijector]:
        """The bijectors and, in the place of chains, their parts."""
        return [part for bijector in self.bijectors for part in flattened(bijector)]

    def innermost(self, kind: type | tuple[type, ...], owner: str) -> tuple[list[tfb.Bijector], tfb.Bijector]:
        """The part next to the latent values, after those between it and the data.

        Raises:
          ValueError: in the name of `owner`, unless it is of this kind, or one of these.
        """
        *outer, last = self.parts or [None]
        if self.augmented is not None or not isinstance(last, kind):
            kinds = " or ".join(cls.__name__ for cls in (kind if isinstance(kind, tuple) else [kind]))
            raise ValueError(
                f"{owner} has the parts {[part.name for part in self.parts]} and the noise {self.noise.name}, needs a {kinds} "
                "next to its latent values"
            )
        return outer, last

    @property
    def ordering(self) -> Multiscale | PNF | None:
        """The part next to the latent values, also of the flow of a `VFlow`, if it orders them; None if it does not."""
        *_, last = self.parts or [None]
        last = flattened(last.flow)[-1] if isinstance(last, VFlow) else last
        return last if isinstance(last, (Multiscale, PNF)) else None

    @property
    def code_sizes(self) -> list[int]:
        """How many of the first latent values make a code: up to each boundary between parts of them, and all.

        Empty if the latent values are no vectors.

        #### Example

        >>> dfd.structure_of(dimflows.recipes.realnvp([4, 4, 1], num_levels=2, width=4)).code_sizes
        [8, 16]
        """
        if isinstance(self.noise, VAEPrior):
            return [self.noise.latent_dims]
        sizes = [] if self.ordering is None else self.ordering.latent_sizes[:-1]
        return [*itertools.accumulate(sizes), *self.noise.event_shape] if self.noise.event_shape.rank == 1 else []

    def completed(self, code: tf.Tensor, temperature: TensorLike | None = None, seed: Any = None) -> tf.Tensor:
        """Latent values that begin with a code.

        Args:
          code: the first of them, `batch + [k]`, or all.
          temperature: scale of the noise that the others are; None: they are its mean, which for standard normal noise is its
            mode 0.
          seed: as in `tfd.Distribution.sample`.

        Returns:
          `batch + [D]`.

        Raises:
          ValueError: if the noise has no mean.
        """
        if code.shape[-1] == self.code_sizes[-1]:
            return code
        shape = ps.shape(code)
        if temperature is None:
            mean = variational.mean_of_noise(self.noise)
            noise = tf.broadcast_to(mean, ps.concat([shape[:-1], ps.shape(mean)], axis=0))
        else:
            noise = variational.sample(self.noise, shape[:-1], seed, temperature)
        return tf.concat([code, tf.cast(noise[..., code.shape[-1] :], code.dtype)], axis=-1)

    @property
    def multiscale(self) -> Multiscale | None:
        """The first `Multiscale` among the parts, also as the flow of a `VFlow`; None if there is none."""
        parts = (part.flow if isinstance(part, VFlow) else part for part in self.parts)
        return next((part for part in parts if isinstance(part, Multiscale)), None)


def structure_of(distribution: tfd.Distribution) -> Structure:
    """Finds the flow, its multi-scale architecture and its noise inside a distribution.

    Args:
      distribution: any distribution, such as a recipe's.

    #### Example

    >>> structure = dfd.structure_of(dimflows.recipes.realnvp([4, 4, 1], num_levels=2, width=4, grey_levels=4))
    >>> [part.name for part in structure.parts], structure.multiscale.levels[0].name, structure.noise.event_shape
    (['logit_preprocess', 'multiscale'], 'chain', TensorShape([16]))
    """
    dequantized, augmented, bijectors = None, None, []
    while hasattr(distribution, "bijector") or isinstance(distribution, (Dequantized, Augmented)):
        if isinstance(distribution, Dequantized):
            dequantized = dequantized or distribution
        elif isinstance(distribution, Augmented):
            augmented = augmented or distribution
        else:
            bijectors.append(distribution.bijector)
        distribution = distribution.distribution
    return Structure(dequantized, augmented, bijectors, distribution)
