"""A reader of Modelfiles by the rules of Ollama's own parser (parser/parser.go): what `ollama create`
would take from one.

A command is a word of letters and a space, a value goes to the end of its line. A value that opens
with a quote goes on over lines until a line ends with that quote; nothing is escaped. Characters that
cannot be printed are dropped.
"""

from __future__ import annotations

import re

COMMANDS = "from license template system adapter draft renderer parser parameter message requires"
_COMMAND = re.compile(r"([A-Za-z]+)[ \t]")
_PARAMETER = re.compile(r"([A-Za-z0-9_]+)[ \t]")


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """(command, value) in the order of the file; a parameter by its own name. ValueError for a text
    that Ollama refuses.
    """
    commands = []
    place = 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        if text[place] == "#":
            place = _line_end(text, place)
            continue
        match = _COMMAND.match(text, place)
        if match is None or match[1].lower() not in COMMANDS.split():
            raise ValueError(f"no command: {text[place:]!r}")
        name = match[1].lower()
        if name == "parameter":
            match = _PARAMETER.match(text, match.end())
            if match is None:
                raise ValueError("a parameter without a value")
            name = match[1]
        value, place = _read_value(text, match.end())
        commands.append((name, value))
    if "from" not in dict(commands):
        raise ValueError("no FROM line")
    return commands


def _line_end(text: str, place: int) -> int:
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def _read_value(text: str, start: int) -> tuple[str, int]:
    end = start
    while end < len(text):
        end = _line_end(text, end)
        value = "".join(
            char for char in text[start:end].strip() if char.isprintable() or char in "\n\t"
        )
        for quote in ('"""', '"'):
            if value.startswith(quote):
                if len(value) >= 2 * len(quote) and value.endswith(quote):
                    return value[len(quote) : -len(quote)], end
                break
        else:
            return value, end
        end += 1
    raise ValueError(f"a quote that nothing closes: {text[start:]!r}")
