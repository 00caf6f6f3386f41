"""The per-dimension hook on every public bijector of TFP, against autodiff Jacobians in float64."""

import functools
import inspect
import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.linalg
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras
from tensorflow_probability.python.bijectors import glow as tfp_glow

import tfp_dimflows as dimflows
from tfp_dimflows.bijectors import base, dense, per_dimension

tfb = tfp.bijectors

DIRECTIONS = ("inverse", "forward")
HOOK = {"inverse": dimflows.inverse_log_det_per_dim, "forward": dimflows.forward_log_det_per_dim}
TRANSPORT = {"inverse": per_dimension.transport_inverse, "forward": per_dimension.transport_forward}
OPPOSITE = {"inverse": "forward", "forward": "inverse"}


# Values and parameters: float64, large, seeded by their place in the file.

_seeds = itertools.count()


def rng():
    return np.random.default_rng(next(_seeds))


def normal(*shape, scale=1.5):
    return tf.constant(rng().normal(scale=scale, size=shape), tf.float64)


def positive(*shape):
    return tf.exp(normal(*shape, scale=0.7))


def uniform(*shape, low=0.1, high=0.9):
    return tf.constant(rng().uniform(low, high, size=shape), tf.float64)


def signed(*shape):
    return positive(*shape) * tf.constant(rng().choice([-1.0, 1.0], size=shape))


def lower(n):
    return tf.linalg.set_diag(normal(n, n), signed(n))


def fresh(value):
    return tf.nest.map_structure(lambda v: tf.constant(v.numpy()), value)


# Networks.


def autoregressive_network(n):
    """Shift and log-scale of dimension i from the dimensions before it."""
    a, b = (tf.linalg.band_part(normal(n, n), 0, -1) - tf.linalg.diag(tf.ones(n, tf.float64)) * 0 for _ in range(2))
    a, b = (tf.linalg.set_diag(m, tf.zeros(n, tf.float64)) for m in (a, b))
    return lambda y: (tf.matmul(y[..., None, :], a)[..., 0, :], 1.5 * tf.sin(tf.matmul(y[..., None, :], b)[..., 0, :]))


def coupling_network(n_in, n_out):
    a, b = normal(n_in, n_out), normal(n_in, n_out)
    return lambda x, units, **_: (tf.einsum("...i,ij->...j", x, a), 1.5 * tf.sin(tf.einsum("...i,ij->...j", x, b)))


def autoregressive_spline(n):
    matrix = tf.linalg.set_diag(tf.linalg.band_part(normal(n, n), 0, -1), tf.zeros(n, tf.float64))
    return lambda y: spline(tf.einsum("...i,ij->...j", y, matrix)[..., None] * tf.constant([1.0, 2.0, -1.0], tf.float64))


def spline(parameters):
    sizes = 1e-2 + 4.0 * tf.nn.softmax(parameters)
    sizes *= 4.0 / tf.reduce_sum(sizes, axis=-1, keepdims=True)
    return tfb.RationalQuadraticSpline(sizes, sizes[..., ::-1], 0.2 + tf.nn.softplus(parameters[..., 1:]), range_min=-2.0)


def image_autoregressive(y):
    """Row-wise: every row depends on the sum of the rows above."""
    above = tf.cumsum(y, axis=-2, exclusive=True)
    return tfb.Shift(above)(tfb.Scale(log_scale=tf.sin(above)))


class GlowNetwork(tf.Module):
    """Scale and shift of every pixel's channels, from the neighbouring pixels too."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self._kernel = tf.Variable(normal(3, 3, channels_in, 2 * channels_out, scale=0.5))

    def __call__(self, x):
        batched = tf.reshape(x, tf.concat([[-1], tf.shape(x)[-3:]], axis=0))
        out = tf.sin(tf.nn.conv2d(batched, self._kernel, strides=1, padding="SAME"))
        out = tf.reshape(out, tf.concat([tf.shape(x)[:-1], [out.shape[-1]]], axis=0))
        return tf.ensure_shape(out, x.shape[:-1] + [out.shape[-1]])


def glow_network(input_shape, output_chan=None):
    return GlowNetwork(input_shape[-1], output_chan or input_shape[-1])


def identity_network(input_shape, output_chan=None):
    return lambda x: tfb.Identity()


def make_glow(network=glow_network, **kwargs):
    options = dict(output_shape=(4, 8, 2), num_glow_blocks=2, num_steps_per_block=2, seed=3) | kwargs
    return tfb.Glow(coupling_bijector_fn=network, exit_bijector_fn=network, **options)


def batch_normalization(training, n=None):
    layer = tf_keras.layers.BatchNormalization(dtype="float64", gamma_constraint=lambda g: tf.nn.relu(g) + 1e-6)
    bijector = tfb.BatchNormalization(layer, training=training)
    if n is not None:
        layer.build([None, n])
        layer.moving_mean.assign(normal(n))
        layer.moving_variance.assign(positive(n))
        layer.gamma.assign(positive(n))
        layer.beta.assign(normal(n))
    return bijector


def random_lu(n):
    return tf.linalg.lu(normal(n, n))


full = tf.linalg.LinearOperatorFullMatrix
ELEMENTWISE, TRIANGULAR, MOVE, DENSE, OTHER = "elementwise", "triangular", "move", "dense", "other"


class Case(NamedTuple):
    kind: str
    make: Any
    x: Any  # a function that makes one forward argument, without batch axes
    event_ndims: Any = 1


def elementwise(make, x=None):
    return [Case(ELEMENTWISE, make, x or functools.partial(normal, 4))]


four = functools.partial(normal, 4)
four_positive = functools.partial(positive, 4)
four_unit = functools.partial(uniform, 4)

CASES = {
    "Exp": elementwise(tfb.Exp),
    "Expm1": elementwise(tfb.Expm1),
    "FrechetCDF": elementwise(lambda: tfb.FrechetCDF(-positive(4), positive(4), positive(4)), four_positive),
    "GeneralizedExtremeValueCDF": elementwise(
        lambda: tfb.GeneralizedExtremeValueCDF(-positive(4), positive(4), uniform(4)), four_positive
    ),
    "GeneralizedPareto": elementwise(lambda: tfb.GeneralizedPareto(normal(4), positive(4), positive(4))),
    "GompertzCDF": elementwise(lambda: tfb.GompertzCDF(uniform(4), uniform(4)), four_unit),
    "GumbelCDF": elementwise(lambda: tfb.GumbelCDF(normal(4), positive(4))),
    "Identity": elementwise(tfb.Identity),
    "Inline": elementwise(
        lambda: tfb.Inline(
            forward_fn=lambda x: x**3,
            inverse_fn=lambda y: tf.sign(y) * tf.abs(y) ** (1 / 3),
            inverse_log_det_jacobian_fn=lambda y: -np.log(3.0) - tf.math.log(tf.abs(y)) * 2 / 3,
            forward_min_event_ndims=0,
        )
    ),
    "KumaraswamyCDF": elementwise(lambda: tfb.KumaraswamyCDF(positive(4), positive(4)), four_unit),
    "LambertWTail": elementwise(lambda: tfb.LambertWTail(normal(4), positive(4), uniform(4))),
    "Log": elementwise(tfb.Log, four_positive),
    "Log1p": elementwise(tfb.Log1p, four_positive),
    "MoyalCDF": elementwise(lambda: tfb.MoyalCDF(normal(4), positive(4))),
    "NormalCDF": elementwise(tfb.NormalCDF),
    "Power": elementwise(lambda: tfb.Power(uniform(4, low=2.0, high=5.0)), four_positive),
    "PowerTransform": elementwise(lambda: tfb.PowerTransform(0.7), four_positive),
    "RationalQuadraticSpline": elementwise(lambda: spline(normal(4, 3)), lambda: uniform(4, low=-1.8, high=1.8)),
    "RayleighCDF": elementwise(lambda: tfb.RayleighCDF(positive(4)), four_positive),
    "Reciprocal": elementwise(tfb.Reciprocal),
    "Scale": elementwise(lambda: tfb.Scale(signed(4))) + elementwise(lambda: tfb.Scale(normal())),
    "Shift": elementwise(lambda: tfb.Shift(normal(4))),
    "ShiftedGompertzCDF": elementwise(lambda: tfb.ShiftedGompertzCDF(uniform(4), uniform(4)), four_positive),
    "Sigmoid": elementwise(lambda: tfb.Sigmoid(-positive(4), positive(4))),
    "Sinh": elementwise(tfb.Sinh),
    "SinhArcsinh": elementwise(lambda: tfb.SinhArcsinh(normal(4), positive(4))),
    "SoftClip": elementwise(lambda: tfb.SoftClip(-positive(4), positive(4), uniform(4))),
    "Softfloor": elementwise(lambda: tfb.Softfloor(positive(4)), lambda: normal(4, scale=5.0)),
    "Softplus": elementwise(lambda: tfb.Softplus(positive(4), low=normal(4))),
    "Softsign": elementwise(tfb.Softsign),
    "Square": elementwise(tfb.Square, four_positive),
    "Tanh": elementwise(tfb.Tanh),
    "WeibullCDF": elementwise(lambda: tfb.WeibullCDF(positive(4), positive(4)), four_positive),
    "Permute": [
        Case(MOVE, lambda: tfb.Permute([2, 0, 3, 1]), four),
        Case(MOVE, lambda: tfb.Permute([1, 2, 0], axis=-2), lambda: normal(3, 2), 2),
    ],
    "Reshape": [
        Case(MOVE, lambda: tfb.Reshape([2, -1], [3, 4]), lambda: normal(3, 4), 2),
        Case(MOVE, lambda: tfb.Reshape([2, 3]), lambda: normal(6)),
    ],
    "Transpose": [
        Case(MOVE, lambda: tfb.Transpose([2, 0, 1]), lambda: normal(2, 3, 4), 3),
        Case(MOVE, lambda: tfb.Transpose(rightmost_transposed_ndims=2), lambda: normal(2, 3), 2),
    ],
    "Split": [
        Case(MOVE, lambda: tfb.Split([1, 3]), four),
        Case(MOVE, lambda: tfb.Split(2, axis=-2), lambda: normal(4, 3), 2),
    ],
    "Restructure": [
        Case(MOVE, lambda: tfb.Restructure({"a": [0, 2], "b": 1}), lambda: [normal(2), normal(3), normal(4)], [1, 1, 1])
    ],
    "Ascending": [Case(TRIANGULAR, tfb.Ascending, four)],
    "Cumsum": [
        Case(TRIANGULAR, tfb.Cumsum, four),
        Case(TRIANGULAR, lambda: tfb.Cumsum(axis=-2), lambda: normal(3, 2), 2),
    ],
    "MaskedAutoregressiveFlow": [
        Case(TRIANGULAR, lambda: tfb.MaskedAutoregressiveFlow(autoregressive_network(4)), four),
        Case(TRIANGULAR, lambda: tfb.MaskedAutoregressiveFlow(autoregressive_network(4), unroll_loop=True), four),
        Case(TRIANGULAR, lambda: tfb.MaskedAutoregressiveFlow(bijector_fn=autoregressive_spline(4)), four_unit),
        Case(
            TRIANGULAR,
            lambda: tfb.MaskedAutoregressiveFlow(bijector_fn=image_autoregressive, event_ndims=2),
            lambda: normal(3, 2, scale=0.5),
            2,
        ),
    ],
    "RealNVP": [
        Case(TRIANGULAR, lambda: tfb.RealNVP(3, shift_and_log_scale_fn=coupling_network(3, 2)), lambda: normal(5)),
        Case(TRIANGULAR, lambda: tfb.RealNVP(-3, shift_and_log_scale_fn=coupling_network(3, 2)), lambda: normal(5)),
        Case(
            TRIANGULAR,
            lambda: tfb.RealNVP(fraction_masked=-0.4, shift_and_log_scale_fn=coupling_network(2, 3)),
            lambda: normal(5),
        ),
        Case(TRIANGULAR, lambda: tfb.RealNVP(0, shift_and_log_scale_fn=coupling_network(0, 5)), lambda: normal(5)),
        Case(
            TRIANGULAR,
            lambda: tfb.RealNVP(2, bijector_fn=lambda x, _: tfb.Chain([tfb.ScaleMatvecTriL(FIXED_LOWER), tfb.Sinh()])),
            lambda: normal(5),
        ),
        Case(
            TRIANGULAR,
            lambda: tfb.RealNVP(2, shift_and_log_scale_fn=lambda x, _: (tf.reduce_sum(x, -1, keepdims=True), None)),
            lambda: normal(5),
        ),
    ],
    "ScaleMatvecDiag": [Case(TRIANGULAR, lambda: tfb.ScaleMatvecDiag(signed(4), adjoint=a), four) for a in (False, True)],
    "ScaleMatvecTriL": [Case(TRIANGULAR, lambda a=a: tfb.ScaleMatvecTriL(lower(4), adjoint=a), four) for a in (False, True)],
    "BatchNormalization": [
        Case(TRIANGULAR, lambda: batch_normalization(False, 4), four),
        Case(TRIANGULAR, lambda: batch_normalization(False, 2), lambda: normal(3, 2, 2), 3),
    ],
    "TransformDiagonal": [
        Case(TRIANGULAR, lambda: tfb.TransformDiagonal(tfb.Sinh()), lambda: normal(3, 3), 2),
        Case(TRIANGULAR, lambda: tfb.TransformDiagonal(tfb.ScaleMatvecTriL(lower(3))), lambda: normal(3, 3), 2),
    ],
    "ScaleMatvecLU": [Case(DENSE, lambda: tfb.ScaleMatvecLU(*random_lu(4)), four)],
    "MatvecLU": [Case(DENSE, lambda: tfb.MatvecLU(*random_lu(4)), four)],
    "ScaleMatvecLinearOperator": [
        Case(DENSE, lambda a=a: tfb.ScaleMatvecLinearOperator(full(normal(4, 4)), adjoint=a), four) for a in (False, True)
    ]
    + [
        Case(TRIANGULAR, lambda a=a: tfb.ScaleMatvecLinearOperator(make(), adjoint=a), four)
        for a in (False, True)
        for make in (
            lambda: tf.linalg.LinearOperatorLowerTriangular(lower(4)),
            lambda: tf.linalg.LinearOperatorScaledIdentity(4, normal()),
        )
    ],
    "ScaleMatvecLinearOperatorBlock": [
        Case(
            DENSE,
            lambda a=a: tfb.ScaleMatvecLinearOperatorBlock(
                tf.linalg.LinearOperatorBlockDiag([full(normal(2, 2)), full(normal(3, 3))]), adjoint=a
            ),
            lambda: [normal(2), normal(3)],
            [1, 1],
        )
        for a in (False, True)
    ],
    "Householder": [Case(DENSE, lambda: tfb.Householder(tf.linalg.l2_normalize(normal(4))), four)],
    "DiscreteCosineTransform": [Case(DENSE, lambda t=t: tfb.DiscreteCosineTransform(t), four) for t in (2, 3)],
    "FFJORD": [
        Case(
            OTHER,
            lambda: tfb.FFJORD(
                lambda t, s: tf.sin(s @ FIXED_LOWER) * (1.0 + t),
                ode_solve_fn=tfp.math.ode.DormandPrince(rtol=1e-10, atol=1e-10).solve,
                trace_augmentation_fn=tfb.ffjord.trace_jacobian_exact,
                dtype=tf.float64,
            ),
            lambda: normal(1, 3),
        )
    ],
    "Chain": [
        Case(TRIANGULAR, lambda: tfb.Chain([tfb.Sinh(), tfb.ScaleMatvecTriL(lower(4)), tfb.Scale(signed(4))]), four),
        Case(TRIANGULAR, lambda: tfb.Chain([]), four),
    ],
    "Composition": [
        Case(
            TRIANGULAR,
            lambda: tfb.Composition(tfb.Chain([tfb.Sinh(), tfb.ScaleMatvecTriL(lower(4))]), name="wrapper", parameters={}),
            four,
        )
    ],
    "Invert": [Case(TRIANGULAR, lambda: tfb.Invert(tfb.Chain([tfb.Sinh(), tfb.ScaleMatvecTriL(lower(4))])), four)],
    "JointMap": [
        Case(
            TRIANGULAR,
            lambda: tfb.JointMap({"b": tfb.ScaleMatvecTriL(lower(3)), "a": tfb.Sinh()}),
            lambda: {"a": normal(2), "b": normal(3)},
            {"a": 1, "b": 1},
        )
    ],
    "Blockwise": [
        Case(TRIANGULAR, lambda: tfb.Blockwise([tfb.Sinh(), tfb.ScaleMatvecTriL(lower(3))], [2, 3]), lambda: normal(5))
    ],
    "Glow": [Case(OTHER, lambda: make_glow(use_actnorm=False), lambda: normal(64))],
}

FIXED_LOWER = lower(3)

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


def cases(*kinds):
    return [
        pytest.param(case, id=f"{name}-{i}") for name, all_ in CASES.items() for i, case in enumerate(all_) if case.kind in kinds
    ]


# Jacobians.


def flat(value):
    return np.concatenate([np.ravel(v) for v in tf.nest.flatten(value)])


def jacobian(bijector, direction, value):
    """Rows: dimensions of the result; columns: dimensions of the argument."""
    with tf.GradientTape(persistent=True) as tape:
        value = fresh(value)
        tape.watch(value)
        result = [tf.reshape(r, [-1]) for r in tf.nest.flatten(getattr(bijector, direction)(value))]
    blocks = [
        [
            np.reshape(tape.jacobian(r, v, None, False, False, unconnected_gradients="zero"), [r.shape[0], -1])
            if False
            else np.reshape(
                tape.jacobian(r, v, experimental_use_pfor=False, unconnected_gradients=tf.UnconnectedGradients.ZERO),
                [r.shape[0], -1],
            )
            for v in tf.nest.flatten(value)
        ]
        for r in result
    ]
    return np.block(blocks)


def log_abs_diagonal(matrix):
    return np.log(np.abs(np.diag(matrix)))
