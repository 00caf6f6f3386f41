"""`FlowBijector`: one fused pass per direction, and the log-det of every dimension. `Composite`: one made of others."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows import representation
from tfp_dimflows.bijectors import walk
from tfp_dimflows.bijectors.cache import FreshCache, Origin
from tfp_dimflows.bijectors.conditions import from_lists
from tfp_dimflows.bijectors.log_dets import fill, sum_event
from tfp_dimflows.upstream import nest_util


class FlowBijector(representation.DescribedByTFP, tfb.Bijector):
    """Base of every bijector of this package: a bijector that knows the log-det of each dimension.

    A family writes two primitives, each of which returns the value *and* the log-dets from one pass:

    * `_forward_and_log_det_per_dim(x, condition) -> y, log_det` with `log_det` in the frame (shape and order) of `x`,
    * `_inverse_and_log_det_per_dim(y, condition) -> x, log_det` with `log_det` in the frame of `y`.

    The log-det may be any shape that broadcasts to its frame, and sums over the event to log abs det of the Jacobian of
    that direction. From the two, this class provides all of TFP's methods, so that a conditioner network runs once per
    direction and per `log_prob`, in eager mode, `tf.function` and XLA, and never returns a value from before a variable
    was updated. (Under a gradient tape that has nothing to record, as in a flow without trainable variables, `log_prob` takes
    two passes; and a value that an outer tape recorded is not recorded again by an inner one: give it a new tensor.)

    `condition` is a tensor or a structure of tensors; a class that can use one says so by `uses_condition`. A bijector
    that moves dimensions (its output's frame is not its input's) also writes `_transport_forward` and
    `_transport_inverse`, which carry a tensor of per-dimension numbers along.

    Two instances are equal only if they are the same object, since they may hold different variables.

    Args:
      forward_min_event_ndims: number of event axes of a latent value.
      inverse_min_event_ndims: number of event axes of a data value; default: the same.
      parameters: the constructor's arguments, for `copy` and for what is printed.
      **kwargs: `name` and others, as in `tfb.Bijector`.

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

    _cache = FreshCache(forward_name="_cached_forward", inverse_name="_cached_inverse")

    def __init__(
        self,
        *,
        forward_min_event_ndims: Any,
        inverse_min_event_ndims: Any = None,
        parameters: dict | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            forward_min_event_ndims=forward_min_event_ndims,
            inverse_min_event_ndims=forward_min_event_ndims if inverse_min_event_ndims is None else inverse_min_event_ndims,
            parameters=parameters and {k: v for k, v in parameters.items() if k not in ("self", "__class__")},
            **kwargs,
        )

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "_uses_condition" in vars(cls):
            raise TypeError(f"{cls.__name__}: `_uses_condition` is now `uses_condition`; rename it")

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
    def uses_condition(self) -> bool:
        """Whether a condition makes a difference."""
        return False

    def _route(self, condition: Any, kwargs: dict) -> Any:
        """Merges the condition with other keyword arguments; composites that route by name override this."""
        if kwargs:
            raise TypeError(f"{self.name}: got unexpected keyword arguments {sorted(kwargs)}, knows only `condition`")
        if condition is not None and not self.uses_condition:
            raise ValueError(f"{self.name}: got a condition, but no part of this bijector can use one")
        return from_lists(condition)

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
        return fill(self._inverse_and_log_det_per_dim(y, self._route(condition, kwargs))[1], y)

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
        return fill(self._forward_and_log_det_per_dim(x, self._route(condition, kwargs))[1], x)

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
        return y, {"ildj": -fldj, "origin": Origin(self)}

    def _cached_inverse(self, y: Any, condition: Any = None, **kwargs: Any) -> tuple[Any, dict]:
        condition = self._route(condition, kwargs)
        x, ildj = self._inverse_and_log_det(y, condition, self.inverse_min_event_ndims)
        return x, {"ildj": ildj, "origin": Origin(self)}

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


class Composite(FlowBijector):
    """Base of bijectors made of others, which write what happens to a value once for each direction.

    A subclass writes `_walk_forward(x, condition)` and `_walk_inverse(y, condition)`: both are given a `dfb.walk.Walk`, send it
    through parts, split it, join it, and return it. The value with the summed log-det, the value with the log-det of every
    dimension, and where the dimensions go follow from the two. Where the walk has no value (`value is None`), numbers move
    alone, and there is no condition. If a part can use a condition, `uses_condition` says so.

    `_shapes` is a bijector whose event shapes are the composite's, or None if it keeps them.

    #### Example

    >>> class Twice(dfb.Composite):
    ...     def __init__(self, bijector, name="twice"):
    ...         parameters = dict(locals())
    ...         self._bijector = bijector
    ...         super().__init__(forward_min_event_ndims=1, parameters=parameters, name=name)
    ...
    ...     @property
    ...     def uses_condition(self):
    ...         return dfb.conditions.uses_condition(self._bijector)
    ...
    ...     def _walk_forward(self, x, condition):
    ...         return x.forward(self._bijector, condition).forward(self._bijector, condition)
    ...
    ...     def _walk_inverse(self, y, condition):
    ...         return y.inverse(self._bijector, condition).inverse(self._bijector, condition)
    >>> Twice(tfb.Scale([1.0, 2.0])).inverse_log_det_per_dim([3.0, 3.0]).numpy().round(3)
    array([ 0.   , -1.386], dtype=float32)
    """

    _shapes: Any = None

    def _walk_forward(self, x: Any, condition: Any) -> Any:
        raise NotImplementedError(f"{self.name}: `_walk_forward` is not implemented")

    def _walk_inverse(self, y: Any, condition: Any) -> Any:
        raise NotImplementedError(f"{self.name}: `_walk_inverse` is not implemented")

    def _forward_and_log_det(self, x: Any, condition: Any, event_ndims: Any) -> tuple[Any, tf.Tensor]:
        return self._summed(x, condition, event_ndims, "forward")

    def _inverse_and_log_det(self, y: Any, condition: Any, event_ndims: Any) -> tuple[Any, tf.Tensor]:
        return self._summed(y, condition, event_ndims, "inverse")

    def _summed(self, value: Any, condition: Any, event_ndims: Any, direction: str) -> tuple[Any, tf.Tensor]:
        end = self._end(walk.Summed(value, event_ndims), condition, direction)
        return end.value, end.log_det

    def _forward_and_log_det_per_dim(self, x: Any, condition: Any) -> tuple[Any, Any]:
        end = self._end(walk.PerDimension(x), condition, "forward")
        return end.value, self._transport_inverse(end.numbers)

    def _inverse_and_log_det_per_dim(self, y: Any, condition: Any) -> tuple[Any, Any]:
        end = self._end(walk.PerDimension(y), condition, "inverse")
        return end.value, self._transport_forward(end.numbers)

    def _transport_forward(self, per_dim: Any) -> Any:
        return self._end(walk.Transported(per_dim), None, "forward").numbers

    def _transport_inverse(self, per_dim: Any) -> Any:
        return self._end(walk.Transported(per_dim), None, "inverse").numbers

    def _end(self, start: walk.AnyWalk, condition: Any, direction: str) -> walk.AnyWalk:
        """Where a walk in a direction ends."""
        end = getattr(self, f"_walk_{direction}")(start, condition)
        if not isinstance(end, type(start)):
            raise TypeError(
                f"{self.name}: `_walk_{direction}` returned a {type(end).__name__}, needs to return the walk at its end"
            )
        return end

    def _check_event(self, shape: tf.TensorShape, event_shape: Sequence[int] | None) -> None:
        """Raises a ValueError unless values have this event shape, if it is known."""
        if event_shape is not None and tuple(shape[-len(event_shape) :]) != tuple(event_shape):
            raise ValueError(f"{self.name}: got values of shape {shape}, needs events of shape {list(event_shape)}")

    def _forward_event_shape(self, shape: Any) -> Any:
        return self._shape_by("forward_event_shape", shape)

    def _inverse_event_shape(self, shape: Any) -> Any:
        return self._shape_by("inverse_event_shape", shape)

    def _forward_event_shape_tensor(self, shape: Any) -> Any:
        return self._shape_by("forward_event_shape_tensor", shape)

    def _inverse_event_shape_tensor(self, shape: Any) -> Any:
        return self._shape_by("inverse_event_shape_tensor", shape)

    def _shape_by(self, method: str, shape: Any) -> Any:
        """What a method of `_shapes` makes of an event shape."""
        if self._shapes is None:
            return shape
        try:
            return getattr(self._shapes, method)(shape)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


@walk.value_and_log_det.register
def _value_and_log_det(
    bijector: FlowBijector, value: Any, direction: str, event_ndims: Any, kwargs: dict[str, Any]
) -> tuple[Any, tf.Tensor]:
    return getattr(bijector, f"_{direction}_and_log_det")(value, _routed(bijector, kwargs), event_ndims)


@walk.value_and_log_det_per_dim.register
def _value_and_log_det_per_dim(bijector: FlowBijector, value: Any, direction: str, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return getattr(bijector, f"_{direction}_and_log_det_per_dim")(value, _routed(bijector, kwargs))


@walk.transport.register
def _transport(bijector: FlowBijector, numbers: Any, direction: str) -> Any:
    return getattr(bijector, f"_transport_{direction}")(numbers)


def _routed(bijector: FlowBijector, kwargs: dict[str, Any]) -> Any:
    return bijector._route(kwargs.get("condition"), {key: value for key, value in kwargs.items() if key != "condition"})


def to_tensor(value: Any, dtype: Any) -> Any:
    """Converts a value as `tfb.Bijector`'s own methods do; `dtype` (a structure of dtypes) shows which lists are parts."""
    return nest_util.convert_to_nested_tensor(value, dtype_hint=dtype, dtype=dtype, allow_packing=True)


def event_ndims_static(event_ndims: Any, name: str) -> int:
    """Checks an `event_ndims` argument: 1 for vectors, 3 for images."""
    if event_ndims not in (1, 3):
        raise ValueError(f"{name}: got event_ndims={event_ndims!r}, needs 1 (vectors) or 3 (images)")
    return event_ndims
