"""`MixtureLogisticCDF`: Flow++'s elementwise map through the distribution function of a mixture of logistics."""

import math
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow.types.experimental import TensorLike

from tfp_dimflows.bijectors import base, implicit
from tfp_dimflows.upstream import tensor_util

_SMOOTH = 0.05


class MixtureLogisticCDF(base.FlowBijector):
    r"""Elementwise map; its inverse is an affine map of the logit of a mixture of logistics' distribution function.

        inverse (data to latent):  z = exp(s) logit(F(x)) + t,   F(x) = sum_k pi_k sigmoid((x - mu_k) exp(-ls_k))
        inverse log-det of a dimension:  s + log f(x) - log F(x) - log(1 - F(x)),   f = F'
        forward:                   x = F^-1(sigmoid((z - t) exp(-s)))

    F and 1 - F are both computed in logarithms, and f over the smaller of them as one sum, so that neither tail loses digits.
    `forward` finds x by bisection, in a fixed number of steps down to float precision, between the smallest and the largest of
    the components' own solutions; its derivatives, with respect to z and to all parameters, are those of the implicit function
    (first derivatives only).
    Cost: O(K) per dimension for `inverse`, some dozens of times that for `forward`.

    Args:
      logits: unnormalised log-weights of the components, `event + [K]`.
      means: mu, `event + [K]`.
      log_scales: ls, `event + [K]`.
      shift: t, broadcasts to the event.
      log_scale: s, broadcasts to the event.
      smooth: whether the logit is that of 0.9 F + 0.05 (VFlow's code). Its slope is then bounded, but the map from data to
        latent is not onto: the image is exp(s) (-2.944, 2.944) + t, so the density that it gives with a normal base integrates
        to less than 1 (a valid lower bound), and `forward` takes values beyond the image as its ends, of derivative 0.
      name: the name of the operations.

    References: Ho, Chen, Srinivas, Duan, Abbeel, "Flow++", 2019; Chen, Lu, Chenli, Zhu, Tian, "VFlow", 2020 (`smooth`).

    #### Example

    >>> bijector = dfb.MixtureLogisticCDF(logits=[0.0, 0.0], means=[-2.0, 2.0], log_scales=[0.0, 0.0])
    >>> bijector.inverse([-2.0, 0.0, 2.0]).numpy().round(3)
    array([-1.051,  0.   ,  1.051], dtype=float32)
    >>> bijector.forward(bijector.inverse([3.0])).numpy().round(3)
    array([3.], dtype=float32)
    """

    def __init__(
        self,
        logits: TensorLike,
        means: TensorLike,
        log_scales: TensorLike,
        shift: TensorLike = 0.0,
        log_scale: TensorLike = 0.0,
        smooth: bool = False,
        name: str = "mixture_logistic_cdf",
    ):
        parameters = dict(locals())
        self._logits = tensor_util.convert_nonref_to_tensor(logits)
        self._means, self._log_scales, self._shift, self._log_scale = (
            tensor_util.convert_nonref_to_tensor(p, self._logits.dtype) for p in (means, log_scales, shift, log_scale)
        )
        self._smooth = smooth
        super().__init__(forward_min_event_ndims=0, parameters=parameters, name=name)

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        x = tf.cast(y, self._logits.dtype)
        logit, log_slope = self._logit_and_log_slope(x)
        z = tf.exp(self._log_scale) * logit + self._shift
        return tf.cast(z, y.dtype), log_slope + self._log_scale

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        logit = self._within_image((tf.cast(x, self._logits.dtype) - self._shift) * tf.exp(-self._log_scale))
        y = implicit.increasing_root(self._logit_and_log_slope, logit, *self._bracket(logit))
        _, log_slope = self._logit_and_log_slope(y)
        return tf.cast(y, x.dtype), -(log_slope + self._log_scale)

    def _logit_and_log_slope(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """logit(F(x)) and log of its derivative (or those of 0.9 F + 0.05)."""
        log_cdf, log_survival, log_hazard = self._logs(x)
        if not self._smooth:
            return log_cdf - log_survival, log_hazard - tf.maximum(log_cdf, log_survival)
        margin, share = tf.constant(math.log(_SMOOTH), x.dtype), math.log1p(-2.0 * _SMOOTH)
        low, high = (tfp.math.log_add_exp(share + log, margin) for log in (log_cdf, log_survival))
        log_density = log_hazard + tf.minimum(log_cdf, log_survival)
        return low - high, log_density + share - low - high

    def _logs(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Logarithms of F, 1 - F and f / min(F, 1 - F)."""
        u = (x[..., tf.newaxis] - self._means) * tf.exp(-self._log_scales)
        log_weights = tf.nn.log_softmax(self._logits)
        below, above = tf.math.log_sigmoid(u), tf.math.log_sigmoid(-u)
        log_cdf, log_survival = (tf.reduce_logsumexp(log_weights + log, axis=-1) for log in (below, above))
        # Far out log f and log min(F, 1 - F) are large and nearly equal; their difference is a mean over the components.
        is_below = (log_cdf < log_survival)[..., tf.newaxis]
        log_shares = tf.nn.log_softmax(log_weights + tf.where(is_below, below, above))
        log_hazard = tf.reduce_logsumexp(log_shares + tf.where(is_below, above, below) - self._log_scales, axis=-1)
        return log_cdf, log_survival, log_hazard

    def _within_image(self, logit: tf.Tensor) -> tf.Tensor:
        """The logit, or the end of the image that it is beyond: F of 0 or 1 but for rounding."""
        if not self._smooth:
            return logit
        p = _SMOOTH + (1.0 - 2.0 * _SMOOTH) * np.finfo(logit.dtype.as_numpy_dtype).eps
        end = math.log1p(-p) - math.log(p)
        return tf.clip_by_value(logit, -end, end)

    def _bracket(self, logit: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The smallest and the largest of the components' own solutions."""
        if self._smooth:
            tiny = np.finfo(logit.dtype.as_numpy_dtype).eps
            p = tf.clip_by_value((tf.sigmoid(logit) - _SMOOTH) / (1.0 - 2.0 * _SMOOTH), tiny, 1.0 - tiny)
            logit = tf.math.log(p) - tf.math.log1p(-p)
        ends = self._means + tf.exp(self._log_scales) * logit[..., tf.newaxis]
        return tf.reduce_min(ends, axis=-1), tf.reduce_max(ends, axis=-1)
