"""Test of all shipped recipes on tiny models: train, merge, and export for vLLM and llama.cpp.

    # test all recipes and write the record
    python benchmarks/parity/recipe_exports.py
    # test some recipes and replace their rows of the record
    python benchmarks/parity/recipe_exports.py qwen3-8b-lora
    # write the table of the page from the record
    python benchmarks/parity/recipe_exports.py --write docs/measurements/README.md

The recipe file trains a tiny random model of the same family for two steps, with rows in the
recipe's format. The model's config.json has the keys of the published model; functions of the tests
write it. Keys that do not work with a tiny model or on a CPU are overridden. The record names the
overrides that are only necessary on a CPU. `merge` and `export` check their output, and the results
of these checks are recorded. The packages xllamacpp, TRL and Axolotl and the sdist of the converter
are required; `make dev` installs them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tables"))
from generated import table, write_or_check

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "tools"))
sys.path.insert(0, str(ROOT / "tests" / "data"))
RECORD = ROOT / "docs/measurements/recipe-exports.json"
COMMAND = "benchmarks/parity/recipe_exports.py"
# Types of text models in shapes.json that have another name in `converter_models.MODELS`
CONVERTED = {
    "gemma4_text": "gemma4",
    "gemma4_unified_text": "gemma4_unified",
    "llama4_text": "llama4",
    "ministral3": "mistral3",
    "muse_glimmer_text": "muse_glimmer",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
}
# Chat templates that use the recipe's `data.template_args`. ChatML does not use them.
TEMPLATES = {"nemotron_h": "trl/nemotron_3_nano", "qwen3_5": "trl/qwen3_8"}
# Variants in tests/vision.py with the same attention to pictures as the published model
PICTURES = {"gemma4": "gemma4_both_ways"}
# Sizes of the tiny models of families for which tunesmith itself writes GGUF files
TINY: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16384,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
DENSE_GEMMA = {"enable_moe_block": False, "num_experts": None, "top_k_experts": None,
               "moe_intermediate_size": None}  # fmt: skip
OVERRIDES = [
    "data.validation=null", "validate.every=null", "train.duration=2 steps",
    "train.global_batch=4 examples", "train.warmup=0 steps", "checkpoint.every=null",
    "log.samples=0", "log.tensorboard=false",
]  # fmt: skip
# Values of `train` that need a GPU, and their overrides for a CPU
GPU_VALUES = {
    "compile": ("on", "train.compile=off"),
    "cpu_offload": (("parameters",), "train.cpu_offload=[]"),
}


def write_base(run: Any, folder: Path) -> Path:
    """Write a tiny random model of the recipe's family in the format of the published model.

    Return its folder.
    """
    from transformers import AutoConfig

    from export import converter_models
    from model import families
    from quant import test_nf4
    from shipped_bases import change_config, draw_mxfp4_experts, write_fp8_stacks
    from stored_templates import tokenizer_of
    from tunesmith.model.arch.shapes import config_of_model

    stated: Any = config_of_model(run.model.name)
    text_type = stated.get("text_config", stated)["model_type"]
    name = CONVERTED.get(text_type, text_type)
    if run.model.vision:
        return write_picture_model(folder, PICTURES.get(name, name))
    if name in converter_models.MODELS:
        is_dense_gemma = name == "gemma4" and not stated["enable_moe_block"]
        converter_models.write_base(name, folder, **(DENSE_GEMMA if is_dense_gemma else {}))
        if run.data.template_args:
            template = tokenizer_of(TEMPLATES[name]).chat_template
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        if name == "mistral4":
            return write_fp8_stacks(folder, folder.with_name("fp8"), None)
        return draw_mxfp4_experts(folder) if name == "gpt_oss" else folder
    config = {**stated, **TINY}
    config.pop("head_dim", None)
    quantized = config.pop("quantization_config", None)
    families.random_model(AutoConfig.for_model(**config)).save_pretrained(folder)
    change_config(folder, rope_parameters=None, **config)
    if quantized:
        model = test_nf4.theirs(folder)
        folder = folder.with_name("nf4")
        model.save_pretrained(folder)
    converter_models.chat_tokenizer().save_pretrained(folder)
    return folder


def write_picture_model(folder: Path, family: str) -> Path:
    """Write a random vision-language model with a tokenizer that llama.cpp knows."""
    import pytest
    from transformers import PreTrainedTokenizerFast

    import conftest
    from export.tiny_gguf import chat_tokenizer
    from picture_runs import write_vision_model

    def small_bpe(**special: str) -> Any:
        ends = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
        core = chat_tokenizer()._tokenizer
        return PreTrainedTokenizerFast(tokenizer_object=core, **ends, **special)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "byte_tokenizer", small_bpe)
        return write_vision_model(folder, family)


def write_rows(run: Any, folder: Path) -> Path:
    """Write a few rows in the recipe's format. Return the file."""
    import recipes
    from figures import write_figures

    file = folder / "rows.jsonl"
    source = run.data.train[0]
    if run.model.vision:
        return write_figures(folder, 8)
    if source.format == "preference":
        return recipes.write_pairs(file, 12)
    if source.format == "feedback":
        return recipes.write_feedback(file, 12)
    rows = []
    for row in recipes.rows(12):
        if source.format == "alpaca":
            rows.append({"instruction": row["prompt"], "input": "", "output": row["completion"]})
        else:
            turns = [("human", row["prompt"]), ("gpt", row["completion"])]
            rows.append({"conversations": [{"from": who, "value": text} for who, text in turns]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def measure(recipe: str, folder: Path, converter: Path) -> dict[str, Any]:
    """Train a recipe on a tiny model, and export the result to each format. Return its row."""
    from tunesmith.config.load import load_recipe
    from tunesmith.model.known.gguf_writers import gguf_writer
    from tunesmith.model.weights.safetensors_files import read_json
    from tunesmith.start.run import train
    from tunesmith.tools.export.gguf.export import export_gguf
    from tunesmith.tools.export.merge import merge
    from tunesmith.tools.export.vllm_adapter import export_peft

    run = load_recipe(recipe)
    base = write_base(run, folder / "base")
    rows, out = write_rows(run, folder), folder / "run"
    config = read_json(base / "config.json")
    text_type = config.get("text_config", config)["model_type"]
    is_full = run.adapter is None or run.adapter.kind == "none"
    instead = []
    for key, (value, override) in GPU_VALUES.items():
        if getattr(run.train, key) == value:
            instead.append(override)
    words = [
        f"model.name={base}",
        f"data.train={{source: {rows}, format: {run.data.train[0].format}}}",
        f"data.seq_len={1024 if run.model.vision else 256}",
        f"train.learning_rate={1e-3 if is_full else 0.02}",
        f"output_dir={out}",
        *OVERRIDES,
        *instead,
    ]
    result: dict[str, Any] = {"recipe": recipe, "model_type": config["model_type"]}
    result |= {"text_type": text_type, "instead": instead}
    trained = attempt(lambda: train(load_recipe(recipe, words), quiet=True))
    result["trains"] = trained if isinstance(trained, str) else ""
    if result["trains"]:
        return result
    if not is_full:
        merged = attempt(partial(merge, out, folder / "merged", dtype="bf16"))
        exact = None if isinstance(merged, str) else merged.merge_check.exact
        result["merge"] = rounded(exact.difference.max_logit) if exact else merged
        peft = attempt(partial(export_peft, out, folder / "peft"))
        result["vllm_adapter"] = peft if isinstance(peft, str) else ""
    is_own = gguf_writer(text_type) == "own"
    result["writer"] = "own" if is_own else "converter"
    options = {} if is_own else {"converter": converter}
    exported = attempt(partial(export_gguf, out, folder / "out.gguf", quant="f16", **options))
    if isinstance(exported, str):
        result["gguf"] = exported
        return result
    check = exported.check
    result["gguf"] = ""
    result["log_probability"] = rounded(check.tuned.max_logit)
    result["mean_kl"] = rounded(check.tuned.mean_kl)
    result["kl_of_training"] = rounded(check.base.mean_kl)
    return result


def rounded(value: float) -> float:
    return float(f"{value:.1e}")


def attempt(function: Callable[[], Any]) -> Any:
    """Call a function. Return its result, or the text of its error."""
    from tunesmith.errors import TunesmithError

    try:
        return function()
    except TunesmithError as error:
        return f"{error.what}: {error.why}"
    # A bug in this recipe must not stop the test of the other recipes.
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"


def read_record() -> dict[str, dict[str, Any]]:
    if not RECORD.is_file():
        return {}
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    return {row["recipe"]: row for row in record["recipes"]}


def as_table() -> str:
    """Return the record as a table in Markdown."""
    head = ("recipe", "model type", "trains", "merge = run", "vLLM", "GGUF",
            "log probability", "mean KL", "KL of training")  # fmt: skip
    rows = []
    for row in read_record().values():
        types = f"`{row['text_type']}`"
        trains = " ".join(["yes", *(f"`{word}`" for word in row["instead"])])
        merged, vllm = "", "its `final/`"
        if "merge" in row:
            is_merged = isinstance(row["merge"], float)
            merged = f"{row['merge']:.0e}" if is_merged else f"no: {row['merge']}"
            forms = ["folder"] if is_merged else []
            forms += [] if row["vllm_adapter"] else ["adapter"]
            vllm = ", ".join(forms) or f"no: {row['vllm_adapter']}"
        if row["trains"]:
            rows.append([row["recipe"], types, f"no: {row['trains']}", *[""] * 6])
            continue
        gguf = f"no: {row['gguf']}" if row["gguf"] else row["writer"]
        figures = ("log_probability", "mean_kl", "kl_of_training")
        cells = [f"{row[key]:.1g}" if key in row else "" for key in figures]
        rows.append([row["recipe"], types, trains, merged, vllm, gguf, *cells])
    return table(head, rows)


def main() -> None:
    if sys.argv[1:2] in (["--write"], ["--check"]):
        sys.exit(write_or_check(__doc__, COMMAND, as_table))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="default: all recipes")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tunesmith.config.shipped import shipped
    from tunesmith.model.known.gguf_writers import CONVERTER_SDIST

    names = options.recipes or list(shipped())
    if unknown := set(names) - set(shipped()):
        parser.error(
            f"unknown recipes: {', '.join(sorted(unknown))}; `tunesmith recipes` lists all"
        )
    with tempfile.TemporaryDirectory() as place:
        os.environ.setdefault("TUNESMITH_CACHE", f"{place}/cache")
        for name in names:
            folder = Path(place) / name
            folder.mkdir()
            began = time.process_time()
            row = measure(name, folder, Path(sys.prefix) / CONVERTER_SDIST)
            print(json.dumps(row), f"{time.process_time() - began:.0f} s", flush=True)
            record = {**read_record(), name: row}
            rows = ",\n".join(json.dumps(record[key]) for key in sorted(record) if key in shipped())
            text = f'{{"command": "python {COMMAND}",\n"recipes": [\n{rows}\n]}}\n'
            RECORD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
