"""Output of the command line without a run: the plans of all shipped recipes and the help pages of
all commands.

    python benchmarks/parity/same_bits.py plans --write     # tests/planning/golden/plans.json
    python benchmarks/parity/same_bits.py help

A test compares the plans with the file, so each change of a plan is visible in the diff of a
commit. `same_bits.py record` also writes the output of any checkout, and `same_bits.py
compare` prints the differences. The output comes only from the command line (`main` with the
arguments of a shell), so it can be compared across a refactoring.

Plans of shipped recipes need neither network nor GPU, because the package contains the shapes of
their models.
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
COLUMNS = "100"

# Each chip of chips.json as a single device, the machines of the shipped recipes, and a CPU with a
# fixed amount of memory.
MACHINES: dict[str, list[str]] = {
    "cpu": ["here", "model.dtype=bf16"],  # has CPU_BYTES of memory and no known speed
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
# Keys that are not recorded: sentences, and values from chips.json
LEFT_OUT = (
    "machines.",
    "work.source",
    "plan.why.",
    "plan.memory.free",
    "plan.memory.least",
    "gguf.",
)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each leaf of nested JSON.

    An empty list or object is a leaf too.
    """
    if not isinstance(value, dict | list) or not value:
        yield key, value
        return
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(item, f"{key}.{name}" if key else str(name))


def run_verb(words: list[str]) -> tuple[int, str, str]:
    """Run a command. Return its exit code, stdout and stderr."""
    from tunesmith.cli.main import main

    stdout = io.StringIO()
    stderr = io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = main(words)
    return code, stdout.getvalue(), stderr.getvalue()


def short_error(code: int, stderr: str) -> dict[str, Any]:
    """Return the exit code and the `where` of an error: a key of the recipe or a machine."""
    places = re.findall(r"^  where: (.+)", stderr, re.MULTILINE)
    return {"exit": code, "where": places[-1] if places else ""}


def short_plan(code: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Return the values of `plan --json` that are recorded.

    Zeros and empty values are omitted. Numbers are rounded to 6 digits, because the last digits
    depend on numpy and the machine.
    """
    summary: dict[str, Any] = {"exit": code}
    for key, value in leaves(plan):
        name = key.removeprefix("meshes.0.")
        if value and not name.startswith(LEFT_OUT):
            summary[name] = float(f"{value:.6g}") if isinstance(value, float) else value
    return summary


def plans() -> dict[str, dict[str, Any]]:
    """Return the recorded plan of each shipped recipe on each machine, by "RECIPE on MACHINE"."""
    from tunesmith.errors import EXIT_USAGE
    from tunesmith.planning import machines

    machines.available_memory = lambda: CPU_BYTES
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["PATH"] = temporary  # without nvidia-smi, `here` is always a CPU
        os.environ["TUNESMITH_CACHE"] = (
            f"{temporary}/cache"  # tokens in the user's cache would change a plan
        )
        os.environ["HF_HUB_OFFLINE"] = "1"
        for recipe in json.loads(run_verb(["recipes", "--json"])[1]):
            name = recipe["name"]
            for machine, words in MACHINES.items():
                code, output, errors = run_verb(["plan", name, "--json", "--on", *words])
                # An error replaces the plan if the machine cannot run the recipe.
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
    """Return the plans as JSON, with one line per plan."""
    lines = [f" {json.dumps(name)}: {json.dumps(plan)}" for name, plan in plans().items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def help_text() -> str:
    """Return the help pages of all commands in `tunesmith --help`, each below its command."""
    os.environ["COLUMNS"] = COLUMNS
    os.environ["NO_COLOR"] = "1"
    _, overview, _ = run_verb(["--help"])
    # Commands have one or two words, and two spaces separate them from their description.
    verbs = re.findall(r"^  (\S+(?: \S+)?)  ", overview, re.MULTILINE)
    if not verbs:
        sys.exit("no command was found in the page of tunesmith --help")
    pages = {"tunesmith --help": overview}
    for verb in verbs:
        code, page, _ = run_verb([*verb.split(), "--help"])
        if code or not page:
            sys.exit(f"tunesmith {verb} --help ended with {code}")
        pages[f"tunesmith {verb} --help"] = page
    # The layout of argparse depends on the version of Python.
    version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    return f"Written with {version}\n" + "".join(
        f"\n$ {command}\n{page}" for command, page in pages.items()
    )


WRITERS = {"plans": plans_text, "help": help_text}

if __name__ == "__main__":  # a separate process imports tunesmith from PYTHONPATH
    sys.stdout.write(WRITERS[sys.argv[1]]())
