"""Peak memory of a training step of residual blocks, with `memory="keep"` and `"recompute"`, over depth.

Run as `python -m benchmarks.speed.residual_memory` from the repository's root. Each measurement has a process of its own.
"""

import json
import subprocess
import sys
import time

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

import tfp_dimflows as dimflows
from benchmarks import machine
from benchmarks.speed import steps

tfd = tfp.distributions

DEPTHS, IMAGE, WIDTH, BATCH, STEPS = (2, 4, 8, 16), [16, 16, 3], 64, 128, 3


def measure(depth, memory):
    """MiB that the process grows by, and seconds, of the steps."""
    dfb = dimflows.bijectors
    blocks = [
        dfb.InvertibleResidual(
            dimflows.networks.lipschitz_conv(IMAGE, WIDTH, seed=k),
            dfb.residual.RussianRoulette(num_exact_evaluation=2),
            event_ndims=3,
            memory=memory,
        )
        for k in range(depth)
    ]
    flow = dfb.Multiscale([dfb.Chain(blocks)], event_shape=IMAGE)
    distribution = tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [int(np.prod(IMAGE))]), flow)
    step = steps.training_step(distribution, IMAGE)
    before = steps.peak_mib()
    x = tf.random.stateless_normal([BATCH, *IMAGE], [0, 0])
    start = time.perf_counter()
    for _ in range(STEPS):
        step(x)
    seconds = time.perf_counter() - start
    return {"mib": steps.peak_mib() - before, "seconds_per_step": seconds / STEPS}


def main():
    if len(sys.argv) == 3:
        print(json.dumps(measure(int(sys.argv[1]), sys.argv[2])))
        return
    rows = []
    for depth in DEPTHS:
        row = {"depth": depth}
        for memory in ("keep", "recompute"):
            command = [sys.executable, "-m", "benchmarks.speed.residual_memory", str(depth), memory]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            row |= {f"{memory}_{key}": round(value, 2) for key, value in result.items()}
        row["memory_ratio"] = round(row["recompute_mib"] / row["keep_mib"], 3)
        row["time_ratio"] = round(row["recompute_seconds_per_step"] / row["keep_seconds_per_step"], 3)
        rows.append(row)
    setting = {"image": IMAGE, "width": WIDTH, "batch_size": BATCH}
    machine.write("residual_memory", {"setting": setting, "rows": rows})


if __name__ == "__main__":
    main()
