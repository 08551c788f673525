"""A directory of images in the ILSVRC layout, one file an example.

`root/train/<class>/*.JPEG` and `root/val/<class>/*.JPEG`, the same classes in both.
"""

from __future__ import annotations

import os

import numpy as np

from diagnostics.errors import InputError
from vggrepro.example_index import ExampleIndex, fingerprint
from vggrepro.storage import join, list_directory

_SUFFIXES = (".jpeg", ".jpg")
_LAYOUT = "Expected DIR/train/<class>/*.JPEG and DIR/val/<class>/*.JPEG"


def index_folder(root: str | os.PathLike[str], split: str) -> ExampleIndex:
    """Lists `root/split/<class>/*.JPEG` (.jpeg, .jpg, any case; dotfiles are skipped).

    Raises:
      InputError: train/ or val/ is missing, the two have different classes, a class is
        empty, or a class directory holds something that is not a JPEG file by its name.
    """
    base = os.fspath(root)
    class_names, examples = list_examples(base, split)
    return ExampleIndex(
        base,
        split,
        tuple(path for path, _, _ in examples),
        np.array([label for _, label, _ in examples], np.int32),
        class_names,
        fingerprint(examples),
    )


def list_examples(base: str, split: str) -> tuple[tuple[str, ...], list[tuple[str, int, int]]]:
    """The class names, and (path, label, size in bytes) of every image of a split, sorted.

    Raises:
      InputError: as `index_folder`.
    """
    classes = {name: _class_names(join(base, name)) for name in ("train", "val")}
    for name, other in (("val", "train"), ("train", "val")):
        unknown = sorted(set(classes[name]) - set(classes[other]))
        if unknown:
            raise InputError(
                f"{base}: class '{unknown[0]}' is in {name}/ but not in {other}/", _LAYOUT
            )
    return tuple(classes[split]), [
        (f"{split}/{class_name}/{file_name}", label, size)
        for label, class_name in enumerate(classes[split])
        for file_name, size in image_files(join(base, split, class_name))
    ]


def _class_names(folder: str) -> list[str]:
    try:
        names = [entry.name for entry in list_directory(folder) if not entry.is_file]
    except InputError as error:
        raise InputError(error.message, _LAYOUT) from error
    if not names:
        raise InputError(f"{folder} has no class directories", _LAYOUT)
    return names


def image_files(folder: str) -> list[tuple[str, int]]:
    """Sorted (file name, size in bytes) of a directory that holds only JPEG files.

    Raises:
      InputError: it is empty, or holds something else.
    """
    found = list_directory(folder)
    if not found:
        raise InputError(
            f"class directory {folder} is empty",
            "Add images, or remove the class from train/ and val/ alike",
        )
    for name, is_file, _ in found:
        if not (is_file and name.lower().endswith(_SUFFIXES)):
            raise InputError(
                f"{join(folder, name)} is not a .JPEG file", "Convert it or move it away"
            )
    return [(name, size) for name, _, size in found]
