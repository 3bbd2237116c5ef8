"""The token contract: conditions that the tokens must meet before a model is trained on them.

Each rule checks all examples with numpy operations on large arrays, so a million rows take only
seconds. The result of a rule has the number of checked items. If a rule is broken, the result also
has the first row that breaks it, and the tokens around the fault.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from tunesmith.errors import DataError
from tunesmith.tokens.cache import TokenArrays
from tunesmith.tokens.text.row_warnings import LOST, ROW_WARNINGS
from tunesmith.tokens.text.template import Template
from tunesmith.tokens.token_set import TokenSet
from tunesmith.units import count_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Maximum number of tokens that are checked in one step
_CHUNK = 1 << 22
# Number of tokens at the end of a row in which the end token is searched. More than one token is
# necessary, because a template may write tokens after the end token, such as a line break.
_END_WINDOW_TOKENS = 4
# Maximum fraction of rows whose answer is truncated at seq_len. If more answers are truncated, the
# model may not learn to stop.
MAX_TRUNCATED_SHARE = 0.1
_FEW_CUT = f"at most {MAX_TRUNCATED_SHARE:.0%} of the rows have an answer cut off by data.seq_len"
# Maximum fraction of rows whose answer is not rendered completely. A few such rows are harmless,
# for example if their text contains a tag of the template (</think>). If more answers are
# incomplete, the template is not suitable for the rows.
MAX_LOST_ANSWERS_SHARE = 0.01
# Number of tokens before and after the faulty token that an excerpt shows
_EXCERPT_SIDE_TOKENS = 12

# What happens if a split has too many truncated answers.
CutAnswers = Literal["refuse", "warn", "accept"]


@dataclass
class Check:
    """Result of one rule of the token contract.

    Attributes:
        checked: number of checked items.
        of: the kind of the checked items, such as "row".
        broken: number of items that break the rule.
        where, why, fix: location and cause of the first item that breaks the rule, and the fix.
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
    """Results of all rules of the token contract for one split."""

    split: str
    checks: tuple[Check, ...]
    # Warnings about problems that do not break the contract
    warnings: tuple[str, ...] = ()

    @property
    def broken(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.broken)

    def raise_if_broken(self) -> None:
        for check in self.broken:
            count = f"{check.broken:,} of {count_of(check.checked, check.of)}"
            raise DataError(
                f"the token contract is broken, because this rule does not hold for {count}: "
                f"{check.name}",
                where=f"{self.split}: {check.where}",
                why=check.why,
                fix=check.fix,
            )


class _Chunk(NamedTuple):
    """A part of the examples of one source. Each example has one or several sequences.

    Attributes:
        first: index of the chunk's first example in the token set.
        arrays: ids and mask of n examples, with offsets from 0.
        offsets: int64 [s + 1], the edges between the sequences of all examples.
        leaks: bool [n], whether a token of the row's prompt is supervised.
        has_answers: see `SourceTokens.has_answers`.
    """

    first: int
    arrays: TokenArrays
    offsets: np.ndarray
    leaks: np.ndarray
    has_answers: bool

    @property
    def starts(self) -> np.ndarray:
        """Index of the first token of each sequence, int64 [s]."""
        return self.offsets[:-1]

    def examples_of(self, tokens: np.ndarray) -> np.ndarray:
        """Return, for each of the given tokens, the index of the example that contains it."""
        return np.searchsorted(self.arrays.offsets, tokens, side="right") - 1


# Number of items that a rule checked in a chunk, and indices of the tokens that break the rule
# (int64).
_Faults = tuple[int, np.ndarray]
_NOTHING_CHECKED: _Faults = (0, np.zeros(0, np.int64))


class _Rule(NamedTuple):
    """A rule of the token contract, which checks one condition.

    Attributes:
        of: kind of the checked items.
        why, fix: cause and fix if the rule is broken.
    """

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
    """Check whether the tokens of a split meet all rules of the token contract.

    Args:
        vocab_size: number of rows of the model's embedding.
        split: name of the split in errors.
        cut_answers: what happens if there are too many truncated answers. With "refuse" they break
            the contract.
        position_limit: maximum seq_len that a fix may propose. None if there is no limit.
    """
    counts = tokens.counts
    not_empty = Check("the split is not empty", counts.rows, "row")
    if not len(tokens):
        # Count at least one broken row, so that a split without rows breaks the contract, too.
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
            # All faults are counted, but only the first fault is described.
            if len(faults) and not check.broken:
                in_chunk = int(chunk.examples_of(faults[0]))
                example = chunk.first + in_chunk
                at = faults[0] - chunk.arrays.offsets[in_chunk]
                shown = excerpt(tokens, template.tokenizer, example, at)
                check.where = tokens.where(example)
                check.why = f"{rule.why}: {shown}"
                check.fix = rule.fix
            check.checked += checked
            check.broken += len(faults)
        chunk.arrays.release()
    warnings = _judge_cut_answers(checks[-1], cut_answers) if _has_answers(tokens) else []
    return Contract(split, (not_empty, _answers_are_whole(tokens), *checks), tuple(warnings))


def _has_answers(tokens: TokenSet) -> bool:
    """Return whether the rows have answers that can be truncated.

    Rows that are supervised entirely have no answers.
    """
    return any(source.has_answers for source in tokens.parts)


def _answers_are_whole(tokens: TokenSet) -> Check:
    """Check that answers are rendered completely.

    If only a few answers are incomplete, add a note.
    """
    rows = tokens.counts.rows
    check = Check("the supervised tokens hold the answers of the row", rows, "row")
    lost = []
    broken = 0
    for part in tokens.parts:
        for name in LOST:
            if name in part.counts.flaws:
                count, first = part.counts.flaws[name]
                broken += count
                lost.append((part.rows.where(first), ROW_WARNINGS[name]))
    # Limit the sum to the number of rows, because a row with several problems is counted several
    # times.
    broken = min(rows, broken)
    if broken > MAX_LOST_ANSWERS_SHARE * rows:
        where, warning = lost[0]
        check.broken = broken
        check.where = where
        check.why = f"the row has {warning.what}: {warning.why}"
        check.fix = warning.fix
    elif broken:
        check.note = f"in {count_of(broken, 'row')} a part of the answer is not in the tokens"
    return check


def _rules(
    tokens: TokenSet,
    template: Template,
    vocab_size: int,
    position_limit: int | None,
) -> list[_Rule]:
    counts = tokens.counts
    end_ids = sorted(template.end_ids)
    # Ids of tokens that may follow a supervised span instead of an end token. The ids of pictures
    # are included, because with train_on all a picture splits the supervised text into spans.
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
            find=lambda chunk: _tokens_outside_vocabulary(chunk, vocab_size),
        ),
    ]
    if tokens.has_pairs:
        rules.append(
            _Rule(
                name="the answers of a pair differ, and their prompts do not",
                of="pair",
                why="the prompt's tokens differ between chosen and rejected, or both are the same"
                " tokens; the rejected answer begins here",
                fix="delete the row; or, if the template writes a prompt differently for each"
                " answer, use another template (data.template)",
                find=_invalid_pairs,
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
    """Change `check` to passed if only a few answers are truncated, or if `cut_answers` allows
    them.

    Return a warning if answers are truncated and the recipe does not accept this.
    """
    are_many = check.broken > MAX_TRUNCATED_SHARE * check.checked
    if not check.broken or (cut_answers == "refuse" and are_many):
        return []
    rows = count_of(check.checked, check.of)
    share = check.broken / check.checked
    cut_rows = f"{check.broken:,} of {rows} ({share:.1%})"
    fault = f"first {check.where}: {check.why}; fix: {check.fix}"
    warnings = [f"{cut_rows} with an answer cut off by data.seq_len, {fault}"]
    check.note = f"cut answers: {check.broken:,}"
    if cut_answers == "accept":
        warnings = []
        check.note = f"cut answers: {cut_rows}, which this run accepts"
    check.broken = 0
    check.where = ""
    check.why = ""
    check.fix = ""
    return warnings


def _fix_cut_answers(tokens: TokenSet, position_limit: int | None) -> str:
    """Return text with fixes for truncated answers.

    The fixes are a larger seq_len, dropping the rows, or accepting the truncated answers.
    """
    counts = tokens.counts
    seq_len = int(tokens.longest_sequences.max(initial=0))
    # Use the length as a dict key, so that two equal lengths are listed only once.
    lengths = {}
    for length, rows in ((counts.longest_of_99, "99 % of the rows"), (counts.longest, "all rows")):
        possible = min(length, position_limit or length)
        if seq_len < possible:
            fits = f"fits {rows}" if possible == length else "the model's maximum"
            lengths[possible] = f"set data.seq_len={possible} ({fits})"
    fixes = list(lengths.values())
    # Propose to drop the truncated rows only if other rows remain.
    if counts.cut < counts.kept:
        fixes.append("set data.too_long=drop")
    fixes.append("set data.allow_cut_answers=true")
    return ", or ".join(fixes)


def _chunks(tokens: TokenSet) -> Iterator[_Chunk]:
    """Yield all examples in order, in chunks of about _CHUNK tokens of one source."""
    source_start = 0
    for source in tokens.parts:
        offsets = source.arrays.offsets
        first = 0
        while first < len(source):
            stop = int(np.searchsorted(offsets, offsets[first] + _CHUNK, side="right")) - 1
            # Take at least one example, even if it has more than _CHUNK tokens.
            stop = min(max(stop, first + 1), len(source))
            arrays = source.arrays.part(first, stop)
            indices = np.arange(first, stop)
            yield _Chunk(
                first=source_start + first,
                arrays=arrays,
                offsets=arrays.sequence_offsets(),
                leaks=np.isin(indices, source.leaks),
                has_answers=source.has_answers,
            )
            first = stop
        source_start += len(source)


def _rows_without_target(chunk: _Chunk) -> _Faults:
    """Find rows in which no token is a target.

    The first token of a row is never a target, because no position predicts it.
    """
    predicted = chunk.arrays.trained.astype(np.int64)
    predicted[chunk.starts] = 0
    return (len(chunk.starts), chunk.starts[np.add.reduceat(predicted, chunk.starts) == 0])


def _rows_with_two_bos(chunk: _Chunk, bos: int | None) -> _Faults:
    """Find rows that begin with two BOS tokens.

    Return the index of the second BOS token of each row.
    """
    if bos is None:
        return _NOTHING_CHECKED
    ids = chunk.arrays.ids
    starts = chunk.starts[np.diff(chunk.offsets) > 1]
    has_two = (ids[starts] == bos) & (ids[starts + 1] == bos)
    return (len(chunk.starts), starts[has_two] + 1)


def _supervised_prompts(chunk: _Chunk) -> _Faults:
    """Find rows in which the first token or a token of the prompt is supervised.

    Return the index of the first supervised token of each such row.
    """
    trained = chunk.arrays.trained
    leaks = chunk.leaks[chunk.examples_of(chunk.starts)]
    leaking = chunk.starts[trained[chunk.starts] | leaks].tolist()
    first_trained = [start + np.argmax(trained[start:]) for start in leaking]
    return (len(chunk.starts), np.asarray(first_trained, np.int64))


def _tokens_outside_vocabulary(chunk: _Chunk, vocab: int) -> _Faults:
    ids = chunk.arrays.ids
    return (len(ids), np.flatnonzero((ids < 0) | (ids >= vocab)))


def _invalid_pairs(chunk: _Chunk) -> _Faults:
    """Find pairs with different prompts or equal answers.

    Return the index of the first token of the rejected answer of each such pair.
    """
    pairs = np.flatnonzero(chunk.arrays.firsts)
    faults = []
    for pair in pairs.tolist():
        chosen, rejected = chunk.arrays.example(pair).parts()
        prompt_length = np.argmax(chosen.trained)
        other_length = np.argmax(rejected.trained)
        have_same_prompt = np.array_equal(chosen.ids[:prompt_length], rejected.ids[:other_length])
        if np.array_equal(chosen.ids, rejected.ids) or not have_same_prompt:
            faults.append(chunk.arrays.offsets[pair] + len(chosen.ids) + other_length)
    return (len(pairs), np.asarray(faults, np.int64))


def _answers_without_text(chunk: _Chunk, end_ids: list[int]) -> _Faults:
    """Find answers in which only the end token is supervised."""
    if not chunk.has_answers:
        return _NOTHING_CHECKED
    trained = chunk.arrays.trained
    follows_trained = np.append(False, trained[:-1])
    follows_trained[chunk.starts] = False
    answer_starts = np.flatnonzero(trained & ~follows_trained)
    # Check only the first token of an answer, because tokens that a template writes after the end
    # token may be supervised, too.
    faults = answer_starts[np.isin(chunk.arrays.ids[answer_starts], end_ids)]
    return (len(answer_starts), faults)


def _answers_without_end(
    chunk: _Chunk, end_ids: list[int], followers: list[int]
) -> tuple[_Faults, _Faults]:
    """Find supervised spans in which the end token is missing.

    Return each span as the index of its last token. Spans that were truncated at seq_len are in the
    second returned value, and all others are in the first.

    Args:
        followers: ids of tokens that may follow a span instead of an end token.
    """
    # End each span at the end of its row, because the next row follows directly in the array.
    is_sequence_end = np.zeros(len(chunk.arrays.ids), np.bool_)
    is_sequence_end[chunk.offsets[1:] - 1] = True
    spans, stops = _open_spans(chunk, is_sequence_end, end_ids, followers)
    # At the end of a row, supervised tokens may follow the end token. Therefore also search the
    # tokens before the last token.
    ends_sequence = is_sequence_end[stops]
    sequences = np.searchsorted(chunk.offsets, stops, side="right") - 1
    earlier = stops - np.arange(1, _END_WINDOW_TOKENS)[:, None]
    # If an index is before the start of the row, use the row's first token, which is never a part
    # of an answer.
    earlier = np.maximum(earlier, chunk.starts[sequences])
    is_end_token = np.isin(chunk.arrays.ids[earlier], end_ids)
    has_end_token = ends_sequence & is_end_token.any(axis=0)

    examples = chunk.examples_of(stops)
    continued = chunk.arrays.continued
    is_cut_off = ends_sequence & chunk.arrays.truncated[examples]
    is_cut_off &= ~has_end_token
    # If the document continues in another example, no end token is needed, because only the last
    # example of a document has one.
    has_end_token |= ends_sequence & continued[examples]
    unfinished = int(is_cut_off.sum() + continued.sum())
    ended = (spans - unfinished, stops[~has_end_token & ~is_cut_off])
    if not chunk.has_answers:
        return ended, _NOTHING_CHECKED
    return ended, (len(chunk.starts), stops[is_cut_off])


def _open_spans(
    chunk: _Chunk, is_sequence_end: np.ndarray, end_ids: list[int], followers: list[int]
) -> tuple[int, np.ndarray]:
    """Count the supervised spans, and find the last token of each span without an end token.

    Args:
        is_sequence_end: bool [tokens], whether a token is the last of its sequence. The answers of
            a pair are two sequences.
        end_ids, followers: see `_answers_without_end`.
    """
    ids = chunk.arrays.ids
    trained = chunk.arrays.trained
    next_trained = np.append(trained[1:], False)
    is_last = is_sequence_end | ~next_trained
    span_ends = np.flatnonzero(trained & is_last)
    ends_answer = np.isin(ids[span_ends], end_ids)
    # A span within a sequence is also complete if the next token is an unsupervised end token or a
    # picture.
    in_sequence = ~is_sequence_end[span_ends]
    next_ids = np.append(ids[1:], -1)[span_ends]
    ends_answer |= in_sequence & np.isin(next_ids, followers)
    return (len(span_ends), span_ends[~ends_answer])


def excerpt(tokens: TokenSet, tokenizer: "PreTrainedTokenizerBase", example: int, at: int) -> str:
    """Return the decoded tokens around position `at`, with the token at `at` in brackets."""
    ids = tokens[example].ids.tolist()
    left = max(0, at - _EXCERPT_SIDE_TOKENS)
    right = at + 1 + _EXCERPT_SIDE_TOKENS
    before = tokenizer.decode(ids[left:at])
    shown = tokenizer.decode([ids[at]]) or ids[at]
    after = tokenizer.decode(ids[at + 1 : right])
    start = "…" if left > 0 else ""
    end = "…" if right < len(ids) else ""
    text = f"{start}{before}⟦{shown}⟧{after}{end}"
    # Escape line breaks and control characters, so that the excerpt stays on one line.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
