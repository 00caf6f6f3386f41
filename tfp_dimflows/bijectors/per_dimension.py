"""The log-det of every dimension for any bijector: TFP's own by rules, ours by their primitives.

The contribution of dimension i is the i-th diagonal entry of log J, with J the Jacobian of the direction in question:

* element-wise and triangular bijectors: log |J_ii|, exactly;
* bijectors that only move dimensions: zero, and what the others contribute moves along;
* dense linear maps: `dense.polar`, the diagonal of log (J^T J)^(1/2), which is zero where J is orthogonal; a dense map
  leaves the dimensions in their places;
* `tfb.FFJORD`: the integral of the diagonal of the velocity's Jacobian along the trajectory.

A bijector that embeds its argument in a larger space, or maps one matrix to another as a whole, has no such
decomposition: asking for it raises a `NotImplementedError`.
"""

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors import base, dense
from tfp_dimflows.bijectors.log_dets import fill, log_det_dtype, zeros
from tfp_dimflows.bijectors.walk import (
    PerDimension,
    Transported,
    along,
    fresh,
    opposite,
    refuse,
    transport,
    value_and_log_det_per_dim,
)
from tfp_dimflows.upstream import (
    TFPBlockwise,
    TFPChain,
    TFPComposition,
    TFPInvert,
    TFPJointMap,
    nest,
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
    y = base.to_tensor(y, bijector.forward_dtype(**kwargs))
    return fill(value_and_log_det_per_dim(bijector, y, "inverse", kwargs)[1], y)


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
    x = base.to_tensor(x, bijector.inverse_dtype(**kwargs))
    return fill(value_and_log_det_per_dim(bijector, x, "forward", kwargs)[1], x)


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
            return result, tf.nest.map_structure(tf.negative, function(bijector, result, **kwargs))

        _register([cls], rule, _stay)
        return function

    return decorator


def _register(classes: Iterable[type], rule: Callable, transport_rule: Callable) -> None:
    def on_a_new_tensor(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
        return rule(bijector, fresh(value), direction, kwargs)

    for cls in classes:
        value_and_log_det_per_dim.register(cls, on_a_new_tensor)
        transport.register(cls, transport_rule)


def _register_as(cls: type, other: Callable) -> None:
    """Registers a class whose bijectors are other ones: (bijector, direction, keyword arguments), a function of the same."""

    def rule(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
        bijector, direction, kwargs = other(bijector, direction, kwargs)
        return value_and_log_det_per_dim(bijector, value, direction, kwargs)

    def transport_rule(bijector: tfb.Bijector, numbers: Any, direction: str) -> Any:
        bijector, direction, _ = other(bijector, direction, {})
        return transport(bijector, numbers, direction)

    _register([cls], rule, transport_rule)


def _stay(bijector: tfb.Bijector, numbers: Any, direction: str) -> Any:
    return numbers


# Index moves: zero, and the numbers move like the values.


def _move(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    return getattr(bijector, direction)(value, **kwargs), zeros(value)


def _move_transport(bijector: tfb.Bijector, numbers: Any, direction: str) -> Any:
    return getattr(bijector, direction)(fresh(numbers))


_register([tfb.Permute, tfb.Reshape, tfb.Transpose, tfb.Split, tfb.Restructure], _move, _move_transport)


# Composites: what the parts contribute, in the frame of the argument.


def _chain(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    end = along(_in_order(bijector, direction, kwargs), PerDimension(value), direction)
    return end.value, _chain_transport(bijector, end.numbers, opposite(direction))


def _chain_transport(bijector: tfb.Bijector, numbers: Any, direction: str) -> Any:
    return along(_in_order(bijector, direction, {}), Transported(numbers), direction).numbers


def _in_order(chain: tfb.Bijector, direction: str, kwargs: dict) -> list[tuple[tfb.Bijector, dict]]:
    order = chain.bijectors if direction == "inverse" else chain.bijectors[::-1]
    return [(bijector, kwargs.get(bijector.name, {})) for bijector in order]


def _joint_map(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    log_dets = []

    def part(b: tfb.Bijector, v: Any) -> Any:
        result, log_det = value_and_log_det_per_dim(b, v, direction, kwargs.get(b.name, {}))
        log_dets.extend(tf.nest.flatten(fill(log_det, v)))
        return result

    result = nest.map_structure_up_to(bijector._nested_structure, part, bijector.bijectors, value, check_types=False)
    return result, tf.nest.pack_sequence_as(value, log_dets)


def _joint_map_transport(bijector: tfb.Bijector, numbers: Any, direction: str) -> Any:
    walk = bijector._call_walk_forward if direction == "forward" else bijector._call_walk_inverse
    return walk(lambda b, t: transport(b, t, direction), numbers)


def _transform_diagonal(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    diagonal = tf.linalg.diag_part(value)
    result, log_det = value_and_log_det_per_dim(bijector.diag_bijector, diagonal, direction, kwargs)
    log_det = fill(log_det, diagonal)
    return tf.linalg.set_diag(value, result), tf.linalg.set_diag(tf.zeros_like(value, log_det.dtype), log_det)


def _transform_diagonal_transport(bijector: tfb.Bijector, numbers: Any, direction: str) -> Any:
    diagonal = transport(bijector.diag_bijector, tf.linalg.diag_part(numbers), direction)
    return tf.linalg.set_diag(numbers, diagonal)


# `tfb.Chain` and the like return these base classes where a part is no composite tensor.
_register([TFPChain], _chain, _chain_transport)
_register([TFPJointMap], _joint_map, _joint_map_transport)
_register_as(TFPBlockwise, lambda b, direction, kwargs: (b._chain, direction, {b._b_joint.name: kwargs}))
_register_as(TFPInvert, lambda b, direction, kwargs: (b.bijector, opposite(direction), kwargs))
_register([tfb.TransformDiagonal], _transform_diagonal, _transform_diagonal_transport)


# Glow and its pieces.


def _wrapped(bijector: tfb.Bijector) -> tfb.Bijector:
    """The one composition that `Glow`, its blocks, exits and squeezes are names for."""
    if not isinstance(bijector._bijectors, TFPComposition):
        refuse(bijector, "how it composes its parts is not known")
    return bijector._bijectors


def _activation_normalization(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    with tf.control_dependencies([bijector._maybe_init(value, inverse=direction == "inverse")]):
        return value_and_log_det_per_dim(bijector._bijector, value, direction, kwargs)


_register_as(TFPComposition, lambda b, direction, kwargs: (_wrapped(b), direction, kwargs))
_register_as(tfp_glow.OneByOneConv, lambda b, direction, kwargs: (b._bijector, direction, kwargs))
_register([tfp_glow.ActivationNormalization], _activation_normalization, _stay)


# Triangular Jacobians: the logarithm of the diagonal.


def _real_nvp(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    bijector._cache_input_depth(value)
    parts = [value[..., : bijector._masked_size], value[..., bijector._masked_size :]]
    changed = 0 if bijector._reverse_mask else 1
    kept, argument = parts[1 - changed], parts[changed]
    transformer = bijector._bijector_fn(kept, bijector._bijector_input_units(), **kwargs)
    parts[changed], log_det = value_and_log_det_per_dim(transformer, argument, direction, {})
    log_dets = [tf.zeros_like(kept, log_det_dtype(kept.dtype))]
    log_dets.insert(changed, fill(log_det, argument))
    return tf.concat(parts, axis=-1), tf.concat(log_dets, axis=-1)


def _masked_autoregressive(bijector: tfb.Bijector, value: Any, direction: str, kwargs: dict) -> tuple[Any, Any]:
    # The network sees y. At the solution of y = transformer(y).forward(x), the transformer's slopes are the diagonal.
    y = value if direction == "inverse" else bijector.forward(value, **kwargs)
    return value_and_log_det_per_dim(bijector._bijector_fn(y, **kwargs), value, direction, {})


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
    def refused(bijector: tfb.Bijector, *_: Any) -> NoReturn:
        refuse(bijector, reason)

    _register(classes, refused, refused)


for _reason, _classes in _REFUSED.items():
    _register_refusal(_classes, _reason)
