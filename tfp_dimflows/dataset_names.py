"""What the name of a dataset stands for: a TFDS dataset or a folder. Needs no TensorFlow."""

import os
import pathlib
import re
from typing import Any

from tfp_dimflows.messages import did_you_mean, did_you_mean_folder

DEFAULT_DATA_DIR = "~/tensorflow_datasets"
EMBEDDED = ("digits", "photo_patches")
TABLES = (".csv", ".parquet", ".npz")


def data_directory(data_dir: str | os.PathLike[str] | None) -> str:
    """Where TFDS keeps its datasets: this directory, else that of the environment, else the default."""
    return os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or DEFAULT_DATA_DIR)


def check_dataset(name: str, data_dir: str | None) -> None:
    """Raises a FileNotFoundError, with a suggestion, unless there is a dataset, folder or table of this name."""
    if is_table(name):
        if not os.path.isfile(os.path.expanduser(name)):
            raise FileNotFoundError(f"table {name!r}: there is no such file")
    elif as_folder(name) is None and _base(name) not in EMBEDDED:
        find_builder(name, data_directory(data_dir))


def is_table(name: str) -> bool:
    """Whether the name is that of a file of a table."""
    return name.lower().endswith(TABLES)


def as_folder(name: str | os.PathLike[str]) -> pathlib.Path | None:
    """The absolute path, if the name is a path and not that of a TFDS dataset.

    Raises:
      FileNotFoundError: if there is no such folder.
    """
    if not isinstance(name, os.PathLike) and not name.startswith((".", "/", "~")):
        return None
    folder = pathlib.Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"Dataset {os.fspath(name)!r}: there is no such folder{did_you_mean_folder(name) or '.'}")
    return folder.resolve()


def find_builder(name: str, directory: str) -> Any:
    """The TFDS builder of a dataset, which may not be prepared yet.

    Raises:
      FileNotFoundError: if there is no such dataset.
    """
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=directory)
    except tfds.core.DatasetNotFoundError:
        suggestion = did_you_mean(_base(name), [*tfds.list_builders(with_community_datasets=False), *EMBEDDED])
        if os.path.isdir(name):
            suggestion = f"; did you mean {os.path.join('.', name)!r}?"
        raise FileNotFoundError(
            f"Dataset {name!r} is unknown to TensorFlow Datasets and is not in {directory}{suggestion or '.'} Check the name, "
            "or pass the data_dir that holds it. A folder of images is written as a path: './photos'."
        ) from None


def _base(name: str) -> str:
    """The name without configuration and version."""
    return re.split("[/:]", name)[0]
