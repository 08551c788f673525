"""TPU multiplication on the CPU: against numpy, and a failure told by whom it belongs to."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
from scripted_run import ScriptedRun
from small_runs import replaced, tiny_config, tiny_network

from diagnostics.diagnose import diagnose
from diagnostics.emulation import Emulation, compare, emulated
from diagnostics.errors import InputError
from diagnostics.incident import write_incident
from vggrepro import cli
from vggrepro.model import forward
from vggrepro.replay_adapter import VggRun
from vggrepro.rounded_products import rounding
from vggrepro.run_directory import RunDirectory
from vggrepro.step_state import initial_state
from vggrepro.train_step import TrainStep

CONFIG = tiny_config(warmup_steps=0, eval_every=0)
NETWORK = tiny_network(CONFIG)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to 8 significant bits, ties to even, by its bits; finite values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return kept.view(np.float32).reshape(values.shape)


def patches(images: np.ndarray, side: int) -> np.ndarray:
    """[N, H, W, side * side * C]: what a 'SAME' convolution of stride 1 sees, float64."""
    margin, (_, height, width, _) = side // 2, images.shape
    padded = np.pad(images.astype(np.float64), ((0, 0), (margin,) * 2, (margin,) * 2, (0, 0)))
    shifted = [
        padded[:, row : row + height, column : column + width]
        for row in range(side)
        for column in range(side)
    ]
    return np.concatenate(shifted, axis=-1)


def convolved(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return patches(images, kernel.shape[0]) @ kernel.astype(np.float64).reshape(
        -1, kernel.shape[-1]
    )


def drawn(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_reference_rounds_as_tensorflow_does():
    values = np.concatenate([drawn(1000, seed=1), np.float32([1 + 2**-8, 1 + 3 * 2**-8])])
    cast = tf.cast(tf.cast(values, tf.bfloat16), tf.float32).numpy()
    assert bfloat16(values).tobytes() == cast.tobytes()
    assert bfloat16(values)[-2:].tolist() == [1.0, 1 + 2**-6]  # ties to even


@pytest.mark.parametrize("compiled", [False, True])
def test_a_convolution_sums_products_of_rounded_operands_in_float32(compiled):
    """Forward and both products of the backward pass, against numpy in float64."""
    images, kernel, above = drawn(2, 6, 6, 8, seed=2), drawn(3, 3, 8, 4, seed=3), None
    above = drawn(2, 6, 6, 4, seed=4)

    def run():
        with tf.GradientTape() as tape:
            left, right = tf.constant(images), tf.constant(kernel)
            tape.watch([left, right])
            operand, product = rounding(tf.bfloat16)
            made = product(tf.nn.conv2d(operand(left), operand(right), 1, "SAME"))
        return made, *tape.gradient(made, [left, right], tf.constant(above))

    made, to_images, to_kernel = (tf.function(run) if compiled else run)()
    a, b, g = bfloat16(images), bfloat16(kernel), bfloat16(above)
    flipped = b[::-1, ::-1].transpose(0, 1, 3, 2)
    kernel_gradient = np.einsum("nhwp,nhwo->po", patches(a, 3), g.astype(np.float64))
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(made, convolved(a, b), **close)
    np.testing.assert_allclose(to_images, convolved(g, flipped), **close)
    np.testing.assert_allclose(to_kernel, kernel_gradient.reshape(kernel.shape), **close)
    assert np.abs(made - convolved(images, kernel)).max() > 1e-2  # unrounded is far off
    raw = np.einsum("nhwp,nhwo->po", patches(a, 3), above.astype(np.float64))
    assert np.abs(to_kernel.numpy() - raw.reshape(kernel.shape)).max() > 1e-2


def test_every_product_of_the_net_is_rounded_and_only_those():
    """The same as float32 with inputs, kernels and signals that bfloat16 holds exactly."""
    state = initial_state(CONFIG, NETWORK)
    parameters = {
        n.removeprefix("params/"): tf.constant(bfloat16(a))
        for n, a in state.items()
        if n.startswith("params/")
    }
    images = tf.constant(bfloat16(drawn(2, 32, 32, 3, seed=5)))
    seen: dict[tf.DType | None, list[np.ndarray]] = {}
    for dtype in (None, tf.bfloat16):
        seen[dtype] = found = []
        forward(
            NETWORK,
            parameters,
            images,
            observe=lambda layer, values, found=found: found.append(values.numpy()),
            multiply_dtype=dtype,
        )
    plain, rounded = seen[None], seen[tf.bfloat16]
    assert plain[0].tobytes() == rounded[0].tobytes()  # nothing to round yet
    assert all((a != b).any() for a, b in zip(plain[1:], rounded[1:], strict=True))
    assert all(np.abs(a - b).max() < 0.1 for a, b in zip(plain, rounded, strict=True))


# Two equal pixels, whose weights nearly cancel: c (1 + r) - c (1 + q). What is left is
# c (r - q) in float32; bfloat16 keeps multiples of 2^-7 here (ties apart).
CANCELS = {
    "only with": (2**-8 * 1.02, 2**-8 * 0.98, 1e21),  # 2^-8 0.04 in float32, 2^-7 rounded
    "only without": (2**-8 * 0.98, 2**-8 * 0.02, 1e22),  # 2^-8 0.96 in float32, 0 rounded
}
FAILS = {"only with": (True, False), "only without": (False, True), "both": (True, True)}


def cancelling(case: str) -> dict[str, np.ndarray]:
    """A state whose second convolution overflows or not, by what the first one leaves.

    From the third convolution on all is zero, so that nothing else is ever large.
    """
    state = {n: np.zeros_like(a) for n, a in initial_state(CONFIG, NETWORK).items()}
    state["schedule/best_error"] = np.array(np.inf, np.float32)
    if case == "both":
        state["params/block2_conv1/kernel"][:] = np.inf
        return state
    more, less, large = CANCELS[case]
    first, second = state["params/block1_conv1/kernel"], state["params/block2_conv1/kernel"]
    first[1, 1, 0, 0], first[1, 1, 1, 0] = 2.0**66 * (1 + more), -(2.0**66) * (1 + less)
    second[1, 1, 0, 0] = large
    return state


@pytest.fixture(scope="module", params=FAILS)
def failed(request, tmp_path_factory):
    """(case, directory) of a run with an incident at step 0, made where it fails."""
    case = request.param
    path = tmp_path_factory.mktemp("emulation") / "run"
    state = cancelling(case)
    batch = {
        "images": np.ones((8, 32, 32, 3), np.float32),
        "labels": np.zeros(8, np.int32),
        "example_ids": np.arange(8),
    }
    with_rounding, _ = FAILS[case]
    dtype = tf.bfloat16 if with_rounding else None
    step = TrainStep(CONFIG, NETWORK, state, dtype)
    result = step(tf.constant(batch["images"]), tf.constant(batch["labels"]))
    assert not result.applied
    manifest = {"status": "stopped_by_guard", "environment": {}}
    with RunDirectory.create(path, CONFIG.to_dict(), manifest) as run:
        run.telemetry.start(step.layout.columns(), 0)
        run.telemetry.append(0, result.telemetry)
        pairs = zip(step.layout.checks(), result.passed, strict=True)
        record = {
            "step": 0,
            "failed_checks": [check._asdict() for check, ok in pairs if not ok],
            "example_names": ["made up"] * 8,
        }
        write_incident(run.incident_directory(0), state=state, batch=batch, record=record)
    return case, path


def test_it_is_told_whose_failure_it_is(failed):
    case, path = failed
    run = VggRun(path)
    chosen, found = compare(run, "tpu", None)
    assert (found.recurs, found.recurs_without) == FAILS[case]
    assert (chosen is run) is (case == "only without")
    diagnosis = found.told_in(diagnose(chosen, budget_seconds=0))
    said = diagnosis.cause.evidence[0]
    assert said == found.sentence()
    assert diagnosis.to_dict()["environment"]["emulation"]["recurs"] is found.recurs
    assert diagnosis.to_dict()["schema"] == 1
    if case != "both":
        place = diagnosis.first_nonfinite
        assert (place.stage, place.layer) == ("forward", "block2_conv1")


@pytest.mark.parametrize("failed", ["only with"], indirect=True)
def test_the_way_back_is_a_change_and_the_command_says_so_too(failed, capsys):
    _, path = failed
    run = emulated(VggRun(path), "tpu")
    back = [one for one in run.changes(0, ()) if (one.kind, one.value) == ("precision", "float32")]
    program = run.program(back[0])
    program.load(run.state_before(0))
    assert program.run(run.batch(0), 0).applied and run.command(back[0]) == ""
    command = ["diagnose-nan", str(path), "--emulate", "tpu", "--budget-seconds", "0", "--json"]
    assert cli.main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    told = {"machine": "tpu", "recurs": True, "recurs_without": False}
    assert answer["environment"]["emulation"] == told


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Emulation("tpu", True, False), "does not recur in float32; it recurs with TPU"),
        (Emulation("tpu", False, True), "recurs in float32; it does not recur with TPU"),
        (Emulation("tpu", True, True), "recurs both in float32 and with TPU"),
        (Emulation("tpu", False, False), "recurs neither in float32 nor with TPU"),
    ],
)
def test_the_sentence(found, words):
    assert words in found.sentence()


@pytest.mark.parametrize("failed", ["only with"], indirect=True)
def test_what_cannot_be_emulated_is_one_clear_line(failed, tmp_path):
    _, path = failed
    run = VggRun(path)
    run.config = replaced(CONFIG, precision="bfloat16")
    with pytest.raises(InputError, match="computes in bfloat16"):
        emulated(run, "tpu")
    foreign = ScriptedRun(lambda kind, value, step: 1.0)
    with pytest.raises(InputError, match="not a run of `vggrepro train`"):
        emulated(foreign, "tpu")
    with RunDirectory.create(tmp_path / "healthy", CONFIG.to_dict(), {"environment": {}}):
        pass
    with pytest.raises(InputError, match="replays a step that failed"):
        compare(VggRun(tmp_path / "healthy"), "tpu", None)
