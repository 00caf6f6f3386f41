"""Neural spline flows."""

import math
from collections.abc import Callable, Sequence

from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import networks
from tfp_dimflows.bijectors import masks
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.autoregressive import made_layers
from tfp_dimflows.recipes.registry import recipe


@recipe
def nsf(
    event_shape: Sequence[int],
    *,
    depth: int = 5,
    hidden: Sequence[int] | None = None,
    autoregressive: bool = False,
    mixing: str | None = "lu",
    num_bins: int = 8,
    bound: float = 5.0,
    bounds: Sequence[Sequence[float | None] | None] | None = None,
    condition_shape: Sequence[int] | None = None,
    alpha: float = 0.05,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """Neural spline flow: rational-quadratic splines with linear tails, in couplings or autoregressive.

    From data to latent each layer is a trained linear map of all dimensions, splines of one half of them given the other (the
    halves take turns), or of each given those before it (the order is reversed from one to the next), and an ActNorm. Next to
    the data is a `dfb.Standardize`, another standardises the condition: they need `FlowModel.adapt`. Images are flattened.

    A log-density takes one evaluation of each network. So does a sample of couplings; an autoregressive one takes as many as
    there are dimensions.

    Args:
      event_shape: `[D]` or `[H, W, C]`; couplings need two dimensions or more.
      depth: number of layers.
      hidden: widths of the networks' hidden layers; None: two layers of 64 units, or of as many as there are dimensions if
        that is more.
      autoregressive: whether layers are autoregressive, on MADE networks, in place of couplings on MLPs.
      mixing: the linear maps: `"lu"` (any invertible matrix, in PLU form), `"rotation"` (an orthogonal one), or None.
      num_bins: bins of each spline.
      bound: splines are on [-bound, bound], and the identity beyond.
      bounds: for each dimension of a vector None, or the interval (low, high) of its values, without an end that is None.
      condition_shape: `[n]`, shape of the condition of a conditional flow.
      alpha: margin of the logit preprocessing.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed.

    Returns:
      `TransformedDistribution` of standard normal noise; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: for other shapes, sizes, linear maps or bounds.

    References: Durkan, Bekasov, Murray, Papamakarios, "Neural spline flows", 2019.

    #### Example

    >>> flow = dimflows.recipes.nsf([3], depth=2, hidden=[8], condition_shape=[2])
    >>> flow.log_prob(tf.zeros([4, 3]), bijector_kwargs={"condition": tf.zeros([4, 2])}).shape
    TensorShape([4])
    """
    shape = common.checked_event_shape(event_shape, "nsf")
    common.check_sizes("nsf", depth=depth, num_bins=num_bins)
    dims = math.prod(shape)
    if not autoregressive and dims < 2:
        raise ValueError(f"nsf: got event shape {list(shape)}, needs two dimensions or more, or autoregressive=True")
    if not bound > 0.0:
        raise ValueError(f"nsf: got bound={bound!r}, needs a positive number")
    if bounds is not None and (len(shape) == 3 or grey_levels is not None):
        raise ValueError(f"nsf: got bounds={bounds!r}, needs continuous vectors for them")
    if mixing not in _MIXING:
        raise ValueError(f"nsf: got mixing={mixing!r}, needs lu, rotation or None")
    condition = common.condition_channels("nsf", condition_shape, (dims,))
    hidden = common.hidden_sizes("nsf", hidden, dims)
    *linear_seeds, splines_seed = common.seeds(seed, depth + 1)
    linear = [_linear_map(mixing, dims, linear_seed) for linear_seed in linear_seeds]

    def spline() -> dfb.Transformer:
        return dfb.transformers.Spline(num_bins, bound)

    if autoregressive:
        splines = made_layers(dims, depth, hidden, condition, spline, lambda layer: layer, splines_seed)
    else:
        splines = _couplings(dims, depth, hidden, condition, spline, splines_seed)
    parts = common.from_flat(shape) if len(shape) == 3 else []
    parts.append(dfb.Standardize(dims, bounds, dtype=common.floatx()))
    for maps, layer in zip(linear, splines, strict=True):
        parts += [*maps, layer, dfb.ActNorm(dims, dtype=common.floatx())]
    flow: tfb.Bijector = dfb.Chain(parts)
    if condition:
        flow = dfb.EmbedCondition(flow, dfb.Standardize(condition, dtype=common.floatx()).inverse, condition_ndims=1)
    return common.as_distribution(flow, shape, grey_levels, common.logit(alpha))


_MIXING = ("lu", "rotation", None)


def _linear_map(mixing: str | None, dims: int, seed: int) -> list[tfb.Bijector]:
    if mixing is None or dims == 1:
        return []
    if mixing == "lu":
        return [dfb.InvertibleConv1x1(dims, seed=seed, dtype=common.floatx())]
    return [dfb.Rotation(dims, "random", trainable=True, seed=seed, dtype=common.floatx())]


def _couplings(
    dims: int,
    depth: int,
    hidden: Sequence[int],
    condition_channels: int,
    transformer: Callable[[], dfb.Transformer],
    seed: int,
) -> list[tfb.Bijector]:
    layers: list[tfb.Bijector] = []
    for k, layer_seed in enumerate(common.seeds(seed, depth)):
        elementwise = transformer()
        mask = masks.Channel(flip=k % 2 == 1, event_ndims=1, num_conditioning=(dims + k % 2) // 2)
        inputs, outputs = mask.sizes(dims)
        network = networks.MLP(
            inputs,
            elementwise.params_per_dim * outputs,
            hidden=hidden,
            condition_channels=condition_channels,
            seed=layer_seed,
        )
        layers.append(dfb.Coupling(network, mask, elementwise))
    return layers
