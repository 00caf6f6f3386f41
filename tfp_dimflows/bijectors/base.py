"""`FlowBijector`: one fused pass per direction, and the log-det of every dimension."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.types.experimental import TensorLike
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.keras_bridge import adapting
from tfp_dimflows.upstream import cache_util, nest_util, record, samplers
from tfp_dimflows.upstream import prefer_static as ps


class _FreshCache(cache_util.BijectorCacheWithGreedyAttrs):
    """TFP's cache, minus every entry that would be stale or out of reach.

    A direction's value and log-dets enter together, so a conditioner runs once. An entry is used only while a
    recomputation would give the same tensors: in the graph that made it, before any assignment there; eagerly, while
    no variable of the bijector has changed and, under a gradient tape, if that tape recorded it.
    """

    def _get_or_create_edge(self, input: Any, forward_name: str, kwargs: dict) -> Any:  # noqa: A002 (TFP's name)
        edge = super()._get_or_create_edge(input, forward_name, kwargs)
        if edge.attributes and not self._is_current(edge):
            edge = edge._replace(output_ref=None, attributes={}, dependencies=None)
            self.storage[edge.input_ref] = edge
        return edge

    def _is_current(self, edge: Any) -> bool:
        if "origin" not in edge.attributes:
            return False
        output = tf.nest.flatten(edge.output_ref()) if edge.output_ref else []
        return edge.attributes["origin"].is_current([*output, edge.attributes["ildj"]])


class _Origin:
    """Where and under which variable values a cached pass was made."""

    def __init__(self, bijector: tfb.Bijector):
        self._adapting = adapting()
        self._graph = None
        if tf.executing_eagerly():
            # Reading is O(1): the value shares the variable's buffer until the variable is assigned to.
            self._values = [(v, v.read_value()) for v in bijector.variables]
        else:
            self._graph = tf.compat.v1.get_default_graph()
            self._num_operations = len(self._graph.get_operations())

    def is_current(self, tensors: list[tf.Tensor]) -> bool:
        if adapting() and not self._adapting:
            return False
        if record.could_possibly_record() and not record.should_record_backprop(tensors):
            return False
        if tf.executing_eagerly():
            return self._graph is None and all(bool(tf.reduce_all(v == value)) for v, value in self._values)
        if self._graph is not tf.compat.v1.get_default_graph():
            return False
        return not any(_may_assign(operation) for operation in self._graph.get_operations()[self._num_operations :])


_HARMLESS = ("ReadVariableOp", "VarHandleOp", "ResourceGather", "Placeholder", "Random", "Stateless", "Assert", "Print")


def _may_assign(operation: tf.Operation) -> bool:
    return operation.op_def.is_stateful and not operation.type.startswith(_HARMLESS)


class FlowBijector(tfb.Bijector):
    """Base of every bijector of this package: a bijector that knows the log-det of each dimension.

    A family writes two primitives, each of which returns the value *and* the log-dets from one pass:

    * `_forward_and_log_det_per_dim(x, condition) -> y, log_det` with `log_det` in the frame (shape and order) of `x`,
    * `_inverse_and_log_det_per_dim(y, condition) -> x, log_det` with `log_det` in the frame of `y`.

    The log-det may be any shape that broadcasts to its frame, and sums over the event to log abs det of the Jacobian of
    that direction. From the two, this class provides all of TFP's methods, so that a conditioner network runs once per
    direction and per `log_prob`, in eager mode, `tf.function` and XLA, and never returns a value from before a variable
    was updated. (Under a gradient tape that has nothing to record, as in a flow without trainable variables, `log_prob` takes
    two passes; and a value that an outer tape recorded is not recorded again by an inner one: give it a new tensor.)

    `condition` is a tensor or a structure of tensors; a class that can use one says so by `_uses_condition`. A bijector
    that moves dimensions (its output's frame is not its input's) also writes `_transport_forward` and
    `_transport_inverse`, which carry a tensor of per-dimension numbers along.

    Two instances are equal only if they are the same object, since they may hold different variables.

    Args:
      forward_min_event_ndims: number of event axes of a latent value.
      inverse_min_event_ndims: number of event axes of a data value; default: the same.
      dtype: as in `tfb.Bijector`.
      is_constant_jacobian: as in `tfb.Bijector`.
      validate_args: as in `tfb.Bijector`.
      parameters: the constructor's arguments, for `copy`.
      name: the name of the operations.

    #### Example

    >>> class Doubling(dfb.FlowBijector):
    ...     def __init__(self, name="doubling"):
    ...         super().__init__(forward_min_event_ndims=1, parameters=dict(locals()), name=name)
    ...
    ...     def _forward_and_log_det_per_dim(self, x, condition):
    ...         return 2.0 * x, tf.math.log(2.0)
    ...
    ...     def _inverse_and_log_det_per_dim(self, y, condition):
    ...         return y / 2.0, -tf.math.log(2.0)
    >>> Doubling().inverse_log_det_per_dim(tf.zeros([3])).numpy().round(4)
    array([-0.6931, -0.6931, -0.6931], dtype=float32)
    """

    _cache = _FreshCache(forward_name="_cached_forward", inverse_name="_cached_inverse")

    def __init__(
        self,
        *,
        forward_min_event_ndims: Any,
        inverse_min_event_ndims: Any = None,
        dtype: Any = None,
        is_constant_jacobian: bool = False,
        validate_args: bool = False,
        parameters: dict | None = None,
        name: str | None = None,
    ):
        if inverse_min_event_ndims is None:
            inverse_min_event_ndims = forward_min_event_ndims
        if parameters is not None:
            parameters = {k: v for k, v in parameters.items() if k not in ("self", "__class__")}
        super().__init__(
            forward_min_event_ndims=forward_min_event_ndims,
            inverse_min_event_ndims=inverse_min_event_ndims,
            dtype=dtype,
            is_constant_jacobian=is_constant_jacobian,
            validate_args=validate_args,
            parameters=parameters,
            name=name,
        )

    # What a family writes.

    def _forward_and_log_det_per_dim(self, x: Any, condition: Any) -> tuple[Any, Any]:
        raise NotImplementedError(f"{self.name}: `_forward_and_log_det_per_dim` is not implemented")

    def _inverse_and_log_det_per_dim(self, y: Any, condition: Any) -> tuple[Any, Any]:
        raise NotImplementedError(f"{self.name}: `_inverse_and_log_det_per_dim` is not implemented")

    def _transport_forward(self, per_dim: Any) -> Any:
        return per_dim

    def _transport_inverse(self, per_dim: Any) -> Any:
        return per_dim

    @property
    def _uses_condition(self) -> bool:
        return False

    def _route(self, condition: Any, kwargs: dict) -> Any:
        """Merges the condition with other keyword arguments; composites that route by name override this."""
        if kwargs:
            raise TypeError(f"{self.name}: got unexpected keyword arguments {sorted(kwargs)}, knows only `condition`")
        if condition is not None and not self._uses_condition:
            raise ValueError(f"{self.name}: got a condition, but no part of this bijector can use one")
        return condition

    # The per-dimension hook.

    def inverse_log_det_per_dim(self, y: Any, condition: Any = None, **kwargs: Any) -> tf.Tensor:
        """Contribution of every dimension of `y` to log abs det of the Jacobian of `inverse`.

        Args:
          y: data, `batch + event`.
          condition: tensor or structure, if the bijector is conditional.
          **kwargs: keyword arguments for parts addressed by name (composites only).

        Returns:
          A tensor of the shape of `y`; its sum over the event is `inverse_log_det_jacobian(y)`.

        Raises:
          NotImplementedError: if a part has no per-dimension decomposition; the message names it.
          ValueError: if a condition is given that no part can use.
        """
        y = to_tensor(y, self.forward_dtype())
        return _fill(self._inverse_and_log_det_per_dim(y, self._route(condition, kwargs))[1], y)

    def forward_log_det_per_dim(self, x: Any, condition: Any = None, **kwargs: Any) -> tf.Tensor:
        """Contribution of every dimension of `x` to log abs det of the Jacobian of `forward`.

        Args:
          x: latent values, `batch + event`.
          condition: tensor or structure, if the bijector is conditional.
          **kwargs: keyword arguments for parts addressed by name (composites only).

        Returns:
          A tensor of the shape of `x`; its sum over the event is `forward_log_det_jacobian(x)`.

        Raises:
          NotImplementedError: if a part has no per-dimension decomposition; the message names it.
          ValueError: if a condition is given that no part can use.
        """
        x = to_tensor(x, self.inverse_dtype())
        return _fill(self._forward_and_log_det_per_dim(x, self._route(condition, kwargs))[1], x)

    # What TFP asks for.

    def _forward_and_log_det(self, x: Any, condition: Any, event_ndims: Any) -> tuple[Any, tf.Tensor]:
        y, log_det = self._forward_and_log_det_per_dim(x, condition)
        return y, sum_event(log_det, x, event_ndims)

    def _inverse_and_log_det(self, y: Any, condition: Any, event_ndims: Any) -> tuple[Any, tf.Tensor]:
        x, log_det = self._inverse_and_log_det_per_dim(y, condition)
        return x, sum_event(log_det, y, event_ndims)

    def _cached_forward(self, x: Any, condition: Any = None, **kwargs: Any) -> tuple[Any, dict]:
        condition = self._route(condition, kwargs)
        y, fldj = self._forward_and_log_det(x, condition, self.forward_min_event_ndims)
        return y, {"ildj": -fldj, "origin": _Origin(self)}

    def _cached_inverse(self, y: Any, condition: Any = None, **kwargs: Any) -> tuple[Any, dict]:
        condition = self._route(condition, kwargs)
        x, ildj = self._inverse_and_log_det(y, condition, self.inverse_min_event_ndims)
        return x, {"ildj": ildj, "origin": _Origin(self)}

    def _forward(self, x: Any, **kwargs: Any) -> Any:
        return self._cached_forward(x, **kwargs)[0]

    def _inverse(self, y: Any, **kwargs: Any) -> Any:
        return self._cached_inverse(y, **kwargs)[0]

    def _forward_log_det_jacobian(self, x: Any, **kwargs: Any) -> tf.Tensor:
        return -self._cached_forward(x, **kwargs)[1]["ildj"]

    def _inverse_log_det_jacobian(self, y: Any, **kwargs: Any) -> tf.Tensor:
        return self._cached_inverse(y, **kwargs)[1]["ildj"]

    @classmethod
    def _parameter_properties(cls, dtype: Any) -> dict:
        return {}

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


_PROBE_SEEDS: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("probe_seeds", default=None)


@contextlib.contextmanager
def probes_from(seed: TensorLike | None) -> Iterator[None]:
    """Context in which stochastic log-dets draw their probes from a stateless seed, each from one of its own."""
    token = _PROBE_SEEDS.set([samplers.sanitize_seed(seed, salt="probes"), 0])
    try:
        yield
    finally:
        _PROBE_SEEDS.reset(token)


@contextlib.contextmanager
def without_probes() -> Iterator[None]:
    """Context in which every probe is drawn anew, whatever `probes_from` is around it."""
    token = _PROBE_SEEDS.set(None)
    try:
        yield
    finally:
        _PROBE_SEEDS.reset(token)


def probe_seed(seed: TensorLike | None = None) -> TensorLike | None:
    """The seed that is given, else the next of `probes_from`; outside it None, which draws anew at every call."""
    state = _PROBE_SEEDS.get()
    if seed is not None or state is None:
        return seed
    state[1] += 1
    return samplers.fold_in(state[0], state[1])


def to_tensor(value: Any, dtype: Any) -> Any:
    """Converts a value as `tfb.Bijector`'s own methods do; `dtype` (a structure of dtypes) shows which lists are parts."""
    return nest_util.convert_to_nested_tensor(value, dtype_hint=dtype, dtype=dtype, allow_packing=True)


def _fill(log_det: Any, value: Any) -> Any:
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


def event_ndims_static(event_ndims: Any, name: str) -> int:
    """Checks an `event_ndims` argument: 1 for vectors, 3 for images."""
    if event_ndims not in (1, 3):
        raise ValueError(f"{name}: got event_ndims={event_ndims!r}, needs 1 (vectors) or 3 (images)")
    return event_ndims


def vector_condition(condition: Any, value: tf.Tensor, event_ndims: int, name: str) -> tf.Tensor | None:
    """Checks a composite's condition that `append_condition` will be given: one vector for each event of `value`.

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
