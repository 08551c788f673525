"""The clean runs of the campaign: healthy ones of several kinds, which nobody must complain of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from small_runs import tiny_config
from toy_run import ToyConfig, ToyRun

from diagnostics.errors import StoppedByGuard
from diagnostics.protocol import ReplayableRun
from vggrepro import trainer
from vggrepro.hooks import Hook
from vggrepro.replay_adapter import VggRun


@dataclasses.dataclass(frozen=True)
class CleanRun:
    """A run that must come to its end.

    Attributes:
      name: begins with 'toy' or 'vgg', the program.
      settings: of ToyConfig or TrainConfig.
    """

    name: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 60

    def finished(self, run_dir: Path, data: Path) -> tuple[ReplayableRun, list[str]]:
        """(the run, the warnings that it gave).

        Raises:
          StoppedByGuard: it did not come to its end.
        """
        if self.name.startswith("toy"):
            toy = ToyRun(ToyConfig(**self.settings)).train(self.steps)
            if toy.stopped_at is not None:
                raise StoppedByGuard(f"step {toy.stopped_at}", "")
            return toy, []
        warnings = Warnings()
        common = {"classes": 0, "steps": self.steps, "warmup_steps": 0, "eval_every": 0}
        config = tiny_config(data, **{**common, **self.settings})
        trainer.train(config, run_dir, [warnings])
        return VggRun(run_dir), warnings.heard


class Warnings(Hook):
    """Keeps the warnings of a run."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_message(self, level: str, text: str) -> None:
        if level == "warning":
            self.heard.append(text)


CLEAN = (
    *(CleanRun(f"toy-seed-{seed}", {"seed": seed}, steps=320) for seed in range(4)),
    *(CleanRun(f"toy-bfloat16-{s}", {"seed": s, "precision": "bfloat16"}) for s in (4, 5)),
    CleanRun("toy-float16", {"precision": "float16"}),
    CleanRun("toy-sigma-0.3", {"sigma": 0.3}),
    CleanRun("toy-clipped", {"clip_norm": 1.0, "learning_rate": 0.2}),
    CleanRun("toy-warm-up", {"warmup_steps": 20, "momentum": 0.0}),
    CleanRun("toy-bright-example", {"poisoned": {11: "constant"}}),
    CleanRun("toy-variance-in-loss", {"loss": "division_by_variance", "seed": 6}),
    CleanRun("toy-covariance-in-loss", {"loss": "covariance", "seed": 7}),
    CleanRun("toy-log-of-softmax", {"loss": "log_of_zero", "seed": 8}),
    CleanRun("vgg-A-glorot", {"seed": 1}),
    CleanRun("vgg-A-slow", {"seed": 2, "lr": 1e-3}),
    CleanRun("vgg-A-bfloat16", {"seed": 3, "precision": "bfloat16"}),
    CleanRun("vgg-A-LRN-glorot", {"seed": 4, "arch": "A-LRN"}),
    CleanRun("vgg-B-glorot-normal", {"seed": 5, "arch": "B", "init": "glorot-normal"}),
    CleanRun("vgg-C-clipped", {"seed": 6, "arch": "C", "clip_norm": 5.0}),
    CleanRun("vgg-D-glorot", {"seed": 7, "arch": "D", "warmup_steps": 20}),
    CleanRun("vgg-E-he", {"seed": 8, "arch": "E", "init": "he-normal", "lr": 1e-3}),
)
