"""The table of what writes a model type as GGUF, compared with the two writers."""

from __future__ import annotations

import ast

from transformers.models.auto import modeling_auto

from tunesmith.model.gguf_writers import (
    _COMPARED,
    _UNTRIED,
    CONVERTER_SDIST,
    describe_gguf_export,
    gguf_writer,
)
from tunesmith.model.model_types import find_model_type, read_model_types
from tunesmith.model.shapes import SHAPES
from tunesmith.tools.export.gguf.converter import Converter

# Types of a model and of its text part, and what writes it.
TYPES_OF_WRITERS = {
    ("llama", ""): "own",
    # A composite whose text model tunesmith writes.
    ("gemma3", "gemma3_text"): "own",
    ("mistral3", "mistral"): "own",
    ("qwen3_moe", ""): "converter",
    # The text part of a composite that was compared.
    ("mistral3", "ministral3"): "converter",
    ("qwen3_5_moe", "qwen3_5_moe_text"): "converter",
    ("olmoe", ""): "untried",
    ("bailing_hybrid", ""): "",
}


def test_a_type_has_the_writer_that_knows_it() -> None:
    found = {types: gguf_writer(*types) for types in TYPES_OF_WRITERS}
    assert found == TYPES_OF_WRITERS
    assert CONVERTER_SDIST in describe_gguf_export("qwen3_moe")
    assert CONVERTER_SDIST not in describe_gguf_export("llama")


def test_the_table_is_the_registry_of_the_pinned_converter(converter: Converter) -> None:
    """In both directions: for all types of this Transformers that generate text."""
    source = (converter.folder / "conversion" / "__init__.py").read_text("utf-8")
    registry: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TEXT_MODEL_MAP":
            assert node.value is not None
            registry = ast.literal_eval(node.value)
    assert len(registry) == 269
    classes: dict[str, set[str]] = {}
    for kind in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        for name, values in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {}).items():
            classes.setdefault(name, set()).update([values] if isinstance(values, str) else values)
    assert len(classes) > 200
    registered = {name for name, values in classes.items() if values & registry.keys()}
    ours = {name for name in registered if gguf_writer(name) == "own"}
    assert registered - ours == (_COMPARED | _UNTRIED) & classes.keys()


def test_a_model_of_a_recipe_that_ships_can_be_exported() -> None:
    types = set()
    for shape in SHAPES.values():
        types.update(str({**shape.config, **more}["model_type"]) for more in shape.models.values())
    assert len(types) >= 12
    assert {gguf_writer(name) for name in types} == {"own", "converter"}


def test_a_type_that_does_not_train_has_no_writer() -> None:
    refused = [name for name, row in read_model_types().items() if row.support.state == "refused"]
    assert "axk2" in refused
    assert {find_model_type(name).gguf for name in refused} == {""}
