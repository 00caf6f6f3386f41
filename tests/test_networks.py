"""The conditioner networks, from their formulas to their parameter counts."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfp_dimflows.keras_bridge import adaptation
from tfp_dimflows.networks import (
    MLP,
    ActNormLayer,
    EdgeConv2D,
    GlowConvNet,
    ResNet,
    WeightNormConv2D,
    ZeroConv2D,
)

CHECKERBOARD = np.indices((4, 6)).sum(0)[..., None] % 2

NETWORKS = {
    "mlp": lambda **kwargs: MLP(3, 5, hidden=(7, 8), **kwargs),
    "resnet": lambda **kwargs: ResNet(3, 5, width=6, num_blocks=2, **kwargs),
    "resnet_mask": lambda **kwargs: ResNet(3, 5, width=6, num_blocks=1, mask=CHECKERBOARD, l2=1e-3, **kwargs),
    "resnet_batch_norm": lambda **kwargs: ResNet(3, 5, width=6, mask=CHECKERBOARD, batch_norm=True, **kwargs),
    "glow": lambda **kwargs: GlowConvNet(3, 5, width=6, **kwargs),
}
LAYERS = {
    **NETWORKS,
    "mlp_condition": lambda **kwargs: MLP(3, 5, hidden=(), activation="tanh", condition_channels=2, **kwargs),
    "weight_norm": lambda **kwargs: WeightNormConv2D(3, 5, 3, gain=1.0, use_bias=False, l2=0.1, **kwargs),
    "edge": lambda **kwargs: EdgeConv2D(3, 5, kernel_initializer=keras.initializers.RandomNormal(seed=1), **kwargs),
    "zero": lambda **kwargs: ZeroConv2D(3, 5, **kwargs),
    "actnorm": lambda **kwargs: ActNormLayer(3, **kwargs),
}

networks = pytest.mark.parametrize("name", NETWORKS)
image_networks = pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"mlp"}))
layers = pytest.mark.parametrize("name", LAYERS)


def normal(*shape, dtype="float32", seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=shape), dtype)


def inputs(name, batch=2, dtype="float32"):
    shape = (3,) if name.startswith("mlp") else (4, 6, 3)
    return normal(batch, *shape, dtype=dtype)


def conditions(name):
    return {"condition": normal(2, 2)} if name == "mlp_condition" else {}


def randomize(layer, seed=0):
    """Gives every weight a value that its part in the result cannot hide."""
    generator = np.random.default_rng(seed)
    for variable in layer.weights:
        value = generator.normal(size=variable.shape) * 0.3
        variable.assign(np.abs(value) + 0.5 if "variance" in variable.path else value)
    return layer


def count(layer):
    return sum(int(np.prod(variable.shape)) for variable in layer.trainable_variables)


# Shapes, modes, dtypes.


@layers
def test_variables_exist_after_construction(name):
    layer = LAYERS[name]()
    before = [variable.path for variable in layer.variables]
    layer(inputs(name), **conditions(name))
    assert layer.built and before and [variable.path for variable in layer.variables] == before


@networks
def test_static_shape_of_the_result(name):
    network = NETWORKS[name]()
    x = inputs(name)
    assert network(x).shape == (*x.shape[:-1], 5)
    function = tf.function(network).get_concrete_function(tf.TensorSpec((None, *x.shape[1:]), tf.float32))
    assert function.output_shapes == tf.TensorShape((None, *x.shape[1:-1], 5))


@pytest.mark.parametrize("name", ["resnet", "glow", "edge", "zero"])
def test_unknown_height_and_width(name):
    layer = randomize(LAYERS[name]())
    function = tf.function(layer).get_concrete_function(tf.TensorSpec((None, None, None, 3), tf.float32))
    np.testing.assert_allclose(function(inputs(name)), layer(inputs(name)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@networks
@pytest.mark.parametrize("conditional", [False, True])
def test_eager_graph_and_xla_agree(name, conditional):
    network = randomize(NETWORKS[name](condition_channels=2 * conditional, dtype="float64"))
    condition = normal(2, 2, dtype="float64") if conditional else None
    x = inputs(name, dtype="float64")
    expected = network(x, condition)
    for xla in (False, True):
        function = tf.function(network, jit_compile=xla)
        np.testing.assert_allclose(function(x, condition=condition), expected, rtol=1e-10, atol=1e-10)


@layers
def test_float64(name):
    layer = randomize(LAYERS[name](dtype="float64"))
    assert all(variable.dtype == "float64" for variable in layer.variables)
    assert layer(inputs(name, dtype="float64"), **conditions(name)).dtype == tf.float64


@layers
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(name, policy):
    half = randomize(LAYERS[name](dtype=policy))
    full = randomize(LAYERS[name]())
    x = inputs(name)
    y = half(x, **conditions(name))
    assert y.dtype == policy.removeprefix("mixed_")
    assert all(variable.dtype == "float32" for variable in half.variables)
    expected = full(x, **conditions(name)).numpy()
    np.testing.assert_allclose(tf.cast(y, tf.float32), expected, atol=0.05 * np.abs(expected).max())


# Conditions.


@networks
def test_vector_condition_changes_the_result(name):
    network = randomize(NETWORKS[name](condition_channels=2))
    x = inputs(name)
    first, second = (network(x, condition=normal(2, 2, seed=s)) for s in (1, 2))
    assert np.abs(first - second).max() > 1e-3
    assert first.shape == (*x.shape[:-1], 5)


@image_networks
def test_image_condition(name):
    network = randomize(NETWORKS[name](condition_channels=2))
    x = inputs(name)
    vector = normal(2, 2, seed=1)
    image = tf.tile(vector[:, None, None], [1, 4, 6, 1])
    np.testing.assert_allclose(network(x, image), network(x, vector), rtol=1e-5, atol=1e-5)
    assert np.abs(network(x, normal(2, 4, 6, 2)) - network(x, vector)).max() > 1e-3


@image_networks
@pytest.mark.parametrize("factor", [2, 3])
def test_larger_image_conditions_are_squeezed(name, factor):
    network = randomize(NETWORKS[name](condition_channels=2 * factor**2))
    x, condition = inputs(name), normal(2, 4 * factor, 6 * factor, 2)
    expected = network(x, tf.nn.space_to_depth(condition, factor))
    np.testing.assert_array_equal(network(x, condition), expected)
    np.testing.assert_array_equal(network(x, condition=condition), expected)
    assert np.abs(network(x, tf.roll(condition, 1, axis=1)) - expected).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "glow"])
def test_squeezed_conditions_in_every_mode(name):
    network = randomize(NETWORKS[name](condition_channels=8, dtype="float64"))
    x, condition = inputs(name, dtype="float64"), normal(2, 8, 12, 2, dtype="float64")
    expected = network(x, condition)
    signature = [tf.TensorSpec([None, 4, 6, 3], tf.float64), tf.TensorSpec([None, 8, 12, 2], tf.float64)]
    functions = [
        tf.function(network, input_signature=signature),
        tf.function(lambda x, c: network(x, c)),
        tf.function(lambda x, c: network(x, c), jit_compile=True),
    ]
    for function in functions:
        np.testing.assert_allclose(function(x, condition), expected, rtol=1e-10, atol=1e-10)


@image_networks
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_squeezed_conditions_in_half_precision(name, policy):
    half, full = (randomize(NETWORKS[name](condition_channels=8, dtype=dtype)) for dtype in (policy, "float32"))
    x, condition = inputs(name), normal(2, 8, 12, 2)
    y = half(x, condition)
    assert y.dtype == policy.removeprefix("mixed_")
    expected = full(x, condition).numpy()
    np.testing.assert_allclose(tf.cast(y, tf.float32), expected, atol=0.05 * np.abs(expected).max())


@image_networks
def test_every_position_of_a_squeezed_condition_counts(name):
    network = randomize(NETWORKS[name](condition_channels=8))
    condition = normal(2, 8, 12, 2)
    with tf.GradientTape() as tape:
        tape.watch(condition)
        total = tf.reduce_sum(network(inputs(name), condition) * normal(2, 4, 6, 5))
    assert (tape.gradient(total, condition).numpy() != 0.0).all()


@image_networks
@pytest.mark.parametrize(
    ("channels", "shape"),
    [
        (8, (2, 8, 12, 1)),  # too few channels
        (8, (2, 8, 12, 8)),  # as many as after squeezing
        (8, (2, 8, 6, 4)),  # other factors of height and width
        (8, (2, 12, 12, 2)),
        (8, (2, 7, 11, 2)),  # no whole factor
        (8, (2, 9, 13, 2)),
        (8, (2, 2, 3, 32)),  # smaller than the image
        (8, (2, 96, 2)),  # no image
        (8, (2, 1, 8, 12, 2)),
        (8, (8, 12, 2)),
        (2, (2, 8, 12, 2)),  # takes the channels of an image of its own size
    ],
    ids=str,
)
def test_conditions_that_no_factor_squeezes(name, channels, shape):
    network = NETWORKS[name](condition_channels=channels, name="conditional")
    message = rf"conditional: got a condition of shape .*, needs \(None, {channels}\) or \(None, 4, 6, {channels}\)"
    with pytest.raises(ValueError, match=message):
        network(inputs(name), normal(*shape))


def test_only_images_are_squeezed():
    with pytest.raises(ValueError, match=r"needs \(None, 8\)"):
        MLP(3, 5, condition_channels=8)(normal(2, 3), normal(2, 2, 2, 2))


def test_resnet_sees_both_signs_of_the_condition():
    network = randomize(ResNet(3, 5, width=6, condition_channels=1))
    x = inputs("resnet")
    assert np.abs(network(x, -tf.ones([2, 1])) - network(x, -2 * tf.ones([2, 1]))).max() > 1e-3


@networks
def test_wrong_conditions(name):
    x = inputs(name)
    with pytest.raises(ValueError, match=r"plain: got a condition of shape \(2, 2\), takes none"):
        NETWORKS[name](name="plain")(x, condition=normal(2, 2))
    conditional = NETWORKS[name](condition_channels=2, name="conditional")
    with pytest.raises(ValueError, match="conditional: got no condition, needs one with 2 channels"):
        conditional(x)
    for shape in [(2, 3), (2, 5, 6, 2), (2, 4, 2)]:
        with pytest.raises(ValueError, match=r"conditional: got a condition of shape .*, needs \(None, "):
            conditional(x, condition=normal(*shape))


@layers
def test_wrong_number_of_channels(name):
    layer = LAYERS[name](name="narrow")
    with pytest.raises(ValueError, match=r"'narrow' is incompatible"):
        layer(tf.concat([inputs(name)] * 2, axis=-1), **conditions(name))


def test_wrong_mask():
    with pytest.raises(ValueError, match=r"masked: got a mask of shape \(4, 6\), needs \[height, width, 1\]"):
        ResNet(3, 5, mask=CHECKERBOARD[..., 0], name="masked")
    with pytest.raises(ValueError, match="incompatible"):
        ResNet(3, 5, mask=CHECKERBOARD)(tf.zeros([1, 6, 4, 3]))


# Initial values.


@networks
def test_identity_at_the_start(name):
    np.testing.assert_array_equal(NETWORKS[name]()(inputs(name)), 0.0)


@pytest.mark.parametrize("network", [MLP, ResNet])
def test_zero_init_is_optional(network):
    x = normal(2, 3) if network is MLP else normal(2, 4, 4, 3)
    assert np.abs(network(3, 5, zero_init=False)(x)).max() > 1e-3


@networks
def test_training_can_start(name):
    network = NETWORKS[name](seed=0)
    optimizer = keras.optimizers.SGD(0.1)
    x = inputs(name)
    for _ in range(4):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((network(x) - 1.0) ** 2)
        gradients = tape.gradient(loss, [variable.value for variable in network.trainable_variables])
        optimizer.apply(gradients, network.trainable_variables)
    assert all(gradient is not None and np.abs(gradient).max() > 0 for gradient in gradients)


@networks
def test_seed(name):
    first, second, other = (NETWORKS[name](seed=seed).get_weights() for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other))
    kernels = [weight for weight in first if weight.ndim > 1 and np.any(weight)]
    assert len({float(kernel.flat[0]) for kernel in kernels}) == len(kernels)


def test_initial_values_of_the_release():
    layer = WeightNormConv2D(8, 500, 3, gain=1.0, seed=0)
    s = np.sqrt(2 / 8)
    direction = layer.direction.numpy()
    assert -s <= direction.min() < -0.99 * s and 0.99 * s < direction.max() <= s
    np.testing.assert_allclose(layer.magnitude, s * np.sqrt(8 * 9 / 12), rtol=1e-6)
    kernels = [variable.numpy() for variable in GlowConvNet(2, 4, width=64, seed=0).weights if variable.ndim == 4]
    np.testing.assert_allclose([kernel.std() for kernel in kernels], [0.05, 0.05, 0.0], rtol=0.05)


# Formulas.


def conv(x, kernel):
    """Convolution without padding, by its definition."""
    height, width = kernel.shape[:2]
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    return sum(x[:, i : i + rows, j : j + columns] @ kernel[i, j].astype(x.dtype) for i in range(height) for j in range(width))


def pad(x, value=0.0):
    return np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=value)


@pytest.mark.parametrize("gain", [None, 1.0])
def test_weight_norm_formula(gain):
    layer = randomize(WeightNormConv2D(3, 5, 3, gain=gain, dtype="float64"))
    v = layer.direction.numpy()
    g = 1.0 if gain is None else layer.magnitude.numpy()
    x = inputs("resnet", dtype="float64").numpy()
    kernel = g * v / np.sqrt((v**2).sum((0, 1, 2)))
    np.testing.assert_allclose(layer(x), conv(pad(x), kernel) + layer.bias.numpy(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_resnet_formula(batch_norm):
    net = randomize(ResNet(3, 5, width=6, mask=CHECKERBOARD, batch_norm=batch_norm, dtype="float64"))
    x = inputs("resnet", dtype="float64").numpy()

    def relu(h):
        return np.maximum(h, 0.0)

    mask = np.broadcast_to(CHECKERBOARD, (2, 4, 6, 1))
    h = net.norm_in(x) * (2.0 if batch_norm else 1.0)
    h = net.conv_in(relu(np.concatenate([h, -h, mask], -1)))
    total = net.skips[0](h)
    for (norm_1, norm_2), (conv_1, conv_2), skip in zip(net.norms, net.convs, net.skips[1:]):
        h = h + conv_2(relu(norm_2(conv_1(relu(norm_1(h))))))
        total = total + skip(h)
    np.testing.assert_allclose(net(x), net.conv_out(relu(net.norm_out(total))), rtol=1e-10, atol=1e-10)


def edge_bias_conv(x, kernel):
    edge = pad(np.zeros_like(x[..., :1]), 1.0)
    return conv(np.concatenate([pad(x), edge], -1), kernel)


def test_edge_bias_formula():
    layer = randomize(EdgeConv2D(3, 5, dtype="float64"))
    x = inputs("edge", dtype="float64").numpy()
    np.testing.assert_allclose(layer(x), edge_bias_conv(x, layer.kernel.numpy()), rtol=1e-10, atol=1e-10)


def test_glow_formula():
    net = randomize(GlowConvNet(3, 5, width=6, dtype="float64"))
    x = inputs("glow", dtype="float64").numpy()
    k1, b1, s1, k2, b2, s2, k3, b3, s3 = net.get_weights()
    h = np.maximum((edge_bias_conv(x, k1) + b1) * np.exp(3 * s1), 0.0)
    h = np.maximum((conv(h, k2) + b2) * np.exp(3 * s2), 0.0)
    expected = (edge_bias_conv(h, k3) + b3) * np.exp(3 * s3)
    np.testing.assert_allclose(net(x), expected, rtol=1e-10, atol=1e-10)


# Behaviour during training.


def test_actnorm_adapts_only_in_an_adaptation_pass():
    layer = ActNormLayer(3)
    x = 5.0 + 3.0 * normal(64, 4, 4, 3)
    np.testing.assert_array_equal(layer(x), x)
    with adaptation():
        y = layer(x).numpy()
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.var((0, 1, 2)), 1.0, atol=1e-4)
    weights = layer.get_weights()
    layer(10.0 * x)
    assert all(np.array_equal(a, b) for a, b in zip(weights, layer.get_weights()))
    np.testing.assert_allclose(layer(x), y, atol=1e-6)


def test_actnorm_keeps_the_scale_of_a_constant_channel():
    layer = ActNormLayer(2)
    x = tf.concat([tf.fill([8, 4, 4, 1], 1234.567), normal(8, 4, 4, 1)], axis=-1)
    with adaptation():
        y = layer(x).numpy()
    np.testing.assert_allclose(y[..., 0], 0.0, atol=1e-3)
    assert layer.log_scale.numpy()[0] == 0.0


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "float64"])
def test_glow_adapts_its_inner_layers_in_order(dtype):
    net = GlowConvNet(3, 5, width=6, condition_channels=2, dtype=dtype, seed=0)
    x, condition = normal(64, 4, 4, 3), normal(64, 2)
    with adaptation():
        np.testing.assert_array_equal(net(x, condition), 0.0)
    h = net.conv_1(tf.concat([x, tf.tile(condition[:, None, None], [1, 4, 4, 1])], -1))
    for norm, following in [(net.norm_1, net.conv_2), (net.norm_2, None)]:
        h = norm(h)
        value = tf.cast(h, tf.float32).numpy()
        np.testing.assert_allclose(value.mean((0, 1, 2)), 0.0, atol=0.02)
        np.testing.assert_allclose(value.std((0, 1, 2)), 1.0, atol=0.02)
        h = following(tf.nn.relu(h)) if following else None


def test_batch_norm_follows_the_training_argument():
    network = ResNet(3, 5, width=6, batch_norm=True)
    x = 2.0 + inputs("resnet")
    before = network.get_weights()
    network(x, training=False)
    assert all(np.array_equal(a, b) for a, b in zip(before, network.get_weights()))
    network(x, training=True)
    np.testing.assert_allclose(network.norm_in.moving_mean, 0.1 * tf.reduce_mean(x, [0, 1, 2]), rtol=1e-4)
    assert {variable.name for layer in network.norms[0] for variable in layer.trainable_variables} == {"beta"}


def test_l2_penalty_is_on_the_magnitudes():
    network = randomize(ResNet(3, 5, width=6, num_blocks=2, l2=0.5))
    magnitudes = [variable for variable in network.variables if variable.name == "magnitude"]
    assert len(magnitudes) == 2 + 3 + 1
    expected = 0.5 * sum(np.sum(magnitude.numpy() ** 2) for magnitude in magnitudes)
    np.testing.assert_allclose(sum(network.losses), expected, rtol=1e-5)
    assert not ResNet(3, 5).losses


# Saving.


@layers
def test_serialisation_round_trip(name):
    layer = randomize(LAYERS[name](dtype="float64", name="original"))
    saved = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert saved["registered_name"].startswith("tfp_dimflows>")
    loaded = keras.saving.deserialize_keras_object(saved)
    assert loaded.get_config() == layer.get_config()
    loaded.set_weights(layer.get_weights())
    x = inputs(name, dtype="float64")
    np.testing.assert_array_equal(loaded(x, **conditions(name)), layer(x, **conditions(name)))


# Parameter counts of the published models.


def real_nvp_count(levels, base, blocks):
    """Trainable parameters of RealNVP with batch normalisation; each coupling has one scalar for its log-scale."""

    def coupling(channels, width, mask):
        conv_in = 9 * (2 * channels + mask) * width + width
        block = 2 * 9 * width**2 + 2 * width + 2 * width  # second convolution's bias and magnitude, two normalisations
        skip = width**2 + 2 * width
        conv_out = width * 2 * channels + 4 * channels
        return channels + conv_in + blocks * (block + skip) + skip + width + conv_out + 1

    total, channels, width = 0, 3, base
    for _ in range(levels - 1):
        total += 3 * coupling(channels, width, 1) + 3 * coupling(2 * channels, 2 * width, 0)
        channels, width = 2 * channels, 2 * width
    return total + 4 * coupling(channels, width, 1)


def test_real_nvp_parameter_count():
    assert real_nvp_count(levels=2, base=64, blocks=8) == 19_609_545  # CIFAR-10
    assert real_nvp_count(levels=4, base=32, blocks=4) == 46_220_359  # ImageNet 32
    assert real_nvp_count(levels=5, base=32, blocks=2) == 96_363_237  # ImageNet 64
    options = {"num_blocks": 8, "batch_norm": True}
    couplings = [
        (3, ResNet(3, 6, width=64, mask=np.zeros([32, 32, 1]), **options)),
        (3, ResNet(6, 12, width=128, **options)),
        (4, ResNet(6, 12, width=128, mask=np.zeros([16, 16, 1]), **options)),
    ]
    assert sum(number * (count(network) + 1) for number, network in couplings) == 19_609_545


def test_glow_parameter_count():
    total, channels = 0, 12
    for level in range(3):
        step = 2 * channels + channels**2 + count(GlowConvNet(channels // 2, channels, width=512))
        total += 32 * step
        if level < 2:
            total += count(ZeroConv2D(channels // 2, channels))
            channels *= 2
    total += count(ZeroConv2D(2 * channels, 2 * channels))
    assert total == 44_603_604
