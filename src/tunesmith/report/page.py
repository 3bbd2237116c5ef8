"""The report: runs -> one HTML page that needs nothing from outside, or Markdown; both are written from one context."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.config.dump import leaves
from tunesmith.errors import MachineError, UsageError
from tunesmith.host.shell import shell_command, shell_path, shell_word
from tunesmith.metrics.terminal import format_seconds
from tunesmith.report.compare import RunSummary, Spread, differing_keys, judge, summaries_of
from tunesmith.report.run_files import (
    NO_CHART,
    Columns,
    RunFiles,
    downsample,
    how_it_ended,
    known,
    read_profiles,
    smooth,
)
from tunesmith.run_dir import RECIPE, read_bytes, shown

MARK = "tunesmith report"  # in the first line of each page that it writes
POINTS = 600  # of a curve: two for each pixel of a wide chart
SPAN = 40  # a smoothed curve averages over one in so many of the steps, and at least 5
PROMPTS, LOG_LINES, KEYS_IN_BOARD, RAW_RUNS = 6, 20, 3, 4
VERSIONS = (
    "tunesmith",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "safetensors",
    "tokenizers",
    "bitsandbytes",
)
HASHES = ("data_hash", "validation_hash", "model_hash", "recipe_hash")
STATIC = ("uPlot.min.css", "plots.css", "report.css", "uPlot.iife.min.js", "plots.js", "report.js")
MAIN = {  # curves that are shown at once: name -> title, unit, from zero, smoothed
    "loss": ("Training loss", "", False, True), "val_loss": ("Validation loss", "", False, False),
    "tokens_per_second": ("Speed", "tokens/s", True, True), "memory_gib": ("Peak memory", "GiB", True, False),
}  # fmt: skip


def write_report(
    runs: Sequence[RunFiles], output: Path, *, markdown: bool = False, note: str = ""
) -> None:
    """Write the report of runs to a file. UsageError if that is there and no report; MachineError if it cannot be written.

    `note`: a paragraph below the verdict, such as what the runs were chosen from.
    """
    try:
        if (
            output.exists()
            and MARK not in output.read_text(encoding="utf-8", errors="replace")[:200]
        ):
            fix = "--output another-name.html"
            raise UsageError(
                "this file is there and no report of tunesmith", where=str(output), fix=fix
            )
        output.write_text(render_report(runs, markdown=markdown, note=note), encoding="utf-8")
    except OSError as error:
        what, fix = (
            "the report cannot be written",
            "--output FILE in a folder that you may write to",
        )
        raise MachineError(
            what, where=str(output), why=error.strerror or str(error), fix=fix
        ) from error


def render_report(runs: Sequence[RunFiles], *, markdown: bool = False, note: str = "") -> str:
    """The page as text."""
    loader = PackageLoader("tunesmith.report", "templates")
    env = Environment(loader=loader, autoescape=not markdown, undefined=StrictUndefined)
    env.trim_blocks = env.lstrip_blocks = True
    env.filters |= {"value": _value, "figure": _figure, "cell": _cell, "fenced": _fenced}
    context = _context(summaries_of(runs)) | {"note": note, "mark": MARK}
    if markdown:
        return env.get_template("report.md.j2").render(context)
    static = {
        name: (resources.files("tunesmith.report") / "static" / name).read_text(encoding="utf-8")
        for name in STATIC
    }
    # Only these scripts run: text of a run that looks like one does not.
    script = f"{static['uPlot.iife.min.js']}\n{static['plots.js']}\n{static['report.js']}"
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    styles = Markup("\n".join(text for name, text in static.items() if name.endswith(".css")))
    data = Markup(json.dumps(context["charts"], allow_nan=False).replace("<", "\\u003c"))
    context |= {"script": Markup(script), "allowed": allowed, "styles": styles, "data": data}
    return env.get_template("report.html.j2").render(context)


def _context(runs: list[RunSummary]) -> dict[str, Any]:
    verdict, keys = judge(runs), differing_keys(runs)
    profiles = [(run, read_profiles(run.files.folder)) for run in runs]
    damaged = [(run.label, [*run.files.damaged, *faults]) for run, (_, faults) in profiles]
    damaged = [(label, files) for label, files in damaged if files]
    env = [
        leaves({k: v for k, v in run.files.env.items() if k not in ("command", *HASHES)})
        for run in runs
    ]
    names = dict.fromkeys(key for one in env for key in one if not key.endswith(".why"))
    environment = [(key, [one.get(key) for one in env]) for key in names]
    # The lowest val_loss first, where they can be compared.
    order = sorted(
        range(len(runs)),
        key=lambda i: (runs[i].best or (math.inf,))[0] if verdict.kind != "none" else 0,
    )
    return {
        "runs": runs, "verdict": verdict, "keys": keys, "board": order,
        "board_keys": [one for one in keys if one.learns][:KEYS_IN_BOARD],
        "figures": [(name, [give(run) for run in runs]) for name, give in FIGURES.items()],
        "environment": [(key, values, len({str(value) for value in values}) > 1) for key, values in environment],
        "charts": _charts(runs), "samples": _samples_of(runs), "time_text": format_seconds,
        "ranks": [(run, _rank_rows(run.files)) for run in runs if run.files.ranks],
        "profiles": [(run, summaries) for run, (summaries, _) in profiles if summaries],
        "damaged": damaged,
        "ends": [_end(run) for run in runs], "reproduce": [_reproduce(run) for run in runs],
    }  # fmt: skip


def _mean(run: RunSummary, name: str) -> Spread | None:
    return Spread.of(known(run.files.columns.get(name, [])))


FIGURES = {  # rows of the table of figures
    "state": lambda run: f"{run.files.state} at step {run.steps}",
    "val_loss, lowest": lambda run: (
        f"{run.best[0]:.4f} at step {run.best[1]}" if run.best else None
    ),
    "val_loss, last": lambda run: run.validations[-1][1] if run.validations else None,
    "training loss, mean of the last steps": lambda run: run.loss,
    "tokens/s, without the first step": lambda run: run.speed,
    "MFU": lambda run: f"{run.mfu:.1%}" if run.mfu is not None else None,
    "waiting for data": lambda run: f"{run.waiting:.1%}" if run.waiting is not None else None,
    "peak memory, GiB": lambda run: run.memory_gib,
    "tokens learned from": lambda run: f"{run.tokens:,.0f}",
    "time of the steps": lambda run: format_seconds(run.seconds),
    "seconds a step": lambda run: _mean(run, "step_seconds"),
    "gradient norm": lambda run: _mean(run, "grad_norm"),
    "GPU utilisation, %": lambda run: _mean(run, "gpu_utilization"),
    "GPU power, W": lambda run: _mean(run, "gpu_power_watts"),
}


def _charts(runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """What plots.js draws: the main curves, then every other number of the records."""
    names = dict.fromkeys(
        [*MAIN, *(name for run in runs for name in run.files.columns if name not in NO_CHART)]
    )
    charts = []
    for name in names:
        title, unit, zero, smoothed = MAIN.get(name, (name, "", False, False))
        series = [line for i, run in enumerate(runs) for line in _series(run, i, name, smoothed)]
        if len(runs) > RAW_RUNS and smoothed:  # many raw lines hide each other
            series = [one for one in series if not one["faint"]]
        if series:
            chart = {"title": title, "unit": unit, "zero": zero, "series": series}
            charts.append(chart | {"place": "main" if name in MAIN else "more"})
    return charts


def _series(run: RunSummary, index: int, name: str, smoothed: bool) -> list[dict[str, Any]]:
    steps, values = run.files.columns.get("step", []), run.files.columns.get(name, [])
    span = max(5, len(values) // SPAN)
    smoothed = smoothed and len(values) >= 3 * span
    lines = [(f"{run.label}, raw" if smoothed else run.label, values, smoothed)]
    lines += [(run.label, smooth(values, span), False)] if smoothed else []
    series: list[dict[str, Any]] = []
    for label, found, faint in lines:
        x, y = downsample(steps, found, POINTS)
        about = {"label": label, "run": index, "faint": faint, "dots": 2 * len(x) < len(steps)}
        series += [about | {"x": x, "y": [float(f"{value:.6g}") for value in y]}] if x else []
    return series


def _samples_of(runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """For each prompt: (run, step, answer) before training, once where all runs agree, and after; the steps between."""
    found = []
    for prompt in list(dict.fromkeys(row["prompt"] for run in runs for row in run.files.samples))[
        :PROMPTS
    ]:
        rows = [
            (run.label, [r for r in run.files.samples if r["prompt"] == prompt]) for run in runs
        ]
        rows = [(label, answers) for label, answers in rows if answers]
        expected = next(
            (row["expected"] for _, answers in rows for row in answers if row.get("expected")), None
        )
        first = [(label, a[0]["step"], a[0]["answer"]) for label, a in rows if a[0]["step"] == 0]
        if len(first) > 1 and len({answer for *_, answer in first}) == 1:
            first = [("", *first[0][1:])]
        last = [(label, a[-1]["step"], a[-1]["answer"]) for label, a in rows if a[-1]["step"] > 0]
        middle = [(label, row) for label, a in rows for row in a if 0 < row["step"] < a[-1]["step"]]
        between = [(label, row["step"], row["answer"]) for label, row in middle]
        found.append(
            {
                "prompt": prompt,
                "expected": expected,
                "before": first,
                "after": last,
                "between": between,
            }
        )
    return found


def _rank_rows(run: RunFiles) -> dict[str, Any]:
    """Mean and maximum of what each rank measured of itself."""
    ranks: dict[int, Columns] = {0: run.columns} | run.ranks
    names = list(
        dict.fromkeys(
            name for columns in run.ranks.values() for name in columns if name not in NO_CHART
        )
    )
    rows = {
        rank: [known(columns.get(name, [])) for name in names]
        for rank, columns in sorted(ranks.items())
    }
    cells = {
        rank: [(Spread.of(one), max(one, default=None)) for one in row]
        for rank, row in rows.items()
    }
    return {"names": names, "rows": cells}


def _end(run: RunSummary) -> dict[str, Any]:
    """How a run ended, where it did not finish, its warnings and the end of its log."""
    files = run.files
    return {
        "run": run,
        "told": how_it_ended(files),
        "warnings": files.warnings,
        "log": files.log_tail[-LOG_LINES:],
    }


def _reproduce(run: RunSummary) -> dict[str, Any]:
    """What it takes to make a run again; each part is None where env.json does not have it."""
    env, recipe = run.files.env, run.files.folder / RECIPE
    text = None
    with suppress(OSError):
        text = read_bytes(recipe).decode(errors="replace")
    words = [
        Path(word).name if i == 0 else str(word) for i, word in enumerate(env.get("command") or ())
    ]
    if words[:1] in (["__main__.py"], ["tunesmith"]):
        words = ["tunesmith", *words[1:]]
    versions = [
        f"{name}=={env[name].partition('+')[0]}"
        for name in VERSIONS
        if isinstance(env.get(name), str)
    ]
    return {
        "run": run,
        "command": shell_command(words) if words else None,
        "again": f"tunesmith train {shell_path(shown(recipe))} {shell_word(shown(f'output_dir={run.files.folder}-again'))}",
        "commit": env.get("commit"),
        "versions": f"pip install {' '.join(versions)}" if versions else None,
        "hashes": {name.replace("_", " "): env[name] for name in HASHES if env.get(name)},
        "seed": run.seed,
        "recipe": text,
    }


def _value(value: Any) -> str:
    """A value of a recipe or of env.json as text; a long list in JSON."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _figure(value: Any) -> str:
    """A figure: text as it is, a mean with its standard deviation, a dash for what was not measured."""
    if isinstance(value, Spread):
        spread = f" ± {_digits(value.deviation)} (n = {value.count:,})" if value.count > 1 else ""
        return _digits(value.mean) + spread
    return "–" if value is None else value if isinstance(value, str) else _digits(value)


def _digits(value: float) -> str:
    """Four significant digits: 0.03125, 1.234, 12,480."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table, where nothing of it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#&~])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    """Text as a block of Markdown, behind a fence that it does not hold."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
