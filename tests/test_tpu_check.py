"""Compiling the training step for a TPU that is not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tensorflow as tf
from jax_devices import eight_virtual_devices
from small_runs import tiny_config, tiny_network
from tensorflow.python.framework import config as tensorflow_config

from diagnostics.errors import InputError
from vggrepro import cli, step_core
from vggrepro.compiler_message import explained
from vggrepro.config import ARCHITECTURES
from vggrepro.tpu_compile import TpuCompiler

SMALL = ["--width", "0.05", "--image-size", "32", "--classes", "3", "--batch-size", "16"]


@pytest.fixture(scope="module")
def compiler():
    eight_virtual_devices()
    tensorflow_config.disable_op_determinism()  # nothing is lowered under it
    return TpuCompiler("v3:2x2")


def held_weights(memory, network):
    """Bytes of the weights, once it is seen that the step holds them and their momentum."""
    weights = 4 * network.parameter_count()
    assert memory["arguments"] >= 2 * weights
    assert 2 * weights <= memory["aliased"] <= memory["outputs"]
    return weights


@pytest.mark.slow  # net A is compiled below as well
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_step_of_every_net_compiles_for_eight_cores(compiler, arch):
    config = tiny_config(arch=arch, batch_size=16)
    found = compiler.compile(config, tiny_network(config))
    assert found.problem is None
    assert (found.replicas, found.rows) == (8, 2)
    assert found.flops > 0
    assert found.bytes_accessed > held_weights(found.hbm_bytes, tiny_network(config))


def test_the_command_answers_in_json(compiler, capsys):
    assert cli.main(["tpu-check", "--topology", "v3:2x2", "--json", *SMALL]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["compiles"] and answer["topology"] == "v3:2x2"
    memory = answer["hbm_bytes"]
    assert answer["hbm_available"] == 16 * 2**30 > memory["total"] > 0
    assert answer["bytes_accessed"] > held_weights(memory, tiny_network(tiny_config()))
    assert answer["largest_batch"] is None and answer["flops"] > 0
    assert answer["kernels"] == "CPU"  # of this TensorFlow


@pytest.mark.parametrize("there", [True, False])
def test_a_tensorflow_with_tpu_kernels_lowers_through_them(compiler, monkeypatch, there):
    from vggrepro import jax_step

    replaced = []
    monkeypatch.setattr(jax_step, "has_tpu_kernels", lambda: there)
    monkeypatch.setattr(
        jax_step.mlir, "register_lowering", lambda *_, platform: replaced.append(platform)
    )
    jax_step._choose_lowering_for_tpus.__wrapped__()
    assert replaced == ([] if there else ["tpu"])


@pytest.mark.parametrize(
    ("fitting", "known", "room", "compilations"),
    [(88, 8, 88, 4), (88, 8, 100, 3), (88, 8, 40, 7), (88, 8, 400, 8), (88, 200, 88, 5)]
    + [(8, 8, 24, 2), (0, 8, 8, 1), (88, 2, 88, 5)],
)
def test_the_largest_batch_was_compiled_and_so_was_the_next(
    compiler, monkeypatch, fitting, known, room, compilations
):
    """In rows a device: what fits, what was compiled before, what the memory promises."""
    config = tiny_config(batch_size=8)
    tried = {}

    def answer(rows):
        memory = {"temporaries": rows, "total": rows}
        return Answer(rows, rows <= fitting, memory, hbm_available=room)

    monkeypatch.setattr(compiler, "compile", lambda config, network: answer(config.batch_size // 8))
    largest = compiler.largest_batch(
        config,
        tiny_network(config),
        answer(known),
        lambda found: tried.update({found.rows: found.compiles}),
    )
    assert largest == 8 * fitting
    assert tried[fitting + 8] is False
    assert fitting in (0, known) or tried[fitting]
    assert len(tried) == compilations


class Answer(NamedTuple):
    rows: int
    compiles: bool
    hbm_bytes: dict[str, int]
    hbm_available: int


def test_a_step_that_does_not_compile_is_explained_by_op_and_line(compiler, monkeypatch):
    """One op that XLA lacks, one that it has and the TPU's compiler refuses."""
    config = tiny_config(batch_size=16)
    network = tiny_network(config)

    def correct_with(spoiler):
        def correct(logits, labels):
            return spoiler(logits), tf.constant(0.0)

        monkeypatch.setattr(step_core, "_correct", correct)
        return compiler.compile(config, network).problem

    line = next(
        number
        for number, text in enumerate(Path(step_core.__file__).read_text().splitlines(), 1)
        if "= _correct(" in text
    )
    place = f"at vggrepro/step_core.py:{line} in loss_and_gradients"
    as_text = correct_with(lambda x: tf.strings.to_number(tf.strings.as_string(x[0, 0])))
    assert as_text == f"XLA has no kernel for op AsString {place}"
    double = correct_with(
        lambda x: tf.cast(tf.math.abs(tf.signal.fft(tf.cast(x, tf.complex128)))[0, 0], tf.float32)
    )
    assert "Unexpected operand type for FFT" in double and double.endswith(f"op FFT {place}")


@pytest.mark.parametrize(
    ("message", "needs"),
    [
        ("Ran out of memory. Used 20.01G of 15.48G hbm. Exceeded", "20.01G"),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (55.86G) exceeds available HBM (15.48G). HLO "
            "module: jit__replica.",
            "55.86G of temporaries",
        ),
    ],
)
def test_what_does_not_fit_is_explained_by_its_memory(message, needs):
    expected = f"out of memory: needs {needs}, a device offers 15.48G"
    assert explained(message, list) == expected


def test_the_place_is_the_innermost_line_of_this_project():
    message = (
        "Detected unsupported operations: No registered 'Foo' OpKernel\n"
        'File "/home/me/vggrepro/vggrepro/model.py", line 7, in forward\n'
        'File "/home/me/vggrepro/.venv/lib/site-packages/jax/core.py", line 9, in bind\n'
    )
    expected = "XLA has no kernel for op Foo at vggrepro/model.py:7 in forward"
    assert explained(message, list) == expected


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
