"""The reasons that a child process leaves behind: its last messages and its exit code."""

import re
import signal

from tunesmith.errors import mask

MAX_REASON_CHARS = 300
# A block as `TunesmithError.text` writes it, at the end of a log or between lines of a launcher.
_ERROR_BLOCK = re.compile(r"^error: .*(?:\n  .*)*", re.MULTILINE)


def last_line(text: str) -> str:
    """Return the last line that is not blank, without secrets; "" if there is none."""
    return mask(text.strip().rpartition("\n")[2].strip())[:MAX_REASON_CHARS]


def reason_in(text: str) -> str:
    """Return the first error of tunesmith in the output of a process, or the last line."""
    if block := _ERROR_BLOCK.search(text):
        return block[0].removeprefix("error: ")
    return last_line(text)


def exit_text(code: int) -> str:
    """Return a sentence about the end of a process with this return code."""
    if code >= 0:
        return f"its process exited with code {code}"
    text = f"its process was ended by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        return f"{text}: the kernel may have killed it for lack of memory (check dmesg)"
    return text
