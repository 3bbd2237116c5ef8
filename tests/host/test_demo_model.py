"""The folder of the model `demo` has the tensors, the template and the tokens of SmolLM2."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tunesmith.host.demo_model import demo_model
from tunesmith.model.weights.safetensors_files import weights_digest


@pytest.mark.slow
def test_the_demo_model_is_the_same_on_every_machine(smollm2: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    folder = demo_model()
    assert weights_digest(folder).startswith("980b2bc174e1a21fb8bebe924ae3b66bc6013a54aab103f3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = tokenizer.chat_template.encode()
    assert hashlib.sha256(template).hexdigest().startswith("872be49dbb638044ad01b60388f48d46")
    # Digits are split from their neighbors, those of other scripts too.
    assert tokenizer("é ﬁ ½")["input_ids"] == [2756, 40367, 216, 16738]
    assert demo_model() == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "no scratch folder"
