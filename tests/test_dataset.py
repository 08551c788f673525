"""Batches by step: order, randomness, random access, and what is said about bad data."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from jpeg_samples import AUGMENTED, augmented, jpeg, pixels, settings
from tensorflow.python.autograph.impl import api as autograph

from diagnostics.errors import InputError
from vggrepro.dataset import EvaluationStream, TrainingStream, example_files
from vggrepro.example_index import ExampleIndex
from vggrepro.example_reader import find_bad_example
from vggrepro.image_folder import index_folder
from vggrepro.order import shuffled
from vggrepro.rng import STREAM_AUGMENT, fold_in, fold_in_tensor
from vggrepro.synthetic import ensure_synthetic

PYTHON_OPS = {"PyFunc", "PyFuncStateless", "EagerPyFunc", "GeneratorDataset"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes, 5 training and 3 validation images each."""
    target = tmp_path_factory.mktemp("data") / "set"
    return ensure_synthetic(target, seed=1, classes=3, train_per_class=5, val_per_class=3)


@pytest.fixture(scope="module")
def index(folder: Path) -> ExampleIndex:
    return index_folder(folder, "train")


def imaginary_index(count: int) -> ExampleIndex:
    """Examples whose files need not exist: for questions of order alone."""
    paths = tuple(f"train/a/{i}.JPEG" for i in range(count))
    return ExampleIndex("/nowhere", "train", paths, np.zeros(count, np.int32), ("a",), "")


def same_bits(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[name].numpy().tobytes() == other[name].numpy().tobytes() for name in one
    )


# Order


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 2**63 - 1))
def test_every_epoch_takes_each_example_once(count: int, batch_size: int, seed: int) -> None:
    stream = TrainingStream(imaginary_index(count), settings(), batch_size, seed)
    steps = -(-3 * count // batch_size)
    ids = [i for step in range(steps) for i in stream.example_ids(step)]
    epochs = [ids[e * count : (e + 1) * count] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    if count > 12:  # two equal permutations of so many would be a fault, not chance
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@given(st.integers(0, 2**63 - 2))
def test_order_depends_on_the_seed(seed: int) -> None:
    one, other = (TrainingStream(imaginary_index(30), settings(), 30, s) for s in (seed, seed + 1))
    assert one.example_ids(0) != other.example_ids(0)


def test_permutations_are_fair() -> None:
    """Each element comes at each place equally often; neighbours do not stay together."""
    count, epochs = 8, 2000
    seeds = tf.repeat(fold_in_tensor(5, tf.range(epochs, dtype=tf.int64)), count)
    indices = tf.tile(tf.range(count, dtype=tf.int64), [epochs])
    orders = shuffled(indices, seeds, count).numpy().reshape(epochs, count)
    for place in range(count):
        share = np.bincount(orders[:, place], minlength=count) / epochs
        assert abs(share - 1 / count).max() < 0.04  # 5 standard deviations
    together = (np.diff(orders, axis=1) == 1).mean()
    assert abs(together - 1 / count) < 0.02


def test_a_million_examples_start_at_once() -> None:
    stream = TrainingStream(imaginary_index(1_281_167), settings(), 256, 0)
    late = stream.example_ids(370_000)
    assert len(set(late)) == 256 and min(late) >= 0 and max(late) < 1_281_167


# Random access


def test_any_step_first_or_twice_gives_the_same_bits(index: ExampleIndex) -> None:
    stream = TrainingStream(index, AUGMENTED, 4, seed=3)
    first = stream.batch(1000)
    stream.batch(2)
    assert same_bits(first, stream.batch(1000))
    assert same_bits(first, TrainingStream(index, AUGMENTED, 4, seed=3).batch(1000))
    assert not same_bits(first, TrainingStream(index, AUGMENTED, 4, seed=4).batch(1000))


@pytest.mark.parametrize("decode", ["exact", "fast"])
@pytest.mark.parametrize("first_step", [0, 7, 12345])
def test_stream_gives_the_batches(index: ExampleIndex, decode: str, first_step: int) -> None:
    preprocessing = settings(flip=True, decode=decode, scale_max=30)
    stream = TrainingStream(index, preprocessing, 4, seed=3)
    for step, batch in zip(
        range(first_step, first_step + 6), stream.stream(first_step), strict=False
    ):
        assert same_bits(batch, stream.batch(step))
        assert list(batch["example_ids"].numpy()) == stream.example_ids(step)


def test_batch_is_what_it_says(index: ExampleIndex) -> None:
    stream = TrainingStream(index, AUGMENTED, 4, seed=3)
    batch = stream.batch(5)
    assert {name: (v.dtype, v.shape) for name, v in batch.items()} == {
        "images": (tf.float32, (4, 16, 16, 3)),
        "labels": (tf.int32, (4,)),
        "example_ids": (tf.int64, (4,)),
    }
    for label, example_id in zip(
        batch["labels"].numpy(), batch["example_ids"].numpy(), strict=True
    ):
        path = stream.name_of(int(example_id))
        assert path.split("/")[1] == index.class_names[label]


def test_augmentation_follows_epoch_and_example_not_batch(index: ExampleIndex) -> None:
    """The same examples in batches of 3 and of 5: 30 positions are two epochs of 15."""
    images = {}
    for batch_size in (3, 5):
        stream = TrainingStream(index, AUGMENTED, batch_size, seed=3)
        images[batch_size] = np.concatenate(
            [stream.batch(step)["images"].numpy() for step in range(30 // batch_size)]
        )
    assert np.array_equal(images[3], images[5])
    order = TrainingStream(index, AUGMENTED, 30, seed=3).example_ids(0)
    for example in range(15):
        one, two = (order.index(example, start) for start in (0, 15))
        assert not np.array_equal(images[3][one], images[3][two])


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_augmentation_is_keyed_by_seed_epoch_and_example(index: ExampleIndex, seed: int) -> None:
    """What a replay of one example needs to know, and no more."""
    stream = TrainingStream(index, AUGMENTED, 4, seed)
    for step in (0, 3, 40):  # the second lies across the end of an epoch
        batch = stream.batch(step)
        for row in range(4):
            epoch, example = (step * 4 + row) // 15, int(batch["example_ids"][row])
            data = Path(index.location(example)).read_bytes()
            key = [fold_in(fold_in(seed, STREAM_AUGMENT), epoch), example]
            image = augmented(AUGMENTED, data, key)
            np.testing.assert_allclose(batch["images"][row], image, rtol=0, atol=1e-3)


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 4, 9, 20])
def test_evaluation_counts_each_example_once(folder: Path, batch_size: int) -> None:
    validation = index_folder(folder, "val")
    stream = EvaluationStream(validation, settings(), batch_size)
    batches = list(stream)
    assert len(batches) == len(stream)
    joined = {k: np.concatenate([b[k].numpy() for b in batches]) for k in batches[0]}
    real = joined["weights"] == 1
    assert list(joined["example_ids"][real]) == list(range(9))
    assert np.array_equal(joined["labels"][real], validation.labels)
    assert set(joined["weights"]) <= {0.0, 1.0} and real.sum() == 9
    assert not joined["images"][~real].any() and set(joined["example_ids"][~real]) <= {-1}
    data = (folder / stream.name_of(4)).read_bytes()
    assert np.array_equal(joined["images"][4], settings().evaluation_image(data, 20))
    assert all(same_bits(a, b) for a, b in zip(batches, stream, strict=True))


def test_evaluation_takes_the_middle_of_the_scale_range(folder: Path) -> None:
    jittered = settings(scale_min=20, scale_max=30)
    stream = EvaluationStream(index_folder(folder, "val"), jittered, 1)
    data = (folder / stream.name_of(0)).read_bytes()
    assert np.array_equal(next(iter(stream))["images"][0], settings().evaluation_image(data, 25))


# The graph


def op_types(dataset: tf.data.Dataset) -> set[str]:
    """Every op of a dataset and of the functions that it calls."""
    serialized = tf.raw_ops.DatasetToGraphV2(
        input_dataset=dataset._variant_tensor, external_state_policy=1
    )
    graph = tf.compat.v1.GraphDef.FromString(serialized.numpy())
    functions = [node for function in graph.library.function for node in function.node_def]
    return {node.op for node in [*graph.node, *functions]}


def test_no_python_runs_in_the_pipeline(index: ExampleIndex, folder: Path) -> None:
    training = op_types(TrainingStream(index, AUGMENTED, 4, 0).stream(0))
    evaluation = op_types(EvaluationStream(index, settings(decode="fast"), 4).dataset())
    assert {"ScaleAndTranslate", "VggreproCropInto"} & training
    assert "DecodeAndCropJpeg" in evaluation
    assert not (training | evaluation) & PYTHON_OPS


@pytest.mark.parametrize(
    "dataset",
    [
        lambda x: x.map(lambda i: tf.py_function(lambda v: v, [i], tf.int64)),
        lambda x: x.map(lambda i: tf.numpy_function(lambda v: v, [i], tf.int64)),
        lambda x: x.map(
            lambda i: tf.cond(i > 0, lambda: tf.py_function(lambda: i, [], tf.int64), lambda: i)
        ),
        lambda x: tf.data.Dataset.from_generator(
            lambda: iter([1]), output_signature=tf.TensorSpec([], tf.int64)
        ),
    ],
)
def test_the_test_for_python_sees_python(dataset: Callable) -> None:
    assert op_types(dataset(tf.data.Dataset.range(3)).batch(2)) & PYTHON_OPS


def test_no_function_of_the_pipeline_is_rewritten(
    index: ExampleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As AutoGraph would, at the cost of a third of a run's start."""
    rewritten = []
    convert = autograph._convert_actual

    def watched(entity: Any, context: Any) -> Any:
        rewritten.append(entity)
        return convert(entity, context)

    monkeypatch.setattr(autograph, "_convert_actual", watched)
    stream = TrainingStream(index, AUGMENTED, 4, 0)
    stream.batch(0)
    stream.stream(0)
    EvaluationStream(index, settings(decode="fast"), 4)
    example_files(index, np.arange(2))
    assert rewritten == []
    tf.data.Dataset.range(1).map(lambda number: number + 1)
    assert len(rewritten) == 1, "nothing was watched"


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_shapes_are_static(index: ExampleIndex, decode: str) -> None:
    preprocessing = settings(decode=decode)
    training = TrainingStream(index, preprocessing, 4, 0).stream(0)
    evaluation = EvaluationStream(index, preprocessing, 4).dataset()
    for spec in (training.element_spec, evaluation.element_spec):
        assert all(value.shape.is_fully_defined() for value in spec.values())
        assert spec["images"].shape == (4, 16, 16, 3)


# Bad data


def test_index_lists_what_is_there(folder: Path, index: ExampleIndex) -> None:
    files = sorted(p.relative_to(folder).as_posix() for p in folder.glob("train/*/*"))
    assert list(index.paths) == files and len(index) == 15
    assert index.class_names == ("checker", "horizontal", "vertical")
    assert list(index.labels) == [0] * 5 + [1] * 5 + [2] * 5
    assert index.fingerprint == index_folder(str(folder), "train").fingerprint
    assert index.fingerprint != index_folder(folder, "val").fingerprint


def test_index_is_sorted_whatever_the_disk_says(tmp_path: Path) -> None:
    names = ["z", "b", "a10", "a9", "M", "k", "c", "x", "d"]
    for split in ("train", "val"):
        for class_name in names:
            (tmp_path / split / class_name).mkdir(parents=True)
            for file in ("9", "10", "b", "a", "B"):
                (tmp_path / split / class_name / f"{file}.JPEG").write_bytes(b"x")
    index = index_folder(tmp_path, "train")
    assert list(index.class_names) == sorted(names)
    assert list(index.paths) == [
        f"train/{name}/{file}.JPEG" for name in sorted(names) for file in ("10", "9", "B", "a", "b")
    ]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def test_index_takes_any_jpeg_suffix_and_skips_dotfiles(copy: Path) -> None:
    before = index_folder(copy, "train")
    file = copy / "train" / "checker" / "checker_00000.JPEG"
    file.rename(file.with_suffix(".jpg"))
    (copy / "train" / "checker" / ".DS_Store").write_text("")
    (copy / "train" / ".cache").mkdir()
    after = index_folder(copy, "train")
    assert len(after) == 15 and after.fingerprint != before.fingerprint


def test_fingerprint_follows_the_files(copy: Path) -> None:
    before = index_folder(copy, "train").fingerprint
    (copy / "train" / "checker" / "checker_00000.JPEG").write_bytes(b"shorter")
    assert index_folder(copy, "train").fingerprint != before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: shutil.rmtree(d / "val"), ["val", "No such file"]),
        (lambda d: shutil.rmtree(d / "train"), ["train", "No such file"]),
        (lambda d: shutil.rmtree(d), ["train", "No such file"]),
        (
            lambda d: [shutil.rmtree(c) for c in (d / "train").iterdir()],
            ["train", "no class directories"],
        ),
        (
            lambda d: [f.unlink() for f in (d / "train" / "dots").iterdir()],
            ["train/dots", "empty"],
        ),
        (lambda d: shutil.rmtree(d / "val" / "dots"), ["'dots'", "train/", "not in val/"]),
        (lambda d: shutil.rmtree(d / "train" / "dots"), ["'dots'", "val/", "not in train/"]),
        (lambda d: (d / "train" / "dots" / "labels.txt").write_text("x"), ["labels.txt"]),
        (lambda d: (d / "train" / "dots" / "more.JPEG").mkdir(), ["more.JPEG"]),
        (lambda d: (d / "train" / "dots" / "gone.JPEG").symlink_to("x"), ["train/dots"]),
        (lambda d: (d / "train" / "dots" / "a\udcff.JPEG").write_bytes(b"x"), ["UTF-8"]),
    ],
)
def test_bad_layout_is_named(tmp_path: Path, damage: Callable, words: list[str]) -> None:
    data = tmp_path / "data"
    for split in ("train", "val"):
        for class_name in ("dots", "rings"):
            folder = data / split / class_name
            folder.mkdir(parents=True)
            (folder / "a.JPEG").write_bytes(jpeg(pixels(20, 20, 0)))
    assert len(index_folder(data, "train")) == 2
    damage(data)
    with pytest.raises(InputError) as caught:
        index_folder(data, "train")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("decode", ["exact", "fast"])
@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 3]), "truncated"),
        (lambda f: f.write_bytes(f.read_bytes()[:100]), "truncated"),
        (lambda f: f.write_bytes(b""), "empty"),
        (lambda f: f.write_text("<html>404</html>"), "not a JPEG"),
        (lambda f: f.unlink(), "No such file"),
        (lambda f: (f.unlink(), f.mkdir()), "directory"),
    ],
)
def test_bad_file_is_named(copy: Path, decode: str, damage: Callable, fault: str) -> None:
    index = index_folder(copy, "train")
    stream = TrainingStream(index, settings(16, 16, decode=decode), 15, seed=0)
    bad = copy / index.name_of(7)
    damage(bad)
    with pytest.raises(tf.errors.OpError):
        for step in range(8):  # the fast path needs a crop that reaches the damage
            stream.batch(step)
    found = find_bad_example(index, stream.example_ids(0))
    assert isinstance(found, InputError)
    assert str(bad) in found.message and fault in found.message and found.remedy
    with pytest.raises(tf.errors.OpError):
        list(EvaluationStream(index, settings(16, 16), 4))


def test_good_files_are_not_accused(index: ExampleIndex) -> None:
    assert find_bad_example(index, [-1, *range(len(index))]) is None
