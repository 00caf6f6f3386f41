"""Integer images from TensorFlow Datasets, two datasets that need no download, and tables of numbers."""

from tfp_dimflows.data.pipeline import DatasetInfo, info, load
from tfp_dimflows.data.tables import Table, rows, table

__all__ = ["DatasetInfo", "Table", "info", "load", "rows", "table"]
