"""The template that a recipe's `data.template` names, or that its rows and its tokenizer need."""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config.row_formats import ROW_FORMATS
from tunesmith.config.schema import Data
from tunesmith.data.rows.samples import Message
from tunesmith.data.text import builtin_templates
from tunesmith.data.text.rendering import ChatRenderer
from tunesmith.data.text.template import Template, prefix_ids, title_of
from tunesmith.data.text.template_args import (
    assign_arguments,
    parse_template,
    split_arguments,
    with_arguments,
)
from tunesmith.data.text.try_template import try_template
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.text.placeholders import PictureProcessor


def select_template(
    data: Data,
    tokenizer: "PreTrainedTokenizerBase",
    eos_ids: Collection[int],
    pictures: "PictureProcessor | None" = None,
) -> Template:
    """The template that `data.template` names.

    Args:
        eos_ids: those at which generation stops (the generation config's list).
        pictures: as of `Template`; None: rows have none.

    Raises:
        DataError: there is no such template, or it cannot tell answers from prompts.
    """
    make = partial(Template, tokenizer, eos_ids, pictures=pictures)
    formats = [ROW_FORMATS[source.format] for source in (*data.train, *data.validation)]
    may_have_tools = any("tools" in form.columns for form in formats)
    chat_template = _chat_template_of(tokenizer, pictures, tools=may_have_tools)
    if chat_template is not None and data.template in ("auto", "chat"):
        try_template(chat_template, title_of("chat"))
        chat_template = _with_arguments(chat_template, data, tokenizer, "chat")
    are_plain = bool(formats) and all(form.is_plain for form in formats)
    needs_none = chat_template is None and are_plain
    if data.template == "raw" or (data.template == "auto" and needs_none):
        why = "the tokenizer has no chat template"
        if data.template == "raw":
            why = "data.template is raw"
        if data.system is not None:
            what = "a raw prompt has no system message"
            fix = "remove data.system, or data.template=alpaca"
            raise DataError(what, where="data.system", why=why, fix=fix)
        if data.template_args:
            what = "a raw prompt has no template to take arguments"
            fix = "remove data.template_args, or data.template=FILE.jinja"
            raise DataError(what, where="data.template_args", why=why, fix=fix)
        return make(jinja=None, name="raw")
    if data.template == "auto" and formats and not any(form.has_turns for form in formats):
        # Chats with what is trained here use the tokenizer's template.
        try:
            return make(jinja=chat_template, name="text")
        except DataError:
            return make(jinja=None, name="raw")
    if data.template == "chat" and chat_template is None:
        raise DataError(
            "the tokenizer has no chat template",
            where="data.template",
            why="`chat` uses the tokenizer's; base models often have none",
            fix="data.template=alpaca, or data.template=FILE.jinja",
        )
    if data.template in ("auto", "chat") and chat_template is not None:
        template = make(jinja=chat_template, name="chat")
        if not may_have_tools or not _is_plain_chatml(template.chat):
            return template
        arguments, jinja = split_arguments(chat_template)
        jinja = assign_arguments(builtin_templates.with_tools(jinja), arguments)
        return make(jinja=jinja, name="chat")
    if data.template in ("auto", "alpaca"):
        # A template of ours writes BOS where the tokenizer adds it to plain text.
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and bos in prefix_ids(tokenizer)
        jinja = builtin_templates.alpaca(bos=adds_bos)
        jinja = _with_arguments(jinja, data, tokenizer, "alpaca")
        return make(jinja=jinja, name="alpaca")
    path = Path(data.template).expanduser()
    jinja = _with_arguments(_read_template(path), data, tokenizer, path.name)
    return make(jinja=jinja, name=path.name)


def _with_arguments(jinja: str, data: Data, tokenizer: "PreTrainedTokenizerBase", name: str) -> str:
    """The template `name` with `data.template_args`; DataError for one that it does not take."""
    return with_arguments(
        jinja, data.template_args, title=title_of(name), special_tokens=tokenizer.special_tokens_map
    )


def _chat_template_of(
    tokenizer: "PreTrainedTokenizerBase", pictures: "PictureProcessor | None", *, tools: bool
) -> str | None:
    """The tokenizer's chat template as one text; some have several, `tool_use` among them."""
    templates = tokenizer.chat_template
    if templates is None and pictures is not None:
        # Older models have it beside their processor alone.
        templates = pictures.chat_template
    if not isinstance(templates, dict):
        return templates
    default = templates.get("default")
    if tools and default is not None and "tool_use" in templates:
        return builtin_templates.either("{%- if tools %}", templates["tool_use"], default)
    return default


def _is_plain_chatml(chat: ChatRenderer | None) -> bool:
    """Return whether a template is ChatML that writes no tools, no calls and no results."""
    if chat is None or chat.traits.calls or chat.traits.lists_tools:
        return False
    turns = (("user", "one"), ("assistant", "two"), ("tool", "three"), ("assistant", "four"))
    messages: list[Message] = [{"role": role, "content": text} for role, text in turns]
    chatml = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns]
    try:
        text = chat.render(messages[:2])
    except DataError:
        return False
    if not text.endswith("".join(chatml[:2])):
        return False
    try:
        text = chat.render(messages)
    except DataError:
        return True  # it takes no results
    return "three" not in text or text.endswith("".join(chatml))


def _read_template(path: Path) -> str:
    """A Jinja file, tried for its syntax; DataError if it cannot be read or is not Jinja."""
    from jinja2 import TemplateSyntaxError

    try:
        jinja = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"the template {str(path)!r} cannot be read",
            where="data.template",
            why=str(why),
            fix="use a Jinja file, or one of auto, chat, alpaca, raw",
        ) from error
    try_template(jinja, title_of(path.name))
    try:
        parse_template(jinja)
    except TemplateSyntaxError as error:
        raise DataError(
            "the template is not valid Jinja",
            where=f"{path}:{error.lineno}",
            why=str(error.message),
            fix="fix that line",
        ) from error
    return jinja
