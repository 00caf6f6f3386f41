"""What a distribution is made of: its flow, its multi-scale architecture, its noise."""

from typing import NamedTuple

from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows.bijectors import Multiscale, VFlow
from tfp_dimflows.bijectors.chain import flattened
from tfp_dimflows.distributions.augmented import Augmented
from tfp_dimflows.distributions.dequantized import Dequantized


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

    def innermost(self, kind: type, owner: str) -> tuple[list[tfb.Bijector], tfb.Bijector]:
        """The part next to the latent values, after those between it and the data.

        Raises:
          ValueError: in the name of `owner`, unless it is of this kind.
        """
        *outer, last = self.parts or [None]
        if self.augmented is not None or not isinstance(last, kind):
            raise ValueError(
                f"{owner} has the parts {[part.name for part in self.parts]} and the noise {self.noise.name}, needs a "
                f"{kind.__name__} next to its latent values"
            )
        return outer, last

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
