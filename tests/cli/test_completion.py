"""Tab completion in real shells: what is offered for the words before a tab."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from invoke import invoke
from tunesmith.cli.completion import FUNCTIONS
from tunesmith.cli.main import VERBS
from tunesmith.config.names import keys
from tunesmith.config.schema import is_section
from tunesmith.config.shipped import shipped

# typed before the tab -> what is offered, in part
OFFERED = {
    "tunesmith ": [verb for verb in VERBS if " " not in verb],
    "tunesmith launch local --de": ["--detach"],
    "tunesmith train mi": ["mine.yaml", "mistral-7b-lora"],
    "tunesmith train mine.yaml train.seed=3 train.cl": ["train.clip_norm="],
    "tunesmith recipes show qw": ["qwen3-8b-lora", "qwen3.5-9b-lora"],
    "tunesmith generate ru": ["runs"],
    "tunesmith generate runs --input ro": ["rows.jsonl"],
}
NOT_OFFERED = {"tunesmith train mi": "rows.jsonl", "tunesmith generate ru": "train"}


def needs(shell: str) -> str:
    return shutil.which(shell) or pytest.skip(f"there is no {shell} here")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a recipe, rows, runs, and the script of each shell in `bash`, `zsh` and `fish`."""
    for name in FUNCTIONS:
        (tmp_path / name).write_text(invoke("completion", name).out)
    for name in ("mine.yaml", "rows.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    return tmp_path


@pytest.mark.parametrize("shell", FUNCTIONS)
def test_the_script_parses_and_names_all(shell: str, place: Path) -> None:
    text = (place / shell).read_text()
    leaves = [f"{key}=" for key, (_, hint) in keys().items() if not is_section(hint)]
    words = (*" ".join(VERBS).split(), *shipped(), *leaves)
    assert [word for word in words if word not in text] == []
    subprocess.run([needs(shell), "-n", shell], cwd=place, check=True, timeout=60)


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
        command, input=lines, cwd=place, capture_output=True, text=True, check=True
    )
    *shown, _ = done.stdout.split("----\n")
    for (line, wanted), text in zip(OFFERED.items(), shown, strict=True):
        offered = {row.partition("\t")[0].rstrip("/") for row in text.splitlines()}
        assert {*wanted} <= offered, line
        assert NOT_OFFERED.get(line) not in offered, line
