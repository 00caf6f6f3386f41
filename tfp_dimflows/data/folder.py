"""TFDS builder of the images in a folder of one's own."""

import functools
import hashlib
import io
import itertools
import math
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
OTHER_IMAGES = (
    *(".avif", ".eps", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jxl", ".pbm", ".pgm", ".ppm", ".psd", ".svg", ".tga"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"),
)
TEST_SHARE = 0.1
MAX_NAMES = 10

Result = TypeVar("Result")


class FolderError(ValueError):
    """What is wrong with a folder."""


class FolderImages(tfds.core.GeneratorBasedBuilder):
    """The images of a folder and of the folders in it, prepared as a TFDS dataset of its own.

    With folders `train` and `test` in it these are the splits; otherwise a tenth of the images, chosen by their paths, is the
    test split. A folder whose files have changed is another dataset. Colour or grey is decided by the first image.

    A file is judged by its content, not by its suffix. Pillow decodes its first frame, turns it as its EXIF orientation says,
    brings it to 8 bits of grey or RGB (a palette is colour; of 16 bits the upper 8 are kept) and puts what is transparent on
    the background. Stored is the file itself if it is a PNG or JPEG of which TensorFlow reads the same, else a PNG.

    Args:
      folder: the folder, with images of `SUFFIXES`.
      one_size: whether all images must have the same height and width.
      background: the colour behind transparent images, a name or code that Pillow knows.
      data_dir: where TFDS keeps its datasets.

    Raises:
      FolderError: for less than two images, some that cannot be used, or an unknown colour.
      ImportError: if Pillow is missing.
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release.", "2.0.0": "Decoded by Pillow: orientation, transparency, more formats."}

    def __init__(self, folder: str | os.PathLike, one_size: bool, background: str, data_dir: str):
        self._folder = pathlib.Path(folder)
        self._background = self._colour(background)
        files = self._files()
        if len(files) < 2:
            raise FolderError(f"Folder {folder} has {len(files)} images ({', '.join(SUFFIXES)}), needs two or more.")
        self._splits = self._split(files)
        files = sorted(itertools.chain(*self._splits.values()))
        self._first = files[0]
        height, width, self._channels = self._or_all_errors(self._decode, self._first).pixels.shape
        self._shape = (height, width) if one_size else (None, None)
        stats = [(self._key(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        digest = hashlib.md5(repr([one_size, self._background, *stats]).encode()).hexdigest()[:12]
        config = tfds.core.BuilderConfig(name=re.sub(r"\W", "_", self._folder.resolve().name) + f"-{digest}")
        super().__init__(data_dir=data_dir, config=config)

    def _colour(self, name: str) -> tuple[int, ...]:
        try:
            from PIL import ImageColor
        except ImportError as error:
            raise ImportError(
                f"Folder {self._folder}: Pillow reads its images: pip install 'tfp-dimflows[demo]' ({error})"
            ) from error
        try:
            return ImageColor.getrgb(name)[:3]
        except ValueError as error:
            raise FolderError(
                f"Folder {self._folder}: got background={name!r}, needs a colour such as 'white' or '#ff8000'."
            ) from error

    def _files(self) -> list[pathlib.Path]:
        files = sorted(path for path in self._folder.rglob("*") if "/." not in f"/{self._key(path)}" and path.is_file())
        if others := [self._key(path) for path in files if path.suffix.lower() in OTHER_IMAGES]:
            names = ", ".join(others[:MAX_NAMES]) + (", ..." if len(others) > MAX_NAMES else "")
            _warn_once(f"Folder {self._folder}: {len(others)} images are ignored, not being {', '.join(SUFFIXES)}: {names}")
        return [path for path in files if path.suffix.lower() in SUFFIXES]

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
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(shape=(*self._shape, self._channels)), "file": tfds.features.Text()}
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(files) for split, files in self._splits.items()}

    def _generate_examples(self, files: list[pathlib.Path]) -> Iterator:
        for path in files:
            yield self._key(path), {"image": self._or_all_errors(self._stored, path), "file": self._key(path)}

    def _or_all_errors(self, use: Callable[[pathlib.Path], Result], path: pathlib.Path) -> Result:
        """Returns `use(path)`, or raises one error for all files of which `use` fails."""
        try:
            return use(path)
        except FolderError as error:
            errors = {path: str(error)}
        for other in itertools.chain(*self._splits.values()):
            try:
                if other not in errors:
                    use(other)
            except FolderError as error:
                errors[other] = str(error)
        lines = [errors[path] for path in sorted(errors)]
        if len(lines) > MAX_NAMES:
            lines[MAX_NAMES:] = [f"and {len(lines) - MAX_NAMES} more"]
        raise FolderError(f"Folder {self._folder}: cannot use {len(errors)} of its images:\n  " + "\n  ".join(lines))

    def _decode(self, path: pathlib.Path) -> "_Decoded":
        from PIL import UnidentifiedImageError

        try:
            return _decode(path.read_bytes(), self._background)
        except UnidentifiedImageError as error:
            raise FolderError(f"{self._key(path)} is no image of the formats {', '.join(FORMATS)}") from error
        except Exception as error:  # Pillow raises many
            raise FolderError(f"{self._key(path)} cannot be read: {error}") from error

    def _stored(self, path: pathlib.Path) -> bytes:
        """What reading decodes to the pixels of an image: the file's content or a PNG."""
        content, pixels, may_be_kept = self._decode(path)
        height, width, channels = pixels.shape
        if self._shape not in ((None, None), (height, width)):
            raise FolderError(
                f"{self._key(path)} is {height} x {width}, {self._key(self._first)} has another size: pass image_size"
            )
        if channels > self._channels:
            pixels, *others = np.split(pixels, channels, axis=-1)
            if not all(np.array_equal(pixels, other) for other in others):
                raise FolderError(f"{self._key(path)} is in colour, {self._key(self._first)} is grey: convert one of them")
        elif channels < self._channels:
            pixels = np.repeat(pixels, self._channels, axis=-1)
        if may_be_kept and self._reads_same(content, pixels):
            return content
        return tf.io.encode_png(pixels, compression=1).numpy()  # the default takes 9 times as long for 4/5 of the bytes

    def _reads_same(self, content: bytes, pixels: np.ndarray) -> bool:
        try:
            read = self.info.features["image"].decode_example(content)
        except (tf.errors.OpError, ValueError):
            return False
        return bool(tf.io.is_jpeg(content)) or np.array_equal(read, pixels)  # decoders of JPEG differ in rounding


class _Decoded(NamedTuple):
    """The content of a file, its pixels `[height, width, 1 or 3]`, and whether TensorFlow may read the same."""

    content: bytes
    pixels: np.ndarray
    may_be_kept: bool


def _decode(content: bytes, background: tuple[int, ...]) -> _Decoded:
    from PIL import ExifTags, Image, ImageOps

    image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    file_format, mode = image.format, image.mode
    is_turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    if mode in ("I", "F"):
        raise ValueError("its values have 32 bits, needs 8 or 16")
    if file_format == "PNG" and mode != "P" and "transparency" in image.info:
        # Pillow takes one transparent colour for one of 8 bits per channel, whatever the file has.
        with_alpha = Image.fromarray(tf.io.decode_png(content, channels=4).numpy())
        with_alpha.info, image = image.info, with_alpha
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    is_grey = mode in ("1", "L", "LA") or mode.startswith("I;16")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image.convert("RGBA"))
        image, is_grey = canvas, is_grey and len(set(background)) == 1
    shown = "L" if is_grey else "RGB"
    pixels = np.asarray(image if image.mode == shown else image.convert(shown)).reshape(image.height, image.width, -1)
    is_plain_jpeg = file_format in ("JPEG", "MPO") and mode in ("L", "RGB") and not is_turned
    return _Decoded(content, pixels, is_plain_jpeg or file_format == "PNG")


@functools.cache
def _warn_once(message: str) -> None:
    """Warns once of a folder that is opened several times."""
    warnings.warn(message, stacklevel=1)
