"""`dfb.Chain(memory="recompute")`: the same values and gradients as the ordinary pass, from its result alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import Mixer, affine_coupling, dfb, dimflows, mixer_for, normal, pass_and_gradients, slow, spline

from tfp_dimflows import keras_bridge

tfb = tfp.bijectors

VECTOR, IMAGE, BATCH = (4,), (4, 4, 1), 7
MEMORIES = ("keep", "recompute")


class Stretched(dfb.AffineCoupling):
    """From data to latent: times 2, then the coupling."""

    def _inverse_and_log_det_per_dim(self, y, condition):
        x, log_det = super()._inverse_and_log_det_per_dim(2.0 * y, condition)
        return x, log_det + np.log(2.0)

    def _forward_and_log_det_per_dim(self, x, condition):
        y, log_det = super()._forward_and_log_det_per_dim(x, condition)
        return y / 2.0, log_det - np.log(2.0)


class SmoothMixer(Mixer):
    """A network with second derivatives."""

    activation = staticmethod(keras.ops.tanh)


def glow_steps(dtype, depth=3, condition_shape=None, network=mixer_for):
    """A squeeze and steps of Glow, which condition on the one and the other half of the channels."""
    parts = [dfb.Squeeze()]
    for k in range(depth):
        mask = dfb.masks.Channel(flip=k % 2 == 1)
        net = network(mask, (2, 2, 4), 2, k, dtype, condition_shape)
        parts.append(dfb.ActNorm(4, dtype=dtype))
        parts.append(dfb.InvertibleConv1x1(4, seed=k, dtype=dtype))
        parts.append(dfb.AffineCoupling(net, mask, "sigmoid", dtype=dtype))
    return parts


def realnvp_level(dtype):
    """Couplings on checkerboards and channels, an activation normalisation after each."""
    parts = []
    for k in range(2):
        parts.append(affine_coupling(dfb.masks.Checkerboard(parity=k), IMAGE, k, dtype))
        parts.append(dfb.ActNorm(1, dtype=dtype))
    parts.append(dfb.Squeeze())
    for k in range(2):
        parts.append(affine_coupling(dfb.masks.Channel(flip=k == 1), (2, 2, 4), 2 + k, dtype))
        parts.append(dfb.ActNorm(4, dtype=dtype))
    return parts


def vector_coupling(k, dtype, transformer=None, condition_shape=None):
    mask = dfb.masks.Channel(flip=k % 2 == 1, event_ndims=1)
    if transformer is None:
        transformer = dfb.transformers.Affine("tanh", dtype=dtype)
    network = mixer_for(mask, VECTOR, transformer.params_per_dim, k, dtype, condition_shape)
    return dfb.Coupling(network, mask, transformer)


def tfp_parts(dtype):
    """TFP's bijectors, of parameters that are variables, transformed variables, and tensors of no variable."""
    scale = tfp.util.TransformedVariable(tf.constant(1.5, dtype), tfb.Softplus())
    tril = tf.Variable(np.tril(normal([4, 4], 3).numpy()) + 2.0 * np.eye(4), dtype=dtype)
    return [
        tfb.Sinh(),
        tfb.Scale(scale),
        tfb.Invert(tfb.ScaleMatvecTriL(tril)),
        tfb.Permute([2, 0, 3, 1]),
        vector_coupling(0, dtype),
        tfb.Shift(tf.Variable(normal(VECTOR, 4, dtype))),
        tfb.Chain([tfb.Scale(tf.Variable(normal(VECTOR, 5, dtype))), vector_coupling(1, dtype)]),
        tfb.Reshape([4], [2, 2]),
        tfb.Reshape([2, 2], [4]),
    ]


def nested(dtype):
    """Chains in a chain, one of which keeps its activations by itself, and a multi-scale flow."""
    levels = [dfb.Chain([vector_coupling(3, dtype)], memory="recompute"), dfb.ActNorm(2, dtype=dtype)]
    return [
        dfb.Chain([vector_coupling(0, dtype), dfb.Chain([dfb.ActNorm(4, dtype=dtype)], memory="recompute")]),
        dfb.Chain([]),
        Stretched(mixer_for(half(), VECTOR, 2, 7, dtype), half(), dtype=dtype),
        dfb.Multiscale(levels, dfb.DimensionFactorization.channels(VECTOR, 2)),
        dfb.Chain([vector_coupling(1, dtype), dfb.SplineCoupling(mixer_for_spline(dtype), half())]),
    ]


def half():
    return dfb.masks.Channel(event_ndims=1)


def mixer_for_spline(dtype):
    return mixer_for(half(), VECTOR, 3 * 8 - 1, 5, dtype)


def iterative(dtype):
    """Parts whose other direction is found by iteration."""
    network = mixer_for(half(), VECTOR, 2 + 3 * 2, 5, dtype)
    branch = SmoothMixer(VECTOR, VECTOR, 2, dtype)
    residual = dfb.InvertibleResidual(lambda y: 0.1 * tf.sin(branch(y)), dfb.residual.ExactLogDet())
    return [
        dfb.MixtureLogisticCoupling(network, half(), num_components=2),
        dfb.ActNorm(4, dtype=dtype),
        vector_coupling(1, dtype),
        residual,
    ]


CASES = {
    "glow": (glow_steps, IMAGE, (2, 2, 4), None),
    "glow_conditional": (lambda dtype: glow_steps(dtype, depth=2, condition_shape=(3,)), IMAGE, (2, 2, 4), (3,)),
    "realnvp": (realnvp_level, IMAGE, (2, 2, 4), None),
    "tfp_parts": (tfp_parts, VECTOR, VECTOR, None),
    "nested": (nested, VECTOR, VECTOR, None),
    "iterative": (iterative, VECTOR, VECTOR, None),
    "spline": (lambda dtype: [vector_coupling(k, dtype, spline()) for k in range(3)], VECTOR, VECTOR, None),
}
QUICK = ("glow_conditional",)


def randomize(chain, seed=5):
    """Large random values, small enough for what a chain maps and back to be the same to many digits."""
    generator = np.random.default_rng(seed)
    for v in chain.trainable_variables:
        v.assign(v + tf.constant(0.3 * generator.normal(size=v.shape), v.dtype))


def compiled(chain, event_ndims, direction, mode):
    """`pass_and_gradients` of all variables: eager, or in a graph, or under XLA."""
    compute = pass_and_gradients(chain, event_ndims, direction, chain.trainable_variables)
    return compute if mode == "eager" else tf.function(compute, jit_compile=mode == "xla", autograph=False)


def assert_equal(actual, expected, tolerance):
    """Relative to the largest entry of each tensor, none of which is zero."""
    for a, e in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        scale = np.abs(e).max()
        assert scale > 0.0
        np.testing.assert_allclose(a, e, rtol=0.0, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("case", "direction", "mode"),
    [
        *((pytest.param if case in QUICK else slow)(case, to, "graph") for case in CASES for to in ("inverse", "forward")),
        *(slow(case, "inverse", "xla") for case in ("glow_conditional", "tfp_parts", "nested", "iterative")),
        slow("realnvp", "forward", "xla"),
        slow("nested", "inverse", "eager"),
    ],
)
def test_values_and_gradients_are_those_of_the_ordinary_pass(case, direction, mode):
    make, data_shape, latent_shape, condition_shape = CASES[case]
    shape = data_shape if direction == "inverse" else latent_shape
    kwargs = {} if condition_shape is None else {"condition": normal([BATCH, *condition_shape], 3)}
    results = []
    for memory in MEMORIES:
        chain = dfb.Chain(make("float64"), memory=memory)
        randomize(chain)
        run = compiled(chain, len(shape), direction, "graph" if memory == "keep" else mode)
        results.append(run(0.5 * normal([BATCH, *shape], 2), kwargs))
    assert_equal(results[1], results[0], 1e-9)


def test_a_coupling_with_passes_of_its_own_sums_their_log_dets():
    coupling = Stretched(mixer_for(half(), VECTOR, 2, 7, "float64"), half(), dtype=tf.float64)
    x = normal([5, 4], 1)
    for direction in ("forward", "inverse"):
        per_dim = getattr(coupling, f"{direction}_log_det_per_dim")(x)
        total = getattr(coupling, f"{direction}_log_det_jacobian")(x)
        np.testing.assert_allclose(total, tf.reduce_sum(per_dim, axis=-1), rtol=1e-12)


@pytest.mark.slow
def test_float32_agrees_to_its_rounding():
    results = []
    for memory in MEMORIES:
        chain = dfb.Chain(glow_steps("float32", depth=8), memory=memory)
        randomize(chain)
        results.append(compiled(chain, 3, "inverse", "graph")(normal([BATCH, *IMAGE], 2, "float32"), {}))
    assert_equal(results[1], results[0], 1e-3)


@pytest.mark.parametrize("mode", ["graph", slow("xla")])
def test_gradients_reach_structured_conditions_and_tensors_that_parts_hold(mode):
    def network(x, condition):
        return tf.concat([tf.sin(x) * condition["a"], x + condition["b"]], axis=-1)

    def gradients(memory):
        def compute(y, a, b, scale):
            with tf.GradientTape() as tape:
                tape.watch([y, a, b, scale])
                first = dfb.AffineCoupling(network, half(), "exp")
                second = dfb.AffineCoupling(lambda x: tf.repeat(tf.sin(scale * x), 2, -1), half().complement(), "exp")
                chain = dfb.Chain([tfb.Scale(tf.exp(scale)), first, tfb.Shift(scale**2), second], memory=memory)
                x = chain.inverse(y, condition={"a": a, "b": b})
                log_det = chain.inverse_log_det_jacobian(y, 1, condition={"a": a, "b": b})
                loss = tf.reduce_sum(x**3) + tf.reduce_sum(log_det)
            return tape.gradient(loss, [y, a, b, scale])

        tensors = [normal([BATCH, size], k) for k, size in enumerate([4, 2, 2])]
        return tf.function(compute, jit_compile=mode == "xla", autograph=False)(*tensors, normal([1], 5))

    assert_equal(gradients("recompute"), gradients("keep"), 1e-9)


def test_a_condition_may_be_a_list_of_numbers():
    def gradient(memory):
        coupling = dfb.AffineCoupling(lambda x, condition: tf.concat([x, condition], axis=-1), half(), "exp")
        chain = dfb.Chain([coupling, tfb.Exp()], memory=memory)
        run = tf.function(lambda x: tf.gradients(chain.forward(x, condition=[[0.5, -0.5]]), x)[0], autograph=False)
        return run(normal([1, 4], 1, "float32"))

    np.testing.assert_allclose(gradient("recompute"), gradient("keep"), rtol=1e-5)


@pytest.mark.parametrize("mode", ["graph", slow("xla")])
def test_second_derivatives_are_right(mode):
    def network(mask, shape, params_per_dim, seed, dtype, condition_shape):
        return SmoothMixer((2, 2, 2), (2, 2, 2 * params_per_dim), seed, dtype)

    def gradients(memory):
        chain = dfb.Chain(glow_steps("float64", depth=1, network=network), memory=memory)
        randomize(chain)

        def compute(y):
            with tf.GradientTape() as outer:
                outer.watch(y)
                with tf.GradientTape() as tape:
                    tape.watch(y)
                    log_det = chain.inverse_log_det_jacobian(y, 3)
                penalty = tf.reduce_sum(tape.gradient(log_det, y) ** 2)
            return outer.gradient(penalty, [y, *(v for v in chain.trainable_variables if "kernel" in v.name)])

        return tf.function(compute, jit_compile=mode == "xla", autograph=False)(normal([BATCH, *IMAGE], 2))

    assert_equal(gradients("recompute"), gradients("keep"), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_a_tape_around_the_function(persistent):
    gradients = []
    for memory in MEMORIES:
        chain = dfb.Chain([vector_coupling(k, "float64") for k in range(3)], memory=memory)
        y = normal([BATCH, 4], 2)
        with tf.GradientTape(persistent=persistent) as tape:
            tape.watch(y)
            log_det = tf.function(lambda y, chain=chain: chain.inverse_log_det_jacobian(y, 1), autograph=False)(y)
        gradients.append(tape.gradient(log_det, [y, *(v for v in chain.trainable_variables if "kernel" in v.name)]))
    assert_equal(gradients[1], gradients[0], 1e-9)


def test_a_chain_of_nothing():
    chain = dfb.Chain([dfb.Chain([])], memory="recompute")
    y = normal([BATCH, 4], 2)
    x, log_det = tf.function(lambda y: (chain.inverse(y), chain.inverse_log_det_jacobian(y, 1)), autograph=False)(y)
    np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(log_det, np.zeros(BATCH))


# What is kept.


def tensors_kept(depth, memory):
    """How many tensors of a batch the backward pass is given by the forward pass."""
    chain = dfb.Chain(glow_steps("float64", depth), memory=memory)
    log_det = tf.function(lambda y: chain.inverse_log_det_jacobian(y, 3), autograph=False)
    concrete = log_det.get_concrete_function(tf.TensorSpec([BATCH, *IMAGE], tf.float64))
    _, backward = concrete._delayed_rewrite_functions.forward_backward()
    return sum(tensor.dtype != tf.resource and BATCH in tensor.shape.as_list() for tensor in backward.inputs)


@pytest.mark.slow
def test_the_backward_pass_is_given_as_much_at_any_depth():
    assert tensors_kept(8, "recompute") == tensors_kept(2, "recompute")
    assert tensors_kept(8, "keep") > tensors_kept(2, "keep") + 20


def test_xla_does_not_merge_the_evaluations_of_a_network():
    masks = [dfb.masks.Channel(flip=k % 2 == 1, event_ndims=1) for k in range(4)]
    couplings = [dfb.AdditiveCoupling(SmoothMixer([2], [2], k), mask) for k, mask in enumerate(masks)]
    chain = dfb.Chain(couplings, memory="recompute")

    @tf.function(jit_compile=True, autograph=False)
    def gradients(y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(chain.inverse(y) ** 2)
        return tape.gradient(loss, chain.trainable_variables)

    program = gradients.experimental_get_compiler_ir(normal([BATCH, 4], 2))(stage="optimized_hlo")
    assert program.count(" tanh(") == 2 * len(couplings)


# Training.


def weights_after_training(memory, recipe="glow", jit_compile=False, policy="float32", **arguments):
    generator = np.random.default_rng(0)
    x = (3.0 * generator.normal(size=[24, 4, 4, 1]) + 1.0).astype("float32")
    keras.config.set_dtype_policy(policy)
    try:
        distribution = dimflows.recipes.get(recipe)([4, 4, 1], width=4, memory=memory, **arguments)
        model = dimflows.FlowModel(distribution, seed=0)
        model.adapt(x)
        adapted = model.get_weights()
        model.compile(keras.optimizers.SGD(1e-3), jit_compile=jit_compile)
        model.fit(tf.data.Dataset.from_tensor_slices(x).batch(8), verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    return adapted, [after - before for after, before in zip(model.get_weights(), adapted)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        ({}, 1e-4),
        ({"jit_compile": True}, 1e-4),
        ({"policy": "mixed_bfloat16"}, 0.05),
        ({"recipe": "realnvp", "num_blocks": 1}, 1e-3),
        ({"recipe": "lcma-glow"}, 1e-4),
    ],
)
def test_three_steps_of_fit_change_the_weights_alike(arguments, tolerance):
    (adapted, expected), (adapted_too, actual) = (weights_after_training(memory, **arguments) for memory in MEMORIES)
    for a, e in zip(adapted_too, adapted, strict=True):
        np.testing.assert_array_equal(a, e)
    moved = 0
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0.0, atol=tolerance * np.abs(e).max() + 1e-7)
        moved += np.abs(e).max() > 1e-5
    assert moved > 10


# What cannot be evaluated twice.


def with_layers(*layers):
    """A chain whose coupling network has these layers."""
    network = keras.Sequential([keras.Input([2]), *layers, keras.layers.Dense(4)])
    return dfb.Chain([dfb.AffineCoupling(network, half())], memory="recompute")


def trace(chain, training):
    function = tf.function(lambda y: keras_bridge.with_training(training, lambda: chain.inverse(y)), autograph=False)
    return function(tf.ones([BATCH, 4]))


@pytest.mark.parametrize(
    ("layer", "training", "reason"),
    [
        (keras.layers.Dropout(0.5), True, "Assign"),
        (keras.layers.BatchNormalization(), True, "Assign"),
        (keras.layers.SpectralNormalization(keras.layers.Dense(2)), True, "Assign"),
        (keras.layers.Dense(2, activity_regularizer="l2"), False, "a loss of dense"),
        (keras.layers.Lambda(lambda x: x + tf.random.normal([])), False, "RandomStandardNormal"),
    ],
)
def test_a_network_that_cannot_be_evaluated_twice_is_refused(layer, training, reason):
    with pytest.raises(ValueError, match=rf"chain: got memory='recompute' and affine_coupling, whose .*{reason}"):
        trace(with_layers(layer), training)


def test_what_a_network_does_inside_a_function_is_seen():
    scale, count = tf.Variable(2.0), tf.Variable(0)

    def network(x):
        return tf.repeat(scale * x, 2, axis=-1)

    def counting(x):
        count.assign_add(1)
        return network(x)

    def looping(x):
        return tf.while_loop(lambda k, _: k < 2, lambda k, x: (k + 1, compiled(x)[:, :2]), [0, x])[1]

    x = tf.ones([BATCH, 4])
    for function, is_refused in ((network, False), (counting, True)):
        compiled = tf.function(function)
        compiled(x[:, :2])  # traced before the chain sees it
        for net in (compiled, lambda x: tf.repeat(looping(x), 2, axis=-1)):
            chain = dfb.Chain([dfb.AffineCoupling(net, half())], memory="recompute")
            if is_refused:
                with pytest.raises(ValueError, match="affine_coupling, whose .*Assign"):
                    tf.function(chain.inverse, autograph=False)(x)
            else:
                assert np.isfinite(tf.function(chain.inverse, autograph=False)(x)).all()


@pytest.mark.parametrize("layer", [keras.layers.Dropout(0.5), keras.layers.BatchNormalization()])
def test_what_only_training_changes_is_accepted_outside_it(layer):
    assert np.isfinite(trace(with_layers(layer), False)).all()


@pytest.mark.slow
def test_batch_normalisation_of_realnvp_is_refused_in_training():
    model = dimflows.FlowModel(dimflows.recipes.realnvp([4, 4, 1], width=2, num_blocks=1, batch_norm=True, memory="recompute"))
    model.compile()
    assert np.isfinite(model.log_prob(tf.zeros([2, 4, 4, 1]))).all()
    with pytest.raises(ValueError, match="got memory='recompute' and affine_coupling"):
        model.fit(np.zeros([8, 4, 4, 1], "float32"), verbose=0)


@pytest.mark.parametrize("seeded", [False, True])
def test_probes_without_a_seed_of_their_own_are_refused(seeded):
    block = dfb.InvertibleResidual(lambda y: 0.5 * tf.sin(y), dfb.residual.RussianRoulette())
    chain = dfb.Chain([block], memory="recompute")

    def compute(y):
        if not seeded:
            return chain.inverse(y)
        with dfb.probes.probes_from([0, 1]):
            return chain.inverse(y)

    with pytest.raises(ValueError, match="got memory='recompute' and invertible_residual"):
        tf.function(compute, autograph=False)(tf.ones([BATCH, 4]))


def test_the_flag_of_training_is_that_of_the_first_evaluation():
    class Doubled(keras.Layer):
        def call(self, x, training=None):
            scale = {None: 1.0, False: 2.0, True: 3.0}[training]
            return tf.repeat(tf.sin(scale * x), 2, axis=-1)

    chains = {memory: dfb.Chain([dfb.AffineCoupling(Doubled(), half())], memory=memory) for memory in MEMORIES}

    def gradient(memory, training):
        @tf.function(autograph=False)
        def compute(y):
            with tf.GradientTape() as tape:
                tape.watch(y)
                x = keras_bridge.with_training(training, lambda: chains[memory].inverse(y))
            return tape.gradient(x, y)

        return compute(tf.constant([[0.1, 0.2, 0.3, 0.4]])).numpy()

    seen = [gradient("recompute", training) for training in (False, True)]
    for training, actual in zip((False, True), seen):
        np.testing.assert_allclose(actual, gradient("keep", training), rtol=1e-5)
    assert np.abs(seen[0] - seen[1]).max() > 0.1


def test_an_unknown_memory_is_refused():
    with pytest.raises(ValueError, match="Chain: got memory='all', needs keep or recompute"):
        dfb.Chain([tfb.Exp()], memory="all")
    with pytest.raises(ValueError, match="got memory='none', needs keep or recompute"):
        dimflows.recipes.glow([4, 4, 1], memory="none")
