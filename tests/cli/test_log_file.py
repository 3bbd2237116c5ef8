"""log.txt holds all that was shown: warnings, the block of a failure, the stop."""

from __future__ import annotations

import logging
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from cli.bad_world import World, started
from errors import lines_with
from logged import logged_lines
from tunesmith.errors import EXIT_FAILED, EXIT_STOPPED, RunError
from tunesmith.metrics.log_file import LogFile
from tunesmith.training.trainer import Trainer

pytestmark = pytest.mark.slow

log = logging.getLogger("tunesmith.start.run")

TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")


def logged(run: Path) -> list[str]:
    lines = (run / "log.txt").read_text(encoding="utf-8").splitlines()
    assert all(TIME.match(line) for line in lines)
    return [TIME.sub("", line, count=1) for line in lines]


def test_a_failure_and_a_stop(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    step, ends = Trainer.train_step, [EXIT_FAILED, EXIT_STOPPED]

    def train_step(self: Trainer, batch: object) -> object:
        if self.progress.step == 2 and ends[0] == EXIT_FAILED:
            raise RunError("it broke", where="here", why="as tests do", fix="mend it")
        if self.progress.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "train_step", train_step)
    shown = []
    while ends:
        code, _, err = started(world.train())
        assert code == ends.pop(0), err
        shown += err.splitlines()
    written = logged(world.out)
    block = {"error: it broke", "  where: here", "  why: as tests do", "  fix: mend it"}
    assert block <= {*written}
    assert lines_with("\n".join(written), "SIGTERM", "step 4")
    assert [line for line in shown if line not in written] == []


def test_lines_wait_for_the_file_and_errors_pass(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    shown: list[str] = []

    with logged_lines(shown.append), suppress(ZeroDivisionError), LogFile(path) as log_file:
        log.info("one\ntwo")
        assert not path.exists()
        log_file.open()
        log.warning("\udcff three")
        raise ZeroDivisionError("by zero")
    assert shown == ["one\ntwo", "warning: \udcff three"]
    last = "ZeroDivisionError: by zero"
    assert logged(tmp_path) == ["one", "two", "warning: \\udcff three", last]
