"""Elementwise transformers: from the parameters that a network predicts to an elementwise bijector."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import tensorflow as tf
from tensorflow.types.experimental import TensorLike
from tensorflow_probability import bijectors as tfb

from tfp_dimflows import representation
from tfp_dimflows.bijectors import base
from tfp_dimflows.bijectors.log_dets import log_det_dtype
from tfp_dimflows.bijectors.mixture_logistic import MixtureLogisticCDF
from tfp_dimflows.keras_bridge import variables_of
from tfp_dimflows.renamed import renamed
from tfp_dimflows.upstream import prefer_static as ps
from tfp_dimflows.upstream import tensor_util

SCALES = ("tanh", "sigmoid", "exp")


class TransformerLike(Protocol):
    """What couplings and autoregressive flows need of their transformer: a `Transformer` has it, and any other class may.

    One with trainable variables must be a `tf.Module`, or they are not found.

    #### Example

    >>> class Doubling:  # scales by 2, and shifts
    ...     params_per_dim = 1
    ...
    ...     def __call__(self, params):
    ...         return tfb.Chain([tfb.Shift(params[..., 0]), tfb.Scale(2.0)])
    >>> dfb.Coupling(lambda x: x, dfb.masks.Channel(event_ndims=1), Doubling()).forward([1.0, 3.0]).numpy()
    array([1., 7.], dtype=float32)
    """

    @property
    def params_per_dim(self) -> int:
        """How many parameters each dimension has."""

    def __call__(self, params: tf.Tensor) -> tfb.Bijector:
        """The elementwise bijector with parameters of shape `[..., params_per_dim]`, on tensors of the shape `[...]`."""


class Transformer(representation.Described, tf.Module):
    """Any elementwise bijector as the transformer of a coupling or an autoregressive flow.

    Args:
      function: takes parameters of shape `[..., params_per_dim]` and returns a `tfb.Bijector` that acts elementwise on
        tensors of the shape `[...]`. Its `forward` is the latent-to-data direction.
      params_per_dim: how many parameters each dimension has.

    #### Example

    >>> shift = dfb.Transformer(lambda params: tfb.Shift(params[..., 0]), params_per_dim=1)
    >>> shift(tf.ones([3, 1])).forward(tf.zeros([3])).numpy()
    array([1., 1., 1.], dtype=float32)
    """

    def __init__(self, function: Callable[[tf.Tensor], tfb.Bijector], params_per_dim: int):
        super().__init__(name="transformer")
        self._function = function
        self._variables = variables_of(function)
        self.params_per_dim = params_per_dim

    def __call__(self, params: tf.Tensor) -> tfb.Bijector:
        """The elementwise bijector with these parameters."""
        return self._function(params)


def unpack(params: tf.Tensor, value: tf.Tensor, params_per_dim: int, name: str) -> tf.Tensor:
    """A network's output `[..., C * P]` for values `[..., C]`, as `[..., C, P]` in float32 at least.

    Raises:
      ValueError: if the network returned another number of parameters.
    """
    expected = value.shape[-1] * params_per_dim
    if params.shape[-1] != expected or params.shape.rank != value.shape.rank:
        raise ValueError(
            f"{name}: the network returned parameters of shape {params.shape} for a transformed part of shape "
            f"{value.shape}, needs {params_per_dim} per entry: a last axis of {expected}"
        )
    shape = ps.concat([ps.shape(params)[:-1], [value.shape[-1], params_per_dim]], axis=0)
    return tf.cast(tf.reshape(params, shape), log_det_dtype(value.dtype))


class Additive(Transformer):
    """Elementwise shift, `z = x + t` from data to latent (NICE): one parameter, t; log-det 0.

    #### Example

    >>> dfb.transformers.Additive()(tf.constant([[2.0]])).inverse([1.0]).numpy()
    array([3.], dtype=float32)
    """

    def __init__(self) -> None:
        super().__init__(lambda params: ElementwiseAffine(params[..., 0]), params_per_dim=1)


class Affine(Transformer):
    """Elementwise shift and bounded scale, from data to latent `z = (x + t) * exp(s)`; parameters (t, raw).

    * `scale="tanh"`: s = g tanh(raw), with one trainable gain g (RealNVP),
    * `scale="sigmoid"`: exp(s) = sigmoid(raw + 2), at most 1 (Glow),
    * `scale="exp"`: s = raw, unbounded.

    Args:
      scale: `"tanh"`, `"sigmoid"` or `"exp"`.
      initial_gain: initial value of g (RealNVP: 0 in checkerboard couplings, 1 in channel couplings).
      dtype: dtype of g.

    #### Example

    >>> dfb.transformers.Affine("exp")(tf.constant([[1.0, 0.5]])).inverse_log_det_jacobian([0.0], event_ndims=0).numpy()
    array([0.5], dtype=float32)
    """

    @renamed(log_scale="scale")
    def __init__(self, scale: str = "tanh", initial_gain: float = 1.0, dtype: tf.DType = tf.float32):
        if scale not in SCALES:
            raise ValueError(f"Affine: got scale={scale!r}, needs one of {SCALES}")
        super().__init__(self._bijector, params_per_dim=2)
        self._scale = scale
        if scale == "tanh":
            self.gain = tf.Variable(initial_gain, dtype=dtype, name="gain")

    def _bijector(self, params: tf.Tensor) -> tfb.Bijector:
        shift, raw = tf.unstack(params, axis=-1)
        if self._scale == "tanh":
            log_scale = tf.cast(self.gain, raw.dtype) * tf.tanh(raw)
        elif self._scale == "sigmoid":
            log_scale = tf.math.log_sigmoid(raw + 2.0)
        else:
            log_scale = raw
        return ElementwiseAffine(shift, log_scale)


class Gated(Transformer):
    """Elementwise gate of an inverse autoregressive flow, from data to latent `z = g x + (1 - g) m`; parameters (m, raw).

    g = sigmoid(raw + bias), so the log-det of a dimension is log(g). In an IAF, `tfb.Invert(dfb.Autoregressive(...))`, this is
    the step from its argument to its result.

    Args:
      bias: a network that starts at zero starts as the scaling by sigmoid(bias), near the identity if that is large.

    References: Kingma et al., "Improving variational inference with inverse autoregressive flow", 2016.

    #### Example

    >>> dfb.transformers.Gated(bias=0.0)(tf.constant([[4.0, 0.0]])).inverse([1.0]).numpy()
    array([2.5], dtype=float32)
    """

    def __init__(self, bias: float = 1.0):
        super().__init__(lambda params: _Gate(params[..., 0], params[..., 1] + bias), params_per_dim=2)
        self._bias = bias


class _Gate(base.FlowBijector):
    """Data to latent `z = g x + (1 - g) m`, g = sigmoid(raw), elementwise."""

    def __init__(self, m: tf.Tensor, raw: tf.Tensor, name: str = "gate"):
        self._m, self._raw = m, raw
        super().__init__(forward_min_event_ndims=0, parameters={"m": m, "raw": raw, "name": name}, name=name)

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        x = tf.sigmoid(self._raw) * tf.cast(y, self._m.dtype) + tf.sigmoid(-self._raw) * self._m
        return tf.cast(x, y.dtype), tf.math.log_sigmoid(self._raw)

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        log_gate = tf.math.log_sigmoid(self._raw)
        y = (tf.cast(x, self._m.dtype) - tf.sigmoid(-self._raw) * self._m) * tf.exp(-log_gate)
        return tf.cast(y, x.dtype), -log_gate


class MixtureLogistic(Transformer):
    """Elementwise `dfb.MixtureLogisticCDF`: `2 + 3 num_components` parameters, a, t, K logits, K means, K log-scales.

    From data to latent `z = exp(tanh(a)) logit(F(x)) + t`, F the distribution function of the mixture; log-scales below -7
    count as -7.

    Args:
      num_components: number K of logistics.
      smooth: as in `dfb.MixtureLogisticCDF`.

    References: Ho, Chen, Srinivas, Duan, Abbeel, "Flow++", 2019.

    #### Example

    >>> params = tf.constant([[0.0, 1.0, 0.0, 3.0, 0.0]])
    >>> dfb.transformers.MixtureLogistic(num_components=1)(params).inverse([5.0]).numpy().round(3)
    array([3.], dtype=float32)
    """

    def __init__(self, num_components: int, smooth: bool = False):
        if num_components < 1:
            raise ValueError(f"MixtureLogistic: got num_components={num_components}, needs at least 1")
        super().__init__(self._bijector, params_per_dim=2 + 3 * num_components)
        self._num_components = num_components
        self._smooth = smooth

    def _bijector(self, params: tf.Tensor) -> tfb.Bijector:
        raw, shift, *mixture = tf.split(params, [1, 1, *[self._num_components] * 3], axis=-1)
        logits, means, log_scales = mixture
        log_scales = tf.maximum(log_scales, -7.0)
        return MixtureLogisticCDF(logits, means, log_scales, shift[..., 0], tf.tanh(raw[..., 0]), self._smooth)


class Spline(Transformer):
    """Elementwise monotone rational-quadratic spline, TFP's, on [-bound, bound]; the identity outside, and at zero parameters.

    `3 num_bins - 1` parameters: K for the widths and K for the heights of the bins (softmax, each at least 1e-3 of the range)
    and K - 1 for the slopes at the inner knots (softplus, at least 1e-3).

    Args:
      num_bins: number K of bins.
      bound: where the spline ends.

    References: Durkan, Bekasov, Murray, Papamakarios, "Neural spline flows", 2019.

    #### Example

    >>> dfb.transformers.Spline(num_bins=4)(tf.zeros([3, 11])).forward([-1.0, 0.5, 7.0]).numpy().round(4)
    array([-1. ,  0.5,  7. ], dtype=float32)
    """

    def __init__(self, num_bins: int = 8, bound: float = 5.0):
        if num_bins < 1:
            raise ValueError(f"Spline: got num_bins={num_bins}, needs at least 1")
        super().__init__(self._bijector, params_per_dim=3 * num_bins - 1)
        self._num_bins = num_bins
        self._bound = bound

    def _bijector(self, params: tf.Tensor) -> tfb.Bijector:
        widths, heights, slopes = tf.split(params, [self._num_bins, self._num_bins, self._num_bins - 1], axis=-1)
        least = 1e-3
        bins = (least + (1.0 - least * self._num_bins) * tf.nn.softmax(raw) for raw in (widths, heights))
        widths, heights = (2.0 * self._bound * share for share in bins)
        slopes = least + (1.0 - least) * tf.nn.softplus(slopes + math.log(math.e - 1.0))
        return tfb.RationalQuadraticSpline(widths, heights, slopes, range_min=-self._bound)


class ElementwiseAffine(base.FlowBijector):
    """Data to latent `z = (x + shift) * exp(log_scale)`, elementwise.

    The log-det of a dimension (data to latent) is its `log_scale`.

    Args:
      shift: tensor that broadcasts to the event.
      log_scale: tensor that broadcasts to the event, or None for 0.
      name: the name of the operations.

    #### Example

    >>> dfb.ElementwiseAffine(shift=-1.0, log_scale=0.0).inverse([3.0]).numpy()
    array([2.], dtype=float32)
    """

    def __init__(self, shift: TensorLike, log_scale: TensorLike | None = None, name: str = "elementwise_affine"):
        parameters = dict(locals())
        self._shift = tensor_util.convert_nonref_to_tensor(shift)
        self._log_scale = None if log_scale is None else tensor_util.convert_nonref_to_tensor(log_scale)
        super().__init__(forward_min_event_ndims=0, is_constant_jacobian=True, parameters=parameters, name=name)

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        x = y + tf.cast(self._shift, y.dtype)
        if self._log_scale is None:
            return x, tf.zeros([], log_det_dtype(y.dtype))
        log_scale = tf.convert_to_tensor(self._log_scale)
        return x * tf.cast(tf.exp(log_scale), y.dtype), log_scale

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        shift = tf.cast(self._shift, x.dtype)
        if self._log_scale is None:
            return x - shift, tf.zeros([], log_det_dtype(x.dtype))
        log_scale = tf.convert_to_tensor(self._log_scale)
        return x * tf.cast(tf.exp(-log_scale), x.dtype) - shift, -log_scale
