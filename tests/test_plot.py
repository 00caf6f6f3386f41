"""`dimflows.plot`: what is in the pictures."""

import csv
import os
import pathlib
import re
import subprocess
import sys

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from matplotlib import pyplot

import tfp_dimflows as dimflows
from tfp_dimflows import codes, plot

dfb, dfd = dimflows.bijectors, dimflows.distributions
tfb, tfd = tfp.bijectors, tfp.distributions

CHECKERBOARD = dfb.DimensionFactorization.checkerboard([4, 4, 2], 2)


@pytest.fixture(autouse=True)
def no_figures():
    """Every test begins without pyplot figures."""
    yield
    pyplot.close("all")


def axes_of(num):
    figure = matplotlib.figure.Figure()
    return figure.subplots(1, num, squeeze=False)[0]


def shown(ax):
    """The bytes of the one picture on some axes, `[height, width]` or `[height, width, 3]`."""
    (image,) = ax.images
    return np.asarray(image.get_array())


def tiles(pixels, rows, columns):
    """`[rows, columns, H, W, ...]` of a grid, without the frames, which must be black."""
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    blocks = pixels.reshape(rows, height, columns, width, *pixels.shape[2:]).swapaxes(1, 2)
    assert blocks[:, :, [0, -1]].max() == 0 and blocks[:, :, :, [0, -1]].max() == 0
    return blocks[:, :, 1:-1, 1:-1]


# Grids of images.


def test_an_image_grid_has_the_images_in_rows_and_fills_up_with_black():
    images = np.random.default_rng(0).integers(0, 17, [5, 4, 6, 1])
    ax = plot.image_grid(images, grey_levels=17)
    grid = tiles(shown(ax), 2, 3).reshape(6, 4, 6)
    np.testing.assert_array_equal(grid[:5], np.round(images[..., 0] * 255 / 16))
    assert grid[5].max() == 0
    assert ax.figure in map(pyplot.figure, pyplot.get_fignums()) and ax.figure.axes == [ax]
    assert not ax.axison


def test_an_image_grid_in_colour_and_of_given_rows():
    images = np.random.default_rng(0).integers(0, 256, [3, 2, 4, 4, 3])
    (given,) = axes_of(1)
    ax = plot.image_grid(tf.constant(images), grey_levels=256, ax=given)
    assert ax is given and pyplot.get_fignums() == []
    np.testing.assert_array_equal(tiles(shown(ax), 3, 2), images)


def test_an_image_grid_of_two_channels_shows_the_first():
    images = np.random.default_rng(0).integers(0, 4, [1, 4, 4, 2])
    np.testing.assert_array_equal(tiles(shown(plot.image_grid(images, grey_levels=4)), 1, 1)[0, 0], images[0, ..., 0] * 85)


def test_continuous_images_go_from_black_to_white():
    images = np.array([-1.0, 0.0, 3.0, np.nan, np.inf, -np.inf]).reshape([1, 2, 3, 1])
    grid = tiles(shown(plot.image_grid(images)), 1, 1)[0, 0]
    assert grid.ravel().tolist() == [0, 64, 255, 0, 255, 0]
    grid = tiles(shown(plot.image_grid(images, limits=[0.0, 6.0])), 1, 1)[0, 0]
    assert grid.ravel().tolist() == [0, 0, 128, 0, 255, 0]
    grid = tiles(shown(plot.image_grid(images, grey_levels=9)), 1, 1)[0, 0]
    assert grid.ravel().tolist() == [0, 0, 96, 0, 255, 0]
    assert shown(plot.image_grid(np.full([1, 2, 2, 1], 7.0))).max() == 0
    assert shown(plot.image_grid(np.full([1, 2, 2, 1], np.nan))).max() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([np.zeros([4, 4])], r"got images of shape \[4, 4\], needs \[N, H, W, C\] or \[rows, columns, H, W, C\]"),
        ([np.zeros([0, 4, 4, 1])], r"got images of shape \[0, 4, 4, 1\]"),
        ([np.zeros([1, 4, 4, 1]), 1], "got grey_levels=1, needs at least 2"),
        ([np.zeros([1, 4, 4, 1]), None, [1.0, 1.0]], r"got limits=\[1.0, 1.0\], needs .* increasing"),
        ([np.zeros([1, 4, 4, 1]), None, [1.0]], "got limits"),
        ([np.zeros([1, 4, 4, 1]), None, None, axes_of(2)], "got ax=.*, needs 1 matplotlib axes"),
        ([np.zeros([1, 4, 4, 1]), None, None, "left"], "got ax='left', needs 1 matplotlib axes"),
    ],
)
def test_errors_of_image_grids(arguments, message):
    images, levels, limits, ax = [*arguments, None, None, None][:4]
    with pytest.raises(ValueError, match=f"plot.image_grid: {message}"):
        plot.image_grid(images, levels, limits=limits, ax=ax)
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_saved_grid_has_the_pixels_of_the_image_grid(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, [5, 8, 8, channels])
    plot.save_grid(tmp_path / "grid.png", images, 256)
    pixels = np.round(255 * matplotlib.image.imread(tmp_path / "grid.png"))[..., :3]
    scale = 512 // 30
    assert pixels.shape == (20 * scale, 30 * scale, 3)
    small = shown(plot.image_grid(images, 256))
    small = small if channels == 3 else np.repeat(small[..., np.newaxis], 3, axis=-1)
    np.testing.assert_array_equal(pixels, small.repeat(scale, axis=0).repeat(scale, axis=1))
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_nothing_is_saved_of_what_is_no_image(tmp_path):
    with pytest.raises(ValueError, match=r"plot.save_grid: got images of shape \[3\]"):
        plot.save_grid(tmp_path / "grid.png", np.zeros([3]), 4)
    assert list(tmp_path.iterdir()) == []


def test_interpolation_has_a_walk_in_each_row():
    walks = np.random.default_rng(0).integers(0, 16, [3, 2, 4, 4, 1])  # 3 steps, 2 pairs
    ax = plot.interpolation(walks, grey_levels=16)
    np.testing.assert_array_equal(tiles(shown(ax), 2, 3), walks.swapaxes(0, 1)[..., 0] * 17)
    assert ax.get_xticks().tolist() == [2.5, 8.5, 14.5]  # the middles of images of 6 pixels
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.5", "1"]
    np.testing.assert_array_equal(tiles(shown(plot.interpolation(walks[:, 0], 16)), 1, 3)[0], walks[:, 0, ..., 0] * 17)
    with pytest.raises(ValueError, match=r"plot.interpolation: got walks of shape \[2, 2\], needs \[num_steps, H, W, C\] or"):
        plot.interpolation(np.zeros([2, 2]))


# Which dimensions stay, and why.


def test_kept_dimensions_are_the_levels_that_a_pixel_passes():
    ax = plot.kept_dimensions(CHECKERBOARD)
    np.testing.assert_array_equal(shown(ax), np.tile([[2, 1], [1, 2]], [2, 2]))
    assert ax.get_title() == "levels passed" and ax.images[0].get_clim() == (1, 2)
    random = dfb.DimensionFactorization.random([4, 4, 2], 3, seed=0)
    axes = plot.kept_dimensions({"a": CHECKERBOARD, "b": random})
    assert [panel.get_title() for panel in axes] == ["a: levels passed", "b: levels passed"]
    np.testing.assert_array_equal(shown(axes[1]), random.levels_reached().mean(axis=-1))
    assert axes[1].images[0].get_clim() == (1, 3)
    assert len(axes[0].figure.axes) == 4  # two maps, two scales
    assert axes[0].figure.axes[3].get_yticks().tolist() == [1, 2, 3]


def test_kept_dimensions_of_vectors_and_on_given_axes():
    factorization = dfb.DimensionFactorization([4], [[1, 3]], [[0, 2]])
    given = axes_of(2)
    axes = plot.kept_dimensions({"a": factorization, "b": factorization}, ax=given)
    assert axes.tolist() == given.tolist() and pyplot.get_fignums() == []
    assert shown(axes[0]).tolist() == [[1, 2, 1, 2]]


@pytest.mark.parametrize("wrong", [None, [CHECKERBOARD], {"a": 3}, {}])
def test_errors_of_kept_dimensions(wrong):
    with pytest.raises(ValueError, match="plot.kept_dimensions: got .*, needs dfb.DimensionFactorizations"):
        plot.kept_dimensions(wrong)
    with pytest.raises(ValueError, match="plot.kept_dimensions: got ax=.*, needs 1 matplotlib axes"):
        plot.kept_dimensions(CHECKERBOARD, ax=axes_of(2))
    assert pyplot.get_fignums() == []


def test_contributions_are_centred_at_the_median():
    statistics = np.random.default_rng(0).normal(size=[2, 4, 6, 3])
    axes = plot.contributions(list(statistics))
    assert [panel.get_title() for panel in axes] == ["contribution up to level 1", "contribution up to level 2"]
    assert len(axes[0].figure.axes) == 4
    for panel, statistic in zip(axes, statistics):
        np.testing.assert_allclose(shown(panel), statistic.mean(axis=-1))
        norm = panel.images[0].norm
        assert norm(np.median(statistic.mean(axis=-1))) == pytest.approx(0.5)
        assert np.ptp(norm(shown(panel))) >= 0.5
    (vector,) = plot.contributions([[1.0, 2.0, 4.0]])
    assert shown(vector).tolist() == [[1.0, 2.0, 4.0]]
    (additive,) = plot.contributions([np.zeros([2, 2, 1])])
    assert (additive.images[0].norm(shown(additive)) == 0.5).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "got no contributions"),
        ([np.zeros([2, 2])], r"got contribution 0 of shape \[2, 2\]"),
        ([np.zeros([2]), np.zeros([3])], r"got contribution 1 of shape \[3\]"),
        ([[0.0, np.nan]], "not finite in contribution 0"),
    ],
)
def test_errors_of_contributions(wrong, message):
    with pytest.raises(ValueError, match=f"plot.contributions: .*{message}"):
        plot.contributions(wrong)
    assert pyplot.get_fignums() == []


def test_a_run_s_picture_of_factorizations_has_all_maps(tmp_path, monkeypatch):
    drawn = []
    original = plot.figure_pixels
    monkeypatch.setattr(plot, "figure_pixels", lambda num, draw: original(num, lambda axes: (draw(axes), drawn.extend(axes))))
    plot.save_factorizations(tmp_path / "maps.png", {"a": CHECKERBOARD, "b": CHECKERBOARD}, [np.ones([4, 4, 2])])
    titles = ["contribution up to level 1", "a: levels passed", "b: levels passed"]
    assert [panel.get_title() for panel in drawn] == titles
    pixels = matplotlib.image.imread(tmp_path / "maps.png")
    assert pixels.shape == (384, 3 * 384, 4)
    colours = {tuple(colour) for colour in np.uint8(np.round(255 * pixels[:, 384:768])).reshape(-1, 4).tolist()}
    assert {tuple(end) for end in matplotlib.colormaps["viridis"]([0.0, 1.0], bytes=True).tolist()} <= colours
    assert pyplot.get_fignums() == []


# Densities.


def test_a_density_has_its_dimensions_in_place():
    normal = tfd.MultivariateNormalDiag([1.0, -1.0], [0.5, 1.0])
    ax = plot.density(normal, [(-1.0, 3.0), (-2.0, 2.0)], resolution=8)
    right, up = -0.75 + 0.5 * np.arange(8), -1.75 + 0.5 * np.arange(8)
    expected = [[normal.prob([a, b]).numpy() for a in right] for b in up]
    np.testing.assert_allclose(shown(ax), expected, rtol=1e-5)
    image = ax.images[0]
    assert image.origin == "lower" and image.get_extent() == [-1.0, 3.0, -2.0, 2.0] and image.get_clim()[0] == 0.0


def test_the_density_of_a_model_and_of_a_bound():
    flow = dimflows.recipes.glow([2], num_levels=1, depth=1, width=4)
    model = dimflows.FlowModel(flow)
    (given,) = axes_of(1)
    ax = plot.density(model, [-2.0, 2.0], resolution=3, ax=given)
    assert ax is given
    points = np.float32([[[a, b] for a in (-4 / 3, 0, 4 / 3)] for b in (-4 / 3, 0, 4 / 3)])
    np.testing.assert_allclose(shown(ax), np.exp(flow.log_prob(points)), rtol=1e-4)
    bound = dimflows.recipes.vflow_glow([2], num_extra=1, depth=1, width=4)
    arguments = {"num_samples": 7, "seed": [0, 3]}
    values = shown(plot.density(bound, [-2.0, 2.0], resolution=3, **arguments))
    np.testing.assert_allclose(values.ravel(), np.exp(bound.log_prob(points.reshape(9, 2), **arguments)), rtol=1e-4)
    double = tfd.Sample(tfd.Normal(tf.constant(0.0, tf.float64), 1.0), [2])
    assert shown(plot.density(double, [-1.0, 1.0], resolution=2)).dtype == np.float64


@pytest.mark.parametrize(
    ("distribution", "bounds", "message"),
    [
        (tfd.Sample(tfd.Normal(0.0, 1.0), [3]), [-1, 1], "needs a continuous distribution with events of shape"),
        (tfd.Sample(tfd.Poisson(1.0), [2], validate_args=True), [1, -1], r"got bounds=\[1.0, -1.0\]"),
        (tfd.Sample(tfd.Bernoulli(0.5), [2]), [-1, 1], "needs a continuous distribution"),
        (tfd.JointDistributionSequential([tfd.Normal(0.0, 1.0)] * 2), [-1, 1], "needs a continuous distribution"),
        (3, [-1, 1], "got 3, needs a continuous distribution"),
        (tfd.MultivariateNormalDiag(tf.zeros([4, 2])), [-1, 1], "needs a single distribution without a batch shape"),
        (tfd.Sample(tfd.Normal(0.0, 1.0), [2]), [-1, 1, 2], "got bounds=.*needs"),
        (tfd.Sample(tfd.Normal(0.0, 1.0), [2]), [-1, np.inf], "got bounds=.*needs"),
    ],
)
def test_errors_of_densities(distribution, bounds, message):
    with pytest.raises(ValueError, match=f"plot.density: .*{message}"):
        plot.density(distribution, bounds)
    with pytest.raises(ValueError, match="plot.density: got resolution=1, needs at least 2"):
        plot.density(tfd.Sample(tfd.Normal(0.0, 1.0), [2]), [-1, 1], resolution=1)
    assert pyplot.get_fignums() == []


# Codes.


def coded():
    """A model of integer images of two levels that is fast to make, and test and training images."""
    levels = [dfb.ActNorm(2), dfb.ActNorm(4)]
    flow = dfb.Chain([tfb.Scale(4.0), dfb.Multiscale(levels, CHECKERBOARD)])
    distribution = tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [32]), flow)
    images = np.random.default_rng(0).integers(0, 4, [2, 7, 4, 4, 2])
    return dimflows.FlowModel(dfd.Dequantized(distribution, grey_levels=4)), *images


def test_codes_are_curves_beside_principal_components_and_rows_of_images():
    model, images, training_images = coded()
    given = axes_of(2)
    axes = plot.codes(model, images, training_images, num_images=3, ax=given)
    assert axes.tolist() == given.tolist() and pyplot.get_fignums() == []
    curves, grid = axes
    comparison = codes.compare_with_pca(model, images, training_images)
    assert [line.get_label() for line in curves.lines] == ["model", "PCA"]
    for line, psnr in zip(curves.lines, (comparison.psnr, comparison.pca_psnr)):
        assert line.get_xdata().tolist() == [16, 32]
        np.testing.assert_allclose(line.get_ydata(), np.where(np.isfinite(psnr), psnr, np.nan))
    assert np.isnan(curves.lines[0].get_ydata()[1])  # all latent values give the images themselves
    assert [label.get_text() for label in curves.get_xticklabels()] == ["16", "32"]
    np.testing.assert_array_equal(tiles(shown(grid), 3, 3), comparison.images[:, :3, ..., 0] * 85)
    assert [label.get_text() for label in grid.get_yticklabels()] == ["original", "16", "32"]
    assert grid.get_yticks().tolist() == [2.5, 8.5, 14.5]  # the middles of images of 6 pixels
    assert plot.codes(model, images, training_images)[1].figure in map(pyplot.figure, pyplot.get_fignums())


def test_a_saved_picture_of_codes(tmp_path):
    comparison = codes.compare_with_pca(*coded())
    plot.save_codes(tmp_path / "codes.png", comparison)
    assert matplotlib.image.imread(tmp_path / "codes.png").shape == (384, 2 * 384, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["codes.png"] and pyplot.get_fignums() == []


def test_errors_of_codes():
    model, images, training_images = coded()
    with pytest.raises(ValueError, match=r"codes: got images of shape \[7, 4, 4, 1\], needs \[N, 4, 4, 2\]"):
        plot.codes(model, images[..., :1], training_images, ax=axes_of(2))
    with pytest.raises(ValueError, match="plot.codes: got ax=.*, needs 2 matplotlib axes"):
        plot.codes(model, images, training_images, ax=axes_of(1))
    assert pyplot.get_fignums() == []


# Learning curves.


def write_history(directory, rows, names=("epoch", "bits_per_dim", "loss", "val_bits_per_dim")):
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "history.csv", "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def test_learning_curves_of_a_run_and_those_inside_it(tmp_path):
    run = tmp_path / "run"
    write_history(run / "conventional", [[0, 5.0, 50.0, 5.5], [1, 4.0, 40.0, 4.5]])
    write_history(run / "a", [[0, 9.0, 90.0]], names=("epoch", "bits_per_dim", "loss"))
    write_history(run, [[0, 3.0, 30.0, 3.5], [1, 2.0, 20.0, "NA"], [2, 1.0]])  # the last row is one of a run that was killed
    write_history(run / "begun", [])
    ax = plot.learning_curves(run)
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["run", "run, validation", "a", "conventional", "conventional, validation"]
    assert lines["run"].get_xdata().tolist() == [1.0, 2.0, 3.0] and lines["run"].get_ydata().tolist() == [3.0, 2.0, 1.0]
    np.testing.assert_array_equal(lines["run, validation"].get_ydata(), [3.5, np.nan, np.nan])
    assert lines["conventional, validation"].get_ydata().tolist() == [5.5, 4.5]
    assert lines["run, validation"].get_color() == lines["run"].get_color() != lines["a"].get_color()
    assert (lines["run"].get_linestyle(), lines["run, validation"].get_linestyle()) == ("-", "--")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "bits_per_dim")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(lines)
    (given,) = axes_of(1)
    assert plot.learning_curves(str(run), "loss", ax=given) is given
    assert [line.get_label() for line in given.lines] == ["run", "a", "conventional"]
    assert given.lines[1].get_ydata().tolist() == [90.0]


def test_errors_of_learning_curves(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"plot.learning_curves: {re.escape(str(directory))} holds no history.csv"):
            plot.learning_curves(directory)
    write_history(tmp_path, [])
    with pytest.raises(ValueError, match="with an epoch in it"):
        plot.learning_curves(tmp_path)
    write_history(tmp_path, [[0, 5.0, 50.0, 5.5]])
    with pytest.raises(ValueError, match="got metric='nll', .* has bits_per_dim, loss, val_bits_per_dim"):
        plot.learning_curves(tmp_path, "nll")
    assert pyplot.get_fignums() == []


# matplotlib itself.


@pytest.mark.slow
def test_imports_are_lazy_and_plots_need_no_display_and_leave_the_backend_alone():
    """Keras imports matplotlib where it finds it, so it is made impossible to import at first."""
    program = """
import io, sys
sys.modules["matplotlib"] = None
import tfp_dimflows as dimflows
for draw in (
    lambda: dimflows.plot.image_grid([[[[0.0]]]]),
    lambda: dimflows.plot.contributions([[0.0, 1.0]]),
    lambda: dimflows.plot.save_grid("grid.png", [[[[0.0]]]]),
    lambda: dimflows.training.SampleImages("pictures"),
):
    try:
        draw()
    except ImportError as error:
        print(error)
del sys.modules["matplotlib"]
file = io.BytesIO()
dimflows.plot.image_grid([[[[0.0], [1.0]]]]).figure.savefig(file)
import matplotlib
print(len(file.getvalue()) > 100, matplotlib.get_backend().lower())
matplotlib.use("svg")
dimflows.plot.image_grid([[[[0.0], [1.0]]]])
dimflows.plot.figure_pixels(1, lambda axes: dimflows.plot.contributions([[0.0, 1.0]], ax=axes))
print(matplotlib.get_backend().lower())
"""
    names = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    repository = pathlib.Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", program], cwd=repository, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    message = 'pictures need matplotlib: pip install "tfp-dimflows[demo]"'
    assert result.stdout.splitlines() == [message] * 4 + ["True agg", "svg"]
