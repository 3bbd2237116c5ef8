"""Prompts with the answers of other rows, from which a method learns how far a model has moved."""

from collections.abc import Sequence

import numpy as np

from tunesmith.data.batch import Batch, Example, collate
from tunesmith.data.pack import best_fit_decreasing
from tunesmith.units import ceil_div


def mismatched_examples(examples: Sequence[Example], most: int) -> list[Example]:
    """Each prompt with the answer of the example before it, the first with that of the last.

    most: tokens that an example may have; the end of a longer one is left out.
    """
    mismatched = []
    for i, example in enumerate(examples):
        other = examples[i - 1]
        prompt = example.ids[: int(example.trained.argmax())]
        first = int(other.trained.argmax())
        ids = np.concatenate([prompt, other.ids[first:]])[:most]
        # As in its own row: what a template writes behind the end token is not supervised.
        trained = np.concatenate([np.zeros(len(prompt), bool), other.trained[first:]])[:most]
        mismatched.append(Example(ids, trained, label=other.label))
    return mismatched


def lay_out(
    examples: Sequence[Example],
    *,
    room: int,
    pad_id: int,
    packed: bool,
    pad_to: int | None = None,
    multiple: int = 1,
    bound: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[Batch]:
    """Batches of examples that stand in no schedule, for forward passes alone.

    Args:
        room: tokens of a batch, or more where one example has more.
        packed: several examples share a row; else each has its own.
        pad_to: length of every row; None: as long as need be, in a multiple of `multiple`.
        share: (data rank, data ranks): whose batches these are. Each rank gets as many, the last
            ones without an example where there are too few.
    """
    lengths = [len(example.ids) for example in examples]
    room = max(pad_to or room, *lengths)
    groups = best_fit_decreasing(lengths, room) if packed else [[i] for i in range(len(examples))]
    rank, ranks = share
    batches = []
    for first in range(0, len(groups), ranks):
        mine = first + rank
        row = [examples[i] for i in groups[mine]] if mine < len(groups) else []
        length = pad_to or max(1, sum(len(example.ids) for example in row))
        length = ceil_div(length, multiple) * multiple
        batches.append(collate([row], length=length, pad_id=pad_id, bound=bound))
    return batches
