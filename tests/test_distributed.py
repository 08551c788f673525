"""Several replicas and workers: one training, one verdict, one run directory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from distributed_runs import BAD_ROW, BAD_STEP
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

from diagnostics.diagnose import diagnose
from diagnostics.errors import GuardFailure, InputError
from diagnostics.guard_self_test import self_test
from diagnostics.incident import read_incident
from diagnostics.protocol import Check
from diagnostics.replay import state_at
from diagnostics.snapshot import hash_arrays
from vggrepro import replica_evidence
from vggrepro.cluster import cluster_of, meet
from vggrepro.engine_record import replicas_at, with_engine
from vggrepro.evaluation import Evaluator
from vggrepro.incident_report import save_incident
from vggrepro.replay_adapter import VggRun
from vggrepro.run_directory import RunDirectory
from vggrepro.train_step import TrainStep
from vggrepro.verification import verify
from vggrepro.workers import Workers

SCENARIOS = (
    *("one", "two", "four", "workers", "four-workers", "poisoned"),
    *("killed", "killed-on", "stopped", "stopped-on", "torn", "float16"),
)
# Float32 rounding, over six steps at learning rate 0.01; measured: 3e-7.
TOLERANCE = 1e-5


class Runs:
    """What became of every scenario of distributed_runs.py."""

    def __init__(self, work: Path, codes: dict[str, list[int]]) -> None:
        self.work, self.codes = work, codes

    def outcome(self, name: str) -> dict[str, Any]:
        return run_outcome(self.work / name)

    def losses(self, name: str) -> list[float]:
        records = self.outcome(name)["metrics"]
        return [record.get("loss", record.get("val_loss")) for record in records]

    def errors(self, name: str, worker: int) -> list[str]:
        lines = (self.work / f"{name}.{worker}.err").read_text().splitlines()
        return [line for line in lines if line.startswith(("error", "internal", "Traceback"))]

    def incident(self, name: str):
        return read_incident(self.work / name / "incidents" / f"step-{BAD_STEP:08d}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    work = tmp_path_factory.mktemp("distributed")
    script = Path(__file__).with_name("distributed_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_data(work)), str(work), *SCENARIOS],
        capture_output=True,
        text=True,
        timeout=1500,  # seconds on a machine that is busy with other things
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Runs(work, json.loads(done.stdout.splitlines()[-1]))


def test_any_number_of_replicas_and_workers_trains_to_the_same_losses(runs):
    for name in ("two", "four", "workers", "four-workers"):
        assert set(runs.codes[name]) == {0}
        assert runs.losses(name) == pytest.approx(runs.losses("one"), rel=TOLERANCE)
        assert runs.outcome(name)["final_metrics"]["val_images"] == 9


def test_the_bits_depend_on_the_number_of_replicas_alone(runs):
    """Not on repeating, nor on which worker has them, nor on how many steps a call takes.

    The workers run three steps a call, the replicas of one process one.
    """
    assert runs.outcome("two") == runs.outcome("workers") == runs.outcome("stopped")
    assert runs.outcome("four") == runs.outcome("four-workers")


def test_a_replay_on_one_device_has_the_bits_of_the_replicas(runs):
    for name in ("four", "workers"):
        found = verify(runs.work / name)
        assert found.identical, found.first_difference
        assert found.compared == {"steps": 6, "validations": 2, "states": 2}


def test_one_bad_replica_stops_all_and_is_named_with_its_worker_and_examples(runs):
    """In the middle of a call of three steps."""
    assert runs.codes["poisoned"] == [3, 3]
    incident = runs.incident("poisoned")
    assert np.argwhere(np.isnan(incident.batch["images"])).tolist() == [[BAD_ROW, 3, 3, 0]]
    ids = incident.batch["example_ids"].tolist()
    assert incident.record["replicas"] == [{"replica": 1, "worker": 1, "example_ids": ids[4:]}]
    (said,) = runs.errors("poisoned", 0)
    assert "input is not finite" in said and "on replica 1 of 2 replicas (worker 1)" in said
    (said,) = runs.errors("poisoned", 1)
    assert f"step {BAD_STEP}: input is not finite" in said


def test_the_refused_step_changed_nothing(runs):
    with RunDirectory.open(runs.work / "workers") as run:
        telemetry = run.telemetry.read()[2]
    with RunDirectory.open(runs.work / "poisoned") as run:
        recorded = run.telemetry.read()[2]
    assert recorded[:BAD_STEP].tobytes() == telemetry[:BAD_STEP].tobytes()
    run = VggRun(runs.work / "workers")  # the same until then
    expected = hash_arrays(state_at(run, BAD_STEP))
    assert hash_arrays(runs.incident("poisoned").state) == expected


def test_the_incident_of_one_replica_is_diagnosed(runs):
    found = diagnose(VggRun(runs.work / "poisoned"), budget_seconds=0)
    assert found.verdict == "reproduced"
    assert found.first_nonfinite.stage == "data"


def test_a_killed_worker_stops_the_others_with_one_message(runs):
    chief, killed = runs.codes["killed"]
    assert (chief, killed) == (1, -9)
    (said,) = runs.errors("killed", 0)
    assert re.match(r"error: worker 1 \(localhost:\d+\) is gone", said), said
    assert "train --resume" in said
    manifest = json.loads((runs.work / "killed" / "manifest.json").read_text())
    engines = [(one["first_step"], one["strategy"]) for one in manifest["engines"]]
    assert engines == [(0, "multiworker"), (3, "cpu")]


def test_a_run_goes_on_with_another_number_of_workers(runs):
    assert runs.codes["killed-on"] == [0]
    assert runs.losses("killed") == pytest.approx(runs.losses("one"), rel=TOLERANCE)
    found = verify(runs.work / "killed")  # two replicas up to step 3, then one
    assert found.identical, found.first_difference


def test_a_signal_to_one_worker_stops_all_at_the_same_step_and_resuming_is_exact(runs):
    assert runs.codes["stopped"] == [130, 130]
    assert runs.codes["stopped-on"] == [0, 0]
    assert runs.outcome("stopped") == runs.outcome("workers")
    with RunDirectory.open(runs.work / "stopped") as run:
        assert 2 in run.checkpoints()  # after step 1, which was under way


def test_the_chief_alone_writes(runs):
    events = list((runs.work / "workers" / "tensorboard").iterdir())
    assert len(events) == 1
    lock = (runs.work / "workers" / ".lock").read_text()
    assert len(lock.splitlines()) == 1


def test_the_sum_over_replicas_is_the_gradient_of_the_whole_batch():
    config = tiny_config(warmup_steps=0)
    whole, shared = tiny_step(config), tiny_step(config)
    shared.replicas = 4
    for number in range(3):
        batch = random_tensors(config, number)
        one, four = whole(*batch), shared(*batch)
        np.testing.assert_allclose(four.telemetry, one.telemetry, rtol=1e-4, atol=1e-6)
        assert four.healthy == [True] * 4 and not one.healthy
    images, labels = random_batch(config)
    labels[5] = 99
    result = shared(tf.constant(images), tf.constant(labels))
    assert not result.applied and result.healthy == [True, True, False, True]


def test_a_replica_whose_own_state_is_bad_stops_all_of_them(runs):
    """Its gradients are sound; without a joined verdict the other one would go on alone."""
    applied, failed, unchanged, again = runs.codes["torn"]
    assert not applied and unchanged and not again
    assert failed == ["new weights and momentum of fc1"]


def test_float16_skips_on_all_replicas_at_once_with_the_bits_of_one_device(runs):
    applied, skipped, same, later = runs.codes["float16"]
    assert applied and skipped == 1 and same
    assert later == [False, False]


def test_the_self_test_refuses_a_replica_that_sees_nothing(monkeypatch):
    config = tiny_config()
    step = tiny_step(config)
    step.replicas = 2
    batch = random_tensors(config)
    assert self_test(step, *batch) == len(step.layout.checks())
    monkeypatch.setattr(replica_evidence, "all_its_own_finite", lambda own: tf.constant(True))
    blind = tiny_step(config)
    blind.replicas = 2
    with pytest.raises(GuardFailure, match="replica 0, 1 did not see"):
        self_test(blind, *batch)


class TwoHalves(Workers):
    """Two workers of which the other one's sums are given."""

    count = 2

    def __init__(self, theirs):
        self._theirs = theirs

    def gather(self, array):
        return np.stack([array, self._theirs(array)])


def test_a_worker_with_other_options_is_named():
    alike = TwoHalves(lambda mine: mine)
    alike.must_agree("configuration", "seed 0")
    with pytest.raises(InputError, match="worker 1 has another configuration than the chief"):
        TwoHalves(lambda mine: mine + 1).must_agree("configuration", "seed 0")


def test_every_validation_image_counts_once_whichever_worker_has_it(tmp_path):
    from vggrepro.data_source import open_data

    config = tiny_config(tiny_data(tmp_path), batch_size=4)
    network = tiny_network(config)
    step = TrainStep(config, network)
    evaluator = Evaluator(network, {}, sums=step.batch_sums)
    whole = open_data(config, lambda text: None).validation
    seen: list[np.ndarray] = []

    class Half(Workers):
        count = 2

        def __init__(self, index):
            self.index = index

        def gather(self, array):
            seen.append(array)
            return array[np.newaxis]

    for index in range(2):
        half = Half(index)
        stream = open_data(config, lambda text: None, None, half).validation
        evaluator.evaluate(stream, workers=half)
    images = sum(array[..., 0].sum() for array in seen)
    together = evaluator.evaluate(
        open_data(config, lambda text: None, None, Half(0)).validation,
        workers=TwoHalves(lambda mine: seen[1]),
    )
    assert images == 9 == together["val_images"]
    assert together == pytest.approx(evaluator.evaluate(whole), rel=1e-6)


def test_an_incident_says_which_worker_has_a_replica(tmp_path):
    config = tiny_config(tiny_data(tmp_path))
    with RunDirectory.create(tmp_path / "run", config.to_dict(), {}) as run:
        stopped = save_incident(
            run,
            step=0,
            failed=[Check("data", "", "input")],
            state={},
            batch={"example_ids": np.arange(8)},
            name_of=str,
            metrics={},
            config=config,
            healthy=[True, True, True, False],
            engine={"workers": 2},
        )
    assert "on replica 3 of 4 replicas (worker 1)" in str(stopped)
    record = json.loads((tmp_path / "run/incidents/step-00000000/incident.json").read_text())
    assert record["replicas"] == [{"replica": 3, "worker": 1, "example_ids": [6, 7]}]


def test_engines_of_a_run_that_was_resumed_elsewhere():
    manifest: dict[str, Any] = {}
    for first, strategy, replicas in ((0, "mirrored", 4), (6, "pjrt", 8), (4, "cpu", 1)):
        record = {"strategy": strategy, "replicas": replicas}
        manifest = {"engines": with_engine(manifest, first, record)}
    assert [replicas_at(manifest, step) for step in (0, 3, 4, 9)] == [4, 4, 1, 1]
    assert replicas_at({}, 3) == 1  # a run of an earlier version
    manifest = {"engines": with_engine({}, 0, {"strategy": "pjrt", "replicas": 8})}
    assert replicas_at(manifest, 0) == 1


HOSTS = {"worker": ["a:1", "b:2"]}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("", "needs TF_CONFIG"),
        ("{", "cannot be read"),
        ({"cluster": HOSTS}, "cannot be read"),
        ({"cluster": HOSTS, "task": {"type": "worker", "index": 2}}, "worker 2, is none"),
        ({"cluster": HOSTS, "task": {"type": "chief", "index": 0}}, "chief 0, is none"),
        ({"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}, "has ps"),
        (
            {"cluster": {"worker": ["a", "b:2"]}, "task": {"type": "worker", "index": 0}},
            "'a' is not host:port",
        ),
        (
            {"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}},
            "comes twice",
        ),
    ],
)
def test_a_wrong_tf_config_is_one_line(config, match):
    text = config if isinstance(config, str) else json.dumps(config)
    with pytest.raises(InputError, match=match) as raised:
        cluster_of({"TF_CONFIG": text})
    assert "\n" not in str(raised.value)


def of_two(index: int, port: int, job: str = "worker"):
    cluster = {"worker": [f"localhost:{port}", "localhost:9"]}
    task = {"type": job, "index": index}
    return cluster_of({"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})})


def test_a_chief_comes_first_and_counts_as_a_worker():
    cluster = {"worker": ["b:2", "c:3"], "chief": ["a:1"]}
    task = {"type": "worker", "index": 1}
    found = cluster_of({"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})})
    assert found.addresses == ("a:1", "b:2", "c:3") and found.index == 2
    assert found.leader == "/job:chief/replica:0/task:0"
    assert found.worker_of("worker", 1) == 2 and found.worker_of("chief", 0) == 0


@pytest.mark.parametrize(("index", "who"), [(0, r"worker 1 \(localhost:9\)"), (1, "worker 0")])
def test_waiting_for_a_worker_that_never_comes_ends_with_its_name(index, who):
    from distributed_runs import free_ports

    (port,) = free_ports(1)
    with pytest.raises(InputError, match=who + ".* did not come within 0.2 s"):
        meet(of_two(index, port), 0.2)


def test_too_many_replicas_for_the_batch_is_one_line(tmp_path):
    from vggrepro.data_source import open_data

    with pytest.raises(InputError, match="batch size 8 cannot be divided among 3 replicas"):
        three = Workers()
        three.count = 3
        open_data(replaced(tiny_config(tiny_data(tmp_path))), lambda text: None, None, three)
