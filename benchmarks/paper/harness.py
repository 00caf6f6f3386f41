"""What the benchmarks that train recipes on images share."""

import pathlib
import time

import tensorflow as tf

import tfp_dimflows as dimflows

RUNS = pathlib.Path("runs")


def train(
    recipe: str, directory: pathlib.Path, data: str, *, batch_size: int, seed: int, load: dict | None = None, **options
) -> tuple[dimflows.FlowModel, tf.data.Dataset, dict]:
    """A recipe trained on a dataset, or what is there already of a run with the same settings.

    Args:
      recipe: the recipe's name.
      directory: the run directory.
      data: the dataset's name.
      batch_size: events per step.
      seed: integer seed of data and model.
      load: further arguments of `dimflows.data.load`.
      **options: of `dimflows.training.train`.

    Returns:
      The model, the test data, and its metrics on them, with the seconds that all processes together have spent on the run
      (None: not known) and the metrics of the runs inside it as `parts`.
    """
    sets = [dimflows.data.load(data, split, batch_size=batch_size, seed=seed, **load or {}) for split in ("train", "test")]
    clock = directory.with_suffix(".seconds")
    spent = float(clock.read_text()) if clock.is_file() else 0.0
    is_finished = (directory / "metrics.json").is_file()
    start = time.perf_counter()
    model = dimflows.training.train(recipe, directory, *sets, seed=seed, resume=directory.is_dir(), **options)
    if not is_finished:
        spent += time.perf_counter() - start
        clock.write_text(str(spent))
    metrics = dimflows.training.read_metrics(directory)
    return model, sets[1], metrics["."] | {"seconds": round(spent, 1) if spent else None, "parts": metrics}
