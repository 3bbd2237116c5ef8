"""Who asks a run to stop, and what its ranks agree on: a stop, or the failed write of a checkpoint.

A signal, the file `stop` and a shortage of memory come to one rank. The ranks share them in the
reduction of each step (see `step_scalars`), and all stop after the same one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.host.signals import StopRequest
from tunesmith.run_dir import STOP_FILE
from tunesmith.training.step_scalars import RankStatus


@dataclass
class StopControl:
    """The stop of one start of a run: what came to this process, in `request`, and what all ranks
    know and act on.

    Attributes:
        request: the signals of this process, and its shortage of memory.
        run_dir: rank 0 looks for the file `stop` there.
        wants_end: whether the caller of `train` ends the run here; rank 0 knows.
        agreed: what all ranks know of each other, by the last reduction.
    """

    request: StopRequest
    run_dir: Path
    ranks: Ranks = ONE_PROCESS
    wants_end: Callable[[], bool] = lambda: False
    agreed: RankStatus = field(default=RankStatus(0.0, 0.0, 0.0), init=False)

    def is_requested(self) -> bool:
        """Tell whether this rank has a stop request; the file `stop` is one for rank 0."""
        if self.request.requested():
            return True
        return self.ranks.is_main_process and (self.run_dir / STOP_FILE).exists()

    def is_due(self) -> bool:
        """Tell whether the run stops, by a request to this process or, once all know, to a rank."""
        # What one rank alone acts on leaves the others in a collective.
        if self.ranks.world > 1:
            return self.agreed.stop_requests > 0
        return self.is_requested()

    def ends(self) -> bool:
        """Tell whether the run is over by its caller, with final/; see `is_due`."""
        return self.agreed.ends > 0 if self.ranks.world > 1 else self.wants_end()

    def agree(self) -> None:
        """Share before the first step who has a stop request; a collective call."""
        if self.ranks.world > 1:
            requests = self.ranks.all_gather_object(float(self.is_requested()))
            self.agreed = self.agreed._replace(stop_requests=sum(requests))

    def agree_on(self, status: RankStatus) -> None:
        """Take over what a step's reduction has shared; what was agreed before stays."""
        self.agreed = RankStatus(*map(max, self.agreed, status))

    def drops_step(self) -> bool:
        """Tell whether to leave a step midway, for want of memory; several ranks end it first."""
        return self.ranks.world == 1 and self.request.low_memory is not None

    def cancels_validation(self) -> bool:
        """Tell whether to leave a validation midway; several ranks agree in the next step."""
        return self.ranks.world == 1 and self.request.requested()

    def expect_step(self, seconds: float, *, micro_batches: int) -> None:
        """Note how long the work takes that ends before a stop, by the step just measured."""
        if self.ranks.world > 1:
            # The rest of this step, and the next one, whose numbers tell all ranks of the stop.
            self.request.takes = 2 * seconds
        else:
            self.request.takes = seconds / micro_batches
