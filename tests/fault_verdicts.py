"""What is wrong with a diagnosis, given the fault that was put in."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable

from faults import InjectedFault, differences, expected_place, found_place
from faulty_programs import CULPRIT
from natural_faults import NONE, UNPROVEN, VERIFIED, NaturalFault
from toy_run import ToyRun

from diagnostics.diagnosis import Diagnosis
from diagnostics.protocol import Change, ReplayableRun

# (command, or None for the run as it was; steps) -> last loss; None if the guard stopped it.
Training = Callable[[str | None, int], float | None]
NOTHING = "nothing"
RUNAWAY = 10.0  # a fix that leaves the loss above so many times guessing is none
MARGIN = 3  # steps that a verified fix outlasts the failing step by
# The causes that an injected fault may be blamed on; data and settings are in order.
_GUILTY = {
    "data": ("data",),
    "weights": ("weights",),
    "loss": ("loss_formula", "unknown"),
    "forward": ("architecture", "unknown"),
    "backward": ("architecture", "loss_formula", "unknown"),
    "update": ("optimizer", "unknown"),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run of the campaign.

    Attributes:
      truth, said: stages (injected), causes (natural) or verdicts (clean).
      cause: kind of cause that was named; '' for a clean run.
      wrong: complaints; empty if everything is as it must be.
    """

    name: str
    truth: str
    said: str
    cause: str
    wrong: tuple[str, ...]
    seconds: float


def complaints_of_place(
    fault: InjectedFault, example_ids: list[int], found: Diagnosis
) -> list[str]:
    """Whether an injected fault was found exactly where it is, and nothing innocent blamed."""
    wrong = differences(expected_place(fault, example_ids), found_place(found))
    if found.verdict != "reproduced":
        wrong.append(f"verdict {found.verdict}: {'; '.join(found.notes)}")
    if found.cause.kind not in _GUILTY[fault.injection.stage]:
        wrong.append(f"cause {found.cause.kind}: {found.cause.evidence[0]}")
    return wrong


def complaints_of_cause(fault: NaturalFault, found: Diagnosis) -> list[str]:
    """Whether place, example, cause and advice are right for a natural fault."""
    wrong = []
    first = found.first_nonfinite
    for name in ("stage", "op", "layer"):
        wanted, said = getattr(fault, name), getattr(first, name, None)
        if wanted and said != wanted:
            wrong.append(f"{name} {said}, not {wanted}")
    blamed = first.examples if first is not None else ()
    if blamed != ((CULPRIT,) if fault.blamed else ()):
        wrong.append(f"examples {blamed} blamed")
    if found.verdict != fault.verdict:
        wrong.append(f"verdict {found.verdict}, not {fault.verdict}")
    if found.cause.kind not in (fault.cause, *fault.also):
        wrong.append(f"cause {found.cause.kind}: {found.cause.evidence[0]}")
    advice = found.recommendation
    if fault.advice == VERIFIED and not (advice and advice.verified):
        wrong.append(f"no verified fix: {advice}")
    if fault.advice == NONE and advice is not None:
        wrong.append(f"a fix where there is none: {advice}")
    if fault.advice == UNPROVEN and advice is not None and advice.verified:
        wrong.append(f"called verified, and cannot be: {advice}")
    return wrong


def false_claims(run: ReplayableRun, found: Diagnosis, train: Training) -> list[str]:
    """Tries a command that is called verified, past the failing step; and none at all."""
    advice = found.recommendation
    if advice is None or not advice.verified:
        return []
    wrong = []
    steps = found.step + 1 + MARGIN
    loss = train(advice.command, steps)
    chance = run.facts.chance_loss
    if loss is None or (chance is not None and loss > RUNAWAY * chance):
        wrong.append(f"called verified, but comes to loss {loss}: {advice.command}")
    if found.verdict == "reproduced" and train(None, steps) is not None:
        wrong.append("called verified, but without any change it does not fail either")
    return wrong


def train_toy(run: ToyRun, command: str | None, steps: int) -> float | None:
    """See `Training`; a command is 'toy train --kind value'."""
    change = None if command is None else _toy_change(command)
    program = run.program(change)
    program.load(run.start_state(change))
    loss = math.nan
    for step in range(steps):
        batch = run.batch(step)
        assert batch is not None
        outcome = program.run(batch, step)
        if not outcome.applied:
            return None
        loss = outcome.telemetry["loss"]
    return loss


def _toy_change(command: str) -> Change:
    option, text = command.removeprefix("toy train --").split(" ", 1)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a name
        value = text
    return Change(option.replace("-", "_"), value, "")
