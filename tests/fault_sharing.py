"""Compiled steps shared between runs: a campaign of hundreds of runs compiles a few dozen.

Training and replay each have steps of their own, as they have in two processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf
from fault_injection import patched
from toy_run import ToyConfig, ToyProgram
from toy_step import changed

from diagnostics.protocol import Change
from vggrepro import replay_adapter, train_step, trainer
from vggrepro.accelerator import Engine
from vggrepro.config import TrainConfig
from vggrepro.model import Network
from vggrepro.step_state import State, compiled_part, initial_state
from vggrepro.train_step import TrainStep
from vggrepro.training_step import training_step


class StepPool:
    """Stands in for what makes a `TrainStep`: hands out a compiled step again where it fits."""

    def __init__(self) -> None:
        self._steps: dict[TrainConfig, TrainStep] = {}

    def __call__(
        self,
        config: TrainConfig,
        network: Network,
        state: State | None = None,
        engine: object = None,
        multiply_dtype: None = None,
    ) -> TrainStep:
        step = self._steps.get(compiled_part(config))
        if step is None:
            step = train_step.TrainStep(config, network, state)
            self._steps[compiled_part(config)] = step
            return step
        step.reconfigure(config)
        step.load(initial_state(config, network) if state is None else state)
        return step


class TrainingPool(StepPool):
    """The same for the trainer, of which only one runs at a time; other engines are left alone."""

    def __call__(
        self,
        config: TrainConfig,
        network: Network,
        state: State | None = None,
        engine: Engine | None = None,
        multiply_dtype: None = None,
    ) -> Any:
        if engine is None or engine.strategy != "cpu":
            return training_step(config, network, state, engine)
        return super().__call__(config, network, state)


@contextmanager
def shared_training() -> Iterator[None]:
    """VGG runs that are trained inside share their compiled steps, those that are replayed none."""
    with patched((trainer, "training_step", TrainingPool())):
        yield


@contextmanager
def shared_steps() -> Iterator[None]:
    """VGG runs inside share their compiled steps."""
    with patched((trainer, "training_step", StepPool()), (replay_adapter, "TrainStep", StepPool())):
        yield


class ToyPool:
    """Toy programs by what is compiled into them; only one of a kind is in use at a time."""

    def __init__(self) -> None:
        self._programs: dict[tuple[str, str], SharedToyProgram] = {}

    def program(self, role: str, config: ToyConfig, change: Change | None) -> SharedToyProgram:
        """Role: 'training' or 'replay'."""
        key = role, repr(_compiled_part(changed(config, change)))
        if key not in self._programs:
            self._programs[key] = SharedToyProgram(config, change)
        self._programs[key].reconfigure(config, change)
        return self._programs[key]


def _compiled_part(config: ToyConfig) -> ToyConfig:
    return dataclasses.replace(
        config,
        seed=0,
        sigma=None,
        learning_rate=1.0,
        warmup_steps=0,
        input_scale=1.0,
        poisoned={},
        overwritten=None,
    )


class SharedToyProgram(ToyProgram):
    """A toy program with its learning rate and warm-up in a variable."""

    def __init__(self, config: ToyConfig, change: Change | None = None) -> None:
        super().__init__(config, change)
        self._rate_and_warmup = tf.Variable([0.0, 0.0], trainable=False)
        self.reconfigure(config, change)

    def reconfigure(self, config: ToyConfig, change: Change | None) -> None:
        """Takes a configuration that differs in nothing compiled."""
        self._config, self._change = changed(config, change), change
        warmup = float(self._config.warmup_steps)
        self._rate_and_warmup.assign([self._config.learning_rate, warmup])

    def _rate(self, step: tf.Tensor) -> tf.Tensor:
        base, warmup = tf.unstack(self._rate_and_warmup.read_value())
        ramp = (tf.cast(step, tf.float32) + 1.0) / tf.maximum(1.0, warmup)
        return base * tf.minimum(1.0, ramp)
