"""Builds shards: plan, write in parallel, verify, and only then publish the manifest.

`build.json` says what an unfinished directory is being built from; `parts/` holds one
file for every finished shard, so that a killed build goes on where it stopped.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import numpy as np

from diagnostics.errors import InputError
from vggrepro.image_inspection import KINDS
from vggrepro.image_sources import open_source
from vggrepro.shard_check import damaged
from vggrepro.shard_index import Part, SplitIndex, index_split
from vggrepro.shard_plan import SPLITS, BuildPlan, ShardPlan, plan_build
from vggrepro.shard_target import ShardTarget, shard_target
from vggrepro.shard_writer import (
    RESIZE_QUALITY,
    Recipe,
    finished_part,
    write_shard,
)
from vggrepro.shards import (
    BUILD,
    MANIFEST,
    QUESTIONS,
    RECORD_OVERHEAD,
    VERSION,
    index_name,
    read_manifest,
)

REFUSED = "refused.txt"

Progress = Callable[[str, int, int], None]  # stage, done, all


def build_shards(
    source: str,
    target: str,
    recipe: Recipe,
    shard_bytes: int,
    workers: int,
    on_progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Builds, or goes on building, the shards of a data set.

    Args:
      source: see `open_source`.
      target: a directory or URL: new, empty, or left by the same build. A URL is not
        locked: two builds there at a time are the caller's to avoid.
      shard_bytes: a shard is closed when it holds so many.
      workers: threads; the files do not depend on it.
    Returns:
      The manifest.
    Raises:
      InputError: the source is damaged or refused by the policy (all such images are in
        REFUSED), the target holds something else, is being built by another process, or
        the disk is too small.
    """
    place = shard_target(target)
    plan = plan_build(open_source(source), shard_bytes)
    identity = _identity(plan, recipe, shard_bytes)
    _refuse_strangers(place)
    with place.opened():
        if MANIFEST in place.names():
            return _finished(place, identity)
        _claim(place, identity)
        parts = _write_all(place, plan, recipe, workers, on_progress)
        return _publish(place, plan, recipe, identity, parts, workers, on_progress)


def _identity(plan: BuildPlan, recipe: Recipe, shard_bytes: int) -> dict[str, Any]:
    """What must not change between an interrupted build and its continuation."""
    return {
        "version": VERSION,
        "images": plan.fingerprints,
        "shard_bytes": shard_bytes,
        "resize": recipe.resize,
    }


def _finished(target: ShardTarget, identity: dict[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(target.place)
    if manifest["built_from"] != identity:
        raise InputError(
            f"{target.place} holds shards of other images or options", "Choose another directory"
        )
    return manifest


def _refuse_strangers(target: ShardTarget) -> None:
    """A directory that is neither empty nor a build's is left as it is, without a lock."""
    names = target.names()
    if names and not names & {MANIFEST, BUILD}:
        raise InputError(
            f"{target.place} is not empty: it holds {min(names)}", "Choose another directory"
        )


def _claim(target: ShardTarget, identity: dict[str, Any]) -> None:
    """Makes the directory this build's own, or makes sure that it is."""
    claim = target.read(BUILD)
    if claim is None:
        target.write_json(BUILD, identity)
    elif json.loads(claim) != identity:
        raise InputError(
            f"{target.place} holds an unfinished build of other images or options",
            "Delete it or choose another directory",
        )
    target.remove_temporaries()


def _write_all(
    target: ShardTarget, plan: BuildPlan, recipe: Recipe, workers: int, on_progress: Progress
) -> dict[ShardPlan, Part]:
    with ThreadPoolExecutor(QUESTIONS) as pool:
        found = pool.map(lambda shard: finished_part(target, shard, recipe), plan.shards)
        parts = {s: part for s, part in zip(plan.shards, found, strict=True) if part is not None}
    missing = [shard for shard in plan.shards if shard not in parts]
    total = sum(len(shard.images) for shard in plan.shards)
    _check_space(target, plan, missing, workers)
    counter = _Counter(total - sum(len(shard.images) for shard in missing), total, on_progress)
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        futures = {
            shard: pool.submit(
                write_shard,
                target,
                shard,
                plan.source.splits[shard.split],
                recipe,
                stop,
                counter.add,
            )
            for shard in missing
        }
        try:
            for future in as_completed(futures.values()):
                future.result()
        except BaseException:  # a failed shard, or the user's Ctrl-C
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    refused = [line for future in futures.values() for line in future.result()[1]]
    _refuse(target, refused)
    parts |= {shard: future.result()[0] for shard, future in futures.items()}
    return {shard: parts[shard] for shard in plan.shards}


class _Counter:
    """Counts images over all threads."""

    def __init__(self, done: int, total: int, on_progress: Progress) -> None:
        self._done, self._total, self._on_progress = done, total, on_progress
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += 1
            self._on_progress("write", self._done, self._total)


def _check_space(
    target: ShardTarget, plan: BuildPlan, missing: list[ShardPlan], workers: int
) -> None:
    sizes = {
        split: np.array([image.size for image in images], np.int64)
        for split, images in plan.source.splits.items()
    }
    shards = [int((sizes[shard.split][shard.images] + RECORD_OVERHEAD).sum()) for shard in missing]
    index = 200 * sum(len(images) for images in plan.source.splits.values())
    target.check_space(shards, index, workers)


def _refuse(target: ShardTarget, refused: list[str]) -> None:
    if refused:
        lines = sorted(refused)
        target.write(REFUSED, "\n".join([*lines, ""]).encode(errors="surrogateescape"))
        more = f" and {len(lines) - 1:,} more" if len(lines) > 1 else ""
        raise InputError(
            f"{lines[0]}{more}; all are listed in {target.path(REFUSED)}",
            "Replace them, or say what to do: --dirty KIND=skip|convert",
        )


def _publish(
    target: ShardTarget,
    plan: BuildPlan,
    recipe: Recipe,
    identity: dict[str, Any],
    parts: dict[ShardPlan, Part],
    workers: int,
    on_progress: Progress,
) -> dict[str, Any]:
    """Writes the index, verifies every record, and writes the manifest last."""
    splits = {}
    for split in SPLITS:
        found = {shard: part for shard, part in parts.items() if shard.split == split}
        index, known = index_split(target.place, plan.source, split, found)
        target.write(index_name(split), index.data)
        splits[split] = known
        _verify(target, index, workers, partial(on_progress, f"verify {split}"))
    manifest = {
        "version": VERSION,
        "source": plan.source.kind,
        "class_names": list(plan.source.class_names),
        "splits": splits,
        "policy": {kind: recipe.policy[kind] for kind in KINDS},
        "resize": _resize_record(recipe),
        "built_from": identity,
    }
    target.write_json(MANIFEST, manifest)
    target.finish([BUILD, REFUSED])
    return manifest


def _resize_record(recipe: Recipe) -> dict[str, Any] | None:
    if not recipe.resize:
        return None
    return {
        "shorter_side": recipe.resize,
        "jpeg_quality": RESIZE_QUALITY,
        "origin": "deviation",  # training sees other pixels than the paper's
    }


def _verify(
    target: ShardTarget, index: SplitIndex, workers: int, on_progress: Callable[[int, int], None]
) -> None:
    bad = damaged(index.records, index.sha256, workers, on_progress)
    if bad:
        example_id, fault = bad[0]
        raise InputError(
            f"{index.records.files[index.records.shard[example_id]]}: a record is not what was "
            f"written ({fault})",
            f"Check the disk, delete {target.place} and build again",
        )
