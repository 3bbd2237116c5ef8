"""The fast path beside the plain one on a real model in bf16: how far each lies from the same run
in fp32.

    python benchmarks/parity/fast_against_plain.py --model BF16_DIR --data rows.json --json out.json

Plain is Transformers + PEFT + torch.optim: padded rows, torch's attention, whole logits. It runs
twice, once on each step's rows together and once row by row: the same arithmetic rounded in another
order, whose difference is the noise of bf16. The truth beside which both are held is our run of the
very same weights in fp32, which the plain loop equals to 1e-6 (parity.py). Told are the root mean
square of the relative difference of the loss over all steps, its mean, which a bias would show in,
and the mean of the last fifth.

nf4: the plain loop has the very weights that nf4 stands for (bitsandbytes makes them dense). fp8
and nf4 are also told beside our bf16 run: what the rounded base costs in loss. A curve that is
already in the file is not run again.

    python benchmarks/parity/fast_against_plain.py --model BF16_DIR --sets rows.json:alpaca chats.json:sharegpt --json out.json

runs no plain loop: bases in bf16, fp8 and nf4 on several data sets as chats, loss on the answers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "parity"))
from reference import loss_of

from parity import examples_of, recipe, whole_texts
from tunesmith.adapter import peft_files
from tunesmith.build_model import build_model
from tunesmith.config.dump import to_mapping
from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Run
from tunesmith.data.batch import Example
from tunesmith.hub.model_files import read_model_files
from tunesmith.planning.resolve import inference_plan
from tunesmith.training import compare_eight_bit
from tunesmith.training.run import train


def plain_model(folder: Path, adapter: Path, quantize: str) -> torch.nn.Module:
    """Transformers in bf16 under PEFT, whose adapter is in fp32; of an nf4 base the dense weights."""
    import bitsandbytes.functional as bnb
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    if quantize == "nf4":
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                packed, state = bnb.quantize_4bit(
                    module.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True
                )
                module.weight.data = bnb.dequantize_4bit(packed, state).to(torch.bfloat16)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def plain_curve(
    model: torch.nn.Module,
    batches: Sequence[Sequence[Example]],
    rate: float,
    pad: int,
    *,
    rows: bool,
) -> list[float]:
    """Loss before each update; with `rows`, gradients are added up row by row."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses = []
    for batch in batches:
        counts = [
            sum(int(e.trained.sum()) for e in part)
            for part in ([[e] for e in batch] if rows else [batch])
        ]
        total = 0.0
        for part, count in zip([[e] for e in batch] if rows else [batch], counts, strict=True):
            loss = loss_of(model, part, pad) * (count / sum(counts))
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def apart(one: list[float], other: list[float]) -> dict[str, float]:
    """Relative difference of two curves: root mean square, mean, and the mean of the last fifth."""
    d = torch.tensor([(a - b) / b for a, b in zip(one, other, strict=True)], dtype=torch.float64)
    return {
        "rms": float(d.square().mean().sqrt()),
        "mean": float(d.mean()),
        "mean_of_last_fifth": float(d[-len(d) // 5 :].mean()),
    }


def compare_bases(a: argparse.Namespace) -> None:
    """Loss curves of each base on each data set, and beside bf16's; a line each as it is there.

    An fp8 base that `train` would drop for its first losses trains here too: the curve shows what
    was dropped.
    """
    compare_eight_bit.TOLERANCE = math.inf
    report: dict[str, Any] = {"command": sys.argv, "curves": {}, "difference": {}}
    if a.json and Path(a.json).exists():
        report["curves"] = json.loads(Path(a.json).read_text())["curves"]
    for text in a.sets:
        path, _, form = text.rpartition(":")
        curves = report["curves"].setdefault(Path(path).name, {})
        for quantize in a.bases:
            with tempfile.TemporaryDirectory() as folder:
                values = to_mapping(
                    recipe(a, Path(folder) / "run", "lora", data=whole_texts(Path(path)))
                )
                values["model"] |= {"dtype": "bf16", "quantize": quantize}
                values["data"]["train"] = {"source": str(Path(path).absolute()), "format": form}
                values["data"] |= {"train_on": "response", "allow_cut_answers": True}
                run = from_mapping(values, where="bases", base=Path.cwd())
                if quantize not in curves:
                    curves[quantize] = [r.loss for r in train(run, quiet=True).records]
            d = report["difference"][f"{Path(path).name}: {quantize}"] = apart(
                curves[quantize], curves["none"]
            )
            last = sum(curves[quantize][-20:]) / 20
            line = f"rms {d['rms']:.2e}  mean {d['mean']:+.2e}  last fifth {d['mean_of_last_fifth']:+.2e}  loss {last:.4f}"
            print(f"{Path(path).name:32} {quantize:5} {line}", flush=True)
            if a.json:
                Path(a.json).write_text(json.dumps(report, indent=1) + "\n")


def held_as(run: Run, dtype: str, quantize: str, out: Path) -> Run:
    values = to_mapping(run)
    values["model"] |= {"dtype": dtype, "quantize": quantize}
    values["output_dir"] = str(out)
    return from_mapping(values, where="fast against plain", base=Path.cwd())


def main() -> None:
    """bf16, nf4 and fp8 bases."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="a Transformers folder in bf16")
    given = p.add_mutually_exclusive_group(required=True)
    given.add_argument("--data", help="alpaca-like rows, a JSON array")
    given.add_argument(
        "--sets",
        nargs="+",
        metavar="FILE:FORMAT",
        help="compare bases on these, without a plain loop",
    )
    p.add_argument(
        "--bases", nargs="+", default=["none", "fp8", "nf4"], help="of --sets; bf16 (none) first"
    )
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--seq", type=int, default=160)
    p.add_argument("--rate", type=float, default=1e-4)
    p.add_argument("--json", help="write the curves here; those that are there are kept")
    a = p.parse_args()
    if a.sets:
        compare_bases(a)
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    texts, batches = examples_of(a, tokenizer)
    report: dict[str, Any] = {"command": sys.argv, "curves": {}, "difference": {}}
    if a.json and Path(a.json).exists():
        report["curves"] = json.loads(Path(a.json).read_text())["curves"]
    curves = report["curves"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        run = recipe(a, folder / "run", "lora", data=whole_texts(rows))
        files = read_model_files(Path(a.model), run.model)
        begun, _ = build_model(run, files, inference_plan(run, files, torch.device("cpu")))
        (folder / "first").mkdir()
        peft_files.write_adapter(
            folder / "first", *peft_files.adapter_files(begun.model, run.adapter, a.model, None)
        )
        del begun

        def add(text: str, make: Callable[[], list[float]]) -> None:
            if text not in curves:
                curves[text] = make()
                if a.json:
                    Path(a.json).write_text(json.dumps(report, indent=1) + "\n")

        def ours(dtype: str, quantize: str) -> list[float]:
            held = held_as(run, dtype, quantize, folder / f"run-{dtype}-{quantize}")
            return [r.loss for r in train(held, quiet=True).records]

        def plain(quantize: str, *, by_row: bool) -> list[float]:
            model = plain_model(Path(a.model), folder / "first", quantize)
            return plain_curve(model, batches, a.rate, tokenizer.pad_token_id, rows=by_row)

        add("ours fp32", lambda: ours("fp32", "none"))
        for quantize in ("none", "nf4", "fp8"):
            add(f"ours {quantize}", lambda quantize=quantize: ours("bf16", quantize))
        add("plain none together", lambda: plain("none", by_row=False))
        add("plain none row by row", lambda: plain("none", by_row=True))
        add("plain nf4 together", lambda: plain("nf4", by_row=False))
    pairs = {
        "noise: plain, row by row | together": ("plain none row by row", "plain none together"),
        "bf16: ours | ours in fp32": ("ours none", "ours fp32"),
        "bf16: plain | ours in fp32": ("plain none together", "ours fp32"),
        "bf16: ours | plain": ("ours none", "plain none together"),
        "nf4: ours | plain with nf4's weights": ("ours nf4", "plain nf4 together"),
        "fp8: ours | ours in bf16": ("ours fp8", "ours none"),
        "nf4: ours | ours in bf16": ("ours nf4", "ours none"),
    }
    for text, (one, other) in pairs.items():
        d = report["difference"][text] = apart(curves[one], curves[other])
        print(
            f"{text:40} rms {d['rms']:.2e}  mean {d['mean']:+.2e}  last fifth {d['mean_of_last_fifth']:+.2e}  "
            f"loss {curves[one][0]:.4f} -> {sum(curves[one][-10:]) / 10:.4f}"
        )
    if a.json:
        Path(a.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
