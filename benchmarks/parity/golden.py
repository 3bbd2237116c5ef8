"""What the command line prints and promises, as files: the plans of all shipped recipes and the
help pages of all verbs.

    python benchmarks/parity/same_bits.py plans --write     # tests/planning/golden/plans.json
    python benchmarks/parity/same_bits.py help --write      # tests/cli/golden/help.txt

Tests hold both files, so that a change of a plan or an option is seen in its diff. `same_bits.py
record` writes them for any checkout, and `compare` names what differs. Both come from the command
line alone (`main` with words, as a shell would give them), so that they mean the same before and
after a refactoring.

Plans of recipes that ship need neither the network nor a GPU: the shapes of their models are in the
package.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PLANS = ROOT / "tests" / "planning" / "golden" / "plans.json"
HELP = ROOT / "tests" / "cli" / "golden" / "help.txt"
COLUMNS = "100"

# Each chip of chips.json alone, the machines that shipped recipes are for, and a CPU with as much
# memory everywhere.
MACHINES: dict[str, list[str]] = {
    "cpu": ["here", "model.dtype=bf16"],  # with CPU_BYTES, and without a speed
    "dgx-spark": ["dgx-spark"],
    "2x-dgx-spark": ["2x-dgx-spark"],
    "h100": ["h100"],
    "8xh100": ["8xh100"],
    "2x8xh100": ["2x8xh100"],
    "h200": ["h200"],
    "a100-80gb": ["a100-80gb"],
    "l40s": ["l40s"],
    "rtx-4090": ["rtx-4090"],
    "rtx-5090": ["rtx-5090"],
}
CPU_BYTES = 64 << 30
# Sentences, and what chips.json says already.
LEFT_OUT = (
    "machines.",
    "work.source",
    "plan.why.",
    "plan.memory.free",
    "plan.memory.least",
    "gguf.",
)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in nested JSON; an empty list or object is a value too."""
    if not isinstance(value, dict | list) or not value:
        yield key, value
        return
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(item, f"{key}.{name}" if key else str(name))


def run_verb(words: list[str]) -> tuple[int, str, str]:
    """The exit code of a command, its stdout and its stderr."""
    from tunesmith.cli.main import main

    stdout = io.StringIO()
    stderr = io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = main(words)
    return code, stdout.getvalue(), stderr.getvalue()


def short_error(code: int, stderr: str) -> dict[str, Any]:
    """The exit code of a refusal, and its `where`: a key of the recipe, or a machine."""
    places = re.findall(r"^  where: (.+)", stderr, re.MULTILINE)
    return {"exit": code, "where": places[-1] if places else ""}


def short_plan(code: int, plan: dict[str, Any]) -> dict[str, Any]:
    """What a diff should show of `plan --json`: all that is known of the run.

    Zeros and empty values are left out, and numbers have 6 digits: another machine's numpy may
    round the last one differently.
    """
    summary: dict[str, Any] = {"exit": code}
    for key, value in leaves(plan):
        name = key.removeprefix("meshes.0.")
        if value and not name.startswith(LEFT_OUT):
            summary[name] = float(f"{value:.6g}") if isinstance(value, float) else value
    return summary


def plans() -> dict[str, dict[str, Any]]:
    """`RECIPE on MACHINE` -> `short_plan`, of every shipped recipe on every machine."""
    from tunesmith.errors import EXIT_USAGE
    from tunesmith.planning import machines

    machines.available_memory = lambda: CPU_BYTES
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["PATH"] = temporary  # without nvidia-smi, `here` is a CPU on every machine
        os.environ["TUNESMITH_CACHE"] = (
            f"{temporary}/cache"  # tokens that lie in the user's cache change a plan
        )
        os.environ["HF_HUB_OFFLINE"] = "1"
        for recipe in json.loads(run_verb(["recipes", "--json"])[1]):
            name = recipe["name"]
            for machine, words in MACHINES.items():
                code, output, errors = run_verb(["plan", name, "--json", "--on", *words])
                # A recipe that asks for what the machine cannot do has an error in place of a plan.
                if not output and code != EXIT_USAGE:
                    sys.exit(
                        f"tunesmith plan {name} --on {machine} ended with {code} and printed nothing"
                    )
                if output:
                    plan = short_plan(code, json.loads(output))
                else:
                    plan = short_error(code, errors)
                rows[f"{name} on {machine}"] = plan
    return rows


def plans_text() -> str:
    """The plans as JSON, a line each."""
    lines = [f" {json.dumps(name)}: {json.dumps(plan)}" for name, plan in plans().items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def help_text() -> str:
    """The help page of every verb that `tunesmith --help` lists, below the command that prints it."""
    os.environ["COLUMNS"] = COLUMNS
    os.environ["NO_COLOR"] = "1"
    _, overview, _ = run_verb(["--help"])
    # Commands of one or two words, with two spaces before what they do.
    verbs = re.findall(r"^  (\S+(?: \S+)?)  ", overview, re.MULTILINE)
    if not verbs:
        sys.exit("no command was found in the page of tunesmith --help")
    pages = {"tunesmith --help": overview}
    for verb in verbs:
        code, page, _ = run_verb([*verb.split(), "--help"])
        if code or not page:
            sys.exit(f"tunesmith {verb} --help ended with {code}")
        pages[f"tunesmith {verb} --help"] = page
    version = f"Python {sys.version_info.major}.{sys.version_info.minor}"  # argparse lays out as each version pleases
    return f"Written with {version}\n" + "".join(
        f"\n$ {command}\n{page}" for command, page in pages.items()
    )


WRITERS = {"plans": (plans_text, PLANS), "help": (help_text, HELP)}

if __name__ == "__main__":  # in a process of its own, whose tunesmith is that of PYTHONPATH
    sys.stdout.write(WRITERS[sys.argv[1]][0]())
