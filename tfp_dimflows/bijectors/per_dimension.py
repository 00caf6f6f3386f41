"""The log-det of every dimension for any bijector: TFP's own by rules, ours by their primitives.

Every bijector is asked through four functions, each dispatched on its class:

* `inverse_and_log_det_per_dim(bijector, y)` and `forward_and_log_det_per_dim(bijector, x)`: value and per-dimension
  log-det in one pass, the log-det in the frame of the argument;
* `transport_forward(bijector, t)` and `transport_inverse(bijector, t)`: carry one number per dimension from the frame
  of the bijector's input to that of its output and back, without changing the numbers.

A composite adds up what its parts contribute: each part's log-dets are carried back into the frame of the argument.

The contribution of dimension i is the i-th diagonal entry of log J, with J the Jacobian of the direction in question:

* element-wise and triangular bijectors: log |J_ii|, exactly;
* bijectors that only move dimensions: zero, and what the others contribute moves along;
* dense linear maps: `dense.polar`, the diagonal of log (J^T J)^(1/2), which is zero where J is orthogonal; a dense map
  leaves the dimensions in their places;
* `tfb.FFJORD`: the integral of the diagonal of the velocity's Jacobian along the trajectory.

A bijector that embeds its argument in a larger space, or maps one matrix to another as a whole, has no such
decomposition: asking for it raises a `NotImplementedError`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors import base, dense
from tfp_dimflows.upstream import (
    TFPBlockwise,
    TFPChain,
    TFPComposition,
    TFPInvert,
    TFPJointMap,
    nest,
    nest_util,
    tfp_glow,
)


def inverse_log_det_per_dim(bijector: tfb.Bijector, y: Any, **kwargs: Any) -> Any:
    """Contribution of every dimension of `y` to the inverse log-det Jacobian, for any bijector.

    Args:
      bijector: a bijector of this package, of TFP, or one with a registered rule (`register_log_det_per_dim`).
      y: data (a structure for multipart bijectors).
      **kwargs: as for `bijector.inverse`, for example `condition=`.

    Returns:
      A tensor (or structure) of the shape of `y`; its sum over the event is the inverse log-det Jacobian.

    Raises:
      NotImplementedError: if no decomposition exists; the message names the bijector and says how to register a rule.

    #### Example

    >>> dimflows.inverse_log_det_per_dim(tfb.Scale([1.0, 2.0, 4.0]), tf.zeros([3])).numpy().round(3)
    array([-0.   , -0.693, -1.386], dtype=float32)
    """
    if isinstance(bijector, base.FlowBijector):
        return bijector.inverse_log_det_per_dim(y, **kwargs)
    y = _to_tensors(y, bijector.forward_dtype(**kwargs))
    return base._fill(inverse_and_log_det_per_dim(bijector, y, **kwargs)[1], y)


def forward_log_det_per_dim(bijector: tfb.Bijector, x: Any, **kwargs: Any) -> Any:
    """Contribution of every dimension of `x` to the forward log-det Jacobian, for any bijector.

    Args:
      bijector: a bijector of this package, of TFP, or one with a registered rule (`register_log_det_per_dim`).
      x: latent values (a structure for multipart bijectors).
      **kwargs: as for `bijector.forward`, for example `condition=`.

    Returns:
      A tensor (or structure) of the shape of `x`; its sum over the event is the forward log-det Jacobian.

    Raises:
      NotImplementedError: if no decomposition exists; the message names the bijector and says how to register a rule.

    #### Example

    >>> dimflows.forward_log_det_per_dim(tfb.Exp(), tf.constant([1.0, -2.0])).numpy()
    array([ 1., -2.], dtype=float32)
    """
    if isinstance(bijector, base.FlowBijector):
        return bijector.forward_log_det_per_dim(x, **kwargs)
    x = _to_tensors(x, bijector.inverse_dtype(**kwargs))
    return base._fill(forward_and_log_det_per_dim(bijector, x, **kwargs)[1], x)


def register_log_det_per_dim(cls: type) -> Callable:
    """Decorator that registers the per-dimension log-det of a user's own bijector class (and its subclasses).

    The decorated function takes `(bijector, y, **kwargs)` and returns the contribution of every dimension of `y` to the
    inverse log-det Jacobian: a tensor that broadcasts to `y` and sums over the event to `inverse_log_det_jacobian(y)`.
    The forward direction follows from it. The bijector must keep each dimension in its place.

    Bijectors that work element by element (both `min_event_ndims` are 0) need no registration.

    Args:
      cls: the bijector class.

    Returns:
      The decorator.

    Raises:
      TypeError: if `cls` is a `FlowBijector`, which states its log-dets itself.

    #### Example

    >>> class Funnel(tfb.Bijector):
    ...     def __init__(self):
    ...         super().__init__(forward_min_event_ndims=1, parameters={}, name="funnel")
    ...
    ...     def _forward(self, x):
    ...         return tf.concat([x[..., :1], x[..., 1:] * tf.exp(x[..., :1])], axis=-1)
    ...
    ...     def _inverse(self, y):
    ...         return tf.concat([y[..., :1], y[..., 1:] * tf.exp(-y[..., :1])], axis=-1)
    ...
    ...     def _inverse_log_det_jacobian(self, y):
    ...         return -y[..., 0] * (y.shape[-1] - 1)
    >>> @dimflows.register_log_det_per_dim(Funnel)
    ... def funnel_log_det(funnel, y):
    ...     return tf.concat([tf.zeros_like(y[..., :1]), -y[..., :1] * tf.ones_like(y[..., 1:])], axis=-1)
    >>> dimflows.inverse_log_det_per_dim(Funnel(), [0.5, 1.0, 8.0]).numpy()
    array([ 0. , -0.5, -0.5], dtype=float32)
    """
    if issubclass(cls, base.FlowBijector):
        raise TypeError(f"{cls.__name__}: a FlowBijector states its per-dimension log-det itself; override its methods")

    def decorator(function: Callable) -> Callable:
        def rule(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
            result = getattr(bijector, direction)(value, **kwargs)
            if direction == "inverse":
                return result, function(bijector, value, **kwargs)
            return result, _negate(function(bijector, result, **kwargs))

        _register([cls], rule, _stay)
        return function

    return decorator


def inverse_and_log_det_per_dim(bijector: tfb.Bijector, y: Any, **kwargs: Any) -> tuple[Any, Any]:
    """`inverse(y)` and the per-dimension inverse log-det, in the frame of `y`, from one pass."""
    return _pass(bijector, _fresh(y), "inverse", kwargs)


def forward_and_log_det_per_dim(bijector: tfb.Bijector, x: Any, **kwargs: Any) -> tuple[Any, Any]:
    """`forward(x)` and the per-dimension forward log-det, in the frame of `x`, from one pass."""
    return _pass(bijector, _fresh(x), "forward", kwargs)


def inverse_and_log_det(bijector: tfb.Bijector, y: Any, event_ndims: Any, **kwargs: Any) -> tuple[Any, tf.Tensor]:
    """`inverse(y)` and the summed inverse log-det from one pass; needs no per-dimension rule."""
    if isinstance(bijector, base.FlowBijector):
        return bijector._inverse_and_log_det(y, bijector._route(kwargs.pop("condition", None), kwargs), event_ndims)
    y = _fresh(y)
    x = bijector.inverse(y, **kwargs)
    return x, _at_least_float32(bijector.inverse_log_det_jacobian(y, event_ndims, **kwargs))


def forward_and_log_det(bijector: tfb.Bijector, x: Any, event_ndims: Any, **kwargs: Any) -> tuple[Any, tf.Tensor]:
    """`forward(x)` and the summed forward log-det from one pass; needs no per-dimension rule."""
    if isinstance(bijector, base.FlowBijector):
        return bijector._forward_and_log_det(x, bijector._route(kwargs.pop("condition", None), kwargs), event_ndims)
    x = _fresh(x)
    y = bijector.forward(x, **kwargs)
    return y, _at_least_float32(bijector.forward_log_det_jacobian(x, event_ndims, **kwargs))


def transport_forward(bijector: tfb.Bijector, per_dim: Any) -> Any:
    """Carries one number per dimension from the frame of `bijector`'s input to that of its output."""
    return _transport(bijector, per_dim, "forward")


def transport_inverse(bijector: tfb.Bijector, per_dim: Any) -> Any:
    """Carries one number per dimension from the frame of `bijector`'s output to that of its input."""
    return _transport(bijector, per_dim, "inverse")


def condition_kwargs(bijector: tfb.Bijector, condition: Any) -> dict:
    """The keyword arguments by which `condition` reaches all parts that can use it; empty if none can."""
    if condition is None:
        return {}
    if isinstance(bijector, base.FlowBijector):
        return {"condition": condition} if bijector._uses_condition else {}
    if isinstance(bijector, TFPInvert):
        return condition_kwargs(bijector.bijector, condition)
    kwargs: dict[str, dict] = {}
    for part in tf.nest.flatten(getattr(bijector, "bijectors", ())):
        nested = condition_kwargs(part, condition)
        if kwargs.setdefault(part.name, nested) != nested:
            raise ValueError(
                f"{bijector.name}: several parts are named {part.name!r}, and not all of them can use the condition; "
                "give them different names, since keyword arguments reach parts by name"
            )
    return {name: nested for name, nested in kwargs.items() if nested}


def _to_tensors(value: Any, dtype: Any) -> Any:
    return nest_util.convert_to_nested_tensor(value, dtype=dtype, dtype_hint=dtype, allow_packing=True)


def _fresh(value: Any) -> Any:
    # A new tensor misses TFP's cache, which would return what it computed before a variable was updated.
    return tf.nest.map_structure(tf.identity, value)


def _at_least_float32(log_det: tf.Tensor) -> tf.Tensor:
    return tf.cast(log_det, base.log_det_dtype(log_det.dtype))


def _negate(per_dim: Any) -> Any:
    return tf.nest.map_structure(tf.negative, per_dim)


def _add(a: Any, b: Any) -> Any:
    total = [u + tf.cast(v, u.dtype) for u, v in zip(tf.nest.flatten(a), tf.nest.flatten(b))]
    return tf.nest.pack_sequence_as(a, total)


def _zeros(value: Any) -> Any:
    return tf.nest.map_structure(lambda v: tf.zeros([], base.log_det_dtype(v.dtype)), value)


def _opposite(direction: str) -> str:
    return "inverse" if direction == "forward" else "forward"


# The two dispatchers. What no rule covers is element-wise or refused. FFJORD counts as element-wise, since its log-det
# comes unreduced.


@functools.singledispatch
def _pass(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    if not _is_elementwise(bijector):
        _refuse(bijector, "no per-dimension decomposition of its log-det is known")
    log_det = getattr(bijector, f"{direction}_log_det_jacobian")
    return getattr(bijector, direction)(value, **kwargs), log_det(value, event_ndims=0, **kwargs)


@functools.singledispatch
def _transport(bijector: tfb.Bijector, per_dim: Any, direction: str) -> Any:
    if not _is_elementwise(bijector):
        _refuse(bijector, "where its dimensions go is not known")
    return per_dim


def _is_elementwise(bijector: tfb.Bijector) -> bool:
    return bijector.forward_min_event_ndims == 0 and bijector.inverse_min_event_ndims == 0 and bijector._is_injective


def _refuse(bijector: tfb.Bijector, reason: str) -> NoReturn:
    cls = type(bijector).__name__
    raise NotImplementedError(
        f"{bijector.name} ({cls}): {reason}; register a rule with @dimflows.register_log_det_per_dim({cls})"
    )


def _register(classes: Iterable[type], rule: Callable, transport: Callable) -> None:
    for cls in classes:
        _pass.register(cls, rule)
        _transport.register(cls, transport)


def _stay(bijector: tfb.Bijector, per_dim: Any, direction: str) -> Any:
    return per_dim


# This package's bijectors.


def _flow(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    kwargs = dict(kwargs)
    condition = bijector._route(kwargs.pop("condition", None), kwargs)
    if direction == "inverse":
        return bijector._inverse_and_log_det_per_dim(value, condition)
    return bijector._forward_and_log_det_per_dim(value, condition)


def _flow_transport(bijector: tfb.Bijector, per_dim: Any, direction: str) -> Any:
    return bijector._transport_forward(per_dim) if direction == "forward" else bijector._transport_inverse(per_dim)


_register([base.FlowBijector], _flow, _flow_transport)


# Index moves: zero, and the numbers move like the values.


def _move(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    return getattr(bijector, direction)(value, **kwargs), _zeros(value)


def _move_transport(bijector: tfb.Bijector, per_dim: Any, direction: str) -> Any:
    return getattr(bijector, direction)(_fresh(per_dim))


_register([tfb.Permute, tfb.Reshape, tfb.Transpose, tfb.Split, tfb.Restructure], _move, _move_transport)


# Composites: what the parts contribute, in the frame of the argument.


def chain_pass(parts: list[tuple[tfb.Bijector, dict]], value: Any, direction: str) -> tuple[Any, Any]:
    """Value and per-dimension log-det of bijectors applied one after the other.

    Args:
      parts: (bijector, keyword arguments), in the order in which `direction` applies them.
      value: the argument of the first.
      direction: `"forward"` or `"inverse"`.

    Returns:
      The last one's result, and the per-dimension log-det in the frame of `value`.
    """
    log_dets = []
    for bijector, kwargs in parts:
        argument = value
        value, log_det = _pass(bijector, _fresh(argument), direction, kwargs)
        log_dets.append(base._fill(log_det, argument))
    total = None
    for (bijector, _), log_det in zip(reversed(parts), reversed(log_dets)):
        total = log_det if total is None else _add(log_det, _transport(bijector, total, _opposite(direction)))
    return value, _zeros(value) if total is None else total


def _chain(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    order = bijector.bijectors if direction == "inverse" else reversed(bijector.bijectors)
    return chain_pass([(b, kwargs.get(b.name, {})) for b in order], value, direction)


def _joint_map(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    log_dets = []

    def part(b: tfb.Bijector, v: Any) -> Any:
        result, log_det = _pass(b, v, direction, kwargs.get(b.name, {}))
        log_dets.extend(tf.nest.flatten(base._fill(log_det, v)))
        return result

    result = nest.map_structure_up_to(bijector._nested_structure, part, bijector.bijectors, value, check_types=False)
    return result, tf.nest.pack_sequence_as(value, log_dets)


def _walk_transport(bijector: tfb.Bijector, per_dim: Any, direction: str) -> Any:
    walk = bijector._call_walk_forward if direction == "forward" else bijector._call_walk_inverse
    return walk(lambda b, t: _transport(b, t, direction), per_dim)


def _blockwise(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    return _pass(bijector._chain, value, direction, {bijector._b_joint.name: kwargs})


def _blockwise_transport(bijector: tfb.Bijector, per_dim: Any, direction: str) -> Any:
    return _transport(bijector._chain, per_dim, direction)


def _invert(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    return _pass(bijector.bijector, value, _opposite(direction), kwargs)


def _invert_transport(bijector: tfb.Bijector, per_dim: Any, direction: str) -> Any:
    return _transport(bijector.bijector, per_dim, _opposite(direction))


def _transform_diagonal(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    diagonal = tf.linalg.diag_part(value)
    result, log_det = _pass(bijector.diag_bijector, diagonal, direction, kwargs)
    log_det = base._fill(log_det, diagonal)
    return tf.linalg.set_diag(value, result), tf.linalg.set_diag(tf.zeros_like(value, log_det.dtype), log_det)


def _transform_diagonal_transport(bijector: tfb.Bijector, per_dim: Any, direction: str) -> Any:
    diagonal = _transport(bijector.diag_bijector, tf.linalg.diag_part(per_dim), direction)
    return tf.linalg.set_diag(per_dim, diagonal)


# `tfb.Chain` and the like return these base classes where a part is no composite tensor.
_register([TFPChain], _chain, _walk_transport)
_register([TFPJointMap], _joint_map, _walk_transport)
_register([TFPBlockwise], _blockwise, _blockwise_transport)
_register([TFPInvert], _invert, _invert_transport)
_register([tfb.TransformDiagonal], _transform_diagonal, _transform_diagonal_transport)


# Glow and its pieces.


def _composition(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    return _pass(_wrapped(bijector), value, direction, kwargs)


def _composition_transport(bijector: tfb.Bijector, per_dim: Any, direction: str) -> Any:
    return _transport(_wrapped(bijector), per_dim, direction)


def _wrapped(bijector: tfb.Bijector) -> tfb.Bijector:
    """The one composition that `Glow`, its blocks, exits and squeezes are names for."""
    if not isinstance(bijector._bijectors, TFPComposition):
        _refuse(bijector, "how it composes its parts is not known")
    return bijector._bijectors


def _one_by_one_conv(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    return _pass(bijector._bijector, value, direction, kwargs)


def _activation_normalization(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    with tf.control_dependencies([bijector._maybe_init(value, inverse=direction == "inverse")]):
        return _pass(bijector._bijector, value, direction, kwargs)


_register([TFPComposition], _composition, _composition_transport)
_register([tfp_glow.OneByOneConv], _one_by_one_conv, _stay)
_register([tfp_glow.ActivationNormalization], _activation_normalization, _stay)


# Triangular Jacobians: the logarithm of the diagonal.


def _real_nvp(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    bijector._cache_input_depth(value)
    parts = [value[..., : bijector._masked_size], value[..., bijector._masked_size :]]
    changed = 0 if bijector._reverse_mask else 1
    kept, argument = parts[1 - changed], parts[changed]
    transformer = bijector._bijector_fn(kept, bijector._bijector_input_units(), **kwargs)
    parts[changed], log_det = _pass(transformer, argument, direction, {})
    log_dets = [tf.zeros_like(kept, base.log_det_dtype(kept.dtype))]
    log_dets.insert(changed, base._fill(log_det, argument))
    return tf.concat(parts, axis=-1), tf.concat(log_dets, axis=-1)


def _masked_autoregressive(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    # The network sees y. At the solution of y = transformer(y).forward(x), the transformer's slopes are the diagonal.
    y = value if direction == "inverse" else bijector.forward(value, **kwargs)
    return _pass(bijector._bijector_fn(y, **kwargs), value, direction, {})


def _ascending(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    result = getattr(bijector, direction)(value, **kwargs)
    x = value if direction == "forward" else result
    log_det = tf.concat([tf.zeros_like(x[..., :1]), x[..., 1:]], axis=-1)
    return result, log_det if direction == "forward" else -log_det


def _batch_normalization(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    result = getattr(bijector, direction)(value, **kwargs)
    layer = bijector.batchnorm
    per_channel = bijector._get_broadcast_fn(value)
    variance = per_channel(layer.moving_variance)
    if direction == "inverse":
        axes = [axis for axis in range(len(value.shape)) if axis not in layer.axis]
        variance = tf.where(bijector._training, tf.nn.moments(value, axes, keepdims=True)[1], variance)
    log_det = per_channel(tf.math.log(layer.gamma)) - 0.5 * tf.math.log(variance + layer.epsilon)
    return result, log_det if direction == "inverse" else -log_det


_register([tfb.RealNVP], _real_nvp, _stay)
_register([tfb.MaskedAutoregressiveFlow], _masked_autoregressive, _stay)
_register([tfb.Ascending], _ascending, _stay)
_register([tfb.BatchNormalization], _batch_normalization, _stay)
_register([tfb.Cumsum], _move, _stay)


# Linear maps: the diagonal where they are triangular, zero where they are orthogonal, else polar.

_TRIANGULAR = (
    tf.linalg.LinearOperatorDiag,
    tf.linalg.LinearOperatorIdentity,
    tf.linalg.LinearOperatorLowerTriangular,
    tf.linalg.LinearOperatorScaledIdentity,
)


def _scale_matvec(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    result = getattr(bijector, direction)(value, **kwargs)
    return result, _linear_log_det(bijector.scale, bijector.adjoint, direction)


def _scale_matvec_block(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    result = getattr(bijector, direction)(value, **kwargs)
    blocks = bijector.scale.operators
    if isinstance(bijector.scale, tf.linalg.LinearOperatorBlockLowerTriangular):
        blocks = [row[-1] for row in blocks]
    log_dets = [_linear_log_det(block, bijector.adjoint, direction) for block in blocks]
    return result, tf.nest.pack_sequence_as(value, log_dets)


def _scale_matvec_lu(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    result = getattr(bijector, direction)(value, **kwargs)
    matrix = tfp.math.lu_reconstruct(*bijector._broadcast_params())
    return result, _linear_log_det(tf.linalg.LinearOperatorFullMatrix(matrix), False, direction)


def _linear_log_det(operator: tf.linalg.LinearOperator, adjoint: bool, direction: str) -> tf.Tensor:
    if isinstance(operator, _TRIANGULAR):
        log_det = tf.math.log(tf.abs(operator.diag_part()))
    else:
        # The Jacobian is the matrix or its inverse, whose contributions are the negative of the transpose's.
        matrix = operator.to_dense()
        transpose = adjoint != (direction == "inverse")
        log_det = dense.polar(tf.linalg.matrix_transpose(matrix) if transpose else matrix)
    return log_det if direction == "forward" else -log_det


_register([tfb.ScaleMatvecLinearOperator], _scale_matvec, _stay)
_register([tfb.ScaleMatvecLinearOperatorBlock], _scale_matvec_block, _stay)
_register([tfb.ScaleMatvecLU], _scale_matvec_lu, _stay)
_register([tfb.Householder, tfb.DiscreteCosineTransform], _move, _stay)


# What has no decomposition.

_REFUSED = {
    "its results have more entries than degrees of freedom, so its dimensions have no places": (
        tfb.CorrelationCholesky,
        tfb.FillScaleTriL,
        tfb.FillTriangular,
        tfb.IteratedSigmoidCentered,
        tfb.Pad,
        tfb.SoftmaxCentered,
        tfb.UnitVector,
    ),
    "it maps a matrix as a whole, so its log-det does not belong to single entries": (
        tfb.CholeskyOuterProduct,
        tfb.CholeskyToInvCholesky,
        tfb.MatrixInverseTriL,
    ),
    "it is not injective": (tfb.AbsoluteValue,),
}


def _register_refusal(classes: Iterable[type], reason: str) -> None:
    def refuse(bijector: tfb.Bijector, *_: Any) -> NoReturn:
        _refuse(bijector, reason)

    _register(classes, refuse, refuse)


for _reason, _classes in _REFUSED.items():
    _register_refusal(_classes, _reason)
