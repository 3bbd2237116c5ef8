"""`tunesmith bench` as typed: a shape and a recipe end to end, what is written, what is refused."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from errors import check_shown
from invoke import invoke
from recipes import recipe
from tunesmith.config.dump import to_yaml
from tunesmith.model.shapes import SHAPES, Shape
from tunesmith.tools.bench.measure import BenchReport
from warm import run_python

SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 320, "max_position_embeddings": 2048,
}  # fmt: skip
BATCH = ["data.seq_len=256", "train.global_batch=512 tokens", "train.micro_batch=512 tokens"]


@pytest.mark.slow
def test_a_shape_end_to_end(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", Shape("a test", SMALL))
    lines = [{"instruction": f"Count to {n}", "input": "", "output": "1 2 " * n} for n in range(30)]
    (tmp_path / "rows.json").write_text(json.dumps(lines))
    out, traces, rows = tmp_path / "out.json", tmp_path / "traces", tmp_path / "rows.json"
    words = ("bench", "--shape", "small", "--data", rows, *BATCH, "model.dtype=fp32", "--tokenizer")
    assert invoke(*words, tmp_path / "none").code == 2
    profile = ("--profile", traces, "profile.wait=0", "profile.warmup=1", "profile.active=1")
    shown = invoke(*words, tiny, "--steps", 3, "--warmup", 1, "--json", out, *profile)
    assert shown.code == 0, shown.err
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


@pytest.mark.slow
def test_a_recipe_with_real_weights_and_every_weight_trained(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(tiny, tmp_path, adapter={"kind": "none"})))
    before = set(tmp_path.iterdir())
    shown = invoke("bench", file, "train.learning_rate=1e-4", "--steps", 2, "--warmup", 0)
    assert (shown.code, "tokens" in shown.out, "checkpoint" in shown.out) == (0, True, False)
    assert set(tmp_path.iterdir()) == before, "nothing is kept"


GOOD: list[Any] = ["--shape", "llama3-8b", "--tokenizer", "t", "--data", "d"]


@pytest.mark.parametrize(
    ("words", "names", "fix"),
    [
        ([], [], "--shape llama3-8b --tokenizer"),
        (["train.seed=1"], [], "tunesmith bench my-recipe.yaml"),
        (["a.yaml", "b.yaml"], [], "tunesmith bench my-recipe.yaml"),
        (["a.yaml", *GOOD], [], "tunesmith bench my-recipe.yaml"),
        (["--shape", "lama3-8b", *GOOD[2:]], ["lama3-8b"], "--shape llama3-8b?"),
        (["--shape", "zzz", *GOOD[2:]], ["zzz"], "qwen3-8b"),
        (GOOD[:4], ["--shape", "--data"], "--data rows.json"),
        ([*GOOD[:2], *GOOD[4:]], ["--shape", "--tokenizer"], "--tokenizer HuggingFaceTB/"),
        (["a.yaml", "--data", "x"], ["--data", "--shape"], "data.train.source=x"),
        (["a.yaml", "--format", "text"], ["--format", "--shape"], "data.train.format=text"),
        ([*GOOD, "--warmup", "-1"], ["--warmup -1"], "0 or more"),
        ([*GOOD, "--json", "no/such/x.json"], ["no/such"], "mkdir -p no/such"),
        ([*GOOD, "--profile", __file__], [__file__], "folder"),
        ([*GOOD, "model.name=gpt2"], [], "--shape NAME --tokenizer"),
        ([*GOOD, "train.sed=1"], ["train.sed"], "train.seed?"),
    ],
)
def test_words_that_name_no_benchmark_are_refused(
    words: list[str], names: list[str], fix: str
) -> None:
    shown = invoke("bench", *words)
    assert (shown.code, shown.out) == (2, "")
    check_shown(shown.err, names=names)
    assert fix in shown.err


@pytest.mark.nightly
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
