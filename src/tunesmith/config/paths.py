"""Which values of a recipe are files, and what a relative one starts from.

In a recipe a relative path starts from the recipe's folder, so that a recipe and its data can move together; on
the command line it starts from the working directory, and so do `output_dir` and `log.tensorboard_dir` always.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from tunesmith.config.tree import Node
from tunesmith.errors import RecipeError

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".arrow")
TEMPLATES = ("auto", "chat", "alpaca")

_MODEL, _DATA, _TEMPLATE, _OUTPUT = "model", "data", "template", "output"
KINDS = {
    "model.name": _MODEL,
    "model.tokenizer": _MODEL,
    "adapter.from": _MODEL,
    "data.train.source": _DATA,
    "data.validation.source": _DATA,
    "data.template": _TEMPLATE,
    "log.tensorboard_dir": _OUTPUT,
    "output_dir": _OUTPUT,
}
_INDEX = re.compile(r"\.[0-9]+(?=\.|$)")
_HUB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)")


def absolute(node: Node, key: str = "") -> Node:
    """The same tree with every path in it absolute; Hub ids stay as they are."""
    if isinstance(node.value, dict):
        return replace(node, value={k: absolute(v, f"{key}.{k}" if key else k) for k, v in node.value.items()})
    if isinstance(node.value, list):
        return replace(node, value=[absolute(v, f"{key}.{i}") for i, v in enumerate(node.value)])
    kind = KINDS.get(_INDEX.sub("", key))
    if kind is None or not isinstance(node.value, str):
        return node
    return replace(node, value=_resolve(node.value, kind, node, key))


def _resolve(text: str, kind: str, node: Node, key: str) -> str:
    if not text.strip():
        raise RecipeError(f"{key} is empty", where=node.where, fix=f"name one, or remove the line {key}")
    if "$" in text:
        raise RecipeError(
            f"{key}: variables such as {text} are not filled in here",
            where=node.where,
            fix=f'let the shell do it: {key}="{text}" on the command line',
        )
    if "://" in text:
        hub = _HUB.match(text)
        fix = f"write the Hub id: {hub[1]}" if hub else "download it, and give the file or folder"
        raise RecipeError(f"{key} is a Hub id or a file, not a URL: {text}", where=node.where, fix=fix)
    if "\0" in text:
        raise RecipeError(f"{key} has a null character in it: {text!r}", where=node.where, fix="write the name anew")
    base = Path.cwd() if kind == _OUTPUT else node.base
    try:
        path = os.path.abspath(base / Path(text).expanduser())
    except RuntimeError as error:  # ~name of no user
        raise RecipeError(
            f"{key}: {text} has no home", where=node.where, why=str(error), fix="write ~/ or a path"
        ) from None
    return path if _is_path(text, path, kind) else text


def _is_path(text: str, path: str, kind: str) -> bool:
    if kind == _OUTPUT:
        return True
    if kind == _TEMPLATE:
        return text not in TEMPLATES
    if text.startswith(("./", "../", "/", "~")) or text in (".", ".."):
        return True
    suffixes = DATA_SUFFIXES if kind == _DATA else (".gguf",)
    return text.lower().endswith(suffixes) or os.path.exists(path)
