"""`same_bits.py` finds a copy of what ranks and a sweep write equal, and names the smallest change."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import same_bits

import tunesmith
from warm import fork_ranks, run_python

ROOT = Path(tunesmith.__file__).parents[2]


def same_bits_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["same_bits.py", *map(str, words)])
    return same_bits.main()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of two ranks with shards, and of a sweep, whose processes are forked."""
    folder = tmp_path_factory.mktemp("same-bits") / "record"
    run = subprocess.run

    def forked(command: list[str], **options: Any) -> Any:
        if command[1] != "-m":
            return run(command, **options)
        return run_python(command, **options, prepare=fork_ranks)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(subprocess, "run", forked)
        # Two candidates show as much as four.
        few = {"sweep": ["train.learning_rate=1e-3,1e-2"]}
        monkeypatch.setattr(same_bits, "CANDIDATES", few)
        words = ["record", "--source", ROOT, "--output", folder, "--only", "shards", "sweep"]
        assert same_bits_command(monkeypatch, *words) == 0
    return folder


def change_loss(file: Path) -> None:
    lines = file.read_text().splitlines()
    step = json.loads(lines[1])
    lines[1] = json.dumps(step | {"loss": step["loss"] * (1 + 1e-12)})
    file.write_text("\n".join(lines) + "\n")


def change_best(file: Path) -> None:
    sweep = json.loads(file.read_text())
    file.write_text(json.dumps(sweep | {"best": sweep["best"] + "0"}))


def change_part(file: Path) -> None:
    """The last bit of one number of a weight, in what torch writes again, now as one process."""
    import torch
    import torch.distributed.checkpoint as dcp

    _, tensors = same_bits.read_parts(file.parent)
    name = next(n for n in tensors if n.startswith("model.") and n.endswith("norm.weight"))
    tensors[name].view(torch.uint8)[0] ^= 1
    for part in [file, *file.parent.glob("*.distcp")]:
        part.unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(tensors, checkpoint_id=file.parent, no_dist=True)


STATE = "checkpoint-4/state/.metadata"
CHANGES: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "loss": ("shards", "metrics.jsonl", change_loss, "step 2, loss: "),
    "state": ("shards", STATE, change_part, "norm.weight: 1 of 64 numbers differ"),
    "best": ("sweep", "sweep.json", change_best, "sweep.json: best: "),
    "lost": ("sweep", "sweep.json", Path.unlink, "sweep.json: in one of the two alone"),
}


@pytest.mark.nightly
@pytest.mark.parametrize("change", CHANGES)
def test_the_smallest_change_is_named(change, recorded, tmp_path, monkeypatch, capsys):
    recipe, pattern, apply, difference = CHANGES[change]
    copy = tmp_path / "copy"
    shutil.copytree(recorded, copy)
    words = ["compare", recorded, copy, "--only", recipe, "--show", "1000"]
    assert same_bits_command(monkeypatch, *words) == 0
    capsys.readouterr()
    apply(sorted((copy / recipe / "run").glob(pattern))[0])
    assert same_bits_command(monkeypatch, *words) == 1
    assert difference in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "texts", "apart"),
    [
        ("plans.json", [f'{{"a on h100": {{"room": {n}}}}}' for n in (1, 2)], ["a on h100.room: 1 | 2"]),
        ("help.txt", ["usage: a\n  -b\n", "usage: a\n  -c\n"], ["-  -b", "+  -c"]),
        ("help.txt", ["usage: a\n"] * 2, []),
    ],
)  # fmt: skip
def test_plans_and_help_pages_are_compared_by_key_and_line(name, texts, apart, tmp_path):
    files = [tmp_path / name, tmp_path / f"other-{name}"]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    assert same_bits.text_apart(*files) == apart
