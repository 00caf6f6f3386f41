"""Should coordinates leave a flow early, or subspaces? Factor-outs in rotated frames against static ones.

Run as `python -m benchmarks.paper.subspaces [STUDY ...]` from the repository's root. Finished trainings are kept in
`runs/paper_subspaces` and not done again.
"""

import hashlib
import json
import pathlib
import statistics
import sys
import time
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

import tfp_dimflows as dimflows
from benchmarks import machine
from benchmarks.paper.lcma_splits import images, photo_patches

dfb, dfd = dimflows.bijectors, dimflows.distributions
tfb, tfd = tfp.bijectors, tfp.distributions

LEARNING_RATE, BATCH, ADAPT_EVENTS = 2e-3, 64, 2048
RUNS = pathlib.Path("runs/paper_subspaces")
KLT = "principal components"

# What is done to the squeezed channels (or to a vector) before each level's couplings; the first half stays then.
FRAMES = {
    "first half": "identity",
    "checkerboard": "identity",
    "Haar": "haar",
    "random rotation": "random",
    KLT: "principal",
    f"{KLT}, trained": "principal",
    f"{KLT}, minor half stays": "principal",
    f"{KLT}, after a first level": "principal",
}
IMAGES = ("first half", "checkerboard", "Haar", "random rotation", KLT, f"{KLT}, trained")
# A level is the rotation of its blocks alone, and what leaves is modelled given what stays.
PROGRESSIVE = ("progressive, Haar", "progressive, random rotation", f"progressive, {KLT}", f"progressive, {KLT}, trained")
FRAMES |= {frame: FRAMES[frame.removeprefix("progressive, ")] for frame in PROGRESSIVE}
VECTORS = ("first half", "random rotation", KLT, f"{KLT}, trained", f"{KLT}, minor half stays")
HALVES = ("first half", "checkerboard", KLT, f"{KLT}, minor half stays")
GLOW = ("Glow", f"Glow, {KLT} first")
PROGRESSIVE_SIZES = {16: (3, 42), 32: (4, 25)}  # halvings and width: 0.5 and 1.6 % fewer parameters than the multi-scale flows


class Study(NamedTuple):
    """One architecture on one dataset, with several frames, the first of which is the one that others are compared with."""

    data: str
    num_levels: int
    steps: int
    frames: tuple[str, ...] = IMAGES
    seeds: int = 3
    depth: int = 4
    width: int = 32


STUDIES = {
    "CIFAR-10": Study("CIFAR-10 16x16", 4, 2500),
    "CIFAR-10, halves": Study(
        "CIFAR-10 16x16", 4, 2500, ("first half", "checkerboard", KLT, f"{KLT}, minor half stays"), seeds=1
    ),
    "CIFAR-10, progressive": Study("CIFAR-10 16x16", 4, 2500, ("Haar", KLT, *PROGRESSIVE)),
    "CIFAR-10, Glow": Study("CIFAR-10 16x16", 4, 2500, (*IMAGES[:1], KLT, *GLOW)),
    "CIFAR-10, 32x32, Glow": Study("CIFAR-10", 4, 1000, (*IMAGES[:1], *GLOW)),
    "MNIST, Glow": Study("MNIST 16x16", 3, 2500, (*IMAGES[:1], *GLOW)),
    "CIFAR-10, 10,000 steps": Study("CIFAR-10 16x16", 4, 10_000, ("Haar", KLT, PROGRESSIVE[-1]), seeds=1),
    "CIFAR-10, 32x32": Study("CIFAR-10", 4, 1000, (*IMAGES, *PROGRESSIVE[2:])),
    "CIFAR-10, 32x32, 2,500 steps": Study("CIFAR-10", 4, 2500, ("Haar", PROGRESSIVE[-1]), seeds=1),
    "MNIST": Study("MNIST 16x16", 3, 2500, (*IMAGES, f"{KLT}, after a first level")),
    "photo patches, vectors": Study("photo patches 8x8, vectors", 4, 1500, VECTORS, depth=2, width=128),
}
DATASETS = {
    "CIFAR-10 16x16": lambda: images("cifar10", 16),
    "CIFAR-10": lambda: images("cifar10", 32),
    "MNIST 16x16": lambda: images("mnist", 16),
    "photo patches 8x8, vectors": photo_patches,
}


def couplings(channels, depth, width, seed):
    """Affine couplings of images, which transform the one and the other half in turns."""
    parts = []
    for k in range(depth):
        mask = dfb.masks.Channel(flip=k % 2 == 1)
        inputs, outputs = mask.sizes(channels)
        network = dimflows.networks.GlowConvNet(inputs, 2 * outputs, width=width, seed=1000 * seed + k)
        parts += [dfb.ActNorm(channels), dfb.AffineCoupling(network, mask)]
    return parts


def vector_couplings(dims, depth, width, seed):
    """Affine couplings of vectors, by halves in turns."""
    parts = []
    for k in range(depth):
        flip = k % 2 == 1
        mask = dfb.masks.Channel(flip, event_ndims=1, num_conditioning=dims - dims // 2 if flip else dims // 2)
        inputs, outputs = mask.sizes(dims)
        network = dimflows.networks.MLP(inputs, 2 * outputs, hidden=[width, width], seed=1000 * seed + k)
        parts += [dfb.ActNorm(dims), dfb.AffineCoupling(network, mask)]
    return parts


def exit_of(channels):
    """A Gaussian of what leaves given what stays, of a convolution that starts at zero."""
    network = dimflows.networks.ZeroConv2D(channels, 2 * channels)
    return dfb.ConditionalTransform(network, dfb.transformers.Affine("exp"), event_ndims=3)


def flow_of(study, shape, frame, seed):
    """The multi-scale flow of a frame."""
    matrix, is_image, sizes = FRAMES[frame], len(shape) == 3, []
    for k in range(study.num_levels):
        sizes.append(4 * shape[-1] * 2**k if is_image else -(-shape[0] // 2**k))
    levels = []
    for k, size in enumerate(sizes):
        parts = (couplings if is_image else vector_couplings)(size, study.depth, study.width, 100 * seed + k)
        if frame.endswith("minor half stays"):
            parts = [tfb.Permute(np.arange(size)[::-1]), *parts]
        elif frame == "checkerboard":  # the same couplings on the positions top left and bottom right, and on the others
            positions = np.arange(size).reshape(-1, 4)[:, [0, 3, 1, 2]]
            order = np.concatenate([positions[:, :2].ravel(), positions[:, 2:].ravel()])
            parts = [tfb.Invert(tfb.Permute(order)), *parts]
        levels.append(dfb.Chain(parts))
    exits = [exit_of(size // 2) for size in sizes[:-1]] + [exit_of(sizes[-1])] if is_image else None
    if frame.endswith("after a first level"):
        matrix = ["identity", *[matrix] * (len(levels) - 1)]
    return dfb.PrincipalMultiscale(levels, shape, matrix, frame.endswith("trained"), exits, seed)


def progressive_of(study, shape, frame, seed):
    """The progressive recipe's flow of images, with the splits of a frame."""
    levels, width = PROGRESSIVE_SIZES[shape[0]]
    pnf = dimflows.recipes.principal_pnf(shape, num_halvings=levels, depth=study.depth, width=width, seed=seed).bijector
    splits = []
    for k, split in enumerate(pnf.splits):
        channels, kept = (split.parameters[name] for name in ("channels", "kept"))
        trained = frame.endswith("trained")
        splits.append(dfb.OrthogonalSplit(channels, kept, matrix=FRAMES[frame], trainable=trained, seed=100 * seed + k))
    base, *details = pnf.stages
    return dfb.PNF(base, details, shape, splits=splits)


def glow_of(study, shape, frame, seed):
    """The Glow recipe's flow, with rotations of the squeezed channels before its steps."""
    flow = dimflows.recipes.glow(shape, num_levels=study.num_levels, depth=study.depth, width=study.width, seed=seed).bijector
    levels = []
    for k, level in enumerate(flow.levels):
        size = 4 * shape[-1] * 2**k
        squeeze, steps = level.bijectors
        levels.append(dfb.Chain([squeeze, *([dfb.Rotation(size)] if frame.endswith("first") else []), steps]))
    return dfb.Multiscale(levels, flow.factorization, exits=flow.parameters["exits"])


def kept_by_lcma(model, train):
    """Of the vectors' minor half of components the share that has the high likelihood contributions."""
    batches = tf.data.Dataset.from_tensor_slices(train[:5000]).batch(1000)
    contributions = dimflows.likelihood_contributions(model.bijector, batches)[0]
    size = len(contributions) // 2
    return float(np.mean(np.argsort(-contributions)[:size] >= len(contributions) - size))


def fit(study, events, frame, seed):
    """Test bits/dim of a training, with its parameters and seconds."""
    train, test = events
    start, shape = time.perf_counter(), train.shape[1:]
    keras.utils.set_random_seed(seed)
    make = glow_of if frame in GLOW else progressive_of if frame in PROGRESSIVE else flow_of
    flow = make(study, shape, frame, seed)
    centred = tfb.Chain([tfb.Scale(256.0), tfb.Shift(0.5)])
    noise = tfd.Sample(tfd.Normal(0.0, 1.0), [int(np.prod(shape))])
    continuous = tfd.TransformedDistribution(noise, dfb.Chain([centred, flow]))
    model = dimflows.FlowModel(dfd.Dequantized(continuous, grey_levels=256), seed=seed)
    model.adapt(train[:ADAPT_EVENTS])
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, study.steps)
    model.compile(keras.optimizers.Adam(rate, global_clipnorm=100.0))
    data = tf.data.Dataset.from_tensor_slices(train).shuffle(len(train), seed=seed).repeat().batch(BATCH, drop_remainder=True)
    model.fit(data.take(50), verbose=0)
    before = time.perf_counter()
    model.fit(data.skip(50).take(study.steps - 50), verbose=0)
    per_step = (time.perf_counter() - before) / (study.steps - 50)
    log_prob = np.concatenate(
        [model.log_prob(part, seed=k) for k, part in enumerate(np.array_split(test, max(1, len(test) // 500)))]
    )
    bits = -log_prob.mean(dtype=np.float64) / (np.prod(shape) * np.log(2.0))
    of_lcma = {"minor_components_that_lcma_keeps": kept_by_lcma(model, train)} if frame == KLT and len(shape) == 1 else {}
    return of_lcma | {
        "bits_per_dim": round(float(bits), 4),
        "parameters": int(sum(np.prod(v.shape) for v in model.trainable_variables)),
        "ms_per_step": round(1000.0 * per_step, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


def result_of(study, load, frame, seed):
    """That of `fit`, from a file if it is there."""
    settings = json.dumps([study.data, study.num_levels, study.steps, study.depth, study.width, frame, seed])
    path = RUNS / f"{hashlib.sha256(settings.encode()).hexdigest()[:12]}.json"
    if not path.is_file():
        result = fit(study, load(), frame, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings, **result}))
        print(study.data, study.steps, frame, seed, result, flush=True)
    return json.loads(path.read_text())


def summary(study, results):
    """For each frame the mean of its bits/dim, and mean and standard error of its gain over the first one of the same seed."""
    table = {}
    for frame in study.frames:
        own = [results[frame, seed] for seed in range(study.seeds)]
        bits = [result["bits_per_dim"] for result in own]
        gains = [results[study.frames[0], seed]["bits_per_dim"] - value for seed, value in enumerate(bits)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        table[frame] = {
            "bits_per_dim": round(statistics.mean(bits), 4),
            "gain": round(statistics.mean(gains), 4),
            "standard_error": None if error is None else round(error, 4),
            "parameters": own[0]["parameters"],
            "ms_per_step": statistics.median(result["ms_per_step"] for result in own),
            "rows": bits,
        }
        if "minor_components_that_lcma_keeps" in own[0]:
            table[frame]["minor_components_that_lcma_keeps"] = [r["minor_components_that_lcma_keeps"] for r in own]
    return table


def main():
    path = machine.RESULTS / "paper_subspaces.json"
    for name in sys.argv[1:] or STUDIES:
        study, events = STUDIES[name], []

        def load(study=study, events=events):
            events.extend([] if events else DATASETS[study.data]())
            return events

        results = {(frame, seed): result_of(study, load, frame, seed) for seed in range(study.seeds) for frame in study.frames}
        settings = {key: value for key, value in study._asdict().items() if key != "frames"}
        row = {**settings, "cpu": machine.describe()["cpu"], "table": summary(study, results)}
        budget = {
            "batch_size": BATCH,
            "optimizer": f"Adam, {LEARNING_RATE} with cosine decay, clipped at a norm of 100, one training per frame and seed",
        }
        others = json.loads(path.read_text())["studies"] if path.is_file() else {}
        machine.write("paper_subspaces", {"budget": budget, "studies": others | {name: row}})


if __name__ == "__main__":
    main()
