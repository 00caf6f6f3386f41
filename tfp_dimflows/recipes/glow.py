"""Glow."""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import networks
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.registry import recipe

COUPLINGS = {"affine": 2, "additive": 1}

glow_grids = functools.partial(common.grid_shapes, squeezes_first=True, couplings=True)


@recipe
def glow(
    event_shape: Sequence[int],
    *,
    num_levels: int | None = None,
    depth: int = 4,
    width: int = 64,
    num_hidden: int = 2,
    coupling: str = "affine",
    factorization: common.Factorization | None = "conventional",
    rotation: str | None = None,
    condition_shape: Sequence[int] | None = None,
    attribution: str = "polar",
    memory: str = "keep",
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """Glow: levels of (squeeze, `depth` steps of actnorm, invertible 1x1 convolution, coupling), with learned split priors.

    Between levels half of the dimensions leave, scored by a conditional Gaussian given those that stay; the deepest part has a
    learned Gaussian prior. Integer images are scaled to [-1/2, 1/2), without logit. On vectors the convolution is a matrix, the
    couplings' networks are MLPs of `num_hidden` layers, their log-scales a trainable multiple of a tanh, and all latent
    dimensions are standard normal. With a rotation before the steps, the convolutions start as exchanges of the two halves of
    the channels, so that at first the leading components are what stays; without, as random orthogonal matrices.

    Reference sizes: CIFAR-10 `num_levels=3, depth=32, width=512`, ImageNet 32x32 `depth=48`.

    Args:
      event_shape: `[H, W, C]`, whose sides must be divisible by `2**num_levels`, or `[D]`.
      num_levels: number of levels; None: 2, but 1 for `[2]`.
      depth: steps of flow per level.
      width: width of the coupling networks.
      num_hidden: hidden layers of the coupling networks of vectors.
      coupling: `"affine"` or `"additive"`.
      factorization: which half stays: `"conventional"` (the first half of the squeezed channels), `"channels"`,
        `"checkerboard"`, `"random"`, `"principal"` (the leading half of principal components, `rotation="principal"`), a
        `DimensionFactorization`, or None: nothing leaves.
      rotation: None, or what each level's squeezed channels (the dimensions of a vector) are multiplied with, a matrix of
        `dfb.Rotation`: `"principal"`, `"haar"` or `"random"`. `"principal"` is taken from the data by `FlowModel.adapt`.
      condition_shape: shape of the condition of a conditional flow: a vector `[n]` or an image `[H, W, n]` of the event's
        height and width. It enters every coupling network.
      attribution: how the convolutions' log-dets are shared among the channels, as in `dfb.InvertibleConv1x1`; matters to
        likelihood contributions only.
      memory: `"keep"` the networks' activations for the gradients, or `"recompute"` them, as in `dfb.Chain`: memory that hardly
        grows with `depth`, at a step time about a third longer.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed.

    Returns:
      `TransformedDistribution` of standard normal noise; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: if shape, number of levels and factorization do not fit each other.

    References: Kingma, Dhariwal, "Glow: generative flow with invertible 1x1 convolutions", 2018.

    #### Example

    >>> flow = dimflows.recipes.glow([8, 8, 1], depth=1, width=4)
    >>> flow.sample(2, seed=0).shape
    TensorShape([2, 8, 8, 1])
    """
    shape = common.checked_event_shape(event_shape, "glow")
    num_levels = common.default_levels(shape) if num_levels is None else num_levels
    common.check_sizes("glow", num_levels=num_levels, depth=depth, width=width, num_hidden=num_hidden)
    if coupling not in COUPLINGS:
        raise ValueError(f"glow: got coupling={coupling!r}, needs one of {tuple(COUPLINGS)}")
    grids = glow_grids("glow", shape, num_levels, factorization is None)
    split = common.resolve_factorization(factorization, shape, num_levels, "channels", seed)
    seeds = iter(np.random.SeedSequence(seed).generate_state(2 * num_levels * depth).tolist())
    rotate = common.rotations(rotation, factorization, seed)
    if len(shape) == 1:
        condition = common.condition_channels("glow", condition_shape, shape)
        sizes = (depth, width, num_hidden, coupling, condition, seeds, attribution)
        flow_levels = []
        for (dims,) in grids:
            rotated = rotate(dims)
            flow_levels.append(dfb.Chain([*rotated, *vector_steps(dims, *sizes, unmixed=bool(rotated))], memory))
        flow = dfb.Multiscale(flow_levels, split, event_shape=shape)
        return common.as_distribution(flow, shape, grey_levels, common.centred)
    conditions = [common.condition_channels("glow", condition_shape, shape, k + 1) for k in range(num_levels)]
    flow_levels = []
    for (*_, channels), condition in zip(grids, conditions):
        rotated, inner = rotate(4 * channels), 4 * channels
        steps = image_steps(inner, depth, width, coupling, condition, seeds, attribution, memory, exchange=bool(rotated))
        flow_levels.append(dfb.Chain([dfb.Squeeze(), *rotated, steps]))
    left_channels = [2 * grid[-1] for grid in grids[:-1]]
    exits = [None if split is None else _gaussian(c) for c in left_channels] + [_gaussian(4 * grids[-1][-1])]
    flow = dfb.Multiscale(flow_levels, split, exits=exits, event_shape=shape)
    return common.as_distribution(flow, shape, grey_levels, common.centred)


def image_steps(
    channels: int,
    depth: int,
    width: int,
    coupling: str,
    condition_channels: int,
    seeds: Iterator[int],
    attribution: str = "polar",
    memory: str = "keep",
    exchange: bool = False,
) -> dfb.Scan:
    """`depth` steps of flow on images; with `exchange` their convolutions start as exchanges of halves of the channels."""
    mask = dfb.masks.Channel()
    inputs, outputs = mask.sizes(channels)
    seeds_of_steps = [(next(seeds), next(seeds) % 2**31) for _ in range(depth)]

    def step(k: int) -> dfb.Chain:
        of_convolution, of_network = seeds_of_steps[k]
        actnorm = dfb.ActNorm(channels, log_scale_factor=3.0, dtype=common.floatx())
        matrix = _exchange(channels, k, depth) if exchange else "random"
        convolution = dfb.InvertibleConv1x1(channels, attribution, of_convolution, common.floatx(), matrix)
        network = networks.GlowConvNet(
            inputs,
            COUPLINGS[coupling] * outputs,
            width=width,
            condition_channels=condition_channels,
            seed=of_network,
        )
        return dfb.Chain([actnorm, convolution, _coupling(network, mask, coupling, "sigmoid")])

    return dfb.Scan(step, depth, memory)


def vector_steps(
    dims: int,
    depth: int,
    width: int,
    num_hidden: int,
    coupling: str,
    condition_channels: int,
    seeds: Iterator[int],
    attribution: str = "polar",
    unmixed: bool = False,
) -> list[dfb.FlowBijector]:
    """`depth` steps of flow on vectors, from data to latent; successive couplings transform the one and the other half.

    With `unmixed` the convolutions start as the identity, in place of random ones.
    """
    parts = []
    for k in range(depth):
        flip = k % 2 == 1
        mask = dfb.masks.Channel(flip, event_ndims=1, num_conditioning=dims - dims // 2 if flip else dims // 2)
        inputs, outputs = mask.sizes(dims)
        parts.append(dfb.ActNorm(dims, dtype=common.floatx()))
        matrix = np.eye(dims) if unmixed else "random"
        parts.append(dfb.InvertibleConv1x1(dims, attribution, next(seeds), common.floatx(), matrix))
        network = networks.MLP(
            inputs,
            COUPLINGS[coupling] * outputs,
            hidden=[width] * num_hidden,
            condition_channels=condition_channels,
            seed=next(seeds) % 2**31,
        )
        parts.append(_coupling(network, mask, coupling, "tanh"))
    return parts


def _coupling(network: Callable[..., tf.Tensor], mask: dfb.masks.Mask, coupling: str, scale: str) -> dfb.Coupling:
    if coupling == "affine":
        return dfb.AffineCoupling(network, mask, scale=scale, dtype=common.floatx())
    return dfb.AdditiveCoupling(network, mask)


def _exchange(channels: int, step: int, depth: int) -> np.ndarray:
    """The exchange of the halves of the channels; the identity in the last of an odd number of steps, for their order."""
    return np.roll(np.eye(channels), channels // 2 if step < depth - depth % 2 else 0, axis=0)


def _gaussian(channels: int) -> dfb.ConditionalTransform:
    """Diagonal Gaussian of some channels given as many others: mean and log-scale from a zero-initialised convolution."""
    network = networks.ZeroConv2D(channels, 2 * channels)
    return dfb.ConditionalTransform(network, dfb.transformers.Affine("exp"), event_ndims=3, name="split_prior")
