"""The optimizer of a run, with Keras's schedules, clipping, averages and accumulation."""

from collections.abc import Sequence
from typing import Any

import keras

from tfp_dimflows.run_config import RunConfig

_OWN_OPTIONS = {name: name for name in ("learning_rate", "weight_decay", "gradient_accumulation_steps")}
_OWN_OPTIONS |= {"use_ema": "ema", "ema_momentum": "ema", "global_clipnorm": "clip_norm"}
_OTHER_CLIPPING = ("clipnorm", "clipvalue")


def make_optimizer(config: RunConfig, num_steps: int | None, variables: Sequence[keras.Variable] = ()) -> keras.Optimizer:
    """The optimizer that a configuration describes.

    Args:
      config: with the options of training.
      num_steps: steps of the whole training; None if that is not known.
      variables: what is to be trained. Those of rank 0 and 1 (shifts, scales, biases) have no weight decay.

    Raises:
      ValueError: if there is no such optimizer or it does not take its arguments, or these have options of their own; for a
        schedule without a number of steps, or with fewer than those of warm-up.
    """
    rate = config.learning_rate
    if config.schedule != "constant" or config.warmup_steps:
        if num_steps is None or num_steps <= config.warmup_steps:
            got = "an unknown number of" if num_steps is None else num_steps
            raise ValueError(
                f"train: got {got} steps of training with schedule={config.schedule!r} and warmup_steps={config.warmup_steps}, "
                "needs more than those of warm-up, by epochs and steps_per_epoch"
            )
        rate = keras.optimizers.schedules.CosineDecay(
            0.0 if config.warmup_steps else rate,
            num_steps - config.warmup_steps,
            alpha=0.0 if config.schedule == "cosine" else 1.0,
            warmup_target=rate if config.warmup_steps else None,
            warmup_steps=config.warmup_steps,
        )
    try:
        kind = type(keras.optimizers.get(config.optimizer))
    except ValueError as error:
        raise ValueError(
            f"train: got optimizer={config.optimizer!r}, needs the name of a Keras optimizer, such as adam"
        ) from error
    for name in config.optimizer_arguments:
        if name in _OWN_OPTIONS:
            raise ValueError(f"train: got {name} among optimizer_arguments, needs it as the option {_OWN_OPTIONS[name]}")
        if name in _OTHER_CLIPPING and config.clip_norm:
            raise ValueError(
                f"train: got {name} among optimizer_arguments with clip_norm={config.clip_norm}, needs clip_norm=0"
            )
    options: dict[str, Any] = {"learning_rate": rate}
    if config.clip_norm:
        options["global_clipnorm"] = config.clip_norm
    if config.weight_decay is not None:
        options["weight_decay"] = config.weight_decay
    if config.ema:
        options |= {"use_ema": True, "ema_momentum": config.ema}
    if config.gradient_accumulation_steps > 1:
        options["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    try:
        optimizer = kind(**config.optimizer_arguments | options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"train: {config.optimizer} does not take {config.optimizer_arguments}: {error}") from error
    if optimizer.weight_decay:
        optimizer.exclude_from_weight_decay(var_list=[variable for variable in variables if len(variable.shape) < 2])
    return optimizer
