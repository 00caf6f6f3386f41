"""`PNF`: a flow that grows an image, or a signal, stage by stage."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.types.experimental import TensorLike
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows.bijectors.base import Composite, to_tensor
from tfp_dimflows.bijectors.conditions import append_condition, uses_condition, vector_condition
from tfp_dimflows.bijectors.factor_out import flat_latents
from tfp_dimflows.bijectors.haar import HaarSplit
from tfp_dimflows.bijectors.log_dets import sum_event
from tfp_dimflows.bijectors.orthogonal_split import OrthogonalSplit
from tfp_dimflows.bijectors.walk import AnyWalk, Summed, Walk
from tfp_dimflows.upstream import prefer_static as ps
from tfp_dimflows.upstream import samplers


class PNF(Composite):
    r"""Progressive normalizing flow between a flat latent vector `[D]` and an event, an image `[H, W, C]` or a signal `[D]`.

    From data to latent, linear splits take the event y = h_K apart again and again; what one takes away is modelled given what
    remains:

        (h_{k-1}, Delta_k) = split_k(h_k),   u_k = detail_k.inverse(Delta_k; condition=h_{k-1}),   k = K ... 1
        u_0 = base.inverse(h_0),   z = [u_0, u_1, ..., u_K]
        inverse log-det = sum of the stages' inverse log-dets + that of the splits

    and from latent to data `h_k = merge_k(h_{k-1}, detail_k.forward(u_k; condition=h_{k-1}))`. What remains never depends on
    what was taken away, so h_0 is an exact linear (or affine) code of the event. Each stage's parameters are its own, and every
    term of the log-density depends on one stage's only.

    Splits are by default `HaarSplit`s, which halve: an image along its height first (stage K), then along its width, and so on
    in turns, so that from coarse to fine it grows along x (the width) first when K is even. Their log-det is
    -(D - D_0) ln 2 with D_0 the size of h_0 (-ln 2 for each pair), or 0 if they are orthonormal. `OrthogonalSplit`s split off
    any part of the channels of rotated blocks, such as all but the principal components, with log-det 0.

    The latent is ordered base first, then the details from coarse to fine, so `z[..., :D_0]` is the low-dimensional code. One
    pass evaluates every stage once. Stages are any bijectors: their latent values may be flat or of any shape. A `condition=`
    of the whole flow is a vector: the base is given it as it is, the details get it as further channels of h_{k-1}, repeated at
    every position.

    Args:
      base: bijector of the coarsest image h_0.
      details: bijectors of the details, from coarse to fine, K of them; detail k works on events of the shape of Delta_k (which
        of halves is that of h_{k-1}), and, if it can use a condition, is given h_{k-1}.
      event_shape: `[H, W, C]` or `[D]`.
      orthonormal: whether the halvings divide by sqrt(2) (orthonormal Haar transform) rather than 2 (averages).
      splits: a `HaarSplit` or `OrthogonalSplit` for each detail, from coarse to fine; None: the halvings.
      name: the name of the operations.

    Raises:
      ValueError: if the event's sides cannot be halved as often as there are details, or splits or stages do not fit their
        shapes.

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
        splits: Sequence[HaarSplit | OrthogonalSplit] | None = None,
        name: str = "pnf",
    ):
        parameters = dict(locals())
        if isinstance(details, tfb.Bijector) or not details:
            raise ValueError(f"PNF: got details {details!r}, needs a sequence of bijectors, at least one")
        self._event_shape = tuple(int(size) for size in event_shape)
        self._stages = [base, *details]
        if splits is None:
            self.halved_shapes(self._event_shape, len(details))  # raises
            splits = [HaarSplit(axis, orthonormal) for axis in _axes(len(details), len(self._event_shape))]
        elif isinstance(splits, tfb.Bijector) or len(splits) != len(details) or orthonormal:
            got = splits.name if isinstance(splits, tfb.Bijector) else f"{len(splits)} splits"
            raise ValueError(
                f"PNF: got {got}, {len(details)} details and orthonormal={orthonormal}, needs a split for each "
                "detail, and orthonormal=False beside them"
            )
        self._splits = list(splits)
        self._shapes = tfb.Reshape(self._event_shape, [math.prod(self._event_shape)])
        stage_shapes, values = _split_shapes(self._splits, self._event_shape)
        self._stage_shapes = self._no_dependency(stage_shapes)
        self._value_shapes = self._no_dependency(values)
        self._latent_shapes = self._no_dependency(
            [_latent_shape(k, stage, shape) for k, (stage, shape) in enumerate(zip(self._stages, values))]
        )
        super().__init__(
            forward_min_event_ndims=1, inverse_min_event_ndims=len(self._event_shape), parameters=parameters, name=name
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
    def splits(self) -> list[HaarSplit | OrthogonalSplit]:
        """The splits, from coarse to fine."""
        return list(self._splits)

    @property
    def stage_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the images h_0 ... h_K, from coarse to fine."""
        return list(self._stage_shapes)

    @property
    def value_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of what the stages model, h_0, Delta_1 ... Delta_K."""
        return list(self._value_shapes)

    @property
    def latent_sizes(self) -> list[int]:
        """Sizes of the stages' parts of the latent values, the base first, without empty ones."""
        return [size for shape in self._latent_shapes if (size := math.prod(shape))]

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
        h = self._tensor(x)
        self._check_event(h.shape, self._event_shape)
        self._check_stage(stage)
        for split in reversed(self._splits[stage:]):
            h, _ = split.split(h)
        return h

    def decode(self, low_resolution: tf.Tensor, condition: Any = None) -> tf.Tensor:
        """Up-scaling with zero latent details, u_k = 0, the conditional mode of Gaussian details; `encode` undoes it exactly.

        Args:
          low_resolution: images of the shape of any stage, `batch + stage_shapes[stage]`.
          condition: vector that conditions the whole flow, `batch + [n]`.

        Returns:
          Events, `batch + event_shape`.

        Raises:
          ValueError: if the images have the shape of no stage.
        """
        return self._upscale(low_resolution, condition, lambda k, shape, dtype: tf.zeros(shape, dtype))

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
        static = tf.get_static_value(temperature)
        if static is not None and not (np.ndim(static) == 0 and 0.0 <= static < np.inf):
            raise ValueError(f"{self.name}: got temperature={temperature!r}, needs a number >= 0")
        seeds = samplers.split_seed(seed, n=len(self._splits), salt="pnf_upscale")

        def details(k: int, shape: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
            return tf.cast(temperature, dtype) * samplers.normal(shape, dtype=dtype, seed=seeds[k - 1])

        return self._upscale(low_resolution, condition, details)

    def _upscale(self, low_resolution: tf.Tensor, condition: Any, details: Callable) -> tf.Tensor:
        """Events of images of any stage, and of latent details of the later ones: a function of stage, shape and dtype."""
        value, start = self._located(low_resolution)
        event_ndims = len(self._event_shape)
        condition = self._condition(condition, value, event_ndims)
        h = Summed(value, event_ndims)
        for k in range(start + 1, len(self._stages)):
            shape = ps.concat([ps.shape(h.value)[:-event_ndims], self._latent_shapes[k]], axis=0)
            u = Summed(details(k, shape, value.dtype), len(self._latent_shapes[k]))
            h = self._grow(k, h, u, condition)
        return h.value

    def stage_log_prob(self, x: tf.Tensor, condition: Any = None) -> tf.Tensor:
        """Log-density of every stage under standard normal latent values; their sum is the log-density of the flow.

            term 0: log N(u_0) + log-det of the base,   term k: log N(u_k) + log-det of detail k + that of split k

        (that of a halving of h_k, of size D_k, is -(D_k / 2) ln 2), so that term k is the log-density of h_k given h_{k-1}.

        Args:
          x: events, `batch + event_shape`.
          condition: vector that conditions the whole flow, `batch + [n]`.

        Returns:
          `batch + [number of stages]`, from coarse to fine.
        """
        x = self._tensor(x)
        self._check_event(x.shape, self._event_shape)
        terms = []
        for u in self._walk_stages(Summed(x, len(self._event_shape)), condition):
            normal = tfd.Normal(tf.zeros([], u.log_det.dtype), tf.ones([], u.log_det.dtype))
            log_prob = normal.log_prob(tf.cast(u.value, u.log_det.dtype))
            terms.append(sum_event(log_prob, log_prob, u.event_ndims) + u.log_det)
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

    def _walk_inverse(self, y: Walk, condition: Any) -> Walk:
        self._check_event(y.shape, self._event_shape)
        base, *details = self._walk_stages(y, condition)
        return base.join(*details, by=flat_latents(self._latent_shapes))

    def _walk_stages(self, h: AnyWalk, condition: Any) -> list[AnyWalk]:
        """The latent values of every stage, each in its own shape, from coarse to fine."""
        condition = self._condition(condition, h.value, len(self._event_shape))
        parts = []
        for detail, split in zip(self._stages[:0:-1], self._splits[::-1]):
            h, rest = h.split(split.parts)
            parts.append(rest.inverse(detail, self._given(h.value, condition)))
        return [h.inverse(self._stages[0], condition), *parts[::-1]]

    # Latent to data.

    def _walk_forward(self, x: Walk, condition: Any) -> Walk:
        self._check_event(x.shape, [math.prod(self._event_shape)])
        condition = self._condition(condition, x.value, 1)
        h, *parts = x.split(flat_latents(self._latent_shapes))
        h = h.forward(self._stages[0], condition)
        for k, u in enumerate(parts, start=1):
            h = self._grow(k, h, u, condition)
        return h

    def _grow(self, k: int, h: AnyWalk, u: AnyWalk, condition: Any) -> AnyWalk:
        """h_k from h_{k-1} and latent details."""
        return h.join(u.forward(self._stages[k], self._given(h.value, condition)), by=self._splits[k - 1].parts)

    # What the stages share.

    def _given(self, low: tf.Tensor | None, condition: Any) -> Any:
        """The condition of a detail: its low-resolution image, with the flow's condition as further channels."""
        return None if low is None else append_condition(low, condition, len(self._event_shape))

    def _condition(self, condition: Any, value: tf.Tensor | None, event_ndims: int) -> Any:
        return vector_condition(self._route(condition, {}), value, event_ndims, self.name)

    @property
    def uses_condition(self) -> bool:
        """Whether some stage can use a condition; the details are given the images before them anyway."""
        return any(uses_condition(stage) for stage in self._stages)

    # Shapes.

    def _tensor(self, value: tf.Tensor) -> tf.Tensor:
        value = to_tensor(value, self.forward_dtype())
        if not value.dtype.is_floating:
            raise ValueError(f"{self.name}: got values of dtype {value.dtype.name}, needs real numbers (dequantise integers)")
        return value

    def _located(self, low_resolution: tf.Tensor) -> tuple[tf.Tensor, int]:
        """The images and their stage."""
        h = self._tensor(low_resolution)
        for stage, shape in enumerate(self._stage_shapes):
            if tuple(h.shape[-len(shape) :]) == shape:
                return h, stage
        shapes = ", ".join(str(list(shape)) for shape in self._stage_shapes)
        raise ValueError(f"{self.name}: got images of shape {h.shape}, needs those of a stage: {shapes}")

    def _check_stage(self, stage: int) -> None:
        if not isinstance(stage, (int, np.integer)) or not 0 <= stage < len(self._stages):
            raise ValueError(f"{self.name}: got stage {stage!r}, needs 0 to {len(self._stages) - 1}")


def _axes(num_details: int, rank: int) -> list[int]:
    """The axis of each halving, from coarse to fine; the finest halves the height of images."""
    if rank == 1:
        return [-1] * num_details
    return [(-3, -2)[(num_details - k) % 2] for k in range(1, num_details + 1)]


def _split_shapes(
    splits: Sequence[HaarSplit | OrthogonalSplit], event_shape: tuple[int, ...]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The shapes of h_0 ... h_K, and of what the stages model: h_0, Delta_1 ... Delta_K."""
    stage_shapes = [event_shape]
    values: list[tuple[int, ...]] = []
    for split in reversed(splits):
        if not isinstance(split, (HaarSplit, OrthogonalSplit)):
            raise ValueError(f"PNF: got {split!r} as a split, needs a HaarSplit or an OrthogonalSplit")
        if split.inverse_min_event_ndims > len(event_shape):
            raise ValueError(f"PNF: {split.name} is for images, does not fit events of shape {list(event_shape)}")
        low, rest = split.part_shapes(stage_shapes[0])
        stage_shapes.insert(0, low)
        values.insert(0, rest)
    return stage_shapes, [stage_shapes[0], *values]


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
