"""Trial of a chat template in a separate process with limits on time and memory.

A chat template is a program. A template from an unknown author may loop endlessly, or write more
text than fits into memory. Jinja's sandbox does not prevent this: it limits a single range(), but
not nested loops or the length of a text.
"""

import json
import re
import resource
from contextlib import suppress
from functools import cache
from itertools import product

from tunesmith.errors import DataError, MachineError
from tunesmith.host.workers import Worker

MAX_SECONDS = 5  # processor time
TRIAL_BYTES = 512 << 20
TRIAL_CHARACTERS = 10_000_000
_GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
# Conversations of the trial, each as [messages, tools].
_TRIAL_CONVERSATIONS = """[
  [[{"role": "user", "content": "a"}], null],
  [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"}], null],
  [[{"role": "system", "content": "a"}, {"role": "user", "content": "b"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "call00001",
      "function": {"name": "f", "arguments": {"a": "b"}}}]},
    {"role": "tool", "name": "f", "content": "c"},
    {"role": "assistant", "content": "d", "reasoning_content": "e"}],
   [{"type": "function", "function": {"name": "f", "description": "g",
     "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}]]
]"""


def plain_jinja(jinja: str) -> str:
    """Replace Transformers' tag {% generation %}, which Jinja does not support, by an `if
    true` block.
    """
    return _GENERATION_TAG.sub(
        lambda match: f"{match[1]}{'endif' if match[2] else 'if true'}{match[3]}", jinja
    )


@cache
def try_template(jinja: str, name: str) -> None:
    """Raise DataError if a template exceeds a limit on a short conversation.

    Args:
        name: name of the template in error messages.
    """
    worker = Worker(_render, "the trial of the chat template")
    try:
        # Normally the limit on processor time ends the trial. The longer limit on real time is for
        # a process that sleeps.
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
            fix="remove nested loops and large texts from the template, or use another one: "
            "data.template=FILE.jinja",
        )


def _render(jinja: str) -> str:
    """Render the trial conversations.

    Return the limit that the template exceeds, or an empty text.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(message)

    limits = {resource.RLIMIT_CPU: MAX_SECONDS, resource.RLIMIT_AS: TRIAL_BYTES}
    for limit, value in limits.items():
        with suppress(ValueError):  # this process already has a lower limit
            resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda _: "2026-05-01"}
    trials = product(json.loads(_TRIAL_CONVERSATIONS), (True, False))
    for (messages, tools), generate in trials:
        try:
            template = environment.from_string(plain_jinja(jinja))
            text = template.render(messages=messages, tools=tools, add_generation_prompt=generate)
        except MemoryError:
            return f"it needs more than {TRIAL_BYTES >> 20} MiB of memory"
        except Exception:  # the template rejects this conversation
            continue
        if len(text) > TRIAL_CHARACTERS:
            return f"it writes {len(text):,} characters for a short conversation"
    return ""
