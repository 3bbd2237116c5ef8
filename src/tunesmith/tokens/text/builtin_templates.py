"""Chat templates of tunesmith, written in Jinja.

They are saved with the model, so that training, chat and servers render the same text.

The alpaca template reads `message.input` in addition to `message.content`. Messages without `input`
are rendered with the variant of the preamble that mentions no input.
"""

import datetime
import json
import re

from tunesmith.errors import DataError

# The wording is that of the column `text` of tatsu-lab/alpaca. Unlike the prompt in the authors'
# train.py, the prompt ends with a newline. Otherwise a byte-pair tokenizer would merge the final
# ":" with a quote or a bracket at the start of the answer.
_PREAMBLE_END = "Write a response that appropriately completes the request.\n\n"
_PREAMBLE = f"Below is an instruction that describes a task. {_PREAMBLE_END}"
_PREAMBLE_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    f" context. {_PREAMBLE_END}"
)

# A system message replaces the preamble. Each further turn follows the end token of the previous
# turn.
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
    """Return Stanford's Alpaca format as a chat template.

    Args:
        bos: whether the template writes bos_token at the start, because the tokenizer adds it to
            texts.
    """
    return _ALPACA % {
        "bos": "bos_token" if bos else "''",
        "with_input": json.dumps(_PREAMBLE_INPUT, ensure_ascii=False),
        "without": json.dumps(_PREAMBLE, ensure_ascii=False),
    }


# Template for models that were trained without a chat template. A server renders the messages
# unchanged.
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
    """Return a template that renders the messages unchanged.

    Args:
        bos: the text of the BOS token, or an empty text if the tokenizer adds no BOS token.
        end: the text that ends an answer.
    """
    return _RAW % {
        "bos": json.dumps(bos, ensure_ascii=False),
        "end": json.dumps(end, ensure_ascii=False),
    }


def is_raw(jinja: str) -> bool:
    """Return whether a saved template was made by `raw`."""
    return jinja.startswith(_RAW.partition("\n")[0])


# Hermes' format for function calls. The signatures are in the system message, calls are JSON
# between tags, and results are user turns. The tool parsers of servers, such as `hermes` in vLLM,
# expect these tags.
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
    """Add Hermes' format for tools to `jinja`, a ChatML template that ignores tools.

    Conversations without tools are rendered by the given template, unchanged.
    """
    has_tools = (
        "{%- set used = namespace(tools=tools) %}{%- for message in messages %}"
        "{%- if message.role == 'tool' or message.tool_calls %}"
        "{%- set used.tools = true %}{%- endif %}{%- endfor %}"
        "{%- if used.tools %}"
    )
    return either(has_tools, HERMES, jinja)


def either(condition: str, this: str, that: str) -> str:
    """Join two templates into one, which renders `this` if the condition is true, else `that`.

    `condition` is Jinja text that ends with an open `if` block.
    """
    this = keep_newlines(this)
    that = keep_newlines(that)
    return f"{condition}{this}{{% else %}}{that}{{% endif %}}"


def keep_newlines(text: str) -> str:
    """Change the newlines at both ends of a template, so that it renders the same text if it is put
    into an `if` block.
    """
    # Double a leading newline, because `trim_blocks` removes the newline after a block's tag.
    first = "\n" if text.startswith("\n") else ""
    # Remove the last newline, as Jinja does at the end of a template. Jinja does not remove a
    # newline before an `else` tag.
    return first + text.removesuffix("\n")


# Date that replaces today's date, which templates such as Llama 3.1's write. Tokens must not depend
# on the day on which a run resumes, and later prompts must be identical to the prompts of training.
# The date is the default of Llama's own template. `data.template_args.strftime_now` sets another
# date.
DATE = datetime.date(2024, 7, 26)
_DATE_CALL = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")


def writes_today(jinja: str) -> bool:
    """Return whether a template writes today's date."""
    return re.search(r"strftime_now\s*\(", jinja) is not None


def with_fixed_date(jinja: str, date: datetime.date = DATE) -> str:
    """Replace each `strftime_now(FORMAT)` of a template by `date`.

    Raise DataError if a format is not a literal.
    """
    fixed = _DATE_CALL.sub(lambda match: json.dumps(date.strftime(match[2])), jinja)
    if writes_today(fixed):
        raise DataError(
            "the chat template writes today's date in a way that cannot be fixed to one day",
            where="data.template",
            why="a run that resumes tomorrow would train on another prompt",
            fix="save the template to a file, write a date in it, and name the file in "
            "data.template",
        )
    return fixed
