"""Requests to stop a run, and the agreement of all ranks about stops and failed checkpoint writes.

At first, only one rank knows about a signal, the file `stop` or low memory. The ranks share such
requests in the reduction of each step (see `step_scalars`), and all of them stop after the same
step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.host.signals import StopRequest
from tunesmith.run_dir import STOP_FILE


class RankStatus(NamedTuple):
    """Status of one rank, as numbers that are summed over all ranks. All ranks then have the same
    sums.
    """

    stop_requests: float  # 1 if this rank has a request to stop
    failed_writes: float  # 1 if this rank failed to write a checkpoint
    ends: float  # 1 if the caller of `train` ends the run


@dataclass
class StopControl:
    """Decides when a run must stop. It holds the requests to this process, and the requests that
    all ranks know.

    Attributes:
        request: request to this process by a signal or by low memory.
        run_dir: folder in which rank 0 looks for the file `stop`.
        wants_end: returns whether the caller of `train` wants to end the run. Only rank 0 uses it.
        requested: whether this rank has found a request to stop.
        agreed: the status that all ranks have shared, see `RankStatus`.
    """

    request: StopRequest
    run_dir: Path
    ranks: Ranks = ONE_PROCESS
    wants_end: Callable[[], bool] = lambda: False
    requested: bool = field(default=False, init=False)
    agreed: RankStatus = field(default=RankStatus(0.0, 0.0, 0.0), init=False)

    def is_requested(self) -> bool:
        """Return whether this rank has a request to stop. On rank 0, an existing file `stop` counts
        as a request, even if it is deleted later.
        """
        self.requested = self.requested or self.request.requested()
        if self.ranks.is_main_process and not self.requested:
            self.requested = (self.run_dir / STOP_FILE).exists()
        return self.requested

    def is_due(self) -> bool:
        """Return whether the run must stop. With several ranks, only requests that all ranks know
        count.
        """
        # If only one rank stopped, the other ranks would wait in a collective.
        if self.ranks.world > 1:
            return self.agreed.stop_requests > 0
        return self.is_requested()

    def ends(self) -> bool:
        """Return whether the caller of `train` has ended the run. In this case final/ is written,
        but not after a requested stop.
        """
        return self.agreed.ends > 0 if self.ranks.world > 1 else self.wants_end()

    def agree(self) -> None:
        """Share stop requests among all ranks outside a step: before the first step, and before and
        after answers are sampled, because this can take minutes. This is a collective call.
        """
        if self.ranks.world > 1:
            own = RankStatus(float(self.is_requested()), 0.0, float(self.wants_end()))
            for status in self.ranks.all_gather_object(own):
                self.agree_on(status)

    def agree_on(self, status: RankStatus) -> None:
        """Add the status that the ranks have shared in a step. Earlier requests are kept."""
        self.agreed = RankStatus(*map(max, self.agreed, status))

    def drops_step(self) -> bool:
        """Return whether to abort the current step because of low memory. With several ranks, the
        step is always finished, because the other ranks need this rank in their collectives.
        """
        return self.ranks.world == 1 and self.request.low_memory is not None

    def cancels_validation(self) -> bool:
        """Return whether to abort a validation. With several ranks, it is always finished, because
        the ranks share requests to stop only in the next step.
        """
        return self.ranks.world == 1 and self.request.requested()

    def cancels_sampling(self) -> bool:
        """Return whether to draw no more tokens, because a rank has a request to stop.

        The ranks sample different prompts without collectives, so the requests of other ranks come
        with their heartbeats. Call `agree` afterwards.
        """
        heartbeat = self.ranks.heartbeat
        heartbeat.progress()
        self.requested = heartbeat.share_stop(self.is_requested())
        return self.requested

    def expect_step(self, seconds: float, *, micro_batches: int) -> None:
        """Store an estimate of the time until a requested stop takes effect. `seconds` is the
        duration of the last step.
        """
        if self.ranks.world > 1:
            # The request takes effect two steps later at most, because the ranks exchange it during
            # the next step.
            self.request.takes = 2 * seconds
        else:
            self.request.takes = seconds / micro_batches
