"""What the recipes share: the base distribution, the factorization argument, integer images."""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import distributions as dfd

# A recipe's argument `factorization=`, but for None: a name, a factorization, or its configuration.
Factorization = str | dict | dfb.DimensionFactorization | dfb.OnlineFactorization


def floatx() -> tf.DType:
    """Keras's default float type, which all variables of a recipe have."""
    return tf.as_dtype(keras.config.floatx())


def seeds(seed: int, num: int) -> list[int]:
    """Seeds of a recipe's parts, derived from its own."""
    return [int(s) % 2**31 for s in np.random.SeedSequence(seed).generate_state(num)]


def checked_event_shape(
    event_shape: Sequence[int], recipe: str, ranks: Sequence[int] = (1, 3), argument: str = "event shape "
) -> tuple[int, ...]:
    """The event shape, a list of integers or a `tf.TensorShape`, as a tuple of ints.

    Args:
      event_shape: what the recipe was given.
      recipe: the recipe's name.
      ranks: the ranks that it knows: 1, vectors `[D]`; 3, images `[H, W, C]`. If there are none: any.
      argument: what messages write before the shape.

    Raises:
      ValueError: for anything else.
    """
    try:
        shape = tuple(operator.index(size) for size in event_shape)
    except (TypeError, ValueError):  # no list, or sizes that are no integers or unknown
        shape = ()
    if not shape or min(shape) < 1 or (ranks and len(shape) not in ranks):
        kinds = {1: "a vector [D]", 3: "an image [H, W, C]"}
        got = list(event_shape) if isinstance(event_shape, (tuple, list)) else event_shape
        needs = " or ".join(kinds[rank] for rank in ranks) or "a list of positive integers"
        raise ValueError(f"{recipe}: got {argument}{got!r}, needs {needs}")
    return shape


def check_sizes(recipe: str, least: int = 1, **sizes: int) -> None:
    """Raises a ValueError unless every size is an integer that is positive, or at least 0 with `least=0`."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < least:
            raise ValueError(f"{recipe}: got {name}={size!r}, needs a {'positive' if least else 'nonnegative'} integer")


def hidden_sizes(recipe: str, hidden: Sequence[int] | None, dims: int) -> Sequence[int]:
    """The widths of hidden layers, of which None stands for two of 64 units, or of `dims` if that is more.

    Raises:
      ValueError: for widths that are no positive integers.
    """
    hidden = [max(64, dims)] * 2 if hidden is None else hidden
    check_sizes(recipe, **{f"hidden[{k}]": size for k, size in enumerate(hidden)})
    return hidden


def resolve_config(recipe: str, configs: dict, config: str, given: dict) -> dict:
    """The values of a named configuration, but those of the recipe's arguments `given` that are not None.

    Raises:
      ValueError: for an unknown name.
    """
    if config not in configs:
        raise ValueError(f"{recipe}: got config={config!r}, needs one of {', '.join(configs)}")
    return {name: value if given[name] is None else given[name] for name, value in configs[config].items()}


def is_dense(recipe: str, network: str | None, event_shape: tuple[int, ...]) -> bool:
    """Whether a recipe's `network=` means dense networks: `"conv"`, `"dense"`, or None, convolutions for images.

    Raises:
      ValueError: for another value, or convolutions on vectors.
    """
    is_image = len(event_shape) == 3
    if network not in (None, "conv", "dense") or (network == "conv" and not is_image):
        needs = "conv, dense or None" if is_image else "dense or None for vectors"
        raise ValueError(f"{recipe}: got network={network!r}, needs {needs}")
    return network == "dense" or not is_image


def condition_channels(
    recipe: str, condition_shape: Sequence[int] | None, event_shape: tuple[int, ...], num_squeezes: int = 0
) -> int:
    """The number of channels that a condition adds to a network's input after some squeezes by 2.

    Args:
      recipe: the recipe's name.
      condition_shape: None; `[n]`, a vector that is repeated at every position of an image; or an image `[H, W, n]` of the
        height and width of the event, which is squeezed with it.
      event_shape: the event's shape.
      num_squeezes: how often the event has been squeezed.

    Raises:
      ValueError: for another shape.
    """
    if condition_shape is None:
        return 0
    ranks = (1,) if len(event_shape) == 1 else (1, 3)
    shape = checked_event_shape(condition_shape, recipe, ranks, "condition_shape=")
    if len(shape) == 3 and shape[:2] != event_shape[:-1]:
        raise ValueError(
            f"{recipe}: got condition_shape={list(shape)}, needs a vector [n] or the height and width of events "
            f"{list(event_shape)}"
        )
    return shape[-1] * (4**num_squeezes if len(shape) == 3 else 1)


def resolve_factorization(
    factorization: Factorization | None, event_shape: tuple[int, ...], num_levels: int, conventional: str, seed: int
) -> dfb.DimensionFactorization | dfb.OnlineFactorization | None:
    """The `factorization=` argument of a recipe as a factorization, or None for a model that nothing leaves.

    Args:
      factorization: `"conventional"`, `"channels"`, `"principal"` (as `"channels"`: the frame is rotated, see `rotations`),
        `"checkerboard"`, `"random"`, a `DimensionFactorization` or an `OnlineFactorization` (or its config), or None.
      event_shape: the event's shape.
      num_levels: number of levels.
      conventional: what `"conventional"` means.
      seed: integer seed of `"random"`.

    Raises:
      ValueError: for another value, or a factorization for another event or number of levels.
    """
    if num_levels == 1 or factorization is None:
        return None
    if factorization == "conventional":
        factorization = conventional
    if factorization == "principal":
        factorization = "channels"
    if factorization == "random":
        return dfb.DimensionFactorization.random(event_shape, num_levels, seed=seed)
    if isinstance(factorization, str) and factorization in ("channels", "checkerboard"):
        return getattr(dfb.DimensionFactorization, factorization)(event_shape, num_levels)
    if isinstance(factorization, dict):
        kind = dfb.OnlineFactorization if "initial" in factorization else dfb.DimensionFactorization
        factorization = kind.from_config(factorization)
    if not isinstance(factorization, (dfb.DimensionFactorization, dfb.OnlineFactorization)):
        raise ValueError(
            f"factorization: got {factorization!r}, needs conventional, channels, principal, checkerboard, random, None, a "
            "DimensionFactorization or an OnlineFactorization"
        )
    if (factorization.event_shape, factorization.num_levels) != (event_shape, num_levels):
        raise ValueError(
            f"factorization: got one for events of shape {list(factorization.event_shape)} and {factorization.num_levels} "
            f"levels, needs {list(event_shape)} and {num_levels}"
        )
    return factorization


def rotations(rotation: str | None, factorization: Factorization | None, seed: int) -> Callable[[int], list[dfb.Rotation]]:
    """A function that makes the rotation of so many squeezed channels, or dimensions of a vector: a list of it, or of none.

    Args:
      rotation: a recipe's argument `rotation=`: None, or the matrix of a `dfb.Rotation` by name.
      factorization: its argument `factorization=`; `"principal"` stands for principal components too.
      seed: integer seed of random matrices.

    Raises:
      ValueError: for another rotation than principal components with `factorization="principal"`.
    """
    if isinstance(factorization, str) and factorization == "principal":
        if rotation not in (None, "principal"):
            raise ValueError(f"rotation: got {rotation!r} with factorization='principal', needs 'principal' or None")
        rotation = "principal"
    own = itertools.count()

    def make(channels: int) -> list[dfb.Rotation]:
        if rotation is None:
            return []
        return [dfb.Rotation(channels, rotation, seed=seeds(seed, next(own) + 1)[-1], dtype=floatx())]

    return make


def check_halvings(recipe: str, event_shape: tuple[int, ...], times: int, /, **argument: int) -> None:
    """Raises a ValueError unless an image's sides, or a vector's size, can be halved as often as an argument has it."""
    if any(size % 2**times for size in event_shape[:2]):
        ((name, value),) = argument.items()
        sizes = "height and width" if len(event_shape) == 3 else "a size"
        raise ValueError(
            f"{recipe}: got event shape {list(event_shape)} and {name}={value}, needs {sizes} divisible by {2**times}"
        )


def grid_shapes(
    recipe: str,
    event_shape: tuple[int, ...],
    num_levels: int,
    nothing_leaves: bool,
    *,
    squeezes_first: bool = False,
    couplings: bool = False,
) -> list[tuple[int, ...]]:
    """The shape of the dimensions still in the flow at the input of each level.

    From one level to the next an image's sides halve, and its channels double, or quadruple if nothing leaves. A vector
    keeps the larger half of its dimensions, or all.

    Args:
      recipe: the recipe's name.
      event_shape: the event's shape.
      num_levels: number of levels.
      nothing_leaves: whether all dimensions stay.
      squeezes_first: whether levels of images begin with a squeeze, so that the sides halve once more.
      couplings: whether levels of vectors have couplings, which need two dimensions, as a factor-out does.

    Raises:
      ValueError: if the event is too small for so many levels, or its sides cannot be halved as often.
    """
    if len(event_shape) == 3:
        check_halvings(recipe, event_shape, num_levels - 1 + squeezes_first, num_levels=num_levels)
    shapes = [event_shape]
    for level in range(1, num_levels + 1):
        *space, size = shapes[-1]
        splits = couplings or (level < num_levels and not nothing_leaves)
        if not space and splits and size < 2:
            raise ValueError(
                f"{recipe}: got {event_shape[0]}-dimensional events and num_levels={num_levels}, but level {level} has one "
                "dimension, needs two or more"
            )
        if space:
            shapes.append((space[0] // 2, space[1] // 2, size * (4 if nothing_leaves else 2)))
        else:
            shapes.append((size if nothing_leaves else (size + 1) // 2,))
    return shapes[:-1]


def default_levels(event_shape: tuple[int, ...]) -> int:
    """Two levels, but for vectors of two dimensions, of which the second level would have only one."""
    return 1 if event_shape == (2,) else 2


def from_flat(event_shape: tuple[int, ...]) -> list[tfb.Bijector]:
    """The part of a chain that lays a flat vector out as an image."""
    return [tfb.Reshape(event_shape_out=event_shape, event_shape_in=[math.prod(event_shape)])]


def data_side(event_shape: tuple[int, ...]) -> list[tfb.Bijector]:
    """The part of a flow of flat vectors that is next to the data: for images their layout, for vectors an ActNorm.

    Once that is initialised, networks see columns of unit scale.
    """
    return from_flat(event_shape) if len(event_shape) == 3 else [dfb.ActNorm(event_shape[0], dtype=floatx())]


def centred(grey_levels: int) -> tfb.Bijector:
    """Preprocessing of values in [0, grey_levels): from [-1/2, 1/2) to them."""
    scale, shift = tf.constant([grey_levels, 0.5], floatx())
    return tfb.Chain([tfb.Scale(scale), tfb.Shift(shift)])


def logit(alpha: float) -> Callable[[int], tfb.Bijector]:
    """Preprocessing of values in [0, grey_levels) by the logit, with a margin."""
    return functools.partial(dfb.LogitPreprocess, alpha=alpha)


def as_distribution(
    flow: tfb.Bijector,
    event_shape: tuple[int, ...],
    grey_levels: int | None,
    preprocess: Callable[[int], tfb.Bijector] | None = None,
    base: tfd.Distribution | None = None,
) -> tfd.Distribution:
    """The flow of `base`, or of standard normal noise: over continuous events, or over integer ones of so many grey levels.

    `preprocess(grey_levels)` stands between integer events and the flow, if it is given.
    """
    if base is None:
        base = tfd.Sample(tfd.Normal(tf.zeros([], floatx()), tf.ones([], floatx())), [math.prod(event_shape)])
    if grey_levels is not None and preprocess is not None:
        flow = dfb.Chain([preprocess(grey_levels), flow])
    distribution = tfd.TransformedDistribution(base, flow)
    return distribution if grey_levels is None else dfd.Dequantized(distribution, grey_levels=grey_levels)
