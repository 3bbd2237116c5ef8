"""The chat templates that other packages of this environment ship, and what is trained with them.

Templates are read where TRL and Axolotl are installed; none of their text is in this repository.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2
from chat_tokenizers import train

from tunesmith.config.schema import Data, Source
from tunesmith.data.text.builtin_templates import with_fixed_date
from tunesmith.data.text.select_template import select_template
from tunesmith.data.text.template import Template, TrainOn
from tunesmith.data.tokens.encode import EncodedRow, RowBatch, RowEncoder
from tunesmith.errors import TunesmithError

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

# Where each package keeps its templates, and those that take a content as a list of parts only.
_FOLDERS = {"trl": "chat_templates", "axolotl": "utils/chat_templates/templates"}
_ONLY_PARTS = {"idefics3", "smolvlm", "llava_next", "llava", "pixtral", "llama3_2_vision"}
# Words of a template that are tokens of its model, in the spellings of the families.
_SPECIAL = re.compile(
    r"<\|[A-Za-z_0-9]+\|?>|<[a-z_]+\|>|<｜[^｜<]+｜>|<(?:start|end)_of_(?:turn|utterance)>"
    r"|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS|SYSTEM_PROMPT)\]|\[\|[a-z]+\|\]"
)
# Tokens at which generation stops, as the families' generation configs list them. GLM stops at the
# next turn's header; where a template has both, that is no end.
_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|return|>", "<|call|>", "<end_of_turn>", "<turn|>"),
    *("<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "[|endofturn|]"),
)
_LATER_ENDS = ("<|end|>",), ("<|observation|>", "<|user|>")


@cache
def template_names() -> list[str]:
    """`package/name` of each template of the packages that are installed."""
    return list(_templates())


@cache
def _templates() -> dict[str, str]:
    templates = {}
    for package, folder in _FOLDERS.items():
        # A search alone: the packages themselves are not imported.
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        for file in sorted(Path(spec.submodule_search_locations[0], folder).glob("*.jinja")):
            if file.stem.removesuffix("_training") not in _ONLY_PARTS:
                templates[f"{package}/{file.stem}"] = file.read_text(encoding="utf-8")
    return templates


def special_words(name: str) -> list[str]:
    """The texts of a template's own special tokens."""
    return sorted(set(_SPECIAL.findall(_templates()[name])))


@cache
def tokenizer_of(name: str) -> Any:
    """A byte-level tokenizer with merges over every border, and a template with its tokens."""
    tokenizer = copy.deepcopy(train("bytes", tuple(special_words(name)), False))
    tokenizer.chat_template = _templates()[name]
    return tokenizer


def _end_ids(name: str) -> set[int]:
    tokenizer = tokenizer_of(name)
    special = special_words(name)
    for words in (_ENDS, *_LATER_ENDS):
        ids = {tokenizer.convert_tokens_to_ids(word) for word in words if word in special}
        if ids:
            return ids
    return {tokenizer.eos_token_id}


@cache
def encoder_of(name: str, train_on: TrainOn = "response") -> RowEncoder:
    """What makes examples of rows of the format messages, by one stored template."""
    source = Source(source="rows.jsonl", format="messages")
    template = select_template(Data(train=(source,)), tokenizer_of(name), _end_ids(name))
    return RowEncoder(template, source, None, train_on)


def encode(encoder: RowEncoder, row: dict[str, Any]) -> EncodedRow:
    """One row through the reader and the tokenizer of training; its error is raised."""
    [encoded] = encoder(RowBatch(0, [copy.deepcopy(row)], ["rows.jsonl:1"]))
    if isinstance(encoded, TunesmithError):
        raise encoded
    return encoded


def supervised_texts(template: Template, encoded: EncodedRow) -> list[str]:
    """The decoded supervised stretches of an example, in order."""
    pairs = zip(encoded.example.ids.tolist(), encoded.example.trained.tolist(), strict=True)
    texts = []
    for is_trained, stretch in itertools.groupby(pairs, lambda pair: pair[1]):
        if is_trained:
            texts.append(template.tokenizer.decode([id_ for id_, _ in stretch]))
    return texts


def renderings_of(name: str, messages: Sequence[Message]) -> tuple[str, ...]:
    """A conversation of texts as Transformers' apply_chat_template writes it, and the prompt of its
    last answer; nothing where the template refuses it.
    """
    jinja = with_fixed_date(_templates()[name])
    render = partial(tokenizer_of(name).apply_chat_template, chat_template=jinja, tokenize=False)
    with suppress(jinja2.TemplateError, TypeError, ValueError, KeyError):
        return render(messages), render(messages[:-1], add_generation_prompt=True)
    return ()
