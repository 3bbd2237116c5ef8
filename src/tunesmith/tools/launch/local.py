"""`launch local`: the ranks of this machine, in the foreground or in the background.

In the background they outlive the terminal.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tunesmith.config.schema import Run
from tunesmith.errors import RunError
from tunesmith.host.child_output import reason_in
from tunesmith.host.shell import shell_path
from tunesmith.launch.jobs import FOLDER, Job, JobState, save_job
from tunesmith.run_dir import RunState

START_TIMEOUT = 1.0  # seconds in which a start that cannot work has ended


class LocalJob(Job):
    """Processes of one machine.

    `details`: the agent's `pid` and when it was `created`, as a PID is used again.
    """

    def state(self) -> JobState:
        state = super().state()
        # The agent runs before a rank locks the run directory.
        if self.is_alive() and state.state is not RunState.RUNNING:
            return JobState(RunState.RUNNING, "starts")
        return state

    def stop(self) -> str:
        if not self.is_alive():
            return super().stop()
        os.kill(int(self.details["pid"]), signal.SIGTERM)
        return "stop requested: saves, then stops"

    def is_alive(self) -> bool:
        """Tell whether its agent runs on this machine."""
        import psutil

        with suppress(psutil.Error):
            process = psutil.Process(int(self.details["pid"]))
            # A PID is used again: the time of creation tells whether this is still the agent.
            is_same = str(process.create_time()) == self.details["created"]
            # A zombie has ended, though nobody has read its exit code yet.
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        return False


def detach(run: Run, words: Sequence[str]) -> LocalJob:
    """Start the node agent, by the words of `agent_words`, so that it outlives this terminal.

    RunError if it has ended with a fault at once; what it said is in its log.
    """
    import psutil

    log = Path(run.output_dir, FOLDER, "output.log")
    with log.open("wb") as file:
        agent = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Otherwise SIGHUP comes with the terminal's end.
            start_new_session=True,
        )
    details = {"pid": str(agent.pid), "created": str(psutil.Process(agent.pid).create_time())}
    job = LocalJob(f"local-{agent.pid}", run.output_dir, log=str(log), details=details)
    save_job(job)
    # A start that is still at work after the wait is a good one.
    with suppress(subprocess.TimeoutExpired):
        code = agent.wait(START_TIMEOUT)
        if code:
            text = log.read_text(encoding="utf-8", errors="replace").strip()
            raise RunError(
                f"it exited at once with code {code}",
                where=str(log),
                why=reason_in(text),
                fix=f"cat {shell_path(log)}",
            )
    return job
