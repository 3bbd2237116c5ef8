"""The chat templates that other packages of this environment ship, and what is trained with them.

Templates are read where TRL and Axolotl are installed; none of their text is in this repository.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from chat_tokenizers import train
from tunesmith.config.schema import Data, Source
from tunesmith.errors import TunesmithError
from tunesmith.tokens.encode import EncodedRow, RowBatch, RowEncoder
from tunesmith.tokens.text.builtin_templates import HERMES, with_fixed_date
from tunesmith.tokens.text.select_template import select_template
from tunesmith.tokens.text.template import Template, TrainOn

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


# The source of llama-cpp-python has templates of llama.cpp, with other spellings of tokens and ends.
LLAMA_CPP = Path(sys.prefix) / "llama_cpp_python-0.3.36.tar.gz"
_SPECIAL_OF_LLAMA_CPP = re.compile(
    _SPECIAL.pattern
    + r"|\]~!b\[|\]~b\]|\[e~\[|</?think>|<\|[^|<>\s]{1,40}\|>|<｜[^｜<]{1,40}｜>|</assistant>|<seed:eos>"
    r"|<SPECIAL_12>|<sep>"
)
_ENDS_OF_LLAMA_CPP = (
    *("[e~[", "<|end_of_text|>", "<|assistant_end|>", "<|end_of_msg|>", "<|endoftext|>"),
    *("</assistant>", "<seed:eos>", "<SPECIAL_12>", "<sep>", "<｜hy_eos:opensource｜>"),
)


@cache
def template_names() -> list[str]:
    """`package/name` of each template of the packages that are installed."""
    return [name for name in _templates() if not name.startswith("llama.cpp/")]


def all_template_names() -> list[str]:
    """Those of llama.cpp, too, if its source is here."""
    return list(_templates())


@cache
def _templates() -> dict[str, str]:
    templates = {}
    if LLAMA_CPP.is_file():
        with tarfile.open(LLAMA_CPP) as archive:
            for member in archive:
                if "/models/templates/" in member.name and member.name.endswith(".jinja"):
                    content = archive.extractfile(member)
                    assert content is not None
                    text = content.read().decode()
                    templates[f"llama.cpp/{Path(member.name).stem}"] = text
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
    if name.startswith("llama.cpp/"):
        # Hy3 makes the names of its tokens from a format.
        text = _templates()[name].replace("{}｜>'.format(HYTK)", ":opensource｜>'")
        return sorted(set(_SPECIAL_OF_LLAMA_CPP.findall(text)))
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
    for words in ((*_ENDS, *_ENDS_OF_LLAMA_CPP), *_LATER_ENDS):
        ids = {tokenizer.convert_tokens_to_ids(word) for word in words if word in special}
        if ids:
            return ids
    return {tokenizer.eos_token_id}


@cache
def encoder_of(name: str, train_on: TrainOn = "response", **arguments: Any) -> RowEncoder:
    """What makes examples of rows of the format messages, by one stored template."""
    source = Source(source="rows.jsonl", format="messages")
    data = Data(train=(source,), template_args=arguments)
    template = select_template(data, tokenizer_of(name), _end_ids(name))
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


class Rendering(NamedTuple):
    """A conversation as a template writes it, and all before its last message, to be answered."""

    text: str
    prompt: str


def own_renderings(
    name: str, template: Template, messages: Sequence[Message], tools: Tools
) -> Iterator[Rendering]:
    """What Transformers' apply_chat_template writes for a conversation in each of its spellings.

    A thought may be a key of its own under two names, or stand in the content; arguments may be an
    object or its JSON text. Spellings that the template refuses are left out.
    """
    jinja = with_fixed_date(_templates()[name])
    has_tools = tools or any(message.get("tool_calls") for message in messages)
    if has_tools and HERMES in (template.jinja or ""):
        # Plain ChatML has no tools; the template in use does.
        jinja = template.jinja or ""
    render = partial(tokenizer_of(name).apply_chat_template, chat_template=jinja, tokenize=False)
    for thought, arguments in itertools.product(_THOUGHTS, (_same, _as_json_text)):
        spelled = [arguments(thought(message)) for message in messages]
        with suppress(jinja2.TemplateError, TypeError, ValueError, KeyError):
            prompt = render(spelled[:-1], tools, add_generation_prompt=True)
            yield Rendering(render(spelled, tools), prompt)


def _same(message: Message) -> Message:
    return message


def _as_thinking(message: Message) -> Message:
    """gpt-oss's key."""
    if "reasoning_content" not in message:
        return message
    return {**message, "thinking": message["reasoning_content"]}


def _as_field(message: Message) -> Message:
    """A thought that opens the content, as a key."""
    if message["role"] != "assistant" or not message["content"].lstrip().startswith("<think>"):
        return message
    thought, closed, rest = message["content"].lstrip()[len("<think>") :].partition("</think>")
    if not closed:
        return message
    return {**message, "reasoning_content": thought.strip(), "content": rest.lstrip()}


def _inline(form: str, message: Message) -> Message:
    if "reasoning_content" not in message:
        return message
    message = dict(message)
    thought = message.pop("reasoning_content")
    message["content"] = form.format(thought.strip()) + message["content"]
    return message


_WITH_BREAKS = "<think>\n{}\n</think>\n\n"
_THOUGHTS = (
    _same,
    _as_thinking,
    _as_field,
    lambda message: _as_thinking(_as_field(message)),
    partial(_inline, _WITH_BREAKS),
    # Also those that stand in the content already.
    lambda message: _inline(_WITH_BREAKS, _as_field(message)),
    lambda message: _inline("<think>{}</think>", _as_field(message)),
)


def _as_json_text(message: Message) -> Message:
    """The arguments of calls as JSON text, as OpenAI's API has them."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls} if calls else message
