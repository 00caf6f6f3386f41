"""The per-dimension hook on every public bijector of TFP, against autodiff Jacobians in float64."""

import inspect
import zlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras
from registry import slow

import tfp_dimflows as dimflows
from tfp_dimflows.bijectors import conditions, dense, log_dets, walk
from tfp_dimflows.upstream import tfp_glow

tfb = tfp.bijectors

DIRECTIONS = ("inverse", "forward")
OPPOSITE = {"inverse": "forward", "forward": "inverse"}
HOOK = {"inverse": dimflows.inverse_log_det_per_dim, "forward": dimflows.forward_log_det_per_dim}
TRANSPORT = {"inverse": lambda b, t: walk.transport(b, t, "inverse"), "forward": lambda b, t: walk.transport(b, t, "forward")}

both_directions = pytest.mark.parametrize("direction", DIRECTIONS)

BATCH = 2


# Values and parameters: float64, large, from a seed that belongs to the test.

_generator = np.random.default_rng()


@pytest.fixture(autouse=True)
def seed(request):
    global _generator
    _generator = np.random.default_rng(zlib.crc32(request.node.name.encode()))


def normal(*shape, scale=1.5):
    return tf.constant(_generator.normal(scale=scale, size=shape), tf.float64)


def uniform(*shape, low=0.1, high=0.9):
    return tf.constant(_generator.uniform(low, high, size=shape), tf.float64)


def positive(*shape):
    return tf.exp(normal(*shape, scale=0.7))


def signed(*shape):
    return positive(*shape) * _generator.choice([-1.0, 1.0], size=shape)


def lower_triangular(n):
    return tf.linalg.set_diag(normal(n, n), signed(n))


def strictly_upper(n):
    return tf.constant(np.triu(normal(n, n), 1))


def fresh(value):
    """A copy that no cache knows."""
    return tf.nest.map_structure(lambda v: tf.constant(v.numpy()), value)


# Bijectors with networks.


def maf(n, **kwargs):
    shift, log_scale = strictly_upper(n), strictly_upper(n)
    return tfb.MaskedAutoregressiveFlow(
        lambda y: (
            tf.linalg.matvec(shift, y, transpose_a=True),
            tf.sin(tf.linalg.matvec(log_scale, y, transpose_a=True)),
        ),
        **kwargs,
    )


def spline_maf(n):
    matrix = strictly_upper(n)

    def spline_of(y):
        return spline(tf.linalg.matvec(matrix, y, transpose_a=True)[..., None] * tf.constant([1.0, 2.0, -1.0], y.dtype))

    return tfb.MaskedAutoregressiveFlow(bijector_fn=spline_of)


def rows_maf():
    def affine_of(y):
        above = tf.cumsum(y, axis=-2, exclusive=True)
        return tfb.Chain([tfb.Shift(above), tfb.Scale(log_scale=tf.sin(above))])

    return tfb.MaskedAutoregressiveFlow(bijector_fn=affine_of, event_ndims=2)


def spline(parameters):
    sizes = 0.1 + tf.nn.softmax(parameters)
    sizes *= 4.0 / tf.reduce_sum(sizes, axis=-1, keepdims=True)
    return tfb.RationalQuadraticSpline(sizes, sizes[..., ::-1], 0.2 + tf.nn.softplus(parameters[..., 1:]), range_min=-2.0)


def real_nvp(n_kept, n_changed, **kwargs):
    shift, log_scale = normal(n_changed, n_kept), normal(n_changed, n_kept)
    return tfb.RealNVP(
        shift_and_log_scale_fn=lambda x, _: (tf.linalg.matvec(shift, x), 1.5 * tf.sin(tf.linalg.matvec(log_scale, x))),
        **kwargs,
    )


def triangular_real_nvp():
    tril = lower_triangular(3)
    return tfb.RealNVP(2, bijector_fn=lambda x, _: tfb.Chain([tfb.Sinh(), tfb.ScaleMatvecTriL(tril)]))


def additive_real_nvp():
    return tfb.RealNVP(2, shift_and_log_scale_fn=lambda x, _: (tf.reduce_sum(x, axis=-1, keepdims=True), None))


def batch_normalization(training, *shape):
    layer = tf_keras.layers.BatchNormalization(dtype="float64", gamma_constraint=lambda g: tf.nn.relu(g) + 1e-6)
    layer.build(shape)
    layer.moving_mean.assign(normal(shape[-1]))
    layer.moving_variance.assign(positive(shape[-1]))
    layer.gamma.assign(positive(shape[-1]))
    layer.beta.assign(normal(shape[-1]))
    return tfb.BatchNormalization(layer, training=training)


def ffjord(velocity):
    return tfb.FFJORD(
        velocity,
        ode_solve_fn=tfp.math.ode.DormandPrince(rtol=1e-8, atol=1e-8).solve,
        trace_augmentation_fn=tfb.ffjord.trace_jacobian_exact,
        dtype=tf.float64,
    )


def nonlinear_ffjord():
    matrix = normal(3, 3)
    return ffjord(lambda t, state: tf.sin(state @ matrix) * (1.0 + t))


class GlowNetwork(tf.Module):
    """Scale and shift of every pixel's channels, from its neighbours too."""

    def __init__(self, input_shape, output_chan=None):
        super().__init__()
        channels = input_shape[-1]
        self._kernel = tf.Variable(normal(3, 3, channels, 2 * (output_chan or channels), scale=0.5))

    def __call__(self, x):
        return tf.sin(tf.nn.conv2d(x, self._kernel, strides=1, padding="SAME"))


class IdentityNetwork(GlowNetwork):
    def __call__(self, x):
        return tfb.Identity()


def make_glow(network=GlowNetwork, use_actnorm=False, identity_convolutions=False, steps=2):
    glow = tfb.Glow((4, 4, 1), 2, steps, network, network, use_actnorm=use_actnorm, seed=3)
    for part in glow.submodules:
        if isinstance(part, tfp_glow.OneByOneConv):
            n = part._bijector.lower_upper.shape[-1]
            if identity_convolutions:
                part._bijector.lower_upper.assign(tf.eye(n, dtype=tf.float64))
                part._bijector.permutation.assign(tf.range(n))
            else:
                part._bijector.lower_upper.assign(normal(n, n, scale=0.3) + tf.linalg.diag(signed(n)))
    return glow


def full(n):
    return tf.linalg.LinearOperatorFullMatrix(normal(n, n))


# The table.

ELEMENTWISE, TRIANGULAR, MOVE, DENSE, TOTAL = "elementwise", "triangular", "move", "dense", "total"


class Case(NamedTuple):
    kind: str
    make: Any
    x: Any = lambda: normal(BATCH, 4)
    event_ndims: Any = 1
    directions: tuple = DIRECTIONS


def elementwise(make, x=lambda: normal(BATCH, 4), directions=DIRECTIONS):
    return [Case(ELEMENTWISE, make, x, directions=directions)]


def above_zero():
    return positive(BATCH, 4)


def inside_unit():
    return uniform(BATCH, 4)


def five():
    return normal(BATCH, 5)


CASES = {
    "Exp": elementwise(tfb.Exp),
    "Expm1": elementwise(tfb.Expm1),
    "FrechetCDF": elementwise(lambda: tfb.FrechetCDF(-positive(4), positive(4), positive(4)), above_zero),
    "GeneralizedExtremeValueCDF": elementwise(
        lambda: tfb.GeneralizedExtremeValueCDF(-positive(4), positive(4), uniform(4)), above_zero
    ),
    "GeneralizedPareto": elementwise(lambda: tfb.GeneralizedPareto(normal(4), positive(4), positive(4))),
    "GompertzCDF": elementwise(lambda: tfb.GompertzCDF(uniform(4), uniform(4)), inside_unit),
    "GumbelCDF": elementwise(lambda: tfb.GumbelCDF(normal(4), positive(4)), inside_unit),
    "Identity": elementwise(tfb.Identity),
    "Inline": elementwise(
        lambda: tfb.Inline(
            forward_fn=lambda x: x**3,
            inverse_fn=lambda y: tf.sign(y) * tf.abs(y) ** (1 / 3),
            inverse_log_det_jacobian_fn=lambda y: -np.log(3.0) - tf.math.log(tf.abs(y)) * 2 / 3,
            forward_min_event_ndims=0,
        )
    ),
    "KumaraswamyCDF": elementwise(lambda: tfb.KumaraswamyCDF(positive(4), positive(4)), inside_unit),
    "LambertWTail": elementwise(lambda: tfb.LambertWTail(normal(4), positive(4), uniform(4))),
    "Log": elementwise(tfb.Log, above_zero),
    "Log1p": elementwise(tfb.Log1p, above_zero),
    "MoyalCDF": elementwise(lambda: tfb.MoyalCDF(normal(4), positive(4))),
    "NormalCDF": elementwise(tfb.NormalCDF),
    "Power": elementwise(lambda: tfb.Power(uniform(4, low=2.0, high=5.0)), above_zero),
    "PowerTransform": elementwise(lambda: tfb.PowerTransform(0.7), above_zero),
    "RationalQuadraticSpline": elementwise(lambda: spline(normal(4, 3)), lambda: uniform(BATCH, 4, low=-1.9, high=1.9)),
    "RayleighCDF": elementwise(lambda: tfb.RayleighCDF(positive(4)), above_zero, ["forward"]),  # float32 only
    "Reciprocal": elementwise(tfb.Reciprocal),
    "Scale": elementwise(lambda: tfb.Scale(signed(4))) + elementwise(lambda: tfb.Scale(normal())),
    "Shift": elementwise(lambda: tfb.Shift(normal(4))),
    "ShiftedGompertzCDF": elementwise(lambda: tfb.ShiftedGompertzCDF(uniform(4), uniform(4)), above_zero),
    "Sigmoid": elementwise(lambda: tfb.Sigmoid(-positive(4), positive(4))),
    "Sinh": elementwise(tfb.Sinh),
    "SinhArcsinh": elementwise(lambda: tfb.SinhArcsinh(normal(4), positive(4))),
    "SoftClip": elementwise(lambda: tfb.SoftClip(-positive(4), positive(4), uniform(4))),
    "Softfloor": elementwise(lambda: tfb.Softfloor(positive(4)), directions=["forward"]),  # `inverse` is no inverse
    "Softplus": elementwise(lambda: tfb.Softplus(positive(4), low=normal(4))),
    "Softsign": elementwise(tfb.Softsign),
    "Square": elementwise(tfb.Square, above_zero),
    "Tanh": elementwise(tfb.Tanh),
    "WeibullCDF": elementwise(lambda: tfb.WeibullCDF(positive(4), positive(4)), above_zero),
    "Permute": [
        Case(MOVE, lambda: tfb.Permute([2, 0, 3, 1])),
        Case(MOVE, lambda: tfb.Permute([1, 2, 0], axis=-2), lambda: normal(BATCH, 3, 2), 2),
    ],
    "Reshape": [
        Case(MOVE, lambda: tfb.Reshape([2, -1], [3, 4]), lambda: normal(BATCH, 3, 4), 2),
        Case(MOVE, lambda: tfb.Reshape([2, 3]), lambda: normal(BATCH, 6)),
    ],
    "Transpose": [
        Case(MOVE, lambda: tfb.Transpose([2, 0, 1]), lambda: normal(BATCH, 2, 3, 4), 3),
        Case(MOVE, lambda: tfb.Transpose(rightmost_transposed_ndims=2), lambda: normal(BATCH, 2, 3), 2),
    ],
    "Split": [
        Case(MOVE, lambda: tfb.Split([1, 3])),
        Case(MOVE, lambda: tfb.Split(2, axis=-2), lambda: normal(BATCH, 4, 3), 2),
    ],
    "Restructure": [
        Case(
            MOVE,
            lambda: tfb.Restructure({"a": [2, 0], "b": 1}),
            lambda: [normal(BATCH, 2), normal(BATCH, 3), normal(BATCH, 4)],
            [1, 1, 1],
        )
    ],
    "Ascending": [Case(TRIANGULAR, tfb.Ascending)],
    "Cumsum": [
        Case(TRIANGULAR, tfb.Cumsum),
        Case(TRIANGULAR, lambda: tfb.Cumsum(axis=-2), lambda: normal(BATCH, 3, 2), 2),
    ],
    "MaskedAutoregressiveFlow": [
        Case(TRIANGULAR, lambda: maf(4)),
        Case(TRIANGULAR, lambda: maf(4, unroll_loop=True)),
        Case(TRIANGULAR, lambda: spline_maf(4), lambda: uniform(BATCH, 4, low=-1.9, high=1.9)),
        Case(TRIANGULAR, rows_maf, lambda: normal(BATCH, 3, 2), 2),
    ],
    "RealNVP": [
        Case(TRIANGULAR, lambda: real_nvp(3, 2, num_masked=3), five),
        Case(TRIANGULAR, lambda: real_nvp(3, 2, num_masked=-3), five),
        Case(TRIANGULAR, lambda: real_nvp(2, 3, fraction_masked=-0.4), five),
        Case(TRIANGULAR, lambda: real_nvp(0, 5, num_masked=0), five),
        Case(TRIANGULAR, triangular_real_nvp, five),
        Case(TRIANGULAR, additive_real_nvp, five),
    ],
    "ScaleMatvecDiag": [Case(TRIANGULAR, lambda a=a: tfb.ScaleMatvecDiag(signed(4), adjoint=a)) for a in (False, True)],
    "ScaleMatvecTriL": [
        Case(TRIANGULAR, lambda a=a: tfb.ScaleMatvecTriL(lower_triangular(4), adjoint=a)) for a in (False, True)
    ],
    "BatchNormalization": [
        Case(TRIANGULAR, lambda: batch_normalization(False, BATCH, 4)),
        Case(TRIANGULAR, lambda: batch_normalization(False, BATCH, 3, 2, 2), lambda: normal(BATCH, 3, 2, 2), 3),
    ],
    "TransformDiagonal": [
        Case(TRIANGULAR, lambda: tfb.TransformDiagonal(tfb.Sinh()), lambda: normal(BATCH, 3, 3), 2),
        Case(
            TRIANGULAR,
            lambda: tfb.TransformDiagonal(tfb.ScaleMatvecTriL(lower_triangular(3))),
            lambda: normal(BATCH, 3, 3),
            2,
        ),
    ],
    "ScaleMatvecLU": [Case(DENSE, lambda: tfb.ScaleMatvecLU(*tf.linalg.lu(normal(4, 4))))],
    "MatvecLU": [Case(DENSE, lambda: tfb.MatvecLU(*tf.linalg.lu(normal(4, 4))))],
    "ScaleMatvecLinearOperator": [
        Case(kind, lambda make=make, a=a: tfb.ScaleMatvecLinearOperator(make(), adjoint=a))
        for a in (False, True)
        for kind, make in (
            (DENSE, lambda: full(4)),
            (DENSE, lambda: tf.linalg.LinearOperatorFullMatrix(normal(BATCH, 4, 4))),
            (TRIANGULAR, lambda: tf.linalg.LinearOperatorLowerTriangular(lower_triangular(4))),
            (TRIANGULAR, lambda: tf.linalg.LinearOperatorScaledIdentity(4, normal())),
        )
    ],
    "ScaleMatvecLinearOperatorBlock": [
        Case(
            DENSE,
            lambda a=a: tfb.ScaleMatvecLinearOperatorBlock(tf.linalg.LinearOperatorBlockDiag([full(2), full(3)]), a),
            lambda: [normal(BATCH, 2), normal(BATCH, 3)],
            [1, 1],
        )
        for a in (False, True)
    ],
    "Householder": [Case(DENSE, lambda: tfb.Householder(tf.linalg.l2_normalize(normal(4))))],
    "DiscreteCosineTransform": [Case(DENSE, lambda t=t: tfb.DiscreteCosineTransform(t)) for t in (2, 3)],
    "FFJORD": [Case(TOTAL, nonlinear_ffjord, lambda: normal(BATCH, 3))],
    "Chain": [
        Case(TRIANGULAR, lambda: tfb.Chain([])),
        Case(TRIANGULAR, lambda: tfb.Chain([tfb.Sinh(), tfb.ScaleMatvecTriL(lower_triangular(4)), tfb.Scale(signed(4))])),
        Case(TRIANGULAR, lambda: tfb.Chain([tfb.Softplus(), maf(4), tfb.Sinh()])),
    ],
    "Composition": [
        Case(
            TRIANGULAR,
            lambda: tfb.Composition(
                tfb.Chain([tfb.Sinh(), tfb.ScaleMatvecTriL(lower_triangular(4))]), name="wrapper", parameters={}
            ),
        )
    ],
    "Invert": [
        Case(TRIANGULAR, lambda: tfb.Invert(tfb.Chain([tfb.Sinh(), tfb.ScaleMatvecTriL(lower_triangular(4))]))),
        Case(TRIANGULAR, lambda: tfb.Invert(maf(4))),
    ],
    "JointMap": [
        Case(
            TRIANGULAR,
            lambda: tfb.JointMap({"b": maf(3), "a": tfb.Sinh()}),
            lambda: {"a": normal(BATCH, 2), "b": normal(BATCH, 3)},
            {"a": 1, "b": 1},
        )
    ],
    "Blockwise": [
        Case(TRIANGULAR, lambda: tfb.Blockwise([tfb.Sinh(), tfb.ScaleMatvecTriL(lower_triangular(3))], [2, 3]), five),
        Case(TRIANGULAR, lambda: tfb.Blockwise([maf(3), tfb.Sinh()], [3, 2]), five),
    ],
    "Glow": [Case(TOTAL, lambda: make_glow(steps=1), lambda: normal(BATCH, 16))],
}

# Not public, but what `tfb.Glow` is made of.


def one_by_one_conv():
    convolution = tfp_glow.OneByOneConv(4, seed=1, dtype=tf.float64)
    convolution._bijector.lower_upper.assign(normal(4, 4))
    return convolution


PARTS_OF_GLOW = {
    "ActivationNormalization": [
        Case(TRIANGULAR, lambda: tfp_glow.ActivationNormalization(4, tf.float64), lambda: normal(BATCH, 2, 2, 4), 3)
    ],
    "Expand": [Case(MOVE, lambda: tfp_glow.Expand([2, 3, 8]), lambda: normal(BATCH, 2, 3, 8), 3)],
    "ExitBijector": [
        Case(
            TRIANGULAR,
            lambda: tfp_glow.ExitBijector((2, 2, 7), (2, 2, 3), GlowNetwork),
            lambda: normal(BATCH, 2, 2, 7),
            3,
        )
    ],
    "GlowBlock": [
        Case(
            TOTAL,
            lambda: tfp_glow.GlowBlock((2, 2, 4), 2, GlowNetwork, True, tfp.util.SeedStream(3, "")),
            lambda: normal(BATCH, 2, 2, 4),
            3,
        )
    ],
    "OneByOneConv": [Case(DENSE, one_by_one_conv, lambda: normal(BATCH, 2, 2, 4), 3)],
}

REFUSED = {
    "AbsoluteValue": (tfb.AbsoluteValue, [3]),
    "CholeskyOuterProduct": (tfb.CholeskyOuterProduct, [2, 2]),
    "CholeskyToInvCholesky": (tfb.CholeskyToInvCholesky, [2, 2]),
    "CorrelationCholesky": (tfb.CorrelationCholesky, [3]),
    "FillScaleTriL": (tfb.FillScaleTriL, [3]),
    "FillTriangular": (tfb.FillTriangular, [3]),
    "IteratedSigmoidCentered": (tfb.IteratedSigmoidCentered, [3]),
    "MatrixInverseTriL": (tfb.MatrixInverseTriL, [2, 2]),
    "Pad": (tfb.Pad, [3]),
    "SoftmaxCentered": (tfb.SoftmaxCentered, [3]),
    "UnitVector": (tfb.UnitVector, [3]),
}

ABSTRACT = {"Bijector", "AutoCompositeTensorBijector"}


# A solver, and a loop over splines.
LONG = [("FFJORD", 0, "inverse"), ("FFJORD", 0, "forward"), ("MaskedAutoregressiveFlow", 2, "forward")]

every_case = pytest.mark.parametrize(
    ("case", "direction"),
    [
        (slow if (name, i, direction) in LONG else pytest.param)(case, direction, id=f"{name}-{i}-{direction}")
        for name, listed in (CASES | PARTS_OF_GLOW).items()
        for i, case in enumerate(listed)
        for direction in case.directions
    ],
)


def instance(case, direction):
    """The bijector, and an argument for the direction with its event_ndims."""
    bijector, x = case.make(), case.x()
    if direction == "forward":
        return bijector, x, case.event_ndims
    return bijector, fresh(bijector.forward(x)), bijector.forward_event_ndims(case.event_ndims)


# Jacobians. The batch counts as a part of the event, so they are block-diagonal.


def flat(value):
    return np.concatenate([np.ravel(v) for v in tf.nest.flatten(value)])


def jacobian(bijector, direction, value):
    """Row: dimension of the result; column: dimension of the argument."""
    arguments = tf.nest.flatten(fresh(value))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(arguments)
        result = getattr(bijector, direction)(tf.nest.pack_sequence_as(value, arguments))
        result = tf.concat([tf.reshape(r, [-1]) for r in tf.nest.flatten(result)], axis=0)
    blocks = tape.jacobian(result, arguments, experimental_use_pfor=False, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return np.concatenate([np.reshape(b, [result.shape[0], -1]) for b in blocks], axis=1)


def log_of_polar_factor(matrix):
    """The diagonal of log (matrix^T matrix)^(1/2)."""
    _, singular_values, v = np.linalg.svd(matrix)
    return np.square(v.T) @ np.log(singular_values)


def ids(value):
    """Numbers the dimensions, in a structure like `value`."""
    sizes = [tf.size(v).numpy() for v in tf.nest.flatten(value)]
    starts = np.cumsum([0, *sizes])
    parts = [tf.reshape(tf.range(s, s + n), v.shape) for s, n, v in zip(starts, sizes, tf.nest.flatten(value))]
    return tf.nest.pack_sequence_as(value, parts)


def as_float(value):
    return tf.nest.map_structure(lambda v: tf.cast(v, tf.float64), value)


def sum_event(per_dim, event_ndims):
    parts = zip(tf.nest.flatten(per_dim), tf.nest.flatten(event_ndims))
    return sum(np.sum(d, axis=tuple(range(-n, 0))) for d, n in parts)


# One bijector of every class.


def test_table_lists_every_public_bijector():
    public = {name for name, cls in vars(tfb).items() if inspect.isclass(cls) and issubclass(cls, tfb.Bijector)}
    assert public == set(CASES) | set(REFUSED) | ABSTRACT
    assert not set(CASES) & set(REFUSED)


@every_case
def test_rule(case, direction):
    """One Jacobian serves all that is said of a bijector of TFP's."""
    bijector, value, event_ndims = instance(case, direction)
    log_det = HOOK[direction](bijector, fresh(value))
    tf.nest.map_structure(lambda d, v: d.shape.assert_is_compatible_with(v.shape), log_det, value)
    assert all(d.dtype == tf.float64 for d in tf.nest.flatten(log_det))
    total = sum_event(log_det, event_ndims)
    assert total.shape == (BATCH,)
    expected = getattr(bijector, f"{direction}_log_det_jacobian")(fresh(value), event_ndims)
    np.testing.assert_allclose(total, np.broadcast_to(expected, total.shape), rtol=1e-8, atol=1e-9)
    if isinstance(bijector, tfb.FFJORD):
        return  # autodiff through the solver takes minutes; FFJORD is compared with a quadrature below
    matrix = jacobian(bijector, direction, value)
    np.testing.assert_allclose(total.sum(), np.linalg.slogdet(matrix)[1], rtol=1e-6, atol=1e-7)
    assert_attribution(case.kind, flat(log_det), matrix)
    if case.kind == MOVE:
        assert_moves(bijector, direction, ids(value), matrix)
    elif case.kind != TOTAL:
        tf.nest.map_structure(np.testing.assert_array_equal, TRANSPORT[direction](bijector, ids(value)), ids(value))


def assert_attribution(kind, log_det, matrix):
    """Contributions of dimensions that belong to the Jacobian."""
    if kind == ELEMENTWISE:
        np.testing.assert_array_equal(matrix, np.diag(np.diag(matrix)))
    if kind in (ELEMENTWISE, TRIANGULAR):
        np.testing.assert_allclose(log_det, np.log(np.abs(np.diag(matrix))), rtol=1e-6, atol=1e-7)
    elif kind == DENSE:
        np.testing.assert_allclose(log_det, log_of_polar_factor(matrix), rtol=1e-6, atol=1e-8)
    elif kind == MOVE:
        np.testing.assert_array_equal(log_det, 0.0)


def assert_moves(bijector, direction, numbers, matrix):
    """Numbers move as values do, and back."""
    moved = TRANSPORT[direction](bijector, numbers)
    assert all(m.dtype.is_integer for m in tf.nest.flatten(moved))
    np.testing.assert_array_equal(flat(moved), matrix @ flat(numbers))
    back = TRANSPORT[OPPOSITE[direction]](bijector, moved)
    tf.nest.map_structure(np.testing.assert_array_equal, back, numbers)


# Compositions with moves. TFP's own pass through the moves alone says where every dimension goes.


def vector_flow(make):
    return tfb.Chain(
        [
            make(lambda: tfb.Scale(signed(5))),
            tfb.Permute([1, 2, 3, 4, 0]),
            make(tfb.Sinh),
            make(lambda: real_nvp(2, 3, num_masked=2)),
            tfb.Permute([3, 0, 4, 2, 1]),
            make(lambda: tfb.ScaleMatvecDiag(signed(5))),
        ]
    ), [5]


def image_flow(make):
    return tfb.Chain(
        [
            make(lambda: tfb.Scale(signed(4, 2, 3))),
            tfb.Transpose([1, 2, 0]),
            make(lambda: tfb.Scale(signed(3, 4, 2))),
            tfb.Reshape([3, 4, 2], [6, 4]),
            tfb.Transpose([1, 0]),
            make(lambda: maf(6)),
            tfb.Permute([2, 0, 3, 1], axis=-2),
            tfb.Reshape([4, 6]),
            make(lambda: tfb.Scale(signed(24))),
        ]
    ), [24]


def nested_flow(make):
    inner = tfb.Chain([tfb.Permute([2, 0, 1]), make(lambda: tfb.ScaleMatvecTriL(lower_triangular(3)))])
    cycle = tfb.Permute([1, 2, 3, 4, 0])
    return tfb.Chain(
        [
            cycle,
            make(lambda: tfb.Scale(signed(5))),
            tfb.Invert(tfb.Chain([cycle, tfb.Blockwise([inner, tfb.Chain([tfb.Permute([1, 0]), make(tfb.Sinh)])], [3, 2])])),
            cycle,
            make(lambda: tfb.Scale(signed(5))),
        ]
    ), [5]


def structured_flow(make):
    return tfb.Chain(
        [
            tfb.Invert(tfb.Split([2, 3])),
            tfb.JointMap([make(lambda: tfb.Scale(signed(2))), make(tfb.Sinh)]),
            tfb.Invert(tfb.Restructure({"long": 1, "short": 0})),
            tfb.JointMap(
                {
                    "short": tfb.Chain([tfb.Permute([1, 0]), make(lambda: tfb.ScaleMatvecTriL(lower_triangular(2)))]),
                    "long": tfb.Invert(tfb.Chain([make(lambda: real_nvp(1, 2, num_masked=1)), tfb.Permute([1, 2, 0])])),
                }
            ),
            tfb.Restructure({"long": 0, "short": 1}),
            tfb.Split([3, 2]),
            tfb.Permute([2, 4, 1, 0, 3]),
            make(lambda: tfb.Scale(signed(5))),
        ]
    ), [5]


def matrix_flow(make):
    diagonal = tfb.Chain([tfb.Permute([1, 2, 0]), make(lambda: tfb.ScaleMatvecTriL(lower_triangular(3)))])
    return tfb.Chain(
        [
            make(lambda: tfb.Scale(signed(3, 3))),
            tfb.TransformDiagonal(diagonal),
            tfb.Permute([1, 2, 0], axis=-2),
            make(lambda: tfb.Scale(signed(3, 3))),
        ]
    ), [3, 3]


def glow_flow(make):
    # Without 1x1 convolutions, Glow is triangular in one order throughout.
    is_trivial = isinstance(make(tfb.Sinh), tfb.Identity)
    return make_glow(IdentityNetwork if is_trivial else GlowNetwork, identity_convolutions=True), [16]


FLOWS = [vector_flow, image_flow, nested_flow, structured_flow, matrix_flow, glow_flow]


@pytest.mark.parametrize("flow", FLOWS)
def test_contributions_land_on_their_dimensions(flow):
    bijector, shape = flow(lambda make: make())
    moves, _ = flow(lambda make: tfb.Identity())
    x = normal(*([1, *shape] if flow is glow_flow else shape), scale=1.0)
    y = fresh(bijector.forward(x))
    place_in_x = flat(as_float(moves.forward(as_float(ids(x))))).astype(int)  # where each dimension of y comes from
    columns = np.arange(len(place_in_x))

    matrix = jacobian(bijector, "inverse", y)
    expected = np.log(np.abs(matrix[place_in_x, columns]))
    np.testing.assert_allclose(flat(HOOK["inverse"](bijector, fresh(y))), expected, rtol=1e-6, atol=1e-7)

    matrix = jacobian(bijector, "forward", x)
    place_in_y = np.argsort(place_in_x)
    expected = np.log(np.abs(matrix[place_in_y, columns]))
    np.testing.assert_allclose(flat(HOOK["forward"](bijector, fresh(x))), expected, rtol=1e-6, atol=1e-7)

    np.testing.assert_array_equal(flat(TRANSPORT["forward"](bijector, ids(x))), place_in_x)
    np.testing.assert_array_equal(flat(TRANSPORT["inverse"](bijector, ids(y))), place_in_y)


def test_explicit_location():
    log_scale = np.log([1.0, 2.0, 4.0])
    chain = tfb.Chain([tfb.Permute([1, 2, 0]), tfb.Scale(np.exp(log_scale))])  # y = (2 x_1, 4 x_2, 1 x_0)
    np.testing.assert_allclose(HOOK["inverse"](chain, np.zeros(3)), -log_scale[[1, 2, 0]], atol=1e-12)
    np.testing.assert_allclose(HOOK["forward"](chain, np.zeros(3)), log_scale, atol=1e-12)
    chain = tfb.Chain([tfb.Scale(np.exp(log_scale)), tfb.Permute([1, 2, 0])])  # y = (1 x_1, 2 x_2, 4 x_0)
    np.testing.assert_allclose(HOOK["inverse"](chain, np.zeros(3)), -log_scale, atol=1e-12)
    np.testing.assert_allclose(HOOK["forward"](chain, np.zeros(3)), log_scale[[2, 0, 1]], atol=1e-12)


@both_directions
def test_one_instance_twice_in_a_chain(direction):
    permute, tril = tfb.Permute([1, 2, 0]), tfb.Chain([tfb.Sinh(), tfb.Scale(signed(3))])
    chain = tfb.Chain([tril, permute, tril])
    value = normal(BATCH, 3, scale=0.5)
    matrix = jacobian(chain, direction, value)
    expected = np.log(np.max(np.abs(matrix), axis=0))
    np.testing.assert_allclose(flat(HOOK[direction](chain, value)), expected, rtol=1e-8)


# Structures.


def test_structures_are_taken_as_tfp_takes_them():
    joint = tfb.JointMap((tfb.Exp(), tfb.Scale(tf.constant(2.0, tf.float64))))
    values = [normal(2), normal(3)]
    as_tuple, as_list = HOOK["forward"](joint, tuple(values)), HOOK["forward"](joint, values)
    assert isinstance(as_tuple, tuple)
    np.testing.assert_array_equal(flat(as_list), flat(as_tuple))
    np.testing.assert_allclose(flat(as_tuple), np.concatenate([values[0], np.full(3, np.log(2.0))]))
    np.testing.assert_allclose(HOOK["forward"](tfb.Exp(), [1.0, 2.0]), [1.0, 2.0])


@both_directions
def test_multipart_parts_of_a_joint_map(direction):
    joint = tfb.JointMap([tfb.Chain([tfb.Split([1, 2]), tfb.Sinh()]), tfb.Sinh()])
    value = [normal(3), normal(2)] if direction == "forward" else [[normal(1), normal(2)], normal(2)]
    log_det = HOOK[direction](joint, value)
    tf.nest.assert_same_structure(log_det, value)
    np.testing.assert_allclose(flat(log_det), np.log(np.max(np.abs(jacobian(joint, direction, value)), axis=0)))


@both_directions
def test_block_triangular_operator_is_polar_within_its_blocks(direction):
    a, b, c = full(2), tf.linalg.LinearOperatorFullMatrix(normal(3, 2)), full(3)
    bijector = tfb.ScaleMatvecLinearOperatorBlock(tf.linalg.LinearOperatorBlockLowerTriangular([[a], [b, c]]))
    value = [normal(2), normal(3)]
    matrix = jacobian(bijector, direction, value)
    expected = np.concatenate([log_of_polar_factor(matrix[:2, :2]), log_of_polar_factor(matrix[2:, 2:])])
    np.testing.assert_allclose(flat(HOOK[direction](bijector, value)), expected, rtol=1e-7)


# Particular classes.


@pytest.mark.slow
def test_linear_ffjord_gives_the_diagonal():
    matrix = normal(3, 3)
    flow = ffjord(lambda t, state: tf.matmul(state, matrix, transpose_b=True))
    np.testing.assert_allclose(HOOK["forward"](flow, normal(2, 3)), [np.diag(matrix)] * 2, atol=1e-6)
    np.testing.assert_allclose(HOOK["inverse"](flow, normal(2, 3)), [-np.diag(matrix)] * 2, atol=1e-6)


@pytest.mark.slow
@both_directions
def test_ffjord_is_the_integrated_diagonal(direction):
    matrix = normal(3, 3, scale=0.7)
    flow = ffjord(lambda t, state: tf.sin(state @ matrix))
    value = normal(2, 3)
    steps = 2000
    h = (1.0 if direction == "forward" else -1.0) / steps
    state, expected = value.numpy(), 0.0
    for _ in range(steps):
        middle = state + 0.5 * h * np.sin(state @ matrix)
        expected += h * np.cos(middle @ matrix) * np.diag(matrix)
        state = state + h * np.sin(middle @ matrix)
    np.testing.assert_allclose(HOOK[direction](flow, value), expected, atol=1e-5)


def test_rayleigh_inverse():
    y = uniform(4).numpy().astype(np.float32)
    expected = np.log(2.0 / ((1 - y) * np.sqrt(-2 * np.log1p(-y))))
    np.testing.assert_allclose(HOOK["inverse"](tfb.RayleighCDF(2.0), y), expected, rtol=1e-5)


def test_softfloor_inverse():
    bijector, y = tfb.Softfloor(positive(4)), normal(4)
    np.testing.assert_array_equal(HOOK["inverse"](bijector, y), bijector.inverse_log_det_jacobian(fresh(y), 0))


def test_batch_normalization_in_training():
    bijector, y = batch_normalization(True, 5, 4), normal(5, 4)
    layer = bijector.batchnorm
    moving_mean = layer.moving_mean.numpy()
    log_det = HOOK["inverse"](bijector, y)
    updated = layer.momentum * moving_mean + (1 - layer.momentum) * np.mean(y, axis=0)
    np.testing.assert_allclose(layer.moving_mean, updated, rtol=1e-7)
    expected = np.log(layer.gamma) - 0.5 * np.log(np.var(y, axis=0) + layer.epsilon)
    np.testing.assert_allclose(log_det, np.broadcast_to(expected, [5, 4]), rtol=1e-10)
    np.testing.assert_allclose(np.sum(log_det[0]), bijector.inverse_log_det_jacobian(fresh(y)), rtol=1e-10)


def test_one_network_evaluation_per_pass():
    calls = []

    def counted(network):
        return lambda *args: calls.append(1) or network(*args)

    flows = [
        real_nvp(2, 3, num_masked=2),
        tfb.RealNVP(2, bijector_fn=counted(lambda x, n: tfb.Scale(tf.exp(x[..., :1]))), name="nvp"),
        tfb.MaskedAutoregressiveFlow(bijector_fn=counted(lambda y: tfb.Scale(log_scale=tf.cumsum(y, -1, exclusive=True)))),
    ]
    HOOK["inverse"](tfb.Chain(flows), normal(BATCH, 5, scale=0.1))
    assert len(calls) == 2


@both_directions
def test_glow_with_activation_normalization(direction):
    glow = make_glow(use_actnorm=True, steps=1)
    value = normal(BATCH, 4, 4, 1) if direction == "inverse" else normal(BATCH, 16)
    first = HOOK[direction](glow, value)  # this call initialises from the data
    for log_det in (first, HOOK[direction](glow, value)):
        assert log_det.shape == value.shape
        expected = getattr(glow, f"{direction}_log_det_jacobian")(fresh(value))
        np.testing.assert_allclose(np.sum(log_det, axis=tuple(range(1, len(value.shape)))), expected, rtol=1e-8)


# What has no decomposition.


class Unknown(tfb.Bijector):
    def __init__(self, name="unknown"):
        super().__init__(forward_min_event_ndims=1, parameters=dict(locals()), name=name)


class TwoToOne(tfb.Bijector):
    _is_injective = False

    def __init__(self):
        super().__init__(forward_min_event_ndims=0, parameters={}, name="two_to_one")


class UnknownComposition(tfb.Composition):
    def __init__(self):
        super().__init__([tfb.Exp()], "unknown_composition", {}, forward_min_event_ndims=0, inverse_min_event_ndims=0)

    def _walk_forward(self, step_fn, x, **kwargs):
        return step_fn(self.bijectors[0], x)

    def _walk_inverse(self, step_fn, y, **kwargs):
        return step_fn(self.bijectors[0], y)


def assert_refused(bijector, value, name):
    for ask in (*HOOK.values(), *TRANSPORT.values()):
        with pytest.raises(NotImplementedError, match=rf"\b{name}\b.*register_log_det_per_dim\({name}\)"):
            ask(bijector, value)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, shape = REFUSED[name]
    x = uniform(*shape).numpy().astype(np.float32)
    bijector = make()
    with pytest.raises(NotImplementedError, match=rf"\b{name}\b.*register_log_det_per_dim\({name}\)"):
        HOOK["inverse"](bijector, bijector.forward(x))
    assert_refused(bijector, x, name)
    assert_refused(tfb.Chain([tfb.Exp(), bijector]), x, name)
    assert_refused(tfb.JointMap([bijector, tfb.Exp()]), [x, x], name)
    if name != "AbsoluteValue":  # which TFP does not invert
        assert_refused(tfb.Invert(bijector), x, name)


def test_unknown_classes_are_refused():
    x = tf.zeros([3])
    assert_refused(Unknown(), x, "Unknown")
    assert_refused(tfb.Blockwise([Unknown(), tfb.Exp()], [2, 1]), x, "Unknown")
    assert_refused(UnknownComposition(), x, "UnknownComposition")
    assert_refused(TwoToOne(), x, "TwoToOne")
    assert_refused(tfb.Inline(tf.sort, tf.sort, tf.zeros_like, forward_min_event_ndims=1), x, "Inline")
    assert_refused(tfb.TransformDiagonal(Unknown()), tf.eye(2), "Unknown")


# A user's own classes.


class Funnel(tfb.Bijector):
    """y = (x_0, x_1 exp(x_0), x_2 exp(x_0), ...)."""

    def __init__(self, power=1.0, name="funnel"):
        self._power = power
        super().__init__(forward_min_event_ndims=1, parameters=dict(locals()), name=name)

    def _forward(self, x, power=None):
        return tf.concat([x[..., :1], x[..., 1:] * tf.exp((power or self._power) * x[..., :1])], axis=-1)

    def _inverse(self, y, power=None):
        return tf.concat([y[..., :1], y[..., 1:] * tf.exp(-(power or self._power) * y[..., :1])], axis=-1)


class SquaredFunnel(Funnel):
    def __init__(self):
        super().__init__(power=2.0)


def funnel_log_det(funnel, y, power=None):
    return tf.concat([tf.zeros_like(y[..., :1]), -(power or funnel._power) * y[..., :1] * tf.ones_like(y[..., 1:])], -1)


@both_directions
def test_registered_classes(direction):
    value = normal(BATCH, 3, scale=0.5)
    if direction == "inverse":
        assert dimflows.register_log_det_per_dim(Funnel)(funnel_log_det) is funnel_log_det
    else:
        dimflows.register_log_det_per_dim(Funnel)(funnel_log_det)
    for funnel in (Funnel(), SquaredFunnel(), tfb.Invert(SquaredFunnel())):
        expected = np.log(np.abs(np.diag(jacobian(funnel, direction, value))))
        np.testing.assert_allclose(flat(HOOK[direction](funnel, value)), expected, rtol=1e-10)
        np.testing.assert_array_equal(TRANSPORT[direction](funnel, ids(value)), ids(value))
    chain = tfb.Chain([tfb.Permute([1, 2, 0]), Funnel(name="f"), tfb.Permute([2, 0, 1])])  # the permutations cancel
    with_power = HOOK[direction](chain, value, f={"power": 3.0})
    zero = tf.zeros_like(value[..., :1])
    x_0 = value[..., -1:] if direction == "inverse" else value[..., 2:]
    sign = -3.0 if direction == "inverse" else 3.0
    expected = tf.concat([sign * x_0, sign * x_0, zero], -1)
    np.testing.assert_allclose(with_power, expected, rtol=1e-12)


def test_flow_bijectors_are_not_registered():
    with pytest.raises(TypeError, match="Conditioned"):
        dimflows.register_log_det_per_dim(Conditioned)


def test_a_users_elementwise_class_needs_no_rule():
    class Cube(tfb.Bijector):
        def __init__(self):
            super().__init__(forward_min_event_ndims=0, parameters={}, name="cube")

        def _forward(self, x):
            return x**3

        def _inverse(self, y):
            return tf.sign(y) * tf.abs(y) ** (1 / 3)

        def _forward_log_det_jacobian(self, x):
            return tf.math.log(3.0 * x**2)

    x = normal(4)
    np.testing.assert_allclose(HOOK["forward"](Cube(), x), np.log(3.0 * x**2))
    np.testing.assert_allclose(HOOK["inverse"](Cube(), x**3), -np.log(3.0 * x**2), rtol=1e-10)


# Conditions.


class Conditioned(dimflows.bijectors.FlowBijector):
    """y = x exp(scale * condition), each dimension with its own scale."""

    def __init__(self, scale, name):
        self._scale = scale
        super().__init__(forward_min_event_ndims=1, parameters=dict(locals()), name=name)

    @property
    def uses_condition(self):
        return True

    def _forward_and_log_det_per_dim(self, x, condition):
        log_scale = self._scale * condition
        return x * tf.exp(log_scale), log_scale

    def _inverse_and_log_det_per_dim(self, y, condition):
        log_scale = self._scale * condition
        return y * tf.exp(-log_scale), -log_scale


class Unconditioned(Conditioned):
    @property
    def uses_condition(self):
        return False


@both_directions
def test_condition_reaches_every_part(direction):
    a, b, c, d = normal(5), normal(3), normal(2), normal(3)
    flow = tfb.Chain(
        [
            tfb.Invert(Conditioned(a, "part_a")),
            tfb.Permute([1, 2, 3, 4, 0]),
            tfb.Blockwise([tfb.Invert(tfb.Chain([Conditioned(b, "part_b"), tfb.Permute([1, 2, 0])])), tfb.Exp()], [3, 2]),
            tfb.Invert(tfb.Split([2, 3])),
            tfb.JointMap([Conditioned(c, "part_c"), tfb.Composition(tfb.Chain([Conditioned(d, "part_d")]), "wrapper", {})]),
            tfb.Split([2, 3]),
        ]
    )
    condition = tf.constant(0.7, tf.float64)
    kwargs = conditions.condition_kwargs(flow, condition)

    def fixed(log_scale):
        return tfb.Scale(log_scale=condition * log_scale)

    plain = tfb.Chain(
        [
            tfb.Invert(fixed(a)),
            tfb.Permute([1, 2, 3, 4, 0]),
            tfb.Blockwise([tfb.Invert(tfb.Chain([fixed(b), tfb.Permute([1, 2, 0])])), tfb.Exp()], [3, 2]),
            tfb.Blockwise([fixed(c), fixed(d)], [2, 3]),
        ]
    )
    value = positive(BATCH, 5)
    np.testing.assert_allclose(getattr(flow, direction)(value, **kwargs), getattr(plain, direction)(value), rtol=1e-10)
    name = f"{direction}_log_det_jacobian"
    np.testing.assert_allclose(
        getattr(flow, name)(fresh(value), 1, **kwargs), getattr(plain, name)(fresh(value), 1), rtol=1e-10
    )
    log_det = HOOK[direction](flow, value, **kwargs)
    np.testing.assert_allclose(log_det, HOOK[direction](plain, value), rtol=1e-10, atol=1e-10)
    other = HOOK[direction](flow, value, **conditions.condition_kwargs(flow, 2.0 * condition))
    assert np.min(np.abs(other - log_det)) > 1e-3


def test_condition_kwargs():
    assert conditions.condition_kwargs(tfb.Chain([tfb.Exp(), Conditioned(1.0, "a")]), None) == {}
    assert conditions.condition_kwargs(tfb.Chain([tfb.Exp(), Unconditioned(1.0, "a")]), 1.0) == {}
    twice = tfb.Chain([Conditioned(1.0, "a"), tfb.Invert(tfb.Invert(Conditioned(2.0, "a"), name="b"), name="a")])
    assert conditions.condition_kwargs(twice, 1.0) == {"a": {"condition": 1.0}}
    clash = tfb.Chain([Conditioned(1.0, "a"), tfb.Exp(), Unconditioned(1.0, "a")], name="outer")
    with pytest.raises(ValueError, match="outer.*'a'"):
        conditions.condition_kwargs(clash, 1.0)


# Freshness and execution regimes.


class VariableFlow(tf.Module):
    def __init__(self):
        super().__init__()
        self.scale = tf.Variable(normal(4))
        self.permutation = tf.Variable([1, 2, 3, 0])
        scales = tf.Variable(normal(4))
        self.chain = tfb.Chain(
            [
                tfb.Invert(tfb.Chain([maf(4), tfb.Scale(log_scale=self.scale)])),
                tfb.Permute(self.permutation),
                tfb.Blockwise(
                    [
                        tfb.RealNVP(1, shift_and_log_scale_fn=lambda x, _: (x, x * self.scale[:1])),
                        tfb.Scale(log_scale=self.scale[:2] * 1.0),
                    ],
                    [2, 2],
                ),
                tfb.MaskedAutoregressiveFlow(lambda y: (None, tf.cumsum(y * self.scale, axis=-1, exclusive=True))),
                tfb.Scale(log_scale=scales),
            ]
        )


@both_directions
def test_fresh_after_an_update_in_eager_mode(direction):
    flow, value = VariableFlow(), normal(BATCH, 4, scale=0.3)
    before = HOOK[direction](flow.chain, value)
    flow.scale.assign(flow.scale * -0.5 + 0.2)
    flow.permutation.assign([2, 0, 1, 3])
    after = HOOK[direction](flow.chain, value)
    np.testing.assert_array_equal(after, HOOK[direction](flow.chain, fresh(value)))
    assert np.min(np.abs(after - before)) > 1e-3
    name = f"{direction}_log_det_jacobian"
    np.testing.assert_allclose(np.sum(after, -1), getattr(flow.chain, name)(fresh(value), 1), rtol=1e-10)


@pytest.mark.slow
@both_directions
def test_fresh_after_an_update_in_a_function(direction):
    flow, value = VariableFlow(), normal(BATCH, 4, scale=0.3)
    new = flow.scale * -0.5 + 0.2

    @tf.function
    def before_and_after(value):
        before = HOOK[direction](flow.chain, value)
        flow.scale.assign(new)
        return before, HOOK[direction](flow.chain, value)

    expected_before = HOOK[direction](flow.chain, fresh(value))
    before, after = before_and_after(value)
    np.testing.assert_allclose(before, expected_before, rtol=1e-10)
    np.testing.assert_allclose(after, HOOK[direction](flow.chain, fresh(value)), rtol=1e-10)


@both_directions
def test_transport_is_fresh(direction):
    permutation = tf.Variable([1, 2, 0])
    permute, numbers = tfb.Permute(permutation), tf.constant([0.0, 1.0, 2.0])
    before = TRANSPORT[direction](permute, numbers)
    permutation.assign([2, 0, 1])
    np.testing.assert_array_equal(before, [1, 2, 0] if direction == "forward" else [2, 0, 1])
    np.testing.assert_array_equal(TRANSPORT[direction](permute, numbers), [2, 0, 1] if direction == "forward" else [1, 2, 0])


@both_directions
def test_bijectors_that_tfp_takes_for_equal_are_kept_apart(direction):
    norms = [batch_normalization(False, BATCH, 3) for _ in range(2)]
    alike = [tfb.BatchNormalization(training=False) for _ in range(2)]
    for bijector, norm in zip(alike, norms):
        bijector.batchnorm = norm.batchnorm
    assert alike[0] == alike[1]
    value = normal(BATCH, 3)
    for bijector, norm in zip(alike, norms):
        np.testing.assert_array_equal(HOOK[direction](bijector, value), HOOK[direction](norm, value))


@pytest.mark.slow
@both_directions
@pytest.mark.parametrize("flow", [vector_flow, image_flow, nested_flow, structured_flow])
def test_eager_function_and_xla_agree(flow, direction):
    bijector, shape = flow(lambda make: make())
    value = normal(BATCH, *shape, scale=0.5)
    if direction == "inverse":
        value = fresh(bijector.forward(value))
    hook = HOOK[direction]
    expected = hook(bijector, value)
    for jit_compile in (None, True):
        compiled = tf.function(lambda v: hook(bijector, v), jit_compile=jit_compile)
        np.testing.assert_allclose(compiled(fresh(value)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@both_directions
def test_dense_maps_and_glow_agree_under_xla(direction):
    value = normal(BATCH, 4, 4, 1) if direction == "inverse" else normal(BATCH, 16)
    glow = make_glow(use_actnorm=True, steps=1)
    hook = HOOK[direction]
    hook(glow, value)
    expected = hook(glow, value)
    for jit_compile in (None, True):
        compiled = tf.function(lambda v: hook(glow, v), jit_compile=jit_compile)
        np.testing.assert_allclose(compiled(fresh(value)), expected, rtol=1e-5, atol=1e-5)


# The polar attribution.


@pytest.mark.parametrize("n", [1, 2, 7, 24])
def test_polar(n):
    matrix = normal(3, n, n)
    expected = [log_of_polar_factor(m) for m in matrix.numpy()]
    log_det = dense.polar(matrix)
    np.testing.assert_allclose(log_det, expected, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(np.sum(log_det, -1), np.linalg.slogdet(matrix)[1], rtol=1e-10)
    np.testing.assert_allclose(tf.function(dense.polar, jit_compile=True)(matrix), expected, rtol=1e-5, atol=1e-5)
    assert dense.polar(tf.cast(matrix, tf.float32)).dtype == tf.float32


def test_polar_of_special_matrices():
    diagonal = signed(5)
    np.testing.assert_allclose(dense.polar(tf.linalg.diag(diagonal)), np.log(np.abs(diagonal)), atol=1e-12)
    orthogonal = tf.linalg.qr(normal(5, 5))[0]
    np.testing.assert_allclose(dense.polar(orthogonal), np.zeros(5), atol=1e-12)
    u, v = (tf.linalg.qr(normal(5, 5))[0] for _ in range(2))
    ill_conditioned = tf.matmul(u * 10.0 ** tf.linspace(0.0, -6.0, 5)[None].numpy(), v, transpose_b=True)
    np.testing.assert_allclose(np.sum(dense.polar(ill_conditioned)), np.linalg.slogdet(ill_conditioned)[1], rtol=1e-9)


@pytest.mark.parametrize("singular_values", [[3.0, 0.2, 1.5, 0.9], [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 1.0, 1.0001]])
def test_polar_gradient(singular_values):
    u, v = (tf.linalg.qr(normal(4, 4))[0] for _ in range(2))
    matrix = tf.matmul(u * tf.constant(singular_values, tf.float64), v, transpose_b=True)
    weights = normal(4)
    with tf.GradientTape() as tape:
        tape.watch(matrix)
        weighted = tf.reduce_sum(weights * dense.polar(matrix))
    gradient = np.ravel(tape.gradient(weighted, matrix))
    steps = 1e-5 * np.reshape(np.eye(16), [16, 4, 4])
    plus, minus = (tf.reduce_sum(weights * dense.polar(matrix + sign * steps), -1) for sign in (1, -1))
    np.testing.assert_allclose(gradient, (plus - minus) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("is_static", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (3, 4, 5), (2, 3, 4, 5), (2, 1, 4, 1), (1, 3, 1, 1)])
def test_log_dets_that_broadcast_are_summed_as_if_in_full(shape, is_static):
    value = np.zeros([2, 3, 4, 5])
    log_det = np.random.default_rng(0).normal(size=shape)
    full = np.broadcast_to(log_det, value.shape)
    spec = None if is_static else [tf.TensorSpec([None] * array.ndim, tf.float64) for array in (log_det, value)]
    for ndims in range(4):
        total = tf.function(lambda d, v, ndims=ndims: log_dets.sum_event(d, v, ndims), spec)(
            tf.constant(log_det), tf.constant(value)
        )
        np.testing.assert_allclose(total, full.sum(axis=tuple(range(4 - ndims, 4))), rtol=1e-12)
