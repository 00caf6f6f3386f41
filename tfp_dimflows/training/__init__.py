"""Training with Keras."""

from tfp_dimflows.training.model import FlowModel, load

__all__ = ["FlowModel", "load"]
