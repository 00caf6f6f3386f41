"""Data pipelines: shapes, values, order, splits, embedded datasets, folders, errors."""

import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from registry import slow
from sklearn.datasets import load_digits, load_sample_images

from tfp_dimflows import cli, data, training
from tfp_dimflows.data import embedded


class VaryingSize(tfds.core.GeneratorBasedBuilder):
    """Grey ramps of two sizes, under other keys than `image` and `label`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "picture": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "kind": tfds.features.ClassLabel(names=["narrow", "wide"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for width in (12, 20):
            ramp = np.tile(np.arange(width, dtype=np.uint8)[None, :, None], [10, 1, 1])
            yield width, {"picture": ramp, "kind": "narrow" if width == 12 else "wide"}


class FineAndCoarse(tfds.core.GeneratorBasedBuilder):
    """Grey images with two labels, one of them called `label`."""

    VERSION = tfds.core.Version("1.0.0")
    FINE = "label"

    def _info(self):
        image = tfds.features.Image(shape=(2, 2, 1), encoding_format="png")
        labels = {"coarse": tfds.features.ClassLabel(num_classes=2), self.FINE: tfds.features.ClassLabel(num_classes=6)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"image": image, **labels}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for k in range(6):
            yield k, {"image": np.full([2, 2, 1], k, np.uint8), "coarse": k // 3, self.FINE: k}


class NoMainLabel(FineAndCoarse):
    """Two labels, neither of them called `label`."""

    FINE = "fine"


class TwoImages(tfds.core.GeneratorBasedBuilder):
    """Two images per example, neither of them called `image`; never prepared."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {side: tfds.features.Image(shape=(4, 4, 1), encoding_format="png") for side in ("left", "right")}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        pytest.fail("an unusable dataset was prepared")

    def _generate_examples(self):
        pass


class DeepGrey(tfds.core.GeneratorBasedBuilder):
    """Images of 16 bits; never prepared."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16, encoding_format="png")}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        pytest.fail("an unusable dataset was prepared")

    def _generate_examples(self):
        pass


@pytest.fixture(scope="session")
def embedded_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("embedded")


@pytest.fixture(scope="session")
def sharded_dir(tmp_path_factory):
    """The digits in several files."""
    directory = tmp_path_factory.mktemp("sharded")
    builder = tfds.builder("digits", data_dir=directory)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=8))
    assert builder.info.splits["train"].num_shards == 8
    return directory


@pytest.fixture(scope="session")
def tfds_dir():
    default = pathlib.Path(__file__).parents[2] / "shared" / "tfds"
    directory = pathlib.Path(os.environ.get("TFDS_DATA_DIR", default))
    if not ((directory / "mnist").exists() and (directory / "cifar10").exists()):
        pytest.skip(f"mnist and cifar10 are not prepared in {directory}")
    return directory


@pytest.fixture(scope="session")
def celeb_a_dir(tmp_path_factory):
    """A dataset with the name, version and features of TFDS's `celeb_a`; red is the row, green the column."""
    directory = tmp_path_factory.mktemp("celeb_a")
    original = tfds.builder("celeb_a", data_dir=directory)
    features = original.info.features
    rows, columns = np.mgrid[:218, :178]
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)

    with tfds.core.registered.skip_registration():

        class RowsAndColumns(tfds.core.GeneratorBasedBuilder):
            name = "celeb_a"
            VERSION = original.version

            def _info(self):
                image_feature = tfds.features.Image(shape=(218, 178, 3), encoding_format="png")
                png_features = tfds.features.FeaturesDict({**features, "image": image_feature})
                return tfds.core.DatasetInfo(builder=self, features=png_features)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                example = {key: dict.fromkeys(features[key], 0) for key in features if key != "image"}
                yield 0, {"image": image, **example}

        RowsAndColumns(data_dir=directory).download_and_prepare()
    return directory


def images_of(dataset):
    return np.concatenate(list(dataset.as_numpy_iterator()))


def same_multiset(images, others):
    return sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in others)


def fail_to_prepare(builder):
    raise ConnectionError("no route to host")


class TestDigits:
    def test_batches(self, embedded_dir):
        dataset = data.load("digits", batch_size=64, data_dir=embedded_dir)
        assert dataset.element_spec == tf.TensorSpec([64, 8, 8, 1], tf.uint8)
        assert len(dataset) == 1437 // 64
        assert all(batch.shape == (64, 8, 8, 1) for batch in dataset)
        test = data.load("digits", "test", batch_size=100, data_dir=embedded_dir)
        assert test.element_spec == tf.TensorSpec([None, 8, 8, 1], tf.uint8)
        assert [len(batch) for batch in test] == [100, 100, 100, 60]

    def test_shards_by_example_between_machines(self, embedded_dir):
        options = data.load("digits", batch_size=64, flips=True, data_dir=embedded_dir).options()
        assert options.experimental_distribute.auto_shard_policy == tf.data.experimental.AutoShardPolicy.DATA

    def test_an_iterator_that_ends_has_no_thread_to_wait_for(self, embedded_dir):
        assert not data.load("digits", batch_size=64, repeat=True, data_dir=embedded_dir).options().autotune.enabled

    def test_splits_are_all_of_scikit_learns_digits(self, embedded_dir):
        train, test = (
            images_of(data.load("digits", split, batch_size=99, drop_remainder=False, data_dir=embedded_dir))
            for split in ("train", "test")
        )
        assert (len(train), len(test)) == (1437, 360)
        assert train.min() == test.min() == 0 and train.max() == test.max() == 16
        expected = load_digits().images.astype(np.uint8)
        assert same_multiset(np.concatenate([train, test]), expected)

    def test_split_is_stratified(self, embedded_dir):
        data.info("digits", data_dir=embedded_dir)
        builder = tfds.builder("digits", data_dir=embedded_dir)
        train, test = (
            np.bincount([example["label"] for example in builder.as_dataset(split=split).as_numpy_iterator()])
            for split in ("train", "test")
        )
        np.testing.assert_array_equal(train + test, np.bincount(load_digits().target))
        np.testing.assert_allclose(test / (train + test), 0.2, atol=0.01)

    def test_values_outside_the_levels_are_an_error(self, embedded_dir, monkeypatch):
        monkeypatch.setattr(embedded.Digits, "LEVELS", 16)
        dataset = data.load("digits", batch_size=64, data_dir=embedded_dir)
        with pytest.raises(tf.errors.InvalidArgumentError, match="digits.* has an image value outside its 16 levels"):
            list(dataset)


class TestPhotoPatches:
    def test_train_and_test_share_no_pixel(self):
        covered = {split: np.zeros([embedded.PHOTO_HEIGHT, embedded.PHOTO_WIDTH], int) for split in ("train", "test")}
        for split, count in covered.items():
            for top, left in embedded.patch_corners(split):
                patch = count[top : top + embedded.PATCH_SIZE, left : left + embedded.PATCH_SIZE]
                assert patch.shape == (embedded.PATCH_SIZE, embedded.PATCH_SIZE)
                patch += 1
        assert not np.any((covered["train"] > 0) & (covered["test"] > 0))
        assert np.mean(covered["train"] > 0) > 0.7 and np.mean(covered["test"] > 0) > 0.15

    @pytest.mark.parametrize("split, size", [slow("train", 3600), ("test", 350)])
    def test_patches_are_where_patch_corners_says(self, embedded_dir, split, size):
        images = images_of(data.load("photo_patches", split, batch_size=100, drop_remainder=False, data_dir=embedded_dir))
        corners = embedded.patch_corners(split)
        assert len(set(corners)) == len(corners)
        expected = [photo[t : t + 32, x : x + 32] for photo in load_sample_images().images for t, x in corners]
        assert images.shape == (size, 32, 32, 3) and images.dtype == np.uint8
        assert same_multiset(images, expected)

    def test_photographs_have_the_size_that_the_grid_assumes(self):
        shapes = [photo.shape for photo in load_sample_images().images]
        assert shapes == [(embedded.PHOTO_HEIGHT, embedded.PHOTO_WIDTH, 3)] * 2


class TestOrder:
    def load(self, embedded_dir, **kwargs):
        return data.load("digits", kwargs.pop("split", "train[:250]"), batch_size=100, data_dir=embedded_dir, **kwargs)

    def test_seed_determines_the_sequence_of_epochs(self, embedded_dir):
        first, same, other = (self.load(embedded_dir, seed=seed, drop_remainder=False) for seed in (1, 1, 2))
        epochs = [images_of(first), images_of(first)]
        np.testing.assert_array_equal(epochs[0], images_of(same))
        np.testing.assert_array_equal(epochs[1], images_of(same))
        another = images_of(other)
        assert np.any(epochs[0] != epochs[1]) and np.any(epochs[0] != another)
        assert same_multiset(epochs[0], epochs[1])
        assert same_multiset(epochs[0], another)

    def test_only_train_shuffles_by_default(self, embedded_dir):
        test = self.load(embedded_dir, split="test[:150]", seed=1)
        unshuffled = images_of(test)
        np.testing.assert_array_equal(unshuffled, images_of(test))
        np.testing.assert_array_equal(unshuffled, images_of(self.load(embedded_dir, split="test[:150]", seed=2)))
        plain = images_of(self.load(embedded_dir, shuffle=False, seed=1))
        np.testing.assert_array_equal(plain, images_of(self.load(embedded_dir, shuffle=False, seed=2)))
        assert np.any(plain != images_of(self.load(embedded_dir)))
        assert np.any(unshuffled != images_of(self.load(embedded_dir, split="test[:150]", shuffle=True)))

    def test_repeat_goes_on_and_reshuffles(self, embedded_dir):
        dataset = self.load(embedded_dir, split="train[:150]", repeat=True)
        assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY
        images = images_of(dataset.take(6))
        assert images.shape == (600, 8, 8, 1)
        epochs = np.reshape(images, [4, 150, 8, 8, 1])
        assert np.any(epochs[0] != epochs[1])
        for epoch in epochs[1:]:
            assert same_multiset(epoch, epochs[0])

    @pytest.mark.parametrize("flips", [slow(False), True])
    def test_repeated_data_are_the_same_in_each_iteration(self, flips, embedded_dir):
        def load(seed):
            return self.load(embedded_dir, split="train[:150]", repeat=True, flips=flips, seed=seed)

        dataset = load(1)
        images = images_of(dataset.take(6))
        np.testing.assert_array_equal(images_of(dataset.take(6)), images)
        tf.random.set_seed(0)
        np.testing.assert_array_equal(images_of(load(1).skip(4).take(2)), images[400:])
        assert np.any(images_of(load(2).take(6)) != images)

    @pytest.mark.slow
    def test_files_are_read_in_an_order_of_their_own(self, sharded_dir):
        sequences = []
        for seed in (7, 8):
            tf.random.set_seed(seed)
            sequences.append(images_of(data.load("digits", batch_size=100, repeat=True, data_dir=sharded_dir).take(16)))
        np.testing.assert_array_equal(*sequences)

    def test_flips_mirror_about_half_of_the_images(self, embedded_dir):
        plain = images_of(self.load(embedded_dir, shuffle=False))
        mirrored = plain[:, :, ::-1]
        dataset = self.load(embedded_dir, shuffle=False, flips=True, seed=1)
        assert dataset.element_spec == tf.TensorSpec([100, 8, 8, 1], tf.uint8)
        epochs = [images_of(dataset), images_of(dataset)]
        is_plain, is_mirrored = (np.all(epochs[0] == images, axis=(1, 2, 3)) for images in (plain, mirrored))
        assert np.all(is_plain | is_mirrored)
        assert 0.4 < np.mean(is_mirrored) < 0.6
        assert np.any(epochs[0] != epochs[1])
        same = self.load(embedded_dir, shuffle=False, flips=True, seed=1)
        np.testing.assert_array_equal(epochs[0], images_of(same))
        np.testing.assert_array_equal(epochs[1], images_of(same))
        assert np.any(epochs[0] != images_of(self.load(embedded_dir, shuffle=False, flips=True, seed=2)))


class TestSplits:
    def test_slices(self, embedded_dir):
        def load(split):
            return images_of(data.load("digits", split, batch_size=50, shuffle=False, data_dir=embedded_dir))

        whole = images_of(data.load("digits", batch_size=50, shuffle=False, drop_remainder=False, data_dir=embedded_dir))
        np.testing.assert_array_equal(load("train[:100]"), whole[:100])
        np.testing.assert_array_equal(load("train[100:200]"), whole[100:200])
        assert len(load("test[50%:]")) == 180
        assert len(data.load("digits", "train[:90%]+test", batch_size=1, data_dir=embedded_dir)) == 1293 + 360

    @pytest.mark.parametrize("split", ["validation", "validation[:10]", "train[:x]"])
    def test_unknown_split(self, embedded_dir, split):
        with pytest.raises(ValueError, match=r"'digits' has no split '(validation|train).*\['train', 'test'\]"):
            data.load("digits", split, batch_size=10, data_dir=embedded_dir)

    def test_split_smaller_than_a_batch(self, embedded_dir):
        with pytest.raises(ValueError, match=r"'train\[:10\]' of dataset 'digits' has 10 images.*batch of 32"):
            data.load("digits", "train[:10]", batch_size=32, data_dir=embedded_dir)
        dataset = data.load("digits", "train[:10]", batch_size=32, drop_remainder=False, data_dir=embedded_dir)
        assert images_of(dataset).shape == (10, 8, 8, 1)


class TestSubsets:
    def load(self, data_dir, subset, validation_split=0.136, split="train[:100]", **kwargs):
        options = {"batch_size": 20, "subset": subset, "validation_split": validation_split} | kwargs
        return data.load("digits", split, data_dir=data_dir, **options)

    def test_are_the_split_each_image_once(self, embedded_dir):
        training = self.load(embedded_dir, "training", drop_remainder=False)
        validation = self.load(embedded_dir, "validation")
        assert [len(batch) for batch in training] == [20, 20, 20, 20, 6]
        assert [len(batch) for batch in validation] == [14]
        whole = data.load("digits", "train[:100]", batch_size=100, shuffle=False, data_dir=embedded_dir)
        assert same_multiset(np.concatenate([images_of(training), images_of(validation)]), images_of(whole))

    def test_have_a_length_and_drop_remainders_of_training_only(self, embedded_dir):
        training = self.load(embedded_dir, "training")
        assert training.element_spec == tf.TensorSpec([20, 8, 8, 1], tf.uint8)
        assert len(training) == len(list(training)) == 4
        validation = self.load(embedded_dir, "validation", batch_size=5)
        assert validation.element_spec == tf.TensorSpec([None, 8, 8, 1], tf.uint8)
        assert len(validation) == 3
        assert [len(batch) for batch in validation] == [5, 5, 4]
        assert len(self.load(embedded_dir, "validation", batch_size=5, drop_remainder=True)) == 2

    def test_are_chosen_by_a_seed_of_their_own(self, sharded_dir):
        def load(subset, **kwargs):
            return images_of(self.load(sharded_dir, subset, split="train", drop_remainder=False, **kwargs))

        validation, training = load("validation"), load("training")
        np.testing.assert_array_equal(load("validation", seed=1), validation)
        assert same_multiset(load("validation", shuffle=True), validation)
        assert same_multiset(load("training", seed=1), training)
        assert not same_multiset(load("validation", validation_seed=1), validation)
        assert not same_multiset(load("training", validation_seed=1), training)

    def test_only_training_shuffles_by_default(self, embedded_dir):
        for subset, shuffles in {"training": True, "validation": False}.items():
            unshuffled = images_of(self.load(embedded_dir, subset, drop_remainder=False, shuffle=False))
            dataset = self.load(embedded_dir, subset, drop_remainder=False)
            epochs = [images_of(dataset), images_of(dataset)]
            assert np.any(epochs[0] != unshuffled) == np.any(epochs[0] != epochs[1]) == shuffles
            assert same_multiset(epochs[0], unshuffled) and same_multiset(epochs[1], unshuffled)

    @pytest.mark.parametrize("shuffle", [True, False])
    def test_repeat(self, shuffle, embedded_dir):
        dataset = self.load(embedded_dir, "training", 0.2, repeat=True, shuffle=shuffle)
        assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY
        images = images_of(dataset.take(8))
        np.testing.assert_array_equal(images_of(dataset.take(8)), images)
        once = images_of(self.load(embedded_dir, "training", 0.2, shuffle=False))
        for epoch in (images[:80], images[80:]):
            assert same_multiset(epoch, once)
            assert np.any(epoch != once) == shuffle
        assert np.any(images[:80] != images[80:]) == shuffle

    def test_neither_is_ever_empty(self, embedded_dir):
        assert len(self.load(embedded_dir, "validation", 0.001, batch_size=1)) == 1
        assert len(self.load(embedded_dir, "training", 0.001, batch_size=1)) == 99
        for split, share in {"train[:1]": 0.1, "train[:10]": 0.96, "train[:0]": 0.5}.items():
            with pytest.raises(ValueError, match=r"Split 'train.*' of dataset 'digits' has \d+ images.* none for training"):
                self.load(embedded_dir, "validation", share, split)

    def test_training_images_fewer_than_a_batch(self, embedded_dir):
        with pytest.raises(ValueError, match=r"'digits' \(subset 'training'\) has 80 images, less than one batch of 90"):
            self.load(embedded_dir, "training", 0.2, batch_size=90)
        assert [len(batch) for batch in self.load(embedded_dir, "validation", 0.2, batch_size=90)] == [20]

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"validation_split": 0.1}, "got validation_split=0.1 and subset=None, needs both or neither"),
            ({"subset": "training"}, "got validation_split=0.0 and subset='training', needs both or neither"),
            ({"subset": "test", "validation_split": 0.1}, "got subset='test', needs one of .*'training', 'validation'"),
            ({"subset": "training", "validation_split": 1.0}, "got validation_split=1.0, needs a share between 0 and 1"),
            ({"subset": "training", "validation_split": -0.1}, "got validation_split=-0.1, needs a share between 0 and 1"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=f"Dataset 'digits': {message}"):
            data.load("digits", batch_size=10, **options)


class TestLabels:
    def load(self, embedded_dir, **kwargs):
        return data.load("digits", "train[:200]", batch_size=50, data_dir=embedded_dir, **kwargs)

    def test_pairs(self, embedded_dir):
        spec = (tf.TensorSpec([50, 8, 8, 1], tf.uint8), tf.TensorSpec([50], tf.int64))
        dataset = self.load(embedded_dir, labels=True)
        assert dataset.element_spec == spec and len(dataset) == 4

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"shuffle": False, "flips": True},
            {"repeat": True, "flips": True},
            {"repeat": True, "shuffle": False},
            {"subset": "training", "validation_split": 0.1},
            {"subset": "validation", "validation_split": 0.3},
        ],
        ids=repr,
    )
    def test_each_image_keeps_its_own(self, options, embedded_dir):
        digits = load_digits()
        classes = {image.astype(np.uint8).tobytes(): label for image, label in zip(digits.images, digits.target)}
        assert len(classes) == len(digits.images)
        pairs = self.load(embedded_dir, labels=True, **options).take(5)
        images, labels = map(np.concatenate, zip(*pairs.as_numpy_iterator()))
        found = [classes.get(image.tobytes(), classes.get(image[:, ::-1].tobytes())) for image in images]
        np.testing.assert_array_equal(labels, found)
        assert len(set(found)) == 10
        np.testing.assert_array_equal(images, images_of(self.load(embedded_dir, **options).take(5)))

    def test_the_only_one_or_the_one_called_label(self, tmp_path):
        settings = {"image_size": (5, 6), "data_dir": tmp_path}
        ((ramps, kinds),) = data.load("varying_size", batch_size=2, labels=True, **settings)
        np.testing.assert_array_equal(kinds, np.max(ramps, axis=(1, 2, 3)) > 12)
        assert data.info("varying_size", **settings).label_names == ("narrow", "wide")
        ((images, labels),) = data.load("fine_and_coarse", batch_size=6, labels=True, data_dir=tmp_path)
        np.testing.assert_array_equal(labels, images[:, 0, 0, 0])
        assert data.info("fine_and_coarse", data_dir=tmp_path).label_names == tuple("012345")

    def test_errors(self, tmp_path, embedded_dir):
        write_images(tmp_path / "photos", [(4, 4, 1)] * 2)
        for name in ("no_main_label", tmp_path / "photos"):
            assert data.info(name, data_dir=tmp_path).label_names == ()
            with pytest.raises(ValueError, match=r"got labels=True, needs a single tfds.features.ClassLabel [\s\S]*'image'"):
                data.load(name, batch_size=1, labels=True, data_dir=tmp_path)
        with pytest.raises(ValueError, match="got labels=True and files=True, needs one of them at most"):
            data.load(tmp_path / "photos", batch_size=1, shuffle=False, labels=True, files=True, data_dir=tmp_path)


class TestShifts:
    def load(self, embedded_dir, **kwargs):
        return data.load("digits", kwargs.pop("split", "train[:150]"), batch_size=50, data_dir=embedded_dir, **kwargs)

    @pytest.mark.parametrize("flips", [True, False])
    def test_move_each_image_in_a_way_of_its_own(self, flips, embedded_dir):
        options = {"split": "train[:1000]", "shuffle": False, "flips": flips}
        dataset = self.load(embedded_dir, shifts=2, **options)
        assert dataset.element_spec == tf.TensorSpec([50, 8, 8, 1], tf.uint8)
        padded = np.pad(images_of(self.load(embedded_dir, **options)), [(0, 0), (2, 2), (2, 2), (0, 0)], mode="symmetric")
        corners = [(top, left) for top in range(5) for left in range(5)]
        moved = np.stack([padded[:, top : top + 8, left : left + 8] for top, left in corners])
        found = np.all(images_of(dataset) == moved, axis=(2, 3, 4))
        assert np.all(np.any(found, axis=0))
        unambiguous = found[:, np.sum(found, axis=0) == 1]
        assert np.mean(unambiguous, axis=1).min() > 0.01 and np.mean(unambiguous, axis=1).max() < 0.1
        assert np.all(np.any(unambiguous, axis=1))

    def test_seed_determines_the_sequence_of_epochs(self, embedded_dir):
        first, same, other = (self.load(embedded_dir, shuffle=False, shifts=1, seed=seed) for seed in (1, 1, 2))
        epochs = [images_of(first), images_of(first)]
        np.testing.assert_array_equal(images_of(same), epochs[0])
        np.testing.assert_array_equal(images_of(same), epochs[1])
        assert np.any(epochs[0] != epochs[1])
        assert np.any(epochs[0] != images_of(other))

    def test_repeated_data_are_the_same_in_each_iteration(self, embedded_dir):
        dataset = self.load(embedded_dir, shifts=1, shuffle=False, repeat=True)
        images = images_of(dataset.take(6))
        np.testing.assert_array_equal(images_of(dataset.take(6)), images)
        np.testing.assert_array_equal(images_of(dataset.skip(4).take(2)), images[200:])
        assert np.any(images[:150] != images[150:])

    def test_labels_stay(self, embedded_dir):
        augmented = self.load(embedded_dir, labels=True, shifts=1, flips=True)
        for (images, labels), plain, (_, others) in zip(
            augmented, self.load(embedded_dir, shifts=1, flips=True), self.load(embedded_dir, labels=True)
        ):
            np.testing.assert_array_equal(images, plain)
            np.testing.assert_array_equal(labels, others)

    def test_up_to_a_side_of_the_image(self, embedded_dir):
        assert images_of(self.load(embedded_dir, shifts=8)).shape == (150, 8, 8, 1)
        for shifts, options, side in [(-1, {}, 8), (9, {}, 8), (5, {"image_size": (8, 4)}, 4)]:
            with pytest.raises(ValueError, match=f"Dataset 'digits': got shifts={shifts}, needs 0 to {side} pixels"):
                self.load(embedded_dir, shifts=shifts, **options)


class TestLevels:
    def test_requantises_by_floor_division(self, embedded_dir):
        def load(levels):
            return images_of(data.load("photo_patches", "test", batch_size=50, grey_levels=levels, data_dir=embedded_dir))

        full = load(None)
        np.testing.assert_array_equal(load(256), full)
        np.testing.assert_array_equal(load(32), full // 8)
        np.testing.assert_array_equal(load(2), full // 128)
        assert load(32).dtype == np.uint8 and load(32).max() == 31

    @pytest.mark.parametrize(
        "name, levels, own", [("digits", 16, 17), ("digits", 1, 17), ("digits", 256, 17), ("photo_patches", 100, 256)]
    )
    def test_levels_must_divide(self, embedded_dir, name, levels, own):
        with pytest.raises(ValueError, match=f"'{name}' has {own} levels, which grey_levels={levels} does not divide"):
            data.load(name, batch_size=10, grey_levels=levels, data_dir=embedded_dir)


class TestCropAndResize:
    def load(self, embedded_dir, **kwargs):
        return images_of(data.load("photo_patches", "test[:20]", batch_size=20, data_dir=embedded_dir, **kwargs))

    def test_crop(self, embedded_dir):
        cropped = self.load(embedded_dir, crop=(2, 5, 20, 10))
        np.testing.assert_array_equal(cropped, self.load(embedded_dir)[:, 2:22, 5:15])

    def test_resize_comes_after_crop_and_before_levels(self, embedded_dir):
        cropped = self.load(embedded_dir)[:, 2:22, 5:15]
        resized = tf.image.resize(cropped, [8, 7], method="bilinear", antialias=True)
        expected = np.rint(resized).astype(np.uint8) // 8
        images = self.load(embedded_dir, crop=(2, 5, 20, 10), image_size=(8, 7), grey_levels=32)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, expected)

    def test_shrinking_to_one_pixel_keeps_the_mean(self, embedded_dir):
        means = np.mean(self.load(embedded_dir, crop=(0, 0, 2, 2)), axis=(1, 2))
        np.testing.assert_allclose(self.load(embedded_dir, crop=(0, 0, 2, 2), image_size=1)[:, 0, 0], means, atol=0.51)

    def test_enlarging(self, embedded_dir):
        assert self.load(embedded_dir, image_size=40).shape == (20, 40, 40, 3)

    @pytest.mark.parametrize("crop", [(1, 0, 32, 32), (0, 30, 32, 3), (-1, 0, 4, 4), (0, 0, 0, 4)])
    def test_crop_outside_the_image(self, embedded_dir, crop):
        with pytest.raises(ValueError, match=r"'photo_patches': crop \(.* leaves the image \(32, 32, 3\)"):
            data.load("photo_patches", batch_size=10, crop=crop, data_dir=embedded_dir)

    def test_images_of_varying_size(self, tmp_path):
        resized = data.load("varying_size", batch_size=2, image_size=(5, 6), data_dir=tmp_path)
        assert resized.element_spec.shape == (2, 5, 6, 1)
        ramps = np.sort(images_of(resized)[:, 0, :, 0], axis=0)
        np.testing.assert_allclose(ramps, [np.arange(6) * 2 + 0.5, (np.arange(6) + 0.5) * 20 / 6 - 0.5], atol=0.75)
        cropped = data.load("varying_size", batch_size=2, crop=(0, 1, 10, 11), data_dir=tmp_path)
        np.testing.assert_array_equal(images_of(cropped)[:, 3, :, 0], [np.arange(1, 12)] * 2)


class TestCelebA:
    def test_standard_crop_is_the_default_of_a_resize(self, celeb_a_dir):
        image = images_of(data.load("celeb_a", batch_size=1, image_size=148, data_dir=celeb_a_dir))[0]
        np.testing.assert_array_equal(image[:, 0, 0], np.arange(40, 188))
        np.testing.assert_array_equal(image[0, :, 1], np.arange(15, 163))
        small = images_of(data.load("celeb_a", batch_size=1, image_size=37, data_dir=celeb_a_dir))[0]
        centres = (np.arange(37) + 0.5) * 4 - 0.5
        np.testing.assert_allclose(small[2:-2, 5, 0], 40 + centres[2:-2], atol=0.51)
        np.testing.assert_allclose(small[5, 2:-2, 1], 15 + centres[2:-2], atol=0.51)
        assert data.info("celeb_a", image_size=64, data_dir=celeb_a_dir).event_shape == (64, 64, 3)

    def test_crop_and_no_resize_are_respected(self, celeb_a_dir):
        assert data.info("celeb_a", data_dir=celeb_a_dir).event_shape == (218, 178, 3)
        dataset = data.load("celeb_a", batch_size=1, crop=(0, 0, 178, 178), image_size=89, data_dir=celeb_a_dir)
        assert images_of(dataset)[0, 0, 0, 0] <= 1


class TestInfo:
    def test_embedded(self, embedded_dir):
        digits = data.info("digits", data_dir=embedded_dir)
        assert digits == data.DatasetInfo("digits", (8, 8, 1), 17, {"train": 1437, "test": 360}, tuple("0123456789"))
        patches = data.info("photo_patches", image_size=16, grey_levels=32, data_dir=embedded_dir)
        splits = {"train": 3600, "test": 350}
        assert patches == data.DatasetInfo("photo_patches", (16, 16, 3), 32, splits, ("china", "flower"))
        cropped = data.info("photo_patches", crop=(1, 2, 3, 4), data_dir=str(embedded_dir))
        assert cropped.event_shape == (3, 4, 3)

    def test_agrees_with_load(self, embedded_dir):
        settings = dict(crop=(2, 2, 20, 24), image_size=(10, 12), grey_levels=64, data_dir=embedded_dir)
        described = data.info("photo_patches", **settings)
        images = images_of(data.load("photo_patches", "test", batch_size=50, **settings))
        assert images.shape == (described.splits["test"], *described.event_shape)
        assert images.max() == described.grey_levels - 1


class TestRealDatasets:
    @pytest.mark.parametrize("name, shape, train_size", [("mnist", (28, 28, 1), 60_000), ("cifar10", (32, 32, 3), 50_000)])
    def test_loads(self, tfds_dir, name, shape, train_size):
        assert data.info(name, data_dir=tfds_dir).splits == {"train": train_size, "test": 10_000}
        dataset = data.load(name, "train[:512]", batch_size=128, flips=True, data_dir=tfds_dir)
        assert dataset.element_spec == tf.TensorSpec([128, *shape], tf.uint8)
        images = images_of(dataset)
        assert images.shape == (512, *shape) and images.min() == 0 and images.max() == 255
        coarse = images_of(data.load(name, "test[:256]", batch_size=128, grey_levels=32, data_dir=tfds_dir))
        fine = images_of(data.load(name, "test[:256]", batch_size=128, data_dir=tfds_dir))
        np.testing.assert_array_equal(coarse, fine // 8)


class TestPreparation:
    def test_environment_variable_names_the_directory(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
        assert data.info("varying_size", image_size=4).event_shape == (4, 4, 1)
        assert (tmp_path / "varying_size").is_dir()

    def test_embedded_dataset_beside_a_read_only_directory(self, tmp_path, monkeypatch):
        read_only = tmp_path / "read_only"
        read_only.mkdir(mode=0o555)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("TFDS_DATA_DIR", str(read_only))
        assert data.info("digits").splits["test"] == 360
        assert not any(read_only.iterdir())
        assert (tmp_path / "home" / "tensorflow_datasets" / "digits").is_dir()

    def test_prepares_once_and_prints_nothing_to_stdout(self, tmp_path, monkeypatch, capsys):
        data.info("digits", data_dir=tmp_path)
        monkeypatch.setattr(embedded.Digits, "_split_generators", lambda *_: pytest.fail("prepared twice"))
        data.info("digits", data_dir=tmp_path)
        assert capsys.readouterr().out == ""

    def test_another_process_may_prepare_first(self, tmp_path, monkeypatch):
        generate = embedded.Digits._generate_examples
        races = []

        def generate_while_another_prepares(self, *args):
            if not races:
                races.append("begun")
                embedded.Digits(data_dir=tmp_path).download_and_prepare()
            return generate(self, *args)

        monkeypatch.setattr(embedded.Digits, "_generate_examples", generate_while_another_prepares)
        dataset = data.load("digits", "test", batch_size=60, data_dir=tmp_path)
        assert races and images_of(dataset).shape == (360, 8, 8, 1)
        assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]

    def test_unknown_name(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"'no_such_dataset' is unknown .*{tmp_path}.*data_dir"):
            data.load("no_such_dataset", batch_size=1, data_dir=tmp_path)

    def test_download_impossible(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail_to_prepare)
        with pytest.raises(FileNotFoundError, match=rf"'mnist' is not in {tmp_path} .*no route[\s\S]*TFDS_DATA_DIR"):
            data.load("mnist", batch_size=1, data_dir=tmp_path)

    def test_unusable_images_are_refused_before_preparation(self, tmp_path):
        with pytest.raises(ValueError, match=r"'two_images' has no single image[\s\S]*left[\s\S]*right"):
            data.info("two_images", data_dir=tmp_path)
        with pytest.raises(ValueError, match="'deep_grey' has uint16 images, need uint8"):
            data.info("deep_grey", data_dir=tmp_path)
        with pytest.raises(ValueError, match="'varying_size'.*pass image_size"):
            data.info("varying_size", data_dir=tmp_path)
        assert not any(tmp_path.iterdir())

    def test_no_writable_directory(self, tmp_path, monkeypatch):
        read_only = tmp_path / "read_only"
        read_only.mkdir(mode=0o555)
        monkeypatch.setenv("HOME", str(read_only))
        monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail_to_prepare)
        with pytest.raises(FileNotFoundError, match=f"'digits' is not in {read_only}/tensorflow_datasets"):
            data.info("digits", data_dir=read_only)


@pytest.mark.slow
def test_imports_are_lazy_and_missing_scikit_learn_names_the_extra(tmp_path):
    """Keras imports scikit-learn and matplotlib where it finds them, so they are made impossible to import."""
    program = """
import sys
optional = ["sklearn", "matplotlib", "tensorflow_datasets"]
sys.modules.update(dict.fromkeys(optional))
from tfp_dimflows import data
del sys.modules["tensorflow_datasets"]
try:
    data.load("digits", batch_size=1, data_dir=sys.argv[1])
except ImportError as error:
    assert "'digits'" in str(error) and "tfp-dimflows[demo]" in str(error), error
else:
    raise AssertionError("no ImportError")
"""
    repository = pathlib.Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=repository, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def write_images(folder, shapes, seed=0):
    """Random PNGs, every other one in a folder inside; returns them as arrays."""
    generator, images = np.random.default_rng(seed), []
    for k, shape in enumerate(shapes):
        path = folder / ("inside" if k % 2 else ".") / f"image {k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        images.append(generator.integers(0, 256, size=shape, dtype=np.uint8))
        path.write_bytes(tf.io.encode_png(images[-1]).numpy())
    return images


class TestFolder:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_images(self, channels, tmp_path):
        images = write_images(tmp_path / "my photos", [(4, 5, channels)] * 25)
        name, data_dir = f"{tmp_path}/my photos", tmp_path / "tfds"
        info = data.info(name, data_dir=data_dir)
        assert info == data.DatasetInfo(name, (4, 5, channels), 256, {"train": 22, "test": 3})
        train = images_of(data.load(name, batch_size=22, data_dir=data_dir))
        test = images_of(data.load(name, "test", batch_size=2, data_dir=data_dir))
        assert same_multiset(np.concatenate([train, test]), np.stack(images))
        assert len(list((data_dir / "folder_images").iterdir())) == 1  # prepared once

    def test_files_of_images(self, tmp_path):
        images = write_images(tmp_path / "photos", [(4, 5, 3)] * 12)
        options = {"batch_size": 5, "data_dir": tmp_path / "tfds"}
        pairs = data.load(tmp_path / "photos", "all", shuffle=False, files=True, **options)
        files = [file.decode() for _, some in pairs.as_numpy_iterator() for file in some]
        assert sorted(files) == sorted(f"{'inside/' if k % 2 else ''}image {k}.png" for k in range(12))
        for image, file in zip(images_of(pairs.map(lambda images, files: images)), files):
            np.testing.assert_array_equal(image, images[int(file.removesuffix(".png").split(" ")[-1])])
        of_subset = {}
        for subset in ("training", "validation"):
            chosen = options | {"subset": subset, "validation_split": 0.3, "drop_remainder": False}
            pairs = data.load(tmp_path / "photos", "all", shuffle=False, files=True, **chosen)
            of_subset[subset] = [file.decode() for _, some in pairs.as_numpy_iterator() for file in some]
            for image, file in zip(images_of(pairs.map(lambda images, files: images)), of_subset[subset], strict=True):
                np.testing.assert_array_equal(image, images[int(file.removesuffix(".png").split(" ")[-1])])
        assert len(of_subset["validation"]) == 4 and sorted(sum(of_subset.values(), [])) == sorted(files)
        for refused in ({"files": True}, {"files": True, "shuffle": False, "repeat": True}):
            with pytest.raises(ValueError, match="got files=True, needs a folder"):
                data.load(tmp_path / "photos", "train", **options, **refused)

    def test_folders_of_splits_and_other_options(self, tmp_path, monkeypatch):
        train = write_images(tmp_path / "photos" / "train", [(4, 4, 3)] * 4)
        test = write_images(tmp_path / "photos" / "test", [(4, 4, 3)] * 2, seed=1)
        (tmp_path / "photos" / "cover.png").write_bytes(tf.io.encode_png(np.zeros([9, 9, 1], np.uint8)).numpy())
        monkeypatch.chdir(tmp_path)
        options = {"data_dir": tmp_path / "tfds", "image_size": 4, "grey_levels": 8}
        assert data.info("./photos", **options).splits == {"train": 4, "test": 2}
        batches = images_of(data.load("./photos", batch_size=4, **options))
        assert same_multiset(batches, np.stack(train) // 32)
        batches = images_of(data.load(pathlib.Path("photos"), "test", batch_size=2, **options))
        assert same_multiset(batches, np.stack(test) // 32)

    def test_a_changed_folder_is_another_dataset(self, tmp_path):
        images = write_images(tmp_path / "photos", [(4, 4, 1)] * 2)
        name, data_dir = f"{tmp_path}/photos", tmp_path / "tfds"
        data.info(name, data_dir=data_dir)
        (tmp_path / "photos" / "new.png").write_bytes(tf.io.encode_png(images[0]).numpy())
        assert sum(data.info(name, data_dir=data_dir).splits.values()) == 3

    def test_another_process_prepares_it_first(self, tmp_path, monkeypatch):
        write_images(tmp_path / "photos", [(4, 4, 1)] * 2)

        def lose(builder):
            prepare(builder)
            raise OSError("Directory not empty")

        builder = tfds.core.DatasetBuilder
        prepare = builder.download_and_prepare
        monkeypatch.setattr(builder, "download_and_prepare", lose)
        assert len(images_of(data.load(tmp_path / "photos", "test", batch_size=1, data_dir=tmp_path / "tfds"))) == 1

    def test_a_name_that_is_no_path_is_no_folder(self, tmp_path, monkeypatch, embedded_dir):
        write_images(tmp_path / "digits", [(4, 4, 1)] * 2)
        monkeypatch.chdir(tmp_path)
        assert data.info("digits", data_dir=embedded_dir).event_shape == (8, 8, 1)
        with pytest.raises(FileNotFoundError, match=r"unknown to TensorFlow Datasets .* written as a path"):
            data.info("photos", data_dir=tmp_path)
        with pytest.raises(FileNotFoundError, match=r"'./missing': there is no such folder"):
            data.info("./missing", data_dir=tmp_path)

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            ([(4, 4, 3)], r"has 1 images \(.bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp\), needs two or more"),
            ([(4, 4, 3), (5, 4, 3)], r"(is 5 x 4, .* has another size|is 4 x 4, .* has another size): pass image_size"),
            ([(4, 4, 1), (4, 4, 3)], r"inside/image 1.png is in colour, image 0.png is grey"),
        ],
    )
    def test_errors(self, shapes, message, tmp_path):
        write_images(tmp_path / "photos", shapes)
        with pytest.raises(ValueError, match=message):
            data.info(f"{tmp_path}/photos", data_dir=tmp_path / "tfds")


def encoded(pixels, file_format, **options):
    """The content of an image file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream := io.BytesIO(), file_format, **options)
    return stream.getvalue()


def png(header, rows, *chunks):
    """A PNG of a bit depth or colour type that Pillow does not write; `header` is width, height, depth, type."""
    parts = [(b"IHDR", struct.pack(">IIBBxxx", *header)), *chunks]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    chunk = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return b"\x89PNG\r\n\x1a\n" + chunk


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def without_adobe_marker(jpeg):
    """A JPEG in CMYK of which TensorFlow and Pillow see other colours."""
    begin = jpeg.index(b"\xff\xee")
    return jpeg[:begin] + jpeg[begin + 2 + int.from_bytes(jpeg[begin + 2 : begin + 4], "big") :]


def shown(pixels, alpha, background):
    """Pixels in front of a background, in 8 bits."""
    alpha = alpha[:, :, None] / 255.0
    return np.floor(pixels * alpha + np.asarray(background) * (1.0 - alpha) + 0.5).astype(np.uint8)


def kinds_of_images(seed):
    """Files of every kind, their pixels `[6, 4, 1 or 3]` on white and whether these are exact."""
    generator = np.random.default_rng(seed)

    def random(*shape):
        return generator.integers(0, 256, size=shape, dtype=np.uint8)

    smooth = np.add.outer(np.arange(6) * 10, np.arange(4) * 20)[:, :, None] + generator.integers(0, 90, 3)
    smooth = smooth.astype(np.uint8)  # what JPEG keeps
    grey, colour, other = random(6, 4), random(6, 4, 3), random(6, 4, 3)
    palette = random(4, 3)
    palette[1] = [255, 0, 0]
    indices = generator.permuted(np.arange(24).reshape(6, 4) % 4, axis=1).astype(np.uint8)
    in_palette = Image.fromarray(indices)
    in_palette.putpalette(palette.tobytes())
    alpha = generator.choice([0, 255], size=(6, 4)).astype(np.uint8)
    alpha[:2] = [[0, 255, 0, 255], [255, 0, 255, 0]]
    hole = np.where(indices == 1, 0, 255).astype(np.uint8)
    white = [255, 255, 255]
    two_bits = [bytes([row @ [64, 16, 4, 1]]) for row in indices.astype(int)]  # one byte holds a row
    sixteen = generator.integers(0, 2**16, size=(6, 4), dtype=np.uint16)
    deep = generator.integers(0, 2**16, size=(6, 4, 3), dtype=np.uint16)
    in_cmyk = encoded(Image.fromarray(smooth[::-1, ::-1]).convert("CMYK"), "JPEG", quality=100, subsampling=0)
    key = struct.pack(">H", int(sixteen[0, 0]))
    return {
        "colour.bmp": (encoded(colour, "BMP"), colour, True),
        "grey.BMP": (encoded(grey, "BMP"), grey[:, :, None], True),
        "palette.bmp": (encoded(in_palette, "BMP"), palette[indices], True),
        "first of two.gif": (
            encoded(in_palette, "GIF", save_all=True, append_images=[in_palette.rotate(180)]),
            palette[indices],
            True,
        ),
        "a gif.png": (encoded(in_palette, "GIF"), palette[indices], True),
        "a webp.jpg": (encoded(other, "WEBP", lossless=True), other, True),
        "webp.webp": (encoded(colour, "WEBP", lossless=True), colour, True),
        "transparent.webp": (
            encoded(np.dstack([colour, alpha]), "WEBP", lossless=True, exact=True),
            shown(colour, alpha, white),
            True,
        ),
        "tiff.tif": (encoded(other, "TIFF", compression="tiff_lzw"), other, True),
        "turned.tiff": (encoded(np.rot90(other), "TIFF", exif=orientation(6)), other, True),
        "photo.jpeg": (encoded(smooth, "JPEG", quality=100, subsampling=0), smooth, False),
        "grey photo.jpg": (encoded(smooth[:, :, 0], "JPEG", quality=100), smooth[:, :, :1], False),
        "turned.jpg": (
            encoded(np.rot90(smooth[::-1]), "JPEG", quality=100, subsampling=0, exif=orientation(6)),
            smooth[::-1],
            False,
        ),
        "turned.png": (encoded(np.rot90(colour, 2), "PNG", exif=orientation(3)), colour, True),
        "cmyk.jpg": (in_cmyk, smooth[::-1, ::-1], False),
        "unmarked cmyk.jpg": (without_adobe_marker(in_cmyk), smooth[::-1, ::-1], False),
        "rgba.png": (encoded(np.dstack([other, alpha]), "PNG"), shown(other, alpha, white), True),
        "half.png": (
            encoded(np.dstack([other, np.full_like(alpha, 51)]), "PNG"),
            shown(other, np.full_like(alpha, 51), white),
            True,
        ),
        "la.png": (encoded(np.dstack([grey, alpha]), "PNG"), shown(grey[:, :, None], alpha, [255]), True),
        "palette.png": (
            encoded(in_palette, "PNG", transparency=bytes([255, 0, 255, 255])),
            shown(palette[indices], hole, white),
            True,
        ),
        "transparent.gif": (encoded(in_palette, "GIF", transparency=1), shown(palette[indices], hole, white), True),
        "colour key.png": (
            encoded(palette[indices], "PNG", transparency=(255, 0, 0)),
            shown(palette[indices], hole, white),
            True,
        ),
        "two bits.png": (
            png((4, 6, 2, 0), two_bits, (b"tRNS", b"\0\1")),
            np.where(indices == 1, 255, indices * 85)[:, :, None],
            True,
        ),
        "one bit.png": (encoded(Image.fromarray(indices > 1), "PNG"), np.where(indices > 1, 255, 0)[:, :, None], True),
        "16 bits.png": (encoded(sixteen, "PNG"), (sixteen >> 8)[:, :, None], True),
        "16 bits.tif": (encoded(sixteen[::-1].copy(), "TIFF"), (sixteen[::-1] >> 8)[:, :, None], True),
        "16 bits and a hole.png": (
            png((4, 6, 16, 0), [row.astype(">u2").tobytes() for row in sixteen], (b"tRNS", key)),
            np.where(sixteen == sixteen[0, 0], 255, sixteen >> 8)[:, :, None],
            True,
        ),
        "16 bits of colour.png": (tf.io.encode_png(deep).numpy(), deep >> 8, True),
    }


class TestFilesOfFolder:
    """What may lie in a folder, and what a flow sees of it."""

    @staticmethod
    def write(folder, files):
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    @pytest.fixture
    def photos(self, tmp_path):
        """Two whole images of 4 x 4 pixels."""
        write_images(tmp_path / "photos", [(4, 4, 3)] * 2)
        return tmp_path / "photos"

    @pytest.mark.parametrize("channels", [1, 3])
    def test_every_kind_is_read_as_it_is_shown(self, channels, tmp_path):
        kinds = {split: kinds_of_images(seed) for seed, split in enumerate(["train", "test"])}
        if channels == 1:
            kinds = {
                split: {name: kind for name, kind in images.items() if kind[1].shape[-1] == 1}
                for split, images in kinds.items()
            }
            for images in kinds.values():  # formats without grey
                pixels = images["grey.BMP"][1] // 2
                in_colour = np.repeat(pixels, 3, axis=-1)
                images |= {"grey.webp": (encoded(in_colour, "WEBP", lossless=True), pixels, True)}
                images |= {"grey.gif": (encoded(255 - pixels[:, :, 0], "GIF"), 255 - pixels, True)}
        first = "16 bits.png" if channels == 1 else "16 bits of colour.png"  # in the order of the names
        for split, images in kinds.items():
            images["!" + first] = images.pop(first)
            self.write(tmp_path / "photos" / split, {name: content for name, (content, _, _) in images.items()})
        options = {"data_dir": tmp_path / "tfds", "drop_remainder": False}
        assert data.info(tmp_path / "photos", data_dir=tmp_path / "tfds").event_shape == (6, 4, channels)
        for split, images in kinds.items():
            read = images_of(data.load(tmp_path / "photos", split, batch_size=10, **options)).astype(int)
            assert len(read) == len(images)
            for name, (_, pixels, is_exact) in images.items():
                differences = np.abs(read - pixels).max(axis=(1, 2, 3))
                assert differences.min() <= (0 if is_exact else 6), (split, name, differences.min())
                read = np.delete(read, differences.argmin(), axis=0)

    def test_plain_photographs_are_stored_as_they_are(self, photos, tmp_path):
        pixels = np.arange(0, 240, 5, dtype=np.uint8).reshape(4, 4, 3)
        plain = encoded(pixels, "JPEG")
        turned = encoded(pixels, "JPEG", exif=orientation(6))
        palette = encoded(Image.fromarray(pixels).quantize(4), "PNG")
        self.write(photos, {"plain.jpg": plain, "turned.jpg": turned, "palette.png": palette})
        data.info(photos, data_dir=tmp_path / "tfds")
        (directory,) = (tmp_path / "tfds" / "folder_images").glob("*/*")
        builder = tfds.builder_from_directory(directory)
        splits = builder.as_dataset(decoders={"image": tfds.decode.SkipDecoding()}).values()
        stored = {example["image"].numpy() for split in splits for example in split}
        assert plain in stored and turned not in stored and len(stored) == 5
        assert stored >= {path.read_bytes() for path in photos.rglob("*.png")}

    def test_background(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, size=(2, 4, 4, 2), dtype=np.uint8)
        pixels[..., 1] //= 2
        folder = self.write(tmp_path / "logos", {f"{k}.png": encoded(image, "PNG") for k, image in enumerate(pixels)})
        options = {"batch_size": 1, "drop_remainder": False, "data_dir": tmp_path / "tfds"}

        def read(**more):
            return images_of(data.load(folder, "train+test", **options, **more))

        colours = {"white": [255], "black": [0], "#ff8000": [255, 128, 0]}
        for name, colour in colours.items():
            images = read(background=name)
            expected = np.stack([shown(p[..., :1], p[..., 1], colour) for p in pixels])
            assert images.shape == expected.shape
            assert min(np.abs(images.astype(int) - order).max() for order in (expected, expected[::-1])) <= 1
        np.testing.assert_array_equal(read(), read(background="#FFFFFF"))
        assert len(list((tmp_path / "tfds" / "folder_images").iterdir())) == len(colours)
        with pytest.raises(ValueError, match=r"got background='snow white', needs a colour such as 'white'"):
            data.info(folder, background="snow white", data_dir=tmp_path / "tfds")
        with pytest.raises(ValueError, match=r"'digits': got background='black', which is for folders of images only"):
            data.load("digits", background="black", **options)

    def test_other_images_are_named_once_and_hidden_files_passed_over(self, photos, tmp_path):
        others = [f"{k:02}.HEIC" for k in range(11)] + ["logo.svg"]
        hidden = [".DS_Store", "._image 0.png", ".cache/thumb.png", ".hidden.heic"]
        self.write(photos, dict.fromkeys([*others, *hidden, "notes.txt"], b"no image"))
        with pytest.warns(UserWarning) as warned:
            assert sum(data.info(photos, data_dir=tmp_path / "tfds").splits.values()) == 2
            data.load(photos, batch_size=1, data_dir=tmp_path / "tfds")
        (message,) = [str(warning.message) for warning in warned if "ignored" in str(warning.message)]
        assert f"{photos}: 12 images are ignored" in message
        assert message.endswith(f": {', '.join(others[:10])}, ...")

    @pytest.mark.parametrize("first", ["!", "~"])
    def test_every_bad_file_is_named_and_the_next_try_succeeds(self, first, photos, tmp_path):
        photo = encoded(np.random.default_rng(0).integers(0, 256, size=(4, 4, 3), dtype=np.uint8), "JPEG")
        bad = {
            "broken.png": b"no image",
            "truncated.jpg": photo[: len(photo) // 2 + 150],
            "truncated.png": next(photos.glob("*.png")).read_bytes()[:60],
            "bomb.png": png((20_000, 20_000, 1, 0), []),
            "float.tif": encoded(np.zeros([4, 4], np.float32), "TIFF"),
            "empty.webp": b"",
            "pixmap.png": b"P6 4 4 255\n" + bytes(48),
        }
        bad = {first + name: content for name, content in bad.items()}
        self.write(photos, bad)
        with pytest.raises(ValueError, match=f"Folder {photos}: cannot use 7 of its images") as raised:
            data.info(photos, data_dir=tmp_path / "tfds")
        lines = str(raised.value).splitlines()[1:]
        assert [line.strip().split(" ")[0] for line in lines] == sorted(bad)
        for name, message in {"broken.png": "is no image", "truncated.jpg": "truncated", "bomb.png": "exceeds limit"}.items():
            assert any(name in line and message in line for line in lines), lines
        assert not any(path.is_file() for path in (tmp_path / "tfds").rglob("*"))
        for name in bad:
            (photos / name).unlink()
        assert data.info(photos, data_dir=tmp_path / "tfds").splits == {"train": 1, "test": 1}

    def test_more_bad_files_than_one_cares_to_read(self, photos, tmp_path):
        self.write(photos, {f"z{k:02}.png": b"no image" for k in range(12)})
        with pytest.raises(ValueError, match=r"cannot use 12 of its images[\s\S]*z09.png is no image.*\n  and 2 more$"):
            data.info(photos, data_dir=tmp_path / "tfds")

    def test_missing_pillow_names_the_extra(self, photos, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ImportError, match=rf"Folder {photos}: .*pip install 'tfp-dimflows\[demo\]'"):
            data.info(photos, data_dir=tmp_path / "tfds")

    @pytest.mark.slow
    def test_a_run_remembers_the_background(self, tmp_path, capsys):
        images = np.random.default_rng(0).integers(0, 256, size=(10, 4, 4, 2), dtype=np.uint8)
        folder = self.write(tmp_path / "logos", {f"{k}.png": encoded(image, "PNG") for k, image in enumerate(images)})
        folders = ["--data", str(folder), "--data-dir", str(tmp_path / "tfds")]
        argv = ["train", "nice", *folders, "--epochs", "1", "--batch-size", "4", "--background", "black"]
        assert cli.main([*argv, "--out", str(tmp_path / "run")]) == 0
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["data"]["background"] == "black"
        prepared = sorted((tmp_path / "tfds" / "folder_images").iterdir())
        capsys.readouterr()
        assert cli.main(["evaluate", str(tmp_path / "run"), "--data-dir", str(tmp_path / "tfds")]) == 0
        assert json.loads(capsys.readouterr().out)["num_events"] == 1
        assert cli.main(["score", str(tmp_path / "run"), "--data", str(folder), "--data-dir", str(tmp_path / "tfds")]) == 0
        header, *rows = (tmp_path / "run" / "scores-0.csv").read_text().splitlines()
        assert header == "file,log_prob,bits_per_dim"
        assert sorted(row.split(",")[0] for row in rows) == sorted(f"{k}.png" for k in range(10))
        assert sorted((tmp_path / "tfds" / "folder_images").iterdir()) == prepared  # the same dataset

    def test_a_run_on_white_has_the_entries_of_runs_before(self, embedded_dir, monkeypatch):
        notes = {}
        monkeypatch.setattr(training, "train", lambda *args, **options: notes.update(options["notes"]))
        monkeypatch.setattr(training, "read_metrics", lambda directory: {})
        monkeypatch.setattr(training, "read_config", lambda directory: {})
        argv = ["train", "nice", "--data", "digits", "--data-dir", str(embedded_dir), "--epochs", "1"]
        assert cli.main([*argv, "--out", str(embedded_dir)]) == 0
        assert set(notes["data"]) == {"name", "test_split", "batch_size", "image_size", "grey_levels"}
