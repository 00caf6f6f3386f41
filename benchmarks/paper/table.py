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
    return statistics.mean(row[kind] for row in result["rows"] if row["family"] == family)


def _lcma_splits(result, key):
    return result["studies"]["MNIST, uneven"]["table"][key]["bits_per_dim"]


def _by_model(result, key):
    row = next(row for row in result["rows"] if row["model"] == key)
    return row["bits_per_dim" if "bits_per_dim" in row else "elbo_bits_per_dim"]


def _vflow_toy(result, key):
    return result["summary"][key]["mean"]


# How to find a value in a result, and what it was measured on and with.
BENCHMARKS = {
    "vflow_toy": (_vflow_toy, "checkerboard, 100,000 steps"),
    "lcma_splits": (_lcma_splits, "MNIST at 16x16, 600 steps"),
    "lcma_families": (_lcma_families, "CIFAR-10 at 16x16, 600 steps"),
    "pnf": (_by_model, "MNIST at 32x32, 9,360 steps"),
    "vflow_images": (_by_model, "CIFAR-10, 8x8 crops, 1,500 steps"),
}


def ours(row: dict) -> tuple[str, str, str]:
    """Our value, what it was measured on, and the status of a row.

    `reproduced`: within the paper's error bar on the same data; `trend only`: measured, but at another scale or outside of the
    error bar; `not attempted`.
    """
    path = machine.RESULTS / f"paper_{row['benchmark']}.json"
    if not row["benchmark"] or not path.is_file():
        return "", "", "not attempted"
    find, budget = BENCHMARKS[row["benchmark"]]
    value = find(json.loads(path.read_text()), row["key"])
    paper, _, error = row["paper"].partition(" +- ")
    is_reproduced = bool(error) and abs(value - float(paper)) <= float(error)
    return f"{value:.3f}", budget, "reproduced" if is_reproduced else "trend only"


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
