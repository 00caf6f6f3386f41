"""`Chain`: TFP's Chain, with one `condition` for all its parts and one fused pass."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors import base, per_dimension, recompute


class _Routed(NamedTuple):
    """A condition for all parts, and keyword arguments for parts addressed by name."""

    condition: Any
    by_name: dict


class Chain(base.FlowBijector):
    """Composition of bijectors like TFP's, `forward(x) = b_0(b_1(... b_n(x)))`, with `condition=` broadcast to all parts.

    Parts may be bijectors of this package, of TFP, or a user's own. `condition` reaches every part that can use it, also inside
    nested composites; other keyword arguments go to parts by name, as in `tfb.Chain`. Parts of this package are evaluated in
    one fused pass with their log-dets.

    With `memory="recompute"` the gradients need the result of a pass only, not the activations of its networks: what each part
    was given is rebuilt from its result by the part's other direction, and the part is evaluated there once more. The memory
    of training then hardly grows with the number of parts. A coupling, whose network sees the same in both directions, costs
    one more evaluation of it, about a third of a training step; another part two.

    * It saves inside a `tf.function` only, compiled with XLA or not, as `fit` trains. Eager passes, and those of the
      per-dimension hook, are the ordinary ones.
    * The gradients are those at the rebuilt values, whose rounding errors (and errors of iterative solvers) add up over the
      parts. Values in half precision lose too much.
    * A part must evaluate to the same twice. Dropout, batch normalisation in training, power iterations, and probes without a
      seed of their own are refused when the function is traced.
    * The parts of a chain among the parts count as this one's; a `Scan` has a `memory` of its own. Second derivatives are
      right, but keep the activations.

    Args:
      bijectors: sequence of bijectors; the last is applied first in `forward`.
      memory: `"keep"` or `"recompute"` what the gradients need.
      validate_args: as in `tfb.Bijector`.
      name: the name of the operations.

    Raises:
      ValueError: for another `memory`, or a part that cannot be evaluated twice.

    References for recomputation: Gomez, Ren, Urtasun, Grosse, "The reversible residual network: backpropagation without storing
    activations", 2017.

    #### Example

    >>> flow = dfb.Chain([tfb.Exp(), dfb.ActNorm(2)])
    >>> flow.inverse_log_det_per_dim([1.0, 2.0]).numpy().round(3)
    array([ 0.   , -0.693], dtype=float32)
    """

    def __init__(
        self, bijectors: Sequence[tfb.Bijector], memory: str = "keep", validate_args: bool = False, name: str = "chain"
    ):
        parameters = dict(locals())
        self._memory = recompute.checked_memory(memory, "Chain")
        # TFP's Chain knows how shapes, dtypes and event ranks propagate; only these are asked of it.
        self._shapes = tfb.Chain(list(bijectors), validate_args=validate_args)
        self._bijectors = list(bijectors)
        super().__init__(
            forward_min_event_ndims=self._shapes.forward_min_event_ndims,
            inverse_min_event_ndims=self._shapes.inverse_min_event_ndims,
            dtype=self._shapes.dtype,
            is_constant_jacobian=self._shapes.is_constant_jacobian,
            validate_args=validate_args,
            parameters=parameters,
            name=name,
        )

    @property
    def bijectors(self) -> list[tfb.Bijector]:
        """The parts, as given."""
        return list(self._bijectors)

    @property
    def _uses_condition(self) -> bool:
        return any(per_dimension.condition_kwargs(b, True) for b in self._bijectors)

    @property
    def _is_permutation(self) -> bool:
        return self._shapes._is_permutation

    @property
    def _is_injective(self) -> bool:
        return self._shapes._is_injective

    def _route(self, condition: Any, kwargs: dict[str, Any]) -> _Routed:
        if isinstance(condition, _Routed):
            return condition
        unknown = set(kwargs) - {b.name for b in self._bijectors}
        super()._route(condition, {k: kwargs[k] for k in unknown})
        return _Routed(condition, kwargs)

    def _parts(self, routed: _Routed, direction: str) -> list[tuple[tfb.Bijector, dict[str, Any]]]:
        order = self._bijectors if direction == "inverse" else self._bijectors[::-1]
        return [(b, per_dimension.condition_kwargs(b, routed.condition) | routed.by_name.get(b.name, {})) for b in order]

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return per_dimension.chain_pass(self._parts(self._route(condition, {}), "forward"), x, "forward")

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return per_dimension.chain_pass(self._parts(self._route(condition, {}), "inverse"), y, "inverse")

    def _forward_and_log_det(self, x: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        return self._total(x, self._route(condition, {}), event_ndims, "forward")

    def _inverse_and_log_det(self, y: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        return self._total(y, self._route(condition, {}), event_ndims, "inverse")

    def _all_parts(self, routed: _Routed, direction: str) -> list[tuple[tfb.Bijector, dict[str, Any]]]:
        """As `_parts`, with those of chains in their place."""
        parts = []
        for bijector, kwargs in self._parts(routed, direction):
            if isinstance(bijector, Chain):
                parts += bijector._all_parts(bijector._route(kwargs.pop("condition", None), kwargs), direction)
            else:
                parts.append((bijector, kwargs))
        return parts

    def _total(self, value: tf.Tensor, routed: _Routed, event_ndims: int, direction: str) -> tuple[tf.Tensor, tf.Tensor]:
        recomputes = self._memory == "recompute" and not tf.executing_eagerly()
        if recomputes and self._all_parts(routed, direction):
            return recompute.value_and_log_det(self.name, self._all_parts, value, routed, event_ndims, direction)
        fused = getattr(per_dimension, f"{direction}_and_log_det")
        log_dets = []
        for bijector, kwargs in self._parts(routed, direction):
            value, log_det = fused(bijector, value, event_ndims, **kwargs)
            log_dets.append(log_det)
            event_ndims = getattr(bijector, f"{direction}_event_ndims")(event_ndims)
        if not log_dets:
            log_dets = [base.sum_event(tf.zeros([], base.log_det_dtype(value.dtype)), value, event_ndims)]
        return value, sum(log_dets)

    def _transport_forward(self, per_dim: tf.Tensor) -> tf.Tensor:
        return per_dimension.transport_forward(self._shapes, per_dim)

    def _transport_inverse(self, per_dim: tf.Tensor) -> tf.Tensor:
        return per_dimension.transport_inverse(self._shapes, per_dim)

    def _forward_event_shape(self, shape: tf.TensorShape) -> tf.TensorShape:
        return self._shapes.forward_event_shape(shape)

    def _inverse_event_shape(self, shape: tf.TensorShape) -> tf.TensorShape:
        return self._shapes.inverse_event_shape(shape)

    def _forward_event_shape_tensor(self, shape: tf.Tensor) -> tf.Tensor:
        return self._shapes.forward_event_shape_tensor(shape)

    def _inverse_event_shape_tensor(self, shape: tf.Tensor) -> tf.Tensor:
        return self._shapes.inverse_event_shape_tensor(shape)

    def _forward_dtype(self, dtype: Any, **kwargs: Any) -> Any:
        return self._shapes.forward_dtype(dtype)

    def _inverse_dtype(self, dtype: Any, **kwargs: Any) -> Any:
        return self._shapes.inverse_dtype(dtype)
