"""Parsing of tool calls in the text of an answer, in the format of the model's chat template.

The format is not chosen by the model's name. Instead, the chat template renders a known probe call.
The first of these four formats that can parse the rendered probe is the format of the template:

    JSON       <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>, a list, "parameters"
    named      [TOOL_CALLS]f[ARGS]{"a": 1}, to=functions.f<|message|>{"a": 1}, call:f{a:1}
    tagged     <function=f><parameter=a>1</parameter>, f<arg_key>a</arg_key><arg_value>1</arg_value>
    Python     [f(a=1)]

The text around the name and the arguments is taken from the rendered probe. A call in an answer
only counts if an inference server that parses this format would recognize the call.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.answers.scoring.json_fields import equal_fields, parse_strict

if TYPE_CHECKING:
    from pydantic import JsonValue


class ToolCall(NamedTuple):
    """Tool call in an answer. `arguments` maps parameter names to JSON values."""

    name: str
    arguments: "dict[str, JsonValue]"


CallReader = Callable[[str], list[ToolCall]]

# Tool call that is rendered to find out the format. Its words do not occur in any template, so they
# can be located in the rendered text.
CALL_PROBE = ToolCall("zq_look_up", {"zq_town": "Bern zq", "zq_river": "Aare zq"})
PROBE_TOOL: dict[str, object] = {
    "type": "function",
    "function": {
        "name": CALL_PROBE.name,
        "description": "Look it up.",
        "parameters": {
            "type": "object",
            "properties": {
                name: {"type": "string", "description": "A name."} for name in CALL_PROBE.arguments
            },
            "required": list(CALL_PROBE.arguments),
        },
    },
}

# The text directly before a call: a tag such as <tool_call> and the words that follow the tag. The
# last tag may still be incomplete.
_OPENING = re.compile(r"(?:<[^<>]*>|\[[A-Z_]+\])[^<>\[\]{}]*$|<[^<>]*$")
_CALL_NAME = r"([^\s<>\"'{}()\[\]=:,]+)"
# Gemma's notation of arguments: keys have no quotes, and strings are enclosed in the special token
# <|"|> instead of quotes.
_GEMMA_PARTS = re.compile(r'<\|"\|>(.*?)<\|"\|>|([A-Za-z_][\w.-]*)\s*:|\bNone\b', re.DOTALL)
_JSON_CONSTANTS = {"true": True, "false": False, "null": None}


def call_score(answer: list[ToolCall], reference: list[ToolCall]) -> float:
    """Compute the score of an answer's calls. Call n is compared with call n of the reference.

    A call with the right name scores the fraction of equal fields in its arguments, and a call with
    another name scores 0. The result is the mean. Missing and additional calls count as 0. If
    neither answer nor reference has a call, the score is 1.
    """
    count = max(len(answer), len(reference))
    if count == 0:
        return 1.0
    total = 0.0
    for called, expected in zip(answer, reference, strict=False):
        if called.name == expected.name:
            total += equal_fields(called.arguments, expected.arguments)
    return total / count


def learn_call_form(rendering: str) -> CallReader | None:
    """Return a parser for tool calls in the format in which `rendering` contains CALL_PROBE.

    Return None if no format matches.
    """
    for learn in (_json_form, _named_form, _tagged_form, _python_form):
        read = learn(rendering)
        if read is not None and read(rendering) == [CALL_PROBE]:
            return read
    return None


def _opening(text: str) -> str:
    """Return the text that opens a call, such as a tag. `text` is the text before the call."""
    match = _OPENING.search(text.rstrip())
    return match[0].strip() if match else text.strip()


def _flexible(literal: str) -> str:
    """Return a regular expression for `literal` that allows other numbers and other whitespace."""
    words = [re.sub(r"\d+", r"\\d+", re.escape(word)) for word in literal.split()]
    return r"\s*" + r"\s*".join(words) + r"\s*"


def _decode(text: str, start: int) -> "tuple[JsonValue, int]":
    """Return the JSON value at `start`, and its end position. Leading whitespace is skipped.

    Raise ValueError if there is no JSON value.
    """
    try:
        return json.JSONDecoder().raw_decode(text, len(text) - len(text[start:].lstrip()))
    except RecursionError:
        raise ValueError("the JSON value is nested too deeply") from None


def _read_json(opening: str, text: str) -> list[ToolCall]:
    """Parse calls that are JSON objects, or lists of them, after each occurrence of `opening`.

    If `opening` is empty, parse the text from its start.
    """
    starts = [0]
    if opening:
        starts = [match.end() for match in re.finditer(re.escape(opening), text)]
    calls: list[ToolCall] = []
    end = 0
    for start in starts:
        if start < end:
            continue
        end = start
        # Several JSON values can follow one opening, so parse until there is no further value.
        with suppress(ValueError):
            while True:
                value, end = _decode(text, end)
                calls += _calls_in(value)
    return calls


def _calls_in(value: "JsonValue") -> Iterator[ToolCall]:
    """Yield the calls in a JSON value: an object with name and arguments, or a list of objects."""
    values = value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, dict):
            continue
        # In OpenAI's format, name and arguments are in an inner object `function`. In other formats
        # they are in the object itself.
        inner = item.get("function")
        function = inner if isinstance(inner, dict) else item
        # Templates use different keys for the name and the arguments.
        name = function.get("name", function.get("tool_name"))
        arguments = function.get("arguments", function.get("parameters"))
        # Arguments can be JSON text instead of an object.
        if isinstance(arguments, str):
            arguments = _json_or_text(arguments)
        if isinstance(name, str) and isinstance(arguments, dict):
            yield ToolCall(name, arguments)


def _json_form(rendering: str) -> CallReader | None:
    for match in re.finditer(r"[\[{]", rendering):
        with suppress(ValueError):
            value, _ = _decode(rendering, match.start())
            if list(_calls_in(value)) == [CALL_PROBE]:
                return partial(_read_json, _opening(rendering[: match.start()]))
    return None


def _read_named(head: re.Pattern[str], text: str) -> list[ToolCall]:
    """Parse calls that consist of a name, and of arguments in JSON or in Gemma's notation."""
    calls = []
    for match in head.finditer(text):
        with suppress(ValueError):
            arguments = _decode_arguments(text[match.end() :])
            if isinstance(arguments, dict):
                calls.append(ToolCall(match[1], arguments))
    return calls


def _decode_arguments(text: str) -> "JsonValue":
    try:
        return _decode(text, 0)[0]
    except ValueError:
        return _decode(_GEMMA_PARTS.sub(_as_json, text), 0)[0]


def _as_json(match: re.Match[str]) -> str:
    if match[2] is not None:
        return f"{json.dumps(match[2])}:"
    # Group 1 is a string. If it is also missing, the match is the word `None`, which some versions
    # of Gemma's template write in lists instead of `null`.
    return "null" if match[1] is None else json.dumps(match[1])


def _named_form(rendering: str) -> CallReader | None:
    prefix, _, after = rendering.partition(CALL_PROBE.name)
    between, brace, _ = after.partition("{")
    opening = _opening(prefix)
    if not brace or not (opening or between.strip()):
        return None
    head = _flexible(opening) + _CALL_NAME + _flexible(between) + r"(?=\{)"
    return partial(_read_named, re.compile(head))


def _read_tagged(head: re.Pattern[str], argument: re.Pattern[str], text: str) -> list[ToolCall]:
    """Parse calls whose name, argument names and values are enclosed in tags.

    Values that are valid JSON are parsed, other values are texts.
    """
    calls = []
    for match in head.finditer(text):
        arguments = {}
        position = match.end()
        while (pair := argument.match(text, position)) is not None:
            arguments[pair[1]] = _json_or_text(pair[2])
            position = pair.end()
        calls.append(ToolCall(match[1], arguments))
    return calls


def _json_or_text(text: str) -> "JsonValue":
    """Return the JSON value that a text contains, or the text itself if it is not valid JSON."""
    try:
        return parse_strict(text)
    except ValueError:
        return text


def _tagged_form(rendering: str) -> CallReader | None:
    words = [CALL_PROBE.name]
    for name, value in CALL_PROBE.arguments.items():
        words += [name, str(value)]
    # Find the texts between the probe's name, keys and values. `words` has them in the order in
    # which the template writes them.
    gaps = re.fullmatch(f"(.*){'(.*?)'.join(map(re.escape, words))}(.*)", rendering, re.DOTALL)
    if gaps is None:
        return None
    prefix, to_key, to_value, to_next, *_ = gaps.groups()
    # The template writes the same text before each key. Therefore this text is the longest common
    # suffix of the gap before the first key and the gap before the second key.
    split = next(i for i in range(len(to_next) + 1) if to_key.endswith(to_next[i:]))
    key_opening = to_next[split:]
    value_end = to_next[:split].strip()
    opening = _opening(prefix)
    # Without text around names and values, a parser could not find where they begin and end.
    if not (key_opening.strip() and to_value.strip() and value_end and opening):
        return None
    name_end = _flexible(to_key.removesuffix(key_opening))
    return partial(
        _read_tagged,
        re.compile(_flexible(opening) + _CALL_NAME + name_end),
        re.compile(
            f"{_flexible(key_opening)}{_CALL_NAME}{_flexible(to_value)}(.*?){_flexible(value_end)}",
            re.DOTALL,
        ),
    )


def _read_python(opening: str, closing: str, text: str) -> list[ToolCall]:
    """Parse calls in Python syntax, in a list or one per line."""
    if opening not in text:
        return []
    source = text.partition(opening)[2] if opening else text
    if closing:
        # `closing` may be missing, because the answer may have been cut off.
        source = source.partition(closing)[0]
    try:
        statements = ast.parse(source.strip()).body
        return [call for statement in statements for call in _python_calls(statement)]
    # An answer that is not valid Python has no calls.
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []


def _python_calls(statement: ast.stmt) -> Iterator[ToolCall]:
    """Yield the calls of a statement. Raise ValueError if it contains anything else."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    for node in value.elts if isinstance(value, ast.List) else [value]:
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError(
                "a tool call must be a function call with only named arguments, such as f(x=1)"
            )
        # `_Constants` converts JSON's constants, such as true, because some templates write them
        # instead of Python's. keyword.arg is None for an argument **x.
        arguments = {
            keyword.arg or "": ast.literal_eval(_Constants().visit(keyword.value))
            for keyword in node.keywords
        }
        yield ToolCall(ast.unparse(node.func), arguments)


class _Constants(ast.NodeTransformer):
    """Transformer that replaces JSON's true, false and null by Python's constants."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(_JSON_CONSTANTS[node.id]) if node.id in _JSON_CONSTANTS else node


def _python_form(rendering: str) -> CallReader | None:
    prefix, _, after = rendering.partition(CALL_PROBE.name)
    if not after.startswith("("):
        return None
    end = after.find(")")
    prefix = prefix.rstrip().removesuffix("[")
    closing = after[end + 1 :].lstrip().removeprefix("]").strip()
    return partial(_read_python, _opening(prefix), closing)
