"""What is said where llama.cpp refuses a file, aborts or is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import gguf
import pytest

from errors import refuses
from export.tiny_gguf import byte_level, random_model, structure_of, write_model
from tunesmith.errors import CheckpointError
from tunesmith.tools.export.gguf import llama_cpp as module
from tunesmith.tools.export.gguf.llama_cpp import LlamaCpp


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("xllamacpp")
    tokenizer = byte_level(structure_of("gpt-2"))
    return write_model(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf", random_model("llama"), tokenizer
    )


def damaged(file: Path, key: str, value: float) -> Path:
    """A copy of the file with another number in its header."""
    copy = file.with_name(f"{key}.gguf")
    shutil.copy(file, copy)
    reader = gguf.GGUFReader(copy, "r+")
    field = reader.get_field(key)
    assert field is not None
    field.parts[field.data[0]][0] = value
    reader.data.flush()
    return copy


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        # llama.cpp refuses these two with an error.
        ("llama.attention.head_count", 3, "'blk.0.attn_q.weight' has wrong shape"),
        ("llama.block_count", 1, "wrong number of tensors; expected 21, got 12"),
        # It aborts: an assertion of ggml fails.
        ("llama.attention.layer_norm_rms_epsilon", -1.0, "GGML_ASSERT(eps >= 0.0f) failed"),
    ],
)
def test_the_cause_is_that_of_llama_cpp(
    whole_file: Path, key: str, value: float, cause: str
) -> None:
    file = damaged(whole_file, key, value)
    with refuses(CheckpointError, where=str(file)) as caught, LlamaCpp(file) as server:
        server.ids("a")
    assert cause in caught.value.why


def test_a_request_that_is_refused_says_why(whole_file: Path) -> None:
    with LlamaCpp(whole_file) as server:
        with refuses(CheckpointError, where=str(whole_file)) as caught:
            server.post("/completion", {"prompt": [10**6], "n_predict": 1})
        assert "invalid" in caught.value.why.lower()
        assert server.ids("a")  # it serves on


def test_a_killed_server_is_said_to_be_killed(whole_file: Path) -> None:
    with LlamaCpp(whole_file) as server:
        os.kill(server._process.pid, signal.SIGKILL)
        with refuses(CheckpointError) as caught:
            server.ids("a")
    assert "SIGKILL" in caught.value.why
    assert "memory" in caught.value.why


# A debugger prints such lines where a process aborts.
JUNK = "echo '[New LWP 18166]'; echo 'see http://www.gnu.org/software/gdb/'"


def start_script(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a shell script in the place of the server's process."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    real = subprocess.Popen

    def started(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return real([str(script), *command[1:]], **options)

    monkeypatch.setattr(module.subprocess, "Popen", started)


def test_only_a_line_that_begins_with_http_is_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_script(f"{JUNK}; echo http://127.0.0.1:9; cat", tmp_path, monkeypatch)
    with LlamaCpp(tmp_path / "any.gguf") as server:
        assert server._address == "http://127.0.0.1:9"


def test_a_process_that_prints_junk_and_ends_is_an_error_with_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_script(f"{JUNK}; echo ENOSPC >&2; exit 3", tmp_path, monkeypatch)
    with refuses(CheckpointError) as caught, LlamaCpp(tmp_path / "any.gguf"):
        pass
    assert caught.value.why == "ENOSPC"
    start_script(f"{JUNK}; exit 3", tmp_path, monkeypatch)
    with refuses(CheckpointError) as caught, LlamaCpp(tmp_path / "any.gguf"):
        pass
    assert "code 3" in caught.value.why
