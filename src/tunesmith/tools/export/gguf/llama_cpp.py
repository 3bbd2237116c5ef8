"""llama.cpp's server in a process beside this one, and what it says of a GGUF file."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Self, TypedDict
from urllib.error import HTTPError

import torch
from torch import Tensor

from tunesmith.errors import CheckpointError
from tunesmith.host.child_output import exit_text, last_line

CHECK_CONTEXT_TOKENS = 256  # the prompts of the check are shorter
SERVER_TIMEOUT_SECONDS = 600  # to open a file, and of an answer: a large model on a busy machine
ENDING_SECONDS = 5  # for the process to end after its pipe or connection is closed
# Of a token that the server did not report: less likely than all that it did.
UNREPORTED = -50.0
# The causes in llama.cpp's messages: a file that it refuses, a failed assertion, a C++ exception.
# The messages that follow only say what could not be done therefore.
_CAUSE = re.compile(r"error loading model: (.+)|(GGML_ASSERT.+)|what\(\): *(.+)")


def has_llama_cpp() -> bool:
    return find_spec("xllamacpp") is not None


class TokenProbability(TypedDict):
    """One token, and how likely it is."""

    id: int
    logprob: float


class NextToken(TypedDict):
    """The likeliest tokens at a position."""

    top_logprobs: list[TokenProbability]


class Reply(TypedDict, total=False):
    """The parts of the server's answers that are read, each of one address."""

    tokens: list[int]
    completion_probabilities: list[NextToken]
    prompt: str


class LlamaCpp:
    """A GGUF file, and an adapter's beside it, served on a free local port within a `with`.

    CheckpointError where llama.cpp does not open it.
    """

    def __init__(
        self,
        file: Path,
        adapter: Path | None = None,
        *,
        threads: int = 1,
        context: int = CHECK_CONTEXT_TOKENS,
    ) -> None:
        self._file = file
        command = [sys.executable, "-m", "tunesmith.tools.export.gguf.serve"]
        command += [str(file), str(adapter or ""), str(threads), str(context)]
        # A file rather than a pipe: llama.cpp would wait for ever at a full one that nobody reads.
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            # Without a debugger, which an abort would start to print a backtrace.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        try:
            self._address = self._wait_for_address()
        except BaseException:
            self.close()
            raise

    def _wait_for_address(self) -> str:
        """Return the address, which the process prints when the file is open.

        Other lines of its output are no address, such as those of a debugger after an abort.
        """
        assert self._process.stdout is not None
        stdout = self._process.stdout.fileno()
        deadline = time.monotonic() + SERVER_TIMEOUT_SECONDS
        why = f"it is not ready after {SERVER_TIMEOUT_SECONDS} seconds"
        output = b""
        while select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = os.read(stdout, 4096)
            if not part:
                why = self._why_ended()
                break
            output += part
            if address := re.search(rb"^(http\S+)\n", output, re.MULTILINE):
                return address[1].decode()
        raise CheckpointError(
            "llama.cpp cannot open the file",
            where=str(self._file),
            why=why,
            fix="serve the Transformers folder: tunesmith merge RUN",
        )

    def _why_ended(self) -> str:
        """Return the cause in llama.cpp's messages, or the last of them, or how the process ended.

        Return "" if the process is still alive.
        """
        try:
            code = self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            return ""
        if code == -signal.SIGKILL:
            return exit_text(code)  # no message is about it
        self._messages.seek(0)
        text = self._messages.read().decode(errors="replace")
        if cause := _CAUSE.search(text):
            return next(filter(None, cause.groups()))
        return last_line(text) or exit_text(code)

    def close(self) -> None:
        """End the process. It is killed: see `serve.py` for what its own end may do."""
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def post(self, path: str, body: Mapping[str, object]) -> Reply:
        """The answer to a request of llama.cpp's server.

        CheckpointError where it ends meanwhile, as it does where memory runs short.
        """
        address = self._address + path
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=SERVER_TIMEOUT_SECONDS) as answer:
                reply: Reply = json.load(answer)
                return reply
        except (OSError, HTTPException) as error:
            why = ""
            if isinstance(error, HTTPError):  # the server refuses the request, and lives
                why = last_line(error.read().decode(errors="replace"))
            raise CheckpointError(
                f"llama.cpp gives no answer to {path}",
                where=str(self._file),
                why=why or self._why_ended() or str(error),
                fix="free memory and try again, or serve the Transformers folder: "
                "tunesmith merge RUN",
            ) from error

    def ids(self, text: str, *, add_special: bool = True) -> list[int]:
        """The token ids of a text, special tokens in it among them."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return self.post("/tokenize", body)["tokens"]

    def log_probabilities(self, ids: list[int], vocab: int) -> Tensor | None:
        """Ask the server for the log probabilities of the token after `ids`: fp32 [vocab].

        None where the likeliest is half a letter, which the server does not report.
        """
        # All tokens, so that a KL over the whole vocabulary can be computed.
        body = {
            "prompt": ids,
            "n_predict": 1,
            "n_probs": vocab,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        answer = self.post("/completion", body)
        if "completion_probabilities" not in answer:
            return None
        values = torch.full((vocab,), UNREPORTED)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            values[token["id"]] = token["logprob"]
        return values
