"""Flow-VAE on MNIST: latent dimensions, against the same flow with the standard prior and the same VAE without a flow.

The paper has sample pictures and no numbers. Run as `python -m benchmarks.paper.flow_vae` from the repository's root; the runs
go to `runs/paper_flow_vae`. A killed benchmark goes on from its last epoch when run again.
"""

import math

import numpy as np
import tensorflow as tf

from benchmarks import machine
from benchmarks.paper import harness
from tfp_dimflows import plot

EPOCHS, STEPS_PER_EPOCH, BATCH, SEED = 2, 468, 128, 0
TEST_IMAGES, IMPORTANCE_SAMPLES = 500, 100
DIMS = 28 * 28
FLOW = {"num_levels": 2, "width": 16, "num_blocks": 1}
MODELS = {"realnvp": ("realnvp", FLOW | {"depth": 2})}
for share in (2, 4, 8, 16):
    latent = {"latent_dims": DIMS // share}
    MODELS[f"flow-vae-{DIMS // share}"] = ("flow-vae", FLOW | latent | {"depth": 2})
    MODELS[f"vae-{DIMS // share}"] = ("flow-vae", latent | {"flow": None})


def train(name):
    recipe, arguments = MODELS[name]
    model, test_data, metrics = harness.train(
        recipe,
        harness.RUNS / "paper_flow_vae" / name,
        "mnist",
        batch_size=BATCH,
        event_shape=[28, 28, 1],
        grey_levels=256,
        epochs=EPOCHS,
        steps_per_epoch=STEPS_PER_EPOCH,
        arguments=arguments,
        seed=SEED,
    )
    images = next(iter(test_data.unbatch().batch(TEST_IMAGES)))
    log_prob = np.concatenate([model.log_prob(x, IMPORTANCE_SAMPLES, seed=SEED) for x in tf.split(images, TEST_IMAGES // 10)])
    row = {
        "model": name,
        "parameters": metrics["parameters"],
        "seconds": metrics["seconds"],
        "bound_bits_per_dim": round(metrics["bits_per_dim"], 4),
        "importance_weighted_bits_per_dim": round(float(-log_prob.mean() / (DIMS * math.log(2.0))), 4),
    }
    return model, row | {key: round(metrics[key], 2) for key in ("kl", "reconstruction") if key in metrics}


def main():
    rows, samples = [], []
    for name in MODELS:
        model, row = train(name)
        rows.append(row)
        samples.append(model.sample(12, seed=SEED).numpy())
    budget = {"epochs": EPOCHS, "steps": EPOCHS * STEPS_PER_EPOCH, "batch_size": BATCH, "optimizer": "Adam, 1e-3"}
    budget |= {"test_images_importance_weighted": TEST_IMAGES, "importance_samples": IMPORTANCE_SAMPLES, "seed": SEED}
    machine.write("paper_flow_vae", {"data": "MNIST, 28x28", "budget": budget, "rows": rows})
    plot.save_grid(machine.RESULTS / "paper_flow_vae.png", np.stack(samples), 256)


if __name__ == "__main__":
    main()
