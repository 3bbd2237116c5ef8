"""The pages of docs/ beside the code: rows and what they become, words of other tools, tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import byte_tokenizer
from tunesmith.cli.run_data import segments
from tunesmith.config.load import from_mapping
from tunesmith.start.prepare import prepare_data
from warm import run_warm

ROOT = Path(__file__).resolve().parents[2]
FORMATS = (ROOT / "docs/formats.md").read_text(encoding="utf-8")


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
    run, tokenizer = from_mapping(values, where="test", base=tmp_path), byte_tokenizer()
    prepared = prepare_data(run, tokenizer, {tokenizer.eos_token_id}, len(tokenizer), strict=False)
    shown, inside = "", False
    for piece, supervised, _ in segments(prepared.train, tokenizer, 0):
        shown += ("⟦" if supervised else "⟧") * (supervised != inside) + piece
        inside = supervised
    assert (shown + "⟧" * inside).rstrip("\n") == text


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md", "docs/first-change.md"])
def test_names_of_code_in_a_page_exist(page: str) -> None:
    texts: list[Path] = []
    for folder in ("src", "tests", "benchmarks"):
        texts += (ROOT / folder).rglob("*.py")
    words = {
        word for path in texts for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))
    }
    missing = []
    for span in re.findall(r"`([^`\n]+)`", (ROOT / page).read_text(encoding="utf-8")):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*\.(py|yaml|md|sh|jsonl?)", span):
            places = [ROOT / span, ROOT / "src/tunesmith" / span, ROOT / "docs" / span]
            known = any(place.exists() for place in places) or Path(span).name == span
            missing += [] if known else [span]
            continue
        for word in re.findall(r"(?<![\w.<-])[A-Za-z_]\w*", span):
            is_code = re.search(r"\w_\w|^_\w|[a-z][A-Z]", word)
            missing += [word] if is_code and word not in words else []
    assert missing == []


# GitHub's column shows about 100 characters of a line of code.
def test_no_line_of_code_in_the_readme_is_cut() -> None:
    blocks = re.findall(
        r"^```.*?^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
    )
    assert [line for block in blocks for line in block.splitlines() if len(line) > 100] == []


@pytest.mark.slow
@pytest.mark.parametrize("script", ["tables/memory", "tables/versions", "parity/recipe_exports"])
def test_the_table_is_what_its_benchmark_says(script: str) -> None:
    page = "docs/memory.md" if script == "tables/memory" else "docs/measurements/README.md"
    program = ROOT / "benchmarks" / f"{script}.py"
    done = run_warm(["--check", page], program=program, cwd=ROOT)
    assert done.returncode == 0, done.stderr
