"""Check of the scorers that a recipe names, before its rows are read. It imports no numpy."""

from collections.abc import Iterator
from contextlib import contextmanager

from tunesmith.answers.scoring.scorers import check_scorer_names
from tunesmith.config.schema import Run
from tunesmith.errors import DataError, RunError, UsageError


@contextmanager
def errors_of_reward() -> Iterator[None]:
    """Raise errors of scorers as errors of the recipe, before the run begins."""
    try:
        yield
    except RunError as error:
        fix = error.fix.partition(", then")[0]
        raise DataError(error.what, where=error.where, why=error.why, fix=fix) from None
    except UsageError as error:
        error.where = error.where.replace("--score", "method.reward")
        error.fix = error.fix.replace("--score ", "method.reward=")
        raise


def check_scorers(run: Run) -> None:
    """Raise UsageError if `method.reward` names a scorer that does not exist."""
    if run.samples_answers:
        with errors_of_reward():
            check_scorer_names(run.method.reward)
