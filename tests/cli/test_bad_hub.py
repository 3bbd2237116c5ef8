"""A Hub that says no, through the command line: a stand-in server that speaks its protocol, and one
child process.

The child imports the libraries once, because they read HF_ENDPOINT as they are imported, and runs
every command there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.bad_world import TURNS, World, snapshot, told
from errors import is_internal
from hub.standin import Repo, StandIn

pytestmark = pytest.mark.slow

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123456789"
CHILD = """
import contextlib, io, json, os, sys, time, traceback
from tunesmith.cli.main import main
pause = time.sleep
time.sleep = lambda seconds: pause(min(seconds, 0.01))  # between the tries of huggingface_hub
for line in sys.stdin:
    words, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=sys.__stdout__, flush=True)
"""


@pytest.fixture(scope="module")
def repos(tiny: Path) -> dict[str, Repo]:
    files = {p.name: p.read_bytes() for p in tiny.iterdir()}
    terms = {"license": "other", "license_name": "tiny-licence"}
    row = json.dumps({"messages": TURNS}).encode() + b"\n"
    good = Repo(files)

    def less(*names: str, **more: bytes) -> Repo:
        return replace(good, files={n: data for n, data in files.items() if n not in names} | more)

    return {
        "someone/gated": replace(good, gated=True, granted="another", card=terms),
        "someone/busy": replace(good, failing=10_000),
        "someone/breaking": replace(good, cut=[0] * 500),
        "someone/pickled": less("model.safetensors", **{"pytorch_model.bin": b"x" * 50}),
        "someone/no-config": less("config.json"),
        "someone/no-tokenizer": less("tokenizer.json"),
        "someone/broken-config": less("config.json", **{"config.json": b"{"}),
        "someone/encoder": less("config.json", **{"config.json": b'{"model_type": "roberta"}'}),
        "someone/fine": good,
        "someone/gated-rows": Repo({"train.jsonl": row}, gated=True, granted="another"),
    }


@pytest.fixture(scope="module")
def ask(repos: dict[str, Repo], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run one command in the child: (exit code, stdout, stderr)."""
    home = tmp_path_factory.mktemp("hub-home")
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("HF_") and not k.lower().endswith("_proxy")
    }
    with StandIn(repos) as hub:
        env = clean | {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "NO_COLOR": "1",
                       "HF_HUB_DISABLE_TELEMETRY": "1", "TUNESMITH_CACHE": str(home / "own")}  # fmt: skip
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None

        def call(words: list[str], token: str | None = None) -> list[Any]:
            print(json.dumps([words, token]), file=child.stdin, flush=True)
            return json.loads(child.stdout.readline())

        call.hub = hub
        yield call
        child.stdin.close()
        assert child.wait(60) == 0


# command (with the name of a repository, or of data), token, parts of what, where and fix
HUB: dict[str, tuple[str, str, str | None, str, str, str]] = {
    "401: gated, no token": ("train", "someone/gated", None, "gated", "someone/gated", "HF_TOKEN"),
    "403: gated, not granted": ("train", "someone/gated", TOKEN, "gated", "someone/gated", "ask for access"),
    "401: gated, fetch": ("fetch", "someone/gated", None, "gated", "someone/gated", "HF_TOKEN"),
    "403: gated, the data verb": ("data", "someone/gated", TOKEN, "gated", "someone/gated", "ask for access"),
    "404: no such model": ("train", "someone/nothing", TOKEN, "someone/nothing", "", ""),
    "404: no such revision": ("revision", "someone/fine", None, "", "", ""),
    "503: always busy": ("train", "someone/busy", None, "503", "", "later"),
    "the connection always breaks": ("fetch", "someone/breaking", None, "", "", ""),
    "only pickles": ("train", "someone/pickled", None, "pickle", "", "AutoModelForCausalLM"),
    "no config.json": ("train", "someone/no-config", None, "config.json", "", ""),
    "no tokenizer": ("train", "someone/no-tokenizer", None, "tokenizer", "", "model.tokenizer"),
    "a broken config.json": ("train", "someone/broken-config", None, "", "", ""),
    "an encoder": ("train", "someone/encoder", None, "roberta is an encoder", "", "text decoder"),
    "no such data set": ("rows", "someone/no-rows", None, "someone/no-rows", "", ""),
    "401: gated data set": ("rows", "someone/gated-rows", None, "gated", "", "HF_TOKEN"),
    "chat, 401": ("chat", "someone/gated", None, "gated", "someone/gated", "HF_TOKEN"),
}  # fmt: skip


def command(world: World, verb: str, name: str) -> list[str]:
    if verb == "rows":
        return world.train(data={"train": {"source": name, "format": "messages"}})
    if verb == "revision":
        return world.train(tiny=Path(name), model={"revision": "v9"})
    if verb in ("fetch", "chat"):
        return [verb, name]
    return [verb, *world.train(tiny=Path(name))[1:]]


@pytest.mark.parametrize("case", HUB)
def test_a_hub_that_says_no(case: str, world: World, ask: Any) -> None:
    verb, name, token, what, where, fix = HUB[case]
    words = command(world, verb, name)
    before = snapshot(world.folder)
    code, out, err = ask(words, token)
    parts = told(err)
    assert (code, out) == (2, ""), err
    assert what in parts["error"], err
    assert where in parts["where"], err
    assert fix in parts["fix"], err
    assert not is_internal(err)
    assert TOKEN not in err
    assert snapshot(world.folder) == before


# a recipe whose model lies on the Hub, and a part of what is told before the Hub is asked
CHEAP: dict[str, tuple[dict[str, Any], str]] = {
    "no wandb": ({"log": {"wandb": True}}, "wandb is not installed"),
    "no training rows": ({"data": {"train": {"source": "no.jsonl"}}}, "there is no such file"),
    "no held-out rows": (
        {"data": {"validation": {"source": "no.csv", "format": "alpaca"}}},
        "there is no such file",
    ),
    "empty rows": ({"data": {"train": {"source": "empty.jsonl"}}}, "the file is empty"),
    "rows of another kind": (
        {"data": {"train": {"source": "./rows.xlsx"}}},
        "not a supported data file",
    ),
    "no template": ({"data": {"template": "no.jinja"}}, "a file that does not exist"),
    "no tokenizer": ({"model": {"tokenizer": "./no"}}, "neither a folder"),
    "no adapter": ({"adapter": {"from": "./no"}}, "does not exist"),
    "no place for the run": ({"output_dir": "/dev/null/run"}, "cannot be written"),
}


@pytest.mark.parametrize("case", CHEAP)
def test_what_is_cheap_is_checked_before_the_hub_is_asked(
    case: str, world: World, ask: Any
) -> None:
    changes, said = CHEAP[case]
    if case == "no wandb" and importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    world.write("empty.jsonl", "")
    world.write("rows.xlsx", "x")
    asked = len(ask.hub.seen)
    code, out, err = ask(
        [str(word) for word in world.train(tiny=Path("someone/never-asked"), **changes)]
    )
    assert (code, out) == (2, ""), err
    assert said in err
    assert len(ask.hub.seen) == asked
