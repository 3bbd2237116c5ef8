"""Resolution of the paths in a recipe: which values are paths, and which folder they are relative
to.

A relative path in a recipe file is relative to the file's folder, so that a recipe and its data can
be moved together. A relative path on the command line is relative to the working directory. The
paths `output_dir` and `log.tensorboard_dir` are always relative to the working directory.
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
# Keys whose value is a path or a Hub id. A value with one of the listed file suffixes is a path.
_INPUTS = {
    "model.name": (".gguf",),
    "model.tokenizer": (".gguf",),
    "adapter.from": (".gguf",),
    "data.train.source": DATA_SUFFIXES,
    "data.validation.source": DATA_SUFFIXES,
    "data.template": (),
    "method.reward": (".py",),
}
_HUB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)")


def is_pattern(text: str) -> bool:
    """Return whether a source is a glob pattern, such as `rows/*.jsonl`."""
    return glob.has_magic(text) and not os.path.exists(text)


def is_written_as_path(text: str) -> bool:
    """Return whether a text can only be a path and not a Hub id, which has exactly one slash in the
    middle.
    """
    begins = text.startswith(("./", "../", "/", "~")) or text in (".", "..")
    return begins or text.endswith("/") or text.count("/") > 1


def pattern_folder(pattern: Path) -> Path:
    """Return the innermost folder that contains all files of a glob pattern."""
    return next(folder for folder in pattern.parents if not glob.has_magic(str(folder)))


def inputs_of(run: Run) -> dict[str, str]:
    """Return a dict from the dotted key of each input of a resolved recipe to its value.

    An input is an absolute path, a Hub id or the name of a template.
    """
    inputs = {}
    for key, value in flatten(run).items():
        name = without_indices(key)
        if value is not None and name in _INPUTS and name != "method.reward":
            inputs[key] = str(value)
    reward = run.method.reward
    for scorer in (reward,) if isinstance(reward, str) else reward:
        file, function = _split_function(scorer)
        if function:
            inputs[f"method.reward {function[1:]}"] = file
    return inputs


def is_place(key: str) -> bool:
    """Return whether the value of a dotted key is a file, a folder or a Hub id."""
    return without_indices(key) in (*_INPUTS, *_OUTPUTS)


def resolve_paths(node: Node, key: str = "", *, relative_to: Path | None = None) -> Node:
    """Return the tree with absolute paths. Hub ids are unchanged.

    Args:
        relative_to: make the paths of inputs relative to this folder, because the recipe file is
            written to this folder. A path stays absolute if the relative path would lead to another
            file because of a symbolic link.
    """
    children = {
        name: resolve_paths(child, f"{key}.{name}".lstrip("."), relative_to=relative_to)
        for name, child in node.children()
    }
    if isinstance(node.value, dict):
        return replace(node, value=children)
    if isinstance(node.value, list):
        return replace(node, value=list(children.values()))
    name = without_indices(key)
    text = node.value
    if not isinstance(text, str) or name not in (*_OUTPUTS, *_INPUTS):
        return node
    function = ""
    if name == "method.reward":
        text, function = _split_function(text)
        # The name of a scorer of tunesmith is not a path.
        if not function:
            return node
    path = _resolve(text, name, node, key)
    if relative_to is None:
        return replace(node, value=path + function)
    if path == text or name in _OUTPUTS:
        return node
    relative = os.path.relpath(path, relative_to)
    # If `relative_to` contains a symbolic link, `..` means the parent of the link's target. Use the
    # absolute path if `relative` then leads to another file.
    entered = os.path.realpath(os.path.join(os.path.realpath(relative_to), relative))
    if entered != os.path.realpath(path):
        relative = path
    return replace(node, value=relative + function, base=relative_to)


def _split_function(text: str) -> tuple[str, str]:
    """Split `file.py:function` into the file and `:function`, which is "" for other texts."""
    file, colon, function = text.rpartition(":")
    return (file, colon + function) if file.endswith(".py") else (text, "")


def _resolve(text: str, name: str, node: Node, key: str) -> str:
    """Return the absolute path of `text`. A Hub id or the name of a template is unchanged.

    Raise MachineError if `text` is `demo` and the demo model is not installed.
    """
    # `build_run` later raises an error for an empty text.
    if not text:
        return text
    hub = _HUB.match(text)
    if "$" in text or "://" in text or "\0" in text:
        raise RecipeError(
            f"{key} must be a path or a Hub id, without $, :// and null characters, but is"
            f" {text!r}",
            where=node.where,
            fix=f"write the Hub id: {hub[1]}"
            if hub
            else "write the path itself: the file of a URL must be downloaded first, and only the "
            "command line expands variables",
        )
    # Outputs are relative to the working directory, and inputs to the folder of the recipe file.
    base = Path.cwd() if name in _OUTPUTS else node.base
    # os.path.expanduser keeps `~name` of an unknown user; Path.expanduser raises RuntimeError.
    path = os.path.abspath(base / os.path.expanduser(text))
    if name == "data.template":
        return text if text in TEMPLATES else path
    if name in _OUTPUTS or is_written_as_path(text):
        return path
    # `name/name` can be a Hub id or a relative path. It is a path if it has the suffix of a data
    # file, is a glob pattern, or exists on the disk.
    if text.lower().endswith(_INPUTS[name]) or is_pattern(text) or os.path.exists(path):
        return path
    if name == "model.name" and text == demo_model.DEMO_NAME:
        return str(demo_model.demo_model())
    return text
