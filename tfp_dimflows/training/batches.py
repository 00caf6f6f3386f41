"""Batches in the forms that Keras takes, as a distribution needs them."""

import itertools
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from tfp_dimflows.bijectors.conditions import as_tensors
from tfp_dimflows.distributions import structure_of


def events(batch: Any) -> Any:
    """The events of a batch in any form that Keras takes."""
    is_packed = (
        isinstance(batch, (tuple, list)) and len(batch) > 0 and (isinstance(batch[0], dict) or hasattr(batch[0], "shape"))
    )
    return batch[0] if is_packed else batch


def float_dtype(distribution: tfd.Distribution) -> tf.DType:
    """The dtype in which a distribution computes."""
    for dtype in (distribution.dtype, structure_of(distribution).noise.dtype):
        if isinstance(dtype, tf.DType) and dtype.is_floating:
            return dtype
    return tf.as_dtype(keras.config.floatx())


def tensors(batch: Any, distribution: tfd.Distribution) -> Any:
    """Events in any numeric container, or a dict with their condition, as tensors of the dtype that the distribution needs.

    Raises:
      ValueError: for other dicts, or values that are no numbers.
    """
    dtype = float_dtype(distribution)
    if isinstance(batch, dict):
        if set(batch) != {"x", "condition"}:
            raise ValueError(
                f"FlowModel: got a batch with the keys {sorted(batch)}, needs events, or a dict of 'x' and 'condition'; one "
                f"entry is chosen by `dataset.map(lambda batch: batch[{next(iter(sorted(batch)), 'x')!r}])`"
            )
        return {"x": _events(batch["x"], distribution, dtype), "condition": as_tensors(batch["condition"], dtype)}
    return _events(batch, distribution, dtype)


def _events(x: Any, distribution: tfd.Distribution, dtype: tf.DType) -> tf.Tensor:
    x = x if tf.is_tensor(x) else np.asarray(x)
    if not (tf.as_dtype(x.dtype).is_floating or tf.as_dtype(x.dtype).is_integer or tf.as_dtype(x.dtype).is_bool):
        raise ValueError(f"FlowModel: got data of dtype {x.dtype}, {distribution.name} needs numbers")
    x = tf.convert_to_tensor(x)
    return tf.cast(x, dtype) if x.dtype.is_floating or distribution.dtype.is_floating else x


def is_far_from_unit_scale(values: tf.Tensor, event_ndims: int) -> bool:
    """Whether some dimension of events has a root mean square above 10, or below 0.01 without being 0."""
    values = tf.cast(values, tf.float64)
    sizes = tf.sqrt(tf.reduce_mean(values**2, axis=list(range(values.shape.rank - event_ndims))))
    return bool(tf.reduce_any((sizes > 10.0) | ((sizes > 0.0) & (sizes < 0.01))))


def check_shape(batch: Any, distribution: tfd.Distribution, batch_axes: int = 0) -> None:
    """Raises unless tensors of `tensors` have the distribution's event shape behind so many axes at least."""
    shape = (batch["x"] if isinstance(batch, dict) else batch).shape
    event_shape = distribution.event_shape
    rank = event_shape.rank
    if shape.rank is None:
        return
    if shape.rank < rank or not event_shape.is_compatible_with(shape[shape.rank - rank :]):
        raise ValueError(f"FlowModel: got data of shape {shape}, {distribution.name} needs events of shape {event_shape}")
    if shape.rank < rank + batch_axes:
        raise ValueError(
            f"FlowModel: got one event of shape {shape}, needs batches of them: `dataset.batch(size)`, or an array of events"
        )


def of_event_shape(batch: Any, distribution: tfd.Distribution, batch_axes: int = 0) -> Any:
    """The tensors of `tensors` after `check_shape`, with the static event shape that those of a generator may not have."""
    check_shape(batch, distribution, batch_axes)
    x = batch["x"] if isinstance(batch, dict) else batch
    if x.shape.rank is not None and not x.shape[1:].is_fully_defined():
        unknown = [None] * (x.shape.rank - distribution.event_shape.rank)
        x = tf.ensure_shape(x, [*unknown, *distribution.event_shape])
    return batch | {"x": x} if isinstance(batch, dict) else x


def checked(batch: Any, distribution: tfd.Distribution, batch_axes: int = 0) -> Any:
    """A batch as by `tensors`.

    Raises:
      ValueError: unless it has the right shape, and, where values are known, finite ones within the distribution's levels.
    """
    batch = tensors(batch, distribution)
    check_shape(batch, distribution, batch_axes)
    if not tf.executing_eagerly():  # values are not known while a function is traced
        return batch
    if not are_finite(batch):
        raise ValueError(f"FlowModel: {distribution.name} got values that are not finite")
    if hasattr(distribution, "check_values"):
        distribution.check_values(batch["x"] if isinstance(batch, dict) else batch)
    return batch


def are_finite(values: Any) -> bool:
    """Whether all floats in a structure of eager tensors are finite."""
    return all(bool(tf.reduce_all(tf.math.is_finite(v))) for v in tf.nest.flatten(values) if v.dtype.is_floating)


def checked_first(data: Any, distribution: tfd.Distribution) -> tuple[Any, Any]:
    """The first batch of what Keras takes, as by `checked`, and the data, which still begins with it.

    Of arrays the first batch is all of them; None, if there is none to see.
    """
    first = data
    if isinstance(data, tf.distribute.DistributedDataset):
        return None, data
    if isinstance(data, keras.utils.PyDataset):
        first = data[0]
    elif isinstance(data, types.GeneratorType):
        first = next(data, None)
        data = _chained([] if first is None else [first], data)
    elif isinstance(data, Iterable) and not isinstance(data, (dict, list, tuple)) and not hasattr(data, "shape"):
        first = next(iter(data), None)  # datasets, and loaders of other libraries
    if first is not None:
        first = checked(events(first), distribution, batch_axes=1)
    return first, data


def _chained(first: Sequence[Any], rest: Iterable[Any]) -> Iterator[Any]:
    # Keras knows a generator by its type, which `itertools.chain` has not.
    return (batch for batch in itertools.chain(first, rest))


def without_uint8(*batch: Any) -> Any:
    """A dataset's batch with images as int32."""
    return tf.nest.map_structure(
        lambda value: tf.cast(value, tf.int32) if value.dtype == tf.uint8 else value, batch[0] if len(batch) == 1 else batch
    )


def with_labels(x: Any, args: tuple, kwargs: dict) -> dict:
    """Adds labels that are not used, without which Keras ignores sample weights."""
    if kwargs.get("sample_weight") is not None and not args and kwargs.get("y") is None:
        return kwargs | {"y": np.zeros(len(tf.nest.flatten(x)[0]))}
    return kwargs
