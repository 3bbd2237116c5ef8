"""The token contract: what must hold of the tokens before a model learns from them.

Each check looks at all examples (arrays at a time, so a million rows take seconds), says how many things it looked
at, and names the first thing that is wrong by its row, with the tokens around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data.tokens import Part, Template, TokenSet
from tunesmith.errors import DataError

_CHUNK = 1 << 22  # tokens looked at in one go
_TAIL = 4  # tokens that a template may put after an end token (a line break) where these are learnt too
_SHOWN = 12  # tokens on each side of a fault in an excerpt


@dataclass(frozen=True)
class Check:
    """One check. looked: how many things it looked at; broken: how many of them are wrong; where, why, fix: of the
    first wrong one."""

    name: str
    looked: int
    of: str
    broken: int = 0
    where: str = ""
    why: str = ""
    fix: str = ""
    note: str = ""


@dataclass(frozen=True)
class Contract:
    """All checks of one split."""

    what: str
    checks: tuple[Check, ...]

    @property
    def broken(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.broken)

    def raise_if_broken(self) -> None:
        """Raise DataError for the first broken check."""
        for check in self.broken:
            raise DataError(
                f"the token contract is broken: {check.name} ({check.broken:,} of {check.looked:,} {check.of})",
                where=f"{self.what}: {check.where}",
                why=check.why,
                fix=check.fix,
            )


def check_contract(tokens: TokenSet, template: Template, tokenizer: Any, *, vocab_size: int, what: str) -> Contract:
    """Hold the tokens to the contract.

    Args:
        vocab_size: entries of the model's embedding; every id lies below it.
        what: `train` or `validation`, for errors.

    Raises:
        DataError: the first broken check.
    """
    contract = inspect(tokens, template, tokenizer, vocab_size=vocab_size, what=what)
    contract.raise_if_broken()
    return contract


def inspect(tokens: TokenSet, template: Template, tokenizer: Any, *, vocab_size: int, what: str) -> Contract:
    """The same, with broken checks in the answer and not as an error."""
    look = _Look(tokens, tokenizer)
    checks = [_not_empty(tokens)]
    if len(tokens):
        checks += [
            _supervised(look),
            _ends(look, template),
            _one_bos(look),
            _prompt_free(look),
            _vocabulary(look, vocab_size),
        ]
    return Contract(what, tuple(checks))


@dataclass(frozen=True)
class _Chunk:
    """Some examples of one part. first: index of the first in the token set; ids, trained: [tokens];
    offsets: [n + 1] from 0; cut: [n]."""

    first: int
    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    cut: np.ndarray


class _Look:
    """The examples in chunks, and words for a fault in one of them."""

    def __init__(self, tokens: TokenSet, tokenizer: Any) -> None:
        self.tokens, self.tokenizer = tokens, tokenizer

    def chunks(self) -> Iterator[_Chunk]:
        first = 0
        for part in self.tokens.parts:
            yield from self._chunks(part, first)
            first += len(part)

    def _chunks(self, part: Part, first: int) -> Iterator[_Chunk]:
        at, arrays = 0, part.arrays
        while at < len(part):
            to = int(np.searchsorted(arrays.offsets, arrays.offsets[at] + _CHUNK, side="right")) - 1
            to = min(max(to, at + 1), len(part))
            begin, end = int(arrays.offsets[at]), int(arrays.offsets[to])
            yield _Chunk(
                first + at,
                np.asarray(arrays.ids[begin:end]),
                np.asarray(arrays.trained[begin:end]),
                arrays.offsets[at : to + 1] - begin,
                arrays.cut[at:to],
            )
            at = to

    def all(self, looked: int, of: str, name: str, find: Callable[[_Chunk], list[np.ndarray]], **words: str) -> Check:
        """A check from a function that gives, for a chunk, the faults as [examples (in the chunk), token (in it)]."""
        broken, first = 0, None
        for chunk in self.chunks():
            examples, at = find(chunk)
            broken += len(examples)
            if len(examples) and first is None:
                first = (chunk.first + int(examples[0]), int(at[0]))
        if first is None:
            return Check(name, looked, of)
        why = f"{words['why']}: {self.excerpt(*first)}"
        return Check(name, looked, of, broken, self.tokens.where(first[0]), why, words["fix"])

    def excerpt(self, example: int, at: int) -> str:
        """The decoded tokens around one of them, which stands in brackets."""
        ids = [int(t) for t in self.tokens[example].ids]
        left, right = max(0, at - _SHOWN), min(len(ids), at + _SHOWN + 1)
        limit = len(self.tokenizer)

        def text(span: list[int]) -> str:
            return "".join(self.tokenizer.decode([t]) if 0 <= t < limit else f"<{t}>" for t in span)

        around = f"{text(ids[left:at])}⟦{text(ids[at : at + 1])}⟧{text(ids[at + 1 : right])}"
        return f"{'…' if left else ''}{around}{'…' if right < len(ids) else ''}".encode("unicode_escape").decode()


def _not_empty(tokens: TokenSet) -> Check:
    counts = tokens.counts
    name = "the split is not empty"
    if len(tokens):
        return Check(name, counts.rows, "rows")
    why = f"{counts.rows:,} rows were read, {counts.dropped:,} dropped as too long, {counts.emptied:,} left with nothing to learn"
    return Check(
        name, counts.rows, "rows", max(1, counts.rows), counts.source, why, "raise data.seq_len, or widen the split"
    )


def _supervised(look: _Look) -> Check:
    def find(chunk: _Chunk) -> list[np.ndarray]:
        learnt = chunk.trained.astype(np.int64)
        learnt[chunk.offsets[:-1]] = 0  # nothing predicts the first token
        sums = np.add.reduceat(learnt, chunk.offsets[:-1])
        examples = np.flatnonzero(sums == 0)
        return [examples, np.zeros(len(examples), np.int64)]

    return look.all(
        len(look.tokens),
        "rows",
        "every row has a token to learn",
        find,
        why="no token of it carries loss",
        fix="delete the row, or look at data.train_on and data.template",
    )


def _ends(look: _Look, template: Template) -> Check:
    """The last token of each learnt stretch ends an answer, unless the example was cut there."""
    ends = np.asarray(sorted(template.end_ids), np.int64)
    stretches = 0

    def find(chunk: _Chunk) -> list[np.ndarray]:
        nonlocal stretches
        last = np.zeros(len(chunk.ids), np.bool_)
        last[chunk.offsets[1:] - 1] = True
        stops = np.flatnonzero(chunk.trained & (last | ~np.append(chunk.trained[1:], False)))
        stretches += len(stops)
        stops = stops[~np.isin(chunk.ids[stops], ends)]
        examples = np.searchsorted(chunk.offsets, stops, side="right") - 1
        forgiven = last[stops] & chunk.cut[examples]
        for back in range(1, _TAIL):
            inside = stops - back >= chunk.offsets[examples]
            forgiven |= last[stops] & inside & np.isin(chunk.ids[np.maximum(stops - back, 0)], ends)
        examples, stops = examples[~forgiven], stops[~forgiven]
        return [examples, stops - chunk.offsets[examples]]

    names = ", ".join(look.tokenizer.convert_ids_to_tokens([int(e) for e in ends])) or "none"
    found = look.all(
        0,
        "answers",
        "every learnt answer ends with an end token",
        find,
        why=f"the end tokens are {names}, and a learnt stretch ends on another",
        fix="use a template that ends each answer (data.template), or the tokenizer of the model",
    )
    return Check(**{**found.__dict__, "looked": stretches, "note": f"end tokens: {names}"})


def _one_bos(look: _Look) -> Check:
    bos = look.tokenizer.bos_token_id
    name = "no row begins with two BOS tokens"
    if bos is None:
        return Check(name, 0, "rows", note="the tokenizer has no BOS")

    def find(chunk: _Chunk) -> list[np.ndarray]:
        starts = chunk.offsets[:-1]
        second = np.minimum(starts + 1, len(chunk.ids) - 1)
        two = (chunk.ids[starts] == bos) & (chunk.ids[second] == bos) & (np.diff(chunk.offsets) > 1)
        examples = np.flatnonzero(two)
        return [examples, np.ones(len(examples), np.int64)]

    return look.all(
        len(look.tokens),
        "rows",
        name,
        find,
        why="the template writes a BOS and the tokenizer adds one",
        fix="take the BOS out of the template (data.template), or out of the rows",
    )


def _prompt_free(look: _Look) -> Check:
    """The first token is never learnt; and where the prompt was rendered apart, none of it is."""
    name = "the mask does not reach the prompt"
    counts = look.tokens.counts
    note = f"{counts.prompts:,} prompts rendered apart and compared"
    if counts.prompts_apart:
        note += f", {counts.prompts_apart:,} not comparable"

    def find(chunk: _Chunk) -> list[np.ndarray]:
        bad = chunk.trained[chunk.offsets[:-1]]
        examples = np.flatnonzero(bad)
        return [examples, np.zeros(len(examples), np.int64)]

    words = {
        "why": "a token of the prompt carries loss",
        "fix": "use another template (data.template); this one cannot be masked",
    }
    found = look.all(len(look.tokens), "rows", name, find, **words)
    first = 0
    for part in look.tokens.parts:
        if part.reached and not found.broken:
            i = first + part.reached[0]
            at = int(np.argmax(look.tokens[i].trained))
            why = f"{words['why']}: {look.excerpt(i, at)}"
            found = Check(name, found.looked, "rows", len(part.reached), look.tokens.where(i), why, words["fix"])
        first += len(part)
    return Check(**{**found.__dict__, "note": note})


def _vocabulary(look: _Look, vocab_size: int) -> Check:
    def find(chunk: _Chunk) -> list[np.ndarray]:
        at = np.flatnonzero((chunk.ids < 0) | (chunk.ids >= vocab_size))
        examples = np.searchsorted(chunk.offsets, at, side="right") - 1
        return [examples, at - chunk.offsets[examples]]

    return look.all(
        int(look.tokens.lengths.sum()),
        "tokens",
        "every token is in the model's vocabulary",
        find,
        why=f"the model's embedding has {vocab_size:,} entries, and the tokenizer gives an id beyond them",
        fix="use the model's own tokenizer, or name new tokens in model.added_tokens",
    )
