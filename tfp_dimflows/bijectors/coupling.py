"""Coupling layers: one part of the event conditions an elementwise transformation of the other."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors import base, masks, recompute, transformers
from tfp_dimflows.bijectors.conditions import uses_condition
from tfp_dimflows.bijectors.log_dets import fill, sum_event
from tfp_dimflows.bijectors.walk import Parts, Walk, opposite, value_and_log_det, value_and_log_det_per_dim
from tfp_dimflows.keras_bridge import Network, variables_of
from tfp_dimflows.renamed import renamed
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
        parameters: dict | None = None,
        name: str = "coupling",
    ):
        parameters = dict(locals()) if parameters is None else parameters
        self._network = Network(network)
        self._mask = mask
        self._transformer = transformer
        super().__init__(forward_min_event_ndims=mask.event_ndims, parameters=parameters, name=name)

    @property
    def mask(self) -> masks.Mask:
        """The mask."""
        return self._mask

    @property
    def uses_condition(self) -> bool:
        """Whether the network takes a condition."""
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
        transformed, log_det = value_and_log_det_per_dim(bijector, transformed, direction, {})
        transformed.set_shape(shape)  # TFP's spline loses it
        return transformed, fill(log_det, transformed)

    def _per_dim(self, conditioning: tf.Tensor, transformed: tf.Tensor, log_det: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        zeros = tf.zeros(ps.shape(conditioning), log_det.dtype)
        return self._mask.join(conditioning, transformed), self._mask.join(zeros, log_det)

    def _summed(
        self, conditioning: tf.Tensor, transformed: tf.Tensor, log_det: tf.Tensor, event_ndims: int
    ) -> tuple[tf.Tensor, tf.Tensor]:
        log_det = tf.squeeze(self._mask.select(tf.expand_dims(log_det, axis=-1)), axis=-1)
        return self._mask.join(conditioning, transformed), sum_event(log_det, transformed, event_ndims)

    def _again(
        self, result: tf.Tensor, event_ndims: int, direction: str, condition: Any, tape: tf.GradientTape
    ) -> recompute.Again:
        """`recompute.again` with one evaluation of the network, which sees the same before and after the transformation."""
        conditioning, transformed = self._mask.split(result)
        tape.watch(conditioning)
        bijector = self._elementwise(conditioning, transformed, self._route(condition, {}))
        with tape.stop_recording():
            transformed, _ = self._apply(bijector, transformed, opposite(direction))
        tape.watch(transformed)
        again = self._summed(conditioning, *self._apply(bijector, transformed, direction), event_ndims)
        return recompute.Again([conditioning, transformed], lambda parts: self._mask.join(*parts), *again)


@recompute.again.register
def _again(
    bijector: Coupling, result: tf.Tensor, event_ndims: int, direction: str, kwargs: dict[str, Any], tape: tf.GradientTape
) -> recompute.Again:
    if not bijector._is_plain(direction):
        return recompute.again.dispatch(object)(bijector, result, event_ndims, direction, kwargs, tape)
    return bijector._again(result, event_ndims, direction, kwargs.get("condition"), tape)


class AffineCoupling(Coupling):
    """Affine coupling (RealNVP, Glow): from data to latent `z_b = (y_b + t(y_a)) * exp(s(y_a))`, `z_a = y_a`.

    The inverse log-det of a dimension is s on the transformed part, 0 on the conditioning part. The network returns
    `2 * channels` numbers, (t, raw s) of one entry next to each other.

    Args:
      network: as in `Coupling`.
      mask: one of `dfb.masks`.
      scale: how s is bounded: `"tanh"` (s = g tanh(raw), g trainable), `"sigmoid"` (exp(s) = sigmoid(raw + 2)) or
        `"exp"` (s = raw).
      initial_gain: initial g.
      dtype: dtype of g.
      name: the name of the operations.

    #### Example

    >>> coupling = dfb.AffineCoupling(lambda x: tf.repeat(x, 2, axis=-1), dfb.masks.Channel(event_ndims=1), scale="exp")
    >>> coupling.inverse_log_det_per_dim([0.5, 3.0]).numpy()
    array([0. , 0.5], dtype=float32)
    """

    @renamed(log_scale="scale")
    def __init__(
        self,
        network: Callable[..., tf.Tensor],
        mask: masks.Mask,
        scale: str = "tanh",
        initial_gain: float = 1.0,
        dtype: tf.DType = tf.float32,
        name: str = "affine_coupling",
    ):
        parameters = dict(locals())
        super().__init__(network, mask, transformers.Affine(scale, initial_gain, dtype), parameters, name)


class AdditiveCoupling(Coupling):
    """Additive coupling (NICE): from data to latent `z_b = y_b + t(y_a)`, `z_a = y_a`; the log-det is 0.

    Args:
      network: as in `Coupling`; returns t, `channels` numbers.
      mask: one of `dfb.masks`.
      name: the name of the operations.

    #### Example

    >>> dfb.AdditiveCoupling(lambda x: x, dfb.masks.Channel(event_ndims=1)).inverse([1.0, 2.0]).numpy()
    array([1., 3.], dtype=float32)
    """

    def __init__(self, network: Callable[..., tf.Tensor], mask: masks.Mask, name: str = "additive_coupling"):
        parameters = dict(locals())
        super().__init__(network, mask, transformers.Additive(), parameters, name)


class MixtureLogisticCoupling(Coupling):
    """Coupling through the distribution function of a mixture of logistics (Flow++); see `dfb.MixtureLogisticCDF`.

    The network returns `(2 + 3 num_components) * channels` numbers, those of one entry (a, t, K logits, K means, K log-scales)
    next to each other. Data to latent is a formula; latent to data is found by bisection, with implicit derivatives.

    Args:
      network: as in `Coupling`.
      mask: one of `dfb.masks`.
      num_components: number K of logistics; 32 in Flow++ for CIFAR-10.
      smooth: bounded slopes at the price of a density that integrates to less than 1; see `dfb.MixtureLogisticCDF`.
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
        name: str = "mixture_logistic_coupling",
    ):
        parameters = dict(locals())
        super().__init__(network, mask, transformers.MixtureLogistic(num_components, smooth), parameters, name)


class SplineCoupling(Coupling):
    """Coupling with TFP's rational-quadratic splines (neural spline flows); see `dfb.transformers.Spline`.

    The network returns `(3 num_bins - 1) * channels` numbers, those of one entry next to each other. Both directions are
    formulas.

    Args:
      network: as in `Coupling`.
      mask: one of `dfb.masks`.
      num_bins: number of bins.
      bound: the spline works on [-bound, bound], outside it is the identity.
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
        name: str = "spline_coupling",
    ):
        parameters = dict(locals())
        super().__init__(network, mask, transformers.Spline(num_bins, bound), parameters, name)


class ConditionalTransform(base.FlowBijector):
    """Bijector of the whole event whose parameters a network predicts from the condition alone (amortised parameters).

        forward: y = T(x; network(condition)),   inverse: x = T^-1(y; network(condition))

    With the affine transformer this is a conditional diagonal Gaussian on a standard normal base, such as Glow's prior of the
    dimensions that leave, given those that stay. With planar, radial or Sylvester flows it is a posterior of variational
    inference.

    Args:
      network: callable `condition -> parameters`, `params_per_dim` numbers for every entry of the event, or as many as T takes.
      transformer: a `dfb.Transformer`; or a function from the network's output to a bijector that leaves dimensions in their
        places and whose parameters have the condition's batch axes, such as `functools.partial(dfb.Planar, dims)`.
      event_ndims: event axes of the value and of the condition: 1 or 3.
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

    uses_condition = True

    def __init__(
        self,
        network: Callable[..., tf.Tensor],
        transformer: transformers.Transformer | Callable[[tf.Tensor], tfb.Bijector],
        event_ndims: int = 3,
        name: str = "conditional_transform",
    ):
        parameters = dict(locals())
        self._network = Network(network)
        self._transformer = transformer
        self._variables = variables_of(transformer)
        self._event_ndims = base.event_ndims_static(event_ndims, "ConditionalTransform")
        super().__init__(forward_min_event_ndims=event_ndims, parameters=parameters, name=name)

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return value_and_log_det_per_dim(self._bijector(x, condition), x, "forward", {})

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return value_and_log_det_per_dim(self._bijector(y, condition), y, "inverse", {})

    def _forward_and_log_det(self, x: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        return value_and_log_det(self._bijector(x, condition), x, "forward", event_ndims, {})

    def _inverse_and_log_det(self, y: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        return value_and_log_det(self._bijector(y, condition), y, "inverse", event_ndims, {})

    def _bijector(self, value: tf.Tensor, condition: Any) -> tfb.Bijector:
        if condition is None:
            raise ValueError(f"{self.name}: got no condition, needs one")
        params = self._network(tf.convert_to_tensor(condition), event_ndims=self._event_ndims)
        if isinstance(self._transformer, transformers.Transformer):
            params = transformers.unpack(params, value, self._transformer.params_per_dim, self.name)
        return self._transformer(params)


class Blockwise(base.Composite):
    """Each of the two parts of a mask through a bijector of its own.

        forward:  y_a = first.forward(x_a),   y_b = second.forward(x_b);   the inverse and the log-dets alike

    Args:
      mask: one of `dfb.masks` whose parts hold only their own dimensions: not `Checkerboard`.
      first: bijector of the part that a coupling with this mask conditions on.
      second: bijector of the part that it transforms.
      name: the name of the operations.

    Raises:
      ValueError: for a checkerboard.

    #### Example

    >>> dfb.Blockwise(dfb.masks.Channel(event_ndims=1), tfb.Scale(2.0), tfb.Shift(1.0)).forward([1.0, 1.0]).numpy()
    array([2., 2.], dtype=float32)
    """

    def __init__(self, mask: masks.Mask, first: tfb.Bijector, second: tfb.Bijector, name: str = "blockwise"):
        parameters = dict(locals())
        if isinstance(mask, masks.Checkerboard):
            raise ValueError("Blockwise: got a Checkerboard, whose parts hold zeros for each other's dimensions")
        self._first, self._second = first, second
        self._parts = Parts(mask.split, mask.join)
        super().__init__(forward_min_event_ndims=mask.event_ndims, parameters=parameters, name=name)

    @property
    def uses_condition(self) -> bool:
        """Whether one of the two can use a condition."""
        return uses_condition(self._first) or uses_condition(self._second)

    def _walk_forward(self, x: Walk, condition: Any) -> Walk:
        first, second = x.split(self._parts)
        return first.forward(self._first, condition).join(second.forward(self._second, condition), by=self._parts)

    def _walk_inverse(self, y: Walk, condition: Any) -> Walk:
        first, second = y.split(self._parts)
        return first.inverse(self._first, condition).join(second.inverse(self._second, condition), by=self._parts)
