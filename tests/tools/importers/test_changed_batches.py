"""Keys of other tools that change what a step learns from: carried, or named under `differs`, never
under "needs nothing".
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tunesmith.cli.main import main
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Run

LLAMAFACTORY = {
    "model_name_or_path": "m/m",
    "stage": "sft",
    "template": "qwen",
    "cutoff_len": 512,
    "dataset": "d",
}
AXOLOTL = {
    "base_model": "m/m",
    "datasets": [{"path": "d/d", "type": "alpaca"}],
    "learning_rate": 1e-4,
    "sequence_len": 512,
}
TRL = {"model_name_or_path": "m/m", "dataset_name": "d/d", "use_peft": True, "max_length": 512}
ROWS = ("data.train.source=rows.jsonl", "data.train.format=alpaca")


def import_values(
    folder: Path, values: dict[str, object], *words: str, code: int = 0
) -> Run | None:
    """The recipe that a configuration of these values becomes, where it is not refused."""
    file, recipe = folder / "file.yaml", folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["import", str(file), "--world", "2", "--output", str(recipe), *words]) == code
    return load_recipe(recipe) if code == 0 else None


def parts(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What the report says that differs, and what it says needs nothing."""
    differs, _, nothing = capsys.readouterr().out.rpartition("\n\n")
    return differs, nothing


@pytest.mark.parametrize("file", ["gone.json", "ds_configs/zero3"])
@pytest.mark.parametrize("values", [LLAMAFACTORY, AXOLOTL], ids=["llamafactory", "axolotl"])
def test_deepspeeds_own_file_is_named(
    values: dict[str, object], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_values(tmp_path, values | {"deepspeed": file}, *ROWS)
    differs, _ = parts(capsys)
    assert file in differs
    assert "train.cpu_offload=[parameters]" in differs


@pytest.mark.parametrize("part", ["offload_param", "offload_optimizer"])
@pytest.mark.parametrize(
    "values", [LLAMAFACTORY, AXOLOTL, TRL], ids=["llamafactory", "axolotl", "trl"]
)
def test_deepspeeds_offload_within_the_file_is_carried(
    values: dict[str, object], part: str, tmp_path: Path
) -> None:
    deepspeed = {"zero_optimization": {"stage": 3, part: {"device": "cpu"}}}
    run = import_values(tmp_path, values | {"deepspeed": deepspeed}, *ROWS)
    assert run is not None
    assert run.train.cpu_offload == ("parameters",)


def test_fsdps_offload_as_words(tmp_path: Path) -> None:
    run = import_values(tmp_path, LLAMAFACTORY | {"fsdp": "full_shard auto_wrap offload"}, *ROWS)
    assert run is not None
    assert run.train.cpu_offload == ("parameters",)


def test_thinking_that_is_off_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_values(tmp_path, LLAMAFACTORY | {"template": "qwen3", "enable_thinking": False}, *ROWS)
    differs, nothing = parts(capsys)
    assert "enable_thinking: false" in differs
    assert "enable_thinking" not in nothing


@pytest.mark.parametrize("datasets", ["rows.jsonl", ["rows.jsonl"]], ids=str)
def test_a_path_in_place_of_a_data_set(
    datasets: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = AXOLOTL | {"datasets": datasets}
    import_values(tmp_path, values, code=2)
    error = capsys.readouterr().err
    assert "datasets.type: " in error
    assert "data.train.source=rows.jsonl data.train.format=messages" in error
    run = import_values(
        tmp_path, values, "data.train.source=rows.jsonl", "data.train.format=messages"
    )
    assert run is not None
    assert Path(run.data.train[0].source).name == "rows.jsonl"


@pytest.mark.parametrize("key", ["gradient_accumulation_steps", "micro_batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_count_below_one_is_refused(
    key: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_values(tmp_path, AXOLOTL | {key: value}, code=2)
    error = capsys.readouterr().err
    assert f"{key}: {value}" in error
    assert "file.yaml:" in error


def test_a_world_of_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_values(tmp_path, AXOLOTL, "--world", "0", code=2)
    assert "--world" in capsys.readouterr().err


def test_zeros_keep_their_meaning(tmp_path: Path) -> None:
    """beta1 of 0 is no momentum; save_steps of 0 saves never; evaluation without a count goes by
    logging_steps.
    """
    zeros = {"adam_beta1": 0.0, "save_strategy": "steps", "save_steps": 0}
    validated = {"eval_strategy": "steps", "logging_steps": 7, "val_size": 0.1}
    run = import_values(tmp_path, LLAMAFACTORY | zeros | validated, *ROWS)
    assert run is not None
    assert run.train.betas == (0.0, 0.999)
    assert run.checkpoint.every is None
    assert str(run.validate.every) == "7 steps"


SECRETS = {
    "env": {"MY_TOKEN": "canary1", "HF_TOKEN": "canary2", "OPENAI_API_KEY": "canary3", "DB_PASSWORD": "canary4", "COLOUR": "red"},
    "hubToken": "canary5", "variables": ["AWS_SECRET_ACCESS_KEY=canary6", "SIZE=3"], "wandb_api_key": "canary7",
    "special_tokens": {"pad_token": "<pad>"}, "max_new_tokens": 128,
}  # fmt: skip


def test_a_secret_is_masked_by_the_name_of_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_values(tmp_path, AXOLOTL | SECRETS)
    shown = capsys.readouterr()
    everything = shown.out + shown.err + (tmp_path / "recipe.yaml").read_text()
    assert "canary" not in everything
    for plain in (
        'env.COLOUR: "red"',
        'variables: ["AWS_SECRET_ACCESS_KEY=***", "SIZE=3"]',
        "<pad>",
        "max_new_tokens: 128",
    ):
        assert plain in everything
