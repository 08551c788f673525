"""A ReplayableRun without TensorFlow: each step's outcome is a rule of change and step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diagnostics.errors import SnapshotDamaged
from diagnostics.protocol import (
    Batch,
    Change,
    Check,
    LayerFacts,
    RunFacts,
    State,
    StepOutcome,
    Telemetry,
)

# (kind and value of the change, step) -> the step's loss, or None where it is refused.
# The run as it was has kind 'none'.
Rule = Callable[[str, Any, int], float | None]
FACTS = RunFacts(
    layers=(LayerFacts("dense", "dense"),), learning_rate=1.0, chance_loss=1.0, classes=3
)
REFUSED = (Check("loss", "", "loss"),)


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ScriptedProgram:
    """Runs the rule; insists on the step that its state stands at."""

    def __init__(self, run: ScriptedRun, change: Change | None) -> None:
        self._run, self._change = run, change
        self._step: int | None = None

    def load(self, state: State) -> None:
        self._step = int(state["counters/step"])

    def state(self) -> State:
        return {"counters/step": np.array(self._step)}

    def run(self, batch: Batch, step: int) -> StepOutcome:
        assert step == self._step, f"step {step} on the state before step {self._step}"
        self._run.ran.append((self._change, step))
        if self._run.clock is not None:
            self._run.clock.now += self._run.step_seconds
        loss = self._run.loss(self._change, step)
        if loss is None:
            return StepOutcome(False, REFUSED, {"loss": float("nan")})
        self._step = step + 1
        value = None if self._change is None else self._change.value
        signal = self._run.signals.get(value, 1.0)
        peaks = {"dense/preactivation_max": signal, "dense/preactivation_min": -signal / 2}
        return StepOutcome(True, (), {"loss": loss, **peaks})

    def trace(self, batch: Batch, step: int, tracer: Any) -> None:
        raise NotImplementedError

    def release(self) -> None:
        self._step = None


class ScriptedRun:
    """A run of `recorded` steps under the rule without a change.

    Attributes:
      states: steps whose state is stored; damaged: those that cannot be read.
      gone: steps whose batch cannot be rebuilt.
      offered: what `changes` answers.
      signals: the largest pre-activation by the value of a change, 1 where not given.
      ran: (change, step) of every step that any program ran.
    """

    name = "scripted"

    def __init__(
        self,
        rule: Rule,
        recorded: int = 6,
        states: Sequence[int] = (0,),
        offered: Sequence[Change] = (),
        facts: RunFacts = FACTS,
    ) -> None:
        self.rule, self.facts = rule, facts
        self.states, self.offered = list(states), list(offered)
        self.damaged: set[int] = set()
        self.gone: set[int] = set()
        self.without_command: set[str] = set()
        self.signals: dict[Any, float] = {}
        self.clock: Clock | None = None
        self.step_seconds = 0.0
        self.ran: list[tuple[Change | None, int]] = []
        losses = [self.loss(None, step) for step in range(recorded)]
        self.recorded = [np.nan if loss is None else loss for loss in losses]

    def loss(self, change: Change | None, step: int) -> float | None:
        kind, value = ("none", None) if change is None else (change.kind, change.value)
        return self.rule(kind, value, step)

    def steps_run(self) -> list[int]:
        return [step for _, step in self.ran]

    def incident_step(self) -> int | None:
        refused = np.flatnonzero(np.isnan(self.recorded))
        return int(refused[0]) if refused.size else None

    def recorded_failures(self) -> tuple[Check, ...]:
        return REFUSED if self.incident_step() is not None else ()

    def telemetry(self) -> Telemetry:
        rows = np.array(self.recorded, np.float32).reshape(-1, 1)
        return Telemetry(np.arange(len(rows)), ("loss",), rows)

    def state_steps(self) -> Sequence[int]:
        return sorted(self.states)

    def state_before(self, step: int) -> State:
        if step in self.damaged:
            raise SnapshotDamaged(f"state of step {step} is damaged")
        return {"counters/step": np.array(step)}

    def batch(self, step: int) -> Batch | None:
        if step in self.gone:
            return None
        return {"inputs": np.full((2, 1), step, np.float32), "example_ids": np.arange(2)}

    def example_names(self, batch: Batch) -> list[tuple[int, str]]:
        return [(int(number), f"example-{number}") for number in batch["example_ids"]]

    def program(self, change: Change | None = None) -> ScriptedProgram:
        return ScriptedProgram(self, change)

    def start_state(self, change: Change | None = None) -> State:
        return self.state_before(0)

    def changes(self, step: int, suspects: Sequence[int]) -> Sequence[Change]:
        return self.offered

    def command(self, change: Change) -> str:
        return (
            "" if change.kind in self.without_command else f"train --{change.kind}={change.value}"
        )

    def environment(self) -> Mapping[str, Any]:
        return {}

    def conditions(self) -> Sequence[str]:
        return []
