"""What is unusual about the bytes of an image file, from its header and a trial decode.

What ImageNet is known to hold needs no new bytes: TensorFlow's decoder turns CMYK, YCCK,
grayscale and PNG into RGB whenever the image is read. An EXIF rotation is not applied:
the pixels are taken as they are stored, as the decoders of the paper's time did.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vggrepro.example_reader import image_fault

# What may be found, and what is done about it unless told otherwise.
KINDS = {
    "empty": "fail",  # zero bytes
    "not-image": "fail",  # neither JPEG nor PNG
    "truncated": "fail",  # or damaged so that it cannot be decoded
    "tiny": "fail",  # shorter side below TINY_SIDE
    "giant": "fail",  # more than GIANT_PIXELS: a decompression bomb, or a mistake
    "cmyk": "convert",
    "ycck": "convert",
    "grayscale": "convert",
    "png": "convert",  # a PNG file, whatever its name
    "exif-rotation": "convert",
}
UNUSABLE = ("empty", "not-image", "truncated")  # nothing to convert
TINY_SIDE = 8  # pixels
GIANT_PIXELS = 100_000_000

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_JPEG_MAGIC = b"\xff\xd8\xff"
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF markers, without DHT, JPG, DAC
_SCAN, _EXIF, _ADOBE = 0xDA, 0xE1, 0xEE
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Header:
    """What the header of an image says.

    Attributes:
      kinds: keys of KINDS that apply.
      height, width: pixels; 0 if there is no readable header.
    """

    kinds: tuple[str, ...]
    height: int = 0
    width: int = 0


def read_header(data: bytes) -> Header:
    """Looks at the header alone: cheap, and safe whatever the size of the image."""
    if not data:
        return Header(("empty",))
    if data.startswith(_PNG_MAGIC):
        if len(data) < 24:
            return Header(("truncated",))
        width, height = struct.unpack(">II", data[16:24])
        return _sized(["png"], height, width)
    if not data.startswith(_JPEG_MAGIC):
        return Header(("not-image",))
    try:
        return _jpeg_header(data)
    except (struct.error, IndexError):
        return Header(("truncated",))


def unusual(data: bytes) -> Header:
    """The header, and whether the image can be decoded; one that is giant is not tried."""
    header = read_header(data)
    if {"giant", *UNUSABLE} & set(header.kinds) or not image_fault(data):
        return header
    return Header(("truncated", *header.kinds), header.height, header.width)


def _sized(kinds: list[str], height: int, width: int) -> Header:
    if height * width > GIANT_PIXELS:
        kinds.append("giant")
    elif min(height, width) < TINY_SIDE:
        kinds.append("tiny")
    return Header(tuple(kinds), height, width)


def _jpeg_header(data: bytes) -> Header:
    kinds: list[str] = []
    transform = 0
    place = 2
    while True:
        marker, size = data[place + 1], struct.unpack_from(">H", data, place + 2)[0]
        body = data[place + 4 : place + 2 + size]
        if data[place] != 0xFF or marker == _SCAN:
            return Header(("truncated",))  # pixels without a frame
        if marker == _EXIF and body.startswith(b"Exif\0\0") and _rotated(body[6:]):
            kinds.append("exif-rotation")
        elif marker == _ADOBE and body.startswith(b"Adobe"):
            transform = body[11]
        elif marker in _FRAMES:
            height, width, components = struct.unpack_from(">HHB", body, 1)
            if components == 1:
                kinds.append("grayscale")
            elif components == 4:
                kinds.append("ycck" if transform == 2 else "cmyk")
            return _sized(kinds, height, width)
        place += 2 + size


def _rotated(tiff: bytes) -> bool:
    """Whether an EXIF block names an orientation other than upright."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return False
    try:
        directory = struct.unpack_from(order + "I", tiff, 4)[0]
        for i in range(struct.unpack_from(order + "H", tiff, directory)[0]):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * i)
            if tag == _ORIENTATION:
                return value in range(2, 9)
    except struct.error:  # a damaged block is no news of a rotation
        return False
    return False
