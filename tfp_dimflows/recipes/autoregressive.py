"""MAF, IAF, and autoregressive flows of images and signals."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import networks
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.registry import recipe

# What a layer makes of a dimension given those before it, from the transformer's name.
TRANSFORMERS: dict[str, Callable[..., dfb.Transformer]] = {
    "affine": lambda dtype: dfb.transformers.Affine(dtype=dtype),
    "gated": lambda dtype: dfb.transformers.Gated(),
    "spline": lambda dtype: dfb.transformers.Spline(),
    "mixture": lambda dtype: dfb.transformers.MixtureLogistic(8),
}


@recipe
def maf(
    event_shape: Sequence[int],
    *,
    depth: int = 5,
    hidden: Sequence[int] | None = None,
    transformer: str = "affine",
    condition_shape: Sequence[int] | None = None,
    alpha: float = 0.05,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """Masked autoregressive flow: layers on MADE networks, with the order reversed and an ActNorm from one to the next.

    Images are flattened. A log-density takes one evaluation of each network, a sample as many as there are dimensions.

    Args:
      event_shape: `[D]` or `[H, W, C]`.
      depth: number of autoregressive layers.
      hidden: widths of the networks' hidden layers; None: two layers of 64 units, or of as many as there are dimensions if
        that is more.
      transformer: what is done to a dimension: `"affine"`, `"gated"` (IAF's), `"spline"` (rational-quadratic, of 8 bins) or
        `"mixture"` (the distribution function of 8 logistics; a sample solves for its inverse).
      condition_shape: `[n]`, shape of the condition of a conditional flow.
      alpha: margin of the logit preprocessing.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed.

    Returns:
      `TransformedDistribution` of standard normal noise; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: for other shapes, sizes or transformers.

    References: Papamakarios, Pavlakou, Murray, "Masked autoregressive flow for density estimation", 2017.

    #### Example

    >>> flow = dimflows.recipes.maf([3], depth=2, hidden=[8])
    >>> flow.log_prob(tf.zeros([4, 3])).shape
    TensorShape([4])
    """
    given: dict[str, Any] = {"depth": depth, "hidden": hidden, "condition_shape": condition_shape, "seed": seed}
    return _made_flow("maf", event_shape, transformer, lambda layer: layer, alpha, grey_levels, **given)


@recipe
def iaf(
    event_shape: Sequence[int],
    *,
    depth: int = 4,
    hidden: Sequence[int] | None = None,
    transformer: str = "gated",
    condition_shape: Sequence[int] | None = None,
    alpha: float = 0.05,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """Inverse autoregressive flow: layers on MADE networks, with the order reversed and an ActNorm from one to the next.

    Images are flattened. A sample takes one evaluation of each network, the log-density of a given event as many as there are
    dimensions. So it is meant for variational inference; training by maximum likelihood is for few dimensions.

    Args:
      event_shape: `[D]` or `[H, W, C]`.
      depth: number of autoregressive layers.
      hidden: widths of the networks' hidden layers; None: two layers of 64 units, or of as many as there are dimensions if
        that is more.
      transformer: what is done to a dimension of the noise, as in `maf`.
      condition_shape: `[n]`, shape of the condition of a conditional flow.
      alpha: margin of the logit preprocessing.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed.

    Returns:
      `TransformedDistribution` of standard normal noise; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: for other shapes, sizes or transformers.

    References: Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, "Improving variational inference with inverse
    autoregressive flow", 2016.

    #### Example

    >>> flow = dimflows.recipes.iaf([3], depth=2, hidden=[8])
    >>> flow.sample(4, seed=0).shape
    TensorShape([4, 3])
    """
    given: dict[str, Any] = {"depth": depth, "hidden": hidden, "condition_shape": condition_shape, "seed": seed}
    return _made_flow("iaf", event_shape, transformer, tfb.Invert, alpha, grey_levels, **given)


def made_layers(
    dims: int,
    depth: int,
    hidden: Sequence[int],
    condition_channels: int,
    transformer: Callable[[], dfb.Transformer],
    wrap: Callable[[tfb.Bijector], tfb.Bijector],
    seed: int,
) -> list[tfb.Bijector]:
    """Autoregressive layers with the order reversed from one to the next, each wrapped by a function."""
    layers = []
    for k, layer_seed in enumerate(common.seeds(seed, depth)):
        elementwise = transformer()
        network = networks.MADE(
            dims,
            elementwise.params_per_dim * dims,
            hidden=hidden,
            ordering="reversed" if k % 2 else "natural",
            condition_channels=condition_channels,
            zero_init=not isinstance(elementwise, dfb.transformers.MixtureLogistic),  # whose components would stay equal
            seed=layer_seed,
        )
        layers.append(wrap(dfb.Autoregressive(network, elementwise)))
    return layers


def _made_flow(
    name: str,
    event_shape: Sequence[int],
    transformer: str,
    wrap: Callable[[tfb.Bijector], tfb.Bijector],
    alpha: float,
    grey_levels: int | None,
    *,
    depth: int,
    hidden: Sequence[int] | None,
    condition_shape: Sequence[int] | None,
    seed: int,
) -> tfd.Distribution:
    shape = common.checked_event_shape(event_shape, name)
    dims = math.prod(shape)
    common.check_sizes(name, depth=depth)
    condition = common.condition_channels(name, condition_shape, (dims,))
    hidden = common.hidden_sizes(name, hidden, dims)
    if transformer not in TRANSFORMERS:
        raise ValueError(f"{name}: got transformer={transformer!r}, needs one of {', '.join(TRANSFORMERS)}")
    elementwise = functools.partial(TRANSFORMERS[transformer], common.floatx())
    layers = made_layers(dims, depth, hidden, condition, elementwise, wrap, seed)
    parts = [part for layer in layers for part in (layer, dfb.ActNorm(dims, dtype=common.floatx()))]
    return common.as_distribution(dfb.Chain([*common.data_side(shape), *parts[:-1]]), shape, grey_levels, common.logit(alpha))


@recipe
def pixelcnn_flow(
    event_shape: Sequence[int],
    *,
    depth: int = 2,
    width: int = 32,
    num_blocks: int = 3,
    kernel_size: int = 3,
    condition_shape: Sequence[int] | None = None,
    alpha: float = 0.05,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """Autoregressive flow of images: affine layers on gated PixelCNNs, with the order reversed from one to the next.

    A log-density takes one evaluation of each network, a sample as many as there are dimensions.

    Args:
      event_shape: `[H, W, C]`.
      depth: number of autoregressive layers.
      width: channels of the networks' hidden layers, at least C.
      num_blocks: layers of each network.
      kernel_size: odd size of the networks' filters.
      condition_shape: shape of the condition of a conditional flow: `[n]` or `[H, W, n]`.
      alpha: margin of the logit preprocessing.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed.

    Returns:
      `TransformedDistribution` of standard normal noise; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: for other shapes or sizes.

    References: van den Oord et al., "Conditional image generation with PixelCNN decoders", 2016.

    #### Example

    >>> flow = dimflows.recipes.pixelcnn_flow([4, 4, 1], depth=1, width=4)
    >>> flow.log_prob(tf.zeros([2, 4, 4, 1])).shape
    TensorShape([2])
    """
    shape = common.checked_event_shape(event_shape, "pixelcnn-flow", ranks=(3,))
    common.check_sizes("pixelcnn-flow", depth=depth, width=width, num_blocks=num_blocks, kernel_size=kernel_size)
    condition = common.condition_channels("pixelcnn-flow", condition_shape, shape)
    sizes: dict[str, Any] = {
        "width": width,
        "num_blocks": num_blocks,
        "kernel_size": kernel_size,
        "condition_channels": condition,
    }
    layers = []
    for k, layer_seed in enumerate(common.seeds(seed, depth)):
        network = networks.PixelCNN(shape[-1], 2 * shape[-1], reverse=bool(k % 2), seed=layer_seed, **sizes)
        layers.append(dfb.Autoregressive(network, dfb.transformers.Affine(dtype=common.floatx()), event_ndims=3))
    return common.as_distribution(dfb.Chain([*layers, *common.from_flat(shape)]), shape, grey_levels, common.logit(alpha))


@recipe
def wavenet_flow(
    event_shape: Sequence[int],
    *,
    depth: int = 2,
    width: int = 32,
    num_blocks: int | None = None,
    condition_shape: Sequence[int] | None = None,
    alpha: float = 0.05,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """Autoregressive flow of 1-D signals: affine layers on WaveNets, with time reversed from one to the next.

    A log-density takes one evaluation of each network, a sample as many as the signal is long.

    Args:
      event_shape: `[T]`, the length of a signal.
      depth: number of autoregressive layers.
      width: channels of the networks' hidden layers.
      num_blocks: dilated convolutions of each network; None: as many as it takes to see the whole signal.
      condition_shape: `[n]`, shape of the condition of a conditional flow.
      alpha: margin of the logit preprocessing.
      grey_levels: number of values of integer signals; None for continuous ones.
      seed: integer seed.

    Returns:
      `TransformedDistribution` of standard normal noise; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: for other shapes or sizes.

    References: van den Oord et al., "WaveNet: a generative model for raw audio", 2016.

    #### Example

    >>> flow = dimflows.recipes.wavenet_flow([16], depth=1, width=4)
    >>> flow.log_prob(tf.zeros([2, 16])).shape
    TensorShape([2])
    """
    shape = common.checked_event_shape(event_shape, "wavenet-flow", ranks=(1,))
    common.check_sizes("wavenet-flow", depth=depth, width=width, **({} if num_blocks is None else {"num_blocks": num_blocks}))
    condition = common.condition_channels("wavenet-flow", condition_shape, shape)
    sizes: dict[str, Any] = {"width": width, "num_blocks": num_blocks, "condition_channels": condition}
    layers = common.data_side(shape)
    for k, layer_seed in enumerate(common.seeds(seed, depth)):
        network = networks.WaveNet(shape[0], 2 * shape[0], reverse=bool(k % 2), seed=layer_seed, **sizes)
        layers.append(dfb.Autoregressive(network, dfb.transformers.Affine(dtype=common.floatx())))
    return common.as_distribution(dfb.Chain(layers), shape, grey_levels, common.logit(alpha))
