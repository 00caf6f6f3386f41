"""Log-dets of dimensions: in full, and summed over events."""

from typing import Any

import tensorflow as tf

from tfp_dimflows.upstream import prefer_static as ps


def fill(log_det: Any, value: Any) -> Any:
    """Broadcasts per-dimension log-dets in full to the shape of `value` (structures alike)."""
    return tf.nest.map_structure(_fill_part, log_det, value)


def _fill_part(log_det: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    log_det = tf.cast(log_det, log_det_dtype(value.dtype))
    if value.shape.is_fully_defined() and log_det.shape == value.shape:
        return log_det
    return tf.broadcast_to(log_det, ps.shape(value))


def log_det_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype of log-dets of values of `dtype`: never less than float32."""
    return tf.float32 if dtype in (tf.float16, tf.bfloat16) else tf.as_dtype(dtype)


def sum_event(log_det: Any, value: Any, event_ndims: Any) -> tf.Tensor:
    """Sums per-dimension log-dets over the last `event_ndims` axes of `value` (over all parts of a structure)."""
    parts = zip(*(tf.nest.flatten(structure) for structure in (log_det, value, event_ndims)), strict=True)
    return sum(_sum_last(tf.cast(d, log_det_dtype(v.dtype)), ps.shape(v), n) for d, v, n in parts)


def _sum_last(log_det: tf.Tensor, shape: tf.Tensor, ndims: int) -> tf.Tensor:
    """The sum over the last `ndims` axes of `log_det` broadcast to `shape`, at the cost of what `log_det` holds."""
    rank, own_rank = int(ps.rank_from_shape(shape)), log_det.shape.rank
    summed = min(ndims, own_rank)
    own = ps.concat([[1] * (ndims - summed), ps.shape(log_det)[own_rank - summed :]], axis=0)
    repeats = ps.cast(ps.reduce_prod(ps.where(ps.equal(own, 1), shape[rank - ndims :], 1)), log_det.dtype)
    total = tf.reduce_sum(log_det, axis=list(range(-summed, 0))) if summed else log_det
    return tf.broadcast_to(total * repeats, shape[: rank - ndims])


def add(a: Any, b: Any) -> Any:
    """The sum of two structures, in the dtypes of the first."""
    total = [u + tf.cast(v, u.dtype) for u, v in zip(tf.nest.flatten(a), tf.nest.flatten(b))]
    return tf.nest.pack_sequence_as(a, total)


def zeros(value: Any) -> Any:
    """The log-dets of dimensions that only move: broadcast to those of `value`."""
    return tf.nest.map_structure(lambda v: tf.zeros([], log_det_dtype(v.dtype)), value)
