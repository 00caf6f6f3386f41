"""RealNVP: convolutional for images, dense for vectors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_probability as tfp

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import networks
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.registry import recipe

tfd = tfp.distributions
masks = dfb.masks


@recipe
def realnvp(
    event_shape: Sequence[int],
    *,
    num_scales: int = 2,
    num_couplings: int = 3,
    width: int = 32,
    num_blocks: int = 2,
    factorization: Any = "conventional",
    batch_norm: bool = False,
    l2: float = 5e-5,
    alpha: float = 0.05,
    levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """RealNVP with a multi-scale architecture.

    Images `[H, W, C]`: level k of `num_scales` has `num_couplings` checkerboard couplings of ResNet width `width * 2**k`, a
    squeeze and `num_couplings` channel couplings of twice that width; the last level has `num_couplings + 1` checkerboard
    couplings. An ActNorm follows each coupling. Between levels half of the dimensions leave.

    Vectors `[D]`: each level has `num_couplings + 1` couplings with MLPs of `num_blocks` hidden layers of `width` units; the
    masks are random halves, each followed by its complement.

    Reference sizes: CIFAR-10 `num_scales=2, width=64, num_blocks=8`, ImageNet 32x32 `num_scales=4, width=32, num_blocks=4`,
    64x64 `num_scales=5, width=32, num_blocks=2`, all with `batch_norm=True`.

    Args:
      event_shape: `[H, W, C]` or `[D]`.
      num_scales: number of levels; the image's sides must be divisible by `2**(num_scales - 1)`.
      num_couplings: couplings in a row.
      width: width of the networks at the finest level.
      num_blocks: residual blocks (images) or hidden layers (vectors).
      factorization: which half stays: `"conventional"` (images: checkerboard, vectors: first half), `"channels"`,
        `"checkerboard"`, `"random"`, a `DimensionFactorization`, or None: nothing leaves.
      batch_norm: batch normalisation in the ResNets, as in the reference.
      l2: L2 penalty on the ResNets' weight-norm magnitudes.
      alpha: margin of the logit preprocessing.
      levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed of networks, masks and the random factorization.

    Returns:
      `TransformedDistribution` of standard normal noise; `Dequantized` if `levels` is given.

    Raises:
      ValueError: if shape, number of scales and factorization do not fit each other.

    References: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017.

    #### Example

    >>> flow = dimflows.recipes.realnvp([8, 8, 1], width=4, num_blocks=1)
    >>> flow.sample(2, seed=0).shape, flow.event_shape
    (TensorShape([2, 8, 8, 1]), TensorShape([8, 8, 1]))
    """
    shape = common.checked_event_shape(event_shape, "realnvp")
    common.check_sizes("realnvp", num_scales=num_scales, num_couplings=num_couplings, width=width, num_blocks=num_blocks)
    conventional = "checkerboard" if len(shape) == 3 else "channels"
    split = common.resolve_factorization(factorization, shape, num_scales, conventional, seed)
    grids = common.grid_shapes(shape, num_scales, split is None)
    seeds = iter(np.random.SeedSequence(seed).generate_state(4 * num_scales * (num_couplings + 1)).tolist())
    options = {"num_couplings": num_couplings, "num_blocks": num_blocks, "seeds": seeds}
    if len(shape) == 3:
        options |= {"batch_norm": batch_norm, "l2": l2}
        flow_levels = [_image_level(grid, width * 2**k, is_last=k == num_scales - 1, **options) for k, grid in enumerate(grids)]
    else:
        flow_levels = [_vector_level(grid[0], width, **options) for grid in grids]
    flow = dfb.Multiscale(flow_levels, split, event_shape=shape)
    preprocess = None if levels is None else dfb.LogitPreprocess(levels, alpha)
    return common.as_distribution(flow, shape, levels, preprocess)


def _image_level(grid, width, *, num_couplings, num_blocks, batch_norm, l2, is_last, seeds):
    height, grid_width, channels = grid
    parts = []

    def add(mask, channels, width, mask_array):
        inputs, outputs = mask.sizes(channels)
        network = networks.ResNet(
            inputs,
            2 * outputs,
            width=width,
            num_blocks=num_blocks,
            mask=mask_array,
            batch_norm=batch_norm,
            l2=l2,
            seed=next(seeds) % 2**31,
        )
        parts.append(dfb.AffineCoupling(network, mask, log_scale="tanh", dtype=common.floatx()))
        parts.append(dfb.ActNorm(channels, dtype=common.floatx()))

    for i in range(num_couplings + is_last):
        mask = masks.Checkerboard(parity=1 - i % 2)
        add(mask, channels, width, mask.array(height, grid_width))
    if not is_last:
        parts.append(dfb.Squeeze())
        for i in range(num_couplings):
            add(masks.Channel(flip=i % 2 == 1), 4 * channels, 2 * width, None)
    return dfb.Chain(parts)


def _vector_level(dims, width, *, num_couplings, num_blocks, seeds):
    if dims < 2:
        raise ValueError(f"realnvp: a level with {dims} dimension has nothing to condition on; use fewer num_scales")
    parts, mask = [], None
    for i in range(num_couplings + 1):
        if i % 2 == 0:
            chosen = np.random.default_rng(next(seeds)).permutation(dims)[: dims // 2]
            mask = masks.Index(chosen.tolist(), dims)
        else:
            mask = mask.complement()
        inputs, outputs = mask.sizes(dims)
        network = networks.MLP(inputs, 2 * outputs, hidden=[width] * num_blocks, seed=next(seeds) % 2**31)
        parts.append(dfb.AffineCoupling(network, mask, log_scale="tanh", dtype=common.floatx()))
        parts.append(dfb.ActNorm(dims, dtype=common.floatx()))
    return dfb.Chain(parts)
