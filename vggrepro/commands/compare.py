"""`vggrepro compare`: our errors beside the paper's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InputError
from vggrepro.remote_paths import path_or_url

if TYPE_CHECKING:
    from vggrepro.comparison import Comparison

DESCRIPTION = """\
Puts every evaluation of the runs (see `vggrepro evaluate`) beside the paper's cell for the
same net, S, Q and protocol, with its 95 % interval, what differs from the paper, and other
people's figures. Training images, subsets and other numbers of classes are never put
beside a cell; it says why."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = subparsers.add_parser(
        "compare", help="errors beside the paper's tables", description=DESCRIPTION
    )
    parser.add_argument(
        "places",
        nargs="+",
        type=path_or_url,
        metavar="RUN",
        help="a run directory, or a file of `vggrepro evaluate --json`",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the comparisons; 0 whatever they say."""
    from diagnostics.durable_files import json_text
    from vggrepro.comparison_text import markdown, terminal_lines
    from vggrepro.evaluation_record import read_records

    comparisons = []
    for place in options.places:
        found = read_records(place)
        if not found:
            raise InputError(f"{place} has no evaluation", f"Make one: vggrepro evaluate {place}")
        comparisons += [_compared(record, place) for record in found]
    if options.json:
        made = [one.to_dict() for one in comparisons]
        print(json_text({"comparisons": made}, indent=2))
    elif options.markdown:
        print(markdown(comparisons))
    else:
        sys.stdout.write("\n".join(terminal_lines(comparisons)) + "\n")
    return 0


def _compared(record: dict[str, Any], place: Path) -> Comparison:
    """The comparison of a record, which a user may have edited or an older version written."""
    from vggrepro.comparison import compare

    try:
        return compare(record)
    except (LookupError, TypeError, ArithmeticError) as error:
        raise InputError(
            f"an evaluation in {place} is not whole ({type(error).__name__}: {error})",
            "Evaluate again",
        ) from error
