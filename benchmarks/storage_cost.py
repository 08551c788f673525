"""What it costs to keep images in shards or in files; the second half of input_pipeline.py.

Cold: the files' pages were dropped from the page cache (posix_fadvise) before the round;
the host may still have them in a cache of its own.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import tensorflow as tf
from rich.console import Console
from rich.table import Table

from vggrepro.data_source import open_index
from vggrepro.dataset import TrainingStream
from vggrepro.example_index import ExampleIndex
from vggrepro.image_inspection import KINDS
from vggrepro.order import FullShuffle, WindowShuffle, example_order
from vggrepro.preprocessing import Preprocessing
from vggrepro.shard_build import build_shards
from vggrepro.shard_check import default_workers
from vggrepro.shard_writer import Recipe

LATE_STEP = 300_000
WINDOW = "window:256"  # a small part of a round: the first ones are asked for before it begins

Streams = dict[str, Callable[[], TrainingStream]]


def build(console: Console, folder: Path, target: Path, shard_bytes: int) -> None:
    """Builds shards and prints the rate."""
    wall, cpu = time.perf_counter(), time.process_time()
    manifest = build_shards(str(folder), str(target), Recipe(KINDS), shard_bytes, default_workers())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    megabytes = sum(split["bytes"] for split in manifest["splits"].values()) / 1e6
    images = sum(split["examples"] for split in manifest["splits"].values())
    console.print(
        f"build, verification included: {megabytes / wall:.1f} MB/s, {images / wall:.0f} images/s, "
        f"{1e6 * cpu / images:.0f} us of CPU an image"
    )


def streams(folder: Path, shards: Path, preprocessing: Preprocessing, batch: int) -> Streams:
    """Fresh training streams over the same images."""
    files, records = open_index(folder, "train"), open_index(shards, "train")

    def stream(index: ExampleIndex, order: str) -> Callable[[], TrainingStream]:
        return lambda: TrainingStream(index, preprocessing, batch, seed=0, order=order)

    return {
        "folder": stream(files, "full"),
        "shards, full shuffle": stream(records, "full"),
        f"shards, {WINDOW}": stream(records, WINDOW),
    }


def drop_from_cache(directories: Iterable[Path]) -> None:
    """Asks the kernel to forget the content of every file."""
    for file in (file for directory in directories for file in directory.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def report_latency(console: Console, found: Streams, rounds: int) -> None:
    """Time from an opened index to the first batch, at step 0 and late."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for name, make in found.items():
            for step in (0, LATE_STEP):
                stream = make()
                started = time.perf_counter()
                next(iter(stream.stream(step)))
                seconds.setdefault((name, step), []).append(time.perf_counter() - started)
    table = Table("first batch", "at step 0, ms", f"at step {LATE_STEP:,}, ms", "ratio")
    for name in found:
        first, late = (statistics.median(seconds[name, step]) for step in (0, LATE_STEP))
        table.add_row(name, f"{1000 * first:.0f}", f"{1000 * late:.0f}", f"{late / first:.2f}")
    console.print(table)


def report_entries(console: Console, count: int, folder: Path) -> None:
    """Build, index, order and memory with very many tiny images."""
    with _timed(console, f"{count:,} tiny files written"):
        _tiny_images(folder / "images", count)
    shards = folder / "shards"
    build(console, folder / "images", shards, 10_000_000)
    per_image = (shards / "train.safetensors").stat().st_size / count
    console.print(f"index on disk: {per_image:.0f} bytes an image")
    for name in ("full", "window:2048"):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            held, opened = fresh.submit(_held, str(shards), name).result()
        console.print(
            f"order {name}: index and stream ready after {opened:.2f} s, "
            f"{held / count:.0f} bytes an image in memory"
        )
        order = example_order(open_index(shards, "train"), name, seed=0)
        for epoch in (0, 73):
            with _timed(console, f"order {name}, all of epoch {epoch}"):
                verdict = _is_permutation(order, epoch)
            console.print(f"order {name}, epoch {epoch}: {verdict}")


def _held(root: str, order: str) -> tuple[int, float]:
    """Bytes that an open index and its stream keep, and the seconds to get there."""
    settings = Preprocessing(
        8, 8, 8, False, 0.0, "triangle", "fast", (0.0, 0.0, 0.0), ((0.0, 0.0, 0.0),) * 3
    )
    # A first stream, over the few validation images, has TensorFlow allocate its own.
    streams = []
    for split, name in (("val", "full"), ("train", order)):
        before, started = _resident(), time.perf_counter()
        streams.append(TrainingStream(open_index(root, split), settings, 256, 0, name))
        streams[-1].example_ids(0)
    return _resident() - before, time.perf_counter() - started


def _is_permutation(order: FullShuffle | WindowShuffle, epoch: int) -> str:
    places = tf.range(order.count, dtype=tf.int64)
    ids = order.example_ids(tf.fill(tf.shape(places), tf.constant(epoch, tf.int64)), places)
    whole = tf.reduce_all(tf.sort(ids) == places)
    return "each example once" if whole else "NOT a permutation"


def _tiny_images(folder: Path, count: int) -> None:
    jpeg = tf.io.encode_jpeg(tf.zeros([8, 8, 3], tf.uint8)).numpy()
    for split, number in (("train", count), ("val", 1000)):
        for label in range(1000):
            target = folder / split / f"n{label:08d}"
            target.mkdir(parents=True)
            for i in range(number // 1000):
                (target / f"{i:05d}.JPEG").write_bytes(jpeg)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _timed(console: Console, what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    console.print(f"{what}: {time.perf_counter() - started:.2f} s")
