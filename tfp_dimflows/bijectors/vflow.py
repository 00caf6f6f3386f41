"""`VFlow`: a flow on data augmented by noise dimensions."""

from typing import Any

import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors import base
from tfp_dimflows.bijectors.conditions import append_condition, uses_condition, vector_condition
from tfp_dimflows.bijectors.walk import Parts, Walk


class VFlow(base.Composite):
    """Variational data augmentation: a flow on events x joined with extra dimensions e of noise.

    The noise becomes z by a conditional flow, the posterior q(z | x), and the augmented event [x, z] passes the flow:

        inverse (data to latent):  z = posterior.forward(e; condition=x),   eps = flow.inverse([x, z])
        forward:                   [x, z] = flow.forward(eps),   e = posterior.inverse(z; condition=x)
        inverse log-det:           flow's inverse log-det + posterior's forward log-det

    Data events are [x, e], joined along the last axis: vectors `[D + num_extra]` or images `[H, W, C + num_extra]`.
    `dfd.Augmented` makes it a distribution over x, whose bounds are those of the method: with e standard normal,
    log p(x, e) - log N(e) = log p(x, z) - log q(z | x). Cost: one pass of the flow, one of the posterior.

    A posterior whose values are bounded, such as one that ends in a sigmoid, leaves out the z beyond: the bounds are then those
    of the probability of x together with a z within (still lower bounds of log p(x)), and `forward` has no finite e for others.

    A condition goes to the flow and, joined to x along the last axis, to the posterior, unless that takes none.

    Args:
      flow: bijector of the augmented events, any one: multi-scale, LCMA, progressive.
      posterior: bijector from e to z, events of the extra dimensions, given x as condition; None: z = e, q(z | x) = N(0, I).
      num_extra: number of extra dimensions (vectors) or channels (images).
      event_ndims: event axes of x: 1 or 3.
      name: the name of the operations.

    Raises:
      ValueError: unless num_extra is positive; when an event has no more dimensions than the extra ones; when a posterior that
        takes a condition is given more of it than one vector for each event.

    References: Chen, Lu, Chenli, Zhu, Tian, "VFlow: More expressive generative flows with variational data augmentation", 2020.

    #### Example

    >>> posterior = dfb.ConditionalTransform(lambda x: tf.repeat(x, 2, axis=-1), dfb.transformers.Affine("exp"), event_ndims=1)
    >>> vflow = dfb.VFlow(tfb.Scale(2.0), posterior, num_extra=1, event_ndims=1)
    >>> vflow.inverse([1.0, 0.0]).numpy()
    array([ 0.5, -0.5], dtype=float32)
    >>> vflow.inverse_log_det_per_dim([1.0, 0.0]).numpy().round(3)
    array([-0.693, -1.693], dtype=float32)
    """

    def __init__(
        self, flow: tfb.Bijector, posterior: tfb.Bijector | None, num_extra: int, event_ndims: int = 3, name: str = "vflow"
    ):
        parameters = dict(locals())
        if not isinstance(num_extra, int) or num_extra < 1:
            raise ValueError(f"VFlow: got num_extra={num_extra!r}, needs a positive integer")
        self._flow, self._posterior, self._num_extra = flow, posterior, num_extra
        self._shapes = flow
        self._event_ndims = base.event_ndims_static(event_ndims, "VFlow")
        # How event ranks propagate is the flow's own affair, from at least the rank of x.
        super().__init__(
            forward_min_event_ndims=flow.inverse_event_ndims(max(event_ndims, flow.inverse_min_event_ndims)),
            inverse_min_event_ndims=event_ndims,
            parameters=parameters,
            name=name,
        )

    @property
    def flow(self) -> tfb.Bijector:
        """The flow of the augmented events."""
        return self._flow

    @property
    def posterior(self) -> tfb.Bijector | None:
        """The flow from noise to the extra dimensions, given x."""
        return self._posterior

    @property
    def num_extra(self) -> int:
        """The number of extra dimensions or channels."""
        return self._num_extra

    def split(self, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The parts x and e of events."""
        size = self._size_of_data(y.shape)
        return y[..., :size], y[..., size:]

    def _size_of_data(self, shape: tf.TensorShape) -> int:
        if shape[-1] is None or shape[-1] <= self._num_extra:
            raise ValueError(f"{self.name}: got events of shape {shape}, needs more than {self._num_extra} on the last axis")
        return shape[-1] - self._num_extra

    @property
    def uses_condition(self) -> bool:
        """Whether the flow or the posterior can use a condition beside x."""
        return uses_condition(self._flow) or (self._posterior is not None and uses_condition(self._posterior))

    def _given(self, x: tf.Tensor | None, condition: Any) -> tf.Tensor | None:
        """What the posterior is given, unless it takes no condition."""
        if x is None or not uses_condition(self._posterior):
            return None
        return append_condition(x, vector_condition(condition, x, self._event_ndims, self.name), self._event_ndims)

    def _walk_inverse(self, y: Walk, condition: Any) -> Walk:
        self._size_of_data(y.shape)
        if self._posterior is None:
            return y.inverse(self._flow, condition)
        x, e = y.split(self._parts)
        z = e.forward(self._posterior, self._given(x.value, condition))
        return x.join(z, by=self._parts).inverse(self._flow, condition)

    def _walk_forward(self, x: Walk, condition: Any) -> Walk:
        y = x.forward(self._flow, condition)
        if self._posterior is None:
            return y
        x, z = y.split(self._parts)
        e = z.inverse(self._posterior, self._given(x.value, condition))
        return x.join(e, by=self._parts)

    @property
    def _parts(self) -> Parts:
        return Parts(self.split, lambda x, e: tf.concat([x, e], axis=-1))
