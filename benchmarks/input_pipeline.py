"""Images a second through the input pipeline, beside JPEG decoding alone.

All variants read the same files (500x375, about 70 KB, made on the spot) with the same
number of threads, and run in turn, round by round, in one process, so that a slow
moment of the machine hits all. The table shows medians and the median of the ratios
round by round to decoding alone; once by wall clock, and once by CPU time, which other
processes disturb less. Every round starts a fresh iterator, so nothing of one variant
is computed in another's time. Op determinism stays off: it would make the
stateful random ops of plain TensorFlow take turns; ours has none.

Usage: python benchmarks/input_pipeline.py [--size demo|photographs|both] [--rounds N]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from vggrepro.dataset import TrainingStream
from vggrepro.environment import describe_environment
from vggrepro.example_index import ExampleIndex
from vggrepro.image_folder import index_folder
from vggrepro.preprocessing import Preprocessing
from vggrepro.synthetic import ensure_synthetic

Run = Callable[[int], "Cost"]  # what so many images cost

BATCH = 32
MEAN_RGB = (123.68, 116.779, 103.939)
COMPONENTS = ((-0.123, 0.014, 0.002), (-0.126, 0.0, -0.004), (-0.127, -0.013, 0.002))


@dataclass(frozen=True)
class Cost:
    """Seconds an image, by the wall clock and summed over the process's threads."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Size:
    """One table: which images become which crops, and how many a timing takes."""

    name: str
    image_size: int
    scale: int
    images: int


SIZES = {
    "demo": Size("40 to 130 px to 32 px, shorter side 37", 32, 37, 3200),
    "photographs": Size("500x375 to 224 px, shorter side 256", 224, 256, 384),
}


def photographs(folder: Path, count: int = 400) -> Path:
    """One class of `count` files: smooth colours under grain, quality 82, a third upright."""
    for split, number in (("train", count), ("val", 1)):
        target = folder / split / "photograph"
        target.mkdir(parents=True)
        for i in range(number):
            random = np.random.default_rng(i)
            height, width = (500, 375) if i % 3 == 0 else (375, 500)
            coarse = random.uniform(0, 255, (height // 30, width // 30, 3))
            smooth = tf.image.resize(coarse, [height, width], method="bicubic").numpy()
            grain = random.normal(0, 16, (height, width, 1))
            image = np.clip(smooth + grain, 0, 255).astype(np.uint8)
            jpeg = tf.io.encode_jpeg(image, quality=82).numpy()
            (target / f"{i:04d}.JPEG").write_bytes(jpeg)
    return folder


def settings(size: Size, decode: str) -> Preprocessing:
    return Preprocessing(
        image_size=size.image_size,
        scale_min=size.scale,
        scale_max=size.scale,
        flip=True,
        colour_shift=0.1,
        resize="triangle",
        decode=decode,
        mean_rgb=MEAN_RGB,
        colour_components=COMPONENTS,
    )


def cost_since(started: tuple[float, float], images: int) -> Cost:
    wall, cpu = started
    return Cost((time.perf_counter() - wall) / images, (time.process_time() - cpu) / images)


def timing(dataset: tf.data.Dataset) -> Run:
    """Times batches of BATCH images; the first one of every call is not counted."""

    def run(images: int) -> Cost:
        batches = iter(dataset)
        next(batches)
        started = time.perf_counter(), time.process_time()
        for _ in range(images // BATCH):
            next(batches)
        return cost_since(started, images)

    return run


def ours(index: ExampleIndex, preprocessing: Preprocessing) -> Run:
    return timing(TrainingStream(index, preprocessing, BATCH, seed=0).stream(0))


def with_tensorflow(index: ExampleIndex, process: Callable[[tf.Tensor], tf.Tensor]) -> Run:
    """Files in shuffled order through `process`, on as many threads as ours."""
    paths = tf.constant([f"{index.root}/{path}" for path in index.paths])
    threads = os.cpu_count() or 1
    dataset = (
        tf.data.Dataset.range(len(index))
        .shuffle(len(index), seed=0)
        .repeat()
        .map(
            lambda i: process(tf.io.read_file(paths[i])),
            num_parallel_calls=threads,
            deterministic=True,
        )
        .batch(BATCH, drop_remainder=True)
        .prefetch(2)
    )
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.autotune.enabled = False
    return timing(dataset.with_options(options))


def decode(jpeg: tf.Tensor) -> tf.Tensor:
    return tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE")


def cut_out(size: Size) -> Callable[[tf.Tensor], tf.Tensor]:
    """A corner of the decoded image as it is: what handing over float32 crops costs."""

    def process(jpeg: tf.Tensor) -> tf.Tensor:
        side = size.image_size
        return tf.cast(tf.ensure_shape(decode(jpeg)[:side, :side], [side, side, 3]), tf.float32)

    return process


def plain_tensorflow(size: Size, antialias: bool) -> Callable[[tf.Tensor], tf.Tensor]:
    """Decode, rescale, random crop, flip, mean: as the tutorials do."""

    def process(jpeg: tf.Tensor) -> tf.Tensor:
        image = decode(jpeg)
        shape = tf.cast(tf.shape(image)[:2], tf.float32)
        rescaled = tf.cast(tf.round(shape * size.scale / tf.reduce_min(shape)), tf.int32)
        image = tf.image.resize(image, rescaled, antialias=antialias)
        image = tf.image.random_crop(image, [size.image_size, size.image_size, 3])
        return tf.image.random_flip_left_right(image) - tf.constant(MEAN_RGB)

    return process


def with_pillow(index: ExampleIndex, size: Size) -> Run | None:
    """The same chain in Pillow and numpy, one process; None where it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        return None
    random = np.random.default_rng(0)

    def one(path: str) -> np.ndarray:
        image = Image.open(f"{index.root}/{path}").convert("RGB")
        factor = size.scale / min(image.size)
        width, height = (round(side * factor) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left = int(random.integers(width - size.image_size + 1))
        top = int(random.integers(height - size.image_size + 1))
        image = image.crop((left, top, left + size.image_size, top + size.image_size))
        pixels = np.asarray(image, np.float32)
        return (pixels[:, ::-1] if random.random() < 0.5 else pixels) - np.array(
            MEAN_RGB, np.float32
        )

    def run(images: int) -> Cost:
        paths = [index.paths[i] for i in random.integers(len(index), size=images)]
        started = time.perf_counter(), time.process_time()
        for first in range(0, images, BATCH):
            np.stack([one(path) for path in paths[first : first + BATCH]])
        return cost_since(started, images)

    return run


def variants(index: ExampleIndex, size: Size) -> dict[str, Run]:
    cubic = dataclasses.replace(settings(size, "exact"), resize="keyscubic")
    found = {
        "decode only": with_tensorflow(index, lambda jpeg: tf.reduce_max(tf.shape(decode(jpeg)))),
        "decode, cut a corner": with_tensorflow(index, cut_out(size)),
        "ours, exact": ours(index, settings(size, "exact")),
        "ours, fast": ours(index, settings(size, "fast")),
        "ours, exact, keyscubic": ours(index, cubic),
        "plain TensorFlow": with_tensorflow(index, plain_tensorflow(size, antialias=False)),
        "plain TensorFlow, antialias": with_tensorflow(index, plain_tensorflow(size, True)),
    }
    pillow = with_pillow(index, size)
    return {**found, "Pillow, one process": pillow} if pillow else found


def measure(runs: dict[str, Run], images: int, rounds: int) -> dict[str, list[Cost]]:
    """What an image costs, for every variant and round, in turn."""
    for run in runs.values():
        run(2 * BATCH)
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            costs[name].append(run(images))
    return costs


def report(console: Console, size: Size, folder: Path, rounds: int) -> None:
    index = index_folder(folder, "train")
    kilobytes = sum((folder / path).stat().st_size for path in index.paths) / len(index) / 1000
    costs = measure(variants(index, size), size.images, rounds)
    console.print(
        f"{size.name}; {len(index)} files of {kilobytes:.0f} KB on average; "
        f"{rounds} rounds of {size.images} images"
    )
    table = Table("variant", "images/s", "ratio to decode only", "CPU us an image", "CPU ratio")
    for name, found in costs.items():
        pairs = list(zip(found, costs["decode only"], strict=True))
        wall = statistics.median(cost.wall for cost in found)
        cpu = statistics.median(cost.cpu for cost in found)
        table.add_row(
            name,
            f"{1 / wall:.0f}",
            f"{statistics.median(base.wall / cost.wall for cost, base in pairs):.2f}",
            f"{1e6 * cpu:.0f}",
            f"{statistics.median(base.cpu / cost.cpu for cost, base in pairs):.2f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*SIZES, "both"], default="photographs")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    console = Console()
    environment = describe_environment()
    hardware = environment["hardware"]
    console.print(f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['cpu_flags']}")
    console.print(environment["packages"])
    with tempfile.TemporaryDirectory() as temporary:
        if options.size in ("demo", "both"):
            report(console, SIZES["demo"], ensure_synthetic(f"{temporary}/demo"), options.rounds)
        if options.size in ("photographs", "both"):
            folder = photographs(Path(temporary) / "photographs")
            report(console, SIZES["photographs"], folder, options.rounds)


if __name__ == "__main__":
    main()
