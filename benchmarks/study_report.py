"""Table and picture of the initialisation study."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

METHODS = (
    "sigma 0.1",
    "sigma 0.1, pixels/58",
    "sigma 0.01",
    "sigma 0.01, from A",
    "Glorot",
)
_COLOURS = {"NaN": "#b3261e", "stalled": "#a36a00", "trains": "#1b6e3c"}
_WIDTH, _HEIGHT = 168, 96  # of a panel, pixels
_LEFT, _TOP = 150, 40
_LOSS_RANGE = (0.3, 10.0)  # shown; beyond it the line runs along the edge
_GUESSING = math.log(10)

Record = Mapping[str, Any]


def table(
    records: Sequence[Record], archs: Sequence[str], missing: int, environment: Mapping[str, Any]
) -> str:
    """Markdown: outcomes, methods down, nets across; then what the diagnosis said."""
    by_place = {(one["arch"], one["method"]): one for one in records}
    lines = [
        "# Which initialiser, at which depth",
        "",
        "Made by `benchmarks/initialisation_study.py`; do not edit. Nets of the paper's Table 1 at "
        "a quarter of the width, synthetic images of 32 pixels, 10 classes, batch 16, learning "
        "rate 0.01, one seed. sigma is scaled by 2.25, so that the narrow net A has the logits of "
        "the paper's net A. Guessing has a loss of 2.303. A run whose loss is below 0.7 of that "
        "after 1,000 steps (or 2,000) counts as training and ends there: what would have become "
        "of it later is not known.",
        "",
        "![loss of every run](initialisation.svg)",
        "",
        "| initialiser | " + " | ".join(archs) + " |",
        "|---|" + "---|" * len(archs),
    ]
    for method in METHODS:
        cells = [_outcome(by_place.get((arch, method))) for arch in archs]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    if missing:
        lines += ["", f"{missing} cells have not been run yet."]
    lines += ["", "What `vggrepro diagnose-nan` says of each:", ""]
    for method in METHODS:
        for arch in archs:
            if (arch, method) in by_place:
                lines.append(f"- {arch}, {method}: {_diagnosis(by_place[arch, method])}")
    hardware = environment["hardware"]
    packages = environment["packages"]
    versions = ", ".join(
        f"{n} {v}" for n, v in packages.items() if "tensorflow" in n or n == "keras"
    )
    precisions = sorted({one["precision"] for one in records})
    commits = sorted({str(one.get("commit"))[:12] for one in records if one.get("commit")})
    seconds = sum(one["training_seconds"] for one in records)
    lines += [
        "",
        f"{hardware['cpu']}, {hardware['cores']} cores; {versions}; {', '.join(precisions)}. "
        f"{len(records)} runs, {seconds / 60:.0f} minutes of training on a machine with other "
        f"work; code {', '.join(commits) or 'not recorded'}.",
    ]
    return "\n".join(lines) + "\n"


def _outcome(record: Record | None) -> str:
    if record is None:
        return ""
    if record["kind"] == "NaN":
        return f"**{record['outcome']}**"
    return f"{record['kind']}, {record['last_loss']:.2f} after {record['steps']:,}"


def _diagnosis(record: Record) -> str:
    said = record["diagnosis"]
    if said["cause"] is None:
        return f"{record['outcome']}; healthy"
    text = f"{record['outcome']}; cause {said['cause']}, {100 * said['confidence']:.0f} % sure"
    if said["place"]:
        text += f"; first non-finite: {said['place']}"
    if said["onset"]:
        text += f"; onset: {said['onset']}"
    if said["evidence"]:
        text += f"; {said['evidence'][0]}"
    # Where the data lie, and what follows, is this machine's.
    fix = (said["recommendation"] or "").partition(" --data ")[0]
    return text + (f"; fix that was replayed: `{fix}`" if fix else "")


def figure(records: Sequence[Record], archs: Sequence[str]) -> str:
    """SVG: a panel a cell with its loss (log scale) over its steps, coloured by outcome."""
    by_place = {(one["arch"], one["method"]): one for one in records}
    width = _LEFT + len(archs) * (_WIDTH + 12)
    height = _TOP + len(METHODS) * (_HEIGHT + 26) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for column, arch in enumerate(archs):
        x = _LEFT + column * (_WIDTH + 12)
        parts.append(f'<text x="{x}" y="24" font-weight="bold">net {arch}</text>')
    for row, method in enumerate(METHODS):
        y = _TOP + row * (_HEIGHT + 26)
        parts.append(f'<text x="8" y="{y + _HEIGHT / 2:.0f}">{html.escape(method)}</text>')
        for column, arch in enumerate(archs):
            record = by_place.get((arch, method))
            if record is not None:
                parts += _panel(_LEFT + column * (_WIDTH + 12), y, record)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(x: float, y: float, record: Record) -> list[str]:
    colour = _COLOURS[record["kind"]]
    guessing = y + _height_of(_GUESSING)
    points = " ".join(
        f"{x + _WIDTH * step / max(1, record['steps'] - 1):.1f},{y + _height_of(loss):.1f}"
        for step, loss in ((pair[0], float(pair[1])) for pair in record["losses"])
        if math.isfinite(loss)
    )
    short = record["outcome"].replace("loss ", "")
    cross = []
    if record["kind"] == "NaN":
        short += f", first loss {float(record['losses'][0][1]):.0e}"
        middle, half = (x + _WIDTH / 2, y + _HEIGHT / 2), 14
        cross = [
            f'<line x1="{middle[0] - half}" y1="{middle[1] - side}" x2="{middle[0] + half}" '
            f'y2="{middle[1] + side}" stroke="{colour}" stroke-width="3"/>'
            for side in (half, -half)
        ]
    return [
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" fill="#f7f7f7"/>',
        f'<line x1="{x}" x2="{x + _WIDTH}" y1="{guessing:.1f}" y2="{guessing:.1f}" '
        'stroke="#999" stroke-dasharray="3 3"/>',
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
        f'<text x="{x}" y="{y + _HEIGHT + 14}" fill="{colour}" font-size="11">'
        f"{html.escape(short)}</text>",
        *cross,
    ]


def _height_of(loss: float) -> float:
    """Pixels below the panel's top."""
    low, high = map(math.log, _LOSS_RANGE)
    value = math.log(min(max(loss, _LOSS_RANGE[0]), _LOSS_RANGE[1]))
    return _HEIGHT * (high - value) / (high - low)
