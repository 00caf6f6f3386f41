"""What is printed of bijectors, masks, transformers, factorizations, networks, distributions and models."""

import copy
import functools
import math
import pickle
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras
from registry import ENTRIES, built

import tfp_dimflows as dimflows
from tfp_dimflows import networks, recipes
from tfp_dimflows.training.summary import owned_variables

dfb, dfd = dimflows.bijectors, dimflows.distributions
tfb, tfd = tfp.bijectors, tfp.distributions

FIRST = dfb.masks.Channel(event_ndims=1)


def transformed(bijector, dims=2):
    return tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [dims]), bijector)


# Bijectors.


def test_a_chain_prints_as_that_of_tfp_with_the_arguments_of_its_parts():
    parts = [tfb.Exp(), dfb.ActNorm(2), tfb.Chain([tfb.Shift([1.0, 2.0])])]
    assert str(dfb.Chain(parts[:2])) == (
        'dimflows.bijectors.Chain(\n  "chain", batch_shape=[], min_event_ndims=1,\n'
        "  bijectors=[Exp(), ActNorm(channels=2, log_scale_factor=1.0)],\n)"
    )
    assert repr(dfb.Chain(parts, name="mine")) == (
        "<dimflows.bijectors.Chain 'mine' batch_shape=[] forward_min_event_ndims=1 inverse_min_event_ndims=1 dtype_x=float32 "
        "dtype_y=float32 bijectors=[Exp(), ActNorm(channels=2, log_scale_factor=1.0), Chain(bijectors=[Shift(...)])]>"
    )
    inside = re.sub("dtype_[xy]=[a-z0-9?]+", "", repr(tfb.Chain(parts)))
    assert "<dimflows.bijectors.ActNorm 'actnorm' batch_shape=[] " in inside and " channels=2 log_scale_factor=1.0>" in inside


def test_names_of_parts_are_told_unless_they_are_the_default():
    printed = repr(dfb.Chain([dfb.ActNorm(2, name="outer"), dfb.ActNorm(2), tfb.Scale(2.0, name="double"), tfb.Scale(3.0)]))
    assert "ActNorm(channels=2, log_scale_factor=1.0, name='outer'), ActNorm(channels=2, log_scale_factor=1.0)," in printed
    assert "Scale(scale=2.0, name='double'), Scale(scale=3.0)]" in printed


@pytest.mark.parametrize("name", sorted(name for name, entry in ENTRIES.items() if entry.core))
def test_every_bijector_prints_parts_and_sizes_but_no_values_and_no_addresses(name):
    bijector = built(name, ENTRIES[name].states[0])
    line, page = repr(bijector), str(bijector)
    assert "\n" not in line and len(line) < 3000
    assert page.count("\n") <= 100
    for printed in (line, page):
        assert " at 0x" not in printed and "numpy=" not in printed and "array(" not in printed
    if isinstance(bijector, dfb.FlowBijector):
        told = {key: value for key, value in bijector.parameters.items() if isinstance(value, int) and value is not False}
        assert [key for key in told if f" {key}={told[key]}" not in line] == []
        assert re.match(rf'dimflows\.bijectors\.{type(bijector).__name__}\(\n? *"{bijector.name}", ', page)


def test_a_coupling_tells_its_network_mask_and_transformer():
    coupling = dfb.AffineCoupling(networks.MLP(1, 2, hidden=[8], seed=3, name="net"), FIRST, scale="exp")
    network = "MLP(inputs=1, outputs=2, hidden=(8,), activation=relu, condition_channels=0, name='net')"
    assert f" network={network} " in repr(coupling)
    assert " mask=Channel(event_ndims=1) scale='exp' initial_gain=1.0>" in repr(coupling)
    spline = dfb.Coupling(tf_keras.layers.Dense(2), FIRST, dfb.transformers.Spline(num_bins=4))
    assert "transformer=Spline(num_bins=4, bound=5.0)>" in repr(spline)
    assert re.search(r"network=<[a-z_.]*\.Dense object> ", repr(spline))
    assert "network=<lambda> " in repr(dfb.AdditiveCoupling(lambda x: x, FIRST))
    partial = dfb.ConditionalTransform(networks.MLP(2, 5), functools.partial(dfb.Planar, 2), event_ndims=1)
    assert " transformer=partial(Planar, 2) " in repr(partial)


def test_a_scan_tells_one_of_its_bijectors_and_its_length():
    scan = dfb.Scan(lambda k: dfb.Chain([dfb.ActNorm(3), dfb.InvertibleConv1x1(3, seed=k)]), 20, memory="recompute")
    assert str(scan) == (
        'dimflows.bijectors.Scan(\n  "scan", batch_shape=[], min_event_ndims=1,\n  bijector=Chain(bijectors=[\n'
        "    ActNorm(channels=3, log_scale_factor=1.0),\n"
        "    InvertibleConv1x1(channels=3, attribution='polar', matrix='random'),\n  ]),\n"
        "  length=20, memory='recompute',\n)"
    )
    parts = "[ActNorm(...), InvertibleConv1x1(...)]"
    assert repr(scan).endswith(f" bijector=Chain(bijectors={parts}) length=20 memory='recompute'>")


def test_composites_tell_their_parts():
    factorization = dfb.DimensionFactorization.channels([4], num_levels=2)
    levels = [tfb.Scale(2.0), tfb.Scale(3.0)]
    told = "factorization=DimensionFactorization(event_shape=(4,), num_levels=2)"
    flow = dfb.Multiscale(levels, factorization)
    assert repr(flow).endswith(f" levels=[Scale(scale=2.0), Scale(scale=3.0)] {told}>")
    lcma = dfb.LCMA(levels, [[0.1, 0.4, 0.2, 0.3]])
    assert repr(lcma).endswith(f" levels=[Scale(scale=2.0), Scale(scale=3.0)] {told} keep='high'>")
    vflow = dfb.VFlow(flow, None, num_extra=2, event_ndims=1)
    multiscale = f"Multiscale(levels=[Scale(...), Scale(...)], {told})"
    assert repr(vflow).endswith(f" flow={multiscale} posterior=None num_extra=2 event_ndims=1>")
    pnf = dfb.PNF(tfb.Scale(2.0), [tfb.Identity()], event_shape=[8])
    assert repr(pnf).endswith(" base=Scale(scale=2.0) details=[Identity()] event_shape=[8]>")


def test_of_tensors_shapes_are_told_and_of_long_lists_the_ends():
    planar = dfb.Planar(3)
    assert repr(planar).endswith(" dims=3 params=<tf.Variable 'params:0' shape=(7,) dtype=float32>>")
    affine = repr(dfb.ElementwiseAffine(tf.zeros([2, 3]), np.ones([2, 3])))
    assert affine.endswith(" shift=<tf.Tensor shape=(2, 3) dtype=float32> log_scale=<ndarray shape=(2, 3) dtype=float64>>")
    scale = dfb.Chain([tfb.Scale(tfp.util.TransformedVariable([2.0], tfb.Exp()))])
    assert "[Scale(scale=<TransformedVariable shape=(1,) dtype=float32>)]" in repr(scale)
    many = repr(dfb.Chain([tfb.Shift(float(k)) for k in range(96)]))
    assert "[Shift(shift=0.0), Shift(shift=1.0), Shift(shift=2.0), ..., Shift(shift=93.0)," in many


def test_a_page_holds_a_deep_flow():
    def chain(num, part):
        return dfb.Chain([part() for _ in range(num)])

    def coupling():
        return dfb.AffineCoupling(lambda x: x, FIRST)

    page = str(chain(4, lambda: chain(40, coupling)))
    assert page.count("AffineCoupling(network=<lambda>, mask=Channel(") == 4 * 6 and page.count("\n      ...,\n") == 4
    page = str(chain(12, lambda: chain(12, lambda: chain(1, coupling))))
    assert page.count("\n") <= 100 and page.count("Chain(...)") == 12 * 12
    assert max(map(len, page.splitlines())) <= 100


def test_glow_prints_every_step_once():
    page = str(recipes.glow([8, 8, 1], num_levels=2, depth=5, width=4).bijector)
    assert page.count("Scan(") == page.count("length=5") == page.count("ActNorm(") == 2
    assert page.count("GlowConvNet(\n") == page.count("'split_prior'") == 2


def test_a_bijector_of_a_user_prints_as_ours():
    class Doubling(dfb.FlowBijector):
        def __init__(self, power=1, inner=None, name="doubling"):
            super().__init__(forward_min_event_ndims=1, parameters=dict(locals()), name=name)

    class Bare(dfb.FlowBijector):
        def __init__(self):
            super().__init__(forward_min_event_ndims=0, name="bare")

    assert str(Doubling(inner=tfb.Exp())).endswith('("doubling", batch_shape=[], min_event_ndims=1, power=1, inner=Exp())')
    assert str(Bare()) == 'dimflows.bijectors.Bare("bare", batch_shape=[], min_event_ndims=0)'


def test_printing_runs_no_network():
    def network(x):
        raise AssertionError("the network was run")

    unbuilt = keras.Sequential([keras.layers.Dense(2)])
    flow = dfb.Chain([dfb.AdditiveCoupling(network, FIRST), dfb.AffineCoupling(unbuilt, FIRST)])
    assert "network=<Sequential name=" in str(flow) and "network=network" in str(flow) and repr(flow)
    assert not unbuilt.built

    @tf.function
    def traced(x):
        printed.append(repr(dfb.Chain([dfb.ElementwiseAffine(x)])))
        return x

    printed = []
    traced(tf.zeros([2]))
    assert "shift=<tf.Tensor shape=(2,) dtype=float32>" in printed[0]


# Masks, transformers, factorizations, estimators, networks.

PLAIN = {
    "Checkerboard(parity=1)": dfb.masks.Checkerboard(1),
    "Columns(parity=0)": dfb.masks.Columns(),
    "Channel(flip=True, event_ndims=1, num_conditioning=2)": dfb.masks.Channel(True, 1, 2),
    "Channel(event_ndims=3)": dfb.masks.Channel(),
    "Index(indices=[0, 2, 5], size=9)": dfb.masks.Index([0, 5, 2], 9),
    "Index(indices=[0, 2, 4, ..., 994, 996, 998], size=1000)": dfb.masks.Index(range(0, 1000, 2), 1000),
    "Additive()": dfb.transformers.Additive(),
    "Affine(scale='exp')": dfb.transformers.Affine("exp"),
    "Gated(bias=2.0)": dfb.transformers.Gated(2.0),
    "MixtureLogistic(num_components=3)": dfb.transformers.MixtureLogistic(3),
    "Spline(num_bins=8, bound=5.0)": dfb.transformers.Spline(),
    "Transformer(function=Shift, params_per_dim=1)": dfb.Transformer(tfb.Shift, 1),
    "ExactLogDet()": dfb.residual.ExactLogDet(),
    "PowerSeries(num_terms=5, num_probes=1, seed=(0, 1))": dfb.residual.PowerSeries(seed=(0, 1)),
    "RussianRoulette(distribution='geometric', rate=0.5, num_exact=2, num_exact_evaluation=20, num_probes=1)": (
        dfb.residual.RussianRoulette("geometric")
    ),
    "RungeKutta4(num_steps=8)": dfb.continuous.RungeKutta4(8),
    "DimensionFactorization(event_shape=(4,), num_levels=2)": dfb.DimensionFactorization.channels([4], 2),
    "OnlineFactorization(initial=DimensionFactorization(event_shape=(4,), num_levels=2), keep=['low'], granularity='free')": (
        dfb.OnlineFactorization(dfb.DimensionFactorization.channels([4], 2), "low")
    ),
    "MLP(inputs=2, outputs=4, hidden=(8,), activation=tanh, condition_channels=0, seed=5, name='net')": (
        networks.MLP(2, 4, hidden=[8], activation="tanh", seed=5, name="net")
    ),
    "SpectralDense(inputs=2, outputs=3, coeff=0.9, num_iterations=5, seed=1, name='net')": (
        networks.SpectralDense(2, 3, seed=1, name="net")
    ),
}


@pytest.mark.parametrize("expected", PLAIN)
def test_plain_objects_print_as_calls(expected):
    assert repr(PLAIN[expected]) == str(PLAIN[expected]) == expected


def test_masks_and_bijectors_are_copied_as_before():
    for text, item in PLAIN.items():
        if isinstance(item, (dfb.masks.Checkerboard, dfb.masks.Channel, dfb.masks.Index)):
            assert repr(pickle.loads(pickle.dumps(item))) == repr(copy.deepcopy(item)) == text
    assert repr(dfb.masks.Index([0, 2], 5).complement()) == "Index(indices=[1, 3, 4], size=5)"
    chain = dfb.Chain([dfb.ElementwiseAffine(1.0)], name="first")
    assert repr(chain.copy(name="second")) == repr(chain).replace("first", "second")
    assert repr(copy.deepcopy(chain)) == repr(chain)


def test_networks_keep_their_configuration():
    net = networks.SpectralDense(2, 3, coeff=0.5, seed=1, name="net")
    config = net.get_config()
    assert set(config) == {"name", "trainable", "dtype", "inputs", "outputs", "coeff", "num_iterations", "seed"}
    assert (config["inputs"], config["outputs"], config["coeff"], config["seed"]) == (2, 3, 0.5, 1)
    assert repr(type(net).from_config(config)) == repr(net)


# Distributions.


def test_distributions_tell_what_they_hold():
    vflow = dfb.VFlow(tfb.Scale(2.0), posterior=None, num_extra=2, event_ndims=1)
    augmented = dfd.Augmented(transformed(vflow, 3), num_extra=2)
    assert repr(augmented) == (
        "<dimflows.distributions.Augmented 'Augmented' batch_shape=[] event_shape=[1] dtype=float32 "
        "distribution=TransformedDistribution(distribution=Sample(...), bijector=VFlow(...)) num_extra=2 num_samples=1>"
    )
    uniform = tfd.Independent(tfd.Uniform(tf.zeros([4]), 8.0), 1)
    dequantized = dfd.Dequantized(uniform, grey_levels=8, noise=dfb.ActNorm(4))
    assert str(dequantized).startswith(
        'dimflows.distributions.Dequantized(\n  "Dequantized", batch_shape=[], event_shape=[4], dtype=int32,\n'
    )
    assert "\n  grey_levels=8,\n  noise=ActNorm(channels=4, log_scale_factor=1.0),\n  num_samples=1,\n)" in str(dequantized)
    prior = dfd.VAEPrior(keras.layers.Dense(4), keras.layers.Dense(8), latent_dims=2)
    assert "encoder=<Dense name=" in repr(prior) and "latent_dims=2 likelihood='per_dimension' num_samples=1>" in repr(prior)


# The summary of a model.


def summary(model, **options):
    """What is printed, and of every row path, owner, shape, size and, if it is told, whether it is trained."""
    texts = []
    model.summary(print_fn=texts.append, **options)
    (text,) = texts
    rows = [line.rsplit(maxsplit=1) for line in text.splitlines()]
    pattern = re.compile(r"(\S+) \((\w+)\) +(\(.*?\)) +([\d,]+)(?: +([YN]))?$")
    rows = [match.groups() for match in map(pattern.match, text.splitlines()) if match]
    return text, [(path, owner, shape, int(size.replace(",", "")), *rest) for path, owner, shape, size, *rest in rows]


def count(text, kind):
    return int(re.search(f"^ {kind} params: ([0-9,]+) ", text, flags=re.MULTILINE)[1].replace(",", ""))


def test_raw_variables_are_told_by_their_owners():
    scale = tfp.util.TransformedVariable(1.0, tfb.Softplus())
    base = tfd.Sample(tfd.Normal(tf.Variable(0.0), scale), [2])
    shifts = [tfb.Shift(tf.Variable([0.0, 0.0])), tfb.Shift(tf.Variable([1.0, 1.0], trainable=False))]
    chain = tfb.Chain([*shifts, tfb.Scale(tf.Variable([1.0, 1.0], name="mine"))])
    model = dimflows.FlowModel(tfd.TransformedDistribution(base, chain), seed=0, name="model")
    text, rows = summary(model, show_trainable=True)
    assert rows == [
        ("Normal/loc", "Normal", "()", 1, "Y"),
        ("Normal/scale", "Normal", "()", 1, "Y"),
        ("shift/shift", "Shift", "(2,)", 2, "Y"),
        ("shift_1/shift", "Shift", "(2,)", 2, "N"),
        ("scale/mine", "Scale", "(2,)", 2, "Y"),
    ]
    assert text.startswith('Model: "model"\n')
    assert " Total params: 8 (32.00 B)\n Trainable params: 6 (24.00 B)\n Non-trainable params: 2 (8.00 B)" in text
    assert "Optimizer" not in text
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9))
    assert count(summary(model)[0], "Optimizer") == 6 + 1  # momenta and the learning rate


def test_the_variables_of_a_scan_have_the_paths_of_its_bijectors():
    model = dimflows.FlowModel(recipes.glow([8, 8, 1], num_levels=2, depth=3, width=4))
    text, rows = summary(model)
    shapes = {path: shape for path, _, shape, _, _ in rows}
    assert shapes["multiscale/level_1/scan/actnorm/log_scale"] == "(3, 8)"
    assert shapes["multiscale/level_0/scan/affine_coupling/network/conv_2/kernel"] == "(3, 1, 1, 4, 4)"
    assert shapes["multiscale/exit_1/network/conv/kernel"] == "(3, 3, 9, 16)"
    assert count(text, "Non-trainable") == 0


def test_seeds_and_maps_of_indices_count_nowhere_and_estimates_are_not_trained():
    model = dimflows.FlowModel(recipes.residual_flow([4], depth=1, width=4))
    integers = [v for v in model.weights if "int" in v.dtype]
    assert any("dimension_order" in v.name for v in integers) and any("seed" in v.path for v in integers)
    before = model.count_params()
    text, rows = summary(model, show_trainable=True)
    assert count(text, "Total") == before - sum(math.prod(v.shape) for v in integers) == sum(row[3] for row in rows)
    estimates = [row for row in rows if "singular_vector" in row[0]]
    assert estimates and all(row[4] == "N" for row in estimates)
    assert count(text, "Non-trainable") == sum(row[3] for row in estimates)
    assert model.count_params() == before


def tfp_autoregressive():
    network = tfb.AutoregressiveNetwork(params=2, event_shape=[2], hidden_units=[4])
    return transformed(tfb.MaskedAutoregressiveFlow(network))


def variables_in_functions():
    weight = tf.Variable([[0.1, 0.1]], name="weight")
    return transformed(dfb.AffineCoupling(lambda x: x @ weight, FIRST, scale="exp"))


def unbuilt_networks():
    return transformed(dfb.AffineCoupling(keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(2)]), FIRST))


MODELS = {
    "maf": lambda: recipes.maf([3], depth=2, hidden=[4]),
    "pnf": lambda: recipes.pnf([8], num_halvings=1, num_levels=2, depth=1, width=4, num_blocks=1),
    "vflow": lambda: recipes.vflow([4, 4, 1], grey_levels=4, width=4),
    "flow-vae": lambda: recipes.flow_vae([4, 4, 1], width=4),
    "ffjord": lambda: recipes.ffjord([2]),
    "vector glow": lambda: recipes.glow([5], depth=1, width=4),
    "tf_keras": tfp_autoregressive,
    "functions": variables_in_functions,
    "unbuilt": unbuilt_networks,
}


@functools.cache
def model_of(name):
    return dimflows.FlowModel(MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_every_variable_has_one_path(name):
    model = model_of(name)
    text, rows = summary(model)
    variables = [v for v in model.weights if "float" in v.dtype]
    assert count(text, "Trainable") == sum(math.prod(v.shape) for v in model.trainable_variables) > 0
    assert len(rows) == len(variables) and len({path for path, *_ in rows}) == len(rows)
    assert [row for row in rows if row[1] == "FlowModel"] == []  # none is left without an owner
    owned = {owned.path: owned.variable for owned in owned_variables(model.distribution)}
    assert {id(owned[path]) for path, *_ in rows} == {id(v.value) for v in variables}
    assert all(str(tuple(owned[path].shape)) == shape for path, _, shape, *_ in rows)


def test_paths_of_posteriors_noises_and_networks_tell_their_roles():
    paths = [owned.path for owned in owned_variables(model_of("vflow").distribution)]
    assert {path.split("/")[0] for path in paths} >= {"vflow", "noise"}
    assert any(path.startswith("vflow/posterior/") for path in paths) and any(path.startswith("vflow/flow/") for path in paths)
    roles = [path.split("/")[:2] for path in (owned.path for owned in owned_variables(model_of("flow-vae").distribution))]
    assert ["VAEPrior", "encoder"] in roles and ["VAEPrior", "decoder"] in roles
    (weight,) = owned_variables(variables_in_functions())
    assert (weight.path, weight.owner) == ("affine_coupling/weight", "AffineCoupling")


def test_options_of_the_summary():
    model = model_of("maf")
    whole, rows = summary(model)
    assert summary(model, expand_nested=True)[0] == whole
    part, fewer = summary(model, layer_range=["actnorm", "autoregressive_1/network/dense_0"])
    assert fewer == rows[rows.index(fewer[0]) :][: len(fewer)]
    assert fewer[0][0] == "actnorm/shift" and fewer[-1][0] == "autoregressive_1/network/dense_0/bias"
    assert count(part, "Total") == count(whole, "Total")
    assert summary(model, layer_range=["autoregressive_1/network/dense_0", "actnorm"])[1] == fewer
    with pytest.raises(ValueError, match="FlowModel.summary: got layer_range=.'nothing', 'actnorm'., needs patterns"):
        model.summary(layer_range=["nothing", "actnorm"])
    narrow = summary(model, line_length=50)[0].splitlines()
    assert max(map(len, narrow)) == len(narrow[1]) == 50
    assert len(narrow) > len(whole.splitlines()) + 5  # paths go over several lines
    wide = summary(model, line_length=100, positions=[0.5, 0.6, 0.8])[0].splitlines()
    assert len(wide[1]) == 80
    with pytest.raises(ValueError, match="FlowModel.summary: got line_length=10 and positions"):
        model.summary(line_length=10)


def test_the_summary_is_printed(capsys):
    assert dimflows.FlowModel(variables_in_functions()).summary() is None
    assert "affine_coupling/weight (AffineCoupling)" in capsys.readouterr().out
