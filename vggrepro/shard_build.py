"""Builds shards: plan, write in parallel, verify, and only then publish the manifest.

`build.json` says what an unfinished directory is being built from; `parts/` holds one
file for every finished shard, so that a killed build goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diagnostics.durable_files import disk_errors, remove_temporaries, write_json, write_whole
from diagnostics.errors import InputError, RunLocked
from vggrepro.image_inspection import KINDS
from vggrepro.image_sources import open_source
from vggrepro.run_lock import LOCK_FILE, acquire_lock
from vggrepro.shard_check import damaged
from vggrepro.shard_index import Part, SplitIndex, index_split
from vggrepro.shard_plan import SPLITS, BuildPlan, ShardPlan, plan_build
from vggrepro.shard_writer import (
    RESIZE_QUALITY,
    Recipe,
    finished_part,
    write_shard,
)
from vggrepro.shards import BUILD, MANIFEST, RECORD_OVERHEAD, VERSION, index_name, read_manifest
from vggrepro.storage import is_url

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
      target: a local directory: new, empty, or left by the same build.
      shard_bytes: a shard is closed when it holds so many.
      workers: threads; the files do not depend on it.
    Returns:
      The manifest.
    Raises:
      InputError: the source is damaged or refused by the policy (all such images are in
        REFUSED), the target holds something else, is being built by another process, or
        the disk is too small.
    """
    if is_url(target):
        raise InputError(f"{target}: shards are built on a local disk", "Copy them afterwards")
    directory = Path(target)
    plan = plan_build(open_source(source), shard_bytes)
    identity = _identity(plan, recipe, shard_bytes)
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    _refuse_strangers(directory)
    lock = _lock(directory)
    try:
        if (directory / MANIFEST).exists():
            return _finished(directory, identity)
        _claim(directory, identity)
        parts = _write_all(directory, plan, recipe, workers, on_progress)
        manifest = _publish(directory, plan, recipe, identity, parts, workers, on_progress)
    finally:
        os.close(lock)
    return manifest


def _identity(plan: BuildPlan, recipe: Recipe, shard_bytes: int) -> dict[str, Any]:
    """What must not change between an interrupted build and its continuation."""
    return {
        "version": VERSION,
        "images": plan.fingerprints,
        "shard_bytes": shard_bytes,
        "resize": recipe.resize,
    }


def _finished(directory: Path, identity: dict[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(directory)
    if manifest["built_from"] != identity:
        raise InputError(
            f"{directory} holds shards of other images or options", "Choose another directory"
        )
    return manifest


def _lock(directory: Path) -> int:
    try:
        return acquire_lock(directory)
    except RunLocked as error:
        raise InputError(
            f"{directory} is being built by another process", "Wait for it to end, or stop it"
        ) from error


def _refuse_strangers(directory: Path) -> None:
    """A directory that is neither empty nor a build's is left as it is, without a lock."""
    names = {entry.name for entry in directory.iterdir()}
    if names - {LOCK_FILE} and not names & {MANIFEST, BUILD}:
        raise InputError(
            f"{directory} is not empty: it holds {min(names - {LOCK_FILE})}",
            "Choose another directory",
        )


def _claim(directory: Path, identity: dict[str, Any]) -> None:
    """Makes the directory this build's own, or makes sure that it is."""
    claim = directory / BUILD
    if not claim.exists():
        write_json(claim, identity)
    elif json.loads(claim.read_text()) != identity:
        raise InputError(
            f"{directory} holds an unfinished build of other images or options",
            "Delete it or choose another directory",
        )
    remove_temporaries(directory)


def _write_all(
    directory: Path, plan: BuildPlan, recipe: Recipe, workers: int, on_progress: Progress
) -> dict[ShardPlan, Part]:
    found = {shard: finished_part(directory, shard, recipe) for shard in plan.shards}
    parts = {shard: part for shard, part in found.items() if part is not None}
    missing = [shard for shard in plan.shards if shard not in parts]
    total = sum(len(shard.images) for shard in plan.shards)
    _check_space(directory, plan, missing)
    counter = _Counter(total - sum(len(shard.images) for shard in missing), total, on_progress)
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        futures = {
            shard: pool.submit(
                write_shard,
                directory,
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
    _refuse(directory, refused)
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


def _check_space(directory: Path, plan: BuildPlan, missing: list[ShardPlan]) -> None:
    sizes = {
        split: np.array([image.size for image in images], np.int64)
        for split, images in plan.source.splits.items()
    }
    needed = sum(
        int((sizes[shard.split][shard.images] + RECORD_OVERHEAD).sum()) for shard in missing
    )
    needed += 200 * sum(len(images) for images in plan.source.splits.values())  # the index
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise InputError(
            f"{directory} has {free / 1e9:.1f} GB free, the shards need {needed / 1e9:.1f} GB",
            "Free some space or choose another disk",
        )


def _refuse(directory: Path, refused: list[str]) -> None:
    if refused:
        lines = sorted(refused)
        write_whole(directory / REFUSED, "\n".join([*lines, ""]).encode(errors="surrogateescape"))
        more = f" and {len(lines) - 1:,} more" if len(lines) > 1 else ""
        raise InputError(
            f"{lines[0]}{more}; all are listed in {directory / REFUSED}",
            "Replace them, or say what to do: --dirty KIND=skip|convert",
        )


def _publish(
    directory: Path,
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
        index, known = index_split(directory, plan.source, split, found)
        write_whole(directory / index_name(split), index.data)
        splits[split] = known
        _verify(directory, index, workers, partial(on_progress, f"verify {split}"))
    manifest = {
        "version": VERSION,
        "source": plan.source.kind,
        "class_names": list(plan.source.class_names),
        "splits": splits,
        "policy": {kind: recipe.policy[kind] for kind in KINDS},
        "resize": _resize_record(recipe),
        "built_from": identity,
    }
    write_json(directory / MANIFEST, manifest)
    shutil.rmtree(directory / "parts")
    for name in (BUILD, REFUSED):
        (directory / name).unlink(missing_ok=True)
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
    directory: Path, index: SplitIndex, workers: int, on_progress: Callable[[int, int], None]
) -> None:
    bad = damaged(index.records, index.sha256, workers, on_progress)
    if bad:
        example_id, fault = bad[0]
        raise InputError(
            f"{index.records.files[index.records.shard[example_id]]}: a record is not what was "
            f"written ({fault})",
            f"Check the disk, delete {directory} and build again",
        )
