"""The Modelfile beside a GGUF file, for `ollama create`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import ModelError
from tunesmith.inference.load_run import OpenedRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
OLLAMA_CONTEXT_TOKENS = 4096  # Ollama's own default of num_ctx
# What Ollama takes in a model's name (types/model/name.go), which begins with a letter or digit.
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
OLLAMA_NAME_LENGTH = 80
# `ollama create` puts a template of its own list in the place of the file's where the two are less
# than 100 edits apart, and drops the system prompt that a model was trained with.
COMMENT = (
    "{#- This template is the one that the model was trained with. It stands in the file so that "
    "every server renders prompts as training did; no other is to take its place. -#}"
)


def guard_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Add the comment in front of a tokenizer's chat template, which renders as before."""
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = COMMENT + tokenizer.chat_template


def ollama_name(folder: Path) -> str:
    """The folder's name in the letters that Ollama takes, others as dashes."""
    name = _NOT_IN_A_NAME.sub("-", folder.absolute().name).strip("-_.")
    return name[:OLLAMA_NAME_LENGTH] or "my-model"


def modelfile_text(file: str, read: OpenedRun, adapter: str | None = None) -> str:
    """The Modelfile of a GGUF file, without a TEMPLATE: the file has it.

    `file` and `adapter`, which is added to it, are paths, or names in the Modelfile's own folder.

    ModelError where a token that ends an answer, or the system message, cannot be written in it.
    """
    tokenizer = read.files.tokenizer
    run = read.location.run
    seq_len = run.data.seq_len if run else 0
    positions = int(
        getattr(read.files.config, "max_position_embeddings", 0) or OLLAMA_CONTEXT_TOKENS
    )
    # At least Ollama's default, at most what the model's positions allow.
    lines = [f"FROM {_path(file)}"]
    if adapter is not None:
        lines.append(f"ADAPTER {_path(adapter)}")
    lines.append(f"PARAMETER num_ctx {min(max(OLLAMA_CONTEXT_TOKENS, seq_len), positions)}")
    for token in sorted(read.template.end_ids - {tokenizer.eos_token_id}):
        text = tokenizer.decode([token])
        # Such a text would end the quoted word, or the line.
        if '"' in text or "\n" in text:
            raise ModelError(
                f"the token {text!r}, which ends an answer, cannot be written to a Modelfile",
                where="--to ollama",
                fix="--to gguf, and llama-server",
            )
        lines.append(f'PARAMETER stop "{text}"')
    if run is not None and run.data.system:
        lines.append(_system_line(run.data.system))
    return "\n".join(lines) + "\n"


def _path(file: str) -> str:
    return file if Path(file).is_absolute() else f"./{file}"


def _system_line(system: str) -> str:
    """The command that gives a chat without a system message the one that the run gave its rows."""
    # Ollama escapes nothing: the quotes at the end of a line would close the text.
    if any(line.rstrip().endswith('"""') for line in system.splitlines()[:-1]):
        raise ModelError(
            "the system message cannot be written to a Modelfile",
            where="data.system",
            why='a line in it ends with """',
            fix="use --to gguf, and set the system message in the serving program",
        )
    return f'SYSTEM """{system}"""'
