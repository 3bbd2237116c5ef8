"""The token contract: what must hold of the tokens before a model trains on them.

Every rule checks all examples (arrays at a time, so a million rows take seconds), says how many things it checked, and
names the first fault by its row, with the tokens around it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from tunesmith.data.template import Template
from tunesmith.data.tokens import TokenSet
from tunesmith.errors import DataError

_CHUNK = 1 << 22  # tokens checked at once
_TAIL = 4  # tokens that a template may write after an end token (a line break) where these are supervised too
MOST_CUT = 0.1  # of the rows, with an answer that ends at seq_len: more teach the model not to stop
_FEW_CUT = f"at most {MOST_CUT:.0%} of the rows have an answer cut off by data.seq_len"
_CONTEXT = 12  # tokens on each side of a fault in an excerpt

CutAnswers = Literal["refuse", "warn", "accept"]  # what becomes of a split in which more of them are cut off


@dataclass(frozen=True)
class Check:
    """One rule's result. checked: how many things (`of`); broken: how many are wrong; where, why, fix: of the first."""

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
    warnings: tuple[str, ...] = ()  # what holds, and is seldom meant

    @property
    def broken(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.broken)

    def raise_if_broken(self) -> None:
        for check in self.broken:
            what = f"the token contract is broken: {check.name} ({check.broken:,} of {check.checked:,} {check.of})"
            raise DataError(what, where=f"{self.split}: {check.where}", why=check.why, fix=check.fix)


class _Chunk(NamedTuple):
    """Some examples of one source. first: index of the first in the token set; ids, trained: [tokens];
    offsets: [n + 1] from 0; cut: [n], rows cut at seq_len; leaks: [n], rows whose prompt was seen to be supervised;
    has_answers: as of the source."""

    first: int
    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    cut: np.ndarray
    leaks: np.ndarray
    has_answers: bool

    def rows(self, at: np.ndarray) -> np.ndarray:
        """The rows that hold some tokens."""
        return np.searchsorted(self.offsets, at, side="right") - 1


def check_tokens(
    tokens: TokenSet,
    template: Template,
    tokenizer: Any,
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
    checks = [Check("the split is not empty", counts.rows, "rows")]
    if not len(tokens):
        why = f"{counts.rows:,} rows were read, {counts.dropped:,} dropped as too long"
        why += f", {counts.emptied:,} dropped because the cut left no supervised token"
        fix = "raise data.seq_len, or widen the split"
        return Contract(split, (replace(checks[0], broken=max(1, counts.rows), where=counts.source, why=why, fix=fix),))
    end_ids, bos = sorted(template.end_ids), tokenizer.bos_token_id
    ends = ", ".join(tokenizer.convert_ids_to_tokens(end_ids)) or "none"
    apart = f", {counts.prompts_apart:,} not comparable" if counts.prompts_apart else ""
    # In the order of `_find_faults`: what must hold, of what, a note, and of what breaks it why and fix.
    rules = [
        ("every row has a supervised token", "rows", "",
         "no token of it carries loss", "delete the row, or look at data.train_on and data.template"),
        ("every supervised answer ends with an end token", "answers", f"end tokens: {ends}",
         f"the end tokens are {ends}, and a supervised stretch ends on another",
         "use a template that ends each answer (data.template), or the tokenizer of the model"),
        ("no row begins with two BOS tokens", "rows", "the tokenizer has no BOS" if bos is None else "",
         "the template writes a BOS and the tokenizer adds one",
         "remove the BOS from the template (data.template), or from the rows"),
        ("the mask does not reach the prompt", "rows", f"{counts.prompts:,} prompts rendered apart and compared{apart}",
         "a token of the prompt carries loss", "use another template (data.template); this one cannot be masked"),
        ("every token is in the model's vocabulary", "tokens", "",
         f"the model's embedding has {vocab_size:,} entries, and the tokenizer gives an id beyond them",
         "use the model's own tokenizer, or name new tokens in model.added_tokens"),
        (_FEW_CUT, "rows", "", "the model learns these answers without their end, and may not learn to stop",
         _fix_cut_answers(tokens, position_limit)),
    ]  # fmt: skip
    checks += [Check(name, 0, of, note=note) for name, of, note, _, _ in rules]
    for chunk in _chunks(tokens):
        for n, (count, faults) in enumerate(_find_faults(chunk, end_ids, bos, vocab_size)):
            check, (*_, why, fix) = checks[n + 1], rules[n]
            if len(faults) and not check.broken:
                row = int(chunk.rows(faults[:1])[0])
                why = f"{why}: {excerpt(tokens, tokenizer, chunk.first + row, int(faults[0] - chunk.offsets[row]))}"
                check = replace(check, where=tokens.where(chunk.first + row), why=why, fix=fix)
            checks[n + 1] = replace(check, checked=check.checked + count, broken=check.broken + len(faults))
    return _judge_cut_answers(Contract(split, tuple(checks)), cut_answers)


def _judge_cut_answers(contract: Contract, cut_answers: CutAnswers) -> Contract:
    """The contract in which few cut answers, or those that are accepted, break nothing."""
    *others, check = contract.checks
    if not check.broken:
        return contract
    share = f"{check.broken:,} of {check.checked:,} rows ({check.broken / check.checked:.1%})"
    if cut_answers == "refuse" and check.broken > MOST_CUT * check.checked:
        return contract
    holds = Check(_FEW_CUT, check.checked, check.of, note=f"{check.broken:,} have one")
    text = f"{share} have an answer cut off by data.seq_len, first {check.where}: {check.why}; fix: {check.fix}"
    warnings = () if cut_answers == "accept" else (text,)
    if cut_answers == "accept":
        holds = replace(holds, note=f"{share} have one, which data.allow_cut_answers accepts")
    return replace(contract, checks=(*others, holds), warnings=warnings)


def _fix_cut_answers(tokens: TokenSet, position_limit: int | None) -> str:
    """The ways on from answers without their end: a seq_len that would do, no such rows, or such answers."""
    counts = tokens.counts
    seq_len = int(tokens.lengths.max(initial=0))
    lengths = {
        counts.longest_of_99: "fits 99 % of the rows",
        counts.longest: "fits the longest row",
    }
    fixes = []
    for length, what_fits in lengths.items():
        if seq_len < length and (position_limit is None or length <= position_limit):
            fixes.append(f"data.seq_len={length} ({what_fits})")
    if not fixes and position_limit is not None and seq_len < position_limit:
        fixes.append(f"data.seq_len={position_limit} (the most that the model takes)")
    if counts.cut < counts.kept:
        fixes.append("data.too_long=drop")
    return ", or ".join([*fixes, "data.allow_cut_answers=true"])


def _chunks(tokens: TokenSet) -> Iterator[_Chunk]:
    first = 0
    for part in tokens.parts:
        at, arrays, leaks = 0, part.arrays, np.zeros(len(part), np.bool_)
        leaks[list(part.leaks)] = True
        while at < len(part):
            to = int(np.searchsorted(arrays.offsets, arrays.offsets[at] + _CHUNK, side="right")) - 1
            to = min(max(to, at + 1), len(part))
            span = slice(int(arrays.offsets[at]), int(arrays.offsets[to]))
            ids, trained = np.asarray(arrays.ids[span]), np.asarray(arrays.trained[span])
            offsets = arrays.offsets[at : to + 1] - span.start
            yield _Chunk(first + at, ids, trained, offsets, arrays.cut[at:to], leaks[at:to], part.has_answers)
            at = to
        first += len(part)


def _find_faults(chunk: _Chunk, end_ids: list[int], bos: int | None, vocab: int) -> Iterator[tuple[int, np.ndarray]]:
    """For each rule, how many things of a chunk it checks, and the tokens that break it (indices into the chunk)."""
    ids, trained, starts = chunk.ids, chunk.trained, chunk.offsets[:-1]
    # A row without a supervised token; the first does not count, because nothing predicts it.
    predicted = trained.astype(np.int64)
    predicted[starts] = 0
    yield len(starts), starts[np.add.reduceat(predicted, starts) == 0]
    # The last token of a supervised stretch that ends no answer, unless the row was cut there.
    last = np.zeros(len(ids), np.bool_)
    last[chunk.offsets[1:] - 1] = True
    every = np.flatnonzero(trained & (last | ~np.append(trained[1:], False)))
    stops = every[~np.isin(ids[every], end_ids)]
    rows = chunk.rows(stops)
    ended = np.zeros(len(stops), np.bool_)  # by an end token, and what the template writes after it
    for back in range(1, _TAIL):
        inside = stops - back >= starts[rows]
        ended |= last[stops] & inside & np.isin(ids[np.maximum(stops - back, 0)], end_ids)
    cut_off = last[stops] & chunk.cut[rows] & ~ended
    yield len(every) - int(cut_off.sum()), stops[~ended & ~cut_off]
    # The second of two BOS.
    second = np.minimum(starts + 1, len(ids) - 1)
    two = (ids[starts] == bos) & (ids[second] == bos) & (np.diff(chunk.offsets) > 1)
    yield (0, starts[:0]) if bos is None else (len(two), second[two])
    # The first supervised token of a row that supervises its first token, or its prompt as rendered apart.
    leaking = starts[trained[starts] | chunk.leaks].tolist()
    yield len(starts), np.asarray([start + int(np.argmax(trained[start:])) for start in leaking], np.int64)
    yield len(ids), np.flatnonzero((ids < 0) | (ids >= vocab))
    yield (len(starts), stops[cut_off]) if chunk.has_answers else (0, starts[:0])


def excerpt(tokens: TokenSet, tokenizer: Any, example: int, at: int) -> str:
    """The decoded tokens around one of them, which stands in brackets."""
    ids = tokens[example].ids.tolist()
    left, right = max(0, at - _CONTEXT), min(len(ids), at + _CONTEXT + 1)
    texts = [tokenizer.decode([t]) if 0 <= t < len(tokenizer) else f"<{t}>" for t in ids[left:right]]
    texts[at - left] = f"⟦{texts[at - left]}⟧"
    text = f"{'…' if left else ''}{''.join(texts)}{'…' if right < len(ids) else ''}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
