"""Each command that reads damaged runs goes on with what is whole, and says what is not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from errors import is_internal, lines_with
from time_limit import time_limit
from tunesmith.cli.main import main
from tunesmith.metrics.record import newest_record
from tunesmith.tools.report.run_files import RunFiles
from watching import add_steps, write_run

DEEP = 100_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", 10, ranks=2)


NO_RECORDS = [
    '{"step": "x"}', '{"step": 11, "loss": {"a": 1}}', '{"loss": 1.0}', '{"step": 11, "loss": 1e999}', '{"step": 11, "loss": NaN}',
    '{"step": 11, "loss": null}', '{"step": 11, "tokens": -1}', '{"step": 11, "x\\ud800": 1}', "[" * DEEP, "7", "", '{"step": 11, "lo',
]  # fmt: skip
DIVERGED = '{"step": 11, "loss": "NaN", "grad_norm": "Infinity", "reward": null, "note": "mine"}\n'


def test_a_line_that_is_no_record_is_skipped_and_counted(folder: Path) -> None:
    good = (folder / "metrics.jsonl").read_text()
    for line in NO_RECORDS:
        (folder / "metrics.jsonl").write_text(f"{good}{line}\n")
        add_steps(folder, 12, 13)
        run = RunFiles(folder)
        assert run.figures.columns["step"] == [*range(1, 11), 12, 13], line[:99]
        assert [(file.file, file.lines) for file in run.damaged] == [("metrics.jsonl", 1)]
        assert "line 11" in run.damaged[0].why
        assert newest_record(folder)["step"] == 13
    (folder / "metrics.jsonl").write_text(good + DIVERGED)
    run = RunFiles(folder)
    assert (run.figures.columns["step"][-1], run.damaged) == (11, [])


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        make(path)

    return spoil


def holding(name: str, content: str) -> Callable[[Path], object]:
    return replaced(name, lambda path: path.write_text(content))


SPOILT: dict[str, tuple[str, Callable[[Path], object]]] = {
    "metrics are a fifo": ("metrics.jsonl", replaced("metrics.jsonl", os.mkfifo)),
    "metrics are a device": ("metrics.jsonl", replaced("metrics.jsonl", lambda path: path.symlink_to("/dev/zero"))),
    "metrics are a folder": ("metrics.jsonl", replaced("metrics.jsonl", Path.mkdir)),
    "a rank's are a fifo": ("metrics-rank1.jsonl", replaced("metrics-rank1.jsonl", os.mkfifo)),
    "a sample's answer is null": ("samples.jsonl", holding("samples.jsonl", '{"step": 1, "prompt": "a", "answer": null}\n')),
    "the log is a loop": ("log.txt", replaced("log.txt", lambda path: path.symlink_to(path))),
    "a list for train": ("config.yaml", holding("config.yaml", "train: [1, 2]\nvalidate: 3\n")),
    "a deep recipe": ("config.yaml", holding("config.yaml", "[" * DEEP + "]" * DEEP)),
    "types in env": ("env.json", holding("env.json", '{"command": 5, "commit": [1], "validation_hash": {}, "torch": "2.13.0"}')),
    "types in the failure": ("failure.json", holding("failure.json", '{"what": {"a": [1]}, "rank": 1e999}')),
    "a list as stopped": ("stopped.json", holding("stopped.json", "[1]")),
    "a text as its step": ("final/manifest.json", holding("final/manifest.json", '{"step": "9", "files": {}}')),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_a_damaged_file_is_told_and_the_rest_is_shown(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, spoil = SPOILT[case]
    spoil(folder)
    whole = write_run(tmp_path / "whole", 20)
    page = tmp_path / "report.html"
    with time_limit(60):
        assert main(["report", str(folder), str(whole), "--output", str(page)]) == 0
        assert name in capsys.readouterr().err
        # Which says whose directory it is
        assert main(["status", str(folder)]) == (2 if name == "env.json" else 0)
        assert main(["report", str(folder), str(whole), "--json"]) == 0
    out, err = capsys.readouterr()
    assert not is_internal(err)
    first, second = json.loads(out[out.index("{\n") :])["runs"]
    assert [file.partition(":")[0] for file in first["damaged"]] == [name]
    assert second["damaged"] == []
    assert name in page.read_text()


def test_a_folder_that_is_no_run_is_left_out_of_a_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "missing"), str(folder), "--output", str(page)]) == 0
    assert lines_with(capsys.readouterr().err, tmp_path / "missing")
    assert main(["report", str(tmp_path / "missing"), "--output", str(page)]) == 2
