"""What the messages to users have in common. Needs no TensorFlow."""

import difflib
import os
from collections.abc import Iterable


class Failure(RuntimeError):
    """What ended work that had begun, such as a training: not the fault of an argument."""


def did_you_mean(name: str, known: Iterable[str], folder: str = "") -> str:
    """The end of a message about an unknown name, which suggests the nearest of the known ones if one is near.

    Args:
      name: what was given.
      known: the names that there are.
      folder: what comes before the suggested name.

    #### Example

    >>> from tfp_dimflows.messages import did_you_mean
    >>> did_you_mean("lcma_realnpv", ["glow", "realnvp", "lcma-realnvp"])
    "; did you mean 'lcma-realnvp'?"
    >>> did_you_mean("unheard-of", ["glow", "realnvp"])
    ''
    """
    by_lower_case = {other.lower(): other for other in known}
    nearest = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f"; did you mean {os.path.join(folder, by_lower_case[nearest[0]])!r}?" if nearest else ""


def did_you_mean_folder(path: str | os.PathLike) -> str:
    """`did_you_mean` of a path that does not exist, among the folders beside it."""
    parent, name = os.path.split(os.fspath(path).rstrip("/"))
    beside = [entry.name for entry in os.scandir(parent or ".") if entry.is_dir()] if os.path.isdir(parent or ".") else []
    return did_you_mean(name, beside, parent)


def check_name(owner: str, name: str, known: Iterable[str]) -> None:
    """Raises a ValueError, with a suggestion, unless a name is one of those known."""
    known = list(known)
    if name not in known:
        raise ValueError(f"{owner}: got {name!r}, needs one of {', '.join(known)}{did_you_mean(name, known)}")
