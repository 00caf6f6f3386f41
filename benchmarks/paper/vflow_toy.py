"""The checkerboard experiment of VFlow: Glow against VFlow on 2-D data, in nats per point (rows C23 to C25 and figure 3).

Run as `python -m benchmarks.paper.vflow_toy [SEEDS [MODEL ...]]` from the repository's root. Each run's result is kept in
`results/paper_vflow_toy.json`, and runs found there are not repeated, but for those that the picture needs while there is none.
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

STEPS, BATCH, WIDTH, TEST_POINTS, IMPORTANCE_SAMPLES = 100_000, 64, 50, 10_000, 100
STEPS_PER_EXECUTION = 500
OPTIMUM = -math.log(32.0)


class Model(NamedTuple):
    """A model, and how it is trained."""

    dims: int
    steps: int  # a VFlow's last step is that of its posterior
    batch: int = BATCH
    samples: int = 1  # noise samples of the importance-weighted bound


MODELS = {"glow-2d-3": Model(2, 3), "vflow-10d-3": Model(10, 3), "glow-2d-20": Model(2, 20)}
MODELS |= {f"vflow-{dims}d-3": Model(dims, 3) for dims in (4, 6, 8)}
MODELS |= {f"{name}-batch-512": MODELS[name]._replace(batch=512) for name in ("vflow-10d-3", "glow-2d-3")}
MODELS |= {f"{name}-samples-8": MODELS[name]._replace(samples=8) for name in ("vflow-10d-3", "vflow-10d-3-batch-512")}
MODELS["vflow-10d-3-batch-4096"] = Model(10, 3, batch=4096)
PICTURE, PICTURED = machine.RESULTS / "paper_vflow_toy.png", ("glow-2d-3", "vflow-10d-3")
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
        return dimflows.recipes.glow([2], num_scales=1, depth=model.steps, width=WIDTH, seed=seed)
    extra, steps = model.dims - 2, model.steps - 1
    flow = dimflows.recipes.vflow_glow([2], num_extra=extra, depth=steps, posterior_depth=1, width=WIDTH, seed=seed)
    return flow.copy(num_samples=model.samples)


def train(name, seed):
    """A trained model and what to report of it."""
    keras.utils.set_random_seed(seed)
    settings = MODELS[name]
    model = dimflows.FlowModel(build(settings, seed), seed=seed)
    rate = keras.optimizers.schedules.CosineDecay(1e-3, STEPS, alpha=0.1)
    model.adapt(checkerboard(1000, [-3, seed]))
    model.compile(keras.optimizers.Adam(rate), steps_per_execution=STEPS_PER_EXECUTION)
    data = tf.data.Dataset.counter().map(lambda step: checkerboard(settings.batch, [seed, step])).prefetch(STEPS_PER_EXECUTION)
    start = time.perf_counter()
    model.fit(data, steps_per_epoch=STEPS, epochs=1, verbose=0)
    seconds = time.perf_counter() - start
    test = checkerboard(TEST_POINTS, [-1, seed])
    samples = IMPORTANCE_SAMPLES if name.startswith("vflow") else None
    log_prob = np.concatenate([model.log_prob(x, num_samples=samples, seed=seed) for x in tf.split(test, 10)])
    return model, {
        "model": name,
        "seed": seed,
        "nats": round(float(log_prob.mean()), 4),
        "parameters": sum(int(np.prod(v.shape)) for v in model.trainable_variables),
        "seconds": round(seconds, 1),
        "cpu": machine.describe()["cpu"],
    }


def stored():
    """The rows of the results so far."""
    path = machine.RESULTS / "paper_vflow_toy.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def summary(rows):
    """Mean and standard deviation over the seeds of every model."""
    result = {}
    for name in MODELS:
        nats = [row["nats"] for row in rows if row["model"] == name]
        if nats:
            result[name] = {"mean": round(np.mean(nats), 3), "std": round(np.std(nats), 3), "seeds": len(nats)}
            result[name]["paper"] = PAPER.get(name)
    return result


def save_picture(models):
    """The densities side by side."""
    from matplotlib import pyplot

    side = tf.linspace(-5.0, 5.0, 150)
    grid = tf.reshape(tf.stack(tf.meshgrid(side, -side), axis=-1), [-1, 2])
    figure, axes = pyplot.subplots(1, 1 + len(models), figsize=(4 * (1 + len(models)), 4.2), layout="constrained")
    points = checkerboard(20_000, [-2, 0]).numpy()
    axes[0].hist2d(*points.T, bins=100, range=[[-5, 5]] * 2, cmap="viridis", vmin=0.0)
    axes[0].set_title("data")
    for axis, (name, model) in zip(axes[1:], models.items()):
        samples = IMPORTANCE_SAMPLES if name.startswith("vflow") else None
        log_prob = np.concatenate([model.log_prob(x, num_samples=samples, seed=0) for x in tf.split(grid, 15)])
        axis.imshow(np.exp(log_prob).reshape(150, 150), extent=[-5, 5, -5, 5], cmap="viridis", vmin=0.0, vmax=2.0 / 32.0)
        axis.set_title(name)
    for axis in axes:
        axis.set_aspect("equal")
        axis.set_axis_off()
    figure.savefig(PICTURE, dpi=80)


def main():
    seeds, names = range(int(sys.argv[1]) if len(sys.argv) > 1 else 1), sys.argv[2:] or MODELS
    budget = {"steps": STEPS, "batch_size": BATCH, "optimizer": "Adam, 1e-3 to 1e-4 (cosine)", "test_points": TEST_POINTS}
    pictured = {}
    for seed in seeds:
        for name in names:
            is_pictured = seed == 0 and name in PICTURED and not PICTURE.is_file()
            if any((row["model"], row["seed"]) == (name, seed) for row in stored()) and not is_pictured:
                continue
            model, row = train(name, seed)
            rows = [other for other in stored() if (other["model"], other["seed"]) != (name, seed)] + [row]
            machine.write(
                "paper_vflow_toy", {"optimum": round(OPTIMUM, 4), "budget": budget, "summary": summary(rows), "rows": rows}
            )
            if is_pictured:
                pictured[name] = model
    if pictured:
        save_picture(pictured)


if __name__ == "__main__":
    main()
