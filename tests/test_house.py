"""The house rules that a tool can hold: one name for one thing, and that what texts name exists.

`make check` runs this file.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tunesmith.cli.main import VERBS
from tunesmith.config.methods import METHOD_FACTS

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[1] / "src" / "tunesmith"
FILES = sorted(SOURCE.rglob("*.py"))
# The interface of a verb: the command line finds these by name in its module.
VERB = {"add_arguments", "run"}


@cache
def nodes_of(file: Path) -> list[ast.AST]:
    """All nodes of a file, the module first; its statements are `nodes_of(file)[0].body`."""
    return [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]


def statements(file: Path) -> list[ast.stmt]:
    return nodes_of(file)[0].body  # type: ignore[attr-defined]


def definitions(kinds: tuple[type, ...]) -> Iterator[tuple[str, Path, ast.AST]]:
    """Top-level definitions: name, file, node."""
    for file in FILES:
        for node in statements(file):
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


def is_command(file: Path) -> bool:
    """Tell whether a module is a command's: one of cli/, or `cli.py` and `cli_*.py` of a tool."""
    return file.parts[0] == "cli" or file.stem.startswith("cli")


def test_no_two_modules_export_one_function_name():
    """A reader of `check(...)` must not have to look up whose it is."""
    functions = definitions((ast.FunctionDef, ast.AsyncFunctionDef))
    assert (
        twice(
            (name, file, node)
            for name, file, node in functions
            if not name.startswith("_") and not (is_command(file) and name in VERB)
        )
        == {}
    )


def test_only_the_table_of_methods_asks_for_the_name_of_a_method():
    """A new method is then a file of `methods/` and a row of the table."""
    places, count = [], 0
    for file in FILES:
        name = str(file.relative_to(SOURCE))
        if name.startswith("methods/"):
            continue
        for node in nodes_of(file):
            if not isinstance(node, ast.Compare):
                continue
            count += 1
            values = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            if values & METHOD_FACTS.keys() and "method" in ast.unparse(node):
                places.append(f"{name}:{node.lineno}")
    assert count > 1000
    assert places == []


# What the command line finds in the module of a command or a tool.
INTERFACE = {"COMMANDS", "EPILOG", "LOADS_TORCH"}
# A sentence that begins so has neither a verb nor a subject.
OPENERS = {"Of", "As", "What", "Whether", "Where", "How", "That"}


def constants() -> Iterator[tuple[str, str, Path]]:
    """Names of constants without their underscore, their values as written, and their files."""
    for file in FILES:
        for node in statements(file):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AnnAssign):
                targets = [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and re.fullmatch(r"_?[A-Z][A-Z0-9_]*", target.id):
                    yield target.id.lstrip("_"), ast.unparse(node.value or target), file


def test_a_constant_has_one_meaning():
    values: dict[str, dict[str, list[str]]] = {}
    for name, value, file in constants():
        places = values.setdefault(name, {}).setdefault(value, [])
        places.append(str(file.relative_to(SOURCE)))
    assert len(values) > 500
    several = {name: found for name, found in values.items() if len(found) > 1}
    assert {name: found for name, found in several.items() if name not in INTERFACE} == {}


def test_a_docstring_begins_with_a_verb_or_a_name():
    """Those that users read are left out: help pages, and what the schema says of its sections."""
    places, count = [], 0
    for file in FILES:
        for node in nodes_of(file):
            if not isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ):
                continue
            is_shown = isinstance(node, ast.Module) and is_command(file.relative_to(SOURCE))
            if is_shown or file.relative_to(SOURCE) == Path("config/schema.py"):
                continue
            docstring = ast.get_docstring(node)
            if docstring:
                count += 1
                if docstring.split()[0] in OPENERS:
                    places.append(f"{file.relative_to(SOURCE)}:{node.body[0].lineno}")
    assert count > 2000
    assert places == []


def test_a_command_that_a_text_offers_exists():
    """Such as the fix of an error: `tunesmith train my-recipe.yaml`."""
    texts = [
        node.value
        for file in FILES
        for node in nodes_of(file)
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


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_links_of_the_docs_lead_to_files_and_headings():
    root, checked = SOURCE.parents[1], 0
    for page in [*root.glob("*.md"), root / "llms.txt", *root.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if link.startswith("http"):
                continue
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
            checked += 1
    assert checked > 150


def test_the_page_for_language_models_lists_every_page_of_the_docs():
    """llms.txt, in the form of llmstxt.org: a title, a summary, and sections of links."""
    root = SOURCE.parents[1]
    text = (root / "llms.txt").read_text(encoding="utf-8")
    title, _, summary, *_ = text.splitlines()
    assert title.startswith("# ")
    assert summary.startswith("> ")
    sections = [block.split("\n", 1)[1] for block in text.split("\n## ")[1:]]
    lines = [line for section in sections for line in section.splitlines() if line]
    assert [line for line in lines if not re.fullmatch(r"- \[[^]]+\]\([^)]+\)(: .+)?", line)] == []
    links = re.findall(r"\]\(([^)]+)\)", text)
    pages = [page.relative_to(root).as_posix() for page in root.glob("docs/**/*.md")]
    assert {*pages, "README.md"} - {*links} == set()
    assert len(links) == len({*links})


def test_a_script_finds_what_it_imports_from_other_folders():
    """It is started by its path: its own folder is there, and what it adds to `sys.path` itself."""
    root, checked = SOURCE.parents[1], 0
    scripts = [*root.glob("benchmarks/*/*.py"), *root.glob("demo/*.py"), *root.glob("scripts/*.py")]
    places = defaultdict(set)
    for file in [*scripts, *root.glob("tests/*.py"), *root.glob("tests/parity/*.py")]:
        places[file.stem].add(file.parent)
    for script in scripts:
        nodes = nodes_of(script)
        added = [
            ast.unparse(node)
            for node in nodes
            if isinstance(node, (ast.Call, ast.AugAssign)) and "sys.path" in ast.unparse(node)
        ]
        imports = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        imports += [
            name.name for node in nodes if isinstance(node, ast.Import) for name in node.names
        ]
        for name in imports:
            if name not in places or script.parent in places[name]:
                continue
            folders = [
                " / ".join(map(repr, place.relative_to(root).parts)) for place in places[name]
            ]
            ends = [folder.removeprefix("'benchmarks' / ") for folder in folders]
            assert any(end in line for end in ends for line in added), f"{script}: {name}"
            checked += 1
    assert checked > 10


# Places in tests that assert words of a message; it may only fall. What is asserted are fields and
# values (`tests/errors.py`), so that a new wording breaks one test at most.
PROSE_ASSERTED = 23

# Two words in a row, neither of them a part of a path, a key or a flag.
PROSE = re.compile(r"(?<![\w/.-])[a-z]{2,} [a-z]{2,}(?![\w/.=-]*[/=_-])")
# The same in the quotes of a line that is no docstring's.
QUOTED_PROSE = re.compile(r'^(?! *"""|.*#).*["\'][^"\'\n]*[a-z]{2,} [a-z]{2,}', re.MULTILINE)
TESTS = re.compile(r"\n\n\n(?=def test_|@pytest)")
# A command that a fix names is a value.
COMMAND = re.compile(
    r"\b(tunesmith|pip|docker|vllm|hf|uv|apt-get|swarm|make|python -m|torchrun) [a-z]+( [a-z]+)?"
)
COMPARES_TEXT = {"startswith", "endswith", "count", "index", "search", "match", "fullmatch"}
COMPARES_FIELDS = {"refuses", "check_error", "check_shown"}
COMPARES_VALUES = {"holds", "lines_with", "warnings_with", "missing"}


def texts_in(node: ast.AST) -> Iterator[str]:
    """The texts that an expression is made of, without names of entries and arguments of calls."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value
        return
    parts: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.Subscript):
        parts = [node.value]
    elif isinstance(node, ast.Call):
        parts = [node.func]
    elif isinstance(node, ast.Dict):
        parts = node.values
    for part in parts:
        yield from texts_in(part)


def asserted_by_call(call: ast.Call, *, in_assert: bool) -> Iterator[ast.AST]:
    name = getattr(call.func, "attr", "") or getattr(call.func, "id", "")
    for keyword in call.keywords:
        is_pattern = keyword.arg == "match" and name == "raises"
        if is_pattern or (keyword.arg in ("names", "fix") and name in COMPARES_FIELDS):
            yield keyword.value
    if name in COMPARES_VALUES:
        yield from call.args
    elif in_assert and name in COMPARES_TEXT and isinstance(call.func, ast.Attribute):
        yield from call.args[:1]


def asserted(tree: ast.AST, *, in_assert: bool = False) -> Iterator[ast.AST]:
    """The expressions that the tests of a file look for in a text."""
    for node in ast.iter_child_nodes(tree):
        inside = in_assert or isinstance(node, ast.Assert)
        if isinstance(node, ast.Call):
            yield from asserted_by_call(node, in_assert=inside)
        elif isinstance(node, ast.Compare) and inside:
            sides = [node.left, *node.comparators]
            for operator, left, right in zip(node.ops, sides, sides[1:], strict=False):
                if isinstance(operator, ast.In | ast.NotIn):
                    yield left
                elif isinstance(operator, ast.Eq):
                    yield left
                    yield right
        yield from asserted(node, in_assert=inside)


def test_messages_are_asserted_by_their_fields():
    places, count = [], 0
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        # Parsing those alone that quote words takes half the time.
        for test in TESTS.split(file.read_text(encoding="utf-8")):
            if not QUOTED_PROSE.search(test):
                continue
            for node in asserted(ast.parse(test)):
                for text in texts_in(node):
                    count += 1
                    if PROSE.search(COMMAND.sub(" ", text)):
                        places.append(f"{file.name}: {text!r}")
    assert count > 500, "too few texts were looked at"
    assert len(places) <= PROSE_ASSERTED, "\n".join(places)


# Files that a change touches; they may only get fewer. The module of a key's effect and its test
# have no names.
MOST_FILES = {
    "A recipe key": 3,
    "A model family": 2,
    "A method": 7,
    "A data format": 5,
    "A scorer of answers": 5,
    "A storage format of the frozen base": 6,
}


def test_a_change_touches_few_places():
    page = (SOURCE.parents[1] / "docs" / "first-change.md").read_text(encoding="utf-8")
    sections = {text.splitlines()[0]: text for text in re.split(r"^## ", page, flags=re.MULTILINE)}
    for change, most in MOST_FILES.items():
        files = set(re.findall(r"`([\w/-]+\.\w+)`", sections[change]))
        assert 0 < len(files) <= most, f"{change}: {sorted(files)}"
        for item in re.split(r"^[0-9]+\. ", sections[change], flags=re.MULTILINE)[1:]:
            assert len(re.findall(r"`[\w/-]+\.\w+`", item)) <= 1, f"several places: {item}"
