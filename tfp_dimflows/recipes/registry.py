"""Named recipes whose arguments are plain values, so that a name and its arguments are a model's configuration."""

import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import keras
import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from tfp_dimflows.messages import check_name, did_you_mean
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
      ValueError: for arguments that the function does not have, and what the function raises.
      TypeError: for arguments that are no plain values.
    """
    name = function.__name__.replace("_", "-")
    signature = inspect.signature(function)

    @functools.wraps(function)
    def build(*args: Any, **kwargs: Any) -> tfd.Distribution:
        given = dict(kwargs)
        kwargs = present_names(name, kwargs)
        known = ", ".join(signature.parameters)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            unknown = [key for key in kwargs if key not in signature.parameters and repr(key) in str(error)]
            suggestion = "".join(did_you_mean(key, signature.parameters) for key in unknown)
            raise ValueError(f"{name}: {error}{suggestion}; the recipe's arguments are {known}") from None
        bound.apply_defaults()
        arguments = _plain(dict(bound.arguments), name)
        if isinstance(arguments.get("seed"), int) and arguments["seed"] < 0:
            raise ValueError(f"{name}: got seed={arguments['seed']}, needs a nonnegative integer")
        with errors_as_given(name, given, arguments.get("event_shape")):
            distribution = function(**{key: _unboxed(value) for key, value in bound.arguments.items()})
        in_precision = {"floatx": keras.config.floatx(), "dtype_policy": keras.config.dtype_policy().name}
        distribution._recipe_config = json.dumps({"recipe": name, "arguments": arguments, "precision": in_precision})
        return distribution

    build.__signature__ = signature  # type: ignore[attr-defined]
    _RECIPES[name] = build
    return cast(_Recipe, build)


def present_names(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a recipe by their present names, with a DeprecationWarning for old ones.

    Raises:
      ValueError: if an argument is given by its old name and by its new one.
    """
    try:
        return new_names(name, arguments, renamed_arguments(name, arguments))
    except TypeError as error:
        raise ValueError(str(error)) from None


def renamed_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Old names of a recipe's arguments, and the present ones."""
    renamed = _RENAMED_EVERYWHERE | _RENAMED.get(name, {})
    if "depth" in renamed and "num_layers" not in arguments:
        del renamed["depth"]
    return renamed


@contextlib.contextmanager
def errors_as_given(name: str, arguments: Mapping[str, Any], event_shape: Any = None) -> Iterator[None]:
    """Context whose errors are ValueErrors that begin with a recipe's name and tell what it was given.

    Args:
      name: the recipe's name.
      arguments: what it was given, by old names too: these are named beside the present ones.
      event_shape: named in errors of the recipe's parts.
    """
    try:
        yield
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ValueError(f"{name}: got {given}: {error}") from error
    except ValueError as error:
        message = str(error)
        old = [
            f"{key} is now {new}"
            for key, new in renamed_arguments(name, arguments).items()
            if key in arguments and new in message
        ]
        message = f"{message} ({', '.join(old)})" if old else message
        error.args = (message if message.startswith(f"{name}: ") else f"{name} of events {event_shape}: {message}",)
        raise


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
    check_name("recipes", name, names())
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


def _unboxed(value: Any) -> Any:
    """Scalars of NumPy, also in lists, as Python's numbers."""
    if isinstance(value, (list, tuple)):
        return type(value)([_unboxed(v) for v in value])
    return value.item() if isinstance(value, np.generic) else value


def _plain(value: Any, name: str) -> Any:
    """The value as JSON knows it."""
    if isinstance(value, tf.TensorShape):
        return None if value.rank is None else value.as_list()
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
