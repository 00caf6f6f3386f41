"""SavedModels: what they compute, loaded where this package cannot be imported."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import tfp_dimflows as dimflows

recipes = dimflows.recipes

LEVELS = 17
MODELS = {
    "realnvp": ([4, 4, 1], {"width": 4, "num_blocks": 1, "depth": 1}),
    "flow-vae": ([4, 4, 1], {"width": 4, "num_blocks": 1, "latent_dims": 3, "depth": 1}),
    "residual-flow": ([4, 4, 1], {"width": 4, "depth": 1}),
    "maf": ([3], {"depth": 2, "hidden": [8]}),
}

# Runs in a process of its own: argv holds the folder, its numbers go to standard output.
LOADER = """
import json, sys
sys.modules["tfp_dimflows"] = None  # importing it is an error
sys.modules["tensorflow_probability"] = None
import tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
x = loaded.sample(tf.constant(5), tf.constant([0, 4]))
results = {"sample": x, "log_prob": loaded.log_prob(x, tf.constant([0, 5])), "encode": loaded.encode(x)}
results["decode"] = loaded.decode(results["encode"])
by_signature = loaded.signatures["log_prob"](x=x, seed=tf.constant([0, 5]))
results["signature"] = list(by_signature.values())[0]
print(json.dumps({name: value.numpy().tolist() for name, value in results.items()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_computes_the_same_without_this_package(name, tmp_path):
    event_shape, arguments = MODELS[name]
    model = dimflows.FlowModel(recipes.get(name)(event_shape, grey_levels=LEVELS, **arguments), seed=0)
    x = np.random.default_rng(0).integers(0, LEVELS, [8, *event_shape]).astype(np.int32)
    model.adapt(x)
    model.compile("adam")
    model.fit(x, epochs=1, verbose=0)
    model.export(tmp_path / "exported")
    run = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path / "exported")], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    results = json.loads(run.stdout)
    samples = model.sample(5, seed=4)
    np.testing.assert_array_equal(results["sample"], samples)
    np.testing.assert_allclose(results["log_prob"], model.log_prob(samples, seed=5), rtol=1e-5)
    np.testing.assert_allclose(results["signature"], results["log_prob"], rtol=1e-6)
    np.testing.assert_allclose(results["encode"], model.encode(samples), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(results["decode"], model.decode(model.encode(samples)))


@pytest.mark.slow
def test_an_exported_conditional_model(tmp_path):
    flow = recipes.realnvp([3], width=8, condition_shape=[2])
    for v in flow.trainable_variables:
        v.assign_add(0.1 * tf.ones_like(v))
    model = dimflows.FlowModel(flow, seed=0)
    model.export(tmp_path / "exported")
    loaded = tf.saved_model.load(str(tmp_path / "exported"))
    condition = tf.constant([[0.0, 1.0], [2.0, -1.0]])
    x = loaded.sample(2, [0, 4], condition)
    assert x.shape == [2, 2, 3]
    np.testing.assert_allclose(x, model.sample(2, seed=4, condition=condition), rtol=1e-5)
    x = x[0]
    expected = model.log_prob({"x": x, "condition": condition})
    np.testing.assert_allclose(loaded.log_prob(x, [0, 0], condition), expected, rtol=1e-5)
    z = loaded.encode(x, condition)
    np.testing.assert_allclose(z, model.encode(x, condition=condition), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loaded.decode(z, condition), x, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_importance_samples_of_an_exported_bound(tmp_path):
    model = dimflows.FlowModel(recipes.vae_flow([4, 4, 1], posterior="planar", latent_dims=2, features=4, width=2), seed=0)
    model.export(tmp_path / "exported", num_samples=7)
    loaded = tf.saved_model.load(str(tmp_path / "exported"))
    x = tf.ones([2, 4, 4, 1])
    np.testing.assert_allclose(loaded.log_prob(x, [0, 3]), model.log_prob(x, num_samples=7, seed=3), rtol=1e-5)


@pytest.mark.slow
def test_an_exported_progressive_recipe(tmp_path):
    """It has no condition, but its details have: what the stages before make."""
    model = dimflows.FlowModel(recipes.pnf([4], num_halvings=1, num_levels=1, depth=1, width=4, num_blocks=1), seed=0)
    model.export(tmp_path / "exported")
    loaded, x = tf.saved_model.load(str(tmp_path / "exported")), tf.ones([2, 4])
    np.testing.assert_allclose(loaded.log_prob(x, [0, 0]), model.log_prob(x), rtol=1e-5)


def test_exporting_overwrites_nothing_and_checks_first(tmp_path):
    model = dimflows.FlowModel(recipes.realnvp([3], width=4), seed=0)
    with pytest.raises(ValueError, match="num_samples, but the density of .* is exact"):
        model.export(tmp_path / "exported", num_samples=3)
    assert not (tmp_path / "exported").exists()
    (tmp_path / "exported").mkdir()
    with pytest.raises(ValueError, match=r"FlowModel.export: .*exported exists already"):
        model.export(tmp_path / "exported")
