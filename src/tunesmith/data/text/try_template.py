"""A trial of a chat template, which is a program, in a process with limits.

A template of a stranger may loop without end, or write more text than the memory holds. Jinja's
sandbox does not prevent this: it limits a single range(), not loops in loops, and no text.
"""

import re
import resource
from functools import cache
from typing import Any

from tunesmith.data.workers import Worker
from tunesmith.errors import DataError, MachineError

MAX_SECONDS = 5  # of the processor
TRIAL_BYTES = 512 << 20
TRIAL_CHARACTERS = 10_000_000
_GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
_TRIAL_CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "f", "arguments": {"a": "b"}},
}
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}
_TRIAL_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "", "tool_calls": [_TRIAL_CALL]},
    {"role": "tool", "name": "f", "content": "four"},
    {"role": "assistant", "content": "five", "reasoning_content": "six"},
]
_SYSTEM = {"role": "system", "content": "zero"}


def plain_jinja(jinja: str) -> str:
    """A template without Transformers' own tag {% generation %}, which Jinja does not know."""
    return _GENERATION_TAG.sub(
        lambda match: f"{match[1]}{'endif' if match[2] else 'if true'}{match[3]}", jinja
    )


@cache
def try_template(jinja: str, name: str) -> None:
    """DataError for a template that renders a short conversation without end, or too long a text.

    name: what errors call the template.
    """
    worker = Worker(_render, "the trial of the chat template")
    try:
        # The limit of processor time ends the trial, unless other programs take the processor.
        why = worker(jinja, name, 12 * MAX_SECONDS)
    except (MachineError, TimeoutError):
        why = f"it takes more than {MAX_SECONDS} s to render a short conversation"
    finally:
        worker.close()
    if why:
        raise DataError(
            f"{name} cannot be used",
            where="data.template",
            why=why,
            fix="remove loops in loops and large texts from the template, or use another one: "
            "data.template=FILE.jinja",
        )


def _render(jinja: str) -> str:
    """Render some conversations within the limits; returns why that is not possible."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(message)

    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, hard))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (TRIAL_BYTES, hard))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda _: "2026-05-01"}
    for messages in (_TRIAL_TURNS[:1], _TRIAL_TURNS[:3], _TRIAL_TURNS, [_SYSTEM, *_TRIAL_TURNS]):
        for tools in (None, [_TOOL]):
            try:
                template = environment.from_string(plain_jinja(jinja))
                text = template.render(messages=messages, tools=tools, add_generation_prompt=True)
            except MemoryError:
                return f"it needs more than {TRIAL_BYTES >> 20} MiB of memory"
            except Exception:
                continue
            if len(text) > TRIAL_CHARACTERS:
                return f"it writes {len(text):,} characters for a short conversation"
    return ""
