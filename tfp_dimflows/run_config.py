"""`RunConfig`: what a run trains, and how. Needs no TensorFlow before it is made."""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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


def _option(default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A field that is an option of the command line too, with what argparse is told of it, and its `least` value."""
    return dataclasses.field(default=default, metadata=metadata)


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
      learning_rate: Adam's.
      seed: integer seed of initial weights, noise and samples.
      pretrain_epochs: epochs of LCMA's first phase; None: half of `epochs`, rounded up.
      online_steps: LCMA in one phase: a factor-out is decided after every so many steps, by as many batches
        (`DecideFactorization`). `contributions.npz` is then of the trained model.
      baseline: whether an LCMA recipe also trains the conventional factorization.
      beside: other recipes that are trained with the same budget for comparison, with their default arguments.
      notes: further entries of `config.json`, such as the dataset's name.

    Raises:
      ValueError: if a recipe does not exist or does not take the arguments; for `online_steps` with `pretrain_epochs` or a
        recipe without LCMA; for LCMA with a condition; for a recipe beside itself.

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
    learning_rate: float = _option(1e-3, help="Adam's")
    seed: int = _option(0, help="of initial weights, noise and samples", least=0)
    pretrain_epochs: int | None = _option(None, help="lcma recipes: epochs of phase 1; default: half of --epochs")
    online_steps: int | None = _option(
        None, help="lcma recipes: no phase 1; a factor-out is decided after every N steps of the training", metavar="N"
    )
    baseline: bool = _option(
        True, help="lcma recipes: train the conventional one beside", action=argparse.BooleanOptionalAction
    )
    beside: Sequence[str] = _option(
        (), help="other recipes to train with the same budget", nargs="+", metavar="RECIPE", type=str
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
        if self.base is not None and arguments.get("condition_shape") is not None:
            raise ValueError(f"train: got condition_shape for {self.recipe}, needs none: contributions take no condition")
        if len({self.recipe, *self.beside}) <= len(self.beside):
            raise ValueError(f"train: got {', '.join(self.beside)} beside {self.recipe}, needs each recipe once")
        object.__setattr__(self, "event_shape", list(event_shape))
        object.__setattr__(self, "arguments", arguments)
        if self.base is not None and self.online_steps is None:
            object.__setattr__(self, "pretrain_epochs", self.pretrain_epochs or (self.epochs + 1) // 2)

    @property
    def base(self) -> str | None:
        """The recipe on which an LCMA recipe stands, None for others."""
        return dimflows.recipes.base_of(self.recipe)

    def others(self) -> "list[RunConfig]":
        """The configurations of what is trained beside it."""
        own: dict[str, Any] = {"arguments": {}, "pretrain_epochs": None, "online_steps": None, "beside": ()}
        return [dataclasses.replace(self, recipe=recipe, **own) for recipe in self.beside]

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
