"""Every bijector of the package with small constructors, values to feed it, and independent formulas of its log-dets.

`ENTRIES` maps a name to an `Entry`; `build(entry, state)` makes the bijector at initialisation (`"initial"`) or with all
of its trainable variables set to large random values (`"large"`).
"""

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras

import tfp_dimflows as dimflows

dfb = dimflows.bijectors
tfb, tfd = tfp.bijectors, tfp.distributions

STATES = ("initial", "large")


def assert_close(actual, expected, tolerance=1e-9):
    """Asserts that values agree, relatively or absolutely."""
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One bijector.

    Attributes:
      make: `(seed, dtype) -> bijector`.
      data_shape: event shape of `inverse`'s argument.
      latent_shape: event shape of `forward`'s argument; default: the same.
      condition_shape: event shape of the condition, None for an unconditional bijector.
      draw: `(generator, shape) -> data`.
      reference: `(bijector, y, condition) -> per-dimension inverse log-det`, by formulas of its own.
      forward_reference: the same for the forward direction; default: minus `reference`, moved to the latent's frame.
      move: the movement of dimensions from data to latent, on numpy arrays `[B, ...]`.
      triangular: whether the contribution of a dimension is the logarithm of one entry of the Jacobian.
      in_place: whether the forward contributions are minus the inverse ones, moved (not so for dense maps).
      xla: whether the XLA test runs it.
      half: whether it takes float16 and bfloat16 values.
      silent: names of variables that legitimately have a zero gradient.
      open_to_conditions: whether a part can use a condition, though the entry is tested without one.
      fixed: whether there are no trainable variables.
    """

    name: str
    make: Callable
    data_shape: tuple
    latent_shape: tuple | None = None
    condition_shape: tuple | None = None
    draw: Callable = lambda generator, shape: generator.normal(size=shape)
    reference: Callable | None = None
    forward_reference: Callable | None = None
    move: Callable = lambda y: y
    triangular: bool = False
    in_place: bool = True
    xla: bool = False
    half: bool = True
    silent: tuple = ()
    open_to_conditions: bool = False
    fixed: bool = False

    @property
    def core(self):
        """Whether README's command runs the entry."""
        return self.name in CORE

    @property
    def states(self):
        """The states of variables to look at: the initial one only where it is special."""
        if self.fixed:
            return ("initial",)
        return STATES if self.name in SPECIAL_AT_FIRST else ("large",)

    def data(self, batch=(2,), seed=1, dtype="float64"):
        """Data values."""
        return tf.constant(self.draw(np.random.default_rng(seed), [*batch, *self.data_shape]), dtype)

    def latent(self, batch=(2,), seed=2, dtype="float64"):
        """Latent values."""
        return normal([*batch, *(self.latent_shape or self.data_shape)], seed, dtype)

    def kwargs(self, batch=(2,), seed=3, dtype="float64"):
        """Keyword arguments of every method: the condition, if there is one."""
        if self.condition_shape is None:
            return {}
        return {"condition": normal([*batch, *self.condition_shape], seed, dtype)}


def normal(shape, seed=0, dtype="float64"):
    """Standard normal tensor."""
    return tf.constant(np.random.default_rng(seed).normal(size=shape), dtype)


def build(entry, state, seed=0, dtype="float64"):
    """The bijector and every trainable variable that came into being with it (by TensorFlow's account)."""
    created = []

    def record(next_creator, **kwargs):
        created.append(next_creator(**kwargs))
        return created[-1]

    with tf.variable_creator_scope(record):
        bijector = entry.make(seed, dtype)
    created = [v for v in created if v.trainable and v.dtype.is_floating and not hasattr(v, "is_superseded")]
    if state == "large":
        randomize(created)
    return bijector, created


@functools.cache
def built(name, state, dtype="float64"):
    """A shared instance; tests that change variables build their own."""
    return build(ENTRIES[name], state, dtype=dtype)[0]


def randomize(variables, seed=11):
    """Large random values. A kernel's are scaled so that its outputs stay of order one, however many inputs it has."""
    generator = np.random.default_rng(seed)
    for v in variables:
        scale = min(1.0, 2.0 / np.sqrt(v.shape[0])) if "kernel" in v.name else 1.0
        v.assign(tf.constant(scale * generator.normal(size=v.shape), v.dtype))


def fresh(value):
    """The same values in a new tensor, which no cache knows."""
    return tf.constant(value.numpy())


def event_sum(per_dim, event_shape):
    """The sum over the dimensions of an event."""
    return np.asarray(per_dim).sum(axis=tuple(range(-len(event_shape), 0)))


def distribution(bijector, latent_shape, dtype="float64"):
    """The flow with a standard normal base."""
    base = tfd.Normal(tf.constant(0.0, dtype), tf.constant(1.0, dtype))
    return tfd.TransformedDistribution(tfd.Sample(base, latent_shape), bijector)


def pass_and_gradients(bijector, event_ndims, direction, variables):
    """A function of values and condition to the result, the log-det and gradients of an unsymmetric function of both."""

    def compute(value, kwargs):
        with tf.GradientTape() as tape:
            tape.watch([value, kwargs])
            result = getattr(bijector, direction)(value, **kwargs)
            log_det = getattr(bijector, f"{direction}_log_det_jacobian")(value, event_ndims, **kwargs)
            weights = tf.cast(tf.range(1, value.shape[0] + 1), value.dtype)
            loss = tf.reduce_sum(tf.sin(result) + result**2) / 7.0 + tf.reduce_sum(weights * log_det)
        return result, log_det, tape.gradient(loss, [value, kwargs, variables])

    return compute


class Recorder(tfd.Distribution):
    """A distribution that remembers the values it was asked about."""

    def __init__(self, distribution):
        super().__init__(distribution.dtype, tfd.NOT_REPARAMETERIZED, False, True)
        self.inner = distribution
        self.seen = []

    def _log_prob(self, value):
        self.seen.append(value)
        return self.inner.log_prob(value)

    def _event_shape(self):
        return self.inner.event_shape

    def _batch_shape(self):
        return self.inner.batch_shape


def jacobian(function, value, condition=None):
    """`[B, out, in]` Jacobian of a map that treats the examples of a batch separately, from one backward pass."""
    kwargs = {} if condition is None else {"condition": condition[tf.newaxis]}
    size = int(np.prod(value.shape[1:]))
    tiled = tf.tile(value[tf.newaxis], [size] + [1] * value.shape.rank)
    with tf.GradientTape() as tape:
        tape.watch(tiled)
        result = tf.reshape(function(tiled, **kwargs), [size, -1, size])
        rows = tf.einsum("ibi->", result)
    return tf.transpose(tf.reshape(tape.gradient(rows, tiled), [size, -1, size]), [1, 0, 2]).numpy()


def numerical_jacobian(function, value, condition=None, step=1e-6):
    """`[B, out, in]` Jacobian from central differences."""
    kwargs = {} if condition is None else {"condition": condition[tf.newaxis]}
    size = int(np.prod(value.shape[1:]))
    offsets = step * tf.reshape(tf.eye(size, dtype=value.dtype), [size, 1, *value.shape[1:]])
    higher, lower = (
        tf.reshape(function(value[tf.newaxis] + sign * offsets, **kwargs), [size, -1, size]) for sign in (1.0, -1.0)
    )
    return tf.transpose((higher - lower) / (2.0 * step), [1, 2, 0]).numpy()


# Networks: dense layers over the flattened event, so that every output depends on every input.


def dense(inputs, outputs, seed, dtype, name):
    """A built Keras 3 layer with large random weights, the same in every dtype."""
    layer = keras.layers.Dense(outputs, dtype=dtype, name=name)
    layer.build((None, inputs))
    layer.kernel.assign(normal([inputs, outputs], seed, dtype) / np.sqrt(inputs))
    layer.bias.assign(0.5 * normal([outputs], seed + 1, dtype))
    return layer


class Mixer(keras.Layer):
    """Keras 3 network `x -> parameters` from events of one shape to another."""

    def __init__(self, in_shape, out_shape, seed=0, dtype="float64", prefix=""):
        super().__init__(dtype=dtype)
        self.in_size, self.out_shape = int(np.prod(in_shape)), tuple(out_shape)
        self.hidden = dense(self.in_size, 6, 10 * seed + 1, dtype, f"{prefix}hidden")
        self.out = dense(6, int(np.prod(out_shape)), 10 * seed + 3, dtype, "out")
        self.built = True

    def call(self, x):
        """The parameters."""
        return self.finish(self.hidden(keras.ops.reshape(x, (-1, self.in_size))))

    activation = staticmethod(keras.ops.softsign)

    def finish(self, h):
        """The parameters, from the hidden layer."""
        return keras.ops.reshape(self.out(self.activation(h)), (-1, *self.out_shape))


class ConditionalMixer(Mixer):
    """Keras 3 network `(x, condition) -> parameters`."""

    def __init__(self, in_shape, out_shape, condition_shape, seed=0, dtype="float64"):
        super().__init__(in_shape, out_shape, seed, dtype)
        self.condition_size = int(np.prod(condition_shape))
        self.conditioning = dense(self.condition_size, 6, 10 * seed + 5, dtype, "conditioning")

    def call(self, x, condition=None):
        """The parameters."""
        h = self.hidden(keras.ops.reshape(x, (-1, self.in_size)))
        if condition is not None:
            h = h + self.conditioning(keras.ops.reshape(condition, (-1, self.condition_size)))
        return self.finish(h)


def mixer_for(mask, event_shape, params_per_dim, seed=0, dtype="float64", condition_shape=None):
    """A network that fits a coupling."""
    conditioning, transformed = (p.shape[1:] for p in mask.split(tf.zeros([1, *event_shape])))
    out_shape = [*transformed[:-1], transformed[-1] * params_per_dim]
    if condition_shape is None:
        return Mixer(conditioning, out_shape, seed, dtype)
    return ConditionalMixer(conditioning, out_shape, condition_shape, seed, dtype)


def conditional_coupling(seed=0, name="coupling"):
    """A coupling of four dimensions, given three."""
    mask = dfb.masks.Channel(event_ndims=1, flip=bool(seed % 2))
    network = ConditionalMixer([2], [4], [3], seed)
    return dfb.Coupling(network, mask, dfb.transformers.Affine("exp"), name=name)


class ModuleNetwork(tf.Module):
    """A `tf.Module` network on vectors."""

    def __init__(self, inputs, outputs, seed, dtype):
        super().__init__()
        self.kernel = tf.Variable(normal([inputs, outputs], seed, dtype), name="kernel")

    def __call__(self, x):
        return tf.tanh(tf.matmul(tf.cast(x, self.kernel.dtype), self.kernel))


def sequential(seed, dtype):
    """A Keras 3 `Sequential` from 3 to 6 entries."""
    return keras.Sequential([keras.Input([3], dtype=dtype), dense(3, 5, seed, dtype, "a"), dense(5, 6, seed + 2, dtype, "b")])


def tf_keras_network(seed, dtype):
    """A built tf_keras layer from 3 to 6 entries."""
    kernel = tf_keras.initializers.Constant(normal([3, 6], seed).numpy())
    network = tf_keras.layers.Dense(6, activation="tanh", kernel_initializer=kernel, dtype=dtype)
    network.build([None, 3])
    return network


SPLINE_BINS = 3


def _spline(params):
    width, height, slope = tf.split(params, [SPLINE_BINS, SPLINE_BINS, SPLINE_BINS - 1], axis=-1)
    return tfb.RationalQuadraticSpline(
        bin_widths=8.0 * (0.1 / SPLINE_BINS + 0.9 * tf.nn.softmax(width)),
        bin_heights=8.0 * (0.1 / SPLINE_BINS + 0.9 * tf.nn.softmax(height)),
        knot_slopes=tf.nn.softplus(slope) + 0.1,
        range_min=-4.0,
    )


def spline():
    """TFP's spline as a transformer."""
    return dfb.Transformer(_spline, params_per_dim=3 * SPLINE_BINS - 1)


# Movements of dimensions, on numpy arrays.


def squeezed(y, order="channel_major", factor=2):
    """Space to depth of `[..., H, W, C]`, one output channel at a time, in the order of RealNVP and Glow or of TensorFlow."""
    f, channels = factor, y.shape[-1]
    result = np.empty([*y.shape[:-3], y.shape[-3] // f, y.shape[-2] // f, f * f * channels], y.dtype)
    for c in range(channels):
        for fy in range(f):
            for fx in range(f):
                place = c * f * f + fy * f + fx if order == "channel_major" else (fy * f + fx) * channels + c
                result[..., place] = y[..., fy::f, fx::f, c]
    return result


def shuffled(permutation):
    """What `tfb.Permute(permutation).inverse` does: the entry at `permutation[j]` comes from j."""

    def move(y):
        result = np.empty_like(y)
        for j, i in enumerate(permutation):
            result[..., i] = y[..., j]
        return result

    return move


def composed(*moves):
    """One movement after the other."""

    def move(y):
        for m in moves:
            y = m(y)
        return y

    return move


def stay(y):
    """No movement."""
    return y


# Formulas.


def variable(bijector, name):
    """The value of the one variable of that name."""
    (found,) = [v for v in bijector.variables if v.name.split(":")[0].split("/")[-1] == name]
    return found.numpy()


def actnorm_reference(bijector, y, condition):
    return np.broadcast_to(bijector.parameters["log_scale_factor"] * variable(bijector, "log_scale"), y.shape)


def affine_reference(bijector, y, condition):
    log_scale = bijector.parameters["log_scale"]
    return np.broadcast_to(0.0 if log_scale is None else np.asarray(log_scale), y.shape)


def zero_reference(bijector, y, condition):
    return np.zeros(y.shape)


BOUNDS = [None, (0.5, None), (None, 2.0), (-1.0, 3.0)]


def standardize_reference(bijector, y, condition):
    free, low, high, both = np.moveaxis(y.numpy(), -1, 0)
    slopes = [np.zeros_like(free), -np.log(low - 0.5), -np.log(2.0 - high), np.log(1.0 / (both + 1.0) + 1.0 / (3.0 - both))]
    return np.stack(slopes, axis=-1) - variable(bijector, "log_scale")


def logit_reference(bijector, y, condition):
    n, a = bijector.parameters["grey_levels"], bijector.parameters["alpha"]
    p = a + (1 - 2 * a) * y.numpy() / n
    x = np.log(p) - np.log(1 - p)
    return np.log1p(np.exp(x)) + np.log1p(np.exp(-x)) + np.log(1 - 2 * a) - np.log(n)


def conv_matrix(bijector, direction, channels):
    """The matrix of a 1x1 convolution."""
    return getattr(bijector, direction)(tf.eye(channels, dtype="float64")[:, tf.newaxis]).numpy()[:, 0].T


def conv_reference(direction):
    """Each attribution from the matrix of the direction."""

    def reference(bijector, value, condition):
        channels = value.shape[-1]
        matrix = conv_matrix(bijector, direction, channels)
        log_singular = np.log(np.linalg.svd(matrix)[1])
        eigenvalues, vectors = np.linalg.eigh(matrix.T @ matrix)
        # P is that of the initial matrix, and stays; the diagonal of U is that of the present one.
        order = pivots(conv_matrix(bijector.copy(), "inverse", channels))
        rows = conv_matrix(bijector, "inverse", channels)[order]
        minors = [np.linalg.slogdet(rows[:k, :k])[1] for k in range(channels + 1)]
        log_scale, log_scale_of_latent = np.diff(minors), np.empty(channels)
        log_scale_of_latent[order] = -log_scale
        contributions = {
            "polar": np.square(vectors) @ (0.5 * np.log(eigenvalues)),
            "svd_sorted": np.sort(log_singular)[::-1],
            "lu": log_scale if direction == "inverse" else log_scale_of_latent,
            "uniform": np.full([channels], log_singular.sum() / channels),
        }
        return np.broadcast_to(contributions[bijector.parameters["attribution"]], value.shape)

    return reference


def pivots(matrix):
    """Order of the rows in Gaussian elimination with partial pivoting."""
    rest, order = matrix.copy(), np.arange(len(matrix))
    for k in range(len(rest)):
        best = k + np.argmax(np.abs(rest[k:, k]))
        rest[[k, best]], order[[k, best]] = rest[[best, k]], order[[best, k]]
        rest[k + 1 :] -= np.outer(rest[k + 1 :, k] / rest[k, k], rest[k])
    return order


def conditions(mask, shape):
    """Booleans of the event's shape: where a mask conditions."""
    where = np.zeros(shape, bool)
    if isinstance(mask, dfb.masks.Checkerboard):
        for i in range(shape[0]):
            for j in range(shape[1]):
                where[i, j] = (i + j) % 2 == mask.parity
    elif isinstance(mask, dfb.masks.Columns):
        where[:, mask.parity :: 2] = True
    elif isinstance(mask, dfb.masks.Index):
        where[list(INDEX)] = True
    else:
        count = mask.num_conditioning or shape[-1] // 2
        where[..., slice(-count, None) if mask.flip else slice(0, count)] = True
    return where


def transformer_reference(log_det, params_per_dim):
    """`(1 - b) log_det(bijector, values, params)`, with the parameters from the network's output."""

    def reference(bijector, y, condition):
        mask, network = bijector.mask, bijector.parameters["network"]
        where = conditions(mask, tuple(y.shape[1:]))
        if isinstance(mask, dfb.masks.Checkerboard):
            given = np.where(where, y.numpy(), 0.0)
        elif isinstance(mask, dfb.masks.Columns):
            given = y.numpy()[:, :, mask.parity :: 2]
        else:
            channels = where.reshape(-1, where.shape[-1])[0]
            given = y.numpy()[..., channels]
        kwargs = {} if condition is None else {"condition": condition}
        params = np.asarray(network(tf.constant(given), **kwargs))
        if isinstance(mask, dfb.masks.Checkerboard):
            return np.where(where, 0.0, log_det(bijector, y.numpy(), params.reshape(*y.shape, params_per_dim)))
        result, values = np.zeros(y.shape), y.numpy()[:, ~where]
        result[:, ~where] = log_det(bijector, values, params.reshape(*values.shape, params_per_dim))
        return result

    return reference


def coupling_reference(log_scale):
    """`(1 - b) s`, with s from the network's output."""
    return transformer_reference(lambda bijector, values, params: log_scale(bijector, params[..., 1]), 2)


def mixture_log_det(x, logits, means, log_scales, log_scale, smooth):
    """s + log F' - log F - log (1 - F) of a mixture of logistics' F, or of 0.9 F + 0.05; for moderate numbers."""
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    u = (x[..., np.newaxis] - means) * np.exp(-log_scales)
    below, above = 1.0 / (1.0 + np.exp(-u)), 1.0 / (1.0 + np.exp(u))
    slope = (weights * below * above * np.exp(-log_scales)).sum(-1)
    low, high = (weights * below).sum(-1), (weights * above).sum(-1)
    if smooth:
        slope, low, high = 0.9 * slope, 0.9 * low + 0.05, 0.9 * high + 0.05
    return log_scale + np.log(slope) - np.log(low) - np.log(high)


def mixture_reference(bijector, y, condition):
    p = bijector.parameters
    mixture = (np.asarray(p[name]) for name in ("logits", "means", "log_scales", "log_scale"))
    return mixture_log_det(y.numpy(), *mixture, p["smooth"])


COMPONENTS = 3


def _mixture_of_coupling(bijector, values, params):
    logits, means, log_scales = np.split(params[..., 2:], 3, axis=-1)
    smooth = bijector.parameters["smooth"]
    return mixture_log_det(values, logits, means, np.maximum(log_scales, -7.0), np.tanh(params[..., 0]), smooth)


mixture_coupling_reference = transformer_reference(_mixture_of_coupling, 2 + 3 * COMPONENTS)


def spline_inverse_and_log_det(y, params, num_bins, bound):
    """Inverse of one number under a rational-quadratic spline, by bins and the quadratic formula of Durkan et al."""
    if abs(y) >= bound:
        return y, 0.0
    raw = np.split(params, [num_bins, 2 * num_bins])
    sizes = [2.0 * bound * (1e-3 + (1.0 - 1e-3 * num_bins) * np.exp(r) / np.exp(r).sum()) for r in raw[:2]]
    xs, ys = (np.concatenate([[-bound], -bound + np.cumsum(size)]) for size in sizes)
    inner = 1e-3 + (1.0 - 1e-3) * np.log1p(np.exp(raw[2] + np.log(np.e - 1.0)))
    slopes = np.concatenate([[1.0], inner, [1.0]])
    k = min(np.searchsorted(ys, y, side="right") - 1, num_bins - 1)
    width, height, low, high = xs[k + 1] - xs[k], ys[k + 1] - ys[k], slopes[k], slopes[k + 1]
    mean, bend = height / width, low + high - 2.0 * height / width
    a = height * (mean - low) + (y - ys[k]) * bend
    b = height * low - (y - ys[k]) * bend
    c = -mean * (y - ys[k])
    xi = 2.0 * c / (-b - np.sqrt(b**2 - 4.0 * a * c))
    slope = mean**2 * (high * xi**2 + 2.0 * mean * xi * (1.0 - xi) + low * (1.0 - xi) ** 2)
    slope /= (mean + bend * xi * (1.0 - xi)) ** 2
    return xs[k] + width * xi, -np.log(slope)


BINS, BOUND = 4, 2.0


def _spline_of_coupling(bijector, values, params):
    log_dets = [
        spline_inverse_and_log_det(v, p, BINS, BOUND)[1] for v, p in zip(values.ravel(), params.reshape(values.size, -1))
    ]
    return np.reshape(log_dets, values.shape)


spline_coupling_reference = transformer_reference(_spline_of_coupling, 3 * BINS - 1)


tanh_reference = coupling_reference(lambda bijector, raw: variable(bijector, "gain") * np.tanh(raw))
sigmoid_reference = coupling_reference(lambda bijector, raw: -np.log1p(np.exp(-(raw + 2.0))))
exp_reference = coupling_reference(lambda bijector, raw: raw)


def conditional_affine_reference(bijector, y, condition):
    params = np.asarray(bijector.parameters["network"](condition))
    return params.reshape(*y.shape, 2)[..., 1]


def chain_reference(moves):
    """What every part contributes, added up in the frame of the data; `moves[k]` is the movement of the k-th part."""

    def reference(bijector, y, condition):
        shape, size = y.shape, int(np.prod(y.shape[1:]))
        ids = np.arange(size).reshape(y.shape[1:])
        total = np.zeros([y.shape[0], size])
        for part, move in zip(bijector.bijectors, moves):
            kwargs = {"condition": condition} if condition is not None and getattr(part, "uses_condition", False) else {}
            contribution = dimflows.inverse_log_det_per_dim(part, y, **kwargs).numpy()
            total[:, ids.ravel()] += contribution.reshape(len(total), -1)
            y, ids = fresh(part.inverse(y, **kwargs)), move(ids[np.newaxis])[0]
        return total.reshape(shape)

    return reference


def multiscale_walk(bijector, y, moves, condition=None):
    """The walk through the levels, by flat indices alone.

    Returns the latent parts (deepest first), the cumulative per-dimension log-dets after each level, and the total.
    """
    levels, factorization = bijector.levels, bijector.factorization
    exits = list(bijector.parameters.get("exits") or [])
    exits += [None] * (len(levels) - len(exits))
    shape, batch = y.shape[1:], y.shape[0]
    ids = np.arange(np.prod(shape)).reshape(shape)
    h, totals, total, parts = y, [], np.zeros([batch, ids.size]), []
    for k, (level, move) in enumerate(zip(levels, moves)):
        uses = condition is not None and getattr(level, "uses_condition", False)
        kwargs = {"condition": condition} if uses else {}
        contribution = dimflows.inverse_log_det_per_dim(level, h, **kwargs).numpy()
        total[:, ids.ravel()] += contribution.reshape(batch, -1)
        totals.append(total.reshape(-1, *shape).copy())
        h, ids = fresh(level.inverse(h, **kwargs)), move(ids[np.newaxis])[0]
        if k == len(levels) - 1:
            leave, stays, given = ids, None, tf.zeros_like(h)
        elif factorization is None:
            continue
        else:
            leave, stays = factorization.left[k], factorization.kept[k]
        by_id = np.zeros([batch, np.prod(shape)])
        by_id[:, ids.ravel()] = h.numpy().reshape(batch, -1)
        left = tf.constant(by_id[:, leave.ravel()].reshape(batch, *leave.shape))
        if stays is not None:
            given = h = tf.constant(by_id[:, stays.ravel()].reshape(batch, *stays.shape))
            ids = stays
        if exits[k] is not None:
            contribution = exits[k].inverse_log_det_per_dim(left, condition=given).numpy()
            total[:, leave.ravel()] += contribution.reshape(batch, -1)
            left = exits[k].inverse(left, condition=given)
        parts.insert(0, left.numpy().reshape(batch, -1))
    return parts, totals, total.reshape(-1, *shape)


def multiscale_reference(*moves):
    """`multiscale_walk`'s total."""

    def reference(bijector, y, condition):
        return multiscale_walk(bijector, y, moves, condition)[2]

    return reference


def multiscale_move(factorization, *moves):
    """The movement of a `Multiscale`: the deepest part first."""

    def move(y):
        ids = np.arange(np.prod(y.shape[1:])).reshape(y.shape[1:])
        order = []
        for k, m in enumerate(moves):
            ids = m(ids[np.newaxis])[0]
            if factorization is not None and k < len(moves) - 1:
                order = [*factorization.left[k].ravel(), *order]
                ids = factorization.kept[k]
        return y.reshape(len(y), -1)[:, [*ids.ravel(), *order]]

    return move


def halved(y, axis):
    """The first and the second elements of all pairs of neighbours along an axis."""
    first, second = [slice(None)] * y.ndim, [slice(None)] * y.ndim
    first[axis], second[axis] = slice(0, None, 2), slice(1, None, 2)
    return y[tuple(first)], y[tuple(second)]


def pair_axis(num_details, k, rank):
    """The axis along which detail k of a `PNF` grows its image: the height for the finest one, then in turns."""
    if rank == 1:
        return -1
    return -2 if (num_details - k) % 2 else -3


def haar_move(axis):
    """The movement of a `HaarSplit`."""
    return lambda y: np.concatenate(halved(y, axis), axis=axis)


def haar_reference(bijector, y, condition):
    return np.full(y.shape, 0.0 if bijector.parameters["orthonormal"] else -0.5 * np.log(2.0))


def given_to_detail(low, condition):
    """What a detail of a `PNF` is conditioned on, in numpy."""
    if condition is None:
        return low
    spread = np.asarray(condition).reshape(len(low), *[1] * (low.ndim - 2), -1)
    return np.concatenate([low, np.broadcast_to(spread, [*low.shape[:-1], spread.shape[-1]])], axis=-1)


def pnf_walk(bijector, y, condition=None):
    """The walk through the stages of a `PNF`, by strides of numpy and flat indices alone.

    Returns what every stage models, what it is given, its flat latent values, and the total per-dimension log-det.
    """
    stages, divisor = bijector.stages, np.sqrt(2.0) if bijector.parameters["orthonormal"] else 2.0
    h, rank, batch = y.numpy(), y.shape.rank - 1, y.shape[0]
    ids = np.arange(h[0].size).reshape(h.shape[1:])
    total, parts = np.zeros([batch, ids.size]), []
    for k in reversed(range(1, len(stages))):
        if not bijector.parameters["orthonormal"]:
            total[:, ids.ravel()] -= 0.5 * np.log(2.0)
        axis = pair_axis(len(stages) - 1, k, rank)
        (first, second), (ids, detail_ids) = halved(h, axis), halved(ids, axis)
        h = (first + second) / divisor
        parts.insert(0, ((first - second) / divisor, given_to_detail(h, condition), detail_ids))
    parts.insert(0, (h, condition, ids))
    latent = []
    for stage, (value, given, places) in zip(stages, parts):
        uses = given is not None and getattr(stage, "uses_condition", False)
        kwargs = {"condition": tf.constant(np.asarray(given))} if uses else {}
        contribution = dimflows.inverse_log_det_per_dim(stage, tf.constant(value), **kwargs).numpy()
        total[:, places.ravel()] += contribution.reshape(batch, -1)
        latent.append(stage.inverse(tf.constant(value), **kwargs).numpy().reshape(batch, -1))
    values, given, _ = zip(*parts)
    return values, given, latent, total.reshape(y.shape)


def pnf_reference(bijector, y, condition):
    """`pnf_walk`'s total."""
    return pnf_walk(bijector, y, condition)[3]


def pnf_move(*moves):
    """The movement of a `PNF`: the base first, then the details from coarse to fine; `moves[k]` is that of stage k."""

    def move(y):
        parts, rank, num_details = [], y.ndim - 1, len(moves) - 1
        for k in reversed(range(1, num_details + 1)):
            y, detail = halved(y, pair_axis(num_details, k, rank))
            parts.insert(0, detail)
        return np.concatenate([m(part).reshape(len(part), -1) for m, part in zip(moves, [y, *parts])], axis=-1)

    return move


# The entries.

IMAGE, GRID, VECTOR = (2, 4, 2), (4, 4, 1), (4,)
INDEX = (4, 1, 2)

TRANSFORMERS = {
    "tanh": (lambda dtype: dfb.transformers.Affine("tanh", 0.7, dtype), 2, tanh_reference),
    "sigmoid": (lambda dtype: dfb.transformers.Affine("sigmoid"), 2, sigmoid_reference),
    "exp": (lambda dtype: dfb.transformers.Affine("exp"), 2, exp_reference),
    "additive": (lambda dtype: dfb.transformers.Additive(), 1, zero_reference),
    "spline": (lambda dtype: spline(), 3 * SPLINE_BINS - 1, None),
}

MASKS = {
    "checkerboard": (lambda: dfb.masks.Checkerboard(), IMAGE, "tanh"),
    "checkerboard_odd": (lambda: dfb.masks.Checkerboard(1), IMAGE, "sigmoid"),
    "channel": (lambda: dfb.masks.Channel(), IMAGE, "exp"),
    "channel_flip": (lambda: dfb.masks.Channel(flip=True), IMAGE, "tanh"),
    "channel_vector": (lambda: dfb.masks.Channel(event_ndims=1), (6,), "sigmoid"),
    "channel_vector_flip": (lambda: dfb.masks.Channel(flip=True, event_ndims=1), (6,), "exp"),
    "channel_some": (lambda: dfb.masks.Channel(event_ndims=1, num_conditioning=2), (5,), "tanh"),
    "channel_some_flip": (lambda: dfb.masks.Channel(flip=True, num_conditioning=1), (2, 2, 3), "sigmoid"),
    "columns": (lambda: dfb.masks.Columns(), IMAGE, "exp"),
    "columns_odd": (lambda: dfb.masks.Columns(1), IMAGE, "tanh"),
    "index": (lambda: dfb.masks.Index(INDEX, 5), (5,), "sigmoid"),
}


def make_coupling(mask, shape, transformer, condition_shape=None):
    """Constructor of a `Coupling`."""
    make_transformer, params_per_dim, _ = TRANSFORMERS[transformer]

    def make(seed, dtype):
        network = mixer_for(mask(), shape, params_per_dim, seed, dtype, condition_shape)
        return dfb.Coupling(network, mask(), make_transformer(dtype))

    return make


def _couplings():
    """Every mask with one transformer, every transformer with one mask."""
    kinds = [(name, transformer) for name, (_, _, transformer) in MASKS.items()]
    kinds += [("checkerboard", "spline")] + [("index", kind) for kind in TRANSFORMERS if kind != MASKS["index"][2]]
    for name, kind in kinds:
        mask, shape, _ = MASKS[name]
        yield Entry(
            f"coupling_{name}_{kind}",
            make_coupling(mask, shape, kind),
            shape,
            reference=TRANSFORMERS[kind][2],
            triangular=True,
            xla=name in ("checkerboard", "columns", "index") and kind in (MASKS[name][2], "spline"),
            half=kind != "spline",
        )
    for name, shape in (("checkerboard", IMAGE), ("index", (5,))):
        yield Entry(
            f"coupling_{name}_conditional",
            make_coupling(MASKS[name][0], shape, "tanh", (3,)),
            shape,
            condition_shape=(3,),
            reference=tanh_reference,
            triangular=True,
            xla=name == "index",
        )


def affine_coupling(mask, shape, seed, dtype, scale="tanh", condition_shape=None):
    """A small `AffineCoupling`."""
    network = mixer_for(mask, shape, 2, seed, dtype, condition_shape)
    return dfb.AffineCoupling(network, mask, scale, dtype=tf.as_dtype(dtype))


def vector_coupling(network, num_conditioning, dtype):
    """A small `AffineCoupling` of six dimensions with a given network."""
    mask = dfb.masks.Channel(event_ndims=1, num_conditioning=num_conditioning)
    return dfb.AffineCoupling(network, mask, "tanh", dtype=tf.as_dtype(dtype))


def pixels(levels):
    """Data in the range of `LogitPreprocess`."""
    return lambda generator, shape: levels * generator.uniform(0.001, 0.999, size=shape)


def _elementwise():
    yield Entry("actnorm", lambda s, t: dfb.ActNorm(2, dtype=t), IMAGE, reference=actnorm_reference, triangular=True, xla=True)
    yield Entry(
        "actnorm_factor",
        lambda s, t: dfb.ActNorm(4, log_scale_factor=3.0 if t == "float32" else 0.5, dtype=t),
        VECTOR,
        reference=actnorm_reference,
        triangular=True,
    )
    yield Entry(
        "actnorm_pixels",
        lambda s, t: dfb.ActNorm(list(IMAGE), log_scale_factor=0.5, dtype=t),
        IMAGE,
        reference=actnorm_reference,
        triangular=True,
        xla=True,
    )
    yield Entry(
        "standardize",
        lambda s, t: dfb.Standardize(4, BOUNDS, t),
        VECTOR,
        draw=lambda generator, shape: generator.uniform(0.6, 1.9, size=shape),
        reference=standardize_reference,
        triangular=True,
        xla=True,
        fixed=True,
    )
    for smooth in (False, True):
        yield Entry(
            "mixture_logistic_cdf" + smooth * "_smooth",
            # With this scale, every latent value that the tests draw is within the image of the smooth map.
            functools.partial(
                lambda s, t, smooth: dfb.MixtureLogisticCDF(
                    *(normal([*VECTOR, COMPONENTS], s + k, t) for k in range(3)), 0.1 * normal(VECTOR, s + 3, t), 0.5, smooth
                ),
                smooth=smooth,
            ),
            VECTOR,
            reference=mixture_reference,
            triangular=True,
            xla=True,
            fixed=True,
        )
    yield Entry(
        "elementwise_affine",
        lambda s, t: dfb.ElementwiseAffine(normal(VECTOR, s, t), normal(VECTOR, s + 1, t)),
        VECTOR,
        reference=affine_reference,
        triangular=True,
        xla=True,
        fixed=True,
    )
    yield Entry(
        "elementwise_affine_variables",
        lambda s, t: dfb.ElementwiseAffine(tf.Variable(normal(VECTOR, s, t)), tf.Variable(normal(VECTOR, s + 1, t))),
        VECTOR,
        reference=affine_reference,
        triangular=True,
    )
    yield Entry(
        "elementwise_shift",
        lambda s, t: dfb.ElementwiseAffine(normal(VECTOR, s, t)),
        VECTOR,
        reference=zero_reference,
        triangular=True,
        fixed=True,
    )
    for levels, alpha in ((256, 0.05), (8, 0.2)):
        yield Entry(
            f"logit_{levels}",
            functools.partial(lambda s, t, levels, alpha: dfb.LogitPreprocess(levels, alpha), levels=levels, alpha=alpha),
            VECTOR,
            draw=pixels(levels),
            reference=logit_reference,
            triangular=True,
            xla=levels == 8,
            fixed=True,
        )
    for kind in ("exp", "spline"):
        make_transformer, params_per_dim, _ = TRANSFORMERS[kind]

        def make(seed, dtype, make_transformer=make_transformer, params_per_dim=params_per_dim):
            network = Mixer(IMAGE, [2, 4, 2 * params_per_dim], seed, dtype)
            return dfb.ConditionalTransform(network, make_transformer(dtype))

        yield Entry(
            f"conditional_transform_{kind}",
            make,
            IMAGE,
            condition_shape=IMAGE,
            reference=conditional_affine_reference if kind == "exp" else None,
            triangular=True,
            xla=kind == "exp",
            half=kind == "exp",
        )
    yield Entry(
        "conditional_transform_vector",
        lambda s, t: dfb.ConditionalTransform(Mixer([3], [8], s, t), dfb.transformers.Affine("exp"), event_ndims=1),
        VECTOR,
        condition_shape=(3,),
        reference=conditional_affine_reference,
        triangular=True,
    )


def _moves_and_maps():
    for order in ("channel_major", "position_major"):
        yield Entry(
            f"squeeze_{order}",
            functools.partial(lambda s, t, order: dfb.Squeeze(order=order), order=order),
            (2, 4, 2),
            (1, 2, 8),
            reference=zero_reference,
            move=functools.partial(squeezed, order=order),
            triangular=True,
            xla=True,
            fixed=True,
        )
    yield Entry(
        "squeeze_3",
        lambda s, t: dfb.Squeeze(3, "position_major"),
        (3, 3, 2),
        (1, 1, 18),
        reference=zero_reference,
        move=functools.partial(squeezed, order="position_major", factor=3),
        triangular=True,
        fixed=True,
    )
    for attribution in ("polar", "svd_sorted", "lu", "uniform"):
        yield Entry(
            f"conv_{attribution}",
            functools.partial(lambda s, t, attribution: dfb.InvertibleConv1x1(4, attribution, s, t), attribution=attribution),
            (2, 1, 4),
            reference=conv_reference("inverse"),
            forward_reference=conv_reference("forward"),
            in_place=False,
            xla=attribution == "polar",
        )
    yield Entry(
        "affine_coupling_tanh",
        lambda s, t: affine_coupling(dfb.masks.Checkerboard(), IMAGE, s, t),
        IMAGE,
        reference=tanh_reference,
        triangular=True,
    )
    yield Entry(
        "affine_coupling_sigmoid",
        lambda s, t: affine_coupling(dfb.masks.Channel(flip=True), IMAGE, s, t, "sigmoid"),
        IMAGE,
        reference=sigmoid_reference,
        triangular=True,
        xla=True,
    )
    yield Entry(
        "affine_coupling_conditional",
        lambda s, t: affine_coupling(dfb.masks.Channel(), IMAGE, s, t, "exp", IMAGE),
        IMAGE,
        condition_shape=IMAGE,
        reference=exp_reference,
        triangular=True,
    )
    for name, network in (("sequential", sequential), ("tf_keras", tf_keras_network)):
        yield Entry(
            f"affine_coupling_{name}",
            functools.partial(lambda s, t, network: vector_coupling(network(s, t), 3, t), network=network),
            (6,),
            reference=tanh_reference,
            triangular=True,
        )
    yield Entry(
        "affine_coupling_module",
        lambda s, t: vector_coupling(ModuleNetwork(2, 8, s, t), 2, t),
        (6,),
        reference=tanh_reference,
        triangular=True,
    )
    yield Entry(
        "additive_coupling",
        lambda s, t: dfb.AdditiveCoupling(mixer_for(dfb.masks.Columns(), IMAGE, 1, s, t), dfb.masks.Columns()),
        IMAGE,
        reference=zero_reference,
        triangular=True,
    )


def mixture_coupling(mask, shape, seed, dtype, condition_shape=None):
    """A small `MixtureLogisticCoupling`."""
    network = mixer_for(mask, shape, 2 + 3 * COMPONENTS, seed, dtype, condition_shape)
    return dfb.MixtureLogisticCoupling(network, mask, COMPONENTS)


def spline_coupling(mask, shape, seed, dtype, condition_shape=None):
    """A small `SplineCoupling`."""
    return dfb.SplineCoupling(mixer_for(mask, shape, 3 * BINS - 1, seed, dtype, condition_shape), mask, BINS, BOUND)


def _nonlinear_couplings():
    kinds = {
        "mixture": (mixture_coupling, mixture_coupling_reference),
        "spline": (spline_coupling, spline_coupling_reference),
    }
    for kind, (make, reference) in kinds.items():
        for name, mask, shape, condition_shape in (
            ("vector", dfb.masks.Channel(event_ndims=1, num_conditioning=2), (5,), None),
            ("columns", dfb.masks.Columns(1), IMAGE, None),
            ("conditional", dfb.masks.Index(INDEX, 5), (5,), (3,)),
        ):
            yield Entry(
                f"{kind}_coupling_{name}",
                functools.partial(
                    lambda s, t, make, mask, shape, condition_shape: make(mask, shape, s, t, condition_shape),
                    make=make,
                    mask=mask,
                    shape=shape,
                    condition_shape=condition_shape,
                ),
                shape,
                condition_shape=condition_shape,
                reference=reference,
                triangular=True,
                xla=name in ("vector", "columns"),
                half=kind != "spline",
            )


def column_blocks_reference(bijector, y, condition):
    """Even columns through an ActNorm, odd ones through a coupling."""
    first, second = bijector.parameters["first"], bijector.parameters["second"]
    result = np.empty(y.shape)
    result[:, :, 0::2] = actnorm_reference(first, y[:, :, 0::2], None)
    result[:, :, 1::2] = exp_reference(second, y[:, :, 1::2], None)
    return result


def halves_reference(bijector, y, condition):
    """A permutation of the first half of a vector, an ActNorm of the second."""
    return np.concatenate([np.zeros(y[:, :2].shape), actnorm_reference(bijector.parameters["second"], y[:, 2:], None)], axis=-1)


def _blocks():
    yield Entry(
        "blockwise_columns",
        lambda s, t: dfb.Blockwise(
            dfb.masks.Columns(), dfb.ActNorm(2, dtype=t), affine_coupling(dfb.masks.Channel(), (2, 2, 2), s, t, "exp")
        ),
        IMAGE,
        reference=column_blocks_reference,
        triangular=True,
        xla=True,
    )
    yield Entry(
        "blockwise_moving_half",
        lambda s, t: dfb.Blockwise(dfb.masks.Channel(event_ndims=1), tfb.Permute([1, 0]), dfb.ActNorm(2, dtype=t)),
        VECTOR,
        reference=halves_reference,
        move=shuffled([1, 0, 2, 3]),
        triangular=True,
    )


def glow_step(channels, shape, seed, dtype, condition_shape=None):
    """Actnorm, 1x1 convolution, affine coupling, from data to latent."""
    mask = dfb.masks.Channel(event_ndims=len(shape))
    return dfb.Chain(
        [
            dfb.ActNorm(channels, dtype=dtype),
            dfb.InvertibleConv1x1(channels, seed=seed, dtype=dtype),
            affine_coupling(mask, shape, seed, dtype, "sigmoid", condition_shape),
        ]
    )


PERMUTATION = [2, 0, 3, 1]
SHUFFLE = np.random.default_rng(4).permutation(16).tolist()


def _chains():
    yield Entry(
        "chain_vector",
        lambda s, t: dfb.Chain(
            [
                affine_coupling(dfb.masks.Channel(event_ndims=1), VECTOR, s, t),
                tfb.Permute(PERMUTATION),
                tfb.Scale(tf.Variable(normal(VECTOR, s + 4, t))),
                dfb.ActNorm(4, dtype=t),
            ]
        ),
        VECTOR,
        reference=chain_reference([stay, shuffled(PERMUTATION), stay, stay]),
        move=shuffled(PERMUTATION),
        triangular=True,
        xla=True,
        half=False,
    )
    yield Entry(
        "chain_squeeze",
        lambda s, t: dfb.Chain(
            [
                dfb.LogitPreprocess(8),
                affine_coupling(dfb.masks.Checkerboard(), GRID, s, t),
                dfb.Squeeze(),
                dfb.ActNorm(4, dtype=t),
                tfb.Permute(PERMUTATION),
                affine_coupling(dfb.masks.Channel(), (2, 2, 4), s + 1, t),
            ]
        ),
        GRID,
        (2, 2, 4),
        draw=pixels(8),
        reference=chain_reference([stay, stay, squeezed, stay, shuffled(PERMUTATION), stay]),
        move=composed(squeezed, shuffled(PERMUTATION)),
        xla=True,
    )
    yield Entry(
        "chain_elementwise_after_moves",
        lambda s, t: dfb.Chain(
            [
                dfb.ElementwiseAffine(normal(GRID, s, t), normal(GRID, s + 1, t)),
                dfb.Squeeze(order="position_major"),
                tfb.Chain(
                    [
                        tfb.Permute(PERMUTATION),
                        dfb.ElementwiseAffine(normal([2, 2, 4], s, t), normal([2, 2, 4], s + 2, t)),
                    ]
                ),
                tfb.Invert(tfb.Sinh()),
                tfb.Reshape([2, 2, 4], [16]),
                tfb.SinhArcsinh(skewness=tf.constant(0.3, t)),
            ]
        ),
        GRID,
        (16,),
        move=composed(
            functools.partial(squeezed, order="position_major"), shuffled(PERMUTATION), lambda y: y.reshape(len(y), 16)
        ),
        triangular=True,
        half=False,
        fixed=True,
    )
    yield Entry(
        "chain_nested_conditional",
        lambda s, t: dfb.Chain(
            [
                dfb.Chain([dfb.ActNorm(4, dtype=t), affine_coupling(dfb.masks.Channel(event_ndims=1), VECTOR, s, t)]),
                tfb.Invert(make_coupling(lambda: dfb.masks.Index([0, 3], 4), VECTOR, "exp", (3,))(s, t)),
                tfb.Chain([tfb.Shift(tf.Variable(normal(VECTOR, s, t))), tfb.Chain([glow_step(4, VECTOR, s + 3, t, (3,))])]),
            ]
        ),
        VECTOR,
        condition_shape=(3,),
        in_place=False,
        xla=True,
        half=False,
    )

    yield Entry(
        "chain_recompute",
        lambda s, t: dfb.Chain(
            [
                tfb.Scale(tf.Variable(normal([1], s, t))),
                dfb.Squeeze(),
                dfb.Chain([glow_step(4, (2, 2, 4), s + 1, t)], memory="recompute"),
                affine_coupling(dfb.masks.Checkerboard(), (2, 2, 4), s + 2, t),
            ],
            memory="recompute",
        ),
        GRID,
        (2, 2, 4),
        move=squeezed,
        in_place=False,
        xla=True,
        half=False,
    )
    yield Entry(
        "chain_recompute_conditional",
        lambda s, t: dfb.Chain(
            [
                tfb.Invert(make_coupling(lambda: dfb.masks.Index([0, 3], 4), VECTOR, "exp", (3,))(s, t)),
                tfb.Permute(PERMUTATION),
                make_coupling(lambda: dfb.masks.Channel(event_ndims=1), VECTOR, "tanh", (3,))(s + 1, t),
            ],
            memory="recompute",
        ),
        VECTOR,
        condition_shape=(3,),
        move=shuffled(PERMUTATION),
        xla=True,
        half=False,
    )


def exit_for(shape, left_shape, seed, dtype, prefix=""):
    """Glow's split prior."""
    network = Mixer(shape, [*left_shape[:-1], 2 * left_shape[-1]], seed, dtype, prefix)
    return dfb.ConditionalTransform(network, dfb.transformers.Affine("exp"), event_ndims=len(shape))


def squeezing_levels(seed, dtype, condition_shape=None):
    """Three levels of a 4x4x1 image, the first two of which squeeze."""
    return [
        dfb.Chain(
            [
                affine_coupling(dfb.masks.Checkerboard(), GRID, seed, dtype),
                dfb.Squeeze(),
                glow_step(4, (2, 2, 4), seed + 1, dtype, condition_shape),
            ]
        ),
        dfb.Chain(
            [
                dfb.Squeeze(),
                dfb.ActNorm(8, dtype=dtype),
                affine_coupling(dfb.masks.Channel(), (1, 1, 8), seed + 2, dtype),
            ]
        ),
        dfb.Chain([dfb.ActNorm(4, dtype=dtype), affine_coupling(dfb.masks.Channel(flip=True), (1, 1, 4), seed + 3, dtype)]),
    ]


def plain_levels(shapes, seed, dtype):
    """Levels that leave every dimension in its place: actnorm and a coupling."""
    levels = []
    for k, shape in enumerate(shapes):
        if len(shape) == 1:
            mask = dfb.masks.Channel(event_ndims=1, num_conditioning=1)
        else:
            mask = dfb.masks.Channel() if shape[0] == 1 else dfb.masks.Checkerboard(k % 2)
        levels.append(dfb.Chain([dfb.ActNorm(shape[-1], dtype=dtype), affine_coupling(mask, shape, seed + k, dtype)]))
    return levels


def contributions_of(shape, num, seed=5):
    """Random statistics."""
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape) for _ in range(num)]


def online(seed, dtype, grids, initial, keep, granularity):
    """A flow whose factorization has been decided by `contributions_of` the event."""
    flow = dfb.Multiscale(plain_levels(grids, seed, dtype), dfb.OnlineFactorization(initial, keep, granularity))
    for contributions in contributions_of(grids[0], len(grids) - 1):
        flow.decide(contributions)
    return flow


CHANNELS = dfb.DimensionFactorization.channels(GRID, 3)
CHECKERBOARD = dfb.DimensionFactorization.checkerboard(GRID, 2)
RANDOM = dfb.DimensionFactorization.random(GRID, 3, seed=1)
VECTOR_HALVES = dfb.DimensionFactorization.channels([5], 3)
VECTOR_RANDOM = dfb.DimensionFactorization.random([6], 2, seed=2)
GRIDS = [GRID, (2, 2, 2), (1, 1, 4)]


def _multiscales():
    yield Entry(
        "multiscale_nms_image",
        lambda s, t: dfb.Multiscale(
            [
                affine_coupling(dfb.masks.Checkerboard(), GRID, s, t),
                dfb.Chain([dfb.Squeeze(), dfb.ActNorm(4, dtype=t), affine_coupling(dfb.masks.Channel(), (2, 2, 4), s + 1, t)]),
            ],
            event_shape=GRID,
        ),
        GRID,
        (16,),
        reference=multiscale_reference(stay, squeezed),
        move=multiscale_move(None, stay, squeezed),
    )
    yield Entry(
        "multiscale_nms_vector",
        lambda s, t: dfb.Multiscale(plain_levels([VECTOR, VECTOR], s, t)),
        VECTOR,
        reference=multiscale_reference(stay, stay),
    )
    yield Entry(
        "multiscale_channels_squeezed",
        lambda s, t: dfb.Multiscale(squeezing_levels(s, t), CHANNELS),
        GRID,
        (16,),
        reference=multiscale_reference(squeezed, squeezed, stay),
        move=multiscale_move(CHANNELS, squeezed, squeezed, stay),
        in_place=False,
    )
    yield Entry(
        "multiscale_exits",
        lambda s, t: dfb.Multiscale(
            squeezing_levels(s, t),
            CHANNELS,
            exits=[
                exit_for((2, 2, 2), (2, 2, 2), s + 7, t),
                exit_for((1, 1, 4), (1, 1, 4), s + 8, t),
                exit_for((1, 1, 4), (1, 1, 4), s + 9, t, "deepest_"),
            ],
        ),
        GRID,
        (16,),
        reference=multiscale_reference(squeezed, squeezed, stay),
        move=multiscale_move(CHANNELS, squeezed, squeezed, stay),
        in_place=False,
        xla=True,
        silent=("deepest_hidden/kernel",),
    )
    yield Entry(
        "multiscale_conditional",
        lambda s, t: dfb.Multiscale(squeezing_levels(s, t, (3,)), CHANNELS),
        GRID,
        (16,),
        condition_shape=(3,),
        reference=multiscale_reference(squeezed, squeezed, stay),
        move=multiscale_move(CHANNELS, squeezed, squeezed, stay),
        in_place=False,
    )
    yield Entry(
        "multiscale_checkerboard",
        lambda s, t: dfb.Multiscale(plain_levels(GRIDS[:2], s, t), CHECKERBOARD),
        GRID,
        (16,),
        reference=multiscale_reference(stay, stay),
        move=multiscale_move(CHECKERBOARD, stay, stay),
        xla=True,
    )
    yield Entry(
        "multiscale_random",
        lambda s, t: dfb.Multiscale(plain_levels(GRIDS, s, t), RANDOM, exits=[None, exit_for((1, 1, 4), (1, 1, 4), s, t)]),
        GRID,
        (16,),
        reference=multiscale_reference(stay, stay, stay),
        move=multiscale_move(RANDOM, stay, stay, stay),
    )
    yield Entry(
        "multiscale_elementwise",
        lambda s, t: dfb.Multiscale(
            [
                dfb.Chain(
                    [
                        dfb.ElementwiseAffine(normal(GRID, s, t), normal(GRID, s + 1, t)),
                        dfb.Squeeze(),
                        tfb.Permute(PERMUTATION),
                    ]
                ),
                dfb.Chain([tfb.Sinh(), dfb.Squeeze(order="position_major")]),
                tfb.SinhArcsinh(tailweight=tf.constant(0.8, t)),
            ],
            RANDOM,
        ),
        GRID,
        (16,),
        move=multiscale_move(
            RANDOM, composed(squeezed, shuffled(PERMUTATION)), functools.partial(squeezed, order="position_major"), stay
        ),
        triangular=True,
        half=False,
        fixed=True,
    )
    yield Entry(
        "multiscale_vector",
        lambda s, t: dfb.Multiscale(
            plain_levels([(5,), (3,), (2,)], s, t),
            VECTOR_HALVES,
            exits=[exit_for((3,), (2,), s, t), exit_for((2,), (1,), s + 1, t)],
        ),
        (5,),
        reference=multiscale_reference(stay, stay, stay),
        move=multiscale_move(VECTOR_HALVES, stay, stay, stay),
        xla=True,
    )
    yield Entry(
        "multiscale_vector_random",
        lambda s, t: dfb.Multiscale(plain_levels([(6,), (3,)], s, t), VECTOR_RANDOM),
        (6,),
        reference=multiscale_reference(stay, stay),
        move=multiscale_move(VECTOR_RANDOM, stay, stay),
    )
    for granularity in ("block", "channel"):
        factorization = dfb.DimensionFactorization.from_contributions(contributions_of(GRID, 2), "high", granularity)
        yield Entry(
            f"lcma_{granularity}",
            functools.partial(
                lambda s, t, granularity: dfb.LCMA(
                    plain_levels(GRIDS, s, t), contributions_of(GRID, 2), granularity=granularity
                ),
                granularity=granularity,
            ),
            GRID,
            (16,),
            reference=multiscale_reference(stay, stay, stay),
            move=multiscale_move(factorization, stay, stay, stay),
            xla=granularity == "block",
        )
    for grids, initial, granularity in (
        (GRIDS, dfb.DimensionFactorization.checkerboard(GRID, 3), "block"),
        ([(5,), (3,), (2,)], VECTOR_HALVES, "free"),
    ):
        contributions = contributions_of(grids[0], 2)
        keep = ["low", "high"]
        yield Entry(
            f"online_{granularity}",
            functools.partial(online, grids=grids, initial=initial, keep=keep, granularity=granularity),
            grids[0],
            (int(np.prod(grids[0])),),
            reference=multiscale_reference(stay, stay, stay),
            move=multiscale_move(
                dfb.DimensionFactorization.from_contributions(contributions, keep, granularity), stay, stay, stay
            ),
            xla=True,
        )
    free = dfb.DimensionFactorization.from_contributions(contributions_of([5], 2), ["low", "high"])
    yield Entry(
        "lcma_free",
        lambda s, t: dfb.LCMA(plain_levels([(5,), (3,), (2,)], s, t), contributions_of([5], 2), keep=["low", "high"]),
        (5,),
        reference=multiscale_reference(stay, stay, stay),
        move=multiscale_move(free, stay, stay, stay),
    )


def _splits():
    for name, axis, shape, orthonormal in (
        ("signal", -1, (8,), False),
        ("channel", -1, (2, 1, 4), True),
        ("width", -2, (2, 4, 2), False),
        ("height", -3, (4, 2, 2), False),
        ("height_orthonormal", -3, (4, 1, 3), True),
    ):
        yield Entry(
            f"haar_{name}",
            functools.partial(
                lambda s, t, axis, orthonormal: dfb.HaarSplit(axis, orthonormal), axis=axis, orthonormal=orthonormal
            ),
            shape,
            reference=haar_reference,
            move=haar_move(axis),
            xla=name in ("signal", "height_orthonormal"),
            fixed=True,
        )


def rotated_blocks_move(kept, factor=2):
    """The movement of a `PNF` of one `OrthogonalSplit`: what is kept of the squeezed channels, then the others."""

    def move(y):
        blocks = squeezed(y, factor=factor)
        return np.concatenate([part.reshape(len(y), -1) for part in np.split(blocks, [kept], axis=-1)], axis=-1)

    return move


def _rotations():
    orthogonal = np.linalg.qr(np.random.default_rng(5).normal(size=[5, 5]))[0]
    for name, size, matrix, trainable, shape in (
        ("given", 5, orthogonal, False, (5,)),
        ("random", 4, "random", False, (2, 1, 4)),
        ("trainable", 5, "random", True, (2, 5)),
        ("haar", 8, "haar", False, (1, 2, 8)),
        ("principal", 3, "principal", True, (3,)),
    ):
        yield Entry(
            f"rotation_{name}",
            functools.partial(
                lambda s, t, size, matrix, trainable: dfb.Rotation(size, matrix, trainable, s, t),
                size=size,
                matrix=matrix,
                trainable=trainable,
            ),
            shape,
            reference=zero_reference,
            xla=name == "trainable",
            fixed=not trainable,
        )
    for name, sizes, trainable, shape, latent, move in (
        ("image", (2, 3, 2), False, (2, 4, 2), (1, 2, 8), squeezed),
        ("channels", (3, 1, 1), True, (1, 2, 3), None, stay),
        ("vector", (5, 2, None), True, (5,), None, stay),
    ):
        yield Entry(
            f"orthogonal_split_{name}",
            functools.partial(
                lambda s, t, sizes, trainable: dfb.OrthogonalSplit(*sizes, "random", trainable, s, t),
                sizes=sizes,
                trainable=trainable,
            ),
            shape,
            latent,
            reference=zero_reference,
            move=move,
            xla=name == "image",
            fixed=not trainable,
        )
    yield Entry(
        "principal_pnf_image",
        lambda s, t: dfb.PNF(
            image_stage((2, 2, 1), s, t),
            [image_stage((2, 2, 3), s + 1, t, (2, 2, 1))],
            GRID,
            splits=[dfb.OrthogonalSplit(1, 1, 2, "random", True, s, t)],
        ),
        GRID,
        (16,),
        move=rotated_blocks_move(1),
        open_to_conditions=True,
        xla=True,
    )
    yield Entry(
        "principal_pnf_vector",
        lambda s, t: dfb.PNF(
            vector_stage(2, s, t),
            [vector_stage(4, s + 1, t, 2), vector_stage(2, s + 2, t, 6)],
            [8],
            splits=[dfb.OrthogonalSplit(size, kept, None, "random", seed=s, dtype=t) for size, kept in ((6, 2), (8, 6))],
        ),
        (8,),
        open_to_conditions=True,
    )
    yield Entry(
        "principal_multiscale_image",
        lambda s, t: dfb.PrincipalMultiscale(
            [glow_step(4, (2, 2, 4), s, t), affine_coupling(dfb.masks.Channel(), (1, 1, 8), s + 1, t)],
            GRID,
            "random",
            exits=[exit_for((2, 2, 2), (2, 2, 2), s + 7, t)],
            seed=s,
            dtype=t,
        ),
        GRID,
        (16,),
        move=multiscale_move(dfb.DimensionFactorization.channels(GRID, 2), squeezed, squeezed),
        in_place=False,
        xla=True,
    )
    yield Entry(
        "principal_multiscale_vector",
        lambda s, t: dfb.PrincipalMultiscale(
            plain_levels([(5,), (3,), (2,)], s, t), [5], ["random", "principal", np.eye(2)], trainable=True, seed=s, dtype=t
        ),
        (5,),
        move=multiscale_move(VECTOR_HALVES, stay, stay, stay),
    )


def embedded_vector_reference(bijector, y, condition):
    return exp_reference(bijector.bijector, y, bijector.parameters["embedding"](condition))


def embedded_image_reference(bijector, y, condition):
    # `embedding` is the `inverse` of an ActNorm.
    actnorm = bijector.parameters["embedding"].__self__
    embedded = (condition.numpy() + variable(actnorm, "shift")) * np.exp(variable(actnorm, "log_scale"))
    return chain_reference([stay, squeezed, stay])(bijector.bijector, y, tf.constant(embedded))


def _embeddings():
    yield Entry(
        "embed_vector",
        lambda s, t: dfb.EmbedCondition(
            make_coupling(lambda: dfb.masks.Channel(event_ndims=1), VECTOR, "exp", (5,))(s, t),
            Mixer([3], [5], s + 1, t, "embedding_"),
            condition_ndims=1,
        ),
        VECTOR,
        condition_shape=(3,),
        reference=embedded_vector_reference,
        triangular=True,
        xla=True,
    )
    yield Entry(
        "embed_image",
        lambda s, t: dfb.EmbedCondition(
            dfb.Chain(
                [
                    affine_coupling(dfb.masks.Checkerboard(), IMAGE, s, t, "tanh", (2, 2, 3)),
                    dfb.Squeeze(),
                    affine_coupling(dfb.masks.Channel(), (1, 2, 8), s + 1, t, "sigmoid", (2, 2, 3)),
                ]
            ),
            dfb.ActNorm(3, dtype=t).inverse,
            condition_ndims=3,
        ),
        IMAGE,
        (1, 2, 8),
        condition_shape=(2, 2, 3),
        reference=embedded_image_reference,
        move=squeezed,
    )


def vector_stage(size, seed, dtype, condition_size=None, scale="tanh"):
    """A coupling of a vector, conditional if a size is given."""
    condition_shape = None if condition_size is None else (condition_size,)
    return affine_coupling(dfb.masks.Channel(event_ndims=1), (size,), seed, dtype, scale, condition_shape)


def image_stage(shape, seed, dtype, condition_shape=None, scale="tanh"):
    """A coupling and an actnorm of an image, conditional if a shape is given."""
    mask = dfb.masks.Channel() if shape[:2] == (1, 1) else dfb.masks.Checkerboard(seed % 2)
    return dfb.Chain([affine_coupling(mask, shape, seed, dtype, scale, condition_shape), dfb.ActNorm(shape[-1], dtype=dtype)])


def squeezing_stage(shape, seed, dtype, condition_shape=None):
    """A coupling on either side of a squeeze."""
    height, width, channels = shape
    squeezed_shape = (height // 2, width // 2, 4 * channels)
    return dfb.Chain(
        [
            affine_coupling(dfb.masks.Checkerboard(), shape, seed, dtype),
            dfb.Squeeze(),
            affine_coupling(dfb.masks.Channel(), squeezed_shape, seed + 1, dtype, "sigmoid", condition_shape),
        ]
    )


STAGE = (2, 4, 1)
JOINT_HALVES = dfb.DimensionFactorization.random((2, 4, 3), 2, seed=6)
STAGE_HALVES = dfb.DimensionFactorization.random(STAGE, 2, seed=3)


def multiscale_stage(seed, dtype, condition_shape=None):
    """A flow with a flat latent, of an image of shape `STAGE`."""
    return dfb.Multiscale(
        [
            affine_coupling(dfb.masks.Checkerboard(), STAGE, seed, dtype, "exp", condition_shape),
            dfb.Chain([dfb.ActNorm(2, dtype=dtype), affine_coupling(dfb.masks.Channel(), (1, 2, 2), seed + 1, dtype)]),
        ],
        STAGE_HALVES,
    )


def image_pnf(seed, dtype, condition_size=None, orthonormal=False):
    """A base and two details of a 4x4 image: the image grows along the width, then along the height."""
    extra = condition_size or 0
    return dfb.PNF(
        squeezing_stage((2, 2, 1), seed, dtype, None if condition_size is None else (condition_size,)),
        [
            image_stage((2, 2, 1), seed + 2, dtype, (2, 2, 1 + extra)),
            dfb.Chain([tfb.Permute([0]), image_stage((2, 4, 1), seed + 3, dtype, (2, 4, 1 + extra))]),
        ],
        GRID,
        orthonormal,
    )


def _progressive():
    yield Entry(
        "pnf_signal",
        lambda s, t: dfb.PNF(
            vector_stage(2, s, t), [vector_stage(2, s + 1, t, 2), vector_stage(4, s + 2, t, 4, "sigmoid")], [8]
        ),
        (8,),
        reference=pnf_reference,
        move=pnf_move(stay, stay, stay),
        open_to_conditions=True,
        xla=True,
    )
    yield Entry(
        "pnf_signal_odd_orthonormal",
        lambda s, t: dfb.PNF(
            tfb.Chain([tfb.Shift(tf.Variable(normal([1], s, t))), tfb.Scale(tf.Variable(normal([1], s + 1, t)))]),
            [
                dfb.ConditionalTransform(Mixer([1], [2], s, t), dfb.transformers.Affine("exp"), event_ndims=1),
                vector_stage(2, s + 1, t, 2),
                dfb.Chain([tfb.Permute(PERMUTATION), vector_stage(4, s + 2, t), dfb.ActNorm(4, dtype=t)]),
            ],
            [8],
            orthonormal=True,
        ),
        (8,),
        reference=pnf_reference,
        move=pnf_move(stay, stay, stay, shuffled(PERMUTATION)),
        open_to_conditions=True,
        half=False,
    )
    yield Entry(
        "pnf_signal_conditional",
        lambda s, t: dfb.PNF(
            dfb.Chain([dfb.ActNorm(2, dtype=t), vector_stage(2, s, t)]),
            [vector_stage(2, s + 1, t, 5), vector_stage(4, s + 2, t, 7)],
            [8],
        ),
        (8,),
        condition_shape=(3,),
        reference=pnf_reference,
        move=pnf_move(stay, stay, stay),
    )
    yield Entry(
        "pnf_image",
        image_pnf,
        GRID,
        (16,),
        reference=pnf_reference,
        move=pnf_move(squeezed, stay, stay),
        open_to_conditions=True,
        xla=True,
    )
    yield Entry(
        "pnf_image_orthonormal",
        functools.partial(image_pnf, orthonormal=True),
        GRID,
        (16,),
        reference=pnf_reference,
        move=pnf_move(squeezed, stay, stay),
        open_to_conditions=True,
    )
    yield Entry(
        "pnf_image_conditional",
        functools.partial(image_pnf, condition_size=3),
        GRID,
        (16,),
        condition_shape=(3,),
        reference=pnf_reference,
        move=pnf_move(squeezed, stay, stay),
        xla=True,
    )
    yield Entry(
        "pnf_image_odd",
        lambda s, t: dfb.PNF(
            dfb.ElementwiseAffine(normal([1, 1, 2], s, t), normal([1, 1, 2], s + 1, t)),
            [
                image_stage((1, 1, 2), s + 2, t),
                dfb.EmbedCondition(
                    image_stage((2, 1, 2), s + 3, t, (2, 1, 2)), dfb.ActNorm(2, dtype=t).inverse, condition_ndims=3
                ),
                squeezing_stage((2, 2, 2), s + 4, t, (2, 2, 2)),
            ],
            [4, 2, 2],
        ),
        (4, 2, 2),
        (16,),
        reference=pnf_reference,
        move=pnf_move(stay, stay, stay, squeezed),
        open_to_conditions=True,
    )
    yield Entry(
        "pnf_unconditional_details",
        lambda s, t: dfb.PNF(
            dfb.ElementwiseAffine(normal([2], s, t), normal([2], s + 1, t)),
            [vector_stage(2, s, t), dfb.Chain([tfb.Permute(PERMUTATION), dfb.ActNorm(4, dtype=t)])],
            [8],
        ),
        (8,),
        reference=pnf_reference,
        move=pnf_move(stay, stay, shuffled(PERMUTATION)),
    )
    yield Entry(
        "pnf_flat_stages",
        lambda s, t: dfb.PNF(multiscale_stage(s, t), [multiscale_stage(s + 2, t, STAGE)], GRID),
        GRID,
        (16,),
        reference=pnf_reference,
        move=pnf_move(*[multiscale_move(STAGE_HALVES, stay, stay)] * 2),
        open_to_conditions=True,
    )
    yield Entry(
        "pnf_in_a_chain",
        lambda s, t: dfb.Chain(
            [
                dfb.LogitPreprocess(8),
                image_pnf(s, t, 3),
                dfb.ElementwiseAffine(normal([16], s, t), normal([16], s + 1, t)),
                tfb.Permute(SHUFFLE),
            ]
        ),
        GRID,
        (16,),
        condition_shape=(3,),
        draw=pixels(8),
        reference=chain_reference([stay, pnf_move(squeezed, stay, stay), stay, shuffled(SHUFFLE)]),
        move=composed(pnf_move(squeezed, stay, stay), shuffled(SHUFFLE)),
        xla=True,
    )


def vflow_walk(bijector, y, posterior_move, condition=None):
    """The joint event [x, z] of a `VFlow`, and the total per-dimension log-det, posterior and flow taken separately.

    The posterior's share is asked for in its other direction, at z, and carried to e by `posterior_move`.
    """
    size = y.shape[-1] - bijector.num_extra
    x, e = y.numpy()[..., :size], y.numpy()[..., size:]
    z, of_e = e, np.zeros(e.shape)
    if bijector.posterior is not None:
        given = tf.constant(given_to_detail(x, condition))
        kwargs = dfb.conditions.condition_kwargs(bijector.posterior, given)
        z = bijector.posterior.forward(tf.constant(e), **kwargs).numpy()
        of_z = dimflows.inverse_log_det_per_dim(bijector.posterior, tf.constant(z), **kwargs).numpy()
        of_e = -posterior_move(of_z)
    joint = tf.constant(np.concatenate([x, z], axis=-1))
    uses = condition is not None and getattr(bijector.flow, "uses_condition", False)
    kwargs = {"condition": condition} if uses else {}
    of_joint = dimflows.inverse_log_det_per_dim(bijector.flow, joint, **kwargs).numpy()
    of_e = of_e + posterior_move(of_joint[..., size:])
    return joint, np.concatenate([of_joint[..., :size], of_e], axis=-1)


def vflow_reference(posterior_move):
    """`vflow_walk`'s total; `posterior_move` is the posterior's movement from z to e."""
    return lambda bijector, y, condition: vflow_walk(bijector, y, posterior_move, condition)[1]


def vflow_move(flow_move, posterior_back, num_extra):
    """The movement of a `VFlow`; `posterior_back` is the posterior's movement from e to z."""

    def move(y):
        return flow_move(np.concatenate([y[..., :-num_extra], posterior_back(y[..., -num_extra:])], axis=-1))

    return move


def blockwise_parts(mask, y):
    """(where, values) of the two parts of events under a mask, in numpy."""
    where = conditions(mask, y.shape[1:])
    axis = -2 if isinstance(mask, dfb.masks.Columns) else -1
    for place in (where, ~where):
        shape = list(y.shape)
        shape[axis] = place.sum() * shape[axis] // place.size
        yield place, y[:, place].reshape(shape)


def blockwise_reference(bijector, y, condition):
    p, result = bijector.parameters, np.empty(y.shape)
    for part, (place, values) in zip((p["first"], p["second"]), blockwise_parts(p["mask"], y.numpy())):
        kwargs = {"condition": condition} if condition is not None and getattr(part, "uses_condition", False) else {}
        contribution = dimflows.inverse_log_det_per_dim(part, tf.constant(values), **kwargs).numpy()
        result[:, place] = contribution.reshape(len(result), -1)
    return result


def blockwise_move(mask, *moves):
    """The movement of a `Blockwise` whose parts keep their shapes."""

    def move(y):
        result = np.empty_like(y)
        for part_move, (place, values) in zip(moves, blockwise_parts(mask, y)):
            result[:, place] = part_move(values).reshape(len(y), -1)
        return result

    return move


def vector_posterior(size, num_extra, seed, dtype):
    """Conditional couplings with a permutation in between, of a vector, given vectors of some size."""
    masks = [dfb.masks.Channel(event_ndims=1, flip=flip) for flip in (False, True)]
    first, second = (affine_coupling(m, (num_extra,), seed + k, dtype, "tanh", (size,)) for k, m in enumerate(masks))
    return dfb.Chain([first, tfb.Permute(PERMUTATION), second, dfb.ActNorm(num_extra, dtype=dtype)])


def image_posterior(shape, given_channels, seed, dtype):
    """Conditional couplings of an image, given one of the same size."""
    given = (*shape[:-1], given_channels)
    return dfb.Chain(
        [
            mixture_coupling(dfb.masks.Columns(), shape, seed, dtype, given),
            affine_coupling(dfb.masks.Checkerboard(1), shape, seed + 1, dtype, "sigmoid", given),
        ]
    )


JOINT = (2, 4, 3)
UNSHUFFLED = [PERMUTATION.index(k) for k in range(4)]


def _augmented():
    yield Entry(
        "blockwise_vector",
        lambda s, t: dfb.Blockwise(
            dfb.masks.Channel(event_ndims=1, num_conditioning=2),
            vector_stage(2, s, t),
            dfb.Chain([vector_stage(4, s + 1, t), tfb.Permute(PERMUTATION), dfb.ActNorm(4, dtype=t)]),
        ),
        (6,),
        reference=blockwise_reference,
        move=blockwise_move(dfb.masks.Channel(event_ndims=1, num_conditioning=2), stay, shuffled(PERMUTATION)),
        triangular=True,
        xla=True,
    )
    yield Entry(
        "blockwise_image",
        lambda s, t: dfb.Blockwise(
            dfb.masks.Columns(1),
            affine_coupling(dfb.masks.Channel(), (2, 2, 2), s, t, "exp", (3,)),
            dfb.Chain([tfb.Permute([1, 0]), dfb.ActNorm([2, 2, 2], dtype=t)]),
        ),
        IMAGE,
        condition_shape=(3,),
        reference=blockwise_reference,
        move=blockwise_move(dfb.masks.Columns(1), stay, shuffled([1, 0])),
        triangular=True,
    )
    yield Entry(
        "vflow_vector_no_posterior",
        lambda s, t: dfb.VFlow(
            dfb.Chain([dfb.ActNorm(4, dtype=t), vector_stage(4, s, t), tfb.Permute(PERMUTATION)]), None, 1, event_ndims=1
        ),
        (4,),
        reference=vflow_reference(stay),
        move=vflow_move(shuffled(PERMUTATION), stay, 1),
        triangular=True,
        xla=True,
    )
    yield Entry(
        "vflow_vector_gaussian",
        # The flow transforms z given x, so that [x, z] depends on [x, e] in triangular form.
        lambda s, t: dfb.VFlow(
            affine_coupling(dfb.masks.Channel(event_ndims=1, num_conditioning=2), (5,), s, t, "exp"),
            dfb.ConditionalTransform(Mixer([2], [6], s + 1, t, "posterior_"), dfb.transformers.Affine("exp"), event_ndims=1),
            3,
            event_ndims=1,
        ),
        (5,),
        reference=vflow_reference(stay),
        triangular=True,
        open_to_conditions=True,
        xla=True,
    )
    yield Entry(
        "vflow_vector_chain",
        lambda s, t: dfb.VFlow(
            dfb.Chain([vector_stage(6, s, t), tfb.Permute([5, 3, 1, 0, 2, 4]), vector_stage(6, s + 1, t)]),
            vector_posterior(2, 4, s + 2, t),
            4,
            event_ndims=1,
        ),
        (6,),
        reference=vflow_reference(shuffled(PERMUTATION)),
        move=vflow_move(shuffled([5, 3, 1, 0, 2, 4]), shuffled(UNSHUFFLED), 4),
        open_to_conditions=True,
    )
    yield Entry(
        "vflow_vector_conditional",
        lambda s, t: dfb.VFlow(
            dfb.Chain([vector_stage(6, s, t, 3), vector_stage(6, s + 1, t)]),
            vector_posterior(2 + 3, 4, s + 2, t),
            4,
            event_ndims=1,
        ),
        (6,),
        condition_shape=(3,),
        reference=vflow_reference(shuffled(PERMUTATION)),
        move=vflow_move(stay, shuffled(UNSHUFFLED), 4),
        xla=True,
    )
    yield Entry(
        "vflow_tfp_parts",
        lambda s, t: dfb.VFlow(
            tfb.Chain([tfb.Scale(tf.Variable(normal([6], s, t))), tfb.Permute([5, 3, 1, 0, 2, 4])]),
            tfb.Chain([tfb.Permute(PERMUTATION), tfb.Sinh(), tfb.Shift(tf.Variable(normal([4], s + 1, t)))]),
            4,
            event_ndims=1,
        ),
        (6,),
        reference=vflow_reference(shuffled(PERMUTATION)),
        move=vflow_move(shuffled([5, 3, 1, 0, 2, 4]), shuffled(UNSHUFFLED), 4),
        half=False,
    )
    yield Entry(
        "vflow_image",
        lambda s, t: dfb.VFlow(
            squeezing_stage((2, 4, 2), s, t),
            dfb.ConditionalTransform(
                Mixer([2, 4, 1], [2, 4, 2], s + 2, t, "posterior_"), dfb.transformers.Affine("tanh", 0.7, t)
            ),
            1,
        ),
        (2, 4, 2),
        (1, 2, 8),
        reference=vflow_reference(stay),
        move=vflow_move(squeezed, stay, 1),
        open_to_conditions=True,
        xla=True,
    )
    yield Entry(
        "vflow_image_flat",
        lambda s, t: dfb.VFlow(
            dfb.Multiscale(plain_levels([JOINT, (1, 2, 6)], s, t), JOINT_HALVES), image_posterior((2, 4, 2), 1, s + 4, t), 2
        ),
        JOINT,
        (24,),
        reference=vflow_reference(stay),
        move=vflow_move(multiscale_move(JOINT_HALVES, stay, stay), stay, 2),
        open_to_conditions=True,
    )
    yield Entry(
        "vflow_image_conditional",
        lambda s, t: dfb.VFlow(image_stage(JOINT, s, t, (3,)), image_posterior((2, 4, 2), 1 + 3, s + 4, t), 2, event_ndims=3),
        JOINT,
        condition_shape=(3,),
        reference=vflow_reference(stay),
        xla=True,
    )


# Loops.


def scan(make, length, **arguments):
    """A `Scan`; the variables that its bijectors are made with are not its own."""

    def mark(next_creator, **kwargs):
        variable = next_creator(**kwargs)
        variable.is_superseded = True
        return variable

    def marked(k):
        with tf.variable_creator_scope(mark):
            return make(k)

    return dfb.Scan(marked, length, **arguments)


SHUFFLES = ([2, 0, 3, 1], [1, 2, 3, 0], [3, 2, 0, 1])


def scan_step(k, seed, dtype):
    """A step of which no two have the same permutation."""
    return dfb.Chain(
        [
            tfb.Permute(SHUFFLES[k]),
            dfb.ActNorm(4, dtype=dtype),
            affine_coupling(dfb.masks.Channel(event_ndims=1), VECTOR, seed + 10 * k, dtype),
            tfb.Scale(tf.Variable(normal(VECTOR, seed + k, dtype))),
        ]
    )


def _scans():
    yield Entry(
        "scan_vector",
        lambda s, t: scan(lambda k: scan_step(k, s, t), 3),
        VECTOR,
        reference=chain_reference([shuffled(shuffle) for shuffle in SHUFFLES]),
        move=composed(*(shuffled(shuffle) for shuffle in SHUFFLES)),
        xla=True,
        half=False,
    )
    yield Entry(
        "scan_image_conditional",
        lambda s, t: scan(
            lambda k: dfb.Chain(
                [
                    dfb.ActNorm(2, dtype=t),
                    dfb.InvertibleConv1x1(2, seed=k, dtype=t),
                    affine_coupling(dfb.masks.Channel(), IMAGE, s + 10 * k, t, "sigmoid", (3,)),
                ]
            ),
            2,
            memory="recompute",
        ),
        IMAGE,
        condition_shape=(3,),
        in_place=False,
        xla=True,
    )


# Residual blocks.


def contracted(network, y):
    """The values of a `Mixer`, scaled to a Lipschitz constant of at most 0.8, whatever its weights."""
    norms = [keras.ops.norm(layer.kernel) for layer in (network.hidden, network.out)]
    return 0.8 / keras.ops.maximum(1.0, norms[0] * norms[1]) * y


class Contraction(Mixer):
    """A contractive network, with second derivatives."""

    activation = staticmethod(keras.ops.tanh)

    def call(self, x):
        """Values of the shape of `x`."""
        return contracted(self, super().call(x))


class ConditionalContraction(ConditionalMixer):
    """A conditional network that is contractive in x, with second derivatives."""

    activation = staticmethod(keras.ops.tanh)

    def call(self, x, condition=None):
        """Values of the shape of `x`."""
        return contracted(self, super().call(x, condition))


def log_diagonal_reference(bijector, y, condition):
    """The diagonal of the logarithm of the inverse's Jacobian, from its eigenvalues."""

    def both(value, condition=None):
        return bijector.inverse(value) if condition is None else bijector.inverse(value, condition=condition)

    values, vectors = np.linalg.eig(jacobian(both, y, condition))
    log = vectors * np.log(values.astype(complex))[:, np.newaxis] @ np.linalg.inv(vectors)
    return np.einsum("bii->bi", log).real.reshape(y.shape)


def _residuals():
    for name, shape, condition_shape in (("vector", (4,), None), ("image", (2, 2, 1), None), ("conditional", (3,), (2,))):

        def make(seed, dtype, shape=shape, condition_shape=condition_shape):
            if condition_shape is None:
                network = Contraction(shape, shape, seed, dtype)
            else:
                network = ConditionalContraction(shape, shape, condition_shape, seed, dtype)
            return dfb.InvertibleResidual(network, dfb.residual.ExactLogDet(), len(shape))

        yield Entry(
            f"residual_{name}",
            make,
            shape,
            condition_shape=condition_shape,
            reference=log_diagonal_reference,
            xla=name == "vector",
        )


# Classic flows.


def sylvester_parts(bijector):
    """Q, R, R' and b of a Sylvester flow with unbatched parameters."""
    p = bijector.parameters
    params = np.asarray(bijector.variables[0] if p["params"] is None else p["params"])
    dims, variant = p["dims"], p["variant"]
    columns = dims if variant != "orthogonal" else p["num_columns"] or min(8, dims)
    matrix, rest = params[: columns**2].reshape(columns, columns), params[columns**2 :]
    diagonal, bias, vectors = rest[:columns], rest[columns : 2 * columns], rest[2 * columns :]
    if variant == "orthogonal":
        q = vectors.reshape(dims, columns).copy()
        for j in range(columns):
            q[:, j] -= q[:, :j] @ (q[:, :j].T @ q[:, j])
            q[:, j] /= np.linalg.norm(q[:, j])
    elif variant == "householder":
        q = np.eye(dims)
        for v in vectors.reshape(-1, dims):
            q = q - 2.0 * q @ np.outer(v, v) / (v @ v)
    else:
        q = np.eye(dims)[::-1] if p["reverse"] else np.eye(dims)
    r, r_tilde = (
        np.triu(m, 1) + (1.0 - 5e-7) * np.diag(np.tanh(d)) for m, d in ((matrix, np.diag(matrix)), (matrix.T, diagonal))
    )
    return q, r, r_tilde, bias


def sylvester_reference(bijector, y, condition):
    q, r, r_tilde, bias = sylvester_parts(bijector)
    w = bijector.inverse(y).numpy() @ q @ r_tilde.T + bias
    return -np.log1p((1.0 - np.tanh(w) ** 2) * np.diag(r) * np.diag(r_tilde)) @ np.square(q).T


def prelu_reference(bijector, y, condition):
    return np.where(y.numpy() < 0.0, -np.log(np.log1p(np.exp(variable(bijector, "slope")))), 0.0)


def _classics():
    for name, shape, data_shape in (("shared", (), (3,)), ("per_dimension", (3,), (3,)), ("per_channel", (2,), IMAGE)):
        yield Entry(
            f"prelu_{name}",
            functools.partial(lambda s, t, shape: dfb.PReLU(shape, 0.4, t), shape=shape),
            data_shape,
            reference=prelu_reference,
            triangular=True,
            xla=name == "shared",
        )
    for family in (dfb.Planar, dfb.Radial):
        name = family.__name__.lower()
        yield Entry(
            name,
            functools.partial(lambda s, t, family: family(4, seed=s, dtype=t), family=family),
            VECTOR,
            reference=log_diagonal_reference,
            xla=True,
        )
        yield Entry(
            f"{name}_batched",
            functools.partial(lambda s, t, family: family(3, tf.Variable(normal([family.num_params(3)], s, t))), family=family),
            (3,),
            reference=log_diagonal_reference,
        )
        yield Entry(
            f"{name}_amortised",
            functools.partial(
                lambda s, t, family: dfb.ConditionalTransform(
                    Mixer([3], [family.num_params(4)], s, t), functools.partial(family, 4), event_ndims=1
                ),
                family=family,
            ),
            VECTOR,
            condition_shape=(3,),
            reference=log_diagonal_reference,
        )
    for name, options in (
        ("orthogonal", {"num_columns": 2}),
        ("householder", {"variant": "householder", "num_reflections": 3}),
        ("triangular", {"variant": "triangular"}),
        ("reversed", {"variant": "triangular", "reverse": True}),
    ):
        yield Entry(
            f"sylvester_{name}",
            functools.partial(lambda s, t, options: dfb.Sylvester(4, seed=s, dtype=t, **options), options=options),
            VECTOR,
            reference=sylvester_reference,
            xla=True,
        )
    for variant in ("orthogonal", "householder"):

        def make(seed, dtype, variant=variant):
            size = dfb.Sylvester.num_params(3, variant)
            return dfb.ConditionalTransform(
                Mixer([2], [size], seed, dtype), lambda params: dfb.Sylvester(3, params, variant), event_ndims=1
            )

        yield Entry(f"sylvester_{variant}_amortised", make, (3,), condition_shape=(2,))


# Autoregressive flows.


def weighted(network, seed):
    """The network with normal weights, the same in every dtype."""
    for k, v in enumerate(network.trainable_variables):
        v.assign(normal(v.shape, 100 * seed + k, v.dtype) / np.sqrt(np.prod(v.shape[:-1])))
    return network


def made(dims, params_per_dim, seed, dtype, condition_channels=0, ordering="natural"):
    """A small `networks.MADE` with smooth activations."""
    options = {"hidden": (7,), "ordering": ordering, "activation": "tanh", "condition_channels": condition_channels}
    return weighted(dimflows.networks.MADE(dims, dims * params_per_dim, seed=seed, dtype=dtype, **options), seed)


def _autoregressives():
    kinds = {
        "tanh": (lambda dtype: dfb.transformers.Affine("tanh", 0.7, dtype), 2),
        "gated": (lambda dtype: dfb.transformers.Gated(), 2),
        "mixture": (lambda dtype: dfb.transformers.MixtureLogistic(COMPONENTS), 2 + 3 * COMPONENTS),
        "spline": (lambda dtype: spline(), 3 * SPLINE_BINS - 1),
    }
    orderings = {"tanh": "natural", "gated": "reversed", "mixture": [1, 3, 0, 2], "spline": "random"}
    for kind, (transformer, params_per_dim) in kinds.items():

        def make(seed, dtype, kind=kind, transformer=transformer, params_per_dim=params_per_dim):
            network = made(4, params_per_dim, seed, dtype, ordering=orderings[kind])
            return dfb.Autoregressive(network, transformer(dtype))

        yield Entry(
            f"autoregressive_{kind}", make, VECTOR, triangular=True, xla=kind in ("tanh", "mixture"), half=kind != "spline"
        )
    yield Entry(
        "autoregressive_conditional",
        lambda s, t: dfb.Autoregressive(made(3, 2, s, t, condition_channels=2), dfb.transformers.Affine("exp")),
        (3,),
        condition_shape=(2,),
        triangular=True,
        xla=True,
    )
    yield Entry(
        "autoregressive_chain",
        lambda s, t: dfb.Chain(
            [
                dfb.Autoregressive(made(3, 2, s, t), dfb.transformers.Affine("sigmoid")),
                dfb.ActNorm(3, dtype=t),
                tfb.Invert(
                    dfb.Autoregressive(made(3, 2, s + 1, t, 2, "reversed"), dfb.transformers.Gated(), name="gated"),
                ),
            ]
        ),
        (3,),
        condition_shape=(2,),
    )
    yield Entry(
        "autoregressive_image",
        lambda s, t: dfb.Autoregressive(
            weighted(dimflows.networks.PixelCNN(2, 4, width=8, num_blocks=1, dtype=t), s),
            dfb.transformers.Affine("sigmoid"),
            event_ndims=3,
        ),
        (2, 2, 2),
        triangular=True,
    )
    yield Entry(
        "autoregressive_signal",
        lambda s, t: dfb.Autoregressive(
            weighted(dimflows.networks.WaveNet(4, 8, width=4, dtype=t), s), dfb.transformers.Affine("sigmoid")
        ),
        VECTOR,
        triangular=True,
    )


# Every class, and each of its kinds that differ in more than shapes.
CORE = frozenset(
    """
    actnorm_pixels standardize elementwise_affine_variables mixture_logistic_cdf_smooth logit_8 conditional_transform_exp
    squeeze_channel_major conv_polar affine_coupling_conditional additive_coupling
    coupling_checkerboard_odd_sigmoid coupling_index_conditional
    mixture_coupling_columns spline_coupling_conditional blockwise_image
    chain_nested_conditional chain_squeeze chain_elementwise_after_moves chain_recompute scan_image_conditional
    multiscale_exits multiscale_vector_random lcma_block online_free haar_height_orthonormal embed_image
    rotation_trainable orthogonal_split_image principal_pnf_image principal_multiscale_image
    pnf_image_conditional pnf_signal_odd_orthonormal vflow_image vflow_vector_conditional residual_conditional
    prelu_per_channel planar radial sylvester_orthogonal autoregressive_conditional
    autoregressive_gated autoregressive_image
    """.split()
)

FAMILIES = (
    _elementwise,
    _moves_and_maps,
    _blocks,
    _couplings,
    _nonlinear_couplings,
    _chains,
    _scans,
    _multiscales,
    _splits,
    _rotations,
    _embeddings,
    _progressive,
    _augmented,
    _residuals,
    _classics,
    _autoregressives,
)
ENTRIES = {entry.name: entry for family in FAMILIES for entry in family()}
# Those that start at zeros, at the identity or at orthogonal matrices.
SPECIAL_AT_FIRST = frozenset(
    """
    actnorm_pixels conv_polar conv_svd_sorted conv_lu conv_uniform affine_coupling_tanh chain_squeeze multiscale_exits
    prelu_shared prelu_per_channel planar radial sylvester_orthogonal sylvester_householder sylvester_triangular
    """.split()
)

assert CORE | SPECIAL_AT_FIRST <= ENTRIES.keys(), (CORE | SPECIAL_AT_FIRST) - ENTRIES.keys()


def parameters(entry, *values):
    """Values of a parametrised test of an entry: `-m contract` runs all of them, README's command those of the core."""
    marks = [pytest.mark.contract, pytest.mark.core] if entry.core else [pytest.mark.contract]
    return pytest.param(*values, id="-".join([entry.name, *values[1:]]), marks=marks)


def slow(*values, **options):
    """Values of a parametrised test that belong to the slow layer."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)
