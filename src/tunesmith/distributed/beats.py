"""The beats that each rank of a run sends once a second, and what the others read from them."""

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

ENDED_STATES = ("Z", "X")  # states of a process that has ended
HALTED_STATES = ("T", "t")  # states of a process that SIGSTOP or a debugger halts
NAMED_RANKS = 4  # of those that an error is about


@dataclass
class Beat:
    """The state that a rank reports of itself.

    Attributes:
        count: beats so far.
        process: PID namespace and number.
        place: of the main thread, in words.
        collective: what the main thread waits in, if it does: a collective, or work of the GPU.
        idle: seconds without progress, which must not exceed `limit`.
        is_done: whether the rank has ended its work, and may be missed.
    """

    count: int = 0
    process: str = ""
    phase: str = ""
    place: str = ""
    collective: str = ""
    idle: float = 0.0
    limit: float = inf
    is_done: bool = False


@dataclass(eq=False)
class RunClock:
    """Seconds that this process ran, as far as its thread that advances the clock did.

    After a process was stopped (SIGSTOP) it must not take the other ranks for gone, so a turn
    counts at most as long as `interval`.
    """

    interval: float
    seconds: float = 0.0
    _last_turn: float = field(default_factory=time.monotonic)

    def advance(self) -> None:
        """Count the time since the last call."""
        now = time.monotonic()
        self.seconds += min(now - self._last_turn, self.interval)
        self._last_turn = now


class Peers:
    """The ranks of a run as this one sees them: their newest beats, hosts and processes.

    Attributes:
        local: the ranks of this node.
        limit: seconds after which a rank without beats is gone.
        own: the beat that this rank sends next.
        heard_at: when each rank's beat was last a new one, by the clock.
        answered_at: when the store last answered.
    """

    def __init__(self, rank: int, hosts: Sequence[str], local: Sequence[int], limit: float) -> None:
        self.rank = rank
        self.hosts = hosts
        self.local = local
        self.limit = limit
        self.clock = RunClock(min(1.0, limit / 20))
        self.own_beat = Beat(phase=Phase.START)
        # A system without namespaces has no such link.
        with contextlib.suppress(OSError):
            self.own_beat.process = f"{os.readlink('/proc/self/ns/pid')} {os.getpid()}"
        self.beats = [Beat() for _ in hosts]
        self.heard_at = [0.0] * len(hosts)
        self.answered_at = 0.0

    def read(self, texts: Iterable[bytes]) -> None:
        """Take over the beats of all ranks as they lie in the store."""
        now = self.clock.seconds
        self.answered_at = now
        for rank, text in enumerate(texts):
            beat = Beat(**json.loads(text))
            # The same count is the beat that was read before.
            if beat.count != self.beats[rank].count:
                self.beats[rank] = beat
                self.heard_at[rank] = now

    def is_silent(self, rank: int, limit: float) -> bool:
        """Tell whether another rank has sent no beat for so many seconds."""
        return rank != self.rank and self.clock.seconds - self.heard_at[rank] > limit

    def ended(self) -> list[int]:
        """The ranks of this node whose process is no more, though they had not finished."""
        return [
            rank
            for rank in self.local
            if not self.beats[rank].is_done and self.process_state(rank) in ENDED_STATES
        ]

    def halted(self, limit: float) -> list[int]:
        """The ranks of this node without beats for so many seconds whose process is halted."""
        return [
            rank
            for rank in self.local
            if self.is_silent(rank, limit) and self.process_state(rank) in HALTED_STATES
        ]

    def process_state(self, rank: int) -> str:
        """Read the state of a rank's process in /proc; empty where it cannot be seen from here."""
        pid = self.pid(rank)
        if not pid:
            return ""
        try:
            # The program's name in parentheses may itself hold spaces and parentheses.
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "X"

    def pid(self, rank: int) -> int:
        """The id of a rank's process; 0 where it cannot be seen from here."""
        namespace, _, pid = self.beats[rank].process.rpartition(" ")
        # In a container the same number is another process.
        is_visible = namespace and self.own_beat.process.startswith(namespace)
        return int(pid) if is_visible else 0

    def local_processes(self) -> dict[int, int]:
        """The ranks of this node by their process ids, as far as these can be seen from here."""
        ranks = {self.pid(rank): rank for rank in self.local}
        # 0 stands for processes that cannot be seen from here.
        ranks.pop(0, None)
        ranks[os.getpid()] = self.rank
        return ranks

    def names(self, ranks: Collection[int]) -> str:
        """Some ranks in words: `rank 3 on spark-b`."""
        names = [f"rank {rank} on {self.hosts[rank]}" for rank in sorted(ranks)]
        text = ", ".join(names[:NAMED_RANKS])
        if len(names) > NAMED_RANKS:
            text += f" and {len(names) - NAMED_RANKS} more"
        return text

    def place_of(self, rank: int) -> dict[str, object]:
        """Describe where a rank is, or was when it last gave a beat, for failure.json."""
        beat = self.own_beat if rank == self.rank else self.beats[rank]
        return {
            "rank": rank,
            # Only a run of one process does not know its host's name.
            "host": self.hosts[rank] or socket.gethostname(),
            "phase": beat.phase or None,
            "collective": beat.collective or None,
        }
