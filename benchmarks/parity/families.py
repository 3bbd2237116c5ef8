"""Measurement of how each causal and multimodal model type of Transformers can be trained: with
packed rows, with padded rows, or not at all.

    # print a line per type, and compare the types with the shipped table
    python benchmarks/parity/families.py
    # measure only some types
    python benchmarks/parity/families.py llama4_text
    # write the table and docs/models.md; if types are given, replace only their rows
    python benchmarks/parity/families.py --write

The default config of each type is shrunk to a tiny model (`model/measuring/tiny_model.py`). Two documents in
one row are compared with each document alone under Transformers' own attention, in logits and all
gradients (`model/measuring/support.py`). For a multimodal type, only the text model is trained. If the text
model has its own class, this class is used, and its logits must equal those of the entire model.
Otherwise the class of the entire model is used. Training with pictures is measured for the families
that have a processor in `tests/vision.py`. A type is refused if its memory cannot be measured on
the meta device (`model/measuring/measured_spec.py`).

If a type differs from the table, for example after a new release of Transformers, the type is
printed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from tunesmith.errors import ModelError
from tunesmith.hub.picture_support import make_picture_row
from tunesmith.model.arch.spec import check_supported
from tunesmith.model.arch.text_config import has_own_class
from tunesmith.model.known.architectures import ARCHITECTURES
from tunesmith.model.known.model_types import (
    FILE,
    TUNED_SUPPORT,
    Errors,
    ModelType,
    Pictures,
    Support,
    measured_with,
    read_model_types,
)
from tunesmith.model.measuring.measured_spec import measure_spec
from tunesmith.model.measuring.support import measure_own_class, measure_support
from tunesmith.model.measuring.tiny_model import shrink, shrink_multimodal
from tunesmith.model.measuring.vision_support import measure_pictures
from tunesmith.tokens.text.placeholders import PictureProcessor

ROOT = Path(__file__).resolve().parents[2]
# Folder of the tests' module `vision`
sys.path.insert(0, str(ROOT / "tests"))
PAGE = ROOT / "docs/models.md"
# Values that are missing in the default config of a type, but set in all published models of the
# type
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_BY_LAYER = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_QWEN_MROPE = {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [16, 24, 24]}}}
_GLM_MROPE = {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [8, 12, 12]}}}
COMPLETE: dict[str, dict[str, Any]] = {
    "cohere_compass": {"text_config": {"rope_parameters": _BY_LAYER}},
    "cohere_compass_text": {"rope_parameters": _BY_LAYER},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 5e5, "clip_qkv": 8}},
    "chameleon": {"vocabulary_map": {"<image>": 8711, "IMGIMGBZ": 4}},
    "deepseek_ocr2": {
        "text_config": {
            "num_hidden_layers": 12,
            "mlp_layer_types": ["dense", *["sparse"] * 11],
            "num_experts_per_tok": 6,
        }
    },
    "deepseek_v2": {"n_group": 8, "topk_group": 3, "num_experts_per_tok": 6},
    "diffusion_gemma": {
        "text_config": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
    },
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "emu3": {"vocabulary_map": {"<image>": 151851, "<|extra_200|>": 151846}},
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [22, 22, 20]}}
    },
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga"), _GLM_MROPE),
    "granite4_vision": {"deepstack_layer_map": [[-2, 1]], "downsample_rate": "1/2"},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 128,
            "rope_parameters": {**_ROPE, "mrope_section": [16, 16, 16, 16]},
        }
    },
    "janus": {"text_config": {"hidden_size": 2048, "num_attention_heads": 16}},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl"), _QWEN_MROPE
    ),
    "step3p7": {"text_config": {"sliding_window": 512}},
}
# Values that are compared with the table. The measured errors are not compared, because they differ
# between machines.
VERDICT = ("state", "recurrent", "dead_targets", "packs_eager", "text", "entire", "pictures")
HEADER = """# Models

{total} causal and multimodal model types of Transformers {release}: {trained} train, {refused} do not.

```
tunesmith models              # all types, with the reason of each
tunesmith models qwen3_5      # one type, with the measured differences
tunesmith models ./my-model   # measure the model in a folder
```

## Types that train

- *tuned*: packed rows, with tunesmith's optimized forward passes. *packed*: packed rows, with Transformers' forward passes; recurrent layers
  process one document at a time. *padded*: one document per row, which is slower.
- `parallel.tensor`: whether it works. `tunesmith models TYPE` gives the reason if not.
- *GGUF*: the writer of the file: `tunesmith export` itself (*own*) or [llama.cpp's converter](export.md#with-llamacpps-converter), whose files were
  compared with the models (*converter*) or not (*untried*). *no*: not supported.

Models for pictures or sound are trained on text with their text model. LoRA cannot train the experts of `dbrx` and `longcat_flash`.

| trains | `parallel.tensor` | GGUF | model types |
|---|---|---|---|
"""
# The last parts of the page. `{name}` is replaced by the model types.
FOOTER = """
Each type was measured on a small model in fp32 (`make families`): documents in packed or padded rows differ from single documents by at most
{logits:.0e} in logits and {gradients:.0e} in gradients, and two ranks with `parallel.tensor` differ from one by at most {tensor:.0e}.

## Pictures

[Pictures](pictures.md) were tested with {pictures}. They are refused for {no_pictures}. For other vision-language types,
a run with `model.vision: true` measures the model before the first step.

## Types that do not train

{encoders} encoders and encoder-decoders (BERT, BART, RoBERTa, Whisper, ...) do not train. Others:

| reason | model types |
|---|---|
"""
ENCODER = "an encoder or encoder-decoder"
# Reasons of refused types, by words of the measured reason. The first match is used.
REASONS = {
    "encoder or encoder-decoder": ENCODER,
    "attends to an encoder": ENCODER,
    "last linear layer": "the logits are not the output of the last linear layer",
    "not causal": "a token depends on later tokens",
    "padded on the right": "padding changes the results",
    "computes other logits": "the class of the text model computes other logits",
    "not support text alone": "the model requires more than text",
    "requires the timm": "the type was measured without the package timm, which it requires",
    "": "other; `tunesmith models TYPE` prints the reason",
}


def default_config(model_type: str) -> PretrainedConfig:
    """Return the default config of a type in Transformers, completed with COMPLETE."""
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**COMPLETE.get(model_type, {}))
    return config


def measure_type(model_type: str) -> tuple[ModelType, float]:
    """Measure one type. Return its row of the table and the duration in seconds."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    start = time.monotonic()
    entry = ModelType(model_type, Support("refused"))
    try:
        config = default_config(model_type)
        text = config.get_text_config()
        if text.model_type != model_type:
            is_entire = text is not config and not has_own_class(text)
            entry = replace(entry, text=text.model_type, entire=is_entire)
        support = _measure(config, entire=entry.entire)
        entry = replace(entry, support=support, pictures=_measure_pictures(config, support))
    except ModelError as error:
        reasons = [reason for reason in (error.what, error.why) if reason]
        entry = replace(entry, support=Support("refused", _one_line(": ".join(reasons))))
    # A config class can raise any exception for its own default values.
    except Exception as error:
        why = _one_line(f"its default config: {error}")
        entry = replace(entry, support=Support("refused", why))
    return entry, time.monotonic() - start


def _measure(config: PretrainedConfig, *, entire: bool) -> Support:
    """Measure how a model can be trained on texts."""
    check_supported(config.to_dict(), config.model_type)
    support = _measure_text(config, entire=entire)
    if support.state != "refused":
        small = shrink_multimodal(config) if entire else shrink(config.get_text_config())
        # The memory estimate needs this measurement. It raises ModelError if the model does not run
        # on the meta device.
        measure_spec(small.to_dict(), where=config.model_type)
    errors = support.errors
    if errors is not None:
        errors = Errors(float(f"{errors.logits:.1e}"), float(f"{errors.gradients:.1e}"))
    return replace(support, why=_one_line(support.why), errors=errors)


def _measure_text(config: PretrainedConfig, *, entire: bool) -> Support:
    """Measure the text model in the class in which it is trained."""
    if entire:
        return measure_support(config)
    text = config.get_text_config()
    if text is not config:
        support = measure_own_class(config)
        if support.state == "refused":
            return support
    support = measure_support(text)
    if text.model_type in ARCHITECTURES:
        return replace(support, state="tuned", why=TUNED_SUPPORT.why)
    return support


def _measure_pictures(config: PretrainedConfig, support: Support) -> Pictures:
    """Measure how a model can be trained with pictures.

    Return "" if the type has no pictures or cannot be trained on texts.
    """
    import vision

    model_type = config.model_type
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or support.state == "refused":
        return ""
    try:
        check_supported(config.to_dict(), model_type, vision=True)
    except ModelError:
        return "refused"
    if model_type not in vision.FAMILIES | vision.MORE_FAMILIES:
        return "untried"
    with tempfile.TemporaryDirectory() as name:
        folder = vision.write_processor(Path(name), model_type)
        whole = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        try:
            processor = PictureProcessor.load(folder, tokenizer, whole, None)
        except ModelError:  # a package is not installed
            return "untried"
        state = measure_pictures(whole, make_picture_row(processor, tokenizer)).state
    return "packed" if state == "packed" else "refused"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:160]


def as_json(entries: list[ModelType], versions: dict[str, str]) -> str:
    """Return the text of the shipped table, with one line per type.

    Args:
        versions: the versions of Transformers and torch with which the types were measured.
    """
    lines = []
    for entry in entries:
        values = {}
        for key, value in entry.row().items():
            # Omit False and empty values, but not a measured difference of 0.0.
            if value is not False and value not in (None, (), ""):
                values[key] = value
        name = values.pop("model_type")
        lines.append(f"{json.dumps(name)}: {json.dumps(values)}")
    types = ",\n".join(lines)
    return f'{{"versions": {json.dumps(versions)},\n"types": {{\n{types}\n}}}}\n'


def as_page(entries: list[ModelType], versions: dict[str, str]) -> str:
    """Return the text of docs/models.md."""
    trained = [entry for entry in entries if entry.support.state != "refused"]
    refused = [entry for entry in entries if entry.support.state == "refused"]
    added = [entry for entry in entries if entry.since]
    newest = max((entry.since for entry in added), default="", key=Version)
    release = versions["transformers"] + (f" and {newest}" if added else "")
    header = HEADER.format(
        total=len(entries), release=release, trained=len(trained), refused=len(refused)
    )
    errors = [entry.support.errors for entry in trained if entry.support.errors is not None]
    others = [entry for entry in refused if _reason(entry) != (ENCODER,)]
    footer = FOOTER.format(
        encoders=len(refused) - len(others),
        logits=max(error.logits for error in errors),
        gradients=max(error.gradients for error in errors),
        tensor=max(entry.tensor for entry in entries if entry.tensor is not None),
        pictures=_names(entry for entry in trained if entry.pictures == "packed"),
        no_pictures=_names(entry for entry in trained if entry.pictures == "refused"),
    )
    trained.sort(key=lambda entry: ("tuned", "packed", "padded").index(entry.support.state))
    return header + _rows(trained, _training_columns) + footer + _rows(others, _reason)


def _names(entries: Iterable[ModelType]) -> str:
    return ", ".join(f"`{entry.model_type}`" for entry in entries)


def _rows(entries: list[ModelType], columns: Callable[[ModelType], tuple[str, ...]]) -> str:
    """Return the rows of a table that lists the types with equal columns together."""
    groups: dict[tuple[str, ...], list[ModelType]] = {}
    for entry in entries:
        groups.setdefault(columns(entry), []).append(entry)
    lines = []
    for group, members in groups.items():
        lines.append(f"| {' | '.join([*group, _names(members)])} |\n")
    return "".join(lines)


def _training_columns(entry: ModelType) -> tuple[str, ...]:
    is_cut = "no" if entry.tensor is None else "yes"
    return entry.support.state, is_cut, entry.gguf or "no"


def _reason(entry: ModelType) -> tuple[str, ...]:
    words = next(words for words in REASONS if words in entry.support.why)
    return (REASONS[words],)


def write(entries: list[ModelType], versions: dict[str, str]) -> None:
    """Write the shipped table and docs/models.md.

    A multimodal type whose text model has its own class gets the tensor parallelism results of the
    text model.
    """
    by_type = {entry.model_type: entry for entry in entries}
    for place, entry in enumerate(entries):
        if entry.text in by_type and not entry.entire and entry.support.state != "refused":
            text = by_type[entry.text]
            entries[place] = replace(entry, tensor=text.tensor, uncut=text.uncut)
    FILE.write_text(as_json(entries, versions), encoding="utf-8")
    PAGE.write_text(as_page(entries, versions), encoding="utf-8")


def count(entries: list[ModelType]) -> str:
    """Return a text with the number of types of each state."""
    counts = Counter(entry.support.state for entry in entries)
    states = ", ".join(
        f"{counts[state]} {state}" for state in ("tuned", "packed", "padded", "refused")
    )
    return f"{len(entries)} types: {states}"


def find_changes(entries: list[ModelType], table: dict[str, ModelType]) -> list[str]:
    """Return one line for each difference between the measured types and the table."""
    changes = []
    for entry in entries:
        before = table.get(entry.model_type)
        if before is None:
            changes.append(f"{entry.model_type}: new type, {entry.support.state}")
            continue
        for key in VERDICT:
            was, is_now = before.row()[key], entry.row()[key]
            if was != is_now:
                changes.append(f"{entry.model_type}: {key} was {was!r}, is {is_now!r}")
    return changes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "types", nargs="*", metavar="TYPE", help="model types to measure (default: all)"
    )
    parser.add_argument("--write", action="store_true", help="write the table and docs/models.md")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    every = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    names = options.types or sorted(every)
    installed = {name: version(name) for name in ("transformers", "torch")}
    start = time.monotonic()
    entries = []
    with ProcessPoolExecutor(options.processes) as pool:
        for entry, seconds in pool.map(measure_type, names):
            entries.append(entry)
            figures = ""
            support = entry.support
            if support.errors is not None:
                figures = (
                    f"logits {support.errors.logits:.1e}, gradients {support.errors.gradients:.1e}"
                )
            print(
                f"{entry.model_type:24} {support.state:8} {seconds:5.1f} s  {figures}  {support.why}",
                flush=True,
            )
    print(f"{count(entries)}; {time.monotonic() - start:.0f} s")
    if options.write:
        table = read_model_types()
        rows = table if options.types else {}
        versions = measured_with() if options.types else installed
        for entry in entries:
            known = table.get(entry.model_type)
            if known is None:
                is_added = installed["transformers"] != versions["transformers"]
                since = installed["transformers"] if is_added else ""
                rows[entry.model_type] = replace(entry, since=since)
                continue
            # Keep the results of tensor_cuts.py.
            row = entry
            if entry.support.state != "refused":
                row = replace(entry, tensor=known.tensor, uncut=known.uncut)
            rows[entry.model_type] = replace(row, since=known.since if options.types else "")
        write([rows[name] for name in sorted(rows)], versions)
        return
    changes = find_changes(entries, read_model_types())
    if not options.types:
        here = Version(installed["transformers"])
        known = read_model_types().values()
        lost = {row.model_type for row in known if Version(row.since or "0") <= here} - set(names)
        changes += [f"{name}: no longer in Transformers" for name in sorted(lost)]
    for change in changes:
        print(f"changed: {change}", file=sys.stderr)
    sys.exit(bool(changes))


if __name__ == "__main__":
    main()
