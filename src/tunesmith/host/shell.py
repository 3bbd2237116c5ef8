"""Words of commands that a user pastes into a shell: no name of a file or key runs there."""

import os
import shlex
from collections.abc import Iterable

# Bash's and zsh's own quotes, $'...', are the only ones that hold a control character on one line.
_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def shell_word(value: object) -> str:
    """A value as one word of a shell's command line."""
    text = str(value)
    if all(letter.isprintable() for letter in text):
        return shlex.quote(text)
    return "$'" + "".join(_escaped(letter) for letter in text) + "'"


def shell_path(path: object) -> str:
    """A path as one word, which no command takes for an option."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else str(path)
    return shell_word(f"./{text}" if text.startswith("-") else text)


def shell_command(words: Iterable[object]) -> str:
    """The words of a command on one line."""
    return " ".join(shell_word(word) for word in words)


def _escaped(letter: str) -> str:
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    if letter.isprintable():
        return letter
    # A byte of a name that is no UTF-8 comes as a lone surrogate; the shell gets the byte itself.
    is_byte = "\udc80" <= letter <= "\udcff"
    code = letter.encode("utf-8", "surrogateescape" if is_byte else "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in code)
