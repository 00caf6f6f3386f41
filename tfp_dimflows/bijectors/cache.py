"""TFP's cache of passes, minus what would be stale."""

from typing import Any

import tensorflow as tf
from tensorflow_probability import bijectors as tfb

from tfp_dimflows.keras_bridge import adapting
from tfp_dimflows.upstream import cache_util, record


class FreshCache(cache_util.BijectorCacheWithGreedyAttrs):
    """TFP's cache, minus every entry that would be stale or out of reach.

    A direction's value and log-dets enter together, so a conditioner runs once. An entry is used only while a
    recomputation would give the same tensors: in the graph that made it, before any assignment there; eagerly, while
    no variable of the bijector has changed and, under a gradient tape, if that tape recorded it.
    """

    def _get_or_create_edge(self, input: Any, forward_name: str, kwargs: dict) -> Any:  # noqa: A002 (TFP's name)
        edge = super()._get_or_create_edge(input, forward_name, kwargs)
        if edge.attributes and not self._is_current(edge):
            edge = edge._replace(output_ref=None, attributes={}, dependencies=None)
            self.storage[edge.input_ref] = edge
        return edge

    def _is_current(self, edge: Any) -> bool:
        if "origin" not in edge.attributes:
            return False
        output = tf.nest.flatten(edge.output_ref()) if edge.output_ref else []
        return edge.attributes["origin"].is_current([*output, edge.attributes["ildj"]])


class Origin:
    """Where and under which variable values a cached pass was made."""

    def __init__(self, bijector: tfb.Bijector):
        self._adapting = adapting()
        self._graph = None
        if tf.executing_eagerly():
            # Reading is O(1): the value shares the variable's buffer until the variable is assigned to.
            self._values = [(v, v.read_value()) for v in bijector.variables]
        else:
            self._graph = tf.compat.v1.get_default_graph()
            self._num_operations = len(self._graph.get_operations())

    def is_current(self, tensors: list[tf.Tensor]) -> bool:
        """Whether a recomputation would give these tensors."""
        if adapting() and not self._adapting:
            return False
        if record.could_possibly_record() and not record.should_record_backprop(tensors):
            return False
        if tf.executing_eagerly():
            return self._graph is None and all(bool(tf.reduce_all(v == value)) for v, value in self._values)
        if self._graph is not tf.compat.v1.get_default_graph():
            return False
        return not any(_may_assign(operation) for operation in self._graph.get_operations()[self._num_operations :])


_HARMLESS = ("ReadVariableOp", "VarHandleOp", "ResourceGather", "Placeholder", "Random", "Stateless", "Assert", "Print")


def _may_assign(operation: tf.Operation) -> bool:
    return operation.op_def.is_stateful and not operation.type.startswith(_HARMLESS)
