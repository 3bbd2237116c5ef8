"""When a run is over."""

from dataclasses import dataclass

from tunesmith.checkpoint.resume import Progress


@dataclass(frozen=True)
class Duration:
    """The length of a run: `steps` optimizer steps or, where these are None, `seconds`.

    With `pause_after` it leaves after that step, to go on in a later start: a sweep does that.
    """

    steps: int | None
    seconds: float
    pause_after: int | None = None

    def is_complete(self, progress: Progress) -> bool:
        """Tell whether the whole run is over."""
        if self.steps is not None:
            return progress.step >= self.steps
        return progress.seconds >= self.seconds

    def is_over(self, progress: Progress) -> bool:
        """Tell whether this start takes no more steps."""
        if self.pause_after is not None and progress.step >= self.pause_after:
            return True
        return self.is_complete(progress)
