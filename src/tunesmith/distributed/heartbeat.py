"""Signs of life between the ranks of a run, and what each of them does when one is gone.

A collective waits for a rank that is gone until its time limit, and a short limit would end slow
loads and compiles too. So a thread of each rank writes a beat to the launcher's store once a second
and reads those of the others (`beats`, `activity`). The first rank that sees a fault (`diagnosis`)
publishes it; then all end with exit code 1, and one of each node reports it (`failure_report`).

A rank without beats, or a store without answers, is gone after TUNESMITH_HEARTBEAT_SECONDS
(60 by default: `ranks.heartbeat_limit`).
"""

import atexit
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from math import inf
from typing import Any

from tunesmith.distributed.activity import Activity, Probes
from tunesmith.distributed.beats import ENDED_STATES, Peers
from tunesmith.distributed.diagnosis import MISSED_BEATS, Diagnosis, ErrorFields
from tunesmith.distributed.failure_report import FailureReport
from tunesmith.errors import (
    NonFiniteError,
    OtherRankError,
    RunError,
    StoppedEarlyError,
    StoppedError,
    TunesmithError,
    first_line,
)

# Errors that all ranks raise at the same step.
AGREED = (OtherRankError, StoppedError, NonFiniteError)
# Seconds that a rank has to end by itself once the ranks have decided on a fault: one whose main
# thread may hang in a collective, and one whose main thread has raised an error and unwinds.
HUNG_RANK_SECONDS = 3.0
UNWINDING_RANK_SECONDS = 60.0
REFUSAL_SECONDS = 2.0  # seconds in which a machine that is up refuses a connection
UNDECIDED = "-"  # what stands in the store as the fault until a rank publishes a fault
# torch's errors of a collective and of a store
_BROKEN = re.compile(r"gloo|nccl|^Dist\w+Error", re.IGNORECASE)


class Heartbeat:
    """The beats of this rank and of the others, in two threads.

    The defaults are a run of one process.

    Attributes:
        agreed: an error that all ranks know of already, by other means.
        probes: what it asks of the process around it.
    """

    def __init__(
        self,
        rank: int = 0,
        hosts: Sequence[str] = ("",),
        local: Sequence[int] = (0,),
        store: Any = None,
        probes: Probes | None = None,
    ) -> None:
        """
        Args:
            local: the ranks of this node.
            store: a client of torch's store for this object alone, after `meet` has opened the
                keys; a rank that does not beat for its timeout is gone.
        """
        limit = store.timeout.total_seconds() if store is not None else inf
        self.store = store
        self.probes = probes or Probes()
        self.peers = Peers(rank, hosts, local, limit)
        self.activity = Activity(self.peers.own_beat, self.peers.clock, self.probes)
        self.diagnosis = Diagnosis(self.peers, self.probes)
        self.report = FailureReport()
        self.agreed: BaseException | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._talker = threading.Thread(target=self._talk, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self.store is not None:
            self._talker.start()
            threading.Thread(target=self._watch_time, name="heartbeat-time", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        shared = self.share_error(error) if error is not None else None
        if self.store is not None:
            self._close()
        if shared is not None and shared is not error:
            raise shared from error

    def phase(self, name: str, limit: float | None = None) -> None:
        """Begin a part of the run.

        limit: seconds that it may take without progress; None: any time.
        """
        self.activity.phase(name, limit)

    def phase_name(self) -> str:
        """The part of the run that goes on."""
        return self.activity.phase_name

    def progress(self, step: int | None = None) -> None:
        """Note that the main thread moves on; `step`: the last complete one."""
        self.activity.progress(step)

    def share_error(
        self, error: BaseException, failure: TunesmithError | None = None
    ) -> BaseException:
        """Return the error that ends this rank: `error`, published to the others.

        OtherRankError in its place, if another rank's end caused it.

        failure: the error as this rank reports it, where that has other words.
        """
        chain = _causes(error)
        if self.store is None or any(self._is_agreed(cause) for cause in chain):
            self.agreed = error
            return error
        self.report.is_ending = True
        # The first cause: a broken connection may have been raised in other words since.
        root = chain[-1]
        is_broken = isinstance(root, RuntimeError) and bool(
            _BROKEN.search(f"{type(root).__name__}: {root}")
        )
        if is_broken:
            # `walk_tb` begins with the outermost frame, and `locate` with the innermost.
            frames = [*traceback.walk_tb(root.__traceback__)]
            self.activity.locate(reversed(frames))
            self.diagnosis.note_broken(first_line(root))
        elif not self.report.own_error:
            self.report.own_error = self.diagnosis.own_error(error, failure, self.activity)
        self._wake.set()
        # At most: the other thread decides within the limit, or the store is lost and it decides
        # alone.
        self.report.fault_event.wait(2 * self.peers.limit)
        fault = self.report.fault
        if is_broken and fault is not None:
            return OtherRankError(fault.what, exit_code=fault.exit_code)
        return error

    def _is_agreed(self, error: BaseException) -> bool:
        """Tell whether all ranks know of this error already."""
        is_of_all = isinstance(error, AGREED) and not isinstance(error, StoppedEarlyError)
        return is_of_all or error is self.agreed

    def _close(self) -> None:
        peers = self.peers
        peers.own_beat.is_done = True
        # Where no launcher holds the store rank 0 does, and stays until the others have read it
        # for the last time.
        is_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if peers.rank == 0 and not is_agent_store:
            while self._talker.is_alive() and not self._all_are_done():
                self._wake.set()
                time.sleep(peers.clock.interval / 20)
        self._closing.set()
        self._wake.set()
        self._talker.join(HUNG_RANK_SECONDS)
        # A thread in a call to a mute store would crash an interpreter that ends.
        if self._talker.is_alive():
            atexit.register(_leave)

    def _all_are_done(self) -> bool:
        """Tell whether every rank has finished, by its beat, or is silent."""
        peers = self.peers
        return all(
            beat.is_done or peers.is_silent(rank, MISSED_BEATS * peers.clock.interval)
            for rank, beat in enumerate(peers.beats)
        )

    def _watch_time(self) -> None:
        """In a thread of its own: a call to the store may not return for its whole timeout."""
        parent = os.getppid()
        peers = self.peers
        report = self.report
        while not self._closing.wait(peers.clock.interval / 2):
            peers.clock.advance()
            if report.fault is not None:
                seconds_to_end = UNWINDING_RANK_SECONDS if report.is_ending else HUNG_RANK_SECONDS
                if time.monotonic() - report.decided_at > seconds_to_end:
                    _leave(report.fault.exit_code)
            elif peers.clock.seconds - peers.answered_at > peers.limit:
                self._lose_store(f"no answer for {peers.limit:.0f} s")
            elif os.getppid() != parent and not report.own_error:
                report.own_error = self.diagnosis.lost_launcher()

    def _talk(self) -> None:
        """In a thread: a round each interval, until the store or this rank's work ends."""
        while True:
            # The last round publishes that this rank has finished.
            is_last = self._closing.is_set()
            try:
                self._round()
            except RuntimeError as error:  # torch's errors of a store and of a network
                if not self.peers.own_beat.is_done:
                    self._lose_store(first_line(error))
                return
            if is_last:
                return
            self._wake.wait(self.peers.clock.interval)
            self._wake.clear()

    def _round(self) -> None:
        """Write this rank's beat, read those of all, and look for a fault."""
        peers = self.peers
        if not self.report.is_ending:
            self.activity.sample()
        self.activity.count_beat()
        # Before the beats are read: a rank publishes that it has finished, and then ends.
        ended = peers.ended()
        self.store.set(f"beat/{peers.rank}", json.dumps(asdict(peers.own_beat)))
        keys = [f"beat/{rank}" for rank in range(len(peers.hosts))]
        *beats, fault = self.store.multi_get([*keys, "fault"])
        peers.read(beats)
        if self.report.fault is not None:
            return
        self.diagnosis.check_collectives()
        if fault == UNDECIDED.encode():
            fields = self.report.own_error or self.diagnosis.find_fault(
                [rank for rank in ended if not peers.beats[rank].is_done]
            )
            if not fields:
                return
            # Of ranks that publish at once the first one's fault stands for all.
            fault = self.store.compare_set("fault", UNDECIDED, json.dumps(fields))
        self._accept(json.loads(fault))

    def _accept(self, fields: ErrorFields) -> None:
        """End by the fault that a rank has published, and end the ranks of this node that hang."""
        peers = self.peers
        reporter = fields.pop("reporter", None)
        is_first = self.store.add(f"reported/{peers.local[0]}", 1) == 1
        # A rank that raises the error reports it, where that arrives.
        reports = reporter == peers.rank if reporter in peers.local else is_first
        self._decide(fields, reports=reports)
        for rank in peers.local:
            is_mute = peers.is_silent(rank, peers.limit)
            if is_mute and peers.process_state(rank) not in ("", *ENDED_STATES):
                # It would hold up the launcher for 30 s.
                os.kill(peers.pid(rank), signal.SIGKILL)

    def _lose_store(self, why: str) -> None:
        """Decide without the others, who cannot be reached."""
        living = {*self.peers.local} - {*self.peers.ended()}
        is_lowest = self.peers.rank == min(living)
        self._decide(self.diagnosis.lost_store(why), reports=is_lowest)

    def _decide(self, fields: ErrorFields, *, reports: bool) -> None:
        # What broke a connection was the other rank's end: the main thread raises an error that
        # says nothing.
        is_raised = self.report.is_ending and not self.diagnosis.broken
        self.report.decide(fields, self.activity.step, reports=reports, is_raised=is_raised)


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, the first cause last."""
    chain = [error]
    cause = error.__cause__
    # A RunError may have other words for it; `raise error from error` makes a ring.
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    return chain


def refuses_connections(host: str, port: int) -> bool:
    """Tell whether a host answers that no process listens at the port: its network is not cut."""
    try:
        with socket.create_connection((host, port), timeout=REFUSAL_SECONDS):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def _leave(code: int = RunError.exit_code) -> None:
    """End this process though its main thread may be stuck."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)
