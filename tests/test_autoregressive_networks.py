"""The autoregressive conditioners: what every parameter depends on, and all that holds for the other networks."""

import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfp_dimflows.networks import MADE, MaskedDense, PixelCNN, WaveNet

SHUFFLED = (2, 0, 4, 1, 3)

# The event's shape and a network that is wide and deep enough for all dependences.
NETWORKS = {
    "made": ((5,), lambda **kwargs: MADE(5, 10, hidden=(24, 32), **kwargs)),
    "made_reversed": ((5,), lambda **kwargs: MADE(5, 10, hidden=(24, 32), ordering="reversed", **kwargs)),
    "made_random": ((5,), lambda **kwargs: MADE(5, 5, hidden=(24,), ordering="random", **({"seed": 3} | kwargs))),
    "made_shuffled": ((5,), lambda **kwargs: MADE(5, 15, hidden=(16, 16), ordering=SHUFFLED, activation="tanh", **kwargs)),
    "made_linear": ((5,), lambda **kwargs: MADE(5, 10, hidden=(), **kwargs)),
    "made_single": ((1,), lambda **kwargs: MADE(1, 2, hidden=(8, 8), **kwargs)),
    "pixelcnn": ((4, 4, 3), lambda **kwargs: PixelCNN(3, 6, width=24, num_blocks=3, **kwargs)),
    "pixelcnn_reversed": ((4, 4, 3), lambda **kwargs: PixelCNN(3, 6, width=25, num_blocks=3, reverse=True, **kwargs)),
    "pixelcnn_wide": ((3, 5, 2), lambda **kwargs: PixelCNN(2, 6, width=16, num_blocks=2, kernel_size=5, **kwargs)),
    "pixelcnn_grey": ((4, 3, 1), lambda **kwargs: PixelCNN(1, 2, width=8, num_blocks=3, **kwargs)),
    "pixelcnn_column": ((4, 1, 2), lambda **kwargs: PixelCNN(2, 2, width=16, num_blocks=3, **kwargs)),
    "wavenet": ((9,), lambda **kwargs: WaveNet(9, 18, width=8, **kwargs)),
    "wavenet_reversed": ((9,), lambda **kwargs: WaveNet(9, 18, width=8, reverse=True, **kwargs)),
    "wavenet_wide": ((8,), lambda **kwargs: WaveNet(8, 24, width=8, kernel_size=3, **kwargs)),
    "wavenet_single": ((1,), lambda **kwargs: WaveNet(1, 2, width=4, **kwargs)),
}
SOME = ["made_random", "pixelcnn_reversed", "wavenet_reversed"]

networks = pytest.mark.parametrize("name", NETWORKS)
some_networks = pytest.mark.parametrize("name", SOME)


def build(name, /, **kwargs):
    return NETWORKS[name][1](**kwargs)


def normal(*shape, dtype="float64", seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=shape), dtype)


def inputs(name, batch=2, dtype="float64"):
    return normal(batch, *NETWORKS[name][0], dtype=dtype)


def places(name, network):
    """The place of every entry of the flat event in the order."""
    size = int(np.prod(NETWORKS[name][0]))
    if isinstance(network, MADE):
        return np.array(network.ordering)
    return np.arange(size)[::-1] if network.reverse else np.arange(size)


def randomize(layer, seed=0):
    """Gives all weights values with which the layers pass on all that they see."""
    generator = np.random.default_rng(seed)
    for variable in layer.weights:
        fan_in = np.prod(variable.shape[:-1]) if len(variable.shape) > 1 else 10.0
        variable.assign(1.5 / np.sqrt(fan_in) * generator.normal(size=variable.shape))
    return layer


def jacobian(function, x, *others):
    """The derivatives `[N, parameters, entries]` of the flat `function(x, *others)` by x, from one copy for each parameter."""
    batch, size = x.shape[0], int(np.prod(function(x, *others).shape[1:]))
    copies, *others = (tf.repeat(value, size, axis=0) for value in (x, *others))
    with tf.GradientTape() as tape:
        tape.watch(copies)
        y = tf.reshape(function(copies, *others), [batch, size, size])
        own = tf.reduce_sum(tf.linalg.diag_part(y))
    return tape.gradient(own, copies).numpy().reshape(batch, size, -1)


# What the parameters depend on.


@networks
@pytest.mark.parametrize("conditional", [False, True])
def test_parameters_depend_on_exactly_the_entries_before(name, conditional):
    network = randomize(build(name, condition_channels=2 * conditional, dtype="float64"))
    condition = [normal(8, 2, seed=1)] if conditional else []
    depends = (jacobian(network, inputs(name, batch=8), *condition) != 0.0).any(0)
    place = places(name, network)
    before = place[None, :] < place[:, None]
    np.testing.assert_array_equal(depends, np.repeat(before, len(depends) // len(place), axis=0))


def test_pixelcnn_has_no_blind_spot():
    """Masked 3x3 convolutions, however many, are blind to a triangle of pixels to the upper right; `PixelCNN` is not."""
    row, column = 3, 1
    rows, columns = np.indices((5, 6))
    before = (rows < row) | ((rows == row) & (columns < column))
    triangle = (rows < row) & (columns - column > row - rows)

    def masked_convolutions(x):
        for layer in range(8):
            mask = np.array([[1, 1, 1], [1, layer > 0, 0], [0, 0, 0]])[:, :, None, None]
            x = tf.tanh(tf.nn.conv2d(x, mask * normal(3, 3, 1, 1, seed=layer), strides=1, padding="SAME"))
        return x

    def seen_by_the_pixel(network):
        return (jacobian(lambda x: network(x)[:, row, column], normal(4, 5, 6, 1)) != 0.0).any(0).reshape(5, 6)

    np.testing.assert_array_equal(seen_by_the_pixel(masked_convolutions), before & ~triangle)
    network = randomize(PixelCNN(1, 1, width=8, num_blocks=5, dtype="float64"))
    np.testing.assert_array_equal(seen_by_the_pixel(network), before)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"made_linear"}))
def test_all_parameters_depend_on_a_vector_and_not_linearly(name):
    network = randomize(build(name, condition_channels=2, dtype="float64"))
    derivatives = jacobian(lambda condition, x: network(x, condition), normal(4, 2, seed=1), inputs(name, batch=4))
    assert (derivatives != 0.0).any(0).all()
    assert (np.ptp(derivatives, axis=0) > 1e-9).any(-1).all()


def test_linear_made_depends_on_a_vector():
    network = randomize(build("made_linear", condition_channels=2, dtype="float64"))
    derivatives = jacobian(lambda condition, x: network(x, condition), normal(1, 2, seed=1), inputs("made_linear", batch=1))
    assert (derivatives != 0.0).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_parameters_depend_on_an_image_at_their_own_pixel_and_before(reverse):
    network = randomize(PixelCNN(2, 4, width=16, num_blocks=3, reverse=reverse, condition_channels=2, dtype="float64"))
    x, image = normal(4, 3, 3, 2), normal(4, 3, 3, 2, seed=1)
    depends = (jacobian(lambda condition, x: network(x, condition), image, x) != 0.0).any(0)
    place = np.arange(9)[::-1] if reverse else np.arange(9)
    not_after = place[None, :] <= place[:, None]
    np.testing.assert_array_equal(depends, np.repeat(np.repeat(not_after, 4, axis=0), 2, axis=1))


def test_image_condition():
    network = randomize(build("pixelcnn_reversed", condition_channels=2, dtype="float64"))
    x, vector = inputs("pixelcnn_reversed"), normal(2, 2)
    image = tf.tile(vector[:, None, None], [1, 4, 4, 1])
    np.testing.assert_allclose(network(x, image), network(x, vector), rtol=1e-10)
    squeezed = randomize(build("pixelcnn_reversed", condition_channels=8, dtype="float64"))
    large = normal(2, 8, 8, 2)
    np.testing.assert_array_equal(squeezed(x, large), squeezed(x, tf.nn.space_to_depth(large, 2)))


def test_reverse_reads_the_event_from_its_end():
    options = {"condition_channels": 2, "dtype": "float64"}
    forward, backward = (randomize(PixelCNN(1, 2, width=4, reverse=reverse, **options)) for reverse in (False, True))
    x, image = normal(2, 3, 4, 1), normal(2, 3, 4, 2, seed=1)
    np.testing.assert_allclose(backward(x[:, ::-1, ::-1], image[:, ::-1, ::-1])[:, ::-1, ::-1], forward(x, image), rtol=1e-10)
    forward, backward = (randomize(WaveNet(9, 9, width=4, reverse=reverse, **options)) for reverse in (False, True))
    x, vector = normal(2, 9), normal(2, 2)
    np.testing.assert_allclose(backward(x[:, ::-1], vector)[:, ::-1], forward(x, vector), rtol=1e-10)


def test_receptive_field_of_wavenet():
    assert [WaveNet(t, t, width=1).num_blocks for t in (1, 2, 3, 5, 6, 9, 10, 17)] == [1, 1, 1, 2, 3, 3, 4, 4]
    network = randomize(WaveNet(9, 9, width=8, num_blocks=2, dtype="float64"))
    seen = (jacobian(network, normal(8, 9)) != 0.0).any(0)
    lag = np.arange(9)[:, None] - np.arange(9)[None, :]
    np.testing.assert_array_equal(seen, (1 <= lag) & (lag <= 4))


# Formulas, orders and masks.


def gate(h):
    a, b = np.split(h, 2, axis=-1)
    return np.tanh(a) / (1.0 + np.exp(-b))


def relu(h):
    return np.maximum(h, 0.0)


def delayed(h, steps, axis):
    """What was `steps` entries before (negative: after) along an axis, zeros outside."""
    zeros = np.zeros_like(h.take(range(abs(steps)), axis))
    length = h.shape[axis]
    if steps < 0:
        return np.concatenate([h, zeros], axis).take(range(-steps, length - steps), axis)
    return np.concatenate([zeros, h], axis).take(range(length), axis)


def test_pixelcnn_formula():
    net = randomize(PixelCNN(3, 6, width=3, num_blocks=2, kernel_size=5, condition_channels=2, dtype="float64"))
    x, condition = normal(2, 4, 6, 3).numpy(), normal(2, 4, 6, 2, seed=1).numpy()
    earlier, up_to = np.triu(np.ones([3, 3]), 1), np.triu(np.ones([3, 3]))

    def masked(layer, h, mask):
        return h @ (layer.kernel.numpy() * mask) + layer.bias.numpy()

    v = h = x
    for k, block in enumerate(net.blocks):
        above, left, link, *conditions = (
            layer.kernel.numpy() for layer in (block.above, block.left, block.link, *block.conditions)
        )
        a = sum(delayed(delayed(v, 2 - i, 1), 2 - j, 2) @ above[i, j] for i in range(3) for j in range(5))
        a = a + block.above.bias.numpy() + condition @ conditions[0]
        b = sum(delayed(h, 2 - j, 2) @ left[0, j] for j in range(2)) + masked(
            block.here, h, np.tile(up_to if k else earlier, 2)
        )
        b = b + delayed(a @ link, 1, 1) + condition @ conditions[1]
        v, h = gate(a), masked(block.out, gate(b), up_to) + (h if k else 0.0)
    expected = masked(net.last, relu(h), np.repeat(up_to, 2, axis=1))
    np.testing.assert_allclose(net(x, condition), expected, rtol=1e-9, atol=1e-9)


def test_wavenet_formula():
    net = randomize(WaveNet(9, 18, width=4, num_blocks=3, kernel_size=3, condition_channels=2, dtype="float64"))
    x, condition = normal(2, 9).numpy(), normal(2, 2, seed=1).numpy()
    h, total = net.embed(delayed(x[..., None], 1, 1)).numpy(), 0.0
    for k, block in enumerate(net.blocks):
        kernel, bias = block.conv.get_weights()
        a = sum(delayed(h, (2 - i) * 2**k, 1) @ kernel[i] for i in range(3)) + bias
        g = gate(a + (condition @ block.condition.kernel.numpy())[:, None])
        total = total + block.skip(g).numpy()
        h = h + block.residual(g).numpy() if k < 2 else None
    expected = net.last(relu(net.mix(relu(total)).numpy())).numpy().reshape(2, 18)
    np.testing.assert_allclose(net(x, condition), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("conditional", [False, True])
def test_made_formula(conditional):
    net = randomize(MADE(4, 8, hidden=(6, 9), activation="tanh", condition_channels=2 * conditional, dtype="float64"))
    x, condition = normal(2, 4).numpy(), normal(2, 2, seed=1).numpy()
    degrees = [[1, 2, 3, 4], [1, 1, 2, 2, 3, 3], [1, 1, 1, 2, 2, 2, 3, 3, 3], [1, 1, 2, 2, 3, 3, 4, 4]]
    if conditional:
        degrees[:3] = [1, 2, 3, 4, 0, 0], [0, 0, 1, 2, 2, 3], [0, 0, 0, 1, 1, 2, 2, 3, 3]
    h = np.concatenate([x, condition], -1) if conditional else x
    for k, layer in enumerate(net.dense):
        below, own = np.array(degrees[k])[:, None], np.array(degrees[k + 1])
        kernel, bias = layer.get_weights()
        h = (np.tanh(h) if k else h) @ (kernel * (below < own if k == 2 else below <= own)) + bias
    np.testing.assert_allclose(net(x, tf.constant(condition) if conditional else None), h, rtol=1e-9, atol=1e-9)


def test_masked_dense_formula():
    layer = randomize(MaskedDense([3, 1, 2], [1, 2, 3, 3], dtype="float64"))
    strict = randomize(MaskedDense([3, 1, 2], [1, 2, 3, 3], strict=True, dtype="float64"))
    x, (kernel, bias) = normal(2, 4, 4, 3), layer.get_weights()
    up_to = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    below = np.array([[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]])
    np.testing.assert_allclose(layer(x), x @ (kernel * up_to) + bias, rtol=1e-12)
    np.testing.assert_allclose(strict(x), x @ (kernel * below) + bias, rtol=1e-12)


@pytest.mark.parametrize("conditional", [False, True])
def test_hidden_degrees_are_evenly_spread(conditional):
    network = MADE(5, 5, hidden=(40, 12), condition_channels=2 * conditional)
    possible = range(0 if conditional else 1, 5)
    for layer in network.dense[:-1]:
        counts = np.bincount(layer.output_degrees, minlength=5)[possible]
        assert counts.sum() == len(layer.output_degrees) and np.ptp(counts) <= 1 and counts.min() > 0


def test_orders_of_made():
    def order(ordering, seed=None):
        return MADE(5, 5, hidden=(), ordering=ordering, seed=seed).ordering

    assert order("natural") == (0, 1, 2, 3, 4)
    assert order("reversed") == (4, 3, 2, 1, 0)
    assert order(SHUFFLED) == order(list(SHUFFLED)) == order(np.array(SHUFFLED)) == SHUFFLED
    assert order("random", seed=1) == order("random", seed=1) != order("random", seed=2)
    drawn = MADE(20, 20, hidden=(), ordering="random")
    assert sorted(drawn.ordering) == list(range(20))
    assert MADE.from_config(drawn.get_config()).ordering == drawn.ordering


# Modes, dtypes, initial values, saving: as for the other networks.

LAYERS = {
    **{name: NETWORKS[name] for name in SOME},
    **{f"{name}_condition": (NETWORKS[name][0], functools.partial(NETWORKS[name][1], condition_channels=2)) for name in SOME},
    "masked_dense": ((4, 3), lambda **kwargs: MaskedDense([0, 1, 2], [0, 0, 1, 2], **kwargs)),
}
layers = pytest.mark.parametrize("name", LAYERS)


def arguments(name, dtype="float64"):
    x = normal(3, *LAYERS[name][0], dtype=dtype)
    return (x, normal(3, 2, dtype=dtype)) if name.endswith("condition") else (x,)


@layers
def test_variables_exist_after_construction(name):
    layer = LAYERS[name][1]()
    before = [variable.path for variable in layer.variables]
    layer(*arguments(name))
    assert layer.built and before and [variable.path for variable in layer.variables] == before


@pytest.mark.slow
@layers
def test_eager_graph_and_xla_agree(name):
    layer = randomize(LAYERS[name][1](dtype="float64"))
    values = arguments(name)
    expected = layer(*values)
    assert expected.dtype == tf.float64
    signature = [tf.TensorSpec([None, *value.shape[1:]], tf.float64) for value in values]
    graph = tf.function(lambda *values: layer(*values), input_signature=signature)
    assert graph.get_concrete_function().output_shapes == tf.TensorShape([None, *expected.shape[1:]])
    for function in (graph, tf.function(lambda *values: layer(*values), jit_compile=True)):
        np.testing.assert_allclose(function(*values), expected, rtol=1e-9, atol=1e-9)


def test_unknown_height_and_width():
    network = randomize(build("pixelcnn_reversed", condition_channels=2, dtype="float64"))
    signature = [tf.TensorSpec([None, None, None, 3], tf.float64), tf.TensorSpec([None, 2], tf.float64)]
    x, condition = inputs("pixelcnn"), normal(2, 2)
    function = tf.function(lambda x, c: network(x, c), input_signature=signature)
    np.testing.assert_allclose(function(x, condition), network(x, condition), rtol=1e-9, atol=1e-9)


@layers
def test_mixed_precision(name):
    half, full = (randomize(LAYERS[name][1](dtype=dtype)) for dtype in ("mixed_bfloat16", "float32"))
    values = arguments(name, dtype="float32")
    y, expected = half(*values), full(*values).numpy()
    assert y.dtype == tf.bfloat16
    assert all(variable.dtype == "float32" for variable in half.variables)
    np.testing.assert_allclose(tf.cast(y, tf.float32), expected, atol=0.05 * np.abs(expected).max())


@layers
def test_every_variable_has_a_gradient(name):
    layer = randomize(LAYERS[name][1](dtype="float64"))
    with tf.GradientTape() as tape:
        y = layer(*arguments(name))
        total = tf.reduce_sum(y * normal(*y.shape, seed=1))
    gradients = tape.gradient(total, [variable.value for variable in layer.trainable_variables])
    assert layer.trainable_variables and all(np.abs(gradient).max() > 0.0 for gradient in gradients)


@some_networks
def test_training_can_start_from_zero(name):
    network = build(name, seed=0)
    optimizer = keras.optimizers.SGD(0.1)
    x = inputs(name, dtype="float32")
    np.testing.assert_array_equal(network(x), 0.0)
    for _ in range(3):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((network(x) - 1.0) ** 2)
        gradients = tape.gradient(loss, [variable.value for variable in network.trainable_variables])
        optimizer.apply(gradients, network.trainable_variables)
    assert all(np.abs(gradient).max() > 0.0 for gradient in gradients)


@networks
def test_zero_init(name):
    x = inputs(name)
    np.testing.assert_array_equal(build(name)(x), 0.0)
    if np.prod(x.shape[1:]) > 1:
        assert np.abs(build(name, zero_init=False)(x)).max() > 1e-3


@some_networks
def test_seed(name):
    first, second, other = (build(name, seed=seed, condition_channels=2).get_weights() for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other))
    kernels = [weight for weight in first if np.any(weight)]
    assert len({float(kernel.flat[0]) for kernel in kernels}) == len(kernels)


@layers
def test_serialisation_round_trip(name):
    layer = randomize(LAYERS[name][1](dtype="float64", name="original"))
    saved = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert saved["registered_name"].startswith("tfp_dimflows>")
    loaded = keras.saving.deserialize_keras_object(saved)
    assert loaded.get_config() == layer.get_config()
    loaded.set_weights(layer.get_weights())
    np.testing.assert_array_equal(loaded(*arguments(name)), layer(*arguments(name)))


@some_networks
def test_saved_model(name, tmp_path):
    model = keras.Sequential([keras.Input(NETWORKS[name][0]), randomize(build(name, zero_init=False))])
    model.save(tmp_path / "model.keras")
    x = inputs(name, dtype="float32")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(x), model(x))


@pytest.mark.parametrize(
    "ordering",
    ["backwards", (0, 1), (0, 1, 1), (1, 2, 3), (0, 1, 2, 3), (0.5, 1, 2), (None, 1, 2), 3, None, [[0, 1, 2]]],
    ids=str,
)
def test_orderings_that_are_no_permutation(ordering):
    message = r"made: got ordering=.*, needs 'natural', 'reversed', 'random' or each of 0 \.\. 2 once"
    with pytest.raises(ValueError, match=message):
        MADE(3, 6, ordering=ordering, name="made")


@pytest.mark.parametrize("network", [MADE, PixelCNN, WaveNet])
@pytest.mark.parametrize("outputs", [0, 2, 7])
def test_outputs_that_are_no_multiple_of_the_inputs(network, outputs):
    with pytest.raises(ValueError, match=f"net: got outputs={outputs}, needs a multiple of inputs=3"):
        network(3, outputs, name="net")


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (PixelCNN, {"width": 2}, "width=2, needs at least the number of channels, 3"),
        (PixelCNN, {"num_blocks": 0}, "num_blocks=0, needs at least 1"),
        (PixelCNN, {"kernel_size": 4}, "kernel_size=4, needs an odd number of at least 3"),
        (PixelCNN, {"kernel_size": 1}, "kernel_size=1, needs an odd number of at least 3"),
        (WaveNet, {"num_blocks": 0}, "num_blocks=0, needs at least 1"),
        (WaveNet, {"kernel_size": 1}, "kernel_size=1, needs at least 2"),
    ],
)
def test_sizes_that_make_no_network(network, options, message):
    with pytest.raises(ValueError, match=f"net: got {message}"):
        network(3, 6, name="net", **options)


@some_networks
def test_wrong_conditions(name):
    x = inputs(name)
    with pytest.raises(ValueError, match=r"plain: got a condition of shape \(2, 2\), takes none"):
        build(name, name="plain")(x, condition=normal(2, 2))
    network = build(name, condition_channels=2, name="conditional")
    with pytest.raises(ValueError, match="conditional: got no condition, needs one with 2 channels"):
        network(x)
    for shape in [(2, 3), (2, 5, 6, 2), (2, 4, 2)]:
        with pytest.raises(ValueError, match=r"conditional: got a condition of shape .*, needs \(None, "):
            network(x, condition=normal(*shape))


@layers
def test_wrong_number_of_channels(name):
    layer = LAYERS[name][1](name="narrow")
    x, *condition = arguments(name)
    with pytest.raises(ValueError, match=r"'narrow' is incompatible"):
        layer(tf.concat([x, x], axis=-1), *condition)
