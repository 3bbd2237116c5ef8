"""The recipe key or value that a mistyped or foreign name most likely means."""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import Field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tunesmith.config.schema import Run, is_section, yaml_name
from tunesmith.config.tree import read_file


@cache
def keys() -> dict[str, tuple[Field[Any], Any]]:
    """Every dotted key with its field and type; those of a source stand under `data.train` and `data.validation`."""

    def below(cls: type, prefix: str) -> Iterator[tuple[str, tuple[Field[Any], Any]]]:
        hints = get_type_hints(cls)
        for spec in fields(cls):
            key, hint = prefix + yaml_name(spec.name), hints[spec.name]
            yield key, (spec, hint)
            for inner in (hint, *get_args(hint)[:1]):
                if is_section(inner):
                    yield from below(inner, f"{key}.")

    return dict(below(Run, ""))


def without_indices(key: str) -> str:
    """The key of the schema: `data.train.0.split` -> `data.train.split`."""
    return re.sub(r"\.[0-9]+(?=\.|$)", "", key)


@cache
def other_tools(kind: str) -> dict[str, str]:
    """Names of other tools and what to write here; `kind` is `keys`, `words` or `absent`."""
    table = read_file(Path(__file__).with_name("other_tools.yaml")).plain()[kind]
    return {name: meant for meant, names in table.items() for name in names}


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that a mistyped word most likely means; None if none is near."""
    listed = list(choices)
    plain = word.lower().replace("-", "_")
    same = [choice for choice in listed if choice.lower().replace("-", "_") == plain]
    meant = [choice for choice in other_tools("words").get(word.lower(), "").split() if choice in listed]
    return next(iter([*same, *meant, *difflib.get_close_matches(word, listed, n=1, cutoff=0.6)]), None)


def suggest_key(section: str, name: str) -> str:
    """What to write in place of an unknown key `name` of `section` ("" at the top): one line."""
    inside = [key.rpartition(".")[2] for key in keys() if key.rpartition(".")[0] == section]
    plain = name.lower().replace("-", "_")
    if plain in inside:
        return f"write it {plain}"
    if f"{section}.{name}".lstrip(".") in keys():
        outer, _, inner = name.rpartition(".")
        return f"nest the keys in a file: {outer}: {{{inner}: ...}}; the form with a dot is for the command line"
    if plain in other_tools("keys"):
        return f"here it is {other_tools('keys')[plain]}"
    near = nearest(plain, inside)
    everywhere = {key: key.rpartition(".")[2] for key in keys()}
    if plain in everywhere.values() or not near:
        other = plain if plain in everywhere.values() else nearest(plain, everywhere.values())
        near = " or ".join(key for key, last in everywhere.items() if last == other)
    return f"did you mean {near}?" if near else f"{section or 'a recipe'} has {', '.join(inside)}"
