"""A user's folder in which one thing is wrong: files to spoil, commands to type, and what must be
true afterwards.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from errors import is_internal
from recipes import recipe
from tunesmith.cli.main import main
from tunesmith.config.dump import to_yaml
from tunesmith.errors import EXIT_OK, EXIT_USAGE

Capture = pytest.CaptureFixture[str]

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@dataclass
class World:
    """A folder with rows and a good small recipe; each method spoils a part, and returns its path
    or a command line.

    tiny: the good model. template: a folder with a run of four of eight steps (see `begun`).
    """

    folder: Path
    tiny: Path
    template: Path | None = None
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
        """The small recipe, with `changes` laid over it, as a file."""
        held = changes.pop("held", False)
        values = recipe(changes.pop("tiny", self.tiny), self.folder, held=held, **changes)
        return self.write("recipe.yaml", to_yaml(values))

    def train(self, *words: str, **changes: Any) -> list[str]:
        return ["train", str(self.recipe(**changes)), *words]

    def rows(
        self,
        name: str,
        content: str | bytes,
        format: str = "prompt-completion",  # noqa: A002
        **keys: Any,
    ) -> list[str]:
        """`train` on a file of exactly this content."""
        path = self.write(name, content)
        data = {"train": {"source": str(path), "format": format, **keys.pop("source", {})}, **keys}
        return self.train(data=data)

    def model(self, spoil: Callable[[Path], object]) -> Path:
        """A copy of the good model, spoilt."""
        folder = Path(shutil.copytree(self.tiny, self.folder / "model"))
        spoil(folder)
        return folder

    def spoilt(self, spoil: Callable[[Path], object], **changes: Any) -> list[str]:
        """`train` of a spoilt copy of the model."""
        return self.train(tiny=self.model(spoil), **changes)

    def begun(self) -> Path:
        """A copy of a run that took four of its steps: checkpoint-2, checkpoint-4, final; its
        recipe beside it.
        """
        assert self.template is not None
        shutil.copytree(self.template, self.folder, dirs_exist_ok=True)
        for file in (self.folder / "recipe.yaml", self.out / "config.yaml"):
            file.write_text(file.read_text().replace(str(self.template), str(self.folder)))
        return self.out

    def generate(self, content: str | bytes, *words: str) -> list[str]:
        """`generate` of the run of `begun` on a file of exactly this content."""
        return [
            "generate",
            str(self.begun()),
            "--input",
            str(self.write("b.jsonl", content)),
            "--output",
            "-",
            *words,
        ]

    def generate_to(self, output: Path, *words: str) -> list[str]:
        """`generate` of the run of `begun` on its held-out rows."""
        held = str(self.folder / "held.jsonl")
        return ["generate", str(self.begun()), "--input", held, "--output", str(output), *words]

    def evaluate(self, content: str, *words: str) -> list[str]:
        """`eval` of the run of `begun` on a file of exactly this content."""
        return ["eval", str(self.begun()), "--data", str(self.write("b.jsonl", content)), *words]

    def again(self, *words: str) -> list[str]:
        """The same run with twice the steps: it goes on, if nothing is wrong."""
        return ["train", str(self.folder / "recipe.yaml"), "train.duration=8 steps", *words]

    def script(self, *flags: str, name: str = "Llama3_8B_LoRA_finetuning") -> list[str]:
        """One of the four scripts on alpaca rows, at the smallest size."""
        rows = self.write(
            "alpaca.jsonl", '{"instruction": "Say a", "input": "", "output": "a"}\n' * 8
        )
        fixed = {"--model_name": str(self.tiny), "--data": str(rows), "--dtype": "float32", "--dataset_size": "8",
                 "--output_dir": str(self.out), "--log_dir": str(self.folder / "logs"), "--seq_length": "256"}  # fmt: skip
        for flag, value in zip(flags[::2], flags[1::2], strict=True):
            fixed[flag] = value
        return [name, *(word for pair in fixed.items() for word in pair)]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file, folder and link below `folder` with the hash of its content; a lock file is no
    content.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file() and path.name != ".lock":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir():
            found[name] = "folder"
    return found


class Case:
    """One bad input: what is typed, the exit code, the place that is named, and facts that the
    message holds.

    Args:
        make: spoils the world and returns the command line.
        where: a part of the place: a file with its line, a key, an option.
        facts: names, numbers, commands and options that the error, its reason or its fix must
            contain; no sentences.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        make: Callable[[World], list[str]],
        where: str,
        *facts: str,
        code: int = EXIT_USAGE,
    ) -> None:
        self.kind, self.name, self.make, self.where, self.facts, self.code = (
            kind,
            name,
            make,
            where,
            facts,
            code,
        )

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def told(err: str) -> dict[str, str]:
    """The block that a user reads, by its parts."""
    parts: dict[str, str] = {}
    for line in err.splitlines():
        for name in ("error", "where", "why", "cause", "fix"):
            if line.lstrip().startswith(f"{name}: "):
                parts[name] = line.split(": ", 1)[1]
    return parts


def records(folder: Path) -> Iterator[dict[str, Any]]:
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        yield json.loads(line)


def started(words: list[str], capsys: Capture) -> tuple[int, dict[str, str], str]:
    """Run a command: its exit code, what it told by parts, and stderr; stdout is for answers alone."""
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    assert not is_internal(err)
    assert code == EXIT_OK or out == ""
    return code, told(err), err
