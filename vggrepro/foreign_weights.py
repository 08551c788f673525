"""Weights of a file, whoever wrote it, as this package's parameters.

Three layouts, told apart by the names in the file:

vggrepro     `<layer>/kernel`, `<layer>/bias` (a checkpoint's state.safetensors too)
keras        HDF5 of `keras.applications` (legacy) or `.weights.h5` (Keras 3)
torchvision  `features.N.weight`, `classifier.N.weight`: kernels [out, in, k, k], and fc1's
             inputs in the order channel, row, column

Ours: kernels [k, k, in, out], fc1's inputs in the order row, column, channel, input RGB
minus a mean in grey levels. What the other side does to its input (`PREPROCESS`) is
folded into the first kernel, exactly but for rounding, so that one net serves all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from diagnostics.errors import InputError
from vggrepro.model import KERNELS, layer_names
from vggrepro.torch_file import read_torch_file

H5_SUFFIXES = (".h5", ".hdf5")
TORCH_SUFFIXES = (".pth", ".pt")
SUFFIXES = (".safetensors", *H5_SUFFIXES, *TORCH_SUFFIXES)
_AGAIN = "Is it whole? Get the file again"
_LAYOUT_ENDS = ("kernel", "bias")


@dataclass(frozen=True)
class InputForm:
    """What a net was trained to see.

    Attributes:
      mean_rgb: subtracted, grey levels.
      bgr: whether blue comes first.
      divisor_rgb: what the difference is divided by, grey levels.
    """

    mean_rgb: tuple[float, float, float]
    bgr: bool = False
    divisor_rgb: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def as_ours(self, first_kernel: np.ndarray) -> np.ndarray:
        """The first convolution's kernel [k, k, 3, out] for RGB minus the mean."""
        kernel = first_kernel[:, :, ::-1] if self.bgr else first_kernel
        return (kernel / np.array(self.divisor_rgb)[:, None]).astype(np.float32)


# The authors' released nets (Caffe), and torchvision's (pixels in [0, 1], per-channel
# mean and standard deviation of ImageNet).
PREPROCESS = {
    "caffe": InputForm((123.68, 116.779, 103.939), bgr=True),
    "torch": InputForm(
        (0.485 * 255, 0.456 * 255, 0.406 * 255),
        divisor_rgb=(0.229 * 255, 0.224 * 255, 0.225 * 255),
    ),
}


@dataclass(frozen=True)
class StoredWeights:
    """What a file holds, in our form.

    Attributes:
      layout: 'vggrepro', 'keras' or 'torchvision'.
      arch: by the convolutions; A stands for A-LRN too, which has the same shapes.
      parameters: '<layer>/kernel' and '<layer>/bias', float32.
    """

    path: Path
    layout: str
    arch: str
    parameters: dict[str, np.ndarray]

    def for_input(self, form: InputForm) -> dict[str, np.ndarray]:
        """The parameters for input that is RGB minus `form.mean_rgb`."""
        first = f"{layer_names(self.arch)[0]}/kernel"
        return {**self.parameters, first: form.as_ours(self.parameters[first])}


Pair = tuple[np.ndarray, np.ndarray]  # kernel and bias of a layer


def read_weights(path: Path) -> StoredWeights:
    """Reads a file of weights; no code in it is run.

    Raises:
      InputError: unreadable, an unknown layout, or no net of Table 1.
    """
    if path.suffix in H5_SUFFIXES:
        layout, pairs = "keras", _from_h5(path)
    elif path.suffix == ".safetensors":
        layout, pairs = _by_names(path, _load_safetensors(path))
    elif path.suffix in TORCH_SUFFIXES:
        layout, pairs = _by_names(path, read_torch_file(path))
    else:
        raise InputError(f"{path} is no file of weights", "Known endings: " + ", ".join(SUFFIXES))
    pairs.sort(key=lambda pair: -pair[0].ndim)  # convolutions come first, whatever the names
    arch = _arch_of(path, pairs)
    parameters = {}
    for name, pair in zip(layer_names(arch), pairs, strict=True):
        for part, array in zip(_LAYOUT_ENDS, pair, strict=True):
            parameters[f"{name}/{part}"] = np.asarray(array, np.float32)
    _check_chain(path, parameters)
    return StoredWeights(path, layout, arch, parameters)


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no sound safetensors file: {error}", _AGAIN) from error


def _by_names(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[str, list[Pair]]:
    """The layout and the layers in forward order."""
    known = {name.removeprefix("module."): array for name, array in arrays.items()}
    if any(re.fullmatch(r"(features|classifier)\.\d+\.weight", name) for name in known):
        return "torchvision", _from_torchvision(path, known)
    prefix = "params/" if any(name.startswith("params/") for name in known) else ""
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, array in known.items():
        layer, _, part = name.removeprefix(prefix).partition("/")
        if name.startswith(prefix) and part in _LAYOUT_ENDS:
            layers.setdefault(layer, {})[part] = array
    if not layers:
        shown = ", ".join([*sorted(known)[:3], "..."]) if known else "it has none"
        raise InputError(
            f"{path}: nothing known among its names ({shown})",
            "Expected <layer>/kernel or features.N.weight",
        )
    return "vggrepro", [_pair(path, name, layers[name]) for name in _in_order(layers)]


def _pair(path: Path, layer: str, parts: Mapping[str, np.ndarray]) -> Pair:
    for part in _LAYOUT_ENDS:
        if part not in parts:
            raise InputError(f"{path}: layer {layer} has no {part}")
    return parts["kernel"], parts["bias"]


def _in_order(names: Mapping[str, object]) -> list[str]:
    """Names with their numbers as numbers: conv2d, conv2d_9, conv2d_10."""
    return sorted(names, key=lambda name: [(len(t), t) for t in re.split(r"(\d+)|_", name) if t])


def _from_torchvision(path: Path, arrays: Mapping[str, np.ndarray]) -> list[Pair]:
    if any(name.endswith("running_mean") for name in arrays):
        raise InputError(
            f"{path} holds batch normalisation, which no net of the paper has",
            "Take the file without 'bn' in its name",
        )
    numbered: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"(features|classifier)\.(\d+)\.(weight|bias)", name)
        if match is None:
            raise InputError(f"{path}: '{name}' has no place in torchvision's VGG")
        part = "kernel" if match[3] == "weight" else "bias"
        numbered.setdefault((match[1], int(match[2])), {})[part] = array
    pairs: list[Pair] = []
    # Convolutions first: 'features' is the later word.
    for place in sorted(numbered, key=lambda place: (place[0] != "features", place[1])):
        kernel, bias = _pair(path, ".".join(map(str, place)), numbered[place])
        if kernel.ndim == 4:
            pairs.append((kernel.transpose(2, 3, 1, 0), bias))
        elif pairs and pairs[-1][0].ndim == 4:
            pairs.append((_rows_columns_channels(path, kernel, len(pairs[-1][1])), bias))
        else:
            pairs.append((kernel.T, bias))
    return pairs


def _rows_columns_channels(path: Path, kernel: np.ndarray, channels: int) -> np.ndarray:
    """fc1's kernel [out, channels*rows*columns] as [rows*columns*channels, out]."""
    side = round((kernel.shape[1] / channels) ** 0.5)
    if side * side * channels != kernel.shape[1]:
        raise InputError(f"{path}: {kernel.shape[1]} inputs of fc1 are no square map")
    maps = kernel.reshape(-1, channels, side, side)
    return maps.transpose(2, 3, 1, 0).reshape(-1, len(kernel))


def _from_h5(path: Path) -> list[Pair]:
    import h5py

    try:
        with h5py.File(path) as file:
            top = file.get("model_weights", file)
            layers = _legacy_layers(top) if "layer_names" in top.attrs else _keras3_layers(top)
    except OSError as error:
        raise InputError(
            f"cannot read {path} as HDF5: {error.strerror or error}", _AGAIN
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} holds no Keras weights: {error}") from error
    for name, arrays in layers.items():
        if len(arrays) != 2:
            raise InputError(f"{path}: layer {name} has {len(arrays)} arrays, not kernel and bias")
    return [(arrays[0], arrays[1]) for arrays in layers.values()]


def _legacy_layers(top: object) -> dict[str, list[np.ndarray]]:
    """Layer -> arrays, in the file's own order of layers."""
    layers: dict[str, list[np.ndarray]] = {}
    for layer in map(_text, top.attrs["layer_names"]):  # type: ignore[attr-defined]
        group = top[layer]  # type: ignore[index]
        arrays = [np.array(group[_text(name)]) for name in group.attrs["weight_names"]]
        if arrays:
            layers[layer] = arrays
    return layers


def _keras3_layers(top: object) -> dict[str, list[np.ndarray]]:
    """Layer -> arrays; the file lists layers by class and number, in the order of the model."""
    found = {}
    for key, group in top["layers"].items():  # type: ignore[index]
        values = group["vars"]
        arrays = [np.array(values[str(number)]) for number in range(len(values))]
        if arrays:
            found[key] = arrays
    return {key: found[key] for key in _in_order(found)}


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _arch_of(path: Path, pairs: list[Pair]) -> str:
    """The net of Table 1 with these convolutions, by number and kernel size."""
    sizes = tuple(kernel.shape[0] for kernel, _ in pairs if kernel.ndim == 4)
    dense = [kernel.shape for kernel, _ in pairs if kernel.ndim == 2]
    for arch, blocks in KERNELS.items():
        if sizes == tuple(size for block in blocks for size in block) and len(dense) == 3:
            return arch
    raise InputError(
        f"{path} holds {len(sizes)} convolutions and {len(dense)} fully connected layers: "
        "no net of the paper's Table 1",
        "Files without the fully connected layers ('notop') cannot be evaluated",
    )


def _check_chain(path: Path, parameters: Mapping[str, np.ndarray]) -> None:
    """Every layer takes what the one before it gives."""
    before, given = "", 3
    for name, kernel in parameters.items():
        if not name.endswith("/kernel"):
            continue
        takes, bias = kernel.shape[-2], parameters[name.replace("/kernel", "/bias")]
        first_dense = name == "fc1/kernel"
        fits = takes % given == 0 if first_dense else takes == given
        if not fits or bias.shape != kernel.shape[-1:]:
            raise InputError(
                f"{path}: {name} {list(kernel.shape)} with a bias {list(bias.shape)} does not "
                f"fit behind {before or 'an RGB image'} ({given} channels)"
            )
        before, given = name, kernel.shape[-1]
