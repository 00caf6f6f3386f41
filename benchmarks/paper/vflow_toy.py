"""The checkerboard experiment of VFlow: Glow against VFlow on 2-D data, in nats per point (rows C23 to C25 and figure 3).

Run as `python -m benchmarks.paper.vflow_toy [SEEDS [MODEL ...]]` from the repository's root. What is done is kept in `runs/`,
and not repeated. A result replaces that of the same model and seed in `results/paper_vflow_toy.json`.
"""

import json
import math
import sys
import time
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import tfp_dimflows as dimflows
from benchmarks import machine
from benchmarks.paper import harness

STEPS, BATCH, WIDTH, TEST_POINTS, IMPORTANCE_SAMPLES = 100_000, 64, 50, 10_000, 100
STEPS_PER_EXECUTION = 500
RUNS = harness.RUNS / "paper_vflow_toy"
OPTIMUM = -math.log(32.0)


class Model(NamedTuple):
    """A model, and how it is trained."""

    dims: int
    steps: int  # a VFlow's last step is that of its posterior
    batch: int = BATCH
    samples: int = 1  # noise samples of the importance-weighted bound
    iterations: int = STEPS


MODELS = {"glow-2d-3": Model(2, 3), "vflow-10d-3": Model(10, 3), "glow-2d-20": Model(2, 20)}
MODELS["glow-2d-5"] = Model(2, 5)  # about as many parameters as a VFlow of 10 dimensions and 3 steps
MODELS |= {f"vflow-{dims}d-3": Model(dims, 3) for dims in (4, 6, 8)}
MODELS |= {f"{name}-batch-512": model._replace(batch=512) for name, model in MODELS.items() if name != "glow-2d-20"}
MODELS |= {f"{name}-samples-8": MODELS[name]._replace(samples=8) for name in ("vflow-10d-3", "vflow-10d-3-batch-512")}
MODELS |= {"vflow-10d-3-batch-4096": Model(10, 3, batch=4096), "vflow-10d-3-steps-400k": Model(10, 3, iterations=400_000)}
PICTURED = ("glow-2d-3", "vflow-10d-3")
PAPER = {"vflow-10d-3": "-3.51 +- 0.01", "glow-2d-3": "-3.67 +- 0.03", "glow-2d-20": "-3.54 +- 0.05"}


def checkerboard(num, seed):
    """`[num, 2]` points, uniform on eight squares of side 2 in [-4, 4]^2: density 1/32 there."""
    u = tf.random.stateless_uniform([3, num], seed)
    x = 4.0 * u[0] - 2.0
    y = u[1] - 2.0 * tf.floor(2.0 * u[2]) + tf.math.floormod(tf.floor(x), 2.0)
    return 2.0 * tf.stack([x, y], axis=-1)


def build(model, seed):
    """The distribution of a model."""
    if model.dims == 2:
        return dimflows.recipes.glow([2], num_levels=1, depth=model.steps, width=WIDTH, seed=seed)
    extra, steps = model.dims - 2, model.steps - 1
    flow = dimflows.recipes.vflow_glow([2], num_extra=extra, depth=steps, posterior_depth=1, width=WIDTH, seed=seed)
    return flow.copy(num_samples=model.samples)


def log_prob(name, model, x, seed):
    """The log-density of points, of a VFlow with importance samples."""
    samples = IMPORTANCE_SAMPLES if name.startswith("vflow") else None
    return np.concatenate([model.log_prob(part, num_samples=samples, seed=seed) for part in tf.split(x, 10)])


def train(name, seed):
    """A trained model and what to report of it."""
    keras.utils.set_random_seed(seed)
    settings = MODELS[name]
    model = dimflows.FlowModel(build(settings, seed), seed=seed)
    rate = keras.optimizers.schedules.CosineDecay(1e-3, settings.iterations, alpha=0.1)
    model.adapt(checkerboard(1000, [-3, seed]))
    model.compile(keras.optimizers.Adam(rate), steps_per_execution=STEPS_PER_EXECUTION)
    data = tf.data.Dataset.counter().map(lambda step: checkerboard(settings.batch, [seed, step])).prefetch(STEPS_PER_EXECUTION)
    options = tf.data.Options()
    options.autotune.enabled = False  # its thread, asleep, can hold up the end of `fit`
    data = data.with_options(options)
    start = time.perf_counter()
    model.fit(data, steps_per_epoch=settings.iterations, epochs=1, verbose=0)
    seconds = time.perf_counter() - start
    test = checkerboard(TEST_POINTS, [-1, seed])
    return model, {
        "model": name,
        "seed": seed,
        "batch_size": settings.batch,
        "noise_samples": settings.samples,
        "steps": settings.iterations,
        "nats": round(float(log_prob(name, model, test, seed).mean()), 4),
        "parameters": sum(int(np.prod(v.shape)) for v in model.trainable_variables),
        "seconds": round(seconds, 1),
        "cpu": machine.describe()["cpu"],
    }


def summary(rows):
    """Mean and standard deviation over the seeds of every model."""
    result = {}
    for name in MODELS:
        nats = [row["nats"] for row in rows if row["model"] == name]
        if nats:
            result[name] = {"mean": round(np.mean(nats), 3), "std": round(np.std(nats), 3), "seeds": len(nats)}
            result[name]["paper"] = PAPER.get(name)
    return result


def density(name, model):
    """The density of a model on a grid."""
    side = tf.linspace(-5.0, 5.0, 150)
    grid = tf.reshape(tf.stack(tf.meshgrid(side, -side), axis=-1), [-1, 2])
    return np.exp(log_prob(name, model, grid, 0)).reshape(150, 150)


def save_picture(densities):
    """The densities side by side."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 1 + len(densities), figsize=(4 * (1 + len(densities)), 4.2), layout="constrained")
    points = checkerboard(20_000, [-2, 0]).numpy()
    axes[0].hist2d(*points.T, bins=100, range=[[-5, 5]] * 2, cmap="viridis", vmin=0.0)
    axes[0].set_title("data")
    for axis, (name, values) in zip(axes[1:], densities.items()):
        axis.imshow(values, extent=[-5, 5, -5, 5], cmap="viridis", vmin=0.0, vmax=2.0 / 32.0)
        axis.set_title(name)
    for axis in axes:
        axis.set_aspect("equal")
        axis.set_axis_off()
    figure.savefig(machine.RESULTS / "paper_vflow_toy.png", dpi=80)


def main():
    seeds, names = range(int(sys.argv[1]) if len(sys.argv) > 1 else 1), sys.argv[2:] or MODELS
    path = machine.RESULTS / "paper_vflow_toy.json"
    budget = {"steps": STEPS, "batch_size": BATCH, "optimizer": "Adam, 1e-3 to 1e-4 (cosine)", "test_points": TEST_POINTS}
    RUNS.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for name in names:
            done = RUNS / f"{name}-seed{seed}.json"
            if done.is_file():
                continue
            model, row = train(name, seed)
            # Read only now, since another process may have written meanwhile.
            rows = json.loads(path.read_text())["rows"] if path.is_file() else []
            rows = [other for other in rows if (other["model"], other["seed"]) != (name, seed)] + [row]
            machine.write(
                "paper_vflow_toy", {"optimum": round(OPTIMUM, 4), "budget": budget, "summary": summary(rows), "rows": rows}
            )
            if seed == 0 and name in PICTURED:
                np.save(RUNS / f"{name}.npy", density(name, model))
                files = {name: RUNS / f"{name}.npy" for name in PICTURED}
                if all(file.is_file() for file in files.values()):
                    save_picture({name: np.load(file) for name, file in files.items()})
            done.write_text(json.dumps(row))


if __name__ == "__main__":
    main()
