"""The table of the papers' numbers, and the command that fills it."""

import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks.paper import __main__ as command
from benchmarks.paper import table

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
    monkeypatch.setitem(table.BENCHMARKS, "vflow_toy", (lambda result, key: value, "data"))
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
