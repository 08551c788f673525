"""NumericGuard: the tripwire and the diagnosis for any Keras `fit`, in one line.

guard = NumericGuard("runs/mine")
model.fit(x, y, callbacks=[guard])
if guard.incident:
    print(guard.diagnose())
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from diagnostics.durable_files import write_json
from diagnostics.errors import InputError
from diagnostics.flight_recorder import FlightRecorder
from diagnostics.incident import write_incident
from diagnostics.keras_batches import DataSource, KeptBatches, flatten_batch, row_count
from diagnostics.keras_divergence import DivergenceLimits
from diagnostics.keras_facts import facts_of
from diagnostics.keras_run_files import (
    claim,
    describe_packages,
    step_directory,
    write_config,
)
from diagnostics.keras_sights import RUNAWAY_GRADIENT, RUNAWAY_LOSS
from diagnostics.keras_step import GuardedStep, guarded_function, read_outcome
from diagnostics.protocol import Batch, StepOutcome, Telemetry
from diagnostics.snapshot import write_snapshot
from diagnostics.stall import detect_divergence, detect_stall

if TYPE_CHECKING:
    from diagnostics.keras_diagnosis import SavableDiagnosis

# The state before step 0 is kept up to this size, for replays from the start.
START_BYTES = 256 << 20
FOLLOWING_BATCHES, FOLLOWING_BYTES = 8, 64 << 20


class NumericGuard(keras.callbacks.Callback):
    """Stops a `fit` at the first non-finite value, before it is written anywhere.

    Layer outputs, loss, gradients, weights, optimizer slots and moving statistics
    are looked at inside the compiled step. At the first bad step nothing it would
    write stays: weights, slots, iteration counter, statistics, metrics and random
    seeds are those before the step. `fit` then ends as with early stopping.

    Args:
      run_dir: for telemetry and incident. An earlier guard's run there is replaced;
        one with an incident is moved to `<run_dir>.1`.
      stop_on_divergence: also stop where the loss or the gradient runs away while
        still finite, and say at the end if the run never learnt or ended badly.

    Attributes:
      incident: directory of the refused step, or None.
      step: steps run so far, over all fits with this guard.
      message: what ended the training, or the report of a stall; '' if nothing.

    Raises:
      InputError: at the first `fit`, if the directory holds something else.
    """

    def __init__(self, run_dir: str | os.PathLike, stop_on_divergence: bool = False) -> None:
        super().__init__()
        self.run_dir = Path(run_dir)
        self.stop_on_divergence = stop_on_divergence
        self.incident: Path | None = None
        self.step = 0
        self.message = ""
        self._guarded: GuardedStep | None = None
        self._record = FlightRecorder(self.run_dir / "telemetry")
        self._divergence: DivergenceLimits | None = None
        self._columns: tuple[str, ...] = ()
        self._batches = KeptBatches()
        self._structure: Any = None
        self._stopped = False
        self._expected = False
        self._started = False

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Wraps the model's step; the user's own is back when `fit` is over."""
        if keras.backend.backend() != "tensorflow":
            raise InputError(
                f"NumericGuard needs Keras on TensorFlow, not on {keras.backend.backend()}",
                "Set KERAS_BACKEND=tensorflow before importing keras",
            )
        if not self._started:
            claim(self.run_dir)
            self._started = True
            write_json(self.run_dir / "config.json", {"kind": "keras"})
        self._manifest("running")
        self._stopped = False
        self._source = DataSource(self.model)
        self._install()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Rows of the data are counted from here; a callback may have written weights."""
        self._rows_of_epoch = 0
        if self._guarded is not None:
            self._guarded.bounds.forget()

    def _install(self) -> None:
        self._plain = self.model.train_function
        self._guarded, self._guarded_function = guarded_function(
            self.model, START_BYTES, bounded=True
        )
        self.model.train_function = self._train_function

    def _train_function(self, iterator: Any) -> Any:
        """What `fit` calls once per execution; a fit without this guard gets the plain one."""
        if not self._expected:
            return self._plain(iterator)
        self._expected = False
        return self._execution(iterator)

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Says that the next execution is one of this guard's fit."""
        self._expected = True

    def _execution(self, iterator: Any) -> Any:
        """One execution of `fit`: `steps_per_execution` steps, fewer if one is refused."""
        assert self._guarded is not None
        outputs = None
        for _ in range(self.model.steps_per_execution):
            if self._stopped:
                self.model.stop_training = True
                break
            try:
                data = next(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                break
            if self._guarded.state is None:
                self._guarded.prepare(data)
            # One batch at a time, so that every step's flags come back.
            outputs = self._guarded_function(iter([data]))
            if self._guarded.bounds.active:
                outputs = self._looked_at(data, outputs)
            if not self._after_step(data, outputs["guard"]):
                self._keep_following(iterator)
                break
        if outputs is None:
            if self.model.steps_per_execution == 1 and not self._stopped:
                # Keras finds the end of data of unknown length by running a step on
                # nothing, which still counts as an iteration: so it must here.
                return self._plain(iterator)
            raise StopIteration
        return outputs["logs"]

    def _looked_at(self, data: Any, outputs: dict[str, Any]) -> dict[str, Any]:
        """A step that its bounds refused, once more with a look at everything, as all after it.

        It tells what is not finite, or that a bound was not conclusive.
        """
        assert self._guarded is not None
        if read_outcome(self._guarded, outputs["guard"]).applied:
            return outputs
        limits = self._guarded.limits
        start = 0 if self._columns else START_BYTES
        self._guarded, self._guarded_function = guarded_function(self.model, start)
        self._guarded.prepare(data)
        self._guarded.limits.assign(limits)
        return self._guarded_function(iter([data]))

    def _after_step(self, data: Any, shown: dict[str, Any]) -> bool:
        """Records the step; stops the training unless it was applied."""
        assert self._guarded is not None
        outcome = read_outcome(self._guarded, shown)
        if not self._columns:
            self._first_step(data, outcome)
        row = np.array([outcome.telemetry.get(c, np.nan) for c in self._columns], np.float32)
        self._record.append(self.step, row)
        if outcome.applied:
            self._batches.add(self.step, data)
            self._rows_of_epoch += row_count(data)
            self.step += 1
            self._guarded.bounds.after_step(outcome.telemetry)
            if self._divergence is not None:
                self._guarded.limits.assign(self._divergence.limits(outcome.telemetry))
            return True
        self._stopped = self.model.stop_training = True
        self.incident = self._write_incident(data, outcome)
        print(self.message, file=sys.stderr)
        return False

    def _keep_following(self, iterator: Any) -> None:
        """Keeps what would have come next, so that a fix can be replayed past the failure."""
        following = KeptBatches(FOLLOWING_BYTES)
        for step in range(self.step + 1, self.step + 1 + FOLLOWING_BATCHES):
            try:
                following.add(step, next(iterator))
            except (StopIteration, tf.errors.OutOfRangeError):
                break
        self._write_batches(following.arrays())

    def _write_batches(self, following: Batch | None = None) -> None:
        kept = {**self._batches.arrays(), **(following or {})}
        if kept:
            write_snapshot(self.run_dir / "batches", kept, {"step": self.step})

    def _first_step(self, data: Any, outcome: StepOutcome) -> None:
        """What is known only once the step is traced: columns, configuration, start."""
        assert self._guarded is not None
        self._columns = tuple(outcome.telemetry)
        self._record.start(self._columns, self.step)
        _, self._structure = flatten_batch(data)
        self.facts = facts_of(self.model, self._guarded.layer_order, row_count(data) or None)
        if self.stop_on_divergence:
            self._divergence = DivergenceLimits(self.facts)
        if self._guarded.initial is not None:
            write_snapshot(self.run_dir / "start", self._guarded.initial, {"step": self.step})
        write_config(self.run_dir, self.model, self._structure, self.facts)

    def _write_incident(self, data: Any, outcome: StepOutcome) -> Path:
        assert self._guarded is not None and self._guarded.state is not None
        directory = step_directory(self.run_dir / "incidents", self.step)
        batch, _ = flatten_batch(data)
        rows = self._source.rows(batch, self._rows_of_epoch)
        if rows is not None:
            batch["example_ids"] = rows
        self._record.flush()
        first = outcome.failed[0]
        ran_away = first.quantity in (RUNAWAY_LOSS, RUNAWAY_GRADIENT)
        size = write_incident(
            directory,
            state=self._guarded.state.arrays(),
            batch=batch,
            record={
                "step": self.step,
                "failed_checks": [check._asdict() for check in outcome.failed],
                "diverged": ran_away,
                "metrics": dict(outcome.telemetry),
                "environment": describe_packages(),
                "fed": self._source.kind,
            },
        )
        others = f" and {len(outcome.failed) - 1} more" if len(outcome.failed) > 1 else ""
        what = "runs away" if ran_away else f"is not finite{others}"
        self.message = (
            f"NumericGuard: step {self.step}: {first.describe()} {what}; nothing of this step was "
            f"written. The state before it and its batch are in {directory} ({size / 1e6:.1f} MB). "
            f"Next: guard.diagnose(), or vggrepro diagnose-nan {self.run_dir}"
        )
        return directory

    def on_train_end(self, logs: dict | None = None) -> None:
        """Puts the model's own train function back and closes the recording."""
        del self._source  # it holds the user's data
        self.model.train_function = self._plain
        self._record.flush()
        if self.stop_on_divergence and self.incident is None and self._columns:
            telemetry = self.telemetry()
            trouble = detect_stall(telemetry, self.facts) or detect_divergence(
                telemetry, self.facts
            )
            if trouble is not None:
                self._write_batches()
                self.message = f"NumericGuard: {trouble}. Next: guard.diagnose()"
                print(self.message, file=sys.stderr)
        self._manifest("stopped_by_guard" if self._stopped else "finished")

    def diagnose(self, budget_seconds: float = 60.0) -> SavableDiagnosis:
        """Replays, locates, explains and tests fixes, with the live model.

        The model's state is the same afterwards.

        Args:
          budget_seconds: for the replays of fixes; 0 tries none.

        Raises:
          NothingToDiagnose: no step was refused, and the recorded steps are healthy.
        """
        from diagnostics.keras_diagnosis import diagnose_live
        from diagnostics.keras_replay import KerasRun

        self._record.flush()
        if self.incident is None and not (self.run_dir / "batches").exists():
            self._write_batches()
        return diagnose_live(KerasRun(self.run_dir, self.model), budget_seconds)

    def telemetry(self) -> Telemetry:
        """Every recorded step, of all fits with this guard."""
        steps, columns, rows = self._record.read()
        return Telemetry(steps, tuple(columns), rows)

    def _manifest(self, status: str) -> None:
        content = {"status": status, "steps": self.step, "environment": describe_packages()}
        write_json(self.run_dir / "manifest.json", content)
