"""The scoreboard: known faults through the one-line guard, and their clean twins.

    python benchmarks/diagnosis_accuracy.py [--cases ../shared/cases] [--only WORD] [--json FILE]

Prints, per case: stopped at step, stage, layer and op found, cause found against the
known one, fix verified, seconds; then cause and culprit accuracy and false alarms, for
the published cases and for our own apart.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
HERE = Path(__file__).resolve().parent
OWN = ("own_cases", "own_cases_later", "own_cases_newest")


@dataclass
class Score:
    """One case. None where nothing is known or nothing was found."""

    id: str
    step: int | None
    stage: str | None
    layer: str | None
    op: str | None
    cause: str | None
    known_cause: str
    cause_right: bool
    culprit_right: bool | None
    stage_right: bool | None
    verified: bool
    false_alarm: bool
    seconds: float
    note: str = ""


def run_case(case: Any, budget: float) -> Score:
    """The faulty program to its diagnosis, then the twin to its end."""
    from diagnostics import NumericGuard
    from diagnostics.errors import NothingToDiagnose

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        guard = _fit(case, True, NumericGuard(Path(place) / "faulty", stop_on_divergence=True))
        try:
            found = guard.diagnose(budget_seconds=budget)
        except NothingToDiagnose as nothing:
            found, note = None, str(nothing)
        seconds = time.monotonic() - started
        twin = _fit(case, False, NumericGuard(Path(place) / "twin", stop_on_divergence=True))
    alarm = twin.incident is not None
    if found is None:
        return Score(
            id=case.id,
            step=None,
            stage=None,
            layer=None,
            op=None,
            cause=None,
            known_cause=case.cause,
            cause_right=False,
            culprit_right=None,
            stage_right=None,
            verified=False,
            false_alarm=alarm,
            seconds=seconds,
            note=note,
        )
    first = found.first_nonfinite
    fix = found.recommendation
    return Score(
        id=case.id,
        step=found.step,
        stage=first.stage if first else found.verdict,
        layer=first.layer if first else (found.onset.layer if found.onset else None),
        op=first.op if first else None,
        cause=found.cause.kind,
        known_cause=case.cause,
        cause_right=found.cause.kind in (case.cause, *case.accept_causes),
        culprit_right=_culprit(case, found),
        stage_right=None if first is None or not case.stage else first.stage == case.stage,
        verified=bool(fix and fix.verified),
        false_alarm=alarm,
        seconds=seconds,
        note=twin.message if alarm else "",
    )


def _fit(case: Any, faulty: bool, guard: Any) -> Any:
    model, x, y, batch_size, epochs = case.build(faulty=faulty, seed=0)
    with contextlib.redirect_stderr(io.StringIO()):
        options = {"batch_size": batch_size, "epochs": epochs, "shuffle": case.shuffle}
        model.fit(x, y, callbacks=[guard], verbose=0, **options)
    return guard


def _culprit(case: Any, found: Any) -> bool | None:
    """Whether what is to blame is named; None where the case names nothing to point at.

    Rows must be those; else the layer or the op must be, in the place, the onset or
    the evidence.
    """
    first = found.first_nonfinite
    if case.samples:
        return first is not None and tuple(first.examples) == tuple(case.samples)
    wanted = [w for w in (case.layer, case.op, *case.accept_culprits) if w]
    if not wanted:
        return None
    said = [*found.cause.evidence, found.recommendation.command if found.recommendation else ""]
    if first is not None:
        said += [first.layer or "", first.op or "", first.source or ""]
    if found.onset is not None:
        said.append(found.onset.layer or "")
    text = " ".join(said).lower()
    return any(word.lower() in text for word in wanted)


def print_scores(title: str, scores: list[Score]) -> None:
    """One line per case and the totals."""
    print(f"\n{title}")
    row = "{:<40} {:>5} {:<9} {:<22} {:<14} {:<24} {:>5} {:>5} {:>6}  {}"
    print(
        row.format("case", "step", "stage", "layer", "op", "cause (known)", "right", "fix", "s", "")
    )
    for s in scores:
        cause = s.cause if s.cause == s.known_cause else f"{s.cause} ({s.known_cause})"
        cells = [str(c) if c is not None else "-" for c in (s.step, s.stage, s.layer, s.op, cause)]
        marks = ["yes" if s.cause_right else "NO", "yes" if s.verified else "no"]
        extra = "" if not s.false_alarm else "FALSE ALARM ON THE TWIN"
        extra += "" if s.culprit_right in (True, None) else " culprit missed"
        print(row.format(s.id[:40], *cells, *marks, f"{s.seconds:.0f}", extra))
    pointed = [s for s in scores if s.culprit_right is not None]
    print(
        f"cause {sum(s.cause_right for s in scores)} of {len(scores)}, "
        f"culprit {sum(bool(s.culprit_right) for s in pointed)} of {len(pointed)}, "
        f"fix verified {sum(s.verified for s in scores)} of {len(scores)}, "
        f"false alarms {sum(s.false_alarm for s in scores)} of {len(scores)} twins"
    )


def main() -> int:
    """0 if every cause and culprit is right and no twin is stopped, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=Path, default=HERE.parent.parent / "shared" / "cases")
    parser.add_argument("--only", default="", help="cases whose id holds this")
    parser.add_argument("--budget-seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path, help="also write the scores there")
    options = parser.parse_args()
    sys.path[:0] = [str(HERE), str(options.cases)]
    own = [importlib.import_module(name).CASES for name in OWN]
    sets = {"Our own cases": [case for cases in own for case in cases]}
    if options.cases.is_dir():
        published: list[Any] = []
        for file in sorted(options.cases.glob("cases_*.py")):
            published += importlib.import_module(file.stem).CASES
        sets = {"Published cases": published, **sets}
    results: dict[str, list[Score]] = {}
    for title, cases in sets.items():
        chosen = [case for case in cases if options.only in case.id]
        results[title] = []
        for case in chosen:
            print(f"{case.id} …", file=sys.stderr, flush=True)
            results[title].append(run_case(case, options.budget_seconds))
        if chosen:
            print_scores(title, results[title])
    if options.json:
        content = {title: [asdict(s) for s in scores] for title, scores in results.items()}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    every = [score for scores in results.values() for score in scores]
    good = all(s.cause_right and s.culprit_right is not False and not s.false_alarm for s in every)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
