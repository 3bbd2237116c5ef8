"""Templates that render without end, or too long a text, end in an error within seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from errors import refuses
from time_limit import time_limit
from tunesmith.data.text import builtin_templates, try_template
from tunesmith.errors import DataError

_TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
_MANY = "{% for i in range(99999) %}"


def in_loops(body: str, count: int) -> str:
    return _MANY * count + body + "{% endfor %}" * count


BOMBS = {
    "loops in loops": in_loops("", 2),
    "loops in loops of the second turn": "{% if messages|length > 1 %}" + in_loops("", 3) + "{% endif %}",
    "loops in loops with tools": "{% if tools %}" + in_loops("", 3) + "{% endif %}",
    "loops in loops of training": "{% if not add_generation_prompt %}" + in_loops("", 3) + "{% endif %}",
    "a number": "{{ (9 ** 99999999) % 7 }}",
    "a text times a number": "{{ 'a' * 10**10 }}",
    "a text times a number, not large enough to fail": "{{ 'a' * 10**8 }}",
    "a doubled text": "{% set ns = namespace(t='ab') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "a filter": "{{ 'a'|center(10**8) }}",
    "a format": "{{ '%1000000000d' % 1 }}",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_template_without_end_is_refused(name: str) -> None:
    with time_limit(120, name), refuses(DataError, where="data.template", names=["my_template"]):
        try_template.try_template(_TURNS + BOMBS[name], "my_template")


@pytest.mark.parametrize(
    "jinja",
    [
        builtin_templates.alpaca(bos="<s>"),
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ nothing.of.this }}",
        "{% if %}",
        "x" * 100_000,
    ],
)
def test_other_templates_pass(jinja: str) -> None:
    """Also those that are refused later, with the row or the line."""
    try_template.try_template(jinja, "my_template")


def test_templates_of_the_field_pass() -> None:
    folder = Path(__file__).with_name("templates")
    files = sorted(folder.rglob("*.jinja"))
    assert files
    for file in files:
        try_template.try_template(file.read_text(), file.name)
