"""Which dimensions should leave a flow of vectors early? LCMA, its reverse, other statistics, arbitrary halves (after table 3).

Run as `python -m benchmarks.paper.lcma_vectors [SEEDS]` from the repository's root; finished trainings are kept in
`runs/paper_lcma_vectors` and not done again.
"""

import json
import pathlib
import statistics
import sys

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

import tfp_dimflows as dimflows
from benchmarks import machine

dfb = dimflows.bijectors
tfd = tfp.distributions

STEPS, BATCH, LEARNING_RATE, NUM_SCALES = 2000, 128, 2e-3, 4
FLOW = {"num_couplings": 3, "width": 192, "num_blocks": 2}
RUNS = pathlib.Path("runs/paper_lcma_vectors")
SPLITS = ("arbitrary", "random", "lcma", "reverse", "predictable_leave", "predictable_stay")


def mnist():
    """Digits at 16x16 as vectors of 256 grey levels each."""
    return (
        np.concatenate([batch.reshape(len(batch), -1) for batch in dataset.as_numpy_iterator()])
        for dataset in (
            dimflows.data.load("mnist", split, batch_size=1000, image_size=16, shuffle=False) for split in ("train", "test")
        )
    )


def photo_patches():
    """Patches of 8x8 pixels of photographs, in grey, as vectors; train and test share no pixel."""
    for split in ("train", "test"):
        dataset = dimflows.data.load("photo_patches", split, batch_size=25, shuffle=False)
        images = np.concatenate([batch.mean(axis=-1) for batch in dataset.as_numpy_iterator()])
        blocks = images.reshape(-1, 4, 8, 4, 8).swapaxes(2, 3).reshape(-1, 64)
        yield np.floor(blocks).astype(np.uint8)


DATASETS = {"MNIST at 16x16": mnist, "photo patches of 8x8": photo_patches}


def fit(train, test, factorization, seed):
    """A trained model of vectors, and its test bits/dim."""
    keras.utils.set_random_seed(seed)
    recipe = dimflows.recipes.realnvp(
        train.shape[1:], levels=256, num_scales=NUM_SCALES, factorization=factorization, seed=seed, **FLOW
    )
    model = dimflows.FlowModel(recipe, seed=seed)
    model.adapt(train[:512])
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(LEARNING_RATE, STEPS), global_clipnorm=100.0))
    data = tf.data.Dataset.from_tensor_slices(train).shuffle(len(train), seed=seed).repeat().batch(BATCH).take(STEPS)
    model.fit(data, verbose=0)
    log_prob = np.concatenate([model.log_prob(part, seed=k) for k, part in enumerate(np.array_split(test, 10))])
    return model, float(-log_prob.mean(dtype=np.float64) / (train.shape[1] * np.log(2.0)))


def log_precisions(train):
    """Of every dimension, minus the log of its variance given all others if the data were normal, after the logit."""
    x = dfb.LogitPreprocess(256).inverse(train + np.random.default_rng(0).uniform(size=train.shape)).numpy()
    return np.log(np.diag(np.linalg.inv(np.cov(x, rowvar=False))))


def factorizations(train, contributions, seed):
    """The competing splits; a dimension with a high precision is predictable from the others."""
    from_contributions, shape = dfb.DimensionFactorization.from_contributions, train.shape[1:]
    precisions = [log_precisions(train)] * (NUM_SCALES - 1)
    return {
        "arbitrary": dfb.DimensionFactorization.random(shape, NUM_SCALES, seed=12345),
        "random": dfb.DimensionFactorization.random(shape, NUM_SCALES, seed=seed),
        "lcma": from_contributions(contributions, "high", "free"),
        "reverse": from_contributions(contributions, "low", "free"),
        "predictable_leave": from_contributions(precisions, "low", "free"),
        "predictable_stay": from_contributions(precisions, "high", "free"),
    }


def run(name, seed):
    """Test bits/dim of all splits from one seed."""
    path = RUNS / f"{name.replace(' ', '_')}-seed{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    train, test = DATASETS[name]()
    model, bits = fit(train, test, None, seed)
    bits = {"nothing leaves": round(bits, 4)}
    batches = tf.data.Dataset.from_tensor_slices(train[:20_000]).batch(1000)
    contributions = dimflows.likelihood_contributions(model.bijector, batches, seed=seed)
    for split, factorization in factorizations(train, contributions, seed).items():
        model, value = fit(train, test, factorization, seed)
        bits[split] = round(value, 4)
        print(name, seed, split, bits[split], flush=True)
    row = {"data": name, "seed": seed, "parameters": model.count_params(), "bits_per_dim": bits}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row))
    return row


def summary(rows):
    """Of every split: mean and standard error of its gain over the arbitrary half, trained from the same seed."""
    gains = {}
    for split in SPLITS[1:]:
        values = [row["bits_per_dim"]["arbitrary"] - row["bits_per_dim"][split] for row in rows]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        gains[split] = {"mean": round(statistics.mean(values), 4), "standard_error": error and round(error, 4)}
    return gains


def main():
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    rows = [run(name, seed) for seed in seeds for name in DATASETS]
    gains = {name: summary([row for row in rows if row["data"] == name]) for name in DATASETS}
    budget = {
        "steps": STEPS,
        "batch_size": BATCH,
        "optimizer": f"Adam, {LEARNING_RATE} with cosine decay",
        "levels": NUM_SCALES,
    }
    machine.write("paper_lcma_vectors", {"budget": budget, "flow": FLOW, "seeds": len(seeds), "gains": gains, "rows": rows})


if __name__ == "__main__":
    main()
