"""Heartbeats between the ranks of a run, which detect a lost rank and end the others.

A collective waits for a lost rank until the timeout of the collective. A short timeout is not
possible, because a rank may also wait for a slow load or compilation of another rank. Therefore a
thread of each rank writes a message ("beat") to the launcher's store once per second and reads the
messages of all ranks (`beats`, `activity`). The first rank that detects a fault (`diagnosis`)
publishes it. All ranks then end with exit code 1, and one rank of each node reports the fault
(`failure_report`).

A rank without beats, or a store without answers, counts as lost after TUNESMITH_HEARTBEAT_SECONDS
(default: 60, see `ranks.heartbeat_limit`).
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

# Types of errors that all ranks raise at the same step. Therefore no rank has to publish them to
# the others.
AGREED = (OtherRankError, StoppedError, NonFiniteError)
# Seconds that the main thread of a rank has to end after a fault is decided. After this time,
# `_exit_now` ends the process. A main thread that may hang in a collective gets 3 seconds. A main
# thread that has raised an error and runs its cleanup gets 60 seconds.
HUNG_RANK_SECONDS = 3.0
UNWINDING_RANK_SECONDS = 60.0
# Maximum number of seconds that a running machine takes to refuse a connection to a closed port.
REFUSAL_SECONDS = 2.0
# Value of the key "fault" in the store before a rank publishes a fault.
UNDECIDED = "-"
# Pattern that matches torch's exceptions about collectives and stores.
_BROKEN = re.compile(r"gloo|nccl|^Dist\w+Error", re.IGNORECASE)


class Heartbeat:
    """Two threads that exchange heartbeats with the other ranks and detect faults.

    The defaults fit a run of one process, which starts no threads.

    Attributes:
        agreed: an error that all ranks already know, because they have exchanged it in a
            collective.
        probes: callbacks that read the state of this process.
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
            rank: this rank.
            hosts: the host name of each rank.
            local: the ranks of this node.
            store: a client of torch's store that only this object uses. `ranks.meet` must have
                created the keys before. The timeout of the client is also the number of seconds
                without a heartbeat after which a rank counts as lost.
            probes: callbacks that read the state of this process.
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
        self._exchange_thread = threading.Thread(
            target=self._exchange_beats, name="heartbeat", daemon=True
        )

    def __enter__(self) -> "Heartbeat":
        if self.store is not None:
            self._exchange_thread.start()
            threading.Thread(target=self._watch_clock, name="heartbeat-time", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        shared = self.share_error(error) if error is not None else None
        if self.store is not None:
            self._close()
        if shared is not None and shared is not error:
            raise shared from error

    def phase(self, name: str, limit: float | None = None) -> None:
        """Begin a phase of the run.

        Args:
            limit: maximum number of seconds without progress. None means no maximum.
        """
        self.activity.phase(name, limit)

    def phase_name(self) -> str:
        """Return the current phase of the run."""
        return self.activity.phase_name

    def progress(self, step: int | None = None) -> None:
        """Record that the main thread has made progress.

        Args:
            step: the last complete step, if it has changed.
        """
        self.activity.progress(step)

    def share_stop(self, stops: bool) -> bool:
        """Publish whether this rank has a request to stop. Return whether any rank has one, as far
        as this rank knows.
        """
        self.peers.own_beat.stops = stops
        return stops or any(beat.stops for beat in self.peers.beats)

    def share_error(
        self, error: BaseException, failure: TunesmithError | None = None
    ) -> BaseException:
        """Publish an error of this rank and return the error with which the rank ends.

        If this error is only the consequence of another rank's end, return OtherRankError.
        Otherwise return `error`.

        Args:
            failure: the error that this rank reports to the user, if its text is not that of
                `error`.
        """
        chain = causes_of(error)
        if self.store is None or any(map(self._is_agreed, chain)):
            self.agreed = error
            return error
        self.report.is_ending = True
        # Use the first cause, because other code may have wrapped torch's error about a broken
        # connection in another error.
        root = chain[-1]
        is_broken = isinstance(root, RuntimeError) and bool(
            _BROKEN.search(f"{type(root).__name__}: {root}")
        )
        if is_broken:
            # Reverse the frames: `walk_tb` starts with the outermost frame, but `locate` expects
            # the innermost frame first.
            self.activity.locate(reversed([*traceback.walk_tb(root.__traceback__)]))
            self.diagnosis.note_broken(first_line(root))
        elif not self.report.own_error:
            self.report.own_error = self.diagnosis.own_error(error, failure, self.activity)
        self._wake.set()
        # The heartbeat threads decide on a fault within the limit, even if the store is lost. The
        # timeout of this wait is only needed if these threads fail.
        self.report.fault_event.wait(2 * self.peers.limit)
        fault = self.report.fault
        if is_broken and fault is not None:
            return OtherRankError(fault.what, exit_code=fault.exit_code)
        return error

    def _is_agreed(self, error: BaseException) -> bool:
        """Return whether all ranks already know this error."""
        is_of_all = isinstance(error, AGREED) and not isinstance(error, StoppedEarlyError)
        return is_of_all or error is self.agreed

    def _close(self) -> None:
        peers = self.peers
        peers.own_beat.is_done = True
        # If torchrun does not hold the store, the process of rank 0 does. In this case, rank 0 must
        # not end before all other ranks have stopped using the store.
        is_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if peers.rank == 0 and not is_agent_store:
            while self._exchange_thread.is_alive() and not self._all_are_done():
                self._wake.set()
                time.sleep(peers.clock.interval / 20)
        self._closing.set()
        self._wake.set()
        self._exchange_thread.join(HUNG_RANK_SECONDS)
        # If the thread is blocked in a call to a store that does not answer, the interpreter would
        # crash at its end. `_exit_now` exits without the interpreter's cleanup.
        if self._exchange_thread.is_alive():
            atexit.register(_exit_now)

    def _all_are_done(self) -> bool:
        """Return whether each rank has either reported that it has finished, or sends no beats any
        more.
        """
        peers = self.peers
        return all(
            beat.is_done or peers.is_silent(rank, MISSED_BEATS * peers.clock.interval)
            for rank, beat in enumerate(peers.beats)
        )

    def _watch_clock(self) -> None:
        """Advance the clock, and end this process if its main thread does not end in time after a
        fault. This function runs in a separate thread.

        It does not call the store, because such a call may block for the entire timeout of the
        client.
        """
        parent = os.getppid()
        peers = self.peers
        report = self.report
        while not self._closing.wait(peers.clock.interval / 2):
            peers.clock.advance()
            if report.fault is not None:
                seconds_to_end = UNWINDING_RANK_SECONDS if report.is_ending else HUNG_RANK_SECONDS
                if time.monotonic() - report.decided_at > seconds_to_end:
                    _exit_now(report.fault.exit_code)
            elif peers.clock.seconds - peers.answered_at > peers.limit:
                self._lose_store(f"no answer for {peers.limit:.0f} s")
            elif os.getppid() != parent and not report.own_error:
                report.own_error = self.diagnosis.lost_launcher()

    def _exchange_beats(self) -> None:
        """Exchange beats once per interval. This function runs in a separate thread.

        The function returns when the store is lost or this rank has finished.
        """
        while True:
            # Read the flag before the round, because one complete round must follow after the flag
            # is set. This last round publishes `is_done`.
            is_last = self._closing.is_set()
            try:
                self._round()
            except RuntimeError as error:  # torch raises it for faults of the store and the network
                if not self.peers.own_beat.is_done:
                    self._lose_store(first_line(error))
                return
            if is_last:
                return
            self._wake.wait(self.peers.clock.interval)
            self._wake.clear()

    def _round(self) -> None:
        """Write this rank's heartbeat, read the heartbeats of all ranks, and search them for a
        fault.
        """
        peers = self.peers
        if not self.report.is_ending:
            self.activity.sample()
        self.activity.count_beat()
        # List ended processes before the heartbeats are read. A rank that finishes sends a last
        # heartbeat before its process ends. Therefore the heartbeats that are read below include
        # the last one of every listed rank that has finished.
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
            # `compare_set` returns the stored fault. If several ranks publish a fault at the same
            # time, all ranks use the first one.
            fault = self.store.compare_set("fault", UNDECIDED, json.dumps(fields))
        self._accept(json.loads(fault))

    def _accept(self, fields: ErrorFields) -> None:
        """Accept the fault that a rank has published, and kill silent ranks of this node."""
        peers = self.peers
        reporter = fields.pop("reporter", None)
        is_first = self.store.add(f"reported/{peers.local[0]}", 1) == 1
        # If the rank that raised the error is on this node, it reports the error. Otherwise the
        # first rank of the node that reaches this line reports it.
        reports = reporter == peers.rank if reporter in peers.local else is_first
        self._decide(fields, reports=reports)
        for rank in peers.local:
            is_mute = peers.is_silent(rank, peers.limit)
            if is_mute and peers.process_state(rank) not in ("", *ENDED_STATES):
                # Kill the silent process, because the launcher would wait 30 s for it.
                os.kill(peers.pid(rank), signal.SIGKILL)

    def _lose_store(self, why: str) -> None:
        """Decide on a fault without the other ranks, because the store cannot be reached.

        Args:
            why: the reason, such as torch's message.
        """
        # The lowest living rank of the node reports the fault.
        reporter = min({*self.peers.local} - {*self.peers.ended()})
        self._decide(self.diagnosis.lost_store(why), reports=reporter == self.peers.rank)

    def _decide(self, fields: ErrorFields, *, reports: bool) -> None:
        # If a connection is broken, the main thread raises OtherRankError, which has no details. In
        # this case the main thread does not print the fault.
        is_raised = self.report.is_ending and not self.diagnosis.broken
        self.report.decide(fields, self.activity.step, reports=reports, is_raised=is_raised)


def causes_of(error: BaseException) -> list[BaseException]:
    """Return a list of the error and its chain of causes. The last element is the first cause."""
    chain = [error]
    cause = error.__cause__
    # Stop at an error that is already listed, because `raise error from error` creates a cycle.
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    return chain


def refuses_connections(host: str, port: int) -> bool:
    """Return whether a host refuses connections to a port.

    If it does, the network works, but no process listens on the port.
    """
    try:
        with socket.create_connection((host, port), timeout=REFUSAL_SECONDS):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def _exit_now(code: int = RunError.exit_code) -> None:
    """End this process immediately, even if its main thread is stuck."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)
