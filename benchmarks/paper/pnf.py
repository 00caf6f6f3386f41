"""Dense MNIST, scaled up to 32x32: PNF against RealNVP with as many parameters and epochs.

Rows D1 and D2, the dense ones of MNIST in the paper's table 1. Run as `python -m benchmarks.paper.pnf` from the repository's
root; the runs go to `runs/paper_pnf`. A killed benchmark goes on from its last epoch when run again.
"""

import math

from benchmarks import machine
from benchmarks.paper import harness

SEEDS, EPOCHS, BATCH, IMAGE_SIZE = (0,), 20, 128, 32
COMMON = {"network": "dense", "num_levels": 1, "depth": 5, "num_blocks": 2}
MODELS = {
    "realnvp": ("realnvp", {"width": 512}),
    "pnf_fixed_range": ("pnf", {"width": 271, "adaptive_range": False}),
    "pnf": ("pnf", {"width": 271}),
}
PAPER = {"realnvp": ("D1", 4433.35, 1.754), "pnf_fixed_range": ("D2", 4857.89, 1.156), "pnf": ("D2", 4857.89, 1.156)}
DIMS, BASE_DIMS = IMAGE_SIZE**2, 8**2


def train(name, seed):
    recipe, arguments = MODELS[name]
    _, _, metrics = harness.train(
        recipe,
        harness.RUNS / "paper_pnf" / f"{name}-seed{seed}",
        "mnist",
        batch_size=BATCH,
        load={"image_size": IMAGE_SIZE},
        event_shape=[IMAGE_SIZE, IMAGE_SIZE, 1],
        grey_levels=256,
        epochs=EPOCHS,
        steps_per_epoch=60_000 // BATCH,
        arguments=COMMON | arguments,
        seed=seed,
    )
    return row(name, seed, metrics)


def row(name, seed, metrics):
    label, paper_nats, paper_bits = PAPER[name]
    # The log-density of images scaled to [0, 1], as the paper counts, and the constant of the halvings in it.
    nats = DIMS * math.log(256.0) - metrics["nll"]
    constant = 0.0 if name == "realnvp" else -(DIMS - BASE_DIMS) * math.log(2.0)
    return {
        "model": name,
        "seed": seed,
        "row": label,
        "parameters": metrics["parameters"],
        "seconds": metrics["seconds"],
        "nats": round(nats, 2),
        "bits_per_dim": round(metrics["bits_per_dim"], 4),
        "nats_without_constant": round(nats - constant, 2),
        "bits_per_dim_without_constant": round(8.0 - (nats - constant) / (DIMS * math.log(2.0)), 4),
        "paper_nats": paper_nats,
        "paper_bits_per_dim": paper_bits,
    }


def main():
    rows = [train(name, seed) for seed in SEEDS for name in MODELS]
    budget = {"epochs": EPOCHS, "batch_size": BATCH, "steps": EPOCHS * (60_000 // BATCH), "optimizer": "Adam, 1e-3"}
    machine.write("paper_pnf", {"data": f"MNIST, bilinear to {IMAGE_SIZE}x{IMAGE_SIZE}", "budget": budget, "rows": rows})


if __name__ == "__main__":
    main()
