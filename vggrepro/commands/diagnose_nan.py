"""`vggrepro diagnose-nan`: from a stopped run to a tested fix."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diagnostics.errors import InputError, NothingToDiagnose, NotReproduced
from vggrepro.remote_paths import path_or_url, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diagnostics.diagnosis import Diagnosis
    from diagnostics.emulation import Emulation
    from diagnostics.examine import HealthyStep, Progress
    from diagnostics.protocol import ReplayableRun, Telemetry

DESCRIPTION = """\
Replays the step that the guard refused, bit for bit; says where the first
non-finite value is, since when it was coming and why; and replays fixes until one
survives. Also for a run that diverged or never learnt. Writes
RUN_DIR/diagnosis/step-N/ (diagnosis.json, report.html, a Debugger V2 dump)."""

DEFAULT_BUDGET = 180.0
# How a run ended that the guard did not stop, and what to do about it.
_ENDINGS = {
    "running": "It is marked as running: it still is, or it was killed and can be resumed",
    "interrupted": "It was interrupted, and can be resumed",
    "failed": "It ended with an error, but not one of numbers; a resumed run shows it again",
    "stopped_by_guard": "The guard stopped it, but what it left in incidents/ is gone; "
    "a resumed run makes it anew",
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = subparsers.add_parser(
        "diagnose-nan",
        help="say where, since when and why a run went NaN, and prove a fix",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "target", type=path_or_url, metavar="RUN_DIR", help="a run directory or a bundle"
    )
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
        "--bundle", type=path_or_url, metavar="FILE", help="also pack the failing step into FILE"
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="module with the custom objects of a Keras run; may be repeated",
    )
    parser.add_argument(
        "--emulate",
        choices=["tpu"],
        help="replay a float32 run as a TPU multiplies: operands of convolutions and matrix "
        "products rounded to bfloat16; says whether the failure appears only so",
    )
    parser.add_argument("--json", action="store_true", help="print diagnosis.json, nothing else")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Diagnoses; 0 done, 4 nothing to diagnose, 5 the failure did not recur."""
    if not options.budget_seconds >= 0:
        raise InputError("--budget-seconds must be 0 or more")
    target: Path = options.target
    if not target.is_file():
        return _diagnose(_Place(target, shown(target), target / "diagnosis"), options)
    from diagnostics.bundle import open_bundle

    with tempfile.TemporaryDirectory(prefix="vggrepro-bundle-") as temporary:
        directory = Path(temporary) / "run"
        open_bundle(target, directory)
        # Beside the bundle; that of a remote one is a copy, which goes away.
        beside = target.parent if shown(target) == str(target) else Path()
        reports = beside / f"{target.stem}-diagnosis"
        return _diagnose(_Place(directory, shown(target), reports), options)


class _Place(NamedTuple):
    """Where a run lies, what the user calls it, and where its reports go."""

    directory: Path
    name: str
    reports: Path


@dataclass(frozen=True)
class _Found:
    """A diagnosis as far as it could be written.

    Attributes:
      telemetry: that the report shows.
      reports: the directory.
      dump: what to say of the Debugger V2 dump; '' if there is none.
      unwritten: the error that kept the reports from the disk.
    """

    diagnosis: Diagnosis
    telemetry: Telemetry
    reports: Path
    dump: str = ""
    unwritten: InputError | None = None


def _diagnose(place: _Place, options: argparse.Namespace) -> int:
    from diagnostics.emulation import compare
    from vggrepro.replay_progress import ReplayProgress

    target = open_run(place.directory, options.imports)
    target.name = place.name
    _check_bundle_option(target, options)
    asked = options.step is not None and options.step != target.incident_step()
    with ReplayProgress(quiet=options.json) as progress:
        healthy = _healthy(target, options, progress) if asked else None
        if healthy is None:
            emulation = None
            if options.emulate:
                target, emulation = compare(target, options.emulate, options.step, progress)
            found = _search(target, place, options, progress, emulation)
    if healthy is not None:
        return _show_healthy(healthy, options.json)
    if options.json:
        _print_json(found.diagnosis.to_dict())
    else:
        _print_diagnosis(found, target)
    if found.unwritten is not None:
        raise found.unwritten
    if options.bundle is not None:
        _pack(place.directory, found.diagnosis.step, options)
    return NotReproduced.exit_code if found.diagnosis.verdict == "not_reproduced" else 0


def _healthy(
    target: ReplayableRun, options: argparse.Namespace, progress: Progress
) -> HealthyStep | None:
    """The step asked for; None if it fails, whichever way it is multiplied."""
    from diagnostics.emulation import emulated
    from diagnostics.examine import examine

    runs = [emulated(target, options.emulate), target] if options.emulate else [target]
    shown = [examine(run, options.step, progress) for run in runs]
    return None if None in shown else shown[0]


def _check_bundle_option(target: ReplayableRun, options: argparse.Namespace) -> None:
    incident = target.incident_step()
    if options.bundle is None:
        return
    if incident is None:
        raise InputError(f"--bundle packs an incident, and {target.name} left none")
    if options.step not in (None, incident):
        raise InputError(f"--bundle packs the incident of step {incident}, not --step")


def _search(
    target: ReplayableRun,
    place: _Place,
    options: argparse.Namespace,
    progress: Progress,
    emulation: Emulation | None,
) -> _Found:
    """Diagnoses and writes the reports; a failing disk does not lose the diagnosis."""
    from diagnostics.diagnose import diagnose
    from diagnostics.report import write_reports

    seen: list[Telemetry] = []
    try:
        diagnosis = diagnose(
            target,
            step=options.step,
            budget_seconds=options.budget_seconds,
            progress=progress,
            on_telemetry=seen.append,
        )
    except NothingToDiagnose as error:
        raise NothingToDiagnose(error.message, _ending(place) or error.remedy) from None
    if emulation is not None:
        diagnosis = emulation.told_in(diagnosis)
    reports = place.reports / f"step-{diagnosis.step:08d}"
    found = _Found(diagnosis, seen[-1], reports)
    progress("writing the report", 0, 0)
    try:
        write_reports(diagnosis, found.telemetry, target.facts, reports)
        dumped = _dump(target, found, progress)
    except InputError as error:
        return dataclasses.replace(found, unwritten=error)
    return dataclasses.replace(found, dump=dumped)


def _ending(place: _Place) -> str:
    """What to say of a run without an incident that did not finish."""
    from vggrepro.run_directory import RunDirectory

    with RunDirectory.open(place.directory) as stored:
        words = _ENDINGS.get(stored.manifest().get("status", ""))
    return f"{words}: vggrepro train --resume {shlex.quote(place.name)}" if words else ""


def _dump(target: ReplayableRun, found: _Found, progress: Progress) -> str:
    from diagnostics.examine import dump

    if found.diagnosis.first_nonfinite is None:
        return ""
    progress("Debugger V2 dump of the step", 0, 0)
    directory = found.reports / "tensorboard"
    missing = dump(target, found.diagnosis.step, directory)
    if missing:
        print(f"no Debugger V2 dump: {missing}", file=sys.stderr)
        return ""
    return f"the step, op by op: tensorboard --logdir {shlex.quote(shown(directory))}"


def _pack(place: Path, step: int, options: argparse.Namespace) -> None:
    from diagnostics.bundle import write_bundle
    from vggrepro.run_directory import RunDirectory

    with RunDirectory.open(place) as stored:
        data = stored.config().get("data")
    size = write_bundle(options.bundle, place, step, [str(data)] if data else [])
    if not options.json:
        print(f"bundle: {shown(options.bundle)} ({size / 1e6:.1f} MB)")


def _print_diagnosis(found: _Found, target: ReplayableRun) -> None:
    from rich.console import Console

    from diagnostics.report_terminal import render

    Console().print(render(found.diagnosis, found.telemetry, target.facts))
    if found.unwritten is None:
        print(f"report: {shown(found.reports / 'report.html')}")
    if found.dump:
        print(found.dump)


def _print_json(value: dict[str, Any]) -> None:
    from diagnostics.durable_files import json_text

    print(json_text(value, indent=2))


def _show_healthy(healthy: HealthyStep, as_json: bool) -> int:
    """A healthy step layer by layer; exit code 0."""
    from rich.console import Console
    from rich.table import Table

    rows = largest_by_layer(healthy)
    identical = healthy.recorded and not healthy.differences
    if as_json:
        layers = [
            {"phase": phase, "layer": layer, "op": op, "absmax": absmax}
            for (phase, layer), (op, absmax) in rows.items()
        ]
        _print_json(
            {
                "step": healthy.step,
                "healthy": True,
                "recorded": healthy.recorded,
                "identical": identical,
                "differences": healthy.differences,
                "telemetry": healthy.outcome.telemetry,
                "layers": layers,
            }
        )
        return 0
    table = Table(title=f"step {healthy.step} is healthy; {_compared(healthy)}")
    for name in ("phase", "layer", "largest in", "largest value"):
        table.add_column(name)
    for (phase, layer), (op, absmax) in rows.items():
        table.add_row(phase, layer, op, f"{absmax:.4g}")
    Console().print(table)
    return 0


def _compared(healthy: HealthyStep) -> str:
    told = healthy.outcome.telemetry
    if told.get("skipped"):
        return (
            f"its update was skipped: gradients overflowed at loss scale {told['loss_scale']:,.0f}"
            f" and are finite at 1, as shown; {_replayed(healthy)}"
        )
    return _replayed(healthy)


def _replayed(healthy: HealthyStep) -> str:
    if not healthy.recorded:
        return "its numbers were not recorded, so none are compared"
    if healthy.differences:
        return f"not replayed as recorded: {healthy.differences[0]}"
    return "replayed bit for bit as recorded"


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
