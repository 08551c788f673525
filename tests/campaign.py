"""The fault campaign: trains faults into incidents, diagnoses them, and judges what was said."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from clean_runs import CleanRun
from fault_injection import KINDS, MARK, Injection, Injector, toy_patches, vgg_patches
from fault_runs import (
    Damage,
    Edit,
    NotStopped,
    edited_data,
    inputs_of,
    of_examples,
    toy_stopped,
    vgg_stopped,
)
from fault_sharing import ToyPool, shared_steps
from fault_verdicts import (
    NOTHING,
    Outcome,
    complaints_of_cause,
    complaints_of_place,
    false_claims,
    train_toy,
)
from faults import BATCH, InjectedFault
from natural_faults import NaturalFault
from small_runs import tiny_config
from toy_run import ToyConfig, ToyRun, toy_batch

from diagnostics.diagnose import diagnose
from diagnostics.errors import NothingToDiagnose, StoppedByGuard
from diagnostics.protocol import ReplayableRun, State
from vggrepro import trainer
from vggrepro.config import TrainConfig
from vggrepro.config_options import add_config_options, given_values
from vggrepro.data_source import open_data
from vggrepro.replay_adapter import VggRun
from vggrepro.run_directory import RunDirectory

BUDGET = 600.0  # seconds; far more than a matrix takes, so that a busy machine drops nothing
_BAD = dict(zip(KINDS, (np.nan, np.inf, -np.inf), strict=True))


class Campaign:
    """Runs one thing after another; compiled programs are shared where they are alike.

    Args:
      directory: for run directories. data: VGG's images.
    """

    def __init__(self, directory: Path, data: Path) -> None:
        self._directory, self._data = directory, data
        self._runs = 0

    def injected(self, faults: Iterable[InjectedFault]) -> Iterator[Outcome]:
        """Each fault located, without counterfactuals."""
        injector, pool = Injector(), ToyPool()
        with toy_patches(injector), vgg_patches(injector), shared_steps():
            for fault in faults:
                started = time.monotonic()
                said, cause, wrong = self._one_injected(fault, injector, pool)
                seconds = time.monotonic() - started
                yield Outcome(fault.name, fault.injection.stage, said, cause, tuple(wrong), seconds)

    def natural(self, faults: Iterable[NaturalFault]) -> Iterator[Outcome]:
        """Each fault diagnosed in full; a command that is called verified is tried."""
        pool = ToyPool()
        with shared_steps():
            for fault in faults:
                started = time.monotonic()
                steps = shared_steps() if fault.compiled else nullcontext()
                with fault.program(), steps:
                    said, wrong = self._one_natural(fault, ToyPool() if fault.compiled else pool)
                seconds = time.monotonic() - started
                yield Outcome(fault.name, fault.cause, said, said, tuple(wrong), seconds)

    def clean(self, runs: Iterable[CleanRun]) -> Iterator[Outcome]:
        """Each run must come to its end, and there must be nothing to say of it."""
        for one in runs:
            started = time.monotonic()
            said, wrong = self._one_clean(one)
            yield Outcome(one.name, "healthy", said, "", tuple(wrong), time.monotonic() - started)

    def _one_injected(
        self, fault: InjectedFault, injector: Injector, pool: ToyPool
    ) -> tuple[str, str, list[str]]:
        """(stage that was named, cause that was named, complaints)."""
        ids = self._example_ids(fault)
        injector.arm(fault.injection, BATCH)
        try:
            with edited_data(_bad_examples(fault.injection, ids)):
                found = diagnose(self._stopped(fault, pool), budget_seconds=0)
        except NotStopped:
            return NOTHING, "", ["the guard did not trip"]
        finally:
            injector.disarm()
        first = found.first_nonfinite
        said = NOTHING if first is None else first.stage
        return said, found.cause.kind, complaints_of_place(fault, ids, found)

    def _one_natural(self, fault: NaturalFault, pool: ToyPool) -> tuple[str, list[str]]:
        """(cause that was named, complaints)."""
        try:
            run = fault.stopped(self._new_directory(), self._data, pool)
        except NotStopped:
            return NOTHING, ["the guard did not trip"]
        try:
            found = diagnose(run, budget_seconds=BUDGET)
        except NothingToDiagnose as error:
            return NOTHING, [str(error)]
        toy = isinstance(run, ToyRun)
        train = partial(train_toy if toy else self._train_vgg, run)
        wrong = complaints_of_cause(fault, found) + false_claims(run, found, train)
        return found.cause.kind, wrong

    def _one_clean(self, one: CleanRun) -> tuple[str, list[str]]:
        """(verdict, complaints)."""
        try:
            run, warnings = one.finished(self._new_directory(), self._data)
        except StoppedByGuard as error:
            return "stopped", [f"stopped: {error}"]
        wrong = [f"warned: {text}" for text in warnings]
        try:
            found = diagnose(run, budget_seconds=0)
        except NothingToDiagnose:
            return "healthy", wrong
        return found.verdict, [*wrong, f"called {found.verdict}: {'; '.join(found.notes)}"]

    def _train_vgg(self, run: VggRun, command: str | None, steps: int) -> float | None:
        """See `fault_verdicts.Training`; the command is run as it stands."""
        config = run.config if command is None else _read_command(command)
        run_dir = self._new_directory()
        try:
            trainer.train(dataclasses.replace(config, steps=steps), run_dir)
        except StoppedByGuard:
            return None
        with RunDirectory.open(run_dir) as trained:
            return [record["loss"] for record in trained.metrics() if "loss" in record][-1]

    def _stopped(self, fault: InjectedFault, pool: ToyPool) -> ReplayableRun:
        one = fault.injection
        damage = Damage(one.step, _overwriting(one)) if one.stage == "weights" else None
        if fault.program == "toy":
            return toy_stopped(ToyConfig(precision=fault.precision), one.step + 2, pool, damage)
        return vgg_stopped(self._vgg_config(fault), self._new_directory(), damage)

    def _example_ids(self, fault: InjectedFault) -> list[int]:
        """Of the batch of the fault's step, row by row."""
        step = fault.injection.step
        if fault.program == "toy":
            return toy_batch(ToyConfig(), step)["example_ids"].tolist()
        source = open_data(self._vgg_config(fault), lambda text: None)
        return source.training.example_ids(step)

    def _vgg_config(self, fault: InjectedFault) -> TrainConfig:
        return tiny_config(
            self._data,
            classes=0,
            precision=fault.precision,
            steps=fault.injection.step + 2,
            warmup_steps=0,
            eval_every=0,
            checkpoint_every=100,
        )

    def _new_directory(self) -> Path:
        self._runs += 1
        return self._directory / f"run-{self._runs}"


def _read_command(command: str) -> TrainConfig:
    program, verb, *words = shlex.split(command)
    assert (program, verb) == ("vggrepro", "train")
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    return TrainConfig(**given_values(parser.parse_args(words)))


def _bad_examples(one: Injection, example_ids: list[int]) -> Edit:
    """Writes bad numbers, or the mark, into the examples of an injection's rows."""

    def write(batch: dict[str, np.ndarray], rows: np.ndarray) -> None:
        numbers = inputs_of(batch)
        if one.marked:
            numbers[rows, 0] = MARK
        elif one.stage == "data":
            numbers[rows, : one.units] = _BAD[one.kind]

    return of_examples([example_ids[row] for row in one.rows], write)


def _overwriting(one: Injection) -> Callable[[State], State]:
    def overwritten(state: State) -> State:
        name = f"{one.group}/{one.layer}/kernel"
        array = state[name].copy()
        array.reshape(-1)[: one.units] = _BAD[one.kind]
        return {name: array}

    return overwritten
