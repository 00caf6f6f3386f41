"""`Rotation`: an orthogonal map of the channels of images, or of the dimensions of vectors."""

from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from tfp_dimflows.bijectors import base
from tfp_dimflows.bijectors.log_dets import log_det_dtype
from tfp_dimflows.keras_bridge import adapting
from tfp_dimflows.upstream import prefer_static as ps

MATRICES = ("principal", "random", "haar", "identity")


class Rotation(base.FlowBijector):
    r"""The same orthogonal map Q of the channels at every position of an image, or of the dimensions of a vector.

        inverse (data to latent):  x = Q (y - b),    forward:  y = Q^T x + b,    log-det: 0

    The rows of Q are the directions that become the entries of x. They are given, or the principal components of the data,
    leading first (the Karhunen-Loeve transform, KLT): from its start as the identity, a pass inside `dimflows.adaptation()` (as
    `FlowModel.adapt` makes) takes for Q the eigenvectors of the covariance of all C-vectors that it sees, by falling
    eigenvalues, each with the sign that makes its largest entry positive (of equal ones the first), so that two runs on the
    same data agree, and for b their mean; otherwise b is 0. Channels that are constant, or follow from others, come last.

    With `leading=k` the first k rows only span the leading k components, and the others the rest: within both spans the
    orthonormal basis is the one that is nearest to the coordinates (orthogonal Procrustes problem), so that entry i of x
    remains as local as entry i of y.

    Q is constant, a variable that is saved with the weights, or with `trainable=True` the product of a Cayley transform and
    that matrix, which stays orthogonal whatever the gradient:

        Q = (I + A)^-1 (I - A) Q_0,    A = S - S^T,    S strictly lower triangular with trained entries, at first 0

    The map is dense; by convention numbers of dimensions (log-dets of later layers) that belong to entry i of x belong to
    entry i of y. Cost per position O(C^2), with `trainable` O(C^3) more per step; `adapt` costs O(C^3).

    Args:
      channels: size C of the last axis.
      matrix: Q, or what it is at first: `"principal"`, from data; `"random"`, uniformly distributed; `"haar"`, the
        two-dimensional Haar transform of each colour's 2x2 block, squeezed in the order of `dfb.Squeeze`, the averages of all
        colours first, then the differences of columns, of rows, and of diagonals; `"identity"`; or an orthogonal array
        `[C, C]`.
      trainable: whether Q is trained.
      seed: integer seed of `"random"`.
      dtype: dtype of the variables.
      leading: k, for `"principal"`; None: the rows are the components themselves.
      name: the name of the operations.

    Raises:
      ValueError: for another matrix or number of channels; in adaptation, if there are fewer C-vectors than channels.

    References: Jolliffe, "Principal component analysis", 2002; Schoenemann, "A generalized solution of the orthogonal
    Procrustes problem", 1966; Cayley, "Sur quelques proprietes des determinants gauches", 1846.

    #### Example

    >>> rotation = dfb.Rotation(2)
    >>> with dimflows.adaptation():
    ...     rotation.inverse([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]).numpy().round(4)[:, 0]
    array([-5.,  0.,  5.], dtype=float32)
    """

    def __init__(
        self,
        channels: int,
        matrix: str | ArrayLike = "principal",
        trainable: bool = False,
        seed: int = 0,
        dtype: tf.DType = tf.float32,
        leading: int | None = None,
        name: str = "rotation",
    ):
        parameters = dict(locals())
        self._channels = channels
        is_principal = isinstance(matrix, str) and matrix == "principal"
        if leading is not None and not (is_principal and leading in range(1, channels)):
            raise ValueError(f'Rotation: got leading={leading!r}, needs matrix="principal" and 1 to {channels - 1} components')
        self._leading = leading
        self._matrix = tf.Variable(_initial(matrix, channels, seed), dtype=dtype, trainable=False, name="matrix")
        self._mean = tf.Variable(tf.zeros([channels], dtype), trainable=False, name="mean") if is_principal else None
        self._below = tf.Variable(tf.zeros([channels * (channels - 1) // 2], dtype), name="below") if trainable else None
        super().__init__(forward_min_event_ndims=1, is_constant_jacobian=True, parameters=parameters, name=name)

    @property
    def num_components(self) -> int:
        """How many principal components it takes from data: C, or 0 for other matrices."""
        return 0 if self._mean is None else self._channels

    @property
    def matrix(self) -> tf.Tensor:
        """Q at present."""
        return self._orthogonal(self._matrix.dtype)

    def _orthogonal(self, dtype: tf.DType) -> tf.Tensor:
        if self._below is None:
            return tf.cast(self._matrix, dtype)
        size = self._channels
        places = np.stack(np.tril_indices(size, -1), axis=-1)
        lower = tf.scatter_nd(places, tf.cast(self._below, log_det_dtype(dtype)), [size, size])
        skew, eye = lower - tf.transpose(lower), tf.eye(size, dtype=lower.dtype)
        return tf.cast(tf.linalg.solve(eye + skew, (eye - skew) @ tf.cast(self._matrix, lower.dtype)), dtype)

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return self._rotated(y, is_inverse=True)

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return self._rotated(x, is_inverse=False)

    def _rotated(self, value: tf.Tensor, is_inverse: bool) -> tuple[tf.Tensor, tf.Tensor]:
        if value.shape[-1] != self._channels:
            raise ValueError(f"{self.name}: got {value.shape[-1]} channels, is for {self._channels}")
        if not value.dtype.is_floating:
            raise ValueError(f"{self.name}: got values of dtype {value.dtype.name}, needs real numbers")
        if adapting() and self._mean is not None:
            self._adapt(self._mean, value, is_inverse)
        matrix = self._orthogonal(value.dtype)
        mean = tf.zeros([], value.dtype) if self._mean is None else tf.cast(self._mean, value.dtype)
        rows = tf.reshape(value, [-1, self._channels])
        result = tf.matmul(rows - mean, matrix, transpose_b=True) if is_inverse else tf.matmul(rows, matrix) + mean
        return tf.reshape(result, ps.shape(value)), tf.zeros([], log_det_dtype(value.dtype))

    def _adapt(self, own_mean: tf.Variable, value: tf.Tensor, is_inverse: bool) -> None:
        """Makes the result the principal components of the value."""
        mean, components = self._principal_components(value)
        if not is_inverse:  # components (x - mean) = Q^T x + b
            mean, components = -tf.linalg.matvec(components, mean), tf.transpose(components)
        own_mean.assign(tf.cast(mean, own_mean.dtype))
        self._matrix.assign(tf.cast(components, self._matrix.dtype))
        if self._below is not None:
            self._below.assign(tf.zeros_like(self._below))

    def _principal_components(self, value: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The mean, and unit eigenvectors of the covariance as rows, the leading first."""
        vectors = tf.cast(tf.reshape(value, [-1, self._channels]), tf.float64)
        if vectors.shape[0] < self._channels:
            raise ValueError(
                f"{self.name}: got {vectors.shape[0]} vectors to take principal components from, needs at least as many as "
                f"channels, {self._channels}; adapt to more data"
            )
        mean = tf.reduce_mean(vectors, axis=0)
        centred = vectors - mean
        _, vectors = tf.linalg.eigh(tf.matmul(centred, centred, transpose_a=True) / len(vectors))
        rows = tf.reverse(tf.transpose(vectors), axis=[0])
        sizes = tf.abs(rows)
        if self._leading is not None:
            spans = tf.split(rows, [self._leading, self._channels - self._leading])
            return mean, tf.concat([_nearest(span, place) for span, place in zip(spans, (0, self._leading))], axis=0)
        is_largest = tf.cast(sizes > (1.0 - 1e-3) * tf.reduce_max(sizes, axis=1, keepdims=True), tf.int32)
        largest = tf.gather(rows, tf.argmax(is_largest, axis=1), axis=1, batch_dims=1)
        return mean, rows * tf.sign(largest)[:, tf.newaxis]


def _nearest(span: tf.Tensor, place: int) -> tf.Tensor:
    """The orthonormal basis of a span of k rows that is nearest to the k coordinates from a place on."""
    _, u, v = tf.linalg.svd(span[:, place : place + len(span)])
    return tf.matmul(tf.matmul(v, u, transpose_b=True), span)


def _initial(matrix: str | ArrayLike, channels: int, seed: int) -> np.ndarray:
    if not isinstance(channels, (int, np.integer)) or channels < 1:
        raise ValueError(f"Rotation: got channels={channels!r}, needs a positive integer")
    if not isinstance(matrix, str):
        given = np.asarray(matrix, np.float64)
        if given.shape != (channels, channels) or not np.allclose(given @ given.T, np.eye(channels), atol=1e-4):
            raise ValueError(
                f"Rotation: got a matrix of shape {given.shape}, needs an orthogonal one, [{channels}, {channels}]"
            )
        return given
    if matrix not in MATRICES:
        raise ValueError(f"Rotation: got matrix={matrix!r}, needs one of {', '.join(MATRICES)}, or an orthogonal array")
    if matrix == "random":
        q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=[channels, channels]))
        return q * np.sign(np.diag(r))
    if matrix == "haar":
        if channels % 4:
            raise ValueError(
                f'Rotation: got {channels} channels, matrix="haar" needs those of squeezed 2x2 blocks, 4 per colour'
            )
        pair = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2.0)
        blocks = np.kron(np.eye(channels // 4), np.kron(pair, pair)).reshape(-1, 4, channels)
        return blocks.swapaxes(0, 1).reshape(channels, channels)
    return np.eye(channels)
