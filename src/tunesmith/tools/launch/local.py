"""`launch local`: start the ranks of a run on this machine, in the foreground or in the background.

Ranks in the background keep running when the terminal is closed.
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

# Seconds to wait after the start of the agent, to detect an agent that fails at once.
START_TIMEOUT = 1.0


class LocalJob(Job):
    """A job whose node agent runs on one machine.

    `details` has the agent's `pid` and the time `created` at which the agent was started. The time
    distinguishes the agent from a later process with the same PID.
    """

    def state(self) -> JobState:
        state = super().state()
        # If the agent is alive but no rank has locked the run directory, the run is starting.
        if self.is_alive() and state.state is not RunState.RUNNING:
            return JobState(RunState.RUNNING, "starts")
        return state

    def stop(self) -> str:
        if not self.is_alive():
            return super().stop()
        os.kill(int(self.details["pid"]), signal.SIGTERM)
        return "stop requested: the run saves, then stops"

    def is_alive(self) -> bool:
        """Return whether the agent of this job runs on this machine."""
        import psutil

        with suppress(psutil.Error):
            process = psutil.Process(int(self.details["pid"]))
            # Compare the creation time, because another process may have got the same PID.
            is_same = str(process.create_time()) == self.details["created"]
            # A zombie process has ended, but its parent has not read the exit code yet.
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        return False


def detach(run: Run, words: Sequence[str]) -> LocalJob:
    """Start the node agent in the background, so that it keeps running without the terminal.

    Args:
        words: the arguments of `python`, from `agent_words`.

    Raises:
        RunError: if the agent ends with an error within START_TIMEOUT seconds. Its output is in the
            log.
    """
    import psutil

    log = Path(run.output_dir, FOLDER, "output.log")
    with log.open("wb") as file:
        agent = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Start a new session, so that the process gets no SIGHUP when the terminal is closed.
            start_new_session=True,
        )
    details = {"pid": str(agent.pid), "created": str(psutil.Process(agent.pid).create_time())}
    job = LocalJob(f"local-{agent.pid}", run.output_dir, log=str(log), details=details)
    save_job(job)
    # The start counts as successful if the agent is still running after the timeout.
    with suppress(subprocess.TimeoutExpired):
        code = agent.wait(START_TIMEOUT)
        if code:
            text = log.read_text(encoding="utf-8", errors="replace").strip()
            raise RunError(
                f"the run failed during its start with exit code {code}",
                where=str(log),
                why=reason_in(text),
                fix=f"read the log: cat {shell_path(log)}",
            )
    return job
