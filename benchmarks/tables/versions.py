"""The quick tests on the lowest and the newest torch, and Transformers with PEFT, that pyproject.toml allows.

    make versions                                                                # all four sets
    python benchmarks/tables/versions.py --processes 2 lowest-newest             # some, each TORCH-LIBRARIES
    python benchmarks/tables/versions.py --write docs/measurements/README.md     # the table, from the record

The other packages are of constraints.txt, where the set admits them. Each set has an environment of
its own in .versions/, made anew by uv, whose cache there holds the files once: some 12 GB, as PyPI has
torch with CUDA only; UV_TORCH_BACKEND=cpu takes smaller ones. What needs a GPU is left out.

Each set's date, versions and counts go into docs/measurements/versions.json. Exit code 1: a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from generated import table, write_or_check
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs/measurements/versions.json"
FOLDER = ROOT / ".versions"
# What moves together: Transformers and PEFT call each other.
GROUPS = (("torch",), ("transformers", "peft"))
PACKAGES = tuple(name for group in GROUPS for name in group)
SETS = ("lowest-lowest", "lowest-newest", "newest-lowest", "newest-newest")


def lowest_versions() -> dict[str, str]:
    """The lowest release of each package that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = {}
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name in PACKAGES:
            [floor] = (s.version for s in requirement.specifier if s.operator == ">=")
            # Of an alpha, which PyPI does not have, the release.
            lowest[requirement.name] = Version(floor).base_version
    return lowest


def run(*command: str | Path, **environment: str) -> int:
    """A command in the clone's folder; its exit status."""
    return subprocess.run(
        [str(word) for word in command], check=False, cwd=ROOT, env={**os.environ, **environment}
    ).returncode


def uv(*words: str | Path) -> None:
    """A command of uv; SystemExit where it fails."""
    status = run(sys.executable, "-m", "uv", *words, UV_CACHE_DIR=str(FOLDER / "cache"))
    if status:
        sys.exit(status)


def make_environment(name: str, extra: list[str]) -> Path:
    """Install a set; the environment's Python.

    extra: packages that are installed without their dependencies.
    """
    FOLDER.mkdir(exist_ok=True)
    environment, resolved = FOLDER / name, FOLDER / f"{name}.txt"
    floors = lowest_versions()
    pins, raised = [], []
    for choice, group in zip(name.split("-"), GROUPS, strict=True):
        for package in group:
            if choice == "lowest":
                pins.append(f"{package}=={floors[package]}\n")
            else:
                raised += ["--upgrade-package", package]
    pinned = FOLDER / f"{name}.in"
    pinned.write_text("".join(pins), encoding="utf-8")
    # uv keeps the versions of an older output where it can.
    shutil.copy(ROOT / "constraints.txt", resolved)
    uv("venv", "--quiet", "--clear", "--python", sys.executable, environment)
    python = environment / "bin/python"
    uv("pip", "compile", "--quiet", "--python", python, "pyproject.toml", pinned, "--extra", "dev",
       *raised, "--no-annotate", "--output-file", resolved)  # fmt: skip
    uv("pip", "install", "--quiet", "--python", python, "--no-deps", "--requirements", resolved,
       "--editable", ".", *extra)  # fmt: skip
    return python


def test(name: str, python: Path, processes: str) -> dict[str, Any]:
    """Run the quick tests; the set's line of the record."""
    results = FOLDER / f"{name}.xml"
    results.unlink(missing_ok=True)
    run(python, "-m", "pytest", "-m", "not slow", "--numprocesses", processes,
        "--dist", "loadfile", "--no-loadscope-reorder", "--junitxml", results,
        OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="")  # fmt: skip
    if not results.exists():
        sys.exit(f"{name}: pytest ended before its tests did")
    [suite] = ElementTree.parse(results).getroot()
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    script = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    found = subprocess.run(
        [python, "-c", script, *PACKAGES], stdout=subprocess.PIPE, text=True, check=True
    )
    return {
        "date": date.today().isoformat(),
        "python": ".".join(map(str, sys.version_info[:3])),
        **dict(zip(PACKAGES, found.stdout.split(), strict=True)),
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
    }


def read_record() -> dict[str, dict[str, Any]]:
    if not RECORD.exists():
        return {}
    record: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["sets"]
    return record


def as_table() -> str:
    """The record for a page."""
    head = ("torch", "Transformers", "PEFT", "Python", "tested on", "passed", "failed", "skipped")
    keys = (*PACKAGES, "python", "date", "passed", "failed", "skipped")
    return table(head, ([str(line[key]) for key in keys] for line in read_record().values()))


def main() -> None:
    if sys.argv[1:2] in (["--write"], ["--check"]):
        sys.exit(write_or_check(__doc__, "benchmarks/tables/versions.py", as_table))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sets", nargs="*", metavar="SET", help=f"{', '.join(SETS)}; all if left out"
    )
    parser.add_argument("--processes", default="auto", help="of pytest")
    parser.add_argument("--extra", action="append", default=[], metavar="PACKAGE==VERSION",
                        help="installed too, without its dependencies")  # fmt: skip
    options = parser.parse_args()
    names = options.sets or SETS
    if unknown := set(names) - set(SETS):
        parser.error(f"{', '.join(sorted(unknown))}: the sets are {', '.join(SETS)}")
    failed = 0
    for name in names:
        print(f"{name} in {FOLDER / name}", flush=True)
        line = test(name, make_environment(name, options.extra), options.processes)
        failed += int(line["failed"])
        # Read now: another set may have been tested beside this one.
        record = {**read_record(), name: line}
        lines = {
            "command": "make versions",
            "tests": "pytest -m 'not slow'",
            "sets": {name: record[name] for name in SETS if name in record},
        }
        RECORD.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(line)}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
