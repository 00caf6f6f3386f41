"""Reference trainings of published flows on CIFAR-10, as options. Needs no TensorFlow."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """How a published flow was trained.

    Attributes:
      training: options of `dimflows.training.train`.
      data: arguments of `dimflows.data.load`.
      source: what it was taken from, and where it differs.
    """

    training: dict[str, Any]
    data: dict[str, Any]
    source: str


PRESETS = {
    "realnvp": Preset(
        training={"learning_rate": 1e-3, "clip_norm": 100.0},
        data={"batch_size": 64, "flips": True},
        source="RealNVP (Dinh, Sohl-Dickstein, Bengio, 2017) and its code; the number of steps was never told",
    ),
    "glow": Preset(
        training={
            "optimizer": "adamax",
            "learning_rate": 1e-3,
            "warmup_steps": 970,
            "optimizer_arguments": {"beta_2": 0.9897},
            "clip_norm": 0.0,
        },
        data={"batch_size": 512, "shifts": 3},
        source="the code of Glow (Kingma, Dhariwal, 2018): ten epochs of warm-up, 1 - beta_2 of one step in an "
        "epoch; it keeps an average of the weights that it does not use",
    ),
    "flowpp": Preset(
        training={"learning_rate": 3e-4, "warmup_steps": 2000, "clip_norm": 1.0, "ema": 0.999},
        data={"batch_size": 64},
        source="the code of Flow++ (Ho and others, 2019), CIFAR-10",
    ),
    "iresnet": Preset(
        training={"optimizer": "adamax", "learning_rate": 3e-3, "warmup_steps": 390, "clip_norm": 0.0},
        data={"batch_size": 128, "flips": True, "shifts": 4},
        source="the code of i-ResNets (Behrmann and others, 2019), CIFAR-10: one epoch of warm-up, 200 in all",
    ),
    "residual-flow": Preset(
        training={
            "learning_rate": 1e-3,
            "optimizer_arguments": {"beta_2": 0.99},
            "warmup_steps": 1000,
            "clip_norm": 1.0,
            "ema": 0.999,
        },
        data={"batch_size": 64, "flips": True},
        source="the code of Residual Flows (Chen and others, 2019), CIFAR-10",
    ),
}
