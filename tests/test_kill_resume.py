"""SIGKILL at random moments of a real run: the same bits as if never stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from small_runs import run_outcome, tiny_data

KILLS = 20


def test_twenty_kills_leave_no_trace_in_the_bits(tmp_path):
    data = tiny_data(tmp_path)
    script = Path(__file__).with_name("kill_loop.py")
    done = subprocess.run(
        [sys.executable, str(script), str(data), str(tmp_path), str(KILLS), "20"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["kills"] >= KILLS
    # Else the kills came before anything could be lost, and the test shows nothing.
    assert len(set(said["resumed_from"]) - {"none"}) >= 3, said
    expected = run_outcome(tmp_path / "whole")
    for number in range(said["runs"]):
        assert run_outcome(tmp_path / f"run-{number}") == expected
