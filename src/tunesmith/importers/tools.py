"""One function for each tool: the keys that are its own, and the rows it trains on, as a draft of a recipe."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.config.names import other_tools
from tunesmith.errors import UsageError
from tunesmith.importers.common import (
    NAME_ROWS,
    PEFT_TARGETS,
    apply_rules,
    put_adapter,
    put_rows,
    read_deepspeed,
    translate_training,
)
from tunesmith.importers.draft import Draft
from tunesmith.importers.foreign import Foreign, Given
from tunesmith.shell import shell_path


def translate(source: Foreign, overrides: Mapping[str, Any], world: int | None, extends: str | None) -> Draft:
    """A draft that names each key of the file; UsageError for a value without which there is no recipe.

    `overrides` are recipe keys given beside it, `world` is how many processes trained, `extends` a recipe below.
    """
    draft = Draft(source, overrides)
    if extends:
        draft.put("extends", extends)
    read_deepspeed(draft)
    _TOOLS[source.tool](draft)
    if source.tool != "accelerate":
        translate_training(draft, world)
        if "output_dir" not in draft.values:
            draft.put("output_dir", f"runs/{Path(source.name).stem}", why="not named there")
    draft.close()
    return draft


def _torchtune(draft: Draft) -> None:
    component = str(draft.get("kind")).rpartition(".")[2]
    folder = str(draft.get("checkpointer.checkpoint_dir") or "")
    model, owners = Path(folder).name, draft.table["owners"]
    owner = next((owner for begin, owner in owners.items() if model.lower().startswith(begin)), None)
    model = f"{owner}/{model}" if owner and not (draft.source.base / folder).is_dir() else folder
    if model != folder:
        why = f"is not here: {model} is fetched; or give model.name=FOLDER"
        draft.remark("checkpointer.checkpoint_dir", why, differs=False)
    draft.put("model.name", model, "checkpointer.checkpoint_dir", "kind")
    asked = ["o_proj" if part == "output_proj" else part for part in draft.listed("lora_attn_modules")]
    asked += ["gate_proj", "up_proj", "down_proj"] if draft.get("apply_lora_to_mlp") else []
    asked += ["lm_head"] if draft.get("apply_lora_to_output") else []
    lora = component.startswith(("lora_", "qlora_"))
    put_adapter(draft, asked, "lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output", lora=lora)
    put_rows(draft, "train", "dataset")
    put_rows(draft, "validation", "dataset_val")
    if draft.get("torch_dtype") == "bf16" and not lora:
        draft.put("train.master_weights", "stochastic", "torch_dtype", why="bf16 weights and no fp32 copy of them")
        how = "updates are rounded to the nearest there, here at random, so that small ones count"
        draft.remark("torch_dtype", how)
    if draft.get("seed") is None:
        draft.remark("seed", "each run draws its own there; here it is train.seed, 42")


def _axolotl(draft: Draft) -> None:
    for key in ("rl", "kind"):
        if draft.get(key) not in (None, "lora", "qlora"):
            raise draft.refusal(key, "it has no counterpart here", "adapter: lora, qlora or none, without rl")
    target = "all-linear" if draft.get("lora_target_linear") else draft.listed("lora_target_modules") or PEFT_TARGETS
    put_adapter(draft, target, "lora_target_linear", "lora_target_modules", lora=draft.get("kind") is not None)
    put_rows(draft, "train", "datasets")
    put_rows(draft, "validation", "test_datasets")
    templates = {value for key, value in draft.defaults.items() if key.endswith(".template")}
    template = templates.pop() if len(templates) == 1 else "auto"
    draft.put("data.template", template, "chat_template_jinja", why="by the type of the data sets")
    draft.carry("chat_template_jinja")
    if draft.given("chat_template") and draft.get("chat_template") != "tokenizer_default":
        draft.remark("chat_template", "the tokenizer's own is taken; if it is another, data.template: a Jinja file")
    if not draft.given("warmup_steps") and not draft.given("warmup_ratio"):
        draft.remark("warmup_ratio", "no more than 100 steps of it there")


def _llamafactory(draft: Draft) -> None:
    for key, known in {"stage": ("sft",), "kind": ("lora", "full"), "quantization_bit": (None, 4, 8)}.items():
        if draft.get(key) not in known:
            raise draft.refusal(key, "it has no counterpart here", f"known are {', '.join(map(str, known))}")
    draft.defaults["lora_alpha"] = 2 * draft.number("lora_rank")
    put_adapter(draft, draft.listed("lora_target"), "lora_target", lora=draft.get("kind") == "lora")
    for part, key in (("train", "dataset"), ("validation", "eval_dataset")):
        if draft.given(key):
            if draft.listed(key):
                _read_dataset_info(draft, key)
            put_rows(draft, part, key)
    draft.put("data.template", "alpaca" if draft.get("template") == "alpaca" else "auto", "template")
    if draft.get("packing") and not draft.get("neat_packing"):
        draft.remark("packing", "the documents of a packed row see each other there; here they do not")


def _read_dataset_info(draft: Draft, key: str) -> None:
    """Give each data set that the key names its entry of dataset_info.json, as `KEY.0.file_name` and so on.

    The file is looked for from the configuration's folder, those above it, and the working directory.
    """
    inside, base = Path(str(draft.get("dataset_dir")), "dataset_info.json"), draft.source.base.resolve()
    path = draft.source.nearby(inside)
    if path is None and "data.train.source" in draft.overrides:
        draft.remark(key, "data.train.source is given in its place", differs=False)
        return
    if path is None:
        why, fix = f"{inside}, which lists it, is not here", f"put it into {base / inside.parent}, or {NAME_ROWS}"
        raise draft.refusal(key, why, fix)
    for number, name in enumerate(draft.listed(key)):
        try:
            entry = dict(json.loads(path.read_text(encoding="utf-8"))[name])
        except (ValueError, KeyError, TypeError) as error:
            what = f"it does not list the data set {name}"
            raise UsageError(what, where=str(path), why=repr(error), fix=f"add it, or {NAME_ROWS}") from None
        if "file_name" in entry:
            entry["file_name"] = os.path.relpath(path.parent / entry["file_name"], draft.source.base)
        entry |= {f"columns.{ours}": column for ours, column in entry.pop("columns", {}).items()}
        entry |= {f"tags.{ours}": tag for ours, tag in entry.pop("tags", {}).items()}
        entry["num_samples"] = entry.get("num_samples") or draft.get("max_samples")
        given = {f"{key}.{number}.{name}": value for name, value in entry.items() if value is not None}
        draft.source.given.update({name: Given(name, value, path.name) for name, value in given.items()})


def _trl(draft: Draft) -> None:
    lora, form = bool(draft.get("kind")), str(draft.overrides.get("data.train.format", "messages"))
    put_adapter(draft, draft.listed("lora_target_modules") or PEFT_TARGETS, "lora_target_modules", lora=lora)
    if lora and not draft.get("lora_target_modules"):
        draft.remark("lora_target_modules", "PEFT chooses by the architecture; q_proj, v_proj of most", differs=False)
    for part, split in (("train", "dataset_train_split"), ("validation", "dataset_test_split")):
        if draft.get("dataset_name") and (part == "train" or draft.get("eval_strategy") != "no"):
            names = {"source": "dataset_name", "name": "dataset_config", "split": split}
            row = {ours: draft.get(name) for ours, name in names.items() if draft.get(name)} | {"format": form}
            draft.put(f"data.{part}", row, *names.values())
    draft.remark("dataset_name", f"TRL finds the format by the columns; here it is {form}: see data.train.format")
    losses = [name for name, ours in other_tools("keys").items() if ours == "data.train_on: response"]
    response = form == "prompt-completion" or (form != "text" and any(map(draft.get, losses)))
    draft.put("data.train_on", "response" if response else "all", *losses, why=f"of rows of format {form}")
    if draft.get("bf16") and draft.get("torch_dtype") == "float32":
        draft.remark("torch_dtype", "fp32 under autocast there; here bf16, and what is trained has an fp32 copy")


def _accelerate(draft: Draft) -> None:
    if "extends" not in draft.values:
        fix = f"name the recipe that it changes: tunesmith import {shell_path(draft.source.name)} --extends my-recipe.yaml"
        raise UsageError("an accelerate config names no model and no data", where=draft.source.name, fix=fix)
    if draft.get("max_grad_norm") != "auto":
        draft.carry("max_grad_norm")
    apply_rules(draft)
    kind, ranks, strategy = draft.get("kind"), draft.number("num_processes"), str(draft.get("fsdp_strategy"))
    shards = kind == "FSDP" or (kind == "DEEPSPEED" and draft.get("zero_stage"))
    nodes = draft.number("num_machines") if strategy.startswith("HYBRID") else 1
    copies = ranks if strategy == "NO_SHARD" or not shards else nodes
    names = ("num_processes", "num_machines", "kind", "fsdp_strategy", "zero_stage")
    for key, count in {"replicate": copies, "shard": ranks // copies}.items() if ranks > 1 else ():
        draft.put(f"parallel.{key}", count, *names)
    if draft.get("gradient_accumulation_steps") not in (None, "auto") and "train.global_batch" not in draft.overrides:
        steps = draft.count("gradient_accumulation_steps")
        if steps > 1:
            why = f"a step learns from {steps} forward passes of each process there; give all their rows: "
            draft.remark("gradient_accumulation_steps", f"{why}train.global_batch='64 examples'")


_TOOLS: dict[str, Callable[[Draft], None]] = {
    "torchtune": _torchtune, "axolotl": _axolotl, "llamafactory": _llamafactory, "trl": _trl, "accelerate": _accelerate,
}  # fmt: skip
