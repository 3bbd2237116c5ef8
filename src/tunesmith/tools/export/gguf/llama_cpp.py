"""Client of llama.cpp's server, which runs in a child process and serves a GGUF file."""

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
from contextlib import AbstractContextManager
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import torch
from torch import Tensor

from tunesmith.errors import CheckpointError
from tunesmith.host.child_output import exit_text, last_line
from tunesmith.tools.export.gguf.families import SERVE_FOLDER

CHECK_CONTEXT_TOKENS = 256  # context of the server; the prompts of the check are shorter
# Seconds to open a file or to answer a request. A large model on a busy machine needs minutes.
SERVER_TIMEOUT_SECONDS = 600
# Seconds that the process may take to exit after its pipe or connection is closed.
ENDING_SECONDS = 5
# Log probability that is assumed for a token that the server did not report. It is lower than all
# reported values.
UNREPORTED = -50.0
# Pattern for messages of llama.cpp that state the cause of an error: a refused file, a failed
# assertion or a C++ exception. Later messages only describe the consequences.
_CAUSE = re.compile(r"error loading model: (.+)|(GGML_ASSERT.+)|what\(\): *(.+)")


def has_llama_cpp() -> bool:
    return find_spec("xllamacpp") is not None


class LlamaCpp(AbstractContextManager["LlamaCpp"]):
    """Server for a GGUF file and optionally an adapter, for use in a `with` statement.

    The server listens on a free local port. Raise CheckpointError if llama.cpp cannot open a file.
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
        # Write stderr to a file. With a pipe that nobody reads, llama.cpp would block when the pipe
        # is full.
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            # If llama.cpp aborts, it must not start a debugger to print a backtrace.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        try:
            self._address = self._wait_for_address()
        except BaseException:
            self.close()
            raise

    def _wait_for_address(self) -> str:
        """Return the server's address, which the process prints when the file is open.

        Other lines of the output are ignored, such as those of a debugger after an abort.

        Raise CheckpointError if the process ends or is not ready in time.
        """
        assert self._process.stdout is not None
        stdout = self._process.stdout.fileno()
        deadline = time.monotonic() + SERVER_TIMEOUT_SECONDS
        why = f"the server is not ready after {SERVER_TIMEOUT_SECONDS} seconds"
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
            where=self._file,
            why=why,
            fix=SERVE_FOLDER,
        )

    def _why_ended(self) -> str:
        """Return why the process ended, or "" if it is still running.

        The reason is the cause in llama.cpp's messages. If no message states a cause, it is the
        last message. If there is no message, it is the exit status.
        """
        try:
            code = self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            return ""
        if code == -signal.SIGKILL:
            return exit_text(code)  # llama.cpp cannot write a message when it is killed
        self._messages.seek(0)
        text = self._messages.read().decode(errors="replace")
        if cause := _CAUSE.search(text):
            return next(filter(None, cause.groups()))
        return last_line(text) or exit_text(code)

    def close(self) -> None:
        """Kill the server process. A normal exit can hang, see `serve.py`."""
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def post(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        """Send a request to llama.cpp's server, and return the JSON object of the answer.

        Raise CheckpointError if the server refuses the request, or if the server process ends, for
        example because memory is exhausted.
        """
        address = self._address + path
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=SERVER_TIMEOUT_SECONDS) as answer:
                reply: dict[str, Any] = json.load(answer)
                return reply
        except (OSError, HTTPException) as error:
            why = ""
            if isinstance(error, HTTPError):  # the server refused the request, but still runs
                why = last_line(error.read().decode(errors="replace"))
            raise CheckpointError(
                f"llama.cpp did not answer the request {path}",
                where=self._file,
                why=why or self._why_ended() or str(error),
                fix=f"free memory and run the command again, or {SERVE_FOLDER}",
            ) from error

    def ids(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return the token ids of a text. Special tokens in the text are recognized."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return list(self.post("/tokenize", body)["tokens"])

    def log_probabilities(self, ids: list[int], vocab: int) -> Tensor | None:
        """Return the log probabilities of the token after `ids`: fp32 [vocab].

        Return None if the most likely token is an incomplete UTF-8 character, because the server
        then reports no probabilities.
        """
        # Request all tokens, because the KL divergence needs the entire vocabulary.
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
