"""Shipped recipes load and keep their promises; the reference page is up to date."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tunesmith.config.describe import GENERATED_MARK, reference, write_or_check
from tunesmith.config.load import load_recipe
from tunesmith.config.names import keys
from tunesmith.config.shipped import purpose, shipped
from tunesmith.model.shapes import config_of_model
from tunesmith.training.make_recipe import PREFERENCE_RATE, default_learning_rate
from tunesmith.units import Length, Size

ROOT = Path(__file__).resolve().parents[2]


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
