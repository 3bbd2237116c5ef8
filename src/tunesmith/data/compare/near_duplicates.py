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
4. **They teach the same**: their tools are equal, the labels of feedback are equal, and the chosen
   answers of pairs have the same words.
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
from array import array
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
# So few rows are compared all with all.
_MAX_ALL_PAIRS_ROWS = 64

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


class WordArrays(NamedTuple):
    """The words of all n rows as numbers, each row between edges, one after another.

    Attributes:
        words: uint32; four _BORDER stand between prompt and answer and four _EDGE between two rows,
            so that no context has words of both sides.
        starts, borders, stops: int64 [n], of each row its first word, its border, and the end.
        numbers: uint32 [n], a hash of the numbers and operators of the prompt.
        kinds: uint32 [n], a hash of what else is equal in near-duplicates.
    """

    words: np.ndarray
    starts: np.ndarray
    borders: np.ndarray
    stops: np.ndarray
    numbers: np.ndarray
    kinds: np.ndarray

    def row(self, i: int) -> np.ndarray:
        return self.words[self.starts[i] : self.stops[i]]

    def prompt(self, i: int) -> np.ndarray:
        return self.words[self.starts[i] : self.borders[i]]

    def answer(self, i: int) -> np.ndarray:
        return self.words[self.borders[i] + _CONTEXT_WORDS : self.stops[i]]


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
    arrays = read_words(texts)
    count = len(arrays.starts)
    groups = Groups()
    _join_equal(arrays, groups)
    features = _Features(arrays, parts or [count])
    check = _PairCheck(arrays, features)
    if count <= _MAX_ALL_PAIRS_ROWS:
        _join_matches(combinations(range(count), 2), check, groups)
        return groups.of_several()
    rare = features.below(_RARE_ROWS)
    for rows in _bands(rare):
        _join_matches(combinations(rows, 2), check, groups)
    for rows in _bands(features.sets):
        if len(rows) <= _RARE_ROWS:
            continue  # found by their rare words
        pairs = list(pairwise(rows))
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


def read_words(texts: Iterable[RowText | None]) -> WordArrays:
    """The words of rows as hashes; a row that is None has no word."""
    hashes: dict[str, int] = {}
    words = array("I", [_EDGE] * _CONTEXT_WORDS)
    starts, borders, stops = array("q"), array("q"), array("q")
    numbers = array("I")
    kinds = array("I")

    def add(text: str) -> list[str]:
        row_words = words_of(text)
        for word in row_words:
            value = hashes.get(word)
            if value is None:
                value = max(_FIRST_WORD, zlib.crc32(word.encode("utf-8", "surrogatepass")))
                hashes[word] = value
            words.append(value)
        return row_words

    for text in texts:
        starts.append(len(words))
        prompt = add(text.prompt) if text else []
        borders.append(len(words))
        words.extend([_BORDER] * _CONTEXT_WORDS)
        answer = add(text.answer) if text else []
        stops.append(len(words))
        words.extend([_EDGE] * _CONTEXT_WORDS)
        # Plain text has no prompt: its own numbers tell it from others.
        counted = answer if text and text.is_plain else prompt
        figures = " ".join(word for word in counted if not _LETTERS.fullmatch(word))
        numbers.append(zlib.crc32(figures.encode()))
        kinds.append(_kind_of(text) if text else 0)
    return WordArrays(
        words=np.frombuffer(words, np.uint32),
        starts=np.array(starts, np.int64),
        borders=np.array(borders, np.int64),
        stops=np.array(stops, np.int64),
        numbers=np.array(numbers, np.uint32),
        kinds=np.array(kinds, np.uint32),
    )


def _kind_of(text: RowText) -> int:
    """A hash of a row's tools and label, and of the words of a pair's chosen answer."""
    described = f"{text.tools}\n{text.is_good}\n{' '.join(words_of(text.chosen))}"
    return zlib.crc32(described.encode("utf-8", "surrogatepass"))


def _join_equal(arrays: WordArrays, groups: Groups) -> None:
    """Join the rows of the same words in the same order that teach the same."""
    firsts: dict[tuple[int, bytes], int] = {}
    for row in range(len(arrays.starts)):
        words = arrays.row(row)
        if len(words) > _CONTEXT_WORDS:  # more than the border
            first = firsts.setdefault((int(arrays.kinds[row]), words.tobytes()), row)
            if first != row:
                groups.join(first, row)


# Features ---------------------------------------------------------------------------------------


class RowSets(NamedTuple):
    """A set of numbers for each row, one after another.

    Attributes:
        values: uint32, each row's in ascending order, without repetition.
        offsets: int64 [n + 1].
    """

    values: np.ndarray
    offsets: np.ndarray

    def row(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def where(self, is_kept: np.ndarray) -> "RowSets":
        """The sets without the values that are not kept (bool, one for each of `values`)."""
        counts = np.concatenate([[0], np.cumsum(is_kept)])
        return RowSets(self.values[is_kept], counts[self.offsets])


class _Features:
    """The words and pairs of words of each row, and in how many rows each of them is."""

    # Counted in a table of this many places; rows of two features may share one.
    _COUNT_BITS = 24

    def __init__(self, arrays: WordArrays, parts: Sequence[int]) -> None:
        sets = _feature_sets(arrays)
        is_template = np.zeros(len(sets.values), bool)
        first = 0
        for rows in parts:
            span = slice(int(sets.offsets[first]), int(sets.offsets[first + rows]))
            counts = self._counts(sets.values[span])
            is_template[span] = counts > max(MIN_TEMPLATE_ROWS, MAX_TEMPLATE_SHARE * rows)
            first += rows
        self.sets = sets.where(~is_template)

    def _counts(self, values: np.ndarray) -> np.ndarray:
        """Count the rows that have each value."""
        places = values >> (32 - self._COUNT_BITS)
        return np.bincount(places, minlength=1)[places]

    def below(self, rows: int) -> RowSets:
        """Those that no more rows have."""
        return self.sets.where(self._counts(self.sets.values) <= rows)

    def jaccard(self, one: int, other: int) -> float:
        """The Jaccard index of two rows; 0 where one has nothing but words of templates."""
        sets = [self.sets.row(row) for row in (one, other)]
        return jaccard(*sets) if all(map(len, sets)) else 0.0


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """The Jaccard index of two sets, each without repetition; of two empty ones 1."""
    if not len(one) and not len(other):
        return 1.0
    both = np.sort(np.concatenate([one, other]))
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


def _feature_sets(arrays: WordArrays) -> RowSets:
    """The words and pairs of neighboring words of each row."""
    words = arrays.words
    # Mixed, so that a pair in another order is another feature.
    pairs = (words[:-1] * np.uint32(0x9E3779B1)) ^ (words[1:] * np.uint32(0x85EBCA6B))
    is_word = words >= _FIRST_WORD
    is_pair = is_word[:-1] & is_word[1:]
    sets = [np.zeros(0, np.uint32)]
    offsets = [0]
    for start, stop in zip(arrays.starts.tolist(), arrays.stops.tolist(), strict=True):
        if np.count_nonzero(is_word[start:stop]) >= MIN_WORDS:
            # A row's last word has no neighbor in it.
            row_words = words[start:stop][is_word[start:stop]]
            row_pairs = pairs[start : stop - 1][is_pair[start : stop - 1]]
            sets.append(np.unique(np.concatenate([row_words, row_pairs])))
            offsets.append(offsets[-1] + len(sets[-1]))
        else:
            offsets.append(offsets[-1])
    return RowSets(np.concatenate(sets), np.array(offsets, np.int64))


def _bands(sets: RowSets) -> Iterator[list[int]]:
    """Rows whose sets have equal hashes in one band, each list in order."""
    from datasketch import MinHash

    rows = np.flatnonzero(np.diff(sets.offsets))
    signatures = np.empty((len(rows), _BANDS * _BAND_HASHES), np.uint32)
    # The scheme is named: another one would find other pairs, and draw other rows.
    sketches = MinHash.generator(
        (sets.row(row).tolist() for row in rows.tolist()),
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

    def __init__(self, arrays: WordArrays, features: _Features) -> None:
        self._arrays = arrays
        self._features = features
        # Pairs that fill in a blank, which takes longest to find out: many bands have them again.
        self._rejected: set[Pair] = set()
        words = arrays.words
        self._blanks_after = _blank_contexts(_contexts(words), words[_CONTEXT_WORDS:])
        back = words[::-1]
        self._blanks_before = _blank_contexts(_contexts(back), back[_CONTEXT_WORDS:])

    def __call__(self, one: int, other: int) -> bool:
        arrays = self._arrays
        if arrays.numbers[one] != arrays.numbers[other] or (one, other) in self._rejected:
            return False
        if arrays.kinds[one] != arrays.kinds[other]:
            return False
        if self._features.jaccard(one, other) < MIN_JACCARD:
            return False
        answers = [np.unique(arrays.answer(row)) for row in (one, other)]
        prompts = [np.unique(arrays.prompt(row)) for row in (one, other)]
        if jaccard(*answers) < MIN_ANSWER_JACCARD or jaccard(*prompts) < MIN_PROMPT_JACCARD:
            return False
        if self._differ_in_blank(one, other):
            self._rejected.add((one, other))
            return False
        return True

    def _differ_in_blank(self, one: int, other: int) -> bool:
        """Tell whether two rows fill in a blank with texts that have less in common than not."""
        words = self._arrays.words
        matcher = SequenceMatcher(
            None, self._arrays.row(one).tolist(), self._arrays.row(other).tolist(), autojunk=False
        )
        row = int(self._arrays.starts[one])
        is_inside = False
        shared = 0
        differing = 0
        for tag, first, stop, first_other, stop_other in matcher.get_opcodes():
            if tag == "equal":
                shared += stop - first
                continue
            if not is_inside and self._blank_begins(words, row + first):
                is_inside = True
                shared = 0
                differing = 0
            differing += max(stop - first, stop_other - first_other)
            if is_inside and self._blank_ends(words, row + stop):
                if shared <= differing:
                    return True
                is_inside = False
        return False

    def _blank_begins(self, words: np.ndarray, at: int) -> bool:
        return int(_contexts(words[at - _CONTEXT_WORDS : at])[0]) in self._blanks_after

    def _blank_ends(self, words: np.ndarray, at: int) -> bool:
        back = words[at : at + _CONTEXT_WORDS][::-1]
        return int(_contexts(back)[0]) in self._blanks_before


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
    blanks: set[int] = set()
    contexts = contexts[: len(following)]
    # An eighth of the contexts at a time, to sort less at once.
    for eighth in range(8):
        is_here = contexts & np.uint32(7) == eighth
        keys = contexts[is_here].astype(np.uint64) << np.uint64(32) | following[is_here]
        pairs, counts = np.unique(keys, return_counts=True)
        values, firsts = np.unique(pairs >> np.uint64(32), return_index=True)
        if not len(values):
            continue
        totals = np.add.reduceat(counts, firsts)
        most = np.maximum.reduceat(counts, firsts)
        is_blank = (totals >= _MIN_BLANK_ROWS) & (most <= _MAX_BLANK_SHARE * totals)
        blanks.update(values[is_blank].tolist())
    return blanks
