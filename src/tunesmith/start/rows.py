"""Stage 1 of a start: open the rows of the recipe. It imports neither torch nor Transformers."""

from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.checkpoint.resume import restore_resolved_values
from tunesmith.config.paths import find_local_model
from tunesmith.config.schema import Run
from tunesmith.rows.bad_rows import error_of_sources, find_bad_rows
from tunesmith.rows.compare.splits import OpenedRows, open_sources
from tunesmith.rows.source.folders import check_local
from tunesmith.rows.source.open_source import is_local
from tunesmith.start.request import Request
from tunesmith.start.scorer_names import check_scorers

# Maximum size of a file whose rows are all checked in this stage. The check of a larger file would
# take seconds. Its rows are checked when they are tokenized.
MAX_EARLY_BYTES = 4 << 20


@dataclass(frozen=True)
class RowFacts:
    """The rows of a recipe.

    Attributes:
        request: the recipe. If the run is resumed, the values with which it was started replace
            `auto` in the model section.
        opened: the sources, which are open. Their rows are read when they are needed.
    """

    request: Request
    opened: OpenedRows

    @property
    def run(self) -> Run:
        return self.request.run


def open_rows(
    request: Request, known: RowFacts | None = None, opened: OpenedRows | None = None
) -> RowFacts:
    """Open the sources of a recipe, and check the rows of small files.

    Args:
        known: rows that are open and checked, because the recipe was created for them.
        opened: rows that are open, but not checked. They are used for equal sources.

    Raises:
        ModelError: the model is a path that does not exist.
        DataError: a source cannot be read, or small files have bad rows. The error lists the bad
            rows of all small files.
    """
    run = request.run
    check_scorers(run)
    data = run.data
    for source in (*data.train, *data.validation):
        if is_local(source.source):
            check_local(Path(source.source).expanduser(), source.name)
    opened = open_sources(data, known.opened if known else opened)
    refused = []
    for source, rows in () if known else (*opened.train, *opened.validation):
        path = Path(source.source).expanduser()
        is_small = path.is_file() and path.stat().st_size <= MAX_EARLY_BYTES
        # If `leave_out` is set, bad rows can be excluded from the run and are no error.
        if is_small and not data.leave_out:
            bad = find_bad_rows(rows, source, data.system)
            if bad and (data.bad_rows == "error" or bad.count == bad.rows):
                refused.append(bad)
    if refused:
        raise error_of_sources(refused)
    find_local_model(run.model.name)
    model = restore_resolved_values(run.model, request.start.previous_run)
    return RowFacts(replace(request, run=replace(run, model=model)), opened)
