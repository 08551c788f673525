"""Initial weights out of a trained net: a shallower one's layers, or all of the same net's.

The paper (section 3.1) starts B to E with "the first four convolutional layers and the
last three fully-connected layers" of a trained A. By position the shapes do not fit (A:
3 to 64, 64 to 128, ...; B: 3 to 64, 64 to 64, ...), by block they do: conv1_1, conv2_1,
conv3_1, conv3_2. Between sizes (S=256 to 384 to [256;512]) every layer is taken over.

What is copied is kept in the run itself (`inherited/`), so that a replay from step 0 does
not need the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diagnostics.errors import InputError, SnapshotDamaged
from diagnostics.snapshot import hash_arrays, read_snapshot, write_snapshot
from vggrepro.config import TrainConfig
from vggrepro.foreign_weights import PREPROCESS, read_weights
from vggrepro.initializers import initial_parameters
from vggrepro.model import Network
from vggrepro.remote_paths import local_copy
from vggrepro.run_directory import RunDirectory
from vggrepro.storage import is_url

INHERITED = "inherited"  # directory of the run
BY_BLOCK = (
    "block1_conv1",
    "block2_conv1",
    "block3_conv1",
    "block3_conv2",
    "fc1",
    "fc2",
    "predictions",
)
_SHALLOWEST = ("A", "A-LRN")

Parameters = dict[str, np.ndarray]


@dataclass(frozen=True)
class Source:
    """A trained net as found on disk.

    Attributes:
      arch: A stands for A-LRN too where a file does not tell.
      step: completed steps, and
      status: how the run ended; None of a file.
    """

    place: str
    arch: str
    parameters: Parameters
    step: int | None = None
    status: str | None = None


def read_source(place: str, warn: Callable[[str], None]) -> Source:
    """Weights of a run directory (its last valid checkpoint) or of a file.

    A file in torchvision's layout has its input normalisation folded in.

    Raises:
      InputError: neither, or no weights in it.
    """
    if is_url(place):
        with local_copy(place) as copy:
            return replace(read_source(str(copy), warn), place=place)
    path = Path(place)
    if not path.is_dir():
        if not path.exists():
            raise InputError(
                f"--init-from {place}: no such run directory or file",
                "Give a run of `vggrepro train`, a .weights.h5 or a .safetensors file",
            )
        stored = read_weights(path)
        parameters = stored.parameters
        if stored.layout == "torchvision":
            parameters = stored.for_input(PREPROCESS["torch"])
        return Source(place, stored.arch, parameters)
    with RunDirectory.open(path, on_warning=warn) as run:
        checkpoint = run.latest_checkpoint()
        arch, status = run.config().get("arch"), run.manifest().get("status")
    if arch is None:
        raise InputError(f"--init-from {place}: not a run of `vggrepro train`")
    if checkpoint is None:
        raise InputError(f"--init-from {place}: the run has no checkpoint", "Train it first")
    step, state = checkpoint
    prefix = "params/"
    parameters = {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}
    if status != "finished":
        warn(f"{place} is marked as {status}: its weights after {step:,} steps are taken")
    return Source(place, arch, parameters, step, status)


def copied_layers(source_arch: str, arch: str) -> tuple[str, ...] | None:
    """The layers that `arch` takes from `source_arch`; None: all of them.

    Raises:
      InputError: the paper has no such inheritance.
    """
    if arch == source_arch or {arch, source_arch} <= set(_SHALLOWEST):
        return None
    if source_arch in _SHALLOWEST:
        return BY_BLOCK
    raise InputError(
        f"net {arch} cannot inherit from net {source_arch}",
        "The paper's deeper nets inherit from A; between sizes a net inherits from itself",
    )


def inherited_parameters(source: Source, network: Network) -> Parameters:
    """The source's arrays that the net takes over.

    Raises:
      InputError: no such inheritance, or a shape differs; the message names both.
    """
    names = copied_layers(source.arch, network.arch)
    taken: Parameters = {}
    for name, shape in network.parameter_shapes().items():
        if names is not None and name.partition("/")[0] not in names:
            continue
        array = source.parameters[name]
        if array.shape != shape:
            raise InputError(
                f"{name} is {list(array.shape)} in {source.place} (net {source.arch}) and "
                f"{list(shape)} in this run (net {network.arch})",
                "Width, image size and number of classes must be those of the source",
            )
        taken[name] = array
    return taken


@dataclass(frozen=True)
class Inheritance:
    """What a run starts from beside its initialiser.

    Attributes:
      parameters: the layers copied; empty for a run that inherits nothing.
      record: what the manifest keeps, the source and one row a layer; or None.
      init: of the layers that are not copied.
    """

    parameters: Parameters
    record: dict[str, Any] | None
    init: str

    def lines(self) -> list[str]:
        """The record as a table: layer, copied or random, kernel shape, hash."""
        if self.record is None:
            return []
        steps = self.record["source_step"]
        after = "" if steps is None else f" after {steps:,} steps"
        place, arch = self.record["source"], self.record["source_arch"]
        lines = [f"initial weights from {place} (net {arch}{after}):"]
        for row in self.record["layers"]:
            origin = "copied" if row["origin"] == "copied" else f"random, {self.init}"
            shape = "x".join(map(str, row["shape"]))
            lines.append(f"  {row['layer']:<14}{origin:<26}{shape:<18}sha256 {row['sha256'][:12]}")
        return lines

    def keep(self, run_dir: Path) -> None:
        """Stores what was copied in the run."""
        if self.record is not None:
            write_snapshot(run_dir / INHERITED, self.parameters, {})


def source_of(config: TrainConfig, warn: Callable[[str], None]) -> Source | None:
    """Reads the source that the configuration names; None if it names none.

    Raises:
      InputError: no such source, or the net cannot inherit from it.
    """
    if not config.init_from:
        return None
    source = read_source(config.init_from, warn)
    copied_layers(source.arch, config.arch)
    return source


def inherit(config: TrainConfig, network: Network, source: Source | None) -> Inheritance:
    """What a run takes over from its source.

    Raises:
      InputError: a shape differs.
    """
    if source is None:
        return Inheritance({}, None, config.init)
    taken = inherited_parameters(source, network)
    initial = {**initial_parameters(network, config.init, config.seed), **taken}
    return Inheritance(taken, _record(source, taken, initial), config.init)


def _record(source: Source, taken: Parameters, initial: Mapping[str, np.ndarray]) -> dict[str, Any]:
    layers = [name.partition("/")[0] for name in initial if name.endswith("/kernel")]
    return {
        "source": source.place,
        "source_arch": source.arch,
        "source_step": source.step,
        "source_status": source.status,
        "source_sha256": hash_arrays(source.parameters),
        "layers": [
            {
                "layer": layer,
                "origin": "copied" if f"{layer}/kernel" in taken else "random",
                "shape": list(initial[f"{layer}/kernel"].shape),
                "sha256": hash_arrays(
                    {part: initial[f"{layer}/{part}"] for part in ("kernel", "bias")}
                ),
            }
            for layer in layers
        ],
    }


def kept_parameters(run_dir: Path, config: TrainConfig) -> Parameters:
    """What a run inherited, from its own copy; nothing for a run that inherits nothing.

    Raises:
      SnapshotDamaged: the copy is missing or damaged; names what it was copied from.
    """
    if not config.init_from:
        return {}
    try:
        return read_snapshot(run_dir / INHERITED)[0]
    except SnapshotDamaged as error:
        raise SnapshotDamaged(
            f"{error.message}: without the weights inherited from {config.init_from} "
            "step 0 of this run cannot be made again",
            "Restore inherited/ from a copy of the run, or start from a checkpoint",
        ) from error
