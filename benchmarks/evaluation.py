"""Images a second of dense, multi-crop and combined evaluation at the paper's three scales.

Dense runs the net once over the whole image and its mirror image, multi-crop 50 times over
crops that overlap. Both read, decode and rescale the same files, in turn, round by round,
in one process; the table shows medians, and how many times dense is faster than the 50
crops of the same scale.

Usage: python benchmarks/evaluation.py                                     # a narrow net
       python benchmarks/evaluation.py --size full --images 3 --rounds 2   # net D, 224 pixels
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from vggrepro import accelerator
from vggrepro.config import TrainConfig
from vggrepro.data_source import open_index
from vggrepro.environment import describe_environment
from vggrepro.evaluated_net import EvaluatedNet
from vggrepro.example_index import ExampleIndex
from vggrepro.initializers import initial_parameters
from vggrepro.model import build_network
from vggrepro.preprocessing import Preprocessing
from vggrepro.protocols import CompiledNet
from vggrepro.whole_images import image_sizes

PROTOCOLS = ("dense", "multicrop", "both")
SHAPES = ((375, 500), (500, 375), (333, 500))  # of the JPEG files, pixels
CLASSES = 3


@dataclass(frozen=True)
class Size:
    """Which net, the paper's scales for it, and how many views are in memory at a time."""

    name: str
    arch: str
    width: float
    image_size: int
    scales: tuple[int, ...]
    batch_size: int


SIZES = {
    "demo": Size("D, width 1/4, 32 px", "D", 0.25, 32, (37, 55, 73), 50),
    "full": Size("D, width 1, 224 px", "D", 1.0, 224, (256, 384, 512), 10),
}


def photographs(directory: Path, count: int) -> ExampleIndex:
    """`count` smooth JPEG files in ILSVRC layout, in three shapes; the validation split."""
    random = np.random.default_rng(0)
    for split, files in (("train", CLASSES), ("val", max(count, CLASSES))):
        for number in range(files):
            coarse = random.integers(0, 256, (12, 16, 3)).astype(np.float32)
            shape = SHAPES[number % len(SHAPES)]
            pixels = tf.cast(tf.clip_by_value(tf.image.resize(coarse, shape), 0, 255), tf.uint8)
            folder = directory / split / f"class{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.JPEG").write_bytes(tf.io.encode_jpeg(pixels).numpy())
    return open_index(str(directory), "val")


def random_net(size: Size) -> EvaluatedNet:
    network = build_network(
        size.arch, width=size.width, image_size=size.image_size, classes=CLASSES
    )
    preprocessing = Preprocessing(
        image_size=size.image_size,
        scale_min=size.scales[0],
        scale_max=size.scales[0],
        flip=False,
        colour_shift=0.0,
        resize="triangle",
        decode="fast",
        mean_rgb=(123.68, 116.779, 103.939),
        colour_components=((0.0,) * 3,) * 3,
    )
    parameters = initial_parameters(network, "glorot-uniform", 0)
    return EvaluatedNet(network, parameters, preprocessing, "float32", {})


def seconds(compiled: CompiledNet, index: ExampleIndex, side: int, batch_size: int) -> float:
    """One pass over all images; their sizes are known beforehand, as in an evaluation."""
    sizes = image_sizes(index)
    started = time.perf_counter()
    for _ in compiled.over(index, side, sizes, batch_size):
        pass
    return time.perf_counter() - started


def measure(size: Size, index: ExampleIndex, rounds: int) -> dict[tuple[int, str], list[float]]:
    """Images a second by (scale, protocol) and round."""
    net = random_net(size)
    compiled = {protocol: CompiledNet(net, protocol) for protocol in PROTOCOLS}
    found: dict[tuple[int, str], list[float]] = {}
    for protocol in PROTOCOLS:  # traced, and every shape seen once
        seconds(compiled[protocol], index, size.scales[0], size.batch_size)
    for _ in range(rounds):
        for side in size.scales:
            for protocol in PROTOCOLS:
                taken = seconds(compiled[protocol], index, side, size.batch_size)
                found.setdefault((side, protocol), []).append(len(index) / taken)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--images", type=int, default=30, help=f"at least {CLASSES}. Default: 30")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    size = SIZES[options.size]
    console = Console()
    device = accelerator.prepare(TrainConfig())
    environment = describe_environment([device])
    hardware = environment["hardware"]
    console.print(
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['cpu_flags']}; {device}"
    )
    console.print(environment["packages"])
    with tempfile.TemporaryDirectory() as place:
        index = photographs(Path(place), options.images)
        found = measure(size, index, options.rounds)
    table = Table(
        title=f"{size.name}, float32, {len(index)} images of 375x500, 500x375, 333x500, "
        f"{size.batch_size} views at a time, {options.rounds} rounds: images/s (medians)"
    )
    for name in ("Q", *PROTOCOLS, "dense / 50 crops"):
        table.add_column(name, justify="right")
    for side in size.scales:
        rates = [statistics.median(found[side, protocol]) for protocol in PROTOCOLS]
        pairs = zip(found[side, "dense"], found[side, "multicrop"], strict=True)
        ratio = statistics.median(dense / crops for dense, crops in pairs)
        table.add_row(str(side), *(f"{rate:.3g}" for rate in rates), f"{ratio:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
