"""The `dimflows` command."""

import argparse
import dataclasses
import inspect
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfp_dimflows import data, plot, recipes, training
from tfp_dimflows.bijectors import PNF
from tfp_dimflows.distributions import VAEPrior, structure_of


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"dimflows: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dimflows", description="Train and use normalizing flows.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train a recipe on a TFDS dataset into a run directory")
    command.set_defaults(command=_train)
    command.add_argument("recipe", metavar="RECIPE", help="a name that `dimflows recipes` lists")
    command.add_argument(
        "--data",
        required=True,
        metavar="NAME",
        help="digits, photo_patches, a TFDS dataset, or a folder such as ./photos",
    )
    command.add_argument("--batch-size", type=_positive, default=64)
    command.add_argument("--out", required=True, metavar="DIR", help="the run directory")
    for field in _options():
        kind = {} if "action" in field.metadata else {"type": _positive}
        needs = {"required": True} if field.default is dataclasses.MISSING else {"default": field.default}
        command.add_argument("--" + field.name.replace("_", "-"), **kind | needs | dict(field.metadata))
    command.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the recipe")
    command.add_argument("--image-size", type=_positive, help="resize images to this height and width")
    command.add_argument("--grey-levels", "--levels", type=_positive, help="number of grey levels; default: the dataset's")
    command.add_argument("--background", default="white", metavar="COLOUR", help="behind transparent images of a folder")
    command.add_argument("--flips", action="store_true", help="random horizontal flips in training")
    command.add_argument("--test-split", default="test", help="split of the test metrics")
    command.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    command.add_argument(
        "--strategy",
        choices=["mirrored", "multiworker"],
        help="train on all GPUs of this machine, or on all machines of TF_CONFIG; --batch-size is that of all together",
    )
    _add_data_dir(command)

    command = commands.add_parser("evaluate", help="bits per dimension of a run's model")
    command.set_defaults(command=_evaluate)
    command.add_argument("run", metavar="RUN")
    command.add_argument("--split", help="default: the run's test split")
    command.add_argument("--num-samples", type=_positive, default=1, help="importance samples of the noise")
    command.add_argument("--batch-size", type=_positive)
    command.add_argument("--seed", type=int, default=0)
    _add_data_dir(command)

    command = commands.add_parser("sample", help="a PNG grid of samples")
    command.set_defaults(command=_picture, images=_samples, steps=8)
    command.add_argument("run", metavar="RUN")
    command.add_argument("--num", type=_positive, default=64)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", metavar="PNG", help="default: RUN/KIND-SEED.png")
    command.add_argument(
        "--kind",
        dest="name",
        choices=["samples", "means", "walks"],
        default="samples",
        help="flow-vae: means of the decoder, or walks between encoded test images, instead of samples",
    )
    _add_data_dir(command)

    command = commands.add_parser("interpolate", help="a PNG grid of walks between pairs of images in latent space")
    command.set_defaults(command=_picture, images=_walks, name="interpolation")
    command.add_argument("run", metavar="RUN")
    command.add_argument("--num", type=_positive, default=8, help="number of pairs")
    command.add_argument("--steps", type=_positive, default=8)
    command.add_argument("--seed", type=int, default=0, help="chooses the pairs from the test split")
    command.add_argument("--out", metavar="PNG", help="default: RUN/interpolation-SEED.png")
    _add_data_dir(command)

    command = commands.add_parser("upscale", help="a PNG grid: low resolution, each stage of a progressive flow, original")
    command.set_defaults(command=_picture, images=_upscaled, name="upscale")
    command.add_argument("run", metavar="RUN", help="a run of the recipe pnf")
    command.add_argument("--data", metavar="NAME", help="where the images come from; default: the run's dataset")
    command.add_argument("--num", type=_positive, default=8, help="number of images")
    command.add_argument("--temperature", type=float, default=1.0, help="standard deviation of the latent details")
    command.add_argument("--seed", type=int, default=0, help="chooses images from the test split, and the details")
    command.add_argument("--out", metavar="PNG", help="default: RUN/upscale-SEED.png")
    _add_data_dir(command)

    command = commands.add_parser("recipes", help="the recipes and their arguments")
    command.set_defaults(command=_recipes)
    return parser


def _options() -> list[dataclasses.Field]:
    """The fields of a run's configuration that are options of the command line."""
    return [field for field in dataclasses.fields(training.RunConfig) if "help" in field.metadata]


def _add_data_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data-dir", help="where TFDS datasets are; default: TFDS_DATA_DIR, else TFDS's own")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _train(arguments: argparse.Namespace) -> None:
    strategy, out = _strategy(arguments)
    with strategy.scope():
        _train_into(out, arguments)
    _report(out, arguments.recipe)


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
    options = {"image_size": arguments.image_size, "grey_levels": arguments.grey_levels}
    if arguments.background != "white":
        options["background"] = arguments.background
    info = data.info(arguments.data, data_dir=arguments.data_dir, **options)
    batch_size = arguments.batch_size
    train_data = data.load(
        arguments.data,
        "train",
        batch_size=batch_size,
        flips=arguments.flips,
        seed=arguments.seed,
        repeat=True,
        data_dir=arguments.data_dir,
        **options,
    )
    test_data = data.load(arguments.data, arguments.test_split, batch_size=batch_size, data_dir=arguments.data_dir, **options)
    num_images = info.splits["train"]
    if batch_size > num_images:
        raise ValueError(f"train: {arguments.data} has {num_images} training images, less than one batch of {batch_size}")
    steps = arguments.steps_per_epoch or num_images // batch_size
    training.train(
        arguments.recipe,
        out,
        train_data,
        test_data,
        event_shape=info.event_shape,
        grey_levels=info.grey_levels,
        arguments=_settings(arguments.set),
        resume=arguments.resume,
        notes={
            "data": {"name": info.name, "test_split": arguments.test_split, "batch_size": batch_size, **options},
            "flips": arguments.flips,
        },
        **{field.name: getattr(arguments, field.name) for field in _options()} | {"steps_per_epoch": steps},
    )


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"--set: got {pair!r}, needs KEY=VALUE")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def _report(directory: str, recipe: str) -> None:
    titles = {".": recipe, "conventional": f"{recipes.base_of(recipe)}, conventional factorization"}
    print("\ntest bits/dim   parameters   model")
    for part, metrics in training.read_metrics(directory).items():
        if part in titles:
            print(f"{metrics['bits_per_dim']:13.4f}   {metrics['parameters']:10,d}   {titles[part]}")
    print(f"\n{directory}: " + ", ".join(sorted(p.name for p in pathlib.Path(directory).iterdir())))


def _run_data(
    arguments: argparse.Namespace, split: str | None = None, batch_size: int | None = None, name: str | None = None
) -> tf.data.Dataset:
    config = training.read_config(arguments.run)
    options = dict(config["data"])
    trained_name, test_split, trained_batch = options.pop("name"), options.pop("test_split"), options.pop("batch_size")
    if name not in (None, trained_name):
        options = {"image_size": tuple(config["event_shape"][:2]), "grey_levels": config["grey_levels"]}
    return data.load(
        name or trained_name,
        split or test_split,
        batch_size=batch_size or trained_batch,
        shuffle=False,
        drop_remainder=False,
        data_dir=arguments.data_dir,
        **options,
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    model = training.load_run(arguments.run)
    total, count = 0.0, 0
    for step, batch in enumerate(_run_data(arguments, arguments.split, arguments.batch_size)):
        log_prob = model.log_prob(batch, num_samples=arguments.num_samples, seed=arguments.seed + step)
        total += float(tf.reduce_sum(tf.cast(log_prob, tf.float64)))
        count += int(batch.shape[0])
    nll = -total / count
    bits = nll / (model.event_shape.num_elements() * math.log(2.0))
    print(json.dumps({"nll": nll, "bits_per_dim": bits, "num_events": count, "num_samples": arguments.num_samples}))


def _picture(arguments: argparse.Namespace) -> None:
    """Writes a grid of what `arguments.images` returns."""
    config = training.read_config(arguments.run)
    path = pathlib.Path(arguments.out or pathlib.Path(arguments.run) / f"{arguments.name}-{arguments.seed}.png")
    if path.exists():
        raise ValueError(f"{path} already exists; name another file with --out")
    plot.save_grid(path, arguments.images(arguments, training.load_run(arguments.run), config), config["grey_levels"])
    print(path)


def _samples(arguments: argparse.Namespace, model: training.FlowModel, config: dict) -> tf.Tensor | np.ndarray:
    prior = structure_of(model.distribution).noise
    if arguments.name != "samples" and not isinstance(prior, VAEPrior):
        raise ValueError(
            f"sample: {arguments.run} is a run of {config['recipe']}, {arguments.name} need a VAE (flow-vae, vae-flow)"
        )
    if arguments.name == "walks":
        return _walks(arguments, model, config)
    if arguments.name == "means":
        return model.decode(tf.random.stateless_normal([arguments.num, prior.latent_dims], [0, arguments.seed]))
    return model.sample(arguments.num, seed=arguments.seed)


def _walks(arguments: argparse.Namespace, model: training.FlowModel, config: dict) -> np.ndarray:
    """Walks between pairs of test images, one per row."""
    images = _some_images(_run_data(arguments), 2 * arguments.num, arguments.seed)
    pairs = len(images) // 2
    return model.interpolate(images[:pairs], images[pairs : 2 * pairs], arguments.steps).numpy().swapaxes(0, 1)


def _upscaled(arguments: argparse.Namespace, model: training.FlowModel, config: dict) -> np.ndarray:
    """Low resolution, each stage, original, one image per row."""
    flow = model.bijector
    if not isinstance(flow, PNF):
        raise ValueError(f"upscale: {arguments.run} is a run of {config['recipe']}, needs one of a progressive flow (pnf)")
    images = _some_images(_run_data(arguments, name=arguments.data), arguments.num, arguments.seed)
    if images.shape[1:] != model.event_shape:
        raise ValueError(f"upscale: got images of shape {images.shape[1:]}, {arguments.run} needs {model.event_shape}")
    low_resolution = flow.encode(model.distribution.dequantize(images, seed=[0, arguments.seed]))
    upscaled = flow.upscale(low_resolution, arguments.temperature, seed=[1, arguments.seed])
    columns = [flow.encode(upscaled, stage) for stage in range(len(flow.stages))] + [images]
    return np.floor(np.stack([_enlarged(c, model.event_shape) for c in columns], axis=1))


def _some_images(batches: tf.data.Dataset, num: int, seed: int) -> tf.Tensor:
    return next(iter(batches.unbatch().shuffle(10_000, seed=seed).batch(num)))


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
