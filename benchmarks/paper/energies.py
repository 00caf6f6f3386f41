"""Planar and radial flows fitted to the energies U1 to U4 of Rezende and Mohamed (2015), with `tfp.vi`.

The paper has pictures and no numbers. Run as `python -m benchmarks.paper.energies` from the repository's root. Finished fits
are kept in `runs/paper_energies` and not done again.
"""

import json
import pathlib
import time

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras

import tfp_dimflows as dimflows
from benchmarks import machine

dfb, tfd = dimflows.bijectors, tfp.distributions

STEPS, BATCH, LEARNING_RATE, SEED = 6_000, 100, 5e-3, 0
LENGTHS = (2, 8, 32)
TEST_SAMPLES, EDGE, CELLS = 20_000, 5.5, 300
RUNS = pathlib.Path("runs/paper_energies")


def w1(z):
    return tf.sin(2.0 * np.pi * z[..., 0] / 4.0)


def w2(z):
    return 3.0 * tf.exp(-0.5 * tf.square((z[..., 0] - 1.0) / 0.6))


def w3(z):
    return 3.0 * tf.sigmoid((z[..., 0] - 1.0) / 0.3)


def bump(x, width):
    return -0.5 * tf.square(x / width)


def wall(z):
    """Keeps U2 to U4, which are constant along valleys without end, to about |z_1| < 4."""
    return 0.5 * tf.square(tf.nn.relu(tf.abs(z[..., 0]) - 4.0) / 0.1)


ENERGIES = {
    "U1": lambda z: (
        -bump(tf.norm(z, axis=-1) - 2.0, 0.4) - tfp.math.log_add_exp(bump(z[..., 0] - 2.0, 0.6), bump(z[..., 0] + 2.0, 0.6))
    ),
    "U2": lambda z: -bump(z[..., 1] - w1(z), 0.4) + wall(z),
    "U3": lambda z: -tfp.math.log_add_exp(bump(z[..., 1] - w1(z), 0.35), bump(z[..., 1] - w1(z) + w2(z), 0.35)) + wall(z),
    "U4": lambda z: -tfp.math.log_add_exp(bump(z[..., 1] - w1(z), 0.4), bump(z[..., 1] - w1(z) + w3(z), 0.35)) + wall(z),
}


def grid():
    """`[CELLS, CELLS, 2]` centres of cells; the second coordinate falls from row to row, as in a picture."""
    centers = ((np.arange(CELLS) + 0.5) / CELLS * 2.0 - 1.0) * EDGE
    x, y = np.meshgrid(centers, centers[::-1])
    return tf.constant(np.stack([x, y], axis=-1), tf.float32)


def log_normaliser(energy):
    """log of the integral of exp(-U)."""
    cell = (2.0 * EDGE / CELLS) ** 2
    return float(tf.reduce_logsumexp(-energy(grid()))) + np.log(cell)


def surrogate(family, length):
    flows = [family(2, seed=100 * SEED + k) for k in range(length)]
    base = tfd.MultivariateNormalDiag(
        tf.Variable([0.0, 0.0]), tfp.util.TransformedVariable([1.0, 1.0], tfp.bijectors.Softplus())
    )
    return tfd.TransformedDistribution(base, dfb.Chain(flows))


def fit(family, length, name):
    """What to report of a fit, and its density on the grid."""
    path = RUNS / f"{name}-{family.__name__}-{length}.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        row, density = _fit(family, length, name)
        np.savez(path, row=json.dumps(row), density=density)
    with np.load(path) as stored:
        return json.loads(str(stored["row"])), stored["density"]


def _fit(family, length, name):
    start = time.perf_counter()
    energy = ENERGIES[name]
    posterior = surrogate(family, length)
    schedule = tf_keras.optimizers.schedules.CosineDecay(LEARNING_RATE, STEPS)
    tfp.vi.fit_surrogate_posterior(
        lambda z: -energy(z),
        posterior,
        tf_keras.optimizers.Adam(schedule),
        num_steps=STEPS,
        sample_size=BATCH,
        jit_compile=True,
        seed=[0, SEED],
    )
    z, log_q = posterior.experimental_sample_and_log_prob(TEST_SAMPLES, seed=[1, SEED])
    divergence = log_q + energy(z) + log_normaliser(energy)
    row = {
        "energy": name,
        "family": family.__name__,
        "flows": length,
        "parameters": sum(int(np.prod(v.shape)) for v in posterior.trainable_variables),
        "kl_nats": round(float(tf.reduce_mean(divergence)), 4),
        "standard_error": round(float(tf.math.reduce_std(divergence)) / TEST_SAMPLES**0.5, 4),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(row, flush=True)
    return row, tf.exp(posterior.log_prob(grid()))


def picture(densities):
    """One row per energy: its density, then the fits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = ["exp(-U)", *(f"{f.__name__}, {n} flows" for f in (dfb.Planar, dfb.Radial) for n in LENGTHS)]
    figure, axes = pyplot.subplots(
        len(densities), len(titles), figsize=(2 * len(titles), 2 * len(densities)), layout="constrained"
    )
    for (name, images), row in zip(densities.items(), axes):
        for title, image, axis in zip(titles, images, row):
            axis.imshow(image, cmap="magma")
            axis.set_xticks([])
            axis.set_yticks([])
            if name == "U1":
                axis.set_title(title, fontsize=9)
        row[0].set_ylabel(name)
    figure.savefig(machine.RESULTS / "paper_energies.png", dpi=80)


def main():
    rows, densities = [], {}
    for name, energy in ENERGIES.items():
        densities[name] = [tf.exp(-energy(grid()))]
        for family in (dfb.Planar, dfb.Radial):
            for length in LENGTHS:
                row, density = fit(family, length, name)
                rows.append(row)
                densities[name].append(density)
    budget = {"steps": STEPS, "batch_size": BATCH, "optimizer": f"Adam, {LEARNING_RATE} with cosine decay", "seed": SEED}
    machine.write("paper_energies", {"budget": budget, "test_samples": TEST_SAMPLES, "rows": rows})
    picture(densities)


if __name__ == "__main__":
    main()
