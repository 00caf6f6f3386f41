"""Cost of a training step with LCMA's factorization, and with principal components, relative to the conventional one, in turns.

Run as `python -m benchmarks.speed.lcma_overhead` from the repository's root.
"""

import statistics
import time

import keras
import numpy as np

import tfp_dimflows as dimflows
from benchmarks import machine

SHAPE, BATCH, STEPS = [32, 32, 3], 32, 30
ARGUMENTS = {"num_levels": 3, "depth": 3, "width": 32, "num_blocks": 1, "grey_levels": 256}


def model(factorization):
    flow = dimflows.FlowModel(dimflows.recipes.realnvp(SHAPE, factorization=factorization, **ARGUMENTS), seed=0)
    flow.compile(keras.optimizers.Adam(1e-4))
    return flow


def main():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, [BATCH, *SHAPE]).astype("uint8")
    contributions = generator.normal(size=[ARGUMENTS["num_levels"] - 1, *SHAPE])
    from_contributions = dimflows.bijectors.DimensionFactorization.from_contributions
    models = {
        "conventional": model("conventional"),
        "channels": model("channels"),
        "principal": model("principal"),
        "lcma_block": model(from_contributions(contributions, granularity="block")),
        "lcma_channel": model(from_contributions(contributions, granularity="channel")),
        "nothing_leaves": model(None),
    }
    times, first = {name: [] for name in models}, {}
    for name, flow in models.items():
        start = time.perf_counter()
        flow.train_on_batch(images)
        first[name] = time.perf_counter() - start
        flow.train_on_batch(images)
    for _ in range(STEPS):
        for name, flow in models.items():
            start = time.perf_counter()
            flow.train_on_batch(images)
            times[name].append(time.perf_counter() - start)
    rows = {
        name: {
            "parameters": sum(int(np.prod(v.shape)) for v in models[name].trainable_variables),
            "step_ms_median": round(1e3 * statistics.median(seconds), 1),
            "ratio_to_conventional": round(statistics.median(t / c for t, c in zip(seconds, times["conventional"])), 3),
            "first_step_s": round(first[name], 1),
        }
        for name, seconds in times.items()
    }
    machine.write("lcma_overhead", {"shape": SHAPE, "batch": BATCH, "steps": STEPS, "recipe": ARGUMENTS, "rows": rows})


if __name__ == "__main__":
    main()
