"""Attribution of a dense matrix's log-determinant to single dimensions."""

from collections.abc import Callable

import tensorflow as tf

from tfp_dimflows.bijectors.log_dets import log_det_dtype


def polar(matrix: tf.Tensor) -> tf.Tensor:
    """Contribution of every dimension of `x` to log abs det of `x -> matrix @ x`, from the polar decomposition.

    With matrix = U S V^T, its symmetric polar factor is P = (matrix^T matrix)^(1/2) = V S V^T. The contributions are

        d = diag(log P),    d_j = sum_i V_ji^2 log s_i,    sum_j d_j = log abs det matrix:

    each singular value's logarithm is shared out over the dimensions that it stretches. This is the logarithm of the
    diagonal for a diagonal matrix, and zero for an orthogonal one. The inverse map's contributions, in the frame of its
    own argument, are `-polar(transpose(matrix))`.

    Computed in float64; the gradient is finite also where singular values coincide. Costs O(n^3). XLA's eigensolver is
    less exact: reliable up to condition numbers of about 1e4, otherwise about 1e7.

    Args:
      matrix: `[..., n, n]`, non-singular.

    Returns:
      `[..., n]`.

    #### Example

    >>> dfb.dense.polar(tf.constant([[0.0, 2.0], [1.0, 0.0]])).numpy().round(3)
    array([0.   , 0.693], dtype=float32)
    """
    return tf.cast(_polar(tf.cast(matrix, tf.float64)), log_det_dtype(matrix.dtype))


@tf.custom_gradient
def _polar(matrix: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    _, v = tf.linalg.eigh(tf.matmul(matrix, matrix, transpose_a=True))
    # The norms of the columns of matrix @ V keep the digits of small singular values that the eigenvalues have lost.
    log_s = 0.5 * tf.math.log(tf.reduce_sum(tf.square(tf.matmul(matrix, v)), axis=-2))

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        # Daleckii-Krein: d log(P^2) = V (F * (V^T d(P^2) V)) V^T, F_ij = (log e_i - log e_j) / (e_i - e_j), e = s^2.
        # `eigh`'s own gradient divides by e_i - e_j, which is zero for an orthogonal matrix.
        e = tf.exp(2.0 * log_s)
        mean = 0.5 * (e[..., :, None] + e[..., None, :])
        t = 0.5 * (e[..., :, None] - e[..., None, :]) / mean
        close = tf.abs(t) < 1e-3
        far_t = tf.where(close, tf.ones_like(t), t)
        quotient = tf.where(close, 1.0 + t**2 / 3.0 + t**4 / 5.0, (log_s[..., :, None] - log_s[..., None, :]) / far_t)
        inner = tf.matmul(v, upstream[..., :, None] * v, transpose_a=True) * quotient / mean
        return tf.matmul(matrix, tf.matmul(v, tf.matmul(inner, v, transpose_b=True)))

    return tf.reduce_sum(tf.square(v) * log_s[..., None, :], axis=-1), gradient
