"""Every shipped recipe loads, and carries the values that its source gives; the reference page is
up to date.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tunesmith.config.describe import GENERATED_MARK, reference, write_or_check
from tunesmith.config.load import load_recipe
from tunesmith.config.names import keys
from tunesmith.config.schema import run_type
from tunesmith.config.shipped import purpose, shipped
from tunesmith.model.shapes import config_of_model
from tunesmith.training.make_recipe import PREFERENCE_RATE, default_learning_rate
from tunesmith.units import Length, Size

ROOT = Path(__file__).resolve().parents[2]

# The four playbook scripts and the two files of the Slurm guide: (model, adapter, rank, alpha,
# batch, rate, rows). Batch and rows of the 70B LoRA are ours: 4 examples, as in the script, are too
# few to hide the gathers of shards over a pair.
SCRIPTS = {
    "llama3.2-3b-full": (
        "meta-llama/Llama-3.2-3B-Instruct",
        "none",
        8,
        5e-5,
        "train[:512]",
        "linear",
    ),
    "llama3.1-8b-lora": (
        "meta-llama/Llama-3.1-8B-Instruct",
        "lora",
        8,
        1e-4,
        "train[:512]",
        "linear",
    ),
    "llama3.1-70b-lora": (
        "meta-llama/Llama-3.1-70B-Instruct",
        "lora",
        32,
        1e-4,
        "train[:4000]",
        "linear",
    ),
    "llama3.1-70b-qlora": (
        "unsloth/Meta-Llama-3.1-70B-bnb-4bit",
        "lora",
        8,
        1e-4,
        "train[:512]",
        "linear",
    ),
}


def test_all_load() -> None:
    assert len(shipped()) >= 18
    for name, path in shipped().items():
        run = load_recipe(name)
        assert run == load_recipe(path)
        assert run.output_dir == str(Path.cwd() / "runs" / name)
        assert len(purpose(path)) > 20
        assert run.data.validation, f"{name} has no held-out rows"


def test_what_a_recipe_says_of_a_spark_is_its_plan() -> None:
    """Memory of a step and tokens a second, rounded; the golden plans hold the figures."""
    plans = json.loads((ROOT / "tests/planning/golden/plans.json").read_text())
    said = 0
    for name, path in shipped().items():
        command = f"tunesmith plan {re.escape(name)} --on dgx-spark"
        pattern = rf"^# Forecast for a DGX Spark: (\d+) GiB, ([\d,]+) tokens/s \({command}\)$"
        line = re.search(pattern, path.read_text(), re.MULTILINE)
        if line:
            plan = plans[f"{name} on dgx-spark"]
            assert round(plan["phases.step"] / 2**30) == int(line[1]), name
            rounded = float(f"{plan['tokens_per_second']:.2g}")
            assert rounded == int(line[2].replace(",", "")), name
            said += 1
    assert said >= 7


def test_learning_rates_are_those_of_choosing_or_the_recipe_says_why_not() -> None:
    for name, path in shipped().items():
        run = load_recipe(name)
        config = config_of_model(run.model.name)
        assert config is not None, name
        text = config.get("text_config", config)
        assert isinstance(text, dict)
        rate = default_learning_rate(run.adapter.kind, text["model_type"], text["hidden_size"])
        if run.method.name != "sft":
            rate = float(f"{rate * PREFERENCE_RATE:.1e}")
        text = path.read_text(encoding="utf-8")
        stated = re.findall(r"docs/choosing.md: (\S+)$", text, re.MULTILINE)
        if run.train.learning_rate == rate:
            assert stated == [], name
        else:
            assert [float(number) for number in stated] == [rate], name
        if run.adapter.kind == "lora":
            assert 8 <= run.adapter.rank <= 16, name
            assert run.adapter.alpha == 2 * run.adapter.rank, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_values_of_the_playbook(name: str) -> None:
    model, kind, batch, rate, split, schedule = SCRIPTS[name]
    run = load_recipe(name)
    assert (run.model.name, run.adapter.kind, run.adapter.rank, run.adapter.alpha) == (
        model,
        kind,
        8,
        16.0,
    )
    assert (run.train.global_batch, run.train.learning_rate) == (Size(batch, "examples"), rate)
    assert (run.train.duration, run.train.warmup, run.train.schedule) == (
        Length(1, "epochs"),
        Length(0, "%"),
        schedule,
    )
    assert (run.data.train[0].source, run.data.train[0].split, run.data.seq_len) == (
        "tatsu-lab/alpaca",
        split,
        2048,
    )
    assert run.model.quantize == ("nf4" if "qlora" in name else "auto")
    assert run.model.dtype == "auto"


def test_values_of_the_slurm_guide() -> None:
    full, lora = load_recipe("llama3.3-70b-full"), load_recipe("llama3.3-70b-lora")
    assert full.model.name == lora.model.name == "meta-llama/Llama-3.3-70B-Instruct"
    for run in (full, lora):
        assert [s.split for s in (*run.data.train, *run.data.validation)] == [
            "train[:95%]",
            "train[95%:]",
        ]
        assert run.train.clip_norm is None
    assert (full.adapter.kind, full.train.learning_rate, full.data.pack, full.train.compile) == (
        "none",
        2e-5,
        True,
        "on",
    )
    # ours: fp32 moments would leave memory for few activations
    assert full.train.optimizer == "adamw-8bit"
    # 2 data-parallel ranks (16 GPUs, tensor parallel over 8) x 4 packed rows of 1024 tokens
    assert full.train.global_batch == Size(2 * 4 * 1024, "tokens")
    assert (lora.adapter.rank, lora.adapter.alpha, lora.train.learning_rate) == (16, 32.0, 3e-4)
    assert lora.train.global_batch == Size(16 * 2, "examples")
    assert (lora.train.warmup, lora.train.weight_decay) == (Length(6.5, "%"), 0.01)
    for run in (full, lora):  # what changes no result is left to the machine
        assert (run.train.recompute, run.parallel.tensor) == ("auto", "auto")


def test_reference_page_is_up_to_date(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = ROOT / "docs" / "recipe.md"
    assert write_or_check(["--check", str(path)]) == 0, capsys.readouterr().err
    by_hand, mark, _ = path.read_text().partition(GENERATED_MARK)
    assert shipped()["llama3.1-8b-lora"].read_text().partition("\n")[2] in by_hand
    assert all(f"`{unit}`" in by_hand for unit in (*Length.units, *Size.units))
    old = tmp_path / "old.md"
    old.write_text(by_hand + mark + reference().replace("learning_rate", "learning_rat"))
    assert write_or_check(["--check", str(old)]) == 1
    assert write_or_check(["--write", str(old)]) == 0
    assert write_or_check(["--check", str(old)]) == 0
    assert old.read_text().startswith(by_hand)
    assert write_or_check([]) == 2


def test_reference_names_every_key() -> None:
    page = reference()
    for key in keys():
        assert f"`{key.rpartition('.')[2]}`" in page, key


def test_json_schema_has_the_bounds_and_the_grammars() -> None:
    """What a planner or an editor reads: the same types and bounds that a recipe is held against."""
    schema = run_type().json_schema()
    sections = schema["$defs"]
    assert set(schema["required"]) == {"model", "data", "output_dir"}
    assert sections["Adapter"]["properties"]["rank"]["minimum"] == 1
    assert sections["Adapter"]["properties"]["from"]["default"] is None
    assert sections["Train"]["properties"]["duration"]["type"] == "string"
