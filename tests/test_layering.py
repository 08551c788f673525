"""`diagnostics` never imports `vggrepro`, and light modules never import TensorFlow."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Imports every module of diagnostics while vggrepro cannot be found.
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules["vggrepro"] = None
import diagnostics
for module in pkgutil.walk_packages(diagnostics.__path__, "diagnostics."):
    importlib.import_module(module.name)
    print(module.name)
"""

LIGHT_MODULES = [
    "diagnostics.errors",
    "diagnostics.snapshot",
    "vggrepro.cli",
    "vggrepro.config",
    "vggrepro.environment",
    "vggrepro.hooks",
    "vggrepro.paper",
    "vggrepro.recipes",
    "vggrepro.run_directory",
]


def import_all(root: Path) -> subprocess.CompletedProcess:
    """Runs IMPORT_ALL with the packages of `root`."""
    return subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def imports_of(source: str) -> set[str]:
    """Top-level packages that a module imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_diagnostics_imports_without_vggrepro():
    done = import_all(ROOT)
    assert done.returncode == 0, done.stderr
    modules = {f"diagnostics.{file.stem}" for file in (ROOT / "diagnostics").glob("[!_]*.py")}
    assert modules and modules <= set(done.stdout.split())


def test_no_function_of_diagnostics_imports_vggrepro():
    files = list((ROOT / "diagnostics").rglob("*.py"))
    assert files
    assert [file for file in files if "vggrepro" in imports_of(file.read_text())] == []


@pytest.mark.parametrize(
    "violation", ["import vggrepro", "from vggrepro.config import TrainConfig"]
)
def test_a_planted_violation_is_seen(tmp_path, violation):
    for package in ("diagnostics", "vggrepro"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "vggrepro" / "config.py").write_text("TrainConfig = None\n")
    planted = tmp_path / "diagnostics" / "planted.py"
    planted.write_text("import sys\n")
    assert import_all(tmp_path).returncode == 0
    planted.write_text(violation + "\n")
    done = import_all(tmp_path)
    assert done.returncode != 0 and "vggrepro" in done.stderr
    assert "vggrepro" in imports_of(f"def late():\n    {violation}\n")


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_modules_do_without_tensorflow(module):
    code = (
        "import sys; sys.modules['tensorflow'] = sys.modules['keras'] = None; "
        f"import importlib; importlib.import_module({module!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
