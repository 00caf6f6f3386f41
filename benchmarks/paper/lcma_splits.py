"""Which dimensions should leave a flow early? (After tables 3 and 4: rows B17 to B28.) Images, vectors and a table.

Run as `python -m benchmarks.paper.lcma_splits [STUDY ...]` from the repository's root. Finished trainings are kept in
`runs/paper_lcma_splits` and not done again.
"""

import hashlib
import itertools
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
from tfp_dimflows import plot

dfb, tfb, tfd = dimflows.bijectors, tfp.bijectors, tfp.distributions

BATCH, LEARNING_RATE, STATISTICS_EVENTS = 128, 2e-3, 20_000
SNAPSHOTS = (75, 150, 300, 600, 1200, 2400)
ATTRIBUTIONS = ("svd_sorted", "lu", "uniform")  # besides "polar", the default
RUNS = pathlib.Path("runs/paper_lcma_splits")

IMAGES = {"num_levels": 3, "depth": 2, "width": 8, "num_blocks": 1}
UNEVEN = {"num_levels": 4, "depth": 1, "width": 8, "num_blocks": 1}  # one coupling: it transforms one half only
VECTORS = {"num_levels": 4, "depth": 1, "width": 128, "num_blocks": 2}
TABLE = {"num_levels": 3, "depth": 1, "width": 32, "num_blocks": 2}
GLOW = {"num_levels": 3, "depth": 2, "width": 32}


class Study(NamedTuple):
    """A flow trained on one dataset with several splits, the first of which is the one that the others are compared with.

    Splits are named by a statistic, what leaves at each factor-out (L: the half with the low values, H: with the high ones) and
    the granularity: one of the library's, or "colours", half of the squeezed channels by their averages,
    whatever their colours, with couplings on the same halves, as they are with the static "channels".
    """

    data: str
    recipe: str
    flow: dict
    steps: int
    splits: tuple[str, ...]
    seeds: int = 3
    exits: bool = False  # whether what leaves is scored by a Gaussian given what stays
    is_equal_cost: bool = False  # whether the steps before a snapshot count as training


def _both(statistic, granularities, factor_outs=2):
    return tuple(f"{statistic} {what * factor_outs} {how}" for how in granularities for what in "LH")


STATIC = ("channels", "checkerboard", "random")
CHOICES = (*STATIC, *_both("log-det", ("block", "channel")), "entropy block")
SCALE = ("checkerboard", "channels", "log-det LL block", "log-det HH channel")
READINGS = ("channels", *_both("log-det", ("block", "pair", "row", "column")), *_both("per-level", ("block",)))
READINGS += (*_both("without-actnorm", ("block",)), *_both("after-75", ("block",)))
ONLINE = ("channels", "log-det HH channel", "after-300 HH channel", "online-75 HH channel", "online-150 HH channel")
LETTERS = tuple(f"log-det {''.join(letters)} block" for letters in itertools.product("LH", repeat=3))
COLOURS = ("channels", *_both("log-det", ("colours",)), "entropy colours", "random colours")
CONVENTIONS = tuple(split for how in ATTRIBUTIONS for split in _both(how, ("block",)))
EXITS = ("channels", *_both("log-det", ("block",)), "entropy block")
FREE = (*_both("log-det", ("free",)), *_both("precision", ("free",)), "entropy free")
FREE_3 = ("random", "another-random", *_both("log-det", ("free",), 3), *_both("precision", ("free",), 3), "entropy free")
STUDIES = {
    "CIFAR-10": Study("CIFAR-10 16x16", "realnvp", IMAGES, 600, CHOICES[:-1]),
    "CIFAR-10, colours": Study("CIFAR-10 16x16", "realnvp", IMAGES, 600, COLOURS, seeds=5),
    "CIFAR-10, colours by LCMA": Study("CIFAR-10 16x16", "realnvp", IMAGES, 600, COLOURS[:2], seeds=9),
    "MNIST": Study("MNIST 16x16", "realnvp", IMAGES, 600, CHOICES),
    "MNIST, readings": Study("MNIST 16x16", "realnvp", IMAGES, 600, READINGS, seeds=2),
    "CIFAR-10, 32x32": Study("CIFAR-10", "realnvp", IMAGES | {"width": 16}, 600, SCALE, seeds=2),
    "CIFAR-10, exits": Study("CIFAR-10 16x16", "realnvp", IMAGES, 600, EXITS, exits=True),
    "MNIST, online": Study("MNIST 16x16", "realnvp", IMAGES, 600, ONLINE, is_equal_cost=True),
    "MNIST, exits": Study("MNIST 16x16", "realnvp", IMAGES, 600, EXITS, exits=True),
    "MNIST, Glow": Study("MNIST 16x16", "glow", GLOW, 600, EXITS),
    "MNIST, attributions": Study("MNIST 16x16", "glow", GLOW, 600, (*EXITS[:3], *CONVENTIONS)),
    "MNIST, batch norm": Study("MNIST 16x16", "realnvp", IMAGES | {"batch_norm": True}, 600, EXITS[:3], seeds=2),
    "MNIST, 2,400 steps": Study("MNIST 16x16", "realnvp", IMAGES, 2400, EXITS, seeds=2),
    "MNIST, width 24": Study("MNIST 16x16", "realnvp", IMAGES | {"width": 24}, 600, EXITS, seeds=2),
    "MNIST, uneven": Study("MNIST 16x16", "realnvp", UNEVEN, 600, ("checkerboard", "channels", "random", *LETTERS)),
    "MNIST, vectors": Study("MNIST 16x16, vectors", "realnvp", VECTORS, 1500, FREE_3),
    "photo patches, vectors": Study("photo patches 8x8, vectors", "realnvp", VECTORS, 1500, FREE_3),
    "digits, vectors": Study("digits 8x8, vectors", "realnvp", TABLE, 600, ("random", "another-random", *FREE)),
    "breast cancer, table": Study("breast cancer", "realnvp", TABLE, 300, ("random", "another-random", *FREE), seeds=10),
}
PICTURED = ("CIFAR-10", "MNIST")


def images(name, size):
    """Training and test images of size x size pixels."""
    for split in ("train", "test"):
        data = dimflows.data.load(name, split, batch_size=1000, image_size=size, shuffle=False)
        yield np.concatenate([*data.as_numpy_iterator()])


def photo_patches():
    """Patches of 8x8 pixels of two photographs, in grey, as vectors; train and test share no pixel."""
    for split in ("train", "test"):
        data = dimflows.data.load("photo_patches", split, batch_size=25, shuffle=False)
        grey = np.concatenate([batch.mean(axis=-1) for batch in data.as_numpy_iterator()])
        yield np.floor(grey.reshape(-1, 4, 8, 4, 8).swapaxes(2, 3).reshape(-1, 64)).astype(np.uint8)


def breast_cancer():
    """30 measurements of 569 tumours, standardised: two thirds to train, one to test."""
    from sklearn.datasets import load_breast_cancer

    rows = load_breast_cancer().data.astype(np.float32)
    is_test = np.random.default_rng(0).permutation(len(rows)) < len(rows) // 3
    mean, deviation = rows[~is_test].mean(axis=0), rows[~is_test].std(axis=0)
    for chosen in (~is_test, is_test):
        yield (rows[chosen] - mean) / deviation


def flat(parts):
    """Images as vectors."""
    return (part.reshape(len(part), -1) for part in parts)


# Training and test events, and the number of grey levels.
DATASETS = {
    "MNIST 16x16": (lambda: images("mnist", 16), 256),
    "MNIST 16x16, vectors": (lambda: flat(images("mnist", 16)), 256),
    "CIFAR-10": (lambda: images("cifar10", 32), 256),
    "CIFAR-10 16x16": (lambda: images("cifar10", 16), 256),
    "photo patches 8x8, vectors": (photo_patches, 256),
    "digits 8x8, vectors": (lambda: flat(images("digits", 8)), 17),
    "breast cancer": (breast_cancer, None),
}


def covariance(train, levels):
    """The covariance matrix of the events, integer ones as logits."""
    x = train.reshape(len(train), -1).astype(np.float64)
    if levels is not None:
        x = dfb.LogitPreprocess(levels).inverse(x + np.random.default_rng(0).uniform(size=x.shape)).numpy()
    return np.cov(x, rowvar=False)


def entropy_statistics(shape, factor_outs, covariance, granularity):
    """For every factor-out 1 for the dimensions that stay and 0 for those that leave, by the greedily largest entropy.

    The half that stays is the one with the largest entropy of a normal distribution: what leaves is what it predicts best.
    """
    grid, chosen = np.arange(len(covariance)).reshape(shape), []
    for _ in range(factor_outs):
        if granularity == "free":
            candidates = grid.reshape(1, -1, 1)
        elif granularity == "colours":
            candidates = squeezed(grid).reshape(1, -1, 4 * grid.shape[-1]).swapaxes(1, 2)
        else:
            candidates = squeezed(grid).reshape(-1, 4, 1)
        statistic = np.zeros(len(covariance))
        statistic[_greedy(candidates, covariance)] = 1.0
        chosen.append(statistic.reshape(shape))
        grid = by_statistics(chosen, "high", granularity).kept[-1]
    return chosen


def squeezed(grid):
    """`[H, W, C]` as `[H/2, W/2, 4C]`, in the order of `dfb.Squeeze`."""
    return dfb.Squeeze().inverse(grid).numpy()


def by_statistics(statistics, keep, granularity):
    """`dfb.DimensionFactorization.from_contributions`, or its counterpart for other granularities."""
    if granularity in ("block", "channel", "free"):
        return dfb.DimensionFactorization.from_contributions(statistics, keep, granularity)
    shape = np.shape(statistics[0])
    keeps = [keep] * len(statistics) if isinstance(keep, str) else keep
    kept, left, grid = [], [], np.arange(np.prod(shape)).reshape(shape)
    for statistic, half in zip(statistics, keeps):
        if granularity == "colours":
            channels = squeezed(grid)
            ranked = np.argsort(statistic.ravel()[channels].mean(axis=(0, 1)))
            low, high = (np.sort(part) for part in np.split(ranked, 2))
            stay, leave = (high, low) if half == "high" else (low, high)
            grid, leaves = channels[..., stay], channels[..., leave]
        else:
            grid, leaves = by_rivals(grid, statistic.ravel()[grid] * (1 if half == "high" else -1), granularity)
        kept.append(grid)
        left.append(leaves)
    return dfb.DimensionFactorization(shape, kept, left)


def by_rivals(grid, scores, granularity):
    """What stays and what leaves: of every two horizontal neighbours one, or of every two rows (columns) one, by averages."""
    height, width, channels = grid.shape
    blocks, scores = (a.reshape(height // 2, 2, width // 2, 2, channels).swapaxes(1, 2) for a in (grid, scores))
    if granularity != "pair":
        scores = scores.mean(axis=(1, 3) if granularity == "row" else (0, 2), keepdims=True)
    rivals = 2 if granularity == "row" else 3
    order = np.broadcast_to(np.argsort(-scores, axis=rivals, kind="stable"), blocks.shape)
    ranked = np.moveaxis(np.take_along_axis(blocks, order, axis=rivals), rivals, 0)
    return tuple(half.reshape(height // 2, width // 2, 2 * channels) for half in ranked)


def with_halves(flow):
    """The distribution with the channels that stay before those that leave, for the couplings that follow a squeeze."""
    preprocessing, multiscale = flow.distribution.bijector.bijectors
    split, levels = multiscale.factorization, multiscale.levels
    grid = np.arange(np.prod(split.event_shape)).reshape(split.event_shape)
    for k, (kept, left) in enumerate(zip(split.kept, split.left)):
        both, channels = np.concatenate([kept, left], axis=-1), squeezed(grid)
        order = np.argmax(channels[0, 0, :, np.newaxis] == both[0, 0], axis=0)
        assert np.array_equal(channels[..., order], both), "not the same channels everywhere"
        parts = []
        for part in levels[k].bijectors:
            parts += [part, tfb.Invert(tfb.Permute(order))] if isinstance(part, dfb.Squeeze) else [part]
        levels[k] = dfb.Chain(parts)
        grid = kept
    chain = dfb.Chain([preprocessing, dfb.Multiscale(levels, split)])
    return type(flow)(tfd.TransformedDistribution(flow.distribution.distribution, chain), grey_levels=flow.grey_levels)


def _greedy(candidates, covariance):
    """Of every group `[groups, candidates, dimensions of each]` the half that adds the most entropy to all chosen before."""
    residual = covariance + 1e-6 * np.mean(np.diag(covariance)) * np.eye(len(covariance))
    groups, size, _ = candidates.shape
    quota, is_chosen = (size + 1) // 2, np.zeros([groups, size], bool)
    for _ in range(groups * quota):
        gains = np.linalg.slogdet(residual[candidates[..., :, np.newaxis], candidates[..., np.newaxis, :]])[1]
        is_open = ~is_chosen & (is_chosen.sum(axis=1, keepdims=True) < quota)
        best = np.unravel_index(np.argmax(np.where(is_open, gains, -np.inf)), gains.shape)
        is_chosen[best], added = True, candidates[best]
        residual = residual - residual[:, added] @ np.linalg.solve(residual[np.ix_(added, added)], residual[added])
    return candidates[is_chosen].ravel()


def contributions(model, train, seed):
    """Of a model from which nothing leaves."""
    batches = tf.data.Dataset.from_tensor_slices(train[:STATISTICS_EVENTS]).batch(1000)
    return np.stack(dimflows.likelihood_contributions(model.bijector, batches, seed=seed))


def of_actnorm(model):
    """The share of the contributions that is ActNorm's: that of the same flow without its couplings."""
    multiscale = model.bijector.bijectors[-1]
    levels = [
        dfb.Chain([part for part in level.bijectors if not isinstance(part, dfb.AffineCoupling)]) for level in multiscale.levels
    ]
    event_shape = model.event_shape.as_list()
    rest = dfb.Multiscale(levels, None, event_shape=event_shape)
    return np.stack(dimflows.likelihood_contributions(rest, [tf.zeros([1, *event_shape])]))


def attributed(model, study, event_shape, levels, seed, attribution):
    """A Glow from which nothing leaves, with another attribution of the log-dets of its convolutions."""
    flow = dimflows.recipes.glow(
        event_shape, grey_levels=levels, factorization=None, seed=seed, attribution=attribution, **study.flow
    )
    other = dimflows.FlowModel(flow, seed=seed)
    other.set_weights(model.get_weights())
    return other


class Snapshots(keras.callbacks.Callback):
    """The contributions after some numbers of steps."""

    def __init__(self, train, seed):
        super().__init__()
        self._train, self._seed, self.taken = train, seed, {}

    def on_train_batch_end(self, batch, logs=None):
        """Takes them."""
        if batch + 1 in SNAPSHOTS:
            self.taken[str(batch + 1)] = contributions(self.model, self._train, self._seed)


def factorization(name, shape, statistics, seed):
    """The split of a name."""
    what, *rest = name.split()
    num_levels = 1 + len(statistics["log-det"])
    if what in ("checkerboard", "channels"):
        return getattr(dfb.DimensionFactorization, what)(shape, num_levels)
    if name == "random colours":
        return by_statistics(np.random.default_rng(seed).normal(size=[num_levels - 1, *shape]), "high", "colours")
    if what.endswith("random"):
        return dfb.DimensionFactorization.random(shape, num_levels, seed=[seed, len(what)])
    if what == "entropy":
        values = entropy_statistics(shape, num_levels - 1, statistics["covariance"], rest[0])
        return by_statistics(values, "high", rest[0])
    letters, granularity = rest
    keep = ["high" if letter == "L" else "low" for letter in letters]
    if what.startswith("online"):
        return dfb.OnlineFactorization(dfb.DimensionFactorization.channels(shape, num_levels), keep, granularity)
    if what == "precision":  # minus the log of a dimension's variance given all others
        values = [np.log(np.diag(np.linalg.inv(statistics["covariance"]))).reshape(shape)] * len(letters)
    else:
        values = statistics[what]
    return by_statistics(values, keep, granularity)


def with_exits(flow, seed):
    """The distribution with a conditional Gaussian, of a small ResNet, for what leaves at each factor-out."""
    preprocessing, multiscale = flow.distribution.bijector.bijectors
    exits = []
    for k, (kept, left) in enumerate(zip(multiscale.factorization.kept, multiscale.factorization.left)):
        inputs, outputs = kept.shape[-1], 2 * left.shape[-1]
        network = dimflows.networks.ResNet(inputs, outputs, width=16, num_blocks=1, seed=1000 * seed + k)
        exits.append(dfb.ConditionalTransform(network, dfb.transformers.Affine("tanh"), event_ndims=3))
    multiscale = dfb.Multiscale(multiscale.levels, multiscale.factorization, exits)
    chain = dfb.Chain([preprocessing, multiscale])
    return type(flow)(tfd.TransformedDistribution(flow.distribution.distribution, chain), grey_levels=flow.grey_levels)


def train(study, events, levels, name, found, seed):
    """A trained model with the split of a name, its test bits/dim, and the seconds that it took."""
    split, callbacks = factorization(name, events[0].shape[1:], found, seed), []
    if isinstance(split, dfb.OnlineFactorization):  # online-N: a decision after every N steps
        batches = tf.data.Dataset.from_tensor_slices(events[0][:STATISTICS_EVENTS]).batch(1000)
        callbacks = [dimflows.training.DecideFactorization(batches, int(name.split()[0].removeprefix("online-")), seed)]
    if name.startswith("after") and study.is_equal_cost:  # as many steps as phase one and this training have together
        study = study._replace(steps=study.steps - int(name.split()[0].removeprefix("after-")))
    return fit(study, events, levels, split, seed, callbacks, has_halves=name.endswith("colours"))


def fit(study, events, levels, split, seed, callbacks=(), has_halves=False):
    """A trained model, its test bits/dim, and the seconds that it took."""
    start = time.perf_counter()
    train, test = events
    keras.utils.set_random_seed(seed)
    build = dimflows.recipes.get(study.recipe)
    flow = build(train.shape[1:], grey_levels=levels, factorization=split, seed=seed, **study.flow)
    flow = with_halves(flow) if has_halves else flow
    flow = with_exits(flow, seed) if study.exits and split is not None else flow
    model = dimflows.FlowModel(flow, seed=seed)
    model.adapt(train[:512])
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, study.steps)
    model.compile(keras.optimizers.Adam(rate, global_clipnorm=100.0))
    data = tf.data.Dataset.from_tensor_slices(train).shuffle(len(train), seed=seed).repeat().batch(BATCH, drop_remainder=True)
    model.fit(data.take(study.steps), verbose=0, callbacks=list(callbacks))
    parts = np.array_split(test, max(1, len(test) // 1000))
    log_prob = np.concatenate([model.log_prob(part, seed=k) for k, part in enumerate(parts)])
    bits = -log_prob.mean(dtype=np.float64) / (np.prod(train.shape[1:]) * np.log(2.0))
    return model, round(float(bits), 4), round(time.perf_counter() - start, 1)


def phase_one(path, study, events, levels, seed):
    """Statistics of the data and of a model from which nothing leaves, and that model's bits/dim."""
    if not path.is_file():
        snapshots = Snapshots(events[0], seed)
        model, bits, seconds = fit(study, events, levels, None, seed, [snapshots])
        values = {"log-det": contributions(model, events[0], seed), "bits_per_dim": bits, "seconds": seconds}
        if study.recipe == "realnvp" and events[0].ndim == 4:
            values["without-actnorm"] = values["log-det"] - of_actnorm(model)
        if study.recipe == "glow":
            models = {how: attributed(model, study, events[0].shape[1:], levels, seed, how) for how in ATTRIBUTIONS}
            values |= {how: contributions(other, events[0], seed) for how, other in models.items()}
        values |= {f"after-{steps}": taken for steps, taken in snapshots.taken.items()}
        np.savez(path, **values, covariance=covariance(events[0], levels))
    with np.load(path) as stored:
        found = dict(stored)
    return found | {"per-level": np.diff(found["log-det"], axis=0, prepend=0.0)}


def run(name, seed):
    """Test bits/dim of all splits of a study from one seed."""
    study = STUDIES[name]
    settings = json.dumps([study.data, study.recipe, study.flow, study.steps, seed])
    path = RUNS / hashlib.sha256(settings.encode()).hexdigest()[:12]
    path.mkdir(parents=True, exist_ok=True)
    (path / "settings.json").write_text(settings)
    kind = "exits" if study.exits else "equal_cost" if study.is_equal_cost else "row"
    results = path / f"{kind}.json"
    row = {"seed": seed, "bits_per_dim": {}, "seconds": {}}
    if results.is_file():
        row |= json.loads(results.read_text())
    load, levels = DATASETS[study.data]
    events = [*load()]
    found = phase_one(path / "statistics.npz", study, events, levels, seed)
    row["nothing_leaves"] = float(found["bits_per_dim"])
    for split in study.splits:
        if split in row["bits_per_dim"]:
            continue
        model, row["bits_per_dim"][split], row["seconds"][split] = train(study, events, levels, split, found, seed)
        row["parameters"] = model.count_params()
        results.write_text(json.dumps(row))
        print(name, seed, split, row["bits_per_dim"][split], row["seconds"][split], flush=True)
    return row, found


def summary(study, rows):
    """Of every split the mean of its bits/dim, and mean and standard error of its gain over the first one of the same seed."""
    result = {}
    for split in study.splits:
        bits = [row["bits_per_dim"][split] for row in rows]
        gains = [row["bits_per_dim"][study.splits[0]] - row["bits_per_dim"][split] for row in rows]
        result[split] = {"bits_per_dim": round(statistics.mean(bits), 4), "gain": round(statistics.mean(gains), 4)}
        error = statistics.stdev(gains) / len(gains) ** 0.5
        result[split]["standard_error"] = round(error, 4)
    return result


def stability(shape, found):
    """Shares of the dimensions that two rankings both let stay at the first factor-out: by chance one half."""
    how = "free" if len(shape) == 1 else "block"

    def kept(statistics, key):
        split = dfb.DimensionFactorization.from_contributions(statistics[key], "high", how)
        return split.levels_reached() > 1

    def agreement(pairs):
        return round(statistics.mean(2.0 * float(np.mean(a & b)) for a, b in pairs), 3)

    keys = [f"after-{steps}" for steps in SNAPSHOTS if all(f"after-{steps}" in own for own in found)]
    keys += [how for how in ATTRIBUTIONS if all(how in own for own in found)]
    return {
        key: {
            "with_the_end": agreement((kept(own, key), kept(own, "log-det")) for own in found),
            "between_seeds": agreement(itertools.combinations([kept(own, key) for own in found], 2)),
        }
        for key in keys
    }


def explained_by_position(found):
    """Of the variance of contributions within 2x2 blocks, the share that is the same in all blocks: of position and colour.

    Positions in a block mean little in a picture, but the masks of the couplings tell them apart, everywhere in the same way.
    """
    shares = []
    for own in found:
        statistic = own["log-det"][0]
        blocks = squeezed(statistic).reshape(-1, statistic.shape[-1], 4)
        within = blocks - blocks.mean(axis=-1, keepdims=True)
        shares.append(np.mean(within.mean(axis=0) ** 2) / np.mean(within**2))
    return round(float(np.mean(shares)), 3)


def save_picture(study, found):
    """The contributions of one seed, and how many levels the dimensions pass in some splits by them."""
    names = [split for split in study.splits if split.split()[0] in ("channels", "checkerboard", "log-det")]
    shape = found["log-det"].shape[1:]
    path = machine.RESULTS / f"paper_lcma_splits_{study.data.split()[0].lower()}.png"
    plot.save_factorizations(path, {name: factorization(name, shape, found, 0) for name in names}, found["log-det"])


def main():
    path = machine.RESULTS / "paper_lcma_splits.json"
    for name in sys.argv[1:] or STUDIES:
        study = STUDIES[name]
        rows, found = zip(*(run(name, seed) for seed in range(study.seeds)))
        seconds = statistics.median(value for row in rows for value in row["seconds"].values())
        result = {
            "data": study.data,
            "recipe": study.recipe,
            "flow": study.flow,
            "steps": study.steps,
            "parameters": rows[0]["parameters"],
            "cpu": machine.describe()["cpu"],
            "seconds_per_training": seconds,
            "table": summary(study, rows),
            "stability": stability(found[0]["log-det"].shape[1:], found),
            "rows": [{key: value for key, value in row.items() if key != "seconds"} for row in rows],
        }
        if found[0]["log-det"].ndim == 4:
            result["explained_by_position"] = explained_by_position(found)
        if name in PICTURED:
            save_picture(study, found[0])
        budget = {"batch_size": BATCH, "optimizer": f"Adam, {LEARNING_RATE} with cosine decay, one training per split and seed"}
        others = json.loads(path.read_text())["studies"] if path.is_file() else {}
        machine.write("paper_lcma_splits", {"budget": budget, "studies": others | {name: result}})


if __name__ == "__main__":
    main()
