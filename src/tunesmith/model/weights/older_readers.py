"""Model files in a form that Transformers 4 and tools built on it also read correctly.

Transformers 5 writes the rotary embedding only as `rope_parameters`. Older readers look for the
keys `rope_theta` and `rope_scaling`. If these are missing, the readers use their defaults without
an error, and so compute a different model. Transformers 4 fails to load a tokenizer of class
`TokenizersBackend` or a list of `extra_special_tokens`.

This module adds the older keys to the config. In the tokenizer's config, it replaces the new keys
by the older ones, which both versions read. This module does not import torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from tunesmith.model.known.architectures import ARCHITECTURES
from tunesmith.model.weights.safetensors_files import Config


def write_for_older_readers(folder: Path) -> None:
    """Convert a folder's config.json and tokenizer_config.json for older readers."""
    changes = {"config.json": with_older_config, "tokenizer_config.json": with_older_tokenizer}
    for name, change in changes.items():
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_bytes())
        except ValueError:
            continue  # the code that reads the file reports the error
        if isinstance(values, dict) and (changed := change(values)) != values:
            text = json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False)
            file.write_text(f"{text}\n", encoding="utf-8")


def with_older_config(config: Config) -> dict[str, object]:
    """Return a config.json of Transformers 5 with the older keys added.

    Keys that the config already has are not changed.
    """
    older = {}
    if config.get("dtype") is not None:
        older["torch_dtype"] = config["dtype"]  # name of the key before Transformers 4.56
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and config.get("model_type") in ARCHITECTURES:
        older |= _older_rope(str(config["model_type"]), rope)
    return {**older, **config}


def _older_rope(model_type: str, rope: Config) -> dict[str, object]:
    """Convert the config's `rope_parameters` to the older keys."""
    older = {}
    # Gemma 3 has a separate mapping for each type of attention layer.
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
    """Return the older `rope_scaling`, or None if the rotary frequencies are not scaled."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    # Phi-3 accepts only these three keys. Its config has the other values at the top level.
    if model_type == "phi3" and "short_factor" in rope:
        return {
            "type": rope_type,
            "short_factor": rope["short_factor"],
            "long_factor": rope["long_factor"],
        }
    scaling = dict(rope)
    scaling.pop("rope_theta", None)
    scaling.pop("partial_rotary_factor", None)
    # Before Transformers 4.43, the key was named `type`.
    return scaling | {"rope_type": rope_type, "type": rope_type}


def with_older_tokenizer(config: Config) -> dict[str, object]:
    """Convert a tokenizer_config.json of Transformers 5 to a form that versions 4 and 5 read."""
    older = dict(config)
    if older.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = older.get("extra_special_tokens")
    if isinstance(extra, list):
        del older["extra_special_tokens"]
        older.setdefault("additional_special_tokens", extra)
    return older
