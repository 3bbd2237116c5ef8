"""Signs of life between the ranks of a run, and what each of them says and does when one is gone.

A collective waits for a rank that is gone until its time limit, and a short limit would end slow loads and compiles too.
So a thread of each rank writes a beat to the launcher's store once a second and reads those of the others. The first
rank that sees a fault publishes it; then all end with exit code 1, and one of each node tells what happened. Errors and
killed processes are seen at once; broken connections and launchers that are gone in seconds; a rank without beats, or a
store without answers, after TUNESMITH_HEARTBEAT_SECONDS; a stuck main thread after the limit of its phase.
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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from types import FrameType
from typing import Any

from tunesmith.errors import (
    EXIT_STOPPED,
    NonFiniteError,
    OtherRankError,
    RunError,
    StoppedEarlyError,
    StoppedError,
    TunesmithError,
    first_line,
)
from tunesmith.host.memory import oom_kills

# Seconds without progress: a micro batch or a token takes seconds on a machine that holds the model
STUCK = 30 * 60.0
MISSED = 4  # beats in a row, after which a rank is blamed for a connection that broke
AGREED = (OtherRankError, StoppedError, NonFiniteError)  # which all ranks raise at the same step
# Seconds that the main thread has to end: in a collective it cannot; once it knows the fault
GRACE, ENDING = (
    3.0,
    60.0,
)
REFUSAL = 2.0  # seconds in which a machine that is up refuses a connection
GONE = ("Z", "X")  # states of a process
AGAIN = "start the same command again: it goes on from the newest checkpoint"
# torch's errors of a collective and of a store
_BROKEN = re.compile(r"gloo|nccl|^Dist\w+Error", re.IGNORECASE)


@dataclass
class Beat:
    """What a rank says of itself."""

    count: int = 0
    process: str = ""  # PID namespace and number
    phase: str = ""
    place: str = ""  # of the main thread
    collective: str = ""  # what it waits in there, if it does
    idle: float = 0.0  # seconds without progress, which must not exceed `limit`
    limit: float = inf
    done: bool = False


class Heartbeat:
    """The beats of this rank and of the others, in two threads; the defaults are a run of one process.

    Attributes:
        fault: what ends all ranks, once it is known.
        agreed: an error that all ranks know of already, by other means.
        on_fault: called with it and the last step, by a thread, on the one rank of a node that tells it.
        current_collective: asked at each beat for the collective that the main thread is in, if not one of torch's own.
        find_error: asked at each beat what went wrong with a collective that has raised nothing; empty: nothing.
        store_is_closed: asked whether the machine of the store answers, and the process that held the store is gone.
        stop_signal: asked which signal has told this process to stop; empty: none.
        stopped_code: the exit code of a rank that ends because another one was stopped before there was a step to save.
        gpu_is_busy: asked where the main thread seems stuck. Collectives return at once on a GPU: it is there that they wait.
    """

    def __init__(
        self,
        rank: int = 0,
        hosts: Sequence[str] = ("",),
        local: Sequence[int] = (0,),
        store: Any = None,
    ) -> None:
        """`local`: the ranks of this node. `store`: a client of torch's store for this object alone, after `meet` has opened
        the keys; a rank that does not beat for its timeout is gone."""
        self.rank, self.hosts, self.local, self.store = rank, hosts, local, store
        self.limit = store.timeout.total_seconds() if store is not None else inf
        self.interval = min(1.0, self.limit / 20)
        self.fault: TunesmithError | None = None
        self.agreed: BaseException | None = None
        self.on_fault: Callable[[TunesmithError, int], object] = lambda fault, step: None
        self.current_collective: Callable[[], str] = lambda: ""
        self.find_error: Callable[[], str] = lambda: ""
        self.gpu_is_busy: Callable[[], bool] = lambda: False
        self.store_is_closed: Callable[[], bool] = lambda: False
        self.stop_signal: Callable[[], str] = lambda: ""
        self.stopped_code = EXIT_STOPPED
        self.writer: int | None = None  # of the thread that the main thread waits for
        self.own, self.beats = Beat(), [Beat() for _ in hosts]
        with contextlib.suppress(OSError):  # a system without namespaces
            self.own.process = f"{os.readlink('/proc/self/ns/pid')} {os.getpid()}"
        # Seconds that this process ran: after it was stopped it must not take the others for gone.
        self.clock = self.answered = self.moved = self.decided = 0.0
        self.heard = [0.0] * len(hosts)
        self.step, self._phase, self.kills = 0, "start", oom_kills()
        self.part, self.longest = "", inf  # what phases are part of, and the limit of each
        self._outbox: dict[str, Any] = {}
        self._broken, self._broken_at, self._ended_at, self._ending = "", 0.0, 0.0, False
        self._known, self._wake, self._closing = (threading.Event() for _ in range(3))
        self._deciding = threading.Lock()
        self._talker = threading.Thread(target=self._talk, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self.store is not None:
            self._talker.start()
            threading.Thread(target=self._mind_time, name="heartbeat-time", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        found = self.verdict(error) if error is not None else None
        if self.store is not None:
            self._close()
        if found is not None and found is not error:
            raise found from error

    def phase(self, name: str, limit: float | None = None) -> None:
        """Begin a part of the run that may take `limit` seconds without progress; None: any time."""
        self._phase, self.own.limit = f"{self.part}{name}", min(limit or inf, self.longest)
        self.progress()

    def progress(self, step: int | None = None) -> None:
        """Note that the main thread moves on; `step`: the last one done."""
        self.moved, self.step = self.clock, self.step if step is None else step

    @contextlib.contextmanager
    def waits_for(self, thread: int | None) -> Iterator[None]:
        """Inside, the main thread waits for another one, by its identity: where that stands is told of this rank."""
        self.writer = thread
        try:
            yield
        finally:
            self.writer = None

    @property
    def doing(self) -> str:
        """The phase and the last step, in words."""
        return f"{self._phase}, step {self.step}" if self.step else self._phase

    def verdict(self, error: BaseException, failure: TunesmithError | None = None) -> BaseException:
        """What ends this rank: `error`, made known to the others, or OtherRankError if another rank's end caused it.

        `failure`: the error as this rank tells it, where that has other words.
        """
        chain = [error]
        # A RunError may say it in other words; `raise error from error` makes a ring.
        while (cause := chain[-1].__cause__) is not None and cause not in chain:
            chain.append(cause)
        if self.store is None or any(self._is_agreed(cause) for cause in chain):
            self.agreed = error
            return error
        self._ending, first = True, chain[-1]
        broken = isinstance(first, RuntimeError) and bool(
            _BROKEN.search(f"{type(first).__name__}: {first}")
        )
        if broken:
            self._stand_at([*traceback.walk_tb(first.__traceback__)][::-1])
            self._broken_at, self._broken = self.clock, first_line(first)
        elif not self._outbox:
            unknown = RunError(f"{type(error).__name__}: {first_line(error)}")
            own = failure or (error if isinstance(error, TunesmithError) else unknown)
            stopped = isinstance(error, KeyboardInterrupt | StoppedEarlyError)
            what = (
                f"was stopped by {self.stop_signal() or 'a signal'}"
                if stopped
                else f"failed: {own.what}"
            )
            words = {
                "where": own.where,
                "why": own.why,
                "fix": own.fix,
                "cause": own.cause,
                "teller": self.rank,
            }
            words["smaller"] = own.smaller
            if stopped:
                words |= {"where": self.doing, "why": "", "fix": AGAIN, "stopped": True}
            self._outbox = {
                "what": f"{self._name([self.rank])} {what}",
                **words,
                "failed_rank": self.own_place(),  # which is newer than the beat that the others have read
            }
        self._wake.set()
        self._known.wait(2 * self.limit)
        return (
            OtherRankError(self.fault.what, exit_code=self.fault.exit_code)
            if broken and self.fault
            else error
        )

    def _is_agreed(self, error: BaseException) -> bool:
        """Whether all ranks know of this error already."""
        agreed = isinstance(error, AGREED) and not isinstance(error, StoppedEarlyError)
        return agreed or error is self.agreed

    def _close(self) -> None:
        self.own.done = True
        # Where no launcher holds the store rank 0 does, and stays until the others have read it for the last time.
        holds = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while holds and self._talker.is_alive():
            holds = not all(
                b.done or self._silent(r, MISSED * self.interval) for r, b in enumerate(self.beats)
            )
            self._wake.set()
            time.sleep(self.interval / 20)
        self._closing.set()
        self._wake.set()
        self._talker.join(GRACE)
        # A thread in a call to a mute store would crash an interpreter that ends
        if self._talker.is_alive():
            atexit.register(_leave)

    def _mind_time(self) -> None:
        parent, last = os.getppid(), time.monotonic()
        while not self._closing.wait(self.interval / 2):
            now = time.monotonic()
            self.clock, last = self.clock + min(now - last, self.interval), now
            if self.fault is not None:
                if now - self.decided > (ENDING if self._ending else GRACE):
                    _leave(self.fault.exit_code)
            elif self.clock - self.answered > self.limit:
                self._lose_store(f"no answer for {self.limit:.0f} s")
            elif os.getppid() != parent and not self._outbox:
                what = f"the launcher of {self._name([self.rank])} is gone"
                self._outbox = self._words(what, "its process has left its ranks behind", "killed")

    def _talk(self) -> None:
        while True:
            closing = self._closing.is_set()  # the last round says that this rank is done
            try:
                self._round()
            except RuntimeError as error:  # torch's errors of a store and of a network
                if not self.own.done:
                    self._lose_store(first_line(error))
                return
            if closing:
                return
            self._wake.wait(self.interval)
            self._wake.clear()

    def _round(self) -> None:
        """Write this rank's beat, read those of all, and look for a fault."""
        own = self.own
        if not self._ending:
            frames, main = sys._current_frames(), threading.main_thread().ident or 0
            self._stand_at(traceback.walk_stack(frames.get(self.writer or main, frames[main])))
        own.count, own.idle = own.count + 1, self.clock - self.moved
        ended = self._ended()  # before the beats: a rank says that it is done, then ends
        self.store.set(f"beat/{self.rank}", json.dumps(asdict(own)))
        *beats, verdict = self.store.multi_get(
            [*(f"beat/{rank}" for rank in range(len(self.hosts))), "verdict"]
        )
        self.answered = self.clock
        for rank, beat in enumerate(Beat(**json.loads(text)) for text in beats):
            if beat.count != self.beats[rank].count:
                self.beats[rank], self.heard[rank] = beat, self.clock
        if self.fault is not None:
            return
        if not self._broken and (error := self.find_error()):
            self._broken_at, self._broken = self.clock, error
        if verdict == b"-" and (
            found := self._outbox or self._look([r for r in ended if not self.beats[r].done])
        ):
            verdict = self.store.compare_set("verdict", "-", json.dumps(found))
        if verdict != b"-":
            words = json.loads(verdict)
            # A rank that raises the error: it is told where that arrives
            teller = words.pop("teller", None)
            first = self.store.add(f"told/{self.local[0]}", 1) == 1
            self._decide(words, tells=teller == self.rank if teller in self.local else first)
            for mute in (
                r
                for r in self.local
                if self._silent(r, self.limit) and self._state(r) not in ("", *GONE)
            ):
                # It would hold up the launcher for 30 s.
                os.kill(self._pid(mute), signal.SIGKILL)

    def _stand_at(self, frames: Iterable[tuple[FrameType, int]]) -> None:
        """Note what the main thread does, by its frames and lines from the innermost on: its collective, and our line."""
        collective, at = self.current_collective(), ""
        for frame, line in frames:
            module, name = str(frame.f_globals.get("__name__")), frame.f_code.co_name
            if module == self.current_collective.__module__:
                continue
            if module.startswith("torch.distributed") and name != "wrapper":
                collective = collective or name
            elif module == "__main__" or module.startswith("tunesmith."):
                at = f"{module}:{line}"
                break
        self.own.phase = self._phase
        if not collective and self.own.idle > self.own.limit / 2 and self.gpu_is_busy():
            collective = "a wait for the GPU"
        self.own.collective = collective
        self.own.place = ", ".join(
            text for text in (self._phase, f"step {self.step}", collective, at) if text
        )

    def _look(self, ended: list[int]) -> dict[str, Any]:
        """The fault that the beats show, in the words of an error; empty: none. `ended`: ranks without a process."""
        if ended:
            self._ended_at = self._ended_at or self.clock
            # The others have yet to tell what they wait in
            if self.clock - self._ended_at < self.interval:
                return {}
            if (kills := oom_kills() - self.kills) > 0:
                why, cause = (
                    f"the kernel ended {kills} of this machine's processes since the run began",
                    "oom-kill",
                )
            else:
                why, cause = "its process ended without a word: a signal, or a crash", "killed"
            return self._words(f"{self._name(ended)} was killed", why, cause, ended)
        limit = MISSED * self.interval if self._broken else self.limit
        # A rank that is done beats no more. It is missed where another waits for it.
        waits = bool(self._broken or self.own.collective)
        missed = [r for r, beat in enumerate(self.beats) if waits or not beat.done]
        if any(self._silent(r, limit) for r in missed):
            # The ranks of a node do not beat at once
            gone = [r for r in missed if self._silent(r, limit / 2)]
            why, cause = self._likely_cause(
                "it was killed or stopped, its machine is down, or the network to it is cut"
            )
            return self._words(
                f"{self._name(gone)} gave no sign of life for {limit:.0f} s", why, cause, gone
            )
        if hang := self._find_hang():
            return hang
        if self._broken and self.clock - self._broken_at > 2 * limit:
            return self._words(
                "a connection between the ranks broke, and all of them live", self._broken, "link"
            )
        return {}

    def _find_hang(self) -> dict[str, Any]:
        """The fault that a rank has made no progress for the limit of its phase, in the words of an error; empty: none.

        Ranks in a collective wait for the others: none of them is at fault as long as another one moves on, or may
        still take its time in a phase of a longer limit."""
        overdue = [rank for rank, beat in enumerate(self.beats) if beat.idle > beat.limit]
        if not overdue:
            return {}
        longest = max(self.beats[rank].idle for rank in overdue)
        stuck = [rank for rank in overdue if not self.beats[rank].collective]
        if stuck:
            why = "its main thread is stuck"
        elif any(
            self._may_move(rank, longest) for rank in range(len(self.beats)) if rank not in overdue
        ):
            return {}
        else:
            why = "they wait in collectives, for each other or for the network"
        # The others came to their collective a little after they last moved.
        idle = [rank for rank, beat in enumerate(self.beats) if beat.idle > longest / 2]
        what = f"{self._name(stuck or idle)} made no progress for {longest:.0f} s"
        return self._words(what, why, "hang", stuck=stuck)

    def _may_move(self, rank: int, longest: float) -> bool:
        """Whether a rank within its limit may end the wait of others, who have waited for `longest` seconds."""
        beat = self.beats[rank]
        waits_too = bool(beat.collective) and beat.idle > longest / 2
        return not beat.done and not waits_too

    def _lose_store(self, why: str) -> None:
        """Decide without the others, who cannot be asked."""
        what = f"rank 0 on {self.hosts[0]} or its launcher is gone"
        if self.store_is_closed():
            words = self._words(
                what,
                "its machine answers, and nobody listens where it held the ranks' store",
                "killed",
            )
        else:
            words = self._words(
                f"{what}, or the network to it", *self._likely_cause(f"the store there: {why}")
            )
        self._decide(words, tells=self.rank == min({*self.local} - {*self._ended()}))

    def _likely_cause(self, why: str) -> tuple[str, str]:
        """Why a rank is silent, and the name of the cause: where a stop signal came, no network is to blame."""
        if name := self.stop_signal():
            return (
                f"{name} came to this rank: a launcher ends what is left of a run when a part of it is gone",
                "killed",
            )
        return why, "link"

    def _decide(self, words: dict[str, Any], *, tells: bool) -> None:
        with self._deciding:  # both threads may come here
            if self.fault is not None:
                return
            stopped, smaller = words.pop("stopped", False), words.pop("smaller", "")
            self.fault = StoppedEarlyError(**words) if stopped else RunError(**words)
            self.fault.smaller = smaller
            if stopped:
                self.fault.exit_code = self.stopped_code
            self.decided = time.monotonic()
        if tells:
            if self._broken or not self._ending:  # an error of its own is told where it arrives
                print(self.fault.text(), file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                self.on_fault(self.fault, self.step)
        self._known.set()

    def _words(
        self,
        what: str,
        why: str,
        cause: str,
        gone: Collection[int] = (),
        stuck: Collection[int] = (),
    ) -> dict[str, Any]:
        """Those of an error that says what the ranks do and wait in that are not gone."""
        places: dict[str, list[str]] = {}
        for rank, beat in enumerate(self.beats):
            if rank not in gone and beat.place:
                places.setdefault(beat.place, []).append(str(rank))
        where = "; ".join(
            f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}: {at}" for at, ranks in places.items()
        )
        failed_rank = self._failed(gone or stuck)
        return {
            "what": what,
            "where": where,
            "why": why,
            "fix": AGAIN,
            "cause": cause,
            "failed_rank": failed_rank,
        }

    def own_place(self) -> dict[str, object]:
        """Where this rank stands, for failure.json."""
        own = {
            "rank": self.rank,
            "host": self.hosts[self.rank] or socket.gethostname(),
            "phase": self._phase,
        }
        return own | {"collective": self.own.collective or None}

    def _failed(self, ranks: Collection[int]) -> dict[str, object]:
        """Where the first of the ranks that are to blame was last."""
        if not ranks:
            return {}
        beat, place = self.beats[min(ranks)], {"rank": min(ranks), "host": self.hosts[min(ranks)]}
        return place | {"phase": beat.phase or None, "collective": beat.collective or None}

    def _ended(self) -> list[int]:
        """The ranks of this node whose process is no more."""
        return [r for r in self.local if not self.beats[r].done and self._state(r) in GONE]

    def _pid(self, rank: int) -> int:
        """That of a rank's process; 0 where it cannot be seen from here."""
        namespace, _, pid = self.beats[rank].process.rpartition(" ")
        return int(pid) if namespace and self.own.process.startswith(namespace) else 0

    def local_processes(self) -> dict[int, int]:
        """The ranks of this node by their process ids, as far as these can be seen from here."""
        return {pid: rank for rank in self.local if (pid := self._pid(rank))} | {
            os.getpid(): self.rank
        }

    def _state(self, rank: int) -> str:
        """That of a rank's process, as /proc names it; empty where it cannot be seen from here."""
        if not (pid := self._pid(rank)):
            return ""
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "X"

    def _silent(self, rank: int, limit: float) -> bool:
        return rank != self.rank and self.clock - self.heard[rank] > limit

    def _name(self, ranks: Collection[int]) -> str:
        names = [f"rank {rank} on {self.hosts[rank]}" for rank in sorted(ranks)]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def refuses_connections(host: str, port: int) -> bool:
    """Whether a machine answers that no process listens at this port: so its network is not cut."""
    try:
        with socket.create_connection((host, port), timeout=REFUSAL):
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
