"""Bad inputs: an exit code, the place, a fix, no traceback, and no file of the user's touched."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.bad_world import snapshot
from errors import check_shown, refuses
from invoke import invoke
from recipes import recipe, write_rows
from tunesmith.cli.main import dispatch
from tunesmith.config.dump import to_yaml
from tunesmith.errors import (
    EXIT_USAGE,
    DataError,
    MachineError,
    ModelError,
    RecipeError,
    TunesmithError,
    UsageError,
)

TORN = '{"prompt": \n'
ROW = '{"prompt": "a", "completion": "b"}\n'
ADAPTER = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
FILES = {
    "empty.jsonl": "", "torn.jsonl": TORN + ROW, "row-40.jsonl": ROW * 39 + TORN, "page.json": "<html>", "held.jsonl": ROW,
    "taken": "mine", "theirs.jsonl": '{"a": 1, "output": ""}\n', "full/notes": "mine", "theirs/metrics.jsonl": "mine",
    "x.gguf": "GGUF", "runs/dpo/config.yaml": "", "runs/dpo/final/a": "",
    "adapter/adapter_config.json": ADAPTER,
}  # fmt: skip

# Words of a command -> the class of the error, the place, and values of the fix
REFUSED: dict[str, tuple[type[TunesmithError], str, list[str]]] = {
    # recipes and overrides
    "train none.yaml": (RecipeError, "none.yaml", ["tunesmith train --model demo --data faq.csv"]),
    "train full": (RecipeError, "full", []),
    "train ~no-such-user/r.yaml": (RecipeError, "~no-such-user/r.yaml", ["tunesmith recipes"]),
    "train smollm2-135m-lore": (RecipeError, "smollm2-135m-lore", ["smollm2-135m-lora?"]),
    "train latin.yaml": (RecipeError, "latin.yaml:1", ["iconv"]),
    "train recipe.yaml train.learnin_rate=1": (RecipeError, "command line: train.learnin_rate", ["train.learning_rate?"]),
    "train recipe.yaml train.weight_decay=much": (RecipeError, "command line: train.weight_decay", []),
    # rows; those of a model on the Hub are looked at before the Hub is asked
    "train rows.jsonl": (UsageError, "command line", ["tunesmith train --model demo --data rows.jsonl"]),
    "train rows=a.jsonl": (RecipeError, "rows=a.jsonl", ["rows.jsonl?"]),
    "train recipe.yaml model.name=org/none data.train.source=none.jsonl": (DataError, "none.jsonl", []),
    "train recipe.yaml model.name=org/none data.train.source=empty.jsonl": (DataError, "empty.jsonl", []),
    "train recipe.yaml data.train.source=torn.jsonl": (DataError, "torn.jsonl:1", []),
    "train recipe.yaml data.train.source=page.json": (DataError, "page.json:1", ["sed -n 1p"]),
    "train recipe.yaml data.train.columns.prompt=question": (DataError, "rows.jsonl:1", []),
    "train recipe.yaml model.name=org/none data.validation.source=none.csv": (DataError, "none.csv", []),
    "data recipe.yaml data.train.source=row-40.jsonl data.train.format=prompt-completion": (DataError, "row-40.jsonl:40", ["sed -n 40p"]),
    "train --model model --data none.csv": (DataError, "none.csv", []),
    "train --model model --data hled.jsonl": (DataError, "hled.jsonl", ["held.jsonl?"]),
    "train recipe.yaml model.name=org/none data.template=./none.jinja": (RecipeError, "command line: data.template", ["alpaca"]),
    # the model, and a run to continue
    "train recipe.yaml model.name=./none": (ModelError, "model.name", []),
    "train recipe.yaml model.name=x.gguf": (ModelError, "model.name", ["GgufConfig", "x.gguf"]),
    "chat x.gguf": (UsageError, "x.gguf", ["GgufConfig", "x.gguf"]),
    "export adapter --to ollama --adapter --output y": (UsageError, "--to ollama --adapter", ["--to gguf"]),
    "train recipe.yaml model.name=org/none": (ModelError, "https://huggingface.co/org/none", ["tunesmith fetch"]),
    "train recipe.yaml adapter.from=./none": (ModelError, "adapter.from", []),
    "train recipe.yaml adapter.from=runs/dp": (ModelError, "adapter.from", ["runs/dpo"]),
    # folders
    "train recipe.yaml output_dir=theirs": (UsageError, "theirs", ["output_dir=runs/my-run"]),
    "train recipe.yaml output_dir=held": (MachineError, "held", ["output_dir"]),
    "train recipe.yaml output_dir=/": (UsageError, "/", []),
    "train recipe.yaml output_dir=.": (UsageError, "FOLDER", []),
    "train recipe.yaml output_dir=model": (UsageError, "model", []),
    "train recipe.yaml output_dir=taken/run": (MachineError, "taken/run", []),
    # commands for runs
    "chat held.jsonl": (UsageError, "held.jsonl", []),
    "eval adapter": (UsageError, "--data", ["--data FILE"]),
    "eval adapter --data held.jsonl --max-examples 0": (UsageError, "command line: tunesmith eval", []),
    "eval adapter --data held.jsonl --score exactly": (UsageError, "--score", ["exact?"]),
    "eval adapter --data held.jsonl --temperature 1": (UsageError, "command line: --temperature", ["--score"]),
    "generate adapter --input none.csv --output -": (DataError, "none.csv", []),
    "generate adapter --input held.jsonl --output theirs.jsonl": (UsageError, "--output", ["--resume", "--force"]),
    "generate adapter --input held.jsonl --output held.jsonl --force": (UsageError, "--output", []),
    "generate adapter --input held.jsonl --output taken/o.jsonl": (MachineError, "--output taken/o.jsonl", []),
    "generate adapter --input held.jsonl --output - --resume": (UsageError, "--output -", []),
    "generate adapter --input held.jsonl --output - --top-p 0.5": (UsageError, "--temperature", []),
    "generate adapter --input held.jsonl --output - --columns prompt": (UsageError, "command line: tunesmith generate", []),
    "merge adapter --output full": (UsageError, "--output", ["--output"]),
    "export adapter --to vllm --output full": (UsageError, "full", []),
    "export adapter --to ollama --output full": (UsageError, "--output", []),
    "export adapter --to gguf --output x": (UsageError, "--output", ["x.gguf"]),
    "export adapter --to gguf --output x.gguf": (UsageError, "--output", ["--force"]),
    "report none": (UsageError, "none", []),
    "recipes copy smollm2-135m-lora taken": (UsageError, "taken", ["--force"]),
    "recipes copy smollm2-135m-lora none/r.yaml": (UsageError, "DEST", ["mkdir -p none"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `FILES`, a good recipe, its rows and model, and a run that another process holds."""
    folder = tmp_path_factory.mktemp("bad")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    write_rows(folder / "rows.jsonl", 20)
    shutil.copytree(tiny, folder / "model")
    data = {"train": {"source": "rows.jsonl", "format": "prompt-completion"}}
    values = recipe(Path("model"), folder, held=False, data=data, output_dir="runs/new")
    (folder / "recipe.yaml").write_text(to_yaml(values))
    (folder / "held").mkdir()
    with (folder / "held" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@pytest.mark.parametrize("command", REFUSED)
def test_a_bad_input_is_refused_at_its_place(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    kind, where, fix = REFUSED[command]
    before = snapshot(folder)
    with refuses(kind, where=str(folder) if where == "FOLDER" else where, fix=fix) as refused:
        dispatch(command.split())
    assert refused.value.exit_code == EXIT_USAGE
    assert refused.value.fix
    assert snapshot(folder) == before


# Commands whose options are checked by a module that imports torch
LOAD_TORCH = {
    "generate adapter --input held.jsonl --output taken/o.jsonl",
    "generate adapter --input held.jsonl --output - --top-p 0.5",
}
CHILD = """
import contextlib, io, json, sys
from tunesmith.cli.main import main
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue(), "torch" in sys.modules]))
"""


@pytest.mark.slow
def test_a_bad_input_is_shown_before_torch_is_imported(folder: Path) -> None:
    """By the command line: the rows of the table in one process."""
    commands = [command for command in REFUSED if command not in LOAD_TORCH]
    lines = "\n".join(json.dumps(command.split()) for command in commands)
    run = [sys.executable, "-c", CHILD]
    done = subprocess.run(run, input=lines, cwd=folder, capture_output=True, text=True, check=True)
    for command, line in zip(commands, done.stdout.splitlines(), strict=True):
        code, out, err, has_torch = json.loads(line)
        assert (code, out, has_torch) == (EXIT_USAGE, "", False), command
        _, where, fix = REFUSED[command]
        check_shown(err, where=str(folder) if where == "FOLDER" else where, fix=fix)


# Faults that a tokenizer shows, with the place that is told
TOKEN_FAULTS = {
    "data.hold_out=20 examples": "data.hold_out",
    "data.seq_len=1000000": "data.seq_len",
    "data.seq_len=16; data.too_long=truncate": "rows.jsonl",
}


@pytest.mark.parametrize("overrides", TOKEN_FAULTS)
@pytest.mark.slow
def test_a_fault_of_tokens_is_told_before_the_model_is_built(
    overrides: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "tunesmith.start.session.build_model", lambda *_, **__: pytest.fail("built")
    )
    done = invoke("train", "recipe.yaml", *overrides.split("; "))
    assert done.code == EXIT_USAGE
    check_shown(done.err, where=TOKEN_FAULTS[overrides])
    assert not (folder / "runs" / "new").exists()
