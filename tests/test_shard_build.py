"""Building shards: deterministic, resumable, verified, and strict about what it is given."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from jpeg_samples import jpeg, pixels
from safetensors.numpy import load, save
from shard_samples import build, content, make_folder, recipe

from diagnostics.errors import InputError
from vggrepro import shard_build, shard_writer
from vggrepro.cli import main
from vggrepro.config import TrainConfig
from vggrepro.data_source import open_data, open_index
from vggrepro.example_reader import read_example
from vggrepro.image_sources import open_source
from vggrepro.run_lock import acquire_lock
from vggrepro.shard_plan import plan_build
from vggrepro.shard_target import LocalTarget, RemoteTarget, ShardTarget
from vggrepro.shards import read_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("expected") / "shards"
    build(folder, target)
    return content(target)


@pytest.fixture
def dirty(folder: Path, tmp_path: Path) -> Path:
    """Training image 0 is empty, 4 is cut off, 9 is tiny."""
    copy = shutil.copytree(folder, tmp_path / "dirty")
    (copy / "train/a/train_0000.JPEG").write_bytes(b"")
    cut = copy / "train/b/train_0004.JPEG"
    cut.write_bytes(cut.read_bytes()[:-150])
    (copy / "train/a/train_0009.JPEG").write_bytes(jpeg(pixels(5, 40, 0)))
    return copy


@pytest.mark.parametrize("workers", [1, 5])
def test_same_bytes_whatever_the_workers(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], workers: int
) -> None:
    build(folder, tmp_path / "shards", workers)
    assert content(tmp_path / "shards") == expected


def test_every_image_is_stored_as_it_is(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "shards")
    for split in ("train", "val"):
        index = open_index(tmp_path / "shards", split)
        for i, path in list(enumerate(index.paths))[::3]:
            assert read_example(index, i) == (folder / path).read_bytes()


def test_shards_are_a_fair_sample(folder: Path, tmp_path: Path) -> None:
    """Records in the order of their paths would make a window of one class."""
    build(folder, tmp_path / "shards")
    index = open_index(tmp_path / "shards", "train")
    assert index.records is not None
    for shard in range(len(index.records.files) - 1):
        assert set(index.labels[index.records.shard == shard]) == {0, 1, 2}


# Interruptions


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_stopped_build_goes_on(
    folder: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    target = tmp_path / "shards"
    written: list[str] = []
    whole = shard_writer.write_shard

    def failing(place: ShardTarget, plan: shard_build.ShardPlan, *more: object) -> object:
        written.append(plan.file)
        if len(written) == 3:
            raise KeyboardInterrupt
        return whole(place, plan, *more)

    monkeypatch.setattr(shard_build, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        build(folder, f"{scheme}{target}", workers=1)
    assert not (target / "shards.json").exists() and (target / written[0]).exists()
    first = written[:2]
    written[:] = ["", "", ""]  # from now on nothing fails
    build(folder, f"{scheme}{target}", workers=1)
    assert not set(first) & set(written), "finished shards were written again"
    assert content(target) == expected


def test_shards_of_an_earlier_version_are_written_again(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished build whose parts do not say how large the images are."""
    target = tmp_path / "shards"
    monkeypatch.setattr(shard_build, "index_split", lambda *_: sys.exit("stopped"))
    with pytest.raises(SystemExit):
        build(folder, target)
    monkeypatch.undo()
    for part in (target / "parts").glob("train-*"):
        arrays = load(part.read_bytes())
        del arrays["image_size"]
        part.write_bytes(save(arrays))
    build(folder, target)
    assert content(target) == expected


@pytest.mark.slow
def test_a_killed_build_goes_on(folder: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    target = tmp_path / "shards"
    command = [
        sys.executable, "-c", "import sys; from vggrepro.cli import main; sys.exit(main())",
        "data", "build", str(folder), str(target), "--shard-megabytes", "0.02", "--workers", "2",
    ]  # fmt: skip
    kills = 0
    while not (target / "shards.json").exists():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while kills < 4 and process.poll() is None:
            parts = list((target / "parts").glob("*")) if (target / "parts").exists() else []
            if len(parts) > 2 * kills:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
    assert kills > 1
    assert content(target) == expected


def test_a_finished_build_is_left_alone(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(folder, tmp_path / "shards")
    monkeypatch.setattr(shard_build, "write_shard", lambda *_: 1 / 0)
    manifest = build(folder, tmp_path / "shards")
    assert manifest == json.loads(expected["shards.json"])


def test_a_record_damaged_while_building_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shard_build.index_split

    def flip(directory: str, *more: object) -> object:
        file = Path(directory) / "train-00001.tfrecord"
        data = bytearray(file.read_bytes())
        data[500] ^= 1
        file.write_bytes(data)
        return real(directory, *more)

    monkeypatch.setattr(shard_build, "index_split", flip)
    with pytest.raises(InputError, match="train-00001.tfrecord: a record is not what was written"):
        build(folder, tmp_path / "shards")
    assert not (tmp_path / "shards/shards.json").exists()


# Dirty images


def test_all_dirty_images_are_listed(dirty: Path, tmp_path: Path) -> None:
    target = tmp_path / "shards"
    with pytest.raises(InputError, match="train/a/train_0000.JPEG: empty and 2 more"):
        build(dirty, target)
    assert (target / "refused.txt").read_text().splitlines() == [
        "train/a/train_0000.JPEG: empty",
        "train/a/train_0009.JPEG: tiny",
        "train/b/train_0004.JPEG: truncated",
    ]
    with pytest.raises(InputError, match="no finished shards"):
        open_index(target, "train")


def test_dirty_images_can_be_skipped(dirty: Path, tmp_path: Path) -> None:
    """After a refusal, in the same directory: finished shards are used again."""
    target = tmp_path / "shards"
    with pytest.raises(InputError):
        build(dirty, target)
    manifest = build(dirty, target, empty="skip", truncated="skip", tiny="convert")
    known = manifest["splits"]["train"]
    assert known["examples"] == 148
    assert known["skipped"] == {
        "train/a/train_0000.JPEG": ("empty",),
        "train/b/train_0004.JPEG": ("truncated",),
    }
    assert known["found"] == {
        **dict.fromkeys(known["found"], 0), "empty": 1, "truncated": 1, "tiny": 1, "grayscale": 4
    }  # fmt: skip
    index = open_index(target, "train")
    assert len(index) == 148 and "train/a/train_0009.JPEG" in list(index.paths)
    assert list(index.paths) == sorted(index.paths)
    for path in ("train/a/train_0000.JPEG", "train/b/train_0004.JPEG"):
        (dirty / path).unlink()
    assert index.fingerprint == open_index(dirty, "train").fingerprint
    for i in (0, 4, 9, 40):
        assert read_example(index, i) == (dirty / index.paths[i]).read_bytes()


def test_another_policy_judges_finished_shards_anew(dirty: Path, tmp_path: Path) -> None:
    target = tmp_path / "shards"
    with pytest.raises(InputError, match="empty and 2 more"):
        build(dirty, target)  # the shards that hold only greyscale ones are finished
    others = {"empty": "skip", "truncated": "skip", "tiny": "skip"}
    with pytest.raises(InputError, match="grayscale and 3 more"):
        build(dirty, target, grayscale="fail", **others)
    known = build(dirty, target, grayscale="skip", **others)["splits"]["train"]
    assert known["examples"] == 150 - 3 - 4 and len(known["skipped"]) == 7


def test_a_stopped_shard_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    plan = plan_build(open_source(folder), 20_000)
    stop = threading.Event()
    stop.set()
    images = plan.source.splits["train"]
    with pytest.raises(shard_writer.Interrupted):
        shard_writer.write_shard(
            LocalTarget(str(tmp_path)), plan.shards[0], images, recipe(), stop, lambda size: None
        )
    assert not list(tmp_path.iterdir())


def test_a_class_may_not_vanish(dirty: Path, tmp_path: Path) -> None:
    for file in (dirty / "val/c").iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError, match="every image of class 'c' in val was skipped"):
        build(dirty, tmp_path / "shards", empty="skip", truncated="skip", tiny="skip")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("purple=skip", "Kinds: empty"),
        ("tiny", "KIND=convert|skip|fail"),
        ("tiny=drop", "KIND=convert|skip|fail"),
        ("truncated=convert", "cannot be converted"),
    ],
)
def test_bad_policies_are_refused(
    tmp_path: Path, change: str, words: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["data", "build", "x", str(tmp_path / "y"), "--dirty", change]) == 2
    assert words in capsys.readouterr().err


# Resizing


def test_resize_is_a_recorded_deviation(folder: Path, tmp_path: Path) -> None:
    manifest = build(folder, tmp_path / "shards", resize=14)
    assert manifest["resize"] == {"shorter_side": 14, "jpeg_quality": 95, "origin": "deviation"}
    source = open_data(TrainConfig(data=str(tmp_path / "shards")), lambda text: None)
    assert source.record["resized"] == manifest["resize"]
    index = open_index(tmp_path / "shards", "train")
    assert index.fingerprint != open_index(folder, "train").fingerprint
    changed = 0
    for i, path in list(enumerate(index.paths))[::4]:
        original = tf.io.decode_jpeg((folder / path).read_bytes(), channels=3)
        stored = tf.io.decode_jpeg(read_example(index, i), channels=3)
        if min(original.shape[:2]) <= 14:
            assert read_example(index, i) == (folder / path).read_bytes()
            continue
        changed += 1
        assert min(stored.shape[:2]) == 14
        smaller = tf.image.resize(original, stored.shape[:2], antialias=True)
        assert np.abs(stored.numpy() - smaller.numpy()).mean() < 6.0
    assert changed > 10


# URLs


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR, where shards wait until they are sent."""
    directory = tmp_path / "waiting"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def test_a_url_gets_the_same_files(
    folder: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    waiting: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, put = [], RemoteTarget.put

    def counting(self: RemoteTarget, scratch: Path, name: str) -> None:
        held.append(len(list(waiting.rglob("*.tfrecord"))))
        put(self, scratch, name)

    monkeypatch.setattr(RemoteTarget, "put", counting)
    url = f"file://{tmp_path}/shards"
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/.tmp-build.json").write_text("{")  # of a build killed at its start
    build(folder, f"{url}/", workers=2)
    assert content(tmp_path / "shards") == expected and not (tmp_path / "shards/parts").exists()
    assert 1 <= max(held) <= 2 and not list(waiting.iterdir())
    assert main(["data", "check", url]) == 0


def test_verification_reads_what_arrived(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RemoteTarget.put

    def damaging(self: RemoteTarget, scratch: Path, name: str) -> None:
        real(self, scratch, name)
        arrived = bytearray((tmp_path / "shards" / name).read_bytes())
        arrived[500] ^= 1
        (tmp_path / "shards" / name).write_bytes(arrived)

    monkeypatch.setattr(RemoteTarget, "put", damaging)
    with pytest.raises(InputError, match="file:.*tfrecord: a record is not what was written"):
        build(folder, f"file://{tmp_path}/shards")
    assert not (tmp_path / "shards/shards.json").exists()


def test_refused_images_are_listed_at_the_url(dirty: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shards"
    with pytest.raises(InputError, match=f"train_0000.JPEG: empty and 2 more; .*{url}/refused.txt"):
        build(dirty, url)
    assert len((tmp_path / "shards/refused.txt").read_text().splitlines()) == 3
    manifest = build(dirty, url, empty="skip", truncated="skip", tiny="convert")
    assert manifest["splits"]["train"]["examples"] == 148
    assert not (tmp_path / "shards/refused.txt").exists()


def test_a_url_that_cannot_be_written_is_one_line(
    folder: Path, tmp_path: Path, waiting: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["data", "build", str(folder), f"file://{tmp_path}/file/shards"]) == 2
    assert f"error: cannot write file://{tmp_path}/file/shards" in capfd.readouterr().err

    def denied(*arguments: object, **options: object) -> None:
        raise tf.errors.PermissionDeniedError(None, None, "no such right")

    monkeypatch.setattr(tf.io.gfile, "copy", denied)
    with pytest.raises(InputError, match="cannot write file:.*tfrecord: no such right"):
        build(folder, f"file://{tmp_path}/shards")
    assert not list((tmp_path / "shards").glob("*.tfrecord")) and not list(waiting.iterdir())


def test_other_urls_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty: it holds thesis.tex"):
        build(folder, f"file://{tmp_path}")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_room_for_waiting_shards_is_checked_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards of 20 kB fit where the eight or so of all images would not."""
    room = [50_000]
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, room[0])
    )
    url = f"file://{tmp_path}/shards"
    with pytest.raises(InputError, match="0.0 GB free, shards of 5 workers need") as refused:
        build(folder, url, workers=5)
    assert "TMPDIR" in refused.value.remedy
    assert not list((tmp_path / "shards").glob("*.tfrecord"))
    build(folder, url, workers=2)


# Bad targets and sources


def test_a_directory_in_use_is_refused(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "shards"
    target.mkdir()
    lock = acquire_lock(target)
    with pytest.raises(InputError, match="is being built by another process"):
        build(folder, target)
    os.close(lock)
    build(folder, target)


def test_other_directories_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty: it holds thesis.tex"):
        build(folder, tmp_path)
    target = tmp_path / "shards"
    build(folder, target)
    with pytest.raises(InputError, match="shards of other images or options"):
        build(folder, target, resize=14)
    (target / "shards.json").unlink()
    with pytest.raises(InputError, match="not empty"):
        build(folder, target)


def test_an_unfinished_build_of_something_else_is_refused(dirty: Path, tmp_path: Path) -> None:
    target = tmp_path / "shards"
    with pytest.raises(InputError, match="empty and 2 more"):
        build(dirty, target)
    (dirty / "train/a/train_0000.JPEG").unlink()
    with pytest.raises(InputError, match="an unfinished build of other images"):
        build(dirty, target)


def test_space_is_checked_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="0.0 GB free, the shards need"):
        build(folder, tmp_path / "shards")
    assert not list((tmp_path / "shards").glob("*.tfrecord"))


def test_a_full_disk_is_one_line(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "shards"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        with pytest.raises(InputError, match="cannot write .*train-0000.*tfrecord"):
            build(folder, target, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(target.glob(".tmp-*"))
    build(folder, target)


def test_a_file_that_changes_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    real = shard_build._claim

    def grow(*arguments: object) -> None:
        with (copy / "val/a/val_0003.JPEG").open("ab") as file:
            file.write(b"more")
        real(*arguments)

    monkeypatch.setattr(shard_build, "_claim", grow)
    with pytest.raises(InputError, match="val_0003.JPEG has changed since it was listed"):
        build(copy, tmp_path / "shards")


def test_index_holds_a_hash_of_each_image(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "shards")
    index, table = open_index(tmp_path / "shards", "val"), read_table(tmp_path / "shards", "val")
    for i, path in enumerate(index.paths):
        digest = hashlib.sha256((folder / path).read_bytes()).digest()
        assert table["sha256"][i].tobytes() == digest


@pytest.mark.parametrize("resize", [0, 14])
def test_index_holds_the_size_that_decoding_gives(
    folder: Path, tmp_path: Path, resize: int
) -> None:
    """A wrong one would cut out other pixels; a PNG file is stored as it is."""
    source = shutil.copytree(folder, tmp_path / "source")
    png = tf.io.encode_png(pixels(20, 33, seed=1)).numpy()
    (source / "train/a/train_0000.JPEG").write_bytes(png)
    build(source, tmp_path / "shards", resize=resize)
    index = open_index(tmp_path / "shards", "train")
    assert index.records is not None and index.records.image_size is not None
    for i, size in enumerate(index.records.image_size.tolist()):
        assert list(tf.io.decode_jpeg(read_example(index, i), channels=3).shape[:2]) == size
