"""`launch local`: start the ranks of a run on this machine, in the foreground or in the background.

Ranks in the background keep running when the terminal is closed.
"""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tunesmith.config.schema import Run
from tunesmith.errors import RunError
from tunesmith.host.child_output import reason_in
from tunesmith.host.shell import shell_path
from tunesmith.launch.job import FOLDER, save_job
from tunesmith.launch.local_job import LocalJob

# Seconds to wait after the start of the agent, to detect an agent that fails at once.
START_TIMEOUT = 1.0


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
    # Another process may later get the same pid, so store when this process was created too.
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
                where=log,
                why=reason_in(text),
                fix=f"read the log: cat {shell_path(log)}",
            )
    return job
