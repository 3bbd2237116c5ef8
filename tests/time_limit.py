"""A limit on what a test may take, for what may hang."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class HangError(BaseException):
    """It takes too long; no `except Exception` of what hangs takes it for an error of its own."""


@contextmanager
def time_limit(seconds: int, what: object = "this") -> Iterator[None]:
    """HangError if the block takes longer, wherever it is."""

    def ring(*_: object) -> None:
        raise HangError(f"{what} is still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
