"""Resolution of the paths in a recipe: which values are paths, and which folder they are relative
to.

A relative path in a recipe file is relative to the file's folder, so that a recipe and its data can
be moved together. A relative path on the command line is relative to the working directory. The
paths `output_dir` and `log.tensorboard_dir` are always relative to the working directory.
"""

import glob
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.config.dump import flatten
from tunesmith.config.names import without_indices
from tunesmith.config.schema import Run
from tunesmith.config.yaml_file import RecipeLayer
from tunesmith.errors import ModelError
from tunesmith.host.files import find_similar_path
from tunesmith.host.shell import shell_path, shell_word

ROW_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".arrow")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown")
DATA_SUFFIXES = (*ROW_SUFFIXES, *TEXT_SUFFIXES)
PICTURE_SUFFIXES = tuple(".png .jpg .jpeg .webp .gif .bmp .tif .tiff .avif .jp2 .jfif .ppm".split())
TEMPLATES = ("auto", "chat", "alpaca", "raw")

_OUTPUTS = ("log.tensorboard_dir", "output_dir")
# Keys whose value is a path or a Hub id. A value with one of the listed file suffixes is a path.
_INPUTS = {
    "model.name": (".gguf",),
    "model.tokenizer": (),
    "adapter.from": (),
    "data.train.source": DATA_SUFFIXES,
    "data.validation.source": DATA_SUFFIXES,
    "data.template": (),
    "method.reward": (".py",),
}


class PathFromRelative(str):
    """An absolute path that the user has written as a relative path."""


def is_pattern(text: str) -> bool:
    """Return whether a source is a glob pattern, such as `rows/*.jsonl`."""
    return glob.has_magic(text) and not os.path.exists(text)


def is_written_as_path(text: str) -> bool:
    """Return whether a text can only be a path and not a Hub id, which has exactly one slash in the
    middle.
    """
    begins = text.startswith(("./", "../", "/", "~")) or text in (".", "..")
    return begins or text.endswith("/") or text.count("/") > 1


def find_local_model(name: str) -> Path | None:
    """Return the local folder that `model.name` names, or None for a Hub id.

    Raise ModelError if the folder does not exist, or for a .gguf file.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    if name.endswith(".gguf"):
        raise ModelError(
            f"{name} is a .gguf file, which cannot be trained",
            where="model.name",
            fix=gguf_fix(path.parent, path.name),
        )
    if not (is_written_as_path(name) or path.is_file()):
        return None
    near = path.parent if path.is_file() else find_similar_path(path)
    fix = f"did you mean {near}?" if near else "correct the path, or use a Hub id: owner/name"
    raise ModelError(
        f"there is no folder {name}",
        where="model.name",
        fix=f"{fix}; if the base model of a run was moved, set model.name in the run's config.yaml",
    )


def gguf_fix(folder: str | Path, file: str) -> str:
    """Return the fix for a .gguf file: the command that writes its model as a folder."""
    program = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T, "
        "GgufConfig as G; name, file = sys.argv[1:]; "
        "M.from_pretrained(name, gguf_file=file, quantization_config=G(dequantize=True))"
        '.save_pretrained("converted"); '
        'T.from_pretrained(name, gguf_file=file).save_pretrained("converted")'
    )
    command = f"python -c {shell_word(program)} {shell_path(Path(folder))} {shell_word(file)}"
    return f"convert it once, then use that folder: {command}"


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


def resolve_paths(layer: RecipeLayer, base: Path) -> RecipeLayer:
    """Return the layer with absolute paths. Hub ids are unchanged.

    Args:
        base: the folder that the paths of inputs are relative to.
    """
    return replace(layer, values=_map_paths(layer.values, partial(_resolve, base)))


def relative_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values of a recipe that is written to `folder`, with relative paths.

    The paths of inputs become relative to the folder, and those of outputs to the working
    directory. A path that the user wrote as an absolute path remains absolute.
    """
    relative: dict[str, Any] = _map_paths(values, partial(_relative, folder))
    return relative


def _map_paths(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """Replace each path in the values of a recipe by `change(key, path)`."""
    if isinstance(value, dict):
        return {
            name: _map_paths(item, change, f"{key}.{name}".lstrip("."))
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_map_paths(item, change, f"{key}.0") for item in value]
    name = without_indices(key)
    if not isinstance(value, str) or not is_place(name):
        return value
    file, function = _split_function(value) if name == "method.reward" else (value, "")
    # The name of a scorer of tunesmith is not a path.
    if name == "method.reward" and not function:
        return value
    path = change(name, type(value)(file))
    return type(path)(path + function)


def _split_function(text: str) -> tuple[str, str]:
    """Split `file.py:function` into the file and `:function`, which is "" for other texts."""
    file, colon, function = text.rpartition(":")
    return (file, colon + function) if file.endswith(".py") else (text, "")


def is_valid_path(text: str) -> bool:
    """Return whether a text can be a path or a Hub id: it has no variable and no URL scheme."""
    return not any(part in text for part in ("$", "://", "\0"))


def _resolve(base: Path, name: str, text: str) -> str:
    """Return the absolute path of `text`. A Hub id or the name of a template is unchanged."""
    # An upper layer may replace an empty text or an invalid path. `checked` refuses them later.
    if not text or not is_valid_path(text):
        return text
    # Outputs are relative to the working directory, and inputs to the folder of the recipe file.
    # os.path.expanduser keeps `~name` of an unknown user; Path.expanduser raises RuntimeError.
    expanded = os.path.expanduser(text)
    path = os.path.abspath(expanded if name in _OUTPUTS else base / expanded)
    if not os.path.isabs(text):
        path = PathFromRelative(path)
    if name == "data.template":
        return text if text in TEMPLATES else path
    if name in _OUTPUTS or is_written_as_path(text):
        return path
    # `name/name` can be a Hub id or a relative path. It is a path if it has the suffix of a data
    # file, is a glob pattern, or exists on the disk.
    is_path = text.lower().endswith(_INPUTS[name]) or is_pattern(text) or os.path.exists(path)
    return path if is_path else text


def _relative(folder: Path, name: str, text: str) -> str:
    """Return a path in the notation of the user: relative if it was, for a recipe in `folder`."""
    if not isinstance(text, PathFromRelative):
        return text
    relative = os.path.relpath(text, Path.cwd() if name in _OUTPUTS else folder)
    # If the folder contains a symbolic link, `..` means the parent of the link's target. Use the
    # absolute path if `relative` then leads to another file.
    entered = os.path.realpath(os.path.join(os.path.realpath(folder), relative))
    return relative if name in _OUTPUTS or entered == os.path.realpath(text) else text
