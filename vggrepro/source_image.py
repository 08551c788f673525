"""One image of a source: where its bytes are."""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf

from diagnostics.errors import InputError
from vggrepro.storage import is_url, storage_errors


@dataclass(frozen=True, order=True, slots=True)  # there may be millions
class SourceImage:
    """One image: its path in the ILSVRC layout, and where its bytes are."""

    path: str
    size: int
    file: str
    offset: int = 0

    def read(self) -> bytes:
        """The bytes of the image.

        Raises:
          InputError: they cannot be read, or are not as many as were listed.
        """
        with storage_errors(self.file, "read"):
            opened = tf.io.gfile.GFile(self.file, "rb") if is_url(self.file) else None
            with opened or open(self.file, "rb") as stream:
                stream.seek(self.offset)
                # One byte more than listed shows that a file has grown.
                data = stream.read(self.size if self.offset else self.size + 1)
        if len(data) != self.size:
            raise InputError(
                f"{self.file} has changed since it was listed", "Build from data that stands still"
            )
        return data
