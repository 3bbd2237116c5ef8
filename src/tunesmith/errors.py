"""The errors of tunesmith, as one small class hierarchy.

    TunesmithError
    ├── UsageError            exit 2: raised before the first step; nothing was started
    │   ├── RecipeError
    │   ├── DataError
    │   ├── ModelError
    │   └── MachineError
    ├── RunError              exit 1: the run began and failed
    │   ├── NonFiniteError
    │   └── CheckpointError
    ├── StoppedError          exit 75: a signal came, everything is saved, start again to resume
    │   ├── StoppedEarlyError   stopped before the first step, with nothing to save
    │   └── LowMemoryError      stopped because the host's memory is low
    └── OtherRankError        exit code of another rank that failed and reports the reason

Every error states the problem, the place (file:line, key or step), the reason, and the command or
edit that fixes it.
"""

import errno
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import PurePath
from typing import Any

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
# Exit code of shells for a process that was ended by a signal: 128 + SIGINT.
EXIT_INTERRUPTED = 130

# Likely causes of a failure: the name in failure.json, and a description for the user.
CAUSES = {
    "out-of-memory": "the device or the host could not allocate a tensor",
    "memory": "the host was running out of memory, because of this run or other programs",
    "oom-kill": "the kernel killed a process because the host was out of memory",
    "killed": "a process was killed by SIGKILL, or crashed",
    "stopped": "a process was halted, by SIGSTOP or a debugger, and was not continued",
    "restarted": "the machine was rebooted, after a freeze or a power cut, or by hand",
    "link": "the network to another rank is cut, or its machine is down",
    "hang": "a rank hangs, and the others wait for it",
    "disk": "a disk cannot store more data",
    "not-finite": "the learning rate is too high, or a row is bad",
    "licence": "the model's owner has not granted access to this account",
    "version": "incompatible packages",
    "damaged": "files of a checkpoint are damaged or missing",
    "preempted": "Slurm stopped the job because of its time limit, a preemption or scancel",
}


class TunesmithError(Exception):
    """Base class of all errors that a user sees.

    Args:
        what: the problem, as one sentence without a full stop.
        where: a file, `file:line`, a key of the recipe, or a step. "" if there is no place.
        why: the reason. "" if `what` states it.
        fix: the command or edit that fixes the problem.
        cause: the likely cause, a key of CAUSES. "" if it is unknown.
        failed_rank: `rank`, `host`, `phase` and `collective` of a failed rank, for failure.json.
    """

    exit_code = EXIT_FAILED
    cause = ""

    def __init__(
        self,
        what: str,
        *,
        where: str | PurePath = "",
        why: str = "",
        fix: str = "",
        cause: str = "",
        failed_rank: Mapping[str, object] = {},
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = str(where)
        self.why = why
        self.fix = fix
        self.cause = cause or self.cause
        self.failed_rank = dict(failed_rank)

    def __str__(self) -> str:
        """Return the error text without "error: ", because a traceback shows the class name."""
        return self.text().removeprefix("error: ")

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython and Jupyter show instead of a traceback.

        IPython requires this method name.
        """
        return self.text().splitlines()

    def text(self) -> str:
        """Return the error text for the terminal.

        It has one line each for what, where, why, the likely cause and the fix. Empty parts are
        omitted, and long parts are truncated.
        """
        rows = {
            "where": self.where,
            "why": self.why,
            "cause": f"{self.cause}: {CAUSES[self.cause]}" if self.cause else "",
            "fix": self.fix,
        }
        lines = [f"error: {self.what:.2000}"]
        for name, row in rows.items():
            if row:
                lines.append(f"  {name}: {row:.2000}")
        return "\n".join(lines)


# An option of the command line with its value, which is one word or a text in quotes. Options
# without a value in this table are switches.
_OPTION = re.compile(
    r"--(?:(columns|format|score|quant|split|device|dtype|output|data) ('[^']*'|[^\s,;?)]+)"
    r"|([a-z][a-z-]+))"
)
_ARGUMENT_NAMES = {
    "score": "scorers",
    "format": "format_name",
    "input": "rows",
    "trust-remote-code": "trust_remote_code=True",
}


def in_words_of_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with errors whose fixes name its arguments instead of options."""

    def argument(option: re.Match[str]) -> str:
        name, value, switch = option.groups()
        if switch:
            return _ARGUMENT_NAMES.get(switch, switch.replace("-", "_"))
        text: object = value.strip("'")
        if name == "columns":
            text = dict(pair.split("=", 1) for pair in str(text).split(",") if "=" in pair)
        return f"{_ARGUMENT_NAMES.get(name, name)}={text!r}"

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TunesmithError as error:
            for part in ("what", "where", "why", "fix"):
                setattr(error, part, _OPTION.sub(argument, getattr(error, part)))
            raise

    # `pickle` looks up the function in this module.
    call.__module__ = "tunesmith"
    return call


class UsageError(TunesmithError):
    """An error before the first step: in the command, recipe, data, model, license or machine."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """A recipe file that cannot be read, or that has a wrong key or value.

    Attributes:
        others: the errors of the other wrong keys and values. They are shown below this error.
    """

    others: "Iterable[RecipeError]" = ()

    def text(self) -> str:
        return "\n".join([super().text(), *(other.text() for other in self.others)])


class DataError(UsageError):
    """A data file, row or column that cannot be used for training, or tokens that fail a check."""


class ModelError(UsageError):
    """A model that is missing, not supported, damaged, or that the user may not download."""


@contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Set `where` of a ModelError that is raised in the block, unless the error already has a
    `where`.
    """
    try:
        yield
    except ModelError as error:
        error.where = error.where or where
        raise


class MachineError(UsageError):
    """This machine lacks something, such as a package, disk space or write permission."""


class RunError(TunesmithError):
    """The run began and failed. `failure.json` has the same text."""


class NonFiniteError(RunError):
    """The loss or the gradient norm became NaN or infinite."""

    cause = "not-finite"


class CheckpointError(RunError):
    """A checkpoint could not be written or read."""


class StoppedError(TunesmithError):
    """A signal stopped the run. Everything is saved, and the next start resumes the run."""

    exit_code = EXIT_STOPPED

    def text(self) -> str:
        """Return the text without "error: ", because a stop is not a failure."""
        return super().text().removeprefix("error: ")


class StoppedEarlyError(StoppedError):
    """A signal stopped this process without a save, for example before its first step.

    The other ranks may not know that this process was stopped.
    """


class LowMemoryError(StoppedError):
    """The host's memory is nearly exhausted. Everything is saved.

    The process exits immediately without Python's cleanup, which takes one second, or five on a
    busy machine.
    """

    cause = "memory"


class OtherRankError(TunesmithError):
    """Another rank of this run failed and reports the reason.

    This rank exits with the same exit code.
    """

    def __init__(self, what: str, *, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EFBIG: "a file grew larger than this file system or `ulimit -f` allows",
}


def disk_fault(error: BaseException) -> str | None:
    """Return why the disk cannot store more data. Return None if the error has another cause."""
    if isinstance(error, OSError):
        return _DISK.get(error.errno or 0)
    # Errors of libraries that are written in Rust have the errno only in their message.
    match = re.search(r"\(os error (\d+)\)", str(error))
    return _DISK.get(int(match[1])) if match else None


# Parts of the messages for a failed memory allocation in torch, in the dynamic linker, in
# safetensors, in C++ and in Python's threads.
_OUT_OF_MEMORY = (
    "tried to allocate",
    "failed to map segment from shared object",
    "cannot allocate memory",
    "bad_alloc",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a memory allocation failed, in any library."""
    # Compare torch's OutOfMemoryError by name, because this module does not import torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return any(words in text for words in _OUT_OF_MEMORY)


def is_fault(error: BaseException) -> bool:
    """Return whether an error is an `Exception` or a panic of a Rust library.

    A panic is a BaseException but not an Exception. KeyboardInterrupt and SystemExit are no errors,
    so return False for them.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message with secrets masked.

    If the message is empty, return the name of the error's type.
    """
    lines = str(error).strip().splitlines()
    return mask(lines[0]) if lines else type(error).__name__


_WORD_OF_A_NAME = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORDS = {"passphrase", "auth"}
_SECRET_PARTS = ("secret", "passw", "credential", "apikey")  # can be inside a word: DBPASSWORD
_WORDS_BEFORE_KEY = "api access private auth account signing encryption license".split()
# If one of these words comes before "token", the name does not mean a secret. An example is
# `pad_token` of a tokenizer.
_PLAIN_TOKENS = (
    "pad eos bos unk sep cls mask image video audio start begin end stop special eot eom user"
    " assistant system think next first last per each non new"
).split()


def is_secret_name(name: str) -> bool:
    """Return whether the name of a key or variable shows that its value is a secret.

    Examples are HF_TOKEN, wandb_api_key and hubToken.
    """
    previous = ""
    for word in map(str.lower, _WORD_OF_A_NAME.findall(name)):
        if word in _SECRET_WORDS or any(part in word for part in _SECRET_PARTS):
            return True
        if word == "key" and (previous in _WORDS_BEFORE_KEY or name.isupper()):
            return True
        if word.endswith("token") and previous not in _PLAIN_TOKENS:
            return True
        previous = word
    return False


def mask_words(words: Iterable[str]) -> list[str]:
    """Replace the values of secret flags and variables in a command by ***."""
    masked = []
    after_secret_flag = False
    for word in words:
        name, equals, _ = word.partition("=")
        is_flag = name.startswith("-")
        if equals and is_secret_name(name.rpartition(".")[2]):
            masked.append(f"{name}=***")
        elif after_secret_flag and not is_flag:
            masked.append("***")
        else:
            masked.append(mask(word))
        after_secret_flag = is_flag and not equals and is_secret_name(name)
    return masked


_TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{8,}|sk-[\w-]{8,}|gh[opsu]_[A-Za-z0-9]{8,}|github_pat_\w{8,})\b"
)
_URL_PASSWORD = re.compile(r"(://)[^/\s@]+@")


def mask(text: str) -> str:
    """Replace tokens and the passwords of URLs in a text by ***."""
    return _URL_PASSWORD.sub(r"\1***@", _TOKEN.sub("***", text))
