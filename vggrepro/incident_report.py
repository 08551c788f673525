"""Saves the incident of a refused step and words the message that ends the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diagnostics.errors import InputError, StoppedByGuard
from diagnostics.incident import write_incident
from diagnostics.protocol import Check
from vggrepro.config import TrainConfig
from vggrepro.environment import describe_environment
from vggrepro.run_directory import RunDirectory


def save_incident(
    run: RunDirectory,
    *,
    step: int,
    failed: Sequence[Check],
    state: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    name_of: Callable[[int], str],
    metrics: Mapping[str, Any],
    config: TrainConfig,
    replicas: Sequence[bool] = (),
) -> StoppedByGuard:
    """Writes incidents/step-… and returns the error to raise.

    Args:
      failed: the checks that tripped, in order of execution; not empty.
      state: the state before the step. batch: as fed, with example_ids.
      metrics: the refused step's numbers.
      replicas: of a step on several devices, whether all was finite on each.

    Raises:
      InputError: the disk is full; nothing half-written is left.
    """
    ids = [int(example) for example in batch["example_ids"]]
    directory = run.incident_directory(step)
    record = {
        "step": step,
        "failed_checks": [check._asdict() for check in failed],
        "example_ids": ids,
        "example_names": [name_of(example) for example in ids],
        "seeds": {"run": config.seed, "step": step},
        "config": config.to_dict(),
        "metrics": dict(metrics),
        "environment": describe_environment(),
    }
    bad = [number for number, healthy in enumerate(replicas) if not healthy]
    if bad:
        rows = len(ids) // len(replicas)
        record["replicas"] = [
            {"replica": one, "example_ids": ids[one * rows : (one + 1) * rows]} for one in bad
        ]
    try:
        size = write_incident(directory, state=state, batch=batch, record=record)
    except InputError as error:
        raise InputError(
            f"step {step}: {failed[0].describe()} is not finite, and the incident could not be "
            f"saved: {error.message}",
            f"{error.remedy}, then train --resume {run.path} to meet the step again",
        ) from error
    others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    if bad:
        others += f", on {'all' if len(bad) == len(replicas) else _listed(bad)} of "
        others += f"{len(replicas)} replicas"
    return StoppedByGuard(
        f"step {step}: {failed[0].describe()} is not finite{others}; nothing of this step was "
        f"written, the state before it is in {directory} ({size / 1e6:.1f} MB)",
        f"Next: vggrepro diagnose-nan {run.path}",
    )


def _listed(numbers: Sequence[int]) -> str:
    more = ", …" if len(numbers) > 3 else ""
    return "replica " + ", ".join(map(str, numbers[:3])) + more
