"""Fixes that name commands and settings, in Python's words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tunesmith
from errors import refuses
from tunesmith.config.in_python import fix_in_python
from tunesmith.config.layers import override_layer
from tunesmith.errors import CheckpointError, UsageError


@pytest.mark.parametrize(
    ("function", "fix", "python"),
    [
        ("train", "start over with --fresh, or checkpoint.resume=force", 'start over with fresh=True, or {"checkpoint.resume": "force"}'),
        ("train", "tunesmith train 'runs/my run/config.yaml' --fresh; or not", 'tunesmith.train("runs/my run/config.yaml", fresh=True); or not'),
        ("train", "tunesmith train a.yaml train.seed=43 output_dir=runs/b", 'tunesmith.train("a.yaml", {"train.seed": 43, "output_dir": "runs/b"})'),
        ("compare", "`tunesmith train a.yaml 'train.duration=50 steps' output_dir=b`", '`tunesmith.train("a.yaml", {"train.duration": "50 steps", "output_dir": "b"})`'),
        ("train", "'train.duration=3 epochs', 'data.leave_out=[near-duplicates]'", '{"train.duration": "3 epochs"}, {"data.leave_out": ["near-duplicates"]}'),
        ("train", "name them: --columns prompt=a,completion=b, or --split test", 'name them: {"data.train.columns": {"prompt": "a", "completion": "b"}}, or {"data.train.split": "test"}'),
        ("evaluate", "--columns prompt=a; --format alpaca; --data FILE", 'columns={"prompt": "a"}; format_name="alpaca"; data=FILE'),
        ("evaluate", "or name rows: tunesmith eval RUN --data FILE", "or name rows: tunesmith.evaluate(RUN, data=FILE)"),
        ("merge", "use --force to replace it, or --dtype fp32", 'use force=True to replace it, or dtype="fp32"'),
        ("generate", "a smaller --max-new-tokens", "a smaller max_new_tokens"),
        ("train", "tunesmith train --model demo --data faq.csv", 'tunesmith.train(model="demo", rows=ROWS)'),
        ("train", "tunesmith train --fresh; or `tunesmith train` once", "tunesmith.train(fresh=True); or `tunesmith train` once"),
        ("evaluate", "say: --columns prompt=q --columns completion=a, or --format", 'say: columns={"prompt": "q", "completion": "a"}, or format_name'),
        ("evaluate", "`tunesmith eval runs/a 'runs/b c' --data x.jsonl`", '`tunesmith.evaluate("runs/a", data="x.jsonl"), tunesmith.evaluate("runs/b c", data="x.jsonl")`'),
        ("evaluate", "--columns FILE; use runs/a--force", 'columns=FILE; use runs/a--force'),
        ("train", "tunesmith train --model demo train.seed=2", 'tunesmith.train(overrides={"train.seed": 2}, model="demo")'),
        ("evaluate", "did you mean --score exact?", 'did you mean scorers=["exact"]?'),
        ("evaluate", "--score exact", 'scorers=["exact"]'),
        ("load_run", "tunesmith fetch MODEL; a longer train.duration", "tunesmith fetch MODEL; a longer train.duration"),
    ],
)  # fmt: skip
def test_a_fix_is_in_the_words_of_the_caller(function: str, fix: str, python: str) -> None:
    assert fix_in_python(fix, function) == python


FUNCTIONS = ["train", "evaluate", "merge", "generate", "load_run", "export_gguf", "compare"]


def texts_of_the_source() -> list[str]:
    """Each text in it that names a command or an option; what is filled in is a path."""
    texts = []
    for file in Path(tunesmith.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = ""
            for piece in pieces:
                if isinstance(piece, ast.FormattedValue):
                    text += "'runs/my run/x'"
                elif isinstance(piece, ast.Constant) and isinstance(piece.value, str):
                    text += piece.value
            if re.search(r"tunesmith (train|eval|merge)|--[a-z]", text):
                texts.append(text)
    return texts


def calls_in(text: str) -> Iterator[str]:
    """Each call of ours in a text, up to the first bracket that closes it; Python refuses a keyword
    that is given twice."""
    for match in re.finditer(r"\btunesmith\.(?:train|evaluate|merge)\(", text):
        for end in range(match.end(), len(text) + 1):
            try:
                ast.parse(text[match.start() : end], mode="eval")
            except SyntaxError:
                continue
            yield text[match.start() : end]
            break
        else:
            pytest.fail(f"no call of Python: {text[match.start() :]}")


def test_every_fix_of_the_source_can_be_translated() -> None:
    texts = texts_of_the_source()
    calls = [
        call for text in texts for name in FUNCTIONS for call in calls_in(fix_in_python(text, name))
    ]
    assert len(texts) > 200
    assert len(calls) > 20 * len(FUNCTIONS)


WORDS = "tunesmith train eval merge ` ' -- --fresh --columns a=b,c x".split()


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=4)), st.sampled_from(FUNCTIONS))
def test_no_fix_ends_in_another_error(words: list[str], function: str) -> None:
    fix_in_python(" ".join(words), function)


@pytest.mark.parametrize(
    ("function", "arguments", "where"),
    [
        ("train", {"recipe": "nope.yaml"}, "nope.yaml"),
        (
            "train",
            {"recipe": "llama3.1-8b-lora", "overrides": "train.sed=1"},
            "overrides: train.sed",
        ),
        ("evaluate", {}, "data"),
        ("load_run", {"device": "cuda:99"}, "device"),
        ("export_gguf", {"output": ""}, "output"),
    ],
)
def test_a_place_is_an_argument(
    function: str, arguments: dict[str, object], where: str, request: pytest.FixtureRequest
) -> None:
    if function != "train":
        arguments = {"path": request.getfixturevalue("tiny"), **arguments}
    with pytest.raises(UsageError) as caught:
        getattr(tunesmith, function)(**arguments)
    assert caught.value.where == where


def test_one_override_may_be_a_text() -> None:
    assert override_layer("train.seed=7").plain() == {"train": {"seed": 7}}


def test_what_the_package_gives_raises_such_fixes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: x}\n")
    with refuses(CheckpointError, fix=[f'tunesmith.train("{tmp_path / "config.yaml"}")']):
        tunesmith.load_run(tmp_path)
    assert tunesmith.load_run.__name__ == "load_run"
