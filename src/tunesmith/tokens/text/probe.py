"""Detection of the features and end tokens of a chat template, by rendering short conversations."""

import re
from dataclasses import replace

from tunesmith.errors import DataError
from tunesmith.rows.samples import FunctionCall, ToolSchema
from tunesmith.tokens.text.rendering import ChatRenderer, Rendering
from tunesmith.tokens.text.sentinels import Messages, Tools
from tunesmith.tokens.text.thought_style import ThoughtStyle, parse_block
from tunesmith.tokens.text.thoughts import MessageForm, thought_forms

# Short conversations, one for each feature of a chat template.
_PROBE_TURN: Messages = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
]
_PROBE_TURNS: Messages = [
    *_PROBE_TURN,
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
_PROBE_THINKING: Messages = [_PROBE_TURN[0], {**_PROBE_TURN[1], "reasoning_content": "three"}]
_PROBE_INLINE: Messages = [
    _PROBE_TURN[0],
    {**_PROBE_TURN[1], "content": "<think>\nthree\n</think>\n\ntwo"},
]
_CALL: FunctionCall = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "look", "arguments": {"at": "six"}},
}
_PROBE_CALL: Messages = [
    _PROBE_TURN[0],
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "look", "tool_call_id": "call00001", "content": "five"},
    _PROBE_TURN[1],
]
# Tags that a template writes around "five", the result of the call in `_PROBE_CALL`.
_RESULT_TAGS = re.compile(r"(<[^<>]+>|\[[^\[\]]+\])\s*five\s*(<[^<>]+>|\[[^\[\]]+\])")
_PROBE_CALLS: Messages = [
    _PROBE_TURN[0],
    {"role": "assistant", "content": "", "tool_calls": [_CALL, {**_CALL, "id": "call00002"}]},
]
_PROBE_TOOLS: list[ToolSchema] = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


def probe(chat: ChatRenderer) -> None:
    """Render short conversations once per template, to detect its features and end tokens.

    Raise DataError if the template drops a question or an answer.
    """
    rendering = _try(chat, _PROBE_TURN)
    if rendering is not None and not rendering.shows_all():
        dropped = "answer" if 0 in rendering.shown else "question"
        raise chat.error(
            f"drops the {dropped}",
            f"it renders as {rendering.text[:60]!r}",
            "name a template that writes it: data.template=FILE.jinja",
        )
    thinking = _find_forms(chat)
    _find_ends(chat)
    if rendering is not None:
        chat.traits.style = _find_style(chat, rendering, thinking)
    asked = parse_block(chat.traits.style.prompt)
    # If the generation prompt has a thought, the prompt determines where answers start.
    chat.tagged = chat.tagged and not asked["opening"] and not asked["closing"]
    chat.traits.reasoning = thinking is not None or chat.traits.style.splits_empty
    rendering = _try(chat, _PROBE_TURNS)
    if rendering is not None:
        _check_generation_prompt(chat, rendering)


def _find_forms(chat: ChatRenderer) -> Rendering | None:
    """Find the form in which the template renders thoughts and tool calls.

    Return the probe with a thought. Return None if the template renders no thoughts.
    """
    traits = chat.traits
    thinking = None
    for form in thought_forms(chat.jinja):
        traits.form = form
        rendering = _try(chat, _PROBE_THINKING)
        if rendering is not None and _is_in_place(rendering):
            thinking = rendering
            break
    else:
        traits.form = MessageForm()
    for text_arguments in (False, True):
        traits.form = traits.form._replace(text_arguments=text_arguments)
        rendering = _try(chat, _PROBE_CALL, _PROBE_TOOLS)
        if rendering is not None and rendering.shows("tool_calls"):
            traits.calls = True
            tags = _RESULT_TAGS.search(rendering.text)
            if tags is not None:
                wrapped = r"\A\s*{}(.*){}\s*\Z".format(*map(re.escape, tags.groups()))
                traits.wrapped_result = re.compile(wrapped, re.DOTALL)
            break
    else:
        traits.form = traits.form._replace(text_arguments=False)
    listed = _try(chat, _PROBE_TURN, _PROBE_TOOLS)
    traits.lists_tools = listed is not None and listed.shows("tools")
    return thinking


def _is_in_place(rendering: Rendering) -> bool:
    """Return whether the probe with a thought is rendered completely and in its order.

    A closed thought in front of the thought is not allowed: the template does not find a thought
    in the text, and writes an empty one.
    """
    fields = [sentinel.field for sentinel in rendering.sentinels]
    if not rendering.shows_all() or fields != sorted(fields):
        return False
    first = rendering.sentinels_of_message(1)[0]
    before = rendering.text[rendering.place(first - 1) : rendering.place(first)]
    return not parse_block(before)["closing"]


def _find_style(chat: ChatRenderer, plain: Rendering, thinking: Rendering | None) -> ThoughtStyle:
    """Find how the template writes thoughts, from the probes without and with a thought."""
    edges = [plain.place(n) for n in plain.sentinels_of_message(1)]
    anchor, prompt = chat.prompt(plain, 1)
    if not edges or anchor is None:
        return ThoughtStyle(splits=thinking is not None, splits_empty=thinking is not None)
    written = plain.text[plain.place(anchor) : edges[0]]
    stop = chat.ends.search(plain.text, edges[-1])
    style = ThoughtStyle(prompt, end="\n</think>\n\n")
    if thinking is not None and thinking.inserted.position == "both":
        # Start and end of the thought, and the start of the answer's text
        start, end, text_at, _ = map(thinking.place, thinking.sentinels_of_message(1))
        before = thinking.text[thinking.place(anchor) : start]
        end_text = thinking.text[end:text_at]
        style = ThoughtStyle(prompt, before.removeprefix(prompt), end_text)
    lead = style.lead(prompt, written, "", is_shown=False) or prompt
    blocks = [parse_block(text) for text in (prompt, written)]
    writes_empty = any(block["opening"] or block["closing"] for block in blocks)
    splits = writes_empty
    if thinking is not None:
        try:
            splits = chat.render(_PROBE_INLINE) != thinking.text
        except DataError:
            splits = True
        writes_empty |= splits and "</think>" not in chat.jinja
    return replace(
        style,
        without=lead.removeprefix(prompt),
        after=plain.text[edges[-1] : stop.start()] if stop else "",
        splits=splits,
        splits_empty=writes_empty,
    )


def _find_ends(chat: ChatRenderer) -> None:
    """Find the tokens that the template writes at the end of answers.

    They are added to the tokens at which generation stops.
    """
    turns = _try(chat, _PROBE_TURNS)
    if turns is not None:
        earlier = turns.tail(1)
        question = turns.tail(2)
        last = turns.tail(3)
        if question is not None and earlier is not None and last is not None:
            chat.ends.read_turns(question, earlier, last)
    if not chat.traits.calls:
        return
    with_result = _try(chat, _PROBE_CALL, _PROBE_TOOLS)
    # If the template does not accept two calls in a message, try one call.
    calls = _try(chat, _PROBE_CALLS, _PROBE_TOOLS) or _try(chat, _PROBE_CALL[:2], _PROBE_TOOLS)
    if with_result is None or calls is None:
        return
    call = with_result.tail(1)
    last_calls = calls.tail(1)
    if call is not None and last_calls is not None:
        start = calls.place(calls.sentinels_of_message(1)[0])
        chat.ends.read_call(call, last_calls, calls.text[start:])


def _check_generation_prompt(chat: ChatRenderer, rendering: Rendering) -> None:
    """Raise DataError if the template writes a header before answers, but has no generation prompt.

    Without a generation prompt, the header cannot be distinguished from the answer.
    """
    indices = rendering.sentinels_of_message(1)
    if chat.tagged or not indices:
        return
    question = chat.render(_PROBE_TURN[:1])
    has_generation_prompt = question != chat.render(_PROBE_TURN[:1], generate=True)
    if has_generation_prompt or not rendering.text.startswith(question):
        return
    header = rendering.text[len(question) : rendering.place(indices[0])]
    if any(token.content in header for token in chat.tokenizer.added_tokens_decoder.values()):
        raise chat.error(
            "has no generation prompt",
            f"the model would have to write {header!r} itself",
            "add {% if add_generation_prompt %}...{% endif %} with the header of an answer to"
            " the template",
        )


def _try(chat: ChatRenderer, messages: Messages, tools: Tools = None) -> Rendering | None:
    """Render a conversation and locate its texts. Return None if the template rejects it."""
    try:
        return chat.locate(chat.render(messages, tools), messages, tools)
    except DataError:
        # Ignore the error. If the rows need this feature, rendering the rows raises the error
        # later.
        return None
