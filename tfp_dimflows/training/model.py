"""`FlowModel`: a distribution as a Keras 3 model."""

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow.types.experimental import TensorLike
from tensorflow_probability import distributions as tfd

from tfp_dimflows import keras_bridge, recipes
from tfp_dimflows.bijectors.chain import Chain
from tfp_dimflows.bijectors.conditions import as_tensors
from tfp_dimflows.bijectors.probes import probes_from
from tfp_dimflows.bijectors.rotation import Rotation
from tfp_dimflows.bijectors.scan import Scan
from tfp_dimflows.bijectors.walk import Summed
from tfp_dimflows.distributions import structure_of, variational
from tfp_dimflows.training import batches, conditions
from tfp_dimflows.training.nested_dropout import NestedDropout
from tfp_dimflows.training.saving import SavedFlow, unchanged_on_error
from tfp_dimflows.training.summary import print_summary
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
    conditional distribution, dicts `{"x": x, "condition": condition}`. Numbers of any dtype are cast to the distribution's.
    The batch axes of events and condition broadcast from the right, as in TFP.

    A batch whose loss or gradients are not finite is trained on as one without gradients, and leaves the statistics of
    layers, such as a batch normalisation's, as they are. The loss of its epoch is NaN; `keras.callbacks.TerminateOnNaN` stops
    the training there.

    Args:
      distribution: any `tfd.Distribution` with a scalar batch shape; integer images: a `dfd.Dequantized`.
      seed: integer seed of the noise of bounds (dequantisation), of the probes of stochastic log-dets, and of `sample`; None: a
        random one.
      condition_shape: shape of one condition of a conditional distribution, `[n]` for vectors, `[]` for labels; default: the
        recipe's. If it is not known, conditions are taken to have as many batch axes as the events.
      nested_dropout: weight w of a term of the training loss by which codes tell more of events: w times their squared error,
        `w |x - decode(encode(x)[:k])|^2` with a random one of the sizes k of codes, on average over a quarter of the batch.
        The units of x are its own, or for integer images the range of grey levels (1 is the distance from black to white).
        Needs a flow with a `dfb.Multiscale` or `dfb.PNF` next to the latent values; takes a pass of a quarter of the batch in
        each direction more per step. After Bekasov, Murray, "Ordering dimensions with nested dropout normalizing flows", 2020.
      name: the model's name.

    Raises:
      ValueError: if the distribution has no trainable variable, or a batch shape; if it has unbuilt networks and no static
        event shape, or a condition of unknown shape; if nested dropout does not fit it, or its weight is negative.

    #### Example

    >>> normal = tfd.Normal(tf.Variable(0.0), tfp.util.TransformedVariable(1.0, tfb.Softplus()))
    >>> model = dimflows.FlowModel(tfd.Sample(normal, [1]))
    >>> model.compile(keras.optimizers.Adam(0.5))
    >>> history = model.fit(tf.constant([[2.0], [4.0]]), epochs=40, verbose=0)
    >>> bool(abs(normal.loc.numpy() - 3.0) < 0.2)
    True
    """

    def __init__(
        self,
        distribution: tfd.Distribution,
        seed: int | None = None,
        name: str | None = None,
        condition_shape: Sequence[int] | None = None,
        nested_dropout: float = 0.0,
    ):
        # No autocasting: a low-precision policy is for the networks, not for the data and the densities.
        super().__init__(name=name, dtype=keras.config.floatx(), autocast=False)
        if isinstance(distribution.batch_shape, tf.TensorShape) and distribution.batch_shape.rank not in (None, 0):
            raise ValueError(f"FlowModel: {distribution.name} has batch shape {distribution.batch_shape}, needs an empty one")
        self._distribution = distribution
        self._condition_shape = _condition_shape_of(distribution) if condition_shape is None else list(condition_shape)
        # A progressive flow's details have a condition even if the flow has none; a recipe tells whether it has.
        is_unconditional = recipes.config_of(distribution) is not None and self._condition_shape is None
        self._uses_condition = not is_unconditional and variational.uses_condition(distribution)
        if not 0.0 <= nested_dropout < math.inf:
            raise ValueError(f"FlowModel: got nested_dropout={nested_dropout!r}, needs a number >= 0")
        self._nested_dropout = float(nested_dropout)
        self._error_of_codes = NestedDropout(distribution) if nested_dropout else None
        self._is_adapted = self._is_trained = False
        self._seed_generator = keras.random.SeedGenerator(None if seed is None else operator.index(seed))
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
        self._compiled_sample = tf.function(self._sample_by_rank, autograph=False, reduce_retracing=True)
        self._compiled_log_prob = tf.function(self._log_prob_by_rank, autograph=False, reduce_retracing=True)
        self.built = True

    def _build_networks(self) -> None:
        """Lets unbuilt Keras layers make their variables here; inside Keras's training function it would be too late."""
        name, shape = self._distribution.name, self._distribution.event_shape
        if not shape.is_fully_defined():
            raise ValueError(f"FlowModel: {name} has unbuilt networks and no static event shape; build them")
        batch = tf.zeros([1, *shape], self._distribution.dtype)
        if self._uses_condition:
            if self._condition_shape is None:
                raise ValueError(
                    f"FlowModel: {name} has unbuilt networks and a condition; build them, or give its condition_shape"
                )
            batch = {"x": batch, "condition": tf.zeros([1, *self._condition_shape], batches.float_dtype(self._distribution))}
        with tf.init_scope():
            self._log_prob(batch)

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

    def summary(
        self,
        line_length: int | None = None,
        positions: Sequence[float] | None = None,
        print_fn: Callable[[str], Any] | None = None,
        expand_nested: bool = False,
        show_trainable: bool = False,
        layer_range: Sequence[str] | None = None,
    ) -> None:
        """Prints every variable with its owner, its shape and its size, and how many numbers are trained.

        A variable is told by the names that lead to it from the distribution, such as
        `multiscale/level_0/scan/actnorm/shift (ActNorm)`; those of a `dfb.Scan` hold the values of all its bijectors. Seeds,
        maps of indices and counters are left out, and count nowhere; what is estimated in training (spectral norms, moving
        averages) is not trainable.

        Args:
          line_length: length of a line; None: what the longest takes.
          positions: where the columns end, in relation to the length of a line.
          print_fn: what is called with the text in place of `print`.
          expand_nested: changes nothing: the variables of networks are always told one by one.
          show_trainable: whether to tell of every variable if it is trained.
          layer_range: two regular expressions: from the first path that matches the one to the last that matches the other.

        Raises:
          ValueError: if a column is too narrow, or no path matches.
        """
        print_summary(self, line_length, positions, print_fn, show_trainable, layer_range)

    # Training.

    def compile(
        self, optimizer: str | dict | keras.Optimizer = "adam", *, jit_compile: bool | str = "auto", **kwargs: Any
    ) -> None:
        """As `keras.Model.compile`; the loss is fixed.

        Args:
          optimizer: as in Keras. If networks compute in float16, it scales the loss, as Keras's own models do.
          jit_compile: whether to compile the training step with XLA; `"auto"`: if there is a GPU. On a CPU compiling takes
            longer than it saves in short runs.
          **kwargs: as in Keras.

        Raises:
          ValueError: if a loss or metrics are given.
        """
        if kwargs.get("loss") is not None:
            raise ValueError("FlowModel.compile: got a loss; the loss is the negative log-probability")
        if given := [name for name in ("metrics", "weighted_metrics", "loss_weights") if kwargs.get(name)]:
            raise ValueError(
                f"FlowModel.compile: got {', '.join(given)}; the metrics are those of the log-probability, "
                f"{', '.join(metric.name for metric in self._metrics)}, and others are for a callback"
            )
        if jit_compile == "auto":
            jit_compile = bool(tf.config.list_physical_devices("GPU"))
        optimizer = keras.optimizers.get(optimizer)
        layers = self._flatten_layers(include_self=False)
        is_half = any(getattr(layer.dtype_policy, "compute_dtype", None) == "float16" for layer in layers)
        if is_half and kwargs.get("auto_scale_loss", True) and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
        super().compile(optimizer=optimizer, jit_compile=jit_compile, **kwargs)
        # Slots made inside the training function would have it traced twice.
        self.optimizer.build(self.trainable_variables)

    def compile_from_config(self, config: dict) -> None:
        """Keras's hook for loading: compiles as the saved model was."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def fit(self, x: Any = None, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """As `keras.Model.fit`, after a check of the (first) batch that changes nothing if it fails.

        So is `validation_data` checked. A first batch whose latent values are far from unit scale gives a warning, unless the
        model was adapted or trained before.
        """
        first, x = batches.checked_first(x, self._distribution)
        if isinstance(x, tf.data.Dataset):
            kwargs.setdefault("shuffle", False)
        if kwargs.get("validation_data") is not None:
            _, validation_data = batches.checked_first(kwargs["validation_data"], self._distribution)
            kwargs["validation_data"] = self._for_workers(validation_data)
        if first is not None:
            first = self._broadcast(first, self.event_shape.rank)
            if not (self._is_adapted or self._is_trained):
                self._warn_of_scale(first)
        if self._kl_weight is not None:
            self._kl_weight.assign(1.0)  # a training that was interrupted may have left a warm-up's
        self._is_trained = True
        args, kwargs = self._with_convergence(args, kwargs, position=4)
        history = super().fit(self._for_workers(x), *args, **batches.with_labels(x, args, kwargs))
        self.converge()
        return history

    def _warn_of_scale(self, batch: Any) -> None:
        """Warns of a start whose latent values are far from those of standard normal noise."""
        structure = structure_of(self._distribution)
        if not structure.bijectors or structure.augmented is not None or not self._distribution.dtype.is_floating:
            return
        batch = tf.nest.map_structure(lambda value: value[:256], batch)
        x, condition = (batch["x"], batch["condition"]) if isinstance(batch, dict) else (batch, None)
        if not batches.is_far_from_unit_scale(x, len(self.event_shape)):
            return
        z = Summed(x, len(self.event_shape)).inverse(self.bijector, condition).value
        if batches.is_far_from_unit_scale(z, structure.noise.event_shape.rank):
            warnings.warn(
                f"FlowModel.fit: the latent values of {self._distribution.name} are far from unit scale for the first batch; "
                "call `adapt` on the data before `fit`, or standardise it",
                stacklevel=3,
            )

    def train_step(self, data: Any) -> dict[str, Any]:
        """Keras's step, but that a batch whose loss or gradients are not finite counts as one without gradients."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        weights = self.trainable_weights
        statistics = [v for v in self.non_trainable_weights if tf.as_dtype(v.dtype).is_floating]
        before = [tf.identity(v) for v in statistics]
        with tf.GradientTape() as tape:
            log_prob = self(x, training=True)
            loss = self.compute_loss(x, y, log_prob, sample_weight)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, weights)
        must_be_finite = [loss]
        if not isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):  # which has to see that it scales too much
            must_be_finite += [tf.nn.l2_loss(g) for g in gradients if g is not None]
        is_finite = tf.reduce_all([tf.math.is_finite(value) for value in must_be_finite])
        for variable, value in zip(statistics, before):
            variable.assign(tf.where(is_finite, variable, value))
        gradients = [g if g is None else tf.where(is_finite, g, tf.zeros([], g.dtype)) for g in gradients]
        self.optimizer.apply_gradients(zip(gradients, weights))
        self._update_loss(loss, x)
        return self.compute_metrics(x, y, log_prob, sample_weight)

    def _update_loss(self, loss: tf.Tensor, x: Any) -> None:
        tracker = next(metric for metric in self.metrics if metric.name == "loss")
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        tracker.update_state(loss * replicas, sample_weight=tf.shape(tf.nest.flatten(x)[0])[0])

    def converge(self) -> None:
        """Brings what layers estimate iteratively in training (spectral norms) to convergence for the weights as they are.

        `fit`, `evaluate`, `save` and `export` do so themselves.
        """
        for layer in self._iterative_layers():
            layer.converge()

    def _iterative_layers(self) -> list[Any]:
        return [layer for layer in self._flatten_layers(include_self=False) if hasattr(layer, "converge")]

    def _with_convergence(self, args: tuple, kwargs: dict[str, Any], position: int) -> tuple[tuple, dict[str, Any]]:
        """Arguments with a last callback, for `keras.callbacks.SwapEMAWeights` gives a test other weights, and takes them."""
        if not self._iterative_layers():
            return args, kwargs
        given = args[position] if len(args) > position else kwargs.get("callbacks")
        if isinstance(given, keras.callbacks.CallbackList):  # that of `fit` around a validation
            return args, kwargs
        converge = keras.callbacks.LambdaCallback(
            on_test_begin=lambda logs: self.converge(), on_test_end=lambda logs: self.converge()
        )
        callbacks = [*tf.nest.flatten([] if given is None else given), converge]
        if len(args) > position:
            return (*args[:position], callbacks, *args[position + 1 :]), kwargs
        return args, kwargs | {"callbacks": callbacks}

    def evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.evaluate`."""
        args, kwargs = self._with_convergence(args, kwargs, position=5)
        return super().evaluate(self._for_workers(x), *args, **batches.with_labels(x, args, kwargs))

    def _for_workers(self, data: Any) -> Any:
        """With several workers a dataset's images as int32: Keras reduces a batch over the workers, which uint8 cannot be."""
        if not (isinstance(data, tf.data.Dataset) and self._has_workers()):
            return data
        return data.map(batches.without_uint8)

    def _has_workers(self) -> bool:
        return isinstance(self.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy)

    def adapt(self, data: Any, steps: int | None = None) -> None:
        """Data-dependent initialisation: one eager pass in which every ActNorm normalises what it sees.

        A `dfb.Rotation` takes its principal components from what it sees. Call it once, before `fit`. It warns if nothing in
        the distribution adapts, or if it overwrites what was trained.

        Args:
          data: a dataset of batches, or one batch.
          steps: how many batches of a dataset to use, as one large batch; None: four, or as many as have ten events for each of
            the principal components that a rotation takes.

        Raises:
          ValueError: if the data does not fit the distribution; then nothing has changed.
        """
        components = _num_components(self._distribution)
        if isinstance(data, tf.data.Dataset):
            parts, missing = [], 10 * components
            for batch in data.take(-1 if steps is None else steps):
                parts.append(batches.tensors(batches.events(batch), self._distribution))
                missing -= len(tf.nest.flatten(parts[-1])[0])
                if steps is None and len(parts) >= 4 and missing <= 0:
                    break
            if not parts:
                raise ValueError("FlowModel.adapt: the dataset is empty")
            batch = tf.nest.map_structure(lambda *parts: tf.concat(parts, axis=0), *parts)
            batch = batches.checked(batch, self._distribution, batch_axes=1)
        else:
            batch, _ = batches.checked_first(data, self._distribution)
        different = len({event.tobytes() for event in tf.nest.flatten(batch)[-1].numpy()}) if components else math.inf
        if different < components:
            warnings.warn(
                f"FlowModel.adapt: got {different} different events for up to {components} principal components in "
                f"{self._distribution.name}: they tell little of the last of them, whose scales will fit no other events",
                stacklevel=2,
            )
        if self._is_trained:
            warnings.warn(
                "FlowModel.adapt: the model was trained before; its ActNorms are now initialised from this data", stacklevel=2
            )
        held = keras_bridge.variables_of(self._distribution)
        before = [variable.numpy() for variable in held]
        with unchanged_on_error(self.variables), keras_bridge.adaptation():
            self._log_prob(batch, seed=self._next_seed())
        self._is_adapted = True
        if all(np.array_equal(variable, value) for variable, value in zip(held, before)):
            warnings.warn(
                f"FlowModel.adapt: nothing in {self._distribution.name} was initialised: it has no part, such as a "
                "dfb.ActNorm, that takes its scale from the data",
                stacklevel=2,
            )

    def call(self, x: Any, training: bool | None = None) -> tf.Tensor:
        """`log_prob(x)`, shape `[batch]`."""
        x = batches.tensors(batches.events(x), self._distribution)
        x = batches.of_event_shape(x, self._distribution, batch_axes=1)
        with variational.reports() as terms:
            log_prob = self._log_prob(x, seed=self._next_seed())
        for name, metric in self._terms.items():
            metric.update_state(terms[name])
        self._kl = None
        if training and self._kl_weight is not None:
            self._kl = tf.reduce_mean(terms["kl"], axis=list(range(terms["kl"].shape.rank - 1)))
        return log_prob

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: tf.Tensor | None = None, training: bool = True
    ) -> tf.Tensor:
        """Mean negative log-probability plus regularisation losses, with a KL term of the weight `kl_weight`."""
        if training and self._kl_weight is not None:
            y_pred = y_pred + (1.0 - tf.cast(self._kl_weight, y_pred.dtype)) * tf.cast(self._kl, y_pred.dtype)
        if sample_weight is not None:
            y_pred = y_pred * tf.cast(sample_weight, y_pred.dtype)
        # The last batch may be smaller than the number of replicas, some of which then have none of it.
        nll = -tf.math.divide_no_nan(tf.reduce_sum(y_pred), tf.cast(tf.size(y_pred), y_pred.dtype))
        if training and self._error_of_codes is not None:
            nll = nll + self._nested_dropout * tf.cast(self._code_loss(self._error_of_codes, x), nll.dtype)
        losses = [*self.losses, *(loss for layer in self._tf_keras_layers for loss in layer.losses)]
        total = nll + sum(tf.cast(tf.reduce_sum(loss), nll.dtype) for loss in losses)
        return total / tf.distribute.get_strategy().num_replicas_in_sync

    def _code_loss(self, error_of_codes: NestedDropout, batch: Any) -> tf.Tensor:
        """The error of codes of random sizes, of a quarter of a batch."""
        batch = batches.tensors(batches.events(batch), self._distribution)
        batch = tf.nest.map_structure(lambda value: value[: (tf.shape(value)[0] + 3) // 4], batch)
        batch = self._broadcast(batch, self.event_shape.rank)
        x, condition = (batch["x"], batch["condition"]) if isinstance(batch, dict) else (batch, None)
        return error_of_codes(x, condition, len(self.event_shape), self._next_seed())

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
        self,
        x: TensorLike | dict[str, TensorLike],
        num_samples: int | None = None,
        seed: int | None = None,
        condition: Any = None,
    ) -> tf.Tensor:
        """Log-probability of events, compiled.

        In a `tf.function` around it, such as the step of a training loop, shapes are checked, but not values.

        Args:
          x: events, `batch + event`, or a dict with `x` and `condition`.
          num_samples: noise samples of an importance-weighted bound, if the distribution is one.
          seed: integer seed of that noise, and of the probes of stochastic log-dets; None: the model's own stream.
          condition: the condition of a conditional distribution. Its batch axes and those of x broadcast from the right.

        Returns:
          `batch`, or what it and the condition's batch broadcast to.

        Raises:
          ValueError: if x or the condition does not fit the distribution.
        """
        batch = self._checked(x, condition)
        return self._compiled_log_prob(_ranks(batch), batch, self._seed(seed), num_samples)

    def score(self, data: Any, num_samples: int | None = None, seed: int = 0, batch_size: int = 64) -> dict[str, np.ndarray]:
        """Log-probability of each event, such as to find those that are unlike the training data.

        Args:
          data: a dataset of batches, or events (dicts of `x` and `condition`) at once.
          num_samples: as in `log_prob`.
          seed: integer seed of the noise, with which the same batches always have the same scores.
          batch_size: size of the batches in which events are evaluated that are no dataset.

        Returns:
          Columns of the same length, in the order of the data: `log_prob` in nats, for images `bits_per_dim`, and `y` of a
          dataset of pairs `(x, y)`, such as labels or the files of `dimflows.data.load(..., files=True)`. `pandas.DataFrame`
          takes them.

        Raises:
          ValueError: if the data does not fit the distribution.

        #### Example

        >>> model = dimflows.FlowModel(dimflows.recipes.maf([2], depth=1, hidden=[8]))
        >>> model.score([[0.0, 0.0], [3.0, -3.0]])["log_prob"].round(2)
        array([ -1.84, -10.84], dtype=float32)
        """
        if not isinstance(data, tf.data.Dataset):
            events = self._broadcast(batches.checked(data, self._distribution, batch_axes=1), self.event_shape.rank)
            data = tf.data.Dataset.from_tensor_slices(conditions.whole(events)).batch(batch_size)
        log_probs, others = [], []
        for step, batch in enumerate(data):
            log_probs.append(self.log_prob(batches.events(batch), num_samples, seed + step).numpy())
            others += [batch[1].numpy()] if isinstance(batch, tuple) and len(batch) > 1 else []
        if not log_probs:
            raise ValueError("FlowModel.score: the dataset is empty")
        columns = {"log_prob": np.concatenate(log_probs)}
        if self._bits_per_dim is not None:
            columns["bits_per_dim"] = -columns["log_prob"] / (self.event_shape.num_elements() * math.log(2.0))
        return columns | ({"y": np.concatenate(others)} if others else {})

    def sample(
        self, sample_shape: TensorLike = (), seed: int | None = None, condition: Any = None, temperature: TensorLike = 1.0
    ) -> tf.Tensor:
        """Samples of the distribution, compiled.

        At a temperature t the noise u of the latent values becomes `t u + (1 - t) mean of u`; of standard normal noise that is
        `t u`. Low temperatures give more typical and less diverse events, 0 always the same one. Of a `dfd.Augmented` the noise
        of the extra dimensions is scaled too; of a `dfd.VAEPrior` that of its low-dimensional latent values, and that of its
        likelihood.

        Args:
          sample_shape: as in `tfd.Distribution.sample`.
          seed: integer seed; None: the model's own stream.
          condition: the condition of a conditional distribution, one or a batch of them.
          temperature: scale of the noise; 1: samples of the distribution itself.

        Returns:
          `sample_shape + batch of the condition + event`: of n conditions `sample(condition=c)` has one sample for each, and
          `sample(10, condition=c)` ten.

        Raises:
          ValueError: if the condition does not fit the distribution, the temperature is no finite number >= 0, or it is not 1
            and the noise has no mean.
        """
        temperature = _checked_temperature(temperature, "sample")
        sample_shape = sample_shape if tf.is_tensor(sample_shape) else np.asarray(sample_shape, np.int32)
        self._check_use(condition is not None)
        if condition is not None:
            condition = self._checked_condition(condition)
            sample_shape, condition = self._sample_shape_of(sample_shape, condition)
        # As a tensor, so that another number of samples is no other function to trace.
        sample_shape = tf.reshape(tf.cast(sample_shape, tf.int32), [-1])
        ranks = (sample_shape.shape[0], *_ranks(condition))
        samples = self._compiled_sample(ranks, sample_shape, self._seed(seed), condition, temperature)
        known = tf.get_static_value(sample_shape, partial=True)
        return samples if known is None else tf.ensure_shape(samples, [*known, *self.event_shape])

    def interpolate(self, start: TensorLike, end: TensorLike, num_steps: int = 8, condition: Any = None) -> tf.Tensor:
        """Events on the straight line between two events' latent values.

        Args:
          start: events at the beginning, `batch + event` or one event.
          end: events at the end, of the same shape.
          num_steps: number of points, both ends included.
          condition: the condition of a conditional distribution, for start, end and what is between.

        Returns:
          `[num_steps] + shape of start`; the first and last are `start` and `end` up to rounding, or, if the latent values have
          fewer dimensions than the data, what can be told of them from these.

        Raises:
          ValueError: if the events do not fit the distribution, or num_steps < 2.
        """
        if num_steps < 2:
            raise ValueError(f"FlowModel.interpolate: got num_steps={num_steps}, needs at least 2")
        start, end = (batches.checked(x, self._distribution) for x in (start, end))
        if start.shape != end.shape:
            raise ValueError(f"FlowModel.interpolate: got events of shapes {start.shape} and {end.shape}, needs equal shapes")
        z_start, z_end = self.encode(start, condition), self.encode(end, condition)
        weights = tf.reshape(tf.linspace(0.0, 1.0, num_steps), [num_steps] + [1] * z_start.shape.rank)
        weights = tf.cast(weights, z_start.dtype)
        return self.decode((1.0 - weights) * z_start + weights * z_end, condition)

    @property
    def code_sizes(self) -> list[int]:
        """How many of the first latent values make a code, in increasing order; the last is the number of all.

        A `dfb.Multiscale` or a `dfb.PNF` next to the latent values orders them, from coarse to fine: a code ends where one of
        the parts does whose sizes are its `latent_sizes`. Otherwise, as with a `dfd.VAEPrior`, all of them are the only code.
        """
        return structure_of(self._distribution).code_sizes

    def encode(self, x: TensorLike | dict[str, TensorLike], condition: Any = None, dims: int | None = None) -> tf.Tensor:
        """Latent values of events `batch + event`; under a `dfd.VAEPrior` the posterior's means, `batch + [latent_dims]`.

        Args:
          x: events, or a dict with `x` and `condition`.
          condition: as in `log_prob`.
          dims: how many of the first latent values to return, one of `code_sizes`; None: all.

        Raises:
          ValueError: if x or the condition does not fit the distribution, or a code cannot have so many numbers.

        #### Example

        >>> model = dimflows.FlowModel(dimflows.recipes.glow([4, 4, 1], num_levels=2, depth=1, width=4))
        >>> images = tf.random.stateless_normal([3, 4, 4, 1], seed=[0, 0])
        >>> code = model.encode(images, dims=8)
        >>> model.code_sizes, code.shape, model.decode(code).shape
        ([8, 16], TensorShape([3, 8]), TensorShape([3, 4, 4, 1]))
        """
        if dims is not None:
            self._check_code("encode", dims)
        z = self._encode(self._checked(x, condition))
        return z if dims is None else z[..., :dims]

    def decode(self, z: TensorLike, condition: Any = None, temperature: TensorLike = 0.0, seed: int | None = None) -> tf.Tensor:
        """Events of latent values, or of codes; under a `dfd.VAEPrior` those of the likelihood's means.

        The latent values that a code lacks are filled in by noise of a temperature, as in `sample`. By default it is 0, and
        they are the mean of the noise: the mode 0 of standard normal noise.

        Args:
          z: latent values, `batch + [D]`, or the first of them, `batch + [k]` with k one of `code_sizes`.
          condition: as in `log_prob`.
          temperature: scale of the noise in the place of what is not in a code; nothing changes where all is.
          seed: integer seed of that noise; None: the model's own stream.

        Returns:
          `batch + event`.

        Raises:
          ValueError: if the condition does not fit the distribution, a code cannot have so many numbers, or as `sample`.
        """
        temperature = _checked_temperature(temperature, "decode", 0.0)
        z = tf.cast(tf.convert_to_tensor(z), batches.float_dtype(self._distribution))
        batch = z if condition is None else {"x": z, "condition": self._checked_condition(condition)}
        structure = structure_of(self._distribution)
        if structure.code_sizes and z.shape.rank and z.shape[-1] not in (None, structure.code_sizes[-1]):
            self._check_code("decode", z.shape[-1])
            batch = self._broadcast(batch, 1)
            code = batch["x"] if isinstance(batch, dict) else batch
            z = structure.completed(code, temperature, None if temperature is None else self._seed(seed))
            batch = batch | {"x": z} if isinstance(batch, dict) else z
        return self._decode(batch)

    def _check_code(self, method: str, size: Any) -> None:
        """Raises unless a code can have so many numbers."""
        sizes = self.code_sizes
        if not hasattr(size, "__index__") or size not in sizes:
            needs = ", ".join(map(str, sizes)) or "all"
            reason = "where its parts end" if len(sizes) > 1 else "since no Multiscale or PNF next to them orders them"
            raise ValueError(
                f"FlowModel.{method}: got a code of {size} latent values, {self._distribution.name} needs {needs}, {reason}"
            )

    def _checked(self, x: Any, condition: Any = None) -> Any:
        """Events, or a dict of them and their condition, as tensors, after a check."""
        batch = batches.checked(x if condition is None else {"x": x, "condition": condition}, self._distribution)
        return self._broadcast(batch, self.event_shape.rank)

    def _checked_condition(self, condition: Any) -> Any:
        condition = as_tensors(condition, batches.float_dtype(self._distribution))
        if tf.executing_eagerly() and not batches.are_finite(condition):
            raise ValueError(f"FlowModel: {self._distribution.name} got a condition that is not finite")
        return condition

    def _check_use(self, has_condition: bool) -> None:
        if has_condition and not self._uses_condition:
            raise ValueError(f"FlowModel: got a condition, but no part of {self._distribution.name} can use one")
        if not has_condition and self._condition_shape is not None:
            raise ValueError(
                f"FlowModel: {self._distribution.name} needs conditions of shape {self._condition_shape}, by `condition=` or "
                "in batches {'x': x, 'condition': condition}"
            )

    def _broadcast(self, batch: Any, event_ndims: int) -> Any:
        self._check_use(isinstance(batch, dict))
        return conditions.broadcast(batch, event_ndims, self._condition_shape)

    def _encode(self, batch: Any) -> tf.Tensor:
        batch = self._broadcast(batch, self.event_shape.rank)
        x, condition = (batch["x"], batch["condition"]) if isinstance(batch, dict) else (batch, None)
        return variational.encode(self._distribution, x, condition)

    def _decode(self, batch: Any) -> tf.Tensor:
        batch = self._broadcast(batch, structure_of(self._distribution).noise.event_shape.rank)
        z, condition = (batch["x"], batch["condition"]) if isinstance(batch, dict) else (batch, None)
        return variational.decode(self._distribution, z, condition)

    def _log_prob(self, batch: Any, seed: Any = None, num_samples: int | None = None) -> tf.Tensor:
        batch, kwargs = self._broadcast(batch, self.event_shape.rank), {}
        if isinstance(batch, dict):
            batch, kwargs = batch["x"], variational.with_condition(self._distribution, batch["condition"])
        if num_samples is not None and not variational.is_bound(self._distribution):
            raise ValueError(f"FlowModel.log_prob: got num_samples, but the density of {self._distribution.name} is exact")
        kwargs = variational.with_noise(self._distribution, kwargs, seed=seed, num_samples=num_samples)
        with probes_from(seed):
            return self._distribution.log_prob(batch, **kwargs)

    def _log_prob_by_rank(self, ranks: tuple[int, ...], x: Any, seed: Any, num_samples: int | None) -> tf.Tensor:
        # Each tuple of ranks is traced by itself: `reduce_retracing` would otherwise trace for tensors of unknown rank.
        return self._log_prob(x, seed, num_samples)

    def _sample_by_rank(
        self, ranks: tuple[int, ...], sample_shape: tf.Tensor, seed: Any, condition: Any, temperature: Any
    ) -> tf.Tensor:
        return self._sample(sample_shape, seed, condition, temperature)

    def _sample(self, sample_shape: Any, seed: Any, condition: Any, temperature: Any = None) -> tf.Tensor:
        kwargs = {} if condition is None else variational.with_condition(self._distribution, condition)
        return variational.sample(self._distribution, sample_shape, seed, temperature, **kwargs)

    def _sample_shape_of(self, sample_shape: Any, condition: Any) -> tuple[Any, Any]:
        return conditions.sample_shape_of(sample_shape, condition, self._condition_shape)

    def _next_seed(self) -> tf.Tensor:
        seed = tf.cast(self._seed_generator.next(), tf.int32)
        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            return seed
        return samplers.fold_in(seed, replica.replica_id_in_sync_group)  # replicas draw different noise

    def _seed(self, seed: int | None) -> tf.Tensor:
        if seed is None:
            return self._next_seed()
        high_and_low = [operator.index(seed) >> shift & 0xFFFFFFFF for shift in (32, 0)]
        return tf.constant(np.array(high_and_low, np.uint32).astype(np.int32))


def _num_components(module: tf.Module) -> int:
    """How many principal components a rotation takes from data, at most."""
    parts = [module, *module.submodules]
    numbers = [part.num_components for part in parts if isinstance(part, Rotation)]
    numbers += [_num_components(part.bijectors[0]) for part in parts if isinstance(part, Scan)]
    return max(numbers, default=0)


def _checked_temperature(temperature: TensorLike, method: str, neutral: float = 1.0) -> tf.Tensor | None:
    """A temperature as a tensor, so that another one is no other function to trace; None if it is the neutral one."""
    static = tf.get_static_value(temperature)
    is_number = np.ndim(static) == 0 and np.asarray(static).dtype.kind in "iuf" and 0.0 <= static < math.inf
    if not (is_number or (static is None and tf.is_tensor(temperature))):  # tensors of graphs have no values
        raise ValueError(f"FlowModel.{method}: got temperature={temperature!r}, needs a finite number >= 0")
    return None if static == neutral else tf.cast(temperature, tf.float64)


def _condition_shape_of(distribution: Any) -> list[int] | None:
    """That of the recipe which made a distribution, or one below its bijectors."""
    while distribution is not None:
        if (config := recipes.config_of(distribution)) is not None:
            return config["arguments"].get("condition_shape")
        distribution = getattr(distribution, "distribution", None)
    return None


def _ranks(batch: Any) -> tuple[int, ...]:
    return tuple(value.shape.rank for value in tf.nest.flatten(batch) if value is not None)
