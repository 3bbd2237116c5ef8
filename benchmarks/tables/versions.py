"""Run of the quick tests on the lowest and on the newest versions that pyproject.toml allows.

    make versions                                                            # all four sets
    python benchmarks/tables/versions.py --processes 2 lowest-newest         # some of the sets
    python benchmarks/tables/versions.py --write docs/measurements/README.md # write the table

The name of a set is TORCH-LIBRARIES: the first word selects the version of torch, the second word
those of Transformers and PEFT. The other packages have the versions of constraints.txt if the set
allows these versions. Tests that need a GPU are skipped.

For each set, uv creates a new environment in .versions/. The cache of uv is in the same folder, so
that the sets share the downloaded files, about 12 GB. Set UV_TORCH_BACKEND=cpu to install torch
without CUDA, which is smaller.

The date, versions and counts of each set are written to docs/measurements/versions.json. The exit
status is 1 if a test failed.
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
# Packages that get the same choice of version. Transformers and PEFT call each other.
GROUPS = (("torch",), ("transformers", "peft"))
PACKAGES = tuple(name for group in GROUPS for name in group)
SETS = ("lowest-lowest", "lowest-newest", "newest-lowest", "newest-newest")


def lowest_versions() -> dict[str, str]:
    """Return the lowest release of each package in PACKAGES that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = {}
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name in PACKAGES:
            [floor] = (s.version for s in requirement.specifier if s.operator == ">=")
            # If the minimum is an alpha version, use the final release, because PyPI does not have
            # the alpha version.
            lowest[requirement.name] = Version(floor).base_version
    return lowest


def run(*command: str | Path, **environment: str) -> int:
    """Run a command in the root of the checkout. Return its exit status."""
    return subprocess.run(
        [str(word) for word in command], check=False, cwd=ROOT, env={**os.environ, **environment}
    ).returncode


def uv(*words: str | Path) -> None:
    """Run uv. Raise SystemExit with its exit status if it fails."""
    status = run(sys.executable, "-m", "uv", *words, UV_CACHE_DIR=str(FOLDER / "cache"))
    if status:
        sys.exit(status)


def make_environment(name: str, extra: list[str]) -> Path:
    """Create the environment of a set. Return the path of its Python.

    Args:
        name: the name of the set.
        extra: packages to install in addition, without their dependencies.
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
    # `uv pip compile` keeps the versions of an existing output file if they are allowed.
    shutil.copy(ROOT / "constraints.txt", resolved)
    uv("venv", "--quiet", "--clear", "--python", sys.executable, environment)
    python = environment / "bin/python"
    uv("pip", "compile", "--quiet", "--python", python, "pyproject.toml", pinned, "--extra", "dev",
       *raised, "--no-annotate", "--output-file", resolved)  # fmt: skip
    uv("pip", "install", "--quiet", "--python", python, "--no-deps", "--requirements", resolved,
       "--editable", ".", *extra)  # fmt: skip
    return python


def test(name: str, python: Path, processes: str) -> dict[str, Any]:
    """Run the quick tests in the environment of a set. Return the set's entry for the record."""
    results = FOLDER / f"{name}.xml"
    results.unlink(missing_ok=True)
    run(python, "-m", "pytest", "-m", "not slow", "--numprocesses", processes,
        "--dist", "loadfile", "--no-loadscope-reorder", "--junitxml", results,
        OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="")  # fmt: skip
    if not results.exists():
        sys.exit(f"{name}: pytest ended without results; see its output above")
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
    """Return the record as a table in Markdown."""
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
        "sets", nargs="*", metavar="SET", help=f"{', '.join(SETS)}; default: all sets"
    )
    parser.add_argument("--processes", default="auto", help="number of pytest processes")
    parser.add_argument("--extra", action="append", default=[], metavar="PACKAGE==VERSION",
                        help="package to install too, without its dependencies")  # fmt: skip
    options = parser.parse_args()
    names = options.sets or SETS
    if unknown := set(names) - set(SETS):
        parser.error(f"unknown set {', '.join(sorted(unknown))}; use {', '.join(SETS)}")
    failed = 0
    for name in names:
        print(f"{name} in {FOLDER / name}", flush=True)
        line = test(name, make_environment(name, options.extra), options.processes)
        failed += int(line["failed"])
        # Read the record again, because another process may have tested another set concurrently.
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
