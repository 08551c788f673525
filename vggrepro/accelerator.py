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
      InputError: the configuration asks for devices that this version cannot train on.
    """
    if config.strategy not in ("auto", "cpu", "pjrt"):
        raise InputError(
            f"strategy '{config.strategy}' is not available in this version",
            "Use --strategy cpu, auto for the first device, or pjrt for all devices of JAX",
        )
    if config.strategy == "pjrt":
        # Not op determinism, under which TensorFlow refuses to lower pooling for XLA.
        return _jax_devices()
    tf.config.experimental.enable_op_determinism()
    # Replays compile many steps on purpose; TensorFlow would warn of "retracing".
    tf.get_logger().setLevel(logging.ERROR)
    gpus = tf.config.list_physical_devices("GPU")
    if gpus and config.strategy == "auto":
        details = tf.config.experimental.get_device_details(gpus[0])
        return f"GPU {details.get('device_name', gpus[0].name)}"
    return f"CPU, {os.cpu_count()} cores"


def _jax_devices() -> str:
    """What JAX would train on.

    Raises:
      InputError: JAX is missing or finds no device.
    """
    try:
        import jax
    except ImportError as error:
        raise InputError(
            "--strategy pjrt needs JAX, which is not installed",
            "Install it: pip install 'vggrepro[pjrt]'",
        ) from error
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise InputError(f"JAX finds no device: {str(error).splitlines()[0]}") from error
    return f"{len(devices)} x {devices[0].device_kind} through JAX {jax.__version__}"


def device_name(config: TrainConfig) -> str:
    """The tf.device string of `prepare`'s choice."""
    use_gpu = config.strategy == "auto" and tf.config.list_physical_devices("GPU")
    return "/GPU:0" if use_gpu else "/CPU:0"
