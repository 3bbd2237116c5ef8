"""Checks for rows that each read well but repeat or contradict each other.

Nothing here changes a row or decides what is trained on. What is found is counted and shown before
the first step (`prepare.py`), `data.leave_out` leaves it out, and rows that are held out keep their
near-duplicates with them (`splits.py`).
"""

import hashlib
import logging
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, get_args

from tunesmith.config.schema import RowFault, Source
from tunesmith.data.compare.near_duplicates import find_near_duplicates, words_of
from tunesmith.data.compare.row_texts import RowText, by_source, limits, read_texts, sampled_rows
from tunesmith.data.source.open_source import Rows
from tunesmith.host.files import measure_once

log = logging.getLogger(__name__)

# Raise it when the same rows would be judged otherwise.
ROW_CHECKS_VERSION = 6

# Of more rows a line says that they are compared: it takes more than some seconds.
TOLD_ROWS = 20_000

ROW_FAULTS: tuple[RowFault, ...] = get_args(RowFault)

# Shorter prompts, such as `Go on.`, are no question of their own.
MIN_PROMPT_WORDS = 3
# Rows of one prompt, or of one long answer, are one question: unless so many have it that it is a
# template's, or a refusal.
MAX_SHARED_SHARE = 0.01
MAX_SHARED_ROWS = 10
# Where more rows repeat an answer, these answers are what the data teaches.
MAX_REPEATED_SHARE = 0.5
# Longer answers to one prompt may differ by design, where many prompts have several.
SHORT_ANSWER_WORDS = 12
MAX_FREE_SHARE = 0.1

SourceRows = Sequence[tuple[Source, Rows]]


@dataclass(frozen=True)
class RowFindings:
    """The findings in the rows of some sources; rows are indices over all sources together.

    Attributes:
        rows: of all sources.
        compared: how many of them were looked at.
        near_duplicates: groups of rows that say nearly the same, `near_duplicates.py` has the rule.
        shared: groups of rows with one prompt, or with one answer of several words.
        contradictions: groups of rows with one prompt and different answers, or with one prompt and
            the same answers of which they say that another is good.
    """

    rows: int = 0
    compared: int = 0
    near_duplicates: list[list[int]] = field(default_factory=list)
    shared: list[list[int]] = field(default_factory=list)
    contradictions: list[list[int]] = field(default_factory=list)

    def faulty_rows(self, fault: RowFault) -> list[int]:
        """The rows that `data.leave_out` leaves out for one fault, in order.

        The first of near-duplicates stays. Of rows that contradict each other none does: nothing
        here knows which is right.
        """
        if fault == "near-duplicates":
            rows = [row for group in self.near_duplicates for row in group[1:]]
        else:
            rows = [row for group in self.contradictions for row in group]
        return sorted(set(rows))

    def mapped(self, take: Callable[[list[int]], list[int]]) -> "RowFindings":
        """Map the findings to other rows: those that `take` gives for a list of rows."""

        def groups(of: list[list[int]]) -> list[list[int]]:
            return [group for group in map(take, of) if len(group) > 1]

        return replace(
            self,
            near_duplicates=groups(self.near_duplicates),
            shared=groups(self.shared),
            contradictions=groups(self.contradictions),
        )

    def without(self, left_out: Iterable[int]) -> "RowFindings":
        """Leave rows out of the findings; the others keep their indices."""
        gone = set(left_out)
        return self.mapped(lambda rows: [row for row in rows if row not in gone])


def check_rows(sources: SourceRows) -> RowFindings:
    """Look at the rows of some sources, or take what was found in the same rows before."""

    def check() -> RowFindings:
        indices = sampled_rows(sources)
        if len(indices) > TOLD_ROWS:
            log.info("comparing %s rows, once: the result is cached", f"{len(indices):,}")
        counts = [len(own) for _, _, own in by_source(sources, indices)]
        findings = find_faults(read_texts(sources, indices), counts)
        at_indices = findings.mapped(lambda rows: [indices[row] for row in rows])
        return replace(at_indices, rows=indices.stop)

    return measure_once("row-checks", _key(sources), check, RowFindings)


def checked_before(sources: SourceRows) -> RowFindings:
    """Read what `check_rows` found in the same rows before; nothing where it did not look."""

    def absent() -> RowFindings:
        raise LookupError("these rows were not compared before")

    with suppress(LookupError):
        return measure_once("row-checks", _key(sources), absent, RowFindings)
    return RowFindings()


def check_across(validation: SourceRows, train: SourceRows) -> list[list[int]]:
    """Return pairs [row of `validation`, row of `train`] that are near-duplicates.

    There is one pair for each row of `validation` that has any. Rows are indices over the sources
    of either.
    """
    first = sum(len(rows) for _, rows in train)
    pairs = []
    for group in check_rows([*train, *validation]).near_duplicates:
        if group[0] < first:
            pairs += [[row - first, group[0]] for row in group if row >= first]
    return sorted(pairs)


def place(sources: SourceRows, index: int) -> str:
    """`file:line` of a row by its index over all sources together."""
    for _, rows in sources:
        if index < len(rows):
            return rows.where(index)
        index -= len(rows)
    raise IndexError(index)


def _key(sources: SourceRows) -> list[Any]:
    described = []
    for source, rows in sources:
        described.append([rows.digest(), source.format, sorted(source.columns.items())])
    return [ROW_CHECKS_VERSION, limits(), described]


def find_faults(texts: Iterable[RowText | None], parts: Sequence[int] | None = None) -> RowFindings:
    """All faults of some rows; rows are counted from 0.

    Args:
        parts: as for `find_near_duplicates`.
    """
    answers = _Answers()
    near_duplicates = find_near_duplicates(answers.observe(texts), parts)
    count = answers.count
    return RowFindings(count, count, near_duplicates, answers.shared(), answers.contradictions())


# Contradictions ---------------------------------------------------------------------------------


class _Answers:
    """The answers to each prompt, and the prompts of each answer."""

    def __init__(self) -> None:
        # By a hash of the prompt: of each row its index, a hash of its answer, whether it is short.
        self._rows: dict[int, list[tuple[int, int, bool]]] = {}
        # By a hash of the answer: the rows of each long one.
        self._long: dict[int, list[int]] = {}
        # By a hash of prompt and answers, in the same form: for its answer what is good in it.
        self._judged: dict[int, list[tuple[int, int, bool]]] = {}
        self.count = 0

    def observe(self, texts: Iterable[RowText | None]) -> Iterator[RowText | None]:
        """Pass the rows on, and keep hashes of what they ask and answer."""
        for row, text in enumerate(texts):
            self.count += 1
            if text is not None and not text.is_plain:
                self._add(row, text)
            yield text

    def _add(self, row: int, text: RowText) -> None:
        words = words_of(text.answer)
        answer = _hash64(" ".join(words))
        is_short = len(words) <= SHORT_ANSWER_WORDS
        if not is_short:
            self._long.setdefault(answer, []).append(row)
        prompt = _normal(text.prompt)
        if text.is_good is not None or text.chosen:
            self._add_judged(row, text, prompt, words)
        if len(words_of(prompt)) < MIN_PROMPT_WORDS:
            return
        # Other answers of pairs and of feedback are not other truths.
        answer = answer if text.is_answered else 0
        rows = self._rows.setdefault(_hash64(f"{prompt}\n{text.given}"), [])
        rows.append((row, answer, is_short))

    def _add_judged(self, row: int, text: RowText, prompt: str, words: list[str]) -> None:
        # Sorted, so that a pair is the same one with its sides swapped.
        answers = " ".join(sorted(words) if text.chosen else words)
        good = f"{text.is_good}\n{' '.join(words_of(text.chosen))}"
        rows = self._judged.setdefault(_hash64(f"{prompt}\n{text.given}\n{answers}"), [])
        rows.append((row, _hash64(good), True))

    def shared(self) -> list[list[int]]:
        most = max(MAX_SHARED_ROWS, MAX_SHARED_SHARE * self.count)
        groups = [[row for row, _, _ in rows] for rows in self._rows.values()]
        repeated = [rows for rows in self._long.values() if len(rows) > 1]
        # As in an FAQ whose questions are put in several ways: what is held out with all rows of
        # its answer cannot be learned, and its loss says nothing of the answers that were.
        if sum(map(len, repeated)) <= MAX_REPEATED_SHARE * self.count:
            groups += repeated
        return sorted(group for group in groups if 1 < len(group) <= most)

    def contradictions(self) -> list[list[int]]:
        """Groups of rows; none of long answers that are several by design."""
        short: list[list[int]] = []
        long: list[list[int]] = []
        for rows in chain(self._rows.values(), self._judged.values()):
            if len({answer for _, answer, _ in rows}) < 2:
                continue
            group = [row for row, _, _ in rows]
            if all(is_short for _, _, is_short in rows):
                short.append(group)
            elif len(rows) <= MAX_SHARED_ROWS:
                long.append(group)
        # Several answers to many prompts are a way to write data: samples, drafts, ranks.
        if sum(map(len, long)) > max(MAX_SHARED_ROWS, MAX_FREE_SHARE * self.count):
            long = []
        return sorted(short + long)


def _normal(text: str) -> str:
    """A text without what does not make it another question: case, white space, its last sign."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.rstrip(" .?!:;。？！")


def _hash64(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
