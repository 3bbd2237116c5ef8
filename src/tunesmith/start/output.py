"""First stage of a command that writes a run directory: lock the directory, and decide how the run
starts.

This module imports neither torch nor Transformers.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.checkpoint.claim import Claim, claim_run_dir, move_aside
from tunesmith.checkpoint.previous_crash import find_previous_crash, note_running
from tunesmith.checkpoint.replicate import choose_run_dir_writers
from tunesmith.checkpoint.resume import Start, decide_start
from tunesmith.checkpoint.start_adapter import adapter_of_run, folder_in_run, is_run_dir
from tunesmith.config.paths import inputs_of
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import Ranks, as_usage_error
from tunesmith.errors import RunError, UsageError
from tunesmith.parallel.mesh_shape import possible_shapes
from tunesmith.units import count_of


@dataclass(frozen=True)
class OutputFacts:
    """The locked run directory of a recipe.

    Attributes:
        ranks: the ranks, with the rank that writes the run directory of each node.
        claim: the claim of this rank's run directory. None on ranks that do not write it.
        starts_over: whether an earlier run in the directory is moved aside.
        crash: how the previous process of this run was killed. None if it was not killed.
    """

    run: Run
    ranks: Ranks
    claim: Claim | None
    starts_over: bool
    crash: RunError | None

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir)


@contextmanager
def open_output(run: Run, ranks: Ranks, *, fresh: bool = False) -> Iterator[OutputFacts]:
    """Lock the run directory until the end of the context. This is a collective call.

    Nodes that do not share rank 0's disk each lock their own directory.

    Args:
        fresh: whether to start a new run, even if the directory contains a run.

    Raises:
        UsageError: the ranks do not suit the recipe, or the directory is not from a run.
        MachineError: the directory is not writable, or another run holds its lock.
    """
    out = Path(run.output_dir)
    with ranks.raise_on_all_ranks():
        # Check that the ranks can train the recipe.
        possible_shapes(run.parallel, ranks.world)
        if run.profile.enabled and run.profile.ranks != "all":
            highest = max(run.profile.ranks, default=0)
            if highest >= ranks.world:
                raise UsageError(
                    f"profile.ranks contains rank {highest}, but the run has only "
                    f"{count_of(ranks.world, 'rank')} (the first is rank 0)",
                    where="profile.ranks",
                    fix="set profile.ranks=[0], or profile.ranks=all",
                )
    with ExitStack() as stack:
        # `lock` creates the directory, and runs only on ranks that write it. The other ranks must
        # not look for the directory before it exists, because a network file system caches that a
        # name is missing.
        claims: list[Claim] = []

        def lock() -> None:
            claims.append(stack.enter_context(claim_run_dir(out, inputs_of(run).values())))

        ranks = choose_run_dir_writers(ranks, out, lock)
        starts_over = fresh or run.checkpoint.resume == "never"
        crash = None if starts_over else find_previous_crash(out)
        yield OutputFacts(run, ranks, claims[0] if claims else None, starts_over, crash)


def find_start(output: OutputFacts) -> Start:
    """Decide how the run starts in its directory. This is a collective call. See `decide_start`."""
    if output.starts_over:
        return Start()
    with as_usage_error():
        return decide_start(output.run, output.ranks)


def begin_run(run: Run, output: OutputFacts, stack: ExitStack) -> Sequence[Path | None]:
    """Mark the directory as this run's directory. If the run starts over, first move an earlier run
    to another folder. This is a collective call.

    Call this after the inputs are read, so that a mistake in them does not move the earlier run.

    Args:
        run: the recipe, which lists the files that must not be moved.
        stack: at its end, the note that this process is training is removed.

    Returns:
        For each rank, the folder to which it has moved an earlier run, or None.
    """
    place = None
    with output.ranks.raise_on_all_ranks():
        if output.starts_over and output.ranks.is_run_dir_writer:
            place = move_aside(output.folder, inputs_of(run).values())
    places = output.ranks.all_gather_object(place)
    if output.claim is not None:
        output.claim.begin()
        stack.enter_context(note_running(output.folder))
    return places


def with_start_adapter(run: Run, start: Start, ranks: Ranks) -> tuple[Run, str]:
    """Return the recipe, and which checkpoint's adapter the run continues. If `adapter.from` is a
    run directory, replace it by the adapter's folder in it.

    A resumed run gets the folder with which it began, even if the run that `adapter.from` names has
    newer checkpoints. This is a collective call.
    """
    name = run.adapter.from_
    if name is None:
        return run, ""
    folder = None
    note = ""
    with ranks.raise_on_all_ranks(), as_usage_error(ranks):
        if start.previous_run is not None:
            folder = folder_in_run(start.previous_run.adapter.from_, name)
        elif ranks.is_main_process and is_run_dir(name):
            adapter, note = adapter_of_run(Path(name))
            folder = adapter.name
    folder = ranks.broadcast_object(folder)
    if folder is None:
        return run, ""
    # `name` is the path on this node and `folder` is only a folder's name, because the nodes may
    # store the run directory under different paths.
    return replace(run, adapter=replace(run.adapter, from_=str(Path(name, folder)))), note
