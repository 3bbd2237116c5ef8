"""`tunesmith bench` as typed: a shape and a recipe end to end, what is written, and what is
refused.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from devices import take_small_peak
from errors import holds, lines_with, refuses
from recipes import make_run, recipe
from tunesmith.cli.main import main
from tunesmith.config.dump import to_yaml
from tunesmith.errors import RunError, UsageError
from tunesmith.model.shapes import SHAPES, Shape
from tunesmith.tools.bench import ablation
from tunesmith.tools.bench.measure import BenchReport
from tunesmith.tools.bench.run_bench import check_compiles
from warm import CLOSED, become, run_python, run_warm

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("small_peak")]
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
    assert lines_with(shown.out, "seq_len")
    assert lines_with(shown.out, "ms", "calls")
    recipe = report["recipe"]
    assert recipe["model"]["name"] == "shape small (a test)"
    assert recipe["train"]["global_batch"] == "512 tokens"
    assert recipe["adapter"]["rank"] == 8
    assert {"torch", "cpu", "command"} <= set(report["machine"])
    assert report["profile"]["traces"] == [str(path) for path in traces.glob("*.pt.trace.json.gz")]
    assert report["profile"]["tables"] == [str(path) for path in traces.glob("top-*.txt")]
    assert "step 6/6" in shown.err, "progress goes to stderr"
    assert str(tmp_path) not in json.dumps(report["recipe"]["model"]["name"])


def test_a_recipe_with_real_weights_and_every_weight_trained(
    tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(tiny, tmp_path, adapter={"kind": "none"})))
    before = set(tmp_path.iterdir())
    assert (
        main(typed(file, "train.learning_rate=1e-4", "--steps", 2, "--warmup", 0, "--plain")) == 0
    )
    shown = capsys.readouterr().out
    assert "tokens" in shown
    assert "checkpoint" not in shown
    assert set(tmp_path.iterdir()) == before, "nothing is kept"


GOOD: list[Any] = ["--shape", "llama3-8b", "--tokenizer", "t", "--data", "d"]


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        ([], "bench requires a recipe or a shape", "--shape llama3-8b --tokenizer"),
        (["train.seed=1"], "bench requires a recipe or a shape", "tunesmith bench my-recipe.yaml"),
        (["a.yaml", "b.yaml"], "several recipes: a.yaml, b.yaml", "tunesmith bench my-recipe.yaml"),
        (["a.yaml", *GOOD], "both a recipe (a.yaml) and --shape llama3-8b", "remove one of the two"),
        (["--shape", "lama3-8b", *GOOD[2:]], "there is no shape 'lama3-8b'", "did you mean --shape llama3-8b?"),
        (["--shape", "zzz", *GOOD[2:]], "there is no shape 'zzz'", "qwen3-8b"),
        (GOOD[:4], "--shape needs --data", "--data rows.json"),
        ([*GOOD[:2], *GOOD[4:]], "--shape needs --tokenizer", "--tokenizer HuggingFaceTB/"),
        (["a.yaml", "--data", "x"], "--data requires --shape", "data.train.source=x"),
        (["a.yaml", "--format", "text"], "--format requires --shape", "data.train.format=text"),
        ([*GOOD, "--steps", "0"], "--steps 0 is out of range", "at least 1"),
        ([*GOOD, "--warmup", "-1"], "--warmup -1 is out of range", "at least 0"),
        ([*GOOD, "--json", "no/such/x.json"], "there is no folder no/such", "mkdir -p no/such"),
        ([*GOOD, "--profile", __file__], "is a file", "use a folder"),
        ([*GOOD, "--ablation", "--rounds", "0"], "--rounds 0 is out of range", "at least 1"),
        ([*GOOD, "--only", "recomputed"], "--only chooses variants", "add --ablation"),
        ([*GOOD, "--ablation", "--cold"], "--cold and --ablation cannot be combined", "remove --cold"),
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
    for words, what in (
        (["--shape", small, *good, "--cold"], "--cold measures compilation"),
        (["--shape", small, "--tokenizer", rows.parent / "none", *good[2:]], "none"),
    ):
        assert main(typed(*words)) == 2
        assert what in capsys.readouterr().err


def test_on_a_gpu_the_trial_of_the_compiler_is_within_what_cold_times(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "tunesmith.runtime.compilation.select_compile", lambda *_: pytest.fail("it was tried")
    )
    monkeypatch.setattr("tunesmith.runtime.device.choose_device", lambda: torch.device("cuda"))
    check_compiles(make_run(tiny, tmp_path))
    with refuses(UsageError, where="--cold", fix=["train.compile=on"]):
        check_compiles(make_run(tiny, tmp_path, train={"compile": "off"}))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def prepare_cold_and_warm() -> None:
    """Before `bench --cold`: the process that it starts is forked now, with nothing compiled yet,
    and waits for its words.
    """
    from tunesmith.tools.bench import cli as bench

    take_small_peak()
    given, words = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(words)
        with os.fdopen(given) as file:
            command, env = json.load(file)
        become("tunesmith", command[3:], env, [CLOSED] * 3)

    def run_forked(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        with os.fdopen(words, "w") as file:
            json.dump([command, dict(os.environ)], file)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return subprocess.CompletedProcess(command, code)

    os.close(given)
    bench.subprocess = SimpleNamespace(run=run_forked, DEVNULL=None)  # type: ignore[assignment]


def test_cold_and_warm_first_steps(tiny: Path, tmp_path: Path) -> None:
    """The second process finds what the first has compiled, so its first step is much shorter."""
    file, out = tmp_path / "recipe.yaml", tmp_path / "out.json"
    # Few graphs: compiling is what takes time
    changes = {
        "train": {"compile": "on"},
        "model": {"attention": "eager"},
    }
    file.write_text(to_yaml(recipe(tiny, tmp_path, held=False, **changes)))
    # In a process of its own, as a compile cache of its own needs. Torch's headers, which the
    # compiler of C++ would read once for each cache, take it longer than the few kernels.
    done = run_warm(
        typed(file, "--cold", "--steps", 1, "--warmup", 0, "--json", out),
        prepare=prepare_cold_and_warm,
        env=os.environ | {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["cold"]
    assert 0 < found["warm_first_step_seconds"] < found["first_step_seconds"]
    cold, warm = (
        f"{found[name]:.1f} s" for name in ("first_step_seconds", "warm_first_step_seconds")
    )
    assert lines_with(done.stdout, cold, warm)


def test_an_ablation_end_to_end(
    tiny: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the recipe and what it changes each figure is there, the change was made, and one that
    fails costs only itself.
    """
    file, out = tmp_path / "recipe.yaml", tmp_path / "out.json"
    file.write_text(to_yaml(recipe(tiny, tmp_path, held=False)))
    monkeypatch.setattr(ablation.subprocess, "run", partial(run_python, prepare=take_small_peak))
    words = ["--only", "recomputed", "--rounds", 1, "--steps", 2, "--warmup", 1, "--json", out]
    assert main(typed(file, "--ablation", *words)) == 0
    shown = capsys.readouterr().out
    report = json.loads(out.read_text())
    table, runs = report["table"], report["runs"]
    assert list(table) == [ablation.BASELINE, "recomputed"]
    assert table["as given"]["of_baseline"] == 1
    assert all(
        row["tokens_per_second"] > 0 and row["peak_memory_gib"] > 0 for row in table.values()
    )
    assert [runs[name][0]["figures"]["recomputed_layers"] for name in table] == [0, 2]
    assert [runs[name][0]["recipe"]["train"]["recompute"] for name in table] == ["auto", "full"]
    for row in table.values():  # the same tokens and updates, in fp32
        assert row["last_loss"] == pytest.approx(table["as given"]["last_loss"], rel=1e-5)
    for name, change in report["changes"].items():
        assert any(
            line.startswith(name) and line.endswith(change) for line in shown.splitlines()
        ), shown


def test_a_variant_that_fails_costs_only_itself_and_the_recipe_itself_must_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Commands of other programs stand in for bench: what they write and how they end is all that
    counts.
    """
    figures = {"figures": {"tokens_per_second": 10.0, "peak_memory_gib": 1.0, "last_loss": 2.0}}
    good = [
        sys.executable,
        "-c",
        f"import sys; open(sys.argv[2], 'w').write({json.dumps(figures)!r})",
    ]
    bad = [sys.executable, "-c", "import sys; sys.exit('error: no memory')"]
    found = ablation.run_in_turns({"as given": good, "other": bad}, rounds=2)
    shown = capsys.readouterr()
    assert list(ablation.table_of(found)) == [ablation.BASELINE]
    assert (len(found["as given"]), len(found["other"])) == (2, 0)
    assert lines_with(shown.out, "other", 1)
    assert "\nerror: no memory" in shown.out
    assert shown.err == ""
    with refuses(RunError, where="bench --ablation", fix=["--ablation"]):
        ablation.table_of({"as given": [], "other": found["as given"]})


def test_the_variants_are_the_other_values_of_a_recipes_keys(tiny: Path, tmp_path: Path) -> None:
    lora = dict(
        ablation.variants(
            make_run(tiny, tmp_path, model={"dtype": "bf16", "quantize": "fp8"}), gpu=True
        )
    )
    assert lora["not compiled"] == "train.compile=off"
    assert {"dense base", "base in nf4"} <= set(lora)
    assert not {"base in fp8", "fp32"} & set(lora)
    assert lora["not packed"] == "data.pack=false"
    tokens = make_run(tiny, tmp_path, train={"global_batch": "256 tokens", "micro_batch": "auto"})
    changes = dict(ablation.variants(tokens, gpu=True)).values()
    assert "data.pack=false" not in changes, "tokens need packed rows"
    changes = {"adapter": {"kind": "none"}, "train": {"recompute": "full"}, "data": {"pack": False}}
    assert not dict(ablation.variants(make_run(tiny, tmp_path, **changes), gpu=False)), (
        "a model in full has no base"
    )


def test_a_variant_that_a_recipe_has_not_is_refused(
    tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(tiny, tmp_path, held=False)))
    assert main(typed(file, "--ablation", "--only", "recomputed,pakced")) == 2
    assert holds(capsys.readouterr().err, "recomputed", "pakced")


def test_plain_code_in_place_of_a_technique_shares_its_turns(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """benchmarks/speed/ablation.py: both variants ran, on other code, which gives the same loss in
    fp32.
    """
    file, out = tmp_path / "recipe.yaml", tmp_path / "out.json"
    file.write_text(to_yaml(recipe(tiny, tmp_path, held=False)))
    names = ["grouped adapters", "fused modules"]
    script = str(Path(__file__).parents[3] / "benchmarks" / "speed" / "ablation.py")
    words = ["--only", *names, "--rounds", 1, "--json", out, file, "--steps", 2, "--warmup", 0]
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    monkeypatch.setattr(ablation.subprocess, "run", partial(run_python, prepare=take_small_peak))
    runpy.run_path(script, run_name="__main__")
    table = json.loads(out.read_text())["table"]
    assert list(table) == [ablation.BASELINE, *names]
    for row in table.values():
        assert row["last_loss"] == pytest.approx(table["as given"]["last_loss"], rel=1e-5)
