"""What a judge is shown: everything measured about one failing run, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from diagnostics.diagnosis import Counterfactual, FirstNonfinite, Onset
from diagnostics.protocol import RunFacts, StepOutcome, Telemetry
from diagnostics.tensor_stats import TensorStats


@dataclass(frozen=True)
class Evidence:
    """Numbers and facts of one failing step; the judge reads nothing else.

    Attributes:
      verdict: as in `diagnosis.VERDICTS`.
      step: the failing step; of a diverged or stalled run the last recorded one.
      outcome: what the replayed step showed.
      weight_stats: every state array before the failing step, by its name.
      initial_weight_stats: the same at step 0; may be empty.
      batch_stats: every array of the failing step's batch.
      label_range: smallest and largest label; None if there are none.
      counterfactuals: empty before any was run.
    """

    facts: RunFacts
    verdict: str
    step: int
    first_nonfinite: FirstNonfinite | None
    onset: Onset | None
    telemetry: Telemetry
    outcome: StepOutcome | None
    weight_stats: Mapping[str, TensorStats]
    initial_weight_stats: Mapping[str, TensorStats]
    batch_stats: Mapping[str, TensorStats]
    label_range: tuple[float, float] | None
    counterfactuals: tuple[Counterfactual, ...] = ()

    def tried(self, kind: str) -> tuple[Counterfactual, ...]:
        """The counterfactuals of one kind of change."""
        return tuple(one for one in self.counterfactuals if one.kind == kind)

    def survivors(self, kind: str) -> tuple[Counterfactual, ...]:
        """Those of them that survived."""
        return tuple(one for one in self.tried(kind) if one.survived)


class Finding(NamedTuple):
    """One observation that speaks for (weight > 0) or against a cause.

    Attributes:
      weight: log-odds in nats, roughly: 1 a hint, 2.5 strong, 5 nearly conclusive.
      sentence: for the user, with numbers; may be empty.
      place: where it stands among the sentences, if not by its weight.
    """

    kind: str
    weight: float
    sentence: str = ""
    place: float | None = None
