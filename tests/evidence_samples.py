"""Hand-made evidence for the tests of onset, stall and causes: plain numbers, no TensorFlow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diagnostics.diagnosis import Counterfactual, FirstNonfinite, InputRange
from diagnostics.evidence import Evidence
from diagnostics.onset import find_onset
from diagnostics.protocol import LayerFacts, RunFacts, Telemetry
from diagnostics.tensor_stats import TensorStats

VGG_A = (
    ("block1_conv1", 27),
    ("block2_conv1", 576),
    ("block3_conv1", 1152),
    ("block3_conv2", 2304),
    ("block4_conv1", 2304),
    ("block4_conv2", 4608),
    ("block5_conv1", 4608),
    ("block5_conv2", 4608),
    ("fc1", 25088),
    ("fc2", 4096),
    ("predictions", 4096),
)
# Measured at step 0 of the founding case (A, 224 px, sigma 0.1).
FOUNDING_PEAKS = (203, 353, 1.03e3, 3.41e3, 1.44e4, 6.97e4, 3.52e5, 1.44e6, 1.82e7, 1.47e8, 4.78e8)


def layers(spec: Sequence[tuple[str, int]] = VGG_A, activation: str = "relu") -> tuple:
    last = len(spec) - 1
    return tuple(
        LayerFacts(
            name,
            "dense",
            f"params/{name}/kernel",
            fan_in,
            fan_in,
            "linear" if index == last else activation,
        )
        for index, (name, fan_in) in enumerate(spec)
    )


def facts(spec: Sequence[tuple[str, int]] = VGG_A, **changes: Any) -> RunFacts:
    values: dict[str, Any] = {
        "layers": layers(spec),
        "learning_rate": 0.01,
        "momentum": 0.9,
        "optimizer": "momentum SGD",
        "loss": "softmax cross-entropy",
        "classes": 10,
        "chance_loss": math.log(10),
        **changes,
    }
    return RunFacts(**values)


def stats(
    rms: float,
    peak: float | None = None,
    *,
    low: float | None = None,
    size: int = 10_000,
    nan: int = 0,
    limit: float = 3.4028235e38,
) -> TensorStats:
    """Statistics of a float32 array (or of the type whose largest number is `limit`)."""
    peak = 4 * rms if peak is None else peak
    headroom = math.log2(limit) - math.log2(peak) if peak else math.inf
    return TensorStats(
        nan=nan,
        pos_inf=0,
        neg_inf=0,
        size=size,
        absmax=peak,
        l2=rms * math.sqrt(size),
        rms=rms,
        minimum=-peak if low is None else low,
        maximum=peak,
        headroom=-math.inf if nan else headroom,
    )


def labels(high: int = 9) -> TensorStats:
    return stats(high / 2, high, low=0, limit=2.0**31 - 1)


def kernels(spec: Sequence[tuple[str, int]], std: float | None) -> dict[str, TensorStats]:
    """Initial kernels of one standard deviation, or of He's where `std` is None."""
    return {
        f"params/{name}/kernel": stats(std if std is not None else math.sqrt(2 / fan_in))
        for name, fan_in in spec
    }


def _single(values: Sequence[float]) -> np.ndarray:
    with np.errstate(over="ignore"):  # beyond float32 is infinity, as recorded
        return np.asarray(values).astype(np.float32)


def telemetry(columns: Mapping[str, Sequence[float]]) -> Telemetry:
    """Rows from columns; '<layer>/peak' fills preactivation_max and preactivation_min."""
    full: dict[str, np.ndarray] = {}
    for name, values in columns.items():
        layer, _, kind = name.rpartition("/")
        if kind == "peak":
            full[f"{layer}/preactivation_max"] = _single(values)
            full[f"{layer}/preactivation_min"] = -_single(values)
        else:
            full[name] = _single(values)
    rows = np.stack(list(full.values()), axis=1)
    return Telemetry(np.arange(len(rows)), tuple(full), rows)


def quiet(steps: int, spec: Sequence[tuple[str, int]] = VGG_A, seed: int = 0) -> dict[str, Any]:
    """Columns of a healthy run of that many steps: noise around ordinary levels."""
    random = np.random.default_rng(seed)

    def level(value: float, spread: float) -> np.ndarray:
        return value * np.exp(spread * random.normal(size=steps))

    made = {
        "loss": level(2.2, 0.02),
        "grad_norm": level(2.0, 0.4),
        "lr": np.full(steps, 0.01),
        "input_max": level(3.0, 0.05),
        "input_min": -level(3.0, 0.05),
    }
    for name, _ in spec:
        made[f"{name}/peak"] = level(5.0, 0.1)
        made[f"{name}/gradient_norm"] = level(0.5, 0.4)
        made[f"{name}/weight_norm"] = np.linspace(9.0, 9.1, steps)
        made[f"{name}/update_ratio"] = np.r_[0.0, level(1e-3, 0.3)[1:]]
    return made


def first(stage: str, layer: str | None = None, op: str | None = None, **changes: Any):
    """A FirstNonfinite; `inputs` are (minimum, maximum) pairs."""
    ranges = tuple(
        InputRange(f"input {i}", (16, 10), low, high, 0)
        for i, (low, high) in enumerate(changes.pop("inputs", ()))
    )
    values = {"source": None, "kind": "nan", "count": 3, "size": 160, **changes}
    return FirstNonfinite(stage, layer, op, inputs=ranges, **values)


def replay(kind: str, value: Any, survived: bool) -> Counterfactual:
    return Counterfactual(
        f"{kind} {value}", kind, value, survived, 10, 0, 2.0 if survived else None
    )


def evidence(**changes: Any) -> Evidence:
    """Evidence of a run on ordinary data with He's weights; the onset is found, not given."""
    recorded = changes.get("telemetry") or telemetry(quiet(10))
    run_facts = changes.get("facts") or facts()
    values: dict[str, Any] = {
        "facts": run_facts,
        "verdict": "reproduced",
        "step": int(recorded.steps[-1]),
        "first_nonfinite": None,
        "onset": find_onset(recorded, run_facts),
        "telemetry": recorded,
        "outcome": None,
        "weight_stats": kernels(VGG_A, None),
        "initial_weight_stats": kernels(VGG_A, None),
        "batch_stats": {"images": stats(1.0), "labels": labels()},
        "label_range": (0.0, 9.0),
        "counterfactuals": (),
        **changes,
    }
    return Evidence(**values)


def founding() -> Evidence:
    """The case this project exists for, as measured: VGG-A, 224 px, sigma 0.1."""
    columns: dict[str, Any] = {
        "loss": [2.94e8, np.nan],
        "grad_norm": [1.65e9, np.nan],
        "input_max": [132, 130],
        "input_min": [-130, -130],
    }
    later = (6e8, 2.5e15, 2.2e21, 5e27, 8.4e33, np.inf) + (np.nan,) * 5
    for (name, _), before, after in zip(VGG_A, FOUNDING_PEAKS, later, strict=True):
        columns[f"{name}/peak"] = [before, after]
        columns[f"{name}/gradient_norm"] = [5e8, np.nan]
        columns[f"{name}/weight_norm"] = [100.0, 4.8e6]
        columns[f"{name}/update_ratio"] = [0.0, 1.0]
    note = "the paper's 10^-2 variance is a standard deviation of 0.1"
    return evidence(
        facts=facts(init="normal:0.1", input_kind="pixels", extra={"init_note": note}),
        telemetry=telemetry(columns),
        first_nonfinite=first(
            "forward", "block4_conv2", "Conv2D", kind="inf", inputs=[(0, 8.4e33), (-4e4, 4e4)]
        ),
        weight_stats=kernels(VGG_A, 4e3),
        initial_weight_stats=kernels(VGG_A, 0.1),
        batch_stats={"images": stats(63.0, 132.0), "labels": labels()},
    )


def with_replays(before: Evidence, *results: Counterfactual) -> Evidence:
    return dataclasses.replace(before, counterfactuals=tuple(results))
