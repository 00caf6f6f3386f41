"""Where the time of a training step of Glow goes, by kind of operation, and how far it is from the arithmetic.

Run as `python -m benchmarks.speed.step_profile` from the repository's root. On one thread, so that times add up.
"""

import collections
import glob
import statistics
import tempfile
import time

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks import machine
from benchmarks.speed import peers

SIZES, REPEATS, SHOWN = peers.TASKS["glow"], 15, 12


def median_seconds(function):
    """Of a call, after two that trace and compile."""
    seconds = []
    for _ in range(2 + REPEATS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def flops():
    """Multiplications and additions of the couplings' convolutions, of one evaluation of the log-probability."""
    total, (height, width, channels), hidden = 0, SIZES["shape"], SIZES["width"]
    for _ in range(SIZES["levels"]):
        height, width, channels = height // 2, width // 2, 4 * channels
        weights = 9 * channels // 2 * hidden + hidden * hidden + 9 * hidden * channels
        total += 2 * SIZES["batch"] * SIZES["depth"] * height * width * weights
        channels //= 2
    return total


def convolution_rate():
    """Operations per second of one large convolution and its gradients: 64 to 64 channels, 3x3, 32x32 positions."""
    x, kernel = tf.random.normal([32, 32, 32, 64]), tf.random.normal([3, 3, 64, 64])

    @tf.function
    def gradients(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = tf.nn.conv2d(x, kernel, 1, "SAME")
        return [g[0, 0, 0] for g in tape.gradient(y, [x, kernel], y)]

    return 3 * 2 * 32 * 32 * 32 * 9 * 64 * 64 / median_seconds(lambda: gradients(x, kernel)[1].numpy())


def kinds(function):
    """Milliseconds and number of all operations of a kind in one call."""
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            function()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        with open(path, "rb") as file:
            space = xplane_pb2.XSpace.FromString(file.read())
    times, numbers = collections.Counter(), collections.Counter()
    for plane in space.planes:
        for event in (event for line in plane.lines for event in line.events):
            name, kind = (part.strip() for part in plane.event_metadata[event.metadata_id].name.partition(":")[::2])
            if name and kind and not kind.startswith((":", "__")):  # "name:kind" is an operation
                times[kind] += event.duration_ps / 1e9
                numbers[kind] += 1
    return [{"kind": kind, "ms": round(ms, 2), "number": numbers[kind]} for kind, ms in times.most_common(SHOWN)]


def main():
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    functions, parameters = peers.tensorflow(peers.ours("glow", SIZES), SIZES["batch"], SIZES["shape"], False)
    rows = {}
    rate = convolution_rate()
    for name, evaluations in (("step", 3), ("log_prob", 1)):
        seconds = median_seconds(functions[name])
        rows[name] = {
            "ms": round(1e3 * seconds, 1),
            "arithmetic_ms": round(1e3 * evaluations * flops() / rate, 1),
            "kinds": kinds(functions[name]),
        }
    machine.write(
        "speed_profile",
        {"sizes": SIZES, "parameters": parameters, "convolution_gflop_per_s": round(rate / 1e9, 1), "rows": rows},
    )


if __name__ == "__main__":
    main()
