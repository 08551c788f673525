"""`vggrepro data check`: reads every record of a shard directory against its index."""

from __future__ import annotations

import argparse
import json

from diagnostics.errors import InputError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = subparsers.add_parser(
        "check",
        help="verify shards",
        description="Reads every record of the shards that `data build` made and compares it "
        "with the index (checksum, size, SHA-256). Names what is damaged; exit code 2.",
    )
    parser.add_argument("directory", metavar="DIR", help="the shards, local or gs://…")
    parser.add_argument("--workers", type=int, metavar="N", help="threads. Default: one a core")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """0: all is well. Damage is an `InputError` after all of it has been printed."""
    from vggrepro.shard_check import check_shards, default_workers
    from vggrepro.stage_progress import shown_progress

    workers = default_workers() if options.workers is None else options.workers
    if workers < 1:
        raise InputError(f"--workers {workers} must be at least 1")
    with shown_progress() as on_progress:
        faults = check_shards(options.directory, workers, on_progress)
    if options.json:
        print(json.dumps({"damaged": faults}))
    elif faults:
        print("\n".join(faults))
    if faults:
        raise InputError(
            f"{len(faults):,} damaged in {options.directory}",
            "Restore the shards from a copy, or build them again",
        )
    if not options.json:
        print(f"{options.directory}: all records are as the index says")
    return 0
