"""Run directories: a recipe trained from start to end, resumable at every epoch."""

import argparse
import contextlib
import csv
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from tfp_dimflows import plot, recipes
from tfp_dimflows.bijectors.factorization import DimensionFactorization
from tfp_dimflows.bijectors.lcma import likelihood_contributions
from tfp_dimflows.distributions import structure_of
from tfp_dimflows.recipes import registry
from tfp_dimflows.renamed import new_names
from tfp_dimflows.training.backup import Backup, least_of_workers
from tfp_dimflows.training.callbacks import DecideFactorization
from tfp_dimflows.training.model import FlowModel, load
from tfp_dimflows.version import __version__

CONFIG, MODEL, HISTORY, METRICS, CONTRIBUTIONS = (
    "config.json",
    "model.keras",
    "history.csv",
    "metrics.json",
    "contributions.npz",
)


def _option(default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A field that is an option of the command line too, with what argparse is told of it."""
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RunConfig:
    """What a run trains, and how: the options of `train`, most of them options of the command line, and `config.json`.

    Args:
      recipe: a recipe's name.
      event_shape: shape of one image.
      grey_levels: number of grey levels.
      arguments: further arguments of the recipe.
      epochs: epochs of training.
      steps_per_epoch: optimisation steps per epoch, and at most as many batches of validation after it; None: one pass over the
        data.
      learning_rate: Adam's.
      seed: integer seed of initial weights, noise and samples.
      pretrain_epochs: epochs of LCMA's first phase; None: half of `epochs`, rounded up.
      online_steps: LCMA in one phase: a factor-out is decided after every so many steps, by as many batches
        (`DecideFactorization`). `contributions.npz` is then of the trained model.
      baseline: whether an LCMA recipe also trains the conventional factorization.
      notes: further entries of `config.json`, such as the dataset's name.

    Raises:
      ValueError: if the recipe does not exist or does not take the arguments; for `online_steps` with `pretrain_epochs` or a
        recipe without LCMA.

    #### Example

    >>> config = dimflows.training.RunConfig(recipe="glow", event_shape=[8, 8, 1], grey_levels=17, epochs=2)
    >>> config.to_json()["arguments"], config.build().event_shape
    ({'seed': 0}, TensorShape([8, 8, 1]))
    """

    recipe: str
    event_shape: Sequence[int]
    grey_levels: int
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    epochs: int = _option(help="number of epochs")
    steps_per_epoch: int | None = _option(None, help="default: the whole training split")
    learning_rate: float = _option(1e-3, help="Adam's", type=float)
    seed: int = _option(0, help="of initial weights, noise and samples", type=int)
    pretrain_epochs: int | None = _option(None, help="lcma recipes: epochs of phase 1; default: half of --epochs")
    online_steps: int | None = _option(
        None, help="lcma recipes: no phase 1; a factor-out is decided after every N steps of the training", metavar="N"
    )
    baseline: bool = _option(
        True, help="lcma recipes: train the conventional one beside", action=argparse.BooleanOptionalAction
    )
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        arguments = {"seed": self.seed} | registry.present_names(self.recipe, self.arguments)
        if reserved := {"event_shape", "grey_levels", "contributions"} & set(arguments):
            raise ValueError(
                f"train: got recipe arguments {sorted(reserved)}, which the data and the phases of training decide"
            )
        if self.online_steps is not None and (self.base is None or self.pretrain_epochs is not None):
            raise ValueError(f"train: got online_steps for {self.recipe}, needs an lcma recipe and no pretrain_epochs")
        object.__setattr__(self, "event_shape", list(self.event_shape))
        object.__setattr__(self, "arguments", arguments)
        if self.base is not None and self.online_steps is None:
            object.__setattr__(self, "pretrain_epochs", self.pretrain_epochs or (self.epochs + 1) // 2)

    @property
    def base(self) -> str | None:
        """The recipe on which an LCMA recipe stands, None for others."""
        return recipes.base_of(self.recipe)

    def build(self, **more: Any) -> tfd.Distribution:
        """The distribution of the recipe with these further arguments."""
        return recipes.get(self.recipe)(self.event_shape, grey_levels=self.grey_levels, **self.arguments | more)

    def to_json(self) -> dict[str, Any]:
        """The entries of `config.json`."""
        entries = dataclasses.asdict(self)
        notes = entries.pop("notes")
        for option in ("pretrain_epochs", "online_steps", "baseline"):
            if self.base is None or entries[option] is None:
                del entries[option]
        return {"version": __version__, **entries, **notes}


def train(
    recipe: str,
    directory: str | os.PathLike,
    train_data: tf.data.Dataset,
    test_data: tf.data.Dataset,
    *,
    resume: bool = False,
    **options: Any,
) -> FlowModel:
    """Trains a recipe on integer images into a run directory.

    The directory gets `config.json`, the model (`model.keras`), per-epoch `history.csv`, TensorBoard `logs/`, `metrics.json`
    with the test metrics, and `samples.png`. An LCMA recipe goes through its three phases: a non-multi-scale model trained into
    `pretraining/`, its likelihood contributions into `contributions.npz`, the model itself; for comparison the base recipe
    with its conventional factorization is trained with the same budget into `conventional/`, and `factorization.png` shows
    which dimensions stayed. With `online_steps` it has one phase.

    A killed run goes on from its last full epoch with `resume=True`, after reading the batches again that it was trained on. If
    `train_data` is the same in each iteration (`dimflows.data.load` with `repeat`), it ends as equal to one that was not killed
    as two such runs are to each other: on a CPU bit for bit, but for rare rounding. Inside the scope of a `tf.distribute`
    strategy it trains on all replicas, with batches of `train_data` shared among them; with several workers, each needs a
    directory of its own.

    Args:
      recipe: a recipe's name.
      directory: the run directory.
      train_data: batches of integer images; endless, or repeated if `steps_per_epoch` is given.
      test_data: batches of integer images.
      resume: whether to go on with an existing run of the same configuration.
      **options: the other fields of `RunConfig`, such as `event_shape`, `grey_levels` and `epochs`.

    Returns:
      The trained model.

    Raises:
      ValueError: if the directory cannot be written, is written by another process, holds a run and `resume` is False, or holds
        one of another configuration; for more `online_steps` than there are; or as `RunConfig`.
    """
    config = RunConfig(recipe=recipe, **new_names("train", options, {"levels": "grey_levels"}))
    if config.steps_per_epoch is None and train_data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError("train: got endless train_data, needs steps_per_epoch")
    plot.require_matplotlib()  # now rather than after hours of training
    multiscale = structure_of(config.build()).multiscale  # bad arguments fail before anything is written
    if config.online_steps is not None and multiscale is not None:
        factor_outs = len(multiscale.levels) - 1
        steps = config.epochs * (config.steps_per_epoch or int(train_data.cardinality()))
        if 0 < steps <= config.online_steps * factor_outs:
            raise ValueError(
                f"train: got online_steps={config.online_steps} for {factor_outs} factor-outs in {steps} steps, needs at most "
                f"{(steps - 1) // factor_outs}"
            )
    with _run_directory(directory, config.to_json(), resume) as directory:
        return _train(config, directory, train_data, test_data)


def _train(config: RunConfig, directory: pathlib.Path, train_data: tf.data.Dataset, test_data: tf.data.Dataset) -> FlowModel:
    """All phases of a run, each resumed or loaded if it is there."""

    def fit(
        where: pathlib.Path, config: RunConfig, callbacks: Sequence[keras.callbacks.Callback] = (), **more: Any
    ) -> FlowModel:
        return _fit(where, config, lambda: config.build(**more), train_data, test_data, callbacks)

    def contributions_of(model: FlowModel) -> list[np.ndarray]:
        return _contributions(directory / CONTRIBUTIONS, model, train_data, config.steps_per_epoch)

    if config.base is None:
        model = fit(directory, config)
    elif config.online_steps is None:
        fit(directory / "pretraining", dataclasses.replace(config, epochs=config.pretrain_epochs or config.epochs))
        contributions = contributions_of(load(str(directory / "pretraining" / MODEL)))  # as a run that goes on from here has it
        model = fit(directory, config, contributions=contributions)
    else:
        decide = DecideFactorization(train_data.take(config.online_steps), config.online_steps, config.seed)
        model = fit(directory, config, [decide], contributions="online")
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
    if not (directory / "samples.png").is_file():
        plot.save_grid(directory / "samples.png", model.sample(64, seed=config.seed), config.grey_levels)
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
    path = pathlib.Path(directory) / CONFIG
    if not path.is_file():
        raise ValueError(f"run: {directory} holds no run (no {CONFIG})")
    config = json.loads(path.read_text())
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
        return load(str(path))
    except (TypeError, ValueError) as error:
        if config.get("version") == __version__:
            raise
        raise ValueError(
            f"run: {directory} is of version {config.get('version')}, and version {__version__} cannot load it: {error}"
        ) from error


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


@contextlib.contextmanager
def _run_directory(directory: str | os.PathLike, config: dict, resume: bool) -> Iterator[pathlib.Path]:
    """The run directory, for this process alone while the context lasts; errors of its disk are ValueErrors."""
    directory = pathlib.Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            _lock(descriptor, directory)
            _check_directory(directory, json.loads(json.dumps(config)), resume)
            yield directory
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise ValueError(f"train: cannot write to the run directory {directory}: {error.strerror or error}") from error


def _lock(descriptor: int, directory: pathlib.Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except BlockingIOError:
        raise ValueError(f"train: another process writes to {directory}; choose another directory") from None


def _check_directory(directory: pathlib.Path, config: dict, resume: bool) -> None:
    if (directory / CONFIG).is_file():
        if not resume:
            raise ValueError(f"train: {directory} already holds a run; resume it (--resume) or choose another directory")
        stored = read_config(directory)
        config = config | {"version": stored.get("version")}
        changed = sorted(key for key in stored | config if stored.get(key) != config.get(key))
        if changed:
            differences = ", ".join(f"{key}={config.get(key)!r} (was {stored.get(key)!r})" for key in changed)
            raise ValueError(f"train: {directory} holds a run of another configuration: {differences}")
    elif any(path.name != "config.unfinished" for path in directory.iterdir()):
        raise ValueError(f"train: {directory} is not empty and holds no run; choose another directory")
    else:
        _write_json(directory / CONFIG, config)


def _fit(
    directory: pathlib.Path,
    config: RunConfig,
    build: Callable[[], tfd.Distribution],
    train_data: tf.data.Dataset,
    test_data: tf.data.Dataset,
    callbacks: Sequence[keras.callbacks.Callback],
) -> FlowModel:
    """Trains into `directory`, goes on with what is there, or loads what is finished."""
    backup = Backup(directory / "backup")
    done = least_of_workers(sum((directory / name).is_file() for name in (MODEL, METRICS)))
    if done == 2:
        backup.remove()
        return load(str(directory / MODEL))
    directory.mkdir(parents=True, exist_ok=True)
    if done == 1:
        model = load(str(directory / MODEL))
    else:
        keras.utils.set_random_seed(config.seed)
        model = FlowModel(build(), seed=config.seed)
        model.compile(keras.optimizers.Adam(config.learning_rate, global_clipnorm=100.0))
        finished_epochs = backup.restore(model)
        if not finished_epochs:
            model.adapt(train_data, steps=4)
        _keep_rows(directory / HISTORY, finished_epochs)
        steps = config.steps_per_epoch
        model.fit(
            train_data.repeat().skip(finished_epochs * steps) if steps else train_data,
            initial_epoch=finished_epochs,
            epochs=config.epochs,
            steps_per_epoch=steps,
            validation_data=test_data.take(steps) if steps else test_data,
            callbacks=[
                *callbacks,
                keras.callbacks.TerminateOnNaN(),
                keras.callbacks.CSVLogger(str(directory / HISTORY), append=True),
                keras.callbacks.TensorBoard(str(directory / "logs"), write_graph=False),
                backup,
            ],
        )
        if not all(np.isfinite(w).all() for w in model.get_weights() if w.dtype.kind == "f"):
            raise ValueError(f"train: the weights in {directory} are no longer finite; try a smaller learning rate")
        unfinished = directory / f"unfinished.{MODEL}"
        model.save(unfinished)
        os.replace(unfinished, directory / MODEL)
    metrics = model.evaluate(test_data, return_dict=True, verbose=0)
    parameters = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    metrics = {key: float(value) for key, value in metrics.items()} | {"parameters": parameters}
    _write_json(directory / METRICS, metrics)
    least_of_workers(2)  # a worker that was killed before may still need the others' backups
    backup.remove()
    return model


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
