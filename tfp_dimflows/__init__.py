"""Normalizing flows for TensorFlow Probability whose dimensions are first-class."""

from tfp_dimflows import bijectors, data, distributions, networks, plot, recipes, training
from tfp_dimflows.bijectors.lcma import likelihood_contributions
from tfp_dimflows.bijectors.per_dimension import (
    forward_log_det_per_dim,
    inverse_log_det_per_dim,
    register_log_det_per_dim,
)
from tfp_dimflows.keras_bridge import adaptation
from tfp_dimflows.training import FlowModel, fit_progressively, load
from tfp_dimflows.version import __version__

__all__ = [
    "FlowModel",
    "__version__",
    "adaptation",
    "bijectors",
    "data",
    "distributions",
    "fit_progressively",
    "forward_log_det_per_dim",
    "inverse_log_det_per_dim",
    "likelihood_contributions",
    "load",
    "networks",
    "plot",
    "recipes",
    "register_log_det_per_dim",
    "training",
]
