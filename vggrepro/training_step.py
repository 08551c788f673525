"""The step of a run on the engine that trains it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vggrepro.config import TrainConfig
from vggrepro.evaluation import Evaluator
from vggrepro.model import Network
from vggrepro.step_state import State, StepState

if TYPE_CHECKING:
    from vggrepro.accelerator import Engine


def training_step(config: TrainConfig, network: Network, state: State, engine: Engine) -> StepState:
    """A step that owns `state`; calling it with (images, labels) gives a StepResult."""
    if engine.strategy == "pjrt":
        from vggrepro.pjrt_step import PjrtStep

        return PjrtStep(config, network, state)
    if engine.distribution is not None:
        from vggrepro.distributed_step import DistributedStep

        return DistributedStep(config, network, state, engine)
    from vggrepro.train_step import TrainStep

    return TrainStep(config, network, state)


def evaluator(step: StepState) -> Evaluator:
    """Validates with the step's weights, on the step's devices."""
    import tensorflow as tf

    network, precision = step.network, tf.as_dtype(step.config.precision)
    parameters = {name: step.variables[f"params/{name}"] for name in network.parameter_shapes()}
    return Evaluator(network, parameters, precision, getattr(step, "batch_sums", None))
