"""Rows with their own answers, as scorers need them."""

from dataclasses import replace
from typing import Any

from tunesmith.answers.scoring.scorers import ScoredRow
from tunesmith.answers.scoring.tool_calls import CALL_PROBE, PROBE_TOOL, CallReader, learn_call_form
from tunesmith.errors import DataError
from tunesmith.rows.messages import has_answer
from tunesmith.rows.samples import (
    CalledFunction,
    Conversation,
    FunctionCall,
    Message,
    Sample,
    texts_by_role,
)
from tunesmith.tokens.text.template import Template
from tunesmith.tokens.text.thoughts import split_thought


def make_scored_row(
    template: Template, sample: Sample, row: dict[str, Any], where: str
) -> ScoredRow:
    """Return a row with the reference of its last answer, which may be empty.

    The reference is rendered from the row's text, not decoded from its tokens: if the tokens were
    wrong, a model that has learned them would count as right. The template also renders tool calls.
    The thought is not a part of the reference.

    Args:
        sample: the row as a sample.
        row: the row as it is in the file.
        where: file and line of the row.
    """
    scored = prompted_row(sample, row, where)
    raw = ""
    if has_answer(sample):
        try:
            _, raw = template.final_answer(template.answer(sample, where=where))
        except DataError:
            # The template cannot write the answer after its generation prompt, for example an
            # answer without a thought. Its text can be compared anyway.
            if scored.calls or not template.samples_answers:
                raise
        raw = raw or own_text(sample)
    if not raw.strip():
        return scored
    reference = template.without_special_tokens(raw)
    is_special = not reference.strip()
    return replace(
        scored,
        reference=raw if is_special else reference,
        raw_reference=raw,
        is_special=is_special,
    )


def prompted_row(sample: Sample, row: dict[str, Any], where: str) -> ScoredRow:
    """Return a row without the reference of its answer, see `make_scored_row`."""
    if not isinstance(sample, Conversation):
        return ScoredRow(
            "", "", row, where, prompt=row.get("prompt", getattr(sample, "prompt", ""))
        )
    return ScoredRow(
        "",
        "",
        row,
        where,
        len(sample.messages[-1].get("tool_calls") or ()),
        bool(sample.tools),
        prompt=row.get("prompt", sample.messages[:-1]),
    )


def own_text(sample: Sample) -> str:
    """Return the text of the last answer of a sample, without its thought."""
    if not isinstance(sample, Conversation):
        return texts_by_role(sample)[-1][1]
    return split_thought(sample.messages[-1])["content"]


def read_call_form(template: Template) -> CallReader | None:
    """Return a parser for the tool calls in the format of a chat template.

    Return None if the template does not support tool calls, or if their format is unknown.
    """
    function: CalledFunction = {"name": CALL_PROBE.name, "arguments": CALL_PROBE.arguments}
    call: FunctionCall = {"type": "function", "function": function}
    answer: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    thoughtful: Message = {**answer, "reasoning_content": "It must be looked up."}
    # Also try an answer with reasoning, because some templates of reasoning models render an answer
    # without reasoning inconsistently.
    for message in (answer, thoughtful):
        sample = Conversation([{"role": "user", "content": "Look it up."}, message], [PROBE_TOOL])
        try:
            example = template.encode(sample, "last", where="the template")
        except DataError:
            continue
        ids = example.ids[example.trained].tolist()
        text = template.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        reader = learn_call_form(str(text))
        if reader is not None:
            return reader
    return None
