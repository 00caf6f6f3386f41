"""`Chain`: TFP's Chain, with one `condition` for all its parts and one fused pass."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors import base, recompute
from tfp_dimflows.bijectors.conditions import condition_kwargs, uses_condition
from tfp_dimflows.bijectors.walk import Walk, along
from tfp_dimflows.upstream import TFPChain


class _Routed(NamedTuple):
    """A condition for all parts, and keyword arguments for parts addressed by name."""

    condition: Any
    by_name: dict


class Chain(base.Composite):
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

    def __init__(self, bijectors: Sequence[tfb.Bijector], memory: str = "keep", name: str = "chain"):
        parameters = dict(locals())
        self._memory = recompute.checked_memory(memory, "Chain")
        # TFP's Chain knows how shapes, dtypes and event ranks propagate; only these are asked of it.
        self._shapes = tfb.Chain(list(bijectors))
        self._bijectors = list(bijectors)
        super().__init__(
            forward_min_event_ndims=self._shapes.forward_min_event_ndims,
            inverse_min_event_ndims=self._shapes.inverse_min_event_ndims,
            dtype=self._shapes.dtype,
            is_constant_jacobian=self._shapes.is_constant_jacobian,
            parameters=parameters,
            name=name,
        )

    @property
    def bijectors(self) -> list[tfb.Bijector]:
        """The parts, as given."""
        return list(self._bijectors)

    @property
    def uses_condition(self) -> bool:
        """Whether some part can use a condition."""
        return any(uses_condition(b) for b in self._bijectors)

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
        """The parts in the order in which a direction applies them, each with its keyword arguments."""
        order = self._bijectors if direction == "inverse" else self._bijectors[::-1]
        return [(b, condition_kwargs(b, routed.condition) | routed.by_name.get(b.name, {})) for b in order]

    def _walk_forward(self, x: Walk, condition: Any) -> Walk:
        return along(self._parts(self._route(condition, {}), "forward"), x, "forward")

    def _walk_inverse(self, y: Walk, condition: Any) -> Walk:
        return along(self._parts(self._route(condition, {}), "inverse"), y, "inverse")

    def all_parts(self, condition: Any, direction: str) -> list[tuple[tfb.Bijector, dict[str, Any]]]:
        """The parts in the order in which a direction applies them, those of chains in their place, with keyword arguments."""
        parts = []
        for bijector, kwargs in self._parts(self._route(condition, {}), direction):
            if isinstance(bijector, Chain):
                parts += bijector.all_parts(bijector._route(kwargs.pop("condition", None), kwargs), direction)
            else:
                parts.append((bijector, kwargs))
        return parts

    def _summed(self, value: tf.Tensor, condition: Any, event_ndims: int, direction: str) -> tuple[tf.Tensor, tf.Tensor]:
        if self._memory == "recompute" and not tf.executing_eagerly() and self.all_parts(condition, direction):
            return recompute.value_and_log_det(self.name, self.all_parts, value, condition, event_ndims, direction)
        return super()._summed(value, condition, event_ndims, direction)

    def _forward_dtype(self, dtype: Any, **kwargs: Any) -> Any:
        return self._shapes.forward_dtype(dtype)

    def _inverse_dtype(self, dtype: Any, **kwargs: Any) -> Any:
        return self._shapes.inverse_dtype(dtype)


def flattened(bijector: tfb.Bijector) -> list[tfb.Bijector]:
    """The parts of nested chains, this package's and TFP's, from the data to the latent values; another bijector itself."""
    if isinstance(bijector, (Chain, TFPChain)):
        return [part for nested in bijector.bijectors for part in flattened(nested)]
    return [bijector]
