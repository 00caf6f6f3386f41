"""Pictures: grids of images, which dimensions stay in a flow and why, densities, walks in latent space, codes, learning curves.

matplotlib draws them; it is imported with the first picture. A function draws on the axes that it is given (`ax=`), else on
those of a new pyplot figure, and returns them: `ax.figure` is the figure, to show or to save.
"""

import csv
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike
from tensorflow_probability import distributions as tfd

from tfp_dimflows.bijectors import DimensionFactorization
from tfp_dimflows.codes import Comparison, compare_with_pca
from tfp_dimflows.renamed import renamed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

__all__ = ["codes", "contributions", "density", "image_grid", "interpolation", "kept_dimensions", "learning_curves"]

_PANEL = 3.2  # inches


@renamed(levels="grey_levels")
def image_grid(
    images: ArrayLike, grey_levels: int | None = None, *, limits: Sequence[float] | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Images in rows and columns, with a black frame of one pixel around each.

        brightness = (value - low) / (high - low), between 0 (black) and 1,   (low, high) = limits

    Args:
      images: `[N, H, W, C]`, laid out with about as many rows as columns and filled up with black, or
        `[rows, columns, H, W, C]`. Of other channel numbers than 1 and 3 the first channel is shown.
      grey_levels: number of grey levels of integer images.
      limits: the values of black and white; None: 0 and `grey_levels - 1`, without these the lowest and the highest finite
        value.
      ax: matplotlib axes; None: those of a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: for another shape, or limits that are not increasing.
      ImportError: without matplotlib.

    #### Example

    >>> ax = dimflows.plot.image_grid(np.arange(5 * 8 * 8).reshape([5, 8, 8, 1]) % 17, grey_levels=17)
    >>> ax.images[0].get_array().shape  # 2 rows and 3 columns
    (20, 30)
    """
    pixels = grid_pixels(images, grey_levels, limits, "plot.image_grid")
    (ax,) = _axes("image_grid", ax, 1, [6.0, 6.0 * pixels.shape[0] / pixels.shape[1]])
    _show(ax, pixels)
    ax.set_axis_off()
    return ax


@renamed(levels="grey_levels")
def interpolation(
    walks: ArrayLike, grey_levels: int | None = None, *, limits: Sequence[float] | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Walks between pairs of images, one in each row, as `FlowModel.interpolate` returns them.

    Args:
      walks: `[num_steps, H, W, C]`, or `[num_steps, pairs, H, W, C]`. The axis below tells the place of a step on the way,
        from 0 to 1.
      grey_levels: as in `image_grid`.
      limits: as in `image_grid`.
      ax: matplotlib axes; None: those of a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: as `image_grid`.
      ImportError: without matplotlib.

    #### Example

    >>> model = dimflows.FlowModel(dimflows.recipes.glow([4, 4, 1], num_levels=1, depth=1, width=4))
    >>> start, end = tf.random.stateless_normal([2, 3, 4, 4, 1], seed=[0, 0])
    >>> ax = dimflows.plot.interpolation(model.interpolate(start, end, num_steps=5))
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['0', '0.25', '0.5', '0.75', '1']
    """
    walks = np.asarray(walks)
    if walks.ndim not in (4, 5) or walks.size == 0:
        needs = "[num_steps, H, W, C] or [num_steps, pairs, H, W, C]"
        raise ValueError(f"plot.interpolation: got walks of shape {list(walks.shape)}, needs {needs}")
    rows = walks[np.newaxis] if walks.ndim == 4 else walks.swapaxes(0, 1)
    pixels = grid_pixels(rows, grey_levels, limits, "plot.interpolation")
    num_steps, width = len(walks), pixels.shape[1]
    (ax,) = _axes("interpolation", ax, 1, [8.0, 0.6 + 8.0 * pixels.shape[0] / width])
    _show(ax, pixels)
    labels = [f"{place:.2g}" for place in np.linspace(0.0, 1.0, num_steps)]
    ax.set_xticks((np.arange(num_steps) + 0.5) * width / num_steps - 0.5, labels)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return ax


def kept_dimensions(
    factorizations: DimensionFactorization | Mapping[str, DimensionFactorization],
    *,
    ax: "Axes | Sequence[Axes] | np.ndarray | None" = None,
) -> Any:
    """Maps of how many levels of a multi-scale flow each dimension passes: of an image the mean over the channels of a pixel.

    Args:
      factorizations: a `dfb.DimensionFactorization`, or several by title, drawn side by side.
      ax: matplotlib axes, as many as factorizations; None: those of a new figure.

    Returns:
      The axes of the one factorization, or an array of axes.

    Raises:
      ValueError: for anything else, or another number of axes.
      ImportError: without matplotlib.

    #### Example

    >>> shape = [8, 8, 1]
    >>> axes = dimflows.plot.kept_dimensions({
    ...     "RealNVP": dfb.DimensionFactorization.checkerboard(shape, num_levels=3),
    ...     "random": dfb.DimensionFactorization.random(shape, num_levels=3, seed=0),
    ... })
    >>> [ax.get_title() for ax in axes]
    ['RealNVP: levels passed', 'random: levels passed']
    """
    by_title = factorizations if isinstance(factorizations, Mapping) else {"": factorizations}
    wrong = [value for value in by_title.values() if not isinstance(value, DimensionFactorization)]
    if wrong or not by_title:
        got = repr(wrong[0]) if wrong else "none"
        raise ValueError(f"plot.kept_dimensions: got {got}, needs dfb.DimensionFactorizations")
    axes = _axes("kept_dimensions", ax, len(by_title), [_PANEL * len(by_title), _PANEL])
    for panel, (title, factorization) in zip(axes, by_title.items()):
        levels = factorization.num_levels
        image = _map(panel, factorization.levels_reached(), cmap="viridis", vmin=1, vmax=levels)
        panel.figure.colorbar(image, ax=panel, shrink=0.7, ticks=range(1, levels + 1))
        panel.set_title(f"{title}: levels passed" if title else "levels passed", fontsize=9)
    return axes if isinstance(factorizations, Mapping) else axes[0]


def contributions(contributions: Sequence[ArrayLike], *, ax: "Sequence[Axes] | np.ndarray | None" = None) -> np.ndarray:
    """Heat maps of likelihood contributions, one for each factor-out: of an image the mean over the channels of a pixel.

    The colours are centred at the median: red is the half that LCMA keeps where it may choose freely.

    Args:
      contributions: one array of the event's shape per factor-out, as `dimflows.likelihood_contributions` returns them.
      ax: matplotlib axes, as many as arrays; None: those of a new figure.

    Returns:
      An array of axes.

    Raises:
      ValueError: for no array, other shapes, values that are not finite, or another number of axes.
      ImportError: without matplotlib.

    #### Example

    >>> flow = dfb.Multiscale([dfb.ElementwiseAffine(0.0, [1.0, 2.0]), tfb.Identity()])
    >>> axes = dimflows.plot.contributions(dimflows.likelihood_contributions(flow, [tf.zeros([5, 2])]))
    >>> axes[0].get_title(), axes[0].images[0].get_array().tolist()
    ('contribution up to level 1', [[1.0, 2.0]])
    """
    from_each = [np.asarray(c, dtype=np.float64) for c in contributions]
    if not from_each:
        raise ValueError("plot.contributions: got no contributions, needs one array per factor-out")
    for k, values in enumerate(from_each):
        if values.ndim not in (1, 3) or values.size == 0 or values.shape != from_each[0].shape:
            needs = "images [H, W, C] or vectors [D] of one shape"
            raise ValueError(f"plot.contributions: got contribution {k} of shape {list(values.shape)}, needs {needs}")
        if not np.isfinite(values).all():
            raise ValueError(f"plot.contributions: got values that are not finite in contribution {k}, needs finite ones")
    axes = _axes("contributions", ax, len(from_each), [_PANEL * len(from_each), _PANEL])
    from matplotlib.colors import CenteredNorm

    for k, (panel, values) in enumerate(zip(axes, from_each)):
        middle = np.median(_plane(values))
        norm = CenteredNorm(middle, np.abs(_plane(values) - middle).max() or 1.0)
        image = _map(panel, values, cmap="coolwarm", norm=norm)
        panel.figure.colorbar(image, ax=panel, shrink=0.7)
        panel.set_title(f"contribution up to level {k + 1}", fontsize=9)
    return axes


def density(
    distribution: tfd.Distribution | keras.Model,
    bounds: ArrayLike,
    *,
    resolution: int = 100,
    ax: "Axes | None" = None,
    **kwargs: Any,
) -> "Axes":
    """Heat map of a density of the plane.

    Args:
      distribution: a `tfd.Distribution` or a `FlowModel` with events of shape `[2]`; the first dimension goes to the right, the
        second upwards.
      bounds: `(low, high)` of both dimensions, or one such pair for each.
      resolution: number of points along each side.
      ax: matplotlib axes; None: those of a new figure.
      **kwargs: further arguments of `log_prob`, such as `num_samples` and `seed` of a bound.

    Returns:
      The axes.

    Raises:
      ValueError: for other events, or bounds that are not increasing.
      ImportError: without matplotlib.

    #### Example

    >>> ax = dimflows.plot.density(tfd.Sample(tfd.Normal(0.0, 1.0), [2]), bounds=[-3.0, 3.0], resolution=3)
    >>> [round(float(value), 3) for value in ax.images[0].get_array()[1]]
    [0.022, 0.159, 0.022]
    """
    itself = distribution.distribution if isinstance(distribution, keras.Model) else distribution
    dtype, shape = getattr(itself, "dtype", None), getattr(itself, "event_shape", None)
    if not (isinstance(shape, tf.TensorShape) and shape == [2] and tf.as_dtype(dtype).is_floating):
        raise ValueError(f"plot.density: got {distribution!r}, needs a continuous distribution with events of shape [2]")
    if itself.batch_shape.rank != 0:
        raise ValueError(f"plot.density: got {distribution!r}, needs a single distribution without a batch shape")
    sides = _bounds(bounds)
    if resolution < 2:
        raise ValueError(f"plot.density: got resolution={resolution}, needs at least 2")
    steps = (np.arange(resolution) + 0.5) / resolution  # the middle of each cell
    right, up = (low + (high - low) * steps for low, high in sides)
    points = np.stack(np.meshgrid(right, up), axis=-1).reshape(-1, 2)
    log_prob = np.asarray(distribution.log_prob(tf.constant(points, dtype), **kwargs))
    (ax,) = _axes("density", ax, 1, [_PANEL, _PANEL])
    values = np.exp(log_prob).reshape(resolution, resolution)
    ax.imshow(values, cmap="viridis", vmin=0.0, origin="lower", extent=tuple(sides.ravel()), aspect="equal")
    return ax


def codes(
    model: keras.Model,
    images: ArrayLike,
    training_images: ArrayLike,
    *,
    num_images: int = 8,
    ax: "Sequence[Axes] | np.ndarray | None" = None,
) -> np.ndarray:
    """What codes of growing size tell of images: PSNR beside principal components, and reconstructions.

    The reconstruction from the first k latent values is `model.decode(model.encode(images, dims=k))`; that from as many
    principal components of the training images is rounded to grey levels too. Where all are exact, the PSNR is infinite, and
    not drawn.

    Args:
      model: a `FlowModel` of integer images with a `dfb.Multiscale` or a `dfb.PNF` next to the latent values, or with a
        `dfd.VAEPrior`.
      images: test images, `[N, H, W, C]`.
      training_images: the images whose principal components are taken.
      num_images: how many images to show: the originals in the first row, below them one row for each size of codes.
      ax: two matplotlib axes, for the curves and for the images; None: those of a new figure.

    Returns:
      An array of both axes.

    Raises:
      ValueError: for another model, images that do not fit it, or another number of axes.
      ImportError: without matplotlib.

    #### Example

    >>> model = dimflows.FlowModel(dimflows.recipes.glow([4, 4, 1], num_levels=2, depth=1, width=4, grey_levels=4))
    >>> images = np.random.default_rng(0).integers(0, 4, [20, 4, 4, 1])
    >>> curves, grid = dimflows.plot.codes(model, images[:10], images[10:])
    >>> [label.get_text() for label in grid.get_yticklabels()]
    ['original', '8', '16']
    """
    axes = _axes("codes", ax, 2, [2 * _PANEL, _PANEL])
    _draw_codes(axes, compare_with_pca(model, images, training_images, num_images))
    return axes


def _draw_codes(axes: np.ndarray, comparison: Comparison) -> None:
    curves, grid = axes
    for name, psnr in (("model", comparison.psnr), ("PCA", comparison.pca_psnr)):
        curves.plot(comparison.sizes, np.where(np.isfinite(psnr), psnr, np.nan), marker="o", markersize=3, label=name)
    curves.set_xscale("log", base=2)
    curves.set_xticks(comparison.sizes, [str(size) for size in comparison.sizes])
    curves.set(xlabel="numbers of the code", ylabel="PSNR (dB)")
    curves.legend()
    pixels = grid_pixels(comparison.images, comparison.grey_levels, name="plot.codes")
    _show(grid, pixels)
    rows = len(comparison.images)
    grid.set_yticks((np.arange(rows) + 0.5) * len(pixels) / rows - 0.5, ["original", *map(str, comparison.sizes)])
    grid.set_xticks([])
    grid.spines[:].set_visible(False)


def learning_curves(run: str | os.PathLike, metric: str | None = None, *, ax: "Axes | None" = None) -> "Axes":
    """A metric after each epoch of a run and of the runs inside it: in training, and dashed in validation.

    Args:
      run: a run directory, with a `history.csv` in it or below, as Keras's `CSVLogger` writes them.
      metric: a column of these files; None: the first of `bits_per_dim`, `nll` and `loss` that there is. Runs without it are
        left out.
      ax: matplotlib axes; None: those of a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: if there is no such file, no epoch in it, or no such column.
      ImportError: without matplotlib.

    #### Example

    >>> model = dimflows.FlowModel(dimflows.recipes.glow([2], num_levels=1, depth=1, width=4))
    >>> model.compile()
    >>> history = model.fit(tf.zeros([8, 2]), epochs=2, verbose=0, callbacks=[keras.callbacks.CSVLogger("history.csv")])
    >>> ax = dimflows.plot.learning_curves(".")
    >>> ax.get_ylabel(), ax.lines[0].get_xdata().tolist()
    ('nll', [1.0, 2.0])
    """
    directory = pathlib.Path(run)
    histories = {path.parent.relative_to(directory).as_posix(): _columns(path) for path in directory.rglob("history.csv")}
    histories = {name: columns for name, columns in histories.items() if columns}
    if not histories:
        raise ValueError(f"plot.learning_curves: {directory} holds no history.csv with an epoch in it")
    known = sorted({name for columns in histories.values() for name in columns} - {"epoch"})
    if metric is None:
        metric = next((name for name in ("bits_per_dim", "nll", "loss") if name in known), None)
    if metric not in known:
        raise ValueError(f"plot.learning_curves: got metric={metric!r}, {directory} has {', '.join(known)}")
    (ax,) = _axes("learning_curves", ax, 1, [6.0, 4.0])
    from matplotlib.ticker import MaxNLocator

    for title, columns in sorted(histories.items()):
        if metric in columns:
            title = directory.resolve().name if title == "." else title
            epochs = columns["epoch"] + 1.0
            (line,) = ax.plot(epochs, columns[metric], label=title)
            if f"val_{metric}" in columns:
                label = f"{title}, validation"
                ax.plot(epochs, columns[f"val_{metric}"], color=line.get_color(), linestyle="--", label=label)
    ax.set(xlabel="epoch", ylabel=metric)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


# What run directories and callbacks write.


def require_matplotlib() -> None:
    """Raises an ImportError that names the extra to install, unless matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "tfp-dimflows[demo]"') from error


def grid_pixels(
    images: ArrayLike, grey_levels: int | None = None, limits: Sequence[float] | None = None, name: str = "plot.grid_pixels"
) -> np.ndarray:
    """The picture of `image_grid` as bytes `[height, width, 1 or 3]`, a pixel for each of the images'."""
    images = np.asarray(images)
    if images.ndim not in (4, 5) or images.size == 0:
        needs = "[N, H, W, C] or [rows, columns, H, W, C]"
        raise ValueError(f"{name}: got images of shape {list(images.shape)}, needs {needs}")
    if images.shape[-1] not in (1, 3):
        images = images[..., :1]
    images = images.astype(np.float64)
    low, high = _limits(images, grey_levels, limits, name)
    # A barely trained flow can overflow on its way to the data.
    brightness = np.nan_to_num((images - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
    pixels = np.round(255.0 * np.clip(brightness, 0.0, 1.0)).astype(np.uint8)
    if pixels.ndim == 4:
        columns = math.ceil(math.sqrt(len(pixels)))
        blanks = np.zeros([-len(pixels) % columns, *pixels.shape[1:]], np.uint8)
        pixels = np.concatenate([pixels, blanks]).reshape(-1, columns, *pixels.shape[1:])
    padded = np.pad(pixels, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)])
    rows, columns, height, width, channels = padded.shape
    return padded.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def save_grid(path: str | os.PathLike, images: ArrayLike, grey_levels: int | None = None) -> None:
    """Writes the picture of `image_grid` as a PNG; arguments as there."""
    save_pixels(path, enlarged(grid_pixels(images, grey_levels, name="plot.save_grid")))


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Small pictures with every pixel repeated, so that they are about 512 pixels wide."""
    scale = max(1, 512 // pixels.shape[1])
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def save_factorizations(
    path: str | os.PathLike,
    factorizations: Mapping[str, DimensionFactorization],
    statistics: Sequence[np.ndarray],
) -> None:
    """Writes a PNG with the maps of `contributions(statistics)` and of `kept_dimensions(factorizations)` side by side."""

    def draw(axes: np.ndarray) -> None:
        contributions(statistics, ax=axes[: len(statistics)])
        kept_dimensions(factorizations, ax=axes[len(statistics) :])

    save_pixels(path, figure_pixels(len(statistics) + len(factorizations), draw))


def save_codes(path: str | os.PathLike, comparison: Comparison) -> None:
    """Writes the picture of `codes` as a PNG, of what `tfp_dimflows.codes.compare_with_pca` has found."""
    save_pixels(path, figure_pixels(2, lambda axes: _draw_codes(axes, comparison)))


def figure_pixels(num_axes: int, draw: Callable[[np.ndarray], Any]) -> np.ndarray:
    """The bytes `[height, width, 4]` of a figure of axes side by side, on which `draw(axes)` has drawn."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL * num_axes, _PANEL), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw(figure.subplots(1, num_axes, squeeze=False)[0])
    canvas.draw()
    return np.array(canvas.buffer_rgba())


def save_pixels(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Writes bytes `[height, width, channels]` as a picture, whole or not at all."""
    require_matplotlib()
    from matplotlib.image import imsave

    path = pathlib.Path(path)
    unfinished = path.with_name(f"unfinished.{path.name}")
    imsave(unfinished, np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels)
    os.replace(unfinished, path)


# Helpers.


def _axes(name: str, ax: Any, num: int, size: Sequence[float]) -> np.ndarray:
    """An array of the axes that are given, or of those of a new figure."""
    require_matplotlib()
    if ax is None:
        from matplotlib import pyplot

        return pyplot.subplots(1, num, figsize=size, squeeze=False, layout="constrained")[1][0]
    axes = np.ravel(np.asarray(ax, dtype=object))
    if len(axes) != num or not all(hasattr(panel, "imshow") for panel in axes):
        raise ValueError(f"plot.{name}: got ax={ax!r}, needs {num} matplotlib axes")
    return axes


def _show(ax: "Axes", pixels: np.ndarray) -> None:
    ax.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def _map(ax: "Axes", values: np.ndarray, **options: Any) -> "AxesImage":
    ax.set_axis_off()
    return ax.imshow(_plane(values), aspect="equal" if values.ndim == 3 else "auto", interpolation="nearest", **options)


def _plane(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=-1) if values.ndim == 3 else values[np.newaxis]


def _limits(values: np.ndarray, grey_levels: int | None, limits: Sequence[float] | None, name: str) -> tuple[float, float]:
    if grey_levels is not None and grey_levels < 2:
        raise ValueError(f"{name}: got grey_levels={grey_levels}, needs at least 2")
    if limits is not None:
        ends = np.asarray(limits, dtype=np.float64)
        if ends.shape != (2,) or not ends[0] < ends[1]:
            raise ValueError(f"{name}: got limits={ends.tolist()}, needs the values of black and white, increasing")
        return ends[0], ends[1]
    if grey_levels is not None:
        return 0.0, grey_levels - 1.0
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    return low, high if low < high else low + 1.0


def _bounds(bounds: ArrayLike) -> np.ndarray:
    sides = np.asarray(bounds, dtype=np.float64)
    if sides.shape not in ((2,), (2, 2)) or not (np.isfinite(sides).all() and (sides[..., 0] < sides[..., 1]).all()):
        raise ValueError(f"plot.density: got bounds={sides.tolist()}, needs (low, high), or such a pair for each dimension")
    return np.broadcast_to(sides, [2, 2])


def _columns(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The columns of a CSV file by name; what is no number, or missing in the row of a run that was killed, is NaN."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if _number(row.get("epoch")) is not None]
    names = [name for name in (rows[0] if rows else ()) if name is not None]
    return {name: np.array([_number(row[name]) for row in rows], dtype=np.float64) for name in names}


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
