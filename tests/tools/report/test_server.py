"""The page's server as a process: who gets an answer, what it says, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from errors import check_shown, lines_with
from tunesmith.cli.main import main
from waiting import wait_for
from warm import MAX_WAIT_S
from watching import add_steps, ask, get, port_of, watching, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("watch") / "run", 40, of=100)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with watching(folder) as made:
        yield made


def test_a_wrong_or_missing_token_gets_nothing(served: tuple[str, subprocess.Popen[str]]) -> None:
    address, _ = served
    token = urlsplit(address).path.strip("/")
    base = address.removesuffix(f"{token}/")
    assert len(token) >= 32
    wrong = ["", "state", "curves", f"{token[:-1]}/", f"{token}x/", f"x{token}/", f"{token.swapcase()}/", f"x/{token}/",
             f"?token={token}", f"..%2f{token}/", "run.js", "%00", "%ff", "%c3%a9"]  # fmt: skip
    for path in wrong:
        status, body, headers = ask(base, path)
        assert (status, body) == (404, b""), path
        assert headers.keys() <= {"transfer-encoding", "content-length", "connection"}, path


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::1]", "0.0.0.0", ""]
)
def test_another_host_name_gets_nothing(
    served: tuple[str, subprocess.Popen[str]], host: str
) -> None:
    assert ask(served[0], host=host)[:2] == (404, b"")


def test_this_machine_gets_the_page_through_any_port(
    served: tuple[str, subprocess.Popen[str]],
) -> None:
    for host in ("localhost:9000", "127.0.0.1:1234", "127.0.0.1"):  # as through ssh -L
        assert b"tunesmith" in ask(served[0], host=host)[1]
    for method in ("POST", "PUT", "OPTIONS", "HEAD"):
        assert ask(served[0], method=method)[:2] == (404, b"")
    base = served[0].rpartition("/")[0].rpartition("/")[0]
    upgrade = {
        "upgrade": "websocket",
        "connection": "Upgrade",
        "sec-websocket-key": "x" * 22 + "==",
        "sec-websocket-version": "13",
    }
    assert ask(f"{base}/wrong/state", **upgrade)[:2] == (404, b"")


def test_the_page_may_load_from_here_alone(served: tuple[str, subprocess.Popen[str]]) -> None:
    for path in (
        "",
        "run.js",
        "plots.js",
        "uPlot.iife.min.js",
        "uPlot.min.css",
        "icon.svg",
        "curves",
        "missing",
    ):
        status, _, headers = ask(served[0], path)
        assert status == (404 if path == "missing" else 200), path
        rules = dict(
            rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";")
        )
        assert {*rules.values()} == {"'none'", "'self'"}
        assert rules["default-src"] == "'none'"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_no_file_beside_the_static_ones_is_served(
    served: tuple[str, subprocess.Popen[str]],
) -> None:
    for path in (
        "../server.py",
        "%2e%2e/server.py",
        "..%2fserver.py",
        "%2fetc/passwd",
        "static/list.html",
    ):
        assert ask(served[0], path)[0] == 404, path


def test_it_listens_on_loopback_alone(served: tuple[str, subprocess.Popen[str]]) -> None:
    address, process = served
    listening = [
        c.laddr
        for c in psutil.Process(process.pid).net_connections("all")
        if c.status == psutil.CONN_LISTEN
    ]
    assert [(place.ip, place.port) for place in listening] == [("127.0.0.1", port_of(address))]


def test_what_was_added_is_told(folder: Path, served: tuple[str, subprocess.Popen[str]]) -> None:
    assert get(served[0], "state")["runs"][0]["step"] == 40
    add_steps(folder, 41, 45)
    assert get(served[0], "state")["runs"][0]["step"] == 45
    assert get(served[0], "curves?points=10")[0]["series"][0]["x"][-1] == 45
    assert [row["step"] for row in get(served[0], "texts")[0]["samples"]] == [0, 20, 40]
    assert b"100 steps" in ask(served[0])[1]
    for path in ("curves?from=x", "curves?points=", "curves?points=1e9"):
        assert ask(served[0], path)[0] == 400


def test_a_damaged_line_does_not_freeze_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 10, of=100)
    other = write_run(tmp_path / "other", 10, of=100)
    with watching(folder, other) as (address, _):
        assert get(address, "state")["runs"][0]["step"] == 10
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": "x", "loss": 1.0}\n{"step": 11, "loss": {"a": []}}\n')
        add_steps(folder, 12, 15)
        first = get(address, "state")["runs"][0]
        assert first["step"] == 15
        assert [(file["file"], file["lines"]) for file in first["damaged"]] == [
            ("metrics.jsonl", 2)
        ]
        (other / "metrics.jsonl").unlink()
        os.mkfifo(other / "metrics.jsonl")
        add_steps(folder, 16, 20)
        second = get(address, "state")["runs"]
        assert second[0]["step"] == 20
        damage = second[1]["damaged"][0]
        assert (damage["file"], damage["lines"]) == ("metrics.jsonl", None)
        assert damage["why"]
        assert get(address, "curves?points=10")[0]["series"][0]["x"][-1] == 20


def test_one_bad_run_does_not_end_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(folder / "missing"), str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [run["name"] for run in json.loads(out)["runs"]] == ["run"]
    assert lines_with(err, folder / "missing")
    assert "missing" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_ends_at_once_and_leaves_nothing(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with watching(folder, TMPDIR=str(tmp_path)) as (address, process):
        page = HTTPConnection("127.0.0.1", port_of(address), timeout=MAX_WAIT_S)
        page.request("GET", f"{urlsplit(address).path}state")
        page.getresponse().read()  # the connection stays open
        children = psutil.Process(process.pid).children(recursive=True)
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(MAX_WAIT_S) == 0
        assert time.monotonic() - began < 30  # an open page does not hold it
        assert process.stdout is not None
        # The second of the two lines that it began with
        assert process.stdout.read().count("\n") == 1
    assert not children
    assert not [*tmp_path.iterdir()]


def test_the_status_for_a_script(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(run["name"], run["state"], run["steps"]) for run in told["runs"]] == [
        ("run", "killed", 100)
    ]
    assert main(["watch", str(folder / "missing"), "--json"]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "host", "place"),
    [
        ("spark-b:runs/my-run", "spark-b", "runs/my-run"),
        ("ada@10.0.0.2:~/a b", "ada@10.0.0.2", "'a b'"),
    ],
)
def test_a_run_of_another_host_is_refused_with_the_commands_to_type(
    word: str, host: str, place: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([word], [str(folder), word], [word, "--json"]):
        assert main(["watch", *words]) == 2
        err = capsys.readouterr().err
        check_shown(
            err, where=f"command line: {word}", fix=[f"ssh {host}", f"tunesmith watch {place}"]
        )
        assert err.rstrip().endswith(f"ssh -N -L PORT:127.0.0.1:PORT {host}")


def test_a_colon_in_the_name_of_a_run_is_no_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(write_run(tmp_path / "a:b", 3)), "--json"]) == 0
    assert main(["watch", "-oProxyCommand=x:run", "--json"]) == 2
    assert "ssh" not in capsys.readouterr().err


def test_over_ssh_it_says_how_to_reach_it(folder: Path) -> None:
    with watching(folder, SSH_CONNECTION="10.0.0.9 50000 10.0.0.2 22", USER="ada") as (
        address,
        process,
    ):
        port = port_of(address)
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(2)]
        assert any(f"ssh -N -L {port}:127.0.0.1:{port} ada@10.0.0.2" in line for line in said)


def test_nothing_heavy_is_loaded(folder: Path) -> None:
    code = f"import sys; from tunesmith.cli.main import main; main(['watch', {str(folder)!r}, '--json']); " \
           "sys.exit(bool({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=MAX_WAIT_S, stdout=subprocess.DEVNULL
    )


def test_nobody_looks_while_no_page_is_open(folder: Path) -> None:
    """The runs are read for pages that are open: a forgotten watch costs nothing."""
    with watching(folder) as (_, process):
        proc = psutil.Process(process.pid)
        wait_for(lambda: proc.status() == psutil.STATUS_SLEEPING)
        before = proc.io_counters().read_chars
        time.sleep(2.5)
        assert proc.io_counters().read_chars - before < 2000


def test_a_folder_of_runs_is_a_list_and_each_has_a_page(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, 10, of=100)
    with watching(tmp_path) as (address, _):
        rows: dict[str, Any] = {}
        look = 0

        def ask_for_rows() -> list[tuple[str, int]]:
            """Ask as the page does: a look ends in time, so that one answer may lack a run."""
            nonlocal look
            told = get(address, f"rows?since={look}")
            look = told["look"]
            rows.update((row["name"], row) for row in told["rows"])
            return [(row["name"], row["step"]) for row in told["rows"]]

        wait_for(lambda: ask_for_rows() and len(rows) == 2)
        assert {name: row["step"] for name, row in rows.items()} == {"a": 10, "b": 10}
        add_steps(tmp_path / "b", 11, 12)
        changed: list[tuple[str, int]] = []
        wait_for(lambda: changed.extend(ask_for_rows()) or changed)
        # Only the row that has changed is sent.
        assert changed == [("b", 12)]
        one, two = (row["id"] for row in rows.values())
        assert b"<canvas" not in ask(address)[1]
        assert b"run.js" in ask(address, f"runs/{one}/")[1]
        assert get(address, f"runs/{one}/curves?points=10")[0]["series"][0]["x"][-1] == 10
        both = get(address, f"runs/{two},{one}/curves?points=10")[0]["series"]
        assert [line["x"][-1] for line in both if not line["smoothed"]] == [12, 10]
        for path in ("runs/2/curves", "runs/-1/curves", "runs/x/state", "runs/0/../../x"):
            assert ask(address, path)[0] == 404, path
        assert ask(address, "rows?since=x")[0] == 400


def test_the_status_of_all_runs_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, 10)
    assert main(["watch", str(tmp_path), "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["a", "b"]


def test_a_port_that_is_named_is_used_and_used_again(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with watching(folder) as (address, _):
        port = port_of(address)
        assert main(["watch", str(folder), "--port", str(port)]) == 2
        check_shown(capfd.readouterr().err, where="--port", names=[port], fix=["--port"])
    # Its connections are not forgotten yet.
    with watching(folder, "--port", str(port)) as (address, _):
        assert port_of(address) == port
        assert ask(address)[0] == 200
    for word in ("65536", "-1", "http"):
        assert main(["watch", str(folder), f"--port={word}"]) == 2
        assert word in capfd.readouterr().err
