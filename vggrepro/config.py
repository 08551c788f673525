"""The configuration of a training run: one frozen dataclass, no TensorFlow.

Every field says in its metadata what it means, its unit, what the paper uses
(`paper`: the values that count as the paper's) or why the choice is ours
(`silent`: the paper does not say, or is ambiguous). `origins` turns that into
the tag that the manifest records: paper, interpretation or deviation.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from diagnostics.errors import InputError

ARCHITECTURES = ("A", "A-LRN", "B", "C", "D", "E")
INITIALIZERS = ("glorot-uniform", "glorot-normal", "he-normal", "he-uniform")
PRECISIONS = ("float32", "bfloat16", "float16")
RESIZE_KERNELS = ("triangle", "keyscubic")
DECODERS = ("exact", "fast")
MOMENTUM_FORMS = ("caffe", "pytorch")
SHUFFLE_RUN = 64  # records read in one go; changing it changes every window order
STRATEGIES = ("auto", "cpu", "mirrored", "multiworker", "tpu", "pjrt")


def _setting(
    default: Any, help: str, *, unit: str = "", paper: tuple = (), silent: str = ""
) -> Any:
    return field(
        default=default,
        metadata={"help": help, "unit": unit, "paper": paper, "silent": silent},
    )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the bits of a run. Defaults: the demo recipe.

    Raises:
      InputError: a field holds an illegal value; the message names it.
    """

    arch: str = _setting("A", "the net of the paper's Table 1", paper=ARCHITECTURES)
    width: float = _setting(0.25, "multiplier of every layer's width", paper=(1.0,))
    image_size: int = _setting(32, "side of the crop fed to the net", unit="pixels", paper=(224,))
    classes: int = _setting(0, "number of classes; 0: as many as the data has", paper=(1000,))
    dropout: float = _setting(0.5, "drop probability of fc1 and fc2", paper=(0.5,))
    init: str = _setting(
        "glorot-uniform",
        "initialiser of every kernel: normal:STD, " + ", ".join(INITIALIZERS),
        silent="'normal with 10^-2 variance' reads as sigma=0.1, which explodes; "
        "the authors' later code uses sigma=0.01; Glorot is the paper's own later advice",
    )
    init_from: str = _setting(
        "",
        "start from a trained net: a run directory, .weights.h5 or .safetensors file; from A: "
        "conv1_1, conv2_1, conv3_1, conv3_2 and the FC layers; from the same net: all layers",
        silent="'the first four convolutional layers' do not fit by position, by block they do",
    )
    data: str = _setting("synthetic", "a directory with train/ and val/, or 'synthetic'")
    scale_min: int = _setting(
        37, "smallest shorter side S after rescaling", unit="pixels", paper=(256, 384)
    )
    scale_max: int = _setting(
        37, "largest shorter side S; S is drawn per image", unit="pixels", paper=(256, 384, 512)
    )
    flip: bool = _setting(True, "flip half of the crops horizontally", paper=(True,))
    colour_shift: float = _setting(
        0.1, "standard deviation of alpha in the RGB colour shift; 0: none", paper=(0.1,)
    )
    resize: str = _setting(
        "triangle",
        "resampling kernel, antialiased",
        silent="the paper does not name its resize filter",
    )
    decode: str = _setting(
        "fast",
        "exact: decode the whole image; fast: only the window that the crop needs",
        silent="both give the same bits; exact also notices damage outside the window",
    )
    order: str = _setting(
        "full",
        "shuffling of an epoch; full, or window:N: among N examples at a time, for shards on "
        "remote or spinning storage",
        silent="the paper does not say how it shuffles",
    )
    batch_size: int = _setting(32, "examples a step, over all replicas", paper=(256,))
    steps: int = _setting(600, "training steps (the paper's iterations)", paper=(370_000,))
    lr: float = _setting(0.01, "initial learning rate", paper=(0.01, 0.001))
    momentum: float = _setting(0.9, "momentum coefficient", paper=(0.9,))
    momentum_form: str = _setting(
        "caffe",
        "caffe: v = mv - lr g, w += v; pytorch: v = mv + g, w -= lr v",
        silent="the two differ when the learning rate changes; the authors used Caffe",
    )
    weight_decay: float = _setting(5e-4, "L2 coefficient, added to the gradient", paper=(5e-4,))
    decay_biases: bool = _setting(
        False,
        "apply the L2 term to biases as well",
        silent="the paper does not say; Caffe's published nets do not decay biases",
    )
    warmup_steps: int = _setting(0, "steps of linear learning-rate warm-up", paper=(0,))
    clip_norm: float = _setting(
        0.0, "clip the global gradient norm to this; 0: never", paper=(0.0,)
    )
    lr_drops: int = _setting(3, "how often the plateau rule may drop the rate", paper=(3,))
    lr_drop_factor: float = _setting(0.1, "factor of each drop", paper=(0.1,))
    plateau_patience: int = _setting(
        5,
        "evaluations without a better validation top-1 error before a drop",
        silent="the paper does not say how long validation accuracy must stand still",
    )
    eval_every: int = _setting(
        200, "steps between validations; 0: only at the end", silent="the paper does not say"
    )
    checkpoint_every: int = _setting(200, "steps between checkpoints", silent="bookkeeping")
    steps_per_loop: int = _setting(
        1, "steps that one call runs on the device before the host looks", silent="bookkeeping"
    )
    keep_checkpoints: int = _setting(3, "how many checkpoints are kept", silent="bookkeeping")
    seed: int = _setting(0, "the run's seed", silent="the paper states none")
    precision: str = _setting("float32", "compute type of activations", paper=("float32",))
    strategy: str = _setting("auto", "which devices train", silent="the paper used 4 GPUs")

    def __post_init__(self) -> None:
        _check_choice("arch", self.arch, ARCHITECTURES)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("strategy", self.strategy, STRATEGIES)
        _check_choice("resize", self.resize, RESIZE_KERNELS)
        _check_choice("decode", self.decode, DECODERS)
        _check_choice("momentum_form", self.momentum_form, MOMENTUM_FORMS)
        parse_init(self.init)
        window_of(self.order)
        for name in (
            "image_size",
            "batch_size",
            "steps",
            "steps_per_loop",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            _check(name, getattr(self, name) >= 1, getattr(self, name), "must be at least 1")
        for name in (
            "classes",
            "warmup_steps",
            "lr_drops",
            "eval_every",
            "clip_norm",
            "colour_shift",
        ):
            _check(name, getattr(self, name) >= 0, getattr(self, name), "must not be negative")
        _check(
            "plateau_patience", self.plateau_patience >= 1, self.plateau_patience, "must be >= 1"
        )
        _check("width", self.width > 0, self.width, "must be positive")
        _check("lr", 0 < self.lr < math.inf, self.lr, "must be positive and finite")
        _check("lr_drop_factor", 0 < self.lr_drop_factor < 1, self.lr_drop_factor, "not in (0, 1)")
        _check("weight_decay", self.weight_decay >= 0, self.weight_decay, "must not be negative")
        _check("momentum", 0 <= self.momentum < 1, self.momentum, "must be in [0, 1)")
        _check("dropout", 0 <= self.dropout < 1, self.dropout, "must be in [0, 1)")
        _check("seed", 0 <= self.seed < 2**63, self.seed, "must be in [0, 2^63)")
        _check("scale_max", self.scale_max >= self.scale_min, self.scale_max, "is below scale_min")
        _check(
            "scale_min",
            self.scale_min >= self.image_size,
            self.scale_min,
            f"must be at least image_size ({self.image_size})",
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`; an unknown or ill-typed field is an `InputError`."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise InputError(
                    f"config: unknown field '{name}'", "Was it written by a newer version?"
                )
            expected = type(known[name].default)
            fits = isinstance(value, (int, float) if expected is float else expected)
            if not fits or (isinstance(value, bool) and expected is not bool):
                raise InputError(f"config: {name}={value!r} is not of type {expected.__name__}")
        return cls(**values)

    def origins(self) -> dict[str, str]:
        """Tags each field: 'paper', 'interpretation' or 'deviation'."""
        return {f.name: _origin(f, getattr(self, f.name)) for f in dataclasses.fields(self)}


def _origin(config_field: dataclasses.Field, value: Any) -> str:
    if config_field.metadata["silent"]:
        return "interpretation"
    return "paper" if value in config_field.metadata["paper"] else "deviation"


def parse_init(text: str) -> tuple[str, float]:
    """Splits an initialiser's name: 'normal:0.01' -> ('normal', 0.01).

    Glorot and He carry no number; their second element is 0.

    Raises:
      InputError: the name is unknown or the standard deviation is not positive.
    """
    if text in INITIALIZERS:
        return text, 0.0
    kind, _, number = text.partition(":")
    try:
        std = float(number)
    except ValueError:
        std = -1.0
    if kind == "normal" and 0 < std < float("inf"):
        return kind, std
    raise InputError(
        f"init '{text}' is not an initialiser",
        "Use normal:STD (as normal:0.01) or one of " + ", ".join(INITIALIZERS),
    )


def window_of(order: str) -> int:
    """The N of the order 'window:N'; 0 for 'full'.

    Raises:
      InputError: it is neither, or N is no positive multiple of SHUFFLE_RUN.
    """
    kind, _, number = order.partition(":")
    if order == "full":
        return 0
    number = number if kind == "window" and number.isdecimal() else "0"
    if int(number) > 0 and int(number) % SHUFFLE_RUN == 0:
        return int(number)
    raise InputError(
        f"order '{order}' is neither full nor window:N with N a multiple of {SHUFFLE_RUN}",
        "Use full, or window:2048 for remote or spinning storage",
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _check(name, value in choices, value, "must be one of " + ", ".join(choices))


def _check(name: str, holds: bool, value: Any, what: str) -> None:
    if not holds:
        raise InputError(f"config: {name}={value!r} {what}")
