"""What are the first latent values worth? PSNR, a linear probe and bits/dim of codes of flows, beside PCA and autoencoders.

Run as `python -m benchmarks.paper.codes [DATA ...]` from the repository's root. Finished trainings are kept in
`runs/paper_codes` and not done again.
"""

import json
import os
import pathlib
import sys
import time

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
import tensorflow_probability as tfp

import tfp_dimflows as dimflows
from benchmarks import machine
from benchmarks.paper import subspaces
from benchmarks.paper.lcma_splits import images
from tfp_dimflows import plot
from tfp_dimflows.codes import PCA, Reconstruction, psnr

dfb, dfd = dimflows.bijectors, dimflows.distributions
tfb, tfd = tfp.bijectors, tfp.distributions

BATCH, STEPS, LEARNING_RATE = 64, 1500, 2e-3
TEST, PROBE = 2000, 4000
RUNS = pathlib.Path("runs/paper_codes")
DATA = {"CIFAR-10": "cifar10", "MNIST": "mnist"}
STATIC, KLT = "multi-scale, first half", "multi-scale, principal components"


def multiscale(shape, frame):
    """The multi-scale flow of `subspaces`, on logits as the recipe is."""
    study = subspaces.Study("", 4 if shape[-1] == 3 else 3, STEPS)
    chain = dfb.Chain([dfb.LogitPreprocess(256), subspaces.flow_of(study, shape, frame, seed=0)])
    noise = tfd.Sample(tfd.Normal(0.0, 1.0), [int(np.prod(shape))])
    return dfd.Dequantized(tfd.TransformedDistribution(noise, chain), grey_levels=256)


def principal(shape, **options):
    """The recipe of progressive flows of principal components."""
    return dimflows.recipes.principal_pnf(shape, grey_levels=256, **options)


def haar(shape):
    """The recipe of progressive flows of Haar averages, small."""
    return dimflows.recipes.pnf(shape, grey_levels=256, depth=2, width=16, num_blocks=1, num_levels=1)


def flow_vae(shape):
    """A Flow-VAE with a code of an eighth of the dimensions."""
    return dimflows.recipes.flow_vae(shape, grey_levels=256, latent_dims=int(np.prod(shape)) // 8)


def lcma(shape):
    """Glow whose factor-outs are decided in training by likelihood contributions."""
    return dimflows.recipes.lcma_glow(
        shape, grey_levels=256, contributions="online", num_levels=4 if shape[-1] == 3 else 3, depth=4, width=32
    )


BLOCKS = "PNF, principal components of blocks"
NESTED = ", nested dropout"
LCMA, DECIDE_STEPS = "LCMA, Glow", 150
MODELS = {
    STATIC: lambda shape: multiscale(shape, "first half"),
    KLT: lambda shape: multiscale(shape, subspaces.KLT),
    KLT + NESTED: lambda shape: multiscale(shape, subspaces.KLT),
    BLOCKS: principal,
    BLOCKS + NESTED: principal,
    "PNF, principal components of whole images": lambda shape: principal(shape, whole=True),
    "PNF, principal components, dense": lambda shape: principal(shape, network="dense"),
    LCMA: lcma,
    "PNF, Haar": haar,
    "Flow-VAE": flow_vae,
}
WEIGHT = 70.0  # of nested dropout: 0.1 bits/dim for a squared error of 0.001 per dimension, 30 dB


def labels(name, split, number):
    """The labels of the first images, in the order of `dimflows.data.load` without shuffling."""
    directory = os.environ.get("TFDS_DATA_DIR")
    data = tfds.load(name, split=split, data_dir=directory, as_supervised=True, shuffle_files=False)
    return np.array([label for _, label in data.take(number).as_numpy_iterator()])


def probe(train_codes, test_codes, name):
    """Share of the test labels that a logistic regression on standardised codes finds."""
    from sklearn.linear_model import LogisticRegression

    mean, deviation = train_codes.mean(axis=0), train_codes.std(axis=0) + 1e-6
    classifier = LogisticRegression(max_iter=500)
    classifier.fit((train_codes - mean) / deviation, labels(name, "train", len(train_codes)))
    return float(classifier.score((test_codes - mean) / deviation, labels(name, "test", len(test_codes))))


def fit(model, train, steps=STEPS, callbacks=()):
    """Trains a Keras model on events, and returns the seconds."""
    start = time.perf_counter()
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    loss = {} if isinstance(model, dimflows.FlowModel) else {"loss": "mse"}
    model.compile(keras.optimizers.Adam(rate, global_clipnorm=100.0), **loss)
    data = tf.data.Dataset.from_tensor_slices(train).shuffle(60_000, seed=0).repeat().batch(BATCH, drop_remainder=True)
    model.fit(data.take(steps), verbose=0, callbacks=list(callbacks))
    return time.perf_counter() - start


def flow_row(build, nested_dropout, is_lcma, name, train, test):
    """Bits/dim, and PSNR and probe of every code of a flow; the reconstructions of some images."""
    keras.utils.set_random_seed(0)
    model = dimflows.FlowModel(build(train.shape[1:]), seed=0, nested_dropout=nested_dropout)
    model.adapt(train[:8192])
    probes = tf.data.Dataset.from_tensor_slices(train[:4096]).batch(BATCH)
    decide = [dimflows.training.DecideFactorization(probes, DECIDE_STEPS)] if is_lcma else []
    seconds = fit(model, train, callbacks=decide)
    parts = np.array_split(test, 10)
    bits = -np.mean([model.log_prob(part, seed=k).numpy().mean() for k, part in enumerate(parts)])
    sizes, reconstruct = model.code_sizes, Reconstruction(model)
    restored = np.concatenate([reconstruct(part, sizes) for part in parts], axis=1)
    errors = np.mean((restored - test.astype(np.float64)) ** 2, axis=(1, 2, 3, 4))
    codes = [np.concatenate([model.encode(part) for part in np.array_split(some, 10)]) for some in (train[:PROBE], test)]
    small = [size for size in sizes if size < test[0].size]
    row = {
        "bits_per_dim": round(float(bits) / (np.prod(test.shape[1:]) * np.log(2.0)), 4),
        "parameters": int(sum(np.prod(v.shape) for v in model.trainable_variables)),
        "seconds": round(seconds, 1),
        "psnr": {size: round(float(value), 2) for size, value in zip(small, psnr(errors, 256))},
        "probe": {size: round(probe(*(code[:, :size] for code in codes), name), 3) for size in small},
    }
    return row, {size: some[:8] for size, some in zip(sizes, restored)}, model.sample(16, seed=0, temperature=0.7).numpy()


def pca_row(name, train, test, sizes):
    """Those of principal components of whole images."""
    pca = PCA(train)
    restored = [np.round(pca.reconstruct(test, size)).clip(0, 255) for size in sizes]
    flat = [some.reshape(len(some), -1).astype(np.float64) for some in (train[:PROBE], test)]
    components = np.linalg.eigh(np.cov(train[:20_000].reshape(-1, test[0].size), rowvar=False))[1][:, ::-1]
    return {
        "psnr": {k: round(float(psnr(np.mean((some - test) ** 2.0), 256)), 2) for k, some in zip(sizes, restored)},
        "probe": {k: round(probe(*(some @ components[:, :k] for some in flat), name), 3) for k in sizes},
    }


def autoencoder_row(name, train, test, size):
    """Those of a dense autoencoder with a code of this size."""
    keras.utils.set_random_seed(0)
    dims = test[0].size
    encoder = keras.Sequential([keras.Input([dims]), keras.layers.Dense(512, "relu"), keras.layers.Dense(size)])
    decoder = keras.Sequential([keras.Input([size]), keras.layers.Dense(512, "relu"), keras.layers.Dense(dims)])
    model = keras.Sequential([encoder, decoder])
    x = [some.reshape(len(some), dims).astype(np.float32) / 255.0 for some in (train, test)]
    fit_data = tf.data.Dataset.from_tensor_slices((x[0], x[0]))
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(LEARNING_RATE, STEPS)), "mse")
    model.fit(fit_data.shuffle(60_000, seed=0).repeat().batch(BATCH).take(STEPS), verbose=0)
    restored = np.round(255.0 * model.predict(x[1], verbose=0)).clip(0, 255)
    codes = [encoder.predict(some, verbose=0) for some in (x[0][:PROBE], x[1])]
    return {
        "psnr": round(float(psnr(np.mean((restored - test.reshape(len(test), dims)) ** 2.0), 256)), 2),
        "probe": round(probe(*codes, name), 3),
        "parameters": model.count_params(),
    }


def save_picture(name, train, test):
    """Test images, and what PCA and each flow make of them from codes of an eighth of the dimensions; a row each."""
    size = test[0].size // 8
    rows = [test[:8], np.round(PCA(train).reconstruct(test[:8], size)).clip(0, 255)]
    for model in MODELS:
        with np.load(folder(name, model) / "images.npz") as arrays:
            rows += [arrays[f"code_{size}"]] if f"code_{size}" in arrays else []
    plot.save_grid(machine.RESULTS / f"paper_codes_{name}.png", np.stack(rows), 256)


def folder(name, model):
    """Where a model's results are."""
    return RUNS / name / model.replace(", ", "_").replace(" ", "_")


def stored(path, compute, *arguments):
    """What a file holds, or what is computed and written to it."""
    if not path.is_file():
        value = compute(*arguments)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
        print(path, value, flush=True)
    return json.loads(path.read_text())


def rows_of(name):
    """The rows of a dataset, and the number of its dimensions."""
    train, test = images(name, 16)
    test = test[:TEST]
    dims = test[0].size
    sizes = [dims // 24, dims // 8, dims // 4, dims // 2]

    def flow(model, build, place):
        row, restored, samples = flow_row(build, WEIGHT * model.endswith(NESTED), model == LCMA, name, train, test)
        place.mkdir(parents=True, exist_ok=True)
        originals = test[: len(next(iter(restored.values())))]
        arrays = {f"code_{size}": some for size, some in restored.items()}
        np.savez(place / "images.npz", samples=samples, originals=originals, **arrays)
        return row

    rows = {"PCA": stored(RUNS / name / "pca.json", pca_row, name, train, test, sizes)}
    for model, build in MODELS.items():
        place = folder(name, model)
        rows[model] = stored(place / "row.json", flow, model, build, place)
    for size in sizes:
        rows[f"autoencoder, {size}"] = stored(
            RUNS / name / f"autoencoder_{size}.json", autoencoder_row, name, train, test, size
        )
    save_picture(name, train, test)
    return rows, dims


def main():
    path = machine.RESULTS / "paper_codes.json"
    for title in sys.argv[1:] or DATA:
        rows, dims = rows_of(DATA[title])
        others = json.loads(path.read_text())["data"] if path.is_file() else {}
        budget = {"steps": STEPS, "batch_size": BATCH, "optimizer": f"Adam, {LEARNING_RATE} with cosine decay", "seeds": 1}
        result = {"budget": budget, "data": others | {title: {"cpu": machine.describe()["cpu"], "dims": dims, "rows": rows}}}
        machine.write("paper_codes", result)


if __name__ == "__main__":
    main()
