"""Named recipes whose arguments are plain values, so that a name and its arguments are a model's configuration."""

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any

import tensorflow_probability as tfp

tfd = tfp.distributions

_RECIPES: dict[str, Callable[..., tfd.Distribution]] = {}


def recipe(function: Callable[..., tfd.Distribution]) -> Callable[..., tfd.Distribution]:
    """Decorator that registers a recipe under its function's name and notes on each distribution how it was made."""
    name = function.__name__.replace("_", "-")
    signature = inspect.signature(function)

    @functools.wraps(function)
    def build(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            known = ", ".join(signature.parameters)
            raise ValueError(f"{name}: {error}; the recipe's arguments are {known}") from None
        bound.apply_defaults()
        arguments = _plain(dict(bound.arguments), name)
        distribution = function(**bound.arguments)
        distribution._recipe_config = json.dumps({"recipe": name, "arguments": arguments})
        return distribution

    build.__signature__ = signature
    _RECIPES[name] = build
    return build


def names() -> list[str]:
    """The names of all recipes."""
    return sorted(_RECIPES)


def get(name: str) -> Callable[..., tfd.Distribution]:
    """The recipe of this name.

    Raises:
      ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in _RECIPES:
        raise ValueError(f"recipes: got {name!r}, needs one of {', '.join(names())}")
    return _RECIPES[name]


def base_of(name: str) -> str | None:
    """The recipe on which an LCMA recipe stands, None for any other recipe."""
    return getattr(get(name), "lcma_base", None)


def config_of(distribution: tfd.Distribution) -> dict | None:
    """`{"recipe": name, "arguments": {...}}` of a distribution that a recipe made, else None."""
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
