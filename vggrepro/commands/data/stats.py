"""`vggrepro data stats`: mean RGB and colour covariance of the training images."""

from __future__ import annotations

import argparse
import json


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = subparsers.add_parser(
        "stats",
        help="mean RGB and colour covariance",
        description="Reads every training image once, in parallel, and keeps the result in DIR, "
        "where `train` finds it. The result depends on no order and no number of threads.",
    )
    parser.add_argument("directory", metavar="DIR", help="images or shards, local or gs://…")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures, unless the directory holds the statistics of these very images."""
    from vggrepro.data_source import open_index, statistics_cache
    from vggrepro.stage_progress import shown_progress
    from vggrepro.statistics import training_statistics

    index = open_index(options.directory, "train")
    with shown_progress() as on_progress:
        found = training_statistics(
            index,
            statistics_cache(options.directory),
            lambda done, total: on_progress("statistics", done, total),
        )
    if options.json:
        print(json.dumps(found.to_dict()))
        return 0
    print(f"{found.images:,} training images, each of the same weight")
    print("mean RGB, grey levels   " + _row(found.mean_rgb))
    print("covariance, pixels 0..1 " + "; ".join(map(_row, found.covariance)))
    print("eigenvalues             " + _row(found.eigenvalues))
    print("eigenvectors (columns)  " + "; ".join(map(_row, found.eigenvectors)))
    print(f"data fingerprint        {found.fingerprint}")
    return 0


def _row(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.6g}" for value in values)
