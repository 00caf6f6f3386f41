"""Pictures for run directories: grids of images, and maps of which dimensions stayed."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfp_dimflows.bijectors import DimensionFactorization


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "tfp-dimflows[demo]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def require_matplotlib() -> None:
    """Raises an ImportError that names the extra to install, unless matplotlib is there."""
    _pyplot()


def save_grid(path: str | pathlib.Path, rows: Any, levels: int) -> None:
    """Writes images as a PNG grid.

    Args:
      path: the file.
      rows: `[rows, columns, H, W, C]` integer images with 1 or 3 channels; other channel numbers show the first.
      levels: number of grey levels.
    """
    rows = np.asarray(rows)
    if rows.shape[-1] not in (1, 3):
        rows = rows[..., :1]
    padded = np.pad(rows, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)])
    grid = padded.transpose(0, 2, 1, 3, 4).reshape(rows.shape[0] * padded.shape[2], -1, rows.shape[-1])
    image = np.squeeze(grid / (levels - 1.0), axis=-1) if rows.shape[-1] == 1 else grid / (levels - 1.0)
    scale = max(1, 512 // image.shape[1])
    image = image.repeat(scale, axis=0).repeat(scale, axis=1)
    _pyplot().imsave(path, image, cmap="gray", vmin=0.0, vmax=1.0)


def save_factorizations(
    path: str | pathlib.Path,
    factorizations: dict[str, DimensionFactorization],
    contributions: Sequence[np.ndarray],
) -> None:
    """Writes a PNG with the mean contribution of every pixel, and how many levels it stayed in each factorization.

    Args:
      path: the file.
      factorizations: title and factorization, for images of one shape or vectors.
      contributions: one array of the event's shape per factor-out.
    """
    pyplot = _pyplot()
    maps = [(f"contribution up to level {k + 1}", _plane(c), {"cmap": "coolwarm"}) for k, c in enumerate(contributions)]
    for title, factorization in factorizations.items():
        limits = {"cmap": "viridis", "vmin": 1, "vmax": factorization.num_levels}
        maps.append((f"{title}: levels passed", _plane(factorization.levels_reached()), limits))
    figure, axes = pyplot.subplots(1, len(maps), figsize=(3.2 * len(maps), 3.2), squeeze=False, layout="constrained")
    for axis, (title, values, options) in zip(axes[0], maps):
        figure.colorbar(axis.imshow(values, **options), ax=axis, shrink=0.7)
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plane(values):
    return values.mean(axis=-1) if values.ndim == 3 else values[np.newaxis]
