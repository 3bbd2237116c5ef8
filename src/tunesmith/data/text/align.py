"""Spans of characters -> tokens.

Generation tokenizes the prompt alone. Where a token of the whole text would lie across the edge of
a span (byte-pair merges such as " " + "good" or "\\n" + "\\n"), or white space before it has other
tokens than at the end of a text, the text is cut there and its pieces are tokenized one by one:
these are the tokens that the model is given, and those that it is to write. A tokenizer that cannot
write the answer's piece so (WordPiece within a word) keeps the merged token, which is then
supervised.

The tokenizer's own offsets tell the place of each token.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import normalize

import numpy as np

from tunesmith.errors import DataError, ModelError, first_line, is_fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Put before a piece that continues a text, and then taken off its tokens: SentencePiece tokenizers
# write a blank at the start of a text. No vocabulary has a word with a NUL in it.
_CONTEXTS = ("", "\0")
# Tokenized at once; they take some 50 bytes of memory a character.
_BATCH_CHARACTERS = 4 << 20


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


class _Tokens(NamedTuple):
    """The n tokens of a text: int32 ids, and the characters of each, [starts, ends) as int64."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


@contextmanager
def _tokenizer_errors() -> Iterator[None]:
    """Raise DataError if the tokenizer fails on a text, for example because one of its patterns
    takes too many steps.
    """
    try:
        yield
    except BaseException as error:
        if not is_fault(error):
            raise
        raise DataError(
            "the tokenizer fails on a text",
            why=first_line(error),
            fix="remove or shorten the row, or use the tokenizer of the base: model.tokenizer=NAME",
        ) from error


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
        self._is_byte_level = _is_byte_level(tokenizer)
        # Of a few texts, such as line breaks: prompts of a template end alike.
        self._ids_of_tails: dict[str, np.ndarray] = {}
        self.added_ids = np.array(sorted(tokenizer.added_tokens_decoder), np.int64)

    def encode(
        self, texts: Sequence[str], spans: Sequence[Sequence[CharSpan]], end_ids: Collection[int]
    ) -> list[Aligned]:
        """Tokenize n texts and mark the tokens that their spans, disjoint and in order, cover.

        No special token is added. One of `end_ids` must stand at each span's `stop`.
        """
        encoded = []
        for text, tokens, of_text in zip(texts, self._tokenize(texts), spans, strict=True):
            aligned = self._align(tokens, of_text, end_ids)
            cuts = self._crossed_edges(text, tokens, of_text)
            if cuts:
                apart = self._encode_apart(aligned, text, of_text, cuts, end_ids)
                aligned = apart or self._with_merged(aligned, tokens, of_text)
            encoded.append(aligned)
        return encoded

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 [n] for each text: its tokens, no special token added."""
        if not texts:
            return []
        with _tokenizer_errors():
            encoding = self.tokenizer(
                list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
            )
        return [np.array(ids, dtype=np.int32) for ids in encoding["input_ids"]]

    def _tokenize(self, texts: Sequence[str]) -> list[_Tokens]:
        """The tokens of each text, no special token added."""
        tokenized = []
        # Many in one call: the tokenizer works on a batch with several threads.
        for batch in _in_batches(texts):
            with _tokenizer_errors():
                encodings = self._core.encode_batch(batch, add_special_tokens=False)
            for encoding in encodings:
                offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
                ids = np.array(encoding.ids, np.int32)
                tokenized.append(_Tokens(ids, offsets[:, 0], offsets[:, 1]))
        return tokenized

    @cached_property
    def _core(self) -> Any:
        """The tokenizer's core, without a post-processor that cuts blanks off the offsets."""
        from tokenizers import Tokenizer
        from tokenizers.processors import TemplateProcessing

        # A copy takes a second with a large vocabulary.
        core = self.tokenizer.backend_tokenizer
        if not isinstance(core.post_processor, TemplateProcessing | None):
            core = Tokenizer.from_str(core.to_str())
            core.post_processor = None
        core.no_truncation()
        core.no_padding()
        return core

    def _align(
        self, tokens: _Tokens, spans: Sequence[CharSpan], end_ids: Collection[int]
    ) -> Aligned:
        ids, starts, ends = tokens
        trained = np.zeros(len(ids), dtype=bool)
        ended = True
        for span in spans:
            trained |= (starts >= span.start) & (starts < span.end) & (ends <= span.end)
            if span.stop < 0:
                continue
            at = int(np.searchsorted(ends, span.stop, side="right"))
            if at < len(ids) and int(ids[at]) in end_ids:
                # Even where it includes the whitespace after it (`rstrip`, as Phi 3's).
                trained[at] = True
            else:
                ended = False
        return Aligned(ids, trained, ended)

    def _with_merged(self, aligned: Aligned, tokens: _Tokens, spans: Sequence[CharSpan]) -> Aligned:
        """The text with the tokens supervised that lie across an edge of a span."""
        overlaps = np.zeros(len(aligned.ids), dtype=bool)
        for span in spans:
            overlaps |= (tokens.starts < span.end) & (tokens.ends > span.start)
        # An added token is the template's: it only takes in the white space beside it.
        is_merged = overlaps & ~aligned.trained & ~np.isin(aligned.ids, self.added_ids)
        return aligned._replace(
            trained=aligned.trained | is_merged, merged_tokens=int(is_merged.sum())
        )

    def _crossed_edges(self, text: str, tokens: _Tokens, spans: Sequence[CharSpan]) -> list[int]:
        """The edges of spans, in characters and in order, at which the text must be cut."""
        edges = []
        for span in spans:
            edges.append(span.start)
            # An end token stands at the other edge.
            if span.stop < 0:
                edges.append(span.end)
        edges = sorted({edge for edge in edges if 0 < edge < len(text)})
        # Of each edge the first token that ends behind it.
        firsts = np.searchsorted(tokens.ends, edges, side="right").tolist()
        crossed = []
        for edge, first in zip(edges, firsts, strict=True):
            # It begins later, or there is none, where normalization took in the characters between.
            is_crossed = first == len(tokens.ids) or tokens.starts[first] != edge
            if is_crossed or self._has_other_blanks(text, edge, tokens, first):
                crossed.append(edge)
        return crossed

    def _has_other_blanks(self, text: str, edge: int, tokens: _Tokens, first: int) -> bool:
        """Tell whether white space before an edge may have other tokens at the end of a text.

        Byte-level tokenizers as GPT-2's leave the last of several blanks to the word behind them:
        "\n\n" is one token, and two before a word.

        Args:
            first: the first token behind the edge.
        """
        if not self._is_byte_level or edge < 2 or not text[edge - 2 : edge].isspace():
            return False
        # The last tokens that hold all of the white space.
        blank_start = len(text[:edge].rstrip())
        blank_token = int(np.searchsorted(tokens.ends, blank_start, side="right"))
        last_ids = tokens.ids[blank_token:first]
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
        [context_ids] = self.ids([context])
        tokenized = self._tokenize(texts)
        pieces = []
        for n, (start, stop) in enumerate(stretches):
            before = len(context) if start else 0
            inside = []
            for span in spans:
                if start <= span.start and span.end <= stop:
                    inside.append(span.shifted(before - start))
            aligned = self._align(tokenized[n], inside, end_ids)
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


def _in_batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """All texts in order, fewer at once where they are long: pictures make rows of 100 KB."""
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
    """Tell whether a vocabulary writes its tokens byte by byte, each as a letter of an alphabet."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    letters = set("".join(token for token, id_ in vocabulary.items() if id_ not in added))
    return "Ġ" in vocabulary and letters <= set(ByteLevel.alphabet())


def _join(pieces: Sequence[_Piece], cuts: Sequence[int]) -> Aligned:
    """The pieces of a text as one."""
    aligned = [piece.aligned for piece in pieces]
    return Aligned(
        ids=np.concatenate([piece.ids for piece in aligned]),
        trained=np.concatenate([piece.trained for piece in aligned]),
        ended=all(piece.ended for piece in aligned),
        cuts=tuple(cuts),
    )
