"""VFlow: flows on data augmented by noise dimensions."""

from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import distributions as dfd
from tfp_dimflows import networks
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.flowpp import CONFIGS as FLOWPP
from tfp_dimflows.recipes.flowpp import NONNEGATIVE, POSITIVE, Couplings, as_dequantized
from tfp_dimflows.recipes.glow import glow, image_steps, vector_steps
from tfp_dimflows.recipes.registry import recipe

SMALL = FLOWPP["small"] | {
    "num_extra": 1,
    "layout": ["2 column", "2 channel", "squeeze", "2 channel"],
    "posterior_depth": 2,
    "posterior_blocks": 1,
}
CONFIGS = {
    "small": SMALL,
    "cifar10": FLOWPP["cifar10"]
    | {
        "num_extra": 3,
        "layout": ["2 column", "2 channel", "squeeze", "2 column", "3 channel"],
        "posterior_depth": 4,
        "posterior_blocks": 3,
    },
    "imagenet32": FLOWPP["imagenet32"] | {"num_extra": 3, "pointwise": True, "posterior_depth": 8, "posterior_blocks": 8},
    "imagenet64": FLOWPP["imagenet64"] | {"num_extra": 3, "pointwise": True, "posterior_depth": 4, "posterior_blocks": 5},
}
CONFIGS |= {f"cifar10-width{width}": CONFIGS["cifar10"] | {"width": width} for width in (64, 56, 32)}


@recipe
def vflow(
    event_shape: Sequence[int],
    *,
    config: str = "small",
    num_extra: int | None = None,
    layout: Sequence[str] | None = None,
    width: int | None = None,
    num_blocks: int | None = None,
    num_components: int | None = None,
    num_heads: int = 4,
    dropout: float | None = None,
    attention: bool = True,
    pointwise: bool | None = None,
    noise_depth: int | None = None,
    noise_blocks: int | None = None,
    noise_attention: bool | None = None,
    posterior_depth: int | None = None,
    posterior_blocks: int | None = None,
    context_blocks: int | None = None,
    smooth: bool = False,
    alpha: float = 0.05,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """VFlow on Flow++: the flow of `flowpp` on images with extra channels, drawn from a conditional flow given the image.

    The posterior has the form of Flow++'s dequantisation flow, `posterior_depth` couplings given a context of the logits of
    the image; its values are in (0, 1), and the bounds are those of the probability of the image with such extra channels (see
    `dfb.VFlow`). `config` names a set of values for the arguments that are None: `"small"`, `"cifar10"`
    (39,700,096 parameters on 32x32x3 with `grey_levels`), `"imagenet32"` and `"imagenet64"`, sizes of the release as in
    `flowpp`;
    `"cifar10-width64"`, `"cifar10-width56"` and `"cifar10-width32"` have the widths of the paper's smaller models, of which
    widths and blocks alone are known: 20.6, 16.7 and 7.5 million parameters here, 16.5, 11.9 and 4.0 in the paper. Its model
    with one extra channel is `config="cifar10-width32", num_extra=1, num_blocks=11`.

    Args:
      event_shape: `[H, W, C]`.
      config: `"small"`, `"cifar10"`, `"imagenet32"`, `"imagenet64"`, `"cifar10-width64"`, `"cifar10-width56"` or
        `"cifar10-width32"`.
      num_extra: number of extra channels.
      layout: as in `flowpp`, for images with the extra channels.
      width: as in `flowpp`.
      num_blocks: as in `flowpp`.
      num_components: as in `flowpp`.
      num_heads: as in `flowpp`.
      dropout: as in `flowpp`.
      attention: as in `flowpp`.
      pointwise: as in `flowpp`.
      noise_depth: as in `flowpp`.
      noise_blocks: as in `flowpp`.
      noise_attention: as in `flowpp`, of the posterior's networks too.
      posterior_depth: couplings of the posterior; 0: the extra channels are standard normal noise.
      posterior_blocks: blocks of its networks.
      context_blocks: gated convolutions of the context networks.
      smooth: as in `dfb.MixtureLogisticCDF`.
      alpha: margin of the logit preprocessing.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed.

    Returns:
      `Augmented` distribution of `dfb.VFlow`; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: as `flowpp`.

    References: Chen, Lu, Chenli, Zhu, Tian, "VFlow: More expressive generative flows with variational data augmentation", 2020.

    #### Example

    >>> flow = dimflows.recipes.vflow([4, 4, 1], width=4, num_components=2)
    >>> flow.sample(2, seed=0).shape, flow.num_extra
    (TensorShape([2, 4, 4, 1]), 1)
    """
    given = dict(locals())
    shape = common.checked_event_shape(event_shape, "vflow", ranks=(3,))
    sizes = common.resolve_config("vflow", CONFIGS, config, given)
    common.check_sizes("vflow", **{name: sizes[name] for name in (*POSITIVE, "num_extra")})
    nonnegative = (*NONNEGATIVE, "posterior_depth", "posterior_blocks")
    common.check_sizes("vflow", least=0, **{name: sizes[name] for name in nonnegative})
    build = Couplings(sizes, num_heads, attention, smooth, seed)
    joint = (*shape[:2], shape[-1] + sizes["num_extra"])
    extra = (*shape[:2], sizes["num_extra"])
    flow = dfb.Multiscale([build.flow(joint, sizes["layout"], sizes["num_blocks"])], event_shape=joint)
    posterior = None
    if sizes["posterior_depth"]:
        posterior = build.noise_flow(extra, shape[-1], sizes["posterior_depth"], sizes["posterior_blocks"], tf.identity)
    augmented = _augmented(flow, posterior, joint, sizes["num_extra"])
    return as_dequantized(augmented, shape, grey_levels, alpha, build)


@recipe
def vflow_glow(
    event_shape: Sequence[int],
    *,
    num_extra: int = 2,
    num_levels: int = 1,
    depth: int = 2,
    posterior_depth: int = 1,
    width: int = 50,
    num_hidden: int = 2,
    coupling: str = "affine",
    factorization: common.Factorization | None = "conventional",
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """VFlow on Glow: the flow of `glow` on vectors or images with extra dimensions, drawn from a conditional Glow.

    The posterior is a Gaussian whose mean and scale are a network's of x, with `posterior_depth` steps of Glow given x above
    it; one extra dimension has the Gaussian alone, since a coupling needs two.

    Args:
      event_shape: `[H, W, C]` or `[D]`.
      num_extra: number of extra channels or dimensions.
      num_levels: as in `glow`.
      depth: steps of flow per level.
      posterior_depth: steps of flow of the posterior.
      width: width of the coupling networks.
      num_hidden: hidden layers of the coupling networks of vectors.
      coupling: `"affine"` or `"additive"`.
      factorization: as in `glow`.
      grey_levels: number of grey levels of integer images, scaled to [-1/2, 1/2) under uniform dequantisation; None for
        continuous events.
      seed: integer seed.

    Returns:
      `Augmented` distribution of `dfb.VFlow`; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: as `glow`.

    References: Chen, Lu, Chenli, Zhu, Tian, "VFlow: More expressive generative flows with variational data augmentation", 2020.

    #### Example

    >>> flow = dimflows.recipes.vflow_glow([2], num_extra=8)
    >>> flow.sample(3, seed=0).shape, flow.log_prob(tf.zeros([3, 2]), num_samples=10).shape
    (TensorShape([3, 2]), TensorShape([3]))
    """
    shape = common.checked_event_shape(event_shape, "vflow-glow")
    common.check_sizes("vflow-glow", num_extra=num_extra, num_levels=num_levels, posterior_depth=posterior_depth)
    if len(shape) == 3:
        common.check_halvings("vflow-glow", shape, num_levels, num_levels=num_levels)
    joint = (*shape[:-1], shape[-1] + num_extra)
    seeds = iter(np.random.SeedSequence(seed).generate_state(2 * posterior_depth + 2).tolist())
    flow = glow(
        joint,
        num_levels=num_levels,
        depth=depth,
        width=width,
        num_hidden=num_hidden,
        coupling=coupling,
        factorization=factorization,
        seed=next(seeds),
    ).bijector
    posterior = _glow_posterior(shape, num_extra, posterior_depth, width, num_hidden, coupling, seeds)
    augmented = _augmented(flow, posterior, joint, num_extra)
    if grey_levels is None:
        return augmented
    pixels = tfd.TransformedDistribution(augmented, common.centred(grey_levels))
    return dfd.Dequantized(pixels, grey_levels=grey_levels)


def _glow_posterior(
    shape: tuple[int, ...], num_extra: int, depth: int, width: int, num_hidden: int, coupling: str, seeds: Iterator[int]
) -> dfb.FlowBijector:
    """From noise to the extra dimensions: a Gaussian given x, then steps of Glow given x, of vectors at unit scale."""
    if len(shape) == 3:
        network = networks.GlowConvNet(shape[-1], 2 * num_extra, width=width, seed=next(seeds) % 2**31)
        squeezed = image_steps(4 * num_extra, depth, width, coupling, 4 * shape[-1], seeds)
        steps = [dfb.Squeeze(), squeezed, tfb.Invert(dfb.Squeeze())]
    else:
        hidden = [width] * num_hidden
        network = networks.MLP(shape[0], 2 * num_extra, hidden=hidden, seed=next(seeds) % 2**31)
        steps = vector_steps(num_extra, depth, width, num_hidden, coupling, shape[0], seeds) if num_extra > 1 else []
    gaussian = dfb.ConditionalTransform(network, dfb.transformers.Affine("exp"), len(shape))
    posterior = dfb.Chain([gaussian, *steps])
    if len(shape) == 3:
        return posterior
    columns = dfb.ActNorm(shape[0], dtype=common.floatx())
    return dfb.EmbedCondition(posterior, columns.inverse, condition_ndims=1)


def _augmented(flow: tfb.Bijector, posterior: tfb.Bijector | None, joint: tuple[int, ...], num_extra: int) -> dfd.Augmented:
    vflow = dfb.VFlow(flow, posterior, num_extra, event_ndims=len(joint))
    return dfd.Augmented(common.as_distribution(vflow, joint, None), num_extra)
