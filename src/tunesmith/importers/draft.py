"""A recipe on its way: values under our keys, where each came from, and what is not carried and why."""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.config.dump import to_yaml
from tunesmith.config.names import keys, other_tools, without_indices
from tunesmith.config.paths import resolve_paths
from tunesmith.config.tree import Node, scalar, wrap
from tunesmith.config.typed import literal_words, members
from tunesmith.errors import UsageError, is_secret_name, mask, mask_words
from tunesmith.importers.foreign import Foreign, Given, table
from tunesmith.units import Length

_UNSET: tuple[Any, ...] = (None, "", [], {})
_OFF = (*_UNSET, False, "no", "none", "false")


class Remark(NamedTuple):
    """A key of the other tool that the recipe has not; `differs`: what is learned may change by it."""

    key: str
    value: str
    origin: str
    why: str
    differs: bool


class Draft:
    """What is translated so far; `overrides` are the recipe keys that the command line gives, and that need no value."""

    def __init__(self, source: Foreign, overrides: Mapping[str, Any]) -> None:
        self.source, self.overrides, self.table = source, overrides, table(source.tool)
        self.defaults: dict[str, Any] = dict(self.table["defaults"])
        self.values: dict[str, Any] = {}
        self.places: dict[str, str] = {}
        self.comments: dict[str, str] = {}
        self.remarks: list[Remark] = []
        self.told: set[str] = set()  # their keys that a comment or a remark names

    def find(self, name: str) -> Given | None:
        """Their key of our common name (that of Transformers, as the tables list), given or by default; else None."""
        called = self.table["names"].get(name, name)
        called = called if isinstance(called, list) else [called]
        given, default = self.source.given, f"{self.source.tool}'s default"
        found = [given[key] for key in called if key in given]
        found += [Given(key, self.defaults[key], default) for key in called if key in self.defaults]
        return found[0] if found else None

    def get(self, name: str) -> Any:
        """Its value; where it is null or not given, the tool's default."""
        found = self.find(name)
        return None if found is None else self.defaults.get(found.key) if found.value is None else found.value

    def number(self, name: str) -> Any:
        """A value that must be a number, also one in quotes; 0 where there is none."""
        value = self.get(name)
        value = scalar(value) if isinstance(value, str) else value
        if isinstance(value, bool | str | list) or not abs(value or 0) < 1e15:
            raise self.refusal(name, "a number is expected", "write a number there")
        return value or 0

    def count(self, name: str) -> int:
        """A value that must be a whole number of at least 1; 1 where there is none."""
        if self.get(name) is None:
            return 1
        number = self.number(name)
        if number < 1 or number != int(number):
            raise self.refusal(name, "a whole number of at least 1 is expected", "write such a number there")
        return int(number)

    def listed(self, name: str) -> list[str]:
        """A value that is a list of names, or text with commas between them."""
        value = self.get(name) or []
        return [str(part).strip() for part in (value if isinstance(value, list) else str(value).split(","))]

    def given(self, name: str) -> bool:
        found = self.find(name)
        return bool(found and found.key in self.source.given and found.value is not None)

    def put(self, ours: str, value: Any, *names: str, why: str = "") -> None:
        """One key of the recipe, which follows from their keys `names`."""
        found = [one for one in map(self.find, names) if one]
        self.values[ours] = value
        self.places[ours] = next((one.where for one in found if one.key in self.source.given), self.source.name)
        said = [f"{one.where} {one.key}: {_shown(one)}" for one in found] + [why] * bool(why)
        self.comments[ours] = "; ".join(dict.fromkeys([*filter(None, [self.comments.get(ours)]), *said]))
        self.told |= {one.key for one in found}

    def remark(self, name: str, why: str, *, differs: bool = True) -> None:
        """Say why their key is not carried, or how what it does differs here."""
        if found := self.find(name):
            self.remark_given(found, why, differs=differs)

    def remark_given(self, one: Given, why: str, *, differs: bool) -> None:
        """`remark` of a key as it stands in the file, which may be spelt like our common name of another key."""
        self.told.add(one.key)
        self.remarks.append(Remark(one.key, _shown(one), one.where, why, differs))

    def refusal(self, name: str, why: str, fix: str) -> UsageError:
        found = self.find(name) or Given(name, None, self.source.name)
        return UsageError(f"{found.key}: {_shown(found)} cannot be imported", where=found.where, why=why, fix=fix)

    def carry(self, *names: str) -> None:
        """Put values that need no more than our name, our word or our unit for it."""
        for name in names:
            value, ours = self.get(name), self.table.get("ours", {}).get(name) or _our_key(name)
            hint = keys()[ours][1]
            if value is not None and (words := literal_words(hint)):
                word = str(value).rpartition(".")[2].lower()
                meant = {**other_tools("words"), **self.table.get("words", {})}.get(word, "")
                value = next((ours for ours in (word, *meant.split()) if ours in words), None)
                if value is None:
                    absent = other_tools("absent").get(word, "{} is not known here").format(word)
                    self.remark(name, f"{absent}; the recipe has {ours}: {keys()[ours][0].default}")
            elif value is not None and Length in members(hint):
                value = self.number(name)
                value = f"{value:g} steps" if value >= 1 else f"{value * 100:g} %"
            elif isinstance(value, str) and tuple[str, ...] in members(hint):
                value = self.listed(name)
            if value is not None:
                self.put(ours, value, name)

    def close(self) -> None:
        """Account for each key of the file that nothing has named."""
        known = [(kind, why, names) for kind in ("nothing", "differs") for why, names in self.table[kind].items()]
        for key in [key for key in self.source.given if key not in self.told]:
            given = self.source.given[key]
            value, plain = given.value, without_indices(key)
            found = ((kind, why) for kind, why, names in known if any(fnmatchcase(plain, name) for name in names))
            kind, why = next(found, ("differs", "not known to this import: look up what it does"))
            off = "not set" if value in _UNSET else "off, as here" if value in _OFF and kind == "differs" else ""
            self.remark_given(given, off or why, differs=kind == "differs" and not off)

    def tree(self) -> Node:
        """The recipe with the places of the other tool's file, so that an error names the line to mend."""
        root: dict[str, Any] = {}
        for key in sorted(self.values, key=["extends", *keys()].index):
            *sections, last = key.split(".")
            inside = root
            for name in sections:
                inside = inside.setdefault(name, Node({}, self.source.name, self.source.base)).value
            inside[last] = wrap(self.values[key], where=self.places[key], base=self.source.base)
        return Node(root, self.source.name, self.source.base)

    def text(self, tree: Node, head: str, folder: Path) -> str:
        """The recipe as a file in `folder`, below a comment, with the source of each value above it."""
        said = self.comments | dict.fromkeys(self.overrides, "given on the command line")
        said = {key: text.encode("ascii", "backslashreplace").decode() for key, text in said.items()}  # no line breaks
        return f"{head}\n{to_yaml(resolve_paths(tree, beside=folder).plain(), said)}"


def _our_key(name: str) -> str:
    """The recipe's key of a name that other tools use: by the list of them, or the key that ends with it."""
    meant = other_tools("keys").get(name, "").partition(":")[0]
    return meant if meant in keys() else next(key for key in keys() if key.rpartition(".")[2] == name)


def _shown(one: Given) -> str:
    """A value on one line, in ASCII; nothing of a secret."""
    if one.value and not isinstance(one.value, bool) and any(map(is_secret_name, one.key.split("."))):
        return '"***"'
    if isinstance(one.value, str):
        return json.dumps(mask_words([one.value])[0])
    if isinstance(one.value, list) and all(isinstance(item, str) for item in one.value):
        return json.dumps(mask_words(one.value))
    return mask(json.dumps(one.value))
