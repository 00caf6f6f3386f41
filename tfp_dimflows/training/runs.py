"""Run directories: a recipe trained from start to end, resumable at every epoch."""

import contextlib
import csv
import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfp_dimflows import plot, recipes
from tfp_dimflows.bijectors import Multiscale
from tfp_dimflows.bijectors.lcma import likelihood_contributions
from tfp_dimflows.training.backup import Backup, least_of_workers
from tfp_dimflows.training.callbacks import DecideFactorization, _find_multiscale
from tfp_dimflows.training.model import FlowModel, load
from tfp_dimflows.version import __version__

CONFIG, MODEL, HISTORY, METRICS, CONTRIBUTIONS = (
    "config.json",
    "model.keras",
    "history.csv",
    "metrics.json",
    "contributions.npz",
)


def train(
    recipe: str,
    directory: str | os.PathLike,
    train_data: tf.data.Dataset,
    test_data: tf.data.Dataset,
    *,
    event_shape: Sequence[int],
    levels: int,
    epochs: int,
    steps_per_epoch: int | None = None,
    pretrain_epochs: int | None = None,
    online_steps: int | None = None,
    baseline: bool = True,
    arguments: dict | None = None,
    learning_rate: float = 1e-3,
    seed: int = 0,
    resume: bool = False,
    notes: dict | None = None,
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
      event_shape: shape of one image.
      levels: number of grey levels.
      epochs: epochs of training.
      steps_per_epoch: optimisation steps per epoch, and at most as many batches of validation after it; default: one pass
        over the data.
      pretrain_epochs: epochs of LCMA's first phase; default: half of `epochs`, rounded up.
      online_steps: LCMA in one phase: a factor-out is decided after every so many steps, by as many batches
        (`DecideFactorization`). `contributions.npz` is then of the trained model.
      baseline: whether an LCMA recipe also trains the conventional factorization.
      arguments: further arguments of the recipe.
      learning_rate: Adam's.
      seed: integer seed of initial weights, noise and samples.
      resume: whether to go on with an existing run of the same configuration.
      notes: further entries of the configuration, such as the dataset's name.

    Returns:
      The trained model.

    Raises:
      ValueError: if the directory cannot be written, is written by another process, holds a run and `resume` is False, or holds
        one of another configuration; if the recipe does not exist or does not take the arguments; for `online_steps` with
        `pretrain_epochs` or a recipe without LCMA, or too many for the epochs.
    """
    if reserved := {"event_shape", "levels", "contributions"} & set(arguments or {}):
        raise ValueError(f"train: got recipe arguments {sorted(reserved)}, which the data and the phases of training decide")
    if steps_per_epoch is None and train_data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError("train: got endless train_data, needs steps_per_epoch")
    if online_steps is not None and (recipes.base_of(recipe) is None or pretrain_epochs is not None):
        raise ValueError(f"train: got online_steps for {recipe}, needs an lcma recipe and no pretrain_epochs")
    plot.require_matplotlib()  # now rather than after hours of training
    arguments = {"seed": seed} | (arguments or {})
    if online_steps is None:
        pretrain_epochs = pretrain_epochs or (epochs + 1) // 2
    distribution = recipes.get(recipe)(event_shape, levels=levels, **arguments)  # bad arguments fail before anything is written
    if online_steps is not None and (multiscale := _find_multiscale(distribution)) is not None:
        factor_outs = len(multiscale.levels) - 1
        steps = epochs * (steps_per_epoch or int(train_data.cardinality()))
        if 0 < steps <= online_steps * factor_outs:
            raise ValueError(
                f"train: got online_steps={online_steps} for {factor_outs} factor-outs in {steps} steps, needs at most "
                f"{(steps - 1) // factor_outs}"
            )
    budget = {
        "epochs": epochs,
        "steps_per_epoch": steps_per_epoch,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    config = {"version": __version__, "recipe": recipe, "event_shape": list(event_shape), "levels": levels}
    config |= {"arguments": arguments, **budget}
    if recipes.base_of(recipe):
        phase: dict[str, Any] = {"pretrain_epochs": pretrain_epochs} if online_steps is None else {"online_steps": online_steps}
        config |= phase | {"baseline": baseline}
    with _run_directory(directory, config | (notes or {}), resume) as directory:
        phase = {"pretrain_epochs": pretrain_epochs, "online_steps": online_steps, "baseline": baseline}
        return _train(recipe, directory, (train_data, test_data), event_shape, levels, arguments, budget, **phase)


def _train(
    recipe: str,
    directory: pathlib.Path,
    datasets: tuple[tf.data.Dataset, tf.data.Dataset],
    event_shape: Sequence[int],
    levels: int | None,
    arguments: dict[str, Any],
    budget: dict[str, Any],
    *,
    pretrain_epochs: int | None,
    online_steps: int | None,
    baseline: bool,
) -> FlowModel:
    """All phases of a run, each resumed or loaded if it is there."""
    seed = budget["seed"]

    def fit(
        name: str,
        where: pathlib.Path,
        arguments: dict[str, Any],
        epochs: int | None = budget["epochs"],
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> FlowModel:
        build = recipes.get(name)
        return _fit(
            where,
            lambda: FlowModel(build(event_shape, levels=levels, **arguments), seed=seed),
            *datasets,
            **{**budget, "epochs": epochs},
            callbacks=callbacks,
        )

    base = recipes.base_of(recipe)
    if base is None:
        model = fit(recipe, directory, arguments)
        _save_samples(directory / "samples.png", model, levels, seed)
        return model

    def contributions_of(model: FlowModel) -> list[np.ndarray]:
        return _contributions(directory / CONTRIBUTIONS, model, datasets[0], budget["steps_per_epoch"])

    if online_steps is None:
        fit(recipe, directory / "pretraining", arguments, pretrain_epochs)
        contributions = contributions_of(load(str(directory / "pretraining" / MODEL)))  # as a run that goes on from here has it
        model = fit(recipe, directory, arguments | {"contributions": contributions})
    else:
        decide = DecideFactorization(datasets[0].take(online_steps), online_steps, seed)
        model = fit(recipe, directory, arguments | {"contributions": "online"}, callbacks=[decide])
        contributions = contributions_of(model)
    factorizations: dict[str, Any] = {recipe: _multiscale(model).factorization}
    if baseline:
        own = {key: value for key, value in arguments.items() if key not in ("keep", "granularity")}
        conventional = fit(base, directory / "conventional", own)
        factorizations[f"{base} (conventional)"] = _multiscale(conventional).factorization
    if not (directory / "factorization.png").is_file():
        plot.save_factorizations(directory / "factorization.png", factorizations, contributions)
    _save_samples(directory / "samples.png", model, levels, seed)
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
    return json.loads(path.read_text())


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
        stored = json.loads((directory / CONFIG).read_text())
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
    build: Callable[[], FlowModel],
    train_data: tf.data.Dataset,
    test_data: tf.data.Dataset,
    *,
    epochs: int,
    steps_per_epoch: int | None,
    learning_rate: float,
    seed: int,
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
        keras.utils.set_random_seed(seed)
        model = build()
        model.compile(keras.optimizers.Adam(learning_rate, global_clipnorm=100.0))
        finished_epochs = backup.restore(model)
        if not finished_epochs:
            model.adapt(train_data, steps=4)
        _keep_rows(directory / HISTORY, finished_epochs)
        model.fit(
            train_data.repeat().skip(finished_epochs * steps_per_epoch) if steps_per_epoch else train_data,
            initial_epoch=finished_epochs,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            validation_data=test_data.take(steps_per_epoch) if steps_per_epoch else test_data,
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


def _multiscale(model: FlowModel) -> Multiscale:
    return model.bijector.bijectors[-1]


def _save_samples(path: pathlib.Path, model: FlowModel, levels: int | None, seed: int) -> None:
    if not path.is_file():
        plot.save_grid(path, model.sample(64, seed=seed), levels)


def _write_json(path: pathlib.Path, value: dict) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(unfinished, path)
