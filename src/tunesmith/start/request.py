"""The request that a command makes to the stages of a start."""

from dataclasses import dataclass, field
from typing import Literal

from tunesmith.checkpoint.resume import Start
from tunesmith.config.schema import Run

# "measure": measure the speed of training. Nothing is saved, so no disk space is needed, and
# truncated answers are only a warning.
# "show": show the facts to the user. Failed checks of the tokens raise no error, and packages that
# only a training needs may be missing.
Purpose = Literal["train", "measure", "show"]
Weights = Literal["stored", "random"]


@dataclass(frozen=True)
class Request:
    """A recipe, and what it is used for.

    Attributes:
        start: how the run starts.
        weights: "random" if the weights are drawn at random. The folder `model.name` then needs no
            weights.
    """

    run: Run
    start: Start = field(default_factory=Start)
    purpose: Purpose = "train"
    weights: Weights = "stored"
