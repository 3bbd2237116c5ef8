"""Translation of another tool's configuration to a recipe, by the rules in the tool's table.

Keys that simple rules cannot express are handled in Python: data sets, batch size, schedule and
intervals.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from tunesmith.config.methods import DEFAULT_METHOD, METHOD_FACTS
from tunesmith.config.yaml_file import scalar
from tunesmith.errors import UsageError
from tunesmith.tools.importers.source_config import SourceConfig, ToolTable
from tunesmith.tools.importers.translation import Translation
from tunesmith.units import count_of

_NAME_ROWS = (
    "name the rows on the command line: data.train.source=rows.jsonl data.train.format=messages"
)
_NO_EQUIVALENT = "this value has no equivalent in a recipe"
# Length of a prompt in tokens if the file has no limit.
_USUAL_PROMPT_TOKENS = 1024
_NEW_RECIPE = "run `tunesmith train --model MODEL --data ROWS.jsonl`, which writes a new recipe"


def translate(source: SourceConfig, overrides: Mapping[str, Any], world: int | None) -> Translation:
    """Translate a configuration to a recipe.

    Each key of the file either sets a recipe key or gets a note.

    Args:
        overrides: dotted recipe keys from the command line, with their values.
        world: number of training processes.

    Raises:
        UsageError: a value that the recipe needs is missing or has no equivalent.
    """
    recipe = Translation(source, overrides)
    for section in recipe.table["when"] + recipe.table["then"]:
        _apply(recipe, section)
    if "method.name" in recipe.values:
        # `recipe.method` is the method on the command line if there is one, otherwise the file's
        # method.
        recipe.values["method.name"] = recipe.method
    if source.tool == "llamafactory":
        recipe.defaults["lora_alpha"] = 2 * recipe.number("adapter.rank")
    recipe.copy_values()
    _apply(recipe, recipe.table)
    if "adapter.target" in recipe.names and not recipe.why_ignored("adapter.target"):
        _set_target(recipe)
    _set_model_of_folder(recipe)
    if source.tool == "trl":
        _set_trl_losses(recipe)
        _set_trl_rows(recipe)
        if METHOD_FACTS[recipe.method].samples:
            _set_rewards(recipe)
            _note_factor_of_cispo(recipe)
    else:
        _set_rows(recipe, "train")
        _set_rows(recipe, "validation")
        _set_train_on(recipe)
    _set_lengths(recipe)
    _set_schedule(recipe)
    _set_batch(recipe, world)
    if "output_dir" not in recipe.values:
        recipe.set_key(
            "output_dir", f"runs/{Path(source.name).stem}", why="The file has no output folder."
        )
    recipe.finish()
    return recipe


def _apply(recipe: Translation, section: ToolTable) -> None:
    """Apply the rules of one section of a translation table, if the section's conditions hold.

    tables/trl.yaml describes the format of a section.

    Raise UsageError if the file has an unsupported key or value.
    """
    if not all(recipe.has(name, value) for name, value in section.get("if", {}).items()):
        return
    if any(recipe.has(name, value) for name, value in section.get("unless", {}).items()):
        return
    if section.get("unless_given") in recipe.overrides:
        return
    recipe.defaults |= section.get("implied", {})

    for name, why in section.get("refused", {}).items():
        for key in filter(recipe.is_set, recipe.matching(name)):
            raise recipe.error(key, why, section.get("fix", _NEW_RECIPE))

    for name, allowed in section.get("only", {}).items():
        value = recipe.get(name)
        if not all(item in allowed for item in (value if isinstance(value, list) else [value])):
            fix = f"use one of the supported values: {', '.join(map(str, allowed))}"
            raise recipe.error(name, _NO_EQUIVALENT, fix)

    for rule in section.get("rules", []):
        _apply_rule(recipe, *rule)


def _apply_rule(recipe: Translation, name: str, expected: JsonValue, *effect: Any) -> None:
    """Apply one rule to each key of the file that matches `name` and has the expected value.

    `effect` is either a note, or a recipe key with its new value and a reason.
    """
    for key in recipe.matching(name) or [name]:
        if not recipe.has(key, expected):
            continue
        if len(effect) == 1:
            recipe.note(key, *effect)
            continue

        ours, value, *why = effect
        if value == "=":
            value = recipe.converted(ours, key)
        elif value == "1/=":
            value = f"{1 / recipe.number(key):g} epochs"
        elif isinstance(value, list):
            # Append the list to the list that an earlier rule has set, without duplicates.
            value = list(dict.fromkeys(recipe.values.get(ours, []) + value))
        recipe.set_key(ours, value, key, why="".join(why))


def _set_target(recipe: Translation) -> None:
    """Set the layers that get a LoRA, unless a rule has already set them.

    Raise UsageError if the layers are given as a regular expression.
    """
    name = "adapter.target"
    target = recipe.values.get(name) or recipe.listed(name) or ["q_proj", "v_proj"]
    if target in (["all"], ["all-linear"]):
        target = "all-linear"
    if any(re.search(r"[^\w.-]", layer) for layer in target):
        raise recipe.error(
            name,
            "this value is a regular expression, and a recipe lists the layers",
            "list the layers: adapter.target='[q_proj, v_proj]'",
        )
    recipe.set_key(name, target, name)


def _set_model_of_folder(recipe: Translation) -> None:
    """Replace a model folder that does not exist on this machine by a Hub id.

    The id is derived from the folder's name.
    """
    folder = Path(str(recipe.get("model.name")))
    for beginning, owner in recipe.table.get("owners", {}).items():
        is_here = (recipe.source.base / folder).is_dir()
        if folder.name.lower().startswith(beginning) and not is_here:
            recipe.set_key(
                "model.name",
                f"{owner}/{folder.name}",
                "model.name",
                why="The folder does not exist on this machine, so the model is from the Hub.",
            )
            return


def _set_trl_losses(recipe: Translation) -> None:
    """Set the weight of the SFT loss, if TRL's list of losses contains `sft` after a DPO loss."""
    losses = recipe.listed("loss_type")
    if "sft_weight" not in METHOD_FACTS[recipe.method].keys or len(losses) < 2:
        return
    weights = [scalar(weight) for weight in recipe.listed("loss_weights")] or [1.0, 1.0]
    for name, is_known in (
        ("loss_type", losses[1:] == ["sft"]),
        ("loss_weights", weights[:-1] == [1]),
    ):
        if not is_known:
            fix = "use one loss_type, or add sft as the second one with loss_weights [1.0, WEIGHT]"
            raise recipe.error(name, _NO_EQUIVALENT, fix)
    recipe.set_key("method.sft_weight", weights[-1], "loss_type", "loss_weights")


def _note_factor_of_cispo(recipe: Translation) -> None:
    """Note the factor of the policy gradient of TRL's cispo, whose clipping scales the ratio 1."""
    factor = recipe.number("epsilon_high") or recipe.number("epsilon")
    if recipe.has("loss_type", "cispo") and factor < 1:
        recipe.note(
            "loss_type",
            f"The source clips the ratio of the probabilities, which is 1, to epsilon_high, so its"
            f" policy gradient has the factor {factor:g}. The gradient of tunesmith has no factor.",
        )


def _set_trl_rows(recipe: Translation) -> None:
    """Set the format of the rows and the supervised tokens. A file of TRL has one data set."""
    column = recipe.get("dataset_text_field") or "text"
    # `dataset_text_field` can also name a column of messages. TRL then reads the column as
    # messages.
    is_chat = column in ("text", "messages", "conversations", "completion")
    facts = METHOD_FACTS[recipe.method]
    usual = "messages" if is_chat else "text"
    method_format = facts.row_format or facts.own_format or usual
    row_format = recipe.overrides.get("data.train.format", method_format)

    why = f"The rows have the format {row_format}."
    for part in ("data.train", "data.validation"):
        if f"{part}.source" in recipe.values:
            recipe.set_key(f"{part}.format", row_format, why=why)
            if row_format == "text" and column != "text":
                recipe.set_key(f"{part}.columns", {"text": column}, "dataset_text_field")
            prompt = recipe.get("dataset_prompt_column")
            if row_format == "prompt" and prompt:
                recipe.set_key(f"{part}.columns", {"prompt": prompt}, "dataset_prompt_column")

    answers_only = recipe.names["answers_only"]
    # If `completion_only_loss` is false, the prompts of prompt-completion rows are supervised too.
    # If the key is null or missing, only the completions are supervised.
    is_masked = row_format == "prompt-completion" and not recipe.is_set("answers_only")
    if any(recipe.has(name, "true") for name in answers_only):
        is_masked = row_format != "text"
    train_on = "last" if facts.samples else "response"
    if recipe.method == DEFAULT_METHOD and not is_masked:
        train_on = "all"
    recipe.set_key("data.train_on", train_on, *answers_only, why=why)


def _set_rewards(recipe: Translation) -> None:
    """Set the reward functions, which tunesmith calls as TRL does, and the length of a row."""
    limit = recipe.number("max_prompt_length")
    why = f"The source does not limit prompts; {_USUAL_PROMPT_TOKENS} tokens are assumed."
    length = recipe.count("method.answer_tokens") + (limit or _USUAL_PROMPT_TOKENS)
    names = ("max_completion_length", "max_prompt_length")
    recipe.set_key("data.seq_len", length, *names, why="" if limit else why)
    if "method.reward" in recipe.overrides:
        return
    rewards = recipe.listed("method.reward")
    if not rewards:
        fix = "add method.reward=exact, or method.reward=rewards.py:FUNCTION for your own scorer"
        raise recipe.error("reward_funcs", "a recipe needs a reward", fix)
    scorers = []
    unknown = []
    for reward in rewards:
        module, _, function = reward.rpartition(".")
        if not module or not reward.replace(".", "_").isidentifier():
            # A function of TRL's own package has a short name.
            unknown.append(reward)
            module = "rewards"
        scorers.append(f"{module.replace('.', '/')}.py:{function}")
    if unknown:
        raise recipe.error(
            "method.reward",
            f"these functions are not written as module.function: {', '.join(unknown)}",
            f"import them in rewards.py, and add 'method.reward=[{', '.join(scorers)}]'",
        )
    recipe.set_key("method.reward", scorers, "method.reward")


def _set_rows(recipe: Translation, part: str) -> None:
    """Set `data.train` or `data.validation` from the tool's data sets.

    `part` is "train" or "validation". The section `rows` of the translation table names the keys of
    the data sets.
    """
    rows = recipe.table["rows"]
    keys = recipe.source.keys
    sources = []
    names: list[str] = []
    for prefix, usual_type in rows[part].items():
        if f"data.{part}.source" in recipe.overrides:
            why = "The data set on the command line replaces this key."
            for name in recipe.matching(f"{prefix}.*") + recipe.matching(prefix):
                recipe.note(name, why, differs=False)
            continue
        is_listed = bool(recipe.listed(prefix))
        if "registry" in rows and (is_listed or recipe.matching(f"{prefix}.*")):
            row_format = METHOD_FACTS[recipe.method].row_format or "messages"
            raise recipe.error(
                prefix,
                f"{rows['registry']}, which describes these rows, is not read",
                f"name the rows on the command line: data.{part}.source=rows.jsonl "
                f"data.{part}.format={row_format}",
            )
        # In this case the value lists names of data sets, and the file has no other keys for them.
        if is_listed:
            path = f"{prefix}.{rows['sources'][-1]}"
            keys[path] = replace(keys.pop(prefix), key=path)

        # An entry is one data set. Its keys start with the prefix, or with the prefix and an index
        # if there is a list of data sets.
        pattern = re.compile(rf"{re.escape(prefix)}(\.[0-9]+)?(?=\.)")
        # A dict removes duplicates and keeps the order of the file.
        entries = dict.fromkeys(match[0] for match in map(pattern.match, keys) if match)
        for entry in entries:
            names.append(prefix)
            sources += _read_entry(recipe, entry, usual_type, names)

    if sources:
        recipe.set_key(f"data.{part}", sources[0] if len(sources) == 1 else sources, *names)
    if part == "train" and any(source["format"] == "text" for source in sources):
        recipe.values.pop("data.too_long", None)
        recipe.note("data.too_long", "The source splits long documents; see data.too_long.")


def _read_entry(
    recipe: Translation, entry: str, usual_type: str | None, names: list[str]
) -> list[dict[str, Any]]:
    """Return the recipe's sources for one data set, such as `{"source": "d/d", "format": "alpaca"}`
    for each of its files. Append the used keys to `names`.

    Args:
        entry: prefix of the data set's keys, such as `datasets.0`.
        usual_type: type of a data set that names none. None if it must name its type.
    """
    rows = recipe.table["rows"]

    def get(key: str) -> Any:
        names.append(f"{entry}.{key}")
        return recipe.get(names[-1])

    def renamed(theirs: Mapping[str, str]) -> dict[str, Any]:
        # If several keys have the same name in the recipe, the last one wins.
        return {ours: value for key, ours in theirs.items() if (value := get(key))}

    kind = METHOD_FACTS[recipe.method].row_format or "sft"
    type_key = f"{entry}.{rows['type']}"
    named_type = str(get(rows["type"]) or usual_type or "")
    types = rows["types"][kind]
    # A module or template may precede the name of a type, as in `chatml.intel`.
    known = [name for name in types if fnmatchcase(f".{named_type}", f"*.{name}")]
    if not known:
        raise recipe.error(type_key, f"the supported types are {', '.join(types)}", _NAME_ROWS)
    recipe.defaults |= {f"{entry}.{key}": value for key, value in types[known[0]].items()}

    files = next(filter(None, [get(key) for key in rows["sources"]]), None)
    if files is None:
        raise recipe.error(
            f"{entry}.{rows['sources'][-1]}",
            "the data set has no value for this key, which names its rows",
            _NAME_ROWS,
        )

    row_format = get("format")
    for key, role, format_of_role in rows["formats"]:
        # Only a type of chats has names of the keys of turns.
        has_turns = kind == "sft" and row_format in ("messages", "sharegpt")
        if has_turns and recipe.get(f"{entry}.{key}") == role:
            get(key)
            row_format = format_of_role
    columns = renamed(rows["columns"].get(row_format, {}))
    source = renamed(rows["keys"]) | {"format": row_format}
    # A column with the name that the recipe expects needs no mapping.
    mapped = {ours: name for ours, name in columns.items() if ours and name != ours}
    if mapped:
        source["columns"] = mapped

    template = get("template")
    if template and not recipe.is_set("data.template"):
        # If the data sets have different templates, use "auto".
        if recipe.values.get("data.template", template) != template:
            template = "auto"
        recipe.set_key("data.template", template, type_key)

    return [{"source": file, **source} for file in (files if isinstance(files, list) else [files])]


def _set_train_on(recipe: Translation) -> None:
    """Set which messages are supervised: all, the answers, or only the last answer."""
    names = ("train_on_prompts", "train_on_last")
    train_on = "response"
    if recipe.method != DEFAULT_METHOD:
        for name in names:
            recipe.note(name, "Preference training compares the answers only.", differs=False)
    elif recipe.has("train_on_prompts", "true") or recipe.has("train_on_last", "train_on_all"):
        train_on = "all"
    elif recipe.has("train_on_last", "true") or recipe.has("train_on_last", "train_on_last"):
        train_on = "last"
    recipe.set_key("data.train_on", train_on, *names)


def _set_lengths(recipe: Translation) -> None:
    """Set packing, the number of held-out rows and the duration."""
    packs = recipe.has("packing", "true")
    if packs and recipe.get("data.seq_len") is None:
        raise recipe.error(
            "data.seq_len",
            "packing needs the length of a packed row",
            "set this key to the length of a packed row in tokens",
        )
    why = ""
    if not packs and not recipe.is_set("packing"):
        packs = True
        why = "The source pads rows. Packed rows give the same result in less time."
    recipe.set_key("data.pack", packs, "packing", why=why)

    if "data.validation" in recipe.values:
        recipe.values.pop("data.hold_out", None)
    if not {"data.validation", "data.validation.source", "data.hold_out"} & recipe.values.keys():
        recipe.values.pop("validate.every", None)

    epochs = recipe.number("epochs")
    duration = f"{epochs:g} epochs"
    # If the file has steps and epochs, the steps have priority.
    steps = max(recipe.number("steps"), recipe.number("steps_per_epoch") * epochs)
    if steps > 0:
        duration = f"{steps:g} steps"
    recipe.set_key("train.duration", duration, "epochs", "steps", "steps_per_epoch")


def _set_schedule(recipe: Translation) -> None:
    """Set the betas and the minimum learning rate."""
    names = ("beta1", "beta2")
    if any(map(recipe.is_set, names)):
        recipe.set_key("train.betas", list(map(recipe.number, names)), *names)

    if recipe.is_set("min_rate_share"):
        names = ("min_rate_share", "train.learning_rate")
        # Round the minimum rate for the recipe, because 0.1 * 3e-5 is 3.0000000000000004e-06.
        rate = float(f"{recipe.number(names[0]) * recipe.number(names[1]):.12g}")
        recipe.set_key("train.min_learning_rate", rate, *names)


def _set_batch(recipe: Translation, world: int | None) -> None:
    """Set the global batch.

    global batch = rows per process * accumulation steps * number of processes with different rows.
    """
    if "train.global_batch" in recipe.overrides:
        return
    rows = recipe.count("rows") * recipe.count("accumulation")

    # The ranks of a tensor-parallel group process the same rows, so a group counts as one process.
    tensor = max(1, recipe.number("parallel.tensor"))
    shards = recipe.number("parallel.shard")
    processes = world or recipe.number("processes")
    if shards > 0:
        processes = shards * max(1, recipe.number("parallel.replicate")) * tensor

    if processes < 1 or processes % tensor:
        why = (
            f"each process of the original run used {count_of(rows, 'row')} per step, and the file "
            "does not give a usable number of processes"
        )
        fix = "add --world N, the number of processes (GPUs) on all nodes of the original run"
        if tensor > 1:
            fix += f", a multiple of {tensor:g}"
        raise UsageError("the global batch is unknown", where=recipe.source.name, why=why, fix=fix)

    batch = int(rows * processes // tensor)
    why = f"{processes:g} processes"
    if METHOD_FACTS[recipe.method].samples:
        batch = _count_prompts(recipe, batch)
        why += ". A batch of the source counts answers, and a batch of tunesmith counts prompts."
    size = f"{batch} examples"
    if recipe.has("packing", "true"):
        why += f", {count_of(batch, 'packed row')} of data.seq_len"
        size = f"{batch * recipe.number('data.seq_len')} tokens"
    names = ("rows", "accumulation", "processes")
    recipe.set_key("train.global_batch", size, *names, why=why)


def _count_prompts(recipe: Translation, answers: int) -> int:
    """Return the number of prompts in a batch with this number of answers."""
    # With these values, each batch of sampled answers is used for one update.
    for name, usual in (
        ("steps_per_generation", recipe.count("accumulation")),
        ("generation_batch_size", answers),
    ):
        if recipe.number(name) == usual:
            recipe.note(name, "The source makes one update per batch of answers.", differs=False)
    group = recipe.count("method.group")
    if answers % group:
        raise recipe.error(
            "method.group",
            f"the {answers} answers of a step are not a multiple of the answers to a prompt",
            'add train.global_batch="N examples", where N is the number of prompts',
        )
    return answers // group
