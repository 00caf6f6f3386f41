"""Codes: the first latent values of a model, and what they tell of an event, beside principal components."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from tfp_dimflows.distributions import VAEPrior, structure_of


def psnr(mean_squared_error: ArrayLike, grey_levels: int) -> np.ndarray:
    """Peak signal-to-noise ratio of images of so many grey levels, in decibels.

        psnr = 20 log10(grey_levels - 1) - 10 log10(mean squared error)

    Args:
      mean_squared_error: the mean over all images, positions and channels at once, one for each set of reconstructions. The
        mean of the PSNR of each image would be larger, and infinite as soon as one image is exact.
      grey_levels: number of grey levels, 256 for images of 8 bits.

    #### Example

    >>> from tfp_dimflows.codes import psnr
    >>> psnr([0.0, 1.0, 100.0], grey_levels=256).round(2)
    array([  inf, 48.13, 28.13])
    """
    with np.errstate(divide="ignore"):
        return 20.0 * np.log10(grey_levels - 1.0) - 10.0 * np.log10(np.asarray(mean_squared_error, np.float64))


class Reconstruction:
    """What codes of a model tell of events: `model.decode(model.encode(x)[..., :k])`, compiled.

    Args:
      model: a `FlowModel`.
    """

    def __init__(self, model: keras.Model):
        self._structure = structure_of(model.distribution)
        self._encode = tf.function(model.encode, autograph=False, reduce_retracing=True)
        self._decode = tf.function(model.decode, autograph=False, reduce_retracing=True)

    def __call__(self, events: Any, sizes: Sequence[int]) -> np.ndarray:
        """The events from codes of each of these sizes, `[number of sizes] + batch + event`; of size 0: from nothing.

        Args:
          events: a batch, or a dict with `x` and `condition`.
          sizes: 0, or sizes of `model.code_sizes`.
        """
        z = self._encode(events)
        condition = events["condition"] if isinstance(events, dict) else None
        return np.stack([self._decode(self._structure.completed(z[..., :size]), condition) for size in sizes])


class PCA:
    """Principal component analysis of events, the leading components first.

    Args:
      events: `[N] + event shape`, N at least 1.

    #### Example

    >>> from tfp_dimflows.codes import PCA
    >>> PCA([[0.0, 0.0], [2.0, 2.0]]).reconstruct([[2.0, 0.0], [3.0, 3.0]], size=1).round(6)
    array([[1., 1.],
           [3., 3.]])
    """

    def __init__(self, events: ArrayLike):
        events = _flat(events)
        self._mean = events.mean(axis=0, dtype=np.float64)
        covariance = np.zeros([self._mean.size] * 2)
        for start in range(0, len(events), 1024):  # float64 copies of all would take much memory
            centred = events[start : start + 1024] - self._mean
            covariance += centred.T @ centred
        self._components = np.linalg.eigh(covariance)[1][:, ::-1]

    def reconstruct(self, events: ArrayLike, size: int) -> np.ndarray:
        """Events from the mean and their first coordinates, so many."""
        leading = self._components[:, :size]
        return (self._mean + (_flat(events) - self._mean) @ leading @ leading.T).reshape(np.shape(events))


def _flat(events: ArrayLike) -> np.ndarray:
    events = np.asarray(events)
    return events.reshape(len(events), -1)


class Comparison(NamedTuple):
    """What `compare_with_pca` finds.

    Attributes:
      sizes: the sizes k of the codes.
      psnr: of the reconstructions from the model's codes, one for each size.
      pca_psnr: of those from as many principal components.
      images: the originals and, for each size, the reconstructions of the first images, `[1 + number of sizes, N, H, W, C]`.
      grey_levels: the number of grey levels.
    """

    sizes: list[int]
    psnr: np.ndarray
    pca_psnr: np.ndarray
    images: np.ndarray
    grey_levels: int


def compare_with_pca(
    model: keras.Model, images: ArrayLike, training_images: ArrayLike, num_images: int = 8, batch_size: int = 64
) -> Comparison:
    """PSNR of images from a model's codes of every size, and from as many principal components of the training images.

    What principal components give is rounded to grey levels, as the model's reconstructions are.

    Args:
      model: a `FlowModel` of integer images whose latent values are ordered, or under a `dfd.VAEPrior`.
      images: the images to be coded, `[N, H, W, C]`.
      training_images: the images whose principal components are taken.
      num_images: of how many images the reconstructions are kept; fewer if there are not as many.
      batch_size: size of the batches in which the model works.

    Raises:
      ValueError: for another model, or images that do not fit it.
    """
    structure = structure_of(model.distribution)
    if structure.dequantized is None or len(model.event_shape) != 3:
        raise ValueError(f"codes: {model.distribution.name} has no events that are integer images, needs them for the PSNR")
    if len(model.code_sizes) < 2 and not isinstance(structure.noise, VAEPrior):
        raise ValueError(
            f"codes: {model.distribution.name} has the parts {[part.name for part in structure.parts]}, needs a Multiscale "
            "that dimensions leave, or a PNF, next to its latent values, or a VAEPrior: there are no codes without"
        )
    images, training_images = np.asarray(images), np.asarray(training_images)
    for given in (images, training_images):
        if given.shape[1:] != tuple(model.event_shape) or not len(given):
            needs = ", ".join(map(str, ["N", *model.event_shape]))
            raise ValueError(f"codes: got images of shape {list(given.shape)}, needs [{needs}]")
    grey_levels, sizes = structure.dequantized.grey_levels, model.code_sizes
    reconstruct, pca = Reconstruction(model), PCA(training_images)
    errors, kept = np.zeros([2, len(sizes)]), []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        of_model = reconstruct(batch, sizes)
        of_pca = np.stack([np.round(pca.reconstruct(batch, size)).clip(0, grey_levels - 1) for size in sizes])
        for error, reconstructed in zip(errors, (of_model, of_pca)):
            error += np.square(reconstructed - batch.astype(np.float64)).sum(axis=(1, 2, 3, 4))
        if start < num_images:
            kept.append(np.concatenate([batch[np.newaxis], of_model]))
    of_model, of_pca = psnr(errors / images.size, grey_levels)
    return Comparison(sizes, of_model, of_pca, np.concatenate(kept, axis=1)[:, :num_images], grey_levels)
