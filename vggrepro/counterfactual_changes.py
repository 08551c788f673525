"""What can be done differently in a VGG run, and how each change is applied."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from diagnostics.errors import InputError
from diagnostics.protocol import Batch, Change, RunFacts, State
from vggrepro.config import TrainConfig

# The field of the configuration that a kind of change sets.
_FIELDS = {
    "init": "init",
    "learning_rate": "lr",
    "warmup": "warmup_steps",
    "clip_norm": "clip_norm",
    "precision": "precision",
}
PAPER_INIT = "normal:0.01"
_PIXEL_SPREAD = 58.0  # grey levels; about the standard deviation of natural images


def candidates(
    config: TrainConfig, facts: RunFacts, step: int, suspects: Sequence[int]
) -> list[Change]:
    """Changes worth a replay, those nearest to the intended run first.

    Args:
      step: the failing step; a warm-up must outlast it.
      suspects: dataset ids of examples that may be at fault.
    """
    found: list[Change] = []
    if suspects:
        names = ", ".join(map(str, suspects[:4])) + ("…" if len(suspects) > 4 else "")
        found.append(
            Change("without_examples", tuple(suspects), f"without example {names}", rank=0)
        )
    for rank, init in ((1, PAPER_INIT), (2, "glorot-uniform"), (3, "he-normal")):
        if init != config.init:
            found.append(Change("init", init, f"init {init}", from_start=True, rank=rank))
    found.append(Change("init_scale", 0.5, "initial kernels times 0.5", from_start=True, rank=6))
    for divisor in (10, 100, 1000):
        rate = float(f"{config.lr / divisor:.3g}")
        found.append(Change("learning_rate", rate, f"learning rate {rate:g}", rank=3))
    warmup = max(20, 4 * (step + 1))
    if config.warmup_steps < warmup:
        found.append(Change("warmup", warmup, f"{warmup} steps of warm-up", rank=2))
    for norm in (10.0, 1.0):
        if config.clip_norm == 0 or config.clip_norm > norm:
            found.append(Change("clip_norm", norm, f"gradient norm clipped to {norm:g}", rank=3))
    for precision in ("float32", "bfloat16"):
        if precision != config.precision:
            found.append(Change("precision", precision, f"precision {precision}", rank=4))
    factor = 1.0 / _PIXEL_SPREAD
    found.append(Change("input_scale", factor, "pixels divided by 58", rank=5))
    return found


def has_option(change: Change) -> bool:
    """Whether an option of `vggrepro train` makes this change."""
    return change.kind in _FIELDS


def changed_config(config: TrainConfig, change: Change | None) -> TrainConfig:
    """The configuration with the change, where it is one of the configuration."""
    if change is None or change.kind not in _FIELDS:
        return config
    return dataclasses.replace(config, **{_FIELDS[change.kind]: change.value})


def scaled_kernels(state: State, change: Change | None) -> State:
    """Step 0's state with the kernels scaled, where the change asks for that."""
    if change is None or change.kind != "init_scale":
        return state
    factor = np.float32(change.value)
    return {
        name: array * factor if name.startswith("params/") and name.endswith("/kernel") else array
        for name, array in state.items()
    }


def changed_batch(batch: Batch, change: Change | None) -> Batch:
    """The batch with the change, where it is one of the data.

    Raises:
      InputError: every example of the batch is suspect.
    """
    if change is None:
        return batch
    if change.kind == "input_scale":
        return {**batch, "images": batch["images"] * np.float32(change.value)}
    if change.kind == "without_examples":
        return _without(batch, change.value)
    return batch


def _without(batch: Batch, suspects: Sequence[int]) -> Batch:
    """Suspect rows become copies of the first innocent row."""
    bad = np.isin(batch["example_ids"], np.array(suspects))
    if bad.all():
        raise InputError("every example of the batch is suspect", "Look at the data itself")
    rows = np.where(bad, np.flatnonzero(~bad)[0], np.arange(len(bad)))
    return {name: array[rows] for name, array in batch.items()}
