"""`vggrepro evaluate`: errors of trained nets by the paper's protocols."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InputError
from vggrepro.commands.train import data_directory
from vggrepro.config import ARCHITECTURES, TrainConfig
from vggrepro.evaluation_record import PROTOCOLS
from vggrepro.remote_paths import path_or_url, shown

if TYPE_CHECKING:
    from vggrepro.evaluated_net import EvaluatedNet

DESCRIPTION = """\
Evaluates the last checkpoint of a run, the fusion of several runs, or a file of weights,
on every validation image. Protocols: center (one crop), dense (the whole image, the fully
connected layers as convolutions), multicrop (5x5 grid and mirror images), both. Posteriors
are averaged over views, scales and nets. The result is kept in RUN_DIR/evaluations/."""

OWN_SCALES = "multi"
_RUNS_HELP = "run directories, local or gs://…; several are fused"
_WEIGHTS_HELP = (
    "evaluate a file of weights: .h5 of Keras, .safetensors or .pth of torchvision, or ours"
)
_ARCH_HELP = (
    "with --weights: its net, " + ", ".join(ARCHITECTURES) + ". Default: as its convolutions "
    "say, which A and A-LRN share: then A"
)
_PREPROCESS_HELP = (
    "with --weights: what its net was trained to see; caffe: BGR minus the mean "
    "(keras.applications); torch: RGB in [0, 1], normalised (torchvision)"
)
_SCALES_HELP = (
    "shorter sides after rescaling, pixels; multi: each net's own three of the paper's "
    "Table 4. Default: each net's S"
)
_POOLS_HELP = (
    "odd rows and columns in pooling; down: left out, as in training here; up: kept, as in "
    "Caffe, which the authors used. Default: down"
)
_BATCH_HELP = "views of the net's own size in memory at a time. Default: 16"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = subparsers.add_parser(
        "evaluate",
        help="errors of a trained net: centre crop, dense, multi-scale, multi-crop, fusion",
        description=DESCRIPTION,
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        type=path_or_url,
        metavar="RUN_DIR",
        help=_RUNS_HELP,
    )
    add("--weights", type=path_or_url, metavar="FILE", help=_WEIGHTS_HELP)
    add("--arch", choices=ARCHITECTURES, metavar="NET", help=_ARCH_HELP)
    add("--preprocess", choices=("caffe", "torch"), help=_PREPROCESS_HELP)
    add("--protocol", choices=PROTOCOLS, default="dense", help="Default: dense")
    add("--scales", metavar="Q[,Q...]", help=_SCALES_HELP)
    add("--data", metavar="PATH", help="a directory with train/ and val/. Default: the run's")
    add("--split", choices=("val", "train"), default="val", help="Default: val")
    add("--pool-rounding", choices=("down", "up"), default="down", help=_POOLS_HELP)
    add("--batch-size", type=int, default=16, metavar="INT", help=_BATCH_HELP)
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluates and prints; 0 when done."""
    _check(options)
    from vggrepro import accelerator
    from vggrepro.data_source import open_index, stored_resize
    from vggrepro.dense import with_pools_rounding_up
    from vggrepro.evaluated_net import doubtful_classes
    from vggrepro.evaluation_record import make_record, save_record
    from vggrepro.protocols import evaluate
    from vggrepro.replay_progress import ReplayProgress

    accelerator.prepare(TrainConfig())
    nets = _nets(options)
    if options.pool_rounding == "up":
        nets = [
            dataclasses.replace(net, network=with_pools_rounding_up(net.network)) for net in nets
        ]
    scales = _scales(options.scales, nets)
    with contextlib.redirect_stdout(sys.stderr):  # making synthetic images is announced
        index = open_index(str(_data(options, nets)), options.split)
    for text in doubtful_classes(nets, index):
        _warn(text)
    with ReplayProgress(quiet=options.json) as progress:
        found = evaluate(nets, scales, index, options.protocol, options.batch_size, progress)
    found |= {"pool_rounding": options.pool_rounding, "stored_resize": stored_resize(index.root)}
    record = make_record(options.protocol, scales, nets, index, found)
    if options.json:
        from diagnostics.durable_files import json_text

        print(json_text(record, indent=2))
    else:
        print("\n".join(_lines(record)))
    if options.runs:
        _save(record, options.runs[0], save_record)
    return 0


def _check(options: argparse.Namespace) -> None:
    if bool(options.runs) == bool(options.weights):
        raise InputError("give run directories or --weights FILE", "As `vggrepro evaluate RUN_DIR`")
    if options.weights is None and (options.arch or options.preprocess):
        raise InputError("--arch and --preprocess go with --weights", "A run knows its own")
    if options.weights is not None and options.data is None:
        raise InputError("--weights needs --data PATH", "A directory with train/ and val/")
    if options.batch_size < 1:
        raise InputError(f"--batch-size {options.batch_size} must be at least 1")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _nets(options: argparse.Namespace) -> list[EvaluatedNet]:
    from vggrepro.evaluated_net import net_of_file, net_of_run

    if options.weights is not None:
        return [net_of_file(options.weights, options.arch, options.preprocess)]
    return [net_of_run(run_dir, _warn) for run_dir in options.runs]


def _data(options: argparse.Namespace, nets: Sequence[EvaluatedNet]) -> str:
    """The data directory: as given, or the one that every run was trained on."""
    if options.data is not None:
        return data_directory(options.data)
    places = {net.description["config"]["data"] for net in nets}
    if len(places) > 1:
        raise InputError(
            f"the runs were trained on different data: {', '.join(sorted(places))}",
            "Say which to evaluate on: --data PATH",
        )
    return places.pop()


def _scales(text: str | None, nets: Sequence[EvaluatedNet]) -> list[tuple[int, ...]]:
    """Shorter sides Q for each net."""
    if text is None:
        return [(net.own_scale,) for net in nets]
    if text == OWN_SCALES:
        return [net.own_scales for net in nets]
    try:
        sides = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise InputError(f"--scales '{text}' is no list of pixels", "As 256,384,512") from None
    return [sides] * len(nets)


def _save(record: dict[str, Any], run_dir: Path, save: Any) -> None:
    """Keeps the record; one that cannot be written is printed all the same."""
    try:
        file = save(record, run_dir)
    except InputError as error:
        _warn(f"the result is not kept: {error}")
        return
    print(
        f"kept in {shown(file)}; beside the paper: vggrepro compare {shown(run_dir)}",
        file=sys.stderr,
    )


def _lines(record: dict[str, Any]) -> list[str]:
    """The record for a person."""
    from vggrepro.comparison import SCHEDULE_NOTE
    from vggrepro.interval import wilson

    def error(name: str) -> str:
        low, high = wilson(record[name], record["images"])
        return f"{record[name]:.2f} % (95 % interval {low:.2f} to {high:.2f})"

    names = " + ".join(net["arch"] for net in record["nets"])
    scales = sorted({side for net in record["nets"] for side in net["scales"]})
    note = [f"  note: {SCHEDULE_NOTE}"] if record["split"] == "val" else []
    return [
        f"{names}: {record['protocol']}, Q = {', '.join(map(str, scales))}; "
        f"{record['images']:,} images of {record['split']}, {record['classes']:,} classes",
        f"  top-1 error {error('top1_error')}",
        f"  top-5 error {error('top5_error')}",
        f"  loss        {record['loss']:.4g}",
        f"  {record['images_per_second']:.3g} images/s, {record['seconds']:.0f} s",
        *note,
    ]
