"""The official tars and Kaggle's layout give what the unpacked directory gives."""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from shard_samples import build, content, make_folder

from diagnostics.errors import InputError
from vggrepro.ilsvrc_labels import validation_classes
from vggrepro.image_sources import kaggle_labels, open_source
from vggrepro.tar_source import tar_members

KIT = "ILSVRC2012_devkit_t12"
NUMBERS = {"a": 3, "b": 1, "c": 2}  # the kit's numbers do not follow the names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), train=30)


def tar_of(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def classes_of_val(folder: Path) -> list[str]:
    """In the order of the images' names."""
    return [f.parent.name for f in sorted(folder.glob("val/*/*"), key=lambda f: f.name)]


@pytest.fixture(scope="module")
def tars(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the download page has them, with the development kit unpacked."""
    root = tmp_path_factory.mktemp("tars")
    inner = {
        f"{name}.tar": tar_of({f.name: f.read_bytes() for f in (folder / "train" / name).iterdir()})
        for name in "cab"
    }
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    images = {f.name: f.read_bytes() for f in folder.glob("val/*/*")}
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(images))
    write_kit(root / KIT / "data", classes_of_val(folder))
    return root


def write_kit(data: Path, classes: list[str], compressed: bool = True) -> None:
    io_module = pytest.importorskip("scipy.io")
    data.mkdir(parents=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(
        "".join(f"{NUMBERS[name]}\n" for name in classes)
    )
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("children", "O")]
    rows = [(i, name, f"{name}, ä", np.zeros(i)) for name, i in NUMBERS.items()]
    synsets = {"synsets": np.array(rows, fields).reshape(-1, 1)}
    io_module.savemat(data / "meta.mat", synsets, do_compression=compressed)


def splits_of(directory: Path) -> dict[str, bytes]:
    """The shards and indexes, without the manifest, which names the source."""
    return {name: data for name, data in content(directory).items() if name != "shards.json"}


def test_tars_give_the_shards_of_the_folder(folder: Path, tars: Path, tmp_path: Path) -> None:
    manifest = build(tars, tmp_path / "from-tars")
    assert manifest["source"] == "tars"
    build(folder, tmp_path / "from-folder")
    assert splits_of(tmp_path / "from-tars") == splits_of(tmp_path / "from-folder")


def test_kaggle_gives_the_shards_of_the_folder(folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "kaggle/ILSVRC/Data/CLS-LOC"
    shutil.copytree(folder / "train", images / "train")
    (images / "val").mkdir()
    lines = ["ImageId,PredictionString"]
    for file in folder.glob("val/*/*"):
        shutil.copy(file, images / "val")
        lines.append(f"{file.stem},{file.parent.name} 1 2 3 4 {file.parent.name} 5 6 7 8 ")
    (tmp_path / "kaggle/LOC_val_solution.csv").write_text("\n".join(lines))
    manifest = build(tmp_path / "kaggle", tmp_path / "from-kaggle")
    assert manifest["source"] == "kaggle"
    build(folder, tmp_path / "from-folder")
    assert splits_of(tmp_path / "from-kaggle") == splits_of(tmp_path / "from-folder")


@pytest.mark.parametrize("compressed", [False, True])
def test_classes_of_the_validation_images(tmp_path: Path, compressed: bool) -> None:
    write_kit(tmp_path / KIT / "data", ["b", "a", "c", "a"], compressed)
    assert validation_classes(str(tmp_path)) == ["b", "a", "c", "a"]
    with tarfile.open(tmp_path / f"{KIT}.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / KIT, KIT)
    shutil.rmtree(tmp_path / KIT)
    assert validation_classes(str(tmp_path)) == ["b", "a", "c", "a"]


def test_ground_truth_may_hold_class_names(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("n01\nn02\n")
    assert validation_classes(str(tmp_path)) == ["n01", "n02"]


@pytest.mark.parametrize("cut", [50, 130, 200, 300])
def test_damaged_kit_is_one_line(tmp_path: Path, cut: int) -> None:
    kit = tmp_path / "kit"
    write_kit(kit, ["a"])
    meta = kit / "meta.mat"
    meta.write_bytes(meta.read_bytes()[:cut])
    with pytest.raises(InputError, match="meta.mat"):
        validation_classes(str(kit))


@pytest.mark.parametrize("name", ["ILSVRC2012_validation_ground_truth.txt", "meta.mat"])
def test_a_kit_of_noise_is_one_line(tmp_path: Path, name: str) -> None:
    write_kit(tmp_path / "kit", ["a"])
    (tmp_path / "kit" / name).write_bytes(b"\xff\xfe" * 400)
    with pytest.raises(InputError, match=name):
        validation_classes(str(tmp_path / "kit"))


# Refusals


def member(name: str, **changes: object) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo(name)
        for key, value in changes.items():
            setattr(info, key, value)
        archive.addfile(info)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (member("/etc/passwd"), "leaves its directory"),
        (member("../x.JPEG"), "leaves its directory"),
        (member("a/../../x.JPEG"), "leaves its directory"),
        (member("a\\..\\x.JPEG"), "leaves its directory"),
        (member("x.JPEG", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "no plain file"),
        (member("x.JPEG", type=tarfile.LNKTYPE, linkname="y"), "no plain file"),
        (member("x.JPEG", type=tarfile.CHRTYPE), "no plain file"),
        (member("x.JPEG", type=tarfile.FIFOTYPE), "no plain file"),
        (member("sub/x.JPEG"), "in a directory of its own"),
        (b"not a tar" * 200, "no readable tar"),
        (tar_of({"x.JPEG": b"1" * 5000})[:2000], "no readable tar"),
    ],
)
def test_unsafe_members_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    file = tmp_path / "images.tar"
    file.write_bytes(data)
    with pytest.raises(InputError, match=words):
        list(tar_members(str(file), 0, len(data)))


def test_members_are_where_they_are_said_to_be(tmp_path: Path) -> None:
    files = {f"{i}.JPEG": bytes([i]) * (i * 300) for i in range(1, 9)}
    file = tmp_path / "outer.tar"
    file.write_bytes(tar_of({"first": b"x" * 777, "inner.tar": tar_of(files)}))
    data = file.read_bytes()
    outer = {name: (at, size) for name, at, size in tar_members(str(file), 0, len(data))}
    found = tar_members(str(file), *outer["inner.tar"])
    assert {name: data[at : at + size] for name, at, size in found} == files


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "ILSVRC2012_img_val.tar").unlink(), "ILSVRC2012_img_val.tar is missing"),
        (lambda d: shutil.rmtree(d / KIT), "holds neither"),
        (
            lambda d: (d / KIT / "data/ILSVRC2012_validation_ground_truth.txt").write_text("1\n"),
            "holds 7 images, its ground truth is of 1",
        ),
        (
            lambda d: (d / KIT / "data/ILSVRC2012_validation_ground_truth.txt").write_text("9\n"),
            "meta.mat knows no class 9",
        ),
        (
            lambda d: (d / "ILSVRC2012_img_train.tar").write_bytes(tar_of({"x.JPEG": b"1"})),
            "x.JPEG, which is no tar of a class",
        ),
    ],
)
def test_incomplete_tars_are_refused(
    tars: Path, tmp_path: Path, damage: Callable, words: str
) -> None:
    copy = shutil.copytree(tars, tmp_path / "copy")
    damage(copy)
    with pytest.raises(InputError, match=words):
        open_source(copy)


@pytest.mark.parametrize("line", ["a", "a,", "a,b,c"])
def test_bad_csv_lines_are_named(line: str) -> None:
    with pytest.raises(InputError, match="x.csv, line 2"):
        kaggle_labels(f"ImageId,PredictionString\n{line}", "x.csv")


def test_unknown_layout_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images in a known layout"):
        open_source(tmp_path)
