"""Copies of tokenizers in the cache, which are read without torch.

Transformers imports torch to find the class of a tokenizer, and some of its classes build the
tokenizer again instead of reading tokenizer.json. A copy is what the loaded tokenizer writes. It is
read by the base class of these classes, which uses the file unchanged. A copy is kept only if it
is equal to the original.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.host.files import cache_folder, cached_once
from tunesmith.host.signals import loading_libraries
from tunesmith.model.weights.safetensors_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

COPY_VERSION = 2  # increase it if the written files or the comparison change
CORE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
DIGEST_FILE = "sha256"  # file of a copy with the digest of all other files
# Larger files are no tokenizer files, so only their size and time are compared.
MAX_READ_BYTES = 100_000_000
# Suffixes of the files from which Transformers loads a tokenizer with a core in Rust.
TOKENIZER_SUFFIXES = (".jinja", ".json", ".model", ".txt")
# Attributes that can be defined by the class of the original.
CLASS_SETTINGS = ("model_input_names", "padding_side")
COMPARED_SETTINGS = (
    *CLASS_SETTINGS,
    "all_special_tokens",
    "chat_template",
    "clean_up_tokenization_spaces",
    "model_max_length",
    "special_tokens_map",
    "split_special_tokens",
    "truncation_side",
)
# Texts with spaces at all places, digits, several scripts, combined letters, and bytes that are in
# few vocabularies.
PROBE_TEXTS = (
    "",
    " ",
    "The answer is 12345, isn't it?",
    "  two spaces\n\n\tand a tab \r\n",
    "def f(x):\n    return x ** 2  # ok\n",
    "e\u0301 \u00e9 \u017e \u0394\u03b5\u03bd \u0416\u0443\u043a \u05e9\u05dc\u05d5\u05dd",
    "\u8fd9\u662f\u4e00\u5ea7\u6865\u3002 \u3053\u308c\u306f \ud55c\uad6d\uc5b4",
    "\U0001f389 yes\u200d\ufb01\x00\u2581x",
)


def find_copy(folder: Path) -> Path:
    """Return the path in the cache for the copy of the tokenizer in `folder`.

    It depends on the contents of the files from which Transformers chooses a class and loads the
    tokenizer.
    """
    digest = hashlib.sha256()
    for part in (str(COPY_VERSION), version("transformers"), version("tokenizers")):
        digest.update(f"{part}\n".encode())
    for file in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        # The index of the weights can be large, and is not read.
        is_read = file.suffix in TOKENIZER_SUFFIXES and not file.name.endswith(".index.json")
        if is_read and file.is_file():
            about = file.stat()
            digest.update(f"{file.relative_to(folder)} {about.st_size}\n".encode())
            if about.st_size > MAX_READ_BYTES:
                digest.update(f"{about.st_mtime_ns}\n".encode())
            else:
                digest.update(file.read_bytes())
    return cache_folder("tokenizers") / digest.hexdigest()


def read_copy(copy: Path, folder: Path) -> PreTrainedTokenizerFast | None:
    """Read the copy of the tokenizer in `folder`. Return None if there is no unchanged copy."""
    if not (copy / CORE_FILE).is_file():
        return None
    with loading_libraries():
        from transformers import PreTrainedTokenizerFast

    # The files of the cache can be damaged, and Transformers and tokenizers raise many kinds of
    # errors for damaged files.
    with suppress(Exception):
        if (copy / DIGEST_FILE).read_text() != _digest(copy):
            return None
        tokenizer = PreTrainedTokenizerFast.from_pretrained(copy)
        tokenizer.name_or_path = str(folder)
        return tokenizer
    return None


def write_copy(copy: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a copy of a tokenizer, unless its class or the comparison shows that it would differ.

    In this case the copy has no CORE_FILE, so that later starts do not try again.
    """
    # A start needs no copy, so ignore all errors: of a cache that is not writable, and of
    # tokenizers that Transformers cannot save.
    with suppress(Exception), cached_once(copy, what="the copy of the tokenizer") as folder:
        if _has_own_methods(tokenizer):
            return
        tokenizer.save_pretrained(folder)
        config = folder / CONFIG_FILE
        settings = {name: getattr(tokenizer, name) for name in CLASS_SETTINGS}
        config.write_text(json.dumps({**read_json(config), **settings}), encoding="utf-8")
        (folder / DIGEST_FILE).write_text(_digest(folder))
        read = read_copy(folder, folder)
        if read is None or _facts(read) != _facts(tokenizer):
            (folder / CORE_FILE).unlink(missing_ok=True)


def _digest(copy: Path) -> str:
    """Return the sha256 (hex) of the files of a copy, without DIGEST_FILE."""
    digest = hashlib.sha256()
    for file in sorted(copy.rglob("*")):
        if file.is_file() and file.name != DIGEST_FILE:
            digest.update(f"{file.relative_to(copy)} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def follow_core_file(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Set the steps of a tokenizer to those of its tokenizer.json, as servers read it.

    Some classes of Transformers build steps of their own, although the file has other ones.
    """
    from tokenizers import Tokenizer

    core = Tokenizer.from_file(str(file))
    for step in ("normalizer", "pre_tokenizer", "model", "decoder"):
        setattr(tokenizer.backend_tokenizer, step, getattr(core, step))


def _has_own_methods(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the class of a tokenizer has code that a copy would not run.

    Classes of Transformers with a core in Rust define only how this core is built.
    """
    from transformers import PreTrainedTokenizerFast

    for parent in type(tokenizer).__mro__:
        if parent is PreTrainedTokenizerFast:
            return False
        if not parent.__module__.startswith("transformers."):
            return True
        for name, value in vars(parent).items():
            is_code = inspect.isroutine(value) or inspect.isdatadescriptor(value)
            if is_code and name != "__init__":
                return True
    return True


def _facts(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """Return everything by which a copy is compared with its original."""
    facts: list[object] = [getattr(tokenizer, name) for name in COMPARED_SETTINGS]
    facts += [tokenizer.backend_tokenizer.to_str(), tokenizer.get_vocab()]
    facts.append({i: repr(token) for i, token in tokenizer.added_tokens_decoder.items()})
    special = "".join(tokenizer.all_special_tokens)
    for text in (*PROBE_TEXTS, special, f"a {special} b"):
        for adds_special in (False, True):
            encoded = tokenizer(text, add_special_tokens=adds_special, return_offsets_mapping=True)
            facts += [dict(encoded), tokenizer.decode(encoded["input_ids"])]
    return facts
