"""The optimizer of a run, with Keras's schedules, clipping, averages and accumulation."""

from collections.abc import Sequence

import keras

from tfp_dimflows.run_config import RunConfig


def make_optimizer(config: RunConfig, num_steps: int | None, variables: Sequence[keras.Variable] = ()) -> keras.Optimizer:
    """The optimizer that a configuration describes.

    Args:
      config: with the options of training.
      num_steps: steps of the whole training; None if that is not known.
      variables: what is to be trained. Those of rank 0 and 1 (shifts, scales, biases) have no weight decay.

    Raises:
      ValueError: if there is no such optimizer or it does not take its arguments; for a schedule without a number of steps, or
        with fewer than those of warm-up.
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
    accumulated = config.gradient_accumulation_steps
    options = {
        "global_clipnorm": config.clip_norm or None,
        "weight_decay": config.weight_decay or None,
        "use_ema": bool(config.ema),
        "ema_momentum": config.ema or 0.99,
        "gradient_accumulation_steps": accumulated if accumulated > 1 else None,
    }
    try:
        optimizer = kind(rate, **config.optimizer_arguments | options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"train: {config.optimizer} does not take {config.optimizer_arguments}: {error}") from error
    if config.weight_decay:
        optimizer.exclude_from_weight_decay(var_list=[variable for variable in variables if len(variable.shape) < 2])
    return optimizer
