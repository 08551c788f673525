"""The notebook for Kaggle: a valid document, whose commands and options exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from diagnostics.errors import InputError
from vggrepro.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = json.loads((ROOT / "examples" / "kaggle_tpu.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
# What the names of the notebook may stand for.
VALUES = {
    "{ILSVRC}": "/kaggle/input/imagenet-object-localization-challenge",
    "{DATA}": "synthetic",
    "{RECIPE}": "small-A-256",
    "{BATCH}": "32",
    "{STEPS}": "200",
    "{STEPS + 20}": "220",
}


def _joined():
    """All code, each command on one line."""
    return "\n".join(CODE).replace("\\\n", "")


def commands(name):
    """The arguments of every line '!NAME ...', with values for its Python names."""
    found = []
    for line in re.findall(rf"^ *!{name} (.*?)(?:;|$)", _joined(), re.MULTILINE):
        for key, value in VALUES.items():
            line = line.replace(key, value)
        assert "{" not in line, f"no value for a name in: {line}"
        found.append(shlex.split(line))
    return found


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert set(NOTEBOOK) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    identities = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(identities)) == len(identities)
    for cell in NOTEBOOK["cells"]:
        fields = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            fields |= {"outputs", "execution_count"}
        assert set(cell) == fields
        assert all(isinstance(line, str) for line in cell["source"])


def test_every_cell_is_python_but_for_its_commands():
    for cell in CODE:
        ast.parse(re.sub(r"^( *)[!%](.*\\\n)*.*", r"\1pass", cell, flags=re.MULTILINE))


def test_every_command_is_one_of_ours():
    lines = commands("vggrepro")
    parser = build_parser()
    done = {line[0] for line in lines}
    assert done == {"--version", "train", "data", "diagnose-nan", "evaluate", "compare"}
    for line in lines:
        if line != ["--version"]:
            parser.parse_args(line)
    with pytest.raises(InputError, match="--no-such-option"):
        parser.parse_args([*lines[-1], "--no-such-option"])


def test_the_commands_of_the_page_on_hardware_are_ours():
    page = (ROOT / "docs" / "hardware.md").read_text()
    lines = re.findall(r"^    vggrepro ([^#\n]+)", page, re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        build_parser().parse_args(shlex.split(line))


def test_the_install_line_names_an_extra_that_exists():
    ((_, _, wanted),) = [line for line in commands("pip") if line[0] == "install"]
    extra = re.fullmatch(r"\./vggrepro-source\[(\w+)\]", wanted)[1]
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
