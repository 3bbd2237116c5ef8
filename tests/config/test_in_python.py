"""Fixes that name commands and settings, in Python's words."""

from __future__ import annotations

from pathlib import Path

import pytest

import tunesmith
from errors import refuses
from tunesmith.config.in_python import fix_in_python
from tunesmith.errors import CheckpointError


@pytest.mark.parametrize(
    ("function", "fix", "python"),
    [
        ("train", "start over with --fresh, or checkpoint.resume=force", 'start over with fresh=True, or {"checkpoint.resume": "force"}'),
        ("train", "tunesmith train 'runs/my run/config.yaml' --fresh; or not", 'tunesmith.train("runs/my run/config.yaml", fresh=True); or not'),
        ("train", "tunesmith train a.yaml train.seed=43 output_dir=runs/b", 'tunesmith.train("a.yaml", {"train.seed": 43, "output_dir": "runs/b"})'),
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
        ("evaluate", "--score exact", 'scorers=["exact"]'),
        ("load_run", "tunesmith fetch MODEL; a longer train.duration", "tunesmith fetch MODEL; a longer train.duration"),
    ],
)  # fmt: skip
def test_a_fix_is_in_the_words_of_the_caller(function: str, fix: str, python: str) -> None:
    assert fix_in_python(fix, function) == python


def test_what_the_package_gives_raises_such_fixes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: x}\n")
    with refuses(CheckpointError, fix=[f'tunesmith.train("{tmp_path / "config.yaml"}")']):
        tunesmith.load_run(tmp_path)
    assert tunesmith.load_run.__name__ == "load_run"
