"""`FlowModel`: a distribution as a Keras 3 model."""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow.types.experimental import TensorLike
from tensorflow_probability import distributions as tfd

from tfp_dimflows import keras_bridge
from tfp_dimflows.bijectors.chain import Chain
from tfp_dimflows.bijectors.probes import probes_from
from tfp_dimflows.distributions import structure_of, variational
from tfp_dimflows.training import batches
from tfp_dimflows.training.saving import SavedFlow, unchanged_on_error
from tfp_dimflows.upstream import samplers


@keras.saving.register_keras_serializable(package="tfp_dimflows")
class FlowModel(SavedFlow):
    """Trains a `tfd.Distribution` by maximum likelihood with Keras `fit`.

    `model(x)` is `log_prob(x)`, one number per event. The loss is the mean negative log-probability plus the networks' own
    regularisation losses. Metrics: `nll` (nats per event), for images `bits_per_dim`, `nll / (D ln 2)`, and the terms of the
    bound that the distribution reports, such as `kl` and `reconstruction` of a `dfd.VAEPrior` (nats; without sample weights).
    Callbacks that monitor them, such as `EarlyStopping("val_nll", mode="min")`, must be told the direction.
    A bound (`dfd.VariationalDistribution`) is trained with its own `num_samples`: several noise samples cost as many times
    more, and mean less noise in the gradients and a tighter bound.
    Every variable the distribution holds is trained, saved and shown by `summary`: Keras 3 layers inside bijectors, raw
    `tf.Variable`s, `tfp.util.TransformedVariable`s and TFP's tf_keras networks.

    Batches are events `x`, tuples `(x, y)` or `(x, y, sample_weight)` as Keras has them (labels y are not used), or, for a
    conditional distribution, dicts `{"x": x, "condition": condition}`.

    Args:
      distribution: any `tfd.Distribution` with a scalar batch shape; integer images: a `dfd.Dequantized`.
      seed: integer seed of the noise of bounds (dequantisation), of the probes of stochastic log-dets, and of `sample`; None: a
        random one.
      name: the model's name.

    Raises:
      ValueError: if the distribution has no trainable variable, or a batch shape.

    #### Example

    >>> normal = tfd.Normal(tf.Variable(0.0), tfp.util.TransformedVariable(1.0, tfb.Softplus()))
    >>> model = dimflows.FlowModel(tfd.Sample(normal, [1]))
    >>> model.compile(keras.optimizers.Adam(0.5))
    >>> history = model.fit(tf.constant([[2.0], [4.0]]), epochs=40, verbose=0)
    >>> bool(abs(normal.loc.numpy() - 3.0) < 0.2)
    True
    """

    def __init__(self, distribution: tfd.Distribution, seed: int | None = None, name: str | None = None):
        # No autocasting: a low-precision policy is for the networks, not for the data and the densities.
        super().__init__(name=name, dtype=keras.config.floatx(), autocast=False)
        if isinstance(distribution.batch_shape, tf.TensorShape) and distribution.batch_shape.rank not in (None, 0):
            raise ValueError(f"FlowModel: {distribution.name} has batch shape {distribution.batch_shape}, needs an empty one")
        self._distribution = distribution
        self._seed_generator = keras.random.SeedGenerator(seed)
        self._seed_state = self._seed_generator.state  # saved with the weights, unlike a SeedGenerator
        holdings = keras_bridge.collect(distribution)
        if not all(layer.built for layer in [*holdings.layers, *holdings.tf_keras_layers]):
            self._build_networks()
            holdings = keras_bridge.collect(distribution)
        self._networks = holdings.layers
        self._tf_keras_layers = holdings.tf_keras_layers
        self._adopted = [keras_bridge.adopt(v) for v in holdings.variables]
        if not self.trainable_variables:
            raise ValueError(f"FlowModel: {distribution.name} has no trainable variables")
        self._nll = keras.metrics.Mean(name="nll")
        self._bits_per_dim = keras.metrics.Mean(name="bits_per_dim") if len(self.event_shape) == 3 else None
        self._terms = {name: keras.metrics.Mean(name=name) for name in variational.terms_of(distribution)}
        self._kl_weight = tf.Variable(1.0, trainable=False) if "kl" in self._terms else None
        self._kl = None
        self._compiled_sample = tf.function(self._sample, autograph=False, reduce_retracing=True)
        self._compiled_log_prob = tf.function(self._log_prob_by_rank, autograph=False, reduce_retracing=True)
        self.built = True

    def _build_networks(self) -> None:
        """Lets unbuilt Keras layers make their variables here; inside Keras's training function it would be too late."""
        shape = self._distribution.event_shape
        if not shape.is_fully_defined():
            raise ValueError(f"FlowModel: {self._distribution.name} has unbuilt networks and no static event shape; build them")
        dtype = self._distribution.dtype
        with tf.init_scope():
            self._distribution.log_prob(tf.zeros([1, *shape], dtype))

    @property
    def distribution(self) -> tfd.Distribution:
        """The distribution that is trained."""
        return self._distribution

    @property
    def bijector(self) -> tfp.bijectors.Bijector:
        """The bijector from latent values to continuous data, preprocessing included.

        Raises:
          ValueError: if the distribution has none, or it is one of augmented data (`dfd.Augmented`).
        """
        structure = structure_of(self._distribution)
        if not structure.bijectors or structure.augmented is not None:
            raise ValueError(f"FlowModel: {self._distribution.name} has no bijector from latent values to data")
        return structure.bijectors[0] if len(structure.bijectors) == 1 else Chain(structure.bijectors)

    @property
    def event_shape(self) -> tf.TensorShape:
        """Shape of one event."""
        return self._distribution.event_shape

    @property
    def kl_weight(self) -> tf.Variable | None:
        """Weight of the KL term in the training loss, 1 but for a `KLWarmup`; None if the distribution has no such term."""
        return self._kl_weight

    # Training.

    def compile(
        self, optimizer: str | dict | keras.Optimizer = "adam", *, jit_compile: bool | str = "auto", **kwargs: Any
    ) -> None:
        """As `keras.Model.compile`; the loss is fixed.

        Args:
          optimizer: as in Keras.
          jit_compile: whether to compile the training step with XLA; `"auto"`: if there is a GPU. On a CPU compiling takes
            longer than it saves in short runs.
          **kwargs: as in Keras.

        Raises:
          ValueError: if a loss is given.
        """
        if kwargs.get("loss") is not None:
            raise ValueError("FlowModel.compile: got a loss; the loss is the negative log-probability")
        if jit_compile == "auto":
            jit_compile = bool(tf.config.list_physical_devices("GPU"))
        super().compile(optimizer=optimizer, jit_compile=jit_compile, **kwargs)
        # Slots made inside the training function would have it traced twice.
        self.optimizer.build(self.trainable_variables)

    def compile_from_config(self, config: dict) -> None:
        """Keras's hook for loading: compiles as the saved model was."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def fit(self, x: Any = None, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """As `keras.Model.fit`, after a check of the (first) batch that changes nothing if it fails."""
        batches.check_first(x, self._distribution)
        if isinstance(x, tf.data.Dataset):
            kwargs.setdefault("shuffle", False)
        if kwargs.get("validation_data") is not None:
            kwargs["validation_data"] = self._for_workers(kwargs["validation_data"])
        if self._kl_weight is not None:
            self._kl_weight.assign(1.0)  # a training that was interrupted may have left a warm-up's
        history = super().fit(self._for_workers(x), *args, **batches.with_labels(x, args, kwargs))
        self._converge()
        return history

    def _converge(self) -> None:
        """Brings what layers estimate iteratively in training (spectral norms) to convergence."""
        for layer in self._flatten_layers(include_self=False):
            if hasattr(layer, "converge"):
                layer.converge()

    def evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.evaluate`."""
        self._converge()
        return super().evaluate(self._for_workers(x), *args, **batches.with_labels(x, args, kwargs))

    def _for_workers(self, data: Any) -> Any:
        """With several workers a dataset's images as int32: Keras reduces a batch over the workers, which uint8 cannot be."""
        if not (isinstance(data, tf.data.Dataset) and self._has_workers()):
            return data
        return data.map(batches.without_uint8)

    def _has_workers(self) -> bool:
        return isinstance(self.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy)

    def adapt(self, data: Any, steps: int = 1) -> None:
        """Data-dependent initialisation: one eager pass in which every ActNorm normalises what it sees.

        Call it once, before `fit`.

        Args:
          data: a dataset of batches, or one batch.
          steps: how many batches of a dataset to use, as one large batch.

        Raises:
          ValueError: if the data does not fit the distribution; then nothing has changed.
        """
        if isinstance(data, tf.data.Dataset):
            parts = [batches.events(batch) for batch in data.take(steps)]
            if not parts:
                raise ValueError("FlowModel.adapt: the dataset is empty")
            batch = tf.nest.map_structure(lambda *parts: tf.concat(parts, axis=0), *parts)
        else:
            batch = batches.events(data)
        batch = self._checked(batch)
        with unchanged_on_error(self.variables), keras_bridge.adaptation():
            self._log_prob(batch, seed=self._next_seed())

    def call(self, x: Any, training: bool | None = None) -> tf.Tensor:
        """`log_prob(x)`, shape `[batch]`."""
        with variational.reports() as terms:
            log_prob = self._log_prob(x, seed=self._next_seed())
        for name, metric in self._terms.items():
            metric.update_state(terms[name])
        self._kl = None
        if training and self._kl_weight is not None:
            self._kl = tf.reduce_mean(tf.reshape(terms["kl"], [-1, tf.shape(log_prob)[0]]), axis=0)
        return log_prob

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: tf.Tensor | None = None, training: bool = True
    ) -> tf.Tensor:
        """Mean negative log-probability plus regularisation losses, with a KL term of the weight `kl_weight`."""
        if training and self._kl_weight is not None:
            y_pred = y_pred + (1.0 - tf.cast(self._kl_weight, y_pred.dtype)) * tf.cast(self._kl, y_pred.dtype)
        if sample_weight is None:
            nll = -tf.reduce_mean(y_pred)
        else:
            nll = -tf.reduce_mean(y_pred * tf.cast(sample_weight, y_pred.dtype))
        losses = [*self.losses, *(loss for layer in self._tf_keras_layers for loss in layer.losses)]
        total = nll + sum(tf.cast(tf.reduce_sum(loss), nll.dtype) for loss in losses)
        return total / tf.distribute.get_strategy().num_replicas_in_sync

    def compute_metrics(self, x: Any, y: Any, y_pred: tf.Tensor, sample_weight: tf.Tensor | None = None) -> dict[str, Any]:
        """Updates `nll` and `bits_per_dim`."""
        self._nll.update_state(-y_pred, sample_weight=sample_weight)
        if self._bits_per_dim is not None:
            dims = self.event_shape.num_elements()
            self._bits_per_dim.update_state(-y_pred / (dims * math.log(2.0)), sample_weight=sample_weight)
        results = self.get_metrics_result()
        if self._has_workers():
            # Keras averages the workers' results over their first axis, which scalars do not have.
            results = {name: tf.reshape(value, [1]) for name, value in results.items()}
        return results

    # Use.

    def log_prob(
        self, x: TensorLike | dict[str, TensorLike], num_samples: int | None = None, seed: int | None = None
    ) -> tf.Tensor:
        """Log-probability of events, compiled.

        Args:
          x: events (or a dict with `x` and `condition`), a whole batch.
          num_samples: noise samples of an importance-weighted bound, if the distribution is one.
          seed: integer seed of that noise, and of the probes of stochastic log-dets; None: the model's own stream.

        Returns:
          `[batch]`.

        Raises:
          ValueError: if x does not fit the distribution.
        """
        x = self._checked(x)
        ranks = tuple(value.shape.rank for value in tf.nest.flatten(x))
        return self._compiled_log_prob(ranks, x, self._seed(seed), num_samples)

    def sample(self, sample_shape: TensorLike = (), seed: int | None = None, condition: Any = None) -> tf.Tensor:
        """Samples of the distribution, compiled.

        Args:
          sample_shape: as in `tfd.Distribution.sample`; for a conditional distribution `[n]` for a condition of n rows.
          seed: integer seed; None: the model's own stream.
          condition: the condition of a conditional distribution.
        """
        sample_shape = tuple(np.atleast_1d(np.asarray(sample_shape, dtype=np.int32)).tolist())
        return self._compiled_sample(sample_shape, self._seed(seed), condition)

    def interpolate(self, start: TensorLike, end: TensorLike, num_steps: int = 8) -> tf.Tensor:
        """Events on the straight line between two events' latent values.

        Args:
          start: events at the beginning, `batch + event` or one event.
          end: events at the end, of the same shape.
          num_steps: number of points, both ends included.

        Returns:
          `[num_steps] + shape of start`; the first and last are `start` and `end` up to rounding, or, if the latent values have
          fewer dimensions than the data, what can be told of them from these.

        Raises:
          ValueError: if the events do not fit the distribution, or num_steps < 2.
        """
        if num_steps < 2:
            raise ValueError(f"FlowModel.interpolate: got num_steps={num_steps}, needs at least 2")
        start, end = self._checked(start), self._checked(end)
        if start.shape != end.shape:
            raise ValueError(f"FlowModel.interpolate: got events of shapes {start.shape} and {end.shape}, needs equal shapes")
        z_start, z_end = variational.encode(self._distribution, start), variational.encode(self._distribution, end)
        weights = tf.reshape(tf.linspace(0.0, 1.0, num_steps), [num_steps] + [1] * z_start.shape.rank)
        weights = tf.cast(weights, z_start.dtype)
        return self.decode((1.0 - weights) * z_start + weights * z_end)

    def encode(self, x: TensorLike) -> tf.Tensor:
        """Latent values of events `batch + event`; under a `dfd.VAEPrior` the posterior's means, `batch + [latent_dims]`.

        Raises:
          ValueError: if x does not fit the distribution.
        """
        x = self._checked(x)
        return variational.encode(self._distribution, x)

    def decode(self, z: TensorLike) -> tf.Tensor:
        """Events of latent values; under a `dfd.VAEPrior` those of the likelihood's means."""
        return variational.decode(self._distribution, batches.tensors(z, self._distribution))

    def _checked(self, batch: Any) -> Any:
        """A batch as tensors, after a check."""
        batch = batches.tensors(batch, self._distribution)
        batches.check(batch, self._distribution)
        return batch

    def _log_prob(self, x: Any, seed: Any = None, num_samples: int | None = None) -> tf.Tensor:
        kwargs = {}
        if isinstance(x, dict):
            x, kwargs = x["x"], {"bijector_kwargs": {"condition": x["condition"]}}
        if num_samples is not None and not variational.is_bound(self._distribution):
            raise ValueError(f"FlowModel.log_prob: got num_samples, but the density of {self._distribution.name} is exact")
        kwargs = variational.with_noise(self._distribution, kwargs, seed=seed, num_samples=num_samples)
        with probes_from(seed):
            return self._distribution.log_prob(x, **kwargs)

    def _log_prob_by_rank(self, ranks: tuple[int, ...], x: Any, seed: Any, num_samples: int | None) -> tf.Tensor:
        # Each tuple of ranks is traced by itself: `reduce_retracing` would otherwise trace for tensors of unknown rank.
        return self._log_prob(x, seed, num_samples)

    def _sample(self, sample_shape: tf.Tensor | tuple[int, ...], seed: Any, condition: Any) -> tf.Tensor:
        kwargs = {} if condition is None else {"bijector_kwargs": {"condition": condition}}
        return self._distribution.sample(sample_shape, seed=seed, **kwargs)

    def _next_seed(self) -> tf.Tensor:
        seed = tf.cast(self._seed_generator.next(), tf.int32)
        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            return seed
        return samplers.fold_in(seed, replica.replica_id_in_sync_group)  # replicas draw different noise

    def _seed(self, seed: int | None) -> tf.Tensor:
        return self._next_seed() if seed is None else tf.constant([0, seed], tf.int32)
