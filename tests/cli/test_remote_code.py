"""A model's own Python code runs only if the user's recipe or command allows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from errors import holds
from invoke import invoke
from runs import make_run, peft_model
from tunesmith.errors import EXIT_OK, EXIT_USAGE

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    pass
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stranger(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose base brings code, which writes the file `ran` here."""
    folder = tmp_path_factory.mktemp("stranger")
    base = folder / "base"
    shutil.copytree(tiny, base)
    config = json.loads((base / "config.json").read_text())
    kinds = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnModel"}
    config["auto_map"] = {kind: f"own_config.{name}" for kind, name in kinds.items()}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own_config.py").write_text(CODE.format(marker=str(folder / "ran")))
    make_run(folder / "run", base, peft_model(tiny), model={"trust_remote_code": True})
    return folder


@pytest.mark.parametrize(
    "words",
    ["data RUN", "plan RUN/config.yaml", "train RUN/config.yaml", "chat RUN", "chat RUN/final --base", "eval RUN --data ROWS",
     "generate RUN --input ROWS --output -", "merge RUN --output OUT", "export RUN --to gguf --output OUT.gguf"],
)  # fmt: skip
def test_a_run_of_a_stranger_runs_no_code(words: str, stranger: Path, tmp_path: Path) -> None:
    run = stranger / "run"
    (run / "env.json").write_text("{}")
    places = {"RUN": run, "ROWS": stranger / "run-rows.jsonl", "OUT": tmp_path / "out"}
    for name, place in places.items():
        words = words.replace(name, str(place))
    done = invoke(*words.split())
    assert done.code == EXIT_USAGE
    options = ("model.trust_remote_code", "--trust-remote-code")
    assert holds(done.err, *options, stranger / "base", run / "config.yaml")
    assert not (stranger / "ran").exists()


def test_a_run_without_its_identity_runs_no_code(
    stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint is enough: the recipe may be its own, or one that extends it."""
    run = stranger / "run"
    (run / "env.json").unlink(missing_ok=True)
    (run / "mine.yaml").write_text("extends: config.yaml\n")
    monkeypatch.chdir(run)
    for name in ("config.yaml", "mine.yaml"):
        done = invoke("data", name)
        assert done.code == EXIT_USAGE
        assert holds(done.err, "model.trust_remote_code", "--trust-remote-code")
    assert not (stranger / "ran").exists()


def test_it_runs_if_the_command_says_so(stranger: Path, tmp_path: Path) -> None:
    run, ran, out = stranger / "run", stranger / "ran", tmp_path / "merged"
    data = ["data", run, "model.trust_remote_code=true"]
    for words in (data, ["merge", run, "--output", out, "--trust-remote-code"]):
        # Transformers imports the module again, because its text is another one.
        (stranger / "base" / "own_config.py").open("a").write(f"# {words[0]}\n")
        assert invoke(*words).code == EXIT_OK
        ran.unlink()
