"""Batches in the forms that Keras takes, as a distribution needs them."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd


def events(batch: Any) -> Any:
    """The events of a batch in any form that Keras takes."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def tensors(batch: Any, distribution: tfd.Distribution) -> Any:
    """Arrays, nested lists and dicts of them as tensors, floats in the distribution's precision."""
    if isinstance(batch, dict):
        return {key: tensors(value, distribution) for key, value in batch.items()}
    batch = tf.convert_to_tensor(batch)
    dtype = distribution.dtype if distribution.dtype.is_floating else tf.as_dtype(keras.config.floatx())
    return tf.cast(batch, dtype) if batch.dtype.is_floating else batch


def check(batch: Any, distribution: tfd.Distribution) -> None:
    """Raises unless the batch's events have the right shape and finite values within the distribution's levels."""
    x = batch
    if isinstance(batch, dict):
        if set(batch) != {"x", "condition"}:
            raise ValueError(f"FlowModel: got a batch with {sorted(batch)}, needs 'x' and 'condition'")
        x = batch["x"]
    event_shape = distribution.event_shape
    rank = len(event_shape)
    if x.shape.rank < rank or not event_shape.is_compatible_with(x.shape[x.shape.rank - rank :]):
        raise ValueError(f"FlowModel: got data of shape {x.shape}, {distribution.name} needs events of shape {event_shape}")
    for value in tf.nest.flatten(batch):
        if value.dtype.is_floating and not bool(tf.reduce_all(tf.math.is_finite(value))):
            raise ValueError(f"FlowModel: {distribution.name} got values that are not finite")
    if hasattr(distribution, "check_values"):
        distribution.check_values(x)


def check_first(data: Any, distribution: tfd.Distribution) -> None:
    """`check` of the first batch of a dataset, or of arrays."""
    if isinstance(data, tf.data.Dataset):
        for batch in data.take(1):
            check(events(batch), distribution)
    elif isinstance(data, (np.ndarray, tf.Tensor, dict)):
        check(tensors(data, distribution), distribution)


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
