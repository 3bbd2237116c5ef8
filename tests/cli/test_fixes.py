"""Every fix that a message proposes can be pasted: flags and keys exist, names are quoted, and
commands do what they say.

What a fix takes in at run time, such as the name of a file, stands in it as a hostile name.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

import playbook
from invoke import invoke
from tunesmith.cli import main as command_line
from tunesmith.config.load import load_recipe
from tunesmith.config.names import keys
from tunesmith.config.schema import Source
from tunesmith.data.source.open_source import read_rows
from tunesmith.errors import TunesmithError
from tunesmith.host.shell import shell_command, shell_path, shell_word
from tunesmith.tools.doctor.system import TEXTS, finding
from tunesmith.tools.export.gguf.export import export_gguf
from tunesmith.tools.sweep.space import read_space

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (ROOT / "src" / "tunesmith", ROOT / "scripts")
PROGRAMS = (
    "tunesmith", "pip", "sudo", "ssh", "ssh-copy-id", "ssh-keygen", "ls", "iconv", "jq", "sed", "mv", "mkdir", "df", "docker",
    "ip", "unset", "export", "cat", "rm", "hf", "python", "python3", "ping", "ps", "scancel", "sinfo", "wandb", "apt-get", "srun",
)  # fmt: skip
COMMAND = re.compile(
    rf"(?:(?<=^)|(?<=[\s(`]))(?:[A-Z_]+=\S+ )?({'|'.join(PROGRAMS)}) (?=[\w'\"<./-])"
)
END_OF_COMMAND = re.compile(
    r"[;,`]| or |  |\)|: | then | shows | says | tells | lists | compares | prints |\. "
)
# An expression in a command: quoted by one of the functions for it, or of a form in which nothing
# needs quotes.
QUOTED = re.compile(r"^(shell_word|shell_path|shell_command|new_name)\(")
PLAIN = (
    "number", "HEARTBEAT_VARIABLE", "encoding", "line", "requirement", "_MIN_TRANSFORMERS", "SECONDS", "name", "near[0]", "self.name",
    "' '.join(started)",
)  # fmt: skip
KEY = re.compile(
    r"(?<![\w./-])((?:model|adapter|data|train|parallel|validate|checkpoint|log|profile)(?:\.[a-z_]+)+)(?==|: )"
)
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# Flags of other programs, which fixes name as well.
THEIR_FLAGS = {
    "--advertise-addr", "--flag", "--force", "--lora", "--force-reinstall", "--local-dir", "--login", "--max-restarts", "--no-deps", "--nproc-per-node",
    "--now", "--only-upgrade", "--runtime", "--sort", "--stream", "--upgrade", "--version", "--endpoint", "--ranks", "--nodes", "--ntasks-per-node",
    "--availability", "--set-as-default", "--model_args", "--validate", "--repo-type",
}  # fmt: skip


class Fix(NamedTuple):
    """The text of a fix: `parts` are texts, and expressions, whose source is in a tuple of one."""

    place: str
    parts: tuple[str | tuple[str], ...]

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else f"<{part[0]}>" for part in self.parts)


def expressions(node: ast.expr) -> Iterator[ast.expr]:
    """The alternatives of a conditional expression, or of an `or`; else the expression itself."""
    parts = {ast.IfExp: ("body", "orelse"), ast.BoolOp: ("values",)}.get(type(node), ())
    for name in parts:
        inside = getattr(node, name)
        for value in inside if isinstance(inside, list) else [inside]:
            yield from expressions(value)
    if not parts:
        yield node


def parts_of(node: ast.expr) -> tuple[str | tuple[str], ...]:
    """The text and the expressions of a string, an f-string or a sum of them."""
    match node:
        case ast.Constant(value=str() as text):
            return (text,)
        case ast.JoinedStr(values=values):
            return tuple(part for value in values for part in parts_of(value))
        case ast.FormattedValue(value=value):
            return ((ast.unparse(value),),)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return (*parts_of(left), *parts_of(right))
    return ((ast.unparse(node),),)


def values_of_fix(node: ast.AST) -> Iterator[ast.expr]:
    """What a call or an assignment gives as a fix."""
    match node:
        case ast.Call(keywords=keywords):
            yield from (keyword.value for keyword in keywords if keyword.arg == "fix")
        case ast.Assign(targets=[ast.Name(id="fix" | "fixes")], value=value):
            yield value
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
            for name, value in zip(names, values, strict=False):
                if isinstance(name, ast.Name) and name.id in ("fix", "fixes"):
                    yield value
        case ast.AugAssign(target=target, value=value):
            if ast.unparse(target).rpartition(".")[2] == "fix":
                yield value


@cache
def fixes() -> list[Fix]:
    """All fixes of the sources that are texts, then those of the doctor's table."""
    found = []
    for file in sorted(path for folder in SOURCES for path in folder.rglob("*.py")):
        text = file.read_text()
        if "fix" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            for value in values_of_fix(node):
                for one in expressions(value):
                    if not isinstance(one, ast.Name | ast.Attribute):
                        found.append(Fix(f"{file.relative_to(ROOT)}:{one.lineno}", parts_of(one)))
    found += [Fix(f"doctor: {case}", (texts[3],)) for case, texts in TEXTS.items() if texts[3]]
    return found


@cache
def flags_of(verb: str) -> set[str]:
    """The flags of a verb and of the commands below it."""
    parser = argparse.ArgumentParser()
    import_module(command_line.VERBS[verb][0]).add_arguments(parser)
    parsers, flags = [parser], set()
    for one in parsers:
        for action in one._actions:
            flags |= {*action.option_strings}
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return flags


def commands_of(text: str) -> list[str]:
    """The commands within a fix, each up to the next separator of prose."""
    found = COMMAND.finditer(text)
    return [END_OF_COMMAND.split(text[match.start() :])[0].strip() for match in found]


@pytest.mark.slow
def test_verbs_flags_and_keys_exist() -> None:
    """A collector that finds none would pass unread."""
    everywhere = THEIR_FLAGS.union(*map(flags_of, command_line.VERBS))
    everywhere |= set().union(*map(playbook.flags_of, playbook.SCRIPTS))
    wrong, verbs, named = list[tuple[str, str]](), 0, 0
    for fix in fixes():
        found = [(key, key in keys()) for key in KEY.findall(fix.text)]
        found += [(flag, flag in everywhere) for flag in FLAG.findall(fix.text)]
        for command in commands_of(fix.text):
            words = re.sub(r"^[A-Z_]+=\S+ ", "", command).split()
            if words[0] == "tunesmith" and len(words) > 1 and re.match(r"[a-z]", words[1]):
                verb = " ".join(words[1:3]) if words[1] == "launch" else words[1]
                known = flags_of(verb) if verb in command_line.VERBS else set()
                found.append((command, known >= {*FLAG.findall(command)} and bool(known)))
                verbs += 1
        wrong += [(fix.place, name) for name, exists in found if not exists]
        named += len(found)
    assert wrong == []
    assert (len(fixes()) > 500, verbs > 40, named > 150) == (True, True, True)


@pytest.mark.slow
def test_what_a_command_takes_in_is_quoted() -> None:
    bare, checked = [], 0
    for fix in fixes():
        for number, part in enumerate(fix.parts):
            if isinstance(part, str):
                continue
            begun = Fix(fix.place, fix.parts[:number]).text + "x"
            commands = commands_of(begun)
            if not commands or not begun.endswith(commands[-1]):
                continue
            checked += 1
            if part[0] not in PLAIN and not QUOTED.search(part[0]):
                bare.append((fix.place, begun, part[0]))
    assert not bare
    assert checked > 20


HOSTILE = "-a b'\"$(touch ran) `touch ran`;&.x"


def words_in_bash(text: str, folder: Path) -> list[str]:
    command = ["bash", "-c", f"printf '%s\\0' {text}"]
    shown = subprocess.run(command, cwd=folder, capture_output=True, check=True)
    assert not (folder / "ran").exists()
    return [word.decode("utf-8", "surrogateescape") for word in shown.stdout.split(b"\0")[:-1]]


def test_a_word_comes_back_from_a_shell(tmp_path: Path) -> None:
    odd = [HOSTILE, "plain", "", "two\nlines", "tab\t\x1b[31m", "é €", "\\n", "bad\udcff", "--force", "~", "*"]  # fmt: skip
    words = " ".join(map(shell_word, odd))
    assert "\n" not in words
    assert words_in_bash(words, tmp_path) == odd
    assert words_in_bash(shell_command(odd), tmp_path) == odd
    paths = [f"./{value}" if value.startswith("-") else value for value in odd]
    assert words_in_bash(" ".join(map(shell_path, odd)), tmp_path) == paths


def test_the_doctors_fixes_are_lines_of_a_shell(tmp_path: Path) -> None:
    """Each as the doctor would say it of a machine with hostile names; remarks are comments."""
    commands = []
    memory = dict.fromkeys(("MemAvailable", "MemTotal", "MemFree", "Cached"), 1.0)
    for case, texts in TEXTS.items():
        names = {name for text in texts for name in re.findall(r"{(\w+)", text)} - {"host"}
        numbers = set(re.findall(r"{(\w+):[^}]*f}", " ".join(texts)))
        values = {
            name: 1.0 if name in numbers else memory if name == "gib" else HOSTILE for name in names
        }
        command = finding(case, host=HOSTILE, **values).fix.partition("    #")[0]
        commands += [f"({command})"] if command else []
    # One shell reads all of them, each in its own parentheses.
    words = ["bash", "-n", "-c", "\n".join(commands)]
    bash = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (bash.returncode, bash.stderr) == (0, "")
    assert len(commands) > 40


def fix_of(action: Callable[[], object]) -> str:
    with pytest.raises(TunesmithError) as refused:
        action()
    return refused.value.fix


def read_all(name: str) -> object:
    rows = read_rows(Source(source=name, format="prompt-completion"))
    return [rows[number] for number in range(len(rows))]


def read_json_lines(file: Path) -> list[object]:
    return [json.loads(line) for line in file.read_text().splitlines()]


TWO_ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
ONE, TWO = (json.dumps(row).encode() for row in TWO_ROWS)
# A file with a hostile name, the program of the fix, and what holds after it
PASTED: dict[str, tuple[str, bytes, str, Callable[[Path, str], bool]]] = {
    "rows below a key": (".json", b'{"it\'s \\"$(touch ran)": [%s]}' % ONE, "jq", lambda f, out: json.loads((f / "rows.json").read_text()) == TWO_ROWS[:1]),
    "objects without a list": (".json", ONE.replace(b", ", b",\n") + b"\n" + TWO, "jq", lambda f, out: read_json_lines(f / "rows.jsonl") == TWO_ROWS),
    "arrays": (".json", b"[%s][%s]" % (ONE, TWO), "jq", lambda f, out: read_json_lines(f / "rows.jsonl") == TWO_ROWS),
    "rows in latin-1": (".csv", "prompt,completion\ncafé,b\n".encode("latin-1"), "iconv", lambda f, out: "café" in (f / "fixed.csv").read_text()),
    "a recipe in latin-1": (".yaml", "model: {name: café}\n".encode("latin-1"), "iconv", lambda f, out: "café" in (f / "fixed.yaml").read_text()),
    "a torn row": (".jsonl", ONE + b'\n{"prompt": \n' + ONE, "sed", lambda f, out: out == '{"prompt": \n'),
}  # fmt: skip


@pytest.mark.parametrize("name", PASTED)
def test_a_pasted_command_does_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix, content, program, holds = PASTED[name]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    monkeypatch.chdir(tmp_path)
    file = Path(f"{HOSTILE}{suffix}")
    file.write_bytes(content)
    read = load_recipe if suffix == ".yaml" else read_all
    fix = fix_of(lambda: read(file.name))
    assert fix.startswith(program), fix
    shell = subprocess.run(["bash", "-c", fix], capture_output=True, text=True, check=False)
    assert shell.returncode == 0, shell.stderr
    assert holds(tmp_path, shell.stdout)
    assert not Path("ran").exists()
    assert file.read_bytes() == content


def test_a_command_never_empties_the_file_that_it_reads(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"data": [{"prompt": "a", "completion": "b"}]}')
    assert fix_of(lambda: read_all(str(tmp_path / "rows.json"))).endswith("> new-rows.json")


def test_commands_of_ours_with_a_hostile_name(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is made by the fix, then a recipe is copied over another by the next one."""
    monkeypatch.chdir(tmp_path)
    there = f"./{HOSTILE}/{HOSTILE}.yaml"
    words = ["recipes", "copy", "smollm2-135m-lora", there]
    fix = invoke(*words).err.rpartition("fix: ")[2].rpartition("or run: ")[2]
    subprocess.run(["bash", "-c", fix], check=True)
    assert Path(HOSTILE).is_dir()
    done = invoke(*words)
    assert done.code == 0
    assert words_in_bash(done.err.rpartition("tunesmith train ")[2], tmp_path) == [there]
    fix = invoke(*words).err.rpartition("fix: ")[2].rpartition("tunesmith ")[2]
    again = words_in_bash(fix, tmp_path)
    assert (again[:2], again[3:4], "--force" in again) == (words[:2], [there], True)
    assert invoke(*again).code == 0
    fix = fix_of(lambda: export_gguf(tiny, f"{HOSTILE}/a"))
    assert words_in_bash(fix, tmp_path) == ["use", "--output", str(tmp_path / HOSTILE / "a.gguf")]


def test_keys_that_are_proposed_can_be_given() -> None:
    setting = fix_of(lambda: read_space(["train.lr=1e-4,3e-4"])).partition("write ")[2]
    assert read_space([f"{setting},3e-4"]).grid()[0] == {"train.learning_rate": "1e-4"}
