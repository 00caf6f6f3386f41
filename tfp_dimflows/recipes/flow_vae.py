"""Flow-VAE: a flow whose latent values have a learned low-dimensional prior."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import distributions as dfd
from tfp_dimflows import networks
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.glow import glow
from tfp_dimflows.recipes.realnvp import realnvp
from tfp_dimflows.recipes.registry import recipe


@recipe
def flow_vae(
    event_shape: Sequence[int],
    *,
    latent_dims: int | None = None,
    likelihood: str = "per_dimension",
    vae_width: int = 32,
    flow: str | None = "realnvp",
    num_levels: int = 2,
    depth: int = 3,
    width: int = 32,
    num_blocks: int = 2,
    factorization: common.Factorization | None = "conventional",
    alpha: float = 0.05,
    grey_levels: int | None = None,
    seed: int = 0,
) -> tfd.Distribution:
    """Flow-VAE: a RealNVP or Glow of images whose latent values, laid out as an image, have a VAE as prior.

    Encoder: 3x3 convolutions with C, `vae_width` and `vae_width` filters, strides 1, 2 and 2 and ReLU, and a dense layer to the
    means and log-scales of `latent_dims` latent dimensions. Decoder: a dense layer to a quarter of height and width, two
    transposed convolutions of stride 2 and ReLU, and a convolution to the C means of a Gaussian.

    Args:
      event_shape: `[H, W, C]` with H and W divisible by 4 (and as the flow's levels need it).
      latent_dims: latent dimensions of the VAE; None: a quarter of the event's.
      likelihood: standard deviation of the decoder's Gaussian: one for each dimension (`"per_dimension"`) or for all
        (`"global"`).
      vae_width: filters of encoder and decoder.
      flow: `"realnvp"`, `"glow"`, or None: no flow, a VAE of the preprocessed images.
      num_levels: as in the flow's recipe.
      depth: as in the flow's recipe.
      width: as in the flow's recipe.
      num_blocks: as in `realnvp`.
      factorization: as in the flow's recipe.
      alpha: margin of the logit preprocessing, which `glow` does without.
      grey_levels: number of grey levels of integer images; None for continuous events.
      seed: integer seed.

    Returns:
      `TransformedDistribution` of a `dfd.VAEPrior`; `Dequantized` if `grey_levels` is given.

    Raises:
      ValueError: if shape, number of levels and factorization do not fit each other.

    References: Das, Abbeel, Spanos, "Dimensionality reduction flows", 2019.

    #### Example

    >>> flow = dimflows.recipes.flow_vae([8, 8, 1], latent_dims=4, width=4, num_blocks=1)
    >>> flow.sample(2, seed=[0, 0]).shape, flow.distribution.latent_dims
    (TensorShape([2, 8, 8, 1]), 4)
    """
    shape = common.checked_event_shape(event_shape, "flow-vae", ranks=(3,))
    latent_dims = math.prod(shape) // 4 if latent_dims is None else latent_dims
    common.check_sizes("flow-vae", latent_dims=latent_dims, vae_width=vae_width)
    if likelihood not in dfd.VAEPrior.LIKELIHOODS:
        raise ValueError(f"flow-vae: got likelihood={likelihood!r}, needs one of {dfd.VAEPrior.LIKELIHOODS}")
    flow_seed, encoder_seed, decoder_seed = np.random.SeedSequence(seed).generate_state(3).tolist()
    sizes: dict[str, Any] = {"num_levels": num_levels, "width": width, "factorization": factorization, "seed": flow_seed}
    preprocess = common.centred if flow == "glow" else common.logit(alpha)
    bijector = tfb.Identity()
    if flow == "realnvp":
        bijector = realnvp(shape, **sizes, depth=depth, num_blocks=num_blocks).bijector
    elif flow == "glow":
        bijector = glow(shape, **sizes, depth=depth).bijector
    elif flow is not None:
        raise ValueError(f"flow-vae: got flow={flow!r}, needs realnvp, glow or None")
    if flow is not None:
        bijector = dfb.Chain([bijector, bijector.event_layout()])
    prior = dfd.VAEPrior(
        networks.conv_encoder(shape, 2 * latent_dims, width=vae_width, seed=encoder_seed),
        networks.conv_decoder(shape, latent_dims, width=vae_width, seed=decoder_seed),
        latent_dims,
        likelihood=likelihood,
        dtype=common.floatx(),
    )
    return common.as_distribution(bijector, shape, grey_levels, preprocess, prior)
