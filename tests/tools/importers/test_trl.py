"""What is imported of a file of TRL beside what TRL itself, as it is installed, makes of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli.main import main
from tunesmith.config.load import load_recipe
from tunesmith.optim.lr_schedule import scheduled_rate
from tunesmith.tools.importers.source_config import read_config, table
from tunesmith.tools.importers.translate import translate

from .translations import knows

trl = pytest.importorskip("trl")
FILE = Path(__file__).parent / "files" / "trl-sft.yaml"


def parsed(words: list[str]) -> Any:
    """(script, training, model) arguments as TRL's own parser gives them."""
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))
    return parser.parse_args_and_config([*words, "--use_cpu"])


def test_the_defaults_are_those_that_are_installed(tmp_path: Path) -> None:
    script, training, model = parsed(["--output_dir", str(tmp_path)])
    installed = {
        f.name: vars(one)[f.name]
        for one in (script, training, model)
        for f in dataclasses.fields(one)
    }
    checked = 0
    for key, value in table("trl")["defaults"].items():
        real = installed[key]
        assert value == getattr(real, "value", real), key
        checked += 1
    assert checked > 25


def test_the_values_that_a_script_writes_down_are_read(tmp_path: Path) -> None:
    """The lines that `import` and docs/coming-from.md give for a script."""
    args = trl.SFTConfig(output_dir=str(tmp_path), learning_rate=2e-4, packing=True, use_cpu=True)
    names = {"model_name_or_path": "m/m", "dataset_name": "d/d"}
    lora = {"use_peft": True, "lora_r": 32, "lora_alpha": 64, "lora_target_modules": "all-linear"}
    path = tmp_path / "trl.yaml"
    path.write_text(json.dumps({**args.to_dict(), **names, **lora}))
    draft = translate(read_config(path, None), {}, 1)
    assert (draft.values["adapter.rank"], draft.values["adapter.alpha"]) == (32, 64)
    assert draft.values["adapter.target"] == "all-linear"
    assert (draft.values["train.learning_rate"], draft.values["data.pack"]) == (2e-4, True)
    # Tokens are written down as <EOS_TOKEN> and so on.
    assert "model.pad_token" not in draft.values
    assert {note.key for note in draft.notes.values() if note.differs} == {"dataset_name", "dtype"}


def test_every_flag_of_trl_is_known() -> None:
    """Each field of TRL's three classes is carried or in the table: `import` names no flag of TRL
    as unknown.
    """
    fields = [
        f.name
        for one in (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig)
        for f in dataclasses.fields(one)
    ]
    read_by_code = {"dataset_name", "dataset_config", "dataset_text_field"}
    missing = [name for name in fields if not knows("trl", name) and name not in read_by_code]
    assert not missing
    assert len(fields) > 100


@pytest.mark.slow
def test_batch_schedule_rate_and_adapter_are_trls(tmp_path: Path) -> None:
    import torch
    from transformers import get_scheduler

    recipe = tmp_path / "recipe.yaml"
    assert main(["import", str(FILE), "--world", "4", "--output", str(recipe)]) == 0
    run = load_recipe(recipe)
    script, training, model = parsed(["--config", str(FILE)])

    processes = 4
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    assert training.packing
    assert str(run.train.global_batch) == f"{rows * training.max_length} tokens"
    assert (run.data.seq_len, run.data.pack) == (training.max_length, True)
    assert run.train.learning_rate == training.learning_rate
    assert (run.train.betas, run.train.eps) == (
        (training.adam_beta1, training.adam_beta2),
        training.adam_epsilon,
    )
    assert (run.train.weight_decay, run.train.clip_norm, run.train.seed) == (
        training.weight_decay, training.max_grad_norm, training.seed,
    )  # fmt: skip
    assert (run.train.duration.amount, run.train.duration.unit) == (
        training.num_train_epochs,
        "epochs",
    )
    assert (str(run.validate.every), str(run.checkpoint.every)) == (
        f"{training.eval_steps:g} steps",
        f"{training.save_steps:g} steps",
    )
    assert (run.data.train[0].source, run.data.train[0].split) == (
        script.dataset_name,
        script.dataset_train_split,
    )
    assert run.data.validation[0].split == script.dataset_test_split
    # Neither of TRL's two losses on the answer alone is asked for
    assert run.data.train_on == "all"

    config = trl.get_peft_config(model)
    assert (run.adapter.rank, run.adapter.alpha, run.adapter.dropout) == (
        config.r,
        config.lora_alpha,
        config.lora_dropout,
    )
    assert {*run.adapter.target} == {*config.target_modules}
    assert run.adapter.rslora == config.use_rslora

    total = 60
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    theirs = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=int(training.warmup_steps),
        num_training_steps=total,
    )
    for step in range(total):
        ours = scheduled_rate(run.train, step, total=total, steps_per_epoch=total, seconds=0.0)
        # Their warmup begins at 0 and ours at one step's rise, 1/12 of the rate; then both are the
        # same cosine.
        assert ours - theirs.get_last_lr()[0] == pytest.approx(
            training.learning_rate / 12 if step < 12 else 0, abs=1e-12
        )
        optimizer.step()
        theirs.step()
