"""Handling of examples that are longer than `data.seq_len`.

Documents are split, and answers are truncated.
"""

import numpy as np

from tunesmith.rows.source.open_source import Rows
from tunesmith.tokens.cache import TokenWriter
from tunesmith.tokens.text.example import Example
from tunesmith.tokens.text.template import Template


class DocumentSplitter:
    """Writer that splits documents into examples of at most `seq_len` tokens, without losing a
    token.

    If an example continues a document, it begins with the last token of the previous example, which
    is not supervised. Each token of a document except the first is therefore supervised exactly
    once. If the tokenizer adds a BOS token to a text, each example begins with BOS, because some
    models (Gemma) predict badly without it.

    Rows that are blocks of the same document (`Rows.continues`) are joined first.
    """

    def __init__(self, writer: TokenWriter, rows: Rows, seq_len: int, template: Template) -> None:
        self._writer = writer
        self._rows = rows
        self._seq_len = seq_len
        self._bos = template.tokenizer.bos_token_id
        self._end_ids = template.end_ids
        # Last example of the previous row. It is not written yet, because its document continues in
        # the next row. `_row` is the row in which this example begins.
        self._rest: Example | None = None
        self._row = 0

    def add(self, example: Example, row: int) -> None:
        """Split the document in row `row` into examples and write them.

        If the following row continues the document, keep the last example until this row is added.
        """
        ids = example.ids
        trained = example.trained
        has_bos = ids[0] == self._bos and self._bos not in self._end_ids
        is_end = self._rows.ends_document(row)
        if not is_end and ids[-1] in self._end_ids:
            ids = ids[:-1]
            trained = trained[:-1]
        first_row = row
        if self._rest is not None:
            if has_bos:
                ids = ids[1:]
            ids = np.append(self._rest.ids, ids)
            # Supervise all tokens of the row. This includes the first token, because the row
            # continues a document.
            trained = np.ones(len(ids), np.bool_)
            trained[: len(self._rest.ids)] = self._rest.trained
            first_row = self._row
        # If seq_len is 2, omit BOS, because there is only space for the last token of the previous
        # example and one supervised token.
        prefix = 1 if has_bos and self._seq_len > 2 else 0
        start = 0
        limit = self._seq_len
        while len(ids) - start > limit:
            piece, start = self._piece(ids, trained, start, prefix)
            self._writer.add(piece, first_row, continued=True)
            first_row = row
            # BOS at the start of later examples takes one token of `seq_len`.
            limit = self._seq_len - prefix
        rest, _ = self._piece(ids, trained, start, prefix)
        if self._rows.continues(row):
            self._rest = rest
            self._row = first_row
            return
        self._rest = None
        # Drop an example of a single token, because it has no target.
        if len(rest.ids) > 1:
            self._writer.add(rest, first_row, continued=not is_end)

    def _piece(
        self, ids: np.ndarray, trained: np.ndarray, start: int, prefix: int
    ) -> tuple[Example, int]:
        """Return the example that begins at token `start`, and the start of the next example."""
        stop = start + self._seq_len
        if start == 0:
            return Example(ids[:stop], trained[:stop]), stop - 1
        stop -= prefix
        piece_ids = np.append(ids[:prefix], ids[start:stop])
        piece_trained = np.append(trained[:prefix], trained[start:stop])
        # Do not supervise BOS and the token after it, which is the last token of the previous
        # example and is supervised there.
        piece_trained[: prefix + 1] = False
        return Example(piece_ids, piece_trained), stop - 1


def truncated_example(example: Example, length: int) -> Example | None:
    """Truncate each sequence of an example. Return None if a sequence loses all of its targets."""
    parts = []
    for part in example.parts():
        shortened = part._replace(ids=part.ids[:length], trained=part.trained[:length])
        # Skip the first token, because it is never a target.
        if part.trained.any() and not shortened.trained[1:].any():
            return None
        parts.append(shortened)
    if not example.sequences:
        return parts[0]
    return example._replace(
        ids=np.concatenate([part.ids for part in parts]),
        trained=np.concatenate([part.trained for part in parts]),
        sequences=tuple(len(part.ids) for part in parts),
    )
