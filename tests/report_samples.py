"""Made-up diagnoses with the shapes of real ones, for the tests of the reports.

The founding case has the numbers that were measured for VGG-A at 224 pixels with
sigma = 0.1; the others are invented.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diagnostics.diagnosis import (
    Cause,
    Counterfactual,
    Diagnosis,
    FirstNonfinite,
    InputRange,
    Onset,
    Recommendation,
)
from diagnostics.protocol import LayerFacts, RunFacts, Telemetry

LAYERS = (
    "block1_conv1",
    "block2_conv1",
    "block3_conv1",
    "block3_conv2",
    "block4_conv1",
    "block4_conv2",
    "block5_conv1",
    "block5_conv2",
    "fc1",
    "fc2",
    "predictions",
)
ENVIRONMENT = {
    "code": {"version": "0.1.0", "commit": "5555f30", "dirty": False},
    "packages": {"tensorflow-cpu": "2.21.0", "keras": "3.15.1", "numpy": "2.4.6"},
    "python": "CPython 3.11.9",
    "hardware": {"cpu": "Xeon", "cores": 2, "devices": ["CPU: CPU"]},
    "variables": {},
}


class Sample(NamedTuple):
    diagnosis: Diagnosis
    telemetry: Telemetry
    facts: RunFacts


def facts(layers: Sequence[str] = LAYERS, **changes: object) -> RunFacts:
    values: dict = {
        "learning_rate": 0.01,
        "momentum": 0.9,
        "optimizer": "momentum SGD",
        "init": "normal:0.1",
        "loss": "softmax cross-entropy",
        "classes": 1000,
        "chance_loss": 6.9078,
        "batch_size": 16,
        "input_kind": "pixels",
    }
    return RunFacts(tuple(LayerFacts(name, "conv") for name in layers), **(values | changes))


def telemetry(
    loss: Sequence[float],
    grad_norm: Sequence[float],
    absmax: np.ndarray,
    layers: Sequence[str] = LAYERS,
    first_step: int = 0,
) -> Telemetry:
    """absmax: largest pre-activation, [steps, layers]."""
    columns = ["loss", "grad_norm"]
    columns += [f"{layer}/preactivation_max" for layer in layers]
    columns += [f"{layer}/preactivation_min" for layer in layers]
    rows = np.column_stack([loss, grad_norm, absmax, -0.7 * np.asarray(absmax)])
    steps = np.arange(first_step, first_step + len(rows), dtype=np.int64)
    return Telemetry(steps, tuple(columns), rows.astype(np.float32))


def founding() -> Sample:
    """sigma = 0.1: exploded weights after step 0, Inf in block4_conv2 at step 1."""
    nan, inf = np.nan, np.inf
    absmax = np.array(
        [
            [9e2, 6e3, 4e4, 3e5, 2e6, 1.5e7, 1e8, 6e8, 3e9, 6e9, 4e8],
            [1e9, 5e15, 8e21, 2e28, 5e34, inf, nan, nan, 8e17, 8e17, 8e17],
        ]
    )
    first = FirstNonfinite(
        stage="forward",
        layer="block4_conv2",
        op="Conv2D",
        source="vggrepro/model.py:143 in _convolution: x = tf.nn.conv2d(x, kernel, 1, 'SAME')",
        kind="inf",
        count=3_402_117,
        size=6_422_528,
        inputs=(
            InputRange("input", (16, 28, 28, 512), 0.0, 4.96e34, 0),
            InputRange("kernel", (3, 3, 512, 512), -4.1e5, 3.9e5, 0),
        ),
    )
    tried = (
        Counterfactual("nothing changed (control)", "none", None, False, 1, 0, 4.0e8, note="NaN"),
        Counterfactual(
            "normal:0.01 instead of normal:0.1", "init", "normal:0.01", True, 20, 0, 6.89, True
        ),
        Counterfactual("glorot-uniform", "init", "glorot-uniform", True, 20, 0, 6.71),
        Counterfactual("he-normal", "init", "he-normal", False, 2, 0, 8e14, note="NaN at step 2"),
        Counterfactual("inputs / 128", "input_scale", 128, False, 3, 0, 1.1e12, note="NaN"),
        Counterfactual("learning rate 0.001", "learning_rate", 1e-3, False, 2, 0, 7e13),
        Counterfactual("learning rate 1e-9 (largest)", "learning_rate", 1e-9, True, 20, 0, 3.9e8),
        Counterfactual("warm-up over 100 steps", "warmup", 100, False, 3, 0, 2e14),
        Counterfactual("gradient norm clipped to 1", "clip_norm", 1.0, True, 20, 0, 3.9e8),
        Counterfactual("float64", "precision", "float64", False, 2, 0, 6e25, note="runs away"),
    )
    diagnosis = Diagnosis(
        run_dir="runs/20261122-A-normal-0.1",
        step=1,
        verdict="reproduced",
        first_nonfinite=first,
        onset=Onset(0, "block1_conv1", "preactivation_absmax", 9e2, 1.1e6),
        cause=Cause(
            "init",
            0.97,
            (
                "Every layer multiplies its input by about 4.8: that is sqrt(fan_in * sigma^2 / 2)"
                " for fan_in 4608 and the sigma = 0.1 of the kernels; 1 would keep the scale.",
                "Before any update the logits already have an RMS of 7.5e7 and the loss is 4e8; "
                "guessing among 1000 classes gives 6.91.",
                "The paper's 'normal distribution with 10^-2 variance' reads as sigma = 0.1. The "
                "authors' own code uses sigma = 0.01.",
            ),
        ),
        counterfactuals=tried,
        recommendation=Recommendation(
            "vggrepro train --arch A --width 1.0 --image-size 224 --batch-size 16 --lr 0.01 "
            "--init normal:0.01 --data data/photographs --seed 0 --steps 20",
            True,
            "The smallest change that survived.",
        ),
        environment=ENVIRONMENT,
        seconds={"replay": 4.1, "location": 9.2, "counterfactuals": 161.0},
    )
    return Sample(diagnosis, telemetry([4e8, 8e17], [2e9, nan], absmax), facts())


def poisoned() -> Sample:
    """One image of a healthy run holds NaN at step 212."""
    steps = 213
    random = np.random.default_rng(1)
    absmax = np.exp(random.normal(0, 0.05, (steps, len(LAYERS)))) * np.geomspace(400, 6, 11)
    absmax[-1] = np.nan
    loss = 4.6 - 1.9 * (1 - np.exp(-np.arange(steps) / 60)) + random.normal(0, 0.05, steps)
    loss[-1] = np.nan
    norm = np.exp(random.normal(0.3, 0.2, steps))
    norm[-1] = np.nan
    diagnosis = Diagnosis(
        run_dir="runs/flowers",
        step=212,
        verdict="reproduced",
        first_nonfinite=FirstNonfinite(
            stage="data",
            layer=None,
            op=None,
            source=None,
            kind="nan",
            count=3072,
            size=98_304,
            examples=(8817,),
            example_names=("n01440764/n01440764_10029.JPEG",),
            inputs=(InputRange("images", (32, 32, 32, 3), -123.7, 151.1, 3072),),
        ),
        onset=None,
        cause=Cause(
            "data",
            0.99,
            (
                "All NaN of the batch are in one image, n01440764/n01440764_10029.JPEG.",
                "Without it the same step is finite; the weights before the step are finite.",
            ),
        ),
        counterfactuals=(
            Counterfactual("nothing changed", "none", None, False, 0, 212, None, note="NaN"),
            Counterfactual("without example 8817", "without_examples", [8817], True, 20, 212, 2.7),
        ),
        recommendation=Recommendation("vggrepro train --exclude 8817", False, ""),
        notes=("The data directory is gone: the captured batch was used.",),
        environment=ENVIRONMENT,
        seconds={"replay": 0.4, "location": 0.6},
    )
    return Sample(diagnosis, telemetry(loss, norm, absmax), facts())


def stalled() -> Sample:
    """sigma = 0.01 in a deep net: the signal fades, the loss stays at ln(1000)."""
    steps = 5000
    random = np.random.default_rng(2)
    layers = tuple(f"block{block}_conv{conv}" for block in range(1, 6) for conv in range(1, 4))
    fading = np.geomspace(60, 1e-7, len(layers)) * np.exp(random.normal(0, 0.1, (steps, 1)))
    diagnosis = Diagnosis(
        run_dir="runs/E-normal-0.01",
        step=4999,
        verdict="stalled",
        first_nonfinite=None,
        onset=Onset(0, "block5_conv3", "preactivation_absmax", 1.1e-7, 1.0),
        cause=Cause(
            "init", 0.9, ("Each layer keeps 0.48 of its input's scale; 15 layers keep 2e-5 of it.",)
        ),
        counterfactuals=(
            Counterfactual("nothing changed", "none", None, False, 200, 0, 6.9078),
            Counterfactual("glorot-uniform", "init", "glorot-uniform", True, 200, 0, 5.93, True),
        ),
        recommendation=Recommendation(
            "vggrepro train --arch E --init glorot-uniform", True, "Its loss fell below guessing."
        ),
        environment=ENVIRONMENT,
    )
    loss = 6.9078 + random.normal(0, 0.004, steps)
    norm = np.exp(random.normal(-7, 0.3, steps))
    return Sample(
        diagnosis, telemetry(loss, norm, fading, layers), facts(layers, init="normal:0.01")
    )


def unknown() -> Sample:
    """A recorded failure that did not recur, in a run without per-layer telemetry."""
    loss = [2.3, 2.2, 2.25, np.nan]
    rows = np.array(loss, np.float32)[:, None]
    diagnosis = Diagnosis(
        run_dir="runs/foreign",
        step=40,
        verdict="not_reproduced",
        first_nonfinite=None,
        onset=None,
        cause=Cause("unknown", 0.0, ("Two replays of the step were clean.",)),
        notes=("Recorded with TensorFlow 2.20.0, replayed with 2.21.0.",),
    )
    return Sample(diagnosis, Telemetry(np.arange(37, 41), ("loss",), rows), RunFacts(()))


def exploding() -> Sample:
    """A long run that loses headroom from step 9,200 on, NaN at 9,400."""
    steps = 9401
    random = np.random.default_rng(3)
    growth = np.maximum(0, np.arange(steps) - 9200)[:, None] * 0.35
    noise = random.normal(0, 0.2, (steps, len(LAYERS)))
    absmax = np.exp(noise + growth) * np.geomspace(300, 10, len(LAYERS))
    absmax[-1, 4:] = np.nan
    loss = 3 * np.exp(-np.arange(steps) / 3000) + 0.3 * np.exp(noise[:, 0] + growth[:, 0] / 3)
    norm = np.exp(noise[:, 1] + growth[:, 0] / 2)
    loss[-1] = norm[-1] = np.nan
    sample = founding()
    diagnosis = Diagnosis(
        run_dir="runs/late",
        step=9400,
        verdict="replay_differs",
        first_nonfinite=sample.diagnosis.first_nonfinite,
        onset=Onset(9200, "block1_conv1", "preactivation_absmax", 310.0, 1.42),
        cause=Cause("learning_rate", 0.8, ("The update is 0.3 of the weights at each step.",)),
    )
    return Sample(diagnosis, telemetry(loss, norm, absmax), facts())


SAMPLES = {
    "founding": founding,
    "poisoned": poisoned,
    "stalled": stalled,
    "unknown": unknown,
    "exploding": exploding,
}


def changed(sample: Sample, **changes: object) -> Sample:
    """The sample with other fields in its diagnosis."""
    return sample._replace(diagnosis=dataclasses.replace(sample.diagnosis, **changes))


def with_names(sample: Sample, name: str) -> Sample:
    """The sample with this text wherever data decides."""
    diagnosis = sample.diagnosis
    assert diagnosis.first_nonfinite is not None and diagnosis.onset is not None
    first = dataclasses.replace(
        diagnosis.first_nonfinite,
        layer=name,
        op=name,
        source=name,
        examples=(3,),
        example_names=(name,),
        inputs=tuple(
            dataclasses.replace(one, name=name) for one in diagnosis.first_nonfinite.inputs
        ),
    )
    layers = [f"layer {index} {name}" for index in range(11)]
    absmax = np.ones((2, 11))
    tried = tuple(
        dataclasses.replace(one, change=name, note=name) for one in diagnosis.counterfactuals
    )
    return Sample(
        dataclasses.replace(
            diagnosis,
            run_dir=name,
            first_nonfinite=first,
            onset=dataclasses.replace(diagnosis.onset, layer=name, quantity=name),
            cause=Cause("data", 0.5, (name,)),
            counterfactuals=tried,
            recommendation=Recommendation(f"train {name}", True, name),
            notes=(name,),
            environment={name: {name: [name]}},
            seconds={name: 1.0},
        ),
        telemetry([1.0, 2.0], [1.0, 2.0], absmax, layers),
        facts(layers, init=name, optimizer=name, loss=name, extra={name: name}),
    )
