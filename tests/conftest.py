"""Names that the docstring examples use, and where tests find datasets."""

import os
import pathlib

SHARED_DATASETS = pathlib.Path(__file__).parents[2] / "shared" / "tfds"
if "TFDS_DATA_DIR" not in os.environ and SHARED_DATASETS.is_dir():
    os.environ["TFDS_DATA_DIR"] = str(SHARED_DATASETS)
