"""Split documents: the loss is that of a forward pass of plain Transformers for each part."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import WORDS, make_run
from tunesmith.start.run import train

TOLERANCE = 1e-5
SEQ_LEN = 100


def texts() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.choice((3, 60, 16)))) for _ in range(24)]


def losses_of_run(tiny: Path, folder: Path, source: Path, **data: Any) -> list[dict[str, Any]]:
    run = make_run(
        tiny, folder, held=False, output_dir=str(folder / f"run{len(list(folder.iterdir()))}"),
        data={"train": {"source": str(source), "format": "text"}, "seq_len": SEQ_LEN, **data},
        # More examples than there are: one step sees all.
        train={"duration": "2 steps", "global_batch": "512 examples"},
    )  # fmt: skip
    return [record.to_plain() for record in train(run, quiet=True).records]


def transformers_loss(tiny: Path, documents: list[str], seq_len: int) -> tuple[float, int]:
    """Mean loss of all tokens that a document's earlier ones predict, and how many they are."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    total, count = 0.0, 0
    for text in documents:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        # Windows that overlap in one token.
        for start in range(0, len(ids) - 1, seq_len - 1):
            window = torch.tensor([ids[start : start + seq_len]])
            with torch.no_grad():
                logits = model(window).logits[0, :-1]
            total += float(F.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    return total / count, count


@pytest.mark.slow
def test_the_loss_is_that_of_the_parts(tiny: Path, tmp_path: Path) -> None:
    documents = texts()
    rows = tmp_path / "a.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    folder = tmp_path / "documents"
    folder.mkdir()
    for i, text in enumerate(documents):
        (folder / f"{i:02}.txt").write_text(text)
    loss, count = transformers_loss(tiny, documents, SEQ_LEN)
    assert any(len(text) > 2 * SEQ_LEN for text in documents)
    packed = losses_of_run(tiny, tmp_path, rows)
    assert packed[0]["loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert packed[0]["supervised_tokens"] == count == sum(map(len, documents))
    unpacked = losses_of_run(tiny, tmp_path, rows, pack=False)
    for one, other in zip(packed, unpacked, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["tokens"] == other["tokens"]
    # Bit for bit: the same texts as files
    from_files = losses_of_run(tiny, tmp_path, folder)
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in from_files] == [r[name] for r in packed]
