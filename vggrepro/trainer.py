"""The training loop: steps, validations, checkpoints, hooks, and the stop on NaN."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from diagnostics.divergence import DivergenceWatch
from diagnostics.errors import InputError, StoppedByGuard
from diagnostics.forecast import Forecast
from diagnostics.guard import StepResult
from diagnostics.guard_self_test import self_test
from diagnostics.snapshot import hash_arrays
from diagnostics.stall import StallWatch
from vggrepro import accelerator, inheritance
from vggrepro.config import TrainConfig
from vggrepro.data_source import DataSource, open_data
from vggrepro.environment import describe_environment
from vggrepro.forecast_vgg import check_before_training, image_scales, measured_forecast
from vggrepro.hooks import Announcer, Hook
from vggrepro.incident_report import save_incident
from vggrepro.init_notes import init_note
from vggrepro.keras_export import save_weights
from vggrepro.model import Network, build_network
from vggrepro.recipes import override_line, recipe_entries
from vggrepro.run_directory import RunDirectory, check_free
from vggrepro.run_facts import run_facts
from vggrepro.step_metrics import StepMetrics
from vggrepro.step_state import State, initial_state
from vggrepro.stop_request import StopRequest
from vggrepro.training_step import evaluator, training_step

WEIGHTS_FILE = "final.weights.h5"
_MANIFEST_SCHEMA = 1
_FORECAST_IMAGES = 8  # of the batch that is run through inherited weights


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

    Raises:
      InputError: bad configuration or data, a run that cannot be resumed.
      GuardFailure: the guard's self-test did not fire.
      StoppedByGuard: a value was not finite; the incident is saved.
    """
    device = accelerator.prepare(config)
    announce = Announcer(hooks)
    if not resume:
        # Both before the minutes that a large data set's statistics take.
        check_free(run_dir)
        source = inheritance.source_of(config, announce.warning)
    with ExitStack() as stack:
        if resume:
            run = stack.enter_context(RunDirectory.open(run_dir, True, announce.warning))
            data = open_data(config, announce.info, run.manifest()["data"])
        else:
            data = open_data(config, announce.info)
        classes = len(data.class_names)
        config = dataclasses.replace(config, classes=classes)
        network = build_network(
            config.arch, width=config.width, image_size=config.image_size, classes=classes
        )
        if not resume:
            inherited = inheritance.inherit(config, network, source)
            for line in inherited.lines():
                announce.info(line)
            forecast = _forecast(config, network, data, announce, strict, inherited.parameters)
            manifest = _first_manifest(config, network, data, device, forecast)
            manifest["inheritance"] = inherited.record
            manifest |= recipe_entries(config, recipe_name, data.record["train_images"])
            if recipe_name:
                announce.info(override_line(**manifest["recipe"]))
            run = stack.enter_context(
                RunDirectory.create(run_dir, config.to_dict(), manifest, announce.warning)
            )
            inherited.keep(run.path)
        stack.enter_context(tf.device(accelerator.device_name(config)))
        return _Session(config, network, data, run, announce, device).train()


def _forecast(
    config: TrainConfig,
    network: Network,
    data: DataSource,
    announce: Announcer,
    strict: bool,
    inherited: State,
) -> Forecast:
    """Says what the initial weights will do on the first batch.

    Drawn ones by formulas; inherited ones are run on a few images.

    Raises:
      InputError: `strict`, and signal or gradient explodes or vanishes.
    """
    batch = data.training_batch(0)
    images = batch["images"].numpy()
    forecast = check_before_training(config, network, *image_scales(images))
    if inherited:
        few = images[:_FORECAST_IMAGES], batch["labels"].numpy()[:_FORECAST_IMAGES]
        found = measured_forecast(network, config.init, config.seed, *few, inherited)
        forecast = dataclasses.replace(found, init=f"{config.init} with inherited layers")
    if forecast.verdict == "fine":
        announce.info(forecast.line())
        return forecast
    note = init_note(config.init) or ""
    if strict:
        raise InputError(
            forecast.line(), f"{note} Choose another --init, or leave out --strict".strip()
        )
    announce.warning(f"{forecast.line()}. {note}".strip())
    return forecast


def _first_manifest(
    config: TrainConfig, network: Network, data: DataSource, device: str, forecast: Forecast
) -> dict[str, Any]:
    """manifest.json before step 0."""
    return {
        "schema": _MANIFEST_SCHEMA,
        "status": "running",
        "steps": 0,
        "parameter_count": network.parameter_count(),
        "data": data.record,
        "forecast": {"verdict": forecast.verdict, "reason": forecast.reason},
        "seeds": {"run": config.seed},
        "parent_run": config.init_from or None,
        "environment": describe_environment([device]),
        "final_weights_sha256": None,
        "final_metrics": None,
    }


class _Session:
    """One process's share of a run, from its first step to its end."""

    def __init__(
        self,
        config: TrainConfig,
        network: Network,
        data: DataSource,
        run: RunDirectory,
        announce: Announcer,
        device: str,
    ) -> None:
        self._config, self._network, self._data = config, network, data
        self._run, self._announce, self._device = run, announce, device
        checkpoint = run.latest_checkpoint()
        if checkpoint is not None and checkpoint[0] > config.steps:
            raise InputError(
                f"{run.path} has done {checkpoint[0]} steps already, more than {config.steps}",
                "Give a larger --steps",
            )
        if checkpoint is not None:
            state = checkpoint[1]
        else:
            inherited = inheritance.kept_parameters(run.path, config)
            state = initial_state(config, network, inherited)
        self._step = training_step(config, network, state)
        self._now = checkpoint[0] if checkpoint else 0
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
        run.update_manifest(status="running", steps=self._now)
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
        self._close(result)
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
            "device": self._device,
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
            if stop.raised:
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
        raise save_incident(
            self._run,
            step=self._now,
            failed=[
                check
                for check, passed in zip(self._step.layout.checks(), result.passed, strict=True)
                if not passed
            ],
            state=self._step.state(),
            batch={name: tensor.numpy() for name, tensor in batch.items()},
            name_of=self._data.training.name_of,
            metrics=metrics,
            config=self._config,
            replicas=self._step.healthy,
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
            metrics = self._evaluator.evaluate(self._data.validation, lambda: stop.raised)
        except tf.errors.OpError as error:
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
