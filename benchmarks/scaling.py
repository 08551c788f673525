"""What 74 epochs of ImageNet would need on machines that are not here: computed, not measured.

FLOPs and bytes of a TPU step are the TPU compiler's (tpu_compilations.json, each entry what
`vggrepro tpu-check --json` printed); of a GPU the paper's multiply-adds. Peak rates are the
vendors'. The rate of one host core is the one measured here (README.md beside this file).

Usage: python benchmarks/scaling.py [--publish docs]
       python benchmarks/scaling.py --collect DIR   # DIR/*.json of tpu-check --json
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_report import compilation_table, page

from vggrepro.paper import NETS, TRAINING_IMAGES
from vggrepro.tpu_topology import CHIPS

HERE = Path(__file__).resolve().parent
COMPILATIONS = HERE / "tpu_compilations.json"
EPOCHS = 74
STEPS_PER_CHECKPOINT = 1_000  # of the paper's recipes
ARCHS = ("A", "B", "C", "D", "E")
MEASURED_CORES = 2  # of the machine of README.md's input_pipeline table
LINK_SHARE = 0.5  # of the published rate between devices that an all-reduce is assumed to reach


@dataclass(frozen=True)
class Machine:
    """Published figures, and what is assumed.

    Attributes:
      topology: for the TPU compiler; '' for GPUs.
      flops, bandwidth: peak operations/s and HBM bytes/s of a device.
      link: bytes/s that a device can send to the others.
      efficiency: share of `flops` that is assumed; 1 for a roofline, a lower bound of time.
      vcpus: of all hosts together; two of them are one core.
    """

    name: str
    topology: str
    devices: int
    flops: float
    bandwidth: float
    link: float
    efficiency: float
    hosts: int
    vcpus: int


def _tpu(name: str, topology: str, devices: int, link: float, hosts: int, vcpus: int) -> Machine:
    chip = CHIPS[topology.partition(":")[0]]
    return Machine(
        name, topology, devices, chip.flops, chip.bandwidth, link, 1.0, hosts, hosts * vcpus
    )


# Links: Google's all-reduce bandwidth of a pod over its devices: v3 340 TB/s over 2,048 cores,
# v5e 51.2 TB/s over 256 chips; NVLink of an A100 SXM: 300 GB/s each way. A100: 156 TFLOP/s in
# TF32, 1,555 GB/s. vCPUs: n1 host of v3 96, ct5lp-hightpu-8t 224, a2-highgpu-8g 96.
V3_LINK, V5E_LINK, NVLINK = 340e12 / 2048, 51.2e12 / 256, 300e9
MACHINES = (
    _tpu("v3-8", "v3:2x2", 8, V3_LINK, 1, 96),
    _tpu("v3-32", "v3:4x4", 32, V3_LINK, 4, 96),
    _tpu("v5e-8", "v5e:2x4", 8, V5E_LINK, 1, 224),
    Machine("8 x A100", "", 8, 156e12, 1555e9, NVLINK, 0.4, 1, 96),
)
BATCHES = {"v3-8": (256,), "v3-32": (256, 1024), "v5e-8": (256,), "8 x A100": (256, 1024)}


@dataclass(frozen=True)
class Plan:
    """One net on one machine; seconds a step, bytes a device."""

    machine: Machine
    arch: str
    batch: int
    arithmetic: float
    memory: float | None  # None: not known; of GPUs it is part of the efficiency
    all_reduce_bytes: float
    all_reduce: float

    @property
    def step(self) -> float:
        """The all-reduce is not hidden behind the backward pass: a cautious reading."""
        return max(self.arithmetic, self.memory or 0.0) + self.all_reduce

    @property
    def steps(self) -> int:
        return round(EPOCHS * TRAINING_IMAGES / self.batch)

    @property
    def hours(self) -> float:
        return self.steps * self.step / 3600

    @property
    def images_per_second(self) -> float:
        return self.batch / self.step

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and momentum, float32."""
        return 8 * NETS[self.arch].parameters

    @property
    def checkpoint_traffic(self) -> float:
        """Bytes over the whole run."""
        return self.checkpoint_bytes * (self.steps // STEPS_PER_CHECKPOINT)


def compiled() -> dict[str, dict[str, Any]]:
    """What tpu-check printed, by topology, net, precision and batch."""
    return json.loads(COMPILATIONS.read_text())["steps"]


def plans(steps: dict[str, dict[str, Any]]) -> Iterator[Plan]:
    """Every machine, net and batch."""
    for machine in MACHINES:
        for batch in BATCHES[machine.name]:
            for arch in ARCHS:
                yield _plan(machine, arch, batch, *_cost(machine, arch, batch, steps))


def _cost(
    machine: Machine, arch: str, batch: int, steps: dict[str, dict[str, Any]]
) -> tuple[float, float | None]:
    """(operations, bytes) of one device and step; bytes are None where it was not compiled."""
    rows = batch // machine.devices
    if not machine.topology:
        # Backward costs two forwards; an operation is a multiply or an add.
        return 6 * NETS[arch].multiply_adds * rows, None
    same_net = [
        found
        for found in steps.values()
        if (found["arch"], found["precision"]) == (arch, "float32")
    ]
    for found in same_net:
        # A device's share does not depend on how many others there are.
        same_chip = found["topology"].partition(":")[0] == machine.topology.partition(":")[0]
        if same_chip and _rows(found) == rows:
            return found["flops"], found["bytes_accessed"]
    return same_net[0]["flops"] * rows / _rows(same_net[0]), None


def _rows(found: dict[str, Any]) -> int:
    return found["batch_size"] // found["replicas"]


def _plan(machine: Machine, arch: str, batch: int, flops: float, moved: float | None) -> Plan:
    # A ring sends and receives each gradient (float32) twice, less a device's own share.
    ring = 2 * (machine.devices - 1) / machine.devices * 4 * NETS[arch].parameters
    return Plan(
        machine,
        arch,
        batch,
        flops / (machine.flops * machine.efficiency),
        None if moved is None else moved / machine.bandwidth,
        ring,
        ring / (machine.link * LINK_SHARE),
    )


def rate_of_a_core() -> float:
    """images/s of one core, from the table of measurements beside this file."""
    found = re.search(r"^\| ours, fast \| (\d+) \|", (HERE / "README.md").read_text(), re.M)
    if found is None:
        raise SystemExit("benchmarks/README.md has no row '| ours, fast | RATE |' any more")
    return int(found[1]) / MEASURED_CORES


def collect(directory: Path) -> None:
    """Keeps what tpu-check printed into DIR/*.json."""
    kept = json.loads(COMPILATIONS.read_text()) if COMPILATIONS.exists() else {"steps": {}}
    for file in sorted(directory.glob("*.json")):
        found = json.loads(file.read_text())
        key = "{topology} {arch} {precision} {batch_size}".format(**found)
        kept["steps"][key] = {**kept["steps"].get(key, {}), **found}
    COMPILATIONS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--publish", type=Path, metavar="DIR", help="writes DIR/scaling.md")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="takes compilations over")
    options = parser.parse_args()
    if options.collect:
        collect(options.collect)
    text = page(list(plans(compiled())), rate_of_a_core())
    if options.publish:
        (options.publish / "scaling.md").write_text(text)
    else:
        print(text)
        print("\n".join(compilation_table(compiled())))


if __name__ == "__main__":
    main()
