"""Autoregressive flows: every dimension is transformed given the ones before it."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors import base, implicit, transformers
from tfp_dimflows.bijectors.walk import value_and_log_det_per_dim
from tfp_dimflows.keras_bridge import Network
from tfp_dimflows.upstream import prefer_static as ps
from tfp_dimflows.upstream import record


class Autoregressive(base.FlowBijector):
    r"""Autoregressive flow with any network and elementwise transformer T (a MAF; its `tfb.Invert` is an IAF).

        inverse (data to latent):  x_i = T^-1(y_i; network(y_<i, condition)), for all i at once
        forward:                   y_i = T(x_i; network(y_<i, condition)), one i after the other
        inverse log-det of dimension i: log |dT^-1/dy_i|

    The network is given whole events, and its parameters of a dimension may depend only on dimensions that come before it in
    some order, as those of `networks.MADE`, `networks.PixelCNN` and `networks.WaveNet` do. What the order is, this class need
    not know: `forward` repeats y <- T(x; network(y)) until nothing changes any more, which is exact after at most D times, D
    dimensions in an event, and often much earlier. Its gradients are those of the implicit function (first derivatives only).

    Cost: `inverse` one evaluation of the network. `forward` up to D + 2 evaluations in one `tf.while_loop`, and its gradient up
    to D vector-Jacobian products, in memory that does not grow with D. Use the direction that must be fast as `inverse`: for
    likelihoods of data this class, for samples of a variational posterior its `tfb.Invert`.

    Args:
      network: callable `(x, condition) -> parameters`, `[N, ..., channels * params_per_dim]` for events `[N, ..., channels]`,
        those of one entry next to each other.
      transformer: a `dfb.Transformer`.
      event_ndims: 1 for vectors, 3 for images.
      name: the name of the operations.

    Raises:
      ValueError: when the network returns another number of parameters.

    References: Papamakarios, Pavlakou, Murray, "Masked autoregressive flow for density estimation", 2017; Kingma et al.,
    "Improving variational inference with inverse autoregressive flow", 2016.

    #### Example

    >>> network = dimflows.networks.MADE(3, 3 * 2, hidden=[16])
    >>> maf = dfb.Autoregressive(network, dfb.transformers.Affine())
    >>> iaf = tfb.Invert(dfb.Autoregressive(network, dfb.transformers.Gated()))
    >>> maf.forward(maf.inverse([1.0, 2.0, 3.0])).numpy().round(3)
    array([1., 2., 3.], dtype=float32)
    """

    def __init__(
        self,
        network: Callable[..., tf.Tensor],
        transformer: transformers.TransformerLike,
        event_ndims: int = 1,
        name: str = "autoregressive",
    ):
        parameters = dict(locals())
        self._network = Network(network)
        self._transformer = transformer
        self._event_ndims = base.event_ndims_static(event_ndims, "Autoregressive")
        super().__init__(forward_min_event_ndims=event_ndims, parameters=parameters, name=name)

    @property
    def uses_condition(self) -> bool:
        """Whether the network takes a condition."""
        return self._network.accepts_condition

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return self._keep_shape(*value_and_log_det_per_dim(self._bijector(y, condition), y, "inverse", {}), y)

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        bijector = self._bijector(self._solve(x, condition), condition)
        return self._keep_shape(*value_and_log_det_per_dim(bijector, x, "forward", {}), x)

    def _bijector(self, y: tf.Tensor, condition: Any) -> tfb.Bijector:
        """T given the y before each dimension."""
        params = self._network(y, condition, event_ndims=self._event_ndims)
        return self._transformer(transformers.unpack(params, y, self._transformer.params_per_dim, self.name))

    def _solve(self, x: tf.Tensor, condition: Any) -> tf.Tensor:
        """The solution y of y = T(x; network(y)), with the gradients of the implicit function."""

        def function(y: tf.Tensor) -> tf.Tensor:
            # Until its predecessors are right, a dimension may overflow, and infinity times a mask's 0 would reach them.
            bijector = self._bijector(tf.where(tf.math.is_finite(y), y, 0.0), condition)
            return value_and_log_det_per_dim(bijector, x, "forward", {})[0]

        with record.stop_recording():
            y = tf.stop_gradient(self._repeat(function, x))
        value, vjp = implicit.with_vjp(function, y)
        return implicit.with_adjoint(y, value, lambda upstream: self._repeat(lambda w: upstream + vjp(w), upstream))

    def _repeat(self, function: Callable[[tf.Tensor], tf.Tensor], start: tf.Tensor) -> tf.Tensor:
        """The fixed point of a function that sets every dimension right once all before it are."""
        dims = ps.reduce_prod(ps.shape(start)[ps.rank(start) - self._event_ndims :])

        def unfinished(step: tf.Tensor, value: tf.Tensor, changed: tf.Tensor) -> tf.Tensor:
            return (step < dims) & changed

        def apply(step: tf.Tensor, value: tf.Tensor, changed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            new = function(value)
            new.set_shape(start.shape)
            return step + 1, new, tf.reduce_any(new != value)

        return tf.while_loop(unfinished, apply, [0, start, True], parallel_iterations=1)[1]

    def _keep_shape(self, result: tf.Tensor, log_det: tf.Tensor, value: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        result.set_shape(value.shape)  # TFP's spline loses it
        return result, log_det
