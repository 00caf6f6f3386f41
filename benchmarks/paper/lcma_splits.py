"""Which dimensions should leave a RealNVP early? (After tables 3 and 4: rows B17 to B28.) Images and vectors.

Run as `python -m benchmarks.paper.lcma_splits [SEEDS]` from the repository's root. Finished trainings are kept in
`runs/paper_lcma_splits` and not done again.
"""

import itertools
import json
import pathlib
import statistics
import sys

import keras
import numpy as np
import tensorflow as tf

import tfp_dimflows as dimflows
from benchmarks import machine

Factorization = dimflows.bijectors.DimensionFactorization

BATCH, LEARNING_RATE, NUM_SCALES = 128, 2e-3, 4
KINDS = {
    "images": {"steps": 600, "flow": {"num_couplings": 1, "width": 8, "num_blocks": 1}, "static": "checkerboard"},
    "vectors": {"steps": 1500, "flow": {"num_couplings": 1, "width": 128, "num_blocks": 2}, "static": "arbitrary"},
}
RUNS = pathlib.Path("runs/paper_lcma_splits")


def mnist(kind):
    """Digits at 16x16 pixels, as images or as vectors of 256 grey levels each."""
    for split in ("train", "test"):
        data = dimflows.data.load("mnist", split, batch_size=1000, image_size=16, shuffle=False)
        images = np.concatenate([*data.as_numpy_iterator()])
        yield images if kind == "images" else images.reshape(len(images), -1)


def photo_patches(kind):
    """Patches of 8x8 pixels of two photographs, in grey, as vectors; train and test share no pixel."""
    for split in ("train", "test"):
        data = dimflows.data.load("photo_patches", split, batch_size=25, shuffle=False)
        images = np.concatenate([batch.mean(axis=-1) for batch in data.as_numpy_iterator()])
        blocks = images.reshape(-1, 4, 8, 4, 8).swapaxes(2, 3).reshape(-1, 64)
        yield np.floor(blocks).astype(np.uint8)


DATASETS = {
    "MNIST 16x16, images": ("images", mnist),
    "MNIST 16x16, vectors": ("vectors", mnist),
    "photo patches 8x8, vectors": ("vectors", photo_patches),
}


def log_precisions(train):
    """Of every dimension, minus the log of its variance given all others, as if the logits were normal."""
    noisy = train + np.random.default_rng(0).uniform(size=train.shape)
    x = dimflows.bijectors.LogitPreprocess(256).inverse(noisy).numpy()
    return np.log(np.diag(np.linalg.inv(np.cov(x, rowvar=False))))


def factorizations(kind, train, contributions, seed):
    """The competing splits by name."""
    from_contributions, shape, factor_outs = Factorization.from_contributions, train.shape[1:], NUM_SCALES - 1
    splits = {"random": Factorization.random(shape, NUM_SCALES, seed=seed)}
    if kind == "images":
        splits["checkerboard"] = Factorization.checkerboard(shape, NUM_SCALES)
        splits["LCMA, whole channels"] = from_contributions(contributions, "high", "channel")
        # The paper's letters say what leaves: L, the low log-dets (LCMA); H, the high ones.
        for letters in itertools.product("LH", repeat=factor_outs):
            keep = ["high" if letter == "L" else "low" for letter in letters]
            splits["".join(letters)] = from_contributions(contributions, keep, "block")
        return splits
    precisions = [log_precisions(train)] * factor_outs
    return splits | {
        "arbitrary": Factorization.random(shape, NUM_SCALES, seed=12345),
        "low leaves (LCMA)": from_contributions(contributions, "high", "free"),
        "high leaves": from_contributions(contributions, "low", "free"),
        "predictable leaves": from_contributions(precisions, "low", "free"),
        "predictable stays": from_contributions(precisions, "high", "free"),
    }


def fit(kind, train, test, factorization, seed):
    """A trained model, and its test bits/dim."""
    steps, flow = KINDS[kind]["steps"], KINDS[kind]["flow"]
    keras.utils.set_random_seed(seed)
    options = {"levels": 256, "num_scales": NUM_SCALES, "factorization": factorization, "seed": seed}
    model = dimflows.FlowModel(dimflows.recipes.realnvp(train.shape[1:], **options, **flow), seed=seed)
    model.adapt(train[:512])
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps), global_clipnorm=100.0))
    data = tf.data.Dataset.from_tensor_slices(train).shuffle(len(train), seed=seed).repeat().batch(BATCH, drop_remainder=True)
    model.fit(data.take(steps), verbose=0)
    log_prob = np.concatenate([model.log_prob(part, seed=k) for k, part in enumerate(np.array_split(test, 10))])
    return model, round(float(-log_prob.mean(dtype=np.float64) / (np.prod(train.shape[1:]) * np.log(2.0))), 4)


def run(name, seed):
    """Test bits/dim of all splits from one seed."""
    kind, load = DATASETS[name]
    path = RUNS / f"{name.replace(', ', '_').replace(' ', '_')}-seed{seed}.json"
    row = {"data": name, "seed": seed, "settings": KINDS[kind], "bits_per_dim": {}}
    if path.is_file() and (stored := json.loads(path.read_text()))["settings"] == row["settings"]:
        row = stored
    train, test = load(kind)

    def save():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row))

    if "contributions" not in row:
        model, row["nothing_leaves"] = fit(kind, train, test, None, seed)
        batches = tf.data.Dataset.from_tensor_slices(train[:20_000]).batch(1000)
        contributions = dimflows.likelihood_contributions(model.bijector, batches, seed=seed)
        row["contributions"] = [c.tolist() for c in contributions]
        save()
    for split, factorization in factorizations(kind, train, row["contributions"], seed).items():
        if split not in row["bits_per_dim"]:
            model, row["bits_per_dim"][split] = fit(kind, train, test, factorization, seed)
            row["parameters"] = model.count_params()
            save()
            print(name, seed, split, row["bits_per_dim"][split], flush=True)
    return {key: value for key, value in row.items() if key not in ("contributions", "settings")}


def summary(name, rows):
    """Of every split the mean of its bits/dim, and mean and standard error of its gain over the static one of the same seed."""
    static, result = KINDS[DATASETS[name][0]]["static"], {}
    for split in rows[0]["bits_per_dim"]:
        bits = [row["bits_per_dim"][split] for row in rows]
        gains = [row["bits_per_dim"][static] - row["bits_per_dim"][split] for row in rows]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        result[split] = {"bits_per_dim": round(statistics.mean(bits), 4), "gain": round(statistics.mean(gains), 4)}
        result[split]["standard_error"] = error and round(error, 4)
    return result


def main():
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    rows = [run(name, seed) for seed in seeds for name in DATASETS]
    table = {name: summary(name, [row for row in rows if row["data"] == name]) for name in DATASETS}
    budget = {"batch_size": BATCH, "optimizer": f"Adam, {LEARNING_RATE} with cosine decay", "levels": NUM_SCALES}
    machine.write("paper_lcma_splits", {"budget": budget, "kinds": KINDS, "seeds": len(seeds), "table": table, "rows": rows})


if __name__ == "__main__":
    main()
