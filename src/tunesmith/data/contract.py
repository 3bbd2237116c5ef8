"""The token contract: what must hold of the tokens before a model trains on them.

Every rule checks all examples (arrays at a time, so a million rows take seconds), says how many things it checked, and
names the first fault by its row, with the tokens around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tunesmith.data.template import Template
from tunesmith.data.tokens import TokenSet
from tunesmith.errors import DataError

_CHUNK = 1 << 22  # tokens checked at once
_TAIL = 4  # tokens that a template may write after an end token (a line break) where these are supervised too
_CONTEXT = 12  # tokens on each side of a fault in an excerpt


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

    @property
    def broken(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.broken)

    def raise_if_broken(self) -> None:
        """Raise DataError for the first broken check."""
        for check in self.broken:
            raise DataError(
                f"the token contract is broken: {check.name} ({check.broken:,} of {check.checked:,} {check.of})",
                where=f"{self.split}: {check.where}",
                why=check.why,
                fix=check.fix,
            )


class _Chunk(NamedTuple):
    """Some examples of one source. first: index of the first in the token set; ids, trained: [tokens];
    offsets: [n + 1] from 0; cut: [n], rows cut at seq_len; leaks: [n], rows whose prompt was seen to be supervised."""

    first: int
    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    cut: np.ndarray
    leaks: np.ndarray

    def rows(self, at: np.ndarray) -> np.ndarray:
        """The rows that hold some tokens."""
        return np.searchsorted(self.offsets, at, side="right") - 1


class _Rule(NamedTuple):
    """One rule. find: how many things of a chunk it checks, and the tokens that break it (indices into the chunk)."""

    name: str
    of: str
    find: Callable[[_Chunk], tuple[int, np.ndarray]]
    why: str
    fix: str
    note: str = ""


def check_tokens(tokens: TokenSet, template: Template, tokenizer: Any, *, vocab_size: int, split: str) -> Contract:
    """Check the tokens of a split.

    Args:
        vocab_size: entries of the model's embedding; every id must be below it.
        split: `train` or `validation`, for errors.
    """
    counts, empty = tokens.counts, "the split is not empty"
    if not len(tokens):
        why = (
            f"{counts.rows:,} rows were read, {counts.dropped:,} dropped as too long, "
            f"{counts.emptied:,} dropped because the cut left no supervised token"
        )
        fix = "raise data.seq_len, or widen the split"
        return Contract(split, (Check(empty, counts.rows, "rows", max(1, counts.rows), counts.source, why, fix),))
    rules = _rules(tokens, template, tokenizer, vocab_size)
    checked, broken = [0] * len(rules), [0] * len(rules)
    first: dict[int, tuple[int, int]] = {}  # rule: example and token of its first fault
    for chunk in _chunks(tokens):
        for n, rule in enumerate(rules):
            count, faults = rule.find(chunk)
            if len(faults) and not broken[n]:
                row = int(chunk.rows(faults[:1])[0])
                first[n] = chunk.first + row, int(faults[0] - chunk.offsets[row])
            checked[n], broken[n] = checked[n] + count, broken[n] + len(faults)
    checks = [Check(empty, counts.rows, "rows")]
    for n, rule in enumerate(rules):
        fault = {}
        if n in first:
            why = f"{rule.why}: {_excerpt(tokens, tokenizer, *first[n])}"
            fault = {"where": tokens.where(first[n][0]), "why": why, "fix": rule.fix}
        checks.append(Check(rule.name, checked[n], rule.of, broken[n], **fault, note=rule.note))
    return Contract(split, tuple(checks))


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
            yield _Chunk(first + at, ids, trained, offsets, arrays.cut[at:to], leaks[at:to])
            at = to
        first += len(part)


def _excerpt(tokens: TokenSet, tokenizer: Any, example: int, at: int) -> str:
    """The decoded tokens around one of them, which stands in brackets."""
    ids = tokens[example].ids.tolist()
    left, right = max(0, at - _CONTEXT), min(len(ids), at + _CONTEXT + 1)

    def text(span: list[int]) -> str:
        return "".join(tokenizer.decode([t]) if 0 <= t < len(tokenizer) else f"<{t}>" for t in span)

    around = f"{text(ids[left:at])}⟦{text(ids[at : at + 1])}⟧{text(ids[at + 1 : right])}"
    return f"{'…' if left else ''}{around}{'…' if right < len(ids) else ''}".encode("unicode_escape").decode()


# --- the rules ------------------------------------------------------------------------------------------------------


def _rules(tokens: TokenSet, template: Template, tokenizer: Any, vocab_size: int) -> list[_Rule]:
    end_ids = np.asarray(sorted(template.end_ids), np.int64)
    ends = ", ".join(tokenizer.convert_ids_to_tokens(end_ids.tolist())) or "none"
    bos, counts = tokenizer.bos_token_id, tokens.counts
    prompts = f"{counts.prompts:,} prompts rendered apart and compared"
    if counts.prompts_apart:
        prompts += f", {counts.prompts_apart:,} not comparable"

    def unsupervised(chunk: _Chunk) -> tuple[int, np.ndarray]:
        starts, trained = chunk.offsets[:-1], chunk.trained.astype(np.int64)
        trained[starts] = 0  # nothing predicts the first token
        return len(starts), starts[np.add.reduceat(trained, starts) == 0]

    def unended(chunk: _Chunk) -> tuple[int, np.ndarray]:
        """The last token of each supervised stretch ends an answer, unless the row was cut there."""
        last = np.zeros(len(chunk.ids), np.bool_)
        last[chunk.offsets[1:] - 1] = True
        every = np.flatnonzero(chunk.trained & (last | ~np.append(chunk.trained[1:], False)))
        stops = every[~np.isin(chunk.ids[every], end_ids)]
        rows = chunk.rows(stops)
        allowed = last[stops] & chunk.cut[rows]
        for back in range(1, _TAIL):
            inside = stops - back >= chunk.offsets[rows]
            allowed |= last[stops] & inside & np.isin(chunk.ids[np.maximum(stops - back, 0)], end_ids)
        return len(every), stops[~allowed]

    def two_bos(chunk: _Chunk) -> tuple[int, np.ndarray]:
        if bos is None:
            return 0, chunk.offsets[:0]
        second = np.minimum(chunk.offsets[:-1] + 1, len(chunk.ids) - 1)
        two = (chunk.ids[chunk.offsets[:-1]] == bos) & (chunk.ids[second] == bos) & (np.diff(chunk.offsets) > 1)
        return len(two), second[two]

    def prompt_supervised(chunk: _Chunk) -> tuple[int, np.ndarray]:
        """The first token is never supervised; and where the prompt was rendered apart, none of it is."""
        rows = np.flatnonzero(chunk.trained[chunk.offsets[:-1]] | chunk.leaks)
        at = [start + int(np.argmax(chunk.trained[start:])) for start in chunk.offsets[rows].tolist()]
        return len(chunk.leaks), np.asarray(at, np.int64)

    def beyond_vocabulary(chunk: _Chunk) -> tuple[int, np.ndarray]:
        return len(chunk.ids), np.flatnonzero((chunk.ids < 0) | (chunk.ids >= vocab_size))

    return [
        _Rule(
            "every row has a supervised token",
            "rows",
            unsupervised,
            "no token of it carries loss",
            "delete the row, or look at data.train_on and data.template",
        ),
        _Rule(
            "every supervised answer ends with an end token",
            "answers",
            unended,
            f"the end tokens are {ends}, and a supervised stretch ends on another",
            "use a template that ends each answer (data.template), or the tokenizer of the model",
            f"end tokens: {ends}",
        ),
        _Rule(
            "no row begins with two BOS tokens",
            "rows",
            two_bos,
            "the template writes a BOS and the tokenizer adds one",
            "remove the BOS from the template (data.template), or from the rows",
            "the tokenizer has no BOS" if bos is None else "",
        ),
        _Rule(
            "the mask does not reach the prompt",
            "rows",
            prompt_supervised,
            "a token of the prompt carries loss",
            "use another template (data.template); this one cannot be masked",
            prompts,
        ),
        _Rule(
            "every token is in the model's vocabulary",
            "tokens",
            beyond_vocabulary,
            f"the model's embedding has {vocab_size:,} entries, and the tokenizer gives an id beyond them",
            "use the model's own tokenizer, or name new tokens in model.added_tokens",
        ),
    ]
