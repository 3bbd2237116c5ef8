"""Which characters of a rendered conversation are supervised, for any chat template.

A template may strip thinking from earlier turns (Qwen3), trim texts (Llama 3, Gemma), move the system message into a
user's turn (Llama 2), or drop what it does not know. So no search for a text can tell the template's words from the
user's. Sentinels can:

1. Render the conversation, and again with every text in it (contents, thinking, names and arguments of calls, names of
   tools) between two sentinels. Without the sentinels both renderings must be equal; then they say where each text is,
   and everything outside a pair of them is the template's own.
2. An answer starts where generation would: what the rendering of the messages before it, with the generation prompt,
   has after its last text must stand at the same place of the conversation. What the template writes between there and
   the answer's text (an empty thinking block, a tool call's tag) is the model's to write: supervised.
3. An answer ends with the first end token after its last text. What follows is not supervised.

A template with {% generation %} says itself where answers are; the sentinels check it, and a prompt is rendered only
where a block opens before its answer's text. Whatever cannot be proven is refused with a DataError, never guessed.
"""

import itertools
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from jinja2 import TemplateError

from tunesmith.data.align import CharSpan
from tunesmith.data.sentinels import POSITIONS, Field, Message, Messages, Sentinel, Sentinels, Tools
from tunesmith.errors import DataError, first_line

# What a template may end in; the last two where it calls itself, or writes a text beyond all bounds.
RENDER_ERRORS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FIX = "add {% generation %} tags around the answers in the template: data.template=FILE.jinja"
_FIX_TAGS = "move the {% generation %} tags in the template: all of each answer with its end token, and nothing else"


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches any of some texts; of several at one place, the longest."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")


class _Rendering(NamedTuple):
    """A rendered conversation and the sentinels found in it. messages, tools: with sentinels; shown: fields found with
    sentinels at any position."""

    text: str
    found: list[Sentinel]
    sentinels: Sentinels
    messages: list[Message]
    tools: Tools
    shown: frozenset[int]

    def field(self, sentinel: Sentinel) -> Field:
        return self.sentinels.fields[sentinel.field]

    def of_message(self, i: int) -> list[int]:
        """Indices into `found` of the sentinels of one message."""
        return [n for n, sentinel in enumerate(self.found) if self.field(sentinel).message == i]


class AssistantMask:
    """Renders conversations with one chat template and finds their answers.

    Args:
        jinja, name: the template, and what errors call it.
        eos_ids: ids at which generation stops.

    Attributes:
        tagged: whether the template has {% generation %} blocks.
        end_tokens: text and id of each token that may end an answer: those of `eos_ids`, and the template's own.
        reasoning, tools: whether the template shows thinking and tool calls.
    """

    def __init__(self, tokenizer: Any, jinja: str, name: str, eos_ids: Collection[int]) -> None:
        self.tokenizer, self.jinja, self.name = tokenizer, jinja, name
        self.tagged = bool(_GENERATION.search(jinja))
        self.reasoning = self.tools = False  # so that the probe tries every position
        self.end_ids = frozenset(eos_ids)
        self.end_tokens = {text: id_ for id_ in sorted(eos_ids) if (text := tokenizer.decode([id_]))}
        self._probe()

    def render(self, messages: Messages, tools: Tools = None, *, generate: bool = False, where: str = "") -> str:
        """The text of a conversation, or DataError; `generate` adds the generation prompt."""
        with self._render_errors(where):
            return self.tokenizer.apply_chat_template(
                list(messages), tools, chat_template=self.jinja, add_generation_prompt=generate, tokenize=False
            )

    def _render_tagged(self, messages: Messages, tools: Tools, where: str) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the spans of characters that its {% generation %} blocks wrote."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # As in apply_chat_template, which returns these spans as tokens only, straddling ones included.
        bare = [{key: value for key, value in message.items() if value is not None} for message in messages]
        with self._render_errors(where):
            texts, blocks = render_jinja_template(
                [bare], tools, None, self.jinja, return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map
            )
        return texts[0], [(start, end) for start, end in blocks[0] if end > start]

    @contextmanager
    def _render_errors(self, where: str) -> Iterator[None]:
        try:
            yield
        except RENDER_ERRORS as error:
            why = first_line(error) or type(error).__name__
            fix = "fix the row, or give a template that takes it: data.template=FILE.jinja"
            raise self._error("cannot render this conversation", where, why, fix) from error

    def _error(self, what: str, where: str, why: str = "", fix: str = _FIX) -> DataError:
        return DataError(f"{self.name} {what}", where=where, why=why, fix=fix)

    def _locate_texts(self, text: str, messages: Messages, tools: Tools, where: str) -> _Rendering:
        """Find the texts of a conversation in its rendering, by the first position of sentinels that keeps it equal.

        Further positions are tried while a text is not found that the template must show or that holds an end token.
        """
        word = next(w for n in itertools.count() if (w := f"zq{n}W") not in text and w not in repr((messages, tools)))
        best: _Rendering | None = None
        shown: set[int] = set()
        for position in POSITIONS:
            sentinels = Sentinels(word, position)
            marked, marked_tools = sentinels.insert(messages, tools)
            plain, found = sentinels.strip(self.render(marked, marked_tools, where=where))
            if plain != text:
                continue
            shown |= {sentinel.field for sentinel in found}
            best = best or _Rendering(text, found, sentinels, marked, marked_tools, frozenset())
            missing = (field for n, field in enumerate(sentinels.fields) if n not in shown)
            if all(self._may_drop(field) and not self._end_token(field.text) for field in missing):
                break
        if best is None:
            what = "renders differently depending on the message text, so assistant spans cannot be located"
            raise self._error(what, where)
        return best._replace(shown=frozenset(shown))

    def _may_drop(self, field: Field) -> bool:
        return field.kind == "reasoning_content" and self.reasoning

    def answers(
        self, messages: Messages, tools: Tools = None, *, wanted: Collection[int] | None = None, where: str = ""
    ) -> tuple[str, list[CharSpan]]:
        """The rendered conversation, and the supervised spans of its assistant messages in `wanted` (None: of all).

        DataError if the template drops a part of the conversation, or an answer cannot be located for certain.
        """
        if self.tagged:
            text, blocks = self._render_tagged(messages, tools, where)
        else:
            text, blocks = self.render(messages, tools, where=where), []
        view = self._locate_texts(text, messages, tools, where)
        self._check_complete(view, where)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        own = self._blocks_of_answers(view, blocks, turns, where) if self.tagged else {}
        spans = []
        for i in (i for i in turns if wanted is None or i in wanted):
            last = i == turns[-1]
            spans += self._tagged_answer(view, i, own[i], where) if own else [self._answer(view, i, last, where)]
        return text, spans

    def _check_complete(self, view: _Rendering, where: str) -> None:
        """Refuse a template that drops words of the conversation, and words that hide where their text ends."""
        sides = Counter(sentinel.field for sentinel in view.found)
        for n, field in enumerate(view.sentinels.fields):
            whose = f"message {field.message + 1}"
            if n not in view.shown and not self._may_drop(field):
                shown_as = {"tools": "the tools", "content": f"{whose} ({view.messages[field.message]['role']})"}
                whose = shown_as.get(field.kind, f"the {field.kind} of {whose}")
                fix = "remove it from the rows, or give a template that shows it: data.template=FILE.jinja"
                raise self._error(f"drops {whose}", where, "the model would train on half a conversation", fix)
            if n in view.shown and sides[n] < 2 and self._end_token(field.text):
                what = f"rewrites {whose}, whose text holds an end token"
                raise self._error(what, where, "the end of the message cannot be told")
        if any(map(self._end_token, view.sentinels.argument_names)):
            why = "the end of the call cannot be told"
            raise self._error("writes a call whose argument is named with an end token", where, why)

    def _answer(self, view: _Rendering, i: int, last: bool, where: str) -> CharSpan:
        """The span of message i: from the end of the generation prompt through the end token."""
        found, own = view.found, view.of_message(i)
        anchor, prompt = self._prompt(view, i, own, where)
        if anchor is None:
            raise self._error(f"moves the text before message {i + 1}, an answer", where)
        at = found[anchor].at if anchor >= 0 else 0
        start = at + len(prompt)
        if not view.text.startswith(prompt, at):
            opened = own and found[own[0]].side == "b" and view.sentinels.position == "both"
            header = view.text[at : found[own[0]].at] if opened else ""
            # Qwen3.5 and DeepSeek R1 open thinking in the generation prompt and leave it out of earlier turns.
            if last or not header or not prompt.startswith(header):
                row = view.text[at : at + 40]
                why = f"the prompt in use ends with {prompt[-40:]!r}, the row continues with {row!r}"
                what = f"writes before message {i + 1}, an answer, something other than its generation prompt"
                raise self._error(what, where, why)
            start = at + len(header)
        final = own[-1] if own else anchor
        if own and (start > found[own[0]].at or len(own) != final - own[0] + 1):
            raise self._error(f"mixes message {i + 1}, an answer, with other text", where)
        limit = found[final + 1].at if final + 1 < len(found) else len(view.text)
        end = self._end_token(view.text, max(start, found[final].at if own else start), limit)
        if end is None:
            fix = "give a template that ends answers: data.template=FILE.jinja; or add its token: model.added_tokens"
            raise self._error(f"writes no end token after message {i + 1}, an answer", where, self._no_end(), fix)
        return CharSpan(start, end.end(), end.start())

    def _prompt(self, view: _Rendering, i: int, own: list[int], where: str) -> tuple[int | None, str]:
        """What the model is given before message i, after the last text of the prompt.

        Returns:
            The index of the sentinel that closes that text (-1: the prompt holds none; None: in the conversation it is
            not the one before the answer), and what the prompt holds from there on.
        """
        if i == 0:
            raise self._error("cannot tell an answer that opens the conversation", where, "no prompt stands before it")
        rendered = self.render(view.messages[:i], view.tools, generate=True, where=where)
        rendered, before = view.sentinels.strip(rendered)
        key = before[-1][:2] if before else None
        candidates = [own[0] - 1] if own else range(-1, len(view.found))
        anchors = [n for n in candidates if (view.found[n][:2] if n >= 0 else None) == key]
        return (anchors[0] if len(anchors) == 1 else None), rendered[before[-1].at if before else 0 :]

    def _end_token(self, text: str, begin: int = 0, limit: int = sys.maxsize) -> re.Match[str] | None:
        """The first end token in text[begin:limit]; of several at one place, the longest."""
        return _any_of(self.end_tokens).search(text, begin, limit)

    def _no_end(self) -> str:
        return f"the model would never learn to stop; end tokens: {', '.join(self.end_tokens) or 'none'}"

    def _blocks_of_answers(
        self, view: _Rendering, blocks: list[tuple[int, int]], turns: list[int], where: str
    ) -> dict[int, list[tuple[int, int]]]:
        """The blocks of each assistant message: they hold all of each answer and nobody else's text."""
        owners: list[int | None] = [None] * len(blocks)
        for sentinel in view.found:
            i, at = view.field(sentinel).message, sentinel.at
            inside = [n for n, (start, end) in enumerate(blocks) if start <= at <= end]
            strictly = any(blocks[n][0] < at < blocks[n][1] for n in inside)
            if (i in turns and not inside) or (i not in turns and strictly):
                what = "leaves out a part of" if i in turns else "covers"
                raise self._error(f"has a {{% generation %}} block that {what} message {i + 1}", where, fix=_FIX_TAGS)
            if i in turns:
                owners[inside[0]] = i
        for n, block in enumerate(blocks):  # a block without a text of the row is a blank answer: they come in order
            if owners[n] is None:
                after = max((owner for owner in owners[:n] if owner is not None), default=-1)
                owners[n] = next((i for i in turns if i > after and i not in owners), after if after >= 0 else None)
            if owners[n] is None:
                what = "has a {% generation %} block outside of answers"
                raise self._error(what, where, f"characters {block}", _FIX_TAGS)
        return {i: [block for block, owner in zip(blocks, owners, strict=True) if owner == i] for i in turns}

    def _tagged_answer(self, view: _Rendering, i: int, blocks: list[tuple[int, int]], where: str) -> list[CharSpan]:
        if not blocks:
            raise self._error(f"has no {{% generation %}} block for message {i + 1}", where, fix=_FIX_TAGS)
        own = view.of_message(i)
        texts = [view.found[n].at for n in own]
        ends = (self._end_token(view.text, max([start, *texts]), stop) for start, stop in blocks)
        n, end = next(((n, end) for n, end in enumerate(ends) if end), (0, None))
        if end is None:
            what = f"has a {{% generation %}} block without an end token, at message {i + 1}"
            raise self._error(what, where, self._no_end(), "move {% endgeneration %} behind the end token")
        begin = 0
        if i and not (texts and blocks[0][0] >= min(texts)):
            # The block may open before the answer's header, which the generation prompt holds: not supervised.
            anchor, prompt = self._prompt(view, i, own, where)
            if anchor is not None:
                at = view.found[anchor].at if anchor >= 0 else 0
                same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, view.text[at:], strict=False))
                begin = min([at + sum(1 for _ in same), *texts])
        spans = [*(CharSpan(*block) for block in blocks[:n]), CharSpan(blocks[n][0], end.end(), end.start())]
        return [CharSpan(max(s.start, begin), s.end, s.stop) for s in spans if s.end > begin]

    def _probe(self) -> None:
        """Once per template: find its own end token, and whether it shows thinking and tools, on small conversations."""
        user: Message = {"role": "user", "content": "one"}
        answer: Message = {"role": "assistant", "content": "two"}
        call = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": {"at": "six"}}}
        schema = {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}
        result = {"role": "tool", "name": "look", "tool_call_id": "call00001", "content": "five"}
        called = [user, {"role": "assistant", "content": "", "tool_calls": [call]}, result, answer]
        pair = [user, answer, {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]

        def rendering(messages: Messages, tools: Tools = None) -> _Rendering | None:
            try:
                return self._locate_texts(self.render(messages, tools), messages, tools, "")
            except DataError:
                return None  # the rows will show what it takes

        def complete(view: _Rendering | None) -> bool:
            return view is not None and len(view.shown) == len(view.sentinels.fields)

        if (view := rendering([user, answer])) and not complete(view):
            field = next(field for n, field in enumerate(view.sentinels.fields) if n not in view.shown)
            what, why = f"drops the {('question', 'answer')[field.message]}", f"it renders as {view.text[:60]!r}"
            fix = "name a template that writes it: data.template=FILE.jinja"
            raise self._error(what, "data.template", why, fix)
        self.reasoning = complete(rendering([user, {**answer, "reasoning_content": "three"}]))
        self.tools = complete(rendering(called, [{"type": "function", "function": schema}]))
        if view := rendering(pair):
            self._find_end(view)
            self._check_generation_prompt(view, pair)

    def _find_end(self, view: _Rendering) -> None:
        """Where generation's end tokens do not end both answers, add the one token that does."""
        added = {token.content: id_ for id_, token in self.tokenizer.added_tokens_decoder.items()}
        after = [*(sentinel.at for sentinel in view.found[1:]), len(view.text)]
        tails = [
            view.text[sentinel.at : end]
            for sentinel, end in zip(view.found, after, strict=False)
            if view.field(sentinel).message % 2 and sentinel.side == "e"
        ]
        first = {match[0] if (match := _any_of(added).search(tail)) else "" for tail in tails}
        if not all(map(self._end_token, tails)) and len(first) == 1 and (end := first.pop()):
            self.end_tokens[end] = added[end]
            self.end_ids |= {added[end]}

    def _check_generation_prompt(self, view: _Rendering, pair: Messages) -> None:
        """Refuse a template without a generation prompt whose answers have a header: nothing tells it from the answer."""
        own = view.of_message(1)
        if self.tagged or not own or (bare := self.render(pair[:1])) != self.render(pair[:1], generate=True):
            return
        header = view.text[len(bare) : view.found[own[0]].at] if view.text.startswith(bare) else ""
        if any(token.content in header for token in self.tokenizer.added_tokens_decoder.values()):
            fix = "add {% if add_generation_prompt %}...{% endif %} with the header of an answer to the template"
            why = f"the model would have to write {header!r} itself"
            raise self._error("has no generation prompt", "data.template", why, fix)
