"""Computation of token positions for M-RoPE, in which each picture token has a row and a column."""

from collections.abc import Sequence

import numpy as np


def picture_spans(
    ids: np.ndarray, token_id: int, edges: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return the start and end index of each run of picture tokens.

    Adjacent pictures of one document form one run, as in Transformers. Pictures of different
    documents are always separate runs.

    Args:
        ids: token ids of a flattened block of documents.
        token_id: the placeholder token of pictures, see `mrope_positions`.
        edges: boundaries of the documents, from 0 to the length of the block.
    """
    is_picture = ids == token_id
    begins = is_picture.copy()
    begins[1:] &= ~is_picture[:-1]
    # The first token of each document starts a new run, if it is a picture token.
    starts = np.array([edge for edge in edges if edge < len(ids)], dtype=np.int64)
    begins[starts] = is_picture[starts]
    ends = is_picture.copy()
    ends[:-1] &= ~is_picture[1:] | begins[1:]
    stops = np.flatnonzero(ends) + 1
    return tuple(zip(np.flatnonzero(begins).tolist(), stops.tolist(), strict=True))


def mrope_positions(ids: np.ndarray, token_id: int, grids: np.ndarray) -> np.ndarray:
    """Return the positions of one document, int64 [3, n]: time, row and column.

    Text tokens have the same position on all axes, and count up. All tokens of a picture have the
    same time, which is the next position after the text. The row and the column of a token in the
    picture are added to this position. The text after a picture starts at the picture's largest
    position + 1 ("Qwen2-VL", https://arxiv.org/abs/2409.12191, section 2.1).

    Args:
        ids: [n], the token ids.
        token_id: the placeholder token, which is replaced by the features of a picture.
        grids: [pictures, 2], the number of rows and columns of each picture's tokens.
    """
    positions = np.empty((3, len(ids)), dtype=np.int64)
    places = np.flatnonzero(ids == token_id)
    at = 0
    next_position = 0
    taken = 0
    for rows, columns in grids.tolist():
        start = int(places[taken])
        # Positions of the text before the picture.
        text_length = start - at
        positions[:, at:start] = next_position + np.arange(text_length)
        next_position += text_length
        tokens = rows * columns
        taken += tokens
        at = start + tokens
        # Time (0 for all tokens), row and column of each token within the picture.
        positions[:, start:at] = next_position + np.indices((1, rows, columns)).reshape(3, -1)
        next_position += max(rows, columns)
    # Positions of the text after the last picture.
    positions[:, at:] = next_position + np.arange(len(ids) - at)
    return positions
