"""Recipes: named models from plain values."""

from tfp_dimflows.recipes.autoregressive import iaf, maf, pixelcnn_flow, wavenet_flow
from tfp_dimflows.recipes.ffjord import ffjord
from tfp_dimflows.recipes.flow_vae import flow_vae
from tfp_dimflows.recipes.flowpp import flowpp
from tfp_dimflows.recipes.glow import glow
from tfp_dimflows.recipes.lcma import lcma_glow, lcma_iresnet, lcma_realnvp, lcma_residual_flow
from tfp_dimflows.recipes.nice import nice
from tfp_dimflows.recipes.nsf import nsf
from tfp_dimflows.recipes.pnf import pnf
from tfp_dimflows.recipes.principal_pnf import principal_pnf
from tfp_dimflows.recipes.realnvp import realnvp
from tfp_dimflows.recipes.registry import base_of, config_of, get, names, recipe
from tfp_dimflows.recipes.residual import iresnet, residual_flow
from tfp_dimflows.recipes.vae_flow import vae_flow
from tfp_dimflows.recipes.vflow import vflow, vflow_glow

__all__ = [
    "base_of",
    "config_of",
    "ffjord",
    "flow_vae",
    "flowpp",
    "get",
    "glow",
    "iaf",
    "iresnet",
    "lcma_glow",
    "lcma_iresnet",
    "lcma_realnvp",
    "lcma_residual_flow",
    "maf",
    "names",
    "nice",
    "nsf",
    "pixelcnn_flow",
    "pnf",
    "principal_pnf",
    "realnvp",
    "recipe",
    "residual_flow",
    "vae_flow",
    "vflow",
    "vflow_glow",
    "wavenet_flow",
]
