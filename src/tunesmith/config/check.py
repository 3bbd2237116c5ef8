"""Checks of a recipe that involve several keys, or that the type of a key cannot express.

rules.json has the rules that compare values of keys. This module has the other rules.

A rule applies to each of its `keys` if all conditions of `if` hold and not all of `unless`. A
condition is a list of values, of which the key has one, or a comparison with a value or with
another key, such as "> train.learning_rate". A name that is "" or begins with a dot is relative to
the rule's key: ".unit" is the unit of its amount. `_facts` has all names. Texts contain the values
of names in braces.
"""

import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.config.dump import flatten, leaves, to_mapping
from tunesmith.config.layers import COMMAND_LINE
from tunesmith.config.methods import DEFAULT_METHOD, METHOD_FACTS, METHOD_OF_FORMAT
from tunesmith.config.names import last_part, suggest
from tunesmith.config.paths import TEMPLATES, is_place, is_valid_path
from tunesmith.config.row_formats import FORMAT_COLUMNS
from tunesmith.config.schema import Run, Source
from tunesmith.config.yaml_file import RecipeLayer, scalar
from tunesmith.errors import RecipeError
from tunesmith.host.shell import shell_word


class Problem(NamedTuple):
    """A recipe key that breaks a rule.

    Attributes:
        key: the dotted key.
        what: the problem. The error message is the key followed by this text.
        fix: the line to write instead.
        why: the reason for the rule, if the reason is not obvious.
    """

    key: str
    what: str
    fix: str
    why: str = ""


# Dotted key of each value that the recipe has -> its position, such as "recipe.yaml:3".
Places = Mapping[str, str]


def find_problems(run: Run, layer: RecipeLayer) -> dict[str, RecipeError]:
    """Return the first problem of each key that breaks a rule."""
    places = layer.positions
    problems = chain(
        _paths(run),
        _keys_without_effect(run, places),
        _formats(run, places),
        _template(run),
        _table(run),
    )
    errors: dict[str, RecipeError] = {}
    for problem in problems:
        place = layer.where(problem.key)
        fix = problem.fix
        if place.startswith(COMMAND_LINE):
            # The command line needs a setting in the form `key=value`.
            fix = _SETTING_IN_FIX.sub(lambda found: shell_word(f"{found[1]}={found[2]}"), fix)
        what = f"{problem.key} {problem.what}"
        errors.setdefault(problem.key, RecipeError(what, where=place, why=problem.why, fix=fix))
    return errors


# A setting in a fix, such as `train.duration: 1 epochs`: the key, and the value, which is one word,
# a quantity with its unit, a list or a mapping.
_SETTING_IN_FIX = re.compile(
    r"\b((?:\w+\.)+\w+|method): "
    r"(\{.*?\}|\[.*?\]|[^\s,;()]+(?: (?:%|steps|epochs|examples|tokens)(?!\w))?)"
)
_HUB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)")
_AMOUNT = re.compile(r"([\d.e+-]+) ([a-z]+|%)")
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@cache
def _rules() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = json.loads(Path(__file__).with_name("rules.json").read_text())
    return rules


def _table(run: Run) -> Iterator[Problem]:
    """Yield a problem for each rule of rules.json that the recipe breaks."""
    facts = _facts(run)
    for rule in _rules():
        for key in rule["keys"]:
            unless = rule.get("unless")
            if _hold(rule["if"], key, facts) and not (unless and _hold(unless, key, facts)):
                texts = (_with_values(rule.get(part, ""), key, facts) for part in Problem._fields)
                yield Problem(key, *[*texts][1:])


def _facts(run: Run) -> dict[str, Any]:
    """Return the values that rules compare, by their names.

    The names are the keys that the recipe's method and adapter read, and names of numbers that are
    derived from them.
    """
    facts = leaves(to_mapping(run))
    for key, value in [*facts.items()]:
        if amount := _AMOUNT.fullmatch(str(value)):
            facts[f"{key}.amount"] = float(amount[1])
            facts[f"{key}.unit"] = amount[2]
        if isinstance(value, list):
            facts[f"{key}.count"] = len(value)
            facts[f"{key}.repeated"] = max(Counter(value).values(), default=0) > 1
            facts[f"{key}.largest"] = max(value, default=None)
    for key, sources in (("data.train", run.data.train), ("data.validation", run.data.validation)):
        facts[f"{key}.sources"] = len(sources)
        facts[f"{key}.format.all"] = [source.format for source in sources]
    facts.setdefault("method.reward.count", 1)
    saved = map(last_part, run.adapter.modules_to_save)
    return facts | {
        "method.name": run.method.name,
        "method.answer_tokens.twice": 2 * run.method.answer_tokens,
        "adapter.modules_to_save.embed": any(name.startswith("embed") for name in saved),
        "data.template_args.count": len(run.data.template_args),
        "row_tokens": run.row_tokens,
    }


def _hold(conditions: Mapping[str, Any], key: str, facts: Mapping[str, Any]) -> bool:
    """Return whether all conditions of a rule hold for one of its keys."""
    for name, wanted in conditions.items():
        value = facts.get(_absolute(name, key))
        if isinstance(wanted, list):
            if not any(one in wanted for one in (value if isinstance(value, list) else [value])):
                return False
            continue
        sign, _, limit = wanted.partition(" ")
        other = facts[limit] if limit in facts else scalar(limit)
        # A value that is no number is neither smaller nor larger than another.
        is_ordered = isinstance(value, int | float) and isinstance(other, int | float)
        if sign not in ("=", "!=") and not is_ordered:
            return False
        if not _COMPARISONS[sign](value, other):
            return False
    return True


def _absolute(name: str, key: str) -> str:
    return key + name if name[:1] in ("", ".") else name


def _with_values(text: str, key: str, facts: Mapping[str, Any]) -> str:
    values = {**facts, "key": key}
    return re.sub(r"\{([\w.]*)\}", lambda found: str(values[_absolute(found[1], key)]), text)


def _paths(run: Run) -> Iterator[Problem]:
    for key, value in flatten(run).items():
        text = str(value)
        if not is_place(key) or is_valid_path(text):
            continue
        fix = "write the path itself: the file of a URL must be downloaded first, and only the"
        fix += " command line expands variables"
        if hub := _HUB.match(text):
            fix = f"write the Hub id: {hub[1]}"
        what = f"must be a path or a Hub id, without $, :// and null characters, but is {text!r}"
        yield Problem(key, what, fix)


def _keys_without_effect(run: Run, places: Places) -> Iterator[Problem]:
    """Yield a problem for each key that the user has written, and that the method or the adapter
    does not read.
    """
    for key in places:
        section, _, name = key.rpartition(".")
        readers = [method for method, facts in METHOD_FACTS.items() if name in facts.keys]
        if section == "method" and readers and run.method.name not in readers:
            fix = f"remove the key, or set method.name: {' or '.join(readers)}"
            yield Problem(key, f"has no effect with method: {run.method.name}", fix)
        if run.adapter.kind == "none" and section.startswith("adapter") and name != "kind":
            fix = f"remove {key}, or train an adapter with adapter.kind: lora"
            yield Problem(key, "has no effect with adapter.kind: none", fix)


def sources_with_keys(run: Run, places: Places) -> Iterator[tuple[str, Source]]:
    """Yield each data source with its dotted key: `data.train.0` in a list, else `data.train`."""
    for key, sources in (("data.train", run.data.train), ("data.validation", run.data.validation)):
        for i, source in enumerate(sources):
            is_in_list = f"{key}.{i}" in places or len(sources) > 1
            yield f"{key}.{i}" if is_in_list else key, source


def _formats(run: Run, places: Places) -> Iterator[Problem]:
    """Yield a problem for each source whose row format does not fit the training method, and for
    each column that its format does not have.
    """
    method_format = run.method_facts.row_format
    for key, source in sources_with_keys(run, places):
        yield from _columns(key, source)
        default = DEFAULT_METHOD if method_format else None
        other = METHOD_OF_FORMAT.get(source.format, default)
        if source.format == method_format or other in (None, run.method.name):
            continue
        fix = f"set method: {other}"
        if method_format:
            fix += f", or use rows of format {method_format} and set {key}.format: {method_format}"
        yield Problem(
            f"{key}.format",
            f"is {source.format}, a row format that method {run.method.name} cannot use",
            fix=fix,
            why="dpo, orpo and simpo need pairs of answers (preference), kto needs answers that are"
            " labeled good or bad (feedback), only grpo uses rows without an answer (prompt), and"
            " sft uses all other formats",
        )


def _columns(key: str, source: Source) -> Iterator[Problem]:
    columns = FORMAT_COLUMNS[source.format]
    otherwise = f"use one of the format's columns: {', '.join(columns)}"
    for format_name, names in FORMAT_COLUMNS.items():
        if source.columns.keys() <= set(names) and format_name not in METHOD_OF_FORMAT:
            otherwise = f"set {key}.format: {format_name}, or {otherwise}"
    for name in set(source.columns) - set(columns):
        yield Problem(
            f"{key}.columns.{name}",
            f"is not a column of format {source.format}",
            fix=suggest(name, columns, otherwise=otherwise),
            why="`columns` maps the format's column name to the file's column name",
        )


def _template(run: Run) -> Iterator[Problem]:
    template = run.data.template
    if template not in TEMPLATES and not Path(template).is_file():
        otherwise = (
            f"set data.template: auto, or use one of {', '.join(TEMPLATES[1:])}, or the path of an"
            " existing Jinja file"
        )
        fix = suggest(Path(template).name, TEMPLATES, otherwise=otherwise)
        yield Problem("data.template", f"is a file that does not exist: {template}", fix)
