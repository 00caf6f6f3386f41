"""`dfb.Scan`: the values and gradients of a chain, from one bijector in a loop."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import (
    Mixer,
    affine_coupling,
    assert_close,
    dfb,
    dimflows,
    mixer_for,
    normal,
    pass_and_gradients,
    scan_step,
    slow,
    tf_keras_network,
)

tfb = tfp.bijectors

VECTOR, IMAGE, BATCH, LENGTH = (4,), (2, 2, 4), 7, 3
MEMORIES = ("keep", "recompute")


def half():
    return dfb.masks.Channel(event_ndims=1)


class SmoothMixer(Mixer):
    """A network with second derivatives."""

    activation = staticmethod(keras.ops.tanh)


def glow_step(k, dtype="float64", condition_shape=None):
    mask = dfb.masks.Channel()
    network = SmoothMixer((2, 2, 2), (2, 2, 4), k, dtype)
    if condition_shape:
        network = mixer_for(mask, IMAGE, 2, k, dtype, condition_shape)
    parts = [dfb.ActNorm(4, dtype=dtype), dfb.InvertibleConv1x1(4, seed=k, dtype=dtype)]
    return dfb.Chain([*parts, dfb.AffineCoupling(network, mask, "tanh", dtype=dtype)])


def closure_step(k, coupling=dfb.AffineCoupling, params_per_dim=2, **options):
    """Equal but for its variables, one of which is transformed, and with a network in a closure."""
    dense = keras.layers.Dense(2 * params_per_dim, kernel_initializer=keras.initializers.RandomNormal(seed=k), dtype="float64")
    dense.build([None, 2])
    scale = tfp.util.TransformedVariable(tf.constant(1.5 + k, tf.float64), tfb.Softplus())
    return tfb.Chain([tfb.Scale(scale), coupling(lambda x: dense(tf.tanh(x)), half().complement(), **options)])


def spline_step(k):
    return closure_step(k, dfb.SplineCoupling, 3 * 4 - 1, num_bins=4)


CASES = {
    "glow": (glow_step, IMAGE, None),
    "glow_conditional": (lambda k: glow_step(k, condition_shape=(3,)), IMAGE, (3,)),
    "shuffled": (lambda k: scan_step(k, 0, "float64"), VECTOR, None),
    "closure": (lambda k: closure_step(k, dtype="float64"), VECTOR, None),
    "spline": (spline_step, VECTOR, None),
}
QUICK = ("glow_conditional", "shuffled", "closure")


def pair(case, memory="keep"):
    """A `Scan`, and a `Chain` of the same bijectors, at large random values."""
    make, *_ = CASES[case]
    scan, chain = dfb.Scan(make, LENGTH, memory), dfb.Chain([make(k) for k in range(LENGTH)])
    generator = np.random.default_rng(3)
    columns = [[*variables] for variables in zip(*(part.trainable_variables for part in chain.bijectors))]
    by_shape = sorted(scan.trainable_variables, key=lambda v: (v.name, v.shape.as_list()))
    columns.sort(key=lambda column: (column[0].name.split("/")[-1], [LENGTH, *column[0].shape.as_list()]))
    for stacked, column in zip(by_shape, columns, strict=True):
        for v in column:
            v.assign(v + tf.constant(0.3 * generator.normal(size=v.shape), v.dtype))
        assert stacked.name == column[0].name.split("/")[-1]
        stacked.assign(tf.stack(column))
    return scan, chain, by_shape, columns


@pytest.mark.parametrize(
    ("case", "direction", "mode", "memory"),
    [
        *(
            (pytest.param if case in QUICK and (direction == "inverse") == (memory == "recompute") else slow)(
                case, direction, "graph", memory
            )
            for case in CASES
            for direction in ("inverse", "forward")
            for memory in MEMORIES
        ),
        *((slow if case == "spline" else pytest.param)(case, "inverse", "eager", "keep") for case in CASES),
        *(slow("glow_conditional", direction, "xla", "recompute") for direction in ("inverse", "forward")),
    ],
)
def test_values_and_gradients_are_those_of_a_chain(case, direction, mode, memory):
    _, shape, condition_shape = CASES[case]
    scan, chain, stacked, columns = pair(case, memory)
    kwargs = {} if condition_shape is None else {"condition": normal([BATCH, *condition_shape], 3)}
    value = 0.5 * normal([BATCH, *shape], 2)
    run = pass_and_gradients(scan, len(shape), direction, stacked)
    run = run if mode == "eager" else tf.function(run, jit_compile=mode == "xla", autograph=False)
    result, log_det, (dvalue, dcondition, dstacked) = run(value, kwargs)
    expected = pass_and_gradients(chain, len(shape), direction, columns)(value, kwargs)
    assert_close(result, expected[0])
    assert_close(log_det, expected[1])
    assert_close(dvalue, expected[2][0])
    for actual, wanted in zip(tf.nest.flatten(dcondition), tf.nest.flatten(expected[2][1]), strict=True):
        assert_close(actual, wanted, 1e-8)
    for actual, wanted in zip(dstacked, expected[2][2], strict=True):
        assert_close(actual, tf.stack(wanted), 1e-8)
        assert np.abs(actual).max(axis=tuple(range(1, len(actual.shape)))).min() > 0.0


@pytest.mark.slow
def test_a_chain_that_recomputes_may_hold_one():
    scan, chain, stacked, columns = pair("glow")
    outer = dfb.Chain([tfb.Scale(tf.constant(2.0, tf.float64)), scan, dfb.Chain([scan])], memory="recompute")
    expected = dfb.Chain([tfb.Scale(tf.constant(2.0, tf.float64)), chain, chain])
    y = 0.2 * normal([BATCH, *IMAGE], 2)
    run = tf.function(pass_and_gradients(outer, 3, "inverse", stacked), autograph=False)
    for actual, wanted in zip(run(y, {})[2][2], pass_and_gradients(expected, 3, "inverse", columns)(y, {})[2][2], strict=True):
        assert_close(actual, tf.stack(wanted), 1e-8)


def test_contributions_and_places_are_those_of_a_chain():
    scan, chain, *_ = pair("shuffled")
    y = normal([BATCH, *VECTOR], 2)
    for direction in ("inverse", "forward"):
        hook = f"{direction}_log_det_per_dim"
        assert_close(getattr(scan, hook)(y), getattr(chain, hook)(y))
        transport = f"_transport_{direction}"
        np.testing.assert_array_equal(getattr(scan, transport)(y), getattr(chain, transport)(y))


@pytest.mark.slow
def test_jacobians_in_a_graph():
    scan, chain, *_ = pair("shuffled")

    def jacobian(bijector, y):
        with tf.GradientTape() as tape:
            tape.watch(y)
            x = bijector.inverse(y)
        return tape.batch_jacobian(x, y)

    y = normal([BATCH, *VECTOR], 2)
    actual = tf.function(lambda y: jacobian(scan, y), autograph=False)(y)
    assert_close(actual, jacobian(chain, y))
    assert_close(np.linalg.slogdet(actual)[1], scan.inverse_log_det_jacobian(y, 1))


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORIES)
def test_second_derivatives(memory):
    scan, chain, *_ = pair("glow", memory)

    def compute(bijector, y):
        with tf.GradientTape() as outer:
            outer.watch(y)
            with tf.GradientTape() as tape:
                tape.watch(y)
                log_det = bijector.inverse_log_det_jacobian(y, 3)
            penalty = tf.reduce_sum(tape.gradient(log_det, y) ** 2)
        return outer.gradient(penalty, y)

    y = 0.5 * normal([BATCH, *IMAGE], 2)
    assert_close(tf.function(lambda y: compute(scan, y), autograph=False)(y), compute(chain, y), 1e-8)


def test_the_bijectors_are_those_of_the_present_values():
    scan, chain, *_ = pair("glow")
    y = normal([BATCH, *IMAGE], 2)
    assert scan.length == len(scan.bijectors) == LENGTH
    for actual, expected in zip(scan.bijectors, chain.bijectors):
        assert_close(actual.inverse(y), expected.inverse(y))
        assert not actual.trainable_variables


@pytest.mark.parametrize(
    ("direction", "dtype"),
    [("inverse", "float32"), ("forward", "float64"), slow("inverse", "float64"), slow("forward", "float32")],
)
def test_adaptation_is_that_of_a_chain(dtype, direction):
    def make(k):
        network = dimflows.networks.GlowConvNet(2, 4, width=3, seed=k, dtype=dtype)
        coupling = dfb.AffineCoupling(network, dfb.masks.Channel(), "sigmoid", dtype=dtype)
        return dfb.Chain([dfb.ActNorm(4, dtype=dtype), dfb.InvertibleConv1x1(4, seed=k, dtype=dtype), coupling])

    scan, chain = dfb.Scan(make, LENGTH), dfb.Chain([make(k) for k in range(LENGTH)])
    y = 3.0 * normal([BATCH, *IMAGE], 2, dtype) + 1.0
    with dimflows.adaptation():
        actual = getattr(scan, direction)(y)
        expected = getattr(chain, direction)(y)
    tolerance = {"float32": 1e-4, "float64": 1e-9}[dtype]
    assert_close(actual, expected, tolerance)
    assert_close(getattr(scan, direction)(tf.identity(y)), getattr(chain, direction)(tf.identity(y)), tolerance)
    set_by_data = [v for v in scan.trainable_variables if v.name in ("log_scale:0", "bias:0")]
    assert sum(np.abs(v).max(axis=-1).min() > 1e-3 for v in set_by_data) == 5


def operations(length, memory="keep"):
    """How many a graph with the gradients has, functions included."""
    scan = dfb.Scan(lambda k: glow_step(k), length, memory)
    compute = pass_and_gradients(scan, 3, "inverse", scan.trainable_variables)
    function = tf.function(lambda y: compute(y, {}), autograph=False)
    graph = function.get_concrete_function(tf.TensorSpec([BATCH, *IMAGE], tf.float64)).graph
    functions = graph.as_graph_def().library.function
    return len(graph.get_operations()) + sum(len(f.node_def) for f in functions)


@pytest.mark.parametrize("memory", [MEMORIES[0], slow(MEMORIES[1])])
def test_the_graph_is_as_large_at_any_length(memory):
    assert operations(9, memory) == operations(6, memory)


@pytest.mark.slow
def test_recomputation_keeps_one_result():
    def kept(memory, length=LENGTH):
        scan = dfb.Scan(glow_step, length, memory)
        log_det = tf.function(lambda y: scan.inverse_log_det_jacobian(y, 3), autograph=False)
        concrete = log_det.get_concrete_function(tf.TensorSpec([BATCH, *IMAGE], tf.float64))
        _, backward = concrete._delayed_rewrite_functions.forward_backward()
        lists = sum(tensor.dtype == tf.variant for tensor in backward.inputs)
        return lists, sum(BATCH in (tensor.shape.as_list() if tensor.shape.rank else []) for tensor in backward.inputs)

    assert kept("recompute")[0] == 0  # no list of what each step has computed
    assert kept("recompute", 9) == kept("recompute")
    assert kept("keep")[0] > 5


def test_unknown_batch_sizes_and_other_batch_shapes():
    scan, chain, *_ = pair("glow")
    function = tf.function(
        lambda y: (scan.inverse(y), scan.inverse_log_det_jacobian(y, 3)),
        input_signature=[tf.TensorSpec([None, None, *IMAGE], tf.float64)],
        autograph=False,
    )
    assert function.get_concrete_function().structured_outputs[0].shape.as_list() == [None, None, *IMAGE]
    y = normal([3, 2, *IMAGE], 2)
    x, log_det = function(y)
    assert_close(x, chain.inverse(y))
    assert_close(log_det, chain.inverse_log_det_jacobian(y, 3))


def trained(memory="keep", policy="float32", **arguments):
    x = (3.0 * np.random.default_rng(0).normal(size=[24, 4, 4, 1]) + 1.0).astype("float32")
    keras.config.set_dtype_policy(policy)
    try:
        model = dimflows.FlowModel(dimflows.recipes.glow([4, 4, 1], width=4, memory=memory, **arguments), seed=0)
    finally:
        keras.config.set_dtype_policy("float32")
    model.adapt(x)
    model.compile(keras.optimizers.Adam(1e-2))
    history = model.fit(x, batch_size=8, epochs=3, verbose=0)
    return model, x, history.history["nll"]


@pytest.mark.slow
def test_training_and_saving(tmp_path):
    model, x, nll = trained()
    assert nll[-1] < nll[0]
    model.save(tmp_path / "model.keras")
    loaded = dimflows.load(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.log_prob(x), model.log_prob(x))
    deep = dimflows.FlowModel(dimflows.recipes.glow([4, 4, 1], width=4, depth=7))
    assert len(deep.trainable_variables) == len(model.trainable_variables)
    model.export(tmp_path / "exported")
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(exported.log_prob(x, [0, 0]), model.log_prob(x), rtol=1e-5)


@pytest.mark.slow
def test_mixed_precision_trains_and_keeps_float32_log_dets():
    model, x, nll = trained(policy="mixed_bfloat16")
    assert all(v.dtype == "float32" for v in model.trainable_variables)
    assert model.log_prob(x).dtype == tf.float32
    assert nll[-1] < nll[0]


# What is refused.


class Regularized(Mixer):
    """A network with a loss of its weights."""

    def __init__(self, *args):
        super().__init__(*args)
        self.extra = self.add_weight(shape=[1], regularizer="l2", name="extra")


class Losing(Mixer):
    """A network with a loss of its activations."""

    def call(self, x):
        y = super().call(x)
        self.add_loss(tf.reduce_sum(y))
        return y


def coupling(network, mask=None):
    return dfb.AffineCoupling(network, mask or half(), dtype=tf.float64)


def sequential(*layers):
    return keras.Sequential([keras.Input([2], dtype="float64"), *layers, keras.layers.Dense(4, dtype="float64")])


def hidden(k):
    variable = tf.Variable(1.0 + k, dtype=tf.float64)
    return coupling(lambda x: tf.repeat(variable * x, 2, axis=-1))


def closing_over(k):
    return coupling(lambda x: tf.repeat((1.0 + k) * x, 2, axis=-1))


def alternating(k):
    return affine_coupling(dfb.masks.Channel(flip=k == 1, event_ndims=1), VECTOR, k, "float64")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (alternating, r"bijector 1 is of another kind than bijector 0: in affine_coupling\._mask.*got True and False"),
        (closing_over, "bijector 1 is of another kind than bijector 0"),
        (lambda k: dfb.ActNorm(4, log_scale_factor=1.0 + k), r"in actnorm\._factor got 2.0 and 1.0"),
        (lambda k: dfb.ActNorm(4 + k), r"in actnorm\._shift"),
        (lambda k: dfb.Chain([dfb.ActNorm(4)] * (1 + k)), "bijector 1 is of another kind than bijector 0"),
        (lambda k: [tfb.Sinh(), tfb.Exp()][k], "bijector 1 is of another kind than bijector 0"),
        (hidden, "a variable in a closure or in a layer that is not Keras 3's"),
        (lambda k: coupling(tf_keras_network(k, "float64")), "a variable in a closure or in a layer that is not Keras 3's"),
        (lambda k: coupling(sequential(keras.layers.Dropout(0.5))), "a state that is not trained"),
        (lambda k: coupling(sequential(keras.layers.BatchNormalization(dtype="float64"))), "a state that is not trained"),
        (lambda k: coupling(Regularized([2], [4], k)), "a variable with a regularizer or a constraint"),
    ],
)
def test_bijectors_that_are_no_row_of_one_kind_are_refused(make, message):
    with pytest.raises(ValueError, match=f"scan: .*{message}"):
        dfb.Scan(make, 2)


def test_copies_start_anew():
    first, second = (flow.trainable_variables for flow in (pair("glow")[0], pair("glow")[0].copy()))
    made = dfb.Scan(CASES["glow"][0], LENGTH).trainable_variables
    for a, b, c in zip(first, second, made, strict=True):
        np.testing.assert_array_equal(b, c)
        assert np.abs(a - b).max() > 0.01
    scan = dimflows.recipes.glow([4, 4, 1], num_levels=1, depth=2, width=2).bijector.levels[0].bijectors[1]
    for a, b in zip(scan.trainable_variables, scan.copy().trainable_variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_misuse_is_refused():
    shared = Mixer([2], [4], 0)
    with pytest.raises(ValueError, match="scan: got bijectors that share .*, needs variables of their own; use a Chain"):
        dfb.Scan(lambda k: coupling(shared), 2)
    for length in (0, 1.5):
        with pytest.raises(ValueError, match=f"scan: got length={length}, needs a positive integer"):
            dfb.Scan(glow_step, length)
    with pytest.raises(ValueError, match="scan: got memory='all', needs keep or recompute"):
        dfb.Scan(glow_step, 2, memory="all")
    squeeze = dfb.Scan(lambda k: dfb.Squeeze(), 2)
    with pytest.raises(ValueError, match="scan: got a bijector from shape .* needs one that keeps it"):
        tf.function(squeeze.inverse, autograph=False)(tf.zeros([1, 4, 4, 1]))
    with pytest.raises(ValueError, match="got a network that adds a loss"):
        dfb.Scan(lambda k: coupling(Losing([2], [4], k)), 2).inverse(normal([3, 4]))
    with pytest.raises(ValueError, match="got a condition, but no part of this bijector can use one"):
        dfb.Scan(glow_step, 2).inverse(normal([3, *IMAGE]), condition=normal([3, 2]))
