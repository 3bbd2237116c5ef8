"""Record of the fault that ends all ranks. Only the first fault is recorded, and one rank per node
reports it.
"""

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
    """The fault that ends this rank, and the state of its report.

    Attributes:
        fault: the error that ends all ranks, or None before it is decided.
        fault_event: an event that is set when `fault` is decided.
        decided_at: the value of `time.monotonic` when `fault` was decided.
        is_ending: whether the main thread has raised an error and is about to end.
        own_error: the error fields that this rank has to publish. Empty if it has none.
        on_fault: a function with the arguments (fault, last step). A heartbeat thread calls it on
            the rank of each node that reports the fault, and after a stop on all ranks.
        stopped_code: returns the exit code of this rank if another rank was stopped.
    """

    fault: TunesmithError | None = None
    fault_event: threading.Event = field(default_factory=threading.Event)
    decided_at: float = 0.0
    is_ending: bool = False
    own_error: ErrorFields = field(default_factory=dict)
    on_fault: Callable[[TunesmithError, int], object] = lambda fault, step: None
    stopped_code: Callable[[], int] = lambda: EXIT_STOPPED
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def decide(self, fields: ErrorFields, step: int, *, reports: bool, is_raised: bool) -> None:
        """Record the fault on this rank. Later faults are ignored.

        Args:
            fields: the arguments of the error.
            step: the last complete step.
            reports: whether this rank reports the fault for its node.
            is_raised: whether the main thread raises the fault. If True, the main thread prints the
                fault. If False, this function prints it.
        """
        # Use a lock, because both heartbeat threads may call this function.
        with self._lock:
            if self.fault is not None:
                return
            is_stop = fields.pop("stopped", False)
            fault = StoppedEarlyError(**fields) if is_stop else RunError(**fields)
            if is_stop:
                fault.exit_code = self.stopped_code()
            # Set `decided_at` before `fault`, because a thread that finds a fault counts the
            # seconds since `decided_at`.
            self.decided_at = time.monotonic()
            self.fault = fault
        if reports and not is_raised:
            print(visible(fault.text()), file=sys.stderr, flush=True)
        # Record a stop on each rank: the rank that was stopped may not write the run directory.
        if reports or is_stop:
            with contextlib.suppress(OSError):
                self.on_fault(fault, step)
        self.fault_event.set()
