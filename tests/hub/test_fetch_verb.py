"""`tunesmith fetch` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errors import check_shown, holds, lines_with
from invoke import invoke
from warm import read_hub_settings, run_warm

from .standin import COMMIT, Repo, StandIn, environment

pytestmark = pytest.mark.slow

NAME = "someone/tiny"
RECIPE = """
model: {{name: {model}, dtype: fp32}}
data: {{train: {{source: {data}, format: messages}}}}
output_dir: runs/x
"""


@pytest.fixture
def fetch(tmp_path: Path):
    """Run the command; returns (exit code, stdout, stderr)."""

    def call(*words: str, hub: StandIn | None = None, verb: str = "fetch"):
        env = environment(tmp_path, hub) | ({} if hub else {"HF_HUB_OFFLINE": "1"})
        done = run_warm([verb, *words], env=env, cwd=tmp_path, prepare=read_hub_settings)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.fixture(scope="module")
def files(tiny: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in tiny.iterdir()}


def test_look_bring_list_remove(fetch, files, tmp_path: Path) -> None:
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
        assert (Path(brought["folder"]) / "model.safetensors").read_bytes() == files[
            "model.safetensors"
        ]
        assert f"fetching {NAME}" in err
        assert "license" in fetch(NAME, "--update", hub=hub)[2], (
            "with --update the Hub is asked again"
        )

    code, out, _ = fetch(NAME)
    assert code == 0
    assert brought["folder"] in out

    code, out, err = fetch("--list", "--json")
    held = json.loads(out)
    assert [(h["name"], h["kind"]) for h in held] == [(NAME, "model")]
    assert total <= held[0]["size"] < total + 10_000
    assert NAME in fetch("--list")[1]

    assert NAME in fetch("--remove", NAME, "--dry-run")[1]
    assert Path(brought["folder"]).exists()
    code, out, err = fetch("--remove", "someone/tiney")
    assert code == 2
    check_shown(err, where="--remove", names=["someone/tiney"], fix=[NAME])
    code, out, _ = fetch("--remove", NAME)
    assert (code, holds(out, "model", NAME)) == (0, True)
    assert not Path(brought["folder"]).exists()
    assert fetch("--list", "--json")[1].strip() == "[]"


def test_a_recipe_names_model_and_data(fetch, files, tiny: Path, tmp_path: Path) -> None:
    local = tmp_path / "local.yaml"
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    local.write_text(RECIPE.format(model=tiny, data="rows.jsonl"))
    code, out, _ = fetch("local.yaml")
    assert code == 0
    assert len(out.splitlines()) == 1, "rows in a local file need no fetching"
    assert str(tiny) in out

    remote = tmp_path / "remote.yaml"
    remote.write_text(RECIPE.format(model=NAME, data="someone/rows"))
    rows = Repo({"train.jsonl": b"{}\n" * 50}, card={"license": ["cc-by-4.0", "mit"]})
    with StandIn({NAME: Repo(files), "someone/rows": rows}) as hub:
        code, out, err = fetch("remote.yaml", "--dry-run", "--json", hub=hub)
        model, data = json.loads(out)
        assert code == 0
        assert (model["name"], data["name"], data["kind"]) == (NAME, "someone/rows", "dataset")
        assert (data["bytes"], data["licence"]) == (150, "cc-by-4.0, mit")
        assert f"{hub.url}/datasets/someone/rows" in err
        code, _, err = fetch(
            "remote.yaml", "data.train.source=someone/nothing", "--dry-run", hub=hub
        )
        assert code == 2
        check_shown(err, names=["someone/nothing"], fix=["hf auth login"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "requires a recipe or a model"),
        (("no/such/path",), "no/such/path"),
        (("./my-modle",), "my-model?"),
        (("bad id!",), "neither a folder"),
        (("demo",), "tunesmith train --model demo"),
        (("missing.yaml",), "missing.yaml"),
        (("someone/tiny",), "HF_HUB_OFFLINE"),
        (("someone/tiny", "model.dtype=fp32"), "--revision"),
        (("smollm2-135m-lora", "--revision", "x"), "model.revision=REVISION"),
        (("pyproject.toml",), "pyproject.toml"),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "my-model").mkdir()
    refused = invoke("fetch", *words)
    assert (refused.code, refused.out) == (2, "")
    assert said in refused.err
    assert "fix:" in refused.err


def test_what_is_made_from_models_is_listed_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    made = {
        "models/tiny-bf16-0123/model.safetensors": ("tiny-bf16-0123", "converted", 1000),
        "tokenizers/0123/tokenizer.json": ("tokenizers", "derived", 10),
        "configs/4567.json": ("configs", "derived", 7),
    }
    for name, (_, _, size) in made.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True)
        (tmp_path / "own" / name).write_bytes(bytes(size))
    listed = json.loads(invoke("fetch", "--list", "--json").out)
    assert {(h["name"], h["kind"], h["size"]) for h in listed} == {*made.values()}
    for name in ("tiny-bf16-0123", "tokenizers"):
        assert invoke("fetch", "--remove", name).code == 0
    assert [file.name for file in (tmp_path / "own").rglob("*") if file.is_file()] == ["4567.json"]


@pytest.mark.nightly
def test_a_model_from_the_hub_learns_a_file_of_ones_own(fetch, files, tmp_path: Path) -> None:
    """The README's first command, with a model that is not on the machine yet."""
    rows = "".join(f"Say {n},number {n}\n" for n in range(24))
    (tmp_path / "faq.csv").write_text(f"question,answer\n{rows}")
    words = ["--model", NAME, "--data", "faq.csv", "model.dtype=fp32", "train.duration=2 steps"]
    with StandIn({NAME: Repo(files)}) as hub:
        assert fetch(*words, verb="data", hub=hub)[0] == 0
        assert not any(seen.path.endswith(".safetensors") for seen in hub.seen), (
            "a look needs no weights"
        )
        code, _, told = fetch(*words, verb="train", hub=hub)
    assert code == 0, told
    assert lines_with(told, "faq.csv", "24 rows", "question, answer -> prompt-completion")
    assert lines_with(told, NAME, "apache-2.0")
    assert f"name: {NAME}\n" in (tmp_path / "runs/faq-tiny.yaml").read_text()
    assert (tmp_path / "runs/faq-tiny/final/adapter_model.safetensors").is_file()
