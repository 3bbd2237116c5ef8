"""Random bad inputs: no traceback, no internal error, no hang, and no file of the user's touched.

`CAMPAIGN=500 pytest tests/cli/test_campaign.py` takes 500 of them, from seed 0 on;
`CAMPAIGN=317-317` one.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from cli.bad_world import World, snapshot, told
from cli.campaign import bad_input
from errors import is_internal
from time_limit import time_limit
from tunesmith.cli.main import main
from warm import run_warm

pytestmark = pytest.mark.slow

SECONDS = 120  # a hang
FIRST, _, LAST = os.environ.get("CAMPAIGN", "60").rpartition("-")
SEEDS = range(int(FIRST or 0), int(LAST) + bool(FIRST))
AS_PROCESS = [seed for seed in SEEDS if seed % 30 == 7]


def owned(path: str) -> bool:
    """Whether a run may write there."""
    return path == "run" or path.startswith(("run/", "run.previous-"))


def assert_told(
    words: list[str], code: int, err: str, before: dict[str, str], after: dict[str, str]
) -> None:
    shown = f"{words}\n{err}"[-4000:]
    assert not is_internal(err), shown
    assert "unexpected" not in err, shown
    assert code in (0, 1, 2), shown
    parts = told(err)
    assert code == 0 or (parts.get("error") and parts.get("fix")), shown
    assert max(map(len, parts.values()), default=0) < 2001, "an error is read by people"
    kept = (
        before
        if code == 2
        else {name: content for name, content in before.items() if not owned(name)}
    )
    after = (
        after
        if code == 2
        else {name: content for name, content in after.items() if not owned(name)}
    )
    assert after == kept, shown


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_input(
    seed: int, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    words = bad_input(seed, world)
    before = snapshot(world.folder)
    capsys.readouterr()
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")  # as the stream of a process
    with time_limit(SECONDS):
        code = main(words)
    assert_told(words, code, capsys.readouterr().err, before, snapshot(world.folder))


@pytest.mark.parametrize("seed", AS_PROCESS)
def test_a_bad_input_of_a_process(seed: int, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    words = bad_input(seed, world)
    if any("\0" in word for word in words):
        pytest.skip("no shell can pass this word")
    before = snapshot(world.folder)
    done = run_warm(words)
    assert_told(words, done.returncode, done.stderr, before, snapshot(world.folder))


def test_the_seeds_spoil_what_they_should(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same seed makes the same input, and the seeds of a run differ."""
    made = []
    for seed in (3, 3, 4):
        folder = tmp_path_factory.mktemp("same")
        words = bad_input(seed, World(folder, world.tiny, world.template))
        made.append((" ".join(words).replace(str(folder), ""), sorted(snapshot(folder))))
    assert made[0] == made[1] != made[2]
    assert isinstance(Path.cwd(), Path)
