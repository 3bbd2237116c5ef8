"""Rendering of a conversation with a chat template, and the position of each text in the result.

A simple search for each text is not enough, because it cannot distinguish words that the template
writes from words of the user. A template may remove thoughts from earlier turns (Qwen3), trim texts
(Llama 3, Gemma), move the system message into a user turn (Llama 2), or drop unknown parts.
Therefore sentinels are used, which are short unique words (`sentinels.py`). The conversation is
rendered twice: without sentinels, and with every text between two sentinels. If both renderings are
equal after the sentinels are removed, the sentinels show the position of each text. Everything
outside a pair of sentinels was written by the template.
"""

import copy
import re
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateError

from tunesmith.errors import DataError, ModelError, first_line
from tunesmith.rows.samples import PICTURE_MARK, Message
from tunesmith.tokens.text.answer_ends import AnswerEnds
from tunesmith.tokens.text.sentinels import (
    SENTINEL_POSITIONS,
    Field,
    Messages,
    Sentinel,
    Sentinels,
    Tools,
)
from tunesmith.tokens.text.thought_style import (
    CLOSED_THOUGHT,
    DEFAULT_STYLE,
    EMPTY_THOUGHT,
    ThoughtStyle,
)
from tunesmith.tokens.text.thoughts import (
    DEFAULT_FORM,
    MessageForm,
    TemplateMessage,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Errors that a template may raise. The last two errors occur if a template calls itself endlessly,
# or writes a text of unlimited length.
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
MAX_RENDER_SECONDS = 5  # processor time for one conversation
_GENERATION_START = re.compile(r"\{%-?\s*generation\s*-?%\}")
FIX_WITH_TAGS = (
    "add {% generation %} tags around the answers in the template: data.template=FILE.jinja"
)


class Rendering(NamedTuple):
    """A rendered conversation with the positions of its sentinels.

    Attributes:
        text: the rendered text without sentinels.
        sentinels: the sentinels of the text, in order.
        inserted: the object that inserted the sentinels into the conversation.
        messages, tools: the conversation into which the sentinels were inserted.
        shown: indices of the fields whose sentinels were rendered with at least one of the tried
            sentinel positions.
    """

    text: str
    sentinels: list[Sentinel]
    inserted: Sentinels
    messages: list[Message]
    tools: Tools
    shown: frozenset[int]

    def field(self, sentinel: Sentinel) -> Field:
        return self.inserted.fields[sentinel.field]

    def sentinels_of_message(self, i: int) -> list[int]:
        """Return the indices, in `sentinels`, of all sentinels of message i."""
        return [n for n, sentinel in enumerate(self.sentinels) if self.field(sentinel).message == i]

    def place(self, n: int) -> int:
        """Return the position of sentinel n in the text.

        The number before the first sentinel, -1, is the start of the text, and the number after the
        last sentinel is its end.
        """
        if n < 0:
            return 0
        return self.sentinels[n].at if n < len(self.sentinels) else len(self.text)

    def shows(self, kind: str) -> bool:
        """Return whether all texts of a kind are rendered."""
        return all(
            n in self.shown for n, text in enumerate(self.inserted.fields) if text.kind == kind
        )

    def shows_all(self) -> bool:
        return len(self.shown) == len(self.inserted.fields)

    def tail(self, i: int) -> str | None:
        """Return the text that the template writes after the last text of message i.

        It ends at the next text of the conversation. Return None if the end of the last text is
        unknown.
        """
        last = -1
        seen = set()
        for n in self.sentinels_of_message(i):
            side_of_text = self.sentinels[n][:2]
            # Skip a sentinel that occurs again: the next message repeats the text, for example the
            # name of a tool.
            if side_of_text not in seen:
                last = n
            seen.add(side_of_text)
        if last < 0 or self.sentinels[last].side != "e":
            return None
        return self.text[self.place(last) : self.place(last + 1)]


# Characters [start, end) of the rendered text that one {% generation %} block wrote.
Block = tuple[int, int]


@dataclass
class TemplateTraits:
    """Features of a template: how it renders thoughts, calls and tools. `probe.py` detects them.

    Attributes:
        form: form of the messages in which the template reads thoughts and calls.
        style: how the template writes thoughts.
        reasoning, calls: whether the template or its prompt writes thoughts, and whether the
            template writes calls.
        lists_tools: whether the template writes the tools of a conversation.
        wrapped_result: pattern of a tool result with the tags that the template writes around it.
            None if the template writes no tags.
    """

    form: MessageForm = DEFAULT_FORM
    style: ThoughtStyle = DEFAULT_STYLE
    reasoning: bool = False
    calls: bool = False
    lists_tools: bool = False
    wrapped_result: re.Pattern[str] | None = None


@contextmanager
def _limit_seconds() -> Iterator[None]:
    """Raise TimeoutError if the code in the `with` block uses more processor time than
    MAX_RENDER_SECONDS.

    The limit is necessary in addition to the trial of a template (`try_template.py`), because the
    template may loop endlessly on conversations that are not in the trial. Only the main thread
    receives signals, so the limit has no effect in other threads. The processor time of all threads
    is counted. Nested `with` blocks are not supported, because the inner block ends the limit of
    the outer block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError

    previous_handler = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous_handler)


class ChatRenderer:
    """Renders conversations with one chat template, and locates their texts in the result.

    Args:
        jinja, name: the template, and its name in error messages.
        eos_ids: ids at which generation stops.

    Attributes:
        tagged: whether the template has {% generation %} blocks.
        ends: tokens and texts that may end an answer.
        traits: features of the template. Until `probe` sets them, all sentinel positions are tried
            for every text.
        with_pictures: whether each PICTURE_MARK in a text represents a picture. If True, the
            template gets texts with pictures as lists of parts.
        takes_lists: whether the template gets all texts as lists of parts.
        fixes: kind of an answer that cannot be rendered -> its fix, see `working_fix`.
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
        self.eos_ids = eos_ids
        self.ends = AnswerEnds(tokenizer, eos_ids)
        self.traits = TemplateTraits()
        self.with_pictures = False
        self.takes_lists = False
        self.fixes: dict[object, str] = {}

    def for_pictures(self) -> "ChatRenderer":
        """Return a copy of the renderer for conversations with pictures."""
        renderer = copy.copy(self)
        renderer.with_pictures = True
        return renderer

    def _given(self, messages: Messages) -> Sequence[TemplateMessage]:
        """Convert the messages to the form that the template reads."""
        given = self.traits.form.apply(messages)
        if not self.with_pictures and not self.takes_lists:
            return given
        return [self._in_parts(message) for message in given]

    def _in_parts(self, message: TemplateMessage) -> TemplateMessage:
        """Replace the text of a message by a list of its texts and pictures, if necessary."""
        content = message.get("content") or ""
        assert isinstance(content, str)
        texts = content.split(PICTURE_MARK) if self.with_pictures else [content]
        if len(texts) == 1 and not self.takes_lists:
            return message
        parts = []
        for text in texts:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        # There is a picture between two texts, but no picture before the first text.
        return {**message, "content": [part for part in parts[1:] if part.get("text") != ""]}

    def render(self, messages: Messages, tools: Tools = None, *, generate: bool = False) -> str:
        """Render a conversation. `generate` appends the generation prompt.

        Raise DataError if the template rejects the conversation.
        """
        with self._render_errors():
            return self.tokenizer.apply_chat_template(
                self._given(messages),
                tools,
                chat_template=self.jinja,
                add_generation_prompt=generate,
                tokenize=False,
            )

    def render_tagged(self, messages: Messages, tools: Tools) -> tuple[str, list[Block]]:
        """Render a conversation. Return the text and the spans of its {% generation %} blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # Do not use apply_chat_template. It calls the same function, but returns the blocks only as
        # tokens, and includes tokens that begin before a block.
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
            with _limit_seconds():
                yield
        except TimeoutError as error:
            # Raise ModelError instead of DataError, because `probe.py` handles a DataError as "the
            # template rejects this conversation".
            raise ModelError(
                f"{self.name} takes more than {MAX_RENDER_SECONDS} s to render a conversation",
                why="it may have nested loops",
                fix="use another template: data.template=FILE.jinja",
            ) from error
        except RENDER_ERRORS as error:
            why = first_line(error) or type(error).__name__
            raise self.error(
                "cannot render this conversation",
                why,
                "fix the row, or use a template that supports it: data.template=FILE.jinja",
            ) from error

    def error(self, what: str, why: str = "", fix: str = FIX_WITH_TAGS) -> DataError:
        return DataError(f"{self.name} {what}", why=why, fix=fix)

    def in_form(self, messages: Messages) -> list[Message]:
        """Return the messages without text that the template would repeat or ignore.

        A thought inside a text is moved to `reasoning_content` if the template does not find it in
        the text. Tags around a tool result are removed if the template writes them again.
        """
        traits = self.traits
        in_form: list[Message] = []
        for message in messages:
            turn = message
            if traits.wrapped_result is not None and message["role"] == "tool":
                result = traits.wrapped_result.sub(lambda found: found[1].strip(), turn["content"])
                turn = {**message, "content": result}
            else:
                turn = traits.style.split(message)
            in_form.append(turn)
        answers = [turn for turn in in_form if turn["role"] == "assistant"]
        empty = [turn for turn in answers if EMPTY_THOUGHT.match(turn["content"])]
        last = in_form.index(empty[-1]) if empty else 0
        # Some system messages make the template close a thought before each answer (SmolLM3).
        if last and CLOSED_THOUGHT.search(self.render(in_form[:last], generate=True)):
            for i, turn in enumerate(in_form):
                if turn in empty:
                    text = EMPTY_THOUGHT.sub("", turn["content"])
                    in_form[i] = {**turn, "content": text}
        return in_form

    def locate(
        self,
        text: str,
        messages: Messages,
        tools: Tools,
        trained: Collection[int] | None = None,
    ) -> Rendering:
        """Find the positions of a conversation's texts in its rendering.

        Sentinels are inserted into all texts first. If this changes the rendering for each of
        SENTINEL_POSITIONS, sentinels are inserted only into the trained answers and the messages
        next to them, because a template may test a text of an earlier turn.

        The first position of sentinels that leaves the rendering unchanged is used. More positions
        are tried while a text is missing that the template must render or that contains an end
        token.
        """
        word = _unused_word(text, messages, tools)
        marked: list[Collection[int] | None] = [None]
        if trained is not None:
            marked.append({i + step for i in trained for step in (-1, 0, 1)})
        for only in marked:
            rendering: Rendering | None = None
            shown: set[int] = set()
            # Try the sentinels before, after and around each text, because a template may trim one
            # side of it.
            for position in SENTINEL_POSITIONS:
                inserted = Sentinels(word, position, only, self.with_pictures)
                marked_messages, marked_tools = inserted.insert(messages, tools)
                plain_text, sentinels = self._strip(
                    inserted, self.render(marked_messages, marked_tools)
                )
                # Skip this sentinel position, because the sentinels changed the rendering. This
                # happens if the template tests the texts.
                if plain_text != text:
                    continue
                shown.update(sentinel.field for sentinel in sentinels)
                if rendering is None:
                    rendering = Rendering(
                        text, sentinels, inserted, marked_messages, marked_tools, frozenset()
                    )
                missing = [field for n, field in enumerate(inserted.fields) if n not in shown]
                # Do not try other positions if all texts that must be rendered have been found.
                if all(
                    self.may_drop(field, trained) and not self.has_end(field.text)
                    for field in missing
                ):
                    break
            if rendering is not None:
                return rendering._replace(shown=frozenset(shown))
        raise self.error(
            "renders differently depending on the message text",
            "so assistant spans cannot be located",
        )

    def _strip(self, inserted: Sentinels, marked_text: str) -> tuple[str, list[Sentinel]]:
        """Remove the sentinels from a rendered conversation.

        Return the text and its sentinels in order. Sentinels that a template repeats after the end
        of a call are left out: gpt-oss and Gemma 4 write the name of a call again before the call's
        result, and this name is not part of the call.
        """
        text, sentinels = inserted.strip(marked_text)
        if inserted.position != "both":
            return text, sentinels
        first_sentinels: list[Sentinel] = []
        seen = set()
        ended = set()
        last_of_message: dict[int, int] = {}
        # A template may write a text several times. Skip repeated sentinels after the end of a
        # call.
        for n, sentinel in enumerate(sentinels):
            field = inserted.fields[sentinel.field]
            message = field.message
            is_repeated = sentinel[:2] in seen
            if is_repeated and field.kind == "tool_calls" and message not in ended:
                last = last_of_message[message]
                if self.ends.search(text, sentinels[last].at, sentinels[last + 1].at):
                    ended.add(message)
            if is_repeated and message in ended:
                continue
            first_sentinels.append(sentinel)
            seen.add(sentinel[:2])
            last_of_message[message] = n
        return text, first_sentinels

    def may_drop(self, field: Field, trained: Collection[int] | None) -> bool:
        """Return whether the template may leave out the text of `field` without an error.

        A template may leave out a thought that is not trained. It may leave out any thought if it
        renders thoughts of other answers, and the list of tools if it renders tool calls, because
        prompts at inference lack the same texts. `RenderedAnswers.missing` reports the text.
        """
        if field.kind == "tools":
            return self.traits.calls and not self.traits.lists_tools
        if field.kind != "reasoning_content":
            return False
        return self.traits.reasoning or (trained is not None and field.message not in trained)

    def has_end(self, text: str) -> bool:
        return self.ends.search(text, is_last=False) is not None

    def prompt(self, rendering: Rendering, i: int) -> tuple[int | None, str]:
        """Return the end of the generation prompt for message i, and the sentinel before it.

        The end is the part of the prompt after the last text of the earlier messages.

        Returns:
            The index of the sentinel after the last text, and the part of the prompt after this
                sentinel. The index is -1 if the prompt contains no sentinel. It is None if another
                text precedes the answer in the rendered conversation.
        """
        if i == 0:
            raise self.error(
                "does not support an answer at the start of a conversation",
                "there is no prompt before it",
            )
        marked_prompt = self.render(rendering.messages[:i], rendering.tools, generate=True)
        prompt, prompt_sentinels = self._strip(rendering.inserted, marked_prompt)
        indices = rendering.sentinels_of_message(i)
        candidates = [indices[0] - 1] if indices else range(-1, len(rendering.sentinels))
        if prompt_sentinels:
            closing = prompt_sentinels[-1]
            prompt = prompt[closing.at :]
            # Compare only the text and the side of the sentinels, because the position of a
            # sentinel may differ if the conversation continues.
            sides = [sentinel[:2] for sentinel in rendering.sentinels]
            anchors = [n for n in candidates if n >= 0 and sides[n] == closing[:2]]
        else:
            anchors = [n for n in candidates if n < 0]
        return anchors[0] if len(anchors) == 1 else None, prompt

    def header(self, rendering: Rendering, i: int, prompt_at: int) -> str | None:
        """Return the text that the template writes before the first text of message i.

        Return None if the start of the message's text is unknown, or if the message begins with a
        thought, because the model itself writes the opening tag.
        """
        indices = rendering.sentinels_of_message(i)
        if not indices or rendering.inserted.position != "both":
            return None
        first = rendering.sentinels[indices[0]]
        if first.side != "b" or rendering.field(first).kind == "reasoning_content":
            return None
        return rendering.text[prompt_at : first.at]


def _unused_word(text: str, messages: Messages, tools: Tools) -> str:
    """Return a word that occurs neither in a rendering nor in its conversation."""
    conversation = repr((messages, tools))
    n = 0
    while f"zq{n}W" in text or f"zq{n}W" in conversation:
        n += 1
    return f"zq{n}W"
