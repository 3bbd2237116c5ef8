"""A run in the background of this machine, as a job."""

import os
import signal
from contextlib import suppress

from tunesmith.launch.job import Job, JobState, first_error, step_and_time_left
from tunesmith.run_dir import RunState


class LocalJob(Job):
    """A job whose node agent runs on one machine.

    `details` has the agent's `pid` and the time `created` at which the agent was started. The time
    distinguishes the agent from a later process with the same PID.
    """

    def state(self) -> JobState:
        state = super().state()
        error = first_error(self.log)
        # Another start had locked the folder, so the run in it is not that of this job.
        if error.startswith("another run"):
            return JobState(RunState.FAILED, f"{error}; in the run directory: {state.text}")
        # If the agent is alive but no rank has locked the run directory, the run is starting.
        if self.is_alive() and state.state is not RunState.RUNNING:
            return JobState(RunState.RUNNING, "starts")
        return state

    def stop(self) -> str:
        # A second signal would end the run before it has saved, so a run that trains gets a file.
        if not self.is_alive() or step_and_time_left(self.run_dir):
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
