"""Old names of arguments, which this version still takes."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])


def new_names(owner: str, kwargs: dict[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    """Keyword arguments under their new names, with a DeprecationWarning for old ones.

    Raises:
      TypeError: if an argument is given by its old name and by its new one.
    """
    if old := [name for name in kwargs if name in renamed]:
        if twice := [name for name in old if renamed[name] in kwargs and renamed[name] not in old]:
            raise TypeError(f"{owner}: got {twice[0]} and {renamed[twice[0]]}, the old and the new name of the same argument")
        changes = ", ".join(f"{name} is now {renamed[name]}" for name in old)
        message = f"{owner}: {changes}; the next version will not take the old name"
        warnings.warn(message, DeprecationWarning, stacklevel=_level_of_the_caller())
    return {renamed.get(name, name): value for name, value in kwargs.items()}


def _level_of_the_caller() -> int:
    """How many calls `new_names` is away from code that is neither this package's nor TFP's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in ("tfp_dimflows", "tensorflow_probability", "decorator"):
        level, frame = level + 1, frame.f_back
    return level


def renamed(**names: str) -> Callable[[_Function], _Function]:
    """Decorator of a function that also takes keyword arguments by their old names, `old="new"`."""

    def decorator(function: _Function) -> _Function:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **new_names(function.__qualname__.removesuffix(".__init__"), kwargs, names))

        return cast(_Function, wrapper)

    return decorator
