"""Heartbeat messages ("beats"), which each rank sends once per second and all other ranks read."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from tunesmith.run_dir import Phase

# Letters of process states in /proc/PID/stat. A process with one of ENDED_STATES has ended. A
# process with one of HALTED_STATES was halted by SIGSTOP or a debugger.
ENDED_STATES = ("Z", "X")
HALTED_STATES = ("T", "t")
# Maximum number of ranks that an error message names.
MAX_NAMED_RANKS = 4


@dataclass
class Beat:
    """A heartbeat message: the state that a rank reports about itself.

    Attributes:
        count: the number of messages that the rank has sent.
        process: the PID namespace and the PID of the rank's process.
        phase: the current phase of the run.
        place: the location of the main thread as text.
        collective: the name of the collective that the main thread waits in, or a text if it waits
            for the GPU, or "".
        idle: seconds since the last progress.
        limit: maximum for `idle` before the rank counts as stuck.
        stops: whether the rank has a request to stop the run.
        waiting: seconds that the main thread has waited in `collective`.
        waiting_limit: maximum for `waiting`. If all ranks exceed it, none of them can continue.
        is_done: whether the rank has finished. If True, missing messages of this rank are no fault.
    """

    count: int = 0
    process: str = ""
    phase: str = ""
    place: str = ""
    collective: str = ""
    idle: float = 0.0
    limit: float = inf
    stops: bool = False
    waiting: float = 0.0
    waiting_limit: float = inf
    is_done: bool = False


@dataclass(eq=False)
class RunClock:
    """A clock that counts the seconds in which this process was running.

    One call of `advance` adds at most `interval` seconds. Otherwise a process that was halted with
    SIGSTOP would assume, after it continues, that all other ranks are lost.
    """

    interval: float
    seconds: float = 0.0
    _last_turn: float = field(default_factory=time.monotonic)

    def advance(self) -> None:
        """Add the time since the last call, at most `interval` seconds."""
        now = time.monotonic()
        self.seconds += min(now - self._last_turn, self.interval)
        self._last_turn = now


class Peers:
    """The heartbeat messages ("beats") of all ranks of a run, with the hosts and processes of the
    ranks, as far as this rank knows them.

    Attributes:
        local: the numbers of the ranks on this node.
        limit: seconds without a heartbeat after which a rank counts as lost.
        own_beat: the next heartbeat that this rank sends.
        beats: the newest heartbeat of each rank.
        heard_at: the time at which the newest heartbeat of each rank was read, in seconds of
            `clock`.
        answered_at: the time of the store's last answer, in seconds of `clock`.
    """

    def __init__(self, rank: int, hosts: Sequence[str], local: Sequence[int], limit: float) -> None:
        self.rank = rank
        self.hosts = hosts
        self.local = local
        self.limit = limit
        self.clock = RunClock(min(1.0, limit / 20))
        self.own_beat = Beat(phase=Phase.START)
        # /proc/self/ns/pid does not exist on a system without PID namespaces.
        with contextlib.suppress(OSError):
            self.own_beat.process = f"{os.readlink('/proc/self/ns/pid')} {os.getpid()}"
        self.beats = [Beat() for _ in hosts]
        self.heard_at = [0.0] * len(hosts)
        self.answered_at = 0.0

    def read(self, texts: Iterable[bytes]) -> None:
        """Update `beats` from the texts that the store holds, one JSON text per rank."""
        now = self.clock.seconds
        self.answered_at = now
        for rank, text in enumerate(texts):
            beat = Beat(**json.loads(text))
            # An unchanged count means that the rank has sent no new beat.
            if beat.count != self.beats[rank].count:
                self.beats[rank] = beat
                self.heard_at[rank] = now

    def is_silent(self, rank: int, limit: float) -> bool:
        """Return whether another rank has sent no heartbeat for more than `limit` seconds."""
        return rank != self.rank and self.clock.seconds - self.heard_at[rank] > limit

    def ended(self) -> list[int]:
        """Return the ranks of this node whose process has ended although they had not reported that
        they are done.
        """
        return [
            rank
            for rank in self.local
            if not self.beats[rank].is_done and self.process_state(rank) in ENDED_STATES
        ]

    def halted(self, limit: float) -> list[int]:
        """Return the ranks of this node whose process is halted and that have sent no heartbeat for
        `limit` seconds.
        """
        return [
            rank
            for rank in self.local
            if self.is_silent(rank, limit) and self.process_state(rank) in HALTED_STATES
        ]

    def process_state(self, rank: int) -> str:
        """Read the state letter of a rank's process from /proc.

        Return "X" if the process has ended. Return "" if this process cannot see the rank's
        process, for example in another container.
        """
        pid = self.pid(rank)
        if not pid:
            return ""
        try:
            # Search for the last ")", because the program's name before it can contain spaces and
            # parentheses.
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "X"

    def pid(self, rank: int) -> int:
        """Return the PID of a rank's process, or 0 if this process cannot see it."""
        namespace, _, pid = self.beats[rank].process.rpartition(" ")
        # Compare the PID namespaces, because a PID of another container's namespace refers to a
        # different process here.
        is_visible = namespace and self.own_beat.process.startswith(namespace)
        return int(pid) if is_visible else 0

    def local_processes(self) -> dict[int, int]:
        """Return a dict from PID to rank for the ranks of this node. Processes that are not visible
        are left out.
        """
        ranks = {self.pid(rank): rank for rank in self.local}
        # Remove the key 0, because `pid` returns 0 for each process that this process cannot see.
        ranks.pop(0, None)
        ranks[os.getpid()] = self.rank
        return ranks

    def names(self, ranks: Collection[int]) -> str:
        """Return a list of ranks as text, such as `rank 3 on spark-b, rank 4 on spark-b`."""
        named = sorted(ranks)[:MAX_NAMED_RANKS]
        text = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in named)
        if len(ranks) > MAX_NAMED_RANKS:
            text += f" and {len(ranks) - MAX_NAMED_RANKS} more"
        return text

    def place_of(self, rank: int) -> dict[str, object]:
        """Return the location that a rank reported in its last heartbeat, in the format of
        failure.json.
        """
        beat = self.own_beat if rank == self.rank else self.beats[rank]
        return {
            "rank": rank,
            # In a run of one process, the host name in `hosts` is empty.
            "host": self.hosts[rank] or socket.gethostname(),
            "phase": beat.phase or None,
            "collective": beat.collective or None,
        }
