"""Rotations, what they take from data, and the splits and multi-scale flows made of them."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import assert_close, normal

import tfp_dimflows as dimflows

dfb = dimflows.bijectors
tfb, tfd = tfp.bijectors, tfp.distributions


def adapted(bijector, y):
    """What a bijector that adapts to y makes of it."""
    with dimflows.adaptation():
        return bijector.inverse(y).numpy()


def correlated(num, channels, seed=0, shape=()):
    """Vectors with a dense covariance, not centred."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=[num, *shape, channels]) @ generator.normal(size=[channels, channels]) + 3.0


# Rotation.


@pytest.mark.parametrize("matrix", ["random", "haar", "identity", np.eye(8)[::-1]], ids=str)
@pytest.mark.parametrize("trainable", [False, True])
def test_it_is_orthogonal_whatever_the_weights(matrix, trainable):
    rotation = dfb.Rotation(8, matrix, trainable, dtype=tf.float64)
    assert len(rotation.trainable_variables) == trainable
    for variable in rotation.trainable_variables:
        variable.assign(3.0 * normal(variable.shape))
    assert_close(rotation.matrix @ tf.transpose(rotation.matrix), np.eye(8), 1e-12)
    y = normal([5, 8], 2)
    assert_close(rotation.inverse(y), y.numpy() @ rotation.matrix.numpy().T, 1e-12)


def test_it_starts_as_given_and_is_the_cayley_transform_of_its_weights():
    start = np.linalg.qr(np.random.default_rng(1).normal(size=[4, 4]))[0]
    rotation = dfb.Rotation(4, start, trainable=True, dtype=tf.float64)
    assert_close(rotation.matrix, start, 1e-12)
    (below,) = rotation.trainable_variables
    below.assign(tf.range(1.0, 7.0, dtype=tf.float64))
    a = np.array([[0, -1, -2, -4], [1, 0, -3, -5], [2, 3, 0, -6], [4, 5, 6, 0]], float)
    assert_close(rotation.matrix, np.linalg.inv(np.eye(4) + a) @ (np.eye(4) - a) @ start, 1e-10)


def test_the_haar_matrix_is_two_haar_splits():
    image = normal([1, 4, 6, 3])
    rotated = dfb.Rotation(12, "haar", dtype=tf.float64).inverse(dfb.Squeeze().inverse(image)).numpy()
    rows = dfb.HaarSplit(-3, orthonormal=True).split(image)
    parts = [part for half in rows for part in dfb.HaarSplit(-2, orthonormal=True).split(half)]
    assert_close(rotated, np.concatenate(parts, axis=-1), 1e-12)


def test_random_matrices_differ_by_seed_only():
    one, again, other = (dfb.Rotation(3, "random", seed=seed).matrix.numpy() for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=["vectors", "images"])
@pytest.mark.parametrize("trainable", [False, True])
def test_adapted_it_decorrelates_the_leading_first(shape, trainable):
    y = correlated(40, 6, shape=shape)
    rotation = dfb.Rotation(6, trainable=trainable, dtype=tf.float64)
    for variable in rotation.trainable_variables:
        variable.assign(normal(variable.shape))
    x = adapted(rotation, y).reshape(-1, 6)
    covariance = np.cov(x, rowvar=False)
    assert_close(covariance, np.diag(np.diag(covariance)), 1e-8)
    assert (np.diff(np.diag(covariance)) < 0.0).all()
    assert_close(x.mean(axis=0), np.zeros(6), 1e-10)
    assert_close(np.sort(np.diag(covariance)), np.linalg.eigvalsh(np.cov(y.reshape(-1, 6), rowvar=False)), 1e-8)
    assert_close(rotation.forward(rotation.inverse(y)), y, 1e-10)


def test_the_signs_do_not_depend_on_the_data():
    first, second = (dfb.Rotation(5, dtype=tf.float64) for _ in range(2))
    y = correlated(1000, 5)
    adapted(first, y[:500])
    adapted(second, 10.0 - y[500:])
    assert (np.diag(first.matrix.numpy() @ second.matrix.numpy().T) > 0.9).all()
    largest = np.take_along_axis(first.matrix.numpy(), np.abs(first.matrix.numpy()).argmax(axis=1)[:, np.newaxis], axis=1)
    assert (largest > 0.0).all()


def test_constant_and_dependent_channels_come_last():
    y = correlated(50, 5)
    y[:, 1], y[:, 3] = 7.0, y[:, 0] + y[:, 2]
    rotation = dfb.Rotation(5, dtype=tf.float64)
    x = adapted(rotation, y)
    assert_close(x.std(axis=0)[-2:], [0.0, 0.0], 1e-6)
    assert_close(rotation.matrix @ tf.transpose(rotation.matrix), np.eye(5), 1e-10)


def test_leading_rows_span_the_components_near_the_coordinates():
    y = correlated(200, 6)
    components, rotation = dfb.Rotation(6, dtype=tf.float64), dfb.Rotation(6, leading=2, dtype=tf.float64)
    adapted(components, y)
    adapted(rotation, y)
    q, p = rotation.matrix.numpy(), components.matrix.numpy()
    assert_close(q @ q.T, np.eye(6), 1e-10)
    assert_close(q[:2].T @ q[:2], p[:2].T @ p[:2], 1e-8)
    for part, place in ((q[:2], slice(0, 2)), (q[2:], slice(2, 6))):
        own = part[:, place]
        assert_close(own, own.T, 1e-8)  # of all bases of a span the nearest has a symmetric positive overlap
        assert (np.linalg.eigvalsh(own) > 0.0).all()


def test_the_other_direction_adapts_too():
    x = correlated(30, 4)
    rotation = dfb.Rotation(4, dtype=tf.float64)
    with dimflows.adaptation():
        y = rotation.forward(x).numpy()
    covariance = np.cov(y, rowvar=False)
    assert_close(covariance, np.diag(np.diag(covariance)), 1e-8)
    assert (np.diff(np.diag(covariance)) < 0.0).all()
    assert_close(y.mean(axis=0), np.zeros(4), 1e-10)


def test_a_given_matrix_is_not_adapted():
    rotation = dfb.Rotation(4, "random")
    before = rotation.matrix.numpy()
    adapted(rotation, tf.constant(correlated(30, 4), tf.float32))
    np.testing.assert_array_equal(rotation.matrix, before)


def test_too_few_vectors_change_nothing():
    model = dimflows.FlowModel(tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [8]), flow_of_a_rotation(8)))
    before = model.get_weights()
    with pytest.raises(ValueError, match="rotation: got 5 vectors .* at least as many as channels, 8; adapt to more data"):
        model.adapt(tf.constant(correlated(5, 8), tf.float32))
    for weight, value in zip(model.get_weights(), before):
        np.testing.assert_array_equal(weight, value)


@pytest.mark.parametrize(("size", "steps", "used"), [(4, None, 40), (8, None, 80), (8, 3, 30), (2, None, 40)])
def test_as_many_batches_as_components_need(size, steps, used):
    y = correlated(200, size).astype(np.float32)
    make = lambda: dimflows.FlowModel(  # noqa: E731
        tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [size]), flow_of_a_rotation(size))
    )
    model, expected = make(), make()
    model.adapt(tf.data.Dataset.from_tensor_slices(y).batch(10), steps)
    expected.adapt(y[:used])
    np.testing.assert_array_equal(model.encode(y), expected.encode(y))


def test_rotations_of_a_scan_need_as_many_batches():
    flow = dfb.Scan(lambda k: flow_of_a_rotation(8), length=2)
    model = dimflows.FlowModel(tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [8]), flow))
    y = correlated(200, 8).astype(np.float32)
    model.adapt(tf.data.Dataset.from_tensor_slices(y).batch(1))  # four events, as ActNorms need, would be too few
    assert np.abs(np.cov(model.encode(y[:80]), rowvar=False, bias=True) - np.eye(8)).max() < 1e-3


@pytest.mark.filterwarnings("error:FlowModel.adapt")
def test_rotations_alone_are_adapted_without_a_warning():
    flow = dfb.Chain([tfb.Shift(tf.Variable(tf.zeros([4]))), dfb.Rotation(4)])
    model = dimflows.FlowModel(tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [4]), flow))
    y = correlated(40, 4).astype(np.float32)
    model.adapt(y)
    covariance = np.cov(model.encode(y), rowvar=False)
    assert_close(covariance, np.diag(np.diag(covariance)), 1e-4)


def test_few_events_again_and_again_are_few():
    y = correlated(6, 8).astype(np.float32)
    model = dimflows.FlowModel(tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [8]), flow_of_a_rotation(8)))
    with pytest.warns(UserWarning, match="adapt: got 6 different events for up to 8 principal components"):
        model.adapt(tf.data.Dataset.from_tensor_slices(y).repeat().batch(10))
    assert np.abs(model.bijector.bijectors[1].matrix - np.eye(8)).max() > 0.1  # it adapts all the same


def flow_of_a_rotation(size):
    return dfb.Chain([dfb.ActNorm(size), dfb.Rotation(size)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "Rotation: got channels=0, needs a positive integer"),
        ((3, "fourier"), "Rotation: got matrix='fourier', needs one of principal, random, haar, identity"),
        ((3, np.ones([3, 3])), r"Rotation: got a matrix of shape \(3, 3\), needs an orthogonal one, \[3, 3\]"),
        ((3, np.eye(2)), r"Rotation: got a matrix of shape \(2, 2\), needs an orthogonal one, \[3, 3\]"),
        ((6, "random", False, 0, tf.float32, 2), 'Rotation: got leading=2, needs matrix="principal" and 1 to 5 components'),
        ((6, "principal", False, 0, tf.float32, 6), "Rotation: got leading=6, needs"),
        ((6, "principal", False, 0, tf.float32, 1.5), "Rotation: got leading=1.5, needs"),
        ((6, "haar"), 'Rotation: got 6 channels, matrix="haar" needs those of squeezed 2x2 blocks'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        dfb.Rotation(*arguments)
    with pytest.raises(ValueError, match="rotation: got 4 channels, is for 3"):
        dfb.Rotation(3).inverse(tf.zeros([4]))
    with pytest.raises(ValueError, match="rotation: got values of dtype int32, needs real numbers"):
        dfb.Rotation(3, "random").inverse([1, 2, 3])


def test_what_was_taken_from_data_is_saved(tmp_path):
    make = lambda: dimflows.FlowModel(  # noqa: E731
        tfd.TransformedDistribution(tfd.Sample(tfd.Normal(0.0, 1.0), [4]), flow_of_a_rotation(4))
    )
    model, other, y = make(), make(), tf.constant(correlated(50, 4), tf.float32)
    model.adapt(y)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    assert np.abs(model.encode(y) - make().encode(y)).max() > 0.1
    np.testing.assert_array_equal(model.encode(y), other.encode(y))


# Splits, and the codes of flows made of them.


def test_what_is_kept_is_the_principal_code():
    """Of all linear codes of a block that of its principal components has the least squared error."""
    y = correlated(200, 2, shape=(4, 4))
    split = dfb.OrthogonalSplit(2, kept=3, dtype=tf.float64)
    x = adapted(split, y)
    h, rest = split.split(y)
    np.testing.assert_array_equal(np.concatenate([h, rest], axis=-1), split.inverse(y))
    assert x.shape == (200, 2, 2, 8) and h.shape == (200, 2, 2, 3) and rest.shape == (200, 2, 2, 5)
    assert_close(split.merge(h, rest), y, 1e-10)
    mean = rest.numpy().mean(axis=(0, 1, 2))
    error = np.mean(np.sum((split.merge(h, tf.zeros_like(rest) + mean) - y) ** 2, axis=(1, 2, 3)))
    blocks = dfb.Squeeze().inverse(y).numpy().reshape(-1, 8)
    assert_close(error, 4.0 * np.linalg.eigvalsh(np.cov(blocks, rowvar=False, bias=True))[:5].sum(), 1e-6)


def principal_pnf(dtype=tf.float64):
    """Of 4x4 images, two splits of blocks and one of channels."""
    sizes = [(2, 2, 1), (2, 2, 1), (4, 4, 1)]
    splits = [dfb.OrthogonalSplit(2, 1, 1, dtype=dtype), dfb.OrthogonalSplit(1, 2, 2, dtype=dtype)]
    mean = dfb.ConditionalTransform(lambda low: tf.reduce_sum(low, -1, keepdims=True) ** 2, dfb.transformers.Additive(), 3)
    both = dfb.ConditionalTransform(lambda low: tf.sin(low), dfb.transformers.Additive(), 3)
    return dfb.PNF(tfb.Scale(tf.constant(2.0, dtype)), [mean, both], sizes[-1], splits=splits)


def test_a_pnf_of_principal_components_has_linear_codes():
    flow, y = principal_pnf(), correlated(60, 1, shape=(4, 4)) * np.linspace(0.2, 1.0, 16).reshape(4, 4, 1)
    adapted(flow, y)
    assert flow.stage_shapes == [(2, 2, 1), (2, 2, 2), (4, 4, 1)]
    for stage in range(3):
        code = flow.encode(y, stage)
        assert_close(flow.encode(0.3 * y + 0.7 * y[::-1], stage), 0.3 * code + 0.7 * code.numpy()[::-1], 1e-10)
        assert_close(flow.encode(flow.decode(code), stage), code, 1e-10)
        assert_close(flow.encode(flow.upscale(code, seed=1), stage), code, 1e-10)
    projected = flow.project(y)
    assert np.abs(projected - y).max() > 0.1
    assert_close(flow.project(projected), projected, 1e-10)
    log_prob = tfd.Sample(tfd.Normal(tf.zeros([], tf.float64), 1.0), [16]).log_prob(flow.inverse(y))
    assert_close(tf.reduce_sum(flow.stage_log_prob(y), -1), log_prob + flow.inverse_log_det_jacobian(y, 3), 1e-9)
    value, given = flow.stage_data(y, 2)
    assert value.shape == [60, 2, 2, 2] and given.shape == [60, 2, 2, 2]


def test_an_image_may_be_one_block():
    y = correlated(100, 16).reshape(100, 4, 4, 1)
    flow = dfb.PNF(tfb.Identity(), [tfb.Identity()], [4, 4, 1], splits=[dfb.OrthogonalSplit(1, 5, 4, dtype=tf.float64)])
    adapted(flow, y)
    assert flow.stage_shapes == [(1, 1, 5), (4, 4, 1)]
    flat = y.reshape(100, 16)
    leading = np.linalg.eigh(np.cov(flat, rowvar=False))[1][:, :-6:-1]
    code = flow.encode(y).numpy().reshape(100, 5)
    assert_close(np.abs(np.diag(np.corrcoef(code, flat @ leading, rowvar=False)[:5, 5:])), np.ones(5), 1e-8)


def test_the_code_of_whole_images_keeps_the_layout_of_blocks():
    generator = np.random.default_rng(0)
    smooth = generator.normal(size=[400, 2, 4, 1]).repeat(2, axis=1).repeat(2, axis=2).cumsum(axis=1).cumsum(axis=2)
    y = smooth + 0.1 * generator.normal(size=smooth.shape)
    split = dfb.OrthogonalSplit(1, 2, dtype=tf.float64, whole=[4, 8])
    adapted(split, y)
    h, rest = split.split(y)
    assert h.shape == [400, 2, 4, 2] and rest.shape == [400, 2, 4, 2]
    assert_close(split.merge(h, rest), y, 1e-9)
    flat = y.reshape(400, 32)
    leading = np.linalg.eigh(np.cov(flat, rowvar=False))[1][:, 16:]
    reconstructed = split.merge(h, tf.zeros_like(rest)).numpy().reshape(400, 32)
    assert_close(reconstructed, flat.mean(axis=0) + (flat - flat.mean(axis=0)) @ leading @ leading.T, 1e-8)
    blocks = split.rotation.inverse(dfb.Squeeze().inverse(y)).numpy()[..., :2]
    same = np.diag(np.corrcoef(*(part.reshape(400, -1) for part in (h.numpy(), blocks)), rowvar=False)[:16, 16:])
    assert np.median(same) > 0.8
    numbers = normal([1, 4, 8, 1])
    moved = dfb.Squeeze().inverse(numbers).numpy()
    assert_close(dfb.walk.transport(split, numbers, "inverse"), moved, 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dfb.OrthogonalSplit(2, 8), "OrthogonalSplit: got kept=8 of 8 rotated channels, needs 1 to 7"),
        (lambda: dfb.OrthogonalSplit(4, 0, None), "OrthogonalSplit: got kept=0 of 4 rotated channels, needs 1 to 3"),
        (lambda: dfb.OrthogonalSplit(4, 2.0, None), "OrthogonalSplit: got kept=2.0 of 4 rotated channels, needs 1 to 3"),
        (lambda: dfb.OrthogonalSplit(4, 2, None, whole=[2, 2]), r"OrthogonalSplit: got whole=\[2, 2\] for vectors"),
        (
            lambda: dfb.OrthogonalSplit(1, 2, whole=[4, 4]).inverse(tf.zeros([2, 8, 1])),
            r"orthogonal_split: got values of shape \(1, 4, 4\), needs events of shape \[2, 2, 4\]",
        ),
        (
            lambda: dfb.PNF(tfb.Identity(), [tfb.Identity()], [4], splits=dfb.OrthogonalSplit(4, 2, None)),
            "PNF: got orthogonal_split, 1 details and orthonormal=False, needs a split for each detail",
        ),
        (
            lambda: dfb.PNF(tfb.Identity(), [tfb.Identity()] * 2, [4], splits=[dfb.OrthogonalSplit(4, 2, None)]),
            "PNF: got 1 splits, 2 details and orthonormal=False, needs a split for each detail",
        ),
        (
            lambda: dfb.PNF(tfb.Identity(), [tfb.Identity()], [4], True, splits=[dfb.OrthogonalSplit(4, 2, None)]),
            "orthonormal=True, needs a split for each detail, and orthonormal=False",
        ),
        (
            lambda: dfb.PNF(tfb.Identity(), [tfb.Identity()], [4], splits=[dfb.OrthogonalSplit(4, 2)]),
            r"PNF: orthogonal_split is for images, does not fit events of shape \[4\]",
        ),
        (
            lambda: dfb.PNF(tfb.Identity(), [tfb.Identity()], [4], splits=[tfb.Identity()]),
            "as a split, needs a HaarSplit or an OrthogonalSplit",
        ),
        (
            lambda: dfb.PNF(tfb.Identity(), [tfb.Identity()], [2, 4, 3], splits=[dfb.OrthogonalSplit(2, 3)]),
            r"orthogonal_split: got events of shape \[2, 4, 3\], is for 8 rotated channels",
        ),
        (
            lambda: dfb.PrincipalMultiscale([tfb.Identity()] * 2, [4], ["random"]),
            "PrincipalMultiscale: got 1 matrices for 2 levels, needs one for each",
        ),
    ],
)
def test_parts_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_leaves_a_principal_multiscale_flow_is_the_subspace_of_least_variance():
    flow = dfb.PrincipalMultiscale([tfb.Identity()] * 2, [4, 4, 2], dtype=tf.float64)
    deviations = adapted(flow, correlated(100, 2, shape=(4, 4))).std(axis=0)
    kept, left = deviations[:16].reshape(4, 4).mean(axis=0), deviations[16:].reshape(2, 2, 4).mean(axis=(0, 1))
    assert (np.diff(left) < 0.0).all() and left.max() < kept.mean()


def test_the_levels_of_a_principal_multiscale_flow():
    flow = dfb.PrincipalMultiscale([tfb.Identity()] * 3, [8, 16, 2])
    assert [level.bijectors[1].matrix.shape[0] for level in flow.levels] == [8, 16, 32]
    assert flow.factorization == dfb.DimensionFactorization.channels([8, 16, 2], 3)
    flow = dfb.PrincipalMultiscale([tfb.Identity()] * 3, [5], trainable=True)
    assert [level.bijectors[0].matrix.shape[0] for level in flow.levels] == [5, 3, 2]
    assert [v.shape[0] for v in flow.trainable_variables] == [10, 3, 1]
    assert dfb.PrincipalMultiscale([tfb.Identity()], [3]).factorization is None
    with pytest.raises(ValueError, match="height and width divisible by 4"):
        dfb.PrincipalMultiscale([tfb.Identity()] * 3, [2, 4, 2])
