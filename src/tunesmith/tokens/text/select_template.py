"""Selection of the chat template.

`data.template` names the template. With `auto`, the row format and the tokenizer determine it.
"""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config.row_formats import ROW_FORMATS
from tunesmith.config.schema import Data
from tunesmith.errors import DataError
from tunesmith.rows.samples import Message
from tunesmith.tokens.text import builtin_templates
from tunesmith.tokens.text.rendering import ChatRenderer
from tunesmith.tokens.text.template import Template, prefix_ids, title_of
from tunesmith.tokens.text.template_args import (
    assign_arguments,
    parse_template,
    split_arguments,
    with_arguments,
)
from tunesmith.tokens.text.try_template import try_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.tokens.text.placeholders import PictureProcessor


def select_template(
    data: Data,
    tokenizer: "PreTrainedTokenizerBase",
    eos_ids: Collection[int],
    pictures: "PictureProcessor | None" = None,
) -> Template:
    """Return the template that `data.template` selects.

    Args:
        eos_ids: ids of the tokens at which generation stops, from the generation config.
        pictures: see `Template`. None if the rows have no pictures.

    Raises:
        DataError: the template does not exist, or it does not separate answers from prompts.
    """
    name = data.template
    make = partial(Template, tokenizer, eos_ids, pictures=pictures)
    formats = [ROW_FORMATS[source.format] for source in (*data.train, *data.validation)]
    may_have_tools = any("tools" in form.columns for form in formats)
    chat_template = _tokenizer_template(tokenizer, pictures, tools=may_have_tools)
    if chat_template is not None and name in ("auto", "chat"):
        try_template(chat_template, title_of("chat"))
        chat_template = _with_arguments(chat_template, data, tokenizer, "chat")
    if name == "auto":
        is_text = bool(formats) and not any(form.has_turns for form in formats)
        if chat_template is None and formats and all(form.is_plain for form in formats):
            name = "raw"
        elif is_text:
            # Rows of plain text are used for training without a template. Save the tokenizer's
            # template for later chats with the model.
            try:
                return make(jinja=chat_template, name="text")
            except DataError:
                return make(jinja=None, name="raw")
        else:
            name = "alpaca" if chat_template is None else "chat"
    if name == "raw":
        _check_raw(data)
        return make(jinja=None, name="raw")
    if name == "chat":
        if chat_template is None:
            raise DataError(
                "the tokenizer has no chat template",
                where="data.template",
                why="data.template=chat uses the tokenizer's template, but base models often have"
                " none",
                fix="set data.template=alpaca, or data.template=FILE.jinja",
            )
        template = make(jinja=chat_template, name="chat")
        if not may_have_tools or not _is_plain_chatml(template.chat):
            return template
        arguments, jinja = split_arguments(chat_template)
        jinja = assign_arguments(builtin_templates.with_tools(jinja), arguments)
        return make(jinja=jinja, name="chat")
    if name == "alpaca":
        # The template must write the BOS token if the tokenizer adds it to plain text.
        bos = tokenizer.bos_token_id
        jinja = builtin_templates.alpaca(bos=bos is not None and bos in prefix_ids(tokenizer))
    else:
        path = Path(name).expanduser()
        name = path.name
        jinja = _read_template(path)
    return make(jinja=_with_arguments(jinja, data, tokenizer, name), name=name)


def _check_raw(data: Data) -> None:
    """Raise DataError if the recipe has settings that need a template."""
    why = "the tokenizer has no chat template"
    if data.template == "raw":
        why = "data.template is raw"
    if data.system is not None:
        what = "a raw prompt has no system message"
        fix = "remove data.system, or set data.template=alpaca"
        raise DataError(what, where="data.system", why=why, fix=fix)
    if data.template_args:
        what = "a raw prompt has no template to take arguments"
        fix = "remove data.template_args, or set data.template=FILE.jinja"
        raise DataError(what, where="data.template_args", why=why, fix=fix)


def _with_arguments(jinja: str, data: Data, tokenizer: "PreTrainedTokenizerBase", name: str) -> str:
    """Write the values of `data.template_args` into a template.

    Raise DataError if the template does not read one of the arguments.
    """
    return with_arguments(
        jinja, data.template_args, title=title_of(name), special_tokens=tokenizer.special_tokens_map
    )


def _tokenizer_template(
    tokenizer: "PreTrainedTokenizerBase", pictures: "PictureProcessor | None", *, tools: bool
) -> str | None:
    """Return the tokenizer's chat template.

    If the tokenizer has the templates `default` and `tool_use`, join them into one.
    """
    templates = tokenizer.chat_template
    if templates is None and pictures is not None:
        # Use the processor's template, because older models store the template only with their
        # processor.
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
        if not chat.render(messages[:2]).endswith("".join(chatml[:2])):
            return False
    except DataError:
        return False
    try:
        text = chat.render(messages)
    except DataError:
        return True  # the template rejects tool results
    return "three" not in text or text.endswith("".join(chatml))


def _read_template(path: Path) -> str:
    """Read a Jinja file and check its syntax.

    Raise DataError if it is not readable or not Jinja.
    """
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
            fix="correct this line of the template",
        ) from error
    return jinja
