"""What every result file says about the machine it was measured on."""

import importlib.metadata
import json
import os
import pathlib
import platform

import tensorflow as tf

RESULTS = pathlib.Path(__file__).parent / "results"


def describe() -> dict:
    """Processor, accelerators and versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    packages = ("tensorflow", "tensorflow-probability", "keras", "numpy")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "gpus": [
            tf.config.experimental.get_device_details(g).get("device_name", g.name)
            for g in tf.config.list_physical_devices("GPU")
        ],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def write(name: str, result: dict) -> None:
    """Writes `results/NAME.json` and prints it."""
    text = json.dumps({"machine": describe(), **result}, indent=2)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
