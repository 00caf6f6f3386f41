"""TFDS builders whose images ship with scikit-learn, so that nothing is downloaded.

Importing this module registers the builders with TFDS under the names `digits` and `photo_patches`.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

PHOTO_HEIGHT, PHOTO_WIDTH = 427, 640
PATCH_SIZE = 32
TEST_COLUMNS = range(224, 352)
TRAIN_STRIDE, TEST_STRIDE = 10, 16


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits: scikit-learn's `load_digits`, 8x8 pixels of 17 grey levels (0 to 16)."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}
    LEVELS = 17

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="1,797 handwritten digits, 8x8 pixels of 17 grey levels, split at random within each class.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        with _needs_demo_extra(self.name):
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        digits = load_digits()
        train, test = train_test_split(np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
        return {
            "train": self._generate_examples(digits.images, digits.target, train),
            "test": self._generate_examples(digits.images, digits.target, test),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> Iterator:
        for index in indices:
            yield int(index), {"image": images[index, :, :, None].astype(np.uint8), "label": labels[index]}


class PhotoPatches(tfds.core.GeneratorBasedBuilder):
    """Patches of 32x32 pixels from scikit-learn's two sample photographs, with 256 levels per channel.

    A vertical strip of each photograph (`TEST_COLUMNS`) is reserved for the test split: no training patch touches it,
    and no test patch leaves it.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}
    LEVELS = 256

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Overlapping 32x32 patches of two colour photographs; train and test share no pixel.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(PATCH_SIZE, PATCH_SIZE, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=["china", "flower"]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/datasets/loading_other_datasets.html#sample-images",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        with _needs_demo_extra(self.name):
            from sklearn.datasets import load_sample_images

            photos = load_sample_images().images
        return {split: self._generate_examples(photos, split) for split in ("train", "test")}

    def _generate_examples(self, photos: list[np.ndarray], split: str) -> Iterator:
        for label, photo in enumerate(photos):
            for top, left in patch_corners(split):
                patch = photo[top : top + PATCH_SIZE, left : left + PATCH_SIZE]
                yield f"{label}_{top}_{left}", {"image": patch, "label": label}


BUILDERS = {builder.name: builder for builder in (Digits, PhotoPatches)}


def patch_corners(split: str) -> list[tuple[int, int]]:
    """Lists the top left corners of a split's patches, the same in both photographs.

    Args:
      split: `"train"` or `"test"`.

    Returns:
      Pairs `(top, left)` on a regular grid: of `TRAIN_STRIDE` outside `TEST_COLUMNS`, of `TEST_STRIDE` inside.

    #### Example

    >>> from tfp_dimflows.data import embedded
    >>> len(embedded.patch_corners("train")), len(embedded.patch_corners("test"))
    (1800, 175)
    """
    first, end = TEST_COLUMNS.start, TEST_COLUMNS.stop
    if split == "test":
        stride, lefts = TEST_STRIDE, list(range(first, end - PATCH_SIZE + 1, TEST_STRIDE))
    else:
        stride, grid = TRAIN_STRIDE, range(0, PHOTO_WIDTH - PATCH_SIZE + 1, TRAIN_STRIDE)
        lefts = [left for left in grid if left + PATCH_SIZE <= first or left >= end]
    return [(top, left) for top in range(0, PHOTO_HEIGHT - PATCH_SIZE + 1, stride) for left in lefts]


@contextlib.contextmanager
def _needs_demo_extra(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"Dataset {name!r} is made from scikit-learn's images: pip install 'tfp-dimflows[demo]' ({error})"
        ) from error
