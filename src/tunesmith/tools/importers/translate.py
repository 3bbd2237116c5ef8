"""The translation of any tool's configuration by its table: sections and rules, rows, batch,
schedule and intervals.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tunesmith.config.check import METHOD_FORMATS
from tunesmith.config.names import nearest, without_indices
from tunesmith.errors import UsageError
from tunesmith.tools.importers.source_config import SourceConfig, ToolTable, source_keys
from tunesmith.tools.importers.translation import Translation, length
from tunesmith.units import count_of

_NAME_ROWS = "set the rows: data.train.source=rows.jsonl data.train.format=messages"
# Transformers' defaults.
_BETAS = (0.9, 0.999)


def translate(source: SourceConfig, overrides: Mapping[str, str], world: int | None) -> Translation:
    """Translate a configuration to a recipe in which each of its keys is set or noted.

    Args:
        overrides: recipe keys that the command line gives.
        world: the number of processes that train.

    Raises:
        UsageError: a value that the recipe needs is missing or has no counterpart.
    """
    recipe = Translation(source, overrides)
    for section in recipe.table["when"]:
        _apply(recipe, section)
    if "method.name" in recipe.values:
        # The command line wins.
        recipe.values["method.name"] = recipe.method
    if source.tool == "llamafactory":
        recipe.defaults["lora_alpha"] = 2 * recipe.number("adapter.rank")
    recipe.carry()
    _apply(recipe, recipe.table)
    if recipe.values.get("adapter.kind") == "lora" and "adapter.target" in recipe.names:
        _set_target(recipe)
    _set_model_of_folder(recipe)
    if source.tool == "trl":
        _set_trl_losses(recipe)
        _set_trl_rows(recipe)
    else:
        _set_rows(recipe, "train")
        _set_rows(recipe, "validation")
        _set_train_on(recipe)
        if "{" in str(recipe.get("data.template")) and "data.template" not in recipe.overrides:
            fix = "write it to template.jinja, and give data.template=template.jinja"
            raise recipe.error("data.template", "a template is a file here", fix)
    _set_lengths(recipe)
    _set_schedule(recipe)
    _set_intervals(recipe)
    _set_batch(recipe, world)
    if "output_dir" not in recipe.values:
        recipe.set_key("output_dir", f"runs/{Path(source.name).stem}", why="The file names none.")
    recipe.close()
    return recipe


def _apply(recipe: Translation, section: ToolTable) -> None:
    """Apply the rules of a section if its conditions hold; tables/trl.yaml describes the parts.
    Raise UsageError for a refused key or value.
    """
    is_met = all(recipe.has(*condition) for condition in section.get("if", {}).items())
    if not is_met or any(recipe.has(*condition) for condition in section.get("unless", {}).items()):
        return
    recipe.defaults |= section.get("implied", {})
    for name, why in section.get("refused", {}).items():
        if recipe.is_set(name):
            fix = "tunesmith train --model MODEL --data ROWS.jsonl writes a recipe"
            raise recipe.error(name, why, fix)
    for name, allowed in section.get("only", {}).items():
        value = recipe.get(name)
        if not all(item in allowed for item in (value if isinstance(value, list) else [value])):
            fix = f"known are {', '.join(map(str, allowed))}"
            raise recipe.error(name, "it has no counterpart here", fix)
    for name, expected, *effect in section.get("rules", []):
        matching = [key for key in recipe.source.keys if fnmatchcase(without_indices(key), name)]
        for key in matching or [name]:
            if not recipe.has(key, expected):
                continue
            if len(effect) == 1:
                recipe.note(key, *effect)
                continue
            ours, value, *why = effect
            earlier = recipe.values.get(ours)
            if value == "=":
                value = recipe.get(key)
            elif isinstance(value, list) and isinstance(earlier, list):
                value = [*dict.fromkeys([*earlier, *value])]
            recipe.set_key(ours, value, key, why="".join(why))


def _set_target(recipe: Translation) -> None:
    """Set the adapted layers, unless a rule has set them. UsageError for a regular expression."""
    name = "adapter.target"
    target = recipe.values.get(name, recipe.listed(name) or ["q_proj", "v_proj"])
    is_list = all(re.fullmatch(r"[\w.-]+", layer) for layer in recipe.listed(name))
    if not is_list and name not in {*recipe.values, *recipe.overrides}:
        why = "it is a regular expression"
        raise recipe.error(name, why, "list the layers: adapter.target='[q_proj, v_proj]'")
    if target in (["all"], ["all-linear"]):
        target = "all-linear"
    recipe.set_key(name, target, name)


def _set_model_of_folder(recipe: Translation) -> None:
    """Replace a checkpoint folder that is not here by the Hub id that its name means."""
    folder = Path(str(recipe.get("model.name")))
    for beginning, owner in recipe.table.get("owners", {}).items():
        is_here = (recipe.source.base / folder).is_dir()
        if folder.name.lower().startswith(beginning) and not is_here:
            why = "The folder is not here, so the model comes from the Hub."
            recipe.set_key("model.name", f"{owner}/{folder.name}", "model.name", why=why)
            return


def _set_trl_losses(recipe: Translation) -> None:
    """Set the weight of `sft`, which can follow a loss of DPO in TRL's list."""
    losses = recipe.listed("loss_type")
    if recipe.method != "dpo" or len(losses) < 2:
        return
    weights = recipe.get("loss_weights") or [1.0, 1.0]
    fix = "give one loss, optionally with sft after it and loss_weights [1.0, WEIGHT]"
    if losses[1:] != ["sft"]:
        raise recipe.error("loss_type", "it has no counterpart here", fix)
    if not isinstance(weights, list) or weights[:-1] != [1]:
        raise recipe.error("loss_weights", "it has no counterpart here", fix)
    recipe.set_key("method.sft_weight", weights[-1], "loss_type", "loss_weights")


def _set_trl_rows(recipe: Translation) -> None:
    """Set the rows of TRL's one data set, and which of their tokens are trained."""
    column = recipe.get("dataset_text_field") or "text"
    # Many files name a column of messages there, which TRL then reads as messages.
    is_chat = column in ("text", "messages", "conversations", "completion")
    usual_format = METHOD_FORMATS.get(recipe.method) or ("messages" if is_chat else "text")
    row_format = str(recipe.overrides.get("data.train.format", usual_format))
    if "data.train.source" not in recipe.overrides:
        for key in recipe.source.keys:
            if key.partition(".")[0] in ("datasets", "dataset_mixture", "dataset_mixer"):
                fix = f"data.train lists the sources of a recipe; for one {_NAME_ROWS}"
                raise recipe.error(key, "a mixture of data sets is not read", fix)
        # Without quotes the word `no` of eval_strategy is false.
        is_validated = str(recipe.get("eval_strategy")).lower() not in ("no", "none", "false")
        for part in ("train", "test") if is_validated else ("train",):
            names = {
                "source": "dataset_name",
                "name": "dataset_config",
                "split": f"dataset_{part}_split",
            }
            source = {key: recipe.get(name) for key, name in names.items() if recipe.get(name)}
            source["format"] = row_format
            if row_format == "text" and column != "text":
                source["columns"] = {"text": column}
            if "source" in source:
                key = "data.train" if part == "train" else "data.validation"
                recipe.set_key(key, source, *names.values())
    # `false` is not null: the prompts of pairs are trained too.
    is_masked = row_format == "prompt-completion" and not recipe.is_set("answers_only")
    is_masked |= any(map(recipe.is_on, recipe.names["answers_only"])) and row_format != "text"
    train_on = "response" if is_masked or recipe.method != "sft" else "all"
    why = f"The rows have the format {row_format}."
    recipe.set_key("data.train_on", train_on, *recipe.names["answers_only"], why=why)


def _set_rows(recipe: Translation, part: str) -> None:
    """Set `data.train` or `data.validation` from the data sets of the table's part `rows`."""
    rows = recipe.table["rows"]
    sources: list[dict[str, Any]] = []
    names: list[str] = []
    for prefix, usual_type in rows[part].items():
        if f"data.{part}.source" in recipe.overrides:
            for name in recipe.source.keys:
                if name == prefix or name.startswith(f"{prefix}."):
                    recipe.note(name, "The command line names the rows.", differs=False)
            continue
        named = recipe.listed(prefix)
        if "listed_in" in rows and named:
            _read_dataset_info(recipe, prefix)
        elif named:
            # Names of data sets without keys of their own.
            path = f"{prefix}.{rows['sources'][-1]}"
            recipe.source.keys[path] = replace(recipe.source.keys.pop(prefix), key=path)
        # An entry is the prefix itself, or an entry of a list. Sorted by length first: 10 comes
        # after 9.
        pattern = re.compile(rf"{re.escape(prefix)}(\.[0-9]+)?(?=\.)")
        entries = {match[0] for match in map(pattern.match, recipe.source.keys) if match}
        for entry in sorted(entries, key=lambda entry: (len(entry), entry)):
            names.append(prefix)
            sources += _read_entry(recipe, entry, usual_type, names)
    if sources:
        recipe.set_key(f"data.{part}", sources[0] if len(sources) == 1 else [*sources], *names)
    if part == "train" and any(source["format"] == "text" for source in sources):
        recipe.values.pop("data.too_long", None)
        recipe.note("data.too_long", "The source splits documents; see data.too_long.")


def _read_entry(
    recipe: Translation, entry: str, usual_type: str | None, names: list[str]
) -> list[dict[str, Any]]:
    """Return the sources of the recipe for one data set. Add the keys that are read to `names`."""
    rows = recipe.table["rows"]

    def get(key: str) -> Any:
        names.append(f"{entry}.{key}")
        return recipe.get(names[-1])

    def renamed(ours_of_theirs: dict[str, str]) -> dict[str, Any]:
        return {ours: get(theirs) for theirs, ours in ours_of_theirs.items() if get(theirs)}

    kind = "text" if recipe.has("stage", "pt") else METHOD_FORMATS.get(recipe.method, "sft")
    type_key = f"{entry}.{rows['type']}"
    own_prompt = [key for key in recipe.source.keys if key.startswith(f"{type_key}.")]
    if own_prompt:
        why = "a prompt text of its own is not supported"
        raise recipe.error(own_prompt[0], why, rows["own_prompt"])
    named_type = str(get(rows["type"]) or usual_type or "")
    # A type of preferences has a template or module before its name, or a variant after it.
    pattern = r"(.*\.)?{}" if kind == "sft" else r"(.*\.)?{}\b.*"
    types = rows["types"][kind]
    matching = [name for name in types if re.fullmatch(pattern.format(name), named_type)]
    if not matching:
        raise recipe.error(type_key, f"known are {', '.join(types)}", _NAME_ROWS)
    recipe.defaults |= {f"{entry}.{key}": value for key, value in types[matching[0]].items()}
    named = [*filter(None, map(get, rows["sources"]))]
    if not named:
        raise recipe.error(f"{entry}.{rows['sources'][-1]}", "it names the rows", _NAME_ROWS)
    row_format = get("format")
    for key, role, format_of_role in rows["formats"]:
        if kind == "sft" and recipe.get(f"{entry}.{key}") == role:
            get(key)
            row_format = format_of_role
    columns = renamed(rows["columns"].get(row_format, {}))
    # A column with our name needs no mapping.
    mapped = {ours: name for ours, name in columns.items() if ours and name != ours}
    source = (
        renamed(rows["keys"]) | {"format": row_format} | ({"columns": mapped} if mapped else {})
    )
    template = get("template")
    if template and not recipe.is_set("data.template"):
        # Data sets with several templates have none in common.
        is_common = recipe.values.get("data.template", template) == template
        recipe.set_key("data.template", template if is_common else "auto", type_key)
    if columns.get("images"):
        recipe.set_key("model.vision", True, f"{entry}.{rows['type']}")
        recipe.set_key("data.image_max_pixels", recipe.get("image_max_pixels"), "image_max_pixels")
    files = named[0] if isinstance(named[0], list) else named[:1]
    return [{"source": file, **source} for file in files]


def _read_dataset_info(recipe: Translation, prefix: str) -> None:
    """Add the entries of LLaMA-Factory's dataset_info.json to the keys: `PREFIX.0.file_name` ...

    The file is looked for in the configuration's folder, the three folders above it, and the
    working directory.
    """
    keys = recipe.source.keys
    base = recipe.source.base.resolve()
    file = Path(str(recipe.get("dataset_dir")), recipe.table["rows"]["listed_in"])
    paths = [folder / file for folder in (base, *base.parents[:3], Path.cwd())]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        fix = f"put it in {paths[0].parent}, or {_NAME_ROWS}"
        raise recipe.error(prefix, f"{file}, which lists it, is not here", fix)
    listed = {key.key: key for key in source_keys(path)}
    for number, name in enumerate(recipe.listed(prefix)):
        known = {key.partition(".")[0] for key in listed if "." in key}
        if name not in known:
            fix = f"did you mean {nearest(name, known) or name}? or {_NAME_ROWS}"
            raise recipe.error(prefix, f"{path} does not list {name} as a mapping", fix)
        entry = f"{prefix}.{number}"
        recipe.defaults[f"{entry}.num_samples"] = recipe.get("max_samples")
        for key, leaf in listed.items():
            section, _, rest = key.partition(".")
            if section == name:
                # Paths in the list are relative to it.
                is_path = rest == "file_name"
                value = (
                    os.path.relpath(path.parent / str(leaf.value), base) if is_path else leaf.value
                )
                keys[f"{entry}.{rest}"] = replace(leaf, key=f"{entry}.{rest}", value=value)


def _set_train_on(recipe: Translation) -> None:
    names = ("train_on_prompts", "train_on_last")
    train_on = "response"
    if recipe.method != "sft":
        for name in names:
            recipe.note(name, "Preference training compares the answers only.", differs=False)
    elif recipe.is_on("train_on_prompts"):
        train_on = "all"
    elif recipe.is_on("train_on_last"):
        train_on = "last"
    recipe.set_key("data.train_on", train_on, *names)


def _set_lengths(recipe: Translation) -> None:
    """Set packing, clipping, the fraction of held-out rows and the duration."""
    packs = any(map(recipe.is_on, ("packing", "neat_packing")))
    if packs and recipe.get("data.seq_len") is None:
        raise recipe.error("data.seq_len", "packed rows need a length", "set the length there")
    why = ""
    if not packs and not recipe.is_set("packing"):
        why = "The source pads rows. Packed rows give the same result in less time."
    recipe.set_key("data.pack", bool(packs or why), "packing", "neat_packing", why=why)
    # 0 disables clipping.
    recipe.set_key("train.clip_norm", recipe.number("train.clip_norm") or None, "train.clip_norm")
    held_out = recipe.number("hold_out")
    if held_out and "data.validation" not in recipe.values:
        size = f"{held_out * 100:g} %" if held_out < 1 else f"{held_out:g} examples"
        recipe.set_key("data.hold_out", size, "hold_out")
    epochs = recipe.number("epochs")
    # A length in steps wins over epochs.
    steps = max(recipe.number("steps"), recipe.number("steps_per_epoch") * epochs)
    duration = f"{steps:g} steps" if steps > 0 else f"{epochs:g} epochs"
    recipe.set_key("train.duration", duration, "epochs", "steps", "steps_per_epoch")


def _set_schedule(recipe: Translation) -> None:
    """Set the betas, the minimum of the learning rate and the warmup."""
    names = ("beta1", "beta2")
    if any(map(recipe.is_set, names)):
        given = zip(names, _BETAS, strict=True)
        betas = [recipe.number(name) if recipe.is_set(name) else usual for name, usual in given]
        recipe.set_key("train.betas", [*betas], *names)
    names = ("min_rate_share", "train.learning_rate")
    if recipe.is_set(names[0]):
        # Rounded: 0.1 * 3e-5 is 3.0000000000000004e-06.
        rate = float(f"{math.prod(map(recipe.number, names)):.12g}")
        recipe.set_key("train.min_learning_rate", rate, *names)
    warmup = length(recipe.number("warmup_steps") or recipe.number("warmup_share"))
    if recipe.get("train.schedule") == "constant":
        # In Transformers only constant_with_warmup has a warmup.
        warmup = "0 steps"
    recipe.set_key("train.warmup", warmup, "warmup_steps", "warmup_share")


def _set_intervals(recipe: Translation) -> None:
    """Set when the run saves and validates: by count in an epoch, by steps, each epoch or never."""
    is_validated = {"data.validation", "data.hold_out"} & {*recipe.values}
    parts = {"save": "checkpoint.every"} | ({"eval": "validate.every"} if is_validated else {})
    for what, key in parts.items():
        names = (f"{what}s_per_epoch", f"{what}_strategy", f"{what}_steps")
        every = None
        steps = recipe.number(names[2])
        if what == "eval":
            # As in Transformers.
            steps = steps or recipe.number("log.every") or 500
        if recipe.number(names[0]):
            every = f"{1 / recipe.number(names[0]):g} epochs"
        elif recipe.get(names[1]) == "epoch":
            every = "1 epochs"
        elif recipe.get(names[1]) == "steps" and steps:
            every = length(steps)
        recipe.set_key(key, every, *names)


def _set_batch(recipe: Translation, world: int | None) -> None:
    """Set the global batch: the rows of a process times accumulation times the number of processes
    that have rows of their own.
    """
    if "train.global_batch" in recipe.overrides:
        return
    names = ("rows", "accumulation")
    rows = math.prod(map(recipe.count, names))
    # The ranks of a tensor-parallel group have the same rows.
    tensor, copies = [max(1, recipe.number(f"parallel.{name}")) for name in ("tensor", "replicate")]
    processes = world or recipe.number("processes")
    if recipe.number("parallel.shard") > 0:
        processes = recipe.number("parallel.shard") * copies * tensor
    if processes < 1 or processes % tensor:
        why = f"a process takes {count_of(rows, 'row')} a step"
        fix = "--world N, the number of processes (GPUs) on all nodes that it ran on"
        if tensor > 1:
            fix += f", which {tensor:g} divides"
        what = "the global batch is unknown"
        raise UsageError(what, where=recipe.source.name, why=why, fix=fix)
    batch = int(rows * processes // tensor)
    why = f"{processes:g} processes"
    size = f"{batch} examples"
    if any(map(recipe.is_on, ("packing", "neat_packing"))):
        why += f", {count_of(batch, 'packed row')} of data.seq_len"
        size = f"{batch * recipe.number('data.seq_len')} tokens"
    recipe.set_key("train.global_batch", size, *names, "processes", why=why)
