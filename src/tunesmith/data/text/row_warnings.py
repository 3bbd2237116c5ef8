"""Warnings of what is valid in a row but seldom meant, counted and shown before the first step."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from tunesmith.data.rows.messages import is_said
from tunesmith.data.rows.samples import Completion, Conversation, Sample
from tunesmith.data.source.secrets import secrets_in
from tunesmith.data.text.thoughts import THOUGHT_TAGS


class RowWarning(NamedTuple):
    """A warning: what a row has, why it matters, and the fix."""

    what: str
    why: str
    fix: str


# By the names that the token cache and `tunesmith data --json` have for them.
ROW_WARNINGS = {
    "empty": RowWarning(
        what="an empty answer",
        why="the model learns to give empty answers",
        fix='delete these rows, or exclude the turn: "train": false',
    ),
    "placeholder": RowWarning(
        what="a placeholder such as {{name}}",
        why="the model learns to write it literally",
        fix="fill it in, or delete these rows",
    ),
    "secret": RowWarning(
        what="a secret, such as an access token or a private key",
        why="the model learns to write it",
        fix="replace it in these rows, and revoke it",
    ),
    "repeated_prompt": RowWarning(
        what="an answer that begins with the whole prompt",
        why="the prompt stands before the answer already, and the model learns to repeat it",
        fix="delete it from the answers; of pairs whose answers both begin with it, deleting the"
        " column prompt does too",
    ),
    "other_preference": RowWarning(
        what="scores that contradict the preference, or are equal",
        why="the rejected answer has the higher score, or the same one",
        fix="swap the answers of these rows, or delete the rows",
    ),
    "written_turns": RowWarning(
        what="a question that ends where an answer begins, such as with Assistant:",
        why="it was written for a prompt without a template, and the template makes a turn of it"
        " all, with its own header behind it",
        fix="write each turn as a message, without these words; or data.template=raw, where prompt"
        " and answer are texts",
    ),
    "joined": RowWarning(
        what="no space or line break between prompt and completion",
        why="the tokenizer has no chat template, so nothing is written between them",
        fix="data.template=alpaca; or end each prompt as in inference, such as with a line break",
    ),
    "earlier_thought": RowWarning(
        what="a thought that is not trained, in an answer before the last one",
        why="the template leaves it out once the conversation continues, as in use",
        fix="data.train_on=last, and for each answer a row that ends with it",
    ),
    "earlier_prompt": RowWarning(
        what="an answer before the last one that does not follow the prompt in use",
        why="the prompt ends with words, such as the tag of a thought, that the template leaves out"
        " once the conversation continues",
        fix="data.train_on=last, and for each answer a row that ends with it",
    ),
    "endless_thought": RowWarning(
        what="a thought that is opened and never closed",
        why="it was cut off, and the model learns to end within a thought",
        fix="delete these rows, or close the thought and write the answer behind it",
    ),
    "lost_thought": RowWarning(
        what="a thought that is not in the tokens",
        why="the template leaves it out, and the model learns the answer without it",
        fix="use a template that renders it (data.template=FILE.jinja), or delete these rows",
    ),
    "lost_text": RowWarning(
        what="an answer of which a part is not in the tokens",
        why="the template changes it, such as by what stands before a </think>, and the model"
        " learns what is left",
        fix="delete these rows, or use another template: data.template=FILE.jinja",
    ),
    "lost_call": RowWarning(
        what="a tool call of which a part is not in the tokens",
        why="the template leaves out a name or a value of it",
        fix="use a template that renders it (data.template=FILE.jinja), or delete these rows",
    ),
    "unlisted_tools": RowWarning(
        what="tools that the model does not see",
        why="the template writes calls, and no list of tools, in training as in use",
        fix="describe the tools in the system message, in rows and in use",
    ),
    "picture_column": RowWarning(
        what="a picture in a column that nothing reads",
        why="the model learns to answer about what it does not see",
        fix="model.vision=true, and columns: {images: COLUMN}, in rows with a question and its"
        " answer; or delete the column",
    ),
    "picture_mark": RowWarning(
        what="a mark of a picture, such as <image>, without a picture",
        why="the model learns to answer about what it does not see",
        fix="name the picture in a column images, or in a part of the message (docs/pictures.md);"
        " or delete these rows",
    ),
    # SmolLM2-135M gives 16 short answers 4.8 nats less behind "Answer: " than behind "Answer:".
    "blank": RowWarning(
        what="a blank before the answer that would be one token with its first word",
        why="models know the word with its blank as one token, and the prompt has taken the blank",
        fix="move the blank from the end of the prompt (or of the template's generation prompt) to"
        " the start of the answer",
    ),
    "merged": RowWarning(
        what="an answer that begins within a token of the prompt",
        why="this tokenizer cannot write the answer apart: the model is trained to write the whole"
        " token, and asked with a part of it",
        fix="end prompts, and the template's generation prompt, with a line break",
    ),
}
# Of these, what a model would learn wrongly.
LOST = ("lost_thought", "lost_text", "lost_call")
# Two braces around one name, as Jinja, Handlebars and prompt editors write it; {name} is code or a
# formula too often.
_BRACED_NAME = re.compile(r"\{\{ *[A-Za-z_][\w.-]* *\}\}")
# The end of a prompt that names who answers: in words at the start of a line, or in the markup of a
# template.
_OPENS_ANSWER = re.compile(
    r"(?:(?:^|\n)[\W_]*(?:assistant|response)[\W_]*:|\bASSISTANT:|\[/INST\]|<\|assistant\|>"
    r"|<\|im_start\|>assistant|<start_of_turn>model|assistant<\|end_header_id\|>)\s*\Z",
    re.IGNORECASE,
)
_HEADER_CHARACTERS = 60  # at most, of such an end
# A shorter prompt, such as a greeting, may be what its answer begins with.
_REPEATED_CHARACTERS = 16


def row_warnings(sample: Sample, *, raw: bool) -> Iterator[str]:
    """Names in ROW_WARNINGS that fit one row; `raw`: no template writes between its texts."""
    questions: list[str] = []
    answers: list[str] = []
    if isinstance(sample, Conversation):
        texts = [message["content"] for message in sample.messages]
        questions = [turn["content"] for turn in sample.messages if turn["role"] == "user"]
        answers = [answer["content"] for answer in sample.supervised()]
    elif isinstance(sample, Completion):
        texts = [sample.prompt, sample.completion]
        questions = [] if raw else [sample.prompt]
        answers = [sample.completion]
        prompt, answer = sample.prompt.strip(), sample.completion.strip()
        is_long = len(prompt) >= _REPEATED_CHARACTERS
        # An answer that is the prompt, and no more, may be what is to be learned.
        if is_long and answer.startswith(prompt) and answer != prompt:
            yield "repeated_prompt"
        # Without a template between them, words on both sides of the border become one.
        edge = sample.prompt[-1:] + sample.completion[:1]
        if raw and len(edge) == 2 and not edge[0].isspace() and not edge[1].isspace():
            yield "joined"
    else:
        texts = [sample.text]
    # All that a message says or calls.
    if any(secrets_in(sample.messages if isinstance(sample, Conversation) else texts)):
        yield "secret"
    if any(_OPENS_ANSWER.search(text[-_HEADER_CHARACTERS:]) for text in questions):
        yield "written_turns"
    if has_empty_answers(sample):
        yield "empty"
    if any(map(_is_endless, answers)):
        yield "endless_thought"
    if any("{{" in text and _BRACED_NAME.search(text) for text in texts):
        yield "placeholder"


def has_empty_answers(sample: Sample) -> bool:
    """Tell whether an answer that is trained on has no text, thought or call."""
    if isinstance(sample, Conversation):
        return any(not is_said(answer) for answer in sample.supervised())
    return isinstance(sample, Completion) and not sample.completion.strip()


def _is_endless(answer: str) -> bool:
    """Tell whether an answer opens a thought and never closes it."""
    text = answer.lstrip()
    return any(
        text.startswith(opening) and closing not in text
        for closing, opening in THOUGHT_TAGS.items()
    )
