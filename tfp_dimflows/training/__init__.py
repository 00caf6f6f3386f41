"""Training with Keras."""

from tfp_dimflows.run_config import RunConfig
from tfp_dimflows.training.callbacks import (
    BitsPerLevel,
    DecideFactorization,
    KeptDimensions,
    KLWarmup,
    Reconstructions,
    SampleImages,
)
from tfp_dimflows.training.codes import explained
from tfp_dimflows.training.model import FlowModel
from tfp_dimflows.training.progressive import fit_progressively
from tfp_dimflows.training.runs import load, load_run, read_config, read_metrics, train

__all__ = [
    "BitsPerLevel",
    "DecideFactorization",
    "FlowModel",
    "KLWarmup",
    "KeptDimensions",
    "Reconstructions",
    "RunConfig",
    "SampleImages",
    "explained",
    "fit_progressively",
    "load",
    "load_run",
    "read_config",
    "read_metrics",
    "train",
]
