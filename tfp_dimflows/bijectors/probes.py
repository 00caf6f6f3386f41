"""Seeds of the probes of stochastic log-dets."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from tensorflow.types.experimental import TensorLike

from tfp_dimflows.upstream import samplers

_PROBE_SEEDS: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("probe_seeds", default=None)


@contextlib.contextmanager
def probes_from(seed: TensorLike | None) -> Iterator[None]:
    """Context in which stochastic log-dets draw their probes from a stateless seed, each from one of its own."""
    token = _PROBE_SEEDS.set([samplers.sanitize_seed(seed, salt="probes"), 0])
    try:
        yield
    finally:
        _PROBE_SEEDS.reset(token)


@contextlib.contextmanager
def without_probes() -> Iterator[None]:
    """Context in which every probe is drawn anew, whatever `probes_from` is around it."""
    token = _PROBE_SEEDS.set(None)
    try:
        yield
    finally:
        _PROBE_SEEDS.reset(token)


def probe_seed(seed: TensorLike | None = None) -> TensorLike | None:
    """The seed that is given, else the next of `probes_from`; outside it None, which draws anew at every call."""
    state = _PROBE_SEEDS.get()
    if seed is not None or state is None:
        return seed
    state[1] += 1
    return samplers.fold_in(state[0], state[1])
