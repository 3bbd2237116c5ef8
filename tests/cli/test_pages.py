"""The pages of docs/ beside the code they speak of: rows and what they become, words of other
tools, memory.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import versions
from packaging.version import Version

from conftest import byte_tokenizer
from tunesmith.cli.run_data import segments
from tunesmith.config.load import from_mapping
from tunesmith.config.names import keys, other_tools
from tunesmith.config.shipped import shipped
from tunesmith.data.prepare import prepare_data
from warm import run_warm

ROOT = Path(__file__).resolve().parents[2]
FORMATS = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
COMING = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8")


def examples() -> list[tuple[str, str, str]]:
    """(format, row, the text that the page says it becomes)."""
    found = []
    for section in FORMATS.split("\n## ")[1:]:
        pairs = re.findall(r"^```json\n(.*?)^```\n\n^```text\n(.*?)\n```$", section, re.M | re.S)
        found += [(section.split()[0], row, text) for row, text in pairs]
    return found


def test_every_format_has_an_example() -> None:
    formats = {"alpaca", "messages", "sharegpt", "prompt-completion", "text"}
    assert {kind for kind, _, _ in examples()} == formats


@pytest.mark.parametrize(("kind", "row", "text"), examples())
def test_a_row_becomes_the_text_beside_it(
    kind: str, row: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text(row)
    data = {"train": {"source": "rows.jsonl", "format": kind}}
    values = {"model": {"name": "none"}, "data": data, "output_dir": "runs/none"}
    tokenizer = byte_tokenizer()
    run = from_mapping(values, where="test", base=tmp_path)
    prepared = prepare_data(run, tokenizer, {tokenizer.eos_token_id}, len(tokenizer), strict=False)
    shown, inside = "", False
    for piece, supervised, _ in segments(prepared.train, tokenizer, 0):
        shown += ("⟦" if supervised else "⟧") * (supervised != inside) + piece
        inside = supervised
    assert (shown + "⟧" * inside).rstrip("\n") == text


def test_the_words_of_other_tools_are_those_that_an_error_suggests() -> None:
    """Each key in the left column that is refused names, in its error, a key of the right column."""
    suggestions, checked = other_tools("keys"), 0
    for left, right in re.findall(r"^\| (`.*?) \| (.*?) \|$", COMING, re.M):
        ours = re.findall(
            r"`((?:data|train|model|adapter|validate|checkpoint|log)\.\w+|method)", right
        )
        assert all(key in keys() for key in ours), right
        for theirs in re.findall(r"[a-z_]\w+", " ".join(re.findall(r"`(.*?)`", left))):
            if ours and theirs in suggestions:
                assert any(key in suggestions[theirs] for key in ours), (
                    f"{theirs}: {suggestions[theirs]}, not {ours}"
                )
                checked += 1
    assert checked >= 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "page"),
    [
        ("tables/memory", "memory"),
        ("tables/versions", "measurements/README"),
        ("parity/recipe_exports", "measurements/README"),
    ],
)
def test_the_table_is_what_its_benchmark_says(script: str, page: str) -> None:
    done = run_warm(
        ["--check", f"docs/{page}.md"], program=ROOT / "benchmarks" / f"{script}.py", cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_every_recipe_was_exported() -> None:
    """A new recipe is measured: `python benchmarks/parity/recipe_exports.py RECIPE`."""
    record = json.loads((ROOT / "docs/measurements/recipe-exports.json").read_text())
    assert {row["recipe"] for row in record["recipes"]} == {*shipped()}


# `make versions`, which makes the record, runs the tests that are not slow.
@pytest.mark.slow
def test_the_versions_that_were_tested_begin_at_the_lowest_that_are_allowed() -> None:
    """A floor that moves is tested anew: `make versions`."""
    sets = versions.read_record()
    assert tuple(sets) == versions.SETS
    floors = versions.lowest_versions()
    assert tuple(floors) == versions.PACKAGES
    for name, found in sets.items():
        for choice, group in zip(name.split("-"), versions.GROUPS, strict=True):
            for package in group:
                release = Version(str(found[package])).public
                assert (Version(release) == Version(floors[package])) == (choice == "lowest"), name
