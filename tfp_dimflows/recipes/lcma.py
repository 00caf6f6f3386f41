"""LCMA on the multi-scale recipes."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.glow import glow, glow_grids
from tfp_dimflows.recipes.realnvp import realnvp, realnvp_grids
from tfp_dimflows.recipes.registry import recipe
from tfp_dimflows.recipes.residual import IRESNET, RESIDUAL_FLOW, iresnet, iresnet_grids, residual_flow

# Arguments of the base that are not LCMA's: its factorization of images is one for convolutions.
_NOT_TAKEN = ("event_shape", "factorization", "network")

_DOC = """{family} whose factor-outs follow the likelihood contributions of the dimensions (LCMA).

    Without `contributions` this is the model of the first phase, from which nothing leaves. Train it for a while, take
    `dimflows.likelihood_contributions` of its bijector, and build the model to train with them. With `contributions="online"`
    there is one phase: the factorization starts as a checkerboard (of a vector, the first half), and
    `dimflows.training.DecideFactorization` decides it in the course of `fit`.

    Args:
      event_shape: the event's shape.
      contributions: one array of the event's shape for each of the `num_levels - 1` factor-outs; `"online"`; or None.
      keep: `"high"` (LCMA), `"low"` (reversed), or a list with one of them per factor-out: which half stays.
      granularity: `"channel"`, `"block"`, `"squeezed"` or `"free"`, as in `dfb.DimensionFactorization.from_contributions`.
      **arguments: those of `recipes.{base}`, but for `factorization` and `network`.

    Returns:
      As `recipes.{base}`.

    Raises:
      ValueError: as `dfb.DimensionFactorization.from_contributions` and `recipes.{base}`.

    References: Das, Abbeel, Spanos, "Likelihood Contribution based Multi-scale Architecture for Generative Flows", 2020.
    """


def _lcma(
    base: Callable[..., tfd.Distribution], family: str, grids: Callable, configs: dict | None = None
) -> Callable[..., tfd.Distribution]:
    base_name = base.__name__.replace("_", "-")
    name = f"lcma-{base_name}"

    def build(
        event_shape: Sequence[int],
        *,
        contributions: Sequence[ArrayLike] | str | None = None,
        keep: str | Sequence[str] = "high",
        granularity: str | None = None,
        **arguments: Any,
    ) -> tfd.Distribution:
        shape = common.checked_event_shape(event_shape, name)
        num_levels = arguments["num_levels"]
        if num_levels is None:
            of_config = configs and common.resolve_config(name, configs, arguments["config"], arguments)
            num_levels = of_config["num_levels"] if of_config else common.default_levels(shape)
        common.check_sizes(name, num_levels=num_levels)
        if num_levels < 2:
            raise ValueError(f"{name}: got num_levels={num_levels}, needs at least 2: one level has no factor-out")
        # All is checked in the first phase too, so that bad options fail before it has been trained.
        grids(name, shape, num_levels, nothing_leaves=False)
        known = None if isinstance(contributions, str) else contributions
        statistics = list(np.zeros([num_levels - 1, *shape])) if known is None else known
        factorization: common.Factorization | None
        factorization = dfb.DimensionFactorization.from_contributions(statistics, keep, granularity)
        if contributions is None:
            factorization = None
        elif known is None:
            if contributions != "online":
                raise ValueError(f'{name}: got contributions={contributions!r}, needs arrays, "online" or None')
            factorization = dfb.OnlineFactorization(factorization, keep, granularity)
        return base(shape, factorization=factorization, **arguments)

    own = [p for p in inspect.signature(build).parameters.values() if p.kind != p.VAR_KEYWORD]
    others = [p for name, p in inspect.signature(base).parameters.items() if name not in _NOT_TAKEN]
    build.__name__ = build.__qualname__ = name.replace("-", "_")
    build.__signature__ = inspect.Signature(own + others, return_annotation=tfd.Distribution)  # type: ignore[attr-defined]
    build.__doc__ = _DOC.format(family=family, base=base.__name__)
    build.lcma_base = base_name  # type: ignore[attr-defined]
    return recipe(build)


lcma_realnvp = _lcma(realnvp, "RealNVP", realnvp_grids)
lcma_glow = _lcma(glow, "Glow", glow_grids)
lcma_iresnet = _lcma(iresnet, "i-ResNet", iresnet_grids, IRESNET)
lcma_residual_flow = _lcma(residual_flow, "Residual Flow", common.grid_shapes, RESIDUAL_FLOW)
