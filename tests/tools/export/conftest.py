from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import write_tiny_llama
from export.tiny_gguf import chat_tokenizer
from runs import make_run, peft_model
from shipped_bases import change_config


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of width 256 with a small BPE, which llama.cpp opens; <|im_end|> ends turns."""
    folder = tmp_path_factory.mktemp("exports") / "base"
    tokenizer = chat_tokenizer()
    write_tiny_llama(folder, vocab_size=len(tokenizer), hidden_size=256, intermediate_size=256)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    change_config(folder, **ends)
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>")}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    (folder / "LICENSE").write_text("Free.")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nTheirs.")
    return folder


@pytest.fixture(scope="session")
def run(base: Path) -> Path:
    """A run with an adapter on `base`, which no test changes."""
    make_run(base.parent / "run", base, peft_model(base))
    return base.parent / "run"
