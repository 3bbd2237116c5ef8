"""Positions of tokens in models that give a picture's tokens rows and columns (M-RoPE)."""

import numpy as np


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
