"""`vggrepro diagnose-nan`: from a stopped run to a tested fix."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InputError, NotReproduced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diagnostics.diagnosis import Diagnosis
    from diagnostics.examine import HealthyStep
    from diagnostics.protocol import ReplayableRun

DESCRIPTION = """\
Replays the step that the guard refused, bit for bit; says where the first
non-finite value is, since when it was coming and why; and replays fixes until one
survives. Also for a run that diverged or never learnt. Writes
RUN_DIR/diagnosis/step-N/ (diagnosis.json, report.html, a Debugger V2 dump)."""

DEFAULT_BUDGET = 180.0


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = subparsers.add_parser(
        "diagnose-nan",
        help="say where, since when and why a run went NaN, and prove a fix",
        description=DESCRIPTION,
    )
    parser.add_argument("target", type=Path, metavar="RUN_DIR", help="a run directory or a bundle")
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="this step instead of the incident's; a healthy one is shown layer by layer",
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=DEFAULT_BUDGET,
        metavar="S",
        help=f"time for the counterfactual replays; 0: none. Default: {DEFAULT_BUDGET:g}",
    )
    parser.add_argument(
        "--bundle", type=Path, metavar="FILE", help="also pack the failing step into FILE"
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="module with the custom objects of a Keras run; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print diagnosis.json, nothing else")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Diagnoses; 0 done, 4 nothing to diagnose, 5 the failure did not recur."""
    if options.budget_seconds < 0:
        raise InputError("--budget-seconds must not be negative")
    if options.target.is_file():
        return _diagnose_bundle(options)
    return _diagnose(options.target, options.target / "diagnosis", options)


def _diagnose_bundle(options: argparse.Namespace) -> int:
    from diagnostics.bundle import open_bundle

    with tempfile.TemporaryDirectory(prefix="vggrepro-bundle-") as place:
        open_bundle(options.target, Path(place) / "run")
        reports = options.target.with_name(options.target.stem + "-diagnosis")
        return _diagnose(Path(place) / "run", reports, options)


def _diagnose(place: Path, reports: Path, options: argparse.Namespace) -> int:
    from diagnostics.diagnose import diagnose
    from diagnostics.examine import dump, examine
    from vggrepro.replay_progress import ReplayProgress

    target = open_run(place, options.imports)
    with ReplayProgress(quiet=options.json) as progress:
        if options.step is not None and options.step != target.incident_step():
            healthy = examine(target, options.step, progress)
            if healthy is not None:
                return _show_healthy(healthy, options.json)
        found = diagnose(
            target, step=options.step, budget_seconds=options.budget_seconds, progress=progress
        )
        directory = reports / f"step-{found.step:08d}"
        progress("writing the report", 0, 0)
        _write(found, target, directory)
        if found.first_nonfinite is not None:
            progress("Debugger V2 dump of the step", 0, 0)
            missing = dump(target, found.step, directory / "tensorboard")
            if missing:
                print(f"no Debugger V2 dump: {missing}", file=sys.stderr)
    if options.bundle is not None:
        _pack(place, found.step, options)
    if options.json:
        _print_json(found.to_dict())
    else:
        _print_diagnosis(found, target, directory)
    return NotReproduced.exit_code if found.verdict == "not_reproduced" else 0


def _write(found: Diagnosis, target: ReplayableRun, directory: Path) -> None:
    from diagnostics.report import write_reports

    write_reports(found, target.telemetry(), target.facts, directory)


def _pack(place: Path, step: int, options: argparse.Namespace) -> None:
    from diagnostics.bundle import write_bundle
    from vggrepro.run_directory import RunDirectory

    with RunDirectory.open(place) as stored:
        data = stored.config().get("data")
    size = write_bundle(options.bundle, place, step, [str(data)] if data else [])
    if not options.json:
        print(f"bundle: {options.bundle} ({size / 1e6:.1f} MB)")


def _print_diagnosis(found: Diagnosis, target: ReplayableRun, directory: Path) -> None:
    from rich.console import Console

    from diagnostics.report_terminal import render

    Console().print(render(found, target.telemetry(), target.facts))
    print(f"report: {directory / 'report.html'}")
    if (directory / "tensorboard").is_dir():
        print(f"the step, op by op: tensorboard --logdir {directory / 'tensorboard'}")


def _print_json(value: dict[str, Any]) -> None:
    from diagnostics.durable_files import json_text

    print(json_text(value, indent=2))


def _show_healthy(healthy: HealthyStep, as_json: bool) -> int:
    """A healthy step layer by layer; exit code 0."""
    from rich.console import Console
    from rich.table import Table

    rows = largest_by_layer(healthy)
    identical = not healthy.differences
    if as_json:
        layers = [
            {"phase": phase, "layer": layer, "op": op, "absmax": absmax}
            for (phase, layer), (op, absmax) in rows.items()
        ]
        _print_json(
            {
                "step": healthy.step,
                "healthy": True,
                "identical": identical,
                "differences": healthy.differences,
                "telemetry": healthy.outcome.telemetry,
                "layers": layers,
            }
        )
        return 0
    same = "bit for bit as recorded" if identical else f"not as recorded: {healthy.differences[0]}"
    table = Table(title=f"step {healthy.step} is healthy; replayed {same}")
    for name in ("phase", "layer", "largest in", "largest value"):
        table.add_column(name)
    for (phase, layer), (op, absmax) in rows.items():
        table.add_row(phase, layer, op, f"{absmax:.4g}")
    Console().print(table)
    return 0


def largest_by_layer(healthy: HealthyStep) -> dict[tuple[str, str], tuple[str, float]]:
    """(phase, layer) -> (op, absolute value) of its largest number, in order of execution."""
    rows: dict[tuple[str, str], tuple[str, float]] = {}
    for record in healthy.records:
        place = (record.phase, record.layer or "")
        if place not in rows or record.absmax > rows[place][1]:
            rows[place] = (record.op, record.absmax)
    return rows


def open_run(place: Path, imports: Sequence[str]) -> ReplayableRun:
    """The run of a directory, whichever program wrote it.

    Raises:
      InputError: not a run directory, or written by an unknown program.
    """
    from vggrepro.run_directory import RunDirectory

    with RunDirectory.open(place) as stored:
        kind = stored.config().get("kind", "vgg")
    if kind == "keras":
        from diagnostics.keras_replay import open_keras_run

        return open_keras_run(place, imports)
    if kind != "vgg":
        raise InputError(f"{place} was written by '{kind}', which this version cannot replay")
    from vggrepro.replay_adapter import VggRun

    return VggRun(place)
