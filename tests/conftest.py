"""Where tests find datasets, and how XLA compiles for them."""

import os
import pathlib

SHARED_DATASETS = pathlib.Path(__file__).parents[2] / "shared" / "tfds"
if "TFDS_DATA_DIR" not in os.environ and SHARED_DATASETS.is_dir():
    os.environ["TFDS_DATA_DIR"] = str(SHARED_DATASETS)

# LLVM's optimizations take half of the time of small functions that are compiled once and run once.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
