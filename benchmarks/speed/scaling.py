"""Glow over batch size, image size, depth and factorization: time to the first step, images per second, and the data pipeline.

Run as `python -m benchmarks.speed.scaling` from the repository's root. Each model has a process of its own.
"""

import json
import statistics
import subprocess
import sys
import time

import keras
import tensorflow as tf

import tfp_dimflows as dimflows
from benchmarks import machine

BASE = {"size": 32, "batch": 32, "depth": 8, "factorization": "conventional", "grappler": True}
CHANGES = (
    *({"depth": depth} for depth in (8, 16, 32)),
    *({"depth": depth, "grappler": False} for depth in (8, 32)),
    *({"batch": batch} for batch in (8, 128)),
    *({"size": size} for size in (16, 64)),
    {"factorization": None},
)
FLOW = {"num_scales": 3, "width": 64}
STEPS, BATCHES = 15, 500


def seconds_of(function):
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(size, batch, depth, factorization, grappler):
    """Seconds until things are there, the median of a training step, and what it makes of the batch."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not grappler})
    shape, made = [size, size, 3], []
    flow = {**FLOW, "depth": depth, "factorization": factorization}
    construct = seconds_of(lambda: made.append(dimflows.FlowModel(dimflows.recipes.glow(shape, **flow), seed=0)))
    model, x = made[0], tf.random.stateless_normal([batch, *shape], [0, 0])
    variables = [v.value for v in model.trainable_variables]
    optimizer = keras.optimizers.Adam(1e-4)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer)

    def loss(x):
        return -tf.reduce_mean(model.distribution.log_prob(x))

    def gradients(x):
        with tf.GradientTape() as tape:
            value = loss(x)
        return tape.gradient(value, variables)

    def update(x):
        optimizer.apply(gradients(x), model.trainable_variables)

    row = {"construct_s": construct}
    for function in (loss, gradients, update):
        start = time.perf_counter()
        graph = tf.function(function, autograph=False).get_concrete_function(x).graph
        row[f"trace_{function.__name__}_s"] = time.perf_counter() - start
        row[f"operations_{function.__name__}"] = len(graph.get_operations())
    row["first_step_s"] = seconds_of(lambda: model.train_on_batch(x))
    model.train_on_batch(x)
    step = statistics.median(seconds_of(lambda: model.train_on_batch(x)) for _ in range(STEPS))
    return row | {"variables": len(variables), "step_ms": 1e3 * step, "images_per_s": batch / step}


def pipeline():
    """Images per second that the data pipeline alone delivers: CIFAR-10, shuffled, in batches."""
    batches = dimflows.data.load("cifar10", "train", batch_size=BASE["batch"]).repeat().take(BATCHES).as_numpy_iterator()
    next(batches)
    return BASE["batch"] * (BATCHES - 1) / seconds_of(lambda: [*batches])


def main():
    if len(sys.argv) > 1:
        print(json.dumps(measure(**json.loads(sys.argv[1]))))
        return
    rows = []
    for change in CHANGES:
        command = [sys.executable, "-m", "benchmarks.speed.scaling", json.dumps(BASE | change)]
        measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        rows.append(BASE | change | {key: round(value, 2) for key, value in measured.items()})
    machine.write("speed_scaling", {"recipe": FLOW, "pipeline_images_per_s": round(pipeline()), "rows": rows})


if __name__ == "__main__":
    main()
