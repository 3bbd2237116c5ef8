"""`tunesmith bench` as typed: a shape and a recipe end to end, what is written, and what is
refused.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes import recipe
from tunesmith.cli.main import main
from tunesmith.config.dump import to_yaml
from tunesmith.model.shapes import SHAPES, Shape
from tunesmith.tools.bench.measure import BenchReport
from warm import run_python

pytestmark = [pytest.mark.slow, pytest.mark.long]
Capture = pytest.CaptureFixture[str]
SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 320, "max_position_embeddings": 2048,
}  # fmt: skip
BATCH = ["data.seq_len=256", "train.global_batch=512 tokens", "train.micro_batch=512 tokens"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    lines = [
        {"instruction": f"Count to {n}", "input": "", "output": " ".join(map(str, range(1, n + 1)))}
        for n in range(1, 31)
    ]
    path.write_text(json.dumps(lines))
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape of the table that a CPU can train."""
    monkeypatch.setitem(SHAPES, "small", Shape("a test", SMALL))
    return "small"


def typed(*words: object) -> list[str]:
    return ["bench", *map(str, words)]


def test_a_shape_end_to_end(
    small: str, tiny: Path, rows: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, traces = tmp_path / "out.json", tmp_path / "traces"
    words = typed(
        "--shape", small, "--tokenizer", tiny, "--data", rows, *BATCH, "--steps", 3, "--warmup", 1, "--json", out,
        "--profile", traces, "profile.wait=0", "profile.warmup=1", "profile.active=1", "model.dtype=fp32",
    )  # fmt: skip
    assert main(words) == 0
    shown = capsys.readouterr()
    report = json.loads(out.read_text())
    assert set(report) == {"figures", "recipe", "machine", "date", "profile"}
    figures = BenchReport(**report["figures"])  # every name, and no other
    assert (figures.steps, figures.micro_batch, figures.dtype) == (3, "512 tokens", "fp32")
    assert f"{figures.tokens_per_second:,.0f} /s" in shown.out
    assert f"trace: {traces}" in shown.out
    recipe = report["recipe"]
    assert recipe["model"]["name"] == "shape small (a test)"
    assert recipe["train"]["global_batch"] == "512 tokens"
    assert recipe["adapter"]["rank"] == 8
    assert {"torch", "cpu", "command"} <= set(report["machine"])
    assert report["profile"]["traces"] == [str(path) for path in traces.glob("*.pt.trace.json.gz")]
    assert "step 6/6" in shown.err, "progress goes to stderr"
    assert str(tmp_path) not in json.dumps(report["recipe"]["model"]["name"])


def test_a_recipe_with_real_weights_and_every_weight_trained(
    tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(tiny, tmp_path, adapter={"kind": "none"})))
    before = set(tmp_path.iterdir())
    assert main(typed(file, "train.learning_rate=1e-4", "--steps", 2, "--warmup", 0)) == 0
    shown = capsys.readouterr().out
    assert "tokens" in shown
    assert "checkpoint" not in shown
    assert set(tmp_path.iterdir()) == before, "nothing is kept"


GOOD: list[Any] = ["--shape", "llama3-8b", "--tokenizer", "t", "--data", "d"]


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        ([], "bench requires one recipe or one shape", "--shape llama3-8b --tokenizer"),
        (["train.seed=1"], "bench requires one recipe or one shape", "tunesmith bench my-recipe.yaml"),
        (["a.yaml", "b.yaml"], "one recipe or one shape", "tunesmith bench my-recipe.yaml"),
        (["a.yaml", *GOOD], "one recipe or one shape", "tunesmith bench my-recipe.yaml"),
        (["--shape", "lama3-8b", *GOOD[2:]], "there is no model shape 'lama3-8b'", "did you mean --shape llama3-8b?"),
        (["--shape", "zzz", *GOOD[2:]], "there is no model shape 'zzz'", "qwen3-8b"),
        (GOOD[:4], "--shape needs --data", "--data rows.json"),
        ([*GOOD[:2], *GOOD[4:]], "--shape needs --tokenizer", "--tokenizer HuggingFaceTB/"),
        (["a.yaml", "--data", "x"], "--data requires --shape", "data.train.source=x"),
        (["a.yaml", "--format", "text"], "--format requires --shape", "data.train.format=text"),
        ([*GOOD, "--warmup", "-1"], "--warmup -1 is negative", "0 or more"),
        ([*GOOD, "--json", "no/such/x.json"], "there is no folder no/such", "mkdir -p no/such"),
        ([*GOOD, "--profile", __file__], "is a file", "give a folder"),
        ([*GOOD, "model.name=gpt2"], "the model and tokenizer of a shape cannot be overridden", "--shape NAME --tokenizer"),
        ([*GOOD, "train.sed=1"], "unknown key train.sed", "did you mean train.seed?"),
    ],
)  # fmt: skip
def test_what_is_refused(words: list[str], what: str, fix: str, capsys: Capture) -> None:
    assert main(typed(*words)) == 2
    shown = capsys.readouterr()
    first, *rest = shown.err.splitlines()
    assert what in first
    assert any(line.startswith("  fix: ") and fix in line for line in rest), shown.err
    assert (shown.out, "Traceback" in shown.err) == ("", False)


def test_what_is_refused_once_the_tokenizer_is_known(
    small: str, tiny: Path, rows: Path, capsys: Capture
) -> None:
    good = ["--tokenizer", tiny, "--data", rows, *BATCH, "--steps", 1, "--warmup", 0]
    assert main(typed("--shape", small, "--tokenizer", rows.parent / "none", *good[2:])) == 2
    assert "none" in capsys.readouterr().err


def test_an_ablation_measures_other_code_and_other_keys_in_turns(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """benchmarks/speed/ablation.py: all variants ran, and give the same loss in fp32."""
    file, out = tmp_path / "recipe.yaml", tmp_path / "out.json"
    file.write_text(to_yaml(recipe(tiny, tmp_path, held=False)))
    names = ["grouped adapters", "fused modules", "train.recompute=full"]
    script = str(Path(__file__).parents[3] / "benchmarks" / "speed" / "ablation.py")
    words = ["--only", *names, "--rounds", 1, "--json", out, file, "--steps", 2, "--warmup", 0]
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    monkeypatch.setattr(subprocess, "run", run_python)
    runpy.run_path(script, run_name="__main__")
    table = json.loads(out.read_text())["table"]
    assert list(table) == ["as given", *names]
    for row in table.values():
        assert row["last_loss"] == pytest.approx(table["as given"]["last_loss"], rel=1e-5)
