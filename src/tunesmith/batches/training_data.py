"""The examples of a run with their batch schedule, and what the checks of its rows found."""

from dataclasses import dataclass, replace
from typing import Self

from tunesmith.batches.schedule import BatchSchedule
from tunesmith.config.schema import Run
from tunesmith.rows.compare.splits import Splits
from tunesmith.tokens.contract import Contract
from tunesmith.tokens.text.template import Template
from tunesmith.tokens.token_set import Repeats, SourceTokens, TokenSet


@dataclass(frozen=True)
class TrainingData:
    """The examples of a run, their batch schedule, and the results of all checks.

    Attributes:
        validation: the validation examples, or None if there are none.
        duplicates: training examples that repeat an earlier training example.
        overlap: validation examples that are also training examples.
        splits: the training rows and the validation rows, with the problems that were found in
            them.
        across: pairs of near-duplicates. The first row number is from `data.validation` and the
            second is from `data.train`. Rows are counted over all sources of a split.
        validation_digest: sha256 (hex) of all validation examples, including examples that
            `validate.max_examples` excludes.
        position_limit: maximum sequence length of the model, or None if it has no limit.
    """

    run: Run
    train: TokenSet
    validation: TokenSet | None
    template: Template
    schedule: BatchSchedule
    contracts: tuple[Contract, ...]
    duplicates: Repeats
    overlap: Repeats
    splits: Splits
    across: tuple[tuple[int, ...], ...] = ()
    validation_digest: str | None = None
    position_limit: int | None = None

    @property
    def digest(self) -> str:
        """sha256 (hex) of the training examples: tokens, mask, order in the source, and weights."""
        return self.train.counts.digest

    def repeated(self, steps: int) -> Self:
        """Return the data with repeated examples, so that the first `steps` steps are full."""
        schedule = self.schedule
        repeats = self.train.repeats
        while schedule.ends_short and schedule.steps_per_epoch(0) <= steps:
            repeats = repeats * 2
            schedule = BatchSchedule(self.run, self.train, repeats)
        return replace(self, schedule=schedule)

    def sources(self) -> list[tuple[str, SourceTokens]]:
        """Return each source with the name of its split, `train` or `validation`."""
        sources = [("train", part) for part in self.train.parts]
        if self.validation is not None:
            sources += [("validation", part) for part in self.validation.parts]
        return sources
