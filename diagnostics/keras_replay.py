"""A guarded Keras fit as the diagnosis sees it, in its own process or in a later one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diagnostics.diagnosis import FirstNonfinite
from diagnostics.errors import InputError
from diagnostics.flight_recorder import FlightRecorder
from diagnostics.incident import Incident, read_incident
from diagnostics.keras_batches import ARRAYS, batches_of
from diagnostics.keras_changes import candidates, command
from diagnostics.keras_data_changes import (
    DATA_CHANGES,
    data_command,
    fed_command,
    index_changes,
    outlier_changes,
)
from diagnostics.keras_domains import domain_changes, uncast
from diagnostics.keras_layer_changes import (
    LAYER_CHANGES,
    changes_at,
    computes_in_half_only,
    layer_changes,
    layer_command,
)
from diagnostics.keras_names import StateNames
from diagnostics.keras_program import KerasProgram, LargerBatches, SharedModel
from diagnostics.keras_rebuild import float32_twin, rebuild_model
from diagnostics.keras_run_files import KIND, describe_packages, numbered, read_json
from diagnostics.keras_sights import RUNAWAY_GRADIENT, RUNAWAY_LOSS
from diagnostics.keras_starts import changed_start
from diagnostics.protocol import (
    Batch,
    Change,
    Check,
    LayerFacts,
    RunFacts,
    State,
    Telemetry,
)
from diagnostics.snapshot import read_snapshot
from diagnostics.survival import bottomless


def open_keras_run(run_dir: Path, imports: Sequence[str] = ()) -> KerasRun:
    """A run of NumericGuard in this or another process, its model made from config.json.

    Raises:
      InputError: not such a run, the model cannot be serialised, or a custom object
        is in none of the modules `imports`; the message names it.
    """
    config = read_json(Path(run_dir) / "config.json")
    if config.get("kind") != KIND or "model" not in config:
        raise InputError(f"{run_dir} holds no step of a NumericGuard")
    return KerasRun(Path(run_dir), rebuild_model(config, imports))


class KerasRun:
    """Implements `diagnostics.protocol.ReplayableRun`.

    Args:
      run_dir: as NumericGuard wrote it.
      model: the compiled model, live or made again. Its variables are used for the
        replays; keep a copy of what must stay.
    """

    def __init__(self, run_dir: Path, model: Any) -> None:
        self.name = str(run_dir)
        self._directory = run_dir
        self._config = read_json(run_dir / "config.json")
        self.facts = _facts(self._config["facts"])
        self._shared = SharedModel(model, self._config["batch_structure"])
        incidents = numbered(run_dir / "incidents")
        self._incident: Incident | None = None
        if incidents:
            self._incident = read_incident(incidents[max(incidents)])
        self._batches = self._snapshot("batches", batches_of)
        self._start = self._snapshot("start", lambda arrays: arrays)
        self._float32: SharedModel | None = None
        self._lines: dict[str, str] = {}  # label of a change -> how a user writes it

    def _snapshot(self, name: str, use: Any) -> dict:
        directory = self._directory / name
        return use(read_snapshot(directory)[0]) if directory.is_dir() else {}

    def incident_step(self) -> int | None:
        if self._incident is None or self._incident.record.get("diverged"):
            return None
        return self._incident.step

    def recorded_failures(self) -> tuple[Check, ...]:
        if self._incident is None:
            return ()
        failed = [Check(**check) for check in self._incident.record["failed_checks"]]
        # A replay has no limits: beside what is not finite they say nothing more.
        limits = (RUNAWAY_LOSS, RUNAWAY_GRADIENT)
        return tuple(c for c in failed if c.quantity not in limits) or tuple(failed)

    def telemetry(self) -> Telemetry:
        steps, columns, rows = FlightRecorder(self._directory / "telemetry").read()
        return Telemetry(steps, tuple(columns), rows)

    def state_steps(self) -> Sequence[int]:
        steps = {0} if self._start else set()
        if self._incident is not None:
            steps.add(self._incident.step)
        return sorted(steps)

    def state_before(self, step: int) -> State:
        if self._incident is not None and step == self._incident.step:
            return self._incident.state
        if step == 0 and self._start:
            return self._start
        raise InputError(f"the state before step {step} of {self.name} was not kept")

    def start_state(self, change: Change | None = None) -> State:
        """Empty if it was too large to keep."""
        return changed_start(self._start, self.facts, change)

    def batch(self, step: int) -> Batch | None:
        if self._incident is not None and step == self._incident.step:
            return self._incident.batch
        if step in self._batches:
            return self._batches[step]
        last = self._last_known()
        if last is None or step <= last:
            return None
        # Beyond them nothing is known: they come again in turn.
        known = sorted({*self._batches, *([self._incident.step] if self._incident else [])})
        return self.batch(known[(step - last - 1) % len(known)])

    def _last_known(self) -> int | None:
        steps = [*self._batches, *([self._incident.step] if self._incident else [])]
        return max(steps, default=None)

    def example_names(self, batch: Batch) -> list[tuple[int, str]]:
        if "example_ids" in batch:
            whole = "the data" if self._fed() == ARRAYS else f"what the {self._fed()} gave an epoch"
            return [(int(i), f"row {int(i)} of {whole}") for i in batch["example_ids"]]
        rows = max((len(array) for array in batch.values() if array.ndim), default=0)
        return [(row, f"row {row} of the batch") for row in range(rows)]

    def program(self, change: Change | None = None) -> KerasProgram:
        shared = self._shared
        precision = change is not None and change.kind == "precision"
        if precision and not computes_in_half_only(shared.model):
            shared, change = self._in_float32(), None
        if change is not None and change.kind == "batch_size":
            return LargerBatches(shared, change, self.batch)
        return KerasProgram(shared, change, self.facts.learning_rate)

    def _in_float32(self) -> SharedModel:
        """A twin of the model whose layers compute and keep float32."""
        if self._float32 is None:
            twin = float32_twin(self._shared.model)
            self._float32 = SharedModel(twin, self._shared.structure)
        return self._float32

    def changes(self, step: int, suspects: Sequence[int]) -> Sequence[Change]:
        found = candidates(
            self._shared.model,
            self.facts,
            self.recorded_failures(),
            step,
            suspects,
            self.batch(step),
            self._start,
            bottomless(self.telemetry()),
        )
        found += layer_changes(
            self._shared.model, self.facts, self.telemetry(), self._start, self._half()
        )
        refused = {one.layer for one in self.recorded_failures() if one.quantity == "indices"}
        embedding = next((one for one in self.facts.layers if one.name in refused), None)
        found += index_changes(self.batch(step), embedding)
        known = [self._batches[one] for one in self._batches if one <= step]
        return [*found, *outlier_changes([*known, self.batch(step) or {}])]

    def formula_changes(self, place: FirstNonfinite) -> Sequence[Change]:
        """Implements `diagnostics.protocol.RepairsFormulas`."""
        half = self._half() or place.dtype == "float16"
        found = domain_changes(place, half)
        if half and not self._half():
            found = [uncast(place), *found]
        self._lines.update({one.label: one.line for one in found})
        changes = changes_at(self._shared.model, place, self._start, half)
        return [
            *changes,
            *(Change("domain", one.value, one.label, rank=i) for i, one in enumerate(found, 1)),
        ]

    def _fed(self) -> str:
        return ARRAYS if self._incident is None else self._incident.record.get("fed", ARRAYS)

    def _half(self) -> bool:
        return self.facts.precision != "float32"

    def command(self, change: Change) -> str:
        if change.label in self._lines:
            return self._lines[change.label]
        if change.kind in LAYER_CHANGES:
            return layer_command(change, self._start)
        if change.kind in DATA_CHANGES:
            structure, rows = self._config["batch_structure"], self.facts.batch_size or 1
            return fed_command(change, self._fed(), rows) or data_command(change, structure)
        return command(self._shared.model, self.facts, change)

    def environment(self) -> Mapping[str, Any]:
        return read_json(self._directory / "manifest.json").get("environment", {})

    def conditions(self) -> Sequence[str]:
        found = []
        recorded = self.environment().get("packages", {})
        for name, version in describe_packages()["packages"].items():
            if recorded.get(name, version) != version:
                found.append(f"{name} is {version} now, the run was recorded with {recorded[name]}")
        if self._last_known() is not None:
            found.append(f"after step {self._last_known()} replays are fed the kept batches again")
        return found

    def live_state(self) -> State:
        """What the model holds now."""
        return StateNames(self._shared.model).arrays()

    def put_back(self, state: State) -> None:
        """Writes such a state again."""
        StateNames(self._shared.model).load(state)


def _facts(stored: Mapping[str, Any]) -> RunFacts:
    layers = tuple(LayerFacts(**layer) for layer in stored["layers"])
    numbers = {n: float(v) for n, v in stored.items() if v in ("Infinity", "-Infinity", "NaN")}
    return RunFacts(**{**stored, **numbers, "layers": layers})
