"""Checks that the tool calls, the tool results and the listed tools of a conversation fit together.

The names of the problems are keys of ROW_WARNINGS. Calls that are written as text are not checked.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from tunesmith.rows.samples import CalledFunction, Conversation, FunctionCall, Message


def find_call_problems(sample: Conversation) -> Iterator[str]:
    """Yield the name of each problem, in order and perhaps repeatedly."""
    functions = {}
    for tool in sample.tools or ():
        function = tool["function"]
        if isinstance(function, Mapping):
            functions[function["name"]] = function
    calls: list[FunctionCall] = []
    results: list[Message] = []
    for message in sample.messages:
        if message["role"] == "tool":
            results.append(message)
            continue
        own_calls = message.get("tool_calls", ())
        # Consecutive answers with calls have their results after the last of them.
        if results or not own_calls:
            yield from _unmatched_results(calls, results)
            calls = []
            results = []
        calls += own_calls
        for call in own_calls:
            if functions:
                yield from _missing_argument(call["function"], functions)
    # The last answer can be a call, whose result follows in use.
    if results:
        yield from _unmatched_results(calls, results)


def _unmatched_results(calls: Sequence[FunctionCall], results: Sequence[Message]) -> Iterator[str]:
    """Yield a problem if the results of consecutive calls are not those of the calls."""
    ids = Counter(call["id"] for call in calls if "id" in call)
    result_ids = Counter(turn["tool_call_id"] for turn in results if "tool_call_id" in turn)
    if not calls:
        # Without ids, the calls are probably written as text.
        is_matched = not result_ids
    else:
        is_matched = len(results) == len(calls) and (not ids or not result_ids or ids == result_ids)
    if not is_matched:
        yield "unmatched_result"


def _missing_argument(
    called: CalledFunction, functions: Mapping[object, Mapping[object, object]]
) -> Iterator[str]:
    """Yield a problem if the row lists no such tool, or if a required argument is missing."""
    function = functions.get(called["name"])
    if function is None:
        yield "unlisted_call"
        return
    schema = function.get("parameters")
    required = schema.get("required") if isinstance(schema, Mapping) else None
    arguments = called["arguments"]
    if not isinstance(required, list) or not isinstance(arguments, Mapping):
        return
    # A file with columns gives each call the arguments of the other calls, as null.
    if any(arguments.get(name) is None for name in map(str, required)):
        yield "missing_argument"
