"""Comparison of tunesmith's loss curves with a plain Transformers + PEFT loop and with TRL, for a
published model in fp32 without dropout.

    python benchmarks/parity/parity.py --model DIR --data rows.json --json out.json

All sides start from the same weights; for LoRA, PEFT reads the initial adapter of tunesmith. They
train on the same rows in the same order, with a constant learning rate and gradient clipping at
1.0. The loss before each update is compared. Rows are alpaca rows in JSON. Each row becomes one
text, and all its tokens are supervised. The largest relative differences at the first step and over
all steps are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "parity"))
from reference import curve, load

from tunesmith.adapter import peft_files
from tunesmith.build_model import build_model
from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Run
from tunesmith.hub.model_files import read_model_files
from tunesmith.planning.resolve import inference_plan
from tunesmith.start.run import train
from tunesmith.tokens.text.example import Example

TEXT = "### Instruction: {}\n\n### Input: {}\n\n### Response: {}"


def recipe(
    a: argparse.Namespace, out: Path, kind: str, *, data: dict[str, Any], **sections: Any
) -> Run:
    """Return the recipe for tunesmith: rows in fixed order, constant learning rate, fp32.

    `data` and `sections` are sections as in a recipe file.
    """
    adapter: dict[str, Any] = {"kind": "none"}
    if kind == "lora":
        adapter = {"kind": "lora", "rank": 8, "alpha": 16, "target": a.target}
    values = {
        "model": {"name": a.model, "dtype": "fp32"},
        "adapter": adapter,
        "data": {**data, "seq_len": a.seq, "shuffle": False},
        "train": {
            "duration": f"{a.steps} steps",
            "global_batch": f"{a.batch} examples",
            "learning_rate": a.rate,
            "schedule": "constant",
            "warmup": "0 steps",
        },
        "checkpoint": {"every": None},
        "log": {"tensorboard": False, "samples": 0},
        "output_dir": str(out),
        **sections,
    }
    return from_mapping(values, where="parity", base=Path.cwd())


def whole_texts(rows: Path) -> dict[str, Any]:
    """Return a recipe's `data` section that supervises all tokens of `rows`."""
    return {"train": {"source": str(rows), "format": "text"}, "train_on": "all"}


def trl_curve(
    a: argparse.Namespace, batches: list[list[Example]], adapter: Path | None, out: Path
) -> list[float]:
    """Train with TRL's SFTTrainer on the same tokens. Return the losses."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    losses: list[float] = []

    class Recorder(InOrder):
        def training_step(self, *args: Any, **kw: Any) -> Any:
            loss = super().training_step(*args, **kw)
            losses.append(float(loss.detach()))
            return loss

    config = SFTConfig(
        output_dir=str(out), per_device_train_batch_size=a.batch, max_steps=a.steps, learning_rate=a.rate,
        lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none",
        disable_tqdm=True, max_length=a.seq, use_cpu=True, max_grad_norm=1.0,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    data = Dataset.from_dict(
        {"input_ids": [example.ids.tolist() for batch in batches for example in batch]}
    )
    model = load(Path(a.model), adapter, torch.float32)
    Recorder(model=model, processing_class=tokenizer, train_dataset=data, args=config).train()
    return losses


def examples_of(a: argparse.Namespace, tokenizer: Any) -> tuple[list[str], list[list[Example]]]:
    """Return the texts of the first rows that fit, and the batches of the same rows as examples.

    All tokens are supervised.
    """
    texts = [
        TEXT.format(r["instruction"], r.get("input") or "", r["output"])
        for r in json.loads(Path(a.data).read_text())
    ]
    coded = [
        [*tokenizer(t, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for t in texts
    ]
    fitting = [(t, ids) for t, ids in zip(texts, coded, strict=True) if len(ids) <= a.seq][
        : a.steps * a.batch
    ]
    examples = [
        Example(np.array(ids, dtype=np.int32), np.array([False] + [True] * (len(ids) - 1)))
        for _, ids in fitting
    ]
    return [t for t, _ in fitting], [
        examples[i * a.batch : (i + 1) * a.batch] for i in range(a.steps)
    ]


def write_first_adapter(run: Run, folder: Path) -> Path:
    """Write the initial adapter of a run in PEFT's format. Return its folder."""
    files = read_model_files(Path(run.model.name), run.model)
    built, _ = build_model(run, files, inference_plan(run, files, torch.device("cpu")))
    folder.mkdir()
    peft_files.write_adapter(
        folder, *peft_files.adapter_files(built.model, run.adapter, run.model.name, None)
    )
    return folder


def compare(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Return the relative difference at the first step, and the largest of all steps."""
    apart = [abs(x - y) / abs(y) for x, y in zip(ours, theirs, strict=True)]
    return {"first": apart[0], "all": max(apart)}


def main() -> None:
    """Compare LoRA and full fine-tuning with PEFT and TRL."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="folder of a Transformers model")
    p.add_argument("--data", required=True, help="JSON file with an array of alpaca rows")
    p.add_argument("--kinds", nargs="+", default=["lora", "none"], choices=["lora", "none"])
    p.add_argument("--against", nargs="+", default=["peft", "trl"], choices=["peft", "trl"])
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--seq", type=int, default=160)
    p.add_argument("--rate", type=float, default=1e-4)
    p.add_argument("--target", nargs="+", default="all-linear", help="layers that get an adapter")
    p.add_argument("--json", help="write the curves to this file")
    a = p.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    texts, batches = examples_of(a, tokenizer)
    report: dict[str, Any] = {"command": sys.argv, "curves": {}, "difference": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        for kind in a.kinds:
            run = recipe(a, folder / f"run-{kind}", kind, data=whole_texts(rows))
            adapter = write_first_adapter(run, folder / "first") if kind == "lora" else None
            curves = {"tunesmith": [r.loss for r in train(run, quiet=True).records]}
            if "peft" in a.against:
                curves["peft"] = curve(
                    load(Path(a.model), adapter, torch.float32),
                    batches,
                    rate=a.rate,
                    pad_id=tokenizer.pad_token_id,
                )
            if "trl" in a.against:
                curves["trl"] = trl_curve(a, batches, adapter, folder / "trl")
            report["curves"][kind] = curves
            for other in a.against:
                apart = compare(curves["tunesmith"], curves[other])
                report["difference"][f"{kind} {other}"] = apart
                print(
                    f"{kind:5} against {other:5} first step {apart['first']:.1e}  all {a.steps} {apart['all']:.1e}  "
                    f"loss {curves['tunesmith'][0]:.4f} -> {curves['tunesmith'][-1]:.4f}",
                    flush=True,
                )
    if a.json:
        Path(a.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
