"""`tunesmith fetch` as a user types it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from errors import check_shown, holds, lines_with
from warm import read_hub_settings, run_warm

from .standin import COMMIT, Repo, StandIn

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

    def call(*words: str, hub: StandIn | None = None, **env: str):
        base = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("HF_") and not k.lower().endswith("_proxy")
        }
        base |= {
            "HF_HOME": str(tmp_path / "home"),
            "TUNESMITH_CACHE": str(tmp_path / "own"),
            "HF_HUB_DISABLE_XET": "1",
        }
        base |= {"HF_ENDPOINT": hub.url} if hub else {"HF_HUB_OFFLINE": "1"}
        done = run_warm(["fetch", *words], env=base | env, cwd=tmp_path, prepare=read_hub_settings)
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
        (("no/such/path",), "there is no folder or .gguf file no/such/path"),
        (("./nothing",), "there is no folder or .gguf file ./nothing"),
        (("./my-modle",), "did you mean my-model?"),
        (("bad id!",), "neither a folder"),
        (("demo",), "tunesmith train --model demo"),
        (("missing.yaml",), "missing.yaml"),
        (("someone/tiny",), "HF_HUB_OFFLINE"),
        (("someone/tiny", "model.dtype=fp32"), "--revision"),
        (("smollm2-135m-lora", "--revision", "x"), "model.revision=REVISION"),
        (("pyproject.toml",), "pyproject.toml"),
    ],
)
def test_what_is_wrong_is_said(fetch, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "my-model").mkdir()
    code, out, err = fetch(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert "fix:" in err


def test_converted_files_are_listed_and_removed(fetch, tmp_path: Path) -> None:
    made = tmp_path / "own" / "models" / "tiny-bf16-0123"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(1000))
    listed = json.loads(fetch("--list", "--json")[1])
    assert [(h["name"], h["kind"], h["size"]) for h in listed] == [
        ("tiny-bf16-0123", "converted", 1000)
    ]
    assert fetch("--remove", "tiny-bf16-0123")[0] == 0
    assert not made.exists()


def test_what_is_derived_from_models_is_listed_and_removed(fetch, tmp_path: Path) -> None:
    for folder, name in (("tokenizers", "0123/tokenizer.json"), ("configs", "4567.json")):
        file = tmp_path / "own" / folder / name
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(len(folder)))
    listed = json.loads(fetch("--list", "--json")[1])
    assert [(h["name"], h["kind"], h["size"]) for h in listed] == [
        ("tokenizers", "derived", 10),
        ("configs", "derived", 7),
    ]
    assert fetch("--remove", "tokenizers")[0] == 0
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["configs"]
