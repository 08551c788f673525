"""What a run begins with: its data, its net, its first state, and its directory.

Of several workers the chief opens or makes the run directory; the others look on.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.durable_files import json_text
from diagnostics.errors import InputError
from diagnostics.forecast import Forecast
from vggrepro import inheritance
from vggrepro.accelerator import Engine
from vggrepro.bystander import Bystander
from vggrepro.config import TrainConfig
from vggrepro.data_source import DataSource, open_data
from vggrepro.environment import describe_environment
from vggrepro.forecast_vgg import check_before_training, image_scales, measured_forecast
from vggrepro.hooks import Announcer
from vggrepro.init_notes import init_note
from vggrepro.model import Network, build_network
from vggrepro.recipes import override_line, recipe_entries
from vggrepro.run_directory import RunDirectory, check_free
from vggrepro.step_state import State, initial_state

_MANIFEST_SCHEMA = 1
_FORECAST_IMAGES = 8  # of the batch that is run through inherited weights


@dataclass(frozen=True)
class RunStart:
    """What a session begins with.

    Attributes:
      state: before its first step. Of several workers the chief's counts.
    """

    config: TrainConfig
    network: Network
    data: DataSource
    run: RunDirectory
    state: State

    def fingerprint(self) -> str:
        """Of what must be the same for all workers, wherever the files lie."""
        values = {**self.config.to_dict(), "data": self.data.record, "init_from": ""}
        return json_text({**values, "strategy": ""})


def open_run(
    config: TrainConfig, run_dir: Path, announce: Announcer, engine: Engine, stack: ExitStack
) -> RunStart:
    """Goes on with a run, in the one process that writes it; `stack` closes it.

    Raises:
      InputError: no such run, other data, or it has done more steps already.
    """
    run = stack.enter_context(RunDirectory.open(run_dir, True, announce.warning))
    data = open_data(config, announce.info, run.manifest()["data"], engine.workers)
    config, network = _with_classes(config, data)
    return RunStart(config, network, data, run, _first_state(config, network, run))


def make_run(
    config: TrainConfig,
    run_dir: Path,
    announce: Announcer,
    engine: Engine,
    stack: ExitStack,
    strict: bool,
    recipe_name: str,
) -> RunStart:
    """Makes a new run, in the one process that writes it; `stack` closes it.

    Raises:
      InputError: the directory is not free, bad data, or `strict` and a bad forecast.
    """
    # Both before the minutes that a large data set's statistics take.
    check_free(run_dir)
    source = inheritance.source_of(config, announce.warning)
    data = open_data(config, announce.info, None, engine.workers)
    config, network = _with_classes(config, data)
    inherited = inheritance.inherit(config, network, source)
    for line in inherited.lines():
        announce.info(line)
    forecast = _forecast(config, network, data, announce, strict, inherited.parameters)
    manifest = _first_manifest(config, network, data, engine.description, forecast)
    manifest["inheritance"] = inherited.record
    manifest |= recipe_entries(config, recipe_name, data.record["train_images"])
    if recipe_name:
        announce.info(override_line(**manifest["recipe"]))
    run = stack.enter_context(
        RunDirectory.create(run_dir, config.to_dict(), manifest, announce.warning)
    )
    inherited.keep(run.path)
    return RunStart(config, network, data, run, _first_state(config, network, run))


def look_on(config: TrainConfig, run_dir: Path, announce: Announcer, engine: Engine) -> RunStart:
    """What another worker begins with: it writes nothing, and its state will be the chief's."""
    announce.info(f"worker {engine.workers.index}: the chief, worker 0, writes the run")
    data = open_data(config, announce.info, None, engine.workers)
    config, network = _with_classes(config, data)
    state = initial_state(dataclasses.replace(config, init_from=""), network)
    return RunStart(config, network, data, Bystander(run_dir), state)


def _with_classes(config: TrainConfig, data: DataSource) -> tuple[TrainConfig, Network]:
    classes = len(data.class_names)
    config = dataclasses.replace(config, classes=classes)
    network = build_network(
        config.arch, width=config.width, image_size=config.image_size, classes=classes
    )
    return config, network


def _first_state(config: TrainConfig, network: Network, run: RunDirectory) -> State:
    """The last checkpoint, or the state of step 0."""
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        return initial_state(config, network, inheritance.kept_parameters(run.path, config))
    if checkpoint[0] > config.steps:
        raise InputError(
            f"{run.path} has done {checkpoint[0]} steps already, more than {config.steps}",
            "Give a larger --steps",
        )
    return checkpoint[1]


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
