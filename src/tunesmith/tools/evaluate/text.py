"""Scores of an answer as text, against a reference.

exact, contains and regex give 0 or 1; f1 and rouge-l a share. The latter two are those of the
field, so that a figure can stand beside one from elsewhere: SQuAD's token F1 (its evaluation
script, v2) and ROUGE-L's F-measure as the package rouge_score computes it without stemming.
"""

import re
import string
from collections import Counter

import regex

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_WORD = re.compile(r"[^a-z0-9]+")


def exact(answer: str, reference: str) -> float:
    """1 for equal texts, outer whitespace aside."""
    return float(answer.strip() == reference.strip())


def contains(answer: str, reference: str) -> float:
    """1 if the reference, without outer whitespace, stands in the answer."""
    return float(reference.strip() in answer)


def matches(answer: str, pattern: str) -> float:
    """1 if the pattern matches somewhere in the answer (`^` and `$` tie it to its ends).

    The syntax is that of the package `regex`, which includes that of `re`.
    """
    found = regex.search(pattern.strip(), answer.strip())
    return float(found is not None)


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words that both have, as SQuAD: no case, punctuation or articles."""
    answer_words = squad_words(answer)
    reference_words = squad_words(reference)
    if not answer_words or not reference_words:
        return float(answer_words == reference_words)
    common = (Counter(answer_words) & Counter(reference_words)).total()
    return _f_measure(common, len(answer_words), len(reference_words))


def squad_words(text: str) -> list[str]:
    """The words that SQuAD compares."""
    without_punctuation = text.lower().translate(_PUNCTUATION)
    return _ARTICLES.sub(" ", without_punctuation).split()


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words of a-z and 0-9."""
    answer_words = rouge_words(answer)
    reference_words = rouge_words(reference)
    common = common_subsequence(answer_words, reference_words)
    return _f_measure(common, len(answer_words), len(reference_words))


def rouge_words(text: str) -> list[str]:
    """The words that ROUGE compares; none of a text in another script."""
    return _NO_WORD.sub(" ", text.lower()).split()


def common_subsequence(first: list[str], second: list[str]) -> int:
    """The length of the longest common subsequence.

    Bit-parallel (Hyyrö 2004): bit i of `row` is 0 where the length grows at word i of `first`; one
    addition of whole numbers in place of a row of the table.
    """
    # A bit for each place at which a word stands in the first text.
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        # Places of this word at which the length does not grow yet.
        matching = row & places.get(word, 0)
        # Hyyrö's step: the addition carries a match past the places before it.
        row = (row + matching | row - matching) & full
    # A bit of 0 is a place at which the length grows.
    return len(first) - row.bit_count()


def _f_measure(common: int, answer_words: int, reference_words: int) -> float:
    if common == 0:
        return 0.0
    precision = common / answer_words
    recall = common / reference_words
    return 2 * precision * recall / (precision + recall)
