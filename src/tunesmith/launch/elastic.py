"""Subclass of torch's elastic agent.

It reports ranks that were killed by a signal, and it does not restart ranks after a stop signal.

If a rank is killed, ranks on other nodes only notice that its heartbeat stops. Only the agent on
the node of the killed rank knows the reason.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from time import sleep
from types import FrameType
from typing import TYPE_CHECKING

from torch.distributed import PrefixStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from tunesmith.distributed.diagnosis import AGAIN, ErrorFields
from tunesmith.distributed.heartbeat import UNDECIDED
from tunesmith.distributed.ranks import HEARTBEAT_NAME
from tunesmith.distributed.torch_private import set_elastic_agent
from tunesmith.errors import CAUSES, EXIT_INTERRUPTED, EXIT_STOPPED, StoppedError
from tunesmith.host.memory import oom_kills
from tunesmith.host.signals import SIGNAL_NAMES

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# Seconds to wait after a fault is reported, so that the ranks of other nodes can read it. They
# check once per second.
READ_TIME = 2.5
# Exceptions that torch's TCPStore raises.
STORE_ERRORS = (RuntimeError, ValueError)


class ForwardStop:
    """A handler that forwards stop signals to the ranks of this node.

    Creating an instance installs the handler. A signal that comes before the ranks are started ends
    the agent's process.

    Attributes:
        number: the number of the last stop signal, or 0.
        ranks_began: whether ranks were started. From then on the ranks decide how the run ends.
    """

    def __init__(self) -> None:
        self.number = 0
        self.ranks_began = False
        self._signalled: set[int] = set()
        for name in SIGNAL_NAMES:
            # Do not handle a signal that the calling program ignores. For example, `nohup` ignores
            # SIGHUP.
            if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN:
                signal.signal(signal.Signals[name], self._forward)

    def not_begun(self, why: str) -> StoppedError:
        """Build the error for a stop before the first training step."""
        return StoppedError(
            f"stopped by {signal.Signals(self.number).name} before the first step",
            why=why,
            fix="start the same command again",
        )

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        name = signal.Signals(number).name
        host = socket.gethostname()
        line = f"the node agent on {host} received {name} and forwards it to its ranks\n"
        # Use os.write, because the signal may have interrupted a `print`, which is not reentrant.
        os.write(sys.stderr.fileno(), line.encode())
        self.send(again=True)
        if not self.ranks_began:
            raise self.not_begun("the other nodes had not joined yet")

    def send(self, *, again: bool) -> None:
        """Send the last signal to the ranks of this node.

        Args:
            again: also send it to ranks that have already received a signal.
        """
        import psutil

        for rank in psutil.Process().children():
            if again or rank.pid not in self._signalled:
                self._signalled.add(rank.pid)
                rank.send_signal(self.number)


def install_agent(store: "TCPStore", stop: ForwardStop) -> None:
    """Make torch's launcher use the agent of this module.

    Args:
        store: the store of the ranks of all nodes.
        stop: the handler of this process's stop signals.
    """

    class Agent(LocalElasticAgent):
        """torch's elastic agent that also handles stop signals and reports killed ranks."""

        def _start_workers(self, worker_group: WorkerGroup) -> dict[int, object]:
            if stop.number:
                raise stop.not_begun("the ranks were being restarted")
            stop.ranks_began = True
            # The kernel counts out-of-memory kills since boot. Save the count now, to compute later
            # how many processes were killed during this attempt.
            self._oom_kills = oom_kills()
            return super()._start_workers(worker_group)

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            # Send the stop signal to ranks that were still starting when it came.
            if stop.number:
                stop.send(again=False)
            result: RunResult = super()._monitor_workers(worker_group)
            if result.state != WorkerState.FAILED:
                return result
            codes = {failure.exitcode for failure in result.failures.values()}
            if stop.number or codes & {EXIT_STOPPED, EXIT_INTERRUPTED}:
                # Keep torch from restarting failed ranks after a stop signal.
                self._remaining_restarts = 0
            # A negative exit code is the number of the signal that ended the process.
            signals = {
                rank: -failure.exitcode
                for rank, failure in result.failures.items()
                if failure.exitcode < 0
            }
            # Report only if there are several nodes. On a single node, the launcher prints the
            # signal.
            if signals and (worker_group.group_world_size or 1) > 1:
                publish_killed(store, signals, new_oom_kills=oom_kills() - self._oom_kills)
            return result

    set_elastic_agent(Agent)


def publish_killed(store: "TCPStore", signals: dict[int, int], *, new_oom_kills: int) -> None:
    """Report a killed rank of this node to the ranks of other nodes, and wait until they read it.

    Do nothing if the node with the store has failed, or if the ranks have not connected to the
    store yet.

    Args:
        store: the store of the ranks of all nodes.
        signals: the number of the signal for each killed rank.
        new_oom_kills: number of out-of-memory kills by the kernel since the ranks were started.
    """
    # If several ranks were killed, report only the lowest of them.
    rank = min(signals)
    try:
        if not store.check([HEARTBEAT_NAME]):
            return
        heartbeats = PrefixStore(store.get(HEARTBEAT_NAME).decode(), store)
        beat = json.loads(heartbeats.get(f"beat/{rank}"))
        fault = kill_fault(rank, signals[rank], beat, is_oom=new_oom_kills > 0)
        # Do not replace an earlier fault, because a rank may already have read it.
        heartbeats.compare_set("fault", UNDECIDED, json.dumps(fault))
        sleep(READ_TIME)
    except STORE_ERRORS:
        return


def kill_fault(rank: int, number: int, beat: Mapping[str, str], *, is_oom: bool) -> ErrorFields:
    """Build the error that ends all ranks, in the format that the heartbeats use.

    Args:
        rank: the killed rank.
        number: the number of the signal.
        beat: the last heartbeat of the killed rank.
        is_oom: whether the kernel has killed a process because memory was exhausted.
    """
    host = socket.gethostname()
    name = signal.Signals(number).name
    cause = "killed"
    why = f"the agent of the rank's node reported {name}"
    if number == signal.SIGKILL and is_oom:
        cause = "oom-kill"
        why += f"; {CAUSES[cause]}"
    return {
        "what": f"rank {rank} on {host} was killed by {name}",
        "where": f"rank {rank}: {beat['place']}" if beat.get("place") else "",
        "why": why,
        "fix": AGAIN,
        "cause": cause,
        "failed_rank": {
            "rank": rank,
            "host": host,
            "phase": beat.get("phase") or None,
            "collective": beat.get("collective") or None,
        },
    }
