"""Spans of characters -> tokens.

A token is supervised if all of it lies within a span. One that begins in the prompt and ends in the
answer (byte-pair merges such as "\\n" + " ") belongs to the prompt: the mask never reaches what the
model is given.

In a byte-level vocabulary (Llama 3, Qwen, SmolLM, GPT) each token is a known number of bytes, and
these must add up to the text: they give its place. Otherwise (SentencePiece, normalized text) the
tokenizer's own offsets do, which alone are not enough: byte-level post-processors often cut
whitespace off them (`trim_offsets`).
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from tunesmith.errors import ModelError

# As tokens write it.
_WHITESPACE = "ĠĊĉč▁ \t\r\n"


class CharSpan(NamedTuple):
    """Supervised characters [start, end) of a text; the end token begins at `stop` (-1: none)."""

    start: int
    end: int
    stop: int = -1


class Aligned(NamedTuple):
    """A tokenized text.

    Attributes:
        ids: int32 [n].
        trained: bool [n].
        spanning_tokens: how many tokens begin before a span and end in it.
        ended: whether one token, of the end ids, stands at the `stop` of every span that has one.
    """

    ids: np.ndarray
    trained: np.ndarray
    spanning_tokens: int
    ended: bool


class _Bounds(NamedTuple):
    """Where tokens begin and end, int64 [n] each, in bytes or in characters of the text."""

    starts: np.ndarray
    ends: np.ndarray
    in_bytes: bool


class Aligner:
    """Tokenizes text once and maps spans of its characters to tokens.

    Raises:
        ModelError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} does not provide offsets for its tokens",
                where="model.tokenizer",
                why="loss masks need a fast tokenizer, one with a tokenizer.json",
                fix="set one: model.tokenizer=FOLDER",
            )
        self.tokenizer = tokenizer
        self.byte_sizes = _byte_sizes(tokenizer)

    def encode(
        self, texts: Sequence[str], spans: Sequence[Sequence[CharSpan]], end_ids: Collection[int]
    ) -> list[Aligned]:
        """Tokenize n texts and mark the tokens that their spans, disjoint, cover.

        No special token is added. One of `end_ids` must stand at each span's `stop`.
        """
        ids = self.ids(texts)
        bounds: dict[int, _Bounds] = {}
        for i, text in enumerate(texts):
            by_bytes = self._bounds_by_bytes(text, ids[i])
            if by_bytes is not None:
                bounds[i] = by_bytes
        # The others in one call: the tokenizer works on a batch with several threads.
        unplaced = [i for i in range(len(texts)) if i not in bounds]
        by_offsets = self._bounds_by_offsets([texts[i] for i in unplaced])
        bounds.update(zip(unplaced, by_offsets, strict=True))
        return [_align(text, ids[i], bounds[i], spans[i], end_ids) for i, text in enumerate(texts)]

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 [n] for each text: its tokens, no special token added."""
        if not texts:
            return []
        encoding = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [np.array(ids, dtype=np.int32) for ids in encoding["input_ids"]]

    def _bounds_by_bytes(self, text: str, ids: np.ndarray) -> _Bounds | None:
        """Bounds in bytes, or None where the sizes of the tokens do not add up to the text."""
        if self.byte_sizes is None:
            return None
        sizes = self.byte_sizes[ids]
        text_bytes = len(text) if text.isascii() else len(text.encode())
        if sizes.sum() != text_bytes:
            return None
        ends = np.cumsum(sizes)
        return _Bounds(ends - sizes, ends, in_bytes=True)

    def _bounds_by_offsets(self, texts: Sequence[str]) -> list[_Bounds]:
        """Bounds in characters: the tokenizer's, with the whitespace that it may have cut off."""
        if not texts:
            return []
        encoding = self.tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        bounds = []
        for text, ids, offsets in zip(
            texts, encoding["input_ids"], encoding["offset_mapping"], strict=True
        ):
            # Offsets of many tokenizers leave out the space in front of a word that its token
            # holds.
            tokens = self.tokenizer.convert_ids_to_tokens(ids)
            starts = []
            previous_end = 0
            for token, (start, end) in zip(tokens, offsets, strict=True):
                skips_text = previous_end < start
                begins_with_space = start != end and text[start].isspace()
                # Characters between two tokens belong to the later one, as far as it begins with
                # white space.
                if skips_text and not begins_with_space:
                    whitespace = len(token) - len(token.lstrip(_WHITESPACE))
                    starts.append(max(previous_end, start - whitespace))
                else:
                    starts.append(start)
                previous_end = end
            ends = [end for _, end in offsets]
            bounds.append(
                _Bounds(np.array(starts, np.int64), np.array(ends, np.int64), in_bytes=False)
            )
        return bounds


def _byte_sizes(tokenizer: Any) -> np.ndarray | None:
    """Bytes of every token, int64 [vocabulary]; None if the vocabulary is not byte-level."""
    from tokenizers.pre_tokenizers import ByteLevel

    added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.get_vocab()
    plain = {id_: token for token, id_ in vocabulary.items() if id_ not in added}
    # A byte-level vocabulary writes a token byte by byte, each byte as one letter of its alphabet.
    letters = set("".join(plain.values()))
    is_byte_level = letters <= set(ByteLevel.alphabet()) and "Ġ" in vocabulary
    if not plain or not is_byte_level:
        return None
    sizes = np.zeros(max([*plain, *added]) + 1, dtype=np.int64)
    for id_, token in plain.items():
        sizes[id_] = len(token)
    for id_, token in added.items():
        sizes[id_] = len(token.encode())
    return sizes


def _align(
    text: str,
    ids: np.ndarray,
    bounds: _Bounds,
    spans: Sequence[CharSpan],
    end_ids: Collection[int],
) -> Aligned:
    trained = np.zeros(len(ids), dtype=bool)
    spanning_tokens = 0
    ended = True
    if bounds.in_bytes and not text.isascii():
        spans = [_span_in_bytes(text, span) for span in spans]
    for span in spans:
        trained |= (
            (bounds.starts >= span.start) & (bounds.starts < span.end) & (bounds.ends <= span.end)
        )
        spans_start = (bounds.starts < span.start) & (bounds.ends > span.start)
        spanning_tokens += int(spans_start.sum())
        if span.stop < 0:
            continue
        at = int(np.searchsorted(bounds.ends, span.stop, side="right"))
        if at < len(ids) and int(ids[at]) in end_ids:
            # Even where it includes the whitespace after it (`rstrip`, as Phi 3's).
            trained[at] = True
        else:
            ended = False
    return Aligned(ids, trained, spanning_tokens, ended)


def _span_in_bytes(text: str, span: CharSpan) -> CharSpan:
    start = len(text[: span.start].encode())
    end = len(text[: span.end].encode())
    stop = len(text[: span.stop].encode()) if span.stop >= 0 else -1
    return CharSpan(start, end, stop)
