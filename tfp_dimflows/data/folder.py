"""TFDS builder of the images in a folder of one's own."""

import hashlib
import math
import os
import pathlib
import re
from collections.abc import Iterator

import tensorflow as tf
import tensorflow_datasets as tfds

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png")
TEST_SHARE = 0.1


class FolderError(ValueError):
    """What is wrong with a folder."""


class FolderImages(tfds.core.GeneratorBasedBuilder):
    """The images of a folder and of the folders in it, prepared as a TFDS dataset of its own.

    With folders `train` and `test` in it these are the splits; otherwise a tenth of the images, chosen by their paths, is the
    test split. A folder whose files have changed is another dataset. Colour or grey is decided by the first image.

    Args:
      folder: the folder, with images in PNG, JPEG or BMP.
      one_size: whether all images must have the same height and width.
      data_dir: where TFDS keeps its datasets.

    Raises:
      FolderError: for less than two images, or one that cannot be decoded.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}

    def __init__(self, folder: str | os.PathLike, one_size: bool, data_dir: str):
        self._folder = pathlib.Path(folder)
        files = sorted(path for path in self._folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if len(files) < 2:
            raise FolderError(f"Folder {folder} has {len(files)} images ({', '.join(SUFFIXES)}), needs two or more.")
        self._splits = self._split(files)
        files = sorted(path for split in self._splits.values() for path in split)
        self._first = files[0]
        height, width, channels = _decode(self._first).shape
        self._channels = 1 if channels <= 2 else 3
        self._shape = (height, width) if one_size else (None, None)
        stats = [(self._key(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        digest = hashlib.md5(repr([one_size, *stats]).encode()).hexdigest()[:12]
        config = tfds.core.BuilderConfig(name=re.sub(r"\W", "_", self._folder.resolve().name) + f"-{digest}")
        super().__init__(data_dir=data_dir, config=config)

    def _key(self, path: pathlib.Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _split(self, files: list[pathlib.Path]) -> dict[str, list[pathlib.Path]]:
        named = {name: [f for f in files if f.relative_to(self._folder).parts[0] == name] for name in ("train", "test")}
        if all(named.values()):
            return named
        by_hash = sorted(files, key=lambda path: hashlib.md5(self._key(path).encode()).digest())
        num_test = math.ceil(TEST_SHARE * len(files))
        return {"train": by_hash[num_test:], "test": by_hash[:num_test]}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images of a folder.",
            features=tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(*self._shape, self._channels))}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(files) for split, files in self._splits.items()}

    def _generate_examples(self, files: list[pathlib.Path]) -> Iterator:
        for path in files:
            height, width, channels = _decode(path).shape
            if self._shape not in ((None, None), (height, width)):
                raise FolderError(f"{path} is {height} x {width}, {self._first} has another size: pass image_size.")
            if self._channels == 1 and channels > 2:
                raise FolderError(f"{path} is in colour, {self._first} is grey: convert one of them.")
            yield self._key(path), {"image": os.fspath(path)}


def _decode(path: pathlib.Path) -> tf.Tensor:
    try:
        return tf.io.decode_image(tf.io.read_file(os.fspath(path)), expand_animations=False)
    except tf.errors.InvalidArgumentError as error:
        raise FolderError(f"{path} is no image that TensorFlow decodes.") from error
