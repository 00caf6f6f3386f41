"""PNF: progressive flows of RealNVP stages."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.realnvp import realnvp
from tfp_dimflows.recipes.registry import recipe


@recipe
def pnf(
    event_shape: Sequence[int],
    *,
    num_halvings: int = 2,
    num_levels: int = 2,
    depth: int = 3,
    width: int | Sequence[int] = 32,
    num_blocks: int | Sequence[int] = 2,
    network: str | None = None,
    factorization: str | None = "conventional",
    batch_norm: bool = False,
    l2: float = 5e-5,
    alpha: float = 0.05,
    adaptive_range: bool = True,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """Progressive flow (PNF) of RealNVP stages: a base on small images, then conditional details that double a side each.

    Every stage is the flow of `recipes.realnvp`; those of details are conditioned on their low-resolution image, normalised per
    channel (`"conv"`) or per pixel (`"dense"`), in every coupling network. Integer images with n grey levels: the base models
    logits of averages s, in [0, n), the details logits of half differences Delta as a share of the range that s leaves them,
    `Delta / (2 min(s, n - s)) + 1/2` in [0, 1], so that samples stay in the range of pixels (up to the margin `alpha`). With
    `adaptive_range=False` it is the share of the whole range, `Delta / n + 1/2`.

    Reference sizes: MNIST as 32x32 and CIFAR-10 `num_halvings=2, width=64, num_blocks=8`; MNIST as 32x32, dense:
    `network="dense", num_levels=1, depth=5, num_blocks=2`; CelebA as 64x64 `num_halvings=2, num_levels=5, width=32,
    num_blocks=2`.

    Args:
      event_shape: `[H, W, C]` or `[D]`; the sides must be divisible by `2**num_halvings`.
      num_halvings: how often each side is halved: an image has `2 * num_halvings` details, a signal `num_halvings`.
      num_levels: number of levels of a stage; fewer where its shorter side does not allow as many.
      depth: as in `realnvp`.
      width: as in `realnvp`; a list gives one for each stage, the base first.
      num_blocks: as in `realnvp`; a list gives one for each stage, the base first.
      network: `"conv"` (ResNets) or `"dense"` (MLPs); None: `"conv"` for images, `"dense"` for vectors.
      factorization: which half stays between the levels of a stage: `"conventional"`, `"channels"`, `"principal"`,
        `"checkerboard"`, `"random"`, or None, as in `realnvp`. (In `recipes.principal_pnf` the stages themselves are
        principal components.)
      batch_norm: batch normalisation in the ResNets.
      l2: L2 penalty on the ResNets' weight-norm magnitudes.
      alpha: margin of the logit preprocessing.
      adaptive_range: whether the range of half differences depends on their averages.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed of networks and masks.

    Returns:
      `TransformedDistribution` of standard normal noise with a `dfb.PNF`; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: if the sides cannot be halved as often, or the lists have not one entry for each stage.

    References: "PNF: Progressive normalizing flows".

    #### Example

    >>> flow = dimflows.recipes.pnf([8, 8, 1], width=4, num_blocks=1)
    >>> flow.sample(2, seed=0).shape, flow.bijector.stage_shapes
    (TensorShape([2, 8, 8, 1]), [(2, 2, 1), (2, 4, 1), (4, 4, 1), (4, 8, 1), (8, 8, 1)])
    """
    shape = common.checked_event_shape(event_shape, "pnf")
    common.check_sizes("pnf", num_halvings=num_halvings, num_levels=num_levels)
    common.check_halvings("pnf", shape, num_halvings, num_halvings=num_halvings)
    num_details = num_halvings * (2 if len(shape) == 3 else 1)
    shapes = dfb.PNF.halved_shapes(shape, num_details)
    shapes = [shapes[0], *shapes[:-1]]
    widths, depths = (_one_each(name, value, len(shapes)) for name, value in [("width", width), ("num_blocks", num_blocks)])
    is_dense = common.is_dense("pnf", network, shape)
    if is_dense and math.prod(shapes[0]) < 2:
        raise ValueError(
            f"pnf: got num_halvings={num_halvings}, which leaves one dimension of {list(shape)}, needs two or more"
        )
    seeds = np.random.SeedSequence(seed).generate_state(len(shapes)).tolist()

    def stage(k: int, condition_shape: Sequence[int] | None = None) -> tfb.Bijector:
        return realnvp(
            shapes[k],
            num_levels=_possible_levels(num_levels, shapes[k], is_dense),
            depth=depth,
            width=widths[k],
            num_blocks=depths[k],
            network=network,
            factorization=factorization,
            condition_shape=condition_shape,
            batch_norm=batch_norm,
            l2=l2,
            seed=seeds[k],
        ).bijector

    def detail(k: int) -> tfb.Bijector:
        # No logit of the low-resolution image: its range is that of pixels in the data, but not in all samples.
        low_shape = (math.prod(shapes[k]),) if is_dense else shapes[k]
        embedding = dfb.Chain([*_flattening(shapes[k], is_dense), dfb.ActNorm(low_shape[-1], dtype=common.floatx())])
        return dfb.EmbedCondition(stage(k, low_shape), embedding.inverse, condition_ndims=len(shape))

    pixels = [] if grey_levels is None else [dfb.LogitPreprocess(grey_levels, alpha)]
    centre = [] if grey_levels is None else [tfb.Shift(tf.constant(-grey_levels / 2.0, common.floatx()))]
    if grey_levels is not None and adaptive_range:
        centre = [_share_of_range(grey_levels, len(shape)), *centre]
    base = dfb.Chain([*pixels, stage(0)])
    details = [dfb.Chain([*centre, *pixels, detail(k)]) for k in range(1, len(shapes))]
    return common.as_distribution(dfb.PNF(base, details, shape), shape, grey_levels)


def _one_each(name: str, value: int | Sequence[int], num_stages: int) -> list[int]:
    values = [value] * num_stages if isinstance(value, int) else list(value)
    if len(values) != num_stages:
        raise ValueError(f"pnf: got {len(values)} values of {name}, needs one, or one for each of the {num_stages} stages")
    return values


def _possible_levels(num_levels: int, shape: tuple[int, ...], is_dense: bool) -> int:
    """As many levels as leave at least two entries per side (of images), or two dimensions (of vectors)."""
    if is_dense:
        return min(num_levels, max(1, math.prod(shape).bit_length() - 1))
    levels = 1
    while levels < num_levels and all(side % 2**levels == 0 and side >= 2 ** (levels + 1) for side in shape[:-1]):
        levels += 1
    return levels


def _share_of_range(grey_levels: int, event_ndims: int) -> dfb.ConditionalTransform:
    """Divides half differences by the share of the whole range that their average leaves them, 2 min(s, n - s) / n."""

    def share(average: tf.Tensor) -> tf.Tensor:
        return tf.maximum(2.0 / grey_levels * tf.minimum(average, grey_levels - average), 1e-6)

    scale = dfb.Transformer(lambda params: tfb.Scale(params[..., 0]), params_per_dim=1)
    return dfb.ConditionalTransform(share, scale, event_ndims)


def _flattening(shape: tuple[int, ...], is_dense: bool) -> list[tfb.Bijector]:
    return common.from_flat(shape) if is_dense else []
