"""Vision-language models in whole: packed rows with pictures, a frozen tower, PEFT's files."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

import vision
from devices import gpu
from errors import refuses
from figures import write_figures
from recipes import built_model, make_run
from tunesmith.adapter import lora
from tunesmith.batches.batch import Batch, collate
from tunesmith.batches.positions import mrope_positions
from tunesmith.checkpoint.contents import write_model_files
from tunesmith.config.schema import Model
from tunesmith.errors import ModelError, RecipeError
from tunesmith.hub.model_files import read_model_files
from tunesmith.hub.picture_support import ReadyPixels, make_picture_row
from tunesmith.model.arch.load import build_on_meta
from tunesmith.model.known.decoder import (
    find_decoder,
    find_projector,
    find_text_model,
    vision_parameters,
)
from tunesmith.model.layers import attention
from tunesmith.model.layers import vision as vision_model
from tunesmith.model.measuring.picture_flops import count_picture_flops
from tunesmith.tokens.text.example import Example, Pixels
from tunesmith.tokens.text.placeholders import PictureProcessor
from tunesmith.tools.evaluate.evaluate import evaluate
from tunesmith.train_model import TrainModel

pytestmark = pytest.mark.slow

LANES = [
    pytest.param(family, marks=[] if family in ("gemma3", "qwen3_vl") else [pytest.mark.nightly])
    for family in sorted(vision.FAMILIES)
]


@pytest.fixture(scope="module", params=LANES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of a family, with its processor and tokenizer."""
    family: str = request.param
    return write_model(tmp_path_factory.mktemp(family), family)


def write_model(folder: Path, family: str) -> Path:
    vision.write_processor(folder, family)
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05)
    model.save_pretrained(folder)
    return folder


def seeing(folder: Path, tmp_path: Path, **changes: Any) -> Any:
    changes["model"] = {"vision": True, **changes.get("model", {})}
    return make_run(folder, tmp_path, **changes)


def make_batch(folder: Path, run: Any) -> Batch:
    examples = make_examples(folder, run)
    return collate([examples], length=sum(len(each.ids) for each in examples), pad_id=0)


def make_examples(folder: Path, run: Any) -> list[Example]:
    """Documents with two pictures, none and one, with ids of the model's own."""
    files = read_model_files(folder, run.model)
    assert files.pictures is not None
    row = make_picture_row(files.pictures, files.tokenizer)
    token_id = files.pictures.token_id
    examples = []
    for ids, pictures in zip(row.ids.split(row.lengths), row.alone, strict=True):
        own = np.where(ids.numpy() == row.ids.max().item(), token_id, ids.numpy() + 40)
        handle = None
        if pictures:
            handle = ReadyPixels(token_id, pixels_of(pictures, files.pictures))
        examples.append(Example(own.astype(np.int32), own != token_id, pictures=handle))
    return examples


def pixels_of(inputs: Any, processor: PictureProcessor) -> Pixels:
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    grids = np.zeros((0, 2), np.int64)
    if "image_grid_thw" in arrays:
        merge = processor._processor.image_processor.merge_size
        grids = arrays["image_grid_thw"][:, 1:] // merge
    return Pixels(arrays, grids)


def whole(folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def hidden_of(model: TrainModel, batch: Batch) -> Tensor:
    model.use_attention("training")
    return model.head(model.hidden(batch))


def test_a_picture_is_seen_both_ways_in_layers_with_a_window(tmp_path: Path) -> None:
    """In Gemma 4 of more than a few billion parameters."""
    vision.write_processor(tmp_path, "gemma4_both_ways")
    files = read_model_files(tmp_path, Model(name=str(tmp_path), dtype="fp32", vision=True))
    assert files.support.bidirectional_pictures == "sliding"
    assert files.support.errors is not None
    assert files.support.errors.are_rounding()


# What Transformers asks the device for, once a micro batch.
ASKING = {"idefics3": "get_image_features", "gemma4": "forward"}


def test_a_model_that_sees_asks_nothing_of_the_device(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is on meta, whose tensors have no values: an operator that asks for them raises."""
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # as `build_model` on CUDA
    run = seeing(folder, tmp_path)
    meta = torch.device("meta")
    model = built_model(run, folder).to(meta).train()
    batch = make_batch(folder, run).to(meta)
    assert {tensor.device.type for tensor in batch.pictures.values()} == {"cpu"}
    asking = ASKING.get(model.model.config.model_type)
    refused = pytest.raises(NotImplementedError, match="nonzero") if asking else nullcontext()
    with model.step_context(batch), refused as error:
        model(batch).loss.backward()
    if error is not None:
        names = [entry.name for entry in error.traceback if "/models/" in str(entry.path)]
        assert names[-1] == asking


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    # bf16 has 8 bits; kernels add up a document alone in another order than in a row.
    [("cpu", "fp32", 1e-5), pytest.param("cuda", "bf16", 0.05, marks=gpu)],
)
def test_a_packed_row_trains_as_each_document_alone(
    device: str, dtype: str, tolerance: float, folder: Path, tmp_path: Path
) -> None:
    run = seeing(folder, tmp_path, model={"dtype": dtype})
    model = built_model(run, folder).to(device).train()
    first = next(model.parameters())
    model.attention_backend, _ = attention.select_attention_backend(first.device, first.dtype, 16)

    def results(rows: list[list[Example]]) -> list[Tensor]:
        """The sum of the losses, and its gradients."""
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=device)
        for row in rows:
            length = sum(len(example.ids) for example in row)
            batch = collate([row], length=length, pad_id=0).to(torch.device(device))
            with model.step_context(batch):
                loss = model(batch).loss
                loss.backward()
            total += loss.detach()
        return [total, *(p.grad.double() for p in model.parameters() if p.requires_grad)]

    examples = make_examples(folder, run)
    packed = results([examples])
    alone = results([[example] for example in examples])
    assert torch.stack([gradient.norm() for gradient in alone[1:]]).max() > 1e-3
    for ours, expected in zip(packed, alone, strict=True):
        assert (ours - expected).norm() <= tolerance * max(expected.norm(), 1e-3)


def test_counted_operations_are_those_of_a_real_forward(folder: Path, tmp_path: Path) -> None:
    """As torch counts them with eager attention, whose products it sees."""
    stated = seeing(folder, tmp_path).model
    processor = read_model_files(folder, stated).pictures
    assert processor is not None
    pixels = processor.pixels([Image.new("RGB", (120, 90))])
    inputs = {name: torch.from_numpy(array) for name, array in pixels.inputs.items()}
    config = AutoConfig.from_pretrained(folder)
    on_meta = build_on_meta(config.get_text_config(), stated, full_config=config)
    model = whole(folder)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        vision_model.picture_features(model, inputs)
    assert count_picture_flops(on_meta, inputs) == counter.get_total_flops() > 0


def test_each_window_of_the_tower_is_attended_to_alone() -> None:
    lengths = [4, 4, 2, 4, 2, 1]
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 8, dtype=torch.float64)
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    out, _ = vision_model.attend_windows(
        nn.Identity(), query, key, value, None, scaling=0.3, cu_seq_lens_q=edges
    )
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    expected = torch.cat([((q @ k.mT) * 0.3).softmax(-1) @ v for q, k, v in parts], 2)
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("projector", [False, True])
def test_an_adapter_is_on_the_text_alone_and_the_tower_frozen(
    projector: bool, folder: Path, tmp_path: Path
) -> None:
    run = seeing(folder, tmp_path, model={"train_projector": projector})
    model = built_model(run, folder).train()
    text, _ = find_text_model(model.model)
    assert all(name.startswith(f"{text}.") for name, _ in lora.loras(model.model))
    parts = tuple(f"{name}." for name in find_projector(model.model)) if projector else ()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = {name: p.detach().clone() for name, p in vision_parameters(model.model)}
    batch = make_batch(folder, run)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        with model.step_context(batch):
            model(batch).loss.backward()
        optimizer.step()
    for name, p in vision_parameters(model.model):
        is_trained = bool(parts) and name.startswith(parts)
        assert is_trained == (p.grad is not None and bool(p.grad.any())), name
        assert is_trained or torch.equal(p, before[name])
    # Of a rank whose rows have no pictures.
    texts = replace(batch, pictures={}, spans=())
    model.zero_grad()
    with model.step_context(texts):
        model(texts).loss.backward()
    for name, p in vision_parameters(model.model):
        is_trained = bool(parts) and name.startswith(parts)
        assert is_trained == (p.grad is not None and not p.grad.any()), name


def test_a_projector_has_a_key_of_its_own(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "gemma3")
    saved = {"modules_to_save": ["multi_modal_projector"]}
    with refuses(RecipeError, fix=["model.train_projector=true"], names=["frozen"]):
        built_model(seeing(folder, tmp_path, adapter=saved), folder)
    # As a file of PEFT's says it
    run = seeing(folder, tmp_path, model={"train_projector": True}, adapter=saved)
    names = {name for name, _, _ in lora.saved_parameters(built_model(run, folder).model)}
    inside = "model.multi_modal_projector"
    assert names == {inside, f"{inside}.mm_soft_emb_norm"}
    with refuses(RecipeError, where="test: model.train_projector", fix=["model.vision: true"]):
        make_run(folder, tmp_path, model={"train_projector": True})


def test_peft_opens_the_adapter_on_the_whole_model(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    run = seeing(folder, tmp_path, model={"train_projector": True})
    model = built_model(run, folder).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for _, layer in lora.loras(model.model):
            nn.init.normal_(layer.lora_B, std=0.1)
        for _, module, key in lora.saved_parameters(model.model):
            module.get_parameter(key).mul_(0.5)
    batch = make_batch(folder, run)
    write_model_files(tmp_path, run, model, {})
    # In float64: rounding of a merged fp32 weight alone comes near the tolerance.
    expected = hidden_of(model.double(), batch)
    theirs = PeftModel.from_pretrained(whole(folder), tmp_path).double()
    plain = make_run(folder, tmp_path, adapter={"kind": "none"}).adapter
    merged = built_model(replace(run, adapter=plain), folder).eval().double()
    merged.model.load_state_dict(theirs.merge_and_unload().state_dict())
    torch.testing.assert_close(hidden_of(merged, batch), expected, atol=2e-6, rtol=0)


def test_a_model_trained_in_full_is_the_whole_model_again(folder: Path, tmp_path: Path) -> None:
    run = seeing(folder, tmp_path, adapter={"kind": "none"})
    model = built_model(run, folder).eval()
    frozen = {name for name, _ in vision_parameters(model.model)}
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            assert parameter.requires_grad == (name not in frozen)
            if parameter.requires_grad:
                parameter.add_(0.01)
    written = tmp_path / "written"
    written.mkdir()
    write_model_files(written, run, model, {})
    before, after = (load_file(place / "model.safetensors") for place in (folder, written))
    assert before.keys() == after.keys()
    changed = sum(not torch.equal(before[name], after[name]) for name in before)
    assert changed == len(list(model.model.named_parameters())) - len(frozen)
    batch = make_batch(folder, run)
    again = built_model(run, folder).eval()
    again.model.load_state_dict(whole(written).state_dict())
    assert torch.equal(hidden_of(again, batch), hidden_of(model, batch))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def test_positions_are_the_model_s_own(family: str, tmp_path: Path) -> None:
    vision.write_processor(tmp_path, family)
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    merge = config.vision_config.spatial_merge_size
    decoder: Any = find_decoder(model)
    random = np.random.default_rng(0)
    token_id = config.image_token_id
    for _ in range(60):
        grids = random.integers(1, 9, (int(random.integers(0, 5)), 2))
        runs = [np.full(random.integers(0, 12), 5)]
        for rows, columns in grids:
            runs += [np.full(rows * columns, token_id), np.full(random.integers(1, 12), 5)]
        ids = np.concatenate(runs)
        if not len(ids):
            continue
        thw = np.concatenate([np.ones((len(grids), 1), np.int64), grids * merge], 1)
        expected, _ = decoder.get_rope_index(
            torch.from_numpy(ids)[None],
            image_grid_thw=torch.from_numpy(thw) if len(grids) else None,
            mm_token_type_ids=torch.from_numpy(ids == token_id).int()[None],
        )
        assert np.array_equal(mrope_positions(ids, token_id, grids), expected[:, 0].numpy())


def test_what_cannot_be_trained_is_refused(tiny: Path, tmp_path: Path) -> None:
    with refuses(ModelError, where=f"{tiny}/config.json", fix=["model.vision=false"]):
        read_model_files(tiny, seeing(tiny, tmp_path).model)
    place = tmp_path / "llama4"
    AutoConfig.for_model("llama4").save_pretrained(place)
    where = f"{place}/config.json"
    with refuses(ModelError, where=where, names=["llama4"], fix=["model.vision=false"]):
        read_model_files(place, seeing(place, tmp_path).model)
    folder = write_model(tmp_path / "model", "qwen3_vl")
    run = seeing(folder, tmp_path, adapter={"target": ["attn.qkv"]})
    with refuses(RecipeError, where="adapter.target", names=["attn.qkv"]):
        built_model(run, folder)


def test_a_model_without_a_recipe_sees_the_pictures_of_rows(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen2_5_vl")
    assert evaluate(model, write_figures(tmp_path / "rows", 3), device="cpu").rows == 3
