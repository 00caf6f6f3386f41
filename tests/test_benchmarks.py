"""The table of the papers' numbers, and the command that fills it."""

import itertools
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

import tfp_dimflows as dimflows
from benchmarks.paper import __main__ as command
from benchmarks.paper import lcma_splits, subspaces, table

tfb = tfp.bijectors

ROOT = pathlib.Path(__file__).parents[1]


def test_the_readme_shows_the_results():
    assert table.render() in table.README.read_text()


def test_every_row_of_a_benchmark_has_a_value():
    for row in table.rows():
        value, measured_on, status = table.ours(row)
        if row["benchmark"]:
            assert re.fullmatch(r"-?\d\.\d{3}", value) and measured_on and status in ("reproduced", "trend only"), row
        else:
            assert (value, measured_on, status) == ("", "", "not attempted")


@pytest.mark.parametrize(
    ("paper", "value", "status"),
    [("-3.67 +- 0.03", -3.69, "reproduced"), ("-3.51 +- 0.01", -3.62, "trend only"), ("3.49", 3.49, "trend only")],
)
def test_only_values_within_an_error_bar_are_reproduced(paper, value, status, monkeypatch):
    monkeypatch.setitem(table.BENCHMARKS, "vflow_toy", lambda result, key: (value, "data"))
    assert table.ours({"benchmark": "vflow_toy", "key": "", "paper": paper}) == (f"{value:.3f}", "data", status)


def test_writing_changes_the_table_only(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}old\n{table.END}after\n")
    monkeypatch.setattr(table, "README", readme)
    table.write()
    assert readme.read_text() == f"before\n{table.BEGIN}{table.render()}{table.END}after\n"


def test_the_command_knows_every_benchmark():
    scripts = {path.stem for path in (ROOT / "benchmarks" / "paper").glob("*.py")} - {
        "__init__",
        "__main__",
        "harness",
        "table",
    }
    assert set(command.NAMES) == scripts and set(table.BENCHMARKS) <= scripts


def test_the_command_keeps_to_its_budget(monkeypatch, capsys):
    calls = []

    def run(argv, check, timeout):
        calls.append((argv[-1], timeout))
        if argv[-1].endswith("pnf"):
            raise subprocess.TimeoutExpired(argv, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(table, "write", lambda: calls.append("table"))
    monkeypatch.setattr(sys, "argv", ["benchmarks.paper", "pnf", "energies", "--budget-minutes", "2"])
    command.main()
    (first, limit), (second, rest), last = calls
    assert (first, second, last) == ("benchmarks.paper.pnf", "benchmarks.paper.energies", "table")
    assert 0.0 < rest <= limit <= 120.0
    assert "pnf: out of time; run again to go on" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmarks.paper", "--budget-minutes", "0"])
    calls.clear()
    command.main()
    assert calls == ["table"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.paper", "nothing"])
    with pytest.raises(SystemExit):
        command.main()
    assert "unknown benchmarks ['nothing']" in capsys.readouterr().err


def test_halves_of_the_colours_by_a_written_out_example():
    # Four positions (TL, TR, BL, BR) of two colours; what is best in one of two blocks only does not count.
    averages = np.array([[1.0, 8.0, 3.0, 4.0], [7.0, 2.0, 6.0, 5.0]])
    statistic = np.zeros([2, 4, 2])
    for position, (row, column) in enumerate(itertools.product(range(2), repeat=2)):
        statistic[row, column::2] = averages[:, position]
    statistic[0, 0, 0] += 1.0
    kept = lcma_splits.by_statistics([statistic], "high", "colours").kept[0]
    assert sorted(averages.ravel(), reverse=True)[:4] == [8.0, 7.0, 6.0, 5.0]
    assert statistic.ravel()[kept][0, 1].tolist() == [8.0, 7.0, 6.0, 5.0]
    left = lcma_splits.by_statistics([statistic], ["low"], "colours").left[0]
    assert np.array_equal(left, kept)


@pytest.mark.parametrize(
    ("granularity", "kept"),
    [
        # Of a 2x4 image 0 to 3, 4 to 7, the statistic below.
        ("pair", [[[0, 5], [3, 6]]]),
        ("row", [[[4, 5], [6, 7]]]),
        ("column", [[[0, 4], [2, 6]]]),
    ],
)
def test_pairs_rows_and_columns_by_a_written_out_example(granularity, kept):
    statistic = np.array([[5.0, 1.0, 0.0, 1.0], [3.0, 4.0, 3.0, 2.0]])[..., np.newaxis]
    factorization = lcma_splits.by_statistics([statistic], "high", granularity)
    assert factorization.kept[0].tolist() == kept
    reverse = lcma_splits.by_statistics([statistic], "low", granularity)
    if granularity != "column":  # ties
        assert reverse.kept[0].tolist() == factorization.left[0].tolist()


def test_couplings_condition_on_the_channels_that_stay():
    # Colours 1 and 3 stay: an order that is not its own inverse.
    statistic = np.broadcast_to([3.0, 1.0, 2.0, 0.0], [4, 4, 4])
    split = lcma_splits.by_statistics([statistic], "low", "colours")
    sizes = {"num_levels": 2, "depth": 1, "width": 4, "num_blocks": 1}
    flow = dimflows.recipes.realnvp([4, 4, 4], factorization=split, grey_levels=4, **sizes)
    level = lcma_splits.with_halves(flow).distribution.bijector.bijectors[-1].levels[0]
    end = next(k for k, part in enumerate(level.bijectors) if isinstance(part, tfb.Invert)) + 1
    values = tf.range(64.0)
    moved = dimflows.bijectors.Chain(level.bijectors[end - 2 : end]).inverse(tf.reshape(values, [4, 4, 4]))
    assert np.array_equal(moved[..., :8].numpy(), split.kept[0])


def test_the_share_of_positions_is_one_for_a_pattern_and_small_for_noise():
    pattern = np.tile(np.arange(8.0).reshape(2, 2, 2), [8, 8, 1])
    noise = np.random.default_rng(0).normal(size=[16, 16, 2])
    slope = 100.0 * np.repeat(np.repeat(np.random.default_rng(1).normal(size=[8, 8, 1]), 2, axis=0), 2, axis=1)
    for statistic, low, high in ((pattern + slope, 1.0, 1.0), (noise, 0.0, 0.1), (pattern + noise, 0.3, 0.95)):
        assert low <= lcma_splits.explained_by_position([{"log-det": [statistic]}]) <= high


TINY = subspaces.Study("", 2, 10, depth=2, width=4)


def test_the_checkerboard_frame_lets_whole_pixels_stay():
    image = np.arange(32.0, dtype=np.float32).reshape(4, 4, 2)
    flow = subspaces.flow_of(TINY, (4, 4, 2), "checkerboard", seed=0)
    squeeze, rotation, level = flow.levels[0].bijectors
    first_half = level.bijectors[0].inverse(rotation.inverse(squeeze.inverse(image))).numpy()[..., :4]
    assert sorted(first_half.ravel()) == sorted([*image[::2, ::2].ravel(), *image[1::2, 1::2].ravel()])


@pytest.mark.slow
@pytest.mark.parametrize("frame", subspaces.FRAMES)
def test_frames_of_the_same_size(frame):
    flow = subspaces.flow_of(TINY, (4, 4, 1), frame, seed=0)
    y = np.random.default_rng(0).normal(size=[40, 4, 4, 1]).astype(np.float32).cumsum(axis=1)
    with dimflows.adaptation():
        x = flow.inverse(y)
    np.testing.assert_allclose(flow.forward(flow.inverse(y)), y, atol=1e-4)
    size = sum(int(np.prod(v.shape)) for v in flow.trainable_variables)
    plain = sum(int(np.prod(v.shape)) for v in subspaces.flow_of(TINY, (4, 4, 1), "first half", 0).trainable_variables)
    assert size == plain + (6 + 28) * frame.endswith("trained")
    assert x.shape == [40, 16]


def test_a_summary_of_frames():
    study = subspaces.Study("", 2, 10, ("first half", "Haar"), seeds=2)
    bits = {("first half", 0): 5.0, ("first half", 1): 5.2, ("Haar", 0): 4.9, ("Haar", 1): 4.9}
    results = {key: {"bits_per_dim": value, "parameters": 3, "ms_per_step": 1.0} for key, value in bits.items()}
    row = subspaces.summary(study, results)["Haar"]
    assert (row["bits_per_dim"], row["gain"], row["standard_error"], row["rows"]) == (4.9, 0.2, 0.1, [4.9, 4.9])
