"""Logits of a model whose weights are read during the forward, beside Transformers' and PEFT's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from picture_runs import write_vision_model
from runs import make_run, peft_model
from tunesmith.inference.load_run import locate_run, read_run_files
from tunesmith.model.tiny_model import build_tiny_model
from tunesmith.tools.export import tuned_weights
from tunesmith.tools.export.streamed_model import Values, streamed_logits
from tunesmith.tools.export.tuned_weights import TunedModel, open_tuned_model

PROMPTS = [[7, 3, 50, 12, 12, 9, 41, 2, 30], [11, 5, 28]]
CPU = torch.device("cpu")
# Sums in another order: a row that is filled up, and bands of a matrix.
ROUNDING = 1e-5


def open_tuned(path: Path) -> TunedModel:
    return open_tuned_model(read_run_files(locate_run(path)))


def stream(model: TunedModel, values: Values, dtype: torch.dtype = torch.float32) -> Any:
    return streamed_logits(model, PROMPTS, values=values, dtype=dtype, device=CPU)


@torch.no_grad()
def plain_logits(model: Any) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in PROMPTS]


def assert_equal(streamed: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(streamed, expected, strict=True):
        assert (one - other).abs().max() <= ROUNDING * other.abs().max()


def nightly(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.nightly)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [
        "gemma3_text",  # an embedding with a scale
        "mixtral",  # experts in stacks
        "deepseek_v3",  # a buffer that is stored
        nightly("llama"),
        nightly("llama4_text"),  # it sends tokens to where the embedding is
        nightly("opt"),  # an embedding of positions
        nightly("gpt2"),  # no linear layers
        nightly("bloom"),  # a norm outside of the layers
        nightly("mamba2"),  # parameters of a layer that has linear ones inside
        nightly("qwen3_next"),
    ],
)
def test_every_kind_of_module_reads_its_weights(model_type, tmp_path, monkeypatch):
    from transformers import CONFIG_MAPPING

    build_tiny_model(CONFIG_MAPPING[model_type]()).save_pretrained(tmp_path)
    words = models.WordLevel({f"t{i}": i for i in range(60)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token="t1", pad_token="t2"
    )
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(tuned_weights, "BAND", 1000)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tuned = open_tuned(tmp_path)
    logits = stream(tuned, "merged")
    assert_equal(logits, plain_logits(expected))
    positions = [[8, 2], [1]]
    some = streamed_logits(
        tuned, PROMPTS, values="merged", dtype=torch.float32, device=CPU, positions=positions
    )
    assert_equal(some, [logits[0][positions[0]], logits[1][positions[1]]])


@pytest.mark.slow
def test_a_placeholder_without_pixels_is_a_token_of_the_text_model(tmp_path: Path) -> None:
    """Gemma 4 reads the padding token's row, and replaces the embeddings of placeholders by it."""
    folder = write_vision_model(tmp_path, "gemma4")
    expected = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = [7, 3, expected.config.image_token_id, 12, 9]
    location = locate_run(folder)
    base = replace(location.base, vision=True)
    tuned = open_tuned_model(read_run_files(replace(location, base=base)))
    (logits,) = streamed_logits(tuned, [prompt], values="merged", dtype=torch.float32, device=CPU)
    with torch.no_grad():
        hidden = expected.model.language_model(input_ids=torch.tensor([prompt]))[0]
        plain = expected.lm_head(hidden)[0]
    softcap = expected.config.get_text_config().final_logit_softcapping
    assert_equal([logits], [softcap * (plain / softcap).tanh()])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    ],
    ids=["linear layers and the head", "an embedding trained in full"],
)
def test_an_adapter_beside_its_base_and_merged(options, tiny, tmp_path):
    recipe = {
        "modules_to_save": options.get("modules_to_save", []),
        "target": options.get("target_modules", "all-linear"),
    }
    tuned = peft_model(tiny, **options)
    make_run(tmp_path / "run", tiny, tuned, adapter=recipe)
    model = open_tuned(tmp_path / "run")
    with torch.no_grad():
        adapted = plain_logits(tuned)
    assert_equal(stream(model, "adapter"), adapted)
    assert_equal(stream(model, "merged"), adapted)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    assert_equal(stream(model, "base"), plain_logits(base))
