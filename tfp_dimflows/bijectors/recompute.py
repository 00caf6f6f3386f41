"""A pass through many bijectors that keeps its result instead of their activations.

The gradients go back from the result: what each bijector was given is rebuilt from what came out of it, by its other direction,
and the bijector is evaluated there once more, on a tape of its own.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows import keras_bridge
from tfp_dimflows.bijectors import walk
from tfp_dimflows.bijectors.probes import without_probes
from tfp_dimflows.upstream import control_flow_util, gen_xla_ops, op_def_registry, ops

# Operations with a state that a second evaluation finds as it was, and leaves so.
_REPEATABLE = ("ReadVariableOp", "VarHandleOp", "ResourceGather", "Stateless", "Placeholder", "Assert", "Print")


def checked_memory(memory: str, name: str) -> str:
    """Checks an argument `memory`."""
    if memory not in ("keep", "recompute"):
        raise ValueError(f"{name}: got memory={memory!r}, needs keep or recompute")
    return memory


def floating(structure: Any) -> tuple[list[tf.Tensor], Callable[[Sequence[tf.Tensor]], Any]]:
    """The floating-point tensors of a structure, and a function from others in their places to such a structure."""
    leaves = tf.nest.flatten(structure)
    places = [k for k, leaf in enumerate(leaves) if tf.is_tensor(leaf) and leaf.dtype.is_floating]

    def rebuild(tensors: Sequence[tf.Tensor]) -> Any:
        replaced = dict(zip(places, tensors))
        return tf.nest.pack_sequence_as(structure, [replaced.get(k, leaf) for k, leaf in enumerate(leaves)])

    return [leaves[k] for k in places], rebuild


def value_and_log_det(
    name: str, parts: Callable, value: Any, condition: Any, event_ndims: Any, direction: str
) -> tuple[Any, tf.Tensor]:
    """The result and the summed log-det of bijectors applied one after the other, inside a `tf.function`.

    Args:
      name: the composite's name, for errors.
      parts: function of a condition and the direction to a list of (bijector, keyword arguments), in the order in which they
        are applied.
      value: the argument of the first.
      condition: a structure; gradients flow to its tensors, and to those that the bijectors hold.
      event_ndims: event axes of `value`.
      direction: `"forward"` or `"inverse"`.

    Raises:
      ValueError: if a second evaluation of a bijector would differ from the first, or have an effect.
    """
    training = keras_bridge.training()
    of_condition, rebuild = floating(condition)
    holdings = keras_bridge.collect([bijector for bijector, _ in parts(condition, direction)])
    held = [t for t in holdings.tensors if t.dtype.is_floating and _is_in_reach(t)]

    def steps(given: Sequence[tf.Tensor]) -> Iterator[tuple]:
        """(bijector, keyword arguments, event axes of its argument) in order, under these tensors of the condition."""
        ndims = event_ndims
        for bijector, kwargs in parts(rebuild(given), direction):
            yield bijector, kwargs, ndims
            ndims = getattr(bijector, f"{direction}_event_ndims")(ndims)

    @tf.custom_gradient
    def run(value: Any, given: list[tf.Tensor], held_too: list[tf.Tensor]) -> tuple[Any, Callable]:
        result, log_dets = value, []
        for bijector, kwargs, ndims in steps(given):
            with _repeated(name, bijector):
                result, log_det = walk.value_and_log_det(bijector, result, direction, ndims, kwargs)
            log_dets.append(log_det)

        def gradient(*upstream: tf.Tensor, variables: Sequence[tf.Variable] = ()) -> Any:
            anew = after(given, upstream)
            watched = [*anew, *held]
            _, dvalue, found = keras_bridge.with_training(
                training, lambda: gradients(name, list(steps(anew)), result, upstream, watched, direction)
            )
            dinputs = [*dvalue, *(found.get(source.ref()) for source in watched)]
            return (dinputs, [found.get(variable.ref()) for variable in variables]) if variables else dinputs

        return (result, sum(log_dets)), gradient

    return run(value, of_condition, held)


def gradients(
    name: str, steps: list[tuple], result: Any, upstream: Sequence[tf.Tensor], watched: list[tf.Tensor], direction: str
) -> tuple[list[tf.Tensor], list[tf.Tensor], dict]:
    """What the first of some steps was given, rebuilt from the last one's result, and the gradients there.

    Args:
      name: the composite's name, for errors.
      steps: (bijector, keyword arguments, event axes of its argument), in the order in which they are applied.
      result: what came out of the last.
      upstream: the gradients of the parts of the result, and of the sum of the log-dets.
      watched: tensors that the steps use.
      direction: `"forward"` or `"inverse"`.

    Returns:
      The parts of the first step's argument, their gradients, and those of watched tensors and variables by their references.
    """
    *dresult, dlog_det = upstream
    done: Sequence[tf.Tensor] = upstream
    found: dict = {}
    for bijector, kwargs, ndims in reversed(steps):
        result = tf.nest.pack_sequence_as(result, after(tf.nest.flatten(result), done))
        with tf.GradientTape() as tape, _repeated(name, bijector):
            tape.watch(watched)
            step = again(bijector, result, ndims, direction, kwargs, tape)
            # A constant Jacobian's log-det may have fewer axes than the sum.
            targets = [*tf.nest.flatten(step.result), tf.broadcast_to(step.log_det, tf.shape(dlog_det))]
        sources = [*watched, *tape.watched_variables()]
        slopes = tape.gradient(targets, [*step.parts, *sources], [*dresult, dlog_det])
        slopes = [None if g is None else tf.convert_to_tensor(g) for g in slopes]
        dparts = [tf.zeros_like(p) if g is None else g for p, g in zip(step.parts, slopes)]
        for source, g in zip(sources, slopes[len(dparts) :], strict=True):
            if g is not None:
                found[source.ref()] = found[source.ref()] + g if source.ref() in found else g
        result, dresult = step.join(step.parts), tf.nest.flatten(step.join(dparts))
        done = [*dresult, *(g for g in slopes if g is not None)]
    return tf.nest.flatten(result), dresult, found


class Again(NamedTuple):
    """A second evaluation of a bijector at the argument that its result came from.

    Attributes:
      parts: tensors on the tape that make up the argument.
      join: linear function from them to the argument, and from their gradients to the argument's.
      result: the result as a function of the parts.
      log_det: the summed log-det as a function of the parts.
    """

    parts: list[tf.Tensor]
    join: Callable
    result: Any
    log_det: tf.Tensor


@functools.singledispatch
def again(bijector: Any, result: Any, event_ndims: Any, direction: str, kwargs: dict, tape: tf.GradientTape) -> Again:
    """Rebuilds what a bijector was given from its result, and evaluates it there on a tape.

    Args:
      bijector: the bijector.
      result: what came out of it.
      event_ndims: event axes of its argument.
      direction: `"forward"` or `"inverse"`.
      kwargs: the bijector's keyword arguments.
      tape: the tape, which is recording.
    """
    with tape.stop_recording():
        result_ndims = getattr(bijector, f"{direction}_event_ndims")(event_ndims)
        argument, _ = walk.value_and_log_det(bijector, result, walk.opposite(direction), result_ndims, kwargs)
    parts = tf.nest.flatten(argument)
    tape.watch(parts)
    once_more = walk.value_and_log_det(bijector, argument, direction, event_ndims, kwargs)
    return Again(parts, lambda parts: tf.nest.pack_sequence_as(argument, parts), *once_more)


def after(values: Sequence[tf.Tensor], others: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The same values, not before the others are there, and new to the optimizers, which would merge equal evaluations."""
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        return _barrier(*values, *others)[: len(values)]  # XLA has no control dependencies
    with tf.control_dependencies(others):
        return [tf.identity(value) for value in values]


@tf.custom_gradient
def _barrier(*values: tf.Tensor) -> tuple[list[tf.Tensor], Callable]:
    return gen_xla_ops.xla_optimization_barrier(values), lambda *upstream: upstream


@contextlib.contextmanager
def _repeated(name: str, bijector: tfb.Bijector) -> Iterator[None]:
    """Context of an evaluation that is made twice. Raises if the second would differ from the first, or have an effect."""
    graph = tf.compat.v1.get_default_graph()
    num_operations = len(graph.get_operations())
    with without_probes():
        yield
    nodes = (op.node_def for op in graph.get_operations()[num_operations:] if op_def_registry.get(op.type).is_stateful)
    layers = [part for layer in keras_bridge.collect(bijector).layers for part in layer._flatten_layers()]
    reasons = [*_unrepeatable(graph, nodes), *(f"a loss of {layer.name}" for layer in layers if layer._losses)]
    if reasons:
        raise ValueError(
            f"{name}: got memory='recompute' and {bijector.name}, whose evaluation draws random numbers or has an effect "
            f"({reasons[0]}), needs parts that can be evaluated twice, or memory='keep'"
        )


def _unrepeatable(graph: tf.Graph, nodes: Iterable[Any]) -> Iterator[str]:
    """Names of the operations with a state, in functions as well, that a second evaluation may change or find changed."""
    for node in nodes:
        functions = [f.name for attr in node.attr.values() for f in (attr.func, *attr.list.func) if f.name]
        for function in functions:
            yield from _unrepeatable(graph, graph._get_function(function).cached_definition.node_def)
        if not functions and op_def_registry.get(node.op).is_stateful and not node.op.startswith(_REPEATABLE):
            yield node.name


def _is_in_reach(tensor: tf.Tensor) -> bool:
    """Whether the tensor belongs to this graph or to one around it."""
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and not isinstance(tensor, ops.EagerTensor):
        if tensor.graph is graph:
            return True
        graph = getattr(graph, "outer_graph", None)
    return graph is not None
