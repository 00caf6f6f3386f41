"""Peak memory and time of a training step of Glow with `memory="keep"` and `"recompute"`, over depth.

Run as `python -m benchmarks.speed.recompute_memory` from the repository's root. Each measurement has a process of its own; one
with both models, which take turns, compares their times.
"""

import json
import subprocess
import sys
import time

import tensorflow as tf

import tfp_dimflows as dimflows
from benchmarks import machine
from benchmarks.speed import steps

DEPTHS, IMAGE, WIDTH, BATCH, STEPS = (8, 16, 32), [32, 32, 3], 64, 32, 5
MODES = ("keep", "recompute")


def training_step(depth, memory):
    return steps.training_step(dimflows.recipes.glow(IMAGE, num_levels=1, depth=depth, width=WIDTH, memory=memory), IMAGE)


def measure_memory(depth, memory):
    """MiB that the process grows by in the steps."""
    step = training_step(depth, memory)
    before = steps.peak_mib()
    for _ in range(STEPS):
        step(tf.random.stateless_normal([BATCH, *IMAGE], [0, 0]))
    return {f"{memory}_mib": steps.peak_mib() - before}


def measure_time(depth):
    """Seconds of a step, the least of several."""
    x, seconds = tf.random.stateless_normal([BATCH, *IMAGE], [0, 0]), {memory: [] for memory in MODES}
    models = {memory: training_step(depth, memory) for memory in MODES}
    for _ in range(STEPS + 1):
        for memory, step in models.items():
            start = time.perf_counter()
            step(x)[0].numpy()
            seconds[memory].append(time.perf_counter() - start)
    return {f"{memory}_seconds_per_step": min(times[1:]) for memory, times in seconds.items()}


def main():
    if len(sys.argv) > 1:
        depth, *memory = sys.argv[1:]
        print(json.dumps(measure_memory(int(depth), *memory) if memory else measure_time(int(depth))))
        return
    rows = []
    for depth in DEPTHS:
        row = {"depth": depth}
        for arguments in ([str(depth), "keep"], [str(depth), "recompute"], [str(depth)]):
            command = [sys.executable, "-m", "benchmarks.speed.recompute_memory", *arguments]
            row |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        row["memory_ratio"] = row["recompute_mib"] / row["keep_mib"]
        row["time_ratio"] = row["recompute_seconds_per_step"] / row["keep_seconds_per_step"]
        rows.append({key: round(value, 3) for key, value in row.items()})
    setting = {"image": IMAGE, "width": WIDTH, "batch_size": BATCH}
    machine.write("recompute_memory", {"setting": setting, "rows": rows})


if __name__ == "__main__":
    main()
