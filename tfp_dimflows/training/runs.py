"""Run directories: a recipe trained from start to end, resumable at every epoch."""

import contextlib
import csv
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from tfp_dimflows import plot
from tfp_dimflows.bijectors.factorization import DimensionFactorization
from tfp_dimflows.bijectors.lcma import likelihood_contributions
from tfp_dimflows.distributions import structure_of
from tfp_dimflows.messages import Failure, did_you_mean_folder
from tfp_dimflows.recipes import registry
from tfp_dimflows.renamed import new_names
from tfp_dimflows.run_config import CONFIG, RunConfig, stored_config
from tfp_dimflows.training import batches
from tfp_dimflows.training.backup import Backup, has_finite_weights, least_of_workers
from tfp_dimflows.training.callbacks import DecideFactorization
from tfp_dimflows.training.clock import Clock
from tfp_dimflows.training.model import FlowModel
from tfp_dimflows.training.optimizers import make_optimizer
from tfp_dimflows.version import __version__

MODEL, HISTORY, METRICS, CONTRIBUTIONS = "model.keras", "history.csv", "metrics.json", "contributions.npz"


def train(
    recipe: str,
    directory: str | os.PathLike,
    train_data: tf.data.Dataset,
    test_data: tf.data.Dataset,
    validation_data: tf.data.Dataset | None = None,
    *,
    resume: bool = False,
    **options: Any,
) -> FlowModel:
    """Trains a recipe into a run directory.

    The directory gets `config.json`, the model (`model.keras`), per-epoch `history.csv`, TensorBoard `logs/`, `metrics.json`
    with the test metrics, and of images `samples.png`. The model is that of the epoch with the best validation, without
    validation data of the last one; of an average of the weights (`ema`) if there is one, which is also what is validated.
    An LCMA recipe goes through its three phases: a non-multi-scale model trained into `pretraining/`, its likelihood
    contributions into `contributions.npz`, the model itself; for comparison the base recipe with its conventional factorization
    is trained with the same budget into `conventional/`, and `factorization.png` shows which dimensions stayed. With
    `online_steps` it has one phase. The recipes of `beside` are trained into directories of their names in the same way.

    A run that was killed or failed goes on from its last full epoch with `resume=True`, after reading the batches again that it
    was trained on; without a full epoch it does not keep the directory from another. If `train_data` is the same in each
    iteration (`dimflows.data.load` with `repeat`), it ends as equal to one that was not killed as two such runs are to each
    other: on a CPU bit for bit, but for rare rounding. Inside the scope of a `tf.distribute` strategy it trains on all
    replicas, with batches of `train_data` shared among them; with several workers, each needs a directory of its own.

    Args:
      recipe: a recipe's name.
      directory: the run directory.
      train_data: batches as `FlowModel.fit` takes them, such as integer images; endless, or repeated if `steps_per_epoch` is
        given.
      test_data: batches like these, for the metrics at the end.
      validation_data: batches like these, other ones than those of the test, for the metrics of each epoch.
      resume: whether to go on with an existing run of the same configuration.
      **options: the other fields of `RunConfig`, such as `event_shape`, `grey_levels` and `epochs`.

    Returns:
      The trained model.

    Raises:
      ValueError: if the directory cannot be written, is written by another process, holds a run and `resume` is False, or holds
        one of another configuration; for more `online_steps` than there are; for `patience` without validation data; for an
        optimizer that there is not, or a schedule of an unknown number of steps; or as `RunConfig`.
      RuntimeError: if the training diverges, or its disk fails or is full.
      ImportError: if there are pictures to be made, without matplotlib.
    """
    config = RunConfig(recipe=recipe, **new_names("train", options, {"levels": "grey_levels"}))
    if config.steps_per_epoch is None and train_data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError("train: got endless train_data, needs steps_per_epoch")
    if _has_samples(config) or config.base is not None:
        plot.require_matplotlib()  # now rather than after hours of training
    with registry.errors_as_given(recipe, options.get("arguments") or {}):
        multiscale = structure_of(config.build()).multiscale  # bad arguments fail before anything is written
    for other in config.others():
        other.build()
    if config.patience is not None and validation_data is None:
        raise ValueError(f"train: got patience={config.patience} without validation data, needs some")
    if config.max_minutes is not None and isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
        raise ValueError("train: got max_minutes with several workers, whose clocks differ; needs epochs alone")
    data = _Data(train_data, test_data, validation_data)
    for phase in (config, *config.others()):
        _check_optimizer(phase, data)
    steps, factor_outs = data.num_steps(config), len(multiscale.levels) - 1 if multiscale is not None else 0
    if steps is not None and steps // config.epochs % config.steps_per_execution:
        raise ValueError(
            f"train: got steps_per_execution={config.steps_per_execution} and {steps // config.epochs} batches in an epoch, "
            "needs a divisor of them"
        )
    if config.online_steps is not None and steps is not None and steps <= config.online_steps * factor_outs:
        raise ValueError(
            f"train: got online_steps={config.online_steps} for {factor_outs} factor-outs in {steps} steps, needs at most "
            f"{(steps - 1) // factor_outs}"
        )
    with _run_directory(directory, config.to_json(), resume) as directory:
        return _train(config, directory, data)


class _Data(NamedTuple):
    """What a run is trained on, tested on, and validated on."""

    train: tf.data.Dataset
    test: tf.data.Dataset
    validation: tf.data.Dataset | None

    def num_steps(self, config: RunConfig) -> int | None:
        """Steps of a training; None if that cannot be known."""
        steps = config.steps_per_epoch or int(self.train.cardinality())
        return config.epochs * steps if steps > 0 else None


def _check_optimizer(config: RunConfig, data: _Data) -> None:
    """Raises a ValueError for bad options of the optimizer, of LCMA's first phase too."""
    make_optimizer(config, data.num_steps(config))
    if config.pretrain_epochs:
        try:
            make_optimizer(_pretraining(config), data.num_steps(_pretraining(config)))
        except ValueError as error:
            raise ValueError(
                f"{error} (in the first phase of {config.recipe}, pretrain_epochs={config.pretrain_epochs})"
            ) from None


def _pretraining(config: RunConfig) -> RunConfig:
    """The configuration of LCMA's first phase."""
    return dataclasses.replace(config, epochs=config.pretrain_epochs or config.epochs)


def _train(config: RunConfig, directory: pathlib.Path, data: _Data) -> FlowModel:
    """All phases of a run, each resumed or loaded if it is there."""

    def fit(where: pathlib.Path, config: RunConfig, decide: DecideFactorization | None = None, **more: Any) -> FlowModel:
        return _fit(where, config, lambda: config.build(**more), data, decide)

    def contributions_of(model: FlowModel) -> list[np.ndarray]:
        return _contributions(directory / CONTRIBUTIONS, model, data.train, config.steps_per_epoch)

    if config.base is None:
        model = fit(directory, config)
    elif config.online_steps is None:
        fit(directory / "pretraining", _pretraining(config))
        contributions = contributions_of(load(directory / "pretraining" / MODEL))  # as a run that goes on from here has it
        model = fit(directory, config, contributions=contributions)
    else:
        updates = config.online_steps // config.gradient_accumulation_steps
        decide = DecideFactorization(data.train.take(config.online_steps), updates, config.seed)
        model = fit(directory, config, decide, contributions="online")
        contributions = contributions_of(model)
    if config.base is not None:
        factorizations: dict[str, Any] = {config.recipe: _factorization(model)}
        if config.baseline:
            own = {key: value for key, value in config.arguments.items() if key not in ("keep", "granularity")}
            conventional = fit(
                directory / "conventional", dataclasses.replace(config, recipe=config.base, arguments=own, online_steps=None)
            )
            factorizations[f"{config.base} (conventional)"] = _factorization(conventional)
        if not (directory / "factorization.png").is_file():
            plot.save_factorizations(directory / "factorization.png", factorizations, contributions)
    if _has_samples(config) and not (directory / "samples.png").is_file():
        plot.save_grid(directory / "samples.png", _samples(model, config.seed, data.test), config.grey_levels)
    for other in config.others():
        _train(other, directory / other.recipe, data)
    return model


def _has_samples(config: RunConfig) -> bool:
    """Whether there is a picture of samples: of images only."""
    return len(config.event_shape) == 3


def _samples(model: FlowModel, seed: int, data: tf.data.Dataset) -> tf.Tensor:
    """Samples, of a conditional model given the first conditions of a dataset."""
    if not isinstance(batches.events(data.element_spec), dict):
        return model.sample(64, seed=seed)
    condition = batches.events(next(iter(data)))["condition"]
    condition = tf.nest.map_structure(lambda value: value[:64], condition)
    return model.sample(seed=seed, condition=condition)


def load(path: str | os.PathLike) -> FlowModel:
    """Loads a model that `FlowModel.save` wrote, or that of a run, with its recipe, weights and factorization.

    Args:
      path: a `.keras` file, or the directory of a run.

    Raises:
      ValueError: if there is no such file or directory, it is no saved `FlowModel`, or as `load_run`.
    """
    path = os.fspath(path)
    needs = "needs a .keras file that FlowModel.save wrote, or a run directory"
    if os.path.exists(os.path.join(path, "saved_model.pb")):
        raise ValueError(f"load: {path} is an exported SavedModel, which tf.saved_model.load reads; {needs}")
    if os.path.isdir(path):
        return load_run(path)
    if "://" not in path and not os.path.exists(path):
        raise ValueError(f"load: there is no {path}, {needs}{did_you_mean_folder(path)}")
    if "://" not in path and not (path.endswith(".keras") and zipfile.is_zipfile(path)):
        raise ValueError(f"load: {path} is no .keras file, {needs}")
    model = keras.saving.load_model(path)
    if not isinstance(model, FlowModel):
        raise ValueError(f"load: {path} is a {type(model).__name__}, needs a saved FlowModel")
    return model


def read_metrics(directory: str | os.PathLike) -> dict[str, dict]:
    """The metrics of a run and of the runs inside it, by relative path (`"."` for the run itself)."""
    directory = pathlib.Path(directory)
    return {str(path.parent.relative_to(directory)): json.loads(path.read_text()) for path in sorted(directory.rglob(METRICS))}


def read_config(directory: str | os.PathLike) -> dict:
    """The configuration of a run.

    Raises:
      ValueError: if the directory holds no run.
    """
    config = stored_config(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of arguments that had other names when it was written
        config = new_names("run", config, {"levels": "grey_levels"})
        if "data" in config:
            config["data"] = new_names("run", config["data"], {"levels": "grey_levels"})
        return config | {"arguments": registry.present_names(config["recipe"], config["arguments"])}


def load_run(directory: str | os.PathLike) -> FlowModel:
    """The trained model of a run.

    Raises:
      ValueError: if the directory holds no finished run, or one of another version that this one cannot load.
    """
    config = read_config(directory)
    path = pathlib.Path(directory) / MODEL
    if not path.is_file():
        raise ValueError(f"run: {directory} holds no finished run (no {MODEL}); go on with it by --resume")
    try:
        return load(path)
    except (TypeError, ValueError) as error:
        if config.get("version") == __version__:
            raise
        raise ValueError(
            f"run: {directory} is of version {config.get('version')}, and version {__version__} cannot load it: {error}"
        ) from error


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


@contextlib.contextmanager
def _run_directory(directory: str | os.PathLike, config: dict, resume: bool) -> Iterator[pathlib.Path]:
    """The run directory, for this process alone while the context lasts; errors of its disk say so."""
    directory = pathlib.Path(directory)
    error_of_disk: type[Exception] = ValueError
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            _lock(descriptor, directory)
            _check_directory(directory, json.loads(json.dumps(config)), resume)
            error_of_disk = Failure
            yield directory
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise error_of_disk(f"train: cannot write to the run directory {directory}: {error.strerror or error}") from error


def _lock(descriptor: int, directory: pathlib.Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except BlockingIOError:
        raise ValueError(f"train: another process writes to {directory}; choose another directory") from None


def _check_directory(directory: pathlib.Path, config: dict, resume: bool) -> None:
    if _holds_epochs(directory):
        if not resume:
            raise ValueError(f"train: {directory} already holds a run; resume it (--resume) or choose another directory")
        _check_histories(directory)
        stored = {field.name: field.default for field in dataclasses.fields(RunConfig)} | {"optimizer_arguments": {}}
        stored = {name: value for name, value in stored.items() if name in config} | read_config(directory)
        config = config | {"version": stored.get("version")}
        changed = sorted(key for key in stored | config if stored.get(key) != config.get(key))
        if changed:
            differences = ", ".join(f"{key}={config.get(key)!r} (was {stored.get(key)!r})" for key in changed)
            raise ValueError(f"train: {directory} holds a run of another configuration: {differences}")
    else:
        _write_json(directory / CONFIG, config)


def _check_histories(directory: pathlib.Path) -> None:
    """Raises a ValueError if an unfinished training has no minutes in its history, as those of older versions."""
    for path in directory.rglob(HISTORY):
        header = path.read_text().partition("\n")[0].split(",")
        if header != [""] and "minutes" not in header and not (path.parent / METRICS).is_file():
            version = stored_config(directory).get("version")
            raise ValueError(
                f"train: {path} is of version {version}, in which trainings were not timed, and cannot be gone on with; choose "
                "another directory"
            )


def _holds_epochs(directory: pathlib.Path) -> bool:
    """Whether the directory holds a run with something to go on from.

    Raises:
      ValueError: if it holds anything but a run.
    """
    if not any(path.name != "config.unfinished" for path in directory.iterdir()):
        return False
    try:
        stored_config(directory)
    except ValueError:
        raise ValueError(f"train: {directory} is not empty and holds no run; choose another directory") from None
    backups = (path for path in directory.rglob("backup/*.weights.h5") if path.name != "unfinished.weights.h5")
    return any(backups) or any(directory.rglob(MODEL))


def _fit(
    directory: pathlib.Path,
    config: RunConfig,
    build: Callable[[], tfd.Distribution],
    data: _Data,
    decide: DecideFactorization | None,
) -> FlowModel:
    """Trains into `directory`, goes on with what is there, or loads what is finished."""
    steps = config.steps_per_epoch
    backup = Backup(directory / "backup", directory / HISTORY)
    done = least_of_workers(sum((directory / name).is_file() for name in (MODEL, METRICS)))
    if done == 2:
        backup.remove()
        return load(directory / MODEL)
    directory.mkdir(parents=True, exist_ok=True)
    if done == 1:
        model = load(directory / MODEL)
    else:
        keras.utils.set_random_seed(config.seed)
        with _dtype_policy(config.precision or keras.config.dtype_policy()):
            model = FlowModel(build(), seed=config.seed)
        optimizer = make_optimizer(config, data.num_steps(config), model.trainable_variables)
        model.compile(optimizer, steps_per_execution=config.steps_per_execution)
        backup.first_epoch = _epochs_before_decided(config, data, model)
        finished_epochs = backup.restore(model)
        if not finished_epochs:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "FlowModel.adapt: nothing in")  # not every recipe adapts
                model.adapt(data.train)
        _keep_rows(directory / HISTORY, finished_epochs)
        history = model.fit(
            data.train.repeat().skip(finished_epochs * steps) if steps else data.train,
            initial_epoch=finished_epochs,
            epochs=finished_epochs if _is_over(config, backup) else config.epochs,
            steps_per_epoch=steps,
            validation_data=data.validation.take(steps) if steps and data.validation else data.validation,
            callbacks=_callbacks(directory, config, data, backup, decide),
        )
        if not (has_finite_weights(model) and np.isfinite(history.history.get("loss", [])).all()):
            raise Failure(f"train: loss or weights in {directory} are no longer finite; try a smaller learning rate")
        if (best := backup.best_epoch()) is not None:
            backup.load(model, best)
            model.optimizer.finalize_variable_values(model.trainable_variables)  # to their moving average, if there is one
            model.converge()
        if decide is not None:
            _check_decided(directory, model)
        unfinished = directory / f"unfinished.{MODEL}"
        model.save(unfinished)
        os.replace(unfinished, directory / MODEL)
    metrics = model.evaluate(data.test, return_dict=True, verbose=0)
    parameters = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    metrics = {key: float(value) for key, value in metrics.items()} | {"parameters": parameters}
    _write_json(directory / METRICS, metrics)
    least_of_workers(2)  # a worker that was killed before may still need the others' backups
    backup.remove()
    return model


def _callbacks(
    directory: pathlib.Path, config: RunConfig, data: _Data, backup: Backup, decide: DecideFactorization | None
) -> list[keras.callbacks.Callback]:
    """What goes along with a training, that was perhaps begun before."""
    rows = backup.rows()
    minutes = rows[-1].get("minutes", 0.0) if rows else 0.0
    unit = "images" if _has_samples(config) else "events"
    batch_size = tf.nest.flatten(data.train.element_spec)[0].shape[0]
    callbacks = [] if decide is None else [decide]
    if config.ema:
        callbacks.append(keras.callbacks.SwapEMAWeights())  # so that the averages are validated
    callbacks += [
        keras.callbacks.TerminateOnNaN(),
        Clock(batch_size, unit, minutes, config.max_minutes),
        keras.callbacks.CSVLogger(str(directory / HISTORY), append=True),
        keras.callbacks.TensorBoard(str(directory / "logs"), write_graph=False),
        backup,
    ]
    if config.patience is not None:
        early = _EarlyStopping("val_nll", patience=config.patience, mode="min", start_from_epoch=backup.first_epoch)

        def replay(logs: dict | None = None) -> None:
            for epoch, row in enumerate(rows):
                early.on_epoch_end(epoch, row)

        callbacks += [early, keras.callbacks.LambdaCallback(on_train_begin=replay)]
    return callbacks


class _EarlyStopping(keras.callbacks.EarlyStopping):
    """Keras's, to which a value that is no number is worse than any."""

    def get_monitor_value(self, logs: dict) -> float:
        value = super().get_monitor_value(logs)
        return value if value is None or np.isfinite(value) else np.inf


def _is_over(config: RunConfig, backup: Backup) -> bool:
    """Whether a training that was killed had come to its end before."""
    rows, best = backup.rows(), backup.best_epoch()
    is_late = bool(rows) and config.max_minutes is not None and rows[-1].get("minutes", 0.0) >= config.max_minutes
    return is_late or (config.patience is not None and best is not None and len(rows) - best >= config.patience)


def _epochs_before_decided(config: RunConfig, data: _Data, model: FlowModel) -> int:
    """Epochs at whose end a factorization that is learned online lacks decisions: the last is made at the start of a step."""
    multiscale, steps = structure_of(model.distribution).multiscale, data.num_steps(config)
    if config.online_steps is None or multiscale is None or steps is None:
        return 0
    return config.online_steps * (len(multiscale.levels) - 1) // (steps // config.epochs)


def _check_decided(directory: pathlib.Path, model: FlowModel) -> None:
    """Raises a Failure unless an online factorization is complete, which steps that were left out (of float16) delay."""
    multiscale = structure_of(model.distribution).multiscale
    if multiscale is not None and multiscale.num_decided < (factor_outs := len(multiscale.levels) - 1):
        raise Failure(
            f"train: {multiscale.num_decided} of {factor_outs} factor-outs were decided in the epochs of {directory}; needs "
            "fewer online_steps"
        )


@contextlib.contextmanager
def _dtype_policy(policy: str | keras.DTypePolicy) -> Iterator[None]:
    """A Keras dtype policy while networks are made."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _keep_rows(path: pathlib.Path, epochs: int) -> None:
    """Drops rows of epochs that were logged but not backed up, since they will be trained again."""
    if path.is_file():
        with path.open(newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("w", newline="") as file:
            if epochs:
                csv.writer(file).writerows([header, *rows[:epochs]])
        os.replace(unfinished, path)


def _contributions(
    path: pathlib.Path, pretrained: FlowModel, train_data: tf.data.Dataset, steps_per_epoch: int | None
) -> list[np.ndarray]:
    if path.is_file():
        with np.load(path) as stored:
            return [stored[key] for key in stored.files if key.startswith("factor_out")]
    data = train_data.take(steps_per_epoch) if steps_per_epoch else train_data
    contributions, errors = likelihood_contributions(pretrained.bijector, data, standard_errors=True)
    with open(f"{path}.unfinished", "wb") as file:
        arrays: dict[str, Any] = {f"factor_out_{k}": c for k, c in enumerate(contributions)}
        np.savez(file, **arrays | {f"standard_error_{k}": e for k, e in enumerate(errors)})
    os.replace(f"{path}.unfinished", path)
    return contributions


def _factorization(model: FlowModel) -> DimensionFactorization | None:
    multiscale = structure_of(model.distribution).multiscale
    return None if multiscale is None else multiscale.factorization


def _write_json(path: pathlib.Path, value: dict) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(unfinished, path)
