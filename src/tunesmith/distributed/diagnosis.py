"""Which fault the beats of the ranks show, as the fields of the error that ends all of them.

Errors of a rank's own and killed processes are seen at once; broken connections and launchers that
are gone in seconds; a rank without beats after the limit of the heartbeat; a stuck main thread
after the limit of its phase.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from tunesmith.distributed.activity import Activity, Probes
from tunesmith.distributed.beats import Peers
from tunesmith.errors import RunError, StoppedEarlyError, TunesmithError, first_line
from tunesmith.host.memory import oom_kills

MISSED_BEATS = 4  # beats in a row, after which a rank is blamed for a connection that broke
AGAIN = "start the same command again: it resumes from the newest checkpoint"

# Arguments of a RunError, and how it is reported; JSON in the store.
ErrorFields = dict[str, Any]


@dataclass(eq=False)
class Diagnosis:
    """Looks for a fault in the beats that the peers have sent.

    Attributes:
        broken: torch's words for a connection that broke; empty while none did.
        broken_at, ended_at: when that, and the end of a process, was first seen, by the clock.
        first_oom_kills: those that the kernel had counted when the run began.
    """

    peers: Peers
    probes: Probes
    broken: str = ""
    broken_at: float = 0.0
    ended_at: float = 0.0
    first_oom_kills: int = field(default_factory=oom_kills)

    def note_broken(self, text: str) -> None:
        """A connection broke: a rank that is silent for a few beats is to blame for it."""
        # The other thread reads the time where it sees the text.
        self.broken_at = self.peers.clock.seconds
        self.broken = text

    def check_collectives(self) -> None:
        """Note an error of a collective for which the GPU waits without raising it."""
        if not self.broken:
            error = self.probes.find_error()
            if error:
                self.note_broken(error)

    def find_fault(self, ended: list[int]) -> ErrorFields:
        """The fields of the fault that the beats show; none: all is well.

        ended: ranks of this node without a process.
        """
        peers = self.peers
        if ended:
            return self._killed(ended)
        limit = MISSED_BEATS * peers.clock.interval if self.broken else peers.limit
        # A rank that has finished beats no more. It is missed where another waits for it.
        is_waiting = bool(self.broken or peers.own_beat.collective)
        expected = [rank for rank, beat in enumerate(peers.beats) if is_waiting or not beat.is_done]
        # A rank whose connections hold may be halted, which the ranks of its node see: they first.
        far_limit = limit if self.broken else limit + 2 * peers.clock.interval
        if any(
            peers.is_silent(rank, limit if rank in peers.local else far_limit) for rank in expected
        ):
            # The ranks of a node do not beat at once.
            silent = [rank for rank in expected if peers.is_silent(rank, limit / 2)]
            why, cause = self._likely_cause(
                "it was killed or stopped, its machine is down, or the network to it is cut"
            )
            what = f"{peers.names(silent)} sent no heartbeat for {limit:.0f} s"
            halted = peers.halted(limit / 2)
            if halted:
                pids = ", ".join(str(peers.pid(rank)) for rank in halted)
                why = f"SIGSTOP or a debugger halted process {pids}"
                return self.fields(what, why, "stopped", gone=halted)
            return self.fields(what, why, cause, gone=silent)
        hang = self._find_hang()
        if hang:
            return hang
        if self.broken and peers.clock.seconds - self.broken_at > 2 * limit:
            what = "a connection between the ranks broke; all ranks are alive"
            return self.fields(what, self.broken, "link")
        return {}

    def _killed(self, ended: list[int]) -> ErrorFields:
        """The fault that processes of this node are gone."""
        clock = self.peers.clock
        if not self.ended_at:
            self.ended_at = clock.seconds
        # The others have yet to send what they wait in.
        if clock.seconds - self.ended_at < clock.interval:
            return {}
        what = f"{self.peers.names(ended)} was killed"
        kills = oom_kills() - self.first_oom_kills
        if kills > 0:
            why = f"the kernel ended {kills} of this machine's processes since the run started"
            return self.fields(what, why, "oom-kill", gone=ended)
        why = "its process exited without a message: a signal or a crash"
        return self.fields(what, why, "killed", gone=ended)

    def _find_hang(self) -> ErrorFields:
        """The fault that a rank has made no progress for the limit of its phase.

        Ranks in a collective wait for the others: none of them is at fault as long as another one
        moves on, or may still take its time in a phase of a longer limit.
        """
        beats = self.peers.beats
        overdue = [rank for rank, beat in enumerate(beats) if beat.idle > beat.limit]
        if not overdue:
            return {}
        longest = max(beats[rank].idle for rank in overdue)
        stuck = [rank for rank in overdue if not beats[rank].collective]
        if stuck:
            why = "its main thread hangs"
        else:
            for rank in range(len(beats)):
                if rank not in overdue and self._may_move(rank, longest):
                    return {}
            why = "they wait in collectives, for each other or for the network"
        # The others came to their collective a little after they last moved.
        idle = [rank for rank, beat in enumerate(beats) if beat.idle > longest / 2]
        what = f"{self.peers.names(stuck or idle)} made no progress for {longest:.0f} s"
        return self.fields(what, why, "hang", stuck=stuck)

    def _may_move(self, rank: int, longest: float) -> bool:
        """Tell whether a rank within its limit may end the wait of others for `longest` seconds."""
        beat = self.peers.beats[rank]
        waits_too = bool(beat.collective) and beat.idle > longest / 2
        return not beat.is_done and not waits_too

    def lost_store(self, why: str) -> ErrorFields:
        """The fault that the store does not answer; `why` in torch's words."""
        what = f"rank 0 on {self.peers.hosts[0]} or its launcher was lost"
        if self.probes.store_is_closed():
            why = "its machine responds, but the ranks' store does not"
            return self.fields(what, why, "killed")
        return self.fields(
            f"{what}, or the network to it", *self._likely_cause(f"the store there: {why}")
        )

    def lost_launcher(self) -> ErrorFields:
        """The fault that this rank's launcher has ended before it."""
        what = f"the launcher of {self.peers.names([self.peers.rank])} is gone"
        return self.fields(what, "its process exited before its ranks", "killed")

    def _likely_cause(self, why: str) -> tuple[str, str]:
        """Why a rank is silent, and the name of the cause.

        Where a stop signal came, no network is to blame.
        """
        signal_name = self.probes.stop_signal()
        if not signal_name:
            return why, "link"
        return (
            f"{signal_name} came to this rank: "
            "a launcher ends what is left of a run when a part of it is gone",
            "killed",
        )

    def fields(
        self,
        what: str,
        why: str,
        cause: str,
        *,
        gone: Collection[int] = (),
        stuck: Collection[int] = (),
    ) -> ErrorFields:
        """Those of an error that says what the ranks do and wait in that are not gone."""
        ranks_at: dict[str, list[str]] = {}
        for rank, beat in enumerate(self.peers.beats):
            if rank not in gone and beat.place:
                ranks_at.setdefault(beat.place, []).append(str(rank))
        places = []
        for place, ranks in ranks_at.items():
            noun = "rank" if len(ranks) == 1 else "ranks"
            places.append(f"{noun} {', '.join(ranks)}: {place}")
        blamed = gone or stuck
        return {
            "what": what,
            "where": "; ".join(places),
            "why": why,
            "fix": AGAIN,
            "cause": cause,
            "failed_rank": self.peers.place_of(min(blamed)) if blamed else {},
        }

    def own_error(
        self, error: BaseException, failure: TunesmithError | None, activity: Activity
    ) -> ErrorFields:
        """The fields by which this rank's error ends the others.

        failure: as of `Heartbeat.share_error`.
        """
        if failure is None and isinstance(error, TunesmithError):
            failure = error
        elif failure is None:
            failure = RunError(f"{type(error).__name__}: {first_line(error)}")
        peers = self.peers
        name = peers.names([peers.rank])
        fields = {
            "what": f"{name} failed: {failure.what}",
            "where": failure.where,
            "why": failure.why,
            "fix": failure.fix,
            "cause": failure.cause,
            "reporter": peers.rank,
            # It is newer than the beat that the others have read.
            "failed_rank": peers.place_of(peers.rank),
        }
        if isinstance(error, KeyboardInterrupt | StoppedEarlyError):
            fields |= {
                "what": f"{name} was stopped by {self.probes.stop_signal() or 'a signal'}",
                "where": activity.doing,
                "why": "",
                "fix": AGAIN,
                "stopped": True,
            }
        return fields
