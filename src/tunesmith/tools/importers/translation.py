"""A recipe in the making: values under our keys, their origins, what is not carried and why."""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import JsonValue

from tunesmith.config.dump import to_yaml
from tunesmith.config.names import keys, members, nearest, other_tools, without_indices
from tunesmith.config.paths import resolve_paths
from tunesmith.config.tree import Node, wrap
from tunesmith.config.typed import literal_words
from tunesmith.errors import UsageError, is_secret_name, mask, mask_words
from tunesmith.tools.importers.source_config import SourceConfig, SourceKey, python_scalar, table
from tunesmith.units import Length

# A key of another tool that is less like one that is known is no misspelling of it.
_MISSPELT = 0.85
_UNSET: tuple[JsonValue, ...] = (None, "", [], {})
_OFF = (*_UNSET, False, "no", "none", "false")
# Texts that Transformers' parser and pydantic read as true and false.
TRUE_WORDS = ("true", "yes", "on", "t", "y", "1")
FALSE_WORDS = ("false", "no", "off", "f", "n", "0")


class Note(NamedTuple):
    """A key of the other tool that the recipe has not; `differs`: it may change what is learned."""

    key: str
    value: str
    origin: str
    why: str
    differs: bool


class Translation:
    """The translation so far.

    Names in its methods are our common names of keys: those of Transformers, as the tables list.

    Attributes:
        overrides: recipe keys that the command line gives, and that need no value.
        defaults: of the other tool.
        values, places, comments: by our key: its value, where that stands in the other tool's file,
            and what it follows from.
        mentioned: their keys that a comment or a note names.
        looked_for: their keys that may be in the file.
    """

    def __init__(self, source: SourceConfig, overrides: Mapping[str, str]) -> None:
        self.source = source
        self.overrides = overrides
        self.table = table(source.tool)
        self.defaults: dict[str, JsonValue] = dict(self.table["defaults"])
        self.values: dict[str, object] = {}
        self.places: dict[str, str] = {}
        self.comments: dict[str, str] = {}
        self.notes: list[Note] = []
        self.mentioned: set[str] = set()
        self.looked_for: set[str] = set(self.table["marks"])

    def find(self, name: str) -> SourceKey | None:
        """Their key of a common name, in the file or by default; else None."""
        names = self.table["names"].get(name, name)
        if not isinstance(names, list):
            names = [names]
        self.looked_for.update(names)
        for key in names:
            if key in self.source.keys:
                return self.source.keys[key]
        for key in names:
            if key in self.defaults:
                return SourceKey(key, self.defaults[key], f"{self.source.tool}'s default")
        return None

    def find_below(self, prefix: str) -> list[str]:
        """The keys of the file below a dotted one."""
        return [key for key in self.source.keys if key.startswith(f"{prefix}.")]

    def get(self, name: str) -> JsonValue:
        """Its value; where it is null or absent, the tool's default."""
        key = self.find(name)
        if key is None:
            return None
        return self.defaults.get(key.key) if key.value is None else key.value

    def number(self, name: str) -> int | float:
        """A value that must be a number, also one in quotes; 0 where there is none."""
        value = self.get(name)
        if isinstance(value, str):
            value = python_scalar(value)
        if value is None:
            return 0
        if isinstance(value, bool | str | list | dict) or not abs(value) < 1e15:
            raise self.error(name, "a number is expected", "write a number there")
        return value

    def count(self, name: str) -> int:
        """A value that must be a whole number of at least 1; 1 where there is none."""
        if self.get(name) is None:
            return 1
        number = self.number(name)
        if number < 1 or number != int(number):
            why = "a whole number of at least 1 is expected"
            raise self.error(name, why, "write such a number there")
        return int(number)

    def is_on(self, name: str) -> bool:
        """Tell whether a switch is on: true, or a text that the tools read as true; unset is false.

        UsageError for another value.
        """
        value = self.get(name)
        word = str(value).lower()
        if value in _UNSET or word in FALSE_WORDS:
            return False
        if word in TRUE_WORDS:
            return True
        raise self.error(name, "true or false is expected", "write one of them there")

    def listed(self, name: str) -> list[str]:
        """A value that is a list of names, or text with commas between them."""
        value = self.get(name) or []
        parts = value if isinstance(value, list) else str(value).split(",")
        return [str(part).strip() for part in parts]

    def is_set(self, name: str) -> bool:
        """Tell whether the file itself has a value, which is not null."""
        key = self.find(name)
        return key is not None and key.key in self.source.keys and key.value is not None

    def set_key(self, key: str, value: object, *names: str, why: str = "") -> None:
        """One key of the recipe, which follows from their keys `names`."""
        origins = [origin for origin in map(self.find, names) if origin is not None]
        self.values[key] = value
        self.places[key] = self.source.name
        # The place of the first of their keys that the file itself has.
        for origin in origins:
            if origin.key in self.source.keys:
                self.places[key] = origin.where
                break
        parts = [f"{origin.where} {origin.key}: {_shown(origin)}" for origin in origins]
        if self.comments.get(key):
            parts.insert(0, self.comments[key])
        if why:
            parts.append(why)
        if not parts:
            parts.append(f"{self.source.tool}'s default")
        # A key that is set twice has both reasons.
        self.comments[key] = "; ".join(dict.fromkeys(parts))
        self.mentioned.update(origin.key for origin in origins)

    def note(self, name: str, why: str, *, differs: bool = True) -> None:
        """Note why their key is not carried, or how what it does differs here."""
        key = self.find(name)
        if key is not None:
            self.note_key(key, why, differs=differs)

    def note_key(self, key: SourceKey, why: str, *, differs: bool) -> None:
        """`note` of a key as it stands in the file.

        It may be spelt like our common name of another key.
        """
        self.mentioned.add(key.key)
        self.notes.append(Note(key.key, _shown(key), key.where, why, differs))

    def error(self, name: str, why: str, fix: str) -> UsageError:
        key = self.find(name) or SourceKey(name, None, self.source.name)
        what = f"{key.key}: {_shown(key)} cannot be imported"
        return UsageError(what, where=key.where, why=why, fix=fix)

    def carry(self, *names: str) -> None:
        """Set values that need no more than our name, our word or our unit for it."""
        for name in names:
            value: object = self.get(name)
            if value is None:
                continue
            # The table of the tool, else the table of names that tools share.
            key = self.table.get("ours", {}).get(name) or _recipe_key(name)
            hint = keys()[key][1]
            if literal_words(hint):
                value = self._our_word(name, key)
            elif Length in members(hint):
                number = self.number(name)
                # A number below 1 is a share of the run there.
                value = f"{number:g} steps" if number >= 1 else f"{number * 100:g} %"
            elif isinstance(value, str) and tuple[str, ...] in members(hint):
                value = self.listed(name)
            elif isinstance(value, str) and bool in members(hint):
                value = self.is_on(name)
            elif isinstance(value, str) and str not in members(hint):
                # A number in quotes: the tools cast it.
                value = python_scalar(value)
            if value is not None:
                self.set_key(key, value, name)

    def _our_word(self, name: str, key: str) -> str | None:
        """Our word for a value of theirs; None, with a note, where there is none."""
        spec, hint = keys()[key]
        # `torch.bfloat16`: the last part is the word.
        word = str(self.get(name)).rpartition(".")[2].lower()
        meanings = {**other_tools("words"), **self.table.get("words", {})}
        for candidate in (word, *meanings.get(word, "").split()):
            if candidate in literal_words(hint):
                return candidate
        absent = other_tools("absent").get(word, "{} is not known here").format(word)
        self.note(name, f"{absent}; the recipe has {key}: {spec.default}")
        return None

    def close(self) -> None:
        """Account for each key of the file that nothing has named."""
        for name, key in self.source.keys.items():
            if name in self.mentioned:
                continue
            kind, why = self._uncarried(name)
            usual = self._usual(name)
            if usual and key.value not in (None, ""):
                # An empty list is the word "".
                parts = {part.rpartition(".")[2] for part in self.listed(name)} or {""}
                if not parts <= usual:
                    _, why = self._uncarried(name, ("differs",))
                self.note_key(key, why, differs=not parts <= usual)
            elif key.value in _UNSET and kind != "misspelt":
                self.note_key(key, "not set", differs=False)
            elif kind == "unknown" and name in self.source.referenced:
                why = f"it stands where ${{{name}}} names it"
                self.note_key(key, why, differs=False)
            elif kind in ("differs", "unknown") and key.value in _OFF:
                self.note_key(key, "off, as here", differs=False)
            else:
                self.note_key(key, why, differs=kind != "nothing")

    def _usual(self, name: str) -> set[str]:
        """The values of a key that say what is done here anyway; empty for most keys."""
        for pattern, values in self.table.get("usual", {}).items():
            if fnmatchcase(without_indices(name), pattern):
                return set(values)
        return set()

    def _uncarried(
        self, name: str, kinds: Sequence[Literal["nothing", "differs"]] = ("nothing", "differs")
    ) -> tuple[str, str]:
        """The table's entry for a key that is not carried: one of `kinds`, `misspelt` or
        `unknown`, and why.
        """
        schema_name = without_indices(name)
        choices = set(self.looked_for)
        for kind in kinds:
            for why, patterns in self.table[kind].items():
                if any(fnmatchcase(schema_name, pattern) for pattern in patterns):
                    return kind, why
                choices.update(pattern for pattern in patterns if "*" not in pattern)
        # Their key of what other tools call so: lora_r of lora_rank.
        near = self.table["names"].get(name) or nearest(name, choices, cutoff=_MISSPELT)
        if isinstance(near, list):
            near = near[0]
        if near and name not in self.looked_for | self.source.referenced:
            return "misspelt", f"unknown to tunesmith: did you mean {near}?"
        return "unknown", "unknown to tunesmith: check what it does"

    def misspelt(self) -> list[str]:
        """The misspelt keys of the file, each with the one that is most likely meant."""
        remarks = []
        for name, key in self.source.keys.items():
            kind, why = self._uncarried(name)
            if kind == "misspelt" and name not in self.mentioned:
                remarks.append(f"{name} ({key.where}) is {why}")
        return remarks

    def tree(self) -> Node:
        """The recipe with the places of the other tool's file.

        So an error names the line to fix.
        """
        root: dict[str, Node] = {}
        # In the order of the schema, `extends` first.
        for key in sorted(self.values, key=["extends", *keys()].index):
            *sections, last = key.split(".")
            section = root
            for name in sections:
                empty = Node({}, self.source.name, self.source.base)
                inner = section.setdefault(name, empty).value
                assert isinstance(inner, dict)
                section = inner
            section[last] = wrap(self.values[key], where=self.places[key], base=self.source.base)
        return Node(root, self.source.name, self.source.base)

    def text(self, tree: Node, head: str, folder: Path) -> str:
        """The recipe as a file in `folder`, below a comment, with the source of each value above
        it.
        """
        comments = self.comments | dict.fromkeys(self.overrides, "given on the command line")
        # In ASCII a comment has no line breaks.
        for key, comment in comments.items():
            comments[key] = comment.encode("ascii", "backslashreplace").decode()
        return f"{head}\n{to_yaml(resolve_paths(tree, beside=folder).plain(), comments)}"


def _recipe_key(name: str) -> str:
    """The recipe's key of a name that other tools use: as listed, or the key that ends with it."""
    key = other_tools("keys").get(name, "").partition(":")[0]
    if key in keys():
        return key
    return next(key for key in keys() if key.rpartition(".")[2] == name)


def _shown(key: SourceKey) -> str:
    """A value on one line, in ASCII; nothing of a secret."""
    is_secret = any(map(is_secret_name, key.key.split(".")))
    if is_secret and key.value and not isinstance(key.value, bool):
        return '"***"'
    if isinstance(key.value, str):
        return json.dumps(mask_words([key.value])[0])
    if isinstance(key.value, list):
        texts = [item for item in key.value if isinstance(item, str)]
        if len(texts) == len(key.value):
            return json.dumps(mask_words(texts))
    return mask(json.dumps(key.value))
