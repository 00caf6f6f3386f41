"""Haar splits, and flows that grow an image stage by stage."""

import functools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import (
    ENTRIES,
    GRID,
    IMAGE,
    STAGE,
    ConditionalMixer,
    Mixer,
    assert_close,
    build,
    built,
    dfb,
    dimflows,
    distribution,
    fresh,
    given_to_detail,
    halved,
    image_pnf,
    jacobian,
    multiscale_stage,
    normal,
    pair_axis,
    parameters,
    pnf_walk,
    randomize,
    slow,
    vector_stage,
)

tfb, tfd = tfp.bijectors, tfp.distributions
LN2 = np.log(2.0)

PNFS = [name for name in ENTRIES if name.startswith("pnf") and name != "pnf_in_a_chain"]
every_pnf = pytest.mark.parametrize("name", [parameters(ENTRIES[name], name) for name in PNFS])
batches = pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)


@functools.cache
def flow_of(name, dtype="float64"):
    """A shared flow with large random parameters."""
    return built(name, "large", dtype)


def data_of(name, batch=(3,), seed=1, dtype="float64"):
    """(events, keyword arguments) for a flow."""
    return ENTRIES[name].data(batch, seed, dtype), ENTRIES[name].kwargs(batch, dtype=dtype)


def low_of(flow, stage, batch=(3,), seed=4, dtype="float64"):
    """Images of a stage's resolution."""
    return normal([*batch, *flow.stage_shapes[stage]], seed, dtype)


def sizes_of(flow):
    """The number of latent dimensions of every stage."""
    h = [int(np.prod(shape)) for shape in flow.stage_shapes]
    return [h[0], *h[:-1]]


def identity_pnf(event_shape, num_details, orthonormal=False):
    return dfb.PNF(tfb.Identity(), [tfb.Identity()] * num_details, event_shape, orthonormal)


def block_means(x, shape):
    """Means of the blocks that make an image, or a signal, of a given smaller shape."""
    batch = x.shape[: x.ndim - len(shape)]
    if len(shape) == 1:
        return x.reshape(*batch, shape[0], -1).mean(-1)
    height, width, channels = shape
    return x.reshape(*batch, height, x.shape[-3] // height, width, -1, channels).mean((-4, -2))


def normal_log_prob(u):
    return -0.5 * np.sum(np.square(u) + np.log(2.0 * np.pi), axis=-1)


class Spy(dfb.FlowBijector):
    """The identity, which keeps the values and the conditions that it is given."""

    uses_condition = True

    def __init__(self, event_ndims):
        super().__init__(forward_min_event_ndims=event_ndims, parameters=None, name="spy")
        self.seen = self._no_dependency([])

    def _pass(self, value, condition):
        self.seen.append((value.numpy(), None if condition is None else condition.numpy()))
        return value, tf.zeros([], value.dtype)

    _forward_and_log_det_per_dim = _inverse_and_log_det_per_dim = _pass


# HaarSplit.

AXES = [(-1, (8,)), (-1, (3, 1, 4)), (-2, (3, 4, 2)), (-3, (6, 3, 2))]
haar_axes = pytest.mark.parametrize("axis, shape", AXES, ids=str)
orthonormality = pytest.mark.parametrize("orthonormal", [False, True])


@haar_axes
@orthonormality
@batches
def test_a_split_is_averages_and_half_differences_of_pairs(axis, shape, orthonormal, batch):
    haar, y = dfb.HaarSplit(axis, orthonormal), normal([*batch, *shape], 1)
    first, second = halved(y.numpy(), axis)
    scale = np.sqrt(0.5) if orthonormal else 0.5
    average, difference = haar.split(y)
    assert_close(average, scale * (first + second), 1e-14)
    assert_close(difference, scale * (first - second), 1e-14)
    assert_close(haar.inverse(y), np.concatenate([average, difference], axis=axis), 0.0)
    assert_close(haar.merge(average, difference), y, 1e-14)
    assert_close(haar.forward(haar.inverse(fresh(y))), y, 1e-14)
    for part, expected in zip(haar.deinterleave(y), (first, second)):
        assert_close(part, expected, 0.0)
    assert_close(haar.interleave(*haar.deinterleave(y)), y, 0.0)
    assert haar.axis == axis


def test_a_split_by_a_written_out_example():
    image = tf.constant([[[1.0], [2.0]], [[5.0], [10.0]]])
    assert dfb.HaarSplit(-3).inverse(image).numpy().ravel().tolist() == [3.0, 6.0, -2.0, -4.0]
    assert dfb.HaarSplit(-2).inverse(image).numpy().ravel().tolist() == [1.5, -0.5, 7.5, -2.5]
    assert_close(dfb.HaarSplit(-1, orthonormal=True).inverse([3.0, 1.0]), [2.0 * np.sqrt(2.0), np.sqrt(2.0)], 1e-6)


@haar_axes
@orthonormality
def test_the_jacobian_of_a_split_is_orthogonal_or_half_of_it(axis, shape, orthonormal):
    haar, y = dfb.HaarSplit(axis, orthonormal), normal([1, *shape], 1)
    (matrix,), size = jacobian(haar.inverse, y), int(np.prod(shape))
    assert_close(matrix @ matrix.T, (1.0 if orthonormal else 0.5) * np.eye(size), 1e-14)
    ildj = 0.0 if orthonormal else -0.5 * size * LN2
    assert_close(haar.inverse_log_det_jacobian(y, len(shape)), [ildj])
    assert_close(haar.forward_log_det_jacobian(y, len(shape)), [-ildj])
    assert_close(haar.log_det_per_dim, ildj / size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_log_det_of_a_split_of_low_precision_values_is_not_rounded(dtype):
    haar, y = dfb.HaarSplit(-1), tf.ones([1, 64], dtype)
    assert_close(haar.inverse_log_det_per_dim(y), np.full([1, 64], -0.5 * LN2), 1e-6)
    assert_close(haar.inverse_log_det_jacobian(y, 1), [-32.0 * LN2], 1e-6)
    assert_close(haar.forward_log_det_jacobian(fresh(y), 1), [32.0 * LN2], 1e-6)


@pytest.mark.parametrize("axis", [0, 1, 3, -1.0, None, True, "height"])
def test_an_axis_that_is_no_negative_integer_is_an_error(axis):
    with pytest.raises(ValueError, match=f"HaarSplit: got axis={axis!r}, needs a negative integer"):
        dfb.HaarSplit(axis)


@pytest.mark.parametrize("method", ["inverse", "forward", "split", "inverse_log_det_per_dim", "forward_log_det_per_dim"])
@pytest.mark.parametrize("axis, shape", [(-1, (5,)), (-2, (4, 3, 2)), (-3, (7, 2, 2)), (-3, (4,)), (-2, (4,))], ids=str)
def test_a_size_that_has_no_pairs_is_an_error(method, axis, shape):
    message = rf"haar_split: got shape \({', '.join(map(str, shape))},?\), needs an even size along axis {axis}"
    with pytest.raises(ValueError, match=message):
        getattr(dfb.HaarSplit(axis), method)(tf.zeros(shape))


def test_an_unknown_size_along_the_axis_is_an_error():
    with pytest.raises(ValueError, match=r"haar_split: got shape \(2, None\), needs an even size along axis -1"):
        tf.function(dfb.HaarSplit(-1).inverse, autograph=False).get_concrete_function(tf.TensorSpec([2, None]))


@haar_axes
def test_a_split_keeps_static_shapes_under_an_unknown_batch_size(axis, shape):
    haar, seen = dfb.HaarSplit(axis), []

    @tf.function(autograph=False)
    def function(y):
        parts = [*haar.split(y), haar.merge(*haar.split(y)), haar.inverse(y), haar.forward(haar.inverse(y))]
        seen.extend(part.shape.as_list() for part in parts)
        return parts

    function.get_concrete_function(tf.TensorSpec([None, *shape], tf.float64))
    half = list(shape)
    half[axis] //= 2
    assert seen == [[None, *half]] * 2 + [[None, *shape]] * 3


# Stages and their resolutions.


@pytest.mark.parametrize(
    "event_shape, num_details, expected",
    [
        ([8], 3, [(1,), (2,), (4,), (8,)]),
        ([12], 2, [(3,), (6,), (12,)]),
        ([8, 8, 3], 4, [(2, 2, 3), (2, 4, 3), (4, 4, 3), (4, 8, 3), (8, 8, 3)]),
        ([8, 8, 1], 3, [(2, 4, 1), (4, 4, 1), (4, 8, 1), (8, 8, 1)]),
        ([4, 6, 2], 2, [(2, 3, 2), (2, 6, 2), (4, 6, 2)]),
        ([6, 5, 2], 1, [(3, 5, 2), (6, 5, 2)]),
        ([4, 4, 1], 0, [(4, 4, 1)]),
    ],
    ids=str,
)
def test_from_coarse_to_fine_images_grow_along_the_width_then_the_height(event_shape, num_details, expected):
    assert dfb.PNF.halved_shapes(event_shape, num_details) == expected
    if num_details:
        flow = identity_pnf(event_shape, num_details)
        assert flow.stage_shapes == expected
        assert len(flow.stages) == num_details + 1
        assert flow.forward_event_shape([int(np.prod(event_shape))]) == event_shape
        assert flow.inverse_event_shape(event_shape) == [np.prod(event_shape)]


def test_the_latent_of_identities_by_a_written_out_example():
    a, b, c, d = 1.0, 2.0, 5.0, 13.0
    latent = identity_pnf([2, 2, 1], 2).inverse(tf.constant([[[a], [b]], [[c], [d]]]))
    base, along_width, along_height = (a + b + c + d) / 4, (a + c - b - d) / 4, [(a - c) / 2, (b - d) / 2]
    assert latent.numpy().tolist() == [base, along_width, *along_height]
    signal = identity_pnf([4], 2).inverse([a, b, c, d])
    assert signal.numpy().tolist() == [base, (a + b - c - d) / 4, (a - b) / 2, (c - d) / 2]


@every_pnf
@batches
def test_encoding_is_block_means(name, batch):
    flow, (x, _) = flow_of(name), data_of(name, batch)
    num_details = len(flow.stages) - 1
    for k, shape in enumerate(flow.stage_shapes):
        factor = np.sqrt(2.0) ** (num_details - k) if flow.parameters["orthonormal"] else 1.0
        assert_close(flow.encode(x, k), factor * block_means(x.numpy(), shape), 1e-14)
    assert_close(flow.encode(x, num_details), x, 0.0)
    assert_close(flow.encode(x), flow.encode(x, 0), 0.0)
    assert_close(flow.encode(x.numpy()), flow.encode(x), 0.0)


@every_pnf
def test_what_every_stage_models_and_is_given(name):
    flow, (x, kwargs) = flow_of(name), data_of(name)
    values, given, latent, _ = pnf_walk(flow, x, **kwargs)
    for k in range(len(flow.stages)):
        value, condition = flow.stage_data(x, k, **kwargs)
        assert_close(value, values[k], 1e-14)
        if k or kwargs:
            assert_close(condition, given[k], 1e-14)
        else:
            assert condition is None
    assert_close(flow.inverse(x, **kwargs), np.concatenate(latent, axis=-1), 1e-12)


@every_pnf
def test_the_first_latent_dimensions_are_the_code_of_the_base(name):
    flow, (x, kwargs) = flow_of(name), data_of(name, (5,))
    base, size = flow.stages[0], sizes_of(flow)[0]
    base_kwargs = kwargs if getattr(base, "uses_condition", False) else {}
    code = tf.reshape(base.inverse(flow.encode(x), **base_kwargs), [5, -1])
    assert_close(flow.inverse(x, **kwargs)[..., :size], code, 0.0)
    noise = normal([5, int(np.prod(x.shape[1:])) - size], 8)
    other = flow.forward(tf.concat([code, noise], axis=-1), **kwargs)
    assert_close(flow.encode(other), flow.encode(x), 1e-12)
    assert np.abs(other - x).max() > 0.1


# Up-scaling.


@every_pnf
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 10.0])
def test_encoding_undoes_upscaling(name, dtype, tolerance, temperature):
    flow, (_, kwargs) = flow_of(name, dtype), data_of(name, dtype=dtype)
    for k in range(len(flow.stages)):
        low = low_of(flow, k, dtype=dtype)
        for seed in (1, 2):
            upscaled = flow.upscale(low, temperature, seed=[seed, k], **kwargs)
            assert upscaled.shape == (3, *flow.stage_shapes[-1]) and upscaled.dtype == low.dtype
            scale = max(1.0, np.abs(upscaled).max())
            np.testing.assert_allclose(flow.encode(upscaled, k), low, rtol=0.0, atol=tolerance * scale)


@every_pnf
def test_decoding_is_upscaling_without_noise(name):
    flow, (x, kwargs) = flow_of(name), data_of(name)
    latent = flow.inverse(x, **kwargs).numpy()
    for k, size in enumerate(np.cumsum(sizes_of(flow))):
        low = flow.encode(x, k)
        decoded = flow.decode(low, **kwargs)
        assert_close(decoded, flow.upscale(low, temperature=0, seed=[1, 2], **kwargs), 0.0)
        assert_close(flow.encode(decoded, k), low, 1e-12)
        cut = np.concatenate([latent[:, :size], np.zeros([3, latent.shape[1] - size])], axis=-1)
        assert_close(decoded, flow.forward(tf.constant(cut), **kwargs), 1e-11)


@every_pnf
def test_projection_is_idempotent_and_keeps_what_is_decoded(name):
    flow, (x, kwargs) = flow_of(name), data_of(name)
    projected = flow.project(x, **kwargs)
    assert_close(projected, flow.decode(flow.encode(x), **kwargs), 0.0)
    assert_close(flow.project(projected, **kwargs), projected, 1e-11)
    assert np.abs(projected - x).max() > 0.1
    low = low_of(flow, 0)
    decoded = flow.decode(low, **kwargs)
    assert_close(flow.encode(decoded), low, 1e-12)
    assert_close(flow.project(decoded, **kwargs), decoded, 1e-11)


@every_pnf
def test_the_temperature_scales_the_latent_details(name):
    flow, (_, kwargs) = flow_of(name), data_of(name)
    for k, known in enumerate(np.cumsum(sizes_of(flow))[:-1]):
        low = low_of(flow, k)
        cold, hot, zero = (
            flow.inverse(flow.upscale(low, t, seed=[3, 4], **kwargs), **kwargs).numpy() for t in (0.5, tf.constant(2.0), 0)
        )
        assert_close(hot[:, known:], 4.0 * cold[:, known:], 1e-7)
        assert_close(zero[:, known:], 0.0, 1e-10)
        assert_close(hot[:, :known], zero[:, :known], 1e-7)


def test_upscaling_depends_on_the_seed_only():
    flow = flow_of("pnf_image")
    for k in range(2):
        low = low_of(flow, k)
        first, again, other = (flow.upscale(low, seed=[s, 0]) for s in (1, 1, 2))
        assert_close(first, again, 0.0)
        assert np.abs(first - other).max() > 0.1
        tf.random.set_seed(5)
        by_number = flow.upscale(low, seed=7)
        tf.random.set_seed(5)
        assert_close(by_number, flow.upscale(low, seed=7), 0.0)
        assert np.abs(flow.upscale(low) - flow.upscale(low)).max() > 0.1
    assert_close(flow.upscale(low_of(flow, 2), seed=[1, 2]), low_of(flow, 2), 0.0)


@pytest.mark.parametrize("event_shape, num_details", [([8], 2), ([4, 4, 1], 2)])
def test_latent_details_are_independent_standard_normals(event_shape, num_details):
    flow = identity_pnf(event_shape, num_details)
    low = tf.zeros([20000, *flow.stage_shapes[0]], tf.float64)
    noise = flow.inverse(flow.upscale(low, seed=[1, 2])).numpy()[:, sizes_of(flow)[0] :]
    np.testing.assert_allclose(noise.mean(0), 0.0, atol=0.04)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(noise.shape[1]), atol=0.05)
    np.testing.assert_allclose(np.mean(noise**4, axis=0), 3.0, atol=0.4)
    single = flow.inverse(flow.upscale(low[0], seed=[1, 2])).numpy()
    _, first, second = np.split(single, np.cumsum(sizes_of(flow))[:-1])
    assert np.abs(first - second[: len(first)]).min() > 1e-3


def test_the_gradient_of_encoding_an_upscaled_image_is_the_identity():
    flow = flow_of("pnf_image")
    low = low_of(flow, 0, (2,))

    def there_and_back(low):
        return flow.encode(flow.upscale(tf.reshape(low, [-1, *low.shape[-3:]]), 1.0, seed=[1, 2]))

    matrix = jacobian(lambda low: tf.reshape(there_and_back(low), low.shape), low)
    assert_close(matrix, np.broadcast_to(np.eye(4), [2, 4, 4]), 1e-11)


# Densities.


@every_pnf
@batches
def test_the_terms_of_the_stages_sum_to_the_log_density(name, batch):
    flow, (x, kwargs) = flow_of(name), data_of(name, batch)
    terms = flow.stage_log_prob(x, **kwargs)
    assert terms.shape == (*batch, len(flow.stages)) and terms.dtype == tf.float64
    full = distribution(flow, [int(np.prod(flow.stage_shapes[-1]))])
    assert_close(tf.reduce_sum(terms, axis=-1), full.log_prob(fresh(x), bijector_kwargs=kwargs), 1e-11)


@every_pnf
def test_every_term_equals_the_formula(name):
    flow, (x, kwargs) = flow_of(name), data_of(name)
    values, given, latent, _ = pnf_walk(flow, x, **kwargs)
    terms = flow.stage_log_prob(x, **kwargs).numpy()
    for k, (stage, value, condition, u) in enumerate(zip(flow.stages, values, given, latent)):
        uses = condition is not None and getattr(stage, "uses_condition", False)
        stage_kwargs = {"condition": tf.constant(condition)} if uses else {}
        ildj = stage.inverse_log_det_jacobian(tf.constant(value), value.ndim - 1, **stage_kwargs)
        pairs = 0 if k == 0 or flow.parameters["orthonormal"] else value[0].size
        assert_close(terms[:, k], normal_log_prob(u) + ildj - pairs * LN2, 1e-11)


@pytest.mark.parametrize(
    "name", ["pnf_signal", "pnf_image", "pnf_flat_stages", "pnf_image_orthonormal", "pnf_signal_conditional"]
)
def test_the_log_density_is_that_of_the_dense_jacobian(name):
    flow, (x, kwargs) = flow_of(name), data_of(name)
    matrix = jacobian(flow.inverse, x, **kwargs)
    expected = normal_log_prob(flow.inverse(x, **kwargs).numpy()) + np.linalg.slogdet(matrix)[1]
    assert_close(distribution(flow, [matrix.shape[-1]]).log_prob(x, bijector_kwargs=kwargs), expected)
    assert_close(tf.reduce_sum(flow.stage_log_prob(x, **kwargs), axis=-1), expected)


@pytest.mark.parametrize("name, k", [("pnf_signal", 1), ("pnf_signal_odd_orthonormal", 1), ("pnf_signal_odd_orthonormal", 2)])
def test_the_first_terms_are_the_log_density_of_a_smaller_flow(name, k):
    flow, (x, _) = flow_of(name), data_of(name)
    smaller = dfb.PNF(flow.stages[0], flow.stages[1 : k + 1], flow.stage_shapes[k], flow.parameters["orthonormal"])
    assert smaller.stage_shapes == flow.stage_shapes[: k + 1]
    assert_close(flow.stage_log_prob(x)[:, : k + 1], smaller.stage_log_prob(flow.encode(x, k)))
    low = low_of(flow, 0)
    assert_close(flow.encode(flow.decode(low), k), smaller.decode(low))


@pytest.mark.parametrize(
    "event_shape, num_details, expected",
    [([32, 32, 1], 4, -665.42), ([32, 32, 3], 4, -1996.26), ([64, 64, 3], 4, -7985.06), ([1024], 4, -665.42)],
    ids=str,
)
def test_the_constant_of_the_halvings(event_shape, num_details, expected):
    flow, size = identity_pnf(event_shape, num_details), int(np.prod(event_shape))
    y = tf.zeros([1, *event_shape], tf.float64)
    ildj = tf.broadcast_to(flow.inverse_log_det_jacobian(y, len(event_shape)), [1])
    assert_close(ildj, [-(size - sizes_of(flow)[0]) * LN2], 1e-12)
    np.testing.assert_allclose(ildj, [expected], atol=0.005)
    np.testing.assert_allclose(-ildj / (size * LN2), [0.9375], rtol=1e-12)
    fldj = flow.forward_log_det_jacobian(tf.zeros([1, size], tf.float64), 1)
    assert_close(tf.broadcast_to(fldj, [1]), -ildj, 1e-12)
    terms = flow.stage_log_prob(y)[0]
    for k, (term, dims) in enumerate(zip(terms, sizes_of(flow))):
        assert_close(term, -0.5 * dims * np.log(2 * np.pi) - (dims * LN2 if k else 0.0), 1e-12)
    orthonormal = identity_pnf(event_shape, num_details, orthonormal=True)
    assert_close(tf.broadcast_to(orthonormal.inverse_log_det_jacobian(y, len(event_shape)), [1]), [0.0], 0.0)
    assert_close(orthonormal.inverse_log_det_per_dim(y), np.zeros(y.shape), 0.0)


@pytest.mark.parametrize("name", ["pnf_signal", "pnf_image", "pnf_flat_stages"])
def test_further_event_axes_are_summed(name):
    flow, (y, _) = flow_of(name), data_of(name)
    x, event_ndims = ENTRIES[name].latent([3]), y.shape.rank - 1
    for bijector in (flow, dfb.Chain([flow]), tfb.Chain([flow]), dfb.Chain([tfb.Invert(tfb.Invert(flow))])):
        ildj = bijector.inverse_log_det_jacobian(y, event_ndims)
        fldj = bijector.forward_log_det_jacobian(x, 1)
        assert ildj.shape == fldj.shape == (3,)
        assert_close(bijector.inverse_log_det_jacobian(fresh(y), event_ndims + 1), tf.reduce_sum(ildj))
        assert_close(bijector.forward_log_det_jacobian(fresh(x), 2), tf.reduce_sum(fldj))


@pytest.mark.parametrize("chain", [dfb.Chain, tfb.Chain])
def test_the_constant_counts_for_every_event_of_a_larger_one(chain):
    flow = chain([identity_pnf([8], 2)])
    value = tf.zeros([5, 3, 8], tf.float64)
    assert_close(np.broadcast_to(flow.inverse_log_det_jacobian(value, 2), [5]), np.full(5, -3 * 6 * LN2))
    assert_close(np.broadcast_to(flow.forward_log_det_jacobian(fresh(value), 2), [5]), np.full(5, 3 * 6 * LN2))


@pytest.mark.parametrize("chain", [dfb.Chain, tfb.Chain])
def test_a_flow_of_signals_along_the_channels_of_an_image(chain):
    flow, y = chain([dfb.Squeeze(), flow_of("pnf_signal")]), normal([3, *IMAGE], 1)
    ildj, x = flow.inverse_log_det_jacobian(y, 3), flow.inverse(y)
    assert x.shape == (3, 1, 2, 8)
    assert_close(ildj, np.linalg.slogdet(jacobian(flow.inverse, y))[1])
    assert_close(flow.forward_log_det_jacobian(fresh(x), 3), -ildj)
    assert_close(flow.forward(fresh(x)), y)
    assert_close(np.sum(dimflows.inverse_log_det_per_dim(flow, y), axis=(1, 2, 3)), ildj)
    assert_close(np.sum(dimflows.forward_log_det_per_dim(flow, x), axis=(1, 2, 3)), -ildj)


@every_pnf
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_contributions_of_dimensions_for_every_batch_shape(name, batch):
    flow, (y, kwargs) = flow_of(name), data_of(name, batch)
    x = flow.inverse(y, **kwargs)
    inverse = dimflows.inverse_log_det_per_dim(flow, y, **kwargs)
    forward = dimflows.forward_log_det_per_dim(flow, fresh(x), **kwargs)
    assert inverse.shape == y.shape and forward.shape == x.shape
    event_axes = tuple(range(-len(flow.stage_shapes[0]), 0))
    assert_close(np.sum(inverse, event_axes), flow.inverse_log_det_jacobian(fresh(y), len(event_axes), **kwargs))
    assert_close(np.sum(forward, -1), -np.sum(inverse, event_axes))
    flat = tf.reshape(y, [-1, *y.shape[len(batch) :]])
    flat_kwargs = {k: tf.reshape(c, [-1, *c.shape[len(batch) :]]) for k, c in kwargs.items()}
    assert_close(inverse, np.reshape(pnf_walk(flow, flat, **flat_kwargs)[3], y.shape))


@every_pnf
def test_transport_there_and_back(name):
    flow, (y, _) = flow_of(name), data_of(name, (2, 3))
    for value in (y, tf.range(y.shape.num_elements())):
        value = tf.reshape(value, y.shape)
        moved = dfb.walk.transport(flow, value, "inverse")
        assert moved.shape == (2, 3, np.prod(y.shape[2:])) and moved.dtype == value.dtype
        assert_close(dfb.walk.transport(flow, moved, "forward"), value, 0.0)


def test_the_values_of_identities_move_like_their_contributions():
    """What S_i and Delta_i contribute belongs to the elements 2i and 2i+1."""
    y = normal([2, 4, 4, 1], 1)
    scales = [normal(shape, 10 + k) for k, shape in enumerate([(2, 2, 1), (2, 2, 1), (2, 4, 1)])]
    zero = tf.zeros([], tf.float64)
    base, *details = (dfb.ElementwiseAffine(zero, scale) for scale in scales)
    flow = dfb.PNF(base, details, [4, 4, 1], orthonormal=True)
    contributions = flow.inverse_log_det_per_dim(y).numpy()
    assert_close(contributions[0], contributions[1], 0.0)
    assert_close(contributions[0, 0::2, 0::2], scales[0])
    assert_close(contributions[0, 0::2, 1::2], scales[1])
    assert_close(contributions[0, 1::2], scales[2])


# Conditions.


@pytest.mark.parametrize("event_shape, num_details", [([8], 2), ([4, 4, 2], 3), ([4, 2, 1], 2)], ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("conditional", [False, True])
def test_the_base_is_given_the_condition_and_details_their_image_with_it(event_shape, num_details, batch, conditional):
    spies = [Spy(len(event_shape)) for _ in range(num_details + 1)]
    flow = dfb.PNF(spies[0], spies[1:], event_shape)
    x = normal([*batch, *event_shape], 1)
    condition = normal([*batch, 5], 2) if conditional else None
    rows = x.numpy().reshape(-1, *event_shape)
    given = [None if condition is None else condition.numpy()]
    for k in range(num_details):
        low = block_means(rows, flow.stage_shapes[k])
        low = given_to_detail(low, None if condition is None else condition.numpy().reshape(-1, 5))
        given.append(low.reshape(*batch, *low.shape[1:]))
    latent = flow.inverse(x, condition=condition)
    passes = [
        (0, lambda: flow.inverse_log_det_per_dim(fresh(x), condition=condition)),
        (0, lambda: flow.stage_log_prob(x, condition=condition)),
        (0, lambda: flow.forward(fresh(latent), condition=condition)),
        (0, lambda: flow.forward_log_det_per_dim(latent, condition=condition)),
        *((k + 1, lambda k=k: flow.upscale(flow.encode(x, k), 0.0, condition=condition)) for k in range(num_details)),
    ]
    for first, call in passes:
        for spy in spies:
            spy.seen.clear()
        call()
        assert [len(spy.seen) for spy in spies] == [int(k >= first) for k in range(num_details + 1)]
        # What is up-scaled without noise has the images of x only at the first stage.
        for spy, expected in list(zip(spies, given))[first : first + 1 if first else None]:
            (actual,) = (condition for _, condition in spy.seen)
            if expected is None:
                assert actual is None
            else:
                assert_close(actual, expected, 1e-12)


def test_a_condition_is_cast_to_the_type_of_the_images():
    spy = Spy(1)
    dfb.PNF(tfb.Identity(), [spy], [4]).inverse(tf.ones([2, 4], tf.float64), condition=tf.constant([[1], [2]]))
    ((_, given),) = spy.seen
    assert given.dtype == np.float64
    assert_close(given, [[1.0, 1.0, 1.0], [1.0, 1.0, 2.0]])


def test_another_condition_changes_what_every_conditional_method_returns():
    name = "pnf_image_conditional"
    flow, (x, _) = flow_of(name), data_of(name)
    one, other = (normal([3, 3], seed) for seed in (1, 2))
    functions = (
        lambda c: flow.inverse(x, condition=c),
        lambda c: flow.decode(low_of(flow, 0), condition=c),
        lambda c: flow.decode(low_of(flow, 0), c),
        lambda c: flow.upscale(low_of(flow, 1), seed=[1, 2], condition=c),
        lambda c: flow.project(x, c),
        lambda c: flow.stage_log_prob(x, c),
        lambda c: flow.stage_data(x, 0, c)[1],
    )
    for function in functions:
        assert_close(function(one), function(fresh(one)), 0.0)
        assert np.abs(function(one) - function(other)).max() > 1e-3
        if function is not functions[-1]:
            assert_close(function(one[:1])[2], function(tf.repeat(one[:1], 3, axis=0))[2])


METHODS = {
    "inverse": lambda flow, x, c: flow.inverse(x, condition=c),
    "inverse_log_det_per_dim": lambda flow, x, c: flow.inverse_log_det_per_dim(x, condition=c),
    "forward": lambda flow, x, c: flow.forward(tf.reshape(x, [*x.shape[: -len(flow.stage_shapes[0])], -1]), condition=c),
    "decode": lambda flow, x, c: flow.decode(flow.encode(x), condition=c),
    "project": lambda flow, x, c: flow.project(x, condition=c),
    "upscale": lambda flow, x, c: flow.upscale(flow.encode(x, 1), seed=[1, 2], condition=c),
    "stage_log_prob": lambda flow, x, c: flow.stage_log_prob(x, condition=c),
    "stage_data": lambda flow, x, c: flow.stage_data(x, 1, condition=c),
    "stage_data_base": lambda flow, x, c: flow.stage_data(x, 0, condition=c),
}
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_a_condition_that_no_part_can_use_is_an_error(method):
    flow, (x, _) = flow_of("pnf_unconditional_details"), data_of("pnf_unconditional_details")
    with pytest.raises(ValueError, match="pnf: got a condition, but no part of this bijector can use one"):
        METHODS[method](flow, x, normal([3, 2]))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "stage_data_base"])
@pytest.mark.parametrize(
    "condition, message",
    [
        (normal([2]), r"a condition of shape \(2,\), needs one vector for each event: 2 axes"),
        (normal([3, 1, 1, 2]), r"a condition of shape \(3, 1, 1, 2\), needs one vector for each event: 2 axes"),
        (normal([3, 4, 4, 1]), r"a condition of shape \(3, 4, 4, 1\), needs one vector for each event: 2 axes"),
        ({"label": normal([3, 2])}, "a dict as condition, needs a tensor"),
    ],
    ids=["low", "high", "image", "structure"],
)
def test_a_condition_that_is_no_vector_is_an_error(method, condition, message):
    name = "pnf_image_conditional"
    with pytest.raises(ValueError, match=f"pnf: got {message}"):
        METHODS[method](flow_of(name), data_of(name)[0], condition)


def test_a_condition_may_be_numbers():
    name = "pnf_image_conditional"
    flow, (x, _) = flow_of(name), data_of(name)
    condition = [[0.5, 1.0, -1.0], [2.0, 0.25, 0.0], [1.0, 1.0, 1.0]]
    expected = flow.inverse(x, condition=tf.constant(condition, tf.float64))
    assert_close(flow.inverse(x, condition=condition), expected)
    assert_close(flow.inverse(x, condition=np.array(condition)), expected)


# Every stage is evaluated once.


class Counted(Mixer):
    """A network that counts its evaluations."""

    calls = 0

    def call(self, x):
        self.calls += 1
        return super().call(x)


class ConditionalCounted(ConditionalMixer):
    """A network with a condition that counts its evaluations."""

    calls = 0

    def call(self, x, condition=None):
        self.calls += 1
        return super().call(x, condition)


def counted_coupling(size, seed, condition_size=None):
    """A coupling of a vector, conditional if a size is given, and its network."""
    shapes = [size // 2], [size]
    network = Counted(*shapes, seed) if condition_size is None else ConditionalCounted(*shapes, [condition_size], seed)
    return dfb.AffineCoupling(network, dfb.masks.Channel(event_ndims=1), "tanh", dtype=tf.float64), network


def counted_flow(kind):
    """A flow of a signal of size 8 with three stages, and their networks."""
    (base, *details), networks = zip(counted_coupling(2, 0), counted_coupling(2, 1, 2), counted_coupling(4, 2, 4))
    wrapped = {
        "alone": lambda d, size: d,
        "in tfb.Chain": lambda d, size: tfb.Chain([tfb.Permute(list(range(size))[::-1]), d]),
        "in dfb.Chain": lambda d, size: dfb.Chain([dfb.ActNorm(size, dtype="float64"), d]),
        "embedded": lambda d, size: dfb.EmbedCondition(d, tf.tanh, condition_ndims=1),
        "inverted": lambda d, size: tfb.Invert(d),
    }
    if kind == "nested":
        return dfb.PNF(dfb.PNF(base, details[:1], [4]), details[1:], [8]), networks
    return dfb.PNF(base, [wrapped[kind](d, size) for d, size in zip(details, (2, 4))], [8]), networks


STAGE_KINDS = ["alone", "in tfb.Chain", "in dfb.Chain", "embedded", "inverted", "nested"]


def gradient_step(full, flow, x):
    with tf.GradientTape() as tape:
        loss = -tf.reduce_mean(full.log_prob(x))
    return tape.gradient(loss, flow.trainable_variables)


def stage_gradient(full, flow, x):
    with tf.GradientTape() as tape:
        loss = -tf.reduce_mean(flow.stage_log_prob(x))
    return tape.gradient(loss, flow.trainable_variables)


ALL, DETAILS, LAST, NONE = [1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]

EVALUATIONS = {
    "log_prob": (ALL, lambda full, flow, x: full.log_prob(x)),
    "sample": (ALL, lambda full, flow, x: full.sample(3, seed=[1, 2])),
    "stage_log_prob": (ALL, lambda full, flow, x: flow.stage_log_prob(x)),
    "upscale_later": (LAST, lambda full, flow, x: flow.upscale(x[:, :4], seed=[1, 2])),
}
FURTHER = {
    "sample_and_log_prob": (ALL, lambda full, flow, x: full.experimental_sample_and_log_prob(3, seed=[1, 2])),
    "log_prob_of_a_sample": (ALL, lambda full, flow, x: full.log_prob(full.sample(3, seed=[1, 2]))),
    "inverse_pair": (ALL, lambda full, flow, x: (flow.inverse(x), flow.inverse_log_det_jacobian(x, 1))),
    "forward_pair": (ALL, lambda full, flow, x: (flow.forward(x), flow.forward_log_det_jacobian(x, 1))),
    "gradient": (ALL, gradient_step),
    "stage_gradient": (ALL, stage_gradient),
    "inverse_hook": (ALL, lambda full, flow, x: flow.inverse_log_det_per_dim(x)),
    "forward_hook": (ALL, lambda full, flow, x: flow.forward_log_det_per_dim(x)),
    "decode_later": (LAST, lambda full, flow, x: flow.decode(x[:, :4])),
    "upscale_nothing": (NONE, lambda full, flow, x: flow.upscale(x, seed=[1, 2])),
    "encode": (NONE, lambda full, flow, x: flow.encode(x)),
    "stage_data": (NONE, lambda full, flow, x: flow.stage_data(x, 1)),
}
UPSCALING = {
    "upscale": (DETAILS, lambda full, flow, x: flow.upscale(x[:, :2], seed=[1, 2])),
    "decode": (DETAILS, lambda full, flow, x: flow.decode(x[:, :2])),
    "project": (DETAILS, lambda full, flow, x: flow.project(x)),
}


def evaluation_cases():
    """Kinds of stages, the evaluations of the stages that an operation needs, and the operation."""
    for kind in STAGE_KINDS:
        cases = EVALUATIONS | (FURTHER if kind == "alone" else {})
        # The first detail of the nested flow belongs to its base.
        for operation, (expected, function) in (cases if kind == "nested" else cases | UPSCALING).items():
            # How a detail is wrapped is another axis than the operation: two wrappings are quick, the others slow.
            param = pytest.param if kind in ("alone", "nested") else slow
            yield param(kind, expected, function, id=f"{operation}-{kind}")


@pytest.mark.parametrize("kind, expected, function", list(evaluation_cases()))
def test_every_stage_that_is_needed_is_evaluated_once(kind, expected, function):
    flow, networks = counted_flow(kind)
    full, x = distribution(flow, [8]), normal([3, 8], 1)
    results = []
    for mode in ("eager", "traced"):
        call = functools.partial(function, full, flow)
        call = tf.function(call, autograph=False) if mode == "traced" else call
        for network in networks:
            network.calls = 0
        results.append(tf.nest.flatten(call(fresh(x))))
        assert [network.calls for network in networks] == expected, mode
    for eager, traced in zip(*results):
        assert_close(traced, eager)


@pytest.mark.parametrize("wrap", ["tfb.Chain", "dfb.Chain", "tfb.Invert"])
@pytest.mark.parametrize("mode", ["eager", "traced"])
def test_every_stage_is_evaluated_once_in_a_composite(wrap, mode):
    flow, networks = counted_flow("alone")
    flow = {
        "tfb.Chain": lambda: tfb.Chain([tfb.Shift(tf.ones([], tf.float64)), flow, tfb.Permute(list(range(8)))]),
        "dfb.Chain": lambda: dfb.Chain([dfb.ActNorm(8, dtype="float64"), flow, tfb.Permute(list(range(8)))]),
        "tfb.Invert": lambda: tfb.Invert(flow),
    }[wrap]()
    full = distribution(flow, [8])
    for function in (full.log_prob, lambda x: full.sample(seed=[1, 2]), lambda x: full.log_prob(full.sample(3, seed=[1, 2]))):
        call = tf.function(function, autograph=False) if mode == "traced" else function
        for network in networks:
            network.calls = 0
        assert np.isfinite(call(normal([3, 8], 1))).all()
        assert [network.calls for network in networks] == [1, 1, 1]


# EmbedCondition.


@pytest.mark.parametrize("mode", ["eager", "traced"])
@pytest.mark.parametrize("wrap", ["alone", "dfb.Chain", "tfb.Invert"])
def test_an_embedding_is_evaluated_once_for_all_its_conditioners(mode, wrap):
    embedding = Counted([3], [5], 7)
    parts = [vector_stage(4, k, "float64", 5) for k in range(3)]
    bijector = dfb.EmbedCondition(dfb.Chain([*parts, tfb.Permute([2, 0, 3, 1])]), embedding, condition_ndims=1)
    bijector = {"alone": lambda b: b, "dfb.Chain": lambda b: dfb.Chain([b]), "tfb.Invert": tfb.Invert}[wrap](bijector)
    full, y, condition = distribution(bijector, [4]), normal([3, 4], 1), normal([3, 3], 2)
    for function in (
        lambda c: full.log_prob(y, bijector_kwargs={"condition": c}),
        lambda c: full.sample(3, seed=[1, 2], bijector_kwargs={"condition": c}),
        lambda c: dimflows.inverse_log_det_per_dim(bijector, y, condition=c),
        lambda c: dimflows.forward_log_det_per_dim(bijector, y, condition=c),
    ):
        embedding.calls = 0
        assert np.isfinite((tf.function(function, autograph=False) if mode == "traced" else function)(condition)).all()
        assert embedding.calls == 1


def test_the_parts_are_given_the_embedding_and_without_a_condition_nothing():
    spies = [Spy(1), Spy(1)]
    bijector = dfb.EmbedCondition(dfb.Chain(spies), lambda c: 2.0 * c[:, :1], condition_ndims=1)
    y, condition = normal([2, 3, 4], 1), normal([2, 3, 5], 2)
    for method in (bijector.inverse, bijector.forward, bijector.inverse_log_det_per_dim, bijector.forward_log_det_per_dim):
        method(fresh(y), condition=condition)
        method(fresh(y))
        for spy in spies:
            (_, embedded), (_, nothing) = spy.seen
            assert_close(embedded, 2.0 * condition[..., :1], 0.0)
            assert nothing is None
            spy.seen.clear()


@pytest.mark.parametrize("event_ndims, shape", [(1, (3,)), (3, (2, 4, 3))], ids=str)
@batches
def test_an_embedding_sees_one_batch_axis(event_ndims, shape, batch):
    seen = []

    def embedding(c):
        seen.append(c.shape)
        return tf.reduce_sum(tf.reshape(c, [len(c), -1]), axis=-1, keepdims=True)

    shift = dfb.ConditionalTransform(lambda c: c, dfb.transformers.Additive(), event_ndims=1)
    bijector, y, condition = (
        dfb.EmbedCondition(shift, embedding, event_ndims),
        normal([*batch, 1], 1),
        normal([*batch, *shape], 2),
    )
    total = np.sum(condition, axis=tuple(range(-event_ndims, 0)))[..., np.newaxis]
    assert_close(bijector.inverse(y, condition=condition), y + total)
    assert seen == [(int(np.prod(batch)), *shape)]
    assert_close(bijector.inverse(y, condition=condition.numpy()), y + total)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: dfb.EmbedCondition(tfb.Exp(), tf.identity, 1),
            ValueError,
            "EmbedCondition: no part of exp can use a condition",
        ),
        (lambda: dfb.EmbedCondition(Spy(1), "glow", 1), TypeError, "got 'glow', needs a callable"),
        (lambda: flow_of("embed_vector").inverse(normal([2, 4]), other=1), TypeError, r"embed_condition: .*\['other'\]"),
    ],
)
def test_errors_of_embeddings(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Errors.


def identities(number):
    return [tfb.Identity() for _ in range(number)]


def multiscale_of(shape):
    return dfb.Multiscale(identities(2), dfb.DimensionFactorization.random(shape, 2, seed=0))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: identity_pnf([4, 4], 1), r"got event shape \[4, 4\], needs an image \[H, W, C\] or a signal \[D\]"),
        (lambda: identity_pnf([], 1), r"got event shape \[\], needs an image \[H, W, C\] or a signal \[D\]"),
        (lambda: identity_pnf([2, 4, 4, 1], 1), r"got event shape \[2, 4, 4, 1\], needs an image"),
        (lambda: identity_pnf([4], 0), r"got details \[\], needs"),
        (lambda: identity_pnf([12], 3), r"got event shape \[12\] and 3 details, but the size of \[3\] is not divisible by 2"),
        (lambda: identity_pnf([6, 8, 1], 3), r"\[6, 8, 1\] and 3 details, but the height of \[3, 4, 1\] is not divisible by 2"),
        (lambda: identity_pnf([8, 6, 1], 4), r"\[8, 6, 1\] and 4 details, but the width of \[2, 3, 1\] is not divisible by 2"),
        (lambda: identity_pnf([5, 4, 1], 1), r"but the height of \[5, 4, 1\] is not divisible by 2"),
        (lambda: dfb.PNF.halved_shapes([6, 8, 1], 3), r"the height of \[3, 4, 1\] is not divisible by 2"),
        (lambda: dfb.PNF.halved_shapes([6, 8], 1), r"got event shape \[6, 8\], needs an image"),
        (
            lambda: dfb.PNF(multiscale_of((4, 4, 1)), identities(1), [4, 4, 1]),
            r"the base \(multiscale\) does not fit events of shape \[2, 4, 1\]: .*\[4 4 1\]",
        ),
        (
            lambda: dfb.PNF(multiscale_of((4, 2, 1)), identities(1), [4, 4, 1]),
            r"the base \(multiscale\) does not fit events of shape \[2, 4, 1\]: .*\[4 2 1\]",
        ),
        (
            lambda: dfb.PNF(tfb.Identity(), [tfb.Identity(), multiscale_of((4, 2, 1))], [4, 4, 1]),
            r"detail 2 \(multiscale\) does not fit events of shape \[2, 4, 1\]: .*\[4 2 1\]",
        ),
        (
            lambda: dfb.PNF(tfb.Identity(), [multiscale_of((2, 4, 2))], [4, 4, 1]),
            r"detail 1 \(multiscale\) does not fit events of shape \[2, 4, 1\]: .*\[2 4 2\]",
        ),
        (
            lambda: dfb.PNF(multiscale_of((8,)), identities(1), [4, 4, 1]),
            r"the base \(multiscale\) does not fit events of shape \[2, 4, 1\]: ",
        ),
        (
            lambda: dfb.PNF(tfb.SoftmaxCentered(), identities(1), [8]),
            r"the base \(softmax_centered\) maps events of shape \[4\] to \(3,\)",
        ),
        (
            lambda: dfb.PNF(tfb.Identity(), [dfb.Squeeze()], [2, 2, 1]),
            r"detail 1 \(squeeze\) does not fit events of shape \[1, 2, 1\]: Squeeze: height 1 is not divisible",
        ),
        (lambda: dfb.PNF(dfb.Squeeze(), identities(1), [8]), r"the base \(squeeze\) .*does not fit events of shape \[4\]"),
        (
            lambda: dfb.PNF(tfb.Identity(), [identity_pnf([2, 4, 1], 1), identity_pnf([2, 2, 1], 1)], [4, 4, 1]),
            r"detail 1 \(pnf\) does not fit events of shape \[2, 2, 1\]: .*\[2 4 1\]",
        ),
        (
            lambda: dfb.PNF(image_pnf(0, "float64"), identities(1), [32]),
            r"the base \(pnf\) .*events of shape \[16\]",
        ),
        (
            lambda: dfb.PNF(dfb.AdditiveCoupling(tf.identity, dfb.masks.Checkerboard()), identities(1), [8]),
            r"the base \(additive_coupling\) .*events of shape \[4\]",
        ),
        (
            lambda: dfb.PNF(tfb.Identity(), [dfb.HaarSplit(-3)], [8]),
            r"detail 1 \(haar_split\) .*events of shape \[4\]",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_stage(make, message):
    with pytest.raises(ValueError, match=f"PNF: .*{message}"):
        make()


@pytest.mark.parametrize("direction", ["inverse", "forward", "stage_log_prob", "upscale"])
def test_a_stage_for_other_channels_is_an_error_when_it_is_used(direction):
    flow = dfb.PNF(tfb.Identity(), [dfb.ActNorm(3)], [2, 2, 1])
    value = tf.ones([2, 4]) if direction == "forward" else flow.encode(tf.ones([2, 2, 2, 1]), int(direction != "upscale"))
    with pytest.raises(ValueError, match="actnorm: got 1 channels, has parameters for 3"):
        getattr(flow, direction)(value)


@pytest.mark.parametrize("method", ["forward", "forward_log_det_jacobian", "forward_log_det_per_dim"])
def test_latent_values_of_another_size_are_an_error(method):
    flow = flow_of("pnf_image")
    args = (1,) if method == "forward_log_det_jacobian" else ()
    with pytest.raises(ValueError, match=r"pnf: got values of shape \(2, 15\), needs events of shape \[16\]"):
        getattr(flow, method)(tf.ones([2, 15], tf.float64), *args)


@pytest.mark.parametrize("method", ["inverse", "inverse_log_det_per_dim", "encode", "project", "stage_log_prob"])
@pytest.mark.parametrize("shape", [(2, 4, 8, 1), (2, 4, 4, 3), (4, 4), (16,)], ids=str)
def test_events_of_another_shape_are_an_error(method, shape):
    message = rf"pnf: got values of shape \({', '.join(map(str, shape))},?\), needs events of shape \[4, 4, 1\]"
    with pytest.raises(ValueError, match=message):
        getattr(flow_of("pnf_image"), method)(tf.ones(shape, tf.float64))


@pytest.mark.parametrize(
    "call",
    [
        lambda flow, x: flow.inverse_log_det_jacobian(x, 3),
        lambda flow, x: flow.stage_data(x, 1),
        lambda flow, x: flow.encode(x, 2),
        lambda flow, x: distribution(flow, [16]).log_prob(x),
    ],
)
def test_events_of_another_size_are_an_error_everywhere(call):
    with pytest.raises(ValueError, match=r"pnf: got values of shape \(2, 8, 4, 1\), needs events of shape \[4, 4, 1\]"):
        call(flow_of("pnf_image"), tf.ones([2, 8, 4, 1], tf.float64))


@pytest.mark.parametrize("method", ["encode", "project", "stage_log_prob", "decode", "upscale"])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "bool"])
def test_integers_are_an_error(method, dtype):
    flow = flow_of("pnf_image")
    x = tf.cast(tf.ones([2, *GRID]), dtype)
    with pytest.raises(ValueError, match=f"pnf: got values of dtype {dtype}, needs real numbers"):
        getattr(flow, method)(x)


@pytest.mark.parametrize("stage", [-1, 3, 1.0, "1", None])
@pytest.mark.parametrize("method", ["encode", "stage_data"])
def test_a_stage_that_does_not_exist_is_an_error(method, stage):
    flow = flow_of("pnf_image")
    with pytest.raises(ValueError, match=f"pnf: got stage {stage!r}, needs 0 to 2"):
        getattr(flow, method)(data_of("pnf_image")[0], stage)


@pytest.mark.parametrize("method", ["decode", "upscale"])
@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 4, 2, 1), (3, 2, 2, 2), (3, 16), (2, 2), ()], ids=str)
def test_images_of_no_stage_are_an_error(method, shape):
    message = (
        rf"pnf: got images of shape \({', '.join(map(str, shape))}\), "
        r"needs those of a stage: \[2, 2, 1\], \[2, 4, 1\], \[4, 4, 1\]"
    )
    with pytest.raises(ValueError, match=message):
        getattr(flow_of("pnf_image"), method)(tf.ones(shape, tf.float64))


@pytest.mark.parametrize(
    "temperature", [-1.0, -1e-9, float("nan"), float("inf"), np.float32(-2.0), tf.constant(-1.0), [1.0, 2.0]]
)
@pytest.mark.parametrize("stage", [0, 2])
def test_a_temperature_that_is_no_standard_deviation_is_an_error(temperature, stage):
    flow = flow_of("pnf_image")
    with pytest.raises(ValueError, match="(?s)pnf: got temperature=.*, needs a number >= 0"):
        flow.upscale(low_of(flow, stage), temperature, seed=[1, 2])


# Modes of execution, shapes and dtypes.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pnf_image_conditional", "pnf_signal"])
def test_the_whole_flow_under_xla_equals_eager(name):
    flow, (x, kwargs) = flow_of(name), data_of(name)
    size = int(np.prod(flow.stage_shapes[-1]))
    full = distribution(flow, [size])

    def certain(x):
        return full.log_prob(x, bijector_kwargs=kwargs), flow.stage_log_prob(x, **kwargs), flow.project(x, **kwargs)

    @tf.function(autograph=False, jit_compile=True)
    def compiled(x):
        sample = full.sample(x.shape[0], seed=[1, 2], bijector_kwargs=kwargs)
        sample_log_prob = full.log_prob(sample, bijector_kwargs=kwargs)
        return certain(x), flow.upscale(flow.encode(x, 1), 0.5, seed=[1, 2], **kwargs), sample, sample_log_prob

    results, upscaled, sample, sample_log_prob = compiled(x)
    for actual, expected in zip(results, certain(fresh(x))):
        assert_close(actual, expected)
    assert_close(sample_log_prob, full.log_prob(fresh(sample), bijector_kwargs=kwargs))
    # XLA draws other numbers from the same seed.
    assert_close(flow.encode(upscaled, 1), flow.encode(x, 1), 1e-12)
    known = sum(sizes_of(flow)[:2])
    latent = flow.inverse(upscaled, **kwargs).numpy()
    assert_close(latent[:, :known], flow.inverse(x, **kwargs)[:, :known])
    assert 0.0 < np.abs(latent[:, known:]).min() and np.abs(latent[:, known:]).max() < 2.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pnf_image_conditional", "pnf_flat_stages", "pnf_signal"])
def test_static_shapes_are_kept_under_an_unknown_batch_size(name):
    flow, (x, kwargs) = flow_of(name), data_of(name, (5,))
    shapes, event, seen = flow.stage_shapes, flow.stage_shapes[-1], []
    functions = [
        (lambda x, **k: flow.inverse(x, **k), (np.prod(event),)),
        (lambda x, **k: flow.forward(flow.inverse(x, **k), **k), event),
        *((lambda x, k=k, **_: flow.encode(x, k), shapes[k]) for k in range(len(shapes))),
        *((lambda x, i=i, **k: flow.decode(flow.encode(x, i), **k), event) for i in range(len(shapes))),
        *((lambda x, i=i, **k: flow.upscale(flow.encode(x, i), 1.0, seed=[1, 2], **k), event) for i in range(len(shapes))),
        (lambda x, **k: flow.project(x, **k), event),
        (lambda x, **k: flow.stage_log_prob(x, **k), (len(shapes),)),
        (lambda x, **k: flow.stage_data(x, 1, **k)[0], shapes[0]),
    ]

    @tf.function(autograph=False)
    def function(x, **kwargs):
        results = [f(x, **kwargs) for f, _ in functions]
        seen.append([r.shape.as_list() for r in results])
        return results

    specs = {k: tf.TensorSpec([None, *v.shape[1:]], v.dtype) for k, v in {"x": x, **kwargs}.items()}
    concrete = function.get_concrete_function(**specs)
    assert seen == [[[None, *shape] for _, shape in functions]]
    for actual, (f, _) in zip(concrete(x=x, **kwargs), functions):
        assert_close(actual, f(fresh(x), **kwargs))


@every_pnf
def test_batch_shapes_are_equivalent(name):
    flow, (x, kwargs) = flow_of(name), data_of(name, (2, 3))
    functions = [
        lambda x, **k: flow.decode(flow.encode(x, 1), **k),
        lambda x, **k: flow.project(x, **k),
        lambda x, **k: flow.upscale(flow.encode(x), 0.0, **k),
        lambda x, **k: flow.stage_log_prob(x, **k),
        lambda x, **k: flow.stage_data(x, 1, **k)[1],
    ]
    for function in functions:
        whole = function(x, **kwargs)
        for i in range(2):
            rows = function(x[i], **{k: c[i] for k, c in kwargs.items()})
            single = function(x[i, 2], **{k: c[i, 2] for k, c in kwargs.items()})
            assert rows.shape == whole.shape[1:] and single.shape == whole.shape[2:]
            assert_close(rows, whole[i])
            assert_close(single, whole[i, 2])


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_upscaling_draws_other_details_for_every_event(batch):
    flow = flow_of("pnf_image")
    low = tf.broadcast_to(low_of(flow, 0, ()), [*batch, 2, 2, 1])
    upscaled = flow.upscale(low, seed=[1, 2]).numpy().reshape(-1, 16)
    assert len(np.unique(upscaled[:, 0])) == len(upscaled) == max(1, int(np.prod(batch)))
    assert_close(flow.encode(upscaled.reshape(*batch, *GRID)), low, 1e-12)


@pytest.mark.parametrize("name", ["pnf_image", "pnf_signal", "pnf_flat_stages"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_log_dets_of_low_precision_events_are_float32(name, dtype):
    flow = built(name, "initial", "float32")
    x = tf.cast(ENTRIES[name].data(), dtype)
    terms = flow.stage_log_prob(x)
    assert terms.dtype == tf.float32
    np.testing.assert_allclose(terms, flow.stage_log_prob(tf.cast(x, "float32")), rtol=0.05, atol=0.3)
    assert flow.inverse_log_det_jacobian(x, x.shape.rank - 1).dtype == tf.float32
    for value in (flow.encode(x), flow.project(x), flow.upscale(flow.encode(x), seed=[1, 2]), flow.inverse(x)):
        assert value.dtype == x.dtype
    for k, constant in enumerate([0.0] + [-LN2 * size for size in (64, 128)]):
        # In bfloat16 neither number of pairs times ln 2 would be exact.
        zeros = tf.zeros([1, 16, 16, 1], dtype)
        term = identity_pnf([16, 16, 1], 2).stage_log_prob(zeros)[0, k]
        size = (64, 64, 128)[k]
        assert_close(term, constant - 0.5 * size * np.log(2 * np.pi), 1e-6)


# Gradients and variables.


def leaves(name):
    """A flow of its own, the variables of each stage, and data."""
    flow, created = build(ENTRIES[name], "large")
    stages = [{id(v) for v in stage.trainable_variables} for stage in flow.stages]
    return flow, [[v for v in created if id(v) in ids] for ids in stages], created


@every_pnf
def test_a_term_depends_on_the_parameters_of_its_stage_only(name):
    flow, by_stage, created = leaves(name)
    x, kwargs = data_of(name, (5,))
    assert sum(map(len, by_stage)) == len(created)
    with tf.GradientTape(persistent=True) as tape:
        terms = [tf.reduce_sum(term) for term in tf.unstack(flow.stage_log_prob(x, **kwargs), axis=-1)]
    for k, term in enumerate(terms):
        for j, variables in enumerate(by_stage):
            for v, gradient in zip(variables, tape.gradient(term, variables)):
                if j == k:
                    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, v.name
                else:
                    assert gradient is None or not np.any(gradient), v.name


@every_pnf
@pytest.mark.parametrize("way", ["upscale", "decode"])
def test_upscaling_has_gradients_for_the_later_stages_only(name, way):
    flow, by_stage, _ = leaves(name)
    _, kwargs = data_of(name, (5,))
    for start in range(len(flow.stages)):
        low = low_of(flow, start, (5,))
        with tf.GradientTape() as tape:
            options = {"seed": [1, 2]} if way == "upscale" else {}
            upscaled = getattr(flow, way)(low, **options, **kwargs)
            loss = tf.reduce_sum(upscaled * normal(upscaled.shape, 9))
        for k, gradients in enumerate(tape.gradient(loss, by_stage)):
            for v, gradient in zip(by_stage[k], gradients):
                if k <= start:
                    assert gradient is None, v.name
                elif way == "upscale":
                    assert np.abs(gradient).max() > 0, v.name
                else:
                    assert gradient is None or np.isfinite(gradient).all(), v.name


def test_every_variable_of_nested_stages_is_tracked():
    created = []

    def record(next_creator, **kwargs):
        created.append(next_creator(**kwargs))
        return created[-1]

    with tf.variable_creator_scope(record):
        embedding = dfb.ActNorm(1, dtype="float64")
        detail = dfb.EmbedCondition(image_pnf_detail(2), embedding.inverse, condition_ndims=3)
        flow = dfb.PNF(image_pnf(0, "float64"), [tfb.Chain([detail]), tfb.Scale(tf.Variable(2.0))], [8, 8, 1])
    created = {id(v) for v in created if v.trainable and v.dtype.is_floating}
    assert {id(v) for v in flow.trainable_variables} == created
    assert {id(v) for v in embedding.trainable_variables} < created
    assert {id(v) for v in dfb.Chain([flow]).trainable_variables} == created


def image_pnf_detail(seed):
    """A conditional coupling of a 4x4 image."""
    network = ConditionalMixer(GRID, (*GRID[:2], 2), GRID, seed)
    return dfb.AffineCoupling(network, dfb.masks.Checkerboard(), "tanh", dtype=tf.float64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mode",
    [("pnf_signal", "eager"), ("pnf_signal", "traced"), ("pnf_image_odd", "eager"), ("pnf_image_conditional", "traced")],
)
def test_an_update_is_never_missed(name, mode):
    flow, created = build(ENTRIES[name], "large")
    x, kwargs = data_of(name)
    low, latent = flow.encode(x), ENTRIES[name].latent([3])
    full = distribution(flow, latent.shape[1:])
    values = [tf.constant(0.5 * v.numpy() + 0.3) for v in created]

    def results(x, low, latent, kwargs):
        return [
            full.log_prob(x, bijector_kwargs=kwargs),
            flow.stage_log_prob(x, **kwargs),
            flow.inverse_log_det_per_dim(x, **kwargs),
            flow.inverse(x, **kwargs),
            flow.forward(latent, **kwargs),
            flow.decode(low, **kwargs),
            flow.upscale(low, seed=[1, 2], **kwargs),
            flow.project(x, **kwargs),
        ]

    def function():
        before = results(x, low, latent, kwargs)
        for v, value in zip(created, values):
            v.assign(value)
        return before, results(x, low, latent, kwargs)

    before, after = (tf.function(function, autograph=False) if mode == "traced" else function)()
    expected = results(fresh(x), fresh(low), fresh(latent), {k: fresh(c) for k, c in kwargs.items()})
    for old, new, right in zip(before, after, expected):
        assert_close(new, right)
        assert np.abs(old - right).max() > 1e-3


@pytest.mark.parametrize("kind", ["tfb", "dfb", "network"])
@pytest.mark.parametrize("mode", ["eager", "traced"])
def test_an_update_of_an_embedding_is_never_missed(kind, mode):
    v = tf.Variable(tf.constant([0.5, 1.0], tf.float64))
    actnorm = dfb.ActNorm(2, dtype="float64")
    embedding, variable = {
        "tfb": lambda: (tfb.Shift(v).inverse, v),
        "dfb": lambda: (actnorm.inverse, actnorm.trainable_variables[0]),
        "network": lambda: (lambda c: v * c, v),
    }[kind]()
    shift = dfb.ConditionalTransform(lambda c: c, dfb.transformers.Additive(), event_ndims=1)
    bijector = dfb.EmbedCondition(shift, embedding, condition_ndims=1)
    y, condition = normal([3, 2], 1), normal([3, 2], 2)

    def function():
        with tf.GradientTape(persistent=True) as tape:
            before = bijector.inverse(y, condition=condition)
            variable.assign(variable + 2.0)
            after = bijector.inverse(y, condition=condition)
        return before, after, tape.gradient(after, variable)

    before, after, gradient = (tf.function(function, autograph=False) if mode == "traced" else function)()
    assert_close(after, bijector.inverse(fresh(y), condition=fresh(condition)))
    assert np.abs(before - after).max() > 0.1
    assert np.abs(gradient).max() > 0.1


def test_adaptation_normalises_the_data_and_the_condition_of_every_stage():
    embeddings = [dfb.ActNorm(1, dtype="float64") for _ in range(2)]
    details = [
        dfb.EmbedCondition(
            dfb.Chain([conditional_scaling(shape, k), dfb.ActNorm(1, dtype="float64")]), embedding.inverse, condition_ndims=3
        )
        for k, (shape, embedding) in enumerate(zip([(2, 2, 1), (2, 4, 1)], embeddings))
    ]
    flow = dfb.PNF(dfb.ActNorm(1, dtype="float64"), details, GRID)
    x = 5.0 + 3.0 * normal([40, *GRID], 1)
    with dimflows.adaptation():
        adapted = distribution(flow, [16]).log_prob(x)
    latent = flow.inverse(x).numpy()
    for part in np.split(latent, [4, 8], axis=-1):
        assert_close([part.mean(), part.std()], [0.0, 1.0])
    for k, embedding in enumerate(embeddings):
        embedded = embedding.inverse(flow.encode(x, k)).numpy()
        assert_close([embedded.mean(), embedded.std()], [0.0, 1.0])
    assert_close(adapted, distribution(flow, [16]).log_prob(fresh(x)))


def conditional_scaling(shape, seed):
    """Scales by a function of the condition, of an image's shape."""
    network = Mixer(shape, (*shape[:2], 2), seed)
    return dfb.ConditionalTransform(network, dfb.transformers.Affine("exp"), event_ndims=3)


# What may be a stage, and what a flow may be part of.


def assert_is_a_flow(flow, y, event_shape, tolerance=1e-9, **kwargs):
    """Asserts that both directions undo each other, and that contributions and stages sum to the log-dets."""
    x = flow.inverse(y, **kwargs)
    event_axes = tuple(range(-len(event_shape), 0))
    ildj = flow.inverse_log_det_jacobian(y, len(event_shape), **kwargs)
    assert_close(flow.forward(fresh(x), **kwargs), y, tolerance)
    assert_close(flow.forward_log_det_jacobian(fresh(x), 1, **kwargs), -ildj, tolerance)
    assert_close(np.sum(dimflows.inverse_log_det_per_dim(flow, y, **kwargs), event_axes), ildj, tolerance)
    assert_close(np.sum(dimflows.forward_log_det_per_dim(flow, x, **kwargs), -1), -ildj, tolerance)
    if isinstance(flow, dfb.PNF):
        terms = flow.stage_log_prob(y, **kwargs)
        assert_close(tf.reduce_sum(terms, -1), normal_log_prob(x.numpy()) + ildj, tolerance)


def assert_log_det_is_that_of_the_jacobian(flow, y, event_shape, **kwargs):
    """Asserts that the inverse log-det is that of the dense Jacobian."""
    matrix = jacobian(flow.inverse, y, **kwargs)
    assert_close(flow.inverse_log_det_jacobian(y, len(event_shape), **kwargs), np.linalg.slogdet(matrix)[1])


def test_a_flow_inside_tfps_chain_with_tfps_bijectors():
    flow = flow_of("pnf_image")
    order = np.random.default_rng(0).permutation(16).tolist()
    scale = normal(GRID, 3)
    chain = tfb.Chain([tfb.Scale(tf.exp(scale)), flow, tfb.Permute(order), tfb.Shift(tf.ones([], tf.float64))])
    y = normal([3, *GRID], 1)
    inner = y / tf.exp(scale)
    expected = np.empty([3, 16])
    expected[:, order] = flow.inverse(inner).numpy()
    assert_close(chain.inverse(y), expected - 1.0)
    assert_close(dimflows.inverse_log_det_per_dim(chain, y), flow.inverse_log_det_per_dim(inner) - scale)
    assert_is_a_flow(chain, y, GRID)
    assert_is_a_flow(dfb.Chain([chain]), y, GRID)


def test_a_conditional_flow_inside_chains():
    name = "pnf_image_conditional"
    flow, (y, kwargs) = flow_of(name), data_of(name)
    outer = dfb.Chain([dfb.ActNorm(1, dtype="float64"), dfb.Chain([tfb.Chain([flow, tfb.Identity()], name="inner")])])
    assert_close(outer.inverse(y, **kwargs), flow.inverse(y, **kwargs))
    assert_close(tfb.Chain([flow]).inverse(fresh(y), pnf=kwargs), flow.inverse(y, **kwargs))
    assert_is_a_flow(outer, y, GRID, **kwargs)


def test_a_flow_as_a_level_of_a_multiscale_of_signals():
    factorization = dfb.DimensionFactorization.random([8], 2, seed=1)
    first, last = (
        flow_of("pnf_signal"),
        dfb.PNF(tfb.Scale(tf.constant(2.0, tf.float64)), [vector_stage(2, 5, "float64", 2)], [4]),
    )
    flow = dfb.Multiscale([first, last], factorization)
    y = normal([3, 8], 1)
    assert_is_a_flow(flow, y, [8])
    assert_log_det_is_that_of_the_jacobian(flow, y, [8])
    contributions = flow.likelihood_contributions(y)
    assert_close(contributions[0], first.inverse_log_det_per_dim(y))
    middle = first.inverse(y).numpy()
    ids = dfb.walk.transport(first, tf.range(8), "inverse").numpy()
    kept = np.stack([middle[:, ids.tolist().index(i)] for i in factorization.kept[0]], axis=-1)
    assert_close(flow.split_latent(flow.inverse(y))[0], last.inverse(tf.constant(kept)))


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("latent", ["flat", "grid"])
def test_a_flow_as_a_level_of_a_multiscale_of_images(place, latent):
    factorization = dfb.DimensionFactorization.random(GRID, 2, seed=1)
    detail = dfb.AdditiveCoupling(Mixer((1, 2, 2), (1, 2, 2), 1), dfb.masks.Checkerboard())
    shape = (GRID, (2, 2, 2))[place]
    level = (flow_of("pnf_image"), dfb.PNF(tfb.Identity(), [detail], shape))[place]
    if latent == "grid":
        level = dfb.Chain([level, tfb.Reshape(event_shape_out=[int(np.prod(shape))], event_shape_in=shape)])
    levels = [level, dfb.ActNorm(2, dtype="float64")] if place == 0 else [dfb.ActNorm(1, dtype="float64"), level]
    randomize(dfb.Chain([tfb.Identity(), levels[1 - place]]).trainable_variables)
    flow, y = dfb.Multiscale(levels, factorization), normal([3, *GRID], 1)
    assert_is_a_flow(flow, y, GRID)
    assert_log_det_is_that_of_the_jacobian(flow, y, GRID)
    left = factorization.left[0].ravel()
    first = levels[0].inverse(y).numpy().reshape(3, -1)
    ids = dfb.walk.transport(levels[0], tf.reshape(tf.range(16), [1, *GRID]), "inverse").numpy().ravel().tolist()
    assert_close(flow.inverse(y)[:, 8:], first[:, [ids.index(i) for i in left]])


def test_a_flow_as_the_base_of_another_is_the_flow_of_all_stages():
    for name, outer_details in (("pnf_signal", 1), ("pnf_signal_odd_orthonormal", 2)):
        flow, (y, _) = flow_of(name), data_of(name)
        inner_details = len(flow.stages) - 1 - outer_details
        orthonormal = flow.parameters["orthonormal"]
        inner = dfb.PNF(flow.stages[0], flow.stages[1 : inner_details + 1], flow.stage_shapes[inner_details], orthonormal)
        outer = dfb.PNF(inner, flow.stages[inner_details + 1 :], flow.stage_shapes[-1], orthonormal)
        assert_close(outer.inverse(y), flow.inverse(y))
        assert_close(outer.inverse_log_det_jacobian(y, 1), flow.inverse_log_det_jacobian(y, 1))
        assert_close(outer.inverse_log_det_per_dim(y), flow.inverse_log_det_per_dim(y))
        assert_close(outer.forward_log_det_per_dim(y), flow.forward_log_det_per_dim(y))
        assert_close(outer.stage_log_prob(y)[:, 1:], flow.stage_log_prob(y)[:, inner_details + 1 :])
        assert_is_a_flow(outer, y, flow.stage_shapes[-1])


@pytest.mark.slow
@pytest.mark.parametrize("conditional", [False, True])
def test_a_flow_of_images_as_the_base_of_another(conditional):
    inner = image_pnf(0, "float64", 3 if conditional else None)
    details = [tfb.Identity(), tfb.Scale(tf.constant(2.0, tf.float64))]
    flow, y = dfb.PNF(inner, details, [8, 8, 1]), normal([3, 8, 8, 1], 1)
    kwargs = {"condition": normal([3, 3], 2)} if conditional else {}
    merged = dfb.PNF(inner.stages[0], [*inner.stages[1:], *details], [8, 8, 1])
    assert flow.stage_shapes[0] == GRID and merged.stage_shapes[2:] == flow.stage_shapes
    assert_close(flow.inverse(y, **kwargs), merged.inverse(y, **kwargs))
    assert_close(flow.stage_log_prob(y, **kwargs)[:, 1:], merged.stage_log_prob(y, **kwargs)[:, 3:])
    assert_is_a_flow(flow, y, [8, 8, 1], **kwargs)


def test_a_flow_as_a_detail_of_another():
    inner = dfb.PNF(vector_stage(2, 0, "float64", 4), [vector_stage(2, 1, "float64", 2 + 4)], [4])
    flow, y = dfb.PNF(dfb.ActNorm(4, dtype="float64"), [inner], [8]), normal([3, 8], 1)
    randomize(flow.trainable_variables)
    assert_is_a_flow(flow, y, [8])
    assert_log_det_is_that_of_the_jacobian(flow, y, [8])
    low = low_of(flow, 0)
    assert_close(flow.encode(flow.upscale(low, seed=[1, 2])), low, 1e-12)
    value, given = flow.stage_data(y, 1)
    assert_close(flow.inverse(y)[:, 4:], inner.inverse(value, condition=given))


def test_a_flow_of_images_as_a_detail_whose_condition_is_flattened():
    inner = dfb.PNF(image_stage_given(8, (2, 2, 1), 0), [image_stage_given((2, 2, 1 + 8), (2, 2, 1), 1)], [4, 2, 1])
    detail = dfb.EmbedCondition(inner, lambda low: tf.reshape(low, [-1, 8]), condition_ndims=3)
    flow, y = dfb.PNF(tfb.Identity(), [detail], [8, 2, 1]), normal([3, 8, 2, 1], 1)
    assert_is_a_flow(flow, y, [8, 2, 1])
    assert_log_det_is_that_of_the_jacobian(flow, y, [8, 2, 1])
    low = low_of(flow, 0)
    assert_close(flow.encode(flow.upscale(low, seed=[1, 2])), low, 1e-12)


def image_stage_given(condition_shape, shape, seed):
    """A conditional coupling of an image."""
    condition_shape = (condition_shape,) if isinstance(condition_shape, int) else condition_shape
    network = ConditionalMixer(shape, (*shape[:2], 2 * shape[2]), condition_shape, seed)
    return dfb.AffineCoupling(network, dfb.masks.Checkerboard(), "tanh", dtype=tf.float64)


def test_a_conditional_detail_inside_tfps_chain():
    plain = dfb.PNF(tfb.Identity(), [vector_stage(4, 1, "float64", 4)], [8])
    wrapped = dfb.PNF(tfb.Identity(), [tfb.Chain([plain.stages[1], tfb.Scale(tf.constant(2.0, tf.float64))])], [8])
    y = normal([3, 8], 1)
    expected = plain.inverse(y).numpy() / [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    assert_close(wrapped.inverse(y), expected)
    assert_is_a_flow(wrapped, y, [8])


def test_stages_with_flat_latent_values_of_any_kind():
    flow = dfb.PNF(multiscale_stage(0, "float64"), [tfb.Chain([tfb.Reshape(STAGE, [8]), tfb.Softplus()])], GRID)
    y = tf.constant(np.random.default_rng(0).uniform(size=[3, *GRID]))
    y = tf.sort(y, axis=1, direction="DESCENDING")
    assert flow.inverse(y).shape == (3, 16)
    assert_is_a_flow(flow, y, GRID)


@functools.cache
def recipe_flow():
    """Glow and RealNVP as stages of a flow of 8x8 images, with large random parameters."""
    recipes = dimflows.recipes
    flow = dfb.PNF(
        recipes.glow([4, 4, 1], num_levels=2, depth=1, width=4).bijector,
        [
            recipes.realnvp([4, 4, 1], depth=1, width=4, num_blocks=1, condition_shape=[4, 4, 1]).bijector,
            recipes.glow([8, 4, 1], num_levels=1, depth=1, width=4, condition_shape=[8, 4, 1]).bijector,
            recipes.glow([8, 8, 1], num_levels=1, depth=1, width=4).bijector,
        ],
        [16, 8, 1],
    )
    generator = np.random.default_rng(0)
    for v in flow.trainable_variables:
        v.assign_add(tf.constant(0.1 * generator.normal(size=v.shape), v.dtype))
    return flow


@pytest.mark.slow
def test_recipes_as_stages():
    flow, y = recipe_flow(), normal([3, 16, 8, 1], 1, "float32")
    assert flow.stage_shapes == [(4, 4, 1), (8, 4, 1), (8, 8, 1), (16, 8, 1)]
    assert_is_a_flow(flow, y, [16, 8, 1], 2e-4)
    for k in range(3):
        low = low_of(flow, k, dtype="float32")
        upscaled = flow.upscale(low, seed=[1, 2])
        np.testing.assert_allclose(flow.encode(upscaled, k), low, atol=1e-6 * max(1.0, np.abs(upscaled).max()))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(flow.stage_log_prob(y))
    for v, gradient in zip(flow.trainable_variables, tape.gradient(loss, flow.trainable_variables)):
        assert gradient is not None and np.isfinite(gradient).all(), v.name


def test_pair_axes_of_the_reference_are_those_of_the_shapes():
    for name in PNFS:
        shapes = flow_of(name).stage_shapes
        for k in range(1, len(shapes)):
            expected = list(shapes[k])
            expected[pair_axis(len(shapes) - 1, k, len(expected))] //= 2
            assert tuple(expected) == shapes[k - 1]
