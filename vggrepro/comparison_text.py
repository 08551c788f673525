"""Comparisons with the paper as text for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from vggrepro.comparison import SCHEDULE_NOTE, Comparison

_INTERVAL_NOTE = (
    "Intervals: 95 %, Wilson, from the number of images; they do not cover the chance of "
    "training again."
)


def terminal_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """One block a comparison."""
    lines: list[str] = []
    for one in comparisons:
        images, split = one.record["images"], one.record["split"]
        lines.append(
            f"{one.title}: {images:,} images of {split}, {one.record['classes']:,} classes"
        )
        for place, name in enumerate(("top1", "top5")):
            error, (low, high) = one.record[f"{name}_error"], one.intervals[place]
            line = f"  top-{name[-1]} error  ours {error:.2f} ({low:.2f} to {high:.2f})"
            if one.cells:
                theirs = getattr(one.cells[0], f"{name}_error")
                line += f"  paper {theirs:.1f}  difference {error - theirs:+.2f}"
                line += "" if low <= theirs <= high else ", outside the interval"
            lines.append(line)
        if one.cells:
            lines.append(f"  paper: {_tables(one)}")
        lines += [f"  not beside the paper: {text}" for text in one.refusals]
        lines += [f"  for calibration: {text}" for text in calibration_texts(one)]
        lines += [f"  differs: {text}" for text in _differences(comparisons, one)]
        lines.append("")
    return [*lines, f"{_INTERVAL_NOTE} Note: {SCHEDULE_NOTE}."]


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A table, and below it what each row needs to be read with."""
    lines = [
        "| net, S, protocol, Q | images | top-1 error, % | paper | top-5 error, % | paper |",
        "|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for number, one in enumerate(comparisons, 1):
        cells = [f"{one.title} [{number}]", f"{one.record['images']:,}"]
        for place, name in enumerate(("top1", "top5")):
            low, high = one.intervals[place]
            cells.append(f"{one.record[f'{name}_error']:.2f} ({low:.2f} to {high:.2f})")
            cells.append(f"{getattr(one.cells[0], f'{name}_error'):.1f}" if one.cells else "–")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        said = [f"paper: {_tables(one)}"] if one.cells else []
        said += [f"not beside the paper: {text}" for text in one.refusals]
        said += [f"for calibration: {text}" for text in calibration_texts(one)]
        said += [f"differs: {text}" for text in _differences(comparisons, one)]
        notes += [f"[{number}] {text}  " for text in said]
    return "\n".join([*lines, "", *notes, "", f"{_INTERVAL_NOTE} Note: {SCHEDULE_NOTE}."])


def _differences(comparisons: Sequence[Comparison], one: Comparison) -> Sequence[str]:
    """How the training differs from the paper's; in full the first time."""
    first = next(other for other in comparisons if other.differences == one.differences)
    return one.differences if first is one else [f"as {first.title}"]


def calibration_texts(one: Comparison) -> list[str]:
    """Other people's figures, as sentences."""
    texts = []
    for known in one.calibration:
        figures = [
            f"top-{place} {_range(value)}"
            for place, value in ((1, known.top1_error), (5, known.top5_error))
            if value is not None
        ]
        texts.append(f"{known.what}: net {known.arch} {', '.join(figures)}")
    return texts


def _range(pair: tuple[float, float]) -> str:
    low, high = pair
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _tables(one: Comparison) -> str:
    numbers = " and ".join(str(cell.table) for cell in one.cells)
    tested = [cell.test_top5_error for cell in one.cells if cell.test_top5_error is not None]
    there = f"; top-5 error on the challenge's test set {tested[0]:.1f}" if tested else ""
    return f"Table{'s' if len(one.cells) > 1 else ''} {numbers}{there}"
