"""The errors of tunesmith, as one small tree.

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
    │   ├── StoppedEarlyError   before the first step: there was nothing to save
    │   └── LowMemoryError      the same, because the host's memory is short
    └── OtherRankError        the exit code of the rank that failed, which tells why

Every error says what is wrong, where (file:line, key or step), why, and the command or edit that
fixes it.
"""

import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75

# Likely causes of an end, by the names that failure.json has, in an engineer's words.
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
    "preempted": "Slurm stopped the job: time limit, preemption or scancel",
}


class TunesmithError(Exception):
    """Base of all errors that a user sees.

    Args:
        what: one sentence, without a full stop: what is wrong.
        where: `file:line`, a key of the recipe, a step; empty if it has no place.
        why: the reason; empty if `what` says it.
        fix: the command or edit that fixes it.
        cause: the likely one, a name of CAUSES; empty where unknown.
        failed_rank: of a failed rank, for failure.json: `rank`, `host`, `phase` and `collective`.
    """

    exit_code = EXIT_FAILED
    cause = ""

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        why: str = "",
        fix: str = "",
        cause: str = "",
        failed_rank: Mapping[str, object] = {},
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.fix = fix
        self.cause = cause or self.cause
        self.failed_rank = dict(failed_rank)

    def __str__(self) -> str:
        """The block as the end of a traceback, where the name of the class is before it."""
        return self.text().removeprefix("error: ")

    def _render_traceback_(self) -> list[str]:
        """Return what IPython and Jupyter show in place of a traceback. The name is IPython's."""
        return self.text().splitlines()

    def text(self) -> str:
        """The block for the terminal: a line each, if there is a text.

        What, where, why, the likely cause and the fix, cut where one is endless.
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


class UsageError(TunesmithError):
    """Raised before the first step: the command, recipe, data, model, license or disk."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """A recipe file that cannot be read, or a key or value in it that is wrong."""


class DataError(UsageError):
    """A data file, row or column that cannot be trained on, or a broken token contract."""


class ModelError(UsageError):
    """A model that is missing, not supported, not permitted or damaged."""


@contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Give `where` to a ModelError that is raised in the block and names no place."""
    try:
        yield
    except ModelError as error:
        error.where = error.where or where
        raise


class MachineError(UsageError):
    """This machine lacks something: a package, room on the disk, a folder that can be written."""


class RunError(TunesmithError):
    """The run began and failed; `failure.json` holds the same text."""


class NonFiniteError(RunError):
    """The loss or the gradient norm became NaN or infinite."""

    cause = "not-finite"


class CheckpointError(RunError):
    """A checkpoint could not be written or read."""


class StoppedError(TunesmithError):
    """A signal stopped the run; everything is saved, and the next start resumes there."""

    exit_code = EXIT_STOPPED

    def text(self) -> str:
        """The block without `error:`, for nothing is lost."""
        return super().text().removeprefix("error: ")


class StoppedEarlyError(StoppedError):
    """A signal stopped this process without a save, as before its first step.

    Other ranks may not know of it.
    """


class LowMemoryError(StoppedError):
    """The host's memory is nearly used up; everything is saved.

    The process ends at once: Python's own end takes a second, on a busy machine five.
    """

    cause = "memory"


class OtherRankError(TunesmithError):
    """Another rank of this run failed, and tells why: this one ends with its exit code."""

    def __init__(self, what: str, *, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EFBIG: "a file grew larger than this file system or `ulimit -f` allows",
}


def disk_fault(error: BaseException) -> str | None:
    """Why the disk takes no more data, or None."""
    if isinstance(error, OSError):
        return _DISK.get(error.errno or 0)
    # Libraries in Rust give the number only in their message.
    match = re.search(r"\(os error (\d+)\)", str(error))
    return _DISK.get(int(match[1])) if match else None


# The messages of other libraries where an allocation fails: torch, the dynamic linker, safetensors,
# C++, Python's threads.
_OUT_OF_MEMORY = (
    "tried to allocate",
    "failed to map segment from shared object",
    "cannot allocate memory",
    "bad_alloc",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocation failed, in whichever library."""
    # torch's own class by its name: torch is not loaded here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return any(words in text for words in _OUT_OF_MEMORY)


def is_fault(error: BaseException) -> bool:
    """Return whether an error is an exception of Python or a panic of a library in Rust, which is
    not an `Exception`.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """The first line of another library's error, without secrets; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return mask(lines[0]) if lines else type(error).__name__


_WORD_OF_A_NAME = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORDS = {"passphrase", "auth"}
_SECRET_PARTS = ("secret", "passw", "credential", "apikey")  # also inside a word: DBPASSWORD
_WORDS_BEFORE_KEY = {
    "api",
    "access",
    "private",
    "auth",
    "account",
    "signing",
    "encryption",
    "license",
}
# `pad_token` and the like are words of a tokenizer.
_PLAIN_TOKENS = {
    "pad",
    "eos",
    "bos",
    "unk",
    "sep",
    "cls",
    "mask",
    "image",
    "video",
    "audio",
    "start",
    "begin",
    "end",
    "stop",
    "special",
    "eot",
    "eom",
    "user",
    "assistant",
    "system",
    "think",
    "next",
    "first",
    "last",
    "per",
    "each",
    "non",
    "new",
}


def is_secret_name(name: str) -> bool:
    """Tell whether the name of a key or of a variable says that its value is a secret.

    HF_TOKEN, wandb_api_key, hubToken.
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
    """The words of a command, with *** for the values of secret flags and variables."""
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
    """A text with what has the form of a token, and passwords in addresses, replaced by ***."""
    return _URL_PASSWORD.sub(r"\1***@", _TOKEN.sub("***", text))
