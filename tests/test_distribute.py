"""`fit` on several replicas and workers: what one device would have made of the same batches."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

# Each script runs in processes of its own, since TensorFlow's devices are set once.
MODEL = """
import json, sys
import numpy as np, tensorflow as tf, keras

def train(strategy, name, event_shape, grey_levels=None, **arguments):
    import tfp_dimflows as dimflows
    generator = np.random.default_rng(0)
    x = generator.normal(size=[64, *event_shape]).astype("float32") * 3.0 + 1.0
    x = x if grey_levels is None else generator.integers(0, grey_levels, [64, *event_shape]).astype("int32")
    data = tf.data.Dataset.from_tensor_slices(x).batch(16)
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = dimflows.FlowModel(dimflows.recipes.get(name)(event_shape, grey_levels=grey_levels, **arguments), seed=0)
        model.adapt(data, steps=4)
        model.compile(keras.optimizers.Adam(1e-2))
    losses = model.fit(data, epochs=2, verbose=0).history["loss"]
    return model, {
        "losses": losses,
        "evaluation": model.evaluate(data, verbose=0),
        "weights": [float(np.sum(np.abs(w))) for w in model.get_weights()],
        "sample": model.sample(2, seed=1).numpy().tolist(),
    }
"""

MIRRORED = """
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
results = []
for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
    results.append([train(strategy, "glow", [4, 4, 1], depth=1, width=4)[1], train(strategy, "maf", [3], depth=1)[1]])
maf = train(strategy, "maf", [3], depth=1)[0]
x = np.random.default_rng(1).normal(size=[17, 3]).astype("float32")
uneven = [maf.evaluate(x, batch_size=16, verbose=0), -np.mean(maf.log_prob(x)).item()]
uneven += maf.fit(x, batch_size=16, verbose=0).history["loss"]
model, noisy = train(strategy, "nice", [3], grey_levels=9)
seeds = strategy.experimental_local_results(strategy.run(tf.function(model._next_seed)))
seeds = [s.numpy().tolist() for s in seeds]
print(json.dumps({"one": results[0], "two": results[1], "uneven": uneven, "noisy": noisy["losses"], "seeds": seeds}))
"""

WORKER = """
strategy = tf.distribute.MultiWorkerMirroredStrategy()
print(json.dumps(train(strategy, "maf", [3], depth=1)[1]))
"""


def start(script, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", MODEL + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def assert_same(actual, expected):
    for key in ("losses", "evaluation", "weights", "sample"):
        np.testing.assert_allclose(actual[key], expected[key], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def mirrored():
    return finish(start(MIRRORED))


def test_two_replicas_train_as_one_device_does(mirrored):
    for two, one in zip(mirrored["two"], mirrored["one"]):
        assert_same(two, one)
        assert one["losses"][1] < one["losses"][0]


def test_replicas_draw_different_noise(mirrored):
    first, second = mirrored["seeds"]
    assert first != second
    assert np.isfinite(mirrored["noisy"]).all()


def test_a_replica_may_have_none_of_the_last_batch(mirrored):
    evaluation, expected, loss = mirrored["uneven"]
    np.testing.assert_allclose(evaluation, expected, rtol=1e-4)
    assert np.isfinite(loss)


def test_two_workers_train_as_one_device_does(mirrored):
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            ports.append(free.getsockname()[1])
    cluster = {"worker": [f"localhost:{port}" for port in ports]}
    configs = [json.dumps({"cluster": cluster, "task": {"type": "worker", "index": k}}) for k in range(2)]
    for worker in [start(WORKER, TF_CONFIG=config) for config in configs]:
        assert_same(finish(worker), mirrored["one"][1])
