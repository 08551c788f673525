"""The diagnosis on one terminal screen; in a file or a pipe, the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import (
    Console,
    ConsoleOptions,
    Group,
    RenderableType,
    RenderResult,
)
from rich.table import Table
from rich.text import Text

from diagnostics import report_words as words
from diagnostics.command_wrap import wrap_command
from diagnostics.diagnosis import Counterfactual, Diagnosis, Recommendation
from diagnostics.protocol import RunFacts, Telemetry
from diagnostics.report_story import Headroom, StoryRow, headroom, story

SCREEN_LINES = 44  # of a 45-line terminal, which also shows the next prompt
_BAR_CELLS = 12  # a full bar: values around 1
_GUTTER = 8
_GAP = 2
_CHANGE_WIDTH, _CHANGE_KEPT, _NARROWEST_REMARK = 36, 26, 16
_UNBOUNDED = 10**6


class _Limits(NamedTuple):
    """How much of the lists is shown."""

    evidence: int
    inputs: int
    steps: int
    tried: int


# Tried in this order until the report fits the screen.
_EVERYTHING = _Limits(_UNBOUNDED, _UNBOUNDED, _UNBOUNDED, _UNBOUNDED)
_SHORTER = (
    _EVERYTHING,
    _Limits(4, 3, 8, 10),
    _Limits(3, 2, 6, 8),
    _Limits(3, 2, 5, 6),
    _Limits(2, 2, 4, 4),
    _Limits(1, 1, 3, 3),
)


class _Marks(NamedTuple):
    """Characters beyond ASCII, or what stands for them."""

    yes: str
    no: str
    bullet: str
    rule: str
    full: str
    empty: str


_UNICODE = _Marks("✓", "✗", "•", "─", "█", "░")
_ASCII = _Marks("+", "x", "*", "-", "#", ".")


def render(diagnosis: Diagnosis, telemetry: Telemetry, facts: RunFacts) -> RenderableType:
    """Verdict, place, story, cause, what was tried, and the command to run.

    Fits 100 columns x 45 lines in a terminal by leaving out the tails of lists, and
    says so; complete where the output is no terminal. Readable from 80 columns on.
    """
    room = headroom(telemetry, facts)
    return _TerminalReport(diagnosis, room, tuple(story(diagnosis, telemetry, room)))


@dataclass(frozen=True)
class _TerminalReport:
    diagnosis: Diagnosis
    room: Headroom
    rows: tuple[StoryRow, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        page = _Page(self, options)
        shorter = _SHORTER if options.is_terminal else _SHORTER[:1]
        lines = max(SCREEN_LINES, console.height - 1)
        body = page.body(shorter[0])
        for limits in shorter[1:]:
            if len(console.render_lines(body, options)) <= lines:
                break
            body = page.body(limits)
        yield body


class _Page:
    """The report at one width; `brief` where it has to fit a screen."""

    def __init__(self, report: _TerminalReport, options: ConsoleOptions) -> None:
        self._diagnosis, self._room, self._rows = report.diagnosis, report.room, report.rows
        self._width, self._brief = options.max_width, options.is_terminal
        self._ascii = options.ascii_only
        self._marks = _ASCII if self._ascii else _UNICODE

    def body(self, limits: _Limits) -> RenderableType:
        """All sections, with lists cut to the limits."""
        sections: list[tuple[str, RenderableType | None]] = [
            ("where", self._place(limits)),
            ("since", self._story(limits)),
            ("why", self._cause(limits)),
            ("tried", self._tried(limits)),
            ("notes", self._notes(limits)),
            ("do", self._recommendation()),
        ]
        grid = Table.grid(padding=0)
        grid.add_column(width=_GUTTER, no_wrap=True)
        grid.add_column(width=self._width - _GUTTER)
        for name, section in sections:
            if section is not None:
                grid.add_row("", "")
                grid.add_row(Text(name, style="bold cyan"), section)
        return Group(*self._head(), grid)

    def _text(self, text: str, style: str = "") -> Text:
        shown = words.printable(text)
        if self._ascii:
            shown = shown.encode("ascii", "backslashreplace").decode("ascii")
        return Text(shown, style=style, overflow="fold")

    def _bullets(self, lines: Sequence[str], limit: int) -> list[RenderableType]:
        grid = Table.grid(padding=(0, 1))
        for line in lines[:limit]:
            grid.add_row(self._marks.bullet, self._text(line))
        return [grid, *self._more(len(lines) - limit)]

    def _more(self, hidden: int) -> list[Text]:
        return [Text(f"and {hidden:,} more in report.html", style="dim")] if hidden > 0 else []

    def _head(self) -> list[RenderableType]:
        diagnosis = self._diagnosis
        style = "bold yellow" if diagnosis.verdict == "not_reproduced" else "bold red"
        run = self._text(f"{self._marks.rule * 2} {diagnosis.run_dir} ", "dim")
        run.append(self._marks.rule * max(0, self._width - run.cell_len))
        return [
            run,
            self._text(words.headline(diagnosis), style),
            self._text(words.VERDICT_SENTENCES[diagnosis.verdict]),
        ]

    def _place(self, limits: _Limits) -> RenderableType | None:
        first = self._diagnosis.first_nonfinite
        if first is None:
            return None
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        for label, text in words.place(first):
            grid.add_row(label, self._text(text))
        for inputs in first.inputs[: limits.inputs]:
            grid.add_row(self._text(inputs.name), self._text(words.input_range(inputs)))
        return Group(grid, *self._more(len(first.inputs) - limits.inputs))

    def _story(self, limits: _Limits) -> RenderableType | None:
        onset = self._diagnosis.onset
        lines = [self._text(words.onset_sentence(onset))] if onset else []
        if not self._rows:
            return Group(*lines) if lines else None
        notes: list[Text] = []
        table = self._table()
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("loss", justify="right", no_wrap=True)
        table.add_column("gradient", justify="right", no_wrap=True)
        if self._room.layers:
            faintest = self._diagnosis.verdict == "stalled"
            table.add_column("faintest signal" if faintest else "least headroom", no_wrap=True)
            table.add_column("in layer", overflow="fold")
            notes = [Text(words.headroom_note(faintest), style="dim")]
        table.add_column("", no_wrap=True)
        for row in _story_rows(self._rows, limits.steps):
            style = "bold red" if "not finite" in row.remark else "yellow" if row.remark else ""
            table.add_row(*self._story_cells(row), row.remark, style=style)
        return Group(*lines, table, *notes)

    def _story_cells(self, row: StoryRow) -> list[RenderableType]:
        cells: list[RenderableType] = [
            f"{row.step:,}",
            words.number(row.loss),
            words.number(row.grad_norm),
        ]
        if row.headroom is None:
            return cells
        if self._diagnosis.verdict == "stalled":
            size = words.number(row.absmax)
        else:
            size = f"{words.bits(row.headroom):>8} {self._bar(row.headroom / self._room.of_one)}"
        return [*cells, size, self._text(row.layer or "-")]

    def _bar(self, share: float) -> str:
        full = round(_BAR_CELLS * min(max(share, 0.0), 1.0))
        return self._marks.full * full + self._marks.empty * (_BAR_CELLS - full)

    def _cause(self, limits: _Limits) -> RenderableType:
        cause = self._diagnosis.cause
        title = self._text(words.CAUSE_TITLES[cause.kind], "bold")
        if cause.kind != "unknown":
            title.append(f"  {words.confidence(cause.confidence)}", style="dim")
        return Group(title, *self._bullets(cause.evidence, limits.evidence))

    def _tried(self, limits: _Limits) -> RenderableType | None:
        tried = self._diagnosis.counterfactuals
        if not tried:
            return None
        chosen = words.most_telling(tried, limits.tried)
        table = self._table()
        kept = _CHANGE_WIDTH if self._brief else _CHANGE_KEPT
        change_width = min(kept, max(cell_len(one.change) for one in chosen))
        table.add_column("change", overflow="fold", min_width=min(change_width, _CHANGE_KEPT))
        table.add_column("survived", no_wrap=True)
        table.add_column("steps", justify="right", no_wrap=True)
        table.add_column("last loss", justify="right", no_wrap=True)
        # Rich would give the widths of the others to the remarks, and cut the table.
        remark_width = self._remark_width(chosen, change_width)
        table.add_column("", overflow="fold", max_width=remark_width)
        for one in chosen:
            self._add_tried(table, one, remark_width if self._brief else _UNBOUNDED)
        return Group(table, *self._more(len(tried) - limits.tried))

    def _remark_width(self, tried: Sequence[Counterfactual], change_width: int) -> int:
        """What the other columns leave."""
        steps = max(len("steps"), *(len(words.steps_run(one)) for one in tried))
        others = change_width + len("survived") + steps + len("last loss") + 4 * _GAP
        return max(_NARROWEST_REMARK, self._width - _GUTTER - others)

    def _add_tried(self, table: Table, one: Counterfactual, remark_width: int) -> None:
        mark, style = (self._marks.yes, "green") if one.survived else (self._marks.no, "red")
        # What is cut here is whole in report.html.
        remark = self._text(words.remark(one))
        remark.truncate(remark_width, overflow="crop" if self._ascii else "ellipsis")
        table.add_row(
            self._text(one.change, "bold" if one.minimal else ""),
            Text(f"{mark} {'yes' if one.survived else 'no'}", style=style),
            words.steps_run(one),
            words.number(one.loss),
            remark,
        )

    def _notes(self, limits: _Limits) -> RenderableType | None:
        notes = self._diagnosis.notes
        return Group(*self._bullets(notes, limits.evidence)) if notes else None

    def _table(self) -> Table:
        return Table(box=None, padding=(0, _GAP, 0, 0), header_style="dim", pad_edge=False)

    def _recommendation(self) -> RenderableType:
        advice = self._diagnosis.recommendation
        if advice is None:
            return self._text(words.no_advice(self._diagnosis))
        style, mark = ("green", self._marks.yes) if advice.verified else ("yellow", "?")
        return Group(
            Text(f"{mark} {words.verified(advice)}", style=style),
            *([self._text(advice.sentence)] if advice.sentence else []),
            *self._command(advice),
        )

    def _command(self, advice: Recommendation) -> list[Text]:
        """The command in lines that can be copied as they stand."""
        width = self._width - _GUTTER
        return [
            self._text(part, "bold")
            for line in advice.command.splitlines()
            for part in wrap_command(line, width)
        ]


def _story_rows(rows: Sequence[StoryRow], limit: int) -> list[StoryRow]:
    """The onset and the last ones first, if not all may be shown."""
    kept = [row for row in rows if row.remark][-limit:]
    others = [row for row in rows if not row.remark]
    kept += others[max(0, len(others) - max(0, limit - len(kept))) :]
    return sorted(kept, key=lambda row: row.step)
