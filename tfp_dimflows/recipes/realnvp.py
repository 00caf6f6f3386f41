"""RealNVP: convolutional for images, dense for vectors."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import networks
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.registry import recipe

masks = dfb.masks

realnvp_grids = functools.partial(common.grid_shapes, couplings=True)


@recipe
def realnvp(
    event_shape: Sequence[int],
    *,
    num_levels: int | None = None,
    depth: int = 3,
    width: int = 32,
    num_blocks: int = 2,
    network: str | None = None,
    factorization: common.Factorization | None = "conventional",
    rotation: str | None = None,
    condition_shape: Sequence[int] | None = None,
    batch_norm: bool = False,
    l2: float = 5e-5,
    alpha: float = 0.05,
    memory: str = "keep",
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """RealNVP with a multi-scale architecture.

    Images `[H, W, C]`: level k of `num_levels` has `depth` checkerboard couplings of ResNet width `width * 2**k`, a
    squeeze and `depth` channel couplings of twice that width; the last level has `depth + 1` checkerboard
    couplings. An ActNorm follows each coupling. Between levels half of the dimensions leave.

    Vectors `[D]`, and images with `network="dense"`, which are flattened: each level has `depth + 1` couplings with
    MLPs of `num_blocks` hidden layers of `width` units; the masks are random halves, each followed by its complement.

    Reference sizes: CIFAR-10 `num_levels=2, width=64, num_blocks=8`, ImageNet 32x32 `num_levels=4, width=32, num_blocks=4`,
    64x64 `num_levels=5, width=32, num_blocks=2`, all with `batch_norm=True`.

    Args:
      event_shape: `[H, W, C]` or `[D]`.
      num_levels: number of levels; the image's sides must be divisible by `2**(num_levels - 1)`. None: 2, but 1 for `[2]`.
      depth: couplings in a row.
      width: width of the networks at the finest level.
      num_blocks: residual blocks (`"conv"`) or hidden layers (`"dense"`).
      network: `"conv"` (ResNets) or `"dense"` (MLPs); None: `"conv"` for images, `"dense"` for vectors.
      factorization: which half stays: `"conventional"` (images: checkerboard, vectors: first half), `"channels"`,
        `"checkerboard"`, `"random"`, `"principal"` (the leading half of principal components, `rotation="principal"`), a
        `DimensionFactorization`, or None: nothing leaves.
      rotation: None, or what each level's squeezed channels (the dimensions of a vector) are multiplied with, a matrix of
        `dfb.Rotation`: `"principal"`, `"haar"` or `"random"`. `"principal"` is taken from the data by `FlowModel.adapt`.
      condition_shape: shape of the condition of a conditional flow: a vector `[n]` or, for `"conv"`, an image `[H, W, n]` of
        the event's height and width. It enters every network.
      batch_norm: batch normalisation in the ResNets, as in the reference.
      l2: L2 penalty on the ResNets' weight-norm magnitudes.
      alpha: margin of the logit preprocessing.
      memory: `"keep"` the networks' activations for the gradients, or `"recompute"` them, as in `dfb.Chain`: memory that hardly
        grows with `depth`, at a step time about a third longer (not with `batch_norm`).
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed of networks, masks and the random factorization.

    Returns:
      `TransformedDistribution` of standard normal noise; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: if shape, number of levels and factorization do not fit each other.

    References: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017.

    #### Example

    >>> flow = dimflows.recipes.realnvp([8, 8, 1], width=4, num_blocks=1)
    >>> flow.sample(2, seed=0).shape, flow.event_shape
    (TensorShape([2, 8, 8, 1]), TensorShape([8, 8, 1]))
    """
    shape = common.checked_event_shape(event_shape, "realnvp")
    num_levels = common.default_levels(shape) if num_levels is None else num_levels
    common.check_sizes("realnvp", num_levels=num_levels, depth=depth, width=width, num_blocks=num_blocks)
    is_dense = common.is_dense("realnvp", network, shape)
    flat = (math.prod(shape),) if is_dense else shape
    grids = realnvp_grids("realnvp", flat, num_levels, factorization is None)
    split = common.resolve_factorization(factorization, flat, num_levels, "channels" if is_dense else "checkerboard", seed)
    seeds = iter(np.random.SeedSequence(seed).generate_state(4 * num_levels * (depth + 1)).tolist())
    rotate = common.rotations(rotation, factorization, seed)
    options: dict[str, Any] = {"depth": depth, "num_blocks": num_blocks, "memory": memory, "seeds": seeds, "rotate": rotate}
    flow_levels = []
    if is_dense:
        channels = common.condition_channels("realnvp", condition_shape, flat)
        flow_levels = [vector_level(grid[0], width, channels, **options) for grid in grids]
    else:
        for k, grid in enumerate(grids):
            conditions = [common.condition_channels("realnvp", condition_shape, shape, squeezes) for squeezes in (k, k + 1)]
            more: dict[str, Any] = {"batch_norm": batch_norm, "l2": l2, "is_last": k == num_levels - 1}
            flow_levels.append(_image_level(grid, width * 2**k, conditions, **more, **options))
    flow = dfb.Multiscale(flow_levels, split, event_shape=flat)
    flow = dfb.Chain([*common.data_side(shape), flow]) if is_dense else flow
    return common.as_distribution(flow, shape, grey_levels, common.logit(alpha))


def _image_level(
    grid: tuple[int, ...],
    width: int,
    condition_channels: Sequence[int],
    *,
    depth: int,
    num_blocks: int,
    batch_norm: bool,
    l2: float,
    memory: str,
    is_last: bool,
    seeds: Iterator[int],
    rotate: Callable[[int], list[dfb.Rotation]],
) -> dfb.Chain:
    height, grid_width, channels = grid
    parts = []

    def add(
        mask: masks.Checkerboard | masks.Channel,
        channels: int,
        width: int,
        condition_channels: int,
        mask_array: np.ndarray | None,
    ) -> None:
        inputs, outputs = mask.sizes(channels)
        network = networks.ResNet(
            inputs,
            2 * outputs,
            width=width,
            num_blocks=num_blocks,
            condition_channels=condition_channels,
            mask=mask_array,
            batch_norm=batch_norm,
            l2=l2,
            seed=next(seeds) % 2**31,
        )
        parts.append(dfb.AffineCoupling(network, mask, scale="tanh", dtype=common.floatx()))
        parts.append(dfb.ActNorm(channels, dtype=common.floatx()))

    for i in range(depth + is_last):
        mask = masks.Checkerboard(parity=1 - i % 2)
        add(mask, channels, width, condition_channels[0], mask.array(height, grid_width))
    if not is_last:
        parts += [dfb.Squeeze(), *rotate(4 * channels)]
        for i in range(depth):
            add(masks.Channel(flip=i % 2 == 1), 4 * channels, 2 * width, condition_channels[1], None)
    return dfb.Chain(parts, memory)


def vector_level(
    dims: int,
    width: int,
    condition_channels: int,
    *,
    depth: int,
    num_blocks: int,
    memory: str,
    seeds: Iterator[int],
    rotate: Callable[[int], list[dfb.Rotation]] = lambda dims: [],
) -> dfb.Chain:
    """`depth + 1` couplings of vectors, by random halves each followed by its complement, an ActNorm after each."""
    parts: list[tfb.Bijector] = [*rotate(dims)]
    for i in range(depth + 1):
        if i % 2 == 0:
            chosen = np.random.default_rng(next(seeds)).permutation(dims)[: dims // 2]
            mask = masks.Index(chosen.tolist(), dims)
        else:
            mask = mask.complement()
        inputs, outputs = mask.sizes(dims)
        network = networks.MLP(
            inputs,
            2 * outputs,
            hidden=[width] * num_blocks,
            condition_channels=condition_channels,
            seed=next(seeds) % 2**31,
        )
        parts.append(dfb.AffineCoupling(network, mask, scale="tanh", dtype=common.floatx()))
        parts.append(dfb.ActNorm(dims, dtype=common.floatx()))
    return dfb.Chain(parts, memory)
