"""Spans of characters -> tokens.

A token is supervised if all of it lies within a span. One that begins in the prompt and ends in the answer (byte-pair
merges such as "\\n" + " ") belongs to the prompt: the mask never reaches what the model is given.

In a byte-level vocabulary (Llama 3, Qwen, SmolLM, GPT) each token is a known number of bytes, and these must add up to
the text: they give its place. Otherwise (SentencePiece, normalised text) the tokenizer's own offsets do, which alone
are not enough: byte-level post-processors often cut whitespace off them (`trim_offsets`).
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from tunesmith.errors import ModelError

_WHITESPACE = "ĠĊĉč▁ \t\r\n"  # as tokens write it


class CharSpan(NamedTuple):
    """Supervised characters [start, end) of a text; the end token begins at `stop`, or there is none (-1)."""

    start: int
    end: int
    stop: int = -1


class Aligned(NamedTuple):
    """A tokenised text."""

    ids: np.ndarray  # int32 [n]
    trained: np.ndarray  # bool [n]
    straddled: int  # how many tokens begin before a span and end in it
    ended: bool  # whether at the `stop` of every span that has one stands one token, of the ids asked for


class _Bounds(NamedTuple):
    """Where tokens begin and end, int64 [n] each, in bytes or in characters of the text."""

    starts: np.ndarray
    ends: np.ndarray
    in_bytes: bool


class Aligner:
    """Tokenises text once and maps spans of its characters to tokens; ModelError if the tokenizer is not a fast one."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            what = f"the tokenizer {type(tokenizer).__name__} cannot say where its tokens lie in the text"
            why = "loss masks need a fast tokenizer, one with a tokenizer.json"
            raise ModelError(what, where="model.tokenizer", why=why, fix="name one: model.tokenizer=FOLDER")
        self.tokenizer = tokenizer
        self.sizes = _byte_sizes(tokenizer)

    def encode(
        self, texts: Sequence[str], spans: Sequence[Sequence[CharSpan]], end_ids: Collection[int]
    ) -> list[Aligned]:
        """Tokenise n texts and mark the tokens that their spans, disjoint, cover. No special token is added.

        One of `end_ids` must stand at each span's `stop`.
        """
        batch = self.ids(texts)
        by_bytes = [self._by_bytes(text, ids) for text, ids in zip(texts, batch, strict=True)]
        offsets = iter(self._by_offsets([text for text, found in zip(texts, by_bytes, strict=True) if found is None]))
        bounds = [found or next(offsets) for found in by_bytes]
        return [_align(*one, end_ids) for one in zip(texts, batch, bounds, spans, strict=True)]

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 [n] for each text: its tokens, no special token added."""
        if not texts:
            return []
        found = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array(ids, dtype=np.int32) for ids in found["input_ids"]]

    def _by_bytes(self, text: str, ids: np.ndarray) -> _Bounds | None:
        """Bounds in bytes, or None where the sizes of the tokens do not add up to the text."""
        if self.sizes is None:
            return None
        sizes = self.sizes[ids]
        ends = np.cumsum(sizes)
        whole = len(text) if text.isascii() else len(text.encode())
        return _Bounds(ends - sizes, ends, in_bytes=True) if sizes.sum() == whole else None

    def _by_offsets(self, texts: Sequence[str]) -> list[_Bounds]:
        """Bounds in characters, as the tokenizer gives them, with the whitespace that it may have cut off."""
        if not texts:
            return []
        found = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        bounds = []
        for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
            starts, last = [], 0
            for token, (start, end) in zip(self.tokenizer.convert_ids_to_tokens(ids), offsets, strict=True):
                cut = last < start and (start == end or not text[start].isspace())
                whitespace = len(token) - len(token.lstrip(_WHITESPACE)) if cut else 0
                starts.append(max(last, start - whitespace) if cut else start)
                last = end
            ends = np.array([end for _, end in offsets], dtype=np.int64)
            bounds.append(_Bounds(np.array(starts, dtype=np.int64), ends, in_bytes=False))
        return bounds


def _byte_sizes(tokenizer: Any) -> np.ndarray | None:
    """Bytes of every token, int64 [vocabulary], if the vocabulary is byte-level: it writes a token byte by byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
    alphabet = set(ByteLevel.alphabet())
    vocabulary = tokenizer.get_vocab()
    plain = {id_: token for token, id_ in vocabulary.items() if id_ not in added}
    if not plain or not set("".join(plain.values())) <= alphabet or "Ġ" not in vocabulary:
        return None
    sizes = np.zeros(max([*plain, *added]) + 1, dtype=np.int64)
    for id_, token in plain.items():
        sizes[id_] = len(token)
    for id_, token in added.items():
        sizes[id_] = len(token.encode())
    return sizes


def _align(text: str, ids: np.ndarray, bounds: _Bounds, spans: Sequence[CharSpan], end_ids: Collection[int]) -> Aligned:
    trained = np.zeros(len(ids), dtype=bool)
    straddled, ended = 0, True
    plain = not bounds.in_bytes or text.isascii()
    for span in spans:
        start, end, stop = span if plain else (len(text[:at].encode()) if at >= 0 else at for at in span)
        trained |= (bounds.starts >= start) & (bounds.starts < end) & (bounds.ends <= end)
        straddled += int(((bounds.starts < start) & (bounds.ends > start)).sum())
        if stop < 0:
            continue
        at = int(np.searchsorted(bounds.ends, stop, side="right"))
        if at < len(ids) and int(ids[at]) in end_ids:
            trained[at] = True  # even where it includes the whitespace after it (`rstrip`, as Phi 3's)
        else:
            ended = False
    return Aligned(ids, trained, straddled, ended)
