"""What a run ran on, for its manifest: code, packages, hardware, settings.

Nothing private: no host name, no user, no absolute path, no secret.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from diagnostics.errors import InputError

TENSORFLOW_WHEELS = ("tensorflow", "tensorflow-cpu", "tensorflow-tpu", "tensorflow-macos")
_PACKAGES = (
    *TENSORFLOW_WHEELS,
    "keras",
    "numpy",
    "ml_dtypes",
    "safetensors",
    "tensorboard",
    "rich",
    "jax",
    "jaxlib",
    "libtpu",
)
_VARIABLES = frozenset(
    ["KERAS_BACKEND", "CUDA_VISIBLE_DEVICES", "PYTHONHASHSEED", "NCCL_ALGO", "NCCL_PROTO"]
    + ["JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "LIBTPU_INIT_ARGS"]
    + ["TPU_ACCELERATOR_TYPE", "TPU_CHIPS_PER_HOST_BOUNDS", "TPU_HOST_BOUNDS", "TPU_VISIBLE_CHIPS"]
)
# Not all of TF_*: Terraform keeps its secrets in TF_VAR_* and TF_TOKEN_*; nor TF_CONFIG and
# TPU_WORKER_HOSTNAMES, which name machines.
_VARIABLE_PREFIXES = (
    *("TF_ENABLE_", "TF_DISABLE_", "TF_DETERMINISTIC_", "TF_CUDNN_", "TF_CUBLAS_", "TF_GPU_"),
    *("TF_XLA_", "TF_NUM_", "TF_FORCE_", "TF_USE_", "TF_ONEDNN_", "TF_CPP_", "TF2_"),
    *("XLA_", "OMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "OPENBLAS_", "NVIDIA_TF32_", "CUBLAS_"),
)
_SECRET = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|KEY")
# An absolute path, a home directory or a URL, not the '/' inside a relative path.
_PRIVATE_PATH = re.compile(r"(?<![\w.~/-])(?:[a-z][a-z0-9+]*:/|~|/)[^\s:;,\"']*")
_CPU_FLAGS = ("avx2", "avx512", "avx_vnni", "amx", "fma", "f16c", "bf16", "asimd", "sve")


def describe_environment(devices: Sequence[str] = ()) -> dict[str, Any]:
    """Code, packages, Python, system, hardware and variables as plain JSON values.

    Args:
      devices: what the caller's TensorFlow sees, as "GPU: NVIDIA L4"; TensorFlow is
        not imported here.
    """
    return {
        "code": _code(Path(__file__).resolve().parent),
        "packages": _packages(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "hardware": {**_processor(), "memory_bytes": _memory_bytes(), "devices": list(devices)},
        "determinism": _determinism(),
        "variables": relevant_variables(os.environ),
    }


def _determinism() -> dict[str, bool]:
    """What TensorFlow does about repeatable bits; empty while it is not imported.

    oneDNN is on by default only where the processor has neural-network instructions, and
    its kernels have other bits.
    """
    if "tensorflow" not in sys.modules:
        return {}
    from tensorflow.python.framework import config
    from tensorflow.python.util import _pywrap_util_port

    return {
        "onednn_kernels": bool(_pywrap_util_port.IsMklEnabled()),
        "deterministic_ops": bool(config.is_op_determinism_enabled()),
    }


def relevant_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that can change a run's bits or speed; absolute paths become "<path>"."""
    return {
        name: _without_paths(name, value)
        for name, value in sorted(environment.items())
        if (name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES)) and not _SECRET.search(name)
    }


def _without_paths(name: str, value: str) -> str:
    if not _PRIVATE_PATH.search(value):
        return value
    # Flags are split at blanks; elsewhere a path may itself hold one.
    return _PRIVATE_PATH.sub("<path>", value) if name.endswith("FLAGS") else "<path>"


def missing_tensorflow_error() -> InputError:
    """The error for a missing TensorFlow; three wheels provide it, so none is a dependency."""
    return InputError(
        "TensorFlow is not installed",
        "Install the wheel for this machine: pip install 'vggrepro[cpu]', 'vggrepro[gpu]' "
        "or 'vggrepro[tpu]'; from a checkout, pip install -e '.[cpu]' and so on",
    )


def _code(package: Path) -> dict[str, Any]:
    """Version, and commit and dirty flag if the package lies in a checkout of its own.

    `dirty`: files of the two packages differ from the commit, or are not in it.
    """
    code: dict[str, Any] = {"version": _version("vggrepro"), "commit": None, "dirty": None}
    checkout = package.parent
    # Only a checkout of this project: a virtual environment may lie inside another's.
    if (checkout / ".git").exists():
        code["commit"] = _git(checkout, "rev-parse", "HEAD")
        changes = _git(checkout, "status", "--porcelain", "--", "vggrepro", "diagnostics")
        code["dirty"] = None if changes is None else changes != ""
    return code


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints; None if there is no git or it refuses."""
    # A hook sets GIT_DIR to its own repository; a lock would disturb a git running beside.
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True, env=inherited
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> dict[str, str]:
    found = {name: _version(name) for name in _PACKAGES}
    return {name: version for name, version in found.items() if version is not None}


def _processor() -> dict[str, Any]:
    """Model, usable cores and the instruction sets that change results or speed."""
    entries: dict[str, str] = {}
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            entries.setdefault(key.strip(), value.strip())
    flags = (entries.get("flags") or entries.get("Features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": entries.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "cpu_flags": sorted(flag for flag in flags if any(part in flag for part in _CPU_FLAGS)),
    }


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What may explain other bits than recorded, in sentences; paths and devices aside."""
    found = []
    for part, what in (("packages", ""), ("variables", "environment variable ")):
        old, new = recorded.get(part, {}), current.get(part, {})
        for name in sorted(set(old) | set(new)):
            if name.startswith("TF_CPP_"):
                continue  # how much is logged
            if old.get(name) != new.get(name):
                was, now = old.get(name, "not there"), new.get(name, "not there")
                found.append(f"{what}{name}: {was} when recorded, {now} now")
    hardware, now_hardware = recorded.get("hardware", {}), current.get("hardware", {})
    pairs = [(name, recorded.get(name), current.get(name)) for name in ("python", "system")]
    flags, now_flags = recorded.get("determinism", {}), current.get("determinism", {})
    pairs += [
        (name.replace("_", " "), flags[name], now_flags[name])
        for name in sorted(flags.keys() & now_flags.keys())
    ]
    pairs += [(name, hardware.get(name), now_hardware.get(name)) for name in ("cpu", "cores")]
    return found + [
        f"{name}: {old} when recorded, {new} now" for name, old, new in pairs if old != new
    ]
