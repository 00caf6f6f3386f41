"""How objects print: as calls of their constructors, with their parts and sizes, and without the values of tensors.

Numbers and choices are always told, switches and objects if they are not the default. `repr` is one line, in which the parts of
parts are `...`; `str` of a bijector or distribution goes as deep as fits on a page. Of a long list both show the beginning and
the end. Nothing is evaluated.
"""

import functools
import inspect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

_WIDTH, _PAGE = 100, 100
_LONGEST_LIST, _AT_EACH_END = 16, 3
_LONGEST_TEXT = 200


class Described:
    """Base of classes that print as a call of their constructor: `Checkerboard(parity=1)`.

    The arguments are what an object holds as attributes of the same names, with or without an underscore in front.
    """

    def __repr__(self) -> str:
        return _in_one_line(_Group(f"{type(self).__name__}(", _arguments(self, depth=2), ")"))


class DescribedByTFP:
    """Base of bijectors and distributions that print as TFP's do, and their arguments as well."""

    def __str__(self) -> str:
        depth, page, deeper = 1, "", self._to_depth(1)
        while deeper != page and (depth == 1 or deeper.count("\n") < _PAGE):
            depth += 1
            page, deeper = deeper, self._to_depth(depth)
        return page

    def _to_depth(self, depth: int) -> str:
        kind, head = _of_this_package(super().__str__()[:-1]).split("(", maxsplit=1)
        return _in_lines(_Group(f"{kind}(", [head, *_arguments(self, depth, without="name")], ")"))

    def __repr__(self) -> str:
        head, arguments = super().__repr__()[:-1], _arguments(self, depth=1, without="name")
        return " ".join([_of_this_package(head), *map(_in_one_line, arguments)]) + ">"


def _of_this_package(head: str) -> str:
    return head.replace("tfp.", "dimflows.", 1)


def signature_of(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters of a class's constructor, and those that it passes on to its bases' as keyword arguments."""
    found: dict[str, inspect.Parameter] = {}
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    for base in cls.__mro__[: cls.__mro__.index(Described)] if issubclass(cls, Described) else cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
            found |= {p.name: p for p in parameters if p.kind in kinds and p.name not in ("self", *found)}
            kinds = {inspect.Parameter.KEYWORD_ONLY}
    return found


@functools.singledispatch
def arguments(item: Any) -> dict[str, Any]:
    """The arguments of an object's constructor, as far as it holds them."""
    attributes = ((name, held) for name in signature_of(type(item)) for held in (f"_{name}", name))
    return {name: getattr(item, held) for name, held in attributes if hasattr(item, held)}


@arguments.register(tfb.Bijector)
@arguments.register(tfd.Distribution)
def _arguments_of_tfp(item: tfb.Bijector | tfd.Distribution) -> dict[str, Any]:
    return dict(item.parameters or {})


class _Group(NamedTuple):
    """Text that may be broken into lines between its parts."""

    opening: str
    parts: Sequence["_Text"]
    closing: str


_Text = str | _Group


def _in_one_line(text: _Text) -> str:
    return text if isinstance(text, str) else f"{text.opening}{', '.join(map(_in_one_line, text.parts))}{text.closing}"


def _in_lines(text: _Text, indent: int = 0) -> str:
    line = _in_one_line(text)
    if isinstance(text, str) or indent + len(line) <= _WIDTH:
        return line
    if len(text.parts) == 1:
        return f"{text.opening}{_in_lines(text.parts[0], indent)}{text.closing}"
    parts: list[_Text] = []
    for part in text.parts:
        if parts and isinstance(part, str) and isinstance(parts[-1], str) and indent + len(parts[-1] + part) + 5 <= _WIDTH:
            parts[-1] += f", {part}"
        else:
            parts.append(part)
    lines = [f"{' ' * (indent + 2)}{_in_lines(part, indent + 2)},\n" for part in parts]
    return f"{text.opening}\n{''.join(lines)}{' ' * indent}{text.closing}"


def _after(prefix: str, text: _Text) -> _Text:
    return prefix + text if isinstance(text, str) else text._replace(opening=prefix + text.opening)


def _arguments(item: Any, depth: int, without: str = "") -> list[_Text]:
    """`name=value` of the arguments that tell something."""
    signature, texts = signature_of(type(item)), []
    for name, value in arguments(item).items():
        default = signature[name].default if name in signature else inspect.Parameter.empty
        is_default = value is default or (isinstance(value, str) and value == default)
        always = _is_size_or_choice(value) and name not in ("name", "memory")
        if (always or not is_default) and name != without:
            texts.append(_after(f"{name}=", _text(value, depth)))
    return texts


def _is_size_or_choice(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_size_or_choice, value))
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)


def _text(value: Any, depth: int) -> _Text:
    if isinstance(value, (Described, tfb.Bijector, tfd.Distribution)):
        name = type(value).__name__.lstrip("_")
        return _Group(f"{name}(", _arguments(value, depth - 1, without="seed"), ")") if depth else f"{name}(...)"
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1):
        opening, closing = "()" if isinstance(value, tuple) else "[]"
        if isinstance(value, tuple) and len(value) == 1:
            closing = ",)"
        return _Group(opening, _items(value, depth), closing)
    if isinstance(value, dict):
        return _Group("{", [_after(f"{key!r}: ", _text(item, depth)) for key, item in value.items()], "}")
    if isinstance(value, functools.partial):
        keywords = [_after(f"{name}=", _text(item, depth)) for name, item in value.keywords.items()]
        return _Group("partial(", [*(_text(item, depth) for item in (value.func, *value.args)), *keywords], ")")
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, tf.DType):
        return value.name
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _array(value)
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    text = re.sub(" at 0x[0-9a-f]+", "", " ".join(repr(value).split()))
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def _items(values: Any, depth: int) -> list[_Text]:
    if len(values) > _LONGEST_LIST:
        return [*_items(values[:_AT_EACH_END], depth), "...", *_items(values[-_AT_EACH_END:], depth)]
    return [_text(value, depth) for value in values]


def _array(value: Any) -> str:
    if isinstance(value, tf.Variable):
        kind = f"tf.Variable {value.name!r}"
    else:
        kind = "tf.Tensor" if isinstance(value, tf.Tensor) else type(value).__name__
    return f"<{kind} shape={value.shape} dtype={getattr(value.dtype, 'name', value.dtype)}>"
