"""Damage a copy of a run directory at random, and run every command that reads one: no internal error,
no hang, nothing in the directory changed.

Each seed does one thing to one file, and runs `report` (both forms), the page of a watcher
that was open before, `status`, `eval` and `merge`, all in this process. What
`eval` adds to evals/ is no change.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from time_limit import HangError, time_limit
from tunesmith.cli.main import main
from tunesmith.run_dir import EVALS

SECONDS = 60  # after which a command counts as hanging
TARGETS = (
    "metrics.jsonl", "metrics.jsonl", "metrics.jsonl", "metrics-rank1.jsonl", "samples.jsonl", "samples.jsonl", "config.yaml",
    "config.yaml", "env.json", "env.json", "log.txt", "final/manifest.json", "final/manifest.json", "final/adapter_config.json",
    "failure.json", "stopped.json", "running.json", ".lock",
)  # fmt: skip
# What a run leaves beside its records by the way it ended; each seed draws one.
ENDINGS: dict[str, dict[str, Any]] = {
    "": {},
    "failure.json": {"what": "out of memory", "where": "step 3", "why": "8 GiB", "last_step": 3, "next": "train again",
                     "cause": "memory", "rank": 0, "host": "here", "phase": "step", "collective": None},
    "stopped.json": {"signal": None, "reason": "memory", "step": 3, "next": "train again", "figures": {"free_bytes": 5}},
    "running.json": {"process": 4711, "host": "here", "boot": "", "oom_kills": 0, "began": "2026-01-01 10:00:00"},
}  # fmt: skip
ODD = [
    None, True, -1, 0, 1.5, 10**400, -(10**400), 10**16, 1e300, "x", "", "NaN", "-Infinity", "9" * 400, "\ud800", "\0", [], {},
    [[]], [1, 2], ["x"], {"a": {"b": [None]}}, "x" * 70_000,
]  # fmt: skip
DEEP = 100_000
# The commands that load no model
READERS = (
    "report",
    "report --json",
    "live page",
    "status",
)


@dataclass
class Outcome:
    """One command on one damaged run."""

    seed: int
    change: str
    command: str
    code: int | str  # an exit code, or `hang`
    seconds: float
    text: str  # of stderr
    changed: list[str]  # files of the run directory that are not as they were

    @property
    def is_bad(self) -> bool:
        return (
            self.code not in (0, 1, 2)
            or "internal error" in self.text
            or "Traceback" in self.text
            or bool(self.changed)
        )


def complete(run: Path) -> None:
    """Add the files of a run on several ranks to those of a short one."""
    shutil.copy(run / "metrics.jsonl", run / "metrics-rank1.jsonl")
    rows = [
        {"step": step, "prompt": "Say amber", "answer": f"amber {step}", "expected": "amber"}
        for step in (0, 4)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_bytes(draw: random.Random, text: bytes) -> bytes:
    at = draw.randrange(len(text) or 1)
    return text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :]


def insert_bytes(draw: random.Random, text: bytes) -> bytes:
    at = draw.randrange(len(text) + 1)
    return (
        text[:at]
        + draw.choice(
            [b"\0", b"\xff", b'"', b"{", b"[", b"\n", b",", b"NaN", b"1e999", b"\xed\xa0\x80"]
        )
        + text[at:]
    )


def cut(draw: random.Random, text: bytes) -> bytes:
    return text[: draw.randrange(len(text) + 1)]


def empty(_: random.Random, text: bytes) -> bytes:
    return text[:0]


def nest(draw: random.Random, text: bytes) -> bytes:
    deep = draw.choice(
        [b"[" * DEEP, b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP + b"1" + b"}" * DEEP]
    )
    lines = text.splitlines(keepends=True)
    lines.insert(draw.randrange(len(lines) + 1), deep + b"\n")
    return draw.choice([deep, b"".join(lines)])


def shuffle_lines(draw: random.Random, text: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    draw.shuffle(lines)
    return b"".join(lines)


def repeat_lines(draw: random.Random, text: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    return b"".join([*lines, *draw.choices(lines or [b""], k=5)])


def other_values(draw: random.Random, text: bytes) -> bytes:
    """A value of a JSON text, or of one of its lines, of another type or size."""
    lines = [text] if text.lstrip().startswith(b"{\n") else text.splitlines()
    try:
        at = draw.randrange(len(lines))
        value = json.loads(lines[at])
    except ValueError:
        return change_yaml(draw, text)
    lines[at] = json.dumps(spoil(draw, value)).encode()
    return b"\n".join(lines) + b"\n"


def spoil(draw: random.Random, value: Any) -> Any:
    """Plain values with one of them, at any depth, replaced or taken away."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return draw.choice(ODD)
    copy = value.copy()
    at = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if draw.random() < 0.1:
        del copy[at]
    else:
        copy[at] = spoil(draw, value[at])
    return copy


def change_yaml(draw: random.Random, text: bytes) -> bytes:
    """A line of a recipe with another value."""
    lines = text.decode(errors="replace").splitlines() or [""]
    at = draw.randrange(len(lines))
    odd = [
        "[1, 2]",
        "{a: 1}",
        "~",
        "9" * 400,
        "9" * 5000,
        '"\\ud800"',
        "x",
        "[[[]]]",
        ".nan",
        "-1",
        "true",
        "",
    ]
    lines[at] = f"{lines[at].partition(':')[0]}: {draw.choice(odd)}"
    return "\n".join(lines).encode()


def repeat_keys(draw: random.Random, text: bytes) -> bytes:
    odd = json.dumps(draw.choice(ODD))
    return text.replace(b'"step"', f'"step": {odd}, "step"'.encode(), 1).replace(
        b"train:", b"train: 3\ntrain:", 1
    )


CONTENT: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "a byte": change_bytes, "bytes added": insert_bytes, "cut": cut, "empty": empty, "nested": nest, "lines shuffled": shuffle_lines,
    "lines repeated": repeat_lines, "keys repeated": repeat_keys, "values": other_values, "more values": other_values,
    "other values": other_values, "still other values": other_values,
}  # fmt: skip
KINDS: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "fifo": os.mkfifo,
    "link to nowhere": lambda path: path.symlink_to("/nowhere"),
    "loop": lambda path: path.symlink_to(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "missing": lambda path: None,
}


def damage(draw: random.Random, run: Path) -> str:
    """Do one thing to one file of a run; what it was."""
    name = draw.choice(TARGETS)
    if name in ENDINGS:
        (run / name).write_text(json.dumps(ENDINGS[name]))
    path = run / name
    if draw.random() < 0.25:
        kind = draw.choice(list(KINDS))
        path.unlink(missing_ok=True)
        KINDS[kind](path)
        return f"{name}: {kind}"
    kind = draw.choice(list(CONTENT))
    path.write_bytes(CONTENT[kind](draw, path.read_bytes()))
    return f"{name}: {kind}"


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder: its kind, and the digest of its content."""
    files = {}
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            mode = path.lstat().st_mode
            content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else ""
            files[str(path.relative_to(folder))] = f"{stat.S_IFMT(mode)} {content}"
    return files


def look_at_page(watched: Any) -> None:
    """Render the page again, as `watch` does."""
    from tunesmith.reader.page import render_page

    watched.refresh()
    render_page([watched], live=True).encode()


def try_seed(
    seed: int, template: Path, folder: Path, names: Sequence[str] | None = None
) -> Iterator[Outcome]:
    """Every command, or those of `names`, on one damaged copy of the run `template`, made in the
    new folder `folder`.
    """
    from tunesmith.reader.run_files import RunFiles

    draw = random.Random(seed)
    whole = Path(shutil.copytree(template, folder / "whole", symlinks=True))
    name = b"run-\xff" if draw.random() < 0.1 else b"run"
    run = Path(shutil.copytree(template, folder / os.fsdecode(name), symlinks=True))
    watched = RunFiles(run)
    change = damage(draw, run)
    before = snapshot(run)
    page = folder / "report"
    commands: dict[str, Callable[[], int | None]] = {
        "report": lambda: main(["report", str(run), str(whole), "--output", f"{page}.html"]),
        "report --json": lambda: main(["report", str(run), str(whole), "--json"]),
        "live page": lambda: look_at_page(watched),
        "status": lambda: main(["status", str(run)]),
        "eval": lambda: main(["eval", str(run), "--no-base", "--max-examples", "2", "--json"]),
        "merge": lambda: main(["merge", str(run), "--output", str(folder / "merged")]),
    }
    for command in names or commands:
        start = commands[command]
        stderr = io.StringIO()
        began = time.perf_counter()
        code: int | str
        try:
            with time_limit(SECONDS), redirect_stdout(io.StringIO()), redirect_stderr(stderr):
                code = start() or 0
        except HangError:
            code = "hang"
        except Exception as error:  # the page's, which has no frame of a command
            code = "raised"
            stderr.write(f"internal error: {type(error).__name__}: {error}")
        seconds = time.perf_counter() - began
        after = snapshot(run)
        changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
        if command == "eval":
            changed = [path for path in changed if path in before or Path(path).parts[0] != EVALS]
        yield Outcome(seed, change, command, code, seconds, stderr.getvalue(), changed)
        before = after


def describe(one: Outcome) -> str:
    return (
        f"seed {one.seed} ({one.change}) {one.command}: {one.code} {one.changed} {one.text[-600:]}"
    )
