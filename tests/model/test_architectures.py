"""The table of differences against what each family's own forward does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.model import architectures, spec

from . import families


@pytest.fixture(scope="module", params=sorted(families.VARIANTS))
def model(request):
    config = AutoConfig.for_model(request.param.split("-")[0], **{**families.SMALL, **families.VARIANTS[request.param]})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_hidden_states_and_the_row_give_the_models_logits(model) -> None:
    row = architectures.architecture_of(model.config)
    ids = torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.get_submodule(row.backbone)(ids).last_hidden_state
        logits = nn.functional.linear(hidden, model.get_submodule(row.head).weight) * row.logit_scale
        if row.final_softcap is not None:
            logits = row.final_softcap * torch.tanh(logits / row.final_softcap)
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-6, atol=1e-6)  # multiplied against divided


def test_the_row_names_what_is_there(model) -> None:
    row = architectures.architecture_of(model.config)
    layers = model.get_submodule(row.layers)
    assert len(layers) == model.config.num_hidden_layers
    for layer in layers:
        for name in (*row.qkv, *row.gate_up, row.output, row.down):
            assert isinstance(layer.get_submodule(name), nn.Linear)
    assert model.get_submodule(row.head).bias is None


def test_what_reaches_attention_is_what_the_row_says(model, monkeypatch) -> None:
    from transformers import AttentionInterface

    seen = []

    def spy(module, query, key, value, mask, **kwargs):
        seen.append((kwargs.get("softcap"), kwargs.get("sliding_window")))
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("spy-of-quirks", spy)
    model.set_attn_implementation("spy-of-quirks")
    with torch.no_grad():
        model(torch.arange(3, 20)[None])
    row, found = architectures.architecture_of(model.config), spec.read_spec(model.config.to_dict(), where="")
    assert len(seen) == found.layers
    assert {softcap for softcap, _ in seen} == {row.attention_softcap}
    assert tuple(window for _, window in seen) == found.windows
    assert row.windowed or not any(found.windows)


def test_the_table_stays_small() -> None:
    assert len(architectures._ROWS) <= 12
    assert set(architectures._ROWS) <= set(spec.FAMILIES)
