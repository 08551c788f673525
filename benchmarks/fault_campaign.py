"""The fault campaign: injected and natural faults, clean runs, and what the diagnosis made of them.

Injected faults are put into the pure functions of the step, alike in training and in
the replay, by stage, layer, kind, step and precision; natural ones are mistakes as
people make them; both on the tests' toy and on a narrow VGG. Each is trained until the
guard stops it and diagnosed from what that left. Expected: each injected fault located
exactly (step, stage, layer, kind, count, size, examples), the right cause for each
natural one, no complaint of a clean run, and no command called verified that fails when
it is tried. Definitions: tests/faults.py, tests/natural_faults.py, tests/clean_runs.py.

Usage: python benchmarks/fault_campaign.py [--quick] [--only WORD] [--seed N]
Exit code 1 if anything is not as expected.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from campaign import Campaign
from clean_runs import CLEAN
from fault_verdicts import Outcome
from faults import injected_faults, quick_faults
from rich.console import Console
from rich.table import Table
from small_runs import tiny_data
from unusual_faults import NATURAL, QUICK

from diagnostics.protocol import STAGES
from vggrepro.environment import describe_environment

QUICK_CLEAN = ("toy-seed-0", "toy-bfloat16-4", "vgg-A-glorot")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small part of it")
    parser.add_argument("--only", default="", metavar="WORD", help="only names that hold it")
    parser.add_argument("--seed", type=int, default=0, help="of the injected faults")
    options = parser.parse_args()
    console = Console()
    injected = quick_faults(options.seed) if options.quick else injected_faults(options.seed)
    natural = [one for one in NATURAL if not options.quick or one.name in QUICK]
    clean = [one for one in CLEAN if not options.quick or one.name in QUICK_CLEAN]

    def chosen(items: Iterable) -> list:
        return [item for item in items if options.only in item.name]

    with tempfile.TemporaryDirectory() as place:
        campaign = Campaign(Path(place), tiny_data(Path(place)))
        located = list(_told(console, campaign.injected(chosen(injected))))
        explained = list(_told(console, campaign.natural(chosen(natural))))
        left_alone = list(_told(console, campaign.clean(chosen(clean))))
    _print_injected(console, located)
    _print_natural(console, explained)
    _print_clean(console, left_alone)
    _print_conditions(console)
    return int(any(one.wrong for one in (*located, *explained, *left_alone)))


def _told(console: Console, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """One line a run as it ends."""
    for one in outcomes:
        console.print(f"{one.seconds:6.1f} s  {one.name}", end="", highlight=False)
        console.print("" if not one.wrong else f"  [red]{'; '.join(one.wrong)}", highlight=False)
        yield one


def _print_injected(console: Console, outcomes: Sequence[Outcome]) -> None:
    console.print(_matrix("Injected: stage", outcomes, STAGES))
    causes = sorted({one.cause for one in outcomes})
    console.print(_matrix("Injected: the cause named", outcomes, STAGES, causes, by_cause=True))
    _print_share(console, "injected faults: place exact, nothing innocent blamed", outcomes)


def _print_natural(console: Console, outcomes: Sequence[Outcome]) -> None:
    kinds = sorted({one.truth for one in outcomes})
    said = sorted({*kinds, *(one.said for one in outcomes)})
    console.print(_matrix("Natural: cause", outcomes, kinds, said))
    table = Table(title="Natural faults", title_justify="left")
    for name in ("fault", "cause", "named", "all as expected", "seconds"):
        table.add_column(name)
    for one in outcomes:
        verdict = "no" if one.wrong else "yes"
        table.add_row(one.name, one.truth, one.said, verdict, f"{one.seconds:.1f}")
    console.print(table)
    _print_share(console, "natural faults: place, cause and advice right", outcomes)


def _print_clean(console: Console, outcomes: Sequence[Outcome]) -> None:
    _print_share(console, "clean runs left alone", outcomes)


def _matrix(
    title: str,
    outcomes: Sequence[Outcome],
    rows: Sequence[str],
    columns: Sequence[str] = (),
    by_cause: bool = False,
) -> Table:
    """Truth downwards, what was said across."""
    counted = Counter((one.truth, one.cause if by_cause else one.said) for one in outcomes)
    columns = columns or sorted(
        {*rows, *(said for _, said in counted)},
        key=lambda name: (name not in rows, rows.index(name) if name in rows else 0),
    )
    table = Table(title=f"{title} (truth downwards, said across)", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name or "-", justify="right")
    for row in rows:
        cells = [counted[row, column] for column in columns]
        table.add_row(row, *(str(cell) if cell else "." for cell in cells))
    return table


def _print_share(console: Console, what: str, outcomes: Sequence[Outcome]) -> None:
    right = sum(not one.wrong for one in outcomes)
    seconds = sum(one.seconds for one in outcomes)
    console.print(f"{what}: {right} of {len(outcomes)}, in {seconds:.0f} s")
    for one in outcomes:
        for text in one.wrong:
            console.print(f"  [red]{one.name}: {text}", highlight=False)


def _print_conditions(console: Console) -> None:
    known = describe_environment()
    packages = known["packages"]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    hardware = known["hardware"]
    console.print(f"{hardware['cpu']}, {hardware['cores']} cores; {versions}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
