"""Run directories as `train` writes them, made in a moment, with an adapter by PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tunesmith.checkpoint import manifest
from tunesmith.config.dump import dump
from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Run

ROWS = [
    {
        "instruction": f"Count to {n}",
        "input": "" if n % 2 else "slowly",
        "output": " ".join(map(str, range(1, n + 1))),
    }
    for n in range(1, 13)
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def peft_model(base: Path, *, seed: int = 0, std: float = 0.1, **options: Any) -> Any:
    """PEFT over plain Transformers in fp32; A is drawn as usual, B with `std` in place of zeros."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    given = {
        "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
        **options,
    }  # fmt: skip
    tuned = get_peft_model(model, LoraConfig(**given)).eval()
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
        elif weight.requires_grad and "modules_to_save" in name:
            weight.data += 0.05 * torch.randn_like(weight)
    return tuned


def make_run(folder: Path, base: Path, tuned: Any, *, step: int = 3, **changes: Any) -> Run:
    """config.yaml and a complete final/ for an adapter (a PEFT model) or a whole model."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    adapter = isinstance(tuned, PeftModel)
    rows = write_rows(folder.parent / f"{folder.name}-rows.jsonl", ROWS)
    values: dict[str, Any] = {
        "model": {"name": str(base), "dtype": "fp32"},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8} if adapter else {"kind": "none"},
        "data": {"train": {"source": str(rows), "format": "alpaca"}, "seq_len": 256},
        "output_dir": str(folder),
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value
    run = from_mapping(values, where="test", base=folder.parent)
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(run), encoding="utf-8")
    write_checkpoint(folder / "final", base, tuned, step)
    assert AutoTokenizer.from_pretrained(folder / "final").chat_template
    return run


def write_checkpoint(place: Path, base: Path, tuned: Any, step: int) -> None:
    from transformers import AutoTokenizer

    with manifest.atomic_folder(place, step) as inside:
        tuned.save_pretrained(inside)
        AutoTokenizer.from_pretrained(base).save_pretrained(inside)
