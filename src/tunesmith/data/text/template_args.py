"""Arguments of a chat template, such as Qwen's `enable_thinking`, as a part of the template itself.

They are written as assignments in front of it. So rows and prompts get the same ones, the token
cache and a comparison of ranks see them, and whoever renders the saved template gets what was
trained: a server passes arguments of its own (llama.cpp says `enable_thinking` unasked), and these
assignments come after them.

`strftime_now`, which writes the day of the rendering, takes a date here: 2026-05-01.
"""

import datetime
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from tunesmith.config.names import nearest
from tunesmith.data.text.builtin_templates import keep_newlines, with_fixed_date, writes_today
from tunesmith.data.text.try_template import plain_jinja
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from jinja2.nodes import Node, Template

# What a recipe can give: the literals that JSON and Jinja write alike.
Argument = bool | int | float | str

_DATE_ARGUMENT = "strftime_now"
_ARGUMENTS_MARK = "{#- data.template_args -#}"
_ASSIGNMENT = re.compile(r"""\{%- set (\w+) = ("(?:[^"\\]|\\.)*"|[\w.+-]+) %\}""")
# What the renderer passes itself, beside the special tokens.
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
    """The template with some arguments assigned.

    Those of a model that was trained with some before can be assigned anew.

    Args:
        title: what errors call the template.
        special_tokens: names that the renderer passes, such as `bos_token`.

    Raises:
        DataError: the template does not read one of them.
    """
    if not arguments:
        return jinja
    assigned, template = split_arguments(jinja)
    names = names_of_arguments(template, special_tokens)
    for name in arguments:
        if name in names:
            continue
        why = f"it takes {', '.join(names)}" if names else "it takes none"
        near = nearest(name, names)
        fix = f"did you mean {near}?" if near else f"remove data.template_args.{name}"
        raise DataError(
            f"{title} takes no argument {name}",
            where=f"data.template_args.{name}",
            why=why,
            fix=fix,
        )
    assigned |= arguments
    # The date is not assigned like the others: a template gets it by calling strftime_now.
    if _DATE_ARGUMENT in assigned:
        template = with_fixed_date(template, _read_date(assigned.pop(_DATE_ARGUMENT)))
    return assign_arguments(template, assigned)


def _read_date(value: Argument) -> datetime.date:
    try:
        return datetime.date.fromisoformat(str(value))
    except ValueError as error:
        raise DataError(
            f"{value} is not a date",
            where=f"data.template_args.{_DATE_ARGUMENT}",
            why=str(error),
            fix=f"write {_DATE_ARGUMENT}: 2026-05-01",
        ) from error


def assign_arguments(jinja: str, arguments: Mapping[str, Argument]) -> str:
    """The template with assignments in front of it, of whatever names."""
    if not arguments:
        return jinja
    assignments = ""
    for name, value in arguments.items():
        assignments += f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} %}}"
    return _ARGUMENTS_MARK + assignments + keep_newlines(jinja)


def split_arguments(jinja: str) -> tuple[dict[str, Argument], str]:
    """Arguments that are assigned in front of a template, and the template behind them."""
    if not jinja.startswith(_ARGUMENTS_MARK):
        return {}, jinja
    assigned = {}
    end = len(_ARGUMENTS_MARK)
    while match := _ASSIGNMENT.match(jinja, end):
        assigned[match[1]] = json.loads(match[2])
        end = match.end()
    # `keep_newlines` has doubled a line break that opens the template.
    return assigned, jinja[end:].removeprefix("\n")


def names_of_arguments(jinja: str, special_tokens: Collection[str]) -> list[str]:
    """List the names that a template leaves to its caller; none where it is not valid Jinja."""
    from jinja2 import TemplateSyntaxError, meta

    try:
        tree = parse_template(jinja)
    except TemplateSyntaxError:
        # It is named with its line once it renders.
        return []
    first_use: dict[str, str] = {}
    for name, context in _names_in_order(tree):
        first_use.setdefault(name, context)
    # Jinja calls each name undeclared that is assigned in a branch or a loop; an argument is read
    # before any assignment.
    undeclared = meta.find_undeclared_variables(tree) - OF_RENDERER - set(special_tokens)
    names = [name for name in undeclared if first_use[name] == "load"]
    if writes_today(jinja):
        names.append(_DATE_ARGUMENT)
    return sorted(names)


def parse_template(jinja: str) -> "Template":
    """Parse a chat template; raise jinja2.TemplateSyntaxError if it is not valid Jinja."""
    from jinja2 import Environment

    return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain_jinja(jinja))


def _names_in_order(node: "Node") -> Iterator[tuple[str, str]]:
    """Each name of a tree in the order of evaluation, and whether it is loaded or stored."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        yield node.name, node.ctx
        return
    children = list(node.iter_child_nodes())
    if isinstance(node, nodes.Assign):
        children = [node.node, node.target]
    for child in children:
        yield from _names_in_order(child)
