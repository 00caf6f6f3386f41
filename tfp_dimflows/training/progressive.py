"""`fit_progressively`: a progressive flow trained stage by stage."""

import operator
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from tfp_dimflows import keras_bridge
from tfp_dimflows.bijectors import PNF, Chain
from tfp_dimflows.bijectors.conditions import uses_condition
from tfp_dimflows.distributions import structure_of
from tfp_dimflows.training import batches
from tfp_dimflows.training.backup import Backup
from tfp_dimflows.training.model import FlowModel


def fit_progressively(
    model: FlowModel,
    dataset: tf.data.Dataset,
    epochs_per_stage: int | Sequence[int],
    *,
    optimizer: str | dict | keras.Optimizer = "adam",
    steps_per_epoch: int | None = None,
    validation_data: tf.data.Dataset | None = None,
    validation_steps: int | None = None,
    backup_dir: str | os.PathLike | None = None,
    callbacks: Callable[[int], Sequence[keras.callbacks.Callback]] | None = None,
    seed: int = 0,
    **options: Any,
) -> list[keras.callbacks.History]:
    """Trains a model with a `dfb.PNF` stage by stage, from coarse to fine, each by Keras `fit`.

    The negative log-density of the flow is a sum with one term for each stage (`PNF.stage_log_prob`), and a term depends on the
    parameters of its stage only: minimising the terms one after the other reaches the same optimum as minimising the sum with
    `model.fit`. One stage at a time has its activations, gradients and optimizer slots in memory; the data of a stage is made
    from the full events in the input pipeline, with new dequantisation noise in every epoch.

    The metrics are the stage's: `nll` in nats per event of the stage, without the constant of its halving.
    Data-dependent initialisation is `model.adapt(dataset)`, before.

    Args:
      model: its distribution is a `TransformedDistribution` of independent noise with a `PNF` (or a chain that ends, next to
        the latent, in one), or a `Dequantized` one of it.
      dataset: batches as for `model.fit`.
      epochs_per_stage: epochs of every stage; a list gives one number for each, the base first.
      optimizer: as in `compile`; every stage starts with a new one of the same configuration.
      steps_per_epoch: as in `fit`.
      validation_data: batches as for `model.fit`.
      validation_steps: as in `fit`.
      backup_dir: folder for the state of training after each epoch. A run that was killed goes on from there when called again
        with a model of the same construction. Removed when training has ended.
      callbacks: a function of the stage's number that returns its Keras callbacks.
      seed: integer seed of dequantisation noise.
      **options: further arguments of `fit` (`verbose`) and of `compile` (`jit_compile`).

    Returns:
      The history of every stage.

    Raises:
      ValueError: if the model has no such flow, or trainable variables outside of its stages, or the data does not fit it; then
        nothing has changed.

    References: "PNF: Progressive normalizing flows".

    #### Example

    >>> model = dimflows.FlowModel(dimflows.recipes.pnf([4], num_halvings=1, width=4))
    >>> data = tf.data.Dataset.from_tensor_slices(tf.random.stateless_normal([64, 4], seed=[0, 1])).batch(32)
    >>> histories = dimflows.fit_progressively(model, data, epochs_per_stage=2, verbose=0)
    >>> [sorted(history.history) for history in histories]
    [['loss', 'nll'], ['loss', 'nll']]
    """
    stages = _Stages(model)
    if isinstance(epochs_per_stage, Sequence):
        epochs = list(epochs_per_stage)
    else:
        epochs = [operator.index(epochs_per_stage)] * stages.num
    if len(epochs) != stages.num:
        raise ValueError(
            f"fit_progressively: got {len(epochs)} numbers of epochs, needs one, or one for each of {stages.num} stages"
        )
    for data in [dataset] if validation_data is None else [dataset, validation_data]:
        stages.check(data, seed)
    optimizer = keras.optimizers.get(optimizer)
    jit_compile = options.pop("jit_compile", "auto")
    backup_dir = None if backup_dir is None else pathlib.Path(backup_dir)
    histories = []
    for k in range(stages.num):
        stage = stages.model(k)
        if stage is None:
            histories.append(_no_history())
            continue
        stage_callbacks = [] if callbacks is None else list(callbacks(k))
        history = _fit_stage(
            stage,
            stages.data(dataset, k, seed),
            optimizer.from_config(optimizer.get_config()),
            None if backup_dir is None else backup_dir / f"stage_{k}",
            stage_callbacks,
            jit_compile,
            epochs=epochs[k],
            steps_per_epoch=steps_per_epoch,
            validation_data=None if validation_data is None else stages.data(validation_data, k, seed),
            validation_steps=validation_steps,
            **options,
        )
        history.set_model(None)  # it would keep the stage's optimizer in memory
        histories.append(history)
    if backup_dir is not None and backup_dir.is_dir():
        for k in range(stages.num):
            shutil.rmtree(backup_dir / f"stage_{k}", ignore_errors=True)
        if not any(backup_dir.iterdir()):
            backup_dir.rmdir()
    return histories


def _fit_stage(
    stage: FlowModel,
    data: tf.data.Dataset,
    optimizer: keras.Optimizer,
    backup_dir: pathlib.Path | None,
    callbacks: Sequence[keras.callbacks.Callback],
    jit_compile: bool | str,
    **options: Any,
) -> keras.callbacks.History:
    """Trains a stage, goes on with what is in its backup, or takes its weights if it had been finished."""
    finished = None if backup_dir is None else backup_dir / "finished.weights.h5"
    if finished is not None and finished.is_file():
        stage.load_weights(finished)
        return _no_history()
    initial_epoch = 0
    with stage.distribute_strategy.scope():
        stage.compile(optimizer, jit_compile=jit_compile)
        if backup_dir is not None:
            backup = Backup(backup_dir / "backup")
            initial_epoch = backup.restore(stage)
            callbacks = [*callbacks, backup]
    history = stage.fit(data, callbacks=callbacks, initial_epoch=initial_epoch, **options)
    if backup_dir is not None and finished is not None:
        unfinished = backup_dir / "unfinished.weights.h5"
        backup_dir.mkdir(parents=True, exist_ok=True)
        stage.save_weights(unfinished)
        os.replace(unfinished, finished)
    return history


def _no_history() -> keras.callbacks.History:
    history = keras.callbacks.History()
    history.epoch = []
    return history


class _Stages:
    """The stages of a model's progressive flow as models of their own, and their data."""

    def __init__(self, model: FlowModel):
        structure = structure_of(model.distribution)
        self._dequantized, noise = structure.dequantized, structure.noise
        outer, self._flow = structure.innermost(PNF, f"fit_progressively: {model.distribution.name}")
        if not isinstance(noise, tfd.Sample) or noise.distribution.event_shape.rank != 0:
            raise ValueError(
                f"fit_progressively: the latent values are {noise.name}, needs a tfd.Sample of one scalar distribution, since "
                "each stage is trained with its own part of them"
            )
        self._outer, self._noise = Chain(outer), noise.distribution
        owned = {id(v) for v in keras_bridge.variables_of(self._flow.stages)}
        if others := [v.name for v in model.trainable_variables if id(v.value) not in owned]:
            raise ValueError(
                f"fit_progressively: no stage trains the variables {others}, which are outside of the PNF or in its splits"
            )
        self._whole = model
        self.num = len(self._flow.stages)

    def model(self, k: int) -> FlowModel | None:
        """A model of a stage's values given their condition; None for a stage that has nothing to train."""
        stage = self._flow.stages[k]
        holdings = keras_bridge.collect(stage)
        if not any(v.trainable for held in [holdings, *holdings.layers] for v in held.variables):
            return None
        value_shape = self._flow.value_shapes[k]
        noise = tfd.Sample(self._noise, stage.inverse_event_shape(value_shape))
        with self._whole.distribute_strategy.scope():
            return FlowModel(tfd.TransformedDistribution(noise, Chain([stage])), name=f"stage_{k}")

    def check(self, dataset: tf.data.Dataset, seed: int) -> None:
        """Raises unless these are batches whose first event every stage takes."""
        if not isinstance(dataset, tf.data.Dataset):
            raise ValueError(
                f"fit_progressively: got data of type {type(dataset).__name__}, needs a tf.data.Dataset of batches"
            )
        batches.checked_first(dataset, self._whole.distribution)
        for batch in dataset.take(1):
            first = tf.nest.map_structure(lambda value: value[:1], batch)
            for k in range(self.num):
                model, part = self.model(k), self._batch(first, k, tf.constant([0, seed], tf.int64))
                if model is not None:
                    model(part[0] if isinstance(part, tuple) else part)

    def data(self, dataset: tf.data.Dataset, k: int, seed: int) -> tf.data.Dataset:
        """Batches of a stage's values from batches of events."""
        seeds = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).batch(2, drop_remainder=True)
        stage_batch = tf.autograph.experimental.do_not_convert(lambda batch, seed: self._batch(batch, k, seed))
        return tf.data.Dataset.zip(dataset, seeds).map(stage_batch, tf.data.AUTOTUNE)

    def _batch(self, batch: Any, k: int, seed: tf.Tensor) -> Any:
        events, *rest = batch if isinstance(batch, tuple) else (batch,)
        x, condition = (events["x"], events["condition"]) if isinstance(events, dict) else (events, None)
        if self._dequantized is None:
            x = tf.cast(x, self._noise.dtype)
        else:
            x = self._dequantized.dequantize(x, tf.cast(seed % 2**31, tf.int32))
        value, given = self._flow.stage_data(self._outer.inverse(x), k, condition)
        if given is None or not uses_condition(self._flow.stages[k]):
            events = value
        else:
            events = {"x": value, "condition": given}
        return (events, *rest) if rest else events
