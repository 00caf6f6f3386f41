"""Distributions: bounds that are distributions."""

from tfp_dimflows.distributions.augmented import Augmented
from tfp_dimflows.distributions.dequantized import Dequantized
from tfp_dimflows.distributions.vae_prior import VAEPrior
from tfp_dimflows.distributions.variational import VariationalDistribution

__all__ = ["Augmented", "Dequantized", "VAEPrior", "VariationalDistribution"]
