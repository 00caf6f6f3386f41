"""What the package imports from private modules of TensorFlow and TensorFlow Probability: one address for upgrades.

Nothing of Keras's private modules is imported. TFP keeps the classes of bijectors and distributions that may hold parts
which are no composite tensors under names with an underscore; here they are `TFPChain`, `TFPInvert` and so on.
"""

from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.eager import record
from tensorflow.python.framework import op_def_registry, ops
from tensorflow.python.ops import control_flow_util
from tensorflow.python.util import nest
from tensorflow_probability.python.bijectors import glow as tfp_glow
from tensorflow_probability.python.bijectors.blockwise import _Blockwise as TFPBlockwise
from tensorflow_probability.python.bijectors.chain import _Chain as TFPChain
from tensorflow_probability.python.bijectors.composition import Composition as TFPComposition
from tensorflow_probability.python.bijectors.invert import _Invert as TFPInvert
from tensorflow_probability.python.bijectors.joint_map import _JointMap as TFPJointMap
from tensorflow_probability.python.distributions.transformed_distribution import (
    _TransformedDistribution as TFPTransformedDistribution,
)
from tensorflow_probability.python.internal import (
    cache_util,
    dtype_util,
    nest_util,
    parameter_properties,
    prefer_static,
    samplers,
    tensor_util,
)

__all__ = [
    "TFPBlockwise",
    "TFPChain",
    "TFPComposition",
    "TFPInvert",
    "TFPJointMap",
    "TFPTransformedDistribution",
    "cache_util",
    "control_flow_util",
    "dtype_util",
    "gen_xla_ops",
    "nest",
    "nest_util",
    "op_def_registry",
    "ops",
    "parameter_properties",
    "prefer_static",
    "record",
    "samplers",
    "tensor_util",
    "tfp_glow",
]
