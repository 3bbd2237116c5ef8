"""Every command of the README and of docs/ runs, page by page, on a tiny model; and every shipped
recipe takes a step. A command that is neither run nor named in NOT_OURS fails the test.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli.main import main
from tunesmith.config.load import load_recipe
from tunesmith.config.shipped import copy_of, shipped
from tunesmith.model.arch.shapes import SHAPES, Shape

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
# How many commands of ours each page has, at least
PAGES = {"README.md": 13, "docs/choosing.md": 3, "docs/memory.md": 2, "docs/spark.md": 6, "docs/troubleshooting.md": 6}  # fmt: skip
# Programs of others, and what has tests of its own: make (CI), the four scripts (test_playbook.py),
# the image (launch/).
NOT_OURS = (
    "pip install", "make ", "vllm serve", "tensorboard ", "python scripts/", "docker build", "docker run", "hf auth", "source ",
    "python3 -m venv", "cd faq-model && ollama create", "cd my-model && ollama create",
)  # fmt: skip
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
    """A reader's folder: rows, held-out rows and questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SHAPES, "llama3-8b", Shape("a test", TINY_SHAPE))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say 3\n"))
    answers = [(f"Say {n}", f"number {n}", n % 2 == 0) for n in range(24)]
    pairs = [{"prompt": asked, "chosen": said, "rejected": "no"} for asked, said, _ in answers]
    names = ("prompt", "completion", "label")
    feedback = [dict(zip(names, answer, strict=True)) for answer in answers]
    more = [{"messages": row["messages"]} for row in ROWS]
    for name, rows in {"rows": ROWS, "more": more, "pairs": pairs, "feedback": feedback}.items():
        for file, kept in ((name, rows), (f"held-out-{name}".removesuffix("-rows"), rows[:4])):
            text = "".join(json.dumps(row) + "\n" for row in kept)
            (tmp_path / f"{file}.jsonl").write_text(text)
    shutil.copy("held-out.jsonl", "questions.jsonl")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    faq = "question,answer\n" + "".join(f"Say {n},number {n}\n" for n in range(24))
    (tmp_path / "demo").mkdir()
    for name in ("faq.csv", "demo/faq.csv", "more.csv"):
        (tmp_path / name).write_text(faq)
    return tmp_path


def stand_ins(words: list[str], tiny: Path) -> list[str]:
    """A command on the tiny model and few rows, on a CPU that has little time."""
    hub = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct", "demo")  # fmt: skip
    words = [str(tiny) if word in hub else word for word in words]
    verb = words[0]
    if verb == "bench":
        small = shlex.split("--steps 2 --warmup 1 data.seq_len=64 'train.global_batch=256 tokens'")
        return [*words, *small, *TRACED]
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
    rows = {"preference": "pairs", "feedback": "feedback"}.get(kind, "rows")
    held_out = f"held-out-{rows}".removesuffix("-rows")
    return [
        f"data.train={{source: {rows}.jsonl, format: {kind}}}", f"data.validation={{source: {held_out}.jsonl, format: {kind}}}",
        "data.seq_len=256", "train.global_batch=4 examples", "train.warmup=0 steps",
    ]  # fmt: skip


def recipe_of_the_readme(tiny: Path) -> str:
    """my-recipe.yaml on the tiny model."""
    recipe = next(b for b in blocks(README, "yaml") if "my-recipe.yaml" in b[0])
    return re.sub(r"name: meta-llama/[\w.-]+", f"name: {tiny}", "\n".join(recipe))


def in_each_lane(names: Iterable[str], every_change: tuple[str, ...]) -> list[Any]:
    """Parameters that are tested with every change, and others that are tested at night."""
    slow, nightly = pytest.mark.slow, pytest.mark.nightly
    return [pytest.param(name, marks=slow if name in every_change else nightly) for name in names]


@pytest.mark.parametrize("page", in_each_lane(PAGES, ("README.md",)))
def test_every_command_runs(
    page: str, place: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "\ntunesmith recipes copy" not in (ROOT / page).read_text():
        (place / "my-recipe.yaml").write_text(recipe_of_the_readme(tiny))
    if page == "docs/troubleshooting.md":
        assert main(["train", "my-recipe.yaml"]) == 0
    run_count = 0
    for block in blocks(ROOT / page):
        commands = [typed(line) for line in block if line.strip() and line[0] != "#"]
        for command in commands:
            if command.startswith(NOT_OURS):
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
    assert capsys.readouterr().out, "the example prints an answer, maybe line breaks alone"


@pytest.mark.slow
def test_the_example_of_the_python_page_runs(
    place: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "my-recipe.yaml").write_text(recipe_of_the_readme(tiny))
    (example,) = blocks(ROOT / "docs/python.md", "python")
    exec("\n".join(example), {})
    steps, losses = capsys.readouterr().out.split(maxsplit=1)
    assert len(json.loads(losses)) == int(steps)


@pytest.mark.parametrize("name", in_each_lane(shipped(), ("smollm2-135m-full", "qwen3-8b-dpo")))
def test_every_shipped_recipe_takes_a_step(
    name: str, place: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", name, f"model.name={tiny}", *own_rows(name), "train.duration=1 steps"]
    # The tiny model has no such template, nor these layers, nor a part that sees.
    words += ["validate.every=null", "data.template_args={}"]
    if name.startswith(("nemotron", "mistral-small")):
        words.append("adapter.target=all-linear")
    if "-vision-" in name:
        words.append("model.vision=false")
    if name.endswith("-grpo"):
        columns = "{prompt: instruction, completion: output}"
        words += [f"data.train.columns={columns}", f"data.validation.columns={columns}"]
        words += ["method.answer_tokens=16", "data.seq_len=512"]
    assert main(words) == 0, capsys.readouterr().err
    records = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 1
    assert json.loads(records[0])["val_loss"] > 0
