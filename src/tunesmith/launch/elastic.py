"""torch's elastic agent of a node, with two things added: it names ranks that a signal killed, and
starts none after a stop signal.

The heartbeats of other nodes cannot see why a rank of this node is silent: its agent can.
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
from tunesmith.errors import CAUSES, StoppedError
from tunesmith.host.memory import oom_kills
from tunesmith.host.signals import SIGNAL_NAMES

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# Seconds in which the ranks of other nodes read the fault: they look once a second
READ_TIME = 2.5
# torch's errors of a store
STORE_ERRORS = (RuntimeError, ValueError)


class ForwardStop:
    """Hands stop signals on to the ranks of this node, from when it is created.

    Before there are any a signal ends the agent.

    Attributes:
        number: of the last stop signal; 0: none came.
        ranks_began: whether ranks were started: from then on they decide how the run ends.
    """

    def __init__(self) -> None:
        self.number = 0
        self.ranks_began = False
        self._signalled: set[int] = set()
        for name in SIGNAL_NAMES:
            # nohup ignores SIGHUP for its command, which stays so.
            if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN:
                signal.signal(signal.Signals[name], self._forward)

    def not_begun(self, why: str) -> StoppedError:
        """The error of a stop before the first step."""
        what = f"stopped by {signal.Signals(self.number).name} before the first step"
        return StoppedError(what, why=why, fix="start the same command again")

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        name = signal.Signals(number).name
        agent = f"the node agent on {socket.gethostname()}"
        line = f"{name} came to {agent}, which forwards it to its ranks\n"
        # The signal may have come in the middle of a print, which cannot be entered again.
        os.write(sys.stderr.fileno(), line.encode())
        self.send(again=True)
        if not self.ranks_began:
            raise self.not_begun("the other nodes had not joined yet")

    def send(self, *, again: bool) -> None:
        """Hand the last signal on, `again` also to ranks that have got one."""
        import psutil

        for rank in psutil.Process().children():
            if again or rank.pid not in self._signalled:
                self._signalled.add(rank.pid)
                rank.send_signal(self.number)


def install_agent(store: "TCPStore", stop: ForwardStop) -> None:
    """Let torch's launcher use the agent of this module.

    Args:
        store: of the ranks of all nodes.
        stop: the stop signals of this process.
    """

    class Agent(LocalElasticAgent):
        """torch's own, which sees signals: those to itself, and those that killed a rank."""

        def _start_workers(self, worker_group: WorkerGroup) -> dict[int, object]:
            if stop.number:
                raise stop.not_begun("the ranks were being restarted")
            stop.ranks_began = True
            # The kernel counts kills since its start: the difference is that of this attempt.
            self._oom_kills = oom_kills()
            return super()._start_workers(worker_group)

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            # Ranks may have been starting when the signal came.
            if stop.number:
                stop.send(again=False)
            result: RunResult = super()._monitor_workers(worker_group)
            if result.state != WorkerState.FAILED:
                return result
            if stop.number:
                # torch starts failed ranks again; after a stop it must not.
                self._remaining_restarts = 0
            signals = {}
            for rank, failure in result.failures.items():
                # As of subprocess: a signal is a negative exit code.
                if failure.exitcode < 0:
                    signals[rank] = -failure.exitcode
            # On one node all ranks have the same agent, which prints the signal.
            nodes = worker_group.group_world_size or 1
            if signals and nodes > 1:
                publish_killed(store, signals, new_oom_kills=oom_kills() - self._oom_kills)
            return result

    set_elastic_agent(Agent)


def publish_killed(store: "TCPStore", signals: dict[int, int], *, new_oom_kills: int) -> None:
    """Tell the ranks of other nodes which rank of this one was killed, and wait until they know.

    The store may be gone with its node, and ranks may not have met yet: then nobody waits for it.

    Args:
        signals: the ranks that were killed, and the numbers of the signals.
        new_oom_kills: of the kernel, since the ranks were started.
    """
    # The lowest rank stands for all that were killed.
    rank = min(signals)
    try:
        if not store.check([HEARTBEAT_NAME]):
            return
        heartbeats = PrefixStore(store.get(HEARTBEAT_NAME).decode(), store)
        beat = json.loads(heartbeats.get(f"beat/{rank}"))
        fault = kill_fault(rank, signals[rank], beat, is_oom=new_oom_kills > 0)
        # The first fault stands: a rank may have seen it before.
        heartbeats.compare_set("fault", UNDECIDED, json.dumps(fault))
        sleep(READ_TIME)
    except STORE_ERRORS:
        return


def kill_fault(rank: int, number: int, beat: Mapping[str, str], *, is_oom: bool) -> ErrorFields:
    """The error that ends all ranks, in the fields that their heartbeats expect.

    Args:
        number: of the signal.
        beat: the last of the killed rank.
        is_oom: whether the kernel has killed for want of memory.
    """
    host = socket.gethostname()
    name = signal.Signals(number).name
    cause = "oom-kill" if number == signal.SIGKILL and is_oom else "killed"
    why = f"its node agent saw {name}"
    return {
        "what": f"rank {rank} on {host} was killed by {name}",
        "where": f"rank {rank}: {beat['place']}" if beat.get("place") else "",
        "why": f"{why}; {CAUSES[cause]}" if cause == "oom-kill" else why,
        "fix": AGAIN,
        "cause": cause,
        "failed_rank": {
            "rank": rank,
            "host": host,
            "phase": beat.get("phase") or None,
            "collective": beat.get("collective") or None,
        },
    }
