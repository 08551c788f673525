"""`locate` on a narrow VGG-A: every layer, every stage."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from small_runs import random_batch, tiny_config, tiny_network

from diagnostics import trace
from diagnostics.diagnosis import FirstNonfinite
from diagnostics.protocol import Batch, LayerFacts, RunFacts, State
from vggrepro.replay_adapter import VggProgram
from vggrepro.step_state import initial_state

CONFIG = tiny_config(init="he-normal")
NETWORK = tiny_network(CONFIG)
LAYERS = tuple(layer.name for layer in NETWORK.weight_layers)


class Batches:
    """As much of a run as `locate` asks for, with batches of random pixels."""

    facts = RunFacts(tuple(LayerFacts(name, "conv") for name in LAYERS), classes=CONFIG.classes)

    def batch(self, step: int) -> Batch:
        images, labels = random_batch(CONFIG, step)
        first = 100 * (step + 1)
        return {"images": images, "labels": labels, "example_ids": np.arange(first, first + 8)}

    def example_names(self, batch: Batch) -> list[tuple[int, str]]:
        return [(int(example), f"{example}.jpg") for example in batch["example_ids"]]


@pytest.fixture(scope="module")
def program() -> VggProgram:
    return VggProgram(CONFIG, None, {}, [])


def located(
    program: VggProgram,
    edit: Callable[[State], None] = lambda state: None,
    poison: Callable[[Batch], None] = lambda batch: None,
) -> FirstNonfinite:
    """Locates the failure of step 0 from an edited state, on a poisoned batch."""
    state, batch = initial_state(CONFIG, NETWORK), Batches().batch(0)
    edit(state)
    poison(batch)
    program.load(state)
    outcome = program.run(batch, 0)
    return trace.locate(Batches(), program, state, batch, 0, outcome)


@pytest.mark.parametrize("layer", LAYERS)
def test_an_overflow_is_found_in_its_layer(program, layer):
    found = located(program, lambda state: state[f"params/{layer}/kernel"].fill(1e38))
    assert (found.stage, found.layer, found.seen_in) == ("forward", layer, "compiled step")
    assert found.op == ("MatMul" if layer in LAYERS[-3:] else "Conv2D")
    assert found.source is not None
    assert found.source.startswith("model.py:") and "in _preactivation: return" in found.source
    assert found.examples == ()
    assert found.inputs[1].maximum == np.float32(1e38)


def test_an_overflow_of_the_update_is_found(program):
    def edit(state: State) -> None:
        # A dead unit whose bias and momentum have run away.
        state["params/fc2/bias"][3] = state["momentum/fc2/bias"][3] = -3e38

    found = located(program, edit)
    assert (found.stage, found.layer, found.op, found.kind) == ("update", "fc2", "AddV2", "inf")
    assert found.source is not None and found.source.startswith("optimizer.py:")
    assert (found.count, found.examples) == (1, ())


def test_an_overflow_of_a_gradient_is_found(program):
    def edit(state: State) -> None:
        # Forwards the tiny first layer keeps everything finite.
        state["params/block1_conv1/kernel"] *= 1e-30
        for layer in ("fc2", "predictions"):
            state[f"params/{layer}/kernel"] *= 1e20

    found = located(program, edit)
    assert (found.stage, found.layer, found.op) == ("backward", "fc2", "MatMul")
    assert found.source is not None and "tf.matmul(values, kernel)" in found.source
    assert found.seen_in == "op-by-op replay"  # the guard first reads fc1's weight gradient
    assert found.examples == ()


def test_one_poisoned_image_is_blamed_by_its_own_rows(program):
    def poison(batch: Batch) -> None:
        batch["images"][5] = 3e38

    found = located(program, poison=poison)
    assert (found.stage, found.layer) == ("forward", "block1_conv1")
    assert (found.examples, found.example_names) == ((105,), ("105.jpg",))


def test_a_bad_pixel(program):
    def poison(batch: Batch) -> None:
        batch["images"][6, 3, 4, 1] = np.inf

    found = located(program, poison=poison)
    assert (found.stage, found.kind, found.count, found.examples) == ("data", "inf", 1, (106,))


def test_a_label_out_of_range(program):
    def poison(batch: Batch) -> None:
        batch["labels"][2] = -1

    found = located(program, poison=poison)
    assert (found.stage, found.count, found.examples) == ("data", 1, (102,))


def test_a_damaged_weight(program):
    def edit(state: State) -> None:
        state["params/block4_conv2/bias"][1] = np.nan

    found = located(program, edit)
    assert (found.stage, found.layer, found.count) == ("weights", "block4_conv2", 1)


def test_nothing_is_written_by_the_replay(program):
    batch = Batches().batch(0)
    program.load(initial_state(CONFIG, NETWORK))
    before = program.state()
    records = trace.trace_healthy(Batches(), program, batch, 0)
    after = program.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    updated = {record.layer for record in records if record.phase == "update"}
    assert set(LAYERS) <= updated
    backward = dict.fromkeys(
        r.layer for r in records if r.phase == "backward" and r.op.startswith(("Conv2DB", "MatMul"))
    )
    assert list(backward) == list(reversed(LAYERS))
