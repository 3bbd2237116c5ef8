"""Warnings about rows that are valid but probably not intended.

The warnings are shown before the first step.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from tunesmith.rows.call_checks import find_call_problems
from tunesmith.rows.columns import is_null_word
from tunesmith.rows.samples import Completion, Conversation, Sample, texts_by_role
from tunesmith.rows.source.secrets import secrets_in
from tunesmith.tokens.text.thoughts import THOUGHT_TAGS


class RowWarning(NamedTuple):
    """A warning about a row: what the row contains, why this is a problem, and how to fix it."""

    what: str
    why: str
    fix: str


# Warnings. The key is the name that the token cache and `tunesmith data --json` use.
ROW_WARNINGS = {
    "null_word": RowWarning(
        what="a text that is only a word for a missing value, such as nan, None or N/A",
        why="the model learns the word as a question or an answer",
        fix="write the text, or delete these rows; or ignore this warning if the word is meant",
    ),
    "placeholder": RowWarning(
        what="a placeholder such as {{name}}",
        why="the model learns to write it literally",
        fix="replace the placeholder, or delete these rows",
    ),
    "secret": RowWarning(
        what="a secret, such as an access token or a private key",
        why="the model learns to write the secret",
        fix="replace the secret in these rows, and revoke it",
    ),
    "repeated_prompt": RowWarning(
        what="an answer that begins with the whole prompt",
        why="the answer follows the prompt anyway, so the model learns to repeat the prompt",
        fix="delete the prompt from the answers; if both answers of a pair begin with it, you can"
        " delete the column prompt instead",
    ),
    "written_turns": RowWarning(
        what="a question that ends with the start of an answer, such as Assistant:",
        why="it was written for a prompt without a template, but the template renders all of it as"
        " one turn, followed by its own header of the answer",
        fix="write each turn as a message, without these words; or, for rows with prompt and"
        " completion, use data.template=raw",
    ),
    "joined": RowWarning(
        what="no space or line break between prompt and completion",
        why="the tokenizer has no chat template, so nothing is written between them",
        fix="set data.template=alpaca; or end each prompt as in inference, for example with a line"
        " break",
    ),
    "earlier_thought": RowWarning(
        what="a thought that is not trained, in an answer before the last one",
        why="the template leaves it out if the conversation continues, in training and in"
        " inference",
        fix="set data.train_on=last, and write a separate row for each answer, which ends with this"
        " answer",
    ),
    "earlier_prompt": RowWarning(
        what="an answer before the last one that does not follow the prompt of inference",
        why="the prompt ends with words, such as the tag of a thought, that the template leaves out"
        " if the conversation continues",
        fix="set data.train_on=last, and write a separate row for each answer, which ends with this"
        " answer",
    ),
    "endless_thought": RowWarning(
        what="a thought that is opened and never closed",
        why="the thought was cut off, and the model learns to end within a thought",
        fix="delete these rows, or close the thought and write the answer after it",
    ),
    "lost_thought": RowWarning(
        what="a thought that is not in the tokens",
        why="the template leaves the thought out, and the model learns the answer without it",
        fix="use a template that renders it (data.template=FILE.jinja), or delete these rows",
    ),
    "lost_text": RowWarning(
        what="an answer with a part that is not in the tokens",
        why="the template changes the answer, for example by removing the text before </think>, and"
        " the model learns only the rest",
        fix="delete these rows, or use another template: data.template=FILE.jinja",
    ),
    "lost_call": RowWarning(
        what="a tool call with a part that is not in the tokens",
        why="the template leaves out a name or a value of the call",
        fix="use a template that renders it (data.template=FILE.jinja), or delete these rows",
    ),
    "unmatched_result": RowWarning(
        what="tool calls whose results are missing, or results of other calls",
        why="the model learns to answer from results that do not belong to its calls",
        fix="write one result for each call, with the id of this call, or delete these rows",
    ),
    "unlisted_call": RowWarning(
        what="a call of a tool that is not in the row's tools",
        why="the model learns to call tools that it was not given",
        fix="add the tool to the row's tools, correct the name, or delete these rows",
    ),
    "missing_argument": RowWarning(
        what="a call without a required argument",
        why="the model learns calls that the tool refuses",
        fix="correct the call or the parameters of the tool, or delete these rows",
    ),
    "unlisted_tools": RowWarning(
        what="tools that the model does not see",
        why="the template writes tool calls but no list of tools, in training and in inference",
        fix="describe the tools in the system message, in rows and in inference",
    ),
    "picture_column": RowWarning(
        what="a picture in a column that is not read",
        why="the model learns to answer questions about pictures that it does not see",
        fix="set model.vision=true and columns: {images: COLUMN}, for rows with a question and its"
        " answer; or delete the column",
    ),
    "picture_mark": RowWarning(
        what="a placeholder of a picture, such as <image>, without a picture",
        why="the model learns to answer questions about pictures that it does not see",
        fix="name the picture in a column images, or in a part of the message (docs/pictures.md);"
        " or delete these rows",
    ),
    # Example: SmolLM2-135M gives 16 short answers a log-probability that is 4.8 nats lower after
    # "Answer: " than after "Answer:".
    "blank": RowWarning(
        what="a space or tab before the answer, which a model expects in the answer's first token",
        why="models know a word and the space before it as one token, but the space belongs to the"
        " prompt",
        fix="move the space from the end of the prompt (or of the template's generation prompt) to"
        " the start of the answer",
    ),
    "merged": RowWarning(
        what="an answer that begins within a token of the prompt",
        why="this tokenizer cannot tokenize the answer separately: the model learns to write the"
        " whole token, but in inference the prompt already contains a part of it",
        fix="end prompts, and the template's generation prompt, with a line break",
    ),
}
# Names of the warnings about parts of an answer that are missing in the rendered text.
LOST = ("lost_thought", "lost_text", "lost_call")
# Name in double braces, as in Jinja, Handlebars and prompt editors. A name in single braces is not
# matched, because {name} is often code or a formula.
_BRACED_NAME = re.compile(r"\{\{ *[A-Za-z_][\w.-]* *\}\}")
# Text at the end of a prompt after which an answer follows: a role name with a colon, or the header
# of a chat template.
_OPENS_ANSWER = re.compile(
    r"(?:(?:^|\n)[\W_]*(?:assistant|response)[\W_]*:|\bASSISTANT:|\[/INST\]|<\|assistant\|>"
    r"|<\|im_start\|>assistant|<start_of_turn>model|assistant<\|end_header_id\|>)\s*\Z",
    re.IGNORECASE,
)
_MAX_HEADER_CHARACTERS = 60  # Maximum length of a text that `_OPENS_ANSWER` matches.
# Minimum length of a prompt for the warning that the answer repeats it. Shorter prompts are
# ignored, because a prompt such as a greeting may also be the start of the answer.
_MIN_REPEATED_CHARACTERS = 16


def row_warnings(sample: Sample, *, raw: bool) -> Iterator[str]:
    """Yield the names in ROW_WARNINGS of the warnings that apply to one row.

    If `raw` is True, the row is used without a template.
    """
    texts = [text for _, text in texts_by_role(sample)]
    questions = [text for role, text in texts_by_role(sample) if role == "user" and not raw]
    answers = []
    if isinstance(sample, Conversation):
        answers = [answer["content"] for answer in sample.supervised()]
        yield from dict.fromkeys(find_call_problems(sample))
    elif isinstance(sample, Completion):
        answers = [sample.completion]
        prompt = sample.prompt.strip()
        answer = sample.completion.strip()
        is_long = len(prompt) >= _MIN_REPEATED_CHARACTERS
        # If the entire answer is equal to the prompt, do not warn, because this may be intended.
        if is_long and answer.startswith(prompt) and answer != prompt:
            yield "repeated_prompt"
        # Without a template and without white space, the last word of the prompt and the first word
        # of the completion become one word.
        edge = sample.prompt[-1:] + sample.completion[:1]
        if raw and len(edge) == 2 and not any(map(str.isspace, edge)):
            yield "joined"
    # Search the entire messages for secrets, including thoughts and tool calls.
    if any(secrets_in(sample.messages if isinstance(sample, Conversation) else texts)):
        yield "secret"
    if any(_OPENS_ANSWER.search(text[-_MAX_HEADER_CHARACTERS:]) for text in questions):
        yield "written_turns"
    if any(map(is_null_word, texts)):
        yield "null_word"
    if any(map(_is_endless, answers)):
        yield "endless_thought"
    if any("{{" in text and _BRACED_NAME.search(text) for text in texts):
        yield "placeholder"


def _is_endless(answer: str) -> bool:
    """Return whether an answer opens a thought and never closes it."""
    text = answer.lstrip()
    return any(
        text.startswith(opening) and closing not in text
        for closing, opening in THOUGHT_TAGS.items()
    )
