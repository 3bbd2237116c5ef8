"""What a model's folder says about it, read once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tunesmith.config.schema import Model
from tunesmith.hub.fetch import tokenizer_folder
from tunesmith.model import load, spec
from tunesmith.model.tokenizer import load_tokenizer, vocab_rows


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder and what was read from it; the weights stay on the disk."""

    folder: Path
    config: PretrainedConfig
    spec: spec.ModelSpec
    tokenizer: PreTrainedTokenizerBase

    @property
    def pad_id(self) -> int:
        """The token that fills rows; never attended to nor trained."""
        return int(self.tokenizer.pad_token_id)

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and head: at least as many as the tokenizer has tokens."""
        return vocab_rows(self.config, self.tokenizer)


def read_model_files(folder: Path, model: Model) -> ModelFiles:
    """Read config and tokenizer of the model in `folder`, as the recipe's `model` block wants them, or ModelError."""
    config = load.load_config(folder, model)
    found = spec.read_spec(config.to_dict(), where=str(folder), trust_remote_code=model.trust_remote_code)
    return ModelFiles(folder, config, found, load_tokenizer(tokenizer_folder(model, folder), model))
