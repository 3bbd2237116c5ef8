"""The end of a command's process."""

import atexit
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


def run_and_exit(command: Callable[[], int]) -> NoReturn:
    """Run a command and end this process with its exit code, without taking modules apart.

    An interpreter that ends clears all its modules and looks through them for garbage. With torch
    and Transformers that is a second of CPU time, a fifth of what importing them takes. So once
    torch is loaded the exit handler that was registered first, and so runs last, ends the process.
    Threads have been joined and the handlers of libraries have run by then.
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
