"""Base class of the parts of the training loop, and the objects that these parts share."""

from dataclasses import dataclass
from pathlib import Path

from tunesmith.checkpoint.resume import Progress
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import Ranks
from tunesmith.metrics.sink import Sinks
from tunesmith.train_model import Method
from tunesmith.training.session import Session
from tunesmith.training.stop_control import StopControl
from tunesmith.units import Cadence, Length


@dataclass
class LoopShared:
    """Objects that the trainer and the parts of its loop share.

    Attributes:
        progress: the state of the run, which is saved in a checkpoint.
    """

    session: Session
    progress: Progress
    sinks: Sinks
    stop: StopControl


class LoopPart:
    """Base class of a part of the training loop, such as validation. All ranks call its methods at
    the same step.
    """

    def __init__(self, shared: LoopShared) -> None:
        self.session = shared.session
        self.progress = shared.progress
        self.sinks = shared.sinks
        self.stop = shared.stop

    @property
    def run(self) -> Run:
        return self.session.run

    @property
    def method(self) -> Method:
        return self.session.method

    @property
    def ranks(self) -> Ranks:
        return self.session.ranks

    @property
    def out(self) -> Path:
        """The run directory."""
        return Path(self.run.output_dir)

    def cadence(self, every: Length | None) -> Cadence:
        """Return an object that tells after each step whether an action with the interval `every`
        is due.
        """
        return Cadence(
            every,
            total=self.session.total_steps,
            steps_per_epoch=self.session.data.schedule.steps_per_epoch(0),
            seconds=self.progress.seconds,
        )
