"""The paper's numbers as data: nets and Tables 3 to 6 of arXiv 1409.1556v6.

Errors are percent on the 50,000 ILSVRC-2012 validation images, which were also
what the paper's learning-rate schedule looked at. Table 7 compares with other
teams and holds no VGG result that Tables 5 and 6 do not.
"""

from __future__ import annotations

from dataclasses import dataclass

TRAINING_IMAGES = 1_281_167
VALIDATION_IMAGES = 50_000
CLASSES = 1000


@dataclass(frozen=True)
class Net:
    """A column of Table 1, at full width, 1000 classes and 224 x 224 pixels."""

    parameters: int
    multiply_adds: float  # of one forward pass of one image


NETS = {
    "A": Net(132_863_336, 7.609e9),
    "A-LRN": Net(132_863_336, 7.609e9),
    "B": Net(133_047_848, 11.308e9),
    "C": Net(133_638_952, 11.771e9),
    "D": Net(138_357_544, 15.470e9),
    "E": Net(143_667_240, 19.632e9),
}


@dataclass(frozen=True)
class Trained:
    """A net and the training scale: shorter side S drawn from [scale_min, scale_max]."""

    arch: str
    scale_min: int
    scale_max: int


@dataclass(frozen=True)
class PaperResult:
    """One cell of a table.

    `protocol`: 'dense' (the whole image), 'multicrop' (50 crops a scale) or 'both'.
    More than one net: their posteriors are averaged. `test_scales`: shorter sides Q;
    empty where each net has its own (Table 6, the three scales of Table 4).
    """

    table: int
    nets: tuple[Trained, ...]
    test_scales: tuple[int, ...]
    protocol: str
    top1_error: float
    top5_error: float
    test_top5_error: float | None = None  # on the challenge's test set


FIXED_256, FIXED_384, JITTERED = (256, 256), (384, 384), (256, 512)
JITTERED_TEST_SCALES = (256, 384, 512)


def _dense(
    table: int,
    arch: str,
    scale: tuple[int, int],
    test_scales: tuple[int, ...],
    errors: tuple[float, float],
) -> PaperResult:
    return PaperResult(table, (Trained(arch, *scale),), test_scales, "dense", *errors)


TABLE_3 = (
    _dense(3, "A", FIXED_256, (256,), (29.6, 10.4)),
    _dense(3, "A-LRN", FIXED_256, (256,), (29.7, 10.5)),
    _dense(3, "B", FIXED_256, (256,), (28.7, 9.9)),
    _dense(3, "C", FIXED_256, (256,), (28.1, 9.4)),
    _dense(3, "C", FIXED_384, (384,), (28.1, 9.3)),
    _dense(3, "C", JITTERED, (384,), (27.3, 8.8)),
    _dense(3, "D", FIXED_256, (256,), (27.0, 8.8)),
    _dense(3, "D", FIXED_384, (384,), (26.8, 8.7)),
    _dense(3, "D", JITTERED, (384,), (25.6, 8.1)),
    _dense(3, "E", FIXED_256, (256,), (27.3, 9.0)),
    _dense(3, "E", FIXED_384, (384,), (26.9, 8.7)),
    _dense(3, "E", JITTERED, (384,), (25.5, 8.0)),
)

TABLE_4 = (
    _dense(4, "B", FIXED_256, (224, 256, 288), (28.2, 9.6)),
    _dense(4, "C", FIXED_256, (224, 256, 288), (27.7, 9.2)),
    _dense(4, "C", FIXED_384, (352, 384, 416), (27.8, 9.2)),
    _dense(4, "C", JITTERED, JITTERED_TEST_SCALES, (26.3, 8.2)),
    _dense(4, "D", FIXED_256, (224, 256, 288), (26.6, 8.6)),
    _dense(4, "D", FIXED_384, (352, 384, 416), (26.5, 8.6)),
    _dense(4, "D", JITTERED, JITTERED_TEST_SCALES, (24.8, 7.5)),
    _dense(4, "E", FIXED_256, (224, 256, 288), (26.9, 8.7)),
    _dense(4, "E", FIXED_384, (352, 384, 416), (26.7, 8.6)),
    _dense(4, "E", JITTERED, JITTERED_TEST_SCALES, (24.8, 7.5)),
)


def _jittered(
    table: int,
    archs: str,
    protocol: str,
    errors: tuple[float, float],
    test_top5_error: float | None = None,
) -> PaperResult:
    nets = tuple(Trained(arch, *JITTERED) for arch in archs)
    return PaperResult(table, nets, JITTERED_TEST_SCALES, protocol, *errors, test_top5_error)


TABLE_5 = (
    _jittered(5, "D", "dense", (24.8, 7.5)),
    _jittered(5, "D", "multicrop", (24.6, 7.5)),
    _jittered(5, "D", "both", (24.4, 7.2)),
    _jittered(5, "E", "dense", (24.8, 7.5)),
    _jittered(5, "E", "multicrop", (24.6, 7.4)),
    _jittered(5, "E", "both", (24.4, 7.1), 7.0),  # on the test set: Table 7, '1 net'
)

SEVEN_NETS = (
    Trained("D", *FIXED_256),
    Trained("D", *FIXED_384),
    Trained("D", *JITTERED),
    Trained("C", *FIXED_256),
    Trained("C", *FIXED_384),
    Trained("E", *FIXED_256),
    Trained("E", *FIXED_384),
)

TABLE_6 = (
    PaperResult(6, SEVEN_NETS, (), "dense", 24.7, 7.5, 7.3),
    _jittered(6, "DE", "dense", (24.0, 7.1), 7.0),
    _jittered(6, "DE", "multicrop", (23.9, 7.2)),
    _jittered(6, "DE", "both", (23.7, 6.8), 6.8),
)

RESULTS = TABLE_3 + TABLE_4 + TABLE_5 + TABLE_6


def own_test_scales(scale_min: int, scale_max: int, step: int = 32) -> tuple[int, int, int]:
    """The three Q of a net in Table 4: {S-32, S, S+32}, or the range's ends and middle."""
    spread = step if scale_min == scale_max else 0
    return scale_min - spread, (scale_min + scale_max) // 2, scale_max + spread


@dataclass(frozen=True)
class Calibration:
    """What others measured on the same 50,000 images with trained nets of this kind.

    Errors in percent; a pair is the range of several reports.
    """

    arch: str
    what: str
    top1_error: tuple[float, float] | None
    top5_error: tuple[float, float] | None


_TORCHVISION = "torchvision's weights, one centre crop"
_RELEASED = "the authors' released weights, one centre crop"
CALIBRATION = (
    Calibration("A", _TORCHVISION, (30.98, 30.98), None),
    Calibration("B", _TORCHVISION, (30.07, 30.07), None),
    Calibration("D", _TORCHVISION, (28.41, 28.41), None),
    Calibration("E", _TORCHVISION, (27.62, 27.62), None),
    Calibration("D", _RELEASED, (28.5, 28.7), (9.9, 9.9)),
    Calibration("E", _RELEASED, (28.7, 28.7), (9.9, 10.0)),
)
# Points of top-1 error that one centre crop costs against multi-scale dense, same weights.
CENTRE_CROP_LOSS = 3.7


def single_scale_result(trained: Trained) -> PaperResult:
    """The cell of Table 3 for a net and its training scale.

    Raises:
      KeyError: the paper has no such run.
    """
    for result in TABLE_3:
        if result.nets == (trained,):
            return result
    raise KeyError(trained)
