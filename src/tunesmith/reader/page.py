"""The page of runs, written once as a report that needs nothing from outside, or served live; and
the same as Markdown."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.errors import MachineError, UsageError
from tunesmith.host.packages import COMPUTE
from tunesmith.host.shell import shell_command, shell_path, shell_word
from tunesmith.metrics.conversations import Turn, conversations_of
from tunesmith.reader.compare import differing_keys, judge
from tunesmith.reader.curves import curves
from tunesmith.reader.figures import HASHES, environment_rows, figure_rows
from tunesmith.reader.measure import measure_of
from tunesmith.reader.run_files import RunFiles, how_it_ended, to_json
from tunesmith.run_dir import RECIPE, Fields, Sample, read_bytes, shown
from tunesmith.units import format_seconds

PAGE_MARK = "tunesmith report"  # in the first line of each page that it writes
POINTS = 600  # of a curve: two for each pixel of a wide chart
MAX_SHOWN_PROMPTS = 6  # whose answers are shown in Markdown
KEYS_IN_BOARD = 3
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#&~])")  # of Markdown
STATIC = (
    "uPlot.min.css",
    "plots.css",
    "page.css",
    "uPlot.iife.min.js",
    "plots.js",
    "page.js",
)


def write_report(
    runs: Sequence[RunFiles], output: Path, *, markdown: bool = False, note: str = ""
) -> None:
    """Write the report of runs to a file, in place of an earlier report.

    UsageError if that is there and no report; MachineError if it cannot be written.

    `note`: a paragraph below the verdict, such as what the runs were chosen from.
    """
    try:
        if output.exists() and PAGE_MARK not in output.read_text("utf-8", errors="replace")[:200]:
            raise UsageError(
                "this file exists and is not a tunesmith report",
                where=str(output),
                fix="--output another-name.html",
            )
        output.write_text(render_report(runs, markdown=markdown, note=note), encoding="utf-8")
    except OSError as error:
        raise MachineError(
            "the report cannot be written",
            where=str(output),
            why=error.strerror or str(error),
            fix="--output FILE in a writable folder",
        ) from error


def render_report(
    runs: Sequence[RunFiles], *, markdown: bool = False, live: bool = False, note: str = ""
) -> str:
    """The page as text.

    A live page asks for its curves, samples and files, which a report holds.
    """
    loader = PackageLoader("tunesmith.reader", "templates")
    env = Environment(loader=loader, autoescape=not markdown, undefined=StrictUndefined)
    env.trim_blocks = True
    env.lstrip_blocks = True
    env.filters |= {"value": _value, "cell": _cell, "reason": _reason, "fenced": _fenced}
    context = _context(runs) | {"note": note, "mark": PAGE_MARK}
    if markdown:
        ends = [(run, how_it_ended(run)) for run in runs]
        template = env.get_template("report.md.j2")
        return template.render(context, samples=_samples_of(runs), ends=ends)
    page = env.get_template("page.html.j2")
    if live:
        return page.render(context, live=True, static=(*STATIC, "live.js", "run.js"))
    folder = resources.files("tunesmith.reader") / "static"
    static = {name: (folder / name).read_text(encoding="utf-8") for name in (*STATIC, "run.js")}
    script = "\n".join(text for name, text in static.items() if name.endswith(".js"))
    # Only these scripts run: text of a run that looks like one does not.
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nor does "</script>" in a text end the data.
    data = to_json(page_data(runs)).replace("<", "\\u003c")
    return page.render(
        context,
        live=False,
        allowed=allowed,
        script=Markup(script),
        styles=Markup("\n".join(text for name, text in static.items() if name.endswith(".css"))),
        data=Markup(data),
    )


def page_data(runs: Sequence[RunFiles]) -> Fields:
    """Collect what a report holds of that which a live page asks for."""
    return {
        "runs": [run.status() for run in runs],
        "curves": curves(runs, "step", -math.inf, math.inf, POINTS),
        "texts": [run.texts() for run in runs],
    }


def _context(runs: Sequence[RunFiles]) -> Fields:
    verdict = judge(runs)
    keys = differing_keys(runs)
    board = list(range(len(runs)))
    measure = measure_of(runs)

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
        "figures": figure_rows(runs),
        "environment": environment_rows(runs),
        "time_text": format_seconds,
        "profiles": [(run, *profile) for run in runs for profile in run.profiles.items()],
        "reproduce": [_reproduce(run) for run in runs],
    }


def _samples_of(runs: Sequence[RunFiles]) -> list[tuple[list[Turn], list[tuple[str, Sample]]]]:
    """Return the turns of each prompt, and two samples of each run: the first one, and that of the
    final weights, or the last one if there are no final weights yet."""
    samples: dict[str, list[tuple[str, Sample]]] = {}
    for run in runs:
        of_run: list[Sample] = run.texts()["samples"]
        for prompt in dict.fromkeys(sample["prompt"] for sample in of_run):
            of_prompt = [sample for sample in of_run if sample["prompt"] == prompt]
            final = [sample for sample in of_prompt if sample["step"] == run.final_step]
            last = (final or of_prompt)[-1]
            ends = [of_prompt[0]] if of_prompt[0] is last else [of_prompt[0], last]
            samples.setdefault(prompt, []).extend((run.label, sample) for sample in ends)
    conversations, _ = conversations_of([*samples][:MAX_SHOWN_PROMPTS])
    return [(turns, samples[prompt]) for prompt, turns in conversations.items()]


def _reproduce(run: RunFiles) -> Fields:
    """List what it takes to make a run again; each part is None where env.json does not have it."""
    env = run.env
    recipe = run.folder / RECIPE
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
    output = shell_word(shown(f"output_dir={run.folder}-again"))
    return {
        "run": run,
        "command": command,
        "again": f"tunesmith train {shell_path(shown(recipe))} {output}",
        "commit": commit,
        "versions": f"{checkout}pip install {' '.join(versions)}" if versions else None,
        "hashes": {name.replace("_", " "): env[name] for name in HASHES if env.get(name)},
        "recipe": text,
    }


def _value(value: object) -> str:
    """A value of a recipe or of env.json as text; a long list in JSON."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
