"""Tokenization of texts, and conversion of spans of characters to spans of tokens.

During generation, the prompt is tokenized without the answer. If prompt and answer are tokenized as
one text, the tokens can be different for two reasons. First, a token may cross the edge of a span,
for example if a byte-pair tokenizer merges " " + "good" or "\\n" + "\\n". Second, whitespace before
the edge may have other tokens than whitespace at the end of a text. In both cases the text is cut
at the edge, and the pieces are tokenized separately. The pieces have exactly the tokens that the
model reads and writes during generation. Some tokenizers cannot tokenize the answer separately
(WordPiece, if the cut is within a word). In this case the text is not cut, and the token that
crosses the edge is supervised.

The position of each token comes from the tokenizer's offsets.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import normalize

import numpy as np

from tunesmith.errors import DataError, ModelError, first_line, is_fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Contexts that are tried when a part of a text is tokenized separately. The context is put before
# the part, and its tokens are removed afterwards, because SentencePiece tokenizers insert a space
# at the start of a text. NUL is used because no vocabulary has a word that contains it.
_CONTEXTS = ("", "\0")
# Maximum number of characters that are tokenized in one call. The limit saves memory, because a
# call uses about 50 bytes per character.
_BATCH_CHARACTERS = 4 << 20


class CharSpan(NamedTuple):
    """Supervised characters [start, end) of a text.

    `stop` is the start of the end token, or -1 if the span has no end token.
    """

    start: int
    end: int
    stop: int = -1

    def shifted(self, by: int) -> "CharSpan":
        stop = self.stop + by if self.stop >= 0 else -1
        return CharSpan(self.start + by, self.end + by, stop)


# Supervised characters of a text, as a sorted list of spans that do not overlap.
Spans = Sequence[CharSpan]


class Aligned(NamedTuple):
    """A tokenized text.

    Attributes:
        ids: int32 [n].
        trained: bool [n].
        ended: True if, for each span with an end token, the token at `stop` is one of the end ids.
        cuts: edges of spans, in characters, at which the text was cut.
        merged_tokens: number of supervised tokens that contain characters outside of the spans.
    """

    ids: np.ndarray
    trained: np.ndarray
    ended: bool
    cuts: tuple[int, ...] = ()
    merged_tokens: int = 0


# A part of a text between two cuts, and the tokens of this part. The decoded tokens must begin with
# the text.
_Piece = tuple[str, Aligned]


class _Tokens(NamedTuple):
    """Tokens of a text: int32 ids [n], and the characters [starts, ends) of each as int64 [n]."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class Aligner:
    """Tokenizes texts and converts spans of characters to tokens.

    Raises:
        ModelError: the tokenizer is not a fast tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} does not provide offsets for its tokens",
                where="model.tokenizer",
                why="loss masks need a fast tokenizer, one with a tokenizer.json",
                fix="use a fast tokenizer: model.tokenizer=FOLDER",
            )
        self.tokenizer = tokenizer
        self._is_byte_level = _is_byte_level(tokenizer)
        # Cache of the token ids of whitespace at the end of prompts. It remains small, because all
        # prompts of a template end with the same whitespace.
        self._ids_by_tail: dict[str, np.ndarray] = {}
        self.added_ids = np.array(sorted(tokenizer.added_tokens_decoder), np.int64)

    def encode(
        self, texts: Sequence[str], spans: Sequence[Spans], end_ids: Collection[int]
    ) -> list[Aligned]:
        """Tokenize n texts, and mark the tokens that are in the spans of each text as supervised.

        No special tokens are added. If a span has a `stop`, the token at this position must be in
        `end_ids`.
        """
        encoded = []
        for text, tokens, text_spans in zip(texts, self._tokenize(texts), spans, strict=True):
            aligned = self._align(tokens, text_spans, end_ids)
            cuts = self._crossed_edges(text, tokens, text_spans)
            if cuts:
                separate = self._encode_in_pieces(aligned, text, text_spans, cuts, end_ids)
                aligned = separate or self._with_merged(aligned, tokens, text_spans)
            encoded.append(aligned)
        return encoded

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32 [n], without special tokens."""
        return [tokens.ids for tokens in self._tokenize(texts)]

    def _tokenize(self, texts: Sequence[str]) -> list[_Tokens]:
        """Tokenize each text without special tokens."""
        tokenized = []
        # Tokenize many texts per call, because the tokenizer processes the texts of a call with
        # several threads.
        for batch in _in_batches(texts):
            try:
                encodings = self._core.encode_batch(batch, add_special_tokens=False)
            except BaseException as error:
                if not is_fault(error):
                    raise
                # A tokenizer fails, for example, if a regular expression exceeds its step limit.
                raise DataError(
                    "the tokenizer cannot tokenize the text of this row",
                    why=first_line(error),
                    fix="shorten or delete the row, or use the tokenizer of the base model: "
                    "model.tokenizer=NAME",
                ) from error
            for encoding in encodings:
                offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
                tokenized.append(
                    _Tokens(np.array(encoding.ids, np.int32), offsets[:, 0], offsets[:, 1])
                )
        return tokenized

    @cached_property
    def _core(self) -> Any:
        """The Rust tokenizer, without a post-processor that removes spaces from the offsets."""
        from tokenizers import Tokenizer
        from tokenizers.processors import TemplateProcessing

        # Copy the tokenizer only if necessary, because a copy takes a second with a large
        # vocabulary.
        core = self.tokenizer.backend_tokenizer
        if not isinstance(core.post_processor, TemplateProcessing | None):
            core = Tokenizer.from_str(core.to_str())
            core.post_processor = None
        core.no_truncation()
        core.no_padding()
        return core

    def _align(self, tokens: _Tokens, spans: Spans, end_ids: Collection[int]) -> Aligned:
        """Mark the tokens inside of the spans, and the end tokens of the spans, as supervised."""
        ids, starts, ends = tokens
        trained = np.zeros(len(ids), dtype=bool)
        ended = True
        for span in spans:
            trained |= (starts >= span.start) & (starts < span.end) & (ends <= span.end)
            if span.stop < 0:
                continue
            at = np.searchsorted(ends, span.stop, side="right")
            if at < len(ids) and ids[at] in end_ids:
                # Supervise the end token even if it includes the whitespace after it (`rstrip` in
                # Phi 3).
                trained[at] = True
            else:
                ended = False
        return Aligned(ids, trained, ended)

    def _with_merged(self, aligned: Aligned, tokens: _Tokens, spans: Spans) -> Aligned:
        """Return a copy of `aligned` in which tokens that cross an edge of a span are supervised,
        too.
        """
        overlaps = np.zeros(len(aligned.ids), dtype=bool)
        for span in spans:
            starts_before_end = tokens.starts < span.end
            ends_after_start = tokens.ends > span.start
            overlaps |= starts_before_end & ends_after_start
        # Do not supervise added tokens, because they belong to the template. They overlap a span
        # only if they include whitespace at its edge.
        is_added = np.isin(aligned.ids, self.added_ids)
        is_merged = overlaps & ~aligned.trained & ~is_added
        return aligned._replace(
            trained=aligned.trained | is_merged, merged_tokens=int(is_merged.sum())
        )

    def _crossed_edges(self, text: str, tokens: _Tokens, spans: Spans) -> list[int]:
        """Return the edges of spans, in characters and in order, at which the text must be cut."""
        # A span with a `stop` needs no cut at its end, because an end token does not merge with
        # other text.
        ends = [span.end for span in spans if span.stop < 0]
        edges = sorted({*ends, *(span.start for span in spans)} - {0, len(text)})
        # For each edge, find the first token that ends after it.
        firsts = np.searchsorted(tokens.ends, edges, side="right").tolist()
        crossed = []
        for edge, first in zip(edges, firsts, strict=True):
            # Cut at the edge if no token starts exactly there. Either a token contains the edge, or
            # the tokenizer's normalization has removed characters at the edge.
            is_crossed = first == len(tokens.ids) or tokens.starts[first] != edge
            if is_crossed or self._has_other_whitespace_tokens(text, edge, tokens, first):
                crossed.append(edge)
        return crossed

    def _has_other_whitespace_tokens(
        self, text: str, edge: int, tokens: _Tokens, first: int
    ) -> bool:
        """Return whether the whitespace before an edge would have other tokens if the text ended
        there.

        Byte-level tokenizers such as GPT-2's keep the last of several spaces or line breaks for the
        following word: "\n\n" is one token at the end of a text, and two tokens before a word.

        Args:
            first: index of the first token after the edge.
        """
        if not self._is_byte_level or edge < 2 or not text[edge - 2 : edge].isspace():
            return False
        # Find the tokens that contain the whitespace before the edge.
        whitespace_start = len(text[:edge].rstrip())
        first_whitespace_token = np.searchsorted(tokens.ends, whitespace_start, side="right")
        last_ids = tokens.ids[first_whitespace_token:first]
        tail = self._decode(last_ids)
        ids = self._ids_by_tail.get(tail)
        if ids is None:
            [ids] = self.ids([tail])
            self._ids_by_tail[tail] = ids
        return not np.array_equal(ids, last_ids)

    def _encode_in_pieces(
        self,
        whole: Aligned,
        text: str,
        spans: Spans,
        cuts: Sequence[int],
        end_ids: Collection[int],
    ) -> Aligned | None:
        """Cut a text at the positions `cuts`, and tokenize the pieces separately.

        Return None if the decoded pieces do not give the original text.
        """
        for context in _CONTEXTS:
            pieces = self._pieces(context, text, spans, cuts, end_ids)
            if pieces and self._is_exact(whole, pieces):
                return Aligned(
                    ids=np.concatenate([aligned.ids for _, aligned in pieces]),
                    trained=np.concatenate([aligned.trained for _, aligned in pieces]),
                    ended=all(aligned.ended for _, aligned in pieces),
                    cuts=tuple(cuts),
                )
        return None

    def _pieces(
        self,
        context: str,
        text: str,
        spans: Spans,
        cuts: Sequence[int],
        end_ids: Collection[int],
    ) -> list[_Piece]:
        """Tokenize each piece of a text after `context`.

        Return [] if the tokenizer merges a piece with the context.
        """
        edges = list(pairwise([0, *cuts, len(text)]))
        texts = [text[start:stop] for start, stop in edges]
        # The first piece starts the text, so it gets no context.
        texts[1:] = [context + piece for piece in texts[1:]]
        [context_ids] = self.ids([context])
        tokenized = self._tokenize(texts)
        pieces = []
        for n, (start, stop) in enumerate(edges):
            before = len(context) if start else 0
            end = len(texts[n])
            inside = []
            for span in spans:
                if start <= span.start and span.end <= stop:
                    span_in_piece = span.shifted(before - start)
                    inside.append(span_in_piece)
                    # Exclude the end token from the text that is compared with the decoded tokens,
                    # because the end token may include whitespace that the template writes after
                    # it.
                    if span.stop >= 0:
                        end = min(end, span_in_piece.stop)
            aligned = self._align(tokenized[n], inside, end_ids)
            if before:
                skipped = len(context_ids)
                if not np.array_equal(aligned.ids[:skipped], context_ids):
                    return []
                aligned = aligned._replace(
                    ids=aligned.ids[skipped:], trained=aligned.trained[skipped:]
                )
            pieces.append((texts[n][before:end], aligned))
        return pieces

    def _is_exact(self, whole: Aligned, pieces: Sequence[_Piece]) -> bool:
        """Return whether the pieces, decoded one after the other, give the original text."""
        ids = pieces[0][1].ids
        decoded = self._decode(ids)
        is_exact = True
        for text, aligned in pieces[1:]:
            ids = np.concatenate([ids, aligned.ids])
            expected = normalize("NFKC", decoded + text)
            decoded = self._decode(ids)
            # Compare in NFKC, because tokenizers may compose letters and their accents.
            normalized = normalize("NFKC", decoded)
            is_exact &= normalized.startswith(expected)
            # If the decoded piece has only additional spaces, it is not exact, because
            # SentencePiece has inserted a space at the start of the piece.
            is_exact &= normalized == expected or normalized[len(expected) :].strip(" ") != ""
        # If the tokenizer changes texts, for example to lower case, compare with the decoded tokens
        # of the uncut text instead.
        return is_exact or decoded == self._decode(whole.ids)

    def _decode(self, ids: np.ndarray) -> str:
        return str(
            self.tokenizer.decode(
                ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def _in_batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield all texts in order, in batches of limited size.

    The size is limited because the text of a row with pictures may have 100 KB.
    """
    batch: list[str] = []
    characters = 0
    for text in texts:
        characters += len(text)
        if batch and characters > _BATCH_CHARACTERS:
            yield batch
            batch = []
            characters = len(text)
        batch.append(text)
    yield batch


def _is_byte_level(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether each letter of the vocabulary's tokens represents one byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = tokenizer.get_vocab()
    letters = set(
        "".join(
            token for token, id_ in vocabulary.items() if id_ not in tokenizer.added_tokens_decoder
        )
    )
    return "Ġ" in vocabulary and letters <= set(ByteLevel.alphabet())
