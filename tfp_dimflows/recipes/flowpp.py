"""Flow++: mixture-of-logistics couplings with self-attention, under variational dequantisation."""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import distributions as dfd
from tfp_dimflows import networks
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.registry import recipe

masks = dfb.masks

SMALL = {
    "layout": ["2 column", "squeeze", "2 channel", "2 column"],
    "width": 16,
    "num_blocks": 1,
    "num_components": 4,
    "dropout": 0.0,
    "pointwise": True,
    "noise_depth": 2,
    "noise_blocks": 1,
    "noise_attention": True,
    "context_blocks": 1,
}
CONFIGS = {
    "small": SMALL,
    "cifar10": {
        "layout": ["4 column", "squeeze", "2 channel", "3 column"],
        "width": 96,
        "num_blocks": 10,
        "num_components": 32,
        "dropout": 0.2,
        "pointwise": True,
        "noise_depth": 4,
        "noise_blocks": 2,
        "noise_attention": True,
        "context_blocks": 3,
    },
    "imagenet32": {
        "layout": ["7 column", "squeeze", "3 channel", "3 column"],
        "width": 128,
        "num_blocks": 20,
        "num_components": 32,
        "dropout": 0.0,
        "pointwise": False,
        "noise_depth": 8,
        "noise_blocks": 8,
        "noise_attention": True,
        "context_blocks": 8,
    },
    "imagenet64": {
        "layout": ["squeeze", "4 column", "squeeze", "2 channel", "2 column", "squeeze", "2 channel", "2 column"],
        "width": 96,
        "num_blocks": 16,
        "num_components": 4,
        "dropout": 0.0,
        "pointwise": False,
        "noise_depth": 4,
        "noise_blocks": 5,
        "noise_attention": False,
        "context_blocks": 5,
    },
}
CONFIGS["cifar10-width32"] = CONFIGS["cifar10"] | {"width": 32, "num_blocks": 13}
CONTEXT_WIDTH = 32
POSITIVE = ("width", "num_blocks", "num_components")
NONNEGATIVE = ("noise_depth", "noise_blocks", "context_blocks")


@recipe
def flowpp(
    event_shape: Sequence[int],
    *,
    config: str = "small",
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
    context_blocks: int | None = None,
    smooth: bool = False,
    alpha: float = 0.05,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """Flow++: mixture-of-logistics couplings with convolutions and self-attention; nothing leaves early.

    Each coupling stands behind a per-pixel ActNorm and, with `pointwise`, an invertible 1x1 convolution of each of its parts;
    the parts of successive couplings swap roles. Integer images have variational dequantisation, a conditional flow of
    `noise_depth` such couplings given a context of the image, or uniform noise if that is 0.

    `config` names a set of values for the arguments that are None: `"small"`, `"cifar10"` (31,443,440 parameters on 32x32x3
    with `grey_levels`), `"imagenet32"` and `"imagenet64"` (sizes of the release; its ImageNet networks differ in details:
    weight-normalised convolutions and attention in the context for 32x32, a concat-ELU before the last convolution), and
    `"cifar10-width32"`, the small model that VFlow is compared with. They are sizes only: optimizer and schedule are the
    user's.

    Args:
      event_shape: `[H, W, C]`.
      config: `"small"`, `"cifar10"`, `"imagenet32"`, `"imagenet64"` or `"cifar10-width32"`.
      layout: couplings from data to latent, `"N column"` (on even and odd columns) or `"N channel"` (on halves of the
        channels), and `"squeeze"`.
      width: width of the networks.
      num_blocks: blocks of the networks.
      num_components: logistics per dimension.
      num_heads: attention heads.
      dropout: dropout in the networks, in training only.
      attention: whether the networks have self-attention.
      pointwise: whether there are 1x1 convolutions.
      noise_depth: couplings of the dequantisation flow; 0: uniform noise.
      noise_blocks: blocks of its networks.
      noise_attention: whether they have self-attention, if the others have.
      context_blocks: gated convolutions of its context network.
      smooth: as in `dfb.MixtureLogisticCDF`.
      alpha: margin of the logit preprocessing.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed.

    Returns:
      `TransformedDistribution` of standard normal noise; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: for an unknown configuration or layout, or a shape that does not fit the layout.

    References: Ho, Chen, Srinivas, Duan, Abbeel, "Flow++", 2019.

    #### Example

    >>> flow = dimflows.recipes.flowpp([8, 8, 1], width=4, num_components=2, layout=["2 column"])
    >>> flow.sample(2, seed=0).shape
    TensorShape([2, 8, 8, 1])
    """
    given = dict(locals())
    shape = common.checked_event_shape(event_shape, "flowpp", ranks=(3,))
    sizes = common.resolve_config("flowpp", CONFIGS, config, given)
    common.check_sizes("flowpp", **{name: sizes[name] for name in POSITIVE})
    common.check_sizes("flowpp", least=0, **{name: sizes[name] for name in NONNEGATIVE})
    build = Couplings(sizes, num_heads, attention, smooth, seed)
    flow = dfb.Multiscale([build.flow(shape, sizes["layout"], sizes["num_blocks"])], event_shape=shape)
    return as_dequantized(common.as_distribution(flow, shape, None), shape, grey_levels, alpha, build)


class Couplings:
    """Builds Flow++'s couplings, with a seed of its own for each part.

    Args:
      sizes: a configuration.
      num_heads: attention heads.
      attention: whether the networks have self-attention.
      smooth: as in `dfb.MixtureLogisticCDF`.
      seed: integer seed.
    """

    def __init__(self, sizes: dict, num_heads: int, attention: bool, smooth: bool, seed: int):
        self.sizes = sizes
        self._attention = attention
        self._options = {"num_heads": num_heads, "dropout": sizes["dropout"], "width": sizes["width"]}
        self._smooth = smooth
        self._generator = np.random.default_rng(seed)

    def seed(self) -> int:
        """The next integer seed."""
        return int(self._generator.integers(2**31))

    def flow(
        self,
        shape: Sequence[int],
        layout: Sequence[str],
        num_blocks: int,
        condition_channels: int = 0,
        attention: bool = True,
    ) -> dfb.Chain:
        """The couplings of a layout on events of a shape, from data to latent."""
        height, width, channels = shape
        parts = []
        for item in layout:
            count, _, kind = item.rpartition(" ")
            if item == "squeeze":
                parts.append(dfb.Squeeze(order="position_major"))
                height, width, channels = height // 2, width // 2, 4 * channels
            elif kind in ("column", "channel") and count.isdigit():
                mask = masks.Columns() if kind == "column" else masks.Channel()
                for _ in range(int(count)):
                    parts += self._step(mask, (height, width, channels), num_blocks, condition_channels, attention)
                    mask = mask.complement()
            else:
                raise ValueError(f"flowpp: got {item!r} in a layout, needs 'squeeze', 'N column' or 'N channel'")
        return dfb.Chain(parts)

    def noise_flow(
        self, shape: Sequence[int], inputs: int, depth: int, num_blocks: int, preprocess: Callable
    ) -> dfb.EmbedCondition:
        """A flow from standard normal noise to (0, 1), events of a shape, given an image of `inputs` channels."""
        sizes = self.sizes
        couplings = self.flow(shape, [f"{depth} column"], num_blocks, CONTEXT_WIDTH, sizes["noise_attention"])
        context = networks.FlowPPContext(
            inputs, width=CONTEXT_WIDTH, num_blocks=sizes["context_blocks"], dropout=sizes["dropout"], seed=self.seed()
        )
        # The couplings' formulas are those of their inverse: this direction draws noise.
        flow = dfb.Chain([tfb.Sigmoid(), tfb.Invert(couplings)])
        return dfb.EmbedCondition(flow, lambda image: context(preprocess(image)), condition_ndims=3)

    def _step(
        self, mask: masks.Mask, shape: tuple[int, int, int], num_blocks: int, condition_channels: int, attention: bool
    ) -> list[tfb.Bijector]:
        given, transformed = (part.shape for part in mask.split(tf.zeros(shape)))
        components = self.sizes["num_components"]
        network = networks.FlowPPNet(
            given[-1],
            transformed[-1] * (2 + 3 * components),
            image_size=given[:2],
            num_blocks=num_blocks,
            condition_channels=condition_channels,
            attention=self._attention and attention,
            seed=self.seed(),
            **self._options,
        )
        parts = [dfb.ActNorm(shape, dtype=common.floatx())]
        if self.sizes["pointwise"]:
            convs = (dfb.InvertibleConv1x1(p[-1], seed=self.seed(), dtype=common.floatx()) for p in (given, transformed))
            parts.append(dfb.Blockwise(mask, *convs))
        return [*parts, dfb.MixtureLogisticCoupling(network, mask, components, self._smooth)]


def as_dequantized(
    distribution: tfd.Distribution, shape: Sequence[int], grey_levels: int | None, alpha: float, build: Couplings
) -> tfd.Distribution:
    """A distribution of logits as one of integer images, with a dequantisation flow; without `grey_levels` as it is."""
    if grey_levels is None:
        return distribution
    pixels = tfd.TransformedDistribution(distribution, dfb.LogitPreprocess(grey_levels, alpha))
    noise, sizes = None, build.sizes
    if sizes["noise_depth"]:
        noise = build.noise_flow(
            shape, shape[-1], sizes["noise_depth"], sizes["noise_blocks"], lambda image: image / grey_levels - 0.5
        )
    return dfd.Dequantized(pixels, grey_levels=grey_levels, noise=noise)
