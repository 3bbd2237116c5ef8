"""The loss mask of a rendered conversation: its supervised characters, for any chat template.

A template may strip thinking from earlier turns (Qwen3), trim texts (Llama 3, Gemma), move the
system message into a user's turn (Llama 2), or drop what it does not know. So no search for a text
can tell the template's words from the user's. Sentinels can:

1. Render the conversation, and again with every text in it (contents, thinking, names and arguments
   of calls, names of tools) between two sentinels. Without the sentinels both renderings must be
   equal; then they mark where each text is, and everything outside a pair of them is the template's
   own.
2. An answer starts where generation would: what the rendering of the messages before it, with the
   generation prompt, has after its last text must stand at the same place of the conversation. What
   the template writes between there and the answer's text (an empty thinking block, a tool call's
   tag) is the model's to write: supervised.
3. An answer ends with the first end token after its last text (`answer_ends`). What follows is not
   supervised.

A template with {% generation %} says itself where answers are; the sentinels check it, and a prompt
is rendered only where a block opens before its answer's text. Whatever cannot be proven is refused
with a DataError, never guessed.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from jinja2 import TemplateError

from tunesmith.data.align import CharSpan
from tunesmith.data.answer_ends import AnswerEnds
from tunesmith.data.sentinels import SENTINEL_POSITIONS, Field, Messages, Sentinel, Sentinels, Tools
from tunesmith.data.template_args import names_of_arguments
from tunesmith.data.thoughts import (
    Message,
    MessageForm,
    missing_parts,
    open_thought,
    split_thought,
    thought_at_end,
    thought_forms,
)
from tunesmith.errors import DataError, first_line

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
_GENERATION_START = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPEN_TAG = re.compile(r"[<\[][^<>\[\]]*\Z")
_FIX = "add {% generation %} tags around the answers in the template: data.template=FILE.jinja"
_FIX_TAGS = (
    "move the {% generation %} tags in the template: they must enclose each answer with its end"
    " token, and nothing else"
)


class _Rendering(NamedTuple):
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


class RenderedAnswers(NamedTuple):
    """A rendered conversation with its answers.

    Attributes:
        spans: the supervised characters.
        missing: what the row has and these do not hold, by names of ROW_WARNINGS: `missing_parts`
            of answers; `earlier_thought`, one that the template leaves out because the conversation
            continues; `earlier_prompt`, an answer without what its prompt ends with, for the same
            reason; and `unlisted_tools`.
    """

    text: str
    spans: list[CharSpan]
    missing: frozenset[str] = frozenset()


# Of one {% generation %} block: the characters [start, end) that it wrote.
_Block = tuple[int, int]


# Small conversations that show what a template does with each kind of text.
_PROBE_TURN: list[Message] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
]
_PROBE_TURNS = [
    *_PROBE_TURN,
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
_PROBE_THINKING = [_PROBE_TURN[0], {**_PROBE_TURN[1], "reasoning_content": "three"}]
_PROBE_INLINE = [_PROBE_TURN[0], {**_PROBE_TURN[1], "content": "<think>\nthree\n</think>\n\ntwo"}]
_CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "look", "arguments": {"at": "six"}},
}
_PROBE_CALL: list[Message] = [
    _PROBE_TURN[0],
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "look", "tool_call_id": "call00001", "content": "five"},
    _PROBE_TURN[1],
]
_PROBE_CALLS: list[Message] = [
    _PROBE_TURN[0],
    {"role": "assistant", "content": "", "tool_calls": [_CALL, {**_CALL, "id": "call00002"}]},
]
_PROBE_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


class AssistantMask:
    """Renders conversations with one chat template and finds their answers.

    Args:
        jinja, name: the template, and what errors call it.
        eos_ids: ids at which generation stops.

    Attributes:
        tagged: whether the template has {% generation %} blocks.
        ends: what may end an answer.
        form: how the template takes thoughts and calls.
        reasoning, calls: whether the template shows those.
        lists_tools: whether it writes the tools of a conversation.
    """

    def __init__(self, tokenizer: Any, jinja: str, name: str, eos_ids: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.jinja = jinja
        self.name = name
        self.tagged = bool(_GENERATION_START.search(jinja))
        # Before its first result, the probe looks for every text with every position.
        self.form = MessageForm()
        self.reasoning = False
        self.calls = False
        self.lists_tools = False
        self._splits_thoughts = False
        self._writes_thoughts = False
        self.ends = AnswerEnds(tokenizer, eos_ids)
        self._probe()

    def render(
        self, messages: Messages, tools: Tools = None, *, generate: bool = False, where: str = ""
    ) -> str:
        """The text of a conversation, or DataError; `generate` adds the generation prompt."""
        with self._render_errors(where):
            return self.tokenizer.apply_chat_template(
                self.form.apply(messages),
                tools,
                chat_template=self.jinja,
                add_generation_prompt=generate,
                tokenize=False,
            )

    def _render_tagged(
        self, messages: Messages, tools: Tools, where: str
    ) -> tuple[str, list[_Block]]:
        """The text of a conversation, and what its {% generation %} blocks wrote."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # As in apply_chat_template, which returns these spans as tokens only, those included that
        # begin before a span.
        bare = [
            {key: value for key, value in message.items() if value is not None}
            for message in self.form.apply(messages)
        ]
        with self._render_errors(where):
            texts, blocks = render_jinja_template(
                [bare],
                tools,
                None,
                self.jinja,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        return texts[0], [(start, end) for start, end in blocks[0] if end > start]

    @contextmanager
    def _render_errors(self, where: str) -> Iterator[None]:
        try:
            yield
        except RENDER_ERRORS as error:
            why = first_line(error) or type(error).__name__
            fix = "fix the row, or use a template that supports it: data.template=FILE.jinja"
            raise self._error("cannot render this conversation", where, why, fix) from error

    def _error(self, what: str, where: str, why: str = "", fix: str = _FIX) -> DataError:
        return DataError(f"{self.name} {what}", where=where, why=why, fix=fix)

    def _locate_texts(
        self,
        text: str,
        messages: Messages,
        tools: Tools,
        where: str,
        trained: Collection[int] | None = None,
    ) -> _Rendering:
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
            rendering: _Rendering | None = None
            shown: set[int] = set()
            # Sentinels before, after or around each text: a template may trim one side.
            for position in SENTINEL_POSITIONS:
                inserted = Sentinels(word, position, only)
                marked_messages, marked_tools = inserted.insert(messages, tools)
                marked_text = self.render(marked_messages, marked_tools, where=where)
                plain_text, sentinels = self._strip(inserted, marked_text)
                # A template that reads its texts renders others with sentinels; such a position
                # tells nothing.
                if plain_text != text:
                    continue
                shown.update(sentinel.field for sentinel in sentinels)
                if rendering is None:
                    rendering = _Rendering(
                        text, sentinels, inserted, marked_messages, marked_tools, frozenset()
                    )
                missing = [field for n, field in enumerate(inserted.fields) if n not in shown]
                # All that must show has shown itself: the other positions need not be tried.
                if all(
                    self._may_drop(field, trained) and not self._has_end(field.text)
                    for field in missing
                ):
                    break
            if rendering is not None:
                return rendering._replace(shown=frozenset(shown))
        what = "renders differently depending on the message text"
        raise self._error(what, where, "so assistant spans cannot be located")

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

    def _may_drop(self, field: Field, trained: Collection[int] | None) -> bool:
        """Tell whether a template may leave out a text; `RenderedAnswers.missing` tells of it.

        That is a thought that is not trained, or one of several, and tools where it has calls: no
        prompt in use shows them either.
        """
        if field.kind == "tools":
            return self.calls and not self.lists_tools
        if field.kind != "reasoning_content":
            return False
        return self.reasoning or (trained is not None and field.message not in trained)

    def answers(
        self,
        messages: Messages,
        tools: Tools = None,
        *,
        selected: Collection[int] | None = None,
        where: str = "",
    ) -> RenderedAnswers:
        """The rendered conversation, and the supervised spans of its answers.

        Args:
            selected: indices of the assistant messages that are supervised; None: all.

        Raises:
            DataError: the template drops a part of the conversation, or an answer cannot be located
                for certain.
        """
        if self.tagged:
            text, blocks = self._render_tagged(messages, tools, where)
        else:
            text = self.render(messages, tools, where=where)
            blocks = []
        rendering = self._locate_texts(text, messages, tools, where, selected)
        self._check_complete(rendering, where, selected)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        blocks_of = self._blocks_of_answers(rendering, blocks, answers, where)
        # The end of the last answer shows only where another turn follows.
        if not self.tagged and answers:
            rendering = self._with_next_turn(rendering, answers[-1])
        spans = []
        missing = set()
        for i in answers:
            if selected is not None and i not in selected:
                continue
            is_last = i == answers[-1]
            if self.tagged:
                own_spans = self._tagged_answer(rendering, i, is_last, blocks_of[i], where)
            else:
                rendering, span, is_after_prompt = self._answer(rendering, i, is_last, where)
                own_spans = [span]
                if not is_after_prompt:
                    missing.add("earlier_prompt")
            spans += own_spans
            supervised = "".join(rendering.text[span.start : span.end] for span in own_spans)
            for part in missing_parts(messages[i], supervised):
                is_earlier = part == "lost_thought" and self.reasoning and not is_last
                missing.add("earlier_thought" if is_earlier else part)
        if "earlier_thought" in missing:
            # It says the same, and more.
            missing.discard("earlier_prompt")
        if tools and not self.lists_tools and not self._shows(rendering, "tools"):
            missing.add("unlisted_tools")
        return RenderedAnswers(rendering.text, spans, frozenset(missing))

    def _with_next_turn(self, rendering: _Rendering, i: int) -> _Rendering:
        """The rendering; where message i, the last answer, lacks an end, with the next turn's."""
        is_call = bool(rendering.messages[i].get("tool_calls"))
        next_turn = self.ends.next_turn.get(is_call)
        place = rendering.place(len(rendering.sentinels) - 1)
        if next_turn is None or self.ends.search(rendering.text, place):
            return rendering
        return rendering._replace(text=rendering.text + next_turn)

    def _check_complete(
        self, rendering: _Rendering, where: str, trained: Collection[int] | None
    ) -> None:
        """DataError for a template that drops words, and for words that hide where they end."""
        # A message without sentinels must show its text as it is.
        for i, plain in enumerate(rendering.messages):
            content = plain["content"] or ""
            is_marked = rendering.inserted.only is None or i in rendering.inserted.only
            if not is_marked and content.strip() not in rendering.text:
                raise self._dropped(Field(i, "content", content), rendering, where)
        # Two sentinels of a text tell its beginning and its end.
        sentinels_of = Counter(sentinel.field for sentinel in rendering.sentinels)
        for n, field in enumerate(rendering.inserted.fields):
            message = f"message {field.message + 1}"
            if n not in rendering.shown and not self._may_drop(field, trained):
                raise self._dropped(field, rendering, where)
            is_open = n in rendering.shown and sentinels_of[n] < 2
            if is_open and self._has_end(field.text):
                what = f"rewrites {message}, whose text contains an end token"
                raise self._error(what, where, "the end of the message is ambiguous")
        if any(map(self._has_end, rendering.inserted.argument_names)):
            what = "writes a call whose argument is named with an end token"
            raise self._error(what, where, "the end of the call is ambiguous")

    def _dropped(self, field: Field, rendering: _Rendering, where: str) -> DataError:
        """The error for a template that leaves out a text."""
        message = f"message {field.message + 1}"
        why = "the model would train on an incomplete conversation"
        fix = "remove it from the rows, or use a template that renders it: data.template=FILE.jinja"
        if field.kind == "tools":
            dropped = "the tools"
        elif field.kind == "content":
            dropped = f"{message} ({rendering.messages[field.message]['role']})"
        else:
            dropped = f"the {field.kind} of {message}"
        if field.kind == "reasoning_content":
            fix = (
                'write it in front of the answer: "<think>\\n...\\n</think>\\n\\n..."; or use a'
                " template that renders it: data.template=FILE.jinja"
            )
        if field.kind == "tool_calls" and self.lists_tools and not self.calls:
            why = "it lists tools and writes no calls: the model's own form of a call is not known"
            fix = (
                "write the call in the answer's content as the model's documentation shows it, and"
                " remove tool_calls; or add calls to the template: data.template=FILE.jinja"
            )
        return self._error(f"drops {dropped}", where, why, fix)

    def _answer(
        self, rendering: _Rendering, i: int, is_last: bool, where: str
    ) -> tuple[_Rendering, CharSpan, bool]:
        """The span of message i: from the end of the generation prompt through the end token.

        The rendering comes back with what the generation prompt holds and the row lacks. The last
        value says whether the answer stands after all of its prompt.
        """
        anchor, prompt = self._prompt(rendering, i, where)
        if anchor is None:
            raise self._error(f"moves the text before message {i + 1}, an answer", where)
        prompt_at = rendering.place(anchor)
        if is_last and not rendering.text.startswith(prompt, prompt_at):
            rendering = self._with_prompt(rendering, i, prompt_at, prompt)
        text = rendering.text
        indices = rendering.of_message(i)
        start = self._start_of_answer(rendering, i, prompt_at, prompt, is_last, where)
        if indices:
            last_sentinel = indices[-1]
            # Texts of another message between those of the answer: no span can hold the answer
            # alone.
            is_contiguous = last_sentinel - indices[0] + 1 == len(indices)
            if start > rendering.place(indices[0]) or not is_contiguous:
                raise self._error(f"mixes message {i + 1}, an answer, with other text", where)
            texts_end = max(start, rendering.place(last_sentinel))
        else:
            last_sentinel = anchor
            texts_end = start
        # The end token stands before the next text of the conversation.
        limit = len(text)
        if last_sentinel + 1 < len(rendering.sentinels):
            limit = rendering.place(last_sentinel + 1)
        # The end token of an answer must come before the next message.
        end = self.ends.search(text, texts_end, limit, is_last=is_last)
        if end is None:
            fix = (
                "use a template that ends answers: data.template=FILE.jinja;"
                " or add its end token: model.added_tokens"
            )
            what = f"writes no end token after message {i + 1}, an answer"
            raise self._error(what, where, self._no_end(), fix)
        return rendering, self._through(start, end), start == prompt_at + len(prompt)

    def _with_prompt(
        self, rendering: _Rendering, i: int, prompt_at: int, prompt: str
    ) -> _Rendering:
        """The rendering with what the generation prompt has before message i, and the row lacks.

        Gemma 4's prompt has an empty thought where thinking is off, and its model answers after it.
        DeepSeek R1's opens a thought, and its template leaves thoughts out of rows: the row's is
        written there. A row without a thought has nothing to close it with, and stays as it is.
        """
        at = self._thought_in_prompt(rendering, i, prompt_at, prompt)
        indices = rendering.of_message(i)
        if at is None:
            return rendering
        added = prompt[at:]
        has_thought = "reasoning_content" in rendering.messages[i]
        tags = open_thought(added)
        if has_thought and self._writes_thoughts and tags is not None:
            added += f"{rendering.inserted.thought_of(i).strip()}\n{tags[1]}\n\n"
        elif has_thought or tags is not None:
            return rendering
        split = indices[0] if indices else len(rendering.sentinels)
        sentinels = rendering.sentinels[:split]
        for sentinel in rendering.sentinels[split:]:
            sentinels.append(sentinel._replace(at=sentinel.at + len(added)))
        begin = rendering.text[: prompt_at + at]
        text = begin + added + rendering.text[len(begin) :]
        return rendering._replace(text=text, sentinels=sentinels)

    def _thought_in_prompt(
        self, rendering: _Rendering, i: int, prompt_at: int, prompt: str
    ) -> int | None:
        """Find where in the generation prompt a thought begins that the row does not have there.

        None: it has none, or the row has other words before it.
        """
        at = thought_at_end(prompt)
        if at is None or not rendering.text.startswith(prompt[:at], prompt_at):
            return None
        header = self._header(rendering, i, prompt_at)
        # No part of it may be the answer's.
        if rendering.of_message(i) and (header is None or len(header) < at):
            return None
        return at

    def _header(self, rendering: _Rendering, i: int, prompt_at: int) -> str | None:
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

    def _start_of_answer(
        self,
        rendering: _Rendering,
        i: int,
        prompt_at: int,
        prompt: str,
        is_last: bool,
        where: str,
    ) -> int:
        """Find the start of an answer after its generation prompt, which must be at `prompt_at`."""
        text = rendering.text
        if text.startswith(prompt, prompt_at):
            return prompt_at + len(prompt)
        # Qwen3.5 and DeepSeek R1 open thinking in the generation prompt and leave it out of earlier
        # turns.
        if not is_last:
            header = self._header(rendering, i, prompt_at)
            if header and prompt.startswith(header):
                return prompt_at + len(header)
            thought_at = self._thought_in_prompt(rendering, i, prompt_at, prompt)
            if thought_at is not None:
                # Nemotron's rows have the tag, and close it at once.
                common = _common_prefix(prompt, text[prompt_at:])
                return prompt_at + max(thought_at, min(common, len(header or "")))
        row = text[prompt_at : prompt_at + 40]
        raise self._error(
            f"writes before message {i + 1}, an answer, something other than its generation prompt",
            where,
            f"the prompt in use ends with {prompt[-40:]!r}, the row continues with {row!r}",
            self._fix_prompt(prompt, is_last),
        )

    def _fix_prompt(self, prompt: str, is_last: bool) -> str:
        """The ways on where rows and prompts differ; many templates switch thinking in prompts."""
        fix = _FIX
        tags = open_thought(prompt)
        if tags is not None:
            empty = f"{tags[0]}\\n\\n{tags[1]}\\n\\n..."
            fix = f'give the answer a thought, or an empty one: "{empty}"; or {fix}'
        names = names_of_arguments(self.jinja, self.tokenizer.special_tokens_map)
        if names:
            fix = (
                f"set what the template takes in data.template_args ({', '.join(names)}); or {fix}"
            )
        # Earlier turns are then history, as the prompt in use has them.
        return fix if is_last else f"data.train_on=last; or {fix}"

    def _prompt(self, rendering: _Rendering, i: int, where: str) -> tuple[int | None, str]:
        """The model's input before message i, after the last text of the prompt.

        Returns:
            The index of the sentinel that closes that text (-1: the prompt holds none; None: in the
            conversation it is not the one before the answer), and what the prompt holds from there
            on.
        """
        if i == 0:
            what = "does not support an answer at the start of a conversation"
            raise self._error(what, where, "there is no prompt before it")
        marked_prompt = self.render(
            rendering.messages[:i], rendering.tools, generate=True, where=where
        )
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

    def _through(self, start: int, end: re.Match[str]) -> CharSpan:
        """An answer's last characters with the end token; up to it, where generation goes on."""
        if end[0] in self.ends.earlier:
            return CharSpan(start, end.start())
        return CharSpan(start, end.end(), end.start())

    def _has_end(self, text: str) -> bool:
        return self.ends.search(text, is_last=False) is not None

    def _no_end(self) -> str:
        end_tokens = ", ".join(self.ends.stops) or "none"
        return f"the model would never learn to stop; end tokens: {end_tokens}"

    def _blocks_of_answers(
        self, rendering: _Rendering, blocks: list[_Block], answers: list[int], where: str
    ) -> dict[int, list[_Block]]:
        """The blocks of each assistant message.

        They must hold all of each answer and nobody else's text.
        """
        owners: list[int | None] = [None] * len(blocks)
        if not self.tagged:
            return {}
        for sentinel in rendering.sentinels:
            i = rendering.field(sentinel).message
            # Borders count: an empty answer has its sentinel on one.
            holding = [n for n, (start, end) in enumerate(blocks) if start <= sentinel.at <= end]
            if i in answers:
                if not holding:
                    raise self._tag_error("leaves out a part of", i, where)
                owners[holding[0]] = i
            elif any(blocks[n][0] < sentinel.at < blocks[n][1] for n in holding):
                raise self._tag_error("covers", i, where)
        # A block without a text of the row is a blank answer; these come in order.
        for n, block in enumerate(blocks):
            if owners[n] is not None:
                continue
            previous = max((owner for owner in owners[:n] if owner is not None), default=None)
            # The first answer after the last assigned one that no block holds yet.
            later = [i for i in answers if i not in owners and (previous is None or i > previous)]
            owners[n] = later[0] if later else previous
            if owners[n] is None:
                what = "has a {% generation %} block outside of answers"
                raise self._error(what, where, f"characters {block}", _FIX_TAGS)
        blocks_of: dict[int, list[_Block]] = {i: [] for i in answers}
        for block, owner in zip(blocks, owners, strict=True):
            if owner is not None:
                blocks_of[owner].append(block)
        return blocks_of

    def _tag_error(self, verb: str, i: int, where: str) -> DataError:
        what = f"has a {{% generation %}} block that {verb} message {i + 1}"
        return self._error(what, where, fix=_FIX_TAGS)

    def _tagged_answer(
        self, rendering: _Rendering, i: int, is_last: bool, blocks: list[_Block], where: str
    ) -> list[CharSpan]:
        """The spans of message i, within its blocks: the last one ends with the end token."""
        if not blocks:
            what = f"has no {{% generation %}} block for message {i + 1}"
            raise self._error(what, where, fix=_FIX_TAGS)
        texts = [rendering.place(n) for n in rendering.of_message(i)]
        spans = []
        end = None
        for start, stop in blocks:
            # The end token stands after the answer's texts.
            after_texts = max([start, *texts])
            end = self.ends.search(rendering.text, after_texts, stop, is_last=is_last)
            if end is not None:
                spans.append(self._through(start, end))
                break
            spans.append(CharSpan(start, stop))
        if end is None:
            what = f"has a {{% generation %}} block without an end token, at message {i + 1}"
            fix = "move {% endgeneration %} after the end token"
            raise self._error(what, where, self._no_end(), fix)
        begin = 0
        opens_with_text = bool(texts) and blocks[0][0] >= min(texts)
        if i > 0 and not opens_with_text:
            # The block may open before the answer's header, which the generation prompt holds: it
            # is not supervised.
            anchor, prompt = self._prompt(rendering, i, where)
            if anchor is not None:
                prompt_at = rendering.place(anchor)
                common = _common_prefix(prompt, rendering.text[prompt_at:])
                begin = min([prompt_at + common, *texts])
        return [span._replace(start=max(span.start, begin)) for span in spans if span.end > begin]

    def _probe(self) -> None:
        """Find out once per template, on small conversations, what it shows and its end token."""
        rendering = self._try(_PROBE_TURN)
        if rendering is not None and not self._shows_all(rendering):
            dropped = "answer" if 0 in rendering.shown else "question"
            why = f"it renders as {rendering.text[:60]!r}"
            fix = "name a template that writes it: data.template=FILE.jinja"
            raise self._error(f"drops the {dropped}", "data.template", why, fix)
        self._find_forms()
        self._find_ends()
        rendering = self._try(_PROBE_TURNS)
        if rendering is not None:
            self._check_generation_prompt(rendering)

    def _find_forms(self) -> None:
        """Find out in which form the template shows thoughts and calls."""
        for form in thought_forms(self.jinja):
            self.form = form
            if self._shows_answer(self._try(_PROBE_THINKING)):
                self.reasoning = True
                break
        else:
            self.form = MessageForm()
        for text_arguments in (False, True):
            self.form = self.form._replace(text_arguments=text_arguments)
            rendering = self._try(_PROBE_CALL, _PROBE_TOOLS)
            if rendering is not None and self._shows(rendering, "tool_calls"):
                self.calls = True
                break
        else:
            self.form = self.form._replace(text_arguments=False)
        listed = self._try(_PROBE_TURN, _PROBE_TOOLS)
        self.lists_tools = listed is not None and self._shows(listed, "tools")
        if self.reasoning:
            # Where the template reads a text's thought itself, as it does the field, texts stay.
            self._splits_thoughts = self._differ(_PROBE_INLINE, _PROBE_THINKING)
        elif self._prompt_opens_thought():
            self.reasoning = True
            self._splits_thoughts = True
            self._writes_thoughts = True

    def _prompt_opens_thought(self) -> bool:
        """Tell whether the generation prompt opens a thought that the template's rows lack."""
        rendering = self._try(_PROBE_TURN)
        if rendering is None or not rendering.of_message(1) or self.tagged:
            return False
        anchor, prompt = self._prompt(rendering, 1, "")
        if anchor is None:
            return False
        prompt_at = rendering.place(anchor)
        is_missing = not rendering.text.startswith(prompt, prompt_at)
        thought_at = self._thought_in_prompt(rendering, 1, prompt_at, prompt)
        return is_missing and thought_at is not None and open_thought(prompt) is not None

    def _differ(self, messages: Messages, others: Messages) -> bool:
        """Tell whether two conversations render differently."""
        try:
            return self.render(messages) != self.render(others)
        except DataError:
            return True

    def _shows_answer(self, rendering: _Rendering | None) -> bool:
        """Check that all texts stand in the order of the conversation, each once."""
        if rendering is None or not self._shows_all(rendering):
            return False
        fields = [sentinel.field for sentinel in rendering.sentinels]
        return fields == sorted(fields)

    def _shows(self, rendering: _Rendering, kind: str) -> bool:
        """Check that all texts of a kind are shown."""
        fields = enumerate(rendering.inserted.fields)
        return all(n in rendering.shown for n, field in fields if field.kind == kind)

    def in_form(self, messages: Messages) -> Messages:
        """The messages with the thoughts of texts in `reasoning_content`, where the template would
        not read them there.
        """
        if not self._splits_thoughts:
            return messages
        in_form = []
        for message in messages:
            split = split_thought(message)
            if split.get("reasoning_content") == "" and not self._writes_thoughts:
                # An empty thought is a part of the text where the template knows its tags.
                knows_tags = "</think>" in self.jinja
                split = message if knows_tags else {**message, "content": split["content"]}
            in_form.append(split)
        return in_form

    def _try(self, messages: Messages, tools: Tools = None) -> _Rendering | None:
        """A conversation with its texts located; None where the template does not take it."""
        try:
            return self._locate_texts(self.render(messages, tools), messages, tools, "")
        except DataError:
            # The rows will show what it takes.
            return None

    def _shows_all(self, rendering: _Rendering | None) -> bool:
        return rendering is not None and len(rendering.shown) == len(rendering.inserted.fields)

    def _find_ends(self) -> None:
        """Find out what ends answers, where generation's end tokens do not."""
        turns = self._try(_PROBE_TURNS)
        if turns is not None:
            question, earlier, last = (turns.tail(i) for i in (2, 1, 3))
            if question is not None and earlier is not None and last is not None:
                self.ends.read_turns(question, earlier, last)
        if not self.calls:
            return
        with_result = self._try(_PROBE_CALL, _PROBE_TOOLS)
        # Some templates take one call in a message.
        calls = self._try(_PROBE_CALLS, _PROBE_TOOLS) or self._try(_PROBE_CALL[:2], _PROBE_TOOLS)
        if with_result is None or calls is None:
            return
        call = with_result.tail(1)
        last_calls = calls.tail(1)
        if call is not None and last_calls is not None:
            start = calls.place(calls.of_message(1)[0])
            self.ends.read_call(call, last_calls, calls.text[start:])

    def _check_generation_prompt(self, rendering: _Rendering) -> None:
        """DataError for a template without generation prompt whose answers have a header.

        Nothing tells that header from the answer.
        """
        indices = rendering.of_message(1)
        if self.tagged or not indices:
            return
        question = self.render(_PROBE_TURN[:1])
        has_generation_prompt = question != self.render(_PROBE_TURN[:1], generate=True)
        if has_generation_prompt or not rendering.text.startswith(question):
            return
        header = rendering.text[len(question) : rendering.place(indices[0])]
        special_tokens = self.tokenizer.added_tokens_decoder.values()
        if any(token.content in header for token in special_tokens):
            fix = (
                "add {% if add_generation_prompt %}...{% endif %} with the header of an answer to"
                " the template"
            )
            why = f"the model would have to write {header!r} itself"
            raise self._error("has no generation prompt", "data.template", why, fix)


def _common_prefix(a: str, b: str) -> int:
    """Count the characters that two texts share at their beginning; whole tags only."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            # Two tags may begin alike: <think> and <|call|>.
            tag = _OPEN_TAG.search(a[:count])
            return tag.start() if tag is not None else count
        count += 1
    return count


def _unused_word(text: str, messages: Messages, tools: Tools) -> str:
    """A word that occurs neither in a rendering nor in its conversation."""
    conversation = repr((messages, tools))
    n = 0
    while f"zq{n}W" in text or f"zq{n}W" in conversation:
        n += 1
    return f"zq{n}W"
