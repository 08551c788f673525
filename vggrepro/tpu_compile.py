"""Compiles the training step for a TPU that is not there, with the TPU's own compiler.

`libtpu` holds the compiler and describes a topology without its hardware. What is
compiled is the step of `jax_step`: every replica, the all-reduce, the guard and the
gated update. Nothing runs.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from diagnostics.errors import InputError
from vggrepro.config import TrainConfig
from vggrepro.model import Network

GIB = 2**30
ROWS_STEP = 8  # the batch of a core is searched in these steps: a TPU pads rows to 8
_LARGEST_ROWS = 4096


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


@dataclass(frozen=True)
class Compilation:
    """What the compiler says of one device's share of the step.

    Attributes:
      replicas: devices of the topology. rows: examples a device.
      problem: why it does not compile or fit; None if it does.
      hbm_bytes: arguments, outputs, aliased (outputs that reuse arguments), temporaries,
        code and total; empty if there was a problem.
      flops, bytes_accessed: of one device and step, as the compiler counts them.
    """

    topology: str
    replicas: int
    rows: int
    problem: str | None
    hbm_bytes: dict[str, int]
    hbm_available: int
    flops: float
    bytes_accessed: float

    @property
    def compiles(self) -> bool:
        return self.problem is None

    def roofline_seconds(self) -> tuple[float, float]:
        """(arithmetic, memory): seconds a step needs for each at the chip's peak rates.

        The step takes at least the larger. Float32 convolutions count at the bfloat16
        rate: a TPU multiplies them in bfloat16 unless told otherwise.
        """
        chip = CHIPS[_generation(self.topology)]
        return self.flops / chip.flops, self.bytes_accessed / chip.bandwidth


class TpuCompiler:
    """The compiler for one topology, such as 'v3:2x2' or 'v5e:2x4'.

    Raises:
      InputError: jax or libtpu are missing, or the topology is unknown.
    """

    def __init__(self, topology: str) -> None:
        self.topology, self._chip = topology, CHIPS[_generation(topology)]
        self.devices = np.array(_describe(topology, self._chip)).reshape(-1)

    def compile(self, config: TrainConfig, network: Network) -> Compilation:
        """Compiles the step of a global batch of `config.batch_size`.

        Raises:
          InputError: the batch does not divide over the devices.
        """
        from vggrepro.jax_step import ShardedStep

        replicas = self.devices.size
        if config.batch_size % replicas:
            raise InputError(
                f"batch size {config.batch_size} does not divide over {replicas} devices",
                f"Give a --batch-size that is a multiple of {replicas}",
            )
        step = ShardedStep(config, network, self.devices)
        empty = Compilation(self.topology, replicas, step.rows, None, {}, self._chip.hbm, 0.0, 0.0)
        try:
            compiled = step.program.lower(*step.abstract_arguments()).compile()
        except (RuntimeError, ValueError) as error:
            return dataclasses.replace(empty, problem=explained(str(error)))
        cost = compiled.cost_analysis()
        return dataclasses.replace(
            empty,
            hbm_bytes=_memory(compiled.memory_analysis()),
            flops=float(cost["flops"]),
            bytes_accessed=float(cost["bytes accessed"]),
        )

    def largest_batch(
        self, config: TrainConfig, network: Network, tried: Callable[[Compilation], None]
    ) -> int:
        """The largest global batch that fits, in steps of 8 rows a device; 0 if none does.

        Doubles until it does not fit, then bisects.

        Args:
          tried: told of every compilation.
        """

        def fits(units: int) -> bool:
            batch = units * ROWS_STEP * self.devices.size
            found = self.compile(dataclasses.replace(config, batch_size=batch), network)
            tried(found)
            return found.compiles

        below, above = 0, 1
        while above * ROWS_STEP <= _LARGEST_ROWS and fits(above):
            below, above = above, 2 * above
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (middle, above) if fits(middle) else (below, middle)
        return below * ROWS_STEP * self.devices.size


def explained(message: str) -> str:
    """One line of a compiler's message: memory, or the op and its source line."""
    memory = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    if memory:
        return f"out of memory: needs {memory[1]} of {memory[2]} HBM a device"
    first = next((line.strip() for line in message.splitlines() if line.strip()), "no message")
    ours = re.findall(r'File "[^"]*/((?:vggrepro|diagnostics)/[^"]+)", line (\d+)', message)
    return f"{first} (at {ours[-1][0]}:{ours[-1][1]})" if ours else first


def _generation(topology: str) -> str:
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise InputError(
            f"unknown TPU topology {topology!r}",
            f"Give GENERATION:SHAPE of {', '.join(CHIPS)}, for example v3:2x2 or v5e:2x4",
        )
    return name


def _describe(topology: str, chip: Chip) -> Any:
    """The devices of the topology; only from here on is jax loaded."""
    chips = int(np.prod([int(side) for side in topology.partition(":")[2].split("x")]))
    # The compiler asks neither a metadata server nor a driver, and logs errors alone.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=f"{chip.accelerator}-{chip.cores * chips}",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_MIN_LOG_LEVEL="3",
        TPU_STDERR_LOG_LEVEL="3",
    )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import libtpu  # noqa: F401
        from jax.experimental import topologies
    except ImportError as error:
        raise InputError(
            f"the TPU compiler is not installed ({error.name} is missing)",
            "Install it: pip install 'vggrepro[tpu-check]'",
        ) from error
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the TPU compiler refuses topology {topology!r}: {str(error).splitlines()[0]}",
            "Small ones are v2:2x2, v3:2x2, v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2",
        ) from error


def _memory(found: Any) -> dict[str, int]:
    parts = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["aliased"]
    return {**parts, "total": total}
