"""Named recipes whose arguments are plain values, so that a name and its arguments are a model's configuration."""

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import keras
from tensorflow_probability import distributions as tfd

from tfp_dimflows.renamed import new_names

_Recipe = TypeVar("_Recipe", bound=Callable[..., tfd.Distribution])
# Arguments' old names. The `depth` of `wavenet-flow` is the old one beside `num_layers`.
_RENAMED_EVERYWHERE = {"levels": "grey_levels", "num_scales": "num_levels"}
_RENAMED = {
    **dict.fromkeys(["nice", "realnvp", "lcma-realnvp", "pnf"], {"num_couplings": "depth"}),
    **dict.fromkeys(["maf", "iaf", "pixelcnn-flow"], {"num_layers": "depth"}),
    **dict.fromkeys(["iresnet", "lcma-iresnet", "residual-flow", "lcma-residual-flow", "ffjord"], {"num_blocks": "depth"}),
    **dict.fromkeys(["flowpp", "vflow"], {"noise_couplings": "noise_depth", "posterior_couplings": "posterior_depth"}),
    "vae-flow": {"num_flows": "depth"},
    "wavenet-flow": {"num_layers": "depth", "depth": "num_blocks"},
}
_RECIPES: dict[str, Callable[..., tfd.Distribution]] = {}


def recipe(function: _Recipe) -> _Recipe:
    """Decorator that registers a recipe under its function's name and notes on each distribution how it was made.

    Args:
      function: returns a distribution for an event shape and keyword arguments that are plain values (or have `get_config`).
        The recipe's name is the function's, with hyphens.

    Raises (the recipe):
      ValueError: for arguments that the function does not have.
      TypeError: for arguments that are no plain values.
    """
    name = function.__name__.replace("_", "-")
    signature = inspect.signature(function)

    @functools.wraps(function)
    def build(*args: Any, **kwargs: Any) -> tfd.Distribution:
        kwargs = present_names(name, kwargs)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            known = ", ".join(signature.parameters)
            raise ValueError(f"{name}: {error}; the recipe's arguments are {known}") from None
        bound.apply_defaults()
        arguments = _plain(dict(bound.arguments), name)
        distribution = function(**bound.arguments)
        in_precision = {"floatx": keras.config.floatx(), "dtype_policy": keras.config.dtype_policy().name}
        distribution._recipe_config = json.dumps({"recipe": name, "arguments": arguments, "precision": in_precision})
        return distribution

    build.__signature__ = signature  # type: ignore[attr-defined]
    _RECIPES[name] = build
    return cast(_Recipe, build)


def present_names(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a recipe by their present names, with a DeprecationWarning for old ones."""
    renamed = _RENAMED_EVERYWHERE | _RENAMED.get(name, {})
    if "depth" in renamed and "num_layers" not in arguments:
        del renamed["depth"]
    return new_names(name, arguments, renamed)


def names() -> list[str]:
    """The names of all recipes.

    #### Example

    >>> "lcma-glow" in dimflows.recipes.names()
    True
    """
    return sorted(_RECIPES)


def get(name: str) -> Callable[..., tfd.Distribution]:
    """The recipe of this name.

    Args:
      name: one of `names()`.

    Raises:
      ValueError: for an unknown name; the message lists the known ones.

    #### Example

    >>> dimflows.recipes.get("realnvp") is dimflows.recipes.realnvp
    True
    """
    if name not in _RECIPES:
        raise ValueError(f"recipes: got {name!r}, needs one of {', '.join(names())}")
    return _RECIPES[name]


def base_of(name: str) -> str | None:
    """The name of the recipe on which an LCMA recipe stands, None for any other recipe.

    Args:
      name: one of `names()`.

    Raises:
      ValueError: for an unknown name.

    #### Example

    >>> dimflows.recipes.base_of("lcma-glow")
    'glow'
    """
    return getattr(get(name), "lcma_base", None)


def config_of(distribution: tfd.Distribution) -> dict | None:
    """`{"recipe": name, "arguments": {...}, "precision": {...}}` of a distribution that a recipe made, else None.

    Args:
      distribution: any distribution.

    #### Example

    >>> config = dimflows.recipes.config_of(dimflows.recipes.nice([4], width=8))
    >>> config["recipe"], config["arguments"]["width"]
    ('nice', 8)
    """
    config = getattr(distribution, "_recipe_config", None)
    return None if config is None else json.loads(config)


def _plain(value: Any, name: str) -> Any:
    """The value as JSON knows it."""
    if hasattr(value, "get_config"):
        return _plain(value.get_config(), name)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(v, name) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, name) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: got an argument {value!r}, needs plain values (numbers, strings, lists, dicts)")
