"""Positions of tokens in models that give a picture's tokens rows and columns (M-RoPE)."""

from collections.abc import Sequence

import numpy as np


def picture_spans(
    ids: np.ndarray, token_id: int, edges: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Find the runs of a picture's tokens: the first place of each, and the one after its last.

    Pictures without a token between them are one run, as Transformers takes them for one; those of
    two documents are not.

    Args:
        ids: of a flattened block.
        token_id: as of `mrope_positions`.
        edges: of its documents, from 0 to its length.
    """
    is_picture = ids == token_id
    begins = is_picture.copy()
    begins[1:] &= ~is_picture[:-1]
    starts = np.array([edge for edge in edges if edge < len(ids)], dtype=np.int64)
    begins[starts] = is_picture[starts]
    ends = is_picture.copy()
    ends[:-1] &= ~is_picture[1:] | begins[1:]
    stops = np.flatnonzero(ends) + 1
    return tuple(zip(np.flatnonzero(begins).tolist(), stops.tolist(), strict=True))


def mrope_positions(ids: np.ndarray, token_id: int, grids: np.ndarray) -> np.ndarray:
    """Positions of one document, int64 [3, n]: time, row and column.

    A text counts on, the same on all axes. A picture stands at one time, its tokens at their rows
    and columns, from where the text before it ended; the text behind it goes on after the largest.
    "Qwen2-VL", https://arxiv.org/abs/2409.12191, section 2.1.

    Args:
        ids: [n].
        token_id: the token that stands in place of a picture's features.
        grids: [pictures, 2], rows and columns of those tokens.
    """
    positions = np.empty((3, len(ids)), dtype=np.int64)
    places = np.flatnonzero(ids == token_id)
    at = 0
    next_position = 0
    taken = 0
    for rows, columns in grids.tolist():
        start = int(places[taken])
        positions[:, at:start] = next_position + np.arange(start - at)
        next_position += start - at
        taken += rows * columns
        at = start + rows * columns
        cells = np.indices((1, rows, columns)).reshape(3, -1)
        positions[:, start:at] = next_position + cells
        next_position += max(rows, columns)
    positions[:, at:] = next_position + np.arange(len(ids) - at)
    return positions
