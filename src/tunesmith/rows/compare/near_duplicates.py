"""Search for groups of near-duplicate rows.

Two rows are near-duplicates if all of these conditions are true:

1. **Most of their words are equal.** The Jaccard index of their words and pairs of neighboring
    words (prompt and answer together) is at least 0.6. In a question of twelve words, one or two
    words can differ. Case, punctuation and white space are ignored. Words that more than half of
    the rows of a source contain (a fixed instruction, a system prompt) are ignored, too.
2. **Their prompts have the same numbers and operators in the same order.** `What is 12 + 7?` and
    `What is 12 + 9?` are different questions.
3. **Their prompts and their answers are similar.** The Jaccard index of the words is at least 0.5
    for the answers and at least 0.3 for the prompts. `Paris` and `Madrid` answer different
    questions, and one refusal can answer many questions.
4. **They teach the same behavior.** Their tools, pictures and feedback labels are equal. If the
    rows are preference pairs, their chosen answers have the same words.

MinHash selects the pairs of rows that are compared. With 42 bands of 3 hashes, it misses one of
27,000 pairs whose Jaccard index is 0.6, and it finds 94 % of the pairs whose index is 0.4. The
search runs twice: first only with rare words, where every pair of a band is compared, and then with
all words, for larger groups of rows.
"""

import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np

from tunesmith.rows.compare.row_texts import RowText

# Minimum Jaccard index of the words and word pairs of two rows.
MIN_JACCARD = 0.6
# Minimum Jaccard index of the words of two answers, and of two prompts.
MIN_ANSWER_JACCARD = 0.5
MIN_PROMPT_JACCARD = 0.3
# Minimum number of words of a row for the comparison by words. Rows with fewer words are
# near-duplicates only if they are equal, because one different word is a large part of a short row.
MIN_WORDS = 4
# A word is ignored as a part of a template if more than this fraction of a source's rows contain
# it, and also more than MIN_TEMPLATE_ROWS rows.
MAX_TEMPLATE_FRACTION = 0.5
MIN_TEMPLATE_ROWS = 20

_BANDS = 42
_BAND_HASHES = 3
# Odd multipliers that combine the hashes of a band into one hash modulo 2^64.
_HASH_MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64
)
# A word is rare if at most this number of rows contain it.
_RARE_ROWS = 50
# Number of pairs that are tried first if more than _RARE_ROWS rows have the same hashes in a band.
# If none of these pairs is a match, the rows only share a template, and the other pairs are
# skipped.
_TRIED_PAIRS = 20

# Letters of scripts without spaces between words, such as Thai and Chinese.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[+*/=<>^%×÷≤≥]|-(?=\s?\d)")
_LETTERS = re.compile(r"[^\W\d_]+")

Pair = tuple[int, int]


def words_of(text: str) -> list[str]:
    """Split a text into words, numbers and operators, without case and punctuation."""
    if not text.isascii():
        text = _UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text))
    return _WORD.findall(text.casefold())


class Groups:
    """Disjoint sets of rows, which are built by joining pairs of rows."""

    def __init__(self) -> None:
        # Row -> the group that contains the row. A row without an entry is not joined to any other
        # row.
        self._groups: dict[int, list[int]] = {}

    def join(self, one: int, other: int) -> None:
        groups = (self._groups.setdefault(row, [row]) for row in (one, other))
        small, large = sorted(groups, key=len)
        if small is not large:
            large += small
            self._groups.update(dict.fromkeys(small, large))

    def are_joined(self, one: int, other: int) -> bool:
        return one in self._groups and self._groups[one] is self._groups.get(other)

    def joined_groups(self) -> list[list[int]]:
        """Return the groups of at least two rows, sorted by their first row."""
        groups = {id(group): sorted(group) for group in self._groups.values()}
        return sorted(group for group in groups.values() if len(group) > 1)


class _Words(NamedTuple):
    """The words of a row as 32-bit hashes.

    Attributes:
        prompt: uint32 array with the words of the prompt.
        answer: uint32 array with the words of the answer.
        numbers: hash of the numbers and operators of the prompt (rule 2 of this module).
        kind: hash of the tools, pictures, label and chosen answer (rule 4 of this module).
    """

    prompt: np.ndarray
    answer: np.ndarray
    numbers: int
    kind: int


def find_near_duplicates(
    texts: Iterable[RowText | None], parts: Sequence[int] | None = None
) -> list[list[int]]:
    """Find groups of rows that are near-duplicates.

    If rows a and b, and rows b and c, are near-duplicates, all three are in one group.

    Args:
        texts: the text of each row. Rows whose text is None are in no group.
        parts: number of rows of each source, in order. If None, all rows come from one source.

    Returns:
        Groups of sorted row numbers, sorted by their first row.
    """
    rows = [_read_words(text or _NO_TEXT) for text in texts]
    groups = Groups()
    # Kind (see `_Words`), prompt and answer -> the first row that has them. Equal later rows are
    # joined to this row.
    firsts: dict[tuple[int, bytes, bytes], int] = {}
    for i, words in enumerate(rows):
        prompt, answer = words.prompt.tobytes(), words.answer.tobytes()
        if prompt or answer:
            equal = firsts.setdefault((words.kind, prompt, answer), i)
            if equal != i:
                groups.join(equal, i)
    features = []
    first = 0
    for size in parts or [len(rows)]:
        sets = [_features(row) for row in rows[first : first + size]]
        features += _rarer(sets, max(MIN_TEMPLATE_ROWS, MAX_TEMPLATE_FRACTION * size))
        first += size

    def is_match(one: int, other: int) -> bool:
        return _are_near_duplicates(rows[one], rows[other], features[one], features[other])

    for alike in _bands(_rarer(features, _RARE_ROWS)):
        _join_matches(combinations(alike, 2), is_match, groups)
    for alike in _bands(features):
        if len(alike) <= _RARE_ROWS:
            continue  # The loop above already compared all pairs of so few rows.
        pairs = list(pairwise(alike))
        if _join_matches(pairs[:_TRIED_PAIRS], is_match, groups):
            _join_matches(pairs[_TRIED_PAIRS:], is_match, groups)
    return groups.joined_groups()


def _join_matches(
    pairs: Iterable[Pair], is_match: Callable[[int, int], bool], groups: Groups
) -> bool:
    """Join the rows of those `pairs` that are near-duplicates, according to `is_match`.

    Return True if at least one of the pairs is in the same group afterwards, else False.
    """
    has_match = False
    for one, other in pairs:
        if groups.are_joined(one, other):
            has_match = True
        elif is_match(one, other):
            groups.join(one, other)
            has_match = True
    return has_match


# Words ------------------------------------------------------------------------------------------


_NO_TEXT = RowText("", "", is_answered=False)


def _read_words(text: RowText) -> _Words:
    """Split the prompt and the answer of a row into words, and hash them."""
    prompt = words_of(text.prompt)
    answer = words_of(text.answer)
    counted = prompt
    if text.is_plain:
        # Plain text has no prompt. Compare the numbers of the entire text, which is in `answer`.
        counted = answer
    numbers = " ".join(word for word in counted if not _LETTERS.fullmatch(word))
    chosen = " ".join(words_of(text.chosen))
    return _Words(
        prompt=np.array(list(map(_hash32, prompt)), np.uint32),
        answer=np.array(list(map(_hash32, answer)), np.uint32),
        numbers=_hash32(numbers),
        kind=_hash32(f"{text.given}\n{text.is_good}\n{chosen}"),
    )


def _hash32(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


# Features ---------------------------------------------------------------------------------------


def _features(words: _Words) -> np.ndarray:
    """Return the sorted uint32 hashes of a row's words and of its pairs of neighboring words.

    A row with fewer than MIN_WORDS words has no features.
    """
    sides = (words.prompt, words.answer)
    if sum(map(len, sides)) < MIN_WORDS:
        return np.zeros(0, np.uint32)
    # Multiply both words of a pair by different numbers, so that the hash depends on their order.
    first = np.uint32(0x9E3779B1)
    second = np.uint32(0x85EBCA6B)
    features = [*sides]
    for side in sides:
        features.append((side[:-1] * first) ^ (side[1:] * second))
    return np.unique(np.concatenate(features))


def _rarer(sets: Sequence[np.ndarray], max_count: float) -> list[np.ndarray]:
    """Remove from the sets all values that are in more than `max_count` sets.

    The counters use only the first 24 bits of a value, so different values can share a counter.
    """
    counts = np.bincount(np.concatenate([np.zeros(0, np.uint32), *sets]) >> 8)
    return [values[counts[values >> 8] <= max_count] for values in sets]


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Jaccard index of two arrays of unique values. The index of empty arrays is 1."""
    if not len(one) and not len(other):
        return 1.0
    both = np.sort(np.concatenate([one, other]))
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


def _bands(sets: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Yield sorted lists of rows whose sets have equal MinHash values in one band."""
    from datasketch import MinHash

    rows = np.flatnonzero([len(values) for values in sets])
    signatures = np.empty((len(rows), _BANDS * _BAND_HASHES), np.uint32)
    # Pass the hash scheme explicitly. If a new version of the library had another default, other
    # pairs would be found and other rows held out.
    sketches = MinHash.generator(
        (sets[row].tolist() for row in rows.tolist()),
        num_perm=_BANDS * _BAND_HASHES,
        seed=1,
        hashfunc=int,
        scheme="affine32",
    )
    for i, sketch in enumerate(sketches):
        signatures[i] = sketch.hashvalues
    # Sort the rows by the key of the band, so that rows with equal keys are adjacent. A dictionary
    # of keys would take 10 KB per row.
    for band in range(_BANDS):
        first = band * _BAND_HASHES
        columns = signatures[:, first : first + _BAND_HASHES]
        keys = columns.astype(np.uint64) @ _HASH_MULTIPLIERS
        _, key_index, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        order = np.argsort(key_index, kind="stable")
        stops = np.cumsum(sizes)
        for bucket in np.flatnonzero(sizes > 1).tolist():
            stop = stops[bucket]
            members = order[stop - sizes[bucket] : stop]
            yield rows[members].tolist()


# Pairs ------------------------------------------------------------------------------------------


def _are_near_duplicates(
    one: _Words, other: _Words, features: np.ndarray, other_features: np.ndarray
) -> bool:
    """Return whether two rows are near-duplicates, see the docstring of this module."""
    if (one.numbers, one.kind) != (other.numbers, other.kind):
        return False
    # A row has no features if all of its words belong to a template.
    if not len(features) or not len(other_features):
        return False
    return (
        jaccard(features, other_features) >= MIN_JACCARD
        and jaccard(np.unique(one.answer), np.unique(other.answer)) >= MIN_ANSWER_JACCARD
        and jaccard(np.unique(one.prompt), np.unique(other.prompt)) >= MIN_PROMPT_JACCARD
    )
