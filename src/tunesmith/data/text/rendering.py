"""A conversation as a chat template renders it, and where each of its texts stands there.

No search for a text can tell the template's words from the user's: a template may strip thinking
from earlier turns (Qwen3), trim texts (Llama 3, Gemma), move the system message into a user's turn
(Llama 2), or drop what it does not know. Sentinels can (`sentinels.py`): the conversation is
rendered, and again with every text in it between two sentinels. Without them both renderings must
be equal; then they mark where each text is, and all outside a pair of them is the template's own.
"""

import copy
import re
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateError

from tunesmith.data.rows.samples import PICTURE_MARK, Message
from tunesmith.data.text.answer_ends import AnswerEnds
from tunesmith.data.text.sentinels import (
    SENTINEL_POSITIONS,
    Field,
    Messages,
    Sentinel,
    Sentinels,
    Tools,
)
from tunesmith.data.text.thoughts import DEFAULT_FORM, MessageForm, split_thought, thought_at_end
from tunesmith.errors import DataError, ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a template may end in; the last two where it calls itself, or writes a text beyond all
# bounds.
RENDER_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
MAX_RENDER_SECONDS = 5  # of processor time, for one conversation
_GENERATION_START = re.compile(r"\{%-?\s*generation\s*-?%\}")
FIX_WITH_TAGS = (
    "add {% generation %} tags around the answers in the template: data.template=FILE.jinja"
)


class Rendering(NamedTuple):
    """A rendered conversation and the sentinels in it.

    Attributes:
        text: without sentinels.
        sentinels: those in the text, in order.
        inserted: what set them into the conversation.
        messages, tools: with sentinels.
        shown: fields whose sentinels the template renders, at any position.
    """

    text: str
    sentinels: list[Sentinel]
    inserted: Sentinels
    messages: list[Message]
    tools: Tools
    shown: frozenset[int]

    def field(self, sentinel: Sentinel) -> Field:
        return self.inserted.fields[sentinel.field]

    def of_message(self, i: int) -> list[int]:
        """Indices into `sentinels` of those of one message."""
        return [n for n, sentinel in enumerate(self.sentinels) if self.field(sentinel).message == i]

    def place(self, n: int) -> int:
        """Find the index of sentinel n in the text; -1 stands for the beginning of the text."""
        return self.sentinels[n].at if n >= 0 else 0

    def shows(self, kind: str) -> bool:
        """Check that all texts of a kind are shown."""
        fields = enumerate(self.inserted.fields)
        return all(n in self.shown for n, text in fields if text.kind == kind)

    def shows_all(self) -> bool:
        return len(self.shown) == len(self.inserted.fields)

    def tail(self, i: int) -> str | None:
        """Read what follows the texts of message i, up to the next text.

        None where the end of its last text is not known.
        """
        last = -1
        seen = set()
        for n in self.of_message(i):
            # A text that is there again is quoted by the next message.
            if self.sentinels[n][:2] not in seen:
                last = n
            seen.add(self.sentinels[n][:2])
        if last < 0 or self.sentinels[last].side != "e":
            return None
        next_text = len(self.text)
        if last + 1 < len(self.sentinels):
            next_text = self.place(last + 1)
        return self.text[self.place(last) : next_text]


# Of one {% generation %} block: the characters [start, end) that it wrote.
Block = tuple[int, int]


@dataclass
class TemplateTraits:
    """The forms in which a template takes thoughts, calls and tools; `probe.py` finds out.

    Attributes:
        form: the form in which it takes thoughts and calls.
        reasoning, calls: whether it shows those.
        lists_tools: whether it writes the tools of a conversation.
        splits_thoughts: whether the thought of a text is given to it as a field.
        writes_thoughts: whether rows get a thought that its generation prompt opens.
        wrapped_result: a pattern of a result between the tags that it writes around tool results;
            None: it writes no tags.
    """

    form: MessageForm = DEFAULT_FORM
    reasoning: bool = False
    calls: bool = False
    lists_tools: bool = False
    splits_thoughts: bool = False
    writes_thoughts: bool = False
    wrapped_result: re.Pattern[str] | None = None


@contextmanager
def _limit_seconds(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block if it takes more processor time.

    The trial of a template (`try_template.py`) has few conversations, and a template may loop
    without end on others. Signals reach the main thread only: other threads have no limit. The time
    of all threads counts. A block within such a block ends the limit of the outer one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class ChatRenderer:
    """Renders conversations with one chat template, and finds their texts in the rendering.

    Args:
        jinja, name: the template, and what errors call it.
        eos_ids: ids at which generation stops.

    Attributes:
        tagged: whether the template has {% generation %} blocks.
        ends: what may end an answer.
        traits: before they are known, every text is looked for with every position of sentinels.
        with_pictures: each PICTURE_MARK of a text stands for a picture: the template gets such
            texts as lists of parts.
        takes_lists: the template gets all texts as lists of parts.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        jinja: str,
        name: str,
        eos_ids: Collection[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.jinja = jinja
        self.name = name
        self.tagged = bool(_GENERATION_START.search(jinja))
        self.ends = AnswerEnds(tokenizer, eos_ids)
        self.traits = TemplateTraits()
        self.with_pictures = False
        self.takes_lists = False

    def for_pictures(self) -> "ChatRenderer":
        """The same for conversations with pictures."""
        renderer = copy.copy(self)
        renderer.with_pictures = True
        return renderer

    def _given(self, messages: Messages) -> Sequence[Mapping[str, object]]:
        """The messages as the template gets them."""
        given = self.traits.form.apply(messages)
        if not self.with_pictures and not self.takes_lists:
            return given
        return [self._in_parts(message) for message in given]

    def _in_parts(self, message: Mapping[str, object]) -> Mapping[str, object]:
        content = message.get("content") or ""
        assert isinstance(content, str)
        texts = content.split(PICTURE_MARK) if self.with_pictures else [content]
        if len(texts) == 1 and not self.takes_lists:
            return message
        parts: list[Mapping[str, object]] = []
        for n, text in enumerate(texts):
            if n:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
        return {**message, "content": parts}

    def render(self, messages: Messages, tools: Tools = None, *, generate: bool = False) -> str:
        """The text of a conversation, or DataError; `generate` adds the generation prompt."""
        with self._render_errors():
            return self.tokenizer.apply_chat_template(
                self._given(messages),
                tools,
                chat_template=self.jinja,
                add_generation_prompt=generate,
                tokenize=False,
            )

    def render_tagged(self, messages: Messages, tools: Tools) -> tuple[str, list[Block]]:
        """The text of a conversation, and what its {% generation %} blocks wrote."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # As in apply_chat_template, which returns these spans as tokens only, those included that
        # begin before a span.
        with self._render_errors():
            texts, blocks = render_jinja_template(
                [list(self._given(messages))],
                tools,
                None,
                self.jinja,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        return texts[0], [(start, end) for start, end in blocks[0] if end > start]

    @contextmanager
    def _render_errors(self) -> Iterator[None]:
        try:
            with _limit_seconds(MAX_RENDER_SECONDS):
                yield
        except TimeoutError as error:
            # Not a DataError: `probe.py` takes those as a refusal by the template, and continues.
            raise ModelError(
                f"{self.name} takes more than {MAX_RENDER_SECONDS} s to render a conversation",
                why="it may have nested loops",
                fix="use another template: data.template=FILE.jinja",
            ) from error
        except RENDER_ERRORS as error:
            why = first_line(error) or type(error).__name__
            fix = "fix the row, or use a template that supports it: data.template=FILE.jinja"
            raise self.error("cannot render this conversation", why, fix) from error

    def error(self, what: str, why: str = "", fix: str = FIX_WITH_TAGS) -> DataError:
        return DataError(f"{self.name} {what}", why=why, fix=fix)

    def in_form(self, messages: Messages) -> Messages:
        """Return the messages without what the template would repeat or not read.

        A thought in a text moves to `reasoning_content` if the template would not read it in the
        text. A tool result loses the tags that the template writes again.
        """
        wrapped = self.traits.wrapped_result
        if wrapped is not None:
            messages = [
                {**turn, "content": wrapped.sub(lambda found: found[1].strip(), turn["content"])}
                if turn["role"] == "tool"
                else turn
                for turn in messages
            ]
        if not self.traits.splits_thoughts:
            return messages
        in_form = []
        for message in messages:
            split = split_thought(message)
            if split.get("reasoning_content") == "" and not self.traits.writes_thoughts:
                # An empty thought is a part of the text where the template knows its tags.
                knows_tags = "</think>" in self.jinja
                split = message if knows_tags else {**message, "content": split["content"]}
            in_form.append(split)
        return in_form

    def locate(
        self,
        text: str,
        messages: Messages,
        tools: Tools,
        trained: Collection[int] | None = None,
    ) -> Rendering:
        """Find the texts of a conversation in its rendering.

        Where no sentinels keep it equal, those beside the answers that are trained may: a template
        may read a text of an earlier turn.

        The first position of sentinels that keeps the rendering equal is used. Further positions
        are tried while a text is missing that the template must show or that holds an end token.
        """
        word = _unused_word(text, messages, tools)
        marked: list[Collection[int] | None] = [None]
        if trained is not None:
            marked.append({i + step for i in trained for step in (-1, 0, 1)})
        for only in marked:
            rendering: Rendering | None = None
            shown: set[int] = set()
            # Sentinels before, after or around each text: a template may trim one side.
            for position in SENTINEL_POSITIONS:
                inserted = Sentinels(word, position, only, self.with_pictures)
                marked_messages, marked_tools = inserted.insert(messages, tools)
                marked_text = self.render(marked_messages, marked_tools)
                plain_text, sentinels = self._strip(inserted, marked_text)
                # A template that reads its texts renders others with sentinels; such a position
                # tells nothing.
                if plain_text != text:
                    continue
                shown.update(sentinel.field for sentinel in sentinels)
                if rendering is None:
                    rendering = Rendering(
                        text, sentinels, inserted, marked_messages, marked_tools, frozenset()
                    )
                missing = [field for n, field in enumerate(inserted.fields) if n not in shown]
                # All that must show has shown itself: the other positions need not be tried.
                if all(
                    self.may_drop(field, trained) and not self.has_end(field.text)
                    for field in missing
                ):
                    break
            if rendering is not None:
                return rendering._replace(shown=frozenset(shown))
        what = "renders differently depending on the message text"
        raise self.error(what, "so assistant spans cannot be located")

    def _strip(self, inserted: Sentinels, marked_text: str) -> tuple[str, list[Sentinel]]:
        """The rendering without sentinels, and those of the texts where they stand first.

        Behind a call's end its name may stand again: gpt-oss and Gemma 4 write it before the
        call's result.
        """
        text, sentinels = inserted.strip(marked_text)
        if inserted.position != "both":
            return text, sentinels
        first_ones: list[Sentinel] = []
        seen = set()
        ended = set()
        last_of_message: dict[int, int] = {}
        # A template may write a text twice: the first one counts.
        for n, sentinel in enumerate(sentinels):
            field = inserted.fields[sentinel.field]
            is_repeated = sentinel[:2] in seen
            if is_repeated and field.kind == "tool_calls" and field.message not in ended:
                last = last_of_message[field.message]
                if self.ends.search(text, sentinels[last].at, sentinels[last + 1].at):
                    ended.add(field.message)
            if is_repeated and field.message in ended:
                continue
            first_ones.append(sentinel)
            seen.add(sentinel[:2])
            last_of_message[field.message] = n
        return text, first_ones

    def may_drop(self, field: Field, trained: Collection[int] | None) -> bool:
        """Tell whether a template may leave out a text; `RenderedAnswers.missing` tells of it.

        That is a thought that is not trained, or one of several, and tools where it has calls: no
        prompt in use shows them either.
        """
        if field.kind == "tools":
            return self.traits.calls and not self.traits.lists_tools
        if field.kind != "reasoning_content":
            return False
        return self.traits.reasoning or (trained is not None and field.message not in trained)

    def has_end(self, text: str) -> bool:
        return self.ends.search(text, is_last=False) is not None

    def prompt(self, rendering: Rendering, i: int) -> tuple[int | None, str]:
        """The model's input before message i, after the last text of the prompt.

        Returns:
            The index of the sentinel that closes that text (-1: the prompt holds none; None: in the
            conversation it is not the one before the answer), and what the prompt holds from there
            on.
        """
        if i == 0:
            what = "does not support an answer at the start of a conversation"
            raise self.error(what, "there is no prompt before it")
        marked_prompt = self.render(rendering.messages[:i], rendering.tools, generate=True)
        prompt, prompt_sentinels = self._strip(rendering.inserted, marked_prompt)
        indices = rendering.of_message(i)
        candidates = [indices[0] - 1] if indices else range(-1, len(rendering.sentinels))
        if prompt_sentinels:
            closing = prompt_sentinels[-1]
            prompt = prompt[closing.at :]
            anchors = []
            for n in candidates:
                # Its place may differ: the conversation goes on.
                if n >= 0 and rendering.sentinels[n][:2] == closing[:2]:
                    anchors.append(n)
        else:
            anchors = [n for n in candidates if n < 0]
        anchor = anchors[0] if len(anchors) == 1 else None
        return anchor, prompt

    def header(self, rendering: Rendering, i: int, prompt_at: int) -> str | None:
        """Read what the rendering has before the first text of message i.

        None where that is unknown, and where a thought comes first: the model writes its tag.
        """
        indices = rendering.of_message(i)
        if not indices or rendering.inserted.position != "both":
            return None
        first = rendering.sentinels[indices[0]]
        if first.side != "b" or rendering.field(first).kind == "reasoning_content":
            return None
        return rendering.text[prompt_at : first.at]

    def thought_in_prompt(
        self, rendering: Rendering, i: int, prompt_at: int, prompt: str
    ) -> int | None:
        """Find where in the generation prompt a thought begins that the row does not have there.

        None: it has none, or the row has other words before it.
        """
        at = thought_at_end(prompt)
        if at is None or not rendering.text.startswith(prompt[:at], prompt_at):
            return None
        header = self.header(rendering, i, prompt_at)
        # No part of it may be the answer's.
        if rendering.of_message(i) and (header is None or len(header) < at):
            return None
        return at


def _unused_word(text: str, messages: Messages, tools: Tools) -> str:
    """A word that occurs neither in a rendering nor in its conversation."""
    conversation = repr((messages, tools))
    n = 0
    while f"zq{n}W" in text or f"zq{n}W" in conversation:
        n += 1
    return f"zq{n}W"
