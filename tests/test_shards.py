"""Shards: the same batches as the directory they were built from, from any step."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from jpeg_samples import AUGMENTED, settings
from safetensors.numpy import save
from shard_samples import build, make_folder
from test_dataset import PYTHON_OPS, op_types, same_bits

from diagnostics.errors import InputError
from vggrepro import resampling
from vggrepro.cli import main
from vggrepro.config import TrainConfig
from vggrepro.data_source import open_data, open_index
from vggrepro.dataset import EvaluationStream, TrainingStream
from vggrepro.example_index import ExampleIndex
from vggrepro.example_reader import (
    FileReader,
    LocalRecordReader,
    example_reader,
    find_bad_example,
)
from vggrepro.shard_check import check_shards
from vggrepro.shards import PathTable, read_table
from vggrepro.statistics import ColourStatistics, training_statistics

RECORD_BATCH = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("data") / "shards"
    manifest = build(folder, target)
    assert len(manifest["splits"]["train"]["shards"]) > 4
    return target


@pytest.fixture(scope="module")
def index(shards: Path) -> ExampleIndex:
    return open_index(shards, "train")


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "copy")


# The same data


def test_index_is_that_of_the_folder(folder: Path, index: ExampleIndex) -> None:
    images = open_index(folder, "train")
    assert list(index.paths) == list(images.paths) and index.class_names == images.class_names
    assert np.array_equal(index.labels, images.labels)
    assert index.fingerprint == images.fingerprint
    assert training_statistics(index) == training_statistics(images)


def test_statistics_are_kept_and_used(
    folder: Path, copy: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["data", "stats", "--json", str(copy)]) == 0
    shown = ColourStatistics.from_dict(json.loads(capsys.readouterr().out))
    assert shown == training_statistics(open_index(folder, "train"))
    kept = copy / "vggrepro-statistics.json"
    marked = {**json.loads(kept.read_text()), "mean_rgb": [1.0, 2.0, 3.0]}
    kept.write_text(json.dumps(marked))
    source = open_data(TrainConfig(data=str(copy)), lambda text: None)
    assert source.mean_rgb == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("step", [0, 1, 13, 14, 300_000])  # an epoch is 13.6 steps
def test_batches_are_those_of_the_folder(folder: Path, index: ExampleIndex, step: int) -> None:
    images = open_index(folder, "train")
    expected = TrainingStream(images, AUGMENTED, RECORD_BATCH, seed=3)
    found = TrainingStream(index, AUGMENTED, RECORD_BATCH, seed=3)
    assert same_bits(found.batch(step), expected.batch(step))
    for one, other in zip(range(step, step + 3), found.stream(step), strict=False):
        assert same_bits(other, expected.batch(one))


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_an_index_without_image_sizes_gives_the_same_batches(
    copy: Path, index: ExampleIndex, decode: str
) -> None:
    """Shards built before the index held them."""
    table = read_table(copy, "train")
    del table["image_size"]
    (copy / "train.safetensors").write_bytes(save(table))
    earlier = open_index(copy, "train")
    assert earlier.records is not None and earlier.records.image_size is None
    preprocessing = dataclasses.replace(AUGMENTED, decode=decode)
    streams = [TrainingStream(found, preprocessing, 11, seed=3) for found in (index, earlier)]
    assert same_bits(streams[0].batch(13), streams[1].batch(13))
    headers = [op_types(stream.stream(0)) & {"ExtractJpegShape"} for stream in streams]
    assert headers == [set(), {"ExtractJpegShape"} if decode == "fast" else set()]


def test_evaluation_is_that_of_the_folder(folder: Path, shards: Path) -> None:
    batches = [
        list(EvaluationStream(open_index(root, "val"), settings(), 3)) for root in (folder, shards)
    ]
    assert len(batches[0]) == len(batches[1]) == 3
    assert all(same_bits(a, b) for a, b in zip(*batches, strict=True))


@pytest.mark.parametrize("window", [64, 128, 256])
@pytest.mark.parametrize("first_step", [0, 5, 13, 300_000])
def test_window_stream_gives_the_batches(index: ExampleIndex, window: int, first_step: int) -> None:
    """Read in long runs or one by one: the same bits, over the ends of shards and epochs."""
    stream = TrainingStream(index, settings(), RECORD_BATCH, seed=3, order=f"window:{window}")
    batches = stream.stream(first_step)
    for step, batch in zip(range(first_step, first_step + 15), batches, strict=False):
        assert list(batch["example_ids"].numpy()) == stream.example_ids(step)
        if step % 5 == 0:
            assert same_bits(batch, stream.batch(step))


@pytest.mark.parametrize("order", ["full", "window:64"])
def test_every_epoch_takes_each_example_once(index: ExampleIndex, order: str) -> None:
    stream = TrainingStream(index, settings(), 50, seed=3, order=order)
    ids = [i for step in range(9) for i in stream.example_ids(step)]
    for epoch in range(3):
        assert sorted(ids[epoch * 150 : (epoch + 1) * 150]) == list(range(150))


# Replicas


def parts_of(index: ExampleIndex, order: str, replicas: int) -> list[TrainingStream]:
    return [
        TrainingStream(index, AUGMENTED, 16, 3, order, replica, replicas)
        for replica in range(replicas)
    ]


@pytest.mark.parametrize("order", ["full", "window:64"])
def test_replicas_share_the_batch(index: ExampleIndex, order: str) -> None:
    whole = TrainingStream(index, AUGMENTED, 16, seed=3, order=order).batch(9)
    parts = parts_of(index, order, replicas=2)
    batches = [part.batch(9) for part in parts]
    assert same_bits({name: tf.concat([b[name] for b in batches], 0) for name in whole}, whole)
    assert same_bits(next(iter(parts[1].stream(9))), batches[1])


@pytest.mark.parametrize("order", ["full", "window:64"])
@pytest.mark.parametrize("replicas", [1, 2, 8])
def test_any_number_of_replicas_takes_the_same_examples(
    index: ExampleIndex, order: str, replicas: int
) -> None:
    whole = TrainingStream(index, AUGMENTED, 16, seed=3, order=order)
    parts = parts_of(index, order, replicas)
    for step in (0, 9, 300_000):  # the second batch lies across the end of an epoch
        taken = [i for part in parts for i in part.example_ids(step)]
        assert taken == whole.example_ids(step)


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 4, 9, 16])
def test_replicas_evaluate_each_example_once(count: int, replicas: int) -> None:
    paths = tuple(f"val/a/{i}.JPEG" for i in range(count))
    index = ExampleIndex("/nowhere", "val", paths, np.zeros(count, np.int32), ("a",), "")
    streams = [EvaluationStream(index, settings(), 4, r, replicas) for r in range(replicas)]
    ids = np.concatenate([stream._example_ids() for stream in streams])
    assert sorted(ids[ids < count]) == list(range(count))
    assert len({len(stream._example_ids()) for stream in streams}) == 1


def test_replicas_pad_their_own_rows(shards: Path) -> None:
    validation = open_index(shards, "val")  # 7 images
    batches = [list(EvaluationStream(validation, settings(), 4, r, 2)) for r in range(2)]
    ids = [np.concatenate([batch["example_ids"] for batch in found]) for found in batches]
    assert list(ids[0]) == [0, 1, 4, 5] and list(ids[1]) == [2, 3, 6, -1]
    assert [batch["weights"].numpy().tolist() for batch in batches[1]] == [[1, 1], [1, 0]]


def test_an_indivisible_batch_is_refused(index: ExampleIndex) -> None:
    with pytest.raises(InputError, match="batch size 10 cannot be divided among 4"):
        TrainingStream(index, settings(), 10, 0, replicas=4)


# The graph


@pytest.mark.parametrize("order", ["full", "window:64"])
def test_graph_holds_no_python_and_static_shapes(index: ExampleIndex, order: str) -> None:
    dataset = TrainingStream(index, AUGMENTED, 4, 0, order).stream(0)
    ops = op_types(dataset)
    assert {"TFRecordDatasetV2", "VggreproReadRecord"} & ops and not ops & PYTHON_OPS
    evaluation = EvaluationStream(index, AUGMENTED, 4).dataset()
    for spec in (dataset.element_spec, evaluation.element_spec):
        assert all(value.shape.is_fully_defined() for value in spec.values())


def reads_records() -> bool:
    ops = resampling.compiled_ops()
    return ops is not None and ops.read_ahead is not None


needs_record_ops = pytest.mark.skipif(
    not reads_records(), reason="no compiled ops here that read records"
)


@needs_record_ops
def test_the_kernel_is_asked_for_what_is_read(index: ExampleIndex) -> None:
    """Training in both orders, replicas and evaluation; neighbours as one run."""
    asked = {"VggreproReadAhead", "VggreproReadRecord"}
    for order, replicas in (("full", 1), ("window:64", 1), ("window:64", 2)):
        assert asked <= op_types(
            TrainingStream(index, AUGMENTED, 4, 0, order, 0, replicas).stream(0)
        )
    assert asked <= op_types(EvaluationStream(index, AUGMENTED, 4).dataset())

    noted = []
    reader = example_reader(index)
    assert isinstance(reader, LocalRecordReader) and index.records is not None
    reader._read_ahead = lambda *places: noted.append(places) or places[-1]
    stored = index.records.ids_in_storage_order
    rows = reader.look_up(tf.constant(stored, tf.int64))
    assert reader.will_need(rows, tf.constant(3)) == 3
    [(files, offsets, ends, _)] = noted
    same = files[1:] == files[:-1]
    assert len(set(files.numpy())) == len(index.records.files)
    assert np.array_equal(same.numpy(), offsets[1:] == ends[:-1])


@needs_record_ops
def test_the_kernel_is_asked_for_files_too(folder: Path) -> None:
    """For each as a whole; at a URL for none."""
    index = open_index(folder, "train")
    remote = open_index(f"file://{folder}", "train")
    asked = "VggreproReadAhead"
    assert asked in op_types(TrainingStream(index, AUGMENTED, 4, 0).stream(0))
    assert asked in op_types(EvaluationStream(index, AUGMENTED, 4).dataset())
    assert asked not in op_types(TrainingStream(remote, AUGMENTED, 4, 0).stream(0))

    noted = []
    reader = example_reader(index)
    assert isinstance(reader, FileReader)
    reader._read_ahead = lambda *places: noted.append(places) or places[-1]
    rows = reader.look_up(tf.constant([7, 3], tf.int64))
    assert reader.will_need(rows, tf.constant(3)) == 3
    [(files, offsets, ends, _)] = noted
    assert [*files.numpy()] == [index.location(i).encode() for i in (7, 3)]
    assert not offsets.numpy().any() and (ends.numpy() > 2**40).all()


# Other file systems


@pytest.mark.parametrize("order", ["full", "window:64"])
def test_gfile_paths_are_read(shards: Path, index: ExampleIndex, order: str) -> None:
    remote = open_index(f"file://{shards}", "train")
    assert remote.fingerprint == index.fingerprint
    expected = TrainingStream(index, settings(), 8, 3, order).batch(4)
    assert same_bits(TrainingStream(remote, settings(), 8, 3, order).batch(4), expected)
    assert main(["data", "check", f"file://{shards}"]) == 0


def test_folder_at_a_gfile_path(folder: Path) -> None:
    local, remote = open_index(folder, "train"), open_index(f"file://{folder}", "train")
    assert remote.fingerprint == local.fingerprint and list(remote.paths) == list(local.paths)
    expected = TrainingStream(local, settings(), 8, 3).batch(4)
    assert same_bits(TrainingStream(remote, settings(), 8, 3).batch(4), expected)


def test_unknown_scheme_is_one_clear_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "stats", "nosuch://bucket/data"]) == 2
    shown = capsys.readouterr().err
    assert "nosuch://bucket/data" in shown and "tensorflow[gcs-filesystem]" in shown


# Damage


def flip_byte(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("where", [0.0, 0.003, 0.4, 0.77, 0.9999])
def test_check_names_the_damaged_record(copy: Path, where: float) -> None:
    index = open_index(copy, "train")
    assert index.records is not None
    file = Path(index.records.files[1])
    place = int(where * file.stat().st_size)
    flip_byte(file, place)
    ids = np.flatnonzero(index.records.shard == 1)
    hit = [i for i in ids if 0 <= place - index.records.offset[i] < index.records.size[i] + 16]
    bad = find_bad_example(index, map(int, hit))
    assert isinstance(bad, InputError) and index.name_of(int(hit[0])) in bad.message
    with pytest.raises(tf.errors.OpError):
        list(TrainingStream(index, settings(), 150, 0).stream(0).take(1))
    faults = check_shards(str(copy), 2, lambda stage, done, total: None)
    assert len(faults) == 1 and faults[0].startswith(index.location(int(hit[0])))


def test_check_command_names_all_damage(copy: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "check", str(copy)]) == 0
    index = open_index(copy, "train")
    assert index.records is not None
    for example in (3, 77):
        file = Path(index.records.files[index.records.shard[example]])
        flip_byte(file, int(index.records.offset[example]) + 20)
    short = Path(index.records.files[-1])
    last = int(index.records.ids_in_storage_order[-1])
    short.write_bytes(short.read_bytes()[:-20])
    capsys.readouterr()
    assert main(["data", "check", "--json", str(copy)]) == 2
    damaged = json.loads(capsys.readouterr().out)["damaged"]
    assert {line.split(" ")[0] for line in damaged} == {
        index.name_of(example) for example in (3, 77, last)
    }


@pytest.mark.parametrize("order", ["full", "window:64"])
def test_a_shard_that_was_cut_off_gives_no_other_images(copy: Path, order: str) -> None:
    """At the border of a record, where reading just ends; while a run has it open already."""
    index = open_index(copy, "train")
    assert index.records is not None
    stream = TrainingStream(index, settings(), 30, seed=3, order=order)
    cut = np.flatnonzero(index.records.shard == 1)
    border = int(np.sort(index.records.offset[cut])[2])
    os.truncate(index.records.files[1], border)
    with pytest.raises(tf.errors.OpError):
        list(stream.stream(0).take(5))  # an epoch
    with pytest.raises(InputError, match=f"train-00001.tfrecord has {border:,} bytes, its index"):
        open_index(copy, "train")


def test_images_put_in_each_others_place_are_found(copy: Path) -> None:
    """Checksums of the records hold; only the index knows."""
    table = read_table(copy, "train")
    table["offset"] = table["offset"].copy()
    first, second = np.flatnonzero(table["shard"] == 0)[:2]
    table["offset"][[first, second]] = table["offset"][[second, first]]
    (copy / "train.safetensors").write_bytes(save(table))
    assert main(["data", "check", str(copy)]) == 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "train.safetensors").unlink(), ["train.safetensors"]),
        (lambda d: (d / "train.safetensors").write_bytes(b"12345678"), ["damaged"]),
        (lambda d: (d / "train-00002.tfrecord").unlink(), ["train-00002.tfrecord", "missing"]),
        (lambda d: (d / "shards.json").write_text("{"), ["shards.json", "damaged"]),
        (lambda d: (d / "shards.json").write_text('{"version": 99}'), ["version 99"]),
        (lambda d: (d / "shards.json").rename(d / "build.json"), ["no finished shards"]),
    ],
)
def test_incomplete_directories_are_refused(
    copy: Path, damage: object, words: list[str], capsys: pytest.CaptureFixture
) -> None:
    damage(copy)
    command = ["train", "--data", str(copy), "--run-dir", str(copy.parent / "run")]
    for arguments in (["data", "check", str(copy)], ["data", "stats", str(copy)], command):
        assert main(arguments) == 2
        shown = capsys.readouterr().err
        assert all(word in shown for word in words) and shown.count("\n") == 1, shown


def test_paths_are_kept_in_one_block() -> None:
    names = ["train/a/ä.JPEG", "x", "train/b/2.JPEG"]
    ends = np.cumsum([len(name.encode()) for name in names])
    table = PathTable(ends, np.frombuffer("".join(names).encode(), np.uint8))
    assert list(table) == names and table[-1] == names[-1] and table[:2] == names[:2]
    with pytest.raises(IndexError):
        table[3]
