"""A trained net ready to be evaluated, out of a run directory or a file of weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diagnostics.errors import InputError
from diagnostics.snapshot import hash_arrays
from vggrepro.config import TrainConfig
from vggrepro.example_index import ExampleIndex
from vggrepro.foreign_weights import PREPROCESS, InputForm, read_weights
from vggrepro.model import Network, network_of
from vggrepro.paper import CLASSES, own_test_scales
from vggrepro.preprocessing import Preprocessing
from vggrepro.run_directory import RunDirectory

_WORDNET_ID = re.compile(r"n\d{8}")
_RELEASED_SCALE = 256  # Q, for a crop of 224, of weights whose training scale is not known
_PAPER_CROP = 224
_SCALE_STEP = 32  # between the paper's three test scales, for a crop of 224


@dataclass(frozen=True)
class EvaluatedNet:
    """One net.

    Attributes:
      parameters: '<layer>/kernel' and '<layer>/bias', float32, for RGB minus the mean.
      preprocessing: mean, resampling, and the training scale S.
      precision: type of activations.
      description: plain JSON values for the record: what the net is and how it was trained.
    """

    network: Network
    parameters: Mapping[str, np.ndarray]
    preprocessing: Preprocessing
    precision: str
    description: dict[str, Any]

    @property
    def own_scale(self) -> int:
        """Q of the paper's single-scale evaluation: S, or the middle of its range."""
        return self.preprocessing.evaluation_side

    @property
    def own_scales(self) -> tuple[int, ...]:
        """The three Q of the paper's Table 4: {S-32, S, S+32}, or the range's ends and middle."""
        least, most = self.preprocessing.scale_min, self.preprocessing.scale_max
        step = max(1, round(_SCALE_STEP * self.network.image_size / _PAPER_CROP))
        return own_test_scales(least, most, step)


def net_of_run(run_dir: Path, warn: Callable[[str], None]) -> EvaluatedNet:
    """The net of a run's last valid checkpoint.

    Raises:
      InputError: not a run of `vggrepro train`, or it has no checkpoint.
    """
    with RunDirectory.open(run_dir, on_warning=warn) as run:
        config = TrainConfig.from_dict(run.config())
        manifest, checkpoint = run.manifest(), run.latest_checkpoint()
    if checkpoint is None:
        raise InputError(f"{run_dir} has no checkpoint to evaluate", "Train it first")
    step, state = checkpoint
    prefix = "params/"
    parameters = {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}
    if not {"status", "data", "config_origins"} <= manifest.keys():
        raise InputError(
            f"{run_dir}/manifest.json is not whole, or of another version",
            "Restore it from a copy of the run",
        )
    form = InputForm(tuple(manifest["data"]["colours"]["mean_rgb"]))
    network = network_of(config.arch, parameters, config.image_size)
    description = {
        "run_dir": str(run_dir),
        "weights_file": None,
        "step": step,
        "status": manifest["status"],
        "config": config.to_dict(),
        "config_origins": manifest["config_origins"],
        "inheritance": (manifest.get("inheritance") or {}).get("source_arch"),
        "training_images": manifest["data"]["train_images"],
        "training_resized": manifest["data"].get("resized"),
        "classes_sha256": manifest["data"].get("classes_sha256"),
        **_common(network, parameters, config.scale_min, config.scale_max),
    }
    return EvaluatedNet(
        network,
        parameters,
        _preprocessing(network, form, config.scale_min, config.scale_max, config),
        config.precision,
        description,
    )


def net_of_file(file: Path, arch: str | None, preprocess: str | None) -> EvaluatedNet:
    """The net of a file of weights; see `foreign_weights`.

    Args:
      arch: None: as the file's convolutions say.
      preprocess: what the net was trained to see, 'caffe' or 'torch'; None is
        enough for torchvision's layout, which tells.

    Raises:
      InputError: unreadable, another net than `arch`, or the preprocessing is not known.
    """
    stored = read_weights(file)
    found = arch or stored.arch
    if found.replace("A-LRN", "A") != stored.arch:
        raise InputError(f"{file} holds net {stored.arch}, not {found}", "Leave out --arch")
    if preprocess is None and stored.layout != "torchvision":
        raise InputError(
            f"{file} does not say what its net was trained to see",
            "Give --preprocess caffe (BGR minus the mean: keras.applications, the authors' own) "
            "or torch; or evaluate the run directory",
        )
    form = PREPROCESS[preprocess or "torch"]
    parameters = stored.for_input(form)
    network = network_of(found, parameters)
    side = round(network.image_size * _RELEASED_SCALE / _PAPER_CROP)
    description = {
        "run_dir": None,
        "weights_file": str(file),
        "layout": stored.layout,
        "preprocess": preprocess or "torch",
        **_common(network, parameters, None, None),
    }
    preprocessing = _preprocessing(network, form, side, side, TrainConfig())
    return EvaluatedNet(network, parameters, preprocessing, "float32", description)


def doubtful_classes(nets: Sequence[EvaluatedNet], index: ExampleIndex) -> list[str]:
    """Why the data may number its classes, in the order of their names, unlike the nets."""
    found = []
    for net in nets:
        trained_on = net.description.get("classes_sha256")
        if trained_on not in (None, index.classes_sha256):
            found.append(
                f"the classes in {index.root} have other names than those that "
                f"{net.description['run_dir']} was trained on: are they in the same order?"
            )
        released = net.description["run_dir"] is None and net.network.classes == CLASSES
        if released and not all(map(_WORDNET_ID.fullmatch, index.class_names)):
            found.append(
                f"the classes in {index.root} are not named by their WordNet ids (n01440764, "
                "...), by which ImageNet's classes are in order: are they in the same order?"
            )
    return found


def _common(
    network: Network,
    parameters: Mapping[str, np.ndarray],
    scale_min: int | None,
    scale_max: int | None,
) -> dict[str, Any]:
    return {
        "arch": network.arch,
        "image_size": network.image_size,
        "classes": network.classes,
        "parameters": network.parameter_count(),
        "scale_min": scale_min,
        "scale_max": scale_max,
        "weights_sha256": hash_arrays(parameters),
    }


def _preprocessing(
    network: Network, form: InputForm, scale_min: int, scale_max: int, config: TrainConfig
) -> Preprocessing:
    """What evaluation needs; nothing is flipped or shifted at random."""
    return Preprocessing(
        image_size=network.image_size,
        scale_min=scale_min,
        scale_max=scale_max,
        flip=False,
        colour_shift=0.0,
        resize=config.resize,
        decode=config.decode,
        mean_rgb=form.mean_rgb,
        colour_components=((0.0,) * 3,) * 3,
    )
