"""The report page. `report` writes it as a single self-contained file, and `watch` serves it."""

import base64
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import pydantic_core
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.errors import MachineError, UsageError
from tunesmith.host.shell import shell_command, shell_path, shell_word
from tunesmith.metrics.conversations import Turn, conversations_of, turns_of, whole_characters
from tunesmith.presentation.rollouts import RewardedGroup, read_groups
from tunesmith.run_dir import RECIPE, ROLLOUTS, read_bytes, rollout_files, shown
from tunesmith.tools.report.curves import COLORS, curves
from tunesmith.tools.report.figures import (
    HASHES,
    differing_keys,
    environment_rows,
    figure_rows,
)
from tunesmith.tools.report.run_files import RunFiles, end_fields, eval_command
from tunesmith.units import format_seconds

REWARDED_PROMPTS = 4  # number of prompts whose sampled answers are shown with rewards
PAGE_MARK = "tunesmith report"  # text in the first line of each report, which identifies it
STYLES = ("uPlot.min.css", "page.css")
SCRIPTS = ("uPlot.iife.min.js", "curves.js")
LIVE_SCRIPTS = (*SCRIPTS, "live.js")


def write_report(runs: Sequence[RunFiles], output: Path) -> None:
    """Write the report page to a file. An existing report is replaced.

    Raises:
        UsageError: the file exists and is not a report.
        MachineError: the file cannot be written.
    """
    try:
        if output.exists() and PAGE_MARK not in output.read_text("utf-8", errors="replace")[:200]:
            raise UsageError(
                "this file exists and is not a tunesmith report",
                where=output,
                fix="use another file name, such as --output another-name.html",
            )
        output.write_text(render_page(runs), encoding="utf-8")
    except OSError as error:
        raise MachineError(
            "the report cannot be written",
            where=output,
            why=error.strerror or str(error),
            fix="use --output FILE with a file in a writable folder",
        ) from error


def render_page(runs: Sequence[RunFiles], *, live: bool = False) -> str:
    """Return the page as HTML.

    A live page asks its server regularly whether the runs have changed.
    """
    env = Environment(
        loader=PackageLoader("tunesmith.tools.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"value": _value, "duration": format_seconds}
    script = _static(LIVE_SCRIPTS if live else SCRIPTS)
    charts, constants = curves(runs)
    # A number that is not finite becomes null, because JSON has no such number.
    chart_json = pydantic_core.to_json(charts, inf_nan_mode="null").decode()
    samples, system = prompts_of(runs)
    samples += [prompt for run in runs for prompt in rewarded_prompts(run)]
    return env.get_template("page.html.j2").render(
        mark=PAGE_MARK,
        runs=runs,
        live=live,
        colors=COLORS,
        eval_command=eval_command(runs),
        ends={run: end_fields(run) for run in runs},
        keys=differing_keys(runs),
        figures=figure_rows(runs),
        environment=environment_rows(runs),
        samples=samples,
        system=system,
        constants=constants,
        hashes=HASHES,
        commands={run: _commands(run) for run in runs},
        recipes={run: _recipe_text(run) for run in runs},
        # The page's security policy allows only the script with this hash. Therefore a text of a
        # run that looks like a script is not executed.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        script=Markup(script),
        styles=Markup(_static(STYLES)),
        # Escape "<", so that "</script>" in a text does not close the script element.
        charts=Markup(chart_json.replace("<", "\\u003c")),
    )


def _static(names: Sequence[str]) -> str:
    folder = resources.files("tunesmith.tools.report") / "static"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


class ShownAnswer(NamedTuple):
    """A sample answer of a run at one step.

    Attributes:
        is_final: whether the final weights generated it.
        reward: its reward, if it was sampled for training.
    """

    label: str
    step: int
    text: str
    is_final: bool
    reward: float | None = None


class ShownPrompt(NamedTuple):
    """A prompt of samples.jsonl with its answers.

    Attributes:
        row: file and line of the data row, such as `faq.csv:12`. Empty if it is not known.
        turns: turns of the prompt, without a system prompt that all prompts share.
        expected: the answer in the data row. Empty if the row has no answer.
        answers: answers of each run before training, and of its final or newest weights.
        others: answers at other steps.
    """

    row: str
    turns: list[Turn]
    expected: str
    answers: list[ShownAnswer]
    others: list[ShownAnswer]


def prompts_of(runs: Sequence[RunFiles]) -> tuple[list[ShownPrompt], str]:
    """Return the sample prompts of the runs with their answers, and the shared system prompt."""
    samples = [sample for run in runs for sample in run.samples]
    conversations, system = conversations_of(sample["prompt"] for sample in samples)
    prompts = []
    for text, turns in conversations.items():
        answers: list[ShownAnswer] = []
        others: list[ShownAnswer] = []
        for run in runs:
            run_samples = [sample for sample in run.samples if sample["prompt"] == text]
            # Show the answer of the final weights if there is one, else the newest answer.
            final = [sample for sample in run_samples if sample["step"] == run.final_step]
            newest = final[-1:] or run_samples[-1:]
            for sample in run_samples:
                step = sample["step"]
                answer = whole_characters(sample["answer"])
                group = answers if step == 0 or sample in newest else others
                group.append(ShownAnswer(run.label, step, answer, step == run.final_step))

        # Merge the answers before training into one answer if they are equal. They are equal if the
        # runs have the same base model.
        before = [answer for answer in answers if answer.step == 0]
        if len({answer.text for answer in before}) == 1:
            merged = before[0]._replace(label=", ".join(answer.label for answer in before))
            answers = [merged, *(answer for answer in answers if answer.step)]
        prompt_samples = [sample for sample in samples if sample["prompt"] == text]
        row = next(filter(None, (sample.get("row") for sample in prompt_samples)), "")
        expected = next(filter(None, (sample.get("expected") for sample in prompt_samples)), "")
        prompts.append(ShownPrompt(shown(row), turns, expected, answers, others))
    return prompts, system


def rewarded_prompts(run: RunFiles) -> list[ShownPrompt]:
    """Return sampled answers of the first, a middle and the last step, to stand side by side.

    The prompts are those whose answers differ most in their reward. From each step, the best and
    the worst answer are shown first.
    """
    files = rollout_files(run.folder / ROLLOUTS)
    if not files:
        return []
    newest = max(files)
    middle = min(files, key=lambda step: abs(2 * step - newest))
    prompts = [ShownPrompt("Answers in training", [], "", [], []) for _ in range(REWARDED_PROMPTS)]
    for step in sorted({min(files), middle, newest}):
        groups: list[RewardedGroup] = []
        with suppress(ValueError):  # the file is damaged
            groups = sorted(read_groups(files[step]), key=lambda group: -group.spread)
        for prompt, group in zip(prompts, groups, strict=False):
            turns = turns_of(group.prompt)
            question = turns[-1].text if turns else group.prompt
            found = []
            for answer in group.answers:
                text = f"{question}\n\n{whole_characters(answer.text)}"
                found.append(ShownAnswer(run.label, step, text, False, answer.reward))
            prompt.answers.extend([found[0], *found[1:][-1:]])
            prompt.others.extend(found[1:-1])
    return [prompt for prompt in prompts if prompt.answers]


def _commands(run: RunFiles) -> dict[str, str]:
    """Return the command that started the run, if it is known, and a command that repeats it."""
    commands = {}
    if run.env.get("command"):
        program, *words = map(str, run.env["command"])
        # `__main__.py` means that the command was `python -m tunesmith`.
        program = Path(program).name.replace("__main__.py", "tunesmith")
        commands["started by"] = shell_command([program, *words])
    output = shell_word(shown(f"output_dir={run.folder}-again"))
    recipe = shell_path(shown(run.folder / RECIPE))
    return commands | {"again": f"tunesmith train {recipe} {output}"}


def _recipe_text(run: RunFiles) -> str:
    with suppress(OSError):
        return read_bytes(run.folder / RECIPE).decode(errors="replace")
    return ""


def _value(value: object) -> str:
    """Format a value of a recipe or of env.json. A list is shown as JSON."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
