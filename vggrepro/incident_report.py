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
    stopped = _stopped_replicas(healthy, ids, engine["workers"])
    if stopped:
        record["replicas"] = stopped
    try:
        size = write_incident(directory, state=state, batch=batch, record=record)
    except InputError as error:
        raise InputError(
            f"step {step}: {failed[0].describe()} is not finite, and the incident could not be "
            f"saved: {error.message}",
            f"{error.remedy}, then train --resume {run.path} to meet the step again",
        ) from error
    others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    others += _on_replicas(stopped, len(healthy), engine["workers"])
    return StoppedByGuard(
        f"step {step}: {failed[0].describe()} is not finite{others}; nothing of this step was "
        f"written, the state before it is in {directory} ({size / 1e6:.1f} MB)",
        f"Next: vggrepro diagnose-nan {run.path}",
    )


def _stopped_replicas(
    healthy: Sequence[bool], ids: Sequence[int], workers: int
) -> list[dict[str, Any]]:
    """The replicas on which something was not finite: number, worker, examples."""
    rows = len(ids) // max(len(healthy), 1)
    return [
        {
            "replica": one,
            "worker": one * workers // len(healthy),
            "example_ids": list(ids[one * rows : (one + 1) * rows]),
        }
        for one, sound in enumerate(healthy)
        if not sound
    ]


def _on_replicas(stopped: Sequence[Mapping[str, Any]], replicas: int, workers: int) -> str:
    """Which replicas stopped the run, as part of a sentence; '' if there is only one device."""
    if not stopped:
        return ""
    every = len(stopped) == replicas
    which = "all" if every else _listed("replica", [one["replica"] for one in stopped])
    text = f", on {which} of {replicas} replicas"
    if workers > 1:
        text += f" ({_listed('worker', sorted({one['worker'] for one in stopped}))})"
    return text


def _listed(what: str, numbers: Sequence[int]) -> str:
    more = ", …" if len(numbers) > 3 else ""
    return f"{what} " + ", ".join(map(str, numbers[:3])) + more
