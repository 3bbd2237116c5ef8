"""Fetching from a stand-in Hub, in a process of its own, with its own environment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import DisabledRepoError
from transformers import AutoConfig

from errors import lines_with, refuses
from tunesmith.errors import ModelError
from tunesmith.hub.fetch import fetch_without_weights
from tunesmith.hub.hub_calls import hub_calls, hub_error
from warm import read_hub_settings, run_warm

from .standin import COMMIT, Repo, StandIn, sha256

pytestmark = pytest.mark.slow

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123456789"
NAME = "someone/tiny"

CLIENT = """
import json, sys, time
from tunesmith.config.schema import Model
from tunesmith.errors import TunesmithError
from tunesmith.host.logger import PACKAGE, StderrHandler
from tunesmith.hub import fetch
pause = time.sleep
time.sleep = lambda seconds: pause(min(seconds, 0.01))  # between the tries of huggingface_hub
spec = json.loads(sys.argv[1])
if "free" in spec:
    import shutil
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=spec["free"])
PACKAGE.addHandler(StderrHandler())
PACKAGE.setLevel("INFO")
try:
    print(json.dumps({"folder": str(fetch.fetch(Model(**spec["model"])))}))
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


def test_a_connection_that_always_breaks_ends_with_words(ask, files) -> None:
    with StandIn({NAME: Repo(files, cut=[0] * 20)}) as hub:
        answer, _ = ask(hub)
        assert_refused(answer, "cannot be reached", "finished downloads are kept")


def test_a_busy_hub_is_named(ask, files) -> None:
    with StandIn({NAME: Repo(files, failing=99)}) as hub:
        assert_refused(ask(hub)[0], "HTTP status 503", "try again later")


def test_what_is_left_of_a_killed_download_is_not_taken_for_the_model(ask, files) -> None:
    with StandIn({NAME: Repo(files)}) as hub:
        blobs = ask.home / "hub" / f"models--{NAME.replace('/', '--')}" / "blobs"
        blobs.mkdir(parents=True)
        data = files["model.safetensors"]
        (blobs / f"{sha256(data)}.0123abcd.incomplete").write_bytes(data[: len(data) // 2])
        answer, _ = ask(hub)
        assert (Path(answer["folder"]) / "model.safetensors").read_bytes() == data


def test_an_error_of_the_library_for_large_files_is_ours(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    reason = "xet: the token has expired"
    with refuses(ModelError, names=[NAME]) as caught, hub_calls(NAME):
        raise RuntimeError(reason)
    assert reason in caught.value.why


def test_a_disabled_model_is_not_told_to_log_in() -> None:
    response = SimpleNamespace(status_code=403, headers={}, request=None)
    text = hub_error(
        DisabledRepoError("disabled-by-its-owner", response=response), NAME, None
    ).text()
    assert "disabled-by-its-owner" in text
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
            answer,
            "not enough disk space",
            " missing",
            "HF_HOME",
            str(ask.home),
            kind="MachineError",
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
    assert caught.value.fix == "run `HF_HUB_OFFLINE=0 tunesmith fetch someone/tiny`"


def test_a_snapshot_that_lost_a_file_is_made_whole(ask, files) -> None:
    with StandIn({NAME: Repo(files)}) as hub:
        folder = Path(ask(hub)[0]["folder"])
        weights = folder / "model.safetensors"
        weights.resolve().unlink()
        weights.unlink()
        assert_refused(ask(None, offline=True)[0], "not complete")
        assert Path(ask(hub)[0]["folder"]) == folder
        assert weights.read_bytes() == files["model.safetensors"]
