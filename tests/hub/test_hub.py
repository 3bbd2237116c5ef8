"""Fetching from a stand-in Hub, in a process of its own, with its own environment."""

from __future__ import annotations

import json
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

from .standin import COMMIT, Repo, StandIn, environment, sha256

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
        **spec,
    ):
        spec.setdefault("model", {"name": NAME})
        env = environment(tmp_path, hub) | {"HF_HUB_OFFLINE": "1" if offline else "0"}
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


INDEX = {"weight_map": {f"{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}
DECODER = AutoConfig.for_model("modernbert-decoder").to_json_string().encode()
LICENCE = {"license": "other", "license_name": "tiny-licence"}
PICKLED = "python -c 'import sys; from transformers import"

# Files beside or in place of the model's (None: without), the repository, what is asked, and the
# words of the refusal.
REFUSED: dict[str, tuple[dict[str, bytes | None], dict, dict, tuple[str, ...]]] = {
    "a connection that always breaks": ({}, {"cut": [0] * 20}, {}, ("finished downloads are kept",)),
    "a busy hub": ({}, {"failing": 99}, {}, ("HTTP status 503", "try again later")),
    "another name": ({}, {}, {"model": {"name": "someone/else"}}, ("someone/else", "private")),
    "another revision": ({}, {}, {"model": {"name": NAME, "revision": "v9"}}, ("'v9'", "/tree/main")),
    "gated, without a token": ({}, {"gated": True, "card": LICENCE}, {}, ("cause: licence: ", "hf auth login")),
    "gated, for this token": ({}, {"gated": True, "card": LICENCE}, {"token": TOKEN}, ("cause: licence: ", "your token's account")),
    "pickled weights": ({"model.safetensors": None, "pytorch_model.bin": b"x"}, {}, {}, (PICKLED, NAME)),
    "a missing shard": (
        {"model.safetensors": None, "model.safetensors.index.json": json.dumps(INDEX).encode(), "model-00001-of-00002.safetensors": b"x"},
        {}, {}, ("model-00002-of-00002.safetensors",),
    ),
    "GGUF": ({"model.safetensors": None, "model.Q4.gguf": b"GGUF"}, {}, {}, ("hf download",)),
    "an adapter": ({"model.safetensors": None, "adapter_config.json": b"{}"}, {}, {}, ("adapter.from",)),
    "no weights": ({"model.safetensors": None}, {}, {}, ("no weights",)),
    "a kind that is not trained": ({"config.json": DECODER}, {}, {}, ("modernbert-decoder", "llama")),
    "a full disk": ({}, {}, {"free": 1 << 20}, ("not enough disk space", " missing", "HF_HOME")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fetched_is_refused_before_its_weights_come(ask, files, name: str) -> None:
    changed, repo, asked, words = REFUSED[name]
    held = {name: data for name, data in (files | changed).items() if data is not None}
    with StandIn({NAME: Repo(held, **repo)}) as hub:
        answer, said = ask(hub, **asked)
        kind = "MachineError" if "free" in asked else "ModelError"
        assert_refused(answer, *words, kind=kind)
        assert "cut" in repo or not hub.downloads("/network/someone/tiny/model.safetensors")
        if "card" in repo:
            assert f"{hub.url}/{NAME}" in answer["error"], "the page to ask on"
            assert lines_with(said, NAME, "tiny-licence"), "told before access is asked for"


def test_a_granted_token_is_used_but_not_given_to_the_content_network(ask, files) -> None:
    with StandIn({NAME: Repo(files, gated=True, granted=TOKEN)}) as hub:
        answer, _ = ask(hub, token=TOKEN, model={"name": NAME, "revision": "v2"})
        assert answer["folder"].endswith(COMMIT)
        assert {s.token for s in hub.seen if "/resolve/" in s.path} == {TOKEN}
        assert {s.token for s in hub.seen if s.path.startswith("/network/")} == {None}


def test_what_is_left_of_a_killed_download_is_not_taken_for_the_model(ask, files) -> None:
    """Nor is a snapshot that lost a file."""
    with StandIn({NAME: Repo(files)}) as hub:
        blobs = ask.home / "hub" / f"models--{NAME.replace('/', '--')}" / "blobs"
        blobs.mkdir(parents=True)
        data = files["model.safetensors"]
        (blobs / f"{sha256(data)}.0123abcd.incomplete").write_bytes(data[: len(data) // 2])
        weights = Path(ask(hub)[0]["folder"]) / "model.safetensors"
        assert weights.read_bytes() == data
        weights.resolve().unlink()
        weights.unlink()
        assert_refused(ask(None, offline=True)[0], "not complete")
        assert Path(ask(hub)[0]["folder"]) == weights.parent
        assert weights.read_bytes() == data


def test_an_error_of_the_library_for_large_files_is_ours(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    reason = "xet: the token has expired"
    with refuses(ModelError, names=[NAME]) as caught, hub_calls(NAME):
        raise RuntimeError(reason)
    assert reason in caught.value.why


def test_a_disabled_model_is_not_told_to_log_in() -> None:
    response = SimpleNamespace(status_code=403, headers={}, request=None)
    error = DisabledRepoError("disabled-by-its-owner", response=response)
    text = hub_error(error, NAME, None).text()
    assert "disabled-by-its-owner" in text
    assert "licence" not in text


def test_a_cache_that_cannot_be_made_is_named(ask, files) -> None:
    ask.home.write_text("a file where the cache should be")
    with StandIn({NAME: Repo(files)}) as hub:
        assert_refused(ask(hub)[0], "cache cannot be written", "HF_HOME", kind="MachineError")


def test_without_a_network_or_cache(ask) -> None:
    assert_refused(ask(None)[0], "cannot be reached", "HF_ENDPOINT")
    assert_refused(ask(None, offline=True)[0], "HF_HUB_OFFLINE", "tunesmith fetch")


def test_a_tokenizer_that_is_not_here_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train --model --data` asks for it first; the error of that call says nothing of it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with refuses(ModelError, names=["someone/tiny", "HF_HUB_OFFLINE"]) as caught:
        fetch_without_weights("someone/tiny")
    assert caught.value.fix == "run `HF_HUB_OFFLINE=0 tunesmith fetch someone/tiny`"
