"""Every fix that a message proposes can be pasted: flags and keys exist, names are quoted, and
commands do what they say.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import playbook
from cli.fixes import Fix, collect
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

PROGRAMS = (
    "tunesmith", "pip", "sudo", "ssh", "ssh-copy-id", "ssh-keygen", "ls", "iconv", "jq", "sed", "mv", "mkdir", "df", "docker",
    "ip", "unset", "export", "cat", "rm", "hf", "python", "python3", "ping", "ps", "scancel", "sinfo", "wandb", "apt-get", "srun",
)  # fmt: skip
COMMAND = re.compile(
    rf"(?:(?<=^)|(?<=[\s(`]))(?:[A-Z_]+=\S+ )?({'|'.join(PROGRAMS)}) (?=[\w'\"<./-])"
)
# An expression in a command: quoted by one of the functions for it, or of a form in which nothing
# needs quotes.
QUOTED = re.compile(r"^(shell_word|shell_path|shell_command|new_name)\(")
PLAIN = (
    "number",
    "HEARTBEAT_VARIABLE",
    "encoding",
    "line",
    "requirement",
    "_MIN_TRANSFORMERS",
    "SECONDS",
    "name",
    "near[0]",
    "self.name",
    "' '.join(started)",
)
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
# Read in the worker that asks: each collects these tests, and one runs them.
fixes = cache(collect)


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser of a verb, as the command line makes it."""
    parser = argparse.ArgumentParser()
    import_module(command_line.VERBS[verb][0]).add_arguments(parser)
    return parser


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inside in action.choices.values():
                flags |= flags_of(inside)
    return flags


def commands_of(text: str) -> list[str]:
    """The commands within a fix, each up to the next separator of prose."""
    found = []
    for match in COMMAND.finditer(text):
        rest = text[match.start() :]
        found.append(
            re.split(
                r"[;,`]| or |  |\)|: | then | shows | says | tells | lists | compares | prints |\. ",
                rest,
            )[0].strip()
        )
    return found


def kind_of(fix: Fix) -> str:
    text = fix.text
    if COMMAND.search(text):
        return "command"
    if KEY.search(text) or "output_dir=" in text:
        return "key"
    if FLAG.search(text):
        return "flag"
    if re.match(r"[:,;. ]*(<|\{fix\})", text):
        return "made elsewhere"
    if re.match(r"[a-z`.;,(:\[' ]*[A-Za-z]", text) or not text.strip():
        return "words"
    return ""


@pytest.mark.slow
def test_every_fix_is_of_a_known_kind() -> None:
    """How many there are of each kind is shown with -rA; a collector that finds none would pass
    unread.
    """
    counts = Counter(kind_of(fix) for fix in fixes())
    print(
        f"{len(fixes())} fixes: {dict(counts)}; {sum(len(commands_of(fix.text)) for fix in fixes())} commands"
    )
    assert not [fix for fix in fixes() if not kind_of(fix)]
    assert len(fixes()) > 500
    assert counts["command"] > 100
    assert counts["key"] > 50


@pytest.mark.slow
def test_a_verb_and_its_flags_exist() -> None:
    wrong, checked = list[tuple[str, str, str]](), 0
    for fix in fixes():
        for command in commands_of(fix.text):
            words = re.sub(r"^[A-Z_]+=\S+ ", "", command).split()
            if words[0] != "tunesmith" or len(words) < 2 or not re.match(r"[a-z]", words[1]):
                continue
            checked += 1
            verb = " ".join(words[1:3]) if words[1] == "launch" else words[1]
            if verb not in command_line.VERBS:
                wrong.append((fix.place, command, verb))
                continue
            known = flags_of(parser_of(verb))
            wrong += [
                (fix.place, command, flag) for flag in FLAG.findall(command) if flag not in known
            ]
    assert not wrong
    assert checked > 40


def test_keys_of_a_recipe_exist() -> None:
    named = [(fix.place, key) for fix in fixes() for key in KEY.findall(fix.text)]
    assert not [(place, key) for place, key in named if key not in keys()]
    assert len(named) > 60


def test_flags_exist() -> None:
    known = set(THEIR_FLAGS).union(*(flags_of(parser_of(verb)) for verb in command_line.VERBS))
    known |= set().union(*(playbook.flags_of(name) for name in playbook.SCRIPTS))
    named = [(fix.place, flag) for fix in fixes() for flag in FLAG.findall(fix.text)]
    assert not [(place, flag) for place, flag in named if flag not in known]
    assert len(named) > 50


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
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {text}"], cwd=folder, capture_output=True, check=True
    )
    assert not (folder / "ran").exists()
    return [word.decode("utf-8", "surrogateescape") for word in shown.stdout.split(b"\0")[:-1]]


@pytest.mark.parametrize(
    "value",
    [
        HOSTILE,
        "plain",
        "",
        "two\nlines",
        "tab\t\x1b[31m",
        "é €",
        "\\n",
        "bad\udcff",
        "--force",
        "~",
        "*",
    ],
    ids=ascii,
)
def test_a_word_comes_back_from_a_shell(value: str, tmp_path: Path) -> None:
    assert words_in_bash(shell_word(value), tmp_path) == [value]
    assert words_in_bash(shell_command(["a", value]), tmp_path) == ["a", value]
    assert "\n" not in shell_word(value)
    assert words_in_bash(shell_path(value), tmp_path) == [
        f"./{value}" if value.startswith("-") else value
    ]


def test_the_doctors_fixes_are_lines_of_a_shell(tmp_path: Path) -> None:
    """Each as the doctor would say it of a machine with hostile names; remarks are comments."""
    checked = 0
    memory = dict.fromkeys(("MemAvailable", "MemTotal", "MemFree", "Cached"), 1.0)
    for case, texts in TEXTS.items():
        names = {name for text in texts for name in re.findall(r"{(\w+)", text)} - {"host"}
        numbers = set(re.findall(r"{(\w+):[^}]*f}", " ".join(texts)))
        values = {
            name: 1.0 if name in numbers else memory if name == "gib" else HOSTILE for name in names
        }
        command = finding(case, host=HOSTILE, **values).fix.partition("    #")[0]
        if command:
            bash = subprocess.run(
                ["bash", "-n", "-c", command], capture_output=True, text=True, check=False
            )
            assert bash.returncode == 0, (case, command, bash.stderr)
            checked += 1
    assert checked > 40
    assert not (tmp_path / "ran").exists()


def fix_of(action: Callable[[], object]) -> str:
    with pytest.raises(TunesmithError) as refused:
        action()
    return refused.value.fix


def file_of(folder: Path, suffix: str, content: bytes) -> Path:
    path = folder / f"{HOSTILE}{suffix}"
    path.write_bytes(content)
    return path


def reading(folder: Path, suffix: str, content: bytes) -> Callable[[], object]:
    """Read rows from a file of that content, with a hostile name without its folder: it begins with
    a dash.
    """
    name = file_of(folder, suffix, content).name

    def read() -> object:
        rows = read_rows(Source(source=name, format="prompt-completion"))
        return [rows[number] for number in range(len(rows))]

    return read


TWO_ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
CASES: dict[str, tuple[Callable[[Path], Callable[[], object]], str, Callable[[Path, str], bool]]] = {
    "jq": (
        lambda f: reading(f, ".json", b'{"it\'s \\"$(touch ran)": [{"prompt": "a", "completion": "b"}]}'), "jq",
        lambda f, out: "completion" in (f / "rows.json").read_text(),
    ),
    "jq of objects": (
        lambda f: reading(f, ".json", b'{\n"prompt": "a", "completion": "b"\n}\n{"prompt": "c", "completion": "d"\n}\n'), "jq",
        lambda f, out: [*map(json.loads, (f / "rows.jsonl").read_text().splitlines())] == TWO_ROWS,
    ),
    "jq of arrays": (
        lambda f: reading(f, ".json", b'[{"prompt": "a", "completion": "b"}][{"prompt": "c", "completion": "d"}]'), "jq",
        lambda f, out: [*map(json.loads, (f / "rows.jsonl").read_text().splitlines())] == TWO_ROWS,
    ),
    "iconv of rows": (
        lambda f: reading(f, ".csv", "prompt,completion\ncafé,b\n".encode("latin-1")), "iconv",
        lambda f, out: "café" in (f / "fixed.csv").read_text(encoding="utf-8"),
    ),
    "iconv of a recipe": (
        lambda f: lambda: load_recipe(file_of(f, ".yaml", "model: {name: café}\n".encode("latin-1")).name), "iconv",
        lambda f, out: "café" in (f / "fixed.yaml").read_text(encoding="utf-8"),
    ),
    "sed": (
        lambda f: reading(f, ".jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": \n{"prompt": "a", "completion": "b"}\n'), "sed",
        lambda f, out: out == '{"prompt": \n',
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_pasted_command_does_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, program, holds = CASES[name]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    monkeypatch.chdir(tmp_path)
    fix = fix_of(make(tmp_path))
    assert fix.startswith(program), fix
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shell = subprocess.run(
        ["bash", "-c", fix], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert shell.returncode == 0, shell.stderr
    assert holds(tmp_path, shell.stdout)
    assert not (tmp_path / "ran").exists()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_command_never_empties_the_file_that_it_reads(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"data": [{"prompt": "a", "completion": "b"}]}')
    fix = fix_of(
        lambda: read_rows(Source(source=str(tmp_path / "rows.json"), format="prompt-completion"))
    )
    assert fix.endswith("> new-rows.json")


def test_a_name_behind_a_printed_command_is_one_word(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(HOSTILE).mkdir()
    assert command_line.main(["recipes", "copy", "smollm2-135m-lora", f"./{HOSTILE}"]) == 0
    err = capsys.readouterr().err
    copied = f"./{HOSTILE}/smollm2-135m-lora.yaml"
    assert words_in_bash(err.rpartition("tunesmith train ")[2], tmp_path) == [copied]
    fix = fix_of(lambda: export_gguf(tiny, f"{HOSTILE}/a"))
    assert words_in_bash(fix, tmp_path) == ["use", "--output", str(tmp_path / HOSTILE / "a.gguf")]


def test_keys_that_are_proposed_can_be_given() -> None:
    setting = fix_of(lambda: read_space(["train.lr=1e-4,3e-4"])).partition("write ")[2]
    assert read_space([f"{setting},3e-4"]).grid()[0] == {"train.learning_rate": "1e-4"}


@pytest.mark.slow
def test_commands_of_ours_that_are_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tunesmith` itself, started by the shell from the fix: a folder is made, then a recipe is
    copied over another.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tunesmith").symlink_to(Path(sys.prefix, "bin", "tunesmith"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}", prepend=":")
    there = f"./{HOSTILE}/{HOSTILE}.yaml"
    for _ in range(2):
        assert command_line.main(["recipes", "copy", "smollm2-135m-lora", there]) == 2
        fix = re.search(r"fix: (?:.*, or run: )?(.*)", capsys.readouterr().err)
        assert fix is not None
        subprocess.run(["bash", "-c", fix[1]], cwd=tmp_path, check=True, capture_output=True)
        if not Path(there).exists():
            assert command_line.main(["recipes", "copy", "smollm2-135m-lora", there]) == 0
            capsys.readouterr()
    assert Path(there).is_file()
    assert not list(tmp_path.rglob("ran"))
