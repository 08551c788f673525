"""Bundles: exact there and back, nothing private in them, nothing odd accepted."""

import hashlib
import json
import os
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.bundle import open_bundle, write_bundle
from diagnostics.errors import InputError, SnapshotDamaged
from diagnostics.incident import read_incident, write_incident
from diagnostics.privacy import Scrubber
from vggrepro.run_directory import RunDirectory

STEP = 7
INCIDENT = f"incidents/step-{STEP:08d}"
DATA = "/home/alice/my photos/ilsvrc"
NAMES = ["n01/a.jpg", f"{DATA}/n02/b.jpg", "/mnt/secret-disk/c.jpg", "../alice/d.jpg"]
STATE = {
    "params/fc1/kernel": np.array([[np.nan, -0.0], [np.inf, 1e-45]], np.float32),
    "counters/step": np.array(STEP, np.int64),
}
BATCH = {"images": np.ones((2, 3), np.float32), "example_ids": np.array([3, 5], np.int64)}


def make_run(path: Path) -> Path:
    config = {"data": DATA, "arch": "A", "lr": 0.01}
    manifest = {
        "status": "stopped_by_guard",
        "parent_run": "/home/alice/runs/first",
        "note": "work/bobby/runs, by bobby@host",
    }
    with RunDirectory.create(path, config, manifest) as run:
        run.telemetry.start(["loss"], 0)
        for step in range(STEP):
            run.telemetry.append(step, np.array([step], np.float32))
        run.append_metrics({"step": 0, "loss": 0.5, "note": f"read {DATA}/n01/a.jpg"})
        record = {
            "step": STEP,
            "example_names": NAMES,
            "config": config,
            "message": f"cannot read {DATA}/n01/a.jpg: bad; see ~/notes or gs://bucket/x",
        }
        write_incident(run.incident_directory(STEP), state=STATE, batch=BATCH, record=record)
    return path


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def bundle(run_directory, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("bundle") / "step.bundle"
    write_bundle(file, run_directory, STEP, private=[DATA])
    return file


def opened(file: Path, into: Path) -> Path:
    open_bundle(file, into)
    return into


def test_a_bundle_opens_as_a_run_directory(bundle, tmp_path):
    with RunDirectory.open(opened(bundle, tmp_path / "run")) as run:
        assert run.config() == {"data": "<path>", "arch": "A", "lr": 0.01}
        assert run.manifest()["status"] == "stopped_by_guard"
        steps, columns, rows = run.telemetry.read()
        assert steps.tolist() == list(range(STEP)) and columns == ["loss"]
        assert rows[:, 0].tolist() == list(range(STEP))
        assert [record["loss"] for record in run.metrics()] == [0.5]
        assert [directory.name for directory in run.incidents()] == [f"step-{STEP:08d}"]


def test_state_and_batch_are_the_same_bits(bundle, tmp_path):
    incident = read_incident(opened(bundle, tmp_path / "run") / INCIDENT)
    assert incident.step == STEP
    for found, expected in ((incident.state, STATE), (incident.batch, BATCH)):
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()


def test_example_names_keep_what_is_relative(bundle, tmp_path):
    record = read_incident(opened(bundle, tmp_path / "run") / INCIDENT).record
    assert record["example_names"] == ["n01/a.jpg", "n02/b.jpg", "c.jpg", "d.jpg"]


def test_nothing_private_is_in_the_file(bundle):
    content = bundle.read_bytes()
    for private in (b"alice", b"my photos", b"ilsvrc", b"secret-disk", b"gs://", b"notes"):
        assert private not in content


def test_the_file_is_stored_plain_and_the_same_each_time(bundle, run_directory, tmp_path):
    size = write_bundle(tmp_path / "again", run_directory, STEP, private=[DATA])
    assert (tmp_path / "again").read_bytes() == bundle.read_bytes()
    assert size == bundle.stat().st_size
    with zipfile.ZipFile(bundle) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    assert list(tmp_path.iterdir()) == [tmp_path / "again"]


def test_the_users_name_is_left_out(bundle, run_directory, tmp_path, monkeypatch):
    assert b"bobby" in bundle.read_bytes(), "the name of another user is no secret"
    monkeypatch.setattr("getpass.getuser", lambda: "bobby")
    write_bundle(tmp_path / "file", run_directory, STEP)
    assert b"bobby" not in (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("user", ["root", "al", "caffe"])
def test_a_setting_that_is_also_a_user_stays(user, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: user)
    assert Scrubber().value({"momentum_form": "caffe", "at": "a/root al/b"}) == {
        "momentum_form": "caffe",
        "at": "a/root al/b",
    }


def test_a_bundle_above_the_limit_names_what_is_large(run_directory, tmp_path):
    with pytest.raises(
        InputError, match=r"more than the limit of 1.0 kB: .*params/fc1/kernel 16 b"
    ):
        write_bundle(tmp_path / "file", run_directory, STEP, size_limit=1000)
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_incident_is_not_packed(tmp_path):
    run = make_run(tmp_path / "run")
    (run / INCIDENT / "batch" / "state.safetensors").unlink()
    with pytest.raises(SnapshotDamaged, match="batch/state.safetensors is missing"):
        write_bundle(tmp_path / "file", run, STEP)
    assert not (tmp_path / "file").exists()


def test_a_step_without_incident_is_named(run_directory, tmp_path):
    with pytest.raises(SnapshotDamaged, match="step-00000008"):
        write_bundle(tmp_path / "file", run_directory, STEP + 1)


def test_the_larger_bundle_is_refused_before_it_is_unpacked(bundle, tmp_path):
    with pytest.raises(InputError, match="the limit is 1.0 kB"):
        open_bundle(bundle, tmp_path / "run", size_limit=1000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_directory_is_left_alone(bundle, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="is not empty"):
        open_bundle(bundle, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def contents(bundle: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(bundle) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(file: Path, entries: list[tuple[zipfile.ZipInfo | str, bytes]]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for entry, data in entries:
            archive.writestr(entry, data)
    return file


def listing(files: dict[str, bytes], **changes) -> bytes:
    """bundle.json of these files."""
    described = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    value = {"schema": 1, "format": "failing-step bundle", "step": STEP, "files": described}
    return json.dumps({**value, **changes}).encode()


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


def compressed(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


HOSTILE_NAMES = [
    "../evil.json",
    "/tmp/evil.json",
    "C:\\evil.json",
    "incidents/../../evil.json",
    "incidents\\step-00000007\\incident.json",
    "telemetry/evil.bin",
    "checkpoints/step-00000000/state.safetensors",
    "run.py",
    ".hidden.json",
    "config.json/",
    "ev\x1b[31mil.json",
    "évil.json",
    "incidents/step-0000000\u0667/incident.json",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_are_refused(bundle, tmp_path, name):
    files = contents(bundle)
    del files["bundle.json"]
    files[name] = b"{}"
    file = pack(tmp_path / "file", [*files.items(), ("bundle.json", listing(files))])
    with pytest.raises(InputError) as caught:
        open_bundle(file, tmp_path / "in" / "run")
    assert "\x1b" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == [file]


def change_config(files: dict[str, bytes], entries: list) -> None:
    entries[0] = ("config.json", files["config.json"][:-2] + b" }")


ODDITIES = {
    "a changed file": (change_config, "config.json does not match its hash"),
    "a link": (
        lambda files, entries: entries.__setitem__(0, (link("config.json"), b"/etc/passwd")),
        "'config.json' is not a plain file",
    ),
    "a compressed file": (
        lambda files, entries: entries.__setitem__(0, (compressed("config.json"), b"0" * 10**6)),
        "'config.json' is compressed",
    ),
    "a file twice": (
        lambda files, entries: entries.append(("config.json", b"{}")),
        "holds 'config.json' twice",
    ),
    "a file too many": (
        lambda files, entries: entries.append(("more.json", b"{}")),
        "more.json is missing or not listed",
    ),
    "a file too few": (
        lambda files, entries: entries.pop(0),
        "config.json is missing or not listed",
    ),
    "another schema": (
        lambda files, entries: entries.append(("bundle.json", listing(files, schema=99))),
        "schema 99; this version reads 1",
    ),
    "another format": (
        lambda files, entries: entries.append(("bundle.json", listing(files, format="x"))),
        "schema 1; this version reads 1",
    ),
    "another step": (
        lambda files, entries: entries.append(("bundle.json", listing(files, step=8))),
        "step-00000008",
    ),
    "no JSON": (
        lambda files, entries: entries.append(("bundle.json", b"[" * 100_000)),
        "its bundle.json cannot be read",
    ),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_odd_bundles_are_refused(bundle, tmp_path, name, recwarn):
    alter, message = ODDITIES[name]
    files = contents(bundle)
    listed = files.pop("bundle.json")
    entries: list = list(files.items())
    alter(files, entries)
    if all(entry[0] != "bundle.json" for entry in entries):
        entries.append(("bundle.json", listed))
    file = pack(tmp_path / "file", entries)
    with pytest.raises(InputError, match=message):
        open_bundle(file, tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == [file]


def test_the_pack_helper_makes_sound_bundles(bundle, tmp_path):
    files = contents(bundle)
    del files["bundle.json"]
    file = pack(tmp_path / "file", [*files.items(), ("bundle.json", listing(files))])
    open_bundle(file, tmp_path / "run")


@pytest.mark.parametrize("data", [b"", b"PK", b"not a zip" * 100])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(InputError, match="not a sound bundle"):
        open_bundle(tmp_path / "file", tmp_path / "run")
    with pytest.raises(InputError, match="cannot read"):
        open_bundle(tmp_path / "nowhere", tmp_path / "run")


@given(data=st.data())
def test_damage_is_refused_or_harmless(bundle, tmp_path_factory, data):
    """A flipped byte or a cut never gives a run that differs from the one packed."""
    tmp_path = tmp_path_factory.mktemp("damage")
    content = bytearray(bundle.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    (tmp_path / "file").write_bytes(content)
    try:
        open_bundle(tmp_path / "file", tmp_path / "run")
    except InputError:
        assert not (tmp_path / "run").exists()
        return
    expected = contents(bundle)
    for file in (path for path in (tmp_path / "run").rglob("*") if path.is_file()):
        assert file.read_bytes() == expected[file.relative_to(tmp_path / "run").as_posix()]


words = st.text(st.characters(codec="utf-8", exclude_characters="/\\\0"), min_size=3, max_size=9)
private_paths = st.builds(
    lambda parts, root: root + "/".join(["Zq9" + part for part in parts]),
    st.lists(words, min_size=1, max_size=4),
    st.sampled_from(["/", "/mnt/", "~/", "C:\\", "\\\\host\\", "gs://", "file:///"]),
)


@given(path=private_paths)
def test_no_part_of_an_absolute_path_gets_out(path):
    clean = Scrubber().value({"value": path, "list": [{path: path}]})
    assert "Zq9" not in json.dumps(clean)
    name = Scrubber().example_name(path)
    assert "/" not in name and "\\" not in name


@given(path=private_paths, before=words, after=words)
def test_a_known_path_in_a_sentence_gets_out_nowhere(path, before, after):
    text = Scrubber([path]).text(f"{before} {path}/x.jpg: {after}")
    assert path not in text


@pytest.mark.parametrize(
    "text",
    [
        "block1_conv1/preactivation_absmax",
        "n01440764/n01440764_10029.JPEG",
        "inputs / 128",
        "normal:0.1",
        "2.3 GB/s",
        "sqrt(fan_in * sigma^2 / 2)",
        "synthetic",
    ],
)
def test_ordinary_texts_stay(text):
    assert Scrubber([DATA]).text(text) == text
    assert Scrubber([DATA]).example_name(text) == text


def test_an_account_without_home_or_name(monkeypatch):
    def unknown(*arguments):
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", unknown)
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert Scrubber().text("a/b in /c/d") == "a/b in <path>"


def test_unreadable_disk_is_named(run_directory, tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(InputError, match=f"cannot write {tmp_path / 'file'}"):
        write_bundle(tmp_path / "file", run_directory, STEP)
    assert os.listdir(tmp_path) == ["file"]
