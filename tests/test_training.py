"""`FlowModel`: training, data-dependent initialisation, use, checks and saving under Keras 3."""

import math
import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras
from sklearn.datasets import load_sample_images

import tfp_dimflows as dimflows

dfb, dfd = dimflows.bijectors, dimflows.distributions
tfb, tfd = tfp.bijectors, tfp.distributions

FIRST = dfb.masks.Channel(event_ndims=1)
SECOND = FIRST.complement()


def standard_normal(size):
    return tfd.Sample(tfd.Normal(0.0, 1.0), [size])


def transformed(bijector, size=2):
    return tfd.TransformedDistribution(standard_normal(size), bijector)


def mlp(inputs=1, outputs=2, **options):
    return dimflows.networks.MLP(inputs, outputs, **({"hidden": (8,), "activation": "tanh", "seed": 0} | options))


def keras_networks():
    couplings = [dfb.AffineCoupling(mlp(), FIRST), dfb.ActNorm(2), dfb.AffineCoupling(mlp(), SECOND), dfb.ActNorm(2)]
    return transformed(dfb.Chain(couplings))


def unbuilt_keras_networks():
    def network():
        return keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)])

    return transformed(tfb.Chain([dfb.AffineCoupling(network(), FIRST), dfb.AffineCoupling(network(), SECOND)]))


def raw_variables():
    scale = tf.Variable([0.0, 0.0])
    bijectors = [tfb.Shift(tf.Variable([0.0, 0.0])), tfb.ScaleMatvecDiag(log_scale_diag=scale) if False else None]
    return transformed(tfb.Chain([b for b in bijectors if b is not None]))


def transformed_variables():
    scale = tfp.util.TransformedVariable(tf.eye(2), tfb.FillScaleTriL())
    return tfd.MultivariateNormalTriL(loc=tf.Variable([0.0, 0.0]), scale_tril=scale)


def tfp_autoregressive():
    network = tfb.AutoregressiveNetwork(params=2, event_shape=[2], hidden_units=[8], activation="tanh")
    return transformed(tfb.MaskedAutoregressiveFlow(network))


def tfp_realnvp():
    network = mlp(zero_init=False)

    def shift_and_log_scale(x, output_units, **_):
        return tf.split(network(x), 2, axis=-1)

    couplings = [tfb.RealNVP(num_masked=1, shift_and_log_scale_fn=shift_and_log_scale), tfb.Permute([1, 0])]
    couplings.append(tfb.RealNVP(num_masked=1, shift_and_log_scale_fn=tfb.real_nvp_default_template([8])))
    return transformed(tfb.Chain(couplings))
