"""Several processes give the tokens, counts and errors of one, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from conftest import byte_tokenizer
from errors import is_internal, refuses
from ranks import FORKS
from recipes import recipe
from tunesmith.config.schema import Data, Source
from tunesmith.errors import DataError, MachineError
from tunesmith.host import workers as pool
from tunesmith.rows.compare.splits import read_splits
from tunesmith.tokens import workers
from tunesmith.tokens.encode import RowBatch, RowEncoder
from tunesmith.tokens.text import select_template as select_template_module
from tunesmith.tokens.text.select_template import select_template
from tunesmith.tokens.text.template import Template
from tunesmith.tokens.token_set import TokenSet
from tunesmith.tokens.tokenize import tokenize
from tunesmith.tokens.workers import encode_batches
from waiting import TIME
from warm import Warm

pytestmark = pytest.mark.slow

Made = list[Any]


class ForkedWorker:
    """A worker's process with what `workers` uses of a Popen: forked, so that it imports nothing."""

    def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
        requests, to_worker = os.pipe()
        from_worker, answers = os.pipe()
        streams = (requests, answers, 2)
        self._process = Warm([], program=command[2], env=env, streams=streams, prepare=os.setsid)
        os.close(requests)
        os.close(answers)
        self.stdin = os.fdopen(to_worker, "wb")
        self.stdout = os.fdopen(from_worker, "rb")
        self.poll, self.wait = self._process.poll, self._process.wait
        self.kill, self.pid = self._process.kill, self._process.pid


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """The processes that were started; a worker for every 100 rows, whatever this machine has."""
    processes = Made()

    def started(*args: Any, **options: Any) -> Any:
        start = ForkedWorker if FORKS else subprocess.Popen
        processes.append(start(*args, **options))
        return processes[-1]

    monkeypatch.setattr(pool.subprocess, "Popen", started)
    monkeypatch.setattr(select_template_module, "try_template", lambda *_: None)
    monkeypatch.setattr(workers, "MIN_ROWS_PER_WORKER", 100)
    monkeypatch.setattr(workers, "available_cores", lambda: 3)
    return processes


def line(i: int) -> dict[str, Any]:
    """A conversation; some have flaws, and their lengths differ a hundredfold."""
    turns = [
        {"role": "user", "content": f"say {i} " + "ä" * (i % 97)},
        {"role": "assistant", "content": "{{x}}"[i % 13 % 4 :] * (1 + i % 13)},
    ]
    return {"messages": turns * (1 + i % 3)}


def tokens_of(path: Path, cores: int, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> TokenSet:
    monkeypatch.setattr(workers, "available_cores", lambda: cores)
    data = Data(train=(Source(source=str(path)),), **{"seq_len": 256, **keys})
    tokenizer = byte_tokenizer()
    template = select_template(data, tokenizer, {tokenizer.eos_token_id})
    return tokenize(read_splits(data, 0)[0], data, template, cache=None, what="train")


def test_tokens_and_counts_are_those_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Made
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line(i)) + "\n" for i in range(600)))
    one = tokens_of(tmp_path / "rows.jsonl", 1, monkeypatch)
    assert made == []
    three = tokens_of(tmp_path / "rows.jsonl", 3, monkeypatch)
    assert [process.poll() is not None for process in made] == [True] * 3
    # The digest of all tokens is among the counts.
    assert [p.counts for p in one.parts] == [p.counts for p in three.parts]
    assert one.parts[0].counts.flaws["placeholder"][0] > 40
    assert (one.counts.prompts, one.counts.cut > 0) == (256 + (600 - 256) // 32 + 1, True)
    for a, b in zip(one.parts[0].arrays, three.parts[0].arrays, strict=True):
        assert np.array_equal(a, b)


def test_an_error_names_the_row_that_one_process_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Made
) -> None:
    """Of one batch the row that stands first is named, though it is converted after the other is
    read.
    """
    lines = [json.dumps(line(i)) for i in range(700)]
    lines[590] = json.dumps({"messages": [{"role": "king", "content": "a"}]})
    lines[600] = "{oops"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    said = []
    for cores in (1, 2):
        with refuses(DataError) as caught:
            tokens_of(tmp_path / "rows.jsonl", cores, monkeypatch)
        said.append(caught.value.text())
    assert said[0] == said[1]
    assert f"{tmp_path / 'rows.jsonl'}:" in said[0]
    assert [process.poll() is not None for process in made] == [True] * 2


def encoder() -> RowEncoder:
    tokenizer = byte_tokenizer()
    template = Template(
        tokenizer, {tokenizer.eos_token_id}, jinja=tokenizer.chat_template, name="chat"
    )
    return RowEncoder(template, Source(source="rows.jsonl"), None, "response")


def batches(count: int, before: Callable[[int], None] = lambda k: None) -> Iterator[RowBatch]:
    for k in range(count):
        before(k)
        yield RowBatch(
            k * 9, [line(i) for i in range(k * 9, k * 9 + 9)], [f"row {i}" for i in range(9)]
        )


def test_a_killed_worker_is_told_and_ends_the_others(made: Made) -> None:
    def kill(k: int) -> None:
        if k == 5:
            made[1].kill()

    with refuses(MachineError, names=["dmesg"]) as caught:
        list(encode_batches(encoder(), batches(40, kill), rows=200))
    assert "memory" in caught.value.why
    assert [process.poll() is not None for process in made] == [True] * 2


def test_a_signal_ends_the_workers_without_a_word(tiny: Path, tmp_path: Path) -> None:
    """Also a script that has no `if __name__` guard is not run again by them."""
    rows = "".join(json.dumps(line(i)) + "\n" for i in range(10_000))
    (tmp_path / "train.jsonl").write_text(rows)
    values = recipe(tiny, tmp_path, held=False, data={"train": {"format": "messages"}})
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom tunesmith.tokens import workers\nfrom tunesmith.cli.main import main\n"
        "print('once', flush=True)\nworkers.available_cores = lambda: 2\n"
        f"sys.argv[1:] = ['train', {str(tmp_path / 'recipe.yaml')!r}]\nsys.exit(main())\n"
    )
    environment = os.environ | {"TUNESMITH_CACHE": str(tmp_path / "cache")}
    process = Warm([], program=script, env=environment, prepare=os.setsid)
    try:
        deadline = time.monotonic() + TIME
        while process.poll() is None and time.monotonic() < deadline:
            if any(file.stat().st_size for file in (tmp_path / "cache").rglob("ids.bin")):
                break
            time.sleep(0.02)
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) == 2
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=TIME)
    finally:
        process.kill()
    assert (out, process.returncode) == ("once\n", 75), err
    assert not is_internal(err)
    assert psutil.wait_procs(started, timeout=10)[1] == []
