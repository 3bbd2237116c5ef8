"""The token contract: what must hold of the tokens before a model trains on them.

Every rule checks all examples (arrays at a time, so a million rows take seconds), says how many
things it checked, and names the first fault by its row, with the tokens around it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from tunesmith.data.text.row_warnings import LOST, ROW_WARNINGS
from tunesmith.data.text.template import Template
from tunesmith.data.tokens.cache import TokenArrays
from tunesmith.data.tokens.token_set import TokenSet
from tunesmith.errors import DataError
from tunesmith.units import count_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens checked at once.
_CHUNK = 1 << 22
# Last tokens of a row among which one ends the answer: a template may write others after it (a line
# break), supervised too.
_END_WINDOW_TOKENS = 4
# Of the rows, with an answer that ends at seq_len: more teach the model not to stop.
MOST_CUT = 0.1
_FEW_CUT = f"at most {MOST_CUT:.0%} of the rows have an answer cut off by data.seq_len"
# Of the rows, with an answer that the template renders in part. Some texts speak of the template's
# own marks (</think>), and a few such rows teach nothing; more are lost because of what rows and
# template are.
MOST_LOST_ANSWERS = 0.01
# Tokens on each side of a fault in an excerpt.
_EXCERPT_SIDE_TOKENS = 12

# What becomes of a split in which more of them are cut off.
CutAnswers = Literal["refuse", "warn", "accept"]


@dataclass
class Check:
    """One rule's result.

    Attributes:
        checked: how many things (`of`).
        broken: how many are wrong.
        where, why, fix: of the first of these.
    """

    name: str
    checked: int
    of: str
    broken: int = 0
    where: str = ""
    why: str = ""
    fix: str = ""
    note: str = ""


@dataclass(frozen=True)
class Contract:
    """All checks of one split."""

    split: str
    checks: tuple[Check, ...]
    # What holds, and is seldom meant.
    warnings: tuple[str, ...] = ()

    @property
    def broken(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.broken)

    def raise_if_broken(self) -> None:
        for check in self.broken:
            count = f"{check.broken:,} of {count_of(check.checked, check.of)}"
            raise DataError(
                f"the token contract is broken: {check.name} ({count})",
                where=f"{self.split}: {check.where}",
                why=check.why,
                fix=check.fix,
            )


class _Chunk(NamedTuple):
    """Some examples of one source, each of them one sequence or several.

    Attributes:
        first: index of the first in the token set.
        arrays: ids and mask of n examples, with offsets from 0.
        offsets: int64 [s + 1], between the sequences of all examples.
        leaks: bool [n], rows whose prompt was seen to be supervised.
        empties: bool [n], rows with an empty answer.
        has_answers: as of the source.
    """

    first: int
    arrays: TokenArrays
    offsets: np.ndarray
    leaks: np.ndarray
    empties: np.ndarray
    has_answers: bool

    @property
    def starts(self) -> np.ndarray:
        """int64 [s], the first token of each sequence."""
        return self.offsets[:-1]

    def examples_of(self, tokens: np.ndarray) -> np.ndarray:
        """The examples that hold some tokens."""
        return np.searchsorted(self.arrays.offsets, tokens, side="right") - 1


# The number of things that a rule checked in a chunk, and the tokens that break it (int64).
_Faults = tuple[int, np.ndarray]


class _Rule(NamedTuple):
    """A rule that the tokens must keep. of: the things checked; why, fix: where it is broken."""

    name: str
    of: str
    why: str
    fix: str
    find: Callable[[_Chunk], _Faults]
    note: str = ""


def check_tokens(
    tokens: TokenSet,
    template: Template,
    *,
    vocab_size: int,
    split: str,
    cut_answers: CutAnswers = "refuse",
    position_limit: int | None = None,
) -> Contract:
    """Check the tokens of a split, named in errors.

    Args:
        vocab_size: entries of the model's embedding.
        cut_answers: whether many answers without their end break the contract.
        position_limit: the longest seq_len that a fix may name; None: any.
    """
    counts = tokens.counts
    not_empty = Check("the split is not empty", counts.rows, "row")
    if not len(tokens):
        # At least one, so that a split without rows counts as broken.
        not_empty.broken = max(1, counts.rows)
        not_empty.where = counts.source
        not_empty.why = (
            f"{count_of(counts.rows, 'row')} read, {counts.dropped:,} dropped as too long,"
            f" {counts.emptied:,} dropped because truncation left no supervised token"
        )
        not_empty.fix = "raise data.seq_len, or use a larger split"
        return Contract(split, (not_empty,))
    rules = _rules(tokens, template, vocab_size, position_limit)
    checks = [Check(rule.name, 0, rule.of, note=rule.note) for rule in rules]
    for chunk in _chunks(tokens):
        for rule, check in zip(rules, checks, strict=True):
            checked, faults = rule.find(chunk)
            # Only the first fault of each rule is shown; all are counted.
            if len(faults) and not check.broken:
                in_chunk = int(chunk.examples_of(faults[:1])[0])
                example = chunk.first + in_chunk
                at = int(faults[0] - chunk.arrays.offsets[in_chunk])
                check.where = tokens.where(example)
                check.why = f"{rule.why}: {excerpt(tokens, template.tokenizer, example, at)}"
                check.fix = rule.fix
            check.checked += checked
            check.broken += len(faults)
        chunk.arrays.release()
    warnings = []
    if _has_answers(tokens):
        warnings = _judge_cut_answers(checks[-1], cut_answers)
    return Contract(split, (not_empty, _answers_are_whole(tokens), *checks), tuple(warnings))


def _has_answers(tokens: TokenSet) -> bool:
    """Return whether an answer can be cut off: not of rows that are trained on as a whole."""
    return any(source.has_answers for source in tokens.parts)


def _answers_are_whole(tokens: TokenSet) -> Check:
    """The rows whose answers the template renders in part; few are a warning of these rows."""
    rows = tokens.counts.rows
    check = Check("the supervised tokens hold the answers of the row", rows, "row")
    lost = []
    for part in tokens.parts:
        for name in LOST:
            if name in part.counts.flaws:
                count, first = part.counts.flaws[name]
                lost.append((count, part.rows.where(first), ROW_WARNINGS[name]))
    broken = min(rows, sum(count for count, _, _ in lost))
    if broken > MOST_LOST_ANSWERS * rows:
        check.broken = broken
        _, check.where, warning = lost[0]
        check.why = f"the row has {warning.what}: {warning.why}"
        check.fix = warning.fix
    elif broken:
        check.note = f"{broken:,} do not"
    return check


def _rules(
    tokens: TokenSet,
    template: Template,
    vocab_size: int,
    position_limit: int | None,
) -> list[_Rule]:
    counts = tokens.counts
    end_ids = sorted(template.end_ids)
    # Behind a stretch that need not end with one: where all is supervised, a picture ends a text.
    followers = sorted(template.earlier_end_ids)
    if template.pictures is not None:
        followers += template.pictures.ids.tolist()
    bos = template.tokenizer.bos_token_id
    ends = ", ".join(template.tokenizer.convert_ids_to_tokens(end_ids)) or "none"
    compared = f"{count_of(counts.prompts, 'prompt')} rendered separately and compared"
    if counts.prompts_apart:
        compared += f", {counts.prompts_apart:,} not comparable"
    rules = [
        _Rule(
            name="every row has a supervised token",
            of="row",
            why="none of its tokens is supervised",
            fix="delete the row, or check data.train_on and data.template",
            find=_rows_without_target,
        ),
        _Rule(
            name="every answer has a supervised token besides its end",
            of="answer",
            why="the answer is not empty, and only its end token is supervised",
            fix="use another template (data.template); or delete the row, if it has no answer",
            find=lambda chunk: _answers_without_text(chunk, end_ids),
        ),
        _Rule(
            name="every supervised answer ends with an end token",
            of="answer",
            why=f"the end tokens are {ends}, and a supervised span ends with another token",
            fix="use a template that ends each answer (data.template), or the tokenizer of the"
            " model",
            find=lambda chunk: _answers_without_end(chunk, end_ids, followers)[0],
            note=f"end tokens: {ends}",
        ),
        _Rule(
            name="no row begins with two BOS tokens",
            of="row",
            why="the template writes a BOS and the tokenizer adds one",
            fix="remove the BOS from the template (data.template), or from the rows",
            find=lambda chunk: _rows_with_two_bos(chunk, bos),
            note="the tokenizer has no BOS" if bos is None else "",
        ),
        _Rule(
            name="no prompt token is supervised",
            of="row",
            why="a token of the prompt is supervised",
            fix="use another template (data.template); this one cannot be masked correctly",
            find=_supervised_prompts,
            note=compared,
        ),
        _Rule(
            name="every token is in the model's vocabulary",
            of="token",
            why=f"the model's embedding has {vocab_size:,} entries, and the tokenizer gives an id"
            " beyond them",
            fix="use the model's own tokenizer, or name new tokens in model.added_tokens",
            find=lambda chunk: _tokens_beyond(chunk, vocab_size),
        ),
    ]
    if tokens.has_pairs:
        rules.append(
            _Rule(
                name="the answers of a pair differ, and their prompts do not",
                of="pair",
                why="the prompt's tokens differ between chosen and rejected, or both are the same"
                " tokens; the rejected answer begins here",
                fix="delete the row; or, where the template writes a prompt differently for each"
                " answer, use another (data.template)",
                find=_pairs_alike,
            )
        )
    if _has_answers(tokens):
        rules.append(
            _Rule(
                name=_FEW_CUT,
                of="row",
                why="the model learns these answers without their end, and may not learn to stop",
                fix=_fix_cut_answers(tokens, position_limit),
                find=lambda chunk: _answers_without_end(chunk, end_ids, followers)[1],
            )
        )
    return rules


def _judge_cut_answers(check: Check, cut_answers: CutAnswers) -> list[str]:
    """Let few cut answers pass, and all that are accepted; return a warning of the others."""
    are_many = check.broken > MOST_CUT * check.checked
    if not check.broken or (cut_answers == "refuse" and are_many):
        return []
    rows = count_of(check.checked, check.of)
    share = f"{check.broken:,} of {rows} ({check.broken / check.checked:.1%})"
    fault = f"first {check.where}: {check.why}; fix: {check.fix}"
    is_accepted = cut_answers == "accept"
    check.note = f"cut answers: {check.broken:,}"
    if is_accepted:
        check.note = f"cut answers: {share}, which data.allow_cut_answers accepts"
    check.broken = 0
    check.where = check.why = check.fix = ""
    return [] if is_accepted else [f"{share} with an answer cut off by data.seq_len, {fault}"]


def _fix_cut_answers(tokens: TokenSet, position_limit: int | None) -> str:
    """The ways on from answers without their end: a seq_len that would do, no such rows, or such
    answers."""
    counts = tokens.counts
    seq_len = int(tokens.longest_sequences.max(initial=0))
    # A dict: the two lengths may be equal, and are then named once.
    lengths = {}
    for length, rows in ((counts.longest_of_99, "99 % of the rows"), (counts.longest, "all rows")):
        possible = min(length, position_limit or length)
        if seq_len < possible:
            fits = f"fits {rows}" if possible == length else "the model's maximum"
            lengths[possible] = f"data.seq_len={possible} ({fits})"
    fixes = list(lengths.values())
    # Dropping is a way only if rows are left.
    if counts.cut < counts.kept:
        fixes.append("data.too_long=drop")
    fixes.append("data.allow_cut_answers=true")
    return ", or ".join(fixes)


def _chunks(tokens: TokenSet) -> Iterator[_Chunk]:
    first_of_source = 0
    for source in tokens.parts:
        offsets = source.arrays.offsets
        first = 0
        while first < len(source):
            stop = int(np.searchsorted(offsets, offsets[first] + _CHUNK, side="right")) - 1
            # At least one example, also where it alone is longer.
            stop = min(max(stop, first + 1), len(source))
            arrays = source.arrays.part(first, stop)
            indices = np.arange(first, stop)
            yield _Chunk(
                first=first_of_source + first,
                arrays=arrays,
                offsets=arrays.sequence_offsets(),
                leaks=np.isin(indices, source.leaks),
                empties=np.isin(indices, source.empties),
                has_answers=source.has_answers,
            )
            first = stop
        first_of_source += len(source)


def _rows_without_target(chunk: _Chunk) -> _Faults:
    """The first token does not count, because nothing predicts it."""
    predicted = chunk.arrays.trained.astype(np.int64)
    predicted[chunk.starts] = 0
    supervised_per_row = np.add.reduceat(predicted, chunk.starts)
    return (len(chunk.starts), chunk.starts[supervised_per_row == 0])


def _rows_with_two_bos(chunk: _Chunk, bos: int | None) -> _Faults:
    """The second BOS of each."""
    if bos is None:
        return (0, chunk.starts[:0])
    ids = chunk.arrays.ids
    starts = chunk.starts[np.diff(chunk.offsets) > 1]
    has_two = (ids[starts] == bos) & (ids[starts + 1] == bos)
    return (len(chunk.starts), starts[has_two] + 1)


def _supervised_prompts(chunk: _Chunk) -> _Faults:
    """The first supervised token of a row that supervises its first token, or its prompt as
    rendered apart.
    """
    trained = chunk.arrays.trained
    leaks = chunk.leaks[chunk.examples_of(chunk.starts)]
    leaking = chunk.starts[trained[chunk.starts] | leaks].tolist()
    first_trained = [start + int(np.argmax(trained[start:])) for start in leaking]
    return (len(chunk.starts), np.asarray(first_trained, np.int64))


def _tokens_beyond(chunk: _Chunk, vocab: int) -> _Faults:
    ids = chunk.arrays.ids
    return (len(ids), np.flatnonzero((ids < 0) | (ids >= vocab)))


def _pairs_alike(chunk: _Chunk) -> _Faults:
    """Pairs whose prompts differ, or whose answers do not: the first token where that is seen."""
    pairs = np.flatnonzero(chunk.arrays.firsts)
    faults = []
    for pair in pairs.tolist():
        chosen, rejected = chunk.arrays.example(pair).parts()
        first, second = (part.ids[: int(np.argmax(part.trained))] for part in (chosen, rejected))
        if not np.array_equal(first, second) or np.array_equal(chosen.ids, rejected.ids):
            start = int(chunk.arrays.offsets[pair])
            faults.append(start + len(chosen.ids) + len(second))
    return (len(pairs), np.asarray(faults, np.int64))


def _answers_without_text(chunk: _Chunk, end_ids: list[int]) -> _Faults:
    """The end token of each answer of which nothing else is supervised, but of empty ones."""
    if not chunk.has_answers:
        return (0, chunk.starts[:0])
    trained = chunk.arrays.trained
    is_row_start = np.zeros(len(trained), np.bool_)
    is_row_start[chunk.starts] = True
    follows_trained = np.append(False, trained[:-1]) & ~is_row_start
    answer_starts = np.flatnonzero(trained & ~follows_trained)
    # What a template writes behind the end token may be supervised too, and is no answer.
    faults = answer_starts[np.isin(chunk.arrays.ids[answer_starts], end_ids)]
    faults = faults[~chunk.empties[chunk.examples_of(faults)]]
    return (len(answer_starts), faults)


def _answers_without_end(
    chunk: _Chunk, end_ids: list[int], followers: list[int]
) -> tuple[_Faults, _Faults]:
    """The last token of each supervised stretch that ends no answer; those cut at seq_len apart.

    followers: ids behind a stretch that need no end token before them.
    """
    # Rows stand behind each other in one array; a stretch also ends where its row does.
    ids = chunk.arrays.ids
    is_row_end = np.zeros(len(ids), np.bool_)
    is_row_end[chunk.offsets[1:] - 1] = True
    # The token after a supervised one is not supervised: the stretch ends there.
    next_trained = np.append(chunk.arrays.trained[1:], False)
    is_stretch_end = chunk.arrays.trained & (is_row_end | ~next_trained)
    stretch_ends = np.flatnonzero(is_stretch_end)
    next_ids = np.append(ids[1:], -1)
    ends_answer = np.isin(ids[stretch_ends], end_ids)
    # In the middle of a row the end token may be the next one, which is not supervised.
    ends_answer |= ~is_row_end[stretch_ends] & np.isin(next_ids[stretch_ends], followers)
    stops = stretch_ends[~ends_answer]

    # At the end of a row, what the template writes after an end token may be supervised too.
    examples = chunk.examples_of(stops)
    ends_row = is_row_end[stops]
    starts = chunk.starts[np.searchsorted(chunk.offsets, stops, side="right") - 1]
    earlier = stops - np.arange(1, _END_WINDOW_TOKENS)[:, None]
    # Indices before the row are clamped to its first token, which is none of the answer.
    is_end_token = np.isin(ids[np.maximum(earlier, starts)], end_ids)
    has_end_token = ends_row & is_end_token.any(axis=0)

    is_cut_off = ends_row & chunk.arrays.truncated[examples] & ~has_end_token
    # A document ends in its last example alone.
    has_end_token |= ends_row & chunk.arrays.continued[examples]
    unfinished = int(is_cut_off.sum()) + int(chunk.arrays.continued.sum())
    ended = (len(stretch_ends) - unfinished, stops[~has_end_token & ~is_cut_off])
    if not chunk.has_answers:
        return ended, (0, chunk.starts[:0])
    return ended, (len(chunk.starts), stops[is_cut_off])


def excerpt(tokens: TokenSet, tokenizer: "PreTrainedTokenizerBase", example: int, at: int) -> str:
    """The decoded tokens around one of them, which stands in brackets."""
    ids = tokens[example].ids.tolist()
    left = max(0, at - _EXCERPT_SIDE_TOKENS)
    right = min(len(ids), at + _EXCERPT_SIDE_TOKENS + 1)
    stretches = (ids[left:at], ids[at : at + 1], ids[at + 1 : right])
    before, shown, behind = (tokenizer.decode(stretch) for stretch in stretches)
    text = "…" * (left > 0) + f"{before}⟦{shown or ids[at]}⟧{behind}" + "…" * (right < len(ids))
    # Line breaks and control characters would break the line of the report.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
