"""Whatever is wrong before the first step: an exit code, what, where and a fix; and nothing is
touched.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import playbook
from cli.bad_table import ALL
from cli.bad_world import Case, World, snapshot, told
from errors import check_shown, is_internal
from tunesmith.cli.main import main
from tunesmith.errors import EXIT_USAGE
from warm import run_warm

pytestmark = pytest.mark.slow

BY_NAME = {str(case): case for case in ALL}
AS_PROCESS = ("recipe: unknown key", "model: cut-off weights", "script: no such data")


def call(words: list[str]) -> int:
    """A command line, by its script's name or by the verb of `tunesmith`."""
    return playbook.main(words[0], words[1:]) if words[0] in playbook.SCRIPTS else main(words)


def assert_told(
    case: Case, world: World, before: dict[str, str], code: int, out: str, err: str
) -> None:
    parts = told(err)
    assert code == case.code, err
    assert parts["error"], err
    assert parts["fix"], err
    assert case.where in parts.get("where", ""), err
    message = " ".join(text for name, text in parts.items() if name != "where")
    assert [fact for fact in case.facts if fact not in message] == [], err
    assert not is_internal(err)
    # What these show is their answer
    report = case.kind == "script" or case.name.startswith("data verb, nothing")
    assert report or out == ""
    assert snapshot(world.folder) == before


@pytest.mark.parametrize("case", ALL, ids=str)
def test_bad_input(
    case: Case, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    words = case.make(world)
    before = snapshot(world.folder)
    capsys.readouterr()
    code = call(words)
    assert_told(case, world, before, code, *capsys.readouterr())


@pytest.mark.parametrize("case", [BY_NAME[name] for name in AS_PROCESS], ids=str)
def test_bad_input_of_a_process(case: Case, world: World) -> None:
    words = case.make(world)
    before = snapshot(world.folder)
    script = Path(__file__).parents[2] / "scripts" / f"{words[0]}.py"
    if script.exists():
        done = run_warm(words[1:], program=script)
    else:
        done = run_warm(words)
    assert_told(case, world, before, done.returncode, done.stdout, done.stderr)


def test_a_seq_len_beyond_the_model_s_positions(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything starts by `train`, `data` and `plan`, with the largest seq_len."""
    rows = '{"prompt": "a", "completion": "b"}\n'
    train, *words = world.rows("rows.jsonl", rows, seq_len=2049)
    for verb in ([train], ["data"], ["plan", "--on", "h100"]):
        assert main([*verb, *words]) == EXIT_USAGE
        check_shown(
            capsys.readouterr().err,
            where="data.seq_len",
            names=["2,049", "2,048"],
            fix=["data.seq_len=2048"],
        )
    assert not world.out.exists()
