"""report.html: everything from data escaped, nothing loaded, the picture true and bounded."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from report_samples import LAYERS, SAMPLES, Sample, changed, facts, founding, telemetry, with_names

from diagnostics.chart_heat import COLD_SHADES, WARM_SHADES, shade
from diagnostics.diagnosis import Onset, Recommendation
from diagnostics.durable_files import plain
from diagnostics.markup import Markup, markup, tag
from diagnostics.protocol import RunFacts, Telemetry
from diagnostics.report import write_reports
from diagnostics.report_html import render_html
from diagnostics.report_story import columns
from diagnostics.report_words import printable

UNCLOSED = {"meta"}


class Page(HTMLParser):
    """Tags with attributes, in order, the text by tag, and whether all tags are closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, name: str, attributes: list) -> None:
        self.tags.append((name, dict(attributes)))
        if name not in UNCLOSED:
            self._open.append(name)

    def handle_startendtag(self, name: str, attributes: list) -> None:
        self.tags.append((name, dict(attributes)))

    def handle_endtag(self, name: str) -> None:
        assert self._open.pop() == name

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, name: str, class_: str | None = None) -> list[dict[str, str | None]]:
        return [
            attributes
            for found, attributes in self.tags
            if found == name
            and (class_ is None or class_ in (attributes.get("class") or "").split())
        ]

    def text(self) -> str:
        return " ".join(" ".join(text for tag, text in self.texts if tag != "style").split())


def page(sample: Sample) -> Page:
    return Page(render_html(*sample))


hostile_names = st.one_of(
    st.text(min_size=1, max_size=20),
    st.sampled_from(
        [
            "<script>alert(1)</script>",
            '"><img src=x onerror=alert(1)>',
            "' onmouseover='alert(1)",
            "</style><script>alert(1)</script>",
            "</title></svg><b>",
            "<!--",
            "]]>",
            "&lt;script&gt;",
            "\x00<i>",
            "\udcff.jpg",
            "javascript:alert(1)",
            "\u202ecod.exe",
        ]
    ),
)


@example(name="loss")
@example(name="batch size")
@given(name=hostile_names)
def test_no_name_becomes_markup(name):
    """Names change the texts of the page, never its elements or attributes."""
    harmless, hostile = (page(with_names(founding(), text)) for text in ("harmless", name))
    assert hostile.tags == harmless.tags


def test_hostile_names_are_shown_as_they_are():
    name = "<script>alert('&amp;')</script>\x1b"
    html = render_html(*with_names(founding(), name))
    assert "<script" not in html and "\x1b" not in html
    texts = Page(html).texts
    shown = [text for tag, text in texts if tag in ("td", "th", "li", "p", "title", "pre")]
    assert sum(printable(name) in text for text in shown) > 20


@pytest.mark.parametrize("name", SAMPLES)
def test_the_page_loads_nothing(name):
    html = render_html(*SAMPLES[name]())
    found = Page(html)
    assert {tag for tag, _ in found.tags}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a", "use"}
    )
    names = {attribute for _, attributes in found.tags for attribute in attributes}
    assert names.isdisjoint({"src", "href", "style", "srcset", "action", "background"})
    assert not any(attribute.startswith("on") for attribute in names)
    assert "url(" not in html and "@import" not in html and "://" not in html
    (policy,) = (a for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


@pytest.mark.parametrize("name", SAMPLES)
def test_the_page_says_what_the_diagnosis_says(name):
    sample = SAMPLES[name]()
    diagnosis, text = sample.diagnosis, page(sample).text()
    assert diagnosis.run_dir in text
    for sentence in (*diagnosis.cause.evidence, *diagnosis.notes):
        assert sentence in text
    for one in diagnosis.counterfactuals:
        assert f"{one.change} {'✓ yes' if one.survived else '✗ no'}" in text
    if diagnosis.recommendation:
        assert diagnosis.recommendation.command in text
        assert ("not verified" in text) != diagnosis.recommendation.verified
    if diagnosis.first_nonfinite:
        assert f"{diagnosis.first_nonfinite.count:,} of" in text
    assert ("Inf at step" in text) == (name in ("founding", "exploding"))


def test_code_keeps_its_lines():
    sample = changed(founding(), recommendation=Recommendation("a = 1\n  b = a < 2", False))
    assert "".join(text for tag, text in page(sample).texts if tag == "pre") == "a = 1\n  b = a < 2"


def number(value: str | None) -> float:
    assert value is not None
    return float(value)


def cells(found: Page) -> list[dict[str, str | None]]:
    """Rectangles of the heat map, layer by layer."""
    names = [name for name, _ in found.tags]
    start = next(i for i, (_, a) in enumerate(found.tags) if "heat" in (a.get("class") or ""))
    end = next(i for i, (_, a) in enumerate(found.tags) if a.get("class") == "names")
    return [found.tags[i][1] for i in range(start, end) if names[i] == "rect"]


@pytest.mark.parametrize(("step", "layer"), [(1, "block4_conv2"), (0, "fc1"), (1, "predictions")])
def test_the_failing_cell_is_outlined(step, layer):
    sample = founding()
    first = sample.diagnosis.first_nonfinite
    assert first is not None
    place = type(first)(**{**vars(first), "layer": layer})
    found = page(changed(sample, step=step, first_nonfinite=place))
    (outline,) = found.all("rect", "failure")
    expected = cells(found)[LAYERS.index(layer) * 2 + step]
    assert {key: outline[key] for key in "xy"} == {key: expected[key] for key in "xy"}


def test_a_layer_that_was_not_recorded_is_not_outlined():
    sample = changed(founding(), onset=Onset(0, "elsewhere", "loss", 1.0, 2.0))
    assert page(sample).all("rect", "onset") == []
    assert len(page(sample).all("line", "onset")) == 1


def test_the_shades_of_the_founding_case():
    found = page(founding())
    groups = [a["class"] for name, a in found.tags if name == "g" and a.get("class")]
    shades = [one for one in groups if re.fullmatch(r"[wc]\d|[xz]", one or "")]
    legend = WARM_SHADES + COLD_SHADES + 2
    by_layer = dict(zip(LAYERS, np.reshape(shades[:-legend], (11, 2)).tolist(), strict=True))
    assert by_layer["block1_conv1"][0] == "w0"
    assert [by_layer[layer][1] for layer in LAYERS[5:8]] == ["x"] * 3
    assert by_layer["block4_conv1"][1] == "w7"


@given(
    bits=st.lists(st.floats(-4, 300) | st.sampled_from([-math.inf, math.inf]), min_size=2),
    of_one=st.sampled_from([16.0, 128.0]),
)
def test_less_headroom_is_never_a_calmer_shade(bits, of_one):
    order = ["x", *(f"w{n}" for n in reversed(range(WARM_SHADES)))]
    order += [*(f"c{n}" for n in range(1, COLD_SHADES + 1)), "z"]
    places = [order.index(shade(one, of_one)) for one in sorted(bits)]
    assert places == sorted(places)


def test_values_that_are_not_finite_are_marked_above_the_curves():
    loss = [1.0, math.nan, 2.0, math.inf, 3.0]
    recorded = telemetry(loss, [1.0] * 5, np.ones((5, 2)), "ab")
    found = page(founding()._replace(telemetry=recorded, facts=facts("ab")))
    marks = found.all("rect", "bad")
    axis = [number(cell["x"]) for cell in cells(found)[:5]]
    assert [number(mark["x"]) for mark in marks] == [axis[1], axis[3]]
    texts = [text for tag, text in found.texts if tag == "text"]
    assert texts.count("NaN") == 1 and texts.count("Inf") == 1
    curves = [line["points"] for line in found.all("polyline", "curve")]
    assert [len((points or "").split()) for points in curves] == [1, 1, 1, 5]


@pytest.mark.parametrize("values", [[-1.0, -2.0], [0.0, 0.0], [math.nan] * 2, [1e-45, 3e38]])
def test_curves_of_odd_values_stay_in_their_frame(values):
    recorded = telemetry(values, values, np.ones((2, 2)), "ab")
    found = page(founding()._replace(telemetry=recorded, facts=facts("ab", chance_loss=None)))
    frames = found.all("rect", "frame")
    for dot in found.all("circle"):
        inside = [
            number(frame["y"]) <= number(dot["cy"]) <= number(frame["y"]) + number(frame["height"])
            for frame in frames
        ]
        assert any(inside)
    assert all("nan" not in str(value) for _, a in found.tags for value in a.values())


def long_run(steps: int, layers: int) -> Sample:
    names = [f"layer{index}" for index in range(layers)]
    ones = np.ones(steps, np.float32)
    recorded = telemetry(ones, ones, np.ones((steps, layers), np.float32), names)
    return Sample(changed(founding(), step=steps - 1).diagnosis, recorded, facts(names))


@pytest.mark.parametrize(
    ("steps", "layers", "megabytes"), [(200_000, 16, 0.5), (3000, 300, 5.0), (161, 1, 0.1)]
)
def test_long_runs_and_deep_nets_make_bounded_pages(steps, layers, megabytes):
    html = render_html(*long_run(steps, layers))
    assert len(html) < megabytes * 1e6
    found = Page(html)
    last = max(number(cell["x"]) + number(cell["width"]) for cell in cells(found))
    assert last <= 960
    assert "steps a column" in found.text()


def test_short_runs_are_not_grouped():
    assert "steps a column" not in page(long_run(160, 3)).text()


runs = st.builds(
    lambda count, step, onset, first: (
        changed(founding(), step=step, onset=Onset(onset, None, "loss", 1.0, 2.0)).diagnosis,
        Telemetry(np.arange(first, first + count), ("loss",), np.ones((count, 1), np.float32)),
    ),
    st.integers(1, 5000),
    st.integers(0, 6000),
    st.integers(0, 6000),
    st.integers(0, 1000),
)


@given(run=runs, most=st.integers(80, 160))
def test_columns_hold_every_row_once_and_the_ends_alone(run, most):
    diagnosis, recorded = run
    found = columns(recorded, diagnosis, most)
    count = len(recorded.steps)
    assert len(found) <= most
    assert [row for one in found for row in range(one.first, one.last + 1)] == list(range(count))
    alone = {recorded.steps[one.first] for one in found if one.first == one.last}
    ends = {recorded.steps[0], *recorded.steps[-24:], diagnosis.step, diagnosis.onset.step}
    assert ends & set(recorded.steps) <= alone


@pytest.mark.parametrize("name", SAMPLES)
def test_both_files_are_written(tmp_path, name):
    sample = SAMPLES[name]()
    write_reports(*sample, tmp_path / "diagnosis")
    written = json.loads((tmp_path / "diagnosis" / "diagnosis.json").read_text())
    assert written == json.loads(json.dumps(plain(sample.diagnosis.to_dict())))
    assert written["schema"] == 1 and written["verdict"] == sample.diagnosis.verdict
    html = (tmp_path / "diagnosis" / "report.html").read_text(encoding="utf-8")
    assert html == render_html(*sample)
    assert sorted(file.name for file in (tmp_path / "diagnosis").iterdir()) == [
        "diagnosis.json",
        "report.html",
    ]


def test_names_that_are_no_utf8_are_written_too(tmp_path):
    write_reports(*with_names(founding(), "caf\udce9.jpg"), tmp_path)
    assert "caf\\udce9.jpg" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_nothing_recorded_is_no_obstacle():
    empty = Telemetry(np.zeros(0, np.int64), (), np.zeros((0, 0), np.float32))
    assert (
        "No step of this run was recorded."
        in page(Sample(founding().diagnosis, empty, RunFacts(()))).text()
    )


def test_markup_is_escaped_once():
    inner = tag("b", "1 < 2", title='"x"')
    assert inner == '<b title="&quot;x&quot;">1 &lt; 2</b>'
    assert tag("p", inner, " & ", class_="a") == f'<p class="a">{inner} &amp; </p>'
    assert markup("<", Markup("<br>")) == "&lt;<br>"
    assert tag("rect", x=1.25, y=2.0, fill=None) == '<rect x="1.2" y="2"/>'


@pytest.mark.parametrize(
    "module", ["report", "report_terminal", "bundle", "privacy", "chart_heat", "markup"]
)
def test_reports_need_no_tensorflow(module: str):
    code = (
        "import sys; sys.modules['tensorflow'] = sys.modules['keras'] = None; "
        f"import diagnostics.{module}"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
