"""A small Llama whose head has a weight of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def write_untied(model: Path, folder: Path) -> Path:
    """A random model of the shape in `model` and with its tokenizer, but with a head of its own, in
    a new folder.
    """
    shutil.copytree(model, folder)
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(model, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
