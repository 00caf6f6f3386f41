"""Callbacks that write pictures and log bits per level; those of `KLWarmup` are in `test_vae_prior.py`."""

import csv
import math
import pathlib
import types
import warnings

import keras
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import slow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

import tfp_dimflows as dimflows
from tfp_dimflows import plot

dfb, dfd, callbacks = dimflows.bijectors, dimflows.distributions, dimflows.training
tfb, tfd = tfp.bijectors, tfp.distributions

GLOW = {"num_levels": 2, "depth": 1, "width": 4}


def compiled(distribution, **options):
    keras.utils.set_random_seed(0)
    model = dimflows.FlowModel(distribution, seed=0)
    model.compile(keras.optimizers.Adam(0.01), **options)
    return model


def images(num=8, shape=(4, 4, 1), grey_levels=4, seed=0):
    return np.random.default_rng(seed).integers(0, grey_levels, [num, *shape])


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def simple(shape=(4, 4, 1), grey_levels=4, factorization="checkerboard"):
    """A flow of two levels that trains fast: an ActNorm each."""
    if factorization is not None:
        factorization = getattr(dfb.DimensionFactorization, factorization)(shape, 2)
    channels = shape[-1] * (1 if factorization is None else 2)
    flow = dfb.Multiscale([dfb.ActNorm(shape[-1]), dfb.ActNorm(channels)], factorization, event_shape=shape)
    base = tfd.Sample(tfd.Normal(0.0, 1.0), [math.prod(shape)])
    if grey_levels is None:
        return tfd.TransformedDistribution(base, flow)
    return dfd.Dequantized(
        tfd.TransformedDistribution(base, dfb.Chain([tfb.Scale(float(grey_levels)), flow])), grey_levels=grey_levels
    )


def pixels_of(path):
    pixels = np.uint8(np.round(255 * matplotlib.image.imread(path)))
    return pixels[..., :3]


def expected_grid(rows, levels, limits=None):
    grid = plot.enlarged(plot.grid_pixels(rows, levels, limits))
    return np.repeat(grid, 3, axis=-1) if grid.shape[-1] == 1 else grid


def logged_images(log_dir, name):
    """Steps and decoded pictures of a TensorBoard log."""
    accumulator = EventAccumulator(str(log_dir), size_guidance={"tensors": 0})
    accumulator.Reload()
    events = accumulator.Tensors(name)
    pictures = [tensor_util.make_ndarray(event.tensor_proto)[2] for event in events]
    return [event.step for event in events], [tf.io.decode_png(picture, channels=3).numpy() for picture in pictures]


def files(directory):
    return {path.name: path.read_bytes() for path in pathlib.Path(directory).rglob("*") if path.is_file()}


# Samples.


@pytest.mark.parametrize(
    ("distribution", "x", "levels", "limits"),
    [
        slow(lambda: dimflows.recipes.glow([4, 4, 1], grey_levels=4, **GLOW), images(), 4, None),
        (lambda: simple([4, 4, 3], None), normal([8, 4, 4, 3]), None, [-2.0, 2.0]),
        (lambda: simple([4, 4, 2]), images(shape=[4, 4, 2]), 4, None),
        slow(
            lambda: dimflows.recipes.vae_flow([4, 4, 1], posterior="gaussian", latent_dims=2, width=4),
            images(grey_levels=2),
            2,
            None,
        ),
    ],
    ids=["levels", "continuous_colour", "two_channels", "vae_of_binary_images"],
)
def test_sample_images_are_samples_with_the_same_seed(tmp_path, distribution, x, levels, limits):
    model = compiled(distribution())
    weights = []
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: weights.append(model.get_weights()))
    pictures = callbacks.SampleImages(tmp_path / "png", tmp_path / "logs", every=2, num=5, seed=7, limits=limits)
    model.fit(x, epochs=5, verbose=0, callbacks=[pictures, keep])
    assert sorted(files(tmp_path / "png")) == ["samples-0002.png", "samples-0004.png"]
    steps, logged = logged_images(tmp_path / "logs", "samples")
    assert steps == [1, 3]
    for epoch, picture in zip((2, 4), logged):
        model.set_weights(weights[epoch - 1])
        expected = expected_grid(model.sample(5, seed=7), levels, limits)
        assert np.ptp(expected) > 0
        np.testing.assert_array_equal(pixels_of(tmp_path / "png" / f"samples-{epoch:04d}.png"), expected)
        np.testing.assert_array_equal(picture, expected)


@pytest.mark.slow
def test_samples_of_a_conditional_model(tmp_path):
    model = compiled(dimflows.recipes.glow([4, 4, 1], condition_shape=[2], **GLOW))
    x, condition = {"x": normal([8, 4, 4, 1]), "condition": normal([8, 2])}, normal([3, 2], 1)
    model.fit(x, verbose=0, callbacks=[callbacks.SampleImages(tmp_path, condition=condition, name="given")])
    expected = expected_grid(model.sample(seed=0, condition=condition), None)
    np.testing.assert_array_equal(pixels_of(tmp_path / "given-0001.png"), expected)
    with pytest.raises(ValueError, match=r"needs conditions of shape \[2\]"):
        model.fit(x, verbose=0, callbacks=[callbacks.SampleImages(tmp_path / "other", num=3)])
    assert sorted(files(tmp_path)) == ["given-0001.png"] and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_training_is_the_same_with_and_without_callbacks(tmp_path):
    results = []
    for own in (
        [],
        [
            callbacks.SampleImages(tmp_path, tmp_path / "logs", num=4),
            callbacks.KeptDimensions(tmp_path),
            callbacks.BitsPerLevel(images(4)),
        ],
    ):
        model = compiled(dimflows.recipes.glow([4, 4, 1], grey_levels=4, num_levels=2, depth=1, width=2))
        history = model.fit(images(), epochs=2, batch_size=4, verbose=0, callbacks=own).history
        results.append((model.get_weights(), history["loss"]))
    for first, second in zip(results[0][0], results[1][0]):
        np.testing.assert_array_equal(first, second)
    assert results[0][1] == results[1][1]


@pytest.mark.slow
def test_pictures_of_another_training_are_not_overwritten(tmp_path):
    model = compiled(simple())

    def fit(**options):
        names = ("overwrite", "name", "directory")
        arguments = {key: options.pop(key) for key in names if key in options}
        pictures = callbacks.SampleImages(arguments.pop("directory", tmp_path), num=2, **arguments)
        before = model.get_weights()
        try:
            model.fit(images(), verbose=0, callbacks=[pictures], **options)
        except ValueError:
            assert all((a == b).all() for a, b in zip(before, model.get_weights()))
            raise

    fit(epochs=2)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="SampleImages: .*samples-0001.png is there already, .*overwrite=True"):
        fit(epochs=2)
    with pytest.raises(ValueError, match="SampleImages: .*samples-0002.png is there already"):
        fit(epochs=2, initial_epoch=1)
    assert files(tmp_path) == before
    fit(epochs=3, initial_epoch=2)  # as after a resumption
    assert sorted(files(tmp_path)) == ["samples-0001.png", "samples-0002.png", "samples-0003.png"]
    fit(epochs=1, overwrite=True)
    fit(epochs=1, name="others")
    assert sorted(files(tmp_path)) == ["others-0001.png", *(f"samples-000{k}.png" for k in (1, 2, 3))]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="SampleImages: cannot write to .*file"):
        fit(directory=tmp_path / "file")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: callbacks.SampleImages(), "SampleImages: got neither directory nor log_dir, needs one of them"),
        (lambda: callbacks.SampleImages("d", every=0), "SampleImages: got every=0, needs a positive number"),
        (lambda: callbacks.SampleImages("d", num=0), "SampleImages: got num=0, needs a positive number"),
        (lambda: callbacks.KeptDimensions(), "KeptDimensions: got neither"),
        (lambda: callbacks.Reconstructions(images()), "Reconstructions: got neither"),
        (lambda: callbacks.Reconstructions(np.zeros([4, 4]), "d"), r"Reconstructions: got images of shape \[4, 4\]"),
    ],
)
def test_errors_of_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def vectors():
    return tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [4]), dfb.ActNorm(4))


@pytest.mark.parametrize(
    ("distribution", "x", "make", "message"),
    [
        (vectors, normal([8, 4]), callbacks.SampleImages, r"SampleImages: .* has events of shape \[4\], needs images"),
        (vectors, normal([8, 4]), callbacks.KeptDimensions, "KeptDimensions: .* has no Multiscale in it, needs one with"),
        (vectors, normal([8, 4]), lambda d: callbacks.Reconstructions(images(), d), "Reconstructions: .* events of shape"),
        (vectors, normal([8, 4]), lambda d: callbacks.BitsPerLevel(normal([8, 4])), "BitsPerLevel: .*needs a Multiscale next"),
        (simple, images(), lambda d: callbacks.Reconstructions(images(), d), "is no autoencoder .* nothing to see"),
        (simple, images(), lambda d: callbacks.SampleImages(d, limits=[1, 0]), "^SampleImages: got limits"),
        (simple, images(), lambda d: callbacks.BitsPerLevel(images(grey_levels=9)), "needs numbers 0 to 3"),
        (simple, images(), lambda d: callbacks.BitsPerLevel(images(shape=[4, 2, 1])), r"got data of shape \(8, 4, 2, 1\)"),
        (
            lambda: simple(factorization=None),
            images(),
            callbacks.KeptDimensions,
            "has a Multiscale that no dimension leaves, needs one with a DimensionFactorization",
        ),
        (
            lambda: simple([4], None, "channels"),
            normal([8, 4]),
            lambda d: callbacks.BitsPerLevel(tf.data.Dataset.from_tensor_slices(normal([0, 4])).batch(2)),
            "BitsPerLevel: the dataset is empty",
        ),
        (
            lambda: dimflows.recipes.flow_vae([4, 4, 1], flow=None, vae_width=4, grey_levels=4),
            images(),
            lambda d: callbacks.Reconstructions(images(shape=[2, 2, 1]), d),
            r"got data of shape \(8, 2, 2, 1\)",
        ),
        (
            lambda: dimflows.recipes.flow_vae([4, 4, 1], flow="glow", depth=1, width=4, vae_width=4),
            normal([8, 4, 4, 1]),
            lambda d: callbacks.BitsPerLevel(normal([8, 4, 4, 1])),
            "BitsPerLevel: .*needs a Multiscale next to its latent values",
        ),
    ],
)
def test_models_and_data_that_do_not_fit_are_refused_before_training(tmp_path, distribution, x, make, message):
    model = compiled(distribution())
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        model.fit(x, verbose=0, callbacks=[make(tmp_path / "pictures")])
    assert all((a == b).all() for a, b in zip(before, model.get_weights()))
    assert list(tmp_path.iterdir()) == []


def test_the_noise_of_bits_per_level_must_be_independent():
    noise = tfd.MultivariateNormalDiag(tf.zeros([4]), tf.ones([4]))
    flow = dfb.Multiscale([dfb.ActNorm(4), dfb.ActNorm(2)], dfb.DimensionFactorization.channels([4], 2))
    model = compiled(tfd.TransformedDistribution(noise, flow))
    with pytest.raises(ValueError, match="BitsPerLevel: .*needs a Multiscale next to its latent values"):
        model.fit(normal([8, 4]), verbose=0, callbacks=[callbacks.BitsPerLevel(normal([8, 4]))])


def test_callbacks_need_a_flow_model():
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
    model.compile(loss="mse")
    for callback in (callbacks.SampleImages("pictures"), callbacks.BitsPerLevel(normal([8, 4]))):
        with pytest.raises(ValueError, match=f"{type(callback).__name__}: got the model .*, needs a FlowModel"):
            model.fit(normal([8, 4]), normal([8, 1]), verbose=0, callbacks=[callback])


@pytest.mark.slow
def test_samples_that_cannot_be_drawn_do_not_end_a_training(tmp_path, monkeypatch):
    model = compiled(simple())
    sample, calls = model.sample, []

    def unsteady(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise tf.errors.InvalidArgumentError(None, None, "the fixed point was not reached")
        return sample(*args, **kwargs)

    monkeypatch.setattr(model, "sample", unsteady)
    with pytest.warns(UserWarning, match="SampleImages: no picture after epoch 1: the fixed point was not reached"):
        model.fit(images(), epochs=2, verbose=0, callbacks=[callbacks.SampleImages(tmp_path)])
    assert sorted(files(tmp_path)) == ["samples-0002.png"]


def test_of_several_workers_one_writes(tmp_path):
    for is_chief in (False, True):
        strategy = types.SimpleNamespace(extended=types.SimpleNamespace(should_save_summary=is_chief))
        model = compiled(simple())
        pictures = callbacks.SampleImages(tmp_path)
        pictures.set_model(
            types.SimpleNamespace(
                distribute_strategy=strategy,
                **{name: getattr(model, name) for name in ("sample", "distribution", "event_shape")},
            )
        )
        pictures._open(1)
        pictures._write(1, 0)
        assert sorted(files(tmp_path)) == (["samples-0001.png"] if is_chief else [])


# Reconstructions and kept dimensions.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distribution", "levels"),
    [
        (lambda: dimflows.recipes.flow_vae([4, 4, 1], flow=None, vae_width=4, grey_levels=4), 4),
        slow(lambda: dimflows.recipes.flow_vae([4, 4, 3], flow=None, vae_width=4), None),
        slow(lambda: dimflows.recipes.vae_flow([4, 4, 1], posterior="gaussian", latent_dims=2, width=4), 2),
    ],
    ids=["flow_vae", "continuous", "vae_flow"],
)
def test_reconstructions_are_below_the_images(tmp_path, distribution, levels):
    model = compiled(distribution())
    shape = [4, *model.event_shape]
    x = normal(shape) if levels is None else images(4, model.event_shape, levels)
    model.fit(x, verbose=0, callbacks=[callbacks.Reconstructions(x[:3], tmp_path, tmp_path / "logs")])
    decoded = model.decode(model.encode(x[:3])).numpy()
    expected = expected_grid(np.stack([x[:3], decoded]), levels)
    assert expected.shape[0] * 3 == expected.shape[1] * 2
    np.testing.assert_array_equal(pixels_of(tmp_path / "reconstructions-0001.png"), expected)
    steps, logged = logged_images(tmp_path / "logs", "reconstructions")
    assert steps == [0]
    np.testing.assert_array_equal(logged[0], expected)
    small = expected[:: len(expected) // 12, :: len(expected) // 12, 0].reshape(2, 6, 3, 6)[:, 1:-1, :, 1:-1].swapaxes(1, 2)
    if levels is not None:
        np.testing.assert_array_equal(small[0], np.round(x[:3, ..., 0] * 255 / (levels - 1)))
    assert (small[0] != small[1]).any()


def augmented():
    joint = dfb.VFlow(simple([4, 4, 2], None).bijector, posterior=None, num_extra=1)
    base = tfd.Sample(tfd.Normal(0.0, 1.0), [32])
    return dfd.Dequantized(dfd.Augmented(tfd.TransformedDistribution(base, joint), num_extra=1), grey_levels=4)


@pytest.mark.parametrize(
    ("distribution", "factorization"),
    [
        (simple, dfb.DimensionFactorization.checkerboard([4, 4, 1], 2)),
        (lambda: simple([6], None, "channels"), dfb.DimensionFactorization.channels([6], 2)),
        (augmented, dfb.DimensionFactorization.checkerboard([4, 4, 2], 2)),
        (
            lambda: dimflows.recipes.flow_vae([4, 4, 1], flow="glow", depth=1, width=4, vae_width=4, grey_levels=4),
            dfb.DimensionFactorization.channels([4, 4, 1], 2),
        ),
    ],
    ids=["images", "vectors", "vflow", "flow_vae"],
)
def test_kept_dimensions_are_drawn_once(tmp_path, distribution, factorization):
    model = compiled(distribution())
    kept = callbacks.KeptDimensions(tmp_path, tmp_path / "logs")
    kept.set_model(model)
    kept.on_train_begin()
    for epoch in (0, 1):
        kept.on_epoch_begin(epoch)
        kept.on_epoch_end(epoch)
    kept.on_train_end()
    expected = plot.figure_pixels(1, lambda axes: plot.kept_dimensions(factorization, ax=axes))[..., :3]
    assert [name for name in files(tmp_path) if name.endswith("png")] == ["kept-dimensions-0000.png"]
    np.testing.assert_array_equal(pixels_of(tmp_path / "kept-dimensions-0000.png"), expected)
    steps, logged = logged_images(tmp_path / "logs", "kept-dimensions")
    assert steps == [0]
    np.testing.assert_array_equal(logged[0], expected)


def test_kept_dimensions_of_a_training_that_goes_on(tmp_path):
    model = compiled(simple())
    model.fit(images(), verbose=0, callbacks=[callbacks.KeptDimensions(tmp_path)])
    with pytest.raises(ValueError, match="KeptDimensions: .*kept-dimensions-0000.png is there already"):
        model.fit(images(), verbose=0, callbacks=[callbacks.KeptDimensions(tmp_path)])
    model.fit(images(), epochs=2, initial_epoch=1, verbose=0, callbacks=[callbacks.KeptDimensions(tmp_path)])
    assert sorted(files(tmp_path)) == ["kept-dimensions-0000.png", "kept-dimensions-0001.png"]


# Bits per level.


def with_noise_flow():
    """Variational dequantisation by a conditional flow."""
    weight = tf.Variable(0.3)
    shift = dfb.ConditionalTransform(lambda x: weight * x, dfb.transformers.Additive(), event_ndims=3)
    noise = dfb.Chain([tfb.Sigmoid(), shift])
    return dfd.Dequantized(simple().distribution, grey_levels=4, noise=noise)


RESIDUAL = {"width": 4, "num_levels": 2, "depth": 1}

MODELS = {  # distribution, data, number of levels, whether there is preprocessing
    "levels": (simple, images(9), 2, True),
    "continuous": (lambda: dimflows.recipes.glow([4, 4, 3], **GLOW), normal([9, 4, 4, 3]), 2, False),
    "vectors": (lambda: dimflows.recipes.glow([5], num_levels=3, depth=1, width=4), normal([9, 5]), 3, False),
    "undivided": (lambda: simple(factorization=None), images(9), 2, True),
    "noise_flow": (with_noise_flow, images(9), 2, True),
    "trained_prior": (lambda: dimflows.recipes.iresnet([4, 4, 1], **RESIDUAL), normal([9, 4, 4, 1]), 2, False),
    "probes": (lambda: dimflows.recipes.residual_flow([4, 4, 1], grey_levels=4, **RESIDUAL), images(9), 2, True),
    "conditional": (
        lambda: dimflows.recipes.glow([4, 4, 1], condition_shape=[2], grey_levels=4, **GLOW),
        {"x": images(9), "condition": normal([9, 2])},
        2,
        True,
    ),
}


@pytest.mark.parametrize("name", [name if name in ("levels", "vectors", "noise_flow") else slow(name) for name in MODELS])
def test_bits_per_level_sum_to_the_bits_per_dim_of_the_model(name):
    distribution, data, levels, is_preprocessed = MODELS[name]
    model = compiled(distribution())
    model.adapt(data)
    for variable in model.trainable_variables:
        variable.assign_add(0.1 * normal(variable.shape))
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(4 if name == "undivided" else 3)
    callback = callbacks.BitsPerLevel(dataset, seed=5)
    callback.set_model(model)
    callback.on_train_begin()
    logs = {"loss": 1.0}
    callback.on_epoch_end(0, logs)
    assert logs.pop("loss") == 1.0
    terms = [f"bits_level_{k + 1}" for k in range(levels)] + ["bits_preprocessing"] * is_preprocessed
    assert sorted(logs) == terms
    num_samples = 1 if isinstance(model.distribution, dfd.Dequantized) else None
    log_prob = [model.log_prob(batch, num_samples=num_samples, seed=5 + step) for step, batch in enumerate(dataset)]
    bits = -np.concatenate(log_prob) / (model.event_shape.num_elements() * math.log(2.0))
    assert sum(logs.values()) == pytest.approx(bits.mean(), rel=1e-5)
    assert min(abs(value) for value in logs.values()) > 1e-3
    again = {}
    callback.on_epoch_end(1, again)
    assert again == logs


def test_each_term_of_the_bits():
    """A flow without noise or networks, by hand: D = 4 dimensions, two leave after the first level."""
    factorization = dfb.DimensionFactorization([4], [[1, 3]], [[0, 2]])
    levels = [tfb.Scale(2.0), tfb.Scale(4.0)]
    shift = tf.Variable(0.0)
    flow = dfb.Chain([tfb.Scale(8.0), tfb.Shift(shift), dfb.Multiscale(levels, factorization)])
    model = compiled(tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [4]), flow))
    model.compile(keras.optimizers.SGD(0.0))
    x = np.float32([[16.0, 64.0, 0.0, 128.0], [0.0, 0.0, 32.0, 0.0]])
    history = model.fit(x, verbose=0, callbacks=[callbacks.BitsPerLevel(x)]).history

    def normal_bits(*z):
        return sum((0.5 * v**2 + 0.5 * math.log(2 * math.pi)) / math.log(2.0) for v in z)

    first = np.mean([normal_bits(1.0, 0.0), normal_bits(0.0, 2.0)]) + 4 * 1.0  # each dimension divided by 2: one bit more
    second = np.mean([normal_bits(1.0, 2.0), normal_bits(0.0, 0.0)]) + 2 * 2.0
    assert history["bits_level_1"] == pytest.approx([first / 4], rel=1e-5)
    assert history["bits_level_2"] == pytest.approx([second / 4], rel=1e-5)
    assert history["bits_preprocessing"] == pytest.approx([3.0], rel=1e-5)
    assert history["nll"] == pytest.approx([(first + second + 12.0) * math.log(2.0)], rel=1e-5)


def test_csv_and_tensorboard_see_the_bits_of_every_epoch(tmp_path):
    model = compiled(simple())
    own = [
        callbacks.BitsPerLevel((images(6), np.zeros(6))),
        keras.callbacks.CSVLogger(str(tmp_path / "history.csv")),
        keras.callbacks.TensorBoard(str(tmp_path / "logs")),
    ]
    history = model.fit(images(), epochs=2, verbose=0, callbacks=own).history
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    accumulator = EventAccumulator(str(tmp_path / "logs" / "train"), size_guidance={"tensors": 0})
    accumulator.Reload()
    for name in ("bits_level_1", "bits_level_2", "bits_preprocessing"):
        assert [float(row[name]) for row in rows] == history[name]
        logged = [tensor_util.make_ndarray(event.tensor_proto) for event in accumulator.Tensors(f"epoch_{name}")]
        np.testing.assert_allclose(logged, history[name], rtol=1e-6)
    assert history["bits_preprocessing"] == pytest.approx([2.0, 2.0])  # values in [0, 4) scaled to [0, 1)
    ax = plot.learning_curves(tmp_path, "bits_level_1")
    assert ax.lines[0].get_ydata().tolist() == history["bits_level_1"]


@pytest.mark.slow
def test_nothing_warns(tmp_path):
    model = compiled(simple())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        own = [callbacks.SampleImages(tmp_path), callbacks.KeptDimensions(tmp_path), callbacks.BitsPerLevel(images())]
        model.fit(images(), epochs=2, verbose=0, callbacks=own)
    assert [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)] == []
