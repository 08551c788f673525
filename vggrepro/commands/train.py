"""`vggrepro train`: trains a net, or goes on with a run."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InputError
from vggrepro.config import TrainConfig
from vggrepro.config_options import add_config_options, given_values, option_name
from vggrepro.recipes import recipe
from vggrepro.remote_paths import path_or_url, shown

if TYPE_CHECKING:
    from vggrepro.trainer import TrainResult

DESCRIPTION = """\
Trains a net. With no option: a narrow VGG-A on synthetic JPEG files made on the
spot, in under two minutes on two cores."""

INTERRUPTED = 130
_CHANGEABLE = ("steps", "strategy")  # of a run that goes on


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = subparsers.add_parser(
        "train", help="train a net, or go on with a run", description=DESCRIPTION
    )
    parser.add_argument(
        "--run-dir",
        type=path_or_url,
        metavar="DIR",
        help="where the run is written; must not exist. Default: runs/TIME-ARCH-INIT",
    )
    parser.add_argument(
        "--resume",
        type=path_or_url,
        metavar="RUN_DIR",
        help="go on exactly where this run stopped; only --steps and --strategy may be changed",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="start from a named configuration (see `vggrepro recipes`); options override it",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse to start where the forecast says that signal or gradient explode or vanish",
    )
    add_config_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Trains; 0 when finished, 130 when interrupted with the state saved."""
    resume = options.resume is not None
    config = _resumed_config(options) if resume else _new_config(options)
    run_dir = options.resume or options.run_dir or new_run_dir(config, datetime.now())
    named = options.recipe or ""
    result = _train(config, run_dir, resume, options.strict, named)
    _print_summary(result)
    return INTERRUPTED if result.status == "interrupted" else 0


def new_run_dir(config: TrainConfig, now: datetime) -> Path:
    """The default place of a run: runs/<time>-<arch>-<init>."""
    name = f"{now:%Y%m%d-%H%M%S}-{config.arch}-{config.init.replace(':', '-')}"
    return Path("runs") / name


def data_directory(data: str) -> str:
    """The directory or URL that `--data` means; makes the synthetic one if need be."""
    if data != "synthetic":
        return data
    directory = Path(os.environ.get("VGGREPRO_CACHE", "data")) / "synthetic"
    if not directory.exists():
        print(f"making synthetic images in {directory}, once", flush=True)
    from vggrepro.synthetic import ensure_synthetic

    return str(ensure_synthetic(directory))


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """A run may be resumed and replayed from another working directory."""
    from vggrepro.storage import is_url

    source = config.init_from
    if source and not is_url(source):
        source = str(Path(source).resolve())
    data = data_directory(config.data)
    data = data if is_url(data) else str(Path(data).resolve())
    return dataclasses.replace(config, data=data, init_from=source)


def _new_config(options: argparse.Namespace) -> TrainConfig:
    given = given_values(options)
    if not options.recipe:
        return TrainConfig(**given)
    named = recipe(options.recipe)
    if named.source and "init_from" not in given:
        raise InputError(
            f"recipe {named.name} starts from a run of {named.source}",
            "Give it: --init-from RUN_DIR; --init-from '' draws all weights, a deviation",
        )
    return TrainConfig(**{**named.values, **given})


def _resumed_config(options: argparse.Namespace) -> TrainConfig:
    from vggrepro.run_directory import RunDirectory

    with RunDirectory.open(options.resume) as stored:
        values = TrainConfig.from_dict(stored.config()).to_dict()
    given = given_values(options)
    conflicts = [name for name, value in given.items() if value != values[name]]
    conflicts += [name for name in ("run_dir", "recipe") if getattr(options, name) is not None]
    refused = dict.fromkeys(option_name(name) for name in conflicts if name not in _CHANGEABLE)
    if refused:
        raise InputError(
            f"{', '.join(refused)} cannot be changed when resuming {options.resume}",
            "Only --steps and --strategy may be given with --resume; start a new run for anything "
            "else",
        )
    return TrainConfig.from_dict({**values, **given})


def _train(
    config: TrainConfig, run_dir: Path, resume: bool, strict: bool, named: str
) -> TrainResult:
    from vggrepro import accelerator
    from vggrepro.progress import ProgressDisplay
    from vggrepro.tensorboard_log import TensorBoardLog
    from vggrepro.trainer import train

    # Before anything else runs in TensorFlow: several workers or replicas must be its first act.
    engine = accelerator.start(config)
    config = _with_absolute_paths(config)
    with ExitStack() as stack:
        hooks = [stack.enter_context(ProgressDisplay()), stack.enter_context(TensorBoardLog())]
        return train(config, run_dir, hooks, resume, strict, named, engine)


def _print_summary(result: TrainResult) -> None:
    """How the run ended, and what to type next."""
    metrics: dict[str, Any] = result.metrics
    place = shlex.quote(shown(result.run_dir))
    print(f"\n{result.status} after {result.steps:,} steps")
    if "val_top1_error" in metrics:
        print(
            f"  validation top-1 error {metrics['val_top1_error']:.2f} %, "
            f"top-5 error {metrics['val_top5_error']:.2f} %\n"
            f"  (centre crops of {metrics['val_images']:,.0f} images, "
            "which the learning-rate schedule looks at as well)"
        )
    print(f"  run directory {place}\nnext")
    print(f"  tensorboard --logdir {place}/tensorboard")
    finished = result.status == "finished"
    if finished:
        print(f"  vggrepro evaluate {place} --protocol dense")
    print(f"  vggrepro train --resume {place}{' --steps MORE' if finished else ''}")
