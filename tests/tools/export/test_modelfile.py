"""Modelfiles, read by the rules of Ollama's own parser (parser/parser.go), say what was meant.

A command is a word of letters and a space, a value goes to the end of its line. A value that opens
with a quote goes on over lines until a line ends with that quote; nothing is escaped. Characters that
cannot be printed are dropped.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from errors import refuses
from tunesmith.errors import ModelError
from tunesmith.tools.export.gguf.ollama import modelfile_text, ollama_name

COMMANDS = "from license template system adapter draft renderer parser parameter message requires"
_COMMAND = re.compile(r"([A-Za-z]+)[ \t]")
_PARAMETER = re.compile(r"([A-Za-z0-9_]+)[ \t]")


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """(command, value) in the order of the file; a parameter by its own name. ValueError for a text
    that Ollama refuses.
    """
    commands = []
    place = 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        if text[place] == "#":
            place = _line_end(text, place)
            continue
        match = _COMMAND.match(text, place)
        if match is None or match[1].lower() not in COMMANDS.split():
            raise ValueError(f"no command: {text[place:]!r}")
        name = match[1].lower()
        if name == "parameter":
            match = _PARAMETER.match(text, match.end())
            if match is None:
                raise ValueError("a parameter without a value")
            name = match[1]
        value, place = _read_value(text, match.end())
        commands.append((name, value))
    if "from" not in dict(commands):
        raise ValueError("no FROM line")
    return commands


def _line_end(text: str, place: int) -> int:
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def _read_value(text: str, start: int) -> tuple[str, int]:
    end = start
    while end < len(text):
        end = _line_end(text, end)
        value = "".join(
            char for char in text[start:end].strip() if char.isprintable() or char in "\n\t"
        )
        for quote in ('"""', '"'):
            if value.startswith(quote):
                if len(value) >= 2 * len(quote) and value.endswith(quote):
                    return value[len(quote) : -len(quote)], end
                break
        else:
            return value, end
        end += 1
    raise ValueError(f"a quote that nothing closes: {text[start:]!r}")


def opened_run(end: str, system: str | None = None) -> Any:
    """What a Modelfile is written from: answers end with `end`, or with the tokenizer's own token."""
    tokenizer = SimpleNamespace(eos_token_id=1, decode=lambda ids: {7: end}[ids[0]])
    config = SimpleNamespace(max_position_embeddings=8192)
    return SimpleNamespace(
        files=SimpleNamespace(tokenizer=tokenizer, config=config),
        location=SimpleNamespace(
            run=SimpleNamespace(data=SimpleNamespace(seq_len=512, system=system))
        ),
        template=SimpleNamespace(end_ids=frozenset({1, 7})),
    )


@pytest.mark.parametrize(
    ("file_name", "end", "system"),
    [
        ("orders.gguf", "<|im_end|>", None),
        ("my orders #2.gguf", "<｜end▁of▁sentence｜>", "Be brief."),
        ("orders.gguf", "###", 'Say "yes" or "no"'),
        ("orders.gguf", " user:", '"quoted"'),
        ("orders.gguf", "###", "One.\n\n# Two\n\tFROM here  "),
        ("orders.gguf", "###", '""'),
        ("orders.gguf", "###", 'a """ b 日本'),
    ],
)
def test_ollama_reads_of_a_modelfile_what_was_meant(file_name, end, system):
    expected = [("from", f"./{file_name}"), ("num_ctx", "4096"), ("stop", end)]
    expected += [("system", system)] if system else []
    assert read_modelfile(modelfile_text(file_name, opened_run(end, system))) == expected


@pytest.mark.parametrize(
    ("end", "system", "where"),
    [("###", 'Quote with """\nand go on.', "data.system"), ('a"b', None, "--to ollama")],
)
def test_what_a_modelfile_cannot_hold_is_refused(end: str, system: str | None, where: str) -> None:
    with refuses(ModelError, where=where, fix=["--to gguf"]):
        modelfile_text("a.gguf", opened_run(end, system))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("out/my-model_v1.5", "my-model_v1.5"),
        ("out/öllama x", "llama-x"),
        (".exported", "exported"),
        ("模型", "my-model"),
        ("n" * 99, "n" * 80),
        (".", "my-faq"),
    ],
)
def test_the_name_for_ollama_is_one_that_it_takes(folder, name, tmp_path, monkeypatch):
    (tmp_path / "my faq").mkdir()
    monkeypatch.chdir(tmp_path / "my faq")
    assert ollama_name(Path(folder)) == name
