"""JAX with virtual devices, once for all tests of a process."""

from __future__ import annotations

import functools
from typing import Any

import pytest

DEVICES = 8


@functools.cache
def eight_virtual_devices() -> Any:
    """The module jax, with eight CPU devices; skips the test where it is not installed."""
    reason = "the extras pjrt and tpu-check are not installed (JAX needs Python 3.11)"
    jax = pytest.importorskip("jax", reason=reason)
    pytest.importorskip("libtpu", reason=reason)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    assert jax.device_count() == DEVICES
    return jax
