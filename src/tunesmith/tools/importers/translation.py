"""State of a translation from another tool's configuration to a recipe.

It holds the values of recipe keys, their origins, and notes on keys that are not in the recipe.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import JsonValue

from tunesmith.config.dump import to_yaml
from tunesmith.config.layers import merge_layers
from tunesmith.config.methods import DEFAULT_METHOD, METHOD_FACTS
from tunesmith.config.names import keys, members, other_tools, without_indices
from tunesmith.config.paths import relative_paths, resolve_paths
from tunesmith.config.typed import literal_words
from tunesmith.config.yaml_file import RecipeLayer, as_json, read_value, scalar
from tunesmith.errors import UsageError, is_secret_name, mask_words
from tunesmith.tools.importers.source_config import SourceConfig, SourceKey, table
from tunesmith.units import Length, Share

_UNSET: tuple[JsonValue, ...] = (None, "", [], {})
_OFF = (*_UNSET, False, "no", "none", "false")
# Words that Transformers' parser and pydantic accept as booleans.
_TRUTH = dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True)
_TRUTH |= dict.fromkeys(("false", "no", "off", "f", "n", "0"), False)


class Note(NamedTuple):
    """Note about a key of the other tool that has no equivalent in the recipe.

    Attributes:
        differs: whether the training may differ, because the recipe does not have the key.
    """

    key: str
    value: str
    origin: str
    why: str
    differs: bool


class Translation:
    """Recipe that is built from another tool's configuration, with the origin of each value.

    The parameter `name` of the methods is either a key of the other tool, or a target. Targets are
    the values in the section `keys` of the tool's translation table. A target is a recipe key, or
    a quantity such as `rows`.

    Attributes:
        overrides: recipe keys from the command line.
        defaults: the other tool's default values, by its keys.
        names: target -> keys of the other tool that set it.
        values: recipe key -> value.
        origins: recipe key -> keys of the other tool from which its value is derived.
        reasons: recipe key -> explanations of its value, if the value is not simply copied.
        notes: key of the other tool -> note.
    """

    def __init__(self, source: SourceConfig, overrides: Mapping[str, Any]) -> None:
        self.source = source
        self.overrides = overrides
        self.table = table(source.tool)
        self.defaults: dict[str, JsonValue] = dict(self.table["defaults"])
        self.names: dict[str, list[str]] = defaultdict(list)
        for theirs, ours in self.table["keys"].items():
            self.names[ours].append(theirs)

        self.values: dict[str, Any] = {}
        self.origins: dict[str, list[SourceKey]] = defaultdict(list)
        self.reasons: dict[str, list[str]] = defaultdict(list)
        self.notes: dict[str, Note] = {}

    def find(self, name: str) -> SourceKey | None:
        """Return a key of the file. If the file does not have it, return its default, or None.

        For example, `find("model.name")` returns the key `base_model` of an Axolotl file.
        """
        names = []
        for key in self.names.get(name, [name]):
            # A key such as `dataset.packed` can also be in the first entry of a list, as
            # `dataset.0.packed`.
            names += [key, key.replace(".", ".0.", 1)]

        for key in names:
            if key in self.source.keys:
                return self.source.keys[key]
        for key in names:
            if key in self.defaults:
                return SourceKey(key, self.defaults[key], f"{self.source.tool}'s default")
        return None

    def matching(self, pattern: str) -> list[str]:
        """Return the keys of the file that match a pattern such as `datasets.*`.

        List indices are removed before a key is compared.
        """
        return [key for key in self.source.keys if fnmatchcase(without_indices(key), pattern)]

    def get(self, name: str) -> JsonValue:
        """Return the value of a key. If the key is missing or null, return its default value."""
        key = self.find(name)
        if key is None:
            return None
        if key.value is None:
            return self.defaults.get(key.key)
        return key.value

    def number(self, name: str) -> int | float:
        """Return the value of a key as a number, or 0 if the key is not set.

        In the file, the number may be in quotes.
        """
        value = self.get(name)
        number = 0 if value is None else scalar(str(value).replace("_", ""))
        if isinstance(number, bool | str | None) or not abs(number) < 1e15:
            raise self.error(name, "the value must be a number", "set the key to a number")
        return number

    def count(self, name: str) -> int:
        """Return the value of a key as an integer of at least 1. Return 1 if the key is not set."""
        if self.get(name) is None:
            return 1
        number = self.number(name)
        if number < 1 or number % 1:
            raise self.error(
                name, "the value must be a whole number above 0", "set the key to a whole number"
            )
        return int(number)

    def listed(self, name: str) -> list[str]:
        """Return the value of a key as a list of names. A text is split at commas."""
        value = self.get(name) or []
        parts = value if isinstance(value, list) else str(value).split(",")
        return [str(part).strip() for part in parts]

    def is_set(self, name: str) -> bool:
        """Return whether the file has this key with a value other than null."""
        key = self.find(name)
        return key is not None and key.key in self.source.keys and key.value is not None

    def has(self, name: str, expected: JsonValue) -> bool:
        """Return whether a key of the file or of the recipe has the expected value.

        If `expected` is a text, the value must contain it. "yes" and "on" are read as "true". If
        `expected` is a number or null, the value must be equal.
        """
        value = self.overrides.get(name, self.values.get(name, self.get(name)))
        if value is None or expected is None:
            return value is expected
        text = str(value).lower()
        if isinstance(expected, int | float):
            return scalar(text) == expected
        return str(expected) in str(_TRUTH.get(text, text)).lower()

    @property
    def method(self) -> str:
        return str(
            self.overrides.get("method.name", self.values.get("method.name", DEFAULT_METHOD))
        )

    def set_key(self, key: str, value: object, *names: str, why: str = "") -> None:
        """Set a recipe key whose value is derived from the other tool's keys `names`."""
        self.values[key] = value
        self.origins[key] += filter(None, map(self.find, names))
        self.reasons[key].append(why)

    def note(self, name: str | SourceKey, why: str, *, differs: bool = True) -> None:
        """Add a note that says why a key is not in the recipe, or how its effect differs."""
        key = self.find(name) if isinstance(name, str) else name
        if key is not None:
            self.notes.setdefault(key.key, Note(key.key, _shown(key), key.where, why, differs))

    def error(self, name: str, why: str, fix: str) -> UsageError:
        key = self.find(name) or SourceKey(name, None, self.source.name)
        return UsageError(
            f"{key.key}: {_shown(key)} cannot be imported", where=key.where, why=why, fix=fix
        )

    def copy_values(self) -> None:
        """Set all recipe keys whose values can be copied, unchanged or with another word or unit.

        The section `keys` of the translation table lists these recipe keys.
        """
        for key in self.names:
            if key in keys() and key != "adapter.target":
                value = self.converted(key, key)
                if value is not None:
                    self.set_key(key, value, key)

    def converted(self, key: str, name: str) -> Any:
        """Return the value of `name` with the word or the unit that the recipe key `key` has.

        Return None if there is no value, or if it is not positive but the recipe key must be.
        """
        value = self.get(name)
        types = members(keys()[key][1])
        if value is None:
            return None
        if Length in types:
            return _amount(self.number(name), "steps")
        if Share in types or key.startswith("parallel."):
            # The values -1 and 0 mean that the other tool chooses the number, or holds out no row.
            number = self.number(name)
            if number <= 0:
                return None
            return _amount(number, "examples") if Share in types else number
        if literal_words(keys()[key][1]):
            return self._recipe_word(key)
        if isinstance(value, str):
            if tuple[str, ...] in types:
                return self.listed(name)
            if bool in types:
                return _TRUTH.get(value.lower(), value)
            if str not in types:
                # Convert a number in quotes to a number, because the other tools do so.
                return scalar(value.replace("_", ""))
        return value

    def _recipe_word(self, key: str) -> str | None:
        """Return the recipe's word for the value of a key.

        If there is no such word, add a note and return None.
        """
        spec, hint = keys()[key]
        # Use only the last part of values such as `torch.bfloat16`.
        word = str(self.get(key)).rpartition(".")[2].lower()
        # Words in the tool's table have priority over the common words for all tools.
        meanings = other_tools("words") | self.table.get("words", {})
        candidates = [word, *meanings.get(word, "").split()]
        for candidate in candidates:
            if candidate in literal_words(hint):
                return candidate

        absent = other_tools("absent").get(word, "{} is unknown to tunesmith").format(word)
        self.note(key, f"{absent}; the recipe has {key}: {spec.default}")
        return None

    def why_ignored(self, key: str) -> str:
        """Return why a recipe key is not written to the recipe, or "" if it is written."""
        if key in self.overrides and key != "method.name":
            return "The command line replaces this key."
        names_rows = key.startswith(("data.train.", "data.validation."))
        if names_rows and "data.train.source" in self.overrides:
            return "The data set on the command line replaces this key."
        if (
            key.startswith("adapter.")
            and key != "adapter.kind"
            and self.has("adapter.kind", "none")
        ):
            return "No adapter is trained."
        name = key.removeprefix("method.")
        if name not in (key, "name", *METHOD_FACTS[self.method].keys):
            return f"The method {self.method} does not use this key."
        return ""

    def finish(self) -> None:
        """Finish the translation: remove unused recipe keys, and add the missing notes.

        A recipe key is removed if the command line replaces it, or if the recipe, with its other
        values, does not read it. Each key of the file that is neither in the recipe nor noted yet
        gets a note.
        """
        ignored: dict[str, str] = {}
        for key in list(self.values):
            why = self.why_ignored(key)
            if why:
                del self.values[key]
                ignored |= {origin.key: why for origin in self.origins[key]}
        mentioned = self.mentioned
        for name, key_of_file in self.source.keys.items():
            if name in ignored.keys() - mentioned:
                self.note(key_of_file, ignored[name], differs=False)
            elif name not in mentioned:
                why, differs = self._why_absent(key_of_file)
                self.note(key_of_file, why, differs=differs)

    @property
    def mentioned(self) -> set[str]:
        """Keys of the other tool that a comment or a note mentions."""
        origins = [origin.key for key in self.values for origin in self.origins[key]]
        return {*origins, *self.notes}

    def _why_absent(self, key: SourceKey) -> tuple[str, bool]:
        """Return why a key is not in the recipe, and whether this can change the training."""
        name = without_indices(key.key)
        value = key.value
        if value is None:
            return "This key is not set.", False
        parts = value if isinstance(value, list) and value else [value]
        texts = [f"{name}={'' if part in _UNSET else part}" for part in parts]
        for part in ("nothing", "differs"):
            # Keys that are off do not differ, except for patterns with a value.
            is_off = part == "differs" and value in _OFF
            for why, patterns in self.table[part].items():
                whole = [p if "=" in p else f"{p}=*" for p in patterns if "=" in p or not is_off]
                if all(any(fnmatchcase(text, pattern) for pattern in whole) for text in texts):
                    return why, part == "differs"

        first = self.find(self.table["keys"].get(name, ""))
        if first is not None:
            if first.key == key.key:
                return "The command line replaces this key.", False
            # The key belongs to a later entry of a list, or it is an older name of the same
            # setting.
            return f"The recipe has the value of {first.key}.", first.value != value

        if key.key in self.source.referenced:
            return f"Other keys refer to this key as ${{{key.key}}}.", False
        if value in _OFF:
            return "This key is not set.", False
        return "This key is unknown to tunesmith: check what it does.", True

    @property
    def comments(self) -> dict[str, str]:
        """Recipe key -> comment that names the origins of the value."""
        comments = {}
        for key in self.values:
            parts = [f"{item.where} {item.key}: {_shown(item)}" for item in self.origins[key]]
            # A dict removes duplicate parts and keeps their order.
            unique = dict.fromkeys(filter(None, parts + self.reasons[key]))
            comments[key] = "; ".join(unique) or f"{self.source.tool}'s default"
        return comments | dict.fromkeys(self.overrides, "given on the command line")

    def layer(self) -> RecipeLayer:
        """Return the recipe as a layer.

        The position of a value is a line of the other tool's file, so that errors in the recipe
        point to this file.
        """
        name = self.source.name
        layer = RecipeLayer({}, {"": name})
        # Sort the keys by the order of the schema.
        for key in sorted(self.values, key=list(keys()).index):
            # Use the position of the first origin that is in the file.
            in_file = (origin for origin in self.origins[key] if origin.key in self.source.keys)
            where = next((origin.where for origin in in_file), name)
            layer = merge_layers(layer, read_value(as_json(self.values[key]), key, where))
        return resolve_paths(layer, self.source.base)

    def text(self, layer: RecipeLayer, head: str, folder: Path) -> str:
        """Return the text of the recipe file, which will be written to `folder`.

        Above each value, a comment names the origin of the value.
        """
        # Escape characters outside ASCII, some of which YAML readers take for line breaks.
        comments = {}
        for key, comment in self.comments.items():
            comments[key] = comment.encode("ascii", "backslashreplace").decode()
        return f"{head}\n{to_yaml(relative_paths(layer.values, folder), comments)}"


def _amount(number: float, unit: str) -> str:
    """Return an amount in the recipe's notation. A number below 1 is a fraction of the whole."""
    return f"{number:g} {unit}" if number >= 1 else f"{number * 100:g} %"


def _shown(key: SourceKey) -> str:
    """Return the value of a key as text for a comment: one line, in ASCII and without secrets."""
    is_secret = any(map(is_secret_name, key.key.split(".")))
    shown = [
        mask_words(["***" if is_secret else value])[0] if isinstance(value, str) else value
        for value in (key.value if isinstance(key.value, list) else [key.value])
    ]
    return json.dumps(shown if isinstance(key.value, list) else shown[0])
