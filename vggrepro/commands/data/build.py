"""`vggrepro data build`: TFRecord shards with random access from images."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

DESCRIPTION = """\
Packs images into TFRecord shards with an index, which `train --data` takes like a
directory of images, for the same batches. SRC holds train/ and val/ with a directory for
each class; or the official ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
ILSVRC2012_devkit_t12.tar.gz; or Kaggle's ILSVRC/Data/CLS-LOC and LOC_val_solution.csv.
A build that was stopped goes on when it is started again. The same images make the same
files."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = subparsers.add_parser("build", help="pack images into shards", description=DESCRIPTION)
    parser.add_argument("source", metavar="SRC", help="where the images are")
    parser.add_argument(
        "target",
        metavar="DST",
        help="a new or empty directory; or a URL (gs://…), which is not locked: see to it that "
        "only one build writes there. Its shards wait in TMPDIR, one for each worker",
    )
    parser.add_argument(
        "--dirty",
        action="append",
        default=[],
        metavar="KIND=POLICY",
        help="what to do with unusual images: convert (to RGB, whenever it is read), skip, or "
        "fail; may be repeated. Default: grayscale, cmyk, ycck, png and exif-rotation (which "
        "is ignored) convert; empty, not-image, truncated, tiny and giant fail",
    )
    parser.add_argument(
        "--resize",
        type=int,
        default=0,
        metavar="S",
        help="store images with their shorter side reduced to S pixels (JPEG, quality 95): less "
        "disk and decoding, but no longer the same pixels. Default: stored as they are",
    )
    parser.add_argument(
        "--shard-megabytes",
        type=float,
        default=100.0,
        metavar="MB",
        help="size of a shard. Default: 100",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads. Default: one a core")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Builds, verifies, and says what was found."""
    from vggrepro.shard_build import build_shards
    from vggrepro.shard_check import default_workers
    from vggrepro.shard_writer import Recipe
    from vggrepro.stage_progress import shown_progress

    workers = default_workers() if options.workers is None else options.workers
    if options.resize < 0 or options.shard_megabytes <= 0 or workers < 1:
        raise InputError("--resize, --shard-megabytes and --workers must be positive")
    recipe = Recipe(read_policy(options.dirty), options.resize)
    with shown_progress() as on_progress:
        manifest = build_shards(
            options.source,
            options.target,
            recipe,
            int(options.shard_megabytes * 1e6),
            workers,
            on_progress,
        )
    if options.json:
        print(json.dumps({"directory": options.target, "splits": manifest["splits"]}))
    else:
        _print_result(options.target, manifest)
    return 0


def read_policy(changes: list[str]) -> dict[str, str]:
    """The default policies with those of `--dirty`.

    Raises:
      InputError: an unknown kind or policy, or nothing that could be converted.
    """
    from vggrepro.image_inspection import KINDS, UNUSABLE

    policy = dict(KINDS)
    for change in changes:
        kind, _, action = change.partition("=")
        if kind not in KINDS or action not in ("convert", "skip", "fail"):
            raise InputError(
                f"--dirty {change} is not KIND=convert|skip|fail", "Kinds: " + ", ".join(KINDS)
            )
        if kind in UNUSABLE and action == "convert":
            raise InputError(f"--dirty {change}: such images cannot be converted", "Use skip")
        policy[kind] = action
    return policy


def _print_result(target: str, manifest: Mapping[str, Any]) -> None:
    for split, known in manifest["splits"].items():
        found = ", ".join(f"{count:,} {kind}" for kind, count in known["found"].items() if count)
        print(
            f"{split}: {known['examples']:,} images, {known['bytes'] / 1e6:,.0f} MB in "
            f"{len(known['shards'])} shards, verified"
            + (f"; {found}" if found else "")
            + (f"; {len(known['skipped'])} skipped" if known["skipped"] else "")
        )
    if manifest["resize"]:
        print(f"deviation: stored at shorter side {manifest['resize']['shorter_side']}")
    print(f"next\n  vggrepro train --data {target}")
