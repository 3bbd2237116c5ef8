"""Logits of what tunesmith writes, read by Transformers 4.57 and 5.x: one small random model of
every family.

    python3 -m venv old && old/bin/pip install 'transformers==4.57.*' torch==2.13.0 safetensors
    python benchmarks/parity/old_readers.py --old-python old/bin/python --json old-readers.json

Each base is written twice: its config.json with the keys of the family's models on the Hub, and as
Transformers 5 saves it.
tunesmith trains one step of it in full, and one of a LoRA that it merges. Both interpreters read each written folder as plain
Transformers does. `before`: 4.57 on the same folder with the config.json that Transformers 5 saves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, __version__
from transformers.utils import logging

# In fp32, with the same torch: only the order of sums may differ. Logits here reach 5 to 30, fp32
# has 7 digits, and a wrong rotary embedding moves them by 0.05 and more.
TOLERANCE = 1e-4
LENGTH = (
    300  # beyond the windows, and beyond the `original_max_position_embeddings` of the small models
)
TEXT = "<|im_start|>user\nWhat rhymes with fjord?<|im_end|>\n"

SIZES: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "attention_dropout": 0.0, "initializer_range": 0.02,
    "use_cache": True, "torch_dtype": "float32", "bos_token_id": None, "transformers_version": "4.51.0",
}  # fmt: skip
LLAMA3_SCALING = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 128,
    "rope_type": "llama3",
}  # fmt: skip

# Per family, the keys that its models on the Hub have beside SIZES; a name after the model type
# tells variants apart.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 100000.0, "rope_scaling": None, "tie_word_embeddings": True, "rope_interleaved": False},
    "llama 3.1": {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING, "pretraining_tp": 1, "mlp_bias": False},
    "llama linear": {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama dynamic": {"rope_theta": 20000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "mistral": {"rope_theta": 1000000.0, "sliding_window": 32, "tie_word_embeddings": False},
    "qwen2": {"rope_theta": 1000000.0, "sliding_window": 32, "use_sliding_window": False, "max_window_layers": 2},
    "qwen2 yarn": {
        "rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 2,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    },
    "qwen3": {"rope_theta": 1000000.0, "rope_scaling": None, "head_dim": 32, "sliding_window": None},
    "gemma": {"rope_theta": 50000.0, "head_dim": 32, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {
        "rope_theta": 50000.0, "head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid",
    },
    "gemma3_text": {
        "rope_theta": 1000000.0, "rope_local_base_freq": 20000.0, "head_dim": 32, "sliding_window": 32,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "query_pre_attn_scalar": 32,
        "sliding_window_pattern": 3, "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid",
    },
    "phi3 longrope": {
        "rope_theta": 20000.0, "original_max_position_embeddings": 128, "sliding_window": 262144,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0 + i / 8 for i in range(8)],
                         "long_factor": [2.0 + i for i in range(8)]},
    },
    "phi3 partial": {  # as Phi-4-mini has it
        "rope_theta": 20000.0, "original_max_position_embeddings": 128, "sliding_window": 262144,
        "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0 + i / 8 for i in range(6)],
                         "long_factor": [2.0 + i for i in range(6)]},
    },
    "smollm3": {
        "rope_theta": 5000000.0, "rope_scaling": None, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0, 1, 1],
        "layer_types": ["full_attention"] * 6, "use_sliding_window": False, "sliding_window": None,
        "max_window_layers": 28, "tie_word_embeddings": True,
    },
    "olmo2": {"rope_theta": 500000.0, "rope_scaling": None},
    "granite": {
        "rope_theta": 5000000.0, "rope_scaling": None, "logits_scaling": 4.0, "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5, "attention_multiplier": 0.2, "tie_word_embeddings": True,
    },
}  # fmt: skip


def write_base(folder: Path, name: str, *, saved_by_5: bool) -> None:
    """A random model of the family with a byte tokenizer, its config.json as on the Hub, or as
    Transformers 5 saves it.
    """
    from safetensors.torch import save_file

    from tunesmith.checkpoint.contents import weights_of

    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from conftest import byte_tokenizer

    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    values = {"model_type": name.split(maxsplit=1)[0], **SIZES, **ids, **FAMILIES[name]}
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that attention looks at certain positions: a wrong rotation shows in the
            # logits.
            parameter.add_(torch.randn_like(parameter) * 0.15)
    save_file(weights_of(model), folder / "model.safetensors", {"format": "pt"})
    if saved_by_5:
        config.save_pretrained(folder)


def train_one_step(base: Path, output: Path, kind: str) -> None:
    """One optimizer step with tunesmith, in full or of a LoRA."""
    from tunesmith.config.load import from_mapping
    from tunesmith.training.run import train

    rows = base.parent / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"{i} + 1 =", "completion": f"{i + 1}"}) + "\n" for i in range(8)
        )
    )
    values = {
        "model": {"name": str(base), "dtype": "fp32"},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8} if kind == "lora" else {"kind": "none"},
        "data": {"train": {"source": str(rows), "format": "prompt-completion"}, "seq_len": 64},
        "train": {"duration": "1 steps", "global_batch": "8 examples", "learning_rate": 1e-3},
        "log": {"tensorboard": False, "samples": 0},
        "output_dir": str(output),
    }
    train(from_mapping(values, where="old_readers", base=base.parent), quiet=True)


def write_folders(work: Path, name: str, *, saved_by_5: bool) -> dict[str, Path]:
    """The folders to be read: a full run's final/, a merge, and that final/ with the config of
    Transformers 5 alone.
    """
    import tunesmith

    base = work / "base"
    write_base(base, name, saved_by_5=saved_by_5)
    train_one_step(base, work / "full", "full")
    train_one_step(base, work / "lora", "lora")
    tunesmith.merge(work / "lora", work / "merged", device="cpu")
    before = work / "before"
    shutil.copytree(work / "full" / "final", before)
    AutoConfig.from_pretrained(before).save_pretrained(before)
    return {"full": work / "full" / "final", "merged": work / "merged", "before": before}


def read_folder(folder: Path) -> dict[str, Any]:
    """Logits of a folder, its tokens and how it reads, by plain Transformers of whatever version
    this process has.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        tokens = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    except Exception as error:  # the table shows it
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    ids = torch.arange(LENGTH)[None] * 37 % 256
    with torch.no_grad():
        return {"logits": model(ids).logits, "tokens": tokens}


def read_all(python: str, folders: list[Path], scratch: Path) -> list[dict[str, Any]]:
    """What `read_folder` gives of each folder in another interpreter, and last its version of
    Transformers.
    """
    output = scratch / "read.pt"
    subprocess.run(
        [python, __file__, "--read", *map(str, folders), "--output", str(output)], check=True
    )
    results: list[dict[str, Any]] = torch.load(output)
    return results


def difference(one: dict[str, Any], other: dict[str, Any]) -> float | str:
    """The largest difference of two readings' logits; in words where one of them failed or tokens
    differ.
    """
    for reading in (one, other):
        if "error" in reading:
            return str(reading["error"])
    if one["tokens"] != other["tokens"]:
        return "the tokens differ"
    return float((one["logits"] - other["logits"]).abs().max())


def own_logits(folder: Path) -> dict[str, Any]:
    """What tunesmith itself computes of a folder."""
    import tunesmith

    loaded = tunesmith.load_run(folder, device="cpu", dtype="fp32")
    ids = torch.arange(LENGTH)[None] * 37 % 256
    with torch.no_grad():
        return {"logits": loaded.model(ids).logits, "tokens": loaded.tokenizer(TEXT).input_ids}


def measure(names: list[str], old_python: str) -> dict[str, Any]:
    """A row for each family and form of its base's config.json."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        written: list[tuple[dict[str, Any], dict[str, Path], dict[str, Any]]] = []
        for number, name in enumerate(names):
            for saved_by_5 in (False, True):
                form = "Transformers 5" if saved_by_5 else "Hub"
                work = Path(scratch) / f"{number}-{int(saved_by_5)}"
                folders = write_folders(work, name, saved_by_5=saved_by_5)
                own = {kind: own_logits(folders[kind]) for kind in ("full", "merged")}
                written.append(({"family": name, "config of the base": form}, folders, own))
                print(f"written: {name}, {form}", file=sys.stderr, flush=True)
        paths = [path for _, folders, _ in written for path in folders.values()]
        *new, versions = read_all(sys.executable, paths, Path(scratch))
        *old, old_versions = read_all(old_python, paths, Path(scratch))
        by_new, by_old = dict(zip(paths, new, strict=True)), dict(zip(paths, old, strict=True))
        for row, folders, own in written:
            for kind in ("full", "merged"):
                folder = folders[kind]
                row[f"{kind}, 4.57"] = difference(by_new[folder], by_old[folder])
                row[f"{kind}, 5.x"] = difference(own[kind], by_new[folder])
            row["before, 4.57"] = difference(by_new[folders["before"]], by_old[folders["before"]])
            row["largest logit"] = float(by_new[folders["full"]]["logits"].abs().max())
            rows.append(row)
    return {"tolerance": TOLERANCE, "new": versions, "old": old_versions, "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [
            f"{value:.1e}" if isinstance(value, float) else str(value) for value in row.values()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Write, read and compare; exit 1 where a difference is above the tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old-python", help="an interpreter that has Transformers 4.57")
    parser.add_argument(
        "--family", action="append", choices=list(FAMILIES), help="one family only; may be repeated"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--read", nargs="+", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if args.read:
        versions = {"transformers": __version__, "torch": str(torch.__version__)}
        torch.save([*map(read_folder, args.read), versions], args.output)
        return
    if args.old_python is None:
        parser.error("--old-python is needed")
    result = measure(args.family or list(FAMILIES), args.old_python)
    print(table(result["rows"]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    compared = [
        row[column]
        for row in result["rows"]
        for column in row
        if column.startswith(("full", "merged"))
    ]
    if any(isinstance(value, str) or value > TOLERANCE for value in compared):
        sys.exit(1)


if __name__ == "__main__":
    main()
