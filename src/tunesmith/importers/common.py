"""What the tools have in common, under Transformers' names: rows, batch, schedule, precision, adapter, intervals."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from tunesmith.errors import UsageError, first_line
from tunesmith.importers.draft import Draft
from tunesmith.importers.foreign import Given, table
from tunesmith.shell import shell_word

PEFT_TARGETS = ["q_proj", "v_proj"]  # what PEFT takes of a Llama, Qwen, Mistral or Gemma where nothing is named
NAME_ROWS = "give rows beside the file: data.train.source=rows.jsonl data.train.format=messages"
_ADAPTER = ("lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "lora_modules_to_save", "adapter_name_or_path")


def translate_training(draft: Draft, world: int | None) -> None:
    """The keys that the tools share, after a tool's own; `world` is the number of processes that train."""
    draft.carry(*draft.table["carried"])
    draft.put("train.clip_norm", draft.number("max_grad_norm") or None, "max_grad_norm")
    if "data.train_on" not in draft.values:
        on = "all" if draft.get("train_on_inputs") else "last" if draft.get("mask_history") else "response"
        draft.put("data.train_on", on, "train_on_inputs", "mask_history")
    betas = ("adam_beta1", "adam_beta2")
    if any(map(draft.given, betas)):
        values = [0.9, 0.999]
        for place, name in enumerate(betas):
            if draft.given(name):
                values[place] = draft.number(name)
        draft.put("train.betas", values, *betas)
    for part in (apply_rules, _lengths, _schedule, _intervals):
        part(draft)
    _batch(draft, world)


def apply_rules(draft: Draft) -> None:
    """What the tables say of a key's values; tables/common.yaml tells the form of a rule."""
    for name, part, ours, value, why in [*table("common")["rules"], *draft.table.get("rules", [])]:
        if draft.get(name) is not None and str(part).lower() in str(draft.get(name)).lower():
            if ours:
                both = list(dict.fromkeys([*draft.values.get(ours, []), *value])) if isinstance(value, list) else value
                draft.put(ours, both, name, why=why)
            else:
                draft.remark(name, why)


def put_adapter(draft: Draft, target: Any, *names: str, lora: bool) -> None:
    """What is trained; `target` follows from their keys `names`."""
    draft.put("adapter.kind", "lora" if lora else "none", "kind")
    if lora:
        draft.carry(*_ADAPTER)
        draft.put("adapter.target", "all-linear" if target in (["all"], ["all-linear"]) else target, *names)
    for key, one in draft.source.given.items():
        if not lora and re.match(r"(model\.)?(lora|apply_lora|peft)_", key):
            draft.remark_given(one, "no adapter is trained", differs=False)


def put_rows(draft: Draft, part: str, prefix: str) -> None:
    """`data.train` or `data.validation` from the data set, or the list of them, at their key `prefix`."""
    known, rows, told = draft.table["rows"], list[dict[str, Any]](), [prefix]
    entries = {m[0] for key in draft.source.given if (m := re.match(rf"{prefix}(\.[0-9]+)?(?=\.)", key))}
    if not entries and draft.given(prefix):
        _refuse_bare_paths(draft, part, prefix)
    for one in sorted(entries, key=lambda name: (len(name), name)):
        if part == "train" and "data.train.source" in draft.overrides:
            for key in draft.source.given:
                if key.startswith(f"{one}."):
                    draft.remark(key, "data.train.source is given in its place", differs=False)
            continue
        called = str(draft.get(f"{one}.{known['type']}") or known["silent"])
        kind = next((kind for kind in known["types"] if re.search(rf"(^|\.){kind}\b", called)), None)
        if kind is None:
            raise draft.refusal(f"{one}.{known['type']}", f"known are {', '.join(known['types'])}", NAME_ROWS)
        draft.defaults |= {f"{one}.{key}": value for key, value in known["types"][kind].items()}
        roles = [str(draft.get(f"{one}.{key}")) for key in known["role_keys"]]
        form = next((known["roles"][role] for role in roles if role in known["roles"]), draft.get(f"{one}.format"))
        renamed = known["columns"].get(form, {})
        columns = {ours: draft.get(f"{one}.{key}") for key, ours in renamed.items()}
        row = {ours: draft.get(f"{one}.{key}") for ours, key in known["keys"].items()} | {"format": form}
        row["columns"] = {ours: theirs for ours, theirs in columns.items() if theirs and theirs != ours}
        sources = next((found for key in known["sources"] if (found := draft.get(f"{one}.{key}"))), None)
        if sources is None:
            raise draft.refusal(f"{one}.{known['sources'][-1]}", "it names the rows", NAME_ROWS)
        for source in sources if isinstance(sources, list) else [sources]:
            rows.append({"source": source} | {key: value for key, value in row.items() if value})
        looked_at = [*known["sources"], known["type"], *known["role_keys"], *known["keys"].values(), *renamed]
        told += [f"{one}.{key}" for key in looked_at]
    if rows:
        draft.put(f"data.{part}", rows[0] if len(rows) == 1 else rows, *told, *known["told"])


def _refuse_bare_paths(draft: Draft, part: str, prefix: str) -> None:
    """UsageError where a path stands in place of a data set, unless the command line names the rows."""
    source = f"data.{part}.source"
    if source in draft.overrides:
        draft.remark(prefix, f"{source} is given in its place", differs=False)
        return
    paths = draft.listed(prefix)
    if not paths:  # [], false or an empty text
        draft.remark(prefix, "it names no data set", differs=False)
        return
    fix = f"say how they are written: {shell_word(f'{source}={paths[0]}')} data.{part}.format=messages (or alpaca, ...)"
    raise draft.refusal(prefix, "a path alone does not say how the rows are written", fix)


def read_deepspeed(draft: Draft) -> None:
    """Take the keys of DeepSpeed's own JSON file beside those of the configuration that names it."""
    file = draft.find("deepspeed_file")
    if file is None or not isinstance(file.value, str) or not file.value:
        return
    path = draft.source.nearby(file.value)
    if path is None:
        why = "this file is not here: if it offloads to the CPU, give train.cpu_offload=[parameters]"
        if draft.source.tool == "accelerate":
            why += "; if it accumulates gradients, give train.global_batch"
        draft.remark("deepspeed_file", why)
        return
    try:
        values = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        what = f"{file.key}: {path.name} is not a JSON file of DeepSpeed"
        fix = "correct it, or take the key out"
        raise UsageError(what, where=str(path), why=first_line(error), fix=fix) from None
    for key, value in _json_leaves(values, file.key):
        draft.source.given[key] = Given(key, value, path.name)


def _json_leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value of a JSON object but objects, by its dotted key below `key`."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inside in value.items():
        yield from _json_leaves(inside, f"{key}.{name}")


def _lengths(draft: Draft) -> None:
    """How long a row and the run are, and which rows are held out."""
    asked, length = draft.get("packing") or draft.get("neat_packing"), draft.get("max_length")
    if asked and length is None:
        raise draft.refusal("max_length", "packed rows need a length", "give the length there")
    if length is None:
        draft.remark("max_length", "no row is cut there; here those above data.seq_len, 2048, are, and counted")
    draft.carry("max_length")
    why = "" if draft.given("packing") or asked else "rows are padded there; packed ones learn the same in less time"
    draft.put("data.pack", bool(asked or why), "packing", "neat_packing", why=why)
    if (hold_out := draft.number("val_size")) and "data.validation" not in draft.values:
        draft.put("data.hold_out", f"{hold_out * 100:g} %" if hold_out < 1 else f"{hold_out:g} examples", "val_size")
    epochs, per_epoch = draft.number("num_train_epochs"), draft.number("max_steps_per_epoch")
    steps = max(draft.number("max_steps"), per_epoch * epochs)
    duration = f"{steps:g} steps" if steps > 0 else f"{epochs:g} epochs"
    draft.put("train.duration", duration, "num_train_epochs", "max_steps", "max_steps_per_epoch")


def _schedule(draft: Draft) -> None:
    draft.carry("lr_scheduler_type")
    for name, factor in (("cosine_min_lr_ratio", draft.number("learning_rate")), ("lr_scheduler_kwargs.min_lr", 1)):
        if draft.given(name):
            draft.put("train.min_learning_rate", draft.number(name) * factor, name)
    steps, share = draft.number("warmup_steps"), draft.number("warmup_ratio")
    warmup = f"{steps:g} steps" if steps >= 1 else f"{round(100 * (steps or share), 6):g} %"
    if draft.get("lr_scheduler_type") == "constant":  # Transformers' constant_with_warmup is the one that has any
        warmup = "0 steps"
    draft.put("train.warmup", warmup, "warmup_steps", "warmup_ratio")


def _batch(draft: Draft, world: int | None) -> None:
    """The batch of a step: rows of a process x accumulation x the processes that have rows of their own."""
    for name in ("tensor", "shard", "replicate"):
        if draft.given(name) and draft.number(name) > 0:
            draft.put(f"parallel.{name}", draft.get(name), name)
    if "train.global_batch" in draft.overrides:
        return
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    rows = math.prod(draft.count(name) for name in names)
    tensor = draft.count("tensor")
    counted = world or draft.number("num_processes") or draft.number("nproc_per_node") * draft.count("nnodes")
    if draft.given("shard") and draft.number("shard") > 0:
        counted = draft.number("shard") * draft.count("replicate") * tensor
    if counted < 1 or counted % tensor:
        why = f"a process takes {rows} rows a step" + f", {tensor} processes the same ones" * (tensor > 1)
        fix = f"say how many processes (GPUs) trained in all: --world {8 * tensor}"
        raise UsageError("the global batch is not known", where=draft.source.name, why=why, fix=fix)
    batch, packed = rows * counted // tensor, draft.get("packing") or draft.get("neat_packing")
    size = f"{batch * draft.number('max_length')} tokens" if packed else f"{batch} examples"
    why = ", ".join([f"{counted} processes"] + [f"{batch} packed rows of data.seq_len"] * bool(packed))
    draft.put("train.global_batch", size, *names, "num_processes", "nproc_per_node", "nnodes", why=why)


def _intervals(draft: Draft) -> None:
    """When is saved and validated: by count in an epoch, by steps, by a share of the run, each epoch or never."""
    held_out = any(key in draft.values for key in ("data.validation", "data.hold_out"))
    for which, ours, silent in (("save", "checkpoint.every", "epoch"), ("eval", "validate.every", "no")):
        names = (f"{which}s_per_epoch", f"{which}_strategy", f"{which}_steps")
        often, steps = draft.number(names[0]), draft.number(names[2])
        strategy = str(draft.get(names[1]) or ("steps" if steps else silent))
        if not steps and which == "eval":  # as Transformers does; with save_steps: 0 it never saves
            steps = draft.number("logging_steps")
        if not steps and not draft.given(names[2]):
            steps = 500
        every = {"epoch": "1 epochs", "steps": _interval(steps)}.get(strategy)
        if which == "save" or held_out:  # without held-out rows the table tells the keys
            draft.put(ours, f"{1 / often:g} epochs" if often else every, *names)


def _interval(steps: float) -> str | None:
    """So many steps, or below 1 that share of the run; None for 0: never."""
    if not steps:
        return None
    return f"{steps:g} steps" if steps >= 1 else f"{steps * 100:g} %"
