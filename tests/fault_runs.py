"""Runs with a fault in them: trained until the guard stops them, on disk or as a toy run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import toy_run
import toy_step
from fault_injection import patched
from fault_sharing import ToyPool
from toy_run import ToyConfig, ToyProgram, ToyRun

from diagnostics.errors import StoppedByGuard
from diagnostics.protocol import Change, State
from vggrepro import data_source, replay_adapter, run_start, trainer
from vggrepro.config import TrainConfig
from vggrepro.dataset import Batch
from vggrepro.hooks import Hook
from vggrepro.replay_adapter import VggRun

Edit = Callable[[dict[str, np.ndarray], int], None]  # (batch, step): changes it in place


class NotStopped(Exception):
    """The guard let a run with a fault pass."""


class Damage(NamedTuple):
    """Something writes to the state from outside the step.

    Attributes:
      step: before which it does.
      overwritten: state -> the arrays that it replaces.
    """

    step: int
    overwritten: Callable[[State], State]


def toy_stopped(
    config: ToyConfig, steps: int, pool: ToyPool, damage: Damage | None = None
) -> PooledToyRun:
    """A toy run that the guard stopped.

    Raises:
      NotStopped: it did not.
    """
    run = PooledToyRun(config, pool, damage)
    run.train(steps)
    if run.stopped_at is None:
        raise NotStopped(f"{config}")
    return run


def vgg_stopped(
    config: TrainConfig, run_dir: Path, damage: Damage | None = None, resume: bool = False
) -> VggRun:
    """The run directory of a VGG run that the guard stopped.

    Raises:
      NotStopped: it did not.
    """
    hooks = [] if damage is None else [Overwriting(damage)]
    try:
        trainer.train(config, run_dir, hooks, resume=resume)
    except StoppedByGuard:
        return VggRun(run_dir)
    raise NotStopped(str(run_dir))


class PooledToyRun(ToyRun):
    """A toy run on shared compiled programs, whose state may be written to from outside."""

    def __init__(self, config: ToyConfig, pool: ToyPool, damage: Damage | None = None) -> None:
        super().__init__(config)
        self._pool, self._damage = pool, damage

    def program(self, change: Change | None = None) -> ToyProgram:
        role = "training" if self.trained is None else "replay"
        return self._pool.program(role, self.config, change)

    def _overwrite(self, step: int, program: ToyProgram) -> State:
        state = program.state()
        if self._damage is not None and step == self._damage.step:
            state |= self._damage.overwritten(state)
            program.load(state)
        return state


class Overwriting(Hook):
    """Writes to VGG's state between two steps."""

    def __init__(self, damage: Damage) -> None:
        self._damage = damage

    def on_step(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        if step == self._damage.step - 1:
            for name, array in self._damage.overwritten(state.numpy()).items():
                state._step.variables[name].assign(array)


class EditedStream:
    """A training stream whose batches are edited on their way to the step."""

    def __init__(self, stream: Any, edit: Edit) -> None:
        self._stream, self._edit = stream, edit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def batch(self, step: int) -> Batch:
        return self._edited(self._stream.batch(step), step)

    def stream(self, first_step: int) -> Iterator[Batch]:
        for step, batch in enumerate(self._stream.stream(first_step), first_step):
            yield self._edited(batch, step)

    def _edited(self, batch: Mapping[str, tf.Tensor], step: int) -> Batch:
        arrays = {name: np.array(tensor.numpy()) for name, tensor in batch.items()}
        self._edit(arrays, step)
        return {name: tf.constant(array) for name, array in arrays.items()}


@contextmanager
def edited_data(edit: Edit) -> Iterator[None]:
    """The batches of both programs, edited alike in training and in the replay."""

    def open_edited(*arguments: Any) -> data_source.DataSource:
        source = data_source.open_data(*arguments)
        return dataclasses.replace(source, training=EditedStream(source.training, edit))

    def toy_batch(config: ToyConfig, step: int) -> dict[str, np.ndarray]:
        batch = toy_step.toy_batch(config, step)
        edit(batch, step)
        return batch

    with patched(
        (run_start, "open_data", open_edited),
        (replay_adapter, "open_data", open_edited),
        (toy_run, "toy_batch", toy_batch),
    ):
        yield


def of_examples(
    ids: Sequence[int], change: Callable[[dict[str, np.ndarray], np.ndarray], None]
) -> Edit:
    """Edits the rows (bool [B]) of these examples in every batch that holds one."""

    def edit(batch: dict[str, np.ndarray], step: int) -> None:
        rows = np.isin(batch["example_ids"], ids)
        if rows.any():
            change(batch, rows)

    return edit


def inputs_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    """The inputs of a batch of either program, one row of numbers an example; a view."""
    array = batch["images"] if "images" in batch else batch["inputs"]
    return array.reshape(len(array), -1)
