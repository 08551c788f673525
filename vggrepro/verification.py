"""A run's steps once more from its configuration, compared bit for bit with what it recorded.

Compared are every number of the flight recorder, the numbers of metrics.jsonl that do not
depend on the clock, validations (run again), every stored state on the way, and the weights
at the start and the end. The steps, batches and validations are made as the trainer makes
them; nothing recorded steers the replay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from diagnostics.errors import InputError, SnapshotDamaged
from diagnostics.snapshot import hash_arrays
from vggrepro import accelerator, engine_record
from vggrepro.accelerator import Engine
from vggrepro.bit_comparison import (
    Difference,
    number_difference,
    row_difference,
    state_difference,
)
from vggrepro.config import TrainConfig
from vggrepro.data_source import open_data
from vggrepro.environment import describe_environment, differences
from vggrepro.evaluation import Evaluator
from vggrepro.replay_adapter import VggRun
from vggrepro.run_directory import RunDirectory
from vggrepro.step_metrics import ON_THE_CLOCK, StepMetrics
from vggrepro.step_state import StepState
from vggrepro.train_step import TrainStep
from vggrepro.training_step import evaluator, training_step

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Verification:
    """What came of it.

    Attributes:
      first_step, end_step: the steps run again, end excluded.
      compared: how much was compared: steps, validations, states.
      first_difference: None: bit-identical.
      first_array_difference: the next stored state after it, where one followed.
      environment: what differs between the recording machine and this one.
    """

    first_step: int
    end_step: int
    compared: dict[str, int]
    first_difference: Difference | None
    first_array_difference: Difference | None
    environment: list[str]

    @property
    def identical(self) -> bool:
        return self.first_difference is None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        first, array = self.first_difference, self.first_array_difference
        return {
            "identical": self.identical,
            "first_difference": first and dataclasses.asdict(first),
            "first_array_difference": array and dataclasses.asdict(array),
            "first_step": self.first_step,
            "end_step": self.end_step,
            "compared": self.compared,
            "environment_differences": self.environment,
        }


def verify(
    run_dir: Path,
    first: int | None = None,
    end: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Verification:
    """Runs steps first..end-1 again, from the last stored state at or before `first`.

    Args:
      first: None: 0. end: None: all that the run has done, a refused step included.

    Raises:
      InputError: no such steps, the data is gone or changed, or no state to start from.
    """
    with RunDirectory.open(run_dir) as stored:
        replay = _Replay(run_dir, stored)
        start, last = replay.bounds(first, end)
        return replay.run(start, last, progress)


class _Replay:
    """One verification: the recording, the step that runs again, and what was found."""

    def __init__(self, run_dir: Path, stored: RunDirectory) -> None:
        config = stored.config()
        if config.get("kind", "vgg") != "vgg":
            raise InputError(f"{run_dir} was not written by `vggrepro train`")
        self._config = TrainConfig.from_dict(config)
        self._stored, self._manifest = stored, stored.manifest()
        self._recording = VggRun(run_dir)
        self._telemetry = self._recording.telemetry()
        self._rows = {int(step): row for row, step in enumerate(self._telemetry.steps)}
        self._training, self._validation = _records(stored)
        self._compared = {"steps": 0, "validations": 0, "states": 0}
        self._engine_note = ""
        self._first: Difference | None = None
        self._array: Difference | None = None

    def bounds(self, first: int | None, end: int | None) -> tuple[int, int]:
        """The stored step to start from, and the end.

        Raises:
          InputError: the run has no such steps.
        """
        done = int(self._telemetry.steps[-1]) + 1 if self._telemetry.steps.size else 0
        if not done:
            raise InputError(f"{self._recording.name} has recorded no step", "Train it first")
        first, end = first or 0, done if end is None else end
        if not 0 <= first < end <= done:
            raise InputError(
                f"steps {first}:{end} are none of {self._recording.name}",
                f"Its steps are 0:{done}",
            )
        steps = [step for step in self._recording.state_steps() if step <= first]
        return steps[-1], end

    def run(self, start: int, end: int, progress: Progress) -> Verification:
        recorded = self._manifest.get("data")
        data = open_data(self._config, lambda text: None, recorded)
        with tf.device(accelerator.device_name(self._config)):
            state = self._recording.state_before(start)
            engine = self._own_engine(start, end)
            step = training_step(self._config, self._recording.network, state, engine)
            validator = evaluator(step)
            if start == 0:
                self._check_weights(0, "initial_weights_sha256", step)
            metrics = StepMetrics(step.layout, self._config.batch_size, self._config.precision)
            metrics.start_clock()
            batches = iter(data.training.stream(start))
            for now in range(start, end + 1):
                progress("verifying", now - start, end - start)
                if now > start:
                    self._check_validation(now, step, validator, data.validation)
                    self._check_state(now, step)
                if now == end or (self._first is not None and not self._states_ahead(now, end)):
                    break
                if isinstance(step, TrainStep):
                    step.replicas = self._recording.replicas_at(now)
                self._run_step(now, step, metrics, _next(batches, data, now))
            if end == self._manifest.get("steps"):
                self._check_weights(end, "final_weights_sha256", step)
        return Verification(
            start, end, self._compared, self._first, self._array, self._environment()
        )

    def _own_engine(self, start: int, end: int) -> Engine:
        """JAX's if it ran these steps on as many devices as are here, else TensorFlow's.

        The latter repeats the bits of all the others on one device.
        """
        ran = engine_record.engine_between(self._manifest, start, end) or {}
        here = Engine("cpu", accelerator.prepare(self._config))
        if self._config.strategy != "pjrt":
            return here
        try:
            jax = accelerator.jax_engine()
        except InputError as error:
            self._engine_note = f"engine: JAX when recorded, TensorFlow now ({error.message})"
            return here
        if jax.record() == ran:
            return jax
        then = ran.get("devices", "several engines")
        self._engine_note = f"engine: {then} when recorded, TensorFlow now ({jax.description} here)"
        return here

    def _run_step(
        self, now: int, step: StepState, metrics: StepMetrics, batch: Mapping[str, tf.Tensor]
    ) -> None:
        result = step(batch["images"], batch["labels"])
        self._compared["steps"] += 1
        if now in self._rows:
            row = self._telemetry.rows[self._rows[now]]
            self._found(row_difference(now, self._telemetry.columns, row, result.telemetry))
        refused = now == self._recording.incident_step()
        applied = number_difference(now, "guard", "applied", not refused, result.applied)
        self._found(applied)
        if now in self._training:
            told = metrics.brief(metrics.of_step(result.telemetry))
            self._check_metrics(now, "metrics", self._training[now], told)

    def _check_validation(
        self, now: int, step: StepState, validator: Evaluator, batches: Any
    ) -> None:
        """Runs a recorded validation again; one of the schedule steers the rate, as it did."""
        if now not in self._validation:
            return
        found = validator.evaluate(batches)
        assert found is not None
        self._compared["validations"] += 1
        self._check_metrics(now, "validation", self._validation[now], found)
        if self._config.eval_every and now % self._config.eval_every == 0:
            step.record_validation(now, found["val_top1_error"])

    def _check_metrics(
        self, now: int, kind: str, recorded: Mapping[str, Any], found: Mapping[str, Any]
    ) -> None:
        for name, value in recorded.items():
            if name != "step" and name not in ON_THE_CLOCK:
                self._found(number_difference(now, kind, name, value, found.get(name)))

    def _check_state(self, now: int, step: StepState) -> None:
        if now not in self._recording.state_steps():
            return
        try:
            recorded = self._recording.state_before(now)
        except SnapshotDamaged as error:
            self._found(Difference(now, "state", error.message, "damaged", "not compared"))
            return
        self._compared["states"] += 1
        found = state_difference(now, "state", recorded, step.state())
        self._array = self._array or found
        self._found(found)

    def _check_weights(self, now: int, entry: str, step: StepState) -> None:
        recorded = self._manifest.get(entry)
        if recorded is not None:
            found = number_difference(
                now, "weights", entry, recorded, hash_arrays(step.parameters())
            )
            self._found(found)

    def _found(self, difference: Difference | None) -> None:
        self._first = self._first or difference

    def _states_ahead(self, now: int, end: int) -> bool:
        """Whether going on after a difference will show which array differs."""
        ahead = any(now < step <= end for step in self._recording.state_steps())
        return self._array is None and ahead

    def _environment(self) -> list[str]:
        recorded, current = self._manifest.get("environment", {}), describe_environment()
        found = differences(recorded, current)
        was, now = (_code(known.get("code", {})) for known in (recorded, current))
        found += [self._engine_note] if self._engine_note else []
        return found if was == now else [*found, f"code: {was} when recorded, {now} now"]


def _code(known: Mapping[str, Any]) -> str:
    """Version, commit, and whether files differ from it."""
    changed = " with changes" if known.get("dirty") else ""
    return f"{known.get('version')} commit {str(known.get('commit'))[:12]}{changed}"


def _records(
    stored: RunDirectory,
) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """metrics.jsonl: training records by step; validations by completed steps."""
    training, validation = {}, {}
    for record in stored.metrics():
        if "val_loss" in record:
            validation[record["step"] + 1] = record
        else:
            training[record["step"]] = record
    return training, validation


def _next(batches: Iterator[Any], data: Any, now: int) -> Any:
    try:
        return next(batches)
    except tf.errors.OpError as error:
        raise data.explain(now, error) from error
