"""What files alone can tell is told before torch is imported, and a stop meanwhile ends at once."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from errors import check_shown, is_internal
from recipes import recipe, write_rows
from tunesmith.config.dump import to_yaml
from tunesmith.errors import EXIT_STOPPED, EXIT_USAGE
from waiting import TIME
from warm import run_warm

# The exit code, and whether torch was imported for it.
COMMAND = """
import sys
from tunesmith.cli.main import main
code = main(sys.argv[1:])
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


def start(words: list[str], folder: Path, verb: str = "train") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, verb, *words],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    *_, has_torch = done.stderr.splitlines()
    assert has_torch == "False", done.stderr
    assert not is_internal(done.stderr), done.stderr
    return done.returncode, done.stdout, done.stderr


def other_files(folder: Path) -> str:
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("of somebody else")
    return "run"


def copied_model(folder: Path, tiny: Path) -> str:
    return str(shutil.copytree(tiny, folder / "model"))


# name -> (the lines of the file of rows, overrides, the place that is told)
FAULTS: dict[str, tuple[str | None, list[str], str]] = {
    "key": ("", ["train.learnin_rate=1"], "command line: train.learnin_rate"),
    "type": ("", ["train.weight_decay=much"], "command line: train.weight_decay"),
    "no file": (None, [], "rows.jsonl"),
    "column": ("", ["data.train.columns={prompt: question}"], "rows.jsonl:1"),
    "empty": ("empty", [], "rows.jsonl"),
    "first row": ('{"prompt": \n', [], "rows.jsonl:1"),
    "foreign": ("", ["output_dir=run"], "run"),
    "model": ("", ["model.name=./none"], "model.name"),
    "root": ("", ["output_dir=/"], "/"),
    "of the model": ("", ["output_dir=model"], "model"),
    "file": ("", ["output_dir=rows.jsonl"], "rows.jsonl"),
    "below a file": ("", ["output_dir=rows.jsonl/run"], "rows.jsonl/run"),
    "no run to continue": ("", ["adapter.from=./none"], "adapter.from"),
    "at work": ("", ["output_dir=held"], "held"),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["recipe", "rows"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_files_is_told_without_torch(name: str, form: str, tiny: Path, tmp_path: Path):
    first, overrides, where = FAULTS[name]
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 20)
    if first == "empty":
        rows.write_text("")
    elif first is None:
        rows.unlink()
    else:
        rows.write_text(first + rows.read_text())
    other_files(tmp_path)
    (tmp_path / "held").mkdir()
    model = copied_model(tmp_path, tiny)
    if form == "recipe":
        source = {"source": "rows.jsonl", "format": "prompt-completion"}
        values = recipe(Path(model), tmp_path, held=False, data={"train": source})
        values["output_dir"] = "runs/new"
        (tmp_path / "recipe.yaml").write_text(to_yaml(values))
        words = ["recipe.yaml", *overrides]
    else:
        places = [word.partition("=")[2] for word in overrides if word.startswith("model.name=")]
        others = [word for word in overrides if not word.startswith("model.name=")]
        words = ["--model", *(places or [model]), "--data", "rows.jsonl", *others]
    with (tmp_path / "held" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, out, err = start(words, tmp_path)
    assert (code, out) == (EXIT_USAGE, "")
    check_shown(err, where=where)
    assert not (tmp_path / "runs").exists()


# name -> (overrides, the place that is told)
TOKEN_FAULTS: dict[str, tuple[list[str], str]] = {
    "no row left": (["data.hold_out=20 examples"], "data.hold_out"),
    "longer than the model's": (["data.seq_len=1000000"], "config.json"),
    "cut answers": (["data.seq_len=16", "data.too_long=truncate"], "rows.jsonl"),
    "no template": (["data.template=./none.jinja"], "data.template"),
    "tracker": (["log.trackers=[comet]"], "log.trackers"),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["recipe", "rows"])
@pytest.mark.parametrize("name", TOKEN_FAULTS)
def test_a_fault_of_tokens_is_told_without_torch(name: str, form: str, tiny: Path, tmp_path: Path):
    """The second time a model is used: the first start writes the copy of its tokenizer."""
    overrides, where = TOKEN_FAULTS[name]
    write_rows(tmp_path / "rows.jsonl", 20)
    run_warm(["data", "--model", str(tiny), "--data", "rows.jsonl"], cwd=tmp_path)
    words = ["--model", str(tiny), "--data", "rows.jsonl"]
    if form == "recipe":
        source = {"source": "rows.jsonl", "format": "prompt-completion"}
        values = recipe(tiny, tmp_path, held=False, data={"train": source})
        values["output_dir"] = "runs/new"
        (tmp_path / "recipe.yaml").write_text(to_yaml(values))
        words = ["recipe.yaml"]
    code, out, err = start([*words, *overrides], tmp_path)
    assert (code, out) == (EXIT_USAGE, "")
    assert where in err
    assert not (tmp_path / "runs").exists()


def test_a_wrong_input_keeps_the_earlier_run_in_its_place(tiny: Path, tmp_path: Path):
    """`--fresh` moves it only when the inputs of the new run are good."""
    write_rows(tmp_path / "rows.jsonl", 20)
    values = recipe(tiny, tmp_path, held=False)
    values["data"]["train"] = {"source": "rows.jsonl", "format": "prompt-completion"}
    values["output_dir"] = "runs/new"
    (tmp_path / "recipe.yaml").write_text(to_yaml(values))
    run_warm(["train", "recipe.yaml", "train.warmup=0 steps"], cwd=tmp_path).check_returncode()
    words = ["train", "recipe.yaml", "--fresh", "train.warmup=0 steps"]
    assert run_warm([*words, "data.seq_len=1000000"], cwd=tmp_path).returncode == EXIT_USAGE
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["new"]
    run_warm(words, cwd=tmp_path).check_returncode()
    assert len([*(tmp_path / "runs").iterdir()]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "fix"),
    [
        ("runs/dp", ["runs/dpo"]),
        ("./runs/dp", ["runs/dpo"]),
        ("runs/stf/final", ["output_dir"]),
        ("runs/other", ["output_dir"]),
    ],
)
def test_a_run_to_continue_that_is_not_there_names_those_that_are(
    missing: str, fix: list[str], tiny: Path, tmp_path: Path
):
    """A Hub id has no folder of its first part here."""
    write_rows(tmp_path / "rows.jsonl", 20)
    for name in ("sft", "dpo"):
        (tmp_path / "runs" / name / "final").mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("")
    words = ["--model", str(tiny), "--data", "rows.jsonl", f"adapter.from={missing}"]
    code, _, err = start(words, tmp_path)
    assert code == EXIT_USAGE
    check_shown(err, where="adapter.from", names=[Path(missing)], fix=fix)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["dpo", "sft"]


# name -> (the words behind the run, the place that is told, what the fix has)
RUN_FAULTS: dict[str, tuple[list[str], str, list[str]]] = {
    "eval: no file": (["eval", "--data", "none.csv"], "none.csv", []),
    "eval: scorer": (["eval", "--data", "r.jsonl", "--score", "exactly"], "--score", ["exact?"]),
    "eval: no rows": (["eval"], "--data", ["--data FILE"]),
    "generate: no file": (["generate", "--input", "none.csv", "--output", "-"], "none.csv", []),
    "merge: not empty": (["merge", "--output", "full"], "--output", []),
    "vllm: not empty": (["export", "--to", "vllm", "--output", "full"], "full", []),
    "ollama: not empty": (["export", "--to", "ollama", "--output", "full"], "--output", []),
    "gguf: no name": (["export", "--to", "gguf", "--output", "x"], "--output", ["x.gguf"]),
    "gguf: there": (["export", "--to", "gguf", "--output", "x.gguf"], "--output", ["--force"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_FAULTS)
def test_a_fault_beside_a_run_is_told_without_torch(name: str, tmp_path: Path):
    words, where, fix = RUN_FAULTS[name]
    verb, *options = words
    for folder in ("adapter", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "notes").write_text("of somebody else")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    write_rows(tmp_path / "r.jsonl", 2)
    config = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    code, out, err = start(["adapter", *options], tmp_path, verb)
    assert (code, out) == (EXIT_USAGE, "")
    check_shown(err, where=where, fix=fix)


def test_a_kind_of_launch_that_is_none_has_a_fix(tmp_path: Path):
    _, _, err = start(["locl", "a.yaml"], tmp_path, "launch")
    check_shown(err, where="command line", fix=["local?"])
    _, _, err = start(["a.yaml"], tmp_path, "launch")
    check_shown(err, where="command line", fix=["tunesmith"])


def test_a_run_to_load_that_is_not_there_is_told_without_torch(tmp_path: Path):
    program = """
import sys, tunesmith
try:
    tunesmith.load_run("none")
except tunesmith.UsageError as error:
    print(error.where, "torch" in sys.modules)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "none False\n"


def test_a_recipe_that_is_not_there_names_the_command_that_makes_it(tmp_path: Path):
    _, _, err = start(["my-recipe.yaml"], tmp_path)
    makes = "tunesmith train --model demo --data faq.csv"
    check_shown(err, where="my-recipe.yaml", fix=[makes])


@pytest.mark.parametrize(
    ("missing", "there", "near"),
    [
        ("nofile.csv", "flake.lock", False),
        ("nofile.csv", "rows.csv", False),
        ("fqa.csv", "faq.csv", True),
        ("faq.json", "faq.jsonl", True),
    ],
)
def test_only_a_near_name_is_proposed(missing: str, there: str, near: bool, tmp_path: Path):
    (tmp_path / there).write_text("x")
    _, _, err = start(["--model", "demo", "--data", missing], tmp_path)
    check_shown(err, where=missing)
    assert (f"{there}?" in err) == near


@pytest.mark.slow
def test_an_earlier_run_is_told_without_torch(tiny: Path, tmp_path: Path):
    """Finished, or begun with another recipe."""
    write_rows(tmp_path / "rows.jsonl", 40)
    words = ["--model", str(tiny), "--data", "rows.jsonl", "train.duration=1 steps"]
    words += ["log.tensorboard=false", "log.samples=0"]
    run_warm(["train", *words], cwd=tmp_path).check_returncode()
    [file] = (tmp_path / "runs").glob("*.yaml")
    code, out, _ = start([str(file), "--json"], tmp_path)
    assert code == 0
    assert json.loads(out)["finished_before"]
    write_rows(tmp_path / "rows.jsonl", 41)
    told = run_warm(["train", *words, "--json"], cwd=tmp_path)
    told.check_returncode()
    assert json.loads(told.stdout)["finished_before"]
    for err in (start([str(file), "--json"], tmp_path)[2], told.stderr):
        [line] = [line for line in err.splitlines() if line.startswith("warning: ")]
        assert "rows.jsonl" in line
        assert "--fresh" in err
    write_rows(tmp_path / "rows.jsonl", 40)
    code, _, err = start([str(file), "train.seed=7"], tmp_path)
    assert code == EXIT_USAGE
    assert any(line.endswith("train.seed: 42 -> 7") for line in err.splitlines()), err


def interrupted(
    words: list[str], folder: Path, seconds: float, number: signal.Signals
) -> tuple[int, str]:
    """The exit code of a start that gets a signal so many seconds after it begins, and its text."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "train", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(number)
    out, _ = process.communicate(timeout=TIME)
    return process.returncode, out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "number"),
    [
        (0.5, signal.SIGINT),
        (1.0, signal.SIGTERM),
        (2.0, signal.SIGINT),
        (3.0, signal.SIGTERM),
        (5.0, signal.SIGINT),
        (5.0, signal.SIGTERM),
    ],
)
def test_a_signal_before_the_first_step_ends_at_once(
    seconds: float, number: signal.Signals, smollm2: Path, tmp_path: Path
):
    """Whatever is done then: imports, rows, weights, the first step. Nothing is left behind."""
    write_rows(tmp_path / "rows.jsonl", 40)
    words = ["--model", str(smollm2), "--data", "rows.jsonl"]
    code, out = interrupted(words, tmp_path, seconds, number)
    # Before the command has begun the signal itself is its end.
    assert code in (EXIT_STOPPED, 130, -number), out
    assert "Traceback" not in out
    assert "None" not in out
    assert not [*tmp_path.glob("runs/*/checkpoint-*")]


@pytest.mark.slow
def test_a_library_that_holds_the_main_thread_does_not_hold_the_end(tmp_path: Path):
    """The main thread takes a minute that no exception ends; the test waits for half of it."""
    program = """
import time
from tunesmith.host.signals import STOP_PATIENCE_SECONDS, StopRequest
stop = StopRequest()
stop.patience = STOP_PATIENCE_SECONDS
with stop:
    for _ in range(2):
        try:
            print("begun", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == EXIT_STOPPED
    assert "SIGTERM" in err
    assert "Traceback" not in err
