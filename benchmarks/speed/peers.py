"""Ours beside other libraries on the same work: time to the first step, training step, log-probability, sampling.

Run as `python -m benchmarks.speed.peers [TASK ...]` from the repository's root, after
`pip install -e ".[benchmarks]"`. Every contender has a process of its own; they take turns, one working while the others wait.
"""

import functools
import json
import statistics
import sys
import time

import numpy as np

from benchmarks import machine
from benchmarks.speed import steps, turns

ROUNDS, REPEATS = 7, 3
LEARNING_RATE = 1e-4
TASKS = {
    "glow": {"shape": [32, 32, 3], "batch": 32, "levels": 3, "depth": 8, "width": 64},
    "glow_deep": {"shape": [32, 32, 3], "batch": 32, "levels": 3, "depth": 32, "width": 64},
    "realnvp": {"shape": [64], "batch": 512, "depth": 8, "hidden": [128, 128]},
    "maf": {"shape": [64], "batch": 512, "depth": 5, "hidden": [128, 128]},
    "mixture": {"shape": [64], "batch": 512, "depth": 8, "hidden": [128, 128], "components": 8},
}


# TensorFlow: ours, and TFP's own.


def ours(task, sizes):
    """The distribution of this package."""
    import tfp_dimflows as dimflows

    if task.startswith("glow"):
        shape = {"num_levels": sizes["levels"], "depth": sizes["depth"], "width": sizes["width"]}
        return dimflows.recipes.glow(sizes["shape"], **shape)
    if task == "realnvp":  # a level has depth + 1 couplings
        shape = {"num_levels": 1, "depth": sizes["depth"] - 1, "width": 128, "num_blocks": len(sizes["hidden"])}
        return dimflows.recipes.realnvp(sizes["shape"], **shape)
    if task == "mixture":
        return mixture_couplings(sizes)
    return dimflows.recipes.maf(sizes["shape"], depth=sizes["depth"], hidden=sizes["hidden"])


def mixture_couplings(sizes):
    """Couplings through mixtures of logistics, whose samples are found by bisection."""
    import tensorflow_probability as tfp

    import tfp_dimflows as dimflows

    dfb, dims, parts = dimflows.bijectors, sizes["shape"][0], []
    for k in range(sizes["depth"]):
        outputs = dims // 2 * (2 + 3 * sizes["components"])
        network = dimflows.networks.MLP(dims // 2, outputs, hidden=sizes["hidden"], seed=k)
        mask = dfb.masks.Channel(flip=k % 2 == 1, event_ndims=1)
        parts.append(dfb.MixtureLogisticCoupling(network, mask, sizes["components"]))
    noise = tfp.distributions.Sample(tfp.distributions.Normal(0.0, 1.0), sizes["shape"])
    return tfp.distributions.TransformedDistribution(noise, dfb.Chain(parts))


def of_tfp(task, sizes):
    """TFP's own flow."""
    import tensorflow as tf
    import tensorflow_probability as tfp

    tfb, tfd = tfp.bijectors, tfp.distributions
    noise = tfd.Sample(tfd.Normal(0.0, 1.0), [int(np.prod(sizes["shape"]))])
    if task.startswith("glow"):
        coupling = functools.partial(tfb.GlowDefaultNetwork, num_hidden=sizes["width"])
        return tfd.TransformedDistribution(
            noise,
            tfb.Glow(
                output_shape=tuple(sizes["shape"]),
                num_glow_blocks=sizes["levels"],
                num_steps_per_block=sizes["depth"],
                coupling_bijector_fn=coupling,
                exit_bijector_fn=tfb.GlowDefaultExitNetwork,
            ),
        )
    parts = []
    for _ in range(sizes["depth"]):
        made = tfb.AutoregressiveNetwork(2, hidden_units=sizes["hidden"], activation="relu")
        parts += [tfb.MaskedAutoregressiveFlow(made), tfb.Permute(tf.range(sizes["shape"][0])[::-1])]
    return tfd.TransformedDistribution(noise, tfb.Chain(parts))


def tensorflow(distribution, batch, shape, jit_compile):
    """The functions to be timed, and the number of parameters."""
    import tensorflow as tf
    import tf_keras

    x = tf.random.stateless_normal([batch, *shape], [0, 1])
    distribution.log_prob(x[:1])  # makes the variables
    variables = distribution.trainable_variables
    optimizer = tf_keras.optimizers.Adam(LEARNING_RATE)
    optimizer.build(variables)
    compiled = functools.partial(tf.function, autograph=False, jit_compile=jit_compile)

    @compiled
    def step(x):
        with tf.GradientTape() as tape:
            loss = -tf.reduce_mean(distribution.log_prob(x))
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss

    log_prob = compiled(distribution.log_prob)
    sample = compiled(lambda: distribution.sample(batch, seed=[0, 2]))
    functions = {"step": lambda: step(x).numpy(), "log_prob": lambda: log_prob(x).numpy(), "sample": lambda: sample().numpy()}
    return functions, sum(int(np.prod(v.shape)) for v in variables)


# PyTorch: normflows and zuko.


def of_normflows(task, sizes):
    """The model of normflows, as in its examples."""
    import normflows as nf

    if task.startswith("glow"):
        height, _, channels = sizes["shape"]
        levels, noises, flows, merges = sizes["levels"], [], [], []
        for k in range(levels):
            width = channels * 2 ** (levels + 1 - k)
            blocks = [
                nf.flows.GlowBlock(width, sizes["width"], split_mode="channel", scale=True) for _ in range(sizes["depth"])
            ]
            flows.append([*blocks, nf.flows.Squeeze()])
            merges += [nf.flows.Merge()] if k else []
            left = width if k == 0 else width // 2
            side = height // 2 ** (levels - k)
            noises.append(nf.distributions.DiagGaussian((left, side, side)))
        model = nf.MultiscaleFlow(noises, flows, merges)
        return model, lambda x: model.log_prob(x, None), lambda n: model.sample(n)[0]
    dims, flows = sizes["shape"][0], []
    for _ in range(sizes["depth"]):
        network = nf.nets.MLP([dims // 2, *sizes["hidden"], dims], init_zeros=True)
        flows += [nf.flows.AffineCouplingBlock(network), nf.flows.Permute(dims, mode="swap"), nf.flows.ActNorm(dims)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(dims, trainable=False), flows)
    return model, model.log_prob, lambda n: model.sample(n)[0]


def of_zuko(task, sizes):
    """The flow of zuko."""
    import zuko

    kind = {"realnvp": zuko.flows.RealNVP, "maf": zuko.flows.MAF}[task]
    model = kind(sizes["shape"][0], transforms=sizes["depth"], hidden_features=sizes["hidden"])
    return model, lambda x: model().log_prob(x), lambda n: model().sample((n,))


def torch_functions(made, batch, shape, is_compiled):
    """The functions to be timed, and the number of parameters."""
    import torch

    torch.manual_seed(0)
    model, log_prob, sample = made
    x = torch.randn(batch, *(shape if len(shape) == 1 else [shape[2], *shape[:2]]))
    with torch.no_grad():
        log_prob(x)  # data-dependent initialisation
    if is_compiled:
        log_prob, sample = torch.compile(log_prob), torch.compile(sample)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)

    def step():
        optimizer.zero_grad()
        loss = -log_prob(x).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    def without_gradients(function):
        with torch.no_grad():
            return function().numpy()

    functions = {
        "step": step,
        "log_prob": lambda: without_gradients(lambda: log_prob(x)),
        "sample": lambda: without_gradients(lambda: sample(batch)),
    }
    return functions, sum(p.numel() for p in model.parameters())


def single(make):
    """A contender of TensorFlow with one thread per operation: its cores do operations that do not wait for each other."""

    def contender(task, sizes):
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        return tensorflow(make(task, sizes), sizes["batch"], sizes["shape"], False)

    return contender


CONTENDERS = {
    "ours": lambda task, sizes: tensorflow(ours(task, sizes), sizes["batch"], sizes["shape"], False),
    "ours, XLA": lambda task, sizes: tensorflow(ours(task, sizes), sizes["batch"], sizes["shape"], True),
    "ours, one thread per operation": single(ours),
    "TFP": lambda task, sizes: tensorflow(of_tfp(task, sizes), sizes["batch"], sizes["shape"], False),
    "TFP, XLA": lambda task, sizes: tensorflow(of_tfp(task, sizes), sizes["batch"], sizes["shape"], True),
    "TFP, one thread per operation": single(of_tfp),
    "normflows": lambda task, sizes: torch_functions(of_normflows(task, sizes), sizes["batch"], sizes["shape"], False),
    "normflows, compiled": lambda task, sizes: torch_functions(of_normflows(task, sizes), sizes["batch"], sizes["shape"], True),
    "zuko": lambda task, sizes: torch_functions(of_zuko(task, sizes), sizes["batch"], sizes["shape"], False),
    "zuko, compiled": lambda task, sizes: torch_functions(of_zuko(task, sizes), sizes["batch"], sizes["shape"], True),
}
_OURS, _TFP = ([name, f"{name}, XLA", f"{name}, one thread per operation"] for name in ("ours", "TFP"))
_NORMFLOWS, _ZUKO = ([name, f"{name}, compiled"] for name in ("normflows", "zuko"))
ENTRANTS = {
    "glow": [*_OURS, *_TFP, *_NORMFLOWS],
    "glow_deep": ["ours", "ours, one thread per operation", "TFP", "normflows"],
    "realnvp": [*_OURS, *_NORMFLOWS, *_ZUKO],
    "maf": [*_OURS, *_TFP, *_ZUKO],
    "mixture": _OURS,
}


def answer(task, name):
    """Works as a contender."""
    functions, before = {}, 0.0

    def timed(question):
        nonlocal before
        start = time.perf_counter()
        if question == "first step":
            made, parameters = CONTENDERS[name](task, TASKS[task])
            functions.update(made)
            before = steps.peak_mib()
            functions["step"]()
            return {"seconds": time.perf_counter() - start, "parameters": parameters}
        for _ in range(REPEATS):
            functions[question]()
        return {"seconds": (time.perf_counter() - start) / REPEATS, "mib": steps.peak_mib() - before}

    turns.answer(timed)


def compare(task):
    """Medians of every contender, and the ratios to ours within a round."""
    contenders = {name: turns.Contender("benchmarks.speed.peers", "--contender", task, name) for name in ENTRANTS[task]}
    rows = {}
    for name, contender in contenders.items():
        if (first := contender.ask("first step")) is not None:
            rows[name] = {"parameters": first["parameters"], "first_step_s": round(first["seconds"], 1)}
            print(task, name, rows[name], flush=True)
    for what in ("step", "log_prob", "sample"):
        seconds = {name: [] for name in rows}
        for _ in range(1 + ROUNDS):  # the first traces and compiles
            for name in list(seconds):
                measured = contenders[name].ask(what)
                if measured is None:
                    del seconds[name]
                else:
                    seconds[name].append(measured["seconds"])
                    rows[name].setdefault("training_mib", round(measured["mib"]))
        for name, values in seconds.items():
            ratios = [other / own for other, own in zip(values[1:], seconds["ours"][1:])]
            rows[name][f"{what}_ms"] = round(1e3 * statistics.median(values[1:]), 2)
            rows[name][f"{what}_ratio_to_ours"] = round(statistics.median(ratios), 3)
    for contender in contenders.values():
        contender.end()
    return {"sizes": TASKS[task], "rows": rows}


def main():
    if sys.argv[1:2] == ["--contender"]:
        answer(*sys.argv[2:])
        return
    path = machine.RESULTS / "speed_peers.json"
    results = json.loads(path.read_text())["tasks"] if path.is_file() else {}
    for task in sys.argv[1:] or TASKS:
        results[task] = compare(task)
        machine.write("speed_peers", {"rounds": ROUNDS, "tasks": results})


if __name__ == "__main__":
    main()
