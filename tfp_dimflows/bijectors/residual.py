"""Invertible residual blocks, with exact, truncated and unbiased log-dets."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from tensorflow.types.experimental import TensorLike

from tfp_dimflows import keras_bridge, representation
from tfp_dimflows.bijectors import base, implicit, recompute
from tfp_dimflows.bijectors.log_dets import log_det_dtype
from tfp_dimflows.bijectors.probes import probe_seed
from tfp_dimflows.upstream import prefer_static as ps
from tfp_dimflows.upstream import record, samplers

# A vector-Jacobian product: from w to w^T J.
Vjp = Callable[[tf.Tensor], tf.Tensor]

_NODES = 65
# By how much the square of a product may exceed its vector's: the precision of a branch in bfloat16.
_ROUNDING = 1e-2
# What a fixed point can be expected to reach in the precision of its values, or of the branch if that is lower.
_TOLERANCES = {tf.float64: 1e-12, tf.float32: 1e-6, tf.float16: 1e-2, tf.bfloat16: 1e-1}


class InvertibleResidual(base.FlowBijector):
    """Residual block with a contractive branch g, Lip(g) < 1; from data to latent x = y + g(y).

        log |det dx/dy| = tr log(I + J) = sum_{k >= 1} (-1)^(k+1) / k tr(J^k),   J = dg/dy

    The contribution of dimension i is the i-th diagonal entry of log(I + J) or of its estimate. The other direction is the
    fixed point of y <- x - g(y), whose error shrinks by Lip(g) in each step; its gradients are those of the implicit function,
    from a second fixed point (first derivatives only).

    Nothing here makes g contractive: the networks `lipschitz_mlp` and `lipschitz_conv` are. A branch that is no contraction
    shows when the fixed point is not reached; where it folds space (an eigenvalue of J below -1), `ExactLogDet` finds that
    log(I + J) does not exist, and with `validate_args` the other estimates find that their series diverges.

    Args:
      network: the branch g: values of one batch axis (and a condition, see `AffineCoupling`) to values of the same shape.
      log_det: `ExactLogDet()`, `PowerSeries(...)` or `RussianRoulette(...)`.
      event_ndims: 1 for vectors, 3 for images.
      memory: `"keep"` the branch's activations for the gradients, or `"recompute"` them by one more evaluation of the branch,
        which needs a `RussianRoulette`. The gradients are the same, for any weights of the examples, if the branch does not
        depend on Keras's training flag (no dropout, no batch normalisation).
      tolerance: the fixed point is reached when no value changes by more than this, absolutely or relatively; None: 1e-6, for
        64 bits 1e-12, for a branch in half precision 0.01 (bfloat16: 0.1).
      max_iterations: how often to try.
      validate_args: also checks the products with J that the log-det takes, at no further product: none may be longer (in the
        Euclidean norm) than the vector it started from, by more than the rounding. Not under XLA, which has no errors.
      name: the name of the operations.

    Raises:
      ValueError: for another `memory`, for `"recompute"` with another log-det, or a branch that changes the shape.
      InvalidArgumentError: if the fixed point is not reached, or `ExactLogDet` finds no logarithm. Under XLA such events
        become NaN.

    Cost of data to latent: one evaluation of g and one vector-Jacobian product per term and probe. Of latent to data: one
    evaluation per step of the fixed point, log(tolerance) / log(Lip(g)) of them.

    References: Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible residual networks", 2019; Chen, Behrmann, Duvenaud,
    Jacobsen, "Residual flows for invertible generative modeling", 2019.

    #### Example

    >>> branch = lambda y: 0.5 * tf.tanh(y)
    >>> block = dfb.InvertibleResidual(branch, dfb.residual.ExactLogDet())
    >>> x = tf.constant([[1.0, -2.0]])
    >>> bool(tf.reduce_max(tf.abs(block.inverse(tf.identity(block.forward(x))) - x)) < 1e-5)
    True
    """

    def __init__(
        self,
        network: Callable[..., tf.Tensor],
        log_det: "LogDetEstimator",
        event_ndims: int = 1,
        memory: str = "keep",
        tolerance: float | None = None,
        max_iterations: int = 1000,
        validate_args: bool = False,
        name: str = "invertible_residual",
    ):
        parameters = dict(locals())
        self._memory = recompute.checked_memory(memory, "InvertibleResidual")
        if memory == "recompute" and not isinstance(log_det, RussianRoulette):
            kind = type(log_det).__name__
            raise ValueError(f"InvertibleResidual: got memory='recompute' with {kind}, needs a RussianRoulette")
        self._network = keras_bridge.Network(network)
        self._log_det = log_det
        self._event_ndims = base.event_ndims_static(event_ndims, "InvertibleResidual")
        self._tolerance = tolerance
        self._max_iterations = max_iterations
        super().__init__(forward_min_event_ndims=event_ndims, validate_args=validate_args, parameters=parameters, name=name)

    @property
    def network(self) -> keras_bridge.Network:
        """The branch g."""
        return self._network

    @property
    def uses_condition(self) -> bool:
        """Whether the network takes a condition."""
        return self._network.accepts_condition

    def _branch(self, y: tf.Tensor, condition: Any) -> tf.Tensor:
        g = self._network(y, condition, event_ndims=self._event_ndims)
        if not g.shape.is_compatible_with(y.shape):
            raise ValueError(f"{self.name}: the branch maps values of shape {y.shape} to {g.shape}, must keep the shape")
        return g

    def _with_vjp(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, Vjp]:
        """g(y) and its vector-Jacobian product, which `validate_args` checks."""
        g, vjp = implicit.with_vjp(lambda y: self._branch(y, condition), y)
        if not self.validate_args:
            return g, vjp
        axes = list(range(-self._event_ndims, 0))
        message = f"{self.name}: a product with the Jacobian of the branch is longer than its vector; is it a contraction?"

        def checked(w: tf.Tensor) -> tf.Tensor:
            product = vjp(w)
            grows = tf.reduce_sum(product**2, axes) > (1.0 + _ROUNDING) * tf.reduce_sum(w**2, axes)
            with tf.control_dependencies([tf.debugging.Assert(~tf.reduce_any(grows), [message])]):
                return tf.identity(product)

        return g, checked

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        value = tf.cast(y, log_det_dtype(y.dtype))
        if self._memory == "recompute" and isinstance(self._log_det, RussianRoulette):
            g, log_det = self._recomputed(self._log_det, value, condition)
        else:
            g, vjp = self._with_vjp(value, condition)
            log_det = self._log_det.per_dim(vjp, value, self._event_ndims)
        return tf.cast(value + g, y.dtype), log_det

    def _recomputed(self, roulette: "RussianRoulette", y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """g(y) and the log-det, whose gradients evaluate the branch again."""
        leaves = [] if condition is None else tf.nest.flatten(condition)

        def evaluate(y: tf.Tensor, leaves: Sequence[tf.Tensor]) -> tuple[tf.Tensor, Vjp]:
            given = tf.nest.pack_sequence_as(condition, leaves) if leaves else None
            return self._with_vjp(y, given)

        @tf.custom_gradient
        def block(y: tf.Tensor, *leaves: tf.Tensor) -> tuple[tuple[tf.Tensor, tf.Tensor], Callable]:
            g, vjp = evaluate(y, leaves)
            with record.stop_recording():
                value, probes = roulette.estimate(vjp, y)

            def gradient(dg: tf.Tensor, dvalue: tf.Tensor, variables: Sequence[tf.Variable] = ()) -> Any:
                again = recompute.after([y, *leaves], [dg, dvalue])
                inputs = [*again, *variables]
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(inputs)
                    g, vjp = evaluate(again[0], again[1:])
                    surrogate = roulette.surrogate(vjp, probes)
                gradients = tape.gradient([g, surrogate], inputs, [dg, dvalue], unconnected_gradients="zero")
                if not variables:
                    return gradients
                return gradients[: len(again)], gradients[len(again) :]

            return (tf.identity(g), tf.identity(value)), gradient

        return block(y, *leaves)

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        y = self._solve(tf.cast(x, log_det_dtype(x.dtype)), condition)
        _, vjp = self._with_vjp(y, condition)
        return tf.cast(y, x.dtype), -self._log_det.per_dim(vjp, y, self._event_ndims)

    def _solve(self, x: tf.Tensor, condition: Any) -> tf.Tensor:
        """The solution y of y = x - g(y), with the gradients of the implicit function."""
        with record.stop_recording():
            g = self._branch(x, condition)
            tolerance = max(_TOLERANCES[g.dtype], _TOLERANCES[x.dtype]) if self._tolerance is None else self._tolerance
            start = x - tf.cast(g, x.dtype)
            y = self._fixed_point(lambda y: x - tf.cast(self._branch(y, condition), x.dtype), start, 1.0, tolerance)
            y = tf.stop_gradient(y)
        g, vjp = implicit.with_vjp(lambda value: self._branch(value, condition), y)

        def adjoint(upstream: tf.Tensor) -> tf.Tensor:
            axes = list(range(-self._event_ndims, 0))
            size = tf.reduce_max(tf.abs(upstream), axis=axes, keepdims=True)
            return self._fixed_point(lambda w: upstream - vjp(w), upstream, size, tolerance)

        return implicit.with_adjoint(y, x - g, adjoint)

    def _fixed_point(
        self, function: Callable[[tf.Tensor], tf.Tensor], start: tf.Tensor, floor: tf.Tensor | float, tolerance: float
    ) -> tf.Tensor:
        """Iterates from `start` until no change exceeds the tolerance times `floor` and the value."""
        first = function(start)
        axes = list(range(-self._event_ndims, 0))

        def is_close(new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
            near = tf.abs(new - old) <= tolerance * (floor + tf.abs(new))
            return tf.reduce_all(near & tf.math.is_finite(new), axis=axes)

        def unfinished(step: tf.Tensor, value: tf.Tensor, reached: tf.Tensor) -> tf.Tensor:
            return (step < self._max_iterations) & ~tf.reduce_all(reached)

        def iterate(step: tf.Tensor, value: tf.Tensor, reached: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            new = function(value)
            return step + 1, new, is_close(new, value)

        _, value, reached = tf.while_loop(unfinished, iterate, [1, first, is_close(first, start)], parallel_iterations=1)
        message = f"{self.name}: the fixed point was not reached in {self._max_iterations} steps; is the branch a contraction?"
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(reached), [message])]):
            reached = tf.reshape(reached, ps.concat([ps.shape(reached), [1] * self._event_ndims], axis=0))
            return tf.where(reached, value, np.nan)


class LogDetEstimator(Protocol):
    """What `InvertibleResidual` needs of its log-det: those of this module have it, and any other class may."""

    def per_dim(self, vjp: Vjp, y: tf.Tensor, event_ndims: int) -> tf.Tensor:
        """The diagonal of log(I + J), or an estimate, of the shape of `y`; `vjp` multiplies by J from the left, at `y`."""


class ExactLogDet(representation.Described):
    """The exact log-det and diagonal of log(I + J), for few dimensions D.

        log(I + J) = integral over t in [0, 1] of J (I + t J)^-1,   65 Gauss-Legendre nodes (error < 1e-13 for Lip(g) < 0.98)

    The logarithm does not exist where J has a real eigenvalue below -1: the integral has a pole there, and its sum differs,
    but for rare coincidences, from log |det(I + J)|, which is computed as well, from a QR decomposition.

    Cost: D vector-Jacobian products, 65 linear systems and a QR decomposition of size D per event.

    Raises:
      InvalidArgumentError: if the logarithm does not exist. Under XLA, which has no errors, such events become NaN.

    #### Example

    >>> block = dfb.InvertibleResidual(lambda y: 0.5 * y, dfb.residual.ExactLogDet())
    >>> block.inverse_log_det_per_dim([[1.0, 2.0]]).numpy().round(4)
    array([[0.4055, 0.4055]], dtype=float32)
    """

    def per_dim(self, vjp: Vjp, y: tf.Tensor, event_ndims: int) -> tf.Tensor:
        """Diagonal of log(I + J), of the shape of `y`."""
        shape = y.shape[y.shape.rank - event_ndims :]
        dims = shape.num_elements()
        if dims is None:
            raise ValueError(f"ExactLogDet: got events of shape {shape}, needs a static one")
        basis = tf.reshape(tf.eye(dims, dtype=y.dtype), [dims, *shape])
        rows = [tf.reshape(vjp(tf.broadcast_to(row, ps.shape(y))), [-1, dims]) for row in tf.unstack(basis)]
        jacobian = tf.stack(rows, axis=-2)  # [N, output, input]
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        nodes, weights = tf.constant((nodes + 1.0) / 2.0, y.dtype), tf.constant(weights / 2.0, y.dtype)
        jacobian = jacobian[:, tf.newaxis]
        shifted = tf.eye(dims, dtype=y.dtype) + nodes[:, tf.newaxis, tf.newaxis] * jacobian
        quotient = tf.linalg.solve(shifted, tf.broadcast_to(jacobian, ps.shape(shifted)))
        diagonal = tf.einsum("k,nkii->ni", weights, quotient)
        with record.stop_recording():
            triangle = tf.linalg.qr(tf.eye(dims, dtype=y.dtype) + jacobian[:, 0])[1]  # XLA has no slogdet
            log_det = tf.reduce_sum(tf.math.log(tf.abs(tf.linalg.diag_part(triangle))), axis=-1)
            near = tf.abs(tf.reduce_sum(diagonal, axis=-1) - log_det) <= 1e-3 * (1.0 + tf.abs(log_det))
            exists = near & tf.math.is_finite(log_det)
        message = "ExactLogDet: log(I + J) does not exist: an eigenvalue of J is near or below -1; is the branch a contraction?"
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(exists), [message])]):
            return tf.reshape(tf.where(exists[:, tf.newaxis], diagonal, np.nan), ps.shape(y))


class PowerSeries(representation.Described):
    """Truncated series with random probes v ~ N(0, I): sum_{k = 1..n} (-1)^(k+1) / k (v^T J^k)_i v_i. Biased.

    For Lip(g) <= c the truncation error per dimension is at most -log(1 - c) - sum_{k <= n} c^k / k. The gradient is that of
    the estimate.

    Args:
      num_terms: number n of terms.
      num_probes: number of probes to average over.
      seed: as in `tfd.Distribution.sample`; None draws anew at every call, in a `FlowModel` from the model's seed.

    Raises:
      ValueError: for numbers below 1.

    #### Example

    >>> block = dfb.InvertibleResidual(lambda y: 0.5 * y, dfb.residual.PowerSeries(num_terms=3, num_probes=2, seed=(0, 1)))
    >>> block.inverse_log_det_per_dim([[1.0, 2.0]]).shape
    TensorShape([1, 2])
    """

    def __init__(self, num_terms: int = 5, num_probes: int = 1, seed: TensorLike | None = None):
        _check_positive("PowerSeries", num_terms=num_terms, num_probes=num_probes)
        self.num_terms, self.num_probes, self.seed = num_terms, num_probes, seed

    def per_dim(self, vjp: Vjp, y: tf.Tensor, event_ndims: int) -> tf.Tensor:
        """Estimate of the diagonal of log(I + J), of the shape of `y`."""
        total = 0.0
        for seed in samplers.split_seed(probe_seed(self.seed), n=self.num_probes, salt="power_series"):
            v = w = samplers.normal(ps.shape(y), dtype=y.dtype, seed=seed)
            for k in range(1, self.num_terms + 1):
                w = vjp(w)
                total += (-1.0) ** (k + 1) / (k * self.num_probes) * w * v
        return total


class RussianRoulette(representation.Described):
    """Unbiased estimate: the series up to a random term n = num_exact + N, its random part reweighted.

        sum_{k = 1..n} (-1)^(k+1) / k w_k (v^T J^k)_i v_i,   w_k = 1 / P(N >= k - num_exact) beyond num_exact, else 1

    One N per call, for the whole batch. Its gradient is the Neumann series' estimate of E_v[v^T (I + J)^-1 dJ v] from the same
    products: unbiased, and nothing but the last product is differentiated. The value is the estimate above, never the
    surrogate that is differentiated. (The gradient of the sum over dimensions is the log-det's; those of single dimensions
    have no meaning.)

    Noise in the log-det biases an importance-weighted `log_prob` of several samples upwards, so that it is no lower bound; the
    mean of log-weights (`elbo`, one sample) stays unbiased.

    Args:
      distribution: of N: `"poisson"` on 0, 1, ... or `"geometric"` on 1, 2, ...
      rate: mean of the Poisson distribution, or success probability p of the geometric one.
      num_exact: number of terms that are always there, in training.
      num_exact_evaluation: the same outside training (Keras's training flag).
      num_probes: number of probes v to average over.
      seed: as in `tfd.Distribution.sample`; None draws anew at every call, in a `FlowModel` from the model's seed.

    Raises:
      ValueError: for another distribution or rate, or less than one probe.

    References: Chen, Behrmann, Duvenaud, Jacobsen, "Residual flows for invertible generative modeling", 2019.

    #### Example

    >>> block = dfb.InvertibleResidual(lambda y: 0.5 * y, dfb.residual.RussianRoulette("geometric", rate=0.5, seed=(0, 1)))
    >>> block.inverse_log_det_per_dim([[1.0, 2.0]]).shape
    TensorShape([1, 2])
    """

    def __init__(
        self,
        distribution: str = "poisson",
        rate: float | None = None,
        num_exact: int = 2,
        num_exact_evaluation: int = 20,
        num_probes: int = 1,
        seed: TensorLike | None = None,
    ):
        if distribution not in ("poisson", "geometric"):
            raise ValueError(f"RussianRoulette: got distribution={distribution!r}, needs poisson or geometric")
        self.distribution = distribution
        self.rate = {"poisson": 2.0, "geometric": 0.5}[distribution] if rate is None else rate
        if not 0.0 < self.rate or (distribution == "geometric" and self.rate >= 1.0):
            raise ValueError(f"RussianRoulette: got rate={rate!r}, needs a positive number (geometric: below 1)")
        _check_positive("RussianRoulette", num_probes=num_probes)
        self.num_exact, self.num_exact_evaluation = num_exact, num_exact_evaluation
        self.num_probes, self.seed = num_probes, seed

    def survival(self, m: tf.Tensor) -> tf.Tensor:
        """P(N >= m), for m >= 1."""
        if self.distribution == "poisson":
            return tf.math.igamma(m, tf.constant(self.rate, m.dtype))
        return tf.constant(1.0 - self.rate, m.dtype) ** (m - 1.0)

    def per_dim(self, vjp: Vjp, y: tf.Tensor, event_ndims: int) -> tf.Tensor:
        """Estimate of the diagonal of log(I + J), of the shape of `y`."""
        with record.stop_recording():
            value, probes = self.estimate(vjp, y)
        surrogate = self.surrogate(vjp, probes)
        return tf.stop_gradient(value - surrogate) + surrogate

    def surrogate(self, vjp: Vjp, probes: list[tuple[tf.Tensor, tf.Tensor]]) -> tf.Tensor:
        """What is differentiated: n^T J v, elementwise before the sum, for the Neumann series n of each probe v."""
        return sum(vjp(tf.stop_gradient(neumann)) * v for neumann, v in probes) / self.num_probes

    def estimate(self, vjp: Vjp, y: tf.Tensor) -> tuple[tf.Tensor, list[tuple[tf.Tensor, tf.Tensor]]]:
        """The value without gradients, and for each probe its Neumann series v^T (I - J + J^2 ...) and itself."""
        seeds = samplers.split_seed(probe_seed(self.seed), n=2 * self.num_probes, salt="russian_roulette")
        seeds = tf.unstack(seeds)
        values, probes = zip(*(self._series(vjp, y, *pair) for pair in zip(seeds[::2], seeds[1::2])))
        return sum(values) / self.num_probes, list(probes)

    def _series(
        self, vjp: Vjp, y: tf.Tensor, seed: tf.Tensor, seed_of_n: tf.Tensor
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
        v = samplers.normal(ps.shape(y), dtype=y.dtype, seed=seed)
        u = 1.0 - samplers.uniform([], dtype=y.dtype, seed=seed_of_n)  # in (0, 1]: with u = 0 the series would not end
        num_exact = self.num_exact if keras_bridge.training() else self.num_exact_evaluation

        def beyond(k: tf.Tensor) -> tf.Tensor:
            return tf.maximum(tf.cast(k - num_exact, y.dtype), 1.0)

        def goes_on(k: tf.Tensor, w: tf.Tensor, value: tf.Tensor, neumann: tf.Tensor) -> tf.Tensor:
            # N >= m exactly if u <= P(N >= m).
            return (k <= num_exact) | (u <= self.survival(beyond(k)))

        def add(
            k: tf.Tensor, w: tf.Tensor, value: tf.Tensor, neumann: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
            w = vjp(w)
            weight = tf.where(k <= num_exact, tf.ones([], y.dtype), 1.0 / self.survival(beyond(k)))
            weight = tf.where(k % 2 == 0, -weight, weight)
            return k + 1, w, value + weight / tf.cast(k, y.dtype) * w * v, neumann - weight * w

        _, _, value, neumann = tf.while_loop(goes_on, add, [1, v, tf.zeros_like(v), v], parallel_iterations=1)
        return value, (neumann, v)


def _check_positive(name: str, **sizes: int) -> None:
    for key, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {key}={size!r}, needs a positive integer")
