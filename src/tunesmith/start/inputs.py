"""The stages of a start that need no machine: rows, model files and tokens.

They import no torch, except at the first start with a model, for pictures, and for model types
outside the table of `architectures.py`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.checkpoint.manifest import check_sums
from tunesmith.checkpoint.replicate import copies_in
from tunesmith.checkpoint.resume import Start
from tunesmith.checkpoint.start_adapter import find_adapter, find_local_adapter
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.host import packages
from tunesmith.host.signals import loading_libraries
from tunesmith.metrics.sink import writes_tensorboard
from tunesmith.metrics.trackers import key_and_fix, trackers_of
from tunesmith.start.request import Request
from tunesmith.start.rows import RowFacts, open_rows

if TYPE_CHECKING:
    from tunesmith.start.model import ModelFacts
    from tunesmith.start.tokens import TokenFacts


def read_inputs(
    request: Request, ranks: Ranks = ONE_PROCESS, known: "ModelFacts | None" = None
) -> "TokenFacts":
    """Read the rows, the small files of the model, and the tokens of a recipe.

    Args:
        ranks: the ranks of the run, which all call this function.
        known: facts that were found when the recipe was created. They are used where the recipe has
            the same rows or the same model.

    Raises:
        UsageError: an input is wrong.
    """
    # One rank of each node downloads and tokenizes. The other ranks of the node then read the
    # results from the cache.
    with ranks.raise_on_all_ranks(), ranks.local_main_process_first():
        if request.purpose != "show":
            check_requirements(request.run, request.start)
        rows = open_rows(request, known.rows if known else None)
        if request.purpose != "measure" and ranks.is_main_process:
            _try_rewards(rows)
        # Import these after the rows are checked: they import huggingface_hub, which is slow.
        with loading_libraries():
            from tunesmith.start.model import read_model
            from tunesmith.start.tokens import read_tokens

        return read_tokens(read_model(rows, known=known))


def check_inputs(run: Run) -> None:
    """Check rows, model folder and adapter before a run is started in the background.

    Raises:
        UsageError: an input is missing or damaged.
    """
    # A resumed run does not need the adapter from which it started, because its checkpoints contain
    # a copy.
    if run.adapter.from_ is not None and not copies_in(Path(run.output_dir)):
        find_local_adapter(run.adapter.from_)
    from tunesmith.hub import fetch  # imports huggingface_hub, which is slow

    place = fetch.local_model(run.model)
    if place is not None:
        fetch.check_folder(place, run.model)
    _try_rewards(open_rows(Request(run)))


def _try_rewards(rows: RowFacts) -> None:
    if rows.run.samples_answers:
        from tunesmith.start.rewards import try_scorers

        try_scorers(rows)


def check_requirements(run: Run, start: Start) -> None:
    """Check that the packages of the trackers and the adapter to continue exist."""
    for name in trackers_of(run):
        packages.require(name, **key_and_fix(run, name))
    if writes_tensorboard(run):
        packages.require("tensorboard", where="log.tensorboard", fix="set log.tensorboard=false")
    adapter = run.adapter.from_
    if adapter is not None and start.checkpoint is None:
        check_sums(find_adapter(adapter))
