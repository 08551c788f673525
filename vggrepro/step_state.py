"""The state of a run's step by name, whatever device and runtime hold it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError
from diagnostics.guard import GuardLayout, StepResult
from vggrepro.config import TrainConfig
from vggrepro.initializers import initial_parameters
from vggrepro.loss_scale import COLUMNS, has_loss_scale, initial_loss_scale
from vggrepro.model import Network
from vggrepro.optimizer import PlateauSchedule

State = dict[str, np.ndarray]


class StepState:
    """Names, layout and state that every kind of step has.

    Attributes:
      config: `classes` is set.
      layout: of checks and telemetry.
      variables: the state by name; each has `numpy()` and `assign(value)`.
    """

    variables: Mapping[str, Any]

    def __init__(self, config: TrainConfig, network: Network) -> None:
        self.config = config
        self.network = network
        self.layout = guard_layout(config, network)
        self._names = tuple(network.parameter_shapes())

    def reconfigure(self, config: TrainConfig) -> None:
        """Takes another learning rate, warm-up, initialiser or schedule without a compilation.

        Raises:
          ValueError: something else differs, which is compiled into the step.
        """
        if compiled_part(config) != compiled_part(self.config):
            raise ValueError("this configuration needs a step compiled anew")
        self.config = config

    def state(self) -> State:
        """The state as named arrays: parameters, momentum, schedule, counters."""
        return {name: np.array(variable.numpy()) for name, variable in self.variables.items()}

    def parameters(self) -> State:
        """The weights alone, as '<layer>/kernel' and '<layer>/bias'."""
        return {name: self.variables[f"params/{name}"].numpy() for name in self._names}

    def load(self, state: State) -> None:
        """Replaces the state.

        Raises:
          InputError: names or shapes differ from this configuration's.
        """
        if state.keys() != self.variables.keys():
            odd = sorted(state.keys() ^ self.variables.keys())
            raise InputError(f"the state does not fit this configuration: {', '.join(odd[:3])}")
        for name, variable in self.variables.items():
            if state[name].shape != tuple(variable.shape):
                raise InputError(
                    f"the state's {name} has shape {state[name].shape}, "
                    f"the configuration needs {tuple(variable.shape)}"
                )
            variable.assign(state[name])
        self.rearm()

    def record_validation(self, steps: int, error: float) -> None:
        """Lets the plateau rule see a validation after `steps` steps, once.

        Args:
          error: validation top-1 error, percent.
        """
        counted = self.variables["counters/evaluated_at"]
        if int(counted.numpy()) == steps:
            return
        schedule = PlateauSchedule(self.config.plateau_patience, self.config.lr_drops)
        memory = {name: self.variables[name].numpy() for name in schedule.initial_state()}
        for name, value in schedule.after_evaluation(memory, error).items():
            self.variables[name].assign(value)
        counted.assign(steps)

    def __call__(self, images: Any, labels: Any) -> StepResult:
        """Runs one step on images float32 [B, s, s, 3] and labels int32 [B]."""
        raise NotImplementedError

    def loop(self, batches: Sequence[tuple[Any, Any]]) -> list[StepResult]:
        """Runs a step on each (images, labels); after a refused one, every later is refused."""
        return [self(images, labels) for images, labels in batches]

    def ahead(self, batches: tf.data.Dataset) -> Iterator[Mapping[str, tf.Tensor]]:
        """The batches of a dataset, the next one on its way to the device while a step runs."""
        return iter(batches)

    def evaluated_at(self) -> int:
        """After how many steps the last recorded validation took place."""
        return int(self.variables["counters/evaluated_at"].numpy())

    def rearm(self) -> None:
        """Lets steps run again after one was refused."""
        raise NotImplementedError


def guard_layout(config: TrainConfig, network: Network) -> GuardLayout:
    """What a step of this configuration checks and records."""
    extra = COLUMNS if has_loss_scale(config.precision) else ()
    return GuardLayout(tuple(layer.name for layer in network.weight_layers), extra)


def rate_settings(config: TrainConfig) -> list[float]:
    """What a compiled step reads of the learning rate: base, warm-up steps."""
    return [config.lr, float(config.warmup_steps)]


def compiled_part(config: TrainConfig) -> TrainConfig:
    """The configuration with everything blanked that the compiled step does not hold."""
    return dataclasses.replace(
        config,
        lr=1.0,
        warmup_steps=0,
        init="normal:1",
        init_from="",
        lr_drops=0,
        plateau_patience=1,
        data="",
        steps=1,
        steps_per_loop=1,
        eval_every=0,
        checkpoint_every=1,
        keep_checkpoints=1,
    )


def initial_state(config: TrainConfig, network: Network, inherited: State | None = None) -> State:
    """Step 0's state: drawn or inherited weights, zero momentum, a fresh schedule, step 0.

    float16 has a loss scale besides.

    Args:
      inherited: '<layer>/kernel' and '<layer>/bias' of the layers that are not drawn;
        must be given where the configuration inherits (`vggrepro.inheritance`).
    """
    if config.init_from and inherited is None:
        raise ValueError(f"the weights of {config.init_from} are needed")
    parameters = {**initial_parameters(network, config.init, config.seed), **(inherited or {})}
    return {
        **{f"params/{name}": value for name, value in parameters.items()},
        **{f"momentum/{name}": np.zeros_like(value) for name, value in parameters.items()},
        **PlateauSchedule.initial_state(),
        **initial_loss_scale(config.precision),
        "counters/step": np.array(0, np.int64),
        "counters/evaluated_at": np.array(0, np.int64),
    }
