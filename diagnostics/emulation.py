"""Whether a failure belongs to the arithmetic of one machine: replayed with and without it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from diagnostics.diagnosis import Diagnosis
from diagnostics.errors import InputError
from diagnostics.examine import Progress, no_progress
from diagnostics.protocol import Emulates, ReplayableRun
from diagnostics.replay import check_step, failing_row, needed_batch, reproduce, state_at


@dataclass(frozen=True)
class Emulation:
    """What came of replaying a step in both arithmetics.

    Attributes:
      machine: whose was imitated, as 'tpu'.
      recurs: whether the step fails with it. recurs_without: in the run's own.
    """

    machine: str
    recurs: bool
    recurs_without: bool

    def sentence(self) -> str:
        """As in 'does not recur in float32; recurs with TPU multiplication'."""
        other = f"{self.machine.upper()} multiplication"
        if self.recurs == self.recurs_without:
            both = "both" if self.recurs else "neither"
            link = "and" if self.recurs else "nor"
            return f"The failure recurs {both} in float32 {link} with {other}"
        if self.recurs:
            return f"The failure does not recur in float32; it recurs with {other}"
        return f"The failure recurs in float32; it does not recur with {other}"

    def told_in(self, diagnosis: Diagnosis) -> Diagnosis:
        """The diagnosis with this as its first evidence and under `environment.emulation`."""
        evidence = (self.sentence(), *diagnosis.cause.evidence)
        return dataclasses.replace(
            diagnosis,
            cause=dataclasses.replace(diagnosis.cause, evidence=evidence),
            environment={**diagnosis.environment, "emulation": dataclasses.asdict(self)},
        )


def emulated(run: ReplayableRun, machine: str) -> ReplayableRun:
    """The run with a machine's arithmetic.

    Raises:
      InputError: this kind of run cannot be replayed so.
    """
    if not isinstance(run, Emulates):
        raise InputError(
            f"--emulate {machine}: {run.name} is not a run of `vggrepro train`, whose "
            "multiplications alone can be replayed so",
            "Leave out --emulate",
        )
    return run.emulating(machine)


def compare(
    run: ReplayableRun, machine: str, step: int | None, progress: Progress = no_progress
) -> tuple[ReplayableRun, Emulation]:
    """(the run to diagnose, what was found): the emulated one where it fails, else the plain one.

    Args:
      step: None: the incident's, or the last recorded one if it is not finite.

    Raises:
      InputError: this kind of run cannot be replayed so, or no step of it failed.
    """
    other = emulated(run, machine)
    if step is not None:
        check_step(run, step)
    failing = _failing(run) if step is None else step
    if failing is None:
        raise InputError(
            f"--emulate {machine} replays a step that failed, and {run.name} has none",
            "Name one with --step N",
        )
    fails = []
    for one, what in ((other, f"with {machine.upper()} multiplication"), (run, "in float32")):
        progress(f"replay {what}", 0, 0)
        program = one.program()
        found = reproduce(one, program, state_at(one, failing), needed_batch(one, failing), failing)
        fails.append(not found.outcome.applied)
        program.release()
    emulation = Emulation(machine, *fails)
    return (other if emulation.recurs else run), emulation


def _failing(run: ReplayableRun) -> int | None:
    incident = run.incident_step()
    return failing_row(run.telemetry()) if incident is None else incident
