"""Arguments of a chat template, such as Qwen's `enable_thinking`, as a part of the template itself.

The arguments are written as assignments at the start of the template. Therefore rows and prompts
use the same values, and every program that renders the saved template uses the values of training.
The values are also a part of the key of the token cache and of the comparison between ranks. A
server may pass arguments to the template (llama.cpp passes `enable_thinking` by default), but the
assignments override them.

The argument `strftime_now` is a date, for example 2026-05-01. It replaces today's date.
"""

import datetime
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from tunesmith.config.names import suggest
from tunesmith.errors import DataError
from tunesmith.tokens.text.builtin_templates import keep_newlines, with_fixed_date, writes_today
from tunesmith.tokens.text.try_template import plain_jinja

if TYPE_CHECKING:
    from jinja2.nodes import Node, Template

# Types of values that a recipe can set. Literals of these types are the same in JSON and Jinja.
Argument = bool | int | float | str

_DATE_ARGUMENT = "strftime_now"
_ARGUMENTS_MARK = "{#- data.template_args -#}"
_ASSIGNMENT = re.compile(r"""\{%- set (\w+) = ("(?:[^"\\]|\\.)*"|[\w.+-]+) %\}""")
# Variables that the renderer passes to a template, in addition to the special tokens.
OF_RENDERER = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "raise_exception",
        _DATE_ARGUMENT,
    }
)


def with_arguments(
    jinja: str, arguments: Mapping[str, Argument], *, title: str, special_tokens: Collection[str]
) -> str:
    """Set arguments of a chat template by assignments at its start.

    The template may already contain assignments, because the model was trained with arguments.
    These assignments are replaced.

    Args:
        title: name of the template in error messages.
        special_tokens: names of variables that the renderer passes, such as `bos_token`.

    Raises:
        DataError: the template does not read one of the arguments.
    """
    if not arguments:
        return jinja
    assigned, template = split_arguments(jinja)
    names = names_of_arguments(template, special_tokens)
    for name in arguments:
        if name in names:
            continue
        raise DataError(
            f"{title} takes no argument {name}",
            where=f"data.template_args.{name}",
            why=f"it takes {', '.join(names) or 'none'}",
            fix=suggest(name, names, otherwise=f"remove data.template_args.{name}"),
        )
    assigned |= arguments
    # The date is not a variable of the template. Therefore replace the calls of strftime_now in the
    # template.
    if _DATE_ARGUMENT in assigned:
        value = assigned.pop(_DATE_ARGUMENT)
        try:
            date = datetime.date.fromisoformat(str(value))
        except ValueError as error:
            raise DataError(
                f"{value} is not a date",
                where=f"data.template_args.{_DATE_ARGUMENT}",
                why=str(error),
                fix=f"write {_DATE_ARGUMENT}: 2026-05-01",
            ) from error
        template = with_fixed_date(template, date)
    return assign_arguments(template, assigned)


def assign_arguments(jinja: str, arguments: Mapping[str, Argument]) -> str:
    """Write assignments at the start of a template. The names are not checked."""
    if not arguments:
        return jinja
    assignments = ""
    for name, value in arguments.items():
        assignments += f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} %}}"
    return _ARGUMENTS_MARK + assignments + keep_newlines(jinja)


def split_arguments(jinja: str) -> tuple[dict[str, Argument], str]:
    """Return the arguments that a template assigns at its start, and the rest of the template."""
    if not jinja.startswith(_ARGUMENTS_MARK):
        return {}, jinja
    assigned = {}
    end = len(_ARGUMENTS_MARK)
    while match := _ASSIGNMENT.match(jinja, end):
        assigned[match[1]] = json.loads(match[2])
        end = match.end()
    # Remove the line break that `keep_newlines` added at the start of the template.
    return assigned, jinja[end:].removeprefix("\n")


def names_of_arguments(jinja: str, special_tokens: Collection[str]) -> list[str]:
    """Return the names of variables that the caller of a template must pass.

    Return [] if the template is not valid Jinja.
    """
    from jinja2 import TemplateSyntaxError, meta

    try:
        tree = parse_template(jinja)
    except TemplateSyntaxError:
        # Ignore the error, because rendering the template later raises an error with the line
        # number.
        return []
    # In reverse order, the first use of a name replaces its later uses.
    first_use = dict(reversed(list(_names_in_order(tree))))
    # Jinja also reports names that are assigned in a branch or a loop as undeclared. Such a name is
    # an argument only if it is read before it is assigned.
    undeclared = meta.find_undeclared_variables(tree) - OF_RENDERER - set(special_tokens)
    names = [name for name in undeclared if first_use[name] == "load"]
    if writes_today(jinja):
        names.append(_DATE_ARGUMENT)
    return sorted(names)


def parse_template(jinja: str) -> "Template":
    """Parse a chat template. Raise jinja2.TemplateSyntaxError if it is not valid Jinja."""
    from jinja2 import Environment

    return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain_jinja(jinja))


def _names_in_order(node: "Node") -> Iterator[tuple[str, str]]:
    """Yield the names in a syntax tree in the order of evaluation, each with "load" or "store"."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        yield node.name, node.ctx
        return
    children = list(node.iter_child_nodes())
    if isinstance(node, nodes.Assign):
        children = [node.node, node.target]
    for child in children:
        yield from _names_in_order(child)
