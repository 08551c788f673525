"""Whole or absent: directories, files, appended bytes; strict JSON."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from diagnostics import durable_files
from diagnostics.durable_files import (
    append_whole,
    json_text,
    new_directory,
    remove_directory,
    remove_temporaries,
    write_json,
    write_whole,
)
from diagnostics.errors import InputError


def _fill(path: Path, text: str) -> None:
    with new_directory(path) as temporary:
        assert not path.exists() or (path / "file").exists()
        (temporary / "file").write_text(text)


def test_new_directory_appears_whole_and_replaces_an_older_one(tmp_path):
    target = tmp_path / "deep" / "target"
    _fill(target, "one")
    _fill(target, "two")
    assert (target / "file").read_text() == "two"
    assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt()])
def test_a_failed_block_leaves_the_older_directory_and_nothing_else(tmp_path, error):
    target = tmp_path / "target"
    _fill(target, "one")
    with pytest.raises(type(error)), new_directory(target) as temporary:
        (temporary / "file").write_text("two")
        raise error
    assert (target / "file").read_text() == "one"
    assert os.listdir(tmp_path) == ["target"]


def test_a_failed_rename_puts_the_older_directory_back(tmp_path, monkeypatch):
    target = tmp_path / "target"
    _fill(target, "one")
    rename = Path.rename

    def fail_onto_target(path, to):
        if path.name.startswith(durable_files.TEMPORARY_PREFIX) and to == target:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_onto_target)
    with pytest.raises(InputError, match="Input/output error"):
        _fill(target, "two")
    assert (target / "file").read_text() == "one"
    assert os.listdir(tmp_path) == ["target"]


def test_errors_name_the_final_path_even_of_a_nested_directory(tmp_path):
    with (
        pytest.raises(InputError, match="outer/inner: No space") as caught,
        new_directory(tmp_path / "outer") as temporary,
        new_directory(temporary / "inner"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert durable_files.TEMPORARY_PREFIX not in caught.value.message
    assert "Free some space" in caught.value.remedy
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_killed_process_are_removed_or_put_back(tmp_path):
    prefix = durable_files.TEMPORARY_PREFIX
    (tmp_path / f"{prefix}a-00000000").mkdir()
    (tmp_path / f"{prefix}a-00000000" / "file").touch()
    (tmp_path / f"{prefix}b.json-00000000").touch()
    (tmp_path / ".aside-died-between-renames").mkdir()
    (tmp_path / ".aside-replaced").mkdir()
    (tmp_path / "replaced").mkdir()
    remove_temporaries(tmp_path)
    remove_temporaries(tmp_path / "missing")
    assert sorted(os.listdir(tmp_path)) == ["died-between-renames", "replaced"]


def test_a_stale_older_copy_does_not_stop_a_replacement(tmp_path):
    _fill(tmp_path / "target", "one")
    (tmp_path / ".aside-target").mkdir()
    (tmp_path / ".aside-target" / "file").touch()
    _fill(tmp_path / "target", "two")
    assert os.listdir(tmp_path) == ["target"]


def test_remove_directory(tmp_path):
    _fill(tmp_path / "target", "one")
    remove_directory(tmp_path / "target")
    assert os.listdir(tmp_path) == []


def test_a_directory_half_removed_has_lost_its_name(tmp_path, monkeypatch):
    _fill(tmp_path / "target", "one")
    monkeypatch.setattr(shutil, "rmtree", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        remove_directory(tmp_path / "target")
    monkeypatch.undo()
    assert not (tmp_path / "target").exists()
    remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == []


def test_write_whole_keeps_the_older_file_when_the_disk_is_full(tmp_path, monkeypatch):
    file = tmp_path / "new" / "file"
    write_whole(file, b"one")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="file: No space left"):
        write_whole(file, b"two")
    assert file.read_bytes() == b"one"
    assert os.listdir(file.parent) == ["file"]


def test_append_whole_leaves_no_half_record(tmp_path, monkeypatch):
    file = tmp_path / "log"
    file.write_bytes(b"one\n")
    descriptor = os.open(file, os.O_WRONLY)
    write = os.write

    def write_three_bytes_then_fill_up(target, data):
        if len(data) < 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(target, bytes(data[:3]))

    with monkeypatch.context() as patch, pytest.raises(InputError, match="log: No space"):
        patch.setattr(os, "write", write_three_bytes_then_fill_up)
        append_whole(descriptor, b"second\n", file)
    assert file.read_bytes() == b"one\n"
    append_whole(descriptor, b"two\n", file)
    os.close(descriptor)
    assert file.read_bytes() == b"one\ntwo\n"


def test_json_is_strict_and_ascii(tmp_path):
    value = {
        "nan": np.float32("nan"),
        "inf": [float("inf"), (-np.inf,)],
        3: np.arange(2),
        "path": Path("a/b"),
        "flag": np.bool_(True),
        "undecodable": os.fsdecode(b"caf\xe9.JPEG"),
    }
    write_json(tmp_path / "file.json", value)
    text = (tmp_path / "file.json").read_text(encoding="ascii")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "nan": "NaN",
        "inf": ["Infinity", ["-Infinity"]],
        "3": [0, 1],
        "path": "a/b",
        "flag": True,
        "undecodable": "caf\udce9.JPEG",
    }
    assert json_text({"a": 1}) == '{"a": 1}'
