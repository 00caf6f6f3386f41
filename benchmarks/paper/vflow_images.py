"""Flow++ against VFlow with as many parameters and steps, on 8x8 crops of CIFAR-10 (after table 2: rows C16 to C18).

Run as `python -m benchmarks.paper.vflow_images [SEEDS]` from the repository's root; the runs go to `runs/paper_vflow_images`.
A killed benchmark goes on from its last epoch when run again.
"""

import csv
import sys

from benchmarks import machine
from benchmarks.paper import harness

EPOCHS, STEPS_PER_EPOCH, BATCH, CROP, LEARNING_RATE = 5, 300, 64, (12, 12, 8, 8), 1e-3
COMMON = {"width": 24, "num_components": 4, "noise_depth": 2, "noise_blocks": 1, "context_blocks": 1}
MODELS = {
    "flowpp-3-channel": ("flowpp", {"num_blocks": 5, "layout": ["2 column", "squeeze", "2 channel", "2 column"]}),
    "vflow-4-channel": (
        "vflow",
        {
            "num_extra": 1,
            "num_blocks": 4,
            "layout": ["2 column", "2 channel", "squeeze", "2 channel"],
            "posterior_depth": 2,
            "posterior_blocks": 2,
        },
    ),
    "vflow-6-channel": (
        "vflow",
        {
            "num_extra": 3,
            "num_blocks": 3,
            "layout": ["2 column", "1 channel", "squeeze", "1 column", "2 channel"],
            "posterior_depth": 2,
            "posterior_blocks": 1,
        },
    ),
}
PAPER = {"flowpp-3-channel": ("C16", 3.23), "vflow-4-channel": ("C17", 3.16), "vflow-6-channel": ("C18", 3.13)}


def train(name, seed):
    recipe, arguments = MODELS[name]
    directory = harness.RUNS / "paper_vflow_images" / f"{name}-seed{seed}"
    _, _, metrics = harness.train(
        recipe,
        directory,
        "cifar10",
        batch_size=BATCH,
        load={"crop": CROP},
        event_shape=[*CROP[2:], 3],
        grey_levels=256,
        epochs=EPOCHS,
        steps_per_epoch=STEPS_PER_EPOCH,
        arguments=COMMON | arguments,
        learning_rate=LEARNING_RATE,
        seed=seed,
    )
    with (directory / "history.csv").open(newline="") as file:
        curve = [round(float(row["val_bits_per_dim"]), 4) for row in csv.DictReader(file)]
    label, paper = PAPER[name]
    return {
        "model": name,
        "seed": seed,
        "row": label,
        "parameters": metrics["parameters"],
        "seconds": metrics["seconds"],
        "elbo_bits_per_dim": round(metrics["bits_per_dim"], 4),
        "curve": curve,
        "paper_bits_per_dim": paper,
    }


def main():
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    rows = [train(name, seed) for seed in seeds for name in MODELS]
    budget = {"steps": EPOCHS * STEPS_PER_EPOCH, "steps_per_epoch": STEPS_PER_EPOCH, "batch_size": BATCH}
    budget |= {"optimizer": f"Adam, {LEARNING_RATE}"}
    machine.write("paper_vflow_images", {"data": "CIFAR-10, central 8x8 crops", "budget": budget, "rows": rows})


if __name__ == "__main__":
    main()
