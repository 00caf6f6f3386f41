"""How a distribution as a Keras 3 model is saved, loaded and exported."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from tfp_dimflows import recipes
from tfp_dimflows.training import batches


class SavedFlow(keras.Model):
    """What `FlowModel` saves, loads and exports: the recipe of its distribution, its weights, its functions."""

    _distribution: tfd.Distribution
    _condition_shape: list[int] | None
    _uses_condition: bool
    _nested_dropout: float

    def save(self, filepath: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.save`.

        Raises:
          ValueError: if no recipe made the distribution; then nothing is written.
        """
        self.get_config()
        return super().save(filepath, *args, **kwargs)

    def export(
        self, filepath: str | os.PathLike, *, num_samples: int | None = None, condition_shape: Sequence[int] | None = None
    ) -> None:
        """Writes a TensorFlow SavedModel, which `tf.saved_model.load` reads without this package.

        It has, as methods and signatures, with seeds of two int32 numbers for all noise,

        * `log_prob(x, seed)`, and `sample(num, seed)` with a scalar int32 `num`,
        * `encode(x)` and `decode(z)`, as in this class,

        of a conditional distribution `log_prob(x, seed, condition)`, `sample(num, seed, condition)` and so on. `x` has the
        distribution's dtype.

        Args:
          filepath: a folder that does not exist yet.
          num_samples: noise samples of an importance-weighted bound, if the distribution is one.
          condition_shape: shape of one condition of a conditional distribution; default: the model's.

        Raises:
          ValueError: if the folder exists, `num_samples` is given for an exact density, or `condition_shape` is not known.
        """
        condition_shape = self._condition_shape if condition_shape is None else condition_shape
        if condition_shape is None and self._uses_condition:
            raise ValueError(f"FlowModel.export: {self._distribution.name} has a condition; pass its condition_shape")
        if os.path.exists(filepath):
            raise ValueError(f"FlowModel.export: {filepath} exists already; choose another folder")
        self.converge()
        events = tf.TensorSpec([None, *self.event_shape], self._distribution.dtype, name="x")
        seed, num = tf.TensorSpec([2], tf.int32, name="seed"), tf.TensorSpec([], tf.int32, name="num")
        archive = keras.export.ExportArchive()
        archive.track(self)

        def log_prob(x: Any, seed: Any, condition: Any = None) -> tf.Tensor:
            batch = x if condition is None else {"x": x, "condition": condition}
            return self._log_prob(batch, seed, num_samples)

        def sample(num: tf.Tensor, seed: Any, condition: Any = None) -> tf.Tensor:
            sample_shape, condition = (num, None) if condition is None else self._sample_shape_of(num, condition)
            return self._sample(sample_shape, seed, condition)

        def encode(x: Any, condition: Any = None) -> tf.Tensor:
            return self._encode(x if condition is None else {"x": x, "condition": condition})

        def decode(z: Any, condition: Any = None) -> tf.Tensor:
            return self._decode(z if condition is None else {"x": z, "condition": condition})

        given = []
        if condition_shape is not None:
            given = [tf.TensorSpec([None, *condition_shape], batches.float_dtype(self._distribution), name="condition")]
        archive.add_endpoint("log_prob", log_prob, [events, seed, *given])
        archive.add_endpoint("sample", sample, [num, seed, *given])
        latent = tf.function(encode, autograph=False).get_concrete_function(events, *given).structured_outputs
        archive.add_endpoint("encode", encode, [events, *given])
        archive.add_endpoint("decode", decode, [tf.TensorSpec(latent.shape, latent.dtype, name="z"), *given])
        archive.write_out(str(filepath), verbose=False)

    def load_weights(self, filepath: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.load_weights`.

        Raises:
          ValueError: if the weights do not fit, or belong to another dimension factorization; then nothing has changed.
        """
        variables = [*self.variables, *getattr(getattr(self, "optimizer", None), "variables", ())]
        with unchanged_on_error(variables):
            return super().load_weights(filepath, *args, **kwargs)

    def get_config(self) -> dict:
        """The recipe and its arguments, the precision it was made in, a condition's shape, and which layers are frozen.

        Raises:
          ValueError: if no recipe made the distribution; `save_weights` and `load_weights` work for any.
        """
        config = recipes.config_of(self._distribution)
        if config is None:
            raise ValueError(
                f"FlowModel: {self._distribution.name} was not made by a recipe, so its construction cannot be saved; use "
                "save_weights, and load_weights on a model made by the same code"
            )
        frozen = [k for k, layer in enumerate(self._flatten_layers()) if not layer.trainable]
        own = {"name": self.name, "condition_shape": self._condition_shape, "nested_dropout": self._nested_dropout}
        return {**config, **own, "frozen": frozen}

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None) -> "SavedFlow":
        """Builds the recipe anew, in the precision it was made in."""
        with warnings.catch_warnings(), _precision(**config.get("precision", {})):
            warnings.simplefilter("ignore", DeprecationWarning)  # of arguments that had other names when it was saved
            distribution = recipes.get(config["recipe"])(**config["arguments"])
            own = {key: config[key] for key in ("name", "condition_shape", "nested_dropout") if key in config}
            model = cls(distribution, **own)
        layers = list(model._flatten_layers())
        for k in config.get("frozen", []):
            layers[k].trainable = False
        return model

    def save_own_variables(self, store: MutableMapping[str, Any]) -> None:
        """Keras's hook for saving; adds the seeds that layers such as dropout draw from, which Keras does not save."""
        super().save_own_variables(store)
        for k, state in enumerate(self._seed_states()):
            store[f"seed_{k}"] = state.numpy()

    def _seed_states(self) -> list[keras.Variable]:
        layers = self._flatten_layers(include_self=False)
        return [generator.state for layer in layers for generator in layer._seed_generators]

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Keras's hook for loading; first checks that constants of the architecture are those the weights were trained with.

        Raises:
          ValueError: if the weights belong to another dimension factorization; then nothing has changed.
        """
        own = self._trainable_variables + self._non_trainable_variables
        for index, variable in enumerate(own):
            is_constant = "dimension_order" in variable.name and str(index) in store
            if is_constant and not np.array_equal(store[str(index)], variable.numpy()):
                raise ValueError(
                    f"FlowModel: the weights were trained with another dimension factorization than that of {self.name}"
                )
        self._is_trained = True
        super().load_own_variables({key: store[key] for key in store.keys() if not key.startswith("seed_")})
        for k, state in enumerate(self._seed_states()):
            if f"seed_{k}" in store:
                state.assign(store[f"seed_{k}"])


@contextlib.contextmanager
def _precision(floatx: str | None = None, dtype_policy: str | None = None) -> Iterator[None]:
    """Context with other settings of Keras's float type and policy, those of None as they are."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(floatx or before[0])
    is_other_policy = dtype_policy not in (None, keras.config.dtype_policy().name)  # one that is not set follows the float type
    if is_other_policy:
        keras.config.set_dtype_policy(dtype_policy)
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        if is_other_policy:
            keras.config.set_dtype_policy(before[1])


@contextlib.contextmanager
def unchanged_on_error(variables: Sequence[keras.Variable]) -> Iterator[None]:
    """Gives the variables their values back if what runs inside fails."""
    before = [v.numpy() for v in variables]
    try:
        yield
    except Exception:
        for variable, value in zip(variables, before):
            variable.assign(value)
        raise
