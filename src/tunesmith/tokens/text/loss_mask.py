"""Computation of the supervised characters of a rendered conversation, for any chat template.

1. `rendering.py` finds the position of each message's text in the rendered conversation.

2. The start of an answer is the position at which generation would start. To find it, the messages
before the answer are rendered with the generation prompt. The part of this rendering after its last
text must be at the same position of the conversation. Text that the template writes between this
part and the answer (an empty thinking block, the tag of a tool call) is supervised, because the
model must generate it.

3. An answer ends with the first end token after its last text (`answer_ends.py`). The text after
the end token is not supervised.

A template with {% generation %} blocks marks the answers itself. In this case, the sentinels
(`sentinels.py`) are only used to check the blocks, and the generation prompt is rendered only if a
block opens before the text of its answer. DataError is raised if a span cannot be located with
certainty.
"""

import itertools
import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from tunesmith.errors import DataError
from tunesmith.rows.samples import PICTURE_MARK
from tunesmith.tokens.text.align import CharSpan
from tunesmith.tokens.text.rendering import FIX_WITH_TAGS, Block, ChatRenderer, Rendering
from tunesmith.tokens.text.sentinels import Field, Messages, Tools
from tunesmith.tokens.text.thought_style import parse_block
from tunesmith.tokens.text.thoughts import missing_parts
from tunesmith.tokens.text.working_fix import working_fix

_OPEN_TAG = re.compile(r"[<\[][^<>\[\]]*\Z")
_FIX_DROPPED = (
    "remove it from the rows, or use a template that renders it: data.template=FILE.jinja"
)
# Fixes that are replaced by a fix that was tried, if there is one.
_GENERAL_FIXES = (_FIX_DROPPED, FIX_WITH_TAGS)
_FIX_TEXT_AND_CALL = f"move the text to the answer's reasoning_content, or {_FIX_DROPPED}"
_FIX_TAGS = (
    "move the {% generation %} tags in the template: they must enclose each answer with its end"
    " token, and nothing else"
)


class RenderedAnswers(NamedTuple):
    """A rendered conversation with the spans of its answers.

    Attributes:
        spans: the supervised characters.
        missing: parts of the row that the spans do not contain, as names in ROW_WARNINGS. They are
            the result of `missing_parts` for each answer, `unlisted_tools`, and two parts that
            templates leave out of answers before the last turn: `earlier_thought` (the thought) and
            `earlier_prompt` (the end of the generation prompt).
    """

    text: str
    spans: list[CharSpan]
    missing: frozenset[str] = frozenset()


def find_answers(
    chat: ChatRenderer,
    messages: Messages,
    tools: Tools,
    *,
    selected: Collection[int],
) -> RenderedAnswers:
    """Render a conversation and find the supervised spans of its answers.

    Args:
        selected: indices of the messages whose answers are supervised.

    Raises:
        DataError: the template drops a part of the conversation, or the position of an answer is
            ambiguous.
    """
    try:
        return _find_answers(chat, messages, tools, selected)
    except DataError as error:
        fix = working_fix(chat, messages, tools, selected, _find_answers, error.what)
        if fix and error.fix not in _GENERAL_FIXES:
            fix = f"{fix}; or {error.fix}"
        error.fix = fix or error.fix
        raise


def _find_answers(
    chat: ChatRenderer, messages: Messages, tools: Tools, selected: Collection[int]
) -> RenderedAnswers:
    messages = chat.in_form(messages)
    blocks: list[Block] = []
    if chat.tagged:
        text, blocks = chat.render_tagged(messages, tools)
    else:
        text = chat.render(messages, tools)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    selected = set(answers).intersection(selected)
    rendering = chat.locate(text, messages, tools, selected)
    _check_complete(chat, rendering, selected)
    tagged = {}
    if chat.tagged:
        tagged = _tagged_answers(chat, rendering, blocks, answers)
    elif answers:
        rendering = _append_next_turn(chat, rendering, answers[-1])
    spans = []
    missing = set()
    for i in answers:
        if i not in selected:
            continue
        is_last = i == answers[-1]
        if chat.tagged:
            own_spans = _without_header(chat, rendering, i, tagged[i])
        else:
            rendering, span, is_after_prompt = _find_answer(chat, rendering, i, is_last)
            own_spans = [span]
            if not is_after_prompt:
                missing.add("earlier_prompt")
        spans += own_spans
        supervised = "".join(rendering.text[span.start : span.end] for span in own_spans)
        for part in missing_parts(messages[i], supervised):
            is_earlier = part == "lost_thought" and chat.traits.reasoning and not is_last
            missing.add("earlier_thought" if is_earlier else part)
    if "earlier_thought" in missing:
        # Remove "earlier_prompt", because the warning "earlier_thought" also covers the missing end
        # of the prompt.
        missing.discard("earlier_prompt")
    if tools and not chat.traits.lists_tools and not rendering.shows("tools"):
        missing.add("unlisted_tools")
    return RenderedAnswers(rendering.text, spans, frozenset(missing))


def _append_next_turn(chat: ChatRenderer, rendering: Rendering, i: int) -> Rendering:
    """Append the first token of the next turn if message i, the last answer, has no end token.

    Some templates write no end token, so that an answer ends with the first token of the next turn.
    """
    is_call = bool(rendering.messages[i].get("tool_calls"))
    if chat.ends.search(rendering.text, rendering.place(len(rendering.sentinels) - 1)):
        return rendering
    return rendering._replace(text=rendering.text + chat.ends.next_turn.get(is_call, ""))


def _check_complete(chat: ChatRenderer, rendering: Rendering, trained: Collection[int]) -> None:
    """Raise DataError if the template drops a text, or if the end of a text is ambiguous."""
    only = rendering.inserted.only
    for i, plain in enumerate(rendering.messages):
        content = plain["content"]
        if only is not None and i not in only:
            # If sentinels were inserted only into some messages, check that the texts of the
            # messages without sentinels are rendered unchanged.
            texts = content.split(PICTURE_MARK) if chat.with_pictures else [content]
            if any(text.strip() not in rendering.text for text in texts):
                raise _dropped(chat, Field(i, "content", content), rendering)
        if i == 0 or plain["role"] != "system":
            continue
        # Some templates write all system messages at the start. In this case, the prompt of an
        # earlier answer would contain a later system message.
        indices = rendering.sentinels_of_message(i)
        if indices and rendering.sentinels_of_message(i - 1) > indices:
            raise chat.error(
                f"moves message {i + 1} (system) in front of earlier messages",
                "the prompt of an earlier answer would contain this message",
                "write the text of this message into the next message of the user, or split the "
                "row before this message",
            )
    # The beginning and the end of a text are known only if both of its sentinels are rendered.
    sentinel_counts = Counter(sentinel.field for sentinel in rendering.sentinels)
    for n, field in enumerate(rendering.inserted.fields):
        if n not in rendering.shown and not chat.may_drop(field, trained):
            raise _dropped(chat, field, rendering)
        is_open = n in rendering.shown and sentinel_counts[n] < 2
        if is_open and chat.has_end(field.text):
            raise chat.error(
                f"rewrites message {field.message + 1}, whose text contains an end token",
                "the end of the message is ambiguous",
            )


def _dropped(chat: ChatRenderer, field: Field, rendering: Rendering) -> DataError:
    """Build the error for a template that does not render one text of the conversation."""
    kind = field.kind
    message = f"message {field.message + 1}"
    dropped = f"the {kind} of {message}"
    fix = _FIX_DROPPED
    if kind == "tools":
        dropped = "the tools"
    elif kind == "content":
        turn = rendering.messages[field.message]
        dropped = f"{message} ({turn['role']})"
        if turn.get("tool_calls"):
            dropped = f"the text before the call of {message}"
            fix = _FIX_TEXT_AND_CALL
    elif kind == "reasoning_content":
        fix = _FIX_DROPPED
    elif kind == "tool_calls":
        fix = (
            "write the call in the answer's content as the model's documentation shows it, and"
            " remove tool_calls; or use a template that writes calls: data.template=FILE.jinja"
        )
    return chat.error(
        f"drops {dropped}", "the model would train on an incomplete conversation", fix
    )


def _find_answer(
    chat: ChatRenderer, rendering: Rendering, i: int, is_last: bool
) -> tuple[Rendering, CharSpan, bool]:
    """Find the span of message i: from the end of the generation prompt through the end token.

    If the row lacks a part of the generation prompt, this part is added to the returned rendering.
    The last returned value is True if the answer follows the entire generation prompt.
    """
    answer = f"message {i + 1}, an answer"
    anchor, prompt = chat.prompt(rendering, i)
    if anchor is None:
        raise chat.error(f"moves the text before {answer}")
    prompt_at = rendering.place(anchor)
    if is_last:
        rendering = _after_prompt(chat, rendering, i, prompt_at, prompt)
    text = rendering.text
    indices = rendering.sentinels_of_message(i)
    start = _start_of_answer(chat, rendering, i, prompt_at, prompt, is_last)
    if indices:
        last_sentinel = indices[-1]
        # Texts of another message may be between the texts of the answer. In this case, no span
        # contains only the answer.
        is_contiguous = last_sentinel - indices[0] + 1 == len(indices)
        kinds = " ".join(rendering.field(rendering.sentinels[n]).kind for n in indices)
        if "content" in kinds.partition("tool_calls")[2]:
            raise chat.error(
                f"moves the text before the call of {answer}",
                "it writes the text after the call, or after the result of the call",
                _FIX_TEXT_AND_CALL,
            )
        if start > rendering.place(indices[0]) or not is_contiguous:
            raise chat.error(f"writes text of another message inside the text of {answer}")
        texts_end = max(start, rendering.place(last_sentinel))
    else:
        last_sentinel = anchor
        texts_end = start
    # Search for the end token only up to the next text of the conversation.
    limit = rendering.place(last_sentinel + 1)
    end = chat.ends.search(text, texts_end, limit, is_last=is_last)
    if end is None:
        raise chat.error(
            f"writes no end token after {answer}",
            _no_end(chat),
            "use a template that ends answers: data.template=FILE.jinja;"
            " or add its end token: model.added_tokens",
        )
    is_after_prompt = start == prompt_at + len(prompt)
    return rendering, _through(chat, start, end), is_after_prompt


def _after_prompt(
    chat: ChatRenderer, rendering: Rendering, i: int, prompt_at: int, prompt: str
) -> Rendering:
    """Rewrite the text before message i, the last answer, as `ThoughtStyle.lead` decides."""
    indices = rendering.sentinels_of_message(i)
    first = rendering.sentinels[indices[0]] if indices else None
    if first is None or first.side != "b" or rendering.inserted.position == "middle":
        # The start of the answer's text is unknown. `_start_of_answer` compares the prompt.
        return rendering
    is_shown = rendering.field(first).kind == "reasoning_content"
    thought: str | None = rendering.inserted.thought_of(i).strip()
    if not thought and "reasoning_content" not in rendering.messages[i]:
        thought = None
    written = rendering.text[prompt_at : first.at]
    lead = chat.traits.style.lead(prompt, written, thought, is_shown=is_shown)
    if lead is None:
        asked = parse_block(prompt)
        if thought and asked["closing"]:
            raise chat.error(
                f"closes the thought before message {i + 1}, an answer with a thought",
                f"in inference the prompt ends with {prompt[-40:]!r}",
                _FIX_DROPPED,
            )
        if thought and not is_shown and not asked["opening"]:
            raise _dropped(chat, Field(i, "reasoning_content", thought), rendering)
        raise _not_after_prompt(chat, rendering, i, prompt_at, prompt)
    growth = len(lead) - len(written)
    moved = [s._replace(at=s.at + growth) for s in rendering.sentinels[indices[0] :]]
    text = rendering.text[:prompt_at] + lead + rendering.text[first.at :]
    sentinels = rendering.sentinels[: indices[0]] + moved
    return rendering._replace(text=text, sentinels=sentinels)


def _start_of_answer(
    chat: ChatRenderer,
    rendering: Rendering,
    i: int,
    prompt_at: int,
    prompt: str,
    is_last: bool,
) -> int:
    """Return the position in the rendered text at which an answer starts.

    Raise DataError if the generation prompt is not at `prompt_at`.
    """
    text = rendering.text
    if text.startswith(prompt, prompt_at):
        return prompt_at + len(prompt)
    # In earlier turns, the row can contain only the header of the prompt. The generation prompts of
    # Qwen3.5 and DeepSeek R1 open a thought, but their templates leave thoughts out of earlier
    # turns.
    if not is_last:
        header = chat.header(rendering, i, prompt_at)
        if header and prompt.startswith(header):
            return prompt_at + len(header)
        thought_at = parse_block(prompt).end("header")
        is_same = thought_at < len(prompt) and text.startswith(prompt[:thought_at], prompt_at)
        # The header, which is the text before the answer, must reach at least to the thought.
        # Otherwise the answer would begin before the thought.
        if is_same and len(header or "") >= thought_at:
            # In Nemotron's rows, the closing tag of a thought directly follows the opening tag. The
            # answer starts after the text that the prompt and the row have in common.
            common = _common_prefix(prompt, text[prompt_at:])
            return prompt_at + max(thought_at, min(common, len(header or "")))
    raise _not_after_prompt(chat, rendering, i, prompt_at, prompt)


def _not_after_prompt(
    chat: ChatRenderer, rendering: Rendering, i: int, prompt_at: int, prompt: str
) -> DataError:
    """Build the error for an answer that does not follow the generation prompt."""
    row = rendering.text[prompt_at : prompt_at + 40]
    return chat.error(
        f"does not write its generation prompt before message {i + 1}, an answer",
        f"in inference the prompt ends with {prompt[-40:]!r}, but the row has {row!r} there",
    )


def _through(chat: ChatRenderer, start: int, end: re.Match[str]) -> CharSpan:
    """Return the span from `start` up to and including the end token.

    If the end token is in `ends.earlier`, it is excluded.
    """
    if end[0] in chat.ends.earlier:
        return CharSpan(start, end.start())
    return CharSpan(start, end.end(), end.start())


def _no_end(chat: ChatRenderer) -> str:
    end_tokens = ", ".join(chat.ends.stops) or "none"
    return f"the model would never learn to stop; end tokens: {end_tokens}"


def _tagged_answers(
    chat: ChatRenderer, rendering: Rendering, blocks: list[Block], answers: list[int]
) -> dict[int, list[CharSpan]]:
    """Return message index -> supervised spans, which are the answer's {% generation %} blocks.

    The last span ends with the last end token in the blocks. Raise DataError if the blocks do not
    contain the whole answer, or if they contain text of another message.
    """
    found: list[list[CharSpan]] = []
    spans = []
    for start, stop in blocks:
        is_last = len(found) == len(answers) - 1
        ends = [*chat.ends.pattern(is_last=is_last).finditer(rendering.text, start, stop)]
        if not ends:
            spans.append(CharSpan(start, stop))
            continue
        # Use the last end token, because the text of the answer itself may contain end tokens, and
        # the template's end token comes after it.
        found.append([*spans, _through(chat, start, ends[-1])])
        spans = []
    if len(found) != len(answers) or spans:
        what = f"encloses {len(found)} of {len(answers)} answers in {{% generation %}} blocks"
        raise chat.error(what, _no_end(chat), _FIX_TAGS)
    answer_spans = dict(zip(answers, found, strict=True))
    for sentinel in rendering.sentinels:
        i = rendering.field(sentinel).message
        verb = ""
        if i not in answer_spans:
            all_spans = itertools.chain.from_iterable(found)
            if any(span.start < sentinel.at < span.end for span in all_spans):
                verb = "covers"
        # A sentinel at the edge of a span is inside the span, because the sentinels of an empty
        # answer are at the edge.
        elif not any(span.start <= sentinel.at <= span.end for span in answer_spans[i]):
            verb = "leaves out a part of"
        if verb:
            what = f"has a {{% generation %}} block that {verb} message {i + 1}"
            raise chat.error(what, fix=_FIX_TAGS)
    return answer_spans


def _without_header(
    chat: ChatRenderer, rendering: Rendering, i: int, spans: list[CharSpan]
) -> list[CharSpan]:
    """Remove the text of the generation prompt from the spans of an answer.

    A span may contain this text, because a {% generation %} block may open before the answer's
    header.
    """
    texts = [rendering.place(n) for n in rendering.sentinels_of_message(i)]
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
    """Return the length of the common prefix of two texts. The prefix does not end inside a tag."""
    for count, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            # Do not end inside a tag, because different tags may begin with the same characters,
            # such as <think> and <tool_call>.
            return len(_OPEN_TAG.sub("", a[:count]))
    return min(len(a), len(b))
