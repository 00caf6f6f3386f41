"""What bijectors do beyond the contract: signs, masks, errors, adaptation, conditions."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import (
    ENTRIES,
    MASKS,
    Mixer,
    assert_close,
    built,
    conditional_coupling,
    conditions,
    dfb,
    dimflows,
    distribution,
    event_sum,
    fresh,
    jacobian,
    normal,
    randomize,
)

tfb = tfp.bijectors


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
        (lambda: dfb.Standardize(3).inverse(tf.ones([1, 2])), ValueError, "standardize: got 2 columns, has parameters for 3"),
        (lambda: dfb.Standardize(3, [None]), ValueError, "needs None or a pair of numbers for each of 3 columns"),
        (lambda: dfb.Standardize(2, [0.0, 1.0]), ValueError, "needs None or a pair of numbers for each of 2 columns"),
        (lambda: dfb.Standardize(1, [(0.0, np.inf)]), ValueError, "needs None or a pair of numbers for each of 1 columns"),
        (lambda: dfb.Standardize(1, []), ValueError, "needs None or a pair of numbers for each of 1 columns"),
        (lambda: dfb.Standardize(1, [(1.0, 1.0)]), ValueError, "got the bounds 1.0 and 1.0, needs the lower one first"),
        (lambda: dfb.InvertibleConv1x1(3).inverse(tf.ones([1, 2])), ValueError, "got 2 channels, is for 3"),
        (lambda: dfb.InvertibleConv1x1(3, attribution="qr"), ValueError, "got attribution='qr', needs one of"),
        (lambda: dfb.LogitPreprocess(1), ValueError, "got grey_levels=1, alpha=0.05, needs grey_levels >= 2"),
        (lambda: dfb.LogitPreprocess(256, alpha=0.5), ValueError, "alpha=0.5, needs grey_levels >= 2 and 0 <= alpha < 0.5"),
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
        (lambda: dfb.transformers.Affine("cube"), ValueError, "Affine: got scale='cube', needs one of"),
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


def test_standardisation_is_of_the_columns_that_bounds_have_opened():
    standardize = dfb.Standardize(4, [None, (2.0, None), (None, -1.0), (-1.0, 3.0)], tf.float64)
    u = normal([500, 4], 0) * [1.0, 0.5, 2.0, 1.5] + [100.0, 1.0, 2.0, 0.3]
    data = np.stack([u[:, 0], 2.0 + np.exp(u[:, 1]), -1.0 - np.exp(-u[:, 2]), -1.0 + 4.0 / (1.0 + np.exp(-u[:, 3]))], axis=1)
    assert not standardize.trainable_variables
    with dimflows.adaptation():
        adapted = standardize.inverse(data)
    assert_close(adapted, (u - np.mean(u, axis=0)) / np.std(u, axis=0))
    assert_close(standardize.inverse(data[:3]), adapted[:3])
    assert_close(standardize.forward(fresh(adapted)), data)
    expected = np.log(np.diagonal(jacobian(standardize.inverse, tf.constant(data[:5])), axis1=1, axis2=2))
    assert np.abs(expected).min() > 1e-3
    assert_close(standardize.inverse_log_det_per_dim(data[:5]), expected)
    ends = standardize.forward(tf.constant([[-40.0] * 4, [40.0] * 4], tf.float64)).numpy()
    assert (ends[:, 1] >= 2.0).all() and (ends[:, 2] <= -1.0).all() and (np.abs(ends[:, 3] - 1.0) <= 2.0).all()
    x = tf.Variable([[-900.0, 0.0, 0.0, -900.0], [900.0, 0.0, 0.0, 900.0]], dtype=tf.float64)
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(standardize.forward(x))
    assert np.isfinite(tape.gradient(total, x)).all()


def test_standardisation_of_a_constant_column_and_of_data_beyond_the_bounds():
    standardize = dfb.Standardize(2, [None, (0.0, None)])
    with dimflows.adaptation():
        assert_close(standardize.inverse([[3.0, 1.0], [3.0, np.e]]), [[0.0, -1.0], [0.0, 1.0]], 1e-6)
    assert_close(standardize.inverse_log_det_per_dim([[3.0, 1.0]]), [[0.0, np.log(2.0)]], 1e-6)
    with dimflows.adaptation(), pytest.raises(tf.errors.InvalidArgumentError, match="standardize: got data that is not finite"):
        standardize.inverse([[3.0, 1.0], [3.0, 0.0]])
    assert_close(standardize.inverse([[3.0, 1.0]]), [[0.0, -1.0]], 1e-6)


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


def test_low_precision_values_pass_levels_of_tfp():
    factorization = dfb.DimensionFactorization.channels([4], 2)
    flow = dfb.Multiscale([dfb.ActNorm(4), tfb.Exp()], factorization)
    y = tf.constant([[0.5, 0.25, 1.0, 2.0]], "bfloat16")
    ildj, hook = flow.inverse_log_det_jacobian(y, 1), flow.inverse_log_det_per_dim(y)
    assert ildj.dtype == hook.dtype == tf.float32
    expected = -np.log([0.5, 0.25])
    np.testing.assert_allclose(hook[0], [*expected, 0.0, 0.0], atol=0.02)
    np.testing.assert_allclose(ildj, [expected.sum()], atol=0.02)


def test_a_missing_condition_is_an_error_where_one_is_needed():
    entry = ENTRIES["conditional_transform_vector"]
    with pytest.raises(ValueError, match="conditional_transform: got no condition, needs one"):
        built(entry.name, "initial").inverse(entry.data())


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


def test_a_chain_of_nothing_is_the_identity():
    chain, y = dfb.Chain([]), normal([2, 3], 1)
    assert_close(chain.forward(chain.inverse(y)), y)
    assert_close(chain.inverse_log_det_per_dim(y), np.zeros([2, 3]))
    assert_close(tf.broadcast_to(chain.inverse_log_det_jacobian(y, 1), [2]), np.zeros([2]))
    assert_close(tf.broadcast_to(chain.forward_log_det_jacobian(fresh(y), 1), [2]), np.zeros([2]))


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_arguments_by_name_reach_parts_of_nested_chains_in_graphs(memory):
    first, second = conditional_coupling(0, "first"), conditional_coupling(1, "second")
    flow = dfb.Chain([dfb.Chain([first, second], name="inner")], memory=memory)
    y, one, other = normal([2, 4], 1), normal([2, 3], 2), normal([2, 3], 3)
    inner = {"first": {"condition": one}, "second": {"condition": other}}
    expected = second.inverse(first.inverse(y, condition=one), condition=other)
    traced = tf.function(lambda y: (flow.inverse(y, inner=inner), flow.inverse_log_det_jacobian(y, 1, inner=inner)))
    assert_close(traced(y)[0], expected)
    assert_close(traced(y)[1], tfb.Chain([first, second]).inverse_log_det_jacobian(fresh(y), 1, **inner))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parameters_of_low_precision_values_keep_their_digits(dtype):
    log_scale = 0.1234567
    network = lambda x: tf.constant([[0.0, log_scale, 0.0, log_scale]])  # noqa: E731
    coupling = dfb.AffineCoupling(network, dfb.masks.Channel(event_ndims=1), "exp")
    y = tf.constant([[1.0, 2.0, 3.0, 4.0]], dtype)
    assert_close(coupling.inverse_log_det_per_dim(y), [[0.0, 0.0, log_scale, log_scale]], 1e-7)
    assert_close(coupling.inverse_log_det_jacobian(y, 1), [2.0 * log_scale], 1e-7)


def test_the_old_name_of_uses_condition_is_an_error():
    with pytest.raises(TypeError, match="Conditioned: `_uses_condition` is now `uses_condition`"):
        type("Conditioned", (dfb.FlowBijector,), {"_uses_condition": True})


@pytest.mark.parametrize("returned", [None, "a part of the value", "a list of walks"])
def test_a_composite_says_that_a_walk_is_missing(returned):
    class Careless(dfb.Composite):
        def __init__(self):
            super().__init__(forward_min_event_ndims=1, parameters={}, name="careless")

        def _walk_inverse(self, y, condition):
            return {None: None, "a part of the value": y.value, "a list of walks": [y, y]}[returned]

    careless = Careless()
    for method in (careless.inverse, careless.inverse_log_det_per_dim, dfb.Chain([careless]).inverse):
        with pytest.raises(TypeError, match="careless: `_walk_inverse` returned a .*, needs to return the walk"):
            method(tf.ones([3]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: dfb.Multiscale([tfb.Exp(), tfb.Exp()], dfb.DimensionFactorization.channels([4], 2), name="flow"),
        lambda: dfb.PNF(tfb.Exp(), [tfb.Exp()], [4], name="flow"),
        lambda: dfb.VFlow(tfb.Reshape([4], [4]), None, 2, event_ndims=1, name="flow"),
    ],
)
def test_event_shapes_that_do_not_fit_are_refused_by_name(make):
    flow = make()
    for method in (flow.forward_event_shape, flow.inverse_event_shape, flow.forward_event_shape_tensor):
        with pytest.raises(ValueError, match=r"flow: .*\[5\] vs \[4\]"):
            method([5])


def test_integers_have_log_dets_in_a_multiscale_flow():
    flow = dfb.Multiscale([tfb.Permute([1, 0, 3, 2]), tfb.Permute([1, 0])], dfb.DimensionFactorization.channels([4], 2))
    assert flow.inverse_log_det_per_dim(tf.constant([[1, 2, 3, 4]])).numpy().tolist() == [[0, 0, 0, 0]]


def test_a_conditional_transform_of_bijectors_that_move_has_log_dets_in_the_frame_of_its_argument():
    def made(params):
        return tfb.Chain([tfb.Permute([1, 2, 0]), tfb.Scale(log_scale=params)])

    params = tf.constant([0.1, 0.2, 0.4])
    flow = dfb.ConditionalTransform(lambda condition: condition, made, event_ndims=1)
    for direction in ("inverse", "forward"):
        hook = f"{direction}_log_det_per_dim"
        actual = getattr(flow, hook)(tf.constant([1.0, 2.0, 3.0]), condition=params)
        assert_close(actual, getattr(dimflows, hook)(made(params), tf.constant([1.0, 2.0, 3.0])))
