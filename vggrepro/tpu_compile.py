"""Compiles the training step for a TPU that is not there, with the TPU's own compiler.

`libtpu` holds the compiler and describes a topology without its hardware. What is
compiled is the step of `jax_step`: every replica, the all-reduce, the guard and the
gated update. Nothing runs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diagnostics.errors import InputError
from vggrepro.compiler_message import explained
from vggrepro.config import TrainConfig
from vggrepro.model import Network
from vggrepro.tpu_topology import chip_of, describe_to_compiler

ROWS_STEP = 8  # the batch of a core is searched in these steps: a TPU pads rows to 8


@dataclass(frozen=True)
class Compilation:
    """What the compiler says of one device's share of the step.

    Attributes:
      replicas: devices of the topology. rows: examples a device.
      problem: why it does not compile or fit; None if it does.
      hbm_bytes: arguments, outputs, aliased (outputs that reuse arguments), temporaries,
        code and total; empty if there was a problem.
      flops, bytes_accessed: of one device and step, as the compiler counts them.
      kernels: 'TPU' where the installed TensorFlow has them, else 'CPU': its lowering.
    """

    topology: str
    replicas: int
    rows: int
    problem: str | None
    hbm_bytes: dict[str, int]
    hbm_available: int
    flops: float
    bytes_accessed: float
    kernels: str

    @property
    def compiles(self) -> bool:
        return self.problem is None

    def roofline_seconds(self) -> tuple[float, float]:
        """(arithmetic, memory): seconds a step needs for each at the chip's peak rates.

        The step takes at least the larger. Float32 convolutions count at the bfloat16
        rate: a TPU multiplies them in bfloat16 unless told otherwise.
        """
        chip = chip_of(self.topology)
        return self.flops / chip.flops, self.bytes_accessed / chip.bandwidth


class TpuCompiler:
    """The compiler for one topology, such as 'v3:2x2' or 'v5e:2x4'.

    Raises:
      InputError: jax or libtpu are missing, or the topology is unknown.
    """

    def __init__(self, topology: str) -> None:
        self.topology, self._chip = topology, chip_of(topology)
        self.devices = np.array(_devices(topology)).reshape(-1)

    def compile(self, config: TrainConfig, network: Network) -> Compilation:
        """Compiles the step of a global batch of `config.batch_size`.

        Raises:
          InputError: the batch does not divide over the devices.
        """
        from vggrepro.jax_step import ShardedStep, has_tpu_kernels

        replicas = self.devices.size
        if config.batch_size % replicas:
            raise InputError(
                f"batch size {config.batch_size} does not divide over {replicas} devices",
                f"Give a --batch-size that is a multiple of {replicas}",
            )
        step = ShardedStep(config, network, self.devices)
        kernels = "TPU" if has_tpu_kernels() else "CPU"
        empty = Compilation(
            self.topology, replicas, step.rows, None, {}, self._chip.hbm, 0.0, 0.0, kernels
        )
        try:
            compiled = step.program.lower(*step.abstract_arguments()).compile()
        except (RuntimeError, ValueError) as error:
            return dataclasses.replace(empty, problem=explained(str(error), step.operations))
        cost = compiled.cost_analysis()
        return dataclasses.replace(
            empty,
            hbm_bytes=_memory(compiled.memory_analysis()),
            flops=float(cost["flops"]),
            bytes_accessed=float(cost["bytes accessed"]),
        )

    def largest_batch(
        self,
        config: TrainConfig,
        network: Network,
        known: Compilation,
        tried: Callable[[Compilation], None],
    ) -> int:
        """The largest global batch that fits, in steps of 8 rows a device; 0 if none does.

        Goes where the memory of what fits points to, at most fourfold, until one batch does
        not fit; then bisects, every other time at the place that the memory points to. The
        result was compiled, and so was the next larger, which does not fit.

        Args:
          known: a compilation of the same step.
          tried: told of every further compilation.
        """
        fitting = [known] if known.compiles else []
        below, above = (known.rows // ROWS_STEP if fitting else 0), 0  # above 0: not known
        for turn in itertools.count():
            if above - below == 1:
                break
            probe = _next_units(_likely_units(fitting), below, above, turn)
            batch = probe * ROWS_STEP * self.devices.size
            found = self.compile(dataclasses.replace(config, batch_size=batch), network)
            tried(found)
            if found.compiles:
                below = probe
                fitting.append(found)
            else:
                above = probe
        return below * ROWS_STEP * self.devices.size


def _next_units(likely: int, below: int, above: int, turn: int) -> int:
    """What to compile next: `below` fits, `above` does not (0: not known yet)."""
    if not above:
        return likely if likely > below else below + max(1, 2**turn // 2)
    if turn % 2:
        return (below + above) // 2
    return min(max(likely, below + 1), above - 1)


def _likely_units(fitting: Sequence[Compilation]) -> int:
    """How many times `ROWS_STEP` rows may fit, on a line through the two largest that do."""
    if not fitting:
        return 1
    *rest, largest = sorted(fitting, key=lambda found: found.rows)
    per_row = largest.hbm_bytes["temporaries"] / largest.rows
    if rest and rest[-1].rows < largest.rows:
        more = largest.hbm_bytes["total"] - rest[-1].hbm_bytes["total"]
        per_row = more / (largest.rows - rest[-1].rows)
    room = largest.hbm_available - largest.hbm_bytes["total"]
    # From some size on the compiler saves memory: a flat line would point anywhere.
    rows = min(largest.rows + room / max(per_row, 1.0), 4.0 * largest.rows)
    return int(rows) // ROWS_STEP


def _devices(topology: str) -> Any:
    """The devices of the topology; only from here on is jax loaded."""
    describe_to_compiler(topology)
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
