"""How a condition reaches the bijectors that can use it."""

from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.upstream import TFPInvert
from tfp_dimflows.upstream import prefer_static as ps


def uses_condition(bijector: tfb.Bijector) -> bool:
    """Whether some part of a bijector can use a condition."""
    if isinstance(bijector, TFPInvert):
        return uses_condition(bijector.bijector)
    if hasattr(bijector, "uses_condition"):
        return bijector.uses_condition
    return any(uses_condition(part) for part in _parts(bijector))


def condition_kwargs(bijector: tfb.Bijector, condition: Any) -> dict[str, Any]:
    """The keyword arguments by which `condition` reaches all parts that can use it; empty if none can.

    Raises:
      ValueError: if parts of a TFP composite that can and cannot use it have the same name.
    """
    if condition is None or not uses_condition(bijector):
        return {}
    if isinstance(bijector, TFPInvert):
        return condition_kwargs(bijector.bijector, condition)
    if hasattr(bijector, "uses_condition"):
        return {"condition": condition}
    kwargs: dict[str, dict] = {}
    for part in _parts(bijector):
        nested = condition_kwargs(part, condition)
        if kwargs.setdefault(part.name, nested) != nested:
            raise ValueError(
                f"{bijector.name}: several parts are named {part.name!r}, and not all of them can use the condition; "
                "give them different names, since keyword arguments reach parts by name"
            )
    return {name: nested for name, nested in kwargs.items() if nested}


def _parts(bijector: tfb.Bijector) -> list[tfb.Bijector]:
    return tf.nest.flatten(getattr(bijector, "bijectors", ()))


def from_lists(condition: Any) -> Any:
    """A condition in which (nested) lists of numbers are arrays, and not structures of them."""
    if isinstance(condition, dict):
        return {key: from_lists(value) for key, value in condition.items()}
    if isinstance(condition, (list, tuple)) and condition:
        if all(isinstance(leaf, (bool, int, float, np.generic)) for leaf in tf.nest.flatten(condition)):
            return np.asarray(condition)
        values = [from_lists(value) for value in condition]
        return condition._make(values) if hasattr(condition, "_make") else type(condition)(values)
    return condition


def as_tensors(condition: Any, dtype: tf.DType) -> Any:
    """A condition, or a structure of them, as tensors: floats of this dtype, and integers, which may be labels."""

    def as_tensor(value: Any) -> tf.Tensor:
        value = tf.convert_to_tensor(value if tf.is_tensor(value) else np.asarray(value))
        return tf.cast(value, dtype) if value.dtype.is_floating else value

    return tf.nest.map_structure(as_tensor, from_lists(condition))


def vector_condition(condition: Any, value: tf.Tensor, event_ndims: int, name: str) -> tf.Tensor | None:
    """Checks a composite's condition that `append_condition` will be given: one vector for each event of `value`.

    A walk that has no value has no condition either.

    Raises:
      ValueError: if it is a structure or has another number of axes.
    """
    if condition is None:
        return None
    if isinstance(condition, dict):
        raise ValueError(f"{name}: got a dict as condition, needs a tensor with one vector for each event")
    condition = tf.cast(tf.convert_to_tensor(condition, dtype_hint=value.dtype), value.dtype)
    rank = value.shape.rank - event_ndims + 1
    if condition.shape.rank != rank:
        raise ValueError(f"{name}: got a condition of shape {condition.shape}, needs one vector for each event: {rank} axes")
    return condition


def append_condition(x: tf.Tensor, condition: tf.Tensor | None, event_ndims: int) -> tf.Tensor:
    """Events x with a vector for each as further channels, the same at every position."""
    if condition is None:
        return x
    size = ps.shape(condition)[-1:]
    condition = tf.reshape(condition, ps.concat([ps.shape(condition)[:-1], [1] * (event_ndims - 1), size], axis=0))
    return tf.concat([x, tf.broadcast_to(condition, ps.concat([ps.shape(x)[:-1], size], axis=0))], axis=-1)
