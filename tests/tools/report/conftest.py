"""A real browser, and what it asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

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
    """Opens an address, and at the end holds that nothing was asked of another host and that no
    error was said.
    """

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
