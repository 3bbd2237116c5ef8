"""log.txt holds all that was shown: before the first step, warnings, the block of a failure, the
stop, the summary.
"""

from __future__ import annotations

import logging
import os
import re
import signal
from pathlib import Path

import pytest

from cli.bad_world import World, started
from errors import lines_with, warnings_with
from invoke import invoke
from logged import logged_lines
from tunesmith.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, RunError
from tunesmith.metrics.log_file import LogFile, log_file_of_run
from tunesmith.training.trainer import Trainer

pytestmark = pytest.mark.slow

log = logging.getLogger("tunesmith.training.run")

TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")


def logged(run: Path) -> list[str]:
    lines = (run / "log.txt").read_text(encoding="utf-8").splitlines()
    assert all(TIME.match(line) for line in lines)
    return [TIME.sub("", line, count=1) for line in lines]


def test_two_starts_and_their_summaries(world: World) -> None:
    shown = ""
    for words in (["train.duration=3 steps"], ["train.duration=1 epochs"]):
        done = invoke(*world.train(*words, held=True))
        assert done.code == EXIT_OK
        shown += done.err + done.out
    (resumed,) = lines_with(shown, 3, 6, world.out / "checkpoint-3")
    assert warnings_with(shown, 3)
    written = logged(world.out)
    assert [line for line in shown.splitlines() if line not in written] == []
    assert written.index(resumed) > written.index("next")


def test_a_failure_and_a_stop(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.train_step

    def fails(self: Trainer, batch: object) -> object:
        if self.progress.step == 2:
            raise RunError("it broke", where="here", why="as tests do", fix="mend it")
        return step(self, batch)  # type: ignore[arg-type]

    def stops(self: Trainer, batch: object) -> object:
        if self.progress.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch)  # type: ignore[arg-type]

    shown = []
    for act, wanted in ((fails, EXIT_FAILED), (stops, EXIT_STOPPED)):
        monkeypatch.setattr(Trainer, "train_step", act)
        code, _, err = started(world.train())
        assert code == wanted, err
        shown += err.splitlines()
    written = logged(world.out)
    assert {"error: it broke", "  where: here", "  why: as tests do", "  fix: mend it"} <= set(
        written
    )
    assert lines_with("\n".join(written), "SIGTERM", "step 4")
    assert [line for line in shown if line not in written] == []


def test_lines_of_the_command_come_before_those_of_its_run(tmp_path: Path) -> None:
    command = LogFile()
    with logged_lines(lambda line: None), command:
        log.info("recipe")
        with log_file_of_run(tmp_path / "log.txt") as log_file:
            log.info("rows")
            log_file.open()
            log.info("step")
        command.open()
        command.write("summary")
    assert logged(tmp_path) == ["recipe", "rows", "step", "summary"]


def test_lines_wait_for_the_file_and_errors_pass(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    shown: list[str] = []

    def fail() -> None:
        with logged_lines(shown.append), LogFile(path) as log_file:
            log.info("one\ntwo")
            assert not path.exists()
            log_file.open()
            log.warning("\udcff three")
            raise ZeroDivisionError("by zero")

    with pytest.raises(ZeroDivisionError):
        fail()
    assert shown == ["one\ntwo", "warning: \udcff three"]
    last = "ZeroDivisionError: by zero"
    assert logged(tmp_path) == ["one", "two", "warning: \\udcff three", last]
    with LogFile(tmp_path / "other.txt") as log_file:
        log_file.write("never opened")
    assert not (tmp_path / "other.txt").exists()


@pytest.mark.parametrize("full", [False, True])
def test_a_line_that_the_disk_does_not_take_is_still_shown(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The progress of a run must be written, so a full disk ends it; what is logged need not be."""

    def fails(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with logged_lines() as shown, LogFile(tmp_path / "log.txt") as log_file:
        log_file.open()
        if full:
            monkeypatch.setattr(os, "write", fails)
        log.info("one")
        if full:
            with pytest.raises(OSError, match="No space"):
                log_file.write("two")
    assert shown == ["one"]
    monkeypatch.undo()
    assert logged(tmp_path) == ([] if full else ["one"])
