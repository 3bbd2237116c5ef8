"""The page's server as a process: who gets an answer, what it says, and what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from errors import check_shown, holds
from tunesmith.cli.main import main
from warm import MAX_WAIT_S
from watching import add_steps, ask, port_of, watching, write_run

pytestmark = pytest.mark.slow

Served = tuple[str, subprocess.Popen[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("watch") / "run", 40, of=100)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with watching(folder) as made:
        yield made


def test_a_wrong_or_missing_token_gets_nothing(served: Served) -> None:
    """Nor does any file."""
    address, _ = served
    token = urlsplit(address).path.strip("/")
    base = address.removesuffix(f"{token}/")
    assert len(token) >= 32
    wrong = ["", "state", f"{token[:-1]}/", f"{token}x/", f"x{token}/", f"{token.swapcase()}/",
             f"x/{token}/", f"?token={token}", f"..%2f{token}/", "page.css", "%00", "%ff"]  # fmt: skip
    for path in wrong:
        status, body, headers = ask(base, path)
        assert (status, body) == (404, b""), path
        assert headers.keys() <= {"transfer-encoding", "content-length", "connection"}, path
    for path in ("../server.py", "..%2fserver.py", "%2fetc/passwd", "metrics.jsonl"):
        assert ask(address, path)[0] == 404, path


def test_only_this_machine_gets_the_page_which_asks_only_here(served: Served) -> None:
    for host in ("evil.example:80", "127.0.0.1.evil.example", "[::1]", "0.0.0.0", ""):
        assert ask(served[0], host=host)[:2] == (404, b""), host
    for host in ("localhost:9000", "127.0.0.1:1234"):  # as through ssh -L
        assert b"tunesmith" in ask(served[0], host=host)[1]
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(served[0], method=method)[:2] == (404, b"")
    listening = [
        (place.laddr.ip, place.laddr.port)
        for place in psutil.Process(served[1].pid).net_connections("all")
        if place.status == psutil.CONN_LISTEN
    ]
    assert listening == [("127.0.0.1", port_of(served[0]))]
    _, body, headers = ask(served[0])
    policy = headers["content-security-policy"].split(";")
    rules = dict(rule.strip().split(" ", 1) for rule in policy)
    assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert b"script-src 'sha256-" in body, "only the page's own script runs"


def test_the_page_is_rendered_again_when_files_change(folder: Path, served: Served) -> None:
    _, body, headers = ask(served[0])
    assert b"step 40 of 100" in body
    tag = headers["etag"]
    status, body, headers = ask(served[0], **{"if-none-match": tag})
    assert (status, body, headers["etag"]) == (304, b"", tag)
    add_steps(folder, 41, 45)
    status, body, headers = ask(served[0], **{"if-none-match": tag})
    assert status == 200
    assert b"step 45 of 100" in body
    assert headers["etag"] != tag


def test_a_damaged_run_does_not_freeze_the_page_of_all(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 10, of=100)
    other = write_run(tmp_path / "other", 10, of=100)
    with watching(tmp_path) as (address, _):
        assert ask(address)[1].count(b"step 10 of 100") == 2
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": "x", "loss": 1.0}\n{"step": 11, "loss": {"a": []}}\n')
        add_steps(folder, 12, 15)
        (other / "metrics.jsonl").unlink()
        os.mkfifo(other / "metrics.jsonl")
        page = ask(address)[1].decode()
        assert holds(page, "step 15 of 100", "metrics.jsonl: 2 lines")
        assert holds(page, "metrics.jsonl: the path is not a regular file")


def test_it_ends_at_once_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    with watching(folder, TMPDIR=str(tmp_path)) as (address, process):
        page = HTTPConnection("127.0.0.1", port_of(address), timeout=MAX_WAIT_S)
        page.request("GET", urlsplit(address).path)
        page.getresponse().read()  # the connection stays open
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(MAX_WAIT_S) == 0
        assert time.monotonic() - began < 30  # an open page does not hold it
    assert not [*tmp_path.iterdir()]


def test_a_port_that_is_named_is_used_and_used_again(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Over SSH the command says how to reach it."""
    ssh = {"SSH_CONNECTION": "10.0.0.9 50000 10.0.0.2 22", "USER": "ada"}
    with watching(folder, **ssh) as (address, process):
        port = port_of(address)
        assert process.stdout is not None
        said = "".join(process.stdout.readline() for _ in range(2))
        assert f"ssh -N -L {port}:127.0.0.1:{port} ada@10.0.0.2" in said
        assert main(["watch", str(folder), "--port", str(port)]) == 2
        check_shown(capfd.readouterr().err, where="--port", names=[port], fix=["--port"])
    # Its connections are not forgotten yet.
    with watching(folder, "--port", str(port)) as (address, _):
        assert port_of(address) == port
        assert ask(address)[0] == 200
