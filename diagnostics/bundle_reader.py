"""Reads a bundle from a stranger: only known names, plain files, true sizes and hashes pass."""

from __future__ import annotations

import hashlib
import json
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from diagnostics.bundle_format import (
    ALLOWED,
    CHUNK,
    CONTENTS,
    FORMAT,
    JSON_LIMIT,
    RUN_FILES,
    SCHEMA,
    SNAPSHOT_FILES,
    incident_name,
    refused,
    size_text,
)
from diagnostics.incident import INCIDENT_FILE
from diagnostics.report_words import printable


class BundleReader:
    """Checks an archive's entries before and while they are read.

    Args:
      size_limit: bytes of all files together.

    Raises:
      InputError: here and in every method, naming the file and what is odd in it.
    """

    def __init__(self, file: Path, archive: zipfile.ZipFile, size_limit: int) -> None:
        self._file, self._archive = file, archive
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in archive.infolist():
            self._check(entry)
            self._entries[entry.filename] = entry
        total = sum(entry.file_size for entry in self._entries.values())
        if total > size_limit:
            raise refused(
                file, f"it holds {size_text(total)}, the limit is {size_text(size_limit)}"
            )

    def _check(self, entry: zipfile.ZipInfo) -> None:
        # Not `filename`, from which the library has dropped whatever follows a NUL.
        name = entry.orig_filename
        shown = printable(repr(name[:200]))
        if not ALLOWED.fullmatch(name) or name != entry.filename:
            raise refused(self._file, f"it holds {shown}, which no bundle has")
        if entry.filename in self._entries:
            raise refused(self._file, f"it holds {shown} twice")
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
            raise refused(self._file, f"{shown} is not a plain file")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise refused(self._file, f"{shown} is compressed")
        if entry.flag_bits & 0x1:
            raise refused(self._file, f"{shown} is encrypted")
        if name.endswith((".json", ".jsonl")) and entry.file_size > JSON_LIMIT:
            raise refused(self._file, f"{shown} is larger than {size_text(JSON_LIMIT)}")

    def contents(self) -> dict[str, dict[str, Any]]:
        """What bundle.json says of every other file: size and sha256."""
        if CONTENTS not in self._entries:
            raise refused(self._file, f"it has no {CONTENTS}")
        try:
            value = json.loads(b"".join(self._chunks(CONTENTS)))
            is_bundle = value["format"] == FORMAT
            schema, step, files = int(value["schema"]), int(value["step"]), dict(value["files"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise refused(self._file, f"its {CONTENTS} cannot be read") from error
        if not is_bundle or schema != SCHEMA:
            raise refused(self._file, f"schema {schema}; this version reads {SCHEMA}")
        incident = incident_name(step)
        needed = {*RUN_FILES, f"{incident}/{INCIDENT_FILE}"}
        needed |= {f"{incident}/{name}" for name in SNAPSHOT_FILES}
        others = self._entries.keys() - {CONTENTS}
        odd = sorted(others ^ files.keys()) + sorted(needed - others)
        odd += [name for name in others if name.startswith("incidents/") and name not in needed]
        if odd:
            raise refused(self._file, f"{printable(odd[0][:200])} is missing or not listed")
        return files

    def extract(self, name: str, expected: Any, stream: BinaryIO) -> None:
        """Copies one file out, and checks its size and hash."""
        digest, size = hashlib.sha256(), 0
        for chunk in self._chunks(name):
            digest.update(chunk)
            size += len(chunk)
            stream.write(chunk)
        if expected != {"size": size, "sha256": digest.hexdigest()}:
            raise refused(self._file, f"{name} does not match its hash")

    def _chunks(self, name: str) -> Iterator[bytes]:
        """A file's bytes; whatever the library cannot read becomes an `InputError`."""
        try:
            with self._archive.open(self._entries[name]) as stream:
                while chunk := stream.read(CHUNK):
                    yield chunk
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
            raise refused(self._file, f"{name} cannot be read") from error
