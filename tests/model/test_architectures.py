"""The architecture table against what each family's own forward does."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tunesmith.model import spec
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.decoder import find_decoder, find_head, find_layers

from . import families


@pytest.fixture(scope="module", params=sorted(families.VARIANTS))
def model(request):
    config = families.tiny_config(request.param)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_hidden_states_and_the_head_give_the_models_logits(model) -> None:
    ids = torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = find_decoder(model)(ids).last_hidden_state
        logits = find_head(model).logits(nn.functional.linear(hidden, model.lm_head.weight))
        # Multiplied against divided
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-6, atol=1e-6)


def test_layers_and_head_are_where_the_engine_looks(model) -> None:
    assert find_layers(model) == "model.layers"
    assert len(model.model.layers) == model.config.num_hidden_layers
    assert find_decoder(model) is model.model
    assert model.get_output_embeddings() is model.lm_head
    assert model.lm_head.bias is None


def test_the_shared_config_keys_are_read_raw_as_with_all_defaults(model) -> None:
    raw = spec.read_spec(json.loads(model.config.to_json_string(use_diff=True)), where="")
    assert raw == spec.read_spec(model.config.to_dict(), where="")


def test_what_reaches_attention_is_what_the_row_says(model, monkeypatch) -> None:
    from transformers import AttentionInterface

    seen = []

    def spy(module, query, key, value, mask, **kwargs):
        seen.append((kwargs.get("softcap"), kwargs.get("sliding_window")))
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("spy-of-arguments", spy)
    model.set_attn_implementation("spy-of-arguments")
    with torch.no_grad():
        model(torch.arange(3, 20)[None])
    found = spec.read_spec(model.config.to_dict(), where="")
    assert len(seen) == found.depth
    assert {softcap for softcap, _ in seen} == {found.attention_softcap}
    assert [window for _, window in seen] == [layer.window for layer in found.layers]


def test_the_table_stays_small() -> None:
    assert len(ARCHITECTURES) <= 12
    assert set(ARCHITECTURES) == {variant.split("-")[0] for variant in families.VARIANTS}, (
        "every row has a parity test"
    )
