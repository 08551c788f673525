"""The natural faults of the campaign: ways to fail, and what must be said of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from fault_runs import Damage, toy_stopped, vgg_stopped
from fault_sharing import ToyPool
from faulty_programs import (
    CULPRIT,
    Patch,
    all_inputs,
    all_of,
    culprit,
    culprit_label,
    energy_of_logits,
    flipped_bit,
    log_of_softmax,
    nan_in,
    one_number,
    standardised_images,
    vgg_loss,
    with_norm_of_logits,
)
from small_runs import tiny_config
from toy_run import ToyConfig

from diagnostics.protocol import ReplayableRun
from vggrepro.config import TrainConfig

VERIFIED, NONE, UNPROVEN, ANY = "verified", "none", "unproven", "any"


@dataclasses.dataclass(frozen=True)
class NaturalFault:
    """One fault.

    Attributes:
      name: begins with 'toy' or 'vgg', the program.
      cause: the kind that must be named; `also` holds others that a fair judge accepts.
      settings: of ToyConfig or TrainConfig.
      stage, op, layer: where it shows first; '' where that may vary.
      blamed: example CULPRIT must be named; otherwise none may be.
      advice: VERIFIED: some single change saves it, so a verified command is due; NONE: none
        does; UNPROVEN: whatever is advised must not be called verified; ANY.
      verdict: of the diagnosis.
      program: what is wrong with the program or its data, in training and replay.
      compiled: whether that changes the compiled step.
      damage: what writes to the state.
      steps: by then the guard has tripped.
    """

    name: str
    cause: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    also: tuple[str, ...] = ()
    stage: str = ""
    op: str = ""
    layer: str = ""
    blamed: bool = False
    advice: str = VERIFIED
    verdict: str = "reproduced"
    program: Patch = nullcontext
    compiled: bool = False
    damage: Damage | None = None
    steps: int = 12

    @property
    def is_toy(self) -> bool:
        return self.name.startswith("toy")

    def config(self, data: Path) -> TrainConfig:
        """Of a VGG run."""
        common = {"warmup_steps": 0, "eval_every": 0, "classes": 0, "steps": self.steps}
        return tiny_config(data, **{**common, **self.settings})

    def stopped(self, run_dir: Path, data: Path, pool: ToyPool) -> ReplayableRun:
        """Trains until the guard stops it.

        Raises:
          NotStopped: it did not.
        """
        if self.is_toy:
            return toy_stopped(ToyConfig(**self.settings), self.steps, pool, self.damage)
        return vgg_stopped(self.config(data), run_dir, self.damage)


TOY = (
    NaturalFault("toy-sigma-3", "init", {"sigma": 3.0}, stage="forward", op="MatMul"),
    NaturalFault("toy-sigma-10", "init", {"sigma": 10.0}, stage="forward", op="MatMul"),
    NaturalFault("toy-lr-x1000", "learning_rate", {"learning_rate": 50.0}, stage="forward"),
    NaturalFault(
        "toy-poisoned-nan", "data", stage="data", blamed=True, program=culprit(one_number(np.nan))
    ),
    NaturalFault(
        "toy-poisoned-huge",
        "data",
        stage="forward",
        layer="dense1",
        blamed=True,
        program=culprit(lambda numbers: numbers * np.float32(1e38)),
    ),
    NaturalFault(
        "toy-label-out-of-range", "labels", stage="data", blamed=True, program=culprit_label(4)
    ),
    NaturalFault(
        "toy-weight-overwritten",
        "weights",
        stage="weights",
        layer="dense2",
        advice=NONE,
        damage=nan_in("params/dense2/kernel", before=5),
    ),
    NaturalFault(
        "toy-momentum-overwritten",
        "weights",
        stage="weights",
        layer="dense3",
        advice=NONE,
        damage=nan_in("momentum/dense3/kernel", before=5),
    ),
    NaturalFault(
        "toy-bit-flip",
        "weights",
        stage="forward",
        advice=NONE,
        damage=flipped_bit("params/dense2/kernel", before=5),
    ),
    NaturalFault(
        "toy-float16-inputs",
        "precision",
        {"precision": "float16", "input_scale": 1e4},
        also=("data",),
        stage="forward",
        advice=ANY,
    ),
    NaturalFault(
        "toy-float16-energy",
        "precision",
        {"precision": "float16"},
        stage="loss",
        op="Square",
        program=energy_of_logits,
        compiled=True,
    ),
    NaturalFault(
        "toy-log-of-zero",
        "loss_formula",
        {"loss": "log_of_zero", "input_scale": 60.0, "learning_rate": 1e-6},
        stage="loss",
        op="Log",
    ),
    NaturalFault(
        "toy-log-of-zero-exploded",
        "loss_formula",
        {"loss": "log_of_zero", "sigma": 10.0},
        also=("init",),
        stage="loss",
        op="Log",
        advice=ANY,
    ),
    NaturalFault(
        "toy-zero-variance",
        "loss_formula",
        {"loss": "division_by_variance", "poisoned": {CULPRIT: "constant"}},
        stage="loss",
        op="RealDiv",
        blamed=True,
    ),
    NaturalFault(
        "toy-sqrt-backward",
        "loss_formula",
        {"loss": "sqrt_backward", "poisoned": {CULPRIT: "zero"}},
        stage="backward",
        op="SqrtGrad",
        blamed=True,
    ),
    NaturalFault(
        "toy-unscaled",
        "data",
        {"input_scale": 1e3, "learning_rate": 0.01},
        stage="forward",
        steps=30,
    ),
    NaturalFault("toy-momentum-1.5", "optimizer", {"momentum": 1.5}, advice=ANY, steps=300),
)

VGG = (
    NaturalFault(
        "vgg-sigma-0.1",
        "init",
        {"init": "normal:0.1", "width": 0.5, "image_size": 64, "scale_min": 73, "scale_max": 73},
        stage="forward",
        op="MatMul",
        layer="fc1",
        steps=6,
    ),
    NaturalFault("vgg-sigma-1", "init", {"init": "normal:1"}, stage="forward"),
    NaturalFault("vgg-lr-x1000", "learning_rate", {"lr": 10.0}, stage="forward"),
    NaturalFault(
        "vgg-lr-x1000-bfloat16",
        "learning_rate",
        {"lr": 10.0, "precision": "bfloat16"},
        stage="forward",
    ),
    NaturalFault(
        "vgg-poisoned-nan",
        "data",
        stage="data",
        blamed=True,
        advice=NONE,
        program=culprit(one_number(np.nan)),
    ),
    NaturalFault(
        "vgg-poisoned-huge",
        "data",
        stage="forward",
        layer="block1_conv1",
        blamed=True,
        advice=NONE,
        program=culprit(lambda pixels: np.float32(3e38) * np.sign(pixels)),
    ),
    NaturalFault(
        "vgg-label-too-large",
        "labels",
        stage="data",
        blamed=True,
        advice=NONE,
        program=culprit_label(3),
    ),
    NaturalFault(
        "vgg-label-negative",
        "labels",
        stage="data",
        blamed=True,
        advice=NONE,
        program=culprit_label(-1),
    ),
    NaturalFault(
        "vgg-weight-overwritten",
        "weights",
        stage="weights",
        layer="block3_conv1",
        advice=NONE,
        damage=nan_in("params/block3_conv1/bias", before=3),
    ),
    NaturalFault(
        "vgg-bit-flip",
        "weights",
        stage="forward",
        advice=NONE,
        damage=flipped_bit("params/block2_conv1/kernel", before=3),
    ),
    NaturalFault(
        "vgg-images-of-16-bits",
        "data",
        {"init": "he-normal", "lr": 1e-4},
        stage="forward",
        program=all_inputs(lambda pixels: pixels * np.float32(257.0)),
        advice=ANY,
    ),
    NaturalFault(
        "vgg-log-of-zero",
        "loss_formula",
        {"init": "he-normal", "lr": 1e-6},
        stage="loss",
        op="Log",
        program=vgg_loss(log_of_softmax),
        compiled=True,
        advice=ANY,
    ),
    NaturalFault(
        "vgg-zero-variance",
        "architecture",
        also=("data",),
        stage="forward",
        op="RealDiv",
        blamed=True,
        advice=NONE,
        program=all_of(standardised_images, culprit(lambda pixels: 0 * pixels + 40)),
        compiled=True,
    ),
    NaturalFault(
        "vgg-sqrt-backward",
        "loss_formula",
        {"lr": 1e-30},  # biases stay so small that a black image has logits of 0
        stage="backward",
        blamed=True,
        advice=NONE,
        program=all_of(vgg_loss(with_norm_of_logits), culprit(lambda pixels: 0 * pixels)),
        compiled=True,
    ),
)
