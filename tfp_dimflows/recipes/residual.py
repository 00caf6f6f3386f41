"""i-ResNet and Residual Flows: flows of invertible residual blocks."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import networks
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.registry import recipe

IRESNET = {
    "small": {"num_levels": 2, "depth": 2, "width": 32},
    "cifar10": {"num_levels": 3, "depth": 16, "width": 512},
}
RESIDUAL_FLOW = {
    "small": {"num_levels": 2, "depth": 2, "width": 32, "num_dense_blocks": 0},
    "cifar10": {"num_levels": 3, "depth": 16, "width": 512, "num_dense_blocks": 4},
}
DENSE_WIDTH = 128

iresnet_grids = functools.partial(common.grid_shapes, squeezes_first=True)


@recipe
def iresnet(
    event_shape: Sequence[int],
    *,
    config: str = "small",
    num_levels: int | None = None,
    depth: int | None = None,
    width: int | None = None,
    coeff: float = 0.9,
    num_terms: int = 5,
    factorization: common.Factorization | None = "conventional",
    rotation: str | None = None,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """i-ResNet: levels of (squeeze, `depth` times ActNorm and an invertible residual block), with truncated log-dets.

    The branches are ELU networks of a 3x3, a 1x1 and a 3x3 spectrally normalised convolution, on vectors of three dense
    layers. Between levels half of the dimensions leave. The prior is a Gaussian with learned mean and scale for every
    dimension. Integer images are scaled to [-1/2, 1/2), without logit. The log-det is biased (`dfb.residual.PowerSeries`).

    `config` names a set of values for the arguments that are None: `"small"` and `"cifar10"` (25,022,400 parameters on 32x32x3,
    and 6,144 of the prior).

    Args:
      event_shape: `[H, W, C]` whose sides are divisible by `2**num_levels`, or `[D]`.
      config: `"small"` or `"cifar10"`.
      num_levels: number of levels.
      depth: blocks per level.
      width: width of the branches.
      coeff: bound of the spectral norm of each layer.
      num_terms: terms of the log-det's series.
      factorization: which half stays: `"conventional"` (the first half of the squeezed channels), `"channels"`,
        `"checkerboard"`, `"random"`, `"principal"` (the leading half of principal components, `rotation="principal"`), a
        `DimensionFactorization`, or None: nothing leaves.
      rotation: None, or what each level's squeezed channels (the dimensions of a vector) are multiplied with, a matrix of
        `dfb.Rotation`: `"principal"`, `"haar"` or `"random"`. `"principal"` is taken from the data by `FlowModel.adapt`.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed.

    Returns:
      `TransformedDistribution` of a diagonal Gaussian; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: if shape, number of levels and factorization do not fit each other.

    References: Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible residual networks", 2019.

    #### Example

    >>> flow = dimflows.recipes.iresnet([4, 4, 1], width=4, depth=1)
    >>> flow.sample(2, seed=0).shape
    TensorShape([2, 4, 4, 1])
    """
    given = dict(locals())
    shape = common.checked_event_shape(event_shape, "iresnet")
    sizes = common.resolve_config("iresnet", IRESNET, config, given)
    common.check_sizes("iresnet", **sizes, num_terms=num_terms)
    _check_coeff("iresnet", coeff)
    num_levels, is_image = sizes["num_levels"], len(shape) == 3
    grids = iresnet_grids("iresnet", shape, num_levels, factorization is None)
    split = common.resolve_factorization(factorization, shape, num_levels, "channels", seed)
    seeds = iter(np.random.SeedSequence(seed).generate_state(num_levels * sizes["depth"]).tolist())
    log_det = dfb.residual.PowerSeries(num_terms)
    rotate = common.rotations(rotation, factorization, seed)
    flow_levels = []
    for k, grid in enumerate(grids):
        inner = (grid[0] // 2, grid[1] // 2, 4 * grid[2]) if is_image else grid
        parts = [*([dfb.Squeeze()] if is_image else []), *rotate(inner[-1])]
        for i in range(sizes["depth"]):
            network = _branch(inner, sizes["width"], "elu", coeff, bool(k or i), next(seeds))
            parts += [_actnorm(inner), dfb.InvertibleResidual(network, log_det, len(shape))]
        flow_levels.append(dfb.Chain(parts))
    loc, log_scale = (
        tf.Variable(tf.zeros([math.prod(shape)], common.floatx()), name=f"prior_{n}") for n in ("loc", "log_scale")
    )
    prior = tfd.Independent(tfd.Normal(loc, tfp.util.DeferredTensor(log_scale, tf.exp)), 1)
    flow = dfb.Multiscale(flow_levels, split, event_shape=shape)
    return common.as_distribution(flow, shape, grey_levels, common.centred, prior)


@recipe
def residual_flow(
    event_shape: Sequence[int],
    *,
    config: str = "small",
    num_levels: int | None = None,
    depth: int | None = None,
    width: int | None = None,
    num_dense_blocks: int | None = None,
    coeff: float = 0.98,
    roulette: str = "poisson",
    num_exact: int = 2,
    factorization: common.Factorization | None = "conventional",
    rotation: str | None = None,
    alpha: float = 0.05,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """Residual Flow: invertible residual blocks with unbiased log-dets (Russian roulette), an ActNorm after each.

    Level k works on the image squeezed k times. The branches are LipSwish networks of a 3x3, a 1x1 and a 3x3 spectrally
    normalised convolution, on vectors of three dense layers; the last level ends with `num_dense_blocks` blocks on flattened
    values. Between levels half of the dimensions leave.

    `config` names a set of values for the arguments that are None: `"small"` and `"cifar10"`, the release's sizes, whose model
    has `factorization=None`.

    Args:
      event_shape: `[H, W, C]` whose sides are divisible by `2**(num_levels - 1)`, or `[D]`.
      config: `"small"` or `"cifar10"`.
      num_levels: number of levels.
      depth: blocks per level.
      width: width of the branches.
      num_dense_blocks: blocks on flattened values, whose branches have two hidden layers of 128 units.
      coeff: bound of the spectral norm of each layer.
      roulette: distribution of the number of terms of the log-det, `"poisson"` or `"geometric"`.
      num_exact: terms that are always there in training; 20 in evaluation.
      factorization: which half stays: `"conventional"` (the first half of the squeezed channels), `"channels"`,
        `"checkerboard"`, `"random"`, `"principal"` (the leading half of principal components, `rotation="principal"`), a
        `DimensionFactorization`, or None: nothing leaves.
      rotation: None, or what each level's squeezed channels (the dimensions of a vector) are multiplied with, a matrix of
        `dfb.Rotation`: `"principal"`, `"haar"` or `"random"`. `"principal"` is taken from the data by `FlowModel.adapt`.
      alpha: margin of the logit preprocessing.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed.

    Returns:
      `TransformedDistribution` of standard normal noise; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: if shape, number of levels and factorization do not fit each other.

    References: Chen, Behrmann, Duvenaud, Jacobsen, "Residual flows for invertible generative modeling", 2019.

    #### Example

    >>> flow = dimflows.recipes.residual_flow([4, 4, 1], width=4, depth=1)
    >>> flow.sample(2, seed=0).shape
    TensorShape([2, 4, 4, 1])
    """
    given = dict(locals())
    shape = common.checked_event_shape(event_shape, "residual-flow")
    sizes = common.resolve_config("residual-flow", RESIDUAL_FLOW, config, given)
    common.check_sizes("residual-flow", **{name: sizes[name] for name in ("num_levels", "depth", "width")})
    _check_coeff("residual-flow", coeff)
    if sizes["num_dense_blocks"] < 0:
        raise ValueError(f"residual-flow: got num_dense_blocks={sizes['num_dense_blocks']}, needs 0 or more")
    num_levels, is_image = sizes["num_levels"], len(shape) == 3
    grids = common.grid_shapes("residual-flow", shape, num_levels, factorization is None)
    split = common.resolve_factorization(factorization, shape, num_levels, "channels", seed)
    seeds = iter(np.random.SeedSequence(seed).generate_state(num_levels * sizes["depth"] + sizes["num_dense_blocks"]).tolist())
    log_det = dfb.residual.RussianRoulette(roulette, num_exact=num_exact)
    rotate = common.rotations(rotation, factorization, seed)
    flow_levels = []
    for k, grid in enumerate(grids):
        parts = [*([] if is_image else rotate(grid[-1])), *([_actnorm(grid)] if k == 0 else [])]
        for i in range(sizes["depth"]):
            network = _branch(grid, sizes["width"], "lipswish", coeff, bool(k or i), next(seeds))
            parts += [dfb.InvertibleResidual(network, log_det, len(shape)), _actnorm(grid)]
        if is_image and k < num_levels - 1:
            parts += [dfb.Squeeze(), *rotate(4 * grid[-1])]
        flow_levels.append(parts)
    if sizes["num_dense_blocks"]:
        dims = math.prod(grids[-1])
        if is_image:
            flow_levels[-1].append(tfb.Reshape(event_shape_out=grids[-1], event_shape_in=[dims]))
        for _ in range(sizes["num_dense_blocks"]):
            network = networks.lipschitz_mlp(
                dims, [DENSE_WIDTH] * 2, first_activation=True, coeff=coeff, seed=next(seeds) % 2**31
            )
            flow_levels[-1] += [dfb.InvertibleResidual(network, log_det), _actnorm((dims,))]
    flow = dfb.Multiscale([dfb.Chain(parts) for parts in flow_levels], split, event_shape=shape)
    return common.as_distribution(flow, shape, grey_levels, common.logit(alpha))


def _check_coeff(recipe: str, coeff: float) -> None:
    if not 0.0 < coeff < 1.0:
        raise ValueError(f"{recipe}: got coeff={coeff!r}, needs a bound between 0 and 1 for blocks to be invertible")


def _branch(shape: Sequence[int], width: int, activation: str, coeff: float, first_activation: bool, seed: int) -> Callable:
    options: dict[str, Any] = {"activation": activation, "first_activation": first_activation}
    options |= {"coeff": coeff, "seed": seed % 2**31}
    if len(shape) == 3:
        return networks.lipschitz_conv(shape, width, **options)
    return networks.lipschitz_mlp(shape[0], [width] * 2, **options)


def _actnorm(shape: Sequence[int]) -> dfb.ActNorm:
    return dfb.ActNorm(shape[-1], dtype=common.floatx())
