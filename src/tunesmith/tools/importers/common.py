"""Keys that the tools have in common, under Transformers' names: rows, batch, schedule, precision,
adapter, intervals.
"""

import math
import re
from collections.abc import Collection
from contextlib import suppress
from itertools import product

from pydantic import JsonValue

from tunesmith.config.check import METHOD_FORMATS
from tunesmith.config.row_formats import ROW_FORMATS
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_word
from tunesmith.tools.importers.source_config import table
from tunesmith.tools.importers.translation import FALSE_WORDS, TRUE_WORDS, Translation
from tunesmith.units import count_of

# What PEFT takes of a Llama, Qwen, Mistral or Gemma where nothing is named.
PEFT_TARGETS = ["q_proj", "v_proj"]
# Usual names of layers, and their prefixes in text models and vision-language models. A regular
# expression is matched with each name in some blocks.
_LAYERS = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
    " mlp.gate_proj mlp.up_proj mlp.down_proj"
).split()
_PREFIXES = ("model", "model.language_model", "language_model.model", "model.text_model")
_BLOCKS = (0, 1, 2, 9, 10, 31)
NAME_ROWS = "set the rows: data.train.source=rows.jsonl data.train.format=messages"
_LORA_KEYS = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "lora_modules_to_save",
    "adapter_name_or_path",
)
# Of Transformers.
_BETAS = [0.9, 0.999]
_SAVE_STEPS = 500
_NO_VALIDATION = (
    "nothing there sets an interval: validate.every='1 epochs' measures the held-out rows"
)


def translate_training(recipe: Translation, world: int | None) -> None:
    """The keys that the tools share, after a tool's own.

    `world` is the number of processes that train.
    """
    recipe.carry(*recipe.table["carried"])
    # 0 means that nothing is clipped.
    recipe.set_key("train.clip_norm", recipe.number("max_grad_norm") or None, "max_grad_norm")
    if "data.train_on" not in recipe.values:
        train_on = "response"
        if "method.name" in recipe.values:
            why = "no other part of an answer's row is compared"
            recipe.note("train_on_inputs", why, differs=False)
            recipe.note("mask_history", why, differs=False)
        elif recipe.is_on("train_on_inputs"):
            train_on = "all"
        elif recipe.is_on("mask_history"):
            train_on = "last"
        recipe.set_key("data.train_on", train_on, "train_on_inputs", "mask_history")
    # Betas are one key here, and two there.
    beta_names = ("adam_beta1", "adam_beta2")
    if any(map(recipe.is_set, beta_names)):
        betas = list(_BETAS)
        for i, name in enumerate(beta_names):
            if recipe.is_set(name):
                betas[i] = recipe.number(name)
        recipe.set_key("train.betas", betas, *beta_names)
    apply_rules(recipe)
    _lengths(recipe)
    _schedule(recipe)
    _intervals(recipe)
    _batch(recipe, world)


def apply_rules(recipe: Translation) -> None:
    """Apply the tables' rules for a key's values; tables/common.yaml has the form of a rule."""
    rules = [*table("common")["rules"], *recipe.table.get("rules", [])]
    for name, part, key, value, why in rules:
        source_value = recipe.get(name)
        if source_value is None or not _has_part(source_value, str(part)):
            continue
        if not key:
            recipe.note(name, why)
            continue
        if isinstance(value, list):
            # Several rules may add to a list.
            earlier = recipe.values.get(key)
            values = [*earlier, *value] if isinstance(earlier, list) else value
            recipe.set_key(key, list(dict.fromkeys(values)), name, why=why)
        else:
            recipe.set_key(key, value, name, why=why)


def _has_part(value: JsonValue, part: str) -> bool:
    """Tell whether a value holds the text of a rule; true and false have several words."""
    text = str(value).lower()
    if part in ("true", "false") and text in (*TRUE_WORDS, *FALSE_WORDS):
        return text in (TRUE_WORDS if part == "true" else FALSE_WORDS)
    return part.lower() in text


def note_deepspeed_file(recipe: Translation) -> None:
    """Note what DeepSpeed's own JSON file may hold, where a configuration names one."""
    file = recipe.get("deepspeed_file")
    if not isinstance(file, str) or not file:
        return
    why = (
        "DeepSpeed's file is not read: if it offloads to the CPU, give"
        " train.cpu_offload=[parameters]; if it accumulates or clips gradients, train.global_batch"
        " and train.clip_norm; if it has an optimizer or a scheduler, train.*"
    )
    if recipe.source.tool == "accelerate":
        why += "; if its ZeRO stage is 0, parallel.replicate=RANKS, else parallel.shard=RANKS"
    recipe.note("deepspeed_file", why)


def set_adapter(recipe: Translation, target: str | list[str], *names: str, lora: bool) -> None:
    """Set what is trained; `target` follows from their keys `names`."""
    recipe.set_key("adapter.kind", "lora" if lora else "none", "kind")
    if lora:
        recipe.carry(*_LORA_KEYS)
        if target in (["all"], ["all-linear"]):
            target = "all-linear"
        recipe.set_key("adapter.target", target, *names)
        return
    for name, key in recipe.source.keys.items():
        if re.match(r"(model\.)?(lora|apply_lora|peft)_", name):
            recipe.note_key(key, "no adapter is trained", differs=False)


def target_modules(recipe: Translation, name: str) -> list[str]:
    """Return the names of the adapted layers. A regular expression becomes the names of the layers
    that it matches in each block; UsageError if it chooses blocks, or matches no usual name.
    """
    pattern = str(recipe.get(name))
    is_list = isinstance(recipe.get(name), list) or re.fullmatch(r"[\w.,\s-]*", pattern)
    if is_list or "adapter.target" in recipe.overrides:
        return recipe.listed(name)
    matched: list[list[str]] = []
    with suppress(re.error):
        for block, prefix in product(_BLOCKS, _PREFIXES):
            names = [f"{prefix}.layers.{block}.{layer}" for layer in _LAYERS]
            matched.append([n.rpartition(".")[2] for n in names if re.fullmatch(pattern, n)])
    # One list for each prefix, the same in all blocks.
    if not any(matched) or matched != matched[: len(_PREFIXES)] * len(_BLOCKS):
        why = "a regular expression that does not name the same usual layers in every block"
        raise recipe.error(name, why, "list the layers: adapter.target='[q_proj, v_proj]'")
    return max(matched, key=len)


def set_rows(recipe: Translation, part: str, prefix: str, method: str = "sft") -> None:
    """`data.train` or `data.validation` from their data set, or the list of them.

    Args:
        part: `train` or `validation`.
        prefix: their key of it; the entries of a list are `PREFIX.0` and so on.
        method: the training method. Unless it is sft, it decides the format of the rows; `pt`: rows
            of plain text.
    """
    entries = entries_below(recipe, prefix)
    if not entries and recipe.is_set(prefix):
        _check_bare_paths(recipe, part, prefix)
    is_replaced = part == "train" and "data.train.source" in recipe.overrides
    sources: list[dict[str, JsonValue]] = []
    names = [prefix]
    for entry in entries:
        if is_replaced:
            note_replaced(recipe, entry)
            continue
        entry_sources, entry_names = _read_entry(recipe, entry, method)
        sources += entry_sources
        names += entry_names
        pictures = recipe.table["rows"].get("pictures", {})
        if pictures and recipe.get(f"{entry}.{pictures['column']}"):
            recipe.set_key("model.vision", True, f"{entry}.{pictures['column']}")
            most = pictures["most_pixels"]
            recipe.set_key("data.image_max_pixels", recipe.get(most), most)
    if sources:
        value = sources[0] if len(sources) == 1 else sources
        recipe.set_key(f"data.{part}", value, *names, *recipe.table["rows"]["mentioned"])


def entries_below(recipe: Translation, prefix: str) -> list[str]:
    """The keys of the data sets: the prefix itself, or those of the list's entries, in order."""
    pattern = re.compile(rf"{re.escape(prefix)}(\.[0-9]+)?(?=\.)")
    entries = set()
    for key in recipe.source.keys:
        match = pattern.match(key)
        if match:
            entries.add(match[0])
    # By length first: 10 comes after 9.
    return sorted(entries, key=lambda entry: (len(entry), entry))


def note_replaced(recipe: Translation, entry: str) -> None:
    for key in recipe.source.keys:
        if key.startswith(f"{entry}."):
            recipe.note(key, "data.train.source is given in its place", differs=False)


def _read_entry(
    recipe: Translation, entry: str, method: str
) -> tuple[list[dict[str, JsonValue]], list[str]]:
    """The sources of our recipe that one data set makes, and the keys of theirs that tell them.

    What their keys are called is in the part `rows` of the tool's table.
    """
    rows_table = recipe.table["rows"]

    def get(key: str) -> JsonValue:
        return recipe.get(f"{entry}.{key}")

    types_of_formats = {
        "preference": rows_table.get("types_of_preference", {}),
        "feedback": rows_table.get("types_of_feedback", {}),
        "pt": rows_table.get("types_of_text", {}),
    }
    types = types_of_formats.get(METHOD_FORMATS.get(method, method), rows_table["types"])
    type_ = _entry_type(recipe, entry, types, method)
    # Values that the type of the data set implies, for keys that are not set.
    for key, value in types[type_].items():
        recipe.defaults[f"{entry}.{key}"] = value
    format_ = get("format")
    # The name of a role may tell the format: `from` is of ShareGPT.
    for key in rows_table["role_keys"]:
        role = str(get(key))
        if method == "sft" and role in rows_table["roles"]:
            format_ = rows_table["roles"][role]
            break
    source: dict[str, JsonValue] = {
        key: get(their_key) for key, their_key in rows_table["keys"].items()
    }
    for key in rows_table.get("other_splits", []):
        source["split"] = get(key) or source["split"]
    source["format"] = format_
    their_columns = rows_table["columns"].get(str(format_), {})
    known_names = (*rows_table["roles"], *rows_table.get("usual_names", []))
    # A name that is not known here is listed with what differs.
    role_keys = [key for key in rows_table["role_keys"] if get(key) in known_names]
    columns = {column: get(key) for key, column in their_columns.items() if get(key)}
    # A column with our name needs no mapping.
    source["columns"] = {column: name for column, name in columns.items() if name != column}
    source = {key: value for key, value in source.items() if value}
    names = [
        *rows_table["sources"],
        rows_table["type"],
        *role_keys,
        *rows_table["keys"].values(),
        *rows_table.get("other_splits", []),
        *their_columns,
    ]
    if method != "sft":
        names += rows_table.get("flags", [])
    sources = [{"source": name, **source} for name in _source_names(recipe, entry)]
    return sources, [f"{entry}.{name}" for name in names]


def _entry_type(recipe: Translation, entry: str, types: Collection[str], method: str) -> str:
    """The type of a data set, of those in the tool's table; UsageError for another one."""
    rows_table = recipe.table["rows"]
    type_key = f"{entry}.{rows_table['type']}"
    inner = recipe.find_below(type_key)
    if inner:
        why = "a prompt text of its own is not supported"
        format_ = METHOD_FORMATS.get(method, "alpaca")
        source = shell_word(f"data.train.source={_source_names(recipe, entry)[0]}")
        words = f"{source} data.train.format={format_}"
        renamed = []
        for ours in ROW_FORMATS[format_].columns:
            column = recipe.get(f"{type_key}.field_{ours}")
            if column and column != ours:
                renamed.append(f"{ours}: {column}")
        if renamed:
            columns = ", ".join(renamed)
            words += f" {shell_word(f'data.train.columns={{{columns}}}')}"
        fix = f"name the columns: {words}; the text around them is data.template: a Jinja file"
        raise recipe.error(inner[0], why, fix)
    named_type = str(recipe.get(type_key) or rows_table["silent"])
    # What learns from preferences has types with a module or a template in front, or a name behind.
    pattern = r"(.*\.)?{}" if method == "sft" else r"(.*\.)?{}\b.*"
    for type_ in types:
        if re.fullmatch(pattern.format(type_), named_type):
            return type_
    raise recipe.error(type_key, f"known are {', '.join(types)}", NAME_ROWS)


def _source_names(recipe: Translation, entry: str) -> list[JsonValue]:
    """The files or Hub ids of a data set; UsageError where it names none."""
    source_keys = recipe.table["rows"]["sources"]
    for key in source_keys:
        names = recipe.get(f"{entry}.{key}")
        if names:
            return names if isinstance(names, list) else [names]
    raise recipe.error(f"{entry}.{source_keys[-1]}", "it names the rows", NAME_ROWS)


def _check_bare_paths(recipe: Translation, part: str, prefix: str) -> None:
    """UsageError for a path in place of a data set, unless the command line names the rows."""
    source = f"data.{part}.source"
    if source in recipe.overrides:
        recipe.note(prefix, f"{source} is given in its place", differs=False)
        return
    paths = recipe.listed(prefix)
    if not paths:
        # [], false or an empty text.
        recipe.note(prefix, "it names no data set", differs=False)
        return
    words = f"{shell_word(f'{source}={paths[0]}')} data.{part}.format=messages"
    fix = f"set the format: {words} (or alpaca, ...)"
    raise recipe.error(prefix, "a path does not define the row format", fix)


def _packs(recipe: Translation) -> bool:
    return recipe.is_on("packing") or recipe.is_on("neat_packing")


def _lengths(recipe: Translation) -> None:
    """Set the lengths of a row and of the run, and which rows are held out."""
    packs = _packs(recipe)
    if recipe.get("max_length") is None:
        if packs:
            why = "packed rows need a length"
            raise recipe.error("max_length", why, "set the length there")
        why = "no row is cut there; here those above data.seq_len, 2048, are, and counted"
        recipe.note("max_length", why)
    recipe.carry("max_length")
    why = ""
    if not packs and not recipe.is_set("packing"):
        why = "rows are padded there; packed ones learn the same in less time"
    recipe.set_key("data.pack", bool(packs or why), "packing", "neat_packing", why=why)
    hold_out = recipe.number("val_size")
    if hold_out and "data.validation" not in recipe.values:
        share = f"{hold_out * 100:g} %" if hold_out < 1 else f"{hold_out:g} examples"
        recipe.set_key("data.hold_out", share, "val_size")
    epochs = recipe.number("num_train_epochs")
    steps_per_epoch = recipe.number("max_steps_per_epoch")
    # A length in steps wins over epochs.
    steps = max(recipe.number("max_steps"), steps_per_epoch * epochs)
    duration = f"{steps:g} steps" if steps > 0 else f"{epochs:g} epochs"
    names = ("num_train_epochs", "max_steps", "max_steps_per_epoch")
    recipe.set_key("train.duration", duration, *names)


def _schedule(recipe: Translation) -> None:
    recipe.carry("lr_scheduler_type")
    learning_rate = recipe.number("learning_rate")
    if recipe.is_set("lr_scheduler_kwargs.min_lr"):
        least = recipe.number("lr_scheduler_kwargs.min_lr")
        recipe.set_key("train.min_learning_rate", least, "lr_scheduler_kwargs.min_lr")
    for name in ("cosine_min_lr_ratio", "lr_scheduler_kwargs.min_lr_rate"):
        if recipe.is_set(name):
            # Rounded: 0.1 * 3e-5 is 3.0000000000000004e-06.
            least = float(f"{recipe.number(name) * learning_rate:.12g}")
            recipe.set_key("train.min_learning_rate", least, name, "learning_rate")
    steps = recipe.number("warmup_steps")
    share = recipe.number("warmup_ratio")
    if recipe.get("lr_scheduler_type") == "constant":
        # Transformers' constant_with_warmup is the one that has any.
        warmup = "0 steps"
    elif steps >= 1:
        warmup = f"{steps:g} steps"
    else:
        warmup = f"{round(100 * (steps or share), 6):g} %"
    recipe.set_key("train.warmup", warmup, "warmup_steps", "warmup_ratio")


def _batch(recipe: Translation, world: int | None) -> None:
    """The batch of a step.

    It has the rows of a process x accumulation x the processes that have rows of their own.
    """
    for name in ("tensor", "shard", "replicate"):
        if recipe.is_set(name) and recipe.number(name) > 0:
            recipe.set_key(f"parallel.{name}", recipe.get(name), name)
    if "train.global_batch" in recipe.overrides:
        return
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    rows = math.prod(recipe.count(name) for name in names)
    tensor = recipe.count("tensor")
    processes = _processes(recipe, world, tensor)
    if processes < 1 or processes % tensor:
        why = f"a process takes {count_of(rows, 'row')} a step"
        fix = "--world N, the number of processes (GPUs) on all nodes that it ran on"
        if tensor > 1:
            why += f", {tensor} processes the same ones"
            fix += f", which {tensor} divides"
        why = "; ".join([why, *recipe.misspelt()])
        what = "the global batch is unknown"
        raise UsageError(what, where=recipe.source.name, why=why, fix=fix)
    # Ranks of a tensor group see the same rows.
    batch = int(rows * processes // tensor)
    why = f"{processes} processes"
    size = f"{batch} examples"
    if _packs(recipe):
        why += f", {count_of(batch, 'packed row')} of data.seq_len"
        size = f"{batch * recipe.number('max_length')} tokens"
    recipe.set_key("train.global_batch", size, *names, "num_processes", why=why)


def _processes(recipe: Translation, world: int | None, tensor: int) -> int | float:
    """Count the processes that train in all; 0 where nothing tells."""
    processes = world or recipe.number("num_processes")
    if recipe.is_set("shard") and recipe.number("shard") > 0:
        processes = recipe.number("shard") * recipe.count("replicate") * tensor
    return processes


def _intervals(recipe: Translation) -> None:
    """Set when the run saves and validates.

    That is by count in an epoch, by steps, by a share of the run, each epoch or never.
    """
    recipe.set_key("checkpoint.every", _interval(recipe, "save", "epoch"), *_interval_names("save"))
    every = _interval(recipe, "eval", "no")
    # Without held-out rows the table tells the keys.
    if "data.validation" in recipe.values or "data.hold_out" in recipe.values:
        recipe.set_key("validate.every", every, *_interval_names("eval"))
        if every is None and "data.hold_out" in recipe.values:
            recipe.note("val_size", _NO_VALIDATION)


def _interval_names(what: str) -> tuple[str, str, str]:
    return f"{what}s_per_epoch", f"{what}_strategy", f"{what}_steps"


def _interval(recipe: Translation, what: str, default_strategy: str) -> str | None:
    """Read how often something (`save` or `eval`) happens; None: never."""
    per_epoch_name, strategy_name, steps_name = _interval_names(what)
    per_epoch = recipe.number(per_epoch_name)
    steps = recipe.number(steps_name)
    strategy = recipe.get(strategy_name)
    if strategy is False:
        # `no` without quotes.
        strategy = "no"
    if not strategy:
        strategy = "steps" if steps else default_strategy
    # As Transformers does; with save_steps: 0 it never saves.
    if not steps and what == "eval":
        steps = recipe.number("logging_steps")
    if not steps and not recipe.is_set(steps_name):
        steps = _SAVE_STEPS
    if per_epoch:
        return f"{1 / per_epoch:g} epochs"
    if str(strategy) == "epoch":
        return "1 epochs"
    if str(strategy) != "steps" or not steps:
        return None
    return f"{steps:g} steps" if steps >= 1 else f"{steps * 100:g} %"
