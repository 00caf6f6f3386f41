"""`RunConfig`: what a run trains, and how. Needs no TensorFlow before it is made."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import tfp_dimflows as dimflows
from tfp_dimflows.messages import did_you_mean_folder
from tfp_dimflows.version import __version__

if TYPE_CHECKING:
    from tensorflow_probability import distributions as tfd

CONFIG = "config.json"


def stored_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The configuration of a run as it was written, arguments by the names that they had then.

    Raises:
      ValueError: if the directory holds no run.
    """
    path = pathlib.Path(directory) / CONFIG
    if not path.parent.is_dir():
        raise ValueError(f"run: there is no directory {directory}{did_you_mean_folder(directory)}")
    config = None
    if path.is_file():
        with contextlib.suppress(ValueError):
            config = json.loads(path.read_text())
    if not isinstance(config, dict) or "recipe" not in config:
        raise ValueError(f"run: {directory} holds no run (no {CONFIG} of one)")
    return config


def _option(default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A field that is an option of the command line too, with what argparse is told of it, and its `least` value."""
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RunConfig:
    """What a run trains, and how: the options of `train`, most of them options of the command line, and `config.json`.

    Args:
      recipe: a recipe's name.
      event_shape: shape of one image `[H, W, C]` or vector `[D]`.
      grey_levels: number of grey levels of integer data; None for continuous data.
      arguments: further arguments of the recipe.
      epochs: epochs of training.
      steps_per_epoch: optimisation steps per epoch, and at most as many batches of validation after it; None: one pass over the
        data.
      optimizer: name of a Keras optimizer, such as `"adamw"`.
      optimizer_arguments: further arguments of it, such as `{"beta_2": 0.99}`.
      learning_rate: the optimizer's, after warm-up and before decay.
      schedule: `"constant"`, or `"cosine"`: half a period of a cosine down to 0 at the last step of `epochs`.
      warmup_steps: steps in which the learning rate rises linearly from 0.
      ema: momentum of an exponential moving average of the weights, such as 0.999, which is what is evaluated, saved and
        sampled; 0: the weights themselves are.
      clip_norm: the norm to which the gradients of all weights together are clipped; 0: they are not.
      weight_decay: of matrices and kernels, decoupled from the gradients; None: as much as the optimizer has by default.
      gradient_accumulation_steps: batches whose gradients are averaged for an update of the weights. All steps that are counted
        here are batches.
      precision: what networks compute in, a Keras dtype policy: `"float32"`, `"mixed_bfloat16"`, `"mixed_float16"`. Weights and
        log-dets stay float32. None: Keras's present policy.
      steps_per_execution: training steps that one call of TensorFlow does, which divides the steps of an epoch.
      patience: epochs without a better validation after which the training ends; None: it does not end before `epochs`.
      max_minutes: minutes of training after which each of the run's trainings ends, at the end of a step; None: no limit.
      seed: integer seed of initial weights, noise and samples.
      pretrain_epochs: epochs of LCMA's first phase; None: half of `epochs`, rounded up.
      online_steps: LCMA in one phase: a factor-out is decided after every so many steps, by as many batches
        (`DecideFactorization`), a multiple of `gradient_accumulation_steps` and `steps_per_execution`. `contributions.npz` is
        of the trained model.
      baseline: whether an LCMA recipe also trains the conventional factorization.
      beside: other recipes that are trained with the same budget for comparison: names, or a dict of names and arguments.
      notes: further entries of `config.json`, such as the dataset's name.

    Raises:
      TypeError: for a value of another type, such as an optimizer in the place of its name.
      ValueError: if a recipe does not exist or does not take the arguments; for numbers out of their ranges; for `online_steps`
        with `pretrain_epochs`, `max_minutes` or a recipe without LCMA, or no multiple; for LCMA with a condition; for a recipe
        beside itself.

    #### Example

    >>> config = dimflows.training.RunConfig(recipe="nice", event_shape=[4], arguments={"width": 8}, epochs=2)
    >>> config.to_json()["arguments"], config.build().event_shape
    ({'seed': 0, 'width': 8}, TensorShape([4]))
    """

    recipe: str
    event_shape: Sequence[int]
    grey_levels: int | None = None
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    epochs: int = _option(help="number of epochs")
    steps_per_epoch: int | None = _option(None, help="default: the whole training split")
    optimizer: str = _option("adam", help="a Keras optimizer", metavar="NAME", type=str)
    optimizer_arguments: dict[str, Any] = _option(
        help="further arguments of it, such as beta_2=0.99", factory=dict, nargs="+", metavar="KEY=VALUE", type=str
    )
    learning_rate: float = _option(1e-3, help="the optimizer's, after warm-up and before decay")
    schedule: str = _option("constant", help="of the learning rate", choices=["constant", "cosine"], type=str)
    warmup_steps: int = _option(0, help="steps in which the learning rate rises from 0", least=0)
    ema: float = _option(0.0, help="momentum of an average of the weights, such as 0.999, which is what is kept", least=0)
    clip_norm: float = _option(100.0, help="norm to which gradients are clipped; 0: they are not", least=0)
    weight_decay: float | None = _option(None, help="of matrices and kernels; default: the optimizer's", least=0)
    gradient_accumulation_steps: int = _option(1, help="batches whose gradients make an update of the weights")
    precision: str | None = _option(None, help="of networks", choices=["float32", "mixed_bfloat16", "mixed_float16"], type=str)
    steps_per_execution: int = _option(1, help="steps of a call of TensorFlow; divides those of an epoch")
    patience: int | None = _option(None, help="epochs without a better validation that end the training")
    max_minutes: float | None = _option(None, help="minutes that end each training")
    seed: int = _option(0, help="of initial weights, noise and samples", least=0)
    pretrain_epochs: int | None = _option(None, help="lcma recipes: epochs of phase 1; default: half of --epochs")
    online_steps: int | None = _option(
        None, help="lcma recipes: no phase 1; a factor-out is decided after every N steps of the training", metavar="N"
    )
    baseline: bool = _option(
        True, help="lcma recipes: train the conventional one beside", action=argparse.BooleanOptionalAction
    )
    beside: Sequence[str] | Mapping[str, dict[str, Any]] = _option(
        (),
        help="other recipes to train with the same budget, each before its arguments",
        nargs="+",
        metavar="RECIPE [KEY=VALUE ...]",
        type=str,
    )
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        recipes = dimflows.recipes
        event_shape = recipes.common.checked_event_shape(self.event_shape, self.recipe, ranks=())
        arguments = {"seed": self.seed} | recipes.registry.present_names(self.recipe, self.arguments)
        if reserved := {"event_shape", "grey_levels", "contributions"} & set(arguments):
            raise ValueError(
                f"train: got recipe arguments {sorted(reserved)}, which the data and the phases of training decide"
            )
        if self.online_steps is not None and (self.base is None or self.pretrain_epochs is not None):
            raise ValueError(f"train: got online_steps for {self.recipe}, needs an lcma recipe and no pretrain_epochs")
        if self.online_steps is not None and self.max_minutes is not None:
            raise ValueError("train: got online_steps and max_minutes, which may end before all is decided; needs one of them")
        if self.base is not None and arguments.get("condition_shape") is not None:
            raise ValueError(f"train: got condition_shape for {self.recipe}, needs none: contributions take no condition")
        self._check_numbers()
        if len({self.recipe, *self.beside}) <= len(self.beside):
            raise ValueError(f"train: got {', '.join(self.beside)} beside {self.recipe}, needs each recipe once")
        beside = self.beside if isinstance(self.beside, Mapping) else dict.fromkeys(self.beside, {})
        object.__setattr__(self, "beside", {name: dict(own) for name, own in beside.items()})
        object.__setattr__(self, "event_shape", list(event_shape))
        object.__setattr__(self, "arguments", arguments)
        if self.base is not None and self.online_steps is None:
            object.__setattr__(self, "pretrain_epochs", self.pretrain_epochs or (self.epochs + 1) // 2)

    def _check_numbers(self) -> None:
        """Raises unless the options of training have their types and are in their ranges."""
        if not isinstance(self.optimizer, str):
            raise TypeError(f"train: got optimizer={self.optimizer!r}, needs the name of a Keras optimizer")
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata.get("least", 1)
            if "choices" in field.metadata and value not in (field.default, *field.metadata["choices"]):
                raise ValueError(f"train: got {field.name}={value!r}, needs one of {', '.join(field.metadata['choices'])}")
            is_whole, is_number = "float" not in str(field.type), any(kind in str(field.type) for kind in ("int", "float"))
            if not is_number or "help" not in field.metadata or (value is None and "None" in str(field.type)):
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"train: got {field.name}={value!r}, needs {'an integer' if is_whole else 'a number'}")
            if not (0 < value < math.inf or value == least == 0) or (is_whole and int(value) != value):
                kind = "nonnegative" if least == 0 else "positive"
                raise ValueError(f"train: got {field.name}={value!r}, needs a {kind} {'integer' if is_whole else 'number'}")
        if self.ema >= 1.0:
            raise ValueError(f"train: got ema={self.ema!r}, needs a number below 1, such as 0.999")
        if (self.steps_per_epoch or 0) % self.steps_per_execution:
            raise ValueError(
                f"train: got steps_per_execution={self.steps_per_execution} and {self.steps_per_epoch} steps per epoch, "
                "needs a divisor of them"
            )
        for option in ("gradient_accumulation_steps", "steps_per_execution"):
            if (self.online_steps or 0) % getattr(self, option):
                raise ValueError(
                    f"train: got online_steps={self.online_steps} and {option}={getattr(self, option)}, needs a multiple of it"
                )

    @property
    def base(self) -> str | None:
        """The recipe on which an LCMA recipe stands, None for others."""
        return dimflows.recipes.base_of(self.recipe)

    def others(self) -> "list[RunConfig]":
        """The configurations of what is trained beside it."""
        shared = {name: value for name, value in self.arguments.items() if name == "condition_shape"}
        alone: dict[str, Any] = {"pretrain_epochs": None, "online_steps": None, "beside": ()}
        return [
            dataclasses.replace(self, recipe=name, arguments=shared | own, **alone)
            for name, own in cast(Mapping, self.beside).items()
        ]

    def build(self, **more: Any) -> "tfd.Distribution":
        """The distribution of the recipe with these further arguments."""
        recipe = dimflows.recipes.get(self.recipe)
        return recipe(self.event_shape, grey_levels=self.grey_levels, **self.arguments | more)

    def to_json(self) -> dict[str, Any]:
        """The entries of `config.json`."""
        entries = dataclasses.asdict(self)
        notes = entries.pop("notes")
        for option in ("pretrain_epochs", "online_steps", "baseline"):
            if self.base is None or entries[option] is None:
                del entries[option]
        if not self.beside:
            del entries["beside"]
        return {"version": __version__, **entries, **notes}
