"""Sizes counted on the meta model, beside published ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from errors import refuses
from tunesmith.errors import ModelError
from tunesmith.model.measuring import measured_spec, tiny_model
from tunesmith.model.measuring.measured_spec import measure_spec, model_spec

from . import families

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS_20B = {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "total", "active", "counts_embedding"),
    [
        # "Qwen3 Technical Report", arXiv:2505.09388, table 2.
        (QWEN3_30B_A3B, 30.5, 3.3, True),
        # "gpt-oss-120b & gpt-oss-20b Model Card", arXiv:2508.10925, table 1: 20.91B, 3.61B active.
        (GPT_OSS_20B, 20.91, 3.61, False),
    ],
    ids=["qwen3-30b-a3b", "gpt-oss-20b"],
)
def test_published_sizes(config: dict, total: float, active: float, counts_embedding: bool) -> None:
    found = measure_spec(config, where="test")
    tables = 2 if counts_embedding else 1
    counted = found.active + tables * found.head_matmul
    assert found.parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert counted / 1e9 == pytest.approx(active, rel=0.02 if active == 3.3 else 0.01)


@pytest.mark.slow
def test_layers_differ_where_the_config_says_so() -> None:
    """Transformers' defaults of Gemma 4 (head_dim 256 in layers with a window, else 512), Qwen3.5
    (three of four layers are recurrent) and Llama 4 (chunks of 8,192 but in every fourth layer).
    """
    gemma = measure_spec({"model_type": "gemma4_text"}, where="test")
    assert {(layer.head_dim, layer.window) for layer in gemma.layers} == {(256, 512), (512, None)}
    # Of 5.08B parameters 2.62B are embeddings: one is the head, the others are lookups.
    assert gemma.parameters / 1e9 == pytest.approx(5.08, rel=0.01)
    assert (gemma.active + gemma.head_matmul) / 1e9 == pytest.approx(5.08 - 2.62 + 0.6, rel=0.01)
    assert gemma.head_dim == 512

    qwen = measure_spec({"model_type": "qwen3_5_text"}, where="test")
    assert [layer.mixing for layer in qwen.layers[:4]] == ["recurrent"] * 3 + ["attention"]
    assert qwen.layers[0].state == 32 * 128 * 128  # heads, channels of keys and of values
    assert qwen.layers[3].state == qwen.layers[0].heads == 0

    llama = measure_spec({"model_type": "llama4_text"}, where="test")
    assert [layer.chunk for layer in llama.layers[:4]] == [8192, 8192, 8192, None]


def test_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By sizes alone; a file that is cut off is measured again."""
    config = {"model_type": "olmo3", **families.SMALL}
    first = measure_spec(config, where="test")
    [file] = (tmp_path / "specs").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(measured_spec, "_measure", lambda *args: pytest.fail("measured again"))
        assert measure_spec({**config, "eos_token_id": 5}, where="other") == first
    file.write_text(file.read_text()[:-9])
    assert measure_spec(config, where="test") == first
    assert json.loads(file.read_text().split("\n")[1])["parameters"] == first.parameters


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ({"model_type": "no_such_type"}, ["no_such_type"]),
        ({"model_type": "olmo3", "num_attention_heads": 0}, ["olmo3"]),
        ("hrm_text", ["2 layers", "hrm_text"]),
        ("jetmoe", ["jetmoe"]),
    ],
)
def test_what_cannot_be_measured_is_refused(config: dict | str, facts: list[str]) -> None:
    if isinstance(config, str):
        config = tiny_model.shrink(AutoConfig.for_model(config)).to_dict()
    with refuses(ModelError, where="some/config.json", names=facts) as caught:
        model_spec(config, where="some/config.json")
    assert caught.value.fix
