"""LCMA against the conventional factorization on four families of flows (after table 2: rows B9 to B16), CIFAR-10 at 16x16.

Run as `python -m benchmarks.paper.lcma_families [SEEDS]` from the repository's root; the runs go to `runs/paper_lcma_families`.
A killed benchmark goes on from its last epoch when run again.
"""

import statistics
import sys

import numpy as np

import tfp_dimflows as dimflows
from benchmarks import machine
from benchmarks.paper import harness

IMAGE_SIZE, EPOCHS, STEPS_PER_EPOCH, BATCH = 16, 2, 300, 64
FAMILIES = {
    "realnvp": {"num_levels": 2, "depth": 2, "width": 16, "num_blocks": 1},
    "glow": {"num_levels": 2, "depth": 4, "width": 32},
    "iresnet": {"num_levels": 2, "depth": 3, "width": 32},
    "residual-flow": {"num_levels": 2, "depth": 3, "width": 32},
}
KINDS = ("lcma_block", "lcma_channel", "lcma_channel_low_stays")
PAPER_GAIN = {"realnvp": 0.06, "glow": 0.04, "iresnet": 0.05, "residual-flow": 0.03}


def train(family, seed):
    """Test bits/dim of the four factorizations, parameters, and how far the ranking can be trusted."""
    directory = harness.RUNS / "paper_lcma_families" / f"{family}-seed{seed}"

    def run(recipe, where, arguments):
        _, _, metrics = harness.train(
            recipe,
            where,
            "cifar10",
            batch_size=BATCH,
            load={"image_size": IMAGE_SIZE},
            event_shape=[IMAGE_SIZE, IMAGE_SIZE, 3],
            grey_levels=256,
            epochs=EPOCHS,
            steps_per_epoch=STEPS_PER_EPOCH,
            pretrain_epochs=EPOCHS,
            arguments=FAMILIES[family] | arguments,
            seed=seed,
        )
        return metrics

    block = run(f"lcma-{family}", directory / "block", {"granularity": "block"})
    with np.load(directory / "block" / "contributions.npz") as stored:
        contributions, error = stored["factor_out_0"], stored["standard_error_0"]
    by_channel = {}
    for keep, name in (("high", "channel"), ("low", "channel-low")):
        split = dimflows.bijectors.DimensionFactorization.from_contributions([contributions], keep, "channel")
        by_channel[keep] = run(family, directory / name, {"factorization": split.get_config()})
    blocks = contributions.reshape(IMAGE_SIZE // 2, 2, IMAGE_SIZE // 2, 2, 3)
    return {
        "family": family,
        "seed": seed,
        "parameters": block["parameters"],
        "seconds": [run["seconds"] for run in (block, *by_channel.values())],
        "conventional": round(block["parts"]["conventional"]["bits_per_dim"], 4),
        "lcma_block": round(block["bits_per_dim"], 4),
        "lcma_channel": round(by_channel["high"]["bits_per_dim"], 4),
        "lcma_channel_low_stays": round(by_channel["low"]["bits_per_dim"], 4),
        "contribution_spread_in_blocks": float(f"{blocks.std(axis=(1, 3)).mean():.3g}"),
        "contribution_standard_error": float(f"{error.mean():.3g}"),
    }


def gain(rows, kind):
    """Mean and standard error over the seeds of conventional minus LCMA, trained from the same seed."""
    gains = [row["conventional"] - row[kind] for row in rows]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
    return {"mean": round(statistics.mean(gains), 4), "standard_error": error and round(error, 4)}


def main():
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    rows = [train(family, seed) for seed in seeds for family in FAMILIES]
    gains = {}
    for family in FAMILIES:
        own = [row for row in rows if row["family"] == family]
        gains[family] = {kind: gain(own, kind) for kind in KINDS} | {"paper": PAPER_GAIN[family]}
    budget = {"steps": EPOCHS * STEPS_PER_EPOCH, "pretraining_steps": EPOCHS * STEPS_PER_EPOCH, "batch_size": BATCH}
    budget |= {"optimizer": "Adam, 1e-3", "seeds": len(seeds)}
    data = f"CIFAR-10 at {IMAGE_SIZE}x{IMAGE_SIZE}"
    machine.write("paper_lcma_families", {"data": data, "budget": budget, "recipes": FAMILIES, "gains": gains, "rows": rows})


if __name__ == "__main__":
    main()
