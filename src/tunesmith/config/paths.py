"""The values of a recipe that are files, and the folder that a relative path starts from.

In a recipe a relative path starts from the recipe's folder, so that a recipe and its data can move
together; on the command line it starts from the working directory, and so do `output_dir` and
`log.tensorboard_dir` always.
"""

import glob
import os
import re
from dataclasses import replace
from pathlib import Path

from tunesmith.config.dump import flatten
from tunesmith.config.names import without_indices
from tunesmith.config.schema import Run
from tunesmith.config.tree import Node
from tunesmith.errors import RecipeError
from tunesmith.host import demo_model

ROW_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".arrow")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown")
DATA_SUFFIXES = (*ROW_SUFFIXES, *TEXT_SUFFIXES)
TEMPLATES = ("auto", "chat", "alpaca", "raw")

_OUTPUTS = ("log.tensorboard_dir", "output_dir")
# The keys that hold a path or a Hub id -> the endings that make a text a path.
_INPUTS = {
    "model.name": (".gguf",),
    "model.tokenizer": (".gguf",),
    "adapter.from": (".gguf",),
    "data.train.source": DATA_SUFFIXES,
    "data.validation.source": DATA_SUFFIXES,
    "data.template": (),
}
_HUB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)")


def is_pattern(text: str) -> bool:
    """Return whether a source is a pattern of files, such as `rows/*.jsonl`."""
    return glob.has_magic(text) and not os.path.exists(text)


def is_written_as_path(text: str) -> bool:
    """Return whether a text is a path by its form. A Hub id has one slash."""
    begins = text.startswith(("./", "../", "/", "~")) or text in (".", "..")
    return begins or text.endswith("/") or text.count("/") > 1


def pattern_folder(pattern: Path) -> Path:
    """Return the innermost folder that contains all files of a pattern."""
    return next(folder for folder in pattern.parents if not glob.has_magic(str(folder)))


def inputs_of(run: Run) -> dict[str, str]:
    """Collect a resolved recipe's inputs by key: absolute paths, Hub ids, the template's name."""
    inputs = {}
    for key, value in flatten(run).items():
        if value is not None and without_indices(key) in _INPUTS:
            inputs[key] = str(value)
    return inputs


def is_place(key: str) -> bool:
    """Tell whether a key of a resolved recipe names a file, a folder or a Hub id."""
    return without_indices(key) in (*_INPUTS, *_OUTPUTS)


def resolve_paths(node: Node, key: str = "", *, beside: Path | None = None) -> Node:
    """The same tree with every path in it absolute; Hub ids stay as they are.

    `beside`: instead as a recipe in that folder writes it, the relative paths of inputs from there;
    absolute where a link on the way would make it another file.
    """
    # Below first: what a key holds decides only at a leaf.
    children = {}
    for name, child in node.children():
        children[name] = resolve_paths(child, f"{key}.{name}".lstrip("."), beside=beside)
    if isinstance(node.value, dict):
        return replace(node, value=children)
    if isinstance(node.value, list):
        return replace(node, value=list(children.values()))
    name = without_indices(key)
    text = node.value
    if not isinstance(text, str) or name not in (*_OUTPUTS, *_INPUTS):
        return node
    path = _resolve(text, name, node, key)
    if beside is None:
        return replace(node, value=path)
    if path == text or name in _OUTPUTS:
        return node
    relative = os.path.relpath(path, beside)
    # `..` of a linked folder is another folder to one who enters it, or names it without the link.
    entered = os.path.realpath(os.path.join(os.path.realpath(beside), relative))
    if entered != os.path.realpath(path):
        relative = path
    return replace(node, value=relative, base=beside)


def _resolve(text: str, name: str, node: Node, key: str) -> str:
    """The absolute path that `text` means, or `text` itself if it is a Hub id or the name of a
    template; MachineError if it is the demo's model, which is not installed.
    """
    # `build_run` refuses it.
    if not text:
        return text
    hub = _HUB.match(text)
    if "$" in text or "://" in text or "\0" in text:
        raise RecipeError(
            f"{key} is a path or a Hub id, without variables, null characters or ://: {text!r}",
            where=node.where,
            fix=f"write the Hub id: {hub[1]}"
            if hub
            else "write the path itself; a URL must be downloaded first, and the shell expands "
            "variables on the command line",
        )
    # Outputs belong to where one works, inputs to the file that names them.
    base = Path.cwd() if name in _OUTPUTS else node.base
    # Unlike Path.expanduser, it leaves ~name of no user as it is.
    path = os.path.abspath(base / os.path.expanduser(text))
    if name == "data.template":
        return text if text in TEMPLATES else path
    if name in _OUTPUTS or is_written_as_path(text):
        return path
    # A Hub id may look like a relative path: it is a path if it has a data file's suffix, or is
    # there.
    if text.lower().endswith(_INPUTS[name]) or is_pattern(text) or os.path.exists(path):
        return path
    if name == "model.name" and text == demo_model.DEMO_NAME:
        return str(demo_model.demo_model())
    return text
