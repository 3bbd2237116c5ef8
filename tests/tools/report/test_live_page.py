"""The page in a real Chromium: while a run trains, by mouse and by keyboard, on a phone, for a
screen reader.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from errors import holds
from recipes import recipe
from records import record
from tunesmith.run_dir import STOP_FILE
from tunesmith.training.trainer import Trainer
from waiting import wait_for
from warm import MAX_WAIT_S, Warm
from watching import add_steps, watching, write_run

pytestmark = pytest.mark.slow
SHOW_ALL = ".zoom button:last-child"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of one run of 2,000 steps on three ranks."""
    folder = write_run(tmp_path_factory.mktemp("one") / "my-run", 2000, spike=777, ranks=3)
    rows = [
        {"step": 0, "prompt": "<img src=x onerror=alert(1)>", "answer": "<b>old</b> words"},
        {"step": 2000, "prompt": "<img src=x onerror=alert(1)>", "answer": "<b>new</b> words"},
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with watching(folder) as (address, _):
        yield address


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of two runs that differ in the learning rate."""
    place = tmp_path_factory.mktemp("two")
    folders = [
        write_run(place / name, 200, rate=rate) for name, rate in (("slow", 1e-4), ("fast", 5e-4))
    ]
    with watching(*folders) as (address, _):
        yield address


def take_time() -> None:
    """Steps that leave the processor to the browser, as on a GPU."""
    step = Trainer.train_step

    def train_step(self: Trainer, batch: Any) -> Any:
        time.sleep(0.05)
        return step(self, batch)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def test_it_follows_a_run_that_trains(tiny: Path, tmp_path: Path, visit: Any) -> None:
    made = recipe(tiny, tmp_path, train={"duration": "100000 steps"}, checkpoint={"every": "1000 steps"},
                  validate={"every": "20 steps"}, log={"samples": 1})  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(made))
    out, training = tmp_path / "run", Warm(["train", tmp_path / "recipe.yaml"], prepare=take_time)
    try:
        wait_for(
            lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size,
            training,
        )
        with watching(out) as (address, _), visit(address) as seen:
            page = seen.page
            page.wait_for_selector(".state.running")
            step = "() => Number(document.querySelector('.where').textContent.match(/step ([\\d,]+)/)[1].replace(',', ''))"
            first = page.evaluate(step)
            wait_for(lambda: page.evaluate(step) > first)  # without a reload
            assert "left" in page.text_content(".where")
            page.wait_for_selector(".sample .answer")
            (out / STOP_FILE).touch()
            page.wait_for_selector(".state.stopped, .state.killed, .state.finished")
            assert training.wait(MAX_WAIT_S) is not None
            page.wait_for_selector(".state.stopped")
    finally:
        training.kill()


def test_axe_finds_nothing(one: str, two: str, visit: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for address, scheme, other in ((one, "light", "dark"), (two, "dark", "light")):
        with visit(address, scheme=scheme) as seen:
            for width, colours in ((1280, scheme), (390, other)):
                seen.page.set_viewport_size({"width": width, "height": 900})
                seen.page.emulate_media(color_scheme=colours)
                found = axe.run(seen.page).response
                assert len(found["passes"]) > 20  # it has looked
                violations = [(row["id"], row["nodes"][0]["html"]) for row in found["violations"]]
                assert violations == []
                assert seen.page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_drag_zooms_all_charts_and_brings_finer_points(one: str, visit: Any) -> None:
    with visit(one) as seen:
        page = seen.page
        wait_for(lambda: page.locator(".chart").count() == 3)
        place = page.locator(".chart .u-over").first
        place.scroll_into_view_if_needed()
        box = place.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.30, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + 60, steps=4)
        page.mouse.up()
        page.wait_for_selector(f"{SHOW_ALL}:enabled")
        wait_for(lambda: seen.asked_for("from="))
        asked = parse_qs(urlsplit(seen.asked_for("from=")[-1]).query)
        assert 500 < float(asked["from"][0]) < 700
        assert 800 < float(asked["to"][0]) < 1000
        page.click(SHOW_ALL)
        page.wait_for_selector(f"{SHOW_ALL}:disabled")


def test_values_are_read_under_the_pointer(one: str, visit: Any) -> None:
    with visit(one) as seen:
        place = seen.page.locator(".chart .u-over").first
        box = place.bounding_box()
        value = "() => document.querySelector('.legend .value').textContent"
        assert seen.page.evaluate(value) == "2,000"  # the newest, while nothing is pointed at
        seen.page.mouse.move(box["x"] + 40, box["y"] + 40)
        wait_for(lambda: seen.page.evaluate(value) != "2,000")


def test_the_keyboard_reaches_and_reads_everything(one: str, visit: Any) -> None:
    with visit(one) as seen:
        page = seen.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.locator(".chart .plot").first.focus()
        page.keyboard.press("End")
        said = page.locator(".chart output").first
        assert said.text_content().startswith("step 2,000: ")
        assert "loss" in said.text_content()
        page.keyboard.press("ArrowLeft")
        before = said.text_content()
        assert not before.startswith("step 2,000: ")
        page.keyboard.press("ArrowRight")
        assert said.text_content().startswith("step 2,000: ")
        page.keyboard.press("+")
        page.wait_for_selector(f"{SHOW_ALL}:enabled")
        page.keyboard.press("Escape")
        page.wait_for_selector(f"{SHOW_ALL}:disabled")
        page.locator("#axis input:checked").focus()
        page.keyboard.press("ArrowRight")
        wait_for(lambda: seen.asked_for("x=tokens&points="))
        wait_for(lambda: page.locator(".legend .label").first.text_content().startswith("tokens"))


def test_a_damaged_line_is_told_and_the_page_goes_on(tmp_path: Path, visit: Any) -> None:
    folder = write_run(tmp_path / "run", 10, of=100)
    with watching(folder) as (address, _), visit(address) as seen:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": "x"}\n{"step": 11, "loss": {"a": []}}\n')
        add_steps(folder, 12, 15)
        seen.page.wait_for_selector("text=metrics.jsonl: 2 lines were skipped")
        add_steps(folder, 16, 20)
        seen.page.wait_for_selector("text=step 20 of 100")
        assert holds(seen.page.text_content("body"), "metrics.jsonl: 2 lines")


def test_text_of_a_run_is_never_markup(one: str, visit: Any) -> None:
    with visit(one) as seen:
        seen.page.wait_for_selector(".sample .turn.user")
        assert seen.page.text_content(".sample .turn.user") == "user<img src=x onerror=alert(1)>"
        assert seen.page.locator(".sample img, .sample b").count() == 0
        # What the answer before had not
        assert seen.page.locator(".sample mark").all_text_contents() == ["<b>new</b>"]
        slider = seen.page.locator("#when input")
        slider.focus()
        seen.page.keyboard.press("ArrowLeft")
        assert "<b>old</b> words" in seen.page.text_content(".sample .answer")
        assert slider.get_attribute("aria-valuetext") == "step 0"


def test_two_runs_are_compared(two: str, visit: Any) -> None:
    with visit(two) as seen:
        page = seen.page
        rows = page.locator("#recipe tbody tr").all_text_contents()
        assert rows == ["train.learning_rate0.00010.0005"]
        assert legend(page, "Training loss") == ["slow", "fast"]
        assert legend(page, "Validation loss") == ["slow", "fast"]
        assert page.locator(".run").count() == 2


def legend(page: Any, title: str) -> list[str]:
    chart = page.locator(".chart", has=page.locator(f"figcaption b:text-is('{title}')"))
    chart.wait_for()
    return chart.locator(".legend .label").all_text_contents()[1:]  # the first is the axis


def test_values_in_another_unit_than_their_field_are_not_named_by_it(
    tmp_path: Path, visit: Any
) -> None:
    folder = write_run(tmp_path / "run", 5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(record(6, data_seconds=0.02).to_json() + "\n")
    with watching(folder) as (address, _), visit(address) as seen:
        assert legend(seen.page, "Wait for data (ms)") == ["Wait for data (ms)"]
        assert legend(seen.page, "Training loss") == ["loss"]


def test_ranks_are_told_apart_and_of_many_the_outermost(
    one: str, tmp_path: Path, visit: Any
) -> None:
    with visit(one) as seen:
        assert legend(seen.page, "Memory (GiB)") == ["rank 0", "rank 1", "rank 2"]
    with watching(write_run(tmp_path / "big", 5, ranks=16)) as (address, _), visit(address) as seen:
        assert legend(seen.page, "Memory (GiB)") == [
            f"rank {rank}" for rank in (0, 1, 2, 3, 13, 14, 15)
        ]


def test_how_a_run_ended_and_its_warnings(tmp_path: Path, visit: Any) -> None:
    with watching(write_run(tmp_path / "run", 20, of=40)) as (address, _), visit(address) as seen:
        command = seen.page.text_content(".note.bad .typed")
        assert command.startswith("tunesmith train ")
        assert "#" not in command
        # Warnings of a run that is over are folded.
        assert not seen.page.get_by_label("warnings").is_visible()
        seen.page.click(".note.calm summary")
        assert seen.page.get_by_label("warnings").is_visible()


def test_what_never_changes_is_a_line_in_place_of_a_chart(one: str, visit: Any) -> None:
    with visit(one) as seen:
        seen.page.wait_for_selector("#constants dt")
        rows = seen.page.locator("#constants div")
        wait_for(lambda: "MFU40 %" in rows.all_text_contents())
        wait_for(lambda: "GPU power" in seen.page.text_content("#constants"))
        titles = seen.page.locator(".chart figcaption b").all_text_contents()
        assert titles == ["Training loss", "Validation loss", "Memory (GiB)"]


def test_runs_that_coincide_are_told_apart_and_hidden_by_name(two: str, visit: Any) -> None:
    with visit(two) as seen:
        page = seen.page
        chart = page.locator(".chart").first
        assert chart.locator("li", has_text="fast").locator("small").text_content()
        dashes = [
            line.get_attribute("stroke-dasharray")
            for line in chart.locator(".legend svg line").all()
        ]
        assert len(set(dashes)) == 2
        chart.get_by_role("button", name="slow").click()
        for other in page.locator(".chart").all():
            toggles = other.locator(".legend button")
            pressed = [toggle.get_attribute("aria-pressed") for toggle in toggles.all()]
            assert pressed == ["false", "true"]
        page.locator(".chart .plot").first.focus()
        page.keyboard.press("End")
        said = chart.locator("output").text_content()
        assert "fast" in said
        assert "slow" not in said


def test_a_curve_is_smoothed_and_saved_as_table_and_picture(
    one: str, visit: Any, tmp_path: Path
) -> None:
    with visit(one) as seen:
        page = seen.page
        chart = page.locator(".chart").first

        def saved(kind: str) -> bytes:
            with page.expect_download() as download:
                chart.get_by_role("button", name=kind).click()
            path = tmp_path / download.value.suggested_filename
            download.value.save_as(path)
            return path.read_bytes()

        head, first, *_ = saved("table").decode().splitlines()
        assert head == 'step,"loss, raw",loss'
        assert first.startswith("1,1.99005,1.99005")
        page.get_by_text("none", exact=True).click()
        assert saved("table").decode().startswith("step,loss\n")
        assert saved("picture").startswith(b"\x89PNG")
        assert {path.name for path in tmp_path.iterdir()} == {
            "training-loss.csv",
            "training-loss.png",
        }


def test_all_runs_of_a_folder_are_listed_found_and_compared(tmp_path: Path, browser: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for name, steps in (("slow", 200), ("fast", 150)):
        write_run(tmp_path / name, steps)
    write_run(tmp_path / "damaged", 5)
    (tmp_path / "damaged/metrics.jsonl").write_text("garbage\n")
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    with watching(tmp_path) as (address, _):
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("#list-title:text-is('Runs (3)')", timeout=120_000)
        line = page.locator("#list tbody tr", has_text="slow")
        assert "200" in line.text_content()
        assert len(line.locator("polyline").get_attribute("points").split()) > 20
        assert page.locator("#list .damage", has_text="metrics.jsonl").count() == 1
        for width, scheme in ((1280, "light"), (390, "dark")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            found = axe.run(page).response
            assert [row["id"] for row in found["violations"]] == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_label("compare slow").check()
        page.get_by_label("compare fast").check()
        page.fill("#find input", "fast")
        assert page.locator("#list tbody tr:visible").count() == 1
        page.click("#compare")
        page.wait_for_selector(".chart canvas", timeout=120_000)
        assert legend(page, "Training loss") == ["slow", "fast"]
        page.click("#all-runs")
        page.wait_for_selector("#list-title")
    context.close()


def test_a_page_whose_command_has_ended_says_so(tmp_path: Path, visit: Any, browser: Any) -> None:
    folder, context = write_run(tmp_path / "run", 20), browser.new_context()
    try:
        page = context.new_page()
        page.set_default_timeout(120_000)
        with watching(folder) as (address, _):
            page.goto(address)
            page.wait_for_selector(".chart canvas")
            assert page.text_content("#link") == "live"
        page.wait_for_selector("#link.lost")
        assert "ended" in page.text_content("#link")
        assert page.locator(".chart canvas").count() == 1  # what it has stays
    finally:
        context.close()
