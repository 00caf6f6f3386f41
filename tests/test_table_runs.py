"""The `dimflows` command on tables: what it trains, evaluates, scores and samples, and what it refuses."""

import csv
import json

import numpy as np
import pytest
import tensorflow as tf

from tfp_dimflows import cli, data, training

RNG = np.random.default_rng(0)
DOSE = RNG.uniform(size=400)
ROWS = {"dose": DOSE, "weight": 70.0 + 9.0 * RNG.normal(size=400), "days": RNG.poisson(1.0 + 8.0 * DOSE)}
SIZES = ["--set", "depth=1", "hidden=[8]", "--learning-rate", "0.01", "--batch-size", "32", "--epochs", "2"]


def write(path, rows=ROWS):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows)
        writer.writerows(zip(*(np.asarray(column).tolist() for column in rows.values()), strict=True))
    return path


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    path = write(folder / "doses.csv")
    argv = ["train", "nsf", "--data", str(path), "--condition", "dose", "--integer", "days", "--out", str(folder / "run")]
    assert cli.main([*argv, *SIZES]) == 0
    return folder / "run", path, argv


@pytest.mark.slow
def test_a_run_of_a_table(finished, capsys):
    run, path, _ = finished
    config, model = training.read_config(run), training.load_run(run)
    assert config["event_shape"] == [2] and config["arguments"]["condition_shape"] == [1] and config["steps_per_epoch"] == 10
    assert config["data"]["table"] == {"columns": ["weight", "days"], "condition": ["dose"], "integer": ["days"]}
    table = data.table(path, condition=["dose"], integer=["days"])
    batch = next(iter(table.test.unbatch().batch(100)))
    nll = -model.log_prob(batch["x"], condition=batch["condition"]).numpy().mean()
    assert json.loads((run / "metrics.json").read_text())["nll"] == pytest.approx(nll, rel=1e-5)
    assert not (run / "samples.png").exists()
    capsys.readouterr()
    for words, number in (([], 40), (["--split", "validation"], 40), (["--split", "all", "--batch-size", "7"], 400)):
        assert cli.main(["evaluate", str(run), *words]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["num_events"] == number and (words or result["nll"] == pytest.approx(nll, rel=1e-5))


@pytest.mark.slow
def test_scores_of_rows(finished, tmp_path):
    run, path, _ = finished
    model = training.load_run(run)
    assert cli.main(["score", str(run), "--out", str(tmp_path / "test.csv")]) == 0
    scores = read(tmp_path / "test.csv")
    table = data.table(path, condition=["dose"], integer=["days"])
    assert [int(row["index"]) for row in scores] == table.indices["test"].tolist()
    few = {name: column[:3] for name, column in ROWS.items()}
    assert (
        cli.main(["score", str(run), "--data", str(write(tmp_path / "few.csv", few)), "--out", str(tmp_path / "few_.csv")]) == 0
    )
    batch = next(iter(data.rows(few, condition=["dose"], integer=["days"])))
    expected = model.log_prob(batch["x"], condition=batch["condition"])
    np.testing.assert_allclose([float(row["log_prob"]) for row in read(tmp_path / "few_.csv")], expected, rtol=1e-5)


@pytest.mark.slow
def test_samples_of_a_table(finished, tmp_path):
    run, _, _ = finished
    assert cli.main(["sample", str(run), "--num", "200", "--given", "dose=0.9", "--out", str(tmp_path / "samples.csv")]) == 0
    samples = read(tmp_path / "samples.csv")
    assert list(samples[0]) == ["weight", "days", "dose"] and len(samples) == 200
    assert {row["dose"] for row in samples} == {"0.9"} and all(row["days"].lstrip("-").isdigit() for row in samples)
    assert abs(np.mean([float(row["weight"]) for row in samples]) - 70.0) < 5.0
    expected = training.load_run(run).sample(200, seed=0, condition=tf.constant([0.9])).numpy()
    np.testing.assert_allclose([float(row["weight"]) for row in samples], expected[:, 0], rtol=1e-6)
    assert cli.main(["sample", str(run), "--given", "dose=0.9"]) == 0
    assert (run / "samples-0.csv").is_file()


@pytest.mark.slow
def test_what_does_not_fit_a_table_is_refused(finished, tmp_path, capsys):
    run, path, argv = finished
    train = [*argv[:-1], str(tmp_path / "other"), *SIZES]
    for words, message in (
        (["sample", str(run)], "needs --given with a number for each of dose"),
        (["sample", str(run), "--given", "dose=high"], "needs --given with a number for each of dose"),
        (["sample", str(run), "--given", "dose=1", "--kind", "means"], "which are for images"),
        (["codes", str(run)], "has events of shape [2], needs images"),
        (["interpolate", str(run)], "has events of shape [2], needs images"),
        (["evaluate", str(run), "--split", "train"], "got --split train, needs test, validation or all"),
        ([*train, "--flips"], "got --flips for the table"),
        ([*train, "--image-size", "8"], "got --image-size for the table"),
        ([*train, "--validation-split", "1.0"], "needs a number from 0 to below 1"),
        ([*train, "--background", "black"], "got --background for the table"),
        ([*train, "--set", "bounds=[[80,null],null]"], "column 'weight' has"),
        ([*train, "--integer", "weight"], "column 'weight' has"),
        (["train", "nsf", "--data", "none.csv", "--out", str(tmp_path / "other"), *SIZES], "there is no such file"),
        (["train", "nsf", "--data", "digits", "--condition", "a", "--out", str(tmp_path / "other"), *SIZES], "are for tables"),
        ([*argv, *SIZES], "already holds a run"),
    ):
        try:
            status = cli.main(words)
        except SystemExit as exit:  # of argparse
            status = exit.code
        assert status == 2, words
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_table_that_has_changed(finished, tmp_path, capsys):
    run, path, argv = finished
    content = path.read_bytes()
    write(path, {name: column[::-1] for name, column in ROWS.items()})
    try:
        for words in (["evaluate", str(run)], ["score", str(run), "--out", str(tmp_path / "scores.csv")]):
            assert cli.main(words) == 2
            assert "has changed since" in capsys.readouterr().err
        assert cli.main(["evaluate", str(run), "--split", "all"]) == 0
        assert cli.main([*argv, *SIZES, "--resume"]) == 2
        assert "holds a run of another configuration: data=" in capsys.readouterr().err
    finally:
        path.write_bytes(content)


@pytest.mark.slow
def test_a_killed_run_of_a_table_ends_as_if_it_had_not_been(finished, tmp_path, monkeypatch):
    run, _, argv = finished
    on_epoch_end = training.backup.Backup.on_epoch_end

    def die(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt
        on_epoch_end(self, epoch, logs)

    killed = [*argv[:-1], str(tmp_path / "run"), *SIZES]
    with monkeypatch.context() as patch:
        patch.setattr(training.backup.Backup, "on_epoch_end", die)
        assert cli.main(killed) == 130
    assert cli.main([*killed, "--resume"]) == 0
    for one, other in zip(training.load_run(run).variables, training.load_run(tmp_path / "run").variables, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-5, atol=1e-6)
