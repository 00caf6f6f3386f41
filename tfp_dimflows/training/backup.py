"""`Backup`: the state of training on disk after each epoch, whole at any moment."""

import csv
import os
import pathlib
import shutil

import keras
import numpy as np
import tensorflow as tf


def least_of_workers(value: int) -> int:
    """The smallest of the values that the workers of the current `tf.distribute` strategy have; waits for all of them."""
    strategy = tf.distribute.get_strategy()
    return int(tf.reduce_min(strategy.gather(strategy.run(lambda: tf.constant([value])), axis=0)))


def has_finite_weights(model: keras.Model) -> bool:
    """Whether all weights of a model are finite."""
    return all(np.isfinite(w).all() for w in model.get_weights() if w.dtype.kind == "f")


class Backup(keras.callbacks.Callback):
    """Writes a model's weights, optimizer and seeds after each epoch, for a training that goes on after a kill.

    A backup has its name, which tells the epoch, only once it is complete. The last two are kept, since workers of a
    `tf.distribute` strategy may be killed one epoch apart, and that of the epoch with the best validation, now and before the
    last epoch.

    Args:
      directory: folder of the backups of this training alone.
      history: its rows of epochs as `keras.callbacks.CSVLogger` writes them, before this callback; None: there are none.

    Attributes:
      first_epoch: how many epochs at the beginning are not compared.
    """

    def __init__(self, directory: str | os.PathLike, history: str | os.PathLike | None = None):
        super().__init__()
        self._directory, self._history = pathlib.Path(directory), None if history is None else pathlib.Path(history)
        self.first_epoch = 0

    def rows(self) -> list[dict[str, float]]:
        """The metrics of the epochs so far."""
        if self._history is None or not self._history.is_file():
            return []
        with self._history.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [{name: float("nan" if value == "NA" else value) for name, value in row.items()} for row in rows]

    def best_epoch(self, last: int | None = None) -> int | None:
        """The number of epochs, up to `last`, after which the validation was best; None without validation."""
        rows = list(enumerate(self.rows(), start=1))[self.first_epoch : last]
        values = {epoch: row["val_nll"] for epoch, row in rows if np.isfinite(row.get("val_nll", np.nan))}
        return min(values, key=values.__getitem__) if values else None

    def epochs(self) -> list[int]:
        """The numbers of epochs after which there is a backup."""
        paths = self._directory.glob("epoch-*.weights.h5")
        return sorted(int(path.name.split(".")[0].removeprefix("epoch-")) for path in paths)

    def restore(self, model: keras.Model) -> int:
        """Gives a compiled model the state of the newest backup that all workers have; returns the number of epochs done.

        Raises:
          ValueError: if the folder holds a backup that an older version wrote, or the workers are more than one epoch apart.
        """
        if (self._directory / "latest.weights.h5").is_file():
            raise ValueError(f"Backup: {self._directory} is of an older version, which this one cannot go on from")
        newest = max(self.epochs(), default=0)
        epoch = least_of_workers(newest)
        if newest > epoch + 1:
            raise ValueError(f"Backup: another worker has a backup of {epoch} epochs, {self._directory} one of {newest}")
        for later in self.epochs():
            if later > epoch:
                self._path(later).unlink()
        if epoch:
            self.load(model, epoch)
        return epoch

    def load(self, model: keras.Model, epoch: int) -> None:
        """Gives a compiled model the state after an epoch of which there is a backup."""
        model.load_weights(self._path(epoch))

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes a backup, unless the training has diverged: there is no way on from there."""
        if not (np.isfinite((logs or {}).get("loss", 0.0)) and has_finite_weights(self.model)):
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        unfinished = self._directory / "unfinished.weights.h5"
        self.model.save_weights(unfinished)
        os.replace(unfinished, self._path(epoch + 1))
        for older in set(self.epochs()[:-2]) - {self.best_epoch(), self.best_epoch(epoch)}:
            self._path(older).unlink()

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, epoch: int) -> pathlib.Path:
        return self._directory / f"epoch-{epoch}.weights.h5"
