"""Every number that the papers report, beside ours where there is one: the first table of `benchmarks/README.md`."""

import csv
import json
import pathlib
import statistics

from benchmarks import machine

README = pathlib.Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- papers' numbers -->\n", "<!-- end of the papers' numbers -->\n"


def rows() -> list[dict]:
    """The papers' rows: `row, model, dataset, paper, unit`, and which benchmark has ours under which key."""
    with open(pathlib.Path(__file__).with_name("rows.csv"), newline="") as file:
        return list(csv.DictReader(file))


def _lcma_families(result, key):
    family, kind = key.split(":")
    return statistics.mean(row[kind] for row in result["rows"] if row["family"] == family), _budget(result)


def _lcma_splits(result, key):
    name, split = key.split(":")
    study = result["studies"][name]
    return statistics.mean(row["bits_per_dim"][split] for row in study["rows"]), f"{study['data']}, {study['steps']:,} steps"


def _by_model(result, key):
    row = next(row for row in result["rows"] if row["model"] == key)
    return row["bits_per_dim" if "bits_per_dim" in row else "elbo_bits_per_dim"], _budget(result)


def _vflow_toy(result, key):
    return result["summary"][key]["mean"], f"checkerboard, {result['budget']['steps']:,} steps"


def _budget(result):
    return f"{result['data']}, {result['budget']['steps']:,} steps"


# How to find a value in a result, and what it was measured on with which budget.
BENCHMARKS = {
    "vflow_toy": _vflow_toy,
    "lcma_splits": _lcma_splits,
    "lcma_families": _lcma_families,
    "pnf": _by_model,
    "vflow_images": _by_model,
}


def ours(row: dict) -> tuple[str, str, str]:
    """Our value, what it was measured on, and the status of a row.

    `reproduced`: within the paper's error bar on the same data; `trend only`: measured, but at another scale or outside of the
    error bar; `not attempted`.
    """
    path = machine.RESULTS / f"paper_{row['benchmark']}.json"
    if not row["benchmark"] or not path.is_file():
        return "", "", "not attempted"
    value, measured_on = BENCHMARKS[row["benchmark"]](json.loads(path.read_text()), row["key"])
    paper, _, error = row["paper"].partition(" +- ")
    is_reproduced = bool(error) and abs(value - float(paper)) <= float(error)
    return f"{value:.3f}", measured_on, "reproduced" if is_reproduced else "trend only"


def render() -> str:
    """The table in Markdown."""
    lines = ["| row | model | dataset | paper | ours | measured on | |", "|---|---|---|---|---|---|---|"]
    for row in rows():
        value, budget, status = ours(row)
        unit = " nats" if row["unit"] == "nats" else ""
        cells = [row["row"], row["model"], row["dataset"], row["paper"] + unit, value, budget, status]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write() -> None:
    """Puts the table between its marks in `benchmarks/README.md`."""
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(before + BEGIN + render() + END + after)
