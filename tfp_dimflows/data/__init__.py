"""Integer images from TensorFlow Datasets, and two datasets that need no download."""

from tfp_dimflows.data.pipeline import DatasetInfo, info, load

__all__ = ["DatasetInfo", "info", "load"]
