"""What `FlowModel.summary` prints: every variable with its owner, and how many numbers there are."""

import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import keras_bridge, representation
from tfp_dimflows.bijectors import Chain, Scan
from tfp_dimflows.upstream import TFPChain, TFPInvert

# What is held under one of these keys is told by its own name.
_NAMELESS = ("bijector", "bijectors", "distribution", "layers")
_POSITIONS = (0.65, 0.85, 1.0)
_UNITS = ("B", "KB", "MB", "GB", "TB")


class Owned(NamedTuple):
    """A variable, the path of names that leads to it from the distribution, and the class of what holds it."""

    variable: tf.Variable
    path: str
    owner: str


def owned_variables(distribution: tfd.Distribution) -> list[Owned]:
    """Every variable of a distribution, once, with a path of its own such as `multiscale/level_0/scan/actnorm/shift`.

    A part goes by the name that its owner has for it, as argument or attribute (`level_0`, `network`), or else by its own; of
    several of one name the later ones are numbered. What chains hold counts as held by their owners. A variable of a
    `Scan` has the path that its values have in each of the bijectors.
    """
    found: dict[int, Owned] = {}
    for owned in _Walk().through(distribution, "distribution"):
        found.setdefault(id(owned.variable), owned)
    return list(found.values())


class _Walk:
    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}
        self._paths: set[str] = set()

    def through(self, item: Any, key: str, path: str = "", owner: str = "") -> Iterator[Owned]:
        """The variables of what an owner with this path holds under a key."""
        if id(item) in self._seen or item is None or isinstance(item, (str, bytes, int, float, bool)):
            return
        self._seen[id(item)] = item  # which also keeps its id from being used again
        if isinstance(item, keras.Variable):
            yield Owned(item.value, self._unique(path, item.name), owner)
        elif isinstance(item, tf.Variable):
            name = item.name.split(":")[0]
            yield Owned(item, self._unique(path, key if name == "Variable" else name), owner)
        else:
            if isinstance(item, (tf.Module, keras.Layer)) and not _is_transparent(item, key):
                path = self._unique(path, item.name if key in _NAMELESS else key)
                owner = type(item).__name__.lstrip("_")
            stacked = {id(first): stack for first, stack in item.stacked_variables()} if isinstance(item, Scan) else {}
            for name, part in _held_by(item, key):
                for owned in self.through(part, name, path, owner):
                    yield owned._replace(variable=stacked.get(id(owned.variable), owned.variable))

    def _unique(self, path: str, name: str) -> str:
        first = candidate = f"{path}/{name}" if path else name
        number = 0
        while candidate in self._paths:
            number += 1
            candidate = f"{first}_{number}"
        self._paths.add(candidate)
        return candidate


def _is_transparent(item: Any, key: str) -> bool:
    """Whether what it holds counts as held by its owner."""
    if isinstance(item, (tfp.util.DeferredTensor, keras_bridge.Network)):
        return True
    is_wrapped = isinstance(item, tfd.Distribution) and "distribution" in representation.arguments(item)
    return key in _NAMELESS and (is_wrapped or isinstance(item, (Chain, TFPChain, TFPInvert)))


def _held_by(item: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Keys and values of what an object that is held under a key holds itself; arguments come before attributes."""
    if isinstance(item, keras.Layer):
        attributes = ((name, value) for name, value in vars(item).items() if not name.startswith("_"))
        yield from ((name, value) for name, value in attributes if not isinstance(value, keras.Variable))
        yield from (("layers", layer) for layer in getattr(item, "layers", []))
        yield from ((v.name, v) for v in item.variables)
    elif isinstance(item, (tfb.Bijector, tfd.Distribution)):
        yield from representation.arguments(item).items()
    for name, value in keras_bridge.held_by(item):
        if isinstance(item, (list, tuple)):
            yield key if key in _NAMELESS else f"{key.removesuffix('s')}_{name}", value
        elif name.startswith("_self_"):  # TensorFlow's account of the attributes
            continue
        elif isinstance(item, (dict, tf.Module)) and not isinstance(item, tfp.util.DeferredTensor):
            yield name.lstrip("_"), value
        else:
            yield key, value


def print_summary(
    model: keras.Model,
    line_length: int | None,
    positions: Sequence[float] | None,
    print_fn: Callable[[str], Any] | None,
    show_trainable: bool,
    layer_range: Sequence[str] | None,
) -> None:
    """Prints a table of a `FlowModel`'s variables, and their counts; the arguments are those of `FlowModel.summary`."""
    waiting = {id(v.value): v for v in _numbers(model.weights)}
    owned = [
        (o.path, o.owner, waiting.pop(id(o.variable))) for o in owned_variables(model.distribution) if id(o.variable) in waiting
    ]
    owned += [(v.path, type(model).__name__, v) for v in waiting.values()]
    columns = 4 if show_trainable else 3
    table = [("Variable (owner)", "Shape", "Param #", "Trainable")[:columns]]
    for path, owner, v in _in_range(owned, layer_range):
        row = (f"{path} ({owner})", str(tuple(v.shape)), f"{math.prod(v.shape):,}", "Y" if v.trainable else "N")
        table.append(row[:columns])
    widths = _widths(table, line_length, positions, show_trainable)
    header, *lines = [_line(row, widths) for row in table]
    rule = "─" * sum(widths)
    parts = {
        "Trainable": model.trainable_weights,
        "Non-trainable": model.non_trainable_weights,
        "Optimizer": model.optimizer.variables if model.compiled and model.optimizer.built else [],
    }
    counts = [_count("Total", [v for part in parts.values() for v in part])]
    counts += [_count(name, part) for name, part in parts.items() if part or name != "Optimizer"]
    (print_fn or print)("\n".join([f'Model: "{model.name}"', rule, header, rule, *lines, rule, *counts]))


def _numbers(variables: Iterable[keras.Variable]) -> list[keras.Variable]:
    """Those that hold parameters: no seeds, no maps of indices, no counters."""
    return [v for v in variables if tf.as_dtype(v.dtype).is_floating]


def _in_range(owned: list[tuple], layer_range: Sequence[str] | None) -> list[tuple]:
    """Those from the first whose path matches one pattern to the last whose path matches the other."""
    if layer_range is None:
        return owned
    start, end = ([k for k, (path, *_) in enumerate(owned) if re.match(pattern, path)] for pattern in layer_range)
    if not start or not end:
        raise ValueError(
            f"FlowModel.summary: got layer_range={layer_range!r}, needs patterns that match the paths of variables"
        )
    first, last = (start, end) if min(start) <= max(end) else (end, start)
    return owned[min(first) : max(last) + 1]


def _widths(
    table: Sequence[tuple[str, ...]], line_length: int | None, positions: Sequence[float] | None, show_trainable: bool
) -> list[int]:
    """The widths of the columns: what the cells need, unless the line's length or the columns' ends are given."""
    needed = [max(map(len, column)) + 2 for column in zip(*table)]
    if line_length is None and positions is None:
        return needed
    line_length = line_length or sum(needed)
    positions = positions or _POSITIONS
    if show_trainable:
        positions = [*(0.9 * position for position in positions), 1.0]
    ends = [int(position * line_length) for position in positions]
    widths = [end - start for start, end in zip([0, *ends], ends)]
    if len(widths) != len(needed) or min(widths) < 4:
        raise ValueError(
            f"FlowModel.summary: got line_length={line_length} and positions={positions}, needs 3 columns of 4 characters"
        )
    return widths


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    """A row, in as many lines as its longest cell takes."""
    cells = [textwrap.wrap(cell, width - 2) for cell, width in zip(row, widths)]
    lines = []
    for path, *sizes in itertools.zip_longest(*cells, fillvalue=""):
        lines.append("".join([path.ljust(widths[0]), *(size.rjust(width) for size, width in zip(sizes, widths[1:]))]))
    return "\n".join(lines)


def _count(kind: str, variables: Iterable[keras.Variable]) -> str:
    numbers = _numbers(variables)
    size = sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in numbers)
    unit = min(int(math.log(size, 1024)) if size else 0, len(_UNITS) - 1)
    return f" {kind} params: {sum(math.prod(v.shape) for v in numbers):,} ({size / 1024**unit:.2f} {_UNITS[unit]})"
