"""Functions that score an answer by comparing it with a reference text.

The scorers exact, contains and regex give 0 or 1. The scorers f1 and rouge-l give a number from 0
to 1 that is comparable with published results: f1 is SQuAD's token F1 (evaluation script v2), and
rouge-l is the F-measure of ROUGE-L in the package rouge_score without stemming.
"""

import re
import string
from collections import Counter

import regex

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact(answer: str, reference: str) -> float:
    """Return 1 if the texts are equal, ignoring leading and trailing whitespace, else 0."""
    return float(answer.strip() == reference.strip())


def contains(answer: str, reference: str) -> float:
    """Return 1 if the answer contains the reference, else 0. The reference is stripped first."""
    return float(reference.strip() in answer)


def matches(answer: str, pattern: str) -> float:
    """Return 1 if the pattern matches anywhere in the answer, else 0.

    The pattern has the syntax of the package `regex`, which extends `re`. `^` and `$` match the
    start and the end of the answer.
    """
    return float(regex.search(pattern.strip(), answer.strip()) is not None)


def token_f1(answer: str, reference: str) -> float:
    """Compute SQuAD's word-level F1 score. Case, punctuation and articles are ignored."""
    answer_words = squad_words(answer)
    reference_words = squad_words(reference)
    if not answer_words or not reference_words:
        return float(answer_words == reference_words)
    common = (Counter(answer_words) & Counter(reference_words)).total()
    return _f_measure(common, len(answer_words), len(reference_words))


def squad_words(text: str) -> list[str]:
    """Split a text into the words that SQuAD compares."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def rouge_l(answer: str, reference: str) -> float:
    """Compute the F-measure of the longest common subsequence of words."""
    answer_words = rouge_words(answer)
    reference_words = rouge_words(reference)
    common = common_subsequence(answer_words, reference_words)
    return _f_measure(common, len(answer_words), len(reference_words))


def rouge_words(text: str) -> list[str]:
    """Split a text into the words that ROUGE compares, which consist of a-z and 0-9.

    A text in another script has no ROUGE words.
    """
    return re.findall("[a-z0-9]+", text.lower())


def common_subsequence(first: list[str], second: list[str]) -> int:
    """Return the length of the longest common subsequence of two lists of words.

    The algorithm is bit-parallel (Hyyrö 2004): one addition of integers computes an entire row of
    the dynamic programming table. Bit i of `row` is 0 if the length grows at word i of `first`.
    """
    # Word -> bit mask of the word's positions in `first`.
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        # Positions of this word in `first` at which the length does not grow yet.
        matching = row & places.get(word, 0)
        # Update step of the paper: in each block of ones, the sum clears the bit of the first
        # match, and its carry sets the zero bit after the block.
        row = (row + matching | row - matching) & full
    # The number of zero bits in `row` is the length of the subsequence.
    return len(first) - row.bit_count()


def _f_measure(common: int, answer_words: int, reference_words: int) -> float:
    if common == 0:
        return 0.0
    precision = common / answer_words
    recall = common / reference_words
    return 2 * precision * recall / (precision + recall)
