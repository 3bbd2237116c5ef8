"""`launch local`: the ranks of this machine, in the foreground, or in the background beyond the terminal's end."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith.config.schema import Run
from tunesmith.errors import RunError
from tunesmith.host.shell import shell_path
from tunesmith.launch.jobs import FOLDER, Job, State, save_job

BEGINS = 1.0  # seconds in which a start that cannot work has ended


class LocalJob(Job):
    """Processes of one machine. `details`: the agent's `pid` and when it was `created`, as a PID is used again."""

    def state(self) -> State:
        if self.is_alive():
            found = super().state()
            return found if found.phase == "running" else State("running", "starts")
        return super().state()

    def stop(self, say: Callable[[str], None] = lambda text: None) -> str:
        if not self.is_alive():
            return super().stop(say)
        os.kill(int(self.details["pid"]), signal.SIGTERM)
        return "asked to save and end"

    def is_alive(self) -> bool:
        """Whether its agent runs on this machine."""
        import psutil

        with suppress(psutil.Error):
            process = psutil.Process(int(self.details["pid"]))
            alive = process.status() != psutil.STATUS_ZOMBIE
            return alive and str(process.create_time()) == self.details["created"]
        return False


def detach(run: Run, words: Sequence[str]) -> LocalJob:
    """Start the node agent, by the words of `agent_words`, in a session of its own: it outlives this terminal, and SIGHUP.

    RunError if it has ended with a fault at once; what it said is in its log.
    """
    import psutil

    log = Path(run.output_dir, FOLDER, "output.log")
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with log.open("wb") as file:
        agent = subprocess.Popen(
            [sys.executable, *words], stdout=file, **streams, start_new_session=True
        )
    details = {"pid": str(agent.pid), "created": str(psutil.Process(agent.pid).create_time())}
    job = LocalJob(f"local-{agent.pid}", run.output_dir, log=str(log), details=details)
    save_job(job)
    with suppress(subprocess.TimeoutExpired):
        if code := agent.wait(BEGINS):
            said = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            raise RunError(
                f"it ended at once, with {code}",
                where=str(log),
                why=said,
                fix=f"cat {shell_path(log)}",
            )
    return job
