"""Names that people bring from elsewhere, and what says the same here.

`ELSEWHERE` knows the keys of TRL and Transformers' TrainingArguments, Axolotl, LLaMA-Factory, torchtune, Unsloth and
PEFT that have a counterpart; each entry is the line to write, beginning with the full key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import get_args, get_type_hints

from tunesmith.config.schema import Run

_MODEL = "model.name: meta-llama/Llama-3.1-8B-Instruct"
_LORA = "adapter.kind: lora"
_SOURCE = "data.train: {source: rows.jsonl, format: messages}"
_HELD_OUT = 'data.validation: {source: rows.jsonl, split: "train[95%:]"}, with split: "train[:95%]" for data.train'
_MICRO = "train.micro_batch: auto, or 8 examples; what a step learns from is train.global_batch"
_GLOBAL = "train.global_batch: 64 examples; it counts all ranks and all accumulation, which is worked out"
_DURATION = "train.duration: 3 epochs, 500 steps or 2 h"
_RATE = "train.learning_rate: 1e-4"
_SCHEDULE = "train.schedule: cosine, linear or constant"
_WARMUP = "train.warmup: 3 % or 100 steps"
_CLIP = "train.clip_norm: 1.0"
_RECOMPUTE = "train.recompute: full"
_COMPILE = "train.compile: on"
_DTYPE = "model.dtype: bf16"
_EVERY_SAVE = "checkpoint.every: 200 steps"
_EVERY_EVAL = "validate.every: 100 steps"
_EVERY_LOG = "log.every: 1 steps"
_SEQ_LEN = "data.seq_len: 2048"
_PACK = "data.pack: true"
_MASK = "data.train_on: response, last or all"
_WANDB = "log.wandb: true; WANDB_PROJECT and WANDB_NAME name the project and the run"
_BETAS = "train.betas: [0.9, 0.999]"
_EOS = "data.template: auto; every trained answer ends with the end token of the template"
_COLUMNS = "data.train.columns: {instruction: question, output: answer}"
_PARALLEL = "parallel.shard: auto; ranks are worked out"

ELSEWHERE = {
    "model_name_or_path": _MODEL,
    "model_name": _MODEL,
    "base_model": _MODEL,
    "checkpoint_dir": _MODEL,
    "model_id": _MODEL,
    "model_revision": "model.revision: main",
    "tokenizer_name": "model.tokenizer: null",
    "torch_dtype": _DTYPE,
    "bf16": _DTYPE,
    "bfloat16": _DTYPE,
    "fp16": "model.dtype: fp16",
    "precision": _DTYPE,
    "load_in_4bit": "model.quantize: nf4",
    "quantization_bit": "model.quantize: nf4",
    "bnb_4bit_quant_type": "model.quantize: nf4",
    "load_in_8bit": "model.quantize: nf4; 8-bit integers are not among the forms here",
    "attn_implementation": "model.attention: auto",
    "flash_attention": "model.attention: auto; it takes the fastest that this machine has",
    "flash_attn": "model.attention: auto; it takes the fastest that this machine has",
    "special_tokens": "model.pad_token and model.added_tokens: [<|call|>]",
    "finetuning_type": "adapter.kind: lora, or none for full fine-tuning",
    "use_peft": _LORA,
    "peft_config": _LORA,
    "lora": _LORA,
    "lora_r": "adapter.rank: 8",
    "lora_rank": "adapter.rank: 8",
    "r": "adapter.rank: 8",
    "lora_alpha": "adapter.alpha: 16",
    "lora_dropout": "adapter.dropout: 0.0",
    "lora_target": "adapter.target: all-linear",
    "lora_target_modules": "adapter.target: all-linear",
    "lora_target_linear": "adapter.target: all-linear",
    "target_modules": "adapter.target: all-linear",
    "lora_attn_modules": "adapter.target: [q_proj, k_proj, v_proj, o_proj]",
    "apply_lora_to_mlp": "adapter.target: [q_proj, v_proj, gate_proj, up_proj, down_proj]",
    "use_rslora": "adapter.rslora: true",
    "peft_use_rslora": "adapter.rslora: true",
    "lora_modules_to_save": "adapter.modules_to_save: [embed_tokens, lm_head]",
    "additional_target": "adapter.modules_to_save: [embed_tokens, lm_head]",
    "adapter_name_or_path": "adapter.from: runs/first/final",
    "lora_model_dir": "adapter.from: runs/first/final",
    "dataset": _SOURCE,
    "datasets": _SOURCE,
    "dataset_name": _SOURCE,
    "dataset_dir": _SOURCE,
    "train_file": _SOURCE,
    "path": "data.train.source: rows.jsonl",
    "data_files": "data.train.source: rows.jsonl",
    "eval_dataset": _HELD_OUT,
    "test_datasets": _HELD_OUT,
    "dataset_val": _HELD_OUT,
    "val_set_size": _HELD_OUT,
    "val_size": _HELD_OUT,
    "max_samples": "data.train.max_examples: 1000",
    "dataset_size": "data.train.max_examples: 512",
    "chat_template": "data.template: auto, chat, alpaca or a Jinja file",
    "prompt_style": "data.template: auto, chat, alpaca or a Jinja file",
    "dataset_text_field": "data.train.columns: {text: body}, with format: text",
    "conversation_column": "data.train.columns: {conversations: dialogue}, with format: sharegpt",
    "conversation_style": "data.train.format: sharegpt or messages",
    "field_messages": "data.train.columns: {messages: dialogue}",
    "column_map": _COLUMNS,
    "formatting": "data.train.format: sharegpt",
    "add_eos_token": _EOS,
    "cutoff_len": _SEQ_LEN,
    "max_seq_length": _SEQ_LEN,
    "max_seq_len": _SEQ_LEN,
    "max_length": _SEQ_LEN,
    "sequence_len": _SEQ_LEN,
    "packing": _PACK,
    "packed": _PACK,
    "sample_packing": _PACK,
    "neat_packing": _PACK,
    "padding_free": _PACK,
    "pad_to_sequence_len": _PACK,
    "train_on_inputs": _MASK,
    "train_on_prompt": _MASK,
    "train_on_input": _MASK,
    "mask_history": "data.train_on: last",
    "assistant_only_loss": "data.train_on: response",
    "completion_only_loss": "data.train_on: response",
    "per_device_train_batch_size": _MICRO,
    "micro_batch_size": _MICRO,
    "batch_size": _GLOBAL,
    "train_batch_size": _GLOBAL,
    "gradient_accumulation_steps": _GLOBAL,
    "per_device_eval_batch_size": "train.micro_batch: auto; validation takes the same",
    "eval_batch_size": "train.micro_batch: auto; validation takes the same",
    "batch_size_val": "train.micro_batch: auto; validation takes the same",
    "num_train_epochs": _DURATION,
    "num_epochs": _DURATION,
    "epochs": _DURATION,
    "max_steps": "train.duration: 500 steps",
    "max_steps_per_epoch": "train.duration: 500 steps",
    "lr": _RATE,
    "lr_scheduler_type": _SCHEDULE,
    "lr_scheduler": _SCHEDULE,
    "cosine_min_lr_ratio": "train.min_learning_rate: 1e-5",
    "min_lr": "train.min_learning_rate: 1e-5",
    "warmup_ratio": "train.warmup: 3 %",
    "warmup_steps": "train.warmup: 100 steps",
    "num_warmup_steps": "train.warmup: 100 steps",
    "optim": "train.optimizer: adamw (or adamw-8bit)",
    "adam_beta1": _BETAS,
    "adam_beta2": _BETAS,
    "adam_epsilon": "train.eps: 1e-8",
    "max_grad_norm": _CLIP,
    "clip_grad_norm": _CLIP,
    "gradient_clipping": _CLIP,
    "gradient_checkpointing": _RECOMPUTE,
    "use_gradient_checkpointing": _RECOMPUTE,
    "activation_checkpointing": _RECOMPUTE,
    "enable_activation_checkpointing": _RECOMPUTE,
    "torch_compile": _COMPILE,
    "use_torch_compile": _COMPILE,
    "optimizer_in_bwd": "train.optimizer_in_backward: true",
    "random_state": "train.seed: 42",
    "data_seed": "train.seed: 42",
    "tensor_parallel_dim": "parallel.tensor: 1",
    "tensor_parallel_size": "parallel.tensor: 1",
    "data_parallel_shard_dim": _PARALLEL,
    "data_parallel_replicate_dim": "parallel.replicate: auto; ranks are worked out",
    "fsdp": _PARALLEL,
    "fsdp_config": _PARALLEL,
    "deepspeed": _PARALLEL,
    "eval_steps": _EVERY_EVAL,
    "eval_strategy": _EVERY_EVAL,
    "evaluation_strategy": _EVERY_EVAL,
    "evals_per_epoch": "validate.every: 0.25 epochs",
    "run_val_every_n_steps": _EVERY_EVAL,
    "early_stopping_patience": "validate.patience: 3",
    "save_steps": _EVERY_SAVE,
    "save_strategy": _EVERY_SAVE,
    "saves_per_epoch": "checkpoint.every: 0.5 epochs",
    "save_total_limit": "checkpoint.keep: 3",
    "resume_from_checkpoint": "checkpoint.resume: auto; it is so without being asked",
    "auto_resume_from_checkpoints": "checkpoint.resume: auto; it is so without being asked",
    "overwrite_output_dir": "checkpoint.resume: never",
    "logging_steps": _EVERY_LOG,
    "log_every_n_steps": _EVERY_LOG,
    "plot_loss": "log.tensorboard: true",
    "logging_dir": "log.tensorboard: true; the events lie in output_dir/tensorboard",
    "log_dir": "log.tensorboard: true; the events lie in output_dir/tensorboard",
    "report_to": _WANDB,
    "use_wandb": _WANDB,
    "wandb_project": _WANDB,
    "run_name": _WANDB,
    "profiler": "profile.enabled: true",
    "wait_steps": "profile.wait: 5",
    "active_steps": "profile.active: 20",
    "num_cycles": "profile.cycles: 1",
    "stage": "method: sft",
    "output": "output_dir: runs/mine",
    "out_dir": "output_dir: runs/mine",
}

# Words of other tools, and YAML's truth values, for values that are called otherwise here.
WORDS: dict[str, tuple[str, ...]] = {
    "bfloat16": ("bf16",), "float16": ("fp16",), "half": ("fp16",), "float32": ("fp32",), "float": ("fp32",),
    "4bit": ("nf4",), "int4": ("nf4",), "bnb-4bit": ("nf4",), "bnb": ("nf4",), "qlora": ("lora",), "full": ("none",),
    "openai": ("messages",), "chatml": ("messages",), "chat": ("messages",), "conversation": ("messages",),
    "conversations": ("sharegpt",), "instruct": ("alpaca",), "instruction": ("alpaca",), "completion": ("text",),
    "assistant": ("response",), "completions": ("response",), "cut": ("truncate",), "skip": ("drop",),
    "cosine_with_min_lr": ("cosine",), "constant_with_warmup": ("constant",), "adam": ("adamw",),
    "adamw_torch": ("adamw",), "adamw_torch_fused": ("adamw",), "adamw_8bit": ("adamw",), "adamw_bnb_8bit": ("adamw",),
    "paged_adamw_8bit": ("adamw",), "flash_attention_2": ("auto",), "sdpa": ("auto",), "flash": ("auto",),
    "true": ("on", "full", "auto"), "yes": ("on", "full", "auto"), "on": ("full", "auto"),
    "false": ("off", "none", "never"), "no": ("off", "none", "never"), "off": ("none", "never"),
}  # fmt: skip


def yaml_name(name: str) -> str:
    """A field's name as a recipe writes it: `from_` is written `from`."""
    return name.removesuffix("_")


@cache
def keys() -> tuple[str, ...]:
    """Every key of a recipe with its section, sources under `data.train` and `data.validation`."""

    def below(cls: type, prefix: str) -> Iterable[str]:
        for field_ in fields(cls):
            key = prefix + yaml_name(field_.name)
            yield key
            hint = get_type_hints(cls)[field_.name]
            for inner in (hint, *get_args(hint)[:1]):
                if isinstance(inner, type) and is_dataclass(inner) and "doc" in fields(inner)[0].metadata:
                    yield from below(inner, key + ".")

    return tuple(below(Run, ""))


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that a mistyped word most likely meant; None where nothing is near."""
    listed = list(choices)
    plain = word.lower().replace("-", "_")
    same = [choice for choice in listed if choice.lower().replace("-", "_") == plain]
    if same:
        return same[0]
    for translated in WORDS.get(word.lower(), ()):
        if translated in listed:
            return translated
    found = difflib.get_close_matches(word, listed, n=1, cutoff=0.6)
    return found[0] if found else None


def instead(section: str, name: str) -> str:
    """What to write in place of an unknown key `name` of `section` ("" at the top): one line."""
    inside = [key.rpartition(".")[2] for key in keys() if key.rpartition(".")[0] == section]
    plain = name.lower().replace("-", "_")
    if plain in inside:
        return f"write it {plain}"
    if f"{section}.{name}".lstrip(".") in keys():
        outer, _, inner = name.rpartition(".")
        return f"a file nests its keys: {outer}: {{{inner}: ...}}; the form with a dot is for the command line"
    if plain in ELSEWHERE:
        return f"here it is {ELSEWHERE[plain]}"
    near = nearest(plain, inside)
    meant = [key for key in keys() if key.rpartition(".")[2] == plain]
    if meant or not near:
        other = nearest(plain, [key.rpartition(".")[2] for key in keys()])
        meant = meant or [key for key in keys() if key.rpartition(".")[2] == other]
        near = " or ".join(meant)
    return f"did you mean {near}?" if near else f"{section or 'a recipe'} has {', '.join(inside)}"
