"""Text about the run directories of a start."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.distributed.ranks import Ranks


def writers_lines(ranks: Ranks) -> Iterator[str]:
    """Yield a line if several ranks write a run directory, because the nodes share no disk."""
    other_writers = sorted({*ranks.run_dir_writers} - {0})
    if other_writers:
        names = ", ".join(map(ranks.name, other_writers))
        yield (
            f"the nodes have no shared disk: the nodes with {names} keep their own checkpoints; "
            f"metrics.jsonl and final/ are only on the node with {ranks.name(0)}"
        )


def adapter_lines(note: str) -> Iterator[str]:
    """Yield a line if the run continues an adapter that was chosen from a run directory.

    Args:
        note: which checkpoint's adapter it is. Empty if none was chosen.
    """
    if note:
        yield f"training continues from this adapter: {note}"


def moved_lines(places: Sequence[Path | None], ranks: Ranks) -> Iterator[str]:
    """Yield a line for each earlier run that was moved.

    Args:
        places: the result of `begin_run`.
    """
    for rank, place in enumerate(places):
        if place:
            node = f" on the node of {ranks.name(rank)}" if rank else ""
            yield f"moved the existing run to {place}{node}"
