"""Keras 3 layers that serve as conditioners: `(x, condition) -> parameters`."""

from tfp_dimflows.networks.causal import WaveNet
from tfp_dimflows.networks.continuous import ConcatSquashNet
from tfp_dimflows.networks.flowpp import DataDependentConv2D, FlowPPContext, FlowPPNet, GatedConv2D, GatedSelfAttention
from tfp_dimflows.networks.glow import ActNormLayer, EdgeConv2D, GlowConvNet, ZeroConv2D
from tfp_dimflows.networks.lipschitz import LipSwish, SpectralConv2D, SpectralDense, lipschitz_conv, lipschitz_mlp
from tfp_dimflows.networks.masked import MADE, MaskedDense, PixelCNN
from tfp_dimflows.networks.mlp import MLP
from tfp_dimflows.networks.resnet import ResNet, WeightNormConv2D
from tfp_dimflows.networks.vae import conv_decoder, conv_encoder

__all__ = [
    "MADE",
    "MLP",
    "ActNormLayer",
    "ConcatSquashNet",
    "DataDependentConv2D",
    "EdgeConv2D",
    "FlowPPContext",
    "FlowPPNet",
    "GatedConv2D",
    "GatedSelfAttention",
    "GlowConvNet",
    "LipSwish",
    "MaskedDense",
    "PixelCNN",
    "ResNet",
    "SpectralConv2D",
    "SpectralDense",
    "WaveNet",
    "WeightNormConv2D",
    "ZeroConv2D",
    "conv_decoder",
    "conv_encoder",
    "lipschitz_conv",
    "lipschitz_mlp",
]
