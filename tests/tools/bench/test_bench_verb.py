"""`tunesmith bench` as typed: a shape and a recipe end to end, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from errors import check_shown, holds
from invoke import invoke
from recipes import recipe
from tunesmith.config.dump import to_yaml
from tunesmith.model.arch.shapes import SHAPES, Shape
from tunesmith.tools.bench.measure import BenchReport
from tunesmith.tools.bench.shape import write_shape

SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 320, "max_position_embeddings": 2048,
}  # fmt: skip
BATCH = ["data.seq_len=256", "train.global_batch=512 tokens", "train.micro_batch=512 tokens"]


@pytest.mark.slow
def test_a_shape_end_to_end(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", Shape("a test", SMALL))
    lines = [
        {"instruction": f"Count to {n}", "input": "", "output": "1 2 " * n} for n in range(1, 31)
    ]
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
        (["train.seed=1"], [], "tunesmith bench my-recipe.yaml"),
        (["a.yaml", *GOOD], [], "tunesmith bench my-recipe.yaml"),
        (["--shape", "lama3-8b", *GOOD[2:]], ["lama3-8b"], "--shape llama3-8b?"),
        (GOOD[:4], ["--shape", "--data"], "--data rows.json"),
        ([*GOOD[:2], *GOOD[4:]], ["--shape", "--tokenizer"], "--tokenizer HuggingFaceTB/"),
        (["a.yaml", "--data", "x"], ["--data", "--shape"], "data.train.source=x"),
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


def test_a_vocabulary_too_small_for_the_tokenizer_grows_and_that_is_told(
    tiny: Path, tmp_path: Path
) -> None:
    changed = write_shape(tmp_path, SMALL | {"vocab_size": 100}, str(tiny))
    size = len(AutoTokenizer.from_pretrained(tiny))
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == size > 100
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == size
    assert holds(changed, size, 100)
