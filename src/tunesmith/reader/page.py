"""The page of runs: `report` writes it as one file that needs nothing else, `watch` serves it."""

import base64
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.errors import MachineError, UsageError
from tunesmith.host.shell import shell_command, shell_path, shell_word
from tunesmith.metrics.conversations import Turn, conversations_of, whole_characters
from tunesmith.reader.compare import differing_keys, judge
from tunesmith.reader.curves import COLORS, curves
from tunesmith.reader.figures import HASHES, environment_rows, figure_rows
from tunesmith.reader.run_files import RunFiles, how_it_ended, to_json
from tunesmith.run_dir import RECIPE, Fields, Sample, read_bytes, shown
from tunesmith.units import format_seconds

PAGE_MARK = "tunesmith report"  # in the first line of each page that it writes
STYLES = ("uPlot.min.css", "page.css")
SCRIPTS = ("uPlot.iife.min.js", "curves.js")
LIVE_SCRIPTS = (*SCRIPTS, "live.js")


def write_report(runs: Sequence[RunFiles], output: Path) -> None:
    """Write the page of runs to a file, replacing an earlier report.

    Raises:
        UsageError: the file exists and is not a report.
        MachineError: the file cannot be written.
    """
    try:
        if output.exists() and PAGE_MARK not in output.read_text("utf-8", errors="replace")[:200]:
            raise UsageError(
                "this file exists and is not a tunesmith report",
                where=str(output),
                fix="--output another-name.html",
            )
        output.write_text(render_page(runs), encoding="utf-8")
    except OSError as error:
        raise MachineError(
            "the report cannot be written",
            where=str(output),
            why=error.strerror or str(error),
            fix="--output FILE in a writable folder",
        ) from error


def render_page(runs: Sequence[RunFiles], *, live: bool = False) -> str:
    """Return the page as HTML. A live page asks its server whether it has changed."""
    loader = PackageLoader("tunesmith.reader", "templates")
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    env.trim_blocks = True
    env.lstrip_blocks = True
    env.filters |= {"value": _value, "duration": format_seconds}
    script = _static(LIVE_SCRIPTS if live else SCRIPTS)
    charts, constants = curves(runs)
    samples, system = prompts_of(runs)
    return env.get_template("page.html.j2").render(
        mark=PAGE_MARK,
        runs=runs,
        live=live,
        colors=COLORS,
        verdict=judge(runs),
        ends={run: how_it_ended(run) for run in runs},
        keys=differing_keys(runs),
        figures=figure_rows(runs),
        environment=environment_rows(runs),
        samples=samples,
        system=system,
        constants=constants,
        reproduce=[_reproduce(run) for run in runs],
        # Only this script runs: text of a run that looks like a script does not.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        script=Markup(script),
        styles=Markup(_static(STYLES)),
        # "</script>" in a text must not end the data.
        charts=Markup(to_json(charts).replace("<", "\\u003c")),
    )


def _static(names: Sequence[str]) -> str:
    folder = resources.files("tunesmith.reader") / "static"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


class ShownAnswer(NamedTuple):
    """The answer of a run at a step; `is_final`: of the final weights."""

    label: str
    step: int
    text: str
    is_final: bool


class ShownPrompt(NamedTuple):
    """A prompt of samples.jsonl and its answers.

    Attributes:
        row: where its row is, such as `faq.csv:12`; empty if unknown.
        turns: the turns of the prompt, without a system prompt that all share.
        expected: the row's own answer; empty if it has none.
        answers: of each run before training, and of its final or newest weights.
        others: the answers of other steps.
    """

    row: str
    turns: list[Turn]
    expected: str
    answers: list[ShownAnswer]
    others: list[ShownAnswer]


def prompts_of(runs: Sequence[RunFiles]) -> tuple[list[ShownPrompt], str]:
    """Return the sample prompts of the runs with their answers, and the system prompt of all."""
    samples = [sample for run in runs for sample in run.samples]
    conversations, system = conversations_of(sample["prompt"] for sample in samples)
    prompts = []
    for text, turns in conversations.items():
        rows = [sample for sample in samples if sample["prompt"] == text]
        answers: list[ShownAnswer] = []
        others: list[ShownAnswer] = []
        for run in runs:
            of_run = [sample for sample in run.samples if sample["prompt"] == text]
            final = [sample for sample in of_run if sample["step"] == run.final_step]
            newest = final[-1:] or of_run[-1:]
            for sample in of_run:
                is_shown = sample in newest or sample["step"] == 0
                (answers if is_shown else others).append(_answer(run, sample))
        prompts.append(
            ShownPrompt(
                shown(next((row["row"] for row in rows if row.get("row")), None) or ""),
                turns,
                next((row["expected"] for row in rows if row.get("expected")), None) or "",
                _without_repeats(answers),
                others,
            )
        )
    return prompts, system


def _answer(run: RunFiles, sample: Sample) -> ShownAnswer:
    text = whole_characters(sample["answer"])
    return ShownAnswer(run.label, sample["step"], text, sample["step"] == run.final_step)


def _without_repeats(answers: Sequence[ShownAnswer]) -> list[ShownAnswer]:
    """Merge the answers before training if they are equal, as those of one base model are."""
    before = [answer for answer in answers if answer.step == 0]
    if len(before) < 2 or len({answer.text for answer in before}) > 1:
        return [*answers]
    merged = before[0]._replace(label=", ".join(answer.label for answer in before))
    return [merged, *(answer for answer in answers if answer.step)]


def _reproduce(run: RunFiles) -> Fields:
    """List what it takes to make a run again; each part is None if env.json does not have it."""
    env = run.env
    recipe = run.folder / RECIPE
    text = None
    with suppress(OSError):
        text = read_bytes(recipe).decode(errors="replace")
    command = None
    if env.get("command"):
        program, *words = map(str, env["command"])
        program = Path(program).name
        # The command was `python -m tunesmith`.
        if program == "__main__.py":
            program = "tunesmith"
        command = shell_command([program, *words])
    output = shell_word(shown(f"output_dir={run.folder}-again"))
    return {
        "run": run,
        "command": command,
        "again": f"tunesmith train {shell_path(shown(recipe))} {output}",
        "commit": env.get("commit"),
        "hashes": {name.replace("_", " "): env[name] for name in HASHES if env.get(name)},
        "recipe": text,
    }


def _value(value: object) -> str:
    """Return a value of a recipe or of env.json as text, a list as JSON."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
