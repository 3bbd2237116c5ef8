"""A Hub that says no, through the command line: what is told, and what is checked before it is
asked.

The commands run in one child process, because huggingface_hub reads HF_ENDPOINT as it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.bad_world import World, snapshot
from errors import check_shown, is_internal
from hub.standin import Repo, StandIn

pytestmark = pytest.mark.slow

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123456789"
CHILD = """
import contextlib, io, json, os, sys, time
from tunesmith.cli.main import main
pause = time.sleep
time.sleep = lambda seconds: pause(min(seconds, 0.01))  # between the tries of huggingface_hub
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=sys.__stdout__, flush=True)
"""


@pytest.fixture(scope="module")
def ask(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run one command in the child: (exit code, stdout, stderr)."""
    home = tmp_path_factory.mktemp("hub-home")
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    good = Repo({path.name: path.read_bytes() for path in tiny.iterdir()})
    repos = {
        "someone/gated": replace(good, gated=True, granted="another"),
        "someone/busy": replace(good, failing=10_000),
        "someone/gated-rows": Repo({"train.jsonl": b"{}\n"}, gated=True, granted="another"),
    }
    with StandIn(repos) as hub:
        env = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "NO_COLOR": "1", "HF_TOKEN": TOKEN,
               "HF_HUB_DISABLE_TELEMETRY": "1", "TUNESMITH_CACHE": str(home / "own")}  # fmt: skip
        with subprocess.Popen(
            [sys.executable, "-c", CHILD], env=clean | env, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        ) as child:  # fmt: skip
            assert child.stdin is not None
            assert child.stdout is not None

            def call(words: list[str]) -> list[Any]:
                print(json.dumps(words), file=child.stdin, flush=True)
                return json.loads(child.stdout.readline())

            call.hub = hub
            yield call
            child.stdin.close()


ROWS = {"train": {"source": "someone/gated-rows", "format": "messages"}}


@pytest.mark.parametrize(
    ("verb", "model", "changes", "names"),
    [
        ("train", "someone/gated", {}, ["someone/gated"]),
        ("data", "someone/gated", {}, ["someone/gated"]),
        ("train", "someone/busy", {}, [503]),
        ("train", "", {"data": ROWS}, ["someone/gated-rows"]),
    ],
)
def test_a_hub_that_says_no(
    verb: str, model: str, changes: dict[str, Any], names: list[Any], world: World, ask: Any
) -> None:
    words = world.train(tiny=Path(model or world.tiny), **changes)
    before = snapshot(world.folder)
    code, out, err = ask([verb, *words[1:]])
    assert (code, out) == (2, ""), err
    check_shown(err.replace("'", " "), names=names)
    assert not is_internal(err)
    assert TOKEN not in err
    assert snapshot(world.folder) == before


# Changes of a recipe whose model lies on the Hub, and the place that is told before the Hub is asked
CHEAP: dict[str, tuple[dict[str, Any], str]] = {
    "no training rows": ({"data": {"train": {"source": "no.jsonl"}}}, "no.jsonl"),
    "no held-out rows": ({"data": {"validation": {"source": "no.csv", "format": "alpaca"}}}, "no.csv"),
    "empty rows": ({"data": {"train": {"source": "empty.jsonl"}}}, "empty.jsonl"),
    "no template": ({"data": {"template": "no.jinja"}}, "data.template"),
    "no tokenizer": ({"model": {"tokenizer": "./no"}}, "model.tokenizer"),
    "no adapter": ({"adapter": {"from": "./no"}}, "adapter.from"),
    "no place for the run": ({"output_dir": "/dev/null/run"}, "/dev/null/run"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHEAP)
def test_what_is_cheap_is_checked_before_the_hub_is_asked(
    case: str, world: World, ask: Any
) -> None:
    changes, where = CHEAP[case]
    world.write("empty.jsonl", "")
    asked = len(ask.hub.seen)
    code, out, err = ask(world.train(tiny=Path("someone/never-asked"), **changes))
    assert (code, out) == (2, ""), err
    assert where in err
    assert len(ask.hub.seen) == asked
