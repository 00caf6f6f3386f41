"""`PNF`: a flow that grows an image, or a signal, stage by stage."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.types.experimental import TensorLike
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows.bijectors import per_dimension
from tfp_dimflows.bijectors.base import FlowBijector, _fill, append_condition, log_det_dtype, to_tensor, vector_condition
from tfp_dimflows.bijectors.haar import HaarSplit
from tfp_dimflows.upstream import prefer_static as ps
from tfp_dimflows.upstream import samplers


class PNF(FlowBijector):
    r"""Progressive normalizing flow between a flat latent vector `[D]` and an event, an image `[H, W, C]` or a signal `[D]`.

    From data to latent, `HaarSplit`s halve the event y = h_K again and again; what is lost in a halving is modelled given what
    remains:

        (h_{k-1}, Delta_k) = split_k(h_k),   u_k = detail_k.inverse(Delta_k; condition=h_{k-1}),   k = K ... 1
        u_0 = base.inverse(h_0),   z = [u_0, u_1, ..., u_K]
        inverse log-det = sum of the stages' inverse log-dets - (D - D_0) ln 2,   D_0 = size of h_0

    and from latent to data `h_k = merge_k(h_{k-1}, detail_k.forward(u_k; condition=h_{k-1}))`. The constant is
    that of the halvings (each pair contributes -ln 2); with `orthonormal=True` it is 0. An image is halved along its height
    first (stage K), then along its width, and so on in turns, so that from coarse to fine it grows along x (the width) first
    when K is even. Each stage's parameters are its own, and every term of the log-density depends on one stage's only.

    The latent is ordered base first, then the details from coarse to fine, so `z[..., :D_0]` is the low-dimensional code. One
    pass evaluates every stage once. Stages are any bijectors: their latent values may be flat or of any shape. A `condition=`
    of the whole flow is a vector: the base is given it as it is, the details get it as further channels of h_{k-1}, repeated at
    every position.

    Args:
      base: bijector of the coarsest image h_0.
      details: bijectors of the details, from coarse to fine, K of them; detail k works on events of the shape of h_{k-1}, and,
        if it can use a condition, is given h_{k-1}.
      event_shape: `[H, W, C]` or `[D]`.
      orthonormal: whether the halvings divide by sqrt(2) (orthonormal Haar transform) rather than 2 (averages).
      validate_args: as in `tfb.Bijector`.
      name: the name of the operations.

    Raises:
      ValueError: if the event's sides cannot be halved as often as there are details, or a stage does not fit its shape.

    References: "PNF: Progressive normalizing flows" (with mirrored orders of analysis and synthesis, and the constant
    included); Yu, Derpanis, Brubaker, "Wavelet Flow: Fast training of high resolution normalizing flows", 2020.

    #### Example

    >>> shift = dfb.ConditionalTransform(lambda low: 0.1 * low, dfb.transformers.Additive(), event_ndims=1)
    >>> flow = dfb.PNF(tfb.Scale(2.0), [shift, tfb.Identity()], event_shape=[8])
    >>> signal = tf.constant([1.0, 3.0, 5.0, 7.0, 2.0, 2.0, 4.0, 0.0])
    >>> flow.encode(signal).numpy()
    array([4., 2.], dtype=float32)
    >>> flow.encode(flow.upscale([[4.0, 2.0]], seed=0)).numpy().round(5)
    array([[4., 2.]], dtype=float32)
    """

    def __init__(
        self,
        base: tfb.Bijector,
        details: Sequence[tfb.Bijector],
        event_shape: Sequence[int],
        orthonormal: bool = False,
        validate_args: bool = False,
        name: str = "pnf",
    ):
        parameters = dict(locals())
        if isinstance(details, tfb.Bijector) or not details:
            raise ValueError(f"PNF: got details {details!r}, needs a sequence of bijectors, at least one")
        self._event_shape = tuple(int(size) for size in event_shape)
        self._stages = [base, *details]
        self._splits = [HaarSplit(axis, orthonormal) for axis in _axes(len(details), len(self._event_shape))]
        self._shapes = self._no_dependency(self.halved_shapes(self._event_shape, len(details)))
        values = [self._shapes[0], *self._shapes[:-1]]
        self._latent_shapes = self._no_dependency(
            [_latent_shape(k, stage, shape) for k, (stage, shape) in enumerate(zip(self._stages, values))]
        )
        self._sizes = self._no_dependency([math.prod(shape) for shape in values])
        super().__init__(
            forward_min_event_ndims=1,
            inverse_min_event_ndims=len(self._event_shape),
            validate_args=validate_args,
            parameters=parameters,
            name=name,
        )

    @staticmethod
    def halved_shapes(event_shape: Sequence[int], num_details: int) -> list[tuple[int, ...]]:
        """The shapes of the images h_0 ... h_K, from coarse to fine: what `base` and `details` have to fit.

        Args:
          event_shape: `[H, W, C]` or `[D]`.
          num_details: number of details K; detail k works on events of the shape of h_{k-1}.

        Raises:
          ValueError: if the event's sides cannot be halved as often.
        """
        shapes = [tuple(int(size) for size in event_shape)]
        if len(shapes[0]) not in (1, 3) or min(shapes[0]) < 1:
            raise ValueError(f"PNF: got event shape {list(event_shape)}, needs an image [H, W, C] or a signal [D]")
        for axis in reversed(_axes(num_details, len(shapes[0]))):
            shape = list(shapes[0])
            if shape[axis] % 2:
                side = {-3: "height", -2: "width", -1: "size"}[axis]
                raise ValueError(
                    f"PNF: got event shape {list(event_shape)} and {num_details} details, but the {side} of {shape} is not "
                    "divisible by 2"
                )
            shape[axis] //= 2
            shapes.insert(0, tuple(shape))
        return shapes

    @property
    def stages(self) -> list[tfb.Bijector]:
        """The base and the details, from coarse to fine."""
        return list(self._stages)

    @property
    def stage_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the images h_0 ... h_K, from coarse to fine."""
        return list(self._shapes)

    # Down- and up-scaling.

    def encode(self, x: tf.Tensor, stage: int = 0) -> tf.Tensor:
        """Exact down-scaling of events to the resolution of a stage: the image h_stage.

        Args:
          x: events, `batch + event_shape`.
          stage: 0 (the base) to the number of details (x itself).

        Returns:
          `batch + stage_shapes[stage]`.

        Raises:
          ValueError: for another event shape or stage.
        """
        h = self._checked_event(self._tensor(x))
        self._check_stage(stage)
        for split in reversed(self._splits[stage:]):
            h, _ = split.split(h)
        return h

    def decode(self, low_resolution: tf.Tensor, condition: Any = None) -> tf.Tensor:
        """Up-scaling with zero latent details, u_k = 0; `encode` undoes it exactly.

        Args:
          low_resolution: images of the shape of any stage, `batch + stage_shapes[stage]`.
          condition: vector that conditions the whole flow, `batch + [n]`.

        Returns:
          Events, `batch + event_shape`.

        Raises:
          ValueError: if the images have the shape of no stage.
        """
        h, start = self._located(low_resolution)
        condition = self._condition(condition, h, len(self._event_shape))
        for k in range(start + 1, len(self._stages)):
            h = self._grow(k, h, tf.zeros(self._latent_batch_shape(k, h), h.dtype), condition)
        return h

    def project(self, x: tf.Tensor, condition: Any = None) -> tf.Tensor:
        """Exact projection of events onto the images that `decode` gives of the coarsest ones: `decode(encode(x))`.

        Args:
          x: events, `batch + event_shape`.
          condition: vector that conditions the whole flow, `batch + [n]`.

        Returns:
          Events, `batch + event_shape`; projecting them again changes nothing.
        """
        return self.decode(self.encode(x), condition)

    def upscale(
        self, low_resolution: tf.Tensor, temperature: float = 1.0, seed: TensorLike | None = None, condition: Any = None
    ) -> tf.Tensor:
        """Up-scaling with random details, u_k ~ N(0, temperature^2 I); `encode` undoes it exactly.

        Args:
          low_resolution: images of the shape of any stage, `batch + stage_shapes[stage]`.
          temperature: standard deviation of the latent details; 1: a sample given the images; 0: as `decode`.
          seed: as in `tfd.Distribution.sample`.
          condition: vector that conditions the whole flow, `batch + [n]`.

        Returns:
          Events, `batch + event_shape`.

        Raises:
          ValueError: if the images have the shape of no stage, or the temperature is negative.
        """
        h, start = self._located(low_resolution)
        static = tf.get_static_value(temperature)
        if static is not None and not (np.ndim(static) == 0 and 0.0 <= static < np.inf):
            raise ValueError(f"{self.name}: got temperature={temperature!r}, needs a number >= 0")
        condition = self._condition(condition, h, len(self._event_shape))
        seeds = samplers.split_seed(seed, n=len(self._splits), salt="pnf_upscale")
        for k in range(start + 1, len(self._stages)):
            u = samplers.normal(self._latent_batch_shape(k, h), dtype=h.dtype, seed=seeds[k - 1])
            h = self._grow(k, h, tf.cast(temperature, h.dtype) * u, condition)
        return h

    def stage_log_prob(self, x: tf.Tensor, condition: Any = None) -> tf.Tensor:
        """Log-density of every stage under standard normal latent values; their sum is the log-density of the flow.

            term 0: log N(u_0) + log-det of the base,   term k: log N(u_k) + log-det of detail k - (D_k / 2) ln 2

        with D_k the size of h_k, so that term k is the log-density of h_k given h_{k-1}.

        Args:
          x: events, `batch + event_shape`.
          condition: vector that conditions the whole flow, `batch + [n]`.

        Returns:
          `batch + [number of stages]`, from coarse to fine.
        """
        x = self._checked_event(self._tensor(x))
        event_ndims = len(self._event_shape)
        terms = []
        for k, (value, given) in enumerate(self._analyze(x, condition)):
            u, log_det = self._inverse_stage(k, value, given, event_ndims)
            normal = tfd.Normal(tf.zeros([], log_det.dtype), tf.ones([], log_det.dtype))
            terms.append(tf.reduce_sum(normal.log_prob(tf.cast(u, log_det.dtype)), axis=-1) + log_det)
        return tf.stack(terms, axis=-1)

    def stage_data(self, x: tf.Tensor, stage: int, condition: Any = None) -> tuple[tf.Tensor, Any]:
        """What a stage models, and what it is conditioned on: h_0 and `condition`, or Delta_k and h_{k-1} (with `condition`).

        Args:
          x: events, `batch + event_shape`.
          stage: 0 (the base) to the number of details.
          condition: vector that conditions the whole flow, `batch + [n]`.

        Raises:
          ValueError: for another event shape or stage.
        """
        h = self.encode(x, stage)
        condition = self._condition(condition, h, len(self._event_shape))
        if stage == 0:
            return h, condition
        low, detail = self._splits[stage - 1].split(h)
        return detail, self._given(low, condition)

    # Data to latent.

    def _analyze(self, y: tf.Tensor, condition: Any) -> list[tuple[tf.Tensor, Any]]:
        """What every stage models and is given, from coarse to fine."""
        condition = self._condition(condition, y, len(self._event_shape))
        parts = []
        for split in reversed(self._splits):
            y, detail = split.split(y)
            parts.append((detail, self._given(y, condition)))
        return [(y, condition), *reversed(parts)]

    def _inverse_stage(self, k: int, value: tf.Tensor, given: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Flat latent values of a stage, and its summed log-det with that of its halving."""
        kwargs = per_dimension.condition_kwargs(self._stages[k], given)
        u, log_det = per_dimension.inverse_and_log_det(self._stages[k], value, event_ndims, **kwargs)
        return self._to_vector(u, k), log_det + self._halving_log_det(k, value, event_ndims)

    def _inverse_and_log_det(self, y: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        stages = enumerate(self._analyze(self._checked_event(y), condition))
        parts, log_dets = zip(*(self._inverse_stage(k, value, given, event_ndims) for k, (value, given) in stages))
        return tf.concat(parts, axis=-1), sum(log_dets)

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        parts, log_dets = [], []
        for k, (value, given) in enumerate(self._analyze(self._checked_event(y), condition)):
            kwargs = per_dimension.condition_kwargs(self._stages[k], given)
            u, log_det = per_dimension.inverse_and_log_det_per_dim(self._stages[k], value, **kwargs)
            parts.append(self._to_vector(u, k))
            log_dets.append(_fill(log_det, value))
        total = log_dets[0]
        for split, log_det in zip(self._splits, log_dets[1:]):
            total = split.interleave(total, log_det) + split.log_det_per_dim
        return tf.concat(parts, axis=-1), total

    # Latent to data.

    def _forward_stage(
        self, k: int, u: tf.Tensor, h: tf.Tensor | None, condition: Any, fused: Callable, *event_ndims: int
    ) -> tuple[tf.Tensor, tf.Tensor]:
        kwargs = per_dimension.condition_kwargs(self._stages[k], condition if k == 0 else self._given(h, condition))
        return fused(self._stages[k], u, *event_ndims, **kwargs)

    def _grow(self, k: int, h: tf.Tensor, u: tf.Tensor, condition: Any) -> tf.Tensor:
        """h_k from h_{k-1} and latent details."""
        event_ndims = len(self._latent_shapes[k])
        detail, _ = self._forward_stage(k, u, h, condition, per_dimension.forward_and_log_det, event_ndims)
        return self._splits[k - 1].merge(h, detail)

    def _forward_and_log_det(self, x: tf.Tensor, condition: Any, event_ndims: int) -> tuple[tf.Tensor, tf.Tensor]:
        condition = self._condition(condition, x, 1)
        h, log_dets = None, []
        for k, u in enumerate(self._split_latent(self._checked_latent(x))):
            batch_ndims = event_ndims - 1
            value, log_det = self._forward_stage(
                k, u, h, condition, per_dimension.forward_and_log_det, batch_ndims + len(self._latent_shapes[k])
            )
            log_dets.append(log_det - self._halving_log_det(k, value, batch_ndims + len(self._event_shape)))
            h = value if k == 0 else self._splits[k - 1].merge(h, value)
        return h, sum(log_dets)

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        condition = self._condition(condition, x, 1)
        h, log_dets = None, []
        for k, u in enumerate(self._split_latent(self._checked_latent(x))):
            value, log_det = self._forward_stage(k, u, h, condition, per_dimension.forward_and_log_det_per_dim)
            halvings = sum(split.log_det_per_dim for split in self._splits[max(k - 1, 0) :])
            log_dets.append(self._to_vector(_fill(log_det, u), k) - halvings)
            h = value if k == 0 else self._splits[k - 1].merge(h, value)
        return h, tf.concat(log_dets, axis=-1)

    # What the stages share.

    def _halving_log_det(self, k: int, value: tf.Tensor, event_ndims: int) -> tf.Tensor | float:
        """The constant of the halving that gave a stage's value; further event axes multiply it."""
        if k == 0:
            return 0.0
        size = tf.cast(ps.reduce_prod(ps.shape(value)[-event_ndims:]), log_det_dtype(value.dtype))
        return 2.0 * self._splits[k - 1].log_det_per_dim * size

    def _given(self, low: tf.Tensor, condition: Any) -> Any:
        """The condition of a detail: its low-resolution image, with the flow's condition as further channels."""
        return append_condition(low, condition, len(self._event_shape))

    def _condition(self, condition: Any, value: tf.Tensor, event_ndims: int) -> Any:
        return vector_condition(self._route(condition, {}), value, event_ndims, self.name)

    def _split_latent(self, x: tf.Tensor) -> list[tf.Tensor]:
        parts = tf.split(x, self._sizes, axis=-1)
        return [self._to_grid(part, k) for k, part in enumerate(parts)]

    def _to_vector(self, u: tf.Tensor, k: int) -> tf.Tensor:
        rank = len(self._latent_shapes[k])
        if rank == 1:
            return u
        return tf.reshape(u, ps.concat([ps.shape(u)[:-rank], [self._sizes[k]]], axis=0))

    def _to_grid(self, part: tf.Tensor, k: int) -> tf.Tensor:
        if len(self._latent_shapes[k]) == 1:
            return part
        return tf.reshape(part, ps.concat([ps.shape(part)[:-1], self._latent_shapes[k]], axis=0))

    def _transport_inverse(self, per_dim: tf.Tensor) -> tf.Tensor:
        parts = []
        for split in reversed(self._splits):
            per_dim, detail = split.deinterleave(per_dim)
            parts.append(detail)
        parts = [per_dim, *reversed(parts)]
        moved = (per_dimension.transport_inverse(stage, part) for stage, part in zip(self._stages, parts))
        return tf.concat([self._to_vector(part, k) for k, part in enumerate(moved)], axis=-1)

    def _transport_forward(self, per_dim: tf.Tensor) -> tf.Tensor:
        parts = self._split_latent(per_dim)
        total, *details = (per_dimension.transport_forward(stage, part) for stage, part in zip(self._stages, parts))
        for split, detail in zip(self._splits, details):
            total = split.interleave(total, detail)
        return total

    @property
    def _uses_condition(self) -> bool:
        return any(per_dimension.condition_kwargs(stage, True) for stage in self._stages)

    # Shapes.

    def _tensor(self, value: tf.Tensor) -> tf.Tensor:
        value = to_tensor(value, self.forward_dtype())
        if not value.dtype.is_floating:
            raise ValueError(f"{self.name}: got values of dtype {value.dtype.name}, needs real numbers (dequantise integers)")
        return value

    def _located(self, low_resolution: tf.Tensor) -> tuple[tf.Tensor, int]:
        """The images and their stage."""
        h = self._tensor(low_resolution)
        for stage, shape in enumerate(self._shapes):
            if tuple(h.shape[-len(shape) :]) == shape:
                return h, stage
        shapes = ", ".join(str(list(shape)) for shape in self._shapes)
        raise ValueError(f"{self.name}: got images of shape {h.shape}, needs those of a stage: {shapes}")

    def _latent_batch_shape(self, k: int, h: tf.Tensor) -> tf.Tensor:
        return ps.concat([ps.shape(h)[: -len(self._event_shape)], self._latent_shapes[k]], axis=0)

    def _check_stage(self, stage: int) -> None:
        if not isinstance(stage, (int, np.integer)) or not 0 <= stage < len(self._stages):
            raise ValueError(f"{self.name}: got stage {stage!r}, needs 0 to {len(self._stages) - 1}")

    def _checked_event(self, y: tf.Tensor) -> tf.Tensor:
        if tuple(y.shape[-len(self._event_shape) :]) != self._event_shape:
            raise ValueError(f"{self.name}: got data of shape {y.shape}, needs events of shape {list(self._event_shape)}")
        return y

    def _checked_latent(self, x: tf.Tensor) -> tf.Tensor:
        if x.shape[-1] != sum(self._sizes):
            raise ValueError(f"{self.name}: got latent values of shape {x.shape}, needs {sum(self._sizes)} dimensions")
        return x

    def _forward_event_shape(self, shape: tf.TensorShape) -> tf.TensorShape:
        return tf.TensorShape(self._event_shape)

    def _inverse_event_shape(self, shape: tf.TensorShape) -> tf.TensorShape:
        return tf.TensorShape([sum(self._sizes)])

    def _forward_event_shape_tensor(self, shape: tf.Tensor) -> tf.Tensor:
        return tf.constant(self._event_shape, tf.int32)

    def _inverse_event_shape_tensor(self, shape: tf.Tensor) -> tf.Tensor:
        return tf.constant([sum(self._sizes)], tf.int32)


def _axes(num_details: int, rank: int) -> list[int]:
    """The axis of each halving, from coarse to fine; the finest halves the height of images."""
    if rank == 1:
        return [-1] * num_details
    return [(-3, -2)[(num_details - k) % 2] for k in range(1, num_details + 1)]


def _latent_shape(k: int, stage: tfb.Bijector, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a stage's latent values, after a check that the stage maps them to events of `shape`."""
    if not isinstance(stage, tfb.Bijector):
        raise ValueError(f"PNF: got {stage!r} as stage {k}, needs a bijector")
    name = f"the base ({stage.name})" if k == 0 else f"detail {k} ({stage.name})"
    needed = (stage.forward_min_event_ndims, stage.inverse_min_event_ndims)
    if not all(isinstance(ndims, (int, np.integer)) for ndims in needed) or needed[1] > len(shape):
        raise ValueError(f"PNF: {name} is for events with {needed[1]} axes, does not fit events of shape {list(shape)}")
    try:
        latent_shape = stage.inverse_event_shape(shape)
        fits = latent_shape.num_elements() == math.prod(shape) and stage.forward_event_shape(latent_shape) == shape
    except ValueError as error:
        raise ValueError(f"PNF: {name} does not fit events of shape {list(shape)}: {error}") from error
    if not fits:
        raise ValueError(
            f"PNF: {name} maps events of shape {list(shape)} to {latent_shape} and these to "
            f"{stage.forward_event_shape(latent_shape)}, needs to keep the number of dimensions, and the shape there and back"
        )
    return tuple(latent_shape)
