"""Images a second through the input pipeline, beside JPEG decoding alone.

All variants read the same files (500x375, about 70 KB, made on the spot) with the same
number of threads, and run in turn, round by round, in one process, so that a slow
moment of the machine hits all. The table shows medians and the median of the ratios
round by round to decoding alone; once by wall clock, and once by CPU time, which other
processes disturb less. Every round starts a fresh iterator, so nothing of one variant
is computed in another's time. Op determinism stays off: it would make the
stateful random ops of plain TensorFlow take turns; ours has none.

Then, with op determinism as in training, images from files and from shards, beside the files: cold
and warm, the first batch at step 0 and 300,000, the rate of `data build`; with --entries N, index,
order and memory of N tiny images.

Usage: python benchmarks/input_pipeline.py [--size demo|photographs|jitter|all|none] [--rounds N]
       [--entries N]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import storage_cost
import tensorflow as tf
from interleaved import BATCH, Cost, Run, cost_since, measure, table_of, timing
from rich.console import Console

from vggrepro import resampling
from vggrepro.dataset import TrainingStream
from vggrepro.environment import describe_environment
from vggrepro.example_index import ExampleIndex
from vggrepro.image_folder import index_folder
from vggrepro.preprocessing import Preprocessing
from vggrepro.synthetic import ensure_synthetic

MEAN_RGB = (123.68, 116.779, 103.939)
STORED_IMAGES = 3072
COMPONENTS = ((-0.123, 0.014, 0.002), (-0.126, 0.0, -0.004), (-0.127, -0.013, 0.002))


@dataclass(frozen=True)
class Size:
    """One table: which images become which crops, and how many a timing takes."""

    name: str
    image_size: int
    scale: int
    largest_scale: int
    images: int


SIZES = {
    "demo": Size("40 to 130 px to 32 px, shorter side 37", 32, 37, 37, 3200),
    "photographs": Size("500x375 to 224 px, shorter side 256", 224, 256, 256, 1536),
    "jitter": Size("500x375 to 224 px, shorter side 256 to 512", 224, 256, 512, 1536),
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
        scale_max=size.largest_scale,
        flip=True,
        colour_shift=0.1,
        resize="triangle",
        decode=decode,
        mean_rgb=MEAN_RGB,
        colour_components=COMPONENTS,
    )


def ours(index: ExampleIndex, preprocessing: Preprocessing) -> Run:
    return timing(TrainingStream(index, preprocessing, BATCH, seed=0).stream(0))


def ours_without_compiler(index: ExampleIndex, preprocessing: Preprocessing) -> Run:
    """As on a machine that has no C compiler."""
    with mock.patch.object(resampling, "compiled_ops", lambda: None):
        return ours(index, preprocessing)


def with_tensorflow(index: ExampleIndex, process: Callable[[tf.Tensor], tf.Tensor]) -> Run:
    """Files in shuffled order through `process`, on as many threads as ours."""
    # Shuffled beforehand: shuffling has state, and op determinism would make all of it serial.
    shuffled = np.random.default_rng(0).permutation(len(index))
    paths = tf.constant([f"{index.root}/{index.paths[i]}" for i in shuffled])
    threads = os.cpu_count() or 1
    dataset = (
        tf.data.Dataset.range(len(index))
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
        scale = tf.random.uniform([], size.scale, size.largest_scale + 1, tf.int32)
        rescaled = shape * tf.cast(scale, tf.float32) / tf.reduce_min(shape)
        rescaled = tf.cast(tf.round(rescaled), tf.int32)
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
        factor = random.integers(size.scale, size.largest_scale + 1) / min(image.size)
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
        "ours, exact, no compiler": ours_without_compiler(index, settings(size, "exact")),
        "plain TensorFlow": with_tensorflow(index, plain_tensorflow(size, antialias=False)),
        "plain TensorFlow, antialias": with_tensorflow(index, plain_tensorflow(size, True)),
    }
    pillow = with_pillow(index, size)
    return {**found, "Pillow, one process": pillow} if pillow else found


def report(console: Console, size: Size, folder: Path, rounds: int) -> None:
    index = index_folder(folder, "train")
    kilobytes = sum((folder / path).stat().st_size for path in index.paths) / len(index) / 1000
    costs = measure(variants(index, size), size.images, rounds)
    console.print(
        f"{size.name}; {len(index)} files of {kilobytes:.0f} KB on average; "
        f"{rounds} rounds of {size.images} images"
    )
    console.print(table_of(costs))


def report_storage(console: Console, directory: Path, rounds: int) -> None:
    """The same images as files and as shards: no image twice a round, so that cold is cold."""
    size, folder, shards = SIZES["photographs"], directory / "files", directory / "shards"
    # One batch more is taken, and not counted.
    storage_cost.build(console, photographs(folder, STORED_IMAGES + BATCH), shards, 20_000_000)
    streams = storage_cost.streams(folder, shards, settings(size, "fast"), BATCH)
    runs = {
        **{name: timing(make().stream(0)) for name, make in streams.items()},
        "folder again": timing(streams["folder"]().stream(0)),  # what the noise makes of 1
        "decode only": with_tensorflow(
            index_folder(folder, "train"), lambda jpeg: tf.reduce_max(tf.shape(decode(jpeg)))
        ),
    }
    for cache in ("warm", "cold"):
        dropped = (folder, shards) if cache == "cold" else ()
        prepare = functools.partial(storage_cost.drop_from_cache, dropped)
        costs = measure(runs, STORED_IMAGES, rounds, prepare)
        console.print(f"{cache} cache, {rounds} rounds of {STORED_IMAGES} images")
        console.print(table_of(costs))
    storage_cost.report_latency(console, streams, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*SIZES, "all", "none"], default="photographs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--entries", type=int, default=0, help="a multiple of 1000")
    options = parser.parse_args()
    console = Console()
    environment = describe_environment()
    hardware = environment["hardware"]
    console.print(f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['cpu_flags']}")
    console.print(environment["packages"])
    with tempfile.TemporaryDirectory() as temporary:
        if options.size in ("demo", "all"):
            report(console, SIZES["demo"], ensure_synthetic(f"{temporary}/demo"), options.rounds)
        if options.size not in ("demo", "none"):
            folder = photographs(Path(temporary) / "photographs")
        for name in ("photographs", "jitter"):
            if options.size in (name, "all"):
                report(console, SIZES[name], folder, options.rounds)
        tf.config.experimental.enable_op_determinism()
        if options.size in ("photographs", "all"):
            report_storage(console, Path(temporary) / "storage", options.rounds)
        if options.entries:
            storage_cost.report_entries(console, options.entries, Path(temporary) / "entries")


if __name__ == "__main__":
    main()
