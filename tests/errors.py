"""Errors and log lines asserted by their fields and values, so that a new wording breaks no test.

What is asserted of an error is its class, `where` (data: a key of the recipe, file:line, a step),
`cause`, and the values in its texts: numbers, names, files, and the command that fixes it. The
words stand in the one test of that message, if there is one; `test_house.py` counts the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from tunesmith.errors import TunesmithError

FIELDS = ("where", "why", "cause", "fix")


def holds(text: str, *values: object) -> bool:
    """Whether the text has each value as a whole: 4 is not in checkpoint-4, nor model in model.name."""
    return not missing(text, values)


def missing(text: str, values: Sequence[object]) -> list[str]:
    """The values that the text does not have as a whole."""
    return [
        str(value)
        for value in values
        if not re.search(rf"(?<![\w.-]){re.escape(str(value))}(?!\w|[.-]\w)", text)
    ]


def lines_with(text: str, *values: object) -> list[str]:
    """The lines of a log that have all these values."""
    return [line for line in text.splitlines() if holds(line, *values)]


def warnings_with(text: str, *values: object) -> list[str]:
    """The warnings of a log that have all these values."""
    return [line for line in lines_with(text, *values) if line.startswith("warning: ")]


def is_at(place: str, where: str) -> bool:
    """Whether `place` is `where`, or ends with it as a path: /tmp/a/r.yaml:3 is at r.yaml:3."""
    return place == where or (where != "" and place.endswith(f"/{where}"))


def check_error(
    error: BaseException,
    *,
    where: str | None = None,
    names: Sequence[object] = (),
    fix: Sequence[object] = (),
    cause: str | None = None,
) -> None:
    """Fail unless an error has these fields; None is not looked at.

    Args:
        where: its field `where`; of a path the end is enough.
        names: values that its `what` or `why` has, or its text where it is another library's.
        fix: values that its `fix` has: a command, or a key with its value.
        cause: its field `cause`.
    """
    if not isinstance(error, TunesmithError):
        assert (where, cause, fix) == (None, None, ()), f"{type(error).__name__} has no fields"
        assert not missing(str(error), names), str(error)
        return
    if where is not None:
        assert is_at(error.where, where), f"at {error.where!r}, not {where!r}: {error}"
    if cause is not None:
        assert error.cause == cause, str(error)
    assert not missing(f"{error.what}\n{error.why}", names), str(error)
    assert not missing(error.fix, fix), str(error)


@contextmanager
def refuses(kind: type[BaseException], **fields: Any) -> Iterator[Any]:
    """`pytest.raises` for this very class of error, with the fields of `check_error`."""
    with pytest.raises(kind) as raised:
        yield raised
    assert type(raised.value) is kind, repr(raised.value)
    check_error(raised.value, **fields)


def error_in(output: str) -> TunesmithError:
    """The last error (`TunesmithError.text`) in the output of a command; its class is not shown."""
    lines = output.splitlines()
    starts = [k for k, line in enumerate(lines) if line.startswith("error: ")]
    assert starts, f"no error: {output}"
    rows = dict.fromkeys(FIELDS, "")
    for line in lines[starts[-1] + 1 :]:
        name, colon, value = line.strip().partition(": ")
        if not line.startswith("  ") or not colon or name not in FIELDS:
            break
        rows[name] = value
    rows["cause"] = rows["cause"].partition(":")[0]
    error = TunesmithError(lines[starts[-1]].removeprefix("error: "))
    vars(error).update(rows)
    return error


def check_shown(output: str, **fields: Any) -> None:
    """`check_error` of the last error that the output of a command shows."""
    check_error(error_in(output), **fields)


def is_internal(output: str) -> bool:
    """Whether a command shows a fault of tunesmith's own: a traceback, or the block in its place."""
    return "Traceback" in output or "error: internal error: " in output
