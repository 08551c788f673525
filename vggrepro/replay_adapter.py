"""A VGG run directory as the diagnosis sees it: `ReplayableRun` and `Program`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from diagnostics.errors import InputError, SnapshotDamaged
from diagnostics.incident import INCIDENT_FILE, Incident, read_incident
from diagnostics.protocol import (
    Batch,
    Change,
    Check,
    State,
    StepOutcome,
    Telemetry,
)
from diagnostics.snapshot import hash_arrays
from vggrepro import (
    accelerator,
    counterfactual_changes,
    engine_record,
    inheritance,
    loss_scale,
)
from vggrepro.config import TrainConfig
from vggrepro.config_options import command_line
from vggrepro.data_source import DataSource, open_data
from vggrepro.environment import describe_environment, differences
from vggrepro.model import Network, build_network
from vggrepro.run_directory import RunDirectory
from vggrepro.run_facts import run_facts
from vggrepro.step_state import compiled_part, initial_state
from vggrepro.train_step import TrainStep

if TYPE_CHECKING:
    from diagnostics.op_trace import OpTrace


class VggRun:
    """One run directory, read only; implements `diagnostics.protocol.ReplayableRun`.

    Raises:
      InputError: not a run directory, or its configuration cannot be read.
      SnapshotDamaged: the incident's files do not match their hashes.
    """

    def __init__(self, run_dir: Path) -> None:
        self._directory = RunDirectory.open(run_dir)
        self.name = str(run_dir)
        self.config = TrainConfig.from_dict(self._directory.config())
        self._device = accelerator.prepare(self.config)
        self._manifest = self._directory.manifest()
        self.network = _network(self.config)
        incidents = self._directory.incidents()
        self._incident: Incident | None = _sound_incident(incidents[-1]) if incidents else None
        self.facts = run_facts(self.config, self.network)
        self._data, self._data_error = self._open_data()
        self._spare_steps: list[TrainStep] = []
        self._multiply_dtype: tf.DType | None = None
        self._telemetry: Telemetry | None = None
        self._unread = ""

    def incident_step(self) -> int | None:
        return self._incident.step if self._incident else None

    def recorded_failures(self) -> tuple[Check, ...]:
        if self._incident is None:
            return ()
        return tuple(Check(**check) for check in self._incident.record["failed_checks"])

    def telemetry(self) -> Telemetry:
        if self._telemetry is None:
            steps, columns, rows = self._directory.telemetry.read()
            self._telemetry = Telemetry(steps, tuple(columns), rows)
        return self._telemetry

    def state_steps(self) -> Sequence[int]:
        steps = {0, *self._directory.checkpoints()}
        if self._incident is not None:
            steps.add(self._incident.step)
        return sorted(steps)

    def state_before(self, step: int) -> State:
        if self._incident is not None and step == self._incident.step:
            return self._incident.state
        if step == 0:
            return self.start_state()
        checkpoint = self._directory.latest_checkpoint(at_most=step)
        if checkpoint is None or checkpoint[0] != step:
            raise SnapshotDamaged(f"checkpoint of step {step} of {self.name} cannot be read")
        return checkpoint[1]

    def start_state(self, change: Change | None = None) -> State:
        config = counterfactual_changes.changed_config(self.config, change)
        state = initial_state(config, self.network, self._inherited())
        return counterfactual_changes.scaled_kernels(state, change)

    def _inherited(self) -> State:
        return inheritance.kept_parameters(self._directory.path, self.config)

    def batch(self, step: int) -> Batch | None:
        if self._incident is not None and step == self._incident.step:
            return self._incident.batch
        return self._rebuilt(step)

    def example_names(self, batch: Batch) -> list[tuple[int, str]]:
        ids = [int(example) for example in batch["example_ids"]]
        if self._incident is not None and batch is self._incident.batch:
            return list(zip(ids, self._incident.record["example_names"], strict=True))
        if self._data is None:
            return [(example, f"example {example}") for example in ids]
        return [(example, self._data.training.name_of(example)) for example in ids]

    def program(self, change: Change | None = None) -> VggProgram:
        config = counterfactual_changes.changed_config(self.config, change)
        exact = change is not None and change.kind == "precision"
        return VggProgram(
            config,
            change,
            self._validation_errors(),
            self._spare_steps,
            None if exact else self._multiply_dtype,
            self.replicas_at,
        )

    def emulating(self, machine: str) -> VggRun:
        """Implements `diagnostics.protocol.Emulates`: float32 products as on a TPU."""
        if machine != "tpu" or self.config.precision != "float32":
            raise InputError(
                f"--emulate {machine} changes nothing of {self.name}, which computes in "
                f"{self.config.precision}",
                "A TPU multiplies only float32 in another way; leave out --emulate",
            )
        twin = copy.copy(self)
        twin._multiply_dtype = tf.bfloat16
        twin.facts = dataclasses.replace(self.facts, precision="float32, multiplied in bfloat16")
        return twin

    def replicas_at(self, step: int) -> int:
        """As of how many replicas a step is computed, one after the other on one device."""
        return engine_record.replicas_at(self._manifest, step)

    def changes(self, step: int, suspects: Sequence[int]) -> Sequence[Change]:
        found = counterfactual_changes.candidates(self.config, self.facts, step, suspects)
        if self._multiply_dtype is not None:
            found.append(Change("precision", "float32", "multiplied in float32", rank=4))
        rows = (self._manifest.get("inheritance") or {}).get("layers", ())
        if rows and all(row["origin"] == "copied" for row in rows):
            return [change for change in found if change.kind != "init"]  # nothing is drawn
        return found

    def command(self, change: Change) -> str:
        multiplies = self._multiply_dtype is not None and change.value == self.config.precision
        if not counterfactual_changes.has_option(change) or multiplies:
            return ""
        changed = counterfactual_changes.changed_config(self.config, change)
        names = (field.name for field in dataclasses.fields(TrainConfig))
        # What was changed is said even where it is the default.
        said = {name for name in names if getattr(changed, name) != getattr(self.config, name)}
        return command_line(changed, said)

    def environment(self) -> Mapping[str, Any]:
        return self._manifest.get("environment", {})

    def conditions(self) -> Sequence[str]:
        found = list(differences(self.environment(), describe_environment()))
        if self._multiply_dtype is not None:
            found.append(
                "convolutions and matrix products round their operands to bfloat16 here, as a "
                "TPU does by default; bits are neither the recorded ones nor the TPU's"
            )
        found += self._device_condition() + self._data_conditions()
        found += self._initial_weights_condition()
        return [*found, *dict.fromkeys(self._directory.warnings)]

    def _device_condition(self) -> list[str]:
        then = self.environment().get("hardware", {}).get("devices") or [self._device]
        # Of processors the environment tells more.
        kinds = {device.partition(",")[0] for device in (*then, self._device)}
        return [f"device: {then[0]} when recorded, {self._device} now"] if len(kinds) > 1 else []

    def _data_conditions(self) -> list[str]:
        """What is not as it was when the run read its data."""
        rest = "only the captured batch" if self._incident else "no step"
        if self._data is None:
            return [f"the data cannot be used ({self._data_error}): {rest} can be replayed"]
        if self._incident is None:
            return []
        rebuilt = self._rebuilt(self._incident.step)
        if rebuilt is None:
            return [f"the batch of step {self._incident.step} cannot be rebuilt: {self._unread}"]
        if hash_arrays(rebuilt) != hash_arrays(self._incident.batch):
            return [
                "the batch rebuilt from (seed, step) is not the captured one, bit for bit: "
                "the data or its preprocessing has changed since, or memory failed then"
            ]
        return []

    def _validation_errors(self) -> dict[int, float]:
        """Completed steps -> top-1 error, of the validations that steer the rate."""
        return {
            record["step"] + 1: record["val_top1_error"]
            for record in self._directory.metrics()
            if "val_top1_error" in record
            and self.config.eval_every
            and (record["step"] + 1) % self.config.eval_every == 0
        }

    def _initial_weights_condition(self) -> list[str]:
        recorded = self._manifest.get("initial_weights_sha256")
        try:
            same = recorded is None or recorded == self._initial_weights_hash()
        except SnapshotDamaged as error:
            return [error.message]
        return [] if same else ["the initial weights made again are not the recorded ones"]

    def _initial_weights_hash(self) -> str:
        state = self.start_state()
        prefix = "params/"
        weights = {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}
        return hash_arrays(weights)

    def _open_data(self) -> tuple[DataSource | None, str]:
        recorded = self._manifest.get("data")
        if not recorded:
            return None, "manifest.json does not say which it was"
        try:
            return open_data(self.config, lambda text: None, recorded), ""
        except InputError as error:
            return None, error.message

    def _rebuilt(self, step: int) -> Batch | None:
        """The batch out of (seed, step); None if the data is gone or an image unreadable."""
        if self._data is None:
            return None
        try:
            batch = self._data.training_batch(step)
        except InputError as error:
            self._unread = error.message
            return None
        return {name: tensor.numpy() for name, tensor in batch.items()}


class VggProgram:
    """The compiled step of a configuration; implements `diagnostics.protocol.Program`.

    Args:
      change: a change of data is applied to every batch; others are already in
        `config`.
      validation_errors: top-1 errors by completed steps, as recorded; they drive
        the learning rate's plateau rule, so that no validation is run again.
      spare: compiled steps that released programs left; one is taken if it fits.
      multiply_dtype: as `TrainStep`.
      replicas_at: as of how many replicas a step is computed.
    """

    def __init__(
        self,
        config: TrainConfig,
        change: Change | None,
        validation_errors: Mapping[int, float],
        spare: list[TrainStep],
        multiply_dtype: tf.DType | None = None,
        replicas_at: Callable[[int], int] = lambda step: 1,
    ) -> None:
        self._config, self._change = config, change
        self._multiply_dtype = multiply_dtype
        self._validation_errors = validation_errors
        self._spare = spare
        self._replicas_at = replicas_at
        self._network = _network(config)
        self._step: TrainStep | None = None

    def load(self, state: State) -> None:
        # A state recorded in another precision: float16's has a loss scale.
        state = loss_scale.state_for(self._config.precision, state)
        if self._step is None:
            self._step = self._taken_over()
        if self._step is None:
            with tf.device(accelerator.device_name(self._config)):
                self._step = TrainStep(
                    self._config, self._network, state, multiply_dtype=self._multiply_dtype
                )
        else:
            self._step.load(state)

    def state(self) -> State:
        return self._loaded().state()

    def run(self, batch: Batch, step: int) -> StepOutcome:
        compiled = self._ready(step)
        result = compiled(*self._fed(batch))
        names = compiled.layout
        failed = [c for c, ok in zip(names.checks(), result.passed, strict=True) if not ok]
        telemetry = dict(zip(names.columns(), result.telemetry.tolist(), strict=True))
        return StepOutcome(result.applied, tuple(failed), telemetry)

    def trace(self, batch: Batch, step: int, tracer: OpTrace) -> None:
        self._ready(step).run_op_by_op(*self._fed(batch), tracer.phase)

    def release(self) -> None:
        """Gives the compiled step away; the program needs a new `load` then.

        Only one is kept spare: at full width its state takes a gigabyte.
        """
        if self._step is not None:
            self._spare[:] = [self._step]
        self._step = None

    def _taken_over(self) -> TrainStep | None:
        if not self._spare or self._spare[0].multiply_dtype != self._multiply_dtype:
            return None
        if compiled_part(self._spare[0].config) != compiled_part(self._config):
            return None
        step = self._spare.pop()
        step.reconfigure(self._config)
        return step

    def _ready(self, step: int) -> TrainStep:
        """The compiled step, after the validation that came before it."""
        compiled = self._loaded()
        compiled.replicas = self._replicas_at(step)
        if step in self._validation_errors:
            compiled.record_validation(step, self._validation_errors[step])
        return compiled

    def _loaded(self) -> TrainStep:
        if self._step is None:
            raise ValueError("load a state first")
        return self._step

    def _fed(self, batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        batch = counterfactual_changes.changed_batch(batch, self._change)
        return tf.constant(batch["images"]), tf.constant(batch["labels"])


def _sound_incident(directory: Path) -> Incident:
    """An incident whose record fits its batch and its place.

    Raises:
      SnapshotDamaged: names what does not.
    """
    incident = read_incident(directory)
    record = incident.record
    try:
        rows = len(incident.batch["images"])
        sound = (
            directory.name == f"step-{incident.step:08d}"
            and len(incident.batch["labels"]) == len(incident.batch["example_ids"]) == rows
            and len(record["example_names"]) == rows
            and len(record["failed_checks"]) > 0
            and all(isinstance(Check(**check).stage, str) for check in record["failed_checks"])
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged_record(directory, repr(error)) from error
    if not sound:
        raise _damaged_record(directory, f"it does not fit step {incident.step} and its batch")
    return incident


def _damaged_record(directory: Path, what: str) -> SnapshotDamaged:
    return SnapshotDamaged(
        f"incident damaged: {directory / INCIDENT_FILE}: {what}",
        f"Restore it from a copy, or move {directory} away: the step is then replayed from "
        "the checkpoint before it",
    )


def _network(config: TrainConfig) -> Network:
    return build_network(
        config.arch,
        width=config.width,
        image_size=config.image_size,
        classes=config.classes,
    )
