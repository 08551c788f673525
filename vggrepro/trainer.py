"""The training loop: steps, validations, checkpoints, hooks, and the stop on NaN."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from diagnostics.divergence import DivergenceWatch
from diagnostics.errors import StoppedByGuard
from diagnostics.guard import StepResult
from diagnostics.guard_self_test import self_test
from diagnostics.snapshot import hash_arrays
from diagnostics.stall import StallWatch
from vggrepro import accelerator
from vggrepro.accelerator import Engine
from vggrepro.config import TrainConfig
from vggrepro.engine_record import with_engine
from vggrepro.hooks import Announcer, Hook
from vggrepro.incident_report import save_incident
from vggrepro.keras_export import save_weights
from vggrepro.run_facts import run_facts
from vggrepro.run_start import RunStart, look_on, make_run, open_run
from vggrepro.step_metrics import StepMetrics
from vggrepro.step_state import State
from vggrepro.stop_request import StopRequest
from vggrepro.training_step import evaluator, training_step
from vggrepro.workers import LOST_ERRORS

WEIGHTS_FILE = "final.weights.h5"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      status: 'finished' or 'interrupted'.
      steps: completed steps.
      metrics: of the last validation; empty if there was none.
    """

    run_dir: Path
    status: str
    steps: int
    metrics: dict[str, float]


def train(
    config: TrainConfig,
    run_dir: Path,
    hooks: Sequence[Hook] = (),
    resume: bool = False,
    strict: bool = False,
    recipe_name: str = "",
    engine: Engine | None = None,
) -> TrainResult:
    """Trains from step 0, or goes on from the last valid checkpoint.

    Ctrl-C and SIGTERM end it after the current step with the state saved.

    Args:
      config: `classes` 0 takes the number of classes of the data.
      run_dir: must be new, or with `resume` an existing run.
      strict: refuse to start where the forecast says that the initialiser makes
        signal or gradient explode or vanish; without it that is a warning.
      recipe_name: the recipe that the configuration came from; the manifest tags fields
        that are not the recipe's as deviations.
      engine: of `accelerator.start`, which it else calls.

    Raises:
      InputError: bad configuration or data, a run that cannot be resumed.
      GuardFailure: the guard's self-test did not fire.
      StoppedByGuard: a value was not finite; the incident is saved.
    """
    engine = engine or accelerator.start(config)
    hooks = [hook for hook in hooks if engine.workers.is_chief or not hook.chief_only]
    announce = Announcer(hooks)
    with ExitStack() as stack:
        stack.enter_context(engine.workers.together())
        if not engine.workers.is_chief:
            begun = look_on(config, run_dir, announce, engine)
        elif resume:
            begun = open_run(config, run_dir, announce, engine, stack)
        else:
            begun = make_run(config, run_dir, announce, engine, stack, strict, recipe_name)
        engine.workers.must_agree("configuration or data", begun.fingerprint())
        stack.enter_context(tf.device(engine.device))
        return _Session(begun, announce, engine).train()


class _Session:
    """One process's share of a run, from its first step to its end."""

    def __init__(self, begun: RunStart, announce: Announcer, engine: Engine) -> None:
        config, network = begun.config, begun.network
        self._config, self._network, self._data = config, network, begun.data
        self._run, self._announce, self._engine = begun.run, announce, engine
        self._workers = engine.workers
        self._step = training_step(config, network, begun.state, engine)
        self._now = int(self._step.variables["counters/step"].numpy())
        self._metrics = StepMetrics(self._step.layout, config.batch_size, config.precision)
        self._divergence = DivergenceWatch()
        self._stall = StallWatch(run_facts(config, network))
        self._evaluator = evaluator(self._step)
        self._last_evaluation: dict[str, float] = {}

    def train(self) -> TrainResult:
        """Runs to the last step, or to the first stop request."""
        run = self._run
        run.truncate_metrics(self._now)
        run.telemetry.start(self._step.layout.columns(), self._now)
        if self._now == 0:
            run.update_manifest(initial_weights_sha256=self._weights_hash())
        engines = with_engine(run.manifest(), self._now, self._engine.record())
        run.update_manifest(status="running", steps=self._now, engines=engines)
        try:
            with StopRequest() as stop:
                self._start()
                finished = self._loop(stop)
        except StoppedByGuard:
            run.update_manifest(status="stopped_by_guard", steps=self._now)
            raise
        except BaseException:
            run.update_manifest(status="failed", steps=self._now)
            raise
        if self._now not in run.checkpoints():
            self._save_checkpoint()
        result = TrainResult(
            run.path, "finished" if finished else "interrupted", self._now, self._last_evaluation
        )
        if self._workers.is_chief:
            self._close(result)
        self._workers.part()
        for hook in self._announce.hooks:
            hook.on_end(result)
        return result

    def _start(self) -> None:
        """Proves that the guard fires, then tells the hooks that training begins."""
        batch = self._data.training_batch(self._now)
        fired = self_test(self._step, batch["images"], batch["labels"])
        info = {
            "parameter_count": self._network.parameter_count(),
            "train_images": len(self._data.training.index),
            "val_images": len(self._data.validation.index),
            "classes": self._config.classes,
            "device": self._engine.description,
            "guard_checks": fired,
            "sample_images": batch["images"].numpy() + np.array(self._data.mean_rgb, np.float32),
        }
        self._metrics.start_clock()
        for hook in self._announce.hooks:
            hook.on_start(self._run, self._config, self._now, info)

    def _loop(self, stop: StopRequest) -> bool:
        """True when the last step is done, False when told to stop before."""
        config = self._config
        batches = self._step.ahead(self._data.training.stream(self._now))
        while True:
            if not self._evaluate_if_due(stop):
                return False
            if self._now % config.checkpoint_every == 0 and self._now > 0:
                self._save_checkpoint()
            if self._now == config.steps:
                return True
            if self._workers.any(stop.raised):
                return False
            self._host_loop(batches)

    def _host_loop(self, batches: Iterator[Mapping[str, tf.Tensor]]) -> None:
        """As many steps as one call takes, and what the host does after each."""
        started = time.perf_counter()
        chunk = [self._next(batches) for _ in range(self._steps_of_loop())]
        waited = time.perf_counter() - started
        results = self._step.loop([(batch["images"], batch["labels"]) for batch in chunk])
        self._metrics.after_loop(len(chunk), waited)
        for batch, result in zip(chunk, results, strict=True):
            self._after_step(batch, result)

    def _steps_of_loop(self) -> int:
        """Up to the next validation, checkpoint or end, where the host needs the state."""
        config = self._config
        periods = [period for period in (config.eval_every, config.checkpoint_every) if period]
        due = [period - self._now % period for period in periods]
        return min(config.steps_per_loop, config.steps - self._now, *due)

    def _after_step(self, batch: Mapping[str, tf.Tensor], result: StepResult) -> None:
        self._run.telemetry.append(self._now, result.telemetry)
        metrics = self._metrics.of_step(result.telemetry)
        if not result.applied:
            self._stop_at(result, batch, metrics)
        self._run.append_metrics({"step": self._now, **self._metrics.brief(metrics)})
        for hook in self._announce.hooks:
            hook.on_step(self._now, self, metrics)
        warnings = self._divergence.warnings(self._now, metrics["loss"], metrics["grad_norm"])
        for text in (*warnings, self._stall.warning(self._now, metrics)):
            if text is not None:
                self._announce.warning(text)
        self._now += 1

    def numpy(self) -> State:
        """The state as named arrays (hooks call this)."""
        return self._step.state()

    def _next(self, batches: Iterator[Mapping[str, tf.Tensor]]) -> Mapping[str, tf.Tensor]:
        try:
            return next(batches)
        except tf.errors.OpError as error:
            raise self._data.explain(self._now, error) from error

    def _stop_at(
        self, result: StepResult, batch: Mapping[str, tf.Tensor], metrics: Mapping[str, Any]
    ) -> None:
        self._run.telemetry.flush()
        # Each worker's rows as they were fed, one after the other.
        whole = {
            name: np.concatenate(self._workers.gather(tensor.numpy()))
            for name, tensor in batch.items()
        }
        self._workers.part()
        failed = [
            check
            for check, passed in zip(self._step.layout.checks(), result.passed, strict=True)
            if not passed
        ]
        if not self._workers.is_chief:
            raise StoppedByGuard(
                f"step {self._now}: {failed[0].describe()} is not finite, on one worker or more; "
                "nothing of this step was written",
                "The chief keeps the incident",
            )
        raise save_incident(
            self._run,
            step=self._now,
            failed=failed,
            state=self._step.state(),
            batch=whole,
            name_of=self._data.training.name_of,
            metrics=metrics,
            config=self._config,
            healthy=result.healthy,
            engine=self._engine.record(),
        )

    def _evaluate_if_due(self, stop: StopRequest) -> bool:
        """Validates where the schedule or the end asks for it; False if told to stop."""
        config, now = self._config, self._now
        scheduled = now > 0 and config.eval_every > 0 and now % config.eval_every == 0
        evaluated_at = self._step.evaluated_at()
        if scheduled and evaluated_at == now:
            self._last_evaluation = self._recorded_evaluation()
            return True
        if not scheduled and now != config.steps:
            return True
        try:
            metrics = self._evaluator.evaluate(
                self._data.validation, lambda: stop.raised, self._workers
            )
        except tf.errors.OpError as error:
            if self._workers.count > 1 and isinstance(error, LOST_ERRORS):
                raise
            raise self._data.explain_validation(error) from error
        if metrics is None:
            return False
        if scheduled:
            self._step.record_validation(now, metrics["val_top1_error"])
        self._last_evaluation = metrics
        self._record_evaluation(metrics)
        return True

    def _record_evaluation(self, metrics: dict[str, float]) -> None:
        """Writes a validation after `now` steps under the step before it, once."""
        if self._recorded_evaluation() != metrics:
            self._run.append_metrics({"step": self._now - 1, **metrics})
        for hook in self._announce.hooks:
            hook.on_evaluation(self._now, metrics)

    def _recorded_evaluation(self) -> dict[str, float]:
        """What metrics.jsonl says of the validation after `now` steps; {} if nothing."""
        last = self._run.metrics()[-1:]
        if last and last[0]["step"] == self._now - 1 and "val_loss" in last[0]:
            return {name: value for name, value in last[0].items() if name != "step"}
        return {}

    def _save_checkpoint(self) -> None:
        self._run.save_checkpoint(self._now, self._step.state(), self._config.keep_checkpoints)
        for hook in self._announce.hooks:
            hook.on_checkpoint(self._now)

    def _weights_hash(self) -> str:
        return hash_arrays(self._step.parameters())

    def _close(self, result: TrainResult) -> None:
        """Leaves the manifest of a finished or interrupted run, and its weights."""
        final: dict[str, Any] = {"status": result.status, "steps": self._now}
        if result.status == "finished":
            parameters = self._step.parameters()
            save_weights(self._network, parameters, self._run.path / WEIGHTS_FILE)
            final |= {
                "final_weights_sha256": hash_arrays(parameters),
                "final_metrics": result.metrics,
            }
        self._run.update_manifest(**final)
