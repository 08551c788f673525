"""`vggrepro verify`: a run's steps once more, compared bit for bit."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from diagnostics.errors import InputError, NotReproduced
from vggrepro.remote_paths import path_or_url

if TYPE_CHECKING:
    from vggrepro.verification import Verification

DESCRIPTION = """\
Runs the steps of a run again, from a checkpoint or from step 0, and compares the state and
every recorded number bit for bit. On the machine and versions that recorded a run it must
be bit-identical; elsewhere it says what differs first, by how much, and what in the
environment may explain it. Writes nothing."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = subparsers.add_parser(
        "verify", help="run steps again and compare them bit for bit", description=DESCRIPTION
    )
    parser.add_argument(
        "run_dir", type=path_or_url, metavar="RUN_DIR", help="a run of `vggrepro train`"
    )
    parser.add_argument(
        "--steps",
        metavar="A:B",
        default=":",
        help="only steps A to B-1, from the last checkpoint at or before A. Default: all",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verifies; 0 bit-identical, 5 something differs."""
    first, end = _steps(options.steps)
    from diagnostics.durable_files import json_text
    from vggrepro.replay_progress import ReplayProgress
    from vggrepro.verification import verify

    started = time.perf_counter()
    with ReplayProgress(quiet=options.json) as progress:
        found = verify(options.run_dir, first, end, progress)
    seconds = time.perf_counter() - started
    if options.json:
        print(json_text({**found.to_dict(), "seconds": seconds}, indent=2))
    else:
        print("\n".join([*_lines(found), f"  {seconds:.1f} s"]))
    return 0 if found.identical else NotReproduced.exit_code


def _steps(text: str) -> tuple[int | None, int | None]:
    first, colon, end = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return int(first) if first else None, int(end) if end else None
    except ValueError:
        raise InputError(f"--steps '{text}' is not A:B", "As 0:100 or 500:") from None


def _lines(found: Verification) -> list[str]:
    compared = found.compared
    lines = [
        f"steps {found.first_step} to {found.end_step - 1}: "
        + ("bit-identical" if found.identical else "not as recorded"),
        f"  compared: {compared['steps']:,} steps, {compared['validations']:,} validations, "
        f"{compared['states']:,} stored states",
    ]
    if found.first_difference is not None:
        lines.append(f"  first difference: {found.first_difference.sentence()}")
    if found.first_array_difference not in (None, found.first_difference):
        lines.append(f"  next stored state: {found.first_array_difference.sentence()}")
    lines += [f"  environment: {text}" for text in found.environment]
    if not found.identical and not found.environment:
        lines.append(
            "  the recorded environment is this one: the data's pixels, the files of the run, "
            "the hardware or a kernel that is not deterministic"
        )
    return lines
