"""A user's folder with a good small recipe and a run of it, for tests that spoil one of its parts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import error_in, is_internal
from invoke import invoke
from recipes import recipe
from tunesmith.config.dump import to_yaml
from tunesmith.errors import EXIT_OK, TunesmithError


@dataclass
class World:
    """A folder with rows and a good small recipe; `template` is that of `begun` of conftest.py."""

    folder: Path
    tiny: Path
    template: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def recipe(self, **changes: Any) -> Path:
        """Write the small recipe, with `changes` laid over it."""
        held = changes.pop("held", False)
        values = recipe(changes.pop("tiny", self.tiny), self.folder, held=held, **changes)
        return self.write("recipe.yaml", to_yaml(values))

    def train(self, *words: str, **changes: Any) -> list[str]:
        return ["train", str(self.recipe(**changes)), *words]

    def begun(self) -> Path:
        """Copy a run of four steps: checkpoint-2, checkpoint-4, final; its recipe beside it."""
        shutil.copytree(self.template, self.folder, dirs_exist_ok=True)
        for file in (self.folder / "recipe.yaml", self.out / "config.yaml"):
            file.write_text(file.read_text().replace(str(self.template), str(self.folder)))
        return self.out

    def again(self, *words: str) -> list[str]:
        """The same run with one more step: it goes on, if nothing is wrong."""
        return ["train", str(self.folder / "recipe.yaml"), "train.duration=5 steps", *words]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file, folder and link below `folder` with the hash of its content, but a lock's."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = os.fsencode(path.relative_to(folder)).decode(errors="replace")
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file() and path.name != ".lock":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not path.is_file():
            found[name] = "folder" if path.is_dir() else "special"
    return found


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def started(words: list[str]) -> tuple[int, TunesmithError, str]:
    """Run a command here: its exit code, the error that it told, and stderr."""
    done = invoke(*words)
    assert not is_internal(done.err), done.err
    assert done.code == EXIT_OK or done.out == ""
    told = error_in(done.err) if "error: " in done.err else TunesmithError("")
    return done.code, told, done.err
