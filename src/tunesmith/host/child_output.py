"""Functions that use the output and the exit code of a child process to find out why it failed."""

import re
import signal

from tunesmith.errors import mask

MAX_REASON_CHARS = 300
# Error message in the format of `TunesmithError.text`: a line "error: ..." and its indented lines.
_ERROR_BLOCK = re.compile(r"^error: .*(?:\n  .*)*", re.MULTILINE)


def last_line(text: str) -> str:
    """Return the last non-blank line of a text, with secrets masked. Return "" for a blank text."""
    return mask(text.strip().rpartition("\n")[2].strip())[:MAX_REASON_CHARS]


def reason_in(text: str) -> str:
    """Return the first error message of tunesmith in a process's output, else the last line."""
    if block := _ERROR_BLOCK.search(text):
        return block[0].removeprefix("error: ")
    return last_line(text)


def exit_text(code: int) -> str:
    """Describe how a process ended, from its return code."""
    if code >= 0:
        return f"the process exited with code {code}"
    # A real-time signal has no name.
    names = {number.value: number.name for number in signal.Signals}
    text = f"the process was ended by {names.get(-code, f'signal {-code}')}"
    if code == -signal.SIGKILL:
        return f"{text}: the kernel may have killed it because memory ran out (check dmesg)"
    return text
