"""Quoting of commands that a user pastes into a shell, so that the shell does not run a file name
as code.
"""

import os
import shlex
from collections.abc import Iterable

# Escapes inside $'...', a kind of quotes in Bash and zsh. Only these quotes can represent control
# characters on one line.
_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def shell_word(value: object) -> str:
    """Quote a value as one word of a shell command."""
    text = str(value)
    if all(letter.isprintable() for letter in text):
        return shlex.quote(text)
    return "$'" + "".join(_escaped(letter) for letter in text) + "'"


def shell_path(path: object) -> str:
    """Quote a path as one word of a shell command.

    A path that starts with "-" gets the prefix "./", so that no program reads it as an option.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else str(path)
    return shell_word(f"./{text}" if text.startswith("-") else text)


def shell_command(words: Iterable[object]) -> str:
    """Quote the words of a command and join them to one line."""
    return " ".join(shell_word(word) for word in words)


def _escaped(letter: str) -> str:
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    if letter.isprintable():
        return letter
    # If a file name is not valid UTF-8, Python represents each invalid byte as a surrogate. Convert
    # the surrogate back, because the shell needs the byte.
    is_byte = "\udc80" <= letter <= "\udcff"
    code = letter.encode("utf-8", "surrogateescape" if is_byte else "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in code)
