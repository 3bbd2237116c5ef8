"""The house rules that a tool can hold: one name for one thing, and that what texts name exists.

`make check` runs this file.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.cli.main import VERBS

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[1] / "src" / "tunesmith"
FILES = sorted(SOURCE.rglob("*.py"))
# The interface of a verb: the command line finds these by name in each file of cli/.
VERB = {"add_arguments", "run"}


def definitions(kinds: tuple[type, ...]) -> Iterator[tuple[str, Path, ast.AST]]:
    """Top-level definitions: name, file, node."""
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, kinds):
                yield node.name, file.relative_to(SOURCE), node


def twice(names: Iterator[tuple[str, Path, ast.AST]]) -> dict[str, list[str]]:
    places = defaultdict(list)
    for name, file, _ in names:
        places[name].append(str(file))
    assert len(places) > 100, "too few names were looked at"
    return {name: files for name, files in places.items() if len(files) > 1}


def test_a_class_name_occurs_once():
    assert twice(definitions((ast.ClassDef,))) == {}


def test_no_two_modules_export_one_function_name():
    """A reader of `check(...)` must not have to look up whose it is."""
    functions = definitions((ast.FunctionDef, ast.AsyncFunctionDef))
    assert (
        twice(
            (name, file, node)
            for name, file, node in functions
            if not name.startswith("_") and not (file.parts[0] == "cli" and name in VERB)
        )
        == {}
    )


def test_a_command_that_a_text_offers_exists():
    """Such as the fix of an error: `tunesmith train my-recipe.yaml`."""
    nodes = [
        node for file in FILES for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]
    texts = [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    offered = [
        verb
        for text in texts
        for verb in re.findall(r"(?:^|[:;,`(\n] ?| or | then )tunesmith ([a-z]+)", text)
    ]
    assert len(offered) > 30
    assert {*offered} - {verb.split()[0] for verb in VERBS} == set()


def test_the_files_that_the_docs_name_exist():
    """`room/file.py` is below src/tunesmith, `tests/...`, `benchmarks/...` and `src/...` below the
    repository.
    """
    root, checked = SOURCE.parents[1], 0
    for page in [root / "ARCHITECTURE.md", root / "CONTRIBUTING.md", *root.glob("docs/*.md")]:
        for name in re.findall(
            r"`([\w/.-]+/[\w.-]+\.(?:py|yaml|json))`", page.read_text(encoding="utf-8")
        ):
            assert (SOURCE / name).is_file() or (root / name).is_file(), f"{page.name}: {name}"
            checked += 1
    assert checked > 40


# Each says that something was done, and not what is in there; or has a word of the field in its place.
BANNED = {
    "found": "the content: match, losses, checkpoint",
    "made": "the content: recipe, plan, text",
    "told": "reported_keys, or the content",
    "given": "overrides, option, or the content",
    "known": "the content: names, sizes",
    "held": "the content: rows, lock",
    "asked": "request, or the content",
    "teller": "reporter",
    "leads": "is_main_process",
    "seal": "commit",
    "mend": "fix",
    "wobble": "validation_noise",
    "cut_model": "apply_tensor_parallel",
    "materialise": "materialize",
    "Shortage": "LowMemory",
}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Variables, arguments, attributes, functions and classes, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno


def test_names_say_what_is_in_them():
    """A list of identifiers that are not to come back, and what to write in their place."""
    places = []
    for file in FILES:
        for name, line in identifiers(ast.parse(file.read_text(encoding="utf-8"))):
            is_refusal = name.lstrip("_").startswith("refuse_")
            if name in BANNED or is_refusal:
                instead = BANNED.get(name, "check_... or require_...")
                places.append(f"{file.relative_to(SOURCE)}:{line}: {name}; instead: {instead}")
    assert places == []
