"""Normalizing flows for TensorFlow Probability whose dimensions are first-class."""

import sys
from typing import TYPE_CHECKING

from tfp_dimflows.version import __version__

# What has imported neither TensorFlow nor Keras may not need them either, such as the command line with a typo: names are
# then imported at their first use. Otherwise all are at once, since `keras.saving.load_model` must know the classes.
if TYPE_CHECKING or not {"tensorflow", "keras"}.isdisjoint(sys.modules):
    from tfp_dimflows import bijectors, data, distributions, networks, plot, recipes, training
    from tfp_dimflows.bijectors.lcma import likelihood_contributions
    from tfp_dimflows.bijectors.per_dimension import (
        forward_log_det_per_dim,
        inverse_log_det_per_dim,
        register_log_det_per_dim,
    )
    from tfp_dimflows.keras_bridge import adaptation
    from tfp_dimflows.training import FlowModel, explained, fit_progressively, load
else:
    import importlib

    _MODULES = {
        "FlowModel": "training",
        "adaptation": "keras_bridge",
        "explained": "training",
        "fit_progressively": "training",
        "forward_log_det_per_dim": "bijectors.per_dimension",
        "inverse_log_det_per_dim": "bijectors.per_dimension",
        "likelihood_contributions": "bijectors.lcma",
        "load": "training",
        "register_log_det_per_dim": "bijectors.per_dimension",
    }

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")
        return globals().setdefault(name, getattr(module, name) if name in _MODULES else module)

    def __dir__():
        return __all__


__all__ = [
    "FlowModel",
    "__version__",
    "adaptation",
    "bijectors",
    "data",
    "distributions",
    "explained",
    "fit_progressively",
    "forward_log_det_per_dim",
    "inverse_log_det_per_dim",
    "likelihood_contributions",
    "load",
    "networks",
    "plot",
    "recipes",
    "register_log_det_per_dim",
    "training",
]
