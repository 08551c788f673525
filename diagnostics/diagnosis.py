"""The result of a diagnosis: plain data, the schema of diagnosis.json (version 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1
VERDICTS = ("reproduced", "not_reproduced", "replay_differs", "diverged", "stalled")
CAUSE_KINDS = (
    "data",
    "labels",
    "init",
    "learning_rate",
    "loss_formula",
    "precision",
    "optimizer",
    "architecture",
    "weights",
    "hardware",
    "unknown",
)


@dataclass(frozen=True)
class InputRange:
    """What went into the op at fault: shape, finite minimum and maximum, non-finite count."""

    name: str
    shape: tuple[int, ...]
    minimum: float
    maximum: float
    nonfinite: int


@dataclass(frozen=True)
class FirstNonfinite:
    """The first non-finite value in order of execution.

    Attributes:
      stage: data, forward, loss, backward, update or weights.
      layer, op: names; None where there is none.
      source: 'file.py:123 in function: code' of the user's code, or None.
      kind: 'nan' or 'inf'. count of size elements are not finite.
      examples: dataset ids of the rows at fault; all rows at fault means the
        data is innocent, and then it is empty.
      example_names: their files or names.
      inputs: ranges of the op's inputs.
      seen_in: 'compiled step' or 'op-by-op replay': which of the two showed it.
      dtype: of the op's output, as 'float16'; None where it is not known.
    """

    stage: str
    layer: str | None
    op: str | None
    source: str | None
    kind: str
    count: int
    size: int
    examples: tuple[int, ...] = ()
    example_names: tuple[str, ...] = ()
    inputs: tuple[InputRange, ...] = ()
    seen_in: str = "compiled step"
    dtype: str | None = None


@dataclass(frozen=True)
class Onset:
    """Where the trouble began.

    Attributes:
      step, layer: since when and where headroom was being lost.
      quantity: the telemetry column's kind, as 'preactivation_absmax'.
      value: it had at that step. growth_per_step: factor a step from there on.
    """

    step: int
    layer: str | None
    quantity: str
    value: float
    growth_per_step: float


@dataclass(frozen=True)
class Cause:
    """kind: one of CAUSE_KINDS; evidence: sentences in a user's words, strongest first."""

    kind: str
    confidence: float
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Counterfactual:
    """One replay with one change.

    Attributes:
      change: the label. kind, value: of the Change.
      survived: ran all its steps, finite, and the loss did not run away.
      steps: steps it ran; first_step: where it began.
      loss: the last one. minimal: the smallest change that survived.
      note: why it ended, or what limits it ('captured batch only').
    """

    change: str
    kind: str
    value: Any
    survived: bool
    steps: int
    first_step: int
    loss: float | None
    minimal: bool = False
    note: str = ""


@dataclass(frozen=True)
class Recommendation:
    """verified: this very command (or code) was replayed and survived."""

    command: str
    verified: bool
    sentence: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything found out about one failing, diverging or stalling run."""

    run_dir: str
    step: int
    verdict: str
    first_nonfinite: FirstNonfinite | None
    onset: Onset | None
    cause: Cause
    counterfactuals: tuple[Counterfactual, ...] = ()
    recommendation: Recommendation | None = None
    notes: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The object of diagnosis.json."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}
