"""The way of a value through bijectors, which a composite writes once for each direction.

A composite sends a `Walk` forward or backward through its parts, splits it, and joins it again. `dfb.VFlow`, to latent values:

    x, e = y.split(parts)                             [x, e] = y
    z = e.forward(posterior, x.value)                 z = posterior.forward(e; condition=x)
    eps = x.join(z, by=parts).inverse(flow)           eps = flow.inverse([x, z])

The kind of walk is the question, and the same lines answer it:

* `Summed`: the value at the end and the sum of all log-dets, as `log_prob` needs them;
* `PerDimension`: the value, and for each of its dimensions what it has contributed on the way, which moves with it;
* `Transported`: no value; numbers, one for each dimension, move as the dimensions do.

Every bijector, of this package, of TFP or a user's own, is asked by the three functions at the end, dispatched on its class.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn, Self, TypeVar

import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors import log_dets
from tfp_dimflows.bijectors.conditions import condition_kwargs
from tfp_dimflows.upstream import prefer_static as ps

__all__ = [
    "Parts",
    "PerDimension",
    "Summed",
    "Transported",
    "Walk",
    "transport",
    "value_and_log_det",
    "value_and_log_det_per_dim",
]


class Parts(NamedTuple):
    """How a value falls into parts, and how they are put together again.

    Attributes:
      split: function of a value to its parts.
      join: function of the parts to the value.
      split_numbers: the same for numbers of dimensions, if `split` does more to a value than to move its dimensions.
      join_numbers: the same.
      log_det_per_dim: what `split` contributes to the log-det of every dimension.
    """

    split: Callable
    join: Callable
    split_numbers: Callable | None = None
    join_numbers: Callable | None = None
    log_det_per_dim: float = 0.0


class Walk:
    """A value on its way through bijectors; see the module.

    Attributes:
      value: the value (a tensor or structure); None if numbers move alone.
      numbers: one number for each dimension; None if they are summed.
    """

    value: Any = None
    numbers: Any = None

    @property
    def shape(self) -> tf.TensorShape:
        """The static shape of what moves."""
        return (self.numbers if self.value is None else self.value).shape

    def forward(self, bijector: tfb.Bijector, condition: Any = None) -> Self:
        """On through `bijector.forward`, with the condition for all parts that can use it."""
        return self.through(bijector, "forward", condition_kwargs(bijector, condition))

    def inverse(self, bijector: tfb.Bijector, condition: Any = None) -> Self:
        """On through `bijector.inverse`; as `forward`."""
        return self.through(bijector, "inverse", condition_kwargs(bijector, condition))

    def through(self, bijector: tfb.Bijector, direction: str, kwargs: dict[str, Any]) -> Self:
        """On through a direction of a bijector with these keyword arguments."""
        raise NotImplementedError

    def split(self, by: Parts) -> list[Self]:
        """A walk for each part of the value. All must be joined again: what has been summed so far goes on with the last."""
        raise NotImplementedError

    def join(self, *others: Self, by: Parts) -> Self:
        """One walk of this and the other parts."""
        raise NotImplementedError


AnyWalk = TypeVar("AnyWalk", bound=Walk)


class Summed(Walk):
    """A value, and the sum of the log-dets of all that it went through.

    Args:
      value: where the walk starts.
      event_ndims: number of event axes of the value, over which log-dets are summed (a structure alike).
      log_det: the sum so far; None: nothing yet.
    """

    def __init__(self, value: Any, event_ndims: Any, log_det: tf.Tensor | None = None):
        self.value, self.event_ndims, self._log_det = value, event_ndims, log_det

    @property
    def log_det(self) -> tf.Tensor:
        """The sum so far, of the shape of the batch."""
        if self._log_det is None:
            return log_dets.sum_event(log_dets.zeros(self.value), self.value, self.event_ndims)
        return self._log_det

    def through(self, bijector: tfb.Bijector, direction: str, kwargs: dict[str, Any]) -> "Summed":
        """As in `Walk`."""
        value, log_det = value_and_log_det(bijector, self.value, direction, self.event_ndims, kwargs)
        return Summed(value, getattr(bijector, f"{direction}_event_ndims")(self.event_ndims), self._plus(log_det))

    def split(self, by: Parts) -> list["Summed"]:
        """As in `Walk`."""
        *parts, last = by.split(self.value)
        log_det = self._plus(_constant(self.value, self.event_ndims, by.log_det_per_dim))
        return [*(Summed(part, self._ndims_of(part)) for part in parts), Summed(last, self._ndims_of(last), log_det)]

    def join(self, *others: "Summed", by: Parts) -> "Summed":
        """As in `Walk`."""
        value = by.join(self.value, *(other.value for other in others))
        event_ndims = self._ndims_of(value)
        constant = _constant(value, event_ndims, -by.log_det_per_dim)
        return Summed(value, event_ndims, self._plus(*(other._log_det for other in others), constant))

    def _plus(self, *terms: tf.Tensor | None) -> tf.Tensor | None:
        known = [term for term in (self._log_det, *terms) if term is not None]
        return functools.reduce(tf.add, known) if known else None

    def _ndims_of(self, value: tf.Tensor) -> int:
        """Event axes of what is made of this value in the same batch."""
        return self.event_ndims + value.shape.rank - self.value.shape.rank


def _constant(value: tf.Tensor, event_ndims: int, log_det_per_dim: float) -> tf.Tensor | None:
    """The sum of a constant over all dimensions."""
    if not log_det_per_dim:
        return None
    size = ps.reduce_prod(ps.shape(value)[value.shape.rank - event_ndims :])
    return log_det_per_dim * tf.cast(size, log_dets.log_det_dtype(value.dtype))


class PerDimension(Walk):
    """A value, and for each of its dimensions the sum of what it has contributed to the log-dets.

    Args:
      value: where the walk starts.
      numbers: the contributions so far, in the places that the dimensions have where the walk is; None: zero.
    """

    def __init__(self, value: Any, numbers: Any = None):
        self.value = value
        self.numbers = log_dets.fill(log_dets.zeros(value), value) if numbers is None else numbers

    def through(self, bijector: tfb.Bijector, direction: str, kwargs: dict[str, Any]) -> "PerDimension":
        """As in `Walk`."""
        value, log_det = value_and_log_det_per_dim(bijector, self.value, direction, kwargs)
        numbers = log_dets.add(log_dets.fill(log_det, self.value), self.numbers)
        return PerDimension(value, transport(bijector, numbers, direction))

    def split(self, by: Parts) -> list["PerDimension"]:
        """As in `Walk`."""
        numbers = self.numbers + by.log_det_per_dim if by.log_det_per_dim else self.numbers
        numbers = (by.split_numbers or by.split)(numbers)
        return [PerDimension(*part) for part in zip(by.split(self.value), numbers, strict=True)]

    def join(self, *others: "PerDimension", by: Parts) -> "PerDimension":
        """As in `Walk`."""
        numbers = (by.join_numbers or by.join)(self.numbers, *(other.numbers for other in others))
        numbers = numbers - by.log_det_per_dim if by.log_det_per_dim else numbers
        return PerDimension(by.join(self.value, *(other.value for other in others)), numbers)


class Transported(Walk):
    """Numbers, one for each dimension, that go where the dimensions go, and do not change.

    Args:
      numbers: where the walk starts.
    """

    def __init__(self, numbers: Any):
        self.numbers = numbers

    def through(self, bijector: tfb.Bijector, direction: str, kwargs: dict[str, Any]) -> "Transported":
        """As in `Walk`."""
        return Transported(transport(bijector, self.numbers, direction))

    def split(self, by: Parts) -> list["Transported"]:
        """As in `Walk`."""
        return [Transported(part) for part in (by.split_numbers or by.split)(self.numbers)]

    def join(self, *others: "Transported", by: Parts) -> "Transported":
        """As in `Walk`."""
        return Transported((by.join_numbers or by.join)(self.numbers, *(other.numbers for other in others)))


def along(parts: Iterable[tuple[tfb.Bijector, dict[str, Any]]], start: AnyWalk, direction: str) -> AnyWalk:
    """A walk through bijectors one after the other, each with its keyword arguments."""
    for bijector, kwargs in parts:
        start = start.through(bijector, direction, kwargs)
    return start


def opposite(direction: str) -> str:
    """The other direction."""
    return "inverse" if direction == "forward" else "forward"


def fresh(value: Any) -> Any:
    """The same value as a new tensor, which misses TFP's cache of what it computed before a variable was updated."""
    return tf.nest.map_structure(tf.identity, value)


# What every bijector is asked. FFJORD counts as element-wise, since its log-det comes unreduced.


@functools.singledispatch
def value_and_log_det(
    bijector: tfb.Bijector, value: Any, direction: str, event_ndims: Any, kwargs: dict[str, Any]
) -> tuple[Any, tf.Tensor]:
    """The result of a direction and its summed log-det, from one pass; needs no per-dimension rule."""
    value = fresh(value)
    result = getattr(bijector, direction)(value, **kwargs)
    log_det = getattr(bijector, f"{direction}_log_det_jacobian")(value, event_ndims, **kwargs)
    return result, tf.cast(log_det, log_dets.log_det_dtype(log_det.dtype))


@functools.singledispatch
def value_and_log_det_per_dim(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The result of a direction and the log-det of every dimension, in the frame of the argument, from one pass."""
    if not _is_elementwise(bijector):
        refuse(bijector, "no per-dimension decomposition of its log-det is known")
    value = fresh(value)
    log_det = getattr(bijector, f"{direction}_log_det_jacobian")
    return getattr(bijector, direction)(value, **kwargs), log_det(value, event_ndims=0, **kwargs)


@functools.singledispatch
def transport(bijector: tfb.Bijector, numbers: Any, direction: str) -> Any:
    """Carries one number per dimension from the frame of a direction's argument to that of its result."""
    if not _is_elementwise(bijector):
        refuse(bijector, "where its dimensions go is not known")
    return numbers


def _is_elementwise(bijector: tfb.Bijector) -> bool:
    return bijector.forward_min_event_ndims == 0 and bijector.inverse_min_event_ndims == 0 and bijector._is_injective


def refuse(bijector: tfb.Bijector, reason: str) -> NoReturn:
    """Raises the NotImplementedError of a bijector without a decomposition."""
    cls = type(bijector).__name__
    raise NotImplementedError(
        f"{bijector.name} ({cls}): {reason}; register a rule with @dimflows.register_log_det_per_dim({cls})"
    )
