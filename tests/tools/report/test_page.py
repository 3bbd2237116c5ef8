"""The page holds what it promises, nothing of a run is markup, and nothing comes from outside."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from errors import check_shown, holds, lines_with
from invoke import invoke
from report.written import eval_scores, falling, write_eval, write_run
from tunesmith.run_dir import NO_FINAL_ANSWERS
from tunesmith.tools.report.page import PAGE_MARK, render_page

EVIL = "</script><img src=x onerror=alert(1)> & \"'` | {{ 7*7 }} \u2028"
SAMPLES = [(0, "2 + 2?", "I am a model."), (40, "2 + 2?", "4"), (60, "2 + 2?", "sixty")]


def visible(page: str) -> str:
    """The text of a page's body, in its order."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.mark.slow
def test_the_page_shows_the_answers_of_the_final_weights(tmp_path: Path) -> None:
    best = write_run(tmp_path / "best", falling(2.0), samples=SAMPLES)
    text = visible(render_page([best]))
    assert holds(text, "step 40, final", "weights 4 Other answers", "(1) step 60 sixty")
    assert best.missing_answers() == ""
    none = write_run(tmp_path / "none", falling(2.0), samples=SAMPLES[:1])
    assert f"none: {NO_FINAL_ANSWERS}see log.txt." in visible(render_page([best, none]))
    unfinished = write_run(tmp_path / "unfinished", samples=SAMPLES[:2], finished=False)
    text = visible(render_page([unfinished]))
    assert unfinished.missing_answers()
    assert holds(text, f"unfinished: {unfinished.missing_answers()}", "step 40 4")


def test_the_page_says_how_to_reproduce_and_nothing_comes_from_outside(tmp_path: Path) -> None:
    rate = {"train": {"learning_rate": 1e-3}}
    good = write_run(tmp_path / "good", falling(2.0), recipe=rate, samples=SAMPLES)
    page = render_page([good, write_run(tmp_path / "bad", falling(2.5))])
    text = visible(page)
    assert holds(text[text.index("learning_rate") :], "0.001", "0.0001")
    assert holds(text, "tunesmith train 'my recipe.yaml'", "0123abcd+", "d" * 64, "seed 42")
    assert "default-src 'none'" in page
    page = re.sub(r"<script type=\"application/json\".*?</script>", "", page, flags=re.DOTALL)
    # The licence line of uPlot names its home.
    page = page.replace("https://github.com/leeoniya/uPlot", "")
    loads = r"\bsrc\s*=|<link\b|@import|url\(|\bfetch\(|XMLHttpRequest|href=\"(?!#)|https?://"
    assert not re.search(loads, page)


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
    write_eval(run.folder, eval_scores(data=EVIL))
    run.refresh()
    page = render_page([run, write_run(tmp_path / "b", falling(3.0))])
    assert "<img" not in page
    assert len(re.findall(r"<script\b", page)) == len(re.findall(r"</script>", page)) == 2
    assert html.escape(name, quote=False).replace("'", "&#39;").replace('"', "&#34;") in page
    assert "{{ 7*7 }}" in page, "no template runs in what a run says"


@pytest.mark.slow
def test_how_a_run_failed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", finished=False, steps=7)
    assert holds(visible(render_page([run])), "killed", "tunesmith train")
    failure = {"what": "a link broke", "where": "step 8", "why": "", "cause": "link", "rank": 1, "host": "spark-b",
               "phase": "training", "collective": None, "last_step": 7, "next": "tunesmith doctor   # looks at it"}  # fmt: skip
    (run.folder / "failure.json").write_text(json.dumps(failure))
    run.refresh()
    text = visible(render_page([run]))
    for field, value in failure.items():
        words = str(value).partition("   #")[0]
        assert not value or f"{field.replace('_', ' ')} {words}" in text


@pytest.mark.slow
def test_the_command_writes_over_a_report_and_over_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "good", falling(2.0))
    for _ in range(2):
        assert lines_with(invoke("report", "good").out, "report.html")
    assert PAGE_MARK in Path("report.html").read_text()[:100]
    Path("notes.html").write_text("mine")
    for output in ("notes.html", "no/such/folder.html"):
        done = invoke("report", "good", "--output", output)
        assert done.code == 2
        check_shown(done.err, fix=["--output"])
    assert Path("notes.html").read_text() == "mine"
