"""Keys of other tools that change what is learned: in the recipe, named as a difference, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import refuses
from tunesmith.config.names import keys
from tunesmith.errors import UsageError
from tunesmith.tools.importers.source_config import (
    IMPORTED_TOOLS,
    read_config,
    table,
    yaml_1_1_scalar,
)
from tunesmith.tools.importers.translate import translate
from tunesmith.tools.importers.translation import Translation

# The smallest configurations; the first word of a name is the tool.
BASES: dict[str, dict[str, Any]] = {
    "torchtune": {
        "model": {"_component_": "torchtune.models.llama3.lora_llama3_8b"},
        "checkpointer": {"checkpoint_dir": "/m/Llama-3"},
        "dataset": {"_component_": "torchtune.datasets.alpaca_dataset"},
        "optimizer": {"lr": 1e-4}, "batch_size": 1,
    },
    "axolotl": {"base_model": "m/m", "datasets": [{"path": "d/d", "type": "alpaca"}], "learning_rate": 1e-4},
    "axolotl documents": {"base_model": "m/m", "learning_rate": 1e-4, "max_steps": 9},
    "llamafactory": {"model_name_or_path": "m/m", "template": "qwen", "cutoff_len": 512},
    "trl": {"model_name_or_path": "m/m", "dataset_name": "d/d"},
}  # fmt: skip
PAIRS = [{"path": "d/d", "type": "chat_template.argilla_chat"}]
BASES["axolotl pairs"] = BASES["axolotl"] | {
    "datasets": PAIRS,
    "adapter": "lora",
    "lora_dropout": 0.1,
}
BASES["llamafactory pairs"] = BASES["llamafactory"] | {"stage": "dpo", "lora_dropout": 0.1}
BASES["trl pairs"] = BASES["trl"] | {"use_peft": True}
BASES["trl rewards"] = BASES["trl pairs"] | {"reward_funcs": "my.f"}


def translated(
    base: str, values: dict[str, Any] | str, folder: Path, given: Mapping[str, str] = {}
) -> Translation:
    """What is made of a file with these keys, or this text, beside the keys of the base."""
    path = folder / "file.yaml"
    if isinstance(values, str):
        rest = "".join(f"{name}: {json.dumps(value)}\n" for name, value in BASES[base].items())
        path.write_text(f"{values}\n{rest}")
    else:
        path.write_text(json.dumps(BASES[base] | values))
    read = read_config(path, base.partition(" ")[0])
    return translate(read, {"train.global_batch": "1 examples", **given}, None)


def chat(**more: Any) -> dict[str, Any]:
    """A data set of chats of Axolotl, with more keys."""
    return {"datasets": [{"path": "d/d", "type": "chat_template", **more}]}


ABSENT = "no such key"
MIN_RATE = {"learning_rate": 1e-5, "lr_scheduler_type": "cosine_with_min_lr"}
LEAST = {"train.min_learning_rate": 1e-6, "train.schedule": "cosine"}
DOCUMENTS = [{"path": "e/e", "type": "completion"}]
BOOKS = {"source": "org/books", "split": "train", "format": "text"}
ROWS = {"source": "d/d", "split": "train"}
TALKS = {
    "_component_": "torchtune.datasets.chat_dataset",
    "source": "d/d",
    "conversation_style": "openai",
}
BY_OFFLOADING = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}

CARRIED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("axolotl", chat(train_on_split="validation"), {"data.train": {**ROWS, "split": "validation", "format": "messages"}, "data.too_long": "drop", "model.vision": ABSENT}),
    ("axolotl", chat() | {"excess_length_strategy": "truncate", "processor_type": "AutoProcessor"}, {"data.too_long": "truncate", "model.vision": True}),
    ("axolotl", {"datasets": DOCUMENTS}, {"data.too_long": ABSENT}),
    ("axolotl documents", {"pretraining_dataset": "org/books"}, {"data.train": BOOKS}),
    ("axolotl documents", {"pretraining_dataset": [{"path": "org/books", "name": "en", "text_column": "body"}]}, {"data.train": BOOKS | {"name": "en", "columns": {"text": "body"}}}),
    ("trl", {"dataset_text_field": "body"}, {"data.train.source": "d/d", "data.train.split": "train", "data.train.format": "text", "data.train.columns": {"text": "body"}}),
    ("trl", {"dataset_text_field": "messages", "train_sampling_strategy": "sequential"}, {"data.train.source": "d/d", "data.train.split": "train", "data.train.format": "messages", "data.shuffle": False}),
    ("llamafactory", {"template": "qwen3", "enable_thinking": False, "default_system": "Short."}, {"data.template_args": {"enable_thinking": False}, "data.system": "Short."}),
    ("llamafactory", {"template": "alpaca", "enable_thinking": False, "eval_dataset": 0}, {"data.template_args": ABSENT, "data.validation": ABSENT}),
    ("torchtune", {"model": {"_component_": "torchtune.models.llama3.lora_llama3_8b", "quantize_base": True}}, {"model.quantize": "nf4"}),
    ("trl", {"use_peft": True, "lora_target_modules": "q_proj, v_proj"}, {"adapter.target": ["q_proj", "v_proj"]}),
    # The optimizer, its schedule and its memory.
    ("torchtune", {"optimizer": {"lr": 1e-4, "betas": [0.9, 0.95]}}, {"train.betas": [0.9, 0.95]}),
    ("llamafactory", {"adam_beta1": 0.0, "save_strategy": "steps", "save_steps": 0}, {"train.betas": [0.0, 0.999], "checkpoint.every": None}),
    ("llamafactory", {"eval_strategy": "steps", "logging_steps": 7, "val_size": 0.1}, {"validate.every": "7 steps"}),
    ("trl", MIN_RATE | {"lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'}, LEAST),
    ("trl", MIN_RATE | {"lr_scheduler_kwargs": {"min_lr": 1e-6}}, LEAST),
    ("axolotl", {"deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}}, {"train.cpu_offload": ["parameters"]}),
    ("llamafactory", {"deepspeed": BY_OFFLOADING}, {"train.cpu_offload": ["parameters"]}),
    ("axolotl", {"wandb_project": "chats", "wandb_name": "first"}, {"log.wandb": True, "log.project": "chats"}),
    ("axolotl", {"use_mlflow": True, "mlflow_experiment_name": "chats"}, {"log.trackers": ["mlflow"], "log.project": "chats"}),
    ("trl", {"report_to": "tensorboard"}, {"log.tensorboard": True}),
    ("trl rewards", {"system_prompt": "Think.", "dataset_prompt_column": "problem"}, {"data.system": "Think.", "data.train.columns": {"prompt": "problem"}}),
    *(("torchtune", {"dataset": TALKS | {"masking_strategy": f"train_on_{theirs}"}}, {"data.train_on": ours})
      for theirs, ours in (("last", "last"), ("all", "all"), ("assistant", "response"))),
    ("axolotl", {"datasets": [{"path": "d/d", "type": "alpaca", "message_property_mappings": {"role": "from"}}]}, {"data.train": {**ROWS, "format": "alpaca"}}),
]  # fmt: skip


@pytest.mark.parametrize(("base", "theirs", "ours"), CARRIED)
def test_a_key_is_in_the_recipe(base, theirs, ours, tmp_path):
    recipe = translated(base, theirs, tmp_path)
    assert {key: recipe.values.get(key, ABSENT) for key in ours} == ours
    assert not [key for key in recipe.values if not recipe.comments[key]]


# Text in YAML 1.1.
TEXTS: list[tuple[str, str, dict[str, Any]]] = [
    ("axolotl", "sequence_len: 16_384\nseed: 010", {"data.seq_len": 16384, "train.seed": 8}),
    ("axolotl", "sequence_len: '4096'\nsample_packing: 'true'", {"data.seq_len": 4096, "data.pack": True}),
    ("axolotl", "lora_target_linear: 'no'\nadapter: lora\npeft_use_rslora: yes", {"adapter.target": ["q_proj", "v_proj"], "adapter.rslora": True}),
    ("trl", "learning_rate: 5e-7\npacking: 'false'\nuse_peft: 'no'", {"train.learning_rate": 5e-7, "data.pack": False, "adapter.kind": "none"}),
    ("trl", "save_strategy: no\nsave_steps: 10\neval_strategy: 'NO'\neval_steps: 10", {"checkpoint.every": None, "data.validation.source": ABSENT}),
    ("llamafactory", "train_on_prompt: 'no'\nfull_determinism: 'yes'", {"data.train_on": "response", "train.deterministic": True}),
]  # fmt: skip


@pytest.mark.parametrize(("tool", "text", "ours"), TEXTS)
def test_numbers_and_switches_are_read_in_any_form(tool, text, ours, tmp_path):
    values = translated(tool, text, tmp_path).values
    found = {key: values.get(key, ABSENT) for key in ours}
    assert json.dumps(found) == json.dumps(ours), "true is not 1"


# What the tools make a number of, and PyYAML does not.
CAST = {"1e-4": 1e-4, "1e5": 1e5, "1.0e4": 1e4, "5e-7": 5e-7, "1_000e-3": 1.0}
PLAIN = (
    "16_384", "1_000.5", "017", "0o17", "0b101", "1:30", "190:20:30.5", "0x_1F", "1.0e-4", "yes",
    "No", "on", "OFF", "y", "n", "true", "~", "null", ".5", "5.", "089", "_1", "1_", "-1_0",
    "run_1_2", "1.2.3", "3B", "+.inf", "00",
)  # fmt: skip


def test_a_plain_scalar_is_what_pyyaml_reads() -> None:
    for text in PLAIN:
        expected, value = yaml.safe_load(text), yaml_1_1_scalar(text)
        assert (value, type(value)) == (expected, type(expected)), text
    assert {text: yaml_1_1_scalar(text) for text in CAST} == CAST


RL = {
    "name": "grpo",
    "beta": 0.0,
    "reward": ["my.py:f"],
    "group": 8,
    "answer_tokens": 512,
    "temperature": 1.0,
    "scale_rewards": True,
    "variant": "dapo",
}
METHODS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("axolotl pairs", {"rl": "orpo", "orpo_alpha": 0.3}, {"name": "orpo", "beta": 0.3}),
    ("axolotl pairs", {"rl": "dpo", "trl": {"beta": 0.4}, "rpo_alpha": 0.5}, {"name": "dpo", "beta": 0.4, "loss_type": "sigmoid", "sft_weight": 0.5}),
    ("axolotl pairs", {"rl": "simpo", "simpo_gamma": 0.9, "cpo_alpha": 0}, {"name": "simpo", "beta": 0.1, "simpo_gamma": 0.9}),
    ("llamafactory pairs", {}, {"name": "dpo", "beta": 0.1, "loss_type": "sigmoid"}),
    ("llamafactory pairs", {"pref_loss": "hinge", "pref_ftx": 0.2, "pref_beta": 0.3}, {"name": "dpo", "beta": 0.3, "loss_type": "hinge", "sft_weight": 0.2}),
    ("trl pairs", {"beta": 0.1, "loss_type": "ipo"}, {"name": "dpo", "beta": 0.1, "loss_type": "ipo"}),
    ("trl pairs", {"desirable_weight": 0.5}, {"name": "kto", "beta": 0.1, "desirable_weight": 0.5, "undesirable_weight": 1.0}),
    ("trl pairs", {"loss_type": "simpo", "simpo_gamma": 0.7, "beta": 2.0, "cpo_alpha": 0.0}, {"name": "simpo", "beta": 2.0, "simpo_gamma": 0.7}),
    ("trl pairs", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, {"name": "dpo", "beta": 0.1, "loss_type": "sigmoid", "sft_weight": 0.3}),
    ("trl pairs", {}, {}),
    *(
        ("trl rewards", theirs, {**RL, "variant": variant.strip()})
        for variant, theirs in {"dapo": {}, "dapo ": {"loss_type": "cispo"}, "grpo": {"loss_type": "grpo"}, "dr_grpo": {"loss_type": "dr_grpo"}}.items()
    ),
    *(
        ("trl rewards", {"scale_rewards": theirs}, {**RL, "scale_rewards": ours})
        for theirs, ours in (("group", True), (True, True), ("none", False), (False, False))
    ),
    ("trl rewards", {"reward_funcs": ["my_rewards.f", "my.module.f"], "beta": 0.04, "temperature": 0.7, "reward_weights": [1.0, 0.5], "num_generations": 4, "max_completion_length": 32},
     {**RL, "beta": 0.04, "temperature": 0.7, "reward_weights": [1.0, 0.5], "group": 4, "answer_tokens": 32, "reward": ["my_rewards.py:f", "my/module.py:f"]}),
]  # fmt: skip


@pytest.mark.parametrize(("base", "theirs", "method"), METHODS)
def test_a_method_has_its_numbers(base, theirs, method, tmp_path):
    """The loss of TRL tells its trainer. TRL takes dropout out of a model with a reference."""
    values = translated(base, theirs, tmp_path).values
    prefix = "method."
    found = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    if "reward" in found:
        # The file for TRL's own functions is in the working directory.
        of_trl, *others = found["reward"]
        found["reward"] = [Path(of_trl).name, *others]
    assert found == method
    assert not method or values["adapter.dropout"] == 0.0


# Base, keys; those that make the training differ, and those that do not.
NOTES: list[tuple[str, dict[str, Any], str, str]] = [
    ("axolotl", {"lora_rnk": 4, "plugins": ["any.SpectrumPlugin"], "embedding_lr_scale": 0.1, "deepspeed": "gone.json", "load_in_8bit": True, "tf32": True, "strict": 7},
     "lora_rnk plugins embedding_lr_scale deepspeed load_in_8bit", "tf32 strict"),
    ("axolotl", chat() | {"chat_template": "chatml", "plugins": ["any.LigerPlugin"]}, "chat_template", "plugins"),
    ("axolotl", chat() | {"chat_template": "tokenizer_default"}, "", "chat_template"),
    # What of a turn is trained, and how it is written
    ("axolotl", chat(roles_to_train=["assistant", "user"], train_on_eos="all", train_on_eot=False, field_thinking="scratchpad", chat_template="chatml", message_field_training="train", drop_system_message=True, shards=10),
     "roles_to_train train_on_eos train_on_eot field_thinking chat_template message_field_training drop_system_message shards", ""),
    ("axolotl", chat(roles_to_train=["gpt"], train_on_eos="turn", train_on_eot="turn", field_thinking="thinking", chat_template="tokenizer_default"),
     "", "roles_to_train train_on_eos train_on_eot field_thinking chat_template"),
    ("axolotl", chat(roles_to_train=[]), "roles_to_train", ""),
    ("axolotl", chat(roles={"assistant": ["gpt", "system"], "user": ["human"]}), "roles.assistant", "roles.user"),
    ("llamafactory", {"template": "qwen3", "enable_thinking": False, "preserve_thinking": True, "quantization_type": "fp4", "quantization_method": "hqq", "eval_dataset": [], "report_to": "none"},
     "enable_thinking preserve_thinking quantization_type quantization_method", "eval_dataset report_to"),
    ("llamafactory", {"template": "alpaca", "enable_thinking": False, "quantization_type": "nf4"}, "", "enable_thinking quantization_type"),
    ("trl", {"bnb_4bit_quant_type": "fp4", "packing_strategy": "wrapped", "run_name": 7}, "bnb_4bit_quant_type packing_strategy", "run_name"),
    ("torchtune", {"loss": {"_component_": "my.loss.FocalLoss"}}, "loss._component_", ""),
    ("torchtune", {"loss": {"_component_": "torchtune.modules.loss.LinearCrossEntropyLoss"}}, "", "loss._component_"),
    ("axolotl pairs", {"rl": "orpo"}, "rl", ""),
    ("axolotl pairs", {"rl": "dpo", "lora_model_dir": "sft", "dpo_use_weighting": True}, "lora_model_dir dpo_use_weighting", ""),
    ("llamafactory pairs", {"dpo_label_smoothing": 0.1, "ref_model": "m/other"}, "dpo_label_smoothing ref_model", ""),
    ("trl rewards", {"scale_rewards": "none", "top_k": 0, "top_p": 1, "num_iterations": 1, "use_vllm": False, "vllm_mode": "server", "epsilon": 0.1, "epsilon_high": 0.3, "delta": 4.0, "entropy_coef": 0.0, "use_bias_correction_kl": True, "max_completion_length": 9},
     "reward_funcs", "top_k top_p num_iterations use_vllm vllm_mode epsilon epsilon_high delta entropy_coef use_bias_correction_kl"),
    ("trl rewards", {"scale_rewards": True, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "num_iterations": 2, "steps_per_generation": 4, "use_vllm": True, "mask_truncated_completions": True, "beta": 0.1, "use_bias_correction_kl": False, "sync_ref_model": True, "generation_kwargs": {"no_repeat_ngram_size": 2},
                     "entropy_coef": 0.1, "importance_sampling_level": "sequence", "top_entropy_quantile": 0.2, "repetition_penalty": 1.1},
     "top_k top_p min_p num_iterations steps_per_generation use_vllm mask_truncated_completions sync_ref_model generation_kwargs.no_repeat_ngram_size entropy_coef importance_sampling_level top_entropy_quantile repetition_penalty use_bias_correction_kl", ""),
    *(("trl rewards", {"loss_type": loss, "scale_rewards": scale}, differing, "")
      for loss, scale, differing in (("grpo", "batch", "scale_rewards"), ("bnpo", "none", "loss_type"))),
    ("trl rewards", {"loss_type": "grpo", "beta": 0.1}, "loss_type", ""),
    ("trl rewards", {"loss_type": "cispo"}, "loss_type", ""),
    ("trl rewards", {"loss_type": "cispo", "epsilon_high": 0.28}, "loss_type", "epsilon_high"),
    ("trl rewards", {"loss_type": "cispo", "epsilon_high": 5.0}, "", "epsilon_high"),
    ("llamafactory", {"max_samples": 5, "freeze_vision_tower": False}, "max_samples freeze_vision_tower", ""),
    ("trl pairs", {"beta": 0.1, "f_divergence_type": "js_divergence", "sync_ref_model": True, "ld_alpha": 0.5}, "f_divergence_type sync_ref_model ld_alpha", ""),
]  # fmt: skip


@pytest.mark.parametrize(("base", "theirs", "differing", "same"), NOTES)
def test_a_key_that_is_not_in_the_recipe_is_noted(base, theirs, differing, same, tmp_path):
    notes = translated(base, theirs, tmp_path).notes
    differs = {key.removeprefix("datasets.0."): note.differs for key, note in notes.items()}
    assert [key for key in differing.split() if not differs[key]] == []
    assert [key for key in same.split() if differs[key]] == []


PROMPT_OF_ITS_OWN = [{"path": "d/d", "type": {"field_instruction": "question"}}]
REFUSED: list[tuple[str, dict[str, Any], str, list[str]]] = [
    # Base, keys, the key that the error names, and what its fix has.
    ("axolotl", {"datasets": PROMPT_OF_ITS_OWN}, "datasets.0.type.field_instruction", ["data.train.format=alpaca"]),
    ("axolotl", {"datasets": PROMPT_OF_ITS_OWN, "rl": "dpo"}, "datasets.0.type.field_instruction", ["data.train.format=preference"]),
    ("axolotl", {"datasets": [{"path": "d/d", "type": "sharegpt.load_role"}]}, "sharegpt.load_role", []),
    ("axolotl", {"datasets": ["rows.jsonl"]}, "datasets.type", ["data.train.source=rows.jsonl data.train.format=messages"]),
    ("axolotl", chat() | {"chat_template_jinja": "{{ messages }}"}, "chat_template_jinja", ["data.template=template.jinja"]),
    ("axolotl", {"adapter": "lora", "lora_target_modules": r".*\.(q|v)_proj"}, "lora_target_modules", ["adapter.target="]),
    ("trl", {"dataset_name": None, "datasets": [{"path": "org/a"}, {"path": "org/b"}]}, "datasets.0.path", ["data.train"]),
    ("trl", {"dataset_mixture": {"datasets": [{"id": "org/a"}]}}, "dataset_mixture.datasets.0.id", ["data.train"]),
    ("trl", {"num_generations": 4}, "reward_funcs", ["method.reward=exact"]),
    *(("trl rewards", {"reward_funcs": [name]}, name, []) for name in ("a b.c", "my-lib.f")),
    ("trl rewards", {"reward_funcs": ["accuracy_reward", "my.f"]}, "accuracy_reward", ["'method.reward=[rewards.py:accuracy_reward, my.py:f]'"]),
    ("llamafactory", {"dataset": "talks"}, "dataset_info.json", ["data.train.source=rows.jsonl data.train.format=messages"]),
    ("llamafactory", {"dataset": {"talks": {"file_name": "talks.json"}}}, "dataset_info.json", ["data.train.source=rows.jsonl"]),
    ("llamafactory pairs", {"eval_dataset": "talks"}, "eval_dataset", ["data.validation.source=rows.jsonl data.validation.format=preference"]),
    *(("trl rewards", {"loss_type": name}, "loss_type", []) for name in ("sapo", "luspo", "vespo", "sigmoid")),
    *(("trl rewards", {key: 1}, key, []) for key in ("reward_model_name_or_path", "max_tool_calling_iterations", "normalize_advantages")),
    ("trl rewards", {"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation", []),
    ("axolotl pairs", {"rl": "grpo"}, "rl", ["method.group", "docs/rl.md"]),
    ("llamafactory pairs", {"stage": "ppo"}, "stage", []),
    ("trl pairs", {"beta": 0.1, "loss_type": ["sigmoid", "hinge"]}, "loss_type", []),
    ("trl pairs", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 1.0]}, "loss_weights", []),
]  # fmt: skip


@pytest.mark.parametrize(("base", "theirs", "key", "fix"), REFUSED)
def test_what_has_no_counterpart_is_refused_by_its_key(base, theirs, key, fix, tmp_path):
    with refuses(UsageError, names=[key], fix=fix):
        translated(base, theirs, tmp_path)


@pytest.mark.parametrize("value", [0, 1.5, "many"])
def test_a_count_that_is_no_whole_number_is_refused(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(json.dumps(BASES["axolotl"] | {"micro_batch_size": value}))
    with refuses(UsageError, where="file.yaml:1", names=["micro_batch_size"]):
        translate(read_config(path, "axolotl"), {}, 1)


def test_the_command_line_replaces_what_is_refused(tmp_path: Path) -> None:
    for tool, theirs, given_keys in (
        ("axolotl", {"datasets": "rows.jsonl"}, {"data.train.source": "rows.jsonl"}),
        ("axolotl", {"lora_target_modules": "(q_proj"}, {"adapter.target": "[q_proj]"}),
        ("trl", {"dataset_mixer": {"org/a": 0.5}}, {"data.train.source": "rows.jsonl"}),
    ):
        recipe = translated(tool, {"adapter": "lora"} | theirs, tmp_path, given_keys)
        assert {*recipe.source.keys} <= recipe.mentioned


def test_the_method_of_the_command_line_wins(tmp_path: Path) -> None:
    draft = translated("trl pairs", {"beta": 0.2}, tmp_path, {"method.name": "orpo"})
    assert (draft.values["method.name"], draft.values["method.beta"]) == ("orpo", 0.2)
    assert draft.notes["beta"].differs


def test_the_loss_of_trl_on_completions(tmp_path: Path) -> None:
    rows = {"data.train.format": "prompt-completion"}
    for value, train_on in ((None, "response"), (True, "response"), (False, "all")):
        recipe = translated("trl", {"completion_only_loss": value}, tmp_path, rows)
        assert recipe.values["data.train_on"] == train_on


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 99), st.text(max_size=20))
NAMES = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz_.-"), min_size=1, max_size=12)


@pytest.mark.slow
@pytest.mark.parametrize("tool", IMPORTED_TOOLS)
@settings(max_examples=15)
@given(data=st.data())
def test_no_key_is_dropped(tool, data, tmp_path_factory):
    """Any keys with any values are refused with a place and a fix, or each one is named."""
    own = {*table(tool)["defaults"]}
    for part in ("nothing", "differs"):
        own.update(*table(tool)[part].values())
    theirs = sorted(name for name in own - {"dataset", "datasets"} if "*" not in name)
    values = data.draw(st.dictionaries(st.sampled_from(theirs), VALUES, max_size=6))
    values |= data.draw(st.dictionaries(NAMES, VALUES, max_size=2))
    folder = tmp_path_factory.mktemp("any")
    try:
        draft = translated(tool, values | BASES[tool], folder)
        written = draft.text(draft.layer(), "# head", folder)
    except UsageError as error:
        if not (error.where and error.fix):
            raise
        return
    told = " ".join(draft.comments.values()) + "".join(f" {key}: " for key in draft.notes)
    assert all(f"{key}: " in told for key in draft.source.keys)
    assert set(yaml.safe_load(written)) <= {"extends", *(key.partition(".")[0] for key in keys())}
