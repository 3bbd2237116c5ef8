"""Mutation testing of the engine: the share of small faults in its source that the tests notice.

    python benchmarks/faults/mutants.py map --into /tmp/mutants --count 300 --seed 63
    python benchmarks/faults/mutants.py kill --into /tmp/mutants --json mutants.json
    python benchmarks/faults/mutants.py map --into /tmp/data --only src/tunesmith/data --tests tests/data

`map` draws the mutants and writes a copy of the source in which each of them can be switched on. It
runs the tests once with no mutant on, and records which tests reach which mutant. `kill` switches on
one mutant at a time and runs the tests that reach it, the shortest first, until one fails. A process
collects the tests once and forks for each mutant.

A mutant is killed if a test fails or takes too long. A mutant that no test reaches survives. Tests
that fail without a mutant are not used. Mutants are in bodies of functions: a comparison, an
operator, a condition, a constant or a returned value is changed, or a call is removed. Texts of
errors and of logs are not changed.
"""

from __future__ import annotations

import argparse
import ast
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ("data", "methods", "loss.py", "optim", "adapter", "parallel", "checkpoint", "training")
MARGIN_S = 60  # that the tests of a mutant may take beyond three times their usual seconds

# The copy of the source imports this module. A process reads the active mutant from a file when it
# starts and when it is forked, so that ranks and commands have the mutant of their test.
SWITCH = """
import os

import sys

FOLDER = os.environ["MUTANTS_FOLDER"]
WORKER = os.environ.get("PYTEST_XDIST_WORKER") or os.environ.get("MUTANTS_WORKER", "main")
active = None
seen = set()
is_compiling = bool


def read():
    global active, is_compiling
    seen.clear()
    if "torch" in sys.modules:
        is_compiling = sys.modules["torch"].compiler.is_compiling
    try:
        with open(f"{FOLDER}/active-{WORKER}") as file:
            active = int(file.read())
    except (OSError, ValueError):
        active = None


def mutant(number):
    if active is not None:
        return number == active
    if not is_compiling() and number not in seen:
        seen.add(number)
        try:
            with open(f"{FOLDER}/test-{WORKER}") as file:
                test = file.read()
            with open(f"{FOLDER}/hits-{WORKER}", "a") as file:
                file.write(f"{number}\\t{test}\\n")
        except OSError:
            pass
    return False


read()
os.register_at_fork(after_in_child=read)
"""

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}  # fmt: skip
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def is_text(node: ast.AST) -> bool:
    """Whether a node only makes text: an error, a log line, or an assertion."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func).rpartition(".")
    logs = name[0].rpartition(".")[2].lower() in ("log", "logger", "_log", "warnings")
    return logs or name[2].endswith(("Error", "Warning"))


def changed_expression(node: ast.expr, operand: str) -> ast.expr | None:
    """Return the mutated form of an expression, or None if it has none."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=values) if type(op) in COMPARISONS:
            return ast.Compare(left, [COMPARISONS[type(op)]()], values)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            if any(isinstance(side, ast.JoinedStr) or is_string(side) for side in (left, right)):
                return None
            return ast.BinOp(left, OPERATORS[type(op)](), right)
        case ast.BoolOp(op=op, values=values):
            return ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(op=ast.Not(), operand=inner) | ast.UnaryOp(op=ast.USub(), operand=inner):
            return inner
        case ast.Constant(value=bool() as value):
            return ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            return ast.Constant(value + 1)
        case _ if operand == "test":
            return ast.UnaryOp(ast.Not(), node)
        case _ if operand == "returned" and not isinstance(node, ast.Constant):
            return ast.Constant(None)
    return None


def is_string(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


class Sites(ast.NodeTransformer):
    """Number the places of a module that can be mutated; write switches at the chosen ones.

    Args:
        chosen: {number of the place in this module: number of the mutant}.
    """

    def __init__(self, chosen: dict[int, int] | None = None) -> None:
        self.chosen = chosen or {}
        self.found: list[tuple[int, str]] = []  # (line, the mutated form)
        self.inside = False
        self.operand = ""

    def visit(self, node: ast.AST) -> Any:
        operand, self.operand = self.operand, ""
        if is_text(node) or isinstance(
            node, ast.arguments | ast.arg | ast.AnnAssign | ast.ClassDef
        ):
            if isinstance(node, ast.ClassDef):
                node.body = [self.visit(part) for part in node.body]
            elif isinstance(node, ast.AnnAssign) and node.value and self.inside:
                node.value = self.visit(node.value)
            return node
        if isinstance(node, ast.match_case):  # a pattern cannot hold a switch
            node.body = [self.visit(part) for part in node.body]
            return node
        if isinstance(node, FUNCTIONS):
            was, self.inside = self.inside, True
            node.body = [self.visit(part) for part in node.body]
            self.inside = was
            return node
        if isinstance(node, ast.expr):
            return self.expression(node, operand)
        if isinstance(node, ast.stmt):
            return self.statement(node)
        return super().generic_visit(node)

    def expression(self, node: ast.expr, operand: str) -> ast.expr:
        changed = changed_expression(node, operand) if self.inside else None
        number = None if changed is None else self.place(node, ast.unparse(changed))
        super().generic_visit(node)
        if number is None or changed is None:
            return node
        return ast.IfExp(switch(number), changed, node)

    def statement(self, node: ast.stmt) -> ast.stmt:
        number = None
        match node:
            case ast.Expr(value=ast.Call()) | ast.AugAssign() if self.inside:
                number = self.place(node, f"without {ast.unparse(node)}")
            case ast.Continue() | ast.Break() if self.inside:
                other = ast.Break() if isinstance(node, ast.Continue) else ast.Continue()
                number = self.place(node, ast.unparse(other))
                return node if number is None else ast.If(switch(number), [other], [node])
        for name, value in ast.iter_fields(node):
            if isinstance(value, ast.expr) and name not in ("target", "annotation"):
                self.operand = "returned" if isinstance(node, ast.Return) else name
                setattr(node, name, self.visit(value))
            elif isinstance(value, list) and name not in ("targets", "names", "decorator_list"):
                setattr(node, name, [self.visit(part) for part in value])
        return node if number is None else ast.If(switch(number), [ast.Pass()], [node])

    def place(self, node: ast.stmt | ast.expr, form: str) -> int | None:
        """Note a place; return the number of its mutant if it was chosen."""
        self.found.append((node.lineno, form))
        return self.chosen.get(len(self.found) - 1)


def switch(number: int) -> ast.expr:
    return ast.Call(ast.Name("_mutant"), [ast.Constant(number)], [])


def draw(files: list[Path], count: int, seed: int) -> list[dict[str, Any]]:
    """Draw mutants from all places of the files, each with the same probability."""
    places = []
    for file in files:
        sites = Sites()
        sites.visit(ast.parse(file.read_text()))
        name = str(file.relative_to(ROOT))
        places += [
            {"file": name, "place": place, "line": line, "form": form}
            for place, (line, form) in enumerate(sites.found)
        ]
    chosen = random.Random(seed).sample(places, min(count, len(places)))
    return [{"number": number, **place} for number, place in enumerate(chosen)]


def copy_repository(tree: Path) -> None:
    """Copy the files of the repository, also new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


def write_copy(folder: Path, mutants: list[dict[str, Any]]) -> None:
    """Write a copy of the repository in which each mutant can be switched on."""
    shutil.rmtree(folder / "tree", ignore_errors=True)
    copy_repository(folder / "tree")
    (folder / "tree" / "src" / "tunesmith_mutants.py").write_text(SWITCH)
    by_file = collections.defaultdict(dict)
    for mutant in mutants:
        by_file[mutant["file"]][mutant["place"]] = mutant["number"]
    for name, chosen in by_file.items():
        tree = Sites(chosen).visit(ast.parse((ROOT / name).read_text()))
        after = sum(is_docstring(p) or getattr(p, "module", "") == "__future__" for p in tree.body)
        tree.body[after:after] = ast.parse("from tunesmith_mutants import mutant as _mutant").body
        (folder / "tree" / name).write_text(ast.unparse(ast.fix_missing_locations(tree)))


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and is_string(node.value)


def run_tests(folder: Path, arguments: list[str], **environment: str) -> int:
    tree = folder / "tree"
    search = os.pathsep.join([str(tree / "src"), str(Path(__file__).parent)])
    env = os.environ | {
        "PYTHONPATH": search,
        "MUTANTS_FOLDER": str(folder),
        "TUNESMITH_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    command = [sys.executable, "-m", "pytest", "-p", "mutants", "-q", "--tb=line", *arguments]
    return subprocess.run(command, check=False, env=env, cwd=tree).returncode


def map_tests(folder: Path, arguments: argparse.Namespace) -> None:
    """Draw the mutants and record which tests reach them, and how long each test takes."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("hits-*"), *folder.glob("times-*"), *folder.glob("active-*")]:
        old.unlink()
    roots = arguments.only or [ROOT / "src" / "tunesmith" / name for name in ENGINE]
    files = []
    for root in map(Path.absolute, map(Path, roots)):
        files += sorted(root.rglob("*.py")) if root.is_dir() else [root]
    mutants = draw(files, arguments.count, arguments.seed)
    write_copy(folder, mutants)
    workers = ["-n", str(arguments.workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    run_tests(folder, [*workers, *arguments.tests], MUTANTS_STAGE="map")
    times: dict[str, float] = {}
    for file in folder.glob("times-*"):
        for line in file.read_text().splitlines():
            seconds, test = line.split("\t", 1)
            times[test] = max(float(seconds), times.get(test, 0))
    if not times:
        sys.exit("no test passed without a mutant: see the output of pytest above")
    reached: dict[int, set[str]] = collections.defaultdict(set)
    for file in folder.glob("hits-*"):
        for line in file.read_text().splitlines():
            number, _, test = line.partition("\t")
            if test in times:
                reached[int(number)].add(test)
    for mutant in mutants:
        mutant["tests"] = sorted(reached[mutant["number"]], key=lambda test: (times[test], test))
    (folder / "mutants.json").write_text(json.dumps({"mutants": mutants, "times": times}, indent=1))
    counts = sorted(len(mutant["tests"]) for mutant in mutants)
    print(
        f"{len(mutants)} mutants, {counts.count(0)} not reached, median of tests {counts[len(counts) // 2]}"
    )


def kill(folder: Path, arguments: argparse.Namespace) -> None:
    """Run the tests of each mutant; print and store which of them are killed."""
    found = json.loads((folder / "mutants.json").read_text())
    mutants, times = found["mutants"], found["times"]
    work = []
    for mutant in mutants:
        chosen, spent = [], 0.0
        for test in mutant["tests"]:
            spent += times[test]
            if chosen and spent > arguments.budget:
                break
            chosen.append(test)
        if chosen:
            seconds = sum(times[test] for test in chosen)
            work.append(
                {"number": mutant["number"], "tests": chosen, "limit": 3 * seconds + MARGIN_S}
            )
    # A worker takes every nth mutant of an order by file, so that all of them end together.
    processes = []
    for worker in range(arguments.workers):
        mine = work[worker :: arguments.workers]
        name = f"w{worker}"
        (folder / f"work-{name}").write_text(json.dumps(mine))
        (folder / f"killed-{name}").write_text("")
        tests = {test for mutant in mine for test in mutant["tests"]}
        files = sorted({test.partition("::")[0] for test in tests})
        pid = os.fork()
        if pid == 0:
            out = os.open(folder / f"out-{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os._exit(
                run_tests(
                    folder, ["--no-header", *files], MUTANTS_STAGE="kill", MUTANTS_WORKER=name
                )
            )
        processes.append(pid)
    for pid in processes:
        os.waitpid(pid, 0)
    results = {}
    for worker in range(arguments.workers):
        for line in (folder / f"killed-w{worker}").read_text().splitlines():
            result = json.loads(line)
            results[result.pop("number")] = result
    for mutant in mutants:
        default = {"how": "not reached" if not mutant["tests"] else "not run", "by": ""}
        mutant.update(results.get(mutant["number"], default))
    report(mutants, arguments)


def report(mutants: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the share of killed mutants by folder, and the survivors."""
    by_folder: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for mutant in mutants:
        folder = mutant["file"].removeprefix("src/tunesmith/").partition("/")[0]
        by_folder[folder][mutant["how"]] += 1
        by_folder["all"][mutant["how"]] += 1
    print(
        "| folder | mutants | killed | survived | not reached | killed % |\n|---|---|---|---|---|---|"
    )
    for folder, counts in sorted(by_folder.items(), key=lambda item: (item[0] == "all", item[0])):
        total = sum(counts.values())
        killed = counts["failed"] + counts["too long"]
        survived = total - killed - counts["not reached"]
        print(
            f"| {folder} | {total} | {killed} | {survived} | {counts['not reached']} | {100 * killed / total:.1f} |"
        )
    for mutant in mutants:
        if mutant["how"] not in ("failed", "too long"):
            print(f"{mutant['file']}:{mutant['line']}: {mutant['form'][:90]!r} {mutant['how']}")
    if arguments.json:
        slim = [
            {key: mutant[key] for key in ("file", "line", "form", "how", "by")}
            for mutant in mutants
        ]
        Path(arguments.json).write_text(json.dumps(slim, indent=1) + "\n")


# The rest is a plugin of pytest, in the processes that `run_tests` starts.
STAGE = os.environ.get("MUTANTS_STAGE")


def _folder() -> Path:
    return Path(os.environ["MUTANTS_FOLDER"])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item):  # type: ignore[no-untyped-def]
    """Name the test that runs, and note its seconds if it passed."""
    if STAGE != "map":
        yield
        return
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    (_folder() / f"test-{worker}").write_text(item.nodeid)
    if "tunesmith_mutants" in sys.modules:
        sys.modules["tunesmith_mutants"].read()
    failed = item.session.testsfailed
    start = time.monotonic()
    yield
    if item.session.testsfailed == failed:
        with (_folder() / f"times-{worker}").open("a") as file:
            file.write(f"{time.monotonic() - start:.3f}\t{item.nodeid}\n")


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Fork for each mutant and run its tests there."""
    if STAGE != "kill":
        return None
    name = os.environ["MUTANTS_WORKER"]
    items = {item.nodeid: item for item in session.items}
    for mutant in json.loads((_folder() / f"work-{name}").read_text()):
        tests = [items[test] for test in mutant["tests"] if test in items]
        active = _folder() / f"active-{name}"
        active.write_text(str(mutant["number"]))
        place = tempfile.mkdtemp(prefix="mutant-")
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _run_mutant(session, tests, place)
        how = _wait(pid, mutant["limit"])
        by = Path(place, "failed")
        result = {
            "number": mutant["number"],
            "how": how,
            "by": by.read_text() if by.exists() else "",
            "seconds": round(time.monotonic() - start, 1),
        }
        active.unlink()
        shutil.rmtree(place, ignore_errors=True)
        with (_folder() / f"killed-{name}").open("a") as file:
            file.write(json.dumps(result) + "\n")
    return True


def _run_mutant(session: pytest.Session, tests: list[pytest.Item], place: str) -> None:
    """Run tests in a forked process until one fails; end the process."""
    code = 3
    try:
        os.setsid()
        os.environ["TMPDIR"] = tempfile.tempdir = place
        # A mutant must not leave wrong tokens in the user's cache.
        os.environ["TUNESMITH_CACHE"] = f"{place}/cache"
        code = 0
        for item, following in zip(tests, [*tests[1:], None], strict=True):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                Path(place, "failed").write_text(item.nodeid)
                code = 1
                break
    except BaseException as error:
        Path(place, "failed").write_text(repr(error))
        code = 1
    finally:
        os._exit(code)


def _wait(pid: int, limit: float) -> str:
    """Wait for the process of a mutant and end all that it has started."""
    deadline = time.monotonic() + limit
    how = "too long"
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            how = "survived" if status == 0 else "failed"
            break
        time.sleep(0.05)
    for stop in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(pid, stop)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    if how == "too long":
        os.waitpid(pid, 0)
    return how


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=("map", "kill"))
    parser.add_argument(
        "--into", type=Path, required=True, help="folder of the copy and the results"
    )
    parser.add_argument("--count", type=int, default=300, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=63)
    parser.add_argument(
        "--only", nargs="*", help="files or folders to mutate; the engine if left out"
    )
    parser.add_argument(
        "--tests", nargs="*", default=["tests"], help="arguments of pytest for the map"
    )
    parser.add_argument("--budget", type=float, default=120, help="seconds of tests for a mutant")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", help="file for the list of mutants and their fates")
    arguments = parser.parse_args()
    (map_tests if arguments.stage == "map" else kill)(arguments.into.absolute(), arguments)


if __name__ == "__main__":
    main()
