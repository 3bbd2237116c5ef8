"""The page in a real Chromium: offline, on a phone, and while `tunesmith watch` serves it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from errors import holds
from report.written import falling, write_run
from tunesmith.tools.report.page import write_report
from watching import add_steps, watching
from watching import write_run as write_watched

pytestmark = pytest.mark.nightly

FAILURE = {"what": "out of memory", "why": "a batch did not fit", "next": "start again"}
EVIL = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
)
CHROMIUM = Path("/usr/bin/chromium")


class Visit:
    """A page that is open: `page` is playwright's; `asked` the addresses it requested, `said` its
    console's messages.
    """

    def __init__(self, page: Any) -> None:
        self.page, self.asked, self.said = page, list[str](), list[str]()
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there: make cluster-tools")
    with playwright.sync_playwright() as started:
        # In a container root may not make Chromium's sandbox.
        opened = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Any:
    """Opens an address; at the end, nothing was asked of another host, and no error was said."""

    @contextmanager
    def opening(
        address: str, *, width: int = 1280, scheme: str = "light", offline: bool = False
    ) -> Iterator[Visit]:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=offline
        )
        context.set_default_timeout(120_000)
        seen = Visit(context.new_page())
        try:
            seen.page.goto(address)
            seen.page.wait_for_selector(".chart canvas")
            yield seen
        finally:
            context.close()
        assert {urlsplit(url).netloc for url in seen.asked} == {urlsplit(address).netloc}
        assert seen.said == []

    return opening


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs of 300 steps, one of which failed and was not validated at the end."""
    folder = tmp_path_factory.mktemp("browser")
    asked = "What is 2 + 2?"
    samples = [(0, asked, "I am a model."), (100, asked, EVIL), (300, asked, "4")]
    changes = {"steps": 300, "samples": samples, "loss": lambda s: 1 + 2 / s + 0.1 * (s % 3)}
    good = write_run(folder / "good", falling(8.0, steps=300), **changes)
    rate = {"train": {"learning_rate": 1e-3}}
    bad = write_run(folder / "bad", falling(9.0, steps=200), recipe=rate, finished=False, **changes)
    (bad.folder / "failure.json").write_text(json.dumps(FAILURE))
    bad.refresh()
    write_report([good, bad], folder / "report.html")
    return folder / "report.html"


def drag(page: Any, start: float, end: float) -> None:
    """Zoom by a drag over the first chart between two fractions of its width."""
    box = page.locator(".chart .u-over").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * start, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * end, box["y"] + 50, steps=3)
    page.mouse.up()


def pointed_steps(page: Any) -> list[int]:
    """The steps in the legends of the first two charts, under the pointer at the left edge."""
    over = page.locator(".chart .u-over").first
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    page.mouse.move(box["x"] + 1, box["y"] + 50)
    rows = [legend_parts(page, title)[-1] for title in ("loss", "val_loss")]
    return [step for _, step in rows]


def legend_parts(page: Any, title: str) -> list[tuple[str, int]]:
    """The name with its value, and the step, of each row of a legend but that of the steps."""
    chart = page.locator(".chart", has=page.locator(f"figcaption:text-is('{title}')"))
    rows = [row.text_content() for row in chart.locator(".u-legend tr").all()[1:]]
    parts = [re.sub(r"\s+", " ", row).rpartition(" at step ") for row in rows]
    return [(name, int(step)) for name, _, step in parts]


def test_it_draws_offline_and_a_zoom_is_that_of_all_charts(report: Path, visit: Any) -> None:
    with visit(report.as_uri(), offline=True) as seen:
        page = seen.page
        names = [f"{run}{value}" for run in ("good", "bad") for value in (", raw1.007", "1.094")]
        assert legend_parts(page, "loss") == [(name, 300) for name in names]
        # The failed run was validated for the last time at step 200.
        assert legend_parts(page, "val_loss") == [("good0.49", 300), ("bad4.01", 200)]
        answers = page.locator("#samples .answers").first.text_content()
        assert holds(answers, "step 300, final")
        assert "weights4" in answers
        assert "bad: " in page.text_content("#samples")
        assert page.locator(".note.bad dd").all_text_contents()[0] == FAILURE["what"]
        assert seen.asked == [report.as_uri()]
        assert page.title() == "good · bad: report"
        drag(page, 0.5, 0.75)
        assert all(140 <= step <= 160 for step in pointed_steps(page))
        page.locator(".chart .u-over").first.dblclick()
        assert pointed_steps(page)[0] < 10


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_every_screen_and_reader(report: Path, visit: Any, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with visit(report.as_uri(), width=width, scheme=scheme, offline=True) as seen:
        page = seen.page
        assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        found = axe.run(page).response
        assert len(found["passes"]) > 20  # it has looked
        assert [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]] == []


def test_a_served_page_follows_its_run(tmp_path: Path, visit: Any) -> None:
    """What a reader has opened stays open, a zoom stays, and the end of the command is shown."""
    folder = write_watched(tmp_path / "run", 40, of=100)
    with watching(folder) as (address, process), visit(address) as seen:
        page = seen.page
        # The first answer has the sections as the server sent them, to compare later ones with.
        page.wait_for_event("response")
        drag(page, 0.5, 0.75)
        page.click("#samples details summary")
        add_steps(folder, 41, 60)
        page.wait_for_selector("text=step 60 of 100")
        assert page.locator("#samples details").get_attribute("open") is not None
        assert 18 <= pointed_steps(page)[0] <= 22
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": "x"}\n')
        page.wait_for_selector("text=metrics.jsonl: 1 line skipped")
        assert page.text_content("#link") == "live"
        process.terminate()
        page.wait_for_selector("#link.lost")
        assert "ended" in page.text_content("#link")
        assert page.locator(".chart canvas").count() > 1  # the curves stay
        # The browser reports the requests that the ended server does not answer.
        seen.said = [line for line in seen.said if "ERR_CONNECTION_REFUSED" not in line]
