"""Bad inputs: an exit code, the place, a fix, no traceback, and no file of the user's touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.bad_inputs import REFUSED, bad_folder
from cli.bad_world import snapshot
from errors import check_shown, is_internal, refuses
from invoke import invoke
from tunesmith.cli.main import dispatch
from tunesmith.errors import EXIT_USAGE


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with bad_folder(tmp_path_factory.mktemp("bad"), tiny) as made:
        yield made


@pytest.mark.parametrize("command", REFUSED)
def test_a_bad_input_is_refused_at_its_place(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    kind, where, fix = REFUSED[command]
    before = snapshot(folder)
    with refuses(kind, where=str(folder) if where == "FOLDER" else where, fix=fix) as refused:
        dispatch(command.split())
    assert refused.value.exit_code == EXIT_USAGE
    assert refused.value.fix
    assert snapshot(folder) == before


# Commands whose options are checked by a module that imports torch
LOAD_TORCH = {
    "eval adapter --data held.jsonl --score exact --top-p 0.9",
    "generate adapter --input held.jsonl --output taken/o.jsonl",
    "generate adapter --input held.jsonl --output - --top-p 0.5",
    "generate adapter --input held.jsonl --output - --temperature -1",
}
CHILD = """
import contextlib, io, json, sys
from tunesmith.cli.main import main
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue(), "torch" in sys.modules]))
"""


@pytest.mark.slow
def test_a_fault_of_files_is_told_without_torch(folder: Path) -> None:
    """By the command line: the rows of the table in one process."""
    assert REFUSED.keys() > LOAD_TORCH
    commands = [command for command in REFUSED if command not in LOAD_TORCH]
    lines = "\n".join(json.dumps(command.split()) for command in commands)
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=lines, cwd=folder, capture_output=True, text=True,
        check=True, env=os.environ,
    )  # fmt: skip
    for command, line in zip(commands, done.stdout.splitlines(), strict=True):
        code, out, err, has_torch = json.loads(line)
        assert (code, out, has_torch) == (EXIT_USAGE, "", False), command
        assert not is_internal(err)
        _, where, fix = REFUSED[command]
        check_shown(err, where=str(folder) if where == "FOLDER" else where, fix=fix)


# Faults that a tokenizer shows, with the place that is told
TOKEN_FAULTS = {
    "data.hold_out=20 examples": "data.hold_out",
    "data.seq_len=1000000": "data.seq_len",
    "data.seq_len=16; data.too_long=truncate": "rows.jsonl",
}


@pytest.mark.parametrize("overrides", TOKEN_FAULTS)
@pytest.mark.slow
def test_a_fault_of_tokens_is_told_before_the_model_is_built(
    overrides: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "tunesmith.training.session.build_model", lambda *_, **__: pytest.fail("built")
    )
    done = invoke("train", "recipe.yaml", *overrides.split("; "))
    assert done.code == EXIT_USAGE
    check_shown(done.err, where=TOKEN_FAULTS[overrides])
    assert not (folder / "runs" / "new").exists()


@pytest.mark.parametrize(
    ("missing", "near"),
    [("nofile.csv", ""), ("hled.jsonl", "held.jsonl"), ("held.json", "held.jsonl")],
)
def test_only_a_near_name_is_proposed(
    missing: str, near: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    done = invoke("train", "--model", "demo", "--data", missing)
    check_shown(done.err, where=missing)
    assert (f"{near}?" in done.err) == bool(near)


def test_an_endless_word_is_not_told_in_full() -> None:
    done = invoke("train", "x" * 70_000)
    assert done.code == EXIT_USAGE
    assert max(map(len, done.err.splitlines())) < 2100
