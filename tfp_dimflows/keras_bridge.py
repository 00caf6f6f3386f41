"""The two-way bridge between `tf.Module` tracking (TFP) and Keras 3 variable tracking.

TFP finds variables by walking `tf.Module` attributes and does not see Keras 3 layers; Keras 3 finds its own variables and
does not see a bijector's `tf.Variable`s. `Network` shows a Keras 3 layer to `tf.Module`; `collect` and `adopt` show
everything a distribution holds to a `keras.Model`.
"""

import contextlib
import contextvars
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras

from tfp_dimflows import representation
from tfp_dimflows.upstream import prefer_static as ps

_ADAPTING = contextvars.ContextVar("adapting", default=False)


def adapting() -> bool:
    """Whether a data-dependent initialisation pass runs (see `adaptation`)."""
    return _ADAPTING.get()


@contextlib.contextmanager
def adaptation() -> Iterator[None]:
    """Context in which layers with a data-dependent initialisation set their variables from the batch they are given.

    One ordinary pass of a flow in this context initialises all of them in order, each on data that has already passed
    the ones before it. Eager only: inside `tf.function` the assignments would become part of the graph.

    Raises:
      RuntimeError: inside a `tf.function`.
    """
    if not tf.executing_eagerly():
        raise RuntimeError("adaptation: data-dependent initialisation must run eagerly, not inside a tf.function")
    token = _ADAPTING.set(True)
    try:
        yield
    finally:
        _ADAPTING.reset(token)


def training() -> bool | None:
    """Keras's training flag as a layer called here would find it; None outside Keras."""
    return _Flagged(lambda flag: flag)()


def with_training(flag: bool | None, function: Callable) -> Any:
    """The result of a function whose layers find this training flag, as they do inside a layer called with it."""
    return _Flagged(lambda _: function())(training=flag)


class _Flagged(keras.layers.Layer):
    """A function of Keras's training flag, which reaches layers only."""

    def __init__(self, function: Callable[[bool | None], Any]):
        super().__init__(autocast=False, name="training")
        self._function = function
        self.built = True

    def call(self, training: bool | None = None) -> Any:
        return self._function(training)


class Network(representation.Described, tf.Module):
    """A conditioner network under one calling convention, visible to `tf.Module` tracking.

    Wraps a Keras 3 layer or model, a tf_keras layer, a `tf.Module` or a plain function. The network is given values with
    exactly one batch axis; `Network` folds and unfolds whatever batch axes the caller has, and broadcasts the condition's
    leading axes to them.

    How the condition reaches the network: by the keyword `condition` if its signature has that name; as second positional
    argument of a function that needs one; as second element of the input list of a Keras functional model with two inputs.
    A network with none of these, or whose `condition_channels` is 0, takes no condition.

    Args:
      network: the callable.

    Raises:
      TypeError: if `network` is not callable.
    """

    def __init__(self, network: Callable, name: str | None = None):
        super().__init__(name=name)
        if not callable(network):
            raise TypeError(f"Network: got {network!r}, needs a callable (x, condition) -> parameters")
        self._network = network
        self._convention = _condition_convention(network)
        self._replaced: list[tuple[keras.Variable, Any]] = []
        self._show_variables()

    @property
    def accepts_condition(self) -> bool:
        """Whether the network can make use of a condition."""
        return self._convention != "none"

    def __call__(self, x: tf.Tensor, condition: Any = None, *, event_ndims: int) -> tf.Tensor:
        """Evaluates the network on `x` of shape `batch + event`, for any number of batch axes.

        Args:
          x: tensor whose last `event_ndims` axes are the event.
          condition: tensor or structure of tensors; the leading axes, as many as `x` has batch axes, broadcast to the batch.
            Floats are cast to the dtype of `x`.
          event_ndims: number of event axes of `x`.

        Returns:
          The network's output, of shape `batch + output_event`.
        """
        if not self.accepts_condition:
            condition = None
        batch = ps.shape(x)[: ps.rank(x) - event_ndims]
        batch_rank = int(ps.rank(x)) - event_ndims
        if condition is not None:
            condition = tf.nest.map_structure(lambda c: _broadcast_batch(c, batch, batch_rank, x.dtype), condition)
        if batch_rank == 1:
            return self._evaluate(x, condition)
        x = _fold_batch(x, batch_rank)
        if condition is not None:
            condition = tf.nest.map_structure(lambda c: _fold_batch(c, batch_rank), condition)
        y = self._evaluate(x, condition)
        return tf.reshape(y, ps.concat([batch, ps.shape(y)[1:]], axis=0))

    def with_variables(self, replacement: Callable[[keras.Variable], Any]) -> "Network":
        """The same network at other values of its Keras 3 variables.

        Args:
          replacement: function of a variable to a tensor; or to a `tf.Variable`, which then also takes what a data-dependent
            initialisation assigns.
        """
        other = copy.copy(self)
        other._replaced = [(v, replacement(v)) for layer in collect(self._network).layers for v in layer.variables]
        other._variables = []
        return other

    def _evaluate(self, x: tf.Tensor, condition: Any) -> tf.Tensor:
        if not self._replaced:
            return self._evaluate_as_it_is(x, condition)
        with keras.StatelessScope(
            [(v, tf.convert_to_tensor(value)) for v, value in self._replaced], collect_losses=True
        ) as scope:
            y = self._evaluate_as_it_is(x, condition)
        if scope.losses:
            raise ValueError("Network: got a network that adds a loss, needs one without to evaluate it at other values")
        if adapting():
            for v, value in self._replaced:
                value.assign(scope.get_current_value(v))
        return y

    def _evaluate_as_it_is(self, x: tf.Tensor, condition: Any) -> tf.Tensor:
        if self._convention == "keyword":
            y = self._network(x, condition=condition)
        elif self._convention == "positional":
            y = self._network(x, condition)
        elif self._convention == "list" and condition is not None:
            y = self._network([x, condition])
        else:
            y = self._network(x)
        if not self._complete:
            self._show_variables()
        return y

    def _show_variables(self) -> None:
        # The network itself, a closure or a module may hold Keras 3 layers, which `tf.Module` does not see.
        self._complete = all(layer.built for layer in collect(self._network).layers)
        self._variables = variables_of(self._network)


def _condition_convention(network: Callable) -> str:
    if isinstance(network, (keras.Layer, tf_keras.layers.Layer)):
        if isinstance(network, (keras.Model, tf_keras.Model)) and len(getattr(network, "inputs", None) or ()) == 2:
            return "list"
        if getattr(network, "condition_channels", None) == 0:
            return "none"
        return "keyword" if "condition" in list(inspect.signature(network.call).parameters)[1:] else "none"
    try:
        parameters = inspect.signature(network).parameters
    except (TypeError, ValueError):
        return "none"
    others = list(parameters.values())[1:]
    if any(p.name == "condition" for p in others):
        return "keyword"
    # An optional one, as in `lambda x, net=net: net(x)` or tf.tanh's name, is no place for a condition.
    positional = [p for p in others if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return "positional" if positional and positional[0].default is inspect.Parameter.empty else "none"


def _broadcast_batch(condition: Any, batch: tf.Tensor, batch_rank: int, dtype: tf.DType) -> tf.Tensor:
    condition = tf.convert_to_tensor(condition)
    if condition.dtype.is_floating and dtype.is_floating:
        condition = tf.cast(condition, dtype)
    if batch_rank == 0:
        return condition
    given, wanted = condition.shape[:batch_rank], tf.TensorShape(tf.get_static_value(batch))
    if given.rank is not None and (
        given.rank < batch_rank or any(g not in (1, w) for g, w in zip(given, wanted or ()) if None not in (g, w))
    ):
        raise ValueError(f"condition: got shape {condition.shape}, needs leading axes that broadcast to the batch {wanted}")
    shape = ps.concat([batch, ps.shape(condition)[batch_rank:]], axis=0)
    static = tf.get_static_value(shape)
    if static is not None and condition.shape.is_fully_defined() and tuple(static) == tuple(condition.shape):
        return condition
    return tf.broadcast_to(condition, shape)


def _fold_batch(x: tf.Tensor, batch_rank: int) -> tf.Tensor:
    return tf.reshape(x, ps.concat([[-1], ps.shape(x)[batch_rank:]], axis=0))


class Holdings(NamedTuple):
    """What `collect` found: outermost Keras 3 layers, tf_keras layers, the variables of no Keras 3 layer, and tensors."""

    layers: list[keras.Layer]
    tf_keras_layers: list[Any]
    variables: list[tf.Variable]
    tensors: list[tf.Tensor]


def collect(root: Any) -> Holdings:
    """Finds every Keras 3 layer, every other `tf.Variable` and every tensor that an object holds.

    Walks `tf.Module`s (so distributions, bijectors, `tfp.util.TransformedVariable`s and tf_keras layers), lists, tuples and
    dicts, and the closures of functions (TFP keeps networks in closures).

    Args:
      root: a distribution, bijector, or any structure of them.

    Returns:
      The `Holdings`, each item once, in the order of discovery.

    Raises:
      ValueError: if a `keras.Variable` was given to a TFP object as a parameter: TFP would freeze its present value.
    """
    layers, tf_keras_layers, variables, tensors, seen, waiting = [], [], [], [], set(), [root]
    while waiting:
        item = waiting.pop(0)
        if id(item) in seen or item is None or isinstance(item, (str, bytes, int, float, bool)):
            continue
        seen.add(id(item))
        if isinstance(item, keras.Layer):
            layers.append(item)
        elif isinstance(item, tf.Variable):
            variables.append(item)
        elif isinstance(item, tf.Tensor):
            tensors.append(item)
        elif isinstance(item, tf.Module):
            if isinstance(item, (tfp.bijectors.Bijector, tfp.distributions.Distribution)):
                _check_not_frozen(item)
            if isinstance(item, tf_keras.layers.Layer):
                tf_keras_layers.append(item)
        waiting.extend(value for _, value in held_by(item))
    owned = {id(v.value) for layer in layers for v in layer.variables}
    return Holdings(layers, tf_keras_layers, [v for v in variables if id(v) not in owned], tensors)


def held_by(item: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of what a `tf.Module`, a container, or a function holds; nothing of anything else."""
    if isinstance(item, tf_keras.layers.Layer):
        yield from ((v.name, v) for v in item.variables)
    elif isinstance(item, tf.Module):
        yield from vars(item).items()
    elif isinstance(item, dict):
        yield from ((str(key), value) for key, value in item.items())
    elif isinstance(item, (list, tuple, set)):
        yield from ((str(k), value) for k, value in enumerate(item))
    elif isinstance(item, functools.partial):
        yield from [("func", item.func), ("args", item.args), ("keywords", item.keywords)]
    elif isinstance(item, types.MethodType):
        yield from [("__self__", item.__self__), ("__func__", item.__func__)]
    elif isinstance(item, types.FunctionType):
        yield from (("__closure__", value) for value in cell_contents(item))


def variables_of(root: Any) -> list[tf.Variable]:
    """Every `tf.Variable` that an object holds, those of Keras 3 layers included (see `collect`)."""
    holdings = collect(root)
    owned = [v.value for layer in holdings.layers for v in layer.variables]
    return [v for v in owned if isinstance(v, tf.Variable)] + holdings.variables


def _check_not_frozen(item: tf.Module) -> None:
    for key, value in (item.parameters or {}).items():
        if isinstance(value, keras.Variable):
            raise ValueError(
                f"{item.name}: parameter {key!r} is a keras.Variable, which TFP turns into a constant that never trains; "
                f"pass its tf.Variable instead ({key}=variable.value)"
            )


def cell_contents(function: types.FunctionType) -> Iterator[Any]:
    """What a function closes over."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents


def adopt(variable: tf.Variable) -> keras.Variable:
    """A `keras.Variable` that *is* the given `tf.Variable` (same storage), so that Keras trains and saves it."""
    name = variable.name.split(":")[0].replace("/", "_")
    adopted = keras.Variable(variable, trainable=variable.trainable, dtype=variable.dtype.name, name=name)
    assert adopted.value is variable
    return adopted
