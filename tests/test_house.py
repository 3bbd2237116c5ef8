"""The house rules that a tool can hold: size, one name for one thing. `make check` runs this file."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tunesmith.cli.main import VERBS

SOURCE = Path(__file__).parents[1] / "src" / "tunesmith"
FILES = sorted(SOURCE.rglob("*.py"))
LINES, FILE_LINES, FUNCTION_LINES = 30_000, 400, 60
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


def test_the_source_stays_small():
    lines = {file.relative_to(SOURCE): file.read_text(encoding="utf-8").count("\n") for file in FILES}
    assert sum(lines.values()) <= LINES
    assert {str(file): count for file, count in lines.items() if count > FILE_LINES} == {}


def test_a_function_fits_a_page():
    nodes = [(file, node) for file in FILES for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    functions = [(f, n) for f, n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert len(functions) > 500
    long = {f"{f.name}:{n.lineno} {n.name}": n.end_lineno - n.lineno + 1 for f, n in functions}
    assert {name: size for name, size in long.items() if size > FUNCTION_LINES} == {}


def test_a_command_that_a_text_offers_exists():
    """Such as the fix of an error: `tunesmith train my-recipe.yaml`."""
    nodes = [node for file in FILES for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    offered = [verb for text in texts for verb in re.findall(r"(?:^|[:;,`(\n] ?| or | then )tunesmith ([a-z]+)", text)]
    assert len(offered) > 30
    assert {*offered} - {verb.split()[0] for verb in VERBS} == set()


def test_the_files_that_the_docs_name_exist():
    """`room/file.py` is below src/tunesmith, `tests/...`, `benchmarks/...` and `src/...` below the repository."""
    root, checked = SOURCE.parents[1], 0
    for page in [root / "ARCHITECTURE.md", root / "CONTRIBUTING.md", *root.glob("docs/*.md")]:
        for name in re.findall(r"`([\w/.-]+/[\w.-]+\.(?:py|yaml|json))`", page.read_text(encoding="utf-8")):
            assert (SOURCE / name).is_file() or (root / name).is_file(), f"{page.name}: {name}"
            checked += 1
    assert checked > 40
