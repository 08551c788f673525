"""The failing step in one file, to be diagnosed on another machine.

A bundle is a zip archive, stored without compression, of a run directory's
config.json, manifest.json (and other JSON files beside them), metrics.jsonl,
telemetry/, inherited/ and one incident, plus bundle.json with the size and SHA-256 of each.
Nothing is pickled, and absolute paths, the data directory and the user's name
are taken out of every JSON file (`privacy`). Equal runs give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diagnostics.bundle_format import (
    ALLOWED,
    CHUNK,
    CONTENTS,
    FORMAT,
    INHERITED_FILES,
    METRICS,
    SCHEMA,
    SNAPSHOT_FILES,
    TELEMETRY,
    incident_name,
    refused,
    size_text,
)
from diagnostics.bundle_reader import BundleReader
from diagnostics.durable_files import (
    TEMPORARY_PREFIX,
    disk_errors,
    json_text,
    new_directory,
    sync,
)
from diagnostics.errors import InputError, SnapshotDamaged
from diagnostics.incident import INCIDENT_FILE
from diagnostics.privacy import Scrubber
from diagnostics.snapshot import MANIFEST_FILE

SIZE_LIMIT = 2 * 1024**3


def write_bundle(
    file: Path,
    run_directory: Path,
    step: int,
    private: Sequence[str] = (),
    size_limit: int = SIZE_LIMIT,
) -> int:
    """Packs one incident of a run; returns the size of the file in bytes.

    Args:
      file: is replaced if it exists.
      step: of the incident.
      private: paths that must not leave the machine beside all absolute ones, as
        the data directory.
      size_limit: bytes.

    Raises:
      SnapshotDamaged: the incident is not complete.
      InputError: larger than the limit (names what is large), or not writable.
    """
    parts = _parts(run_directory, step, Scrubber(private))
    total = sum(part.size for part in parts)
    if total > size_limit:
        raise _too_large(file, parts, size_limit, run_directory / incident_name(step))
    temporary = file.with_name(f"{TEMPORARY_PREFIX}{file.name}-{secrets.token_hex(4)}")
    try:
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            _write_archive(temporary, parts, step)
            sync(temporary)
            size = temporary.stat().st_size
            os.replace(temporary, file)
            sync(file.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return size


def open_bundle(file: Path, directory: Path, size_limit: int = SIZE_LIMIT) -> None:
    """Unpacks a bundle into `directory`, which is then shaped like a run directory.

    Trusts nothing: only the known names, plain files, true sizes and hashes pass.

    Args:
      directory: must be empty or not exist.
      size_limit: bytes; a larger bundle is refused before anything is written.

    Raises:
      InputError: not a bundle, damaged, or holding anything odd; names it. Nothing
        is left in `directory`.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} is not empty", "Unpack into a new directory")
    try:
        archive = zipfile.ZipFile(file)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise refused(file, "it is not a zip archive, or it is cut short") from error
    with archive:
        reader = BundleReader(file, archive, size_limit)
        listed = reader.contents()
        with new_directory(directory) as temporary:
            for name, expected in listed.items():
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as stream:
                    reader.extract(name, expected, stream)


@dataclass(frozen=True)
class _Part:
    """A file of the bundle, read when it is written."""

    name: str
    size: int
    chunks: Callable[[], Iterator[bytes]]


def _parts(run_directory: Path, step: int, scrubber: Scrubber) -> list[_Part]:
    incident = incident_name(step)
    parts = [
        _json_part(file.name, _scrubbed(file, scrubber))
        for file in sorted(run_directory.glob("*.json"))
        if ALLOWED.fullmatch(file.name) and file.name != CONTENTS
    ]
    metrics = run_directory / METRICS
    if metrics.exists():
        parts.append(_bytes_part(METRICS, _scrubbed_lines(metrics, scrubber)))
    telemetry = run_directory / TELEMETRY
    if telemetry.exists():
        parts.append(_file_part(TELEMETRY, telemetry))
    inherited = [name for name in INHERITED_FILES if (run_directory / name).exists()]
    parts += [_file_part(name, run_directory / name) for name in inherited]
    record = _scrubbed(run_directory / incident / INCIDENT_FILE, scrubber)
    parts.append(_json_part(f"{incident}/{INCIDENT_FILE}", record))
    for name in SNAPSHOT_FILES:
        parts.append(_file_part(f"{incident}/{name}", run_directory / incident / name))
    return parts


def _scrubbed(file: Path, scrubber: Scrubber) -> Any:
    """A JSON file's value without private paths; example names keep what is relative."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise SnapshotDamaged(f"{file} cannot be read ({error})", "Restore it") from error
    clean = scrubber.value(value)
    if isinstance(value, Mapping) and isinstance(value.get("example_names"), list):
        names = map(str, value["example_names"])
        clean["example_names"] = [scrubber.example_name(name) for name in names]
    return clean


def _scrubbed_lines(file: Path, scrubber: Scrubber) -> bytes:
    lines = []
    for line in file.read_bytes().splitlines():
        try:
            lines.append(json_text(scrubber.value(json.loads(line))) + "\n")
        except ValueError:
            # A run that was killed leaves half a line.
            break
    return "".join(lines).encode("ascii")


def _json_part(name: str, value: Any) -> _Part:
    return _bytes_part(name, (json_text(value, indent=2) + "\n").encode("ascii"))


def _bytes_part(name: str, data: bytes) -> _Part:
    return _Part(name, len(data), lambda: iter([data]))


def _file_part(name: str, file: Path) -> _Part:
    if not file.is_file():
        raise SnapshotDamaged(
            f"incident damaged: {file} is missing", "Run the training again to make it anew"
        )
    return _Part(name, file.stat().st_size, lambda: _file_chunks(file))


def _file_chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _write_archive(file: Path, parts: Sequence[_Part], step: int) -> None:
    files: dict[str, dict[str, Any]] = {}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for part in parts:
            digest = hashlib.sha256()
            size = 0
            with archive.open(_entry(part.name), "w", force_zip64=True) as stream:
                for chunk in part.chunks():
                    digest.update(chunk)
                    size += len(chunk)
                    stream.write(chunk)
            files[part.name] = {"size": size, "sha256": digest.hexdigest()}
        contents = {"schema": SCHEMA, "format": FORMAT, "step": step, "files": files}
        archive.writestr(_entry(CONTENTS), json_text(contents, indent=1) + "\n")


def _entry(name: str) -> zipfile.ZipInfo:
    """A plain file; without a date, so that equal runs give equal bytes."""
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry


def _too_large(file: Path, parts: Sequence[_Part], limit: int, incident: Path) -> InputError:
    largest = sorted(parts, key=lambda part: -part.size)[:2]
    names = ", ".join(f"{part.name} {size_text(part.size)}" for part in largest)
    total = sum(part.size for part in parts)
    return InputError(
        f"bundle {file} would hold {size_text(total)}, more than the limit of {size_text(limit)}: "
        f"{names}; the largest arrays are {_largest_arrays(incident)}",
        f"Copy {incident} and the JSON files beside incidents/ instead",
    )


def _largest_arrays(incident: Path) -> str:
    """The three largest arrays of the state, with their sizes."""
    content = json.loads((incident / "state" / MANIFEST_FILE).read_bytes())
    sizes = {
        name: math.prod(array["shape"]) * np.dtype(array["dtype"]).itemsize
        for name, array in content["arrays"].items()
    }
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    return ", ".join(f"{name} {size_text(sizes[name])}" for name in largest)
