"""FFJORD: continuous flows."""

from collections.abc import Sequence

import numpy as np
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import networks
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.registry import recipe


@recipe
def ffjord(
    event_shape: Sequence[int],
    *,
    num_levels: int = 1,
    depth: int = 1,
    hidden: Sequence[int] = (64, 64, 64),
    activation: str | None = None,
    end_time: float = 0.5,
    trace: str | None = None,
    num_steps: int | None = None,
    factorization: common.Factorization | None = "conventional",
    alpha: float = 0.05,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """FFJORD: levels of continuous flows, each the solution of an ordinary differential equation.

    An ActNorm is next to the data. The velocities are `ConcatSquashNet`s, dense for vectors and convolutional for images.
    Between levels images are squeezed and half of the dimensions leave.

    Args:
      event_shape: `[H, W, C]` whose sides are divisible by `2**(num_levels - 1)`, or `[D]`.
      num_levels: number of levels.
      depth: continuous flows per level.
      hidden: widths of the networks' hidden layers.
      activation: name of a smooth Keras activation; None: tanh for vectors, softplus for images.
      end_time: the time over which the equation is solved.
      trace: `"exact"` or `"hutchinson"`, as in `dfb.ffjord`; None: exact for vectors.
      num_steps: steps of a Runge-Kutta solver; None: the adaptive Dormand-Prince solver with adjoint gradients.
      factorization: which half stays: `"conventional"` (the first half of the squeezed channels), `"channels"`,
        `"checkerboard"`, `"random"`, `"principal"` (the leading half of the principal components of squeezed channels, or of a
        vector before each level), a `DimensionFactorization`, or None: nothing leaves.
      alpha: margin of the logit preprocessing.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed.

    Returns:
      `TransformedDistribution` of standard normal noise; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: if shape, number of levels and factorization do not fit each other.

    References: Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD", 2019.

    #### Example

    >>> flow = dimflows.recipes.ffjord([2], hidden=[8], num_steps=4)
    >>> flow.sample(3, seed=0).shape
    TensorShape([3, 2])
    """
    shape = common.checked_event_shape(event_shape, "ffjord")
    common.check_sizes("ffjord", num_levels=num_levels, depth=depth)
    is_image = len(shape) == 3
    grids = common.grid_shapes("ffjord", shape, num_levels, factorization is None)
    split = common.resolve_factorization(factorization, shape, num_levels, "channels", seed)
    seeds = iter(np.random.SeedSequence(seed).generate_state(num_levels * depth).tolist())
    rotate = common.rotations(None, factorization, seed)
    options = {
        "event_ndims": len(shape),
        "end_time": end_time,
        "trace": trace or ("hutchinson" if is_image else "exact"),
        "solver": None if num_steps is None else dfb.continuous.RungeKutta4(num_steps),
        "dtype": common.floatx(),
    }
    flow_levels = []
    for k, grid in enumerate(grids):
        parts = [] if is_image else [*rotate(grid[-1])]
        for _ in range(depth):
            network = networks.ConcatSquashNet(
                grid,
                hidden=hidden,
                activation=activation or ("softplus" if is_image else "tanh"),
                seed=next(seeds) % 2**31,
            )
            parts.append(dfb.ffjord(network, **options))
        if is_image and k < num_levels - 1:
            parts += [dfb.Squeeze(), *rotate(4 * grid[-1])]
        flow_levels.append(dfb.Chain(parts))
    flow = dfb.Multiscale(flow_levels, split, event_shape=shape)
    flow = dfb.Chain([dfb.ActNorm(shape[-1], dtype=common.floatx()), flow])
    return common.as_distribution(flow, shape, grey_levels, common.logit(alpha))
