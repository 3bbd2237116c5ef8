"""Decision how a chat template writes thoughts: where, what it writes without a thought, and what
its generation prompt already contains.

`probe.py` measures one `ThoughtStyle` for each template. The loss mask, the messages and the
scorers ask it.
"""

import re
from dataclasses import dataclass

from tunesmith.rows.samples import Message
from tunesmith.tokens.text.thoughts import find_thought, split_thought

_THINKING = r"(?:[a-z]+:)?(?:think|thinking|thought|reasoning)(?::\w+)?"
# Tags of templates, for example <think>, <mm:think>, Cohere's, Gemma 4's and Kimi K3's.
_OPENING_TAG = (
    rf"<{_THINKING}>|\[THINK\]|<\|START_THINKING\|>|<\|channel>thought|<\|open\|>think<\|sep\|>"
)
_CLOSING_TAG = (
    rf"</{_THINKING}>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>|<\|close\|>think<\|sep\|>"
)
# A text with an open or an empty thought after its header. Without a tag, all is header.
_THOUGHT_BLOCK = re.compile(
    rf"(?P<header>.*?)(?P<opening>{_OPENING_TAG})?(?P<gap>(?(opening)\s*))"
    rf"(?:(?P<closing>{_CLOSING_TAG})(?P<rest>.*))?",
    re.DOTALL,
)
# A thought without text at the start of an answer, and a closed thought at the end of a prompt.
CLOSED_THOUGHT = re.compile(rf"(?:{_CLOSING_TAG})\s*\Z")
EMPTY_THOUGHT = re.compile(rf"\A(?:{_OPENING_TAG})\s*(?:{_CLOSING_TAG})\s*")
_FIND_CLOSING = re.compile(_CLOSING_TAG)
_BEGINS_WITH_TAG = re.compile(rf"{_OPENING_TAG}|{_CLOSING_TAG}")


def parse_block(text: str) -> re.Match[str]:
    """Return the parts of a text: header, opening tag, gap, closing tag and rest."""
    match = _THOUGHT_BLOCK.fullmatch(text)
    assert match is not None  # every text is a header
    return match


@dataclass(frozen=True)
class ThoughtStyle:
    """Style in which a template writes the thought of the last answer.

    Attributes:
        prompt: end of the generation prompt, after the last text of the user.
        begin: text between the prompt and the thought.
        end: text between the thought and the text of the answer.
        without: text between the prompt and the answer's text if there is no thought.
        after: text between the answer's text and its end token.
        splits: whether a thought inside a text must be moved to `reasoning_content`, because the
            template would write it differently, or not find it.
        splits_empty: the same for a thought without text.
    """

    prompt: str = ""
    begin: str = ""
    end: str = ""
    without: str = ""
    after: str = ""
    splits: bool = False
    splits_empty: bool = False

    def split(self, message: Message) -> Message:
        """Move the thought in a message's text to `reasoning_content` if the template needs it."""
        split = split_thought(message)
        moves = self.splits if split.get("reasoning_content") else self.splits_empty
        return split if moves else message

    def lead(self, prompt: str, written: str, thought: str | None, *, is_shown: bool) -> str | None:
        """Return the text before the answer, so that the answer follows the generation prompt.

        The result begins with the prompt and contains the thought exactly once. Return None if the
        answer cannot follow the prompt.

        Args:
            prompt: end of the generation prompt.
            written: text that the template writes in place of the prompt, up to the thought if the
                template writes the thought, or else up to the answer's text.
            thought: the thought of the answer. "" is an empty thought; None means no thought.
            is_shown: whether the template writes the thought. If so, the result ends before it.
        """
        asked, own = parse_block(prompt), parse_block(written)
        if thought and (asked["closing"] or (is_shown and own["closing"])):
            return None
        if written.startswith(prompt) and (is_shown or not thought):
            return written
        if is_shown and prompt.startswith(written):
            return prompt  # Words of the prompt open the thought, as in Apriel.
        if not written.startswith(asked["header"]):
            return None
        gap = own["gap"].removeprefix(asked["gap"])
        if is_shown:
            # The gap may end with whitespace of the thought itself.
            return prompt + gap.removeprefix("\n") if asked["opening"] else None
        rest = own["rest"] if own["closing"] else written[asked.end("header") :]
        if asked["closing"]:
            return prompt + rest
        if asked["opening"] and own["closing"]:
            return prompt + (thought or "") + gap + own["closing"] + rest
        if asked["opening"] and thought is not None:
            return prompt + thought + self.end.removesuffix(rest) + rest
        if not thought or not own["opening"]:
            return None
        # The template writes an empty thought in place of the thought.
        middle = own.start("gap") + len(gap) // 2
        return written[:middle] + thought + written[middle:]

    def answer_text(self, text: str) -> str:
        """Return the part of an answer after its thought, without the template's own text.

        The result is empty if the answer ends within the thought.

        Args:
            text: the answer after the generation prompt, with special tokens.
        """
        whole = text
        text = text.lstrip()
        asked = parse_block(self.prompt)
        begin = self.begin.strip()
        is_open = asked["opening"] and not asked["closing"]
        if is_open or _BEGINS_WITH_TAG.match(text) or (begin and text.startswith(begin)):
            _, found, rest = text.partition(self.end.strip() or "\0")
            closing = _FIND_CLOSING.search(text)
            text = rest if found else text[closing.end() :] if closing else ""
        elif place := find_thought(text):
            text = text[place.rest :]
        text = text.lstrip().removeprefix(self.without.strip()).lstrip()
        if self.after.strip():
            text = text.rstrip().removesuffix(self.after.strip())
        # Without a thought and text of the template, the answer keeps its whitespace.
        return whole if text == whole.lstrip() else text


DEFAULT_STYLE = ThoughtStyle()
