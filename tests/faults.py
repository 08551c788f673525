"""The injected faults of the campaign: stage x layer x kind x step x precision, from a seed."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator

from fault_injection import KINDS, NAN, POLE, Injection
from small_runs import tiny_config, tiny_network
from toy_run import LAYERS as TOY_LAYERS
from toy_step import FEATURES, WIDTHS

from diagnostics.diagnosis import Diagnosis
from diagnostics.protocol import STAGES

BATCH = 8  # of both programs
PRECISIONS = ("float32", "bfloat16")
VGG = tiny_network(tiny_config())
LAYERS = {"toy": TOY_LAYERS, "vgg": tuple(layer.name for layer in VGG.weight_layers)}
# Within the first epoch, so that a bad example strikes at its step and not before.
STEPS = {"toy": (0, 1, 3, 7), "vgg": (0, 1, 2, 3)}
MARKED = "marked "  # before a stage: the fault follows an example


@dataclasses.dataclass(frozen=True)
class InjectedFault:
    """An injection into one of the two programs, 'toy' or 'vgg'."""

    program: str
    precision: str
    injection: Injection

    @property
    def name(self) -> str:
        one = self.injection
        stage = f"marked-{one.stage}" if one.marked else one.stage
        place = f"{stage}-{one.layer}" if one.layer else stage
        return f"{self.program}-{self.precision}-{place}-{one.kind}-step{one.step}"


def injected_faults(seed: int = 0) -> list[InjectedFault]:
    """All of them, in a fixed order; the draw decides steps, rows and numbers of elements.

    In float32 every layer of every stage, on the toy with every kind; in bfloat16 a
    third of each stage.
    """
    draw = random.Random(seed)
    found = []
    for program in LAYERS:
        for precision in PRECISIONS:
            places = list(_places(program))
            if precision != "float32":
                places = _a_third(draw, places)
            found += [
                InjectedFault(program, precision, _drawn(draw, program, *place)) for place in places
            ]
    return found


# What a small net shows in half precision, and what needs a real one.
HALF = {"toy": ("forward",), "vgg": ("backward",)}


def quick_faults(seed: int = 0) -> list[InjectedFault]:
    """One of each program and stage, and a few in bfloat16."""
    draw = random.Random(seed)
    found = []
    for program in LAYERS:
        for precision, stages in (("float32", STAGES), ("bfloat16", HALF[program])):
            for stage in stages:
                alike = [
                    one
                    for one in injected_faults(seed)
                    if (one.program, one.precision, one.injection.stage)
                    == (program, precision, stage)
                ]
                found.append(draw.choice(alike))
    return found


def _places(program: str) -> Iterator[tuple[str, str, str]]:
    """(stage, layer, kind)."""
    for turn, stage in enumerate(("forward", "backward", "update", "weights")):
        for number, layer in enumerate(LAYERS[program]):
            kinds = KINDS if program == "toy" else (KINDS[(turn + number) % 3],)
            yield from ((stage, layer, kind) for kind in kinds)
    for stage in ("loss", "data"):
        yield from ((stage, "", kind) for kind in KINDS)
    # A pole, not an overflow: what is ordinary as data does not overflow on its own.
    for stage in ("forward", "backward"):
        for number, layer in enumerate(LAYERS[program][::2]):
            yield MARKED + stage, layer, (NAN, POLE)[number % 2]


def _a_third(draw: random.Random, places: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Of the places of each stage, at least one."""
    chosen = []
    for stage in dict.fromkeys(stage for stage, *_ in places):
        alike = [place for place in places if place[0] == stage]
        chosen += draw.sample(alike, math.ceil(len(alike) / 3))
    return chosen


def _drawn(draw: random.Random, program: str, stage: str, layer: str, kind: str) -> Injection:
    marked, stage = stage.startswith(MARKED), stage.removeprefix(MARKED)
    steps = STEPS[program]
    if stage == "weights":
        steps = steps[1:]  # they are overwritten after a step
    width = tensor_shape(program, stage, layer)[-1] if layer else 3
    return Injection(
        stage,
        layer,
        kind,
        draw.choice(steps),
        rows=tuple(sorted(draw.sample(range(BATCH), draw.randint(1, 3)))),
        units=draw.randint(1, min(3, width)),
        group=draw.choice(["params", "momentum"]),
        marked=marked,
    )


def tensor_shape(program: str, stage: str, layer: str) -> tuple[int, ...]:
    """Shape of the tensor that a fault strikes."""
    if stage == "loss":
        return ()
    if stage == "data":
        return (BATCH, FEATURES) if program == "toy" else (BATCH, VGG.image_size, VGG.image_size, 3)
    if stage in ("forward", "backward"):
        output = WIDTHS[layer][1:] if program == "toy" else VGG.output_shapes()[layer]
        return (BATCH, *output)
    return WIDTHS[layer] if program == "toy" else VGG.parameter_shapes()[f"{layer}/kernel"]


@dataclasses.dataclass(frozen=True)
class Place:
    """What the diagnosis says, or must say, of where a fault is."""

    step: int
    stage: str
    layer: str | None
    kind: str
    count: int
    size: int
    examples: tuple[int, ...]


def expected_place(fault: InjectedFault, example_ids: list[int]) -> Place:
    """Where it is.

    Args:
      example_ids: of the batch of the fault's step, row by row.
    """
    one = fault.injection
    shape = tensor_shape(fault.program, one.stage, one.layer)
    inner = math.prod(shape[1:-1])
    count = {
        "loss": 1,
        "data": len(one.rows) * one.units,
        "weights": one.units,
        "update": math.prod(shape[:-1]) * one.units,
    }.get(one.stage, len(one.rows) * inner * one.units)
    to_blame = one.marked or one.stage == "data"
    return Place(
        one.step,
        one.stage,
        one.layer or None,
        "nan" if one.kind == NAN else "inf",
        count,
        math.prod(shape),
        tuple(example_ids[row] for row in one.rows) if to_blame else (),
    )


def found_place(diagnosis: Diagnosis) -> Place | None:
    """Where a diagnosis says that it is."""
    first = diagnosis.first_nonfinite
    if first is None:
        return None
    return Place(
        diagnosis.step,
        first.stage,
        first.layer,
        first.kind,
        first.count,
        first.size,
        first.examples,
    )


def differences(expected: Place, found: Place | None) -> list[str]:
    """As in 'count 3, not 4'; empty if a place is exactly the expected one."""
    if found is None:
        return ["no place"]
    names = [field.name for field in dataclasses.fields(Place)]
    pairs = [(name, getattr(found, name), getattr(expected, name)) for name in names]
    return [f"{name} {said!r}, not {true!r}" for name, said, true in pairs if said != true]
