"""The judge: every kind of cause from hand-made evidence, and abstention."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from evidence_samples import (
    VGG_A,
    evidence,
    facts,
    first,
    founding,
    kernels,
    labels,
    quiet,
    replay,
    stats,
    telemetry,
    with_replays,
)

from diagnostics.cause_rules_numbers import setting_findings
from diagnostics.causes import Evidence, judge
from diagnostics.diagnosis import CAUSE_KINDS, InputRange
from diagnostics.evidence import Finding
from diagnostics.layer_gain import gain_bits, layer_gains
from diagnostics.op_domains import domain_fault, op_name
from diagnostics.protocol import Check, LayerFacts, StepOutcome

MLP = (("dense1", 784), ("dense2", 512), ("logits", 512))
NO_CLASSES: dict[str, Any] = {"classes": None, "chance_loss": None, "loss": "mse"}


def runaway(factor: float = 1e4, steps: int = 8, update_ratio: float = 0.9) -> dict[str, Any]:
    """Columns of a run that is sane at step 0 and grows by `factor` from step 2 on."""
    columns = quiet(steps)
    growth = factor ** np.maximum(np.arange(steps) - 2.0, 0.0)
    for name in columns:
        if name.endswith(("peak", "gradient_norm", "loss", "grad_norm")):
            columns[name] = columns[name] * growth
        if name.endswith("update_ratio"):
            columns[name][2:] = update_ratio
    columns["predictions/peak"][-1] = np.inf
    return columns


def overflow(layer: str = "fc1") -> Any:
    return first("forward", layer, "MatMul", kind="inf", inputs=[(0, 1e30), (-1e9, 1e9)])


def said(cause: Any) -> str:
    return " | ".join(cause.evidence)


# The founding case


def test_founding_case_is_the_initialiser_before_any_replay():
    cause = judge(founding())
    assert cause.kind == "init" and cause.confidence > 0.9
    assert "25,088 x 0.1^2 / 2" in said(cause)
    assert "10^-2 variance" in said(cause), "the paper's ambiguity is explained"
    assert "2.9e8 where guessing has 2.303" in said(cause)


def test_founding_case_after_the_replays_of_facts():
    cause = judge(
        with_replays(
            founding(),
            replay("init", "normal:0.01", True),
            replay("init", "glorot-uniform", True),
            replay("init", "he-normal", False),
            replay("learning_rate", 1e-3, False),
            replay("learning_rate", 1e-5, False),
            replay("input_scale", 1 / 58, False),
            replay("clip_norm", 1.0, True),
        )
    )
    assert cause.kind == "init" and cause.confidence > 0.9
    assert "normal:0.01, init glorot-uniform" in said(cause)
    assert "No learning rate down to 1e-05" in said(cause)


def test_gain_of_a_layer_is_the_textbook_formula():
    gains = {layer.name: layer for layer in layer_gains(founding())}
    assert gains["block4_conv2"].gain == pytest.approx(4.8)
    assert gains["predictions"].gain == pytest.approx(6.4), "no ReLU follows the logits"


# Growth: init, learning rate, data


def test_runaway_from_a_sane_start_is_the_learning_rate():
    cause = judge(
        evidence(
            telemetry=telemetry(runaway()),
            facts=facts(learning_rate=10.0),
            first_nonfinite=overflow(),
        )
    )
    assert cause.kind == "learning_rate"
    assert "10 is large for momentum SGD" in said(cause) and "Step 0 is sane" in said(cause)


def test_ordinary_looking_rate_is_blamed_once_a_smaller_one_survives():
    before = evidence(telemetry=telemetry(runaway()), first_nonfinite=overflow())
    cause = judge(
        with_replays(before, replay("learning_rate", 1e-3, True), replay("init", "he", False))
    )
    assert cause.kind == "learning_rate" and cause.confidence > 0.9


def test_surviving_tiny_rate_does_not_acquit_an_exploding_initialiser():
    cause = judge(
        with_replays(
            founding(),
            replay("init", "glorot-uniform", True),
            replay("learning_rate", 1e-7, True),
        )
    )
    assert cause.kind == "init"


def test_surviving_initialiser_does_not_acquit_the_rate_of_sane_weights():
    before = evidence(
        telemetry=telemetry(runaway()), facts=facts(learning_rate=3.0), first_nonfinite=overflow()
    )
    cause = judge(
        with_replays(
            before, replay("init", "normal:0.01", True), replay("learning_rate", 0.1, True)
        )
    )
    assert cause.kind == "learning_rate"


def test_finite_regression_that_runs_away_is_the_learning_rate():
    """Like a parabola fitted with too large a rate: zero weights, no classes."""
    steps = 20
    before = evidence(
        verdict="diverged",
        facts=facts((("quadratic", 1),), optimizer="SGD", momentum=0.0, **NO_CLASSES),
        telemetry=telemetry(
            {"loss": 90.0 * 1.8 ** np.arange(steps), "grad_norm": 1.4 ** np.arange(steps)}
        ),
        initial_weight_stats={},
        weight_stats={},
        batch_stats={"x": stats(1.9, 3.0), "y": stats(5.0, 9.0)},
        label_range=(0.0, 9.0),
    )
    cause = judge(with_replays(before, replay("learning_rate", 1e-3, True)))
    assert cause.kind == "learning_rate"


def test_unscaled_input_into_sane_weights_is_the_data():
    columns = quiet(3)
    for name in columns:
        if name.endswith("peak"):
            columns[name] = np.array([600.0, 1e15, np.inf])
    columns.update(loss=np.array([1.2e3, 8e14, np.nan]), input_max=np.full(3, 255.0))
    before = evidence(
        telemetry=telemetry(columns),
        first_nonfinite=overflow(),
        batch_stats={"images": stats(130.0, 255.0, low=0.0), "labels": labels()},
    )
    assert judge(before).kind == "data"
    cause = judge(
        with_replays(
            before, replay("input_scale", 1 / 255, True), replay("learning_rate", 1e-3, True)
        )
    )
    assert cause.kind == "data" and "RMS 130, largest 255" in said(cause)


def test_unscaled_input_is_acquitted_when_scaling_does_not_help():
    before = evidence(
        telemetry=telemetry(runaway()),
        facts=facts(learning_rate=10.0),
        first_nonfinite=overflow(),
        batch_stats={"images": stats(63.0, 132.0), "labels": labels()},
    )
    cause = judge(
        with_replays(
            before, replay("input_scale", 1 / 58, False), replay("learning_rate", 0.01, True)
        )
    )
    assert cause.kind == "learning_rate"


def test_integers_are_not_unscaled_inputs():
    tokens = stats(5000.0, 20_000.0, low=0.0, limit=2.0**31 - 1)
    cause = judge(
        evidence(
            telemetry=telemetry(runaway()),
            facts=facts(learning_rate=10.0),
            first_nonfinite=overflow(),
            batch_stats={"tokens": tokens, "labels": labels()},
        )
    )
    assert cause.kind == "learning_rate"


def test_positive_weights_add_up_instead_of_cancelling():
    """Uniform weights in [0, 1): each layer multiplies by fan_in / 2, not by its root."""
    uniform = {f"params/{n}/kernel": stats(0.577, 1.0, low=0.0) for n, _ in MLP}
    found = evidence(facts=facts(MLP), initial_weight_stats=uniform)
    assert layer_gains(found)[1].gain == pytest.approx(0.577 * 512)


def test_gains_start_anew_behind_bounded_activations_and_normalisations():
    spec = [
        LayerFacts("a", "Dense", "a", 1000, 1000, "linear"),
        LayerFacts("n", "BatchNormalization"),
    ]
    spec += [
        LayerFacts("b", "Dense", "b", 1000, 1000, "tanh"),
        LayerFacts("c", "Dense", "c", 1000, 10),
    ]
    wide = {name: stats(1.0) for name in "abc"}
    found = evidence(facts=facts(layers=tuple(spec)), initial_weight_stats=wide)
    assert gain_bits(layer_gains(found)) == (pytest.approx(math.log2(1000) / 2), 0.0)


def test_activation_in_a_layer_of_its_own_counts():
    spec = (LayerFacts("a", "Dense", "a", 200, 9, "linear"), LayerFacts("r", "ReLU"))
    found = evidence(facts=facts(layers=spec), initial_weight_stats={"a": stats(0.1)})
    assert layer_gains(found)[0].gain == pytest.approx(1.0)


# Data and labels


def test_non_finite_input_names_its_rows():
    cause = judge(
        evidence(
            first_nonfinite=first("data", examples=(211,), example_names=("row 211",)),
            batch_stats={"x": stats(1.0, nan=100), "y": labels()},
        )
    )
    assert cause.kind == "data" and cause.confidence > 0.9
    assert "100 NaN" in said(cause) and "row 211" in said(cause)


def test_non_finite_labels_are_the_labels():
    cause = judge(
        evidence(
            facts=facts(**NO_CLASSES),
            first_nonfinite=first("loss"),
            batch_stats={"x": stats(1.0), "y": stats(1.0, nan=1)},
            label_range=(math.nan, math.nan),
        )
    )
    assert cause.kind == "labels"


@pytest.mark.parametrize(("low", "high"), [(0.0, 10.0), (-1.0, 9.0), (1.0, 10.0)])
def test_labels_out_of_range(low, high):
    refused = StepOutcome(False, (Check("data", "", "labels"),), {})
    cause = judge(evidence(first_nonfinite=first("data"), outcome=refused, label_range=(low, high)))
    assert cause.kind == "labels" and f"from {low:g} to {high:g}" in said(cause)
    assert ("subtract 1" in said(cause)) == (low == 1)


def test_probabilities_beyond_1_are_the_labels():
    cause = judge(
        evidence(
            verdict="diverged",
            facts=facts(classes=None, chance_loss=0.69, loss="binary_crossentropy"),
            telemetry=telemetry({"loss": -(2.0 ** np.arange(20))}),
            batch_stats={"x": stats(0.3, 1.0), "y": stats(120.0, 255.0, low=0.0)},
            label_range=(0.0, 255.0),
        )
    )
    assert cause.kind == "labels" and "no lower bound" in said(cause)


def test_regression_targets_are_not_labels_out_of_range():
    cause = judge(
        evidence(
            facts=facts(**NO_CLASSES),
            batch_stats={"x": stats(1.0), "y": stats(3.0, 50.0)},
            label_range=(-50.0, 50.0),
        )
    )
    assert cause.kind == "unknown"


def test_outlier_is_seen_against_the_steps_before():
    cause = judge(
        with_replays(
            evidence(
                telemetry=telemetry(quiet(40)),
                first_nonfinite=overflow("block2_conv1"),
                batch_stats={"images": stats(1e27, 1e30), "labels": labels()},
            ),
            replay("without_examples", (7,), True),
        )
    )
    assert cause.kind == "data" and "input of 1e30" in said(cause)
    assert "not scaled" not in said(cause), "one outlier does not make the others unscaled"


def test_outlier_one_step_before_the_failure_is_found():
    columns = quiet(16)
    columns["input_max"][14] = 1e25
    for name in columns:
        if name.endswith("gradient_norm") or name == "grad_norm":
            columns[name][14:] = 1e24
        if name.endswith("weight_norm"):
            columns[name][15] = 1e22
        if name.endswith("update_ratio"):
            columns[name][15] = 1.0
    columns["fc1/peak"][15] = np.inf
    before = evidence(telemetry=telemetry(columns), first_nonfinite=overflow())
    assert before.onset.step == 14
    cause = judge(with_replays(before, replay("learning_rate", 1e-3, True)))
    assert cause.kind == "data" and "Step 14, where it began" in said(cause)


# Formulas


@pytest.mark.parametrize(
    ("op", "inputs", "words"),
    [
        ("Log", [(-3.2, 5.0)], "the logarithm at -3.2"),
        ("Log", [(0.0, 1.0)], "the logarithm at 0"),
        ("Log1p", [(-1.5, 1.0)], "1 + x at -1.5"),
        ("RealDiv", [(1.0, 2.0), (0.0, 3.0)], "a division by 0"),
        ("Reciprocal", [(0.0, 3.0)], "a division by 0"),
        ("Sqrt", [(-1e-6, 3.0)], "square root of -1e-6"),
        ("SqrtGrad", [(0.0, 3.0), (0.1, 0.1)], "gradient of a square root at 0"),
        ("Pow", [(-2.0, 3.0), (0.5, 0.5)], "a power of -2 with exponent 0.5"),
        ("Pow", [(0.0, 3.0), (-0.5, -0.5)], "0 to the power of -0.5"),
        ("Pow", [(0.0, 1e4), (12.0, 12.0)], "1e4 to the power of 12"),
        ("Lgamma", [(0.0, 3.0)], "lgamma at 0"),
        ("MatrixInverse", [(-1.0, 3.0)], "singular"),
        ("Exp", [(-4.0, 200.0)], "exp of 200"),
        ("Acos", [(-1.0, 1.2)], "acos of a number outside"),
    ],
)
def test_formula_in_the_loss_outside_its_domain(op, inputs, words):
    stage = "backward" if op == "SqrtGrad" else "loss"
    cause = judge(evidence(first_nonfinite=first(stage, None, op, inputs=inputs)))
    assert cause.kind == "loss_formula" and cause.confidence > 0.8
    assert words in said(cause)


@pytest.mark.parametrize("op", ["Log", "RealDiv", "Exp", "Sqrt", "Pow", "MatMul", "Mul", "Sum"])
def test_op_inside_its_domain_is_not_blamed(op):
    place = first("loss", None, op, inputs=[(0.5, 2.0), (0.5, 2.0)])
    assert domain_fault(place, half=False) is None


def test_the_same_formula_in_a_layer_is_the_architecture():
    cause = judge(
        evidence(first_nonfinite=first("forward", "fc1", "RealDiv", inputs=[(0, 1), (0.0, 2.0)]))
    )
    assert cause.kind == "architecture" and "layer fc1" in said(cause)


def test_stacked_exponentials_are_the_architecture():
    spec = tuple(
        LayerFacts(f"d{i}", "Dense", f"params/d{i}/kernel", 5, 5, "exponential") for i in range(4)
    )
    cause = judge(
        evidence(
            facts=facts(layers=spec, optimizer="Adam", learning_rate=1e-3),
            first_nonfinite=first("forward", "d1", "Exp", kind="inf", inputs=[(-40.0, 2e5)]),
        )
    )
    assert cause.kind == "architecture" and cause.confidence > 0.8


def test_logarithm_after_an_explosion_is_not_the_loss_formula():
    """log(softmax) meets 0 because the logits are 5e8: the initialiser made them so."""
    place = first("loss", None, "Log", kind="inf", inputs=[(0.0, 1.0)])
    columns = {f"{n}/peak": [4.8**i] for i, (n, _) in enumerate(VGG_A)}
    columns["predictions/peak"] = [4.8e8]
    recorded = telemetry({**columns, "loss": [np.inf], "input_max": [1.0], "input_min": [-1.0]})
    found = evidence(
        telemetry=recorded,
        initial_weight_stats=kernels(VGG_A, 0.1),
        first_nonfinite=place,
    )
    cause = judge(with_replays(found, replay("init", "glorot-uniform", True)))
    assert cause.kind == "init"


def test_log_of_negative_labels_blames_the_labels():
    cause = judge(
        evidence(
            facts=facts(**NO_CLASSES),
            first_nonfinite=first("loss", None, "Log1p", inputs=[(-7.0, 30.0)]),
            batch_stats={"x": stats(1.0), "y": stats(10.0, 30.0, low=-7.0)},
            label_range=(-7.0, 30.0),
        )
    )
    assert cause.kind == "labels"


def test_a_loss_without_lower_bound_is_the_loss_formula():
    before = evidence(
        verdict="diverged",
        facts=facts(**NO_CLASSES),
        telemetry=telemetry(
            {"loss": -(10.0 ** np.arange(12.0)), "grad_norm": 3.0 ** np.arange(12)}
        ),
        batch_stats={"x": stats(1.0), "y": stats(1.0)},
        label_range=(-4.0, 4.0),
    )
    cause = judge(with_replays(before, replay("learning_rate", 1e-4, True)))
    assert cause.kind == "loss_formula" and "no lower bound" in said(cause)


def test_it_still_has_none_when_its_last_value_overflowed():
    losses = np.r_[-(10.0 ** np.arange(11.0)), -np.inf]
    before = evidence(
        facts=facts(**NO_CLASSES),
        telemetry=telemetry({"loss": losses, "grad_norm": 3.0 ** np.arange(12)}),
        first_nonfinite=first("loss", None, "Square", kind="inf", inputs=[(-1e20, 1e20)]),
        batch_stats={"x": stats(1.0), "y": stats(1.0)},
        label_range=(-4.0, 4.0),
    )
    assert judge(with_replays(before, replay("learning_rate", 1e-4, True))).kind == "loss_formula"


def test_a_class_number_refused_of_one_of_several_outputs():
    refused = StepOutcome(False, (Check("data", "", "labels"),), {})
    cause = judge(
        evidence(
            facts=facts(**NO_CLASSES),
            outcome=refused,
            first_nonfinite=first("data"),
            batch_stats={"x": stats(1.0), "labels/a": labels(), "labels/b": labels()},
            label_range=None,
        )
    )
    assert cause.kind == "labels" and "'labels/b' runs from 0 to 9" in said(cause)


def test_a_constant_too_large_for_float16_is_the_precision():
    place = first("forward", "pool", "Cast", kind="inf", inputs=[(-1e9, -1e9)])
    cause = judge(evidence(facts=facts(precision="mixed_float16"), first_nonfinite=place))
    assert cause.kind == "precision" and "infinity of 1e9" in said(cause)


def test_a_loss_weight_out_of_proportion_is_the_loss_formula():
    columns = {
        "loss": np.array([3e16, 1e28, np.inf]),
        "grad_norm": np.array([1e9, 1e15, np.inf]),
        "out/peak": np.array([1.2, 1e13, 1e20]),
    }
    weighted = {**NO_CLASSES, "loss": "mse", "extra": {"loss weights": "1e+14, 1"}}
    cause = judge(
        evidence(
            facts=facts((("out", 64),), **weighted),
            telemetry=telemetry(columns),
            initial_weight_stats={},
            first_nonfinite=first("loss", None, "Square", inputs=[(-1e20, 1e20)]),
            batch_stats={"x": stats(1.0), "y": stats(4.0, 9.0)},
        )
    )
    assert cause.kind == "loss_formula" and "weighted with 1e+14, 1" in said(cause)


def test_a_penalty_that_throws_the_weights_across_zero():
    given = {"optimizer": "SGD", "learning_rate": 0.1, "extra": {"l2 penalty": "100"}}
    cause = judge(
        evidence(verdict="diverged", facts=facts(**given), telemetry=telemetry(runaway()))
    )
    assert cause.kind == "loss_formula" and "20 times themselves a step" in said(cause)


def test_formula_that_fails_on_one_ordinary_row_is_the_formulas_fault():
    place = first("forward", "unit", "RealDiv", inputs=[(0, 1), (0.0, 4.0)], examples=(40,))
    cause = judge(
        with_replays(evidence(first_nonfinite=place), replay("without_examples", (40,), True))
    )
    assert cause.kind == "architecture"


@pytest.mark.parametrize(("loss", "kind"), [("mse", "labels"), ("my_loss", "loss_formula")])
def test_loss_out_of_proportion_to_outputs_and_labels(loss, kind):
    columns = {
        "loss": np.array([3e16, 1e28, np.inf]),
        "grad_norm": np.array([1e9, 1e15, np.inf]),
        "out/peak": np.array([1.2, 1e13, 1e20]),
    }
    cause = judge(
        evidence(
            facts=facts((("out", 64),), **{**NO_CLASSES, "loss": loss}),
            telemetry=telemetry(columns),
            initial_weight_stats={},
            first_nonfinite=first("loss", None, "Square", inputs=[(-1e20, 1e20)]),
            batch_stats={"x": stats(1.0), "y": stats(4.0, 9.0)},
        )
    )
    assert cause.kind == kind and "outputs are at most 1.2" in said(cause)


def test_single_huge_target_is_the_labels():
    cause = judge(
        with_replays(
            evidence(
                facts=facts(**NO_CLASSES),
                first_nonfinite=first("loss", None, "Square", kind="inf", inputs=[(-4, 1e25)]),
                batch_stats={"x": stats(1.0), "y": stats(1.8e24, 1e25, low=0.0, size=32)},
                label_range=(0.0, 1e25),
            ),
            replay("without_examples", (77,), True),
        )
    )
    assert cause.kind == "labels" and "1e25" in said(cause)


def test_unscaled_targets_under_an_ordinary_rate_are_the_data():
    columns = runaway()
    columns["loss"] = columns["loss"] * 1e10
    before = evidence(
        telemetry=telemetry(columns),
        facts=facts(**NO_CLASSES),
        first_nonfinite=overflow(),
        batch_stats={"x": stats(1.0), "y": stats(2e5, 4e5)},
        label_range=(0.0, 4e5),
    )
    cause = judge(with_replays(before, replay("learning_rate", 1e-3, True)))
    assert cause.kind == "data" and "targets 'y' are not scaled" in said(cause)


def test_recurrent_layer_that_overflows_is_the_architecture():
    spec = (LayerFacts("rnn", "SimpleRNN", None, activation="relu"), *facts(MLP).layers)
    cause = judge(
        evidence(
            facts=facts(layers=spec),
            initial_weight_stats={},
            telemetry=telemetry(quiet(1)),
            first_nonfinite=first("forward", "rnn", "MatMul", inputs=[(0, 3e38), (-1, 1)]),
        )
    )
    assert cause.kind == "architecture" and "every time step" in said(cause)


def masked(**changes: Any) -> Any:
    """Softmax over a row that a mask has filled with -Inf."""
    place = first("forward", "attention", "Softmax")
    row = InputRange("input 0", (16, 10), -1.0, 1.0, 20)
    return evidence(first_nonfinite=dataclasses.replace(place, inputs=(row,)), **changes)


def test_softmax_over_a_masked_row_is_the_architecture_and_in_float16_precision():
    cause = judge(masked())
    assert cause.kind == "architecture" and "a mask of -Inf" in said(cause)
    half = masked(facts=facts(precision="mixed_float16"))
    assert judge(with_replays(half, replay("precision", "float32", True))).kind == "precision"


def test_ctc_without_an_alignment_is_the_labels():
    place = first("loss", None, "CTCLossV3", kind="inf", inputs=[(-3, 3), (0, 9)])
    assert judge(evidence(first_nonfinite=place)).kind == "labels"


def test_schedule_that_grows_is_the_learning_rate():
    columns = runaway()
    columns["lr"] = 0.01 * 3.0 ** np.arange(8)
    cause = judge(evidence(telemetry=telemetry(columns), first_nonfinite=overflow()))
    assert cause.kind == "learning_rate" and "from 0.01 to 21.9" in said(cause)


# Number formats and the optimizer


def test_float16_loses_the_optimizers_epsilon():
    cause = judge(
        evidence(
            facts=facts(precision="float16", optimizer="Adam", optimizer_epsilon=1e-8),
            first_nonfinite=first("update", "conv", "RealDiv", inputs=[(0, 0), (0, 0)]),
        )
    )
    assert cause.kind == "precision" and "epsilon 1e-08" in said(cause)


def test_float16_arrays_are_recognised_without_being_told():
    half = stats(0.5, 2.0, limit=65504.0)
    cause = judge(
        evidence(
            facts=facts(optimizer="Adam", optimizer_epsilon=1e-8),
            weight_stats={"conv/kernel": half},
            first_nonfinite=first("update", "conv", "RealDiv", inputs=[(0, 0), (0, 0)]),
        )
    )
    assert cause.kind == "precision"


def test_zero_epsilon_in_float32_is_the_optimizer():
    cause = judge(
        evidence(
            facts=facts(optimizer="RMSprop", optimizer_epsilon=0.0),
            first_nonfinite=first("update", "conv", "RealDiv", inputs=[(0, 0), (0, 0)]),
        )
    )
    assert cause.kind == "optimizer" and cause.confidence > 0.9


def test_float16_overflow_is_precision_when_float32_survives():
    columns = quiet(60)
    columns["fc1/peak"] = np.geomspace(5.0, 3e5, 60)
    columns["fc1/peak"][-1] = np.inf
    before = evidence(
        telemetry=telemetry(columns),
        facts=facts(precision="mixed_float16"),
        first_nonfinite=first("forward", "fc1", "MatMul", kind="inf", inputs=[(0, 900), (-9, 9)]),
    )
    cause = judge(with_replays(before, replay("precision", "float32", True)))
    assert cause.kind == "precision" and "65504" in said(cause)
    cause = judge(
        with_replays(
            before, replay("precision", "float32", False), replay("learning_rate", 1e-3, True)
        )
    )
    assert cause.kind == "learning_rate"


def test_a_failure_that_only_emulated_multiplication_shows_is_precision():
    before = evidence(
        facts=facts(precision="float32, multiplied in bfloat16"),
        first_nonfinite=first("forward", "fc1", "MatMul", kind="inf", inputs=[(0, 9e20), (-9, 9)]),
    )
    assert judge(with_replays(before, replay("precision", "float32", True))).kind == "precision"
    assert judge(with_replays(before, replay("precision", "float32", False))).kind != "precision"


def test_momentum_of_one_is_the_optimizer():
    cause = judge(
        evidence(
            verdict="diverged",
            facts=facts(momentum=1.0),
            telemetry=telemetry(runaway()),
        )
    )
    assert cause.kind == "optimizer" and "Momentum 1" in said(cause)


def test_weight_decay_that_flips_the_weights_is_the_optimizer():
    before = evidence(
        telemetry=telemetry(runaway()),
        facts=facts(learning_rate=0.1, weight_decay=40.0, momentum=0.0),
        first_nonfinite=overflow(),
    )
    cause = judge(with_replays(before, replay("learning_rate", 0.01, True)))
    assert cause.kind == "optimizer" and "4 times themselves" in said(cause)


# Weights, hardware, abstention


def test_damaged_weights():
    cause = judge(
        evidence(
            first_nonfinite=first("weights", "fc1"),
            weight_stats={"params/fc1/kernel": stats(0.1, nan=1)},
        )
    )
    assert cause.kind == "weights" and "1 non-finite number before step 9" in said(cause)


def test_overwritten_weights_that_are_finite():
    columns = quiet(20)
    columns["fc1/weight_norm"][-1], columns["fc1/update_ratio"][-1] = 1e30, 1e-30
    columns["fc1/peak"][-1] = np.inf
    cause = judge(evidence(telemetry=telemetry(columns), first_nonfinite=overflow()))
    assert cause.kind == "weights" and "overwritten" in said(cause)


def test_a_failure_that_did_not_recur_is_the_hardware():
    cause = judge(evidence(verdict="not_reproduced", first_nonfinite=overflow()))
    assert cause.kind == "hardware"


def test_nothing_to_go_by_is_unknown():
    assert judge(evidence()).kind == "unknown"
    assert judge(evidence(first_nonfinite=first("backward", "fc1", "Mul"))).kind == "unknown"


def test_conflicting_evidence_is_unknown(monkeypatch):
    rivals = [Finding("init", 4.0, "a"), Finding("data", 4.0, "b")]
    monkeypatch.setattr("diagnostics.causes._findings", lambda evidence: rivals)
    cause = judge(evidence())
    assert cause.kind == "unknown" and "does not single out" in cause.evidence[0]
    assert {"init: a", "data: b"} <= set(cause.evidence)


# Stalls


def stalled(**changes: Any) -> Evidence:
    steps = 100
    columns = quiet(steps, MLP)
    columns["loss"] = np.full(steps, math.log(10))
    columns.update({name: np.asarray(v) for name, v in changes.pop("columns", {}).items()})
    return evidence(
        **{
            "verdict": "stalled",
            "facts": facts(MLP),
            "telemetry": telemetry(columns),
            "weight_stats": kernels(MLP, None),
            "initial_weight_stats": kernels(MLP, None),
            **changes,
        }
    )


def test_vanishing_signal_is_the_initialiser():
    cause = judge(
        with_replays(
            stalled(
                initial_weight_stats=kernels(MLP, 0.001),
                columns={"logits/peak": np.full(100, 1e-5)},
            ),
            replay("init", "glorot-uniform", True),
        )
    )
    assert cause.kind == "init" and "shrink the signal" in said(cause)
    assert "init glorot-uniform" in said(cause)


def test_equal_weights_are_the_initialiser():
    same = stats(0.01, 0.01, low=0.01)
    cause = judge(stalled(initial_weight_stats={"params/dense1/kernel": same}))
    assert cause.kind == "init" and "stay the same" in said(cause)


def test_layer_killed_by_an_update_is_the_learning_rate():
    dead = np.r_[np.full(10, 5.0), np.full(90, -1.0)]
    recorded = stalled(
        columns={"dense2/preactivation_max": dead, "dense2/preactivation_min": dead - 9}
    )
    cause = judge(recorded)
    assert cause.kind == "learning_rate" and "dead since step 10" in said(cause)


def test_rate_that_moves_nothing_is_the_learning_rate():
    slow = {f"{n}/update_ratio": np.full(100, 1e-8) for n, _ in MLP}
    cause = judge(
        with_replays(
            stalled(columns=slow, facts=facts(MLP, learning_rate=1e-7)),
            replay("learning_rate", 1e-2, True),
            replay("init", "he", False),
        )
    )
    assert cause.kind == "learning_rate" and "1e-8" in said(cause)


def test_zero_gradient_under_a_live_output_is_the_loss_formula():
    cause = judge(stalled(columns={"grad_norm": np.zeros(100)}))
    assert cause.kind == "loss_formula" and "nothing connects" in said(cause)


@pytest.mark.parametrize(("rows", "named"), [(1, True), (16, False)])
def test_batch_normalisation_of_one_row_is_the_architecture(rows, named):
    plain = facts(MLP, batch_size=rows)
    norm = LayerFacts("norm", "BatchNormalization")
    known = dataclasses.replace(plain, layers=(*plain.layers, norm))
    unreached = {"dense1/gradient_norm": np.zeros(100)}
    cause = judge(stalled(columns=unreached, facts=known))
    assert (cause.kind == "architecture" and "batch of one example" in said(cause)) is named


def test_an_impossible_setting_whose_repair_survives_explains_broken_weights():
    broken = {"params/dense1/kernel": stats(1.0, nan=4)}
    known = facts(MLP, extra={"beta_1": "1"})
    seen = evidence(facts=known, weight_stats=broken, first_nonfinite=first("weights", "dense1"))
    assert judge(seen).kind == "weights"
    mended = with_replays(seen, replay("optimizer_setting", ("beta_1", 0.9), True))
    assert judge(mended).kind == "optimizer" and "beta_1 is 1" in said(judge(mended))


def test_a_repair_speaks_once_however_many_settings_are_bad():
    known = facts(MLP, extra={"beta_1": "1", "beta_2": "1"})
    mended = with_replays(evidence(facts=known), replay("optimizer_setting", ("beta_1", 0.9), True))
    found = [one for one in setting_findings(mended) if "same steps survive" in one.sentence]
    assert len(found) == 1


def test_constant_input_is_the_data():
    cause = judge(stalled(batch_stats={"x": stats(0.0, 0.0), "y": labels()}))
    assert cause.kind == "data"


# Properties of every judgement


def test_confidence_and_kind_are_in_the_schema():
    for found in (founding(), evidence(), stalled()):
        cause = judge(found)
        assert cause.kind in CAUSE_KINDS and 0 <= cause.confidence <= 0.98
        assert len(set(cause.evidence)) == len(cause.evidence) > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [("loss/Log_1", "log"), ("Log", "log"), ("tf.math.Log:0", "log"), ("Log1p_2", "log1p")],
)
def test_op_names(name, kind):
    assert op_name(name) == kind


@pytest.mark.parametrize(("lowest", "cause"), [(0.6, "learning_rate"), (2.25, "data")])
def test_a_run_that_had_learnt_from_its_inputs_is_not_blamed_on_their_scale(lowest, cause):
    columns = quiet(60)
    columns["loss"] = np.r_[np.linspace(2.3, lowest, 30), np.full(24, lowest)]
    columns["loss"] = np.r_[columns["loss"], [lowest, 1.5, 3, 900, 7e8, np.nan]]
    columns["grad_norm"][-6:] = [3, 200, 2e3, 1e5, 7e9, np.nan]
    for name in ("input_max", "input_min"):
        columns[name] = 40 * columns[name]
    for name, _ in VGG_A:
        columns[f"{name}/gradient_norm"][-6:] = [1, 60, 500, 3e4, 2e9, np.nan]
        columns[f"{name}/peak"][-6:] = [5, 9, 60, 2e3, 1e9, np.inf]
    found = judge(
        evidence(
            telemetry=telemetry(columns),
            first_nonfinite=first("forward", "block4_conv1", "Conv2D", inputs=[(0, 1e30)]),
            batch_stats={"images": stats(60.0, 128.0), "labels": labels()},
        )
    )
    assert found.kind == cause
