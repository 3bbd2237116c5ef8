"""Checks for rows that are valid, but repeat or contradict each other.

The checks do not change the rows. `presentation/data.py` shows the findings before the first step.
`splits.py` uses them to remove the rows that `data.leave_out` names, and to keep near-duplicates
together when rows are held out.
"""

import hashlib
import logging
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import get_args

from tunesmith.config.schema import RowFault, Source
from tunesmith.host.files import measure_once
from tunesmith.rows.compare.near_duplicates import find_near_duplicates, words_of
from tunesmith.rows.compare.row_texts import RowText, by_source, limits, read_texts, sampled_rows
from tunesmith.rows.source.open_source import Rows

log = logging.getLogger(__name__)

# Version of the checks. It is part of the cache key. Increase it if a change of the code gives
# other findings in the same rows.
ROW_CHECKS_VERSION = 7

# If more rows than this are compared, a line in the log announces it, because the comparison takes
# more than a few seconds.
ANNOUNCED_ROWS = 20_000

ROW_FAULTS: tuple[RowFault, ...] = get_args(RowFault)

# Minimum length of a prompt in words. Rows with a shorter prompt, such as `Go on.`, are not grouped
# by their prompt, because its meaning depends on the earlier turns.
MIN_PROMPT_WORDS = 3
# Rows with the same prompt, or with the same long answer, form a group. A group is ignored if it
# has more rows than both limits (a fraction of all rows, and a number of rows), because its text is
# a template or a refusal.
MAX_SHARED_FRACTION = 0.01
MAX_SHARED_ROWS = 10
# If more than this fraction of the rows repeat an answer, the repetition is intended. In this case
# rows with the same answer are not grouped.
MAX_REPEATED_FRACTION = 0.5
# Maximum number of words of a short answer. Different short answers to the same prompt contradict
# each other. Different longer answers can be intended.
SHORT_ANSWER_WORDS = 12
# If more than this fraction of the rows have different long answers to the same prompt, the
# differences are intended, and these rows are not contradictions.
MAX_FREE_FRACTION = 0.1

SourceRows = Sequence[tuple[Source, Rows]]


@dataclass(frozen=True)
class RowFindings:
    """Groups of rows that repeat or contradict each other. Row numbers count over all sources.

    Attributes:
        rows: number of rows of all sources.
        compared: number of rows that were compared.
        near_duplicates: groups of near-duplicate rows, see `near_duplicates.py`.
        shared: groups of rows with the same prompt, or with the same long answer.
        contradictions: groups of rows with the same prompt and different answers, or with the same
            prompt and answers but different labels or preferences.
    """

    rows: int = 0
    compared: int = 0
    near_duplicates: list[list[int]] = field(default_factory=list)
    shared: list[list[int]] = field(default_factory=list)
    contradictions: list[list[int]] = field(default_factory=list)

    def faulty_rows(self, fault: RowFault) -> list[int]:
        """Return the sorted numbers of the rows that `data.leave_out` removes because of `fault`.

        The first row of each group of near-duplicates is kept. All rows that contradict each other
        are removed, because it is unknown which row is right.
        """
        groups = self.contradictions
        if fault == "near-duplicates":
            groups = [group[1:] for group in self.near_duplicates]
        return sorted({row for group in groups for row in group})

    def mapped(self, take: Callable[[list[int]], list[int]]) -> "RowFindings":
        """Apply `take` to each group of rows.

        Drop the groups that then have fewer than two rows.
        """

        def groups(row_groups: list[list[int]]) -> list[list[int]]:
            return [group for group in map(take, row_groups) if len(group) > 1]

        return replace(
            self,
            near_duplicates=groups(self.near_duplicates),
            shared=groups(self.shared),
            contradictions=groups(self.contradictions),
        )

    def without(self, left_out: Iterable[int]) -> "RowFindings":
        """Return the findings without the rows in `left_out`.

        The numbers of the remaining rows do not change.
        """
        removed = set(left_out)
        return self.mapped(lambda rows: [row for row in rows if row not in removed])


def check_rows(sources: SourceRows, *, only_cached: bool = False) -> RowFindings:
    """Check the rows of the sources. Findings of an earlier run are read from the cache.

    If `only_cached` is True, and the cache has no findings, return empty findings.
    """

    def check() -> RowFindings:
        if only_cached:
            raise LookupError("the cache has no check results for these rows")
        indices = sampled_rows(sources)
        if len(indices) > ANNOUNCED_ROWS:
            log.info(
                "comparing %s rows with each other; the result is cached for later starts",
                f"{len(indices):,}",
            )
        counts = [len(own) for _, _, own in by_source(sources, indices)]
        findings = find_faults(read_texts(sources, indices), counts)
        # `find_faults` returns indices into the compared rows. Convert them to numbers of all rows.
        findings = findings.mapped(lambda rows: [indices[row] for row in rows])
        return replace(findings, rows=indices.stop)

    described = [
        [rows.digest(), source.format, sorted(source.columns.items())] for source, rows in sources
    ]
    key = [ROW_CHECKS_VERSION, limits(), described]
    try:
        return measure_once("row-checks", key, check, RowFindings)
    except LookupError:
        if only_cached:
            return RowFindings()
        raise


def check_across(validation: SourceRows, train: SourceRows) -> list[list[int]]:
    """Return the pairs [row of `validation`, row of `train`] whose rows are near-duplicates.

    Each row of `validation` is in at most one pair. Row numbers count over all sources of
    `validation`, or of `train`.
    """
    first = sum(len(rows) for _, rows in train)
    pairs = []
    for group in check_rows([*train, *validation]).near_duplicates:
        if group[0] < first:
            pairs += [[row - first, group[0]] for row in group if row >= first]
    return sorted(pairs)


def place(sources: SourceRows, index: int) -> str:
    """Return `file:line` of a row. `index` counts over all sources."""
    for _, rows in sources:
        if index < len(rows):
            return rows.where(index)
        index -= len(rows)
    raise IndexError(index)


def find_faults(texts: Iterable[RowText | None], parts: Sequence[int] | None = None) -> RowFindings:
    """Find near-duplicates and contradictions. Row numbers in the result are indices into `texts`.

    Args:
        texts: the text of each row, or None for a row that is not compared.
        parts: number of rows of each source, see `find_near_duplicates`.
    """
    answers = _Answers()
    near_duplicates = find_near_duplicates(answers.observe(texts), parts)
    count = answers.count
    return RowFindings(count, count, near_duplicates, answers.shared(), answers.contradictions())


# Contradictions ---------------------------------------------------------------------------------


# Number of a row, hash of its answer, and whether the answer is short.
_RowAnswer = tuple[int, int, bool]


class _Answers:
    """Index of the rows by prompt and by answer, to find contradictions and shared texts."""

    def __init__(self) -> None:
        # Hash of a prompt -> the answers to the prompt.
        self._rows: dict[int, list[_RowAnswer]] = {}
        # Hash of a long answer -> the rows with this answer.
        self._long: dict[int, list[int]] = {}
        # Hash of a prompt and its answers -> the rows that have them. Each entry has the hash of
        # the row's label and chosen answer in place of the answer's hash.
        self._judged: dict[int, list[_RowAnswer]] = {}
        self.count = 0

    def observe(self, texts: Iterable[RowText | None]) -> Iterator[RowText | None]:
        """Yield the texts unchanged, and store the hashes of their prompts and answers."""
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
        # Prompts are equal if they differ only in case, white space or the last punctuation mark.
        normal = unicodedata.normalize("NFKC", text.prompt).casefold()
        prompt = " ".join(normal.split()).rstrip(" .?!:;。？！")
        if text.is_good is not None or text.chosen:
            # Sort the words of both answers, so that the order of chosen and rejected is ignored.
            words = sorted(words) if text.chosen else words
            judged = _hash64(f"{prompt}\n{text.given}\n{' '.join(words)}")
            good = f"{text.is_good}\n{' '.join(words_of(text.chosen))}"
            self._judged.setdefault(judged, []).append((row, _hash64(good), True))
        if len(words_of(prompt)) < MIN_PROMPT_WORDS:
            return
        if not text.is_answered:
            # Use the same hash for all answers of pairs and feedback rows, because different
            # answers to one prompt are not a contradiction in such rows.
            answer = 0
        question = _hash64(f"{prompt}\n{text.given}")
        self._rows.setdefault(question, []).append((row, answer, is_short))

    def shared(self) -> list[list[int]]:
        groups = [[row for row, _, _ in answers] for answers in self._rows.values()]
        repeated = [rows for rows in self._long.values() if len(rows) > 1]
        # Do not group rows by answer if most rows repeat an answer, as in an FAQ with several
        # questions per answer. A group can be held out entirely. The model then never learns this
        # answer, so the validation loss would not show what the model has learned.
        if sum(map(len, repeated)) <= MAX_REPEATED_FRACTION * self.count:
            groups += repeated
        max_rows = max(MAX_SHARED_ROWS, MAX_SHARED_FRACTION * self.count)
        return sorted(group for group in groups if 1 < len(group) <= max_rows)

    def contradictions(self) -> list[list[int]]:
        """Return groups of rows with the same prompt and different answers, labels or preferences.

        Groups with a long answer are included only if they have at most MAX_SHARED_ROWS rows, and
        if the data set has few such groups.
        """
        short = []
        long = []
        for rows in chain(self._rows.values(), self._judged.values()):
            if len({answer for _, answer, _ in rows}) < 2:
                continue
            group = [row for row, _, _ in rows]
            if all(is_short for _, _, is_short in rows):
                short.append(group)
            elif len(rows) <= MAX_SHARED_ROWS:
                long.append(group)
        # If many prompts have several long answers, do not report them: the answers are then
        # samples, drafts or ranked answers, and not contradictions.
        max_rows = max(MAX_SHARED_ROWS, MAX_FREE_FRACTION * self.count)
        if sum(map(len, long)) > max_rows:
            return sorted(short)
        return sorted(short + long)


def _hash64(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
