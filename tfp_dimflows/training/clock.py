"""`Clock`: how long a training took, how fast it is, and when its time is over."""

import time
from typing import Any

import keras


class Clock(keras.callbacks.Callback):
    """Adds speed and minutes of training to the logs, and stops the training when its minutes are over.

    Args:
      batch_size: events in a batch; None: the speed is not told.
      unit: what an event is called, in the plural.
      minutes: minutes that were trained before.
      max_minutes: minutes after which to stop, at the end of a step; None: never.
    """

    def __init__(self, batch_size: int | None, unit: str, minutes: float = 0.0, max_minutes: float | None = None):
        super().__init__()
        self._batch_size, self._unit = batch_size, unit
        self._before, self._max_minutes = minutes, max_minutes
        self._start = self._epoch_start = 0.0
        self._speed: dict[str, float] = {}

    def _minutes(self) -> float:
        return self._before + (time.monotonic() - self._start) / 60.0

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Starts."""
        self._start = time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Starts to measure the speed."""
        self._epoch_start = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Tells the speed, and stops."""
        if logs is not None and self._batch_size is not None:
            seconds = time.monotonic() - self._epoch_start
            self._speed = {f"{self._unit}_per_second": self._batch_size * (batch + 1) / seconds}
            logs.update(self._speed)
        if self._max_minutes is not None and self._minutes() >= self._max_minutes:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Tells speed and minutes."""
        if logs is not None:
            logs.update(self._speed | {"minutes": self._minutes()})
