"""Maps between pixel values and the real line."""

from typing import Any

import tensorflow as tf

from tfp_dimflows.bijectors import base
from tfp_dimflows.bijectors.log_dets import log_det_dtype
from tfp_dimflows.renamed import renamed


class LogitPreprocess(base.FlowBijector):
    """Elementwise logit of pixel values, between data y in [0, n) and latent x on the real line, n = `grey_levels`.

        inverse (data to latent):  x = logit(a + (1 - 2a) y / n)
        forward:                   y = n (sigmoid(x) - a) / (1 - 2a)
        inverse log-det of a dimension: softplus(x) + softplus(-x) + log(1 - 2a) - log(n)

    `forward` of a real number beyond the logits of [0, n) falls slightly outside [0, n).

    Args:
      grey_levels: number n of grey levels.
      alpha: the margin a that keeps the logit finite.
      name: the name of the operations.

    Raises:
      ValueError: unless `0 <= alpha < 0.5` and `grey_levels >= 2`.

    References: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017 (with the slope 1 - 2a of its code).

    #### Example

    >>> dfb.LogitPreprocess(grey_levels=256).inverse([128.0]).numpy()
    array([0.], dtype=float32)
    """

    @renamed(levels="grey_levels")
    def __init__(self, grey_levels: int = 256, alpha: float = 0.05, name: str = "logit_preprocess"):
        parameters = dict(locals())
        if grey_levels < 2 or not 0.0 <= alpha < 0.5:
            got = f"grey_levels={grey_levels}, alpha={alpha}"
            raise ValueError(f"LogitPreprocess: got {got}, needs grey_levels >= 2 and 0 <= alpha < 0.5")
        self._grey_levels = grey_levels
        self._alpha = alpha
        super().__init__(forward_min_event_ndims=0, parameters=parameters, name=name)

    def _inverse_and_log_det_per_dim(self, y: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        p = self._alpha + (1.0 - 2.0 * self._alpha) / self._grey_levels * y
        x = tf.math.log(p) - tf.math.log1p(-p)
        return x, self._log_det(x)

    def _forward_and_log_det_per_dim(self, x: tf.Tensor, condition: Any) -> tuple[tf.Tensor, tf.Tensor]:
        y = self._grey_levels * (tf.sigmoid(x) - self._alpha) / (1.0 - 2.0 * self._alpha)
        return y, -self._log_det(x)

    def _log_det(self, x: tf.Tensor) -> tf.Tensor:
        x = tf.cast(x, log_det_dtype(x.dtype))
        slope = tf.math.log(tf.constant((1.0 - 2.0 * self._alpha) / self._grey_levels, x.dtype))
        return tf.math.softplus(x) + tf.math.softplus(-x) + slope
