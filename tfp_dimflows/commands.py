"""What the `dimflows` command does, given its arguments."""

import argparse
import csv
import inspect
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfp_dimflows import data, plot, recipes, training
from tfp_dimflows.bijectors import PNF
from tfp_dimflows.codes import compare_with_pca
from tfp_dimflows.data.tables import to_columns
from tfp_dimflows.dataset_names import as_folder, is_table
from tfp_dimflows.distributions import VAEPrior, structure_of, variational
from tfp_dimflows.messages import Failure
from tfp_dimflows.training.codes import bits_of_parts


def run(arguments: argparse.Namespace) -> None:
    """Does what a command is for.

    Args:
      arguments: as `cli` has parsed and checked them.

    Raises:
      ValueError: for arguments that do not fit.
      Failure: if the work fails that has begun.
    """
    works = {"train": _train, "evaluate": _evaluate, "score": _score, "codes": _codes, "recipes": _recipes}
    try:
        works.get(arguments.command, _picture)(arguments)
    except tf.errors.ResourceExhaustedError as error:
        raise Failure(f"{arguments.command}: out of memory, try smaller batches ({_reason(error)})") from error
    except tf.errors.OpError as error:
        raise Failure(f"{arguments.command}: {_reason(error)}") from error


def _reason(error: tf.errors.OpError) -> str:
    """What TensorFlow says of an error, in one line, without the places in the graph."""
    lines = [line for line in error.message.splitlines() if not re.match(r"\s|Graph execution|Detected at|<stack|$", line)]
    return re.sub(r"\{\{.*?\}\} ?| \[Op:.*|\\(?=')", "", lines[0]) if lines else type(error).__name__


def _train(arguments: argparse.Namespace) -> None:
    strategy, out = _strategy(arguments)
    with strategy.scope():
        _train_into(out, arguments)
    report(out, arguments.recipe)


def _strategy(arguments: argparse.Namespace) -> tuple[tf.distribute.Strategy, str]:
    """The strategy, made before TensorFlow does anything, and the run directory: workers but the first have one beside it."""
    if arguments.strategy == "mirrored":
        return tf.distribute.MirroredStrategy(), arguments.out
    if arguments.strategy == "multiworker":
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        worker = strategy.cluster_resolver.task_id
        return strategy, f"{arguments.out}.worker-{worker}" if worker else arguments.out
    return tf.distribute.get_strategy(), arguments.out


def _train_into(out: str, arguments: argparse.Namespace) -> None:
    if is_table(arguments.data):
        _train_on_table(out, arguments)
    else:
        _train_on_images(out, arguments)


def _train_on_table(out: str, arguments: argparse.Namespace) -> None:
    of_images: dict[str, Any] = {
        "image_size": None,
        "grey_levels": None,
        "conditional": None,
        "background": "white",
        "test_split": "test",
    }
    of_images |= {"flips": False, "shifts": 0}
    if given := [name for name, default in of_images.items() if getattr(arguments, name, default) != default]:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"train: got {names} for the table {arguments.data}, which are for images")
    columns: dict[str, Any] = {name: getattr(arguments, name) for name in _TABLE if name in arguments}
    seed, batch_size = arguments.options.get("seed", 0), arguments.data_options["batch_size"]
    stored = {"validation_split": arguments.validation_split, "batch_size": batch_size, "seed": seed}
    table = data.table(arguments.data, repeat=True, bounds=arguments.set.get("bounds"), **columns, **stored)
    condition = {"condition_shape": [len(table.condition)]} if table.condition else {}
    training.train(
        arguments.recipe,
        out,
        table.train,
        table.test,
        table.validation,
        event_shape=[len(table.columns)],
        arguments=condition | arguments.set,
        resume=arguments.resume,
        notes={
            "data": {
                "name": str(pathlib.Path(arguments.data).expanduser().resolve()),
                "table": {name: list(getattr(table, name)) for name in _TABLE},
                "digest": table.digest,
                **stored,
            },
            "validation_split": arguments.validation_split,
        },
        **{"steps_per_epoch": len(table.indices["train"]) // batch_size} | arguments.options,
    )


def _train_on_images(out: str, arguments: argparse.Namespace) -> None:
    if given := [f"--{name}" for name in _TABLE if name in arguments]:
        raise ValueError(f"train: got {', '.join(given)} for {arguments.data}, which are for tables")
    options: dict[str, Any] = {"image_size": arguments.image_size, "grey_levels": arguments.grey_levels}
    if arguments.background != "white":
        options["background"] = arguments.background
    info = data.info(arguments.data, data_dir=arguments.data_dir, **options)
    stored = options | {"batch_size": arguments.data_options.pop("batch_size")}
    if arguments.conditional:
        if not info.label_names:
            raise ValueError(f"train: got --conditional {arguments.conditional}, but {arguments.data} has no labels")
        stored["label_names"] = list(info.label_names)
        arguments.set = {"condition_shape": [len(info.label_names)]} | arguments.set
    seed = arguments.options.get("seed", 0)
    held_out: dict[str, Any] = {}
    if arguments.validation_split:
        held_out = {"validation_split": arguments.validation_split, "validation_seed": seed}
    kept = held_out | ({"subset": "training"} if held_out else {})

    def load(split: str, **more: Any) -> tf.data.Dataset:
        return _loaded(arguments.data, split, data_dir=arguments.data_dir, **stored, **more)

    training.train(
        arguments.recipe,
        out,
        load("train", seed=seed, repeat=True, **kept, **arguments.data_options),
        load(arguments.test_split),
        load("train", subset="validation", **held_out) if held_out else None,
        event_shape=info.event_shape,
        grey_levels=info.grey_levels,
        arguments=arguments.set,
        resume=arguments.resume,
        notes={
            "data": {"name": info.name, "test_split": arguments.test_split, **stored},
            "validation_split": arguments.validation_split,
            **arguments.data_options,
        },
        **{"steps_per_epoch": len(load("train", **kept))} | arguments.options,
    )


_TABLE = ("columns", "condition", "integer")


def _loaded(name: str, split: str, *, label_names: Sequence[str] = (), **options: Any) -> tf.data.Dataset:
    """Batches of images; with the names of labels, of images and conditions that say which label each has."""
    if not label_names:
        return data.load(name, split, **options)
    pairs = data.load(name, split, labels=True, **options)
    return pairs.map(lambda images, label: {"x": images, "condition": tf.one_hot(label, len(label_names))})


def report(directory: str, recipe: str) -> None:
    """Prints the test metrics of a run, of its conventional factorization and of what was trained beside, and its files."""
    titles = {}
    for place, name in [(".", recipe), *((name, name) for name in training.read_config(directory).get("beside", []))]:
        titles[place] = name
        titles[str(pathlib.Path(place, "conventional"))] = f"{recipes.base_of(name)}, conventional factorization"
    of_parts = training.read_metrics(directory)
    metrics = {title: of_parts[part] for part, title in titles.items() if part in of_parts}
    metric, unit = ("bits_per_dim", "bits/dim") if all("bits_per_dim" in m for m in metrics.values()) else ("nll", "nats")
    print(f"\n{f'test {unit}':>13}   parameters   model")
    for title, values in metrics.items():
        print(f"{values[metric]:13.4f}   {values['parameters']:10,d}   {title}")
    print(f"\n{directory}: " + ", ".join(sorted(p.name for p in pathlib.Path(directory).iterdir())))


def _run_data(
    arguments: argparse.Namespace,
    split: str | None = None,
    batch_size: int | None = None,
    name: str | None = None,
    **more: Any,
) -> tf.data.Dataset:
    config = training.read_config(arguments.run)
    if "data" not in config:
        raise ValueError(
            f"{arguments.command}: {arguments.run} does not say on what data it was trained, needs a run of `dimflows train`"
        )
    if "table" in config["data"]:
        return _table_data(arguments, config["data"], split, batch_size, name)[0]
    if name is not None and is_table(name):
        raise ValueError(f"{arguments.command}: got the table {name}, but {arguments.run} is of images")
    options = dict(config["data"])
    trained_name, test_split, trained_batch = options.pop("name"), options.pop("test_split"), options.pop("batch_size")
    if name not in (None, trained_name):
        names = options.get("label_names", [])
        options = {"image_size": tuple(config["event_shape"][:2]), "grey_levels": config["grey_levels"]}
        if names:
            others = list(data.info(name, data_dir=arguments.data_dir).label_names)
            if others != names:
                raise ValueError(
                    f"{arguments.command}: {arguments.run} needs images of the labels {', '.join(names)}, {name} has "
                    f"{', '.join(others) or 'none'}"
                )
            options["label_names"] = names
    return _loaded(
        name or trained_name,
        split or test_split,
        batch_size=batch_size or trained_batch,
        shuffle=False,
        drop_remainder=False,
        data_dir=arguments.data_dir,
        **options,
        **more,
    )


def _table_data(
    arguments: argparse.Namespace, stored: dict[str, Any], split: str | None, batch_size: int | None, name: str | None
) -> tuple[tf.data.Dataset, Iterable[int]]:
    """Rows of a part of a run's table, or all rows of it or of another one, and their numbers."""
    columns = stored["table"]
    of_run = name is None or pathlib.Path(name).expanduser().resolve() == pathlib.Path(stored["name"])
    if split not in (None, "test", "validation", "all") or (split in ("test", "validation") and not of_run):
        needs = "test, validation or all" if of_run else "all"
        raise ValueError(f"{arguments.command}: got --split {split}, needs {needs}, of a table")
    batch_size = batch_size or stored["batch_size"]
    if split == "all" or not of_run:
        return data.rows(name or stored["name"], **columns, batch_size=batch_size, seed=stored["seed"]), itertools.count()
    options = {option: stored[option] for option in ("validation_split", "batch_size", "seed")}
    table, part = data.table(stored["name"], **columns, **options), split or "test"
    if table.digest != stored["digest"]:
        raise ValueError(
            f"{arguments.command}: {stored['name']} has changed since {arguments.run} was trained, so that its {part} rows are "
            "not known any more; needs --split all"
        )
    if getattr(table, part) is None:
        raise ValueError(f"{arguments.command}: {arguments.run} has no rows for validation")
    return getattr(table, part).unbatch().batch(batch_size), table.indices[part].tolist()


def _evaluate(arguments: argparse.Namespace) -> None:
    model = training.load_run(arguments.run)
    images = _run_data(arguments, arguments.split, arguments.batch_size)
    scores = model.score(images, num_samples=_num_samples(arguments, model), seed=arguments.seed)
    means = {name: float(np.mean(column, dtype=np.float64)) for name, column in scores.items()}
    results = {"nll": -means.pop("log_prob"), **means}
    print(json.dumps({**results, "num_events": len(scores["log_prob"]), "num_samples": arguments.num_samples}))


def _score(arguments: argparse.Namespace) -> None:
    """Writes a table of the log-probability of every image or row, of a folder with the names of its files (without labels)."""
    config, model = training.read_config(arguments.run), training.load_run(arguments.run)
    stored = config.get("data", {})
    name = arguments.data or stored.get("name")
    split = arguments.split or ("all" if arguments.data else None)
    is_folder = not {"table", "label_names"} & stored.keys() and name is not None and as_folder(name) is not None
    names: Iterable = itertools.count()
    if "table" in stored:
        events, names = _table_data(arguments, stored, split, arguments.batch_size, name)
    else:
        events = _run_data(arguments, split, arguments.batch_size, name, files=is_folder)
    scores = model.score(events, num_samples=_num_samples(arguments, model), seed=arguments.seed)
    if is_folder:
        names = [file.decode() for file in scores.pop("y")]
    _write_csv(arguments.out, {"file" if is_folder else "index": names, **scores})


def _write_csv(path: str, columns: dict[str, Any]) -> None:
    """Writes columns, as long as the shortest of them."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() if hasattr(column, "tolist") else column for column in columns.values())))
    print(path)


def _num_samples(arguments: argparse.Namespace, model: training.FlowModel) -> int | None:
    """Importance samples; the default one is for bounds only."""
    return arguments.num_samples if arguments.num_samples > 1 or variational.is_bound(model.distribution) else None


def _picture(arguments: argparse.Namespace) -> None:
    """Writes a grid of images, which each command makes in its own way."""
    config = training.read_config(arguments.run)
    if arguments.command == "sample" and "table" in config.get("data", {}):
        return _sample_table(arguments, config)
    images = {"sample": _samples, "interpolate": _walks, "upscale": _upscaled}[arguments.command]
    _check_images(arguments, config)
    plot.save_grid(arguments.out, images(arguments, training.load_run(arguments.run), config), config["grey_levels"])
    print(arguments.out)


def _check_images(arguments: argparse.Namespace, config: dict) -> None:
    if len(config["event_shape"]) != 3:
        raise ValueError(
            f"{arguments.command}: {arguments.run} has events of shape {config['event_shape']}, needs images [H, W, C]"
        )


def _sample_table(arguments: argparse.Namespace, config: dict) -> None:
    """Writes samples as a table, beside the condition that they are given."""
    columns, names = config["data"]["table"], config["data"]["table"]["condition"]
    if set(arguments.given) != set(names) or not all(isinstance(value, (int, float)) for value in arguments.given.values()):
        needs = f"--given with a number for each of {', '.join(names)}" if names else "no --given"
        raise ValueError(f"sample: got --given {arguments.given}, {arguments.run} needs {needs}")
    if arguments.name != "samples" or arguments.label is not None:
        raise ValueError(
            f"sample: got --kind {arguments.name} or --label, which are for images, and {arguments.run} is of a table"
        )
    model = training.load_run(arguments.run)
    condition = np.array([arguments.given[name] for name in names], np.float32) if names else None
    samples = model.sample(arguments.num, seed=arguments.seed, condition=condition, temperature=arguments.temperature)
    given = {name: [arguments.given[name]] * arguments.num for name in names}
    _write_csv(arguments.out, to_columns(samples, columns["columns"], columns["integer"]) | given)


def _samples(arguments: argparse.Namespace, model: training.FlowModel, config: dict) -> tf.Tensor | np.ndarray:
    prior = structure_of(model.distribution).noise
    if arguments.name != "samples" and not isinstance(prior, VAEPrior):
        raise ValueError(
            f"sample: {arguments.run} is a run of {config['recipe']}, {arguments.name} need a VAE (flow-vae, vae-flow)"
        )
    if arguments.name == "walks" and arguments.temperature != 1.0:
        raise ValueError("sample: got a temperature, but walks have no noise; it is for samples and means")
    if arguments.name == "walks":
        return _walks(arguments, model, config)
    if arguments.given:
        raise ValueError(f"sample: got --given, which is for tables, and {arguments.run} is of images")
    label_names = config.get("data", {}).get("label_names", [])
    if arguments.label is not None and arguments.label not in label_names:
        known = f"needs one of {', '.join(label_names)}" if label_names else f"but {arguments.run} was trained without labels"
        raise ValueError(f"sample: got --label {arguments.label}, {known}")
    if label_names:
        labels = (
            np.arange(arguments.num) if arguments.label is None else np.full(arguments.num, label_names.index(arguments.label))
        )
        condition = tf.one_hot(labels % len(label_names), len(label_names))
        return model.sample(seed=arguments.seed, condition=condition, temperature=arguments.temperature)
    if arguments.name == "means":
        noise = tf.random.stateless_normal([arguments.num, prior.latent_dims], [0, arguments.seed])
        return model.decode(arguments.temperature * noise)
    return model.sample(arguments.num, seed=arguments.seed, temperature=arguments.temperature)


def _walks(arguments: argparse.Namespace, model: training.FlowModel, config: dict) -> np.ndarray:
    """Walks between pairs of test images, one per row."""
    images = _some_images(arguments, 2 * arguments.num)
    pairs = len(images) // 2
    return model.interpolate(images[:pairs], images[pairs : 2 * pairs], arguments.steps).numpy().swapaxes(0, 1)


def _upscaled(arguments: argparse.Namespace, model: training.FlowModel, config: dict) -> np.ndarray:
    """Low resolution, each stage, original, one image per row."""
    flow = model.bijector
    if not isinstance(flow, PNF):
        raise ValueError(f"upscale: {arguments.run} is a run of {config['recipe']}, needs one of a progressive flow (pnf)")
    images = _some_images(arguments, arguments.num, arguments.data)
    if images.shape[1:] != model.event_shape:
        raise ValueError(f"upscale: got images of shape {images.shape[1:]}, {arguments.run} needs {model.event_shape}")
    low_resolution = flow.encode(model.distribution.dequantize(images, seed=[0, arguments.seed]))
    upscaled = flow.upscale(low_resolution, arguments.temperature, seed=[1, arguments.seed])
    columns = [flow.encode(upscaled, stage) for stage in range(len(flow.stages))] + [images]
    return np.floor(np.stack([_enlarged(c, model.event_shape) for c in columns], axis=1))


def _codes(arguments: argparse.Namespace) -> None:
    """Draws codes of every size beside principal components, and prints a table of them."""
    _check_images(arguments, training.read_config(arguments.run))
    model = training.load_run(arguments.run)
    images = _some_images(arguments, 2000).numpy()
    training_images = np.concatenate(list(_run_data(arguments, "train").as_numpy_iterator()))
    comparison = compare_with_pca(model, images, training_images, arguments.num_images)
    structure = structure_of(model.distribution)
    bits = np.full(len(comparison.sizes), np.nan)
    if structure.ordering is not None and structure.augmented is None:
        bits, _ = bits_of_parts(model, images, arguments.seed)
    plot.save_codes(arguments.out, comparison)
    print(f"\nnumbers   PSNR of the model   PSNR of PCA   bits/dim of the part   ({len(images)} test images)")
    for size, of_model, of_pca, of_part in zip(comparison.sizes, comparison.psnr, comparison.pca_psnr, bits):
        print(f"{size:7,d}{of_model:20.2f}{of_pca:14.2f}{of_part:23.4f}")
    print(f"\n{arguments.out}")


def _some_images(arguments: argparse.Namespace, num: int, name: str | None = None) -> tf.Tensor:
    """Images of the test split, chosen by the seed."""
    batches = _run_data(arguments, name=name)
    if isinstance(batches.element_spec, dict):
        raise ValueError(f"{arguments.command}: {arguments.run} is a flow of images given labels, needs one without")
    return next(iter(batches.unbatch().shuffle(10_000, seed=arguments.seed).batch(num)))


def _enlarged(images: tf.Tensor, event_shape: tf.TensorShape) -> np.ndarray:
    """Each pixel repeated to the size of an event."""
    height, width = (full // small for full, small in zip(event_shape[:2], images.shape[1:3]))
    return np.repeat(np.repeat(images, height, axis=1), width, axis=2)


def _recipes(arguments: argparse.Namespace) -> None:
    for name in recipes.names():
        recipe = recipes.get(name)
        print(f"{name}: {str(recipe.__doc__).strip().splitlines()[0]}")
        for parameter in inspect.signature(recipe).parameters.values():
            if parameter.name not in ("event_shape", "grey_levels"):
                print(f"    {parameter.name}={parameter.default!r}")
