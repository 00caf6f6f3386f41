"""Recipes: named models from plain values."""

from tfp_dimflows.recipes.ffjord import ffjord
from tfp_dimflows.recipes.flow_vae import flow_vae
from tfp_dimflows.recipes.flowpp import flowpp
from tfp_dimflows.recipes.glow import glow
from tfp_dimflows.recipes.lcma import lcma_glow, lcma_iresnet, lcma_realnvp, lcma_residual_flow
from tfp_dimflows.recipes.pnf import pnf
from tfp_dimflows.recipes.realnvp import realnvp
from tfp_dimflows.recipes.registry import base_of, config_of, get, names, recipe
from tfp_dimflows.recipes.residual import iresnet, residual_flow
from tfp_dimflows.recipes.vflow import vflow, vflow_glow

__all__ = [
    "base_of",
    "config_of",
    "ffjord",
    "flow_vae",
    "flowpp",
    "get",
    "glow",
    "iresnet",
    "lcma_glow",
    "lcma_iresnet",
    "lcma_realnvp",
    "lcma_residual_flow",
    "names",
    "pnf",
    "realnvp",
    "recipe",
    "residual_flow",
    "vflow",
    "vflow_glow",
]
