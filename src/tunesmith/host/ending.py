"""Fast exit of the process that runs a command."""

import atexit
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


def run_and_exit(command: Callable[[], int]) -> NoReturn:
    """Run a command, and exit this process with the exit code of the command.

    At a normal exit, Python clears all modules and collects garbage. With torch and Transformers
    this takes one second of CPU time, a fifth of the time of their import. Therefore, if torch is
    loaded, an exit handler ends the process without this cleanup. The handler is registered before
    all other handlers, so it runs last: threads are already joined, and the exit handlers of
    libraries have run.
    """
    code: int | None = None

    def leave() -> None:
        if code is None or "torch" not in sys.modules:
            return
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    atexit.register(leave)
    code = command()
    sys.exit(code)
