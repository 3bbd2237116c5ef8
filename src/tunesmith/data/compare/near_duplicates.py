"""Rows that say nearly the same, in groups.

Two rows are near-duplicates where all of this holds:

1. **Most of their words agree.** The Jaccard index of their words and pairs of neighboring words,
   prompt and answer together, is at least 0.6: of a question of twelve words one or two may be
   replaced. Case, punctuation and white space do not count. Words that more than half of the rows
   of their source have (a fixed instruction, a system prompt) are left out.
2. **Their prompts have the same numbers and operators in the same order.** `What is 12 + 7?` and
   `What is 12 + 9?` are two questions.
3. **Prompt and answer each agree**: the Jaccard index of the answers' words is at least 0.5, that
   of the prompts' at least 0.3. `Paris` and `Madrid` are two answers to two questions, and one
   refusal may answer many.
4. **They teach the same**: their tools, their pictures and the labels of feedback are equal, and
   the chosen answers of pairs have the same words.
5. **They do not differ in a blank of a template.** A blank is a place whose surroundings, four
   words on each side, stand in at least four rows, no word being in it in more than two fifths of
   them: `Is the following country in Europe? Country: ...`. The rows of a paraphrased question have
   mostly the same word there. Two texts in a blank differ where less than half of them agrees.

MinHash finds the pairs that are compared: 42 bands of 3 hashes find a pair of index 0.6 in all but
one of 40,000 cases, and one of 0.4 in 94 %. It looks twice: at the words that few rows have, where
any pair may be a match; and at all words, for groups of more rows than that.
"""

import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np

from tunesmith.data.compare.row_texts import RowText

# Least Jaccard index of the words and pairs of words of two rows.
MIN_JACCARD = 0.6
# The same of the words of their answers, and of their prompts.
MIN_ANSWER_JACCARD = 0.5
MIN_PROMPT_JACCARD = 0.3
# A shorter row is only compared as a whole: one word is too much of it.
MIN_WORDS = 4
# What more rows of a source have is a template's.
MAX_TEMPLATE_SHARE = 0.5
MIN_TEMPLATE_ROWS = 20

# Words on each side of a blank.
_CONTEXT_WORDS = 4
_MIN_BLANK_ROWS = 4
_MAX_BLANK_SHARE = 0.4

_BANDS = 42
_BAND_HASHES = 3
# Odd numbers that make one of the hashes of a band, modulo 2^64.
_HASH_MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64
)
# A word that no more rows have is rare.
_RARE_ROWS = 50
# Pairs of rows that more rows than that share a band with: where none of the first is a match, the
# band is a template's.
_TRIED_PAIRS = 20

_EDGE = 0
_BORDER = 1
_FIRST_WORD = 2

# Letters of scripts that write no spaces between words.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[+*/=<>^%×÷≤≥]|-(?=\s?\d)")
_LETTERS = re.compile(r"[^\W\d_]+")

Pair = tuple[int, int]


def words_of(text: str) -> list[str]:
    """Words, numbers and operators, without case and punctuation."""
    if not text.isascii():
        text = _UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text))
    return _WORD.findall(text.casefold())


class Groups:
    """Disjoint sets of rows, joined pair by pair."""

    def __init__(self) -> None:
        # Of the rows that were joined; any other is alone.
        self._groups: dict[int, list[int]] = {}

    def join(self, one: int, other: int) -> None:
        large = self._groups.setdefault(one, [one])
        small = self._groups.setdefault(other, [other])
        if large is small:
            return
        if len(large) < len(small):
            large, small = small, large
        large += small
        for row in small:
            self._groups[row] = large

    def are_joined(self, one: int, other: int) -> bool:
        return one in self._groups and self._groups[one] is self._groups.get(other)

    def of_several(self) -> list[list[int]]:
        """The sets of two rows and more, each in order, by their first row."""
        groups = {id(group): sorted(group) for group in self._groups.values()}
        return sorted(group for group in groups.values() if len(group) > 1)


class _Words(NamedTuple):
    """The words of a row as numbers.

    Attributes:
        padded: uint32; four _EDGE before and behind the row, and four _BORDER between prompt and
            answer, so that no context has words of both sides.
        border: index of the first _BORDER.
        numbers: a hash of the numbers and operators of the prompt.
        kind: a hash of what else is equal in near-duplicates.
    """

    padded: np.ndarray
    border: int
    numbers: int
    kind: int

    @property
    def row(self) -> np.ndarray:
        return self.padded[_CONTEXT_WORDS:-_CONTEXT_WORDS]

    @property
    def prompt(self) -> np.ndarray:
        return self.padded[_CONTEXT_WORDS : self.border]

    @property
    def answer(self) -> np.ndarray:
        return self.padded[self.border + _CONTEXT_WORDS : -_CONTEXT_WORDS]


def find_near_duplicates(
    texts: Iterable[RowText | None], parts: Sequence[int] | None = None
) -> list[list[int]]:
    """Groups of rows that are near-duplicates, directly or over others of their group.

    Args:
        texts: of each row; None for one that is no near-duplicate of any.
        parts: how many rows come from each source, in order; None: all from one.

    Returns:
        the rows of each group in order, groups by their first row.
    """
    rows = [_read_words(text or _NO_TEXT) for text in texts]
    count = len(rows)
    groups = Groups()
    _join_equal(rows, groups)
    features = []
    first = 0
    for size in parts or [count]:
        sets = [_features(row) for row in rows[first : first + size]]
        features += _rarer(sets, max(MIN_TEMPLATE_ROWS, MAX_TEMPLATE_SHARE * size))
        first += size
    check = _PairCheck(rows, features)
    for alike in _bands(_rarer(features, _RARE_ROWS)):
        _join_matches(combinations(alike, 2), check, groups)
    for alike in _bands(features):
        if len(alike) <= _RARE_ROWS:
            continue  # found by their rare words
        pairs = list(pairwise(alike))
        if _join_matches(pairs[:_TRIED_PAIRS], check, groups):
            _join_matches(pairs[_TRIED_PAIRS:], check, groups)
    return groups.of_several()


def _join_matches(pairs: Iterable[Pair], check: "_PairCheck", groups: Groups) -> bool:
    """Join the pairs that are near-duplicates; whether one of these pairs is joined."""
    has_match = False
    for one, other in pairs:
        if groups.are_joined(one, other):
            has_match = True
        elif check(one, other):
            groups.join(one, other)
            has_match = True
    return has_match


# Words ------------------------------------------------------------------------------------------


_NO_TEXT = RowText("", "", is_answered=False)


def _read_words(text: RowText) -> _Words:
    prompt = words_of(text.prompt)
    answer = words_of(text.answer)
    edge = [_EDGE] * _CONTEXT_WORDS
    border = [_BORDER] * _CONTEXT_WORDS
    padded = [*edge, *map(_hash32, prompt), *border, *map(_hash32, answer), *edge]
    # Plain text has no prompt: its own numbers tell it from others.
    counted = answer if text.is_plain else prompt
    numbers = " ".join(word for word in counted if not _LETTERS.fullmatch(word))
    kind = f"{text.given}\n{text.is_good}\n{' '.join(words_of(text.chosen))}"
    return _Words(
        padded=np.array(padded, np.uint32),
        border=_CONTEXT_WORDS + len(prompt),
        numbers=_hash32(numbers),
        kind=_hash32(kind),
    )


def _hash32(text: str) -> int:
    return max(_FIRST_WORD, zlib.crc32(text.encode("utf-8", "surrogatepass")))


def _join_equal(rows: Sequence[_Words], groups: Groups) -> None:
    """Join the rows of the same words in the same order that teach the same."""
    firsts: dict[tuple[int, bytes], int] = {}
    for i, words in enumerate(rows):
        if len(words.row) > _CONTEXT_WORDS:  # more than the border
            first = firsts.setdefault((words.kind, words.row.tobytes()), i)
            if first != i:
                groups.join(first, i)


# Features ---------------------------------------------------------------------------------------


def _features(words: _Words) -> np.ndarray:
    """uint32, sorted: the words and pairs of neighboring words of a row; none of a short one."""
    sides = (words.prompt, words.answer)
    if sum(map(len, sides)) < MIN_WORDS:
        return np.zeros(0, np.uint32)
    # Mixed, so that a pair in another order is another feature.
    first, second = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B)
    pairs = [(side[:-1] * first) ^ (side[1:] * second) for side in sides]
    return np.unique(np.concatenate([*sides, *pairs]))


def _rarer(sets: Sequence[np.ndarray], most: float) -> list[np.ndarray]:
    """The sets without the values that more than `most` of them have.

    Values are counted by their first 24 bits; two may share a count.
    """
    counts = np.bincount(np.concatenate([np.zeros(0, np.uint32), *sets]) >> 8)
    return [values[counts[values >> 8] <= most] for values in sets]


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """The Jaccard index of two sets, each without repetition; of two empty ones 1."""
    if not len(one) and not len(other):
        return 1.0
    both = np.sort(np.concatenate([one, other]))
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


def _bands(sets: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Rows whose sets have equal hashes in one band, each list in order."""
    from datasketch import MinHash

    rows = np.flatnonzero([len(values) for values in sets])
    signatures = np.empty((len(rows), _BANDS * _BAND_HASHES), np.uint32)
    # The scheme is named: another one would find other pairs, and draw other rows.
    sketches = MinHash.generator(
        (sets[row].tolist() for row in rows.tolist()),
        num_perm=_BANDS * _BAND_HASHES,
        seed=1,
        hashfunc=int,
        scheme="affine32",
    )
    for i, sketch in enumerate(sketches):
        signatures[i] = sketch.hashvalues
    # By sorting: an index of dictionaries takes 10 KB a row.
    for band in range(_BANDS):
        columns = signatures[:, band * _BAND_HASHES : (band + 1) * _BAND_HASHES]
        keys = columns.astype(np.uint64) @ _HASH_MULTIPLIERS
        _, numbers, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        order = np.argsort(numbers, kind="stable")
        stops = np.cumsum(sizes)
        for bucket in np.flatnonzero(sizes > 1).tolist():
            members = order[stops[bucket] - sizes[bucket] : stops[bucket]]
            yield rows[members].tolist()


# Pairs ------------------------------------------------------------------------------------------


class _PairCheck:
    """A check that two rows are near-duplicates, by the rules at the top of this file."""

    def __init__(self, rows: Sequence[_Words], features: Sequence[np.ndarray]) -> None:
        self._rows = rows
        self._features = features
        # Pairs that fill in a blank, which takes longest to find out: many bands have them again.
        self._rejected: set[Pair] = set()
        # One edge between two rows.
        edge = np.full(_CONTEXT_WORDS, _EDGE, np.uint32)
        words = np.concatenate([*(row.padded[:-_CONTEXT_WORDS] for row in rows), edge])
        self._blanks_after = _blank_contexts(_contexts(words), words[_CONTEXT_WORDS:])
        back = words[::-1]
        self._blanks_before = _blank_contexts(_contexts(back), back[_CONTEXT_WORDS:])

    def __call__(self, one: int, other: int) -> bool:
        a, b = self._rows[one], self._rows[other]
        if (a.numbers, a.kind) != (b.numbers, b.kind) or (one, other) in self._rejected:
            return False
        features = self._features[one], self._features[other]
        # Some have nothing but words of templates.
        if not all(map(len, features)) or jaccard(*features) < MIN_JACCARD:
            return False
        if jaccard(np.unique(a.answer), np.unique(b.answer)) < MIN_ANSWER_JACCARD:
            return False
        if jaccard(np.unique(a.prompt), np.unique(b.prompt)) < MIN_PROMPT_JACCARD:
            return False
        if self._differ_in_blank(a, b):
            self._rejected.add((one, other))
            return False
        return True

    def _differ_in_blank(self, one: _Words, other: _Words) -> bool:
        """Tell whether two rows fill in a blank with texts that have less in common than not."""
        matcher = SequenceMatcher(None, one.row.tolist(), other.row.tolist(), autojunk=False)
        is_inside = False
        shared = 0
        differing = 0
        for tag, first, stop, first_other, stop_other in matcher.get_opcodes():
            if tag == "equal":
                shared += stop - first
                continue
            # The words before the place, and those behind it, backwards.
            before = one.padded[first : first + _CONTEXT_WORDS]
            behind = one.padded[stop + _CONTEXT_WORDS : stop + 2 * _CONTEXT_WORDS][::-1]
            if not is_inside and int(_contexts(before)[0]) in self._blanks_after:
                is_inside = True
                shared = 0
                differing = 0
            differing += max(stop - first, stop_other - first_other)
            if is_inside and int(_contexts(behind)[0]) in self._blanks_before:
                if shared <= differing:
                    return True
                is_inside = False
        return False


def _contexts(words: np.ndarray) -> np.ndarray:
    """uint32: a hash of each _CONTEXT_WORDS words after one another."""
    count = len(words) - _CONTEXT_WORDS + 1
    hashes = np.zeros(count, np.uint32)
    for k in range(_CONTEXT_WORDS):
        hashes = (hashes ^ words[k : k + count]) * np.uint32(0x01000193)
        hashes ^= hashes >> np.uint32(15)
    return hashes


def _blank_contexts(contexts: np.ndarray, following: np.ndarray) -> set[int]:
    """The contexts that no single word follows mostly.

    Args:
        contexts: uint32 [n + 1], of which the last is followed by nothing.
        following: uint32 [n], the word after each.
    """
    if not len(following):
        return set()
    keys = contexts[: len(following)].astype(np.uint64) << np.uint64(32) | following
    pairs, counts = np.unique(keys, return_counts=True)
    values, firsts = np.unique(pairs >> np.uint64(32), return_index=True)
    totals = np.add.reduceat(counts, firsts)
    most = np.maximum.reduceat(counts, firsts)
    is_blank = (totals >= _MIN_BLANK_ROWS) & (most <= _MAX_BLANK_SHARE * totals)
    return set(values[is_blank].tolist())
