"""The `dimflows` command, in this process: run directories, resuming, what it prints, what it refuses."""

import contextlib
import csv
import errno
import fcntl
import importlib.metadata
import inspect
import io
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile

import keras
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import tfp_dimflows as dimflows
from tfp_dimflows import bijectors, cli, commands, data, dataset_names, recipes, training
from tfp_dimflows.codes import compare_with_pca
from tfp_dimflows.data import embedded

SMALL = ["width=4", "num_blocks=1", "depth=1"]
LCMA = ["train", "lcma-realnvp", "--batch-size", "128", "--set", *SMALL, "num_levels=2"]
PLAIN = ["train", "realnvp", "--batch-size", "128", "--set", *SMALL, "num_levels=1"]
PROGRESSIVE = ["train", "pnf", "--batch-size", "128", "--set", "network=dense", "width=8", "num_levels=1", "depth=1"]

FLOW_VAE = ["train", "flow-vae", "--batch-size", "128", "--set", "width=4", "num_blocks=1", "depth=1", "latent_dims=3"]
VFLOW = ["train", "vflow", "--batch-size", "128", "--set", "width=4", "num_components=2", "posterior_depth=1"]
VFLOW += ["noise_depth=1", 'layout=["1 column", "1 channel"]']
VAE_FLOW = ["train", "vae-flow", "--batch-size", "128", "--set", "width=4", "latent_dims=3", "posterior=planar"]


def arguments(command, out, data_dir, *more):
    epochs = [] if "--epochs" in more else ["--epochs", "2"]
    return [*command, "--data", "digits", "--data-dir", str(data_dir), "--out", str(out), *epochs, *more]


def quietly(argv):
    """(exit status, standard output) of the command, for fixtures, which cannot use `capsys`."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = cli.main(argv)
    return status, out.getvalue()


def contents(directory):
    """Every file below a directory, by relative path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in pathlib.Path(directory).rglob("*") if p.is_file()}


def history(directory):
    with open(pathlib.Path(directory) / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_picture(path, min_height=32, min_width=32):
    pixels = matplotlib.image.imread(path)
    assert pathlib.Path(path).read_bytes().startswith(b"\x89PNG")
    assert min_height <= pixels.shape[0] <= 4000 and min_width <= pixels.shape[1] <= 4000
    assert np.ptp(pixels) > 0.0


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tensorflow_datasets")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data_dir):
    """(run directory, arguments, printed text) of an LCMA run with all its phases."""
    out = tmp_path_factory.mktemp("runs") / "lcma"
    argv = arguments(LCMA, out, data_dir, "--seed", "3")
    status, printed = quietly(argv)
    assert status == 0
    return out, argv, printed


# A run.


@pytest.mark.slow
def test_a_run_holds_its_configuration(finished):
    out, _, _ = finished
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"] == "lcma-realnvp"
    assert config["event_shape"] == [8, 8, 1] and config["grey_levels"] == 17
    assert config["arguments"] == {"seed": 3, "width": 4, "num_blocks": 1, "depth": 1, "num_levels": 2}
    assert (config["epochs"], config["pretrain_epochs"], config["seed"]) == (2, 1, 3)
    assert config["data"]["name"] == "digits" and config["data"]["batch_size"] == 128


@pytest.mark.slow
@pytest.mark.parametrize(("part", "epochs"), [(".", 2), ("pretraining", 1), ("conventional", 2)])
def test_every_phase_holds_model_history_logs_and_metrics(finished, part, epochs):
    directory = finished[0] / part
    rows = history(directory)
    assert [row["epoch"] for row in rows] == [str(k) for k in range(epochs)]
    for row in rows:
        assert {"loss", "nll", "bits_per_dim", "val_loss", "val_nll", "val_bits_per_dim"} <= set(row)
        assert all(math.isfinite(float(value)) for value in row.values())
    assert any(path.stat().st_size > 0 for path in (directory / "logs").rglob("*tfevents*"))
    metrics = json.loads((directory / "metrics.json").read_text())
    assert {"loss", "nll", "bits_per_dim", "parameters"} <= set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["bits_per_dim"] == pytest.approx(metrics["nll"] / (64 * math.log(2.0)), rel=1e-5)
    assert metrics["bits_per_dim"] == pytest.approx(float(rows[-1]["val_bits_per_dim"]), abs=0.05)
    assert (directory / "model.keras").stat().st_size > 0
    assert not list(directory.glob("*unfinished*")) and not (directory / "backup").exists()


@pytest.mark.slow
def test_training_lowers_the_bits(finished):
    rows = history(finished[0])
    assert float(rows[-1]["bits_per_dim"]) < float(rows[0]["bits_per_dim"])


@pytest.mark.slow
def test_the_factorization_follows_the_contributions(finished):
    out, _, _ = finished
    with np.load(out / "contributions.npz") as stored:
        contributions, errors = ([stored[f"{key}_0"]] for key in ("factor_out", "standard_error"))
    assert errors[0].shape == (8, 8, 1) and errors[0].min() >= 0.0 and errors[0].max() > 0.0
    assert [c.shape for c in contributions] == [(8, 8, 1)] and np.ptp(contributions[0]) > 0.0

    def factorization(part):
        model = training.load(str(out / part / "model.keras"))
        return model.bijector.bijectors[-1].factorization

    assert factorization(".") == bijectors.DimensionFactorization.from_contributions(contributions)
    assert factorization("conventional") == bijectors.DimensionFactorization.checkerboard([8, 8, 1], 2)
    assert factorization("pretraining") is None


@pytest.mark.slow
def test_a_run_leaves_pictures(finished):
    out, _, _ = finished
    assert_picture(out / "samples.png", 8 * 8, 8 * 8)
    assert_picture(out / "factorization.png", 100, 300)


@pytest.mark.slow
def test_train_prints_the_comparison(finished):
    out, _, printed = finished
    rows = {
        line.split(maxsplit=2)[2]: line.split()[:2]
        for line in printed.splitlines()
        if line.strip().endswith(("lcma-realnvp", "conventional factorization")) and "bits/dim" not in line
    }
    assert set(rows) == {"lcma-realnvp", "realnvp, conventional factorization"}
    for title, part in (("lcma-realnvp", "."), ("realnvp, conventional factorization", "conventional")):
        metrics = json.loads((out / part / "metrics.json").read_text())
        bits, parameters = rows[title]
        assert float(bits) == pytest.approx(metrics["bits_per_dim"], abs=1e-4)
        assert int(parameters.replace(",", "")) == metrics["parameters"]
    assert "samples.png" in printed and str(out) in printed


@pytest.mark.slow
def test_both_factorizations_have_as_many_parameters(finished):
    metrics = training.read_metrics(finished[0])
    assert metrics["."]["parameters"] == metrics["conventional"]["parameters"]


@pytest.mark.slow
def test_recipes_beside(tmp_path, data_dir, capsys):
    out = tmp_path / "run"
    argv = arguments(["train", "nice", "--batch-size", "128"], out, data_dir, "--set", "width=8", "--epochs", "1")
    argv += ["--steps-per-epoch", "2", "--beside", "principal-pnf", "depth=1", "width=4"]
    assert cli.main(argv) == 0
    metrics = training.read_metrics(out)
    assert set(metrics) == {".", "principal-pnf"}
    printed = capsys.readouterr().out
    assert printed.index("nice\n") < printed.index("principal-pnf\n")
    for values in metrics.values():
        assert f"{values['bits_per_dim']:13.4f}" in printed and f"{values['parameters']:,d}" in printed
    assert training.load(str(out / "principal-pnf" / "model.keras")).distribution.distribution.bijector.bijectors[1].splits
    assert_picture(out / "principal-pnf" / "samples.png", 8 * 8, 8 * 8)
    assert json.loads((out / "config.json").read_text())["beside"] == {"principal-pnf": {"depth": 1, "width": 4}}
    flow = recipes.principal_pnf([8, 8, 1], grey_levels=17, depth=1, width=4)
    assert metrics["principal-pnf"]["parameters"] == sum(
        v.shape.num_elements() for v in training.FlowModel(flow).trainable_variables
    )
    before = contents(out)
    assert cli.main([*argv, "--resume"]) == 0 and contents(out).keys() == before.keys()


def test_bad_recipes_beside(tmp_path, capsys):
    start = ["train", "nice", "--data", "digits", "--epochs", "1", "--out", str(tmp_path / "run"), "--beside"]
    for others, message in (
        (["nise"], "got 'nise', needs one of"),
        (["nice"], "train: got nice beside nice, needs each recipe once"),
        (["maf", "maf"], "--beside: got 'maf', needs each recipe once, before its arguments"),
        (["depth=1", "maf"], "--beside: got 'depth=1', needs each recipe once, before its arguments"),
        (["maf", "detph=1"], "maf: .*detph.*; did you mean 'depth'"),
    ):
        assert cli.main([*start, *others]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def given_to_train(argv, monkeypatch):
    """What the command gives to `training.train`: positional arguments and options."""
    calls = []
    monkeypatch.setattr(training, "train", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(commands, "report", lambda *args: None)
    assert cli.main(argv) == 0
    return calls[0]


def images_of(dataset):
    return [image.tobytes() for batch in dataset.as_numpy_iterator() for image in batch]


def test_validation_images_are_no_training_images(tmp_path, data_dir, monkeypatch):
    argv = arguments(PLAIN, tmp_path / "run", data_dir, "--batch-size", "8")
    (_, _, train, test, validation), options = given_to_train(argv, monkeypatch)
    validated = images_of(validation)
    assert len(validated) == 144 and options["steps_per_epoch"] == (1437 - 144) // 8
    one_pass = images_of(train.take(options["steps_per_epoch"]))
    assert len(set(one_pass) | set(validated)) == len(one_pass) + len(validated)
    assert len(images_of(test)) == 360
    (_, _, _, _, other), _ = given_to_train([*argv, "--seed", "1"], monkeypatch)
    assert set(images_of(other)) != set(validated)
    (_, _, _, _, none), options = given_to_train([*argv, "--validation-split", "0"], monkeypatch)
    assert none is None and options["steps_per_epoch"] == 1437 // 8


def test_augmentation_is_of_the_training_images_alone(tmp_path, data_dir, monkeypatch):
    argv = arguments(PLAIN, tmp_path / "run", data_dir, "--batch-size", "8")
    (_, _, *plain), _ = given_to_train(argv, monkeypatch)
    (_, _, *moved), options = given_to_train([*argv, "--flips", "--shifts", "2"], monkeypatch)
    assert images_of(plain[0].take(2)) != images_of(moved[0].take(2))
    assert all(images_of(a) == images_of(b) for a, b in zip(plain[1:], moved[1:], strict=True))
    assert options["notes"]["flips"] and options["notes"]["shifts"] == 2


@pytest.mark.slow
def test_a_flow_given_labels(tmp_path, data_dir, capsys):
    run = tmp_path / "run"
    argv = [*arguments(PLAIN, run, data_dir, "--epochs", "1", "--steps-per-epoch", "3"), "--conditional", "label"]
    assert cli.main([*argv, "--learning-rate", "0.01"]) == 0
    config, model = training.read_config(run), training.load_run(run)
    assert config["data"]["label_names"] == [str(digit) for digit in range(10)]
    assert config["arguments"]["condition_shape"] == [10]
    batch = data.load("digits", "test", batch_size=360, labels=True, data_dir=data_dir)
    images, labels = next(iter(batch))
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--data-dir", str(data_dir), "--batch-size", "360"]) == 0
    result = json.loads(capsys.readouterr().out)
    expected, others = (
        -model.log_prob(images, seed=0, condition=tf.one_hot(some, 10)).numpy().mean() for some in (labels, 9 - labels)
    )
    assert result["nll"] == pytest.approx(expected, rel=1e-5) and abs(others - expected) > 1e-3
    assert cli.main(["score", str(run), "--data-dir", str(data_dir), "--out", str(tmp_path / "scores.csv")]) == 0
    for label in range(9):
        (tmp_path / "others" / str(label)).mkdir(parents=True)
        keras.utils.save_img(tmp_path / "others" / str(label) / "some.png", np.full([8, 8, 1], 25 * label))
    drawn = {}
    for words in ([], ["--label", "3"], ["--label", "4"]):
        out = tmp_path / f"{len(drawn)}.png"
        assert cli.main(["sample", str(run), "--num", "10", "--out", str(out), *words]) == 0
        drawn["".join(words)] = matplotlib.image.imread(out)
    assert not np.array_equal(drawn["--label3"], drawn["--label4"])
    capsys.readouterr()
    for words, message in (
        (["sample", "--label", "ten"], "got --label ten, needs one of 0, 1, 2"),
        (["interpolate", "--data-dir", str(data_dir)], "is a flow of images given labels, needs one without"),
        (["codes", "--data-dir", str(data_dir)], "is a flow of images given labels, needs one without"),
        (["score", "--data", str(tmp_path / "others")], "needs images of the labels 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, "),
    ):
        assert cli.main([words[0], str(run), *words[1:]]) == 2
        assert message in capsys.readouterr().err


def test_labels_need_a_flow_and_data_that_have_them(tmp_path, data_dir, capsys):
    for command, name, message in (
        (["train", "ffjord"], "digits", "ffjord: .*condition_shape"),
        (LCMA, "digits", "got condition_shape for lcma-realnvp"),
    ):
        argv = [*command[:2], "--data", name, "--data-dir", str(data_dir), "--out", str(tmp_path / "run"), "--epochs", "1"]
        assert cli.main([*argv, "--conditional", "label"]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


# What one does with a run.


@pytest.mark.slow
def test_scores_of_the_test_split(finished, data_dir, tmp_path, capsys):
    out, _, _ = finished
    assert cli.main(["evaluate", str(out), "--data-dir", str(data_dir)]) == 0
    result = json.loads(capsys.readouterr().out)
    path = tmp_path / "scores.csv"
    argv = ["score", str(out), "--data-dir", str(data_dir), "--out", str(path)]
    assert cli.main(argv) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == [str(k) for k in range(360)]
    assert np.mean([float(row["bits_per_dim"]) for row in rows]) == pytest.approx(result["bits_per_dim"], rel=1e-6)
    before = path.read_bytes()
    assert cli.main(argv) == 2
    assert "already exists" in capsys.readouterr().err and path.read_bytes() == before
    assert cli.main([*argv, "--overwrite"]) == 0
    assert path.read_bytes() == before


@pytest.mark.slow
def test_evaluate(finished, data_dir, capsys):
    out, _, _ = finished

    def evaluate(*more):
        assert cli.main(["evaluate", str(out), "--data-dir", str(data_dir), *more]) == 0
        return json.loads(capsys.readouterr().out)

    result = evaluate()
    trained = json.loads((out / "metrics.json").read_text())
    assert result["num_events"] == 360 and result["num_samples"] == 1
    assert result["bits_per_dim"] == pytest.approx(trained["bits_per_dim"], abs=0.03)
    assert result["bits_per_dim"] == pytest.approx(result["nll"] / (64 * math.log(2.0)))
    assert evaluate() == result
    tighter = evaluate("--num-samples", "8", "--seed", "1", "--batch-size", "90")
    assert tighter["num_events"] == 360 and tighter["bits_per_dim"] < result["bits_per_dim"]
    assert evaluate("--split", "train")["num_events"] == 1437


@pytest.mark.slow
def test_sample(finished, tmp_path, capsys):
    out, _, _ = finished
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for path, seed in zip(paths, (5, 5, 6)):
        assert cli.main(["sample", str(out), "--num", "7", "--seed", str(seed), "--out", str(path)]) == 0
        assert capsys.readouterr().out.strip() == str(path)
        assert_picture(path)
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    before = paths[0].read_bytes()
    assert cli.main(["sample", str(out), "--num", "1", "--out", str(paths[0])]) == 2
    assert "already exists" in capsys.readouterr().err
    assert paths[0].read_bytes() == before
    assert cli.main(["sample", str(out), "--num", "1", "--out", str(paths[0]), "--overwrite"]) == 0
    assert paths[0].read_bytes() != before


@pytest.mark.slow
def test_samples_of_a_temperature(finished, tmp_path, capsys):
    def sample(name, *more):
        assert cli.main(["sample", str(finished[0]), "--num", "9", "--out", str(tmp_path / name), *more]) == 0
        return matplotlib.image.imread(tmp_path / name)

    usual, cold = sample("usual.png"), sample("cold.png", "--temperature", "0")
    np.testing.assert_array_equal(sample("same.png", "--temperature", "1"), usual)
    tile = len(cold) // 3
    np.testing.assert_array_equal(cold, np.tile(cold[:tile, :tile], [3, 3, 1]))
    assert (usual != cold).any()
    assert cli.main(["sample", str(finished[0]), "--kind", "walks", "--temperature", "0.5"]) == 2
    assert "walks need a VAE" in capsys.readouterr().err


@pytest.mark.slow
def test_codes(finished, data_dir, tmp_path, capsys):
    out, _, _ = finished
    path = tmp_path / "codes.png"
    argv = ["codes", str(out), "--data-dir", str(data_dir), "--out", str(path), "--num-images", "5"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    assert_picture(path)
    assert printed[-1] == str(path) and "(360 test images)" in printed[1]
    rows = [[float(number) for number in line.split()] for line in printed[2:4]]
    model = dimflows.load(out)
    images, training_images = (
        np.concatenate(list(data.load("digits", split, batch_size=360, drop_remainder=False, data_dir=data_dir)))
        for split in ("test", "train")
    )
    comparison = compare_with_pca(model, images, training_images)
    assert [row[:2] for row in rows] == [[32, pytest.approx(comparison.psnr[0], abs=0.01)], [64, math.inf]]
    assert [row[2] for row in rows] == pytest.approx(comparison.pca_psnr, abs=0.01)
    bits = -np.mean(model.log_prob(images, num_samples=1, seed=0)) / (64 * math.log(2.0))
    assert sum(row[3] for row in rows) == pytest.approx(bits, abs=0.02)  # with other noise
    assert cli.main(argv) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.slow
def test_codes_need_an_order(tmp_path, data_dir, capsys):
    run = tmp_path / "run"
    assert cli.main(arguments(FLOW_VAE, run, data_dir, "--epochs", "1", "--steps-per-epoch", "2")) == 0
    assert cli.main(["codes", str(run), "--data-dir", str(data_dir)]) == 0
    assert re.search(r"(?m)^ +3 +[\d.]+ +[\d.]+ +nan$", capsys.readouterr().out)
    assert_picture(run / "codes-0.png")
    assert cli.main(["sample", str(run), "--kind", "walks", "--temperature", "0.5", "--data-dir", str(data_dir)]) == 2
    assert "sample: got a temperature, but walks have no noise" in capsys.readouterr().err
    shutil.rmtree(run)
    assert cli.main(arguments(PLAIN, run, data_dir, "--epochs", "1", "--steps-per-epoch", "2")) == 0  # one level
    capsys.readouterr()
    assert cli.main(["codes", str(run), "--data-dir", str(data_dir)]) == 2
    assert "needs a Multiscale that dimensions leave" in capsys.readouterr().err
    assert not list(run.glob("codes*"))


@pytest.mark.slow
def test_interpolate(finished, data_dir, tmp_path, capsys):
    out, _, _ = finished
    path = tmp_path / "walks.png"
    argv = ["interpolate", str(out), "--num", "2", "--steps", "5", "--data-dir", str(data_dir), "--out", str(path)]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert_picture(path)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(5 / 2, rel=0.01)


@pytest.mark.slow
def test_sample_means_and_walks_of_a_flow_vae(tmp_path, data_dir, capsys):
    run = tmp_path / "run"
    assert cli.main(arguments(FLOW_VAE, run, data_dir, "--epochs", "1")) == 0
    printed = capsys.readouterr().out
    assert "kl" in printed and "reconstruction" in printed
    for kind, columns_by_rows in (("samples", 2 / 2), ("means", 2 / 2), ("walks", 8 / 4)):
        assert cli.main(["sample", str(run), "--kind", kind, "--num", "4", "--data-dir", str(data_dir)]) == 0
        path = run / f"{kind}-0.png"
        assert capsys.readouterr().out.strip() == str(path)
        assert_picture(path)
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] / pixels.shape[0] == pytest.approx(columns_by_rows, rel=0.01)
    assert (run / "samples-0.png").read_bytes() != (run / "means-0.png").read_bytes()


@pytest.mark.slow
def test_means_of_a_vae_whose_posterior_is_a_flow(tmp_path, data_dir, capsys):
    run = tmp_path / "run"
    assert cli.main(arguments(VAE_FLOW, run, data_dir, "--epochs", "1")) == 0
    for kind in ("samples", "means", "walks"):
        assert cli.main(["sample", str(run), "--num", "4", "--kind", kind, "--data-dir", str(data_dir)]) == 0
        assert_picture(run / f"{kind}-0.png")
    capsys.readouterr()


@pytest.mark.slow
def test_a_vflow(tmp_path, data_dir, capsys):
    run = tmp_path / "run"
    options = ["--epochs", "1", "--steps-per-epoch", "2", "--no-baseline"]
    assert cli.main(arguments(VFLOW, run, data_dir, *options)) == 0
    assert_picture(run / "samples.png")
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--num-samples", "8", "--data-dir", str(data_dir)]) == 0
    tighter = json.loads(capsys.readouterr().out)
    assert tighter["num_samples"] == 8 and tighter["num_events"] == 360
    assert 0.0 < tighter["bits_per_dim"] < training.read_metrics(run)["."]["bits_per_dim"] < 16.0


@pytest.mark.slow
def test_means_need_a_vae(finished, tmp_path, capsys):
    assert cli.main(["sample", str(finished[0]), "--kind", "means", "--out", str(tmp_path / "means.png")]) == 2
    assert "lcma-realnvp, means need a VAE (flow-vae, vae-flow)" in capsys.readouterr().err
    assert not (tmp_path / "means.png").exists()


@pytest.mark.slow
def test_upscale(tmp_path, data_dir, capsys):
    run = tmp_path / "run"
    assert cli.main(arguments(PROGRESSIVE, run, data_dir, "--epochs", "1")) == 0
    capsys.readouterr()

    def upscale(name, *more):
        path = tmp_path / name
        assert cli.main(["upscale", str(run), "--data-dir", str(data_dir), "--num", "3", "--out", str(path), *more]) == 0
        assert capsys.readouterr().out.strip() == str(path)
        # One pixel of margin around each image, and every pixel repeated.
        pixels = matplotlib.image.imread(path)[..., 0]
        scale = len(pixels) // (3 * 10)
        tiles = pixels[::scale, ::scale].reshape(3, 10, -1, 10).swapaxes(1, 2)[..., 1:-1, 1:-1]
        return np.round(16 * tiles)

    tiles = upscale("a.png", "--seed", "4")
    stages = [tiles[:, k] for k in range(5)]
    assert tiles.shape == (3, 6, 8, 8)
    test_images = np.concatenate([*data.load("digits", "test", batch_size=360, data_dir=data_dir).as_numpy_iterator()])
    for low, original in zip(stages[0], tiles[:, 5]):
        assert any(np.array_equal(original, image[..., 0]) for image in test_images)
        means = (original + 0.5).reshape(2, 4, 2, 4).mean(axis=(1, 3)).repeat(4, axis=0).repeat(4, axis=1)
        assert np.abs(low - np.floor(means)).max() <= 1.0
    for stage, (height, width) in zip(stages, [(4, 4), (4, 2), (2, 2), (2, 1), (1, 1)]):
        blocks = stage.reshape(3, 8 // height, height, 8 // width, width)
        assert (blocks == blocks[:, :, :1, :, :1]).all()
    np.testing.assert_array_equal(upscale("b.png", "--seed", "4", "--data", "digits"), tiles)
    cold = upscale("c.png", "--seed", "4", "--temperature", "0")
    np.testing.assert_array_equal(cold[:, [0, 5]], tiles[:, [0, 5]])
    assert (cold[:, 4] != tiles[:, 4]).any()
    assert cli.main(["upscale", str(run), "--data", "photo_patches", "--data-dir", str(data_dir)]) == 2
    assert "levels" in capsys.readouterr().err
    assert cli.main(["upscale", str(run), "--data-dir", str(data_dir), "--out", str(tmp_path / "a.png")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert not list(run.glob("upscale*"))


@pytest.mark.slow
def test_upscale_of_other_data(tmp_path, data_dir, capsys):
    run = tmp_path / "run"
    argv = arguments(PROGRESSIVE, run, data_dir, "--epochs", "1", "--steps-per-epoch", "1", "--image-size", "4")
    argv[argv.index("digits")] = "photo_patches"
    assert cli.main(argv) == 0
    cifar = os.environ.get("TFDS_DATA_DIR", os.path.expanduser("~/tensorflow_datasets"))
    if not tfds.builder("cifar10", data_dir=cifar).data_path.exists():
        pytest.skip("cifar10 is not prepared")
    path = tmp_path / "a.png"
    assert cli.main(["upscale", str(run), "--data", "cifar10", "--data-dir", cifar, "--num", "2", "--out", str(path)]) == 0
    assert_picture(path)
    assert cli.main(["upscale", str(run), "--data", "mnist", "--data-dir", cifar]) == 2
    assert "(4, 4, 1)" in capsys.readouterr().err


@pytest.mark.slow
def test_upscale_needs_a_progressive_flow(finished, capsys):
    assert cli.main(["upscale", str(finished[0])]) == 2
    assert "lcma-realnvp, needs one of a progressive flow" in capsys.readouterr().err


def test_recipes(capsys):
    assert cli.main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for name in recipes.names():
        assert f"\n{name}: " in f"\n{printed}"
    assert "    width=32" in printed and "    contributions=None" in printed and "    depth=4" in printed


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "score", "sample", "interpolate", "upscale", "codes"])
def test_commands_need_a_finished_run(command, tmp_path, capsys):
    assert cli.main([command, str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert contents(tmp_path) == {}


# Refusals.


@pytest.mark.slow
def test_an_existing_run_is_refused(finished, capsys):
    out, argv, _ = finished
    before = contents(out)
    assert cli.main(argv) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert contents(out) == before


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(finished, capsys, monkeypatch):
    out, argv, _ = finished
    before = contents(out)
    monkeypatch.setattr(training.FlowModel, "fit", lambda *args, **kwargs: pytest.fail("trained again"))
    assert cli.main([*argv, "--resume"]) == 0
    assert "conventional factorization" in capsys.readouterr().out
    assert contents(out) == before


@pytest.mark.slow
def test_resuming_with_another_configuration_is_refused(finished, capsys):
    out, argv, _ = finished
    before = contents(out)
    assert cli.main([*argv, "--resume", "--learning-rate", "0.01", "--set", "width=8"]) == 2
    message = capsys.readouterr().err
    assert "another configuration" in message
    assert "learning_rate=0.01 (was 0.001)" in message and "'width': 8" in message and "'width': 4" in message
    assert "epochs=" not in message
    assert contents(out) == before


def test_a_foreign_directory_is_refused(tmp_path, data_dir, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert cli.main(arguments(PLAIN, tmp_path, data_dir)) == 2
    assert "not empty and holds no run" in capsys.readouterr().err
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_an_unwritable_directory_is_refused(tmp_path, data_dir, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert cli.main(arguments(PLAIN, out, data_dir)) == 2
    message = capsys.readouterr().err
    assert "cannot write" in message and str(out) in message
    assert contents(tmp_path) == {"file": b""}


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        (["train", "realnpv"], [], "got 'realnpv', needs one of .*realnvp.*; did you mean 'realnvp'"),
        (PLAIN, ["--data", "no_such_dataset"], "Dataset 'no_such_dataset' is unknown"),
        (PLAIN, ["--set", "steps=3"], "realnvp: .*'steps'.* arguments are .*width"),
        (PLAIN, ["--set", "widht=3"], "realnvp: .*'widht'; did you mean 'width'"),
        (LCMA, ["--set", "factorization=random"], "lcma-realnvp: .*'factorization'"),
        (PLAIN, ["--set", "width"], "got 'width', needs KEY=VALUE"),
        (PLAIN, ["--set", "width=wide"], "width='wide'"),
        (PLAIN, ["--set", "width=0"], "width=0"),
        (PLAIN, ["--set", "grey_levels=4"], "levels"),
        (PLAIN, ["--set", "num_levels=5"], r"realnvp: got event shape \[8, 8, 1\] and num_levels=5, .* divisible by 16$"),
        (PLAIN, ["--set", "num_scales=1", "num_levels=1"], "got num_scales and num_levels, the old and the new name"),
        (LCMA, ["--set", "num_levels=1"], "num_levels|factor-out"),
        (LCMA, ["--set", "num_levels=2", "granularity=free"], "granularity='free'"),
        (LCMA, ["--set", "num_levels=2", 'keep=["high","low"]'], "keep="),
        (LCMA, ["--set", "num_levels=2", "keep=highest"], "keep='highest'"),
        (PLAIN, ["--test-split", "validation"], "no split 'validation'"),
        (PLAIN, ["--batch-size", "5000"], "less than one batch"),
        (PLAIN, ["--grey-levels", "5"], "grey_levels=5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_before_anything_is_written(command, more, message, tmp_path, data_dir, capsys):
    out = tmp_path / "run"
    assert cli.main(arguments(command, out, data_dir, *more)) == 2
    assert re.search(f"(?m)^dimflows: error: .*({message})", capsys.readouterr().err)
    assert not out.exists()


def test_what_was_typed_by_an_old_name_is_named(tmp_path, data_dir, capsys):
    with pytest.warns(DeprecationWarning):
        assert cli.main(arguments(["train", "glow"], tmp_path / "run", data_dir, "--set", "num_scales=5")) == 2
    assert "num_levels=5, needs height and width divisible by 32 (num_scales is now num_levels)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ["--epochs", "0"],
        ["--batch-size", "-1"],
        ["--steps-per-epoch", "some"],
        ["--learning-rate", "0"],
        ["--learning-rate", "nan"],
        ["--seed", "-1"],
    ],
)
def test_numbers_must_be_positive(more, tmp_path, data_dir, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments(PLAIN, tmp_path / "run", data_dir, *more))
    assert exit_info.value.code == 2
    assert f"{more[0]}: got '{more[1]}', needs a " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# What is known to be wrong without TensorFlow.

COMMANDS = """
import contextlib, io, json, sys
from tfp_dimflows import cli

results = []
for argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = cli.main(argv)
        except SystemExit as exit:
            status = exit.code
        except AssertionError as error:
            status = str(error)
    results.append([status, out.getvalue() + err.getvalue()])
print(json.dumps(results))
"""


def test_typos_need_no_tensorflow(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "runs" / "glow").mkdir(parents=True)
    (tmp_path / "runs" / "glow" / "config.json").write_text('{"recipe": "glow", "event_shape": [8, 8, 1]}')
    (tmp_path / "taken.png").write_text("")
    train = ["train", "glow", "--data", "digits", "--epochs", "1", "--out", "run"]
    cases = [
        (["--version"], 0, f"^dimflows {re.escape(dimflows.__version__)}$"),
        (["trian"], 2, "invalid choice: 'trian'"),
        ([], 2, "required: COMMAND"),
        ([*train, "--epoch-count", "3"], 2, "unrecognized arguments: --epoch-count"),
        (["train", "glow", "--data", "digits", "--out", "run"], 2, "required: --epochs"),
        ([*train, "--batch-size", "0"], 2, "--batch-size: got '0', needs a positive integer"),
        ([*train, "--set", "width"], 2, "^dimflows: error: --set: got 'width', needs KEY=VALUE$"),
        ([*train, "--set", "widht=3"], 2, "^dimflows: error: glow: got the argument 'widht'; did you mean 'width'\\?; "),
        (["train", "lcma-realnpv", *train[2:]], 2, "^dimflows: error: .*'lcma-realnpv', .*; did you mean 'lcma-realnvp'\\?$"),
        ([*train, "--data", "mnsit"], 2, "^dimflows: error: Dataset 'mnsit' is unknown .*; did you mean 'mnist'\\?"),
        ([*train, "--data", "photo_patchse"], 2, "; did you mean 'photo_patches'\\?"),
        ([*train, "--data", "photos"], 2, "; did you mean './photos'\\?"),
        ([*train, "--data", "./phtos"], 2, "no such folder; did you mean './photos'\\?"),
        (["sample", "runs/gloww"], 2, "^dimflows: error: run: there is no directory runs/gloww; did you mean 'runs/glow'\\?$"),
        (["evaluate", "photos"], 2, "^dimflows: error: run: photos holds no run"),
        (["sample", "runs/glow", "--out", "taken.png"], 2, "taken.png already exists; .*--out.* --overwrite"),
        (["sample", "runs/glow", "--out", "pictures/a.png"], 2, "there is no directory pictures"),
        (["sample", "runs/glow", "--temperature", "-1"], 2, "--temperature: got '-1', needs a nonnegative number"),
        (["codes", "runs/glow", "--num-images", "0"], 2, "--num-images: got '0', needs a positive integer"),
        (["upscale", "runs/glow", "--temperature", "-1"], 2, "--temperature: got '-1', needs a nonnegative number"),
        (train, "tensorflow is imported", "^$"),  # it is needed for the work
    ]
    for library in ("keras", "tensorflow", "tensorflow_probability", "tf_keras"):
        (tmp_path / "libraries").mkdir(exist_ok=True)
        (tmp_path / "libraries" / f"{library}.py").write_text("raise AssertionError(f'{__name__} is imported')")
    paths = [tmp_path / "libraries", pathlib.Path(dimflows.__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", COMMANDS, json.dumps([argv for argv, _, _ in cases])]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    for (argv, status, message), (got, printed) in zip(cases, json.loads(process.stdout), strict=True):
        assert got == status, (argv, printed)
        assert re.search(f"(?m){message}", printed), (argv, printed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["libraries", "photos", "runs", "taken.png"]


def test_names_that_are_checked_without_tensorflow_are_those_there_are():
    assert cli.RECIPES == tuple(recipes.names())
    own = {name for recipe in recipes.names() for name in inspect.signature(recipes.get(recipe)).parameters}
    old = {name for recipe in recipes.names() for name in recipes.registry.renamed_arguments(recipe, {"num_layers": 1})}
    assert set(cli.ARGUMENTS) == own | old
    assert dataset_names.EMBEDDED == tuple(embedded.BUILDERS)


def test_a_recipe_of_a_user_is_known(tmp_path, data_dir, capsys):
    @recipes.recipe
    def useless(event_shape, *, grey_levels=None, seed=0):
        raise ValueError("useless: made for this test")

    try:
        assert cli.main(arguments(["train", "useless"], tmp_path / "run", data_dir)) == 2
    finally:
        recipes.registry._RECIPES.pop("useless")
    assert capsys.readouterr().err.endswith("dimflows: error: useless: made for this test\n")


# Names of pictures.


def test_pictures_have_names_that_are_free(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"recipe": "pnf", "event_shape": [8, 8, 1]}')
    monkeypatch.setattr(commands, "run", lambda arguments: written.append(arguments.out) or arguments.out.write_text(""))
    for command, name in (("sample", "samples"), ("interpolate", "interpolation"), ("upscale", "upscale"), ("codes", "codes")):
        written = []
        for more in ([], [], [], ["--overwrite"], ["--seed", "7"]):
            assert cli.main([command, str(tmp_path), *more]) == 0
        expected = [f"{name}-0", f"{name}-0-2", f"{name}-0-3", f"{name}-0", f"{name}-7"]
        assert written == [tmp_path / f"{stem}.png" for stem in expected]
        out = ["--out", str(tmp_path / f"{name}-7.png")]
        assert [cli.main([command, str(tmp_path), *out, *more]) for more in ([], ["--overwrite"])] == [2, 0]
        assert written[-1] == tmp_path / f"{name}-7.png"


# Failures.


OUT_OF_MEMORY = """Graph execution error:

Detected at node zeros defined at (most recent call last):
  File "/usr/bin/dimflows", line 8, in <module>

OOM when allocating tensor with shape[2000000,2000000] and type float on /job:localhost/device:GPU:0 by allocator GPU_0_bfc
\t [[{{node zeros}}]]
Hint: If you want to see a list of allocated tensors when OOM happens, add report_tensor_allocations_upon_oom.
 [Op:__inference_multi_step_on_iterator_3609]"""
LOST = "{{function_node __wrapped__IteratorGetNext}} corrupted record at 12 [Op:IteratorGetNext] name: "


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            tf.errors.ResourceExhaustedError(None, None, OUT_OF_MEMORY),
            r"train: out of memory, .* \(OOM .* allocator GPU_0_bfc\)",
        ),
        (tf.errors.DataLossError(None, None, LOST), "train: corrupted record at 12"),
        (tf.errors.UnavailableError(None, None, ""), "train: UnavailableError"),
        (MemoryError("Unable to allocate 8 TiB"), "Unable to allocate 8 TiB"),
    ],
    ids=["memory", "record", "no_message", "python"],
)
def test_errors_of_training_are_told_in_one_line(error, message, tmp_path, data_dir, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(training, "train", fail)
    assert cli.main(arguments(PLAIN, tmp_path / "run", data_dir)) == 1
    assert re.search(f"(?m)dimflows: error: {message}$", capsys.readouterr().err)


def test_ctrl_c_ends_in_one_line_and_leaves_the_directory_to_another_run(tmp_path, data_dir, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.FlowModel, "adapt", interrupt)
    out = tmp_path / "my run"
    argv = arguments(PLAIN, out, data_dir)
    assert cli.main([*argv, "--resume"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"dimflows: interrupted; to go on: {shlex.join(['dimflows', *argv, '--resume'])}"
    assert training.read_config(out)["seed"] == 0
    assert cli.main([*argv, "--seed", "2"]) == 130  # no epoch has been trained
    assert training.read_config(out)["seed"] == 2


@pytest.mark.slow
def test_a_failure_of_the_data_does_not_keep_the_directory(tmp_path, data_dir, capsys, monkeypatch):
    argv = arguments(PLAIN, tmp_path / "run", data_dir, "--steps-per-epoch", "1", "--epochs", "1")
    with monkeypatch.context() as patch:
        patch.setattr(embedded.Digits, "LEVELS", 16)
        assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert re.search("(?m)^dimflows: error: train: .*Dataset 'digits' has an image value outside its 16 levels.*$", err)
    assert "Traceback" not in err and not (tmp_path / "run" / "model.keras").exists()
    assert cli.main(argv) == 0
    assert training.read_config(tmp_path / "run")["grey_levels"] == 17


@pytest.mark.slow
def test_a_training_that_diverges_does_not_keep_the_directory(tmp_path, data_dir, capsys):
    argv = arguments(PLAIN, tmp_path / "run", data_dir, "--steps-per-epoch", "3", "--epochs", "1")
    assert cli.main([*argv, "--learning-rate", "1e30"]) == 1
    assert "no longer finite; try a smaller learning rate" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.weights.h5"))
    assert cli.main([*argv, "--learning-rate", "1e-3"]) == 0
    assert [row["epoch"] for row in history(tmp_path / "run")] == ["0"]


def test_a_configuration_of_something_else_is_kept(tmp_path, data_dir, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert cli.main(arguments(PLAIN, tmp_path, data_dir)) == 2
    assert "not empty and holds no run" in capsys.readouterr().err
    assert contents(tmp_path) == {"config.json": b'{"model_type": "bert"}'}


# Vectors and conditions.


def trained_on_vectors(recipe, out, event_shape=(3,), data=None, **options):
    x = np.random.default_rng(0).normal(size=[64, *event_shape]).astype(np.float32)
    data = tf.data.Dataset.from_tensor_slices(x if data is None else data).batch(32)
    return training.train(recipe, out, data, data, event_shape=event_shape, epochs=1, **options)


@pytest.mark.slow
def test_a_run_of_vectors(tmp_path, monkeypatch, capsys):
    """Without pictures, and so without matplotlib."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(dimflows.plot, "require_matplotlib", lambda: pytest.fail("asked for matplotlib"))
        model = trained_on_vectors("maf", run, arguments={"depth": 1, "hidden": [8]})
    assert training.read_config(run)["grey_levels"] is None
    assert not list(run.glob("*.png"))
    metrics = training.read_metrics(run)["."]
    assert "bits_per_dim" not in metrics and math.isfinite(metrics["nll"])
    loaded = dimflows.load(run)
    np.testing.assert_array_equal(loaded.log_prob(np.ones([2, 3], np.float32)), model.log_prob(np.ones([2, 3], np.float32)))

    capsys.readouterr()
    commands.report(str(run), "maf")
    printed = capsys.readouterr().out
    assert "test nats" in printed and f"{metrics['nll']:.4f}" in printed and "history.csv" in printed
    assert cli.main(["sample", str(run)]) == 2
    assert f"sample: {run} has events of shape [3], needs images [H, W, C]" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run)]) == 2
    assert f"evaluate: {run} does not say on what data it was trained" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("lcma-realnvp", {}),
        ("lcma-glow", {"online_steps": 1, "baseline": False}),
        ("lcma-iresnet", {"baseline": False}),
        ("lcma-residual-flow", {"online_steps": 1, "baseline": False}),
    ],
    ids=["realnvp", "glow", "iresnet", "residual-flow"],
)
def test_an_lcma_run_of_vectors(recipe, options, tmp_path):
    arguments = {"depth": 1, "width": 4, "num_levels": 2}
    model = trained_on_vectors(recipe, tmp_path / "run", [4], arguments=arguments, **options)
    assert model.event_shape == [4]
    assert sorted(path.name for path in (tmp_path / "run").glob("*.png")) == ["factorization.png"]
    assert_picture(tmp_path / "run" / "factorization.png", 100, 300)
    assert not any("bits_per_dim" in metrics for metrics in training.read_metrics(tmp_path / "run").values())


@pytest.mark.slow
def test_a_run_of_conditional_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 4, size=[64, 4, 4, 1])
    batches = {"x": images, "condition": np.ones([64, 2], np.float32)}
    arguments = {"depth": 1, "width": 4, "num_levels": 1, "condition_shape": [2]}
    trained_on_vectors("glow", tmp_path / "run", [4, 4, 1], batches, grey_levels=4, arguments=arguments)
    assert_picture(tmp_path / "run" / "samples.png")
    with pytest.raises(ValueError, match="got condition_shape for lcma-glow"):
        trained_on_vectors("lcma-glow", tmp_path / "other", [4, 4, 1], batches, grey_levels=4, arguments=arguments)


# Loading.


def test_loading_what_is_no_run(tmp_path):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "saved_model.pb").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.weights.h5").write_bytes(b"")
    (tmp_path / "cut.keras").write_bytes(b"PK")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text('{"recipe": "maf", "arguments": {}}')
    for name, message in {
        "exported": "exported is an exported SavedModel, which tf.saved_model.load reads; needs a .keras file",
        "empty": r"empty holds no run \(no config.json",
        "unfinished": r"unfinished holds no finished run \(no model.keras\)",
        "emtpy": "there is no .*emtpy, needs a .keras file .* or a run directory; did you mean '.*empty'",
        "model.weights.h5": "model.weights.h5 is no .keras file, needs",
        "cut.keras": "cut.keras is no .keras file, needs",
    }.items():
        for path in (tmp_path / name, str(tmp_path / name)):
            with pytest.raises(ValueError, match=message):
                dimflows.load(path)


# Interrupted runs.


def kill(argv, when):
    """Ends training by Ctrl-C just before an epoch is backed up, or at the first batch (`when=None`)."""

    def die_at_epoch_end(self, epoch, logs=None):
        if epoch == when:
            raise KeyboardInterrupt
        return on_epoch_end(self, epoch, logs)

    def die_at_batch(self, batch, logs=None):
        raise KeyboardInterrupt

    callback = training.backup.Backup
    on_epoch_end = callback.on_epoch_end
    with pytest.MonkeyPatch.context() as patch:
        if when is None:
            patch.setattr(callback, "on_train_batch_end", die_at_batch)
        else:
            patch.setattr(callback, "on_epoch_end", die_at_epoch_end)
        assert cli.main(argv) == 130


@pytest.mark.slow
def test_a_killed_lcma_run_goes_on_from_its_last_full_epoch(tmp_path, data_dir, capsys, monkeypatch):
    out = tmp_path / "run"
    options = ["--epochs", "3", "--pretrain-epochs", "1", "--steps-per-epoch", "2", "--no-baseline"]
    argv = arguments(LCMA, out, data_dir, *options)
    kill(argv, when=1)  # the first phase has one epoch only
    err = capsys.readouterr().err
    assert err.endswith(f"dimflows: interrupted; to go on: {shlex.join(['dimflows', *argv, '--resume'])}\n")
    assert "Traceback" not in err
    rows = history(out)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert not (out / "model.keras").exists()
    assert cli.main(["evaluate", str(out), "--data-dir", str(data_dir)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main(argv) == 2  # not without --resume
    done = contents(out / "pretraining") | {"contributions.npz": (out / "contributions.npz").read_bytes()}

    fits = []
    original = training.FlowModel.fit
    monkeypatch.setattr(training.FlowModel, "fit", lambda *a, **k: fits.append(original(*a, **k)) or fits[-1])
    assert cli.main([*argv, "--resume"]) == 0
    assert [fit.epoch for fit in fits] == [[1, 2]]
    assert contents(out / "pretraining") | {"contributions.npz": (out / "contributions.npz").read_bytes()} == done
    resumed = history(out)
    assert [row["epoch"] for row in resumed] == ["0", "1", "2"] and resumed[0] == rows[0]
    assert not (out / "backup").exists() and not (out / "conventional").exists()

    loaded = training.load_run(out)
    assert int(loaded.optimizer.iterations.numpy()) == 3 * 2
    for mine, theirs in zip(loaded.trainable_variables, fits[0].model.trainable_variables):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("online_steps", ["1", "5"], ids=["decided_before", "decided_after"])
def test_a_killed_run_that_decides_its_factorization_ends_as_if_it_had_not_been(tmp_path, data_dir, online_steps):
    options = ["--epochs", "3", "--steps-per-epoch", "2", "--no-baseline", "--online-steps", online_steps]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert cli.main(arguments(LCMA, whole, data_dir, *options)) == 0
    argv = arguments(LCMA, out, data_dir, *options)
    kill(argv, when=2)
    assert cli.main([*argv, "--resume"]) == 0
    assert not (out / "pretraining").exists()
    multiscale, expected = (training.load_run(run).bijector.bijectors[-1] for run in (out, whole))
    assert multiscale.num_decided == 1 and multiscale.factorization == expected.factorization
    for a, b in zip(training.load_run(whole).variables, training.load_run(out).variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_killed_by_the_system_ends_as_if_it_had_not_been(tmp_path, data_dir):
    """With the same images in the same order; equal but for the rounding of a busy machine."""
    options = ["--epochs", "3", "--steps-per-epoch", "30", "--flips"]
    assert cli.main(arguments(PLAIN, tmp_path / "whole", data_dir, *options)) == 0
    argv = arguments(PLAIN, tmp_path / "killed", data_dir, *options)
    command = "import sys; from tfp_dimflows import cli; sys.exit(cli.main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", command, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "backup" / "epoch-1.weights.h5").exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert process.wait(timeout=0.01) is None, "it ended before it could be killed"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert cli.main([*argv, "--resume"]) == 0
    whole, killed = ((tmp_path / name) for name in ("whole", "killed"))
    for expected, row in zip(history(whole), history(killed), strict=True):
        metrics = [key for key in expected if key not in ("minutes", "images_per_second")]
        assert [float(row[key]) for key in metrics] == pytest.approx([float(expected[key]) for key in metrics], rel=1e-6)
    for a, b in zip(training.load_run(whole).variables, training.load_run(killed).variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_killed_before_its_metrics_is_not_trained_again(tmp_path, data_dir, monkeypatch):
    argv = arguments(PLAIN, tmp_path / "run", data_dir, "--epochs", "1", "--steps-per-epoch", "2")
    evaluate = training.FlowModel.evaluate

    def die_after_training(*args, **kwargs):
        if "_use_cached_eval_dataset" not in kwargs:  # which `fit` passes
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training.FlowModel, "evaluate", die_after_training)
        assert cli.main(argv) == 130
    weights, rows = training.load_run(tmp_path / "run").get_weights(), history(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert cli.main([*argv, "--resume"]) == 0
    for before, after in zip(weights, training.load_run(tmp_path / "run").get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert history(tmp_path / "run") == rows


@pytest.mark.parametrize("rest", ["", "1,0.5", "1"], ids=["whole", "half_a_row", "a_number"])
def test_a_kill_while_the_history_is_written(rest, tmp_path):
    path = tmp_path / "history.csv"
    path.write_text(f"epoch,loss,nll\r\n0,3.0,2.0\r\n{rest}")
    training.runs._keep_rows(path, 1)
    assert path.read_bytes() == b"epoch,loss,nll\r\n0,3.0,2.0\r\n"


@pytest.mark.slow
def test_a_kill_before_the_configuration_is_written(tmp_path, data_dir):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.unfinished").write_text("{")
    assert cli.main(arguments(PLAIN, out, data_dir, "--epochs", "1", "--steps-per-epoch", "1")) == 0


@pytest.mark.slow
def test_runs_of_another_version(tmp_path, finished, data_dir, capsys):
    """Those that load do; others say which version they are of."""
    out, argv, _ = finished
    shutil.copytree(out, tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    assert config["version"] == importlib.metadata.version("tfp-dimflows")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"version": "0.0.1"}))
    argv = [str(tmp_path / "run") if a == str(out) else a for a in argv]
    assert cli.main([*argv, "--resume"]) == 0
    assert cli.main(["sample", str(tmp_path / "run"), "--num", "1"]) == 0
    capsys.readouterr()

    unknown = tmp_path / "unknown.keras"
    with zipfile.ZipFile(out / "model.keras") as model, zipfile.ZipFile(unknown, "w") as changed:
        for name in model.namelist():
            changed.writestr(name, model.read(name).replace(b"depth", b"num_layers_of_old"))
    shutil.move(unknown, tmp_path / "run" / "model.keras")
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data-dir", str(data_dir)]) == 2
    own = importlib.metadata.version("tfp-dimflows")
    assert f"is of version 0.0.1, and version {own} cannot load it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_backup_of_another_version_is_refused(tmp_path, data_dir, capsys):
    argv = arguments(PLAIN, tmp_path / "run", data_dir, "--steps-per-epoch", "1")
    kill(argv, when=1)
    backup = tmp_path / "run" / "backup"
    (backup / "epoch-1.weights.h5").rename(backup / "latest.weights.h5")
    before = contents(tmp_path / "run")
    assert cli.main([*argv, "--resume"]) == 2
    assert f"Backup: {backup} is of an older version" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_a_run_directory_is_for_one_process(tmp_path, data_dir, capsys):
    out = tmp_path / "run"
    out.mkdir()
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert cli.main(arguments(PLAIN, out, data_dir)) == 2
    assert f"another process writes to {out}" in capsys.readouterr().err
    assert not list(out.iterdir())
    os.close(other)


@pytest.mark.slow
def test_a_full_disk_is_an_error_that_leaves_what_was_written(tmp_path, data_dir, capsys, monkeypatch):
    out = tmp_path / "run"

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(training.runs.plot, "save_grid", full)
    assert cli.main(arguments(PLAIN, out, data_dir, "--epochs", "1")) == 1
    assert f"cannot write to the run directory {out}: No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    before = contents(out)
    assert cli.main([*arguments(PLAIN, out, data_dir, "--epochs", "1"), "--resume"]) == 0
    assert contents(out) == before | {"samples.png": (out / "samples.png").read_bytes()}


@pytest.mark.slow
def test_training_on_all_devices(tmp_path, data_dir, capsys):
    out = tmp_path / "run"
    assert cli.main(arguments(PLAIN, out, data_dir, "--epochs", "1", "--strategy", "mirrored")) == 0
    assert "test bits/dim" in capsys.readouterr().out
    assert_picture(out / "samples.png")
    assert cli.main(["evaluate", str(out), "--data-dir", str(data_dir)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("when", [None, 0], ids=["first_batch", "first_epoch_end"])
@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["again", "resume"])
def test_a_run_killed_in_its_first_epoch_starts_again(when, more, tmp_path, data_dir):
    argv = arguments(PLAIN, tmp_path / "run", data_dir, "--steps-per-epoch", "1")
    kill(argv, when)
    assert cli.main([*argv, *more]) == 0
    assert [row["epoch"] for row in history(tmp_path / "run")] == ["0", "1"]
    assert math.isfinite(training.read_metrics(tmp_path / "run")["."]["bits_per_dim"])


@pytest.mark.slow
def test_more_steps_than_the_dataset_has_and_other_options_of_the_data(tmp_path, data_dir, capsys):
    options = ["--steps-per-epoch", "4", "--epochs", "2", "--batch-size", "512"]  # 2 batches in the dataset
    options += ["--image-size", "4", "--flips", "--test-split", "test[:100]"]
    assert cli.main(arguments(PLAIN, tmp_path / "run", data_dir, *options)) == 0
    assert len(history(tmp_path / "run")) == 2
    model = training.load_run(tmp_path / "run")
    assert int(model.optimizer.iterations.numpy()) == 8
    assert model.event_shape == [4, 4, 1]
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data-dir", str(data_dir)]) == 0
    assert json.loads(capsys.readouterr().out)["num_events"] == 100


# Other datasets.

OTHER_DATASETS = [
    (PLAIN, "mnist", [28, 28, 1]),
    (LCMA, "cifar10", [32, 32, 3]),
    (["train", "pnf", "--batch-size", "64", "--set", *SMALL, "num_levels=1"], "mnist", [28, 28, 1]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name", "event_shape"), OTHER_DATASETS)
def test_other_datasets(command, name, event_shape, tmp_path):
    data_dir = os.environ.get("TFDS_DATA_DIR", os.path.expanduser("~/tensorflow_datasets"))
    if not tfds.builder(name, data_dir=data_dir).data_path.exists():
        pytest.skip(f"{name} is not prepared")
    options = ["--epochs", "1", "--steps-per-epoch", "1", "--test-split", "test[:64]", "--no-baseline"]
    argv = [*command, "--data", name, "--data-dir", data_dir, "--out", str(tmp_path / "run"), *options]
    assert cli.main(argv) == 0
    config = training.read_config(tmp_path / "run")
    assert config["event_shape"] == event_shape and config["grey_levels"] == 256
    assert 0.0 < training.read_metrics(tmp_path / "run")["."]["bits_per_dim"] < 16.0
    assert_picture(tmp_path / "run" / "samples.png", 8 * event_shape[0], 8 * event_shape[1])
