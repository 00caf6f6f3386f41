"""Bijectors: the mathematics. Networks come in as callables."""

from tfp_dimflows.bijectors import continuous, masks, residual, transformers, walk
from tfp_dimflows.bijectors.actnorm import ActNorm, Standardize
from tfp_dimflows.bijectors.autoregressive import Autoregressive
from tfp_dimflows.bijectors.base import Composite, FlowBijector
from tfp_dimflows.bijectors.chain import Chain
from tfp_dimflows.bijectors.continuous import ffjord
from tfp_dimflows.bijectors.coupling import (
    AdditiveCoupling,
    AffineCoupling,
    Blockwise,
    ConditionalTransform,
    Coupling,
    MixtureLogisticCoupling,
    SplineCoupling,
)
from tfp_dimflows.bijectors.embedding import EmbedCondition
from tfp_dimflows.bijectors.factorization import DimensionFactorization, OnlineFactorization
from tfp_dimflows.bijectors.haar import HaarSplit
from tfp_dimflows.bijectors.invertible_conv import InvertibleConv1x1
from tfp_dimflows.bijectors.lcma import LCMA
from tfp_dimflows.bijectors.mixture_logistic import MixtureLogisticCDF
from tfp_dimflows.bijectors.multiscale import Multiscale
from tfp_dimflows.bijectors.orthogonal_split import OrthogonalSplit
from tfp_dimflows.bijectors.planar import Planar
from tfp_dimflows.bijectors.pnf import PNF
from tfp_dimflows.bijectors.prelu import PReLU
from tfp_dimflows.bijectors.preprocess import LogitPreprocess
from tfp_dimflows.bijectors.principal import PrincipalMultiscale
from tfp_dimflows.bijectors.radial import Radial
from tfp_dimflows.bijectors.reorder import Squeeze
from tfp_dimflows.bijectors.residual import InvertibleResidual
from tfp_dimflows.bijectors.rotation import Rotation
from tfp_dimflows.bijectors.scan import Scan
from tfp_dimflows.bijectors.sylvester import Sylvester
from tfp_dimflows.bijectors.transformers import ElementwiseAffine, Transformer
from tfp_dimflows.bijectors.vflow import VFlow

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Autoregressive",
    "Blockwise",
    "Chain",
    "Composite",
    "ConditionalTransform",
    "Coupling",
    "DimensionFactorization",
    "ElementwiseAffine",
    "EmbedCondition",
    "FlowBijector",
    "HaarSplit",
    "InvertibleConv1x1",
    "InvertibleResidual",
    "LCMA",
    "LogitPreprocess",
    "MixtureLogisticCDF",
    "MixtureLogisticCoupling",
    "Multiscale",
    "OnlineFactorization",
    "OrthogonalSplit",
    "PNF",
    "PReLU",
    "Planar",
    "PrincipalMultiscale",
    "Radial",
    "Rotation",
    "Scan",
    "SplineCoupling",
    "Squeeze",
    "Standardize",
    "Sylvester",
    "Transformer",
    "VFlow",
    "continuous",
    "ffjord",
    "masks",
    "residual",
    "transformers",
    "walk",
]
