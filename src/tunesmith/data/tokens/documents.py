"""Examples that are longer than `data.seq_len`: documents are split, answers are cut."""

import numpy as np

from tunesmith.data.source.open_source import Rows
from tunesmith.data.text.example import Example
from tunesmith.data.text.template import Template
from tunesmith.data.tokens.cache import TokenWriter


class DocumentSplitter:
    """Writes documents as examples of at most `seq_len` tokens, so that none is lost.

    An example that goes on with a document begins with the token before it, unsupervised, so each
    token of a document but its first is supervised exactly once. If the tokenizer begins a text
    with a BOS, each example begins with one: some models (Gemma) predict nothing useful without.

    Rows that are blocks of one document (`Rows.continues`) are joined first.
    """

    def __init__(self, writer: TokenWriter, rows: Rows, seq_len: int, template: Template) -> None:
        self._writer = writer
        self._rows = rows
        self._seq_len = seq_len
        self._bos = template.tokenizer.bos_token_id
        self._end_ids = template.end_ids
        # The end of the block before, if that goes on, and its row.
        self._rest: Example | None = None
        self._row = 0

    def add(self, example: Example, row: int) -> None:
        """Write the next row, but for a rest that the row after it continues."""
        ids = example.ids
        trained = example.trained
        has_bos = int(ids[0]) == self._bos and self._bos not in self._end_ids
        is_end = self._rows.ends_document(row)
        if not is_end and int(ids[-1]) in self._end_ids:
            ids = ids[:-1]
            trained = trained[:-1]
        first_row = row
        if self._rest is not None:
            start = 1 if has_bos else 0
            ids = np.concatenate([self._rest.ids, ids[start:]])
            trained = np.concatenate([self._rest.trained, np.ones(len(trained) - start, np.bool_)])
            first_row = self._row
        # A row of two tokens has no room for a BOS beside what is learned.
        prefix = 1 if has_bos and self._seq_len > 2 else 0
        start = 0
        while len(ids) - start > self._seq_len - (prefix if start else 0):
            piece, start = self._piece(ids, trained, start, prefix)
            self._writer.add(piece, first_row, continued=True)
            first_row = row
        rest, _ = self._piece(ids, trained, start, prefix)
        if self._rows.continues(row):
            self._rest = rest
            self._row = first_row
            return
        self._rest = None
        # One token alone is predicted by nothing, and predicts nothing.
        if len(rest.ids) > 1:
            self._writer.add(rest, first_row, continued=not is_end)

    def _piece(
        self, ids: np.ndarray, trained: np.ndarray, start: int, prefix: int
    ) -> tuple[Example, int]:
        """The example that begins with token `start`, and with which token the next one begins."""
        if start == 0:
            stop = self._seq_len
            return Example(ids[:stop], trained[:stop]), stop - 1
        stop = start + self._seq_len - prefix
        piece_ids = np.concatenate([ids[:prefix], ids[start:stop]])
        piece_trained = np.concatenate([trained[:prefix], trained[start:stop]])
        # Its context, and the token that nothing predicts.
        piece_trained[: prefix + 1] = False
        return Example(piece_ids, piece_trained), stop - 1


def cuts_pictures(example: Example, length: int, picture_ids: np.ndarray) -> bool:
    """Tell whether a token of a picture stands beyond `length`: no picture is cut or lost."""
    return bool(example.digests) and bool(np.isin(example.ids[length:], picture_ids).any())


def truncated_example(example: Example, length: int) -> Example | None:
    """The example with each of its sequences cut; None where that leaves one without a target."""
    parts = []
    for part in example.parts():
        shortened = part._replace(ids=part.ids[:length], trained=part.trained[:length])
        # The first token of a sequence is never a target.
        if part.trained.any() and not shortened.trained[1:].any():
            return None
        parts.append(shortened)
    return example._replace(
        ids=np.concatenate([part.ids for part in parts]),
        trained=np.concatenate([part.trained for part in parts]),
        sequences=tuple(len(part.ids) for part in parts) if example.sequences else (),
    )
