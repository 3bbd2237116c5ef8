"""Keys of other tools that change what is learned: in the recipe, named as a difference, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import refuses
from tunesmith.config.names import keys
from tunesmith.errors import UsageError
from tunesmith.tools.importers.source_config import read_config, table
from tunesmith.tools.importers.translate import translate

from .translations import BASES, translated, translated_text

ABSENT = "no such key"
OFFLOAD = {"train.cpu_offload": ["parameters"]}
BY_OFFLOADING = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
OPTIMIZER_OFFLOAD = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
MIN_RATE = {"learning_rate": 1e-5, "lr_scheduler_type": "cosine_with_min_lr"}
LEAST = {"train.min_learning_rate": 1e-6, "train.schedule": "cosine"}
DOCUMENTS = [{"path": "e/e", "type": "completion"}]
BOOKS = {"source": "org/books", "split": "train", "format": "text"}


def chat(**more: Any) -> dict[str, Any]:
    """A data set of chats of Axolotl, with more keys."""
    return {"datasets": [{"path": "d/d", "type": "chat_template", **more}]}


CARRIED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # Data sets and their rows.
    ("axolotl", chat(train_on_split="validation"), {"data.train": {"source": "d/d", "split": "validation", "format": "messages"}}),
    ("axolotl", chat(), {"data.too_long": "drop", "model.vision": ABSENT}),
    ("axolotl", chat() | {"excess_length_strategy": None}, {"data.too_long": "drop"}),
    ("axolotl", chat() | {"excess_length_strategy": "truncate"}, {"data.too_long": "truncate"}),
    ("axolotl", chat() | {"excess_length_strategy": "raise"}, {"data.too_long": "error"}),
    ("axolotl", {"datasets": DOCUMENTS}, {"data.too_long": ABSENT}),
    ("axolotl", chat() | {"test_datasets": DOCUMENTS}, {"data.too_long": "drop"}),
    ("axolotl", chat() | {"processor_type": "AutoProcessor"}, {"model.vision": True}),
    ("axolotl documents", {"pretraining_dataset": "org/books", "max_steps": 9}, {"data.train": BOOKS}),
    ("axolotl documents", {"pretraining_dataset": [{"path": "org/books", "text_column": "body", "type": "pretrain"}], "max_steps": 9},
     {"data.train": BOOKS | {"columns": {"text": "body"}}}),
    ("axolotl documents", {"pretraining_dataset": [{"path": "org/books", "name": "en", "text_column": "text"}], "max_steps": 9},
     {"data.train": BOOKS | {"name": "en"}}),
    ("trl", {"dataset_text_field": "body"}, {"data.train": {"source": "d/d", "split": "train", "format": "text", "columns": {"text": "body"}}}),
    ("trl", {"dataset_text_field": "messages"}, {"data.train": {"source": "d/d", "split": "train", "format": "messages"}}),
    ("trl", {"train_sampling_strategy": "sequential"}, {"data.shuffle": False}),
    ("llamafactory", {"default_system": "Be short."}, {"data.system": "Be short."}),
    ("llamafactory", {"eval_dataset": 0}, {"data.validation": ABSENT}),
    ("llamafactory", {"template": "qwen3", "enable_thinking": False}, {"data.template_args": {"enable_thinking": False}}),
    ("llamafactory", {"template": "qwen3", "enable_thinking": True}, {"data.template_args": ABSENT}),
    ("llamafactory", {"template": "alpaca", "enable_thinking": False}, {"data.template_args": ABSENT}),
    # The model and its adapter.
    ("torchtune", {"model": {"_component_": "torchtune.models.llama3.lora_llama3_8b", "quantize_base": True}}, {"model.quantize": "nf4"}),
    ("axolotl", {"adapter": "lora", "lora_r": 8, "lora_target_modules": "q_proj, v_proj"}, {"adapter.target": ["q_proj", "v_proj"]}),
    ("trl", {"use_peft": True, "lora_target_modules": "q_proj, v_proj"}, {"adapter.target": ["q_proj", "v_proj"]}),
    # The optimizer, its schedule and its memory.
    ("torchtune", {"optimizer": {"lr": 1e-4, "betas": [0.9, 0.95]}}, {"train.betas": [0.9, 0.95]}),
    ("llamafactory", {"adam_beta1": 0.0}, {"train.betas": [0.0, 0.999]}),
    ("llamafactory", {"save_strategy": "steps", "save_steps": 0}, {"checkpoint.every": None}),
    ("llamafactory", {"eval_strategy": "steps", "logging_steps": 7, "val_size": 0.1}, {"validate.every": "7 steps"}),
    ("trl", MIN_RATE | {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, LEAST),
    ("trl", MIN_RATE | {"lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'}, LEAST),
    ("trl", MIN_RATE | {"lr_scheduler_kwargs": {"min_lr": 1e-6}}, LEAST),
    ("llamafactory", {"deepspeed": BY_OFFLOADING}, OFFLOAD),
    ("axolotl", {"deepspeed": OPTIMIZER_OFFLOAD}, OFFLOAD),
    ("trl", {"deepspeed": BY_OFFLOADING}, OFFLOAD),
    ("llamafactory", {"fsdp": "full_shard auto_wrap offload"}, OFFLOAD),
    # Trackers and their project.
    ("axolotl", {"wandb_project": "chats", "wandb_name": "first"}, {"log.wandb": True, "log.project": "chats"}),
    ("torchtune", {"metric_logger": {"_component_": "m.WandBLogger", "project": "chats"}}, {"log.wandb": True, "log.project": "chats"}),
    ("trl", {"report_to": "wandb", "project": "chats"}, {"log.wandb": True, "log.project": "chats"}),
    ("axolotl", {"use_comet": True, "comet_project_name": "chats"}, {"log.trackers": ["comet_ml"], "log.project": "chats"}),
    ("axolotl", {"use_trackio": True, "trackio_project_name": "chats"}, {"log.trackers": ["trackio"], "log.project": "chats"}),
    ("axolotl", {"use_mlflow": True, "mlflow_experiment_name": "chats"}, {"log.trackers": ["mlflow"], "log.project": "chats"}),
    ("axolotl", {"use_tensorboard": True}, {"log.tensorboard": True, "log.project": ABSENT}),
    ("trl", {"report_to": "tensorboard"}, {"log.tensorboard": True}),
    ("llamafactory", {"report_to": "none"}, {"log.tensorboard": ABSENT}),
]  # fmt: skip


@pytest.mark.parametrize(("base", "theirs", "ours"), CARRIED)
def test_a_key_is_in_the_recipe(base, theirs, ours, tmp_path):
    recipe = translated(base, theirs, tmp_path)
    assert {key: recipe.values.get(key, ABSENT) for key in ours} == ours
    assert not [key for key in recipe.values if not recipe.comments[key]]


# Text of a file in YAML 1.1, before the keys of the base.
TEXTS: list[tuple[str, str, str, Any]] = [
    ("axolotl", "sequence_len: 16_384", "data.seq_len", 16384),
    ("axolotl", 'sequence_len: "4096"', "data.seq_len", 4096),
    ("axolotl", "seed: 010", "train.seed", 8),
    ("axolotl", 'sample_packing: "true"', "data.pack", True),
    ("axolotl", "adapter: lora\nlora_r: 8\npeft_use_rslora: yes", "adapter.rslora", True),
    ("axolotl", 'lora_target_linear: "no"\nadapter: lora', "adapter.target", ["q_proj", "v_proj"]),
    ("trl", "learning_rate: 5e-7", "train.learning_rate", 5e-7),
    ("trl", 'packing: "false"', "data.pack", False),
    ("trl", 'use_peft: "no"', "adapter.kind", "none"),
    ("trl", "save_strategy: no\nsave_steps: 10", "checkpoint.every", None),
    ("trl", 'save_strategy: "no"\nsave_steps: 10', "checkpoint.every", None),
    ("trl", "eval_strategy: no\neval_steps: 10", "data.validation", ABSENT),
    ("trl", "eval_strategy: 'NO'\neval_steps: 10", "data.validation", ABSENT),
    ("trl", "eval_strategy: none\neval_steps: 10", "validate.every", ABSENT),
    ("llamafactory", 'train_on_prompt: "no"', "data.train_on", "response"),
    ("llamafactory", 'full_determinism: "yes"', "train.deterministic", True),
    ("torchtune", "optimizer_in_bwd: on", "train.optimizer_in_backward", True),
]


@pytest.mark.parametrize(("tool", "text", "key", "value"), TEXTS)
def test_numbers_and_switches_are_read_in_any_form(tool, text, key, value, tmp_path):
    base = "".join(f"{name}: {json.dumps(v)}\n" for name, v in BASES[tool].items())
    found = translated_text(tool, f"{text}\n{base}", tmp_path).values.get(key, ABSENT)
    assert (found, type(found)) == (value, type(value))


METHODS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("axolotl pairs", {"rl": "dpo"}, {"name": "dpo", "beta": 0.1, "loss_type": "sigmoid"}),
    ("axolotl pairs", {"rl": "orpo", "orpo_alpha": 0.3}, {"name": "orpo", "beta": 0.3}),
    ("axolotl pairs", {"rl": "dpo", "trl": {"beta": 0.4}, "rpo_alpha": 0.5}, {"name": "dpo", "beta": 0.4, "loss_type": "sigmoid", "sft_weight": 0.5}),
    ("axolotl pairs", {"rl": "simpo", "simpo_gamma": 0.9, "cpo_alpha": 0}, {"name": "simpo", "beta": 0.1, "simpo_gamma": 0.9}),
    ("llamafactory pairs", {}, {"name": "dpo", "beta": 0.1, "loss_type": "sigmoid"}),
    ("llamafactory pairs", {"pref_loss": "orpo"}, {"name": "orpo", "beta": 0.1}),
    ("llamafactory pairs", {"pref_loss": "hinge", "pref_ftx": 0.2, "pref_beta": 0.3}, {"name": "dpo", "beta": 0.3, "loss_type": "hinge", "sft_weight": 0.2}),
    ("trl pairs", {"beta": 0.1}, {"name": "dpo", "beta": 0.1, "loss_type": "sigmoid"}),
    ("trl pairs", {"beta": 0.1, "loss_type": "ipo"}, {"name": "dpo", "beta": 0.1, "loss_type": "ipo"}),
    ("trl pairs", {"beta": 0.1, "loss_type": "kto"}, {"name": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
    ("trl pairs", {"desirable_weight": 0.5}, {"name": "kto", "beta": 0.1, "desirable_weight": 0.5, "undesirable_weight": 1.0}),
    ("trl pairs", {"loss_type": "simpo", "simpo_gamma": 0.7, "beta": 2.0, "cpo_alpha": 0.0}, {"name": "simpo", "beta": 2.0, "simpo_gamma": 0.7}),
    ("trl pairs", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, {"name": "dpo", "beta": 0.1, "loss_type": "sigmoid", "sft_weight": 0.3}),
    ("trl pairs", {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("base", "theirs", "method"), METHODS)
def test_a_method_has_its_numbers(base, theirs, method, tmp_path):
    """The loss of TRL tells its trainer. TRL takes dropout out of a model with a reference."""
    values = translated(base, theirs, tmp_path).values
    prefix = "method."
    found = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    assert found == method
    assert not method or values["adapter.dropout"] == 0.0


# Base, keys, the key of the note, and whether the training may differ.
NOTES: list[tuple[str, dict[str, Any], str, bool]] = [
    ("axolotl", {"lora_rnk": 4}, "lora_rnk", True),
    # What of a turn is trained.
    ("axolotl", chat(roles_to_train=["assistant"]), "datasets.0.roles_to_train", False),
    ("axolotl", chat(roles_to_train=["assistant", "user"]), "datasets.0.roles_to_train", True),
    ("axolotl", chat(roles_to_train=["gpt"]), "datasets.0.roles_to_train", False),
    ("axolotl", chat(roles_to_train=[]), "datasets.0.roles_to_train", True),
    ("axolotl", chat(train_on_eos="turn"), "datasets.0.train_on_eos", False),
    ("axolotl", chat(train_on_eos="all"), "datasets.0.train_on_eos", True),
    ("axolotl", chat(train_on_eot="turn"), "datasets.0.train_on_eot", False),
    ("axolotl", chat(train_on_eot=False), "datasets.0.train_on_eot", True),
    ("axolotl", chat(field_thinking="thinking"), "datasets.0.field_thinking", False),
    ("axolotl", chat(field_thinking="scratchpad"), "datasets.0.field_thinking", True),
    ("axolotl", chat(chat_template="tokenizer_default"), "datasets.0.chat_template", False),
    ("axolotl", chat(chat_template="chatml"), "datasets.0.chat_template", True),
    ("axolotl", chat(message_field_training="train"), "datasets.0.message_field_training", True),
    ("axolotl", chat(message_field_training_detail="d"), "datasets.0.message_field_training_detail", True),
    ("axolotl", chat(shards=10), "datasets.0.shards", True),
    ("axolotl", chat(drop_system_message=True), "datasets.0.drop_system_message", True),
    ("axolotl", chat(message_property_mappings={"role": "speaker"}), "datasets.0.message_property_mappings.role", True),
    ("axolotl", chat() | {"dataset_shard_num": 4}, "dataset_shard_num", True),
    ("axolotl", chat() | {"chat_template": "tokenizer_default"}, "chat_template", False),
    ("axolotl", chat() | {"chat_template": "chatml"}, "chat_template", True),
    ("axolotl", chat() | {"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking", True),
    ("axolotl", {"plugins": []}, "plugins", False),
    ("axolotl", {"plugins": ["axolotl.integrations.any.LigerPlugin"]}, "plugins", False),
    ("axolotl", {"plugins": ["axolotl.integrations.any.SpectrumPlugin"]}, "plugins", True),
    ("axolotl", {"embedding_lr_scale": 0.1}, "embedding_lr_scale", True),
    ("axolotl", {"ddp_timeout": 180000000}, "ddp_timeout", False),
    ("axolotl", {"tf32": True}, "tf32", False),
    ("axolotl", {"strict": 7}, "strict", False),
    ("axolotl", {"deepspeed": "gone.json"}, "deepspeed", True),
    ("llamafactory", {"deepspeed": "ds_configs/zero3"}, "deepspeed", True),
    ("llamafactory", {"eval_dataset": []}, "eval_dataset", False),
    ("llamafactory", {"per_device_eval_batch_size": 7}, "per_device_eval_batch_size", False),
    ("llamafactory", {"template": "alpaca", "enable_thinking": False}, "enable_thinking", False),
    ("llamafactory", {"template": "qwen3", "enable_thinking": False}, "enable_thinking", True),
    ("llamafactory", {"preserve_thinking": True}, "preserve_thinking", True),
    ("llamafactory", {"lr_scheduler_kwargs": '{"num_cycles": 3, "power": 2.0}'}, "lr_scheduler_kwargs.power", True),
    ("llamafactory", {"quantization_type": "fp4"}, "quantization_type", True),
    ("llamafactory", {"quantization_type": "nf4"}, "quantization_type", False),
    ("llamafactory", {"quantization_method": "hqq"}, "quantization_method", True),
    ("llamafactory", {"report_to": "none"}, "report_to", False),
    ("trl", {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type", True),
    ("trl", {"bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type", False),
    ("trl", {"packing_strategy": "wrapped"}, "packing_strategy", True),
    ("trl", {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs.a", True),
    ("trl", {"run_name": 7}, "run_name", False),
    ("torchtune", {"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}}, "loss._component_", True),
    ("torchtune", {"loss": {"_component_": "my.loss.FocalLoss"}}, "loss._component_", True),
    ("torchtune", {"loss": {"_component_": "torchtune.modules.loss.LinearCrossEntropyLoss"}}, "loss._component_", False),
    ("torchtune", {"loss": {"_component_": "m.CEWithChunkedOutputLoss", "mask_ignored_tokens": True}}, "loss.mask_ignored_tokens", False),
    ("torchtune", {"tokenizer": {"prompt_template": "torchtune.data.ChatMLTemplate"}}, "tokenizer.prompt_template", True),
    # Of methods.
    ("axolotl pairs", {"rl": "simpo"}, "cpo_alpha", True),
    ("axolotl pairs", {"rl": "orpo"}, "rl", True),
    ("axolotl pairs", {"rl": "dpo", "lora_model_dir": "sft"}, "lora_model_dir", True),
    ("axolotl pairs", {"rl": "dpo", "dpo_use_weighting": True}, "dpo_use_weighting", True),
    ("llamafactory pairs", {"pref_loss": "simpo", "pref_ftx": 0.5}, "pref_ftx", True),
    ("llamafactory pairs", {"dpo_label_smoothing": 0.1}, "dpo_label_smoothing", True),
    ("llamafactory pairs", {"ref_model": "m/other"}, "ref_model", True),
    ("trl pairs", {"beta": 0.1, "f_divergence_type": "js_divergence"}, "f_divergence_type", True),
    ("trl pairs", {"beta": 0.1, "sync_ref_model": True}, "sync_ref_model", True),
    ("trl pairs", {"beta": 0.1, "ld_alpha": 0.5}, "ld_alpha", True),
]  # fmt: skip


@pytest.mark.parametrize(("base", "theirs", "key", "differs"), NOTES)
def test_a_key_that_is_not_in_the_recipe_is_noted(base, theirs, key, differs, tmp_path):
    assert translated(base, theirs, tmp_path).notes[key].differs is differs


@pytest.mark.parametrize(
    ("tool", "key"), [("axolotl", "load_in_8bit"), ("llamafactory", "quantization_bit")]
)
def test_a_base_in_int8_gets_an_answer(tool: str, key: str, tmp_path: Path) -> None:
    draft = translated(tool, {"adapter": "lora", key: 8 if tool != "axolotl" else True}, tmp_path)
    assert "model.quantize" not in draft.values
    note = draft.notes[key]
    assert note.differs
    for word in ("bf16", "model.quantize=fp8", "Hopper", "nf4", "A100"):
        assert word in note.why


PROMPT_OF_ITS_OWN = [{"path": "d/d", "type": {"field_instruction": "question"}}]
REFUSED: list[tuple[str, dict[str, Any], str, list[str]]] = [
    # Base, keys, the key that the error names, and what its fix has.
    ("axolotl", {"datasets": PROMPT_OF_ITS_OWN}, "datasets.0.type.field_instruction", ["data.train.format=alpaca"]),
    ("axolotl", {"datasets": PROMPT_OF_ITS_OWN, "rl": "dpo"}, "datasets.0.type.field_instruction", ["data.train.format=preference"]),
    ("axolotl", {"datasets": [{"path": "d/d", "type": "alpaca:phi"}]}, "alpaca:phi", []),
    ("axolotl", {"datasets": [{"path": "d/d", "type": "sharegpt.load_role"}]}, "sharegpt.load_role", []),
    ("axolotl", {"datasets": ["rows.jsonl"]}, "datasets.type", ["data.train.source=rows.jsonl data.train.format=messages"]),
    ("axolotl", chat() | {"chat_template_jinja": "{{ messages }}"}, "chat_template_jinja", ["data.template=template.jinja"]),
    ("axolotl", {"adapter": "lora", "lora_target_modules": r".*\.(q|v)_proj"}, "lora_target_modules", ["adapter.target="]),
    ("trl", {"use_peft": True, "lora_target_modules": "(q_proj"}, "lora_target_modules", ["adapter.target="]),
    ("trl", {"dataset_name": None, "dataset_mixer": {"org/a": 1}}, "dataset_mixer.org/a", ["data.train"]),
    ("trl", {"dataset_name": None, "datasets": [{"path": "org/a"}, {"path": "org/b"}]}, "datasets.0.path", ["data.train"]),
    ("trl", {"dataset_mixture": {"datasets": [{"id": "org/a"}]}}, "dataset_mixture.datasets.0.id", ["data.train"]),
    ("trl", {"beta": 0.1, "num_generations": 1}, "num_generations", []),
    ("trl", {"beta": 0.1, "center_rewards_coefficient": 1}, "center_rewards_coefficient", []),
    ("trl", {"beta": 0.1, "lmbda": 1}, "lmbda", []),
    ("trl", {"packing": "sometimes"}, "packing", []),
    # Of methods.
    ("axolotl pairs", {"rl": "grpo"}, "rl", []),
    ("axolotl pairs", {"rl": "dpo", "datasets": [{"path": "d", "type": "zephyr.nectar"}]}, "datasets.0.type", []),
    ("llamafactory pairs", {"pref_loss": "kto_pair"}, "pref_loss", []),
    ("llamafactory pairs", {"stage": "ppo"}, "stage", []),
    ("trl pairs", {"beta": 0.1, "loss_type": "bco_pair"}, "loss_type", []),
    ("trl pairs", {"beta": 0.1, "loss_type": ["sigmoid", "hinge"]}, "loss_type", []),
    ("trl pairs", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 1.0]}, "loss_weights", []),
    ("trl pairs", {"cpo_alpha": 1.0}, "loss_type", []),
    ("trl pairs", {"desirable_weight": 1.0, "loss_type": "apo_zero_unpaired"}, "loss_type", []),
]  # fmt: skip


@pytest.mark.parametrize(("base", "theirs", "key", "fix"), REFUSED)
def test_what_has_no_counterpart_is_refused_by_its_key(base, theirs, key, fix, tmp_path):
    with refuses(UsageError, names=[key], fix=fix):
        translated(base, theirs, tmp_path)


@pytest.mark.parametrize("key", ["gradient_accumulation_steps", "micro_batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "many"])
def test_a_count_that_is_no_whole_number_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(json.dumps(BASES["axolotl"] | {key: value}))
    with refuses(UsageError, where="file.yaml:1", names=[key]):
        translate(read_config(path, "axolotl"), {}, 1)


# Base, keys that are refused alone, and recipe keys that replace them.
REPLACED: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("axolotl", {"datasets": PROMPT_OF_ITS_OWN}, {"data.train.source": "d/d", "data.train.format": "alpaca"}),
    ("axolotl", {"datasets": "rows.jsonl"}, {"data.train.source": "rows.jsonl"}),
    ("axolotl", {"adapter": "lora", "lora_target_modules": "(q_proj"}, {"adapter.target": "[q_proj]"}),
    ("trl", {"dataset_mixer": {"org/a": 0.5}}, {"data.train.source": "rows.jsonl"}),
    ("trl", {"datasets": [{"path": "org/a"}]}, {"data.train.source": "rows.jsonl"}),
]  # fmt: skip


@pytest.mark.parametrize(("base", "theirs", "given_keys"), REPLACED)
def test_the_command_line_replaces_what_is_refused(base, theirs, given_keys, tmp_path):
    recipe = translated(base, theirs, tmp_path, given_keys)
    assert {*recipe.source.keys} <= recipe.mentioned


@pytest.mark.parametrize(
    ("value", "train_on"), [(None, "response"), (True, "response"), (False, "all")]
)
def test_the_loss_of_trl_on_completions(value: bool | None, train_on: str, tmp_path: Path) -> None:
    rows = {"data.train.format": "prompt-completion"}
    recipe = translated("trl", {"completion_only_loss": value}, tmp_path, rows)
    assert recipe.values["data.train_on"] == train_on


def test_the_method_of_the_command_line_wins(tmp_path: Path) -> None:
    draft = translated("trl pairs", {"beta": 0.2}, tmp_path, {"method": "orpo"})
    assert (draft.values["method.name"], draft.values["method.beta"]) == ("orpo", 0.2)
    assert draft.notes["beta"].differs


def test_data_sets_of_torchtune_that_train_on_other_parts_differ(tmp_path: Path) -> None:
    of_chats = {"_component_": "torchtune.datasets.chat_dataset", "source": "d/d"}
    parts = [{**of_chats, "train_on_input": value} for value in (False, True, False)]
    notes = translated("torchtune", {"dataset": parts}, tmp_path).notes
    assert notes["dataset.1.train_on_input"].differs
    assert not notes["dataset.2.train_on_input"].differs


def of_llamafactory(folder: Path, entries: dict[str, Any], **values: Any) -> Any:
    """A file of LLaMA-Factory with these entries of dataset_info.json."""
    (folder / "data").mkdir()
    (folder / "data" / "dataset_info.json").write_text(json.dumps(entries))
    return translated("llamafactory", {"dataset": ",".join(entries), **values}, folder)


def test_the_entries_of_dataset_info_are_read(tmp_path: Path) -> None:
    """Packs of documents unless packing is false; the pixels are its default."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    chats = {"file_name": "d.json", "formatting": "sharegpt"}
    entries = {
        "usual": {**chats, "tags": tags},
        "odd": {**chats, "tags": {**tags, "role_tag": "who", "user_tag": "customer"}},
        "seen": {**chats, "columns": {"images": "photos"}},
    }
    recipe = of_llamafactory(tmp_path, entries, freeze_vision_tower=False)
    assert not recipe.notes["dataset.0.tags.user_tag"].differs
    assert recipe.notes["dataset.1.tags.user_tag"].differs
    assert recipe.notes["dataset.1.tags.role_tag"].differs
    assert recipe.notes["freeze_vision_tower"].differs
    assert recipe.values["model.vision"] is True
    assert recipe.values["data.image_max_pixels"] == 768 * 768
    assert recipe.values["data.train"][2]["columns"]["images"] == "photos"


def test_documents_of_llamafactory(tmp_path: Path) -> None:
    entries = {
        "a": {"file_name": "a.json", "columns": {"prompt": "body"}},
        "b": {"hf_hub_url": "org/b", "columns": {"prompt": "text"}},
    }
    recipe = of_llamafactory(tmp_path, entries, stage="pt")
    first, second = recipe.values["data.train"]
    assert (first["format"], first["columns"]) == ("text", {"text": "body"})
    assert (second["format"], "columns" in second) == ("text", False)
    assert (recipe.values["method"], recipe.values["data.pack"]) == ("sft", True)


@pytest.mark.parametrize(
    ("name", "fix"), [("tickts", "tickets"), ("broken", "data.train.source=rows.jsonl")]
)
def test_a_data_set_that_is_not_listed_is_refused(name: str, fix: str, tmp_path: Path) -> None:
    entries = {"tickets": {"file_name": "rows.jsonl"}, "broken": None}
    info = tmp_path / "data" / "dataset_info.json"
    with refuses(UsageError, where="file.yaml:1", names=[name, info], fix=[fix]):
        of_llamafactory(tmp_path, entries, dataset=name)


REFERENCES = """\
model_dir: /m/Llama-3
rows: 4
packs: false
model: {_component_: torchtune.models.llama3.lora_llama3_8b}
checkpointer: {checkpoint_dir: "${model_dir}"}
tokenizer: {path: "${model_dir}/tokenizer.model", max_seq_len: 512}
dataset: {_component_: torchtune.datasets.alpaca_dataset, packed: "${packs}"}
optimizer: {lr: 1e-4}
batch_size: ${rows}
"""


def test_a_value_that_others_refer_to_keeps_its_type_and_needs_nothing(tmp_path: Path) -> None:
    recipe = translated_text("torchtune", REFERENCES, tmp_path)
    assert not any(recipe.notes[name].differs for name in ("model_dir", "rows", "packs"))
    assert recipe.values["data.pack"] is False


NAMES = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz_.-"), min_size=1, max_size=12)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 99),
    st.floats(0, 1),
    st.text(max_size=20),
    st.lists(st.integers(0, 9), max_size=3),
)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["torchtune", "axolotl", "llamafactory", "trl"])
@settings(max_examples=15)
@given(data=st.data())
def test_no_key_is_dropped(tool, data, tmp_path_factory):
    """Any keys with any values are refused with a place and a fix, or each one is named."""
    own = [
        name
        for part in ("nothing", "differs")
        for names in table(tool)[part].values()
        for name in names
        if "*" not in name
    ]
    theirs = sorted({*table(tool)["defaults"], *own} - {"dataset", "datasets"})
    values = data.draw(st.dictionaries(st.sampled_from(theirs), VALUES, max_size=6))
    values |= data.draw(st.dictionaries(NAMES, VALUES, max_size=2))
    folder = tmp_path_factory.mktemp("any")
    try:
        draft = translated(tool, values | BASES[tool], folder)
        written = draft.text(draft.tree(), "# head", folder)
    except UsageError as error:
        refused = error
    else:
        refused = None
    if refused:
        assert refused.where
        assert refused.fix
        return
    told = " ".join(draft.comments.values()) + "".join(f" {key}: " for key in draft.notes)
    assert all(f"{key}: " in told for key in draft.source.keys)
    assert set(yaml.safe_load(written)) <= {"extends", *(key.partition(".")[0] for key in keys())}
