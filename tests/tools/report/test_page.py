"""The page holds what it promises, nothing of a run is markup, and nothing comes from outside."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from errors import check_shown, holds, lines_with
from report.written import falling, write_run
from tunesmith.cli.main import main
from tunesmith.reader.page import PAGE_MARK, render_report, write_report
from tunesmith.reader.run_files import RunFiles
from tunesmith.run_dir import NO_FINAL_ANSWERS

EVIL = "</script><img src=x onerror=alert(1)> & \"'` | {{ 7*7 }} \u2028"


@pytest.fixture
def two(tmp_path: Path) -> list[RunFiles]:
    samples = [(0, "2 + 2?", "I am a model."), (20, "2 + 2?", "5"), (40, "2 + 2?", "4")]
    good = write_run(
        tmp_path / "good", falling(2.0), recipe={"train": {"learning_rate": 1e-3}}, samples=samples
    )
    bad = write_run(
        tmp_path / "bad",
        falling(2.5),
        samples=[(0, "2 + 2?", "I am a model."), (40, "2 + 2?", "22")],
    )
    return [good, bad]


def visible(page: str) -> str:
    """The text of a page's body, in its order."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def data_of(page: str) -> Any:
    """What the page's script draws."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data
    return json.loads(data[1])


def test_an_answer_names_its_row(two: list[RunFiles]) -> None:
    two[0].samples[0]["row"] = "faq.csv:12"
    assert data_of(render_report(two))["texts"][0]["samples"][0]["row"] == "faq.csv:12"
    assert "### Prompt 1: faq.csv:12\n" in render_report(two, markdown=True)
    # An earlier version did not write it.
    del two[0].samples[0]["row"]
    text = render_report(two, markdown=True)
    assert "### Prompt 1\n" in text


def test_a_report_shows_the_answers_of_the_final_weights(tmp_path: Path) -> None:
    samples = [(0, "2 + 2?", "I am a model."), (40, "2 + 2?", "4"), (60, "2 + 2?", "sixty")]
    best = write_run(tmp_path / "best", falling(2.0), samples=samples)
    text = render_report([best], markdown=True)
    assert "best, step 40:" in text
    assert "sixty" not in text
    assert best.missing_answers() == ""
    none = write_run(tmp_path / "none", falling(2.0), samples=samples[:1])
    reason = f"{NO_FINAL_ANSWERS}they would take 90 s, and log.sample_seconds allows 20 s"
    (none.folder / "log.txt").write_text(f"12:00:00 {reason}\n")
    none = RunFiles(none.folder)
    assert "90 s" in render_report([none], markdown=True)
    assert data_of(render_report([none]))["texts"][0]["missing"] == reason


def test_the_verdict_and_the_differing_keys_come_first(two: list[RunFiles]) -> None:
    text = visible(render_report(two))
    text = text[text.index("good is better") :]
    places = [
        text.index(word)
        for word in ("good is better", "train.learning_rate", "Side by side", "Drag over")
    ]
    assert places == sorted(places)
    assert holds(text[: places[2]], "train.learning_rate", "0.001", "0.0001")
    for words in (
        "tunesmith train 'my recipe.yaml'",
        "git -C tunesmith checkout 0123abcd && pip install ./tunesmith torch==2.13.0",
        "0123abcd+",
        "d" * 64,
        "seed 42",
    ):
        assert words in text
    texts = data_of(render_report(two))["texts"]
    assert [row["answer"] for row in texts[1]["samples"]] == ["I am a model.", "22"]
    plain = render_report(two, markdown=True)
    assert all(lines_with(plain, run, "step 40") for run in ("good", "bad"))


def test_nothing_comes_from_outside(two: list[RunFiles]) -> None:
    page = render_report(two)
    assert "default-src 'none'" in page
    without_data = re.sub(
        r"<script type=\"application/json\".*?</script>", "", page, flags=re.DOTALL
    )
    for pattern in (
        r"\bsrc\s*=",
        r"<link\b",
        r"@import",
        r"url\(",
        r"\bfetch\(",
        r"XMLHttpRequest",
        r"href=\"(?!#)",
        r"https?://",
    ):
        # The licence line of uPlot names its home.
        assert not re.search(
            pattern, without_data.replace("https://github.com/leeoniya/uPlot", "")
        ), pattern


def test_nothing_of_a_run_is_markup(tmp_path: Path) -> None:
    name = EVIL.replace("/", "\u2215")  # a folder's name holds no slash
    run = write_run(
        tmp_path / name, falling(2.0), samples=[(0, EVIL, EVIL), (40, EVIL, EVIL)], finished=False,
        env={"command": ["tunesmith", EVIL], "commit": EVIL, "cpu": EVIL, EVIL: EVIL},
    )  # fmt: skip
    (run.folder / "failure.json").write_text(
        json.dumps({"what": EVIL, "next": EVIL, "last_step": 40})
    )
    (run.folder / "log.txt").write_text(f"2026-01-31 10:00:00  warning: {EVIL}\n")
    run.refresh()
    page = render_report([run, write_run(tmp_path / "b", falling(3.0))])
    assert "<img" not in page
    assert len(re.findall(r"<script\b", page)) == len(re.findall(r"</script>", page)) == 2
    assert data_of(page)["runs"][0]["name"] == name
    assert "{{ 7*7 }}" in page, "no template runs in what a run says"
    text = render_report([run], markdown=True)
    assert not re.search(r"(?<!\\)<img", re.sub(r"(`{3,})text\n.*?\n\1", "", text, flags=re.DOTALL))


@pytest.mark.slow
def test_how_a_run_failed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", finished=False, steps=7)
    assert holds(render_report([run], markdown=True), "killed", "tunesmith train")
    note = {
        "process": 7,
        "host": "spark-b",
        "boot": "",
        "oom_kills": 0,
        "began": "2026-01-31 10:00:00",
    }
    (run.folder / "running.json").write_text(json.dumps(note))
    text = render_report([run], markdown=True)
    assert "| where | process 7 on spark-b" in text
    assert "| cause | killed |" in text
    failure = {
        "what": "a link broke",
        "where": "step 8",
        "why": "",
        "cause": "link",
        "rank": 1,
        "host": "spark-b",
        "phase": "training",
        "collective": None,
        "last_step": 7,
        "next": "tunesmith doctor   # looks at it",
    }
    (run.folder / "failure.json").write_text(json.dumps(failure))
    run.refresh()
    text = render_report([run], markdown=True).replace("\\", "")
    for field, value in failure.items():
        words = str(value).partition("   #")[0]
        assert not value or f"| {field.replace('_', ' ')} | {words}" in text
    assert data_of(render_report([run]))["runs"][0]["end"]["cause"] == "link"


def test_a_profile(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run.folder / "profile").mkdir()
    summary = {
        "operations": [{"name": "aten::mm", "calls": 12, "ms": 34.56, "share": 0.75}],
        "gpu_busy_share": 0.875,
        "peak_bytes": {"GPU 0": 3 << 29},
    }
    (run.folder / "profile" / "summary-rank0-1.json").write_text(json.dumps(summary))
    (run.folder / "profile" / "summary-rank1-1.json").write_text("{cut")
    run.refresh()
    assert [file.file for file in run.damaged] == ["profile/summary-rank1-1.json"]
    text = visible(render_report([run]))
    assert "87.5 %" in text
    assert "Peak on GPU 0: 1.50 GiB." in text
    assert "aten::mm 34.6 75.0 % 12" in text
    assert "| aten::mm | 34.6 | 75.0 % | 12 |" in render_report([run], markdown=True)


def test_ranks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=2)
    (run.folder / "metrics-rank1.jsonl").write_text(
        '{"step": 1, "gpu_clock_mhz": 1000.0}\n{"step": 2, "gpu_clock_mhz": 2000.0}\n'
    )
    run.refresh()
    clocks = next(
        chart for chart in data_of(render_report([run]))["curves"] if chart["title"] == "GPU clock"
    )
    assert [(row["rank"], row["y"]) for row in clocks["series"]] == [(1, [1000.0, 2000.0])]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("2026-01-31 10:00:00  loading\n")
    for markdown in (False, True):
        page = render_report([RunFiles(tmp_path)], markdown=markdown)
        assert lines_with(page.replace("\\", ""), "without", "val_loss")


@pytest.mark.slow
def test_many_runs_of_many_steps_stay_small(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / f"run-{i}",
            falling(2.0 - i / 10),
            steps=3000,
            recipe={"train": {"learning_rate": 10.0**-i}},
        )
        for i in range(1, 6)
    ]
    page = render_report(runs)
    assert len(page) < 1_500_000
    text = visible(page)
    assert "5 runs" in text
    board = text[text.index("Side by side") :]
    assert board.index("run-5") < board.index("run-1"), "the lowest val_loss first"


@pytest.mark.slow
def test_the_command(
    two: list[RunFiles],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # a report is written over
        assert main(["report", "good", "bad"]) == 0
        assert lines_with(capsys.readouterr().out, "good", "bad", "val_loss")
    assert main(["report", "good"]) == 0
    assert lines_with(capsys.readouterr().out, "report.html")
    assert PAGE_MARK in Path("report.html").read_text()[:100]
    assert main(["report", "good", "bad", "--markdown"]) == 0
    assert "**good " in Path("report.md").read_text()
    Path("notes.html").write_text("mine")
    assert main(["report", "good", "--output", "notes.html"]) == 2
    assert Path("notes.html").read_text() == "mine"
    assert main(["report", "nothing"]) == 2
    assert main(["report", "good", "--output", "no/such/folder.html"]) == 2
    check_shown(capsys.readouterr().err, where="no/such/folder.html", fix=["--output"])


def test_markdown_tables_are_whole(two: list[RunFiles], tmp_path: Path) -> None:
    lines = render_report(two, markdown=True).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) > 20
    for line in tables:
        assert line.count("|") - line.count("\\|") == 4, line
    write_report(two, tmp_path / "r.md", markdown=True, note="Chosen from 8 candidates.")
    assert "Chosen from 8 candidates." in (tmp_path / "r.md").read_text()
