"""`vggrepro tpu-check`: compiles a configuration's step for a TPU that is not there."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Any

from diagnostics.durable_files import json_text
from vggrepro.config import TrainConfig
from vggrepro.net_options import PAPER_CLASSES, add_net_options, net_config
from vggrepro.tpu_topology import describe_to_compiler

if TYPE_CHECKING:
    from vggrepro.tpu_compile import Compilation

DESCRIPTION = """\
Compiles the whole training step (every replica, the all-reduce, the guard, the gated
update) with the TPU compiler for a topology that need not be there, and prints whether it
compiles, the memory it takes of a device's HBM, its operations and bytes, and the least
time a step can take. Nothing runs. Needs pip install 'vggrepro[tpu-check]'."""

_BATCH = 256


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = subparsers.add_parser(
        "tpu-check",
        help="compile the training step for a TPU topology, without the TPU",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="TEXT",
        help="generation and shape in chips: v2:2x2, v3:2x2, v4:2x2x1, v5e:2x4, v6e:2x2, …",
    )
    add_net_options(parser, _BATCH)
    parser.add_argument(
        "--find-batch",
        action="store_true",
        help="search the largest global batch that fits, by bisection",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints what the compiler says; 0 also where the step does not fit: that is an answer."""
    describe_to_compiler(options.topology)
    from vggrepro.model import build_network
    from vggrepro.tpu_compile import TpuCompiler

    config = net_config(options, _BATCH)
    config = dataclasses.replace(config, classes=config.classes or PAPER_CLASSES)
    network = build_network(
        config.arch, width=config.width, image_size=config.image_size, classes=config.classes
    )
    compiler = TpuCompiler(options.topology)
    started = time.monotonic()
    found = compiler.compile(config, network)
    seconds = time.monotonic() - started
    largest = None
    if options.find_batch:
        largest = compiler.largest_batch(config, network, found, _tell)
    if options.json:
        print(json_text(_as_json(found, config, largest)))
    else:
        print("\n".join(_lines(found, config, largest, seconds)))
    return 0


def _tell(found: Compilation) -> None:
    verdict = found.problem or f"{found.hbm_bytes['total'] / 1e9:.2f} GB"
    print(f"batch {found.rows * found.replicas}: {verdict}", file=sys.stderr)


def _as_json(found: Compilation, config: TrainConfig, largest: int | None) -> dict[str, Any]:
    arithmetic, memory = found.roofline_seconds()
    return {
        "topology": found.topology,
        "arch": config.arch,
        "precision": config.precision,
        "batch_size": config.batch_size,
        "replicas": found.replicas,
        "compiles": found.compiles,
        "problem": found.problem,
        "hbm_bytes": found.hbm_bytes,
        "hbm_available": found.hbm_available,
        "flops": found.flops,
        "bytes_accessed": found.bytes_accessed,
        "roofline_seconds": {"arithmetic": arithmetic, "memory": memory},
        "largest_batch": largest,
        "kernels": found.kernels,
    }


def _lines(
    found: Compilation, config: TrainConfig, largest: int | None, seconds: float
) -> list[str]:
    from vggrepro.tpu_compile import ROWS_STEP

    head = (
        f"{found.topology}: {found.replicas} devices; VGG-{config.arch}, width {config.width:g}, "
        f"{config.image_size} pixels, {config.precision}, batch {config.batch_size} "
        f"({found.rows} a device)"
    )
    lines = [head]
    if found.problem is not None:
        lines.append(f"does not compile: {found.problem}")
    else:
        lines.append(
            f"compiles ({seconds:.0f} s); TensorFlow lowered its part with {found.kernels} kernels"
        )
        lines += _figures(found)
    if largest is not None:
        fits = f"largest batch that fits: {largest:,}" if largest else "no batch fits"
        lines.append(f"{fits}, in steps of {ROWS_STEP} a device")
    return lines


def _figures(found: Compilation) -> list[str]:
    memory = found.hbm_bytes
    share = memory["total"] / found.hbm_available
    arithmetic, traffic = found.roofline_seconds()
    bound = "arithmetic" if arithmetic > traffic else "memory"
    least = max(arithmetic, traffic)
    rate = found.rows * found.replicas / least
    return [
        f"HBM a device   {memory['total'] / 1e9:.2f} GB of {found.hbm_available / 1e9:.2f} GB "
        f"({share:.0%}): arguments {memory['arguments'] / 1e9:.2f}, temporaries "
        f"{memory['temporaries'] / 1e9:.2f}, code {memory['code'] / 1e9:.3f}; "
        f"{memory['aliased'] / 1e9:.2f} of the outputs reuse arguments",
        f"a step         {found.flops / 1e12:.3g} TFLOP and {found.bytes_accessed / 1e9:.3g} GB "
        "moved a device, as the compiler counts them",
        f"roofline       {1e3 * arithmetic:.3g} ms of arithmetic at the bfloat16 peak, "
        f"{1e3 * traffic:.3g} ms of memory traffic at the HBM's rate",
        f"               so at least {1e3 * least:.3g} ms a step ({bound}), at most {rate:,.0f} "
        "images/s; an estimate from published peaks, not a measurement; the all-reduce between "
        "devices is not counted",
    ]
