"""docs/measurements/systems.md: its sums are those of its rows, and every command of ours in it is one that the
command line takes.
"""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

from tunesmith.cli.main import VERBS, Parser
from tunesmith.config.load import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "measurements" / "systems.md").read_text(encoding="utf-8")
SUMMARY, *SYSTEMS = PAGE.split("\n## ")


def cells(text: str, columns: int) -> list[list[str]]:
    """The rows of the tables with so many columns, without their heads."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" |")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [row for row in rows if len(row) == columns and row[1].isdecimal()]


def test_the_sums_are_those_of_the_rows():
    summary = {name: [int(cell) for cell in rest] for name, *rest in cells(SUMMARY, 5)}
    assert len(summary) == len(SYSTEMS) == 4
    for (name, sums), system in zip(summary.items(), SYSTEMS, strict=True):
        rows = cells(system, 6)
        assert rows, name
        added = [sum(int(row[column]) for row in rows) for column in (1, 4, 2, 5)]
        assert added == sums, f"{name}: steps theirs, ours, edits theirs, ours"


def test_a_cell_with_several_commands_counts_each():
    for system in SYSTEMS:
        for *_, ours, steps, edits in cells(system, 6):
            commands = [
                part for part in re.findall(r"`([^`]+)`", ours) if re.match(r"[\w.-]+ \S", part)
            ]
            assert int(steps) >= len(commands) - ours.count("or `"), ours
            assert int(steps) or not int(edits)


def test_our_commands_are_commands():
    found = re.findall(r"`tunesmith ([^`]+)`", PAGE)
    assert len(found) > 4
    for words in map(shlex.split, found):
        verb = " ".join(words[:2]) if words[0] == "launch" else words[0]
        module = import_module(VERBS[verb][0])
        parser = Parser(prog=verb, allow_abbrev=False)
        module.add_arguments(parser)
        args = parser.parse_intermixed_args(words[len(verb.split()) :])
        if (recipe := vars(args).get("recipe")) and recipe != "my-recipe.yaml":
            load_recipe(recipe, [])


def test_the_files_that_it_names_are_here():
    named = re.findall(r"(?<![\w/])(scripts/[\w.-]+|docker/\w+)|\]\(\.\./([\w-]+\.md)", PAGE)
    assert len(named) > 5
    for file, page in named:
        assert (ROOT / file if file else ROOT / "docs" / page).is_file(), file or page
