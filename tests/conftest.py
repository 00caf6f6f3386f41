"""Where tests find datasets, and what makes them faster."""

import gc
import os
import pathlib

SHARED_DATASETS = pathlib.Path(__file__).parents[2] / "shared" / "tfds"
if "TFDS_DATA_DIR" not in os.environ and SHARED_DATASETS.is_dir():
    os.environ["TFDS_DATA_DIR"] = str(SHARED_DATASETS)

# LLVM's optimizations take half of the time of small functions that are compiled once and run once.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


def pytest_configure(config):
    """Functions that run once need no optimizer of graphs either; the other layers, whose `XLA_FLAGS` are empty, keep it."""
    if hasattr(config, "workerinput") and os.environ["XLA_FLAGS"]:
        import tensorflow as tf

        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def pytest_collection_finish():
    """Graphs are many small objects: what stays anyway need not be looked at whenever some are made."""
    gc.freeze()
    gc.set_threshold(20_000)
