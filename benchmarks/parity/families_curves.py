"""Comparison of tunesmith's loss curves with a plain Transformers + PEFT loop, for ten model types
with different kinds of layers.

    python benchmarks/parity/families_curves.py --json out.json
    python benchmarks/parity/families_curves.py gpt_oss lfm2       # only some types

Each type is a small random model (hidden size 256, fp32) with a byte tokenizer. Attention windows
and chunks are shorter than the rows. Both sides start from the same weights; for LoRA, PEFT reads
the initial adapter of tunesmith. Both sides train on the same rows in the same order, with a
constant learning rate and gradient clipping at 1.0. The plain loop pads rows. It uses sdpa, or
eager attention if a type supports only this. The largest relative difference of the loss is
printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from parity import compare, examples_of, recipe, whole_texts, write_first_adapter

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "parity"))
from reference import curve, load

from tunesmith.start.run import train

BASE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
WINDOWS = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LOCAL_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
# Standard deviation of the noise that is added to each weight. With smaller weights, the residual
# connection would hide errors of a layer.
SPREAD = 0.05
# If the losses differ by more than this, the plain loop is also run with eager attention. The
# difference between eager attention and sdpa shows the effect of rounding alone.
BOUND = 1e-5
RATES = {"lora": 1e-3, "none": 2e-4}


@dataclass(frozen=True)
class Family:
    """Settings of a model type.

    Attributes:
        kind: the special property of the type's layers.
        settings: values of the config that are added to BASE.
        attention: the attention implementation of the plain loop.
        without: keys of BASE that have other names in the type's config.
        target: the layers that get an adapter.
        scales_scores: whether the attention divides the scores by the square root of the head size.
            If not, the weight of q_norm determines the scale.
    """

    kind: str
    settings: dict[str, Any]
    attention: str = "sdpa"
    without: tuple[str, ...] = ()
    target: str | list[str] = "all-linear"
    scales_scores: bool = True


FAMILIES = {
    "ministral3": Family(
        "fused modules of a near copy",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "llama_4_scaling_beta": 0.5,
            }
        },
    ),
    "qwen3_5_text": Family(
        "gated delta rule",
        {
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "nemotron_h": Family(
        "Mamba 2, experts",
        {
            "layers_block_type": ["mamba", "mlp", "moe", "attention"],
            "ssm_state_size": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "n_groups": 2,
            "chunk_size": 32,
            "n_routed_experts": 8,
            "moe_intermediate_size": 128,
            "moe_shared_expert_intermediate_size": 128,
        },
    ),
    "lfm2": Family("short convolutions", {"layer_types": ["conv", "full_attention"] * 2}),
    "llama4_text": Family(
        "chunked attention, experts",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "intermediate_size": 128,
            "intermediate_size_mlp": 512,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
            "floor_scale": 16,
        },
    ),
    "gpt_oss": Family(
        "attention sinks, experts",
        {**WINDOWS, **LOCAL_EXPERTS, "intermediate_size": 128},
        attention="eager",
    ),
    "gemma4_text": Family(
        "heads of two widths, shared keys and values",
        {
            **WINDOWS,
            "num_kv_shared_layers": 2,
            "global_head_dim": 64,
            "vocab_size_per_layer_input": 1024,
            "hidden_size_per_layer_input": 32,
        },
        scales_scores=False,
    ),
    "deepseek_v3": Family(
        "latent attention, experts",
        {
            "num_key_value_heads": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 128,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 64,
            "q_lora_rank": 64,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 24,
            "head_dim": 16,
        },
        # In a model with experts, PEFT 0.21 applies the targets gate_proj, up_proj and down_proj
        # only to the experts. Linear layers with these names get no adapter.
        target=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    ),
    "qwen3_moe": Family("experts", EXPERTS),
    "falcon": Family(
        "one document a row",
        {"new_decoder_architecture": True, "num_kv_heads": 4, "ffn_hidden_size": 512},
        without=("head_dim", "intermediate_size", "num_key_value_heads"),
    ),
}


def write_model(model_type: str, folder: Path) -> Path:
    """Write a random model of a type and a byte tokenizer. Return the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    family = FAMILIES[model_type]
    values = {key: value for key, value in BASE.items() if key not in family.without}
    config = AutoConfig.for_model(model_type, **{**values, **family.settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * SPREAD)
        for name, parameter in model.named_parameters():
            # If these weights were 1, the scores would be too large by the square root of the head
            # size. Attention would be almost one-hot, and rounding errors would grow tenfold in
            # five steps.
            if not family.scales_scores and name.endswith("q_norm.weight"):
                parameter.mul_(parameter.numel() ** -0.5)
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, count: int) -> Path:
    """Write different alpaca rows of varied length that count numbers. Return the file."""
    rows = []
    for i in range(count):
        step = i % 7 + 1
        numbers = [str(i + k * step) for k in range(4 + 5 * i % 37)]
        rows.append(
            {"instruction": f"Count from {i} by {step}", "input": "", "output": " ".join(numbers)}
        )
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


class Pair:
    """One model type and one kind of training, with tunesmith and with the plain loop."""

    def __init__(self, model: Path, folder: Path, kind: str, options: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        folder.mkdir()
        self.folder = folder
        self.kind = kind
        self.attention = FAMILIES[model.name].attention
        self.options = argparse.Namespace(**vars(options))
        self.options.model = str(model)
        self.options.rate = RATES[kind]
        self.options.target = FAMILIES[model.name].target
        self.options.data = write_rows(folder / "alpaca.json", 2 * options.steps * options.batch)
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.pad_id = tokenizer.pad_token_id
        texts, self.batches = examples_of(self.options, tokenizer)
        self.rows = folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        self.adapter: Path | None = None
        if kind == "lora":
            run = recipe(self.options, folder / "unused", kind, data=whole_texts(self.rows))
            self.adapter = write_first_adapter(run, folder / "first")

    def ours(self, steps: int) -> list[float]:
        """Train the given number of steps with tunesmith. Return the losses."""
        self.options.steps = steps
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            run = recipe(self.options, Path(out) / "run", self.kind, data=whole_texts(self.rows))
            return [record.loss for record in train(run, quiet=True).records]

    def plain(self, steps: int) -> list[float]:
        """Train the given number of steps with the plain loop. Return the losses."""
        model = load(Path(self.options.model), self.adapter, torch.float32, self.attention)
        batches = self.batches[:steps]
        return curve(model, batches, rate=self.options.rate, pad_id=self.pad_id)


def compare_curves(pair: Pair, steps: int) -> dict[str, Any]:
    """Return the losses of both sides and their differences."""
    ours, plain = pair.ours(steps), pair.plain(steps)
    difference = compare(ours, plain)
    result = {"difference": difference, "ours": ours, "plain": plain}
    if difference["all"] > BOUND:
        pair.attention = "eager"
        result["noise"] = compare(pair.plain(steps), plain)
    return result


def as_json(report: dict[str, Any]) -> str:
    """Return the report as JSON, with one line per row."""
    rows = ",\n".join(json.dumps(row) for row in report["rows"])
    head = json.dumps({key: value for key, value in report.items() if key != "rows"})
    return f'{head[:-1]},\n"rows": [\n{rows}\n]}}\n'


def main() -> None:
    """Compare LoRA and full fine-tuning for each type."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "types", nargs="*", metavar="TYPE", help=f"default: all of {', '.join(FAMILIES)}"
    )
    p.add_argument("--kinds", nargs="+", default=["lora", "none"], choices=["lora", "none"])
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--json", help="add each result to this file")
    options = p.parse_args()
    report: dict[str, Any] = {
        "command": [Path(word).name for word in sys.argv],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "threads": torch.get_num_threads(),
        "rows": [],
    }
    file = Path(options.json) if options.json else None
    if file and file.exists():
        report["rows"] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    for model_type in options.types or FAMILIES:
        with tempfile.TemporaryDirectory() as name:
            model = write_model(model_type, Path(name) / model_type)
            for kind in options.kinds:
                pair = Pair(model, Path(name) / kind, kind, options)
                row: dict[str, Any] = {
                    "type": model_type,
                    "kind": FAMILIES[model_type].kind,
                    "trained": kind,
                    "loss": compare_curves(pair, options.steps),
                }
                difference = row["loss"]["difference"]
                text = f"{model_type:14}{kind:5} first {difference['first']:.1e}  all {difference['all']:.1e}  "
                text += f"loss {row['loss']['plain'][0]:.4f} -> {row['loss']['plain'][-1]:.4f}"
                if "noise" in row["loss"]:
                    text += f" (plain loop, eager and sdpa: {row['loss']['noise']['all']:.1e})"
                print(text, flush=True)
                earlier = [
                    r for r in report["rows"] if (r["type"], r["trained"]) != (model_type, kind)
                ]
                report["rows"] = [*earlier, row]
                if file:
                    file.write_text(as_json(report), encoding="utf-8")


if __name__ == "__main__":
    main()
