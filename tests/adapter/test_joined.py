"""Joined weights (q/k/v and gate/up as one tensor each) answer as separate ones, and nothing outside notices them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from recipes import make_run, write_rows
from tunesmith.adapter import lora, peft_files
from tunesmith.checkpoint.resume import Start
from tunesmith.config.schema import Adapter
from tunesmith.model import attention, fused
from tunesmith.model.documents import Documents
from tunesmith.quant import nf4
from tunesmith.quant.eight_bit import select_scaling
from tunesmith.quant.scaled_matmul import INT8, ROW_WISE, TENSOR_WISE
from tunesmith.training.build import build as build_session
from tunesmith.training.run import train

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config}  # without and with biases on q, k and v
ADAPTER = Adapter(rank=4, alpha=8)
ROWS = (ROW_WISE,) if select_scaling("fp8", CPU).kind == ROW_WISE else ()  # torch 2.11 has none on a CPU


def build(
    dtype: torch.dtype, *, base: str = "dense", family: str = "llama", adapter: Adapter = ADAPTER, **sizes: int
) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**SIZES | sizes)).to(dtype)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
        for name in nf4.replace_linears(model, dtype):
            layer = model.get_submodule(name).to_empty(device="cpu")
            layer.quantize(weights[f"{name}.weight"])
    lora.attach_lora(model, adapter, seed=1)
    for _, layer in lora.loras(model):
        nn.init.normal_(layer.lora_B, std=0.1)  # with B = 0 the gradient of A is zero and proves nothing
        if dtype is torch.float64:
            layer.double()
    fused.fuse_modules(model, project=lora.project)
    model.set_attn_implementation(attention.register())
    return model.train()


def joined(model: PreTrainedModel) -> PreTrainedModel:
    twin = copy.deepcopy(model)
    assert lora.join_weights(twin, CPU) == 2 * SIZES["num_hidden_layers"]
    return twin


def loss_of(model: PreTrainedModel, seed: int = 0) -> Tensor:
    ids = torch.randint(1, 64, (1, 40), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    edges = Documents(torch.tensor([0, 25, 40], dtype=torch.int32), 25, "products")
    hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False, documents=edges).last_hidden_state
    logits = model.lm_head(hidden[0, :-1])
    loss: Tensor = nn.functional.cross_entropy(logits.float() if logits.dtype is torch.bfloat16 else logits, ids[0, 1:])
    return loss


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, reference in expected.items():
        assert reference.norm() > 0
        assert (got[name] - reference).norm() / reference.norm() < tolerance, name


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_gradients_are_those_of_separate_weights(dtype, tolerance, family):
    """fp32: the same products, added in another order."""
    model = build(dtype, family=family)
    assert_alike(gradients(joined(model)), gradients(model), tolerance)


def test_an_nf4_base_is_not_joined():
    assert lora.join_weights(build(torch.float32, base="nf4"), CPU) == 0


@pytest.mark.parametrize("kind", [*ROWS, INT8])
def test_a_joined_base_in_eight_bits_has_the_same_forward_and_gradients_within_its_rounding(kind):
    """W has a scale for each row, so the forward is the same bit for bit. A row of W^T and of dy has one scale for the
    whole group: each value is rounded to e4m3 (3 bits of mantissa, up to 2^-4 of it) or int8 (1/254 of the row's largest)
    either way."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 2, "num_attention_heads": 4}
    model = build(torch.bfloat16, **sizes)
    twin = joined(model)
    assert lora.convert_to_eight_bit(model, kind) == lora.convert_to_eight_bit(twin, kind) == 14
    assert sum(layer.joined for _, layer in lora.loras(twin)) == 4
    assert torch.equal(loss_of(twin), loss_of(model))
    assert_alike(gradients(twin), gradients(model), 0.1)


def test_int8_is_joined_in_whole_blocks_of_its_rotation_only():
    twin = joined(build(torch.bfloat16))  # 64 rows, and blocks of 128
    assert lora.convert_to_eight_bit(twin, INT8) == 14
    assert not any(layer.joined for _, layer in lora.loras(twin))


def test_the_probe_tries_the_joined_shapes_too():
    model = build(torch.float32).to("meta")
    assert lora.eight_bit_shapes(model) == [(32, 64), (64, 64), (64, 96), (96, 64)]
    assert set(lora.eight_bit_shapes(model, ["joined-weights"])) == {
        *lora.eight_bit_shapes(model),
        (128, 64),
        (192, 64),
    }


def test_a_base_scaled_by_tensor_is_not_joined():
    twin = joined(build(torch.bfloat16))
    assert lora.convert_to_eight_bit(twin, TENSOR_WISE) == 14
    assert not any(layer.joined for _, layer in lora.loras(twin))
    assert loss_of(twin).isfinite()


def test_fifty_steps_have_the_losses_of_separate_weights():
    """AdamW in fp32, a batch of its own each step: rounding grows slowly over the steps."""
    losses = []
    model = build(torch.float32)
    for case in (joined(model), model):
        optimizer = torch.optim.AdamW((p for p in case.parameters() if p.requires_grad), lr=1e-3)
        losses.append([])
        for step in range(50):
            loss = loss_of(case, seed=step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1][-1] < losses[1][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("base", ["dense", *ROWS])
def test_compiled_layers_answer_as_eager_ones(base):
    model = joined(build(torch.bfloat16))
    if base == ROW_WISE:
        lora.convert_to_eight_bit(model, base)
    layers = [module for module in model.modules() if isinstance(module, fused.FusedMLP)]
    torch.compiler.reset()
    compiled = torch.compile(lambda layer, x: layer(x), backend="aot_eager", fullgraph=True)
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    for layer in layers:
        trained = [p for p in layer.parameters() if p.requires_grad]
        got, expected = compiled(layer, x), layer(x)
        # The compiler computes SwiGLU by other operations, each rounded to bf16: 2^-9 of a value.
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-3)
        here, there = (torch.autograd.grad(y.float().square().sum(), trained) for y in (got, expected))
        for a, b in zip(here, there, strict=True):
            assert (a - b).norm() / b.norm() < 2e-2
    torch.compiler.reset()


def test_names_values_and_files_do_not_show_that_weights_are_joined(tmp_path):
    model = build(torch.float32)
    twin: Any = joined(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    save_file(twin.state_dict(), tmp_path / "joined.safetensors")
    stored = load_file(tmp_path / "joined.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(stored[name], value), name
    attention_layer = twin.model.layers[0].self_attn
    own = [layer.weight.untyped_storage().data_ptr() for layer in (attention_layer.q_proj, attention_layer.v_proj)]
    assert own == [attention_layer.q_proj.joined_0.untyped_storage().data_ptr()] * 2
    for case, folder in ((model, tmp_path / "a"), (twin, tmp_path / "b")):
        folder.mkdir()
        peft_files.write_adapter(folder, *peft_files.adapter_files(case, ADAPTER, "base", None))
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    for (name, layer), (_, other) in zip(lora.loras(model), lora.loras(twin), strict=True):
        assert torch.equal(lora.merged_weight(layer), lora.merged_weight(other)), name
    with lora.disabled(model), lora.disabled(twin):
        torch.testing.assert_close(loss_of(twin), loss_of(model), rtol=0, atol=0)


def test_weights_are_loaded_into_the_joined_tensor():
    """On meta, as a run builds it: materialise and load find the views that were made before."""
    from tunesmith.model.load import materialise

    source = build(torch.float32)
    model = copy.deepcopy(source).to("meta")
    assert lora.join_weights(model, CPU) == 4
    materialise(model, CPU)
    with torch.no_grad():
        for name, value in source.named_parameters():
            model.get_parameter(name).copy_(value)
    for name, buffer in source.named_buffers():
        model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    layer = model.model.layers[1].mlp
    assert torch.equal(layer.gate_proj.joined_0, torch.cat([layer.gate_proj.weight, layer.up_proj.weight]))
    torch.testing.assert_close(loss_of(model), loss_of(source))


@pytest.mark.parametrize(
    "adapter", [Adapter(rank=4, dropout=0.1), Adapter(rank=4, target=("q_proj", "v_proj", "up_proj"))]
)
def test_layers_that_are_computed_one_by_one_are_not_joined(adapter):
    model = build(torch.float32, adapter=adapter)
    assert lora.join_weights(model, CPU) == 0
    assert not any("joined" in name for name, _ in model.named_buffers())


def test_a_weight_with_two_owners_is_not_joined():
    model = build(torch.float32)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    assert lora.join_weights(model, CPU) == 2
    assert model.model.layers[1].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight


def test_a_run_with_joined_weights_has_the_losses_and_says_so(tiny, tmp_path):
    losses = []
    for name, paths in (("plain", []), ("joined", ["joined-weights"])):
        (tmp_path / name).mkdir()
        said: list[str] = []
        run = make_run(tiny, tmp_path / name, train={"fast_paths": paths})
        train(run, say=said.append)
        records = [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").open()]
        losses.append([r[key] for r in records for key in ("loss", "val_loss") if key in r])
        assert any("fast paths: joined-weights" in line for line in said) is bool(paths)
    # The model is in fp32: the same products, added in another order.
    assert len(losses[0]) == 10
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def test_a_fast_path_without_effect_is_named(tiny, tmp_path):
    said: list[str] = []
    write_rows(tmp_path / "train.jsonl", 8)
    run = make_run(tiny, tmp_path, held=False, train={"fast_paths": ["joined-weights"]}, adapter={"dropout": 0.1})
    Path(run.output_dir).mkdir(parents=True, exist_ok=True)
    session = build_session(run, Start(), say=said.append)
    assert session.plan.fast_paths == ()
    (warning,) = (line for line in said if line.startswith("warning: train.fast_paths"))
    assert warning.startswith(
        "warning: train.fast_paths: joined-weights has no effect: it needs adapters without dropout"
    )
