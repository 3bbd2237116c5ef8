"""The report in a real Chromium that is offline: it draws, zooms, is read by keys, and is usable
for all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from report.written import falling, write_run
from tunesmith.reader.page import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed: make cluster-tools"
)
EVIL = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of 300 steps with all that a page can hold."""
    folder = tmp_path_factory.mktemp("browser")
    samples = [
        (0, "What is 2 + 2?", "I am a model."),
        (100, "What is 2 + 2?", EVIL),
        (300, "What is 2 + 2?", "4"),
    ]

    def loss(step: int) -> float:
        return 1 + 2 / step + 0.1 * (step % 3)

    good = write_run(
        folder / "good", falling(8.0, steps=300), steps=300, samples=samples, loss=loss
    )
    recipe = {"train": {"learning_rate": 1e-3}}
    bad = write_run(
        folder / "bad",
        falling(9.0, steps=300),
        steps=300,
        samples=samples,
        loss=loss,
        recipe=recipe,
        finished=False,
    )
    (bad.folder / "failure.json").write_text(
        '{"what": "out of memory", "why": "a batch did not fit", "next": "start again"}'
    )
    (good.folder / "metrics-rank1.jsonl").write_text('{"step": 1, "memory_gib": 2.5}\n')
    bad.refresh()
    good.refresh()
    write_report([good, bad], folder / "report.html")
    return folder / "report.html"


def opened(
    browser: Any, report: Path, *, width: int = 1280, height: int = 800, scheme: str = "light"
) -> Any:
    """The page, in a context that is offline; `page.said` is what went wrong, `page.asked` what it
    asked for.
    """
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_selector("#charts .u-over")
    return page


@pytest.mark.slow
def test_it_draws_offline_and_asks_for_nothing(browser: Any, report: Path) -> None:
    page = opened(browser, report)
    assert page.locator("#charts figure").count() == 2
    assert page.asked == [report.as_uri()]
    assert page.locator("#constants dt").count() > 3
    answers = page.locator("#answers .answer .role").all_text_contents()
    assert [by.partition(", ")[0] for by in answers[1:]] == ["good", "bad"]
    assert page.locator("#answers mark").all_text_contents() == ["4", "4"]
    assert page.locator(".note.bad dd").count() == 3
    assert (page.said, page.title()) == ([], "good · bad: report")
    page.context.close()


def test_curves_are_read_by_keys_and_zoom_together(browser: Any, report: Path) -> None:
    page = opened(browser, report)
    plots, said = page.locator("#charts .plot"), page.locator("#charts output")
    plots.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert said.nth(0).text_content() == "step 1: good 3.1, bad 3.1"
    over = plots.nth(1).locator(".u-over")
    box = over.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 50, steps=3)
    page.mouse.up()
    plots.nth(0).focus()
    page.keyboard.press("Home")
    assert 145 <= int(said.nth(0).text_content().split()[1].rstrip(":")) <= 155, (
        "a zoom of one curve is that of all"
    )
    page.keyboard.press("Escape")
    page.keyboard.press("Home")
    assert said.nth(0).text_content().startswith("step 1:")
    page.keyboard.press("End")
    assert said.nth(0).text_content().startswith("step 300:")
    assert page.said == []
    page.context.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_every_screen_and_reader(
    browser: Any, report: Path, width: int, height: int, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = opened(browser, report, width=width, height=height, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
    for text in ("So far good leads", "train.learning_rate"):
        box = page.get_by_text(text).first.bounding_box()
        assert box["y"] + box["height"] <= height, f"{text}: below the first screen"
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    found = Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []
    page.context.close()
