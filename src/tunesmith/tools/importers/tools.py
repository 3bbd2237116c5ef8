"""One function for each tool: the keys that are its own, and the rows it trains on."""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import JsonValue

from tunesmith.config.check import METHOD_FORMATS
from tunesmith.config.names import nearest, other_tools
from tunesmith.data.text.template_args import OF_RENDERER
from tunesmith.errors import UsageError, first_line
from tunesmith.host.shell import shell_path
from tunesmith.tools.importers.common import (
    NAME_ROWS,
    PEFT_TARGETS,
    apply_rules,
    entries_below,
    note_deepspeed_file,
    set_adapter,
    set_rows,
    target_modules,
    translate_training,
)
from tunesmith.tools.importers.preferences import (
    require_value,
    set_axolotl_method,
    set_llamafactory_method,
    set_trl_method,
    trl_trainer,
)
from tunesmith.tools.importers.source_config import SourceConfig, SourceKey, nearby
from tunesmith.tools.importers.translation import Translation


def translate(
    source: SourceConfig, overrides: Mapping[str, str], world: int | None, extends: str | None
) -> Translation:
    """A recipe, or a change of one, that names each key of the file.

    Args:
        overrides: recipe keys beside it.
        world: how many processes trained.
        extends: a recipe below.

    Raises:
        UsageError: a value without which there is no recipe is missing or has no counterpart.
    """
    recipe = Translation(source, overrides)
    if extends:
        recipe.set_key("extends", extends, why="given on the command line")
    note_deepspeed_file(recipe)
    _TRANSLATORS[source.tool](recipe)
    if source.tool != "accelerate":
        translate_training(recipe, world)
        if "output_dir" not in recipe.values:
            recipe.set_key("output_dir", f"runs/{Path(source.name).stem}", why="not named there")
    recipe.close()
    return recipe


def _torchtune(recipe: Translation) -> None:
    # `torchtune.models.llama3.lora_llama3_8b`: the last part tells what is trained.
    component = str(recipe.get("kind")).rpartition(".")[2]
    _torchtune_model(recipe)
    targets = []
    for part in recipe.listed("lora_attn_modules"):
        # torchtune's own name of the layer.
        targets.append("o_proj" if part == "output_proj" else part)
    if recipe.is_on("apply_lora_to_mlp"):
        targets += ["gate_proj", "up_proj", "down_proj"]
    if recipe.is_on("apply_lora_to_output"):
        targets.append("lm_head")
    lora = component.startswith(("lora_", "qlora_"))
    names = ("lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output")
    set_adapter(recipe, targets, *names, lora=lora)
    set_rows(recipe, "train", "dataset")
    set_rows(recipe, "validation", "dataset_val")
    if recipe.get("torch_dtype") == "bf16" and not lora:
        why = "bf16 weights and no fp32 copy of them"
        recipe.set_key("train.master_weights", "stochastic", "torch_dtype", why=why)
        recipe.note(
            "torch_dtype",
            "updates are rounded to the nearest there, here at random, so that small ones count",
        )
    _note_other_data_sets(recipe)
    if recipe.get("optimizer.betas"):
        recipe.set_key("train.betas", recipe.get("optimizer.betas"), "optimizer.betas")
    if recipe.get("seed") is None:
        recipe.note("seed", "each run draws its own there; here it is train.seed, 42")


def _note_other_data_sets(recipe: Translation) -> None:
    """Note a data set of a list that trains on other parts of its rows than the first one does."""
    first = recipe.is_on("train_on_inputs")
    for name in recipe.source.keys:
        is_later = re.fullmatch(r"dataset\.[1-9][0-9]*\.train_on_input", name) is not None
        if is_later and recipe.is_on(name) != first:
            recipe.note(name, "data.train_on is for all data sets: as the first one has it")


def _torchtune_model(recipe: Translation) -> None:
    """The folder of the checkpoint, or the Hub id that its name means."""
    folder = str(recipe.get("checkpointer.checkpoint_dir") or "")
    model = folder
    folder_name = Path(folder).name
    # A folder that is here wins over the name on the Hub.
    if not (recipe.source.base / folder).is_dir():
        for beginning, owner in recipe.table["owners"].items():
            if folder_name.lower().startswith(beginning):
                model = f"{owner}/{folder_name}"
                break
    if model != folder:
        why = f"is not here: {model} is fetched; or give model.name=FOLDER"
        recipe.note("checkpointer.checkpoint_dir", why, differs=False)
    recipe.set_key("model.name", model, "checkpointer.checkpoint_dir", "kind")


def _axolotl(recipe: Translation) -> None:
    require_value(recipe, "kind", (None, "lora", "qlora"))
    target: str | list[str] = target_modules(recipe, "lora_target_modules") or PEFT_TARGETS
    if recipe.is_on("lora_target_linear"):
        target = "all-linear"
    names = ("lora_target_linear", "lora_target_modules")
    set_adapter(recipe, target, *names, lora=recipe.get("kind") is not None)
    method = set_axolotl_method(recipe)
    set_rows(recipe, "train", "datasets", method)
    _set_pretraining_rows(recipe)
    set_rows(recipe, "validation", "test_datasets", method)
    if method != "sft":
        _note_templates_of_types(recipe)
    # By default rows that are too long are dropped there, and documents split.
    texts = [name for name, value in recipe.defaults.items() if value == "text"]
    if any(
        re.fullmatch(r"(pretraining_dataset|datasets)(\.[0-9]+)?\.format", name) for name in texts
    ):
        recipe.note("excess_length_strategy", "documents are split there: see data.too_long")
    else:
        recipe.carry("excess_length_strategy")
    # Data sets may imply several templates; then `auto` chooses.
    templates = {value for key, value in recipe.defaults.items() if key.endswith(".template")}
    template = templates.pop() if len(templates) == 1 else "auto"
    why = "by the type of the data sets"
    recipe.set_key("data.template", template, "chat_template_jinja", why=why)
    if "{" in str(recipe.get("chat_template_jinja")) and "data.template" not in recipe.overrides:
        fix = "write it to template.jinja, and give data.template=template.jinja"
        raise recipe.error("chat_template_jinja", "a template is a file here", fix)
    recipe.carry("chat_template_jinja")
    _set_template_args(recipe)
    if not recipe.is_set("warmup_steps") and not recipe.is_set("warmup_ratio"):
        recipe.note("warmup_ratio", "no more than 100 steps of it there")


def _set_pretraining_rows(recipe: Translation) -> None:
    """Set the rows of Axolotl's `pretraining_dataset`: a data set's name, or a list of entries."""
    name = "pretraining_dataset"
    key = recipe.source.keys.get(name)
    if key is not None and isinstance(key.value, str):
        path = f"{name}.path"
        recipe.source.keys[path] = replace(recipe.source.keys.pop(name), key=path)
    for entry in entries_below(recipe, name):
        recipe.defaults[f"{entry}.type"] = "pretrain"
    set_rows(recipe, "train", name)


def _note_templates_of_types(recipe: Translation) -> None:
    """Types of pairs that name a template of their own."""
    for name, key in recipe.source.keys.items():
        template = str(key.value).partition(".")[0]
        if name.endswith(".type") and template in ("chatml", "llama3"):
            why = f"answers are written as {template} has it there, here by the tokenizer's own"
            recipe.note(name, f"{why} template: compare with tunesmith data")


def _set_template_args(recipe: Translation) -> None:
    """Axolotl's arguments of the chat template, as far as a recipe has them."""
    arguments = {}
    names = recipe.find_below("chat_template_kwargs")
    if _has_no_chat_template(recipe, *names):
        return
    for key in names:
        name = key.partition(".")[2]
        value = recipe.get(key)
        is_argument = "." not in name and name not in OF_RENDERER
        if is_argument and isinstance(value, bool | int | float | str):
            arguments[name] = value
    if arguments:
        names = [f"chat_template_kwargs.{name}" for name in arguments]
        recipe.set_key("data.template_args", arguments, *names)


def _has_no_chat_template(recipe: Translation, *names: str) -> bool:
    """Tell whether rows are written without a chat template; then note that of their keys `names`,
    which are of one.
    """
    template = recipe.overrides.get("data.template", recipe.values["data.template"])
    is_without = template in ("alpaca", "raw")
    for name in names if is_without else ():
        recipe.note(name, "these rows are written without a chat template", differs=False)
    return is_without


def _llamafactory(recipe: Translation) -> None:
    require_value(recipe, "stage", ("sft", "pt", "dpo", "kto"))
    require_value(recipe, "kind", ("lora", "full"))
    require_value(recipe, "quantization_bit", (None, 4, 8))
    # LLaMA-Factory's own default.
    recipe.defaults["lora_alpha"] = 2 * recipe.number("lora_rank")
    lora = recipe.get("kind") == "lora"
    set_adapter(recipe, target_modules(recipe, "lora_target"), "lora_target", lora=lora)
    method = set_llamafactory_method(recipe)
    if method == "pt":
        recipe.defaults["packing"] = True
    for part, key in (("train", "dataset"), ("validation", "eval_dataset")):
        if not recipe.is_set(key):
            continue
        if recipe.listed(key):
            _read_dataset_info(recipe, key)
        set_rows(recipe, part, key, method)
    template = "alpaca" if recipe.get("template") == "alpaca" else "auto"
    recipe.set_key("data.template", template, "template")
    _set_thinking(recipe)
    if recipe.is_on("packing") and not recipe.is_on("neat_packing"):
        why = "the documents of a packed row see each other there; here they do not"
        recipe.note("packing", why)


def _set_thinking(recipe: Translation) -> None:
    """LLaMA-Factory's `enable_thinking`, which its templates of reasoning models read."""
    if _has_no_chat_template(recipe, "enable_thinking") or not recipe.is_set("enable_thinking"):
        return
    if recipe.is_on("enable_thinking"):
        why = "LLaMA-Factory adds an empty thought to an answer; here the template decides"
        recipe.note("enable_thinking", why)
        return
    why = "if the model's template does not support it, the run reports an error: remove it"
    recipe.set_key("data.template_args", {"enable_thinking": False}, "enable_thinking", why=why)
    why = "LLaMA-Factory removes a thought from a row; here such a row is an error"
    recipe.note("enable_thinking", why)


def _read_dataset_info(recipe: Translation, key: str) -> None:
    """Give each data set that the key names its entry of dataset_info.json.

    It becomes `KEY.0.file_name` and so on. The file is looked for from the configuration's folder,
    those above it, and the working directory.
    """
    source = recipe.source
    file = Path(str(recipe.get("dataset_dir")), "dataset_info.json")
    path = nearby(source.base, file)
    if path is None:
        if "data.train.source" in recipe.overrides:
            recipe.note(key, "data.train.source is given in its place", differs=False)
            return
        why = f"{file}, which lists it, is not here"
        fix = f"put it in {source.base.resolve() / file.parent}, or {NAME_ROWS}"
        raise recipe.error(key, why, fix)
    try:
        entries = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        what = "this file is no JSON mapping of data sets"
        why = first_line(error)
        raise UsageError(what, where=str(path), why=why, fix=f"fix it, or {NAME_ROWS}") from None
    for number, name in enumerate(recipe.listed(key)):
        if not isinstance(entries.get(name), dict):
            what = f"it does not list the data set {name}, or not as a mapping"
            why = f"it lists {', '.join(entries) or 'none'}"
            near = nearest(name, entries)
            fix = f"did you mean {near}? or {NAME_ROWS}" if near else f"add it, or {NAME_ROWS}"
            raise UsageError(what, where=str(path), why=why, fix=fix)
        entry = dict(entries[name])
        if "file_name" in entry:
            # Paths in the list are relative to it.
            entry["file_name"] = os.path.relpath(path.parent / entry["file_name"], source.base)
        for section in ("columns", "tags"):
            for column, value in entry.pop(section, {}).items():
                entry[f"{section}.{column}"] = value
        entry["num_samples"] = entry.get("num_samples") or recipe.get("max_samples")
        for entry_key, value in entry.items():
            if value is not None:
                full_key = f"{key}.{number}.{entry_key}"
                source.keys[full_key] = SourceKey(full_key, value, path.name)


# Keys that list several data sets, of TRL and of the alignment handbook.
_TRL_MIXTURES = ("datasets", "dataset_mixture", "dataset_mixer")
# Values of dataset_text_field with which many files mean conversations.
_TRL_COLUMNS = ("text", "messages", "conversations", "completion")


def _trl(recipe: Translation) -> None:
    lora = recipe.is_on("kind")
    targets = target_modules(recipe, "lora_target_modules")
    set_adapter(recipe, targets or PEFT_TARGETS, "lora_target_modules", lora=lora)
    if lora and not recipe.get("lora_target_modules"):
        why = "PEFT chooses by the architecture; q_proj, v_proj of most"
        recipe.note("lora_target_modules", why, differs=False)
    method = set_trl_method(recipe, trl_trainer(recipe))
    format_ = _set_trl_rows(recipe, METHOD_FORMATS.get(method, "messages"))
    why = f"TRL finds the format by the columns; here it is {format_}: see data.train.format"
    why += "; a column chat_template_kwargs is not read: data.template_args gives all rows the same"
    recipe.note("dataset_name", why)
    for key in recipe.source.keys:
        if key.startswith("chat_template_kwargs"):
            recipe.note(key, "TRL has no such key; here it is data.template_args")
    # Their keys that leave the prompt untrained.
    names = [name for name, key in other_tools("keys").items() if key == "data.train_on: response"]
    masks_prompt = any(map(recipe.is_on, names))
    train_on = "all"
    has_answers = format_ == "prompt-completion" or method != "sft"
    if recipe.is_set("completion_only_loss") and method == "sft" and not masks_prompt:
        # Not null, but false: prompts of pairs are trained on too.
        has_answers = False
    if has_answers or (format_ != "text" and masks_prompt):
        train_on = "response"
    recipe.set_key("data.train_on", train_on, *names, why=f"of rows of format {format_}")
    if recipe.is_on("bf16") and recipe.get("torch_dtype") == "float32":
        why = "fp32 under autocast there; here bf16, and what is trained has an fp32 copy"
        recipe.note("torch_dtype", why)


def _set_trl_rows(recipe: Translation, usual_format: str) -> str:
    """`data.train` and `data.validation` from one data set; the format of its rows."""
    text_column = recipe.get("dataset_text_field") or "text"
    if not isinstance(text_column, str):
        why = "the name of one column is expected"
        raise recipe.error("dataset_text_field", why, "write one name there")
    format_ = usual_format
    # Many files name a column of messages there, which TRL then reads as such.
    if format_ == "messages":
        format_ = "messages" if text_column in _TRL_COLUMNS else "text"
    format_ = str(recipe.overrides.get("data.train.format", format_))
    is_replaced = "data.train.source" in recipe.overrides
    for key in list(recipe.source.keys):
        if key.partition(".")[0] not in _TRL_MIXTURES:
            continue
        if not is_replaced:
            fix = f"data.train lists the sources of a recipe; for one {NAME_ROWS}"
            raise recipe.error(key, "a mixture of data sets is not read", fix)
        recipe.note(key, "data.train.source is given in its place", differs=False)
    if is_replaced or not recipe.get("dataset_name"):
        return format_
    splits = {"train": "dataset_train_split"}
    # Without quotes the word `no` of eval_strategy is false.
    if str(recipe.get("eval_strategy")).lower() not in ("no", "none", "false"):
        splits["validation"] = "dataset_test_split"
    for part, split_name in splits.items():
        names = {"source": "dataset_name", "name": "dataset_config", "split": split_name}
        source: dict[str, JsonValue] = {
            key: recipe.get(name) for key, name in names.items() if recipe.get(name)
        }
        source["format"] = format_
        if format_ == "text" and text_column != "text":
            source["columns"] = {"text": text_column}
        recipe.set_key(f"data.{part}", source, *names.values())
    return format_


def _accelerate(recipe: Translation) -> None:
    if "extends" not in recipe.values:
        command = f"tunesmith import {shell_path(recipe.source.name)} --extends my-recipe.yaml"
        raise UsageError(
            "an accelerate config contains no model and no data",
            where=recipe.source.name,
            fix=f"set the recipe to start from: {command}",
        )
    if recipe.get("max_grad_norm") != "auto":
        recipe.carry("max_grad_norm")
    apply_rules(recipe)
    _set_mesh(recipe)
    steps = recipe.get("gradient_accumulation_steps")
    if steps in (None, "auto") or "train.global_batch" in recipe.overrides:
        return
    steps = recipe.count("gradient_accumulation_steps")
    if steps > 1:
        recipe.note(
            "gradient_accumulation_steps",
            f"a step learns from {steps} forward passes of each process there; give all their"
            " rows: train.global_batch='64 examples'",
        )


def _set_mesh(recipe: Translation) -> None:
    """Copies and shards of the model, from FSDP's or DeepSpeed's keys."""
    kind = recipe.get("kind")
    if kind == "DEEPSPEED" and recipe.get("deepspeed_file") and not recipe.is_set("zero_stage"):
        return  # the file that is not read has the stage
    ranks = recipe.count("num_processes")
    strategy = str(recipe.get("fsdp_strategy"))
    is_sharded = kind == "FSDP" or (kind == "DEEPSPEED" and recipe.get("zero_stage"))
    copies = 1
    if strategy.startswith("HYBRID"):
        # One copy on each node.
        copies = recipe.count("num_machines")
    if strategy == "NO_SHARD" or not is_sharded:
        copies = ranks
    if ranks > 1:
        names = ("num_processes", "num_machines", "kind", "fsdp_strategy", "zero_stage")
        recipe.set_key("parallel.replicate", copies, *names)
        recipe.set_key("parallel.shard", ranks // copies, *names)


_TRANSLATORS: dict[str, Callable[[Translation], None]] = {
    "torchtune": _torchtune,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "trl": _trl,
    "accelerate": _accelerate,
}
