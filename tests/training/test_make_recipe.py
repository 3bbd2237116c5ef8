"""Rows of a user's own become a run and a recipe: `tunesmith train --model X --data FILE`."""

from __future__ import annotations

import json
import re
import shutil
import signal
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from errors import check_shown, holds, lines_with, refuses, warnings_with
from recipes import WORDS
from runs import make_run, peft_model, write_rows
from tunesmith.checkpoint.start_adapter import find_adapter
from tunesmith.cli.main import main
from tunesmith.config.dump import differences, dump
from tunesmith.config.load import load_recipe
from tunesmith.config.row_settings import rows_set_by
from tunesmith.config.schema import Run
from tunesmith.config.shipped import schema_line
from tunesmith.errors import CheckpointError, DataError, ModelError, RecipeError, StoppedError
from tunesmith.hub import fetch
from tunesmith.metrics.record import read_records
from tunesmith.model.arch.tokenizer import load_tokenizer
from tunesmith.start.draft import draft_recipe
from tunesmith.start.make_recipe import default_learning_rate, make_recipe
from tunesmith.start.prepare import prepare_data
from tunesmith.start.run import train

Capture = pytest.CaptureFixture[str]
PAIRS = [(f"What is number {i}?", f"Number {i} is {WORDS[i % 10]}.") for i in range(40)]
MORE = [(f"And what is number {i}?", f"It is {WORDS[i % 10]}.") for i in range(10)]
CHATS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in PAIRS
]


def write_table(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [f"{question},{answer},numbers\n" for question, answer in rows]
    path.write_text("".join(["Question,Answer,Topic\n", *lines]))


@pytest.fixture
def home(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user, with a table and a chat in it and a model beside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "small").symlink_to(tiny)
    write_table(tmp_path / "faq.csv", PAIRS)
    write_rows(tmp_path / "chat.jsonl", CHATS)
    return tmp_path


SMALL = ["model.dtype=fp32", "train.duration=3 steps", "log.tensorboard=false"]


def start(data: str, *words: str) -> list[str]:
    return ["train", "--model", "small", "--data", data, *SMALL, *words]


@pytest.mark.slow
def test_rows_of_ones_own_are_trained_on(home: Path, capsys: Capture) -> None:
    name = "runs/faq-small"
    assert main(start("faq.csv")) == 0
    shown, told = capsys.readouterr()
    assert lines_with(told, "train: faq.csv", 34, 40, "6 examples")
    assert lines_with(shown, f"tunesmith chat {name}"), "as a user there writes it"
    assert lines_with(told, "faq.csv", "40 rows", "prompt = Question", "Topic")
    assert lines_with(told, "recipe:", f"{name}.yaml", f"tunesmith train {name}.yaml")
    assert (home / name / "final/adapter_model.safetensors").is_file()
    made = make_recipe("small", "faq.csv", SMALL)
    assert differences(load_recipe(home / f"{name}.yaml"), made.run) == []
    assert main(["train", f"{name}.yaml"]) == 0
    assert holds(capsys.readouterr().out, "train.duration", "--fresh")


@pytest.mark.slow
def test_training_of_a_run_continues_with_more_rows(home: Path, capsys: Capture) -> None:
    first = [*SMALL, "adapter.rank=4", "adapter.alpha=4", "output_dir=runs/mine"]
    assert main(["train", "--model", "small", "--data", "faq.csv", *first]) == 0
    write_table(home / "more.csv", [*PAIRS, *MORE])
    (home / "runs/mine/final").rename(home / "runs/mine/checkpoint-900")
    assert main(start("more.csv", "adapter.from=runs/mine", "output_dir=runs/more")) == 0
    assert not warnings_with(capsys.readouterr().err, "model.name")
    run = load_recipe(home / "runs/more.yaml")
    assert (run.adapter.rank, run.adapter.alpha) == (4, 4), "those of the first run"
    # What it began with stays, whatever becomes of the first run.
    shutil.copytree(home / "runs/mine/checkpoint-900", home / "runs/mine/final")
    assert main(["train", "runs/more.yaml", "train.duration=4 steps"]) == 0
    resumed = load_recipe(home / "runs/more/config.yaml")
    assert resumed.adapter.from_ == str(home / "runs/mine/checkpoint-900")


@pytest.mark.slow
def test_an_adapter_on_another_base_is_told_of(home: Path, tiny: Path, capsys: Capture) -> None:
    """Weights of the same shapes fit, and would be of no use. On the same base: the test above."""
    make_run(home / "mine", tiny, peft_model(tiny))
    assert main(start("faq.csv", "adapter.from=mine", "data.hold_out=null")) == 0
    assert warnings_with(capsys.readouterr().err, f"model.name={tiny}", "small")


@pytest.mark.slow
def test_an_adapter_is_continued_at_half_the_rate(home: Path, tiny: Path) -> None:
    make_run(home / "mine", tiny, peft_model(tiny))
    fresh = make_recipe("small", "faq.csv")
    continued = make_recipe("small", "faq.csv", ["adapter.from=mine"])
    assert continued.run.train.learning_rate == fresh.run.train.learning_rate / 2
    assert continued.run.train.duration.amount == 3, "more epochs are for a new adapter"
    assert (continued.run.adapter.rank, continued.run.adapter.alpha) == (4, 8)
    assert continued.run.adapter.target == "all-linear", "as the run's recipe has it"


@pytest.mark.slow
def test_an_adapter_of_a_run_is_its_newest_whole_checkpoint(home, tiny):
    make_run(home / "mine", tiny, peft_model(tiny))
    (home / "mine/final").rename(home / "mine/checkpoint-3")
    assert find_adapter("mine") == home / "mine/checkpoint-3"
    (home / "mine/checkpoint-3").rename(home / "elsewhere")
    with refuses(CheckpointError, where="mine", fix=["tunesmith train"]):
        find_adapter("mine")
    make_run(home / "full", tiny, AutoModelForCausalLM.from_pretrained(tiny))
    with refuses(ModelError, where="adapter.from: full", fix=["model.name=full/final"]):
        find_adapter("full")


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
    assert main(start("faq.csv", "checkpoint.every=1 steps")) == 0
    records = read_records(home / "runs/faq-small/metrics.jsonl")
    assert [record.step for record in records] == [1, 2, 3]
    assert made.path.read_bytes() == began


@pytest.mark.parametrize(
    "words", [["--data", "none.csv"], ["--data", "faq.csv", "data.hold_out=40 examples"]]
)
def test_a_refused_start_leaves_no_trace(words: list[str], home: Path, capsys: Capture) -> None:
    assert main(["train", "--model", "small", *words, *SMALL]) == 2
    assert "fix:" in capsys.readouterr().err
    assert not (home / "runs").exists()


@pytest.mark.slow
def test_a_plan_makes_the_recipe_and_leaves_no_file(home: Path, capsys: Capture) -> None:
    files = sorted(home.iterdir())
    words = ["--model", "small", "--data", "faq.csv"]
    assert main(["plan", *words, "--on", "h100", "--json", "train.duration=2 epochs"]) == 0
    work = json.loads(capsys.readouterr().out)["work"]
    made = make_recipe("small", "faq.csv", ["train.duration=2 epochs"])
    assert (work["steps"], work["longest"]) == (2 * 34, made.mean_length)
    assert sorted(path for path in home.iterdir() if path.name != "cache") == files


@pytest.mark.slow
def test_a_sweep_varies_the_recipe_that_train_makes(home, monkeypatch):
    sweep_module = pytest.importorskip("tunesmith.tools.sweep.run")
    swept: list[tuple[Run, list[dict[str, str]]]] = []

    def note(recipe: str, space: Any, *, argv: object) -> dict[str, Any]:
        swept.append((load_recipe(recipe, space.fixed), space.grid()))
        raise StoppedError("a stop")

    monkeypatch.setattr(sweep_module, "run_sweep", note)
    words = ["train.learning_rate=1e-4,1e-3", "train.duration=30 steps"]
    assert main(["sweep", "--model", "small", "--data", "faq.csv", *words]) == 75
    made = make_recipe("small", "faq.csv", words[1:])
    rates = [{"train.learning_rate": "1e-4"}, {"train.learning_rate": "1e-3"}]
    assert swept == [(made.run, rates)]


@pytest.mark.slow
def test_a_slurm_job_trains_the_recipe_that_train_makes(home, capsys):
    words = ["--model", "small", "--data", "faq.csv", "train.seed=7", "--gpus-per-node", "8"]
    assert main(["launch", "slurm", *words, "--render"]) == 0
    made = make_recipe("small", "faq.csv", ["train.seed=7"], ranks=8)
    # The processor of the login node decides nothing.
    assert made.run.model.dtype == "auto"
    assert f"\n{dump(made.run)}END-OF-RECIPE\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_recipe_of_another_command_is_not_overwritten(home: Path) -> None:
    made = make_recipe("small", "faq.csv")
    made.write_file()
    # The same command in other words resumes its run.
    make_recipe("./small", str(home / "faq.csv")).check_file()
    other = make_recipe("small", "faq.csv", ["train.duration=20 epochs"])
    made.path.write_text(made.text.replace("rank: 16", "rank: 16   # mine"))
    made.check_file()  # a comment changes nothing
    made.path.write_text(made.text.replace("rank: 16", "rank: 4"))
    for each in (made, other):
        fix = ["tunesmith train runs/faq-small.yaml", "output_dir=runs/NAME"]
        with refuses(RecipeError, fix=fix):
            each.check_file()


OWN = ["--model", "small", "--data", "faq.csv"]
VERBS = ("train", "data", "plan")
UNCLEAR: list[tuple[list[str], str]] = [  # words, and what the fix has
    (["--data", "chat.jsonl", "train.seed=1"], "--model demo --data chat.jsonl"),
    (["faq.csv", "train.seed=1"], "--model demo --data faq.csv"),
    # The shell has replaced a pattern.
    ([*OWN, "chat.csv"], "--model small --data './*.csv'"),
    (["smollm2-135m-lora", "--data", "faq.csv"], "remove --data"),
    (["smollm2-135m-lora", "--model", "small", "train.seed=1"], "remove --model"),
    ([*OWN, "model.name=other"], "--data"),
    ([*OWN, "data.train=null"], "a recipe"),
    ([*OWN, "--columns", "prompt=Question,completion=Question"], "--columns"),
    ([*OWN, "--split", "test"], "--split train"),
]


@pytest.mark.parametrize(
    ("verb", "words", "fix"),
    [(VERBS[number % 3], *row) for number, row in enumerate(UNCLEAR)],
)
def test_what_is_asked_for_must_be_clear(verb, words, fix, home, capsys):
    assert main([verb, *words]) == 2
    told = capsys.readouterr().err
    check_shown(told, fix=[f"tunesmith {verb} {fix}" if fix.startswith("--model ") else fix])


@pytest.mark.parametrize(
    ("rows", "held", "epochs", "batch", "every", "patience"),
    [
        (8, "None", 10, 1, 5, None),
        (49, "6 examples", 10, 4, 10, None),
        (80, "10 examples", 8, 4, 10, 3),
        (300, "5 %", 3, 8, 10, 3),
        pytest.param(12_000, "500 examples", 2, 64, 50, 3, marks=pytest.mark.slow),
    ],
)
def test_sizes_and_steps_follow_the_number_of_rows(
    rows, held, epochs, batch, every, patience, home
):
    write_rows(home / "many.jsonl", [{"text": f"row {i}"} for i in range(rows)])
    run = make_recipe("small", "many.jsonl").run
    assert str(run.data.hold_out) == held
    assert str(run.train.duration) == f"{epochs} epochs"
    assert str(run.train.global_batch) == f"{batch} examples"
    assert str(run.validate.every) == str(run.checkpoint.every) == f"{every} steps"
    assert run.validate.patience == patience


PAIR = {"prompt": "Which?", "chosen": "this", "rejected": "that"}
GOOD, BAD = ({"prompt": "Which?", "completion": "this", "label": label} for label in (True, False))
SHORT = [{"text": "x" * 10}] * 30
# rows, or None for faq.csv; words; ranks; values of the recipe
DECIDED: list[tuple[Any, list[str], int, dict[str, str]]] = [
    # Of few steps there are five validations.
    (None, ["train.duration=20 steps"], 1, {"validate.every": "4 steps"}),
    ([PAIR] * 600, [], 1, {"train.duration": "1 epochs", "method.name": "dpo"}),
    ([PAIR] * 40, ["method.beta=0.2"], 1, {"method.name": "dpo", "method.beta": "0.2"}),
    # KTO compares the answers of a batch.
    ([GOOD, BAD], [], 1, {"method.name": "kto", "train.global_batch": "4 examples"}),
    # No rank is idle.
    (None, ["parallel.tensor=2"], 4, {"train.global_batch": "2 examples"}),
    (None, [], 99, {"train.global_batch": "34 examples", "train.learning_rate": "0.001"}),
    # Room for the longest row and an end token, within the model's context.
    # An answer of 100 tokens is sampled to each prompt. A reward may rise late.
    (
        [{"question": "x" * 200, "target": 1}] * 60,
        ["method={name: grpo, reward: r.py:f, answer_tokens: 100}"],
        1,
        {
            "data.seq_len": "512",
            "train.global_batch": "8 examples",
            "validate.patience": "None",
            "train.schedule": "constant",
            "train.learning_rate": "0.0001",
        },
    ),
    ([*SHORT, {"text": "x" * 255}], [], 1, {"data.seq_len": "256"}),
    ([*SHORT, {"text": "x" * 256}], [], 1, {"data.seq_len": "512"}),
    ([*SHORT, {"text": "x" * 5000}], [], 1, {"data.seq_len": "2048"}),
]


@pytest.mark.parametrize(("rows", "words", "ranks", "expected"), DECIDED)
@pytest.mark.slow
def test_what_rows_and_ranks_decide(rows, words, ranks, expected, home):
    if rows:
        write_rows(home / "rows.jsonl", rows)
    file = "rows.jsonl" if rows else "faq.csv"
    (home / "r.py").write_text("def f(answer, row):\n    return 1.0\n")
    run = make_recipe("small", file, words, ranks=ranks).run
    assert {key: str(attrgetter(key)(run)) for key in expected} == expected
    # The scorers of sampled answers get the columns that are not part of the prompt.
    is_scored = run.method.name == "grpo"
    assert draft_recipe("small", file, words).about_data.endswith("scorers: target") == is_scored


@pytest.mark.parametrize(("letters", "seq_len"), [(400, 256), (2000, 512), (40_000, 2048)])
def test_on_paper_the_longest_row_is_estimated_from_its_characters(
    letters, seq_len, home, monkeypatch
):
    """The model is not on this machine, so its tokenizer is unknown."""
    config = json.loads(LlamaConfig(max_position_embeddings=8192).to_json_string(use_diff=False))
    monkeypatch.setattr(fetch, "config_in_package", lambda model: config)
    write_rows(home / "rows.jsonl", [*SHORT, {"text": "x" * letters}])
    made = make_recipe("someone/some-model", "rows.jsonl", on_paper=True)
    assert made.run.data.seq_len == seq_len


@pytest.mark.slow
def test_bad_rows_are_left_out_of_the_look_too(home: Path) -> None:
    rows: list[Any] = [{"prompt": question, "completion": answer} for question, answer in PAIRS]
    rows[7]["completion"] = None
    write_rows(home / "rows.jsonl", rows)
    with refuses(DataError, where="rows.jsonl:8", fix=["data.bad_rows=skip"]):
        make_recipe("small", "rows.jsonl")
    assert make_recipe("small", "rows.jsonl", ["data.bad_rows=skip"]).run.data.bad_rows == "skip"


def test_the_learning_rates_of_the_docs_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\d+|any) \| [^|]+ \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    assert len(rows) == 9
    for name, hidden, lora, full in rows:
        family = "gpt_oss" if name == "others" else name
        for width in (256, 4096, 16384) if hidden == "any" else (int(hidden),):
            assert default_learning_rate("lora", family, width) == float(lora), (family, width)
            assert default_learning_rate("none", family, width) == float(full), (family, width)


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
    made.path.write_text(made.text)
    assert differences(load_recipe(made.path), made.run) == []
    values = {"data.hold_out": "10 %", "data.system": "Be brief.\nBe: kind."}
    by_python = make_recipe(str(home / "small"), str(home / "faq.csv"), values)
    made.path.write_text(by_python.text)  # the command in its comment has two lines
    assert differences(load_recipe(made.path), by_python.run) == []


@pytest.mark.slow
def test_a_hub_data_set_is_read_from_its_train_split(home, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "datasets--me--rows"
    folder = repo / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(folder.name)
    rows = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in PAIRS)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(rows)
    made = make_recipe("small", "me/rows")
    assert (made.run.data.train[0].source, made.run.data.train[0].split) == ("me/rows", "train")
    assert made.path.name == "rows-small.yaml"
    assert dict(draft_recipe("small", "me/rows").unused_splits) == {"test": 40}
    (folder / "train.jsonl").rename(folder / "dev.jsonl")
    with (
        refuses(DataError, where="me/rows", names=["train"], fix=["--split validation"]),
        rows_set_by(option=True),
    ):
        make_recipe("small", "me/rows")
    chosen = make_recipe("small", "me/rows", ["data.train.split=test"])
    assert chosen.run.data.train[0].split == "test"


@pytest.mark.slow
def test_of_a_folder_of_texts_no_document_is_lost(home: Path) -> None:
    (home / "corpus").mkdir()
    for i in range(40):
        # A byte is a token here.
        (home / f"corpus/{i:02}.txt").write_text(f"{i} " * (20 if i % 2 else 4000))
    run = make_recipe("small", "corpus").run
    assert (run.data.train[0].format, run.data.too_long, run.data.seq_len) == ("text", "auto", 2048)
    # Some 3.4 parts each: 10 of them tell when to stop.
    assert str(run.data.hold_out) == "4 examples"
    tokenizer = load_tokenizer(home / "small", run.model)
    prepared = prepare_data(run, tokenizer, {256}, 272, cache=home / "cache")
    assert prepared.validation is not None
    supervised = prepared.train.counts.supervised + prepared.validation.counts.supervised
    assert supervised == sum(len(path.read_text()) for path in (home / "corpus").iterdir())


def test_the_written_recipe_says_why_and_is_read_to_the_same_run(home: Path) -> None:
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
