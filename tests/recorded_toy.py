"""A toy run whose recording can be altered, and which offers few changes to keep tests quick."""

from __future__ import annotations

from collections.abc import Sequence

from toy_run import ToyConfig, ToyProgram, ToyRun

from diagnostics.protocol import Batch, Change, Telemetry


class RecordedToy(ToyRun):
    """Replays with the program that trained it.

    Attributes:
      recorded: telemetry instead of its own.
      stopped: the incident's step instead of its own.
      states_gone, batches_gone: steps.
      kinds: of the changes it offers.
      said: what `conditions` answers.
    """

    recorded: Telemetry | None = None
    stopped: int | None | str = "as it was"
    states_gone: Sequence[int] = ()
    batches_gone: Sequence[int] = ()
    kinds: Sequence[str] = ("learning_rate", "clip_norm")
    said: Sequence[str] = ()

    def program(self, change: Change | None = None) -> ToyProgram:
        unchanged = change is None or change.kind == "none"
        return self.trained if unchanged and self.trained else super().program(change)

    def telemetry(self) -> Telemetry:
        return super().telemetry() if self.recorded is None else self.recorded

    def incident_step(self) -> int | None:
        return super().incident_step() if self.stopped == "as it was" else self.stopped

    def state_steps(self) -> Sequence[int]:
        return [step for step in super().state_steps() if step not in self.states_gone]

    def batch(self, step: int) -> Batch | None:
        return None if step in self.batches_gone else super().batch(step)

    def changes(self, step: int, suspects: Sequence[int]) -> Sequence[Change]:
        return [one for one in super().changes(step, suspects) if one.kind in self.kinds]

    def conditions(self) -> Sequence[str]:
        return self.said


ALTERABLE = (
    "recorded",
    "stopped",
    "states_gone",
    "batches_gone",
    "kinds",
    "said",
    "incident_step",
    "recorded_failures",
    "command",
    "name",
)


def as_trained(run: RecordedToy) -> RecordedToy:
    """The run with every alteration of a test undone."""
    for name in ALTERABLE:
        run.__dict__.pop(name, None)
    return run


def exploding_toy() -> RecordedToy:
    """Fails some steps after its second checkpoint (one every third step), by its rate."""
    run = RecordedToy(ToyConfig(learning_rate=6.0), checkpoint_every=3).train(60)
    assert run.stopped_at is not None and 7 <= run.stopped_at < 60
    return run
