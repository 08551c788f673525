"""What the manifest says of the machine, and what it must not say."""

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from vggrepro import environment
from vggrepro.environment import (
    describe_environment,
    missing_tensorflow_error,
    relevant_variables,
)

ROOT = Path(environment.__file__).parents[1]


def test_it_holds_what_a_reader_needs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = describe_environment(["GPU: NVIDIA L4"])
    assert found["packages"]["numpy"] and found["packages"]["safetensors"]
    assert found["python"].endswith(platform.python_version())
    assert platform.system() in found["system"]
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_bytes"] > 1 << 28
    assert found["hardware"]["cpu"]
    assert found["hardware"]["devices"] == ["GPU: NVIDIA L4"]
    assert found["variables"]["OMP_NUM_THREADS"] == "2"
    assert set(found["code"]) == {"version", "commit", "dirty"}


def test_it_holds_nothing_private(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={Path.home()}/dump --xla_a=1")
    monkeypatch.setenv("TF_XLA_FLAGS", f"--a={Path.cwd()}")
    text = json.dumps(describe_environment(), allow_nan=False)
    for private in (platform.node(), str(Path.home()), str(Path.cwd()), str(ROOT)):
        # A very short name occurs in words by chance.
        assert len(private) < 4 or private not in text
    assert len(getpass.getuser()) < 5 or getpass.getuser() not in text


@pytest.mark.parametrize(
    ("name", "value", "recorded"),
    [
        ("TF_ENABLE_ONEDNN_OPTS", "0", "0"),
        ("TF_NUM_INTEROP_THREADS", "2", "2"),
        ("KERAS_BACKEND", "tensorflow", "tensorflow"),
        ("CUDA_VISIBLE_DEVICES", "0,1", "0,1"),
        ("PYTHONHASHSEED", "0", "0"),
        (
            "XLA_FLAGS",
            "--a=1 --xla_dump_to=/home/eve/d --b=rel/c",
            "--a=1 --xla_dump_to=<path> --b=rel/c",
        ),
        ("XLA_FLAGS", "--d=gs://bucket/x,~/y", "--d=<path>,<path>"),
        ("TF_CPP_VLOG_FILENAME", "/home/Eve Doe/log", "<path>"),
        ("TF_CONFIG", '{"cluster": {"worker": ["host1:1234"]}}', None),
        ("TF_VAR_db_password", "hunter2", None),
        ("TF_TOKEN_app_terraform_io", "abc", None),
        ("TF_GPU_ACCESS_TOKEN", "abc", None),
        ("XLA_API_KEY", "abc", None),
        ("TPU_WORKER_HOSTNAMES", "host1,host2", None),
        ("AWS_SECRET_ACCESS_KEY", "abc", None),
        ("HOME", "/home/eve", None),
    ],
)
def test_variables(name, value, recorded):
    expected = {} if recorded is None else {name: recorded}
    assert relevant_variables({name: value}) == expected


def _git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_and_dirty_flag(tmp_path, monkeypatch):
    package = tmp_path / "vggrepro"
    package.mkdir()
    (package / "a.py").touch()
    assert environment._code(package)["commit"] is None  # no checkout
    _git(tmp_path, "init", "-q")
    assert environment._code(package)["commit"] is None  # nothing committed
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-qm", "one")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as inside a git hook
    clean = environment._code(package)
    assert (clean["commit"], clean["dirty"]) == (commit, False)
    (tmp_path / "notes.txt").touch()
    assert environment._code(package)["dirty"] is False
    (package / "b.py").touch()
    assert environment._code(package)["dirty"] is True


def test_a_package_inside_another_projects_checkout_has_no_commit(tmp_path):
    _git(tmp_path, "init", "-q")
    package = tmp_path / ".venv" / "site-packages" / "vggrepro"
    package.mkdir(parents=True)
    (package / "a.py").touch()
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-qm", "not ours")
    assert environment._code(package)["commit"] is None


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    code = environment._code(tmp_path / "vggrepro")
    assert (code["commit"], code["dirty"]) == (None, None)


def test_tensorflow_is_not_imported():
    code = (
        "import sys, vggrepro.environment as e, vggrepro.run_directory; e.describe_environment();"
    )
    code += "sys.exit('tensorflow' in sys.modules)"
    environment_variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment_variables).returncode == 0


def test_missing_tensorflow_says_what_to_install():
    error = missing_tensorflow_error()
    assert error.exit_code == 2
    for extra in ("cpu", "gpu", "tpu"):
        assert f"vggrepro[{extra}]" in error.remedy
    assert "\n" not in str(error)


def test_kernels_that_change_the_bits_are_told():
    """In a process of its own: determinism cannot be turned off again."""
    code = """
import json, tensorflow as tf
from vggrepro.environment import describe_environment, differences
before = describe_environment()
tf.config.experimental.enable_op_determinism()
after = describe_environment()
print(json.dumps([before["determinism"], after["determinism"], differences(before, after)]))
"""
    variables = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables
    )
    before, after, found = json.loads(done.stdout)
    assert before == {"onednn_kernels": False, "deterministic_ops": False}
    assert after == {"onednn_kernels": False, "deterministic_ops": True}
    assert found == ["deterministic ops: False when recorded, True now"]
