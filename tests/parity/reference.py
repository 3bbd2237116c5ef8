"""The other side of a parity test: a plain Transformers + PEFT + torch.optim loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from tunesmith.batches.batch import IGNORE
from tunesmith.tokens.text.example import Example


def loss_of(model: torch.nn.Module, examples: Sequence[Example], pad_id: int) -> torch.Tensor:
    """Mean cross-entropy over the trained tokens of right-padded rows, from whole logits.

    The logits are made in the model's type; their softmax is taken in float64, because torch's fp32
    log-softmax over a vocabulary of 49,152 on a CPU is itself off by 3e-6, more than the bound that
    is tested.
    """
    longest = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), longest), pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, example in enumerate(examples):
        n = len(example.ids)
        ids[row, :n] = torch.tensor(example.ids, dtype=torch.long)
        mask[row, :n] = 1
        trained = torch.tensor(example.trained)
        labels[row, :n][trained] = ids[row, :n][trained]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.double()
    logits, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum()


def load(
    folder: Path, adapter: Path | None, dtype: torch.dtype, attention: str = "sdpa"
) -> torch.nn.Module:
    """A plain Transformers model to train, under PEFT if an adapter's folder is given."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    if adapter is not None:
        model = PeftModel.from_pretrained(
            model, adapter, is_trainable=True, autocast_adapter_dtype=False
        )
        model.to(dtype)
    return model.train()


def curve(
    model: torch.nn.Module,
    batches: Sequence[Sequence[Example]],
    *,
    rate: float,
    pad_id: int,
    clip: float = 1.0,
) -> list[float]:
    """Loss before each update of AdamW at a constant rate, one batch a step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses = []
    for batch in batches:
        loss = loss_of(model, batch, pad_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
