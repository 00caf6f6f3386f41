"""`Scan`: many bijectors of one kind, of which a graph holds one."""

import contextlib
import copy
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras
from tensorflow_probability import bijectors as tfb

from tfp_dimflows import keras_bridge, representation
from tfp_dimflows.bijectors import base, chain, recompute
from tfp_dimflows.bijectors.conditions import condition_kwargs, uses_condition
from tfp_dimflows.bijectors.log_dets import log_det_dtype, sum_event
from tfp_dimflows.bijectors.walk import Walk, value_and_log_det
from tfp_dimflows.upstream import control_flow_util


class Scan(base.Composite):
    """Composition of bijectors that differ only in the values of their variables, `forward(x) = b_0(b_1(... b_n(x)))`.

    Each of their variables is one here, with a leading axis for its values in b_0 to b_n, so that an optimizer has as many to
    update at any length. A `tf.function` walks the bijectors in a `tf.while_loop`, and holds one of them: the time to the first
    step hardly grows with the length. Eagerly, in the per-dimension hook, and if compiled with XLA (whose convolutions are slow
    in loops on a CPU) they are evaluated one by one.

    * They keep the event's shape.
    * They are told apart by values only: of their variables, and of constant arrays, which inside the loop are tensors. Masks
      that alternate, for example, are not of one kind, but a `Chain` of two couplings is.
    * Their networks are Keras 3 layers, or functions and `tf.Module`s that hold such, without a state: no batch normalisation,
      dropout, spectral normalisation or regularisation losses.

    Args:
      make: function of k to the bijector b_k, called once for each k.
      length: how many there are, n + 1.
      memory: `"keep"` or `"recompute"` what the gradients need, as in `Chain`; the second keeps the result of one bijector,
        whatever the length.
      name: the name of the operations.

    Raises:
      ValueError: for a length below 1, bijectors of different kinds, a network with a state, or another `memory`.

    #### Example

    >>> flow = dfb.Scan(lambda k: dfb.Chain([dfb.ActNorm(3), dfb.InvertibleConv1x1(3, seed=k)]), length=20)
    >>> [v.shape for v in flow.trainable_variables]
    [TensorShape([20, 3]), TensorShape([20, 3]), TensorShape([20, 3, 3])]
    >>> flow.forward(flow.inverse([1.0, 2.0, 3.0])).numpy().round(3)
    array([1., 2., 3.], dtype=float32)
    """

    def __init__(self, make: Callable[[int], tfb.Bijector], length: int, memory: str = "keep", name: str = "scan"):
        parameters = dict(locals())
        if not isinstance(length, (int, np.integer)) or length < 1:
            raise ValueError(f"{name}: got length={length!r}, needs a positive integer")
        made = [make(k) for k in range(length)]
        self._memory = recompute.checked_memory(memory, name)
        self._length = int(length)
        self._template = _Hidden(made[0])
        self._stacked, self._is_stacked = _stack(made, name)
        super().__init__(
            forward_min_event_ndims=made[0].forward_min_event_ndims,
            inverse_min_event_ndims=made[0].inverse_min_event_ndims,
            dtype=made[0].dtype,
            is_constant_jacobian=made[0].is_constant_jacobian,
            parameters=parameters,
            name=name,
        )

    @property
    def length(self) -> int:
        """How many bijectors there are."""
        return self._length

    @property
    def bijectors(self) -> list[tfb.Bijector]:
        """The bijectors at the present values of the variables, as constants."""
        with self._one_by_one() as parts:
            return parts.bijectors

    @property
    def uses_condition(self) -> bool:
        """Whether each bijector can use a condition."""
        return uses_condition(self._template.bijector)

    def stacked_variables(self) -> list[tuple[tf.Variable, tf.Variable]]:
        """For each variable of the first bijector, which keeps its initial value, the one here with the values of all."""
        leaves = (
            leaf for (_, leaf), is_stacked in zip(_leaves(self._template.bijector, self.name), self._is_stacked) if is_stacked
        )
        pairs = (
            (leaf.value if isinstance(leaf, keras.Variable) else leaf, stack) for leaf, stack in zip(leaves, self._stacked)
        )
        return [pair for pair in pairs if isinstance(pair[1], tf.Variable)]

    def _at(self, values: Sequence[Any]) -> tfb.Bijector:
        """The bijector with these values in the place of those that are stacked."""
        if self._memory == "recompute":  # new tensors at every use, as of variables: TFP's caches would know those of one
            values = [tfp.util.DeferredTensor(v, tf.identity) if isinstance(v, tf.Tensor) else v for v in values]
        remaining, is_stacked = iter(values), iter(self._is_stacked)
        return _copy(self._template.bijector, lambda _, leaf: next(remaining) if next(is_stacked) else leaf)

    # One by one.

    @contextlib.contextmanager
    def _one_by_one(self, memory: str = "keep") -> Iterator[chain.Chain]:
        """A chain of the bijectors. What a data-dependent initialisation assigns to their variables is kept."""
        columns = [list(stack) if isinstance(stack, np.ndarray) else tf.unstack(stack) for stack in self._stacked]
        if keras_bridge.adapting():
            columns = [column if isinstance(column[0], np.ndarray) else [*map(tf.Variable, column)] for column in columns]
        yield chain.Chain([self._at(values) for values in (zip(*columns) if columns else [()] * self._length)], memory)
        if keras_bridge.adapting():
            for stack, column in zip(self._stacked, columns):
                if isinstance(stack, tf.Variable):
                    stack.assign(tf.stack(column))

    def _walk_forward(self, x: Walk, condition: Any) -> Walk:
        with self._one_by_one() as parts:
            return x.forward(parts, condition)

    def _walk_inverse(self, y: Walk, condition: Any) -> Walk:
        with self._one_by_one() as parts:
            return y.inverse(parts, condition)

    # In a loop.

    def _summed(self, value: tf.Tensor, condition: Any, event_ndims: int, direction: str) -> tuple[tf.Tensor, tf.Tensor]:
        graph = tf.compat.v1.get_default_graph()
        # XLA's convolutions in a loop are slow on a CPU.
        if tf.executing_eagerly() or control_flow_util.GraphOrParentsInXlaContext(graph):
            with self._one_by_one(self._memory) as parts:
                return value_and_log_det(parts, value, direction, event_ndims, condition_kwargs(parts, condition))
        rows = self._rows([tf.convert_to_tensor(stack) for stack in self._stacked if isinstance(stack, tf.Variable)])
        if self._memory == "keep":
            return self._loop(value, rows, condition, event_ndims, direction)
        return self._recomputed(value, rows, condition, event_ndims, direction)

    def _rows(self, values: Sequence[Any], is_stacked: bool = True) -> list[tf.Tensor]:
        """For every dtype the values side by side, flat: a loop is faster with one array than with many."""
        by_dtype: dict[tf.DType, list[tf.Tensor]] = {}
        for value in values:
            by_dtype.setdefault(value.dtype, []).append(tf.reshape(value, [self._length, -1] if is_stacked else [-1]))
        return [tf.concat(parts, axis=-1) for parts in by_dtype.values()]

    def _values(self, arrays: list[tf.TensorArray], k: tf.Tensor) -> list[tf.Tensor]:
        """The values of the k-th bijector, as `_at` takes them."""
        shapes: dict[tf.DType, list[int]] = {}
        for stack in self._stacked:
            if isinstance(stack, tf.Variable):
                shapes.setdefault(stack.dtype, []).append(stack.shape[1:].num_elements())
        parts = {dtype: iter(tf.split(array.read(k), sizes)) for array, (dtype, sizes) in zip(arrays, shapes.items())}
        return [
            tf.reshape(next(parts[stack.dtype]), stack.shape[1:]) if isinstance(stack, tf.Variable) else tf.gather(stack, k)
            for stack in self._stacked
        ]

    def _steps(self, values: Sequence[Any], condition: Any, event_ndims: int, direction: str) -> list[tuple]:
        """The parts of a bijector in this direction, each with its keyword arguments and the event axes of its argument."""
        parts, steps = chain.Chain([self._at(values)]), []
        for bijector, kwargs in parts.all_parts(condition, direction):
            steps.append((bijector, kwargs, event_ndims))
            event_ndims = getattr(bijector, f"{direction}_event_ndims")(event_ndims)
        return steps

    def _place(self, step: tf.Tensor, direction: str) -> tf.Tensor:
        """Which bijector is applied at a step."""
        return step if direction == "inverse" else self._length - 1 - step

    def _while(self, body: Callable, start: list[Any]) -> Any:
        return tf.while_loop(lambda step, *_: step < self._length, body, [0, *start], maximum_iterations=self._length)[1:]

    def _loop(
        self, value: tf.Tensor, rows: list[tf.Tensor], condition: Any, event_ndims: int, direction: str
    ) -> tuple[tf.Tensor, tf.Tensor]:
        arrays, shape = [_array(row) for row in rows], value.shape

        def body(step: tf.Tensor, value: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            values = self._values(arrays, self._place(step, direction))
            for bijector, kwargs, ndims in self._steps(values, condition, event_ndims, direction):
                value, log_det = value_and_log_det(bijector, value, direction, ndims, kwargs)
                total = total + log_det
            if not value.shape.is_compatible_with(shape):
                raise ValueError(f"{self.name}: got a bijector from shape {shape} to {value.shape}, needs one that keeps it")
            value.set_shape(shape)
            return step + 1, value, total

        total = sum_event(tf.zeros([], log_det_dtype(value.dtype)), value, event_ndims)
        return self._while(body, [value, total])

    def _recomputed(
        self, value: tf.Tensor, rows: list[tf.Tensor], condition: Any, event_ndims: int, direction: str
    ) -> tuple[tf.Tensor, tf.Tensor]:
        training = keras_bridge.training()
        given, rebuild = recompute.floating(condition)

        @tf.custom_gradient
        def run(
            value: tf.Tensor, given: list[tf.Tensor], rows: list[tf.Tensor]
        ) -> tuple[tuple[tf.Tensor, tf.Tensor], Callable]:
            result, total = self._loop(value, rows, rebuild(given), event_ndims, direction)

            def gradient(dresult: tf.Tensor, dtotal: tf.Tensor) -> tuple:
                arrays = [_array(row) for row in rows]
                slopes = [tf.TensorArray(row.dtype, self._length, element_shape=row.shape[1:]) for row in rows]

                def body(
                    step: tf.Tensor,
                    result: tf.Tensor,
                    dresult: tf.Tensor,
                    dgiven: list[tf.Tensor],
                    slopes: list[tf.TensorArray],
                ) -> tuple:
                    place = self._place(self._length - 1 - step, direction)
                    values = self._values(arrays, place)
                    steps = self._steps(values, rebuild(given), event_ndims, direction)
                    variables = [v for v, stack in zip(values, self._stacked) if isinstance(stack, tf.Variable)]
                    watched = [*given, *variables]
                    (value,), (dvalue,), found = keras_bridge.with_training(
                        training,
                        lambda: recompute.gradients(self.name, steps, result, [dresult, dtotal], watched, direction),
                    )
                    value.set_shape(result.shape)
                    dvalue.set_shape(result.shape)
                    found = [found.get(source.ref(), tf.zeros_like(source)) for source in watched]
                    dgiven = [sum(pair) for pair in zip(dgiven, found)]
                    drows = self._rows(found[len(given) :], is_stacked=False)
                    return step + 1, value, dvalue, dgiven, [s.write(place, d) for s, d in zip(slopes, drows, strict=True)]

                start = [result, dresult, [tf.zeros_like(g) for g in given], slopes]
                _, dvalue, dgiven, slopes = self._while(body, start)
                return dvalue, dgiven, [slope.stack() for slope in slopes]

            return (result, total), gradient

        return run(value, given, rows)


@representation.arguments.register
def _arguments(scan: Scan) -> dict[str, Any]:
    return {"bijector": scan._template.bijector, **{name: value for name, value in scan.parameters.items() if name != "make"}}


class _Hidden:
    """Holds a bijector whose variables are not to be found."""

    def __init__(self, bijector: tfb.Bijector):
        self.bijector = bijector


def _array(stack: tf.Tensor) -> tf.TensorArray:
    return tf.TensorArray(stack.dtype, stack.shape[0], element_shape=stack.shape[1:]).unstack(stack)


_ARRAYS = (tf.Tensor, np.ndarray)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, tf.DType, tf.TensorShape)
_IRRELEVANT = ("name", "_name", "_name_scope", "_scope_name", "_parameter_dict", "_cached_batch_shapes")


def _stack(made: Sequence[tfb.Bijector], name: str) -> tuple[list[tf.Variable | np.ndarray], list[bool]]:
    """Variables and arrays with the values of all bijectors, and for every leaf of one whether it is among these."""
    rows = [_leaves(bijector, name) for bijector in made]
    for k, row in enumerate(rows):
        for first, other in itertools.zip_longest(rows[0], row):
            if first is None or other is None or _kind(*first) != _kind(*other):
                path, values = (first or other)[0], [leaf and leaf[1] for leaf in (other, first)]
                raise ValueError(
                    f"{name}: bijector {k} is of another kind than bijector 0: in {path} got {values[0]!r} and {values[1]!r}, "
                    "needs bijectors that differ in the values of variables and arrays only"
                )
    stacked: list[tf.Variable | np.ndarray] = []
    is_stacked: list[bool] = []
    for column in zip(*rows):
        leaves = [leaf.value if isinstance(leaf, keras.Variable) else leaf for _, leaf in column]
        is_variable, is_array = isinstance(leaves[0], tf.Variable), isinstance(leaves[0], _ARRAYS)
        if is_variable:
            if len({id(leaf) for leaf in leaves}) < len(leaves):
                raise ValueError(
                    f"{name}: got bijectors that share {leaves[0].name}, needs variables of their own; use a Chain"
                )
            label = column[0][1].name.split(":")[0].split("/")[-1]
            stacked.append(tf.Variable(tf.stack(leaves), name=label, trainable=leaves[0].trainable))
        elif is_array and not all(np.array_equal(leaf, leaves[0]) for leaf in leaves):
            stacked.append(np.stack([np.asarray(leaf) for leaf in leaves]))
        is_stacked.append(len(stacked) > sum(is_stacked))
    return stacked, is_stacked


def _leaves(bijector: tfb.Bijector, name: str) -> list[tuple[str, Any]]:
    """Path and value of everything that a bijector computes with."""
    leaves = []

    def note(path: str, leaf: Any) -> Any:
        leaves.append((path, leaf))
        return leaf

    _copy(bijector, note)
    holdings = keras_bridge.collect(bijector)
    found = {id(leaf.value if isinstance(leaf, keras.Variable) else leaf) for _, leaf in leaves}
    hidden = [v.name for v in holdings.variables if id(v) not in found]
    states = [v.path for layer in holdings.layers for v in layer.variables if not v.trainable]
    losses = [v.path for layer in holdings.layers for v in layer.variables if v.regularizer or v.constraint]
    for reason, names in (
        ("a variable in a closure or in a layer that is not Keras 3's", hidden),
        ("a state that is not trained", states),
        ("a variable with a regularizer or a constraint", losses),
    ):
        if names:
            raise ValueError(f"{name}: got a bijector with {reason} ({names[0]}), needs one without; use a Chain")
    return leaves


def _kind(path: str, leaf: Any) -> tuple:
    """What has to agree."""
    if isinstance(leaf, (keras.Variable, tf.Variable)):
        return path, type(leaf), tuple(leaf.shape), leaf.dtype, leaf.trainable
    if isinstance(leaf, _ARRAYS):
        return path, type(leaf), tuple(leaf.shape), leaf.dtype
    if isinstance(leaf, types.FunctionType):
        cells = keras_bridge.cell_contents(leaf)
        return path, leaf.__code__, [cell if isinstance(cell, _PLAIN) else type(cell) for cell in cells]
    return (path, leaf) if isinstance(leaf, _PLAIN) else (path, type(leaf))


def _copy(bijector: tfb.Bijector, function: Callable[[str, Any], Any]) -> tfb.Bijector:
    """A copy of a bijector with `function(path, leaf)` in the place of all that is no container; of one variable everywhere."""
    done = {}

    def leaf_of(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, (keras.Variable, tf.Variable, *_ARRAYS)):
            return function(path, leaf)
        if id(leaf) not in done:
            done[id(leaf)] = function(path, leaf)
        return done[id(leaf)]

    def of(path: str, item: Any) -> Any:
        if id(item) in done:
            return done[id(item)]
        if isinstance(item, types.MethodType):
            return types.MethodType(item.__func__, of(path, item.__self__))
        if isinstance(item, (list, tuple)):  # TensorFlow wraps those that a module holds
            values = [of(f"{path}[{k}]", value) for k, value in enumerate(item)]
            return type(item)(*values) if hasattr(item, "_fields") else tuple(values) if isinstance(item, tuple) else values
        if isinstance(item, dict):
            return {key: of(f"{path}[{key!r}]", value) for key, value in item.items()}
        if isinstance(item, keras_bridge.Network):
            clone = done[id(item)] = item.with_variables(lambda v: leaf_of(f"{path}.{v.name}", v))
            clone._network = of(f"{path}.network", clone._network)
            return clone
        is_ours = type(item).__module__.startswith("tfp_dimflows.bijectors")
        if isinstance(item, tf.Module) and not isinstance(item, tf_keras.layers.Layer) or is_ours:
            clone = done[id(item)] = copy.copy(item)
            for key, value in vars(item).items():
                if key == "_parameters":
                    object.__setattr__(clone, key, {})
                elif key not in _IRRELEVANT and not key.startswith("_self_"):
                    object.__setattr__(clone, key, of(f"{path}.{key}", value))
            return clone
        return leaf_of(path, item)

    return of(bijector.name, bijector)
