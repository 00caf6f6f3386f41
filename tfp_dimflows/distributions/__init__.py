"""Distributions: bounds that are distributions, and what distributions are made of."""

from tfp_dimflows.distributions.augmented import Augmented
from tfp_dimflows.distributions.dequantized import Dequantized
from tfp_dimflows.distributions.structure import Structure, structure_of
from tfp_dimflows.distributions.vae_prior import VAEPrior
from tfp_dimflows.distributions.variational import VariationalDistribution

__all__ = ["Augmented", "Dequantized", "Structure", "VAEPrior", "VariationalDistribution", "structure_of"]
