"""Tab completion in real shells: what a user types, a tab, and what then stands on the line."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tunesmith.cli.completion import FUNCTIONS
from tunesmith.cli.main import VERBS, main
from tunesmith.config.names import keys
from tunesmith.config.schema import is_section
from tunesmith.config.shipped import shipped

# typed before the tab -> what is offered, in part
OFFERED = {
    "tunesmith ": [verb for verb in VERBS if " " not in verb],
    "tunesmith launch ": ["local", "swarm", "slurm"],
    "tunesmith launch local --de": ["--detach"],
    "tunesmith train --f": ["--fresh"],
    "tunesmith train smoll": ["smollm2-135m-full", "smollm2-135m-lora"],
    "tunesmith train mi": ["mine.yaml", "mistral-7b-lora"],
    "tunesmith train mine.yaml train.le": ["train.learning_rate="],
    "tunesmith train mine.yaml train.seed=3 train.cl": ["train.clip_norm="],
    "tunesmith recipes ": ["list", "show", "copy"],
    "tunesmith recipes show qw": ["qwen3-8b-lora", "qwen3.5-9b-lora"],
    "tunesmith generate ru": ["runs"],
    "tunesmith generate runs --input ro": ["rows.jsonl"],
    "tunesmith generate runs --format sh": ["sharegpt"],
    "tunesmith completion f": ["fish"],
}
NOT_OFFERED = {
    "tunesmith train mi": "rows.jsonl",
    "tunesmith generate ru": "train",
    "tunesmith train --f": "--json",
}
# what a tab makes of it, where one thing alone is offered; a key has no space behind it, all else
# has
COMPLETED = {
    "tunesmith comple": "tunesmith completion ",
    "tunesmith train mine.yaml train.le": "tunesmith train mine.yaml train.learning_rate=",
    "tunesmith train mine.yaml data.train.source=ro": "tunesmith train mine.yaml data.train.source=rows.jsonl",
    "tunesmith recipes show qwen3-8b-l": "tunesmith recipes show qwen3-8b-lora ",
    "tunesmith train mine.yaml --fre": "tunesmith train mine.yaml --fresh ",
}


def needs(shell: str) -> str:
    return shutil.which(shell) or pytest.skip(f"there is no {shell} here")


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """A folder with a recipe, rows, runs, and the script of each shell in `bash`, `zsh` and `fish`."""
    for name in FUNCTIONS:
        assert main(["completion", name]) == 0
        (tmp_path / name).write_text(capsys.readouterr().out)
    for name in ("mine.yaml", "rows.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shell", FUNCTIONS)
def test_the_script_parses_and_names_all(shell: str, place: Path) -> None:
    text = (place / shell).read_text()
    leaves = [f"{key}=" for key, (_, hint) in keys().items() if not is_section(hint)]
    assert [
        word for word in (*" ".join(VERBS).split(), *shipped(), *leaves) if word not in text
    ] == []
    subprocess.run([needs(shell), "-n", shell], check=True, timeout=60)


# Words end with |
BASH = """source ./bash; compopt() { :; }
name=$(complete -p tunesmith); name=${name##*-F }; name=${name% tunesmith}
while IFS='|' read -r -a COMP_WORDS; do
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); COMPREPLY=(); $name; printf '%s\\n' "${COMPREPLY[@]}"; echo ----
done"""
FISH = 'source ./fish; while read -l line; complete -C "$line"; echo ----; end'


@pytest.mark.parametrize(
    ("shell", "program"), [("bash", ["--norc", "-c", BASH]), ("fish", ["--no-config", "-c", FISH])]
)
def test_a_shell_offers(shell: str, program: list[str], place: Path) -> None:
    """In bash by the function that it would call, with the words as bash parts them."""
    lines = "".join(f"{line}\n" for line in OFFERED)
    if shell == "bash":
        words = (re.findall(r"=|[^\s=]+", line) + [""] * line.endswith(" ") for line in OFFERED)
        lines = "".join("".join(f"{word}|" for word in line) + "\n" for line in words)
    command = [needs(shell), *program]
    done = subprocess.run(
        command, input=lines, capture_output=True, text=True, check=True, timeout=60
    )
    *shown, _ = done.stdout.split("----\n")
    for (line, wanted), text in zip(OFFERED.items(), shown, strict=True):
        offered = {row.partition("\t")[0].rstrip("/") for row in text.splitlines()}
        assert {*wanted} <= offered, line
        assert NOT_OFFERED.get(line) not in offered, line


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_tab_completes_the_line(shell: str, place: Path) -> None:
    """In an interactive shell at a terminal, as it is used."""
    start = [needs(shell), *{"bash": ["--norc", "-i"], "zsh": ["-f", "-i"]}[shell]]
    ready = {
        "bash": "source ./bash",
        "zsh": "cp zsh _tunesmith; fpath=($PWD $fpath); autoload -U compinit && compinit -u -D",
    }[shell]
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(
            start[0],
            start,
            {**os.environ, "PS1": "$ ", "TERM": "dumb", "COLUMNS": "200", "INPUTRC": "/dev/null"},
        )
    try:
        read_until(terminal, "$ ")
        os.write(terminal, f"{ready}; echo ready-$((1+1))\n".encode())
        read_until(terminal, "ready-2")
        for line, wanted in COMPLETED.items():
            os.write(terminal, f"{line}\t".encode())
            shown = read_until(terminal, wanted.rstrip())
            # ctrl-U empties the line
            os.write(terminal, b"\x15\x15" if shell == "bash" else b"\x15")
            assert wanted.rstrip() in shown, (line, shown)
    finally:
        os.write(terminal, b"\x15exit\n")
        os.close(terminal)
        os.waitpid(child, 0)


def read_until(terminal: int, wanted: str, seconds: float = 20.0) -> str:
    """What a terminal shows until `wanted` is in it, with nothing on the way that moves the cursor."""
    shown, end = "", time.monotonic() + seconds
    while wanted not in shown and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
            shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x07\x08\r]", "", shown)
    return shown
