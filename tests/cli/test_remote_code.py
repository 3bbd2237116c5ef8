"""A model's own Python code runs only if the user's recipe or command allows it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

import tunesmith
from errors import holds
from invoke import invoke
from runs import make_run, peft_model
from tunesmith.config.load import load_recipe
from tunesmith.errors import EXIT_OK, EXIT_USAGE, RecipeError, UsageError

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
    (folder / "own.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\ndef score(answer, row): return len(answer) % 2\n"
    )
    method = {"name": "grpo", "reward": str(folder / "own.py:score"), "answer_tokens": 4}
    make_run(folder / "rl", tiny, peft_model(tiny), method=method)
    return folder


# Commands that read the recipe of a run, and commands that load its model.
RECIPE = ("data RUN", "data RUN --json", "data RUN/config.yaml", "data RUN/mine.yaml", "plan RUN/config.yaml", "train RUN/config.yaml", "bench RUN/config.yaml",
          "fetch RUN/config.yaml", "sweep RUN/config.yaml train.seed=1,2", "launch local RUN/config.yaml", "launch docker RUN/config.yaml --render",
          "launch slurm RUN/config.yaml --gpus-per-node 1 --render")  # fmt: skip
MODEL = ("chat RUN", "chat RUN/final --base", "eval RUN --data ROWS", "generate RUN --input ROWS --output -", "merge RUN --output OUT",
         "export RUN --to gguf --output OUT.gguf", "export RUN --to vllm --output OUT")  # fmt: skip
FUNCTIONS: dict[str, Callable[[Path], object]] = {
    "inspect_data": tunesmith.inspect_data,
    "plan": lambda run: tunesmith.plan(run / "config.yaml"),
    "train": lambda run: tunesmith.train(run / "mine.yaml"),
    "sweep": lambda run: tunesmith.sweep(run / "config.yaml", {"train.seed": [1, 2]}),
}
LOADERS: dict[str, Callable[[Path], object]] = {
    "load_run": tunesmith.load_run,
    "evaluate": tunesmith.evaluate,
    "merge": lambda run: tunesmith.merge(run, run.parent / "merged"),
}


@pytest.mark.parametrize(
    ("name", "action"),
    [(name, action) for name in ("run", "rl") for action in (*RECIPE, *FUNCTIONS)]
    + [("run", action) for action in (*MODEL, *LOADERS)],
)
def test_a_run_of_a_stranger_runs_no_code(
    name: str, action: str, stranger: Path, tmp_path: Path
) -> None:
    run = stranger / name
    (run / "mine.yaml").write_text("extends: config.yaml\n")
    function = (FUNCTIONS | LOADERS).get(action)
    if function:
        with pytest.raises(UsageError) as refused:
            function(run)
        text, consent = str(refused.value), "trust_remote_code=True"
    else:
        places = {"RUN": run, "ROWS": stranger / "run-rows.jsonl", "OUT": tmp_path / "out"}
        for key, place in places.items():
            action = action.replace(key, str(place))
        done = invoke(*action.split())
        assert done.code == EXIT_USAGE
        text, consent = done.err, "--trust-remote-code"
    code = {"run": ("model.trust_remote_code", stranger / "base"), "rl": ("method.reward", stranger / "own.py")}  # fmt: skip
    assert holds(text, *code[name], consent, run / "config.yaml")
    assert not (stranger / "ran").exists()


@pytest.mark.parametrize(
    ("base", "recipe", "is_accepted"),
    [
        ("base.yaml", "own/mine.yaml", True),
        ("common/base.yaml", "own/mine.yaml", True),
        ("own/downloads/base.yaml", "own/mine.yaml", False),
        ("evil.yaml", "run/config.yaml", False),
        ("run/evil.yaml", "run/config.yaml", False),
    ],
)
def test_an_extended_recipe_is_the_users_unless_it_comes_with_a_run(
    base: str, recipe: str, is_accepted: bool, stranger: Path, tmp_path: Path
) -> None:
    for file in (base, recipe):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / base).write_text((stranger / "rl" / "config.yaml").read_text())
    extends = os.path.relpath(tmp_path / base, (tmp_path / recipe).parent)
    (tmp_path / recipe).write_text(f"extends: {extends}\n")
    (tmp_path / "run" / "final").mkdir(parents=True, exist_ok=True)
    with nullcontext() if is_accepted else pytest.raises(RecipeError, match=base):
        load_recipe(tmp_path / recipe)


@pytest.mark.parametrize("words", ["status RUN", "report RUN --output OUT.html", "chat RUN --input ROWS", "generate RUN --input ROWS --output - --max-new-tokens 2"])  # fmt: skip
def test_what_needs_no_scorer_runs_none(words: str, stranger: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Count", "output": "1"}\n')
    places = {"RUN": stranger / "rl", "ROWS": rows, "OUT": tmp_path / "out"}
    for key, place in places.items():
        words = words.replace(key, str(place))
    invoke(*words.split())
    assert not (stranger / "ran").exists()


def test_it_runs_if_the_command_says_so(stranger: Path, tmp_path: Path) -> None:
    run, ran, out = stranger / "run", stranger / "ran", tmp_path / "merged"
    flag = "--trust-remote-code"
    data = ["data", run, "model.trust_remote_code=true"]
    for words in (data, ["data", run, flag], ["data", stranger / "rl", flag], ["merge", run, "--output", out, flag]):  # fmt: skip
        # Transformers imports the module again, because its text is another one.
        (stranger / "base" / "own_config.py").open("a").write(f"# {words[0]}\n")
        assert invoke(*words).code == EXIT_OK
        ran.unlink()
