"""Natural faults that take more than a mistake in the program: what happened around the run."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fault_injection import Injection, Injector, patched, vgg_patches
from fault_runs import vgg_stopped
from fault_sharing import ToyPool, shared_steps
from faults import BATCH
from faulty_programs import nan_in
from natural_faults import NONE, TOY, UNPROVEN, VGG, NaturalFault
from toy_run import Fault, ToyConfig, ToyRun

from diagnostics import diagnose
from diagnostics.protocol import ReplayableRun
from diagnostics.snapshot import read_snapshot, write_snapshot
from vggrepro import trainer
from vggrepro.replay_adapter import VggRun

_SLOW_STEP = 20.0  # seconds


class DamagedCheckpoint(NaturalFault):
    """VGG resumed from a checkpoint with NaN in it, whole by its hashes."""

    def stopped(self, run_dir: Path, data: Path, pool: ToyPool) -> ReplayableRun:
        config = dataclasses.replace(self.config(data), steps=2)
        trainer.train(config, run_dir)
        checkpoint = run_dir / "checkpoints" / "step-00000002"
        state, manifest = read_snapshot(checkpoint)
        state[f"params/{self.layer}/kernel"].reshape(-1)[:5] = float("nan")
        write_snapshot(checkpoint, state, manifest)
        resumed = dataclasses.replace(config, classes=3, steps=self.steps)
        return vgg_stopped(resumed, run_dir, resume=True)


class DataGone(NaturalFault):
    """VGG's images are removed after the run."""

    def stopped(self, run_dir: Path, data: Path, pool: ToyPool) -> ReplayableRun:
        images = run_dir.with_name(f"{run_dir.name}-images")
        shutil.copytree(data, images)
        vgg_stopped(self.config(images), run_dir)
        shutil.rmtree(images)
        return VggRun(run_dir)


class Transient(NaturalFault):
    """A fault that strikes in training and never again."""

    def stopped(self, run_dir: Path, data: Path, pool: ToyPool) -> ReplayableRun:
        if self.is_toy:
            toy = ToyRun(ToyConfig(fault=Fault("forward", "dense2", step=4))).train(9)
            toy.config = ToyConfig()
            return toy
        injector = Injector()
        injector.arm(Injection("backward", "fc1", step=2), BATCH)
        with vgg_patches(injector), shared_steps():
            return vgg_stopped(self.config(data), run_dir)


class Finite(NaturalFault):
    """A run that comes to its end and is in trouble all the same."""

    def stopped(self, run_dir: Path, data: Path, pool: ToyPool) -> ReplayableRun:
        if self.is_toy:
            return ToyRun(ToyConfig(**self.settings)).train(self.steps)
        trainer.train(self.config(data), run_dir)
        return VggRun(run_dir)


@contextmanager
def dear_steps() -> Iterator[None]:
    """The diagnosis takes steps for so slow that it cannot afford to go back to step 0."""
    with patched((diagnose, "_time_of_step", lambda *arguments: _SLOW_STEP)):
        yield


UNUSUAL = (
    NaturalFault(
        "toy-late-damage",
        "weights",
        stage="weights",
        layer="dense2",
        advice=UNPROVEN,
        program=dear_steps,
        damage=nan_in("params/dense2/kernel", before=21),
        steps=30,
    ),
    Transient("toy-transient", "hardware", advice=NONE, verdict="not_reproduced"),
    Finite("toy-stalled", "init", {"sigma": 1e-4}, verdict="stalled", steps=60),
    Finite(
        "toy-diverged",
        "learning_rate",
        {"learning_rate": 3e3, "clip_norm": 1.0},
        verdict="diverged",
        steps=24,
    ),
    DamagedCheckpoint(
        "vgg-damaged-checkpoint", "weights", stage="weights", layer="fc1", advice=NONE
    ),
    DataGone("vgg-data-gone", "learning_rate", {"lr": 10.0}, stage="forward", advice=UNPROVEN),
    Transient("vgg-transient", "hardware", advice=NONE, verdict="not_reproduced"),
    # He's weights on pixels of +-128: a loss of 100 at step 0, and then dead units.
    Finite(
        "vgg-he-dead",
        "init",
        {"init": "he-normal", "lr": 1e-3, "seed": 0},
        verdict="stalled",
        steps=60,
    ),
    Finite("vgg-stalled", "init", {"init": "normal:0.001"}, verdict="stalled", steps=80),
)
NATURAL = TOY + VGG + UNUSUAL
QUICK = ("toy-sigma-3", "toy-sqrt-backward", "toy-weight-overwritten", "vgg-poisoned-nan")
