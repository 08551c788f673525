"""`vggrepro forecast`: what an initialiser does to signal and gradient, before any step."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diagnostics.durable_files import json_text
from diagnostics.errors import InputError
from diagnostics.report_words import number
from vggrepro.commands.train import data_directory
from vggrepro.config import TrainConfig, parse_init
from vggrepro.init_notes import init_note
from vggrepro.net_options import PAPER_CLASSES, add_net_options, net_config

if TYPE_CHECKING:
    from diagnostics.forecast import Forecast

DESCRIPTION = """\
Says for each initialiser, before any step, how large the signal (pre-activations) and the
gradient of the kernels are in every layer, and whether the net explodes, vanishes or is
fine. Without --data from formulas alone, in no time, for photographs with the mean
subtracted; with --data also measured on the first training batch."""

COMPARED = ("normal:0.1", "normal:0.01", "glorot-uniform", "he-normal")
_BATCH = 8


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = subparsers.add_parser(
        "forecast",
        help="signal and gradient of an initialiser, layer by layer, before any step",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "--init",
        dest="inits",
        action="append",
        metavar="INIT",
        help="an initialiser; may be given several times. Default: " + ", ".join(COMPARED),
    )
    add_net_options(parser, _BATCH)
    for name, kind, value, what in (
        ("--seed", int, "INT", "of the weights and the batch that are measured. Default: 0"),
        ("--data", str, "PATH", "measure on a directory with train/ and val/, or 'synthetic'"),
    ):
        parser.add_argument(name, type=kind, metavar=value, default=argparse.SUPPRESS, help=what)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the forecasts; always 0: a bad forecast is an answer."""
    inits = list(dict.fromkeys(options.inits or COMPARED))
    for init in inits:
        parse_init(init)
    config = net_config(options, _BATCH)
    with contextlib.redirect_stdout(sys.stderr):  # making synthetic images is announced
        made = _forecasts(config, inits, measure="data" in options)
    if options.json:
        print(json_text(made))
    else:
        print("\n".join(_table(made)))
    return 0


def _forecasts(config: TrainConfig, inits: Sequence[str], measure: bool) -> dict[str, Any]:
    """The JSON object; forward and gradient are the measured ones where there are any."""
    from diagnostics.forecast import PHOTOGRAPH_CORRELATION, PHOTOGRAPH_RMS
    from vggrepro import forecast_vgg
    from vggrepro.model import build_network

    batch = _first_batch(config) if measure else None
    classes = batch.classes if batch else (config.classes or PAPER_CLASSES)
    network = build_network(
        config.arch, width=config.width, image_size=config.image_size, classes=classes
    )
    scales = PHOTOGRAPH_RMS, PHOTOGRAPH_CORRELATION
    if batch is not None:
        scales = forecast_vgg.image_scales(batch.images)
    entries = []
    for init in inits:
        analytic = forecast_vgg.analytic_forecast(
            network,
            init,
            input_rms=scales[0],
            correlation=scales[1],
            batch_size=config.batch_size,
            precision=config.precision,
        )
        measured = None
        if batch is not None:
            measured = forecast_vgg.measured_forecast(
                network, init, config.seed, batch.images, batch.labels
            )
        entries.append(_entry(analytic, measured))
    return {
        "arch": config.arch,
        "width": config.width,
        "image_size": config.image_size,
        "classes": classes,
        "batch_size": config.batch_size,
        "input_rms": scales[0],
        "input_correlation": scales[1],
        "source": "measured" if measure else "analytic",
        "initializers": entries,
    }


class _Batch(NamedTuple):
    images: np.ndarray
    labels: np.ndarray
    classes: int


def _first_batch(config: TrainConfig) -> _Batch:
    from vggrepro.data_source import open_data

    directory = data_directory(config.data)
    source = open_data(dataclasses.replace(config, data=str(directory)), lambda text: None)
    classes = len(source.class_names)
    if config.classes not in (0, classes):
        raise InputError(f"--classes {config.classes}, but {directory} has {classes}")
    batch = source.training.batch(0)
    return _Batch(batch["images"].numpy(), batch["labels"].numpy(), classes)


def _entry(analytic: Forecast, measured: Forecast | None) -> dict[str, Any]:
    """One element of `initializers`."""
    shown = measured or analytic
    layers = [
        {"name": a.name, "forward_rms": a.forward_rms, "gradient_rms": a.gradient_rms}
        for a in shown.layers
    ]
    if measured is not None:
        for layer, formula in zip(layers, analytic.layers, strict=True):
            layer["analytic_forward_rms"] = formula.forward_rms
            layer["analytic_gradient_rms"] = formula.gradient_rms
    return {
        "init": shown.init,
        "verdict": shown.verdict,
        "reason": shown.reason,
        "logits_rms": shown.logits_rms,
        "analytic_logits_rms": analytic.logits_rms,
        "note": init_note(shown.init),
        "layers": layers,
    }


def _table(made: dict[str, Any]) -> list[str]:
    """Layers down, initialisers across, each with signal and gradient."""
    entries = made["initializers"]
    names = [layer["name"] for layer in entries[0]["layers"]]
    first = max(map(len, names))
    lines = [
        f"VGG-{made['arch']}, width {made['width']:g}, {made['image_size']} pixels, "
        f"{made['classes']:,} classes; input RMS {number(made['input_rms'])}; "
        f"{'measured on a batch' if made['source'] == 'measured' else 'from formulas'}",
        "",
        " " * first + "".join(f"  {entry['init']:>19}" for entry in entries),
        " " * first + "  " + "  ".join([f"{'signal':>9} {'gradient':>9}"] * len(entries)),
    ]
    for row, name in enumerate(names):
        cells = [entry["layers"][row] for entry in entries]
        lines.append(
            f"{name:<{first}}"
            + "".join(
                f"  {number(c['forward_rms']):>9} {number(c['gradient_rms']):>9}" for c in cells
            )
        )
    lines += ["", *(f"{e['init']:<15} {e['verdict']:<9} {e['reason']}" for e in entries)]
    notes = [f"{entry['init']}: {entry['note']}" for entry in entries if entry["note"]]
    explanation = (
        "Signal: RMS of the pre-activations; gradient: RMS of the kernel's, both at step 0."
    )
    return [*lines, *[f"\n{note}" for note in notes], "", explanation]
