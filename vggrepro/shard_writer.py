"""Writes one shard: reads its images, inspects them, stores them, hashes them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from safetensors.numpy import load, save

from diagnostics.errors import InputError
from vggrepro.image_inspection import KINDS, read_header, unusual
from vggrepro.resampling import rescaled_size
from vggrepro.shard_plan import ShardPlan
from vggrepro.shard_target import PARTS, ShardTarget
from vggrepro.shards import RECORD_OVERHEAD
from vggrepro.source_image import SourceImage

RESIZE_QUALITY = 95  # of JPEG, without chroma subsampling
_BITS = {kind: 1 << bit for bit, kind in enumerate(KINDS)}


class Interrupted(Exception):
    """Another shard failed, or the user stopped the build."""


@dataclass(frozen=True)
class Recipe:
    """What is done to every image.

    Attributes:
      policy: 'convert', 'skip' or 'fail' for every kind of `KINDS`.
      resize: the shorter side of stored images, pixels, if theirs is longer; 0: as they are.
    """

    policy: Mapping[str, str]
    resize: int = 0

    def action(self, kinds: Sequence[str]) -> str:
        """What to do with an image of these kinds: the strictest policy counts."""
        found = {self.policy[kind] for kind in kinds}
        return next((action for action in ("fail", "skip") if action in found), "convert")


@dataclass
class Records:
    """What a shard holds, record by record, and what was left out."""

    image: list[int] = field(default_factory=list)  # number in the split; skipped ones too
    kinds: list[int] = field(default_factory=list)  # bits, see `kinds_of`
    offset: list[int] = field(default_factory=list)  # -1: skipped
    size: list[int] = field(default_factory=list)
    image_size: list[tuple[int, int]] = field(default_factory=list)  # as stored
    sha256: list[bytes] = field(default_factory=list)
    end: int = 0  # of the shard so far, bytes

    def arrays(self) -> dict[str, np.ndarray]:
        """As int64 [n] each, image_size [n, 2], and sha256 as uint8 [n, 32]."""
        numbers = {
            name: np.array(getattr(self, name), np.int64)
            for name in ("image", "kinds", "offset", "size")
        }
        numbers["image_size"] = np.array(self.image_size, np.int64).reshape(-1, 2)
        digests = np.frombuffer(b"".join(self.sha256), np.uint8).reshape(-1, 32)
        return {**numbers, "sha256": digests}


def kinds_of(bits: int) -> tuple[str, ...]:
    """The kinds that a number in `Records.kinds` stands for."""
    return tuple(kind for kind, bit in _BITS.items() if bits & bit)


def finished_part(
    target: ShardTarget, plan: ShardPlan, recipe: Recipe
) -> dict[str, np.ndarray] | None:
    """What an earlier, interrupted build left of this shard; None: it must be written.

    A shard is used again if it is whole and today's policy treats its images alike.
    """
    part = target.read(_part_name(plan))
    if part is None:
        return None
    arrays = load(part)
    if "image_size" not in arrays:  # of an earlier version
        return None
    skipped = arrays["offset"] < 0
    alike = all(
        recipe.action(kinds_of(bits)) == ("skip" if left_out else "convert")
        for bits, left_out in set(zip(arrays["kinds"].tolist(), skipped.tolist(), strict=True))
    )
    size = int((arrays["size"][~skipped] + RECORD_OVERHEAD).sum())
    whole = size == 0 or target.size(plan.file) == size
    return arrays if alike and whole else None


def write_shard(
    target: ShardTarget,
    plan: ShardPlan,
    images: Sequence[SourceImage],
    recipe: Recipe,
    stop: threading.Event,
    on_image: Callable[[int], None],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Writes a shard and, after it, the file that says it is finished.

    Args:
      images: of the whole split.
      stop: set by others: give up.
      on_image: called after every image with its size in bytes.
    Returns:
      `Records.arrays()`, and one line for every image that the policy refuses; with such
      images the shard is not finished.
    Raises:
      InputError: an image cannot be read or the shard cannot be written.
      Interrupted: `stop` was set.
    """
    records, refused = Records(), []
    with target.scratch(plan.file) as scratch:
        with tf.io.TFRecordWriter(str(scratch)) as writer:
            for number in plan.images.tolist():
                if stop.is_set():
                    raise Interrupted
                refusal = _add(writer, records, number, images[number], recipe)
                refused += [refusal] if refusal else []
                on_image(images[number].size)
        arrays = records.arrays()
        if not refused:
            if (arrays["offset"] >= 0).any():
                target.put(scratch, plan.file)
            target.write(_part_name(plan), save(arrays))
    return arrays, refused


def _add(
    writer: Any, records: Records, number: int, image: SourceImage, recipe: Recipe
) -> str | None:
    """Stores or skips one image; returns why it is refused, or None."""
    data = image.read()
    header = unusual(data)
    kinds = header.kinds
    action = recipe.action(kinds)
    if action == "fail":
        return f"{image.path}: {', '.join(kinds)}"
    if action == "skip":
        data, offset = b"", -1
    else:
        if recipe.resize:
            data = resized(data, recipe.resize)
            header = read_header(data)
        offset = records.end
        writer.write(data)
        records.end += len(data) + RECORD_OVERHEAD
    records.image.append(number)
    records.kinds.append(sum(_BITS[kind] for kind in kinds))
    records.offset.append(offset)
    records.size.append(len(data))
    records.image_size.append((header.height, header.width))
    records.sha256.append(hashlib.sha256(data).digest())
    return None


def _part_name(plan: ShardPlan) -> str:
    return f"{PARTS}/{plan.file}.safetensors"


def resized(data: bytes, shorter_side: int) -> bytes:
    """The image rescaled to a shorter side, as JPEG; unchanged if it is no larger.

    Raises:
      InputError: the image cannot be decoded.
    """
    try:
        pixels = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
    except tf.errors.InvalidArgumentError as error:
        raise InputError(f"an image cannot be resized: {error.message}") from error
    if min(pixels.shape[:2]) <= shorter_side:
        return data
    size = tf.cast(rescaled_size(tf.constant(pixels.shape[:2], tf.float32), shorter_side), tf.int32)
    smaller = tf.image.resize(pixels, size, antialias=True)
    return tf.io.encode_jpeg(
        tf.saturate_cast(tf.round(smaller), tf.uint8),
        quality=RESIZE_QUALITY,
        chroma_downsampling=False,
    ).numpy()
