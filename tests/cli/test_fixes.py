"""Every fix that a message proposes can be pasted: keys exist, names are quoted, and commands do
what they say. What a fix takes in, such as the name of a file, stands in it as a hostile name.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tunesmith
from invoke import invoke
from tunesmith.config.load import load_recipe
from tunesmith.config.names import keys
from tunesmith.config.schema import Source
from tunesmith.errors import TunesmithError
from tunesmith.host.shell import shell_command, shell_path, shell_word
from tunesmith.rows.source.open_source import read_rows
from tunesmith.tools.export.gguf.export import export_gguf
from tunesmith.tools.sweep.space import read_space

KEY = re.compile(
    r"(?<![\w./-])((?:model|adapter|data|train|parallel|validate|checkpoint|log|profile)(?:\.[a-z_]+)+)(?==)"
)
HOSTILE = "-a b'\"$(touch ran) `touch ran`;&.x"


@pytest.mark.slow
def test_keys_that_texts_of_the_sources_set_exist() -> None:
    named = [
        key
        for file in Path(tunesmith.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for key in KEY.findall(node.value)
    ]
    assert len(named) > 150
    assert {*named} - {*keys()} == set()


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


def test_fixes_of_our_commands_can_be_pasted(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text('{"data": [{"prompt": "a", "completion": "b"}]}')
    # A command never empties the file that it reads.
    assert fix_of(lambda: read_all("rows.json")).endswith("> new-rows.json")
    words = ["recipes", "copy", "smollm2-135m-lora", f"./{HOSTILE}/{HOSTILE}.yaml"]
    fix = invoke(*words).err.rpartition("fix: ")[2].rpartition("or run: ")[2]
    subprocess.run(["bash", "-c", fix], check=True)
    done = invoke(*words)
    assert done.code == 0
    assert words_in_bash(done.err.rpartition("tunesmith train ")[2], tmp_path) == words[3:]
    fix = fix_of(lambda: export_gguf(tiny, f"{HOSTILE}/a"))
    assert words_in_bash(fix, tmp_path) == ["use", "--output", str(tmp_path / HOSTILE / "a.gguf")]
    setting = fix_of(lambda: read_space(["train.lr=1e-4,3e-4"])).partition("write ")[2]
    assert read_space([f"{setting},3e-4"]).grid()[0] == {"train.learning_rate": "1e-4"}
