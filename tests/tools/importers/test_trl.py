"""What is imported of a file of TRL beside what TRL itself, as it is installed, makes of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from invoke import invoke
from tunesmith.answers.scoring.own_scorers import load_own_scorer
from tunesmith.answers.scoring.scorers import RewardedAnswer, ScoredRow
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
    trainers |= {"grpo": trl.GRPOConfig}
    for method, config in trainers.items():
        fields = {field.name: field for field in dataclasses.fields(config)}
        of_method = [s for s in table("trl")["when"] if s.get("if") == {"method.name": method}]
        for name, value in next(s["implied"] for s in of_method if "implied" in s).items():
            if value is None:
                assert name not in fields
                continue
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


FUNCTIONS = """
from trl.rewards import think_format_reward

async def halves(prompts, completions, solution, completion_ids, trainer_state, log_metric, **columns):
    log_metric("asked", len(completions))
    texts = [c if isinstance(p, str) else c[0]["content"] for p, c in zip(prompts, completions)]
    return [None if s == "" else len(t) % 2 - 0.5 for t, s in zip(texts, solution)]
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_chat", [True, False])
def test_grpo_trains_with_the_rewards_of_trl(is_chat: bool, tiny: Path, tmp_path: Path) -> None:
    from tunesmith.start.run import train

    recipe = tmp_path / "new" / "recipe.yaml"
    recipe.parent.mkdir()
    words = ["import", FILE.with_name("trl-grpo.yaml"), "--world", 2, "--output", recipe, "--force"]
    assert invoke(*words).code == 0
    run = load_recipe(recipe)
    # A module of the user is beside the imported file.
    names = [f"my_rewards.py:{function}" for function in ("think_format_reward", "halves")]
    assert run.method.reward == tuple(str(FILE.with_name(name)) for name in names)
    scorers = [str(recipe.with_name(name)) for name in names]
    # 4 answers in a micro batch, 2 micro batches, 2 processes: 4 prompts with 4 answers each.
    assert str(run.train.global_batch) == "4 examples"
    expected = ((0.5, 1.0), 4, 16, 0.9, 0.0, "dr_grpo", "last", 16 + 1024)
    method = run.method
    assert expected == (
        *(method.reward_weights, method.group, method.answer_tokens, method.temperature),
        *(method.beta, method.variant, run.data.train_on, run.data.seq_len),
    )

    # Rows as TRL takes them, without answers.
    (recipe.parent / "my_rewards.py").write_text(FUNCTIONS)
    prompts: list[Any] = [f"Say {n}: " for n in range(8)]
    overrides: dict[str, Any] = {"method.reward": scorers}
    if is_chat:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    else:
        overrides = {"method.reward": scorers[1], "method.reward_weights": []}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "solution": "1"}) + "\n" for p in prompts))
    recipe.write_text(recipe.read_text().replace("trl-lib/DeepMath-103K", str(rows)))
    overrides |= {
        "model.name": str(tiny), "model.dtype": "fp32", "train.duration": "2 steps",
        "train.compile": "off", "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    assert train(load_recipe(recipe, overrides), quiet=True).steps == 2

    for answer, score in (("<think>a</think>b", 1.0), ("abcd", 0.0)):
        scored = ScoredRow("", "", {}, "rows.jsonl:1", prompt=prompts[0])
        answers = [RewardedAnswer(answer, answer, scored)]
        for name in scorers[:is_chat]:
            [found] = load_own_scorer(name).scores(answers, {}, 1)
            assert found == {"think_format_reward": score}


def test_all_keys_of_trls_own_grpo_config_are_known(tmp_path: Path) -> None:
    args = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True).to_dict()
    names = {"model_name_or_path": "m/m", "dataset_name": "d/d", "reward_funcs": ["my.f"]}
    path = tmp_path / "trl.yaml"
    path.write_text(json.dumps({**args, **names}))
    draft = translate(read_config(path, None), {}, 1)
    # 8 answers a step: one prompt.
    assert draft.values["train.global_batch"] == "1 examples"
    differing = {note.key for note in draft.notes.values() if note.differs}
    assert differing == {"reward_funcs", "dtype", "dataset_name"}
