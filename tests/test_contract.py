"""What every bijector promises, checked for the entries of the registry in float64 unless said otherwise.

README's command runs those of the core, which hold every class; `-m contract` runs all of them. What the base does whatever
the class, routing of arguments and copies, is asked of the core only.
"""

import inspect

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from registry import (
    CORE,
    ENTRIES,
    assert_close,
    build,
    built,
    dfb,
    dimflows,
    distribution,
    event_sum,
    fresh,
    jacobian,
    normal,
    numerical_jacobian,
    parameters,
)

tfb = tfp.bijectors


# Those of the core with graphs of their own: loops, variables that decide, custom gradients, what rests on static shapes.
WITH_GRAPHS = {
    "autoregressive_conditional",
    "chain_recompute",
    "coupling_checkerboard_odd_sigmoid",
    "multiscale_vector_random",
    "online_free",
    "pnf_image_conditional",
    "residual_conditional",
    "scan_image_conditional",
    "spline_coupling_conditional",
    "vflow_image",
}


def entries(condition=lambda entry: True, core=CORE):
    """Parametrises a test over the entries for which a condition holds; README's command runs those of the core."""
    marks = {True: [pytest.mark.contract, pytest.mark.core], False: [pytest.mark.contract]}
    chosen = [e for e in ENTRIES.values() if condition(e)]
    return pytest.mark.parametrize("entry", [pytest.param(e, id=e.name, marks=marks[e.name in core]) for e in chosen])


every_entry = entries()
every_state = pytest.mark.parametrize(("entry", "state"), [parameters(e, e, s) for e in ENTRIES.values() for s in e.states])
core = entries(lambda entry: entry.core)  # for what the base or the class does, whatever its arguments
beyond_core = entries(core=())


def shapes(entry):
    """(event shape of the data, of the latent)."""
    return tuple(entry.data_shape), tuple(entry.latent_shape or entry.data_shape)


def log_det(direction, bijector, value, entry, **kwargs):
    """The log-det, summed over the event."""
    event_ndims = len(shapes(entry)[direction == "forward"])
    return getattr(bijector, f"{direction}_log_det_jacobian")(value, event_ndims=event_ndims, **kwargs)


def log_dets(bijector, y, x, entry, **kwargs):
    """(inverse log-det at y, forward log-det at x), summed over the event."""
    return log_det("inverse", bijector, y, entry, **kwargs), log_det("forward", bijector, x, entry, **kwargs)


def test_the_core_of_the_registry_holds_every_bijector():
    classes = {c for c in vars(dfb).values() if inspect.isclass(c) and issubclass(c, tfb.Bijector)}
    exported = {c for c in classes if c.__name__ in dfb.__all__} - {dfb.FlowBijector, dfb.Composite}
    assert exported - {type(built(entry.name, entry.states[0])) for entry in ENTRIES.values() if entry.core} == set()


# Mathematics.


class Pass:
    """All that a bijector computes of a value in one direction."""

    def __init__(self, bijector, direction, value, entry, **kwargs):
        self.value, self.function, self.kwargs = value, getattr(bijector, direction), kwargs
        self.result = self.function(value, **kwargs)
        self.log_det = log_det(direction, bijector, value, entry, **kwargs)
        self.per_dim = getattr(bijector, f"{direction}_log_det_per_dim")(value, **kwargs)
        self.jacobian = jacobian(self.function, value, **kwargs)


def assert_round_trip(there, back):
    assert_close(back.function(fresh(there.result), **back.kwargs), there.value)


def assert_log_det(one):
    """The Jacobian is that of the values, the log-det that of the Jacobian, and the contributions sum to it."""
    scale = np.abs(one.jacobian).max()
    numerical = numerical_jacobian(one.function, one.value, **one.kwargs)
    np.testing.assert_allclose(numerical, one.jacobian, rtol=1e-5, atol=1e-7 * scale)
    assert one.log_det.shape == one.value.shape[:1]
    assert_close(one.log_det, np.linalg.slogdet(one.jacobian)[1])
    assert one.per_dim.shape == one.value.shape
    assert_close(event_sum(one.per_dim, one.value.shape[1:]), one.log_det)


def assert_formula(entry, bijector, inverse):
    expected = entry.reference(bijector, inverse.value, inverse.kwargs.get("condition"))
    assert_close(inverse.per_dim, expected)
    assert_close(dimflows.inverse_log_det_per_dim(bijector, inverse.value, **inverse.kwargs), expected)


def assert_frame(entry, bijector, forward):
    """The forward contributions, in the frame of the latent."""
    if entry.forward_reference:
        expected = entry.forward_reference(bijector, forward.value, forward.kwargs.get("condition"))
    else:
        y = fresh(forward.result)
        expected = -entry.move(bijector.inverse_log_det_per_dim(y, **forward.kwargs).numpy())
    assert_close(forward.per_dim, expected)
    assert_close(dimflows.forward_log_det_per_dim(bijector, forward.value, **forward.kwargs), expected)


def assert_diagonal(entry, inverse, forward):
    """Contributions are the logarithms of one entry of the Jacobian each."""
    size = int(np.prod(entry.data_shape))
    latent, data = np.arange(size), entry.move(np.arange(size).reshape([1, *entry.data_shape])).ravel()
    expected = np.empty([len(inverse.jacobian), size])
    expected[:, data] = np.log(np.abs(inverse.jacobian[:, latent, data]))
    assert_close(inverse.per_dim.numpy().reshape(expected.shape), expected)
    expected = np.log(np.abs(forward.jacobian[:, data, latent]))
    assert_close(forward.per_dim.numpy().reshape(expected.shape), expected)


def assert_transport(entry, bijector):
    """Numbers move as the bijector moves dimensions."""
    in_data = normal([3, *entry.data_shape], 7)
    in_latent = entry.move(in_data.numpy())
    assert_close(dfb.walk.transport(bijector, in_data, "inverse"), in_latent, 0.0)
    assert_close(dfb.walk.transport(bijector, tf.constant(in_latent), "forward"), in_data, 0.0)


@every_state
def test_mathematics(entry, state):
    bijector, kwargs = built(entry.name, state), entry.kwargs()
    inverse = Pass(bijector, "inverse", entry.data(), entry, **kwargs)
    forward = Pass(bijector, "forward", entry.latent(), entry, **kwargs)
    assert_round_trip(inverse, forward)
    assert_round_trip(forward, inverse)
    assert_log_det(inverse)
    assert_log_det(forward)
    if entry.reference:
        assert_formula(entry, bijector, inverse)
    if entry.forward_reference or entry.in_place:
        assert_frame(entry, bijector, forward)
    if entry.triangular:
        assert_diagonal(entry, inverse, forward)
    assert_transport(entry, bijector)


@entries(lambda entry: entry.name.startswith("squeeze"))
def test_a_pure_movement_moves_values_as_it_moves_contributions(entry):
    bijector, y = built(entry.name, "initial"), entry.data()
    assert_close(bijector.inverse(y), entry.move(y.numpy()), 0.0)
    assert_close(bijector.forward(tf.constant(entry.move(y.numpy()))), y, 0.0)


# Variables.


@every_state
def test_every_trainable_variable_is_tracked_and_has_gradients(entry, state):
    bijector, created = build(entry, state)
    assert bool(created) != entry.fixed
    tracked = {id(v) for v in bijector.trainable_variables}
    assert {v.name for v in created if id(v) not in tracked} == set()
    assert len(tracked) == len(created)
    y, x, kwargs = entry.data([5]), entry.latent([5]), entry.kwargs([5])
    flow = distribution(bijector, shapes(entry)[1])
    with tf.GradientTape(persistent=True) as tape:
        log_prob = tf.reduce_sum(flow.log_prob(y, bijector_kwargs=kwargs))
        sample = tf.reduce_sum(normal(y.shape, 8) * bijector.forward(x, **kwargs))
    for loss in (log_prob, sample):
        for v, gradient in zip(created, tape.gradient(loss, created)):
            assert gradient is not None, v.name
            assert np.isfinite(gradient).all(), v.name
            assert np.abs(gradient).max() > 0 or any(v.name.startswith(name) for name in entry.silent), v.name


# Modes of execution, shapes and dtypes.


def both_directions(bijector, entry):
    """A function of y, x and the condition that returns everything the bijector computes."""

    def function(y, x, **kwargs):
        return [
            bijector.inverse(y, **kwargs),
            log_det("inverse", bijector, y, entry, **kwargs),
            bijector.inverse_log_det_per_dim(y, **kwargs),
            bijector.forward(x, **kwargs),
            log_det("forward", bijector, x, entry, **kwargs),
            bijector.forward_log_det_per_dim(x, **kwargs),
        ]

    return function


@entries(core=WITH_GRAPHS)
def test_traced_with_unknown_batch_size_equals_eager(entry):
    function, (data_shape, latent_shape) = both_directions(built(entry.name, entry.states[-1]), entry), shapes(entry)
    arguments = {"y": entry.data([3]), "x": entry.latent([3]), **entry.kwargs([3])}
    specs = {k: tf.TensorSpec([None, *v.shape[1:]], v.dtype) for k, v in arguments.items()}
    concrete = tf.function(function, autograph=False).get_concrete_function(**specs)
    expected_shapes = [latent_shape, (), data_shape, data_shape, (), latent_shape]
    assert [tuple(r.shape[1:]) for r in concrete.structured_outputs] == expected_shapes
    for actual, expected in zip(concrete(**arguments), function(**arguments)):
        assert_close(actual, expected)


@entries(lambda entry: entry.xla, core=WITH_GRAPHS)
def test_xla_equals_eager(entry):
    bijector = built(entry.name, entry.states[-1])
    arguments = {"y": entry.data([3]), "x": entry.latent([3]), **entry.kwargs([3])}

    def function(y, x, **kwargs):
        pairs = [bijector.inverse(y, **kwargs), bijector.forward(x, **kwargs)]
        return [*pairs, *log_dets(bijector, y, x, entry, **kwargs)]

    compiled = tf.function(function, autograph=False, jit_compile=True)
    for actual, expected in zip(compiled(**arguments), function(**arguments)):
        assert_close(actual, expected)


@entries(core=WITH_GRAPHS)
def test_batch_shapes_are_equivalent(entry):
    bijector, kwargs = built(entry.name, entry.states[-1]), entry.kwargs([2, 3])
    whole = both_directions(bijector, entry)(entry.data([2, 3]), entry.latent([2, 3]), **kwargs)
    for index in (1,), (1, 2):
        part = both_directions(bijector, entry)(
            entry.data([2, 3])[index], entry.latent([2, 3])[index], **{k: c[index] for k, c in kwargs.items()}
        )
        for of_part, of_whole in zip(part, whole):
            assert of_part.shape == of_whole[index].shape
            assert_close(of_part, of_whole[index])


@every_entry
def test_event_shapes_are_those_of_the_values(entry):
    bijector, (data_shape, latent_shape) = built(entry.name, entry.states[-1]), shapes(entry)
    assert bijector.inverse_event_shape(data_shape) == latent_shape
    assert bijector.forward_event_shape(latent_shape) == data_shape
    assert tuple(bijector.inverse_event_shape_tensor(list(data_shape)).numpy()) == latent_shape
    assert tuple(bijector.forward_event_shape_tensor(list(latent_shape)).numpy()) == data_shape


@every_entry
def test_a_distribution_samples_and_scores_events(entry):
    bijector, kwargs = built(entry.name, entry.states[-1]), entry.kwargs([5])
    flow = distribution(bijector, shapes(entry)[1])
    assert flow.event_shape == shapes(entry)[0] and flow.batch_shape == ()
    sample = flow.sample(5, seed=[1, 2], bijector_kwargs=kwargs)
    assert sample.shape == (5, *shapes(entry)[0])
    sample = fresh(sample)
    latent = bijector.inverse(sample, **kwargs).numpy().reshape(5, -1)
    ildj = log_det("inverse", bijector, sample, entry, **kwargs)
    expected = -0.5 * np.square(latent).sum(-1) - 0.5 * latent.shape[-1] * np.log(2 * np.pi) + ildj.numpy()
    assert_close(flow.log_prob(fresh(sample), bijector_kwargs=kwargs), expected)


@entries(core=WITH_GRAPHS)
def test_float32_agrees_with_float64(entry):
    single, double = (built(entry.name, "initial", dtype) for dtype in ("float32", "float64"))
    for direction, value in (("inverse", entry.data()), ("forward", entry.latent())):
        kwargs = entry.kwargs()
        cast = {k: tf.cast(c, "float32") for k, c in kwargs.items()}
        result = getattr(single, direction)(tf.cast(value, "float32"), **cast)
        hook = getattr(single, f"{direction}_log_det_per_dim")(tf.cast(value, "float32"), **cast)
        assert result.dtype == hook.dtype == tf.float32
        assert_close(result, getattr(double, direction)(value, **kwargs), 2e-4)
        assert_close(hook, getattr(double, f"{direction}_log_det_per_dim")(value, **kwargs), 2e-4)


@entries(lambda entry: entry.half, core=WITH_GRAPHS)
def test_log_dets_of_low_precision_values_are_float32(entry):
    bijector = built(entry.name, "initial", "float32")
    for dtype in ("float16", "bfloat16"):
        kwargs = {k: tf.cast(c, dtype) for k, c in entry.kwargs(dtype="float32").items()}
        exact = {k: tf.cast(c, "float32") for k, c in kwargs.items()}
        y, x = tf.cast(entry.data(), dtype), tf.cast(entry.latent(), dtype)
        assert bijector.inverse(y, **kwargs).dtype == bijector.forward(x, **kwargs).dtype == y.dtype
        expected = log_dets(bijector, tf.cast(y, "float32"), tf.cast(x, "float32"), entry, **exact)
        hooks = bijector.inverse_log_det_per_dim(y, **kwargs), bijector.forward_log_det_per_dim(x, **kwargs)
        for actual, hook, precise in zip(log_dets(bijector, y, x, entry, **kwargs), hooks, expected):
            assert actual.dtype == hook.dtype == tf.float32
            np.testing.assert_allclose(actual, precise, rtol=0.05, atol=0.3)


# Conditions and other keyword arguments.


@entries(lambda entry: entry.condition_shape)
def test_the_condition_changes_the_result_and_broadcasts(entry):
    bijector = built(entry.name, "large")
    for direction, value in (("inverse", entry.data([2, 3])), ("forward", entry.latent([2, 3]))):
        function = getattr(bijector, direction)
        one, other = entry.kwargs([1, 3])["condition"], entry.kwargs([1, 3], seed=9)["condition"]
        full = tf.tile(one, [2] + [1] * (one.shape.rank - 1))
        assert_close(function(value, condition=one), function(fresh(value), condition=full))
        assert np.abs(function(value, condition=one) - function(value, condition=other)).max() > 1e-3
        ldj = getattr(bijector, f"{direction}_log_det_jacobian")
        ndims = len(shapes(entry)[direction == "forward"])
        assert_close(ldj(value, ndims, condition=other), ldj(fresh(value), ndims, condition=fresh(other)))


METHODS = ("inverse", "inverse_log_det_jacobian", "inverse_log_det_per_dim")


@entries(lambda entry: not (entry.condition_shape or entry.open_to_conditions))
def test_a_condition_that_nothing_can_use_is_an_error(entry):
    bijector = built(entry.name, entry.states[-1])
    for method in METHODS:
        with pytest.raises(ValueError, match=f"{bijector.name}: got a condition, but no part"):
            getattr(bijector, method)(entry.data(), condition=tf.ones([2, 3]))


@core
def test_an_unknown_keyword_argument_is_an_error(entry):
    bijector = built(entry.name, entry.states[-1])
    for method in METHODS:
        with pytest.raises(TypeError, match=rf"{bijector.name}: got unexpected keyword arguments \['conditoin'\]"):
            getattr(bijector, method.replace("inverse", "forward"))(entry.latent(), conditoin=tf.ones([2, 3]))


# Composition with TFP.


@beyond_core
def test_nesting_equals_direct_use(entry):
    bijector, kwargs = built(entry.name, entry.states[-1]), entry.kwargs()
    y, x = entry.data(), entry.latent()
    routed = {bijector.name: kwargs} if kwargs else {}
    chained, inverted, ours = tfb.Chain([bijector]), tfb.Invert(bijector), dfb.Chain([bijector])
    direct = both_directions(bijector, entry)(y, x, **kwargs)
    data_shape, latent_shape = shapes(entry)
    nested = {
        "tfb.Chain": [
            chained.inverse(fresh(y), **routed),
            chained.inverse_log_det_jacobian(fresh(y), len(data_shape), **routed),
            dimflows.inverse_log_det_per_dim(chained, y, **routed),
            chained.forward(fresh(x), **routed),
            chained.forward_log_det_jacobian(fresh(x), len(latent_shape), **routed),
            dimflows.forward_log_det_per_dim(chained, x, **routed),
        ],
        "tfb.Invert": [
            inverted.forward(fresh(y), **kwargs),
            inverted.forward_log_det_jacobian(fresh(y), len(data_shape), **kwargs),
            dimflows.forward_log_det_per_dim(inverted, y, **kwargs),
            inverted.inverse(fresh(x), **kwargs),
            inverted.inverse_log_det_jacobian(fresh(x), len(latent_shape), **kwargs),
            dimflows.inverse_log_det_per_dim(inverted, x, **kwargs),
        ],
        "dfb.Chain": both_directions(ours, entry)(y, x, **kwargs),
    }
    for results in nested.values():
        for actual, expected in zip(results, direct, strict=True):
            assert_close(actual, expected)


@core
def test_a_copy_is_another_bijector_of_the_same_kind(entry):
    bijector, kwargs = build(entry, "initial")[0], entry.kwargs()
    y = entry.data()
    copy = bijector.copy(name="another")
    assert type(copy) is type(bijector) and copy.name == "another" and copy != bijector
    assert_close(copy.inverse(y, **kwargs), bijector.inverse(y, **kwargs))
    assert_close(copy.inverse_log_det_per_dim(y, **kwargs), bijector.inverse_log_det_per_dim(y, **kwargs))
