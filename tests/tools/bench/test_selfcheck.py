"""`tunesmith selfcheck`: it passes here, and says what it found; `test_broken_builds.py` breaks it."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from errors import error_in, holds
from invoke import invoke
from tunesmith.parallel.mesh import MeshShape
from tunesmith.tools.bench.cli_selfcheck import print_row, verdict
from tunesmith.tools.bench.selfcheck import TRAINING_KINDS, CheckRow, meshes_of
from warm import fork_ranks, run_warm


@pytest.mark.slow
@pytest.mark.nightly
def test_two_ranks_that_it_starts_pass():
    done = run_warm(["selfcheck", "--ranks", "2", "--json"], prepare=fork_ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["passed"], report["ranks"]) == (True, 2)
    meshes = {row["check"].rpartition(": ")[0] for row in report["checks"] if row["mesh"]}
    shapes = [MeshShape(*size).describe() for size in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))]
    assert {f"{kind}, {shape}" for kind in TRAINING_KINDS for shape in shapes} == meshes


@pytest.mark.parametrize(
    ("world", "node", "expected"),
    [
        (3, 3, [(3, 1, 1), (1, 3, 1)]),
        (4, 4, [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]),
        (2, 1, [(2, 1, 1), (1, 2, 1)]),  # no tensor group over nodes
        (16, 8, [(16, 1, 1), (2, 8, 1), (1, 16, 1), (2, 1, 8), (2, 2, 4), (1, 2, 8)]),
    ],
)
def test_it_takes_a_mesh_of_each_kind(world, node, expected):
    # The fourth dimension is of mixtures alone.
    assert [shape[:3] for shape in meshes_of(world, node)] == expected


def a_row(mesh: MeshShape, passed: bool, **more: Any) -> CheckRow:
    figures = {"step": None, "expected": "1", "found": "2", "tolerance": "", "meaning": ""}
    return CheckRow(check="lora: loss", mesh=mesh, passed=passed, **figures | more)


def test_a_failed_check_says_where_what_and_what_to_do(capsys):
    more = {"step": 3, "expected": "2.5", "found": "2.75", "tolerance": "1e-04", "meaning": "cut"}
    rows = [a_row(MeshShape(tensor=2), False, **more), a_row(MeshShape(2), True)]
    print_row(rows[0])
    table, meaning = capsys.readouterr().out.splitlines()
    assert table.split() == ["lora:", "loss", "step", "3", "2.5", "2.75", "1e-04", "FAIL"]
    assert meaning == "  cut"
    report = {"passed": False, "ranks": 2, "hosts": ["a"], "device": "CPU", "seconds": 9.0}
    first, fix = verdict(report | {"checks": rows}).splitlines()
    assert holds(first, "1 of 2", "2 ranks", "9 s")
    assert holds(fix, "parallel", "tunesmith selfcheck --json")


def test_ranks_that_cannot_start_are_reported(monkeypatch):
    """What torchrun prints of it is a traceback."""
    stderr = "W1121 torch\nerror: the disk is full\n  fix: make room\nTraceback (most recent call last):\n  File"
    done = subprocess.CompletedProcess([], 1, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: done)
    shown = invoke("selfcheck", "--ranks", "2")
    assert (shown.code, "Traceback" in shown.err) == (1, False)
    assert error_in(shown.err).why == stderr.splitlines()[1].removeprefix("error: ")


def test_ranks_that_are_there_are_not_started_again(monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    shown = invoke("selfcheck", "--ranks", "2")
    assert shown.code == 2
    assert holds(shown.err, "--ranks", "torchrun")
