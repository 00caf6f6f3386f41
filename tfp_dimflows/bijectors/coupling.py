"""Coupling layers: one part of the event conditions an elementwise transformation of the other."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors import base, masks, per_dimension, recompute, transformers
from tfp_dimflows.keras_bridge import Network, variables_of
from tfp_dimflows.upstream import prefer_static as ps


class Coupling(base.FlowBijector):
    r"""Coupling layer with any mask, network and elementwise transformer.

    With conditioning part a, transformed part b and an elementwise bijector T:

        forward:  y_a = x_a,   y_b = T(x_b; network(x_a, condition))
        inverse:  x_a = y_a,   x_b = T^-1(y_b; network(y_a, condition))
        inverse log-det of a dimension: 0 on a, log |dT^-1/dy| on b

    The network is evaluated once per pass. It gets the conditioning part with one batch axis, and returns
    `params_per_dim` numbers for each entry of the transformed part: `[N, ..., channels * params_per_dim]`, those of one
    entry next to each other.

    Args:
      network: callable `(x, condition) -> parameters`: a Keras 3 layer or model, a tf_keras layer, a `tf.Module`, a function.
      mask: one of `dfb.masks`.
      transformer: a `dfb.Transformer`.
      validate_args: as in `tfb.Bijector`.
      parameters: the arguments of a subclass's constructor.
      name: the name of the operations.

    Raises:
      ValueError: when the network returns another number of parameters, or the event does not fit the mask.

    References: Dinh, Krueger, Bengio, "NICE", 2015; Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017.

    #### Example

    >>> coupling = dfb.Coupling(
    ...     network=lambda x: 3.0 * x,
    ...     mask=dfb.masks.Channel(event_ndims=1),
    ...     transformer=dfb.Transformer(lambda params: tfb.Shift(params[..., 0]), params_per_dim=1),
    ... )
    >>> coupling.forward([1.0, 1.0]).numpy()
    array([1., 4.], dtype=float32)
    """

    def __init__(
        self,
        network: Callable[..., tf.Tensor],
        mask: masks.Mask,
        transformer: transformers.TransformerLike,
        validate_args: bool = False,
        parameters: dict | None = None,
        name: str = "coupling",
    ):
        parameters = dict(locals()) if parameters is None else parameters
        self._network = Network(network)
        self._mask = mask
        self._transformer = transformer
        super().__init__(
            forward_min_event_ndims=mask.event_ndims, validate_args=validate_args, parameters=parameters, name=name
        )

    @property
    def mask(self) -> masks.Mask:
        """The mask."""
        return self._mask

    @property
    def _uses_condition(self) -> bool:
        return self._network.accepts_condition

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return self._per_dim(*self._transform(x, condition, "forward"))

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return self._per_dim(*self._transform(y, condition, "inverse"))

    def _forward_and_log_det(self, x: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        if not self._is_plain("forward"):
            return super()._forward_and_log_det(x, condition, event_ndims)
        return self._summed(*self._transform(x, condition, "forward"), event_ndims)

    def _inverse_and_log_det(self, y: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        if not self._is_plain("inverse"):
            return super()._inverse_and_log_det(y, condition, event_ndims)
        return self._summed(*self._transform(y, condition, "inverse"), event_ndims)

    def _is_plain(self, direction: str) -> bool:
        """Whether no subclass has another pass in this direction."""
        primitive = f"_{direction}_and_log_det_per_dim"
        return getattr(type(self), primitive) is getattr(Coupling, primitive)

    def _transform(self, value: tf.Tensor, condition: Any, direction: str) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The conditioning part, the transformed part after the transformation, and the log-det there."""
        conditioning, transformed = self._mask.split(value)
        bijector = self._elementwise(conditioning, transformed, condition)
        return conditioning, *self._apply(bijector, transformed, direction)

    def _elementwise(self, conditioning: tf.Tensor, transformed: tf.Tensor, condition: Any) -> tfb.Bijector:
        params = self._network(conditioning, condition, event_ndims=self._mask.event_ndims)
        params = transformers.unpack(params, transformed, self._transformer.params_per_dim, self.name)
        return self._transformer(self._mask.select(params))

    def _apply(self, bijector: tfb.Bijector, transformed: tf.Tensor, direction: str) -> tuple[tf.Tensor, tf.Tensor]:
        shape = transformed.shape
        transformed, log_det = getattr(per_dimension, f"{direction}_and_log_det_per_dim")(bijector, transformed)
        transformed.set_shape(shape)  # TFP's spline loses it
        return transformed, base._fill(log_det, transformed)

    def _per_dim(self, conditioning: tf.Tensor, transformed: tf.Tensor, log_det: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        zeros = tf.zeros(ps.shape(conditioning), log_det.dtype)
        return self._mask.join(conditioning, transformed), self._mask.join(zeros, log_det)

    def _summed(
        self, conditioning: tf.Tensor, transformed: tf.Tensor, log_det: tf.Tensor, event_ndims: int
    ) -> tuple[tf.Tensor, tf.Tensor]:
        log_det = tf.squeeze(self._mask.select(tf.expand_dims(log_det, axis=-1)), axis=-1)
        return self._mask.join(conditioning, transformed), base.sum_event(log_det, transformed, event_ndims)

    def _again(
        self, result: tf.Tensor, event_ndims: int, direction: str, condition: Any, tape: tf.GradientTape
    ) -> recompute.Again:
        """`recompute.again` with one evaluation of the network, which sees the same before and after the transformation."""
        conditioning, transformed = self._mask.split(result)
        tape.watch(conditioning)
        bijector = self._elementwise(conditioning, transformed, condition)
        with tape.stop_recording():
            transformed, _ = self._apply(bijector, transformed, per_dimension._opposite(direction))
        tape.watch(transformed)
        again = self._summed(conditioning, *self._apply(bijector, transformed, direction), event_ndims)
        return recompute.Again([conditioning, transformed], lambda parts: self._mask.join(*parts), *again)


@recompute.again.register
def _(
    bijector: Coupling, result: tf.Tensor, event_ndims: int, direction: str, kwargs: dict[str, Any], tape: tf.GradientTape
) -> recompute.Again:
    if not bijector._is_plain(direction):
        return recompute.again.dispatch(object)(bijector, result, event_ndims, direction, kwargs, tape)
    return bijector._again(result, event_ndims, direction, bijector._route(kwargs.get("condition"), {}), tape)


class AffineCoupling(Coupling):
    """Affine coupling (RealNVP, Glow): from data to latent `z_b = (y_b + t(y_a)) * exp(s(y_a))`, `z_a = y_a`.

    The inverse log-det of a dimension is s on the transformed part, 0 on the conditioning part. The network returns
    `2 * channels` numbers, (t, raw s) of one entry next to each other.

    Args:
      network: as in `Coupling`.
      mask: one of `dfb.masks`.
      log_scale: how s is bounded: `"tanh"` (s = g tanh(raw), g trainable), `"sigmoid"` (exp(s) = sigmoid(raw + 2)) or
        `"exp"` (s = raw).
      initial_gain: initial g.
      dtype: dtype of g.
      validate_args: as in `tfb.Bijector`.
      name: the name of the operations.

    #### Example

    >>> coupling = dfb.AffineCoupling(lambda x: tf.repeat(x, 2, axis=-1), dfb.masks.Channel(event_ndims=1), log_scale="exp")
    >>> coupling.inverse_log_det_per_dim([0.5, 3.0]).numpy()
    array([0. , 0.5], dtype=float32)
    """

    def __init__(
        self,
        network: Callable[..., tf.Tensor],
        mask: masks.Mask,
        log_scale: str = "tanh",
        initial_gain: float = 1.0,
        dtype: tf.DType = tf.float32,
        validate_args: bool = False,
        name: str = "affine_coupling",
    ):
        parameters = dict(locals())
        super().__init__(network, mask, transformers.Affine(log_scale, initial_gain, dtype), validate_args, parameters, name)


class AdditiveCoupling(Coupling):
    """Additive coupling (NICE): from data to latent `z_b = y_b + t(y_a)`, `z_a = y_a`; the log-det is 0.

    Args:
      network: as in `Coupling`; returns t, `channels` numbers.
      mask: one of `dfb.masks`.
      validate_args: as in `tfb.Bijector`.
      name: the name of the operations.

    #### Example

    >>> dfb.AdditiveCoupling(lambda x: x, dfb.masks.Channel(event_ndims=1)).inverse([1.0, 2.0]).numpy()
    array([1., 3.], dtype=float32)
    """

    def __init__(
        self, network: Callable[..., tf.Tensor], mask: masks.Mask, validate_args: bool = False, name: str = "additive_coupling"
    ):
        parameters = dict(locals())
        super().__init__(network, mask, transformers.Additive(), validate_args, parameters, name)


class MixtureLogisticCoupling(Coupling):
    """Coupling through the distribution function of a mixture of logistics (Flow++); see `dfb.MixtureLogisticCDF`.

    The network returns `(2 + 3 num_components) * channels` numbers, those of one entry (a, t, K logits, K means, K log-scales)
    next to each other. Data to latent is a formula; latent to data is found by bisection, with implicit derivatives.

    Args:
      network: as in `Coupling`.
      mask: one of `dfb.masks`.
      num_components: number K of logistics; 32 in Flow++ for CIFAR-10.
      smooth: bounded slopes at the price of a density that integrates to less than 1; see `dfb.MixtureLogisticCDF`.
      validate_args: as in `tfb.Bijector`.
      name: the name of the operations.

    References: Ho, Chen, Srinivas, Duan, Abbeel, "Flow++", 2019.

    #### Example

    >>> network = keras.layers.Dense(1 * (2 + 3 * 4))
    >>> coupling = dfb.MixtureLogisticCoupling(network, dfb.masks.Channel(event_ndims=1), num_components=4)
    >>> coupling.forward(coupling.inverse([1.0, 2.0])).numpy().round(3)
    array([1., 2.], dtype=float32)
    """

    def __init__(
        self,
        network: Callable[..., tf.Tensor],
        mask: masks.Mask,
        num_components: int = 32,
        smooth: bool = False,
        validate_args: bool = False,
        name: str = "mixture_logistic_coupling",
    ):
        parameters = dict(locals())
        super().__init__(network, mask, transformers.MixtureLogistic(num_components, smooth), validate_args, parameters, name)


class SplineCoupling(Coupling):
    """Coupling with TFP's rational-quadratic splines (neural spline flows); see `dfb.transformers.Spline`.

    The network returns `(3 num_bins - 1) * channels` numbers, those of one entry next to each other. Both directions are
    formulas.

    Args:
      network: as in `Coupling`.
      mask: one of `dfb.masks`.
      num_bins: number of bins.
      bound: the spline works on [-bound, bound], outside it is the identity.
      validate_args: as in `tfb.Bijector`.
      name: the name of the operations.

    References: Durkan, Bekasov, Murray, Papamakarios, "Neural spline flows", 2019.

    #### Example

    >>> coupling = dfb.SplineCoupling(keras.layers.Dense(1 * (3 * 8 - 1)), dfb.masks.Channel(event_ndims=1))
    >>> coupling.forward(coupling.inverse([1.0, 2.0])).numpy().round(3)
    array([1., 2.], dtype=float32)
    """

    def __init__(
        self,
        network: Callable[..., tf.Tensor],
        mask: masks.Mask,
        num_bins: int = 8,
        bound: float = 5.0,
        validate_args: bool = False,
        name: str = "spline_coupling",
    ):
        parameters = dict(locals())
        super().__init__(network, mask, transformers.Spline(num_bins, bound), validate_args, parameters, name)


class ConditionalTransform(base.FlowBijector):
    """Bijector of the whole event whose parameters a network predicts from the condition alone (amortised parameters).

        forward: y = T(x; network(condition)),   inverse: x = T^-1(y; network(condition))

    With the affine transformer this is a conditional diagonal Gaussian on a standard normal base, such as Glow's prior of the
    dimensions that leave, given those that stay. With planar, radial or Sylvester flows it is a posterior of variational
    inference.

    Args:
      network: callable `condition -> parameters`, `params_per_dim` numbers for every entry of the event, or as many as T takes.
      transformer: a `dfb.Transformer`; or a function from the network's output to a bijector, whose parameters have the
        condition's batch axes, such as `functools.partial(dfb.Planar, dims)`.
      event_ndims: event axes of the value and of the condition: 1 or 3.
      validate_args: as in `tfb.Bijector`.
      name: the name of the operations.

    #### Example

    >>> exit = dfb.ConditionalTransform(lambda kept: tf.repeat(kept, 2, axis=-1), dfb.transformers.Affine("exp"), event_ndims=1)
    >>> exit.inverse_log_det_per_dim([3.0, 4.0], condition=tf.constant([0.5, 0.25])).numpy()
    array([0.5 , 0.25], dtype=float32)
    >>> network = keras.layers.Dense(dfb.Radial.num_params(2))
    >>> dfb.ConditionalTransform(network, lambda params: dfb.Radial(2, params), event_ndims=1).forward(
    ...     tf.zeros([5, 2]), condition=tf.ones([5, 8])
    ... ).shape
    TensorShape([5, 2])
    """

    _uses_condition = True

    def __init__(
        self,
        network: Callable[..., tf.Tensor],
        transformer: transformers.Transformer | Callable[[tf.Tensor], tfb.Bijector],
        event_ndims: int = 3,
        validate_args: bool = False,
        name: str = "conditional_transform",
    ):
        parameters = dict(locals())
        self._network = Network(network)
        self._transformer = transformer
        self._variables = variables_of(transformer)
        self._event_ndims = base.event_ndims_static(event_ndims, "ConditionalTransform")
        super().__init__(forward_min_event_ndims=event_ndims, validate_args=validate_args, parameters=parameters, name=name)

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return per_dimension.forward_and_log_det_per_dim(self._bijector(x, condition), x)

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return per_dimension.inverse_and_log_det_per_dim(self._bijector(y, condition), y)

    def _forward_and_log_det(self, x: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        return per_dimension.forward_and_log_det(self._bijector(x, condition), x, event_ndims)

    def _inverse_and_log_det(self, y: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        return per_dimension.inverse_and_log_det(self._bijector(y, condition), y, event_ndims)

    def _bijector(self, value: tf.Tensor, condition: Any) -> tfb.Bijector:
        if condition is None:
            raise ValueError(f"{self.name}: got no condition, needs one")
        params = self._network(tf.convert_to_tensor(condition), event_ndims=self._event_ndims)
        if isinstance(self._transformer, transformers.Transformer):
            params = transformers.unpack(params, value, self._transformer.params_per_dim, self.name)
        return self._transformer(params)


class Blockwise(base.FlowBijector):
    """Each of the two parts of a mask through a bijector of its own.

        forward:  y_a = first.forward(x_a),   y_b = second.forward(x_b);   the inverse and the log-dets alike

    Args:
      mask: one of `dfb.masks` whose parts hold only their own dimensions: not `Checkerboard`.
      first: bijector of the part that a coupling with this mask conditions on.
      second: bijector of the part that it transforms.
      validate_args: as in `tfb.Bijector`.
      name: the name of the operations.

    Raises:
      ValueError: for a checkerboard.

    #### Example

    >>> dfb.Blockwise(dfb.masks.Channel(event_ndims=1), tfb.Scale(2.0), tfb.Shift(1.0)).forward([1.0, 1.0]).numpy()
    array([2., 2.], dtype=float32)
    """

    def __init__(
        self, mask: masks.Mask, first: tfb.Bijector, second: tfb.Bijector, validate_args: bool = False, name: str = "blockwise"
    ):
        parameters = dict(locals())
        if isinstance(mask, masks.Checkerboard):
            raise ValueError("Blockwise: got a Checkerboard, whose parts hold zeros for each other's dimensions")
        self._mask, self._first, self._second = mask, first, second
        super().__init__(
            forward_min_event_ndims=mask.event_ndims, validate_args=validate_args, parameters=parameters, name=name
        )

    @property
    def _uses_condition(self) -> bool:
        return any(per_dimension.condition_kwargs(part, True) for part in (self._first, self._second))

    def _each(self, value: tf.Tensor, condition: Any, fused: Callable, *event_ndims: int) -> list[tuple]:
        parts = zip((self._first, self._second), self._mask.split(value))
        return [
            (part, *fused(bijector, part, *event_ndims, **per_dimension.condition_kwargs(bijector, condition)))
            for bijector, part in parts
        ]

    def _per_dim(self, value: tf.Tensor, condition: Any, fused: Callable) -> tuple[tf.Tensor, tf.Tensor]:
        results = self._each(value, condition, fused)
        log_dets = (base._fill(log_det, part) for part, _, log_det in results)
        return self._mask.join(*(result for _, result, _ in results)), self._mask.join(*log_dets)

    def _summed(self, value: tf.Tensor, condition: Any, fused: Callable, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        (_, first, first_log_det), (_, second, second_log_det) = self._each(value, condition, fused, event_ndims)
        return self._mask.join(first, second), first_log_det + second_log_det

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return self._per_dim(x, condition, per_dimension.forward_and_log_det_per_dim)

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return self._per_dim(y, condition, per_dimension.inverse_and_log_det_per_dim)

    def _forward_and_log_det(self, x: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        return self._summed(x, condition, per_dimension.forward_and_log_det, event_ndims)

    def _inverse_and_log_det(self, y: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        return self._summed(y, condition, per_dimension.inverse_and_log_det, event_ndims)

    def _transport_forward(self, per_dim: tf.Tensor) -> tf.Tensor:
        first, second = self._mask.split(per_dim)
        return self._mask.join(
            per_dimension.transport_forward(self._first, first), per_dimension.transport_forward(self._second, second)
        )

    def _transport_inverse(self, per_dim: tf.Tensor) -> tf.Tensor:
        first, second = self._mask.split(per_dim)
        return self._mask.join(
            per_dimension.transport_inverse(self._first, first), per_dimension.transport_inverse(self._second, second)
        )
