"""Chat templates of our own in Jinja, so that training, chat and any server render the same.

The alpaca template reads `message.input` beside `message.content` where a row has one; a chat that
has none gets the variant without input.
"""

import datetime
import json
import re

from tunesmith.errors import DataError

# The wording of the `text` column of tatsu-lab/alpaca. It ends the prompt with a newline, unlike
# the authors' train.py: after a bare colon a byte-pair tokenizer merges ":" with a quote or a
# bracket that opens the answer.
_PREAMBLE_END = "Write a response that appropriately completes the request.\n\n"
_PREAMBLE = f"Below is an instruction that describes a task. {_PREAMBLE_END}"
_PREAMBLE_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    f" context. {_PREAMBLE_END}"
)

# A system message takes the place of the preamble; a second turn continues after the end token of
# the first.
_ALPACA = """\
{%%- if messages[0].role == 'system' %%}
{%%- set preamble = messages[0].content + '\\n\\n' %%}
{%%- set turns = messages[1:] %%}
{%%- else %%}
{%%- set preamble = '' %%}
{%%- set turns = messages %%}
{%%- endif %%}
{{- %(bos)s }}
{%%- for message in turns %%}
{%%- if (message.role == 'user') != (loop.index0 %% 2 == 0) \
or message.role not in ['user', 'assistant'] %%}
{{- raise_exception('the alpaca text takes an optional system message, \
then user and assistant in turn') }}
{%%- endif %%}
{%%- if message.role == 'assistant' %%}
{{- message.content + eos_token }}
{%%- else %%}
{{- '\\n\\n' if not loop.first else preamble if preamble else \
%(with_input)s if message.input else %(without)s }}
{{- '### Instruction:\\n' + message.content }}
{{- '\\n\\n### Input:\\n' + message.input if message.input else '' }}
{{- '\\n\\n### Response:\\n' }}
{%%- endif %%}
{%%- endfor %%}"""


def alpaca(*, bos: bool) -> str:
    """Stanford's text as a chat template. `bos`: open with bos_token, as the tokenizer itself
    would.
    """
    return _ALPACA % {
        "bos": "bos_token" if bos else "''",
        "with_input": json.dumps(_PREAMBLE_INPUT, ensure_ascii=False),
        "without": json.dumps(_PREAMBLE, ensure_ascii=False),
    }


# What a server renders for a model that was trained without a template: the prompt as it stands.
_RAW = """\
{#- raw prompts: each text as it stands -#}
{%%- for message in messages %%}
{%%- if message.role not in ['user', 'assistant'] %%}
{{- raise_exception('this model was trained without a template: \
it takes user and assistant messages alone') }}
{%%- endif %%}
{{- %(bos)s if loop.first and not message.content.startswith(%(bos)s) else '' }}
{{- message.content + (%(end)s if message.role == 'assistant' else '') }}
{%%- endfor %%}"""


def raw(*, bos: str, end: str) -> str:
    """Messages as they stand. `bos`: what the tokenizer itself puts before a text; `end`: what ends
    an answer.
    """
    return _RAW % {
        "bos": json.dumps(bos, ensure_ascii=False),
        "end": json.dumps(end, ensure_ascii=False),
    }


def is_raw(jinja: str) -> bool:
    """Tell whether a saved template is one of `raw`."""
    return jinja.startswith(_RAW.partition("\n")[0])


# Hermes' function calling: signatures in the system message, calls as JSON between tags, results as
# a user turn. The tags are those that the tool parsers of servers look for (vLLM's `hermes`).
HERMES = """\
{%- set first = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- if tools %}
{{- '<|im_start|>system\\n' + first + \
'You can call the functions whose signatures stand between <tools> and </tools>:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\nFor each call write one JSON object between tags:\\n\
<tool_call>\\n{"name": <function>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif first %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' else '' }}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' }}
{%- elif message.role == 'assistant' and message.tool_calls %}
{{- '<|im_start|>assistant\\n' + (message.content or '') }}
{%- for call in message.tool_calls %}
{{- '\\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role != 'system' or not loop.first %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def with_tools(jinja: str) -> str:
    """`jinja`, a ChatML template that drops tools, with Hermes' form for those conversations that
    have some.

    A conversation without tools is rendered by the given template, untouched.
    """
    has_tools = (
        "{%- set used = namespace(tools=tools) %}{%- for message in messages %}"
        "{%- if message.role == 'tool' or message.tool_calls %}"
        "{%- set used.tools = true %}{%- endif %}{%- endfor %}"
        "{%- if used.tools %}"
    )
    return either(has_tools, HERMES, jinja)


def either(condition: str, this: str, that: str) -> str:
    """One template out of two. `condition` ends with an open `if` block."""
    this = keep_newlines(this)
    that = keep_newlines(that)
    return f"{condition}{this}{{% else %}}{that}{{% endif %}}"


def keep_newlines(text: str) -> str:
    """A template such that it renders the same within a block as alone."""
    # `trim_blocks` removes the newline after a block's tag.
    first = "\n" if text.startswith("\n") else ""
    # The last newline of a whole template is dropped.
    return first + text.removesuffix("\n")


# Templates such as Llama 3.1's write the day of the rendering. Tokens must not depend on the day of
# a resume, and the prompt in use must be the one that was trained. This is the day that Llama's own
# template falls back to; data.template_args.strftime_now sets another one.
DATE = datetime.date(2024, 7, 26)
_DATE_CALL = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")


def writes_today(jinja: str) -> bool:
    """Tell whether a template writes the day of the rendering."""
    return re.search(r"strftime_now\s*\(", jinja) is not None


def with_fixed_date(jinja: str, date: datetime.date = DATE) -> str:
    """The template with `date` in place of every `strftime_now(FORMAT)`; DataError if a format is
    not a literal.
    """
    fixed = _DATE_CALL.sub(lambda match: json.dumps(date.strftime(match[2])), jinja)
    if writes_today(fixed):
        what = "the chat template writes today's date in a way that cannot be fixed to one day"
        why = "a run that resumes tomorrow would train on another prompt"
        fix = "save the template to a file, write a date in it, and name the file in data.template"
        raise DataError(what, where="data.template", why=why, fix=fix)
    return fixed
