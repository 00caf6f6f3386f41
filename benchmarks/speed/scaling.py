"""Glow over batch size, image size, depth and factorization: time to the first step, images per second, and the data pipeline.

Run as `python -m benchmarks.speed.scaling` from the repository's root. Each model has a process of its own; for the steps they
take turns.
"""

import json
import statistics
import sys
import time

import keras
import tensorflow as tf

import tfp_dimflows as dimflows
from benchmarks import machine
from benchmarks.speed import turns

BASE = {"size": 32, "batch": 32, "depth": 8, "factorization": "conventional", "grappler": True}
CHANGES = (
    *({"depth": depth} for depth in (8, 16, 32)),
    *({"depth": depth, "grappler": False} for depth in (8, 32)),
    *({"batch": batch} for batch in (8, 128)),
    *({"size": size} for size in (16, 64)),
    {"factorization": None},
)
FLOW = {"num_levels": 3, "width": 64}
ROUNDS, STEPS, BATCHES = 9, 3, 500


def seconds_of(function):
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def answer(size, batch, depth, factorization, grappler):
    """Builds, traces and trains a model, as it is told: seconds until things are there, and of a step."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not grappler})
    shape, made = [size, size, 3], []
    flow = {**FLOW, "depth": depth, "factorization": factorization}
    x = tf.random.stateless_normal([batch, *shape], [0, 0])

    def build():
        made.append(dimflows.FlowModel(dimflows.recipes.glow(shape, **flow), seed=0))
        made[0].compile(keras.optimizers.Adam(1e-4))

    def train():
        for _ in range(STEPS):
            made[0].train_on_batch(x)

    def respond(question):
        if question == "build":
            return {"construct_s": seconds_of(build)}
        if question == "first step":
            return {"first_step_s": seconds_of(lambda: made[0].train_on_batch(x))}
        if question == "trace":
            return traced(made[0], x)
        return {"step_ms": 1e3 * seconds_of(train) / STEPS}

    turns.answer(respond)


def traced(model, x):
    """Seconds to trace, and the operations, of the loss, of its gradients, and of the optimizer's step."""
    variables = [v.value for v in model.trainable_variables]

    def loss(x):
        return -tf.reduce_mean(model.distribution.log_prob(x))

    def gradients(x):
        with tf.GradientTape() as tape:
            value = loss(x)
        return tape.gradient(value, variables)

    def update(x):
        model.optimizer.apply(gradients(x), model.trainable_variables)

    row = {"variables": len(variables)}
    for function in (loss, gradients, update):
        start = time.perf_counter()
        graph = tf.function(function, autograph=False).get_concrete_function(x).graph
        row[f"trace_{function.__name__}_s"] = time.perf_counter() - start
        bodies = graph.as_graph_def().library.function
        row[f"operations_{function.__name__}"] = len(graph.get_operations()) + sum(len(body.node_def) for body in bodies)
    return row


def pipeline():
    """Images per second that the data pipeline alone delivers: CIFAR-10, shuffled, in batches."""
    batches = dimflows.data.load("cifar10", "train", batch_size=BASE["batch"]).repeat().take(BATCHES).as_numpy_iterator()
    next(batches)
    return BASE["batch"] * (BATCHES - 1) / seconds_of(lambda: [*batches])


def main():
    if len(sys.argv) > 1:
        answer(**json.loads(sys.argv[1]))
        return
    settings = [BASE | change for change in CHANGES]
    models = [turns.Contender("benchmarks.speed.scaling", json.dumps(setting)) for setting in settings]
    rows = []
    for setting, model in zip(settings, models):
        rows.append(setting | model.ask("build") | model.ask("first step") | model.ask("trace"))
        print(rows[-1], flush=True)
    times = [[model.ask("step")["step_ms"] for model in models] for _ in range(1 + ROUNDS)][1:]
    for k, (row, model) in enumerate(zip(rows, models)):
        model.end()
        row["step_ms"] = statistics.median(one[k] for one in times)
        row["step_ratio"] = statistics.median(one[k] / one[0] for one in times)
        row["images_per_s"] = 1e3 * row["batch"] / row["step_ms"]
    rows = [{key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    machine.write("speed_scaling", {"recipe": FLOW, "pipeline_images_per_s": round(pipeline()), "rows": rows})


if __name__ == "__main__":
    main()
