"""The loss mask of a rendered conversation: its supervised characters, for any chat template.

1. `rendering.py` marks where each text of the conversation stands.
2. An answer starts where generation would: what the rendering of the messages before it, with the
   generation prompt, has after its last text must stand at the same place of the conversation. What
   the template writes between there and the answer's text (an empty thinking block, a tool call's
   tag) is the model's to write: supervised.
3. An answer ends with the first end token after its last text (`answer_ends.py`). What follows is
   not supervised.

A template with {% generation %} says itself where answers are; the sentinels check it, and a prompt
is rendered only where a block opens before its answer's text. Whatever cannot be proven is refused
with a DataError, never guessed.
"""

import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from tunesmith.data.rows.samples import PICTURE_MARK
from tunesmith.data.text.align import CharSpan
from tunesmith.data.text.rendering import FIX_WITH_TAGS, Block, ChatRenderer, Rendering
from tunesmith.data.text.sentinels import Field, Messages, Tools
from tunesmith.data.text.template_args import names_of_arguments
from tunesmith.data.text.thoughts import missing_parts, open_thought
from tunesmith.errors import DataError

_OPEN_TAG = re.compile(r"[<\[][^<>\[\]]*\Z")
_FIX_DROPPED = (
    "remove it from the rows, or use a template that renders it: data.template=FILE.jinja"
)
_FIX_TEXT_AND_CALL = f"move the text to the answer's reasoning_content, or {_FIX_DROPPED}"
_FIX_TAGS = (
    "move the {% generation %} tags in the template: they must enclose each answer with its end"
    " token, and nothing else"
)


class RenderedAnswers(NamedTuple):
    """A rendered conversation with its answers.

    Attributes:
        spans: the supervised characters.
        missing: what the row has and these do not hold, by names of ROW_WARNINGS: `missing_parts`
            of answers; `earlier_thought`, one that the template leaves out because the conversation
            continues; `earlier_prompt`, an answer without what its prompt ends with, for the same
            reason; and `unlisted_tools`.
        digests, scaled: as of `Example`, once the placeholders of the pictures are in the text.
        placeholders: how many these are.
    """

    text: str
    spans: list[CharSpan]
    missing: frozenset[str] = frozenset()
    digests: tuple[int, ...] = ()
    scaled: int = 0
    placeholders: int = 0


def find_answers(
    chat: ChatRenderer,
    messages: Messages,
    tools: Tools = None,
    *,
    selected: Collection[int] | None = None,
) -> RenderedAnswers:
    """The rendered conversation, and the supervised spans of its answers.

    Args:
        selected: indices of the assistant messages that are supervised; None: all.

    Raises:
        DataError: the template drops a part of the conversation, or an answer cannot be located
            for certain.
    """
    if chat.tagged:
        text, blocks = chat.render_tagged(messages, tools)
    else:
        text = chat.render(messages, tools)
        blocks = []
    rendering = chat.locate(text, messages, tools, selected)
    _check_complete(chat, rendering, selected)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    tagged: list[list[CharSpan]] = []
    if chat.tagged:
        tagged = _tagged_answers(chat, rendering, blocks, answers)
    elif answers:
        # The end of the last answer shows only where another turn follows.
        rendering = _with_next_turn(chat, rendering, answers[-1])
    spans = []
    missing = set()
    for n, i in enumerate(answers):
        if selected is not None and i not in selected:
            continue
        is_last = i == answers[-1]
        if chat.tagged:
            own_spans = _without_header(chat, rendering, i, tagged[n])
        else:
            rendering, span, is_after_prompt = _answer(chat, rendering, i, is_last)
            own_spans = [span]
            if not is_after_prompt:
                missing.add("earlier_prompt")
        spans += own_spans
        supervised = "".join(rendering.text[span.start : span.end] for span in own_spans)
        for part in missing_parts(messages[i], supervised):
            is_earlier = part == "lost_thought" and chat.traits.reasoning and not is_last
            missing.add("earlier_thought" if is_earlier else part)
    if "earlier_thought" in missing:
        # It says the same, and more.
        missing.discard("earlier_prompt")
    if tools and not chat.traits.lists_tools and not rendering.shows("tools"):
        missing.add("unlisted_tools")
    return RenderedAnswers(rendering.text, spans, frozenset(missing))


def _with_next_turn(chat: ChatRenderer, rendering: Rendering, i: int) -> Rendering:
    """The rendering; where message i, the last answer, lacks an end, with the next turn's."""
    is_call = bool(rendering.messages[i].get("tool_calls"))
    next_turn = chat.ends.next_turn.get(is_call)
    place = rendering.place(len(rendering.sentinels) - 1)
    if next_turn is None or chat.ends.search(rendering.text, place):
        return rendering
    return rendering._replace(text=rendering.text + next_turn)


def _check_complete(
    chat: ChatRenderer, rendering: Rendering, trained: Collection[int] | None
) -> None:
    """DataError for a template that drops words, and for words that hide where they end."""
    # A message without sentinels must show its text as it is.
    for i, plain in enumerate(rendering.messages):
        content = plain["content"]
        is_marked = rendering.inserted.only is None or i in rendering.inserted.only
        texts = content.split(PICTURE_MARK) if chat.with_pictures else [content]
        if not is_marked and any(text.strip() not in rendering.text for text in texts):
            raise _dropped(chat, Field(i, "content", content), rendering)
        # A template may write all system messages first. Earlier answers would have later ones in
        # their prompts.
        is_late = i > 0 and plain["role"] == "system"
        if is_late and rendering.of_message(i - 1) > rendering.of_message(i) > []:
            raise chat.error(
                f"moves message {i + 1} (system) in front of earlier messages",
                "an earlier answer would be trained with it in its prompt",
                "write it into the next message of the user, or split the row before it",
            )
    # Two sentinels of a text tell its beginning and its end.
    sentinels_of = Counter(sentinel.field for sentinel in rendering.sentinels)
    for n, field in enumerate(rendering.inserted.fields):
        message = f"message {field.message + 1}"
        if n not in rendering.shown and not chat.may_drop(field, trained):
            raise _dropped(chat, field, rendering)
        is_open = n in rendering.shown and sentinels_of[n] < 2
        if is_open and chat.has_end(field.text):
            what = f"rewrites {message}, whose text contains an end token"
            raise chat.error(what, "the end of the message is ambiguous")


def _dropped(chat: ChatRenderer, field: Field, rendering: Rendering) -> DataError:
    """The error for a template that leaves out a text."""
    message = f"message {field.message + 1}"
    dropped = "the tools" if field.kind == "tools" else f"the {field.kind} of {message}"
    fix = _FIX_DROPPED
    if field.kind == "content":
        turn = rendering.messages[field.message]
        dropped = f"{message} ({turn['role']})"
        if turn.get("tool_calls"):
            dropped = f"the text before the call of {message}"
            fix = _FIX_TEXT_AND_CALL
    elif field.kind == "reasoning_content":
        fix = (
            'write it in front of the answer: "<think>\\n...\\n</think>\\n\\n..."; or use a'
            " template that renders it: data.template=FILE.jinja"
        )
    elif field.kind == "tool_calls":
        fix = (
            "write the call in the answer's content as the model's documentation shows it, and"
            " remove tool_calls; or use a template that writes calls: data.template=FILE.jinja"
        )
    why = "the model would train on an incomplete conversation"
    return chat.error(f"drops {dropped}", why, fix)


def _answer(
    chat: ChatRenderer, rendering: Rendering, i: int, is_last: bool
) -> tuple[Rendering, CharSpan, bool]:
    """The span of message i: from the end of the generation prompt through the end token.

    The rendering comes back with what the generation prompt holds and the row lacks. The last
    value says whether the answer stands after all of its prompt.
    """
    anchor, prompt = chat.prompt(rendering, i)
    if anchor is None:
        raise chat.error(f"moves the text before message {i + 1}, an answer")
    prompt_at = rendering.place(anchor)
    if is_last and not rendering.text.startswith(prompt, prompt_at):
        rendering = _with_prompt(chat, rendering, i, prompt_at, prompt)
    text = rendering.text
    indices = rendering.of_message(i)
    start = _start_of_answer(chat, rendering, i, prompt_at, prompt, is_last)
    if indices:
        last_sentinel = indices[-1]
        # Texts of another message between those of the answer: no span can hold the answer
        # alone.
        is_contiguous = last_sentinel - indices[0] + 1 == len(indices)
        kinds = " ".join(rendering.field(rendering.sentinels[n]).kind for n in indices)
        if "content" in kinds.partition("tool_calls")[2]:
            raise chat.error(
                f"moves the text before the call of message {i + 1}, an answer",
                "it writes the text after the call, or after the result of the call",
                _FIX_TEXT_AND_CALL,
            )
        if start > rendering.place(indices[0]) or not is_contiguous:
            raise chat.error(f"mixes message {i + 1}, an answer, with other text")
        texts_end = max(start, rendering.place(last_sentinel))
    else:
        last_sentinel = anchor
        texts_end = start
    # The end token stands before the next text of the conversation.
    limit = len(text)
    if last_sentinel + 1 < len(rendering.sentinels):
        limit = rendering.place(last_sentinel + 1)
    # The end token of an answer must come before the next message.
    end = chat.ends.search(text, texts_end, limit, is_last=is_last)
    if end is None:
        fix = (
            "use a template that ends answers: data.template=FILE.jinja;"
            " or add its end token: model.added_tokens"
        )
        what = f"writes no end token after message {i + 1}, an answer"
        raise chat.error(what, _no_end(chat), fix)
    return rendering, _through(chat, start, end), start == prompt_at + len(prompt)


def _with_prompt(
    chat: ChatRenderer, rendering: Rendering, i: int, prompt_at: int, prompt: str
) -> Rendering:
    """The rendering with what the generation prompt has before message i, and the row lacks.

    Gemma 4's prompt has an empty thought where thinking is off, and its model answers after it.
    DeepSeek R1's opens a thought, and its template leaves thoughts out of rows: the row's is
    written there. Nemotron 3's opens a thought with a line break, and its template writes the tags
    of an empty thought in a row without one: the break is written between them. A row without any
    thought has nothing to close it with, and stays as it is.
    """
    at = chat.thought_in_prompt(rendering, i, prompt_at, prompt)
    indices = rendering.of_message(i)
    if at is None:
        return rendering
    added = prompt[at:]
    has_thought = "reasoning_content" in rendering.messages[i]
    tags = open_thought(added)
    begin = end = prompt_at + at
    empty = None
    if tags is not None and not has_thought:
        empty = re.compile(r"{}\s*(?={})".format(*map(re.escape, tags))).match(
            rendering.text, begin
        )
    if empty is not None:
        end = empty.end()
    elif has_thought and chat.traits.writes_thoughts and tags is not None:
        added += f"{rendering.inserted.thought_of(i).strip()}\n{tags[1]}\n\n"
    elif has_thought or tags is not None:
        return rendering
    split = indices[0] if indices else len(rendering.sentinels)
    sentinels = rendering.sentinels[:split]
    for sentinel in rendering.sentinels[split:]:
        sentinels.append(sentinel._replace(at=sentinel.at + len(added) - (end - begin)))
    text = rendering.text[:begin] + added + rendering.text[end:]
    return rendering._replace(text=text, sentinels=sentinels)


def _start_of_answer(
    chat: ChatRenderer,
    rendering: Rendering,
    i: int,
    prompt_at: int,
    prompt: str,
    is_last: bool,
) -> int:
    """Find the start of an answer after its generation prompt, which must be at `prompt_at`."""
    text = rendering.text
    if text.startswith(prompt, prompt_at):
        return prompt_at + len(prompt)
    # Qwen3.5 and DeepSeek R1 open thinking in the generation prompt and leave it out of earlier
    # turns.
    if not is_last:
        header = chat.header(rendering, i, prompt_at)
        if header and prompt.startswith(header):
            return prompt_at + len(header)
        thought_at = chat.thought_in_prompt(rendering, i, prompt_at, prompt)
        if thought_at is not None:
            # Nemotron's rows have the tag, and close it at once.
            common = _common_prefix(prompt, text[prompt_at:])
            return prompt_at + max(thought_at, min(common, len(header or "")))
    row = text[prompt_at : prompt_at + 40]
    raise chat.error(
        f"writes before message {i + 1}, an answer, something other than its generation prompt",
        f"the prompt in use ends with {prompt[-40:]!r}, the row continues with {row!r}",
        _fix_prompt(chat, prompt, is_last),
    )


def _fix_prompt(chat: ChatRenderer, prompt: str, is_last: bool) -> str:
    """The ways on where rows and prompts differ; many templates switch thinking in prompts."""
    fix = FIX_WITH_TAGS
    tags = open_thought(prompt)
    if tags is not None:
        empty = f"{tags[0]}\\n\\n{tags[1]}\\n\\n..."
        fix = f'give the answer a thought, or an empty one: "{empty}"; or {fix}'
    names = names_of_arguments(chat.jinja, chat.tokenizer.special_tokens_map)
    if names:
        fix = f"set what the template takes in data.template_args ({', '.join(names)}); or {fix}"
    # Earlier turns are then history, as the prompt in use has them.
    return fix if is_last else f"data.train_on=last; or {fix}"


def _through(chat: ChatRenderer, start: int, end: re.Match[str]) -> CharSpan:
    """An answer's last characters with the end token; up to it, where generation goes on."""
    if end[0] in chat.ends.earlier:
        return CharSpan(start, end.start())
    return CharSpan(start, end.end(), end.start())


def _no_end(chat: ChatRenderer) -> str:
    end_tokens = ", ".join(chat.ends.stops) or "none"
    return f"the model would never learn to stop; end tokens: {end_tokens}"


def _tagged_answers(
    chat: ChatRenderer, rendering: Rendering, blocks: list[Block], answers: list[int]
) -> list[list[CharSpan]]:
    """Return the spans of each answer: its {% generation %} blocks up to the end token in the last.

    They must hold all of each answer and no other message's text.
    """
    spans_of: list[list[CharSpan]] = []
    spans: list[CharSpan] = []
    for start, stop in blocks:
        is_last = len(spans_of) == len(answers) - 1
        ends = [*chat.ends.pattern(is_last=is_last).finditer(rendering.text, start, stop)]
        if not ends:
            spans.append(CharSpan(start, stop))
            continue
        # A text may hold an end token; the template writes its own after the texts.
        spans_of.append([*spans, _through(chat, start, ends[-1])])
        spans = []
    if len(spans_of) != len(answers) or spans:
        what = f"encloses {len(spans_of)} of {len(answers)} answers in {{% generation %}} blocks"
        raise chat.error(what, _no_end(chat), _FIX_TAGS)
    for sentinel in rendering.sentinels:
        i = rendering.field(sentinel).message
        # Borders count: an empty answer has its sentinel on one.
        is_held = i not in answers or any(
            span.start <= sentinel.at <= span.end for span in spans_of[answers.index(i)]
        )
        is_foreign = i not in answers and any(
            span.start < sentinel.at < span.end for spans in spans_of for span in spans
        )
        if is_foreign or not is_held:
            verb = "covers" if is_foreign else "leaves out a part of"
            what = f"has a {{% generation %}} block that {verb} message {i + 1}"
            raise chat.error(what, fix=_FIX_TAGS)
    return spans_of


def _without_header(
    chat: ChatRenderer, rendering: Rendering, i: int, spans: list[CharSpan]
) -> list[CharSpan]:
    """Leave out what the generation prompt holds already: a block may open before the header."""
    texts = [rendering.place(n) for n in rendering.of_message(i)]
    if i == 0 or spans[0].start in texts:
        return spans
    anchor, prompt = chat.prompt(rendering, i)
    if anchor is None:
        return spans
    prompt_at = rendering.place(anchor)
    common = _common_prefix(prompt, rendering.text[prompt_at:])
    begin = min([prompt_at + common, *texts])
    return [span._replace(start=max(span.start, begin)) for span in spans if span.end > begin]


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
