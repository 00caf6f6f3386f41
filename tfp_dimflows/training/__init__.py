"""Training with Keras."""

from tfp_dimflows.training.callbacks import KLWarmup
from tfp_dimflows.training.model import FlowModel, load
from tfp_dimflows.training.progressive import fit_progressively
from tfp_dimflows.training.runs import load_run, read_config, read_metrics, train

__all__ = ["FlowModel", "KLWarmup", "fit_progressively", "load", "load_run", "read_config", "read_metrics", "train"]
