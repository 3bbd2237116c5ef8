"""The fault that ends all ranks: final once decided, and reported by one rank of each node."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tunesmith.distributed.diagnosis import ErrorFields
from tunesmith.errors import EXIT_STOPPED, RunError, StoppedEarlyError, TunesmithError
from tunesmith.host.streams import visible


@dataclass(eq=False)
class FailureReport:
    """The fault that ends this rank, if anything does.

    Attributes:
        fault: what ends all ranks, once it is decided.
        fault_event: set then.
        decided_at: when that was, by `time.monotonic`.
        is_ending: whether the main thread has raised an error, and knows that it must end.
        own_error: the fields of the fault that this rank has to publish; empty: none.
        on_fault: called with the fault and the last step, by a thread, on the one rank of a node
            that reports it.
        stopped_code: the exit code of a rank that ends because another one was stopped before
            there was a step to save.
    """

    fault: TunesmithError | None = None
    fault_event: threading.Event = field(default_factory=threading.Event)
    decided_at: float = 0.0
    is_ending: bool = False
    own_error: ErrorFields = field(default_factory=dict)
    on_fault: Callable[[TunesmithError, int], object] = lambda fault, step: None
    stopped_code: int = EXIT_STOPPED
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def decide(self, fields: ErrorFields, step: int, *, reports: bool, is_raised: bool) -> None:
        """Record the fault on this rank.

        Args:
            reports: whether this rank reports it.
            is_raised: whether the main thread raises it, and it is printed where that arrives.
        """
        # Both threads of the heartbeat may come here.
        with self._lock:
            if self.fault is not None:
                return
            is_stop = fields.pop("stopped", False)
            fault = StoppedEarlyError(**fields) if is_stop else RunError(**fields)
            if is_stop:
                fault.exit_code = self.stopped_code
            # Before the fault: who sees it counts the seconds that the main thread has to end.
            self.decided_at = time.monotonic()
            self.fault = fault
        if reports:
            if not is_raised:
                print(visible(fault.text()), file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                self.on_fault(fault, step)
        self.fault_event.set()
