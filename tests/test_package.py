"""The package as a whole: its version, what it takes from private modules of other libraries."""

import ast
import importlib.metadata
import pathlib

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


def test_the_version_is_that_of_the_distribution():
    assert dimflows.__version__ == importlib.metadata.version("tfp-dimflows")
