"""Variational autoencoders whose posterior is a flow."""

import functools
from collections.abc import Callable, Sequence

import keras
from tensorflow_probability import bijectors as tfb
from tensorflow_probability import distributions as tfd

from tfp_dimflows import bijectors as dfb
from tfp_dimflows import distributions as dfd
from tfp_dimflows import networks
from tfp_dimflows.recipes import common
from tfp_dimflows.recipes.autoregressive import made_layers
from tfp_dimflows.recipes.registry import recipe

POSTERIORS = ("gaussian", "planar", "radial", "sylvester-orthogonal", "sylvester-householder", "sylvester-triangular", "iaf")


@recipe
def vae_flow(
    event_shape: Sequence[int],
    *,
    posterior: str = "iaf",
    depth: int = 4,
    latent_dims: int = 16,
    features: int = 64,
    width: int = 32,
    hidden: Sequence[int] = (64,),
    grey_levels: int | None = 2,
    seed: int = 0,
) -> tfd.Distribution:
    """Variational autoencoder of integer images with an amortised flow as posterior.

        q(e | x): noise, scaled and shifted given h(x), then `depth` flows given h(x);   p(e) = N(0, I)
        p(x | e): binomial of `grey_levels - 1` trials for every dimension; with two levels, of binary images, Bernoulli

    h is a convolutional encoder's vector of `features` numbers. One dense layer of it predicts the parameters of each flow; an
    inverse autoregressive flow takes it as the condition of its networks. Networks as in `recipes.flow_vae`.

    Args:
      event_shape: `[H, W, C]` with H and W divisible by 4.
      posterior: `"gaussian"` (no flows), `"planar"`, `"radial"`, `"sylvester-orthogonal"`, `"sylvester-householder"`,
        `"sylvester-triangular"` or `"iaf"`.
      depth: number of flows.
      latent_dims: latent dimensions.
      features: size of h.
      width: filters of encoder and decoder.
      hidden: widths of the hidden layers of an inverse autoregressive flow's networks.
      grey_levels: number of grey levels.
      seed: integer seed.

    Returns:
      A `dfd.VAEPrior` of the images themselves.

    Raises:
      ValueError: for another posterior, other shapes or sizes, or without `grey_levels`.

    References: Rezende, Mohamed, "Variational inference with normalizing flows", 2015; Kingma et al., "Improving variational
    inference with inverse autoregressive flow", 2016; van den Berg et al., "Sylvester normalizing flows for variational
    inference", 2018.

    #### Example

    >>> vae = dimflows.recipes.vae_flow([8, 8, 1], posterior="planar", latent_dims=4, width=4)
    >>> vae.elbo(tf.zeros([3, 8, 8, 1], tf.int32), seed=[0, 0]).shape
    TensorShape([3])
    """
    shape = common.checked_event_shape(event_shape, "vae-flow", ranks=(3,))
    common.check_sizes("vae-flow", depth=depth, latent_dims=latent_dims, features=features, width=width)
    if posterior not in POSTERIORS:
        raise ValueError(f"vae-flow: got posterior={posterior!r}, needs one of {POSTERIORS}")
    if grey_levels is None or grey_levels < 2:
        raise ValueError(f"vae-flow: got grey_levels={grey_levels!r}, needs the number of grey levels, 2 or more")
    common.check_sizes("vae-flow", **{f"hidden[{k}]": size for k, size in enumerate(hidden)})
    seeds = iter(common.seeds(seed, 5 + 2 * depth))
    encoder = networks.conv_encoder(shape, features, width=width, seed=next(seeds))
    scaled = keras.Sequential([keras.Input(shape), keras.layers.Rescaling(2.0 / (grey_levels - 1), -1.0), *encoder.layers])

    def amortised(transformer: Callable, size: int) -> dfb.ConditionalTransform:
        """A bijector with `size` parameters given h."""
        kernel, bias = (
            keras.initializers.GlorotUniform(next(seeds)),
            keras.initializers.RandomNormal(0.0, 0.1, seed=next(seeds)),
        )
        network = keras.layers.Dense(size, kernel_initializer=kernel, bias_initializer=bias)
        network.build((None, features))
        return dfb.ConditionalTransform(network, transformer, event_ndims=1)

    flows = []
    if posterior == "iaf":
        flows = made_layers(latent_dims, depth, hidden, features, dfb.transformers.Gated, tfb.Invert, next(seeds))
    elif posterior != "gaussian":
        for k in range(depth):
            family, size = _family(posterior, latent_dims, bool(k % 2))
            flows.append(amortised(family, size))
    gaussian = amortised(dfb.transformers.Affine("exp"), 2 * latent_dims)
    decoder = networks.conv_decoder(shape, latent_dims, width=width, seed=next(seeds))
    return dfd.VAEPrior(
        scaled,
        decoder,
        latent_dims,
        posterior=dfb.Chain([*flows, gaussian]),
        likelihood=lambda logits: tfd.Independent(tfd.Binomial(grey_levels - 1.0, logits), 3),
        dtype=common.floatx(),
    )


def _family(posterior: str, dims: int, reverse: bool) -> tuple[Callable, int]:
    """A function from parameters to a bijector, and their number."""
    if posterior == "planar":
        return functools.partial(dfb.Planar, dims), dfb.Planar.num_params(dims)
    if posterior == "radial":
        return functools.partial(dfb.Radial, dims), dfb.Radial.num_params(dims)
    variant = posterior.removeprefix("sylvester-")
    reverse = reverse and variant == "triangular"
    return functools.partial(dfb.Sylvester, dims, variant=variant, reverse=reverse), dfb.Sylvester.num_params(dims, variant)
