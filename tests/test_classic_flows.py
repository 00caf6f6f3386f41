"""Planar, radial, Sylvester and autoregressive flows: what the contract leaves out, variational inference, the recipes."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras
from registry import ENTRIES, Mixer, assert_close, build, fresh, jacobian, made, normal, slow, sylvester_parts

import tfp_dimflows as dimflows
from tfp_dimflows.recipes.vae_flow import POSTERIORS

dfb, dfd, recipes = dimflows.bijectors, dimflows.distributions, dimflows.recipes
tfb, tfd = tfp.bijectors, tfp.distributions

PARAMETRIC = {
    "planar": (dfb.Planar, {}),
    "radial": (dfb.Radial, {}),
    "orthogonal": (dfb.Sylvester, {"num_columns": 2}),
    "householder": (dfb.Sylvester, {"variant": "householder", "num_reflections": 3}),
    "triangular": (dfb.Sylvester, {"variant": "triangular"}),
}
every_family = pytest.mark.parametrize("name", PARAMETRIC)


def with_params(name, dims, params):
    family, options = PARAMETRIC[name]
    return family(dims, params, **options)


def random_params(name, dims, batch=(), scale=1.0, seed=0, dtype="float64"):
    family, options = PARAMETRIC[name]
    sizes = {key: value for key, value in options.items() if key != "reverse"}
    return tf.cast(scale, dtype) * normal([*batch, family.num_params(dims, **sizes)], seed, dtype)


# The formulas, as the papers write them.


def test_planar_is_the_formula_of_its_paper():
    params, z = random_params("planar", 3).numpy(), normal([5, 3], 1).numpy()
    w, u, b = params[:3], params[3:6], params[6]
    u_hat = u + (np.log1p(np.exp(w @ u)) - 1.0 - w @ u) * w / (w @ w)
    a = z @ w + b
    planar = with_params("planar", 3, params)
    assert_close(planar.forward(z), z + np.tanh(a)[:, np.newaxis] * u_hat)
    assert_close(planar.forward_log_det_jacobian(z, 1), np.log(np.abs(1.0 + (1.0 - np.tanh(a) ** 2) * (w @ u_hat))))


def test_planar_is_the_identity_where_w_u_is_the_logarithm_of_e_minus_1():
    w = np.array([0.5, -1.0, 2.0])
    u = np.log(np.e - 1.0) * w / (w @ w)
    z = normal([5, 3], 1)
    assert_close(with_params("planar", 3, [*w, *u, 0.3]).forward(z), z)


def test_radial_is_the_formula_of_its_paper():
    params, z = random_params("radial", 3).numpy(), normal([5, 3], 1).numpy()
    alpha = np.log1p(np.exp(params[3]))
    beta = np.log1p(np.exp(params[4])) - alpha
    offset = z - params[:3]
    r = np.linalg.norm(offset, axis=-1)
    h, slope = 1.0 / (alpha + r), -1.0 / (alpha + r) ** 2
    radial = with_params("radial", 3, params)
    assert_close(radial.forward(z), z + (beta * h)[:, np.newaxis] * offset)
    expected = 2.0 * np.log(1.0 + beta * h) + np.log(1.0 + beta * h + beta * slope * r)
    assert_close(radial.forward_log_det_jacobian(z, 1), expected)


@pytest.mark.parametrize("name", ["orthogonal", "householder", "triangular"])
def test_sylvester_is_the_formula_of_its_paper(name):
    bijector, z = with_params(name, 4, random_params(name, 4)), normal([5, 4], 1).numpy()
    q, r, r_tilde, bias = sylvester_parts(bijector)
    assert_close(q.T @ q, np.eye(q.shape[1]))
    w = z @ q @ r_tilde.T + bias
    assert_close(bijector.forward(z), z + np.tanh(w) @ r.T @ q.T)
    expected = np.log(np.abs(1.0 + (1.0 - np.tanh(w) ** 2) * np.diag(r) * np.diag(r_tilde))).sum(-1)
    assert_close(bijector.forward_log_det_jacobian(z, 1), expected)


def test_a_planar_flow_is_a_sylvester_flow_of_one_column():
    q, a, a_tilde, bias = np.array([0.6, 0.8]), 0.7, -0.4, 0.3
    sylvester = dfb.Sylvester(2, [a, a_tilde, bias, *q], num_columns=1)
    w, m = np.tanh(a_tilde) * q, np.tanh(a) * np.tanh(a_tilde)
    u_hat = np.tanh(a) * q  # but for 5e-7
    u = u_hat + (np.log(np.expm1(1.0 + m)) - m) * w / (w @ w)  # so that softplus(w u) - 1 = m
    planar = dfb.Planar(2, [*w, *u, bias])
    z = normal([5, 2], 1, "float32")
    assert_close(sylvester.forward(z), planar.forward(z), 1e-5)
    assert_close(sylvester.forward_log_det_jacobian(z, 1), planar.forward_log_det_jacobian(z, 1), 1e-5)


def test_columns_of_an_orthogonal_sylvester_flow_do_not_jump_with_their_parameters():
    params = random_params("orthogonal", 3).numpy()
    offset = 2 * 2 + 2 * 2
    values = []
    for sign in (-1.0, 1.0):
        params[offset] = sign * 1e-9  # the pivot of the first column
        values.append(with_params("orthogonal", 3, params).forward(normal([5, 3], 1)))
    assert_close(values[0], values[1], 1e-7)


# Parameters.


@every_family
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 3.0, 30.0])
def test_extreme_parameters_are_invertible(name, dtype, scale):
    params = random_params(name, 4, [200], scale, dtype=dtype)
    if name == "orthogonal":  # needs a matrix of full rank
        params = tf.concat([params[:, :-8], random_params(name, 4, [200], dtype=dtype)[:, -8:]], axis=-1)
    bijector = with_params(name, 4, params)
    x = normal([200, 4], 2, dtype)
    y = fresh(bijector.forward(x))
    again = fresh(bijector.inverse(y))
    fldj, ildj = bijector.forward_log_det_jacobian(again, 1), bijector.inverse_log_det_jacobian(y, 1)
    # The inverse may stretch the rounding of y; its forward image is y again.
    tolerance = {"float32": 1e-3 if scale > 10.0 else 2e-5, "float64": 1e-11}[dtype]
    assert np.abs(bijector.forward(fresh(again)) - y).max() <= tolerance * max(1.0, np.abs(y).max())
    np.testing.assert_allclose(ildj, -fldj, rtol=1e-3, atol={"float32": 2e-2, "float64": 1e-8}[dtype])
    hook = tf.reduce_sum(bijector.inverse_log_det_per_dim(fresh(y)), -1)
    np.testing.assert_allclose(hook, ildj, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("raw", [-200.0, 200.0])
def test_rounding_makes_nothing_singular(raw):
    x = tf.constant([[0.0, 0.0], [1.0, 1.0]])
    flows = [
        dfb.Planar(2, [1.0, 0.0, raw, 0.0, 0.0]),
        dfb.Radial(2, [0.0, 0.0, raw, 0.0]),
        dfb.Radial(2, [0.0, 0.0, 0.0, raw]),
        dfb.Sylvester(2, [raw, 0.0, 0.0, raw, -raw, -raw, 0.0, 0.0], "triangular"),
    ]
    for flow in flows:
        y = fresh(flow.forward(x))
        assert np.isfinite(y).all() and np.isfinite(flow.forward_log_det_jacobian(x, 1)).all()
        assert_close(flow.inverse(y), x, 1e-2)
    prelu = dfb.PReLU()
    prelu.variables[0].assign(raw)
    assert_close(prelu.inverse(fresh(prelu.forward(-x))), -x, 1e-5)


def test_gated_values_of_half_precision():
    gate = dfb.transformers.Gated(bias=0.0)(tf.constant([[1.0, -13.0], [2.0, -20.0], [1.0, -5.0]]))
    assert_close(gate.inverse(tf.ones([3], tf.float16)), [1.0, 2.0, 1.0], 1e-2)


@pytest.mark.parametrize("name", ["planar", "radial"])
@pytest.mark.parametrize("at", ["zero", "identity", "far"])
def test_gradients_are_finite_where_norms_or_slopes_vanish(name, at):
    params = tf.zeros_like(random_params(name, 2)).numpy()
    x = tf.zeros([2, 2], tf.float64)
    if name == "planar" and at != "zero":
        params[:4] = [1.0, 0.0, np.log(np.e - 1.0), 0.0]
    if at == "far":
        x += 60.0
    params = tf.Variable(params)
    bijector = with_params(name, 2, params)
    functions = [bijector.forward, bijector.inverse, lambda x: bijector.inverse_log_det_jacobian(x, 1)]
    for function in [*functions, bijector.forward_log_det_per_dim, bijector.inverse_log_det_per_dim]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            result = tf.reduce_sum(tf.constant([1.0, 2.0], tf.float64) * function(x))
        assert all(np.isfinite(g).all() for g in tape.gradient(result, [params, x], unconnected_gradients="zero"))


@every_family
def test_copies_and_slices_share_trained_parameters(name):
    family, options = PARAMETRIC[name]
    bijector = family(3, seed=0, **options)
    bijector.variables[0].assign(random_params(name, 3, dtype="float32"))
    x = normal([5, 4, 3], 1, "float32")
    assert_close(bijector.copy().forward(x), bijector.forward(x), 1e-6)
    batch = tfd.MultivariateNormalDiag(tf.zeros([4, 3]))
    distribution = tfd.TransformedDistribution(batch, bijector)
    assert_close(distribution[1].log_prob(x[:, 1]), distribution.log_prob(x)[:, 1], 1e-5)


def test_variables_behind_the_parameters_of_a_condition_are_tracked_and_never_stale():
    scale = tf.Variable(1.0)
    size = dfb.Planar.num_params(2)
    flow = dfb.ConditionalTransform(keras.layers.Dense(size), lambda params: dfb.Planar(2, scale * params), event_ndims=1)
    x, condition = tf.ones([1, 2]), tf.ones([1, 3])
    before = flow.forward(x, condition=condition)
    assert any(v is scale for v in flow.trainable_variables)
    scale.assign(2.0)
    assert_close(flow.forward(x, condition=condition), flow.forward(fresh(x), condition=condition))
    assert np.abs(flow.forward(x, condition=condition) - before).max() > 1e-3


@every_family
def test_parameters_with_batch_axes_are_as_many_flows(name):
    params, x = random_params(name, 3, [2, 5]), normal([7, 2, 5, 3], 1)
    bijector = with_params(name, 3, params)
    assert tuple(bijector.experimental_batch_shape()) == (2, 5)
    y, fldj = bijector.forward(x), bijector.forward_log_det_jacobian(x, 1)
    back, ildj = bijector.inverse(fresh(y)), bijector.inverse_log_det_jacobian(fresh(y), 1)
    assert_close(back, x)
    assert_close(ildj, -fldj)
    one = with_params(name, 3, params[1, 4])
    assert_close(one.forward(x[:, 1, 4]), y[:, 1, 4])
    assert_close(one.forward_log_det_jacobian(x[:, 1, 4], 1), fldj[:, 1, 4])
    base = tfd.MultivariateNormalDiag(tf.zeros([3], tf.float64))
    assert tfd.TransformedDistribution(base, bijector).sample(7, seed=[0, 0]).shape == (7, 2, 5, 3)


@every_family
def test_amortised_parameters_are_those_of_each_condition(name):
    size = random_params(name, 3).shape[-1]
    network = Mixer([2], [size], 4)
    bijector = dfb.ConditionalTransform(network, functools.partial(with_params, name, 3), event_ndims=1)
    condition, x = normal([5, 2], 1), normal([7, 5, 3], 2)
    y = bijector.forward(x, condition=condition[tf.newaxis])
    ildj = bijector.inverse_log_det_jacobian(fresh(y), 1, condition=condition[tf.newaxis])
    for k in range(5):
        one = with_params(name, 3, network(condition[k : k + 1])[0])
        assert_close(y[:, k], one.forward(x[:, k]))
        assert_close(ildj[:, k], one.inverse_log_det_jacobian(fresh(y[:, k]), 1))


@pytest.mark.parametrize("name", [*PARAMETRIC, "reversed"])
def test_static_shapes_are_kept(name):
    if name == "reversed":
        bijector = dfb.Sylvester(4, random_params("triangular", 4), "triangular", reverse=True)
    else:
        bijector = with_params(name, 4, random_params(name, 4))

    def function(x):
        values = [bijector.forward(x), bijector.inverse(x)]
        log_dets = [bijector.forward_log_det_jacobian(x, 1), bijector.inverse_log_det_jacobian(x, 1)]
        assert [v.shape.as_list() for v in (*values, *log_dets)] == [[7, None, 4]] * 2 + [[7, None]] * 2
        return values

    tf.function(function, autograph=False).get_concrete_function(tf.TensorSpec([7, None, 4], tf.float64))


@every_family
def test_seeds_and_kinds_of_parameters(name):
    family, options = PARAMETRIC[name]
    first, again, other = (family(3, seed=s, **options).variables[0].numpy() for s in (1, 1, 2))
    assert_close(first, again, 0.0)
    assert np.abs(first - other).max() > 0.0
    assert first.shape == random_params(name, 3).shape
    deferred = tfp.util.DeferredTensor(tf.Variable(first), lambda v: 2.0 * v)
    bijector = with_params(name, 3, deferred)
    assert len(bijector.trainable_variables) == 1
    x = normal([2, 3], 1, "float32")
    assert_close(bijector.forward(x), with_params(name, 3, 2.0 * first).forward(x), 1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dfb.Planar(2, tf.zeros([4])), r"planar: got params of shape \(4,\), 2 dimensions need a last axis of 5"),
        (lambda: dfb.Radial(2, seed=0).forward(tf.zeros([3])), r"radial: got events of shape \(3,\), needs 2 dimensions"),
        (lambda: dfb.Sylvester(3, variant="diagonal"), "Sylvester: got variant='diagonal', needs one of"),
        (lambda: dfb.Sylvester(3, num_columns=4), "Sylvester: got num_columns=4, needs 1 to 3 for 3 dimensions"),
        (
            lambda: dfb.Sylvester(3, variant="triangular", num_columns=2),
            "num_columns=2, variant triangular of 3 dimensions has 3",
        ),
        (lambda: dfb.Sylvester(3, variant="householder", num_reflections=0), "got num_reflections=0, needs at least 1"),
        (lambda: dfb.Sylvester(3, reverse=True), "got reverse with variant orthogonal, it is for triangular"),
        (lambda: dfb.Planar(2, 1.0), r"planar: got params of shape \(\), 2 dimensions need a last axis of 5"),
        (lambda: dfb.PReLU(initial_slope=0.0), "PReLU: got initial_slope=0.0, needs a positive number"),
        (lambda: dfb.PReLU([3]).forward(tf.zeros([2])), r"prelu: got values of shape \(2,\), has slopes of shape \(3,\)"),
        (lambda: dfb.Autoregressive(tf.identity, dfb.transformers.Affine(), 2), "Autoregressive: got event_ndims=2, needs 1"),
        (
            lambda: dfb.Autoregressive(tf.identity, dfb.transformers.Affine()).inverse(tf.zeros([3])),
            "autoregressive: the network returned parameters of shape .* needs 2 per entry: a last axis of 6",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_prelu_at_its_kink():
    prelu = dfb.PReLU(initial_slope=0.5)
    assert_close(prelu.forward([-2.0, 0.0, 2.0]), [-1.0, 0.0, 2.0], 1e-6)
    assert_close(prelu.inverse_log_det_per_dim([-1.0, 0.0, 2.0]), [np.log(2.0), 0.0, 0.0], 1e-6)


def test_the_gate_is_the_formula_of_its_paper():
    params, x = normal([5, 2], 0), normal([5], 1).numpy()
    gate = 1.0 / (1.0 + np.exp(-params.numpy()[:, 1] - 1.0))
    bijector = dfb.transformers.Gated()(params)
    assert_close(bijector.inverse(x), gate * x + (1.0 - gate) * params.numpy()[:, 0])
    assert_close(bijector.inverse_log_det_per_dim(x), np.log(gate))
    assert_close(bijector.forward(fresh(bijector.inverse(x))), x)
    closed = dfb.transformers.Gated()(tf.constant([[3.0, -1e4]])).inverse([1.0])
    assert_close(closed, [3.0], 1e-5)


# The sequential direction of autoregressive flows.


class Counted(keras.Layer):
    """A network that counts its evaluations, also those in a graph."""

    def __init__(self, network):
        super().__init__(dtype="float64")
        self.network, self.calls = network, tf.Variable(0)
        self.built = True

    def call(self, x):
        self.calls.assign_add(1)
        return self.network(x)


def counted(dims, depends):
    """An autoregressive flow in which a dimension depends on `depends` others before it, and its network."""
    kernel = np.triu(normal([dims, dims], 1), 1) * (np.arange(dims)[:, np.newaxis] >= np.arange(dims) - depends)
    network = Counted(lambda y: tf.repeat(tf.tanh(y @ kernel), 2, axis=-1))
    return dfb.Autoregressive(network, dfb.transformers.Affine("exp")), network


@pytest.mark.parametrize("traced", [False, True])
def test_evaluations_of_the_network(traced):
    x = normal([3, 8], 2)
    for depends, most in ((8, 8), (0, 2)):  # without dependence, one step to get there and one to see it
        flow, network = counted(8, depends)
        forward = tf.function(flow.forward, autograph=False) if traced else flow.forward
        assert_close(flow.inverse(fresh(forward(x))), x)
        assert network.calls.numpy() <= most + 2 + 1


def test_a_prefix_is_right_however_wild_the_rest_is():
    # Until its predecessors are right, the last dimension is exp(exp(...)) = infinite.
    def network(y):
        log_scale = -1e3 * tf.pad(tf.square(y[:, :-1] - 5.0), [[0, 0], [1, 0]])
        return tf.reshape(tf.stack([tf.zeros_like(y), log_scale], axis=-1), [-1, 6])

    flow = dfb.Autoregressive(network, dfb.transformers.Affine("exp"))
    assert_close(flow.forward(tf.constant([[5.0, 5.0, 5.0]])), [[5.0, 5.0, 5.0]])


@pytest.mark.parametrize("jit_compile", [False, slow(True)])
def test_gradients_of_the_sequential_direction(jit_compile):
    entry = ENTRIES["autoregressive_tanh"]
    bijector, variables = build(entry, "large")
    x, weights = normal([3, 4], 1), normal([3, 4], 2)

    @functools.partial(tf.function, autograph=False, jit_compile=jit_compile)
    def loss_and_gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = bijector.forward(x)
            loss = tf.reduce_sum(weights * y) + tf.reduce_sum(bijector.forward_log_det_jacobian(x, 1))
        return loss, tape.gradient(loss, [x, *variables])

    def loss(x):
        y = bijector.forward(x)
        return float(tf.reduce_sum(weights * y) - tf.reduce_sum(bijector.inverse_log_det_jacobian(fresh(y), 1)))

    value, (of_x, *gradients) = loss_and_gradients(x)
    assert_close(value, loss(x))
    step = 1e-6
    for k in range(4):
        offset = step * tf.one_hot([k] * 3, 4, dtype=tf.float64) * tf.constant([[1.0], [0.0], [0.0]], tf.float64)
        assert_close(of_x[0, k], (loss(x + offset) - loss(x - offset)) / (2.0 * step), 1e-6)
    for v, gradient in zip(variables, gradients):
        direction, start = normal(v.shape, 5), tf.identity(v)
        slopes = []
        for sign in (1.0, -1.0):
            v.assign(start + sign * step * direction)
            slopes.append(loss(fresh(x)))
        v.assign(start)
        assert_close(tf.reduce_sum(gradient * direction), (slopes[0] - slopes[1]) / (2.0 * step), 1e-5)


def test_a_jacobian_is_triangular_in_the_order_of_the_network():
    order = [2, 0, 3, 1]  # the places of the dimensions
    flow = dfb.Autoregressive(made(4, 2, 3, "float64", ordering=order), dfb.transformers.Affine("exp"))
    pattern = np.array([[order[i] >= order[j] for j in range(4)] for i in range(4)])
    for matrix in (jacobian(flow.inverse, normal([2, 4], 1)), jacobian(flow.forward, normal([2, 4], 1))):
        np.testing.assert_array_equal(np.abs(matrix) > 1e-12, np.broadcast_to(pattern, matrix.shape))


# Variational inference.


def surrogate(kind):
    if kind == "iaf":
        flow = recipes.iaf([2], depth=2, hidden=[16]).bijector
    else:
        family, options = PARAMETRIC[kind]
        flow = dfb.Chain([family(2, seed=k, **options) for k in range(4)])
    scale = tfp.util.TransformedVariable([1.0, 1.0], tfb.Softplus())
    return tfd.TransformedDistribution(tfd.MultivariateNormalDiag(tf.Variable([0.0, 0.0]), scale), flow)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*PARAMETRIC, "iaf"])
def test_surrogate_posteriors(kind):
    # Of this banana a diagonal Gaussian comes no closer than 0.77 nats: min over s of -ln s - 1/2 + s^2 / 2 + s^4 / 0.09.
    target = tfd.JointDistributionSequential([tfd.Normal(0.0, 1.0), lambda a: tfd.Normal(tf.square(a) - 1.0, 0.3)])
    posterior = surrogate(kind)
    losses = tfp.vi.fit_surrogate_posterior(
        lambda z: target.log_prob([z[..., 0], z[..., 1]]),
        posterior,
        tf_keras.optimizers.Adam(0.02),
        num_steps=400,
        sample_size=64,
        seed=[0, 1],
    )
    assert np.isfinite(losses).all()
    z, log_q = posterior.experimental_sample_and_log_prob(20_000, seed=[1, 1])
    assert 0.0 < tf.reduce_mean(log_q - target.log_prob([z[..., 0], z[..., 1]])) < 0.74
    assert_close(posterior.log_prob(fresh(z[:10])), log_q[:10], 1e-3)


# Recipes.

LEVELS = 17
SMALL = {
    "nice": ([5], {"width": 8}),
    "maf": ([5], {"hidden": [8], "depth": 2}),
    "iaf": ([3], {"hidden": [8], "depth": 2}),
    "nsf": ([5], {"hidden": [8], "depth": 2}),
    "pixelcnn-flow": ([2, 3, 2], {"width": 4, "num_blocks": 1}),
    "wavenet-flow": ([6], {"width": 4}),
}
ON_IMAGES = {name: ([3, 2, 1], SMALL[name][1]) for name in ("nice", "maf", "iaf", "nsf")}


def small(name, shapes=SMALL, **options):
    event_shape, arguments = shapes[name]
    return recipes.get(name)(event_shape, **(arguments | options))


def integers(event_shape, grey_levels=LEVELS, num=6):
    return np.random.default_rng(0).integers(0, grey_levels, size=[num, *event_shape]).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("name, shapes", [*((name, SMALL) for name in SMALL), *((name, ON_IMAGES) for name in ON_IMAGES)])
def test_recipes_train_sample_score_and_are_saved(name, shapes, tmp_path):
    event_shape = shapes[name][0]
    model = dimflows.FlowModel(small(name, shapes, grey_levels=LEVELS), seed=0)
    x = integers(event_shape)
    model.adapt(x)
    model.compile("adam")
    before = [v.numpy() for v in model.trainable_variables]
    history = model.fit(x, epochs=2, batch_size=3, verbose=0).history
    assert np.isfinite(history["nll"]).all()
    # Kernels of dimensions that nothing follows, and those behind zeros, move later or never.
    assert sum((v.numpy() != old).any() for v, old in zip(model.trainable_variables, before)) > len(before) / 2
    samples = model.sample(5, seed=1)
    assert samples.shape == (5, *event_shape) and samples.dtype == tf.int32
    model.save(tmp_path / "model.keras")
    loaded = dimflows.load(str(tmp_path / "model.keras"))
    assert_close(loaded.log_prob(x, seed=4), model.log_prob(x, seed=4), 1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_densities_are_those_of_the_jacobian(name):
    distribution = small(name)
    generator = np.random.default_rng(0)
    for v in distribution.trainable_variables:
        v.assign_add(0.3 * generator.normal(size=v.shape).astype("float32"))
    y = tf.constant(generator.normal(size=[3, *SMALL[name][0]]), tf.float32)
    flow = distribution.bijector
    z = flow.inverse(y)
    assert z.shape == (3, int(np.prod(SMALL[name][0])))
    expected = tf.reduce_sum(tfd.Normal(0.0, 1.0).log_prob(z), -1) + np.linalg.slogdet(jacobian(flow.inverse, y))[1]
    assert_close(distribution.log_prob(fresh(y)), expected, 1e-3)
    assert_close(flow.forward(fresh(z)), y, 1e-3)


@pytest.fixture
def in_float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nsf", {"hidden": None}),
        ("nsf", {"mixing": None, "num_bins": 3, "bound": 2.0}),
        ("nsf", {"autoregressive": True, "mixing": "rotation"}),
        ("maf", {"transformer": "spline"}),
        ("maf", {"transformer": "mixture", "depth": 1}),
        ("maf", {"transformer": "gated"}),
        ("iaf", {"transformer": "spline"}),
        ("iaf", {"transformer": "affine"}),
    ],
    ids=str,
)
def test_densities_of_transformers(in_float64, name, options):
    distribution = small(name, **options)
    generator = np.random.default_rng(0)
    for v in distribution.trainable_variables:
        v.assign_add(0.5 * generator.normal(size=v.shape))
    y = tf.constant(3.0 * generator.normal(size=[4, *SMALL[name][0]]))
    flow = distribution.bijector
    z = flow.inverse(y)
    log_det = np.linalg.slogdet(jacobian(flow.inverse, y))[1]
    assert np.abs(log_det).min() > 0.1
    assert_close(flow.inverse_log_det_jacobian(fresh(y), 1), log_det, 1e-7)
    assert_close(flow.inverse(fresh(flow.forward(fresh(z)))), z, 1e-6)


def test_a_neural_spline_flow_stays_within_bounds():
    flow = small("nsf", bounds=[None, [0.0, 1.0], [2.0, None], [None, 3.0], None])
    for v in flow.trainable_variables:
        v.assign_add(normal(v.shape, 3, "float32"))
    _, unit, high, low, _ = np.moveaxis(flow.sample(500, seed=0).numpy(), -1, 0)
    assert 0.0 <= unit.min() < 0.1 and 0.9 < unit.max() <= 1.0 and high.min() >= 2.0 and low.max() <= 3.0


def test_a_neural_spline_flow_standardises_its_condition():
    model = dimflows.FlowModel(small("nsf", condition_shape=[2]))
    x, condition = normal([64, 5], 0, "float32"), 1e4 + 50.0 * normal([64, 2], 1, "float32")
    model.adapt({"x": x, "condition": condition})
    means = [v.numpy() for v in model.bijector.variables if v.shape == [2] and "mean" in v.name]
    assert_close(means[0], np.mean(condition, axis=0), 1e-5)
    for v in model.trainable_variables:
        v.assign_add(0.3 * normal(v.shape, 3, "float32"))
    first, second = (model.log_prob(x, condition=some) for some in (condition, condition + 50.0))
    assert 1e-3 < np.abs(first - second).mean() < 1e3


def test_components_of_mixtures_differ_and_learn():
    distribution = small("maf", transformer="mixture")
    y = normal([64, 5], 0, "float32")
    with tf.GradientTape() as tape:
        loss = -tf.reduce_mean(distribution.log_prob(y))
    last = [v for v in distribution.trainable_variables if v.shape == [5 * 26]]
    (gradient,) = tape.gradient(loss, last[:1])
    logits = gradient.numpy().reshape(5, 26)[:, 2:10]
    assert np.ptp(logits[1:], axis=1).min() > 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_conditions_of_recipes(name):
    event_shape = SMALL[name][0]
    distribution = small(name, condition_shape=[2])
    generator = np.random.default_rng(0)
    for v in distribution.trainable_variables:
        v.assign_add(0.3 * generator.normal(size=v.shape).astype("float32"))
    x = generator.normal(size=[4, *event_shape]).astype("float32")
    model = dimflows.FlowModel(distribution, seed=0)
    first, second = (model.log_prob({"x": x, "condition": np.full([4, 2], c, "float32")}) for c in (0.0, 1.0))
    assert np.abs(first - second).min() > 1e-4


def test_nice_scales_only_at_both_ends():
    distribution = small("nice")
    scales = [v for v in distribution.trainable_variables if "log_scale" in v.name]
    assert len(scales) == 2
    for k, scale in enumerate(scales):
        scale.assign((0.1 + k) * np.arange(5.0))
    y = normal([3, 5], 1, "float32")
    assert_close(distribution.bijector.inverse_log_det_jacobian(y, 1), 12.0 * tf.ones([3]), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_autoencoders_with_flows_as_posteriors(posterior, tmp_path):
    arguments = {"posterior": posterior, "latent_dims": 3, "features": 8, "width": 4, "hidden": [8], "depth": 2}
    model = dimflows.FlowModel(recipes.vae_flow([4, 4, 1], **arguments), seed=0)
    x = integers([4, 4, 1], grey_levels=2, num=8)
    model.compile("adam")
    before = [v.numpy() for v in model.trainable_variables]
    history = model.fit(x, epochs=2, batch_size=4, verbose=0).history
    for key in ("kl", "reconstruction", "nll"):
        assert np.isfinite(history[key]).all()
    assert_close(history["nll"], np.subtract(history["kl"], history["reconstruction"]), 1e-5)
    moved = [(v.numpy() != old).any() for v, old in zip(model.trainable_variables, before)]
    assert sum(moved) >= len(moved) - (2 if posterior == "iaf" else 0)  # an IAF's kernels behind zeros move later
    samples = model.sample(50, seed=0).numpy()
    assert samples.shape == (50, 4, 4, 1) and set(np.unique(samples)) == {0.0, 1.0}
    assert model.decode(model.encode(x)).shape == x.shape
    model.save(tmp_path / "model.keras")
    loaded = dimflows.load(str(tmp_path / "model.keras"))
    assert_close(loaded.log_prob(x, num_samples=3, seed=4), model.log_prob(x, num_samples=3, seed=4), 1e-5)


@pytest.mark.parametrize("levels", [2, 5])
def test_the_likelihood_of_an_autoencoder_is_a_distribution_of_levels(levels):
    vae = recipes.vae_flow([4, 4, 1], posterior="gaussian", latent_dims=2, features=4, width=2, grey_levels=levels)
    likelihood = vae._decode(normal([1, 2], 0, "float32"))
    mass = sum(tf.exp(likelihood.distribution.log_prob(tf.fill([1, 4, 4, 1], float(k)))) for k in range(levels))
    assert_close(mass, np.ones([1, 4, 4, 1]), 1e-5)


@pytest.mark.parametrize(
    "name, event_shape, options, message",
    [
        ("nice", [1], {}, r"nice: got event shape \[1\], needs two dimensions or more"),
        ("maf", [3], {"depth": 0}, "maf: got depth=0, needs a positive integer"),
        ("nsf", [1], {}, r"nsf: got event shape \[1\], needs two dimensions or more, or autoregressive=True"),
        ("nsf", [3], {"bounds": [None, [0, 1]]}, "Standardize: got bounds=.*, needs None or a pair of numbers for each of 3"),
        ("nsf", [3], {"bounds": [None] * 3, "grey_levels": 4}, "nsf: got bounds=.*, needs continuous vectors"),
        ("nsf", [1], {"mixing": "qr", "autoregressive": True}, "nsf: got mixing='qr', needs lu, rotation or None"),
        ("nsf", [3], {"mixing": "qr"}, "nsf: got mixing='qr', needs lu, rotation or None"),
        ("nsf", [3], {"bound": 0.0}, "nsf: got bound=0.0, needs a positive number"),
        ("nsf", [3], {"num_bins": 0}, "nsf: got num_bins=0, needs a positive integer"),
        ("maf", [3], {"transformer": "cubic"}, "maf: got transformer='cubic', needs one of affine, gated, spline, mixture"),
        ("maf", [3], {"hidden": [0]}, r"maf: got hidden\[0\]=0, needs a positive integer"),
        ("wavenet-flow", [3], {"depth": 0}, "wavenet-flow: got depth=0, needs a positive integer"),
        ("vae-flow", [4, 4, 1], {"hidden": [8, 2.5]}, r"vae-flow: got hidden\[1\]=2.5, needs a positive integer"),
        ("maf", [3], {"condition_shape": [2, 2]}, r"maf: got condition_shape=\[2, 2\], needs a vector"),
        ("pixelcnn-flow", [3], {}, r"pixelcnn-flow: got event shape \[3\], needs an image"),
        ("wavenet-flow", [4, 4, 1], {}, r"wavenet-flow: got event shape \[4, 4, 1\], needs a vector"),
        ("vae-flow", [4, 4, 1], {"posterior": "cubic"}, "vae-flow: got posterior='cubic', needs one of"),
        ("vae-flow", [4, 4, 1], {"grey_levels": None}, "vae-flow: got grey_levels=None, needs the number of grey levels"),
        ("vae-flow", [5, 4, 1], {}, "conv_encoder: got event shape"),
    ],
)
def test_errors_of_recipes(name, event_shape, options, message):
    with pytest.raises(ValueError, match=message):
        recipes.get(name)(event_shape, **options)


@pytest.mark.parametrize("family", [dfb.Planar, dfb.Radial, dfb.Sylvester], ids=lambda family: family.__name__)
def test_a_flow_of_vectors_is_summed_over_further_event_axes(family):
    flow = dfb.Chain([family(3, normal([family.num_params(3)], 4)), dfb.Squeeze()])
    y = normal([5, 2, 2, 3], 1)
    for direction, value in (("inverse", y), ("forward", fresh(flow.inverse(y)))):
        per_dim = getattr(flow, f"{direction}_log_det_per_dim")(value)
        log_det = getattr(flow, f"{direction}_log_det_jacobian")(value, 3)
        assert_close(log_det, tf.reduce_sum(per_dim, axis=[1, 2, 3]))
        assert np.abs(log_det).min() > 1e-3
