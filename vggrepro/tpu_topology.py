"""The TPU topologies that a step can be compiled for, and what one of their devices has."""

from __future__ import annotations

import math
import os
import re
from typing import NamedTuple

from diagnostics.errors import InputError

GIB = 2**30


class Chip(NamedTuple):
    """What one device of a topology has; Google's published figures, per device.

    Attributes:
      accelerator: prefix of the accelerator type; cores: counted in its name, per chip.
      devices: JAX devices a chip (cores of v2 and v3; v4 and later join theirs).
      hbm: bytes. flops: peak bfloat16 operations/s. bandwidth: HBM bytes/s.
    """

    accelerator: str
    cores: int
    devices: int
    hbm: int
    flops: float
    bandwidth: float


# cloud.google.com/tpu/docs, "system architecture" pages, read per device.
CHIPS = {
    "v2": Chip("v2", 2, 2, 8 * GIB, 22.5e12, 350e9),
    "v3": Chip("v3", 2, 2, 16 * GIB, 61.5e12, 450e9),
    "v4": Chip("v4", 2, 1, 32 * GIB, 275e12, 1228e9),
    "v5e": Chip("v5litepod", 1, 1, 16 * GIB, 197e12, 819e9),
    "v5p": Chip("v5p", 2, 1, 95 * GIB, 459e12, 2765e9),
    "v6e": Chip("v6e", 1, 1, 32 * GIB, 918e12, 1640e9),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as 'v3:2x2' or 'v5e:2x4'.

    Raises:
      InputError: no such generation, or no shape.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise InputError(
            f"unknown TPU topology {topology!r}",
            f"Give GENERATION:SHAPE of {', '.join(CHIPS)}, for example v3:2x2 or v5e:2x4",
        )
    return CHIPS[name]


def describe_to_compiler(topology: str) -> None:
    """Sets what libtpu reads from the environment; before TensorFlow or JAX is imported.

    tensorflow-tpu loads libtpu as soon as it is imported, which without this asks a
    metadata server for minutes.
    """
    chip = chip_of(topology)
    chips = math.prod(int(side) for side in topology.partition(":")[2].split("x"))
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=f"{chip.accelerator}-{chip.cores * chips}",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_MIN_LOG_LEVEL="3",
        TPU_STDERR_LOG_LEVEL="3",
        # Nothing runs, so two processes may compile at the same time.
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
