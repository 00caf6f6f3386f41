"""What the benchmarks of memory share: a training step, and the memory of this process."""

import resource
from collections.abc import Callable, Sequence

import tensorflow as tf
import tensorflow_probability as tfp

import tfp_dimflows as dimflows


def training_step(distribution: tfp.distributions.Distribution, shape: Sequence[int]) -> Callable[[tf.Tensor], list[tf.Tensor]]:
    """A function of a batch, compiled and called once, that takes every gradient of the mean log-probability."""
    variables = [v.value for v in dimflows.FlowModel(distribution).trainable_variables]

    @tf.function(input_signature=[tf.TensorSpec([None, *shape])])
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(distribution.log_prob(x))
        return [tf.reduce_sum(g) for g in tape.gradient(loss, variables)]

    step(tf.zeros([1, *shape]))
    return step


def peak_mib() -> float:
    """The largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
