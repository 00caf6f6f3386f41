"""`EmbedCondition`: a bijector whose condition first passes an embedding."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors import base
from tfp_dimflows.bijectors.conditions import uses_condition
from tfp_dimflows.bijectors.walk import Walk, fresh
from tfp_dimflows.keras_bridge import Network


class EmbedCondition(base.Composite):
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
      name: the name of the operations.

    Raises:
      ValueError: if no part of the bijector can use a condition.

    #### Example

    >>> shift = dfb.ConditionalTransform(lambda c: c, dfb.transformers.Additive(), event_ndims=1)
    >>> dfb.EmbedCondition(shift, tf.square, condition_ndims=1).inverse([1.0, 1.0], condition=[2.0, 3.0]).numpy()
    array([ 5., 10.], dtype=float32)
    """

    uses_condition = True

    def __init__(
        self,
        bijector: tfb.Bijector,
        embedding: Callable[[tf.Tensor], tf.Tensor],
        condition_ndims: int,
        name: str = "embed_condition",
    ):
        parameters = dict(locals())
        if not uses_condition(bijector):
            raise ValueError(f"EmbedCondition: no part of {bijector.name} can use a condition")
        self._bijector = self._shapes = bijector
        self._embedding = Network(embedding)
        self._condition_ndims = condition_ndims
        super().__init__(
            forward_min_event_ndims=bijector.forward_min_event_ndims,
            inverse_min_event_ndims=bijector.inverse_min_event_ndims,
            dtype=bijector.dtype,
            is_constant_jacobian=bijector.is_constant_jacobian,
            parameters=parameters,
            name=name,
        )

    @property
    def bijector(self) -> tfb.Bijector:
        """The bijector whose condition is embedded."""
        return self._bijector

    def _embedded(self, condition: Any) -> Any:
        if condition is None:
            return None
        return self._embedding(fresh(tf.convert_to_tensor(condition)), event_ndims=self._condition_ndims)

    def _walk_forward(self, x: Walk, condition: Any) -> Walk:
        return x.forward(self._bijector, self._embedded(condition))

    def _walk_inverse(self, y: Walk, condition: Any) -> Walk:
        return y.inverse(self._bijector, self._embedded(condition))
