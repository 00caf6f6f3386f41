"""The package as a whole: its version, what it takes from private modules of other libraries."""

import ast
import importlib.metadata
import os
import pathlib
import subprocess
import sys

import pytest

import tfp_dimflows as dimflows

ROOT = pathlib.Path(dimflows.__file__).parent

FROM_TENSORFLOW = {
    "tensorflow.compiler.tf2xla.ops": {"gen_xla_ops"},
    "tensorflow.python.eager": {"record"},
    "tensorflow.python.framework": {"op_def_registry", "ops"},
    "tensorflow.python.ops": {"control_flow_util"},
    "tensorflow.python.util": {"nest"},
}
FROM_TFP = {
    "tensorflow_probability.python.bijectors": {"glow"},
    "tensorflow_probability.python.bijectors.blockwise": {"_Blockwise"},
    "tensorflow_probability.python.bijectors.chain": {"_Chain"},
    "tensorflow_probability.python.bijectors.composition": {"Composition"},
    "tensorflow_probability.python.bijectors.invert": {"_Invert"},
    "tensorflow_probability.python.bijectors.joint_map": {"_JointMap"},
    "tensorflow_probability.python.distributions.transformed_distribution": {"_TransformedDistribution"},
    "tensorflow_probability.python.internal": {
        "cache_util",
        "dtype_util",
        "nest_util",
        "parameter_properties",
        "prefer_static",
        "samplers",
        "tensor_util",
    },
}


def private_imports(path):
    """`{module: names}` that a file imports from private modules of TensorFlow, TFP, Keras and tf_keras."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = {alias.name for alias in node.names}
        for module in {node.module or ""} if isinstance(node, ast.ImportFrom) else names:
            library, *parts = module.split(".")
            private = any(part in ("compiler", "python", "src", "internal", "tsl") or part.startswith("_") for part in parts)
            if library in ("tensorflow", "tensorflow_probability", "keras", "tf_keras") and private:
                found.setdefault(module, set()).update(names)
    return found


def test_private_modules_are_imported_in_one_file_only():
    assert private_imports(ROOT / "upstream.py") == FROM_TENSORFLOW | FROM_TFP
    others = [path for path in [*ROOT.rglob("*.py"), *pathlib.Path(__file__).parent.glob("*.py")] if path.name != "upstream.py"]
    assert len(others) > 60
    assert {str(path): private_imports(path) for path in others if private_imports(path)} == {}


# What these files take from TFP's objects has a name that something of this package has as well.
OF_TFP = {("per_dimension.py", "_bijector"), ("per_dimension.py", "_bijectors"), ("walk.py", "_is_injective")}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(path):
    """(names with an underscore that a file defines, those that it takes from other objects than `self` or from modules)."""
    defined, taken = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            elif not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "super")):
                taken.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tfp_dimflows"):
            taken.update(alias.name for alias in node.names)
    return {name for name in defined if is_private(name)}, {name for name in taken if is_private(name)}


def test_no_module_uses_private_names_of_another():
    names = {path: private_names(path) for path in ROOT.rglob("*.py")}
    everywhere = set().union(*(defined for defined, _ in names.values()))
    assert len(everywhere) > 300
    used = {
        (path.name, name)
        for path, (defined, taken) in names.items()
        for name in (taken & everywhere) - defined
        if (path.name, name) not in OF_TFP
    }
    assert used == set()


def test_the_version_is_that_of_the_distribution():
    assert dimflows.__version__ == importlib.metadata.version("tfp-dimflows")


# Names are imported at their first use, unless TensorFlow or Keras is there already.

LAZY = """
import sys
import tfp_dimflows as dimflows

def is_loaded(*libraries):
    return not sys.modules.keys().isdisjoint(libraries)

assert dir(dimflows) == dimflows.__all__ and dimflows.__version__
assert not hasattr(dimflows, "no_such_name") and not hasattr(dimflows, "keras_bridge")
assert not is_loaded("tensorflow", "keras", "numpy")
"""

FIRST_USES = """
import importlib, pickle
import tfp_dimflows.bijectors
assert dimflows.bijectors is tfp_dimflows.bijectors and is_loaded("tensorflow")
from tfp_dimflows import *
assert {name: globals()[name] for name in dimflows.__all__} == {name: getattr(dimflows, name) for name in dimflows.__all__}
assert training is importlib.import_module("tfp_dimflows.training") and FlowModel is training.FlowModel
assert load is training.load and likelihood_contributions is bijectors.lcma.likelihood_contributions
assert adaptation is importlib.import_module("tfp_dimflows.keras_bridge").adaptation
assert register_log_det_per_dim is bijectors.per_dimension.register_log_det_per_dim
assert "FlowModel" in vars(dimflows)
assert pickle.loads(pickle.dumps(FlowModel)) is FlowModel
"""

BESIDE_KERAS = """
import keras
import tfp_dimflows
assert keras.saving.get_registered_object("tfp_dimflows>FlowModel") is tfp_dimflows.FlowModel
assert "recipes" in vars(tfp_dimflows) and tfp_dimflows.likelihood_contributions
"""


def failure_of(code):
    """What a process that runs this code says if it fails, else None."""
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return (process.returncode, process.stderr) if process.returncode else None


def test_the_package_is_imported_without_tensorflow():
    assert failure_of(LAZY) is None


@pytest.mark.slow
@pytest.mark.parametrize("code", [LAZY + FIRST_USES, BESIDE_KERAS], ids=["first_uses", "beside_keras"])
def test_names_of_the_package(code):
    assert failure_of(code) is None
