"""A small labelled set of real JPEG files, made on the spot from a seed.

Layout as ILSVRC: `train/<class>/*.JPEG`, `val/<class>/*.JPEG`. A class is a
pattern (stripes, rings, dots, ...), so it can be read only from image content:
colours, contrast, size, aspect ratio, share of foreground pixels, position,
rotation by a few degrees, noise, JPEG quality and chroma subsampling are drawn
alike for every class. A pattern and its mirror image belong to the same class.
Patterns scale with the shorter side, hence survive the isotropic rescale.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError
from vggrepro.rng import STREAM_DATA, fold_in

MARKER = "synthetic.json"
_VERSION = 1
_SIDES = (40, 130)  # pixels
_PERIODS = (0.25, 0.4)  # of the shorter side

Field = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def ensure_synthetic(
    directory: str | os.PathLike[str],
    seed: int = 0,
    classes: int = 10,
    train_per_class: int = 100,
    val_per_class: int = 20,
) -> Path:
    """Makes the data set unless `directory` already holds this very one.

    It is written under a temporary name and renamed, so the directory is either
    absent or complete, also with several callers at once.

    Returns:
      The directory, holding `train/`, `val/` and the marker file.
    Raises:
      InputError: an argument is out of range, the directory holds something else
        (or the set of other parameters), or it cannot be written.
    """
    target = Path(directory)
    parameters = _checked_parameters(seed, classes, train_per_class, val_per_class)
    if _holds(target, parameters):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            _write(temporary, parameters)
            temporary.chmod(0o755)
            _publish(temporary, target, parameters)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"cannot write synthetic images to {target}: {error.strerror or error}",
            "Choose a writable directory with some free space",
        ) from error
    return target


def _checked_parameters(
    seed: int, classes: int, train_per_class: int, val_per_class: int
) -> dict[str, int]:
    if not 2 <= classes <= len(PATTERNS):
        raise InputError(f"synthetic data: classes={classes} is not in [2, {len(PATTERNS)}]")
    if train_per_class < 1 or val_per_class < 1:
        raise InputError("synthetic data: every class needs at least one image in train and val")
    if not 0 <= seed < 2**63:
        raise InputError(f"synthetic data: seed={seed} is not in [0, 2^63)")
    return {
        "version": _VERSION,
        "seed": seed,
        "classes": classes,
        "train_per_class": train_per_class,
        "val_per_class": val_per_class,
    }


def _holds(target: Path, parameters: dict[str, int]) -> bool:
    """True: complete and the same; False: nothing there; InputError: something else."""
    marker = target / MARKER
    try:
        found = json.loads(marker.read_text())
    except (FileNotFoundError, NotADirectoryError):
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return False
        raise InputError(
            f"{target} exists and is not a synthetic data set", "Choose another directory"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{marker} cannot be read: {error}", "Delete the directory") from error
    if found == parameters:
        return True
    changed = [f"{k}={found.get(k)}" for k in parameters if found.get(k) != parameters[k]]
    raise InputError(
        f"{target} holds a synthetic data set with other parameters ({', '.join(changed)})",
        "Choose another directory or delete this one",
    )


def _publish(temporary: Path, target: Path, parameters: dict[str, int]) -> None:
    try:
        os.rename(temporary, target)
    except OSError:
        if not _holds(target, parameters):  # somebody else was faster, and complete
            raise


def _write(directory: Path, parameters: dict[str, int]) -> None:
    names = list(PATTERNS)[: parameters["classes"]]
    for split_number, split in enumerate(("train", "val")):
        for class_number, name in enumerate(names):
            folder = directory / split / name
            folder.mkdir(parents=True)
            for i in range(parameters[f"{split}_per_class"]):
                key = fold_in(parameters["seed"], STREAM_DATA, split_number, class_number, i)
                jpeg = synthetic_jpeg(name, np.random.default_rng(key))
                (folder / f"{name}_{i:05d}.JPEG").write_bytes(jpeg)
    (directory / MARKER).write_text(json.dumps(parameters))


def synthetic_jpeg(pattern: str, random: np.random.Generator) -> bytes:
    """One JPEG file of a class: `pattern` is a key of `PATTERNS`."""
    height, width = random.integers(_SIDES[0], _SIDES[1], size=2, endpoint=True)
    mask = _pattern_mask(pattern, int(height), int(width), random)
    colours = _two_colours(random)
    image = np.where(mask[..., None], colours[0], colours[1])
    image = image + random.uniform(1.0, 8.0) * random.standard_normal(image.shape)
    pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    grey = bool(random.random() < 0.05)
    encoded = tf.io.encode_jpeg(
        pixels[..., :1] if grey else pixels,
        format="grayscale" if grey else "rgb",
        quality=int(random.integers(60, 95, endpoint=True)),
        chroma_downsampling=bool(random.random() < 0.5),
    )
    return encoded.numpy()


def _pattern_mask(pattern: str, height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Which pixels are foreground, bool [height, width].

    The threshold is a quantile drawn alike for all classes, so that the share of
    foreground, hence mean and spread of the colours, tells nothing of the class.
    """
    period = random.uniform(*_PERIODS) * min(height, width)
    angle = math.radians(random.uniform(-5.0, 5.0))
    y, x = np.mgrid[0:height, 0:width] / period
    x, y = (
        x - random.uniform(0.2, 0.8) * width / period,
        y - random.uniform(0.2, 0.8) * height / period,
    )
    u = x * math.cos(angle) - y * math.sin(angle)
    v = x * math.sin(angle) + y * math.cos(angle)
    field = PATTERNS[pattern](u, v, random)
    return field > np.quantile(field, random.uniform(0.4, 0.6))


def _two_colours(random: np.random.Generator) -> np.ndarray:
    """Foreground and background, float [2, 3], exchangeable and far enough apart."""
    while True:
        colours = random.uniform(10.0, 245.0, size=(2, 3))
        luma = colours @ (0.299, 0.587, 0.114)
        if abs(luma[0] - luma[1]) > 60.0:  # else chroma subsampling or grey would hide it
            return colours


def _wave(phase: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * phase)


def _diagonal(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return _wave((u + random.choice((-1.0, 1.0)) * v) / math.sqrt(2))


def _spokes(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return np.sin(random.integers(3, 6, endpoint=True) * np.arctan2(v, u) + random.uniform(0, 6.3))


def _dots(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return random.choice((-1.0, 1.0)) * np.hypot(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5)


def _zigzag(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return _wave(v + np.abs(u - 2 * np.floor(u / 2) - 1.0))


def _blobs(u: np.ndarray, v: np.ndarray, random: np.random.Generator) -> np.ndarray:
    field = np.zeros_like(u)
    for _ in range(8):
        angle, phase = random.uniform(0, 2 * np.pi, size=2)
        field += np.cos(np.pi * 1.5 * (u * math.cos(angle) + v * math.sin(angle)) + phase)
    return field


# Class name -> a scalar field over (u, v) in units of the period, thresholded by
# the caller. None is the mirror image (u -> -u) of another.
PATTERNS: dict[str, Field] = {
    "horizontal": lambda u, v, random: _wave(v),
    "vertical": lambda u, v, random: _wave(u),
    "checker": lambda u, v, random: _wave(u) * _wave(v),
    "rings": lambda u, v, random: _wave(np.hypot(u, v)),
    "diagonal": _diagonal,
    "dots": _dots,
    "spokes": _spokes,
    "zigzag": _zigzag,
    "diamonds": lambda u, v, random: _wave(u) + _wave(v),
    "blobs": _blobs,
}
