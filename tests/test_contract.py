"""What every bijector promises, checked for every entry of the registry in float64 unless said otherwise."""

import functools
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import (
    ENTRIES,
    MASKS,
    STATES,
    ConditionalMixer,
    Mixer,
    assert_close,
    build,
    built,
    conditions,
    dfb,
    dimflows,
    distribution,
    fresh,
    jacobian,
    normal,
    numerical_jacobian,
    randomize,
)

tfb, tfd = tfp.bijectors, tfp.distributions


def entries(condition=lambda entry: True):
    """Parametrises a test over the entries for which a condition holds."""
    return pytest.mark.parametrize("entry", [pytest.param(e, id=e.name) for e in ENTRIES.values() if condition(e)])


states = pytest.mark.parametrize("state", STATES)
every_entry = entries()


def event_sum(per_dim, event_shape):
    return np.asarray(per_dim).sum(axis=tuple(range(-len(event_shape), 0)))


def shapes(entry):
    """(event shape of the data, of the latent)."""
    return tuple(entry.data_shape), tuple(entry.latent_shape or entry.data_shape)


def log_det(direction, bijector, value, entry, **kwargs):
    """The log-det, summed over the event."""
    event_ndims = len(shapes(entry)[direction == "forward"])
    return getattr(bijector, f"{direction}_log_det_jacobian")(value, event_ndims=event_ndims, **kwargs)


def log_dets(bijector, y, x, entry, **kwargs):
    """(inverse log-det at y, forward log-det at x), summed over the event."""
    return log_det("inverse", bijector, y, entry, **kwargs), log_det("forward", bijector, x, entry, **kwargs)


def test_the_registry_lists_every_bijector():
    classes = {c for c in vars(dfb).values() if inspect.isclass(c) and issubclass(c, tfb.Bijector)}
    exported = {c for c in classes if c.__name__ in dfb.__all__} - {dfb.FlowBijector}
    listed = {type(built(name, "initial")) for name in ENTRIES}
    assert exported - listed == set()


# Mathematics.


@every_entry
@states
def test_round_trip(entry, state):
    bijector, kwargs = built(entry.name, state), entry.kwargs()
    y, x = entry.data(), entry.latent()
    assert_close(bijector.forward(fresh(bijector.inverse(y, **kwargs)), **kwargs), y)
    assert_close(bijector.inverse(fresh(bijector.forward(x, **kwargs)), **kwargs), x)


@every_entry
@states
def test_log_det_is_that_of_the_jacobian(entry, state):
    bijector, kwargs = built(entry.name, state), entry.kwargs()
    y, x = entry.data(), entry.latent()
    ildj, fldj = log_dets(bijector, y, x, entry, **kwargs)
    for function, value, actual in ((bijector.inverse, y, ildj), (bijector.forward, x, fldj)):
        matrix = jacobian(function, value, **kwargs)
        scale = np.abs(matrix).max()
        np.testing.assert_allclose(numerical_jacobian(function, value, **kwargs), matrix, rtol=1e-5, atol=1e-7 * scale)
        assert actual.shape == value.shape[:1]
        assert_close(actual, np.linalg.slogdet(matrix)[1])


@every_entry
@states
def test_contributions_sum_to_the_log_det(entry, state):
    bijector, kwargs = built(entry.name, state), entry.kwargs()
    y, x = entry.data(), entry.latent()
    data_shape, latent_shape = shapes(entry)
    ildj, fldj = log_dets(bijector, y, x, entry, **kwargs)
    inverse, forward = bijector.inverse_log_det_per_dim(y, **kwargs), bijector.forward_log_det_per_dim(x, **kwargs)
    assert inverse.shape == y.shape and forward.shape == x.shape
    assert_close(event_sum(inverse, data_shape), ildj)
    assert_close(event_sum(forward, latent_shape), fldj)


@entries(lambda entry: entry.reference)
@states
def test_contributions_equal_the_formula(entry, state):
    bijector, kwargs = built(entry.name, state), entry.kwargs()
    y = entry.data()
    expected = entry.reference(bijector, y, kwargs.get("condition"))
    assert_close(bijector.inverse_log_det_per_dim(y, **kwargs), expected)
    assert_close(dimflows.inverse_log_det_per_dim(bijector, y, **kwargs), expected)


@entries(lambda entry: entry.forward_reference or entry.in_place)
@states
def test_forward_contributions_are_in_the_frame_of_the_latent(entry, state):
    bijector, kwargs = built(entry.name, state), entry.kwargs()
    x = entry.latent()
    if entry.forward_reference:
        expected = entry.forward_reference(bijector, x, kwargs.get("condition"))
    else:
        y = fresh(bijector.forward(x, **kwargs))
        expected = -entry.move(bijector.inverse_log_det_per_dim(y, **kwargs).numpy())
    assert_close(bijector.forward_log_det_per_dim(x, **kwargs), expected)
    assert_close(dimflows.forward_log_det_per_dim(bijector, x, **kwargs), expected)


@entries(lambda entry: entry.triangular)
@states
def test_contributions_are_the_logarithm_of_the_diagonal(entry, state):
    bijector, kwargs = built(entry.name, state), entry.kwargs()
    y, x = entry.data(), entry.latent()
    size = int(np.prod(entry.data_shape))
    latent, data = np.arange(size), entry.move(np.arange(size).reshape([1, *entry.data_shape])).ravel()

    matrix = jacobian(bijector.inverse, y, **kwargs)
    expected = np.empty([len(matrix), size])
    expected[:, data] = np.log(np.abs(matrix[:, latent, data]))
    assert_close(bijector.inverse_log_det_per_dim(y, **kwargs).numpy().reshape(expected.shape), expected)

    matrix = jacobian(bijector.forward, x, **kwargs)
    expected = np.log(np.abs(matrix[:, data, latent]))
    assert_close(bijector.forward_log_det_per_dim(x, **kwargs).numpy().reshape(expected.shape), expected)


@every_entry
def test_transport_moves_numbers_as_the_bijector_moves_dimensions(entry):
    bijector = built(entry.name, "large")
    in_data = normal([3, *entry.data_shape], 7)
    in_latent = entry.move(in_data.numpy())
    assert_close(dimflows.bijectors.per_dimension.transport_inverse(bijector, in_data), in_latent, 0.0)
    assert_close(dimflows.bijectors.per_dimension.transport_forward(bijector, tf.constant(in_latent)), in_data, 0.0)


@entries(lambda entry: entry.name.startswith("squeeze"))
def test_a_pure_movement_moves_values_as_it_moves_contributions(entry):
    bijector, y = built(entry.name, "initial"), entry.data()
    assert_close(bijector.inverse(y), entry.move(y.numpy()), 0.0)
    assert_close(bijector.forward(tf.constant(entry.move(y.numpy()))), y, 0.0)


def test_squeeze_orders_on_colour_channels():
    # Both orders, written out for two colours of a single 2x2 block: colour * 10 + position.
    block = tf.constant([[[0.0, 10.0], [1.0, 11.0]], [[2.0, 12.0], [3.0, 13.0]]])
    assert_close(dfb.Squeeze().inverse(block).numpy().ravel(), [0, 1, 2, 3, 10, 11, 12, 13])
    assert_close(dfb.Squeeze(order="position_major").inverse(block).numpy().ravel(), [0, 10, 1, 11, 2, 12, 3, 13])
    assert_close(dfb.Squeeze(order="position_major").inverse(block), tf.nn.space_to_depth(block[tf.newaxis], 2)[0])


@pytest.mark.parametrize("part", ["log_det", "hook"])
def test_contributions_at_a_positive_scale_have_the_sign_of_the_data_to_latent_direction(part):
    # exp(1) from data to latent: +1, so that a sign error in both directions at once cannot hide.
    flows = [
        dfb.ElementwiseAffine(tf.zeros([4]), tf.ones([4])),
        dfb.AffineCoupling(lambda x: tf.tile([[0.0, 1.0]], [1, 2]), dfb.masks.Channel(event_ndims=1), "exp"),
        dfb.Chain([tfb.Scale(tf.exp(-1.0))]),
        dfb.Multiscale([tfb.Scale(tf.exp(-1.0)), tfb.Identity()], dfb.DimensionFactorization.channels([4], 2)),
        tfb.Invert(dfb.ElementwiseAffine(tf.zeros([4]), -tf.ones([4]))),
    ]
    y = tf.ones([1, 4])
    transformed = [4, 2, 4, 4, 4]
    for flow, count in zip(flows, transformed):
        if part == "log_det":
            inverse, forward = flow.inverse_log_det_jacobian(y, 1), flow.forward_log_det_jacobian(y, 1)
        else:
            inverse = tf.reduce_sum(dimflows.inverse_log_det_per_dim(flow, y), -1)
            forward = tf.reduce_sum(dimflows.forward_log_det_per_dim(flow, y), -1)
        assert_close(tf.broadcast_to(inverse, [1]), [count], 1e-6)
        assert_close(tf.broadcast_to(forward, [1]), [-count], 1e-6)


# Masks and errors.


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_splits_an_event_in_two_and_joins_it(name):
    mask, shape = MASKS[name][0](), MASKS[name][1]
    ids = 1.0 + tf.reshape(tf.range(np.prod(shape), dtype="float64"), [1, *shape])
    conditioning, transformed = mask.split(ids)
    where = conditions(mask, shape)
    expected = ids.numpy()[0][where].ravel(), ids.numpy()[0][~where].ravel()
    for part, numbers in zip((conditioning, transformed), expected):
        assert [i for i in part.numpy().ravel() if i] == numbers.tolist()
    assert_close(mask.join(conditioning, transformed), ids, 0.0)
    if mask.event_ndims == 3 and isinstance(mask, dfb.masks.Checkerboard):
        assert conditioning.shape == transformed.shape == ids.shape
    assert mask.sizes(shape[-1]) == (conditioning.shape[-1], transformed.shape[-1])
    if not getattr(mask, "num_conditioning", None):
        swapped = mask.complement().split(ids)
        assert_close(swapped[0], transformed, 0.0)
        assert_close(swapped[1], conditioning, 0.0)


@pytest.mark.parametrize("name", MASKS)
def test_the_network_sees_only_the_conditioning_part(name):
    mask, shape = MASKS[name][0](), MASKS[name][1]
    seen = []

    def network(x):
        seen.append(x.numpy())
        return tf.zeros([*x.shape[:-1], mask.sizes(shape[-1])[1]], x.dtype)

    coupling = dfb.AdditiveCoupling(network, mask)
    y, where = normal([2, *shape], 1), conditions(mask, shape)
    coupling.inverse(y)
    coupling.inverse(tf.where(where, y, y + 1.0))
    assert_close(seen[0], seen[1], 0.0)
    assert np.count_nonzero(seen[0]) == 2 * where.sum()


@pytest.mark.parametrize("name", ["checkerboard", "checkerboard_odd"])
def test_what_the_network_says_of_pixels_that_are_not_transformed_does_no_harm(name):
    mask, shape = MASKS[name][0](), MASKS[name][1]
    where = np.repeat(conditions(mask, shape), 2, axis=-1)
    weight = tf.Variable(tf.constant(0.5, tf.float64))
    coupling = dfb.AffineCoupling(lambda x: weight * tf.where(where, 1e4, tf.repeat(x, 2, axis=-1)), mask, "exp")
    y = normal([2, *shape], 1)
    with tf.GradientTape() as tape:
        log_prob = distribution(coupling, shape).log_prob(y)
    assert np.isfinite(log_prob).all() and np.isfinite(tape.gradient(log_prob, weight))
    assert_close(coupling.forward(fresh(coupling.inverse(y))), y)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: dfb.ActNorm(3).inverse(tf.ones([1, 2])), ValueError, "actnorm: got 2 channels, has parameters for 3"),
        (lambda: dfb.ActNorm(3).forward(tf.ones([1, 2])), ValueError, "actnorm: got 2 channels, has parameters for 3"),
        (lambda: dfb.InvertibleConv1x1(3).inverse(tf.ones([1, 2])), ValueError, "got 2 channels, is for 3"),
        (lambda: dfb.InvertibleConv1x1(3, attribution="qr"), ValueError, "got attribution='qr', needs one of"),
        (lambda: dfb.LogitPreprocess(1), ValueError, "got levels=1, alpha=0.05, needs levels >= 2"),
        (lambda: dfb.LogitPreprocess(256, alpha=0.5), ValueError, "alpha=0.5, needs levels >= 2 and 0 <= alpha < 0.5"),
        (lambda: dfb.Squeeze(order="rows"), ValueError, "Squeeze: got order='rows'"),
        (lambda: dfb.Squeeze(factor=0), ValueError, "Squeeze: got factor=0, needs a positive integer"),
        (lambda: dfb.Squeeze().inverse(tf.ones([7, 4, 1])), ValueError, "height 7 is not divisible by factor 2"),
        (lambda: dfb.Squeeze(3).inverse(tf.ones([6, 4, 1])), ValueError, "width 4 is not divisible by factor 3"),
        (lambda: dfb.Squeeze().forward(tf.ones([2, 2, 6])), ValueError, "6 channels are not divisible by .* 4"),
        (lambda: dfb.masks.Checkerboard(2), ValueError, "Checkerboard: got parity=2, needs 0 or 1"),
        (lambda: dfb.masks.Columns(-1), ValueError, "Columns: got parity=-1, needs 0 or 1"),
        (lambda: dfb.masks.Columns().split(tf.ones([1, 2, 3, 1])), ValueError, "width 3 is not divisible by 2"),
        (lambda: dfb.masks.Channel(event_ndims=2), ValueError, "Channel: got event_ndims=2, needs 1"),
        (lambda: dfb.masks.Channel().split(tf.ones([1, 2, 2, 3])), ValueError, "3 channels are not divisible into"),
        (lambda: dfb.masks.Channel(num_conditioning=3).sizes(3), ValueError, "num_conditioning=3 of 3 channels"),
        (lambda: dfb.masks.Channel(num_conditioning=1).complement(), ValueError, "is not unique"),
        (lambda: dfb.masks.Index([0, 0], 3), ValueError, r"got indices \[0, 0\], needs distinct numbers below 3"),
        (lambda: dfb.masks.Index([0, 3], 3), ValueError, r"got indices \[0, 3\], needs distinct numbers below 3"),
        (lambda: dfb.masks.Index([0, 1], 3).split(tf.ones([1, 4])), ValueError, "got a vector of 4 .* is for 3"),
        (lambda: dfb.transformers.Affine("cube"), ValueError, "Affine: got log_scale='cube', needs one of"),
        (lambda: dfb.AdditiveCoupling("network", dfb.masks.Channel()), TypeError, "got 'network', needs a callable"),
        (
            lambda: dfb.AdditiveCoupling(lambda x: x[..., :1], dfb.masks.Channel(event_ndims=1)).inverse(tf.ones([1, 4])),
            ValueError,
            r"additive_coupling: the network returned parameters of shape \(1, 1\) .* needs 1 per entry: a last axis of 2",
        ),
    ],
)
def test_errors_name_the_object_and_what_it_got(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Data-dependent initialisation.


@pytest.mark.parametrize("direction", ["inverse", "forward"])
def test_adaptation_normalises_what_a_pass_returns(direction):
    flow = dfb.Chain(
        [dfb.ActNorm(2, 3.0, "float64"), dfb.InvertibleConv1x1(2, dtype="float64"), dfb.ActNorm(2, dtype="float64")]
    )
    data = 5.0 + 3.0 * normal([50, 2, 2, 2], 1)
    before = getattr(flow, direction)(data)
    with dimflows.adaptation():
        adapted = getattr(flow, direction)(data)
    for result in (adapted, getattr(flow, direction)(data), getattr(flow, direction)(fresh(data))):
        assert_close(np.mean(result, axis=(0, 1, 2)), [0.0, 0.0])
        assert_close(np.std(result, axis=(0, 1, 2)), [1.0, 1.0])
    assert np.abs(before - adapted).max() > 1.0


def test_only_adaptation_initialises_and_a_constant_channel_keeps_its_scale():
    actnorm = dfb.ActNorm(2, dtype="float64")
    data = tf.stack([tf.fill([4], tf.constant(7.0, tf.float64)), normal([4], 1)], axis=-1)
    assert_close(actnorm.inverse(data), data)
    with dimflows.adaptation():
        adapted = actnorm.inverse(data)
    assert_close(adapted[:, 0], np.zeros(4))
    assert_close(actnorm.inverse_log_det_per_dim(data)[0, 0], 0.0)
    with pytest.raises(RuntimeError, match="must run eagerly"):

        @tf.function(autograph=False)
        def traced():
            with dimflows.adaptation():
                return actnorm.inverse(data)

        traced()


# Variables.


@every_entry
def test_every_trainable_variable_is_tracked(entry):
    bijector, created = build(entry, "initial")
    tracked = {id(v) for v in bijector.trainable_variables}
    assert {v.name for v in created if id(v) not in tracked} == set()
    assert len(tracked) == len(created)


@entries(lambda entry: build(entry, "initial")[1])
@states
@pytest.mark.parametrize("direction", ["log_prob", "sample"])
def test_every_trainable_variable_has_a_gradient(entry, state, direction):
    bijector, created = build(entry, state)
    kwargs = entry.kwargs([5])
    flow = distribution(bijector, shapes(entry)[1])
    y, x = entry.data([5]), entry.latent([5])
    with tf.GradientTape() as tape:
        if direction == "log_prob":
            loss = tf.reduce_sum(flow.log_prob(y, bijector_kwargs=kwargs))
        else:
            loss = tf.reduce_sum(normal(y.shape, 8) * bijector.forward(x, **kwargs))
    for v, gradient in zip(created, tape.gradient(loss, created)):
        assert gradient is not None, v.name
        assert np.isfinite(gradient).all(), v.name
        assert np.abs(gradient).max() > 0 or any(v.name.startswith(name) for name in entry.silent), v.name


@pytest.mark.parametrize("holder", ["function", "module", "partial", "method", "transformer"])
def test_variables_behind_a_function_are_tracked_and_never_stale(holder):
    network = Mixer([3], [3], 4)
    variables = [v.value for v in network.trainable_variables]

    class Wrapper(tf.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def __call__(self, x):
            return self.inner(x)

    def scaled(scale, x):
        return scale * network(x)

    offset = tf.Variable(tf.constant(0.5, tf.float64))
    shift = dfb.Transformer(lambda params: tfb.Shift(params[..., 0]), 1)
    if holder == "transformer":
        variables = [offset]
        function, shift = tf.identity, dfb.Transformer(lambda params: tfb.Shift(offset * params[..., 0]), 1)
    elif holder == "function":

        def function(x):
            return network(x)

    else:
        function = {
            "module": Wrapper(),
            "partial": functools.partial(scaled, 2.0),
            "method": Wrapper().__call__,
        }[holder]
    coupling = dfb.Coupling(function, dfb.masks.Channel(event_ndims=1), shift)
    tracked = {id(v) for v in coupling.trainable_variables}
    assert {v.name for v in variables if id(v) not in tracked} == set()
    y = normal([2, 6], 1)
    before = coupling.inverse(y)
    randomize(variables)
    assert_close(coupling.inverse(y), coupling.inverse(fresh(y)))
    assert np.abs(before - coupling.inverse(y)).max() > 1e-3


# Modes of execution, shapes and dtypes.


def both_directions(bijector, entry):
    """A function of y, x and the condition that returns everything the bijector computes."""

    def function(y, x, **kwargs):
        pairs = [
            (bijector.inverse(y, **kwargs), log_det("inverse", bijector, y, entry, **kwargs)),
            (bijector.forward(x, **kwargs), log_det("forward", bijector, x, entry, **kwargs)),
        ]
        return [result for pair in pairs for result in pair]

    return function


@every_entry
def test_traced_with_unknown_batch_size_equals_eager(entry):
    bijector = built(entry.name, "large")
    data_shape, latent_shape = shapes(entry)
    seen = []

    def function(y, x, **kwargs):
        results = [
            *both_directions(bijector, entry)(y, x, **kwargs),
            bijector.inverse_log_det_per_dim(y, **kwargs),
            bijector.forward_log_det_per_dim(x, **kwargs),
        ]
        seen.append([r.shape[1:] for r in results])
        return results

    arguments = {"y": entry.data([3]), "x": entry.latent([3]), **entry.kwargs([3])}
    traced = tf.function(function, autograph=False)
    specs = {k: tf.TensorSpec([None, *v.shape[1:]], v.dtype) for k, v in arguments.items()}
    concrete = traced.get_concrete_function(**specs)
    assert seen == [[latent_shape, (), data_shape, (), data_shape, latent_shape]]
    for actual, expected in zip(concrete(**arguments), function(**arguments)):
        assert_close(actual, expected)


@entries(lambda entry: entry.xla)
def test_xla_equals_eager(entry):
    bijector = built(entry.name, "large")
    arguments = {"y": entry.data([3]), "x": entry.latent([3]), **entry.kwargs([3])}
    function = both_directions(bijector, entry)
    compiled = tf.function(function, autograph=False, jit_compile=True)
    for actual, expected in zip(compiled(**arguments), function(**arguments)):
        assert_close(actual, expected)


@every_entry
def test_batch_shapes_are_equivalent(entry):
    bijector = built(entry.name, "large")
    kwargs = entry.kwargs([2, 3])
    functions = [
        (bijector.inverse, entry.data([2, 3])),
        (lambda y, **k: log_det("inverse", bijector, y, entry, **k), entry.data([2, 3])),
        (bijector.inverse_log_det_per_dim, entry.data([2, 3])),
        (bijector.forward, entry.latent([2, 3])),
        (lambda x, **k: log_det("forward", bijector, x, entry, **k), entry.latent([2, 3])),
        (bijector.forward_log_det_per_dim, entry.latent([2, 3])),
    ]
    for function, value in functions:
        whole = function(value, **kwargs)
        for i in range(2):
            rows = function(value[i], **{k: c[i] for k, c in kwargs.items()})
            single = function(value[i, 2], **{k: c[i, 2] for k, c in kwargs.items()})
            assert rows.shape == whole.shape[1:] and single.shape == whole.shape[2:]
            assert_close(rows, whole[i])
            assert_close(single, whole[i, 2])


@every_entry
def test_event_shapes_are_those_of_the_values(entry):
    bijector = built(entry.name, "initial")
    data_shape, latent_shape = shapes(entry)
    assert bijector.inverse_event_shape(data_shape) == latent_shape
    assert bijector.forward_event_shape(latent_shape) == data_shape
    assert tuple(bijector.inverse_event_shape_tensor(list(data_shape)).numpy()) == latent_shape
    assert tuple(bijector.forward_event_shape_tensor(list(latent_shape)).numpy()) == data_shape


@every_entry
def test_a_distribution_samples_and_scores_events(entry):
    bijector, kwargs = built(entry.name, "large"), entry.kwargs([5])
    flow = distribution(bijector, shapes(entry)[1])
    assert flow.event_shape == shapes(entry)[0] and flow.batch_shape == ()
    sample = flow.sample(5, seed=[1, 2], bijector_kwargs=kwargs)
    assert sample.shape == (5, *shapes(entry)[0])
    sample = fresh(sample)
    latent = bijector.inverse(sample, **kwargs).numpy().reshape(5, -1)
    ildj = log_det("inverse", bijector, sample, entry, **kwargs)
    expected = -0.5 * np.square(latent).sum(-1) - 0.5 * latent.shape[-1] * np.log(2 * np.pi) + ildj.numpy()
    assert_close(flow.log_prob(fresh(sample), bijector_kwargs=kwargs), expected)


@every_entry
def test_float32_agrees_with_float64(entry):
    single, double = built(entry.name, "initial", "float32"), built(entry.name, "initial")
    for direction, value in (("inverse", entry.data()), ("forward", entry.latent())):
        kwargs = entry.kwargs()
        cast = {k: tf.cast(c, "float32") for k, c in kwargs.items()}
        result = getattr(single, direction)(tf.cast(value, "float32"), **cast)
        hook = getattr(single, f"{direction}_log_det_per_dim")(tf.cast(value, "float32"), **cast)
        assert result.dtype == hook.dtype == tf.float32
        assert_close(result, getattr(double, direction)(value, **kwargs), 2e-4)
        assert_close(hook, getattr(double, f"{direction}_log_det_per_dim")(value, **kwargs), 2e-4)


@entries(lambda entry: entry.half)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_log_dets_of_low_precision_values_are_float32(entry, dtype):
    bijector = built(entry.name, "initial", "float32")
    kwargs = {k: tf.cast(c, dtype) for k, c in entry.kwargs(dtype="float32").items()}
    exact = {k: tf.cast(c, "float32") for k, c in kwargs.items()}
    y, x = tf.cast(entry.data(), dtype), tf.cast(entry.latent(), dtype)
    assert bijector.inverse(y, **kwargs).dtype == bijector.forward(x, **kwargs).dtype == y.dtype
    expected = log_dets(bijector, tf.cast(y, "float32"), tf.cast(x, "float32"), entry, **exact)
    hooks = bijector.inverse_log_det_per_dim(y, **kwargs), bijector.forward_log_det_per_dim(x, **kwargs)
    for actual, hook, precise in zip(log_dets(bijector, y, x, entry, **kwargs), hooks, expected):
        assert actual.dtype == hook.dtype == tf.float32
        np.testing.assert_allclose(actual, precise, rtol=0.05, atol=0.3)


def test_low_precision_values_pass_levels_of_tfp():
    factorization = dfb.DimensionFactorization.channels([4], 2)
    flow = dfb.Multiscale([dfb.ActNorm(4), tfb.Exp()], factorization)
    y = tf.constant([[0.5, 0.25, 1.0, 2.0]], "bfloat16")
    ildj, hook = flow.inverse_log_det_jacobian(y, 1), flow.inverse_log_det_per_dim(y)
    assert ildj.dtype == hook.dtype == tf.float32
    expected = -np.log([0.5, 0.25])
    np.testing.assert_allclose(hook[0], [*expected, 0.0, 0.0], atol=0.02)
    np.testing.assert_allclose(ildj, [expected.sum()], atol=0.02)


# Conditions and other keyword arguments.


@entries(lambda entry: entry.condition_shape)
def test_the_condition_changes_the_result_and_broadcasts(entry):
    bijector = built(entry.name, "large")
    for direction, value in (("inverse", entry.data([2, 3])), ("forward", entry.latent([2, 3]))):
        function = getattr(bijector, direction)
        one, other = entry.kwargs([1, 3])["condition"], entry.kwargs([1, 3], seed=9)["condition"]
        full = tf.tile(one, [2] + [1] * (one.shape.rank - 1))
        assert_close(function(value, condition=one), function(fresh(value), condition=full))
        assert np.abs(function(value, condition=one) - function(value, condition=other)).max() > 1e-3
        ldj = getattr(bijector, f"{direction}_log_det_jacobian")
        ndims = len(shapes(entry)[direction == "forward"])
        assert_close(ldj(value, ndims, condition=other), ldj(fresh(value), ndims, condition=fresh(other)))


@entries(lambda entry: not (entry.condition_shape or entry.open_to_conditions))
@pytest.mark.parametrize("method", ["inverse", "inverse_log_det_jacobian", "inverse_log_det_per_dim"])
def test_a_condition_that_nothing_can_use_is_an_error(entry, method):
    bijector = built(entry.name, "initial")
    with pytest.raises(ValueError, match=f"{bijector.name}: got a condition, but no part"):
        getattr(bijector, method)(entry.data(), condition=tf.ones([2, 3]))


@every_entry
@pytest.mark.parametrize("method", ["forward", "forward_log_det_jacobian", "forward_log_det_per_dim"])
def test_an_unknown_keyword_argument_is_an_error(entry, method):
    bijector = built(entry.name, "initial")
    with pytest.raises(TypeError, match=rf"{bijector.name}: got unexpected keyword arguments \['conditoin'\]"):
        getattr(bijector, method)(entry.latent(), conditoin=tf.ones([2, 3]))


def test_a_missing_condition_is_an_error_where_one_is_needed():
    entry = ENTRIES["conditional_transform_vector"]
    with pytest.raises(ValueError, match="conditional_transform: got no condition, needs one"):
        built(entry.name, "initial").inverse(entry.data())


def conditional_coupling(seed=0, name="coupling"):
    mask = dfb.masks.Channel(event_ndims=1, flip=bool(seed % 2))
    network = ConditionalMixer([2], [4], [3], seed)
    return dfb.Coupling(network, mask, dfb.transformers.Affine("exp"), name=name)


def test_a_condition_reaches_every_part_of_nested_composites():
    parts = [conditional_coupling(k, f"part{k}") for k in range(4)]
    nested = dfb.Chain([parts[0], tfb.Invert(parts[1]), tfb.Chain([parts[2], tfb.Chain([parts[3]])]), dfb.ActNorm(4)])
    y, condition = normal([2, 4], 1), normal([2, 3], 2)
    x = parts[1].forward(parts[0].inverse(y, condition=condition), condition=condition)
    x = parts[3].inverse(parts[2].inverse(fresh(x), condition=condition), condition=condition)
    assert_close(nested.inverse(y, condition=condition), x)
    for part in range(4):
        changed = dfb.Chain([p if k != part else tfb.Identity() for k, p in enumerate(parts)])
        assert np.abs(changed.inverse(y, condition=condition) - x).max() > 1e-3


def test_chain_routes_other_keyword_arguments_by_name():
    first, second = conditional_coupling(0, "first"), conditional_coupling(1, "second")
    flow = dfb.Chain([first, second])
    y, one, other = normal([2, 4], 1), normal([2, 3], 2), normal([2, 3], 3)
    expected = second.inverse(first.inverse(y, condition=one), condition=other)
    assert_close(flow.inverse(y, first={"condition": one}, second={"condition": other}), expected)
    assert_close(flow.inverse(y, condition=one, second={"condition": other}), expected)
    routed = {"first": {"condition": one}, "second": {"condition": other}}
    assert_close(
        flow.inverse_log_det_jacobian(y, 1, **routed), tfb.Chain([first, second]).inverse_log_det_jacobian(y, 1, **routed)
    )
    assert_close(
        event_sum(flow.inverse_log_det_per_dim(y, **routed), [4]), flow.inverse_log_det_jacobian(fresh(y), 1, **routed)
    )


def test_a_condition_may_be_a_structure():
    def network(x, condition):
        return tf.repeat(x, 2, axis=-1) * condition["scale"] + condition["parts"][0]

    flow = dfb.Coupling(network, dfb.masks.Channel(event_ndims=1), dfb.transformers.Affine("exp"))
    y = normal([5, 2, 4], 1)
    condition = {"scale": normal([1, 2, 1], 2), "parts": [normal([5, 1, 4], 3)]}
    x = flow.inverse(y, condition=condition)
    params = np.repeat(y[..., :2], 2, axis=-1) * condition["scale"].numpy() + condition["parts"][0].numpy()
    assert_close(x[..., 2:], (y[..., 2:] + params[..., 0::2]) * np.exp(params[..., 1::2]))
    assert_close(flow.forward(fresh(x), condition=condition), y)


def functional(seed):
    """A Keras functional model with two inputs."""
    x, c = keras.Input([2], dtype="float64"), keras.Input([3], dtype="float64")
    layers = [
        keras.layers.Dense(4, dtype="float64", kernel_initializer=keras.initializers.RandomNormal(seed=seed + i))
        for i in (0, 1)
    ]
    return keras.Model([x, c], keras.layers.Add(dtype="float64")([layers[0](x), layers[1](c)]))


@pytest.mark.parametrize("convention", ["keyword", "positional", "list"])
def test_ways_in_which_a_network_takes_its_condition(convention):
    kernel = normal([3, 4], 4)
    network = {
        "keyword": lambda x, *, condition=None: tf.repeat(x, 2, axis=-1) + condition @ kernel,
        "positional": lambda x, c: tf.repeat(x, 2, axis=-1) + c @ kernel,
        "list": functional(0),
    }[convention]
    flow = dfb.Coupling(network, dfb.masks.Channel(event_ndims=1), dfb.transformers.Affine("exp"))
    y, condition = normal([2, 4], 1), normal([2, 3], 2)
    if convention == "list":
        params = network([y[:, :2], condition]).numpy()
    else:
        params = np.repeat(y[:, :2], 2, axis=-1) + condition.numpy() @ kernel.numpy()
    assert_close(flow.inverse_log_det_per_dim(y, condition=condition)[:, 2:], params[:, 1::2])


# Composition with TFP.


@every_entry
def test_nesting_in_tfp_composites_equals_direct_use(entry):
    bijector, kwargs = built(entry.name, "large"), entry.kwargs()
    y, x = entry.data(), entry.latent()
    routed = {bijector.name: kwargs} if kwargs else {}
    chained, inverted = tfb.Chain([bijector]), tfb.Invert(bijector)
    ildj, fldj = log_dets(bijector, y, x, entry, **kwargs)
    direct = bijector.inverse(y, **kwargs), bijector.forward(x, **kwargs)
    data_shape, latent_shape = shapes(entry)
    assert_close(chained.inverse(fresh(y), **routed), direct[0])
    assert_close(chained.forward(fresh(x), **routed), direct[1])
    assert_close(inverted.forward(fresh(y), **kwargs), direct[0])
    assert_close(inverted.inverse(fresh(x), **kwargs), direct[1])
    assert_close(chained.inverse_log_det_jacobian(fresh(y), len(data_shape), **routed), ildj)
    assert_close(chained.forward_log_det_jacobian(fresh(x), len(latent_shape), **routed), fldj)
    assert_close(inverted.forward_log_det_jacobian(fresh(y), len(data_shape), **kwargs), ildj)
    assert_close(inverted.inverse_log_det_jacobian(fresh(x), len(latent_shape), **kwargs), fldj)
    hooks = bijector.inverse_log_det_per_dim(y, **kwargs), bijector.forward_log_det_per_dim(x, **kwargs)
    assert_close(dimflows.inverse_log_det_per_dim(chained, y, **routed), hooks[0])
    assert_close(dimflows.forward_log_det_per_dim(chained, x, **routed), hooks[1])
    assert_close(dimflows.inverse_log_det_per_dim(inverted, x, **kwargs), hooks[1])
    assert_close(dimflows.forward_log_det_per_dim(inverted, y, **kwargs), hooks[0])


@every_entry
def test_our_chain_of_one_equals_its_part(entry):
    bijector, kwargs = built(entry.name, "large"), entry.kwargs()
    y, x = entry.data(), entry.latent()
    chain = dfb.Chain([bijector])
    assert_close(chain.inverse(y, **kwargs), bijector.inverse(y, **kwargs))
    assert_close(chain.forward(x, **kwargs), bijector.forward(x, **kwargs))
    for actual, expected in zip(log_dets(chain, y, x, entry, **kwargs), log_dets(bijector, y, x, entry, **kwargs)):
        assert_close(actual, expected)
    assert_close(chain.inverse_log_det_per_dim(y, **kwargs), bijector.inverse_log_det_per_dim(y, **kwargs))
    assert_close(chain.forward_log_det_per_dim(x, **kwargs), bijector.forward_log_det_per_dim(x, **kwargs))


def test_a_chain_of_nothing_is_the_identity():
    chain, y = dfb.Chain([]), normal([2, 3], 1)
    assert_close(chain.forward(chain.inverse(y)), y)
    assert_close(chain.inverse_log_det_per_dim(y), np.zeros([2, 3]))
    assert_close(tf.broadcast_to(chain.inverse_log_det_jacobian(y, 1), [2]), np.zeros([2]))
    assert_close(tf.broadcast_to(chain.forward_log_det_jacobian(fresh(y), 1), [2]), np.zeros([2]))


@every_entry
def test_a_copy_is_another_bijector_of_the_same_kind(entry):
    bijector, kwargs = build(entry, "initial")[0], entry.kwargs()
    y = entry.data()
    copy = bijector.copy(name="another")
    assert type(copy) is type(bijector) and copy.name == "another" and copy != bijector
    assert_close(copy.inverse(y, **kwargs), bijector.inverse(y, **kwargs))
    assert_close(copy.inverse_log_det_per_dim(y, **kwargs), bijector.inverse_log_det_per_dim(y, **kwargs))


# One evaluation of the network, never a stale one.


class Counted(Mixer):
    """A network that counts its evaluations."""

    calls = 0

    def call(self, x):
        """The parameters."""
        self.calls += 1
        return super().call(x)


def counted_coupling(seed=0):
    network = Counted([2], [4], seed)
    return dfb.AffineCoupling(network, dfb.masks.Channel(event_ndims=1), "exp"), network


def counted_flow(kind):
    """A flow of four dimensions, and the networks in it."""
    first, second = counted_coupling(0), counted_coupling(1)
    small = Counted([1], [2], 2)
    flow = {
        "alone": lambda: first[0],
        "dfb.Chain": lambda: dfb.Chain([first[0], dfb.ActNorm(4, dtype="float64"), second[0]]),
        "tfb.Chain": lambda: tfb.Chain([first[0], tfb.Permute([2, 3, 0, 1]), second[0]]),
        "nested": lambda: tfb.Chain([dfb.Chain([tfb.Chain([first[0]]), tfb.Permute([2, 3, 0, 1])]), second[0]]),
        "tfb.Invert": lambda: tfb.Invert(first[0]),
        "dfb.Multiscale": lambda: dfb.Multiscale(
            [dfb.Chain([first[0], second[0]]), dfb.AffineCoupling(small, dfb.masks.Channel(event_ndims=1), "exp")],
            dfb.DimensionFactorization.channels([4], 2),
        ),
    }[kind]()
    networks = {"alone": [first[1]], "tfb.Invert": [first[1]], "dfb.Multiscale": [first[1], second[1], small]}
    return flow, networks.get(kind, [first[1], second[1]])


KINDS = ["alone", "dfb.Chain", "tfb.Chain", "nested", "tfb.Invert", "dfb.Multiscale"]

OPERATIONS = {
    "log_prob": lambda flow, b, v: flow.log_prob(v),
    "sample": lambda flow, b, v: flow.sample(3, seed=[1, 2]),
    "sample_and_log_prob": lambda flow, b, v: flow.experimental_sample_and_log_prob(3, seed=[1, 2]),
    "log_prob_of_a_sample": lambda flow, b, v: flow.log_prob(flow.sample(3, seed=[1, 2])),
    "inverse_pair": lambda flow, b, v: (b.inverse(v), b.inverse_log_det_jacobian(v, 1)),
    "forward_pair": lambda flow, b, v: (b.forward(v), b.forward_log_det_jacobian(v, 1)),
    "inverse_log_det": lambda flow, b, v: b.inverse_log_det_jacobian(v, 1),
    "gradient": lambda flow, b, v: _gradient_step(flow, b, v),
}


def _gradient_step(flow, bijector, v):
    with tf.GradientTape() as tape:
        loss = -tf.reduce_mean(flow.log_prob(v))
    return tape.gradient(loss, bijector.trainable_variables)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_network_is_evaluated_once(kind, operation):
    flow, networks = counted_flow(kind)
    full = distribution(flow, [4])
    results = []
    for mode in ("eager", "traced"):
        function = lambda v: OPERATIONS[operation](full, flow, v)  # noqa: E731
        function = tf.function(function, autograph=False) if mode == "traced" else function
        for network in networks:
            network.calls = 0
        results.append(tf.nest.flatten(function(normal([3, 4], 1))))
        assert [network.calls for network in networks] == [1] * len(networks), mode
    for eager, traced in zip(*results):
        assert_close(traced, eager)


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("tfb") and k != "nested"])
def test_the_hook_evaluates_a_network_once(kind):
    flow, networks = counted_flow(kind)
    for hook, value in ((flow.inverse_log_det_per_dim, normal([3, 4], 1)), (flow.forward_log_det_per_dim, normal([3, 4], 2))):
        for network in networks:
            network.calls = 0
        assert np.isfinite(hook(value)).all()
        assert [network.calls for network in networks] == [1] * len(networks)


def stale_cases():
    """Orders of calls around an update: `(before, after)`, both of (bijector, y, x)."""
    calls = {
        "inverse": lambda b, y, x: b.inverse(y),
        "ildj": lambda b, y, x: b.inverse_log_det_jacobian(y, 1),
        "forward": lambda b, y, x: b.forward(x),
        "fldj": lambda b, y, x: b.forward_log_det_jacobian(x, 1),
        "hook": lambda b, y, x: b.inverse_log_det_per_dim(y),
    }
    pairs = [(a, c) for a in calls for c in calls if (a in ("forward", "fldj")) == (c in ("forward", "fldj"))]
    return [pytest.param(calls[a], calls[c], id=f"{a}-{c}") for a, c in pairs]


def updatable(kind):
    entry = {"coupling": "affine_coupling_sequential", "chain": "chain_vector", "multiscale": "multiscale_vector"}[kind]
    bijector, created = build(ENTRIES[entry], "initial")
    return bijector, created, ENTRIES[entry].data(), ENTRIES[entry].latent()


@pytest.mark.parametrize("kind", ["coupling", "chain", "multiscale"])
@pytest.mark.parametrize("before, after", stale_cases())
@pytest.mark.parametrize("mode", ["eager", "traced"])
def test_an_update_is_never_missed(kind, before, after, mode):
    bijector, created, y, x = updatable(kind)
    values = [tf.constant(2.0 * v.numpy() + 0.3) for v in created]

    def function(y, x):
        first = before(bijector, y, x)
        unchanged = after(bijector, y, x)
        for v, value in zip(created, values):
            v.assign(value)
        return first, unchanged, after(bijector, y, x)

    function = tf.function(function, autograph=False) if mode == "traced" else function
    _, unchanged, updated = function(y, x)
    expected = after(bijector, fresh(y), fresh(x))
    assert_close(updated, expected)
    assert np.abs(unchanged - expected).max() > 1e-3


def test_an_update_is_not_missed_on_the_other_side_of_a_pass():
    for kind in ("coupling", "chain", "multiscale"):
        bijector, created, y, _ = updatable(kind)
        x = bijector.inverse(y)
        bijector.inverse_log_det_jacobian(y, 1)
        randomize(created)
        assert_close(bijector.forward_log_det_jacobian(x, 1), bijector.forward_log_det_jacobian(fresh(x), 1))
        assert_close(bijector.forward(x), bijector.forward(fresh(x)))
        assert np.abs(bijector.forward(x) - y).max() > 1e-3


@pytest.mark.parametrize("way", ["assign_add", "optimizer", "cond", "switch_case", "while", "function"])
def test_an_update_by_any_means_inside_a_function_is_not_missed(way):
    bijector = dfb.ActNorm(3, dtype="float64")
    (v,) = [v for v in bijector.variables if "scale" in v.name]
    v.assign([0.5, 1.0, 1.5])
    adopted = dimflows.keras_bridge.adopt(v)
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([adopted])

    def double():
        return v.assign(2.0 * v)

    updates = {
        "assign_add": lambda: v.assign_add(v),
        "optimizer": lambda: optimizer.apply([-v.read_value()], [adopted]),
        "cond": lambda: tf.cond(tf.reduce_sum(v) > 0.0, double, v.read_value),
        "switch_case": lambda: tf.switch_case(tf.cast(v[1], tf.int32), [v.read_value, double]),
        "while": lambda: tf.while_loop(lambda i: i < 1, lambda i: [tf.cast(double()[0], tf.int32) + 1], [0]),
        "function": tf.function(double),
    }

    @tf.function(autograph=False)
    def function(y):
        bijector.inverse(y)
        before = bijector.inverse_log_det_jacobian(y, 1)
        updates[way]()
        return before, bijector.inverse_log_det_jacobian(y, 1)

    before, after = function(normal([2, 3], 1))
    assert_close(tf.broadcast_to(before, [2]), [3.0, 3.0])
    assert_close(tf.broadcast_to(after, [2]), [6.0, 6.0])


def test_full_batch_eager_training_descends_on_the_right_gradients():
    # The same tensor at every step: a stale log-det would freeze part of the gradient.
    bijector, created, y, _ = updatable("chain")
    flow = distribution(bijector, [4])
    for _ in range(3):
        gradients = []
        for batch in (y, fresh(y)):
            with tf.GradientTape() as tape:
                loss = -tf.reduce_mean(flow.log_prob(batch))
            gradients.append(tape.gradient(loss, created))
        for repeated, recomputed in zip(*gradients):
            assert_close(repeated, recomputed)
        for v, gradient in zip(created, gradients[1]):
            v.assign_sub(0.05 * gradient)


@pytest.mark.parametrize("kind", ["coupling", "chain", "multiscale"])
@pytest.mark.parametrize("mode", ["eager", "traced"])
def test_samples_drawn_outside_a_tape_have_gradients_inside(kind, mode):
    bijector, created, _, x = updatable(kind)
    flow = distribution(bijector, x.shape[1:])

    def function():
        sample = flow.sample(3, seed=[1, 2])
        gradients = []
        for y in (sample, tf.identity(sample)):
            with tf.GradientTape() as tape:
                tape.watch(y)
                log_prob = tf.reduce_sum(flow.log_prob(y))
            gradients.append(tape.gradient(log_prob, [*created, y]))
        return gradients

    cached, recomputed = (tf.function(function, autograph=False) if mode == "traced" else function)()
    for actual, expected in zip(cached, recomputed):
        assert actual is not None
        assert_close(actual, expected)


def test_instances_with_equal_arguments_share_nothing():
    y = normal([2, 3], 1)
    first, second = dfb.ActNorm(3, dtype="float64"), dfb.ActNorm(3, dtype="float64")
    randomize(first.variables, 1)
    randomize(second.variables, 2)
    x, ildj = first.inverse(y), first.inverse_log_det_jacobian(y, 1)
    assert np.abs(second.inverse(y) - x).max() > 1e-3
    assert np.abs(second.inverse_log_det_jacobian(y, 1) - ildj).max() > 1e-3
    assert first != second and len({first, second}) == 2


def test_the_cache_tells_conditions_apart():
    coupling = conditional_coupling()
    y, one, other = normal([2, 4], 1), normal([2, 3], 2), normal([2, 3], 3)
    for condition in (one, other, one):
        x, ildj = coupling.inverse(y, condition=condition), coupling.inverse_log_det_jacobian(y, condition=condition)
        assert_close(x, coupling.inverse(fresh(y), condition=condition))
        assert_close(ildj, coupling.inverse_log_det_jacobian(fresh(y), condition=condition))
    assert np.abs(coupling.inverse(y, condition=one) - coupling.inverse(y, condition=other)).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_does_not_grow(kind):
    flow, _ = counted_flow(kind)
    full = distribution(flow, [4])
    sizes = []
    for step in range(6):
        full.log_prob(normal([3, 4], step))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(full.log_prob(full.sample(2)))
        tape.gradient(loss, flow.trainable_variables)
        del tape, loss
        sizes.append(len(dfb.FlowBijector._cache.storage))
    assert sizes[-1] <= sizes[1]
