"""Sylvester flows."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorflow.types.experimental import TensorLike

from tfp_dimflows.bijectors import implicit
from tfp_dimflows.bijectors.parametric import Parametric, log_tanh_sum_slope, tanh_slope
from tfp_dimflows.upstream import prefer_static as ps
from tfp_dimflows.upstream import record

VARIANTS = ("orthogonal", "householder", "triangular")
_LIMIT = 1.0 - 5e-7


class Sylvester(Parametric):
    r"""Sylvester flow: planar flows along M orthogonal directions at once, which the triangular matrices R and R' couple.

        forward:  y = x + Q R tanh(w),   w = R' Q^T x + b;   Q: D x M with orthonormal columns, R, R': M x M, upper triangular
        log |det dy/dx| = sum_j l_j,   l_j = log(1 + (1 - tanh(w_j)^2) R_jj R'_jj);   that of dimension i: sum_j Q_ij^2 l_j
        inverse:  x = y - Q R tanh(w),   where w solves w + R' R tanh(w) = R' Q^T y + b

    The diagonals of R and R' are (1 - 5e-7) tanh of their parameters, so that it is invertible for any, if Q has full rank. The
    triangular system for w is solved from the last entry to the first, each by bisection in a fixed number of steps down to
    float precision, with implicit derivatives (first derivatives only). The shares of the dimensions are a convention: they
    have the right sum, and are exact where R and R' are diagonal.

    Q is, by `variant`:

    * `"orthogonal"`: M <= D columns, a D x M matrix made orthonormal (Gram-Schmidt; a network that predicts it should not
      start at zero, where the gradients are not finite),
    * `"householder"`: M = D, a product of reflections I - 2 v v^T / v^T v,
    * `"triangular"`: M = D, the identity, or the reversal of the dimensions with `reverse` (to alternate with).

    Cost: forward O(D M + M^2), and O(D M^2) for Gram-Schmidt or O(D H) for H reflections; inverse O(M^3) more for R' R, and
    O(M^2) for w in M steps one after the other. The hook needs Q's entries, O(D^2 H) for reflections.

    Parameters are trainable, or a tensor with batch axes, or predicted from a condition:
    `dfb.ConditionalTransform(network, functools.partial(dfb.Sylvester, dims), event_ndims=1)`, where the network has
    `dfb.Sylvester.num_params(dims)` outputs.

    Args:
      dims: number D of dimensions.
      params: a matrix `[M, M]` whose upper triangle is R's and whose strict lower triangle is that of R' transposed, the
        diagonal of R' `[M]`, b `[M]`, and Q's `[D, M]` or `[num_reflections, D]`, all in one last axis, a tensor or variable
        whose other axes broadcast to the batch; the diagonals are those before tanh. None: trainable ones.
      variant: `"orthogonal"`, `"householder"` or `"triangular"`.
      num_columns: M of `"orthogonal"`; None: 8, or D if that is less.
      num_reflections: number of reflections of `"householder"`.
      reverse: whether Q of `"triangular"` reverses the dimensions.
      seed: integer seed of the initial values of trainable parameters; None: one from NumPy's global generator.
      dtype: dtype of trainable parameters.
      name: the name of the operations.

    Raises:
      ValueError: for another variant or number of columns, or if `params` or a value has another last axis.

    References: van den Berg, Hasenclever, Tomczak, Welling, "Sylvester normalizing flows for variational inference", 2018.

    #### Example

    >>> sylvester = dfb.Sylvester(3, num_columns=2, seed=0)
    >>> y = sylvester.forward([[1.0, 5.0, -2.0]])
    >>> sylvester.inverse(tf.identity(y)).numpy().round(3)
    array([[ 1.,  5., -2.]], dtype=float32)
    """

    def __init__(
        self,
        dims: int,
        params: TensorLike | None = None,
        variant: str = "orthogonal",
        num_columns: int | None = None,
        num_reflections: int = 8,
        reverse: bool = False,
        seed: int | None = None,
        dtype: tf.DType = tf.float32,
        name: str = "sylvester",
    ):
        parameters = dict(locals())
        self._parts = _parts(dims, variant, num_columns, num_reflections)
        if reverse and variant != "triangular":
            raise ValueError(f"Sylvester: got reverse with variant {variant}, it is for triangular")
        self._variant, self._reverse = variant, reverse

        def initial(generator: np.random.Generator) -> tuple:
            matrices, vectors = self._parts[:3], self._parts[3]
            return *(0.1 * generator.normal(size=shape) for shape in matrices), generator.normal(size=vectors)

        super().__init__(dims, params, initial, seed, dtype, parameters, name)

    @staticmethod
    def num_params(dims: int, variant: str = "orthogonal", num_columns: int | None = None, num_reflections: int = 8) -> int:
        """The size of `params`' last axis; arguments as in the constructor."""
        return sum(int(np.prod(shape)) for shape in _parts(dims, variant, num_columns, num_reflections))

    def _forward_pass(self, x: tf.Tensor, parts: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, Callable]:
        q, r, r_tilde, bias, slopes_at_0 = self._matrices(parts)
        w = tf.linalg.matvec(r_tilde, q.matvec(x, adjoint=True)) + bias
        y = x + q.matvec(tf.linalg.matvec(r, tf.tanh(w)))
        return y, *_log_dets(w, q, slopes_at_0)

    def _inverse_pass(self, y: tf.Tensor, parts: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, Callable]:
        q, r, r_tilde, bias, slopes_at_0 = self._matrices(parts)
        target = tf.linalg.matvec(r_tilde, q.matvec(y, adjoint=True)) + bias
        w = _solve(tf.matmul(r_tilde, r), target)
        x = y - q.matvec(tf.linalg.matvec(r, tf.tanh(w)))
        return x, *_log_dets(w, q, slopes_at_0)

    def _matrices(self, parts: list[tf.Tensor]) -> tuple[tf.linalg.LinearOperator, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Q as a linear operator, R, R', b and 1 + R_jj R'_jj."""
        matrix, raw_tilde, bias, vectors = parts
        diagonal, diagonal_tilde = (_LIMIT * tf.tanh(raw) for raw in (tf.linalg.diag_part(matrix), raw_tilde))
        r = tf.linalg.set_diag(tf.linalg.band_part(matrix, 0, -1), diagonal)
        r_tilde = tf.linalg.set_diag(tf.linalg.band_part(tf.linalg.matrix_transpose(matrix), 0, -1), diagonal_tilde)
        return self._q(vectors), r, r_tilde, bias, 1.0 + diagonal * diagonal_tilde

    def _q(self, vectors: tf.Tensor) -> tf.linalg.LinearOperator:
        if self._variant == "orthogonal":
            q, upper = tf.linalg.qr(vectors)
            # A positive diagonal makes the decomposition unique, and so continuous in the parameters.
            signs = tf.where(tf.linalg.diag_part(upper) < 0.0, -tf.ones([], q.dtype), tf.ones([], q.dtype))
            return tf.linalg.LinearOperatorFullMatrix(q * signs[..., tf.newaxis, :])
        if self._variant == "householder":
            # Their lengths do not matter, but TensorFlow's operator is no reflection for tiny ones.
            size = tf.stop_gradient(tf.reduce_max(tf.abs(vectors), axis=-1, keepdims=True))
            vectors = vectors / tf.where(size > 0.0, size, 1.0)
            reflections = [tf.linalg.LinearOperatorHouseholder(v) for v in tf.unstack(vectors, axis=-2)]
            return tf.linalg.LinearOperatorComposition(reflections)
        if self._reverse:
            # TensorFlow's operator of a permutation loses static shapes.
            return tf.linalg.LinearOperatorFullMatrix(tf.reverse(tf.eye(self._dims, dtype=vectors.dtype), axis=[0]))
        return tf.linalg.LinearOperatorIdentity(self._dims, dtype=vectors.dtype)


def _parts(dims: int, variant: str, num_columns: int | None, num_reflections: int) -> list[tuple[int, ...]]:
    if variant not in VARIANTS:
        raise ValueError(f"Sylvester: got variant={variant!r}, needs one of {VARIANTS}")
    if variant != "orthogonal":
        columns = dims
        if num_columns not in (None, dims):
            raise ValueError(f"Sylvester: got num_columns={num_columns}, variant {variant} of {dims} dimensions has {dims}")
    else:
        columns = min(8, dims) if num_columns is None else num_columns
        if not 1 <= columns <= dims:
            raise ValueError(f"Sylvester: got num_columns={num_columns}, needs 1 to {dims} for {dims} dimensions")
    if num_reflections < 1:
        raise ValueError(f"Sylvester: got num_reflections={num_reflections}, needs at least 1")
    vectors = {"orthogonal": (dims, columns), "householder": (num_reflections, dims), "triangular": (0,)}[variant]
    return [(columns, columns), (columns,), (columns,), vectors]


def _log_dets(w: tf.Tensor, q: tf.linalg.LinearOperator, slopes_at_0: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """The forward log-det, and a function that returns that of every dimension."""
    log_dets = log_tanh_sum_slope(w, slopes_at_0)
    return tf.reduce_sum(log_dets, axis=-1), lambda: tf.linalg.matvec(tf.square(q.to_dense()), log_dets)


def _solve(matrix: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """The w with w + matrix tanh(w) = target, for an upper triangular matrix whose diagonal is above -1."""
    columns = target.shape[-1]
    diagonal = tf.linalg.diag_part(matrix)
    above = matrix - tf.linalg.diag(diagonal)

    def entry(k: tf.Tensor, w: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        j = columns - 1 - k
        slope = diagonal[..., j]
        rest = target[..., j] - tf.reduce_sum(above[..., j, :] * tf.tanh(w), axis=-1)
        root = implicit.bisect(lambda p: p + slope * tf.tanh(p), rest, rest - tf.abs(slope), rest + tf.abs(slope))
        return k + 1, tf.where(tf.range(columns) == j, root[..., tf.newaxis], w)

    with record.stop_recording():
        start = tf.zeros(ps.broadcast_shape(ps.shape(target), ps.shape(diagonal)), target.dtype)
        _, w = tf.while_loop(lambda *_: True, entry, (0, start), maximum_iterations=columns)
        w = tf.stop_gradient(w)

    def adjoint(upstream: tf.Tensor) -> tf.Tensor:
        jacobian = tf.eye(columns, dtype=w.dtype) + matrix * tanh_slope(w)[..., tf.newaxis, :]
        return tf.linalg.triangular_solve(jacobian, upstream[..., tf.newaxis], lower=False, adjoint=True)[..., 0]

    return implicit.with_adjoint(w, target - tf.linalg.matvec(matrix, tf.tanh(w)), adjoint)
