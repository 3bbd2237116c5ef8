"""Peak memory of a DPO step beside the bytes of all its logits, which are never together.

    python benchmarks/speed/preference_memory.py --tokens 16384 --json out.json

The model has one narrow layer, so that nothing but the head and the loss takes much, and a
vocabulary of 49,152. All tokens are supervised. The reference's log-probabilities come with the
rows. Printed: how far the step raised the peak of the resident memory, and the bytes of
[tokens, vocabulary] in fp32; nothing but the head depends on the vocabulary. With `--trained-head`
its gradient is made too.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.config.schema import MethodConfig
from tunesmith.data.batch import Example, collate
from tunesmith.methods import make_method
from tunesmith.methods.base import TrainModel

VOCABULARY = 49_152
LENGTH = 512  # of a sequence


def peak() -> int:
    """Bytes of resident memory at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_pairs(tokens: int) -> list[Example]:
    random = np.random.default_rng(0)
    trained = np.ones(2 * LENGTH, dtype=bool)
    pairs = []
    for _ in range(tokens // (2 * LENGTH)):
        ids = random.integers(0, VOCABULARY, 2 * LENGTH).astype(np.int32)
        pairs.append(Example(ids, trained, (LENGTH, LENGTH), reference=(-5500.0, -5500.0)))
    return pairs


def train_step(model: TrainModel, pairs: list[Example]) -> None:
    batch = collate([pairs], length=2 * LENGTH * len(pairs), pad_id=0)
    with model.step_context(batch):
        (model(batch).loss / len(pairs)).backward()


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tokens", type=int, default=16_384)
    p.add_argument("--trained-head", action="store_true")
    p.add_argument("--json", help="write the figures here")
    a = p.parse_args()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    method = make_method(MethodConfig(name="dpo"))
    model = TrainModel(LlamaForCausalLM(config), method, attention_backend="products")
    model.head.requires_grad_(a.trained_head)
    model.model.get_input_embeddings().requires_grad_(False)
    pairs = make_pairs(a.tokens)
    train_step(model, pairs[:1])  # what every step needs is loaded by now
    before = peak()
    train_step(model, pairs)
    tokens = len(pairs) * 2 * LENGTH
    report = {
        "command": sys.argv,
        "tokens": tokens,
        "bytes_of_all_logits": tokens * VOCABULARY * 4,
        "bytes_that_the_step_added": peak() - before,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if a.json:
        Path(a.json).write_text(text)


if __name__ == "__main__":
    main()
