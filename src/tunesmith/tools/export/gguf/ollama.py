"""Writer of the Modelfile for `ollama create`, which is stored next to the GGUF file."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.answers.load_run import OpenedRun
from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
OLLAMA_CONTEXT_TOKENS = 4096  # Ollama's default of num_ctx
# Characters that Ollama does not allow in a model's name (types/model/name.go). A name must also
# start with a letter or digit.
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
OLLAMA_NAME_LENGTH = 80
# Comment that is added to the chat template, so that it differs from Ollama's built-in templates.
# `ollama create` replaces a template that differs from a built-in template by less than 100 edits.
# The built-in template would drop the system prompt of the training.
COMMENT = (
    "{#- This is the chat template that the model was trained with. It is part of the file so that "
    "every server renders prompts in the same way as the training. Do not replace it. -#}"
)


def guard_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Add COMMENT at the start of the chat template, so that Ollama does not replace the template.

    The rendered text does not change.
    """
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = COMMENT + tokenizer.chat_template


def ollama_name(folder: Path) -> str:
    """Return the folder's name as a valid model name for Ollama. Other characters become dashes."""
    name = _NOT_IN_A_NAME.sub("-", folder.absolute().name).strip("-_.")
    return name[:OLLAMA_NAME_LENGTH] or "my-model"


def modelfile_text(file: str, read: OpenedRun) -> str:
    """Return the text of the Modelfile for a GGUF file.

    The Modelfile has no TEMPLATE, because the GGUF file holds the chat template.

    Args:
        file: the name of the GGUF file, in the folder of the Modelfile.

    Raise ModelError if a Modelfile cannot express the system message, or a token that ends answers.
    """
    tokenizer = read.files.tokenizer
    run = read.location.run
    seq_len = run.data.seq_len if run else 0
    positions = int(
        getattr(read.files.config, "max_position_embeddings", 0) or OLLAMA_CONTEXT_TOKENS
    )
    # The value of num_ctx is the recipe's seq_len, but at least Ollama's default and at most the
    # model's context.
    lines = [f"FROM ./{file}"]
    lines.append(f"PARAMETER num_ctx {min(max(OLLAMA_CONTEXT_TOKENS, seq_len), positions)}")
    for token in sorted(read.template.end_ids - {tokenizer.eos_token_id}):
        text = tokenizer.decode([token])
        # A Modelfile has no escape characters: a double quote would end the quoted text, and a line
        # break would end the instruction.
        if '"' in text or "\n" in text:
            raise ModelError(
                f"the token {text!r}, which ends an answer, cannot be written to a Modelfile",
                where="--to ollama",
                fix="export with `--to gguf` and serve the file with llama-server",
            )
        lines.append(f'PARAMETER stop "{text}"')
    if run is not None and run.data.system:
        lines.append(_system_line(run.data.system))
    return "\n".join(lines) + "\n"


def _system_line(system: str) -> str:
    """Return the Modelfile line that sets the system message of the training as default.

    Raise ModelError if the message cannot be written to a Modelfile.
    """
    # A Modelfile has no escape characters, so three double quotes at the end of a line would end
    # the text.
    if any(line.rstrip().endswith('"""') for line in system.splitlines()[:-1]):
        raise ModelError(
            "the system message cannot be written to a Modelfile",
            where="data.system",
            why='a line of the message ends with """',
            fix="use --to gguf, and set the system message in the serving program",
        )
    return f'SYSTEM """{system}"""'
