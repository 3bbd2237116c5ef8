"""A recipe that is being translated: values under our keys, their origins, and notes on the keys
that are not in the recipe.
"""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import JsonValue

from tunesmith.config.dump import to_yaml
from tunesmith.config.names import keys, members, other_tools, without_indices
from tunesmith.config.paths import resolve_paths
from tunesmith.config.schema import METHOD_KEYS
from tunesmith.config.tree import Node, scalar, wrap
from tunesmith.config.typed import literal_words
from tunesmith.errors import UsageError, is_secret_name, mask, mask_words
from tunesmith.tools.importers.source_config import SourceConfig, SourceKey, table
from tunesmith.units import Length

_UNSET: tuple[JsonValue, ...] = (None, "", [], {})
_OFF = (*_UNSET, False, "no", "none", "false")
# Texts that Transformers' parser and pydantic read as true and false.
_TRUE_WORDS = ("true", "yes", "on", "t", "y", "1")
_FALSE_WORDS = ("false", "no", "off", "f", "n", "0")


class Note(NamedTuple):
    """A key of the other tool that the recipe does not contain.

    Attributes:
        differs: whether it may change what is learned.
    """

    key: str
    value: str
    origin: str
    why: str
    differs: bool


class Translation:
    """The translation so far.

    A `name` in the methods is a key of the other tool, or the target that the table's part `keys`
    gives it: a recipe key or a quantity.

    Attributes:
        overrides: recipe keys that the command line gives.
        defaults: values of keys that the file does not set.
        names: the other tool's keys of each target.
        values: the recipe's values by key.
        origins: the other tool's keys that each value follows from.
        reasons: why a value is not a plain copy, by recipe key.
        notes: the notes by key of the other tool.
    """

    def __init__(self, source: SourceConfig, overrides: Mapping[str, str]) -> None:
        self.source = source
        self.overrides = dict(overrides)
        if "method" in overrides:
            self.overrides["method.name"] = overrides["method"]
        self.table = table(source.tool)
        self.defaults: dict[str, JsonValue] = dict(self.table["defaults"])
        self.names: dict[str, list[str]] = {}
        for theirs, ours in self.table["keys"].items():
            self.names.setdefault(ours, []).append(theirs)
        self.values: dict[str, Any] = {}
        self.origins: dict[str, list[SourceKey]] = {}
        self.reasons: dict[str, list[str]] = {}
        self.notes: dict[str, Note] = {}

    def find(self, name: str) -> SourceKey | None:
        """Return a key in the file or its default. Return None if it has neither."""
        names = self.names.get(name, [name])
        # `dataset.packed` is also the key of the first entry of a list.
        names = [form for key in names for form in (key, key.replace(".", ".0.", 1))]
        for key in names:
            if key in self.source.keys:
                return self.source.keys[key]
        for key in names:
            if key in self.defaults:
                return SourceKey(key, self.defaults[key], f"{self.source.tool}'s default")
        return None

    def get(self, name: str) -> JsonValue:
        """Return the value of a key, or its default if the value is null."""
        key = self.find(name)
        if key is None:
            return None
        return self.defaults.get(key.key) if key.value is None else key.value

    def number(self, name: str) -> int | float:
        """Return a number, which may be in quotes, or 0 if the key is not set."""
        value = self.get(name)
        if isinstance(value, str):
            value = scalar(value.replace("_", ""))
        if value is None:
            return 0
        if isinstance(value, bool | str | list | dict) or not abs(value) < 1e15:
            raise self.error(name, "a number is expected", "write a number there")
        return value

    def count(self, name: str) -> int:
        """Return a whole number of at least 1, or 1 if the key is not set."""
        number = 1 if self.get(name) is None else self.number(name)
        if number < 1 or number % 1:
            raise self.error(name, "it is no whole number above 0", "write such a number there")
        return int(number)

    def is_on(self, name: str) -> bool:
        """Return whether a switch is on. Raise UsageError if the value is not a truth value."""
        if self.get(name) in _UNSET or self.has(name, "false"):
            return False
        if self.has(name, "true"):
            return True
        raise self.error(name, "true or false is expected", "write one of them there")

    def listed(self, name: str) -> list[str]:
        """Return a list of names, or a text with commas as a list."""
        value = self.get(name) or []
        parts = value if isinstance(value, list) else str(value).split(",")
        return [str(part).strip() for part in parts]

    def is_set(self, name: str) -> bool:
        """Return whether the file contains a value other than null."""
        key = self.find(name)
        return key is not None and key.key in self.source.keys and key.value is not None

    def has(self, name: str, expected: JsonValue) -> bool:
        """Return whether a key, or our key, has a value as the tables write it: a text that the
        value contains, a number that it equals, or null.
        """
        value = self.overrides.get(name, self.values.get(name, self.get(name)))
        text = str(value).lower()
        if value is None or expected is None:
            return value is expected
        if isinstance(expected, int | float) and not isinstance(expected, bool):
            return scalar(text) == expected
        if expected in ("true", "false") and text in (*_TRUE_WORDS, *_FALSE_WORDS):
            return text in (_TRUE_WORDS if expected == "true" else _FALSE_WORDS)
        return str(expected).lower() in text

    @property
    def method(self) -> str:
        """The name of the training method."""
        return str(self.overrides.get("method.name", self.values.get("method.name", "sft")))

    def set_key(self, key: str, value: object, *names: str, why: str = "") -> None:
        """Set a recipe key, which follows from the other tool's keys `names`."""
        self.values[key] = value
        origins = [origin for origin in map(self.find, names) if origin is not None]
        self.origins.setdefault(key, []).extend(origins)
        self.reasons.setdefault(key, []).append(why)

    def note(self, name: str | SourceKey, why: str, *, differs: bool = True) -> None:
        """Note why a key is not in the recipe, or how its effect differs."""
        key = self.find(name) if isinstance(name, str) else name
        if key is not None:
            self.notes.setdefault(key.key, Note(key.key, _shown(key), key.where, why, differs))

    def error(self, name: str, why: str, fix: str) -> UsageError:
        key = self.find(name) or SourceKey(name, None, self.source.name)
        what = f"{key.key}: {_shown(key)} cannot be imported"
        return UsageError(what, where=key.where, why=why, fix=fix)

    def carry(self) -> None:
        """Set each recipe key of the part `keys` whose value needs only our word or unit."""
        for key in self.names:
            value = self.get(key)
            if key not in keys() or key == "adapter.target" or value is None:
                continue
            hint = keys()[key][1]
            if key.startswith("parallel."):
                # -1 and 0 leave the number to the tool.
                value = self.number(key) if self.number(key) > 0 else None
            elif literal_words(hint):
                value = self._our_word(key)
            elif Length in members(hint):
                value = length(self.number(key))
            elif isinstance(value, str) and tuple[str, ...] in members(hint):
                value = [*self.listed(key)]
            elif isinstance(value, str) and bool in members(hint):
                value = self.is_on(key)
            elif isinstance(value, str) and str not in members(hint):
                # The tools convert a number in quotes.
                value = scalar(value.replace("_", ""))
            if value is not None:
                self.set_key(key, value, key)

    def _our_word(self, key: str) -> str | None:
        """Return our word for a value. Note the key and return None if there is none."""
        spec, hint = keys()[key]
        # `torch.bfloat16`: the last part is the word.
        word = str(self.get(key)).rpartition(".")[2].lower()
        meanings = {**other_tools("words"), **self.table.get("words", {})}
        for candidate in (word, *meanings.get(word, "").split()):
            if candidate in literal_words(hint):
                return candidate
        absent = other_tools("absent").get(word, "{} is not known here").format(word)
        self.note(key, f"{absent}; the recipe has {key}: {spec.default}")
        return None

    def unread(self, key: str) -> str:
        """Return why the recipe does not read a key, or "" if it does."""
        if key.startswith("adapter.") and self.values.get("adapter.kind") == "none":
            return "" if key == "adapter.kind" else "No adapter is trained."
        template = self.overrides.get("data.template", self.values.get("data.template"))
        if key == "data.template_args" and template in ("alpaca", "raw"):
            return "These rows are written without a chat template."
        name = key.removeprefix("method.")
        if name not in (key, "name", *METHOD_KEYS.get(self.method, ())):
            return f"The method {self.method} does not read it."
        return ""

    def close(self) -> None:
        """Drop the values that the recipe does not read, and note each key of the file that is
        neither in the recipe nor noted.
        """
        unread = {key: why for key in self.values if (why := self.unread(key))}
        for key in unread:
            del self.values[key]
        for key, why in unread.items():
            for origin in self.origins[key]:
                if origin.key in self.source.keys and origin.key not in self.mentioned:
                    self.note(origin, why, differs=False)
        for key_of_file in self.source.keys.values():
            if key_of_file.key not in self.mentioned:
                why, differs = self._reason(key_of_file)
                self.note(key_of_file, why, differs=differs)

    @property
    def mentioned(self) -> set[str]:
        """The other tool's keys that a comment or a note names."""
        origins = [origin.key for key in self.values for origin in self.origins[key]]
        return {*origins, *self.notes}

    def _reason(self, key: SourceKey) -> tuple[str, bool]:
        """Return why a key of the file is not in the recipe, and whether the training differs."""
        name = without_indices(key.key)
        parts = key.value if isinstance(key.value, list) and key.value else [key.value]
        texts = [f"{name}={'' if part in _UNSET else part}" for part in parts]
        reasons = [(False, *item) for item in self.table["nothing"].items()]
        reasons += [(True, *item) for item in self.table["differs"].items()]
        for differs, why, patterns in reasons:
            whole = [pattern if "=" in pattern else f"{pattern}=*" for pattern in patterns]
            if all(any(fnmatchcase(text, pattern) for pattern in whole) for text in texts):
                # A value in the table counts also if it is false.
                is_off = key.value in (_OFF if differs else _UNSET)
                if key.value is None or (is_off and not any("=" in p for p in patterns)):
                    return "It is not set.", False
                return why, differs
        first = self.find(name)
        if name in self.table["keys"] and first is not None:
            if first.key == key.key:
                return "The command line replaces it.", False
            # A later entry of a list, or an older name.
            return f"The recipe has the value of {first.key}.", first.value != key.value
        if key.key in self.source.referenced:
            return f"It is used where ${{{key.key}}} names it.", False
        if key.value in _OFF:
            return "It is not set.", False
        return "It is unknown to tunesmith: check what it does.", True

    @property
    def comments(self) -> dict[str, str]:
        """The origins of each value as a comment."""
        comments = {}
        for key in self.values:
            parts = [f"{o.where} {o.key}: {_shown(o)}" for o in self.origins[key]]
            parts += filter(None, self.reasons[key])
            comments[key] = "; ".join(dict.fromkeys(parts)) or f"{self.source.tool}'s default"
        return comments | dict.fromkeys(self.overrides, "given on the command line")

    def tree(self) -> Node:
        """Return the recipe with the places of the other tool's file, which errors name."""
        top: dict[str, Node] = {}
        # In the order of the schema.
        for key in sorted(self.values, key=[*keys()].index):
            *sections, last = key.split(".")
            section: Any = top
            for name in sections:
                inner = Node({}, self.source.name, self.source.base)
                section = section.setdefault(name, inner).value
            in_file = [o.where for o in self.origins[key] if o.key in self.source.keys]
            where = [*in_file, self.source.name][0]
            section[last] = wrap(self.values[key], where=where, base=self.source.base)
        return Node(top, self.source.name, self.source.base)

    def text(self, tree: Node, head: str, folder: Path) -> str:
        """Return the recipe as a file in `folder`, with the origin of each value above it."""
        # In ASCII a comment has no line breaks.
        comments = {
            key: comment.encode("ascii", "backslashreplace").decode()
            for key, comment in self.comments.items()
        }
        return f"{head}\n{to_yaml(resolve_paths(tree, beside=folder).plain(), comments)}"


def length(number: float) -> str:
    """Return an interval as our unit; a number below 1 is a fraction of the run."""
    return f"{number:g} steps" if number >= 1 else f"{number * 100:g} %"


def _shown(key: SourceKey) -> str:
    """Return a value on one line, in ASCII, without secrets."""
    if any(map(is_secret_name, key.key.split("."))) and isinstance(key.value, str):
        return '"***"'
    parts = key.value if isinstance(key.value, list) else [key.value]
    shown = [mask_words([part])[0] if isinstance(part, str) else part for part in parts]
    return mask(json.dumps(shown if isinstance(key.value, list) else shown[0]))
