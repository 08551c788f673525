"""Which devices train, and the process-wide settings that make runs repeatable."""

from __future__ import annotations

import logging
import os

import tensorflow as tf

from diagnostics.errors import InputError
from vggrepro.config import TrainConfig


def prepare(config: TrainConfig) -> str:
    """Turns on deterministic kernels and names the device that will train.

    Raises:
      InputError: the configuration asks for devices or a precision that this
        version cannot train on.
    """
    if config.strategy not in ("auto", "cpu"):
        raise InputError(
            f"strategy '{config.strategy}' is not available in this version",
            "Use --strategy cpu, or auto for the first device",
        )
    if config.precision == "float16":
        raise InputError(
            "precision 'float16' needs loss scaling, which this version does not have",
            "Use --precision float32 or bfloat16",
        )
    tf.config.experimental.enable_op_determinism()
    # Replays compile many steps on purpose; TensorFlow would warn of "retracing".
    tf.get_logger().setLevel(logging.ERROR)
    gpus = tf.config.list_physical_devices("GPU")
    if gpus and config.strategy == "auto":
        details = tf.config.experimental.get_device_details(gpus[0])
        return f"GPU {details.get('device_name', gpus[0].name)}"
    return f"CPU, {os.cpu_count()} cores"


def device_name(config: TrainConfig) -> str:
    """The tf.device string of `prepare`'s choice."""
    use_gpu = config.strategy == "auto" and tf.config.list_physical_devices("GPU")
    return "/GPU:0" if use_gpu else "/CPU:0"
