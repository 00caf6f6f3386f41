"""The `dimflows` command: what is typed, checked before TensorFlow is imported. `commands` does the work."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tfp_dimflows.dataset_names import check_dataset
from tfp_dimflows.messages import Failure, check_name, did_you_mean
from tfp_dimflows.presets import PRESETS, Preset
from tfp_dimflows.run_config import RunConfig, stored_config
from tfp_dimflows.version import __version__

# `recipes.names()`, which needs TensorFlow.
RECIPES = (
    "ffjord",
    "flow-vae",
    "flowpp",
    "glow",
    "iaf",
    "iresnet",
    "lcma-glow",
    "lcma-iresnet",
    "lcma-realnvp",
    "lcma-residual-flow",
    "maf",
    "nice",
    "nsf",
    "pixelcnn-flow",
    "pnf",
    "principal-pnf",
    "realnvp",
    "residual-flow",
    "vae-flow",
    "vflow",
    "vflow-glow",
    "wavenet-flow",
)

# The names of all recipes' arguments, the old ones too.
ARGUMENTS = tuple(
    """
    activation adaptive_range alpha attention attribution autoregressive batch_norm bound bounds code_dims coeff
    condition_shape config context_blocks contributions coupling depth dropout end_time event_shape
    factorization features flow granularity grey_levels hidden keep kernel_size l2 latent_dims layout levels
    likelihood memory mixing network noise_attention noise_blocks noise_couplings noise_depth num_bins
    num_blocks num_components num_couplings num_dense_blocks num_exact num_extra num_flows num_halvings
    num_heads num_hidden num_layers num_levels num_scales num_steps num_terms pointwise posterior
    posterior_blocks posterior_couplings posterior_depth rotation roulette seed smooth trace trainable
    transformer vae_width whole width
    """.split()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 2 if work cannot begin, 1 if it fails, 130 if it is interrupted."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(given)
    try:
        _check(arguments)
        from tfp_dimflows import commands  # imports TensorFlow, which takes seconds

        commands.run(arguments)
    except KeyboardInterrupt:
        again = ["dimflows", *(word for word in given if word != "--resume"), "--resume"]
        return _end(130, "interrupted" + (f"; to go on: {shlex.join(again)}" if arguments.command == "train" else ""))
    except (Failure, MemoryError) as error:
        return _end(1, f"error: {error}")
    except (ValueError, OSError, ImportError) as error:
        return _end(2, f"error: {error}")
    return 0


def _end(status: int, message: str) -> int:
    print(f"dimflows: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dimflows", description="Train and use normalizing flows.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")

    command = commands.add_parser("train", help="train a recipe on a TFDS dataset into a run directory")
    command.add_argument("recipe", metavar="RECIPE", help="a name that `dimflows recipes` lists")
    command.add_argument(
        "--data",
        required=True,
        metavar="NAME",
        help="digits, photo_patches, a TFDS dataset, a folder such as ./photos, or a CSV, Parquet or npz file of numbers",
    )
    for name, of_what in (
        ("columns", "an event; default: all but those of the condition"),
        ("condition", "the condition"),
        ("integer", "an event that hold integers"),
    ):
        command.add_argument(
            f"--{name}", type=_names, default=argparse.SUPPRESS, metavar="A,B", help=f"of a table: columns of {of_what}"
        )
    command.add_argument("--out", required=True, metavar="DIR", help="the run directory")
    command.add_argument("--preset", choices=PRESETS, help="the options with which a published flow was trained on CIFAR-10")
    command.add_argument("--batch-size", type=_positive_integer, default=argparse.SUPPRESS)
    for field in _options():
        _add_option(command, field)
    command.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the recipe")
    command.add_argument("--image-size", type=_positive_integer, help="resize images to this height and width")
    command.add_argument(
        "--grey-levels", "--levels", type=_positive_integer, help="number of grey levels; default: the dataset's"
    )
    command.add_argument("--background", default="white", metavar="COLOUR", help="behind transparent images of a folder")
    command.add_argument(
        "--flips", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help="random horizontal flips in training"
    )
    command.add_argument(
        "--shifts", type=_nonnegative_integer, default=argparse.SUPPRESS, help="pixels of random shifts in training"
    )
    command.add_argument(
        "--conditional", choices=["label"], help="train a flow of images given their labels; the recipe takes a condition_shape"
    )
    command.add_argument("--test-split", default="test", help="split of the test metrics, read once, at the end")
    command.add_argument(
        "--validation-split",
        type=_share,
        default=0.1,
        help="share of the training images (or of a table's rows), chosen by --seed, by which the best epoch is chosen; 0: the "
        "last epoch is kept",
    )
    command.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    command.add_argument(
        "--strategy",
        choices=["mirrored", "multiworker"],
        help="train on all GPUs of this machine, or on all machines of TF_CONFIG; --batch-size is that of all together",
    )
    _add_data_dir(command)

    command = commands.add_parser("evaluate", help="bits per dimension, of a table nats, of a run's model")
    command.add_argument("run", metavar="RUN")
    command.add_argument("--split", help="default: the run's test split; of a table test, validation or all")
    command.add_argument("--num-samples", type=_positive_integer, default=1, help="importance samples of the noise")
    command.add_argument("--batch-size", type=_positive_integer)
    command.add_argument("--seed", type=int, default=0)
    _add_data_dir(command)

    command = commands.add_parser("score", help="log-probability of each image or row, such as to find the unlikely")
    command.set_defaults(name="scores")
    command.add_argument("run", metavar="RUN")
    command.add_argument("--data", metavar="NAME", help="a dataset, folder or table; default: the run's")
    command.add_argument("--split", help="default: the run's test split; of other data everything")
    command.add_argument("--num-samples", type=_positive_integer, default=1, help="importance samples of the noise")
    command.add_argument("--batch-size", type=_positive_integer)
    command.add_argument("--seed", type=int, default=0, help="of the noise")
    _add_output(command, "scores", "csv")
    _add_data_dir(command)

    command = commands.add_parser("sample", help="a PNG grid of samples, of a table a CSV file")
    command.set_defaults(steps=8)
    command.add_argument("run", metavar="RUN")
    command.add_argument("--num", type=_positive_integer, default=64)
    command.add_argument(
        "--temperature", type=_nonnegative_number, default=1.0, help="scale of the noise; below 1: more typical samples"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--given", nargs="+", default=[], metavar="COLUMN=VALUE", help="of a table: the condition")
    command.add_argument("--label", metavar="NAME", help="of a flow given labels: that of all samples; default: all in turn")
    command.add_argument(
        "--kind",
        dest="name",
        choices=["samples", "means", "walks"],
        default="samples",
        help="flow-vae: means of the decoder, or walks between encoded test images, instead of samples",
    )
    _add_output(command, "KIND")
    _add_data_dir(command)

    command = commands.add_parser("interpolate", help="a PNG grid of walks between pairs of images in latent space")
    command.set_defaults(name="interpolation")
    command.add_argument("run", metavar="RUN")
    command.add_argument("--num", type=_positive_integer, default=8, help="number of pairs")
    command.add_argument("--steps", type=_positive_integer, default=8)
    command.add_argument("--seed", type=int, default=0, help="chooses the pairs from the test split")
    _add_output(command, "interpolation")
    _add_data_dir(command)

    command = commands.add_parser("upscale", help="a PNG grid: low resolution, each stage of a progressive flow, original")
    command.set_defaults(name="upscale")
    command.add_argument("run", metavar="RUN", help="a run of the recipe pnf")
    command.add_argument("--data", metavar="NAME", help="where the images come from; default: the run's dataset")
    command.add_argument("--num", type=_positive_integer, default=8, help="number of images")
    command.add_argument(
        "--temperature", type=_nonnegative_number, default=1.0, help="standard deviation of the latent details"
    )
    command.add_argument("--seed", type=int, default=0, help="chooses images from the test split, and the details")
    _add_output(command, "upscale")
    _add_data_dir(command)

    command = commands.add_parser("codes", help="what the first latent values tell of images, beside principal components")
    command.set_defaults(name="codes")
    command.add_argument("run", metavar="RUN", help="a run of a multi-scale or progressive flow, or of a VAE")
    command.add_argument("--num-images", type=_positive_integer, default=8, help="number of images in the picture")
    command.add_argument("--seed", type=int, default=0, help="chooses up to 2000 images from the test split")
    _add_output(command, "codes")
    _add_data_dir(command)

    commands.add_parser("recipes", help="the recipes and their arguments")
    return parser


def _options() -> list[dataclasses.Field]:
    """The fields of a run's configuration that are options of the command line."""
    return [field for field in dataclasses.fields(RunConfig) if "help" in field.metadata]


def _add_option(command: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    options = dict(field.metadata)
    least = options.pop("least", 1)
    if "float" in str(field.type):
        options["type"] = _positive_number if least else _nonnegative_number
    elif not {"action", "type"} & options.keys():
        options["type"] = _positive_integer if least else _nonnegative_integer
    is_required = field.default is field.default_factory is dataclasses.MISSING
    command.add_argument("--" + field.name.replace("_", "-"), required=is_required, default=argparse.SUPPRESS, **options)


def _add_output(command: argparse.ArgumentParser, name: str, suffix: str = "png") -> None:
    command.set_defaults(suffix=suffix)
    command.add_argument(
        "--out", metavar=suffix.upper(), help=f"default: RUN/{name}-SEED.{suffix}, or one with a further number if that exists"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def _add_data_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data-dir", help="where TFDS datasets are; default: TFDS_DATA_DIR, else TFDS's own")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _type(kind: Callable[[str], Any], is_valid: Callable[[Any], bool], needs: str) -> Callable[[str], Any]:
    """The `type` of an argument, with a message of what it needs."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if is_valid(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"got {text!r}, needs {needs}")

    return parse


_positive_integer = _type(int, lambda value: value > 0, "a positive integer")
_nonnegative_integer = _type(int, lambda value: value >= 0, "a nonnegative integer")
_positive_number = _type(float, lambda value: 0.0 < value < math.inf, "a positive number")
_share = _type(float, lambda value: 0.0 <= value < 1.0, "a number from 0 to below 1")
_nonnegative_number = _type(float, lambda value: 0.0 <= value < math.inf, "a nonnegative number")


def _check(arguments: argparse.Namespace) -> None:
    """Raises an error for what can be known to be wrong without TensorFlow, and reads what needs more than `argparse`."""
    if arguments.command == "train":
        arguments.options, arguments.data_options = _training_options(vars(arguments))
        recipes = sys.modules.get("tfp_dimflows.recipes")  # if it is there, it knows recipes of a user's own too
        for name in (arguments.recipe, *arguments.options.get("beside", ())):
            check_name("recipes", name, recipes.names() if recipes else RECIPES)
        check_dataset(arguments.data, arguments.data_dir)
        arguments.set = _settings(arguments.set, "--set")
        if not recipes and (unknown := [key for key in arguments.set if key not in ARGUMENTS]):
            raise ValueError(
                f"{arguments.recipe}: got the argument {unknown[0]!r}{did_you_mean(unknown[0], ARGUMENTS)}; `dimflows recipes` "
                "lists those of each recipe"
            )
    elif "run" in arguments:
        config = stored_config(arguments.run)
        if "out" in arguments:
            if arguments.command == "sample" and "table" in config.get("data", {}):
                arguments.suffix = "csv"
            arguments.out = _output_path(arguments)
        if getattr(arguments, "data", None):
            check_dataset(arguments.data, arguments.data_dir)
        if "given" in arguments:
            arguments.given = _settings(arguments.given, "--given")


def _training_options(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of training and those of its data: what was given, before what the preset has."""
    preset = PRESETS[given["preset"]] if given["preset"] else Preset(training={}, data={}, source="")
    training = preset.training | {field.name: given[field.name] for field in _options() if field.name in given}
    if isinstance(pairs := training.get("optimizer_arguments"), list):
        training["optimizer_arguments"] = _settings(pairs, "--optimizer-arguments")
    if "beside" in training:
        training["beside"] = _beside(training["beside"])
    data = {"batch_size": 64, "flips": False, "shifts": 0} | preset.data
    return training, data | {name: given[name] for name in data if name in given}


def _beside(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Recipes and the arguments after each."""
    beside: dict[str, dict[str, Any]] = {}
    for word in words:
        if "=" not in word and word not in beside:
            beside[word] = {}
        elif beside and "=" in word:
            beside[list(beside)[-1]] |= _settings([word], "--beside")
        else:
            raise ValueError(f"--beside: got {word!r}, needs each recipe once, before its arguments")
    return beside


def _settings(pairs: Sequence[str], option: str) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not (key and separator):
            raise ValueError(f"{option}: got {pair!r}, needs KEY=VALUE")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def _output_path(arguments: argparse.Namespace) -> pathlib.Path:
    """Where a picture or table goes: to a file that does not exist yet, unless it may be replaced."""
    path = pathlib.Path(arguments.out or pathlib.Path(arguments.run) / f"{arguments.name}-{arguments.seed}.{arguments.suffix}")
    if not path.parent.is_dir():
        raise ValueError(f"{arguments.command}: there is no directory {path.parent}")
    if arguments.overwrite or not path.exists():
        return path
    if arguments.out:
        raise ValueError(f"{arguments.command}: {path} already exists; name another file with --out, or give --overwrite")
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(other for other in numbered if not other.exists())
