"""Continuous flows: what `tfb.FFJORD` needs beside itself."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow.types.experimental import TensorLike
from tensorflow_probability import bijectors as tfb

from tfp_dimflows import keras_bridge, representation
from tfp_dimflows.bijectors import base
from tfp_dimflows.bijectors.probes import probe_seed

TRACES = ("hutchinson", "exact")


def ffjord(
    network: Callable[..., tf.Tensor],
    event_ndims: int = 1,
    end_time: float = 1.0,
    trace: str = "hutchinson",
    solver: "Solver | None" = None,
    dtype: tf.DType = tf.float32,
    name: str = "ffjord",
) -> tfb.FFJORD:
    """TFP's FFJORD of a time-dependent network: latent at time 0, data at `end_time`, along dy/dt = f(y, t).

        log |det dx/dy| = - integral of tr(df/dy) over the time,   of dimension i: - integral of v_i (v^T df/dy)_i

    with a probe v of Rademacher signs that is fixed during one solution and drawn anew for the next (`"hutchinson"`), or
    the diagonal of df/dy itself (`"exact"`, D evaluations).

    Args:
      network: f: `(y, condition) -> velocities`, whose condition is the time, `[N, 1]`; for example a `ConcatSquashNet`.
      event_ndims: 1 for vectors, 3 for images.
      end_time: the time at which the data is.
      trace: `"hutchinson"` or `"exact"`.
      solver: an ODE solver with the interface of `tfp.math.ode.Solver`; None: Dormand-Prince with tolerances of 1e-5.
      dtype: float type of the values.
      name: the name of the operations.

    Raises:
      ValueError: for another trace.

    References: Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD", 2019.

    #### Example

    >>> net = dimflows.networks.ConcatSquashNet([2], hidden=[8])
    >>> flow = dfb.ffjord(net, trace="exact", solver=dfb.continuous.RungeKutta4(num_steps=8))
    >>> x = tf.constant([[1.0, -1.0]])
    >>> bool(tf.reduce_max(tf.abs(flow.forward(tf.identity(flow.inverse(x))) - x)) < 1e-3)
    True
    """
    if trace not in TRACES:
        raise ValueError(f"ffjord: got trace={trace!r}, needs one of {TRACES}")
    field = keras_bridge.Network(network)
    event_ndims = base.event_ndims_static(event_ndims, "ffjord")

    def velocity(time: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        times = tf.fill([1] * (y.shape.rank - event_ndims) + [1], tf.cast(time, y.dtype))
        return tf.cast(field(y, times, event_ndims=event_ndims), y.dtype)

    def hutchinson(ode_fn: Callable, shape: tf.TensorShape, dtype: tf.DType) -> Callable:
        options = {"sample_fn": tfp.random.rademacher, "seed": probe_seed()}
        return tfb.ffjord.trace_jacobian_hutchinson(ode_fn, shape, dtype, **options)

    augment = hutchinson if trace == "hutchinson" else tfb.ffjord.trace_jacobian_exact
    solver = tfp.math.ode.DormandPrince(rtol=1e-5, atol=1e-5) if solver is None else solver
    return tfb.FFJORD(velocity, solver.solve, augment, final_time=end_time, dtype=dtype, name=name)


class Solver(Protocol):
    """What `ffjord` needs of its ODE solver: those of `tfp.math.ode` have it, `RungeKutta4`, and any other class may."""

    def solve(self, ode_fn: Callable, initial_time: TensorLike, initial_state: Any, solution_times: TensorLike) -> Any:
        """States at the solution times, in the attribute `states`; arguments as in `tfp.math.ode.Solver.solve`."""


class RungeKutta4(representation.Described):
    """The classic Runge-Kutta method of order 4 with a fixed number of steps, differentiated through.

    Args:
      num_steps: number of steps, of four evaluations each.
    """

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def solve(self, ode_fn: Callable, initial_time: TensorLike, initial_state: Any, solution_times: TensorLike) -> "Solution":
        """The state at the only entry of `solution_times`; arguments as in `tfp.math.ode.Solver.solve`."""
        dtype = tf.nest.flatten(initial_state)[0].dtype
        start, end = tf.cast(initial_time, dtype), tf.cast(solution_times[0], dtype)
        dt = (end - start) / self.num_steps

        def moved(state: Any, slope: Any, factor: float) -> Any:
            return tf.nest.map_structure(lambda s, k: s + factor * dt * k, state, slope)

        def step(n: tf.Tensor, state: Any) -> tuple[tf.Tensor, Any]:
            t = start + tf.cast(n, dtype) * dt
            k1 = ode_fn(t, state)
            k2 = ode_fn(t + dt / 2.0, moved(state, k1, 0.5))
            k3 = ode_fn(t + dt / 2.0, moved(state, k2, 0.5))
            k4 = ode_fn(t + dt, moved(state, k3, 1.0))
            slope = tf.nest.map_structure(lambda a, b, c, d: (a + 2.0 * b + 2.0 * c + d) / 6.0, k1, k2, k3, k4)
            return n + 1, moved(state, slope, 1.0)

        _, state = tf.while_loop(
            lambda n, state: n < self.num_steps, step, (0, initial_state), maximum_iterations=self.num_steps
        )
        return Solution(tf.nest.map_structure(lambda s: s[tf.newaxis], state))


class Solution(NamedTuple):
    """States at the solution times, on a first axis."""

    states: Any
