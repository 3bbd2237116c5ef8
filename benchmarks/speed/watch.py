"""How soon `tunesmith watch` shows a long run in a real Chromium, and pictures of the page.

    python benchmarks/speed/watch.py --steps 100000 --json docs/measurements/watch.json
    python benchmarks/speed/watch.py --run runs/my-run runs/other --screenshots shots    # 1280 and 390 px, light and dark

Without --run it writes the records of a run of that many steps. Times are from the request for the
page, in a new browser context each time, to the first chart drawn and to all of them. Needs
Chromium and playwright (`make cluster-tools`, `make test`).
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import sync_playwright

from tunesmith.metrics.hardware import describe_machine
from tunesmith.metrics.record import StepRecord

DRAWN = "document.querySelectorAll('.chart canvas').length"


def write_run(folder: Path, steps: int) -> Path:
    """A finished run on a GPU, of which watch reads nothing but these files."""
    folder.mkdir(parents=True)
    recipe = {"train": {"duration": f"{steps} steps"}, "model": {"name": "org/base"}}
    (folder / "config.yaml").write_text(json.dumps(recipe))
    (folder / "env.json").write_text(json.dumps({"recipe_hash": "0", "python": "3.11"}))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = 1.0 + math.exp(-step / 100) + 0.05 * math.sin(step)
            record = StepRecord(
                step=step, epoch=step / 100, loss=loss, learning_rate=1e-4, grad_norm=0.5, tokens=8000,
                supervised_tokens=4000, examples=16, step_seconds=0.5, data_seconds=0.01, tokens_per_second=16000.0,
                mfu=0.4, mfu_peak_tflops=989.0, memory_gib=40.0, gpu_utilization=97.0, gpu_power_watts=310.0,
                idle_share=0.01, val_loss=loss + 0.1 if step % 20 == 0 else None,
            )  # fmt: skip
            file.write(record.to_json() + "\n")
    (folder / "final").mkdir()
    (folder / "final/manifest.json").write_text(json.dumps({"step": steps, "files": {}}))
    return folder


@contextmanager
def watching(runs: Sequence[Path]) -> Iterator[str]:
    """The address at which `tunesmith watch` shows these runs."""
    words = [sys.executable, "-m", "tunesmith", "watch", *map(str, runs)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        address = next((word for word in said.split() if word.startswith("http://")), None)
        if address is None:
            sys.exit(f"no address: {said}")
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def opened(browser: Any, address: str) -> tuple[float, float]:
    """Milliseconds to the first chart and to all of them; nothing but this server may have been
    asked.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, asked = context.new_page(), set[str]()
    page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
    began = time.perf_counter()
    page.goto(address)
    page.wait_for_selector(".chart canvas")
    first = time.perf_counter() - began
    drawn, ended = page.evaluate(DRAWN), time.perf_counter()
    while time.perf_counter() < ended + 1:  # all are there when no other comes for a second
        page.wait_for_timeout(10)
        if (now := page.evaluate(DRAWN)) > drawn:
            drawn, ended = now, time.perf_counter()
    context.close()
    if asked != {urlsplit(address).netloc}:
        sys.exit(f"the page asked {asked}")
    return 1e3 * first, 1e3 * (ended - began)


def take_pictures(browser: Any, address: str, folder: Path) -> None:
    """The whole page at two widths, light and dark."""
    folder.mkdir(parents=True, exist_ok=True)
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme
            )
            page = context.new_page()
            page.goto(address)
            page.wait_for_selector(".chart canvas")
            page.wait_for_timeout(1500)
            page.screenshot(path=folder / f"{width}-{scheme}.png", full_page=True)
            context.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, nargs="+", help="run directories to show in place of a written one"
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--opens", type=int, default=5)
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        runs = args.run or [write_run(Path(place) / "long-run", args.steps)]
        # In a container root may not make Chromium's sandbox.
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        with watching(runs) as address:
            times = [opened(browser, address) for _ in range(args.opens)]
            if args.screenshots:
                take_pictures(browser, address, args.screenshots)
        lines = [sum(1 for _ in (run / "metrics.jsonl").open("rb")) for run in runs]
        found = {"steps": lines, "browser": browser.version}
        browser.close()
    found |= {
        "first_chart_ms": [round(first) for first, _ in times],
        "all_charts_ms": [round(last) for _, last in times],
    }
    print(json.dumps(found))
    if args.json:
        machine = {name: describe_machine([])[name] for name in ("cpu", "cpu_cores")}
        args.json.write_text(json.dumps({**found, "machine": machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
