"""The synthetic set: the same files from the same seed, learnable from content alone."""

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from jpeg_samples import settings

from diagnostics.errors import InputError
from vggrepro import synthetic
from vggrepro.image_folder import index_folder
from vggrepro.synthetic import MARKER, PATTERNS, ensure_synthetic, synthetic_jpeg

SMALL = {"classes": 3, "train_per_class": 2, "val_per_class": 1}


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_same_seed_same_files(tmp_path: Path) -> None:
    one = hashes(ensure_synthetic(tmp_path / "a", seed=1, **SMALL))
    assert one == hashes(ensure_synthetic(tmp_path / "b", seed=1, **SMALL))
    other = hashes(ensure_synthetic(tmp_path / "c", seed=2, **SMALL))
    assert not set(one.values()) & set(other.values())
    assert len(set(one.values())) == len(one) == 3 * 3 + 1


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few = hashes(ensure_synthetic(tmp_path / "few", **SMALL))
    many = ensure_synthetic(tmp_path / "many", classes=4, train_per_class=3, val_per_class=2)
    few.pop(MARKER)
    assert few.items() <= hashes(many).items()


def test_layout_is_ilsvrc(tmp_path: Path) -> None:
    folder = ensure_synthetic(tmp_path / "set", **SMALL)
    train, val = index_folder(folder, "train"), index_folder(folder, "val")
    assert (len(train), len(val)) == (6, 3)
    assert (
        set(train.class_names) == set(list(PATTERNS)[:3]) and train.class_names == val.class_names
    )
    assert all(path.endswith(".JPEG") for path in train.paths)


def test_files_are_jpegs_of_varied_shape() -> None:
    files = [synthetic_jpeg("dots", np.random.default_rng(i)) for i in range(200)]
    shapes = np.array([tf.io.extract_jpeg_shape(file).numpy() for file in files])
    sides = shapes[:, :2]
    assert sides.min() >= 40 and sides.max() <= 130 and np.ptp(sides) > 80
    assert (sides[:, 0] / sides[:, 1]).min() < 0.5 and (sides[:, 0] / sides[:, 1]).max() > 2
    assert set(shapes[:, 2]) == {1, 3}  # some are greyscale


def test_written_once(tmp_path: Path) -> None:
    folder = ensure_synthetic(tmp_path / "set", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert ensure_synthetic(folder, **SMALL) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_several_callers_at_once(tmp_path: Path) -> None:
    faults: list[Exception] = []

    def call() -> None:
        try:
            ensure_synthetic(tmp_path / "set", **SMALL)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert hashes(tmp_path / "set") == hashes(ensure_synthetic(tmp_path / "again", **SMALL))


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail_at_fourth(pattern: str, random: np.random.Generator) -> bytes:
        calls.append(pattern)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return synthetic_jpeg(pattern, random)

    monkeypatch.setattr(synthetic, "synthetic_jpeg", fail_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        ensure_synthetic(tmp_path / "set", **SMALL)
    assert not list(tmp_path.iterdir())


def test_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(InputError, match="not a synthetic data set"):
        ensure_synthetic(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    folder = ensure_synthetic(tmp_path / "set", seed=1, **SMALL)
    with pytest.raises(InputError, match="other parameters.*seed=1"):
        ensure_synthetic(folder, seed=2, **SMALL)


def test_damaged_marker_is_named(tmp_path: Path) -> None:
    folder = ensure_synthetic(tmp_path / "set", **SMALL)
    (folder / MARKER).write_text("{")
    with pytest.raises(InputError, match=MARKER):
        ensure_synthetic(folder, **SMALL)


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write synthetic images"):
        ensure_synthetic(tmp_path / "file" / "set", **SMALL)


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": 1},
        {"classes": len(PATTERNS) + 1},
        {"train_per_class": 0},
        {"val_per_class": 0},
        {"seed": -1},
    ],
)
def test_arguments_out_of_range(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong)).removesuffix("_per_class")):
        ensure_synthetic(tmp_path / "set", **{**SMALL, **wrong})
    assert not list(tmp_path.iterdir())


# What a classifier could use. Features by hand and scikit-learn: no training of a net.


@pytest.fixture(scope="module")
def files() -> tuple[list[bytes], np.ndarray]:
    """60 files of each class, shuffled."""
    names = [name for name in PATTERNS for _ in range(60)]
    order = np.random.default_rng(0).permutation(len(names))
    data = [synthetic_jpeg(names[i], np.random.default_rng(i)) for i in order]
    return data, np.array([list(PATTERNS).index(names[i]) for i in order])


def accuracy(features: np.ndarray, labels: np.ndarray, test_features: np.ndarray) -> float:
    """Trained on the first two thirds of `features`, tested on the rest of the other."""
    ensemble = pytest.importorskip("sklearn.ensemble")
    part = len(labels) * 2 // 3
    forest = ensemble.RandomForestClassifier(200, random_state=0)
    forest.fit(features[:part], labels[:part])
    return forest.score(test_features[part:], labels[part:])


def appearance(data: bytes, tint: float = 0.0) -> np.ndarray:
    """Size, aspect ratio, and mean, spread and quantiles of the colours."""
    image = tf.io.decode_jpeg(data, channels=3).numpy().astype(float) + tint
    height, width = image.shape[:2]
    colours = [image.mean((0, 1)), image.std((0, 1)), *np.quantile(image, (0.1, 0.5, 0.9), (0, 1))]
    return np.concatenate([[height, width, height / width], *colours])


def test_classes_show_neither_in_colour_nor_in_size(files: tuple) -> None:
    data, labels = files
    features = np.stack([appearance(file) for file in data])
    assert accuracy(features, labels, features) < 0.2  # chance is 0.1


def test_the_test_for_colour_sees_colour(files: tuple) -> None:
    data, labels = files
    features = np.stack(
        [appearance(f, 60.0 * label) for f, label in zip(data, labels, strict=True)]
    )
    assert accuracy(features, labels, features) > 0.6


def spectrum(image: np.ndarray) -> np.ndarray:
    """Magnitudes of the grey image's low frequencies: shape, whatever its position."""
    grey = image.mean(-1) - image.mean()
    magnitude = np.abs(np.fft.fftshift(np.fft.fft2(grey / (grey.std() + 1e-6))))
    return magnitude[8:25, 8:25].ravel()


def test_classes_show_in_the_content_and_survive_a_flip(files: tuple) -> None:
    data, labels = files
    images = [settings(32, 37).evaluation_image(file, 37).numpy() for file in data]
    features = np.stack([spectrum(image) for image in images])
    mirrored = np.stack([spectrum(image[:, ::-1]) for image in images])
    straight = accuracy(features, labels, features)
    assert straight > 0.6
    assert abs(accuracy(features, labels, mirrored) - straight) < 0.08
