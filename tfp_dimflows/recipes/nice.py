"""NICE: additive couplings and a learned scale."""

import math
from collections.abc import Sequence

import tensorflow as tf
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import networks
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.registry import recipe


@recipe
def nice(
    event_shape: Sequence[int],
    *,
    depth: int = 4,
    width: int = 64,
    num_hidden: int = 2,
    condition_shape: Sequence[int] | None = None,
    alpha: float = 0.05,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """NICE: additive couplings between even and odd dimensions, in turns, and a learned scale of every latent dimension.

    An ActNorm is next to the data. Images are flattened. The contribution of a dimension to the log-det is that of its scales,
    whatever the data.

    Reference size: MNIST `depth=4, width=1000, num_hidden=5`.

    Args:
      event_shape: `[D]` or `[H, W, C]`, of two dimensions or more.
      depth: number of couplings, at least 2 to transform every dimension.
      width: width of the networks' hidden layers.
      num_hidden: number of hidden layers.
      condition_shape: `[n]`, shape of the condition of a conditional flow.
      alpha: margin of the logit preprocessing.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed.

    Returns:
      `TransformedDistribution` of standard normal noise; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: for other shapes or sizes.

    References: Dinh, Krueger, Bengio, "NICE: non-linear independent components estimation", 2015.

    #### Example

    >>> flow = dimflows.recipes.nice([3], width=8)
    >>> flow.sample(4, seed=0).shape
    TensorShape([4, 3])
    """
    shape = common.checked_event_shape(event_shape, "nice")
    common.check_sizes("nice", depth=depth, width=width, num_hidden=num_hidden)
    dims = math.prod(shape)
    if dims < 2:
        raise ValueError(f"nice: got event shape {list(shape)}, needs two dimensions or more")
    condition = common.condition_channels("nice", condition_shape, (dims,))
    even = dfb.masks.Index(range(0, dims, 2), dims)
    flat = common.from_flat(shape) if len(shape) == 3 else []
    parts = [*flat, dfb.ActNorm(dims, dtype=common.floatx())]
    for k, network_seed in enumerate(common.seeds(seed, depth)):
        mask = even.complement() if k % 2 else even
        network = networks.MLP(*mask.sizes(dims), hidden=[width] * num_hidden, condition_channels=condition, seed=network_seed)
        parts.append(dfb.AdditiveCoupling(network, mask))
    parts.append(dfb.ElementwiseAffine(0.0, tf.Variable(tf.zeros([dims], common.floatx()), name="log_scale")))
    return common.as_distribution(dfb.Chain(parts), shape, grey_levels, common.logit(alpha))
