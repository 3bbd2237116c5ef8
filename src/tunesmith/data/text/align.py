"""Spans of characters -> tokens.

Generation tokenizes the prompt alone. Where a token of the whole text would lie across the edge of
a span (byte-pair merges such as " " + "good" or "\\n" + "\\n"), or white space before it has other
tokens than at the end of a text, the text is cut there and its pieces are tokenized one by one:
these are the tokens that the model is given, and those that it is to write. A tokenizer that cannot
write the answer's piece so (WordPiece within a word) keeps the merged token, which is then
supervised.

In a byte-level vocabulary (Llama 3, Qwen, SmolLM, GPT) each token is a known number of bytes, and
these must add up to the text: they give its place. Otherwise (SentencePiece, normalized text) the
tokenizer's own offsets do.
"""

from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import normalize

import numpy as np

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Put before a piece that continues a text, and then taken off its tokens: SentencePiece tokenizers
# write a blank at the start of a text. No vocabulary has a word with a NUL in it.
_CONTEXTS = ("", "\0")


class CharSpan(NamedTuple):
    """Supervised characters [start, end) of a text; the end token begins at `stop` (-1: none)."""

    start: int
    end: int
    stop: int = -1

    def shifted(self, by: int) -> "CharSpan":
        stop = self.stop + by if self.stop >= 0 else -1
        return CharSpan(self.start + by, self.end + by, stop)


class Aligned(NamedTuple):
    """A tokenized text.

    Attributes:
        ids: int32 [n].
        trained: bool [n].
        ended: whether one token, of the end ids, stands at the `stop` of every span that has one.
        cuts: edges of spans, in characters, at which the text was cut.
        merged_tokens: how many supervised tokens have characters outside of the spans.
    """

    ids: np.ndarray
    trained: np.ndarray
    ended: bool
    cuts: tuple[int, ...] = ()
    merged_tokens: int = 0


class _Piece(NamedTuple):
    """A part of a text between two cuts, and the beginning of it that its tokens must decode to."""

    text: str
    aligned: Aligned


class _Bounds(NamedTuple):
    """The bounds of n tokens, int64 [n] each, in bytes or in characters of the text."""

    starts: np.ndarray
    ends: np.ndarray
    in_bytes: bool


class Aligner:
    """Tokenizes texts and maps spans of their characters to tokens.

    Raises:
        ModelError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} does not provide offsets for its tokens",
                where="model.tokenizer",
                why="loss masks need a fast tokenizer, one with a tokenizer.json",
                fix="set one: model.tokenizer=FOLDER",
            )
        self.tokenizer = tokenizer
        self.byte_sizes = _byte_sizes(tokenizer)
        # Of a few texts, such as line breaks: prompts of a template end alike.
        self._ids_of_tails: dict[str, np.ndarray] = {}
        self.added_ids = np.array(sorted(tokenizer.added_tokens_decoder), np.int64)

    def encode(
        self, texts: Sequence[str], spans: Sequence[Sequence[CharSpan]], end_ids: Collection[int]
    ) -> list[Aligned]:
        """Tokenize n texts and mark the tokens that their spans, disjoint and in order, cover.

        No special token is added. One of `end_ids` must stand at each span's `stop`.
        """
        ids = self.ids(texts)
        bounds = self._bounds(texts, ids)
        aligned = []
        cuts: dict[int, list[int]] = {}
        for i, text in enumerate(texts):
            aligned.append(self._align(text, ids[i], bounds[i], spans[i], end_ids))
            crossed = self._crossed_edges(text, ids[i], bounds[i], spans[i])
            if crossed:
                cuts[i] = crossed
        for i, edges in cuts.items():
            apart = self._encode_apart(aligned[i], texts[i], spans[i], edges, end_ids)
            aligned[i] = apart or self._with_merged(texts[i], aligned[i], bounds[i], spans[i])
        return aligned

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 [n] for each text: its tokens, no special token added."""
        if not texts:
            return []
        encoding = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [np.array(ids, dtype=np.int32) for ids in encoding["input_ids"]]

    def _bounds(self, texts: Sequence[str], ids: Sequence[np.ndarray]) -> list[_Bounds]:
        """The bounds of the tokens of each text."""
        bounds: dict[int, _Bounds] = {}
        for i, text in enumerate(texts):
            by_bytes = self._bounds_by_bytes(text, ids[i])
            if by_bytes is not None:
                bounds[i] = by_bytes
        # The others in one call: the tokenizer works on a batch with several threads.
        unplaced = [i for i in range(len(texts)) if i not in bounds]
        by_offsets = self._bounds_by_offsets([texts[i] for i in unplaced])
        bounds.update(zip(unplaced, by_offsets, strict=True))
        return [bounds[i] for i in range(len(texts))]

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
        """Bounds in characters, as the tokenizer gives them."""
        if not texts:
            return []
        bounds = []
        for encoding in self._core.encode_batch(list(texts), add_special_tokens=False):
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            bounds.append(_Bounds(offsets[:, 0], offsets[:, 1], in_bytes=False))
        return bounds

    @cached_property
    def _core(self) -> Any:
        """The tokenizer's core, without a post-processor that cuts blanks off the offsets."""
        from tokenizers import Tokenizer
        from tokenizers.processors import TemplateProcessing

        core = self.tokenizer.backend_tokenizer
        if core.post_processor is None or isinstance(core.post_processor, TemplateProcessing):
            return core
        # A copy, which takes a second with a large vocabulary.
        core = Tokenizer.from_str(core.to_str())
        core.post_processor = None
        return core

    def _align(
        self,
        text: str,
        ids: np.ndarray,
        bounds: _Bounds,
        spans: Sequence[CharSpan],
        end_ids: Collection[int],
    ) -> Aligned:
        trained = np.zeros(len(ids), dtype=bool)
        ended = True
        for span in _spans_in(bounds, text, spans):
            trained |= (
                (bounds.starts >= span.start)
                & (bounds.starts < span.end)
                & (bounds.ends <= span.end)
            )
            if span.stop < 0:
                continue
            at = int(np.searchsorted(bounds.ends, span.stop, side="right"))
            if at < len(ids) and int(ids[at]) in end_ids:
                # Even where it includes the whitespace after it (`rstrip`, as Phi 3's).
                trained[at] = True
            else:
                ended = False
        return Aligned(ids, trained, ended)

    def _with_merged(
        self, text: str, aligned: Aligned, bounds: _Bounds, spans: Sequence[CharSpan]
    ) -> Aligned:
        """The text with the tokens supervised that lie across an edge of a span."""
        overlaps = np.zeros(len(aligned.ids), dtype=bool)
        for span in _spans_in(bounds, text, spans):
            overlaps |= (bounds.starts < span.end) & (bounds.ends > span.start)
        # An added token is the template's: it only takes in the white space beside it.
        is_merged = overlaps & ~aligned.trained & ~np.isin(aligned.ids, self.added_ids)
        return aligned._replace(
            trained=aligned.trained | is_merged, merged_tokens=int(is_merged.sum())
        )

    def _crossed_edges(
        self, text: str, ids: np.ndarray, bounds: _Bounds, spans: Sequence[CharSpan]
    ) -> list[int]:
        """The edges of spans, in characters and in order, at which the text must be cut."""
        edges = []
        for span in spans:
            edges.append(span.start)
            # An end token stands at the other edge.
            if span.stop < 0:
                edges.append(span.end)
        edges = sorted({edge for edge in edges if 0 < edge < len(text)})
        if not edges:
            return []
        places = edges
        if bounds.in_bytes and not text.isascii():
            places = [len(text[:edge].encode()) for edge in edges]
        # Of each edge the first token that ends behind it.
        tokens = np.searchsorted(bounds.ends, places, side="right").tolist()
        crossed = []
        for edge, place, token in zip(edges, places, tokens, strict=True):
            # It begins later, or there is none, where normalization took in the characters between.
            is_crossed = token == len(ids) or bounds.starts[token] != place
            if is_crossed or self._has_other_blanks(text, edge, ids[:token]):
                crossed.append(edge)
        return crossed

    def _has_other_blanks(self, text: str, edge: int, ids: np.ndarray) -> bool:
        """Tell whether white space before an edge may have other tokens at the end of a text.

        Byte-level tokenizers as GPT-2's leave the last of several blanks to the word behind them:
        "\n\n" is one token, and two before a word.

        Args:
            ids: of text[:edge].
        """
        if self.byte_sizes is None or edge < 2 or not text[edge - 2 : edge].isspace():
            return False
        # The last tokens that hold all of the white space.
        blank_bytes = len(text[len(text[:edge].rstrip()) : edge].encode())
        from_end = np.cumsum(self.byte_sizes[ids[::-1]])
        count = int(np.searchsorted(from_end, blank_bytes)) + 1
        last_ids = ids[len(ids) - count :]
        tail = self._decode(last_ids)
        if tail not in self._ids_of_tails:
            self._ids_of_tails[tail] = self.ids([tail])[0]
        return not np.array_equal(self._ids_of_tails[tail], last_ids)

    def _encode_apart(
        self,
        whole: Aligned,
        text: str,
        spans: Sequence[CharSpan],
        cuts: Sequence[int],
        end_ids: Collection[int],
    ) -> Aligned | None:
        """The text as its pieces between the cuts; None where these are other text."""
        for context in _CONTEXTS:
            pieces = self._pieces(context, text, spans, cuts, end_ids)
            if pieces and self._is_exact(whole, pieces):
                return _join(pieces, cuts)
        return None

    def _pieces(
        self,
        context: str,
        text: str,
        spans: Sequence[CharSpan],
        cuts: Sequence[int],
        end_ids: Collection[int],
    ) -> list[_Piece]:
        """The pieces of a text behind a context; none where one merges with it."""
        stretches = list(pairwise([0, *cuts, len(text)]))
        texts = [text[start:stop] for start, stop in stretches]
        # The first piece continues nothing.
        texts[1:] = [context + piece for piece in texts[1:]]
        context_ids, *ids = self.ids([context, *texts])
        bounds = self._bounds(texts, ids)
        pieces = []
        for n, (start, stop) in enumerate(stretches):
            before = len(context) if start else 0
            inside = []
            for span in spans:
                if start <= span.start and span.end <= stop:
                    inside.append(span.shifted(before - start))
            aligned = self._align(texts[n], ids[n], bounds[n], inside, end_ids)
            if before:
                skipped = len(context_ids)
                if not np.array_equal(aligned.ids[:skipped], context_ids):
                    return []
                behind = aligned.ids[skipped:]
                aligned = aligned._replace(ids=behind, trained=aligned.trained[skipped:])
            # Behind an answer's end token a template may write what that token takes in.
            end = next((span.stop for span in inside if span.stop >= 0), len(texts[n]))
            pieces.append(_Piece(texts[n][before:end], aligned))
        return pieces

    def _is_exact(self, whole: Aligned, pieces: Sequence[_Piece]) -> bool:
        """Check that each piece, behind those before it, decodes to its text."""
        ids = pieces[0].aligned.ids
        decoded = self._decode(ids)
        is_exact = True
        for piece in pieces[1:]:
            ids = np.concatenate([ids, piece.aligned.ids])
            expected = normalize("NFKC", decoded + piece.text)
            decoded = self._decode(ids)
            # Tokenizers may compose letters and their accents.
            normalized = normalize("NFKC", decoded)
            is_exact &= normalized.startswith(expected)
            # A blank more is the one that SentencePiece writes at the start of a text.
            is_exact &= normalized == expected or normalized[len(expected) :].strip(" ") != ""
        # The latter where they change texts otherwise, as to lower case.
        return is_exact or decoded == self._decode(whole.ids)

    def _decode(self, ids: np.ndarray) -> str:
        return str(
            self.tokenizer.decode(
                ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def _byte_sizes(tokenizer: "PreTrainedTokenizerBase") -> np.ndarray | None:
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


def _join(pieces: Sequence[_Piece], cuts: Sequence[int]) -> Aligned:
    """The pieces of a text as one."""
    aligned = [piece.aligned for piece in pieces]
    return Aligned(
        ids=np.concatenate([piece.ids for piece in aligned]),
        trained=np.concatenate([piece.trained for piece in aligned]),
        ended=all(piece.ended for piece in aligned),
        cuts=tuple(cuts),
    )


def _spans_in(bounds: _Bounds, text: str, spans: Sequence[CharSpan]) -> Sequence[CharSpan]:
    """The spans in the unit of the bounds."""
    if not bounds.in_bytes or text.isascii():
        return spans
    return [_span_in_bytes(text, span) for span in spans]


def _span_in_bytes(text: str, span: CharSpan) -> CharSpan:
    start = len(text[: span.start].encode())
    end = len(text[: span.end].encode())
    stop = len(text[: span.stop].encode()) if span.stop >= 0 else -1
    return CharSpan(start, end, stop)
