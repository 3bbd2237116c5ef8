"""Run directories to watch, made in a moment, and `tunesmith watch` as a process."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from records import record
from warm import MAX_WAIT_S


def write_run(folder: Path, steps: int, *, of: int | None = None, ranks: int = 1) -> Path:
    """A run that took `steps` of `of` steps, on a GPU."""
    folder.mkdir(parents=True)
    train = {"duration": f"{of or steps} steps", "learning_rate": 1e-4}
    (folder / "config.yaml").write_text(json.dumps({"train": train, "model": {"name": "org/base"}}))
    (folder / "env.json").write_text(json.dumps({"recipe_hash": "0", "python": "3.11"}))
    add_steps(folder, 1, steps)
    for rank in range(1, ranks):
        values = {"gpu_power_watts": 300.0, "loss": 9.0}
        with (folder / f"metrics-rank{rank}.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                memory = 1.0 + rank + step % 2 / 100
                print(json.dumps({"step": step, "memory_gib": memory, **values}), file=file)
    with (folder / "samples.jsonl").open("w") as file:
        for step, answer in ((0, "no idea"), (steps // 2, "a lamp"), (steps, "two lamps")):
            row = {"step": step, "prompt": "What is ordered?", "answer": answer}
            print(json.dumps(row), file=file)
    log = "2026-01-01 10:00:00  warning: 3 rows were cut\n2026-01-01 10:00:01  step 1\n"
    (folder / "log.txt").write_text(log)
    if steps == (of or steps):
        (folder / "final").mkdir()
        (folder / "final/manifest.json").write_text(json.dumps({"step": steps, "files": {}}))
    return folder


def add_steps(folder: Path, first: int, last: int) -> None:
    gpu = {"gpu_utilization": 97.0, "gpu_power_watts": 310.0, "mfu": 0.4, "idle_share": 0.01}
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            loss = 1.0 + math.exp(-step / 100)
            held = {"val_loss": loss + 0.1} if step % 20 == 0 else {}
            file.write(record(step, loss=loss, epoch=step / 100, **gpu, **held).to_json() + "\n")


@contextmanager
def watching(*words: str | Path, **env: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`tunesmith watch WORDS` and its address; ctrl-C ends it."""
    command = [sys.executable, "-m", "tunesmith", "watch", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, **pipes, text=True, env={**os.environ, **env})
    try:
        assert process.stdout is not None
        said, found = "", None
        # Lines before the address name runs that are left out.
        while not found and (line := process.stdout.readline()):
            said += line
            found = re.search(r"http://\S+", line)
        assert found, said
        yield found[0], process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=MAX_WAIT_S)


def port_of(address: str) -> int:
    return int(urlsplit(address).port or 0)


def ask(
    address: str, path: str = "", *, method: str = "GET", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of a request; `host` overrides the header of that name."""
    from http.client import HTTPConnection

    parts = urlsplit(address)
    connection = HTTPConnection("127.0.0.1", port_of(address), timeout=MAX_WAIT_S)
    connection.putrequest(method, parts.path + path, skip_host="host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    try:
        named = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, answer.read(), named
    finally:
        connection.close()
