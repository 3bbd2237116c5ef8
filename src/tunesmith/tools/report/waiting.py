"""A run by its directory, or by the name of its job once that has begun."""

import logging
import time
from pathlib import Path

from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_word
from tunesmith.launch.jobs import find_job, holds_run
from tunesmith.reader.run_files import RunFiles

log = logging.getLogger(__name__)

QUEUE_SECONDS = 5.0  # between two looks at a job that waits


def open_run(word: str, *, wait: bool = False) -> RunFiles:
    """A run by its directory or by the name of its job; UsageError if it is none.

    wait: wait for a job in a queue, and log the reason; else that is an error.
    """
    if holds_run(Path(word)):
        return RunFiles(word)
    job = find_job(word)
    folder = Path(job.run_dir)
    last_reason = ""
    while not holds_run(folder):
        state = job.state()
        if not wait or not state.at_work:
            what = f"{job.name} has not begun"
            fix = f"tunesmith status {shell_word(job.name)}"
            raise UsageError(what, where=str(folder), why=state.text, fix=fix)
        if state.text != last_reason:
            log.info(f"{job.name} has not started: {state.text}; waiting, ctrl-C stops")
        last_reason = state.text
        time.sleep(QUEUE_SECONDS)
    return RunFiles(folder)
