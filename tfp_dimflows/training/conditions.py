"""How events and conditions of a model come to the same batch axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfp_dimflows.upstream import prefer_static as ps


def broadcast(batch: Any, event_ndims: int, condition_shape: Sequence[int] | None) -> Any:
    """A batch of `tensors` whose events and condition have the same batch axes, broadcast from the right as in TFP.

    A condition keeps the size 1 where it broadcasts, so that networks of it alone are evaluated once.

    Raises:
      ValueError: if they do not broadcast, or the condition has another shape.
    """
    if not isinstance(batch, dict):
        return batch
    x, condition = batch["x"], batch["condition"]
    leaves = tf.nest.flatten(condition)
    batch_axes = x.shape.rank - event_ndims
    ndims = [condition_ndims(leaf, condition_shape, batch_axes) for leaf in leaves]
    shape = ps.shape(x)[:batch_axes]
    for leaf, own in zip(leaves, ndims):
        try:
            shape = ps.broadcast_shape(shape, ps.shape(leaf)[: leaf.shape.rank - own])
        except ValueError:
            raise ValueError(
                f"FlowModel: got events of shape {x.shape} and a condition of shape {leaf.shape}, needs batch axes that "
                "broadcast"
            ) from None
    rank = ps.size(shape)
    leaves = [with_batch_axes(leaf, rank, own) for leaf, own in zip(leaves, ndims)]
    return {"x": _broadcast_to(x, shape, event_ndims), "condition": tf.nest.pack_sequence_as(condition, leaves)}


def whole(batch: Any) -> Any:
    """A batch of `broadcast` in which conditions too have the size of the first batch axis."""
    if not isinstance(batch, dict):
        return batch
    num = ps.shape(batch["x"])[:1]
    conditions = tf.nest.map_structure(
        lambda c: tf.broadcast_to(c, ps.concat([num, ps.shape(c)[1:]], axis=0)), batch["condition"]
    )
    return {"x": batch["x"], "condition": conditions}


def condition_ndims(condition: tf.Tensor, condition_shape: Sequence[int] | None, batch_axes: int = 1) -> int:
    """Number of axes of one condition in a tensor of them.

    If its shape is not known, a condition has as many batch axes as the events, or one, unless it were no vector then; integers
    may be labels.

    Raises:
      ValueError: if conditions have another shape.
    """
    rank = condition.shape.rank
    if condition_shape is None:
        ndims = rank - max(batch_axes, 1)
        return max(ndims, 0) if condition.dtype.is_integer or ndims > 0 else max(rank - 1, 1)
    ndims = len(condition_shape)
    if rank < ndims or not condition.shape[rank - ndims :].is_compatible_with(condition_shape):
        raise ValueError(
            f"FlowModel: got a condition of shape {condition.shape}, needs conditions of shape {list(condition_shape)}, behind "
            "batch axes or alone"
        )
    return ndims


def with_batch_axes(condition: tf.Tensor, batch_axes: int, ndims: int) -> tf.Tensor:
    """A condition with so many batch axes, new ones of size 1 in front."""
    new = batch_axes + ndims - condition.shape.rank
    return tf.reshape(condition, ps.concat([[1] * new, ps.shape(condition)], axis=0)) if new else condition


def sample_shape_of(sample_shape: Any, condition: Any, condition_shape: Sequence[int] | None) -> tuple[Any, Any]:
    """The shape of so many samples for each condition of a batch, and the condition with axes for it.

    Raises:
      ValueError: if conditions have another shape, or the tensors of a structure different batch axes.
    """
    leaves = tf.nest.flatten(condition)
    ndims = [condition_ndims(leaf, condition_shape) for leaf in leaves]
    sample_shape = sample_shape if tf.is_tensor(sample_shape) else np.asarray(sample_shape, np.int32)
    shape: Any = np.zeros([0], np.int32)
    for leaf, own in zip(leaves, ndims):
        shape = ps.broadcast_shape(shape, ps.shape(leaf)[: leaf.shape.rank - own])
    shape = ps.concat([ps.reshape(sample_shape, [-1]), shape], axis=0)
    leaves = [with_batch_axes(leaf, ps.size(shape), own) for leaf, own in zip(leaves, ndims)]
    return shape, tf.nest.pack_sequence_as(condition, leaves)


def _broadcast_to(x: tf.Tensor, batch_shape: Any, event_ndims: int) -> tf.Tensor:
    shape = ps.concat([batch_shape, ps.shape(x)[x.shape.rank - event_ndims :]], axis=0)
    static = tf.get_static_value(shape)
    return x if static is not None and tuple(static) == tuple(x.shape) else tf.broadcast_to(x, shape)
