"""Progressive flows of principal components."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import networks
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.realnvp import vector_level
from tfp_dimflows.recipes.registry import recipe


@recipe
def principal_pnf(
    event_shape: Sequence[int],
    *,
    num_halvings: int = 3,
    code_dims: int | None = None,
    depth: int = 4,
    width: int | None = None,
    num_hidden: int = 2,
    network: str | None = None,
    whole: bool = False,
    trainable: bool = False,
    alpha: float = 0.05,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """Progressive flow (PNF) whose code is linear: principal components stay, the others are modelled given them.

    Images `[H, W, C]`: the 2x2 blocks of an image are rotated to their principal components (`dfb.OrthogonalSplit`), the
    leading half of which is an image `[H/2, W/2, 2C]` that is treated in the same way, `num_halvings` times; the last is
    rotated as a vector. Vectors `[D]`, and images with `network="dense"`, which are flattened: all dimensions are rotated, and
    the leading half stays. What does not stay is a conditional Gaussian given what stays, followed by `depth` conditional
    affine couplings; the networks are Glow's (`"conv"`) or MLPs (`"dense"`).

    `model.encode(x, dims=k)` is an invertible function of a linear projection of x (of integer images: of their logits), from
    which `model.decode` finds the rest at its conditional mode, for k = D/2, D/4, ... and `code_dims`. The rotations are taken
    from the data by `FlowModel.adapt`, which needs many more events than there are channels, or dimensions if `whole` or dense.

    Args:
      event_shape: `[H, W, C]`, whose sides are divisible by `2**num_halvings`, or `[D]`.
      num_halvings: how often half of the dimensions is split off.
      code_dims: size of a code below the last half, of principal components of what is left of the image as a whole (a multiple
        of its pixels), or of the vector; None: there is none.
      depth: couplings of each part.
      width: width of the networks; that of the conditional Gaussians is twice as much, and that of the MLPs of convolutional
        flows four times. None: 32, dense ones 128.
      num_hidden: hidden layers of the MLPs.
      network: `"conv"` or `"dense"`; None: `"conv"` for images, `"dense"` for vectors.
      whole: whether codes of convolutional flows are those of principal components of whole images, in the layout of blocks:
        images are reconstructed better from them, but their details are harder to model. Costs O(D^2) per image.
      trainable: whether the rotations of blocks and vectors are trained with the rest, from the principal components on. A code
        is linear in the image's logits then too.
      alpha: margin of the logit preprocessing.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed.

    Returns:
      `TransformedDistribution` of standard normal noise; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: if the event cannot be halved as often, or has fewer dimensions than the smallest code needs.

    References: "PNF: Progressive normalizing flows", with principal components in the place of Haar averages.

    #### Example

    >>> flow = dimflows.recipes.principal_pnf([8, 8, 1], num_halvings=2, depth=1, width=4)
    >>> flow.sample(2, seed=0).shape, flow.bijector.stage_shapes
    (TensorShape([2, 8, 8, 1]), [(2, 2, 4), (4, 4, 2), (8, 8, 1)])
    """
    shape = common.checked_event_shape(event_shape, "principal-pnf")
    common.check_sizes("principal-pnf", num_halvings=num_halvings, depth=depth, num_hidden=num_hidden)
    if code_dims is not None:
        common.check_sizes("principal-pnf", code_dims=code_dims)
    is_dense = common.is_dense("principal-pnf", network, shape)
    if is_dense and whole:
        raise ValueError("principal-pnf: got whole=True for vectors, which are rotated as a whole anyway")
    width = (128 if is_dense else 32) if width is None else width
    common.check_sizes("principal-pnf", width=width)
    options: dict[str, Any] = {"depth": depth, "num_hidden": num_hidden, "trainable": trainable, "seeds": _endless(seed)}
    if is_dense:
        sizes = [math.prod(shape)]
        for _ in range(num_halvings):
            sizes.append((sizes[-1] + 1) // 2)
        flow = dfb.Chain([*common.data_side(shape), _vector_flow(sizes, code_dims, width=width, **options)])
    else:
        flow = _image_flow(shape, num_halvings, code_dims, whole, width=width, **options)
    return common.as_distribution(flow, shape, grey_levels, common.logit(alpha))


def _image_flow(
    shape: tuple[int, ...],
    num_halvings: int,
    code_dims: int | None,
    whole: bool,
    *,
    depth: int,
    width: int,
    num_hidden: int,
    trainable: bool,
    seeds: Iterator[int],
) -> dfb.PNF:
    common.check_halvings("principal-pnf", shape, num_halvings, num_halvings=num_halvings)
    splits: list[dfb.OrthogonalSplit] = []
    details: list[tfb.Bijector] = []
    height, wide, channels = shape

    def split_off(channels: int, kept: int, factor: int, is_whole: bool) -> None:
        sides = (height, wide) if is_whole else None
        splits.insert(0, _split(channels, kept, factor, trainable, whole=sides))
        details.insert(0, _image_detail(channels * factor**2 - kept, kept, depth, width, seeds))

    for _ in range(num_halvings):
        split_off(channels, 2 * channels, 2, whole)
        height, wide, channels = height // 2, wide // 2, 2 * channels
    if code_dims is not None:
        pixels = height * wide
        if code_dims % pixels or not 0 < code_dims < pixels * channels:
            raise ValueError(
                f"principal-pnf: got code_dims={code_dims} of the {pixels * channels} dimensions of images of {height}x{wide} "
                f"pixels, needs fewer, and a multiple of {pixels}"
            )
        split_off(channels, code_dims // pixels, 1, True)
        channels = code_dims // pixels
    flat = common.from_flat((height, wide, channels))
    options: dict[str, Any] = {"depth": depth, "num_hidden": num_hidden, "trainable": trainable, "seeds": seeds}
    base = _vector_flow([height * wide * channels], None, width=4 * width, **options)
    return dfb.PNF(dfb.Chain([*flat, base]), details, shape, splits=splits)


def _image_detail(channels: int, given: int, depth: int, width: int, seeds: Iterator[int]) -> dfb.EmbedCondition:
    """A conditional flow of some channels given others."""
    gaussian = networks.GlowConvNet(given, 2 * channels, width=2 * width, seed=next(seeds))
    parts: list[tfb.Bijector] = [dfb.ActNorm(channels, dtype=common.floatx()), _given(gaussian, 3)]
    for k in range(depth if channels > 1 else 0):
        mask = dfb.masks.Channel(flip=k % 2 == 1, num_conditioning=(channels + k % 2) // 2)
        inputs, outputs = mask.sizes(channels)
        coupling = networks.GlowConvNet(inputs, 2 * outputs, width=width, condition_channels=given, seed=next(seeds))
        parts.append(dfb.ActNorm(channels, dtype=common.floatx()))
        parts.append(dfb.AffineCoupling(coupling, mask, dtype=common.floatx()))
    embedding = dfb.ActNorm(given, dtype=common.floatx())
    return dfb.EmbedCondition(dfb.Chain(parts), embedding.inverse, condition_ndims=3)


def _split(channels: int, kept: int, factor: int | None, trainable: bool, **options: Any) -> dfb.OrthogonalSplit:
    return dfb.OrthogonalSplit(channels, kept, factor, trainable=trainable, dtype=common.floatx(), **options)


def _vector_flow(
    sizes: Sequence[int],
    code_dims: int | None,
    *,
    depth: int,
    width: int,
    num_hidden: int,
    trainable: bool,
    seeds: Iterator[int],
) -> tfb.Bijector:
    """A flow of vectors of the first size, with codes of the others and of `code_dims`."""
    codes = [*sizes, *([] if code_dims is None else [code_dims])]
    if codes[-1] < 2 or any(kept >= size for size, kept in itertools.pairwise(codes)):
        raise ValueError(
            f"principal-pnf: got code_dims={code_dims} and as many halvings as leave {sizes[-1]} dimensions, needs two or more "
            "in the smallest code, and code_dims below the last half"
        )
    options: dict[str, Any] = {"depth": depth - 1, "num_blocks": num_hidden, "memory": "keep", "seeds": seeds}
    splits, details = [], []
    for size, kept in itertools.pairwise(codes):
        rest = size - kept
        splits.append(_split(size, kept, None, trainable))
        gaussian = networks.MLP(kept, 2 * rest, hidden=[2 * width] * num_hidden, seed=next(seeds))
        parts: list[tfb.Bijector] = [dfb.ActNorm(rest, dtype=common.floatx()), _given(gaussian, 1)]
        parts += [vector_level(rest, width, kept, **options)] if rest > 1 else []
        embedding = dfb.ActNorm(kept, dtype=common.floatx())
        details.append(dfb.EmbedCondition(dfb.Chain(parts), embedding.inverse, condition_ndims=1))
    base = [] if splits else [dfb.Rotation(codes[-1], trainable=trainable, dtype=common.floatx())]
    base += [dfb.ActNorm(codes[-1], dtype=common.floatx()), vector_level(codes[-1], width, 0, **options)]
    if not splits:
        return dfb.Chain(base)
    return dfb.PNF(dfb.Chain(base), details[::-1], [sizes[0]], splits=splits[::-1])


def _given(network: networks.MLP | networks.GlowConvNet, event_ndims: int) -> dfb.ConditionalTransform:
    return dfb.ConditionalTransform(network, dfb.transformers.Affine("tanh", dtype=common.floatx()), event_ndims)


def _endless(seed: int) -> Iterator[int]:
    """As many seeds as are asked for."""
    generator = np.random.default_rng(seed)
    while True:
        yield int(generator.integers(2**31))
