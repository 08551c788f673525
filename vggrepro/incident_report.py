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
    healthy: Sequence[bool] = (),
    engine: Mapping[str, Any],
) -> StoppedByGuard:
    """Writes incidents/step-… and returns the error to raise.

    Args:
      failed: the checks that tripped, in order of execution; not empty.
      state: the state before the step. batch: as fed, with example_ids.
      metrics: the refused step's numbers.
      healthy: of a step on several replicas, whether all was finite on each.
      engine: what ran the step, as the manifest keeps it.

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
        "engine": dict(engine),
    }
    bad = [number for number, sound in enumerate(healthy) if not sound]
    workers = [one * engine["workers"] // len(healthy) for one in bad]
    if bad:
        rows = len(ids) // len(healthy)
        record["replicas"] = [
            {"replica": one, "worker": worker, "example_ids": ids[one * rows : (one + 1) * rows]}
            for one, worker in zip(bad, workers, strict=True)
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
        others += f", on {'all' if len(bad) == len(healthy) else _listed('replica', bad)} of "
        others += f"{len(healthy)} replicas"
    if bad and engine["workers"] > 1:
        others += f" ({_listed('worker', sorted(set(workers)))})"
    return StoppedByGuard(
        f"step {step}: {failed[0].describe()} is not finite{others}; nothing of this step was "
        f"written, the state before it is in {directory} ({size / 1e6:.1f} MB)",
        f"Next: vggrepro diagnose-nan {run.path}",
    )


def _listed(what: str, numbers: Sequence[int]) -> str:
    more = ", …" if len(numbers) > 3 else ""
    return f"{what} " + ", ".join(map(str, numbers[:3])) + more
