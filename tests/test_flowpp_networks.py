"""Flow++'s conditioner and context network, from their formulas to the published parameter counts."""

import json

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf
import tensorflow_probability as tfp
from registry import slow

import tfp_dimflows as dimflows
from tfp_dimflows import bijectors as dfb
from tfp_dimflows.keras_bridge import adaptation
from tfp_dimflows.networks import DataDependentConv2D, FlowPPContext, FlowPPNet, GatedConv2D, GatedSelfAttention

tfd = tfp.distributions

HEIGHT, WIDTH, CHANNELS = 4, 6, 8


def net(**kwargs):
    return FlowPPNet(3, 5, **({"image_size": (HEIGHT, WIDTH), "width": CHANNELS, "num_blocks": 2, "num_heads": 2} | kwargs))


NETWORKS = {
    "net": net,
    "no_attention": lambda **kwargs: net(**{"attention": False, "image_size": None, **kwargs}),
}
LAYERS = {
    **NETWORKS,
    "net_condition": lambda **kwargs: net(condition_channels=2, num_blocks=1, **kwargs),
    "context": lambda **kwargs: FlowPPContext(3, width=CHANNELS, num_blocks=1, **kwargs),
    "gated_conv": lambda **kwargs: GatedConv2D(CHANNELS, context_channels=2, dropout=0.3, **kwargs),
    "gated_conv_3x3": lambda **kwargs: GatedConv2D(CHANNELS, gate_kernel_size=3, dropout=0.3, **kwargs),
    "attention": lambda **kwargs: GatedSelfAttention(CHANNELS, num_heads=2, dropout=0.3, **kwargs),
    "conv": lambda **kwargs: DataDependentConv2D(3, 5, 3, init_scale=0.1, **kwargs),
}

networks = pytest.mark.parametrize("name", NETWORKS)
layers = pytest.mark.parametrize("name", LAYERS)


def normal(*shape, dtype="float32", seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=shape), dtype)


def inputs(name, batch=2, dtype="float32"):
    """The arguments of the layer's call."""
    image = (batch, HEIGHT, WIDTH)
    hidden = normal(*image, CHANNELS, dtype=dtype)
    special = {
        "net_condition": (normal(*image, 3, dtype=dtype), normal(*image, 2, dtype=dtype, seed=1)),
        "gated_conv": (hidden, normal(*image, 2, dtype=dtype, seed=1)),
        "gated_conv_3x3": (hidden,),
        "attention": (hidden, normal(HEIGHT, WIDTH, CHANNELS, dtype=dtype, seed=1)),
    }
    return special.get(name, (normal(*image, 3, dtype=dtype),))


def randomize(layer, scale=0.5, seed=0):
    """Gives every weight a value that its part in the result cannot hide."""
    generator = np.random.default_rng(seed)
    for variable in layer.weights:
        variable.assign(generator.normal(size=variable.shape) * scale)
    return layer


def count(layer):
    return sum(int(np.prod(variable.shape)) for variable in layer.trainable_variables)


def max_difference(a, b):
    return float(np.abs(np.asarray(a, "float64") - np.asarray(b, "float64")).max())


# Shapes, modes, dtypes.


@layers
def test_variables_exist_after_construction(name):
    layer = LAYERS[name]()
    before = [variable.path for variable in layer.variables]
    layer(*inputs(name), training=True)
    assert layer.built and before and [variable.path for variable in layer.variables] == before


@layers
def test_static_shape_of_the_result(name):
    layer = LAYERS[name]()
    arguments = inputs(name)
    signature = [tf.TensorSpec((None, *value.shape[1:]), tf.float32) for value in arguments]
    if name == "attention":
        signature[1] = tf.TensorSpec(arguments[1].shape, tf.float32)
    function = tf.function(layer).get_concrete_function(*signature)
    expected = {"context": (HEIGHT, WIDTH // 2, CHANNELS)}.get(name, (HEIGHT, WIDTH, CHANNELS if "gated" in name else 5))
    expected = (HEIGHT, WIDTH, CHANNELS) if name == "attention" else expected
    assert function.output_shapes == tf.TensorShape((None, *expected))
    assert layer(*arguments).shape == (2, *expected)


@pytest.mark.parametrize("name", ["no_attention", "context", "attention", "conv"])
def test_unknown_height_and_width(name):
    layer = randomize(LAYERS[name]())
    arguments = inputs(name)
    signature = [tf.TensorSpec((None,) * (len(value.shape) - 1) + value.shape[-1:], tf.float32) for value in arguments]
    function = tf.function(layer).get_concrete_function(*signature)
    np.testing.assert_allclose(function(*arguments), layer(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["net", "net_condition", "no_attention", "context"])
def test_eager_graph_and_xla_agree(name):
    layer = randomize(LAYERS[name](dtype="float64"))
    arguments = inputs(name, dtype="float64")
    expected = layer(*arguments)
    for xla in (False, True):
        np.testing.assert_allclose(tf.function(layer, jit_compile=xla)(*arguments), expected, rtol=1e-9, atol=1e-9)


@layers
def test_float64(name):
    layer = randomize(LAYERS[name](dtype="float64"))
    assert all(variable.dtype == "float64" for variable in layer.weights)
    assert layer(*inputs(name, dtype="float64")).dtype == tf.float64


@layers
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(name, policy):
    half = LAYERS[name](dtype=policy, seed=0)
    full = LAYERS[name](seed=0)
    y = half(*inputs(name))
    assert y.dtype == policy.removeprefix("mixed_")
    assert all(variable.dtype == "float32" for variable in half.weights)
    expected = full(*inputs(name)).numpy()
    assert max_difference(tf.cast(y, tf.float32), expected) < 0.05 * np.abs(expected).max()


def test_half_precision_of_large_values():
    layer = randomize(net(dtype="mixed_float16"), scale=1.0)
    assert np.isfinite(layer(30.0 * inputs("net")[0])).all()


# Conditions.


@networks
def test_condition_changes_the_result(name):
    network = randomize(NETWORKS[name](condition_channels=2))
    x = inputs(name)[0]
    first, second = (network(x, condition=normal(2, HEIGHT, WIDTH, 2, seed=s)) for s in (1, 2))
    assert max_difference(first, second) > 1e-2


def test_vector_condition_is_repeated_at_every_position():
    network = randomize(net(condition_channels=2, dtype="float64"))
    x, vector = inputs("net", dtype="float64")[0], normal(2, 2, dtype="float64")
    image = tf.tile(vector[:, None, None], [1, HEIGHT, WIDTH, 1])
    np.testing.assert_allclose(network(x, vector), network(x, image), rtol=1e-10, atol=1e-10)


def test_larger_image_condition_is_squeezed():
    network = randomize(net(condition_channels=8, dtype="float64"))
    x, image = inputs("net", dtype="float64")[0], normal(2, 2 * HEIGHT, 2 * WIDTH, 2, dtype="float64")
    np.testing.assert_allclose(network(x, image), network(x, tf.nn.space_to_depth(image, 2)), rtol=1e-10, atol=1e-10)


@networks
def test_wrong_conditions(name):
    x = inputs(name)[0]
    with pytest.raises(ValueError, match=r"plain: got a condition of shape \(2, 2\), takes none"):
        NETWORKS[name](name="plain")(x, condition=normal(2, 2))
    conditional = NETWORKS[name](condition_channels=2, name="conditional")
    with pytest.raises(ValueError, match="conditional: got no condition, needs one with 2 channels"):
        conditional(x)
    for shape in [(2, 3), (2, 5, 6, 2), (2, 4, 2)]:
        with pytest.raises(ValueError, match=r"conditional: got a condition of shape .*, needs \(None, "):
            conditional(x, condition=normal(*shape))


def test_wrong_contexts():
    x = inputs("gated_conv")[0]
    with pytest.raises(ValueError, match="plain: got a context with 2 channels, needs 0"):
        GatedConv2D(CHANNELS, name="plain")(x, x[..., :2])
    for context, channels in [(None, 0), (x, CHANNELS)]:
        with pytest.raises(ValueError, match=f"block: got a context with {channels} channels, needs 2"):
            GatedConv2D(CHANNELS, context_channels=2, name="block")(x, context)


@layers
def test_wrong_number_of_channels(name):
    x, *others = inputs(name)
    with pytest.raises(ValueError, match=r"'narrow' is incompatible"):
        LAYERS[name](name="narrow")(x[..., :2], *others)


def test_wrong_sizes():
    with pytest.raises(ValueError, match=r"narrow: width 6 is not divisible into 4 heads"):
        GatedSelfAttention(6, num_heads=4, name="narrow")
    with pytest.raises(ValueError, match="sizeless: got no image_size, which attention needs"):
        FlowPPNet(3, 5, name="sizeless")
    with pytest.raises(ValueError, match="incompatible"):
        net()(tf.zeros([1, WIDTH, HEIGHT, 3]))
    with pytest.raises(ValueError, match="odd: got 5 columns, needs an even number"):
        FlowPPContext(3, name="odd")(tf.zeros([1, 4, 5, 3]))


# Formulas.


def conv(x, layer):
    """The layer's convolution, by its definition."""
    kernel, bias = layer.get_weights()
    margin = kernel.shape[0] // 2
    x = np.pad(x, [(0, 0), (margin, margin), (margin, margin), (0, 0)])
    rows, columns = x.shape[1] - 2 * margin, x.shape[2] - 2 * margin
    shifts = np.ndindex(kernel.shape[:2])
    return bias + sum(x[:, i : i + rows, j : j + columns] @ kernel[i, j] for i, j in shifts)


def concat_elu(x):
    x = np.concatenate([x, -x], axis=-1)
    return np.where(x > 0.0, x, np.expm1(np.minimum(x, 0.0)))


def add_gated(x, y):
    channels = x.shape[-1]
    return x + y[..., :channels] * scipy.special.expit(y[..., channels:])


def gated_conv(x, layer, context=None):
    c = conv(concat_elu(x), layer.conv)
    if context is not None:
        c = c + conv(concat_elu(context), layer.conv_context)
    return add_gated(x, conv(concat_elu(c), layer.conv_gate))


def attention(x, layer, position):
    """One query and one head at a time."""
    batch, height, width, channels = x.shape
    size = channels // layer.num_heads
    qkv = conv(x + position, layer.conv).reshape(batch, height * width, 3 * channels)
    c = np.zeros([batch, height * width, channels])
    for image, pixel, head in np.ndindex(batch, height * width, layer.num_heads):
        start = head * size
        q, k, v = (qkv[image, :, first + start : first + start + size] for first in (0, channels, 2 * channels))
        logits = k @ q[pixel] / np.sqrt(size)
        weights = np.exp(logits - logits.max())
        c[image, pixel, start : start + size] = weights @ v / weights.sum()
    return add_gated(x, conv(c.reshape(x.shape), layer.conv_gate))


def layer_norm(x, layer):
    centred = x - x.mean(-1, keepdims=True)
    gain, bias = layer.get_weights()
    return gain * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) + bias


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_conv_formula(kernel_size):
    layer = randomize(DataDependentConv2D(3, 5, kernel_size, dtype="float64"))
    x = inputs("conv", dtype="float64")[0]
    assert_close(layer(x), conv(x.numpy(), layer))


@pytest.mark.parametrize("name", ["gated_conv", "gated_conv_3x3"])
def test_gated_conv_formula(name):
    layer = randomize(LAYERS[name](dtype="float64"))
    x, *context = (value.numpy() for value in inputs(name, dtype="float64"))
    assert_close(layer(x, *context), gated_conv(x, layer, *context))


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_attention_formula(num_heads):
    layer = randomize(GatedSelfAttention(CHANNELS, num_heads=num_heads, dtype="float64"))
    x, position = (value.numpy() for value in inputs("attention", dtype="float64"))
    assert_close(layer(x, position), attention(x, layer, position))


@pytest.mark.parametrize("conditional", [False, True])
def test_net_formula(conditional):
    layer = randomize(net(condition_channels=2 * conditional, dtype="float64"))
    x, context = (value.numpy() for value in inputs("net_condition", dtype="float64"))
    context = context if conditional else None
    position = layer.position.numpy()
    h = conv(x, layer.conv_in)
    for gated, norm_1, attend, norm_2 in layer.blocks:
        h = layer_norm(gated_conv(h, gated, context), norm_1)
        h = layer_norm(attention(h, attend, position), norm_2)
    assert_close(layer(x, context), conv(h, layer.conv_out))


def test_net_formula_without_attention():
    layer = randomize(net(attention=False, dtype="float64"))
    h = conv(inputs("net", dtype="float64")[0].numpy(), layer.conv_in)
    for gated, norm in layer.blocks:
        h = layer_norm(gated_conv(h, gated), norm)
    assert_close(layer(inputs("net", dtype="float64")[0]), conv(h, layer.conv_out))


def test_context_formula():
    layer = randomize(FlowPPContext(3, width=CHANNELS, num_blocks=2, dtype="float64"))
    x = inputs("context", dtype="float64")[0].numpy()
    h = conv(np.concatenate([x[:, :, 0::2], x[:, :, 1::2]], axis=-1), layer.conv_in)
    for gated in layer.blocks:
        h = gated_conv(h, gated)
    assert_close(layer(x), h)


@pytest.mark.parametrize("with_position", [False, True])
def test_attention_tells_pixels_apart_by_their_position_only(with_position):
    layer = randomize(GatedSelfAttention(CHANNELS, num_heads=2, dtype="float64"))
    x, position = inputs("attention", dtype="float64")
    order = np.random.default_rng(0).permutation(HEIGHT * WIDTH)

    def permute(value):
        return tf.reshape(tf.gather(tf.reshape(value, [2, -1, CHANNELS]), order, axis=1), value.shape)

    position = position if with_position else tf.zeros_like(position)
    difference = max_difference(layer(permute(x), position), permute(layer(x, position)))
    assert difference > 1e-2 if with_position else difference < 1e-12


# Initial values.


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_bfloat16"])
@pytest.mark.parametrize("init_scale", [1.0, 0.1])
def test_conv_adapts_only_in_an_adaptation_pass(init_scale, dtype):
    layer = DataDependentConv2D(3, 5, 3, init_scale=init_scale, dtype=dtype, seed=0)
    layer.bias.assign(tf.range(5.0))
    x = 2.0 + 3.0 * normal(16, 4, 4, 3)
    weights = layer.get_weights()
    layer(x)
    assert all(np.array_equal(a, b) for a, b in zip(weights, layer.get_weights()))
    with adaptation():
        y = tf.cast(layer(x), tf.float32).numpy()
    tolerance = 0.02 * init_scale if dtype == "mixed_bfloat16" else 1e-5
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0.0, atol=tolerance)
    np.testing.assert_allclose(y.std((0, 1, 2)), init_scale, atol=tolerance)
    np.testing.assert_array_equal(tf.cast(layer(x), tf.float32), y)
    kernel, before = layer.get_weights()[0], weights[0]
    ratio = kernel / before
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1, :1, :1], ratio.shape), rtol=1e-4)


def test_conv_keeps_the_scale_of_a_constant_channel():
    layer = DataDependentConv2D(3, 2, 1, seed=0)
    kernel, bias = layer.get_weights()
    kernel[..., 0] = [[[0.0, 0.0, 7.0]]]
    kernel[..., 1] = [[[1.0, 1.0, 0.0]]]
    layer.set_weights([kernel, bias])
    x = tf.concat([normal(8, 4, 4, 2), tf.fill([8, 4, 4, 1], 123.456)], axis=-1)
    with adaptation():
        y = layer(x).numpy()
    np.testing.assert_allclose(y[..., 0], 0.0, atol=1e-3)
    np.testing.assert_array_equal(layer.kernel[..., 0], kernel[..., 0])
    np.testing.assert_allclose(y[..., 1].std(), 1.0, rtol=1e-5)


def convolutions(layer):
    return [part for part in layer._flatten_layers() if isinstance(part, DataDependentConv2D)]


@pytest.mark.parametrize("name", ["net", "net_condition", "no_attention", "context"])
def test_networks_adapt_all_convolutions_in_order(name, monkeypatch):
    layer = LAYERS[name](seed=0)
    arguments = inputs(name, batch=32)
    with adaptation():
        adapted = layer(*arguments)
    results = {}
    call = DataDependentConv2D.call

    def recorded_call(self, x):
        results[id(self)] = call(self, x)
        return results[id(self)]

    monkeypatch.setattr(DataDependentConv2D, "call", recorded_call)
    np.testing.assert_array_equal(layer(*arguments), adapted)
    assert len(results) == len(convolutions(layer))
    for part in convolutions(layer):
        value = results[id(part)].numpy()
        np.testing.assert_allclose(value.mean((0, 1, 2)), 0.0, atol=1e-5)
        np.testing.assert_allclose(value.std((0, 1, 2)), part.init_scale, rtol=1e-4)


def test_initial_scales():
    network = net(seed=0)
    gates = [part.conv_gate for block in network.blocks for part in block if hasattr(part, "conv_gate")]
    assert len(gates) == 4
    small = [part for part in convolutions(network) if part.init_scale == 0.1]
    assert {id(part) for part in small} == {id(part) for part in [*gates, network.conv_out]}
    assert {part.init_scale for part in convolutions(network)} == {0.1, 1.0}


def test_initial_values():
    np.testing.assert_allclose(DataDependentConv2D(32, 64, 3, seed=0).kernel.numpy().std(), 0.05, rtol=0.03)
    np.testing.assert_allclose(DataDependentConv2D(32, 64, 3, init_scale=0.1, seed=0).kernel.numpy().std(), 0.005, rtol=0.03)
    position = net(image_size=(32, 16), seed=0).position.numpy()
    assert position.shape == (32, 16, CHANNELS)
    np.testing.assert_allclose([position.mean(), position.std()], [0.0, 0.01], atol=5e-4)


@networks
def test_result_starts_small_without_adaptation(name):
    network = NETWORKS[name](width=32, seed=0)
    for scale in (0.1, 1.0, 100.0):
        y = network(scale * inputs(name, batch=16)[0]).numpy()
        np.testing.assert_allclose(y.std(), 0.015 * np.sqrt(32), rtol=0.3)
        assert np.abs(y).max() < 1.0


@pytest.mark.parametrize("name", ["net", "net_condition", "no_attention", "context"])
def test_gradients_reach_all_weights(name):
    layer = LAYERS[name](seed=0)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((layer(*inputs(name)) - 1.0) ** 2)
    gradients = tape.gradient(loss, [variable.value for variable in layer.trainable_variables])
    assert all(gradient is not None and np.abs(gradient).max() > 0.0 for gradient in gradients)


@layers
def test_seed(name):
    first, second, other = (LAYERS[name](seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first.get_weights(), second.get_weights()))
    assert not all(np.array_equal(a, b) for a, b in zip(first.get_weights(), other.get_weights()))
    random = [weight for weight in first.get_weights() if weight.std() > 0.0]
    assert len({float(weight.flat[0]) for weight in random}) == len(random)
    np.testing.assert_array_equal(first(*inputs(name), training=True), second(*inputs(name), training=True))
    states = [variable.numpy().tolist() for variable in first.variables if "seed_generator" in variable.path]
    assert len({state[0] for state in states}) == len(states)


# Dropout.


def dropouts(layer):
    return [part for part in layer._flatten_layers() if isinstance(part, keras.layers.Dropout)]


def draws(layer):
    """How often every dropout has dropped something."""
    return [int(part.seed_generator.state[1]) for part in dropouts(layer)]


@pytest.mark.parametrize(
    ("name", "xla"), [("net", False), slow("net", True), ("context", False), ("gated_conv", True), ("attention", False)]
)
def test_dropout_follows_the_training_argument(name, xla):
    layer = randomize(LAYERS[name]())
    function = tf.function(lambda training: layer(*inputs(name), training=training), jit_compile=xla)
    np.testing.assert_array_equal(function(False), function(False))
    np.testing.assert_allclose(layer(*inputs(name)), function(False), rtol=1e-3, atol=1e-4)
    assert draws(layer) == [0] * len(dropouts(layer)) != []
    dropped = function(True)
    assert max_difference(dropped, function(False)) > 1e-2 < max_difference(dropped, function(True))
    assert draws(layer) == [2] * len(dropouts(layer))


def test_dropout_is_before_every_gate_and_scales_up():
    layer = randomize(GatedConv2D(CHANNELS, dropout=0.75, seed=0, dtype="float64"))
    x = inputs("gated_conv_3x3", dtype="float64")[0].numpy()
    kernel, bias = layer.conv_gate.get_weights()
    c = concat_elu(conv(concat_elu(x), layer.conv))
    other = keras.layers.Dropout(0.75, seed=layer.drop.seed, dtype="float64")
    dropped = other(c, training=True).numpy()
    assert 0.6 < (dropped == 0.0).mean() < 0.9
    np.testing.assert_allclose(dropped[dropped != 0.0], 4.0 * c[dropped != 0.0])
    assert_close(layer(x, training=True), add_gated(x, dropped @ kernel[0, 0] + bias))


def flow_model(jit_compile=False):
    network = FlowPPNet(2, 4, image_size=(4, 2), width=4, num_blocks=1, condition_channels=4, dropout=0.5, seed=0)
    context = FlowPPContext(3, width=4, num_blocks=1, dropout=0.5, seed=0)
    coupling = dfb.AffineCoupling(randomize(network), dfb.masks.Columns())
    bijector = dfb.EmbedCondition(coupling, randomize(context), condition_ndims=3)
    base = tfd.Sample(tfd.Normal(0.0, 1.0), [4, 4, 2])
    model = dimflows.FlowModel(tfd.TransformedDistribution(base, bijector), seed=0)
    model.compile(keras.optimizers.SGD(0.0), jit_compile=jit_compile)
    return model, [network, context]


BATCH = {"x": normal(8, 4, 4, 2), "condition": normal(8, 4, 4, 3, seed=1)}


@pytest.mark.slow
def test_dropout_acts_in_training_of_a_flow_only():
    model, parts = flow_model()

    def total_draws():
        return [draws(part) for part in parts]

    def nlls_without_dropout():
        log_prob = model.distribution.log_prob(BATCH["x"], bijector_kwargs={"condition": BATCH["condition"]})
        return [
            -float(tf.reduce_mean(log_prob)),
            -float(tf.reduce_mean(model.log_prob(BATCH))),
            -float(tf.reduce_mean(model(BATCH))),
            model.evaluate(BATCH, batch_size=8, verbose=0, return_dict=True)["nll"],
            model.test_on_batch(BATCH, return_dict=True)["nll"],
        ]

    model.adapt(BATCH)
    before = nlls_without_dropout()
    np.testing.assert_allclose(before, before[0], rtol=1e-5)
    model.sample(condition=BATCH["condition"])
    assert total_draws() == [[0, 0], [0]]

    with_dropout = []
    for _ in range(2):
        model.reset_metrics()
        with_dropout.append(model.train_on_batch(BATCH, return_dict=True)["nll"])
    assert total_draws() == [[2, 2], [2]]
    with_dropout += model.fit(BATCH, batch_size=4, verbose=0).history["nll"]
    assert total_draws() == [[4, 4], [4]]
    values = np.sort([before[0], *with_dropout])
    assert np.diff(values).min() > 1e-4

    np.testing.assert_allclose(nlls_without_dropout(), before, rtol=1e-5)
    assert total_draws() == [[4, 4], [4]]


@pytest.mark.slow
def test_dropout_in_training_compiled_with_xla():
    model, parts = flow_model(jit_compile=True)
    losses = {float(model.train_on_batch(BATCH, return_dict=True)["loss"]) for _ in range(3)}
    assert len(losses) == 3
    assert [draws(part) for part in parts] == [[3, 3], [3]]


# In a coupling.


def test_round_trip_of_couplings_with_a_shared_context():
    couplings = [
        dfb.AffineCoupling(
            randomize(FlowPPNet(2, 4, image_size=(4, 2), width=4, num_blocks=1, condition_channels=4, dtype="float64")),
            dfb.masks.Columns(parity),
            dtype=tf.float64,
        )
        for parity in (0, 1)
    ]
    context = randomize(FlowPPContext(3, width=4, num_blocks=1, dtype="float64"))
    flow = dfb.EmbedCondition(dfb.Chain(couplings), context, condition_ndims=3)
    x, condition = normal(3, 2, 4, 4, 2, dtype="float64"), normal(1, 2, 4, 4, 3, dtype="float64", seed=1)
    z = flow.inverse(x, condition=condition)
    assert_close(flow.forward(tf.identity(z), condition=condition), x)
    assert max_difference(z, flow.inverse(x, condition=2.0 * condition)) > 1e-2
    fldj = flow.forward_log_det_jacobian(tf.identity(z), event_ndims=3, condition=condition)
    assert_close(flow.inverse_log_det_jacobian(x, event_ndims=3, condition=condition), -fldj)
    assert fldj.shape == (3, 2) and np.abs(fldj).min() > 1e-2


# Saving.


@layers
def test_serialisation_round_trip(name):
    layer = randomize(LAYERS[name](dtype="float64", name="original", seed=3))
    saved = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert saved["registered_name"].startswith("tfp_dimflows>")
    loaded = keras.saving.deserialize_keras_object(saved)
    assert loaded.get_config() == layer.get_config()
    loaded.set_weights(layer.get_weights())
    arguments = inputs(name, dtype="float64")
    for training in (False, True):
        np.testing.assert_array_equal(loaded(*arguments, training=training), layer(*arguments, training=training))


def test_weights_file_of_a_flow_holds_all_weights(tmp_path):
    (model, _), (other, parts) = flow_model(), flow_model()
    for part in parts:
        randomize(part, seed=1)
    assert max_difference(model.log_prob(BATCH), other.log_prob(BATCH)) > 1e-2
    model.save_weights(tmp_path / "flow.weights.h5")
    other.load_weights(tmp_path / "flow.weights.h5")
    np.testing.assert_array_equal(model.log_prob(BATCH), other.log_prob(BATCH))
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), other.get_weights(), strict=True))


# Parameter counts of the published models.


def conv_count(kernel_size, inputs, outputs):
    return kernel_size**2 * inputs * outputs + outputs


def gated_conv_count(width, context, gate_kernel_size):
    conv_context = conv_count(1, 2 * context, width) if context else 0
    return conv_count(3, 2 * width, width) + conv_context + conv_count(gate_kernel_size, 2 * width, 2 * width)


def net_count(height, width, inputs, outputs, *, hidden=96, blocks=10, context=0):
    attention = conv_count(1, hidden, 3 * hidden) + conv_count(1, hidden, 2 * hidden)
    block = gated_conv_count(hidden, context, 1) + 2 * hidden + attention + 2 * hidden
    return height * width * hidden + conv_count(3, inputs, hidden) + blocks * block + conv_count(3, hidden, outputs)


def context_count(inputs, width=32, blocks=3):
    return conv_count(3, 2 * inputs, width) + blocks * gated_conv_count(width, 0, 3)


def test_counts_by_formula():
    network = FlowPPNet(3, 7, image_size=(4, 6), width=8, num_blocks=2, num_heads=2, condition_channels=5)
    assert count(network) == net_count(4, 6, 3, 7, hidden=8, blocks=2, context=5)
    assert count(FlowPPContext(3, width=8, num_blocks=2)) == context_count(3, 8, 2)


# Every coupling: (number of them, height, width and channels of one part, blocks, channels of the context).
COUPLINGS = {
    "dequantiser": [(4, 32, 16, 3, 2, 32)],
    "flow++": [(4, 32, 16, 3, 10, 0), (2, 16, 16, 6, 10, 0), (3, 16, 8, 12, 10, 0)],
    "vflow_q": [(4, 32, 16, 3, 3, 32)],
    "vflow_p": [(2, 32, 16, 6, 10, 0), (2, 32, 32, 3, 10, 0), (2, 16, 8, 24, 10, 0), (3, 16, 16, 12, 10, 0)],
}


def totals(network_count, context_count, pointwise_count):
    """Parameters of each part: networks, and before each coupling a gain and a bias per entry and a C x C map of both parts."""
    result = {}
    for part, couplings in COUPLINGS.items():
        result[part] = context_count(3) if couplings[0][-1] else 0
        for number, height, width, channels, blocks, context in couplings:
            outputs = channels * (2 + 3 * 32)
            norm_and_pointwise = 2 * (2 * height * width * channels + pointwise_count(channels))
            network = network_count(height, width, channels, outputs, blocks=blocks, context=context)
            result[part] += number * (network + norm_and_pointwise)
    return result


def assert_published(parts):
    assert parts["dequantiser"] == 3_466_976
    assert parts["dequantiser"] + parts["flow++"] == 31_443_440
    assert parts["vflow_q"] == 4_491_872
    assert parts["vflow_p"] == 31_741_248
    assert parts["dequantiser"] + parts["vflow_q"] + parts["vflow_p"] == 39_700_096


def test_published_counts_by_formula():
    assert_published(totals(net_count, context_count, lambda channels: channels**2))


@pytest.mark.slow
def test_published_counts_of_real_layers():
    def network_count(height, width, inputs, outputs, *, blocks, context):
        return count(FlowPPNet(inputs, outputs, image_size=(height, width), num_blocks=blocks, condition_channels=context))

    def pointwise_count(channels):
        return sum(variable.shape.num_elements() for variable in dfb.InvertibleConv1x1(channels).trainable_variables)

    assert_published(totals(network_count, lambda inputs: count(FlowPPContext(inputs)), pointwise_count))
