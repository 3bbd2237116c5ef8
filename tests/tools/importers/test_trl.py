"""What is imported of a file of TRL beside what TRL itself, as it is installed, makes of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from invoke import invoke
from tunesmith.config.load import load_recipe
from tunesmith.optim.lr_schedule import scheduled_rate
from tunesmith.tools.importers.source_config import read_config, table
from tunesmith.tools.importers.translate import translate

trl = pytest.importorskip("trl")
FILE = Path(__file__).parent / "files" / "trl-sft.yaml"


def parsed(words: list[str]) -> Any:
    """(script, training, model) arguments as TRL's own parser gives them."""
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))
    return parser.parse_args_and_config([*words, "--use_cpu"])


def test_the_defaults_are_those_that_are_installed(tmp_path: Path) -> None:
    installed = {}
    for one in parsed(["--output_dir", str(tmp_path)]):
        installed |= {field.name: vars(one)[field.name] for field in dataclasses.fields(one)}
    for key, value in table("trl")["defaults"].items():
        assert value == getattr(installed[key], "value", installed[key]), key


@pytest.mark.slow
def test_the_numbers_of_each_trainer_are_those_that_are_installed() -> None:
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    trainers = {"dpo": trl.DPOConfig, "kto": trl.KTOConfig, "orpo": ORPOConfig, "simpo": CPOConfig}
    for method, config in trainers.items():
        fields = {field.name: field for field in dataclasses.fields(config)}
        of_method = [s for s in table("trl")["when"] if s.get("if") == {"method.name": method}]
        for name, value in next(s["implied"] for s in of_method if "implied" in s).items():
            real = fields[name].default
            if real is dataclasses.MISSING:
                real = fields[name].default_factory()
            assert value == real, (method, name)


def test_the_values_that_a_script_writes_down_are_read(tmp_path: Path) -> None:
    """The lines that `import` and docs/coming-from.md give for a script."""
    args = trl.SFTConfig(output_dir=str(tmp_path), learning_rate=2e-4, packing=True, use_cpu=True)
    names = {"model_name_or_path": "m/m", "dataset_name": "d/d", "use_peft": True, "lora_r": 32}
    path = tmp_path / "trl.yaml"
    path.write_text(json.dumps({**args.to_dict(), **names}))
    draft = translate(read_config(path, None), {}, 1)
    assert (draft.values["adapter.rank"], draft.values["data.pack"]) == (32, True)
    assert draft.values["train.learning_rate"] == 2e-4
    # Tokens are written down as <EOS_TOKEN> and so on.
    assert "model.pad_token" not in draft.values
    assert {note.key for note in draft.notes.values() if note.differs} == {"dataset_name", "dtype"}


@pytest.mark.slow
def test_batch_schedule_rate_and_adapter_are_trls(tmp_path: Path) -> None:
    import torch
    from transformers import get_scheduler

    recipe, processes, total = tmp_path / "recipe.yaml", 4, 60
    assert invoke("import", FILE, "--world", processes, "--output", recipe).code == 0
    run = load_recipe(recipe)
    _, training, model = parsed(["--config", str(FILE)])
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    config = trl.get_peft_config(model)
    assert str(run.train.global_batch) == f"{rows * training.max_length} tokens"
    assert (run.data.seq_len, run.data.pack) == (training.max_length, training.packing)
    assert (run.adapter.rank, run.adapter.alpha) == (config.r, config.lora_alpha)
    assert set(run.adapter.target) == set(config.target_modules)

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    steps = {"num_warmup_steps": int(training.warmup_steps), "num_training_steps": total}
    theirs = get_scheduler(training.lr_scheduler_type, optimizer, **steps)
    for step in range(total):
        ours = scheduled_rate(run.train, step, total=total, steps_per_epoch=total, seconds=0.0)
        # Their warmup begins at 0 and ours at one step's rise, 1/12 of the rate; then both are the
        # same cosine.
        rise = training.learning_rate / 12 if step < 12 else 0
        assert ours - theirs.get_last_lr()[0] == pytest.approx(rise, abs=1e-12)
        optimizer.step()
        theirs.step()
