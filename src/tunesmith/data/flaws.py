"""What is valid in a row but seldom meant: counted while it is tokenised, and told before the first step."""

import re
from collections.abc import Iterator

from tunesmith.data.formats import Completion, Conversation, Sample

# name: (what the row has, why it matters, the fix)
FLAWS = {
    "empty": (
        "an empty answer", "the model learns to say nothing",
        'delete these rows, or leave such a turn untrained: "train": false',
    ),
    "placeholder": (
        "a placeholder such as {{name}}", "the model learns to write it as it stands",
        "fill it in, or delete these rows",
    ),
    "joined": (
        "no blank or line break between prompt and completion", "the tokenizer has no chat template, so nothing is "
        "written between them", "data.template=alpaca; or end each prompt as it ends in use, such as with a line break",
    ),
}  # fmt: skip
# Two braces around one name, as Jinja, Handlebars and prompt editors write it; {name} is code or a formula too often.
_PLACEHOLDER = re.compile(r"\{\{ *[A-Za-z_][\w.-]* *\}\}")


def row_flaws(sample: Sample, *, raw: bool) -> Iterator[str]:
    """Names in FLAWS of what one row has; `raw`: prompt and completion stand as they are."""
    if isinstance(sample, Conversation):
        texts, answers = [message["content"] for message in sample.messages], sample.supervised()
        empty = any(not (m["content"].strip() or {"tool_calls", "reasoning_content"} & m.keys()) for m in answers)
    elif isinstance(sample, Completion):
        texts, empty = [sample.prompt, sample.completion], not sample.completion.strip()
        edge = sample.prompt[-1:] + sample.completion[:1]
        if raw and len(edge) == 2 and not any(map(str.isspace, edge)):
            yield "joined"
    else:
        texts, empty = [sample.text], False
    if empty:
        yield "empty"
    if any("{{" in text and _PLACEHOLDER.search(text) for text in texts):
        yield "placeholder"
