"""TFDS pipelines of integer images: decode, crop, resize, requantise, shuffle, batch, augment, prefetch."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import stat
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfp_dimflows.dataset_names import DEFAULT_DATA_DIR, as_folder, data_directory, find_builder
from tfp_dimflows.renamed import renamed

_CELEB_A_CROP = (40, 15, 148, 148)
_SHUFFLE_BUFFER = 10_000
_SUBSETS = ("training", "validation")


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a flow needs to know about a dataset before it sees any image.

    Attributes:
      name: the dataset's TFDS name, or a folder's absolute path.
      event_shape: `(height, width, channels)` of one image, after crop and resize.
      grey_levels: number of grey levels per channel, the images' values being `0 .. grey_levels - 1`.
      splits: number of images in each split.
      label_names: names of the labels `0, 1, ...` that `load` has with `labels=True`; empty for datasets without labels.
    """

    name: str
    event_shape: tuple[int, int, int]
    grey_levels: int
    splits: dict[str, int]
    label_names: tuple[str, ...] = ()


@renamed(levels="grey_levels")
def info(
    name: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
    grey_levels: int | None = None,
    background: str = "white",
    data_dir: str | os.PathLike[str] | None = None,
) -> DatasetInfo:
    """Describes a dataset as `load` would deliver it, without reading its images.

    A dataset that is not prepared yet is prepared first, as by `load`.

    Args:
      name: as in `load`.
      image_size: as in `load`.
      crop: as in `load`.
      grey_levels: as in `load`.
      background: as in `load`.
      data_dir: as in `load`.

    Returns:
      The `DatasetInfo`.

    Raises:
      FileNotFoundError: as in `load`.
      ImportError: as in `load`.
      ValueError: as in `load`.

    #### Example

    >>> import tfp_dimflows as dimflows
    >>> info = dimflows.data.info("digits")
    >>> info.event_shape, info.grey_levels, info.splits
    ((8, 8, 1), 17, {'train': 1437, 'test': 360})
    >>> info.label_names
    ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
    """
    source = _open_source(name, image_size, crop, grey_levels, background, data_dir)
    splits = {split: split_info.num_examples for split, split_info in source.builder.info.splits.items()}
    label_key = _label_key(source.builder)
    label_names = () if label_key is None else tuple(source.builder.info.features[label_key].names)
    return DatasetInfo(source.name, source.event_shape, source.grey_levels, splits, label_names)


@renamed(levels="grey_levels")
def load(
    name: str | os.PathLike[str],
    split: str = "train",
    *,
    batch_size: int,
    validation_split: float = 0.0,
    subset: str | None = None,
    validation_seed: int = 0,
    image_size: int | tuple[int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
    grey_levels: int | None = None,
    flips: bool = False,
    shifts: int = 0,
    shuffle: bool | None = None,
    seed: int = 0,
    drop_remainder: bool | None = None,
    repeat: bool = False,
    background: str = "white",
    labels: bool = False,
    files: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
) -> tf.data.Dataset:
    """Loads a TFDS image dataset as batches of integer images, with their labels if need be.

    Each image is decoded, cropped, resized and requantised, in this order. Any TFDS dataset with one image per example
    will do; TFDS downloads and prepares it if it is not in `data_dir` yet. `digits` and `photo_patches` are made from
    images that ship with scikit-learn and need no download.

    A folder (PNG, JPEG, WebP, TIFF, GIF or BMP files, also in folders inside it) is prepared as a TFDS dataset of its own,
    again when its files have changed. Its folders `train` and `test` are the splits if it has both; otherwise a tenth of the
    images, chosen by their paths, is the test split. The first image decides whether the dataset is grey or in colour.
    Images are turned as their EXIF orientation says; of animations the first frame is taken, of 16 bits the upper 8. A
    warning names images of other formats, which are ignored. Names that begin with a dot are passed over.

    Args:
      name: a TFDS dataset name such as `"cifar10"` or `"imagenet_resized/64x64"`, or `"digits"` or `"photo_patches"`; or
        the path of a folder of images of your own, such as `"./photos"` (with `.`, `/` or `~` at its beginning).
      split: a split in TFDS's syntax, such as `"train"`, `"test"` or `"train[:90%]"`.
      batch_size: images per batch.
      validation_split: share f of the split's n images that is kept for validation, `round(f n)` of them and at least one.
      subset: with `validation_split`, which images to load: `"validation"`, this share, or `"training"`, all others.
      validation_seed: seed of the choice of images for validation, apart from `seed`, so that it outlasts other shuffles.
      image_size: resizes to this `(height, width)`, or to a square of this side: bilinear, with antialiasing when
        shrinking, rounded back to integers.
      crop: `(top, left, height, width)` of the part to keep. `celeb_a` has the usual square around the face (rows 40
        to 187, columns 15 to 162) as its default when `image_size` is given.
      grey_levels: number n of grey levels, default the dataset's own N (256, or 17 for `digits`). Must divide N; a value
        x becomes `x // (N // n)`, so that `grey_levels=32` keeps the 5 most significant of 8 bits.
      flips: mirrors each image left to right with probability one half.
      shifts: moves each image by a random whole number of pixels, from `-shifts` to `shifts`, in each of both directions;
        its mirrored margin comes in.
      shuffle: shuffles anew in each iteration, default for splits that start with "train" except their subset
        "validation". The shuffle buffer holds 10,000 images in their compressed form; with `repeat`, blocks of 10,000 are
        shuffled one after the other. Without it the order is always the same.
      seed: seed of shuffles, flips and shifts. The same seed gives the same sequence of passes over the images.
      drop_remainder: drops a last batch that is not full, so that the batch dimension is static. Default for splits
        that start with "train" except their subset "validation".
      repeat: repeats without end, each pass shuffled, flipped and shifted anew, but the same sequence in each iteration: what
        comes after n batches is known again by `skip(n)`.
      background: for folders, the colour behind transparent images, a name or code that Pillow knows, such as `"black"` or
        `"#ff8000"`.
      labels: whether to have pairs of images and their labels, from the dataset's only `tfds.features.ClassLabel`, or from
        the one named "label" if there are several. `info` has their names.
      files: for folders: whether to have pairs of images and their files, by paths inside the folder; with `shuffle=False`.
      data_dir: where TFDS keeps its datasets, default the environment variable `TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`. The latter also takes `digits`, `photo_patches` and folders when `data_dir` is read-only.

    Returns:
      A prefetching `tf.data.Dataset` of uint8 tensors `[batch_size, height, width, channels]` with values in
      `0 .. grey_levels - 1`; one channel for grey images. With `labels`, pairs of these and of int64 tensors
      `[batch_size]`; with `files`, pairs of these and of strings `[batch_size]`.

    Raises:
      FileNotFoundError: if the dataset or folder is unknown, or is not in `data_dir` and cannot be prepared there.
      ImportError: if an embedded dataset must be prepared and scikit-learn is missing, or Pillow for a folder.
      ValueError: if the dataset has no split of this name, no single 8-bit image per example, or no fixed image size
        and `image_size` is missing; if the crop leaves the image, `grey_levels` does not divide the dataset's own, `shifts`
        is negative or larger than a side of the image, or dropping the remainder leaves no batch; if `validation_split` is
        no share, leaves no image for training or comes without `subset`, or `subset` is unknown or comes without
        `validation_split`; if a folder has less than two images, some that cannot be decoded, some of another size (without
        `image_size`), or colour images after a grey one; if `background` is no colour; if `background` or `files` is given
        for a dataset that is no folder, or `files` for one that is shuffled or repeated; if `labels` is given together with
        `files`, or for a dataset without labels or of several, none of them named "label".

    #### Example

    >>> import tfp_dimflows as dimflows
    >>> dataset = dimflows.data.load("digits", "train[:90%]", batch_size=64)
    >>> dataset.element_spec
    TensorSpec(shape=(64, 8, 8, 1), dtype=tf.uint8, name=None)
    >>> len(dataset)
    20

    A tenth of the training images for validation, the others with labels and augmented:

    >>> tenth = dict(batch_size=64, validation_split=0.1)
    >>> training = dimflows.data.load("digits", subset="training", **tenth, shifts=1, labels=True)
    >>> training.element_spec
    (TensorSpec(shape=(64, 8, 8, 1), dtype=tf.uint8, name=None), TensorSpec(shape=(64,), dtype=tf.int64, name=None))
    >>> [len(images) for images in dimflows.data.load("digits", subset="validation", **tenth)]
    [64, 64, 16]
    """
    import tensorflow_datasets as tfds

    _check_subset(name, validation_split, subset)
    if labels and files:
        raise ValueError(f"Dataset {name!r}: got labels=True and files=True, needs one of them at most.")
    source = _open_source(name, image_size, crop, grey_levels, background, data_dir)
    height, width, _ = source.event_shape
    if not 0 <= shifts <= min(height, width):
        raise ValueError(f"Dataset {name!r}: got shifts={shifts}, needs 0 to {min(height, width)} pixels.")
    label_key = _label_key(source.builder)
    if labels and label_key is None:
        raise ValueError(
            f"Dataset {name!r}: got labels=True, needs a single tfds.features.ClassLabel per example, or one named 'label'; "
            f"its features are {source.builder.info.features}."
        )
    num_images = _num_images(source, split)
    if subset is not None:
        is_chosen = _is_in_subset(name, split, num_images, validation_split, subset, validation_seed)
        num_images = int(is_chosen.sum())
    is_train = split.startswith("train") and subset != "validation"
    shuffle = is_train if shuffle is None else shuffle
    drop_remainder = is_train if drop_remainder is None else drop_remainder
    if drop_remainder and not repeat and num_images < batch_size:
        part = "" if subset is None else f" (subset {subset!r})"
        raise ValueError(
            f"Split {split!r} of dataset {name!r}{part} has {num_images} images, less than one batch of {batch_size}: "
            "pass a smaller batch_size or drop_remainder=False."
        )

    if files and (shuffle or repeat or "file" not in source.builder.info.features):
        raise ValueError(f"Dataset {name!r}: got files=True, needs a folder of images, shuffle=False and repeat=False.")

    examples = source.builder.as_dataset(
        split=split,
        shuffle_files=shuffle and not repeat and subset is None,  # a subset is chosen by the order of the files
        decoders={source.image_key: tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(
            shuffle_seed=seed,
            try_autocache=False,
            enable_ordering_guard=False,  # shuffling is the caller's choice, also for datasets stored in order
        ),
    )
    keys = [source.image_key, *([label_key] if labels else []), *(["file"] if files else [])]
    examples = examples.map(lambda example: tuple(example[key] for key in keys))
    if subset is not None:
        examples = _chosen(examples, is_chosen)
    if shuffle and repeat:
        examples = endlessly_shuffled(examples, seed)
    elif shuffle:
        examples = examples.shuffle(min(num_images, _SHUFFLE_BUFFER), seed=seed)
    elif repeat:
        examples = examples.repeat()
    examples = examples.map(lambda image, *others: (source.decode(image), *others), num_parallel_calls=tf.data.AUTOTUNE)
    batches = examples.batch(batch_size, drop_remainder=drop_remainder)
    if flips or shifts:
        if repeat:
            seeds = tf.data.Dataset.counter().map(lambda step: tf.stack([tf.constant(seed, tf.int64), step]))
        else:
            seeds = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).batch(2, drop_remainder=True)
        batches = tf.data.Dataset.zip(batches, seeds).map(
            lambda batch, seed: (_augmented(batch[0], flips, shifts, seed), *batch[1:]), num_parallel_calls=tf.data.AUTOTUNE
        )
    if len(keys) == 1:
        batches = batches.map(lambda images: images)  # no tuples of one
    options = tf.data.Options()
    # Autotuning has a thread that sleeps for up to a minute, and the end of an iterator, and with it of `fit`, can wait for it.
    options.autotune.enabled = False
    # Between machines, TensorFlow's default shards by file and fails on datasets of fewer files than machines.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)


def _check_subset(name: str | os.PathLike[str], validation_split: float, subset: str | None) -> None:
    if not 0 <= validation_split < 1:
        raise ValueError(f"Dataset {name!r}: got validation_split={validation_split}, needs a share between 0 and 1.")
    if subset not in (None, *_SUBSETS):
        raise ValueError(f"Dataset {name!r}: got subset={subset!r}, needs one of {_SUBSETS}.")
    if bool(validation_split) != (subset is not None):
        raise ValueError(
            f"Dataset {name!r}: got validation_split={validation_split} and subset={subset!r}, needs both or neither of them."
        )


def _is_in_subset(
    name: str | os.PathLike[str], split: str, num_images: int, validation_split: float, subset: str, seed: int
) -> np.ndarray:
    """Which images of a split are in the subset: bools `[num_images]`."""
    num_validation = max(1, round(validation_split * num_images))
    if num_validation >= num_images:
        raise ValueError(
            f"Split {split!r} of dataset {name!r} has {num_images} images: "
            f"validation_split={validation_split} leaves none for training."
        )
    is_validation = np.random.default_rng(seed).permutation(num_images) < num_validation
    return is_validation if subset == "validation" else ~is_validation


def _chosen(examples: tf.data.Dataset, is_chosen: np.ndarray) -> tf.data.Dataset:
    chosen = examples.enumerate().filter(lambda index, example: tf.constant(is_chosen)[index])
    return chosen.map(lambda index, example: example).apply(tf.data.experimental.assert_cardinality(int(is_chosen.sum())))


def _augmented(images: tf.Tensor, flips: bool, shifts: int, seed: tf.Tensor) -> tf.Tensor:
    """A batch of images, each mirrored or not and moved in a way of its own."""
    if flips:
        images = tf.image.stateless_random_flip_left_right(images, seed)
    if shifts:
        seed = tf.random.experimental.stateless_fold_in(seed, 1)
        corners = tf.random.stateless_uniform([2, tf.shape(images)[0], 1], seed, maxval=2 * shifts + 1, dtype=tf.int32)
        for axis in (1, 2):
            side = tf.range(images.shape[axis])
            mirrored = tf.pad(side, [[shifts, shifts]], mode="SYMMETRIC")  # takes a tenth of the time of padding images
            images = tf.gather(images, tf.gather(mirrored, corners[axis - 1] + side), axis=axis, batch_dims=1)
    return images


def endlessly_shuffled(examples: tf.data.Dataset, seed: int) -> tf.data.Dataset:
    """Passes over the examples (tuples), each with blocks of them in another order; the same in each iteration.

    `Dataset.shuffle` has a generator of seeds that goes on from one iterator to the next.
    """

    def shuffled(number: tf.Tensor, index: tf.Tensor, block: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
        seed_of_pass = tf.random.experimental.stateless_fold_in(tf.constant([0, seed], tf.int64), number)
        seed_of_block = tf.random.experimental.stateless_fold_in(seed_of_pass, index)
        order = tf.random.experimental.stateless_shuffle(tf.range(tf.shape(block[0])[0]), seed_of_block)
        return tuple(tf.gather(part, order) for part in block)

    def one_pass(number: tf.Tensor) -> tf.data.Dataset:
        blocks = examples.batch(_SHUFFLE_BUFFER).enumerate()
        return blocks.map(lambda index, block: shuffled(number, index, block)).unbatch()

    passes = tf.data.Dataset.counter().flat_map(one_pass)
    return passes.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))


@dataclasses.dataclass(frozen=True)
class _Source:
    """A prepared dataset, and what becomes of its images."""

    name: str
    builder: Any
    image_key: str
    own_grey_levels: int
    crop: tuple[int, int, int, int] | None
    event_shape: tuple[int, int, int]
    grey_levels: int

    def decode(self, encoded: tf.Tensor) -> tf.Tensor:
        """Decodes one stored image and brings it to `event_shape` and `grey_levels`."""
        image = self.builder.info.features[self.image_key].decode_example(encoded)
        if self.crop is not None:
            image = tf.image.crop_to_bounding_box(image, *self.crop)
        if image.shape != self.event_shape:
            resized = tf.image.resize(image, self.event_shape[:2], method="bilinear", antialias=True)
            image = tf.cast(tf.round(resized), image.dtype)
        image //= self.own_grey_levels // self.grey_levels
        tf.debugging.assert_less(
            tf.cast(tf.reduce_max(image), tf.int32),
            self.grey_levels,
            message=f"Dataset {self.name!r} has an image value outside its {self.grey_levels} levels.",
        )
        return image


def _open_source(
    name: str | os.PathLike[str],
    image_size: int | tuple[int, int] | None,
    crop: tuple[int, int, int, int] | None,
    grey_levels: int | None,
    background: str,
    data_dir: str | os.PathLike[str] | None,
) -> _Source:
    from tfp_dimflows.data import embedded
    from tfp_dimflows.data.folder import FolderImages

    directory = data_directory(data_dir)
    folder = as_folder(name)
    name = os.fspath(name if folder is None else folder)
    if folder is not None:
        make = functools.partial(FolderImages, folder, image_size is None, background)
    elif background == "white":
        make = functools.partial(find_builder, name)
    else:
        raise ValueError(f"Dataset {name!r}: got background={background!r}, which is for folders of images only.")
    builder = make(directory)
    is_made_here = folder is not None or builder.name in embedded.BUILDERS
    if is_made_here and not builder.data_path.exists() and not _is_writable(directory):
        builder = make(os.path.expanduser(DEFAULT_DATA_DIR))
    own_grey_levels = embedded.BUILDERS[builder.name].LEVELS if builder.name in embedded.BUILDERS else 256
    grey_levels = own_grey_levels if grey_levels is None else grey_levels
    if grey_levels < 2 or own_grey_levels % grey_levels:
        raise ValueError(f"Dataset {name!r} has {own_grey_levels} levels, which grey_levels={grey_levels} does not divide.")
    if builder.name == "celeb_a" and image_size is not None and crop is None:
        crop = _CELEB_A_CROP
    image_key = _image_key(name, builder)
    event_shape = _event_shape(name, builder.info.features[image_key].shape, crop, image_size)
    return _Source(name, _prepare(name, builder, make), image_key, own_grey_levels, crop, event_shape, grey_levels)


def _prepare(name: str, builder: Any, make: Callable[[str], Any]) -> Any:
    """Returns the builder of a dataset that is ready to be read, after preparing it where need be."""
    from tfp_dimflows.data.folder import FolderError

    if builder.data_path.exists():
        return builder
    directory = os.fspath(builder.data_dir_root)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS announces the preparation on stdout
            builder.download_and_prepare()
    except (ImportError, FolderError):
        raise
    except Exception as error:
        if not builder.data_path.exists():
            raise FileNotFoundError(
                f"Dataset {name!r} is not in {directory} and could not be prepared there: {error}\n"
                "Pass the data_dir (or set TFDS_DATA_DIR) that holds it, or prepare it with network access by "
                f"tfds.load({name!r}, data_dir={directory!r})."
            ) from error
        return make(directory)  # another process finished preparing it first
    return builder


def _is_writable(directory: str) -> bool:
    path = pathlib.Path(directory).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    # The superuser may write anywhere; the mode still tells that a directory is meant to be read-only.
    any_write = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
    return os.access(existing, os.W_OK) and bool(existing.stat().st_mode & any_write)


def _image_key(name: str, builder: Any) -> str:
    import tensorflow_datasets as tfds

    features = builder.info.features
    keys = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    if "image" in keys:
        keys = ["image"]
    if len(keys) != 1:
        raise ValueError(f"Dataset {name!r} has no single image per example; its features are {features}.")
    dtype = features[keys[0]].np_dtype
    if dtype != np.uint8:
        raise ValueError(f"Dataset {name!r} has {np.dtype(dtype).name} images, need uint8.")
    return keys[0]


def _label_key(builder: Any) -> str | None:
    """The feature that is an image's label, if there is no doubt about it."""
    import tensorflow_datasets as tfds

    keys = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if "label" in keys:
        return "label"
    return keys[0] if len(keys) == 1 else None


def _event_shape(
    name: str,
    shape: tuple[int | None, int | None, int],
    crop: tuple[int, int, int, int] | None,
    image_size: int | tuple[int, int] | None,
) -> tuple[int, int, int]:
    """Returns `(height, width, channels)` after crop and resize."""
    height, width, channels = shape
    if crop is not None:
        top, left, crop_height, crop_width = crop
        leaves_image = (height and top + crop_height > height) or (width and left + crop_width > width)
        if min(top, left) < 0 or min(crop_height, crop_width) < 1 or leaves_image:
            raise ValueError(f"Dataset {name!r}: crop {crop} (top, left, height, width) leaves the image {shape}.")
        height, width = crop_height, crop_width
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height is None or width is None:
        raise ValueError(f"Dataset {name!r} has images of varying size {shape}: pass image_size.")
    return height, width, channels


def _num_images(source: _Source, split: str) -> int:
    splits = source.builder.info.splits
    try:
        return splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise ValueError(f"Dataset {source.name!r} has no split {split!r}; its splits are {list(splits)}.") from error
