"""Posteriors of a variational autoencoder on binary MNIST: Gaussian, planar, radial, Sylvester and inverse autoregressive.

The survey that this package follows has no numbers. Run as `python -m benchmarks.paper.vae_flow` from the root of the
repository; the runs go to `runs/paper_vae_flow`. A killed benchmark goes on from its last epoch when run again.
"""

import numpy as np
import tensorflow as tf

from benchmarks import machine
from benchmarks.paper import harness
from tfp_dimflows.recipes.vae_flow import POSTERIORS

EPOCHS, STEPS_PER_EPOCH, BATCH, SEED = 6, 468, 128, 0
TEST_IMAGES, IMPORTANCE_SAMPLES = 1_000, 500
ARGUMENTS = {"latent_dims": 32, "features": 128, "width": 16, "hidden": [128]}


def train(posterior):
    model, test_data, metrics = harness.train(
        "vae-flow",
        harness.RUNS / "paper_vae_flow" / posterior,
        "mnist",
        batch_size=BATCH,
        load={"grey_levels": 2},
        event_shape=[28, 28, 1],
        grey_levels=2,
        epochs=EPOCHS,
        steps_per_epoch=STEPS_PER_EPOCH,
        arguments=ARGUMENTS | {"posterior": posterior},
        seed=SEED,
    )
    images = next(iter(test_data.unbatch().batch(TEST_IMAGES)))
    chunks = enumerate(tf.split(images, TEST_IMAGES // 20))
    log_prob = np.concatenate([model.log_prob(x, IMPORTANCE_SAMPLES, seed=k) for k, x in chunks])
    row = {
        "posterior": posterior,
        "parameters": metrics["parameters"],
        "seconds": metrics["seconds"],
        "nll_bound": round(metrics["nll"], 2),
        "kl": round(metrics["kl"], 2),
        "reconstruction": round(metrics["reconstruction"], 2),
        "importance_weighted_nll": round(float(-log_prob.mean()), 2),
        "standard_error_over_images": round(float(log_prob.std() / TEST_IMAGES**0.5), 2),
    }
    print(row, flush=True)
    return row


def main():
    rows = [train(posterior) for posterior in POSTERIORS]
    budget = {"epochs": EPOCHS, "steps": EPOCHS * STEPS_PER_EPOCH, "batch_size": BATCH, "optimizer": "Adam, 1e-3", "seed": SEED}
    budget |= {"test_images_importance_weighted": TEST_IMAGES, "importance_samples": IMPORTANCE_SAMPLES}
    data = "MNIST, 28x28, binarised at half of the range"
    machine.write("paper_vae_flow", {"data": data, "budget": budget, "recipe": ARGUMENTS, "rows": rows})


if __name__ == "__main__":
    main()
