"""Keras callbacks."""

import os
import pathlib
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from tfp_dimflows import plot, recipes
from tfp_dimflows.bijectors import Multiscale
from tfp_dimflows.bijectors.lcma import likelihood_contributions
from tfp_dimflows.distributions import structure_of
from tfp_dimflows.training import batches
from tfp_dimflows.training.codes import LogProbTerms
from tfp_dimflows.training.model import FlowModel


class KLWarmup(keras.callbacks.Callback):
    """Lets the weight of the KL term in the training loss grow linearly from 0 to 1.

    In training step t the loss of a model with a `dfd.VAEPrior` is

        -bound - (1 - min(1, t / steps)) KL(q(e | z) || N(0, I))

    so that the posterior is not driven into the prior before the decoder has learned to use it. Metrics, validation and
    `log_prob` are of the bound itself, always. t is the optimizer's count, so a resumed training goes on where it was; with
    `steps_per_execution` the weight changes once per execution.

    Args:
      steps: number of optimisation steps after which the weight is 1.

    Raises:
      ValueError: if `steps` is not positive, or the model has no KL term.

    References: Bowman, Vilnis, Vinyals, Dai, Jozefowicz, Bengio, "Generating sentences from a continuous space", 2016.

    #### Example

    >>> flow = dimflows.recipes.flow_vae([4, 4, 1], flow=None, vae_width=4)
    >>> model = dimflows.FlowModel(flow, seed=0)
    >>> model.compile()
    >>> history = model.fit(tf.zeros([8, 4, 4, 1]), verbose=0, callbacks=[dimflows.training.KLWarmup(steps=10)])
    >>> sorted(history.history)
    ['bits_per_dim', 'kl', 'loss', 'nll', 'reconstruction']
    """

    def __init__(self, steps: int):
        super().__init__()
        if steps < 1:
            raise ValueError(f"KLWarmup: got steps={steps}, needs a positive number")
        self.steps = steps

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks the model."""
        if getattr(self.model, "kl_weight", None) is None:
            raise ValueError(f"KLWarmup: {self.model.name} has no KL term; only a dfd.VAEPrior has one")

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Sets the weight for this step."""
        self.model.kl_weight.assign(min(1.0, int(self.model.optimizer.iterations) / self.steps))

    def on_train_end(self, logs: dict | None = None) -> None:
        """Sets the weight to 1."""
        self.model.kl_weight.assign(1.0)


class DecideFactorization(keras.callbacks.Callback):
    """Decides a `dfb.OnlineFactorization` within `fit`: LCMA in one training, without a first phase.

    After every `steps` optimisation steps, until all are decided, the next factor-out follows the likelihood contributions that
    `data` has then. The dimensions still in the flow there have passed every level up to it, so nothing more than this model is
    needed to rank them. Nothing is rebuilt: all variables stay, and so does the optimizer's state. The steps are the
    optimizer's count and the decisions are part of the weights, so a resumed training goes on where it was.

    Args:
      data: a dataset of batches, or one batch, as for `dimflows.likelihood_contributions`.
      steps: optimisation steps from one decision to the next, and before the first.
      seed: integer seed of the noise of integer images, and of the probes of stochastic log-dets.

    Raises:
      ValueError: if `steps` is not positive, or (at the beginning of training) if the model has no `OnlineFactorization`, or
        the data does not fit it.

    References: Das, Abbeel, Spanos, "Likelihood Contribution based Multi-scale Architecture for Generative Flows", 2020, whose
    three phases this makes one.

    #### Example

    >>> flow = dimflows.recipes.lcma_realnvp([4, 4, 1], width=4, num_blocks=1, contributions="online", grey_levels=4)
    >>> model = dimflows.FlowModel(flow, seed=0)
    >>> model.compile()
    >>> images = tf.zeros([32, 4, 4, 1], tf.int32)
    >>> decide = dimflows.training.DecideFactorization(images, steps=2)
    >>> history = model.fit(images, batch_size=8, verbose=0, callbacks=[decide])
    >>> model.bijector.bijectors[-1].num_decided
    1
    """

    def __init__(self, data: Any, steps: int, seed: int = 0):
        super().__init__()
        if steps < 1:
            raise ValueError(f"DecideFactorization: got steps={steps}, needs a positive number")
        self._data = data if isinstance(data, tf.data.Dataset) else tf.data.Dataset.from_tensors(data)
        self._steps, self._seed = steps, seed

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks model and data."""
        if not isinstance(self.model, FlowModel):
            raise ValueError(f"DecideFactorization: got the model {self.model.name}, needs a FlowModel")
        multiscale = structure_of(self.model.distribution).multiscale
        if multiscale is None or not multiscale.is_online:
            raise ValueError(f"DecideFactorization: {self.model.name} has no Multiscale with an OnlineFactorization")
        self._multiscale = multiscale
        batches.checked_first(self._data, self.model.distribution)

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Decides what is due."""
        decided = self._multiscale.num_decided
        if decided < len(self._multiscale.levels) - 1 and self.model.optimizer.iterations >= self._steps * (decided + 1):
            contributions = likelihood_contributions(self.model.bijector, self._data, seed=self._seed)
            self._multiscale.decide(contributions[decided])


class _Pictures(keras.callbacks.Callback):
    """Base of callbacks that write pictures of a model: bytes `[height, width, channels]`, one after every so many epochs."""

    def __init__(
        self, directory: str | os.PathLike | None, log_dir: str | os.PathLike | None, every: int, name: str, overwrite: bool
    ):
        super().__init__()
        if directory is None and log_dir is None:
            raise ValueError(f"{type(self).__name__}: got neither directory nor log_dir, needs one of them")
        if every < 1:
            raise ValueError(f"{type(self).__name__}: got every={every}, needs a positive number of epochs")
        plot.require_matplotlib()
        self._directory = None if directory is None else pathlib.Path(directory)
        self._log_dir, self._every, self._name, self._overwrite = log_dir, every, name, overwrite
        self._writer: tf.summary.SummaryWriter | None = None
        self._is_open = False

    def _check(self) -> None:
        """Raises a ValueError unless there is such a picture of the model."""
        raise NotImplementedError

    def _pixels(self) -> np.ndarray:
        raise NotImplementedError

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks the model."""
        if not isinstance(self.model, FlowModel):
            raise ValueError(f"{type(self).__name__}: got the model {self.model.name}, needs a FlowModel")
        self._is_open = False
        self._check()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Checks the directory, before the first epoch."""
        if not self._is_open:
            self._open(epoch + 1)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes a picture, every so many epochs."""
        if (epoch + 1) % self._every == 0:
            self._write(epoch + 1, epoch)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Closes the log."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, first: int) -> None:
        """Raises unless pictures from number `first` on can be written without loss."""
        self._is_open = True
        if self._directory is not None:
            paths = list(self._directory.iterdir()) if self._directory.is_dir() else []
            numbers = {path: re.fullmatch(rf"{re.escape(self._name)}-(\d+)\.png", path.name) for path in paths}
            others = sorted(path for path, number in numbers.items() if number and int(number[1]) >= first)
            if others and not self._overwrite:
                raise ValueError(
                    f"{type(self).__name__}: {others[0]} is there already, from another training; choose another directory or "
                    "name, or pass overwrite=True"
                )
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{type(self).__name__}: cannot write to {self._directory}: {error.strerror}") from error
        if self._log_dir is not None:
            self._writer = tf.summary.create_file_writer(os.fspath(self._log_dir))

    def _write(self, number: int, step: int) -> None:
        if not self.model.distribute_strategy.extended.should_save_summary:
            return  # of several workers one writes
        try:
            pixels = self._pixels()
        except tf.errors.InvalidArgumentError as error:  # a numerical failure is no reason to end a training
            warnings.warn(f"{type(self).__name__}: no picture after epoch {number}: {error.message}", stacklevel=2)
            return
        if self._directory is not None:
            plot.save_pixels(self._directory / f"{self._name}-{number:04d}.png", pixels)
        if self._writer is not None:
            with self._writer.as_default():
                tf.summary.image(self._name, pixels[np.newaxis], step=step)
            self._writer.flush()

    def _check_images(self) -> None:
        if len(self.model.event_shape) != 3:
            shape = list(self.model.event_shape)
            raise ValueError(f"{type(self).__name__}: {self.model.name} has events of shape {shape}, needs images [H, W, C]")

    def _grid(self, images: ArrayLike, limits: Sequence[float] | None) -> np.ndarray:
        return plot.enlarged(plot.grid_pixels(images, _grey_levels(self.model), limits, type(self).__name__))


def _grey_levels(model: FlowModel) -> int | None:
    """The number of grey levels of a model's images; None for continuous ones."""
    config = recipes.config_of(model.distribution) or {"arguments": {}}
    return getattr(model.distribution, "grey_levels", config["arguments"].get("grey_levels"))


class SampleImages(_Pictures):
    """Writes a grid of samples every so many epochs, always with the same noise.

    PNGs are named by the epoch, counted from 1 as in `keras.callbacks.ModelCheckpoint`: `samples-0001.png`. Steps of
    TensorBoard's images count from 0, as those of `keras.callbacks.TensorBoard`. Training is the same with and without it.

    Args:
      directory: where PNGs go; None: nowhere.
      log_dir: where TensorBoard's images go, such as `"logs/pictures"` beside the `"logs/train"` of Keras; None: nowhere.
      every: number of epochs from one picture to the next.
      num: number of samples.
      seed: integer seed of the samples.
      condition: conditions of a conditional model, one for each sample, whose number is then theirs.
      limits: as in `dimflows.plot.image_grid`; a recipe's `grey_levels` are known.
      name: the beginning of the files' names, and the name in TensorBoard.
      overwrite: whether pictures of the epochs to be trained may be replaced, as those of a run that was killed and goes on.

    Raises:
      ValueError: (at the beginning of training) if events are no images, samples cannot be drawn, or the directory cannot be
        written to, or holds pictures of epochs to be trained.
      ImportError: without matplotlib.

    #### Example

    >>> model = dimflows.FlowModel(dimflows.recipes.glow([4, 4, 1], num_levels=1, depth=1, width=4, grey_levels=4))
    >>> model.compile()
    >>> pictures = dimflows.training.SampleImages("samples", every=2, num=9)
    >>> history = model.fit(tf.zeros([8, 4, 4, 1], tf.int32), epochs=4, verbose=0, callbacks=[pictures])
    >>> sorted(tf.io.gfile.listdir("samples"))
    ['samples-0002.png', 'samples-0004.png']
    """

    def __init__(
        self,
        directory: str | os.PathLike | None = None,
        log_dir: str | os.PathLike | None = None,
        *,
        every: int = 1,
        num: int = 64,
        seed: int = 0,
        condition: Any = None,
        limits: Sequence[float] | None = None,
        name: str = "samples",
        overwrite: bool = False,
    ):
        super().__init__(directory, log_dir, every, name, overwrite)
        if num < 1:
            raise ValueError(f"SampleImages: got num={num}, needs a positive number")
        self._num, self._seed, self._condition, self._limits = num, seed, condition, limits

    def _check(self) -> None:
        self._check_images()
        self._pixels()

    def _pixels(self) -> np.ndarray:
        sample_shape = self._num if self._condition is None else ()
        return self._grid(self.model.sample(sample_shape, seed=self._seed, condition=self._condition), self._limits)


class Reconstructions(_Pictures):
    """Writes images, and below each what the code of a variational autoencoder tells of it, every so many epochs.

        reconstruction = decode(encode(image))

    For models with a `dfd.VAEPrior`: other flows are bijections, whose reconstructions are the images themselves.

    Args:
      images: events of the model, `[N, H, W, C]`.
      directory: as in `SampleImages`.
      log_dir: as in `SampleImages`.
      every: as in `SampleImages`.
      limits: as in `SampleImages`.
      name: as in `SampleImages`.
      overwrite: as in `SampleImages`.

    Raises:
      ValueError: (at the beginning of training) if the model is no autoencoder, the images are no events of it, or as
        `SampleImages`.
      ImportError: without matplotlib.

    #### Example

    >>> model = dimflows.FlowModel(dimflows.recipes.flow_vae([4, 4, 1], flow=None, vae_width=4, grey_levels=4))
    >>> model.compile()
    >>> images = tf.zeros([8, 4, 4, 1], tf.int32)
    >>> history = model.fit(images, verbose=0, callbacks=[dimflows.training.Reconstructions(images[:5], "images")])
    >>> tf.io.gfile.listdir("images")
    ['reconstructions-0001.png']
    """

    def __init__(
        self,
        images: ArrayLike,
        directory: str | os.PathLike | None = None,
        log_dir: str | os.PathLike | None = None,
        *,
        every: int = 1,
        limits: Sequence[float] | None = None,
        name: str = "reconstructions",
        overwrite: bool = False,
    ):
        super().__init__(directory, log_dir, every, name, overwrite)
        self._images, self._limits = np.asarray(images), limits
        if self._images.ndim != 4:
            raise ValueError(f"Reconstructions: got images of shape {list(self._images.shape)}, needs [N, H, W, C]")

    def _check(self) -> None:
        self._check_images()
        if self.model.kl_weight is None:
            raise ValueError(
                f"Reconstructions: {self.model.name} is no autoencoder (only a dfd.VAEPrior makes one), so there is nothing to "
                "see: its reconstructions are the images"
            )
        self._pixels()

    def _pixels(self) -> np.ndarray:
        return self._grid(np.stack([self._images, self.model.decode(self.model.encode(self._images))]), self._limits)


class KeptDimensions(_Pictures):
    """Writes the map of how many levels each dimension passes (`dimflows.plot.kept_dimensions`), before the first epoch.

    The PNG is named by the number of epochs before it: `kept-dimensions-0000.png`.

    Args:
      directory: as in `SampleImages`.
      log_dir: as in `SampleImages`.
      name: as in `SampleImages`.
      overwrite: as in `SampleImages`.

    Raises:
      ValueError: (at the beginning of training) if the model has no `dfb.Multiscale`, or one that no dimension leaves, or as
        `SampleImages`.
      ImportError: without matplotlib.

    #### Example

    >>> model = dimflows.FlowModel(dimflows.recipes.glow([4, 4, 1], num_levels=2, depth=1, width=4))
    >>> model.compile()
    >>> history = model.fit(tf.zeros([8, 4, 4, 1]), verbose=0, callbacks=[dimflows.training.KeptDimensions("maps")])
    >>> tf.io.gfile.listdir("maps")
    ['kept-dimensions-0000.png']
    """

    def __init__(
        self,
        directory: str | os.PathLike | None = None,
        log_dir: str | os.PathLike | None = None,
        *,
        name: str = "kept-dimensions",
        overwrite: bool = False,
    ):
        super().__init__(directory, log_dir, 1, name, overwrite)

    def _check(self) -> None:
        multiscale = structure_of(self.model.distribution).multiscale
        if multiscale is None or multiscale.factorization is None:
            reason = "no Multiscale in it" if multiscale is None else "a Multiscale that no dimension leaves"
            raise ValueError(f"KeptDimensions: {self.model.name} has {reason}, needs one with a DimensionFactorization")
        self._factorization = multiscale.factorization

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Writes the picture, before the first epoch."""
        if not self._is_open:
            self._open(epoch)
            self._write(epoch, epoch)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes nothing."""

    def _pixels(self) -> np.ndarray:
        return plot.figure_pixels(1, lambda axes: plot.kept_dimensions(self._factorization, ax=axes))


class BitsPerLevel(keras.callbacks.Callback):
    """Logs how many bits per dimension each level of a `dfb.Multiscale` costs, after every epoch, on the same data and noise.

        bits_level_k       = -(log p(z_k) + inverse log-det of level k and of its exit) / (D ln 2),   finest level: k = 1
        bits_preprocessing = -(inverse log-det of what is between data and Multiscale - log r(u | x)) / (D ln 2)

    with D the number of dimensions of the whole event, z_k the latent values of the dimensions that leave after level k, and r
    the density of the dequantisation noise, so that the terms sum to the model's bits per dimension: of batch s = 0, 1, ... to
    those of `model.log_prob(batch, num_samples=1, seed=seed + s)`.

    Keras's callbacks see the terms if they are behind this one in the list of callbacks: `CSVLogger`, `TensorBoard`.

    Args:
      data: a dataset of batches, or one batch, as for `FlowModel.fit`.
      seed: integer seed of the noise.

    Raises:
      ValueError: (at the beginning of training) if the model's distribution is no flow of independent noise with a `Multiscale`
        next to the latent values, or the data does not fit it.

    #### Example

    >>> model = dimflows.FlowModel(dimflows.recipes.glow([4, 4, 1], num_levels=2, depth=1, width=4, grey_levels=4))
    >>> model.compile()
    >>> images = tf.zeros([8, 4, 4, 1], tf.int32)
    >>> history = model.fit(images, verbose=0, callbacks=[dimflows.training.BitsPerLevel(images)])
    >>> [name for name in sorted(history.history) if name.startswith("bits")]
    ['bits_level_1', 'bits_level_2', 'bits_per_dim', 'bits_preprocessing']
    """

    def __init__(self, data: Any, seed: int = 0):
        super().__init__()
        self._data, self._seed = data, seed

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks model and data."""
        if not isinstance(self.model, FlowModel):
            raise ValueError(f"BitsPerLevel: got the model {self.model.name}, needs a FlowModel")
        self._terms = LogProbTerms(self.model, Multiscale, f"BitsPerLevel: {self.model.distribution.name}")
        self._names = [f"bits_level_{k + 1}" for k in range(len(self._terms.flow.levels))]
        self._names += ["bits_preprocessing"] * self._terms.has_preprocessing
        self._check_data()

    def _check_data(self) -> None:
        batches.checked_first(self._data, self.model.distribution)
        for batch in self._batches():
            self._terms(tf.nest.map_structure(lambda value: value[:1], batch), seed=self._seed)
            return
        raise ValueError("BitsPerLevel: the dataset is empty")

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Adds the terms to the logs."""
        bits = self._terms.mean_bits(self._batches(), self._seed)
        if logs is not None:
            logs.update(zip(self._names, bits.tolist()))

    def _batches(self) -> Iterator[Any]:
        for batch in self._data if isinstance(self._data, tf.data.Dataset) else [self._data]:
            yield batches.tensors(batches.events(batch), self.model.distribution)
