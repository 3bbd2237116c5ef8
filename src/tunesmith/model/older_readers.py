"""Model files that Transformers 4, and what is built on it, reads as Transformers 5 does.

Transformers 5 writes the rotary embedding as `rope_parameters` alone. A reader of the older keys,
`rope_theta` and `rope_scaling`, finds none of them and takes its defaults, without an error: it
computes another model. Transformers 4 does not read a tokenizer of class `TokenizersBackend`, or a
list of `extra_special_tokens`, at all. Here the older keys are written beside the new ones, and a
tokenizer's in place of them, where both versions read the older form.

No torch is imported here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.safetensors_files import Config


def write_for_older_readers(folder: Path) -> None:
    """Add the older keys to config.json and tokenizer_config.json of a folder, those of them that
    are there.
    """
    changes = {"config.json": with_older_config, "tokenizer_config.json": with_older_tokenizer}
    for name, change in changes.items():
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_bytes())
        except ValueError:
            continue  # whoever reads the file reports it
        if isinstance(values, dict) and (changed := change(values)) != values:
            text = json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False)
            file.write_text(f"{text}\n", encoding="utf-8")


def with_older_config(config: Config) -> dict[str, object]:
    """A config.json of Transformers 5 with the older keys.

    Keys that it has already are not changed.
    """
    older: dict[str, object] = {}
    if config.get("dtype") is not None:
        older["torch_dtype"] = config["dtype"]  # the only name before Transformers 4.56
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and config.get("model_type") in ARCHITECTURES:
        older |= _older_rope(str(config["model_type"]), rope)
    return {**older, **config}


def _older_rope(model_type: str, rope: Mapping[str, Any]) -> dict[str, object]:
    """The older keys of a config's `rope_parameters`."""
    older: dict[str, object] = {}
    # One mapping for each kind of layer, as in Gemma 3.
    if isinstance(rope.get("full_attention"), Mapping):
        local = rope.get("sliding_attention") or {}
        if "rope_theta" in local:
            older["rope_local_base_freq"] = local["rope_theta"]
        rope = rope["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            older[key] = rope[key]
    older["rope_scaling"] = _older_scaling(model_type, rope)
    return older


def _older_scaling(model_type: str, rope: Config) -> dict[str, object] | None:
    """The older `rope_scaling`, None where frequencies are not scaled."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    # Phi-3 takes these three keys and no other, and has the rest at the top of its config.
    if model_type == "phi3" and "short_factor" in rope:
        return {
            "type": rope_type,
            "short_factor": rope["short_factor"],
            "long_factor": rope["long_factor"],
        }
    scaling = dict(rope)
    scaling.pop("rope_theta", None)
    scaling.pop("partial_rotary_factor", None)
    # `type` is the name before Transformers 4.43.
    return scaling | {"rope_type": rope_type, "type": rope_type}


def with_older_tokenizer(config: Config) -> dict[str, object]:
    """A tokenizer_config.json of Transformers 5 in the form that 4 reads; 5 reads both."""
    older = dict(config)
    if older.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = older.get("extra_special_tokens")
    if isinstance(extra, list):
        del older["extra_special_tokens"]
        older.setdefault("additional_special_tokens", extra)
    return older
