"""`EmbedCondition`: a bijector whose condition first passes an embedding."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors import base, per_dimension
from tfp_dimflows.keras_bridge import Network


class EmbedCondition(base.FlowBijector):
    """The given bijector, under an embedding of the condition that all its parts share.

        e = embedding(condition)
        forward:  y = bijector.forward(x, condition=e),   inverse:  x = bijector.inverse(y, condition=e)

    The log-dets are the bijector's. The embedding is evaluated once per pass, however many conditioners use it. Without a
    condition the bijector gets none.

    Args:
      bijector: a bijector, some part of which can use a condition.
      embedding: callable `condition -> embedded condition`, a network or another bijector's `inverse`, say; it gets tensors
        with one batch axis.
      condition_ndims: number of axes of one condition: 1 for a vector, 3 for an image.
      validate_args: as in `tfb.Bijector`.
      name: the name of the operations.

    Raises:
      ValueError: if no part of the bijector can use a condition.

    #### Example

    >>> shift = dfb.ConditionalTransform(lambda c: c, dfb.transformers.Additive(), event_ndims=1)
    >>> dfb.EmbedCondition(shift, tf.square, condition_ndims=1).inverse([1.0, 1.0], condition=[2.0, 3.0]).numpy()
    array([ 5., 10.], dtype=float32)
    """

    _uses_condition = True

    def __init__(
        self,
        bijector: tfb.Bijector,
        embedding: Callable[[tf.Tensor], tf.Tensor],
        condition_ndims: int,
        validate_args: bool = False,
        name: str = "embed_condition",
    ):
        parameters = dict(locals())
        if not per_dimension.condition_kwargs(bijector, True):
            raise ValueError(f"EmbedCondition: no part of {bijector.name} can use a condition")
        self._bijector = bijector
        self._embedding = Network(embedding)
        self._condition_ndims = condition_ndims
        super().__init__(
            forward_min_event_ndims=bijector.forward_min_event_ndims,
            inverse_min_event_ndims=bijector.inverse_min_event_ndims,
            dtype=bijector.dtype,
            is_constant_jacobian=bijector.is_constant_jacobian,
            validate_args=validate_args,
            parameters=parameters,
            name=name,
        )

    @property
    def bijector(self) -> tfb.Bijector:
        """The bijector whose condition is embedded."""
        return self._bijector

    def _kwargs(self, condition: Any) -> dict[str, Any]:
        if condition is None:
            return {}
        # A new tensor misses TFP's cache, which would return what a bijector computed before a variable was updated.
        condition = tf.identity(tf.convert_to_tensor(condition))
        embedded = self._embedding(condition, event_ndims=self._condition_ndims)
        return per_dimension.condition_kwargs(self._bijector, embedded)

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return per_dimension.forward_and_log_det_per_dim(self._bijector, x, **self._kwargs(condition))

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return per_dimension.inverse_and_log_det_per_dim(self._bijector, y, **self._kwargs(condition))

    def _forward_and_log_det(self, x: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        return per_dimension.forward_and_log_det(self._bijector, x, event_ndims, **self._kwargs(condition))

    def _inverse_and_log_det(self, y: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        return per_dimension.inverse_and_log_det(self._bijector, y, event_ndims, **self._kwargs(condition))

    def _transport_forward(self, per_dim: tf.Tensor) -> tf.Tensor:
        return per_dimension.transport_forward(self._bijector, per_dim)

    def _transport_inverse(self, per_dim: tf.Tensor) -> tf.Tensor:
        return per_dimension.transport_inverse(self._bijector, per_dim)

    def _forward_event_shape(self, shape: tf.TensorShape) -> tf.TensorShape:
        return self._bijector.forward_event_shape(shape)

    def _inverse_event_shape(self, shape: tf.TensorShape) -> tf.TensorShape:
        return self._bijector.inverse_event_shape(shape)

    def _forward_event_shape_tensor(self, shape: tf.Tensor) -> tf.Tensor:
        return self._bijector.forward_event_shape_tensor(shape)

    def _inverse_event_shape_tensor(self, shape: tf.Tensor) -> tf.Tensor:
        return self._bijector.inverse_event_shape_tensor(shape)
