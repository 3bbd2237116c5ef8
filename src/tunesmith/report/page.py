"""The report: runs -> one HTML page that needs nothing from outside, or Markdown; both are written
from one context."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.config.dump import leaves
from tunesmith.errors import MachineError, UsageError
from tunesmith.host.packages import COMPUTE
from tunesmith.host.shell import shell_command, shell_path, shell_word
from tunesmith.metrics.conversations import conversations_of, whole_characters
from tunesmith.report.compare import (
    differing_keys,
    eval_figures,
    judge,
)
from tunesmith.report.measure import HELD_OUT_ACCURACY, VAL_LOSS, measure_of
from tunesmith.report.run_files import (
    NO_CHART,
    Columns,
    RunFiles,
    downsample,
    finite,
    how_it_ended,
    read_profiles,
    smoothings,
)
from tunesmith.report.run_summary import RunSummary, Spread, summaries_of
from tunesmith.run_dir import RECIPE, read_bytes, shown
from tunesmith.units import format_seconds

MARK = "tunesmith report"  # in the first line of each page that it writes
POINTS = 600  # of a curve: two for each pixel of a wide chart
PROMPTS = 6  # whose answers are shown
LOG_LINES = 20
KEYS_IN_BOARD = 3
HASHES = ("data_hash", "validation_hash", "model_hash", "recipe_hash")
_TITLE = re.compile(r"<title>.*</title>|^# .*", re.MULTILINE)  # names the runs
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#&~])")  # of Markdown
STATIC = ("uPlot.min.css", "plots.css", "report.css", "uPlot.iife.min.js", "plots.js", "report.js")


class Chart(NamedTuple):
    """How a number of the records is drawn; `zero`: its axis begins there."""

    title: str
    unit: str = ""
    zero: bool = False
    smoothed: bool = False


# Curves that are shown at once.
MAIN = {
    "loss": Chart("Training loss", smoothed=True),
    "val_loss": Chart("Validation loss"),
    # Of methods that learn from preferences.
    "val_reward_accuracy": Chart("Accuracy on held-out pairs"),
    "reward_accuracy": Chart("Accuracy on training pairs", smoothed=True),
    "reward_margin": Chart("Reward margin", smoothed=True),
    "rewards_chosen": Chart("Reward of chosen answers", smoothed=True),
    "rewards_rejected": Chart("Reward of rejected answers", smoothed=True),
    "kl": Chart("KL to the reference", smoothed=True),
    "tokens_per_second": Chart("Speed", "tokens/s", zero=True, smoothed=True),
    "memory_gib": Chart("Peak memory", "GiB", zero=True),
}


def write_report(
    runs: Sequence[RunFiles], output: Path, *, markdown: bool = False, note: str = ""
) -> bool:
    """Write the report of runs to a file; whether it replaced a report of other runs.

    UsageError if that is there and no report; MachineError if it cannot be written.

    `note`: a paragraph below the verdict, such as what the runs were chosen from.
    """
    old = ""
    try:
        if output.exists():
            old = output.read_text(encoding="utf-8", errors="replace")
            if MARK not in old[:200]:
                raise UsageError(
                    "this file exists and is not a tunesmith report",
                    where=str(output),
                    fix="--output another-name.html",
                )
        page = render_report(runs, markdown=markdown, note=note)
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise MachineError(
            "the report cannot be written",
            where=str(output),
            why=error.strerror or str(error),
            fix="--output FILE in a writable folder",
        ) from error
    return bool(old) and _title(old) != _title(page)


def _title(page: str) -> str:
    title = _TITLE.search(page)
    return title[0] if title else ""


def render_report(runs: Sequence[RunFiles], *, markdown: bool = False, note: str = "") -> str:
    """The page as text."""
    loader = PackageLoader("tunesmith.report", "templates")
    env = Environment(loader=loader, autoescape=not markdown, undefined=StrictUndefined)
    env.trim_blocks = True
    env.lstrip_blocks = True
    env.filters |= {"value": _value, "figure": _figure, "command": _command}
    env.filters |= {"cell": _cell, "reason": _reason, "fenced": _fenced}
    context = _context(summaries_of(runs)) | {"note": note, "mark": MARK}
    if markdown:
        return env.get_template("report.md.j2").render(context)
    folder = resources.files("tunesmith.report") / "static"
    static = {name: (folder / name).read_text(encoding="utf-8") for name in STATIC}
    script = f"{static['uPlot.iife.min.js']}\n{static['plots.js']}\n{static['report.js']}"
    # Only these scripts run: text of a run that looks like one does not.
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    styles = "\n".join(text for name, text in static.items() if name.endswith(".css"))
    # Nor does "</script>" in a text end the data.
    data = json.dumps(context["charts"], allow_nan=False).replace("<", "\\u003c")
    context |= {
        "script": Markup(script),
        "allowed": allowed,
        "styles": Markup(styles),
        "data": Markup(data),
    }
    return env.get_template("report.html.j2").render(context)


def _context(runs: list[RunSummary]) -> dict[str, Any]:
    verdict = judge(runs)
    keys = differing_keys(runs)
    profiles = []
    damaged = []
    for run in runs:
        summaries, damaged_profiles = read_profiles(run.files.folder)
        if summaries:
            profiles.append((run, summaries))
        damaged_files = [*run.files.damaged, *damaged_profiles]
        if damaged_files:
            damaged.append((run.label, damaged_files))
    board = list(range(len(runs)))
    measure = measure_of(runs)
    samples, system = _samples_of(runs)

    def rank(index: int) -> float:
        best = measure.best(runs[index])
        return math.inf if best is None else measure.worse_by(best[0], than=0.0)

    # The best first, where they can be compared.
    if verdict.kind != "none":
        board.sort(key=rank)
    return {
        "runs": runs,
        "verdict": verdict,
        "keys": keys,
        "board": board,
        "measure": measure,
        "board_keys": [difference for difference in keys if difference.learns][:KEYS_IN_BOARD],
        "figures": [
            *((name, [figure(run) for run in runs]) for name, figure in FIGURES.items()),
            *eval_figures(runs),
        ],
        "environment": _environment(runs),
        "charts": _charts(runs),
        "samples": samples,
        "system": system,
        "time_text": format_seconds,
        "ranks": [(run, _rank_rows(run.files)) for run in runs if run.files.ranks],
        "profiles": profiles,
        "damaged": damaged,
        "ends": [_end(run) for run in runs],
        "reproduce": [_reproduce(run) for run in runs],
    }


def _environment(runs: Sequence[RunSummary]) -> list[tuple[str, list[Any], bool]]:
    """The rows of env.json: name, a value a run, whether they differ."""
    environments = []
    for run in runs:
        env = {k: v for k, v in run.files.env.items() if k not in ("command", *HASHES)}
        environments.append(leaves(env))
    rows = []
    for name in dict.fromkeys(name for env in environments for name in env):
        # A reason belongs to the value beside it, and has no row.
        if not name.endswith(".why"):
            values = [env.get(name) for env in environments]
            rows.append((name, values, len({str(value) for value in values}) > 1))
    return rows


def _mean(run: RunSummary, name: str) -> Spread | None:
    return Spread.from_values(finite(run.files.columns.get(name, [])))


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _last(values: Sequence[tuple[int, float]]) -> float | None:
    return values[-1][1] if values else None


# Rows of the table of figures.
FIGURES: dict[str, Callable[[RunSummary], Any]] = {
    "state": lambda run: run.files.described_state,
    "val_loss, lowest": VAL_LOSS.best_text,
    "val_loss, last": lambda run: _last(run.validations),
    f"{HELD_OUT_ACCURACY.name}, highest": HELD_OUT_ACCURACY.best_text,
    f"{HELD_OUT_ACCURACY.name}, last": lambda run: _percent(_last(run.accuracies)),
    "training loss, mean of the last steps": lambda run: run.loss,
    "tokens/s, without the first step": lambda run: run.speed,
    "MFU": lambda run: _percent(run.mfu),
    "waiting for data": lambda run: _percent(run.waiting),
    "peak memory, GiB": lambda run: run.memory_gib,
    "training tokens": lambda run: f"{run.tokens:,.0f}",
    "total step time": lambda run: format_seconds(run.seconds),
    "seconds per step": lambda run: _mean(run, "step_seconds"),
    "gradient norm": lambda run: _mean(run, "grad_norm"),
    "GPU utilization, %": lambda run: _mean(run, "gpu_utilization"),
    "GPU power, W": lambda run: _mean(run, "gpu_power_watts"),
}


def _charts(runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """What plots.js draws: the main curves, then every other number of the records."""
    names = dict.fromkeys(MAIN)
    for run in runs:
        names |= dict.fromkeys(name for name in run.files.columns if name not in NO_CHART)
    charts = []
    for name in names:
        chart = MAIN.get(name, Chart(name))
        series = []
        for index, run in enumerate(runs):
            series += _series(run, index, name, chart.smoothed)
        if series:
            charts.append(
                {
                    "title": chart.title,
                    "unit": chart.unit,
                    "zero": chart.zero,
                    "series": series,
                    "place": "main" if name in MAIN else "more",
                }
            )
    return charts


def _series(run: RunSummary, index: int, name: str, smoothed: bool) -> list[dict[str, Any]]:
    steps = run.files.columns.get("step", [])
    values = run.files.columns.get(name, [])
    # Values by how they are smoothed; "" for not at all.
    lines: dict[str, Sequence[float | None]] = {"": values}
    if smoothed:
        lines |= smoothings(values)
    series: list[dict[str, Any]] = []
    for smoothing, line in lines.items():
        x, y = downsample(steps, line, POINTS)
        if x:
            series.append(
                {
                    "label": run.label,
                    "run": index,
                    "smoothed": smoothing,
                    "dots": 2 * len(x) < len(steps),
                    "x": x,
                    "y": [float(f"{value:.6g}") for value in y],
                }
            )
    return series


def _samples_of(runs: Sequence[RunSummary]) -> tuple[list[dict[str, Any]], str]:
    """For each prompt: (run, step, answer) before training, once where all runs agree, and after;
    the steps between. And the system prompt of all of them."""
    prompts = dict.fromkeys(row["prompt"] for run in runs for row in run.files.samples)
    conversations, system = conversations_of([*prompts][:PROMPTS])
    samples = []
    for prompt, turns in conversations.items():
        expected = None
        place = ""
        first = []
        between = []
        last = []
        for run in runs:
            # A run may have answered a prompt at several steps, in order.
            rows = [row for row in run.files.samples if row["prompt"] == prompt]
            for row in rows:
                expected = expected or row.get("expected")
                place = place or row.get("row") or ""
                answer = (run.label, row["step"], whole_characters(row["answer"]))
                if 0 < row["step"] < rows[-1]["step"]:
                    between.append(answer)
                if row is rows[0] and row["step"] == 0:
                    first.append(answer)
                if row is rows[-1] and row["step"] > 0:
                    last.append(answer)
        # Before training all runs have the same model: one answer stands for all.
        if (len(first) > 1 or len(runs) == 1) and len({answer for *_, answer in first}) == 1:
            first = [("", *first[0][1:])]
        samples.append(
            {
                "turns": turns,
                "expected": expected,
                "row": shown(place),
                "before": first,
                "after": last,
                "between": between,
            }
        )
    return samples, system


def _rank_rows(run: RunFiles) -> dict[str, Any]:
    """Mean and maximum of what each rank measured of itself."""
    names = dict.fromkeys(name for columns in run.ranks.values() for name in columns)
    shown_names = [name for name in names if name not in NO_CHART]
    ranks: dict[int, Columns] = {0: run.columns} | run.ranks
    rows = {}
    for rank, columns in sorted(ranks.items()):
        cells = []
        for name in shown_names:
            values = finite(columns.get(name, []))
            cells.append((Spread.from_values(values), max(values, default=None)))
        rows[rank] = cells
    return {"names": shown_names, "rows": rows}


def _end(run: RunSummary) -> dict[str, Any]:
    """How a run ended, where it did not finish, its warnings and the end of its log."""
    files = run.files
    return {
        "run": run,
        "fields": how_it_ended(files),
        "warnings": files.warnings,
        "log": files.log_tail[-LOG_LINES:],
    }


def _reproduce(run: RunSummary) -> dict[str, Any]:
    """What it takes to make a run again; each part is None where env.json does not have it."""
    env = run.files.env
    recipe = run.files.folder / RECIPE
    text = None
    with suppress(OSError):
        text = read_bytes(recipe).decode(errors="replace")
    command = None
    if env.get("command"):
        program, *words = map(str, env["command"])
        program = Path(program).name
        # As of `python -m tunesmith`.
        if program == "__main__.py":
            program = "tunesmith"
        command = shell_command([program, *words])
    versions = []
    for name in COMPUTE:
        if isinstance(env.get(name), str):
            # Without the build, such as +cu128, which the package index does not have; tunesmith
            # itself is installed from a clone.
            version = f"{name}=={env[name].partition('+')[0]}"
            versions.append("./tunesmith" if name == "tunesmith" else version)
    commit = env.get("commit")
    checkout = f"git -C tunesmith checkout {shell_word(commit.rstrip('+'))} && " if commit else ""
    output = shell_word(shown(f"output_dir={run.files.folder}-again"))
    return {
        "run": run,
        "command": command,
        "again": f"tunesmith train {shell_path(shown(recipe))} {output}",
        "commit": commit,
        "versions": f"{checkout}pip install {' '.join(versions)}" if versions else None,
        "hashes": {name.replace("_", " "): env[name] for name in HASHES if env.get(name)},
        "seed": run.seed,
        "recipe": text,
    }


def _value(value: Any) -> str:
    """A value of a recipe or of env.json as text; a long list in JSON."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _command(fix: str) -> tuple[str, str]:
    """A fix as what is typed and the comment behind it: not every shell takes comments."""
    command, _, comment = fix.partition("   # ")
    return command, comment


def _figure(value: Any) -> str:
    """A figure: text as it is, a mean with its standard deviation, a dash for what was not
    measured."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if not isinstance(value, Spread):
        return _digits(value)
    mean = _digits(value.mean)
    if value.count == 1:
        return mean
    deviation = value.deviation
    # Two digits: a third would be noise.
    shown = f"{deviation:,.0f}" if deviation >= 10 else f"{deviation:.2g}"
    return f"{mean} ± {shown} (n = {value.count:,})"


def _digits(value: float) -> str:
    """Four significant digits: 0.03125, 1.234, 12,480."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table, where nothing of it is markup."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def _reason(text: str) -> str:
    """A sentence of the verdict in Markdown: what is in backticks is code, and nothing else is
    markup."""
    parts = " ".join(text.split()).split("`")
    return "".join(
        f"`{part}`" if i % 2 else _MARKUP.sub(r"\\\1", part) for i, part in enumerate(parts)
    )


def _fenced(text: str) -> str:
    """Text as a block of Markdown, behind a fence that it does not hold."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
