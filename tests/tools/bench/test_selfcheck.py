"""`tunesmith selfcheck`: it passes here, and says what it found; `test_broken_builds.py` makes it
fail.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from errors import error_in, holds
from recipes import recipe
from tunesmith.cli.main import main
from tunesmith.config.dump import to_yaml
from tunesmith.parallel.mesh import MeshShape
from tunesmith.tools.bench.cli_selfcheck import print_row, verdict
from tunesmith.tools.bench.selfcheck import TRAINING_KINDS, CheckRow, meshes_of
from warm import fork_ranks, run_warm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def commands_of_the_page() -> list[list[str]]:
    """The commands of docs/ranks.md in blocks without a language; those for two machines are `sh`."""
    page = (ROOT / "docs/ranks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S)
    return [
        shlex.split(line)
        for language, block in blocks
        if not language
        for line in block.splitlines()
    ]


def test_two_ranks_that_it_starts_pass():
    words = next(
        words for words in commands_of_the_page() if words[:2] == ["tunesmith", "selfcheck"]
    )
    done = run_warm([*words[1:], "--json"], prepare=fork_ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["passed"], report["ranks"]) == (True, 2)
    meshes = {row["check"].rpartition(": ")[0] for row in report["checks"] if row["mesh"]}
    shapes = [MeshShape(*size).describe() for size in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))]
    assert {f"{kind}, {shape}" for kind in TRAINING_KINDS for shape in shapes} == meshes


@pytest.mark.parametrize(
    ("world", "node", "expected"),
    [
        (1, 1, [(1, 1, 1)]),
        (3, 3, [(3, 1, 1), (1, 3, 1)]),
        (4, 4, [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]),
        (8, 8, [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2), (1, 2, 4), (1, 1, 8)]),
        (2, 1, [(2, 1, 1), (1, 2, 1)]),  # no tensor group over nodes
        (16, 8, [(16, 1, 1), (2, 8, 1), (1, 16, 1), (2, 1, 8), (2, 2, 4), (1, 2, 8)]),
    ],
)
def test_it_takes_a_mesh_of_each_kind(world, node, expected):
    # The fourth dimension is of mixtures alone.
    assert [shape[:3] for shape in meshes_of(world, node)] == expected


def a_row(check: str, mesh: MeshShape | None, passed: bool, **more: Any) -> CheckRow:
    figures = {"step": None, "expected": "1", "found": "2", "tolerance": "", "meaning": ""}
    return CheckRow(check=check, mesh=mesh, passed=passed, **figures | more)


def test_a_failed_check_says_where_what_and_what_to_do(capsys):
    tensor, copy = MeshShape(tensor=2), MeshShape(2)
    more = {
        "step": 3,
        "expected": "2.5",
        "found": "2.75",
        "tolerance": "1e-04",
        "meaning": "layers are cut wrongly",
    }
    rows = [
        a_row("lora: loss", tensor, False, **more),
        a_row("lora: loss", copy, True),
    ]
    print_row(rows[0])
    table, meaning = capsys.readouterr().out.splitlines()
    assert table.split() == ["lora:", "loss", "step", "3", "2.5", "2.75", "1e-04", "FAIL"]
    assert meaning == f"  {more['meaning']}"
    report = {"passed": False, "ranks": 2, "hosts": ["a"], "device": "CPU", "seconds": 9.0}
    said = verdict(report | {"checks": rows})
    first, fix = said.splitlines()
    assert holds(first, "1 of 2", "2 ranks", "9 s")
    assert holds(fix, "parallel", "tunesmith selfcheck --json")


def test_the_page_trains_on_two_ranks(tiny, tmp_path):
    (words,) = [words for words in commands_of_the_page() if words[0] == "torchrun"]
    (tmp_path / "my-recipe.yaml").write_text(
        to_yaml(recipe(tiny, tmp_path, train={"duration": "2 steps"}))
    )
    done = run_warm(words[1:], program="torch.distributed.run", prepare=fork_ranks, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert (env["mesh"]["replicate"], (tmp_path / "run" / "final").is_dir()) == (2, True)


def test_ranks_that_cannot_start_are_reported(monkeypatch, capsys):
    """What torchrun prints of it is a traceback."""
    stderr = "W1121 torch\nerror: the disk is full\n  fix: make room\nTraceback (most recent call last):\n  File"
    done = subprocess.CompletedProcess([], 1, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: done)
    assert main(["selfcheck", "--ranks", "2"]) == 1
    said = capsys.readouterr().err
    assert error_in(said).why == stderr.splitlines()[1].removeprefix("error: ")
    assert "Traceback" not in said


def test_ranks_that_are_there_are_not_started_again(monkeypatch, capsys):
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["selfcheck", "--ranks", "2"]) == 2
    assert holds(capsys.readouterr().err, "--ranks", "torchrun")
