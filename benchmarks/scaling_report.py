"""The page and the tables of scaling.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling import Plan

NOT_COMPILED = "not compiled"
PIXEL_BYTES = 224 * 224 * 3 * 4  # of one image as it is fed

HEAD = """\
# 74 epochs of ImageNet, on paper

Made by `python benchmarks/scaling.py --publish docs`; do not edit. **Nothing here ran on a TPU
or a GPU.** 74 epochs of 1,281,167 images (the paper's 370K steps of 256), 224 pixels, float32
with the multiplications as the device does them by default (bfloat16 on a TPU, TF32 on an A100).

{sources}

## Time

"""

SOURCES = {
    "operations and bytes of a TPU step": "the TPU's compiler, the very step "
    "(`benchmarks/tpu_compilations.json`)",
    "operations of a GPU step": "the paper's multiply-adds, times 2, times 3 for forward and "
    "backward",
    "peak rates, HBM and links of TPUs": "published: Google's pages of TPU v3 and v5e",
    "peak rate and links of an A100 (SXM, 40 GB)": "published: NVIDIA's data sheet, 156 TFLOP/s "
    "in TF32, NVLink 300 GB/s each way",
    "vCPUs of the hosts": "published: Google's machine types; two vCPUs count as one core",
    "share of the peak": "TPU: assumed 1, so that its times are lower bounds; A100: assumed 0.4",
    "share of the links": "assumed 0.5; a ring all-reduce of float32 gradients, not hidden behind "
    "the backward pass",
    "images/s of a host core": "measured here: {rate:.0f} (`ours, fast` of benchmarks/README.md, "
    "per core)",
    "parameters, checkpoint bytes": "the paper's counts; weights and momentum, 8 bytes a parameter",
}

TIME_COLUMNS = (
    "machine",
    "net",
    "batch",
    "rows a device",
    "arithmetic, ms",
    "memory, ms",
    "all-reduce, ms (MB a device)",
    "a step, ms",
    "images/s",
    "hours",
)
NEED_COLUMNS = (
    "machine",
    "net",
    "batch",
    "cores for the input",
    "cores there",
    "hosts",
    "checkpoint, GB",
    "all checkpoints, GB",
    "MB/s on average",
)


def page(plans: Sequence[Plan], rate: float) -> str:
    """docs/scaling.md.

    Args:
      rate: images/s that one host core prepares.
    """
    sources = [[what, where.format(rate=rate)] for what, where in SOURCES.items()]
    table = "\n".join(_table(("figure", "where it is from"), sources))
    lines = [HEAD.format(sources=table).rstrip("\n"), ""]
    lines += _table(TIME_COLUMNS, [_time_cells(plan) for plan in plans])
    lines += [
        "",
        "A TPU's hours are the least that these rates allow, a GPU's an expectation at the assumed "
        "share of the peak: do not compare the two. Validation, compilation and stops come on top. "
        "*Not compiled*: the operations are those of the same net at other rows or on another TPU, "
        "the memory traffic is not known, and its time beyond the arithmetic is missing from "
        "the step.",
        "",
        "## Input, hosts, checkpoints",
        "",
        f"Cores for the input: images/s over {rate:.0f}. A checkpoint every 1,000 steps; three are "
        "kept. Each is written by one host, from one replica's copy.",
        "",
    ]
    lines += _table(NEED_COLUMNS, [_need_cells(plan, rate) for plan in plans])
    return "\n".join([*lines, "", *_limits(plans, rate)]) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return head + ["| " + " | ".join(cells) + " |" for cells in rows]


def _time_cells(plan: Plan) -> list[str]:
    more, less = ("≥ ", "≤ ") if _memory(plan) == NOT_COMPILED else ("", "")
    return [
        plan.machine.name,
        plan.arch,
        f"{plan.batch}",
        f"{plan.batch // plan.machine.devices}",
        f"{1e3 * plan.arithmetic:.1f}",
        _memory(plan),
        f"{1e3 * plan.all_reduce:.1f} ({plan.all_reduce_bytes / 1e6:,.0f})",
        f"{more}{1e3 * plan.step:.1f}",
        f"{less}{plan.images_per_second:,.0f}",
        f"{more}{plan.hours:.1f}",
    ]


def _memory(plan: Plan) -> str:
    if plan.memory is not None:
        return f"{1e3 * plan.memory:.1f}"
    return NOT_COMPILED if plan.machine.topology else "in the share"


def _need_cells(plan: Plan, rate: float) -> list[str]:
    needed, there = plan.images_per_second / rate, plan.machine.vcpus / 2
    less = "≤ " if _memory(plan) == NOT_COMPILED else ""
    average = plan.checkpoint_traffic / (3600 * plan.hours)
    return [
        plan.machine.name,
        plan.arch,
        f"{plan.batch}",
        f"{less}{needed:.1f}" if needed <= there else f"**{less}{needed:.1f}**",
        f"{there:.0f}",
        f"{plan.machine.hosts}",
        f"{plan.checkpoint_bytes / 1e9:.2f}",
        f"{plan.checkpoint_traffic / 1e9:,.0f}",
        f"{less}{average / 1e6:.1f}",
    ]


def _limits(plans: Sequence[Plan], rate: float) -> list[str]:
    """Where scaling stops, for every net that has all of its rows."""
    by_case = {(plan.machine.name, plan.arch, plan.batch): plan for plan in plans}
    lines = [
        "## Where scaling stops",
        "",
        "From v3-8 to v3-32, four times the cores. Strong: the paper's batch of 256, 8 rows a "
        "core. Weak: batch 1024, 32 rows a core as before, which is another optimisation "
        "problem than the paper's (learning rate and schedule would have to be found anew). "
        "A core's share of a step is compiled for its rows, so 32 rows of v3-8 stand for 32 "
        "rows of v3-32.",
        "",
    ]
    rows = []
    for arch in dict.fromkeys(plan.arch for plan in plans):
        base = by_case["v3-8", arch, 256]
        rows += [
            _gain(base, by_case["v3-32", arch, batch], f"{kind}, {batch}")
            for kind, batch in (("strong", 256), ("weak", 1024))
        ]
    columns = (
        "net",
        "scaling, batch",
        "hours",
        "times faster",
        "of 4",
        "arithmetic, memory, all-reduce, ms",
    )
    lines += _table(columns, rows)
    return [*lines, "", *_conclusions(plans, rate)]


def _gain(base: Plan, more: Plan, case: str) -> list[str]:
    parts = f"{1e3 * more.arithmetic:.1f}, {_memory(more)}, {1e3 * more.all_reduce:.1f}"
    if more.memory is None:
        return [more.arch, case, NOT_COMPILED, "", "", parts]
    gain = base.hours / more.hours
    hours = f"{base.hours:.1f} to {more.hours:.1f}"
    return [more.arch, case, hours, f"{gain:.2f}", f"{gain / 4:.0%}", parts]


def _conclusions(plans: Sequence[Plan], rate: float) -> list[str]:
    short = [plan for plan in plans if plan.images_per_second / rate > plan.machine.vcpus / 2]
    names = ", ".join(f"{plan.machine.name} {plan.arch} ({plan.batch})" for plan in short)
    heaviest = max(plans, key=lambda plan: plan.images_per_second / plan.machine.vcpus)
    return [
        "- The gradients are as many as the weights (0.5 GB in float32, nine tenths of them in the "
        "fully connected layers) and do not shrink with the rows of a core; neither do the passes "
        "over weights, momentum and gradients, which are part of the memory column. "
        f"{_eight_rows(plans)}",
        "- Host cores at the measured rate: "
        + (f"too few for {names}." if short else "enough everywhere.")
        + f" Nearest to the limit: {heaviest.machine.name}, net {heaviest.arch}, batch "
        f"{heaviest.batch}, {heaviest.images_per_second:,.0f} images/s. A core of those hosts is "
        "not the one measured here.",
        "- `--strategy pjrt` feeds float32 pixels, 0.60 MB an image: "
        f"{PIXEL_BYTES * heaviest.images_per_second / heaviest.machine.hosts / 1e9:.1f} GB/s from "
        "the memory of a host to its devices in that case.",
        "- Checkpoints are a copy of weights and momentum and cost the same whatever the machine: "
        "the faster the steps, the larger their share.",
        "- More than one host: `--strategy pjrt` takes the devices of one process, so v3-32 is "
        "arithmetic only.",
    ]


def _eight_rows(plans: Sequence[Plan]) -> str:
    """What the all-reduce is beside the arithmetic at the smallest number of rows."""
    few = [plan for plan in plans if plan.batch // plan.machine.devices == 8]
    longer = [plan.arch for plan in few if plan.all_reduce > plan.arithmetic]
    return (
        "At 8 rows a core the all-reduce takes longer than the arithmetic for "
        f"{', '.join(longer) or 'no net'} and is {few[-1].all_reduce / few[-1].arithmetic:.0%} of "
        f"it for {few[-1].arch}: there strong scaling stops."
    )


def compilation_table(steps: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of docs/accelerators.md."""
    columns = (
        "topology",
        "net",
        "precision",
        "HBM a device, GB of 17.18",
        "arguments, temporaries, code",
        "TFLOP a device",
        "GB moved a device",
        "at least, a step",
    )
    rows = []
    for one in sorted(steps.values(), key=lambda one: (one["topology"], one["arch"])):
        memory, seconds = one["hbm_bytes"], one["roofline_seconds"]
        bound = max(seconds, key=seconds.__getitem__)
        parts = ("arguments", "temporaries", "code")
        rows.append(
            [
                f"{one['topology']} ({one['replicas']} devices)",
                one["arch"],
                one["precision"],
                f"{memory['total'] / 1e9:.2f}",
                ", ".join(f"{memory[part] / 1e9:.2f}" for part in parts),
                f"{one['flops'] / 1e12:.2f}",
                f"{one['bytes_accessed'] / 1e9:.1f}",
                f"{1e3 * seconds[bound]:.0f} ms ({bound})",
            ]
        )
    return _table(columns, rows)
