"""`VFlow`: a flow on data augmented by noise dimensions."""

from typing import Any

import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.bijectors import base, per_dimension


class VFlow(base.FlowBijector):
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
      validate_args: as in `tfb.Bijector`.
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
        self,
        flow: tfb.Bijector,
        posterior: tfb.Bijector | None,
        num_extra: int,
        event_ndims: int = 3,
        validate_args: bool = False,
        name: str = "vflow",
    ):
        parameters = dict(locals())
        if not isinstance(num_extra, int) or num_extra < 1:
            raise ValueError(f"VFlow: got num_extra={num_extra!r}, needs a positive integer")
        self._flow, self._posterior, self._num_extra = flow, posterior, num_extra
        self._event_ndims = base.event_ndims_static(event_ndims, "VFlow")
        # How event ranks propagate is the flow's own affair, from at least the rank of x.
        super().__init__(
            forward_min_event_ndims=flow.inverse_event_ndims(max(event_ndims, flow.inverse_min_event_ndims)),
            inverse_min_event_ndims=event_ndims,
            validate_args=validate_args,
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
        size = y.shape[-1]
        if size is None or size <= self._num_extra:
            raise ValueError(f"{self.name}: got events of shape {y.shape}, needs more than {self._num_extra} on the last axis")
        return y[..., : size - self._num_extra], y[..., size - self._num_extra :]

    @property
    def _uses_condition(self) -> bool:
        parts = [self._flow, *([] if self._posterior is None else [self._posterior])]
        return any(per_dimension.condition_kwargs(part, True) for part in parts)

    def _posterior_kwargs(self, x: tf.Tensor, condition: Any) -> dict[str, Any]:
        if not per_dimension.condition_kwargs(self._posterior, x):
            return {}
        condition = base.vector_condition(condition, x, self._event_ndims, self.name)
        return per_dimension.condition_kwargs(self._posterior, base.append_condition(x, condition, self._event_ndims))

    # Data to latent.

    def _inverse_and_log_det(self, y: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        x, z = self.split(y)
        fldj = 0.0
        if self._posterior is not None:
            kwargs = self._posterior_kwargs(x, condition)
            z, fldj = per_dimension.forward_and_log_det(self._posterior, z, event_ndims, **kwargs)
        kwargs = per_dimension.condition_kwargs(self._flow, condition)
        eps, ildj = per_dimension.inverse_and_log_det(self._flow, tf.concat([x, z], axis=-1), event_ndims, **kwargs)
        return eps, ildj + fldj

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        x, e = self.split(y)
        z, of_noise = e, None
        if self._posterior is not None:
            kwargs = self._posterior_kwargs(x, condition)
            z, of_noise = per_dimension.forward_and_log_det_per_dim(self._posterior, e, **kwargs)
        joint = tf.concat([x, z], axis=-1)
        kwargs = per_dimension.condition_kwargs(self._flow, condition)
        eps, log_det = per_dimension.inverse_and_log_det_per_dim(self._flow, joint, **kwargs)
        if of_noise is not None:
            of_x, of_z = self.split(base._fill(log_det, joint))
            of_e = base._fill(of_noise, e) + per_dimension.transport_inverse(self._posterior, of_z)
            log_det = tf.concat([of_x, of_e], axis=-1)
        return eps, log_det

    # Latent to data.

    def _forward_and_log_det(self, x: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        joint, fldj = per_dimension.forward_and_log_det(
            self._flow, x, event_ndims, **per_dimension.condition_kwargs(self._flow, condition)
        )
        if self._posterior is None:
            return joint, fldj
        x, z = self.split(joint)
        kwargs = self._posterior_kwargs(x, condition)
        event_ndims = self._flow.forward_event_ndims(event_ndims)
        e, ildj = per_dimension.inverse_and_log_det(self._posterior, z, event_ndims, **kwargs)
        return tf.concat([x, e], axis=-1), fldj + ildj

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        joint, log_det = per_dimension.forward_and_log_det_per_dim(
            self._flow, x, **per_dimension.condition_kwargs(self._flow, condition)
        )
        if self._posterior is None:
            return joint, log_det
        latent = x
        x, z = self.split(joint)
        e, of_z = per_dimension.inverse_and_log_det_per_dim(self._posterior, z, **self._posterior_kwargs(x, condition))
        of_z = base._fill(of_z, z)
        of_joint = tf.concat([tf.zeros_like(x, of_z.dtype), of_z], axis=-1)
        log_det = base._fill(log_det, latent) + per_dimension.transport_inverse(self._flow, of_joint)
        return tf.concat([x, e], axis=-1), log_det

    def _transport_inverse(self, per_dim: tf.Tensor) -> tf.Tensor:
        if self._posterior is not None:
            of_x, of_e = self.split(per_dim)
            per_dim = tf.concat([of_x, per_dimension.transport_forward(self._posterior, of_e)], axis=-1)
        return per_dimension.transport_inverse(self._flow, per_dim)

    def _transport_forward(self, per_dim: tf.Tensor) -> tf.Tensor:
        per_dim = per_dimension.transport_forward(self._flow, per_dim)
        if self._posterior is not None:
            of_x, of_z = self.split(per_dim)
            per_dim = tf.concat([of_x, per_dimension.transport_inverse(self._posterior, of_z)], axis=-1)
        return per_dim

    # Shapes.

    def _forward_event_shape(self, shape: tf.TensorShape) -> tf.TensorShape:
        return self._flow.forward_event_shape(shape)

    def _inverse_event_shape(self, shape: tf.TensorShape) -> tf.TensorShape:
        return self._flow.inverse_event_shape(shape)

    def _forward_event_shape_tensor(self, shape: tf.Tensor) -> tf.Tensor:
        return self._flow.forward_event_shape_tensor(shape)

    def _inverse_event_shape_tensor(self, shape: tf.Tensor) -> tf.Tensor:
        return self._flow.inverse_event_shape_tensor(shape)
