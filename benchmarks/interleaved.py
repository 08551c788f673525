"""Variants of a pipeline in turn, round by round, by the wall clock and by CPU time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf
from rich.table import Table

Run = Callable[[int], "Cost"]  # what so many images cost

BATCH = 32


@dataclass(frozen=True)
class Cost:
    """Seconds an image, by the wall clock and summed over the process's threads."""

    wall: float
    cpu: float


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


def measure(
    runs: dict[str, Run], images: int, rounds: int, prepare: Callable[[], None] = lambda: None
) -> dict[str, list[Cost]]:
    """What an image costs, for every variant and round, in turn; each after `prepare`."""
    for run in runs.values():
        run(2 * BATCH)
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            prepare()
            costs[name].append(run(images))
    return costs


def table_of(costs: dict[str, list[Cost]]) -> Table:
    """Medians, and the medians of the ratios round by round to the first variant."""
    base = next(iter(costs))
    table = Table("variant", "images/s", f"ratio to {base}", "CPU us an image", "CPU ratio")
    for name, found in costs.items():
        pairs = list(zip(found, costs[base], strict=True))
        wall = statistics.median(cost.wall for cost in found)
        cpu = statistics.median(cost.cpu for cost in found)
        table.add_row(
            name,
            f"{1 / wall:.0f}",
            f"{statistics.median(first.wall / cost.wall for cost, first in pairs):.2f}",
            f"{1e6 * cpu:.0f}",
            f"{statistics.median(first.cpu / cost.cpu for cost, first in pairs):.2f}",
        )
    return table
