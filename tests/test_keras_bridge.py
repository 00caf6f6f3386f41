"""The bridge between `tf.Module` and Keras 3: how networks are called, and who finds which variables."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras

import tfp_dimflows as dimflows
from tfp_dimflows import keras_bridge
from tfp_dimflows.keras_bridge import Network

dfb = dimflows.bijectors
tfb, tfd = tfp.bijectors, tfp.distributions

FIRST = dfb.masks.Channel(event_ndims=1)


def normal(shape, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=shape), tf.float32)


def dense(units=2, inputs=2, **options):
    layer = keras.layers.Dense(units, **options)
    layer.build([None, inputs])
    return layer


def ids(variables):
    """Which variables, whichever library's wrapper they come in."""
    return sorted(id(v.value) if isinstance(v, keras.Variable) else id(v) for v in variables)


# How a network is called.


class KerasConditional(keras.layers.Layer):
    def call(self, x, condition=None):
        return x if condition is None else x + 10.0 * condition


class KerasFixed(KerasConditional):
    condition_channels = 0


class TfKerasConditional(tf_keras.layers.Layer):
    def call(self, x, condition=None):
        return x if condition is None else x + 10.0 * condition


class ModuleConditional(tf.Module):
    def __call__(self, x, condition):
        return x + 10.0 * condition


class ModulePositional(tf.Module):
    def __call__(self, x, c):
        return x + 10.0 * c


class ModulePlain(tf.Module):
    def __call__(self, x):
        return 1.0 * x


def two_inputs(library):
    x, condition = library.layers.Input([2]), library.layers.Input([2])
    tenfold = library.layers.Dense(2, use_bias=False, kernel_initializer=library.initializers.Identity(gain=10.0))
    return library.Model([x, condition], library.layers.Add()([x, tenfold(condition)]))


def identity(library):
    """A model with layers that behave differently in training; given a condition as `training` it would double."""

    class Doubling(library.layers.Layer):
        def call(self, x, training=None):
            return x if training is None or training is False else 2.0 * x

    return library.Sequential([library.layers.Input([2]), Doubling()])


def bound_positional():
    class Holder:
        def method(self, x, c):
            return x + 10.0 * c

    return Holder().method


def function_with_a_default(x, scale=1.0):
    return scale * x


NETWORKS = {  # and whether they use a condition
    "keras layer": (KerasConditional, True),
    "keras layer without": (functools.partial(keras.layers.Activation, "linear"), False),
    "keras layer that wants none": (KerasFixed, False),
    "keras sequential": (functools.partial(identity, keras), False),
    "keras model of two": (functools.partial(two_inputs, keras), True),
    "tf_keras layer": (TfKerasConditional, True),
    "tf_keras layer without": (functools.partial(tf_keras.layers.Activation, "linear"), False),
    "tf_keras sequential": (functools.partial(identity, tf_keras), False),
    "tf_keras model of two": (functools.partial(two_inputs, tf_keras), True),
    "module": (ModuleConditional, True),
    "module by position": (ModulePositional, True),
    "module without": (ModulePlain, False),
    "function of one": (lambda: lambda x: 1.0 * x, False),
    "function of two": (lambda: lambda x, c: x + 10.0 * c, True),
    "function of an optional condition": (lambda: KerasConditional().call, True),
    "function by keyword": (lambda: lambda x, *, condition: x + 10.0 * condition, True),
    "function of a condition alone": (lambda: lambda condition: 1.0 * condition, False),
    "function with a default": (lambda: function_with_a_default, False),
    "partial": (lambda: functools.partial(lambda a, x, condition: x + a * condition, 10.0), True),
    "method": (bound_positional, True),
    "tensorflow function": (lambda: tf.identity, False),
    "traced function": (lambda: tf.function(lambda x, condition: x + 10.0 * condition), True),
}


@pytest.mark.parametrize("case", NETWORKS)
@pytest.mark.parametrize("batch", [[], [3], [4, 3]], ids=str)
def test_calling_conventions(case, batch):
    build, uses_condition = NETWORKS[case]
    network = Network(build())
    assert network.accepts_condition == uses_condition
    x, condition = normal([*batch, 2]), normal([*batch, 2], seed=1)
    y = network(x, condition, event_ndims=1)
    assert y.shape == x.shape
    np.testing.assert_allclose(y, x + 10.0 * condition if uses_condition else x, rtol=1e-6)


@pytest.mark.parametrize("case", [case for case, (_, uses) in NETWORKS.items() if not uses])
def test_without_a_condition(case):
    x = normal([3, 2])
    np.testing.assert_array_equal(Network(NETWORKS[case][0]())(x, event_ndims=1), x)


@pytest.mark.parametrize("build", [KerasConditional, TfKerasConditional, lambda: KerasConditional().call])
def test_an_optional_condition_may_be_missing(build):
    x = normal([3, 2])
    np.testing.assert_array_equal(Network(build())(x, event_ndims=1), x)


def test_networks_must_be_callable():
    with pytest.raises(TypeError, match="Network: got 'mlp', needs a callable"):
        Network("mlp")


def test_structures_of_conditions():
    network = Network(lambda x, condition: x + condition["a"] + condition["b"][:, 0])
    condition = {"a": normal([3, 2]), "b": normal([3, 5, 2])}
    x = normal([4, 3, 2])
    nested = {"a": condition["a"][tf.newaxis], "b": condition["b"][tf.newaxis]}
    expected = x + condition["a"] + condition["b"][:, 0]
    np.testing.assert_allclose(network(x, nested, event_ndims=1), expected, rtol=1e-6)


# Batch axes.


@pytest.mark.parametrize("batch", [[], [5], [4, 5], [2, 4, 5]], ids=str)
@pytest.mark.parametrize("event", [[2], [4, 4, 3]], ids=["vector", "image"])
def test_a_network_sees_one_batch_axis(batch, event):
    seen = []

    def network(x, condition):
        seen.append((x.shape, condition.shape))
        return x[..., :1] + condition[:, :1] if len(event) == 1 else x[..., :1]

    y = Network(network)(normal([*batch, *event]), normal([*batch, 7]), event_ndims=len(event))
    flat = int(np.prod(batch))
    assert seen == [((flat, *event), (flat, 7))]
    assert y.shape == [*batch, *event[:-1], 1]


@pytest.mark.parametrize("condition_batch", [[4, 5], [1, 5], [4, 1], [1, 1]], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("condition_event", [[2], [3, 2]], ids=["vector", "grid"])
def test_conditions_broadcast_to_the_batch(condition_batch, condition_event):
    def network(x, condition):
        return x + (condition if len(condition.shape) == 2 else tf.reduce_sum(condition, axis=1))

    x, condition = normal([4, 5, 2]), normal([*condition_batch, *condition_event], seed=1)
    expected = x + (condition if len(condition_event) == 1 else tf.reduce_sum(condition, axis=-2))
    np.testing.assert_allclose(Network(network)(x, condition, event_ndims=1), expected, rtol=1e-5)


def test_a_single_condition_broadcasts_to_a_batch():
    x, condition = normal([5, 2]), normal([1, 2], seed=1)
    y = Network(lambda x, condition: tf.concat([x, condition], axis=-1))(x, condition, event_ndims=1)
    np.testing.assert_array_equal(y[:, 2:], np.tile(condition, [5, 1]))


def test_unknown_batch_sizes():
    network = Network(lambda x, condition: x + condition)
    signature = [tf.TensorSpec([None, None, 2]), tf.TensorSpec([1, None, 2])]
    traced = tf.function(lambda x, c: network(x, c, event_ndims=1), input_signature=signature)
    x, condition = normal([4, 5, 2]), normal([1, 5, 2], seed=1)
    np.testing.assert_allclose(traced(x, condition), x + condition, rtol=1e-6)


# A Keras 3 network is visible to `tf.Module`.


def coupling(network):
    return dfb.AffineCoupling(network, FIRST)


def test_bijectors_show_keras_variables():
    network = keras.Sequential([dense(4, inputs=1), keras.layers.BatchNormalization(), dense(2, inputs=4)])
    network.build([None, 1])
    bijector = tfb.Chain([coupling(network), tfb.Shift(tf.Variable([0.0, 0.0]))])
    distribution = tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [2]), bijector)
    extra = [bijector.bijectors[0]._transformer.gain, bijector.bijectors[1].shift]
    for holder in (bijector, distribution):
        assert ids(holder.trainable_variables) == ids([*network.trainable_variables, *extra])
        assert ids(holder.variables) == ids([*network.variables, *extra])
    assert len(network.variables) > len(network.trainable_variables)


@pytest.mark.parametrize("where", ["lambda", "partial", "method", "module", "list", "transformer"])
def test_bijectors_show_what_their_networks_hold(where):
    layer = dense(2, inputs=1)

    class Holder(tf.Module):
        def __init__(self):
            super().__init__()
            self.parts = {"layer": layer}

        def __call__(self, x):
            return self.parts["layer"](x)

    layers = [layer]
    bijector = {
        "lambda": lambda: coupling(lambda x: layer(x)),
        "partial": lambda: coupling(functools.partial(lambda net, x: net(x), layer)),
        "method": lambda: coupling(layer.call),
        "module": lambda: coupling(Holder()),
        "list": lambda: coupling(lambda x: layers[0](x)),
        "transformer": lambda: dfb.Coupling(
            lambda x: x, FIRST, dfb.Transformer(lambda p: tfb.Shift(layer(p)[..., 0]), params_per_dim=1)
        ),
    }[where]()
    found = ids(bijector.trainable_variables)
    assert set(ids(layer.trainable_variables)) <= set(found) and len(found) == len(set(found))
    x = normal([3, 2])
    before = bijector.inverse_log_det_jacobian(x, event_ndims=1), bijector.inverse(x)
    for variable in layer.trainable_variables:
        variable.assign_add(tf.ones_like(variable))
    assert np.abs(bijector.inverse(x) - before[1]).max() > 0.1  # nothing stale on the same tensor


def test_lazily_built_networks_show_their_variables_after_the_first_call():
    network = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(2)])
    bijector = coupling(network)
    assert len(bijector.trainable_variables) == 1  # the gain
    bijector.forward(normal([3, 2]))
    assert len(network.trainable_variables) == 4
    assert set(ids(network.trainable_variables)) < set(ids(bijector.trainable_variables))
    assert len(bijector.trainable_variables) == 5


def test_gradients_reach_keras_networks():
    bijector = coupling(dense(2, inputs=1))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(bijector.inverse(normal([3, 2])) ** 2)
    gradients = tape.gradient(loss, bijector.trainable_variables)
    assert len(gradients) == 3 and all(np.abs(g).max() > 0.0 for g in gradients)


# Everything that a distribution holds is visible to Keras.


def test_collect_finds_layers_wherever_they_are():
    layers = {
        place: dense() for place in ("direct", "closure", "partial", "keyword", "method", "list", "dict", "module", "nested")
    }

    class Holder(tf.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def method(self, x):
            return self.layer(x)

    def closure(x):
        return layers_in_closure[0](x)

    layers_in_closure = [layers["closure"]]
    inner = layers["nested"]
    root = [
        layers["direct"],
        closure,
        functools.partial(lambda layer, x, other=None: x, layers["partial"], other=layers["keyword"]),
        Holder(layers["method"]).method,
        [(layers["list"],)],
        {"a": {"b": layers["dict"]}},
        Holder(layers["module"]),
        lambda x: (lambda y: inner(y))(x),
    ]
    holdings = keras_bridge.collect(root)
    assert {id(layer) for layer in holdings.layers} == {id(layer) for layer in layers.values()}
    assert len(holdings.layers) == len(layers)
    assert holdings.variables == [] and holdings.tf_keras_layers == []


def test_collect_finds_what_tfp_bijectors_hold():
    network, shift = dense(2, inputs=1), tf.Variable([0.0, 0.0])
    scale = tfp.util.TransformedVariable(1.0, tfb.Softplus())
    autoregressive = tfb.AutoregressiveNetwork(params=2, event_shape=[2], hidden_units=[4])
    realnvp = tfb.RealNVP(num_masked=1, shift_and_log_scale_fn=lambda x, units, **_: tf.split(network(x), 2, axis=-1))
    flow = tfb.Chain([tfb.Invert(tfb.Shift(shift)), tfb.Scale(scale), realnvp, tfb.MaskedAutoregressiveFlow(autoregressive)])
    loc = tf.Variable([1.0, 1.0], trainable=False)
    distribution = tfd.TransformedDistribution(tfd.Independent(tfd.Normal(loc, 1.0), 1), flow)
    distribution.log_prob(normal([3, 2]))  # builds the autoregressive network
    holdings = keras_bridge.collect(distribution)
    assert [id(layer) for layer in holdings.layers] == [id(network)]
    assert [id(layer) for layer in holdings.tf_keras_layers] == [id(autoregressive)]
    expected = [shift, scale.pretransformed_input, loc, *autoregressive.variables]
    assert len(autoregressive.variables) == 4
    assert ids(holdings.variables) == ids(expected)


def test_collect_finds_everything_once():
    shared, shift = dense(), tf.Variable([0.0, 0.0])
    parts = [coupling(lambda x: shared(tf.repeat(x, 2, axis=-1))), coupling(lambda x: shared(tf.repeat(x, 2, axis=-1)))]
    flow = dfb.Chain([*parts, tfb.Shift(shift), tfb.Invert(tfb.Shift(shift))])
    holdings = keras_bridge.collect([flow, flow, shared])
    assert [id(layer) for layer in holdings.layers] == [id(shared)]
    gains = [part._transformer.gain for part in parts]
    assert ids(holdings.variables) == ids([shift, *gains])


def test_collect_takes_the_outermost_layers():
    inner = dense()
    outer = keras.Sequential([inner, dense()])
    holdings = keras_bridge.collect(coupling(outer))
    assert [id(layer) for layer in holdings.layers] == [id(outer)]


def test_shared_layers_train_once():
    shared = dense(2, inputs=1)
    flow = dfb.Chain([coupling(shared), dfb.AffineCoupling(shared, FIRST.complement())])
    model = dimflows.FlowModel(tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [2]), flow))
    assert len(model.trainable_variables) == 2 + 2
    assert len({id(v) for v in model.trainable_variables}) == 4


@pytest.mark.parametrize("holder", ["shift", "normal", "nested"])
def test_keras_variables_as_tfp_parameters_are_refused(holder):
    variable = keras.Variable([0.0, 0.0])
    with pytest.raises(ValueError, match=r"keras\.Variable.*never trains.*\.value"):
        if holder == "shift":
            keras_bridge.collect(tfb.Shift(variable, name="moved"))
        elif holder == "normal":
            keras_bridge.collect(tfd.Normal(variable, 1.0))
        else:
            keras_bridge.collect(tfb.Chain([tfb.Invert(tfb.Shift(variable))]))
    shift = tfb.Shift(variable.value)
    assert ids(keras_bridge.collect(shift).variables) == [id(variable.value)]


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", [tf.float32, tf.float64, tf.int32])
def test_adopt_shares_the_storage(trainable, dtype):
    variable = tf.Variable([1, 2], dtype=dtype, trainable=trainable, name="scope/rate")
    adopted = keras_bridge.adopt(variable)
    assert isinstance(adopted, keras.Variable) and adopted.value is variable
    assert adopted.trainable == trainable and adopted.dtype == dtype.name and "rate" in adopted.name
    variable.assign([3, 4])
    np.testing.assert_array_equal(adopted.numpy(), [3, 4])
    adopted.assign([5, 6])
    np.testing.assert_array_equal(variable.numpy(), [5, 6])


# Data-dependent initialisation.


def test_adaptation_is_a_context():
    assert not keras_bridge.adapting()
    with dimflows.adaptation():
        assert keras_bridge.adapting()
    assert not keras_bridge.adapting()
    with pytest.raises(KeyError), dimflows.adaptation():
        raise KeyError
    assert not keras_bridge.adapting()


def test_adaptation_is_eager_only():
    actnorm = dfb.ActNorm(2)

    @tf.function
    def adapt(x):
        with dimflows.adaptation():
            return actnorm.inverse(x)

    with pytest.raises(RuntimeError, match="must run eagerly"):
        adapt(normal([8, 2]))
    assert not keras_bridge.adapting()
    assert all((v.numpy() == 0.0).all() for v in actnorm.trainable_variables)


@pytest.mark.parametrize("direction", ["inverse", "forward"])
def test_one_pass_adapts_all_layers_in_order(direction):
    flow = dfb.Chain([dfb.ActNorm(2), tfb.Scale([3.0, 0.2]), dfb.ActNorm(2)])
    x = 5.0 + 2.0 * normal([64, 2])
    with dimflows.adaptation():
        adapted = getattr(flow, direction)(x)
    np.testing.assert_allclose(np.mean(adapted, axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.std(adapted, axis=0), 1.0, rtol=1e-4)
    before = [v.numpy() for v in flow.trainable_variables]
    np.testing.assert_allclose(getattr(flow, direction)(tf.identity(x)), adapted, rtol=1e-5, atol=1e-5)
    getattr(flow, direction)(10.0 * x)  # another pass changes nothing
    for variable, value in zip(flow.trainable_variables, before):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.parametrize("seen_before", [False, True])
def test_log_prob_adapts(seen_before):
    """Whatever directions a log-density takes, and whatever was cached before, layers adapt once, to the data."""
    actnorms = dfb.ActNorm(2), dfb.ActNorm(2)
    flow = tfb.Chain([actnorms[0], tfb.Scale([3.0, 0.2]), actnorms[1]])
    distribution = tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [2]), flow)
    x = 5.0 + 2.0 * normal([64, 2])
    if seen_before:
        distribution.log_prob(x)
    with dimflows.adaptation():
        distribution.log_prob(x)
    z = flow.inverse(tf.identity(x))
    np.testing.assert_allclose(np.mean(z, axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.std(z, axis=0), 1.0, rtol=1e-4)
    assert all(np.abs(v).max() > 0.1 for actnorm in actnorms[:1] for v in actnorm.trainable_variables)


def test_states_of_layers_belong_to_their_layers_alone():
    network = keras.Sequential([keras.Input([1]), keras.layers.Dense(2), keras.layers.BatchNormalization()])
    coupling = dfb.AffineCoupling(network, dfb.masks.Channel(event_ndims=1))
    states = {id(v.value) for v in network.non_trainable_variables}
    assert len(states) == 2
    assert not states & {id(v) for v in dimflows.keras_bridge.collect(coupling).variables}


def test_a_layer_that_is_built_later_is_shown_beside_one_that_was_built():
    first, second = keras.layers.Dense(3), keras.layers.Dense(2)
    first.build([None, 1])
    coupling = dfb.AffineCoupling(lambda x: second(first(x)), dfb.masks.Channel(event_ndims=1))
    coupling.inverse(tf.ones([5, 2]))
    assert second.built
    shown = {id(v) for v in coupling.trainable_variables}
    assert all(id(v.value) in shown for layer in (first, second) for v in layer.trainable_variables)
