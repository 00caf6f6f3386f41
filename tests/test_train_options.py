"""Options of training: each changes what it says, through a kill too; bad ones are refused before anything is written."""

import csv
import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfp_dimflows as dimflows
from tfp_dimflows import cli, presets, training
from tfp_dimflows.distributions import structure_of
from tfp_dimflows.training import clock, optimizers

RNG = np.random.default_rng(0)
EVENTS = RNG.normal(size=[96, 2]).astype(np.float32)
OTHERS = RNG.normal(size=[32, 2]).astype(np.float32)


def batches(events, size=16):
    return tf.data.Dataset.from_tensor_slices(events).batch(size, drop_remainder=True)


def train(directory, validation=True, recipe="realnvp", arguments=None, resume=False, **options):
    options = {"epochs": 2, "event_shape": [2], "learning_rate": 1e-2} | options
    arguments = {"depth": 1, "width": 4, "num_blocks": 1} if arguments is None else arguments
    validation_data = batches(OTHERS) if validation else None
    data = batches(EVENTS), batches(OTHERS + 1.0), validation_data
    return training.train(recipe, directory, *data, arguments=arguments, resume=resume, **options)


SMALL = {"depth": 1, "width": 4, "num_blocks": 1}


def train_images(directory, **options):
    events = tf.data.Dataset.from_tensor_slices(EVENTS.reshape(-1, 2, 2, 1)).repeat(2).batch(16, drop_remainder=True)
    options = {"recipe": "realnvp", "arguments": SMALL, "epochs": 2} | options
    return training.train(options.pop("recipe"), directory, events, events, events, event_shape=[2, 2, 1], **options)


def rows(directory):
    with open(directory / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def config(**options):
    return training.RunConfig(**{"recipe": "realnvp", "event_shape": [2], "epochs": 2} | options)


def step(optimizer, variable, gradient):
    optimizer.build([variable])
    optimizer.apply_gradients([(tf.constant(gradient), variable)])


def interrupt(run, epoch=None):
    """Ends a training just before a backup of this epoch, counted from 0; by default after the last epoch."""

    def die(self, number=None, logs=None):
        if number == epoch:
            raise KeyboardInterrupt
        return on_epoch_end(self, number, logs)

    callback = training.backup.Backup
    on_epoch_end = callback.on_epoch_end
    with pytest.MonkeyPatch.context() as patch:
        if epoch is None:
            patch.setattr(callback, "on_train_end", lambda self, logs=None: die(self))
        else:
            patch.setattr(callback, "on_epoch_end", die)
        with pytest.raises(KeyboardInterrupt):
            run()


# The optimizer.


def test_the_optimizer_and_its_arguments():
    optimizer = optimizers.make_optimizer(config(optimizer="adamax", optimizer_arguments={"beta_2": 0.5}), None)
    assert isinstance(optimizer, keras.optimizers.Adamax) and optimizer.beta_2 == 0.5
    assert float(optimizer.learning_rate) == pytest.approx(1e-3) and optimizer.global_clipnorm == 100.0
    assert not optimizer.use_ema and optimizer.weight_decay is None and optimizer.gradient_accumulation_steps is None


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("cosine", 0, lambda k: 0.5 * (1.0 + math.cos(math.pi * k / 20))),
        ("cosine", 4, lambda k: k / 4 if k < 4 else 0.5 * (1.0 + math.cos(math.pi * (k - 4) / 16))),
        ("constant", 4, lambda k: min(k / 4, 1.0)),
    ],
)
def test_schedules(schedule, warmup, expected):
    options = config(schedule=schedule, warmup_steps=warmup, learning_rate=0.3)
    rate = optimizers.make_optimizer(options, 20)._learning_rate
    for k in range(20):
        assert float(rate(k)) == pytest.approx(0.3 * expected(k), abs=1e-6)


def test_gradients_are_clipped():
    shifts = {}
    for norm in (0.0, 0.5):
        variable = keras.Variable([0.0, 0.0])
        step(optimizers.make_optimizer(config(optimizer="sgd", learning_rate=1.0, clip_norm=norm), None), variable, [3.0, 4.0])
        shifts[norm] = variable.numpy()
    np.testing.assert_allclose(shifts[0.0], [-3.0, -4.0])
    np.testing.assert_allclose(shifts[0.5], [-0.3, -0.4], rtol=1e-6)


def test_matrices_decay_and_vectors_do_not():
    variables = [keras.Variable([[1.0]]), keras.Variable([1.0])]
    options = config(optimizer="sgd", learning_rate=0.1, weight_decay=0.5)
    optimizer = optimizers.make_optimizer(options, None, variables)
    optimizer.build(variables)
    optimizer.apply_gradients([(tf.zeros_like(v.value), v) for v in variables])
    assert float(variables[0].numpy().item()) == pytest.approx(0.95) and variables[1].numpy() == [1.0]


def test_gradients_accumulate():
    variable = keras.Variable([0.0])
    optimizer = optimizers.make_optimizer(config(optimizer="sgd", learning_rate=1.0, gradient_accumulation_steps=2), None)
    optimizer.build([variable])
    for gradient, expected in [(1.0, 0.0), (3.0, -2.0), (5.0, -2.0)]:
        optimizer.apply_gradients([(tf.constant([gradient]), variable)])
        assert variable.numpy() == [expected]


@pytest.mark.parametrize(("weight_decay", "expected"), [(None, 0.004), (0.0, 0.0), (0.1, 0.1)])
def test_an_optimizer_has_its_own_weight_decay_by_default(weight_decay, expected):
    assert optimizers.make_optimizer(config(optimizer="adamw", weight_decay=weight_decay), None).weight_decay == expected


def test_every_preset_is_a_training():
    for name, preset in presets.PRESETS.items():
        optimizer = optimizers.make_optimizer(config(**preset.training), 5000)
        is_warm = not preset.training.get("warmup_steps")
        assert float(optimizer.learning_rate) == pytest.approx(is_warm * preset.training["learning_rate"], rel=1e-5), name
        assert preset.source and set(preset.data) <= {"batch_size", "flips", "shifts"}


# Trainings.


def test_the_average_of_the_weights_is_validated_kept_and_saved(tmp_path):
    model = train(tmp_path / "run", ema=0.5, epochs=1)
    raw = train(tmp_path / "raw", epochs=1)
    assert float(model.optimizer.ema_momentum) == 0.5
    averages = model.optimizer._model_variables_moving_average
    differences = []
    for variable, average, other in zip(model.trainable_variables, averages, raw.trainable_variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), average.numpy())
        differences.append(np.abs(variable.numpy() - other.numpy()).max())
    assert max(differences) > 1e-3  # the weights themselves are others, and were trained in the same way
    loaded = dimflows.load(tmp_path / "run")
    for variable, other in zip(model.trainable_variables, loaded.trainable_variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), other.numpy())
    validated = -model.log_prob(OTHERS).numpy().mean()
    assert float(rows(tmp_path / "run")[0]["val_nll"]) == pytest.approx(validated, rel=1e-4)


def test_the_best_epoch_is_kept(tmp_path):
    model = train(tmp_path / "run", learning_rate=0.5, epochs=4)
    values = [float(row["val_nll"]) for row in rows(tmp_path / "run")]
    best = int(np.argmin(values))
    assert best < 3, "the last epoch is the best, which tells nothing"
    assert -model.log_prob(OTHERS).numpy().mean() == pytest.approx(values[best], rel=1e-4)
    assert int(model.optimizer.iterations.numpy()) == 6 * (best + 1)
    last = train(tmp_path / "last", validation=False, learning_rate=0.5, epochs=4)
    assert int(last.optimizer.iterations.numpy()) == 6 * 4
    assert not (tmp_path / "run" / "backup").exists()


def test_the_test_data_are_read_once(tmp_path):
    reads = []

    def events():
        reads.append(None)
        yield from OTHERS

    test_data = tf.data.Dataset.from_generator(events, output_signature=tf.TensorSpec([2])).batch(16)
    arguments = {"depth": 1, "width": 4, "num_blocks": 1}
    training.train(
        "realnvp", tmp_path, batches(EVENTS), test_data, batches(OTHERS), event_shape=[2], epochs=2, arguments=arguments
    )
    assert len(reads) == 1


def test_patience_ends_a_training(tmp_path):
    train(tmp_path / "run", learning_rate=0.5, epochs=40, patience=2)
    values = [float(row["val_nll"]) for row in rows(tmp_path / "run")]
    assert len(values) - int(np.argmin(values)) == 3 and len(values) < 40


def test_minutes_end_a_training_within_an_epoch(tmp_path, monkeypatch):
    seconds = iter(range(10_000))
    monkeypatch.setattr(clock.time, "monotonic", lambda: 30.0 * next(seconds))  # half a minute from one look to the next
    model = train(tmp_path / "run", epochs=9, max_minutes=2)
    history = rows(tmp_path / "run")
    assert len(history) == 1 and float(history[0]["minutes"]) >= 2.0
    assert 0 < int(model.optimizer.iterations.numpy()) < 6
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_speed_is_told(tmp_path, capsys):
    train(tmp_path / "run", epochs=1)
    assert "events_per_second" in capsys.readouterr().out
    assert float(rows(tmp_path / "run")[0]["events_per_second"]) > 0.0


def test_networks_compute_in_the_precision_that_is_asked_for(tmp_path):
    model = train(tmp_path / "run", epochs=1, precision="mixed_bfloat16")
    loaded = dimflows.load(tmp_path / "run")
    for some in (model, loaded):
        networks = [layer for layer in some._flatten_layers(include_self=False) if isinstance(layer, keras.layers.Dense)]
        assert {layer.compute_dtype for layer in networks} == {"bfloat16"}
        assert some.log_prob(OTHERS).dtype == tf.float32
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.slow
def test_without_a_precision_networks_have_that_of_keras(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = train(tmp_path / "run", epochs=1)
    finally:
        keras.config.set_dtype_policy("float32")
    layers = [layer for layer in model._flatten_layers(include_self=False) if isinstance(layer, keras.layers.Dense)]
    assert {layer.compute_dtype for layer in layers} == {"bfloat16"}


def test_several_steps_at_once_are_the_same_training(tmp_path):
    single = train(tmp_path / "single", epochs=1, validation=False)
    several = train(tmp_path / "several", epochs=1, validation=False, steps_per_epoch=6, steps_per_execution=3)
    assert several.steps_per_execution == 3
    for one, other in zip(single.trainable_variables, several.trainable_variables, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-4, atol=1e-6)
    of_test = [json.loads((tmp_path / name / "metrics.json").read_text())["nll"] for name in ("single", "several")]
    assert of_test[0] == pytest.approx(of_test[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_a_killed_training_with_all_options_ends_as_if_it_had_not_been(precision, tmp_path):
    options = {
        "epochs": 5,
        "optimizer": "adamw",
        "optimizer_arguments": {"beta_1": 0.8},
        "schedule": "cosine",
        "warmup_steps": 3,
        "ema": 0.9,
        "weight_decay": 0.1,
        "gradient_accumulation_steps": 1 if precision == "mixed_float16" else 2,
        "patience": 4,
        "precision": precision,
        "steps_per_epoch": 6,
        "steps_per_execution": 2,
    }
    whole = train(tmp_path / "whole", **options)
    interrupt(lambda: train(tmp_path / "killed", **options), epoch=2)
    killed = train(tmp_path / "killed", resume=True, **options)
    for expected, row in zip(rows(tmp_path / "whole"), rows(tmp_path / "killed"), strict=True):
        assert float(row["val_nll"]) == pytest.approx(float(expected["val_nll"]), rel=1e-6)
    for one, other in zip(whole.variables, killed.variables, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_training_killed_after_its_last_epoch_is_not_trained_on(tmp_path):
    options = {"learning_rate": 0.5, "epochs": 40, "patience": 2}
    train(tmp_path / "whole", **options)
    expected = [row["val_nll"] for row in rows(tmp_path / "whole")]
    interrupt(lambda: train(tmp_path / "killed", **options))
    model = train(tmp_path / "killed", resume=True, **options)
    assert [row["val_nll"] for row in rows(tmp_path / "killed")] == expected
    best = int(np.argmin([float(value) for value in expected]))
    assert int(model.optimizer.iterations.numpy()) == 6 * (best + 1)


@pytest.mark.parametrize("options", [{}, {"use_ema": True, "ema_momentum": 0.9}], ids=["plain", "average"])
def test_spectral_norms_are_those_of_the_weights_that_are_tested(options):
    flow = dimflows.recipes.residual_flow([2], depth=1, width=8)
    model = dimflows.FlowModel(flow, seed=0)
    model.compile(keras.optimizers.Adam(0.05, **options))
    layers = [layer for layer in model._flatten_layers(include_self=False) if hasattr(layer, "spectral_norm")]

    def check(logs=None):
        for layer in layers:
            exact = np.linalg.norm(layer.kernel.numpy().astype(np.float64), 2)
            assert float(layer.spectral_norm()) == pytest.approx(exact, rel=1e-3)

    seen = []
    callbacks = [keras.callbacks.LambdaCallback(on_test_batch_begin=lambda batch, logs: seen.append(check()))]
    if options:
        callbacks.insert(0, keras.callbacks.SwapEMAWeights())
    model.fit(EVENTS, batch_size=16, epochs=2, validation_data=OTHERS, callbacks=callbacks, verbose=0)
    check()
    model.evaluate(OTHERS, callbacks=callbacks, verbose=0)
    check()
    assert len(seen) == 5 and len(layers) >= 2


@pytest.mark.parametrize(("online_steps", "expected"), [(1, 0), (5, 0), (6, 1), (7, 1), (12, 2)])
def test_epochs_that_lack_decisions_are_not_compared(online_steps, expected):
    options = config(recipe="lcma-realnvp", event_shape=[4], online_steps=online_steps, epochs=4)
    model = dimflows.FlowModel(options.build(contributions="online"))
    assert len(structure_of(model.distribution).multiscale.levels) == 2
    data = training.runs._Data(batches(EVENTS), batches(OTHERS), batches(OTHERS))
    assert training.runs._epochs_before_decided(options, data, model) == expected


ONLINE = {
    "recipe": "lcma-realnvp",
    "online_steps": 4,
    "baseline": False,
    "arguments": {"depth": 1, "width": 4, "num_blocks": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"steps_per_execution": 2}])
def test_all_is_decided_online(options, tmp_path):
    model = train_images(tmp_path / "run", **ONLINE, **options)
    multiscale = structure_of(model.distribution).multiscale
    assert multiscale.num_decided == len(multiscale.levels) - 1 == 1


@pytest.mark.slow
def test_a_run_that_lacks_decisions_is_not_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(training.runs.DecideFactorization, "on_train_batch_begin", lambda self, batch, logs=None: None)
    with pytest.raises(RuntimeError, match="0 of 1 factor-outs were decided"):
        train_images(tmp_path / "run", **ONLINE)
    assert not (tmp_path / "run" / "model.keras").exists()


def test_a_run_without_times_is_refused_before_it_is_trained_on(tmp_path):
    interrupt(lambda: train(tmp_path / "run"), epoch=1)
    path = tmp_path / "run" / "history.csv"
    old = path.read_text().replace("minutes", "seconds")
    path.write_text(old)
    with pytest.raises(ValueError, match="history.csv is of version .*choose another directory"):
        train(tmp_path / "run", resume=True)
    assert path.read_text() == old


def test_patience_takes_no_number_as_worse_than_any():
    early = training.runs._EarlyStopping("val_nll", patience=2, mode="min")
    early.set_model(dimflows.FlowModel(dimflows.recipes.nice([2], width=4)))
    early.on_train_begin()
    for epoch, value in enumerate([math.nan, 2.0, 1.0]):
        early.on_epoch_end(epoch, {"val_nll": value})
    assert early.best == 1.0 and early.wait == 0


# Bad options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamm"}, "optimizer='adamm'"),
        ({"optimizer_arguments": {"gamma": 1.0}}, "adam does not take .*gamma"),
        ({"schedule": "linear"}, "schedule='linear', needs one of constant, cosine"),
        ({"schedule": "cosine", "warmup_steps": 12}, "got 12 steps of training with schedule='cosine' and warmup_steps=12"),
        ({"warmup_steps": -1}, "warmup_steps=-1, needs a nonnegative integer"),
        ({"ema": 1.0}, "ema=1.0, needs a number below 1"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0, needs a nonnegative number"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0, needs a positive integer"),
        ({"precision": "float16"}, "precision='float16', needs one of float32, mixed_bfloat16, mixed_float16"),
        ({"steps_per_epoch": 4, "steps_per_execution": 3}, "steps_per_execution=3 and 4 steps per epoch"),
        ({"patience": 1, "validation": False}, "patience=1 without validation data"),
        ({"max_minutes": 0.0}, "max_minutes=0.0, needs a positive number"),
        ({"recipe": "lcma-realnvp", "online_steps": 2, "max_minutes": 1.0}, "got online_steps and max_minutes"),
        ({"epochs": 1.5}, "epochs=1.5, needs a positive integer"),
        ({"optimizer_arguments": {"weight_decay": 0.1}}, "weight_decay among optimizer_arguments, .* option weight_decay"),
        ({"optimizer_arguments": {"use_ema": True}}, "use_ema among optimizer_arguments, .* option ema"),
        ({"optimizer_arguments": {"clipnorm": 1.0}}, "clipnorm among optimizer_arguments with clip_norm=100.0"),
        ({"steps_per_execution": 4}, "steps_per_execution=4 and 6 batches in an epoch"),
        ({"recipe": "lcma-realnvp", "online_steps": 3, "gradient_accumulation_steps": 2}, "online_steps=3 and gradient_acc"),
        ({"recipe": "lcma-realnvp", "online_steps": 3, "steps_per_execution": 2}, "online_steps=3 and steps_per_execution=2"),
        ({"beside": {"nice": {}}, "schedule": "cosine", "warmup_steps": 12}, "got 12 steps"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"epochs": "3"}, {"optimizer": keras.optimizers.Adam()}, {"patience": True}])
def test_values_of_other_types_are_refused(options):
    with pytest.raises(TypeError, match=f"train: got {next(iter(options))}="):
        config(**options)


def test_the_first_phase_of_what_is_trained_beside_is_checked_too(tmp_path):
    with pytest.raises(ValueError, match="got 6 steps .*first phase of lcma-realnvp, pretrain_epochs=1"):
        train_images(tmp_path / "run", beside=["lcma-realnvp"], warmup_steps=6)
    assert not (tmp_path / "run").exists()


def test_minutes_of_several_workers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", type(tf.distribute.get_strategy()))
    with pytest.raises(ValueError, match="max_minutes with several workers"):
        train(tmp_path / "run", max_minutes=1.0)
    assert not (tmp_path / "run").exists()


def test_a_schedule_needs_to_know_its_steps(tmp_path):
    unknown = batches(EVENTS).filter(lambda x: True)
    with pytest.raises(ValueError, match="an unknown number of steps"):
        training.train("realnvp", tmp_path, unknown, batches(OTHERS), event_shape=[2], epochs=2, schedule="cosine")
    assert not list(tmp_path.iterdir())


# The command line.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"batch_size": 64, "flips": False, "shifts": 0}),
        (["--preset", "iresnet"], {"batch_size": 128, "flips": True, "shifts": 4}),
        (["--preset", "iresnet", "--batch-size", "8", "--no-flips"], {"batch_size": 8, "flips": False, "shifts": 4}),
    ],
)
def test_what_is_given_goes_before_the_preset(words, expected):
    given = cli._parser().parse_args(["train", "glow", "--data", "digits", "--epochs", "2", "--out", "run", *words])
    options, data = cli._training_options(vars(given))
    assert data == expected
    assert options == {"epochs": 2} | (presets.PRESETS["iresnet"].training if words else {})


def test_options_of_the_optimizer_on_the_command_line():
    words = ["--preset", "glow", "--optimizer-arguments", "beta_2=0.5", "amsgrad=true", "--ema", "0"]
    given = cli._parser().parse_args(["train", "glow", "--data", "digits", "--epochs", "2", "--out", "run", *words])
    options, _ = cli._training_options(vars(given))
    assert options["optimizer_arguments"] == {"beta_2": 0.5, "amsgrad": True}
    assert options["optimizer"] == "adamax" and options["ema"] == 0.0
