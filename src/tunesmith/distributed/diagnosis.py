"""Diagnosis of faults in a distributed run, from the heartbeat messages ("beats") of the ranks. The
diagnosis returns the fields of the error that ends all ranks. An error that a rank raises and a
killed process are detected at once. A broken connection and a lost launcher are detected within
seconds. A rank without heartbeats is detected after the limit of the heartbeat, and a stuck main
thread after the limit of its phase.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from tunesmith.distributed.activity import Activity, Probes
from tunesmith.distributed.beats import Peers
from tunesmith.errors import RunError, StoppedEarlyError, TunesmithError, first_line
from tunesmith.host.memory import oom_kills

# After a connection is broken, a rank that misses this number of consecutive beats (heartbeat
# messages) counts as the cause.
MISSED_BEATS = 4
AGAIN = "start the same command again: it resumes from the newest checkpoint"

# Arguments of a RunError, and values that say how the error is reported. The store holds them as
# JSON.
ErrorFields = dict[str, Any]


@dataclass(eq=False)
class Diagnosis:
    """Object that searches for faults in the heartbeat messages of all ranks.

    Attributes:
        broken: torch's message about a broken connection, or "".
        broken_at: the time at which the broken connection was detected, in seconds of the clock.
        ended_at: the time at which an ended process was detected, in seconds of the clock.
        first_oom_kills: the kernel's count of out-of-memory kills at the start of the run.
    """

    peers: Peers
    probes: Probes
    broken: str = ""
    broken_at: float = 0.0
    ended_at: float = 0.0
    first_oom_kills: int = field(default_factory=oom_kills)

    def note_broken(self, text: str) -> None:
        """Record that a connection is broken. From then on, a rank that misses a few heartbeat
        messages counts as the cause of the broken connection.

        Args:
            text: torch's message.
        """
        # Set `broken_at` before `broken`, because another thread reads `broken_at` as soon as
        # `broken` is set.
        self.broken_at = self.peers.clock.seconds
        self.broken = text

    def check_collectives(self) -> None:
        """Record the error of a failed collective, because NCCL does not raise the error and the
        GPU waits forever.
        """
        if not self.broken:
            error = self.probes.find_error()
            if error:
                self.note_broken(error)

    def find_fault(self, ended: list[int]) -> ErrorFields:
        """Return the error fields of the fault that the heartbeats show. Return {} if there is no
        fault.

        Args:
            ended: the ranks of this node whose process has ended.
        """
        peers = self.peers
        if ended:
            return self._killed(ended)
        limit = MISSED_BEATS * peers.clock.interval if self.broken else peers.limit
        # A finished rank sends no heartbeats. Missing heartbeats of this rank are a fault only if
        # another rank still waits for it.
        is_waiting = bool(self.broken or peers.own_beat.collective)
        expected = [rank for rank, beat in enumerate(peers.beats) if is_waiting or not beat.is_done]
        # If no connection is broken, a silent rank may be halted. Only ranks of the same node can
        # see that a process is halted. Therefore wait longer for ranks of other nodes, so that a
        # rank of their own node reports first.
        far_limit = limit if self.broken else limit + 2 * peers.clock.interval
        if any(
            peers.is_silent(rank, limit if rank in peers.local else far_limit) for rank in expected
        ):
            # List the ranks that are silent for half the limit, because the ranks of a lost node
            # sent their last heartbeats at slightly different times.
            silent = [rank for rank in expected if peers.is_silent(rank, limit / 2)]
            why, cause = self._likely_cause(
                "the process was killed or stopped, its machine is down, or its network is cut"
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
            what = "a connection between the ranks broke, but all ranks are alive"
            return self.fields(what, self.broken, "link")
        return {}

    def _killed(self, ended: list[int]) -> ErrorFields:
        """Return the error fields for the ranks in `ended`, whose processes were killed."""
        clock = self.peers.clock
        if not self.ended_at:
            self.ended_at = clock.seconds
        # Wait for one more heartbeat of the other ranks, because it names the collective in which
        # they wait.
        if clock.seconds - self.ended_at < clock.interval:
            return {}
        what = f"{self.peers.names(ended)} was killed"
        kills = oom_kills() - self.first_oom_kills
        if kills > 0:
            why = f"the kernel ended {kills} of this machine's processes since the run started"
            return self.fields(what, why, "oom-kill", gone=ended)
        why = "the process exited without a message, because of a signal or a crash"
        return self.fields(what, why, "killed", gone=ended)

    def _find_hang(self) -> ErrorFields:
        """Return the error fields for ranks without progress for the limit of their phase.

        Return {} if there are no such ranks. A rank in a collective waits for the other ranks, so
        it does not count as stuck as long as another rank is not in a collective.
        """
        beats = dict(enumerate(self.peers.beats))
        waiting = [rank for rank, beat in beats.items() if not beat.is_done]
        stuck = [rank for rank in waiting if beats[rank].idle > beats[rank].limit]
        stuck = [rank for rank in stuck if not beats[rank].collective]
        why = "the main thread hangs"
        if not stuck:
            why = "the ranks wait in collectives, for each other or for the network"
            if not all(beats[rank].waiting > beats[rank].waiting_limit for rank in waiting):
                return {}
        idle = stuck or waiting
        if not idle:
            return {}
        seconds = max(beats[rank].idle for rank in idle)
        what = f"{self.peers.names(idle)} made no progress for {seconds:.0f} s"
        fields = self.fields(what, why, "hang", stuck=stuck)
        if not stuck:
            # No rank is blamed, but all of them are in this phase.
            place = self.peers.place_of(idle[0])
            fields["failed_rank"] = {name: place[name] for name in ("phase", "collective")}
        return fields

    def lost_store(self, why: str) -> ErrorFields:
        """Return the error fields for a store that does not answer.

        Args:
            why: torch's message.
        """
        what = f"rank 0 on {self.peers.hosts[0]} or its launcher was lost"
        if self.probes.store_is_closed():
            why = "the machine of rank 0 responds, but the rendezvous store on it does not"
            return self.fields(what, why, "killed")
        return self.fields(
            f"{what}, or the network to it",
            *self._likely_cause(f"the rendezvous store does not answer: {why}"),
        )

    def lost_launcher(self) -> ErrorFields:
        """Return the error fields for the fault that the launcher has ended before this rank."""
        return self.fields(
            f"the launcher of {self.peers.names([self.peers.rank])} has exited",
            "the launcher exited before its ranks",
            "killed",
        )

    def _likely_cause(self, why: str) -> tuple[str, str]:
        """Return the reason why a rank sends no heartbeats, and the name of the cause.

        If this rank has received a stop signal, the network is not the reason: the launcher is
        stopping the ranks.

        Args:
            why: the reason if there was no stop signal.
        """
        signal_name = self.probes.stop_signal()
        if not signal_name:
            return why, "link"
        return (
            f"this rank received {signal_name}: "
            "a launcher ends all ranks of a run when one of them is lost",
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
        """Build error fields that list the location of each remaining rank.

        Args:
            what, why, cause: the fields of the error with these names.
            gone: the ranks that are lost. Their location is not listed.
            stuck: the ranks whose main thread hangs.
        """
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
        """Build the error fields for an error of this rank. The other ranks end with this error.

        Args:
            failure: the error that this rank reports to the user, if its text is not that of
                `error`.
        """
        if failure is None and isinstance(error, TunesmithError):
            failure = error
        elif failure is None:
            failure = RunError(f"{type(error).__name__}: {first_line(error)}")
        peers = self.peers
        name = peers.names([peers.rank])
        fields: ErrorFields = {
            "what": f"{name} failed: {failure.what}",
            "where": failure.where,
            "why": failure.why,
            "fix": failure.fix,
        }
        if isinstance(error, KeyboardInterrupt | StoppedEarlyError):
            fields = {
                "what": f"{name} was stopped by {self.probes.stop_signal() or 'a signal'}",
                "where": activity.doing,
                "why": "",
                "fix": AGAIN,
                "stopped": True,
            }
        # Report the current location of this rank. The other ranks only know the location of its
        # last heartbeat.
        failed_rank = peers.place_of(peers.rank)
        return fields | {"cause": failure.cause, "reporter": peers.rank, "failed_rank": failed_rank}
