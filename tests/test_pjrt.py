"""The step under JAX: the numbers of TensorFlow's engine, its guard, its resume, its incidents."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
from jax_devices import eight_virtual_devices
from small_runs import (
    random_batch,
    random_tensors,
    replaced,
    run_outcome,
    tiny_config,
    tiny_data,
    tiny_network,
    tiny_step,
)
from tensorflow.python.framework import config as tensorflow_config

from diagnostics.diagnose import diagnose
from diagnostics.errors import InputError, StoppedByGuard
from diagnostics.guard_self_test import self_test
from diagnostics.snapshot import hash_arrays
from vggrepro import trainer
from vggrepro.loss_scale import SCALE
from vggrepro.replay_adapter import VggRun
from vggrepro.step_state import initial_state
from vggrepro.verification import verify

CONFIG = tiny_config(strategy="pjrt")
NETWORK = tiny_network(CONFIG)


@pytest.fixture(scope="module", autouse=True)
def make(tmp_path_factory):
    """(config) -> PjrtStep, over 8 virtual devices; the same program is compiled once.

    Without op determinism, which other tests of this process may have turned on:
    TensorFlow lowers nothing under it.
    """
    jax = eight_virtual_devices()
    from jax.experimental.compilation_cache import compilation_cache

    from vggrepro.pjrt_step import PjrtStep

    tensorflow_config.disable_op_determinism()
    # Not for other modules: a program compiled for a TPU that is not there cannot be read back.
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield lambda config: PjrtStep(config, NETWORK, initial_state(config, NETWORK))
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    tf.config.experimental.enable_op_determinism()


@pytest.fixture(scope="module")
def step(make):
    return make(CONFIG)


@pytest.fixture(scope="module")
def plain():
    return tiny_step(CONFIG)


def fed(step, images, labels):
    return step(tf.constant(images), tf.constant(labels))


def test_eight_devices_give_the_losses_of_tensorflow_over_50_steps(step, plain):
    slow = replaced(CONFIG, lr=1e-3)  # so that rounding is not amplified by the training itself
    step.reconfigure(slow)
    plain.reconfigure(slow)
    start = initial_state(CONFIG, NETWORK)
    step.load(start)
    plain.load(start)
    for number in range(50):
        batch = random_batch(CONFIG, seed=number)
        ours, theirs = fed(step, *batch), fed(plain, *batch)
        assert ours.applied and theirs.applied
        assert ours.telemetry[0] == pytest.approx(theirs.telemetry[0], rel=1e-3, abs=1e-4)
    for name, array in plain.state().items():
        np.testing.assert_allclose(step.state()[name], array, rtol=1e-2, atol=1e-4, err_msg=name)


def test_the_self_test_sees_every_check_fire(step, plain):
    batch = random_tensors(CONFIG)
    before = hash_arrays(step.state())
    assert self_test(step, *batch) == self_test(plain, *batch)
    assert hash_arrays(step.state()) == before


@pytest.mark.parametrize("row", [0, 5])
def test_a_bad_row_stops_all_replicas_and_names_its_own(step, row):
    step.load(initial_state(CONFIG, NETWORK))
    images, labels = random_batch(CONFIG)
    images[row, 3, 3, 1] = np.nan
    before = hash_arrays(step.state())
    result = fed(step, images, labels)
    assert not result.applied
    assert result.healthy == [index != row for index in range(8)]
    assert hash_arrays(step.state()) == before
    assert not fed(step, *random_batch(CONFIG)).applied  # refused until rearmed
    step.rearm()
    assert fed(step, *random_batch(CONFIG)).applied


def test_the_next_batch_goes_to_the_devices_in_another_thread(make, monkeypatch):
    step = make(CONFIG)
    parts = zip(*(random_batch(CONFIG, seed) for seed in range(3)), strict=True)
    images, labels = (np.stack(part) for part in parts)
    batches = tf.data.Dataset.from_tensor_slices({"images": images, "labels": labels})
    place, threads, ran = step._sharded.sharded, [], []

    def watched_place(*arrays):
        threads.append(threading.get_ident())
        return place(*arrays)

    def program(state, refused, rate, images, labels):
        ran.append(np.asarray(images))
        return state, refused, True, np.ones(1), np.zeros(1), np.ones(8)

    monkeypatch.setattr(step._sharded, "sharded", watched_place)
    monkeypatch.setattr(step._sharded, "program", program)
    for batch in step.ahead(batches):
        step(batch["images"], batch["labels"])
    assert np.array_equal(ran, images)
    assert len(threads) == 3 and threading.get_ident() not in threads
    assert not step._placed


def test_a_batch_must_divide_over_the_devices(make):
    with pytest.raises(InputError, match="batch size 6 does not divide over 8 devices"):
        make(replaced(CONFIG, batch_size=6))


def test_resume_is_exact(tmp_path):
    data = tiny_data(tmp_path)
    config = tiny_config(data, strategy="pjrt", classes=0)
    trainer.train(config, tmp_path / "whole")
    trainer.train(replaced(config, steps=4), tmp_path / "parts")
    trainer.train(config, tmp_path / "parts", resume=True)
    whole, parts = run_outcome(tmp_path / "whole"), run_outcome(tmp_path / "parts")
    assert whole["weights"] == parts["weights"] and whole["state"] == parts["state"]


def test_a_run_is_verified_by_jax_itself_and_else_the_engine_is_said_to_differ(
    tmp_path, monkeypatch
):
    config = tiny_config(tiny_data(tmp_path), strategy="pjrt", classes=0, steps=3)
    trainer.train(config, tmp_path / "run")
    found = verify(tmp_path / "run")
    assert found.identical and found.compared["steps"] == 3
    monkeypatch.setitem(sys.modules, "jax", None)
    found = verify(tmp_path / "run", end=1)
    assert not found.identical
    assert any("engine: JAX when recorded, TensorFlow now" in line for line in found.environment)


def test_an_incident_is_diagnosed_on_the_cpu_by_tensorflow(tmp_path, monkeypatch):
    config = tiny_config(
        tiny_data(tmp_path), strategy="pjrt", classes=0, init="normal:1", eval_every=0
    )
    with pytest.raises(StoppedByGuard, match="on all of 8 replicas"):
        trainer.train(config, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "jax", None)  # another machine need not have it
    found = diagnose(VggRun(tmp_path / "run"), budget_seconds=0)
    assert found.verdict in ("reproduced", "replay_differs")
    assert found.first_nonfinite.stage == "forward"
    assert found.cause.kind == "init"


def test_float16_skips_as_tensorflow_does_and_a_nan_is_still_an_incident(make):
    """Scaled to overflow on all replicas: the update is left out, the scale halves, no more."""
    config = replaced(CONFIG, precision="float16")
    step, plain = make(config), tiny_step(config)
    start = {**initial_state(config, NETWORK), SCALE: np.array(2.0**24, np.float32)}
    step.load(start)
    plain.load(start)
    batch = random_batch(CONFIG)
    ours, theirs = fed(step, *batch), fed(plain, *batch)
    named = dict(zip(step.layout.columns(), ours.telemetry.tolist(), strict=True))
    assert ours.applied and theirs.applied and named["skipped"] == 1
    assert ours.telemetry == pytest.approx(theirs.telemetry, rel=2e-2, abs=1e-2)
    assert hash_arrays(step.state()) == hash_arrays(plain.state())
    assert step.state()[SCALE] == 2.0**23 and ours.healthy == [True] * 8
    step.load({**start, SCALE: np.array(1.0, np.float32)})
    assert fed(step, *batch).applied and step.state()["counters/step"] == 1
    assert self_test(step, *random_tensors(CONFIG)) == len(step.layout.checks())
