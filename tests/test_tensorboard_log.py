"""What TensorBoard reads back from a run, also from one that was killed and resumed."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS, STATUS_UNKNOWN
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
    parse_experiment_plugin_data,
    parse_session_end_info_plugin_data,
    parse_session_start_info_plugin_data,
)

from vggrepro.config import TrainConfig
from vggrepro.run_directory import RunDirectory
from vggrepro.tensorboard_log import TensorBoardLog

KERNEL = np.linspace(-1.0, 1.0, 60, dtype=np.float32)
STATE = SimpleNamespace(
    numpy=lambda: {
        "params/fc1/kernel": KERNEL,
        "params/fc1/bias": KERNEL[:3],
        "momentum/fc1/kernel": KERNEL,
    }
)
IMAGES = np.linspace(-20.0, 280.0, 12 * 4 * 4 * 3, dtype=np.float32).reshape(12, 4, 4, 3)
EVALUATION = {"val_loss": 1.0, "val_top1_error": 40.0, "val_top5_error": 5.0, "val_images": 20.0}


def metrics_of(step: int, offset: float = 0.0) -> dict:
    return {
        "loss": 10.0 - step + offset,
        "top1_accuracy": 0.5,
        "lr": 0.01,
        "grad_norm": 3.0,
        "headroom": 100.0,
        "headroom_layer": "fc1",
        "fc1/gradient_norm": 2.0 + step,
        "fc1/preactivation_absmax": 4.0,
        "fc1/preactivation_max": 4.0,
    }


@pytest.fixture
def run(tmp_path):
    config = TrainConfig(steps=10, lr=0.02)
    with RunDirectory.create(tmp_path / "run", config.to_dict(), {"seeds": {"run": 7}}) as opened:
        yield opened


def write(run: RunDirectory, first: int, last: int, offset: float = 0.0) -> None:
    """One process: steps first..last-1; a validation after step 5; then the end."""
    config = TrainConfig(steps=10, lr=0.02)
    with TensorBoardLog() as log:
        log.on_start(run, config, first, {"sample_images": IMAGES})
        for step in range(first, last):
            log.on_step(step, STATE, metrics_of(step, offset))
            if step + 1 == 5:
                log.on_evaluation(5, EVALUATION)
                log.on_checkpoint(5)
        log.on_end(SimpleNamespace(status="finished" if last == 10 else "interrupted"))


def read(run: RunDirectory) -> EventAccumulator:
    nothing_left_out = {"tensors": 0, "scalars": 0, "images": 0}
    events = EventAccumulator(str(run.path / "tensorboard"), nothing_left_out)
    return events.Reload()


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [
        (event.step, float(tf.make_ndarray(event.tensor_proto))) for event in events.Tensors(tag)
    ]


def strings(events: EventAccumulator, tag: str) -> list[bytes]:
    return list(tf.make_ndarray(events.Tensors(tag)[0].tensor_proto).reshape(-1))


def test_curves_of_the_whole_run_and_of_each_layer(run):
    write(run, 0, 10)
    events = read(run)
    assert scalars(events, "batch/loss") == [(step, 10.0 - step) for step in range(10)]
    assert scalars(events, "gradient_norm/fc1") == [(step, 2.0 + step) for step in range(10)]
    assert scalars(events, "preactivation_absmax/fc1")[0] == (0, 4.0)
    assert scalars(events, "evaluation/top1_error_percent") == [(4, 40.0)]
    tags = events.Tags()["tensors"]
    assert not [tag for tag in tags if "preactivation_max" in tag or "headroom_layer" in tag]


def test_histograms_of_weights_and_of_gradient_norms_since_the_last(run):
    write(run, 0, 10)
    events = read(run)
    kernel = tf.make_ndarray(events.Tensors("weights/fc1/kernel")[0].tensor_proto)
    assert kernel[:, 2].sum() == 60 and kernel[0, 0] == -1.0 and kernel[-1, 1] == 1.0
    assert "weights/fc1/bias" in events.Tags()["tensors"]
    counts = [
        tf.make_ndarray(event.tensor_proto)[:, 2].sum()
        for event in events.Tensors("gradient_norms/fc1")
    ]
    assert sum(counts) == 10
    assert not [tag for tag in events.Tags()["tensors"] if "momentum" in tag]


def test_input_images_are_pictures_of_the_first_batch(run):
    write(run, 0, 1)
    width, height, *pictures = strings(read(run), "images/augmented/image_summary")
    assert (int(width), int(height), len(pictures)) == (4, 4, 8)
    expected = np.clip(np.rint(IMAGES[0]), 0, 255)
    np.testing.assert_array_equal(tf.io.decode_png(pictures[0]), expected)


def test_config_and_manifest_are_text_and_hparams_hold_every_field(run):
    write(run, 0, 10)
    events = read(run)
    assert b"| lr | 0.02 | deviation |" in strings(events, "config")[0]
    assert b'"run": 7' in strings(events, "manifest")[0]
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    start = parse_session_start_info_plugin_data(content)
    assert start.hparams["lr"].number_value == 0.02
    assert start.hparams.keys() == TrainConfig().to_dict().keys()
    content = events.SummaryMetadata(EXPERIMENT_TAG).plugin_data.content
    experiment = parse_experiment_plugin_data(content)
    assert {info.name for info in experiment.hparam_infos} <= start.hparams.keys()
    results = [metric.name.tag for metric in experiment.metric_infos]
    assert results[0] == "evaluation/top1_error_percent"
    assert set(results) <= set(events.Tags()["tensors"])


def session_status(run: RunDirectory) -> int:
    content = read(run).SummaryMetadata(SESSION_END_INFO_TAG).plugin_data.content
    return parse_session_end_info_plugin_data(content).status


def test_the_session_s_end_is_recorded_and_replaced_on_resume(run):
    write(run, 0, 7)
    assert session_status(run) == STATUS_UNKNOWN
    write(run, 5, 10)
    assert session_status(run) == STATUS_SUCCESS


def test_an_error_is_recorded_as_failure(run):
    log = TensorBoardLog()
    with pytest.raises(ZeroDivisionError), log:
        log.on_start(run, TrainConfig(), 0, {"sample_images": IMAGES})
        raise ZeroDivisionError
    assert session_status(run) == STATUS_FAILURE


def test_nothing_is_written_if_the_run_never_started():
    with pytest.raises(ZeroDivisionError), TensorBoardLog():
        raise ZeroDivisionError


def test_a_resumed_run_has_one_curve_whatever_the_killed_one_left(run):
    write(run, 0, 8)
    (file,) = (run.path / "tensorboard").iterdir()
    with open(file, "ab") as half_written:
        half_written.write(b"\x20\x00\x00\x00\x00")
    write(run, 5, 10, offset=0.25)
    expected = [(step, 10.0 - step + (0.25 if step >= 5 else 0.0)) for step in range(10)]
    # Sorted: files of the same second are read in the order of their names, number 10 before 9.
    assert sorted(scalars(read(run), "batch/loss")) == expected
    assert scalars(read(run), "evaluation/top1_error_percent") == [(4, 40.0)]
    # The files themselves hold no step twice, whatever a reader does about restarts.
    assert sorted(_loss_steps(run.path / "tensorboard")) == list(range(10))
    assert len(list((run.path / "tensorboard").iterdir())) == 2


def _loss_steps(directory: Path) -> list[int]:
    records = tf.data.TFRecordDataset([str(file) for file in directory.iterdir()])
    events = [Event.FromString(record) for record in records.as_numpy_iterator()]
    return [e.step for e in events if any(v.tag == "batch/loss" for v in e.summary.value)]


def test_a_checkpoint_flushes_so_that_a_kill_loses_no_curve(run):
    log = TensorBoardLog()
    log.on_start(run, TrainConfig(steps=10), 0, {"sample_images": IMAGES})
    for step in range(5):
        log.on_step(step, STATE, metrics_of(step))
    log.on_checkpoint(5)
    assert scalars(read(run), "batch/loss") == [(step, 10.0 - step) for step in range(5)]
    log.__exit__(None, None, None)


def test_long_runs_thin_out_their_curves(run):
    with TensorBoardLog() as log:
        log.on_start(run, TrainConfig(steps=5000), 0, {"sample_images": IMAGES})
        for step in range(4990, 5000):
            log.on_step(step, STATE, metrics_of(step))
    assert [step for step, _ in scalars(read(run), "batch/loss")] == [4990, 4995, 4999]
