"""Tool calls in the text of an answer, in the form in which the template writes them.

There is no list of models. A call with a probe's name and arguments is rendered by the template,
and the first of four forms that reads it back is the template's:

    JSON       <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>, a list, "parameters"
    named      [TOOL_CALLS]f[ARGS]{"a": 1}, to=functions.f<|message|>{"a": 1}, call:f{a:1}
    tagged     <function=f><parameter=a>1</parameter>, f<arg_key>a</arg_key><arg_value>1</arg_value>
    Python     [f(a=1)]

What stands around name and arguments is read off that rendering, so that an answer counts only
where a server that reads this form would see the call.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.tools.evaluate.json_fields import equal_fields, parse_strict

if TYPE_CHECKING:
    from pydantic import JsonValue


class ToolCall(NamedTuple):
    """A call that an answer holds; `arguments`: JSON values by name."""

    name: str
    arguments: "dict[str, JsonValue]"


CallReader = Callable[[str], list[ToolCall]]

# What is rendered. No word of it stands in a template.
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

# What opens a call: the last tag before it and the words behind that, or one that is still open.
_OPENING = re.compile(r"(?:<[^<>]*>|\[[A-Z_]+\])[^<>\[\]{}]*$|<[^<>]*$")
_CALL_NAME = r"([^\s<>\"'{}()\[\]=:,]+)"
# Gemma's notation: keys without quotes, and a token of its own around texts.
_GEMMA_PARTS = re.compile(r'<\|"\|>(.*?)<\|"\|>|([A-Za-z_][\w.-]*)\s*:|\bNone\b', re.DOTALL)
_JSON_CONSTANTS = {"true": True, "false": False, "null": None}


def call_score(answer: list[ToolCall], reference: list[ToolCall]) -> float:
    """Compute the share of the calls that is right, in their order.

    A call of another name counts 0, one of the right name the share of its arguments' fields that
    are equal. A call too many counts as one that is wrong. Without any on both sides: 1.
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
    """The reader of calls written as CALL_PROBE is in `rendering`; None if no form fits."""
    for learn in (_json_form, _named_form, _tagged_form, _python_form):
        read = learn(rendering)
        if read is not None and read(rendering) == [CALL_PROBE]:
            return read
    return None


def _opening(text: str) -> str:
    """Find the text that opens a call in the text of the probe before it."""
    match = _OPENING.search(text.rstrip())
    return match[0].strip() if match else text.strip()


def _flexible(literal: str) -> str:
    """A pattern for a text, with any whitespace where it has some, and any number for a number."""
    words = [re.sub(r"\d+", r"\\d+", re.escape(word)) for word in literal.split()]
    return r"\s*" + r"\s*".join(words) + r"\s*"


def _decode(text: str, start: int) -> "tuple[JsonValue, int]":
    """The JSON value at or after whitespace at `start`, and where it ends; ValueError for none."""
    while start < len(text) and text[start].isspace():
        start += 1
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _read_json(opening: str, text: str) -> list[ToolCall]:
    """Read one JSON value for a call, or a list of such; at the start where nothing opens it."""
    starts = [0]
    if opening:
        starts = [match.end() for match in re.finditer(re.escape(opening), text)]
    calls: list[ToolCall] = []
    end = 0
    for start in starts:
        if start < end:
            continue
        end = start
        # Several may follow each other behind one opening.
        with suppress(ValueError):
            while True:
                value, end = _decode(text, end)
                calls += _calls_in(value)
    return calls


def _calls_in(value: "JsonValue") -> Iterator[ToolCall]:
    """The calls of a JSON value: an object with a name and arguments, or a list of them."""
    values = value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, dict):
            continue
        # OpenAI's wrapping, or the function itself.
        inner = item.get("function")
        function = inner if isinstance(inner, dict) else item
        # Templates name the parts of a call differently.
        name = function.get("name", function.get("tool_name"))
        arguments = function.get("arguments", function.get("parameters"))
        # Arguments may be a text of JSON.
        if isinstance(arguments, str):
            with suppress(ValueError):
                arguments = parse_strict(arguments)
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
    """Read a name, then its arguments as one JSON object, or in Gemma's notation of one."""
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
    # Its templates of some versions write None in a list.
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
    """Read a name, then each argument's name and value between tags.

    Values are JSON if they can be read as such, else texts.
    """
    calls = []
    for match in head.finditer(text):
        arguments = {}
        position = match.end()
        while (pair := argument.match(text, position)) is not None:
            arguments[pair[1]] = _value_of(pair[2])
            position = pair.end()
        calls.append(ToolCall(match[1], arguments))
    return calls


def _value_of(text: str) -> "JsonValue":
    try:
        return parse_strict(text)
    except ValueError:
        return text


def _tagged_form(rendering: str) -> CallReader | None:
    words = [CALL_PROBE.name]
    for name, value in CALL_PROBE.arguments.items():
        words += [name, str(value)]
    # The probe's name, keys and values in the order in which the template writes them.
    gaps = re.fullmatch(f"(.*){'(.*?)'.join(map(re.escape, words))}(.*)", rendering, re.DOTALL)
    if gaps is None:
        return None
    prefix, to_key, to_value, to_next, *_ = gaps.groups()
    # What stands before a key is the same before each: the end that two gaps share.
    shared = 0
    while shared < min(len(to_key), len(to_next)) and to_key[-shared - 1] == to_next[-shared - 1]:
        shared += 1
    key_opening = to_key[len(to_key) - shared :]
    value_end = to_next[: len(to_next) - shared].strip()
    opening = _opening(prefix)
    # Without marks around them, names and values could not be separated.
    if not (key_opening.strip() and to_value.strip() and value_end and opening):
        return None
    name_end = _flexible(to_key[: len(to_key) - shared])
    argument = (
        f"{_flexible(key_opening)}{_CALL_NAME}{_flexible(to_value)}(.*?){_flexible(value_end)}"
    )
    return partial(
        _read_tagged,
        re.compile(_flexible(opening) + _CALL_NAME + name_end),
        re.compile(argument, re.DOTALL),
    )


def _read_python(opening: str, closing: str, text: str) -> list[ToolCall]:
    """Read calls as Python writes them, in a list or one a line."""
    if opening not in text:
        return []
    source = text.partition(opening)[2] if opening else text
    if closing:
        # A call that is cut off may lack its closing.
        source = source.partition(closing)[0]
    try:
        statements = ast.parse(source.strip()).body
        return [call for statement in statements for call in _python_calls(statement)]
    # An answer may hold anything: what is no Python holds no calls.
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []


def _python_calls(statement: ast.stmt) -> Iterator[ToolCall]:
    """Yield the calls of a line. Raise ValueError for anything else."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    for node in value.elts if isinstance(value, ast.List) else [value]:
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError("it is not a call with named arguments")
        arguments = {}
        for keyword in node.keywords:
            # Templates mix JSON's constants with Python's. An argument **x has no name.
            arguments[keyword.arg or ""] = ast.literal_eval(_Constants().visit(keyword.value))
        yield ToolCall(ast.unparse(node.func), arguments)


class _Constants(ast.NodeTransformer):
    """JSON's true, false and null as Python's."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in _JSON_CONSTANTS:
            return ast.Constant(_JSON_CONSTANTS[node.id])
        return node


def _python_form(rendering: str) -> CallReader | None:
    prefix, _, after = rendering.partition(CALL_PROBE.name)
    if not after.startswith("("):
        return None
    end = after.find(")")
    prefix = prefix.rstrip().removesuffix("[")
    closing = after[end + 1 :].lstrip().removeprefix("]").strip()
    return partial(_read_python, _opening(prefix), closing)
