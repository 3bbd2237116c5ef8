"""Models from a stand-in Hub: what is fetched, what is refused, and the command `fetch`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from errors import lines_with
from invoke import invoke
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
    return {p.name: p.read_bytes() for p in tiny.iterdir()} | {"LICENSE": b"Apache"}


@pytest.fixture
def ask(tmp_path: Path):
    """Run a fetch against a stand-in; returns (answer, stderr)."""

    def call(hub: StandIn | None, *, token: str = "", offline: bool = False, **spec):
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
    extra = dict.fromkeys(
        ("pytorch_model.bin", "onnx/model.onnx", "consolidated.safetensors"), b"x"
    )
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
    offline, _ = ask(None, offline=True)
    assert offline == answer


DECODER = AutoConfig.for_model("modernbert-decoder").to_json_string().encode()
LICENCE = {"license": "other", "license_name": "tiny-licence"}
PICKLED = "python -c 'import sys; from transformers import"

# Files beside or in place of the model's (None: without), the repository, what is asked, and the
# words of the refusal.
REFUSED: dict[str, tuple[dict[str, bytes | None], dict, dict, tuple[str, ...]]] = {
    "a connection that always breaks": ({}, {"cut": [0] * 20}, {}, ("HTTPS_PROXY",)),
    "a busy hub": ({}, {"failing": 99}, {}, ("503", "try again later")),
    "another name": ({}, {}, {"model": {"name": "someone/else"}}, ("someone/else", "private")),
    "gated, without a token": ({}, {"gated": True, "card": LICENCE}, {}, ("cause: licence: ", "hf auth login")),
    "gated, for this token": ({}, {"gated": True, "card": LICENCE}, {"token": TOKEN}, ("cause: licence: ", "hf auth login")),
    "pickled weights": ({"model.safetensors": None, "pytorch_model.bin": b"x"}, {}, {}, (PICKLED, NAME)),
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
    with StandIn({NAME: Repo(files)}) as hub:
        blobs = ask.home / "hub" / f"models--{NAME.replace('/', '--')}" / "blobs"
        blobs.mkdir(parents=True)
        data = files["model.safetensors"]
        (blobs / f"{sha256(data)}.0123abcd.incomplete").write_bytes(data[: len(data) // 2])
        weights = Path(ask(hub)[0]["folder"]) / "model.safetensors"
        assert weights.read_bytes() == data
        weights.resolve().unlink()
        weights.unlink()
        assert_refused(ask(None, offline=True)[0], "HF_HUB_OFFLINE=0 tunesmith fetch")
        assert Path(ask(hub)[0]["folder"]) == weights.parent
        assert weights.read_bytes() == data


def test_without_a_network_or_cache(ask) -> None:
    assert_refused(ask(None)[0], "HTTPS_PROXY", "HF_ENDPOINT")
    assert_refused(ask(None, offline=True)[0], "HF_HUB_OFFLINE", "tunesmith fetch")


@pytest.fixture
def fetch(tmp_path: Path):
    """Run the command; returns (exit code, stdout, stderr)."""

    def call(*words: str, hub: StandIn | None = None, verb: str = "fetch"):
        env = environment(tmp_path, hub) | ({} if hub else {"HF_HUB_OFFLINE": "1"})
        done = run_warm([verb, *words], env=env, cwd=tmp_path, prepare=read_hub_settings)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    return call


def test_look_and_bring(fetch, files, tmp_path: Path) -> None:
    total = sum(len(data) for data in files.values())
    with StandIn({NAME: Repo(files)}) as hub:
        code, out, err = fetch(NAME, "--dry-run", "--json", hub=hub)
        looked = json.loads(out)[0]
        assert (code, looked["licence"], looked["bytes"]) == (0, "apache-2.0", total)
        assert looked["folder"] is None
        assert looked["missing_bytes"] == total - len(files["config.json"])
        assert not hub.downloads("/network/someone/tiny/model.safetensors")
        assert lines_with(err, NAME, "apache-2.0")

        code, out, err = fetch(NAME, "--json", hub=hub)
        brought = json.loads(out)[0]
        assert code == 0
        assert (brought["revision"], brought["type"]) == (COMMIT, "llama")
        assert brought["parameters"] == 91_456
        weights = Path(brought["folder"]) / "model.safetensors"
        assert weights.read_bytes() == files["model.safetensors"]

    code, out, _ = fetch(NAME)
    assert code == 0
    assert brought["folder"] in out


ROWS = """
import json, sys
from tunesmith.config.schema import Source
from tunesmith.rows.source.open_source import open_splits
from tunesmith.errors import TunesmithError
try:
    splits = open_splits(Source(**json.loads(sys.argv[1])))
    print(json.dumps({name: [t.row(i) for i in range(len(t))] for name, t in splits.items()}))
except TunesmithError as error:
    print(json.dumps(error.text()))
"""
# Values that other readers of csv and json change.
CELLS = b"prompt,completion\n007,NA\n2020-01-01,1.50\n"
TEXTS = [
    {"prompt": "007", "completion": "NA"},
    {"prompt": "2020-01-01", "completion": "1.50"},
]
LINES = "".join(json.dumps(row) + "\n" for row in TEXTS).encode()
CONFIGS = b"""---
configs:
- {config_name: a, data_files: a.csv}
- config_name: b
  data_files: [{split: odd, path: "b/[1].csv"}]
---
"""
REPOS = {
    "me/csv": Repo({"train.csv": CELLS, "test.csv": CELLS, "x.zip": b"", "rows.py": b""}),
    "me/gz": Repo({"data/train_sft-00000-of-00001.jsonl.gz": gzip.compress(LINES), "README.md": b""}),
    "me/two": Repo({"README.md": CONFIGS, "a.csv": CELLS, "b/1.csv": CELLS}),
    "me/gated": Repo({"train.csv": CELLS}, gated=True),
    "me/empty": Repo({"README.md": b"---\nlicense: mit\n---\n"}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ({"source": "me/csv"}, {"train": TEXTS, "test": TEXTS}),
        ({"source": "me/gz"}, {"train_sft": TEXTS}),
        ({"source": "me/two", "name": "b"}, {"odd": TEXTS}),
        ({"source": "me/two"}, "name: a"),
        ({"source": "me/gated"}, "hf auth login"),
        ({"source": "me/none"}, "./me/none"),
        ({"source": "me/empty"}, "README.md"),
    ],
)
def test_a_data_set_has_the_texts_of_its_files(
    tmp_path: Path, source: dict[str, str], found: object
) -> None:
    def read(hub: StandIn | None) -> object:
        env = environment(tmp_path, hub) | ({} if hub else {"HF_HUB_OFFLINE": "1"})
        done = run_warm([json.dumps(source)], program=ROWS, env=env, prepare=read_hub_settings)
        return json.loads(done.stdout)

    with StandIn(REPOS) as hub:
        answer = read(hub)
        if isinstance(found, str):
            assert found in str(answer)
            return
        assert answer == found
        assert not hub.downloads("x.zip") + hub.downloads("a.csv")
    assert read(None) == found, "from the cache"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("no/such/path",), "no/such/path"),
        (("./my-modle",), "my-model?"),
        (("demo",), "tunesmith train --model demo"),
        (("someone/tiny",), "HF_HUB_OFFLINE"),
        (("someone/tiny", "model.dtype=fp32"), "--revision"),
        (("smollm2-135m-lora", "--revision", "x"), "model.revision=REVISION"),
    ],
)
def test_what_is_wrong_is_said(words, said, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "my-model").mkdir()
    refused = invoke("fetch", *words)
    assert (refused.code, refused.out) == (2, "")
    assert said in refused.err
    assert "fix:" in refused.err


@pytest.mark.nightly
def test_a_model_from_the_hub_learns_a_file_of_ones_own(fetch, files, tmp_path: Path) -> None:
    """The README's first command, with a model that is not on the machine yet."""
    rows = "".join(f"Say {n},number {n}\n" for n in range(24))
    (tmp_path / "faq.csv").write_text(f"question,answer\n{rows}")
    words = ["--model", NAME, "--data", "faq.csv", "model.dtype=fp32", "train.duration=2 steps"]
    with StandIn({NAME: Repo(files)}) as hub:
        code, _, told = fetch(*words, verb="train", hub=hub)
    assert code == 0, told
    assert lines_with(told, "faq.csv", "24 rows", "question, answer -> prompt-completion")
    assert lines_with(told, NAME, "apache-2.0")
    assert f"name: {NAME}\n" in (tmp_path / "runs/faq-tiny.yaml").read_text()
    assert (tmp_path / "runs/faq-tiny/final/adapter_model.safetensors").is_file()
