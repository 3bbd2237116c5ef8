"""Fetching from a stand-in Hub, in a process of its own, with its own environment."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import DisabledRepoError
from transformers import AutoConfig

from errors import lines_with, refuses
from tunesmith.errors import ModelError
from tunesmith.host.logger import lines_on_stderr
from tunesmith.hub.fetch import fetch_without_weights
from tunesmith.hub.hub_calls import hub_error
from warm import read_hub_settings, run_warm

from .standin import COMMIT, Repo, StandIn, sha256

pytestmark = pytest.mark.slow

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123456789"
NAME = "someone/tiny"

CLIENT = """
import json, sys
from tunesmith.config.schema import Model
from tunesmith.errors import TunesmithError
from tunesmith.host.logger import PACKAGE, StderrHandler
from tunesmith.hub import download, fetch, hub_calls
hub_calls.PAUSE = 0.01
spec = json.loads(sys.argv[1])
if "free" in spec:
    import shutil
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=spec["free"])
if "kill_after" in spec:
    import contextlib, os
    came = 0
    def advance(count):
        global came
        came += count
        if came >= spec["kill_after"]: os._exit(9)
    progress = download.FetchProgress()
    progress.transfer = lambda *_: contextlib.nullcontext(advance)
else:
    progress = None
PACKAGE.addHandler(StderrHandler())
PACKAGE.setLevel("INFO")
try:
    print(json.dumps({"folder": str(fetch.fetch(Model(**spec["model"]), progress=progress))}))
except TunesmithError as error:
    print(json.dumps({"error": error.text(), "code": error.exit_code, "kind": type(error).__name__}))
"""


@pytest.fixture(scope="module")
def files(tiny: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in tiny.iterdir()} | {
        "README.md": b"hello",
        "LICENSE": b"Apache",
    }


@pytest.fixture
def ask(tmp_path: Path):
    """Run a fetch against a stand-in; returns (answer, stderr)."""

    def call(
        hub: StandIn | None,
        *,
        token: str | None = None,
        offline: bool = False,
        env: dict | None = None,
        **spec,
    ):
        spec.setdefault("model", {"name": NAME})
        clean = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("HF_") and not k.lower().endswith("_proxy")
        }
        env = (
            clean
            | (env or {})
            | {
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "1" if offline else "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9",
            }
        )
        if token:
            env["HF_TOKEN"] = token
        done = run_warm([json.dumps(spec)], program=CLIENT, env=env, prepare=read_hub_settings)
        assert "Traceback" not in done.stderr, done.stderr
        for secret in (TOKEN, "s3cr3t"):
            assert secret not in done.stdout + done.stderr
        return json.loads(done.stdout) if done.stdout else {"exit": done.returncode}, done.stderr

    call.home = tmp_path / "home"
    return call


def part_of(home: Path, files: dict[str, bytes]) -> Path:
    blobs = home / "hub" / f"models--{NAME.replace('/', '--')}" / "blobs"
    return blobs / f"{sha256(files['model.safetensors'])}.tunesmith.incomplete"


def assert_refused(answer: dict, *words: str, kind: str = "ModelError") -> None:
    assert answer.get("kind") == kind, answer
    assert answer["code"] == 2
    for word in (*words, "where:", "fix:"):
        assert word in answer["error"], answer["error"]


def test_a_model_is_downloaded_and_then_used_from_the_cache(ask, files, tiny) -> None:
    extra = {
        "pytorch_model.bin": b"x" * 99,
        "model.gguf": b"GGUF",
        "onnx/model.onnx": b"x",
        "consolidated.safetensors": b"x",
    }
    with StandIn({NAME: Repo(files | extra)}) as hub:
        answer, said = ask(hub)
        folder = Path(answer["folder"])
        assert lines_with(said, NAME, "apache-2.0")
        assert {p.name for p in folder.iterdir()} == set(files)
        assert all((folder / n).read_bytes() == data for n, data in files.items())
        asked = len(hub.seen)
        again, _ = ask(hub)
        assert again == answer
        assert len(hub.seen) == asked, "a whole snapshot in the cache asks nothing of the Hub"
        assert not list((ask.home / "hub").rglob("*.incomplete"))
    offline, _ = ask(None, offline=True)
    assert offline == answer


def test_a_killed_download_resumes_where_it_stopped(ask, files) -> None:
    size = len(files["model.safetensors"])
    with StandIn({NAME: Repo(files)}) as hub:
        answer, _ = ask(hub, kill_after=size // 2)
        assert answer == {"exit": 9}
        part = part_of(ask.home, files)
        have = part.stat().st_size
        assert 0 < have < size
        answer, _ = ask(hub)
        assert (Path(answer["folder"]) / "model.safetensors").read_bytes() == files[
            "model.safetensors"
        ]
        last = hub.downloads("/network/someone/tiny/model.safetensors")[-1]
        assert last.range == f"bytes={have}-"


def test_a_broken_connection_is_resumed_in_the_same_run(ask, files) -> None:
    with StandIn({NAME: Repo(files, cut=[5000, 0, 7000])}) as hub:
        answer, _ = ask(hub)
        assert (Path(answer["folder"]) / "model.safetensors").read_bytes() == files[
            "model.safetensors"
        ]
        ranges = [s.range for s in hub.downloads("/network/someone/tiny/model.safetensors")]
        assert ranges == [None, "bytes=5000-", "bytes=5000-", "bytes=12000-"]


def test_a_server_without_ranges_begins_again(ask, files) -> None:
    with StandIn({NAME: Repo(files, cut=[5000], ignores_range=True)}) as hub:
        answer, _ = ask(hub)
        assert (Path(answer["folder"]) / "model.safetensors").read_bytes() == files[
            "model.safetensors"
        ]


def test_a_connection_that_always_breaks_ends_with_words(ask, files) -> None:
    with StandIn({NAME: Repo(files, cut=[0] * 20)}) as hub:
        answer, _ = ask(hub)
        assert_refused(answer, "cannot be reached", "finished downloads are kept")


def test_a_silent_connection_is_left_and_resumed(ask, files) -> None:
    with StandIn({NAME: Repo(files, stall=1)}) as hub:
        answer, _ = ask(hub, env={"HF_HUB_DOWNLOAD_TIMEOUT": "1"})
        assert (Path(answer["folder"]) / "model.safetensors").read_bytes() == files[
            "model.safetensors"
        ]
        half = len(files["model.safetensors"]) // 2
        assert (
            hub.downloads("/network/someone/tiny/model.safetensors")[-1].range == f"bytes={half}-"
        )


def test_damaged_bytes_are_not_kept(ask, files) -> None:
    with StandIn({NAME: Repo(files, bad_byte=True)}) as hub:
        answer, _ = ask(hub)
        assert_refused(answer, "model.safetensors is damaged")
        assert not part_of(ask.home, files).exists()


def test_a_busy_hub_is_asked_again(ask, files) -> None:
    with StandIn({NAME: Repo(files, failing=3)}) as hub:
        answer, _ = ask(hub)
        assert "folder" in answer
    with StandIn({"someone/other": Repo(files, failing=99)}) as hub:
        answer, _ = ask(hub, model={"name": "someone/other"})
        assert_refused(answer, "answers 503", "try again later")


def test_a_disabled_model_is_not_told_to_log_in() -> None:
    response = SimpleNamespace(status_code=403, headers={}, request=None)
    text = hub_error(DisabledRepoError("no access", response=response), NAME, None).text()
    assert "disabled" in text
    assert "licence" not in text


@pytest.mark.parametrize(
    ("token", "words"),
    [(None, ("no token found", "hf auth login")), (TOKEN, ("your token's account",))],
)
def test_a_gated_model_names_the_page_to_ask_on(ask, files, token, words) -> None:
    with StandIn(
        {NAME: Repo(files, gated=True, card={"license": "other", "license_name": "tiny-licence"})}
    ) as hub:
        answer, said = ask(hub, token=token)
        assert_refused(answer, "gated", f"{hub.url}/{NAME}", "cause: licence: ", *words)
        assert lines_with(said, NAME, "tiny-licence"), (
            "the licence is told before access is asked for"
        )
        assert not hub.downloads("model.safetensors")


def test_a_granted_token_is_used_but_not_given_to_the_content_network(ask, files) -> None:
    with StandIn({NAME: Repo(files, gated=True, granted=TOKEN)}) as hub:
        answer, _ = ask(hub, token=TOKEN)
        assert "folder" in answer
        assert {s.token for s in hub.seen if "/resolve/" in s.path} == {TOKEN}
        assert {s.token for s in hub.seen if s.path.startswith("/network/")} == {None}


def test_what_is_not_there_is_named(ask, files) -> None:
    with StandIn({NAME: Repo(files)}) as hub:
        assert_refused(
            ask(hub, model={"name": "someone/else"})[0], "no model someone/else", "private"
        )
        assert_refused(
            ask(hub, model={"name": NAME, "revision": "v9"})[0], "no revision 'v9'", "/tree/main"
        )
        assert ask(hub, model={"name": NAME, "revision": "v2"})[0]["folder"].endswith(COMMIT)


def test_pickled_weights_are_refused_with_the_command_that_converts(ask, files) -> None:
    pickled = {n: d for n, d in files.items() if n != "model.safetensors"} | {
        "pytorch_model.bin": b"x"
    }
    with StandIn({NAME: Repo(pickled)}) as hub:
        answer, _ = ask(hub)
        assert_refused(answer, "pickled", "python -c 'import sys; from transformers import", NAME)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"model.Q4.gguf": b"GGUF"}, "hf download"),
        ({"adapter_config.json": b"{}"}, "adapter.from"),
        ({}, "no weights"),
    ],
)
def test_other_repositories_are_told_apart(ask, files, others, words) -> None:
    with StandIn({NAME: Repo({"config.json": files["config.json"]} | others)}) as hub:
        assert_refused(ask(hub)[0], words)


def test_a_kind_that_is_not_trained_is_refused_before_its_weights_come(ask, files) -> None:
    config = AutoConfig.for_model("modernbert-decoder").to_json_string().encode()
    with StandIn({NAME: Repo(files | {"config.json": config})}) as hub:
        assert_refused(ask(hub)[0], "modernbert-decoder is not supported", "llama")
        assert not [s for s in hub.seen if "model.safetensors" in s.path]


def test_a_missing_shard_is_found_before_the_download(ask, files) -> None:
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    shards = {n: d for n, d in files.items() if n != "model.safetensors"}
    shards |= {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": b"x",
    }
    with StandIn({NAME: Repo(shards)}) as hub:
        assert_refused(ask(hub)[0], "model-00002-of-00002.safetensors")


def test_a_full_disk_says_how_much_is_missing(ask, files) -> None:
    with StandIn({NAME: Repo(files)}) as hub:
        answer, _ = ask(hub, free=1 << 20)
        assert_refused(
            answer, "no room on the disk", " short", "HF_HOME", str(ask.home), kind="MachineError"
        )
        assert not hub.downloads("network/someone/tiny/model.safetensors")


def test_a_cache_that_cannot_be_made_is_named(ask, files) -> None:
    ask.home.parent.mkdir(exist_ok=True)
    ask.home.write_text("a file where the cache should be")
    with StandIn({NAME: Repo(files)}) as hub:
        assert_refused(ask(hub)[0], "cache cannot be written", "HF_HOME", kind="MachineError")


def test_without_a_network_or_cache(ask) -> None:
    assert_refused(ask(None)[0], "cannot be reached", "HF_ENDPOINT")
    assert_refused(ask(None, offline=True)[0], "HF_HUB_OFFLINE", "tunesmith fetch")


def test_a_tokenizer_that_is_not_here_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train --model --data` asks for it first, by a call whose error says nothing of being
    offline.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with refuses(ModelError, names=["someone/tiny", "HF_HUB_OFFLINE"]) as caught:
        fetch_without_weights("someone/tiny")
    assert caught.value.fix == "HF_HUB_OFFLINE=0 tunesmith fetch someone/tiny"


def test_a_snapshot_that_lost_a_file_is_made_whole(ask, files) -> None:
    with StandIn({NAME: Repo(files)}) as hub:
        folder = Path(ask(hub)[0]["folder"])
        weights = folder / "model.safetensors"
        weights.resolve().unlink()
        weights.unlink()
        assert_refused(ask(None, offline=True)[0], "not complete")
        assert Path(ask(hub)[0]["folder"]) == folder
        assert weights.read_bytes() == files["model.safetensors"]


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch) -> None:
    from tunesmith.hub.download import FetchProgress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen, file, unused = Terminal(), io.StringIO(), Terminal()
    line = "fetching a/b: 2.0 kB, 500 bytes already downloaded\n"
    for stream, draws_bar in ((screen, True), (file, True), (unused, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        progress = FetchProgress(draws_bar=draws_bar)
        with lines_on_stderr(), progress.transfer("a/b", 2000, 500) as advance:
            advance(1500)
    assert "a/b" in screen.getvalue()
    assert "2.00k/2.00k" in screen.getvalue()
    assert file.getvalue() == unused.getvalue() == line
