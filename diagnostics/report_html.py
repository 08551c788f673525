"""The diagnosis as one HTML page that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diagnostics import report_words as words
from diagnostics.chart_heat import legend
from diagnostics.diagnosis import Counterfactual, Diagnosis
from diagnostics.markup import Markup, markup, tag
from diagnostics.protocol import RunFacts, Telemetry
from diagnostics.report_chart import draw
from diagnostics.report_story import Headroom, StoryRow, headroom, story
from diagnostics.report_style import style_sheet

# The reader's browser is told to load nothing, whatever a name in the page says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_html(diagnosis: Diagnosis, telemetry: Telemetry, facts: RunFacts) -> str:
    """The page as text; every name and sentence of the data is escaped.

    Long runs are drawn in a bounded number of columns, so the page stays below a
    few megabytes.
    """
    room = headroom(telemetry, facts)
    title = words.headline(diagnosis)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style_sheet())),
    )
    main = tag(
        "main",
        tag("div", diagnosis.run_dir, class_="run-name"),
        tag("h1", title),
        tag("p", words.VERDICT_SENTENCES[diagnosis.verdict], class_="lead"),
        _cards(diagnosis),
        _advice(diagnosis),
        _picture(diagnosis, telemetry, facts, room),
        _place(diagnosis),
        _cause(diagnosis),
        _tried(diagnosis.counterfactuals),
        _story(diagnosis, room, story(diagnosis, telemetry, room)),
        _notes(diagnosis),
        _conditions(diagnosis, facts),
    )
    body = tag("body", main)
    return markup(Markup("<!doctype html>\n"), tag("html", head, body, lang="en"))


def _section(title: str, explanation: str, *parts: str) -> Markup:
    return tag("section", tag("h2", title), tag("p", explanation), *parts)


def _table(head: Iterable[Markup], rows: Iterable[Markup]) -> Markup:
    columns = list(head)
    header = [tag("thead", tag("tr", *columns))] if columns else []
    return tag("div", tag("table", *header, tag("tbody", *rows)), class_="scroll")


def _pairs(rows: Iterable[tuple[str, str]]) -> Markup:
    return _table([], (tag("tr", tag("th", name), tag("td", text)) for name, text in rows))


def _heads(*names: str) -> list[Markup]:
    """Column heads; a name that starts with '#' heads numbers."""
    return [
        tag("th", name.removeprefix("#"), class_="number" if name.startswith("#") else None)
        for name in names
    ]


def _number(text: str) -> Markup:
    return tag("td", text, class_="number")


def _card(title: str, answer: str, *lines: str) -> Markup:
    return tag(
        "div",
        tag("h3", title),
        tag("b", answer),
        *(tag("p", line) for line in lines),
        class_="card",
    )


def _cards(diagnosis: Diagnosis) -> Markup:
    cards = []
    first, onset, cause = diagnosis.first_nonfinite, diagnosis.onset, diagnosis.cause
    if first is not None:
        facts = dict(words.place(first))
        where = first.layer or words.STAGE_TITLES[first.stage]
        shown = (
            ["values"] + ["stage"] * (first.layer is not None) + ["examples"] * bool(first.examples)
        )
        cards.append(_card("Where", where, *(facts[name] for name in shown)))
    if onset is not None:
        cards.append(_card("Since", f"step {onset.step:,}", words.onset_sentence(onset)))
    sure = "" if cause.kind == "unknown" else words.confidence(cause.confidence)
    cards.append(_card("Why", words.CAUSE_TITLES[cause.kind], sure, *cause.evidence[:1]))
    return tag("div", *cards, class_="cards")


def _advice(diagnosis: Diagnosis) -> Markup:
    advice = diagnosis.recommendation
    if advice is None:
        return _card("What to do", "No fix to recommend", words.no_advice(diagnosis))
    mark = "✓ " if advice.verified else "? "
    return tag(
        "div",
        tag("h3", "What to do"),
        tag("span", mark + words.verified(advice), class_="badge"),
        *([tag("p", advice.sentence)] if advice.sentence else []),
        tag("pre", *_lines(advice.command)),
        class_="card advice verified" if advice.verified else "card advice",
    )


def _lines(text: str) -> list[str]:
    """The lines of a text; the breaks between them are markup."""
    parts: list[str] = []
    for line in text.splitlines():
        parts += [Markup("\n"), line] if parts else [line]
    return parts


def _picture(diagnosis: Diagnosis, telemetry: Telemetry, facts: RunFacts, room: Headroom) -> Markup:
    if not len(telemetry.steps):
        return _section("The run", "No step of this run was recorded.")
    picture = draw(diagnosis, telemetry, facts, room)
    scroll = tag("div", picture.svg, class_="scroll")
    note = tag("p", picture.note(), class_="note")
    if not room.layers:
        return _section("The run, step by step", "No layer was recorded.", scroll, note)
    return _section(
        "The run, layer by layer",
        "Headroom in bits: how often a layer's largest value can double before it overflows. "
        "Below it, the loss and the gradient norm of the same steps.",
        scroll,
        legend(),
        note,
    )


def _place(diagnosis: Diagnosis) -> Markup:
    first = diagnosis.first_nonfinite
    if first is None:
        return markup()
    rows: list[tuple[str, str]] = list(words.place(first))
    rows += [(inputs.name, words.input_range(inputs)) for inputs in first.inputs]
    return _section("The first value that is not finite", "In order of execution.", _pairs(rows))


def _cause(diagnosis: Diagnosis) -> Markup:
    cause = diagnosis.cause
    title = f"Why: {words.CAUSE_TITLES[cause.kind]}"
    sure = "" if cause.kind == "unknown" else f"{words.confidence(cause.confidence)}. "
    items = tag("ul", *(tag("li", line) for line in cause.evidence))
    return _section(title, f"{sure}The evidence, strongest first.", items)


def _tried(tried: Sequence[Counterfactual]) -> Markup:
    if not tried:
        return markup()
    rows = []
    for one in tried:
        mark = "✓ yes" if one.survived else "✗ no"
        cells = [
            tag("td", one.change),
            tag("td", mark, class_="yes" if one.survived else "no"),
            _number(words.steps_run(one)),
            _number(words.number(one.loss)),
            tag("td", words.remark(one)),
        ]
        rows.append(tag("tr", *cells, class_="minimal" if one.minimal else None))
    heads = _heads("change", "survived", "#steps", "#last loss", "remark")
    explanation = "The run was replayed with one thing changed at a time."
    return _section("What was tried", explanation, _table(heads, rows))


def _story(diagnosis: Diagnosis, room: Headroom, rows: Sequence[StoryRow]) -> Markup:
    if not rows:
        return markup()
    faintest = diagnosis.verdict == "stalled"
    heads = ["#step", "#loss", "#gradient norm"]
    if room.layers:
        heads += ["#headroom", "#largest value", "in layer"]
    explanation = "The first step, those around the onset, and the last ones."
    if room.layers:
        which = "faintest signal" if faintest else "least headroom"
        explanation += f" The layer is the one of {which}."
    written = [_story_row(row) for row in rows]
    return _section("The steps that matter", explanation, _table(_heads(*heads, ""), written))


def _story_row(row: StoryRow) -> Markup:
    cells = [f"{row.step:,}", words.number(row.loss), words.number(row.grad_norm)]
    layer = []
    if row.headroom is not None:
        cells += [words.bits(row.headroom), words.number(row.absmax)]
        layer = [tag("td", row.layer or "")]
    class_ = "bad" if "not finite" in row.remark else "onset" if row.remark else None
    return tag("tr", *map(_number, cells), *layer, tag("td", row.remark), class_=class_)


def _notes(diagnosis: Diagnosis) -> Markup:
    if not diagnosis.notes:
        return markup()
    items = tag("ul", *(tag("li", note) for note in diagnosis.notes))
    return _section("Notes", "What limits this diagnosis.", items)


def _conditions(diagnosis: Diagnosis, facts: RunFacts) -> Markup:
    """Configuration, environment and timings, folded away."""
    parts: list[Markup] = []
    for title, values in (
        ("Configuration", words.configuration(facts)),
        ("Environment", words.flatten(diagnosis.environment)),
        ("Time taken", [(name, f"{took:.3g} s") for name, took in diagnosis.seconds.items()]),
    ):
        if values:
            parts.append(tag("details", tag("summary", title), _pairs(values)))
    return markup(*parts)
