"""Compiling the training step for a TPU that is not there."""

from __future__ import annotations

import json
import sys

import pytest
from jax_devices import eight_virtual_devices
from small_runs import tiny_config, tiny_network
from tensorflow.python.framework import config as tensorflow_config

from diagnostics.errors import InputError
from vggrepro import cli
from vggrepro.config import ARCHITECTURES
from vggrepro.tpu_compile import TpuCompiler, explained

SMALL = ["--width", "0.05", "--image-size", "32", "--classes", "3", "--batch-size", "16"]


@pytest.fixture(scope="module")
def compiler():
    eight_virtual_devices()
    tensorflow_config.disable_op_determinism()  # nothing is lowered under it
    return TpuCompiler("v3:2x2")


@pytest.mark.parametrize(
    "arch", ["A", *(pytest.param(one, marks=pytest.mark.slow) for one in ARCHITECTURES[1:])]
)
def test_the_step_of_every_net_compiles_for_eight_cores(compiler, arch):
    config = tiny_config(arch=arch, batch_size=16)
    found = compiler.compile(config, tiny_network(config))
    assert found.problem is None
    assert (found.replicas, found.rows) == (8, 2)
    weights = 4 * tiny_network(config).parameter_count()
    assert found.hbm_bytes["arguments"] >= 2 * weights  # weights and momentum
    assert 2 * weights <= found.hbm_bytes["aliased"] <= found.hbm_bytes["outputs"]
    assert found.flops > 0 and found.bytes_accessed > weights


def test_the_command_answers_in_json(compiler, capsys):
    assert cli.main(["tpu-check", "--topology", "v3:2x2", "--json", *SMALL]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["compiles"] and answer["topology"] == "v3:2x2"
    assert answer["hbm_available"] == 16 * 2**30 > answer["hbm_bytes"]["total"] > 0
    assert answer["largest_batch"] is None and answer["flops"] > 0


def test_a_batch_that_does_not_fit_is_an_answer(compiler):
    """The largest batch lies between one that fits and the next, which does not."""
    config = tiny_config(batch_size=8)
    compiler.compile = lambda config, network: Answer(config.batch_size <= 8 * 8 * 11)
    try:
        tried = []
        assert compiler.largest_batch(config, tiny_network(config), tried.append) == 8 * 8 * 11
    finally:
        del compiler.compile
    assert len(tried) <= 8


class Answer:
    def __init__(self, compiles):
        self.compiles = compiles


def test_a_message_becomes_one_line():
    message = "RESOURCE_EXHAUSTED: ... Ran out of memory. Used 20.01G of 15.48G hbm. Exceeded"
    assert explained(message) == "out of memory: needs 20.01G of 15.48G HBM a device"
    message = (
        'Error compiling\nFile "/home/me/python/vggrepro/model.py", line 7, in forward\n'
        "No registered 'Foo' OpKernel"
    )
    assert explained(message) == "Error compiling (at vggrepro/model.py:7)"


@pytest.mark.parametrize("topology", ["v9:2x2", "v3", "v3:two", "2x2"])
def test_an_unknown_topology_is_bad_usage(topology):
    with pytest.raises(InputError, match="unknown TPU topology"):
        TpuCompiler(topology)


def test_a_batch_must_divide_over_the_cores(compiler):
    config = tiny_config(batch_size=12)
    with pytest.raises(InputError, match="batch size 12 does not divide over 8 devices"):
        compiler.compile(config, tiny_network(config))


def test_a_missing_compiler_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert cli.main(["tpu-check", "--topology", "v3:2x2"]) == 2
    assert "vggrepro[tpu-check]" in capsys.readouterr().err
