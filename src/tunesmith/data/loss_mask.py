"""Which characters of a rendered conversation are learnt, for any chat template.

A template is a program: it may strip thinking from earlier turns (Qwen3), trim what it is given (Llama 3, Gemma), move
the system message into a user's turn (Llama 2), or drop what it does not know. So the rendering of a part need not be
a part of the rendering, and no search for a text can tell the template's words from the user's. Found here by marks:

1. The conversation is rendered as it is, and again with every text in it (contents, thinking, names and arguments of
   calls, names of tools) between two marks of its own: short ASCII words, set inside the blanks at the text's edges so
   that trimming meets what it met before. With the marks taken out, both renderings must be equal; then the marks say
   where each text went, and everything outside a pair of marks is the template's own.
2. An answer starts where the model would be given the word: what the template writes between the text before the
   answer and the end of the generation prompt (rendered from the messages before it) must be found again there.
   What it writes after that, such as an empty thinking block or a tool call's tag, the model has to write: learnt.
3. An answer ends with the first end token that the template writes after the answer's last text. What follows it (a
   newline, a second end token) is not learnt.

A template with {% generation %} says itself where answers are; the marks then check it. Whatever cannot be shown this
way is refused with a DataError, never guessed: a text that the template drops, an answer without an end token.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

from tunesmith.data.align import Span
from tunesmith.data.sentinels import PLACES, Message, Messages, Sentinel, Sentinels, Tools
from tunesmith.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FIX = "give a template that can be read: data.template=FILE.jinja, with {% generation %} around what is learnt"


class Answer(NamedTuple):
    """One assistant message: its index and the spans of characters that are learnt."""

    message: int
    spans: list[Span]


class _View(NamedTuple):
    """A rendering whose marks are known."""

    text: str
    marks: list[Sentinel]
    marker: Sentinels
    messages: list[Message]
    tools: Tools
    shown: frozenset[int]  # fields that some way of marking found in the rendering


class Masker:
    """Renders conversations with one template and finds the answers in them.

    Args:
        tokenizer: gives `apply_chat_template`.
        jinja: the template.
        name: what errors call it.
        eos: ids at which generation stops.

    Attributes:
        ends: the texts of the tokens that may end an answer: those of `eos`, and the template's own.
        end_ids: their ids.
        reasoning, tools: whether the template shows thinking and tool calls.
        notes: what happened to rows that were not refused, counted.
    """

    def __init__(self, tokenizer: Any, jinja: str, name: str, eos: Collection[int]) -> None:
        self.tokenizer, self.jinja, self.name = tokenizer, jinja, name
        self.generation = bool(_GENERATION.search(jinja))
        self.notes: Counter[str] = Counter()
        self.reasoning = self.tools = True
        self.end_ids = frozenset(eos)
        self.ends = {text: id_ for id_ in sorted(eos) if (text := tokenizer.decode([id_]))}
        self._probe()

    # --- rendering --------------------------------------------------------------------------------------------------

    def render(self, messages: Messages, tools: Tools = None, *, generate: bool = False, where: str = "") -> str:
        """The text of a conversation; `generate` adds the generation prompt.

        Raises:
            DataError: the template refuses the conversation or fails on it.
        """
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.jinja,
                add_generation_prompt=generate,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise DataError(
                f"{self.name} cannot render this conversation",
                where=where,
                why=str(error) or type(error).__name__,
                fix="mend the row, or give a template that takes it: data.template=FILE.jinja",
            ) from error

    def _refuse(self, what: str, where: str, why: str = "", fix: str = _FIX) -> DataError:
        return DataError(f"{self.name} {what}", where=where, why=why, fix=fix)

    def _views(self, text: str, messages: Messages, tools: Tools, where: str) -> _View:
        """The rendering with marks, by the first way of marking that leaves the rendering as it was."""
        word = next(w for n in itertools.count() if (w := f"zq{n}W") not in text and w not in repr((messages, tools)))
        best: _View | None = None
        shown: set[int] = set()
        for place in PLACES:
            marker = Sentinels(word, place)
            marked, marked_tools = marker.mark(messages, tools)
            plain, marks = marker.unmark(self.render(marked, marked_tools, where=where))
            if plain != text:
                continue
            shown |= {mark.field for mark in marks}
            best = best or _View(text, marks, marker, marked, marked_tools, frozenset())
            if len(shown) == len(marker.fields):
                break
        if best is None:
            raise self._refuse("changes with the words in it, so that nothing shows where answers lie", where)
        return best._replace(shown=frozenset(shown))

    # --- answers ----------------------------------------------------------------------------------------------------

    def answers(self, messages: Messages, tools: Tools = None, *, where: str = "") -> tuple[str, list[Answer]]:
        """The rendered conversation, and the spans of its assistant messages.

        Raises:
            DataError: the template drops a part of the conversation, or its answers cannot be told for certain.
        """
        text = self.render(messages, tools, where=where)
        view = self._views(text, messages, tools, where)
        self._check_whole(view, where)
        if self.generation:
            return text, self._tagged(view, messages, tools, where)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._answer(view, i, i == turns[-1], where) for i in turns]

    def _check_whole(self, view: _View, where: str) -> None:
        """Refuse a template that drops words of the conversation, and words that hide where their text ends."""
        fields = view.marker.fields
        for n in sorted(set(range(len(fields))) - view.shown):
            message, what, _ = fields[n]
            if what == "reasoning_content" and self.reasoning:
                self.notes["thinking that the template leaves out"] += 1
                continue
            whose = {"tools": "the tools"}.get(what) or f"the {what} of message {message + 1}"
            if what == "content":
                whose = f"message {message + 1} ({view.messages[message]['role']})"
            fix = "take it out of the rows, or give a template that shows it: data.template=FILE.jinja"
            raise self._refuse(f"drops {whose}", where, "half a conversation would be learnt", fix)
        if any(end in name for name in view.marker.bare for end in self.ends):
            raise self._refuse(
                "writes a call whose argument is named with an end token", where, "its end cannot be told"
            )
        sides = Counter(mark.field for mark in view.marks)
        for n, field in enumerate(fields):
            if n in view.shown and sides[n] < 2 and any(end in field.text for end in self.ends):
                raise self._refuse(
                    f"rewrites message {field.message + 1}, whose text holds an end token",
                    where,
                    "its end cannot be told",
                )

    def _answer(self, view: _View, i: int, last: bool, where: str) -> Answer:
        """The span of message i: from the end of the generation prompt through the end token."""
        marks = view.marks
        own = [n for n, mark in enumerate(marks) if view.marker.fields[mark.field].message == i]
        anchor, prompt = self._prompt(view, i, own, where)
        if anchor is None:
            raise self._refuse(f"moves the words before message {i + 1}, an answer", where)
        at = marks[anchor].at if anchor >= 0 else 0
        start = at + len(prompt)
        if not view.text.startswith(prompt, at):
            first = marks[own[0]] if own else None
            shown = view.text[at : first.at] if first and first.side == "b" and view.marker.place == "both" else ""
            # Qwen3.5 and DeepSeek R1 open thinking in the generation prompt and leave it out of earlier turns.
            if last or not shown or not prompt.startswith(shown):
                raise self._refuse(
                    f"writes before message {i + 1}, an answer, something other than its generation prompt",
                    where,
                    f"the prompt in use ends with {prompt[-40:]!r}, the row goes on with {view.text[at : at + 40]!r}",
                )
            self.notes["earlier answers shown without what the generation prompt adds"] += 1
            start = at + len(shown)
        closing = own[-1] if own else anchor
        if own and (start > marks[own[0]].at or len(own) != closing - own[0] + 1):
            raise self._refuse(f"mixes message {i + 1}, an answer, with other words", where)
        limit = marks[closing + 1].at if closing + 1 < len(marks) else len(view.text)
        stop, end = self._end(view.text, max(start, marks[closing].at if own else start), limit, i, where)
        return Answer(i, [Span(start, end, stop)])

    def _prompt(self, view: _View, i: int, own: list[int], where: str) -> tuple[int | None, str]:
        """What the model is given before message i: the mark that it follows (-1: none, the text's start), and the text.

        The mark is None where the last mark of the prompt is not the one before the answer.
        """
        if i == 0:
            raise self._refuse("cannot tell an answer that opens the conversation", where, "no prompt stands before it")
        given = self.render(view.messages[:i], view.tools, generate=True, where=where)
        given, before = view.marker.unmark(given)
        key = before[-1][:2] if before else None
        places = [own[0] - 1] if own else range(-1, len(view.marks))
        anchors = [n for n in places if (view.marks[n][:2] if n >= 0 else None) == key]
        return (anchors[0] if len(anchors) == 1 else None), given[before[-1].at if before else 0 :]

    def _end(self, text: str, begin: int, limit: int, i: int, where: str) -> tuple[int, int]:
        """(where the end token begins, where it ends): the first one between the answer's last word and the next text."""
        found = [(at, -len(end)) for end in self.ends if (at := text.find(end, begin, limit)) >= 0]
        if not found:
            known = ", ".join(self.ends) or "none"
            raise self._refuse(
                f"writes no end token after message {i + 1}, an answer",
                where,
                f"the model would never learn to stop; end tokens: {known}",
                "give a template that ends answers: data.template=FILE.jinja; or add its token: model.added_tokens",
            )
        at, size = min(found)
        return at, at - size

    # --- templates with {% generation %} ----------------------------------------------------------------------------

    def _blocks(self, messages: Messages, tools: Tools) -> list[tuple[int, int]]:
        """Spans of characters that the template's {% generation %} blocks wrote."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # As apply_chat_template does, which has these spans too but gives only tokens, straddling ones included.
        bare = [{key: value for key, value in message.items() if value is not None} for message in messages]
        _, blocks = render_jinja_template(
            conversations=[bare],
            tools=tools,
            chat_template=self.jinja,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return [(start, end) for start, end in blocks[0] if end > start]

    def _tagged(self, view: _View, messages: Messages, tools: Tools, where: str) -> list[Answer]:
        """Answers as the {% generation %} blocks tell them, checked: all of each answer, and nobody else's words."""
        blocks = self._blocks(messages, tools)
        fields = view.marker.fields
        owner: list[int | None] = [None] * len(blocks)
        for mark in view.marks:
            message = fields[mark.field].message
            mine = message >= 0 and messages[message]["role"] == "assistant"
            inside = [n for n, (start, end) in enumerate(blocks) if start <= mark.at <= end]
            strictly = [n for n in inside if blocks[n][0] < mark.at < blocks[n][1]]
            if (mine and not inside) or (not mine and strictly):
                what = "leaves out a part of" if mine else "covers"
                raise self._refuse(
                    f"has a {{% generation %}} block that {what} message {message + 1}", where, fix="mend the template"
                )
            if mine:
                owner[inside[0]] = message
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for n, block in enumerate(blocks):  # blocks without a word of the row: blank answers, in order
            if owner[n] is None:
                after = max((owner[m] or 0 for m in range(n) if owner[m] is not None), default=-1)
                owner[n] = next((i for i in turns if i > after and i not in owner), after if after >= 0 else None)
            if owner[n] is None:
                raise self._refuse(
                    "has a {% generation %} block outside of answers", where, f"{block}", "mend the template"
                )
        return [
            self._tagged_answer(view, i, [b for b, o in zip(blocks, owner, strict=True) if o == i], where)
            for i in turns
        ]

    def _tagged_answer(self, view: _View, i: int, blocks: list[tuple[int, int]], where: str) -> Answer:
        if not blocks:
            raise self._refuse(f"has no {{% generation %}} block for message {i + 1}", where, fix="mend the template")
        own = [mark.at for mark in view.marks if view.marker.fields[mark.field].message == i]
        found = [
            (at, -len(end), n)
            for n, (start, stop) in enumerate(blocks)
            for end in self.ends
            if (at := view.text.find(end, max([start, *own]), stop)) >= 0
        ]
        if not found:
            raise self._refuse(
                f"has a {{% generation %}} block without an end token, at message {i + 1}",
                where,
                f"the model would never learn to stop; end tokens: {', '.join(self.ends) or 'none'}",
                "move {% endgeneration %} behind the end token",
            )
        stop, size, n = min(found)
        # A block may open before the header of the answer, which the model is given: not learnt.
        marks = [k for k, mark in enumerate(view.marks) if view.marker.fields[mark.field].message == i]
        anchor, prompt = self._prompt(view, i, marks, where) if i else (None, "")
        begin = 0
        if anchor is not None:
            at = view.marks[anchor].at if anchor >= 0 else 0
            pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, view.text[at:], strict=False))
            shared = sum(1 for _ in pairs)
            begin = min([at + shared, *own])
        spans = [*(Span(*block) for block in blocks[:n]), Span(blocks[n][0], stop - size, stop)]
        return Answer(i, [Span(max(s.start, begin), s.end, s.stop) for s in spans if s.end > begin])

    # --- what the template can do -----------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Find the template's own end token, and whether it knows thinking and tools, by small conversations."""
        user: Message = {"role": "user", "content": "one"}
        answer: Message = {"role": "assistant", "content": "two"}
        call = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": {"at": "six"}}}
        schema = {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}
        tool = {"role": "tool", "name": "look", "tool_call_id": "call00001", "content": "five"}
        called = [user, {"role": "assistant", "content": "", "tool_calls": [call]}, tool, answer]
        self.reasoning = self._shows([user, {**answer, "reasoning_content": "three"}])
        self.tools = self._shows(called, [{"type": "function", "function": schema}])
        try:
            pair = [user, answer, {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]
            view = self._views(self.render(pair), pair, None, "")
        except DataError:
            return  # the rows will show what it wants
        self._find_end(view)
        self._check_prompt(view, pair)

    def _shows(self, messages: Messages, tools: Tools = None) -> bool:
        try:
            view = self._views(self.render(messages, tools), messages, tools, "")
        except DataError:
            return False
        return len(view.shown) == len(view.marker.fields)

    def _find_end(self, view: _View) -> None:
        """Where generation's end tokens do not end both answers, add the one token that does."""
        added = {token.content: id_ for id_, token in self.tokenizer.added_tokens_decoder.items()}
        tails = []
        for n, mark in enumerate(view.marks):
            if view.marker.fields[mark.field].message % 2 and mark.side == "e":
                tails.append(view.text[mark.at : view.marks[n + 1].at if n + 1 < len(view.marks) else None])
        if all(any(end in tail for end in self.ends) for tail in tails):
            return
        word = re.compile("|".join(re.escape(t) for t in sorted(added, key=len, reverse=True)) or "(?!)")
        first = {found[0] if (found := word.search(tail)) else "" for tail in tails}
        if len(first) == 1 and (end := first.pop()):
            self.ends[end] = added[end]
            self.end_ids |= {added[end]}

    def _check_prompt(self, view: _View, pair: Messages) -> None:
        """Refuse a template without a generation prompt whose answers have a header: nothing tells it from the answer."""
        prefix = pair[:1]
        if self.generation or (bare := self.render(prefix)) != self.render(prefix, generate=True):
            return
        rest = view.text[len(bare) : view.marks[2].at] if view.text.startswith(bare) else ""
        if any(token.content in rest for token in self.tokenizer.added_tokens_decoder.values()):
            raise self._refuse(
                "has no generation prompt",
                "data.template",
                f"the model would have to write {rest!r} itself",
                "add {% if add_generation_prompt %}...{% endif %} with the header of an answer to the template",
            )
